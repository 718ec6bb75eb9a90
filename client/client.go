// Package client is the Go client of distlock. It takes locks, keeps their
// leases alive, and tells its caller in time when a lock is lost.
//
// # Clocks
//
// A lock is believed held until the client's send time of the last
// acknowledged renewal plus the TTL, less a margin that covers clocks whose
// rates differ by 1 %. The server counts the TTL from the receipt, which is
// later, so the client stops believing before the server grants the lock to
// another. Clock readings are never compared across machines. On Linux the
// time includes suspension (CLOCK_BOOTTIME).
//
// That is exclusion in time. A process that is paused between looking at its
// lock and writing can still write late: only a resource that checks the
// lock's fencing token (package fence) turns that write away.
package client

import (
	"cmp"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"os"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/jonboulle/clockwork"
	"go.uber.org/zap"
	"google.golang.org/grpc"
	"google.golang.org/grpc/backoff"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/keepalive"

	pb "github.com/distlock/distlock/proto/distlock/v1"
)

// DefaultEndpoint is where a server started without flags listens.
const DefaultEndpoint = "localhost:50051"

// Client talks to a distlock server. All methods are safe for concurrent use.
// Close ends its goroutine.
type Client struct {
	clock   clockwork.Clock
	now     func() time.Duration // a timeline that no wall clock jump changes
	lately  func() time.Duration // now, or earlier: for what may only err to that side
	owner   string
	logger  *zap.Logger
	warn    func(Warning)
	dial    []grpc.DialOption
	tls     *tls.Config
	callFor time.Duration
	unary   bool

	endpoints []string
	ctx       context.Context // ends with Close
	cancel    context.CancelFunc
	group     sync.WaitGroup  // the renewer, what it starts, and what is started while the client is not closed
	accepting context.Context // ends when Close begins: nothing more is acquired
	refuse    context.CancelFunc
	acquires  sync.WaitGroup // acquisitions under way
	wake      chan struct{}  // buffered, one: the renewer looks at its sessions anew
	waited    sync.Pool      // waits that are over, to be used again
	waiting   atomic.Int64   // calls that wait for an answer

	mu        sync.Mutex
	conns     []*grpc.ClientConn           // by endpoint, made on first use
	current   int                          // the endpoint in use
	streams   map[*grpc.ClientConn]*stream // those that live, made on first use
	sessions  map[uint64]*session
	lefts     map[*session]struct{} // that this client does not keep alive
	waits     wait                  // head of a circular list of those that there are
	unsettled []*unsettled          // in the order listed
	settling  bool                  // there is a goroutine for it
	shortest  time.Duration         // TTL of a session that there was
	wakeAt    time.Duration         // when the renewer looks at them next
	closed    bool
	cluster   string // whose history the last that told was; "" for none yet
}

// Option configures a Client.
type Option func(*Client)

// WithClock replaces the clock, for tests.
func WithClock(clock clockwork.Clock) Option {
	return func(c *Client) {
		c.clock = clock
		start := clock.Now()
		c.now = func() time.Duration { return clock.Since(start) }
		c.lately = c.now
	}
}

// WithOwner says who holds this client's locks, in free text. The default is
// the host's name and the process id.
func WithOwner(owner string) Option { return func(c *Client) { c.owner = owner } }

// WithLogger makes the client log what it retries.
func WithLogger(l *zap.Logger) Option { return func(c *Client) { c.logger = l } }

// WithTLS makes the client talk TLS.
func WithTLS(cfg *tls.Config) Option { return func(c *Client) { c.tls = cfg } }

// WithDialOptions adds options to the gRPC connections.
func WithDialOptions(opts ...grpc.DialOption) Option {
	return func(c *Client) { c.dial = append(c.dial, opts...) }
}

// WithOnWarning sets what is called when half of a lease's TTL has passed
// without a successful renewal, and when another cluster answers than before. It
// must not block.
func WithOnWarning(fn func(Warning)) Option { return func(c *Client) { c.warn = fn } }

