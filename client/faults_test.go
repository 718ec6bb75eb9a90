package client_test

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"

	"github.com/distlock/distlock/client"
	"github.com/distlock/distlock/client/clienttest"
	pb "github.com/distlock/distlock/proto/distlock/v1"
)

// tap looks at the operations of a client's streams and at their answers, and
// may stand in for the server.
type tap struct {
	// out is asked of each operation before it is sent. An answer is given in
	// place of the server's; silent drops the operation.
	out func(op *pb.Operation) *pb.Answer
	// in is shown each answer, and may hold it up.
	in func(a *pb.Answer)
}

// silent, given by tap.out, is no answer at all.
var silent = &pb.Answer{}

func (p *tap) option() client.Option {
	return client.WithDialOptions(grpc.WithChainStreamInterceptor(
		func(ctx context.Context, desc *grpc.StreamDesc, cc *grpc.ClientConn, method string, open grpc.Streamer, opts ...grpc.CallOption) (grpc.ClientStream, error) {
			stream, err := open(ctx, desc, cc, method, opts...)
			if err != nil || !strings.HasSuffix(method, "/Multiplex") {
				return stream, err
			}
			t := &tapped{ClientStream: stream, tap: p, made: make(chan *pb.MultiplexResponse, 1000), came: make(chan came)}
			go t.receive()
			return t, nil
		}))
}

type tapped struct {
	grpc.ClientStream
	tap  *tap
	made chan *pb.MultiplexResponse
	came chan came
}

type came struct {
	msg *pb.MultiplexResponse
	err error
}

func (t *tapped) SendMsg(m any) error {
	msg, ok := m.(*pb.MultiplexRequest)
	if !ok || t.tap.out == nil {
		return t.ClientStream.SendMsg(m)
	}
	pass, made := &pb.MultiplexRequest{}, &pb.MultiplexResponse{}
	for _, op := range msg.GetOperations() {
		switch a := t.tap.out(op); a {
		case nil:
			pass.Operations = append(pass.Operations, op)
		case silent:
		default:
			a = proto.CloneOf(a)
			a.Id = op.GetId()
			made.Answers = append(made.Answers, a)
		}
	}
	if len(made.Answers) > 0 {
		t.made <- made
	}
	return t.ClientStream.SendMsg(pass)
}

func (t *tapped) receive() {
	for {
		c := came{msg: &pb.MultiplexResponse{}}
		c.err = t.ClientStream.RecvMsg(c.msg)
		select {
		case t.came <- c:
		case <-t.Context().Done():
			return
		}
		if c.err != nil {
			return
		}
	}
}

func (t *tapped) RecvMsg(m any) error {
	var msg *pb.MultiplexResponse
	select {
	case msg = <-t.made:
	case c := <-t.came:
		if c.err != nil {
			return c.err
		}
		msg = c.msg
	case <-t.Context().Done():
		return status.FromContextError(t.Context().Err()).Err()
	}
	for _, a := range msg.GetAnswers() {
		if t.tap.in != nil {
			t.tap.in(a)
		}
	}
	proto.Merge(m.(proto.Message), msg)
	return nil
}

// onCalls stands between a client and its calls; call makes the one under way.
func onCalls(fn func(ctx context.Context, method string, call func(context.Context) error) error) client.Option {
	return client.WithDialOptions(grpc.WithChainUnaryInterceptor(
		func(ctx context.Context, method string, req, reply any, cc *grpc.ClientConn, invoke grpc.UnaryInvoker, opts ...grpc.CallOption) error {
			return fn(ctx, method, func(ctx context.Context) error { return invoke(ctx, method, req, reply, cc, opts...) })
		}))
}

// way are options, and WithUnary for a client that is to make calls.
func way(unary bool, opts ...client.Option) []client.Option {
	if unary {
		opts = append(opts, client.WithUnary())
	}
	return opts
}

func failure(code codes.Code, reason string) *pb.Answer {
	return &pb.Answer{Result: &pb.Answer_Failure{Failure: &pb.Failure{Code: int32(code), Reason: reason, Message: reason}}}
}

// held says who holds a lock and how many wait for it.
func held(t *testing.T, c *client.Client, name string) (tokens []uint64, waiters int) {
	t.Helper()
	info, err := c.Get(t.Context(), name)
	if err != nil {
		t.Fatal(err)
	}
	for _, h := range info.Holders {
		tokens = append(tokens, uint64(h.Token))
	}
	return tokens, info.WaiterCount
}

func waits(t *testing.T, c *client.Client, name string, n int) {
	t.Helper()
	eventually(t, fmt.Sprintf("%d wait for %q", n, name), func() bool {
		_, waiters := held(t, c, name)
		return waiters == n
	})
}

