package transport

import (
	"cmp"
	"context"
	"fmt"
	"net"
	"testing"
	"time"

	"go.uber.org/goleak"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"

	"github.com/distlock/distlock/lease"
	pb "github.com/distlock/distlock/proto/distlock/v1"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// manager is a Manager whose methods a test gives; the others panic.
type manager struct {
	Manager
	acquire func(context.Context, lease.AcquireRequest) (lease.Hold, error)
	release func(context.Context, lease.ReleaseRequest) error
	grant   func(context.Context, lease.GrantLeaseRequest) (lease.LeaseInfo, error)
	lease   func(lease.ID) (lease.LeaseInfo, error)
	locks   func(ctx context.Context, after string, limit int) ([]lease.LockInfo, bool, error)
	keep    func([]lease.ID) ([]lease.KeepAlive, error)
}

func (m *manager) Do(ctx context.Context, op lease.Operation) (r lease.Reply, err error) {
	switch op := op.(type) {
	case *lease.AcquireRequest:
		var g lease.Hold
		g, err = m.acquire(ctx, *op)
		r.Hold, r.TTL = &g.Hold, g.TTL
	case *lease.ReleaseRequest:
		err = m.release(ctx, *op)
	case *lease.GrantLeaseRequest:
		var info lease.LeaseInfo
		info, err = m.grant(ctx, *op)
		r.Lease, r.TTL = info.ID, info.Remaining
	case *lease.LeaseRequest:
		var info lease.LeaseInfo
		info, err = m.lease(op.Lease)
		r.Shown = &info
	case *lease.KeepAliveRequest:
		r.KeptAlive = &lease.KeptAlive{}
		r.KeptAlive.Leases, err = m.keep(op.Leases)
	default:
		panic(fmt.Sprintf("%T", op))
	}
	return r, err
}

func (m *manager) Locks(ctx context.Context, _, after string, limit int) ([]lease.LockInfo, bool, uint64, error) {
	list, more, err := m.locks(ctx, after, limit)
	return list, more, 7, err
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
	return serveWith(t, cfg, func(*Server) {})
}

// serveWith serves with other bounds.
func serveWith(t *testing.T, cfg Config, bounds func(*Server)) *rig {
	t.Helper()
	if cfg.Node == nil {
		cfg.Node = func() Node { return Node{ID: "n1"} }
	}
	cfg.MaxMessageBytes = cmp.Or(cfg.MaxMessageBytes, 1<<20)
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	r := &rig{Server: NewServer(cfg), address: l.Addr().String()}
	bounds(r.Server)
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

// soon is a context for a call that is expected to be answered at once.
func soon(t *testing.T) context.Context {
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
	t.Cleanup(cancel)
	return ctx
}
