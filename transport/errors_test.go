package transport

import (
	"context"
	"encoding/base64"
	"errors"
	"fmt"
	"go/ast"
	"go/parser"
	"go/token"
	"maps"
	"os"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"

	"github.com/distlock/distlock/fence"
	"github.com/distlock/distlock/lease"
	"github.com/distlock/distlock/lease/machine"
	pb "github.com/distlock/distlock/proto/distlock/v1"
)

// table has every error of the manager with what it must become. The reverse
// direction is the client's; its tests go through a server.
var table = []struct {
	err    error
	code   codes.Code
	reason string
}{
	{&lease.Refusal{Reason: machine.ReasonLeaseNotFound, Lease: 3}, codes.NotFound, "LEASE_NOT_FOUND"},
	{&lease.Refusal{Reason: machine.ReasonLeaseEnded, Lease: 3, Ended: &machine.Ended{Cause: machine.EndExpired}}, codes.FailedPrecondition, "LEASE_ENDED"},
	{&lease.Refusal{Reason: machine.ReasonRequestEnded}, codes.FailedPrecondition, "REQUEST_ENDED"},
	{&lease.Refusal{Reason: machine.ReasonDeadlockUnknown, Name: "a"}, codes.ResourceExhausted, "DEADLOCK_UNKNOWN"},
	{&lease.Refusal{Reason: machine.ReasonRequestNotFound}, codes.NotFound, "REQUEST_NOT_FOUND"},
	{&lease.Refusal{Reason: machine.ReasonRequestMismatch}, codes.InvalidArgument, "REQUEST_MISMATCH"},
	{&lease.Refusal{Reason: machine.ReasonLimitDisagrees, Name: "a", Limit: 2, Asked: 3}, codes.FailedPrecondition, "LIMIT_DISAGREES"},
	{&lease.Refusal{Reason: machine.ReasonDeadlock, Name: "a", Circle: []machine.Link{{Actor: "x", Name: "a"}, {Actor: "x"}}}, codes.Aborted, "DEADLOCK"},
	{&lease.Refusal{Reason: machine.ReasonNotHeld, Name: "a", Token: 4}, codes.FailedPrecondition, "NOT_HELD"},
	{&lease.Refusal{Reason: machine.ReasonLockNotDeclared, Name: "a"}, codes.NotFound, "LOCK_NOT_DECLARED"},
	{&lease.Refusal{Reason: machine.ReasonLockDeclared, Name: "a"}, codes.AlreadyExists, "LOCK_DECLARED"},
	{&lease.Refusal{Reason: machine.ReasonClockDisagrees, Name: "a"}, codes.Aborted, "CLOCK_DISAGREES"},
	{&lease.Refusal{Reason: machine.ReasonTokensExhausted}, codes.ResourceExhausted, "TOKENS_EXHAUSTED"},
	{&lease.Refusal{Reason: machine.ReasonInvalid, Field: "names"}, codes.InvalidArgument, "INVALID_ARGUMENT"},
	{&lease.HeldError{Refusal: &lease.Refusal{Reason: machine.ReasonLockHeld, Name: "a"}}, codes.Aborted, "LOCK_HELD"},
	{&lease.WaitTimeoutError{Waited: time.Second}, codes.Aborted, "WAIT_TIMEOUT"},
	{&lease.InvalidError{Field: "ttl", Msg: "must be more"}, codes.InvalidArgument, "INVALID_ARGUMENT"},
	{&lease.ExhaustedError{What: "locks", Max: 5}, codes.ResourceExhausted, "RESOURCE_EXHAUSTED"},
	{&lease.RangeError{Asked: 1, Oldest: 5}, codes.OutOfRange, "OUT_OF_RANGE"},
	{&lease.NotLeaderError{Hint: "10.0.0.2:50051"}, codes.Unavailable, "NOT_LEADER"},
	{lease.ErrNotLeader, codes.Unavailable, "NOT_LEADER"},
	{lease.ErrStopping, codes.Unavailable, "STOPPING"},
	{lease.ErrLogFailed, codes.Unavailable, "LOG_FAILED"},
	{lease.ErrOutcomeUnknown, codes.Unavailable, "OUTCOME_UNKNOWN"},
	// Whether the change was made matters more than why it is not known.
	{fmt.Errorf("%w: %w", lease.ErrOutcomeUnknown, lease.ErrLogFailed), codes.Unavailable, "OUTCOME_UNKNOWN"},
	{lease.ErrSuperseded, codes.Aborted, "SUPERSEDED"},
	{lease.ErrDetached, codes.Canceled, "CANCELED"},
	{context.Canceled, codes.Canceled, "CANCELED"},
	{context.DeadlineExceeded, codes.DeadlineExceeded, "DEADLINE_EXCEEDED"},
	{&lease.MemberError{ID: "n2", Msg: "it is the only voter"}, codes.FailedPrecondition, "MEMBERSHIP"},
	{errors.New("what nobody thought of"), codes.Internal, "INTERNAL"},
}

