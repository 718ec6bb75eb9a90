package sim

import (
	"context"

	"github.com/distlock/distlock/fence"
	"github.com/distlock/distlock/lease"
)

// words are a manager's operations in the words of the clients here.
type words struct{ *lease.Manager }

func (w words) Acquire(ctx context.Context, r lease.AcquireRequest) (lease.Hold, error) {
	reply, err := w.Do(ctx, &r)
	if err != nil {
		return lease.Hold{}, err
	}
	return lease.Hold{Hold: *reply.Hold, TTL: reply.TTL}, nil
}

func (w words) Release(ctx context.Context, r lease.ReleaseRequest) error {
	_, err := w.Do(ctx, &r)
	return err
}

func (w words) Abandon(ctx context.Context, id lease.ID, request lease.RequestID) error {
	_, err := w.Do(ctx, &lease.AbandonRequest{Lease: id, Requests: []lease.RequestID{request}})
	return err
}

func (w words) GrantLease(ctx context.Context, r lease.GrantLeaseRequest) (lease.ID, error) {
	reply, err := w.Do(ctx, &r)
	return reply.Lease, err
}

func (w words) RevokeLease(ctx context.Context, id lease.ID, by string) error {
	_, err := w.Do(ctx, &lease.RevokeLeaseRequest{Lease: id, By: by})
	return err
}

func (w words) ForceRelease(ctx context.Context, name string, token fence.Token, by string) error {
	_, err := w.Do(ctx, &lease.ForceReleaseRequest{Name: name, Token: token, By: by})
	return err
}

func (w words) KeepAlive(ctx context.Context, ids []lease.ID) ([]lease.KeepAlive, error) {
	reply, err := w.Do(ctx, &lease.KeepAliveRequest{Leases: ids})
	if err != nil {
		return nil, err
	}
	return reply.KeptAlive.Leases, nil
}

func (w words) Lock(ctx context.Context, name string) (lease.LockInfo, uint64, error) {
	reply, err := w.Do(ctx, &lease.LockRequest{Name: name})
	if err != nil {
		return lease.LockInfo{}, 0, err
	}
	return *reply.Lock, reply.Revision, nil
}
