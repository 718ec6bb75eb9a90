package machine

import "github.com/distlock/distlock/fence"

// LeaseID names a lease. Ids are minted by the machine from a counter that
// only rises, so an id is never reused: it is its own incarnation.
type LeaseID uint64

// RequestID names one acquisition, so that a retry finds the first attempt.
//
//   - Under a lease of the client's (Acquire.Lease != 0) ids below
//     RandomRequest are sequence numbers: every request carries the lowest
//     one still open and the machine refuses lower ones (RIFL, SOSP 2015).
//   - Those from RandomRequest on are random, for a lease that several clients
//     have, and remembered after their end, bounded in count and until Forget.
//   - With a lease of its own (Acquire.Lease == 0) the id is random and is
//     remembered after its end, bounded in count and until Forget.
//   - An id with the top bit set was made up by the server for a caller that
//     gave none. It is unique but not remembered.
type RequestID uint64

// RandomRequest is the lowest id under a lease that is not a sequence number.
const RandomRequest RequestID = 1 << 62

// AnonymousRequest is the bit that marks a request id made by the server.
const AnonymousRequest RequestID = 1 << 63

// Duration is a span of time in nanoseconds. The machine stores durations
// for whoever runs the timers; it never measures one.
type Duration int64

// Mode says whether a hold excludes all others.
type Mode uint8

// The modes of a hold.
const (
	Exclusive Mode = 1 + iota
	Shared
)

// Meta is one key and value of a lease's or an acquisition's metadata.
// Metadata is kept sorted by key, so that equal metadata is equal bytes.
type Meta struct{ Key, Value string }

// Command is one change to the machine. The set is closed.
type Command interface{ command() }

// GrantLease makes a lease. A retry with the same non-zero Request finds the
// lease made by the first attempt.
type GrantLease struct {
	Request  RequestID // random, 0 for none
	TTL      Duration
	Owner    string
	Metadata []Meta
}

// RevokeLease ends a lease on somebody's word; its holds are lost.
// Revoking a lease that is remembered as revoked succeeds again.
type RevokeLease struct {
	Lease LeaseID
	By    string
}

// ExpireLeases ends every named lease whose time ran out at the leader of
// Term. It does nothing when the batch is applied in another term: then a
// newer leader owns the clocks. Leases already gone are passed over.
type ExpireLeases struct {
	Leases []LeaseID
	Term   uint64
}

// Mark writes down what is left of leases that have not been renewed for a
// while, and of lock-delays, at the leader of Term. It does nothing when the
// batch is applied in another term. (Level 3.)
type Mark struct {
	Leases []LeaseMark
	Delays []DelayMark
	Term   uint64
}

// LeaseMark is what was left of a lease's TTL.
type LeaseMark struct {
	Lease LeaseID
	Left  Duration
}

// DelayMark is what was left of a lock-delay.
type DelayMark struct {
	Name  string
	Delay uint64
	Left  Duration
}

// Clear takes away the marks of leases that are renewed. (Level 3.)
type Clear struct{ Leases []LeaseID }

// Acquire asks for one or several locks, granted all at once or not at all.
// Names are sorted and free of duplicates.
type Acquire struct {
	Lease      LeaseID // 0: make a lease of its own from TTL, Owner and Metadata
	Request    RequestID
	LowestOpen RequestID // only with Lease and a sequence number; 0 otherwise
	Names      []string
	Mode       Mode
	Limit      uint32 // Shared only: at most this many at once; 0 for no limit
	Wait       bool   // join the queues; otherwise be refused at once
	LockDelay  Duration
	Actor      string // thread of work for deadlock detection; "" assumes nothing
	Metadata   []Meta // of the acquisition, shown to whoever waits behind it
	TTL        Duration
	Owner      string
	// Declared marks the original protocol's acquire: every name must be
	// declared.
	Declared bool
}

// Abandon ends a request whatever became of it: a waiter leaves its queues, a
// grant is undone as a clean release, and an Acquire that arrives later with
// this id is refused. It always succeeds.
type Abandon struct {
	Lease   LeaseID // 0 for a request with a lease of its own
	Request RequestID
}

// AbandonAll is Abandon of several requests. With EndLease it also ends the
// lease: everything held under it is released, without lock-delay, and whoever
// waits under it leaves. A lease that is gone is passed over. (Level 2.)
type AbandonAll struct {
	Lease    LeaseID
	Requests []RequestID
	EndLease bool
}

// EndWait takes a waiter out of its queues, and ends its request. One that is
// granted is left alone, and is the result. (Level 2.)
type EndWait struct {
	Lease   LeaseID // 0 for a request with a lease of its own
	Request RequestID
}

// Release gives a hold back cleanly. Lease 0 means whichever lease holds it.
// Name, when not empty, must be one of the hold's locks. All locks of the
// acquisition are released together; a lease of its own ends with it.
type Release struct {
	Lease LeaseID
	Name  string
	Token fence.Token
	// Request, with Lease, is that of the grant: a repeat is then told right
	// however much has ended since. 0: not said. (Level 2.)
	Request RequestID
}

// ForceRelease breaks the hold with Token on Name, or every hold on Name when
// Token is 0. The holds are lost: lock-delay applies.
type ForceRelease struct {
	Name  string
	Token fence.Token
	By    string
}

// EndDelay ends one lock-delay. The manager proposes it when the delay's time
// has passed; an unknown delay is passed over.
type EndDelay struct {
	Name  string
	Delay uint64
}

// Declare makes a lock exist without a holder, with clock 0.
type Declare struct{ Name string }

// Undeclare forgets a declared lock and its clock; its holds are lost.
type Undeclare struct{ Name string }

// ReleaseClock is the original protocol's release: by clock, of a declared
// lock, successful also when the hold has expired.
type ReleaseClock struct {
	Name  string
	Clock uint64
}

// Forget drops what is remembered of requests, leases and holds that ended at
// or before revision Through.
type Forget struct{ Through uint64 }

func (*GrantLease) command()   {}
func (*RevokeLease) command()  {}
func (*ExpireLeases) command() {}
func (*Mark) command()         {}
func (*Clear) command()        {}
func (*Acquire) command()      {}
func (*Abandon) command()      {}
func (*AbandonAll) command()   {}
func (*EndWait) command()      {}
func (*Release) command()      {}
func (*ForceRelease) command() {}
func (*EndDelay) command()     {}
func (*Declare) command()      {}
func (*Undeclare) command()    {}
func (*ReleaseClock) command() {}
func (*Forget) command()       {}

// Batch is what one log entry carries.
type Batch struct {
	// Stamp is the proposer's wall clock in nanoseconds since 1970. It is
	// for display only: no decision rests on it.
	Stamp int64
	// Term is the log entry's own term. The log fills it in when it applies
	// the entry; it is not part of the encoding.
	Term     uint64
	Commands []Command
}
