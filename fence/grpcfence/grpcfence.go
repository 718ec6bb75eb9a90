// Package grpcfence carries passes over gRPC: interceptors for servers that
// turn stale writers away, and interceptors for clients that show the pass of
// a lock with a call.
//
// A pass travels in three keys of a call's metadata: distlock-resource, whose
// value is percent-encoded so that any name fits, distlock-token and
// distlock-floor, in decimal.
//
// What is refused is answered with a status that has a google.rpc.ErrorInfo of
// domain "distlock":
//
//	FAILED_PRECONDITION  STALE_TOKEN       the pass has been overtaken; metadata: token, stored, and resource unless it is long
//	FAILED_PRECONDITION  PASS_REQUIRED     a write came without a pass
//	INVALID_ARGUMENT     INVALID_PASS      no grant can have given this pass, or it cannot be read
//	INVALID_ARGUMENT     ANOTHER_RESOURCE  the pass is for another resource than the request's
package grpcfence

import (
	"context"
	"errors"
	"fmt"
	"strconv"
	"strings"

	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"

	"github.com/distlock/distlock/fence"
	"github.com/distlock/distlock/fence/internal/carry"
)

// The metadata of a pass.
const (
	KeyResource = "distlock-resource"
	KeyToken    = "distlock-token"
	KeyFloor    = "distlock-floor"
)

// Domain is the ErrorInfo domain of every refusal.
const Domain = "distlock"

// The reasons of refusals.
const (
	ReasonStale           = "STALE_TOKEN"
	ReasonPassRequired    = "PASS_REQUIRED"
	ReasonInvalidPass     = "INVALID_PASS"
	ReasonAnotherResource = "ANOTHER_RESOURCE"
)

type heldKey struct{}

type held struct {
	lock fence.Holder
	name string
}

// WithLock makes calls under the context show lock's pass for the resource
// name. The connection needs UnaryClientInterceptor or StreamClientInterceptor.
func WithLock(ctx context.Context, lock fence.Holder, name string) context.Context {
	return context.WithValue(ctx, heldKey{}, held{lock, name})
}

// WithPass shows a pass with calls under the context, with no interceptor and
// no lock. It is what WithLock comes to.
func WithPass(ctx context.Context, resource string, pass fence.Pass) context.Context {
	texts := carry.Texts(resource, pass)
	return metadata.AppendToOutgoingContext(ctx, KeyResource, texts[0], KeyToken, texts[1], KeyFloor, texts[2])
}

// attach adds the pass of the context's lock, if it has one.
func attach(ctx context.Context) (context.Context, string, error) {
	h, ok := ctx.Value(heldKey{}).(held)
	if !ok {
		return ctx, "", nil
	}
	pass, err := carry.Shown(h.lock, h.name)
	if err != nil {
		return nil, "", err
	}
	return WithPass(ctx, h.name, pass), h.name, nil
}

// UnaryClientInterceptor shows the pass of the lock that the call's context
// carries (WithLock). A lock that is lost fails the call before it is sent,
// with the lock's own error. A refusal is also a *fence.StaleError or
// fence.ErrInvalidPass, for errors.As and errors.Is.
func UnaryClientInterceptor() grpc.UnaryClientInterceptor {
	return func(ctx context.Context, method string, req, reply any, cc *grpc.ClientConn, invoke grpc.UnaryInvoker, opts ...grpc.CallOption) error {
		ctx, resource, err := attach(ctx)
		if err != nil {
			return err
		}
		return ErrorFrom(invoke(ctx, method, req, reply, cc, opts...), resource)
	}
}

// StreamClientInterceptor is UnaryClientInterceptor for streams. The pass is
// shown once, when the stream begins.
func StreamClientInterceptor() grpc.StreamClientInterceptor {
	return func(ctx context.Context, desc *grpc.StreamDesc, cc *grpc.ClientConn, method string, open grpc.Streamer, opts ...grpc.CallOption) (grpc.ClientStream, error) {
		ctx, resource, err := attach(ctx)
		if err != nil {
			return nil, err
		}
		s, err := open(ctx, desc, cc, method, opts...)
		if err != nil {
			return nil, ErrorFrom(err, resource)
		}
		return clientStream{s, resource}, nil
	}
}

