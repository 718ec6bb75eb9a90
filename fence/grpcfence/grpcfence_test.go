package grpcfence_test

import (
	"context"
	"errors"
	"fmt"
	"net"
	"strings"
	"sync"
	"testing"

	"go.uber.org/goleak"
	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
	"google.golang.org/grpc/test/bufconn"
	"google.golang.org/protobuf/types/known/structpb"

	"github.com/distlock/distlock/fence"
	"github.com/distlock/distlock/fence/fencetest"
	"github.com/distlock/distlock/fence/grpcfence"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// texts is a service that keeps a text per resource. A request is a list: the
// resource's name, the text. A guard of its own, if it has one, is for streams.
type texts struct {
	guard *fence.Memory
	mu    sync.Mutex
	of    map[string]string
}

func request(values ...any) *structpb.ListValue {
	l, err := structpb.NewList(values)
	if err != nil {
		panic(err)
	}
	return l
}

func field(l *structpb.ListValue, i int) string { return l.GetValues()[i].GetStringValue() }

func (s *texts) set(_ context.Context, req *structpb.ListValue) (*structpb.ListValue, error) {
	if field(req, 1) == "fail" {
		return nil, status.Error(codes.ResourceExhausted, "full")
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.of[field(req, 0)] = field(req, 1)
	return request("done"), nil
}

func (s *texts) get(_ context.Context, req *structpb.ListValue) (*structpb.ListValue, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return request(s.of[field(req, 0)]), nil
}

// stream writes each text it receives, each by the guard.
func (s *texts) stream(stream grpc.ServerStream) error {
	for {
		var req structpb.ListValue
		if err := stream.RecvMsg(&req); err != nil {
			return err
		}
		resource, pass, ok := grpcfence.FromContext(stream.Context())
		if !ok {
			return errors.New("no pass")
		}
		err := s.guard.Write(stream.Context(), resource, pass, func() error {
			_, err := s.set(stream.Context(), &req)
			return err
		})
		if err != nil {
			return err
		}
		if err := stream.SendMsg(request("done")); err != nil {
			return err
		}
	}
}

func unary(name string, handle func(*texts, context.Context, *structpb.ListValue) (*structpb.ListValue, error)) grpc.MethodDesc {
	return grpc.MethodDesc{MethodName: name, Handler: func(srv any, ctx context.Context, dec func(any) error, interceptor grpc.UnaryServerInterceptor) (any, error) {
		req := new(structpb.ListValue)
		if err := dec(req); err != nil {
			return nil, err
		}
		return interceptor(ctx, req, &grpc.UnaryServerInfo{Server: srv, FullMethod: "/Texts/" + name}, func(ctx context.Context, req any) (any, error) {
			return handle(srv.(*texts), ctx, req.(*structpb.ListValue))
		})
	}}
}

var service = grpc.ServiceDesc{
	ServiceName: "Texts", HandlerType: (*any)(nil),
	Methods: []grpc.MethodDesc{unary("Set", (*texts).set), unary("Get", (*texts).get)},
	Streams: []grpc.StreamDesc{{StreamName: "Stream", ClientStreams: true, ServerStreams: true, Handler: func(srv any, s grpc.ServerStream) error {
		return srv.(*texts).stream(s)
	}}},
}

// connect serves texts behind the interceptor.
func connect(t *testing.T, i grpcfence.Interceptor, s *texts) *grpc.ClientConn {
	t.Helper()
	l := bufconn.Listen(1 << 16)
	srv := grpc.NewServer(grpc.UnaryInterceptor(i.Unary()), grpc.StreamInterceptor(i.Stream()))
	srv.RegisterService(&service, s)
	served := make(chan error)
	go func() { served <- srv.Serve(l) }()
	conn, err := grpc.NewClient("passthrough:///texts", grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithContextDialer(func(ctx context.Context, _ string) (net.Conn, error) { return l.DialContext(ctx) }),
		grpc.WithUnaryInterceptor(grpcfence.UnaryClientInterceptor()), grpc.WithStreamInterceptor(grpcfence.StreamClientInterceptor()))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		conn.Close()
		srv.Stop()
		if err := <-served; err != nil {
			t.Error(err)
		}
	})
	return conn
}

