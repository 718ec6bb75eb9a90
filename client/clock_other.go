//go:build !linux

package client

import (
	"time"

	"github.com/jonboulle/clockwork"
)

// boottime is the monotonic clock where there is no CLOCK_BOOTTIME.
func boottime() (now, lately func() time.Duration) {
	clock := clockwork.NewRealClock()
	start := clock.Now()
	now = func() time.Duration { return clock.Since(start) }
	return now, now
}
