package lease

import (
	"time"

	"github.com/distlock/distlock/fence"
	"github.com/distlock/distlock/lease/machine"
)

// The machine's words are the manager's words.
type (
	// ID names a lease.
	ID = machine.LeaseID
	// RequestID names an acquisition.
	RequestID = machine.RequestID
	// Mode is exclusive or shared.
	Mode = machine.Mode
	// Refusal is the machine's error.
	Refusal = machine.Refusal
	// Event is one thing that happened.
	Event = machine.Event
)

// WaitForever is the AcquireRequest.Wait that sets no bound.
const WaitForever time.Duration = -1

// GrantLeaseRequest asks for a lease.
type GrantLeaseRequest struct {
	Request  RequestID // random, so that a retry finds the lease; 0 for none
	TTL      time.Duration
	Owner    string
	Metadata []machine.Meta
}

// AcquireRequest asks for one or several locks, all at once or none.
type AcquireRequest struct {
	Lease      ID        // 0: make a lease of its own from TTL and Owner
	Request    RequestID // 0: the manager makes an anonymous one
	LowestOpen RequestID
	Names      []string // any order; sorted by the manager; no duplicates
	Mode       Mode
	Limit      uint32
	// Wait bounds the time in the queue: 0 is not at all, WaitForever no bound.
	Wait      time.Duration
	LockDelay time.Duration
	Actor     string
	Metadata  []machine.Meta
	TTL       time.Duration
	Owner     string
	// Declared marks the original protocol's acquire.
	Declared bool
}

// Grant is an acquisition that has its locks.
type Grant struct {
	machine.Grant
	TTL time.Duration // of the lease
}

// ReleaseRequest gives a hold back.
type ReleaseRequest struct {
	Lease ID     // 0: whichever lease holds the token
	Name  string // optional with Lease; must be one of the hold's locks
	Token fence.Token
}

// KeepAlive is the answer to one renewal.
type KeepAlive struct {
	Lease ID
	TTL   time.Duration // counted from the receipt of the renewal
	Err   error         // *Refusal when the lease is gone
}

// LeaseInfo is a lease with what only the leader's clock knows.
type LeaseInfo struct {
	machine.Lease
	Remaining time.Duration // until the deadline, as of the reply
}

// LockInfo is a lock with what only the leader's clock knows.
type LockInfo struct {
	machine.Lock
	DelayRemaining time.Duration // of the longest lock-delay, 0 for none
}

// TokenCheck answers CheckToken.
type TokenCheck struct {
	Live    bool        // the token is of a live hold on the lock
	Current fence.Token // highest live token; 0 when nobody holds the lock
	Last    fence.Token // last token granted, when known
	Floor   fence.Token // lowest live token; 0 when nobody holds the lock
}

// Explanation says why an acquisition waits. It accompanies ErrWaitTimeout and
// refusals with ReasonLockHeld.
type Explanation struct {
	Obstacles []Obstacle
}

// Obstacle is what stands before one of the request's locks.
type Obstacle struct {
	machine.Obstacle
	DelayRemaining time.Duration
}

// Bounds are what a manager accepts. The zero value of a field takes the
// default that DefaultBounds gives.
type Bounds struct {
	MinTTL, MaxTTL  time.Duration
	MaxLockDelay    time.Duration
	MaxNamesPerCall int
	MaxLeases       int // live leases
	MaxLocks        int // existing locks
	MaxWaiters      int // waiting acquisitions
}

// DefaultBounds are the bounds of a server started without flags.
func DefaultBounds() Bounds {
	return Bounds{
		MinTTL: 100 * time.Millisecond, MaxTTL: 24 * time.Hour,
		MaxLockDelay: time.Hour, MaxNamesPerCall: 64,
		MaxLeases: 2_000_000, MaxLocks: 2_000_000, MaxWaiters: 1_000_000,
	}
}
