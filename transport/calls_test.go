package transport

import (
	"context"
	"errors"
	"io"
	"net"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/net/http2"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/peer"
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
	for range 10 {
		if _, err := c.Begin(pb.LockService_List_FullMethodName); err != nil {
			t.Fatal(err)
		}
	}
	soonTrue(t, "a call is refused", func() bool { return status.Code(get()) == codes.ResourceExhausted })
	c.Close()
	soonTrue(t, "there is room again", func() bool { return get() == nil })
	// One that has very many is cut where there is no room.
	c = http2test.Dial(t, r.address)
	for range maxSilent + 1 {
		if _, err := c.Begin(pb.LockService_List_FullMethodName); err != nil {
			break
		}
	}
	c.Cut()
	soonTrue(t, "there is room again", func() bool { return get() == nil })
}

// TestHeadersAreBounded: calls of one connection whose headers take much are refused
// when they take too much together, and no other is.
func TestHeadersAreBounded(t *testing.T) {
	r := serve(t, Config{Manager: running(t)})
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
	soonTrue(t, "ten were answered", func() bool { return a.answered.Load() == 10 })
	before := a.debt.Load() // frames
	for range 10 {
		id, err := c.Begin(pb.LeaseService_KeepAlive_FullMethodName)
		if err == nil {
			err = c.WriteRSTStream(id, http2.ErrCodeCancel)
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	soonTrue(t, "ten were for nothing", func() bool { return a.answered.Load() == 10 && a.debt.Load() == before+10*(costOfCall+2) })
	for what, of := range map[string]struct {
		ctx  context.Context
		at   time.Time
		debt int64
	}{
		"cancelled at once":       {ended(context.Canceled), time.Now(), costOfCall},
		"a wait that is given up": {ended(context.Canceled), time.Now().Add(-time.Minute), -costOfCall},
		"past its deadline":       {ended(context.DeadlineExceeded), time.Now(), -costOfCall},
	} {
		a := &conn{}
		answered(context.WithValue(peer.NewContext(of.ctx, &peer.Peer{Addr: connAddr{of: a}}), begunKey{}, &begun{at: of.at}))
		if a.debt.Load() != of.debt || a.answered.Load() != 0 {
			t.Errorf("%s: a debt of %d, %d answered", what, a.debt.Load(), a.answered.Load())
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
