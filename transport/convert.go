package transport

import (
	"errors"
	"strconv"
	"time"

	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/distlock/distlock/fence"
	"github.com/distlock/distlock/lease"
	"github.com/distlock/distlock/lease/machine"
	pb "github.com/distlock/distlock/proto/distlock/v1"
	"github.com/distlock/distlock/proto/wire"
)

func timestamp(ns int64) *timestamppb.Timestamp { return timestamppb.New(time.Unix(0, ns)) }

// duration reads a duration; one out of Go's range is an invalid argument.
func duration(field string, d *durationpb.Duration) (time.Duration, error) {
	if d == nil {
		return 0, nil
	}
	// AsDuration saturates: what does not come back the same was out of range.
	if err := d.CheckValid(); err != nil || int64(d.AsDuration()/time.Second) != d.GetSeconds() {
		return 0, &lease.InvalidError{Field: field, Msg: "is out of range"}
	}
	return d.AsDuration(), nil
}

func metas(m map[string]string) []machine.Meta {
	if len(m) == 0 {
		return nil
	}
	list := make([]machine.Meta, 0, len(m))
	for k, v := range m {
		list = append(list, machine.Meta{Key: k, Value: v}) // the manager sorts
	}
	return list
}

func metaMap(list []machine.Meta) map[string]string {
	if len(list) == 0 {
		return nil
	}
	m := make(map[string]string, len(list))
	for _, e := range list {
		m[e.Key] = e.Value
	}
	return m
}

// operations converts requests to the manager's operations. It uses its memory
// again: an operation is valid until the next is made. It is for one goroutine.
type operations struct {
	acquire lease.AcquireRequest
	release lease.ReleaseRequest
	abandon lease.AbandonRequest
	keep    lease.KeepAliveRequest
}

// of is the operation that a request of a service asks for. Errors:
// *lease.InvalidError.
func (o *operations) of(req any) (lease.Operation, error) {
	switch r := req.(type) {
	case *pb.AcquireRequest:
		return &o.acquire, o.fillAcquire(r)
	case *pb.ReleaseRequest:
		o.release = lease.ReleaseRequest{
			Lease: lease.ID(r.GetLeaseId()), Name: r.GetName(), Token: fence.Token(r.GetToken()), Request: lease.RequestID(r.GetRequestId()),
		}
		return &o.release, nil
	case *pb.AbandonRequest:
		ids := o.abandon.Requests[:0]
		if r.GetRequestId() != 0 || len(r.GetRequestIds()) == 0 && !r.GetEndLease() {
			ids = append(ids, lease.RequestID(r.GetRequestId()))
		}
		for _, id := range r.GetRequestIds() {
			ids = append(ids, lease.RequestID(id))
		}
		o.abandon = lease.AbandonRequest{Lease: lease.ID(r.GetLeaseId()), Requests: ids, EndLease: r.GetEndLease()}
		return &o.abandon, nil
	case *pb.CheckTokenRequest:
		return &lease.CheckTokenRequest{Name: r.GetName(), Token: fence.Token(r.GetToken())}, nil
	case *pb.ForceReleaseRequest:
		return &lease.ForceReleaseRequest{Name: r.GetName(), Token: fence.Token(r.GetToken()), By: r.GetBy()}, nil
	case *pb.GrantRequest:
		ttl, err := duration("ttl", r.GetTtl())
		return &lease.GrantLeaseRequest{
			Request: lease.RequestID(r.GetRequestId()), TTL: ttl, Owner: r.GetOwner(), Metadata: metas(r.GetMetadata()),
		}, err
	case *pb.KeepAliveRequest:
		if len(r.GetLeaseIds())+len(r.GetRequestIds()) > maxKeepAlive {
			return nil, &lease.InvalidError{Field: "lease_ids", Msg: "must be at most " + strconv.Itoa(maxKeepAlive) + ", with request_ids"}
		}
		o.keep.Leases, o.keep.Requests = o.keep.Leases[:0], o.keep.Requests[:0]
		for _, id := range r.GetLeaseIds() {
			o.keep.Leases = append(o.keep.Leases, lease.ID(id))
		}
		for _, id := range r.GetRequestIds() {
			o.keep.Requests = append(o.keep.Requests, lease.RequestID(id))
		}
		return &o.keep, nil
	case *pb.RevokeRequest:
		return &lease.RevokeLeaseRequest{Lease: lease.ID(r.GetLeaseId()), By: r.GetBy()}, nil
	}
	return nil, &lease.InvalidError{Field: "call", Msg: "must be one that this server knows"}
}