type clientStream struct {
	grpc.ClientStream
	resource string
}

func (s clientStream) RecvMsg(m any) error { return ErrorFrom(s.ClientStream.RecvMsg(m), s.resource) }

// refusal is a status that is also what the guard said.
type refusal struct {
	status error
	guard  error
}

func (r *refusal) Error() string              { return r.status.Error() }
func (r *refusal) GRPCStatus() *status.Status { return status.Convert(r.status) }
func (r *refusal) Unwrap() []error            { return []error{r.status, r.guard} }

// ErrorFrom makes a call's error also what the guard at the server said, a
// *fence.StaleError or fence.ErrInvalidPass, and returns any other error as it
// is. The resource is the one that the call showed a pass for; "" takes the
// server's word.
func ErrorFrom(err error, resource string) error {
	if err == nil {
		return nil
	}
	s, ok := status.FromError(err)
	if !ok {
		return err
	}
	for _, d := range s.Details() {
		info, ok := d.(*errdetails.ErrorInfo)
		if !ok || info.GetDomain() != Domain {
			continue
		}
		switch info.GetReason() {
		case ReasonStale:
			token, err1 := strconv.ParseUint(info.GetMetadata()["token"], 10, 64)
			stored, err2 := strconv.ParseUint(info.GetMetadata()["stored"], 10, 64)
			if err1 == nil && err2 == nil {
				if resource == "" {
					resource = info.GetMetadata()["resource"]
				}
				return &refusal{err, &fence.StaleError{Resource: resource, Token: fence.Token(token), Stored: fence.Token(stored)}}
			}
		case ReasonInvalidPass:
			return &refusal{err, fence.ErrInvalidPass}
		}
	}
	return err
}

// Interceptor stands before a server's handlers and lets a write through only
// with a pass that has not been overtaken. Its zero value asks for a pass with
// every call.
//
// With a Guard, a unary handler runs as the guard's write, and its error is a
// write that has failed and stores no floor. A guard that serializes writes
// (fence.Memory does) is held for as long as the handler runs.
//
// Without one, and in streams always, the handler finds the pass by
// FromContext and gives it to the guard of the store that it writes to, once
// for each write; it returns the guard's error, which is made a status here.
type Interceptor struct {
	Guard fence.Guard[func() error]
	// Resource names the resource that a request is about; the request is nil
	// for a stream. Set it wherever the request tells: a pass for another
	// resource is refused then. Without it the metadata is believed, and the
	// holder of any lock may write anything.
	Resource func(ctx context.Context, fullMethod string, req any) string
	// Reads tells the methods that change nothing. They need no pass. One that
	// is shown all the same raises the floor before the handler runs: what a
	// holder reads so, nobody it has replaced can change afterwards. Nil means
	// that all methods write.
	Reads func(fullMethod string) bool
}

// Unary is the interceptor for unary calls.
func (i Interceptor) Unary() grpc.UnaryServerInterceptor {
	return func(ctx context.Context, req any, info *grpc.UnaryServerInfo, handler grpc.UnaryHandler) (reply any, err error) {
		c, reads, err := i.admit(ctx, info.FullMethod, req)
		if err != nil {
			return nil, toStatus(err)
		}
		if c != nil {
			ctx = context.WithValue(ctx, carriedKey{}, *c)
		}
		if c == nil || reads || i.Guard == nil {
			reply, err = handler(ctx, req)
			return reply, toStatus(err)
		}
		err = i.Guard.Write(ctx, c.resource, c.pass, func() (err error) {
			reply, err = handler(ctx, req)
			return err
		})
		if err != nil {
			return nil, toStatus(err)
		}
		return reply, nil
	}
}

