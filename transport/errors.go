package transport

import (
	"context"
	"errors"
	"strconv"
	"strings"
	"time"

	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/protoadapt"
	"google.golang.org/protobuf/types/known/durationpb"

	"github.com/distlock/distlock/lease"
	"github.com/distlock/distlock/lease/machine"
	pb "github.com/distlock/distlock/proto/distlock/v1"
)

// Domain is the ErrorInfo domain of every error.
const Domain = "distlock"

// Reasons that are not the machine's.
const (
	ReasonWaitTimeout    = "WAIT_TIMEOUT"
	ReasonExhausted      = "RESOURCE_EXHAUSTED"
	ReasonNotLeader      = "NOT_LEADER"
	ReasonStopping       = "STOPPING"
	ReasonOutcomeUnknown = "OUTCOME_UNKNOWN"
	ReasonLogFailed      = "LOG_FAILED"
	ReasonSuperseded     = "SUPERSEDED"
	ReasonOutOfRange     = "OUT_OF_RANGE"
	ReasonCanceled       = "CANCELED"
	ReasonDeadline       = "DEADLINE_EXCEEDED"
	ReasonMembership     = "MEMBERSHIP"
	ReasonInternal       = "INTERNAL"
)

// codeOf is the one table of reasons: every error that leaves the server has
// a row.
var codeOf = map[string]codes.Code{
	string(machine.ReasonLeaseNotFound):   codes.NotFound,
	string(machine.ReasonLeaseEnded):      codes.FailedPrecondition,
	string(machine.ReasonRequestEnded):    codes.FailedPrecondition,
	string(machine.ReasonRequestMismatch): codes.InvalidArgument,
	string(machine.ReasonRequestNotFound): codes.NotFound,
	string(machine.ReasonLockHeld):        codes.Aborted,
	string(machine.ReasonLimitDisagrees):  codes.FailedPrecondition,
	string(machine.ReasonDeadlock):        codes.Aborted,
	string(machine.ReasonDeadlockUnknown): codes.ResourceExhausted,
	string(machine.ReasonNotHeld):         codes.FailedPrecondition,
	string(machine.ReasonLockNotDeclared): codes.NotFound,
	string(machine.ReasonLockDeclared):    codes.AlreadyExists,
	string(machine.ReasonClockDisagrees):  codes.Aborted,
	string(machine.ReasonTokensExhausted): codes.ResourceExhausted,
	string(machine.ReasonInvalid):         codes.InvalidArgument,
	ReasonWaitTimeout:                     codes.Aborted,
	ReasonExhausted:                       codes.ResourceExhausted,
	ReasonNotLeader:                       codes.Unavailable,
	ReasonStopping:                        codes.Unavailable,
	ReasonOutcomeUnknown:                  codes.Unavailable,
	ReasonLogFailed:                       codes.Unavailable,
	ReasonSuperseded:                      codes.Aborted,
	ReasonOutOfRange:                      codes.OutOfRange,
	ReasonCanceled:                        codes.Canceled,
	ReasonDeadline:                        codes.DeadlineExceeded,
	ReasonMembership:                      codes.FailedPrecondition,
	ReasonInternal:                        codes.Internal,
}

// toStatus turns any error of the manager into a status with an ErrorInfo and,
// where it speaks of a lock or lease, a Problem.
func toStatus(err error) error {
	if err == nil {
		return nil
	}
	info, problem := details(err)
	list := []protoadapt.MessageV1{info}
	if problem != nil {
		list = append(list, protoadapt.MessageV1Of(problem))
	}
	s, err2 := status.New(codeOf[info.GetReason()], short(err.Error())).WithDetails(list...)
	if err2 != nil { // only for codes.OK, which the table has not
		return status.Error(codes.Internal, short(err.Error()))
	}
	return s.Err()
}

// details are what goes with an error, cut so that it fits into a header;
// problem is nil where there is nothing to say.
func details(err error) (*errdetails.ErrorInfo, *pb.Problem) {
	reason, problem := describe(err)
	info := &errdetails.ErrorInfo{Reason: reason, Domain: Domain}
	var notLeader *lease.NotLeaderError
	var outside *lease.RangeError
	switch {
	case errors.As(err, &notLeader) && notLeader.Hint != "":
		info.Metadata = map[string]string{"leader": notLeader.Hint}
	case errors.As(err, &outside):
		info.Metadata = map[string]string{"oldest": strconv.FormatUint(outside.Oldest, 10)}
	}
	if problem != nil {
		problem.Reason = reason
		fit(problem)
	}
	return info, problem
}

// A status travels in HTTP/2 headers, its details in base64 and its message
// twice, once percent-encoded. Many clients refuse more than 8 KiB of headers.
const (
	maxProblem = 3 << 10
	maxMessage = 700
)

