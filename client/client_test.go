package client_test

import (
	"context"
	"errors"
	"fmt"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"go.uber.org/goleak"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/distlock/distlock/client"
	"github.com/distlock/distlock/client/clienttest"
	pb "github.com/distlock/distlock/proto/distlock/v1"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func eventually(t *testing.T, what string, condition func() bool) {
	t.Helper()
	deadline := time.Now().Add(10 * time.Second)
	for !condition() {
		if time.Now().After(deadline) {
			t.Fatal("never: " + what)
		}
		time.Sleep(time.Millisecond)
	}
}

func acquire(t *testing.T, c *client.Client, name string, opts ...client.AcquireOption) *client.Lock {
	t.Helper()
	lock, err := c.Acquire(t.Context(), name, opts...)
	if err != nil {
		t.Fatal(err)
	}
	return lock
}

// lostAs waits for a lock's end and returns its cause.
func lostAs(t *testing.T, l *client.Lock) *client.LostError {
	t.Helper()
	select {
	case <-l.Done():
	case <-time.After(10 * time.Second):
		t.Fatal("the lock is not lost")
	}
	var lost *client.LostError
	if err := l.Err(); !errors.As(err, &lost) || context.Cause(l.Context()) != err {
		t.Fatalf("Err %v, cause %v", err, context.Cause(l.Context()))
	}
	if len(lost.Names) == 0 || lost.Names[0] != l.Name() || lost.Token != l.Token() {
		t.Fatalf("%+v", lost)
	}
	return lost
}

func TestAcquireAndRelease(t *testing.T) {
	s := clienttest.Start(t)
	c := s.Client(t, client.WithOwner("ann"))
	first := acquire(t, c, "a", client.Metadata(map[string]string{"job": "7"}))
	if first.Err() != nil || first.Token() == 0 || first.Pass().Floor != first.Token() || first.TTL() != client.DefaultTTL {
		t.Fatalf("%+v", first)
	}
	_, err := c.TryAcquire(t.Context(), "a")
	var e *client.Error
	if !errors.Is(err, client.ErrNotAcquired) || !errors.As(err, &e) || e.Obstacles[0].Holders[0].Owner != "ann" ||
		e.Obstacles[0].Holders[0].Metadata["job"] != "7" {
		t.Fatalf("%v %+v", err, e)
	}
	if err := first.Release(t.Context()); err != nil {
		t.Fatal(err)
	}
	if err := first.Release(t.Context()); err != nil {
		t.Fatalf("again: %v", err)
	}
	if !errors.Is(first.Err(), client.ErrReleased) || first.Remaining() != 0 {
		t.Fatal(first.Err())
	}
	second := acquire(t, c, "a", client.TTL(2500*time.Millisecond))
	if second.Token() <= first.Token() || second.TTL() != 2500*time.Millisecond {
		t.Fatalf("token %d after %d, TTL %v", second.Token(), first.Token(), second.TTL())
	}
}

// TestTwoLocksOfOneClientExclude: two acquisitions of one process are two.
func TestTwoLocksOfOneClientExclude(t *testing.T) {
	s := clienttest.Start(t)
	c := s.Client(t)
	var inside, group = 0, sync.WaitGroup{}
	for range 8 {
		group.Add(1)
		go func() {
			defer group.Done()
			for range 20 {
				lock := acquire(t, c, "a")
				if inside++; inside != 1 { // guarded by the lock alone: the race detector judges too
					t.Errorf("%d inside", inside)
				}
				inside--
				if err := lock.Release(t.Context()); err != nil {
					t.Error(err)
				}
			}
		}()
	}
	group.Wait()
}

func TestRenewalsKeepALockForHours(t *testing.T) {
	s := clienttest.Start(t)
	c := s.Client(t, client.WithOnWarning(func(w client.Warning) { t.Errorf("warned: %+v", w) }))
	lock := acquire(t, c, "a", client.TTL(3*time.Second))
	s.Advance(20 * time.Second)
	if err := lock.Err(); err != nil {
		t.Fatal(err)
	}
	if left := lock.Remaining(); left < time.Second || left > 3*time.Second {
		t.Errorf("%v left of 3s", left)
	}
}

// TestUnreachable: the lock is warned of at half its TTL, and lost before the
// server can grant it to another.
func TestUnreachable(t *testing.T) {
	s := clienttest.Start(t)
	var warnings []client.Warning
	var mu sync.Mutex
	c := s.Client(t, client.WithOnWarning(func(w client.Warning) {
		mu.Lock()
		defer mu.Unlock()
		warnings = append(warnings, w)
	}))
	const ttl = 10 * time.Second
	lock := acquire(t, c, "a", client.TTL(ttl))
	s.PauseRenewals()
	s.Advance(ttl/2 - 100*time.Millisecond)
	mu.Lock()
	if len(warnings) != 0 {
		t.Errorf("warned before half the TTL: %+v", warnings)
	}
	mu.Unlock()
	s.Advance(300 * time.Millisecond)
	eventually(t, "a warning at half the TTL", func() bool {
		mu.Lock()
		defer mu.Unlock()
		return len(warnings) == 1 && warnings[0].Names[0] == "a" && warnings[0].Err != nil
	})
	s.Advance(ttl/2 - 600*time.Millisecond)
	if err := lock.Err(); err != nil {
		t.Fatalf("lost too early: %v", err)
	}
	s.Advance(310 * time.Millisecond) // 90 ms before the TTL: within the margin of 110 ms
	if lost := lostAs(t, lock); lost.Cause != client.CauseUnreachable {
		t.Fatal(lost)
	}
	// The server still has it: it is the client that stops believing first.
	info, err := c.Get(t.Context(), "a")
	if err != nil || len(info.Holders) != 1 {
		t.Fatalf("%+v %v", info, err)
	}
	if err := lock.Release(t.Context()); err == nil {
		t.Error("the release of a lost lock says nothing")
	}
}

func TestRenewalResumedInTime(t *testing.T) {
	s := clienttest.Start(t)
	c := s.Client(t)
	lock := acquire(t, c, "a", client.TTL(10*time.Second))
	s.PauseRenewals()
	s.Advance(8 * time.Second)
	s.ResumeRenewals()
	s.Advance(8 * time.Second)
	if err := lock.Err(); err != nil {
		t.Fatal(err)
	}
}

func TestLossHasAReason(t *testing.T) {
	s := clienttest.Start(t)
	c, ops := s.Client(t), s.Client(t, client.WithOwner("ops"))
	lock := acquire(t, c, "a", client.TTL(3*time.Second))
	if err := ops.Admin().ForceRelease(t.Context(), "a", 0, ""); err != nil {
		t.Fatal(err)
	}
	s.Advance(2 * time.Second)
	if lost := lostAs(t, lock); lost.Cause != client.CauseForceReleased || lost.By != "ops" {
		t.Fatalf("%+v", lost)
	}
	err := lock.Release(t.Context())
	if err == nil {
		t.Fatal("the release of a lost lock says nothing")
	}
	lock = acquire(t, c, "a", client.TTL(3*time.Second))
	if err := ops.Admin().Revoke(t.Context(), lock.LeaseID(), "them"); err != nil {
		t.Fatal(err)
	}
	s.Advance(2 * time.Second)
	if lost := lostAs(t, lock); lost.Cause != client.CauseRevoked || lost.By != "them" {
		t.Fatalf("%+v", lost)
	}
	// A release by hand of a lost token says why, and who holds it now.
	now := acquire(t, c, "a")
	err = c.Admin().Release(t.Context(), "a", lock.Token())
	var e *client.Error
	if !errors.Is(err, client.ErrNotHeld) || !errors.As(err, &e) || e.Cause != client.CauseRevoked ||
		e.CurrentToken != now.Token() || !e.GrantedSince {
		t.Fatalf("%v %+v", err, e)
	}
}

func TestLocksUnderALease(t *testing.T) {
	s := clienttest.Start(t)
	c, ops := s.Client(t), s.Client(t, client.WithOwner("ops"))
	lease, err := c.Grant(t.Context(), 3*time.Second)
	if err != nil {
		t.Fatal(err)
	}
	a, err := lease.Acquire(t.Context(), "a")
	if err != nil {
		t.Fatal(err)
	}
	b, err := lease.AcquireAll(t.Context(), []string{"c", "b"})
	if err != nil || b.Name() != "b" || b.Token() <= a.Token() {
		t.Fatal(b, err)
	}
	// A hold broken under a lease that lives on is noticed too.
	if err := ops.Admin().ForceRelease(t.Context(), "a", 0, ""); err != nil {
		t.Fatal(err)
	}
	s.Advance(2 * time.Second)
	if lost := lostAs(t, a); lost.Cause != client.CauseForceReleased || lost.By != "ops" {
		t.Fatalf("%+v", lost)
	}
	if b.Err() != nil || lease.Err() != nil {
		t.Fatal(b.Err(), lease.Err())
	}
	if err := b.Release(t.Context()); err != nil {
		t.Fatal(err)
	}
	again, err := lease.TryAcquire(t.Context(), "b")
	if err != nil {
		t.Fatal(err)
	}
	if err := lease.Revoke(t.Context()); err != nil {
		t.Fatal(err)
	}
	eventually(t, "the lock ends with its lease", func() bool { return again.Err() != nil })
	if _, err := lease.TryAcquire(t.Context(), "b"); err == nil {
		t.Fatal("acquired under a revoked lease")
	}
}

// TestCutConnection: a waiter keeps its place over a lost connection, and a
// holder its lock.
func TestCutConnection(t *testing.T) {
	s := clienttest.Start(t)
	holder, c, other := s.Client(t), s.Client(t), s.Client(t)
	lock := acquire(t, holder, "a", client.TTL(10*time.Minute))
	got := make(chan *client.Lock, 2)
	wait := func(c *client.Client) {
		n := 0
		if info, err := holder.Get(t.Context(), "a"); err == nil {
			n = info.WaiterCount
		}
		go func() {
			l, err := c.Acquire(t.Context(), "a", client.TTL(time.Minute))
			if err != nil {
				t.Error(err)
			}
			got <- l
		}()
		eventually(t, "it waits", func() bool {
			info, err := holder.Get(t.Context(), "a")
			return err == nil && info.WaiterCount == n+1
		})
	}
	wait(c)
	first, err := holder.Get(t.Context(), "a")
	if err != nil {
		t.Fatal(err)
	}
	wait(other)
	s.Cut()
	time.Sleep(50 * time.Millisecond)
	s.Restore()
	var after client.LockInfo
	eventually(t, "everybody is back", func() bool {
		after, err = holder.Get(t.Context(), "a")
		return err == nil
	})
	if after.WaiterCount != 2 || after.Waiters[0].LeaseID != first.Waiters[0].LeaseID {
		t.Fatalf("the queue is %+v, its head was %+v", after.Waiters, first.Waiters[0])
	}
	if lock.Err() != nil {
		t.Fatal(lock.Err())
	}
	if err := lock.Release(t.Context()); err != nil {
		t.Fatal(err)
	}
	l := <-got
	if l.LeaseID() != first.Waiters[0].LeaseID {
		t.Error("the second was served first")
	}
	if err := l.Release(t.Context()); err != nil {
		t.Fatal(err)
	}
	if err := (<-got).Release(t.Context()); err != nil {
		t.Fatal(err)
	}
}

func TestCancelledWaitLeavesTheQueue(t *testing.T) {
	s := clienttest.Start(t)
	c := s.Client(t)
	acquire(t, c, "a")
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() {
		_, err := c.Acquire(ctx, "a")
		done <- err
	}()
	waiters := func(n int) func() bool {
		return func() bool {
			info, err := c.Get(t.Context(), "a")
			return err == nil && info.WaiterCount == n
		}
	}
	eventually(t, "it waits", waiters(1))
	cancel()
	if err := <-done; !errors.Is(err, context.Canceled) {
		t.Fatal(err)
	}
	eventually(t, "it left the queue", waiters(0))
}

// TestWaitedGrantIsConfirmed: a grant that came after a long wait counts from
// a renewal, not from a request that is old.
func TestWaitedGrantIsConfirmed(t *testing.T) {
	s := clienttest.Start(t)
	c := s.Client(t)
	first := acquire(t, c, "a", client.TTL(time.Hour))
	got := make(chan *client.Lock, 1)
	go func() {
		l, err := c.Acquire(t.Context(), "a", client.TTL(10*time.Second))
		if err != nil {
			t.Error(err)
		}
		got <- l
	}()
	eventually(t, "it waits", func() bool {
		info, err := c.Get(t.Context(), "a")
		return err == nil && info.WaiterCount == 1
	})
	s.Advance(30 * time.Second)
	if err := first.Release(t.Context()); err != nil {
		t.Fatal(err)
	}
	l := <-got
	if err := l.Err(); err != nil || l.Remaining() < 9*time.Second {
		t.Fatalf("%v, %v left", err, l.Remaining())
	}
}

func TestSharedFloors(t *testing.T) {
	s := clienttest.Start(t)
	c := s.Client(t)
	a := acquire(t, c, "s", client.Limit(2))
	b := acquire(t, c, "s", client.Limit(2))
	if b.Pass().Floor != a.Token() {
		t.Fatalf("floor %d, want %d", b.Pass().Floor, a.Token())
	}
	if _, err := c.TryAcquire(t.Context(), "s", client.Limit(2)); !errors.Is(err, client.ErrNotAcquired) {
		t.Fatal(err)
	}
	if _, err := c.TryAcquire(t.Context(), "s", client.Limit(3)); !errors.Is(err, client.ErrInvalid) {
		t.Fatal(err)
	}
}

func TestDeadlockIsRefused(t *testing.T) {
	s := clienttest.Start(t)
	c := s.Client(t)
	acquire(t, c, "a", client.Actor("x"))
	acquire(t, c, "b", client.Actor("y"))
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan struct{})
	go func() {
		defer close(done)
		c.Acquire(ctx, "b", client.Actor("x"))
	}()
	eventually(t, "x waits for b", func() bool {
		info, err := c.Get(t.Context(), "b")
		return err == nil && info.WaiterCount == 1
	})
	if _, err := c.Acquire(t.Context(), "a", client.Actor("y")); !errors.Is(err, client.ErrDeadlock) {
		t.Fatal(err)
	}
	cancel()
	<-done
}

