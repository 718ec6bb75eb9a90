package lease

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/distlock/distlock/lease/machine"
)

// chaotic is a log whose disk takes its time and which loses its leadership
// now and then, with a batch in flight that takes effect or does not. Sometimes
// it leaves out a loss that is followed by a gain.
type chaotic struct {
	script
	rng   *rand.Rand // under mu
	calm  bool       // under mu: nothing more is lost
	group sync.WaitGroup
}

func (l *chaotic) Propose(b machine.Batch, done func(machine.Outcome, error)) {
	l.mu.Lock()
	term, took, lost := l.term, time.Duration(l.rng.IntN(30))*time.Millisecond, !l.calm && l.rng.IntN(50) == 0
	l.mu.Unlock()
	l.group.Go(func() {
		if term == 0 {
			done(machine.Outcome{}, ErrNotLeader)
			return
		}
		time.Sleep(took)
		l.mu.Lock()
		defer l.mu.Unlock()
		if l.term == term && !lost {
			b.Term = term
			done(l.store.Apply(b), nil)
			return
		}
		// Whether it takes effect is decided before anyone leads again.
		if l.term == term && l.rng.IntN(2) == 0 {
			b.Term = term
			l.store.Apply(b)
		}
		if l.term == term {
			l.change()
		}
		done(machine.Outcome{}, ErrOutcomeUnknown)
	})
}

func (l *chaotic) Confirm(term uint64, done func(error)) {
	l.mu.Lock()
	took := time.Duration(l.rng.IntN(10)) * time.Millisecond
	l.mu.Unlock()
	l.group.Go(func() {
		time.Sleep(took)
		l.mu.Lock()
		defer l.mu.Unlock()
		if l.term != term {
			done(ErrNotLeader)
			return
		}
		done(nil)
	})
}

// change ends the leadership and begins another. The caller holds mu.
func (l *chaotic) change() {
	term := l.term + 1
	if l.rng.IntN(2) == 0 {
		l.leadership <- Leadership{}
	}
	l.term = term
	l.leadership <- Leadership{Leader: true, Term: term}
}

// TestChaos has clients that acquire, renew, come back, give up and vanish,
// over a log that loses leaderships. No lease may end before the time that its
// client counts, no two may hold one lock by their own count, tokens rise, and
// in the end nothing and nobody is left waiting.
func TestChaos(t *testing.T) {
	rounds := 100
	if testing.Short() {
		rounds = 3
	}
	for seed := range rounds {
		t.Run(fmt.Sprint(seed), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) { chaos(t, uint64(seed)) })
		})
	}
}

func chaos(t *testing.T, seed uint64) {
	store := NewStore(0)
	l := &chaotic{script: script{store: store, leadership: make(chan Leadership, 64)}, rng: rand.New(rand.NewPCG(seed, 1))}
	l.term = 1
	l.leadership <- Leadership{Leader: true, Term: 1}
	r := start(t, store, l)

	var mu sync.Mutex
	holders := map[string]int{} // who believes to hold a lock
	last := map[string]uint64{} // tokens
	hold := func(id int, name string, token uint64) {
		mu.Lock()
		defer mu.Unlock()
		if other, held := holders[name]; held {
			t.Errorf("%d and %d hold %s", other, id, name)
		}
		if token <= last[name] {
			t.Errorf("token %d of %s comes after %d", token, name, last[name])
		}
		holders[name], last[name] = id, token
	}
	unhold := func(name string) {
		mu.Lock()
		defer mu.Unlock()
		delete(holders, name)
	}

	var clients sync.WaitGroup
	for id := range 8 {
		rng := rand.New(rand.NewPCG(seed, uint64(id)+100))
		clients.Go(func() {
			for i := range 12 {
				c := &chaosClient{rig: r, rng: rng, id: id, request: RequestID(id*1000 + i + 1), name: fmt.Sprint("lock", rng.IntN(3))}
				c.once(hold, unhold)
			}
		})
	}
	clients.Wait()
	l.mu.Lock()
	l.calm = true
	l.mu.Unlock()
	time.Sleep(time.Minute) // whatever was left behind expires
	r.empty()
	r.cancel()
	<-r.ended
	l.group.Wait()
	at := r.loop
	kept := map[string]int{
		"parked": len(at.waiting.parked), "bounds": len(at.waiting.bounded), "ending": len(at.waiting.ending), "newest": len(at.waiting.newest),
		"leases": len(at.leases), "lossy": len(at.lossy), "delays": len(at.delayed) + len(r.delays.at), "due": len(at.due),
	}
	for what, n := range kept {
		if n != 0 {
			t.Errorf("the loop keeps %d %s", n, what)
		}
	}
	if at.reserved != (room{}) {
		t.Errorf("%+v reserved", at.reserved)
	}
}

