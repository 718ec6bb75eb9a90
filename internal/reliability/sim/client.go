package sim

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"sync"
	"time"

	"github.com/distlock/distlock/fence"
	"github.com/distlock/distlock/internal/reliability/check"
	"github.com/distlock/distlock/lease"
	"github.com/distlock/distlock/lease/machine"
)

const maxTTL = 2500 * time.Millisecond

// client lives by the rules of package client: it counts a lease's deadline
// from before it sent, less the margin, on its own clock; it repeats requests
// under their ids until they are answered; it abandons what it no longer
// wants. It is one goroutine, and whatever it renews in the meantime.
type client struct {
	w    *World
	id   int
	who  int // changes when it dies and another takes its place
	rate float64
	rng  *rand.Rand
	at   int // the node it talks to

	mu     sync.Mutex
	calls  uint64
	asked  uint64
	killed chan struct{}
	over   bool
	done   chan struct{} // closed when it has nothing more to do
}

func newClient(w *World, id int, rate float64) *client {
	return &client{w: w, id: id, who: id, rate: rate, rng: w.rng(20, uint64(id)), killed: make(chan struct{}), done: make(chan struct{})}
}

// kill ends a client at the end of the run.
func (c *client) kill() {
	c.mu.Lock()
	defer c.mu.Unlock()
	if !c.over {
		c.over = true
		close(c.killed)
	}
}

// now is the time by the client's clock.
func (c *client) now() time.Duration { return time.Duration(float64(c.w.time()) * c.rate) }

// truly turns a span of the client's clock into one of the judge's.
func (c *client) truly(d time.Duration) time.Duration { return time.Duration(float64(d) / c.rate) }

func (c *client) key() uint64 {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.calls++
	return 30<<56 | uint64(c.id)<<40 | c.calls
}

// sleep sleeps by the client's clock; false when the run is over.
func (c *client) sleep(d time.Duration) bool {
	wake := make(chan struct{})
	c.w.after(c.truly(d), c.key(), func() bool { close(wake); return true })
	select {
	case <-wake:
		return true
	case <-c.killed:
		return false
	}
}

func (c *client) record(e check.Event) {
	e.Who = c.who
	c.w.record(e)
}

// reply is what came back of a call.
type reply struct {
	value any
	err   error
}

var (
	errTimeout = errors.New("sim: no answer in time")
	errRefused = errors.New("sim: connection refused")
	errKilled  = errors.New("sim: the run is over")
)

// call is one attempt over the network: the request or the answer may be lost
// or late, the node may be down. When the attempt is given up its connection
// is cut with cause, of which the node may or may not hear. ack is called by
// the judge for an answer that reaches the client, also after it gave up.
func (c *client) call(patience time.Duration, cause error, fn func(context.Context, *lease.Manager) (any, error), ack func(any, error)) (any, error) {
	n := c.w.cluster.nodes[c.at%len(c.w.cluster.nodes)]
	key := c.key()
	r := c.w.rng(key)
	clear := c.w.clear || c.quiet()
	delay := func() time.Duration {
		d := time.Duration(50+r.IntN(3000)) * time.Microsecond
		if !clear && r.IntN(25) == 0 {
			d *= time.Duration(1 + r.IntN(800))
		}
		return d
	}
	lostThere, lostBack := !clear && r.IntN(40) == 0, !clear && r.IntN(40) == 0
	there, back := delay(), delay()
	given := make(chan reply, 2)
	ctx, cancel := connection()
	if !lostThere {
		c.w.after(there, key<<4|1, func() bool {
			if !n.up {
				given <- reply{nil, errRefused}
				return true
			}
			n.after(0, key<<4|2, func() bool {
				manager, life := n.manager, n.life.Load()
				go func() {
					v, err := fn(ctx, manager)
					c.w.after(back, key<<4|3, func() bool {
						if n.life.Load() != life || lostBack {
							return false
						}
						if ack != nil {
							ack(v, err)
						}
						given <- reply{v, err}
						return true
					})
				}()
				return true
			})
			return false
		})
	}
	c.w.after(c.truly(patience), key<<4|4, func() bool {
		given <- reply{nil, errTimeout}
		return true
	})
	select {
	case x := <-given:
		if x.err == errTimeout || x.err == errRefused {
			c.at++
			n.after(there+delay(), key<<4|5, func() bool { cancel(cause); return true })
		}
		var other *lease.NotLeaderError
		if errors.As(x.err, &other) {
			c.at++
			fmt.Sscanf(other.Hint, nodeAddress, &c.at)
		}
		return x.value, x.err
	case <-c.killed:
		cancel(cause)
		return nil, errKilled
	}
}

