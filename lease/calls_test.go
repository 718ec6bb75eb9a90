package lease

import (
	"context"
	"errors"
	"fmt"
	"math"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/jonboulle/clockwork"

	"github.com/distlock/distlock/lease/machine"
)

func (r *rig) release(g Hold) {
	r.t.Helper()
	if err := r.Release(context.Background(), ReleaseRequest{Lease: g.Lease, Name: g.Locks[0].Name, Token: g.Token}); err != nil {
		r.t.Fatal(err)
	}
}

// empty fails the test unless nothing is held, waited for or alive.
func (r *rig) empty() {
	r.t.Helper()
	synctest.Wait()
	if s := r.Status(); s.Leases != 0 || s.Locks != 0 || s.Waiters != 0 || s.Holds != 0 {
		r.t.Fatalf("left: %+v", s.Counts)
	}
}

func TestWaitersAreServedOnceInOrder(t *testing.T) {
	bubble(t, func(t *testing.T, r *rig) {
		g, err := r.own("a", time.Minute, 0, 0)
		if err != nil {
			t.Fatal(err)
		}
		const n = 100
		served := make(chan Hold, n)
		var waits []<-chan answer[Hold]
		for i := range n {
			waits = append(waits, background(func() (Hold, error) {
				g, err := r.own("a", time.Minute, WaitForever, RequestID(i+1))
				served <- g
				return g, err
			}))
		}
		for i := range n {
			r.release(g)
			synctest.Wait()
			if len(served) != 1 {
				t.Fatalf("%d were woken by one release", len(served))
			}
			if g = <-served; g.Request != RequestID(i+1) {
				t.Fatalf("request %d was served in place %d", g.Request, i+1)
			}
			if a := <-waits[i]; a.err != nil {
				t.Fatal(a.err)
			}
		}
		r.release(g)
		r.empty()
	})
}

func TestALockUnderAClientsLease(t *testing.T) {
	bubble(t, func(t *testing.T, r *rig) {
		ctx := context.Background()
		l, err := r.GrantLease(ctx, GrantLeaseRequest{TTL: 10 * time.Second, Owner: "me", Metadata: []machine.Meta{{Key: "b"}, {Key: "a"}}})
		if err != nil {
			t.Fatal(err)
		}
		under := func(request RequestID, wait time.Duration, names ...string) (Hold, error) {
			return r.Acquire(ctx, AcquireRequest{Lease: l.ID, Request: request, LowestOpen: 1, Names: names, Wait: wait})
		}
		g, err := under(1, 0, "y", "x")
		if err != nil || g.TTL != 10*time.Second || len(g.Locks) != 2 || g.Locks[0].Name != "x" {
			t.Fatalf("%+v %v", g, err)
		}
		// A second request of the same lease waits like any other's, and its
		// parked call keeps no lease alive but its own.
		second := background(func() (Hold, error) { return under(2, WaitForever, "x") })
		info, err := r.Lease(ctx, l.ID)
		if err != nil || len(info.Holds) != 1 || len(info.Waits) != 1 || info.Metadata[0].Key != "a" || info.Remaining != 10*time.Second {
			t.Fatalf("%+v %v", info, err)
		}
		time.Sleep(10*time.Second + tick)
		if a := <-second; reason(a.err) != machine.ReasonLeaseEnded {
			t.Fatal(a.err)
		} else if !strings.Contains(a.err.Error(), "expired") {
			t.Fatal(a.err)
		}
		r.empty()
		if _, err := under(3, 0, "x"); reason(err) != machine.ReasonLeaseEnded {
			t.Fatal(err)
		}

		// Revocation tells its waiter who it was.
		if l, err = r.GrantLease(ctx, GrantLeaseRequest{TTL: time.Hour}); err != nil {
			t.Fatal(err)
		}
		if _, err := r.own("x", time.Minute, 0, 0); err != nil {
			t.Fatal(err)
		}
		second = background(func() (Hold, error) { return under(1, time.Minute, "x") })
		if err := r.RevokeLease(ctx, l.ID, "the operator"); err != nil {
			t.Fatal(err)
		}
		if a := <-second; reason(a.err) != machine.ReasonLeaseEnded || !strings.Contains(a.err.Error(), "revoked by the operator") {
			t.Fatal(a.err)
		}
	})
}

