package transport

import (
	"context"
	"errors"
	"io"
	"math/rand/v2"
	"net"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/net/http2"
	"google.golang.org/grpc/codes"
	healthpb "google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"

	"github.com/distlock/distlock/internal/http2test"
	"github.com/distlock/distlock/lease"
	pb "github.com/distlock/distlock/proto/distlock/v1"
)

// TestCallsAreBounded: a call too many of all is refused at once, but for what
// renews or gives back, and what other members forward; there is room again once
// others have ended.
func TestCallsAreBounded(t *testing.T) {
	r := serve(t, Config{Manager: running(t), MaxCalls: 3})
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	served := make(chan error, 1)
	go func() { served <- r.ServePeers(l) }()
	defer func() {
		l.Close()
		<-served
	}()
	ctx, cancel := context.WithCancel(t.Context())
	for range 3 {
		w, err := r.locks().Watch(ctx, &pb.WatchRequest{})
		if err != nil {
			t.Fatal(err)
		}
		if _, err := w.Recv(); err != nil {
			t.Fatal(err)
		}
	}
	get := func() error {
		_, err := r.locks().Get(soon(t), &pb.GetRequest{Name: "a"})
		return err
	}
	if err := get(); status.Code(err) != codes.ResourceExhausted || reasonOf(err) != ReasonExhausted {
		t.Errorf("one more: %v", err)
	}
	if _, err := r.leases().KeepAlive(soon(t), &pb.KeepAliveRequest{LeaseIds: []uint64{1}}); err != nil {
		t.Errorf("a renewal: %v", err)
	}
	if _, err := r.locks().Release(soon(t), &pb.ReleaseRequest{LeaseId: 1, Token: 1}); status.Code(err) == codes.ResourceExhausted {
		t.Errorf("a release: %v", err)
	}
	peer := dial(t, l.Addr().String())
	defer peer.Close()
	if _, err := pb.NewLockServiceClient(peer).Get(soon(t), &pb.GetRequest{Name: "a"}); err != nil {
		t.Errorf("forwarded: %v", err)
	}
	cancel()
	soonTrue(t, "there is room again", func() bool { return get() == nil })
}

// TestCallsThatAreOnlyBegunAreBounded: a call counts from its headers on, whether
// its client goes on with it or not, until it ends with its connection.
func TestCallsThatAreOnlyBegunAreBounded(t *testing.T) {
	r := serve(t, Config{Manager: running(t), MaxCalls: 10})
	get := func() error {
		_, err := r.locks().Get(soon(t), &pb.GetRequest{Name: "a"})
		return err
	}
	c := http2test.Dial(t, r.address)
	for range 21 { // twice as many as there may be: one of its own part is one too many then
		if _, err := c.Begin(pb.LockService_List_FullMethodName); err != nil {
			t.Fatal(err)
		}
	}
	soonTrue(t, "a call is refused", func() bool { return status.Code(get()) == codes.ResourceExhausted })
	c.Close()
	soonTrue(t, "there is room again", func() bool { return get() == nil })
	// Whoever has very many is cut where there is no room.
	c = http2test.Dial(t, r.address)
	for range maxIdle + 1 {
		if _, err := c.Begin(pb.LockService_List_FullMethodName); err != nil {
			break
		}
	}
	c.Cut()
	soonTrue(t, "there is room again", func() bool { return get() == nil })
}

// TestIdleCallsAreBounded: calls that are never refused count too, until their answers
// are read; when there are too many calls, who has more than its part of them idle is
// cut, and others are not.
func TestIdleCallsAreBounded(t *testing.T) {
	const most = 8 * fewIdle
	r := serve(t, Config{Manager: running(t), MaxCalls: most})
	renew := func() error {
		_, err := r.leases().KeepAlive(soon(t), &pb.KeepAliveRequest{LeaseIds: []uint64{1}})
		return err
	}
	get := func() error {
		_, err := r.locks().Get(soon(t), &pb.GetRequest{Name: "a"})
		return err
	}
	few := http2test.Dial(t, r.address, http2test.Lazy())
	var last uint32
	for range fewIdle {
		last = few.Call(healthpb.Health_Check_FullMethodName, &healthpb.HealthCheckRequest{})
	}
	for _, more := range []func(*http2test.Conn){
		func(c *http2test.Conn) {
			c.Call(healthpb.Health_Check_FullMethodName, &healthpb.HealthCheckRequest{})
		},
		func(c *http2test.Conn) {
			if _, err := c.Begin(pb.LeaseService_KeepAlive_FullMethodName); err != nil {
				t.Fatal(err)
			}
		},
	} {
		c := http2test.Dial(t, r.address, http2test.Lazy())
		for range 2*most + 1 {
			more(c)
		}
		soonTrue(t, "a call is refused", func() bool { return status.Code(get()) == codes.ResourceExhausted })
		for range 10 {
			if err := renew(); err != nil {
				t.Errorf("a renewal: %v", err)
			}
		}
		c.Cut()
		soonTrue(t, "there is room again", func() bool { return get() == nil })
	}
	few.Open(0, 1<<20)
	few.Open(last, 1<<20)
	few.Ended(last)
	few.Close()
	soonTrue(t, "nothing is counted", func() bool { return r.calls.under.Load() == 0 })
}

