// Package transport is the gRPC server: it validates, converts, and maps
// errors. What locks mean is the manager's business.
//
// It is the server's, and no API: names change as they need to. Programs that use
// distlock import client, fence, or proto.
package transport

import (
	"cmp"
	"context"
	"errors"
	"io"
	"math"
	"net"
	"runtime/debug"
	"sync"
	"time"

	"go.uber.org/zap"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/encoding"
	"google.golang.org/grpc/health"
	healthpb "google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/keepalive"
	"google.golang.org/grpc/reflection"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"

	"github.com/distlock/distlock/internal/bound"
	"github.com/distlock/distlock/lease"
	original "github.com/distlock/distlock/proto/distlock"
	pb "github.com/distlock/distlock/proto/distlock/v1"
)

// Manager is what the transport asks of the lease manager. Errors are those of
// package lease; all methods are safe for concurrent use.
type Manager interface {
	Do(context.Context, lease.Operation) (lease.Reply, error)
	NewPort(bound int, share *lease.Share) *lease.Port
	Leases(ctx context.Context, after lease.ID, limit int) ([]lease.LeaseInfo, bool, error)
	Locks(ctx context.Context, prefix, after string, limit int) ([]lease.LockInfo, bool, uint64, error)
	StaleLock(name string) (lease.LockInfo, uint64, error)
	StaleLocks(prefix, after string, limit int) ([]lease.LockInfo, bool, uint64)
	StaleLease(lease.ID) (lease.LeaseInfo, error)
	StaleLeases(after lease.ID, limit int) ([]lease.LeaseInfo, bool)
	Watch(prefix string, from uint64) (*lease.Watcher, error)
	Status() lease.Status
}

// Cluster is what the transport asks of the cluster that keeps the log. All
// methods are safe for concurrent use.
type Cluster interface {
	// Leader waits until it is known who leads, and returns a connection on
	// which the leader takes forwarded calls, nil when this node leads, and a
	// context that ends once it is not known to lead any more. Each lane has a
	// connection of its own.
	Leader(ctx context.Context, lane int) (grpc.ClientConnInterface, context.Context, error)
	Members() (list []lease.Member, leader string, term uint64)
	AddMember(id, peerAddress, clusterID string) (string, error)
	PromoteMember(id string) error
	RemoveMember(id string) error
	TransferLeadership(id string) (string, error)
	// Backup writes a consistent copy of everything.
	Backup(to io.Writer) error
}

// Node is what a node tells of itself.
type Node struct {
	ID, ClusterID, Version string
	ClientAddress          string
	InMemory               bool
	StartedAt              time.Time
	Restored               *lease.Restored // nil for a history with no backup before it
}

// Config configures a Server. Manager, Node and MaxMessageBytes are required.
type Config struct {
	Manager Manager
	Cluster Cluster // nil where nothing is kept on disk
	Node    func() Node
	// Leaderless bounds how long a call waits for somebody to lead: a few
	// elections; 0 is 1s.
	Leaderless time.Duration
	Logger     *zap.Logger
	// Workers bounds the requests being worked on at once; 0 sets no bound. A
	// request that is parked in a queue or waits for the log is not being
	// worked on.
	Workers int
	// MaxMessageBytes, above 0, bounds one request. A longer one is refused with
	// INVALID_ARGUMENT, one of more than four times that by gRPC itself.
	MaxMessageBytes int
	// Refused is told the reason of each request answered with an error; nil
	// for nobody. It must not block.
	Refused func(reason string)
	// MaxStreams bounds the calls under way on one connection; 0 is 10,000.
	MaxStreams uint32
	// MaxConnections bounds the connections of clients; 0 sets no bound. Calls on
	// more are answered RESOURCE_EXHAUSTED.
	MaxConnections int
	// MaxCalls bounds the calls under way, streams and waits among them, of all
	// clients; 0 sets no bound. More are answered RESOURCE_EXHAUSTED, but for
	// those that renew or give back.
	MaxCalls int
}

