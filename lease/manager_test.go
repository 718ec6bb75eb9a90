package lease

import (
	"cmp"
	"context"
	"errors"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/jonboulle/clockwork"
	"go.uber.org/goleak"

	"github.com/distlock/distlock/lease/machine"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// rig is a manager over a memory log, in a synctest bubble: the real clock is
// the bubble's, so time passes only when everybody waits.
type rig struct {
	*Manager
	loop   *loop // the tests look at it when it stands still
	t      *testing.T
	store  *Store
	cancel context.CancelFunc
	ended  chan error
	log    Log
}

func bubble(t *testing.T, fn func(t *testing.T, r *rig)) {
	synctest.Test(t, func(t *testing.T) {
		store := NewStore(0)
		r := start(t, store, NewMemoryLog(store))
		fn(t, r)
		r.stop()
	})
}

func start(t *testing.T, store *Store, log Log) *rig {
	return startWith(t, Config{Clock: clockwork.NewRealClock(), Log: log, Store: store})
}

// startWith starts a manager that fills the log with small batches, unless cfg
// says otherwise.
func startWith(t *testing.T, cfg Config) *rig {
	cfg.Overlap = cmp.Or(cfg.Overlap, 1)
	m, err := New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	r := &rig{Manager: m, loop: newLoop(m), t: t, store: cfg.Store, cancel: cancel, ended: make(chan error, 1), log: cfg.Log}
	go func() { r.ended <- r.loop.run(ctx) }()
	<-m.Ready()
	return r
}

func (r *rig) stop() {
	r.cancel()
	<-r.ended
	r.log.Close()
}

func (r *rig) own(name string, ttl, wait time.Duration, req RequestID) (Hold, error) {
	return r.Acquire(context.Background(), AcquireRequest{Request: req, Names: []string{name}, TTL: ttl, Wait: wait, Owner: "o"})
}

func TestExpiryIsNeverEarlyAndAtMostATickLate(t *testing.T) {
	bubble(t, func(t *testing.T, r *rig) {
		ctx := context.Background()
		for _, ttl := range []time.Duration{101 * time.Millisecond, 1279 * time.Millisecond, 1283 * time.Millisecond, 7 * time.Minute, 23 * time.Hour} {
			begin := time.Now()
			if _, err := r.own("a", ttl, 0, 0); err != nil {
				t.Fatal(err)
			}
			// A waiter is granted when the holder's lease ends.
			g, err := r.own("a", time.Second, WaitForever, 0)
			if err != nil {
				t.Fatal(err)
			}
			if took := time.Since(begin); took < ttl || took > ttl+tick {
				t.Errorf("a lease of %v ended after %v", ttl, took)
			}
			if err := r.Release(ctx, ReleaseRequest{Lease: g.Lease, Name: "a", Token: g.Token}); err != nil {
				t.Fatal(err)
			}
		}
	})
}

func TestRenewalMovesTheDeadlineFromItsReceipt(t *testing.T) {
	bubble(t, func(t *testing.T, r *rig) {
		g, err := r.own("a", time.Second, 0, 0)
		if err != nil {
			t.Fatal(err)
		}
		begin := time.Now()
		for range 10 {
			time.Sleep(700 * time.Millisecond)
			got, err := r.KeepAlive(context.Background(), []ID{g.Lease, 99})
			if err != nil || got[0].Err != nil || got[0].TTL != time.Second {
				t.Fatal(got, err)
			}
			var refusal *Refusal
			if !errors.As(got[1].Err, &refusal) || refusal.Reason != machine.ReasonLeaseNotFound {
				t.Fatalf("renewal of an unknown lease: %v", got[1].Err)
			}
		}
		if _, err := r.own("a", time.Second, WaitForever, 0); err != nil {
			t.Fatal(err)
		}
		if took := time.Since(begin); took < 8*time.Second || took > 8*time.Second+tick {
			t.Errorf("the lease ended after %v, renewed last at 7s for 1s", took)
		}
		got, err := r.KeepAlive(context.Background(), []ID{g.Lease})
		var refusal *Refusal
		if err != nil || !errors.As(got[0].Err, &refusal) || refusal.Ended == nil || refusal.Ended.Cause != machine.EndExpired {
			t.Errorf("renewal of an expired lease: %v %v", got, err)
		}
	})
}

func TestWaitBoundAndExplanation(t *testing.T) {
	bubble(t, func(t *testing.T, r *rig) {
		g, err := r.own("a", time.Minute, 0, 0)
		if err != nil {
			t.Fatal(err)
		}
		var held *HeldError
		if _, err := r.own("a", time.Minute, 0, 0); !errors.As(err, &held) || held.Explain.Obstacles[0].Holders[0].Token != g.Token {
			t.Fatalf("without waiting: %v", err)
		}
		begin := time.Now()
		var timeout *WaitTimeoutError
		if _, err := r.own("a", time.Minute, 3*time.Second, 0); !errors.As(err, &timeout) || timeout.Explain.Obstacles[0].Holders[0].Token != g.Token {
			t.Fatalf("bounded wait: %v", err)
		}
		if took := time.Since(begin); took < 3*time.Second || took > 3*time.Second+2*tick {
			t.Errorf("a wait of 3s took %v", took)
		}
		if s := r.Status(); s.Waiters != 0 || s.Leases != 1 {
			t.Errorf("after the wait: %+v", s.Counts)
		}
	})
}

func TestCancelledWaitIsAbandonedAndItsGrantUndone(t *testing.T) {
	bubble(t, func(t *testing.T, r *rig) {
		g, err := r.own("a", time.Minute, 0, 0)
		if err != nil {
			t.Fatal(err)
		}
		ctx, cancel := context.WithCancel(context.Background())
		done := make(chan error, 1)
		go func() {
			_, err := r.Acquire(ctx, AcquireRequest{Request: 7, Names: []string{"a"}, TTL: time.Minute, Wait: WaitForever})
			done <- err
		}()
		synctest.Wait()
		if s := r.Status(); s.Waiters != 1 {
			t.Fatalf("%+v", s.Counts)
		}
		cancel()
		if err := <-done; !errors.Is(err, context.Canceled) {
			t.Fatal(err)
		}
		synctest.Wait()
		if s := r.Status(); s.Waiters != 0 || s.Leases != 1 {
			t.Fatalf("%+v", s.Counts)
		}
		// A late duplicate is not granted anew.
		if err := r.Release(context.Background(), ReleaseRequest{Lease: g.Lease, Name: "a", Token: g.Token}); err != nil {
			t.Fatal(err)
		}
		var refusal *Refusal
		if _, err := r.own("a", time.Minute, 0, 7); !errors.As(err, &refusal) || refusal.Reason != machine.ReasonRequestEnded {
			t.Fatalf("a late duplicate: %v", err)
		}
	})
}

func TestDetachedWaiterKeepsItsPlaceForOneTTL(t *testing.T) {
	bubble(t, func(t *testing.T, r *rig) {
		g, err := r.own("a", time.Hour, 0, 0)
		if err != nil {
			t.Fatal(err)
		}
		wait := func(cause error, req RequestID) (cancel func(), done chan error) {
			ctx, stop := context.WithCancelCause(context.Background())
			done = make(chan error, 1)
			go func() {
				_, err := r.Acquire(ctx, AcquireRequest{Request: req, Names: []string{"a"}, TTL: 10 * time.Second, Wait: WaitForever})
				done <- err
			}()
			synctest.Wait()
			return func() { stop(cause) }, done
		}
		lose, done := wait(ErrDetached, 1)
		_, second := wait(nil, 2)
		time.Sleep(time.Minute) // its parked call keeps its lease alive
		lose()
		<-done
		time.Sleep(9 * time.Second)
		_, back := wait(nil, 1) // back in time: same place
		time.Sleep(time.Minute)
		if err := r.Release(context.Background(), ReleaseRequest{Lease: g.Lease, Name: "a", Token: g.Token}); err != nil {
			t.Fatal(err)
		}
		if err := <-back; err != nil {
			t.Fatal(err)
		}
		synctest.Wait()
		select {
		case err := <-second:
			t.Fatalf("the second was served with the first holding: %v", err)
		default:
		}
		time.Sleep(11 * time.Second) // the first's lease expires unrenewed
		if err := <-second; err != nil {
			t.Fatal(err)
		}
		// One that does not come back leaves the queue.
		lose, done = wait(ErrDetached, 3)
		lose()
		<-done
		time.Sleep(5 * time.Second)
		if s := r.Status(); s.Waiters != 1 {
			t.Fatalf("%+v", s.Counts)
		}
		time.Sleep(6 * time.Second)
		if s := r.Status(); s.Waiters != 0 {
			t.Fatalf("%+v", s.Counts)
		}
	})
}

func TestDrainKeepsPlaces(t *testing.T) {
	bubble(t, func(t *testing.T, r *rig) {
		if _, err := r.own("a", time.Hour, 0, 0); err != nil {
			t.Fatal(err)
		}
		done := make(chan error, 1)
		go func() {
			_, err := r.own("a", time.Hour, WaitForever, 5)
			done <- err
		}()
		synctest.Wait()
		r.Drain()
		if err := <-done; !errors.Is(err, ErrStopping) {
			t.Fatal(err)
		}
		if s := r.Status(); s.Waiters != 1 {
			t.Fatalf("%+v", s.Counts)
		}
		if _, err := r.own("b", time.Hour, 0, 0); !errors.Is(err, ErrStopping) {
			t.Fatal(err)
		}
	})
}

func TestLockDelayHoldsALostLock(t *testing.T) {
	bubble(t, func(t *testing.T, r *rig) {
		ctx := context.Background()
		if _, err := r.Acquire(ctx, AcquireRequest{Names: []string{"a"}, TTL: time.Second, LockDelay: 5 * time.Second}); err != nil {
			t.Fatal(err)
		}
		begin := time.Now()
		if _, err := r.own("a", time.Second, WaitForever, 0); err != nil {
			t.Fatal(err)
		}
		if took := time.Since(begin); took < 6*time.Second || took > 6*time.Second+3*tick {
			t.Errorf("granted after %v", took)
		}
	})
}

// flaky is a log whose leadership a test changes.
type flaky struct {
	*MemoryLog
	leadership chan Leadership
	// While a gate is set, proposals wait there for the test to let them go.
	gate atomic.Pointer[chan func()]
}

func (f *flaky) Leadership() <-chan Leadership { return f.leadership }

func (f *flaky) Propose(b machine.Batch, done func(machine.Outcome, error)) {
	if gate := f.gate.Load(); gate != nil {
		*gate <- func() { f.MemoryLog.Propose(b, done) }
		return
	}
	f.MemoryLog.Propose(b, done)
}

// TestNewLeadershipGivesWhatIsLeft of a lease that nobody renews: what it was
// when it was marked last, and not all of the TTL again.
func TestNewLeadershipGivesWhatIsLeft(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		store := NewStore(0)
		f := &flaky{MemoryLog: NewMemoryLog(store), leadership: make(chan Leadership, 1)}
		f.leadership <- Leadership{Leader: true, Term: 1}
		r := start(t, store, f)
		defer r.stop()
		g, err := r.own("a", 10*time.Second, 0, 0)
		if err != nil {
			t.Fatal(err)
		}
		waiting := make(chan error, 1)
		go func() {
			_, err := r.own("a", 10*time.Second, WaitForever, 3)
			waiting <- err
		}()
		time.Sleep(9 * time.Second)
		f.leadership <- Leadership{Hint: "other:1"}
		var lost *NotLeaderError
		if err := <-waiting; !errors.As(err, &lost) || lost.Hint != "other:1" {
			t.Fatal(err)
		}
		if _, err := r.KeepAlive(context.Background(), []ID{g.Lease}); !errors.Is(err, ErrNotLeader) {
			t.Fatal(err)
		}
		time.Sleep(time.Hour)
		begin := time.Now()
		f.leadership <- Leadership{Leader: true, Term: 1}
		synctest.Wait()
		if _, err := r.own("a", 10*time.Second, WaitForever, 3); err != nil {
			t.Fatal(err)
		}
		if took := time.Since(begin); took < 1250*time.Millisecond || took > 1250*time.Millisecond+3*tick {
			t.Errorf("the holder was given %v by the new leader", took)
		}
	})
}

