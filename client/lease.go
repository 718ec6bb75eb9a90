package client

import (
	"context"
	"sync"
	"time"

	"google.golang.org/protobuf/types/known/durationpb"

	pb "github.com/distlock/distlock/proto/distlock/v1"
)

// Lease is a lease of the client's own that it keeps alive and holds locks
// under. All methods are safe for concurrent use.
type Lease struct {
	client  *Client
	session *session

	mu     sync.Mutex
	last   uint64              // highest request id given out
	lowest uint64              // no lower one awaits its answer
	open   map[uint64]struct{} // those that do
}

// Grant makes a lease and keeps it alive until Revoke or Close.
func (c *Client) Grant(ctx context.Context, ttl time.Duration, opts ...GrantOption) (*Lease, error) {
	id, sent, err := c.grant(ctx, ttl, opts)
	if err != nil {
		return nil, err
	}
	l := &Lease{client: c, session: &session{id: id, ttl: ttl}, open: make(map[uint64]struct{}), lowest: 1}
	if err := c.keep(ctx, l.session, sent, nil); err != nil {
		return nil, err
	}
	return l, nil
}

func (c *Client) grant(ctx context.Context, ttl time.Duration, opts []GrantOption) (id uint64, sent time.Duration, err error) {
	o := grantOptions{owner: c.owner}
	for _, opt := range opts {
		opt.grant(&o)
	}
	op := &pb.Operation{Call: &pb.Operation_Grant{
		Grant: &pb.GrantRequest{Ttl: durationpb.New(ttl), Owner: o.owner, Metadata: o.metadata, RequestId: requestID()},
	}}
	// The first attempt may be the one that made the lease: its time counts.
	sent = c.now()
	answer, err := c.operate(ctx, op)
	return answer.GetGrant().GetLeaseId(), sent, err
}

// begin gives out a request id under the lease, with the lowest that is open.
func (l *Lease) begin() (id, lowest uint64, done func()) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.last++
	id = l.last
	l.open[id] = struct{}{}
	return id, l.lowest, func() {
		l.mu.Lock()
		defer l.mu.Unlock()
		delete(l.open, id)
		for ; l.lowest <= l.last; l.lowest++ {
			if _, open := l.open[l.lowest]; open {
				return
			}
		}
	}
}

// ID names the lease.
func (l *Lease) ID() uint64 { return l.session.id }

// TTL is the lease's.
func (l *Lease) TTL() time.Duration { return l.session.ttl }

// Remaining is how long the lease may still be believed alive, if no renewal
// succeeds.
func (l *Lease) Remaining() time.Duration {
	if l.session.ctx.Err() != nil {
		return 0
	}
	l.client.mu.Lock()
	defer l.client.mu.Unlock()
	return max(l.session.deadline()-l.client.now(), 0)
}

// Deadline is Remaining as a time, for display.
func (l *Lease) Deadline() time.Time { return l.client.clock.Now().Add(l.Remaining()) }

// Context ends when the lease is lost or revoked; context.Cause says how.
func (l *Lease) Context() context.Context { return l.session.ctx }

// Done is Context().Done().
func (l *Lease) Done() <-chan struct{} { return l.session.ctx.Done() }

// Err is nil while the lease lives; then a *LostError, or ErrReleased.
func (l *Lease) Err() error {
	if l.session.ctx.Err() == nil && l.Remaining() == 0 && l.session.ctx.Err() == nil {
		return &LostError{Cause: CauseUnreachable, LeaseID: l.session.id}
	}
	return context.Cause(l.session.ctx)
}

// Acquire takes a lock under the lease, as Client.Acquire does.
func (l *Lease) Acquire(ctx context.Context, name string, opts ...LeaseAcquireOption) (*Lock, error) {
	return l.AcquireAll(ctx, []string{name}, opts...)
}

// TryAcquire is Acquire that does not wait.
func (l *Lease) TryAcquire(ctx context.Context, name string, opts ...LeaseTryAcquireOption) (*Lock, error) {
	o := l.client.options()
	for _, opt := range opts {
		opt.leaseTryAcquire(o)
	}
	return l.acquire(ctx, []string{name}, o.now())
}

// AcquireAll takes several locks under the lease, all at once or none.
func (l *Lease) AcquireAll(ctx context.Context, names []string, opts ...LeaseAcquireOption) (*Lock, error) {
	o := l.client.options()
	for _, opt := range opts {
		opt.leaseAcquire(o)
	}
	return l.acquire(ctx, names, o)
}

func (l *Lease) acquire(ctx context.Context, names []string, o *acquireOptions) (*Lock, error) {
	if err := l.Err(); err != nil {
		return nil, err
	}
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	defer context.AfterFunc(l.session.ctx, func() { cancel(context.Cause(l.session.ctx)) })()
	return l.client.acquire(ctx, names, o, l)
}

// Revoke ends the lease; locks still held under it are lost, lock-delays and
// all. Release them first for a clean end.
func (l *Lease) Revoke(ctx context.Context) error {
	c := l.client
	c.mu.Lock()
	c.end(l.session, ErrReleased)
	c.mu.Unlock()
	return c.Admin().Revoke(ctx, l.ID(), c.owner)
}
