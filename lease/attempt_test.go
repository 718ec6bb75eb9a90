package lease

import (
	"context"
	"errors"
	"fmt"
	"testing"
	"testing/synctest"
	"time"

	"github.com/distlock/distlock/lease/machine"
)

// attempt is the nth call of request 1, for lock a, with a lease of its own.
func (r *rig) attempt(ctx context.Context, n uint32, wait time.Duration) (Hold, error) {
	return r.Acquire(ctx, AcquireRequest{Request: 1, Attempt: n, Names: []string{"a"}, TTL: time.Minute, Wait: wait})
}

// TestTheEndOfAnAttemptUndoesNothing ends the first call of a request at each
// step of its way, before or after its repeat has come: the repeat gets the
// grant, and keeps it.
func TestTheEndOfAnAttemptUndoesNothing(t *testing.T) {
	for _, counted := range []bool{true, false} {
		for _, step := range []string{"pending", "in flight", "parked", "granted"} {
			for _, after := range []bool{true, false} {
				if !counted && !after {
					continue // then there is nothing yet that it could undo wrongly
				}
				t.Run(fmt.Sprint("counted ", counted, " ", step, " after ", after), func(t *testing.T) {
					synctest.Test(t, func(t *testing.T) { endOfAnAttempt(t, counted, step, after) })
				})
			}
		}
	}
}

func endOfAnAttempt(t *testing.T, counted bool, step string, after bool) {
	r, l := startScript(t)
	defer r.stop()
	number := func(n uint32) uint32 {
		if counted {
			return n
		}
		return 0
	}
	holder, err := r.own("a", time.Hour, 0, 9)
	if err != nil {
		t.Fatal(err)
	}
	if step == "granted" {
		r.release(holder)
	}
	l.holding(step != "parked", false)
	if step == "pending" {
		for _, grant := range l.fill(r) {
			defer func() { <-grant }()
		}
	}
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	first := background(func() (Hold, error) { return r.attempt(ctx, number(1), WaitForever) })
	synctest.Wait()
	if step == "granted" {
		// Its answer is on its way when its caller goes.
		p := l.take()
		out := l.store.Apply(p.batch)
		r.inbox.put(onLoop(func() { cancel() }))
		p.done(out, nil)
		after = after && counted
	}
	if !after {
		cancel()
		synctest.Wait()
	}
	second := background(func() (Hold, error) { return r.attempt(context.Background(), number(2), WaitForever) })
	synctest.Wait()
	cancel()
	synctest.Wait()
	l.holding(false, false)
	for n, _ := l.held(); n > 0; n, _ = l.held() {
		l.commit()
	}
	if step != "granted" {
		pendingNow(t, second, "the repeat")
		r.release(holder)
	}
	<-first
	got := <-second
	if got.err != nil {
		if !counted && step == "granted" { // undone before the repeat came: it is told so
			if reason(got.err) != machine.ReasonRequestEnded {
				t.Fatal(got.err)
			}
			return
		}
		t.Fatal(got.err)
	}
	synctest.Wait()
	if check, err := r.CheckToken(t.Context(), "a", got.value.Token); err != nil || !check.Live {
		t.Fatalf("the repeat was told that it holds the lock: %+v %v", check, err)
	}
}

// TestALateAttemptDisplacesNoLaterOne: the first call arrives after its repeat.
func TestALateAttemptDisplacesNoLaterOne(t *testing.T) {
	bubble(t, func(t *testing.T, r *rig) {
		holder, err := r.own("a", time.Hour, 0, 9)
		if err != nil {
			t.Fatal(err)
		}
		second := background(func() (Hold, error) { return r.attempt(context.Background(), 2, WaitForever) })
		pendingNow(t, second, "the repeat")
		for _, late := range []uint32{1, 0} {
			if _, err := r.attempt(context.Background(), late, WaitForever); !errors.Is(err, ErrSuperseded) {
				t.Fatalf("attempt %d: %v", late, err)
			}
		}
		pendingNow(t, second, "the repeat")
		third := background(func() (Hold, error) { return r.attempt(context.Background(), 3, WaitForever) })
		if got := <-second; !errors.Is(got.err, ErrSuperseded) {
			t.Fatal(got.err)
		}
		r.release(holder)
		if got := <-third; got.err != nil {
			t.Fatal(got.err)
		}
	})
}

