package client

import (
	"time"

	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/distlock/distlock/fence"
	pb "github.com/distlock/distlock/proto/distlock/v1"
)

// LockInfo is a lock as the server has it.
type LockInfo struct {
	Name           string
	Holders        []Holder // in token order; at most 100
	HolderCount    int      // of all
	Waiters        []Waiter // in queue order; at most 100
	WaiterCount    int      // of all
	Limit          uint32   // of its shared holders and waiters; 0 for none
	DelayRemaining time.Duration
	Declared       bool
	Clock          uint64 // of a declared lock
	LastToken      fence.Token
}

// Holder is one hold.
type Holder struct {
	Token     fence.Token
	Floor     fence.Token
	LeaseID   uint64
	Owner     string
	Shared    bool
	Since     time.Time
	Actor     string
	Metadata  map[string]string
	LockDelay time.Duration
}

// Waiter is one place in a queue.
type Waiter struct {
	LeaseID  uint64
	Owner    string
	Shared   bool
	Since    time.Time
	Actor    string
	Metadata map[string]string
	Limit    uint32
}

// Obstacle is what stands between an acquisition and one of its locks.
type Obstacle struct {
	Name           string
	Position       int // in the queue, 1 is the head; 0 when not queued
	Holders        []Holder
	HolderCount    int
	Ahead          []Waiter
	DelayRemaining time.Duration
	Limit          uint32
}

// LeaseInfo is a lease as the server has it.
type LeaseInfo struct {
	ID         uint64
	TTL        time.Duration
	Remaining  time.Duration
	Owner      string
	Metadata   map[string]string
	GrantedAt  time.Time
	Holds      []Hold   // at most 100
	WaitingFor []string // at most 100
	// HoldCount and WaitingCount are those of all.
	HoldCount, WaitingCount int
	Own                     bool // made with an acquisition, ends with it
}

// Hold is one hold under a lease.
type Hold struct {
	Token     fence.Token
	LeaseID   uint64
	TTL       time.Duration // 0 where it is the lease's
	Shared    bool
	Locks     []HeldLock
	RequestID uint64
	GrantedAt time.Time
}

// HeldLock is one lock of a hold.
type HeldLock struct {
	Name  string
	Floor fence.Token
}

// Names are the names of its locks.
func (h Hold) Names() []string { return each(h.Locks, func(k HeldLock) string { return k.Name }) }

// TokenCheck answers CheckToken.
type TokenCheck struct {
	Live         bool
	CurrentToken fence.Token // highest live token; 0 when nobody holds the lock
	LastToken    fence.Token // last token granted, when known
	Floor        fence.Token // lowest live token; 0 when nobody holds the lock
}

// EventKind says what an event reports.
type EventKind string

// The kinds of events.
const (
	EventQueued       EventKind = "queued"
	EventGranted      EventKind = "granted"
	EventEnded        EventKind = "ended" // of a hold; Cause says how
	EventAbandoned    EventKind = "abandoned"
	EventDelayStarted EventKind = "delay-started"
	EventDelayEnded   EventKind = "delay-ended"
	EventDeclared     EventKind = "declared"
	EventUndeclared   EventKind = "undeclared"
)

var kinds = map[pb.Event_Kind]EventKind{
	pb.Event_KIND_QUEUED:        EventQueued,
	pb.Event_KIND_GRANTED:       EventGranted,
	pb.Event_KIND_ENDED:         EventEnded,
	pb.Event_KIND_ABANDONED:     EventAbandoned,
	pb.Event_KIND_DELAY_STARTED: EventDelayStarted,
	pb.Event_KIND_DELAY_ENDED:   EventDelayEnded,
	pb.Event_KIND_DECLARED:      EventDeclared,
	pb.Event_KIND_UNDECLARED:    EventUndeclared,
}

// Event is one thing that happened to a lock.
type Event struct {
	Revision uint64
	Kind     EventKind
	Name     string
	LeaseID  uint64
	Owner    string
	Token    fence.Token
	Floor    fence.Token
	Shared   bool
	Cause    Cause
	By       string
	Time     time.Time
	Delay    time.Duration
}

// Status is how the server is.
type Status struct {
	Version, NodeID, ClusterID, Leader string
	Term, Revision                     uint64
	LastToken                          fence.Token
	Leases, Locks, Waiters             int64
	InMemory                           bool
	StartedAt                          time.Time
	Level                              uint32 // of what the cluster's members all know; 0 from a server that does not tell
	Members                            []Member
	Restored                           *Restored // nil for a history that no backup is the beginning of
}

