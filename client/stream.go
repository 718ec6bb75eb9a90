package client

import (
	"context"
	"io"
	"runtime"
	"slices"
	"sync"
	"time"

	"go.uber.org/zap"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"

	"github.com/distlock/distlock/fence"
	pb "github.com/distlock/distlock/proto/distlock/v1"
	"github.com/distlock/distlock/proto/wire"
)

const (
	// maxMessage is about how large a message of gathered operations grows.
	maxMessage = 256 << 10
	// maxGathered bounds the operations in one.
	maxGathered = 4096
	// maxOnStream is the size above which an operation is a call of its own:
	// one that the server finds too large would end the stream for all.
	maxOnStream = 128 << 10
)

// stream carries the client's operations on one connection: those that callers
// ask for while a message is on its way leave together in the next. It ends,
// for good, with its first error, which everybody who still waits gets; whoever
// asks then gets a new one. Two goroutines belong to it, one that sends and one
// that receives.
type stream struct {
	client *Client
	conn   *grpc.ClientConn
	wake   chan struct{} // buffered, one: there is something to send

	// What attempts wait on, used again: channels once they have been answered,
	// and timers, for a context with a deadline costs five times as much. They
	// are the stream's, so that a client in a test's bubble of time keeps its own.
	answers, bounds sync.Pool

	mu    sync.Mutex
	last  uint64 // id given out
	queue []*pb.Operation
	open  map[uint64]chan *pb.Answer // of what is not answered, by id; nil when nobody waits
	err   error                      // why it ended

	unsent map[uint64]struct{} // what was still in the queue then
}

// streamOn returns the stream of a connection.
func (c *Client) streamOn(conn *grpc.ClientConn) (*stream, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if s := c.streams[conn]; s != nil {
		return s, nil
	}
	if c.ctx.Err() != nil {
		return nil, ErrClosed
	}
	s := &stream{client: c, conn: conn, wake: make(chan struct{}, 1), open: make(map[uint64]chan *pb.Answer)}
	c.streams[conn] = s
	c.group.Add(1)
	go s.run()
	return s, nil
}

// run opens the stream and sends until it ends.
func (s *stream) run() {
	defer s.client.group.Done()
	ctx, cancel := context.WithCancel(s.client.ctx)
	defer cancel()
	// gRPC sends what it has kept again, on another connection, when a server has
	// not looked at it, and holds up Send until there is one. It is to keep nothing:
	// whoever asked knows better where to ask again. Only the first message is sent
	// like that, before anybody receives.
	rpc, err := pb.NewStreamServiceClient(s.conn).Multiplex(ctx, grpc.ForceCodecV2(wire.Codec{CodecV2: wire.Proto}), grpc.MaxRetryRPCBufferSize(0))
	if err != nil {
		s.end(err)
		return
	}
	receiving := false
	for {
		select {
		case <-s.wake:
		case <-ctx.Done():
			if !receiving {
				s.end(ctx.Err())
			}
			return
		}
		// Whoever else is about to ask comes along.
		runtime.Gosched()
		for {
			msg := s.gather()
			if msg == nil {
				break
			}
			err := rpc.Send(msg)
			if !receiving {
				receiving = true
				s.client.group.Add(1) // run is in the group already
				go func() {
					defer s.client.group.Done()
					s.end(s.receive(rpc))
					cancel()
				}()
			}
			if err != nil {
				<-ctx.Done() // receive learns why
				return
			}
		}
	}
}

// gather makes a message of what is queued; nil when nothing is.
func (s *stream) gather() *pb.MultiplexRequest {
	s.mu.Lock()
	defer s.mu.Unlock()
	n, bytes := 0, 0
	for n < len(s.queue) && n < maxGathered && bytes < maxMessage {
		bytes += sizeOf(s.queue[n])
		n++
	}
	if n == 0 {
		return nil
	}
	msg := &pb.MultiplexRequest{Operations: s.queue[:n:n]}
	if s.queue = s.queue[n:]; len(s.queue) == 0 {
		s.queue = nil
	}
	return msg
}

