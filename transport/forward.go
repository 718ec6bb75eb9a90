package transport

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"time"

	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"
	"google.golang.org/protobuf/reflect/protoregistry"

	"github.com/distlock/distlock/lease"
	"github.com/distlock/distlock/lease/machine"
	pb "github.com/distlock/distlock/proto/distlock/v1"
)

// forwarder sends unary calls that only the leader can answer to the leader,
// so that any client works with any node.
type forwarder struct {
	cluster  Cluster
	stopping context.Context
	work     workers
	// leaderless bounds how long a call waits for somebody to lead. The client
	// may know a node that can be reached.
	leaderless time.Duration
}

// betweenTries is how long a call waits before it asks anew.
const betweenTries = 15 * time.Millisecond

// unary tries the call here, which is all where this node leads, and follows
// the leader while the answer is that another leads.
func (f *forwarder) unary(ctx context.Context, req any, info *grpc.UnaryServerInfo, handler grpc.UnaryHandler) (any, error) {
	if a := addrOf(ctx); f.cluster == nil || a != nil && a.peer {
		return handler(ctx, req)
	}
	nameIt(req)
	resp, err := handler(ctx, req)
	again := false // a leader's answer was lost, and the request sent anew
	until := time.Now().Add(f.leaderless)
	for elsewhere(err) && time.Now().Before(until) {
		var conn grpc.ClientConnInterface
		var known error
		f.work.elsewhere(func() {
			wait, cancel := context.WithDeadline(ctx, until)
			defer cancel()
			defer context.AfterFunc(f.stopping, cancel)()
			var led context.Context
			if conn, led, known = f.cluster.Leader(wait); known != nil || conn == nil {
				return
			}
			began := time.Now()
			resp, err = f.send(ctx, led, conn, info.FullMethod, req)
			again = again || errors.Is(err, errAnswerLost)
			if time.Since(began) > betweenTries { // it was not refused at once
				until = time.Now().Add(f.leaderless)
			}
		})
		switch {
		case ctx.Err() != nil:
			return nil, ctx.Err()
		case f.stopping.Err() != nil && elsewhere(err):
			return nil, lease.ErrStopping
		case known != nil:
			return nil, err // nobody leads
		case conn == nil:
			resp, err = handler(ctx, req)
		}
		if elsewhere(err) {
			f.work.elsewhere(func() {
				select {
				case <-time.After(betweenTries):
				case <-ctx.Done():
				}
			})
		}
	}
	if again && err != nil && endedAlready(err) {
		// The answer that was lost was a refusal, or what it granted is over.
		// The client knows of one attempt only: to it the outcome is unknown,
		// until it asks again.
		return nil, lease.ErrOutcomeUnknown
	}
	return resp, err
}

// errAnswerLost is ErrNotLeader, of a leader that may have done it.
var errAnswerLost = fmt.Errorf("%w: its answer was lost", lease.ErrNotLeader)

// endedAlready tells whether a request was refused because it has ended.
func endedAlready(err error) bool {
	var r *lease.Refusal
	return errors.As(err, &r) && r.Reason == machine.ReasonRequestEnded || reasonOf(err) == string(machine.ReasonRequestEnded)
}

// elsewhere tells whether a call was refused because another node leads:
// nothing was done.
func elsewhere(err error) bool {
	if err == nil {
		return false
	}
	if errors.Is(err, lease.ErrNotLeader) {
		return true
	}
	return reasonOf(err) == ReasonNotLeader
}

// lost tells whether a forwarded call ended without the leader's answer.
func lost(err error) bool { return status.Code(err) == codes.Unavailable && reasonOf(err) == "" }

func reasonOf(err error) string {
	s, ok := status.FromError(err)
	if !ok {
		return ""
	}
	for _, d := range s.Details() {
		if info, ok := d.(*errdetails.ErrorInfo); ok {
			return info.GetReason()
		}
	}
	return ""
}

