// Package believe has clients of package client take, keep, lose and give back
// locks in every way there is, and holds what the server has against what they
// believe. Crowd is the work, Compare the comparison; the faults are those of
// whoever uses them: a simulation, or real processes behind a proxy.
package believe

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"strings"
	"sync"
	"time"

	"github.com/distlock/distlock/client"
)

// Config says what a Crowd does.
type Config struct {
	Endpoints []string
	Options   []client.Option // of each of its clients
	Owner     string          // unlike that of any other crowd
	Seed      uint64
	Hot       int           // locks that all crowds compete for
	Callers   int           // that use the client at once
	Locks     int           // at most, under one lease
	MinTTL    time.Duration // of leases
	MaxTTL    time.Duration
	Pause     time.Duration // between two operations of a caller, and about as long as a lock is held
}

// Hold is a lock that a crowd believes to hold.
type Hold struct {
	Name  string
	Token uint64
}

// Report is how a crowd sees itself.
type Report struct {
	Holds  []Hold
	Waits  map[string]int // acquisitions that wait without a bound, by lock
	Busy   int            // callers in the middle of something that ends by itself
	Ops    int            // operations done
	Faults []string       // promises that were broken
}

// Crowd is one client at a time and those who use it. Its methods may be called
// from any goroutine.
type Crowd struct {
	cfg   Config
	ctx   context.Context
	end   context.CancelFunc
	group sync.WaitGroup

	mu      sync.Mutex
	changed *sync.Cond
	client  *client.Client
	locks   map[*client.Lock]*client.Client // by which it was taken
	waits   map[string]int
	busy    int
	ops     int
	faults  []string
	resting bool // nothing new is begun, and what is held is kept
	giving  bool // and what is held is given back
}

// Start begins the work.
func Start(cfg Config) (*Crowd, error) {
	c := &Crowd{cfg: cfg, locks: make(map[*client.Lock]*client.Client), waits: make(map[string]int)}
	c.changed = sync.NewCond(&c.mu)
	c.ctx, c.end = context.WithCancel(context.Background())
	fresh, err := c.fresh()
	if err != nil {
		return nil, err
	}
	c.client = fresh
	for i := range cfg.Callers {
		r := rand.New(rand.NewPCG(cfg.Seed, uint64(i)+1))
		c.set(func() { c.busy++ })
		c.group.Go(func() {
			defer c.set(func() { c.busy-- })
			for c.pause(0) {
				c.op(r, i)
				c.set(func() { c.ops++ })
				c.sleep(r, cfg.Pause)
			}
		})
	}
	return c, nil
}

func (c *Crowd) fresh() (*client.Client, error) {
	return client.New(c.cfg.Endpoints, append(c.cfg.Options[:len(c.cfg.Options):len(c.cfg.Options)], client.WithOwner(c.cfg.Owner))...)
}

func (c *Crowd) set(fn func()) {
	c.mu.Lock()
	defer c.mu.Unlock()
	fn()
	c.changed.Broadcast()
}

// Rest begins nothing new, and keeps what is held.
func (c *Crowd) Rest() { c.set(func() { c.resting = true }) }

// Give gives back what is held, also what is granted from here on, at once.
func (c *Crowd) Give() { c.set(func() { c.resting, c.giving = true, true }) }

// Work goes on after Rest or Give.
func (c *Crowd) Work() { c.set(func() { c.resting, c.giving = false, false }) }

// Report tells how the crowd sees itself now.
func (c *Crowd) Report() Report {
	c.mu.Lock()
	defer c.mu.Unlock()
	r := Report{Waits: make(map[string]int), Busy: c.busy, Ops: c.ops, Faults: c.faults}
	for l := range c.locks {
		if l.Err() == nil {
			r.Holds = append(r.Holds, Hold{l.Name(), uint64(l.Token())})
		}
	}
	for name, n := range c.waits {
		r.Waits[name] = n
	}
	return r
}

// Close ends the crowd as a process that stops in good order does.
func (c *Crowd) Close() {
	c.end()
	c.set(func() {})
	c.mu.Lock()
	last := c.client
	c.mu.Unlock()
	last.Close()
	c.group.Wait()
}

// pause is where a caller stops while the crowd rests: one that holds something
// goes on to give it back, one that holds nothing when there is work again. It
// reports false at the end.
func (c *Crowd) pause(holds int) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.busy--
	for c.resting && !(c.giving && holds > 0) && c.ctx.Err() == nil {
		c.changed.Wait()
	}
	c.busy++
	return c.ctx.Err() == nil
}

