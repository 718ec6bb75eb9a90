package main

import (
	"context"
	"os"
	"runtime/debug"
	"runtime/metrics"
	"time"
)

const (
	// spareHeap is how much garbage a server may make between two collections
	// even when little of its heap is alive: with a small heap Go would collect
	// dozens of times a second under load.
	spareHeap = 64 << 20
	goPercent = 100 // Go's own, for heaps above spareHeap
)

// tuneGC keeps the collector's pace at spareHeap or Go's own, whichever is
// slower, until ctx ends; not where GOGC says otherwise.
func tuneGC(ctx context.Context) {
	if os.Getenv("GOGC") != "" {
		return
	}
	sample := []metrics.Sample{{Name: "/gc/heap/live:bytes"}}
	percent := goPercent
	tick := time.NewTicker(250 * time.Millisecond)
	defer tick.Stop()
	for {
		metrics.Read(sample)
		live := max(sample[0].Value.Uint64(), 4<<20) // Go's least
		want := gcPercent(live)
		if want > percent+percent/8 || want < percent-percent/8 { // a change stops the world for a moment
			debug.SetGCPercent(want)
			percent = want
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			return
		}
	}
}

func gcPercent(live uint64) int { return max(goPercent, int(spareHeap*100/live)) }
