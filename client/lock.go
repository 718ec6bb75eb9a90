package client

import (
	"context"
	"errors"
	"maps"
	"slices"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/durationpb"

	"github.com/distlock/distlock/fence"
	pb "github.com/distlock/distlock/proto/distlock/v1"
)

// DefaultTTL is the TTL of a lock's own lease when none is given.
const DefaultTTL = 30 * time.Second

type acquireOptions struct {
	ttl       time.Duration
	wait      *time.Duration // nil: as long as ctx allows
	shared    bool
	limit     uint32
	lockDelay time.Duration
	metadata  map[string]string
	actor     string
	owner     string
	leaseID   uint64
	noRenew   bool
	onRenew   func(time.Time)
}

// AcquireOption says how to acquire.
type AcquireOption func(*acquireOptions)

// TTL sets the TTL of the lock's own lease; the default is DefaultTTL. The
// client renews it three times as often. A shorter TTL frees the lock of a
// dead holder sooner, and loses it to a shorter pause or partition.
func TTL(d time.Duration) AcquireOption { return func(o *acquireOptions) { o.ttl = d } }

// Wait bounds the time in the queue; ErrNotAcquired follows it.
func Wait(d time.Duration) AcquireOption { return func(o *acquireOptions) { o.wait = &d } }

// Shared asks for a hold that others may share.
func Shared() AcquireOption { return func(o *acquireOptions) { o.shared = true } }

// Limit asks for a shared hold of a lock that at most n hold at once: a
// semaphore. All who ask for the lock must name the same limit.
func Limit(n uint32) AcquireOption {
	return func(o *acquireOptions) { o.shared, o.limit = true, n }
}

// LockDelay keeps the lock from being granted for d after this hold is lost
// (never after Release): time for its late writes to arrive, for resources
// that cannot check a token.
func LockDelay(d time.Duration) AcquireOption { return func(o *acquireOptions) { o.lockDelay = d } }

// Metadata is shown to whoever looks at the lock or waits behind it; at most
// 4 KiB.
func Metadata(m map[string]string) AcquireOption { return func(o *acquireOptions) { o.metadata = m } }

// Actor names the thread of work that this acquisition belongs to. A request
// that would close a circle of actors waiting for each other is refused with
// ErrDeadlock.
func Actor(name string) AcquireOption { return func(o *acquireOptions) { o.actor = name } }

// Owner overrides the client's owner for this lock's lease.
func Owner(owner string) AcquireOption { return func(o *acquireOptions) { o.owner = owner } }

// UnderLeaseID holds the lock under a lease that somebody else keeps alive.
// Nothing renews it here, and a lost answer cannot be asked for again: prefer
// Lease.Acquire.
func UnderLeaseID(id uint64) AcquireOption { return func(o *acquireOptions) { o.leaseID = id } }

// NoRenew leaves the lock's lease alone: it ends its TTL after the grant
// unless somebody renews it.
func NoRenew() AcquireOption { return func(o *acquireOptions) { o.noRenew = true } }

// OnRenew is called after each successful renewal with the new deadline. It
// must not block.
func OnRenew(fn func(deadline time.Time)) AcquireOption {
	return func(o *acquireOptions) { o.onRenew = fn }
}

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
	since   time.Duration // when its grant was asked for
	renewed bool          // somebody renews it: this client
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
func (c *Client) TryAcquire(ctx context.Context, name string, opts ...AcquireOption) (*Lock, error) {
	return c.AcquireAll(ctx, []string{name}, append(opts[:len(opts):len(opts)], Wait(0))...)
}

// AcquireAll takes several locks, all at once or none, under one token. Two
// such requests cannot deadlock each other.
func (c *Client) AcquireAll(ctx context.Context, names []string, opts ...AcquireOption) (*Lock, error) {
	o := c.options(opts)
	return c.acquire(ctx, names, o, nil)
}

func (c *Client) options(opts []AcquireOption) *acquireOptions {
	o := &acquireOptions{ttl: DefaultTTL, owner: c.owner}
	for _, opt := range opts {
		opt(o)
	}
	return o
}

