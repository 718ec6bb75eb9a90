package client

import (
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"
)

// boottime is the time since the machine booted, suspension included: Go's
// monotonic clock stops while a machine sleeps, and a lease does not. It is a
// system call. lately costs a tenth: the monotonic clock, ahead by what it was
// behind when now was read last. It may be early by a suspension since, never
// late.
func boottime() (now, lately func() time.Duration) {
	start := time.Now()
	var ahead atomic.Int64
	now = func() time.Duration {
		var ts unix.Timespec
		if err := unix.ClockGettime(unix.CLOCK_BOOTTIME, &ts); err != nil {
			panic("client: CLOCK_BOOTTIME cannot be read: " + err.Error()) // since Linux 2.6.39 it can
		}
		boot := ts.Nano()
		ahead.Store(boot - int64(time.Since(start)))
		return time.Duration(boot)
	}
	now()
	return now, func() time.Duration { return time.Since(start) + time.Duration(ahead.Load()) }
}
