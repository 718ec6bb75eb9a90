package server

import (
	"context"
	"net"
	"sync"
	"testing"
	"time"

	"github.com/jonboulle/clockwork"
	"go.uber.org/goleak"
	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/durationpb"

	"github.com/distlock/distlock/lease/machine"
	original "github.com/distlock/distlock/proto/distlock"
	pb "github.com/distlock/distlock/proto/distlock/v1"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// rig is a running server on a fake clock, and a connection to it.
type rig struct {
	*Server
	t     *testing.T
	clock *clockwork.FakeClock
	conn  *grpc.ClientConn
	stop  func() error // ends the server as SIGTERM does; what Run returned
}

func (r *rig) locks() pb.LockServiceClient       { return pb.NewLockServiceClient(r.conn) }
func (r *rig) leases() pb.LeaseServiceClient     { return pb.NewLeaseServiceClient(r.conn) }
func (r *rig) cluster() pb.ClusterServiceClient  { return pb.NewClusterServiceClient(r.conn) }
func (r *rig) original() original.DistlockClient { return original.NewDistlockClient(r.conn) }

// start runs a server in memory, unless set says otherwise.
func start(t *testing.T, set ...func(*Config)) *rig {
	t.Helper()
	r := &rig{t: t, clock: clockwork.NewFakeClock()}
	cfg := Config{Address: "127.0.0.1", InMemory: true, Clock: r.clock, Version: "test"}
	for _, s := range set {
		s(&cfg)
	}
	var err error
	if r.Server, err = New(cfg); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan error, 1)
	go func() { ended <- r.Run(ctx) }()
	stopped := false
	r.stop = func() error {
		if stopped {
			return nil
		}
		stopped = true
		cancel()
		return <-ended
	}
	r.conn = dial(t, r.Addr().String())
	t.Cleanup(func() {
		r.conn.Close()
		if err := r.stop(); err != nil {
			t.Errorf("Run: %v", err)
		}
	})
	return r
}

// raised waits until the server uses all that it knows: a history begins at the
// first level.
func (r *rig) raised() *rig {
	r.t.Helper()
	for until := time.Now().Add(20 * time.Second); ; time.Sleep(2 * time.Millisecond) {
		s, err := r.cluster().Status(soon(r.t), &pb.StatusRequest{})
		switch {
		case err != nil:
			r.t.Fatal(err)
		case machine.Level(s.GetLevel()) == machine.NewestLevel:
			return r
		case time.Now().After(until):
			r.t.Fatalf("level %d", s.GetLevel())
		}
	}
}

// durable makes a server keep its log in dir.
func durable(dir string) func(*Config) {
	return func(c *Config) { c.InMemory, c.DataDir = false, dir }
}

func dial(t *testing.T, address string, opts ...grpc.DialOption) *grpc.ClientConn {
	t.Helper()
	conn, err := grpc.NewClient("passthrough:///"+address,
		append(opts, grpc.WithTransportCredentials(insecure.NewCredentials()))...)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	return conn
}

// lossy is a connection to the server that cut can cut, as a network does.
func (r *rig) lossy() (conn *grpc.ClientConn, cut func()) {
	conns := make(chan net.Conn, 8)
	conn = dial(r.t, r.Addr().String(), grpc.WithContextDialer(func(ctx context.Context, address string) (net.Conn, error) {
		c, err := (&net.Dialer{}).DialContext(ctx, "tcp", address)
		if err == nil {
			conns <- c
		}
		return c, err
	}))
	return conn, func() { (<-conns).Close() }
}

// soon is a context for what is expected to happen at once.
func soon(t *testing.T) context.Context {
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
	t.Cleanup(cancel)
	return ctx
}

func span(d time.Duration) *durationpb.Duration { return durationpb.New(d) }

// acquire takes a lock with a lease of its own, at once.
func (r *rig) acquire(name string, ttl time.Duration) *pb.Hold {
	r.t.Helper()
	resp, err := r.locks().Acquire(soon(r.t), &pb.AcquireRequest{Names: []string{name}, Ttl: span(ttl), Owner: "holder"})
	if err != nil {
		r.t.Fatalf("acquire %s: %v", name, err)
	}
	return resp.GetHold()
}

