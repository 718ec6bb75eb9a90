package lease

import (
	"errors"
	"time"

	"github.com/distlock/distlock/lease/machine"
)

// confirmations is the part of the loop that makes certain that this node
// leads, before it answers a renewal or a read.
type confirmations struct {
	number     uint64 // of the round
	confirming bool
	unasked    []*confirmation // arrived since the round in flight began
	asked      []*confirmation
}

// confirmation is a renewal or read that waits until it is certain that this
// node still leads.
type confirmation struct {
	asker
	reply Reply
	first func(l *loop) bool      // of a renewal: reports that it must wait for the log, which answers it; nil for none
	then  func(l *loop, r *Reply) // fills the reply, on the loop
}

func (c *confirmation) take(l *loop) {
	if err := l.refuses(); err != nil {
		c.answer(l, err)
		return
	}
	l.rounds.unasked = append(l.rounds.unasked, c)
}

func (c *confirmation) answer(l *loop, err error) {
	if err == nil {
		c.then(l, &c.reply)
	} else {
		c.reply.Err = err
	}
	c.hear(l, c.reply)
}

// confirm begins a round of confirmation for everything that has arrived.
func (l *loop) confirm() {
	q := &l.rounds
	if q.confirming || len(q.unasked) == 0 {
		return
	}
	q.number++
	q.confirming = true
	q.asked, q.unasked = q.unasked, nil
	round := q.number
	l.log.Confirm(l.term, func(err error) { l.inbox.put(&confirmed{round, err}) })
}

// confirmed is the answer of the log to a round of confirmation.
type confirmed struct {
	round uint64
	err   error
}

func (c *confirmed) take(l *loop) {
	q := &l.rounds
	// Nobody waits for a round that a change of leadership has cut short, and it
	// must not vouch for those who arrived after it began.
	if !q.confirming || c.round != q.number || l.failed != nil {
		return
	}
	q.confirming = false
	err := c.err
	if errors.Is(err, ErrNotLeader) {
		err = &NotLeaderError{Hint: l.hint}
	}
	asked := q.asked
	q.asked = nil
	for _, q := range asked {
		if err != nil || q.first == nil || !q.first(l) {
			q.answer(l, err)
		}
	}
}

// renew answers the renewal of one lease that was received at a time.
func (l *loop) renew(id ID, received time.Duration) KeepAlive {
	t := l.leases[id]
	if t == nil {
		var gone *Refusal
		l.store.Read(func(s *machine.Machine) {
			if _, live := s.TTL(id); !live {
				gone = s.LeaseGone(id)
			}
		})
		if gone == nil { // its grant is applied, and its event on its way here
			return KeepAlive{Lease: id, Err: ErrOutcomeUnknown}
		}
		return KeepAlive{Lease: id, Err: gone}
	}
	if !l.renewFor(t, received) {
		return KeepAlive{Lease: id, Err: &Refusal{Reason: machine.ReasonLeaseEnded, Lease: id, Ended: &machine.Ended{Cause: machine.EndExpired, At: l.clock.Now().UnixNano()}}}
	}
	k := KeepAlive{Lease: id, TTL: t.span}
	if _, lossy := l.lossy[id]; lossy {
		l.store.Read(func(s *machine.Machine) { k.Lost, k.LostCount = s.Losses(id) })
	}
	return k
}

// renewWaiting answers the renewal of the lease made with an acquisition.
func (l *loop) renewWaiting(request RequestID, received time.Duration) KeepWaiting {
	k := KeepWaiting{Request: request}
	var found machine.Result
	var known bool
	l.store.Read(func(s *machine.Machine) {
		if found, known = s.Find(0, request); !known {
			k.Err = s.RequestGone(request)
		}
	})
	if !known {
		return k
	}
	kept := l.renew(found.Lease, received)
	if kept.Err != nil {
		k.Err = kept.Err
		return k
	}
	k.Lease, k.TTL, k.Waiting = kept.Lease, kept.TTL, found.Waiting
	k.Attached = l.waiting.parked[waiter{request: request}] != nil
	return k
}

// timeLeft is how long a lease lives unless it is renewed.
func (l *loop) timeLeft(id ID) time.Duration {
	t := l.leases[id]
	switch {
	case t == nil || t.expiring:
		return 0
	case t.deadline == never: // kept alive by its parked call
		return t.span
	}
	return max(t.deadline-l.now(), 0)
}