// maxKeepAlive bounds the leases renewed by one message.
const maxKeepAlive = 10_000

func (o *operations) fillAcquire(r *pb.AcquireRequest) error {
	ttl, err := duration("ttl", r.GetTtl())
	if err != nil {
		return err
	}
	wait, err := duration("wait", r.GetWait())
	if err != nil {
		return err
	}
	delay, err := duration("lock_delay", r.GetLockDelay())
	if err != nil {
		return err
	}
	switch {
	case wait < 0:
		return &lease.InvalidError{Field: "wait", Msg: "must not be negative"}
	case r.GetWaitForever() && wait != 0:
		return &lease.InvalidError{Field: "wait", Msg: "is set, and wait_forever too"}
	case r.GetWaitForever():
		wait = lease.WaitForever
	}
	mode := lease.Mode(r.GetMode())
	switch r.GetMode() {
	case pb.Mode_MODE_UNSPECIFIED:
		mode = machine.Exclusive
	case pb.Mode_MODE_EXCLUSIVE, pb.Mode_MODE_SHARED:
	default:
		return &lease.InvalidError{Field: "mode", Msg: "must be exclusive or shared"}
	}
	o.acquire = lease.AcquireRequest{
		Lease: lease.ID(r.GetLeaseId()), Request: lease.RequestID(r.GetRequestId()),
		LowestOpen: lease.RequestID(r.GetLowestOpenRequestId()), Attempt: r.GetAttempt(), Names: r.GetNames(), Mode: mode,
		Limit: r.GetLimit(), Wait: wait, LockDelay: delay, Actor: r.GetActor(),
		Metadata: metas(r.GetMetadata()), TTL: ttl, Owner: r.GetOwner(),
	}
	return nil
}

// keptAlive is the answer to a renewal. An error is the answer to all of it.
func keptAlive(kept *lease.KeptAlive) (*pb.KeepAliveResponse, error) {
	out := &pb.KeepAliveResponse{}
	for _, k := range kept.Leases {
		problem, err := problemAlone(k.Err)
		if err != nil {
			return nil, err
		}
		result := &pb.KeepAliveResponse_Result{LeaseId: uint64(k.Lease), Problem: problem, LostCount: k.LostCount}
		if k.Err == nil {
			result.Ttl = durationpb.New(k.TTL)
		}
		for _, lost := range k.Lost {
			result.Lost = append(result.Lost, &pb.Loss{
				LeaseId: uint64(k.Lease), Token: uint64(lost.Token), Cause: pb.EndCause(lost.Ended.Cause), By: lost.Ended.By,
			})
		}
		out.Results = append(out.Results, result)
	}
	for _, k := range kept.Requests {
		problem, err := problemAlone(k.Err)
		if err != nil {
			return nil, err
		}
		result := &pb.KeepAliveResponse_Request{
			RequestId: uint64(k.Request), LeaseId: uint64(k.Lease), Waiting: k.Waiting, Attached: k.Attached, Problem: problem,
		}
		if k.Err == nil {
			result.Ttl = durationpb.New(k.TTL)
		}
		out.Requests = append(out.Requests, result)
	}
	return out, nil
}

// problemAlone is the problem of one lease or request among several. An error that
// is no refusal concerns all of them, and is returned.
func problemAlone(err error) (*pb.Problem, error) {
	var refusal *lease.Refusal
	if errors.As(err, &refusal) {
		return problemOf(refusal), nil
	}
	return nil, err
}

func tokenCheck(c lease.TokenCheck) *pb.CheckTokenResponse {
	return &pb.CheckTokenResponse{Live: c.Live, CurrentToken: uint64(c.Current), LastToken: uint64(c.Last), Floor: uint64(c.Floor)}
}

func held(g *machine.Hold, ttl time.Duration) *pb.Hold {
	out := wire.NewGranted()
	fill(out, g, ttl)
	return &out.Hold
}

// fill puts a hold into an empty answer.
func fill(p *wire.Granted, g *machine.Hold, ttl time.Duration) {
	out := &p.Hold
	out.Token, out.LeaseId, out.Mode = uint64(g.Token), uint64(g.Lease), pb.Mode(g.Mode)
	at := time.Unix(0, g.Since)
	p.At.Seconds, p.At.Nanos = at.Unix(), int32(at.Nanosecond())
	out.GrantedAt = &p.At
	if ttl > 0 {
		p.TTL.Seconds, p.TTL.Nanos = int64(ttl/time.Second), int32(ttl%time.Second)
		out.Ttl = &p.TTL
	}
	if g.Request < machine.AnonymousRequest {
		out.RequestId = uint64(g.Request)
	}
	for i, k := range g.Locks {
		lock := &p.Lock
		if i > 0 {
			lock = &pb.HeldLock{}
		}
		lock.Name, lock.Floor = k.Name, uint64(k.Floor)
		out.Locks = append(out.Locks, lock)
	}
}