// WithCallTimeout bounds calls that do not wait for a lock, retries included,
// when their context has no deadline. The default is 10 s.
func WithCallTimeout(d time.Duration) Option { return func(c *Client) { c.callFor = d } }

// WithUnary makes each operation a call of its own instead of one of many on a
// stream: for proxies that end long streams. It is slower, and losses are told
// by the next renewal only.
func WithUnary() Option { return func(c *Client) { c.unary = true } }

// Warning says that a lease has not been renewed for half its TTL, or, with
// LeaseID 0 and a *ClusterError, that another cluster answers than before.
type Warning struct {
	LeaseID  uint64
	Names    []string // of the locks held under it by this client
	Deadline time.Time
	Err      error // of the last attempt, if one has been answered
}

// New returns a client of the server or cluster at endpoints (host:port each);
// none means DefaultEndpoint. It does not connect yet.
func New(endpoints []string, opts ...Option) (*Client, error) {
	if len(endpoints) == 0 {
		endpoints = []string{DefaultEndpoint}
	}
	for _, e := range endpoints {
		if err := checkEndpoint(e); err != nil {
			return nil, err
		}
	}
	ctx, cancel := context.WithCancel(context.Background())
	c := &Client{
		endpoints: endpoints, conns: make([]*grpc.ClientConn, len(endpoints)),
		ctx: ctx, cancel: cancel, wake: make(chan struct{}, 1),
		streams: make(map[*grpc.ClientConn]*stream), sessions: make(map[uint64]*session),
		lefts: make(map[*session]struct{}), shortest: time.Hour,
		logger: zap.NewNop(), callFor: 10 * time.Second,
		clock: clockwork.NewRealClock(),
	}
	c.accepting, c.refuse = context.WithCancel(ctx)
	c.now, c.lately = boottime()
	if host, err := os.Hostname(); err == nil {
		c.owner = fmt.Sprintf("%s:%d", host, os.Getpid())
	}
	c.waits.before, c.waits.after = &c.waits, &c.waits
	for _, opt := range opts {
		opt(c)
	}
	for i := range endpoints { // a malformed endpoint is found here
		if _, err := c.conn(i); err != nil {
			cancel()
			c.closeConns()
			return nil, err
		}
	}
	c.group.Add(2)
	go c.renew()
	go c.pulse()
	return c, nil
}

// checkEndpoint finds what would never be reached. Whether a host exists shows later.
func checkEndpoint(endpoint string) error {
	wrong := func(why string) error {
		return &Error{
			Reason: "INVALID_ARGUMENT", Code: codes.InvalidArgument, Field: "endpoint",
			Message: fmt.Sprintf("endpoint %q: %s; give HOST:PORT, as in %s", endpoint, why, DefaultEndpoint),
		}
	}
	if scheme, _, ok := strings.Cut(endpoint, "://"); ok {
		return wrong("it begins with " + scheme + "://")
	}
	host, port, err := net.SplitHostPort(endpoint)
	if err != nil {
		if strings.Count(endpoint, ":") > 1 {
			return wrong("an address of IPv6 stands in brackets, [::1]:50051")
		}
		return wrong("it has no port")
	}
	if n, err := strconv.ParseUint(port, 10, 16); err != nil || n == 0 {
		return wrong("its port is not a number from 1 to 65535")
	}
	if strings.ContainsAny(host, "/@ \t\n") {
		return wrong("that is not a host")
	}
	return nil
}

// conn returns the connection to an endpoint.
func (c *Client) conn(i int) (*grpc.ClientConn, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.connLocked(i)
}

