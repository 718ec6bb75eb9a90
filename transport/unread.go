package transport

import (
	"cmp"
	"context"
	"fmt"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"go.uber.org/zap"
	"google.golang.org/grpc/mem"
	"google.golang.org/protobuf/proto"

	"github.com/distlock/distlock/lease"
	original "github.com/distlock/distlock/proto/distlock"
	pb "github.com/distlock/distlock/proto/distlock/v1"
	"github.com/distlock/distlock/proto/wire"
)

// unread bounds what the server keeps for clients that do not read it: gRPC takes
// any answer at once and keeps it until the client's window and its connection
// have room. Answers that may be large have to have room before they are made,
// and a connection whose client does not read is cut.
type unread struct {
	each, inAll int64 // bytes of one connection and of all; large answers wait for room beyond
	// A client that has not read within patience what waits for it now is cut;
	// when there is no room, and it does not read on, after as long as pressed.
	patience, pressed time.Duration

	logger  *zap.Logger
	refused func(reason string)
	also    func(now time.Time) // looks, as often, at what else clients leave undone

	total atomic.Int64  // that waits or has been reserved
	fell  chan struct{} // buffered, one: total has fallen below inAll

	mu    sync.Mutex
	conns map[*outbox]struct{}

	ctx    context.Context // of keep
	cancel context.CancelFunc
	kept   sync.WaitGroup
}

// ReasonSlowReader is the reason under which connections are counted that were
// cut because their clients do not read. Nobody is told.
const ReasonSlowReader = "SLOW_READER"

func newUnread(logger *zap.Logger, refused func(string), also func(time.Time)) *unread {
	ctx, cancel := context.WithCancel(context.Background())
	return &unread{
		ctx: ctx, cancel: cancel,
		each: 4 << 20, inAll: 256 << 20, patience: 30 * time.Second, pressed: time.Second,
		logger: logger, refused: refused, also: also, fell: make(chan struct{}, 1), conns: make(map[*outbox]struct{}),
	}
}

// open returns the outbox of a new connection, which cut closes.
func (u *unread) open(from string, cut func()) *outbox {
	b := &outbox{all: u, from: from, cut: cut}
	u.mu.Lock()
	u.conns[b] = struct{}{}
	u.mu.Unlock()
	return b
}

func (u *unread) add(n int64) {
	if now := u.total.Add(n); n < 0 && now < u.inAll && now-n >= u.inAll {
		select {
		case u.fell <- struct{}{}:
		default:
		}
	}
}

// begin starts the goroutine of keep, and end ends it.
func (u *unread) begin() { u.kept.Go(u.keep) }

func (u *unread) end() {
	u.cancel()
	u.kept.Wait()
}

// keep cuts connections whose clients do not read, and wakes who waits for room in
// all.
func (u *unread) keep() {
	look := time.NewTicker(min(u.patience, u.pressed) / 4)
	defer look.Stop()
	for {
		select {
		case <-u.ctx.Done():
			return
		case <-u.fell:
			for _, b := range u.list() {
				b.wakeAll()
			}
		case now := <-look.C:
			u.look(now)
			u.also(now)
		}
	}
}

func (u *unread) list() []*outbox {
	u.mu.Lock()
	defer u.mu.Unlock()
	list := make([]*outbox, 0, len(u.conns))
	for b := range u.conns {
		list = append(list, b)
	}
	return list
}

// look cuts those whose time is up.
func (u *unread) look(now time.Time) {
	type slow struct {
		*outbox
		bytes int64
		since time.Duration
	}
	var list []slow
	for _, b := range u.list() {
		bytes, since, read := b.unreadSince(now)
		switch {
		case since >= u.patience:
			u.cut(b, bytes, since)
		case since >= u.pressed && float64(read) < since.Seconds()*readsOn:
			list = append(list, slow{b, bytes, since})
		}
	}
	slices.SortFunc(list, func(a, b slow) int { return cmp.Compare(b.bytes, a.bytes) })
	for _, s := range list {
		if u.total.Load() < u.inAll {
			return
		}
		u.cut(s.outbox, s.bytes, s.since)
	}
}

func (u *unread) cut(b *outbox, bytes int64, since time.Duration) {
	u.logger.Warn("cutting a connection: its client does not read the answers",
		zap.String("from", b.from), zap.Int64("bytes", bytes), zap.Duration("for", since))
	u.refused(ReasonSlowReader)
	b.cut()
	b.close() // gRPC notices later, and what others wait for is there now
}

