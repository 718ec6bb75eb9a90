package lease

import (
	"context"
	"errors"
	"testing"
	"testing/synctest"
	"time"

	"github.com/distlock/distlock/lease/machine"
)

// answer is what became of a call made in the background.
type answer[T any] struct {
	value T
	err   error
}

func background[T any](fn func() (T, error)) <-chan answer[T] {
	c := make(chan answer[T], 1)
	go func() {
		v, err := fn()
		c <- answer[T]{v, err}
	}()
	synctest.Wait()
	return c
}

// pendingNow fails the test when a call that must wait has been answered.
func pendingNow[T any](t *testing.T, c <-chan answer[T], what string) {
	t.Helper()
	synctest.Wait()
	select {
	case a := <-c:
		t.Fatalf("%s was answered: %+v", what, a)
	default:
	}
}

func reason(err error) machine.Reason {
	var refusal *Refusal
	if errors.As(err, &refusal) {
		return refusal.Reason
	}
	return ""
}

func (r *rig) keepAlive(id ID) (KeepAlive, error) {
	list, err := r.KeepAlive(context.Background(), []ID{id})
	if err != nil {
		return KeepAlive{}, err
	}
	return list[0], list[0].Err
}

func TestAGainRightAfterAGainAnswersWhoeverWaits(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r, l := startScript(t)
		defer r.stop()
		g, err := r.own("a", 10*time.Second, 0, 1)
		if err != nil {
			t.Fatal(err)
		}
		waiting := background(func() (Hold, error) { return r.own("a", time.Minute, WaitForever, 2) })
		l.holding(false, true)
		renewing := background(func() (KeepAlive, error) { return r.keepAlive(g.Lease) })
		l.holding(false, false)
		time.Sleep(9 * time.Second)
		l.lead(2) // the loss in between was left out
		for _, err := range []error{(<-waiting).err, (<-renewing).err} {
			if !errors.Is(err, ErrNotLeader) {
				t.Errorf("across a change of term: %v", err)
			}
		}
		begin := time.Now()
		if _, err := r.own("a", time.Minute, WaitForever, 2); err != nil {
			t.Fatal(err)
		}
		// It was marked last after 8.75 s.
		if took := time.Since(begin); took < 1250*time.Millisecond || took > 1250*time.Millisecond+3*tick {
			t.Errorf("the new term gave the holder %v", took)
		}
		// The same leadership once more changes nothing.
		waiting = background(func() (Hold, error) { return r.own("a", time.Minute, WaitForever, 3) })
		l.lead(2)
		pendingNow(t, waiting, "a waiter, when nothing has changed,")
	})
}

func TestARoundVouchesOnlyForThoseWhoCameBeforeIt(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r, l := startScript(t)
		defer r.stop()
		g, err := r.own("a", time.Hour, 0, 0)
		if err != nil {
			t.Fatal(err)
		}
		renew := func() (KeepAlive, error) { return r.keepAlive(g.Lease) }
		l.holding(false, true)
		first := background(renew)
		second := background(renew) // the first's round has begun
		if _, n := l.held(); n != 1 {
			t.Fatalf("%d rounds at once", n)
		}
		l.confirm(nil)
		if a := <-first; a.err != nil {
			t.Fatal(a.err)
		}
		pendingNow(t, second, "a renewal by a round that began before it")
		l.confirm(nil)
		if a := <-second; a.err != nil {
			t.Fatal(a.err)
		}

		// A round of an earlier leadership ends late.
		third := background(renew)
		l.lose("")
		if a := <-third; !errors.Is(a.err, ErrNotLeader) {
			t.Fatal(a)
		}
		l.lead(2)
		fourth := background(renew)
		l.confirm(nil)
		pendingNow(t, fourth, "a renewal by a round of the term before")
		l.confirm(ErrNotLeader)
		if a := <-fourth; !errors.Is(a.err, ErrNotLeader) {
			t.Fatal(a)
		}
	})
}