func TestARepeatTakesThePlaceOfTheCallItRepeats(t *testing.T) {
	bubble(t, func(t *testing.T, r *rig) {
		g, err := r.own("a", time.Minute, 0, 0)
		if err != nil {
			t.Fatal(err)
		}
		ctx, cancel := context.WithCancel(context.Background())
		first := background(func() (Hold, error) {
			return r.Acquire(ctx, AcquireRequest{Request: 1, Names: []string{"a"}, TTL: time.Minute, Wait: time.Second, Owner: "o"})
		})
		second := background(func() (Hold, error) { return r.own("a", time.Minute, WaitForever, 1) })
		if a := <-first; !errors.Is(a.err, ErrSuperseded) {
			t.Fatal(a.err)
		}
		cancel() // too late to abandon anything
		time.Sleep(time.Minute - time.Second)
		pendingNow(t, second, "the repeat, at the first's bound,") // its bound is its own
		if n := r.Status().Waiters; n != 1 {
			t.Fatalf("%d waiters", n)
		}
		r.release(g)
		a := <-second
		if a.err != nil {
			t.Fatal(a.err)
		}
		// A caller that was replaced and learns it late does not undo the grant.
		r.inbox.put(&leave{call: &call{key: waiter{0, 1}, answered: true}})
		synctest.Wait()
		if n := r.Status().Holds; n != 1 {
			t.Fatalf("%d holds", n)
		}
		r.release(a.value)
		r.empty()
	})
}

// TestACancelMeetsTheGrantAnywhere cancels an Acquire at each step of its way:
// whatever the caller is not told of is undone, and what it may come back for
// is kept.
func TestACancelMeetsTheGrantAnywhere(t *testing.T) {
	steps := []string{"pending", "in flight", "parked", "granted but not heard"}
	for _, step := range steps {
		for _, cause := range []error{nil, ErrDetached} {
			t.Run(fmt.Sprint(step, " ", cause), func(t *testing.T) {
				synctest.Test(t, func(t *testing.T) {
					r, l := startScript(t)
					defer r.stop()
					ctx, cancel := context.WithCancelCause(context.Background())
					l.holding(true, false)
					var holder <-chan answer[Hold]
					if step != "in flight" {
						holder = background(func() (Hold, error) { return r.own("a", time.Hour, 0, 9) })
					}
					if step == "parked" || step == "granted but not heard" {
						l.commit()
						<-holder
					}
					call := background(func() (Hold, error) {
						return r.Acquire(ctx, AcquireRequest{Request: 1, Names: []string{"a"}, TTL: time.Minute, Wait: WaitForever, Owner: "o"})
					})
					if step == "parked" || step == "granted but not heard" {
						l.commit()
						synctest.Wait()
					}
					if step == "granted but not heard" {
						r.inbox.put(onLoop(func() { // on the loop, so that nothing comes between
							cancel(cause)
							c := r.loop.waiting.parked[waiter{0, 1}]
							r.loop.unpark(c)
							c.answer(r.loop, machine.Result{Hold: &machine.Hold{}}, nil)
						}))
					} else {
						cancel(cause)
					}
					a := <-call
					want := cause
					if want == nil {
						want = context.Canceled
					}
					if !errors.Is(a.err, want) {
						t.Fatal(a.err)
					}
					l.holding(false, false)
					for {
						synctest.Wait()
						if n, _ := l.held(); n == 0 {
							break
						}
						l.commit()
					}
					if holder != nil && step == "pending" {
						<-holder
					}
					var known bool
					r.store.Read(func(m *machine.Machine) { _, known = m.Find(0, 1) })
					if known != (cause == ErrDetached) {
						t.Fatalf("the request is still there: %v", known)
					}
					if !known {
						if _, err := r.own("a", time.Minute, WaitForever, 1); reason(err) != machine.ReasonRequestEnded {
							t.Fatalf("a late duplicate: %v", err)
						}
					}
					if step == "in flight" && cause == ErrDetached {
						g, err := r.own("a", time.Minute, WaitForever, 1)
						if err != nil || g.Token != 1 {
							t.Fatalf("coming back for the grant: %+v %v", g, err)
						}
					}
				})
			})
		}
	}
}

// onLoop is a function that runs on the loop.
type onLoop func()

func (fn onLoop) take(*loop) { fn() }

// gone is the context of a caller that has left, though nothing says so before
// the answer is there.
type gone struct{ context.Context }

