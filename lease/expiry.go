package lease

import (
	"time"

	"github.com/distlock/distlock/lease/machine"
)

const (
	maxExpiries = 96                    // leases in one expiry command, under a millisecond with the disk: a mass expiry is smeared
	maxPause    = 10 * time.Millisecond // between batches of a mass expiry
	forgetEvery = 30 * time.Second
	remember    = 10 * time.Minute
)

// expiry is the part of the loop that ends what nobody renews: leases,
// lock-delays, and what is remembered of what has ended.
type expiry struct {
	leases  map[ID]*timer   // one that a parked call keeps alive has the deadline never, and is not in the wheel
	lossy   map[ID]struct{} // live leases that have lost holds: renewals tell
	delayed map[uint64]*delayTimer

	due   []ID  // leases whose time has come; propose looks at them again
	pause timer // until more of them are ended

	moments  []moment
	forgetAt timer
}

func newExpiry() expiry {
	return expiry{
		leases: make(map[ID]*timer), lossy: make(map[ID]struct{}), delayed: make(map[uint64]*delayTimer),
		pause: timer{kind: timerPause}, forgetAt: timer{kind: timerForget},
	}
}

type delayTimer struct {
	timer
	name string
}

// moment remembers which revision the store had at a time, to forget what ended
// before it.
type moment struct {
	at       time.Duration
	revision uint64
}

func (l *loop) armLease(id ID, ttl, now time.Duration) {
	t := l.leases[id]
	if t == nil {
		t = &timer{kind: timerLease, id: uint64(id), span: ttl}
		l.leases[id] = t
	}
	t.deadline, t.marks = later(now, ttl), 0
	l.wheel.arm(t)
}

// suspend stops a lease's time while a parked call keeps it alive.
func (l *loop) suspend(id ID) {
	if t := l.leases[id]; t != nil {
		t.deadline = never
		l.wheel.disarm(t)
	}
}

// renewFor moves the deadline of a lease to its TTL from a time, unless it is
// later. It reports false for a lease that is being ended.
func (l *loop) renewFor(t *timer, from time.Duration) bool {
	if t.expiring {
		return false
	}
	// Only the deadline moves; the wheel notices at the old one.
	if t.deadline = max(t.deadline, later(from, t.span)); !t.marked() || l.unmarked() { // not refused marks either
		t.marks = 0
	}
	return true
}

func (l *loop) endLease(id ID) {
	if t := l.leases[id]; t != nil {
		l.wheel.disarm(t)
		delete(l.leases, id)
	}
	delete(l.lossy, id)
}

func (l *loop) armDelay(name string, d machine.Delay, now time.Duration) {
	t := &delayTimer{timer: timer{kind: timerDelay, id: d.ID, span: time.Duration(d.Duration), deadline: later(now, time.Duration(d.Duration))}, name: name}
	if d.Left > 0 {
		t.shorten(time.Duration(d.Left), now)
	}
	l.delayed[d.ID] = t
	l.delays.set(d.ID, t.deadline)
	l.wheel.arm(&t.timer)
}

func (l *loop) endDelay(id uint64) {
	if t := l.delayed[id]; t != nil {
		l.wheel.disarm(&t.timer)
		delete(l.delayed, id)
		l.delays.remove(id)
	}
}

// leasesDue reports whether there are leases to end now.
func (l *loop) leasesDue() bool { return len(l.due) > 0 && !l.pause.armed() }

// expiries makes the command that ends the leases whose time has come, and has
// not been moved since; nil when there are none. From here on their renewals
// are refused.
func (l *loop) expiries() *call {
	if !l.leasesDue() {
		return nil
	}
	now := l.now()
	var list []ID
	n := 0
	for ; n < len(l.due) && len(list) < maxExpiries; n++ {
		t := l.leases[l.due[n]]
		switch {
		case t == nil: // ended by other means
		case t.expiring || t.deadline <= now:
			t.expiring = true
			list = append(list, l.due[n])
		case t.deadline != never && !t.armed():
			l.wheel.arm(t)
		}
	}
	if l.due = l.due[n:]; len(l.due) == 0 {
		l.due = nil
	}
	if list == nil {
		return nil
	}
	return &call{cmd: &machine.ExpireLeases{Leases: list, Term: l.term}}
}

// unexpired takes back leases whose end the log has not committed: they will be
// looked at again. If it is certain that the log never will, they may be renewed
// until then.
func (l *loop) unexpired(list []ID, certain bool) {
	for _, id := range list {
		if t := l.leases[id]; t != nil && certain {
			t.expiring = false
		}
	}
	l.due = append(list, l.due...)
}

// forget proposes to drop what ended more than ten minutes ago.
func (l *loop) forget() {
	now := l.now()
	var remembered int
	var revision uint64
	l.store.Read(func(s *machine.Machine) { remembered, revision = s.Counts().Remembered, s.Revision() })
	old := -1
	for i, k := range l.moments {
		if now-k.at >= remember {
			old = i
		}
	}
	if old >= 0 {
		if remembered > 0 {
			l.enqueue(&call{cmd: &machine.Forget{Through: l.moments[old].revision}})
		}
		l.moments = append(l.moments[:0], l.moments[old+1:]...)
	}
	if remembered > 0 {
		l.moments = append(l.moments, moment{now, revision})
	}
	l.forgetAt.deadline = now + forgetEvery
	l.wheel.arm(&l.forgetAt)
}
