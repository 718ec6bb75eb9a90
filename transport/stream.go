package transport

import (
	"context"
	"errors"
	"io"
	"strconv"

	"go.uber.org/zap"
	"google.golang.org/grpc"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/durationpb"

	"github.com/distlock/distlock/fence"
	"github.com/distlock/distlock/lease"
	pb "github.com/distlock/distlock/proto/distlock/v1"
)

const (
	// maxUnderWay bounds what is under way on one stream before its reading
	// stops: operations not answered, and answers that the client has not
	// taken. Waits do not count, for a release must get past them.
	maxUnderWay = 8192
	// maxWaits bounds the acquisitions that wait on one stream.
	maxWaits = 65_536
	// maxOperations bounds one message.
	maxOperations = 8192
)

type streamService struct {
	pb.UnimplementedStreamServiceServer
	m       Manager
	work    workers
	logger  *zap.Logger
	refused func(reason string)
}

type multiplexStream = grpc.BidiStreamingServer[pb.MultiplexRequest, pb.MultiplexResponse]

// Multiplex carries many operations. Its goroutine writes; another one reads,
// and both end with the call. Between them stands the manager's port, so that
// no operation needs a goroutine of its own.
func (s *streamService) Multiplex(stream multiplexStream) error {
	port := s.m.NewPort(maxUnderWay, maxWaits)
	connection := connectionOf(stream)
	defer func() { port.Close(detached(connection)) }()
	read := make(chan error, 1)
	go func() { read <- s.read(stream, port) }()
	w := writer{stream: stream, port: port, refused: s.refused}
	ending, stopping := false, stream.Context().Done()
	var end error
	for {
		if ending && port.Idle() {
			return end
		}
		select {
		case <-port.Ready():
			if err := w.flush(); err != nil {
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
	for {
		msg, err := stream.Recv()
		if err != nil {
			return err
		}
		if err := s.take(ctx, msg, port); err != nil {
			return err
		}
	}
}

// take submits the operations of one message.
func (s *streamService) take(ctx context.Context, msg *pb.MultiplexRequest, port *lease.Port) error {
	if n := len(msg.GetOperations()); n > maxOperations {
		return &lease.InvalidError{Field: "operations", Msg: "must be at most " + strconv.Itoa(maxOperations) + ", not " + strconv.Itoa(n)}
	}
	if err := s.work.enter(ctx); err != nil {
		return err
	}
	batch := port.Batch(len(msg.GetOperations()))
	err := operations(msg, batch)
	s.work.leave()
	if err != nil {
		return err
	}
	return port.Submit(ctx, batch)
}

func operations(msg *pb.MultiplexRequest, b *lease.Batch) error {
	for _, op := range msg.GetOperations() {
		id := op.GetId()
		if id == 0 {
			return &lease.InvalidError{Field: "id", Msg: "must be above 0"}
		}
		switch c := op.GetCall().(type) {
		case *pb.Operation_Acquire:
			r, err := acquireRequest(c.Acquire)
			if err != nil {
				b.Refuse(id, err)
				continue
			}
			b.Acquire(id, r)
		case *pb.Operation_Release:
			b.Release(id, releaseRequest(c.Release))
		case *pb.Operation_Abandon:
			b.Abandon(id, lease.ID(c.Abandon.GetLeaseId()), lease.RequestID(c.Abandon.GetRequestId()))
		case *pb.Operation_CheckToken:
			b.CheckToken(id, c.CheckToken.GetName(), fence.Token(c.CheckToken.GetToken()))
		case *pb.Operation_ForceRelease:
			b.ForceRelease(id, c.ForceRelease.GetName(), fence.Token(c.ForceRelease.GetToken()), c.ForceRelease.GetBy())
		case *pb.Operation_Grant:
			r, err := grantRequest(c.Grant)
			if err != nil {
				b.Refuse(id, err)
				continue
			}
			b.GrantLease(id, r)
		case *pb.Operation_KeepAlive:
			ids, err := keepAliveIDs(c.KeepAlive)
			if err != nil {
				b.Refuse(id, err)
				continue
			}
			b.KeepAlive(id, ids)
		case *pb.Operation_Revoke:
			b.RevokeLease(id, lease.ID(c.Revoke.GetLeaseId()), c.Revoke.GetBy())
		case *pb.Operation_Cancel:
			b.Cancel(c.Cancel.GetId())
		default:
			b.Refuse(id, &lease.InvalidError{Field: "call", Msg: "must be one that this server knows"})
		}
	}
	return nil
}

// writer sends what a port has to say. Its arrays are used again.
type writer struct {
	stream  multiplexStream
	port    *lease.Port
	refused func(reason string)
	replies []lease.Reply
	losses  []lease.Loss
}

// flush sends all there is, in messages that clients accept. It blocks while
// the client does not read.
func (w *writer) flush() error {
	w.replies, w.losses = w.port.Take(w.replies, w.losses)
	out, bytes, sent := &pb.MultiplexResponse{}, 0, 0
	for i := range w.replies {
		answer := answer(&w.replies[i])
		if f := answer.GetFailure(); f != nil {
			w.refused(f.GetReason())
		}
		out.Answers = append(out.Answers, answer)
		if bytes += weigh(answer); bytes > softLimit {
			if err := w.send(out, w.replies[sent:i+1]); err != nil {
				return err
			}
			out, bytes, sent = &pb.MultiplexResponse{}, 0, i+1
		}
	}
	for _, l := range w.losses {
		out.Losses = append(out.Losses, &pb.Loss{LeaseId: uint64(l.Lease), Token: uint64(l.Token), Cause: pb.EndCause(l.Cause), By: l.By})
	}
	if len(out.Answers) == 0 && len(out.Losses) == 0 {
		return nil
	}
	return w.send(out, w.replies[sent:])
}

func (w *writer) send(out *pb.MultiplexResponse, replies []lease.Reply) error {
	if err := w.stream.Send(out); err != nil {
		return err
	}
	w.port.Sent(replies)
	return nil
}

// weigh is about the size of an answer.
func weigh(a *pb.Answer) int {
	const small = 64
	switch r := a.Result.(type) {
	case *pb.Answer_Acquire:
		n := small
		for _, k := range r.Acquire.GetGrant().GetLocks() {
			n += len(k.GetName()) + 16
		}
		return n
	case *pb.Answer_KeepAlive, *pb.Answer_Failure:
		return proto.Size(a)
	}
	return small
}

// The answers that say nothing but that it is done are all the same.
var (
	released      = &pb.Answer_Release{Release: &pb.ReleaseResponse{}}
	abandoned     = &pb.Answer_Abandon{Abandon: &pb.AbandonResponse{}}
	forceReleased = &pb.Answer_ForceRelease{ForceRelease: &pb.ForceReleaseResponse{}}
	revoked       = &pb.Answer_Revoke{Revoke: &pb.RevokeResponse{}}
)

func answer(r *lease.Reply) *pb.Answer {
	if r.Grant != nil && r.Err == nil {
		p := granted(r.Grant, r.TTL)
		p.answer.Id, p.answer.Result = r.Tag, &p.result
		p.result.Acquire, p.response.Grant = &p.response, &p.grant
		return &p.answer
	}
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
		kept, err := keptAlive(r.KeepAlive)
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