func (gone) Err() error { return context.Canceled }

func TestAGrantThatNobodyHearsIsUndone(t *testing.T) {
	bubble(t, func(t *testing.T, r *rig) {
		_, err := r.Acquire(gone{context.Background()}, AcquireRequest{Request: 1, Names: []string{"a"}, TTL: time.Hour})
		if !errors.Is(err, context.Canceled) {
			t.Fatal(err)
		}
		r.empty()
	})
}

func TestAnAnonymousWaiterThatIsLostIsAbandoned(t *testing.T) {
	bubble(t, func(t *testing.T, r *rig) {
		g, err := r.own("a", time.Hour, 0, 0)
		if err != nil {
			t.Fatal(err)
		}
		ctx, cancel := context.WithCancelCause(context.Background())
		call := background(func() (Hold, error) {
			return r.Acquire(ctx, AcquireRequest{Names: []string{"a"}, TTL: time.Hour, Wait: WaitForever})
		})
		cancel(ErrDetached)
		if a := <-call; !errors.Is(a.err, ErrDetached) {
			t.Fatal(a.err)
		}
		synctest.Wait()
		if n := r.Status().Waiters; n != 0 {
			t.Errorf("%d waiters", n)
		}
		r.release(g)
		r.empty()
	})
}

func TestBoundsAreExact(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		store := NewStore(0)
		log := NewMemoryLog(store)
		r := startWith(t, Config{Clock: clockwork.NewRealClock(), Log: log, Store: store, Bounds: Bounds{MaxLeases: 8, MaxLocks: 6, MaxWaiters: 2}})
		defer r.stop()
		ctx := context.Background()
		exhausted := func(err error) string {
			var e *ExhaustedError
			if errors.As(err, &e) {
				return e.What
			}
			return fmt.Sprint(err)
		}
		// All at once, before any of them is in the store.
		var calls []<-chan answer[Hold]
		for i := range 20 {
			c := make(chan answer[Hold], 1)
			calls = append(calls, c)
			go func() {
				g, err := r.own(fmt.Sprint("lock", i), time.Hour, 0, RequestID(100+i))
				c <- answer[Hold]{g, err}
			}()
		}
		var granted []Hold
		for _, c := range calls {
			if a := <-c; a.err == nil {
				granted = append(granted, a.value)
			} else if exhausted(a.err) != "locks" {
				t.Fatal(a.err)
			}
		}
		if len(granted) != 6 {
			t.Fatalf("%d locks of 6", len(granted))
		}
		// What exists can be asked for, up to the bound on waiters.
		name := granted[0].Locks[0].Name
		first := background(func() (Hold, error) { return r.own(name, time.Hour, WaitForever, 1) })
		second := background(func() (Hold, error) { return r.own(name, time.Hour, WaitForever, 2) })
		if _, err := r.own(name, time.Hour, WaitForever, 3); exhausted(err) != "leases" {
			t.Fatal(err)
		}
		if err := r.RevokeLease(ctx, granted[5].Lease, ""); err != nil {
			t.Fatal(err)
		}
		if _, err := r.own(name, time.Hour, WaitForever, 3); exhausted(err) != "waiters" {
			t.Fatal(err)
		}
		// A repeat takes no more room; neither does giving back.
		again := background(func() (Hold, error) { return r.own(name, time.Hour, WaitForever, 2) })
		if a := <-second; !errors.Is(a.err, ErrSuperseded) {
			t.Fatal(a.err)
		}
		r.release(granted[0])
		a := <-first
		if a.err != nil {
			t.Fatal(a.err)
		}
		r.release(a.value)
		if a = <-again; a.err != nil {
			t.Fatal(a.err)
		}
		if _, err := r.Acquire(ctx, AcquireRequest{Names: []string{"new1", "new2", name}, TTL: time.Hour}); exhausted(err) != "locks" {
			t.Fatal(err)
		}
		if err := r.Declare(ctx, "new1"); err != nil {
			t.Fatal(err)
		}
		if err := r.Declare(ctx, "new2"); exhausted(err) != "locks" {
			t.Fatal(err)
		}
		if r.loop.reserved != (room{}) {
			t.Errorf("still reserved: %+v", r.loop.reserved)
		}
	})
}