// firstInLine is the lease of who waits for a lock in the first place.
func firstInLine(t *testing.T, c *client.Client, name string) uint64 {
	t.Helper()
	info, err := c.Get(t.Context(), name)
	if err != nil {
		t.Fatal(err)
	}
	return info.Waiters[0].LeaseID
}

func free(t *testing.T, c *client.Client, name string) {
	t.Helper()
	eventually(t, fmt.Sprintf("%q is free", name), func() bool {
		tokens, waiters := held(t, c, name)
		return len(tokens) == 0 && waiters == 0
	})
}

// TestALeaseOfManyLocks: renewals of a lease with more locks than any list
// shows keep all of them; what is lost at once, however much, is told.
func TestALeaseOfManyLocks(t *testing.T) {
	for _, unary := range []bool{false, true} {
		s := clienttest.Start(t)
		opts := way(unary)
		c, ops := s.Client(t, opts...), s.Client(t)
		lease, err := c.Grant(t.Context(), 3*time.Second)
		if err != nil {
			t.Fatal(err)
		}
		locks := make([]*client.Lock, 150)
		for i := range locks {
			if locks[i], err = lease.Acquire(t.Context(), fmt.Sprint("a", i)); err != nil {
				t.Fatal(err)
			}
		}
		s.Advance(7 * time.Second)
		for _, l := range locks {
			if err := l.Err(); err != nil {
				t.Fatalf("unary %v: %s: %v", unary, l.Name(), err)
			}
			if tokens, _ := held(t, ops, l.Name()); len(tokens) != 1 || tokens[0] != uint64(l.Token()) {
				t.Fatalf("unary %v: %s: believed with token %d, held with %v", unary, l.Name(), l.Token(), tokens)
			}
		}
		for _, l := range locks[:120] {
			if err := ops.Admin().ForceRelease(t.Context(), l.Name(), l.Token(), "ops"); err != nil {
				t.Fatal(err)
			}
		}
		s.Advance(2 * time.Second)
		for _, l := range locks[:120] {
			if lost := lostAs(t, l); lost.Cause != client.CauseForceReleased {
				t.Fatalf("%+v", lost)
			}
		}
		for _, l := range locks[120:] {
			if err := l.Err(); err != nil {
				t.Fatalf("unary %v: %s: %v", unary, l.Name(), err)
			}
		}
	}
}

// TestASupersededAttemptIsTriedAgain: the answer is not the request's, and the
// grant of the next attempt is no leak.
func TestASupersededAttemptIsTriedAgain(t *testing.T) {
	s := clienttest.Start(t)
	var attempts []uint32
	c := s.Client(t, (&tap{out: func(op *pb.Operation) *pb.Answer {
		if r := op.GetAcquire(); r != nil {
			attempts = append(attempts, r.GetAttempt())
			if len(attempts) == 1 {
				return failure(codes.Aborted, "SUPERSEDED")
			}
		}
		return nil
	}}).option())
	lock := acquire(t, c, "a")
	if err := lock.Release(t.Context()); err != nil {
		t.Fatal(err)
	}
	free(t, s.Client(t), "a")
	if len(attempts) != 2 || attempts[0] != 1 || attempts[1] != 2 {
		t.Errorf("attempts %v", attempts)
	}
}

// TestAWaitCancelledOverAPartition: however long the server could not be told,
// it is, and the lease that lives on holds nothing unwanted.
func TestAWaitCancelledOverAPartition(t *testing.T) {
	s := clienttest.Start(t)
	holder := s.Client(t)
	c := s.Client(t, client.WithCallTimeout(50*time.Millisecond))
	lease, err := c.Grant(t.Context(), time.Hour)
	if err != nil {
		t.Fatal(err)
	}
	lock := acquire(t, holder, "a", client.TTL(time.Hour))
	ctx, cancel := context.WithCancel(t.Context())
	got := make(chan error, 1)
	go func() {
		_, err := lease.Acquire(ctx, "a")
		got <- err
	}()
	waits(t, holder, "a", 1)
	s.Cut()
	cancel()
	if err := <-got; !errors.Is(err, context.Canceled) || !errors.Is(err, client.ErrNotAcquired) {
		t.Fatal(err)
	}
	time.Sleep(500 * time.Millisecond) // ten call timeouts
	s.Restore()
	waits(t, holder, "a", 0)
	if err := lock.Release(t.Context()); err != nil {
		t.Fatal(err)
	}
	free(t, holder, "a")
	if err := lease.Err(); err != nil {
		t.Error(err)
	}
}