func (s *stream) receive(rpc grpc.BidiStreamingClient[pb.MultiplexRequest, pb.MultiplexResponse]) error {
	for {
		msg, err := rpc.Recv()
		if err != nil {
			return err
		}
		s.client.hear(msg.GetClusterId())
		var undo []*pb.Hold
		s.mu.Lock()
		for _, a := range msg.GetAnswers() {
			waits, ok := s.open[a.GetId()]
			delete(s.open, a.GetId())
			switch {
			case waits != nil:
				waits <- a
			case ok && a.GetAcquire().GetHold().GetRequestId() == 0 && a.GetAcquire() != nil:
				// Cancelled, and granted in the race. Without a request id
				// nobody could abandon it.
				undo = append(undo, a.GetAcquire().GetHold())
			}
		}
		s.mu.Unlock()
		for _, g := range undo {
			s.post(&pb.Operation{Call: &pb.Operation_Release{Release: &pb.ReleaseRequest{LeaseId: g.GetLeaseId(), Token: g.GetToken()}}}, nil)
		}
		for _, l := range msg.GetLosses() {
			s.client.toldLoss(l)
		}
	}
}

// end fails whatever still waits.
func (s *stream) end(err error) {
	s.client.mu.Lock()
	if s.client.streams[s.conn] == s {
		delete(s.client.streams, s.conn)
	}
	closed := s.client.ctx.Err() != nil
	s.client.mu.Unlock()
	switch code := status.Code(err); {
	case closed:
		err = ErrClosed
	case err == io.EOF, code == codes.Canceled, code == codes.Internal, code == codes.Unknown:
		// Whatever tore it, an operation on it may be tried again.
		err = status.Error(codes.Unavailable, "the stream ended: "+err.Error())
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.err = err
	for id, waits := range s.open {
		if waits != nil {
			close(waits)
		}
		delete(s.open, id)
	}
	s.unsent = make(map[uint64]struct{}, len(s.queue))
	for _, op := range s.queue {
		s.unsent[op.Id] = struct{}{}
	}
	s.queue = nil
}

// post queues an operation; its answer goes to waits, which is buffered and is
// closed instead when the stream ends. The id is that to cancel it by.
func (s *stream) post(op *pb.Operation, waits chan *pb.Answer) (id uint64, err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.err != nil {
		return 0, unsent{s.err}
	}
	s.last++
	op.Id = s.last
	if _, cancels := op.Call.(*pb.Operation_Cancel); !cancels { // which is not answered
		s.open[op.Id] = waits
	}
	s.queue = append(s.queue, op)
	if len(s.queue) == 1 {
		select {
		case s.wake <- struct{}{}:
		default:
		}
	}
	return op.Id, nil
}

// forget is for a caller that no longer waits. What has not been sent yet is
// sent all the same, unless it is an Acquire: then forget reports true.
func (s *stream) forget(id uint64, acquire bool) (kept bool) {
	s.mu.Lock()
	_, sent := s.open[id]
	if _, kept = s.unsent[id]; kept {
		sent = false
	} else if i := slices.IndexFunc(s.queue, func(op *pb.Operation) bool { return op.Id == id }); i >= 0 && acquire {
		s.queue = slices.Delete(s.queue, i, i+1)
		delete(s.open, id)
		sent, kept = false, true
	} else if sent {
		s.open[id] = nil
	}
	s.mu.Unlock()
	if sent && acquire {
		s.post(&pb.Operation{Call: &pb.Operation_Cancel{Cancel: &pb.CancelRequest{Id: id}}}, nil)
	}
	return kept
}

// do makes one attempt of an operation. It is on its way even if ctx has ended;
// an Acquire that nobody waits for any more is cancelled.
func (s *stream) do(ctx context.Context, op *pb.Operation, until patience) (*pb.Answer, error) {
	waits, ok := s.answers.Get().(chan *pb.Answer)
	if !ok {
		waits = make(chan *pb.Answer, 1)
	}
	id, err := s.post(op, waits)
	if err != nil {
		s.answers.Put(waits)
		return nil, err
	}
	var bound <-chan time.Time
	if until.within > 0 {
		timer, ok := s.bounds.Get().(*time.Timer) // pace of the network, not of a lease
		if ok {
			timer.Reset(until.within)
		} else {
			timer = time.NewTimer(until.within)
		}
		bound = timer.C
		defer func() {
			timer.Stop()
			s.bounds.Put(timer)
		}()
	}
	var closed <-chan struct{}
	if until.closed != nil {
		closed = until.closed.Done()
	}
	select {
	case a, ok := <-waits:
		if !ok {
			s.mu.Lock()
			defer s.mu.Unlock()
			if _, kept := s.unsent[id]; kept {
				return nil, unsent{s.err}
			}
			return nil, s.err
		}
		s.answers.Put(waits)
		if f := a.GetFailure(); f != nil {
			return nil, failed(f)
		}
		return a, nil
	case <-ctx.Done():
		err = status.FromContextError(ctx.Err()).Err()
	case <-bound:
		err = status.FromContextError(context.DeadlineExceeded).Err()
	case <-until.again:
		err = errAskAgain
	case <-closed:
		err = ErrClosed
	}
	_, acquire := op.Call.(*pb.Operation_Acquire)
	if s.forget(id, acquire) {
		err = unsent{err}
	}
	return nil, err
}

// failed is the error that a call on its own would have had.
func failed(f *pb.Failure) *Error {
	e := &Error{
		Code: codes.Code(f.GetCode()), Message: f.GetMessage(), Reason: f.GetReason(), Leader: f.GetMetadata()["leader"],
	}
	if f.GetProblem() != nil {
		e.problem(f.GetProblem())
	}
	return e
}

// toldLoss takes in what the server says has been lost.
func (c *Client) toldLoss(l *pb.Loss) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if s := c.sessions[l.GetLeaseId()]; s != nil {
		c.lose(s, l)
	}
}

