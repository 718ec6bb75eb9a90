package lease

import (
	"math/rand/v2"
	"testing"
	"time"
	"unsafe"

	"pgregory.net/rapid"
)

// spans are lengths of time that meet every level of the wheel, its slots'
// edges and what lies beyond it.
func spans() *rapid.Generator[time.Duration] {
	return rapid.OneOf(
		rapid.Custom(func(t *rapid.T) time.Duration {
			return time.Duration(rapid.Int64Range(0, int64(3*tick)).Draw(t, "ns"))
		}),
		rapid.Custom(func(t *rapid.T) time.Duration {
			level := rapid.IntRange(0, 2).Draw(t, "level")
			turn := tick << (slotBits * level)
			return max(0, turn*time.Duration(rapid.IntRange(0, 600).Draw(t, "turns"))+
				time.Duration(rapid.Int64Range(-1, 1).Draw(t, "edge")))
		}),
	)
}

// TestWheelAgainstAList drives the wheel with random timers, moved deadlines
// and disarmings, going where next says, and holds it against a plain list:
// every timer fires once, never early, at most a tick late.
func TestWheelAgainstAList(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		w := newWheel()
		now := spans().Draw(t, "start")
		w.now = uint64(now / tick)
		armed := map[*timer]bool{}
		fire := func(x *timer) {
			if !armed[x] {
				t.Fatalf("timer %d fired and was not armed", x.id)
			}
			delete(armed, x)
			if x.deadline > now {
				t.Fatalf("timer %d fired %v early", x.id, x.deadline-now)
			}
		}
		advance := func() {
			w.advance(now, 1<<30, fire)
			for x := range armed {
				if now-x.deadline > tick {
					t.Fatalf("timer %d is %v late at %v", x.id, now-x.deadline, now)
				}
			}
			if at, ok := w.next(); ok != (len(armed) > 0) || ok && at <= now {
				t.Fatalf("at %v with %d timers next is %v, %v", now, len(armed), at, ok)
			}
		}
		var all []*timer
		t.Repeat(map[string]func(*rapid.T){
			"arm": func(t *rapid.T) {
				x := &timer{id: uint64(len(all)), deadline: now + spans().Draw(t, "for")}
				all = append(all, x)
				armed[x] = true
				w.arm(x)
			},
			"arm again": func(t *rapid.T) {
				if len(all) == 0 {
					return
				}
				x := rapid.SampledFrom(all).Draw(t, "timer")
				x.deadline = now + spans().Draw(t, "for")
				armed[x] = true
				w.arm(x)
			},
			"move": func(t *rapid.T) {
				if len(all) > 0 {
					x := rapid.SampledFrom(all).Draw(t, "timer")
					x.deadline = max(x.deadline, now+spans().Draw(t, "for"))
				}
			},
			"disarm": func(t *rapid.T) {
				if len(all) > 0 {
					x := rapid.SampledFrom(all).Draw(t, "timer")
					delete(armed, x)
					w.disarm(x)
				}
			},
			"sleep": func(t *rapid.T) {
				now += spans().Draw(t, "for") % (10 * time.Minute)
				w.advance(now, 1<<30, fire)
			},
			"wake": func(t *rapid.T) {
				at, ok := w.next()
				if !ok {
					return
				}
				for x := range armed {
					if at-x.deadline > tick {
						t.Fatalf("at %v next is %v, past the deadline %v", now, at, x.deadline)
					}
				}
				now = at
				advance()
			},
		})
		for len(armed) > 0 {
			at, ok := w.next()
			if !ok {
				t.Fatalf("%d timers are lost", len(armed))
			}
			now = max(at, now+1)
			advance()
		}
	})
}

func TestTimersBeyondTheWheel(t *testing.T) {
	w := newWheel()
	var fired []time.Duration
	now := time.Duration(0)
	year := 365 * 24 * time.Hour
	far := &timer{deadline: later(now, year)}
	w.arm(far)
	forGood := &timer{deadline: later(now, 1<<63-1)}
	w.arm(forGood)
	for len(fired) == 0 {
		at, ok := w.next()
		if !ok {
			t.Fatal("lost")
		}
		// As if every wake-up on the way were late by as much as it may be.
		now = max(at, min(now+24*time.Hour, year))
		w.advance(now, 1<<30, func(*timer) { fired = append(fired, now) })
	}
	if fired[0] < year || fired[0] > year+24*time.Hour {
		t.Errorf("a timer of a year fired after %v", fired)
	}
	if !forGood.armed() {
		t.Error("a timer that is never due fired")
	}
}

func TestLeaseTimersAreSmall(t *testing.T) {
	if n := unsafe.Sizeof(timer{}); n > 48 {
		t.Errorf("a lease's timer takes %d bytes", n)
	}
}

// million returns a wheel with a million timers of half a minute.
func million() (*wheel, []timer) {
	w := newWheel()
	all := make([]timer, 1_000_000)
	for i := range all {
		all[i].deadline = time.Duration(rand.Int64N(int64(30 * time.Second)))
		w.arm(&all[i])
	}
	return w, all
}

func BenchmarkWheelArm(b *testing.B) {
	w, all := million()
	b.ReportAllocs()
	for i := 0; b.Loop(); i++ {
		x := &all[i%len(all)]
		x.deadline += 10 * time.Second
		w.arm(x)
	}
}

// BenchmarkWheelSecond is a second in the life of a million leases of 30 s
// that are renewed in time: nothing but the moving of timers.
func BenchmarkWheelSecond(b *testing.B) {
	w, _ := million()
	now := time.Duration(0)
	b.ReportAllocs()
	for b.Loop() {
		for range time.Second / tick {
			now += tick
			w.advance(now, 1<<30, func(x *timer) {
				x.deadline = now + 30*time.Second
				w.arm(x)
			})
		}
	}
}