func TestRenewalIsRefusedWhileAnExpiryIsUndecided(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		store := NewStore(0)
		f := &flaky{MemoryLog: NewMemoryLog(store), leadership: make(chan Leadership, 1)}
		f.leadership <- Leadership{Leader: true, Term: 1}
		r := start(t, store, f)
		defer r.stop()
		g, err := r.own("a", time.Second, 0, 0)
		if err != nil {
			t.Fatal(err)
		}
		// The expiry is proposed into a log that does not answer.
		time.Sleep(900 * time.Millisecond) // it is marked by now
		held := make(chan func(), 1)
		f.gate.Store(&held)
		time.Sleep(200 * time.Millisecond)
		apply := <-held
		got, err := r.KeepAlive(context.Background(), []ID{g.Lease})
		var refusal *Refusal
		if err != nil || !errors.As(got[0].Err, &refusal) || refusal.Reason != machine.ReasonLeaseEnded {
			t.Fatalf("%v %v", got, err)
		}
		f.gate.Store(nil)
		apply()
		synctest.Wait()
		if s := r.Status(); s.Leases != 0 {
			t.Fatalf("%+v", s.Counts)
		}
	})
}

func TestForgetComesTenMinutesLater(t *testing.T) {
	bubble(t, func(t *testing.T, r *rig) {
		g, err := r.own("a", time.Minute, 0, 9)
		if err != nil {
			t.Fatal(err)
		}
		if err := r.Release(context.Background(), ReleaseRequest{Lease: g.Lease, Name: "a", Token: g.Token}); err != nil {
			t.Fatal(err)
		}
		time.Sleep(10 * time.Minute)
		if s := r.Status(); s.Remembered != 1 {
			t.Fatalf("after ten minutes: %+v", s.Counts)
		}
		time.Sleep(2 * time.Minute)
		if s := r.Status(); s.Remembered != 0 {
			t.Fatalf("after twelve minutes: %+v", s.Counts)
		}
	})
}