// nameIt gives a request that has no id one, so that it may be sent again.
func nameIt(req any) {
	switch r := req.(type) {
	case *pb.AcquireRequest:
		if r.GetRequestId() == 0 && r.GetLeaseId() == 0 {
			r.RequestId = rand.Uint64N(1<<63-1) + 1
		}
	case *pb.GrantRequest:
		if r.GetRequestId() == 0 {
			r.RequestId = rand.Uint64N(1<<63-1) + 1
		}
	}
}

// repeatable tells whether a request may be sent again when its answer was
// lost: sent twice, it does what it does once.
func repeatable(req any) bool {
	switch r := req.(type) {
	case *pb.AcquireRequest:
		return r.GetRequestId() != 0
	case *pb.GrantRequest:
		return r.GetRequestId() != 0
	case *pb.ReleaseRequest:
		return r.GetLeaseId() != 0
	case *pb.AbandonRequest, *pb.GetRequest, *pb.ListRequest, *pb.CheckTokenRequest, *pb.KeepAliveRequest,
		*pb.GetLeaseRequest, *pb.ListLeasesRequest, *pb.AddMemberRequest, *pb.PromoteMemberRequest, *pb.RemoveMemberRequest:
		return true
	}
	return false
}

// send makes the call at the leader. The leader takes its end for the loss of
// the client, and keeps the place of a wait: what the client cancels is
// abandoned by name.
func (f *forwarder) send(ctx, led context.Context, conn grpc.ClientConnInterface, method string, req any) (any, error) {
	resp, err := answerOf(method)
	if err != nil {
		return nil, err
	}
	out, cancel := context.WithCancelCause(context.WithoutCancel(ctx))
	defer cancel(nil)
	for _, end := range []struct {
		ctx   context.Context
		cause error
	}{{ctx, context.Canceled}, {led, lease.ErrNotLeader}, {f.stopping, lease.ErrStopping}} {
		defer context.AfterFunc(end.ctx, func() { cancel(end.cause) })()
	}
	err = conn.Invoke(out, method, req, resp)
	if err == nil {
		return resp, nil
	}
	switch cause := context.Cause(out); {
	case errors.Is(cause, lease.ErrStopping):
		return nil, lease.ErrStopping
	case errors.Is(cause, context.Canceled):
		if a := addrOf(ctx); a == nil || !a.closed.Load() {
			f.abandon(conn, req)
		}
		return nil, ctx.Err()
	case cause != nil || lost(err):
		if repeatable(req) {
			return nil, errAnswerLost // the next leader is asked
		}
		return nil, lease.ErrOutcomeUnknown
	}
	return nil, err
}

// abandon ends a wait at the leader that the client has cancelled.
func (f *forwarder) abandon(conn grpc.ClientConnInterface, req any) {
	r, ok := req.(*pb.AcquireRequest)
	if !ok || r.GetRequestId() == 0 { // the leader abandons an anonymous one itself
		return
	}
	ctx, cancel := context.WithTimeout(context.Background(), f.leaderless)
	defer cancel()
	pb.NewLockServiceClient(conn).Abandon(ctx, &pb.AbandonRequest{LeaseId: r.GetLeaseId(), RequestId: r.GetRequestId()})
}

// answerOf makes an empty answer of a method, by its full name.
func answerOf(method string) (proto.Message, error) {
	service, name := splitMethod(method)
	d, err := protoregistry.GlobalFiles.FindDescriptorByName(protoreflect.FullName(service))
	if err == nil {
		if s, ok := d.(protoreflect.ServiceDescriptor); ok {
			if m := s.Methods().ByName(protoreflect.Name(name)); m != nil {
				t, err := protoregistry.GlobalTypes.FindMessageByName(m.Output().FullName())
				if err == nil {
					return t.New().Interface(), nil
				}
			}
		}
	}
	return nil, status.Errorf(codes.Unimplemented, "unknown method %s", method)
}

func splitMethod(full string) (service, method string) {
	for i := len(full) - 1; i > 0; i-- {
		if full[i] == '/' {
			return full[1:i], full[i+1:]
		}
	}
	return "", full
}