// Server is the gRPC server with all services.
type Server struct {
	grpc     *grpc.Server
	health   *health.Server
	forward  *forwarder
	most     int       // connections of clients, 0 for no bound
	refusing *refusing // answers those for which there is no room
	unread   *unread
	sources  *sources
	calls    *calls
	keeping  sync.Once
	seen     func(*conn)     // of tests: each connection
	stopping context.Context // ends when Stop begins
	stop     context.CancelFunc
}

// readTimes is how many times the bound a request may have and still be read, so that
// it can be answered what is wrong with it.
const readTimes = 4

// streamWindow is what a client may send of a call before the server reads it; of a
// large message gRPC lets it send all.
const streamWindow = 64 << 10

// NewServer returns a server. Serve starts it.
func NewServer(cfg Config) *Server {
	if cfg.Logger == nil {
		cfg.Logger = zap.NewNop()
	}
	if cfg.Refused == nil {
		cfg.Refused = func(string) {}
	}
	if cfg.MaxStreams == 0 {
		cfg.MaxStreams = 10_000
	}
	work, calls := newWorkers(cfg.Workers), &calls{
		most: int64(cmp.Or(cfg.MaxCalls, math.MaxInt)), each: max(maxEach, 2*readTimes*int64(cfg.MaxMessageBytes)), inAll: maxKept,
		conns: make(map[*conn]struct{}), refused: cfg.Refused, logger: cfg.Logger,
	}
	stopping, stop := context.WithCancel(context.Background())
	forward := &forwarder{
		cluster: cfg.Cluster, m: cfg.Manager, stopping: stopping, work: work, leaderless: cmp.Or(cfg.Leaderless, time.Second),
	}
	s := &Server{
		stopping: stopping, stop: stop, forward: forward,
		most: cfg.MaxConnections, refusing: newRefusing(cfg.MaxConnections, cfg.Refused), unread: newUnread(cfg.Logger, cfg.Refused, calls.look), sources: newSources(), calls: calls,
		grpc: grpc.NewServer(
			grpc.ForceServerCodecV2(codec{encoding.GetCodecV2("proto"), cfg.MaxMessageBytes}),
			grpc.MaxRecvMsgSize(readTimes*cfg.MaxMessageBytes),
			grpc.WaitForHandlers(true),
			grpc.NumStreamWorkers(64), // a call's goroutine finds its stack grown
			grpc.MaxConcurrentStreams(cfg.MaxStreams),
			grpc.InTapHandle(calls.tap),
			grpc.ReadBufferSize(readBuffer), // kept by idle connections too
			// Windows of a fixed size: gRPC finds others by a ping each way with
			// every message, and lets a connection fill up to 16 MiB.
			grpc.StaticStreamWindowSize(streamWindow),
			grpc.StaticConnWindowSize(512<<10),
			grpc.MaxHeaderListSize(16<<10),
			grpc.ConnectionTimeout(20*time.Second),
			grpc.KeepaliveEnforcementPolicy(keepalive.EnforcementPolicy{MinTime: 5 * time.Second, PermitWithoutStream: true}),
			grpc.KeepaliveParams(keepalive.ServerParameters{Time: 30 * time.Second, Timeout: 10 * time.Second}),
			grpc.ChainUnaryInterceptor(calls.unary, unary(cfg.Logger, work, cfg.Refused), forward.unary),
			grpc.ChainStreamInterceptor(calls.stream, streaming(cfg.Logger, stopping)),
		),
		health: health.NewServer(),
	}
	d := door{cfg.Manager, work}
	cluster := &clusterID{node: cfg.Node}
	s.grpc.RegisterService(decoding(&pb.LockService_ServiceDesc), &lockService{door: d})
	s.grpc.RegisterService(decoding(&pb.LeaseService_ServiceDesc), &leaseService{door: d, cluster: cluster})
	s.grpc.RegisterService(&pb.StreamService_ServiceDesc, &streamService{m: cfg.Manager, work: newWorkers(cfg.Workers), logger: cfg.Logger, refused: cfg.Refused, cluster: cluster})
	s.grpc.RegisterService(decoding(&pb.ClusterService_ServiceDesc), &clusterService{m: cfg.Manager, node: cfg.Node, cluster: cfg.Cluster, work: work})
	s.grpc.RegisterService(decoding(&original.Distlock_ServiceDesc), &originalService{door: d})
	healthpb.RegisterHealthServer(s.grpc, s.health)
	reflection.Register(s.grpc)
	s.SetServing(false)
	return s
}

