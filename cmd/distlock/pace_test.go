package main

import "testing"

func TestGCPercent(t *testing.T) {
	for live, want := range map[uint64]int{4 << 20: 1600, 32 << 20: 200, 64 << 20: 100, 1 << 30: 100} {
		if got := gcPercent(live); got != want {
			t.Errorf("%d MiB live: %d %%, want %d %%", live>>20, got, want)
		}
	}
}
