package transport

import (
	"cmp"
	"context"
	"errors"
	"io"
	"strconv"

	"go.uber.org/zap"
	"google.golang.org/grpc"
	"google.golang.org/protobuf/types/known/durationpb"

	"github.com/distlock/distlock/lease"
	pb "github.com/distlock/distlock/proto/distlock/v1"
	"github.com/distlock/distlock/proto/wire"
)

const (
	// maxUnderWay bounds what is under way on one stream before its reading
	// stops: operations not answered, and answers that the client has not
	// taken. Waits do not count, for a release must get past them. The nth stream
	// of a connection has an nth of it.
	maxUnderWay   = 8192
	leastUnderWay = 16
	// maxWaits bounds the acquisitions that wait on the streams of one connection, and
	// maxOnConn the other operations: a stream takes each message whole.
	maxWaits, maxOnConn = 65_536, 16_384
	// maxOperations bounds one message.
	maxOperations = 8192
)

type streamService struct {
	pb.UnimplementedStreamServiceServer
	m       Manager
	work    workers
	logger  *zap.Logger
	refused func(reason string)
	cluster *clusterID
}

type multiplexStream = grpc.BidiStreamingServer[pb.MultiplexRequest, pb.MultiplexResponse]

// Multiplex carries many operations. Its goroutine writes; another one reads,
// and both end with the call. Between them stands the manager's port, so that
// no operation needs a goroutine of its own.
func (s *streamService) Multiplex(stream multiplexStream) error {
	var port *lease.Port
	if conn := connOf(stream.Context()); conn != nil {
		port = conn.newPort(s.m)
		defer conn.forget(port)
	} else {
		port = s.m.NewPort(maxUnderWay, lease.NewShare(maxWaits, maxOnConn))
	}
	connection := connectionOf(stream)
	defer func() { port.Close(detached(connection)) }()
	read := make(chan error, 1)
	go func() { read <- s.read(stream, port) }()
	w := writer{stream: stream, port: port, refused: s.refused, cluster: s.cluster}
	ending, stopping := false, stream.Context().Done()
	var end error
	for {
		if ending && port.Idle() {
			return end
		}
		select {
		case <-port.Ready():
			if err := cmp.Or(w.flush(), port.Err()); err != nil {
				return err
			}
		case err := <-read:
			if !errors.Is(err, io.EOF) && stream.Context().Err() == nil {
				return err
			}
			ending = true // nothing more is asked: what is under way is answered
		case <-stopping:
			// The manager answers whatever waits, and refuses what is new.
			ending, stopping, end = true, nil, context.Cause(stream.Context())
		case <-connection.Done():
			return connection.Err()
		}
	}
}

// connectionOf is the context that ends with the call or its connection, not
// when the server begins to stop.
func connectionOf(s multiplexStream) context.Context {
	if g, ok := s.(*grpc.GenericServerStream[pb.MultiplexRequest, pb.MultiplexResponse]); ok {
		if ours, ok := g.ServerStream.(*stream); ok {
			return ours.ServerStream.Context()
		}
	}
	return s.Context()
}

// read hands what arrives to the port, until the stream ends.
func (s *streamService) read(stream multiplexStream, port *lease.Port) (err error) {
	defer rescue(s.logger, pb.StreamService_Multiplex_FullMethodName, &err)
	ctx := stream.Context()
	var data []byte
	var decoder wire.Operations
	var made operations
	for {
		if cap(data) > keepBytes {
			data = nil
		}
		if err := port.Room(ctx); err != nil {
			return err
		}
		if err := stream.RecvMsg(encoded{&data}); err != nil {
			return err
		}
		if err := s.take(ctx, data, &decoder, &made, port); err != nil {
			return err
		}
	}
}

// keepBytes bounds what a stream keeps of the memory of its last message.
const keepBytes = 16 << 10

// take submits the operations of one message.
func (s *streamService) take(ctx context.Context, data []byte, decoder *wire.Operations, made *operations, port *lease.Port) error {
	if err := s.work.enter(ctx); err != nil {
		return err
	}
	batch, err := gather(data, decoder, made, port)
	s.work.leave()
	if err != nil {
		return err
	}
	port.Submit(batch)
	return nil
}

// gather decodes the operations of one message.
func gather(data []byte, decoder *wire.Operations, made *operations, port *lease.Port) (*lease.Batch, error) {
	n, err := decoder.Reset(data)
	if err != nil {
		return nil, undecodable(&pb.MultiplexRequest{}, data)
	}
	if n > maxOperations {
		return nil, &lease.InvalidError{Field: "operations", Msg: "must be at most " + strconv.Itoa(maxOperations) + ", not " + strconv.Itoa(n)}
	}
	batch := port.Batch(n)
	err = decoder.Each(func(op *pb.Operation) error { return add(batch, made, op) })
	var invalid *lease.InvalidError
	if err != nil && !errors.As(err, &invalid) {
		err = undecodable(&pb.MultiplexRequest{}, data)
	}
	return batch, err
}

// add puts an operation, which it does not keep, in a batch.
func add(b *lease.Batch, made *operations, op *pb.Operation) error {
	id := op.GetId()
	if id == 0 {
		return &lease.InvalidError{Field: "id", Msg: "must be above 0"}
	}
	if c, ok := op.GetCall().(*pb.Operation_Cancel); ok {
		b.Cancel(c.Cancel.GetId())
		return nil
	}
	asked, err := made.of(called(op))
	if err != nil {
		b.Refuse(id, err)
		return nil
	}
	b.Add(id, asked)
	return nil
}

