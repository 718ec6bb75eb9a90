package transport

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"strconv"
	"sync"
	"time"

	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"
	"google.golang.org/protobuf/reflect/protoregistry"

	"github.com/distlock/distlock/internal/bound"
	"github.com/distlock/distlock/lease"
	"github.com/distlock/distlock/lease/machine"
	pb "github.com/distlock/distlock/proto/distlock/v1"
)

// forwarder sends unary calls that only the leader can answer to the leader,
// so that any client works with any node.
type forwarder struct {
	cluster  Cluster
	m        Manager
	stopping context.Context
	work     workers
	// leaderless bounds how long a call waits for somebody to lead. After that the
	// client may find another node that reaches the leader.
	leaderless time.Duration
	settling   sync.WaitGroup // calls of settle
	forwarded  [lanes]bound.Count
}

// What is forwarded goes by lanes, each with a connection to the leader: calls that
// wait in queues must not use up the one that renewals need.
const (
	laneKeep = iota // what keeps or gives back: renewals, releases
	laneCall        // what else is answered at once
	laneWait        // acquisitions that may wait, their renewals and their ends
	lanes
)

// maxForwarded bounds the calls under way on one lane: fewer than the leader takes on
// one connection, for one more would wait there in silence.
const maxForwarded = 8000

func laneOf(req any) int {
	switch r := req.(type) {
	case *pb.AcquireRequest:
		if r.GetWaitForever() || r.GetWait().AsDuration() > 0 {
			return laneWait
		}
	case *pb.KeepAliveRequest, *pb.ReleaseRequest, *pb.AbandonRequest, *pb.RevokeRequest:
		return laneKeep
	}
	return laneCall
}

// betweenTries is how long a call waits before it asks anew.
const betweenTries = 15 * time.Millisecond

// unary tries the call here, which is all where this node leads, and follows
// the leader while the answer is that another leads.
func (f *forwarder) unary(ctx context.Context, req any, info *grpc.UnaryServerInfo, handler grpc.UnaryHandler) (_ any, err error) {
	if a := connOf(ctx); f.cluster == nil || a != nil && a.peer {
		return handler(ctx, req)
	}
	work := f.work
	if renews(req) {
		work = nil
	}
	again := false // a leader's answer was lost, and the request sent anew
	waited := false
	acquire := f.name(req)
	if acquire != nil {
		defer func() {
			if err != nil && (again || !definite(err) || waited && notLeading(err)) {
				f.settling.Go(func() { f.settle(acquire.GetLeaseId(), acquire.GetRequestId()) })
			}
		}()
		defer f.renewWait(acquire)()
	}
	began := time.Now()
	resp, err := handler(ctx, req)
	waited = time.Since(began) > betweenTries // it may have had a place
	until := time.Now().Add(f.leaderless)
	lane := laneOf(req)
	if notLeading(err) {
		if under := &f.forwarded[lane]; under.Enter(maxForwarded) {
			defer under.Leave()
		} else {
			return nil, &lease.ExhaustedError{What: "calls that this node forwards to the leader", Max: maxForwarded}
		}
	}
	for notLeading(err) && time.Now().Before(until) {
		var conn grpc.ClientConnInterface
		var known error
		work.yield(ctx, func() {
			wait, cancel := context.WithDeadline(ctx, until)
			defer cancel()
			defer context.AfterFunc(f.stopping, cancel)()
			var led context.Context
			if conn, led, known = f.cluster.Leader(wait, lane); known != nil || conn == nil {
				return
			}
			began := time.Now()
			resp, err = f.send(ctx, led, conn, info.FullMethod, req)
			if errors.Is(err, errAnswerLost) {
				again = true
				if acquire != nil {
					acquire.Attempt++
				}
			}
			if time.Since(began) > betweenTries { // it was not refused at once
				waited, until = true, time.Now().Add(f.leaderless)
			}
		})
		switch {
		case ctx.Err() != nil:
			return nil, ctx.Err()
		case f.stopping.Err() != nil && notLeading(err):
			return nil, lease.ErrStopping
		case known != nil:
			return nil, err // nobody leads
		case conn == nil:
			resp, err = handler(ctx, req)
		}
		if notLeading(err) {
			work.yield(ctx, func() {
				select {
				case <-time.After(betweenTries):
				case <-ctx.Done():
				}
			})
		}
	}
	if again && err != nil && endedAlready(err) {
		// The answer that was lost was a refusal, or what it granted is over.
		// The client knows of one attempt only: to it the outcome is unknown,
		// until it asks again.
		return nil, lease.ErrOutcomeUnknown
	}
	return resp, err
}

