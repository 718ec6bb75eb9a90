package client

import (
	"context"
	"errors"
	"io"
	"iter"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"

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

// Hold is one grant under a lease.
type Hold struct {
	Token  fence.Token
	Shared bool
	Since  time.Time
	Names  []string
}

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
	EventUndeclared   EventKind = "deleted"
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

// ReadOption changes how Get, List, LeaseInfo and Leases read.
type ReadOption func(*pb.Consistency)

// Stale reads what the node that is asked has, leader or not, which may be
// behind: it costs the leader nothing and works without one. What is left of
// TTLs and lock-delays only the leader knows. Without it a read has every
// change that was acknowledged before it began.
func Stale() ReadOption {
	return func(c *pb.Consistency) { *c = pb.Consistency_CONSISTENCY_STALE }
}

func consistency(opts []ReadOption) (c pb.Consistency) {
	for _, opt := range opts {
		opt(&c)
	}
	return c
}

// Get shows a lock. One that nobody holds, waits for or declared is an answer
// too.
func (c *Client) Get(ctx context.Context, name string, opts ...ReadOption) (LockInfo, error) {
	var resp *pb.GetResponse
	err := c.call(ctx, func(ctx context.Context, conn *grpc.ClientConn) (err error) {
		resp, err = locksOf(conn).Get(ctx, &pb.GetRequest{Name: name, Consistency: consistency(opts)})
		return err
	})
	return lockInfo(resp.GetLock()), err
}

// List shows the locks whose names begin with prefix, in order of name. Each
// page is consistent in itself.
func (c *Client) List(ctx context.Context, prefix string, opts ...ReadOption) iter.Seq2[LockInfo, error] {
	return func(yield func(LockInfo, error) bool) {
		req := &pb.ListRequest{Prefix: prefix, PageSize: 500, Consistency: consistency(opts)}
		for {
			var resp *pb.ListResponse
			err := c.call(ctx, func(ctx context.Context, conn *grpc.ClientConn) (err error) {
				resp, err = locksOf(conn).List(ctx, req)
				return err
			})
			if err != nil {
				yield(LockInfo{}, err)
				return
			}
			for _, k := range resp.GetLocks() {
				if !yield(lockInfo(k), nil) {
					return
				}
			}
			if req.PageToken = resp.GetNextPageToken(); req.PageToken == "" {
				return
			}
		}
	}
}

// CheckToken tells whether a token is of a live hold at this moment. A
// resource that can compare tokens should do that instead: the answer is old
// when it arrives.
func (c *Client) CheckToken(ctx context.Context, name string, token fence.Token) (TokenCheck, error) {
	var resp *pb.CheckTokenResponse
	err := c.call(ctx, func(ctx context.Context, conn *grpc.ClientConn) (err error) {
		resp, err = locksOf(conn).CheckToken(ctx, &pb.CheckTokenRequest{Name: name, Token: uint64(token)})
		return err
	})
	return TokenCheck{
		Live: resp.GetLive(), CurrentToken: fence.Token(resp.GetCurrentToken()),
		LastToken: fence.Token(resp.GetLastToken()), Floor: fence.Token(resp.GetFloor()),
	}, err
}

// Release gives back a hold by name and token, whoever acquired it.
func (c *Client) Release(ctx context.Context, name string, token fence.Token) error {
	return c.releaseCall(ctx, releaseOperation(&pb.ReleaseRequest{Name: name, Token: uint64(token)}))
}

// ForceRelease breaks the hold with token on a lock, or every hold when token
// is 0. by is shown to the holder; "" is the client's owner.
func (c *Client) ForceRelease(ctx context.Context, name string, token fence.Token, by string) error {
	if by == "" {
		by = c.owner
	}
	return c.call(ctx, func(ctx context.Context, conn *grpc.ClientConn) error {
		_, err := locksOf(conn).ForceRelease(ctx, &pb.ForceReleaseRequest{Name: name, Token: uint64(token), By: by})
		return err
	})
}

// Watch yields what happens to the locks whose names begin with prefix, from
// revision from on (0: from now on), until ctx ends or the loop breaks. It
// resumes by itself over reconnects; ErrOutOfRange says that events were
// missed: list anew.
func (c *Client) Watch(ctx context.Context, prefix string, from uint64) iter.Seq2[Event, error] {
	return func(yield func(Event, error) bool) {
		ctx, cancel := context.WithCancel(ctx)
		defer cancel()
		stopped := false
		err := c.retry(ctx, 0, func(ctx context.Context, conn *grpc.ClientConn) error {
			if from == 0 {
				// A position to resume from, should the stream break before
				// its first event.
				s, err := pb.NewClusterServiceClient(conn).Status(ctx, &pb.StatusRequest{})
				if err != nil {
					return err
				}
				from = s.GetRevision() + 1
			}
			stream, err := locksOf(conn).Watch(ctx, &pb.WatchRequest{Prefix: prefix, FromRevision: from})
			if err != nil {
				return err
			}
			for {
				resp, err := stream.Recv()
				if err != nil {
					return err
				}
				for _, e := range resp.GetEvents() {
					if !yield(event(e), nil) {
						stopped = true
						return nil
					}
				}
				from = resp.GetRevision() + 1
			}
		})
		if err != nil && !stopped {
			yield(Event{}, err)
		}
	}
}

// LeaseInfo shows a lease. Errors: ErrLeaseGone.
func (c *Client) LeaseInfo(ctx context.Context, id uint64, opts ...ReadOption) (LeaseInfo, error) {
	var resp *pb.GetLeaseResponse
	err := c.call(ctx, func(ctx context.Context, conn *grpc.ClientConn) (err error) {
		resp, err = leasesOf(conn).Get(ctx, &pb.GetLeaseRequest{LeaseId: id, Consistency: consistency(opts)})
		return err
	})
	return leaseInfo(resp.GetLease()), err
}

// Leases shows all leases in order of id.
func (c *Client) Leases(ctx context.Context, opts ...ReadOption) iter.Seq2[LeaseInfo, error] {
	return func(yield func(LeaseInfo, error) bool) {
		req := &pb.ListLeasesRequest{PageSize: 500, Consistency: consistency(opts)}
		for {
			var resp *pb.ListLeasesResponse
			err := c.call(ctx, func(ctx context.Context, conn *grpc.ClientConn) (err error) {
				resp, err = leasesOf(conn).List(ctx, req)
				return err
			})
			if err != nil {
				yield(LeaseInfo{}, err)
				return
			}
			for _, l := range resp.GetLeases() {
				if !yield(leaseInfo(l), nil) {
					return
				}
			}
			if req.PageToken = resp.GetNextPageToken(); req.PageToken == "" {
				return
			}
		}
	}
}

// KeepAlive renews leases once and returns the TTL of each, counted from the
// server's receipt. The first that is gone is the error.
func (c *Client) KeepAlive(ctx context.Context, ids ...uint64) ([]time.Duration, error) {
	var resp *pb.KeepAliveResponse
	err := c.call(ctx, func(ctx context.Context, conn *grpc.ClientConn) (err error) {
		resp, err = leasesOf(conn).KeepAlive(ctx, &pb.KeepAliveRequest{LeaseIds: ids})
		return err
	})
	if err != nil {
		return nil, err
	}
	ttls := make([]time.Duration, len(resp.GetResults()))
	for i, r := range resp.GetResults() {
		if p := r.GetProblem(); p != nil {
			return nil, goneError(p)
		}
		ttls[i] = r.GetTtl().AsDuration()
	}
	return ttls, nil
}

func goneError(p *pb.Problem) error {
	e := &Error{Reason: p.GetReason(), Code: codes.NotFound}
	e.problem(p)
	lost := &LostError{Cause: e.Cause, By: e.By, LeaseID: e.LeaseID}
	if e.Message = lost.Error(); e.Cause == "" {
		e.Message = "there is no such lease"
	}
	return e
}

// Revoke ends a lease; its holds are lost. by is shown to the holder.
func (c *Client) Revoke(ctx context.Context, id uint64, by string) error {
	if by == "" {
		by = c.owner
	}
	return c.call(ctx, func(ctx context.Context, conn *grpc.ClientConn) error {
		_, err := leasesOf(conn).Revoke(ctx, &pb.RevokeRequest{LeaseId: id, By: by})
		return err
	})
}

// Status asks the server how it is.
func (c *Client) Status(ctx context.Context) (Status, error) {
	var r *pb.StatusResponse
	err := c.call(ctx, func(ctx context.Context, conn *grpc.ClientConn) (err error) {
		r, err = pb.NewClusterServiceClient(conn).Status(ctx, &pb.StatusRequest{})
		return err
	})
	s := Status{
		Version: r.GetVersion(), NodeID: r.GetNodeId(), ClusterID: r.GetClusterId(), Leader: r.GetLeader(),
		Term: r.GetTerm(), Revision: r.GetRevision(), LastToken: fence.Token(r.GetLastToken()),
		Leases: r.GetLeases(), Locks: r.GetLocks(), Waiters: r.GetWaiters(), InMemory: r.GetInMemory(),
		StartedAt: r.GetStartedAt().AsTime(), Level: r.GetLevel(),
	}
	for _, m := range r.GetMembers() {
		s.Members = append(s.Members, Member{
			ID: m.GetId(), ClientAddress: m.GetClientAddress(), PeerAddress: m.GetPeerAddress(), Role: m.GetRole(),
			Leader: m.GetLeader(), Healthy: m.GetHealthy(), AppliedIndex: m.GetAppliedIndex(),
			Incarnation: m.GetIncarnation(),
		})
	}
	if x := r.GetRestored(); x != nil {
		s.Restored = &Restored{
			At: x.GetAt().AsTime(), BackupAt: x.GetBackupAt().AsTime(), ClusterID: x.GetClusterId(), TokensAbove: fence.Token(x.GetTokensAbove()),
		}
	}
	return s, err
}

func clusterOf(conn *grpc.ClientConn) pb.ClusterServiceClient {
	return pb.NewClusterServiceClient(conn)
}

// AddMember makes a node that waits for it a learner of the cluster, or records
// that a member, stopped, has moved to another peer address. Errors:
// ErrMembership.
func (c *Client) AddMember(ctx context.Context, id, peerAddress string) error {
	return c.call(ctx, func(ctx context.Context, conn *grpc.ClientConn) error {
		_, err := clusterOf(conn).AddMember(ctx, &pb.AddMemberRequest{Id: id, PeerAddress: peerAddress})
		return err
	})
}

// PromoteMember gives a learner that has caught up its vote. Errors:
// ErrMembership.
func (c *Client) PromoteMember(ctx context.Context, id string) error {
	return c.call(ctx, func(ctx context.Context, conn *grpc.ClientConn) error {
		_, err := clusterOf(conn).PromoteMember(ctx, &pb.PromoteMemberRequest{Id: id})
		return err
	})
}

// RemoveMember takes a node out of the cluster. Errors: ErrMembership.
func (c *Client) RemoveMember(ctx context.Context, id string) error {
	return c.call(ctx, func(ctx context.Context, conn *grpc.ClientConn) error {
		_, err := clusterOf(conn).RemoveMember(ctx, &pb.RemoveMemberRequest{Id: id})
		return err
	})
}

// TransferLeadership makes another voter lead, id or whichever is furthest,
// and returns who does. Which one is decided once, before it is asked for, so
// that a repeat after a lost answer moves the leadership no further. Errors:
// ErrMembership.
func (c *Client) TransferLeadership(ctx context.Context, id string) (leader string, err error) {
	if id == "" {
		s, err := c.Status(ctx)
		if err != nil {
			return "", err
		}
		id = successor(s)
	}
	err = c.call(ctx, func(ctx context.Context, conn *grpc.ClientConn) error {
		r, err := clusterOf(conn).TransferLeadership(ctx, &pb.TransferLeadershipRequest{Id: id})
		leader = r.GetLeader()
		return err
	})
	return leader, err
}

// successor is the healthy voter that is furthest, beside the leader; "" where
// there is none, or no leader: the server says so.
func successor(s Status) string {
	var best Member
	for _, m := range s.Members {
		if s.Leader != "" && m.ID != s.Leader && m.Healthy && m.Role == "voter" && (best.ID == "" || m.AppliedIndex > best.AppliedIndex) {
			best = m
		}
	}
	return best.ID
}

// Backup writes a backup of everything to w, as of a moment after the call
// began. When it fails, w has a part of one that does not restore.
func (c *Client) Backup(ctx context.Context, w io.Writer) error {
	begun := false
	return c.retry(ctx, 0, func(ctx context.Context, conn *grpc.ClientConn) error {
		stream, err := clusterOf(conn).Backup(ctx, &pb.BackupRequest{})
		if err != nil {
			return err
		}
		for {
			r, err := stream.Recv()
			switch {
			case errors.Is(err, io.EOF):
				return nil
			case err != nil && begun:
				return &Error{Code: codes.Aborted, Message: "the backup broke off: " + toError(err).Message}
			case err != nil:
				return err
			}
			begun = true
			if _, err := w.Write(r.GetChunk()); err != nil {
				return &Error{Code: codes.Aborted, Message: "the backup cannot be written: " + err.Error()}
			}
		}
	})
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
			Owner: h.GetOwner(), Shared: h.GetMode() == pb.Mode_MODE_SHARED, Since: h.GetSince().AsTime(),
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
			Since: w.GetSince().AsTime(), Actor: w.GetActor(), Metadata: w.GetMetadata(), Limit: w.GetLimit(),
		})
	}
	return out
}

