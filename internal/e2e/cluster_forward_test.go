//go:build linux

package e2e

import (
	"context"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/durationpb"

	original "github.com/distlock/distlock/proto/distlock"
	pb "github.com/distlock/distlock/proto/distlock/v1"
)

// dial is a plain gRPC connection to a server, as grpcurl would make it.
func (s *server) dial() *grpc.ClientConn {
	s.t.Helper()
	conn, err := grpc.NewClient("passthrough:///"+s.address, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		s.t.Fatal(err)
	}
	s.t.Cleanup(func() { conn.Close() })
	return conn
}

// follower is a member that does not lead.
func (g *group) follower(leader *member) *member {
	for _, m := range g.members {
		if m != leader {
			return m
		}
	}
	g.t.Fatal("there is none")
	return nil
}

// TestClusterForwards: every member takes every unary call of a client that
// knows nothing of leaders.
func TestClusterForwards(t *testing.T) {
	g := startGroup(t, 3)
	leader := g.leader()
	g.settled(leader, 3)
	follower := g.follower(leader)
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	ok := func(what string, err error) {
		t.Helper()
		if err != nil {
			t.Fatalf("%s at a follower: %v", what, err)
		}
	}
	conn := follower.dial()
	locks, leases, old := pb.NewLockServiceClient(conn), pb.NewLeaseServiceClient(conn), original.NewDistlockClient(conn)

	a, err := locks.Acquire(ctx, &pb.AcquireRequest{Names: []string{"a"}, Ttl: durationpb.New(time.Minute), Owner: "plain"})
	ok("Acquire", err)
	if _, err := locks.Acquire(ctx, &pb.AcquireRequest{Names: []string{"a"}, Ttl: durationpb.New(time.Minute)}); status.Code(err) != codes.Aborted {
		t.Errorf("a refusal at a follower: %v", err)
	}
	if _, err := locks.Acquire(ctx, &pb.AcquireRequest{}); status.Code(err) != codes.InvalidArgument {
		t.Errorf("a bad request at a follower: %v", err)
	}
	_, err = leases.KeepAlive(ctx, &pb.KeepAliveRequest{LeaseIds: []uint64{a.GetHold().GetLeaseId()}})
	ok("KeepAlive", err)
	_, err = locks.Get(ctx, &pb.GetRequest{Name: "a"})
	ok("Get", err)
	l, err := leases.Grant(ctx, &pb.GrantRequest{Ttl: durationpb.New(time.Minute)})
	ok("Grant", err)
	_, err = leases.Revoke(ctx, &pb.RevokeRequest{LeaseId: l.GetLeaseId()})
	ok("Revoke", err)
	_, err = old.CreateLock(ctx, &original.Lock{Key: "old"})
	ok("CreateLock", err)
	if _, err := old.CreateLock(ctx, &original.Lock{Key: "old"}); status.Code(err) != codes.AlreadyExists || status.Convert(err).Message() != "A lock with key old already exists" {
		t.Errorf("the original's error at a follower: %v", err)
	}
	if k, err := old.AcquireLock(ctx, &original.AcquireLockRequest{Key: "old"}); err != nil || !k.GetAcquired() || k.GetClock() != 1 {
		t.Errorf("AcquireLock at a follower: %v, %v", k, err)
	}

	// A wait that is cancelled is abandoned; one whose connection is lost
	// keeps its place; one whose leader dies goes on at the next.
	waiting := func(n int) {
		t.Helper()
		for until := time.Now().Add(10 * time.Second); ; time.Sleep(10 * time.Millisecond) {
			r, err := locks.Get(ctx, &pb.GetRequest{Name: "a"})
			if err == nil && int(r.GetLock().GetWaiterCount()) == n {
				return
			}
			if time.Now().After(until) {
				t.Fatalf("not %d waiters: %v, %v", n, r, err)
			}
		}
	}
	wait := func(ctx context.Context, conn *grpc.ClientConn, request uint64) chan error {
		done := make(chan error, 1)
		go func() {
			_, err := pb.NewLockServiceClient(conn).Acquire(ctx, &pb.AcquireRequest{
				Names: []string{"a"}, Ttl: durationpb.New(20 * time.Second), WaitForever: true, RequestId: request,
			})
			done <- err
		}()
		return done
	}
	cancelled, stop := context.WithCancel(ctx)
	done := wait(cancelled, conn, 0)
	waiting(1)
	stop()
	if err := <-done; status.Code(err) != codes.Canceled {
		t.Errorf("cancelled: %v", err)
	}
	waiting(0)

	other := follower.dial()
	done = wait(ctx, other, 77)
	waiting(1)
	other.Close()
	<-done
	time.Sleep(300 * time.Millisecond)
	waiting(1)
	done = wait(ctx, conn, 77) // it comes back
	time.Sleep(200 * time.Millisecond)
	waiting(1)
	anonymous := wait(ctx, conn, 0)
	waiting(2)

	leader.kill()
	next := g.leader(leader)
	waiting(2)
	if _, err := pb.NewLockServiceClient(next.dial()).Release(ctx, &pb.ReleaseRequest{
		LeaseId: a.GetHold().GetLeaseId(), Token: a.GetHold().GetToken(),
	}); err != nil {
		t.Fatal(err)
	}
	if err := <-done; err != nil {
		t.Errorf("a wait over the death of the leader: %v", err)
	}
	if _, err := locks.Abandon(ctx, &pb.AbandonRequest{RequestId: 77}); err != nil {
		t.Errorf("Abandon at a follower: %v", err)
	}
	if err := <-anonymous; err != nil {
		t.Errorf("a wait without a request id over the death of the leader: %v", err)
	}
}

// TestClusterWaitsForWhoCannotRenew: a client that gives no request id cannot
// renew its wait: the member that has named its request does, for as long as the
// call waits, at the leader and elsewhere.
func TestClusterWaitsForWhoCannotRenew(t *testing.T) {
	g := startGroup(t, 3, "--election-timeout", "300ms")
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	leader := g.leader()
	g.settled(leader, 3)
	held, err := pb.NewLockServiceClient(leader.dial()).Acquire(ctx, &pb.AcquireRequest{Names: []string{"a"}, Ttl: durationpb.New(time.Minute)})
	if err != nil {
		t.Fatal(err)
	}
	type waiter struct {
		at   *member
		done chan error
	}
	var waiters []waiter
	for _, m := range g.members {
		w := waiter{m, make(chan error, 1)}
		waiters = append(waiters, w)
		locks := pb.NewLockServiceClient(m.dial())
		go func() {
			a, err := locks.Acquire(ctx, &pb.AcquireRequest{Names: []string{"a"}, Ttl: durationpb.New(time.Second), WaitForever: true})
			if err == nil {
				_, err = locks.Release(ctx, &pb.ReleaseRequest{LeaseId: a.GetHold().GetLeaseId(), Token: a.GetHold().GetToken()})
			}
			w.done <- err
		}()
	}
	locks := pb.NewLockServiceClient(leader.dial())
	time.Sleep(4 * time.Second) // four TTLs
	k, err := locks.Get(ctx, &pb.GetRequest{Name: "a"})
	if err != nil || k.GetLock().GetWaiterCount() != 3 {
		t.Fatalf("after four TTLs: %v %v", k, err)
	}
	if _, err := locks.Release(ctx, &pb.ReleaseRequest{LeaseId: held.GetHold().GetLeaseId(), Token: held.GetHold().GetToken()}); err != nil {
		t.Fatal(err)
	}
	for _, w := range waiters {
		if err := <-w.done; err != nil {
			t.Errorf("%s: %v", w.at.id, err)
		}
	}
}
