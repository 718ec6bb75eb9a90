package transport

import (
	"context"
	"encoding/base64"
	"strconv"
	"strings"

	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/durationpb"

	"github.com/distlock/distlock/lease"
	pb "github.com/distlock/distlock/proto/distlock/v1"
)

const (
	defaultPage = 100
	maxPage     = 1000

	// softLimit is about how large an answer may grow: clients accept 4 MiB
	// of one message unless told otherwise.
	softLimit = 1 << 20
)

// door is how services reach the manager.
type door struct {
	m    Manager
	work workers
}

// do does what a request asks for. It gives the worker back while it waits.
func (d door) do(ctx context.Context, req any) (r lease.Reply, err error) {
	op, err := new(operations).of(req)
	if err != nil {
		return lease.Reply{}, err
	}
	return d.ask(ctx, op)
}

func (d door) ask(ctx context.Context, op lease.Operation) (r lease.Reply, err error) {
	d.work.yield(ctx, func() { r, err = d.m.Do(ctx, op) })
	return r, err
}

type lockService struct {
	pb.UnimplementedLockServiceServer
	door
}

func (s *lockService) Acquire(ctx context.Context, r *pb.AcquireRequest) (*pb.AcquireResponse, error) {
	op, err := new(operations).of(r)
	if err != nil {
		return nil, err
	}
	op.(*lease.AcquireRequest).Call = calledBy(ctx)
	ctx, stop := detachable(ctx)
	defer stop()
	reply, err := s.ask(ctx, op)
	if err != nil {
		return nil, err
	}
	return &pb.AcquireResponse{Hold: held(reply.Hold, reply.TTL)}, nil
}

func (s *lockService) Release(ctx context.Context, r *pb.ReleaseRequest) (*pb.ReleaseResponse, error) {
	_, err := s.do(ctx, r)
	return &pb.ReleaseResponse{}, err
}

func (s *lockService) Abandon(ctx context.Context, r *pb.AbandonRequest) (*pb.AbandonResponse, error) {
	op, err := new(operations).of(r)
	if err != nil {
		return nil, err
	}
	op.(*lease.AbandonRequest).Call = calledBy(ctx)
	_, err = s.ask(ctx, op)
	return &pb.AbandonResponse{}, err
}

func (s *lockService) Get(ctx context.Context, r *pb.GetRequest) (*pb.GetResponse, error) {
	var info lease.LockInfo
	var revision uint64
	stale, err := isStale(r.GetConsistency())
	switch {
	case err != nil:
	case stale:
		info, revision, err = s.m.StaleLock(r.GetName())
	default:
		var reply lease.Reply
		if reply, err = s.ask(ctx, &lease.LockRequest{Name: r.GetName()}); err == nil {
			info, revision = *reply.Lock, reply.Revision
		}
	}
	if err != nil {
		return nil, err
	}
	return &pb.GetResponse{Lock: lockInfo(info), Revision: revision}, nil
}

func (s *lockService) List(ctx context.Context, r *pb.ListRequest) (*pb.ListResponse, error) {
	size, after, err := page(r.GetPageSize(), r.GetPageToken())
	if err != nil {
		return nil, err
	}
	stale, err := isStale(r.GetConsistency())
	var list []lease.LockInfo
	var more bool
	var revision uint64
	switch {
	case err != nil:
	case stale:
		list, more, revision = s.m.StaleLocks(r.GetPrefix(), after, size)
	default:
		list, more, revision, err = s.m.Locks(ctx, r.GetPrefix(), after, size)
	}
	if err != nil {
		return nil, err
	}
	out := &pb.ListResponse{Revision: revision}
	for i, bytes := 0, 0; i < len(list); i++ {
		out.Locks = append(out.Locks, lockInfo(list[i]))
		if bytes += proto.Size(out.Locks[i]); bytes > softLimit && i+1 < len(list) {
			list, more = list[:i+1], true
		}
	}
	if more {
		out.NextPageToken = pageToken(list[len(list)-1].Name)
	}
	return out, nil
}

// isStale tells whether the client takes what this node has, leader or not.
func isStale(c pb.Consistency) (bool, error) {
	switch c {
	case pb.Consistency_CONSISTENCY_UNSPECIFIED, pb.Consistency_CONSISTENCY_LINEARIZABLE:
		return false, nil
	case pb.Consistency_CONSISTENCY_STALE:
		return true, nil
	}
	return false, &lease.InvalidError{Field: "consistency", Msg: "must be linearizable or stale"}
}

// page decodes a page token: the name or id after which the page begins.
func page(size int32, token string) (int, string, error) {
	if size < 0 || size > maxPage {
		return 0, "", &lease.InvalidError{Field: "page_size", Msg: "must be from 0 to " + strconv.Itoa(maxPage)}
	}
	if size == 0 {
		size = defaultPage
	}
	after, err := base64.RawURLEncoding.DecodeString(token)
	if err != nil {
		return 0, "", &lease.InvalidError{Field: "page_token", Msg: "is not one that this server gave"}
	}
	return int(size), string(after), nil
}

func pageToken(after string) string { return base64.RawURLEncoding.EncodeToString([]byte(after)) }