// TestAReleaseWithAnEndedContext: under a lease nothing else would free it.
func TestAReleaseWithAnEndedContext(t *testing.T) {
	ended, cancel := context.WithCancel(context.Background())
	cancel()
	for _, unary := range []bool{false, true} {
		for _, cut := range []bool{false, true} {
			s := clienttest.Start(t)
			opts := way(unary, client.WithCallTimeout(50*time.Millisecond))
			c, other := s.Client(t, opts...), s.Client(t)
			lease, err := c.Grant(t.Context(), time.Hour)
			if err != nil {
				t.Fatal(err)
			}
			under, err := lease.Acquire(t.Context(), "under")
			if err != nil {
				t.Fatal(err)
			}
			own := acquire(t, c, "own", client.TTL(time.Hour))
			id, err := other.Admin().Grant(t.Context(), time.Hour)
			if err != nil {
				t.Fatal(err)
			}
			others := acquire(t, c, "others", client.UnderLeaseID(id))
			if cut {
				s.Cut()
			}
			for _, l := range []*client.Lock{under, own, others} {
				l.Release(ended)
				if !errors.Is(l.Err(), client.ErrReleased) {
					t.Errorf("%s: %v", l.Name(), l.Err())
				}
			}
			if cut {
				time.Sleep(200 * time.Millisecond)
				s.Restore()
			}
			for _, name := range []string{"under", "own", "others"} {
				free(t, other, name)
			}
		}
	}
}

// TestUnderLeaseIDCancelledBesideItsGrant: what was granted in the race is
// given back, though the lease lives on.
func TestUnderLeaseIDCancelledBesideItsGrant(t *testing.T) {
	s := clienttest.Start(t)
	var mu sync.Mutex
	cancels := map[uint64]context.CancelFunc{}
	var next context.CancelFunc
	c := s.Client(t, (&tap{
		out: func(op *pb.Operation) *pb.Answer {
			if op.GetAcquire() != nil {
				mu.Lock()
				cancels[op.GetId()] = next
				mu.Unlock()
			}
			return nil
		},
		in: func(a *pb.Answer) {
			mu.Lock()
			cancel := cancels[a.GetId()]
			mu.Unlock()
			if cancel != nil {
				cancel()
				time.Sleep(time.Millisecond)
			}
		},
	}).option())
	other := s.Client(t)
	id, err := other.Admin().Grant(t.Context(), time.Hour)
	if err != nil {
		t.Fatal(err)
	}
	cancelled := 0
	for i := range 50 {
		ctx, cancel := context.WithCancel(t.Context())
		mu.Lock()
		next = cancel
		mu.Unlock()
		lock, err := c.Acquire(ctx, fmt.Sprint("a", i), client.UnderLeaseID(id))
		switch {
		case err == nil:
			if err := lock.Release(t.Context()); err != nil {
				t.Error(err)
			}
		case errors.Is(err, context.Canceled):
			cancelled++
		default:
			t.Error(err)
		}
	}
	if cancelled == 0 {
		t.Fatal("none was cancelled")
	}
	eventually(t, "nothing is held", func() bool {
		info, err := other.Admin().Lease(t.Context(), id)
		return err == nil && len(info.Holds) == 0
	})
}

// TestAnOldServerUnderLeaseID: one that knows sequence numbers only makes up an
// id itself. A wait without one ends with its call, a grant by its token.
func TestAnOldServerUnderLeaseID(t *testing.T) {
	s := clienttest.Start(t)
	var racing atomic.Pointer[context.CancelFunc]
	c := s.Client(t, (&tap{
		out: func(op *pb.Operation) *pb.Answer {
			if op.GetAcquire().GetRequestId() != 0 {
				f := failure(codes.InvalidArgument, "INVALID_ARGUMENT")
				f.GetFailure().Problem = &pb.Problem{Field: "request_id"}
				return f
			}
			return nil
		},
		in: func(a *pb.Answer) {
			if cancel := racing.Load(); cancel != nil && a.GetAcquire() != nil {
				(*cancel)()
				time.Sleep(20 * time.Millisecond)
			}
		},
	}).option())
	other := s.Client(t)
	id, err := other.Admin().Grant(t.Context(), time.Hour)
	if err != nil {
		t.Fatal(err)
	}
	acquire(t, other, "a")
	ctx, cancel := context.WithCancel(t.Context())
	got := make(chan error, 1)
	go func() {
		_, err := c.Acquire(ctx, "a", client.UnderLeaseID(id))
		got <- err
	}()
	waits(t, other, "a", 1)
	cancel()
	if err := <-got; !errors.Is(err, context.Canceled) {
		t.Error(err)
	}
	waits(t, other, "a", 0)

	ctx, cancel = context.WithCancel(t.Context())
	racing.Store(&cancel)
	if _, err := c.Acquire(ctx, "b", client.UnderLeaseID(id)); !errors.Is(err, context.Canceled) {
		t.Errorf("granted beside its cancel: %v", err)
	}
	free(t, other, "b")
}

