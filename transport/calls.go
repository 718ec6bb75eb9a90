package transport

import (
	"context"
	"errors"
	"maps"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"go.uber.org/zap"
	"google.golang.org/grpc"
	healthpb "google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/tap"

	"github.com/distlock/distlock/lease"
	pb "github.com/distlock/distlock/proto/distlock/v1"
)

// calls bounds the calls under way on all connections of clients, from their headers
// until their answers are sent: whoever begins a call need not go on with it, nor read
// the answer. One too many is refused before it is worked on, by its handler. gRPC's
// tap could refuse it when its headers come, but would leave the timer of its deadline,
// for as long as the client has said.
type calls struct {
	most    int64
	each    int64        // bytes kept of one connection's requests at most, see maxEach
	inAll   int64        // and of all, with headers, see maxKept
	under   atomic.Int64 // of all connections' streams
	busy    atomic.Int64 // unary calls that are being worked on
	kept    atomic.Int64 // bytes of requests that have not been read, and of headers
	refused func(reason string)
	logger  *zap.Logger

	mu      sync.Mutex
	conns   map[*conn]struct{} // of clients
	pressed bool               // when look looked last
}

const (
	// fewHeaders is what a call's headers may take and not count; others may take
	// maxHeaders together, on one connection.
	fewHeaders = 2 << 10
	maxHeaders = 4 << 20
	// eachHeader is what one takes beside its bytes.
	eachHeader = 100
	// maxEach bounds the bytes of one connection's requests that have not been read,
	// as those that have not come whole, and maxKept those and headers of all.
	maxEach = 8 << 20
	maxKept = 256 << 20
	// fairKept is what a connection may have of maxKept, however many there are.
	fairKept = 64 << 10
	// An idle call waits for what is asked, or for its answer to be read, as does a
	// stream of Multiplex on which nothing is under way. When there are too many calls,
	// a connection may have an equal part of them idle, fewIdle at least and maxIdle at
	// most: whoever has more for idleFor is cut.
	fewIdle, maxIdle = 16, 1000
	idleFor          = time.Second
	// mostOperations bounds what is under way on the streams of all connections: answers
	// that are not read, for what waits for the log has a bound of its own. Beyond, a
	// connection may have an equal part of it, fewOperations at least.
	mostOperations, fewOperations = 1 << 18, 1000
)

// ReasonSilentCalls is the reason under which connections are counted that were cut
// because their clients begin calls and do not go on with them, or do not read what
// is answered. Nobody is told.
const ReasonSilentCalls = "SILENT_CALLS"

// brief are the calls that are never one too many: they renew or give back, wait
// for nobody, and each connection has but so many.
var brief = map[string]bool{
	pb.LeaseService_KeepAlive_FullMethodName:   true,
	pb.LeaseService_Revoke_FullMethodName:      true,
	pb.LockService_Release_FullMethodName:      true,
	pb.LockService_Abandon_FullMethodName:      true,
	pb.LockService_ForceRelease_FullMethodName: true,
	healthpb.Health_Check_FullMethodName:       true,
}

// begun is a call whose headers have come.
type begun struct {
	refused *lease.ExhaustedError
	cost    int64 // see account
	asked   time.Time
	conn    *conn
	stream  uint32
	unary   bool // and being worked on, but for rest
}

func (c *calls) open(conn *conn) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.conns[conn] = struct{}{}
}

func (c *calls) close(conn *conn) {
	conn.streams.close()
	c.mu.Lock()
	defer c.mu.Unlock()
	delete(c.conns, conn)
}

// part is an equal part of what all connections may have.
func (c *calls) part(of int64) int64 {
	c.mu.Lock()
	defer c.mu.Unlock()
	return of / int64(max(len(c.conns), 1))
}

// look cuts those that have had too many idle calls for too long, when there are too
// many calls, and those with too many operations, when there are too many of these.
func (c *calls) look(now time.Time) {
	c.mu.Lock()
	list := slices.Collect(maps.Keys(c.conns))
	c.mu.Unlock()
	operations := 0
	for _, conn := range list {
		operations += conn.share.UnderWay()
	}
	calls, busy := c.under.Load() >= c.most, operations > mostOperations
	before := c.pressed
	if c.pressed = calls || busy; !c.pressed {
		return
	}
	idle, under := max(c.part(c.most), fewIdle), max(c.part(mostOperations), fewOperations)
	for _, conn := range list {
		switch {
		case (!calls || conn.idleCalls() <= min(idle, maxIdle)) && (!busy || int64(conn.share.UnderWay()) <= under):
			conn.idle = time.Time{}
		case conn.idle.IsZero() || !before:
			conn.idle = now
		case now.Sub(conn.idle) >= idleFor:
			c.cut(conn)
		}
	}
}

// tooMany reports whether one more call of a connection is one too many: of all, unless
// the connection has no more than its part of them. So nobody can shut out others.
func (c *calls) tooMany(conn *conn) bool {
	under := c.under.Load()
	return under > c.most && (under > 2*c.most || conn.streams.count() > max(c.part(c.most), 1))
}

