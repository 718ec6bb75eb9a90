package lease

import (
	"context"

	"github.com/distlock/distlock/fence"
	"github.com/distlock/distlock/lease/machine"
)

// The operations in the words of the tests.

func (m *Manager) Acquire(ctx context.Context, r AcquireRequest) (Hold, error) {
	reply, err := m.Do(ctx, &r)
	if err != nil {
		return Hold{}, err
	}
	return Hold{Hold: *reply.Hold, TTL: reply.TTL}, nil
}

func (m *Manager) Release(ctx context.Context, r ReleaseRequest) error {
	_, err := m.Do(ctx, &r)
	return err
}

func (m *Manager) Abandon(ctx context.Context, lease ID, requests ...RequestID) error {
	_, err := m.Do(ctx, &AbandonRequest{Lease: lease, Requests: requests})
	return err
}

func (m *Manager) GrantLease(ctx context.Context, r GrantLeaseRequest) (LeaseInfo, error) {
	reply, err := m.Do(ctx, &r)
	return LeaseInfo{
		Lease:     machine.Lease{ID: reply.Lease, TTL: machine.Duration(r.TTL), Owner: r.Owner, Request: r.Request},
		Remaining: reply.TTL,
	}, err
}

func (m *Manager) KeepAlive(ctx context.Context, ids []ID) ([]KeepAlive, error) {
	reply, err := m.Do(ctx, &KeepAliveRequest{Leases: ids})
	if err != nil {
		return nil, err
	}
	return reply.KeptAlive.Leases, nil
}

func (m *Manager) RevokeLease(ctx context.Context, id ID, by string) error {
	_, err := m.Do(ctx, &RevokeLeaseRequest{Lease: id, By: by})
	return err
}

func (m *Manager) ForceRelease(ctx context.Context, lock string, token fence.Token, by string) error {
	_, err := m.Do(ctx, &ForceReleaseRequest{Name: lock, Token: token, By: by})
	return err
}

func (m *Manager) Lease(ctx context.Context, id ID) (LeaseInfo, error) {
	reply, err := m.Do(ctx, &LeaseRequest{Lease: id})
	if err != nil {
		return LeaseInfo{}, err
	}
	return *reply.Shown, nil
}

func (m *Manager) Lock(ctx context.Context, lock string) (LockInfo, uint64, error) {
	reply, err := m.Do(ctx, &LockRequest{Name: lock})
	if err != nil {
		return LockInfo{}, 0, err
	}
	return *reply.Lock, reply.Revision, nil
}

func (m *Manager) CheckToken(ctx context.Context, lock string, token fence.Token) (TokenCheck, error) {
	reply, err := m.Do(ctx, &CheckTokenRequest{Name: lock, Token: token})
	if err != nil {
		return TokenCheck{}, err
	}
	return *reply.Check, nil
}

func (m *Manager) Declare(ctx context.Context, lock string) error {
	_, err := m.Do(ctx, &DeclareRequest{Name: lock})
	return err
}

func (m *Manager) Undeclare(ctx context.Context, lock string) error {
	_, err := m.Do(ctx, &UndeclareRequest{Name: lock})
	return err
}

func (m *Manager) ReleaseClock(ctx context.Context, lock string, clock uint64) error {
	_, err := m.Do(ctx, &ReleaseClockRequest{Name: lock, Clock: clock})
	return err
}

// look runs fn on the loop, once it is certain that this node leads.
func (m *Manager) look(ctx context.Context, fn func(l *loop)) error {
	_, err := m.Do(ctx, looking(fn))
	return err
}

type looking func(l *loop)

func (fn looking) task(*Manager) (task, error) {
	return confirming(0, 1, func(l *loop, _ *Reply) { fn(l) }), nil
}

func (b *Batch) Acquire(tag uint64, r AcquireRequest)       { b.Add(tag, &r) }
func (b *Batch) Release(tag uint64, r ReleaseRequest)       { b.Add(tag, &r) }
func (b *Batch) GrantLease(tag uint64, r GrantLeaseRequest) { b.Add(tag, &r) }
func (b *Batch) Abandon(tag uint64, lease ID, request RequestID) {
	b.Add(tag, &AbandonRequest{Lease: lease, Requests: []RequestID{request}})
}
func (b *Batch) KeepAlive(tag uint64, ids []ID) { b.Add(tag, &KeepAliveRequest{Leases: ids}) }
func (b *Batch) RevokeLease(tag uint64, id ID, by string) {
	b.Add(tag, &RevokeLeaseRequest{Lease: id, By: by})
}
func (b *Batch) ForceRelease(tag uint64, lock string, token fence.Token, by string) {
	b.Add(tag, &ForceReleaseRequest{Name: lock, Token: token, By: by})
}
func (b *Batch) CheckToken(tag uint64, lock string, token fence.Token) {
	b.Add(tag, &CheckTokenRequest{Name: lock, Token: token})
}