// chaosClient makes one acquisition and what follows from it.
type chaosClient struct {
	*rig
	rng     *rand.Rand
	id      int
	request RequestID
	name    string
}

func (c *chaosClient) once(hold func(int, string, uint64), unhold func(string)) {
	ttl := time.Duration(500+c.rng.IntN(1000)) * time.Millisecond
	g, sent, ok := c.acquire(ttl)
	if !ok {
		return
	}
	// It holds until its own deadline, which it moves with what is acknowledged.
	deadline := sent.Add(ttl)
	if !time.Now().Before(deadline) {
		return
	}
	hold(c.id, c.name, uint64(g.Token))
	defer unhold(c.name)
	for range c.rng.IntN(5) {
		time.Sleep(time.Duration(c.rng.Int64N(int64(ttl) / 3)))
		if !time.Now().Before(deadline) {
			return
		}
		sent = time.Now()
		ctx, cancel := context.WithDeadline(context.Background(), deadline)
		list, err := c.KeepAlive(ctx, []ID{g.Lease})
		cancel()
		switch {
		case err == nil && list[0].Err == nil:
			deadline = sent.Add(ttl)
		case err == nil && !errors.Is(list[0].Err, ErrOutcomeUnknown):
			c.t.Errorf("the lease of %s is gone %v before its time: %v", c.name, time.Until(deadline), list[0].Err)
			return
		}
	}
	if c.rng.IntN(4) == 0 { // it vanishes, and stops believing at its deadline
		time.Sleep(time.Until(deadline))
		return
	}
	unhold(c.name) // before it says so: the grant to another may come first
	for range 20 {
		err := c.Release(context.Background(), ReleaseRequest{Lease: g.Lease, Name: c.name, Token: g.Token})
		if err == nil {
			return
		}
		if reason(err) == machine.ReasonNotHeld && time.Now().Before(deadline) {
			c.t.Errorf("released in time, and not held: %v", err)
		}
		if reason(err) != "" {
			return
		}
		time.Sleep(10 * time.Millisecond)
	}
}

// acquire asks until it is answered, as a client does: with the same request
// id over lost leaderships and lost connections. Sometimes it gives up.
func (c *chaosClient) acquire(ttl time.Duration) (Hold, time.Time, bool) {
	wait := []time.Duration{0, 300 * time.Millisecond, WaitForever, WaitForever}[c.rng.IntN(4)]
	for range 100 {
		ctx, cancel := context.WithCancelCause(context.Background())
		var alarm *time.Timer
		switch after := time.Duration(c.rng.IntN(400)) * time.Millisecond; c.rng.IntN(4) {
		case 0:
			alarm = time.AfterFunc(after, func() { cancel(nil) })
		case 1:
			alarm = time.AfterFunc(after, func() { cancel(ErrDetached) })
		}
		sent := time.Now()
		g, err := c.Acquire(ctx, AcquireRequest{Request: c.request, Names: []string{c.name}, TTL: ttl, Wait: wait})
		if alarm != nil {
			alarm.Stop()
		}
		cancel(nil)
		var held *HeldError
		var timeout *WaitTimeoutError
		switch {
		case err == nil:
			return g, sent, true
		case errors.Is(err, ErrNotLeader), errors.Is(err, ErrOutcomeUnknown), errors.Is(err, ErrDetached):
			time.Sleep(time.Duration(c.rng.IntN(50)) * time.Millisecond)
			continue
		case errors.Is(err, context.Canceled), errors.As(err, &held), errors.As(err, &timeout),
			reason(err) == machine.ReasonRequestEnded, reason(err) == machine.ReasonLeaseEnded:
			return Hold{}, sent, false
		}
		c.t.Errorf("acquire: %v", err)
		return Hold{}, sent, false
	}
	c.t.Errorf("request %d is never answered", c.request)
	return Hold{}, time.Time{}, false
}
