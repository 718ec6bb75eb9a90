package client

import (
	"context"
	"errors"
	"time"
	"unicode/utf8"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/peer"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"

	pb "github.com/distlock/distlock/proto/distlock/v1"
)

// caller carries operations to a server: a stream, or calls of their own.
type caller interface {
	// do makes one attempt of an operation. An error is a status, as that of a
	// call, or one of the reasons to stop waiting; it is unsent if the server
	// cannot know of the attempt. The operation is on its way even if ctx has
	// ended, where the caller can do that.
	do(ctx context.Context, op *pb.Operation, until patience) (*pb.Answer, error)
}

// patience is how long an attempt waits for its answer, beside its context.
type patience struct {
	within time.Duration   // 0 for no bound
	again  <-chan struct{} // ask again: the server knows of the request, and answers elsewhere; nil for never
	since  time.Duration   // again stays silent for so long
	closed context.Context // ends when the client takes no more locks; nil for whoever does not mind
}

// unsent is the error of an attempt that was never handed to a connection.
type unsent struct{ error }

// Unwrap returns the error itself.
func (u unsent) Unwrap() error { return u.error }

func isUnsent(err error) bool {
	if err == nil {
		return false
	}
	var u unsent
	return errors.As(err, &u)
}

// errAskAgain ends an attempt whose answer goes where nobody listens.
var errAskAgain = &Error{Code: codes.Unavailable, Message: "the server answers another attempt"}

// callerOn is how an operation goes over a connection.
func (c *Client) callerOn(conn *grpc.ClientConn, op *pb.Operation) (caller, error) {
	if c.unary || sizeOf(op) > maxOnStream {
		return calls{conn}, nil
	}
	return c.streamOn(conn)
}

// ask makes one attempt of an operation over a connection.
func (c *Client) ask(ctx context.Context, conn *grpc.ClientConn, op *pb.Operation, until patience) (*pb.Answer, error) {
	if !validText(op) {
		return nil, unsent{errNotText}
	}
	via, err := c.callerOn(conn, op)
	if err != nil {
		return nil, unsent{err}
	}
	return via.do(ctx, op, until)
}

// calls make each operation a call of its own.
type calls struct{ conn *grpc.ClientConn }

func (u calls) do(ctx context.Context, op *pb.Operation, until patience) (*pb.Answer, error) {
	if until.within > 0 {
		var stop context.CancelFunc
		ctx, stop = context.WithTimeout(ctx, until.within)
		defer stop()
	}
	if until.again != nil || until.closed != nil {
		var cancel context.CancelCauseFunc
		ctx, cancel = context.WithCancelCause(ctx)
		defer until.watch(ctx, cancel)()
	}
	a, err := u.call(ctx, op)
	if err != nil {
		switch cause := context.Cause(ctx); cause {
		case errAskAgain, ErrClosed:
			if isUnsent(err) {
				return nil, unsent{cause}
			}
			return nil, cause
		}
		return nil, err
	}
	return a, nil
}

// watch cancels a call with the reason to stop waiting for it. The function
// that it returns ends the watch, and the context.
func (until patience) watch(ctx context.Context, cancel context.CancelCauseFunc) func() {
	if until.again == nil { // answered soon, or lost
		stop := context.AfterFunc(until.closed, func() { cancel(ErrClosed) })
		return func() {
			stop()
			cancel(nil)
		}
	}
	var closed <-chan struct{}
	if until.closed != nil {
		closed = until.closed.Done()
	}
	done := make(chan struct{})
	// Only those that wait longer than most need this goroutine.
	late := time.AfterFunc(until.since, func() {
		defer close(done)
		select {
		case <-until.again:
			cancel(errAskAgain)
		case <-closed:
			cancel(ErrClosed)
		case <-ctx.Done():
		}
	})
	return func() {
		if cancel(nil); !late.Stop() {
			<-done
		}
	}
}

