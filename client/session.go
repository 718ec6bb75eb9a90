package client

import (
	"cmp"
	"context"
	"errors"
	"slices"
	"time"

	pb "github.com/distlock/distlock/proto/distlock/v1"
)

// session is a lease that this client keeps alive. Its fields are guarded by
// the client's mutex.
type session struct {
	id       uint64
	ttl      time.Duration
	own      bool   // of one acquisition, and released with it
	left     bool   // somebody else renews it, or nobody does
	followed bool   // somebody else does: the server is asked how long it lives
	request  uint64 // of the acquisition, if it is its own
	ctx      context.Context
	cancel   context.CancelCauseFunc
	locks    []*Lock
	onRenew  func(time.Time)

	sent     time.Duration // when the last acknowledged renewal was sent
	tried    time.Duration // when the last renewal was sent
	next     time.Duration // when to renew
	inFlight bool
	warned   bool
	over     bool // given back or lost: renewed no more
	gone     bool // the server has said that the lease is
	lastErr  error

	unsettled int     // items of the client's list
	stopped   bool    // renewed no more, though believed: what is unwanted under it must end
	known     uint64  // losses under it that the server has told of
	last      []*Lock // what it had when the client was closed
}

// margin covers clocks whose rates differ by 1 %, and the time it takes to act.
func margin(ttl time.Duration) time.Duration { return ttl/100 + min(10*time.Millisecond, ttl/20) }

// deadline is when to stop believing in the lease, on the client's timeline.
func (s *session) deadline() time.Duration { return s.sent + s.ttl - margin(s.ttl) }

