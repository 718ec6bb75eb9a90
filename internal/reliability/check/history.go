// Package check holds the service's promises as functions over a recorded
// history. The simulation and the tests of real processes record; a violation
// names the invariant and the events that contradict each other.
package check

import (
	"fmt"
	"slices"
	"strings"
	"sync"
	"time"
)

// Kind says what an event reports, and so which of its fields mean anything.
type Kind uint8

// What clients saw.
const (
	Asked      Kind = 1 + iota // an acquisition is sent for the first time: Request, Sent, Forever
	Acquired                   // its grant is acknowledged: Request, Lease, Token, Locks, Sent
	Refused                    // it got a definite no: Request
	Cancelling                 // its client no longer wants it: Request
	Cancelled                  // its abandonment is acknowledged: Request
	Gone                       // client Who ended, whatever it had asked for
	Releasing                  // a release is sent for the first time: Token
	Released                   // a release is acknowledged: Token
	Revoked                    // a revocation is acknowledged: Lease
	Renewed                    // a renewal sent at Sent is acknowledged: Lease, TTL
	Believes                   // Who counts on Locks with Token until Until, at the latest
	Doubts                     // Who counts on Token no more
	Wrote                      // a guarded resource accepted a write: Locks[0], Token, Floor
	Read                       // a linearizable read begun at Sent: Locks[0], Holders
	Progressed                 // a request made by Who at Sent was served
)

// What the store did, each change once, in the order of its commit.
const (
	LeaseMade  Kind = 64 + iota // Lease, TTL, Request if it was made with an acquisition
	Touched                     // the leader gave Lease, or that made with Request, its TTL anew (a renewal, a repeat, a waiter that left)
	LeaseEnded                  // Lease, Cause
	Queued                      // Request waits for Locks
	Granted                     // Request, Lease, Token, Locks
	Left                        // Request left its queues without a grant
	HoldEnded                   // Token, Cause
)

// What happened to the world.
const (
	Applied   Kind = 128 + iota // replica Who has state Hash at Index
	Disturbed                   // from here on the leader's clocks count anew, or again
	Healed                      // the last fault has ended
	Noted                       // Cause, for whoever reads the story
)

// The causes of an end, in the service's own words.
const (
	Expired  = "expired"
	ByOthers = "by others" // revoked, force-released, deleted: at once, on purpose
	Cleanly  = "released"
)

// Event is one thing that happened.
type Event struct {
	At   time.Duration // on the judge's one clock
	Kind Kind
	Who  int // the client or node

	Request uint64
	Lease   uint64
	Token   uint64
	Floor   uint64
	Locks   []string
	Floors  []uint64 // of a grant, by lock
	Shared  bool
	Forever bool // the wait has no bound
	Limit   int  // of a shared hold; 0 for none
	TTL     time.Duration
	Sent    time.Duration
	Until   time.Duration
	Cause   string
	Holders []uint64 // tokens
	Index   uint64
	Hash    uint64
}

// History is what was recorded, and what the promises depend on.
type History struct {
	// Rate is how much faster than the judge's clock a server's may run, and
	// slower: 0.01 for 1 %.
	Rate float64
	// Lag bounds an expiry's lag when nothing is wrong: a tick of the wheel
	// and the commits that it may wait for.
	Lag time.Duration
	// Heal bounds the time from the end of the last fault to progress: two
	// elections and a TTL.
	Heal time.Duration
	// End is when the recording ended.
	End time.Duration

	mu     sync.Mutex
	events []Event
}

// Add records an event. It may be called from any goroutine; events of equal
// times keep the order in which they were added.
func (h *History) Add(e Event) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.events = append(h.events, e)
}

// Events returns the events in the order in which they were added.
func (h *History) Events() []Event {
	h.mu.Lock()
	defer h.mu.Unlock()
	return slices.Clone(h.events)
}

var kindNames = map[Kind]string{
	Asked: "asked", Acquired: "acquired", Refused: "refused", Cancelling: "cancelling", Cancelled: "cancelled", Gone: "gone",
	Releasing: "releasing", Released: "released", Revoked: "revoked", Renewed: "renewed", Believes: "believes",
	Doubts: "doubts", Wrote: "wrote", Read: "read", Progressed: "progressed",
	LeaseMade: "lease made", Touched: "touched", LeaseEnded: "lease ended", Queued: "queued", Granted: "granted",
	Left: "left", HoldEnded: "hold ended", Applied: "applied", Disturbed: "disturbed", Healed: "healed", Noted: "NOTE",
}

// String shows what of the event is set.
func (e Event) String() string {
	var b strings.Builder
	fmt.Fprintf(&b, "%v %s", e.At, kindNames[e.Kind])
	show := func(name string, v any, set bool) {
		if set {
			fmt.Fprintf(&b, " %s=%v", name, v)
		}
	}
	show("who", e.Who, true)
	show("request", e.Request, e.Request != 0)
	show("lease", e.Lease, e.Lease != 0)
	show("token", e.Token, e.Token != 0)
	show("floor", e.Floor, e.Floor != 0)
	show("locks", e.Locks, e.Locks != nil)
	show("floors", e.Floors, e.Floors != nil)
	show("shared", e.Shared, e.Shared)
	show("forever", e.Forever, e.Forever)
	show("limit", e.Limit, e.Limit != 0)
	show("ttl", e.TTL, e.TTL != 0)
	show("sent", e.Sent, e.Sent != 0)
	show("until", e.Until, e.Until != 0)
	show("cause", e.Cause, e.Cause != "")
	show("holders", e.Holders, e.Holders != nil)
	show("index", e.Index, e.Index != 0)
	show("hash", e.Hash, e.Hash != 0)
	return b.String()
}

// Violation is a broken promise.
type Violation struct {
	Invariant string // "I1" to "I8"
	At        time.Duration
	Msg       string
}

func (v Violation) String() string { return fmt.Sprintf("%s at %v: %s", v.Invariant, v.At, v.Msg) }

// Invariants are the checkers by name.
var Invariants = []struct {
	Name, Promise string
	Check         func(*History) []Violation
}{
	{"I1", "accepted tokens never decrease; locally valid windows of an exclusive lock never overlap", ExclusionHolds},
	{"I2", "tokens strictly rise, per lock and store-wide", TokensRise},
	{"I3", "nothing acknowledged is lost; a request has one answer", NothingIsLost},
	{"I4", "no lease ends before the send time of its last acknowledged renewal and its TTL", NoLeaseEndsEarly},
	{"I5", "expiry is late by a tick and its commits at most", NoLeaseEndsLate},
	{"I6", "waiters are served in order; each gets a definite answer; a cancelled one is never granted", QueuesAreFair},
	{"I7", "replicas are identical at equal index", ReplicasAgree},
	{"I8", "after the faults there is progress", FaultsHeal},
}

// All runs every checker.
func All(h *History) []Violation {
	var list []Violation
	for _, i := range Invariants {
		list = append(list, i.Check(h)...)
	}
	return list
}

// collector gathers violations of one invariant.
type collector struct {
	name string
	list []Violation
}

func (c *collector) add(at time.Duration, format string, args ...any) {
	const most = 10 // the first ones tell
	if len(c.list) < most {
		c.list = append(c.list, Violation{c.name, at, fmt.Sprintf(format, args...)})
	}
}
