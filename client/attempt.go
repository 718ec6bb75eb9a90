package client

import (
	"context"
	"errors"
	"maps"
	"math/rand/v2"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/durationpb"

	pb "github.com/distlock/distlock/proto/distlock/v1"
)

// acquisition is one request for locks, as it is asked for, in attempts that
// are numbered, until it is answered. It belongs to the goroutine of its caller.
type acquisition struct {
	c     *Client
	o     *acquireOptions
	lease *Lease // nil for one with a lease of its own, or under somebody else's

	req   *pb.AcquireRequest // of the attempt under way: never changed once it is sent
	done  func()             // its id under the lease is no longer open
	began time.Duration      // when it was asked for
	sent  time.Duration      // when the attempt under way was, or earlier
	asked bool               // there has been an attempt
	known bool               // the server may know of one
	wait  *wait              // nil while its lease needs no renewal
}

// newAcquisition makes a request that shares nothing with the caller: what is
// sent may still be on its way when the call has returned.
func (c *Client) newAcquisition(names []string, o *acquireOptions, lease *Lease) *acquisition {
	made := &struct { // one piece of memory
		acquisition
		req  pb.AcquireRequest
		ttl  durationpb.Duration
		name [1]string
	}{}
	a, req := &made.acquisition, &made.req
	a.c, a.o, a.lease, a.req, a.done = c, o, lease, req, func() {}
	req.Names, req.Mode, req.Limit, req.LeaseId = append(made.name[:0], names...), pb.Mode_MODE_EXCLUSIVE, o.limit, o.leaseID
	req.Actor, req.Metadata, req.WaitForever, req.Attempt = o.actor, maps.Clone(o.metadata), o.wait == nil, 1
	if o.shared {
		req.Mode = pb.Mode_MODE_SHARED
	}
	if o.lockDelay != 0 {
		req.LockDelay = durationpb.New(o.lockDelay)
	}
	if lease == nil && o.leaseID == 0 {
		made.ttl.Seconds, made.ttl.Nanos = int64(o.ttl/time.Second), int32(o.ttl%time.Second)
		req.Ttl, req.Owner = &made.ttl, o.owner
	}
	a.identify()
	// The TTL counts from when the grant was asked for, or from earlier.
	a.began = c.lately()
	if o.wait != nil && *o.wait > 0 { // what is left of it must be right
		a.began = c.now()
	}
	return a
}

// identify gives the request an id of its kind.
func (a *acquisition) identify() {
	switch {
	case a.lease != nil:
		a.req.LeaseId = a.lease.ID()
		a.req.RequestId, a.req.LowestOpenRequestId, a.done = a.lease.begin()
	case a.o.leaseID != 0:
		a.req.RequestId = underRequestID()
	default:
		a.req.RequestId = requestID()
	}
}

// underRequestID makes a random id for a request under a lease that others may
// have, too: 2^62 to 2^63-1.
func underRequestID() uint64 { return 1<<62 + rand.Uint64N(1<<62) }

// once makes one attempt.
func (a *acquisition) once(ctx context.Context, conn *grpc.ClientConn, until patience) (*pb.Hold, error) {
	a.sent = a.began
	if a.asked {
		a.sent = a.c.now()
		a.req = proto.CloneOf(a.req)
		a.req.Attempt++
	}
	if a.o.wait != nil {
		left := *a.o.wait
		if a.asked && left > 0 {
			left = max(left-(a.c.now()-a.began), time.Millisecond) // a repeat joins its place again
		}
		a.req.Wait = durationpb.New(left)
	}
	repeat := a.asked
	a.asked = true
	answer, err := a.c.ask(ctx, conn, acquireOperation(a.req), until)
	a.known = a.known || !isUnsent(err)
	if err == nil {
		return answer.GetAcquire().GetHold(), nil
	}
	e := toError(err)
	switch {
	case repeat && e.Reason == "REQUEST_ENDED":
		// An earlier attempt, whose answer was lost, was refused: the request
		// ended with that, and will never be granted. Ask with a new id.
		a.done()
		a.req = proto.CloneOf(a.req)
		a.identify()
		a.req.Attempt, a.known = 0, false
		return nil, errAskAgain
	case a.o.leaseID != 0 && a.req.GetRequestId() != 0 && e.Reason == "INVALID_ARGUMENT" && e.Field == "request_id":
		// An older server, which knows sequence numbers only. It makes up an id
		// itself, and undoes the request when its call ends.
		a.req = proto.CloneOf(a.req)
		a.req.RequestId, a.req.Attempt = 0, 0
		answer, err = a.c.ask(ctx, conn, acquireOperation(a.req), until)
		return answer.GetAcquire().GetHold(), err
	}
	return nil, err
}

