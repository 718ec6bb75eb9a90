// Package server puts a distlock server together: log, manager, transport.
// The command and every end-to-end test use the same assembly.
package server

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"strconv"
	"sync"
	"syscall"
	"time"

	"go.uber.org/zap"

	"github.com/distlock/distlock/internal/bound"
	"github.com/distlock/distlock/internal/metrics"
	"github.com/distlock/distlock/internal/replica"
	"github.com/distlock/distlock/lease"
	"github.com/distlock/distlock/transport"
)

// Server is a distlock server. New makes it, Run runs it once.
type Server struct {
	cfg       Config
	listener  net.Listener
	log       lease.Log
	replica   *replica.Replica // nil in memory
	manager   *lease.Manager
	transport *transport.Server
	started   time.Time
	files     files
	kind      kind

	metrics         *metrics.Metrics // nil without an address
	metricsListener net.Listener
}

// New opens the log and the port. Errors are one line each, fit for a user;
// *FieldError for what is wrong with cfg.
func New(cfg Config) (*Server, error) {
	if err := cfg.normalize(); err != nil {
		return nil, err
	}
	s := &Server{cfg: cfg, listener: cfg.Listener, started: cfg.Clock.Now(), files: shareFiles()}
	if room := s.files.connections; cfg.MaxConnections > room {
		return nil, fmt.Errorf("the limit of open files leaves room for %d connections of clients, and %d are asked for: raise it (ulimit -n), or give a lower --max-connections", room, cfg.MaxConnections)
	}
	if err := s.listen(); err != nil {
		return nil, err
	}
	if err := s.listenMetrics(); err != nil {
		s.listener.Close()
		return nil, err
	}
	if err := s.open(); err != nil {
		return nil, errors.Join(err, s.closeListeners())
	}
	return s, nil
}

func (s *Server) listen() error {
	if s.listener != nil {
		return nil
	}
	host := s.cfg.Address
	if len(host) > 1 && host[0] == '[' && host[len(host)-1] == ']' {
		host = host[1 : len(host)-1]
	}
	address := net.JoinHostPort(host, strconv.Itoa(s.cfg.Port))
	if host == "::" {
		host = "" // the same, and also right where there is no IPv6
	}
	l, err := net.Listen("tcp", net.JoinHostPort(host, strconv.Itoa(s.cfg.Port)))
	switch {
	case errors.Is(err, syscall.EADDRINUSE):
		return fmt.Errorf("%s is in use: another server listens there; choose another with --port", address)
	case err != nil:
		var op *net.OpError
		if errors.As(err, &op) { // what it repeats is left out
			err = op.Err
		}
		return fmt.Errorf("cannot listen on %s: %w", address, err)
	}
	s.listener = l
	return nil
}

func (s *Server) listenMetrics() error {
	if s.cfg.MetricsAddress == "" {
		return nil
	}
	l, err := net.Listen("tcp", s.cfg.MetricsAddress)
	if err != nil {
		return fmt.Errorf("metrics: %w", err)
	}
	s.metricsListener = bound.Listen(l, s.files.metrics, nil)
	s.metrics = metrics.New(s.cfg.Version, s.status)
	return nil
}

func (s *Server) closeListeners() error {
	err := s.listener.Close()
	if s.metricsListener != nil {
		err = errors.Join(err, s.metricsListener.Close())
	}
	return err
}

// status is for the metrics.
func (s *Server) status() metrics.Status {
	st := s.manager.Status()
	var differing, failed int
	if s.replica != nil {
		differing, failed = s.replica.Differing(), s.replica.FailedSnapshots()
	}
	return metrics.Status{
		Differing: differing, FailedSnapshots: failed,
		Leader: st.Leader, Term: st.Term, Revision: st.Revision, LastToken: st.LastToken,
		Leases: st.Leases, Locks: st.Locks, Holds: st.Holds, Waiters: st.Waiters, Pending: s.manager.Pending(),
	}
}