// SetServing is what the health service answers, for the server as a whole
// ("") and for each service.
func (s *Server) SetServing(serving bool) {
	state := healthpb.HealthCheckResponse_NOT_SERVING
	if serving {
		state = healthpb.HealthCheckResponse_SERVING
	}
	for _, service := range []string{
		"", pb.LockService_ServiceDesc.ServiceName, pb.LeaseService_ServiceDesc.ServiceName, pb.StreamService_ServiceDesc.ServiceName,
		pb.ClusterService_ServiceDesc.ServiceName, original.Distlock_ServiceDesc.ServiceName,
	} {
		s.health.SetServingStatus(service, state)
	}
}

// Serve accepts connections of clients until Stop; it returns nil then.
func (s *Server) Serve(l net.Listener) error {
	s.keeping.Do(s.unread.begin)
	if s.most > 0 {
		l = bound.Listen(l, s.most, s.refusing.conns.Put)
		refused := make(chan struct{})
		go func() {
			defer close(refused)
			s.refusing.server.Serve(s.refusing.conns)
		}()
		defer func() {
			s.refusing.server.Stop()
			<-refused
		}()
	}
	return s.grpc.Serve(listener{l, false, s})
}

// ServePeers does the same for connections on which other members forward
// calls of their clients.
func (s *Server) ServePeers(l net.Listener) error {
	s.keeping.Do(s.unread.begin)
	return s.grpc.Serve(listener{l, true, s})
}

// Stop ends the streams, which have no end of their own, lets calls under way
// finish for as long as ctx allows, then cuts them. No handler runs any more
// when it returns.
func (s *Server) Stop(ctx context.Context) {
	s.health.Shutdown()
	s.stop()
	done := make(chan struct{})
	go func() {
		s.grpc.GracefulStop()
		close(done)
	}()
	select {
	case <-done:
	case <-ctx.Done():
		s.grpc.Stop()
		<-done
	}
	s.forward.settling.Wait()
	s.keeping.Do(func() {}) // not any more
	s.unread.end()
}

// unary maps errors, keeps a panic in one call from ending the server, and
// holds the bound of workers.
func unary(logger *zap.Logger, work workers, refused func(string)) grpc.UnaryServerInterceptor {
	return func(ctx context.Context, req any, info *grpc.UnaryServerInfo, handler grpc.UnaryHandler) (resp any, err error) {
		defer rescue(logger, info.FullMethod, &err)
		if info.FullMethod == healthpb.Health_Check_FullMethodName {
			return handler(ctx, req) // a busy server is there all the same
		}
		work := work
		if renews(req) {
			work = nil
		}
		out := &sending{box: boxOf(ctx)}
		defer out.done()
		for bytes := mayTake(req); ; {
			if bytes > 0 {
				again := rest(ctx)
				err := out.reserve(ctx, bytes)
				again()
				if err != nil {
					return nil, toStatus(err)
				}
			}
			fits := true
			resp, err := worked(ctx, req, work, refused, func(ctx context.Context, req any) (any, error) {
				resp, err := handler(ctx, req)
				if err == nil && bytes == 0 {
					err = out.box.full()
				}
				if err != nil {
					return nil, err
				}
				if m, ok := resp.(proto.Message); ok && bytes > 0 {
					if n := int64(proto.Size(m)); n > bytes && n > smallAnswer && !out.grow(n) {
						bytes, fits = n, false // made again when there is room
						return nil, nil
					}
				}
				return out.encode(resp)
			})
			if fits {
				return resp, err
			}
		}
	}
}