func TestABatchIsBounded(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r, l := startScript(t)
		defer r.stop()
		l.holding(true, false)
		first := background(func() (Hold, error) { return r.own("first", time.Hour, 0, 0) })
		const n = 400
		done := make(chan error, n)
		for i := range n {
			var list []string
			for j := range 64 {
				list = append(list, fmt.Sprint(i, "/", j, "/", strings.Repeat("x", 490)))
			}
			go func() {
				_, err := r.Acquire(context.Background(), AcquireRequest{Names: list, TTL: time.Hour})
				done <- err
			}()
		}
		synctest.Wait()
		if batches, _ := l.held(); batches != maxFlights {
			t.Errorf("%d batches are in the log", batches)
		}
		l.holding(false, false)
		for range maxFlights {
			l.commit()
		}
		<-first
		for range n {
			if err := <-done; err != nil {
				t.Fatal(err)
			}
		}
		const one = 64 * 520
		if largest := slices.Max(l.sizes); largest > maxBytes+one || largest < maxBytes-one {
			t.Errorf("a batch of %d bytes, the bound is %d", largest, maxBytes)
		}
		if want := 1 + maxFlights + n*one/maxBytes; len(l.sizes) > want+1 {
			t.Errorf("%d batches instead of %d", len(l.sizes), want)
		}
	})
}

// TestAMassExpiryIsSmearedAndNeverEarly: everything falls due together, and
// other work goes on in between.
func TestAMassExpiryIsSmearedAndNeverEarly(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r, l := startScript(t)
		defer r.stop()
		const n = 3*maxExpiries + 1
		var batch []machine.Command
		for range n {
			batch = append(batch, &machine.GrantLease{TTL: machine.Duration(time.Second)})
		}
		l.store.Apply(machine.Batch{Commands: batch})
		l.lead(2) // arms them
		synctest.Wait()
		time.Sleep(time.Second - time.Nanosecond)
		if got := r.Status().Leases; got != n {
			t.Fatalf("%d leases ended early", n-got)
		}
		l.holding(true, false)
		time.Sleep(tick + time.Nanosecond)
		other := background(func() (Hold, error) { return r.own("a", time.Minute, 0, 0) })
		l.commit()
		if got := r.Status().Leases; got != n-maxExpiries {
			t.Fatalf("%d leases after the first batch", got)
		}
		pendingNow(t, other, "what came during the first batch")
		l.commit()
		if a := <-other; a.err != nil { // not behind all of the expiries
			t.Fatal(a.err)
		}
		for i := range 2 {
			if i == 0 { // others have asked meanwhile: their turn comes first
				if held, _ := l.held(); held != 0 {
					t.Fatalf("%d batches where nothing may be proposed", held)
				}
				time.Sleep(tick)
			}
			synctest.Wait()
			if held, _ := l.held(); held != 1 {
				t.Fatalf("%d batches at step %d", held, i)
			}
			l.commit()
		}
		synctest.Wait()
		if got := r.Status().Leases; got != 1 {
			t.Fatalf("%d leases in the end", got)
		}
	})
}