func guarded(guard fence.Guard[func() error]) grpcfence.Interceptor {
	return grpcfence.Interceptor{
		Guard: guard,
		Resource: func(_ context.Context, _ string, req any) string {
			if req == nil {
				return "r" // the stream's
			}
			return field(req.(*structpb.ListValue), 0)
		},
		Reads: func(method string) bool { return method == "/Texts/Get" },
	}
}

// lock is a lock on one name.
type lock struct {
	name string
	pass fence.Pass
	err  error
}

func (l lock) PassFor(name string) (fence.Pass, bool) { return l.pass, name == l.name }
func (l lock) Err() error                             { return l.err }

type subject struct{ conn *grpc.ClientConn }

func (s subject) call(ctx context.Context, method string, req *structpb.ListValue) (string, error) {
	var reply structpb.ListValue
	if err := s.conn.Invoke(ctx, "/Texts/"+method, req, &reply); err != nil {
		return "", err
	}
	return field(&reply, 0), nil
}

func (s subject) Write(ctx context.Context, resource string, pass fence.Pass, text string) error {
	_, err := s.call(grpcfence.WithLock(ctx, lock{name: resource, pass: pass}, resource), "Set", request(resource, text))
	return err
}

func (s subject) Interrupt(ctx context.Context, resource string, pass fence.Pass, _ string) error {
	return s.Write(ctx, resource, pass, "fail")
}

func (s subject) Raise(ctx context.Context, resource string, pass fence.Pass) error {
	_, err := s.call(grpcfence.WithLock(ctx, lock{name: resource, pass: pass}, resource), "Get", request(resource))
	return err
}

func (s subject) Read(ctx context.Context, resource string) (string, error) {
	return s.call(ctx, "Get", request(resource))
}

func TestInterceptorsMeetTheContract(t *testing.T) {
	fencetest.Run(t, func(t *testing.T) fencetest.Subject {
		return subject{connect(t, guarded(new(fence.Memory)), &texts{of: map[string]string{}})}
	})
}

// refusal is the reason of an error, and the status around it.
func refusal(t *testing.T, err error) (codes.Code, *errdetails.ErrorInfo) {
	t.Helper()
	s := status.Convert(err)
	for _, d := range s.Details() {
		if info, ok := d.(*errdetails.ErrorInfo); ok && info.GetDomain() == grpcfence.Domain {
			return s.Code(), info
		}
	}
	return s.Code(), nil
}

func TestRefusals(t *testing.T) {
	var guard fence.Memory
	s := subject{connect(t, guarded(&guard), &texts{of: map[string]string{}})}
	if err := guard.Raise(t.Context(), "r", fence.Pass{Token: 7, Floor: 7}); err != nil {
		t.Fatal(err)
	}
	md := func(pairs ...string) context.Context { return metadata.AppendToOutgoingContext(t.Context(), pairs...) }
	pass := func(resource, token, floor string) context.Context {
		return md(grpcfence.KeyResource, resource, grpcfence.KeyToken, token, grpcfence.KeyFloor, floor)
	}
	for _, c := range []struct {
		what   string
		ctx    context.Context
		method string
		code   codes.Code
		reason string
	}{
		{"stale", pass("r", "6", "6"), "Set", codes.FailedPrecondition, "STALE_TOKEN"},
		{"stale raise", pass("r", "6", "6"), "Get", codes.FailedPrecondition, "STALE_TOKEN"},
		{"none", md(), "Set", codes.FailedPrecondition, "PASS_REQUIRED"},
		{"no floor", md(grpcfence.KeyResource, "r", grpcfence.KeyToken, "8"), "Set", codes.FailedPrecondition, "PASS_REQUIRED"},
		{"half a pass to read", md(grpcfence.KeyToken, "8"), "Get", codes.FailedPrecondition, "PASS_REQUIRED"},
		{"token 0", pass("r", "0", "0"), "Set", codes.InvalidArgument, "INVALID_PASS"},
		{"not a token", pass("r", "x", "8"), "Set", codes.InvalidArgument, "INVALID_PASS"},
		{"not a floor", pass("r", "8", "-1"), "Set", codes.InvalidArgument, "INVALID_PASS"},
		{"not escaped", pass("%zz", "8", "8"), "Set", codes.InvalidArgument, "INVALID_PASS"},
		{"two tokens", md(grpcfence.KeyResource, "r", grpcfence.KeyToken, "8", grpcfence.KeyToken, "9", grpcfence.KeyFloor, "8"), "Set", codes.InvalidArgument, "INVALID_PASS"},
		{"another's", pass("s", "8", "8"), "Set", codes.InvalidArgument, "ANOTHER_RESOURCE"},
		{"right", pass("r", "8", "8"), "Set", codes.OK, ""},
		{"right, to read", pass("r", "8", "8"), "Get", codes.OK, ""},
		{"read", md(), "Get", codes.OK, ""},
	} {
		t.Run(c.what, func(t *testing.T) {
			_, err := s.call(c.ctx, c.method, request("r", "text"))
			if code, info := refusal(t, err); code != c.code || info.GetReason() != c.reason {
				t.Errorf("%v %v: %v", code, info, err)
			}
			var stale *fence.StaleError
			if c.reason == "STALE_TOKEN" && (!errors.As(err, &stale) || *stale != (fence.StaleError{Resource: "r", Token: 6, Stored: 7})) {
				t.Errorf("%#v", err)
			}
			if _, info := refusal(t, err); c.reason == "STALE_TOKEN" {
				if m := info.GetMetadata(); m["resource"] != "r" || m["token"] != "6" || m["stored"] != "7" {
					t.Errorf("metadata %v", m)
				}
			}
		})
	}
}