// short cuts a message that names long names.
func short(message string) string {
	if len(message) <= maxMessage {
		return message
	}
	return strings.ToValidUTF8(message[:maxMessage-len("…")], "") + "…"
}

// fit leaves out of a problem's lists what is least missed, until the rest
// fits. Counts and positions still tell of what is left out.
func fit(p *pb.Problem) {
	for _, less := range []func(*pb.Obstacle){
		func(o *pb.Obstacle) {
			for _, w := range o.Ahead {
				w.Metadata = nil
			}
		},
		func(o *pb.Obstacle) { o.Ahead = o.Ahead[:min(len(o.Ahead), 1)] },
		func(o *pb.Obstacle) {
			for _, h := range o.Holders {
				h.Metadata = nil
			}
		},
		func(o *pb.Obstacle) { o.Holders = o.Holders[:min(len(o.Holders), 1)] },
		func(o *pb.Obstacle) { o.Ahead = nil },
	} {
		for _, o := range p.Obstacles {
			if proto.Size(p) <= maxProblem {
				return
			}
			less(o)
		}
	}
	for len(p.Obstacles) > 1 && proto.Size(p) > maxProblem {
		p.Obstacles = p.Obstacles[:len(p.Obstacles)-1]
	}
	for len(p.Circle) > 1 && proto.Size(p) > maxProblem {
		p.Circle = p.Circle[:len(p.Circle)-1]
	}
}

// describe finds an error's row in the table, and what it speaks of.
func describe(err error) (string, *pb.Problem) {
	var (
		held      *lease.HeldError
		timeout   *lease.WaitTimeoutError
		refusal   *lease.Refusal
		invalid   *lease.InvalidError
		exhausted *lease.ExhaustedError
		outside   *lease.RangeError
		member    *lease.MemberError
	)
	switch {
	case errors.As(err, &held):
		p := problemOf(held.Refusal)
		p.Obstacles = obstacles(held.Explain)
		return string(held.Refusal.Reason), p
	case errors.As(err, &timeout):
		p := &pb.Problem{Obstacles: obstacles(timeout.Explain)}
		if len(p.Obstacles) > 0 {
			p.Name = p.Obstacles[0].Name
		}
		return ReasonWaitTimeout, p
	case errors.As(err, &refusal):
		return string(refusal.Reason), problemOf(refusal)
	case errors.As(err, &invalid):
		return string(machine.ReasonInvalid), &pb.Problem{Field: invalid.Field}
	case errors.As(err, &exhausted):
		return ReasonExhausted, nil
	case errors.As(err, &outside):
		return ReasonOutOfRange, nil
	case errors.As(err, &member):
		return ReasonMembership, nil
	case errors.Is(err, lease.ErrOutcomeUnknown):
		return ReasonOutcomeUnknown, nil
	case errors.Is(err, lease.ErrLogFailed):
		return ReasonLogFailed, nil
	case errors.Is(err, lease.ErrNotLeader):
		return ReasonNotLeader, nil
	case errors.Is(err, lease.ErrStopping):
		return ReasonStopping, nil
	case errors.Is(err, lease.ErrSuperseded):
		return ReasonSuperseded, nil
	case errors.Is(err, context.DeadlineExceeded):
		return ReasonDeadline, nil
	case errors.Is(err, context.Canceled), errors.Is(err, lease.ErrDetached):
		return ReasonCanceled, nil
	}
	return ReasonInternal, nil
}

func problemOf(r *lease.Refusal) *pb.Problem {
	p := &pb.Problem{
		Reason: string(r.Reason), Name: r.Name, LeaseId: uint64(r.Lease), Token: uint64(r.Token),
		CurrentToken: uint64(r.Current), LastToken: uint64(r.Last), GrantedSince: r.GrantedSince,
		Limit: r.Limit, AskedLimit: r.Asked, Field: r.Field,
	}
	if r.Ended != nil {
		p.Cause, p.By, p.EndedAt = pb.EndCause(r.Ended.Cause), r.Ended.By, timestamp(r.Ended.At)
	}
	for _, l := range r.Circle {
		p.Circle = append(p.Circle, &pb.Link{Actor: l.Actor, Name: l.Name, LeaseId: uint64(l.Lease)})
	}
	return p
}

func obstacles(e lease.Explanation) []*pb.Obstacle {
	var list []*pb.Obstacle
	for _, o := range e.Obstacles {
		p := &pb.Obstacle{
			Name: o.Name, Position: int32(o.Position), HolderCount: int32(o.HolderCount), Limit: o.Limit,
			Holders: holders(o.Holders), Ahead: waiters(o.Ahead),
		}
		if o.DelayRemaining > 0 {
			p.DelayRemaining = durationpb.New(o.DelayRemaining.Round(time.Millisecond))
		}
		list = append(list, p)
	}
	return list
}
