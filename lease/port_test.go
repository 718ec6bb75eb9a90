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

// submit hands one batch to a port.
func submit(t *testing.T, p *Port, fill func(*Batch)) {
	t.Helper()
	b := p.Batch(1)
	fill(b)
	p.Submit(b)
}

// replies waits until everybody waits, and takes what there is, by tag.
func replies(t *testing.T, p *Port) (map[uint64]Reply, []Loss) {
	t.Helper()
	synctest.Wait()
	list, losses := p.Take(nil, nil)
	byTag := make(map[uint64]Reply)
	for _, r := range list {
		if _, twice := byTag[r.Tag]; twice {
			t.Errorf("operation %d is answered twice", r.Tag)
		}
		byTag[r.Tag] = r
	}
	p.Sent(list)
	return byTag, losses
}

func own(request RequestID, wait time.Duration, names ...string) AcquireRequest {
	return AcquireRequest{Request: request, Names: names, TTL: time.Minute, Wait: wait, Owner: "o"}
}

func TestPortAnswersEachOperation(t *testing.T) {
	bubble(t, func(t *testing.T, r *rig) {
		p := r.NewPort(100, NewShare(100, 1000))
		defer p.Close(false)
		submit(t, p, func(b *Batch) {
			b.Acquire(1, own(1, 0, "a"))
			b.Acquire(2, own(2, 0, "a"))
			b.Acquire(3, own(3, 0))
			b.GrantLease(4, GrantLeaseRequest{TTL: time.Second})
			b.Release(5, ReleaseRequest{Lease: 1})
			b.Abandon(6, 0, 0)
			b.KeepAlive(7, []ID{99})
			b.CheckToken(8, "a", 1)
			b.RevokeLease(9, 99, "me")
			b.ForceRelease(10, "", 0, "me")
			b.Refuse(11, ErrStopping)
		})
		got, _ := replies(t, p)
		if len(got) != 11 {
			t.Fatalf("%d answers: %+v", len(got), got)
		}
		g := got[1]
		var held *HeldError
		var invalid *InvalidError
		var refusal *Refusal
		switch {
		case g.Err != nil || g.Op != OpAcquire || g.Hold.Token == 0 || g.TTL != time.Minute:
			t.Errorf("granted: %+v", g)
		case !errors.As(got[2].Err, &held) || held.Explain.Obstacles[0].Holders[0].Token != g.Hold.Token:
			t.Errorf("held: %+v", got[2])
		case !errors.As(got[3].Err, &invalid) || invalid.Field != "names":
			t.Errorf("no names: %+v", got[3])
		case got[4].Err != nil || got[4].Lease == 0 || got[4].TTL != time.Second:
			t.Errorf("lease: %+v", got[4])
		case !errors.As(got[5].Err, &invalid) || invalid.Field != "token":
			t.Errorf("release without a token: %+v", got[5])
		case !errors.As(got[6].Err, &invalid) || invalid.Field != "request_id":
			t.Errorf("abandon of nothing: %+v", got[6])
		case got[7].Err != nil || !errors.As(got[7].KeptAlive.Leases[0].Err, &refusal):
			t.Errorf("renewal of no lease: %+v", got[7])
		case got[8].Err != nil || got[8].Check == nil:
			t.Errorf("check: %+v", got[8])
		case !errors.As(got[9].Err, &refusal) || refusal.Reason != machine.ReasonLeaseNotFound:
			t.Errorf("revoke: %+v", got[9])
		case !errors.As(got[10].Err, &invalid):
			t.Errorf("force: %+v", got[10])
		case !errors.Is(got[11].Err, ErrStopping):
			t.Errorf("refused: %+v", got[11])
		}
		submit(t, p, func(b *Batch) {
			b.Release(1, ReleaseRequest{Lease: g.Hold.Lease, Token: g.Hold.Token})
			b.KeepAlive(2, []ID{got[4].Lease})
			b.RevokeLease(3, got[4].Lease, "me")
		})
		got, losses := replies(t, p)
		if got[1].Err != nil || got[1].Op != OpRelease || got[2].KeptAlive.Leases[0].TTL != time.Second || got[3].Err != nil {
			t.Errorf("%+v", got)
		}
		if len(losses) != 1 || losses[0].Cause != machine.EndRevoked || losses[0].By != "me" || losses[0].Token != 0 {
			t.Errorf("losses: %+v", losses)
		}
		if !p.Idle() {
			t.Error("something is under way")
		}
	})
}

