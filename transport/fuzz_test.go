package transport

import (
	"context"
	"errors"
	"testing"
	"time"
	"unicode/utf8"

	"github.com/jonboulle/clockwork"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/encoding"
	"google.golang.org/grpc/mem"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/durationpb"

	"github.com/distlock/distlock/lease"
	"github.com/distlock/distlock/lease/machine"
	original "github.com/distlock/distlock/proto/distlock"
	pb "github.com/distlock/distlock/proto/distlock/v1"
)

func protoDuration(d time.Duration) *durationpb.Duration { return durationpb.New(d) }

// decode is what the server does with a request's bytes.
func decode(data []byte, msg proto.Message) error {
	e := envelope{msg: msg}
	if err := (codec{encoding.GetCodecV2("proto"), 1 << 20}).Unmarshal(mem.BufferSlice{mem.SliceBuffer(data)}, &e); err != nil {
		return err
	}
	return e.err
}

// running is a real manager, small enough to be full at times.
func running(f testing.TB) *lease.Manager {
	return bounded(f, lease.Bounds{MaxLeases: 100, MaxLocks: 100, MaxWaiters: 100})
}

func bounded(f testing.TB, bounds lease.Bounds) *lease.Manager {
	store := lease.NewStore(0)
	log := lease.NewMemoryLog(store)
	m, err := lease.New(lease.Config{
		Clock: clockwork.NewFakeClock(), Log: log, Store: store,
		Bounds: bounds,
	})
	if err != nil {
		f.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan error, 1)
	go func() { ended <- m.Run(ctx) }()
	<-m.Ready()
	f.Cleanup(func() {
		cancel()
		<-ended
		log.Close()
	})
	return m
}

func marshal(f *testing.F, msg proto.Message) []byte {
	data, err := proto.Marshal(msg)
	if err != nil {
		f.Fatal(err)
	}
	return data
}

// answered fails the test when a request was answered in a way that no
// request may be.
func answeredAny(t *testing.T, err error) {
	t.Helper()
	if err == nil {
		return
	}
	s := status.Convert(asStatus(err))
	switch s.Code() {
	case codes.Internal, codes.Unknown, codes.OK:
		t.Fatalf("answered %v: %v", s.Code(), err)
	}
	if len(s.Message()) > maxMessage || !utf8.ValidString(s.Message()) {
		t.Fatalf("the message is no text of at most %d bytes: %q", maxMessage, s.Message())
	}
}

// FuzzAcquireRequest: whatever bytes arrive as an Acquire, the answer is a
// grant or a proper refusal, and what gets as far as the machine is sound.
func FuzzAcquireRequest(f *testing.F) {
	for _, r := range []*pb.AcquireRequest{
		{Names: []string{"a"}, Ttl: protoDuration(time.Second)},
		{Names: []string{"a", "b"}, Mode: pb.Mode_MODE_SHARED, Limit: 3, LeaseId: 1, RequestId: 9, LowestOpenRequestId: 4, WaitForever: true},
		{Names: []string{"a", "a"}, Ttl: protoDuration(-1), Wait: protoDuration(1 << 62), Owner: "o", Actor: "x", Metadata: map[string]string{"k": "v"}},
		{Names: []string{""}, Ttl: &durationpb.Duration{Seconds: 1 << 60, Nanos: -5}, LockDelay: protoDuration(time.Hour)},
	} {
		f.Add(marshal(f, r))
	}
	f.Add([]byte("\x0a\x02\xff\xfe"))
	f.Add([]byte("\x0a\xff\xff\xff\xff\xff\xff\xff\xff\xff\x01"))
	m := running(f)
	// The waiters' calls end at once: none stays behind.
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	f.Fuzz(func(t *testing.T, data []byte) {
		var in pb.AcquireRequest
		if err := decode(data, &in); err != nil {
			answeredAny(t, err)
			return
		}
		op, err := new(operations).of(&in)
		if err != nil {
			var invalid *lease.InvalidError
			if !errors.As(err, &invalid) || invalid.Field == "" {
				t.Fatalf("conversion failed with %v", err)
			}
			return
		}
		req := op.(*lease.AcquireRequest)
		req.Attempt = 0 // the call's end undoes it
		if req.Mode != machine.Exclusive && req.Mode != machine.Shared || req.Wait < lease.WaitForever {
			t.Fatalf("converted to %+v", req)
		}
		reply, err := m.Do(ctx, req)
		if answeredAny(t, err); err != nil {
			return
		}
		g := reply.Hold
		if g.Token == 0 || len(g.Locks) != len(req.Names) {
			t.Fatalf("%+v was granted %+v", req, g)
		}
		_, err = m.Do(context.Background(), &lease.AbandonRequest{Lease: g.Lease, Requests: []lease.RequestID{g.Request}})
		if err != nil && g.Request < machine.AnonymousRequest {
			t.Fatal(err)
		}
	})
}

