package client

import (
	"context"
	"errors"
	"slices"
	"time"

	"google.golang.org/grpc"

	"github.com/distlock/distlock/fence"
	pb "github.com/distlock/distlock/proto/distlock/v1"
)

// session is a lease that this client keeps alive. Its fields are guarded by
// the client's mutex.
type session struct {
	id      uint64
	ttl     time.Duration
	own     bool // of one acquisition, and released with it
	ctx     context.Context
	cancel  context.CancelCauseFunc
	locks   []*Lock
	onRenew func(time.Time)

	sent     time.Duration // when the last acknowledged renewal was sent
	next     time.Duration // when to renew
	inFlight bool
	warned   bool
	over     bool // given back or lost: renewed no more
	lastErr  error
}

// margin covers clocks whose rates differ by 1 %, and the time it takes to act.
func margin(ttl time.Duration) time.Duration { return ttl/100 + min(10*time.Millisecond, ttl/20) }

// deadline is when to stop believing in the lease, on the client's timeline.
func (s *session) deadline() time.Duration { return s.sent + s.ttl - margin(s.ttl) }

// keep begins to keep a lease alive, and locks that were granted with it.
func (c *Client) keep(parent context.Context, s *session, sent time.Duration) error {
	s.sent, s.next = sent, sent+s.ttl/3
	s.ctx, s.cancel = context.WithCancelCause(context.WithoutCancel(parent))
	for _, l := range s.locks {
		l.ctx, l.cancel = s.ctx, s.cancel
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.closed {
		return ErrClosed
	}
	c.sessions[s.id] = s
	if s.next < c.wakeAt { // else it is seen in time anyway
		c.poke()
	}
	return nil
}

// poke makes the renewer look at its sessions anew.
func (c *Client) poke() {
	select {
	case c.wake <- struct{}{}:
	default:
	}
}

// end stops keeping a lease, and tells whoever holds under it why.
// The caller must hold c.mu.
func (c *Client) end(s *session, cause error) {
	if s.over {
		return
	}
	s.over = true
	delete(c.sessions, s.id)
	for _, l := range s.locks {
		l.end(l.lostAs(cause))
	}
	s.locks = nil
	s.cancel(cause)
}

// longestSleep bounds the renewer's: a machine that slept wakes to timers that
// did not count the sleep.
const longestSleep = time.Second

// renew keeps all sessions alive: whatever is due leaves in one message. It is
// the client's one goroutine, and ends with Close.
func (c *Client) renew() {
	defer c.group.Done()
	timer := c.clock.NewTimer(time.Hour)
	defer timer.Stop()
	for {
		due, sleep := c.due()
		if len(due) > 0 {
			c.group.Add(1)
			go func() {
				defer c.group.Done()
				c.keepAlive(due)
			}()
		}
		timer.Reset(sleep)
		select {
		case <-timer.Chan():
		case <-c.wake:
		case <-c.ctx.Done():
			return
		}
	}
}

// due ends what is past its deadline, warns of what is in danger, and returns
// what to renew now and how long to sleep then.
func (c *Client) due() (due []*session, sleep time.Duration) {
	var warnings []Warning
	c.mu.Lock()
	now := c.now()
	wakeAt := now + time.Hour
	for _, s := range c.sessions {
		wakeAt = min(wakeAt, now+longestSleep)
		if now >= s.deadline() {
			c.end(s, &LostError{Cause: CauseUnreachable, LeaseID: s.id})
			continue
		}
		if half := s.sent + s.ttl/2; now >= half && !s.warned {
			s.warned = true
			if c.warn != nil {
				warnings = append(warnings, Warning{LeaseID: s.id, Names: s.names(), Deadline: c.at(s.deadline()), Err: s.lastErr})
			}
		} else if !s.warned {
			wakeAt = min(wakeAt, half)
		}
		wakeAt = min(wakeAt, s.deadline())
		switch {
		case s.inFlight:
		case now >= s.next-s.ttl/24: // what is nearly due comes along
			s.inFlight = true
			due = append(due, s)
		default:
			wakeAt = min(wakeAt, s.next)
		}
	}
	c.wakeAt = wakeAt
	c.mu.Unlock()
	for _, w := range warnings {
		c.warn(w)
	}
	return due, max(wakeAt-now, time.Millisecond)
}

func (s *session) names() []string {
	var names []string
	for _, l := range s.locks {
		names = append(names, l.names...)
	}
	return names
}

// at turns a time of the client's timeline into one to show.
func (c *Client) at(t time.Duration) time.Time { return c.clock.Now().Add(t - c.now()) }

// maxKeepAlive bounds the leases in one message.
const maxKeepAlive = 10_000

// keepAlive renews sessions, all marked in flight, in as few messages as may be.
func (c *Client) keepAlive(list []*session) {
	for chunk := range slices.Chunk(list, maxKeepAlive) {
		ids := make([]uint64, len(chunk))
		patience := attemptFor
		for i, s := range chunk {
			ids[i] = s.id
			patience = min(patience, max(s.ttl/3, 20*time.Millisecond))
		}
		ctx, cancel := context.WithTimeout(c.ctx, patience)
		sent, results, err := c.keepAliveOnce(ctx, ids)
		cancel()
		c.renewed(chunk, sent, results, err)
		if err == nil {
			c.checkShared(chunk, sent)
		}
	}
	c.poke()
}

// keepAliveOnce makes one attempt.
func (c *Client) keepAliveOnce(ctx context.Context, ids []uint64) (sent time.Duration, results []*pb.KeepAliveResponse_Result, err error) {
	c.mu.Lock()
	at := c.current
	c.mu.Unlock()
	conn, err := c.conn(at)
	if err != nil {
		return 0, nil, err
	}
	sent = c.now()
	resp, err := c.keepAliveOn(ctx, conn, &pb.KeepAliveRequest{LeaseIds: ids})
	if err != nil {
		e := toError(err)
		c.elsewhere(at, e.Leader)
		return 0, nil, e
	}
	if len(resp.GetResults()) != len(ids) {
		return 0, nil, errors.New("the server answered another number of renewals")
	}
	return sent, resp.GetResults(), nil
}

func (c *Client) renewed(list []*session, sent time.Duration, results []*pb.KeepAliveResponse_Result, err error) {
	type news struct {
		fn       func(time.Time)
		deadline time.Time
	}
	var tell []news
	c.mu.Lock()
	now := c.now()
	for i, s := range list {
		s.inFlight = false
		switch {
		case s.over:
		case err != nil:
			s.lastErr = err
			s.next = now + min(s.ttl/20, 500*time.Millisecond)
		case results[i].GetProblem() != nil:
			p := results[i].GetProblem()
			cause := causes[p.GetCause()]
			if cause == "" {
				cause = CauseExpired // long ago: the server no longer remembers
			}
			c.end(s, &LostError{Cause: cause, By: p.GetBy(), LeaseID: s.id})
		default:
			s.sent, s.next = sent, sent+s.ttl/3
			s.warned, s.lastErr = false, nil
			if s.onRenew != nil {
				tell = append(tell, news{s.onRenew, c.at(s.deadline())})
			}
		}
	}
	c.mu.Unlock()
	for _, n := range tell {
		n.fn(n.deadline)
	}
}

// checkShared finds holds that were force-released under leases that live on:
// the renewal of a lease says nothing of the locks under it.
func (c *Client) checkShared(list []*session, sent time.Duration) {
	for _, s := range list {
		c.mu.Lock()
		var locks []*Lock
		for _, l := range s.locks {
			if !s.own && l.since < sent {
				locks = append(locks, l)
			}
		}
		c.mu.Unlock()
		if len(locks) == 0 {
			continue
		}
		info, err := c.LeaseInfo(c.ctx, s.id)
		if err != nil {
			continue // its renewal or its deadline will tell
		}
		held := make(map[fence.Token]bool)
		for _, g := range info.Holds {
			held[g.Token] = true
		}
		for _, l := range locks {
			if held[l.token] {
				continue
			}
			lost := &LostError{Cause: CauseForceReleased, LeaseID: s.id}
			if e := toError(c.releaseCall(c.ctx, s.id, l.names[0], l.token)); e.Cause != "" {
				lost.Cause, lost.By = e.Cause, e.By
			}
			c.mu.Lock()
			l.end(l.lostAs(lost))
			s.locks = slices.DeleteFunc(s.locks, func(x *Lock) bool { return x == l })
			c.mu.Unlock()
		}
	}
}

// giveBack releases everything under a session.
func (c *Client) giveBack(ctx context.Context, s *session) {
	c.mu.Lock()
	locks := slices.Clone(s.locks)
	c.mu.Unlock()
	for _, l := range locks {
		l.Release(ctx)
	}
	c.mu.Lock()
	over := s.over
	c.end(s, ErrReleased)
	c.mu.Unlock()
	if !over && !s.own {
		c.call(ctx, func(ctx context.Context, conn *grpc.ClientConn) error {
			_, err := leasesOf(conn).Revoke(ctx, &pb.RevokeRequest{LeaseId: s.id, By: c.owner})
			return err
		})
	}
}
