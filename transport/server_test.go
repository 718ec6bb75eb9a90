package transport

import (
	"context"
	"fmt"
	"net"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"
	"go.uber.org/zap/zaptest/observer"
	"golang.org/x/net/http2"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	healthpb "google.golang.org/grpc/health/grpc_health_v1"
	reflectionpb "google.golang.org/grpc/reflection/grpc_reflection_v1"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/encoding/protowire"

	"github.com/distlock/distlock/internal/http2test"
	"github.com/distlock/distlock/lease"
	"github.com/distlock/distlock/lease/machine"
	pb "github.com/distlock/distlock/proto/distlock/v1"
)

// TestWorkersBoundWhatIsWorkedOn: with a bound of 3, no more than 3 of 20
// requests are worked on at once; without one, all are.
func TestWorkersBoundWhatIsWorkedOn(t *testing.T) {
	const asked = 20
	for _, bound := range []int{3, 0} {
		t.Run(fmt.Sprint("bound ", bound), func(t *testing.T) {
			entered, proceed := make(chan struct{}, asked), make(chan struct{})
			var now, most atomic.Int64
			r := serve(t, Config{Workers: bound, Manager: &manager{
				// Putting a list together is work.
				locks: func(ctx context.Context, _ string, _ int) ([]lease.LockInfo, bool, error) {
					n := now.Add(1)
					defer now.Add(-1)
					for m := most.Load(); n > m && !most.CompareAndSwap(m, n); m = most.Load() {
					}
					entered <- struct{}{}
					<-proceed
					return nil, false, nil
				},
			}})
			ctx := soon(t)
			var group sync.WaitGroup
			for range asked {
				group.Add(1)
				go func() {
					defer group.Done()
					if _, err := r.locks().List(ctx, &pb.ListRequest{}); err != nil {
						t.Error(err)
					}
				}()
			}
			if bound == 0 {
				for range asked { // all at once, or this never ends
					<-entered
				}
				close(proceed)
			} else {
				for range bound {
					<-entered
				}
				close(proceed)
			}
			group.Wait()
			if got := int(most.Load()); bound > 0 && got != bound || bound == 0 && got != asked {
				t.Errorf("%d of %d requests were worked on at once", got, asked)
			}
		})
	}
}

// TestWaitingOccupiesNoWorker: with a single worker and many calls parked in a
// queue or at the log, a release and a read are served.
func TestWaitingOccupiesNoWorker(t *testing.T) {
	const parked = 50
	entered, granted := make(chan struct{}, 2*parked), make(chan struct{})
	r := serve(t, Config{Workers: 1, Manager: &manager{
		acquire: func(ctx context.Context, _ lease.AcquireRequest) (lease.Hold, error) {
			entered <- struct{}{}
			<-granted
			return lease.Hold{Hold: machine.Hold{Token: 1}}, nil
		},
		grant: func(context.Context, lease.GrantLeaseRequest) (lease.LeaseInfo, error) {
			entered <- struct{}{}
			<-granted // the log
			return lease.LeaseInfo{}, nil
		},
		release: func(context.Context, lease.ReleaseRequest) error { return nil },
		locks:   func(context.Context, string, int) ([]lease.LockInfo, bool, error) { return nil, false, nil },
	}})
	ctx := soon(t)
	var group sync.WaitGroup
	for range parked {
		group.Add(2)
		go func() {
			defer group.Done()
			if _, err := r.locks().Acquire(ctx, &pb.AcquireRequest{}); err != nil {
				t.Error(err)
			}
		}()
		go func() {
			defer group.Done()
			if _, err := r.leases().Grant(ctx, &pb.GrantRequest{}); err != nil {
				t.Error(err)
			}
		}()
	}
	for range 2 * parked {
		<-entered
	}
	if _, err := r.locks().Release(ctx, &pb.ReleaseRequest{}); err != nil {
		t.Errorf("release beside %d waiting calls: %v", 2*parked, err)
	}
	if _, err := r.locks().List(ctx, &pb.ListRequest{}); err != nil {
		t.Errorf("list beside %d waiting calls: %v", 2*parked, err)
	}
	close(granted)
	group.Wait()
}