func (u calls) call(ctx context.Context, op *pb.Operation) (*pb.Answer, error) {
	switch r := op.GetCall().(type) {
	case *pb.Operation_Acquire:
		var to peer.Peer // set once there is a connection
		resp, err := locksOf(u.conn).Acquire(ctx, r.Acquire, grpc.Peer(&to))
		if err != nil && to.Addr == nil {
			err = unsent{err}
		}
		return &pb.Answer{Result: &pb.Answer_Acquire{Acquire: resp}}, err
	case *pb.Operation_Release:
		resp, err := locksOf(u.conn).Release(ctx, r.Release)
		return &pb.Answer{Result: &pb.Answer_Release{Release: resp}}, err
	case *pb.Operation_Abandon:
		resp, err := locksOf(u.conn).Abandon(ctx, r.Abandon)
		return &pb.Answer{Result: &pb.Answer_Abandon{Abandon: resp}}, err
	case *pb.Operation_KeepAlive:
		resp, err := leasesOf(u.conn).KeepAlive(ctx, r.KeepAlive)
		return &pb.Answer{Result: &pb.Answer_KeepAlive{KeepAlive: resp}}, err
	case *pb.Operation_CheckToken:
		resp, err := locksOf(u.conn).CheckToken(ctx, r.CheckToken)
		return &pb.Answer{Result: &pb.Answer_CheckToken{CheckToken: resp}}, err
	case *pb.Operation_ForceRelease:
		resp, err := locksOf(u.conn).ForceRelease(ctx, r.ForceRelease)
		return &pb.Answer{Result: &pb.Answer_ForceRelease{ForceRelease: resp}}, err
	case *pb.Operation_Grant:
		resp, err := leasesOf(u.conn).Grant(ctx, r.Grant)
		return &pb.Answer{Result: &pb.Answer_Grant{Grant: resp}}, err
	case *pb.Operation_Revoke:
		resp, err := leasesOf(u.conn).Revoke(ctx, r.Revoke)
		return &pb.Answer{Result: &pb.Answer_Revoke{Revoke: resp}}, err
	}
	return nil, status.Error(codes.Unimplemented, "not an operation of this client")
}

// errNotText says that text is not UTF-8. Protobuf would refuse the whole message, and
// with it the stream that others use.
var errNotText = &Error{Reason: "INVALID_ARGUMENT", Code: codes.InvalidArgument, Message: "a name or other text of the request is not valid UTF-8"}

func validText(op *pb.Operation) bool {
	switch call := op.GetCall().(type) {
	case *pb.Operation_Release:
		return utf8.ValidString(call.Release.GetName())
	case *pb.Operation_Acquire:
		r := call.Acquire
		for _, name := range r.GetNames() {
			if !utf8.ValidString(name) {
				return false
			}
		}
		for k, v := range r.GetMetadata() {
			if !utf8.ValidString(k) || !utf8.ValidString(v) {
				return false
			}
		}
		return utf8.ValidString(r.GetOwner()) && utf8.ValidString(r.GetActor())
	case *pb.Operation_KeepAlive, *pb.Operation_Abandon: // have no text
		return true
	}
	_, err := proto.Marshal(op) // of those that are rare
	return err == nil
}

// acquireOperation, releaseOperation and abandonOperation put a request into an
// operation, in one piece of memory where many are made.
func acquireOperation(r *pb.AcquireRequest) *pb.Operation {
	made := &struct {
		op   pb.Operation
		call pb.Operation_Acquire
	}{}
	made.call.Acquire, made.op.Call = r, &made.call
	return &made.op
}

func releaseOperation(r *pb.ReleaseRequest) *pb.Operation {
	made := &struct {
		op   pb.Operation
		call pb.Operation_Release
	}{}
	made.call.Release, made.op.Call = r, &made.call
	return &made.op
}

func abandonOperation(r *pb.AbandonRequest) *pb.Operation {
	return &pb.Operation{Call: &pb.Operation_Abandon{Abandon: r}}
}