// connection is an attempt's: cancelled when the node hears that it was cut.
func connection() (context.Context, context.CancelCauseFunc) {
	return context.WithCancelCause(context.Background())
}

func (c *client) quiet() bool {
	c.w.mu.Lock()
	defer c.w.mu.Unlock()
	return c.w.quiet
}

func (c *client) closing() bool {
	c.w.mu.Lock()
	defer c.w.mu.Unlock()
	return c.w.closing
}

// open reports whether an answer leaves it open what happened, or nothing did.
func open(err error) bool {
	return errors.Is(err, errTimeout) || errors.Is(err, errRefused) || errors.Is(err, lease.ErrNotLeader) ||
		errors.Is(err, lease.ErrOutcomeUnknown) || errors.Is(err, lease.ErrStopping) || errors.Is(err, lease.ErrSuperseded) ||
		errors.Is(err, lease.ErrDetached) || errors.Is(err, context.Canceled)
}

// persist repeats a call until it is answered.
func (c *client) persist(fn func(context.Context, *lease.Manager) (any, error), ack func(any, error)) (any, error) {
	for {
		v, err := c.call(500*time.Millisecond, lease.ErrDetached, fn, ack)
		if err == nil || !open(err) {
			return v, err
		}
		if !c.sleep(time.Duration(5+c.rng.IntN(100)) * time.Millisecond) {
			return nil, errKilled
		}
	}
}

// live is a client's life: one thing after the other.
func (c *client) live() {
	defer close(c.done)
	for !c.closing() && c.sleep(time.Duration(c.rng.IntN(150))*time.Millisecond) {
		switch k := c.rng.IntN(20); {
		case k < 12:
			c.ownLease()
		case k < 16:
			c.sharedLease()
		case k < 18:
			c.look()
		case k < 19:
			c.meddle()
		default:
			c.sleep(time.Duration(c.rng.IntN(2000)) * time.Millisecond)
		}
	}
}

// probe measures the progress after the faults: locks that nobody else wants.
func (c *client) probe() {
	defer close(c.done)
	for i := range uint64(20) {
		sent := c.w.time()
		name := fmt.Sprint("probe", i)
		v, err := c.persist(func(ctx context.Context, m *lease.Manager) (any, error) {
			return words{m}.Acquire(ctx, lease.AcquireRequest{Request: lease.RequestID(c.w.id(c.id, i+1)), Names: []string{name}, TTL: time.Second})
		}, nil)
		if err == errKilled {
			return
		}
		if err == nil {
			c.record(check.Event{Kind: check.Progressed, Sent: sent})
			c.release(0, name, uint64(v.(lease.Hold).Token))
		}
		if !c.sleep(100 * time.Millisecond) {
			return
		}
	}
}

// want is an acquisition to make.
type want struct {
	lease   lease.ID
	request uint64 // as the history knows it
	id      lease.RequestID
	lowest  lease.RequestID
	names   []string
	mode    lease.Mode
	limit   uint32
	wait    time.Duration
	delay   time.Duration
	ttl     time.Duration
}

func (c *client) wish() *want {
	w := &want{mode: machine.Exclusive}
	switch c.rng.IntN(10) {
	case 0, 1:
		w.names = []string{"a", "b"}
	case 2:
		w.names = []string{"b", "c"}
	case 3, 4:
		w.names = []string{"rw"}
		if c.rng.IntN(4) > 0 {
			w.mode = machine.Shared
		}
	case 5:
		w.names, w.mode, w.limit = []string{"two"}, machine.Shared, 2
	default:
		w.names = []string{string(rune('a' + c.rng.IntN(3)))}
	}
	w.wait = []time.Duration{0, time.Duration(c.rng.IntN(1500)) * time.Millisecond, lease.WaitForever, lease.WaitForever}[c.rng.IntN(4)]
	w.ttl = []time.Duration{300 * time.Millisecond, time.Second, maxTTL}[c.rng.IntN(3)]
	if c.rng.IntN(6) == 0 {
		w.delay = time.Duration(c.rng.IntN(500)) * time.Millisecond
	}
	return w
}

