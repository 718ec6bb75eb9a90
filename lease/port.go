package lease

import (
	"context"
	"maps"
	"slices"
	"sync"
	"sync/atomic"

	"github.com/distlock/distlock/fence"
	"github.com/distlock/distlock/lease/machine"
)

// Port is how one caller has many operations under way at once without a
// goroutine for each: they reach the loop in batches, and so do their answers
// come back. One goroutine, the reader, makes Batches and submits them; one,
// the writer, takes the replies. Both end with Close, which the writer calls.
type Port struct {
	m      *Manager
	number uint32
	max    int64 // operations under way before there is no Room
	share  *Share
	ready  chan struct{} // buffered, one: there is something to Take
	room   chan struct{} // buffered, one: under has fallen

	// under is the weight of what has been submitted and whose reply has not
	// been Sent, without what is parked; all is the number of both. Under is
	// changed with mu held.
	under, all atomic.Int64

	mu     sync.Mutex
	closed bool // nothing is under way any more, for the share
	out    []Reply
	losses []Loss
	err    error // why nothing more is taken in

	// The loop's own.
	open   map[uint64]*call // acquisitions not answered, by tag
	parked int
	staged []Reply
	lost   []Loss
	rung   bool // is in the loop's list of those to wake
	failed bool // err is set
	gone   bool
}

// Loss tells that a lease ended otherwise than by the word of who has it, or
// that a hold under it did while it lives on.
type Loss struct {
	Lease ID
	Token fence.Token // of the hold; 0 when it is the lease that ended
	Cause machine.EndCause
	By    string
}

// maxLosses bounds what is kept for a writer that does not take it. What is
// left out the next renewal tells.
const maxLosses = 1 << 15

// Share is what the ports of one connection may take together: acquisitions that are
// parked, other operations under way, and an eighth of what may wait for the log.
type Share struct {
	waits int
	max   int64
	under atomic.Int64
	room  chan struct{} // buffered, one: under has fallen

	// The loop's own.
	parked, pending int
}

// NewShare lets at most so many acquisitions wait, and has no room for more while about
// bound other operations are under way.
func NewShare(waits, bound int) *Share {
	return &Share{waits: waits, max: int64(bound), room: make(chan struct{}, 1)}
}

// UnderWay is about how many operations are under way, without those that are parked.
func (s *Share) UnderWay() int { return int(s.under.Load()) }

// NewPort returns a port that has operations of at most about bound under way
// (an Acquire counts each name, a KeepAlive every 64 leases), parked ones
// apart. Ports of one connection have one share.
func (m *Manager) NewPort(bound int, share *Share) *Port {
	return &Port{
		m: m, number: max(m.ports.Add(1), 1), max: int64(bound), share: share,
		ready: make(chan struct{}, 1), room: make(chan struct{}, 1),
		open: make(map[uint64]*call),
	}
}

// Batch gathers operations for Submit. A tag names the operation in its Reply
// and for Cancel; that of an Acquire must not be used again before its Reply:
// the port takes nothing more in then. What is invalid is answered like
// everything else.
type Batch struct {
	port    *Port
	inputs  []input
	refused []Reply
	weight  int64
	ops     int64
}

// Batch returns an empty batch with room for n operations.
func (p *Port) Batch(n int) *Batch { return &Batch{port: p, inputs: make([]input, 0, n)} }

// Add asks for an operation, of which nothing but text is kept.
func (b *Batch) Add(tag uint64, op Operation) {
	t, err := op.task(b.port.m)
	if err == nil {
		err = b.port.m.admits(t)
	}
	if err != nil {
		b.Refuse(tag, err)
		return
	}
	from := t.from()
	from.sink, from.tag = b.port, tag
	b.ops++
	b.weight += from.weight
	b.inputs = append(b.inputs, t)
}

// Refuse answers an operation with err without trying anything.
func (b *Batch) Refuse(tag uint64, err error) {
	b.ops++
	b.weight++
	b.refused = append(b.refused, Reply{Tag: tag, Err: err, weight: 1})
}