func TestEveryErrorHasItsCodeAndReason(t *testing.T) {
	unseen := maps.Clone(codeOf)
	for _, row := range table {
		for _, err := range []error{row.err, fmt.Errorf("wrapped: %w", row.err)} {
			s, ok := status.FromError(toStatus(err))
			if !ok || s.Code() != row.code || s.Message() != err.Error() {
				t.Errorf("%v became %v", err, s)
			}
			if info := infoOf(s); info.GetReason() != row.reason || info.GetDomain() != Domain {
				t.Errorf("%v: ErrorInfo %v, want reason %s", err, info, row.reason)
			}
			if p := problemIn(s); p != nil && p.GetReason() != row.reason {
				t.Errorf("%v: the problem's reason is %q", err, p.GetReason())
			}
			if strings.Contains(s.Message(), "\n") {
				t.Errorf("%q is more than one line", s.Message())
			}
		}
		delete(unseen, row.reason)
	}
	for reason := range unseen {
		t.Errorf("no error of the table above has reason %s", reason)
	}
	if toStatus(nil) != nil {
		t.Error("no error became one")
	}
	leader := infoOf(status.Convert(toStatus(&lease.NotLeaderError{Hint: "10.0.0.2:50051"}))).GetMetadata()["leader"]
	if leader != "10.0.0.2:50051" {
		t.Errorf("the hint to the leader is %q", leader)
	}
	oldest := infoOf(status.Convert(toStatus(&lease.RangeError{Asked: 1, Oldest: 5}))).GetMetadata()["oldest"]
	if oldest != "5" {
		t.Errorf("the oldest event kept is %q", oldest)
	}
}

// TestEveryReasonOfTheMachineHasARow reads the machine's source, so that a
// reason added there cannot be forgotten here.
func TestEveryReasonOfTheMachineHasARow(t *testing.T) {
	file, err := parser.ParseFile(token.NewFileSet(), "../lease/machine/result.go", nil, 0)
	if err != nil {
		t.Fatal(err)
	}
	found := 0
	ast.Inspect(file, func(n ast.Node) bool {
		spec, ok := n.(*ast.ValueSpec)
		if !ok || !strings.HasPrefix(spec.Names[0].Name, "Reason") {
			return true
		}
		reason, err := strconv.Unquote(spec.Values[0].(*ast.BasicLit).Value)
		if err != nil {
			t.Fatal(err)
		}
		found++
		if _, ok := codeOf[reason]; !ok {
			t.Errorf("reason %s has no code", reason)
		}
		return true
	})
	if found < 13 {
		t.Errorf("found %d reasons in the machine's source", found)
	}
}

// TestTheDocumentedTableIsTheTable of reasons and codes, in both directions.
func TestTheDocumentedTableIsTheTable(t *testing.T) {
	text, err := os.ReadFile("../docs/api.md")
	if err != nil {
		t.Fatal(err)
	}
	_, section, _ := strings.Cut(string(text), "| reason | code | meaning |")
	section, _, _ = strings.Cut(section, "\n\n")
	unseen := maps.Clone(codeOf)
	for line := range strings.Lines(section) {
		columns := strings.Split(line, "|")
		if len(columns) < 4 || strings.HasPrefix(columns[1], "---") {
			continue
		}
		for reason := range strings.SplitSeq(columns[1], ",") {
			reason = strings.Trim(reason, " `")
			code, ok := codeOf[reason]
			if !ok {
				t.Errorf("there is no reason %s", reason)
				continue
			}
			delete(unseen, reason)
			documented := strings.TrimSpace(columns[2])
			if documented == "the same" {
				documented = reason
			}
			if documented != canonical(code) {
				t.Errorf("%s is documented as %s and is %s", reason, documented, canonical(code))
			}
		}
	}
	for reason := range unseen {
		t.Errorf("%s is not documented", reason)
	}
}