// ownLease takes locks with a lease of their own, holds them for a while and
// gives them back, or is lost with them.
func (c *client) ownLease() {
	w := c.wish()
	c.asked++
	w.id = lease.RequestID(c.w.id(c.id, c.asked))
	w.request = uint64(w.id)
	g, sent, ok := c.acquire(w)
	if !ok {
		return
	}
	l := &held{c: c, lease: g.Lease, ttl: w.ttl, sent: sent}
	l.holds = append(l.holds, &hold{grant: g, limit: w.limit})
	// A grant that waited began its TTL at an unknown time: renew it first.
	for c.now()-sent > w.ttl/4 {
		if !l.renew() {
			if l.over || !c.sleep(20*time.Millisecond) {
				return
			}
			if c.now()-l.sent > 20*w.ttl {
				return
			}
			continue
		}
		break
	}
	l.believe()
	l.use(c.rng.IntN(8))
	if c.rng.IntN(6) == 0 {
		c.vanish(l)
		return
	}
	l.doubt(l.holds[0])
	c.release(0, g.Locks[0].Name, uint64(g.Token))
}

// vanish is the death of a client and the birth of the next: what the dead
// one held runs out.
func (c *client) vanish(l *held) {
	for _, h := range l.holds {
		c.w.record(check.Event{At: 0, Kind: check.Gone, Who: c.who, Token: uint64(h.grant.Token)})
	}
	c.who += 100
}

// sharedLease holds several locks under one lease, in turn.
func (c *client) sharedLease() {
	ttl := []time.Duration{300 * time.Millisecond, time.Second, maxTTL}[c.rng.IntN(3)]
	c.asked++
	request := lease.RequestID(c.w.id(c.id, c.asked))
	sent := c.now()
	began := c.w.time()
	v, err := c.persist(func(ctx context.Context, m *lease.Manager) (any, error) {
		id, err := words{m}.GrantLease(ctx, lease.GrantLeaseRequest{Request: request, TTL: ttl})
		c.w.record(check.Event{Kind: check.Touched, Lease: uint64(id)})
		return id, err
	}, func(v any, err error) {
		if err == nil {
			c.w.record(check.Event{Kind: check.Renewed, Who: c.id, Lease: uint64(v.(lease.ID)), TTL: ttl, Sent: began})
		}
	})
	if err != nil {
		return
	}
	l := &held{c: c, lease: v.(lease.ID), ttl: ttl, sent: sent}
	for seq := range 1 + c.rng.IntN(5) {
		if l.over || c.now() >= l.deadline() || c.closing() {
			break
		}
		w := c.wish()
		w.lease, w.ttl = l.lease, 0
		if w.wait == lease.WaitForever { // its lease is renewed between, not meanwhile
			w.wait = ttl / 3
		}
		w.id = lease.RequestID(seq + 1)
		w.lowest = w.id
		w.request = uint64(l.lease)<<40 | uint64(w.id)
		if g, _, ok := c.acquire(w); ok {
			h := &hold{grant: g, limit: w.limit}
			l.holds = append(l.holds, h)
			l.believe()
		}
		if !l.renew() && l.over {
			break
		}
		l.use(c.rng.IntN(3))
		if len(l.holds) > 0 && c.rng.IntN(2) == 0 {
			h := l.holds[0]
			l.holds = l.holds[1:]
			l.doubt(h)
			c.release(l.lease, h.grant.Locks[0].Name, uint64(h.grant.Token))
		}
	}
	if c.rng.IntN(3) == 0 {
		c.vanish(l)
		return
	}
	for _, h := range l.holds {
		l.doubt(h)
		if c.rng.IntN(2) == 0 {
			c.release(l.lease, "", uint64(h.grant.Token))
		}
	}
	id := l.lease
	c.persist(func(ctx context.Context, m *lease.Manager) (any, error) {
		return nil, words{m}.RevokeLease(ctx, id, "itself")
	},
		func(_ any, err error) {
			if err == nil {
				c.w.record(check.Event{Kind: check.Revoked, Who: c.id, Lease: uint64(id)})
			}
		})
}