// TestCloseEndsWhatWaits: when Close has returned nothing of the client waits
// or is held, no lock is delayed, and every context has ended.
func TestCloseEndsWhatWaits(t *testing.T) {
	for _, unary := range []bool{false, true} {
		s := clienttest.Start(t)
		opts := way(unary)
		other := s.Client(t)
		c, err := client.New([]string{s.Endpoint}, append(opts, client.WithClock(s.Clock))...)
		if err != nil {
			t.Fatal(err)
		}
		first := acquire(t, other, "a")
		lease, err := c.Grant(t.Context(), time.Hour)
		if err != nil {
			t.Fatal(err)
		}
		var locks []*client.Lock
		for i := range 20 {
			locks = append(locks, acquire(t, c, fmt.Sprint("own", i), client.LockDelay(time.Hour)))
			under, err := lease.Acquire(t.Context(), fmt.Sprint("under", i), client.LockDelay(time.Hour))
			if err != nil {
				t.Fatal(err)
			}
			locks = append(locks, under)
		}
		left := acquire(t, c, "left", client.NoRenew())
		ended := make(chan error, 40)
		for i := range 40 {
			go func() {
				var err error
				if i%2 == 0 {
					_, err = c.Acquire(t.Context(), "a")
				} else {
					_, err = lease.Acquire(t.Context(), "a")
				}
				ended <- err
			}()
		}
		waits(t, other, "a", 40)
		if err := c.Close(); err != nil {
			t.Fatal(err)
		}
		if _, waiters := held(t, other, "a"); waiters != 0 {
			t.Errorf("unary %v: %d wait after Close", unary, waiters)
		}
		for range 40 {
			if err := <-ended; !errors.Is(err, client.ErrClosed) && !errors.Is(err, client.ErrReleased) {
				t.Errorf("a wait ended with %v", err)
			}
		}
		for _, l := range append(locks, left) {
			if l.Context().Err() == nil {
				t.Errorf("%s: its context goes on", l.Name())
			}
		}
		for _, l := range locks {
			if again, err := other.TryAcquire(t.Context(), l.Name()); err != nil {
				t.Errorf("unary %v: %s after Close: %v", unary, l.Name(), err)
			} else if again.Release(t.Context()) != nil {
				t.Error("not released")
			}
		}
		if tokens, _ := held(t, other, "left"); len(tokens) != 1 {
			t.Errorf("a lock that is not to be renewed: held with %v", tokens)
		}
		if err := first.Release(t.Context()); err != nil {
			t.Fatal(err)
		}
		free(t, other, "a")
	}
}

// TestGrantsWhileTheClientCloses: each is returned, and then ended, or given
// back.
func TestGrantsWhileTheClientCloses(t *testing.T) {
	s := clienttest.Start(t)
	other := s.Client(t)
	for round := range 10 {
		c, err := client.New([]string{s.Endpoint}, client.WithClock(s.Clock))
		if err != nil {
			t.Fatal(err)
		}
		lease, err := c.Grant(t.Context(), time.Hour)
		if err != nil {
			t.Fatal(err)
		}
		var group sync.WaitGroup
		begun := make(chan struct{}, 1000)
		for i := range 16 {
			group.Go(func() {
				for n := 0; ; n++ {
					name := fmt.Sprint(round, "-", i, "-", n)
					var lock *client.Lock
					var err error
					if i%2 == 0 {
						lock, err = lease.TryAcquire(t.Context(), name)
					} else {
						lock, err = c.TryAcquire(t.Context(), name)
					}
					if err != nil {
						if !errors.Is(err, client.ErrClosed) && !errors.Is(err, client.ErrReleased) {
							t.Errorf("%v", err)
						}
						return
					}
					select {
					case begun <- struct{}{}:
					default:
					}
					<-lock.Done()
				}
			})
		}
		<-begun
		if err := c.Close(); err != nil {
			t.Fatal(err)
		}
		group.Wait()
		for l, err := range other.List(t.Context(), "") {
			if err != nil {
				t.Fatal(err)
			}
			t.Fatalf("round %d: after Close: %+v", round, l)
		}
	}
}

// TestALockThatIsNotRenewedEnds at its deadline, its context too.
func TestALockThatIsNotRenewedEnds(t *testing.T) {
	s := clienttest.Start(t)
	c := s.Client(t)
	lock := acquire(t, c, "a", client.NoRenew(), client.TTL(2*time.Second))
	id, err := c.Admin().Grant(t.Context(), 2*time.Second)
	if err != nil {
		t.Fatal(err)
	}
	under := acquire(t, c, "b", client.UnderLeaseID(id))
	s.Advance(1900 * time.Millisecond)
	if err := errors.Join(lock.Err(), under.Err()); err != nil {
		t.Fatal(err)
	}
	s.Advance(200 * time.Millisecond)
	for _, l := range []*client.Lock{lock, under} {
		if lost := lostAs(t, l); lost.Cause != client.CauseUnreachable {
			t.Errorf("%+v", lost)
		}
	}
}

