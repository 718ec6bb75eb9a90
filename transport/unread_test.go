package transport

import (
	"context"
	"fmt"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"go.uber.org/zap"

	"github.com/distlock/distlock/internal/http2test"
	"github.com/distlock/distlock/lease"
	"github.com/distlock/distlock/lease/machine"
	pb "github.com/distlock/distlock/proto/distlock/v1"
)

// large is a manager with a list of about 1 MiB, and tells how often it was asked.
func large() (*manager, *atomic.Int64) {
	var asked atomic.Int64
	list := make([]lease.LockInfo, 250)
	for i := range list {
		list[i] = lease.LockInfo{Lock: machine.Lock{Name: fmt.Sprint("lock/", i), Holders: []machine.Holder{{
			Token: 1, Metadata: []machine.Meta{{Key: "pad", Value: strings.Repeat("x", 4000)}},
		}}}}
	}
	return &manager{
		locks: func(context.Context, string, int) ([]lease.LockInfo, bool, error) {
			asked.Add(1)
			return list, false, nil
		},
		keep: func(ids []lease.ID) ([]lease.KeepAlive, error) { return make([]lease.KeepAlive, 5*len(ids)), nil },
	}, &asked
}

func soonTrue(t *testing.T, what string, ok func() bool) {
	t.Helper()
	for until := time.Now().Add(20 * time.Second); !ok(); time.Sleep(time.Millisecond) {
		if time.Now().After(until) {
			t.Fatalf("%s: not within 20s", what)
		}
	}
}

// TestAnswersThatNobodyReadsAreBounded: lists that their client does not read make
// those that it asks for after them wait. A renewal beside them does not, and once
// they are read everything is answered.
func TestAnswersThatNobodyReadsAreBounded(t *testing.T) {
	m, asked := large()
	r := serve(t, Config{Manager: m, Workers: 5})
	l := http2test.Dial(t, r.address, http2test.Lazy())
	const calls = 200
	var ids []uint32
	for range calls {
		ids = append(ids, l.Call(pb.LockService_List_FullMethodName, &pb.ListRequest{PageSize: 1000}))
	}
	most := r.unread.each>>20 + 1
	soonTrue(t, "there is no room", func() bool { return r.unread.total.Load() >= r.unread.each })
	for range 20 {
		if _, err := r.locks().List(soon(t), &pb.ListRequest{}); err != nil {
			t.Fatalf("another client: %v", err)
		}
	}
	if n := asked.Load() - 20; n > most {
		t.Errorf("%d lists were made of which none was read", n)
	}
	many := &pb.KeepAliveRequest{}
	for i := range 1000 {
		many.LeaseIds = append(many.LeaseIds, uint64(i+1))
	}
	id := l.Call(pb.LeaseService_KeepAlive_FullMethodName, many)
	l.Open(id, 1<<20)
	if n := l.Ended(id); n < 1000 {
		t.Errorf("a renewal was answered with %d bytes", n)
	}
	l.Open(0, 1<<30)
	for _, id := range ids {
		l.Open(id, 4<<20)
	}
	got := make(map[uint32]int)
	for ended := 0; ended < calls; {
		id, n, end := l.Next()
		if got[id] += n; end {
			ended++
		}
	}
	for _, id := range ids {
		if got[id] < 1<<19 {
			t.Errorf("a list has %d bytes", got[id])
		}
	}
	if n := asked.Load() - 20; n != calls {
		t.Errorf("%d lists of %d", n, calls)
	}
	soonTrue(t, "nothing is counted any more", func() bool { return r.unread.total.Load() == 0 })
}

// TestRenewalsThatNobodyReadsAreBounded: what never waits for room is refused, be its
// answers large or small.
func TestRenewalsThatNobodyReadsAreBounded(t *testing.T) {
	m, _ := large()
	var refused atomic.Int64
	r := serveWith(t, Config{Manager: m, Workers: 5, Refused: func(reason string) {
		if reason == ReasonOutcomeUnknown {
			refused.Add(1)
		}
	}}, func(s *Server) { s.unread.each = 64 << 10 })
	for _, ids := range []int{100, 1} {
		refused.Store(0)
		l := http2test.Dial(t, r.address, http2test.Lazy())
		many := &pb.KeepAliveRequest{}
		for i := range ids {
			many.LeaseIds = append(many.LeaseIds, uint64(i+1))
		}
		for range 300 {
			l.Call(pb.LeaseService_KeepAlive_FullMethodName, many)
		}
		soonTrue(t, "some are refused", func() bool { return refused.Load() > 0 })
		if n := r.unread.total.Load(); n > 5*r.unread.each {
			t.Errorf("%d bytes wait", n)
		}
		l.Close()
		soonTrue(t, "nothing is counted any more", func() bool { return r.unread.total.Load() == 0 })
	}
}

// TestAnswersLargerThanTheyLooked: an answer that turns out to take far more than most
// is made again once there is room for it.
func TestAnswersLargerThanTheyLooked(t *testing.T) {
	m, asked := large()
	r := serve(t, Config{Manager: m})
	l := http2test.Dial(t, r.address, http2test.Lazy())
	const calls = 100
	var ids []uint32
	for range calls {
		ids = append(ids, l.Call(pb.LockService_List_FullMethodName, &pb.ListRequest{PageSize: 1}))
	}
	soonTrue(t, "there is no room", func() bool { return r.unread.total.Load() >= r.unread.each })
	if n := r.unread.total.Load(); n > 2*r.unread.each || asked.Load() > calls/2 {
		t.Errorf("%d bytes wait of %d", n, asked.Load())
	}
	l.Open(0, 1<<30)
	for _, id := range ids {
		l.Open(id, 4<<20)
	}
	for ended := 0; ended < calls; {
		if _, _, end := l.Next(); end {
			ended++
		}
	}
	soonTrue(t, "nothing is counted any more", func() bool { return r.unread.total.Load() == 0 })
}