func TestListsAndReads(t *testing.T) {
	bubble(t, func(t *testing.T, r *rig) {
		ctx := context.Background()
		var leases []ID
		for i := range 5 {
			g, err := r.Acquire(ctx, AcquireRequest{Names: []string{fmt.Sprint("p/", i)}, TTL: time.Minute, LockDelay: time.Minute})
			if err != nil {
				t.Fatal(err)
			}
			leases = append(leases, g.Lease)
		}
		if _, err := r.own("q", time.Minute, 0, 0); err != nil {
			t.Fatal(err)
		}
		if err := r.ForceRelease(ctx, "p/2", 0, "me"); err != nil {
			t.Fatal(err)
		}
		time.Sleep(10 * time.Second)
		var got []string
		for after, more := "", true; more; {
			var list []LockInfo
			var err error
			if list, more, _, err = r.Locks(ctx, "p/", after, 2); err != nil || len(list) == 0 {
				t.Fatal(list, err)
			}
			for _, k := range list {
				got = append(got, fmt.Sprint(k.Name, " ", k.HolderCount, " ", k.DelayRemaining))
				after = k.Name
			}
		}
		want := []string{"p/0 1 0s", "p/1 1 0s", "p/2 0 50s", "p/3 1 0s", "p/4 1 0s"}
		if !slices.Equal(got, want) {
			t.Errorf("locks: %q", got)
		}
		if list, more, _, err := r.Locks(ctx, "", "p/4", 0); err != nil || more || len(list) != 1 || list[0].Name != "q" {
			t.Errorf("behind the last: %v %v %v", list, more, err)
		}
		var ids []ID
		for after, more := ID(0), true; more; {
			var list []LeaseInfo
			var err error
			if list, more, err = r.Leases(ctx, after, 2); err != nil || len(list) == 0 {
				t.Fatal(list, err)
			}
			for _, l := range list {
				if l.Remaining != 50*time.Second {
					t.Errorf("lease %d has %v left", l.ID, l.Remaining)
				}
				ids = append(ids, l.ID)
				after = l.ID
			}
		}
		if !slices.Equal(ids[:4], append(leases[:2:2], leases[3:]...)) {
			t.Errorf("leases %v of %v", ids, leases)
		}
		info, revision, err := r.Lock(ctx, "p/2")
		if err != nil || info.DelayRemaining != 50*time.Second || revision != r.Status().Revision {
			t.Errorf("%+v %d %v", info, revision, err)
		}
		if info, _, err := r.Lock(ctx, "nobody's"); err != nil || info.Name != "nobody's" || info.HolderCount != 0 {
			t.Errorf("%+v %v", info, err)
		}
		if c, err := r.CheckToken(ctx, "p/3", 4); err != nil || c != (TokenCheck{Live: true, Current: 4, Last: 4, Floor: 4}) {
			t.Errorf("%+v %v", c, err)
		}
		if c, err := r.CheckToken(ctx, "p/2", 3); err != nil || c.Live || c.Current != 0 || c.Floor != 0 {
			t.Errorf("%+v %v", c, err)
		}
		if _, err := r.Lease(ctx, leases[2]); reason(err) != machine.ReasonLeaseEnded {
			t.Error(err)
		}
		if _, err := r.Lease(ctx, 99); reason(err) != machine.ReasonLeaseNotFound {
			t.Error(err)
		}
		s := r.Status()
		if !s.Leader || s.Term != 1 || s.LastToken != 6 {
			t.Errorf("%+v", s)
		}
	})
}

// TestTheOriginalsLocks: declared, with a clock of their own.
func TestTheOriginalsLocks(t *testing.T) {
	bubble(t, func(t *testing.T, r *rig) {
		ctx := context.Background()
		acquire := func() (Hold, error) {
			return r.Acquire(ctx, AcquireRequest{Names: []string{"k"}, TTL: time.Minute, Declared: true})
		}
		if _, err := acquire(); reason(err) != machine.ReasonLockNotDeclared {
			t.Fatal(err)
		}
		if err := r.Declare(ctx, "k"); err != nil {
			t.Fatal(err)
		}
		if err := r.Declare(ctx, "k"); reason(err) != machine.ReasonLockDeclared {
			t.Fatal(err)
		}
		g, err := acquire()
		if err != nil || g.Locks[0].Clock != 1 {
			t.Fatal(g, err)
		}
		if err := r.ReleaseClock(ctx, "k", 2); reason(err) != machine.ReasonClockDisagrees {
			t.Fatal(err)
		}
		if err := r.ReleaseClock(ctx, "k", 1); err != nil {
			t.Fatal(err)
		}
		if err := r.Undeclare(ctx, "k"); err != nil {
			t.Fatal(err)
		}
		r.empty()
	})
}