func (s *lockService) CheckToken(ctx context.Context, r *pb.CheckTokenRequest) (*pb.CheckTokenResponse, error) {
	reply, err := s.do(ctx, r)
	if err != nil {
		return nil, err
	}
	return tokenCheck(*reply.Check), nil
}

func (s *lockService) ForceRelease(ctx context.Context, r *pb.ForceReleaseRequest) (*pb.ForceReleaseResponse, error) {
	_, err := s.do(ctx, r)
	return &pb.ForceReleaseResponse{}, err
}

// Watch sends events as they come. A slow reader holds up only itself: gRPC's
// flow control blocks Send, and the watcher is nothing but a position.
func (s *lockService) Watch(r *pb.WatchRequest, stream pb.LockService_WatchServer) error {
	from := r.GetFromRevision()
	if from == 0 {
		from = s.m.Status().Revision + 1
	}
	w, err := s.m.Watch(r.GetPrefix(), from)
	if err != nil {
		return err
	}
	out := &pb.WatchResponse{Revision: from - 1}
	wanted := func(name string) bool { return strings.HasPrefix(name, r.GetPrefix()) }
	for {
		if err := stream.Send(out); err != nil {
			return err
		}
		if err := w.Ready(stream.Context()); err != nil {
			return err
		}
		if err := sendingOf(stream.Context()).reserve(stream.Context(), smallAnswer); err != nil { // until then it is but a position
			return err
		}
		events, revision, err := w.Next(stream.Context())
		if err != nil {
			return err
		}
		out = &pb.WatchResponse{}
		bytes := 0
		for _, e := range events {
			first := len(out.Events)
			out.Events = event(out.Events, e, wanted)
			for _, p := range out.Events[first:] {
				bytes += proto.Size(p)
			}
			if out.Revision = e.Revision; bytes < smallAnswer {
				continue
			}
			if err := stream.Send(out); err != nil {
				return err
			}
			out, bytes = &pb.WatchResponse{}, 0
		}
		out.Revision = revision
	}
}

type leaseService struct {
	pb.UnimplementedLeaseServiceServer
	door
	cluster *clusterID
}

func (s *leaseService) Grant(ctx context.Context, r *pb.GrantRequest) (*pb.GrantResponse, error) {
	reply, err := s.do(ctx, r)
	if err != nil {
		return nil, err
	}
	return &pb.GrantResponse{LeaseId: uint64(reply.Lease), Ttl: durationpb.New(reply.TTL)}, nil
}

func (s *leaseService) KeepAlive(ctx context.Context, r *pb.KeepAliveRequest) (*pb.KeepAliveResponse, error) {
	reply, err := door{m: s.m}.do(ctx, r) // it has no worker
	if err != nil {
		return nil, err
	}
	kept, err := keptAlive(reply.KeptAlive)
	if err == nil {
		kept.ClusterId, _ = s.cluster.get()
	}
	return kept, err
}

func (s *leaseService) Revoke(ctx context.Context, r *pb.RevokeRequest) (*pb.RevokeResponse, error) {
	_, err := s.do(ctx, r)
	return &pb.RevokeResponse{}, err
}

func (s *leaseService) Get(ctx context.Context, r *pb.GetLeaseRequest) (*pb.GetLeaseResponse, error) {
	var info lease.LeaseInfo
	stale, err := isStale(r.GetConsistency())
	switch {
	case err != nil:
	case stale:
		info, err = s.m.StaleLease(lease.ID(r.GetLeaseId()))
	default:
		var reply lease.Reply
		if reply, err = s.ask(ctx, &lease.LeaseRequest{Lease: lease.ID(r.GetLeaseId())}); err == nil {
			info = *reply.Shown
		}
	}
	if err != nil {
		return nil, err
	}
	return &pb.GetLeaseResponse{Lease: leaseInfo(info)}, nil
}

func (s *leaseService) List(ctx context.Context, r *pb.ListLeasesRequest) (*pb.ListLeasesResponse, error) {
	size, token, err := page(r.GetPageSize(), r.GetPageToken())
	if err != nil {
		return nil, err
	}
	var after uint64
	if token != "" {
		if after, err = strconv.ParseUint(token, 10, 64); err != nil {
			return nil, &lease.InvalidError{Field: "page_token", Msg: "is not one that this server gave"}
		}
	}
	stale, err := isStale(r.GetConsistency())
	var list []lease.LeaseInfo
	var more bool
	switch {
	case err != nil:
	case stale:
		list, more = s.m.StaleLeases(lease.ID(after), size)
	default:
		list, more, err = s.m.Leases(ctx, lease.ID(after), size)
	}
	if err != nil {
		return nil, err
	}
	out := &pb.ListLeasesResponse{}
	for i, bytes := 0, 0; i < len(list); i++ {
		out.Leases = append(out.Leases, leaseInfo(list[i]))
		if bytes += proto.Size(out.Leases[i]); bytes > softLimit && i+1 < len(list) {
			list, more = list[:i+1], true
		}
	}
	if more {
		out.NextPageToken = pageToken(strconv.FormatUint(uint64(list[len(list)-1].ID), 10))
	}
	return out, nil
}
