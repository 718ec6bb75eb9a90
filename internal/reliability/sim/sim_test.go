package sim

import (
	"flag"
	"fmt"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"
)

var (
	seeds   = flag.Int("seeds", 40, "how many seeds to simulate")
	first   = flag.Uint64("first", 1, "the first of them")
	replays = flag.Int("replays", 4, "how many seeds TestASeedReplays simulates twice")
	one     = flag.Uint64("seed", 0, "simulate this seed only, and tell its story")
)

// TestSeeds simulates runs and holds each against every promise.
func TestSeeds(t *testing.T) {
	n := *seeds
	if testing.Short() {
		n = min(n, 10)
	}
	if *one != 0 {
		*first, n = *one, 1
	}
	var mu sync.Mutex
	var virtual time.Duration
	ran, steps, events := 0, 0, 0
	eachSeed(t, *first, n, func(t *testing.T, seed uint64) {
		w := Run(seed)
		list := w.Check()
		for _, v := range list {
			t.Error(v)
		}
		if len(list) > 0 {
			t.Logf("to replay: go test ./internal/reliability/sim -run TestSeeds -seed %d", seed)
			if *one != 0 {
				t.Logf("before that:\n%s", w.Story(list[0].At, 200))
			}
		}
		mu.Lock()
		defer mu.Unlock()
		ran++
		virtual += w.Virtual()
		steps += w.Steps
		events += len(w.history.Events())
	})
	t.Logf("%d seeds, %.1f virtual hours, %d steps, %d events in the histories", ran, virtual.Hours(), steps, events)
}

// eachSeed simulates n seeds, each in a bubble of its own, and returns when all
// have ended. Once one has failed no other begins: the first to fail tell.
func eachSeed(t *testing.T, first uint64, n int, simulate func(t *testing.T, seed uint64)) {
	var enough atomic.Bool
	t.Run("run", func(t *testing.T) {
		for i := range uint64(n) {
			seed := first + i
			t.Run(fmt.Sprint(seed), func(t *testing.T) {
				t.Parallel()
				if enough.Load() {
					return
				}
				synctest.Test(t, func(t *testing.T) {
					simulate(t, seed)
					if t.Failed() {
						enough.Store(true)
					}
				})
			})
		}
	})
}

// TestASeedReplays: the same seed gives the same history, to the nanosecond.
func TestASeedReplays(t *testing.T) {
	for seed := range uint64(*replays) {
		var digests []uint64
		for range 2 {
			synctest.Test(t, func(t *testing.T) { digests = append(digests, Run(seed+1).Digest()) })
		}
		if digests[0] != digests[1] {
			t.Errorf("seed %d has digests %x", seed, digests)
		}
	}
}
