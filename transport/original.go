package transport

import (
	"context"
	"errors"
	"math"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/distlock/distlock/lease"
	"github.com/distlock/distlock/lease/machine"
	original "github.com/distlock/distlock/proto/distlock"
)

// originalService is the protocol of the Python tool of the same name, over
// declared locks of the same machine.
type originalService struct {
	original.UnimplementedDistlockServer
	door
}

const originalTTL = 60 * time.Second // when a request says 0

func (s *originalService) CreateLock(ctx context.Context, r *original.Lock) (_ *original.EmptyResponse, err error) {
	_, err = s.ask(ctx, &lease.DeclareRequest{Name: r.GetKey()})
	return &original.EmptyResponse{}, err
}

func (s *originalService) AcquireLock(ctx context.Context, r *original.AcquireLockRequest) (*original.Lock, error) {
	ttl := originalTTL
	if seconds := r.GetExpiresInSeconds(); seconds != 0 {
		if seconds < 0 || seconds > math.MaxInt64/int64(time.Second) {
			return nil, &lease.InvalidError{Field: "expires_in_seconds", Msg: "must be a positive number of seconds"}
		}
		ttl = time.Duration(seconds) * time.Second
	}
	reply, err := s.ask(ctx, &lease.AcquireRequest{
		Names: []string{r.GetKey()}, Mode: machine.Exclusive, TTL: ttl, Declared: true, Owner: "original client",
	})
	var held *lease.HeldError
	var invalid *lease.InvalidError
	switch {
	case errors.As(err, &held):
		return &original.Lock{Key: r.GetKey(), Clock: int64(held.Refusal.Clock), ExpiresAt: expiresAt(held.Refusal.ExpiresAt)}, nil
	case errors.As(err, &invalid) && invalid.Field == "ttl":
		return nil, &lease.InvalidError{Field: "expires_in_seconds", Msg: invalid.Msg} // its word for it
	case err != nil:
		return nil, err
	}
	g := reply.Hold
	return &original.Lock{
		Key: r.GetKey(), Acquired: true, Clock: int64(g.Locks[0].Clock), ExpiresAt: expiresAt(g.Since + int64(ttl)),
	}, nil
}

func expiresAt(ns int64) *timestamppb.Timestamp {
	if ns == 0 {
		return &timestamppb.Timestamp{} // the epoch: never acquired
	}
	return timestamp(ns)
}

func (s *originalService) ReleaseLock(ctx context.Context, r *original.Lock) (_ *original.EmptyResponse, err error) {
	// A negative clock is one that no lock ever has; it takes the place of the
	// highest number, and is refused with both clocks named as they are.
	_, err = s.ask(ctx, &lease.ReleaseClockRequest{Name: r.GetKey(), Clock: uint64(r.GetClock())})
	var refusal *lease.Refusal
	if errors.As(err, &refusal) && refusal.Reason == machine.ReasonClockDisagrees {
		return nil, status.Errorf(codes.Aborted, "A lock with key %s has clock %d, not %d", r.GetKey(), refusal.Clock, r.GetClock())
	}
	return &original.EmptyResponse{}, err
}

func (s *originalService) GetLock(ctx context.Context, r *original.Lock) (*original.Lock, error) {
	reply, err := s.ask(ctx, &lease.LockRequest{Name: r.GetKey()})
	if err != nil {
		return nil, err
	}
	if !reply.Lock.Declared {
		return nil, &lease.Refusal{Reason: machine.ReasonLockNotDeclared, Name: r.GetKey()}
	}
	return originalLock(*reply.Lock), nil
}

func originalLock(k lease.LockInfo) *original.Lock {
	return &original.Lock{Key: k.Name, Acquired: k.HolderCount > 0, Clock: int64(k.Clock), ExpiresAt: expiresAt(k.ExpiresAt)}
}

func (s *originalService) ListLocks(ctx context.Context, _ *original.EmptyRequest) (*original.Locks, error) {
	out := &original.Locks{}
	for after, more := "", true; more; {
		var list []lease.LockInfo
		var err error
		if list, more, _, err = s.m.Locks(ctx, "", after, maxPage); err != nil {
			return nil, err
		}
		for _, k := range list {
			if after = k.Name; k.Declared {
				out.Locks = append(out.Locks, originalLock(k))
			}
		}
	}
	return out, nil
}

func (s *originalService) DeleteLock(ctx context.Context, r *original.Lock) (_ *original.EmptyResponse, err error) {
	_, err = s.ask(ctx, &lease.UndeclareRequest{Name: r.GetKey()})
	return &original.EmptyResponse{}, err
}