// TestWhoReadsOnIsNotCut: not even when there is no room in all, unless it has not read
// within its patience what waited.
func TestWhoReadsOnIsNotCut(t *testing.T) {
	u := newUnread(zap.NewNop(), func(string) {}, nil)
	cut := make(map[string]bool)
	open := func(from string) *sending {
		s := &sending{box: u.open(from, func() { cut[from] = true })}
		s.box.count(&s.box.waiting, u.inAll)
		return s
	}
	reads := open("reads")
	open("stands")
	now := time.Now()
	for range 8 {
		u.look(now)
		now = now.Add(u.pressed / 4)
		reads.box.mu.Lock()
		reads.box.read += readsOn / 4
		reads.box.mu.Unlock()
	}
	if cut["reads"] || !cut["stands"] {
		t.Errorf("cut: %v", cut)
	}
	for range 8 {
		now = now.Add(u.patience / 4)
		u.look(now)
	}
	if !cut["reads"] {
		t.Error("one that does not come to an end is not cut")
	}
}

// TestSlowReadersAreCut: whoever does not read is cut, and others are not.
func TestSlowReadersAreCut(t *testing.T) {
	m, _ := large()
	var cut atomic.Int64
	r := serveWith(t, Config{Manager: m, Refused: func(reason string) {
		if reason == ReasonSlowReader {
			cut.Add(1)
		}
	}}, func(s *Server) { s.unread.patience, s.unread.pressed = 200*time.Millisecond, 100*time.Millisecond })
	l := http2test.Dial(t, r.address, http2test.Lazy())
	l.Call(pb.LockService_List_FullMethodName, &pb.ListRequest{PageSize: 1000})
	for cut.Load() == 0 {
		if _, err := r.locks().List(soon(t), &pb.ListRequest{}); err != nil {
			t.Fatal(err)
		}
	}
	l.Cut()
	if n := cut.Load(); n != 1 {
		t.Errorf("%d were cut", n)
	}
	soonTrue(t, "nothing is counted any more", func() bool { return r.unread.total.Load() == 0 })
}

// TestSlowReadersOfAllConnections: where all connections together leave no room,
// those are cut of whose answers most is not read, and others go on.
func TestSlowReadersOfAllConnections(t *testing.T) {
	m, _ := large()
	var cut atomic.Int64
	r := serveWith(t, Config{Manager: m, Refused: func(reason string) {
		if reason == ReasonSlowReader {
			cut.Add(1)
		}
	}}, func(s *Server) {
		s.unread.inAll, s.unread.patience, s.unread.pressed = 8<<20, time.Hour, 100*time.Millisecond
	})
	for range 4 {
		l := http2test.Dial(t, r.address, http2test.Lazy())
		for range 10 {
			l.Call(pb.LockService_List_FullMethodName, &pb.ListRequest{PageSize: 1000})
		}
	}
	soonTrue(t, "there is no room", func() bool { return r.unread.total.Load() >= r.unread.inAll || cut.Load() > 0 })
	for range 20 {
		if _, err := r.locks().List(soon(t), &pb.ListRequest{}); err != nil {
			t.Fatalf("another client: %v", err)
		}
	}
	if cut.Load() == 0 {
		t.Error("nobody was cut")
	}
	if n := r.unread.total.Load(); n > r.unread.inAll+(1<<20) {
		t.Errorf("%d bytes wait", n)
	}
}

// TestWhoReadsSlowlyIsNotCut: what counts is that everything is read in time that
// waited at one moment, whatever comes after it.
func TestWhoReadsSlowlyIsNotCut(t *testing.T) {
	u := newUnread(nil, nil, nil)
	b := u.open("", func() {})
	s := &sending{box: b}
	var bufs [][]byte
	put := func() {
		buf := make([]byte, 8<<10)
		s.take(&buf)
		bufs = append(bufs, buf)
	}
	sent := func() {
		s.Put(&bufs[0])
		bufs = bufs[1:]
	}
	now := time.Unix(0, 0)
	put()
	put()
	for range 100 { // never empty
		b.unreadSince(now)
		now = now.Add(u.patience / 4)
		put()
		sent()
		now = now.Add(u.patience / 4)
		put()
		sent()
		if _, since, _ := b.unreadSince(now); since >= u.patience {
			t.Fatalf("unread for %v", since)
		}
	}
	now = now.Add(u.patience)
	if bytes, since, _ := b.unreadSince(now); since < u.patience || bytes != 16<<10 {
		t.Errorf("%d bytes unread for %v", bytes, since)
	}
}

// TestStreamsThatNobodyReads: each stream has one small message at most that waits
// beyond the bound of its connection.
func TestStreamsThatNobodyReads(t *testing.T) {
	u := newUnread(nil, nil, nil)
	b := u.open("", func() {})
	full := &sending{box: b}
	buf := make([]byte, u.each)
	full.take(&buf)
	s := &sending{box: b}
	ended, cancel := context.WithCancel(t.Context())
	cancel()
	if err := s.turn(ended); err != nil {
		t.Errorf("the first message: %v", err)
	}
	first := make([]byte, 8<<10)
	s.take(&first)
	if err := s.turn(ended); err == nil {
		t.Error("a second message went beside the first")
	}
	full.Put(&buf)
	if err := s.turn(ended); err != nil {
		t.Errorf("with room: %v", err)
	}
	s.done()
	s.Put(&first)
	if n := u.total.Load(); n != 0 {
		t.Errorf("%d bytes are still counted", n)
	}
	b.close()
}
