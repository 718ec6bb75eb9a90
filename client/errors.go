package client

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"time"

	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/distlock/distlock/fence"
	pb "github.com/distlock/distlock/proto/distlock/v1"
)

// What an error is about, for errors.Is.
var (
	// ErrNotAcquired: the lock is not free and the caller would not wait, or
	// not longer. The *Error explains what stands in the way.
	ErrNotAcquired = errors.New("not acquired")
	// ErrNotHeld: the token holds no lock; the *Error says why, if remembered.
	ErrNotHeld = errors.New("not held")
	// ErrLeaseGone: the lease has ended, or never was.
	ErrLeaseGone = errors.New("lease gone")
	// ErrDeadlock: waiting would close a circle of waiters.
	ErrDeadlock = errors.New("deadlock")
	// ErrInvalid: the request cannot be right; the *Error names the field.
	ErrInvalid = errors.New("invalid request")
	// ErrExhausted: one of the server's limits is reached.
	ErrExhausted = errors.New("limit reached")
	// ErrUnavailable: no server answered in time. What was asked may have
	// been done.
	ErrUnavailable = errors.New("unavailable")
	// ErrOutOfRange: a watch asked for events that are no longer kept.
	ErrOutOfRange = errors.New("events no longer kept")
	// ErrMembership: the cluster's members cannot be changed so.
	ErrMembership = errors.New("membership")
	// ErrReleased is Lock.Err after Release.
	ErrReleased = errors.New("released")
	// ErrClosed: the client has been closed.
	ErrClosed = errors.New("the client is closed")
)

// Cause says how a hold or lease ended.
type Cause string

// The causes.
const (
	CauseReleased      Cause = "released"
	CauseExpired       Cause = "expired"
	CauseRevoked       Cause = "revoked"
	CauseForceReleased Cause = "force-released"
	CauseUndeclared    Cause = "undeclared"
	// CauseUnreachable: no renewal was acknowledged before the local deadline.
	CauseUnreachable Cause = "unreachable"
)

var causes = map[pb.EndCause]Cause{
	pb.EndCause_END_CAUSE_RELEASED:       CauseReleased,
	pb.EndCause_END_CAUSE_EXPIRED:        CauseExpired,
	pb.EndCause_END_CAUSE_REVOKED:        CauseRevoked,
	pb.EndCause_END_CAUSE_FORCE_RELEASED: CauseForceReleased,
	pb.EndCause_END_CAUSE_UNDECLARED:     CauseUndeclared,
}

// ClusterError tells that the server that answers has another history than the
// one that did before: it was restored from a backup, recovered from one
// survivor, or is another cluster behind the same address. Leases of the first
// are not known there, and are lost; tokens go on above those of a restored or
// recovered one only. The client goes on with what Is.
type ClusterError struct{ Was, Is string }

func (e *ClusterError) Error() string {
	return "another cluster answers: it was " + e.Was + ", and is " + e.Is
}

// Error is an answer of the server that is not success.
type Error struct {
	Reason  string // machine-readable, as docs/api.md lists them; "" if gRPC's own
	Code    codes.Code
	Message string
	Leader  string // client address of the leader, when it is another

	Name         string
	LeaseID      uint64
	Token        fence.Token
	Cause        Cause // how the hold or lease ended, when remembered
	By           string
	EndedAt      time.Time
	CurrentToken fence.Token // highest live token on the lock
	LastToken    fence.Token // last token granted on it, when known
	GrantedSince bool        // whether the lock was granted to anyone since
	Field        string      // of an invalid request
	Obstacles    []Obstacle  // what an acquisition waits for
}

// Error is the server's one line.
func (e *Error) Error() string { return e.Message }

var sentinels = map[string]error{
	"LOCK_HELD":          ErrNotAcquired,
	"WAIT_TIMEOUT":       ErrNotAcquired,
	"NOT_HELD":           ErrNotHeld,
	"LEASE_NOT_FOUND":    ErrLeaseGone,
	"LEASE_ENDED":        ErrLeaseGone,
	"DEADLOCK":           ErrDeadlock,
	"INVALID_ARGUMENT":   ErrInvalid,
	"LIMIT_DISAGREES":    ErrInvalid,
	"DEADLOCK_UNKNOWN":   ErrExhausted,
	"RESOURCE_EXHAUSTED": ErrExhausted,
	"OUT_OF_RANGE":       ErrOutOfRange,
	"MEMBERSHIP":         ErrMembership,
}