// connLocked is conn; the caller holds c.mu.
func (c *Client) connLocked(i int) (*grpc.ClientConn, error) {
	if c.ctx.Err() != nil {
		return nil, ErrClosed
	}
	if c.conns[i] != nil {
		return c.conns[i], nil
	}
	creds := insecure.NewCredentials()
	if c.tls != nil {
		creds = credentials.NewTLS(c.tls)
	}
	opts := append([]grpc.DialOption{
		grpc.WithTransportCredentials(creds),
		grpc.WithConnectParams(grpc.ConnectParams{
			Backoff:           backoff.Config{BaseDelay: 20 * time.Millisecond, Multiplier: 1.6, Jitter: 0.2, MaxDelay: time.Second},
			MinConnectTimeout: 2 * time.Second,
		}),
		grpc.WithKeepaliveParams(keepalive.ClientParameters{Time: 10 * time.Second, Timeout: 5 * time.Second}),
		grpc.WithDisableServiceConfig(),
		// HTTPS_PROXY is for the web: it would see plaintext, and a lock service is near.
		// Whoever wants one gives a dialer.
		grpc.WithNoProxy(),
		// Of a fixed size, for gRPC finds others by pings with every message.
		grpc.WithStaticStreamWindowSize(1 << 20),
		grpc.WithStaticConnWindowSize(1 << 20),
	}, c.dial...)
	conn, err := grpc.NewClient("passthrough:///"+strings.ReplaceAll(c.endpoints[i], "%", "%25"), opts...) // of a zone of IPv6
	if err != nil {
		return nil, fmt.Errorf("endpoint %q: %w", c.endpoints[i], err)
	}
	c.conns[i] = conn
	return conn, nil
}

// Close gives back what this client still holds, and what it waits for, within
// two seconds, and ends its goroutines. Acquisitions under way return ErrClosed.
// Locks taken with NoRenew or UnderLeaseID stay, and their contexts end.
func (c *Client) Close() error {
	c.mu.Lock()
	if c.closed {
		c.mu.Unlock()
		return nil
	}
	c.closed = true
	var left []*session
	for _, s := range c.sessions {
		left = append(left, s)
	}
	slices.SortFunc(left, func(a, b *session) int { return cmp.Compare(a.id, b.id) })
	for _, s := range left {
		s.last = s.locks
		c.end(s, ErrReleased)
	}
	for s := range c.lefts {
		c.end(s, ErrClosed)
	}
	c.mu.Unlock()
	c.refuse()
	c.acquires.Wait() // what they leave behind is listed
	ctx, cancel := context.WithTimeout(c.ctx, closeWithin)
	c.endAll(ctx, left)
	cancel()
	c.mu.Lock() // whoever joins the group looks at it first
	c.cancel()
	c.mu.Unlock()
	c.group.Wait()
	return c.closeConns()
}

// closeWithin bounds how long Close waits for the server.
const closeWithin = 2 * time.Second

func (c *Client) closeConns() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	var errs []error
	for _, conn := range c.conns {
		if conn != nil {
			errs = append(errs, conn.Close())
		}
	}
	return errors.Join(errs...)
}

// maxAttempt bounds one attempt of a call that should be answered at once.
const maxAttempt = 5 * time.Second

// call makes a call that should be answered at once, at whichever endpoint
// answers, until it succeeds, fails for good or its time is up.
func (c *Client) call(ctx context.Context, fn func(context.Context, *grpc.ClientConn) error) error {
	return c.retry(ctx, c.callFor, func(ctx context.Context, conn *grpc.ClientConn) error {
		ctx, cancel := context.WithTimeout(ctx, c.attemptTimeout())
		defer cancel()
		return fn(ctx, conn)
	})
}

// operate has an operation done that should be answered at once, as call does.
func (c *Client) operate(ctx context.Context, op *pb.Operation) (answer *pb.Answer, err error) {
	err = c.retry(ctx, c.callFor, func(ctx context.Context, conn *grpc.ClientConn) (err error) {
		send := op
		if op.Id != 0 { // it has been on a stream
			send = again(op)
		}
		answer, err = c.ask(ctx, conn, send, patience{within: c.attemptTimeout()})
		return err
	})
	return answer, err
}

// attemptTimeout is maxAttempt, or the time for the whole call where that is shorter.
func (c *Client) attemptTimeout() time.Duration { return min(maxAttempt, c.callFor) }