// TestPanicEndsOnlyItsCall: the only worker is not lost either.
func TestPanicEndsOnlyItsCall(t *testing.T) {
	core, logged := observer.New(zapcore.ErrorLevel)
	r := serve(t, Config{Workers: 1, Logger: zap.New(core), Manager: &manager{
		acquire: func(context.Context, lease.AcquireRequest) (lease.Hold, error) { panic("acquire") },
		locks:   func(context.Context, string, int) ([]lease.LockInfo, bool, error) { panic("locks") },
		release: func(context.Context, lease.ReleaseRequest) error { return nil },
	}})
	ctx := soon(t)
	for range 3 {
		if _, err := r.locks().Acquire(ctx, &pb.AcquireRequest{}); status.Code(err) != codes.Internal {
			t.Fatalf("a panic while waiting was answered %v", err)
		}
		if _, err := r.locks().List(ctx, &pb.ListRequest{}); status.Code(err) != codes.Internal {
			t.Fatalf("a panic while working was answered %v", err)
		}
	}
	// Watch of this manager panics too: it has none.
	watch, err := r.locks().Watch(ctx, &pb.WatchRequest{})
	if err == nil {
		_, err = watch.Recv()
	}
	if status.Code(err) != codes.Internal {
		t.Errorf("a panic in a stream was answered %v", err)
	}
	if _, err := r.locks().Release(ctx, &pb.ReleaseRequest{}); err != nil {
		t.Errorf("after the panics: %v", err)
	}
	if logged.Len() != 7 || logged.All()[0].ContextMap()["method"] != "/distlock.v1.LockService/Acquire" {
		t.Errorf("logged %v", logged.All())
	}
}

// raw is a codec that sends bytes as they are.
type raw struct{}

func (raw) Marshal(v any) ([]byte, error)      { return v.([]byte), nil }
func (raw) Unmarshal(data []byte, v any) error { *v.(*[]byte) = data; return nil }
func (raw) Name() string                       { return "proto" }

// TestUndecodableRequestsAreInvalid: gRPC by itself would say INTERNAL.
func TestUndecodableRequestsAreInvalid(t *testing.T) {
	r := serve(t, Config{Manager: &manager{}, MaxMessageBytes: 1000})
	text := func(number protowire.Number, s string) []byte {
		return protowire.AppendString(protowire.AppendTag(nil, number, protowire.BytesType), s)
	}
	const acquire, get, create = "/distlock.v1.LockService/Acquire", "/distlock.v1.LockService/Get", "/distlock.Distlock/CreateLock"
	for _, c := range []struct {
		what, method string
		data         []byte
		field, says  string
	}{
		{"name", acquire, text(1, "a\xff"), "names", "names: must be valid UTF-8"},
		{"owner after a good name", acquire, append(text(1, "a"), text(6, "\xc3\x28")...), "owner", "owner: must be valid UTF-8"},
		{"metadata's key", acquire, text(13, string(text(1, "\xff"))), "metadata", "metadata: must be valid UTF-8"},
		{"metadata's value", acquire, text(13, string(append(text(1, "k"), text(2, "\xff")...))), "metadata", "metadata: must be valid UTF-8"},
		{"get", get, text(1, "\xed\xa0\x80"), "name", "name: must be valid UTF-8"},
		{"the original's key", create, text(1, "\xff"), "key", "key: must be valid UTF-8"},
		{"garbage", acquire, []byte{0xff, 0xff, 0xff}, "request", "request: is not a message of this method"},
		{"cut short", acquire, text(1, "name")[:3], "request", "request: is not a message of this method"},
		{"too long", acquire, text(1, strings.Repeat("n", 998)), "request", "request: must be at most 1000 bytes, and is 1001"},
	} {
		t.Run(c.what, func(t *testing.T) {
			var out []byte
			err := r.conn.Invoke(soon(t), c.method, c.data, &out, grpc.ForceCodec(raw{}))
			s := status.Convert(err)
			if s.Code() != codes.InvalidArgument || s.Message() != c.says {
				t.Errorf("answered %v", err)
			}
			if p := problemIn(s); p.GetField() != c.field || infoOf(s).GetReason() != "INVALID_ARGUMENT" {
				t.Errorf("details %v", s.Details())
			}
		})
	}
	t.Run("watch", func(t *testing.T) {
		s, err := r.conn.NewStream(soon(t), &grpc.StreamDesc{ServerStreams: true}, "/distlock.v1.LockService/Watch", grpc.ForceCodec(raw{}))
		if err != nil {
			t.Fatal(err)
		}
		if err := s.SendMsg(text(1, "\xff")); err != nil {
			t.Fatal(err)
		}
		s.CloseSend()
		var out []byte
		if s := status.Convert(s.RecvMsg(&out)); s.Code() != codes.InvalidArgument || problemIn(s).GetField() != "prefix" {
			t.Errorf("answered %v", s)
		}
	})
	t.Run("far too long", func(t *testing.T) {
		var out []byte
		err := r.conn.Invoke(soon(t), acquire, text(1, strings.Repeat("n", 5000)), &out, grpc.ForceCodec(raw{}))
		if status.Code(err) != codes.ResourceExhausted {
			t.Errorf("answered %v", err)
		}
	})
}