// readsOn is how many bytes a second whoever reads on takes at least: when there is no
// room in all, it is not cut before its patience ends.
const readsOn = 128 << 10

// outbox is what waits to be read by the client of one connection. The nil outbox
// has no bound.
type outbox struct {
	all  *unread
	from string
	cut  func()

	mu       sync.Mutex
	waiting  int64 // bytes given to gRPC and not handed to the connection yet
	reserved int64 // for answers that are being made
	wake     chan struct{}
	closed   bool
	read     int64 // bytes handed over so far

	// The keeper's: what waited at a time has been read once read gets from
	// start to mark.
	since       time.Time
	start, mark int64
}

// full refuses an answer that does not wait for room when very much waits. What was
// asked has been done: it may be asked again.
func (b *outbox) full() error {
	if b == nil {
		return nil
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.waiting > manyAnswers*b.all.each {
		return lease.ErrOutcomeUnknown
	}
	return nil
}

// handed is how many bytes the client has been sent in counted messages, each at
// least countedBytes.
func (b *outbox) handed() int64 {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.read
}

// room returns nil if there is room, and counts n as reserved; otherwise what is
// closed when it is worth to look again.
func (b *outbox) room(n int64) <-chan struct{} {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.closed || b.waiting+b.reserved < b.all.each && b.all.total.Load() < b.all.inAll {
		b.count(&b.reserved, n)
		return nil
	}
	if b.wake == nil {
		b.wake = make(chan struct{})
	}
	return b.wake
}

// count changes waiting or reserved; b.mu is held.
func (b *outbox) count(what *int64, n int64) {
	if b.closed {
		return
	}
	before := b.waiting + b.reserved
	*what += n
	b.all.add(n)
	if now := b.waiting + b.reserved; now < b.all.each && before >= b.all.each {
		b.rouse()
	}
}

func (b *outbox) rouse() {
	if b.wake != nil {
		close(b.wake)
		b.wake = nil
	}
}

func (b *outbox) wakeAll() {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.rouse()
}

// close forgets what the client will not read any more.
func (b *outbox) close() {
	b.all.mu.Lock()
	delete(b.all.conns, b)
	b.all.mu.Unlock()
	b.mu.Lock()
	defer b.mu.Unlock()
	if !b.closed {
		b.closed = true
		b.all.add(-b.waiting - b.reserved)
		b.rouse()
	}
}

// unreadSince is how much waits, for how long some of that has at least, and how much
// has been read meanwhile; it is for the keeper.
func (b *outbox) unreadSince(now time.Time) (bytes int64, since time.Duration, read int64) {
	b.mu.Lock()
	defer b.mu.Unlock()
	switch {
	case b.waiting == 0 || b.closed:
		b.since = time.Time{}
	case b.since.IsZero() || b.read >= b.mark:
		b.since, b.start, b.mark = now, b.read, b.read+b.waiting
	}
	if b.since.IsZero() {
		return 0, 0, 0
	}
	return b.waiting, now.Sub(b.since), b.read - b.start
}

// sending is what one call has in an outbox. Reserve, take and done belong to the
// call's goroutine. It is a mem.BufferPool of the buffers that gRPC gives back when
// they have been sent.
type sending struct {
	box  *outbox
	own  int64 // of waiting; under box.mu
	room int64 // reserved
}

// reserve waits for room for an answer of about n bytes. Error: ctx's.
func (s *sending) reserve(ctx context.Context, n int64) error {
	if s == nil || s.box == nil {
		return nil
	}
	s.done()
	for {
		again := s.box.room(n)
		if again == nil {
			s.room = n
			return nil
		}
		select {
		case <-again:
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

// grow makes what is reserved so much, if there is room; one lock with all its holders
// may take far more than most.
func (s *sending) grow(n int64) bool {
	if s.box == nil || n <= s.room {
		return true
	}
	s.box.mu.Lock()
	defer s.box.mu.Unlock()
	b := s.box
	if !b.closed && (b.waiting+b.reserved-s.room+n > b.all.each || b.all.total.Load() >= b.all.inAll) {
		return false
	}
	b.count(&b.reserved, n-s.room)
	s.room = n
	return true
}

// turn waits for room for a small message, unless the last one has gone: an answer
// to a renewal does not wait for others' lists, unless very much waits already.
func (s *sending) turn(ctx context.Context) error {
	if s.box == nil || s.room > 0 {
		return nil
	}
	s.box.mu.Lock()
	waits := s.own > 0 || s.box.waiting > manyAnswers*s.box.all.each ||
		s.box.waiting > smallAnswer && s.box.all.total.Load() > s.box.all.inAll
	s.box.mu.Unlock()
	if !waits {
		return nil
	}
	return s.reserve(ctx, smallAnswer)
}

// manyAnswers is how many times as much waits when no answer is taken any more, as
// when large ones wait.
const manyAnswers = 4

// done gives back what has been reserved.
func (s *sending) done() {
	if s.room > 0 {
		s.box.mu.Lock()
		defer s.box.mu.Unlock()
		s.box.count(&s.box.reserved, -s.room)
		s.room = 0
	}
}

// take counts a buffer that is given to gRPC, in place of what was reserved.
func (s *sending) take(buf *[]byte) mem.BufferSlice {
	if s.box == nil {
		return wire.Slice(buf)
	}
	if mem.IsBelowBufferPoolingThreshold(cap(*buf)) { // gRPC would not give it back
		larger := mem.DefaultBufferPool().Get(countedBytes)
		*larger = append((*larger)[:0], *buf...)
		mem.DefaultBufferPool().Put(buf)
		buf = larger
	}
	n := int64(cap(*buf))
	s.box.mu.Lock()
	s.own += n
	s.box.count(&s.box.waiting, n)
	s.box.count(&s.box.reserved, -s.room)
	s.box.mu.Unlock()
	s.room = 0
	return mem.BufferSlice{mem.NewBuffer(buf, s)}
}

// countedBytes is the least that a buffer has which gRPC gives back.
const countedBytes = 4 << 10

// Get implements mem.BufferPool.
func (s *sending) Get(n int) *[]byte { return mem.DefaultBufferPool().Get(n) }

// Put implements mem.BufferPool: a buffer has been sent, or never will be.
func (s *sending) Put(buf *[]byte) {
	n := int64(cap(*buf))
	s.box.mu.Lock()
	s.own -= n
	s.box.count(&s.box.waiting, -n)
	s.box.read += n
	s.box.mu.Unlock()
	mem.DefaultBufferPool().Put(buf)
}

// sendingOf is what a stream sends by; nil outside of one.
func sendingOf(ctx context.Context) *sending {
	s, _ := ctx.Value(sendingKey{}).(*sending)
	return s
}

type sendingKey struct{}

// outgoing is a message as gRPC is given it.
type outgoing struct{ bytes mem.BufferSlice }

// encode makes that of a message, or of one that has been encoded.
func (s *sending) encode(msg any) (out outgoing, err error) {
	e, ok := msg.(encoded)
	if !ok {
		if e.bytes, err = encode(msg); err != nil {
			return out, err
		}
	}
	return outgoing{s.take(e.bytes)}, nil
}

// largestPooled is the largest buffer of gRPC's pool but one of 1 MiB.
const largestPooled = 32 << 10

// encode encodes a message in a buffer of the pool, or one of its own.
func encode(msg any) (*[]byte, error) {
	m, ok := msg.(proto.Message)
	if !ok {
		return nil, fmt.Errorf("%T is not a message", msg)
	}
	n := max(proto.Size(m), countedBytes)
	var buf *[]byte
	if n <= largestPooled || n > softLimit/2 {
		buf = wire.Buffer(n)
	} else { // the pool has but one size for these
		made := make([]byte, 0, n)
		buf = &made
	}
	var err error
	*buf, err = proto.MarshalOptions{UseCachedSize: true}.MarshalAppend(*buf, m)
	return buf, err
}

const (
	smallAnswer = 24 << 10 // beyond it a message ends: it leaves room in largestPooled for one more answer
	perEntry    = 1 << 10  // of a list
)

// mayTake is about what the answer to a request takes, 0 for one that does not wait
// for room before it is made. What renews never does: a lease would be lost.
func mayTake(req any) (bytes int64) {
	switch r := req.(type) {
	case *pb.ListRequest:
		return min(perEntry*int64(cmp.Or(r.GetPageSize(), defaultPage)), softLimit)
	case *pb.ListLeasesRequest:
		return min(perEntry*int64(cmp.Or(r.GetPageSize(), defaultPage)), softLimit)
	case *pb.GetRequest, *pb.GetLeaseRequest:
		return smallAnswer
	case *original.EmptyRequest: // all locks at once
		return softLimit
	}
	return 0
}
