package client

import (
	"testing"
	"time"

	pb "github.com/distlock/distlock/proto/distlock/v1"
)

// waiting returns a client whose time a test sets, and a wait of it.
func waiting(ttl time.Duration) (c *Client, w *wait, now *time.Duration) {
	now = new(time.Duration)
	*now = time.Minute
	c = &Client{now: func() time.Duration { return *now }, wake: make(chan struct{}, 1)}
	c.waits.before, c.waits.after = &c.waits, &c.waits
	w = c.renewWait(&acquisition{began: *now, o: &acquireOptions{ttl: ttl}, req: &pb.AcquireRequest{RequestId: 7}})
	return c, w, now
}

// What the server does not tell in time it has done all the same: a client so
// far away that it never heard an answer would keep a grant alive for ever that
// it does not know of.
func TestAnAnswerFromFarAwayIsWaitedForLonger(t *testing.T) {
	const ttl = 900 * time.Millisecond
	c, w, now := waiting(ttl)
	patience := func() time.Duration { return c.renewals(*now, nil, []*wait{w})[0].patience }
	if got := patience(); got != ttl/3 {
		t.Errorf("at first %v", got)
	}
	for range 2 {
		c.renewedWait(w, 7, nil)
	}
	if got := patience(); got != 4*ttl/3 {
		t.Errorf("after two that were not answered in time %v", got)
	}
	for range 20 {
		c.renewedWait(w, 7, nil)
	}
	if got := patience(); got != maxAttempt {
		t.Errorf("at most %v", got)
	}
	w.sent = *now
	*now += time.Second
	c.renewedWait(w, 7, &pb.KeepAliveResponse_Request{})
	if got := patience(); got != maxAttempt {
		t.Errorf("after a late answer %v", got)
	}
	w.sent = *now
	*now += ttl / 10
	c.renewedWait(w, 7, &pb.KeepAliveResponse_Request{})
	if got := patience(); got != ttl/3 {
		t.Errorf("after one in time %v", got)
	}
}

// An attempt that is given up whenever a renewal tells that the server waits
// for another would never be answered where that takes longer than a renewal.
func TestAnAttemptHasTimeForItsAnswer(t *testing.T) {
	const ttl = 900 * time.Millisecond
	c, w, now := waiting(ttl)
	const there = 700 * time.Millisecond // and back
	attempts := 0
	attempt := func() {
		w.of(&pb.AcquireRequest{RequestId: 7})
		attempts++
	}
	attempt()
	for granted := w.asked + there; *now < granted; {
		w.sent = *now
		*now += there / 5 // a renewal is answered earlier: nothing is written for it
		c.renewedWait(w, 7, &pb.KeepAliveResponse_Request{})
		select {
		case <-w.again:
			attempt()
			granted = w.asked + there
		default:
		}
		if attempts > 10 {
			t.Fatalf("%d attempts", attempts)
		}
	}
	// Of what was seen before the attempt was made nothing follows for it.
	*now += time.Minute
	sent := *now
	*now += there
	attempt()
	w.sent = sent
	*now += time.Minute
	c.renewedWait(w, 7, &pb.KeepAliveResponse_Request{})
	select {
	case <-w.again:
		t.Error("asked again because of a renewal that is older than the attempt")
	default:
	}
}
