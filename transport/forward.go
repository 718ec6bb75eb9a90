package transport

import (
	"context"
	"errors"
	"math/rand/v2"
	"strconv"
	"sync"
	"time"

	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"
	"google.golang.org/protobuf/reflect/protoregistry"

	"github.com/distlock/distlock/lease"
	pb "github.com/distlock/distlock/proto/distlock/v1"
)

// forwarder sends unary calls that only the leader can answer to the leader,
// so that any client works with any node.
type forwarder struct {
	cluster  Cluster
	stopping context.Context
	work     workers
}

// callHeader names a forwarded call, for Detach. Only members may send it.
const callHeader = "distlock-call"

const (
	// leaderless bounds how long a call waits for somebody to lead.
	leaderless = 5 * time.Second
	// betweenTries is how long a call waits before it asks anew.
	betweenTries = 15 * time.Millisecond
)

// unary tries the call here, which is all where this node leads, and follows
// the leader while the answer is that another leads.
func (f *forwarder) unary(ctx context.Context, req any, info *grpc.UnaryServerInfo, handler grpc.UnaryHandler) (any, error) {
	if a := addrOf(ctx); f.cluster == nil || a != nil && a.peer {
		return handler(ctx, req)
	}
	nameIt(req)
	resp, err := handler(ctx, req)
	until := time.Now().Add(leaderless)
	for elsewhere(err) && time.Now().Before(until) {
		var conn grpc.ClientConnInterface
		f.work.elsewhere(func() {
			wait, cancel := context.WithDeadline(ctx, until)
			defer cancel()
			defer context.AfterFunc(f.stopping, cancel)()
			var unknown error
			if conn, unknown = f.cluster.Leader(wait); unknown != nil {
				until = time.Time{} // nobody leads
				return
			}
			if conn == nil {
				return
			}
			began := time.Now()
			resp, err = f.send(ctx, conn, info.FullMethod, req)
			if repeatable(req) && lost(err) {
				err = lease.ErrNotLeader
			}
			if time.Since(began) > time.Second { // it was not refused at once
				until = time.Now().Add(leaderless)
			}
		})
		switch {
		case ctx.Err() != nil:
			return nil, ctx.Err()
		case f.stopping.Err() != nil && elsewhere(err):
			return nil, lease.ErrStopping
		case until.IsZero():
		case conn == nil:
			resp, err = handler(ctx, req)
			fallthrough
		default:
			if elsewhere(err) {
				f.work.elsewhere(func() {
					select {
					case <-time.After(betweenTries):
					case <-ctx.Done():
					}
				})
			}
		}
	}
	return resp, err
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

// send makes the call at the leader. When the client is lost, or this node
// stops, a wait there keeps its place.
func (f *forwarder) send(ctx context.Context, conn grpc.ClientConnInterface, method string, req any) (any, error) {
	resp, err := answerOf(method)
	if err != nil {
		return nil, err
	}
	out, cancel := context.WithCancelCause(context.WithoutCancel(ctx))
	defer cancel(nil)
	if deadline, ok := ctx.Deadline(); ok {
		var stop context.CancelFunc
		out, stop = context.WithDeadline(out, deadline)
		defer stop()
	}
	call := strconv.FormatUint(rand.Uint64(), 36)
	out = metadata.NewOutgoingContext(out, metadata.Pairs(callHeader, call))
	keep := func() {
		bounded, stop := context.WithTimeout(context.WithoutCancel(ctx), time.Second)
		defer stop()
		f.cluster.Detach(bounded, call) // if it cannot be told, its connection to us is lost too
	}
	defer context.AfterFunc(ctx, func() {
		if a := addrOf(ctx); a != nil && a.closed.Load() {
			keep()
		}
		cancel(ctx.Err())
	})()
	defer context.AfterFunc(f.stopping, func() {
		keep()
		cancel(lease.ErrStopping)
	})()
	err = conn.Invoke(out, method, req, resp)
	if err != nil && errors.Is(context.Cause(out), lease.ErrStopping) {
		err = lease.ErrStopping
	}
	return resp, err
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

// forwardedCalls are the waits here whose clients are at other members.
type forwardedCalls struct {
	mu   sync.Mutex
	ends map[string]context.CancelCauseFunc
}

func newForwardedCalls() *forwardedCalls {
	return &forwardedCalls{ends: make(map[string]context.CancelCauseFunc)}
}

// add remembers how to end a call, if it is a forwarded one, until the
// function that it returns is called.
func (f *forwardedCalls) add(ctx context.Context, end context.CancelCauseFunc) func() {
	if a := addrOf(ctx); a == nil || !a.peer {
		return func() {}
	}
	md, _ := metadata.FromIncomingContext(ctx)
	ids := md.Get(callHeader)
	if len(ids) != 1 {
		return func() {}
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	f.ends[ids[0]] = end
	return func() {
		f.mu.Lock()
		defer f.mu.Unlock()
		delete(f.ends, ids[0])
	}
}

func (f *forwardedCalls) detach(call string) {
	f.mu.Lock()
	end := f.ends[call]
	f.mu.Unlock()
	if end != nil {
		end(lease.ErrDetached)
	}
}