func TestBadInputChangesNothing(t *testing.T) {
	bubble(t, func(t *testing.T, r *rig) {
		ctx := context.Background()
		good := AcquireRequest{Names: []string{"a"}, TTL: time.Minute}
		long, broken := strings.Repeat("x", MaxName+1), "a\xff"
		metadata := []machine.Meta{{Key: "k", Value: strings.Repeat("v", MaxMetadata)}}
		acquire := func(edit func(*AcquireRequest)) error {
			q := good
			edit(&q)
			_, err := r.Acquire(ctx, q)
			return err
		}
		second := func(_ any, err error) error { return err }
		for _, c := range []struct {
			field string
			err   error
		}{
			{"names", acquire(func(q *AcquireRequest) { q.Names = nil })},
			{"names", acquire(func(q *AcquireRequest) { q.Names = make([]string, 65) })},
			{"names", acquire(func(q *AcquireRequest) { q.Names = []string{"b", "a", "b"} })},
			{"name", acquire(func(q *AcquireRequest) { q.Names = []string{""} })},
			{"name", acquire(func(q *AcquireRequest) { q.Names = []string{long} })},
			{"name", acquire(func(q *AcquireRequest) { q.Names = []string{broken} })},
			{"mode", acquire(func(q *AcquireRequest) { q.Mode = 3 })},
			{"limit", acquire(func(q *AcquireRequest) { q.Limit = 2 })},
			{"wait", acquire(func(q *AcquireRequest) { q.Wait = -2 })},
			{"ttl", acquire(func(q *AcquireRequest) { q.TTL = 0 })},
			{"ttl", acquire(func(q *AcquireRequest) { q.TTL = -time.Second })},
			{"ttl", acquire(func(q *AcquireRequest) { q.TTL = 100 * 365 * 24 * time.Hour })},
			{"ttl", acquire(func(q *AcquireRequest) { q.Lease = 1 })},
			{"lock_delay", acquire(func(q *AcquireRequest) { q.LockDelay = -1 })},
			{"lock_delay", acquire(func(q *AcquireRequest) { q.LockDelay = 2 * time.Hour })},
			{"request_id", acquire(func(q *AcquireRequest) { q.Request = 1 << 63 })},
			{"lowest_open_request_id", acquire(func(q *AcquireRequest) { q.Request, q.LowestOpen = 1, 1 })},
			{"lowest_open_request_id", acquire(func(q *AcquireRequest) { q.Lease, q.TTL, q.Request, q.LowestOpen = 1, 0, 1, 2 })},
			{"owner", acquire(func(q *AcquireRequest) { q.Owner = long })},
			{"actor", acquire(func(q *AcquireRequest) { q.Actor = broken })},
			{"metadata", acquire(func(q *AcquireRequest) { q.Metadata = metadata })},
			{"metadata", acquire(func(q *AcquireRequest) { q.Metadata = []machine.Meta{{Key: broken}} })},
			{"ttl", second(r.GrantLease(ctx, GrantLeaseRequest{}))},
			{"owner", second(r.GrantLease(ctx, GrantLeaseRequest{TTL: time.Minute, Owner: broken}))},
			{"metadata", second(r.GrantLease(ctx, GrantLeaseRequest{TTL: time.Minute, Metadata: metadata}))},
			{"request_id", second(r.GrantLease(ctx, GrantLeaseRequest{TTL: time.Minute, Request: 1 << 63}))},
			{"by", r.RevokeLease(ctx, 1, long)},
			{"token", r.Release(ctx, ReleaseRequest{Name: "a"})},
			{"name", r.Release(ctx, ReleaseRequest{Token: 1})},
			{"name", r.ForceRelease(ctx, "", 0, "")},
			{"by", r.ForceRelease(ctx, "a", 0, broken)},
			{"request_id", r.Abandon(ctx, 1, 0)},
			{"request_id", r.Abandon(ctx, 0, 1<<63)},
			{"token", second(r.CheckToken(ctx, "a", 0))},
			{"name", second(r.CheckToken(ctx, long, 1))},
			{"name", func() error { _, _, err := r.Lock(ctx, ""); return err }()},
			{"key", r.Declare(ctx, "")},
			{"key", r.Undeclare(ctx, long)},
			{"key", r.ReleaseClock(ctx, broken, 1)},
		} {
			var invalid *InvalidError
			if !errors.As(c.err, &invalid) || invalid.Field != c.field || strings.Contains(c.err.Error(), "\n") {
				t.Errorf("%s: %v", c.field, c.err)
			}
		}
		if s := r.Status(); s.Revision != 0 {
			t.Errorf("something has changed: %+v", s)
		}
	})
}

func TestAWaitBeyondAllTimeIsNoTimeout(t *testing.T) {
	bubble(t, func(t *testing.T, r *rig) {
		g, err := r.own("a", time.Minute, 0, 0)
		if err != nil {
			t.Fatal(err)
		}
		call := background(func() (Hold, error) { return r.own("a", time.Minute, math.MaxInt64, 0) })
		time.Sleep(30 * time.Second)
		pendingNow(t, call, "a wait of 292 years")
		r.release(g)
		if a := <-call; a.err != nil {
			t.Fatal(a.err)
		}
	})
}