// hear takes in which cluster answers, and tells when it is another one than
// before. A server that keeps nothing on disk has none.
func (c *Client) hear(cluster string) {
	if cluster == "" {
		return
	}
	c.mu.Lock()
	was := c.cluster
	c.cluster = cluster
	c.mu.Unlock()
	if was == "" || was == cluster {
		return
	}
	err := &ClusterError{Was: was, Is: cluster}
	c.logger.Warn("another cluster answers", zap.String("was", was), zap.String("is", cluster))
	if c.warn != nil {
		c.warn(Warning{Err: err})
	}
}

// lose ends what the server says has been lost. The caller must hold c.mu.
func (c *Client) lose(s *session, l *pb.Loss) {
	lost := &LostError{Cause: causes[l.GetCause()], By: l.GetBy(), LeaseID: s.id}
	if l.GetToken() == 0 {
		s.gone = true
		c.end(s, lost)
		return
	}
	s.locks = slices.DeleteFunc(s.locks, func(k *Lock) bool {
		if k.token != fence.Token(l.GetToken()) {
			return false
		}
		k.end(k.lostAs(lost))
		return true
	})
}

// sizeOf is about what an operation takes in a message.
func sizeOf(op *pb.Operation) int {
	const small = 32
	switch call := op.GetCall().(type) {
	case *pb.Operation_Acquire:
		return sizeOfAcquire(call.Acquire)
	case *pb.Operation_Release:
		return small + len(call.Release.GetName())
	case *pb.Operation_KeepAlive:
		return small + 9*(len(call.KeepAlive.GetLeaseIds())+len(call.KeepAlive.GetRequestIds()))
	case *pb.Operation_Abandon:
		return small + 9*len(call.Abandon.GetRequestIds())
	}
	return small + proto.Size(op)
}

func sizeOfAcquire(r *pb.AcquireRequest) int {
	n := 64 + len(r.GetOwner()) + len(r.GetActor())
	for _, name := range r.GetNames() {
		n += len(name) + 4
	}
	for k, v := range r.GetMetadata() {
		n += len(k) + len(v) + 8
	}
	return n
}