// TestNobodyShutsOutOthers: with streams that are open and idle, and with waits, one
// client can take all calls that there may be; others have their part of them all the
// same, and whoever leaves streams idle is cut.
func TestNobodyShutsOutOthers(t *testing.T) {
	const most = 8 * fewIdle
	r := serve(t, Config{Manager: bounded(t, lease.Bounds{}), MaxCalls: most})
	get := func(what string) {
		t.Helper()
		for range 20 {
			if _, err := r.locks().Get(soon(t), &pb.GetRequest{Name: "a"}); err != nil {
				t.Fatalf("beside %s: %v", what, err)
			}
		}
	}
	get("nothing")
	c := http2test.Dial(t, r.address)
	for i := range int64(most) { // what comes together counts together
		if _, err := c.Begin(pb.StreamService_Multiplex_FullMethodName); err != nil {
			t.Fatal(err)
		}
		soonTrue(t, "it is begun", func() bool { return r.calls.under.Load() > i })
	}
	get("idle streams")
	c.Cut()
	soonTrue(t, "there is room again", func() bool { return r.calls.under.Load() == 0 })
	ctx, cancel := context.WithCancel(soon(t))
	defer cancel()
	if _, err := r.locks().Acquire(ctx, benchAcquire(1)); err != nil {
		t.Fatal(err)
	}
	waits := dial(t, r.address)
	defer waits.Close()
	refused := make(chan error, 2*most)
	for range 2 * most {
		go func() {
			_, err := pb.NewLockServiceClient(waits).Acquire(ctx, benchAcquire(1))
			refused <- err
		}()
	}
	if err := <-refused; status.Code(err) != codes.ResourceExhausted {
		t.Fatalf("one of too many waits: %v", err)
	}
	get("waits")
}

// TestCallsThatEndAreNotCounted: however they end, on a connection that goes on.
func TestCallsThatEndAreNotCounted(t *testing.T) {
	var seen atomic.Pointer[conn]
	r := serveWith(t, Config{Manager: running(t), MaxStreams: 40}, func(s *Server) { s.seen = func(c *conn) { seen.Store(c) } })
	held, err := r.locks().Acquire(soon(t), benchAcquire(1))
	if err != nil {
		t.Fatal(err)
	}
	before := seen.Load()
	c := http2test.Dial(t, r.address)
	soonTrue(t, "it is accepted", func() bool { return seen.Load() != before })
	go func() {
		for {
			if _, err := c.ReadFrame(); err != nil {
				return
			}
		}
	}()
	rng := rand.New(rand.NewPCG(5, 6))
	check := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	var open []uint32
	for range 4000 {
		seen.Load().debt.Store(0) // this is slow otherwise
		if len(open) > 0 && rng.IntN(2) == 0 {
			check(c.WriteRSTStream(open[0], http2.ErrCodeCancel))
			open = open[1:]
		}
		switch rng.IntN(8) {
		case 0: // answered
			c.Call(healthpb.Health_Check_FullMethodName, &healthpb.HealthCheckRequest{})
		case 1: // waits until it is given up
			open = append(open, c.Call(pb.LockService_Acquire_FullMethodName, benchAcquire(1)))
		case 2: // until its deadline
			id, err := c.Begin(pb.LockService_Acquire_FullMethodName, "grpc-timeout", "2m")
			check(err)
			data, err := http2test.Message(benchAcquire(1))
			check(err)
			check(c.WriteData(id, true, data))
		case 3: // a part, until its deadline
			id, err := c.Begin(pb.LockService_Acquire_FullMethodName, "grpc-timeout", "2m")
			check(err)
			check(c.WriteData(id, false, []byte{0, 0, 0, 0, 200, 1, 2}))
		case 4: // a part, and no more
			id, err := c.Begin(pb.LockService_Acquire_FullMethodName)
			check(err)
			check(c.WriteData(id, true, []byte{0, 0, 0, 0, 200, 1, 2}))
		case 5: // a part, until it is given up
			id, err := c.Begin(pb.LockService_Acquire_FullMethodName)
			check(err)
			check(c.WriteData(id, false, []byte{0, 0, 0}))
			open = append(open, id)
		case 6: // too large: refused before it has come
			id, err := c.Begin(pb.LockService_Acquire_FullMethodName)
			check(err)
			check(c.WriteData(id, false, []byte{0, 10, 0, 0, 0, 1}))
		case 7: // no call at all
			_, err := c.Begin("/no/method", "content-type", "text/plain")
			check(err)
		}
	}
	for _, id := range open {
		check(c.WriteRSTStream(id, http2.ErrCodeCancel))
	}
	soonTrue(t, "nothing is counted", func() bool { return r.calls.under.Load() == 0 && r.calls.kept.Load() == 0 })
	if _, err := r.locks().Release(soon(t), &pb.ReleaseRequest{LeaseId: held.GetHold().GetLeaseId(), Token: held.GetHold().GetToken()}); err != nil {
		t.Error(err)
	}
}