// acquire asks until it is answered, or no longer wants to know.
func (c *client) acquire(w *want) (g lease.Hold, sent time.Duration, ok bool) {
	who := c.who
	began := c.w.time()
	c.record(check.Event{Kind: check.Asked, Request: w.request, Sent: began, Forever: w.wait == lease.WaitForever})
	patience := time.Duration(-1)
	if c.rng.IntN(6) == 0 {
		patience = time.Duration(c.rng.IntN(1500)) * time.Millisecond
	}
	start := c.now()
	for {
		wait := w.wait
		if wait > 0 {
			wait = max(wait-(c.now()-start), time.Millisecond)
		}
		attempt := 300*time.Millisecond + time.Duration(c.rng.IntN(2500))*time.Millisecond
		if patience >= 0 {
			attempt = min(attempt, max(patience-(c.now()-start), time.Millisecond))
		}
		cause := lease.ErrDetached
		if patience >= 0 && c.now()-start+attempt >= patience {
			cause = context.Canceled
			c.record(check.Event{Kind: check.Cancelling, Request: w.request})
		}
		sent = c.now()
		truly := c.w.time()
		v, err := c.call(attempt, cause, func(ctx context.Context, m *lease.Manager) (any, error) {
			return c.serveAcquire(ctx, m, w, wait)
		}, func(v any, err error) {
			if err != nil {
				return
			}
			g := v.(lease.Hold)
			e := check.Event{Kind: check.Acquired, Who: who, Request: w.request, Lease: uint64(g.Lease), Token: uint64(g.Token), Locks: w.names, Sent: began, TTL: g.TTL}
			c.w.record(e)
			if w.lease == 0 {
				e.Kind, e.Sent, e.Locks = check.Renewed, truly, nil
				c.w.record(e)
			}
		})
		switch {
		case err == nil:
			return v.(lease.Hold), sent, true
		case err == errKilled:
			return g, 0, false
		case !open(err):
			var held *lease.HeldError
			var timeout *lease.WaitTimeoutError
			if w.wait == lease.WaitForever && (errors.As(err, &held) || errors.As(err, &timeout)) {
				c.w.cluster.broken("I6", "request %d would wait for ever, and was told: %v", w.request, err)
			}
			c.record(check.Event{Kind: check.Refused, Request: w.request, Cause: err.Error()})
			return g, 0, false
		}
		if patience >= 0 && c.now()-start >= patience {
			break
		}
		if !c.sleep(time.Duration(5+c.rng.IntN(60)) * time.Millisecond) {
			return g, 0, false
		}
	}
	c.persist(func(ctx context.Context, m *lease.Manager) (any, error) {
		return nil, words{m}.Abandon(ctx, w.lease, w.id)
	}, func(_ any, err error) {
		if err == nil {
			c.w.record(check.Event{Kind: check.Cancelled, Who: who, Request: w.request})
		}
	})
	return g, 0, false
}

// serveAcquire is the server's side of the call. Whatever ends it may give the
// lease its time anew.
func (c *client) serveAcquire(ctx context.Context, m *lease.Manager, w *want, wait time.Duration) (lease.Hold, error) {
	g, err := words{m}.Acquire(ctx, lease.AcquireRequest{
		Lease: w.lease, Request: w.id, LowestOpen: w.lowest, Names: w.names, Mode: w.mode, Limit: w.limit,
		Wait: wait, LockDelay: w.delay, TTL: w.ttl,
	})
	c.w.record(check.Event{Kind: check.Touched, Request: w.request, Lease: uint64(g.Lease)})
	return g, err
}

func (c *client) release(id lease.ID, name string, token uint64) {
	c.record(check.Event{Kind: check.Releasing, Token: token})
	who := c.who
	c.persist(func(ctx context.Context, m *lease.Manager) (any, error) {
		return nil, words{m}.Release(ctx, lease.ReleaseRequest{Lease: id, Name: name, Token: fence.Token(token)})
	}, func(_ any, err error) {
		if err == nil {
			c.w.record(check.Event{Kind: check.Released, Who: who, Token: token})
		}
	})
}