// TestHandlersError comes through as it is, and stores no floor.
func TestHandlersError(t *testing.T) {
	var guard fence.Memory
	s := subject{connect(t, guarded(&guard), &texts{of: map[string]string{}})}
	if err := s.Write(t.Context(), "r", fence.Pass{Token: 9, Floor: 9}, "fail"); status.Code(err) != codes.ResourceExhausted || guard.Stored("r") != 0 {
		t.Errorf("%v; stored %d", err, guard.Stored("r"))
	}
}

// TestLongNamesFitHeaders: a refusal leaves out a name that would make its
// status too long for many clients.
func TestLongNamesFitHeaders(t *testing.T) {
	long := strings.Repeat("n", 10<<10)
	s := subject{connect(t, guarded(new(fence.Memory)), &texts{of: map[string]string{}})}
	if err := s.Write(t.Context(), long, fence.Pass{Token: 9, Floor: 9}, "a"); err != nil {
		t.Fatal(err)
	}
	err := s.Write(t.Context(), long, fence.Pass{Token: 8, Floor: 8}, "b")
	var stale *fence.StaleError
	if _, info := refusal(t, err); len(err.Error()) > 1000 || info.GetMetadata()["resource"] != "" || !errors.As(err, &stale) || stale.Resource != long {
		t.Errorf("%.200v", err)
	}
}

func TestNothingIsSentWithoutTheLock(t *testing.T) {
	s := subject{connect(t, guarded(new(fence.Memory)), &texts{of: map[string]string{}})}
	lost := errors.New("expired")
	for _, c := range []struct {
		lock lock
		want string
	}{{lock{name: "r", err: lost}, "expired"}, {lock{name: "s"}, `not on "r"`}} {
		ctx := grpcfence.WithLock(t.Context(), c.lock, "r")
		if _, err := s.call(ctx, "Set", request("r", "text")); err == nil || !strings.Contains(err.Error(), c.want) {
			t.Error(err)
		}
		if _, err := s.conn.NewStream(ctx, &service.Streams[0], "/Texts/Stream"); err == nil || !strings.Contains(err.Error(), c.want) {
			t.Error(err)
		}
	}
}

