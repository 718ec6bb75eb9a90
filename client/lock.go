package client

import (
	"context"
	"errors"
	"slices"
	"time"

	"google.golang.org/grpc"

	"github.com/distlock/distlock/fence"
	pb "github.com/distlock/distlock/proto/distlock/v1"
)

// Lock is a hold on one or several locks. All methods are safe for concurrent
// use.
type Lock struct {
	client  *Client
	session *session
	names   []string
	floors  []fence.Token // by name
	token   fence.Token
	leaseID uint64
	ttl     time.Duration
	request uint64 // of its grant
	renewed bool   // somebody renews it: this client
	ctx     context.Context
	cancel  context.CancelCauseFunc
}

// Acquire takes a lock, waiting until it is granted, ctx ends or Wait has
// passed. Reconnecting and retrying are its own concern: the request keeps its
// place. When ctx ends the wait is abandoned, and a grant that won the race is
// undone. Errors: ErrNotAcquired, ErrInvalid, ErrDeadlock, ErrExhausted,
// ErrUnavailable, ctx's.
func (c *Client) Acquire(ctx context.Context, name string, opts ...AcquireOption) (*Lock, error) {
	return c.AcquireAll(ctx, []string{name}, opts...)
}

// TryAcquire is Acquire that does not wait: a lock that is not free is
// ErrNotAcquired at once.
func (c *Client) TryAcquire(ctx context.Context, name string, opts ...TryAcquireOption) (*Lock, error) {
	o := c.options()
	for _, opt := range opts {
		opt.tryAcquire(o)
	}
	return c.acquire(ctx, []string{name}, o.now(), nil)
}

// AcquireAll takes several locks, all at once or none, under one token. Two
// such requests cannot deadlock each other.
func (c *Client) AcquireAll(ctx context.Context, names []string, opts ...AcquireOption) (*Lock, error) {
	o := c.options()
	for _, opt := range opts {
		opt.acquire(o)
	}
	return c.acquire(ctx, names, o, nil)
}

// granted makes a lock of a grant. When it fails the grant is not held.
func (c *Client) granted(ctx context.Context, g *pb.Hold, a *acquisition) (*Lock, error) {
	if a.lease != nil {
		l := newLock(c, g, a, &lockMemory{})
		return l, c.join(l, a.lease.session)
	}
	made := &struct { // one piece of memory
		lockMemory
		session session
		held    [1]*Lock
	}{}
	l := newLock(c, g, a, &made.lockMemory)
	o, s := a.o, &made.session
	s.id, s.ttl, s.own, s.request, s.onRenew = l.leaseID, l.ttl, true, l.request, o.onRenew
	s.left, s.followed = o.noRenew || o.leaseID != 0, o.leaseID != 0
	var sent time.Duration
	var err error
	if s.followed {
		sent, err = c.follows(ctx, l.leaseID, l.ttl)
	} else {
		sent, err = c.countsFrom(ctx, l, a.sent)
	}
	if err != nil {
		return nil, err
	}
	// Lock and lease end together: one context serves both.
	made.held[0] = l
	s.locks = made.held[:]
	l.session, l.renewed = s, !s.left
	if err := c.keep(ctx, s, sent, a.wait); err != nil {
		return nil, err
	}
	a.wait = nil // it is over
	return l, nil
}

// lockMemory is what most locks need, in one piece.
type lockMemory struct {
	lock  Lock
	name  [1]string
	floor [1]fence.Token
}

func newLock(c *Client, g *pb.Hold, a *acquisition, m *lockMemory) *Lock {
	l := &m.lock
	l.client, l.token, l.leaseID, l.ttl = c, fence.Token(g.GetToken()), g.GetLeaseId(), g.GetTtl().AsDuration()
	l.names, l.floors, l.request = m.name[:0], m.floor[:0], a.req.GetRequestId()
	for _, k := range g.GetLocks() {
		l.names, l.floors = append(l.names, k.GetName()), append(l.floors, fence.Token(k.GetFloor()))
	}
	return l
}

// follows asks how long a lease lives that somebody else renews, and returns
// when a TTL which ends then was counted from.
func (c *Client) follows(ctx context.Context, id uint64, ttl time.Duration) (sent time.Duration, err error) {
	var left time.Duration
	err = c.call(ctx, func(ctx context.Context, conn *grpc.ClientConn) error {
		sent = c.now()
		resp, err := leasesOf(conn).Get(ctx, &pb.GetLeaseRequest{LeaseId: id})
		left = resp.GetLease().GetRemaining().AsDuration()
		return err
	})
	return sent + left - ttl, err
}

// countsFrom is when the TTL of a grant counts from. One that waited began it
// at a time this client does not know: only from a renewal on can it count.
func (c *Client) countsFrom(ctx context.Context, l *Lock, sent time.Duration) (time.Duration, error) {
	for c.now()-sent > l.ttl/4 {
		at, resp, err := c.keepAliveOnce(ctx, &pb.KeepAliveRequest{LeaseIds: []uint64{l.leaseID}}, patience{within: c.attemptTimeout(), closed: c.accepting})
		if err == nil {
			p := resp.GetResults()[0].GetProblem()
			if p == nil {
				return at, nil
			}
			return 0, &LostError{Cause: causes[p.GetCause()], By: p.GetBy(), Names: l.names, LeaseID: l.leaseID, Token: l.token}
		}
		switch {
		case ctx.Err() != nil:
			return 0, context.Cause(ctx)
		case errors.Is(err, ErrClosed):
			return 0, err
		case c.now()-sent > l.ttl && !errors.Is(err, ErrUnavailable) && !isDeadline(err):
			return 0, err
		}
		select {
		case <-ctx.Done():
		case <-c.accepting.Done():
			return 0, ErrClosed
		case <-time.After(20 * time.Millisecond): // pace of the network
		}
	}
	return sent, nil
}

