package lease

import (
	"time"

	"github.com/distlock/distlock/lease/machine"
)

// A later leader knows nothing of renewals, and so gives every lease its full
// TTL: a dead holder's lease would live on with every change of leader. What is
// left of a lease that has not been renewed for half of its TTL, and then for
// half of the rest, and so on, is therefore written down in the log: a mark. A
// renewal of a marked lease takes the mark away before it is answered. Leases
// that are renewed in time have none, and cost nothing.

const (
	levelMarks = machine.Level(3)

	minMark      = 500 * time.Millisecond // what is left below it is not written down
	maxMarks     = 2048                   // in one command
	pauseMarks   = 25 * time.Millisecond  // between commands
	maxHandOver  = 1 << 17                // leases marked before a hand-over: they may be left out
	markWritten  = 0x80                   // of timer.marks
	markSchedule = 0x7f
)

// look is when the wheel has to look at a timer: at its deadline, or before it
// when what is left is to be marked.
func (t *timer) look() time.Duration {
	if t.span > 0 && t.deadline != never {
		if left := t.span >> (t.marks&markSchedule + 1); left >= minMark {
			return t.deadline - left
		}
	}
	return t.deadline
}

// marked reports whether a mark is in the log, or may be.
func (t *timer) marked() bool { return t.marks&markWritten != 0 }

// shorten takes in a mark that the log has.
func (t *timer) shorten(left, now time.Duration) {
	t.deadline = min(t.deadline, later(now, left))
	t.marks = markWritten
	for t.marks&markSchedule < 62 && t.span>>(t.marks&markSchedule+1) >= left {
		t.marks++
	}
}

// unmarked reports that no lease is marked, nor will be by what is in the log. It is
// so while everybody renews in time, and renewals then need not look for marks.
func (l *loop) unmarked() bool { return l.marksOut == 0 && l.counts.Marks == 0 }

// marking is the part of the loop that marks.
type marking struct {
	fading    []*timer        // that have not been renewed for long: propose looks at them again
	markPause timer           // until more of them are marked
	marksOut  int             // commands with marks in the log
	leaving   chan<- struct{} // to be closed when those of a hand-over are marked
	since     time.Duration
}

// fade takes in a timer half of whose time, or of what was left of it, has gone.
func (l *loop) fade(t *timer) {
	t.marks++
	l.wheel.arm(t)
	if l.store.Level() >= levelMarks {
		l.fading = append(l.fading, t)
	}
}

// marksDue reports whether leases are to be marked now.
func (l *loop) marksDue() bool {
	return len(l.fading) > 0 && (l.leaving != nil || !l.markPause.armed())
}

// marks makes the command that marks what has faded; nil when there is nothing.
// It must be the first of its batch, and nothing of this node's in the log, which
// propose sees to: what comes before it might acknowledge more time than it says.
func (l *loop) marks() *call {
	if !l.marksDue() {
		return nil
	}
	now := l.now()
	cmd := &machine.Mark{Term: l.term}
	n := 0
	for ; n < len(l.fading) && len(cmd.Leases)+len(cmd.Delays) < maxMarks; n++ {
		t := l.fading[n]
		if !l.marksNow(t, now) {
			continue
		}
		t.marks |= markWritten
		left := machine.Duration(t.deadline - now)
		if t.kind == timerLease {
			cmd.Leases = append(cmd.Leases, machine.LeaseMark{Lease: ID(t.id), Left: left})
		} else {
			cmd.Delays = append(cmd.Delays, machine.DelayMark{Name: l.delayed[t.id].name, Delay: t.id, Left: left})
		}
	}
	if l.fading = l.fading[n:]; len(l.fading) == 0 {
		l.fading = nil
	}
	if len(cmd.Leases)+len(cmd.Delays) == 0 {
		return nil
	}
	l.marksOut++
	l.markPause.deadline = now + pauseMarks
	l.wheel.arm(&l.markPause)
	return &call{cmd: cmd}
}

// marksNow reports whether what a timer has left must still be marked.
func (l *loop) marksNow(t *timer, now time.Duration) bool {
	switch t.kind {
	case timerLease:
		if l.leases[ID(t.id)] != t {
			return false // it has ended
		}
	case timerDelay:
		if d := l.delayed[t.id]; d == nil || &d.timer != t {
			return false
		}
	}
	switch {
	case t.expiring, t.deadline == never, t.deadline <= now:
		return false
	case l.leaving != nil:
		return l.stale(t, now)
	}
	// Not if it has been renewed meanwhile, which begins its schedule anew.
	return t.marks&markSchedule > 0 && t.deadline-now <= t.span>>(t.marks&markSchedule)
}

// stale reports whether a lease has not been renewed for a third of its TTL, or
// in this leadership: at a hand-over, what is left of it is marked.
func (l *loop) stale(t *timer, now time.Duration) bool {
	return t.deadline <= later(l.since, t.span) || t.deadline-now < t.span-t.span/3
}

// handOver prepares for a leadership that is to be handed over, or goes on with
// it when there is nobody to tell.
func (l *loop) handOver(leaving chan<- struct{}) {
	l.leaving = leaving
	if leaving == nil || l.store.Level() < levelMarks {
		return
	}
	now := l.now()
	add := func(t *timer) {
		if len(l.fading) < maxHandOver && !t.expiring && t.deadline != never && l.stale(t, now) {
			l.fading = append(l.fading, t)
		}
	}
	for _, t := range l.leases {
		add(t)
	}
	for _, d := range l.delayed {
		add(&d.timer)
	}
}

// left tells whoever waits to hand the leadership over that all marks are in the log.
func (l *loop) left() {
	if l.leaving != nil && len(l.fading) == 0 && l.marksOut == 0 {
		close(l.leaving)
		l.leaving = nil
	}
}

// clears reports whether renewals must wait until marks have been taken away,
// after which it answers c. The deadlines move at once, or the leases could
// expire meanwhile.
func (l *loop) clears(c *confirmation, leases []ID, requests []RequestID, received time.Duration) bool {
	if l.unmarked() {
		return false
	}
	var list []ID
	renew := func(id ID) {
		if t := l.leases[id]; t != nil && l.renewFor(t, received) && t.marked() {
			list = append(list, id)
		}
	}
	for _, id := range leases {
		renew(id)
	}
	if len(requests) > 0 {
		l.store.Read(func(s *machine.Machine) {
			for _, request := range requests {
				if found, known := s.Find(0, request); known {
					renew(found.Lease)
				}
			}
		})
	}
	if list == nil {
		return false
	}
	l.enqueue(&call{cmd: &machine.Clear{Leases: list}, aside: &aside{renews: c}})
	return true
}

// cleared answers the renewals whose leases have no marks any more.
func (l *loop) cleared(c *call, serving bool) {
	if !serving {
		c.answer(l, machine.Result{}, &NotLeaderError{Hint: l.hint})
		return
	}
	for _, id := range c.cmd.(*machine.Clear).Leases {
		if t := l.leases[id]; t != nil {
			t.marks = 0
		}
	}
	c.answer(l, machine.Result{}, nil)
}