// called is the request in an operation.
func called(op *pb.Operation) any {
	switch c := op.GetCall().(type) {
	case *pb.Operation_Acquire:
		return c.Acquire
	case *pb.Operation_Release:
		return c.Release
	case *pb.Operation_Abandon:
		return c.Abandon
	case *pb.Operation_CheckToken:
		return c.CheckToken
	case *pb.Operation_ForceRelease:
		return c.ForceRelease
	case *pb.Operation_Grant:
		return c.Grant
	case *pb.Operation_KeepAlive:
		return c.KeepAlive
	case *pb.Operation_Revoke:
		return c.Revoke
	}
	return nil
}

// writer sends what a port has to say. Its arrays are used again.
type writer struct {
	stream  multiplexStream
	port    *lease.Port
	refused func(reason string)
	cluster *clusterID // nil once it has been told
	replies []lease.Reply
	losses  []lease.Loss
	grant   wire.Granted
}

// flush sends all there is, in messages that clients accept. It blocks while
// the client does not read.
func (w *writer) flush() (err error) {
	w.replies, w.losses = w.port.Take(w.replies, w.losses)
	if len(w.replies)+len(w.losses) == 0 {
		return nil
	}
	out, sent := bufferFor(len(w.replies)+len(w.losses)), 0
	if w.cluster != nil {
		id, settled := w.cluster.get()
		if *out = wire.AppendCluster(*out, id); settled {
			w.cluster = nil
		}
	}
	for i := range w.replies {
		answer := w.answer(&w.replies[i])
		if f := answer.GetFailure(); f != nil {
			w.refused(f.GetReason())
		}
		if *out, err = wire.AppendAnswer(*out, answer); err != nil {
			return err
		}
		if len(*out) > smallAnswer {
			if err := w.send(out, w.replies[sent:i+1]); err != nil {
				return err
			}
			out, sent = bufferFor(len(w.replies)-i), i+1
		}
	}
	for _, l := range w.losses {
		*out, err = wire.AppendLoss(*out, &pb.Loss{LeaseId: uint64(l.Lease), Token: uint64(l.Token), Cause: pb.EndCause(l.Cause), By: l.By})
		if err != nil {
			return err
		}
	}
	if len(*out) == 0 {
		return nil
	}
	return w.send(out, w.replies[sent:])
}

// bufferFor is a buffer for so many answers, or for as many as one message has.
func bufferFor(answers int) *[]byte {
	return wire.Buffer(min(max(countedBytes, bytesEach*answers), largestPooled))
}

// bytesEach is about what an answer takes.
const bytesEach = 64

func (w *writer) send(out *[]byte, replies []lease.Reply) error {
	if err := w.stream.SendMsg(encoded{out}); err != nil {
		return err
	}
	w.port.Sent(replies)
	return nil
}

// answer is valid until the next call.
func (w *writer) answer(r *lease.Reply) *pb.Answer {
	if r.Hold != nil && r.Err == nil {
		w.grant.Reset()
		fill(&w.grant, r.Hold, r.TTL)
		w.grant.Answer.Id = r.Tag
		return &w.grant.Answer
	}
	return answer(r)
}

// The answers that say nothing but that it is done are all the same.
var (
	released      = &pb.Answer_Release{Release: &pb.ReleaseResponse{}}
	abandoned     = &pb.Answer_Abandon{Abandon: &pb.AbandonResponse{}}
	forceReleased = &pb.Answer_ForceRelease{ForceRelease: &pb.ForceReleaseResponse{}}
	revoked       = &pb.Answer_Revoke{Revoke: &pb.RevokeResponse{}}
)

func answer(r *lease.Reply) *pb.Answer {
	out := &pb.Answer{Id: r.Tag}
	if r.Err != nil {
		out.Result = &pb.Answer_Failure{Failure: failure(r.Err)}
		return out
	}
	switch r.Op {
	case lease.OpRelease:
		out.Result = released
	case lease.OpAbandon:
		out.Result = abandoned
	case lease.OpForceRelease:
		out.Result = forceReleased
	case lease.OpRevokeLease:
		out.Result = revoked
	case lease.OpGrantLease:
		out.Result = &pb.Answer_Grant{Grant: &pb.GrantResponse{LeaseId: uint64(r.Lease), Ttl: durationpb.New(r.TTL)}}
	case lease.OpCheckToken:
		out.Result = &pb.Answer_CheckToken{CheckToken: tokenCheck(*r.Check)}
	case lease.OpKeepAlive:
		kept, err := keptAlive(r.KeptAlive)
		if err != nil {
			out.Result = &pb.Answer_Failure{Failure: failure(err)}
			break
		}
		out.Result = &pb.Answer_KeepAlive{KeepAlive: kept}
	}
	return out
}

// failure is what toStatus makes of an error, in a message.
func failure(err error) *pb.Failure {
	info, problem := details(err)
	return &pb.Failure{
		Code: int32(codeOf[info.GetReason()]), Message: short(err.Error()), Reason: info.GetReason(),
		Metadata: info.GetMetadata(), Problem: problem,
	}
}

// detached reports whether a call ended because its connection did.
func detached(ctx context.Context) bool { return ctx.Err() != nil && endOf(ctx) == lease.ErrDetached }
