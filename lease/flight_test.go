package lease

import (
	"errors"
	"fmt"
	"slices"
	"testing"
	"testing/synctest"
	"time"

	"github.com/jonboulle/clockwork"

	"github.com/distlock/distlock/fence"
)

// Several batches are in the log at once; what comes when it has its fill
// gathers in the next.
func TestBatchesGoOnTheirWayWhileOthersAre(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r, l := startScript(t)
		defer r.stop()
		inFlight := l.fill(r)
		l.mu.Lock()
		l.counts = nil
		l.mu.Unlock()
		gathered := []<-chan answer[Hold]{
			background(func() (Hold, error) { return r.own("x", time.Hour, 0, 0) }),
			background(func() (Hold, error) { return r.own("y", time.Hour, 0, 0) }),
		}
		if batches, _ := l.held(); batches != maxFlights {
			t.Fatalf("%d batches in the log", batches)
		}
		for i, one := range inFlight {
			pendingNow(t, one, "a grant that is not committed")
			l.commit()
			if a := <-one; a.err != nil || a.value.Token != fence.Token(i+1) {
				t.Fatalf("%d: %+v %v", i, a.value, a.err)
			}
		}
		l.commit()
		for _, one := range gathered {
			if a := <-one; a.err != nil {
				t.Fatal(a.err)
			}
		}
		if !slices.Equal(l.counts, []int{2}) {
			t.Errorf("what gathered went in batches of %d", l.counts)
		}
		l.holding(false, false)
	})
}

// While a batch is in the log the next one gathers until it is worth it.
func TestASmallBatchWaitsForTheOneInTheLog(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		store := NewStore(0)
		l := newScript(store)
		r := startWith(t, Config{Clock: clockwork.NewRealClock(), Store: store, Log: l, Overlap: 3})
		defer r.stop()
		l.holding(true, false)
		batches := func() int { n, _ := l.held(); return n }
		var asked []<-chan answer[Hold]
		for i, want := range []int{1, 1, 1, 2, 2} { // the fourth makes three that wait
			asked = append(asked, background(func() (Hold, error) { return r.own(fmt.Sprint(i), time.Hour, 0, 0) }))
			if n := batches(); n != want {
				t.Fatalf("%d batches in the log after %d requests, not %d", n, i+1, want)
			}
		}
		l.commit()
		if n := batches(); n != 1 {
			t.Fatalf("%d batches in the log: one request goes on waiting", n)
		}
		l.commit()
		if n := batches(); n != 1 {
			t.Fatalf("%d batches in the log: it is empty, and one request waits", n)
		}
		l.commit()
		for _, one := range asked {
			if a := <-one; a.err != nil {
				t.Error(a.err)
			}
		}
		l.holding(false, false)
	})
}

// A log that lost the leadership refuses a batch at once, while it has not yet
// answered for the one before.
func TestABatchRefusedBeforeAnEarlierIsAnswered(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r, l := startScript(t)
		defer r.stop()
		l.holding(true, false)
		first := background(func() (Hold, error) { return r.own("a", time.Hour, 0, 1) })
		l.mu.Lock()
		l.term = 0 // and the news of it is on its way
		l.mu.Unlock()
		second := background(func() (Hold, error) { return r.own("b", time.Hour, 0, 2) })
		if a := <-second; !errors.Is(a.err, ErrNotLeader) {
			t.Errorf("the second: %v", a.err)
		}
		pendingNow(t, first, "the first")
		l.lose("")
		l.drop(1, true, ErrOutcomeUnknown)
		if a := <-first; !errors.Is(a.err, ErrOutcomeUnknown) {
			t.Errorf("the first: %v", a.err)
		}
		l.holding(false, false)
		l.lead(2)
		g, err := r.own("a", time.Hour, 0, 1)
		if err != nil || g.Token != 1 {
			t.Errorf("the first again: %+v %v", g, err)
		}
		if g, err = r.own("b", time.Hour, 0, 2); err != nil || g.Token != 2 {
			t.Errorf("the second again: %+v %v", g, err)
		}
	})
}

// Bounds are held against what is in all the batches under way, each counted
// once: also when the log is ahead of what the manager has heard.
func TestBoundsCountWhatIsInFlight(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		store := NewStore(0)
		l := newScript(store)
		r := startWith(t, Config{Clock: clockwork.NewRealClock(), Store: store, Log: l, Bounds: Bounds{MaxLeases: maxFlights + 1}})
		defer r.stop()
		l.fill(r)
		first, second := l.take(), l.take()
		heard, later := store.Apply(first.batch), store.Apply(second.batch)
		first.done(heard, nil)
		last := background(func() (Hold, error) { return r.own("last", time.Hour, 0, 0) })
		pendingNow(t, last, "the last that there is room for")
		if _, err := r.own("more", time.Hour, 0, 0); !errors.As(err, new(*ExhaustedError)) {
			t.Errorf("above the bound: %v", err)
		}
		second.done(later, nil)
		l.holding(false, false)
		for {
			synctest.Wait()
			if held, _ := l.held(); held == 0 {
				break
			}
			l.commit()
		}
		if a := <-last; a.err != nil {
			t.Error(a.err)
		}
	})
}

