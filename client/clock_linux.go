package client

import (
	"time"

	"golang.org/x/sys/unix"
)

// boottime is the time since the machine booted, suspension included: Go's
// monotonic clock stops while a machine sleeps, and a lease does not.
func boottime() func() time.Duration {
	return func() time.Duration {
		var ts unix.Timespec
		if err := unix.ClockGettime(unix.CLOCK_BOOTTIME, &ts); err != nil {
			panic("client: CLOCK_BOOTTIME cannot be read: " + err.Error()) // since Linux 2.6.39 it can
		}
		return time.Duration(ts.Nano())
	}
}