func isDeadline(err error) bool {
	return errors.Is(err, context.DeadlineExceeded) || toError(err).Code.String() == "DeadlineExceeded"
}

// join puts a lock under a session that is kept alive.
func (c *Client) join(l *Lock, s *session) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.closed {
		return ErrClosed
	}
	l.session, l.renewed = s, true
	l.ctx, l.cancel = context.WithCancelCause(s.ctx)
	if s.over {
		l.end(l.lostAs(context.Cause(s.ctx)))
		return context.Cause(l.ctx)
	}
	s.locks = append(s.locks, l)
	return nil
}

func (l *Lock) end(cause error) { l.cancel(cause) }

// lostAs tells a session's end as the lock's own.
func (l *Lock) lostAs(cause error) error {
	if cause == ErrReleased { // as of most
		return cause
	}
	var lost *LostError
	if !errors.As(cause, &lost) {
		return cause
	}
	own := *lost
	own.Names, own.Token, own.LeaseID = l.names, l.token, l.leaseID
	return &own
}

// Name is the first of the lock's names, in order.
func (l *Lock) Name() string { return l.names[0] }

// Names are all of them.
func (l *Lock) Names() []string { return slices.Clone(l.names) }

// Token is the fencing token of the grant.
func (l *Lock) Token() fence.Token { return l.token }

// Pass is what to show to the resource that Name guards.
func (l *Lock) Pass() fence.Pass { return fence.Pass{Token: l.token, Floor: l.floors[0]} }

// PassFor is what to show to the resource that name guards; false when the
// lock is not on name.
func (l *Lock) PassFor(name string) (fence.Pass, bool) {
	i := slices.Index(l.names, name)
	if i < 0 {
		return fence.Pass{}, false
	}
	return fence.Pass{Token: l.token, Floor: l.floors[i]}, true
}

// LeaseID is the lease that the lock is held under.
func (l *Lock) LeaseID() uint64 { return l.leaseID }

// TTL is the lease's.
func (l *Lock) TTL() time.Duration { return l.ttl }

// Remaining is how long the lock may still be believed held, if no renewal
// succeeds: 0 once it may not.
func (l *Lock) Remaining() time.Duration { return l.remaining(l.client.now) }

func (l *Lock) remaining(now func() time.Duration) time.Duration {
	if l.ctx.Err() != nil {
		return 0
	}
	l.client.mu.Lock()
	defer l.client.mu.Unlock()
	return max(l.session.deadline()-now(), 0)
}

// Deadline is when the lock may no longer be believed held, if no renewal
// succeeds. It is for display: a wall clock that jumps moves it.
func (l *Lock) Deadline() time.Time { return l.client.clock.Now().Add(l.Remaining()) }

// Context ends when the lock is lost or released; context.Cause says how.
func (l *Lock) Context() context.Context { return l.ctx }

// Done is Context().Done().
func (l *Lock) Done() <-chan struct{} { return l.ctx.Done() }

// Err is nil while the lock is held. Then it is a *LostError, or ErrReleased.
// It looks at the clock itself, so that it is right even before the client has
// noticed that the deadline has passed.
func (l *Lock) Err() error { return l.errAt(l.client.now) }

func (l *Lock) errAt(now func() time.Duration) error {
	if l.ctx.Err() != nil {
		return context.Cause(l.ctx)
	}
	if l.remaining(now) == 0 && l.ctx.Err() == nil {
		return &LostError{Cause: CauseUnreachable, Names: l.names, LeaseID: l.leaseID, Token: l.token}
	}
	if l.ctx.Err() != nil {
		return context.Cause(l.ctx)
	}
	return nil
}

// Release gives the lock back and ends its context at once, whatever the
// server answers. It may be repeated. A lock that had been lost is an error
// that says how: *LostError, or an *Error that is ErrNotHeld. ctx bounds the
// waiting only: what has not been answered goes on in the background.
func (l *Lock) Release(ctx context.Context) error {
	// A deadline that passed while the machine slept the server knows of too.
	lost := l.errAt(l.client.lately)
	if lost != nil && errors.Is(lost, ErrReleased) {
		lost = nil
	}
	c := l.client
	c.mu.Lock()
	l.end(ErrReleased)
	s := l.session
	if s.own {
		c.end(s, ErrReleased)
	} else {
		s.locks = slices.DeleteFunc(s.locks, func(x *Lock) bool { return x == l })
	}
	closed := c.closed
	c.mu.Unlock()
	if closed && l.renewed { // Close has given it back
		return lost
	}
	req := &pb.ReleaseRequest{LeaseId: l.leaseID, Name: l.names[0], Token: uint64(l.token)}
	if !s.own || s.left {
		req.RequestId = l.request
	}
	op := releaseOperation(req)
	_, err := c.operate(ctx, op)
	var e *Error
	if err != nil && (!errors.As(err, &e) || !definite(e)) {
		u := &unsettled{op: op, session: s}
		switch {
		case s.own && l.renewed:
			u.own, u.session, u.until = s.request, nil, s.tried+s.ttl+s.ttl/100
		case s.left: // somebody else may renew it
			u.session = nil
		}
		c.unsettle(u)
	}
	if lost != nil {
		return lost
	}
	return err
}
