package client

import (
	"context"
	"errors"
	"slices"
	"sync"
	"time"

	"google.golang.org/grpc/codes"

	pb "github.com/distlock/distlock/proto/distlock/v1"
)

// unsettled is what the server must still be told: to give up a request that is
// unwanted, or a release that was not answered. The client counts on none of it. It
// is sent again, over whatever connection there is, until it is answered or cannot
// matter any more.
type unsettled struct {
	op      *pb.Operation
	own     uint64   // request id of an acquisition with a lease of its own, by which to abandon it
	session *session // whose lease it is under; nil for another lease
	since   time.Duration
	until   time.Duration // when its lease has ended for certain, if session is nil; 0 for never
}

// unsettle lists what has to be settled, and begins to.
func (c *Client) unsettle(u *unsettled) {
	c.mu.Lock()
	defer c.mu.Unlock()
	u.since = c.now()
	if u.session != nil {
		if u.session.gone {
			return
		}
		u.session.unsettled++
	}
	c.unsettled = append(c.unsettled, u)
	if !c.settling && !c.closed {
		c.settling = true
		c.group.Add(1)
		go c.settle()
	}
}

// settled takes items off the list.
func (c *Client) settled(list []*unsettled) {
	if len(list) == 0 {
		return
	}
	gone := make(map[*unsettled]bool, len(list))
	for _, u := range list {
		gone[u] = true
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	c.unsettled = slices.DeleteFunc(c.unsettled, func(u *unsettled) bool {
		if gone[u] && u.session != nil {
			u.session.unsettled--
		}
		return gone[u]
	})
}

// matters reports whether an item may still make a difference at the server.
// The caller must hold c.mu.
func (c *Client) matters(u *unsettled) bool {
	s := u.session
	switch {
	case s != nil && s.gone:
		return false
	case s != nil:
		return c.now() <= s.tried+s.ttl+s.ttl/100 || !s.over && !s.stopped
	}
	return u.until == 0 || c.now() <= u.until
}

// settle sends what is unsettled until nothing is. It is one goroutine at most,
// and ends with the client.
func (c *Client) settle() {
	defer c.group.Done()
	pause := 10 * time.Millisecond
	for {
		c.mu.Lock()
		var list, over []*unsettled
		for _, u := range c.unsettled {
			if c.matters(u) {
				list = append(list, u)
			} else {
				over = append(over, u)
			}
		}
		if len(list) == 0 || c.closed {
			c.settling = false
		}
		going := c.settling
		c.mu.Unlock()
		c.settled(over)
		if !going {
			return
		}
		answered := c.tell(list)
		c.settled(answered)
		if len(answered) == len(list) {
			pause = 10 * time.Millisecond
			continue
		}
		select {
		case <-time.After(pause): // pace of the network, not of a lease
		case <-c.accepting.Done():
			c.mu.Lock()
			c.settling = false
			c.mu.Unlock()
			return
		}
		pause = min(2*pause, 500*time.Millisecond)
	}
}

// tellers bounds how many operations may be on their way at once.
const tellers = 64

// tell makes one attempt of each, and returns those that are answered.
func (c *Client) tell(list []*unsettled) []*unsettled {
	var group sync.WaitGroup
	done := make([]bool, len(list))
	next := make(chan int)
	for range min(tellers, len(list)) {
		group.Go(func() {
			for i := range next {
				done[i] = c.tellOne(list[i].op)
			}
		})
	}
	for i := range list {
		next <- i
	}
	close(next)
	group.Wait()
	var answered []*unsettled
	for i, u := range list {
		if done[i] {
			answered = append(answered, u)
		}
	}
	return answered
}

func (c *Client) tellOne(op *pb.Operation) bool {
	c.mu.Lock()
	at := c.current
	conn, err := c.connLocked(at)
	c.mu.Unlock()
	if err != nil {
		return false
	}
	c.waiting.Add(1)
	defer c.waiting.Add(-1)
	_, err = c.ask(c.ctx, conn, again(op), patience{within: c.attemptTimeout()})
	if err == nil {
		return true
	}
	e := toError(err)
	if definite(e) {
		return true
	}
	c.next(at, e.Leader)
	return false
}

// again is an operation to be sent once more: what was sent may still be on its
// way.
func again(op *pb.Operation) *pb.Operation { return &pb.Operation{Call: op.Call} }

// definite reports whether an error is the server's answer to what was asked,
// and stays so.
func definite(e *Error) bool {
	switch e.Reason {
	case "", "OUTCOME_UNKNOWN", "NOT_LEADER", "STOPPING", "LOG_FAILED", "SUPERSEDED", "CANCELED", "DEADLINE_EXCEEDED", "INTERNAL", "RESOURCE_EXHAUSTED":
		return false
	}
	return true
}

// unwanted gives up a request: nothing that it was or will be granted is to be held.
func (c *Client) unwanted(a *acquisition) {
	r := a.req
	if r.GetRequestId() == 0 || !a.known {
		return
	}
	u := &unsettled{op: abandonOperation(&pb.AbandonRequest{RequestId: r.GetRequestId(), LeaseId: r.GetLeaseId()})}
	switch {
	case a.lease != nil:
		u.session = a.lease.session
	case r.GetLeaseId() == 0:
		u.own, u.until = r.GetRequestId(), a.alive()+a.o.ttl+a.o.ttl/100
	}
	c.unsettle(u)
}

// endAll gives everything back that the client had when it was closed: sessions
// are those that it kept alive. It makes what attempts time allows.
func (c *Client) endAll(ctx context.Context, sessions []*session) {
	c.mu.Lock()
	list := c.unsettled
	c.unsettled = nil
	c.mu.Unlock()
	var own []uint64
	var tasks []func()
	for _, s := range sessions {
		if s.own {
			own = append(own, s.request)
		} else {
			tasks = append(tasks, func() { c.endSession(ctx, s) })
		}
	}
	for _, u := range list {
		switch {
		case u.own != 0:
			own = append(own, u.own)
		case u.session == nil || u.session.over && !slices.Contains(sessions, u.session):
			tasks = append(tasks, func() { c.operate(ctx, again(u.op)) })
		}
	}
	for chunk := range slices.Chunk(own, maxAbandon) {
		tasks = append(tasks, func() { c.abandonMany(ctx, chunk) })
	}
	var group sync.WaitGroup
	slots := make(chan struct{}, tellers)
	for _, task := range tasks {
		slots <- struct{}{}
		group.Go(func() {
			task()
			<-slots
		})
	}
	group.Wait()
}

// maxAbandon bounds the requests in one AbandonRequest.
const maxAbandon = 4096

// endSession ends a lease and all under it without lock-delay.
func (c *Client) endSession(ctx context.Context, s *session) {
	_, err := c.operate(ctx, abandonOperation(&pb.AbandonRequest{LeaseId: s.id, EndLease: true}))
	if !errors.Is(err, ErrInvalid) {
		return
	}
	// A server of before: it refuses an Abandon without a request.
	var group sync.WaitGroup
	for _, l := range s.last {
		group.Go(func() {
			c.operate(ctx, releaseOperation(&pb.ReleaseRequest{LeaseId: s.id, Name: l.names[0], Token: uint64(l.token)}))
		})
	}
	group.Wait()
	c.Admin().Revoke(ctx, s.id, c.owner)
}

// abandonMany ends acquisitions with leases of their own.
func (c *Client) abandonMany(ctx context.Context, ids []uint64) {
	_, err := c.operate(ctx, abandonOperation(&pb.AbandonRequest{RequestIds: ids}))
	if !errors.Is(err, ErrInvalid) {
		return
	}
	var group sync.WaitGroup // of a server of before
	slots := make(chan struct{}, tellers)
	for _, id := range ids {
		slots <- struct{}{}
		group.Go(func() {
			c.operate(ctx, abandonOperation(&pb.AbandonRequest{RequestId: id}))
			<-slots
		})
	}
	group.Wait()
}

// isTransport reports whether an error came from the way to the server, not from the
// server: a proxy or the loss of a connection ended the attempt.
func isTransport(e *Error) bool {
	if e.Reason != "" {
		return false
	}
	switch e.Code {
	case codes.Canceled, codes.Internal, codes.Unknown, codes.Unavailable:
		return true
	}
	return false
}