func TestARenewalCountsFromItsReceiptNotItsConfirmation(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r, l := startScript(t)
		defer r.stop()
		begin := time.Now()
		g, err := r.own("a", time.Second, 0, 0)
		if err != nil {
			t.Fatal(err)
		}
		time.Sleep(500 * time.Millisecond)
		l.holding(false, true)
		renewing := background(func() (KeepAlive, error) { return r.keepAlive(g.Lease) })
		time.Sleep(400 * time.Millisecond)
		l.holding(false, false)
		l.confirm(nil)
		if a := <-renewing; a.err != nil {
			t.Fatal(a.err)
		}
		if _, err := r.own("a", time.Second, WaitForever, 0); err != nil {
			t.Fatal(err)
		}
		if took := time.Since(begin); took < 1500*time.Millisecond || took > 1500*time.Millisecond+tick {
			t.Errorf("ended after %v", took)
		}
	})
}

// TestALeaseIsKeptByARenewalThatComesBeforeItsExpiryIsProposed: a batch is in
// the log when the lease falls due.
func TestALeaseIsKeptByARenewalThatComesBeforeItsExpiryIsProposed(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r, l := startScript(t)
		defer r.stop()
		g, err := r.own("a", time.Second, 0, 0)
		if err != nil {
			t.Fatal(err)
		}
		l.holding(true, false)
		other := background(func() (Hold, error) { return r.own("b", time.Hour, 0, 0) })
		time.Sleep(1100 * time.Millisecond)
		another := background(func() (Hold, error) { return r.own("c", time.Hour, 0, 0) }) // worth a batch
		if _, err := r.keepAlive(g.Lease); err != nil {
			t.Fatalf("due, but not proposed: %v", err)
		}
		l.holding(false, false)
		l.commit()
		for _, a := range []answer[Hold]{<-other, <-another} {
			if a.err != nil {
				t.Fatal(a.err)
			}
		}
		time.Sleep(900 * time.Millisecond)
		if info, err := r.Lease(context.Background(), g.Lease); err != nil || info.Remaining != 100*time.Millisecond {
			t.Fatalf("%v %v", info.Remaining, err)
		}
		time.Sleep(200 * time.Millisecond)
		if _, err := r.Lease(context.Background(), g.Lease); reason(err) != machine.ReasonLeaseEnded {
			t.Fatal(err)
		}
	})
}

func TestLeadershipLostWithAnExpiryInFlight(t *testing.T) {
	for _, applied := range []bool{false, true} {
		synctest.Test(t, func(t *testing.T) {
			r, l := startScript(t)
			defer r.stop()
			g, err := r.own("a", time.Second, 0, 0)
			if err != nil {
				t.Fatal(err)
			}
			time.Sleep(900 * time.Millisecond) // it is marked by now
			l.holding(true, false)
			time.Sleep(200 * time.Millisecond)
			if _, err := r.keepAlive(g.Lease); reason(err) != machine.ReasonLeaseEnded {
				t.Fatalf("with the expiry proposed: %v", err)
			}
			l.lose("")
			if _, err := r.keepAlive(g.Lease); !errors.Is(err, ErrNotLeader) {
				t.Fatal(err)
			}
			l.drop(1, applied, ErrOutcomeUnknown)
			l.holding(false, false)
			l.lead(2)
			synctest.Wait()
			_, err = r.keepAlive(g.Lease)
			if applied && reason(err) != machine.ReasonLeaseEnded || !applied && err != nil {
				t.Fatalf("applied %v: %v", applied, err)
			}
			time.Sleep(900 * time.Millisecond)
			if n := r.Status().Leases; n == 1 == applied {
				t.Fatalf("applied %v: %d leases", applied, n)
			}
			time.Sleep(200 * time.Millisecond)
			if n := r.Status().Leases; n != 0 {
				t.Fatalf("%d leases", n)
			}
		})
	}
}

