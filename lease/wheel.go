package lease

import (
	"math/bits"
	"time"
)

// tick is the resolution of the wheel: a timer fires at most one tick late,
// and never early.
const tick = 5 * time.Millisecond

const (
	slotBits = 8
	slots    = 1 << slotBits
	levels   = 4 // 256^4 ticks of 5 ms: 248 days
)

// never is the deadline of what has none. It leaves room to add a tick.
const never time.Duration = 1 << 62

// later returns t+d, or never when that is out of reach.
func later(t, d time.Duration) time.Duration {
	if d >= never-t {
		return never
	}
	return t + d
}

// timer is an entry of the wheel. Moving its deadline later is a store to the
// field: the wheel finds out when the old time comes, and arms it anew. There
// is one per lease, so its fields are packed.
type timer struct {
	next, prev *timer // nil while not armed
	deadline   time.Duration
	span       time.Duration // of a lease its TTL, of a lock-delay its length: marked on the way
	id         uint64
	kind       timerKind
	level      uint8 // of the wheel, while armed
	marks      uint8 // how often half of what is left has gone, and whether that is in the log
	expiring   bool  // of a lease: its expiry is proposed, renewals are refused
	// port is the one, by number, that granted or renewed a lease last and is
	// to be told of its loss; 0 for none.
	port uint32
}

type timerKind uint8

const (
	timerLease timerKind = iota
	timerDelay
	timerWait
	timerForget
	timerPause
)

// armed reports whether t waits in the wheel; a nil timer does not.
func (t *timer) armed() bool { return t != nil && t.next != nil }

// wheel is a hierarchical timer wheel (Varghese and Lauck, SOSP 1987): arming
// and disarming are O(1), whatever the number of timers. Level n has slots of
// 256^n ticks; a slot's timers move down a level when its time begins. Times
// are spans since the wheel's start. It belongs to the manager's loop.
type wheel struct {
	now   uint64                     // ticks that have been advanced over
	slots [levels][slots]timer       // heads of circular lists
	due   timer                      // head of the list cut out of a slot, until all of it has been looked at
	lower int                        // levels below whose slots begin at now too, and are to be cut out
	count [levels]int                // timers per level
	used  [levels][slots / 64]uint64 // which slots may have timers
}

func newWheel() *wheel {
	w := &wheel{}
	w.due.next, w.due.prev = &w.due, &w.due
	for l := range w.slots {
		for s := range w.slots[l] {
			head := &w.slots[l][s]
			head.next, head.prev = head, head
		}
	}
	return w
}

// arm enters t at the time at which it is to be looked at.
func (w *wheel) arm(t *timer) {
	if t.armed() {
		w.disarm(t)
	}
	// Rounded up: the tick at which it fires is not before the deadline.
	at := uint64((max(t.look(), 0) + tick - 1) / tick)
	w.enter(t, max(at, w.now+1))
}

func (w *wheel) enter(t *timer, at uint64) {
	at = min(at, w.now+1<<(slotBits*levels)-1)
	level := 0
	for level < levels-1 && at>>(slotBits*level)-w.now>>(slotBits*level) >= slots {
		level++
	}
	slot := at >> (slotBits * level) % slots
	head := &w.slots[level][slot]
	t.prev, t.next = head.prev, head
	head.prev.next, head.prev = t, t
	w.count[level]++
	w.used[level][slot/64] |= 1 << (slot % 64)
	t.level = uint8(level)
}

// disarm takes t out; it is a no-op for one that is not armed.
func (w *wheel) disarm(t *timer) {
	if !t.armed() {
		return
	}
	t.prev.next, t.next.prev = t.next, t.prev
	t.next, t.prev = nil, nil
	w.count[t.level]--
}

// advance moves the wheel to now and calls fire for the timers whose time has come;
// those of one slot in no order. A timer whose deadline has been moved is armed
// anew. It looks at limit timers at most, and goes on with the others next time.
func (w *wheel) advance(now time.Duration, limit int, fire func(*timer)) {
	target := uint64(now / tick)
	for ; limit > 0; limit-- {
		for w.due.next == &w.due {
			if !w.cut(target) {
				return
			}
		}
		t := w.due.next
		w.disarm(t)
		if t.look() > now {
			w.arm(t)
		} else {
			fire(t)
		}
	}
}

// cut takes the timers of the next slot out of the wheel. It reports false
// when the wheel has come to target.
func (w *wheel) cut(target uint64) bool {
	if w.lower > 0 {
		w.lower--
	} else {
		if w.now >= target {
			return false
		}
		if w.idle() {
			w.now = target
			return false
		}
		if w.count[0] == 0 { // nothing happens before upper levels move down
			w.now = min(w.now|(slots-1), target-1)
		}
		w.now++
		// A level's slot begins when all lower levels wrap.
		for w.lower+1 < levels && w.now%(1<<(slotBits*(w.lower+1))) == 0 {
			w.lower++
		}
	}
	slot := w.now >> (slotBits * w.lower) % slots
	w.used[w.lower][slot/64] &^= 1 << (slot % 64)
	if head := &w.slots[w.lower][slot]; head.next != head {
		w.due.next, w.due.prev = head.next, head.prev
		w.due.next.prev, w.due.prev.next = &w.due, &w.due
		head.next, head.prev = head, head
	}
	return true
}

func (w *wheel) idle() bool {
	for _, n := range w.count {
		if n > 0 {
			return false
		}
	}
	return true
}

// next returns the time of the next slot that may have something to do, and
// false when no timer is armed. A slot whose timers were all disarmed counts.
func (w *wheel) next() (time.Duration, bool) {
	switch {
	case w.idle():
		return 0, false
	case w.due.next != &w.due || w.lower > 0:
		return time.Duration(w.now) * tick, true
	}
	at := w.now - w.now%slots + slots // where the upper levels move down
	if w.count[0] > 0 {
		if soon := w.nextUsed(); !w.upper() || soon < at {
			at = soon
		}
	}
	return time.Duration(at) * tick, true
}

// nextUsed returns the tick of the first used slot of level 0 after now.
func (w *wheel) nextUsed() uint64 {
	for at := w.now + 1; at < w.now+slots; {
		s := at % slots
		if word := w.used[0][s/64] >> (s % 64); word != 0 {
			return at + uint64(bits.TrailingZeros64(word))
		}
		at += 64 - s%64
	}
	return w.now + slots
}

func (w *wheel) upper() bool { return w.count[1]+w.count[2]+w.count[3] > 0 }
