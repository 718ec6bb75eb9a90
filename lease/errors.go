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
	// ErrSuperseded: a later call with the same request id waits in place of
	// this one.
	ErrSuperseded = errors.New("a repeat of the request waits in its place")
	// ErrDetached is the cause with which a caller cancels an Acquire whose
	// client was lost: its place is kept for a repeat, for one TTL.
	ErrDetached = errors.New("the client's connection was lost")
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

// HeldError says that a lock is not free and the request would not wait. It
// wraps the machine's refusal.
type HeldError struct {
	Refusal *Refusal
	Explain Explanation
}

func (e *HeldError) Error() string { return e.Refusal.Error() }

// Unwrap returns the refusal.
func (e *HeldError) Unwrap() error { return e.Refusal }

// WaitTimeoutError says that a bounded wait ended without the lock, and why.
// The request has left its queues.
type WaitTimeoutError struct {
	Waited  time.Duration
	Explain Explanation
}

func (e *WaitTimeoutError) Error() string {
	return fmt.Sprintf("not acquired within %v", e.Waited.Round(time.Millisecond))
}

// RangeError says that a watch asked for events that are no longer kept, or
// for a revision that this store has not come to: then it is another store.
type RangeError struct{ Asked, Oldest uint64 }

func (e *RangeError) Error() string {
	if e.Asked > e.Oldest {
		return fmt.Sprintf("revision %d has not been reached: list anew and watch from there", e.Asked)
	}
	return fmt.Sprintf("revision %d is no longer kept, the oldest is %d: list anew and watch from there", e.Asked, e.Oldest)
}

// MemberError is a change of the cluster's members that was refused: nothing
// was changed.
type MemberError struct {
	ID  string // of the member; "" when it is not about one
	Msg string
}

func (e *MemberError) Error() string {
	if e.ID == "" {
		return e.Msg
	}
	return fmt.Sprintf("member %s: %s", e.ID, e.Msg)
}
