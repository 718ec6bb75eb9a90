package transport

import (
	"context"
	"net"
	"testing"
	"time"

	"go.uber.org/goleak"
	"golang.org/x/net/http2"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"

	"github.com/distlock/distlock/lease"
	pb "github.com/distlock/distlock/proto/distlock/v1"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// manager is a Manager whose methods a test gives; the others panic.
type manager struct {
	Manager
	acquire func(context.Context, lease.AcquireRequest) (lease.Grant, error)
	release func(context.Context, lease.ReleaseRequest) error
	grant   func(context.Context, lease.GrantLeaseRequest) (lease.LeaseInfo, error)
	lease   func(lease.ID) (lease.LeaseInfo, error)
	locks   func(ctx context.Context, after string, limit int) ([]lease.LockInfo, bool, error)
	keep    func([]lease.ID) ([]lease.KeepAlive, error)
}

func (m *manager) Acquire(ctx context.Context, r lease.AcquireRequest) (lease.Grant, error) {
	return m.acquire(ctx, r)
}

func (m *manager) Release(ctx context.Context, r lease.ReleaseRequest) error {
	return m.release(ctx, r)
}

func (m *manager) GrantLease(ctx context.Context, r lease.GrantLeaseRequest) (lease.LeaseInfo, error) {
	return m.grant(ctx, r)
}

func (m *manager) Lease(_ context.Context, id lease.ID) (lease.LeaseInfo, error) { return m.lease(id) }

func (m *manager) Locks(ctx context.Context, _, after string, limit int) ([]lease.LockInfo, bool, uint64, error) {
	list, more, err := m.locks(ctx, after, limit)
	return list, more, 7, err
}

func (m *manager) KeepAlive(_ context.Context, ids []lease.ID) ([]lease.KeepAlive, error) {
	return m.keep(ids)
}

func (m *manager) Status() lease.Status { return lease.Status{Leader: true, Term: 3} }

// rig is a served Server and a connection to it.
type rig struct {
	*Server
	address string
	conn    *grpc.ClientConn
}

func (r *rig) locks() pb.LockServiceClient   { return pb.NewLockServiceClient(r.conn) }
func (r *rig) leases() pb.LeaseServiceClient { return pb.NewLeaseServiceClient(r.conn) }

func serve(t *testing.T, cfg Config) *rig {
	t.Helper()
	if cfg.Node == nil {
		cfg.Node = func() Node { return Node{ID: "n1"} }
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	r := &rig{Server: NewServer(cfg), address: l.Addr().String()}
	served := make(chan error, 1)
	go func() { served <- r.Serve(l) }()
	r.conn = dial(t, r.address)
	t.Cleanup(func() {
		r.conn.Close()
		ctx, cancel := context.WithTimeout(context.Background(), time.Second)
		defer cancel()
		r.Stop(ctx)
		if err := <-served; err != nil {
			t.Errorf("Serve: %v", err)
		}
	})
	return r
}

func dial(t *testing.T, address string, opts ...grpc.DialOption) *grpc.ClientConn {
	t.Helper()
	conn, err := grpc.NewClient("passthrough:///"+address,
		append(opts, grpc.WithTransportCredentials(insecure.NewCredentials()))...)
	if err != nil {
		t.Fatal(err)
	}
	return conn
}

// frames begins to speak HTTP/2 with the server, by hand.
func (r *rig) frames(t *testing.T) *http2.Framer {
	t.Helper()
	conn, err := net.Dial("tcp", r.address)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	conn.SetDeadline(time.Now().Add(20 * time.Second))
	if _, err := conn.Write([]byte(http2.ClientPreface)); err != nil {
		t.Fatal(err)
	}
	framer := http2.NewFramer(conn, conn)
	if err := framer.WriteSettings(); err != nil {
		t.Fatal(err)
	}
	return framer
}

// soon is a context for a call that is expected to be answered at once.
func soon(t *testing.T) context.Context {
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
	t.Cleanup(cancel)
	return ctx
}