// keep begins to keep a lease alive, with the locks that were granted with it. If
// they had to wait, the renewals of that wait end.
func (c *Client) keep(parent context.Context, s *session, sent time.Duration, waited *wait) error {
	s.sent, s.tried, s.next = sent, sent, sent+s.ttl/3
	s.ctx, s.cancel = context.WithCancelCause(context.WithoutCancel(parent))
	for _, l := range s.locks {
		l.ctx, l.cancel = s.ctx, s.cancel
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.closed {
		return ErrClosed
	}
	if s.left {
		c.lefts[s] = struct{}{}
	} else {
		c.sessions[s.id] = s
		c.shortest = min(c.shortest, s.ttl)
	}
	if s.next < c.wakeAt { // else it is seen in time anyway
		c.poke()
	}
	if waited != nil {
		c.endWait(waited)
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
	if s.left {
		delete(c.lefts, s)
	} else {
		delete(c.sessions, s.id)
	}
	for _, l := range s.locks {
		l.end(l.lostAs(cause))
	}
	s.locks = nil
	s.cancel(cause)
}

// longestSleep bounds how long the renewer sleeps: timers do not count the time in
// which a machine is suspended, so it must look often.
const longestSleep = time.Second

// renew keeps all sessions alive, and waits: whatever is due leaves in one
// message. It is the client's one goroutine, and ends with Close.
func (c *Client) renew() {
	defer c.group.Done()
	timer := c.clock.NewTimer(time.Hour)
	defer timer.Stop()
	for {
		due, follow, sleep := c.due()
		c.group.Add(len(due) + len(follow)) // this goroutine is in the group
		for _, r := range due {
			go func() {
				defer c.group.Done()
				c.keepAlive(r)
			}()
		}
		for _, s := range follow {
			go func() {
				defer c.group.Done()
				c.follow(s)
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

// renewal is a message of leases and waits to renew, all marked in flight.
type renewal struct {
	sessions []*session
	waits    []*wait
	requests []uint64 // of waits, as they are now
	patience time.Duration
}

// due ends what is past its deadline and warns of what is in danger. It returns
// what to renew now, which locks to ask about, and how long to sleep after that.
func (c *Client) due() (due []*renewal, follow []*session, sleep time.Duration) {
	var warnings []Warning
	var sessions []*session
	var waits []*wait
	c.mu.Lock()
	now := c.now()
	wakeAt := now + time.Hour
	for s := range c.lefts {
		wakeAt = min(wakeAt, now+longestSleep, s.deadline())
		switch {
		case now >= s.deadline():
			c.end(s, &LostError{Cause: CauseUnreachable, LeaseID: s.id})
		case !s.followed, s.inFlight:
		case now >= s.next:
			s.inFlight = true
			follow = append(follow, s)
		default:
			wakeAt = min(wakeAt, s.next)
		}
	}
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
		case s.inFlight, s.stopped && s.unsettled > 0:
		case now >= s.next-s.ttl/24: // what is nearly due comes along
			s.inFlight = true
			sessions = append(sessions, s)
		default:
			wakeAt = min(wakeAt, s.next)
		}
	}
	for w := c.waits.after; w != &c.waits; w = w.after {
		switch {
		case w.inFlight:
		case now >= w.next-w.ttl/24:
			w.inFlight, w.sent = true, now
			waits = append(waits, w)
		default:
			wakeAt = min(wakeAt, w.next)
		}
	}
	due = c.renewals(now, sessions, waits)
	c.wakeAt = wakeAt
	c.mu.Unlock()
	for _, w := range warnings {
		c.warn(w)
	}
	return due, follow, max(wakeAt-now, time.Millisecond)
}

// renewals makes messages of what is due. The TTLs (or the paces of waits) in one
// message are about the same: its answer is awaited no longer than the shortest of
// them allows. Leases of whose TTL half has gone get a message of their own: the
// server answers that only once it is in its log. The caller must hold c.mu.
func (c *Client) renewals(now time.Duration, sessions []*session, waits []*wait) (list []*renewal) {
	var r *renewal
	var shortest time.Duration
	var tardy bool
	room := func(ttl time.Duration, late bool) *renewal {
		if r == nil || ttl > 2*shortest || late != tardy || len(r.sessions)+len(r.waits) == maxKeepAlive {
			shortest, tardy = ttl, late
			r = &renewal{patience: min(maxAttempt, max(ttl/3, 20*time.Millisecond))}
			list = append(list, r)
		}
		return r
	}
	slices.SortFunc(sessions, func(a, b *session) int {
		return cmp.Or(latter(a.late(now), b.late(now)), cmp.Compare(a.ttl, b.ttl), cmp.Compare(a.id, b.id))
	})
	for _, s := range sessions {
		r := room(s.ttl, s.late(now))
		r.sessions = append(r.sessions, s)
	}
	r = nil
	slices.SortFunc(waits, func(a, b *wait) int {
		return cmp.Or(latter(a.late(now), b.late(now)), cmp.Compare(a.pace(), b.pace()), cmp.Compare(a.request, b.request))
	})
	for _, w := range waits {
		r := room(w.pace(), w.late(now))
		r.waits, r.requests = append(r.waits, w), append(r.requests, w.request)
	}
	return list
}

// late reports whether half of the TTL has gone.
func (s *session) late(now time.Duration) bool { return now >= s.sent+s.ttl/2 }
func (w *wait) late(now time.Duration) bool    { return now >= w.since+w.ttl/2 }

// latter is for sorting: false comes before true.
func latter(a, b bool) int {
	switch {
	case a == b:
		return 0
	case a:
		return 1
	}
	return -1
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

// keepAlive makes one attempt of a renewal.
func (c *Client) keepAlive(r *renewal) {
	req := &pb.KeepAliveRequest{RequestIds: r.requests}
	c.mu.Lock()
	for _, s := range r.sessions {
		req.LeaseIds = append(req.LeaseIds, s.id)
		s.tried = c.now()
	}
	c.mu.Unlock()
	sent, resp, err := c.keepAliveOnce(c.ctx, req, patience{within: r.patience})
	c.renewed(r, sent, resp, err)
	c.poke()
}

// keepAliveOnce makes one attempt.
func (c *Client) keepAliveOnce(ctx context.Context, req *pb.KeepAliveRequest, until patience) (sent time.Duration, resp *pb.KeepAliveResponse, err error) {
	c.mu.Lock()
	at := c.current
	conn, err := c.connLocked(at)
	c.mu.Unlock()
	if err != nil {
		return 0, nil, err
	}
	c.waiting.Add(1)
	defer c.waiting.Add(-1)
	sent = c.now()
	answer, err := c.ask(ctx, conn, &pb.Operation{Call: &pb.Operation_KeepAlive{KeepAlive: req}}, until)
	if err != nil {
		if errors.Is(err, ErrClosed) {
			return 0, nil, err
		}
		e := toError(err)
		c.next(at, e.Leader)
		return 0, nil, e
	}
	resp = answer.GetKeepAlive()
	c.hear(resp.GetClusterId())
	if len(resp.GetResults()) != len(req.GetLeaseIds()) {
		return 0, nil, errors.New("the server answered another number of renewals")
	}
	return sent, resp, nil
}

func (c *Client) renewed(r *renewal, sent time.Duration, resp *pb.KeepAliveResponse, err error) {
	type news struct {
		fn       func(time.Time)
		deadline time.Time
	}
	var tell []news
	var doubted []*session
	c.mu.Lock()
	now := c.now()
	for i, s := range r.sessions {
		s.inFlight = false
		switch {
		case s.over:
		case err != nil:
			s.lastErr = err
			s.next = now + min(s.ttl/20, 500*time.Millisecond)
		case resp.Results[i].GetProblem() != nil:
			p := resp.Results[i].GetProblem()
			cause := causes[p.GetCause()]
			if cause == "" {
				cause = CauseExpired // long ago: the server no longer remembers
			}
			s.gone = true
			c.end(s, &LostError{Cause: cause, By: p.GetBy(), LeaseID: s.id})
		default:
			s.sent, s.next = sent, sent+s.ttl/3
			s.warned, s.lastErr = false, nil
			s.stopped = s.unsettled > 0 && c.unsettledSince(s) < sent-s.ttl
			if c.lost(s, resp.Results[i]) {
				doubted = append(doubted, s)
			}
			if s.onRenew != nil {
				tell = append(tell, news{s.onRenew, c.at(s.deadline())})
			}
		}
	}
	for i, w := range r.waits {
		var result *pb.KeepAliveResponse_Request
		if err == nil && i < len(resp.GetRequests()) {
			result = resp.Requests[i]
		}
		c.renewedWait(w, r.requests[i], result)
	}
	c.mu.Unlock()
	for _, n := range tell {
		n.fn(n.deadline)
	}
	for _, s := range doubted {
		c.checkHolds(s)
	}
}

// unsettledSince is since when the oldest item of a session is on the list. The
// caller must hold c.mu.
func (c *Client) unsettledSince(s *session) time.Duration {
	for _, u := range c.unsettled {
		if u.session == s {
			return u.since
		}
	}
	return c.now()
}

// lost ends the locks that, by the answer to a renewal, were lost while their lease
// lives on. It reports whether more were lost than the answer names. The caller must
// hold c.mu.
func (c *Client) lost(s *session, r *pb.KeepAliveResponse_Result) bool {
	for _, l := range r.GetLost() {
		if l.GetToken() != 0 {
			c.lose(s, l)
		}
	}
	fresh := r.GetLostCount() - min(s.known, r.GetLostCount())
	s.known = max(s.known, r.GetLostCount())
	return fresh > uint64(len(r.GetLost()))
}

// follow asks about a lock whose lease somebody else keeps alive: how much longer
// the lease lives, and whether the lock is still held.
func (c *Client) follow(s *session) {
	c.mu.Lock()
	locks := slices.Clone(s.locks)
	c.mu.Unlock()
	sent, err := c.follows(c.ctx, s.id, s.ttl)
	live := true
	for _, l := range locks {
		var check TokenCheck
		if err == nil {
			check, err = c.CheckToken(c.ctx, l.names[0], l.token)
			live = err != nil || check.Live
		}
	}
	c.mu.Lock()
	defer c.poke()
	defer c.mu.Unlock()
	s.inFlight = false
	var e *Error
	switch {
	case errors.As(err, &e) && errors.Is(err, ErrLeaseGone):
		cause := cmp.Or(e.Cause, CauseExpired)
		c.end(s, &LostError{Cause: cause, By: e.By, LeaseID: s.id})
	case !live:
		c.end(s, &LostError{Cause: CauseForceReleased, LeaseID: s.id})
	case err != nil:
		s.next = c.now() + min(s.ttl/20, 500*time.Millisecond)
	default:
		s.sent = max(s.sent, sent)
		now := c.now()
		s.next = now + min(s.ttl/3, max((s.deadline()-now)/2, s.ttl/20))
	}
}

// checkHolds asks for each lock under a lease whether it is still held. It is for
// when more were lost at once than the server names.
func (c *Client) checkHolds(s *session) {
	c.mu.Lock()
	locks := slices.Clone(s.locks)
	c.mu.Unlock()
	for _, l := range locks {
		check, err := c.CheckToken(c.ctx, l.names[0], l.token)
		if err != nil {
			c.mu.Lock()
			s.known = 0 // the next renewal tells of them again
			c.mu.Unlock()
			return
		}
		if check.Live {
			continue
		}
		c.mu.Lock()
		c.lose(s, &pb.Loss{Token: uint64(l.token), Cause: pb.EndCause_END_CAUSE_FORCE_RELEASED})
		c.mu.Unlock()
	}
}