// TestAWaitOnAPortHoldsUpNobody: with a bound of 2 and many waits, a release
// gets through.
func TestAWaitOnAPortHoldsUpNobody(t *testing.T) {
	bubble(t, func(t *testing.T, r *rig) {
		p := r.NewPort(2, NewShare(50, 1000))
		defer p.Close(false)
		submit(t, p, func(b *Batch) { b.Acquire(1, own(1, 0, "a")) })
		got, _ := replies(t, p)
		holder := got[1].Hold
		for i := range uint64(50) {
			submit(t, p, func(b *Batch) { b.Acquire(100+i, own(RequestID(100+i), WaitForever, "a")) })
		}
		synctest.Wait() // they wait: until then they are only under way
		submit(t, p, func(b *Batch) { b.Acquire(200, own(200, WaitForever, "b")) })
		got, _ = replies(t, p)
		var exhausted *ExhaustedError
		if len(got) != 1 || !errors.As(got[200].Err, &exhausted) {
			t.Fatalf("one wait too many: %+v", got)
		}
		for i := range uint64(50) {
			submit(t, p, func(b *Batch) { b.Release(1, ReleaseRequest{Lease: holder.Lease, Token: holder.Token}) })
			got, _ = replies(t, p)
			if len(got) != 2 || got[1].Err != nil || got[100+i].Err != nil {
				t.Fatalf("after %d: %+v", i, got)
			}
			holder = got[100+i].Hold
		}
	})
}

// TestASlowPortHoldsUpItsReader: what is not taken counts as under way.
func TestASlowPortHoldsUpItsReader(t *testing.T) {
	bubble(t, func(t *testing.T, r *rig) {
		p := r.NewPort(10, NewShare(10, 1000))
		defer p.Close(false)
		for i := range uint64(10) {
			submit(t, p, func(b *Batch) { b.Acquire(i+1, own(RequestID(i+1), 0, fmt.Sprint("a", i))) })
		}
		synctest.Wait()
		ctx, cancel := context.WithCancelCause(t.Context())
		room := make(chan error, 1)
		go func() { room <- p.Room(ctx) }()
		synctest.Wait()
		select {
		case err := <-room:
			t.Fatalf("there is room: %v", err)
		default:
		}
		list, _ := p.Take(nil, nil)
		p.Sent(list[:1])
		if err := <-room; err != nil {
			t.Fatal(err)
		}
		submit(t, p, func(b *Batch) { b.Refuse(99, ErrStopping) })
		go func() { room <- p.Room(ctx) }()
		synctest.Wait()
		cancel(ErrStopping)
		if err := <-room; !errors.Is(err, ErrStopping) {
			t.Fatal(err)
		}
	})
}

