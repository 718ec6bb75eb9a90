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
// on: whoever begins a call need not go on with it. One too many is refused before
// it is worked on. It is not gRPC that refuses it, when its headers come: the timer
// of its deadline would be left, for as long as the client has said.
type calls struct {
	most    int64
	under   atomic.Int64
	refused func(reason string)
	logger  *zap.Logger
}

const (
	defaultMaxCalls = 100_000

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
	cost    int64       // see markedAddr.pause
	at      time.Time
}

type begunKey struct{}

// tap is called on a connection's reading goroutine, which must not wait.
func (c *calls) tap(ctx context.Context, info *tap.Info) (context.Context, error) {
	a := addrOf(ctx)
	if a == nil || a.peer { // which bounds what it forwards
		return ctx, nil
	}
	a.begun++
	call := &begun{at: time.Now()} // of the process
	silent := a.silent.Add(1)
	bytes := sizeOfHeaders(info.Header)
	call.cost = 1 + bytes>>10
	a.debt.Add(call.cost)
	if bytes <= fewHeaders {
		bytes = 0
	}
	headers := a.headers.Add(bytes)
	switch under := c.under.Add(1); {
	case bytes > 0 && headers > maxHeaders:
		call.refused = &lease.ExhaustedError{What: "bytes of the headers of calls under way on one connection", Max: maxHeaders}
		c.cut(a, headers > 2*maxHeaders)
	case under > c.most && !brief[info.FullMethodName]:
		call.refused = &lease.ExhaustedError{What: "calls under way", Max: int(c.most)}
		c.cut(a, silent > maxSilent)
	}
	context.AfterFunc(ctx, func() {
		c.under.Add(-1)
		a.headers.Add(-bytes)
		if call.asked.CompareAndSwap(false, true) {
			a.silent.Add(-1)
		}
	})
	return context.WithValue(ctx, begunKey{}, call), nil
}

// cut closes a connection whose client leaves no room for others.
func (c *calls) cut(a *markedAddr, too bool) {
	if too && a.cut.CompareAndSwap(false, true) {
		c.logger.Warn("cutting a connection: its client begins calls and does not go on with them", zap.String("from", a.String()))
		c.refused(ReasonSilentCalls)
		a.box.cut()
	}
}

// admit is told that a call goes on, and refuses one too many.
func (c *calls) admit(ctx context.Context) error {
	call, _ := ctx.Value(begunKey{}).(*begun)
	if call == nil {
		return nil
	}
	if call.asked.CompareAndSwap(false, true) {
		addrOf(ctx).silent.Add(-1)
		addrOf(ctx).debt.Add(-call.cost)
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

// answered counts a call that has been worked on: whether it was for nothing. Whose
// client gives up a wait has waited, and whose deadline has passed has said so.
func answered(ctx context.Context) {
	call, _ := ctx.Value(begunKey{}).(*begun)
	switch {
	case call == nil:
	case ctx.Err() == nil:
		addrOf(ctx).answered.Add(1)
	case errors.Is(ctx.Err(), context.Canceled) && time.Since(call.at) < atOnce:
		addrOf(ctx).debt.Add(1)
	}
}

// atOnce is how soon after it began the end of a call makes it work for nothing.
const atOnce = 50 * time.Millisecond

// Calls that are begun and not gone on with, or ended by their client at once, are
// work for nothing: a connection may have freeCalls of them and debtPerSecond each
// second, and creditEach for each that was answered. A kibibyte of headers counts
// like a call. Who is beyond that is read more slowly, and ten times as slowly far
// beyond it: what renews may stand behind a pause.
const (
	freeCalls     = 256
	debtPerSecond = 1000
	creditEach    = 8
	shortPause    = 50 * time.Millisecond
	longPause     = 500 * time.Millisecond
)

// pause is how long a connection is not read for now.
func (a *markedAddr) pause() time.Duration {
	debt := a.debt.Load() - freeCalls
	if debt <= 0 { // of nearly all
		return 0
	}
	debt -= creditEach * a.answered.Load()
	earned := time.Duration(debt) * time.Second / debtPerSecond
	due := earned - time.Since(a.since) // of the process
	if due > 10*time.Second {
		return longPause
	}
	return min(due, shortPause)
}

func sizeOfHeaders(list metadata.MD) (bytes int64) {
	for key, values := range list {
		for _, v := range values {
			bytes += int64(len(key) + len(v))
		}
	}
	return bytes
}