// TestAWaitLivesForItsTTL: a waiter that counts attempts renews its wait, by
// its request. One that does not any more leaves the queue after its TTL,
// whatever its connection says; one whose call has ended keeps its place as
// long.
func TestAWaitLivesForItsTTL(t *testing.T) {
	for _, connected := range []bool{true, false} {
		t.Run(fmt.Sprint("connected ", connected), func(t *testing.T) {
			bubble(t, func(t *testing.T, r *rig) {
				if _, err := r.own("a", time.Hour, 0, 9); err != nil {
					t.Fatal(err)
				}
				ctx, cancel := context.WithCancel(context.Background())
				defer cancel()
				wait := background(func() (Hold, error) { return r.attempt(ctx, 1, WaitForever) })
				synctest.Wait()
				if !connected {
					cancel()
				}
				keep := func() KeepWaiting {
					reply, err := r.Do(t.Context(), &KeepAliveRequest{Requests: []RequestID{1}})
					if err != nil {
						t.Fatal(err)
					}
					return reply.KeptAlive.Requests[0]
				}
				for range 5 {
					time.Sleep(40 * time.Second)
					if k := keep(); k.Err != nil || !k.Waiting || k.Attached != connected || k.TTL != time.Minute || k.Lease == 0 {
						t.Fatalf("%+v", k)
					}
				}
				time.Sleep(time.Minute + tick)
				synctest.Wait()
				if n := r.Status().Waiters; n != 0 {
					t.Fatalf("%d waiters a TTL after the last renewal", n)
				}
				got := <-wait
				if connected && reason(got.err) != machine.ReasonLeaseEnded || !connected && !errors.Is(got.err, context.Canceled) {
					t.Errorf("answered %v", got.err)
				}
				if k := keep(); reason(k.Err) != machine.ReasonRequestEnded {
					t.Errorf("%+v", k)
				}
				if k, _ := r.Do(t.Context(), &KeepAliveRequest{Requests: []RequestID{77}}); reason(k.KeptAlive.Requests[0].Err) != machine.ReasonRequestNotFound {
					t.Errorf("of a request that never came: %+v", k.KeptAlive.Requests)
				}
			})
		})
	}
}

// TestARenewedWaitThatWasGranted tells its caller to ask again.
func TestARenewedWaitThatWasGranted(t *testing.T) {
	bubble(t, func(t *testing.T, r *rig) {
		if _, err := r.attempt(t.Context(), 1, 0); err != nil {
			t.Fatal(err)
		}
		reply, err := r.Do(t.Context(), &KeepAliveRequest{Requests: []RequestID{1}})
		if err != nil {
			t.Fatal(err)
		}
		if k := reply.KeptAlive.Requests[0]; k.Err != nil || k.Waiting || k.Attached || k.Lease == 0 {
			t.Fatalf("%+v", k)
		}
	})
}

// TestAnExpiryThatTheLogRefuses while the leadership stays: a request that is
// repeated beside it lives for its TTL, or is told that nothing is known; it is
// not acknowledged and then ended.
func TestAnExpiryThatTheLogRefuses(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r, l := startScript(t)
		defer r.stop()
		if _, err := r.attempt(t.Context(), 1, 0); err != nil {
			t.Fatal(err)
		}
		l.holding(true, false)
		time.Sleep(time.Minute + tick)
		synctest.Wait()
		if n, _ := l.held(); n != 1 {
			t.Fatalf("%d batches in the log, not the expiry", n)
		}
		again := background(func() (Hold, error) { return r.attempt(context.Background(), 2, 0) })
		synctest.Wait()
		l.drop(1, false, ErrNotLeader)
		l.holding(false, false)
		for n, _ := l.held(); n > 0; n, _ = l.held() {
			l.commit()
		}
		got := <-again
		began := time.Now()
		switch {
		case got.err == nil:
			time.Sleep(time.Minute - tick)
			synctest.Wait()
			if check, err := r.CheckToken(t.Context(), "a", got.value.Token); err != nil || !check.Live {
				t.Fatalf("granted for a minute and gone %v later: %+v %v", time.Since(began), check, err)
			}
		case reason(got.err) != machine.ReasonRequestEnded && !errors.Is(got.err, ErrOutcomeUnknown):
			t.Fatal(got.err)
		}
	})
}