type answer struct {
	grant *pb.Hold
	err   error
}

// queue sends a request that has to wait, and returns once it is in its queue.
func (r *rig) queue(ctx context.Context, locks pb.LockServiceClient, req *pb.AcquireRequest) <-chan answer {
	r.t.Helper()
	w := r.watch(req.GetNames()[0], 0)
	done := make(chan answer, 1)
	go func() {
		resp, err := locks.Acquire(ctx, req)
		done <- answer{resp.GetHold(), err}
	}()
	w.await(pb.Event_KIND_QUEUED)
	return done
}

func (r *rig) get(name string) *pb.Lock {
	r.t.Helper()
	resp, err := r.locks().Get(soon(r.t), &pb.GetRequest{Name: name})
	if err != nil {
		r.t.Fatalf("get %s: %v", name, err)
	}
	return resp.GetLock()
}

func (r *rig) live(name string, token uint64) bool {
	r.t.Helper()
	resp, err := r.locks().CheckToken(soon(r.t), &pb.CheckTokenRequest{Name: name, Token: token})
	if err != nil {
		r.t.Fatalf("check %s: %v", name, err)
	}
	return resp.GetLive()
}

// watcher follows locks.
type watcher struct {
	t       *testing.T
	stream  pb.LockService_WatchClient
	cancel  context.CancelFunc
	pending []*pb.Event
	at      uint64 // revision
}

// watch is in place when it returns.
func (r *rig) watch(prefix string, from uint64) *watcher {
	r.t.Helper()
	ctx, cancel := context.WithCancel(soon(r.t))
	stream, err := r.locks().Watch(ctx, &pb.WatchRequest{Prefix: prefix, FromRevision: from})
	if err != nil {
		r.t.Fatal(err)
	}
	first, err := stream.Recv()
	if err != nil {
		r.t.Fatalf("watch %q from %d: %v", prefix, from, err)
	}
	if len(first.GetEvents()) > 0 {
		r.t.Fatalf("the first answer has events: %v", first)
	}
	return &watcher{t: r.t, stream: stream, cancel: cancel, at: first.GetRevision()}
}

func (w *watcher) next() *pb.Event {
	w.t.Helper()
	for len(w.pending) == 0 {
		resp, err := w.stream.Recv()
		if err != nil {
			w.t.Fatalf("watch: %v", err)
		}
		w.pending, w.at = resp.GetEvents(), resp.GetRevision()
	}
	e := w.pending[0]
	w.pending = w.pending[1:]
	return e
}

// await reads on to the next event of a kind.
func (w *watcher) await(kind pb.Event_Kind) *pb.Event {
	w.t.Helper()
	for {
		if e := w.next(); e.GetKind() == kind {
			return e
		}
	}
}

// expect reads exactly these kinds.
func (w *watcher) expect(kinds ...pb.Event_Kind) (last *pb.Event) {
	w.t.Helper()
	for _, kind := range kinds {
		if last = w.next(); last.GetKind() != kind {
			w.t.Fatalf("event %v, want %v", last, kind)
		}
	}
	return last
}

// refused checks an error's code and reason, and returns its problem.
func refused(t *testing.T, err error, code codes.Code, reason string) *pb.Problem {
	t.Helper()
	s := status.Convert(err)
	var got string
	var problem *pb.Problem
	for _, d := range s.Details() {
		switch d := d.(type) {
		case *errdetails.ErrorInfo:
			got = d.GetReason()
		case *pb.Problem:
			problem = d
		}
	}
	if s.Code() != code || got != reason {
		t.Fatalf("refused with %v %s (%v), want %v %s", s.Code(), got, err, code, reason)
	}
	return problem
}

// errgroup waits for goroutines and keeps their first error.
type errgroup struct {
	group sync.WaitGroup
	once  sync.Once
	err   error
}

func (g *errgroup) run(fn func() error) {
	g.group.Add(1)
	go func() {
		defer g.group.Done()
		if err := fn(); err != nil {
			g.once.Do(func() { g.err = err })
		}
	}()
}

func (g *errgroup) wait() error {
	g.group.Wait()
	return g.err
}