// given reports whether what is held is to be given back.
func (c *Crowd) given() bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.giving
}

func (c *Crowd) fault(format string, args ...any) {
	c.set(func() { c.faults = append(c.faults, c.cfg.Owner+": "+fmt.Sprintf(format, args...)) })
}

func (c *Crowd) now() *client.Client {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.client
}

// sleep is for up to twice as long.
func (c *Crowd) sleep(r *rand.Rand, d time.Duration) {
	if d > 0 {
		time.Sleep(time.Duration(r.Int64N(int64(2 * d))))
	}
}

func (c *Crowd) ttl(r *rand.Rand) time.Duration {
	return c.cfg.MinTTL + time.Duration(r.Int64N(int64(c.cfg.MaxTTL-c.cfg.MinTTL)+1))
}

func (c *Crowd) hot(r *rand.Rand) string { return fmt.Sprint("hot/", r.IntN(c.cfg.Hot)) }

// op is one thing that a caller does.
func (c *Crowd) op(r *rand.Rand, caller int) {
	own := fmt.Sprint("own/", c.cfg.Owner, "/", caller)
	switch n := r.IntN(100); {
	case n < 35:
		c.hold(r, c.now(), c.hot(r), client.TTL(c.ttl(r)))
	case n < 50:
		c.hold(r, c.now(), own, client.TTL(c.ttl(r)))
	case n < 60:
		c.hold(r, c.now(), "op/"+own, client.TTL(c.ttl(r)))
	case n < 66:
		c.hold(r, c.now(), own, client.TTL(c.ttl(r)), client.NoRenew())
	case n < 74:
		ctx, cancel := context.WithTimeout(c.ctx, 2*c.cfg.MaxTTL)
		id, err := c.now().Admin().Grant(ctx, c.ttl(r))
		cancel()
		if err == nil {
			c.hold(r, c.now(), own+"/under", client.UnderLeaseID(id))
		}
	case n < 94:
		c.lease(r, own)
	case n < 97 && caller == 0:
		c.replace()
	default:
		c.hold(r, c.now(), c.hot(r), client.TTL(c.ttl(r)), client.Wait(time.Duration(r.Int64N(int64(c.cfg.MaxTTL)))))
	}
}

// taker takes a lock, from a client or under a lease of it.
type taker struct {
	acquire, try func(ctx context.Context, name string) (*client.Lock, error)
}

func byItself(c *client.Client, opts ...client.AcquireOption) taker {
	var now []client.TryAcquireOption
	for _, opt := range opts {
		if opt, ok := opt.(client.TryAcquireOption); ok {
			now = append(now, opt)
		}
	}
	return taker{
		func(ctx context.Context, name string) (*client.Lock, error) { return c.Acquire(ctx, name, opts...) },
		func(ctx context.Context, name string) (*client.Lock, error) { return c.TryAcquire(ctx, name, now...) },
	}
}

func under(l *client.Lease) taker {
	return taker{
		func(ctx context.Context, name string) (*client.Lock, error) { return l.Acquire(ctx, name) },
		func(ctx context.Context, name string) (*client.Lock, error) { return l.TryAcquire(ctx, name) },
	}
}

// take asks for a lock in one of the ways there are; nil when it is not
// granted.
func (c *Crowd) take(r *rand.Rand, by *client.Client, from taker, name string) *client.Lock {
	ctx, cancel := context.WithCancel(c.ctx)
	defer cancel()
	var l *client.Lock
	var err error
	switch r.IntN(5) {
	case 0:
		l, err = from.try(ctx, name)
	case 1: // cancelled at any moment, often beside its answer
		at := time.Duration(r.Int64N(int64(5 * time.Millisecond)))
		if r.IntN(2) == 0 {
			at = time.Duration(r.Int64N(int64(c.cfg.MaxTTL)))
		}
		defer time.AfterFunc(at, cancel).Stop()
		l, err = from.acquire(ctx, name)
	case 2: // with a deadline
		bounded, stop := context.WithTimeout(ctx, 10*time.Millisecond+time.Duration(r.Int64N(int64(c.cfg.MaxTTL))))
		defer stop()
		l, err = from.acquire(bounded, name)
	default:
		if !strings.HasPrefix(name, "hot/") {
			l, err = from.acquire(ctx, name)
			break
		}
		c.set(func() { c.waits[name]++; c.busy-- })
		l, err = from.acquire(ctx, name)
		c.set(func() {
			c.busy++
			if c.waits[name]--; c.waits[name] == 0 {
				delete(c.waits, name)
			}
		})
	}
	if err != nil {
		return nil
	}
	c.set(func() { c.locks[l] = by })
	return l
}

