package lease

import (
	"context"
	"errors"
	"math/rand/v2"
	"testing"
	"testing/synctest"
	"time"

	"github.com/distlock/distlock/lease/machine"
)

// left is what the log says is left of a lease; 0 when it is not marked.
func (l *script) left(id ID) (left time.Duration) {
	synctest.Wait()
	l.store.Read(func(m *machine.Machine) {
		m.EachMark(func(marked ID, d machine.Duration) bool {
			if marked == id {
				left = time.Duration(d)
			}
			return true
		})
	})
	return left
}

// leave has the manager prepare a hand-over.
func (l *script) leave(term uint64) <-chan struct{} {
	ready := make(chan struct{})
	synctest.Wait()
	l.leadership <- Leadership{Leader: true, Term: term, Leaving: ready}
	synctest.Wait()
	return ready
}

// A lease that is renewed in time is never marked; one that is not is, again
// and again, with what is left of it.
func TestWhoDoesNotRenewIsMarked(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r, l := startScript(t)
		defer r.stop()
		dead, err := r.own("dead", 10*time.Second, 0, 1)
		if err != nil {
			t.Fatal(err)
		}
		live, err := r.own("live", 10*time.Second, 0, 2)
		if err != nil {
			t.Fatal(err)
		}
		batches := len(l.counts)
		for at := time.Duration(0); at < 10*time.Second; at += 100 * time.Millisecond {
			if at%(3*time.Second) == 0 {
				if _, err := r.keepAlive(live.Lease); err != nil {
					t.Fatal(err)
				}
			}
			if left := l.left(live.Lease); left != 0 {
				t.Fatalf("after %v: a lease that is renewed is marked with %v", at, left)
			}
			remains, left := 10*time.Second-at, l.left(dead.Lease)
			switch {
			case remains > 5*time.Second && left != 0,
				remains < 5*time.Second-2*tick && (left < remains || remains > time.Second && left > 2*remains+2*tick):
				t.Fatalf("after %v: marked with %v", at, left)
			}
			time.Sleep(100 * time.Millisecond)
		}
		synctest.Wait()
		if left := l.left(dead.Lease); left != 0 || r.Status().Leases != 1 {
			t.Errorf("expired, and marked with %v", left)
		}
		if n := len(l.counts) - batches; n > 6 { // 5, 2.5, 1.25 and 0.625 s, and the expiry
			t.Errorf("%d batches for one dead lease", n)
		}
	})
}

// A renewal of a marked lease is answered once its mark has been taken away,
// and not before: a later leader would end it too early.
func TestARenewalOfAMarkedLeaseWaits(t *testing.T) {
	for what, end := range map[string]func(t *testing.T, r *rig, l *script) error{
		"committed": func(t *testing.T, r *rig, l *script) error { l.commit(); return nil },
		"not appended, and committed the next time": func(t *testing.T, r *rig, l *script) error {
			l.drop(1, false, ErrNotLeader)
			if n, _ := l.held(); n != 1 {
				t.Fatalf("%d batches", n)
			}
			l.commit()
			return nil
		},
		"of unknown outcome": func(t *testing.T, r *rig, l *script) error {
			l.lose("")
			l.drop(1, true, ErrOutcomeUnknown)
			return ErrOutcomeUnknown
		},
		"committed in the next term": func(t *testing.T, r *rig, l *script) error {
			l.mu.Lock()
			l.term = 2
			l.mu.Unlock()
			l.commit()
			return ErrNotLeader
		},
	} {
		for _, inFlight := range []bool{false, true} {
			synctest.Test(t, func(t *testing.T) {
				r, l := startScript(t)
				defer r.stop()
				g, err := r.own("a", 10*time.Second, 0, 1)
				if err != nil {
					t.Fatal(err)
				}
				if inFlight { // the mark is on its way
					l.holding(true, false)
				}
				time.Sleep(6 * time.Second)
				l.holding(true, false)
				renewal := background(func() (KeepAlive, error) { return r.keepAlive(g.Lease) })
				pendingNow(t, renewal, "the renewal of a marked lease")
				time.Sleep(5 * time.Second) // beyond the old deadline
				if inFlight {
					l.commit()
					pendingNow(t, renewal, "the renewal of a lease with a mark on its way")
				}
				want := end(t, r, l)
				if a := <-renewal; !errors.Is(a.err, want) || (a.err == nil) != (want == nil) {
					t.Fatalf("%s: %v, want %v", what, a.err, want)
				}
				if left := l.left(g.Lease); left != 0 {
					t.Errorf("%s: still marked with %v", what, left)
				}
				l.holding(false, false)
			})
		}
	}
}

// A mark is proposed when nothing is in the log that could acknowledge more than
// it says.
func TestNoMarkBesideABatch(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r, l := startScript(t)
		defer r.stop()
		g, err := r.own("a", 10*time.Second, 0, 1)
		if err != nil {
			t.Fatal(err)
		}
		time.Sleep(4900 * time.Millisecond)
		l.holding(true, false)
		again := background(func() (Hold, error) { return r.own("a", 10*time.Second, 0, 1) })
		pendingNow(t, again, "the repeat")
		time.Sleep(time.Second)
		other := background(func() (Hold, error) { return r.own("b", time.Hour, 0, 2) })
		pendingNow(t, other, "another")
		if n, _ := l.held(); n != 1 {
			t.Fatalf("%d batches in the log", n)
		}
		l.holding(false, false)
		l.commit()
		if a := <-again; a.err != nil {
			t.Fatal(a.err)
		}
		time.Sleep(100 * time.Millisecond)
		if left := l.left(g.Lease); left != 0 {
			t.Errorf("acknowledged a moment ago, and marked with %v", left)
		}
	})
}

