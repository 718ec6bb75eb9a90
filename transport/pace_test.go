package transport

import (
	"bytes"
	"fmt"
	"math/rand/v2"
	"net"
	"net/netip"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/net/http2"
	"google.golang.org/grpc"

	"github.com/distlock/distlock/internal/http2test"
	pb "github.com/distlock/distlock/proto/distlock/v1"
)

// TestWhoIsInDebtIsReadMoreSlowly: who has more done for nothing than is free waits for
// as long as that takes to be earned, or has it answered.
func TestWhoIsInDebtIsReadMoreSlowly(t *testing.T) {
	a := &conn{box: &outbox{}}
	a.since = time.Now()
	check := func(when string, want time.Duration) {
		t.Helper()
		if d := a.pause(); d != want {
			t.Errorf("%s: a pause of %v, not %v", when, d, want)
		}
	}
	a.charge(freeDebt)
	check("within the bound", 0)
	a.charge(debtPerSecond)
	check("beyond it", shortPause)
	a.charge(100 * debtPerSecond)
	check("far beyond it", longPause)
	a.answered.Add(101*debtPerSecond/creditEach + 1)
	check("when as many were answered", 0)
	a.answered.Store(0)
	a.box.read = (101*debtPerSecond/creditEach + 1) * countedBytes
	check("when as much was read", 0)
	a.box.read = 0
	a.since = a.since.Add(-102 * time.Second)
	check("when it has been earned", 0)
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
		c, got := frameCount{skip: len(http2.ClientPreface)}, 0
		for sent.Len() > 0 {
			got += int(c.frames(sent.Next(1 + r.IntN(1+r.IntN(20_000)))))
		}
		if got != n {
			t.Fatalf("%d frames counted of %d", got, n)
		}
	}
}

// TestDebtGoesWithTheAddress: who closes a connection that is in debt and makes another
// has nothing free there, and waits before it is read.
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
	if a.late != shortPause || a.debt.Load() < freeDebt {
		t.Errorf("the next waits %v, a debt of %d", a.late, a.debt.Load())
	}
	// It is served all the same.
	c.Ended(c.Call(pb.LeaseService_KeepAlive_FullMethodName, &pb.KeepAliveRequest{LeaseIds: []uint64{1}}))
}

// TestOpeningForNothing: connections on which nothing is answered are debt of their
// address, and others are not.
func TestOpeningForNothing(t *testing.T) {
	s, from := newSources(), netip.MustParsePrefix("192.0.2.1/32")
	at := time.Now()
	close := func(answered int64) {
		a := account{sources: s, from: from, since: at}
		a.answered.Store(answered)
		a.settle(0)
	}
	for range 100 {
		close(1)
	}
	if n := s.owed(from, at); n != 0 {
		t.Errorf("a debt of %d", n)
	}
	for range 100 {
		close(0)
	}
	if n := s.owed(from, time.Now()); n > 100*costOfOpening || n < 50*costOfOpening {
		t.Errorf("a debt of %d", n)
	}
}

// TestSourcesAreForgotten: a debt is earned, has a bound, and so have those that are
// remembered.
func TestSourcesAreForgotten(t *testing.T) {
	s, at := newSources(), time.Now()
	from := netip.MustParsePrefix("192.0.2.1/32")
	s.add(from, 1<<40, at)
	if n := s.owed(from, at); n != freeDebt+farBeyond {
		t.Errorf("a debt of %d", n)
	}
	if n := s.owed(from, at.Add(time.Second)); n != freeDebt+farBeyond-debtPerSecond {
		t.Errorf("%d of it after a second", n)
	}
	other := func(i int) netip.Prefix { return netip.MustParsePrefix(fmt.Sprintf("10.%d.%d.1/32", i>>8, i&255)) }
	for i := range 2 * mostSources {
		s.add(other(i), 1<<40, at)
	}
	if len(s.m) != mostSources {
		t.Errorf("%d are remembered", len(s.m))
	}
	s.add(from, 1, at.Add(time.Hour))
	if len(s.m) != 1 {
		t.Errorf("%d are remembered when only one owes", len(s.m))
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
	r := serveWith(t, Config{Manager: running(t)}, func(s *Server) { s.seen = func(c *conn) { seen.Store(c) } })
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
		owed := a.debt.Load() - creditEach*(a.answered.Load()+a.box.handed()/countedBytes)
		t.Logf("%s: a debt of %d", what, owed)
		if a.debt.Load() < 100 {
			t.Errorf("%s: no frames are counted", what)
		}
		if owed > freeDebt/4 {
			t.Errorf("%s: a debt of %d", what, owed)
		}
		c.Close()
	}
}