// TestStreams: a stream needs a pass to begin, and each write in it is checked
// anew.
func TestStreams(t *testing.T) {
	guard := new(fence.Memory)
	s := subject{connect(t, guarded(guard), &texts{guard: guard, of: map[string]string{}})}
	stream := func(ctx context.Context) (send func(text string) error) {
		ctx, cancel := context.WithCancel(ctx)
		t.Cleanup(cancel)
		c, err := s.conn.NewStream(ctx, &service.Streams[0], "/Texts/Stream")
		if err != nil {
			t.Fatal(err)
		}
		return func(text string) error {
			if err := c.SendMsg(request("r", text)); err != nil {
				t.Log(err) // RecvMsg says why
			}
			return c.RecvMsg(new(structpb.ListValue))
		}
	}
	if code, info := refusal(t, stream(t.Context())("none")); code != codes.FailedPrecondition || info.GetReason() != "PASS_REQUIRED" {
		t.Error(code, info)
	}
	if code, info := refusal(t, stream(grpcfence.WithLock(t.Context(), lock{name: "s", pass: fence.Pass{Token: 7, Floor: 7}}, "s"))("s")); code != codes.InvalidArgument || info.GetReason() != "ANOTHER_RESOURCE" {
		t.Error(code, info)
	}
	send := stream(grpcfence.WithLock(t.Context(), lock{name: "r", pass: fence.Pass{Token: 7, Floor: 7}}, "r"))
	if err := send("a"); err != nil {
		t.Fatal(err)
	}
	if err := guard.Raise(t.Context(), "r", fence.Pass{Token: 8, Floor: 8}); err != nil {
		t.Fatal(err)
	}
	for what, send := range map[string]func(string) error{
		"in the middle": send,
		"at the start":  stream(grpcfence.WithLock(t.Context(), lock{name: "r", pass: fence.Pass{Token: 7, Floor: 7}}, "r")),
	} {
		err := send("late")
		var stale *fence.StaleError
		if !errors.As(err, &stale) || *stale != (fence.StaleError{Resource: "r", Token: 7, Stored: 8}) || status.Code(err) != codes.FailedPrecondition {
			t.Errorf("%s: %v", what, err)
		}
	}
	if text, err := s.Read(t.Context(), "r"); err != nil || text != "a" {
		t.Errorf("read %q, %v", text, err)
	}
}

func TestErrorFromOthers(t *testing.T) {
	plain := errors.New("plain")
	bare, err := status.New(codes.FailedPrecondition, "x").WithDetails(&errdetails.ErrorInfo{Reason: grpcfence.ReasonStale, Domain: "another"})
	if err != nil {
		t.Fatal(err)
	}
	for _, err := range []error{nil, plain, status.Error(codes.FailedPrecondition, "x"), bare.Err()} {
		if got := grpcfence.ErrorFrom(err, "r"); got != err {
			t.Errorf("%v became %v", err, got)
		}
	}
}

// A server that keeps its handlers for the holders of locks, and a client that
// shows its lock's pass.
func Example() {
	var guard fence.Memory // right for what lives in this process only
	interceptor := grpcfence.Interceptor{
		Guard:    &guard,
		Resource: func(_ context.Context, _ string, req any) string { return field(req.(*structpb.ListValue), 0) },
	}
	l := bufconn.Listen(1 << 16)
	srv := grpc.NewServer(grpc.UnaryInterceptor(interceptor.Unary()), grpc.StreamInterceptor(interceptor.Stream()))
	srv.RegisterService(&service, &texts{of: map[string]string{}})
	done := make(chan error)
	go func() { done <- srv.Serve(l) }()
	defer func() { srv.Stop(); <-done }()

	conn, err := grpc.NewClient("passthrough:///texts", grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithContextDialer(func(ctx context.Context, _ string) (net.Conn, error) { return l.DialContext(ctx) }),
		grpc.WithUnaryInterceptor(grpcfence.UnaryClientInterceptor()))
	if err != nil {
		panic(err)
	}
	defer conn.Close()

	// In a program these are *client.Lock.
	bob, alice := lock{"greeting", fence.Pass{Token: 8, Floor: 8}, nil}, lock{"greeting", fence.Pass{Token: 7, Floor: 7}, nil}
	for _, l := range []lock{bob, alice} {
		ctx := grpcfence.WithLock(context.Background(), l, "greeting")
		err := conn.Invoke(ctx, "/Texts/Set", request("greeting", "hello"), new(structpb.ListValue))
		var stale *fence.StaleError
		fmt.Println(status.Code(err), errors.As(err, &stale))
	}
	// Output:
	// OK false
	// FailedPrecondition true
}
