package machine

import "github.com/distlock/distlock/fence"

// Outcome is what applying a batch did: one result per command, by position,
// and events for everybody concerned, in order.
type Outcome struct {
	Results []Result
	Events  []Event
	Counts  Counts // after the batch
	Term    uint64 // of the batch's log entry
}

// Result answers one command. Refusal is nil when the command was done.
type Result struct {
	Refusal *Refusal
	// Lease is set by GrantLease, and by Acquire (its own lease or the one
	// named), granted or waiting.
	Lease LeaseID
	// Hold is set by an Acquire that is granted, at once or by an earlier
	// attempt with the same request id. Nil while it waits.
	Hold *Hold
	// Waiting is true for an Acquire that has a place in its queues.
	Waiting bool
}

// Hold is an acquisition that has its locks.
type Hold struct {
	Lease   LeaseID
	Request RequestID
	Token   fence.Token
	Mode    Mode
	Since   int64 // wall clock stamp of the grant, for display
	Locks   []HeldLock
}

// HeldLock is one lock of a grant with the floor it had at that moment.
type HeldLock struct {
	Name  string
	Floor fence.Token
	Clock uint64 // of a declared lock; 0 otherwise
}

// Reason is the machine-readable cause of a refusal, the same word in every
// room and on the wire.
type Reason string

// The reasons for which the machine refuses a command.
const (
	ReasonLeaseNotFound   Reason = "LEASE_NOT_FOUND"   // never existed, or forgotten
	ReasonLeaseEnded      Reason = "LEASE_ENDED"       // Refusal.Ended says why
	ReasonRequestEnded    Reason = "REQUEST_ENDED"     // a late duplicate of a request that has ended
	ReasonRequestNotFound Reason = "REQUEST_NOT_FOUND" // never came, or is forgotten
	ReasonRequestMismatch Reason = "REQUEST_MISMATCH"  // the id was used for a different request
	ReasonLockHeld        Reason = "LOCK_HELD"         // not free, and the caller would not wait; Refusal.Explain
	ReasonLimitDisagrees  Reason = "LIMIT_DISAGREES"   // Refusal.Limit is the lock's, Refusal.Asked the request's
	ReasonDeadlock        Reason = "DEADLOCK"          // Refusal.Circle
	ReasonDeadlockUnknown Reason = "DEADLOCK_UNKNOWN"  // too much waits for too much to find out
	ReasonNotHeld         Reason = "NOT_HELD"          // Refusal.Ended says why when remembered
	ReasonLockNotDeclared Reason = "LOCK_NOT_DECLARED" // the original's protocol only
	ReasonLockDeclared    Reason = "LOCK_DECLARED"     // declared twice
	ReasonClockDisagrees  Reason = "CLOCK_DISAGREES"   // Refusal.Clock is the lock's, Refusal.AskedClock the request's
	ReasonTokensExhausted Reason = "TOKENS_EXHAUSTED"  // the counter reached 2^53
	ReasonInvalid         Reason = "INVALID_ARGUMENT"  // Refusal.Field; validation upstream lets none through
)

// Refusal is a command turned down, with nothing changed. It is an error.
type Refusal struct {
	Reason       Reason
	Name         string      // the lock it speaks of, if one
	Lease        LeaseID     // the lease it speaks of, if one
	Token        fence.Token // the token it speaks of, if one
	Ended        *Ended      // why a lease or hold is gone, when remembered
	Current      fence.Token // highest token live on Name now; 0 when free
	Last         fence.Token // last token granted on Name, when known
	GrantedSince bool        // whether Name was granted to anyone after Token
	Limit        uint32
	Asked        uint32
	Clock        uint64
	AskedClock   uint64
	ExpiresAt    int64 // of a declared lock that is held, for display
	Field        string
	Explain      []Obstacle // why a request would have to wait
	Circle       []Link     // the deadlock, link by link, ending where it began
}

// EndCause says how a lease or a hold ended.
type EndCause uint8

// The causes of an end. Released is a clean one; all others are losses.
const (
	EndReleased EndCause = 1 + iota
	EndExpired
	EndRevoked
	EndForceReleased
	EndUndeclared
)

// Ended remembers the end of a lease or hold.
type Ended struct {
	Cause    EndCause
	By       string // who revoked or force-released
	At       int64  // wall clock stamp, for display
	Revision uint64
}

