package lease

import (
	"context"
	"time"

	"github.com/distlock/distlock/lease/machine"
)

// waitingCalls is the part of the loop that lets acquisitions wait. The
// machine keeps their places; here stands who is told of the grant.
type waitingCalls struct {
	parked  map[waiter]*call
	bounded map[uint64]*call // by the number of their timer
	ending  []*call          // whose bound is reached: propose takes them out
	number  uint64           // of the last timer

	// newest is the last call, by serial, of each request that has an id and
	// does not count attempts, while the request lives: an earlier one's end
	// undoes nothing.
	newest map[waiter]uint64
	serial uint64
}

func newWaitingCalls(serial uint64) waitingCalls {
	return waitingCalls{
		parked: make(map[waiter]*call), bounded: make(map[uint64]*call), newest: make(map[waiter]uint64), serial: serial,
	}
}

// waiter identifies an acquisition as its caller knows it: lease 0 for one
// with a lease of its own.
type waiter struct {
	lease   ID
	request RequestID
}

func waiterOf(e *Event) waiter {
	if e.Own {
		return waiter{0, e.Request}
	}
	return waiter{e.Lease, e.Request}
}

// arrived notes which call of a request is the newest.
func (w *waitingCalls) arrived(c *call) {
	switch {
	case !c.named():
	case c.attempt == 0:
		if c.few().serial == 0 {
			w.serial++
			c.with().serial = w.serial
		}
		w.newest[c.key] = c.aside.serial
	case len(w.newest) > 0:
		delete(w.newest, c.key)
	}
}

// over forgets a request that has ended.
func (w *waitingCalls) over(key waiter) {
	if len(w.newest) > 0 {
		delete(w.newest, key)
	}
}

// park lets a call wait for its grant. A repeat takes the place of the call
// that it repeats; a late earlier attempt does not.
func (l *loop) park(c *call) {
	w := &l.waiting
	if old := w.parked[c.key]; old != nil {
		if c.attempt < old.attempt {
			c.answer(l, machine.Result{}, ErrSuperseded)
			return
		}
		l.unpark(old)
		old.answer(l, machine.Result{}, ErrSuperseded)
	}
	w.parked[c.key] = c
	c.sink.parks(c)
	own := c.few().leaseID
	if t := l.leases[own]; t != nil && c.key.lease == 0 {
		switch {
		case c.attempt == 0:
			l.suspend(own)
		case t.deadline == never: // an earlier attempt was not counted
			l.armLease(own, t.span, l.now())
		}
	}
	if c.bound != WaitForever {
		w.number++
		t := &timer{kind: timerWait, id: w.number, deadline: later(c.since, c.bound)}
		c.with().wait = t
		w.bounded[w.number] = c
		l.wheel.arm(t)
	}
}

// unpark takes a call out of the waiting ones.
func (l *loop) unpark(c *call) {
	if l.waiting.parked[c.key] == c {
		delete(l.waiting.parked, c.key)
	}
	if t := c.few().wait; t != nil {
		l.wheel.disarm(t)
		delete(l.waiting.bounded, t.id)
	}
}

// maxEnding bounds the waits taken out of their queues by one batch: others
// want their turn.
const maxEnding = 256

// endings puts the ends of waits whose bound is reached into a batch. A grant
// that is in the log before is answered; at the first level it is undone.
func (l *loop) endings(f *flight) {
	w := &l.waiting
	if len(w.ending) == 0 {
		return
	}
	first := l.store.Level() < levelEndWait
	var view *machine.View
	n := 0
	for ; n < len(w.ending) && len(f.calls) < maxEnding; n++ {
		c := w.ending[n]
		if c.answered || w.parked[c.key] != c {
			continue // granted before its time was up, or a repeat waits on
		}
		if view == nil {
			view = l.store.View()
		}
		end := &call{cmd: &machine.EndWait{Lease: c.key.lease, Request: c.key.request}, aside: &aside{ends: c, before: view}}
		if first {
			end.cmd, c.givingUp = &machine.Abandon{Lease: c.key.lease, Request: c.key.request}, true
		}
		f.add(end)
	}
	clear(w.ending[:n])
	if w.ending = w.ending[n:]; len(w.ending) == 0 {
		w.ending = nil
	}
}

// waitEnded answers the call whose wait has been ended, or a repeat that has
// taken its place meanwhile.
func (l *loop) waitEnded(end *call, r machine.Result) {
	waited := end.aside.ends
	if r.Refusal != nil || r.Hold != nil {
		return // it was over before, which its event has told or tells
	}
	c := l.waiting.parked[waited.key]
	if c == nil {
		return
	}
	l.unpark(c)
	c.with().before = end.aside.before
	c.answer(l, machine.Result{}, &WaitTimeoutError{Waited: waited.bound})
}

// leave is a caller that stops waiting for its Acquire. Only where attempts
// are not counted does that undo anything: otherwise the client's Abandon does.
type leave struct {
	call *call
	lost bool // its connection was, so that it may come back for its place
}

func (v *leave) take(l *loop) {
	c := v.call
	if l.refuses() != nil || l.draining || c.left || c.answered && !c.granted {
		return // above all: a repeat may have taken its place
	}
	parked := l.waiting.parked[c.key] == c
	if parked {
		l.unpark(c)
		c.sink.leaves(c)
	}
	newest := !c.named() || l.waiting.newest[c.key] == c.few().serial
	if c.attempt == 0 && newest && (!v.lost || !c.named()) {
		// Also when a grant has won the race: nobody will hear of it.
		c.left, c.undone = true, true
		l.enqueue(&call{cmd: &machine.Abandon{Lease: c.key.lease, Request: c.key.request}, aside: &aside{undoes: c}})
		return
	}
	if !parked { // answered once what it did is known: until then it has its weight
		c.left = true
		return
	}
	if own := c.few().leaseID; c.key.lease == 0 && l.leases[own] != nil && l.leases[own].deadline == never {
		l.armLease(own, l.leases[own].span, l.now())
	}
	c.answer(l, machine.Result{}, context.Canceled)
}

// holdOf is the grant that an event tells of.
func holdOf(e *Event) *machine.Hold {
	return &machine.Hold{Lease: e.Lease, Request: e.Request, Token: e.Token, Mode: e.Mode, Since: e.Stamp, Locks: e.Locks}
}

// repeated renews a lease made by an earlier attempt, whose answer may have
// been lost: whoever repeats the request counts the TTL from the repeat. A
// lease made just now is not in the table yet, and its event arms it. It
// reports false for a lease that is being ended.
func (l *loop) repeated(id ID) bool {
	t := l.leases[id]
	if t == nil {
		return true
	}
	t.marks = 0 // the machine has taken the mark away
	return l.renewFor(t, l.now())
}

// ttlOf is that of a live lease; 0 when it is gone.
func (l *loop) ttlOf(id ID) (ttl time.Duration) {
	if t := l.leases[id]; t != nil {
		return t.span
	}
	l.store.Read(func(s *machine.Machine) { // its end is on its way here
		d, _ := s.TTL(id)
		ttl = time.Duration(d)
	})
	return ttl
}
