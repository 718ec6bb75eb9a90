//go:build linux

package e2e

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"sort"
	"sync"
	"testing"
	"time"

	"github.com/distlock/distlock/client"
	"github.com/distlock/distlock/fence"
)

// load is clients that take and give back locks for as long as a test lasts,
// and hold what they are told against what a lock service promises. One clock,
// this process's, judges them all.
type load struct {
	t       *testing.T
	ctx     context.Context
	cancel  context.CancelFunc
	group   sync.WaitGroup
	mayLose bool // partitions may last longer than a TTL

	mu      sync.Mutex
	believe map[string]*client.Lock // who holds, as its client believes
	last    map[string]fence.Token  // last token seen
	highest fence.Token
	grants  []grantTime
	lost    int
	keepers []*client.Lock
}

type grantTime struct{ asked, granted time.Time }

type loadConfig struct {
	endpoints []string
	clients   int
	locks     int // taken by any client
	queues    int // locks with clients waiting for them all the time
	keepers   int // locks held from the beginning to the end
	ttl       time.Duration
	mayLose   bool
}

func startLoad(t *testing.T, cfg loadConfig) *load {
	t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	l := &load{
		t: t, ctx: ctx, cancel: cancel, mayLose: cfg.mayLose,
		believe: make(map[string]*client.Lock), last: make(map[string]fence.Token),
	}
	t.Cleanup(func() { cancel(); l.group.Wait() })
	for n := range cfg.clients {
		c := l.client(cfg.endpoints, fmt.Sprintf("worker-%d", n))
		l.group.Add(1)
		go func() {
			defer l.group.Done()
			defer c.Close()
			random := rand.New(rand.NewPCG(2, uint64(n)))
			for l.ctx.Err() == nil {
				l.pair(c, fmt.Sprintf("lock/%d", random.IntN(cfg.locks)), cfg.ttl)
			}
		}()
	}
	for n := range cfg.queues * 3 {
		c := l.client(cfg.endpoints, fmt.Sprintf("waiter-%d", n))
		l.group.Add(1)
		go func() {
			defer l.group.Done()
			defer c.Close()
			for l.ctx.Err() == nil {
				l.pair(c, fmt.Sprintf("queue/%d", n%cfg.queues), cfg.ttl)
			}
		}()
	}
	if cfg.keepers > 0 {
		c := l.client(cfg.endpoints, "keeper")
		t.Cleanup(func() { c.Close() })
		for n := range cfg.keepers {
			lock, err := c.Acquire(ctx, fmt.Sprintf("kept/%d", n), client.TTL(cfg.ttl))
			if err != nil {
				t.Fatal(err)
			}
			l.keepers = append(l.keepers, lock)
		}
	}
	return l
}

func (l *load) client(endpoints []string, owner string) *client.Client {
	c, err := client.New(endpoints, client.WithOwner(owner))
	if err != nil {
		l.t.Fatal(err)
	}
	return c
}

// pair takes a lock and gives it back.
func (l *load) pair(c *client.Client, name string, ttl time.Duration) {
	asked := time.Now()
	lock, err := c.Acquire(l.ctx, name, client.TTL(ttl))
	if err != nil {
		if l.ctx.Err() == nil && !l.mayLose {
			l.t.Errorf("acquire %s: %v", name, err)
		}
		return
	}
	granted := time.Now()
	l.mu.Lock()
	if other := l.believe[name]; other != nil && other.Err() == nil && time.Now().Before(other.Deadline()) {
		l.t.Errorf("%s: token %d was granted while the holder of token %d rightly believed in it until %v", name, lock.Token(), other.Token(), other.Deadline())
	}
	if lock.Token() <= l.last[name] {
		l.t.Errorf("%s: token %d was granted after %d", name, lock.Token(), l.last[name])
	}
	l.believe[name], l.last[name] = lock, lock.Token()
	l.highest = max(l.highest, lock.Token())
	l.grants = append(l.grants, grantTime{asked, granted})
	l.mu.Unlock()
	time.Sleep(time.Duration(rand.IntN(3)) * time.Millisecond) // the work
	l.mu.Lock()
	if l.believe[name] == lock {
		l.believe[name] = nil
	}
	lost := lock.Err()
	l.mu.Unlock()
	if lost != nil && !l.mayLose {
		l.t.Errorf("%s token %d: lost while it was renewed: %v", name, lock.Token(), lost)
	}
	deadline := lock.Deadline()
	if err := lock.Release(context.WithoutCancel(l.ctx)); err != nil {
		switch {
		case lost != nil || l.mayLose && !errors.Is(err, client.ErrNotHeld):
			l.mu.Lock()
			l.lost++
			l.mu.Unlock()
		case errors.Is(err, client.ErrNotHeld) && l.mayLose && time.Now().After(deadline):
		default:
			l.t.Errorf("%s token %d: release: %v", name, lock.Token(), err)
		}
	}
}

// nextGrant waits for a grant that was asked for after since, and returns how
// long after since it came.
func (l *load) nextGrant(since time.Time) time.Duration {
	l.t.Helper()
	for until := time.Now().Add(30 * time.Second); time.Now().Before(until); time.Sleep(2 * time.Millisecond) {
		l.mu.Lock()
		for i := len(l.grants) - 1; i >= 0 && l.grants[i].granted.After(since); i-- {
			if !l.grants[i].asked.After(since) {
				continue
			}
			first := l.grants[i].granted
			for j := i; j >= 0 && l.grants[j].granted.After(since); j-- {
				if l.grants[j].asked.After(since) {
					first = l.grants[j].granted
				}
			}
			l.mu.Unlock()
			return first.Sub(since)
		}
		l.mu.Unlock()
	}
	l.t.Fatal("no grant within 30s")
	return 0
}

// gap is the longest time without a grant between two moments.
func (l *load) gap(from, to time.Time) (longest time.Duration) {
	l.mu.Lock()
	defer l.mu.Unlock()
	last := from
	for _, g := range l.grants {
		if g.granted.After(from) && g.granted.Before(to) {
			longest = max(longest, g.granted.Sub(last))
			last = g.granted
		}
	}
	return max(longest, to.Sub(last))
}

func (l *load) stop() (grants int) {
	l.t.Helper()
	l.cancel()
	l.group.Wait()
	for _, k := range l.keepers {
		if err := k.Err(); err != nil {
			l.t.Errorf("a lock that was held and renewed all the time: %v", err)
		} else if err := k.Release(context.Background()); err != nil {
			l.t.Errorf("a lock that was held and renewed all the time: %v", err)
		}
	}
	return len(l.grants)
}

// quantiles of some spans, in order.
func quantiles(list []time.Duration) (p50, p99, most time.Duration) {
	if len(list) == 0 {
		return 0, 0, 0
	}
	sort.Slice(list, func(i, j int) bool { return list[i] < list[j] })
	return list[len(list)/2], list[min(len(list)*99/100, len(list)-1)], list[len(list)-1]
}