// TestAGrantLeavesNoTimerOfItsWait: it would keep the call for as long as the
// wait was allowed to take.
func TestAGrantLeavesNoTimerOfItsWait(t *testing.T) {
	bubble(t, func(t *testing.T, r *rig) {
		g, err := r.own("a", time.Minute, 0, 0)
		if err != nil {
			t.Fatal(err)
		}
		granted := make(chan error, 1)
		go func() {
			_, err := r.own("a", time.Minute, time.Hour, 0)
			granted <- err
		}()
		timers := func() (n int) {
			if err := r.look(t.Context(), func(l *loop) { n = len(l.waiting.bounded) }); err != nil {
				t.Fatal(err)
			}
			return n
		}
		synctest.Wait()
		if n := timers(); n != 1 {
			t.Fatalf("%d timers while one waits", n)
		}
		if err := r.Release(t.Context(), ReleaseRequest{Lease: g.Lease, Token: g.Token}); err != nil {
			t.Fatal(err)
		}
		if err := <-granted; err != nil {
			t.Fatal(err)
		}
		if n := timers(); n != 0 {
			t.Errorf("%d timers of waits that are over", n)
		}
	})
}

// TestALeaseLeavesNoTimerBehind: leases that come and go would fill the wheel.
func TestALeaseLeavesNoTimerBehind(t *testing.T) {
	bubble(t, func(t *testing.T, r *rig) {
		timers := func() (n int) {
			if err := r.look(t.Context(), func(l *loop) {
				for _, level := range l.wheel.count {
					n += level
				}
			}); err != nil {
				t.Fatal(err)
			}
			return n
		}
		before := timers()
		for range 100 {
			g, err := r.own("a", time.Hour, 0, 0)
			if err != nil {
				t.Fatal(err)
			}
			if err := r.Release(t.Context(), ReleaseRequest{Lease: g.Lease, Token: g.Token}); err != nil {
				t.Fatal(err)
			}
		}
		if n := timers(); n != before {
			t.Errorf("%d timers after 100 leases, %d before", n, before)
		}
	})
}

// TestARenewalOfManyLeases renews each.
func TestARenewalOfManyLeases(t *testing.T) {
	bubble(t, func(t *testing.T, r *rig) {
		ids := make([]ID, 12_000)
		for i := range ids {
			info, err := r.GrantLease(t.Context(), GrantLeaseRequest{TTL: time.Minute})
			if err != nil {
				t.Fatal(err)
			}
			ids[i] = info.ID
		}
		for range 3 {
			time.Sleep(40 * time.Second)
			list, err := r.KeepAlive(t.Context(), ids)
			if err != nil || len(list) != len(ids) {
				t.Fatal(len(list), err)
			}
			for i, k := range list {
				if k.Err != nil || k.Lease != ids[i] || k.TTL != time.Minute {
					t.Fatalf("lease %d of %d: %+v", i, len(ids), k)
				}
			}
		}
	})
}
