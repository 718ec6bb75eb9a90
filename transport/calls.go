package transport

import (
	"context"
	"errors"
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
// on: whoever begins a call need not go on with it. One too many is refused before it
// is worked on, by its handler. gRPC's tap could refuse it when its headers come, but
// would leave the timer of its deadline, for as long as the client has said.
type calls struct {
	most    int64
	under   atomic.Int64
	refused func(reason string)
	logger  *zap.Logger
}

const (
	// fewHeaders is what a call's headers may take and not count; others may take
	// maxHeaders together, on one connection.
	fewHeaders = 1 << 10
	maxHeaders = 4 << 20
	// maxSilent bounds the calls of one connection that wait for what is asked,
	// when there are too many calls.
	maxSilent = 1000
)

// ReasonSilentCalls is the reason under which connections are counted that were cut
// because their clients begin calls and do not go on with them. Nobody is told.
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
	asked   atomic.Bool // or over
	cost    int64       // see account
	at      time.Time
}

type begunKey struct{}

// tap is called on a connection's reading goroutine, which must not wait.
func (c *calls) tap(ctx context.Context, info *tap.Info) (context.Context, error) {
	conn := connOf(ctx)
	if conn == nil || conn.peer { // which bounds what it forwards
		return ctx, nil
	}
	call := &begun{at: time.Now()} // of the process
	silent := conn.silent.Add(1)
	bytes := sizeOfHeaders(info.Header)
	call.cost = costOfCall * (1 + bytes>>10)
	conn.made += call.cost
	conn.charge(call.cost)
	if bytes <= fewHeaders {
		bytes = 0
	}
	headers := conn.headers.Add(bytes)
	switch under := c.under.Add(1); {
	case bytes > 0 && headers > maxHeaders:
		call.refused = &lease.ExhaustedError{What: "bytes of the headers of calls under way on one connection", Max: maxHeaders}
		if headers > 2*maxHeaders {
			c.cut(conn)
		}
	case under > c.most && !brief[info.FullMethodName]:
		call.refused = &lease.ExhaustedError{What: "calls under way", Max: int(c.most)}
		if silent > maxSilent {
			c.cut(conn)
		}
	}
	context.AfterFunc(ctx, func() {
		c.under.Add(-1)
		conn.headers.Add(-bytes)
		if call.asked.CompareAndSwap(false, true) {
			conn.silent.Add(-1)
		}
	})
	return context.WithValue(ctx, begunKey{}, call), nil
}

// cut closes a connection whose client leaves no room for others.
func (c *calls) cut(conn *conn) {
	if conn.cut.CompareAndSwap(false, true) {
		c.logger.Warn("cutting a connection: its client begins calls and does not go on with them", zap.String("from", conn.remote.String()))
		c.refused(ReasonSilentCalls)
		conn.box.cut()
	}
}

// admit is told that a call goes on, and refuses one too many.
func (c *calls) admit(ctx context.Context) error {
	call, _ := ctx.Value(begunKey{}).(*begun)
	if call == nil {
		return nil
	}
	if call.asked.CompareAndSwap(false, true) {
		connOf(ctx).silent.Add(-1)
		connOf(ctx).credit(call.cost)
	}
	if call.refused != nil {
		c.refused(ReasonExhausted)
		return toStatus(call.refused)
	}
	return nil
}

func (c *calls) unary(ctx context.Context, req any, _ *grpc.UnaryServerInfo, handler grpc.UnaryHandler) (any, error) {
	if err := c.admit(ctx); err != nil {
		return nil, err
	}
	defer answered(ctx)
	return handler(ctx, req)
}

func (c *calls) stream(srv any, in grpc.ServerStream, _ *grpc.StreamServerInfo, handler grpc.StreamHandler) error {
	if err := c.admit(in.Context()); err != nil {
		return err
	}
	defer answered(in.Context())
	return handler(srv, in)
}

// answered counts a call that has been worked on, and whether that was for nothing. A
// wait that its client gives up, and a call whose deadline has passed, were not.
func answered(ctx context.Context) {
	call, _ := ctx.Value(begunKey{}).(*begun)
	switch {
	case call == nil:
	case ctx.Err() == nil:
		connOf(ctx).answered.Add(1)
	case errors.Is(ctx.Err(), context.Canceled) && time.Since(call.at) < atOnce:
		connOf(ctx).charge(costOfCall)
	default:
		connOf(ctx).credit(costOfCall) // its frames
	}
}

// atOnce is how soon a call must be cancelled after it began to have been for nothing.
const atOnce = 50 * time.Millisecond

func sizeOfHeaders(list metadata.MD) (bytes int64) {
	for key, values := range list {
		for _, v := range values {
			bytes += int64(len(key) + len(v))
		}
	}
	return bytes
}