// idleCalls is how many calls wait for their client.
func (c *conn) idleCalls() int64 {
	c.mu.Lock()
	defer c.mu.Unlock()
	idle := c.streams.count() - c.handled.Load()
	for port := range c.ports {
		if port.Idle() {
			idle++
		}
	}
	return idle
}

// rest is called when a call begins to wait, and what it returns when it goes on:
// meanwhile it is not being worked on.
func rest(ctx context.Context) (again func()) {
	call, _ := ctx.Value(begunKey{}).(*begun)
	if call == nil || !call.unary {
		return func() {}
	}
	call.work(-1)
	return func() { call.work(1) }
}

func (b *begun) work(n int64) {
	b.conn.busy.Add(n)
	b.conn.calls.busy.Add(n)
}

type begunKey struct{}

// tap is called on a connection's reading goroutine, which must not wait.
func (c *calls) tap(ctx context.Context, info *tap.Info) (context.Context, error) {
	conn := connOf(ctx)
	if conn == nil || conn.peer { // which bounds what it forwards
		return ctx, nil
	}
	call := &begun{conn: conn}
	bytes := sizeOfHeaders(info.Header)
	call.cost = costOfCall * (1 + bytes>>10)
	conn.made += call.cost
	conn.charge(call.cost)
	if c.tooMany(conn) && !brief[info.FullMethodName] {
		call.refused = &lease.ExhaustedError{What: "calls under way", Max: int(c.most)}
	}
	if bytes > fewHeaders {
		headers := conn.headers.Add(bytes)
		if headers > maxHeaders {
			call.refused = &lease.ExhaustedError{What: "bytes of the headers of calls under way on one connection", Max: maxHeaders}
		}
		if headers > 2*maxHeaders {
			c.cut(conn)
		}
		c.kept.Add(bytes)
		c.cutIfTooMuch(conn)
		context.AfterFunc(ctx, func() {
			c.kept.Add(-bytes)
			conn.headers.Add(-bytes)
		})
	}
	return context.WithValue(ctx, begunKey{}, call), nil
}

// cutIfTooMuch cuts a connection that keeps too much, or more than its part when all
// do together.
func (c *calls) cutIfTooMuch(conn *conn) {
	asked := conn.streams.bytes()
	own := asked + conn.headers.Load()
	if asked > c.each || c.kept.Load() > c.inAll && own > max(c.part(c.inAll), fairKept) {
		c.cut(conn)
	}
}

// cut closes a connection whose client leaves no room for others.
func (c *calls) cut(conn *conn) {
	if conn.cut.CompareAndSwap(false, true) {
		c.logger.Warn("cutting a connection: its client begins calls, and does not go on with them or read the answers", zap.String("from", conn.remote.String()))
		c.refused(ReasonSilentCalls)
		conn.box.cut()
	}
}

// admit is told that a call goes on, and refuses one too many.
func (c *calls) admit(ctx context.Context, call *begun) error {
	call.asked = time.Now() // of the process
	call.stream = streamOf(ctx)
	call.conn.credit(call.cost + framesOfCall)
	if call.refused != nil {
		c.refused(ReasonExhausted)
		return toStatus(call.refused)
	}
	return nil
}

func (c *calls) unary(ctx context.Context, req any, _ *grpc.UnaryServerInfo, handler grpc.UnaryHandler) (any, error) {
	call, _ := ctx.Value(begunKey{}).(*begun)
	if call == nil {
		return handler(ctx, req)
	}
	call.conn.handled.Add(1)
	defer call.conn.handled.Add(-1)
	if err := c.admit(ctx, call); err != nil {
		return nil, err
	}
	call.took(-1)
	call.unary = true
	call.work(1)
	defer call.work(-1)
	defer call.answered(ctx)
	return handler(ctx, req)
}

func (c *calls) stream(srv any, in grpc.ServerStream, _ *grpc.StreamServerInfo, handler grpc.StreamHandler) error {
	call, _ := in.Context().Value(begunKey{}).(*begun)
	if call == nil {
		return handler(srv, in)
	}
	call.conn.handled.Add(1)
	defer call.conn.handled.Add(-1)
	if err := c.admit(in.Context(), call); err != nil {
		return err
	}
	defer call.answered(in.Context())
	return handler(srv, in)
}

// took is told that a call has taken so many bytes of what has come on its stream, all
// for less than 0: they pay for the frames that they came in.
func (b *begun) took(bytes int64) {
	b.conn.credit(b.conn.streams.taken(b.stream, bytes))
}

// answered counts a call that has been worked on, and whether that was for nothing. A
// wait that its client gives up, and a call whose deadline has passed, were not.
func (b *begun) answered(ctx context.Context) {
	switch {
	case ctx.Err() == nil:
		b.conn.answered()
	case errors.Is(ctx.Err(), context.Canceled) && time.Since(b.asked) < atOnce:
		b.conn.charge(costOfCall + framesOfCall)
	}
}

// atOnce is how soon a call must be cancelled after it was asked to have been for
// nothing. Who waits for a lock and gives up has waited longer.
const atOnce = 5 * time.Millisecond

func sizeOfHeaders(list metadata.MD) (bytes int64) {
	for key, values := range list {
		for _, v := range values {
			bytes += int64(len(key) + len(v) + eachHeader)
		}
	}
	return bytes
}
