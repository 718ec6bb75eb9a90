package lease

import (
	"fmt"
	"runtime"
	"runtime/debug"
	"testing"
	"time"

	"github.com/jonboulle/clockwork"

	"github.com/distlock/distlock/lease/machine"
)

// stage drives a loop by hand over a log that applies at once, and keeps the
// longest times: that of the loop for one input or step of a turn, and that of
// the machine for one batch.
type stage struct {
	l       *loop
	clock   *clockwork.FakeClock
	store   *Store
	applied time.Duration // by the machine, in the step under way
	turn    time.Duration // the longest
	what    string
	apply   time.Duration // the longest
}

func (s *stage) Propose(b machine.Batch, done func(machine.Outcome, error)) {
	b.Term = 1
	began := time.Now()
	out := s.store.Apply(b)
	took := time.Since(began)
	s.applied += took
	s.apply = max(s.apply, took)
	done(out, nil)
}

func (s *stage) Confirm(_ uint64, done func(error)) { done(nil) }
func (s *stage) Leadership() <-chan Leadership      { return nil }
func (s *stage) Err() error                         { return nil }
func (s *stage) Close() error                       { return nil }

func newStage(b *testing.B) *stage {
	s := &stage{clock: clockwork.NewFakeClock(), store: NewStore(0)}
	m, err := New(Config{Clock: s.clock, Log: s, Store: s.store})
	if err != nil {
		b.Fatal(err)
	}
	s.l = newLoop(m)
	s.l.lead(Leadership{Leader: true, Term: 1})
	return s
}

func (s *stage) step(what string, fn func()) {
	s.applied = 0
	began := time.Now()
	fn()
	if took := time.Since(began) - s.applied; took > s.turn {
		s.turn, s.what = took, what
	}
}

// work is what run does until there is nothing more to do.
func (s *stage) work() {
	l := s.l
	for {
		l.inbox.take(func(in input) { s.step(fmt.Sprintf("%T", in), func() { in.take(l) }) })
		s.step("timers", func() { l.wheel.advance(l.now(), maxFired, l.fire) })
		s.step("propose", l.propose)
		s.step("confirm", l.confirm)
		l.ring()
		select {
		case <-l.inbox.wake:
			continue
		default:
		}
		if at, ok := l.wheel.next(); !ok || at > l.now() {
			return
		}
	}
}

func (s *stage) ask(b *testing.B, op Operation) caller {
	t, err := op.task(s.l.Manager)
	if err != nil {
		b.Fatal(err)
	}
	c := make(caller, 1)
	t.from().sink = c
	s.l.inbox.put(t)
	return c
}

// BenchmarkLongestTurn is the longest time for which one input, or one step of
// a turn, keeps the loop or the machine from everything else, with n waiters or
// holders: it must not grow with them.
func BenchmarkLongestTurn(b *testing.B) {
	actor := func(i int) string { return fmt.Sprint("actor", i) }
	scenarios := []struct {
		name string
		run  func(b *testing.B, s *stage, n int)
	}{
		{"waiters with actors", func(b *testing.B, s *stage, n int) {
			s.ask(b, &AcquireRequest{Names: []string{"a"}, TTL: time.Hour, Actor: "holder"})
			s.ask(b, &AcquireRequest{Names: []string{"b"}, TTL: time.Hour, Actor: actor(0)})
			s.work()
			for i := range n {
				s.ask(b, &AcquireRequest{Names: []string{"a"}, TTL: time.Hour, Wait: WaitForever, Actor: actor(i)})
				s.work()
			}
			for i := range 200 { // whose circle would be closed at the end of the queue, or nowhere
				s.ask(b, &AcquireRequest{Names: []string{"b"}, TTL: time.Hour, Wait: WaitForever, Actor: "holder"})
				s.ask(b, &AcquireRequest{Names: []string{"a"}, TTL: time.Hour, Wait: WaitForever, Actor: fmt.Sprint("new", i)})
				s.ask(b, &AcquireRequest{Names: []string{"a"}, TTL: time.Hour})
				s.work()
			}
		}},
		{"bounded waits that end together", func(b *testing.B, s *stage, n int) {
			s.ask(b, &AcquireRequest{Names: []string{"a"}, TTL: time.Hour})
			for range n {
				s.ask(b, &AcquireRequest{Names: []string{"a"}, TTL: time.Hour, Wait: time.Minute})
			}
			s.work()
			s.clock.Advance(time.Minute + 2*tick)
			s.work()
			if w := s.l.Status().Waiters; w != 0 {
				b.Fatalf("%d wait", w)
			}
		}},
		{"shared holders lost together", func(b *testing.B, s *stage, n int) {
			for range n {
				s.ask(b, &AcquireRequest{Names: []string{"a"}, Mode: machine.Shared, TTL: time.Minute, LockDelay: time.Minute})
			}
			s.work()
			for s.l.Status().Holds > 0 || s.l.Status().Locks > 0 {
				s.clock.Advance(time.Minute / 4)
				for range n/maxExpiries + 2 {
					s.work()
					s.clock.Advance(maxPause)
				}
			}
		}},
		{"a lease of many holds", func(b *testing.B, s *stage, n int) {
			s.ask(b, &GrantLeaseRequest{TTL: time.Hour})
			s.work()
			for i := range n {
				s.ask(b, &AcquireRequest{Lease: 1, Request: RequestID(i + 1), LowestOpen: 1, Names: []string{fmt.Sprint(i)}})
			}
			s.work()
			for i := range 200 {
				s.ask(b, &LeaseRequest{Lease: 1})
				s.ask(b, &KeepAliveRequest{Leases: []ID{1}})
				s.ask(b, &ForceReleaseRequest{Name: fmt.Sprint(i)})
				s.work()
			}
		}},
	}
	for _, scenario := range scenarios {
		for _, n := range []int{1_000, 10_000, 100_000} {
			b.Run(fmt.Sprint(scenario.name, "/", n), func(b *testing.B) {
				defer debug.SetGCPercent(debug.SetGCPercent(-1)) // its pauses are not the loop's
				for b.Loop() {
					b.StopTimer()
					runtime.GC()
					s := newStage(b)
					b.StartTimer()
					scenario.run(b, s, n)
					b.ReportMetric(float64(s.turn.Microseconds()), "max-µs/turn")
					b.ReportMetric(float64(s.apply.Microseconds()), "max-µs/apply")
					b.Logf("the longest step is %s", s.what)
				}
			})
		}
	}
}