// TestWhatTheManagerProposesItselfIsTriedAgain: a batch that was not appended
// while this node goes on leading takes no expiry, no delay's end and no
// abandoned wait with it.
func TestWhatTheManagerProposesItselfIsTriedAgain(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r, l := startScript(t)
		defer r.stop()
		ctx := context.Background()
		if _, err := r.Acquire(ctx, AcquireRequest{Names: []string{"a"}, TTL: time.Second, LockDelay: time.Second}); err != nil {
			t.Fatal(err)
		}
		waiting := background(func() (Hold, error) { return r.own("a", time.Hour, 1500*time.Millisecond, 0) })
		l.holding(true, false)
		for _, at := range []time.Duration{time.Second, 500 * time.Millisecond, 500 * time.Millisecond} { // expiry, wait, delay
			time.Sleep(at + 2*tick)
			for range 3 {
				l.drop(1, false, ErrNotLeader)
				synctest.Wait()
			}
			if n, _ := l.held(); n != 1 {
				t.Fatalf("%d batches after %v", n, at)
			}
			l.commit()
			synctest.Wait()
		}
		var timeout *WaitTimeoutError
		if a := <-waiting; !errors.As(a.err, &timeout) || len(timeout.Explain.Obstacles[0].Delays) != 1 {
			t.Fatalf("%v", a.err)
		}
		if s := r.Status(); s.Leases != 0 || s.Locks != 0 || s.Waiters != 0 {
			t.Fatalf("left: %+v", s.Counts)
		}
	})
}

// TestARepeatRenewsTheLeaseItFinds: the answer of the first attempt was lost,
// and the client counts the TTL from the repeat.
func TestARepeatRenewsTheLeaseItFinds(t *testing.T) {
	bubble(t, func(t *testing.T, r *rig) {
		ctx := context.Background()
		makes := map[string]func() (ID, error){
			"grant": func() (ID, error) {
				info, err := r.GrantLease(ctx, GrantLeaseRequest{Request: 1, TTL: time.Second})
				return info.ID, err
			},
			"acquire": func() (ID, error) {
				g, err := r.own("a", time.Second, 0, 2)
				return g.Lease, err
			},
		}
		for what, fn := range makes {
			id, err := fn()
			if err != nil {
				t.Fatal(what, err)
			}
			time.Sleep(900 * time.Millisecond)
			if again, err := fn(); err != nil || again != id {
				t.Fatal(what, again, id, err)
			}
			time.Sleep(900 * time.Millisecond)
			if info, err := r.Lease(ctx, id); err != nil || info.Remaining != 100*time.Millisecond {
				t.Fatal(what, info.Remaining, err)
			}
			time.Sleep(110 * time.Millisecond)
			if _, err := fn(); reason(err) != machine.ReasonRequestEnded {
				t.Fatal(what, "after its end:", err)
			}
		}
	})
}

// TestAWaiterThatComesBackWhileItsLeaseFallsDueIsKept: the repeat is in the
// log when the detached waiter's lease falls due.
func TestAWaiterThatComesBackWhileItsLeaseFallsDueIsKept(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r, l := startScript(t)
		defer r.stop()
		ctx := context.Background()
		holder, err := r.own("a", time.Hour, 0, 0)
		if err != nil {
			t.Fatal(err)
		}
		lost, lose := context.WithCancelCause(ctx)
		first := background(func() (Hold, error) {
			return r.Acquire(lost, AcquireRequest{Request: 5, Names: []string{"a"}, TTL: time.Second, Wait: WaitForever, Owner: "o"})
		})
		lose(ErrDetached)
		if a := <-first; !errors.Is(a.err, ErrDetached) {
			t.Fatal(a.err)
		}
		time.Sleep(900 * time.Millisecond)
		l.holding(true, false)
		back := background(func() (Hold, error) { return r.own("a", time.Second, WaitForever, 5) })
		time.Sleep(200 * time.Millisecond) // its deadline passes
		l.holding(false, false)
		l.commit()
		pendingNow(t, back, "the waiter that came back")
		time.Sleep(time.Minute)
		granted := time.Now()
		if err := r.Release(ctx, ReleaseRequest{Lease: holder.Lease, Name: "a", Token: holder.Token}); err != nil {
			t.Fatal(err)
		}
		g := <-back
		if g.err != nil {
			t.Fatal(g.err)
		}
		if _, err := r.own("a", time.Second, WaitForever, 0); err != nil {
			t.Fatal(err)
		}
		if held := time.Since(granted); held < time.Second || held > time.Second+tick {
			t.Errorf("it held for %v", held)
		}
	})
}

