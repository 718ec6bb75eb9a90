//go:build !linux

package client

import (
	"time"

	"github.com/jonboulle/clockwork"
)

// boottime is the monotonic clock where there is no CLOCK_BOOTTIME.
func boottime() func() time.Duration {
	clock := clockwork.NewRealClock()
	start := clock.Now()
	return func() time.Duration { return clock.Since(start) }
}