// alive is the latest time from which the server may have counted the TTL of the
// request's own lease.
func (a *acquisition) alive() time.Duration {
	if a.wait == nil {
		return max(a.sent, a.began)
	}
	a.c.mu.Lock()
	defer a.c.mu.Unlock()
	return max(a.sent, a.wait.sent)
}

// waitBound sets how long the server is to let the request wait, and returns
// what the whole may take; 0 sets no bound. A context's deadline bounds the
// wait, too, a little earlier: the answer then says what stood in the way.
func (a *acquisition) waitBound(ctx context.Context) (total, within time.Duration) {
	deadline, bounded := ctx.Deadline()
	switch o := a.o; {
	case o.wait != nil && *o.wait == 0:
		return a.c.callFor, a.c.attemptTimeout() // answered at once, or lost
	case o.wait != nil:
		return *o.wait + a.c.callFor, 0
	case bounded:
		left := time.Until(deadline) // pace of the network, not of a lease
		if early := left - min(left/10, 200*time.Millisecond); early > 0 {
			bound := *o
			bound.wait, bound.untilDeadline = &early, true
			a.o, a.req.WaitForever, a.began = &bound, false, a.c.now()
		}
	}
	return 0, 0
}

// acquire asks until it is answered.
func (c *Client) acquire(ctx context.Context, names []string, o *acquireOptions, lease *Lease) (*Lock, error) {
	a := c.newAcquisition(names, o, lease)
	defer func() { a.done() }()
	total, within := a.waitBound(ctx)
	if err := c.enterAcquire(a); err != nil {
		return nil, err
	}
	defer c.leaveAcquire(a)
	asked := ctx
	if o.wait != nil && *o.wait > 0 {
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeout(ctx, total)
		defer cancel()
	}
	until := patience{within: within, closed: c.accepting}
	if a.wait != nil {
		until.again, until.since = a.wait.again, min(20*time.Millisecond, o.ttl/8)
	}
	var grant *pb.Hold
	err := c.retry(ctx, total, func(ctx context.Context, conn *grpc.ClientConn) (err error) {
		if a.wait != nil && a.asked {
			a.wait.of(a.req)
		}
		grant, err = a.once(ctx, conn, until)
		return err
	})
	if err == nil {
		var l *Lock
		if l, err = c.granted(ctx, grant, a); err == nil {
			return l, nil
		}
	}
	var e *Error
	var lost *LostError
	answered := errors.As(err, &e) && definite(e)
	if !answered {
		c.unwanted(a)
	}
	switch {
	case answered && a.o.untilDeadline && e.Reason == "WAIT_TIMEOUT":
		return nil, &notAcquired{err, context.DeadlineExceeded}
	case answered, errors.As(err, &lost), errors.Is(err, ErrClosed):
	case asked.Err() != nil:
		return nil, &notAcquired{err, asked.Err()}
	case ctx.Err() != nil && !errors.Is(err, ErrUnavailable):
		c.mu.Lock()
		endpoint := c.endpoints[c.current]
		c.mu.Unlock()
		silent := &Error{Code: codes.Unavailable, Message: endpoint + " does not answer"}
		return nil, &unavailable{err: silent, ctx: ctx.Err()}
	}
	return nil, err
}

// enterAcquire lets an acquisition begin, unless the client is closed, and
// begins to renew its wait. leaveAcquire ends both.
func (c *Client) enterAcquire(a *acquisition) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.closed {
		return ErrClosed
	}
	c.acquires.Add(1)
	if a.lease == nil && a.o.leaseID == 0 && (a.o.wait == nil || *a.o.wait > 0) {
		a.wait = c.renewWait(a)
	}
	return nil
}

func (c *Client) leaveAcquire(a *acquisition) {
	if a.wait != nil {
		c.mu.Lock()
		c.endWait(a.wait)
		c.mu.Unlock()
	}
	c.acquires.Done()
}

// notAcquired is what stood in the way of an acquisition until its context
// ended.
type notAcquired struct{ err, ctx error }

func (n *notAcquired) Error() string {
	if errors.Is(n.err, ErrUnavailable) {
		return n.err.Error()
	}
	if errors.Is(n.err, n.ctx) || n.err.Error() == n.ctx.Error() {
		return ErrNotAcquired.Error() + ": " + n.err.Error()
	}
	return n.err.Error() + ": " + n.ctx.Error()
}

func (n *notAcquired) Unwrap() []error { return []error{n.err, n.ctx, ErrNotAcquired} }
