package bench

import (
	"bufio"
	"context"
	"fmt"
	"io"
	"net"
	"os/exec"
	"strings"
	"sync"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"

	pb "github.com/distlock/distlock/proto/distlock/v1"
)

// echoServer answers at once and does nothing: what gRPC itself costs, with
// the messages that an acquisition has.
type echoServer struct {
	pb.UnimplementedLockServiceServer
	pb.UnimplementedStreamServiceServer
}

func (echoServer) Release(context.Context, *pb.ReleaseRequest) (*pb.ReleaseResponse, error) {
	return &pb.ReleaseResponse{}, nil
}

func (echoServer) Multiplex(s grpc.BidiStreamingServer[pb.MultiplexRequest, pb.MultiplexResponse]) error {
	done := &pb.Answer_Release{Release: &pb.ReleaseResponse{}}
	for {
		msg, err := s.Recv()
		if err != nil {
			return err
		}
		out := &pb.MultiplexResponse{Answers: make([]*pb.Answer, len(msg.GetOperations()))}
		for i, op := range msg.GetOperations() {
			out.Answers[i] = &pb.Answer{Id: op.GetId(), Result: done}
		}
		if err := s.Send(out); err != nil {
			return err
		}
	}
}

// ServeEcho serves the echo on a free port, which it writes to out, until ctx
// ends.
func ServeEcho(ctx context.Context, out io.Writer) error {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return err
	}
	s := grpc.NewServer()
	pb.RegisterLockServiceServer(s, echoServer{})
	pb.RegisterStreamServiceServer(s, echoServer{})
	defer context.AfterFunc(ctx, s.Stop)()
	if _, err := fmt.Fprintln(out, l.Addr()); err != nil {
		return err
	}
	return s.Serve(l)
}

// startEcho starts a process that serves the echo, as a server would be one.
func (b *bench) startEcho(ctx context.Context) (address string, err error) {
	cmd := exec.CommandContext(ctx, b.Echo[0], b.Echo[1:]...)
	out, err := cmd.StdoutPipe()
	if err != nil {
		return "", err
	}
	if err := cmd.Start(); err != nil {
		return "", fmt.Errorf("the echo: %w", err)
	}
	context.AfterFunc(ctx, func() { cmd.Wait() })
	line, err := bufio.NewReader(out).ReadString('\n')
	if err != nil {
		return "", fmt.Errorf("the echo: %w", err)
	}
	return strings.TrimSpace(line), nil
}

// echoes measures a pair of bare unary calls, as an acquisition and its release
// are a pair, and one that shares a stream per connection with others.
func (b *bench) echoes(ctx context.Context) (unary, stream Result, err error) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	address, err := b.startEcho(ctx)
	if err != nil {
		return unary, stream, err
	}
	var calls []pb.LockServiceClient
	var streams []*echoStream
	for range b.Connections {
		conn, err := grpc.NewClient("passthrough:///"+address, grpc.WithTransportCredentials(insecure.NewCredentials()))
		if err != nil {
			return unary, stream, err
		}
		defer conn.Close()
		calls = append(calls, pb.NewLockServiceClient(conn))
		rpc, err := pb.NewStreamServiceClient(conn).Multiplex(ctx)
		if err != nil {
			return unary, stream, err
		}
		e := &echoStream{waits: make(map[uint64]chan struct{}), wake: make(chan struct{}, 1)}
		go e.send(ctx, rpc)
		go e.receive(rpc)
		streams = append(streams, e)
	}
	quick := *b
	quick.Metrics = "" // of another process
	release := func() *pb.ReleaseRequest { return &pb.ReleaseRequest{LeaseId: 123456, Token: 123456} }
	unary, err = quick.measure(ctx, "pair of bare echoes, unary", func(ctx context.Context, worker int) error {
		_, err := calls[worker%len(calls)].Release(ctx, release())
		if err == nil {
			_, err = calls[worker%len(calls)].Release(ctx, release())
		}
		return err
	})
	if err != nil {
		return unary, stream, err
	}
	stream, err = quick.measure(ctx, "pair of bare echoes, stream", func(ctx context.Context, worker int) error {
		err := streams[worker%len(streams)].do(ctx, release())
		if err == nil {
			err = streams[worker%len(streams)].do(ctx, release())
		}
		return err
	})
	return unary, stream, err
}

// echoStream batches what its callers send, as the client does.
type echoStream struct {
	wake chan struct{}

	mu    sync.Mutex
	last  uint64
	queue []*pb.Operation
	waits map[uint64]chan struct{}
}

func (e *echoStream) do(ctx context.Context, r *pb.ReleaseRequest) error {
	done := make(chan struct{}, 1)
	e.mu.Lock()
	e.last++
	e.waits[e.last] = done
	e.queue = append(e.queue, &pb.Operation{Id: e.last, Call: &pb.Operation_Release{Release: r}})
	e.mu.Unlock()
	select {
	case e.wake <- struct{}{}:
	default:
	}
	select {
	case <-done:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

func (e *echoStream) send(ctx context.Context, rpc grpc.BidiStreamingClient[pb.MultiplexRequest, pb.MultiplexResponse]) {
	for {
		select {
		case <-e.wake:
		case <-ctx.Done():
			return
		}
		e.mu.Lock()
		queue := e.queue
		e.queue = nil
		e.mu.Unlock()
		if len(queue) > 0 && rpc.Send(&pb.MultiplexRequest{Operations: queue}) != nil {
			return
		}
	}
}

func (e *echoStream) receive(rpc grpc.BidiStreamingClient[pb.MultiplexRequest, pb.MultiplexResponse]) {
	for {
		msg, err := rpc.Recv()
		if err != nil {
			return
		}
		e.mu.Lock()
		for _, a := range msg.GetAnswers() {
			e.waits[a.GetId()] <- struct{}{}
			delete(e.waits, a.GetId())
		}
		e.mu.Unlock()
	}
}
