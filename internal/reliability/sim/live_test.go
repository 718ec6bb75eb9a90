package sim_test

import (
	"flag"
	"fmt"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"

	"github.com/distlock/distlock/internal/reliability/sim"
)

var (
	liveSeeds = flag.Int("live", 12, "how many seeds TestShippedClients simulates")
	liveFirst = flag.Uint64("live-first", 1, "the first of them")
)

// TestShippedClients simulates seeds with clients of package client, and holds
// what the servers have against what they believe.
func TestShippedClients(t *testing.T) {
	n := *liveSeeds
	if testing.Short() {
		n = min(n, 3)
	}
	var enough atomic.Bool
	var mu sync.Mutex
	total := 0
	t.Run("run", func(t *testing.T) {
		for i := range uint64(n) {
			seed := *liveFirst + i
			t.Run(fmt.Sprint(seed), func(t *testing.T) {
				t.Parallel()
				if enough.Load() {
					return // the first to fail tell
				}
				synctest.Test(t, func(t *testing.T) {
					ops, err := sim.RunLive(seed)
					if err != nil {
						enough.Store(true)
						t.Errorf("seed %d: %v", seed, err)
					}
					mu.Lock()
					total += ops
					mu.Unlock()
				})
			})
		}
	})
	t.Logf("%d seeds, %d operations", n, total)
}