// Cancel ends an Acquire, which is answered context.Canceled. One that does not
// count attempts is abandoned, and a grant that is not yet answered undone. It
// has no reply of its own.
func (b *Batch) Cancel(tag uint64) {
	b.weight++
	b.inputs = append(b.inputs, &cancel{b.port, tag})
}

// Room waits until there is room for a batch: a writer that does not keep up holds up
// the reader. It is called before a batch is received: what is not received its sender
// has to keep. Errors: ctx's cause.
func (p *Port) Room(ctx context.Context) error {
	for shared := false; ; {
		var room <-chan struct{}
		if p.under.Load() < p.max {
			if p.share.under.Load() < p.share.max {
				if shared { // so may another port's reader
					wake(p.share.room)
				}
				return nil
			}
			room, shared = p.share.room, true
		}
		select {
		case <-p.room:
		case <-room:
		case <-ctx.Done():
			return context.Cause(ctx)
		}
	}
}

// Submit hands a batch to the loop.
func (p *Port) Submit(b *Batch) {
	p.add(b.weight)
	p.all.Add(b.ops)
	if len(b.inputs) > 0 && !p.m.inbox.put(&submission{p, b.inputs}) {
		err := p.m.over()
		for _, in := range b.inputs {
			if t, ok := in.(task); ok {
				b.refused = append(b.refused, Reply{Tag: t.from().tag, Err: err, weight: t.from().weight})
			}
		}
	}
	if len(b.refused) > 0 {
		p.mu.Lock()
		p.out = append(p.out, b.refused...)
		p.mu.Unlock()
		p.wake()
	}
}

// submission is a batch on its way to the loop.
type submission struct {
	port   *Port
	inputs []input
}

func (s *submission) take(l *loop) {
	p := s.port
	if p.gone { // the reader was late: nobody hears the answers, nor would end the waits
		return
	}
	l.streams[p.number] = p
	for _, in := range s.inputs {
		if t, ok := in.(task); ok && len(p.open) > 0 && p.open[t.from().tag] != nil {
			p.fail(&InvalidError{Field: "id", Msg: "is that of an operation which has not been answered"})
		}
		if p.failed {
			return
		}
		in.take(l)
	}
}

// fail lets the port take nothing more in: its caller cannot tell the answers
// of two operations apart.
func (p *Port) fail(err error) {
	p.failed = true
	p.mu.Lock()
	p.err = err
	p.mu.Unlock()
	p.wake()
}

// Err is why nothing more is taken in; nil while it is.
func (p *Port) Err() error {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.err
}

func (p *Port) wake() { wake(p.ready) }

// wake sends on a channel that has a buffer of one.
func wake(c chan<- struct{}) {
	select {
	case c <- struct{}{}:
	default:
	}
}

// add puts weight to what is under way, or takes it off.
func (p *Port) add(weight int64) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.addLocked(weight)
}

func (p *Port) addLocked(weight int64) {
	if p.closed {
		return
	}
	own, all := p.under.Add(weight), p.share.under.Add(weight)
	if own < p.max && own-weight >= p.max {
		wake(p.room)
	}
	if all < p.share.max && all-weight >= p.share.max {
		wake(p.share.room)
	}
}

// Ready tells that there may be something to Take.
func (p *Port) Ready() <-chan struct{} { return p.ready }

// Take returns what there is, in the arrays given, which it keeps to use
// again: the slices are valid until the next call.
func (p *Port) Take(replies []Reply, losses []Loss) ([]Reply, []Loss) {
	clear(replies)
	clear(losses)
	p.mu.Lock()
	replies, p.out = p.out, replies[:0]
	losses, p.losses = p.losses, losses[:0]
	p.mu.Unlock()
	for i := range replies {
		replies[i].complete(p.m)
	}
	return replies, losses
}

