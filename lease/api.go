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
	// Attempt numbers the calls for one Request from 1. Of two that wait the
	// lower is answered ErrSuperseded, and the end of a call undoes nothing.
	// 0: the caller does not count, and its cancelled call is undone.
	Attempt uint32
	// Call names this call of a request that does not count attempts, for an
	// AbandonRequest of the same Call; 0: the manager makes one.
	Call  uint64
	Names []string // any order; sorted by the manager; no duplicates
	Mode  Mode
	Limit uint32
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

// Hold is an acquisition that has its locks.
type Hold struct {
	machine.Hold
	TTL time.Duration // of the lease
}

// ReleaseRequest gives a hold back.
type ReleaseRequest struct {
	Lease ID     // 0: whichever lease holds the token
	Name  string // optional with Lease; must be one of the hold's locks
	Token fence.Token
	// Request is that of the grant, optional and only with Lease: a repeat is
	// then answered right however much has ended since.
	Request RequestID
}

// AbandonRequest ends requests whatever became of them. It always succeeds.
type AbandonRequest struct {
	Lease    ID // 0 for requests with leases of their own
	Requests []RequestID
	// EndLease also ends the lease, cleanly: no lock-delay.
	EndLease bool
	// Call, with one request, abandons it only if that call of it is the newest.
	Call uint64
}

// ForceReleaseRequest breaks the hold with Token on a lock, or every hold when
// Token is 0.
type ForceReleaseRequest struct {
	Name  string
	Token fence.Token
	By    string
}

// RevokeLeaseRequest ends a lease; its holds are lost.
type RevokeLeaseRequest struct {
	Lease ID
	By    string
}

// KeepAliveRequest renews leases, and those made with acquisitions that have
// not been answered: each lives for its TTL from now.
type KeepAliveRequest struct {
	Leases   []ID
	Requests []RequestID
}

// KeptAlive answers a KeepAliveRequest, in the order asked.
type KeptAlive struct {
	Leases   []KeepAlive
	Requests []KeepWaiting
}

// KeepAlive is the answer to the renewal of one lease.
type KeepAlive struct {
	Lease ID
	TTL   time.Duration // counted from the receipt of the renewal
	Err   error         // *Refusal when the lease is gone; ErrOutcomeUnknown: ask again
	// Lost are the latest of the holds that ended otherwise than by the word of
	// who has the live lease, at most 64; LostCount counts all.
	Lost      []machine.Lost
	LostCount uint64
}

// KeepWaiting is the answer to the renewal of an acquisition's own lease.
type KeepWaiting struct {
	Request  RequestID
	Lease    ID // 0 when the request is not known
	TTL      time.Duration
	Waiting  bool  // it has a place in its queues; otherwise it was granted
	Attached bool  // a call waits for the grant
	Err      error // *Refusal: REQUEST_ENDED, REQUEST_NOT_FOUND
}

// CheckTokenRequest asks whether a token is of a live hold on a lock.
type CheckTokenRequest struct {
	Name  string
	Token fence.Token
}

// LockRequest asks for one lock. One that nobody holds, waits for or declared
// is an answer too.
type LockRequest struct{ Name string }

// LeaseRequest asks for one lease.
type LeaseRequest struct{ Lease ID }

// DeclareRequest makes a lock exist without a holder.
type DeclareRequest struct{ Name string }

// UndeclareRequest forgets a declared lock; its holds are lost.
type UndeclareRequest struct{ Name string }

// ReleaseClockRequest releases a declared lock by its clock.
type ReleaseClockRequest struct {
	Name  string
	Clock uint64
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

// Explanation says why an acquisition waits. It accompanies WaitTimeoutError
// and refusals with ReasonLockHeld.
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
	MaxPending      int // commands that wait for the log; see Manager.admits
}

// DefaultBounds are the bounds of a server started without flags.
func DefaultBounds() Bounds {
	return Bounds{
		MinTTL: 100 * time.Millisecond, MaxTTL: 24 * time.Hour,
		MaxLockDelay: time.Hour, MaxNamesPerCall: 64,
		MaxLeases: 2_000_000, MaxLocks: 2_000_000, MaxWaiters: 1_000_000,
		MaxPending: 100_000,
	}
}