// TestAWaitIsRenewed: a waiter keeps its place for many TTLs; one that has
// frozen loses it after one, though its connection is open.
func TestAWaitIsRenewed(t *testing.T) {
	for _, unary := range []bool{false, true} {
		s := clienttest.Start(t)
		holder := s.Client(t)
		var frozen atomic.Bool
		var opts []client.Option
		if unary {
			opts = append(opts, client.WithUnary(), onCalls(func(ctx context.Context, method string, call func(context.Context) error) error {
				if frozen.Load() && strings.HasSuffix(method, "/KeepAlive") {
					<-ctx.Done()
					return ctx.Err()
				}
				return call(ctx)
			}))
		} else {
			opts = append(opts, (&tap{out: func(*pb.Operation) *pb.Answer {
				if frozen.Load() {
					return silent
				}
				return nil
			}}).option())
		}
		c := s.Client(t, opts...)
		lock := acquire(t, holder, "a", client.TTL(time.Hour))
		ctx, cancel := context.WithCancel(t.Context())
		ended := make(chan error, 1)
		go func() {
			_, err := c.Acquire(ctx, "a", client.TTL(2*time.Second))
			ended <- err
		}()
		waits(t, holder, "a", 1)
		place := firstInLine(t, holder, "a")
		s.Advance(10 * time.Second)
		if info, err := holder.Get(t.Context(), "a"); err != nil || info.WaiterCount != 1 || info.Waiters[0].LeaseID != place {
			t.Fatalf("unary %v: after five TTLs: %+v %v", unary, info.Waiters, err)
		}
		frozen.Store(true)
		s.Advance(3 * time.Second)
		waits(t, holder, "a", 0)
		cancel()
		frozen.Store(false)
		<-ended
		if err := lock.Release(t.Context()); err != nil {
			t.Fatal(err)
		}
	}
}

// TestDeadWaitersAreNotServed: those behind them wait for their TTL once, and
// not for that of each in turn.
func TestDeadWaitersAreNotServed(t *testing.T) {
	s := clienttest.Start(t)
	holder := s.Client(t)
	lock := acquire(t, holder, "a", client.TTL(time.Hour))
	var frozen atomic.Bool
	ctx, cancel := context.WithCancel(t.Context())
	var group sync.WaitGroup
	defer func() {
		frozen.Store(false)
		cancel()
		group.Wait()
	}()
	for i := range 10 {
		c := s.Client(t, (&tap{out: func(*pb.Operation) *pb.Answer {
			if frozen.Load() {
				return silent
			}
			return nil
		}}).option())
		group.Go(func() { c.Acquire(ctx, "a", client.TTL(2*time.Second)) })
		waits(t, holder, "a", i+1)
	}
	c, got := s.Client(t), make(chan time.Time, 1)
	group.Go(func() {
		if _, err := c.Acquire(t.Context(), "a", client.TTL(2*time.Second)); err != nil {
			t.Error(err)
		}
		got <- s.Clock.Now()
	})
	waits(t, holder, "a", 11)
	frozen.Store(true)
	from := s.Clock.Now()
	s.Advance(2500 * time.Millisecond)
	if err := lock.Release(t.Context()); err != nil {
		t.Fatal(err)
	}
	select {
	case at := <-got:
		t.Logf("served %v after the others died", at.Sub(from))
	case <-time.After(5 * time.Second):
		t.Fatal("the living one is not served after the TTL of the dead")
	}
}

// TestAProxyThatEndsCalls costs a waiter nothing, nor does it end a Watch.
func TestAProxyThatEndsCalls(t *testing.T) {
	s := clienttest.Start(t)
	holder := s.Client(t)
	lock := acquire(t, holder, "a", client.TTL(time.Hour))
	var cuts atomic.Int64
	reset := status.Error(codes.Internal, "stream terminated by RST_STREAM with error code: INTERNAL_ERROR")
	calls := onCalls(func(ctx context.Context, method string, call func(context.Context) error) error {
		if !strings.HasSuffix(method, "/Acquire") || cuts.Load() >= 5 {
			return call(ctx)
		}
		ctx, cancel := context.WithTimeout(ctx, 30*time.Millisecond)
		defer cancel()
		err := call(ctx)
		if ctx.Err() != nil {
			cuts.Add(1)
			return reset
		}
		return err
	})
	watches := client.WithDialOptions(grpc.WithChainStreamInterceptor(
		func(ctx context.Context, desc *grpc.StreamDesc, cc *grpc.ClientConn, method string, open grpc.Streamer, o ...grpc.CallOption) (grpc.ClientStream, error) {
			stream, err := open(ctx, desc, cc, method, o...)
			if err == nil && strings.HasSuffix(method, "/Watch") && cuts.Add(1)%2 == 1 {
				return resetting{stream, reset}, nil
			}
			return stream, err
		}))
	c := s.Client(t, client.WithUnary(), calls, watches)
	got := make(chan *client.Lock, 1)
	go func() {
		l, err := c.Acquire(t.Context(), "a", client.TTL(time.Minute))
		if err != nil {
			t.Error(err)
		}
		got <- l
	}()
	waits(t, holder, "a", 1)
	place := firstInLine(t, holder, "a")
	eventually(t, "five cuts", func() bool { return cuts.Load() >= 5 })
	if err := lock.Release(t.Context()); err != nil {
		t.Fatal(err)
	}
	if l := <-got; l.LeaseID() != place {
		t.Errorf("granted under lease %d, it waited under %d", l.LeaseID(), place)
	}

	from := uint64(1)
	n := 0
	for e, err := range c.Watch(t.Context(), "a", from) {
		if err != nil {
			t.Fatal(err)
		}
		if n++; e.Revision < from {
			t.Errorf("revision %d after %d", e.Revision, from)
		}
		if from = e.Revision; n == 4 { // granted, queued, ended, granted
			break
		}
	}
}