// Stream is the interceptor for streams. It raises the floor when a stream
// begins, and leaves each write to the handler.
func (i Interceptor) Stream() grpc.StreamServerInterceptor {
	return func(srv any, s grpc.ServerStream, info *grpc.StreamServerInfo, handler grpc.StreamHandler) error {
		ctx := s.Context()
		c, reads, err := i.admit(ctx, info.FullMethod, nil)
		if err == nil && c != nil && !reads && i.Guard != nil {
			err = i.Guard.Raise(ctx, c.resource, c.pass)
		}
		if err != nil {
			return toStatus(err)
		}
		if c != nil {
			s = serverStream{s, context.WithValue(ctx, carriedKey{}, *c)}
		}
		return toStatus(handler(srv, s))
	}
}

type serverStream struct {
	grpc.ServerStream
	ctx context.Context
}

func (s serverStream) Context() context.Context { return s.ctx }

type carriedKey struct{}

type carried struct {
	resource string
	pass     fence.Pass
}

// FromContext is the pass that a call behind an Interceptor has brought, and
// the resource it is for; false for a method that only reads, called without
// one.
func FromContext(ctx context.Context) (resource string, pass fence.Pass, ok bool) {
	c, ok := ctx.Value(carriedKey{}).(carried)
	return c.resource, c.pass, ok
}

// admit looks at a call before its handler does. It answers with no pass for a
// read without one, and has raised the floor for a read with one.
func (i Interceptor) admit(ctx context.Context, method string, req any) (c *carried, reads bool, err error) {
	md, _ := metadata.FromIncomingContext(ctx)
	reads = i.Reads != nil && i.Reads(method)
	if reads && len(md.Get(KeyResource))+len(md.Get(KeyToken))+len(md.Get(KeyFloor)) == 0 {
		return nil, true, nil
	}
	c, err = read(md)
	if err != nil {
		return nil, reads, err
	}
	if i.Resource != nil {
		if own := i.Resource(ctx, method, req); own != c.resource {
			return nil, reads, refused(codes.InvalidArgument, ReasonAnotherResource,
				fmt.Sprintf("the request is about %.100q, and its pass for %.100q", own, c.resource), nil)
		}
	}
	if reads && i.Guard != nil {
		err = i.Guard.Raise(ctx, c.resource, c.pass)
	}
	return c, reads, err
}

// read takes the pass out of a call's metadata.
func read(md metadata.MD) (*carried, error) {
	resource, pass, err := carry.Read([3]string{KeyResource, KeyToken, KeyFloor}, md.Get)
	var missing *carry.MissingError
	var wrong *carry.InvalidError
	switch {
	case errors.As(err, &missing):
		return nil, refused(codes.FailedPrecondition, ReasonPassRequired, "the call has no "+missing.Key+" in its metadata", nil)
	case errors.As(err, &wrong):
		return nil, invalid(wrong.Error())
	}
	return &carried{resource, pass}, err
}

// longest is what a resource's name may take to be told in a status, which
// travels in headers: many clients refuse more than 8 KiB of them.
const longest = 1 << 10

// toStatus makes a guard's refusal a status, and leaves other errors alone.
func toStatus(err error) error {
	var stale *fence.StaleError
	switch {
	case errors.As(err, &stale):
		meta := map[string]string{"token": stale.Token.String(), "stored": stale.Stored.String()}
		if len(stale.Resource) <= longest {
			meta["resource"] = strings.ToValidUTF8(stale.Resource, "\ufffd")
		}
		return refused(codes.FailedPrecondition, ReasonStale,
			fmt.Sprintf("resource %.100q: token %d is stale, the resource has seen %d", stale.Resource, stale.Token, stale.Stored), meta)
	case errors.Is(err, fence.ErrInvalidPass):
		return invalid(fence.ErrInvalidPass.Error())
	}
	return err
}

func invalid(message string) error {
	return refused(codes.InvalidArgument, ReasonInvalidPass, message, nil)
}

func refused(code codes.Code, reason, message string, meta map[string]string) error {
	s, err := status.New(code, message).WithDetails(&errdetails.ErrorInfo{Reason: reason, Domain: Domain, Metadata: meta})
	if err != nil { // only for codes.OK
		return status.Error(code, message)
	}
	return s.Err()
}
