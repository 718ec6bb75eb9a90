package client

import (
	"context"
	"time"

	"go.uber.org/zap"
	healthpb "google.golang.org/grpc/health/grpc_health_v1"
)

const (
	// pulseWithin is how long a server that owes an answer may take to say that
	// it is there at all, unless a lease is short,
	pulseWithin = time.Second
	// and pulseEvery how often it is asked.
	pulseEvery = 500 * time.Millisecond
)

// pulse turns away from a server that has stopped without closing its
// connections, or that something on the way swallows the packets of: a wait for
// a lock has no bound of its own that would tell. The connection is closed,
// which costs a waiter nothing, for its place is kept, and made anew, to the
// next endpoint if there is one. It ends with Close.
func (c *Client) pulse() {
	defer c.group.Done()
	timer := time.NewTimer(pulseEvery) // pace of the network, not of a lease
	defer timer.Stop()
	for {
		select {
		case <-timer.C:
		case <-c.ctx.Done():
			return
		}
		within := c.pulseWithin()
		if c.waiting.Load() > 0 {
			c.feel(within)
		}
		timer.Reset(min(pulseEvery, within/2))
	}
}

// pulseWithin leaves the shortest lease that there was time for a renewal over
// another connection, unless it is so short that a busy server would be taken
// for a silent one.
func (c *Client) pulseWithin() time.Duration {
	c.mu.Lock()
	defer c.mu.Unlock()
	return max(min(pulseWithin, c.shortest/4), pulseWithin/4)
}

// feel asks the server in use for a sign of life.
func (c *Client) feel(within time.Duration) {
	c.mu.Lock()
	at, conn := c.current, c.conns[c.current]
	endpoint := c.endpoints[at]
	c.mu.Unlock()
	if conn == nil {
		return
	}
	ctx, cancel := context.WithTimeout(c.ctx, within)
	_, err := healthpb.NewHealthClient(conn).Check(ctx, &healthpb.HealthCheckRequest{})
	silent := ctx.Err() != nil && c.ctx.Err() == nil
	cancel()
	if err == nil || !silent {
		return // an error that comes at once reaches the calls too
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