// hold takes a lock, keeps it for a while and gives it back, unless it is lost.
func (c *Crowd) hold(r *rand.Rand, by *client.Client, name string, opts ...client.AcquireOption) {
	if l := c.take(r, by, byItself(by, opts...), name); l != nil {
		c.keep(r, l)
		c.give(r, l)
	}
}

// keep holds a lock for a while, and as long as the crowd rests.
func (c *Crowd) keep(r *rand.Rand, l *client.Lock) {
	if !c.given() && l.Err() == nil {
		c.sleep(r, c.cfg.Pause)
		c.pause(1)
	}
}

// give gives a lock back: in good order, with a context that has ended or ends
// meanwhile, or by its token as an operator does.
func (c *Crowd) give(r *rand.Rand, l *client.Lock) {
	ctx, cancel := context.WithTimeout(context.Background(), c.cfg.MaxTTL)
	defer cancel()
	switch r.IntN(6) {
	case 0:
		cancel()
	case 1:
		defer time.AfterFunc(time.Duration(r.Int64N(int64(2*time.Millisecond))), cancel).Stop()
	}
	if strings.HasPrefix(l.Name(), "op/") && r.IntN(2) == 0 {
		if r.IntN(2) == 0 {
			c.now().Admin().ForceRelease(ctx, l.Name(), l.Token(), "operator")
		} else {
			c.now().Admin().Release(ctx, l.Name(), l.Token())
		}
	}
	l.Release(ctx)
	if l.Err() == nil {
		c.fault("%s is believed after its release", l.Name())
	}
	c.set(func() { delete(c.locks, l) })
}

// lease holds many locks under one lease, some of them hot.
func (c *Crowd) lease(r *rand.Rand, own string) {
	ctx, cancel := context.WithTimeout(c.ctx, 2*c.cfg.MaxTTL)
	defer cancel()
	by := c.now()
	lease, err := by.Grant(ctx, c.ttl(r))
	if err != nil {
		return
	}
	n := 1 + r.IntN(c.cfg.Locks)
	if r.IntN(4) > 0 {
		n = 1 + r.IntN(min(c.cfg.Locks, 8))
	}
	var mu sync.Mutex
	var locks []*client.Lock
	var group sync.WaitGroup
	const at = 8 // once
	for k := range min(at, n) {
		seeded := rand.New(rand.NewPCG(r.Uint64(), uint64(k)))
		c.set(func() { c.busy++ })
		group.Go(func() {
			defer c.set(func() { c.busy-- })
			for i := k; i < n && lease.Err() == nil && !c.given(); i += at {
				name := fmt.Sprint(own, "/", i)
				if i < 2 && seeded.IntN(2) == 0 {
					name = c.hot(seeded)
				}
				if l := c.take(seeded, by, under(lease), name); l != nil {
					if name[0] == 'h' || seeded.IntN(8) == 0 {
						c.keep(seeded, l)
						c.give(seeded, l)
						continue
					}
					mu.Lock()
					locks = append(locks, l)
					mu.Unlock()
				}
			}
		})
	}
	c.set(func() { c.busy-- }) // they are, in its place
	group.Wait()
	c.set(func() { c.busy++ })
	for range 1 + r.IntN(3) {
		if lease.Err() == nil && !c.given() {
			c.sleep(r, c.cfg.Pause)
			c.pause(1)
		}
	}
	c.set(func() { c.ops += len(locks) })
	if r.IntN(3) > 0 {
		for _, l := range locks {
			c.give(r, l)
		}
	}
	ended, stop := context.WithTimeout(context.Background(), c.cfg.MaxTTL)
	defer stop()
	lease.Revoke(ended)
	for _, l := range locks {
		if l.Err() == nil {
			c.fault("%s is believed after the end of its lease", l.Name())
		}
		c.set(func() { delete(c.locks, l) })
	}
}

// replace closes the client under everybody's feet, and makes another.
func (c *Crowd) replace() {
	fresh, err := c.fresh()
	if err != nil {
		c.fault("%v", err)
		return
	}
	var old *client.Client
	var had []*client.Lock
	c.set(func() {
		old, c.client = c.client, fresh
		for l := range c.locks {
			had = append(had, l)
		}
	})
	if err := old.Close(); err != nil && !errors.Is(err, context.Canceled) {
		c.fault("Close: %v", err)
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, l := range had {
		if c.locks[l] == old && l.Err() == nil {
			c.faults = append(c.faults, c.cfg.Owner+": "+l.Name()+" is believed after Close")
		}
	}
}