// resetting ends a stream after one message.
type resetting struct {
	grpc.ClientStream
	err error
}

func (r resetting) RecvMsg(any) error { return r.err }

// TestReleaseFromElsewhereIsTold at once, and as what it was.
func TestReleaseFromElsewhereIsTold(t *testing.T) {
	s := clienttest.Start(t)
	c, other := s.Client(t), s.Client(t)
	lease, err := c.Grant(t.Context(), time.Hour)
	if err != nil {
		t.Fatal(err)
	}
	under, err := lease.Acquire(t.Context(), "under")
	if err != nil {
		t.Fatal(err)
	}
	for _, l := range []*client.Lock{under, acquire(t, c, "own", client.TTL(time.Hour))} {
		if err := other.Admin().Release(t.Context(), l.Name(), l.Token()); err != nil {
			t.Fatal(err)
		}
		if lost := lostAs(t, l); lost.Cause != client.CauseReleased {
			t.Errorf("%s: %+v", l.Name(), lost)
		}
	}
	if err := lease.Err(); err != nil {
		t.Error(err)
	}
}

// TestABoundedWaitWithoutAServer is over after it and the call timeout, and
// names each endpoint and why.
func TestABoundedWaitWithoutAServer(t *testing.T) {
	for _, unary := range []bool{false, true} {
		opts := way(unary, client.WithCallTimeout(100*time.Millisecond))
		endpoints := []string{"127.0.0.1:1", "127.0.0.1:2"}
		c, err := client.New(endpoints, opts...)
		if err != nil {
			t.Fatal(err)
		}
		_, err = c.Acquire(t.Context(), "a", client.Wait(50*time.Millisecond))
		if !errors.Is(err, client.ErrUnavailable) {
			t.Errorf("%v", err)
		}
		for _, endpoint := range endpoints {
			if !strings.Contains(fmt.Sprint(err), endpoint) {
				t.Errorf("%s is not named by %v", endpoint, err)
			}
		}
		c.Close()
	}
}

// TestAWaitUntilADeadline ends as one that was in vain, and says why.
func TestAWaitUntilADeadline(t *testing.T) {
	s := clienttest.Start(t)
	c := s.Client(t)
	acquire(t, s.Client(t, client.WithOwner("ann")), "a")
	ctx, cancel := context.WithTimeout(t.Context(), 300*time.Millisecond)
	defer cancel()
	go func() { // the server's clock is to reach the bound of the wait
		for ctx.Err() == nil {
			s.Clock.Advance(10 * time.Millisecond)
			time.Sleep(5 * time.Millisecond)
		}
	}()
	_, err := c.Acquire(ctx, "a")
	var e *client.Error
	if !errors.Is(err, client.ErrNotAcquired) || !errors.Is(err, context.DeadlineExceeded) {
		t.Fatal(err)
	}
	if !errors.As(err, &e) || len(e.Obstacles) != 1 || e.Obstacles[0].Holders[0].Owner != "ann" {
		t.Errorf("%v explains nothing: %+v", err, e)
	}
}

// TestMoreLeasesThanOneMessageHolds: all are renewed.
func TestMoreLeasesThanOneMessageHolds(t *testing.T) {
	s := clienttest.Start(t)
	c := s.Client(t)
	const n = 10_100
	locks := make([]*client.Lock, n)
	var group sync.WaitGroup
	var next atomic.Int64
	for range 256 {
		group.Go(func() {
			for i := next.Add(1) - 1; i < n; i = next.Add(1) - 1 {
				lock, err := c.TryAcquire(t.Context(), fmt.Sprint(i), client.TTL(time.Minute))
				if err != nil {
					t.Error(err)
				}
				locks[i] = lock
			}
		})
	}
	group.Wait()
	for range 6 { // two TTLs, in steps that leave time for a renewal of all
		s.Clock.Advance(20 * time.Second)
		eventually(t, "all are renewed", func() bool {
			for _, l := range locks {
				if l.Remaining() < 41*time.Second || l.Err() != nil {
					return l.Err() != nil
				}
			}
			return true
		})
	}
	for _, l := range locks {
		if err := l.Err(); err != nil {
			t.Fatal(err)
		}
	}
}