// name gives a request that has no id one, so that it may be sent again. It
// returns an Acquire that it has named: this node has to renew and to abandon it, as
// a client does that names its requests.
func (f *forwarder) name(req any) *pb.AcquireRequest {
	switch r := req.(type) {
	case *pb.AcquireRequest:
		switch {
		case r.GetRequestId() != 0:
			return nil
		case r.GetLeaseId() == 0:
			r.RequestId = rand.Uint64N(1<<63-1) + 1
		case f.m.Status().Level < randomLevel:
			return nil
		default:
			r.RequestId = uint64(machine.RandomRequest) + rand.Uint64N(uint64(machine.AnonymousRequest-machine.RandomRequest))
		}
		r.LowestOpenRequestId, r.Attempt = 0, 1
		return r
	case *pb.GrantRequest:
		if r.GetRequestId() == 0 {
			r.RequestId = rand.Uint64N(1<<63-1) + 1
		}
	}
	return nil
}

// renewWait keeps the wait of an Acquire that this node has named alive. stop ends
// that, and returns once it has ended.
func (f *forwarder) renewWait(r *pb.AcquireRequest) (stop func()) {
	every := r.GetTtl().AsDuration() / 3
	if r.GetLeaseId() != 0 || every <= 0 || !r.GetWaitForever() && r.GetWait().AsDuration() <= every {
		return func() {}
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan struct{})
	go func() {
		defer close(done)
		next := time.NewTicker(every) // pace of a lease that nobody counts on yet
		defer next.Stop()
		for {
			select {
			case <-next.C:
			case <-ctx.Done():
				return
			}
			bounded, over := context.WithTimeout(ctx, every)
			f.atLeader(bounded, &lease.KeepAliveRequest{Requests: []lease.RequestID{lease.RequestID(r.GetRequestId())}},
				func(conn grpc.ClientConnInterface) error {
					_, err := pb.NewLeaseServiceClient(conn).KeepAlive(bounded, &pb.KeepAliveRequest{RequestIds: []uint64{r.GetRequestId()}})
					return err
				}) // the next one makes up for one that fails
			over()
		}
	}()
	return func() {
		cancel()
		<-done
	}
}

// randomLevel is the level at which a request under a lease may have an id that
// is not a sequence number.
const randomLevel = 2

// definite tells whether an error says that nothing was done, and that nothing
// will be.
func definite(err error) bool {
	reason, _ := describe(err)
	if _, ok := status.FromError(err); ok {
		reason = reasonOf(err)
	}
	switch reason {
	case "", ReasonOutcomeUnknown, ReasonStopping, ReasonLogFailed, ReasonSuperseded, ReasonCanceled, ReasonDeadline, ReasonInternal:
		return false
	}
	return true
}

// atLeader makes one attempt of an operation of this node's own, here where
// this node leads, and there where another does.
func (f *forwarder) atLeader(ctx context.Context, here lease.Operation, there func(grpc.ClientConnInterface) error) error {
	conn, _, err := f.cluster.Leader(ctx, laneWait)
	switch {
	case err != nil:
		return err
	case conn != nil:
		return there(conn)
	}
	_, err = f.m.Do(ctx, here)
	return err
}

// settle sends Abandon for a request that this node has named, until it is
// answered or the server stops.
func (f *forwarder) settle(leaseID, request uint64) {
	for pause := betweenTries; ; pause = min(2*pause, time.Second) {
		ctx, cancel := context.WithTimeout(context.Background(), max(f.leaderless, time.Second))
		err := f.atLeader(ctx, &lease.AbandonRequest{Lease: lease.ID(leaseID), Requests: []lease.RequestID{lease.RequestID(request)}},
			func(conn grpc.ClientConnInterface) error {
				_, err := pb.NewLockServiceClient(conn).Abandon(ctx, &pb.AbandonRequest{LeaseId: leaseID, RequestId: request})
				return err
			})
		cancel()
		if err == nil {
			return
		}
		select {
		case <-time.After(pause):
		case <-f.stopping.Done():
			return
		}
	}
}

// errAnswerLost is an ErrNotLeader: a leader had the call, may have done what it
// asks, and its answer was lost.
var errAnswerLost = fmt.Errorf("%w: its answer was lost", lease.ErrNotLeader)

// endedAlready tells whether a request was refused because it has ended.
func endedAlready(err error) bool {
	var r *lease.Refusal
	return errors.As(err, &r) && r.Reason == machine.ReasonRequestEnded || reasonOf(err) == string(machine.ReasonRequestEnded)
}

// notLeading tells whether a call was refused because another node leads:
// nothing was done.
func notLeading(err error) bool {
	if err == nil {
		return false
	}
	if errors.Is(err, lease.ErrNotLeader) {
		return true
	}
	return reasonOf(err) == ReasonNotLeader
}

// lost tells whether a forwarded call ended without the leader's answer.
func lost(err error) bool { return status.Code(err) == codes.Unavailable && reasonOf(err) == "" }

