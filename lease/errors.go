package lease

import (
	"errors"
	"fmt"
	"time"
)

// Errors of the manager. A refusal by the machine is a *Refusal instead.
var (
	// ErrNotLeader: nothing was done; ask the leader. See *NotLeaderError.
	ErrNotLeader = errors.New("this node does not lead")
	// ErrOutcomeUnknown: the change may or may not take effect; retry with
	// the same request id to learn which.
	ErrOutcomeUnknown = errors.New("outcome unknown: leadership or the log was lost while the change was in flight")
	// ErrStopping: the server is shutting down; nothing was lost, a waiter
	// keeps its place and finds it again by request id.
	ErrStopping = errors.New("the server is shutting down")
	// ErrLogFailed: the log cannot be written (disk full, I/O error); the
	// server has stopped acknowledging.
	ErrLogFailed = errors.New("the log failed")
	// ErrSlowWatcher: the watcher did not keep up; resume from the last
	// revision it saw.
	ErrSlowWatcher = errors.New("the watcher is too slow")
)

// NotLeaderError is ErrNotLeader with the leader's client address if known.
type NotLeaderError struct{ Hint string }

func (e *NotLeaderError) Error() string {
	if e.Hint == "" {
		return ErrNotLeader.Error()
	}
	return ErrNotLeader.Error() + ", the leader is " + e.Hint
}

// Is makes errors.Is(err, ErrNotLeader) true.
func (e *NotLeaderError) Is(target error) bool { return target == ErrNotLeader }

// InvalidError is a request turned down before anything was tried.
type InvalidError struct {
	Field string // in the API's words: "name", "ttl", "limit", ...
	Msg   string // says what would be right
}

func (e *InvalidError) Error() string { return fmt.Sprintf("%s: %s", e.Field, e.Msg) }

// ExhaustedError says which of the server's bounds is reached.
type ExhaustedError struct {
	What string // "leases", "locks" or "waiters"
	Max  int
}

func (e *ExhaustedError) Error() string {
	return fmt.Sprintf("the server's limit of %d %s is reached", e.Max, e.What)
}

// WaitTimeoutError says that a bounded wait ended without the lock, and why.
// The request has left its queues.
type WaitTimeoutError struct {
	Waited  time.Duration
	Explain Explanation
}

func (e *WaitTimeoutError) Error() string {
	return fmt.Sprintf("not acquired within %v", e.Waited)
}

// RangeError says that a watch asked for events that are no longer kept.
type RangeError struct{ Asked, Oldest uint64 }

func (e *RangeError) Error() string {
	return fmt.Sprintf("revision %d is no longer kept, the oldest is %d: list anew and watch from there", e.Asked, e.Oldest)
}