func leaseInfo(l *pb.Lease) LeaseInfo {
	out := LeaseInfo{
		ID: l.GetLeaseId(), TTL: l.GetTtl().AsDuration(), Remaining: l.GetRemaining().AsDuration(), Owner: l.GetOwner(),
		Metadata: l.GetMetadata(), GrantedAt: l.GetGrantedAt().AsTime(), WaitingFor: l.GetWaitingFor(), Own: l.GetOwn(),
	}
	for _, g := range l.GetHolds() {
		h := Hold{Token: fence.Token(g.GetToken()), Shared: g.GetMode() == pb.Mode_MODE_SHARED, Since: g.GetGrantedAt().AsTime()}
		for _, k := range g.GetLocks() {
			h.Names = append(h.Names, k.GetName())
		}
		out.Holds = append(out.Holds, h)
	}
	// A server of before counts neither.
	out.HoldCount = max(int(l.GetHoldCount()), len(out.Holds))
	out.WaitingCount = max(int(l.GetWaitingCount()), len(out.WaitingFor))
	return out
}

func event(e *pb.Event) Event {
	return Event{
		Revision: e.GetRevision(), Kind: kinds[e.GetKind()], Name: e.GetName(), LeaseID: e.GetLeaseId(),
		Owner: e.GetOwner(), Token: fence.Token(e.GetToken()), Floor: fence.Token(e.GetFloor()),
		Shared: e.GetMode() == pb.Mode_MODE_SHARED, Cause: causes[e.GetCause()], By: e.GetBy(),
		Time: e.GetTime().AsTime(), Delay: e.GetDelay().AsDuration(),
	}
}