func TestALogThatFails(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r, l := startScript(t)
		if _, err := r.own("a", time.Hour, 0, 0); err != nil {
			t.Fatal(err)
		}
		parked := background(func() (Hold, error) { return r.own("a", time.Hour, WaitForever, 0) })
		l.holding(true, true)
		inFlight := l.fill(r)
		pending := background(func() (Hold, error) { return r.own("c", time.Hour, 0, 0) })
		reading := background(func() (LockInfo, error) {
			info, _, err := r.Lock(context.Background(), "a")
			return info, err
		})
		l.fail(errDisk)
		err := <-r.ended
		if !errors.Is(err, ErrLogFailed) || !errors.Is(err, errDisk) {
			t.Errorf("Run returned %v", err)
		}
		for _, one := range inFlight {
			if a := <-one; !errors.Is(a.err, ErrOutcomeUnknown) {
				t.Errorf("in flight: %v", a.err)
			}
		}
		for _, err := range []error{(<-parked).err, (<-pending).err, (<-reading).err} {
			if !errors.Is(err, ErrLogFailed) || errors.Is(err, ErrOutcomeUnknown) {
				t.Errorf("not in the log: %v", err)
			}
		}
		if _, err := r.own("d", time.Hour, 0, 0); !errors.Is(err, ErrLogFailed) {
			t.Errorf("later: %v", err)
		}
		if _, err := r.keepAlive(1); !errors.Is(err, ErrLogFailed) {
			t.Errorf("a renewal later: %v", err)
		}
		if r.Status().Leader {
			t.Error("it still says that it leads")
		}
		l.drop(1, true, ErrOutcomeUnknown) // the log's last word comes late
		r.cancel()
	})
}

func TestTheEndAnswersEverybody(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r, l := startScript(t)
		if _, err := r.own("a", time.Hour, 0, 0); err != nil {
			t.Fatal(err)
		}
		parked := background(func() (Hold, error) { return r.own("a", time.Hour, WaitForever, 0) })
		l.holding(true, true)
		inFlight := l.fill(r)
		pending := background(func() (Hold, error) { return r.own("c", time.Hour, 0, 0) })
		renewing := background(func() (KeepAlive, error) { return r.keepAlive(1) })
		r.cancel()
		if err := <-r.ended; err != nil {
			t.Errorf("Run returned %v", err)
		}
		for _, one := range inFlight {
			if a := <-one; !errors.Is(a.err, ErrOutcomeUnknown) {
				t.Errorf("in flight: %v", a.err)
			}
		}
		for _, err := range []error{(<-parked).err, (<-pending).err, (<-renewing).err} {
			if !errors.Is(err, ErrStopping) || errors.Is(err, ErrOutcomeUnknown) {
				t.Errorf("not in the log: %v", err)
			}
		}
		if err := r.Declare(context.Background(), "d"); !errors.Is(err, ErrStopping) {
			t.Errorf("later: %v", err)
		}
	})
}

func TestDrainAnswersWhatIsInTheLog(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r, l := startScript(t)
		defer r.stop()
		holder, err := r.own("a", time.Second, 0, 0)
		if err != nil {
			t.Fatal(err)
		}
		l.holding(true, false)
		granted := background(func() (Hold, error) { return r.own("b", time.Hour, 0, 1) })
		l.holding(true, false)
		l.commit()
		if a := <-granted; a.err != nil {
			t.Fatal(a.err)
		}
		waiter := background(func() (Hold, error) { return r.own("b", time.Hour, WaitForever, 2) })
		ctx, cancel := context.WithCancel(context.Background())
		cancelled := background(func() (Hold, error) {
			return r.Acquire(ctx, AcquireRequest{Request: 3, Names: []string{"b"}, TTL: time.Hour, Wait: WaitForever})
		})
		r.Drain()
		synctest.Wait()
		cancel() // a client that is cut off by the shutdown keeps its place
		<-cancelled
		l.commit()
		if a := <-waiter; !errors.Is(a.err, ErrStopping) {
			t.Errorf("a waiter whose place was in the log: %v", a.err)
		}
		l.commit() // the second waiter's
		synctest.Wait()
		if n := r.Status().Waiters; n != 2 {
			t.Errorf("%d waiters keep their place", n)
		}
		if err := r.Release(context.Background(), ReleaseRequest{Lease: holder.Lease, Name: "a", Token: holder.Token}); !errors.Is(err, ErrStopping) {
			t.Errorf("new work: %v", err)
		}
		// Leases go on: they can be renewed, and they end.
		if _, err := r.keepAlive(holder.Lease); err != nil {
			t.Error(err)
		}
		l.holding(false, false)
		time.Sleep(2 * time.Second)
		if _, err := r.keepAlive(holder.Lease); reason(err) != machine.ReasonLeaseEnded {
			t.Error(err)
		}
	})
}