// TestConversionRefuses what no lease.AcquireRequest can say.
func TestConversionRefuses(t *testing.T) {
	huge := protoDuration(0)
	huge.Seconds = 1 << 50
	for field, r := range map[string]*pb.AcquireRequest{
		"mode":       {Mode: 9},
		"ttl":        {Ttl: huge},
		"wait":       {Wait: protoDuration(-1)},
		"lock_delay": {LockDelay: huge},
	} {
		if _, err := new(operations).of(r); problemIn(status.Convert(toStatus(err))).GetField() != field {
			t.Errorf("%v: %v", r, err)
		}
	}
	if _, err := new(operations).of(&pb.AcquireRequest{Wait: protoDuration(1), WaitForever: true}); err == nil {
		t.Error("wait and wait_forever go together")
	}
	years := 100 * 365 * 24 * time.Hour
	if op, err := new(operations).of(&pb.AcquireRequest{Ttl: protoDuration(years)}); err != nil || op.(*lease.AcquireRequest).TTL != years {
		t.Errorf("100 years: %v %v", op, err)
	}
}

// TestStreamsPerConnectionAreBounded: further calls wait their turn at the
// client, and other connections do not notice.
func TestStreamsPerConnectionAreBounded(t *testing.T) {
	const bound, asked = 4, 12
	var now, most atomic.Int64
	entered, proceed := make(chan struct{}, asked), make(chan struct{})
	r := serve(t, Config{MaxStreams: bound, Manager: &manager{
		acquire: func(context.Context, lease.AcquireRequest) (lease.Hold, error) {
			n := now.Add(1)
			defer now.Add(-1)
			for m := most.Load(); n > m && !most.CompareAndSwap(m, n); m = most.Load() {
			}
			entered <- struct{}{}
			<-proceed
			return lease.Hold{}, nil
		},
		release: func(context.Context, lease.ReleaseRequest) error { return nil },
	}})
	ctx := soon(t)
	// The bound reaches the client with the connection's settings.
	if _, err := r.locks().Release(ctx, &pb.ReleaseRequest{}); err != nil {
		t.Fatal(err)
	}
	var group sync.WaitGroup
	for range asked {
		group.Add(1)
		go func() {
			defer group.Done()
			if _, err := r.locks().Acquire(ctx, &pb.AcquireRequest{}); err != nil {
				t.Error(err)
			}
		}()
	}
	for range bound {
		<-entered
	}
	other := dial(t, r.address)
	defer other.Close()
	if _, err := pb.NewLockServiceClient(other).Release(ctx, &pb.ReleaseRequest{}); err != nil {
		t.Errorf("on another connection: %v", err)
	}
	close(proceed)
	group.Wait()
	if most.Load() != bound {
		t.Errorf("%d calls were under way at once on one connection", most.Load())
	}
}

// TestTooManyPingsEndTheConnection, and no other.
func TestTooManyPingsEndTheConnection(t *testing.T) {
	r := serve(t, Config{Manager: &manager{
		release: func(context.Context, lease.ReleaseRequest) error { return nil },
	}})
	framer := http2test.Dial(t, r.address)
	go func() {
		for framer.WritePing(false, [8]byte{}) == nil { // until it is cut
		}
	}()
	for {
		frame, err := framer.ReadFrame()
		if err != nil {
			t.Fatalf("cut without a word: %v", err)
		}
		if away, ok := frame.(*http2.GoAwayFrame); ok {
			if away.ErrCode != http2.ErrCodeEnhanceYourCalm {
				t.Errorf("sent away with %v", away.ErrCode)
			}
			break
		}
	}
	if _, err := r.locks().Release(soon(t), &pb.ReleaseRequest{}); err != nil {
		t.Errorf("another connection: %v", err)
	}
}