// TestPortsOfOneConnectionHoldUpEachOther: when they have too much under way together,
// none has room, and all have again once one of them has sent its answers, or is closed.
func TestPortsOfOneConnectionHoldUpEachOther(t *testing.T) {
	bubble(t, func(t *testing.T, r *rig) {
		share := NewShare(10, 20)
		refuse := func(b *Batch) {
			for i := range uint64(10) {
				b.Refuse(i, ErrStopping)
			}
		}
		var ports []*Port
		for range 5 {
			ports = append(ports, r.NewPort(5, share))
		}
		submit(t, ports[0], refuse)
		submit(t, ports[1], refuse)
		room := make(chan error, 5)
		for _, p := range ports[2:] {
			go func() { room <- p.Room(t.Context()) }()
		}
		synctest.Wait()
		if len(room) > 0 {
			t.Error("there is room")
		}
		list, _ := ports[0].Take(nil, nil)
		ports[0].Sent(list[:1])
		synctest.Wait()
		if len(room) != 3 {
			t.Errorf("%d of 3 have room when one was sent", len(room))
		}
		submit(t, ports[2], refuse)
		for _, p := range ports[3:] {
			go func() { room <- p.Room(t.Context()) }()
		}
		synctest.Wait()
		if len(room) != 3 {
			t.Error("there is room again")
		}
		ports[1].Close(false)
		synctest.Wait()
		if len(room) != 5 {
			t.Errorf("%d have room when one was closed", len(room)-3)
		}
		for _, p := range ports {
			if p != ports[1] {
				p.Close(false)
			}
		}
		synctest.Wait()
		if n := share.under.Load(); n != 0 {
			t.Errorf("%d are under way", n)
		}
	})
}

func TestCancelOnAPort(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r, l := startScript(t)
		defer r.stop()
		p := r.NewPort(100, NewShare(100, 1000))
		defer p.Close(false)
		submit(t, p, func(b *Batch) { b.Acquire(1, own(1, 0, "a")); b.Acquire(2, own(2, WaitForever, "a")) })
		if got, _ := replies(t, p); len(got) != 1 || got[1].Err != nil {
			t.Fatalf("%+v", got)
		}
		submit(t, p, func(b *Batch) { b.Cancel(2); b.Cancel(7) })
		if got, _ := replies(t, p); len(got) != 1 || !errors.Is(got[2].Err, context.Canceled) {
			t.Fatalf("a wait: %+v", got)
		}
		if n := r.Status().Waiters; n != 0 {
			t.Errorf("%d waiters", n)
		}
		// A grant that is in the log when it is cancelled is undone, and has its
		// weight until it is.
		l.holding(true, false)
		submit(t, p, func(b *Batch) { b.Acquire(3, own(3, 0, "b")) })
		submit(t, p, func(b *Batch) { b.Cancel(3) })
		if got, _ := replies(t, p); len(got) != 0 || p.under.Load() != 1 {
			t.Fatalf("in the log: %+v, weight %d", got, p.under.Load())
		}
		l.holding(false, false)
		l.commit()
		if got, _ := replies(t, p); len(got) != 1 || !errors.Is(got[3].Err, context.Canceled) {
			t.Errorf("undone: %+v", got)
		}
		if n := r.Status().Holds; n != 1 {
			t.Errorf("%d holds", n)
		}
	})
}

// TestAPortThatCloses: waits are abandoned and grants that nobody heard of are
// undone, unless the connection was lost and whoever it was may ask again.
func TestAPortThatCloses(t *testing.T) {
	for _, detached := range []bool{false, true} {
		t.Run(fmt.Sprint("detached ", detached), func(t *testing.T) {
			bubble(t, func(t *testing.T, r *rig) {
				p := r.NewPort(100, NewShare(100, 1000))
				submit(t, p, func(b *Batch) {
					b.Acquire(1, own(1, 0, "a"))
					b.Acquire(2, own(2, WaitForever, "a"))
					b.Acquire(3, own(0, WaitForever, "a"))
					b.Acquire(4, own(0, 0, "b")) // granted, and nobody could ask for it again
				})
				synctest.Wait()
				p.Close(detached)
				synctest.Wait()
				status := r.Status()
				holds, waiters := 0, 0
				if detached {
					holds, waiters = 1, 1
				}
				if status.Holds != holds || status.Waiters != waiters {
					t.Errorf("%d holds, %d waiters", status.Holds, status.Waiters)
				}
				if detached { // the place is found again, and lost after a TTL
					again := r.NewPort(10, NewShare(10, 1000))
					defer again.Close(false)
					submit(t, again, func(b *Batch) { b.Acquire(1, own(1, 0, "a")); b.Acquire(2, own(2, WaitForever, "a")) })
					got, _ := replies(t, again)
					if len(got) != 1 || got[1].Err != nil {
						t.Fatalf("%+v", got)
					}
					time.Sleep(90 * time.Second)
					got, losses := replies(t, again)
					if got[2].Err != nil || len(losses) != 1 || losses[0].Cause != machine.EndExpired {
						t.Errorf("%+v, losses %+v", got, losses)
					}
				}
			})
		})
	}
}