func (s *Server) open() error {
	var base uint64
	if s.cfg.InMemory {
		// Nothing remembers the counters: a clock lets them rise all the same.
		base = uint64(max(s.cfg.Clock.Now().UnixMicro(), 0))
	}
	store := lease.NewStore(base)
	var synced func(time.Duration)
	var refused func(string)
	var observer lease.Observer
	if s.metrics != nil {
		synced, refused, observer = s.metrics.Synced, s.metrics.Refused, s.metrics
	}
	if s.cfg.InMemory {
		s.log = lease.NewMemoryLog(store)
	} else {
		r, err := replica.Open(replica.Config{
			MaxStrangers: s.files.strangers, Dir: s.cfg.DataDir, Store: store, Logger: s.cfg.Logger, Version: s.cfg.Version, SnapshotBytes: s.cfg.SnapshotBytes,
			NodeID: s.cfg.NodeID, PeerAddress: s.cfg.PeerAddress, PeerListen: s.cfg.PeerListen,
			InitialCluster: s.cfg.InitialCluster, Join: s.cfg.Join != "", PeerTLS: s.cfg.PeerTLS,
			ElectionTimeout: s.cfg.ElectionTimeout, ClientAddress: s.clientAddress(), Synced: synced,
		})
		if err != nil {
			return err
		}
		if err := r.ForeignPeers(); err != nil {
			return errors.Join(err, r.Close())
		}
		s.log, s.replica = r, r
	}
	manager, err := lease.New(lease.Config{
		Clock: s.cfg.Clock, Log: s.log, Store: store, Bounds: s.cfg.Bounds, Logger: s.cfg.Logger,
		Observer: observer,
	})
	if err != nil {
		return errors.Join(err, s.log.Close())
	}
	s.manager = manager
	config := transport.Config{
		Manager: manager, Node: s.node, Logger: s.cfg.Logger,
		MaxConnections: cmp.Or(s.cfg.MaxConnections, s.files.connections), MaxCalls: s.cfg.MaxCalls, Workers: s.cfg.MaxWorkers, MaxMessageBytes: s.cfg.MaxMessageBytes, Refused: refused,
	}
	if s.replica != nil {
		config.Cluster = s.replica
		config.Leaderless = max(time.Second, 5*s.cfg.ElectionTimeout)
	}
	s.transport = transport.NewServer(config)
	s.kind = lone{s}
	if s.cfg.PeerAddress != "" {
		s.kind = member{s}
	}
	return nil
}

// serve serves clients until the transport stops.
func (s *Server) serve() error {
	if err := s.transport.Serve(s.listener); err != nil {
		return fmt.Errorf("serving on %s ended: %w", s.Addr(), err)
	}
	return nil
}

// clientAddress is where clients reach this server.
func (s *Server) clientAddress() string {
	if s.cfg.AdvertiseAddress != "" {
		return s.cfg.AdvertiseAddress
	}
	host, port, err := net.SplitHostPort(s.Addr().String())
	if err != nil {
		return s.Addr().String()
	}
	if ip := net.ParseIP(host); ip != nil && ip.IsUnspecified() && s.cfg.PeerAddress != "" {
		if peer, _, err := net.SplitHostPort(s.cfg.PeerAddress); err == nil {
			host = peer
		}
	}
	return net.JoinHostPort(host, port)
}

func (s *Server) node() transport.Node {
	n := transport.Node{
		ID: "n1", Version: s.cfg.Version, ClientAddress: s.clientAddress(), InMemory: s.cfg.InMemory, StartedAt: s.started,
	}
	if s.replica != nil {
		n.ID, n.ClusterID = s.replica.NodeID(), s.replica.ClusterID()
		n.Restored = s.replica.Restored()
	}
	return n
}

// closeLog waits for a disk that may hang as long as the drain lasts, and for one
// that works a little longer.
func (s *Server) closeLog(bounded context.Context) error {
	if s.replica == nil {
		return s.log.Close()
	}
	deadline, _ := bounded.Deadline()
	return s.replica.CloseWithin(max(time.Until(deadline), leastClose))
}

const leastClose = 500 * time.Millisecond

