package lease

import (
	"time"

	"go.uber.org/zap"

	"github.com/distlock/distlock/lease/machine"
)

// lead takes a change of leadership in. A log may leave out a loss when it is
// followed by a gain: another term is another leadership.
func (l *loop) lead(change Leadership) {
	if !change.Leader {
		if l.leading {
			l.logger.Warn("lost the leadership", zap.Uint64("term", l.term), zap.String("leader", change.Hint))
		}
		l.leading, l.hint = false, change.Hint
		l.abandonServing(&NotLeaderError{Hint: change.Hint})
		l.reset()
		return
	}
	if l.leading {
		if change.Term == l.term {
			l.handOver(change.Leaving)
			return
		}
		l.abandonServing(&NotLeaderError{})
	}
	// What an earlier leader knew of the time is gone, but for the marks: every
	// lease gets its full TTL, every lock-delay its full length, or what was left.
	l.reset()
	l.leading, l.term, l.hint = true, change.Term, ""
	now := l.now()
	l.since = now
	l.wheel.now = uint64(now / tick)
	l.store.Read(func(s *machine.Machine) {
		l.counts, l.readAt = s.Counts(), s.Revision()
		l.leases = make(map[ID]*timer, l.counts.Leases)
		s.EachLease(func(id ID, ttl machine.Duration, lossy bool) bool {
			l.armLease(id, time.Duration(ttl), now)
			if lossy {
				l.lossy[id] = struct{}{}
			}
			return true
		})
		s.EachMark(func(id ID, left machine.Duration) bool {
			if t := l.leases[id]; t != nil {
				t.shorten(time.Duration(left), now)
				l.wheel.arm(t)
			}
			return true
		})
		s.EachDelay(func(name string, d machine.Delay) bool {
			l.armDelay(name, d, now)
			return true
		})
		s.EachWaiter(func(id ID, own bool, request RequestID) bool {
			if request >= machine.AnonymousRequest {
				// Its caller waited elsewhere, and cannot ask for it again.
				if own {
					id = 0
				}
				l.enqueue(&call{cmd: &machine.Abandon{Lease: id, Request: request}})
			}
			return true
		})
	})
	l.forgetAt.deadline = now + forgetEvery
	l.wheel.arm(&l.forgetAt)
	l.logger.Info("leading", zap.Uint64("term", change.Term), zap.Int("leases", len(l.leases)))
	if !l.everLed {
		l.everLed = true
		close(l.ready)
	}
}

// abandonServing answers whoever waits with err; places in queues stay.
func (l *loop) abandonServing(err error) {
	for _, c := range l.pending {
		c.pends(-1)
		l.reserved.sub(c.room)
		c.answer(l, machine.Result{}, err)
	}
	l.pending = nil
	for _, c := range l.waiting.parked {
		c.answer(l, machine.Result{}, err)
	}
	clear(l.waiting.parked)
	for _, c := range append(l.rounds.asked, l.rounds.unasked...) {
		c.answer(l, err)
	}
	l.rounds.asked, l.rounds.unasked, l.rounds.confirming = nil, nil, false
}