// canonical is a code's name as the API writes it: NOT_FOUND.
func canonical(c codes.Code) string {
	var b strings.Builder
	for i, r := range c.String() {
		if i > 0 && r >= 'A' && r <= 'Z' {
			b.WriteByte('_')
		}
		b.WriteRune(r)
	}
	return strings.ToUpper(b.String())
}

func infoOf(s *status.Status) *errdetails.ErrorInfo {
	for _, d := range s.Details() {
		if info, ok := d.(*errdetails.ErrorInfo); ok {
			return info
		}
	}
	return nil
}

func problemIn(s *status.Status) *pb.Problem {
	for _, d := range s.Details() {
		if p, ok := d.(*pb.Problem); ok {
			return p
		}
	}
	return nil
}

func TestProblemTellsTheWholeStory(t *testing.T) {
	at := time.Unix(1_700_000_000, 5)
	got := problemIn(status.Convert(toStatus(&lease.Refusal{
		Reason: machine.ReasonNotHeld, Name: "a", Lease: 2, Token: 3, Current: 8, Last: 9, GrantedSince: true,
		Ended: &machine.Ended{Cause: machine.EndRevoked, By: "ann", At: at.UnixNano()},
	})))
	want := &pb.Problem{
		Reason: "NOT_HELD", Name: "a", LeaseId: 2, Token: 3, CurrentToken: 8, LastToken: 9, GrantedSince: true,
		Cause: pb.EndCause_END_CAUSE_REVOKED, By: "ann", EndedAt: timestamp(at.UnixNano()),
	}
	if !proto.Equal(got, want) {
		t.Errorf("got  %v\nwant %v", got, want)
	}

	got = problemIn(status.Convert(toStatus(&lease.HeldError{
		Refusal: &lease.Refusal{Reason: machine.ReasonLockHeld, Name: "a"},
		Explain: lease.Explanation{Obstacles: []lease.Obstacle{{
			Obstacle: machine.Obstacle{
				Name: "a", Position: 2, Limit: 4, HolderCount: 1,
				Holders: []machine.Holder{{
					Lease: 5, Owner: "bob", Token: 6, Floor: 6, Mode: machine.Exclusive, Since: at.UnixNano(),
					LockDelay: machine.Duration(time.Second), Actor: "w", Metadata: []machine.Meta{{Key: "k", Value: "v"}},
				}},
				Ahead: []machine.Waiter{{Lease: 7, Owner: "eve", Mode: machine.Shared, Limit: 4, Since: at.UnixNano()}},
			},
			DelayRemaining: 1500 * time.Millisecond,
		}}},
	})))
	want = &pb.Problem{Reason: "LOCK_HELD", Name: "a", Obstacles: []*pb.Obstacle{{
		Name: "a", Position: 2, Limit: 4, HolderCount: 1,
		Holders: []*pb.Holder{{
			LeaseId: 5, Owner: "bob", Token: 6, Floor: 6, Mode: pb.Mode_MODE_EXCLUSIVE, Since: timestamp(at.UnixNano()),
			LockDelay: protoDuration(time.Second), Actor: "w", Metadata: map[string]string{"k": "v"},
		}},
		Ahead:          []*pb.Waiter{{LeaseId: 7, Owner: "eve", Mode: pb.Mode_MODE_SHARED, Limit: 4, Since: timestamp(at.UnixNano())}},
		DelayRemaining: protoDuration(1500 * time.Millisecond),
	}}}
	if !proto.Equal(got, want) {
		t.Errorf("got  %v\nwant %v", got, want)
	}

	circle := problemIn(status.Convert(toStatus(&lease.Refusal{
		Reason: machine.ReasonDeadlock, Name: "a", Circle: []machine.Link{{Actor: "x", Name: "a", Lease: 1}, {Actor: "y", Name: "b", Lease: 2}},
	}))).GetCircle()
	if len(circle) != 2 || circle[1].GetActor() != "y" || circle[1].GetName() != "b" || circle[1].GetLeaseId() != 2 {
		t.Errorf("circle %v", circle)
	}
}

