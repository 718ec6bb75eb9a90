package transport

import (
	"bytes"
	"context"
	"fmt"
	"math/rand/v2"
	"net"
	"net/netip"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/net/http2"
	"google.golang.org/grpc"

	"github.com/distlock/distlock/internal/http2test"
	"github.com/distlock/distlock/lease"
	pb "github.com/distlock/distlock/proto/distlock/v1"
)

// TestWhoIsInDebtIsReadMoreSlowly: who has more done for nothing than is free waits for
// as long as that takes to be earned, or has it answered.
func TestWhoIsInDebtIsReadMoreSlowly(t *testing.T) {
	s := newSources()
	open := func() *conn {
		a := &conn{box: &outbox{}}
		a.openAccount(s, &net.TCPAddr{IP: net.IPv4(192, 0, 2, 1)})
		return a
	}
	a := open()
	check := func(when string, want time.Duration) {
		t.Helper()
		if d, _ := a.pause(); d != want {
			t.Errorf("%s: a pause of %v, not %v", when, d, want)
		}
	}
	a.charge(freeDebt)
	check("within the bound", 0)
	a.charge(debtPerSecond)
	check("beyond it", shortPause)
	a.charge(100 * debtPerSecond)
	check("far beyond it", longPause)
	for range 101 * debtPerSecond / creditEach {
		a.answered()
	}
	check("when as many were answered", 0)
	a.charge(101 * debtPerSecond)
	a.box.read = 102 * debtPerSecond / creditEach * countedBytes
	check("when as much was read", 0)
	a.charge(101 * debtPerSecond)
	check("far beyond it again", longPause)
	a.at = a.at.Add(-102 * time.Second)
	check("when it has been earned", 0)
	// What is earned when there is no debt is not kept.
	for range 1000 {
		a.answered()
	}
	check("after much that was answered", 0)
	a.at = a.at.Add(-time.Hour)
	a.charge(freeDebt + 2*debtPerSecond)
	a.pause()
	a.charge(freeDebt + 2*debtPerSecond)
	check("beyond it after a quiet hour", shortPause)
	// Those of one address earn together, and a new one has little free.
	b := open()
	if b.debt.Load() != freeDebt-costOfOpening {
		t.Errorf("a new one begins with %d", b.debt.Load())
	}
	for range 20 {
		open().charge(1)
	}
	b.charge(costOfOpening + debtPerSecond)
	b.pause()
	if n := b.source.share(0); n != 2 {
		t.Errorf("%d are in debt", n)
	}
	b.at = b.at.Add(-time.Second)
	if owed, _ := b.owed(); owed < debtPerSecond*4/10 || owed > debtPerSecond*6/10 {
		t.Errorf("half a second's is earned of two, and %d of %d is left", owed, debtPerSecond)
	}
	for _, c := range []*conn{a, b} {
		c.debt.Store(0)
		c.pause()
	}
	if n := a.source.sharers; n != 0 {
		t.Errorf("%d are in debt", n)
	}
}

// TestFramesAreCounted: however what is sent is cut into pieces.
func TestFramesAreCounted(t *testing.T) {
	r := rand.New(rand.NewPCG(1, 2))
	for range 200 {
		var sent bytes.Buffer
		sent.WriteString(http2.ClientPreface)
		f, n := http2.NewFramer(&sent, nil), r.IntN(50)
		for range n {
			var err error
			switch r.IntN(3) {
			case 0:
				err = f.WriteSettings(make([]http2.Setting, r.IntN(4))...)
			case 1:
				err = f.WriteData(1, false, make([]byte, r.IntN(3)*r.IntN(10_000)))
			case 2:
				err = f.WritePing(false, [8]byte{})
			}
			if err != nil {
				t.Fatal(err)
			}
		}
		c, got := newReceived(testStreams()), 0
		for sent.Len() > 0 {
			got += int(c.in(sent.Next(1 + r.IntN(1+r.IntN(20_000)))))
		}
		if got != n {
			t.Fatalf("%d frames counted of %d", got, n)
		}
	}
}