// FuzzRequests sends arbitrary bytes to every other method that changes
// something or reads by name; the first number chooses.
func FuzzRequests(f *testing.F) {
	for method, r := range []proto.Message{
		&pb.ReleaseRequest{Token: 3, LeaseId: 1, Name: "a"},
		&pb.AbandonRequest{RequestId: 1},
		&pb.GetRequest{Name: "a"},
		&pb.ListRequest{Prefix: "a", PageSize: 10, PageToken: "YQ"},
		&pb.CheckTokenRequest{Name: "a", Token: 1},
		&pb.ForceReleaseRequest{Name: "a", By: "me"},
		&pb.GrantRequest{Ttl: protoDuration(time.Second), Owner: "o", RequestId: 5},
		&pb.KeepAliveRequest{LeaseIds: []uint64{1, 2}},
		&pb.RevokeRequest{LeaseId: 1, By: "me"},
		&pb.GetLeaseRequest{LeaseId: 1},
		&pb.ListLeasesRequest{PageToken: "MQ"},
		&original.Lock{Key: "a", Clock: -1},
		&original.AcquireLockRequest{Key: "a", ExpiresInSeconds: -1},
		&original.Lock{Key: "a"},
	} {
		f.Add(uint8(method), marshal(f, r))
	}
	m := running(f)
	d := door{m: m}
	locks, leases, orig := &lockService{door: d}, &leaseService{door: d, cluster: &clusterID{node: func() Node { return Node{} }}}, &originalService{door: d}
	ctx := context.Background()
	f.Fuzz(func(t *testing.T, method uint8, data []byte) {
		answeredAny(t, []func() error{
			func() error { return try(ctx, data, &pb.ReleaseRequest{}, locks.Release) },
			func() error { return try(ctx, data, &pb.AbandonRequest{}, locks.Abandon) },
			func() error { return try(ctx, data, &pb.GetRequest{}, locks.Get) },
			func() error { return try(ctx, data, &pb.ListRequest{}, locks.List) },
			func() error { return try(ctx, data, &pb.CheckTokenRequest{}, locks.CheckToken) },
			func() error { return try(ctx, data, &pb.ForceReleaseRequest{}, locks.ForceRelease) },
			func() error { return try(ctx, data, &pb.GrantRequest{}, leases.Grant) },
			func() error { return try(ctx, data, &pb.KeepAliveRequest{}, leases.KeepAlive) },
			func() error { return try(ctx, data, &pb.RevokeRequest{}, leases.Revoke) },
			func() error { return try(ctx, data, &pb.GetLeaseRequest{}, leases.Get) },
			func() error { return try(ctx, data, &pb.ListLeasesRequest{}, leases.List) },
			func() error { return try(ctx, data, &original.Lock{}, orig.CreateLock) },
			func() error { return try(ctx, data, &original.AcquireLockRequest{}, orig.AcquireLock) },
			func() error { return try(ctx, data, &original.Lock{}, orig.ReleaseLock) },
			func() error { return try(ctx, data, &original.Lock{}, orig.GetLock) },
			func() error { return try(ctx, data, &original.Lock{}, orig.DeleteLock) },
		}[method%16]())
	})
}

func try[Req proto.Message, Resp any](ctx context.Context, data []byte, in Req, call func(context.Context, Req) (Resp, error)) error {
	if err := decode(data, in); err != nil {
		return err
	}
	_, err := call(ctx, in)
	return err
}
