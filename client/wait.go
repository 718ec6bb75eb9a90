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
	since    time.Duration // when the last one that was answered was
	inFlight bool
	slack    uint8         // how often the time that an answer may take has been doubled
	asked    time.Duration // when the attempt under way was made
	repeats  uint8         // attempts made because the last one waited in vain
	again    chan struct{} // buffered, one: the attempt under way waits in vain
	client   *Client

	before, after *wait // in the client's list of them; nil when it is over
}

// renewWait begins to renew an acquisition's wait. The caller must hold c.mu.
func (c *Client) renewWait(a *acquisition) *wait {
	w, ok := c.waited.Get().(*wait)
	if !ok {
		w = &wait{client: c, again: make(chan struct{}, 1)}
	}
	w.ttl, w.next, w.sent, w.since, w.request = a.o.ttl, a.began+a.o.ttl/3, 0, a.began, a.req.GetRequestId()
	w.slack, w.asked, w.repeats = 0, a.began, 0
	w.before, w.after = &c.waits, c.waits.after
	w.before.after, w.after.before = w, w
	if w.next < c.wakeAt {
		c.poke()
	}
	return w
}

// of sets which request the next attempt belongs to: it gets another id once the
// first has ended.
func (w *wait) of(r *pb.AcquireRequest) {
	w.client.mu.Lock()
	defer w.client.mu.Unlock()
	w.request, w.asked = r.GetRequestId(), w.client.now()
	w.drain()
}

// endWait renews a wait no more. The caller must hold c.mu.
func (c *Client) endWait(w *wait) {
	w.before.after, w.after.before = w.after, w.before
	w.before, w.after = nil, nil
	if !w.inFlight { // nobody else has it: most are never renewed
		w.drain()
		c.waited.Put(w)
	}
}

// drain takes out a word that was meant for an attempt which is over.
func (w *wait) drain() {
	select {
	case <-w.again:
	default:
	}
}

// renewedWait takes the answer to a renewal in; nil when there was none. The
// caller must hold c.mu.
func (c *Client) renewedWait(w *wait, request uint64, r *pb.KeepAliveResponse_Request) {
	now := c.now()
	w.inFlight = false
	if w.request != request || w.after == nil {
		return
	}
	if r == nil {
		// A server that is far away needs longer. It has renewed all the same,
		// and would for ever keep a grant that this client never hears of.
		if w.next = now + min(w.ttl/20, 500*time.Millisecond); w.pace() < 3*maxAttempt {
			w.slack++
		}
		return
	}
	w.next, w.since = w.sent+w.ttl/3, w.sent
	if now-w.sent < w.ttl/3 {
		w.slack = 0
	}
	if r.GetProblem() == nil && r.GetWaiting() && r.GetAttached() {
		w.repeats = 0
		return
	}
	// The request was granted, has ended, has not arrived, or waits without a call:
	// another attempt tells, unless the answer to this one is on its way. That gets
	// twice as long each time, or it would never arrive where the way there and back
	// takes longer than a renewal.
	if w.sent < w.asked || now < w.asked+min(20*time.Millisecond, w.ttl/8)<<w.repeats {
		return
	}
	if w.repeats < 8 { // 5 s
		w.repeats++
	}
	select {
	case w.again <- struct{}{}:
	default:
	}
}

// pace stands for the TTL of a wait: an answer to a renewal may take a third of it.
func (w *wait) pace() time.Duration { return w.ttl << w.slack }