// TestWhenATTLCountsFrom: from when what made the lease was sent first, however
// long its answer took and however often it was sent.
func TestWhenATTLCountsFrom(t *testing.T) {
	s := clienttest.Start(t)
	first := true
	c := s.Client(t, (&tap{in: func(a *pb.Answer) {
		if a.GetAcquire() != nil {
			s.Clock.Advance(2 * time.Second)
		}
	}}).option())
	unary := s.Client(t, client.WithUnary(), onCalls(func(ctx context.Context, method string, call func(context.Context) error) error {
		err := call(ctx)
		if strings.HasSuffix(method, "/Grant") && first {
			first = false
			s.Clock.Advance(2 * time.Second)
			return status.Error(codes.Unavailable, "the answer is lost")
		}
		return err
	}))
	lock, err := c.TryAcquire(t.Context(), "a", client.TTL(12*time.Second))
	if err != nil {
		t.Fatal(err)
	}
	if left := lock.Remaining(); left > 10*time.Second {
		t.Errorf("a try answered after 2s: %v left of 12s", left)
	}
	lease, err := unary.Grant(t.Context(), 12*time.Second)
	if err != nil {
		t.Fatal(err)
	}
	if left := lease.Remaining(); left > 10*time.Second {
		t.Errorf("a lease granted by the second attempt: %v left of 12s", left)
	}
}

// TestARepeatWaitsForWhatIsLeft of its bound, and no request that is open is
// told to be over.
func TestARepeatWaitsForWhatIsLeft(t *testing.T) {
	s := clienttest.Start(t)
	holder := s.Client(t)
	acquire(t, holder, "a", client.TTL(time.Hour))
	var mu sync.Mutex
	var sent []*pb.AcquireRequest
	c := s.Client(t, (&tap{out: func(op *pb.Operation) *pb.Answer {
		if r := op.GetAcquire(); r != nil {
			mu.Lock()
			sent = append(sent, proto.CloneOf(r))
			mu.Unlock()
		}
		return nil
	}}).option())
	lease, err := c.Grant(t.Context(), time.Hour)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	ended := make(chan error, 1)
	go func() {
		_, err := lease.Acquire(ctx, "a", client.Wait(30*time.Second))
		ended <- err
	}()
	waits(t, holder, "a", 1)
	if _, err := lease.TryAcquire(t.Context(), "b"); err != nil {
		t.Fatal(err)
	}
	s.Clock.Advance(10 * time.Second)
	s.Cut()
	s.Restore()
	last := func() *pb.AcquireRequest {
		mu.Lock()
		defer mu.Unlock()
		return sent[len(sent)-1]
	}
	eventually(t, "the wait is repeated", func() bool { return last().GetAttempt() == 2 })
	if left := last().GetWait().AsDuration(); left > 20*time.Second {
		t.Errorf("10s into a wait of 30s its repeat waits for %v", left)
	}
	mu.Lock()
	if beside := sent[1]; beside.GetLowestOpenRequestId() != sent[0].GetRequestId() {
		t.Errorf("request %d says that %d is the lowest open one, while %d waits", beside.GetRequestId(), beside.GetLowestOpenRequestId(), sent[0].GetRequestId())
	}
	mu.Unlock()
	waits(t, holder, "a", 1)
	cancel()
	<-ended
	waits(t, holder, "a", 0)
}

// TestAReleasedLockIsWarnedOfNoMore: its lease goes on without it.
func TestAReleasedLockIsWarnedOfNoMore(t *testing.T) {
	s := clienttest.Start(t)
	warned := make(chan client.Warning, 10)
	c := s.Client(t, client.WithOnWarning(func(w client.Warning) { warned <- w }))
	lease, err := c.Grant(t.Context(), 10*time.Second)
	if err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"kept", "released"} {
		lock, err := lease.Acquire(t.Context(), name)
		if err != nil {
			t.Fatal(err)
		}
		if name == "released" {
			lock.Release(t.Context())
		}
	}
	s.PauseRenewals()
	s.Advance(6 * time.Second)
	select {
	case w := <-warned:
		if len(w.Names) != 1 || w.Names[0] != "kept" {
			t.Errorf("warned of %v", w.Names)
		}
	case <-time.After(5 * time.Second):
		t.Fatal("not warned")
	}
}

