// Package machine is the pure state machine of distlock: leases, locks,
// queues, grants and the wait-for graph. It has no clock, no goroutine, no
// I/O and no randomness: the same batches give the same state, byte for byte.
package machine

import "fmt"

// Error says in one line what was refused and why.
func (r *Refusal) Error() string { return fmt.Sprintf("%s", r.Reason) }