// TestDebtGoesWithTheAddress: who closes a connection that is in debt and makes another
// has little free there, and waits before it is read.
func TestDebtGoesWithTheAddress(t *testing.T) {
	var seen atomic.Pointer[conn]
	r := serveWith(t, Config{Manager: running(t)}, func(s *Server) { s.seen = func(c *conn) { seen.Store(c) } })
	open := func() (*http2test.Conn, *conn) {
		t.Helper()
		seen.Store(nil)
		c := http2test.Dial(t, r.address)
		soonTrue(t, "it is accepted", func() bool { return seen.Load() != nil })
		return c, seen.Load()
	}
	c, a := open()
	if a.late != 0 || a.debt.Load() > freeDebt/2 {
		t.Errorf("the first waits %v, a debt of %d", a.late, a.debt.Load())
	}
	a.charge(freeDebt + farBeyond)
	c.Close()
	soonTrue(t, "it is closed", func() bool { return a.closed.Load() })
	c, a = open()
	if a.late != shortPause || a.debt.Load() < freeDebt-costOfOpening {
		t.Errorf("the next waits %v, a debt of %d", a.late, a.debt.Load())
	}
	// It is served all the same.
	c.Ended(c.Call(pb.LeaseService_KeepAlive_FullMethodName, &pb.KeepAliveRequest{LeaseIds: []uint64{1}}))
}

func testStreams() *streams { return newStreams(&calls{}) }

// TestWhatNobodyHasTaken: what comes on a stream is kept until it is taken or the stream
// is over, however what is sent is cut into pieces and padded, and whoever ends it.
func TestWhatNobodyHasTaken(t *testing.T) {
	r := rand.New(rand.NewPCG(3, 4))
	for round := range 300 {
		type stream struct {
			bytes, frames, kept int64
			over                bool
		}
		list := make([]*stream, 1+r.IntN(5))
		f := newReceived(testStreams())
		answers := sent{streams: f.streams}
		check := func(err error) {
			t.Helper()
			if err != nil {
				t.Fatal(err)
			}
		}
		var in, out bytes.Buffer
		in.WriteString(http2.ClientPreface)
		w, v := http2.NewFramer(&in, nil), http2.NewFramer(&out, nil)
		headers := func(w *http2.Framer, i int, end bool) {
			check(w.WriteHeaders(http2.HeadersFrameParam{StreamID: uint32(2*i + 1), EndStream: end, EndHeaders: true, BlockFragment: make([]byte, r.IntN(20))}))
		}
		for i := range list {
			list[i] = &stream{}
			headers(w, i, false)
		}
		flush := func() {
			for in.Len() > 0 {
				f.in(in.Next(1 + r.IntN(1+r.IntN(700))))
			}
			for out.Len() > 0 {
				answers.out(out.Next(1 + r.IntN(20)))
			}
		}
		for range r.IntN(60) * r.IntN(5) {
			i := r.IntN(len(list))
			s, id := list[i], uint32(2*i+1)
			switch r.IntN(20) {
			case 0:
				check(w.WriteRSTStream(id, http2.ErrCodeCancel))
				*s = stream{over: true}
				flush()
			case 1:
				check(v.WriteRSTStream(id, http2.ErrCodeCancel))
				*s = stream{over: true}
				flush()
			case 2:
				headers(v, i, true)
				*s = stream{over: true}
				flush()
			case 3:
				headers(w, i, true)  // trailers
				headers(v, i, false) // the answer's headers
				check(v.WriteData(id, false, make([]byte, r.IntN(50))))
				check(v.WriteWindowUpdate(id, 1<<20))
			case 4, 5, 6:
				flush()
				n := int64(-1)
				if s.bytes > 0 && r.IntN(2) == 0 {
					n = r.Int64N(s.bytes) + 1
				}
				frames := f.streams.taken(id, n)
				if n < 0 {
					n = s.bytes
				}
				if n > 0 {
					gone, kept := s.frames*n/s.bytes, s.kept*n/s.bytes
					if want := min(gone, 2+n>>10); frames != want {
						t.Fatalf("round %d: %d frames are taken, not %d", round, frames, want)
					}
					s.bytes, s.frames, s.kept = s.bytes-n, s.frames-gone, s.kept-kept
				} else if frames != 0 {
					t.Fatalf("round %d: %d frames are taken of nothing", round, frames)
				}
			default:
				data := make([]byte, r.IntN(2)*r.IntN(6000))
				pad := -1
				if r.IntN(3) == 0 {
					pad = r.IntN(50)
					check(w.WriteDataPadded(id, false, data, make([]byte, pad)))
				} else {
					check(w.WriteData(id, false, data))
				}
				if len(data) > 0 && !s.over {
					// The framer leaves padding of no length out.
					length := len(data)
					if pad > 0 {
						length += 1 + pad
					}
					s.bytes, s.frames, s.kept = s.bytes+int64(len(data)), s.frames+1, s.kept+pieceOf(length)
				}
			}
		}
		flush()
		kept, open := int64(0), int64(0)
		for _, s := range list {
			if kept += s.kept; !s.over {
				open++
			}
		}
		all := f.streams.all
		if got := f.streams.bytes(); got != kept || all.kept.Load() != kept || f.streams.count() != open || all.under.Load() != open {
			t.Fatalf("round %d: %d bytes of %d streams are kept, not %d of %d", round, got, f.streams.count(), kept, open)
		}
		f.streams.close()
		if all.under.Load() != 0 || all.kept.Load() != 0 {
			t.Fatalf("round %d: %d streams and %d bytes are counted when it is closed", round, all.under.Load(), all.kept.Load())
		}
	}
}