// TestWindowsAreOfAFixedSize: gRPC would measure the way to each client by a
// ping with every message, and let it fill up to 16 MiB: whoever sends giants
// would keep the server from the others.
func TestWindowsAreOfAFixedSize(t *testing.T) {
	r := serve(t, Config{Manager: &manager{
		release: func(context.Context, lease.ReleaseRequest) error { return nil },
	}})
	framer := http2test.Dial(t, r.address)
	framer.Call(pb.LockService_Release_FullMethodName, &pb.ReleaseRequest{})
	window := uint32(0)
	for answered := false; !answered; {
		frame, err := framer.ReadFrame()
		if err != nil {
			t.Fatal(err)
		}
		switch f := frame.(type) {
		case *http2.SettingsFrame:
			if v, ok := f.Value(http2.SettingInitialWindowSize); ok {
				window = v
			}
		case *http2.PingFrame:
			t.Error("a ping with a message")
		case *http2.HeadersFrame:
			answered = f.StreamEnded()
		}
	}
	if window != streamWindow {
		t.Errorf("the window of a stream is %d bytes", window)
	}
}

// bulky is a page of locks that takes about 800 KiB each on the wire.
func bulky(after string, limit int) ([]lease.LockInfo, bool, error) {
	first := 0
	if after != "" {
		fmt.Sscanf(after, "lock-%d", &first)
		first++
	}
	var list []lease.LockInfo
	for n := first; n < 20 && len(list) < limit; n++ {
		k := lease.LockInfo{Lock: machine.Lock{Name: fmt.Sprintf("lock-%02d", n), WaiterCount: 100}}
		for range 100 {
			k.Waiters = append(k.Waiters, machine.Waiter{Metadata: []machine.Meta{{Key: "k", Value: strings.Repeat("v", 4000)}}})
		}
		k.Holders = make([]machine.Holder, 100)
		for i := range k.Holders {
			k.Holders[i].Metadata = k.Waiters[i].Metadata
		}
		list = append(list, k)
	}
	return list, len(list) > 0 && list[len(list)-1].Name != "lock-19", nil
}

// TestPagesAreBoundedInSize: a client accepts 4 MiB at once unless told
// otherwise, and sees everything all the same.
func TestPagesAreBoundedInSize(t *testing.T) {
	r := serve(t, Config{Manager: &manager{
		locks: func(_ context.Context, after string, limit int) ([]lease.LockInfo, bool, error) {
			return bulky(after, limit)
		},
	}})
	var names []string
	req := &pb.ListRequest{PageSize: 1000}
	pages := 0
	for {
		resp, err := r.locks().List(soon(t), req)
		if err != nil {
			t.Fatal(err)
		}
		if resp.GetRevision() != 7 {
			t.Errorf("revision %d", resp.GetRevision())
		}
		for _, k := range resp.GetLocks() {
			names = append(names, k.GetName())
		}
		pages++
		if req.PageToken = resp.GetNextPageToken(); req.PageToken == "" {
			break
		}
	}
	for n, name := range names {
		if want := fmt.Sprintf("lock-%02d", n); name != want {
			t.Fatalf("place %d has %s, want %s", n, name, want)
		}
	}
	if len(names) != 20 || pages != 10 {
		t.Errorf("%d locks in %d pages", len(names), pages)
	}
	for _, bad := range []*pb.ListRequest{{PageSize: -1}, {PageSize: 1001}, {PageToken: "%"}} {
		if _, err := r.locks().List(soon(t), bad); status.Code(err) != codes.InvalidArgument {
			t.Errorf("%v: %v", bad, err)
		}
	}
}

// TestLeaseOfManyHolds shows some and counts all.
func TestLeaseOfManyHolds(t *testing.T) {
	r := serve(t, Config{Manager: &manager{lease: func(id lease.ID) (lease.LeaseInfo, error) {
		info := lease.LeaseInfo{Lease: machine.Lease{ID: id, Holds: make([]machine.Hold, 100_000)}}
		for range 60 {
			info.Waits = append(info.Waits, machine.Wait{Names: []string{"a", "b", "c"}})
		}
		return info, nil
	}}})
	resp, err := r.leases().Get(soon(t), &pb.GetLeaseRequest{LeaseId: 4})
	if err != nil {
		t.Fatal(err)
	}
	l := resp.GetLease()
	if len(l.GetHolds()) != 100 || l.GetHoldCount() != 100_000 || len(l.GetWaitingFor()) != 100 || l.GetWaitingCount() != 180 {
		t.Errorf("%d holds of %d, %d waits of %d", len(l.GetHolds()), l.GetHoldCount(), len(l.GetWaitingFor()), l.GetWaitingCount())
	}
}

