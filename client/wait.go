package client

import (
	"time"

	pb "github.com/distlock/distlock/proto/distlock/v1"
)

// wait is an acquisition with a lease of its own that has not been answered:
// the client renews the lease by the request, so that its place in the queue
// does not hang on one connection. Its fields are guarded by the client's
// mutex.
type wait struct {
	request  uint64
	ttl      time.Duration
	next     time.Duration // when to renew
	sent     time.Duration // when the last renewal was
	inFlight bool
	again    chan struct{} // buffered, one: the attempt under way waits in vain
	client   *Client
}

// renewWait begins to renew an acquisition's wait.
func (c *Client) renewWait(a *acquisition) *wait {
	w := &wait{ttl: a.o.ttl, next: a.began + a.o.ttl/3, again: make(chan struct{}, 1), client: c, request: a.req.GetRequestId()}
	c.mu.Lock()
	c.waits[w.request] = w
	if w.next < c.wakeAt {
		c.poke()
	}
	c.mu.Unlock()
	return w
}

// of tells which request the next attempt is of; it has another id once the
// first has ended.
func (w *wait) of(r *pb.AcquireRequest) {
	w.client.mu.Lock()
	defer w.client.mu.Unlock()
	if w.request != r.GetRequestId() {
		delete(w.client.waits, w.request)
		w.request = r.GetRequestId()
		w.client.waits[w.request] = w
	}
	select { // of an attempt that is over
	case <-w.again:
	default:
	}
}

func (c *Client) endWait(w *wait) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.waits[w.request] == w {
		delete(c.waits, w.request)
	}
}

// renewedWait takes the answer to a renewal in; nil when there was none. The
// caller must hold c.mu.
func (c *Client) renewedWait(w *wait, request uint64, r *pb.KeepAliveResponse_Request) {
	now := c.now()
	w.inFlight = false
	if w.request != request || c.waits[request] != w {
		return
	}
	if r == nil {
		w.next = now + min(w.ttl/20, 500*time.Millisecond)
		return
	}
	w.next = w.sent + w.ttl/3
	if r.GetProblem() == nil && r.GetWaiting() && r.GetAttached() {
		return
	}
	// Granted, ended, not arrived, or waiting where no call is: the answer to
	// another attempt says.
	select {
	case w.again <- struct{}{}:
	default:
	}
}