func holders(list []machine.Holder) []*pb.Holder {
	var out []*pb.Holder
	for _, h := range list {
		p := &pb.Holder{
			Token: uint64(h.Token), Floor: uint64(h.Floor), LeaseId: uint64(h.Lease), Owner: h.Owner,
			Mode: pb.Mode(h.Mode), Since: timestamp(h.Since), Actor: h.Actor, Metadata: metaMap(h.Metadata),
		}
		if h.LockDelay > 0 {
			p.LockDelay = durationpb.New(time.Duration(h.LockDelay))
		}
		out = append(out, p)
	}
	return out
}

func waiters(list []machine.Waiter) []*pb.Waiter {
	var out []*pb.Waiter
	for _, w := range list {
		out = append(out, &pb.Waiter{
			LeaseId: uint64(w.Lease), Owner: w.Owner, Mode: pb.Mode(w.Mode), Since: timestamp(w.Since),
			Actor: w.Actor, Metadata: metaMap(w.Metadata), Limit: w.Limit,
		})
	}
	return out
}

func lockInfo(k lease.LockInfo) *pb.Lock {
	out := &pb.Lock{
		Name: k.Name, Holders: holders(k.Holders), Waiters: waiters(k.Waiters), WaiterCount: int32(k.WaiterCount),
		HolderCount: int32(k.HolderCount), Limit: k.Limit, Declared: k.Declared, Clock: k.Clock, LastToken: uint64(k.Last),
	}
	if k.DelayRemaining > 0 {
		out.DelayRemaining = durationpb.New(k.DelayRemaining)
	}
	return out
}

func leaseInfo(l lease.LeaseInfo) *pb.Lease {
	out := &pb.Lease{
		LeaseId: uint64(l.ID), Ttl: durationpb.New(time.Duration(l.TTL)), Remaining: durationpb.New(l.Remaining),
		Owner: l.Owner, Metadata: metaMap(l.Metadata), GrantedAt: timestamp(l.Since), Own: l.Own,
		HoldCount: int32(len(l.Holds)),
	}
	for i := range l.Holds[:min(len(l.Holds), machine.MaxListed)] {
		out.Holds = append(out.Holds, held(&l.Holds[i], 0))
	}
	for _, w := range l.Waits {
		out.WaitingCount += int32(len(w.Names))
		if len(out.WaitingFor) < machine.MaxListed {
			out.WaitingFor = append(out.WaitingFor, w.Names...)
		}
	}
	out.WaitingFor = out.WaitingFor[:min(len(out.WaitingFor), machine.MaxListed)]
	return out
}

// kinds are the machine's events as the API names them. Events of a lease alone
// concern no lock, and are left out.
var kinds = map[machine.EventKind]pb.Event_Kind{
	machine.EventQueued:       pb.Event_KIND_QUEUED,
	machine.EventGranted:      pb.Event_KIND_GRANTED,
	machine.EventHoldEnded:    pb.Event_KIND_ENDED,
	machine.EventAbandoned:    pb.Event_KIND_ABANDONED,
	machine.EventDelayStarted: pb.Event_KIND_DELAY_STARTED,
	machine.EventDelayEnded:   pb.Event_KIND_DELAY_ENDED,
	machine.EventDeclared:     pb.Event_KIND_DECLARED,
	machine.EventUndeclared:   pb.Event_KIND_UNDECLARED,
}

// event appends an event of the machine, once for each of its locks that is wanted.
func event(list []*pb.Event, e lease.Event, wanted func(name string) bool) []*pb.Event {
	kind, ok := kinds[e.Kind]
	if !ok {
		return list
	}
	for _, k := range e.Locks {
		if !wanted(k.Name) {
			continue
		}
		p := &pb.Event{
			Revision: e.Revision, Kind: kind, Name: k.Name, LeaseId: uint64(e.Lease), Owner: e.Owner,
			Token: uint64(e.Token), Floor: uint64(k.Floor), Mode: pb.Mode(e.Mode), Cause: pb.EndCause(e.Cause),
			By: e.By, Time: timestamp(e.Stamp),
		}
		if e.Delay.Duration > 0 {
			p.Delay = durationpb.New(time.Duration(e.Delay.Duration))
		}
		list = append(list, p)
	}
	return list
}