// A batch of a few expiries that took long, for a disk that hung, is followed
// by the next at once, whoever else asks.
func TestASlowExpiryDelaysNoOther(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r, l := startScript(t)
		defer r.stop()
		for i, ttl := range []time.Duration{time.Second, 1500 * time.Millisecond} {
			if _, err := r.own(string(rune('a'+i)), ttl, 0, 0); err != nil {
				t.Fatal(err)
			}
		}
		time.Sleep(900 * time.Millisecond) // both are marked by now
		l.holding(true, false)
		time.Sleep(200 * time.Millisecond) // the first is in the log
		other := background(func() (Hold, error) { return r.own("c", time.Hour, 0, 0) })
		time.Sleep(time.Second) // the second has fallen due
		l.holding(false, false)
		for range 2 {
			l.commit()
		}
		if a := <-other; a.err != nil {
			t.Fatal(a.err)
		}
		time.Sleep(tick)
		if n := r.Status().Leases; n != 1 {
			t.Errorf("%d leases, one of which fell due a while ago", n-1)
		}
	})
}

// releasing is a manager with a waiter of a second, and the release that grants
// it held up in the log.
func releasing(t *testing.T) (r *rig, l *script, released <-chan answer[struct{}], waiter <-chan answer[Hold]) {
	t.Helper()
	r, l = startScript(t)
	holder, err := r.own("a", time.Hour, 0, 0)
	if err != nil {
		t.Fatal(err)
	}
	waiter = background(func() (Hold, error) { return r.own("a", time.Hour, time.Second, 0) })
	pendingNow(t, waiter, "the waiter")
	l.holding(true, false)
	released = background(func() (struct{}, error) {
		return struct{}{}, r.Release(t.Context(), ReleaseRequest{Lease: holder.Lease, Token: holder.Token})
	})
	return r, l, released, waiter
}

// grantStays: the waiter is granted, and its grant is not undone afterwards.
func grantStays(t *testing.T, r *rig, released <-chan answer[struct{}], waiter <-chan answer[Hold]) {
	t.Helper()
	if a := <-released; a.err != nil {
		t.Fatal(a.err)
	}
	a := <-waiter
	if a.err != nil {
		t.Fatalf("the waiter: %v", a.err)
	}
	synctest.Wait()
	if check, err := r.CheckToken(t.Context(), "a", a.value.Token); err != nil || !check.Live {
		t.Errorf("its grant was undone: %+v %v", check, err)
	}
}

// A wait's time is up while the log has its fill, and the grant for it is in
// the log: it is granted in time, and must not be abandoned afterwards.
func TestAGrantInTimeStaysWhileTheLogIsFull(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r, l, released, waiter := releasing(t)
		defer r.stop()
		for n := range maxFlights - 1 {
			background(func() (Hold, error) { return r.own(string(rune('b'+n)), time.Hour, 0, 0) })
		}
		time.Sleep(1100 * time.Millisecond)
		if batches, _ := l.held(); batches != maxFlights {
			t.Fatalf("%d batches in the log", batches)
		}
		pendingNow(t, waiter, "the waiter, whose time is up")
		l.holding(false, false)
		for range maxFlights {
			l.commit()
		}
		grantStays(t, r, released, waiter)
	})
}

// TestAGrantThatComesBeforeTheEndOfItsWait: the release that grants it is in
// the log when its time is up, and the end of the wait behind it.
func TestAGrantThatComesBeforeTheEndOfItsWait(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r, l, released, waiter := releasing(t)
		defer r.stop()
		time.Sleep(1100 * time.Millisecond)
		background(func() (Hold, error) { return r.own("b", time.Hour, 0, 0) })
		if batches, _ := l.held(); batches != 2 {
			t.Fatalf("%d batches in the log", batches)
		}
		l.holding(false, false)
		l.commit()
		l.commit()
		grantStays(t, r, released, waiter)
	})
}

// A repeat that is in the log when its lease falls due keeps the lease: its end
// is not put beside it, also when others ask for something.
func TestWhatIsInTheLogKeepsALease(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r, l := startScript(t)
		defer r.stop()
		asked := AcquireRequest{Names: []string{"a"}, TTL: 300 * time.Millisecond, Request: 7, Attempt: 1} // too short to be marked
		first, err := r.Acquire(t.Context(), asked)
		if err != nil {
			t.Fatal(err)
		}
		time.Sleep(250 * time.Millisecond)
		l.holding(true, false)
		asked.Attempt = 2
		repeat := background(func() (Hold, error) { return r.Acquire(t.Context(), asked) })
		time.Sleep(100 * time.Millisecond) // it has fallen due
		other := background(func() (Hold, error) { return r.own("b", time.Hour, 0, 0) })
		time.Sleep(tick)
		l.holding(false, false)
		for n, _ := l.held(); n > 0; n, _ = l.held() {
			l.commit()
		}
		if a := <-repeat; a.err != nil || a.value.Token != first.Token {
			t.Errorf("the repeat: %+v, %v", a.value, a.err)
		}
		<-other
		time.Sleep(100 * time.Millisecond)
		if check, err := r.CheckToken(t.Context(), "a", first.Token); err != nil || !check.Live {
			t.Errorf("its lease was ended: %+v %v", check, err)
		}
	})
}