func TestListLeasesWatchCheck(t *testing.T) {
	s := clienttest.Start(t)
	c := s.Client(t)
	status, err := c.Admin().Status(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	events := make(chan client.Event, 100)
	go func() {
		defer close(events)
		for e, err := range c.Watch(ctx, "w/", status.Revision+1) {
			if err != nil {
				return
			}
			events <- e
		}
	}()
	const n = 750 // more than a page
	var tokens []*client.Lock
	for i := range n {
		tokens = append(tokens, acquire(t, c, fmt.Sprintf("l/%04d", i), client.NoRenew()))
	}
	lock := acquire(t, c, "w/1")
	if err := lock.Release(t.Context()); err != nil {
		t.Fatal(err)
	}
	if e := <-events; e.Kind != client.EventGranted || e.Name != "w/1" || e.Token != lock.Token() {
		t.Fatalf("%+v", e)
	}
	s.Cut()
	s.Restore()
	again := acquire(t, c, "w/2")
	if e := <-events; e.Kind != client.EventEnded || e.Cause != client.CauseReleased {
		t.Fatalf("%+v", e)
	}
	if e := <-events; e.Kind != client.EventGranted || e.Name != "w/2" || e.Token != again.Token() {
		t.Fatalf("after a reconnect: %+v", e)
	}
	cancel()
	for range events { // until the watch has ended
	}
	count := 0
	for k, err := range c.List(t.Context(), "l/") {
		if err != nil || k.Name != fmt.Sprintf("l/%04d", count) {
			t.Fatal(k, err)
		}
		count++
	}
	leases := 0
	for _, err := range c.Admin().Leases(t.Context()) {
		if err != nil {
			t.Fatal(err)
		}
		leases++
	}
	if count != n || leases != n+1 {
		t.Fatalf("%d locks, %d leases", count, leases)
	}
	check, err := c.CheckToken(t.Context(), "l/0003", tokens[3].Token())
	if err != nil || !check.Live || check.CurrentToken != tokens[3].Token() {
		t.Fatalf("%+v %v", check, err)
	}
	if _, err := c.Admin().Lease(t.Context(), 12345); !errors.Is(err, client.ErrLeaseGone) {
		t.Fatal(err)
	}
}

func TestNoServer(t *testing.T) {
	c, err := client.New([]string{"127.0.0.1:1"}, client.WithCallTimeout(200*time.Millisecond))
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	if _, err := c.TryAcquire(t.Context(), "a"); !errors.Is(err, client.ErrUnavailable) {
		t.Fatal(err)
	}
	if _, err := c.Get(t.Context(), "a"); !errors.Is(err, client.ErrUnavailable) {
		t.Fatal(err)
	}
}

func TestCloseGivesBack(t *testing.T) {
	s := clienttest.Start(t)
	c, other := s.Client(t), s.Client(t)
	lock := acquire(t, c, "a")
	if err := c.Close(); err != nil {
		t.Fatal(err)
	}
	if !errors.Is(lock.Err(), client.ErrReleased) {
		t.Fatal(lock.Err())
	}
	if _, err := other.TryAcquire(t.Context(), "a"); err != nil {
		t.Fatal(err)
	}
	if _, err := c.TryAcquire(t.Context(), "b"); !errors.Is(err, client.ErrClosed) {
		t.Fatal(err)
	}
}

// TestGivingUpAGrantThatIsNotConfirmed: the wait is over, the renewal that it
// needs to count does not get through, and the caller no longer wants to know.
func TestGivingUpAGrantThatIsNotConfirmed(t *testing.T) {
	s := clienttest.Start(t)
	c := s.Client(t)
	first := acquire(t, c, "a", client.TTL(time.Hour))
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	got := make(chan error, 1)
	go func() {
		_, err := c.Acquire(ctx, "a", client.TTL(10*time.Second))
		got <- err
	}()
	eventually(t, "it waits", func() bool {
		info, err := c.Get(t.Context(), "a")
		return err == nil && info.WaiterCount == 1
	})
	s.Clock.Advance(5 * time.Second)
	s.PauseRenewals()
	if err := first.Release(t.Context()); err != nil {
		t.Fatal(err)
	}
	eventually(t, "it is granted", func() bool {
		info, err := c.Get(t.Context(), "a")
		return err == nil && info.WaiterCount == 0
	})
	cancel()
	if err := <-got; !errors.Is(err, context.Canceled) {
		t.Fatal(err)
	}
	eventually(t, "the grant is given back", func() bool {
		info, err := c.Get(t.Context(), "a")
		return err == nil && len(info.Holders) == 0
	})
}

// forgetful loses the next answer to an acquisition, and its connection.
type forgetful struct {
	grpc.ClientStream
	next *atomic.Bool
}

func (f forgetful) RecvMsg(m any) error {
	if err := f.ClientStream.RecvMsg(m); err != nil {
		return err
	}
	for _, a := range m.(*pb.MultiplexResponse).GetAnswers() {
		if a.GetFailure() != nil {
			if f.next.CompareAndSwap(true, false) {
				return status.Error(codes.Unavailable, "the answer is lost")
			}
		}
	}
	return nil
}

// TestARefusalWhoseAnswerWasLost: the repeat is told that the request has
// ended, and the caller that the lock is held, under a lease and without one.
func TestARefusalWhoseAnswerWasLost(t *testing.T) {
	s := clienttest.Start(t)
	acquire(t, s.Client(t), "a")
	var lose atomic.Bool
	c := s.Client(t, client.WithDialOptions(grpc.WithChainStreamInterceptor(
		func(ctx context.Context, desc *grpc.StreamDesc, cc *grpc.ClientConn, method string, open grpc.Streamer, opts ...grpc.CallOption) (grpc.ClientStream, error) {
			stream, err := open(ctx, desc, cc, method, opts...)
			return forgetful{stream, &lose}, err
		})))
	lease, err := c.Grant(t.Context(), time.Minute)
	if err != nil {
		t.Fatal(err)
	}
	for name, try := range map[string]func() (*client.Lock, error){
		"under a lease":           func() (*client.Lock, error) { return lease.TryAcquire(t.Context(), "a") },
		"with a lease of its own": func() (*client.Lock, error) { return c.TryAcquire(t.Context(), "a") },
	} {
		lose.Store(true)
		if _, err := try(); !errors.Is(err, client.ErrNotAcquired) {
			t.Errorf("%s: %v", name, err)
		}
		if lose.Load() {
			t.Errorf("%s: no answer was lost", name)
		}
	}
	if lock, err := lease.TryAcquire(t.Context(), "b"); err != nil {
		t.Error(err)
	} else if err := lock.Release(t.Context()); err != nil {
		t.Error(err)
	}
}

// TestEndpointsAreChecked: what would never be reached is said at once, with what is
// wrong with it.
func TestEndpointsAreChecked(t *testing.T) {
	for endpoint, why := range map[string]string{
		"http://h:50051": "it begins with http://", "https://h:1": "it begins with https://", "h": "it has no port", "": "it has no port",
		"h:": "its port is not a number", "h:99999": "its port is not a number from 1 to 65535", "h:0": "its port", "h:p": "its port",
		"h:50051/": "its port", "::1": "in brackets", "2001:db8::1:50051": "in brackets", "a/b:1": "that is not a host", "u@h:1": "that is not a host",
	} {
		c, err := client.New([]string{client.DefaultEndpoint, endpoint})
		if !errors.Is(err, client.ErrInvalid) || !strings.Contains(err.Error(), why) || !strings.Contains(err.Error(), strconv.Quote(endpoint)) {
			t.Errorf("%q: %v", endpoint, err)
		}
		if err == nil {
			c.Close()
		}
	}
	for _, endpoint := range []string{"h:1", "h.example:65535", "127.0.0.1:50051", "[::1]:50051", "[fe80::1%eth0]:1", ":50051"} {
		c, err := client.New([]string{endpoint})
		if err != nil {
			t.Errorf("%q: %v", endpoint, err)
			continue
		}
		c.Close()
	}
}