// TestRequestsThatHaveNotComeWholeAreBounded: of one connection, and of all.
func TestRequestsThatHaveNotComeWholeAreBounded(t *testing.T) {
	const mine, all = 1 << 20, 4 << 20
	var cut atomic.Int64
	r := serveWith(t, Config{Manager: running(t), MaxMessageBytes: 1 << 20, Refused: func(reason string) {
		if reason == ReasonSilentCalls {
			cut.Add(1)
		}
	}}, func(s *Server) { s.calls.each, s.calls.inAll = mine, all })
	fill := func(c *http2test.Conn, bytes int) {
		for ; bytes > 0; bytes -= 16 << 10 {
			id, err := c.Begin(pb.LockService_Acquire_FullMethodName)
			if err == nil {
				err = c.WriteData(id, false, append([]byte{0, 0, 64, 0, 0}, make([]byte, 16<<10-6)...))
			}
			if err != nil {
				return
			}
		}
	}
	c := http2test.Dial(t, r.address)
	fill(c, mine+64<<10)
	c.Cut()
	soonTrue(t, "nothing is kept", func() bool { return r.calls.kept.Load() == 0 })
	var conns []*http2test.Conn
	for range 2 * all / mine {
		c := http2test.Dial(t, r.address)
		fill(c, mine*3/4)
		conns = append(conns, c)
	}
	soonTrue(t, "some are cut", func() bool { return cut.Load() >= 3 && r.calls.kept.Load() <= all })
	if _, err := r.leases().KeepAlive(soon(t), &pb.KeepAliveRequest{LeaseIds: []uint64{1}}); err != nil {
		t.Errorf("another client: %v", err)
	}
	for _, c := range conns {
		c.Close()
	}
	soonTrue(t, "nothing is kept", func() bool { return r.calls.kept.Load() == 0 })
}

// TestHeadersAreBounded: calls of one connection whose headers take much are refused
// when they take too much together, and no other is.
func TestHeadersAreBounded(t *testing.T) {
	r := serveWith(t, Config{Manager: running(t)}, func(s *Server) {
		s.seen = func(c *conn) { c.source = nil } // this is slow otherwise
	})
	c := http2test.Dial(t, r.address)
	const each = 10 << 10
	pad := strings.Repeat("x", each)
	for range maxHeaders / each {
		if _, err := c.Begin(pb.LockService_List_FullMethodName, "x-pad", pad); err != nil {
			t.Fatal(err)
		}
	}
	id, err := c.Begin(pb.LockService_List_FullMethodName, "x-pad", pad)
	if err == nil {
		err = c.WriteData(id, true, make([]byte, 5))
	}
	if err != nil {
		t.Fatal(err)
	}
	if n := c.Ended(id); n != 0 {
		t.Errorf("one too many was answered with %d bytes", n)
	}
	for range maxHeaders / each { // whoever goes on is cut
		if _, err := c.Begin(pb.LockService_List_FullMethodName, "x-pad", pad); err != nil {
			break
		}
	}
	c.Cut()
	if _, err := r.locks().Get(metadata.AppendToOutgoingContext(soon(t), "x-pad", strings.Repeat("x", each)), &pb.GetRequest{Name: "a"}); err != nil {
		t.Errorf("another connection: %v", err)
	}
}