func worked(ctx context.Context, req any, work workers, refused func(string), handler grpc.UnaryHandler) (any, error) {
	if err := work.enter(ctx); err != nil {
		return nil, toStatus(err)
	}
	defer work.leave()
	if ctx.Err() != nil { // its turn came too late
		return nil, toStatus(ctx.Err())
	}
	resp, err := handler(ctx, req)
	if err != nil {
		err = asStatus(err)
		refused(reasonOf(err))
		return nil, err
	}
	return resp, nil
}

// streaming does the same for streams, and ends them when the server stops.
// Streams occupy no worker: all but a moment of their time they wait.
func streaming(logger *zap.Logger, stopping context.Context) grpc.StreamServerInterceptor {
	return func(srv any, in grpc.ServerStream, info *grpc.StreamServerInfo, handler grpc.StreamHandler) (err error) {
		defer rescue(logger, info.FullMethod, &err)
		ctx, cancel := context.WithCancelCause(in.Context())
		defer cancel(nil)
		defer context.AfterFunc(stopping, func() { cancel(lease.ErrStopping) })()
		out := &sending{box: boxOf(in.Context())}
		defer out.done()
		call, _ := ctx.Value(begunKey{}).(*begun)
		err = handler(srv, &stream{in, context.WithValue(ctx, sendingKey{}, out), out, call})
		switch {
		case err == nil:
			return nil
		case errors.Is(context.Cause(ctx), lease.ErrStopping):
			return toStatus(lease.ErrStopping)
		}
		return asStatus(err)
	}
}

// asStatus leaves an error that is a status already (the original's, gRPC's
// own) as it is.
func asStatus(err error) error {
	if _, ok := status.FromError(err); ok {
		return err
	}
	return toStatus(err)
}

func rescue(logger *zap.Logger, method string, err *error) {
	if p := recover(); p != nil {
		logger.Error("a call panicked", zap.String("method", method), zap.Any("panic", p), zap.ByteString("stack", debug.Stack()))
		*err = status.Error(codes.Internal, "the server failed to handle the call; its log says more")
	}
}

// workers bounds how many requests are worked on at once; nil sets no bound, and is
// for renewals: they go before everything else. Streams have workers of their own,
// for renewals come on them too.
type workers chan struct{}

func renews(req any) bool {
	_, ok := req.(*pb.KeepAliveRequest)
	return ok
}

func newWorkers(n int) workers {
	if n <= 0 {
		return nil
	}
	return make(workers, n)
}

func (w workers) enter(ctx context.Context) error {
	if w == nil {
		return nil
	}
	select {
	case w <- struct{}{}:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

func (w workers) leave() {
	if w != nil {
		<-w
	}
}

// yield gives the worker back while fn waits for the manager: in a queue
// or for the log. It is taken again to finish the request.
func (w workers) yield(ctx context.Context, fn func()) {
	defer rest(ctx)()
	w.leave()
	defer func() {
		if w != nil {
			w <- struct{}{} // not bounded by a context: leave follows in any case
		}
	}()
	fn()
}

// detachable returns a context that ends with ctx, with the cause ErrDetached
// when ctx ends because the client's connection was lost rather than because
// the client cancelled the call, as far as that can be told. It matters only to
// clients that do not count their attempts.
func detachable(ctx context.Context) (context.Context, context.CancelFunc) {
	out, cancel := context.WithCancelCause(context.WithoutCancel(ctx))
	stop := context.AfterFunc(ctx, func() { cancel(endOf(ctx)) })
	return out, func() { stop(); cancel(nil) }
}
