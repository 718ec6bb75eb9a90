package sim

import (
	"sync"
	"time"

	"github.com/jonboulle/clockwork"
)

// clock is a node's: it runs at a rate of its own, and its wall clock jumps.
// Spans are monotonic, as those of the real clock are.
type clock struct {
	w    *World
	n    *node
	rate float64

	mu    sync.Mutex
	wall  time.Duration // what jumps have added
	read  map[int64]time.Duration
	timer uint64 // to tell timers apart
}

var epoch = time.Date(2030, 1, 1, 0, 0, 0, 0, time.UTC)

func newClock(w *World, n *node, rate float64) *clock {
	return &clock{w: w, n: n, rate: rate, read: make(map[int64]time.Duration)}
}

func (c *clock) local() time.Duration { return time.Duration(float64(c.w.time()) * c.rate) }

// Now implements clockwork.Clock.
func (c *clock) Now() time.Time {
	local := c.local()
	c.mu.Lock()
	defer c.mu.Unlock()
	t := epoch.Add(local + c.wall)
	c.read[t.UnixNano()] = local
	return t
}

// Since implements clockwork.Clock. Times that this clock gave out know their
// monotonic reading, as those of package time do.
func (c *clock) Since(t time.Time) time.Duration {
	local := c.local()
	c.mu.Lock()
	defer c.mu.Unlock()
	if at, ok := c.read[t.UnixNano()]; ok {
		return local - at
	}
	return epoch.Add(local + c.wall).Sub(t)
}

// Until implements clockwork.Clock.
func (c *clock) Until(t time.Time) time.Duration { return -c.Since(t) }

func (c *clock) jump(d time.Duration) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.wall += d
}

// timer implements clockwork.Timer.
type timer struct {
	c   *clock
	out chan time.Time
	fn  func()
	id  uint64

	mu  sync.Mutex
	gen uint64 // of the setting that counts
	set bool
}

// NewTimer implements clockwork.Clock.
func (c *clock) NewTimer(d time.Duration) clockwork.Timer {
	t := c.make()
	t.Reset(d)
	return t
}

func (c *clock) make() *timer {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.timer++
	return &timer{c: c, out: make(chan time.Time, 1), id: c.timer}
}

// Chan implements clockwork.Timer.
func (t *timer) Chan() <-chan time.Time { return t.out }

// Reset implements clockwork.Timer.
func (t *timer) Reset(d time.Duration) bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	was := t.set
	t.gen++
	t.set = true
	gen := t.gen
	select { // as since Go 1.23: no stale value after Reset
	case <-t.out:
	default:
	}
	t.c.n.after(time.Duration(float64(d)/t.c.rate), 1<<60|uint64(t.c.n.id)<<52|t.id, func() bool { return t.fire(gen) })
	return was
}

func (t *timer) fire(gen uint64) bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	if gen != t.gen || !t.set {
		return false
	}
	t.set = false
	if t.fn != nil {
		go t.fn()
		return true
	}
	select {
	case t.out <- t.c.Now():
	default:
	}
	return true
}

// Stop implements clockwork.Timer.
func (t *timer) Stop() bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	was := t.set
	t.set = false
	return was
}

// After implements clockwork.Clock.
func (c *clock) After(d time.Duration) <-chan time.Time { return c.NewTimer(d).Chan() }

// Sleep implements clockwork.Clock.
func (c *clock) Sleep(d time.Duration) { <-c.After(d) }

// AfterFunc implements clockwork.Clock.
func (c *clock) AfterFunc(d time.Duration, fn func()) clockwork.Timer {
	t := c.make()
	t.fn = fn
	t.Reset(d)
	return t
}

// NewTicker implements clockwork.Clock.
func (c *clock) NewTicker(d time.Duration) clockwork.Ticker {
	k := &ticker{c: c, d: d, out: make(chan time.Time, 1)}
	k.timer = c.AfterFunc(d, k.tick)
	return k
}

type ticker struct {
	c     *clock
	d     time.Duration
	out   chan time.Time
	timer clockwork.Timer
}

func (k *ticker) tick() {
	select {
	case k.out <- k.c.Now():
	default:
	}
	k.timer.Reset(k.d)
}

// Chan implements clockwork.Ticker.
func (k *ticker) Chan() <-chan time.Time { return k.out }

// Reset implements clockwork.Ticker.
func (k *ticker) Reset(d time.Duration) { k.d = d; k.timer.Reset(d) }

// Stop implements clockwork.Ticker.
func (k *ticker) Stop() { k.timer.Stop() }
