package client

import (
	"context"
	"time"

	"go.uber.org/zap"
	healthpb "google.golang.org/grpc/health/grpc_health_v1"
)

const (
	// pulseEvery is how often a server that owes an answer is asked whether it
	// is there at all,
	pulseEvery = 500 * time.Millisecond
	// and pulseWithin how long it may take to say so.
	pulseWithin = time.Second
)

// pulse turns away from a server that has stopped without closing its
// connections, when there is another to turn to: a wait for a lock has no
// bound of its own that would tell. The connection is closed, which costs a
// waiter nothing: its place is kept. It ends with Close.
func (c *Client) pulse() {
	defer c.group.Done()
	ticks := time.NewTicker(pulseEvery) // pace of the network, not of a lease
	defer ticks.Stop()
	for {
		select {
		case <-ticks.C:
		case <-c.ctx.Done():
			return
		}
		if c.waiting.Load() == 0 {
			continue
		}
		c.mu.Lock()
		at, conn := c.current, c.conns[c.current]
		endpoint := c.endpoints[at]
		c.mu.Unlock()
		if conn == nil {
			continue
		}
		ctx, cancel := context.WithTimeout(c.ctx, pulseWithin)
		_, err := healthpb.NewHealthClient(conn).Check(ctx, &healthpb.HealthCheckRequest{})
		silent := ctx.Err() != nil && c.ctx.Err() == nil
		cancel()
		if err == nil || !silent {
			continue // an error that comes at once reaches the calls too
		}
		c.logger.Debug("no sign of life", zap.String("endpoint", endpoint), zap.Error(err))
		c.mu.Lock()
		if c.conns[at] == conn {
			c.conns[at] = nil
		}
		c.mu.Unlock()
		c.elsewhere(at, "")
		conn.Close()
	}
}