// TestLossesOnAPort: each port hears of what it granted or renewed last, once,
// and of no clean end.
func TestLossesOnAPort(t *testing.T) {
	bubble(t, func(t *testing.T, r *rig) {
		p, q := r.NewPort(100, NewShare(100, 1000)), r.NewPort(100, NewShare(100, 1000))
		defer p.Close(false)
		defer q.Close(false)
		submit(t, p, func(b *Batch) {
			b.GrantLease(1, GrantLeaseRequest{TTL: time.Second})
			b.GrantLease(2, GrantLeaseRequest{TTL: time.Hour})
			b.Acquire(3, own(3, 0, "released"))
			b.Acquire(4, own(4, 0, "forced"))
			b.Acquire(5, AcquireRequest{Lease: 2, Request: 1, LowestOpen: 1, Names: []string{"under"}})
		})
		got, _ := replies(t, p)
		if got[1].Lease != 1 || got[2].Lease != 2 || got[5].Err != nil || got[5].TTL != time.Hour {
			t.Fatalf("%+v", got)
		}
		submit(t, q, func(b *Batch) { b.KeepAlive(1, []ID{1}) })
		replies(t, q)
		submit(t, p, func(b *Batch) {
			b.Release(1, ReleaseRequest{Lease: got[3].Hold.Lease, Token: got[3].Hold.Token})
			b.ForceRelease(2, "forced", 0, "ops")
			b.ForceRelease(3, "under", 0, "ops")
		})
		_, losses := replies(t, p)
		want := []Loss{
			{Lease: got[4].Hold.Lease, Token: got[4].Hold.Token, Cause: machine.EndForceReleased, By: "ops"},
			{Lease: got[4].Hold.Lease, Cause: machine.EndForceReleased, By: "ops"},
			{Lease: 2, Token: got[5].Hold.Token, Cause: machine.EndForceReleased, By: "ops"},
		}
		if fmt.Sprint(losses) != fmt.Sprint(want) {
			t.Errorf("losses %+v, want %+v", losses, want)
		}
		time.Sleep(2 * time.Second)
		if _, losses := replies(t, p); len(losses) != 0 {
			t.Errorf("of another's lease: %+v", losses)
		}
		if _, losses := replies(t, q); len(losses) != 1 || losses[0] != (Loss{Lease: 1, Cause: machine.EndExpired}) {
			t.Errorf("of the lease renewed: %+v", losses)
		}
	})
}

// TestAPortOverFailures: whatever is under way is answered when the node loses
// its leadership, drains or ends.
func TestAPortOverFailures(t *testing.T) {
	for name, fail := range map[string]func(*rig, *script) error{
		"loses":  func(_ *rig, l *script) error { l.lose("there:1"); return ErrNotLeader },
		"drains": func(r *rig, _ *script) error { r.Drain(); return ErrStopping },
		"ends":   func(r *rig, _ *script) error { r.cancel(); return ErrStopping },
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				r, l := startScript(t)
				defer r.log.Close()
				p := r.NewPort(100, NewShare(100, 1000))
				submit(t, p, func(b *Batch) { b.Acquire(1, own(1, 0, "a")); b.Acquire(2, own(2, WaitForever, "a")) })
				if got, _ := replies(t, p); len(got) != 1 {
					t.Fatalf("%+v", got)
				}
				want := fail(r, l)
				got, _ := replies(t, p)
				if len(got) != 1 || !errors.Is(got[2].Err, want) {
					t.Errorf("the wait: %+v", got)
				}
				submit(t, p, func(b *Batch) { b.Acquire(3, own(3, 0, "c")); b.KeepAlive(4, []ID{1}) })
				got, _ = replies(t, p)
				if !errors.Is(got[3].Err, want) || name != "drains" && !errors.Is(got[4].Err, want) {
					t.Errorf("afterwards: %+v", got)
				}
				if !p.Idle() {
					t.Error("something is under way")
				}
				p.Close(false)
				r.cancel()
				<-r.ended
			})
		})
	}
}