// TestWorkForNothingIsCounted: of calls that are reset before they are answered, and
// of those that are answered.
func TestWorkForNothingIsCounted(t *testing.T) {
	var seen atomic.Pointer[conn]
	r := serveWith(t, Config{Manager: &manager{keep: func([]lease.ID) ([]lease.KeepAlive, error) { return nil, nil }}},
		func(s *Server) { s.seen = func(c *conn) { seen.Store(c) } })
	c := http2test.Dial(t, r.address)
	soonTrue(t, "it is accepted", func() bool { return seen.Load() != nil })
	a := seen.Load()
	for range 10 {
		c.Ended(c.Call(pb.LeaseService_KeepAlive_FullMethodName, &pb.KeepAliveRequest{LeaseIds: []uint64{1}}))
	}
	soonTrue(t, "ten were answered", func() bool { return a.useful.Load() && a.debt.Load() <= 0 })
	before := a.debt.Load()
	for range 10 {
		id, err := c.Begin(pb.LeaseService_KeepAlive_FullMethodName)
		if err == nil {
			err = c.WriteRSTStream(id, http2.ErrCodeCancel)
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	soonTrue(t, "ten were for nothing", func() bool { return a.debt.Load() > before+10*costOfCall })
	for what, of := range map[string]struct {
		ctx  context.Context
		at   time.Time
		debt int64
	}{
		"cancelled at once":       {ended(context.Canceled), time.Now(), costOfCall + framesOfCall},
		"a wait that is given up": {ended(context.Canceled), time.Now().Add(-time.Minute), 0},
		"past its deadline":       {ended(context.DeadlineExceeded), time.Now(), 0},
	} {
		a := &conn{}
		(&begun{asked: of.at, conn: a}).answered(of.ctx)
		if a.debt.Load() != of.debt || a.useful.Load() {
			t.Errorf("%s: a debt of %d", what, a.debt.Load())
		}
	}
}

// ended is a context that has ended.
func ended(err error) context.Context {
	ctx, cancel := context.WithDeadline(context.Background(), time.Now().Add(-time.Second))
	if errors.Is(err, context.Canceled) {
		ctx, cancel = context.WithCancel(context.Background())
	}
	cancel()
	return ctx
}

// TestRenewalsWaitForNoWorker: what renews is answered while all workers are busy,
// as a unary call and on a stream.
func TestRenewalsWaitForNoWorker(t *testing.T) {
	busy, done := make(chan struct{}), make(chan struct{})
	m := running(t)
	r := serve(t, Config{Workers: 1, Manager: &blocked{m, busy, done}})
	listed := make(chan error, 1)
	go func() {
		_, err := r.locks().List(soon(t), &pb.ListRequest{})
		listed <- err
	}()
	<-busy
	if _, err := r.leases().KeepAlive(soon(t), &pb.KeepAliveRequest{LeaseIds: []uint64{1}}); err != nil {
		t.Error(err)
	}
	s, err := pb.NewStreamServiceClient(r.conn).Multiplex(soon(t))
	if err != nil {
		t.Fatal(err)
	}
	err = s.Send(&pb.MultiplexRequest{Operations: []*pb.Operation{{Id: 1, Call: &pb.Operation_KeepAlive{KeepAlive: &pb.KeepAliveRequest{LeaseIds: []uint64{1}}}}}})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := s.Recv(); err != nil {
		t.Error(err)
	}
	close(done)
	if err := <-listed; err != nil {
		t.Error(err)
	}
}

// blocked keeps a worker busy with a list.
type blocked struct {
	Manager
	busy, done chan struct{}
}

func (b *blocked) Locks(context.Context, string, string, int) ([]lease.LockInfo, bool, uint64, error) {
	close(b.busy)
	<-b.done
	return nil, false, 0, nil
}

// TestBackupsAreBounded: a backup keeps everything as it was when it began.
func TestBackupsAreBounded(t *testing.T) {
	c := &backups{began: make(chan struct{}, 10), end: make(chan struct{})}
	r := serve(t, Config{Manager: running(t), Cluster: c})
	client := pb.NewClusterServiceClient(r.conn)
	var all []pb.ClusterService_BackupClient
	for range maxBackups {
		b, err := client.Backup(soon(t), &pb.BackupRequest{})
		if err != nil {
			t.Fatal(err)
		}
		<-c.began
		all = append(all, b)
	}
	more := func() error {
		b, err := client.Backup(soon(t), &pb.BackupRequest{})
		if err == nil {
			_, err = b.Recv()
		}
		return err
	}
	if err := more(); status.Code(err) != codes.ResourceExhausted {
		t.Errorf("one more: %v", err)
	}
	close(c.end)
	for _, b := range all {
		if _, err := b.Recv(); err != io.EOF {
			t.Error(err)
		}
	}
	if err := more(); err != io.EOF {
		t.Errorf("when they have ended: %v", err)
	}
}

// backups is a cluster whose backups take until end.
type backups struct {
	Cluster
	began, end chan struct{}
}

func (b *backups) Backup(io.Writer) error {
	b.began <- struct{}{}
	<-b.end
	return nil
}