// TestStreamsHaveNumbers: gRPC tells nobody the number of a call's stream; we find it.
func TestStreamsHaveNumbers(t *testing.T) {
	var got []uint32
	var mu sync.Mutex
	r := serve(t, Config{Manager: &manager{locks: func(ctx context.Context, _ string, _ int) ([]lease.LockInfo, bool, error) {
		mu.Lock()
		defer mu.Unlock()
		got = append(got, streamOf(ctx))
		return nil, false, nil
	}}})
	for range 3 {
		if _, err := r.locks().List(soon(t), &pb.ListRequest{}); err != nil {
			t.Fatal(err)
		}
	}
	if !slices.Equal(got, []uint32{1, 3, 5}) {
		t.Errorf("%v", got)
	}
	if n := streamOf(t.Context()); n != 0 {
		t.Errorf("%d, of no call", n)
	}
}

// TestOpeningForNothing: connections on which nothing is answered are debt of their
// address, and others are not.
func TestOpeningForNothing(t *testing.T) {
	s, from := newSources(), netip.MustParsePrefix("192.0.2.1/32")
	at := time.Now()
	close := func(answered bool) {
		a := conn{}
		a.source = s.open(from, at)
		a.useful.Store(answered)
		a.closeAccount()
	}
	for range 100 {
		close(true)
	}
	if len(s.m) != 0 {
		t.Errorf("%d addresses are remembered", len(s.m))
	}
	for range 100 {
		close(false)
	}
	if n, _ := s.open(from, at).owed(time.Now()); n > 100*costOfOpening || n < 50*costOfOpening {
		t.Errorf("a debt of %d", n)
	}
}

// TestSourcesAreForgotten: a debt is earned, has a bound, and so have those that are
// remembered.
func TestSourcesAreForgotten(t *testing.T) {
	s, at := newSources(), time.Now()
	from := netip.MustParsePrefix("192.0.2.1/32")
	o := s.open(from, at)
	s.open(from, at)
	o.close(1<<40, at)
	if n, _ := o.owed(at); n != freeDebt+farBeyond {
		t.Errorf("a debt of %d", n)
	}
	if n, _ := o.owed(at.Add(time.Second)); n != freeDebt+farBeyond-debtPerSecond {
		t.Errorf("%d of it after a second", n)
	}
	other := func(i int) netip.Prefix { return netip.MustParsePrefix(fmt.Sprintf("10.%d.%d.1/32", i>>8, i&255)) }
	for i := range 2 * mostSources {
		s.open(other(i), at).close(1<<40, at)
	}
	if n := len(s.m); n > mostSources+1 || n < mostSources/2 || s.idle != n-1 {
		t.Errorf("%d are remembered, %d without connections", n, s.idle)
	}
	if s.m[from] != o {
		t.Error("one with a connection is forgotten")
	}
	at = at.Add(time.Hour)
	for i := range mostSources {
		s.open(other(1<<15+i), at).close(1, at)
	}
	if n := len(s.m); n > mostSources+1 || s.idle != n-1 {
		t.Errorf("%d are remembered, %d without connections", n, s.idle)
	}
}

// TestOneAddress: what counts as one.
func TestOneAddress(t *testing.T) {
	for ip, want := range map[string]string{
		"192.0.2.1": "192.0.2.1/32", "::ffff:192.0.2.1": "192.0.2.1/32", "2001:db8::1:2:3:4": "2001:db8::/64",
	} {
		if got := prefixOf(&net.TCPAddr{IP: net.ParseIP(ip), Port: 1, Zone: ""}); got.String() != want {
			t.Errorf("%s: %v, not %s", ip, got, want)
		}
	}
	if got := prefixOf(&net.UnixAddr{}); got.IsValid() {
		t.Errorf("%v", got)
	}
}

