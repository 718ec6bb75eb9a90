package transport

import (
	"context"
	"encoding/base64"
	"errors"
	"strconv"
	"strings"

	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/durationpb"

	"github.com/distlock/distlock/fence"
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

type lockService struct {
	pb.UnimplementedLockServiceServer
	m    Manager
	work workers
}

func (s *lockService) Acquire(ctx context.Context, r *pb.AcquireRequest) (*pb.AcquireResponse, error) {
	req, err := acquireRequest(r)
	if err != nil {
		return nil, err
	}
	ctx, stop := detachable(ctx)
	defer stop()
	var g lease.Grant
	s.work.elsewhere(func() { g, err = s.m.Acquire(ctx, req) })
	if err != nil {
		return nil, err
	}
	return &pb.AcquireResponse{Grant: grant(&g.Grant, g.TTL)}, nil
}

func (s *lockService) Release(ctx context.Context, r *pb.ReleaseRequest) (_ *pb.ReleaseResponse, err error) {
	s.work.elsewhere(func() {
		err = s.m.Release(ctx, releaseRequest(r))
	})
	return &pb.ReleaseResponse{}, err
}

func (s *lockService) Abandon(ctx context.Context, r *pb.AbandonRequest) (_ *pb.AbandonResponse, err error) {
	s.work.elsewhere(func() { err = s.m.Abandon(ctx, lease.ID(r.GetLeaseId()), lease.RequestID(r.GetRequestId())) })
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
		s.work.elsewhere(func() { info, revision, err = s.m.Lock(ctx, r.GetName()) })
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

// isStale tells whether a read is to be answered from what this node has.
func isStale(c pb.Consistency) (bool, error) {
	switch c {
	case pb.Consistency_CONSISTENCY_UNSPECIFIED, pb.Consistency_CONSISTENCY_LINEARIZABLE:
		return false, nil
	case pb.Consistency_CONSISTENCY_STALE:
		return true, nil
	}
	return false, &lease.InvalidError{Field: "consistency", Msg: "must be linearizable or stale"}
}

// page reads where a page begins: after the name or id in the token.
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
	var c lease.TokenCheck
	var err error
	s.work.elsewhere(func() { c, err = s.m.CheckToken(ctx, r.GetName(), fence.Token(r.GetToken())) })
	if err != nil {
		return nil, err
	}
	return tokenCheck(c), nil
}

func (s *lockService) ForceRelease(ctx context.Context, r *pb.ForceReleaseRequest) (_ *pb.ForceReleaseResponse, err error) {
	s.work.elsewhere(func() { err = s.m.ForceRelease(ctx, r.GetName(), fence.Token(r.GetToken()), r.GetBy()) })
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
			if out.Revision = e.Revision; bytes < softLimit {
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
	m    Manager
	work workers
}

func (s *leaseService) Grant(ctx context.Context, r *pb.GrantRequest) (*pb.GrantResponse, error) {
	req, err := grantRequest(r)
	if err != nil {
		return nil, err
	}
	var info lease.LeaseInfo
	s.work.elsewhere(func() { info, err = s.m.GrantLease(ctx, req) })
	if err != nil {
		return nil, err
	}
	return &pb.GrantResponse{LeaseId: uint64(info.ID), Ttl: durationpb.New(req.TTL)}, nil
}

// maxKeepAlive bounds the leases renewed by one message.
const maxKeepAlive = 10_000

func (s *leaseService) KeepAlive(ctx context.Context, r *pb.KeepAliveRequest) (*pb.KeepAliveResponse, error) {
	ids, err := keepAliveIDs(r)
	if err != nil {
		return nil, err
	}
	var list []lease.KeepAlive
	s.work.elsewhere(func() { list, err = s.m.KeepAlive(ctx, ids) })
	if err != nil {
		return nil, err
	}
	return keptAlive(list)
}

func keepAliveIDs(r *pb.KeepAliveRequest) ([]lease.ID, error) {
	if len(r.GetLeaseIds()) > maxKeepAlive {
		return nil, &lease.InvalidError{Field: "lease_ids", Msg: "must be at most " + strconv.Itoa(maxKeepAlive)}
	}
	ids := make([]lease.ID, len(r.GetLeaseIds()))
	for i, id := range r.GetLeaseIds() {
		ids[i] = lease.ID(id)
	}
	return ids, nil
}

// keptAlive is the answer to a renewal. Its error is of the whole.
func keptAlive(list []lease.KeepAlive) (*pb.KeepAliveResponse, error) {
	out := &pb.KeepAliveResponse{Results: make([]*pb.KeepAliveResponse_Result, len(list))}
	for i, k := range list {
		result := &pb.KeepAliveResponse_Result{LeaseId: uint64(k.Lease)}
		var refusal *lease.Refusal
		switch {
		case k.Err == nil:
			result.Ttl = durationpb.New(k.TTL)
		case errors.As(k.Err, &refusal):
			result.Problem = problemOf(refusal)
		default:
			return nil, k.Err
		}
		out.Results[i] = result
	}
	return out, nil
}

func (s *leaseService) Revoke(ctx context.Context, r *pb.RevokeRequest) (_ *pb.RevokeResponse, err error) {
	s.work.elsewhere(func() { err = s.m.RevokeLease(ctx, lease.ID(r.GetLeaseId()), r.GetBy()) })
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
		s.work.elsewhere(func() { info, err = s.m.Lease(ctx, lease.ID(r.GetLeaseId())) })
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
