package lease

import "time"

// Observer is told what the manager does, for metrics. Its methods are called
// on the manager's loop: they must return at once and ask it nothing.
type Observer interface {
	// Granted is told of each grant, and how long its call waited: 0 if it did
	// not have to.
	Granted(waited time.Duration)
	// Expired is told of each lease that ended because nobody renewed it, and
	// how long after its deadline it was applied.
	Expired(lag time.Duration)
	// Committed is told of each batch, and the time from its proposal until it
	// was applied.
	Committed(commands int, took time.Duration)
}

type unobserved struct{}

func (unobserved) Granted(time.Duration)        {}
func (unobserved) Expired(time.Duration)        {}
func (unobserved) Committed(int, time.Duration) {}