// TestErrorsFitIntoHeaders builds the largest errors there can be. They must
// fit into the 8 KiB of headers that many clients accept, and still say who
// holds the lock.
func TestErrorsFitIntoHeaders(t *testing.T) {
	long := func(n int, with string) string { return strings.Repeat(with, n/len(with)) }
	meta := []machine.Meta{{Key: "k", Value: long(4090, "m")}}
	var e lease.Explanation
	for n := range 64 {
		o := lease.Obstacle{Obstacle: machine.Obstacle{Name: long(508, "é") + fmt.Sprint(n), HolderCount: 100, Position: 77}}
		for range machine.MaxExplained {
			o.Holders = append(o.Holders, machine.Holder{Lease: 1 << 50, Token: fence.MaxToken, Floor: fence.MaxToken, Owner: long(256, "o"), Actor: long(256, "a"), Metadata: meta, Since: 1 << 60})
			o.Ahead = append(o.Ahead, machine.Waiter{Lease: 1 << 50, Owner: long(256, "o"), Actor: long(256, "a"), Metadata: meta, Since: 1 << 60})
		}
		e.Obstacles = append(e.Obstacles, o)
	}
	var circle []machine.Link
	for range 200 {
		circle = append(circle, machine.Link{Actor: long(256, "é"), Name: long(512, "é"), Lease: 1 << 50})
	}
	for _, err := range []error{
		&lease.HeldError{Refusal: &lease.Refusal{Reason: machine.ReasonLockHeld, Name: e.Obstacles[0].Name, Explain: []machine.Obstacle{e.Obstacles[0].Obstacle}}, Explain: e},
		&lease.WaitTimeoutError{Waited: time.Hour, Explain: e},
		&lease.Refusal{Reason: machine.ReasonDeadlock, Name: long(512, "é"), Circle: circle},
		&lease.Refusal{Reason: machine.ReasonNotHeld, Name: long(512, "é"), Ended: &machine.Ended{Cause: machine.EndRevoked, By: long(256, "é")}, Token: fence.MaxToken, Current: fence.MaxToken},
	} {
		s := status.Convert(toStatus(err))
		wire, err2 := proto.Marshal(s.Proto())
		if err2 != nil {
			t.Fatal(err2)
		}
		headers := base64.RawStdEncoding.EncodedLen(len(wire)) + percentEncoded(s.Message())
		if headers > 8<<10-400 { // what else a trailer holds
			t.Errorf("%T takes %d bytes of headers", err, headers)
		}
		p := problemIn(s)
		switch {
		case len(p.GetObstacles()) > 0:
			o := p.GetObstacles()[0]
			if len(o.GetHolders()) == 0 || o.GetHolders()[0].GetOwner() == "" || o.GetHolderCount() != 100 || o.GetPosition() != 77 {
				t.Errorf("%T: too much was left out: %v", err, o)
			}
		case p.GetReason() == "DEADLOCK" && len(p.GetCircle()) == 0:
			t.Error("nothing is left of the circle")
		}
	}
	// What fits is left alone.
	small := e
	small.Obstacles = []lease.Obstacle{{Obstacle: machine.Obstacle{Name: "a", HolderCount: 16}}}
	for n := range 16 {
		small.Obstacles[0].Holders = append(small.Obstacles[0].Holders, machine.Holder{Token: fence.Token(n + 1), Owner: "someone", Metadata: []machine.Meta{{Key: "host", Value: "web-7"}}})
	}
	p := problemIn(status.Convert(toStatus(&lease.WaitTimeoutError{Explain: small})))
	if h := p.GetObstacles()[0].GetHolders(); len(h) != 16 || !slices.ContainsFunc(h, func(h *pb.Holder) bool { return h.GetMetadata()["host"] == "web-7" }) {
		t.Errorf("%d holders are left of 16", len(h))
	}
}

// percentEncoded is the length of a grpc-message header.
func percentEncoded(s string) int {
	n := 0
	for _, b := range []byte(s) {
		if n++; b < ' ' || b > '~' || b == '%' {
			n += 2
		}
	}
	return n
}