// TestABatchThatTheNextTermCommits: the loss of the leadership is left out, and
// the log accepts a batch in the next term before the manager has heard of it.
// What it grants expires like everything else.
func TestABatchThatTheNextTermCommits(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r, l := startScript(t)
		defer r.stop()
		l.holding(true, false)
		granting := background(func() (Hold, error) { return r.own("a", time.Second, 0, 1) })
		l.lead(2)
		l.holding(false, false)
		l.commit()
		if a := <-granting; a.err != nil {
			t.Fatal(a.err)
		}
		if n := r.Status().Leases; n != 1 {
			t.Fatalf("%d leases", n)
		}
		time.Sleep(time.Second + 2*tick)
		if s := r.Status(); s.Leases != 0 || s.Locks != 0 {
			t.Errorf("a second and two ticks later: %+v", s.Counts)
		}
	})
}

// TestAnotherTermsBatchIsNotProposedAgain: who leads now has found out anew
// what must end, and asks for it once.
func TestAnotherTermsBatchIsNotProposedAgain(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r, l := startScript(t)
		defer r.stop()
		ctx := context.Background()
		g, err := r.Acquire(ctx, AcquireRequest{Names: []string{"a"}, TTL: time.Second, LockDelay: time.Second})
		if err != nil {
			t.Fatal(err)
		}
		if err := r.ForceRelease(ctx, "a", g.Token, "ops"); err != nil {
			t.Fatal(err)
		}
		time.Sleep(900 * time.Millisecond) // it is marked by now
		l.holding(true, false)
		time.Sleep(100*time.Millisecond + 2*tick) // the end of the delay is in the log
		if n, _ := l.held(); n != 1 {
			t.Fatalf("%d batches", n)
		}
		l.lead(2)
		l.drop(1, false, ErrNotLeader)
		if n, _ := l.held(); n != 0 {
			t.Errorf("%d batches: the delay has again what it had when it was marked", n)
		}
		time.Sleep(time.Second + 2*tick)
		l.commit()
		if n, _ := l.held(); n != 0 || r.Status().Locks != 0 {
			t.Errorf("%d batches, %d locks at the end", n, r.Status().Locks)
		}
	})
}

// TestALateConfirmationShortensNoLease: a renewal that was received before a
// repeat, and is confirmed after it.
func TestALateConfirmationShortensNoLease(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r, l := startScript(t)
		defer r.stop()
		g, err := r.own("a", time.Second, 0, 1)
		if err != nil {
			t.Fatal(err)
		}
		l.holding(false, true)
		renewal := background(func() (KeepAlive, error) { return r.keepAlive(g.Lease) })
		time.Sleep(800 * time.Millisecond)
		if _, err := r.own("a", time.Second, 0, 1); err != nil { // counts from here
			t.Fatal(err)
		}
		l.holding(false, false)
		l.confirm(nil)
		if a := <-renewal; a.err != nil {
			t.Fatal(a.err)
		}
		if info, err := r.Lease(context.Background(), g.Lease); err != nil || info.Remaining != time.Second {
			t.Errorf("%v left, %v", info.Remaining, err)
		}
	})
}
