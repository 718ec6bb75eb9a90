// Package sim runs the real lease manager, over the real machine, as one or
// three replicas on a simulated log, network and set of clocks, in virtual
// time. Clients follow the rules of package client. A seed decides everything:
// who speaks when, what is lost or late, who crashes, pauses, is cut off, and
// whose clock runs fast or jumps. The history is held against package check.
//
// One goroutine, the scheduler's, makes one thing happen at a time and waits
// until everybody it concerns has come to rest (testing/synctest tells when).
// So the order in which goroutines run decides nothing, and a seed replays.
package sim

import (
	"cmp"
	"container/heap"
	"fmt"
	"hash/fnv"
	"math/rand/v2"
	"slices"
	"strings"
	"sync"
	"testing/synctest"
	"time"

	"github.com/distlock/distlock/internal/reliability/check"
)

// World is one simulated run.
type World struct {
	seed    uint64
	history *check.History
	clear   bool // no faults: seeds that measure the lag

	// stage is held while something happens, and by goroutines that the
	// scheduler does not know of while they touch what is its own.
	stage sync.Mutex
	live  *live // nil where clients are those of this package

	mu    sync.Mutex
	queue queue
	begin time.Time
	wake  chan struct{} // buffered, one: there is something earlier
	// quiet is set once faults have ended, and closing once clients begin
	// nothing new.
	quiet, closing bool

	cluster *cluster
	clients []*client
	Steps   int
}

// Of the times below faults take place in the first, clients finish what they
// began in the second, and what they left behind expires in the third.
const (
	faultsFor = 20 * time.Second
	settleFor = 5 * time.Second
	expireFor = 8 * time.Second

	settleAtMost = 120 // seconds until the last client is done
)

func newWorld(seed uint64) *World {
	return &World{seed: seed, begin: time.Now(), wake: make(chan struct{}, 1)}
}

// Run simulates a seed. It must be called inside a synctest bubble.
func Run(seed uint64) *World {
	w := newWorld(seed)
	r := w.rng(1)
	w.clear = r.IntN(8) == 0
	w.history = &check.History{Lag: 25 * time.Millisecond, Heal: 2*electionMost + maxTTL*102/100 + time.Second}
	if !w.clear {
		w.history.Lag += 2 * slowDisk
	}
	nodes, serversDrift, rate := shape(r)
	if serversDrift {
		w.history.Rate = 0.0101
	}
	w.cluster = newCluster(w)
	w.cluster.begin(nodes, func() float64 { return rate(serversDrift) })
	for i := range 3 + r.IntN(4) {
		c := newClient(w, i, rate(!serversDrift))
		w.clients = append(w.clients, c)
		go c.live()
	}
	synctest.Wait()
	if !w.clear {
		w.cluster.trouble(r)
	}
	w.advance(faultsFor)
	w.cluster.heal()
	w.record(check.Event{Kind: check.Healed})
	w.mu.Lock()
	w.quiet = true
	w.mu.Unlock()
	probe := newClient(w, 99, 1)
	w.clients = append(w.clients, probe)
	go probe.probe()
	synctest.Wait()
	w.advance(faultsFor + settleFor)
	w.mu.Lock()
	w.closing = true
	w.mu.Unlock()
	for range settleAtMost {
		if !w.busy() {
			break
		}
		w.advance(w.time() + time.Second)
	}
	w.advance(w.time() + expireFor)
	w.history.End = w.time()
	w.cluster.stop()
	w.finish()
	return w
}

// shape draws how many nodes a run has, and the rates of clocks, which differ by
// 1 % at most: either the servers' drift, or the clients' do.
func shape(r *rand.Rand) (nodes int, serversDrift bool, rate func(drifts bool) float64) {
	nodes = 3
	if r.IntN(3) == 0 {
		nodes = 1
	}
	return nodes, r.IntN(2) == 0, func(drifts bool) float64 {
		if !drifts {
			return 1
		}
		return 1 + (r.Float64()*2-1)/100
	}
}

// Virtual is how long the run took in its own time.
func (w *World) Virtual() time.Duration { return w.time() }

// busy tells whether a client is still at what it began.
func (w *World) busy() bool {
	for _, c := range w.clients {
		select {
		case <-c.done:
		default:
			return true
		}
	}
	return false
}