// TestKeepAliveAnswersEachLease: the lost ones with their reason; an error of
// the whole is the call's.
func TestKeepAliveAnswersEachLease(t *testing.T) {
	r := serve(t, Config{Manager: &manager{keep: func(ids []lease.ID) ([]lease.KeepAlive, error) {
		if ids[0] == 66 {
			return nil, lease.ErrStopping
		}
		return []lease.KeepAlive{
			{Lease: ids[0], TTL: time.Second},
			{Lease: ids[1], Err: &lease.Refusal{Reason: machine.ReasonLeaseEnded, Lease: ids[1], Ended: &machine.Ended{Cause: machine.EndRevoked, By: "ann"}}},
		}, nil
	}}})
	resp, err := r.leases().KeepAlive(soon(t), &pb.KeepAliveRequest{LeaseIds: []uint64{4, 5}})
	if err != nil {
		t.Fatal(err)
	}
	list := resp.GetResults()
	if len(list) != 2 || list[0].GetLeaseId() != 4 || list[0].GetTtl().AsDuration() != time.Second || list[0].GetProblem() != nil {
		t.Errorf("the live one: %v", list)
	}
	if p := list[1].GetProblem(); list[1].GetTtl() != nil || p.GetReason() != "LEASE_ENDED" || p.GetCause() != pb.EndCause_END_CAUSE_REVOKED || p.GetBy() != "ann" {
		t.Errorf("the lost one: %v", list[1])
	}
	if _, err := r.leases().KeepAlive(soon(t), &pb.KeepAliveRequest{LeaseIds: []uint64{66}}); status.Code(err) != codes.Unavailable {
		t.Errorf("while stopping: %v", err)
	}
	if _, err := r.leases().KeepAlive(soon(t), &pb.KeepAliveRequest{LeaseIds: make([]uint64, maxKeepAlive+1)}); status.Code(err) != codes.InvalidArgument {
		t.Errorf("too many at once: %v", err)
	}
}

func TestHealthAndReflection(t *testing.T) {
	r := serve(t, Config{Manager: &manager{}})
	ctx := soon(t)
	health := healthpb.NewHealthClient(r.conn)
	for _, serving := range []bool{false, true, false} {
		want := healthpb.HealthCheckResponse_NOT_SERVING
		if serving {
			want = healthpb.HealthCheckResponse_SERVING
		}
		r.SetServing(serving)
		for _, service := range []string{"", "distlock.v1.LockService", "distlock.Distlock"} {
			resp, err := health.Check(ctx, &healthpb.HealthCheckRequest{Service: service})
			if err != nil || resp.GetStatus() != want {
				t.Errorf("service %q: %v, %v", service, resp, err)
			}
		}
	}
	s, err := reflectionpb.NewServerReflectionClient(r.conn).ServerReflectionInfo(ctx)
	if err != nil {
		t.Fatal(err)
	}
	if err := s.Send(&reflectionpb.ServerReflectionRequest{MessageRequest: &reflectionpb.ServerReflectionRequest_ListServices{}}); err != nil {
		t.Fatal(err)
	}
	resp, err := s.Recv()
	if err != nil {
		t.Fatal(err)
	}
	found := map[string]bool{}
	for _, service := range resp.GetListServicesResponse().GetService() {
		found[service.GetName()] = true
	}
	for _, name := range []string{"distlock.v1.LockService", "distlock.v1.LeaseService", "distlock.v1.ClusterService", "distlock.Distlock", "grpc.health.v1.Health"} {
		if !found[name] {
			t.Errorf("reflection does not list %s", name)
		}
	}
	s.CloseSend()
}