// TestALeaseIsRevokedAfterItsContextsEnded: never while a hold is believed.
func TestALeaseIsRevokedAfterItsContextsEnded(t *testing.T) {
	s := clienttest.Start(t)
	var lease *client.Lease
	c := s.Client(t, onCalls(func(ctx context.Context, method string, call func(context.Context) error) error {
		if strings.HasSuffix(method, "/Revoke") && lease.Context().Err() == nil {
			t.Error("revoked while it is believed")
		}
		return call(ctx)
	}))
	lease, err := c.Grant(t.Context(), time.Minute)
	if err != nil {
		t.Fatal(err)
	}
	if err := lease.Revoke(t.Context()); err != nil {
		t.Fatal(err)
	}
}

// TestAReleaseThatIsNotAnsweredEndsTheLease: while it is unsettled for a whole
// TTL of acknowledged renewals the client renews no more, and revokes nothing:
// what it believes ends at its own deadline, before the server's.
func TestAReleaseThatIsNotAnsweredEndsTheLease(t *testing.T) {
	s := clienttest.Start(t)
	var mu sync.Mutex
	renewals := 0
	c := s.Client(t, (&tap{out: func(op *pb.Operation) *pb.Answer {
		if op.GetRelease() != nil {
			return failure(codes.Unavailable, "STOPPING")
		}
		if op.GetKeepAlive() != nil {
			mu.Lock()
			renewals++
			mu.Unlock()
		}
		return nil
	}}).option(), client.WithCallTimeout(50*time.Millisecond))
	other := s.Client(t)
	lease, err := c.Grant(t.Context(), 3*time.Second)
	if err != nil {
		t.Fatal(err)
	}
	kept, err := lease.Acquire(t.Context(), "kept")
	if err != nil {
		t.Fatal(err)
	}
	stuck, err := lease.Acquire(t.Context(), "stuck")
	if err != nil {
		t.Fatal(err)
	}
	if err := stuck.Release(t.Context()); !errors.Is(err, client.ErrUnavailable) {
		t.Fatal(err)
	}
	for range 400 { // 20s
		s.Advance(50 * time.Millisecond)
		if tokens, _ := held(t, other, "kept"); len(tokens) == 0 && kept.Err() == nil {
			t.Fatal("believed, and free at the server")
		}
	}
	if lost := lostAs(t, kept); lost.Cause != client.CauseUnreachable {
		t.Errorf("%+v", lost)
	}
	free(t, other, "stuck")
	mu.Lock()
	defer mu.Unlock()
	if renewals < 3 {
		t.Errorf("%d renewals before it gave the lease up", renewals)
	}
}

// TestCloseWaitsForNobody that it has never reached.
func TestCloseWaitsForNobody(t *testing.T) {
	for _, unary := range []bool{false, true} {
		opts := way(unary, client.WithCallTimeout(50*time.Millisecond))
		c, err := client.New([]string{"127.0.0.1:1"}, opts...)
		if err != nil {
			t.Fatal(err)
		}
		for range 10 {
			if _, err := c.TryAcquire(t.Context(), "a"); !errors.Is(err, client.ErrUnavailable) {
				t.Error(err)
			}
		}
		if n := client.Unsettled(c); n != 0 {
			t.Errorf("unary %v: %d requests to settle, none of which was sent", unary, n)
		}
		if err := c.Close(); err != nil {
			t.Error(err)
		}
	}
}

// TestALockUnderSomebodysLease is believed as long as the lease lives by what
// the server says, and no longer: an acquisition does not renew it.
func TestALockUnderSomebodysLease(t *testing.T) {
	s := clienttest.Start(t)
	c, keeper := s.Client(t), s.Client(t)
	id, err := keeper.Admin().Grant(t.Context(), 3*time.Second)
	if err != nil {
		t.Fatal(err)
	}
	s.Advance(2 * time.Second)
	lock := acquire(t, c, "a", client.UnderLeaseID(id))
	if left := lock.Remaining(); left > time.Second {
		t.Fatalf("%v left of a lease that lives for one second more", left)
	}
	for range 10 {
		if _, err := keeper.Admin().KeepAlive(t.Context(), id); err != nil {
			t.Fatal(err)
		}
		s.Advance(time.Second)
		if err := lock.Err(); err != nil {
			t.Fatalf("its lease is renewed: %v", err)
		}
	}
	if err := keeper.Admin().ForceRelease(t.Context(), "a", 0, "ops"); err != nil {
		t.Fatal(err)
	}
	s.Advance(1500 * time.Millisecond)
	if lost := lostAs(t, lock); lost.Cause != client.CauseForceReleased {
		t.Errorf("%+v", lost)
	}

	other := acquire(t, c, "b", client.UnderLeaseID(id))
	for range 100 { // nobody renews the lease any more
		s.Advance(50 * time.Millisecond)
		if tokens, _ := held(t, keeper, "b"); len(tokens) == 0 && other.Err() == nil {
			t.Fatal("believed, and free at the server")
		}
	}
	lostAs(t, other)
}