// Sent tells that replies are on their way to whoever asked, so that as many
// more may be submitted.
func (p *Port) Sent(replies []Reply) {
	var weight int64
	for i := range replies {
		weight += replies[i].weight
	}
	p.all.Add(-int64(len(replies)))
	p.add(-weight)
}

// Idle reports whether every operation has been answered, and its reply Sent.
func (p *Port) Idle() bool { return p.all.Load() == 0 }

// Close ends the port once nobody hears its answers. Of the acquisitions that
// do not count attempts those that wait are abandoned, and grants not yet taken
// undone; unless lost, because the caller's connection was: then they keep
// their places for a repeat. What is in the log goes on.
func (p *Port) Close(lost bool) { p.m.inbox.put(&closing{p, lost}) }

type closing struct {
	port *Port
	lost bool
}

func (c *closing) take(l *loop) {
	p := c.port
	p.mu.Lock()
	unheard := slices.Concat(p.out, p.staged)
	p.out, p.losses = nil, nil
	p.addLocked(-p.under.Load())
	p.closed = true
	p.mu.Unlock()
	p.staged, p.lost, p.gone = nil, nil, true
	delete(l.streams, p.number)
	for _, tag := range slices.Sorted(maps.Keys(p.open)) {
		(&leave{call: p.open[tag], lost: c.lost}).take(l)
	}
	clear(p.open)
	p.share.parked -= p.parked
	for _, r := range unheard {
		if r.asked != nil && r.Hold != nil {
			(&leave{call: r.asked, lost: c.lost}).take(l)
		}
	}
}

type cancel struct {
	port *Port
	tag  uint64
}

func (x *cancel) take(l *loop) {
	x.port.add(-1)
	if c := x.port.open[x.tag]; c != nil {
		(&leave{call: c}).take(l)
	}
}

// The rest is called by the loop only. Port implements sink.

// admit holds an acquisition against the port's own bound.
func (p *Port) admit(c *call) error {
	if c.bound != 0 && p.share.parked >= p.share.waits {
		return &ExhaustedError{What: "waits on one connection", Max: p.share.waits}
	}
	p.open[c.tag] = c
	return nil
}

// parks takes a waiting call out of those under way: it would hold up others.
func (p *Port) parks(c *call) {
	c.onPort = true
	if !p.gone {
		p.parked++
		p.share.parked++
	}
	p.add(-c.weight)
}

// leaves puts it back, until it is answered.
func (p *Port) leaves(c *call) {
	if c.onPort {
		c.onPort = false
		if !p.gone {
			p.parked--
			p.share.parked--
		}
		p.add(c.weight)
	}
}

func (p *Port) done(c *call) {
	p.leaves(c)
	if p.open[c.tag] == c {
		delete(p.open, c.tag)
	}
}

func (p *Port) stream() uint32 { return p.number }

func (p *Port) hear(l *loop, r Reply) {
	if !p.gone {
		p.staged = append(p.staged, r)
		l.rouse(p)
	}
}

func (p *Port) lose(l *loop, loss Loss) {
	if p.gone || len(p.lost) >= maxLosses {
		return
	}
	p.lost = append(p.lost, loss)
	l.rouse(p)
}

func (l *loop) rouse(p *Port) {
	if !p.rung {
		p.rung = true
		l.ringing = append(l.ringing, p)
	}
}

// ring hands what a turn of the loop has staged to the ports, with one wake-up
// for each.
func (l *loop) ring() {
	for i, p := range l.ringing {
		l.ringing[i] = nil
		p.rung = false
		p.mu.Lock()
		if len(p.out) == 0 { // the arrays change places
			p.out, p.staged = p.staged, p.out
		} else {
			p.out = append(p.out, p.staged...)
			clear(p.staged)
		}
		p.staged = p.staged[:0]
		p.losses = append(p.losses, p.lost[:min(len(p.lost), maxLosses-len(p.losses))]...)
		p.mu.Unlock()
		p.lost = p.lost[:0]
		p.wake()
	}
	l.ringing = l.ringing[:0]
}