// acquire asks until it is answered. lease is nil for a lock with a lease of
// its own, or under a lease of somebody else's.
func (c *Client) acquire(ctx context.Context, names []string, o *acquireOptions, lease *Lease) (*Lock, error) {
	// What is sent may still be on its way when this call has returned, so it
	// shares nothing with the caller.
	made := &struct { // one piece of memory
		req  pb.AcquireRequest
		ttl  durationpb.Duration
		name [1]string
	}{}
	req := &made.req
	req.Names, req.Mode, req.Limit, req.LeaseId = append(made.name[:0], names...), pb.Mode_MODE_EXCLUSIVE, o.limit, o.leaseID
	req.Actor, req.Metadata, req.WaitForever = o.actor, maps.Clone(o.metadata), o.wait == nil
	if o.shared {
		req.Mode = pb.Mode_MODE_SHARED
	}
	if o.lockDelay != 0 {
		req.LockDelay = durationpb.New(o.lockDelay)
	}
	done := func() {} // the request id under the lease is no longer open
	defer func() { done() }()
	switch {
	case lease != nil:
		req.LeaseId = lease.ID()
		req.RequestId, req.LowestOpenRequestId, done = lease.begin()
	case o.leaseID == 0:
		made.ttl.Seconds, made.ttl.Nanos = int64(o.ttl/time.Second), int32(o.ttl%time.Second)
		req.Ttl, req.Owner, req.RequestId = &made.ttl, o.owner, requestID()
	}
	// The TTL counts from when the grant was asked for, or from earlier.
	began := c.lately()
	if o.wait != nil && *o.wait > 0 { // what is left of it must be right
		began = c.now()
	}
	var sent time.Duration
	var resp *pb.AcquireResponse
	tried := false
	// What does not wait in a queue is answered at once, or lost.
	var total, within time.Duration
	if o.wait != nil && *o.wait == 0 {
		total, within = c.callFor, c.attemptFor()
	}
	attempt := func(ctx context.Context, conn *grpc.ClientConn) error {
		if tried {
			req = proto.CloneOf(req)
		}
		if o.wait != nil {
			left := *o.wait
			if tried && left > 0 {
				left = max(left-(c.now()-began), time.Millisecond) // a repeat joins its place again
			}
			req.Wait = durationpb.New(left)
		}
		if sent = began; tried {
			sent = c.now()
		}
		var err error
		resp, err = c.acquireOn(ctx, within, conn, req)
		if err != nil && tried && toError(err).Reason == "REQUEST_ENDED" && o.leaseID == 0 {
			// An attempt whose answer was lost had been refused, and so had
			// ended. It was not granted, nor ever will be: ask anew.
			req = proto.CloneOf(req)
			if lease == nil {
				req.RequestId = requestID()
			} else {
				done()
				req.RequestId, req.LowestOpenRequestId, done = lease.begin()
			}
			resp, err = c.acquireOn(ctx, within, conn, req)
		}
		tried = true
		return err
	}
	err := c.retry(ctx, total, attempt)
	if err != nil {
		c.abandonUnlessAnswered(req, err)
		return nil, err
	}
	return c.granted(ctx, resp.GetGrant(), o, lease, sent)
}

// abandonUnlessAnswered ends a request whose outcome is not known, so that
// nobody holds a lock on its account. It goes on in the background.
func (c *Client) abandonUnlessAnswered(req *pb.AcquireRequest, err error) {
	var answered *Error
	if req.GetRequestId() == 0 || errors.As(err, &answered) && !errors.Is(err, ErrUnavailable) {
		return
	}
	c.inBackground(func() {
		c.call(c.ctx, func(ctx context.Context, conn *grpc.ClientConn) error {
			return c.abandonOn(ctx, conn, &pb.AbandonRequest{RequestId: req.GetRequestId(), LeaseId: req.GetLeaseId()})
		})
	})
}

// inBackground runs what nobody waits for but Close, for a while.
func (c *Client) inBackground(fn func()) {
	c.mu.Lock()
	if c.closed {
		c.mu.Unlock()
		return
	}
	c.abandons.Add(1)
	c.mu.Unlock()
	go func() {
		defer c.abandons.Done()
		fn()
	}()
}