// look reads a lock, linearizably.
func (c *client) look() {
	name := string(rune('a' + c.rng.IntN(3)))
	sent := c.w.time()
	v, err := c.call(500*time.Millisecond, context.Canceled, func(ctx context.Context, m *lease.Manager) (any, error) {
		info, _, err := words{m}.Lock(ctx, name)
		return info, err
	}, nil)
	if err != nil {
		return
	}
	e := check.Event{Kind: check.Read, Sent: sent, Locks: []string{name}}
	for _, h := range v.(lease.LockInfo).Holders {
		e.Holders = append(e.Holders, uint64(h.Token))
	}
	c.record(e)
}

// meddle is an operator who breaks a hold.
func (c *client) meddle() {
	name := string(rune('a' + c.rng.IntN(3)))
	c.call(500*time.Millisecond, context.Canceled, func(ctx context.Context, m *lease.Manager) (any, error) {
		return nil, words{m}.ForceRelease(ctx, name, 0, "operator")
	}, nil)
}

// held is a lease as its client sees it, with the holds under it.
type held struct {
	c     *client
	lease lease.ID
	ttl   time.Duration
	sent  time.Duration // by the client's clock
	holds []*hold
	over  bool
}

type hold struct {
	grant lease.Hold
	limit uint32
}

// deadline is the rule of package client.
func (l *held) deadline() time.Duration {
	return l.sent + l.ttl - l.ttl/100 - min(10*time.Millisecond, l.ttl/20)
}

// believe tells the judge until when the client counts on its holds.
func (l *held) believe() {
	if l.over || l.c.now() >= l.deadline() {
		return
	}
	for _, h := range l.holds {
		e := check.Event{Kind: check.Believes, Token: uint64(h.grant.Token), Until: l.c.truly(l.deadline()), Shared: h.grant.Mode == machine.Shared, Limit: int(h.limit)}
		for _, k := range h.grant.Locks {
			e.Locks = append(e.Locks, k.Name)
		}
		l.c.record(e)
	}
}

func (l *held) doubt(h *hold) {
	l.c.record(check.Event{Kind: check.Doubts, Token: uint64(h.grant.Token)})
}

// renew makes one attempt; it reports whether it was acknowledged.
func (l *held) renew() bool {
	c := l.c
	sent, truly := c.now(), c.w.time()
	id, ttl := l.lease, l.ttl
	v, err := c.call(max(ttl/3, 20*time.Millisecond), context.Canceled, func(ctx context.Context, m *lease.Manager) (any, error) {
		c.w.record(check.Event{Kind: check.Touched, Lease: uint64(id)})
		list, err := words{m}.KeepAlive(ctx, []lease.ID{id})
		if err != nil {
			return nil, err
		}
		return list[0].Err, nil
	}, func(v any, err error) {
		if err == nil && v == nil {
			c.w.record(check.Event{Kind: check.Renewed, Who: c.id, Lease: uint64(id), TTL: ttl, Sent: truly})
		}
	})
	switch {
	case err != nil:
		return false
	case v != nil:
		var gone *lease.Refusal
		l.over = errors.As(v.(error), &gone)
		return false
	}
	l.sent = sent
	return true
}

// use holds on for some renewals and writes to what the locks guard. Now and
// then the client is stopped right after it looked at its deadline, and
// writes late.
func (l *held) use(renewals int) {
	c := l.c
	for range renewals {
		if len(l.holds) > 0 && !l.over && c.now() < l.deadline() {
			if c.rng.IntN(12) == 0 {
				c.sleep(l.ttl/10 + time.Duration(c.rng.Int64N(int64(3*l.ttl))))
			}
			h := l.holds[c.rng.IntN(len(l.holds))]
			k := h.grant.Locks[c.rng.IntN(len(h.grant.Locks))]
			pass := fence.Pass{Token: h.grant.Token, Floor: k.Floor}
			if c.w.cluster.guard.Write(context.Background(), k.Name, pass, func() error { return nil }) == nil {
				c.record(check.Event{Kind: check.Wrote, Locks: []string{k.Name}, Token: uint64(pass.Token), Floor: uint64(pass.Floor), Shared: h.grant.Mode == machine.Shared})
			}
		}
		if !c.sleep(l.ttl/6 + time.Duration(c.rng.Int64N(int64(l.ttl/3)))) {
			return
		}
		if l.over || c.now() >= l.deadline() {
			return
		}
		if l.renew() {
			l.believe()
		}
	}
}