// Restored says which backup a history began with.
type Restored struct {
	At, BackupAt time.Time
	ClusterID    string      // that the backup is of
	TokensAbove  fence.Token // every token of this history is above it
}

// Member is one node of the cluster.
type Member struct {
	ID, ClientAddress, PeerAddress, Role string
	Leader, Healthy                      bool // healthy: it answers, and has caught up
	AppliedIndex                         uint64
	Incarnation                          string // of its data directory; "" of one that the first builds made
}

func lockInfo(k *pb.Lock) LockInfo {
	return LockInfo{
		Name: k.GetName(), Holders: holders(k.GetHolders()), Waiters: waiters(k.GetWaiters()),
		HolderCount: max(int(k.GetHolderCount()), len(k.GetHolders())), // a server of before does not count them
		WaiterCount: int(k.GetWaiterCount()), Limit: k.GetLimit(), DelayRemaining: k.GetDelayRemaining().AsDuration(),
		Declared: k.GetDeclared(), Clock: k.GetClock(), LastToken: fence.Token(k.GetLastToken()),
	}
}

func holders(list []*pb.Holder) []Holder {
	var out []Holder
	for _, h := range list {
		out = append(out, Holder{
			Token: fence.Token(h.GetToken()), Floor: fence.Token(h.GetFloor()), LeaseID: h.GetLeaseId(),
			Owner: h.GetOwner(), Shared: h.GetMode() == pb.Mode_MODE_SHARED, Since: timeOf(h.GetSince()),
			Actor: h.GetActor(), Metadata: h.GetMetadata(), LockDelay: h.GetLockDelay().AsDuration(),
		})
	}
	return out
}

func waiters(list []*pb.Waiter) []Waiter {
	var out []Waiter
	for _, w := range list {
		out = append(out, Waiter{
			LeaseID: w.GetLeaseId(), Owner: w.GetOwner(), Shared: w.GetMode() == pb.Mode_MODE_SHARED,
			Since: timeOf(w.GetSince()), Actor: w.GetActor(), Metadata: w.GetMetadata(), Limit: w.GetLimit(),
		})
	}
	return out
}

func leaseInfo(l *pb.Lease) LeaseInfo {
	out := LeaseInfo{
		ID: l.GetLeaseId(), TTL: l.GetTtl().AsDuration(), Remaining: l.GetRemaining().AsDuration(), Owner: l.GetOwner(),
		Metadata: l.GetMetadata(), GrantedAt: timeOf(l.GetGrantedAt()), WaitingFor: l.GetWaitingFor(), Own: l.GetOwn(),
	}
	for _, g := range l.GetHolds() {
		out.Holds = append(out.Holds, Hold{
			Token: fence.Token(g.GetToken()), LeaseID: g.GetLeaseId(), TTL: g.GetTtl().AsDuration(), Shared: g.GetMode() == pb.Mode_MODE_SHARED,
			Locks:     each(g.GetLocks(), func(k *pb.HeldLock) HeldLock { return HeldLock{k.GetName(), fence.Token(k.GetFloor())} }),
			RequestID: g.GetRequestId(), GrantedAt: timeOf(g.GetGrantedAt()),
		})
	}
	// A server of before counts neither.
	out.HoldCount = max(int(l.GetHoldCount()), len(out.Holds))
	out.WaitingCount = max(int(l.GetWaitingCount()), len(out.WaitingFor))
	return out
}

// timeOf is the zero time for one that is not set.
func timeOf(t *timestamppb.Timestamp) time.Time {
	if t == nil {
		return time.Time{}
	}
	return t.AsTime()
}

func event(e *pb.Event) Event {
	return Event{
		Revision: e.GetRevision(), Kind: kinds[e.GetKind()], Name: e.GetName(), LeaseID: e.GetLeaseId(),
		Owner: e.GetOwner(), Token: fence.Token(e.GetToken()), Floor: fence.Token(e.GetFloor()),
		Shared: e.GetMode() == pb.Mode_MODE_SHARED, Cause: causes[e.GetCause()], By: e.GetBy(),
		Time: timeOf(e.GetTime()), Delay: e.GetDelay().AsDuration(),
	}
}
