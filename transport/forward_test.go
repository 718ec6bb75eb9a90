package transport

import (
	"context"
	"errors"
	"sync"
	"sync/atomic"
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

func (f *forgetful) Leader(context.Context, int) (grpc.ClientConnInterface, context.Context, error) {
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

// queueing is a leader at which acquisitions wait, and that answers whatever else it
// is asked. It tells by which lanes it was asked.
type queueing struct {
	Cluster
	waiting atomic.Int64
	lanes   [lanes]atomic.Int64
}

func (q *queueing) Leader(_ context.Context, lane int) (grpc.ClientConnInterface, context.Context, error) {
	return laned{q, lane}, context.Background(), nil
}

type laned struct {
	*queueing
	lane int
}

func (l laned) Invoke(ctx context.Context, _ string, req, _ any, _ ...grpc.CallOption) error {
	l.lanes[l.lane].Add(1)
	if a, ok := req.(*pb.AcquireRequest); ok && a.GetWaitForever() {
		l.waiting.Add(1)
		<-ctx.Done()
	}
	return nil
}

func (l laned) NewStream(context.Context, *grpc.StreamDesc, string, ...grpc.CallOption) (grpc.ClientStream, error) {
	panic("not asked for")
}

// TestForwardedWaitsAreBounded: one wait too many is refused at once, and what keeps
// leases alive goes by another connection than waits.
func TestForwardedWaitsAreBounded(t *testing.T) {
	leader := &queueing{}
	f := &forwarder{leaderless: time.Second, cluster: leader, stopping: context.Background()}
	here := func(context.Context, any) (any, error) { return nil, lease.ErrNotLeader }
	ask := func(ctx context.Context, method string, req any) error {
		_, err := f.unary(ctx, req, &grpc.UnaryServerInfo{FullMethod: method}, here)
		return err
	}
	wait := func(ctx context.Context, id uint64) error {
		return ask(ctx, pb.LockService_Acquire_FullMethodName, &pb.AcquireRequest{RequestId: id, Attempt: 1, WaitForever: true})
	}
	ctx, cancel := context.WithCancel(t.Context())
	var waits sync.WaitGroup
	for i := range maxForwarded {
		waits.Go(func() { wait(ctx, uint64(i+1)) })
	}
	soonTrue(t, "all wait", func() bool { return leader.waiting.Load() == maxForwarded })
	var exhausted *lease.ExhaustedError
	if err := wait(soon(t), maxForwarded+1); !errors.As(err, &exhausted) {
		t.Errorf("one more: %v", err)
	}
	if err := ask(soon(t), pb.LeaseService_KeepAlive_FullMethodName, &pb.KeepAliveRequest{LeaseIds: []uint64{1}}); err != nil {
		t.Error(err)
	}
	if err := ask(soon(t), pb.LockService_Get_FullMethodName, &pb.GetRequest{Name: "a"}); err != nil {
		t.Error(err)
	}
	for lane, want := range map[int]int64{laneKeep: 1, laneCall: 1, laneWait: maxForwarded} {
		if n := leader.lanes[lane].Load(); n != want {
			t.Errorf("%d calls by lane %d, not %d", n, lane, want)
		}
	}
	cancel()
	waits.Wait()
	if err := wait(ctx, 1); errors.As(err, &exhausted) {
		t.Error("there is no room after they have ended")
	}
}