// finish ends clients that are still at it: each is a violation already.
func (w *World) finish() {
	for _, c := range w.clients {
		c.kill()
	}
	w.mu.Lock()
	w.queue = nil
	w.mu.Unlock()
	synctest.Wait()
}

// Check holds the history against every promise, and the end against nothing
// being left behind.
func (w *World) Check() []check.Violation {
	return append(check.All(w.history), w.cluster.leftovers...)
}

// Digest is the same for two runs of a seed.
func (w *World) Digest() uint64 {
	list := w.lines()
	sum := fnv.New64a()
	for _, l := range list {
		fmt.Fprintln(sum, l)
	}
	return sum.Sum64()
}

func (w *World) lines() []string {
	var list []string
	for _, e := range w.history.Events() {
		list = append(list, fmt.Sprintf("%14d %3d %v", e.At, e.Kind, e))
	}
	slices.Sort(list)
	return list
}

// Story is the end of the history up to a time, to read.
func (w *World) Story(until time.Duration, n int) string {
	var list []string
	for _, e := range w.history.Events() {
		if e.At <= until {
			list = append(list, e.String())
		}
	}
	return strings.Join(list[max(0, len(list)-n):], "\n")
}

// rng returns a source of its own for whatever parts name, so that the order
// in which goroutines draw does not matter.
func (w *World) rng(parts ...uint64) *rand.Rand {
	sum := uint64(14695981039346656037)
	for _, p := range parts {
		sum = (sum ^ p) * 1099511628211
		sum ^= sum >> 29
	}
	return rand.New(rand.NewPCG(w.seed, sum))
}

// id makes request ids.
func (w *World) id(client int, n uint64) uint64 { return uint64(client+1)<<32 | n }

func (w *World) record(e check.Event) {
	if e.At == 0 {
		e.At = w.time()
	}
	w.history.Add(e)
}

// note tells what happens in the words of the story.
func (w *World) note(node int, format string, args ...any) {
	w.record(check.Event{Kind: check.Noted, Who: node, Cause: fmt.Sprintf(format, args...)})
}

// time is that since the beginning, in the bubble's time.
func (w *World) time() time.Duration { return time.Since(w.begin) }

// happening is something that the scheduler makes happen.
type happening struct {
	at  time.Duration
	key uint64 // breaks ties, independent of who scheduled first
	fn  func() bool
}

type queue []happening

func (q queue) Len() int { return len(q) }
func (q queue) Less(i, j int) bool {
	if c := cmp.Compare(q[i].at, q[j].at); c != 0 {
		return c < 0
	}
	return q[i].key < q[j].key
}
func (q queue) Swap(i, j int) { q[i], q[j] = q[j], q[i] }
func (q *queue) Push(x any)   { *q = append(*q, x.(happening)) }
func (q *queue) Pop() any {
	old := *q
	x := old[len(old)-1]
	old[len(old)-1] = happening{}
	*q = old[:len(old)-1]
	return x
}

// after schedules fn. It returns false when it did nothing that anyone could
// react to.
func (w *World) after(d time.Duration, key uint64, fn func() bool) {
	h := happening{w.time() + max(d, 1), key, fn}
	w.mu.Lock()
	heap.Push(&w.queue, h)
	w.mu.Unlock()
	if w.live != nil {
		select {
		case w.wake <- struct{}{}:
		default:
		}
	}
}

// advance makes everything happen that is due until a time.
func (w *World) advance(until time.Duration) {
	for {
		next := until
		w.mu.Lock()
		due := len(w.queue) > 0 && w.queue[0].at <= until
		if due {
			next = w.queue[0].at
		}
		w.mu.Unlock()
		switch {
		case !w.reach(next):
			continue
		case !due:
			return
		}
		w.mu.Lock()
		h := heap.Pop(&w.queue).(happening)
		w.mu.Unlock()
		w.stage.Lock()
		did := h.fn()
		w.stage.Unlock()
		if did {
			w.Steps++
			synctest.Wait()
		}
	}
}

// reach lets time pass until then; false when something earlier has come up.
func (w *World) reach(at time.Duration) bool {
	d := at - w.time()
	if d <= 0 {
		return true
	}
	if w.live == nil {
		time.Sleep(d)
		return true
	}
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-timer.C:
		return true
	case <-w.wake:
		return false
	}
}
