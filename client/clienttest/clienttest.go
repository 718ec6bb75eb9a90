// Package clienttest runs a real distlock server inside a test, on a fake
// clock: leases expire when the test says so, renewals can be paused, and the
// connection can be cut.
package clienttest

import (
	"context"
	"errors"
	"net"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/jonboulle/clockwork"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"

	"github.com/distlock/distlock/client"
	"github.com/distlock/distlock/internal/server"
	pb "github.com/distlock/distlock/proto/distlock/v1"
)

// Server is a distlock server in this process. Its methods may be called from
// any goroutine.
type Server struct {
	// Endpoint is where it listens, on the loopback interface.
	Endpoint string
	// Clock is the server's, and that of the clients it makes. See Advance.
	Clock *clockwork.FakeClock

	mu     sync.Mutex
	paused bool
	cut    bool
	conns  map[net.Conn]struct{}
}

// Start runs a server, in memory, until the test ends.
func Start(t testing.TB) *Server {
	t.Helper()
	clock := clockwork.NewFakeClock()
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	srv, err := server.New(server.Config{Listener: listener, InMemory: true, Clock: clock, DrainTimeout: time.Second})
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan error, 1)
	go func() { ended <- srv.Run(ctx) }()
	t.Cleanup(func() {
		cancel()
		if err := <-ended; err != nil {
			t.Error(err)
		}
	})
	return &Server{Endpoint: listener.Addr().String(), Clock: clock, conns: make(map[net.Conn]struct{})}
}

// Client returns a client of the server on its clock, closed when the test
// ends. Only clients made here are subject to PauseRenewals and Cut.
func (s *Server) Client(t testing.TB, opts ...client.Option) *client.Client {
	t.Helper()
	c, err := client.New([]string{s.Endpoint}, append([]client.Option{
		client.WithClock(s.Clock), client.WithCallTimeout(5 * time.Second),
		client.WithDialOptions(grpc.WithContextDialer(s.dial),
			grpc.WithUnaryInterceptor(s.intercept), grpc.WithStreamInterceptor(s.interceptStream)),
	}, opts...)...)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	return c
}

// Advance moves the clock by d in steps small enough that nobody sleeps
// through a renewal, and lets everybody act after each.
func (s *Server) Advance(d time.Duration) {
	const step = 50 * time.Millisecond
	for ; d > 0; d -= step {
		s.Clock.Advance(min(d, step))
		time.Sleep(2 * time.Millisecond) // real calls over a real connection answer meanwhile
	}
}

// PauseRenewals makes every renewal of the server's clients fail, as if the
// network swallowed it, until ResumeRenewals.
func (s *Server) PauseRenewals() { s.set(func() { s.paused = true }) }

// ResumeRenewals ends PauseRenewals.
func (s *Server) ResumeRenewals() { s.set(func() { s.paused = false }) }

// Cut breaks the connections of the server's clients and refuses new ones,
// until Restore.
func (s *Server) Cut() {
	s.set(func() {
		s.cut = true
		for conn := range s.conns {
			conn.Close()
		}
		clear(s.conns)
	})
}

// Restore ends Cut.
func (s *Server) Restore() { s.set(func() { s.cut = false }) }

func (s *Server) set(fn func()) {
	s.mu.Lock()
	defer s.mu.Unlock()
	fn()
}

func (s *Server) dial(ctx context.Context, address string) (net.Conn, error) {
	s.mu.Lock()
	cut := s.cut
	s.mu.Unlock()
	if cut {
		return nil, errors.New("clienttest: the connection is cut")
	}
	conn, err := (&net.Dialer{}).DialContext(ctx, "tcp", address)
	if err != nil {
		return nil, err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.cut {
		conn.Close()
		return nil, errors.New("clienttest: the connection is cut")
	}
	s.conns[conn] = struct{}{}
	return conn, nil
}

func (s *Server) isPaused() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.paused
}

func (s *Server) intercept(ctx context.Context, method string, req, reply any, cc *grpc.ClientConn, invoke grpc.UnaryInvoker, opts ...grpc.CallOption) error {
	if s.isPaused() && strings.HasSuffix(method, "/KeepAlive") {
		return status.Error(codes.Unavailable, pausedMessage)
	}
	return invoke(ctx, method, req, reply, cc, opts...)
}

const pausedMessage = "clienttest: renewals are paused"

func (s *Server) interceptStream(ctx context.Context, desc *grpc.StreamDesc, cc *grpc.ClientConn, method string, open grpc.Streamer, opts ...grpc.CallOption) (grpc.ClientStream, error) {
	stream, err := open(ctx, desc, cc, method, opts...)
	if err != nil || !strings.HasSuffix(method, "/Multiplex") {
		return stream, err
	}
	p := &pausable{ClientStream: stream, server: s, in: make(chan received)}
	go p.receive()
	return p, nil
}

// pausable answers the renewals on a stream itself while they are paused.
type pausable struct {
	grpc.ClientStream
	server *Server
	in     chan received // from the server, or made up
}

type received struct {
	msg *pb.MultiplexResponse
	err error
}

// SendMsg implements grpc.ClientStream.
func (p *pausable) SendMsg(m any) error {
	if msg, ok := m.(*pb.MultiplexRequest); ok && p.server.isPaused() {
		out := &pb.MultiplexRequest{}
		failed := &pb.MultiplexResponse{}
		for _, op := range msg.GetOperations() {
			if op.GetKeepAlive() == nil {
				out.Operations = append(out.Operations, op)
				continue
			}
			failed.Answers = append(failed.Answers, &pb.Answer{Id: op.GetId(), Result: &pb.Answer_Failure{
				Failure: &pb.Failure{Code: int32(codes.Unavailable), Message: pausedMessage},
			}})
		}
		if len(failed.Answers) > 0 {
			select {
			case p.in <- received{msg: failed}:
			case <-p.Context().Done():
			}
		}
		m = out
	}
	return p.ClientStream.SendMsg(m)
}

// receive passes on what the server sends, until the stream ends.
func (p *pausable) receive() {
	for {
		r := received{msg: &pb.MultiplexResponse{}}
		r.err = p.ClientStream.RecvMsg(r.msg)
		select {
		case p.in <- r:
		case <-p.Context().Done():
			return
		}
		if r.err != nil {
			return
		}
	}
}

// RecvMsg implements grpc.ClientStream.
func (p *pausable) RecvMsg(m any) error {
	select {
	case r := <-p.in:
		if r.err != nil {
			return r.err
		}
		proto.Merge(m.(proto.Message), r.msg)
		return nil
	case <-p.Context().Done():
		return status.FromContextError(p.Context().Err()).Err()
	}
}
