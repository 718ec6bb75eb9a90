package transport

import (
	"context"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/distlock/distlock/lease"
	"github.com/distlock/distlock/lease/machine"
	pb "github.com/distlock/distlock/proto/distlock/v1"
)

// forgetful is a leader whose first answer is lost, and the connection to it.
type forgetful struct {
	Cluster
	grpc.ClientConnInterface
	calls int
}

func (f *forgetful) Leader(context.Context) (grpc.ClientConnInterface, context.Context, error) {
	return f, context.Background(), nil
}

func (f *forgetful) Invoke(context.Context, string, any, any, ...grpc.CallOption) error {
	f.calls++
	if f.calls == 1 {
		return status.Error(codes.Unavailable, "EOF")
	}
	return toStatus(&lease.Refusal{Reason: machine.ReasonRequestEnded})
}

// TestARepeatThatTheClientKnowsNothingOf: the answer to a forwarded request is
// lost, and its repeat finds that the request has ended. A client that asked
// once must not be told that its new request id is an old one.
func TestARepeatThatTheClientKnowsNothingOf(t *testing.T) {
	leader := &forgetful{}
	f := &forwarder{leaderless: time.Second, cluster: leader, stopping: context.Background()}
	here := func(context.Context, any) (any, error) { return nil, lease.ErrNotLeader }
	_, err := f.unary(context.Background(), &pb.AcquireRequest{RequestId: 7}, &grpc.UnaryServerInfo{FullMethod: pb.LockService_Acquire_FullMethodName}, here)
	if got := reasonOf(asStatus(err)); got != ReasonOutcomeUnknown || leader.calls != 2 {
		t.Errorf("%d calls, %q: %v", leader.calls, got, err)
	}
	// Asked for the first time, the answer is passed on as it is.
	_, err = f.unary(context.Background(), &pb.AcquireRequest{RequestId: 7}, &grpc.UnaryServerInfo{FullMethod: pb.LockService_Acquire_FullMethodName}, here)
	if got := reasonOf(asStatus(err)); got != string(machine.ReasonRequestEnded) {
		t.Errorf("%q: %v", got, err)
	}
}