func (c *Client) granted(ctx context.Context, g *pb.Grant, o *acquireOptions, lease *Lease, sent time.Duration) (*Lock, error) {
	made := &struct { // one piece of memory
		lock  Lock
		name  [1]string
		floor [1]fence.Token
	}{}
	l := &made.lock
	l.client, l.token, l.leaseID, l.ttl, l.since = c, fence.Token(g.GetToken()), g.GetLeaseId(), g.GetTtl().AsDuration(), sent
	l.names, l.floors = made.name[:0], made.floor[:0]
	for _, k := range g.GetLocks() {
		l.names, l.floors = append(l.names, k.GetName()), append(l.floors, fence.Token(k.GetFloor()))
	}
	if lease != nil {
		return l, c.join(l, lease.session)
	}
	// A grant that waited began its TTL at a time this client does not know:
	// only from a renewal on can it count.
	for c.now()-sent > l.ttl/4 {
		at, results, err := c.keepAliveOnce(ctx, []uint64{l.leaseID})
		if err == nil && results[0].GetProblem() == nil {
			sent = at
			break
		}
		if err == nil {
			p := results[0].GetProblem()
			return nil, &LostError{Cause: causes[p.GetCause()], By: p.GetBy(), Names: l.names, LeaseID: l.leaseID, Token: l.token}
		}
		if ctx.Err() != nil {
			// Nobody will hear of the grant.
			c.inBackground(func() { c.releaseCall(c.ctx, l.leaseID, l.names[0], l.token) })
			return nil, context.Cause(ctx)
		}
		if c.now()-sent > l.ttl && !errors.Is(err, ErrUnavailable) && !isDeadline(err) {
			return nil, err
		}
		select {
		case <-ctx.Done():
		case <-c.ctx.Done():
			return nil, ErrClosed
		case <-time.After(20 * time.Millisecond): // pace of the network
		}
	}
	s := &session{id: l.leaseID, ttl: l.ttl, own: true, onRenew: o.onRenew}
	if o.noRenew || o.leaseID != 0 {
		s.sent = sent
		s.ctx, s.cancel = context.WithCancelCause(context.WithoutCancel(ctx))
		l.session = s
		l.ctx, l.cancel = s.ctx, s.cancel
		return l, nil
	}
	l.renewed = true
	// Lock and lease end together: one context serves both.
	s.locks = []*Lock{l}
	l.session = s
	if err := c.keep(ctx, s, sent); err != nil {
		return nil, err
	}
	return l, nil
}

func isDeadline(err error) bool {
	return errors.Is(err, context.DeadlineExceeded) || toError(err).Code.String() == "DeadlineExceeded"
}

// join puts a lock under a session that is kept alive.
func (c *Client) join(l *Lock, s *session) error {
	c.mu.Lock()
	defer c.mu.Unlock()
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
// that says how: *LostError, or an *Error that is ErrNotHeld.
func (l *Lock) Release(ctx context.Context) error {
	// A deadline that passed while the machine slept the server knows of too.
	lost := l.errAt(l.client.lately)
	if lost != nil && errors.Is(lost, ErrReleased) {
		lost = nil
	}
	c := l.client
	c.mu.Lock()
	l.end(ErrReleased)
	if s := l.session; s.own && l.renewed {
		c.end(s, ErrReleased)
	} else {
		s.locks = slices.DeleteFunc(s.locks, func(x *Lock) bool { return x == l })
	}
	c.mu.Unlock()
	err := c.releaseCall(ctx, l.leaseID, l.names[0], l.token)
	if lost != nil {
		return lost
	}
	return err
}

func (c *Client) releaseCall(ctx context.Context, leaseID uint64, name string, token fence.Token) error {
	return c.retry(ctx, c.callFor, func(ctx context.Context, conn *grpc.ClientConn) error {
		return c.releaseOn(ctx, c.attemptFor(), conn, &pb.ReleaseRequest{LeaseId: leaseID, Name: name, Token: uint64(token)})
	})
}
