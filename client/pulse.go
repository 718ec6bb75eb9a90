package client

import (
	"context"
	"errors"
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

// pulse leaves a server that has stopped without closing its connections, or whose
// packets are swallowed on the way: a wait for a lock has no bound of its own that
// would show it. The connection is closed and made anew, to the next endpoint if
// there is one. That costs a waiter nothing: its place is kept. It ends with Close.
func (c *Client) pulse() {
	defer c.group.Done()
	timer := time.NewTimer(pulseEvery) // pace of the network, not of a lease
	defer timer.Stop()
	var far distance
	for {
		select {
		case <-timer.C:
		case <-c.ctx.Done():
			return
		}
		within := max(c.pulseWithin(), far.within)
		if c.waiting.Load() > 0 {
			began := time.Now()
			silent, err := c.checkServer(within)
			if silent || err == nil {
				far.learn(silent, time.Since(began), c.endpointCount())
			}
		}
		timer.Reset(min(pulseEvery, within/2))
	}
}

// distance is how far away servers are, in time. A server that answers late must not
// be taken for one that does not answer: each of its connections would be closed
// before anything could come of it.
type distance struct {
	within   time.Duration // that an answer may take at least
	silences int           // in a row
}

// learn takes in what a pulse has shown. Once every endpoint has been silent
// each is given twice the time.
func (d *distance) learn(silent bool, took time.Duration, endpoints int) {
	if !silent {
		d.silences = 0
	} else if d.silences++; d.silences%endpoints != 0 {
		return
	}
	d.within = min(2*took, farthest)
}

// farthest bounds how long a server is waited for.
const farthest = 10 * time.Second

func (c *Client) endpointCount() int {
	c.mu.Lock()
	defer c.mu.Unlock()
	return len(c.endpoints)
}

var errNotConnected = errors.New("not connected")

// pulseWithin leaves time to renew the shortest lease over another connection. It
// has a lower bound, so that a busy server is not taken for a silent one.
func (c *Client) pulseWithin() time.Duration {
	c.mu.Lock()
	defer c.mu.Unlock()
	return max(min(pulseWithin, c.shortest/4), pulseWithin/4)
}

// checkServer asks the server in use for a sign of life, and leaves one that gives
// none.
func (c *Client) checkServer(within time.Duration) (silent bool, err error) {
	c.mu.Lock()
	at, conn := c.current, c.conns[c.current]
	endpoint := c.endpoints[at]
	c.mu.Unlock()
	if conn == nil {
		return false, errNotConnected
	}
	ctx, cancel := context.WithTimeout(c.ctx, within)
	_, err = healthpb.NewHealthClient(conn).Check(ctx, &healthpb.HealthCheckRequest{})
	silent = err != nil && ctx.Err() != nil && c.ctx.Err() == nil
	cancel()
	if !silent {
		return false, err // one that comes at once reaches the calls too
	}
	c.logger.Debug("no sign of life", zap.String("endpoint", endpoint), zap.Error(err))
	c.mu.Lock()
	if c.conns[at] == conn {
		c.conns[at] = nil
	}
	c.mu.Unlock()
	c.next(at, "")
	conn.Close()
	return true, err
}