// TestWhoIsAnsweredIsNeverInDebt: nothing that a client does that is answered, or a
// wait that it gives up after a while, makes a debt, at any rate.
func TestWhoIsAnsweredIsNeverInDebt(t *testing.T) {
	var seen atomic.Pointer[conn]
	r := serveWith(t, Config{Manager: bounded(t, lease.Bounds{})}, func(s *Server) { s.seen = func(c *conn) { seen.Store(c) } })
	const n = 1000 // makes more frames than are free
	pair := func(locks pb.LockServiceClient, i int) {
		t.Helper()
		got, err := locks.Acquire(soon(t), benchAcquire(i%50))
		if err == nil {
			_, err = locks.Release(soon(t), &pb.ReleaseRequest{LeaseId: got.GetHold().GetLeaseId(), Token: got.GetHold().GetToken()})
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	for what, do := range map[string]func(*grpc.ClientConn){
		"calls": func(c *grpc.ClientConn) {
			for i := range n {
				pair(pb.NewLockServiceClient(c), i)
			}
		},
		"lists": func(c *grpc.ClientConn) {
			for range n {
				if _, err := pb.NewLockServiceClient(c).List(soon(t), &pb.ListRequest{PageSize: 1000}); err != nil {
					t.Fatal(err)
				}
			}
		},
		"a watch": func(c *grpc.ClientConn) {
			w, err := pb.NewLockServiceClient(c).Watch(soon(t), &pb.WatchRequest{})
			if err != nil {
				t.Fatal(err)
			}
			for i := range n {
				pair(r.locks(), i)
				if _, err := w.Recv(); err != nil {
					t.Fatal(err)
				}
			}
		},
		"waits": func(c *grpc.ClientConn) {
			ctx, cancel := context.WithCancel(soon(t))
			var group sync.WaitGroup
			if _, err := r.locks().Acquire(ctx, benchAcquire(99)); err != nil {
				t.Fatal(err)
			}
			for range 90 {
				group.Go(func() { pb.NewLockServiceClient(c).Acquire(ctx, benchAcquire(99)) })
			}
			soonTrue(t, "all wait", func() bool {
				k, err := r.locks().Get(ctx, &pb.GetRequest{Name: "orders/99"})
				return err == nil && k.GetLock().GetWaiterCount() == 90
			})
			time.Sleep(2 * atOnce)
			cancel()
			group.Wait()
		},
		"waits on a stream": func(c *grpc.ClientConn) {
			ctx, cancel := context.WithCancel(soon(t))
			defer cancel()
			if _, err := r.locks().Acquire(ctx, benchAcquire(98)); err != nil {
				t.Fatal(err)
			}
			s, err := pb.NewStreamServiceClient(c).Multiplex(ctx)
			if err != nil {
				t.Fatal(err)
			}
			for id := range uint64(5 * n) { // a message each
				if err := s.Send(&pb.MultiplexRequest{Operations: []*pb.Operation{{
					Id: id + 1, Call: &pb.Operation_Acquire{Acquire: benchAcquire(98)},
				}}}); err != nil {
					t.Fatal(err)
				}
			}
			soonTrue(t, "all wait", func() bool {
				k, err := r.locks().Get(ctx, &pb.GetRequest{Name: "orders/98"})
				return err == nil && k.GetLock().GetWaiterCount() == 5*n
			})
			if owed := seen.Load().debt.Load(); owed > freeDebt/4 {
				t.Errorf("waits on a stream: a debt of %d", owed)
			}
		},
		"a stream": func(c *grpc.ClientConn) {
			s, err := pb.NewStreamServiceClient(c).Multiplex(soon(t))
			if err != nil {
				t.Fatal(err)
			}
			for id := uint64(1); id <= 5*n; {
				last := id + 99
				for ; id <= last; id++ { // a message each
					err := s.Send(&pb.MultiplexRequest{Operations: []*pb.Operation{{
						Id: id, Call: &pb.Operation_KeepAlive{KeepAlive: &pb.KeepAliveRequest{LeaseIds: []uint64{1}}},
					}}})
					if err != nil {
						t.Fatal(err)
					}
				}
				for got := uint64(0); got < last; {
					in, err := s.Recv()
					if err != nil {
						t.Fatal(err)
					}
					for _, a := range in.GetAnswers() {
						got = max(got, a.GetId())
					}
				}
			}
		},
	} {
		seen.Store(nil)
		c := dial(t, r.address)
		c.Connect()
		soonTrue(t, "it is accepted", func() bool { return seen.Load() != nil })
		a := seen.Load()
		do(c)
		owed := a.debt.Load() - creditEach*(a.box.handed()/countedBytes)
		t.Logf("%s: a debt of %d", what, owed)
		if owed > freeDebt/4 {
			t.Errorf("%s: a debt of %d", what, owed)
		}
		if n := a.streams.bytes(); n != 0 {
			t.Errorf("%s: %d bytes of requests have not come whole", what, n)
		}
		c.Close()
	}
}
