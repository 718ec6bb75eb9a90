package transport

import (
	"context"
	"sync/atomic"
	"time"

	healthpb "google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/tap"

	"github.com/distlock/distlock/lease"
	pb "github.com/distlock/distlock/proto/distlock/v1"
)

// calls bounds the calls under way on all connections of clients, from their headers
// on: whoever begins a call need not go on with it. One too many is refused before
// it costs a goroutine.
type calls struct {
	most    int64
	under   atomic.Int64
	refused func(reason string)
}

const (
	defaultMaxCalls = 100_000

	// fewHeaders is what a call's headers may take and not count; others may take
	// maxHeaders together, on one connection.
	fewHeaders = 1 << 10
	maxHeaders = 1 << 20
)

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

// tap is called on a connection's reading goroutine, which must not wait.
func (c *calls) tap(ctx context.Context, info *tap.Info) (context.Context, error) {
	a := addrOf(ctx)
	if a == nil || a.peer { // which bounds what it forwards
		return ctx, nil
	}
	a.begun++
	if now := c.under.Add(1); now > c.most && !brief[info.FullMethodName] {
		c.under.Add(-1)
		return nil, c.refuse("calls under way", c.most)
	}
	bytes := sizeOfHeaders(info.Header)
	if bytes <= fewHeaders {
		bytes = 0
	} else if a.headers.Add(bytes) > maxHeaders {
		a.headers.Add(-bytes)
		c.under.Add(-1)
		return nil, c.refuse("bytes of the headers of calls under way on one connection", maxHeaders)
	}
	context.AfterFunc(ctx, func() {
		c.under.Add(-1)
		a.headers.Add(-bytes)
		a.ended.Add(1)
	})
	return ctx, nil
}

// answered counts a call that its client has not ended before it was answered.
func answered(ctx context.Context) {
	if a := addrOf(ctx); a != nil && ctx.Err() == nil {
		a.answered.Add(1)
	}
}

// Calls that their clients end before they are answered are work for nothing: a
// connection may have maxResets of them at once, and as many each second.
const maxResets = 10_000

// pause is how long a connection is not read for now, because its client has ended
// more calls than that since it began.
func (a *markedAddr) pause() time.Duration {
	resets := a.ended.Load() - a.answered.Load()
	if resets <= maxResets {
		return 0
	}
	earned := time.Duration(resets-maxResets) * time.Second / maxResets
	return min(earned-time.Since(a.since), maxPause) // of the process
}

// maxPause bounds one pause: what renews may stand behind it.
const maxPause = 50 * time.Millisecond

func (c *calls) refuse(what string, most int64) error {
	c.refused(ReasonExhausted)
	return toStatus(&lease.ExhaustedError{What: what, Max: int(most)})
}

func sizeOfHeaders(list metadata.MD) (bytes int64) {
	for key, values := range list {
		for _, v := range values {
			bytes += int64(len(key) + len(v))
		}
	}
	return bytes
}