// TestStopIsBounded: a call that does not end is cut, a stream is ended, and
// no handler is left running.
func TestStopIsBounded(t *testing.T) {
	var left atomic.Bool
	entered := make(chan struct{})
	r := serve(t, Config{Manager: &manager{
		acquire: func(ctx context.Context, _ lease.AcquireRequest) (lease.Hold, error) {
			close(entered)
			<-ctx.Done()
			left.Store(true)
			return lease.Hold{}, context.Cause(ctx)
		},
	}})
	watching, err := healthpb.NewHealthClient(r.conn).Watch(soon(t), &healthpb.HealthCheckRequest{})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := watching.Recv(); err != nil {
		t.Fatal(err)
	}
	cut := make(chan error, 1)
	go func() {
		_, err := r.locks().Acquire(soon(t), &pb.AcquireRequest{})
		cut <- err
	}()
	<-entered
	ctx, cancel := context.WithCancel(context.Background())
	go func() {
		if _, err := watching.Recv(); status.Code(err) != codes.Unavailable || infoOf(status.Convert(err)).GetReason() != "STOPPING" {
			t.Errorf("the stream ended with %v", err)
		}
		cancel() // the bound: the stream has ended, the call has not
	}()
	r.Stop(ctx)
	if !left.Load() {
		t.Error("a handler is still running")
	}
	if err := <-cut; status.Code(err) != codes.Unavailable {
		t.Errorf("the call was answered %v", err)
	}
}

// TestOnlyALostConnectionDetaches: the manager learns whether a client has
// cancelled, run out of time, or was lost.
func TestOnlyALostConnectionDetaches(t *testing.T) {
	entered, causes := make(chan struct{}), make(chan error, 1)
	r := serve(t, Config{Manager: &manager{
		acquire: func(ctx context.Context, _ lease.AcquireRequest) (lease.Hold, error) {
			entered <- struct{}{}
			<-ctx.Done()
			causes <- context.Cause(ctx)
			return lease.Hold{}, context.Cause(ctx)
		},
	}})
	ask := func(conn *grpc.ClientConn, ctx context.Context) chan error {
		done := make(chan error, 1)
		go func() {
			_, err := pb.NewLockServiceClient(conn).Acquire(ctx, &pb.AcquireRequest{})
			done <- err
		}()
		<-entered
		return done
	}

	ctx, cancel := context.WithCancel(soon(t))
	done := ask(r.conn, ctx)
	cancel()
	if cause := <-causes; cause != context.Canceled {
		t.Errorf("a cancelled call: %v", cause)
	}
	<-done

	ctx, cancel = context.WithTimeout(soon(t), 50*time.Millisecond)
	defer cancel()
	done = ask(r.conn, ctx)
	if cause := <-causes; cause != context.DeadlineExceeded && cause != context.Canceled { // whichever arrives first
		t.Errorf("a call out of time: %v", cause)
	}
	<-done

	conns := make(chan net.Conn, 1)
	lossy := dial(t, r.address, grpc.WithContextDialer(func(ctx context.Context, address string) (net.Conn, error) {
		conn, err := (&net.Dialer{}).DialContext(ctx, "tcp", address)
		if err == nil {
			select {
			case conns <- conn:
			default:
			}
		}
		return conn, err
	}))
	defer lossy.Close()
	done = ask(lossy, soon(t))
	(<-conns).Close()
	if cause := <-causes; cause != lease.ErrDetached {
		t.Errorf("a lost connection: %v", cause)
	}
	if err := <-done; status.Code(err) != codes.Unavailable {
		t.Errorf("the client of a lost connection got %v", err)
	}
}

// The first answer on a stream, and each renewal that is a call of its own, tell
// which cluster answers.
func TestAnswersTellTheCluster(t *testing.T) {
	node := func() Node { return Node{ID: "n1", ClusterID: "6fa1"} }
	r := serve(t, Config{Manager: running(t), Node: node})
	kept, err := r.leases().KeepAlive(t.Context(), &pb.KeepAliveRequest{LeaseIds: []uint64{1}})
	if err != nil || kept.GetClusterId() != "6fa1" {
		t.Errorf("%v, %v", kept, err)
	}
	stream, err := pb.NewStreamServiceClient(r.conn).Multiplex(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{"6fa1", "", ""} {
		op := &pb.Operation{Id: 1, Call: &pb.Operation_KeepAlive{KeepAlive: &pb.KeepAliveRequest{LeaseIds: []uint64{1}}}}
		if err := stream.Send(&pb.MultiplexRequest{Operations: []*pb.Operation{op}}); err != nil {
			t.Fatal(err)
		}
		msg, err := stream.Recv()
		if err != nil {
			t.Fatal(err)
		}
		if msg.GetClusterId() != want || len(msg.GetAnswers()) != 1 || msg.GetAnswers()[0].GetKeepAlive().GetClusterId() != "" {
			t.Errorf("%v, want the cluster %q", msg, want)
		}
	}
}