// Before a hand-over everything is marked that has not been renewed for a third
// of its TTL, or since this leader began; and the leadership may go on.
func TestAHandOverIsPrepared(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r, l := startScript(t)
		defer r.stop()
		var ids []ID
		for i, name := range []string{"dead", "live", "fresh"} {
			g, err := r.own(name, 30*time.Second, 0, RequestID(i+1))
			if err != nil {
				t.Fatal(err)
			}
			ids = append(ids, g.Lease)
		}
		l.lead(2)
		time.Sleep(8 * time.Second)
		if _, err := r.keepAlive(ids[1]); err != nil {
			t.Fatal(err)
		}
		late, err := r.Acquire(t.Context(), AcquireRequest{Names: []string{"late"}, TTL: 30 * time.Second, LockDelay: 20 * time.Second})
		if err != nil {
			t.Fatal(err)
		}
		if err := r.ForceRelease(t.Context(), "late", late.Token, "ops"); err != nil {
			t.Fatal(err)
		}
		time.Sleep(9 * time.Second)
		if _, err := r.keepAlive(ids[2]); err != nil { // marked by then
			t.Fatal(err)
		}
		ready := l.leave(2)
		select {
		case <-ready:
		default:
			t.Fatal("not ready")
		}
		if dead, live, fresh := l.left(ids[0]), l.left(ids[1]), l.left(ids[2]); dead != 13*time.Second || live != 0 || fresh != 0 {
			t.Errorf("left: %v of a dead lease, %v of one renewed 9 s ago, %v of one just renewed", dead, live, fresh)
		}
		l.store.Read(func(m *machine.Machine) {
			m.EachDelay(func(name string, d machine.Delay) bool {
				if time.Duration(d.Left) != 11*time.Second {
					t.Errorf("left of the lock-delay: %v", time.Duration(d.Left))
				}
				return true
			})
		})
		l.lead(2) // nobody took it
		if _, err := r.keepAlive(ids[0]); err != nil {
			t.Fatal(err)
		}
		if left := l.left(ids[0]); left != 0 {
			t.Errorf("renewed, and marked with %v", left)
		}
		l.lead(3)
		time.Sleep(29 * time.Second)
		if _, err := r.keepAlive(ids[0]); err != nil {
			t.Errorf("its TTL was acknowledged, and ended early: %v", err)
		}
		// A log that does not answer holds up nobody: whoever hands over waits
		// for a while, and does so.
		l.holding(true, false)
		ready = l.leave(3)
		select {
		case <-ready:
			t.Error("ready before the marks are in the log")
		default:
		}
		l.commit()
		<-ready
		l.holding(false, false)
	})
}

// A dead holder is free below twice its TTL and the time without a leader, as
// long as each leadership lasts half of what is left, or a second; one that is
// shorter, and ends unplanned, adds its own length. The same of a lock-delay.
func TestADeadHolderIsFreeInBoundedTime(t *testing.T) {
	for seed := range uint64(300) {
		rng := rand.New(rand.NewPCG(seed, 1))
		span := func(most time.Duration) time.Duration { return time.Duration(rng.Int64N(int64(most))) + 1 }
		synctest.Test(t, func(t *testing.T) {
			r, l := startScript(t)
			defer r.stop()
			ttl := time.Second + span(time.Minute)
			delay := rng.IntN(3) == 0
			g, err := r.Acquire(context.Background(), AcquireRequest{Names: []string{"a"}, TTL: ttl, LockDelay: ttl})
			if err != nil {
				t.Fatal(err)
			}
			if delay {
				if err := r.ForceRelease(t.Context(), "a", g.Token, "ops"); err != nil {
					t.Fatal(err)
				}
			}
			begin := time.Now()
			bound := 2*ttl + minMark + 20*tick
			// What is left at most when this leadership begins.
			left := ttl
			for term := uint64(2); ; term++ {
				lasts := span(ttl)
				planned := rng.IntN(3) == 0
				if rng.IntN(4) == 0 {
					lasts /= 20
				}
				if !planned && lasts < max(left/2, 2*minMark)+2*tick {
					bound += lasts
				}
				for range 10 {
					if s := r.Status(); delay && s.Locks == 0 || !delay && s.Leases == 0 {
						if took := time.Since(begin); took > bound {
							t.Errorf("seed %d: TTL %v, gone after %v, bound %v, in term %d", seed, ttl, took, bound, term-1)
						} else if took < ttl {
							t.Errorf("seed %d: TTL %v, gone after %v", seed, ttl, took)
						}
						return
					}
					time.Sleep(lasts / 10)
				}
				if planned {
					<-l.leave(term - 1)
				} else {
					away := span(ttl / 4)
					bound += away
					l.lose("")
					time.Sleep(away)
				}
				if marked := l.left(g.Lease); marked > 0 {
					left = marked
				}
				l.store.Read(func(m *machine.Machine) {
					m.EachDelay(func(_ string, d machine.Delay) bool {
						if d.Left > 0 {
							left = time.Duration(d.Left)
						}
						return true
					})
				})
				l.lead(term)
			}
		})
	}
}