// TestARepeatWhoseLeaseIsBeingEnded is not acknowledged.
func TestARepeatWhoseLeaseIsBeingEnded(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r, l := startScript(t)
		defer r.stop()
		if _, err := r.attempt(t.Context(), 1, 0); err != nil {
			t.Fatal(err)
		}
		l.holding(true, false)
		again := background(func() (Hold, error) { return r.attempt(context.Background(), 2, 0) })
		synctest.Wait()
		p := l.take() // the repeat is in the log, and its answer takes long
		out := l.store.Apply(p.batch)
		time.Sleep(time.Minute + tick)
		synctest.Wait()
		r.inbox.put(onLoop(func() { // the expiry goes the same way behind it
			r.loop.leases[out.Results[0].Lease].expiring = true
		}))
		synctest.Wait()
		p.done(out, nil)
		if got := <-again; !errors.Is(got.err, ErrOutcomeUnknown) {
			t.Fatalf("%+v %v", got.value, got.err)
		}
		l.holding(false, false)
		for n, _ := l.held(); n > 0; n, _ = l.held() {
			l.commit()
		}
	})
}

// TestAStreamIDThatIsUsedTwice ends the stream: nobody could tell the answers
// apart, and the waiter that it hid would never be answered.
func TestAStreamIDThatIsUsedTwice(t *testing.T) {
	bubble(t, func(t *testing.T, r *rig) {
		p := r.NewPort(100, NewShare(100, 1000))
		submit(t, p, func(b *Batch) { b.Acquire(1, own(1, 0, "a")); b.Acquire(2, own(2, WaitForever, "a")) })
		if got, _ := replies(t, p); len(got) != 1 {
			t.Fatalf("%+v", got)
		}
		submit(t, p, func(b *Batch) { b.Acquire(2, own(3, WaitForever, "a")) })
		synctest.Wait()
		var invalid *InvalidError
		if !errors.As(p.Err(), &invalid) || invalid.Field != "id" {
			t.Fatal(p.Err())
		}
		p.Close(false)
		synctest.Wait()
		if n := r.Status().Waiters; n != 0 {
			t.Errorf("%d waiters", n)
		}
	})
}

// TestCancelledAcquisitionsKeepTheirWeight until what they did is known: a
// client that asks and cancels is held to the bound of its stream.
func TestCancelledAcquisitionsKeepTheirWeight(t *testing.T) {
	for _, number := range []uint32{0, 1} {
		t.Run(fmt.Sprint("attempt ", number), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				r, l := startScript(t)
				defer r.stop()
				if _, err := r.own("a", time.Hour, 0, 9); err != nil {
					t.Fatal(err)
				}
				p := r.NewPort(10, NewShare(100, 1000))
				defer p.Close(false)
				l.holding(true, false)
				ctx, cancel := context.WithCancel(t.Context())
				defer cancel()
				submitted := 0
				done := make(chan struct{})
				go func() {
					defer close(done)
					for i := uint64(1); i < 1000; i++ {
						b := p.Batch(2)
						ask := own(RequestID(i+100), WaitForever, "a")
						ask.Attempt = number
						b.Acquire(i, ask)
						b.Cancel(i)
						if p.Room(ctx) != nil {
							return
						}
						p.Submit(b)
						submitted++
					}
				}()
				synctest.Wait()
				if submitted > 10 {
					t.Errorf("%d acquisitions under way on a stream of 10", submitted)
				}
				cancel()
				<-done
				l.holding(false, false)
				for n, _ := l.held(); n > 0; n, _ = l.held() {
					l.commit()
				}
				got, _ := replies(t, p)
				for tag, reply := range got {
					if !errors.Is(reply.Err, context.Canceled) {
						t.Errorf("%d: %v", tag, reply.Err)
					}
				}
				if len(got) != submitted || p.under.Load() != 0 || p.parked != 0 {
					t.Errorf("%d of %d answered, weight %d, %d parked", len(got), submitted, p.under.Load(), p.parked)
				}
			})
		})
	}
}