// retry makes attempts until one succeeds, fails for good, or ctx ends; a ctx
// without a deadline ends after within as well, unless that is 0. The first
// attempt must bound itself by that: few need a second, and a timer for them.
func (c *Client) retry(ctx context.Context, within time.Duration, attempt func(context.Context, *grpc.ClientConn) error) error {
	c.waiting.Add(1)
	defer c.waiting.Add(-1)
	pause := 10 * time.Millisecond
	var last reasons
	began := time.Now() // pace of the network, not of a lease
	for tries := 1; ; tries++ {
		if tries == 2 && within > 0 {
			var cancel context.CancelFunc
			ctx, cancel = boundedUntil(ctx, began.Add(within))
			defer cancel()
		}
		c.mu.Lock()
		at := c.current
		endpoint, endpoints := c.endpoints[at], len(c.endpoints)
		conn, err := c.connLocked(at)
		c.mu.Unlock()
		if err != nil {
			return err
		}
		err = attempt(ctx, conn)
		if err == nil {
			return nil
		}
		if errors.Is(err, ErrClosed) {
			return ErrClosed
		}
		e := toError(err)
		if ctx.Err() != nil {
			if e.Code != codes.DeadlineExceeded && e.Code != codes.Canceled {
				if definite(e) {
					return e
				}
				last.add(endpoint, e)
			}
			return last.ended(ctx)
		}
		if e == errAskAgain {
			continue
		}
		if isTransport(e) || e.Reason == "SUPERSEDED" {
			e = &Error{Code: codes.Unavailable, Message: e.Message, Leader: e.Leader}
		}
		if e.Code != codes.Unavailable && e.Code != codes.DeadlineExceeded {
			return e
		}
		last.add(endpoint, e)
		c.logger.Debug("retrying", zap.String("endpoint", endpoint), zap.Error(err))
		c.next(at, e.Leader)
		wait := pause/2 + rand.N(pause/2)
		if tries%endpoints != 0 { // another one may be better
			wait = time.Millisecond
		} else {
			pause = min(pause*2, 500*time.Millisecond/time.Duration(endpoints))
		}
		select {
		case <-ctx.Done():
			return last.ended(ctx)
		case <-c.ctx.Done():
			return ErrClosed
		case <-time.After(wait): // pace of the network, not of a lease
		}
	}
}

// reasons are why each endpoint did not answer.
type reasons []reason

type reason struct {
	endpoint string
	err      *Error
}

func (r *reasons) add(endpoint string, e *Error) {
	for i := range *r {
		if (*r)[i].endpoint == endpoint {
			(*r)[i].err = e
			return
		}
	}
	*r = append(*r, reason{endpoint, e})
}

// ended is the error of a call whose time was up: what stood in its way, if
// anything did, and the context's own error.
func (r reasons) ended(ctx context.Context) error {
	for i := range r {
		if r[i].err.Code == codes.Unavailable {
			return &unavailable{r, r[i].err, context.Cause(ctx)}
		}
	}
	return context.Cause(ctx)
}

// boundedUntil gives a context a deadline if it has none.
func boundedUntil(ctx context.Context, deadline time.Time) (context.Context, context.CancelFunc) {
	if _, bounded := ctx.Deadline(); bounded {
		return ctx, func() {}
	}
	return context.WithDeadline(ctx, deadline)
}

// next turns to the leader if it is known, and else to the next endpoint.
func (c *Client) next(at int, leader string) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.current != at {
		return
	}
	c.current = (at + 1) % len(c.endpoints)
	if leader == "" {
		return
	}
	for i, endpoint := range c.endpoints {
		if endpoint == leader {
			c.current = i
			return
		}
	}
	// A member that the caller did not name: the cluster has changed.
	if len(c.endpoints) < maxEndpoints {
		c.endpoints = append(slices.Clone(c.endpoints), leader)
		c.conns = append(c.conns, nil)
		c.current = len(c.endpoints) - 1
	}
}

// maxEndpoints bounds how many the client learns of.
const maxEndpoints = 32

func locksOf(conn *grpc.ClientConn) pb.LockServiceClient   { return pb.NewLockServiceClient(conn) }
func leasesOf(conn *grpc.ClientConn) pb.LeaseServiceClient { return pb.NewLeaseServiceClient(conn) }

// requestID makes a random request id: 1 to 2^63-1.
func requestID() uint64 { return rand.Uint64N(1<<63-1) + 1 }