// TestWhatWaitsForTheLogIsBounded: with enough waiting for the log new work is
// refused at once; what gives back, what is asked again, and what renews is not.
func TestWhatWaitsForTheLogIsBounded(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		store := NewStore(0)
		l := newScript(store)
		r := startWith(t, Config{Clock: clockwork.NewRealClock(), Store: store, Log: l, Overlap: 100, Bounds: Bounds{MaxPending: 10}})
		defer r.stop()
		held, err := r.own("held", time.Hour, 0, 0)
		if err != nil {
			t.Fatal(err)
		}
		l.holding(true, false)
		var asked []<-chan answer[Hold]
		for i := range 11 { // the first is in the log
			asked = append(asked, background(func() (Hold, error) { return r.own(fmt.Sprint(i), time.Hour, 0, 0) }))
			synctest.Wait()
		}
		var exhausted *ExhaustedError
		if _, err := r.own("one more", time.Hour, 0, 0); !errors.As(err, &exhausted) || exhausted.Max != 10 {
			t.Errorf("one more: %v", err)
		}
		p := r.NewPort(100, NewShare(100, 1000))
		submit(t, p, func(b *Batch) { b.Acquire(1, own(1, 0, "x")) })
		if got, _ := replies(t, p); !errors.As(got[1].Err, &exhausted) {
			t.Errorf("on a port: %v", got[1].Err)
		}
		p.Close(false)
		if got, err := r.KeepAlive(t.Context(), []ID{held.Lease}); err != nil || got[0].Err != nil {
			t.Errorf("a renewal: %v %v", got, err)
		}
		again := background(func() (Hold, error) {
			return r.Acquire(t.Context(), AcquireRequest{Names: []string{"again"}, TTL: time.Hour, Request: 77, Attempt: 2})
		})
		pendingNow(t, again, "a repeat")
		var released []<-chan answer[struct{}]
		for range 9 {
			released = append(released, background(func() (struct{}, error) {
				return struct{}{}, r.Release(t.Context(), ReleaseRequest{Lease: held.Lease, Token: held.Token})
			}))
			synctest.Wait()
		}
		pendingNow(t, released[8], "a release")
		if err := r.Release(t.Context(), ReleaseRequest{Lease: held.Lease, Token: held.Token}); !errors.As(err, &exhausted) || exhausted.Max != 20 {
			t.Errorf("a release too many: %v", err)
		}
		l.holding(false, false)
		l.commit()
		for i, one := range append(asked, again) {
			if a := <-one; a.err != nil {
				t.Errorf("%d: %v", i, a.err)
			}
		}
		for _, one := range released {
			<-one
		}
		if _, err := r.own("one more", time.Hour, 0, 0); err != nil {
			t.Errorf("with room: %v", err)
		}
	})
}

// TestOneConnectionLeavesRoomForOthers: an eighth of what may wait for the log is one
// connection's, whatever the number of its streams; what is lost with a leadership
// counts no more.
func TestOneConnectionLeavesRoomForOthers(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		store := NewStore(0)
		l := newScript(store)
		r := startWith(t, Config{Clock: clockwork.NewRealClock(), Store: store, Log: l, Overlap: 1000, Bounds: Bounds{MaxPending: 80}})
		defer r.stop()
		share := NewShare(100, 1000)
		ports := []*Port{r.NewPort(100, share), r.NewPort(100, share), r.NewPort(100, NewShare(100, 1000))}
		ask := func(p *Port, n int) (refused int) {
			b := p.Batch(n)
			for i := range n {
				b.Add(uint64(i+1), &GrantLeaseRequest{TTL: time.Hour})
			}
			p.Submit(b)
			got, _ := replies(t, p)
			for _, r := range got {
				if errors.As(r.Err, new(*ExhaustedError)) {
					refused++
				}
			}
			return refused
		}
		for round := range 2 {
			l.holding(true, false)
			first := background(func() (Hold, error) { return r.own("first", time.Hour, 0, 0) }) // is in the log
			synctest.Wait()
			if n := ask(ports[0], 6); n != 0 {
				t.Errorf("round %d: %d of 6 were refused", round, n)
			}
			if n := ask(ports[1], 6); n != 2 {
				t.Errorf("round %d: %d of 6 more were refused", round, n)
			}
			if n := ask(ports[2], 6); n != 0 {
				t.Errorf("round %d: %d of another connection's 6", round, n)
			}
			l.lose("")
			l.holding(false, false)
			l.commit()
			<-first
			for _, p := range ports {
				replies(t, p)
			}
			l.lead(uint64(round) + 2)
		}
		for _, p := range ports {
			p.Close(false)
		}
	})
}