// A reader may submit after its writer has closed the port: that is for nobody.
func TestSubmittedToAPortThatIsClosed(t *testing.T) {
	bubble(t, func(t *testing.T, r *rig) {
		p := r.NewPort(100, NewShare(100, 1000))
		q := r.NewPort(100, NewShare(100, 1000))
		defer q.Close(false)
		submit(t, q, func(b *Batch) { b.Acquire(1, own(1, 0, "a")) })
		if got, _ := replies(t, q); got[1].Err != nil {
			t.Fatal(got[1].Err)
		}
		p.Close(true)
		submit(t, p, func(b *Batch) { b.Acquire(1, own(2, WaitForever, "a")) })
		synctest.Wait()
		time.Sleep(50 * time.Second)
		submit(t, q, func(b *Batch) { b.KeepAlive(2, []ID{1}) })
		synctest.Wait()
		time.Sleep(50 * time.Second) // more than a TTL without a client
		if n := r.Status().Waiters; n != 0 {
			t.Errorf("%d wait for nobody", n)
		}
	})
}

// TestWaitsOfOneConnection: ports that share waits have one bound together, and one
// that is closed gives its part back.
func TestWaitsOfOneConnection(t *testing.T) {
	bubble(t, func(t *testing.T, r *rig) {
		holder, err := r.own("a", time.Hour, 0, 0)
		if err != nil {
			t.Fatal(err)
		}
		shared := NewShare(2, 1000)
		p, q := r.NewPort(100, shared), r.NewPort(100, shared)
		submit(t, p, func(b *Batch) { b.Acquire(1, own(1, WaitForever, "a")); b.Acquire(2, own(2, WaitForever, "a")) })
		synctest.Wait()
		submit(t, q, func(b *Batch) { b.Acquire(1, own(3, WaitForever, "a")) })
		var exhausted *ExhaustedError
		if got, _ := replies(t, q); !errors.As(got[1].Err, &exhausted) {
			t.Errorf("a third wait: %+v", got[1])
		}
		p.Close(false)
		synctest.Wait()
		submit(t, q, func(b *Batch) { b.Acquire(2, own(4, WaitForever, "a")); b.Acquire(3, own(5, WaitForever, "a")) })
		if got, _ := replies(t, q); len(got) != 0 {
			t.Errorf("with room: %+v", got)
		}
		submit(t, q, func(b *Batch) { b.Cancel(2); b.Cancel(3) })
		replies(t, q)
		submit(t, q, func(b *Batch) { b.Acquire(4, own(6, WaitForever, "a")); b.Acquire(5, own(7, WaitForever, "a")) })
		if got, _ := replies(t, q); len(got) != 0 {
			t.Errorf("after cancels: %+v", got)
		}
		q.Close(false)
		r.release(holder)
	})
}

// TestACancelWeighs: what cancels counts until it has been taken in, like what it
// cancels.
func TestACancelWeighs(t *testing.T) {
	bubble(t, func(t *testing.T, r *rig) {
		p := r.NewPort(100, NewShare(100, 1000))
		b := p.Batch(10)
		for i := range 10 {
			b.Cancel(uint64(i + 1))
		}
		if b.weight != 10 {
			t.Errorf("ten weigh %d", b.weight)
		}
		p.Submit(b)
		synctest.Wait()
		if n := p.under.Load(); n != 0 {
			t.Errorf("%d are under way", n)
		}
		p.Close(false)
	})
}