func reasonOf(err error) string {
	s, ok := status.FromError(err)
	if !ok {
		return ""
	}
	for _, d := range s.Details() {
		if info, ok := d.(*errdetails.ErrorInfo); ok {
			return info.GetReason()
		}
	}
	return ""
}

// repeatable tells whether a request may be sent again when its answer was
// lost: sent twice, it does what it does once.
func repeatable(req any) bool {
	switch r := req.(type) {
	case *pb.AcquireRequest:
		return r.GetRequestId() != 0
	case *pb.GrantRequest:
		return r.GetRequestId() != 0
	case *pb.ReleaseRequest:
		return r.GetLeaseId() != 0
	case *pb.AbandonRequest, *pb.GetRequest, *pb.ListRequest, *pb.CheckTokenRequest, *pb.KeepAliveRequest,
		*pb.GetLeaseRequest, *pb.ListLeasesRequest, *pb.AddMemberRequest, *pb.PromoteMemberRequest, *pb.RemoveMemberRequest:
		return true
	}
	return false
}

// send makes the call at the leader, to which the end of a call means nothing: a
// client that counts its attempts sends Abandon for what it gives up. For one that
// does not this node sends it, with the number of this call, so that a later call of
// the same request is left alone.
func (f *forwarder) send(ctx, led context.Context, conn grpc.ClientConnInterface, method string, req any) (any, error) {
	resp, err := answerOf(method)
	if err != nil {
		return nil, err
	}
	out, cancel := context.WithCancelCause(context.WithoutCancel(ctx))
	defer cancel(nil)
	for _, end := range []struct {
		ctx   context.Context
		cause error
	}{{ctx, context.Canceled}, {led, lease.ErrNotLeader}, {f.stopping, lease.ErrStopping}} {
		defer context.AfterFunc(end.ctx, func() { cancel(end.cause) })()
	}
	var number string
	acquire, _ := req.(*pb.AcquireRequest)
	if acquire.GetRequestId() != 0 && acquire.GetAttempt() == 0 {
		number = strconv.FormatUint(rand.Uint64()|1<<63, 10)
	}
	err = conn.Invoke(numbered(out, number), method, req, resp)
	if err == nil {
		return resp, nil
	}
	switch cause := context.Cause(out); {
	case errors.Is(cause, lease.ErrStopping):
		return nil, lease.ErrStopping
	case errors.Is(cause, context.Canceled):
		if a := connOf(ctx); number != "" && (a == nil || !a.closed.Load()) {
			f.abandon(conn, acquire, number)
		}
		return nil, ctx.Err()
	case cause != nil || lost(err):
		if repeatable(req) {
			return nil, errAnswerLost // the next leader is asked
		}
		return nil, lease.ErrOutcomeUnknown
	}
	return nil, err
}

// callKey is the metadata with which a member numbers the calls of clients that do
// not count their attempts.
const callKey = "distlock-call"

func numbered(ctx context.Context, number string) context.Context {
	if number == "" {
		return ctx
	}
	return metadata.AppendToOutgoingContext(ctx, callKey, number)
}

// calledBy is the number that a member gave a call; 0 for none.
func calledBy(ctx context.Context) uint64 {
	if a := connOf(ctx); a == nil || !a.peer {
		return 0
	}
	for _, v := range metadata.ValueFromIncomingContext(ctx, callKey) {
		n, _ := strconv.ParseUint(v, 10, 64)
		return n
	}
	return 0
}

// abandon ends a wait at the leader that the client has cancelled.
func (f *forwarder) abandon(conn grpc.ClientConnInterface, r *pb.AcquireRequest, number string) {
	ctx, cancel := context.WithTimeout(context.Background(), f.leaderless)
	defer cancel()
	pb.NewLockServiceClient(conn).Abandon(numbered(ctx, number), &pb.AbandonRequest{LeaseId: r.GetLeaseId(), RequestId: r.GetRequestId()})
}

// answerOf makes an empty answer of a method, by its full name.
func answerOf(method string) (proto.Message, error) {
	service, name := splitMethod(method)
	d, err := protoregistry.GlobalFiles.FindDescriptorByName(protoreflect.FullName(service))
	if err == nil {
		if s, ok := d.(protoreflect.ServiceDescriptor); ok {
			if m := s.Methods().ByName(protoreflect.Name(name)); m != nil {
				t, err := protoregistry.GlobalTypes.FindMessageByName(m.Output().FullName())
				if err == nil {
					return t.New().Interface(), nil
				}
			}
		}
	}
	return nil, status.Errorf(codes.Unimplemented, "unknown method %s", method)
}

func splitMethod(full string) (service, method string) {
	for i := len(full) - 1; i > 0; i-- {
		if full[i] == '/' {
			return full[1:i], full[i+1:]
		}
	}
	return "", full
}