// kind is a lone server or a member of a cluster: what each does in its own way.
type kind interface {
	// start starts the parts that serve; they end with loop. Once stopping has
	// ended, clients are to be told nothing good of this node.
	start(all *parts, stopping, loop context.Context)
	// handOver hands over to another, where there is one.
	handOver(context.Context)
	// fields are for the log's first line.
	fields() []zap.Field
}

// lone is a server that leads as soon as its log has been read.
type lone struct{ *Server }

func (s lone) start(all *parts, _, loop context.Context) {
	all.start(func() error {
		// Calls that arrive before the log leads wait in the listen queue.
		select {
		case <-s.manager.Ready():
			s.transport.SetServing(true)
		case <-loop.Done():
		}
		return s.serve()
	})
}

func (lone) handOver(context.Context) {}

func (lone) fields() []zap.Field { return nil }

// Addr is where the server listens.
func (s *Server) Addr() net.Addr { return s.listener.Addr() }

// Run serves until ctx ends, then drains and returns nil. When the log fails
// it returns why. Whatever happens, the log is closed and the port free when
// it returns.
func (s *Server) Run(ctx context.Context) error {
	s.announce()
	loop, stopLoop := context.WithCancel(context.WithoutCancel(ctx))
	defer stopLoop()
	stopping, stop := context.WithCancel(ctx) // what clients are told of this node
	defer stop()

	all := &parts{failed: make(chan error, 1)}
	web := &http.Server{ReadHeaderTimeout: 10 * time.Second}
	if s.metrics != nil {
		web.Handler = s.metrics.Handler(s.cfg.Pprof)
		all.start(func() error { web.Serve(s.metricsListener); return nil })
	}
	all.start(func() error {
		err := s.manager.Run(loop)
		if err == nil && loop.Err() == nil {
			err = errors.New("the log was closed")
		}
		return err
	})
	s.kind.start(all, stopping, loop)

	var err error
	select {
	case <-ctx.Done():
	case err = <-all.failed:
	}
	stop()
	bounded, cancel := context.WithTimeout(context.Background(), s.cfg.DrainTimeout)
	defer cancel()
	s.transport.SetServing(false)
	if err == nil {
		s.cfg.Logger.Info("stopping: calls under way may finish", zap.Duration("within", s.cfg.DrainTimeout))
		s.kind.handOver(bounded)
		s.manager.Drain()
	}
	s.transport.Stop(bounded)
	stopLoop()
	web.Close()
	all.group.Wait()
	s.listener.Close()
	if closeErr := s.closeLog(bounded); closeErr != nil && err == nil {
		err = closeErr
	}
	if err == nil {
		s.cfg.Logger.Info("stopped")
	}
	return err
}

// parts run side by side, each on a goroutine of its own.
type parts struct {
	group  sync.WaitGroup
	failed chan error // buffered, one: the first error
}

// start runs a part. It returns nil when it was told to end, or has done what it was
// for; an error ends all.
func (p *parts) start(run func() error) {
	p.group.Go(func() {
		if err := run(); err != nil {
			select {
			case p.failed <- err:
			default:
			}
		}
	})
}

// announce logs what serves where.
func (s *Server) announce() {
	durability, dir := "every acknowledged change is synced to disk", s.cfg.DataDir
	if s.cfg.InMemory {
		durability, dir = "in memory: a restart forgets everything but the order of tokens", ""
	}
	fields := []zap.Field{zap.Stringer("address", s.Addr()), zap.String("dataDir", dir),
		zap.String("durability", durability), zap.String("version", s.cfg.Version)}
	fields = append(fields, s.kind.fields()...)
	if s.metrics != nil {
		fields = append(fields, zap.Stringer("metrics", s.MetricsAddr()))
	}
	s.cfg.Logger.Info("distlock serves", fields...)
}

// MetricsAddr is where metrics are served; nil when they are not.
func (s *Server) MetricsAddr() net.Addr {
	if s.metricsListener == nil {
		return nil
	}
	return s.metricsListener.Addr()
}

// Close gives up a server that was never run.
func (s *Server) Close() error {
	s.transport.Stop(context.Background()) // nothing is under way
	return errors.Join(s.closeListeners(), s.log.Close())
}
