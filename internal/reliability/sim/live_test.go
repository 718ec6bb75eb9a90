package sim

import (
	"flag"
	"sync"
	"testing"
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
	var mu sync.Mutex
	total := 0
	eachSeed(t, *liveFirst, n, func(t *testing.T, seed uint64) {
		ops, err := RunLive(seed)
		if err != nil {
			t.Errorf("seed %d: %v", seed, err)
		}
		mu.Lock()
		defer mu.Unlock()
		total += ops
	})
	t.Logf("%d seeds, %d operations", n, total)
}