// Obstacle is what stands between a request and one of its locks.
type Obstacle struct {
	Name     string
	Position int      // place in the lock's queue, 1 is the head; 0 when not queued
	Ahead    []Waiter // at most MaxExplained of those ahead
	Holders  []Holder // at most MaxExplained
	Delays   []Delay  // at most MaxExplained, the latest
	Limit    uint32
	// HolderCount counts all, also those left out of Holders.
	HolderCount int
}

// MaxExplained bounds the holders, waiters and lock-delays listed in one
// explanation.
const MaxExplained = 16

// Link is one step of a deadlock: Actor, through its request, waits on Name
// for the next link's actor.
type Link struct {
	Actor string
	Name  string
	Lease LeaseID
}

// Holder is one hold on a lock, as shown to people.
type Holder struct {
	Lease     LeaseID
	Owner     string
	Request   RequestID
	Token     fence.Token
	Floor     fence.Token
	Mode      Mode
	Since     int64 // stamp of the grant: nanoseconds since 1970 by the clock of who led, for display
	LockDelay Duration
	Actor     string
	Metadata  []Meta // of the acquisition
}

// Waiter is one place in a lock's queue.
type Waiter struct {
	Lease    LeaseID
	Owner    string
	Request  RequestID
	Mode     Mode
	Limit    uint32
	Since    int64 // stamp of when it joined the queue
	Actor    string
	Metadata []Meta
}

// Delay is a lock-delay that has not ended.
type Delay struct {
	ID       uint64
	Duration Duration
	Since    int64    // stamp of its beginning
	Left     Duration // what was left of it when it was last marked; 0 when it never was
}

// Lock is one lock as it stands.
type Lock struct {
	Name     string
	Holders  []Holder // in token order, at most MaxListed
	Waiters  []Waiter // in queue order, at most MaxListed
	Delays   []Delay  // at most MaxListed, the latest
	Limit    uint32   // of its shared holders and waiters; 0 for none
	Declared bool
	Clock    uint64 // of a declared lock
	// ExpiresAt is the grant stamp plus TTL of the last grant of a declared
	// lock, in nanoseconds since 1970, for display in the original's protocol.
	ExpiresAt int64
	Last      fence.Token // last token granted, when known
	// HolderCount and WaiterCount count all, also those not listed.
	HolderCount, WaiterCount int
}

// MaxListed bounds the holders and waiters listed with a lock.
const MaxListed = 100

// Lease is one lease as it stands.
type Lease struct {
	ID       LeaseID
	TTL      Duration
	Owner    string
	Metadata []Meta
	Since    int64     // stamp of its grant
	Own      bool      // made with an acquisition, ends with it
	Request  RequestID // of the GrantLease or Acquire that made it
	Holds    []Hold    // in token order
	Waits    []Wait    // in order of request
}

// Wait is an acquisition that has a place in its queues.
type Wait struct {
	Request RequestID
	Names   []string
	Mode    Mode
	Since   int64 // stamp of when it joined its queues
}

// Lost is a hold under a live lease that ended otherwise than by the word of
// who has the lease.
type Lost struct {
	Token fence.Token
	Ended Ended
}

// EventKind says what an event reports.
type EventKind uint8

// The kinds of events.
const (
	EventLeaseGranted EventKind = 1 + iota
	EventLeaseEnded             // Cause, By
	EventQueued                 // an acquisition joined its queues
	EventGranted                // Token, Locks
	EventHoldEnded              // Token, Locks, Cause, By
	EventAbandoned              // a waiter left its queues: abandoned, or its lease ended (Cause)
	EventDelayStarted           // Name in Locks[0], Delay
	EventDelayEnded             // Name in Locks[0], Delay
	EventDeclared               // Name in Locks[0]
	EventUndeclared             // Name in Locks[0]
)

// Event reports one thing that happened. Locks is shared and not changed. There
// are thousands in the ring for watchers, so the small fields stand together.
type Event struct {
	Revision uint64 // store-wide, rises by one with every event
	Kind     EventKind
	Mode     Mode
	Cause    EndCause
	Own      bool // the lease was made with an acquisition
	// Elsewhere: a hold was released by its token alone, not by who has its
	// lease. Of a lease of its own it is said of the lease's end.
	Elsewhere bool
	Lease     LeaseID
	Request   RequestID
	Owner     string
	Token     fence.Token
	Locks     []HeldLock
	By        string
	TTL       Duration // EventLeaseGranted
	Delay     Delay
	Stamp     int64
}

// Counts are the sizes of the machine's tables.
type Counts struct {
	Leases, Locks, Waiters, Holds, Remembered int

	Marks int // of leases
}