// Is matches the package's sentinels.
func (e *Error) Is(target error) bool {
	if s, ok := sentinels[e.Reason]; ok && s == target {
		return true
	}
	switch target {
	case ErrUnavailable:
		return e.Code == codes.Unavailable
	case ErrInvalid:
		return e.Code == codes.InvalidArgument
	case ErrExhausted:
		return e.Code == codes.ResourceExhausted
	}
	return false
}

// unavailable is what stood in the way of a call until its time was up.
type unavailable struct {
	all reasons
	err *Error // one of them
	ctx error
}

// Error names each endpoint, and why it did not answer.
func (u *unavailable) Error() string {
	if len(u.all) < 2 {
		return "no server answered in time: " + u.err.Message
	}
	var b strings.Builder
	b.WriteString("no server answered in time")
	for i, r := range u.all {
		fmt.Fprintf(&b, "%s %s: %s", []string{";", ":"}[max(1-i, 0)], r.endpoint, r.err.Message)
	}
	return b.String()
}

func (u *unavailable) Unwrap() []error { return []error{u.err, u.ctx} }

// LostError says how a lock or lease was lost. It is the cause of the lock's
// context.
type LostError struct {
	Cause   Cause
	By      string // who revoked or force-released
	Names   []string
	LeaseID uint64
	Token   fence.Token // 0 for a lease
}

// Error says what was lost and how.
func (e *LostError) Error() string {
	what := fmt.Sprintf("lease %d", e.LeaseID)
	if len(e.Names) > 0 {
		what = fmt.Sprintf("lock %q", e.Names[0])
	}
	switch {
	case e.Cause == CauseUnreachable:
		return what + " lost: no renewal was acknowledged before its deadline"
	case e.By != "":
		return fmt.Sprintf("%s lost: %s by %s", what, e.Cause, e.By)
	}
	return fmt.Sprintf("%s lost: %s", what, e.Cause)
}

// toError takes a status apart.
func toError(err error) *Error {
	var e *Error
	if errors.As(err, &e) {
		return e
	}
	if errors.Is(err, ErrClosed) {
		return &Error{Code: codes.Canceled, Message: err.Error()}
	}
	if errors.Is(err, context.DeadlineExceeded) {
		return &Error{Code: codes.DeadlineExceeded, Message: err.Error()}
	}
	var u unsent
	if errors.As(err, &u) {
		err = u.error
	}
	s, _ := status.FromError(err)
	e = &Error{Code: s.Code(), Message: s.Message()}
	if e.Code == codes.Internal && strings.Contains(e.Message, "error while marshaling") {
		// It never left: protobuf takes no other text.
		return &Error{Reason: "INVALID_ARGUMENT", Code: codes.InvalidArgument, Message: "a name or other text of the request is not valid UTF-8"}
	}
	for _, d := range s.Details() {
		switch d := d.(type) {
		case *errdetails.ErrorInfo:
			e.Reason, e.Leader = d.GetReason(), d.GetMetadata()["leader"]
		case *pb.Problem:
			e.problem(d)
		}
	}
	return e
}

func (e *Error) problem(p *pb.Problem) {
	e.Name, e.LeaseID, e.Token = p.GetName(), p.GetLeaseId(), fence.Token(p.GetToken())
	e.Cause, e.By = causes[p.GetCause()], p.GetBy()
	e.EndedAt = timeOf(p.GetEndedAt())
	e.CurrentToken, e.LastToken = fence.Token(p.GetCurrentToken()), fence.Token(p.GetLastToken())
	e.GrantedSince, e.Field = p.GetGrantedSince(), p.GetField()
	for _, o := range p.GetObstacles() {
		e.Obstacles = append(e.Obstacles, obstacle(o))
	}
}

func obstacle(o *pb.Obstacle) Obstacle {
	return Obstacle{
		Name: o.GetName(), Position: int(o.GetPosition()), HolderCount: int(o.GetHolderCount()),
		Holders: holders(o.GetHolders()), Ahead: waiters(o.GetAhead()),
		DelayRemaining: o.GetDelayRemaining().AsDuration(), Limit: o.GetLimit(),
	}
}
