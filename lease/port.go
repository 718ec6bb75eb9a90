package lease

import (
	"context"
	"errors"
	"slices"
	"sync"
	"sync/atomic"
	"time"

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
	max    int64         // operations under way before Submit blocks
	waits  int           // parked acquisitions before more are refused
	ready  chan struct{} // buffered, one: there is something to Take
	room   chan struct{} // buffered, one: under has fallen

	// under is the weight of what has been submitted and whose reply has not
	// been Sent, without what is parked; all is that with it.
	under, all atomic.Int64

	mu     sync.Mutex
	out    []Reply
	losses []Loss

	// The loop's own.
	open   map[uint64]*call // acquisitions not answered, by tag
	parked int
	staged []Reply
	lost   []Loss
	rung   bool // is in the loop's list of those to wake
	gone   bool
}

// Reply answers one operation of a Port. Err is what the Manager's method of
// the operation returns; the other fields are its results.
type Reply struct {
	Tag       uint64
	Op        Op
	Err       error
	Grant     *machine.Grant // of an Acquire
	TTL       time.Duration  // of the lease of a Grant or a GrantLease
	Lease     ID             // of a GrantLease
	KeepAlive []KeepAlive
	Check     *TokenCheck
	weight    int64
}

// Op says which operation a Reply answers. Of one that was refused it may be 0.
type Op uint8

// The operations of a Port, by the names of the Manager's methods.
const (
	OpAcquire Op = 1 + iota
	OpRelease
	OpAbandon
	OpForceRelease
	OpGrantLease
	OpRevokeLease
	OpKeepAlive
	OpCheckToken
)

// Loss tells that a lease ended otherwise than by a release, or that a hold
// under it did while it lives on.
type Loss struct {
	Lease ID
	Token fence.Token // of the hold; 0 when it is the lease that ended
	Cause machine.EndCause
	By    string
}

// maxLosses bounds what is kept for a writer that does not take it. What is
// left out the next renewal tells.
const maxLosses = 1 << 15

// NewPort returns a port that has operations of at most about bound under way
// (an Acquire counts each name, a KeepAlive every 64 leases), parked ones
// apart, and parks at most waits.
func (m *Manager) NewPort(bound, waits int) *Port {
	m.mu.Lock()
	m.made = max(m.made+1, 1)
	number := m.made
	m.mu.Unlock()
	return &Port{
		m: m, number: number, max: int64(bound), waits: waits,
		ready: make(chan struct{}, 1), room: make(chan struct{}, 1),
		open: make(map[uint64]*call),
	}
}

// Batch gathers operations for Submit. A tag names the operation in its Reply
// and for Cancel; one that is in use must not be used again. What is invalid is
// answered like everything else.
type Batch struct {
	port    *Port
	inputs  []input
	refused []Reply
	weight  int64
	ops     int64
}

// Batch returns an empty batch with room for n operations.
func (p *Port) Batch(n int) *Batch { return &Batch{port: p, inputs: make([]input, 0, n)} }

// Refuse answers an operation with err without trying anything.
func (b *Batch) Refuse(tag uint64, err error) {
	b.ops++
	b.weight++
	b.refused = append(b.refused, Reply{Tag: tag, Err: err, weight: 1})
}

func (b *Batch) add(tag uint64, cmd machine.Command) { b.put(tag, &call{cmd: cmd}, 1) }

func (b *Batch) put(tag uint64, c *call, weight int64) {
	c.port, c.tag, c.weight = b.port, tag, weight
	b.ops++
	b.weight += weight
	b.inputs = append(b.inputs, c)
}

// Acquire is Manager.Acquire.
func (b *Batch) Acquire(tag uint64, r AcquireRequest) {
	c, cmd, err := b.port.m.acquireCall(r)
	if err != nil {
		b.Refuse(tag, err)
		return
	}
	b.put(tag, c, int64(len(cmd.Names)+len(cmd.Metadata)))
}

// Release is Manager.Release.
func (b *Batch) Release(tag uint64, r ReleaseRequest) {
	if err := r.check(); err != nil {
		b.Refuse(tag, err)
		return
	}
	made := &struct { // one piece of memory
		call
		cmd machine.Release
	}{cmd: machine.Release{Lease: r.Lease, Name: r.Name, Token: r.Token}}
	made.call.cmd = &made.cmd
	b.put(tag, &made.call, 1)
}

// Abandon is Manager.Abandon.
func (b *Batch) Abandon(tag uint64, lease ID, request RequestID) {
	if err := abandonable(request); err != nil {
		b.Refuse(tag, err)
		return
	}
	b.add(tag, &machine.Abandon{Lease: lease, Request: request})
}

// ForceRelease is Manager.ForceRelease.
func (b *Batch) ForceRelease(tag uint64, lock string, token fence.Token, by string) {
	if err := errors.Join(name("name", lock), text("by", by)); err != nil {
		b.Refuse(tag, first(err))
		return
	}
	b.add(tag, &machine.ForceRelease{Name: lock, Token: token, By: by})
}

// GrantLease is Manager.GrantLease.
func (b *Batch) GrantLease(tag uint64, r GrantLeaseRequest) {
	cmd, err := b.port.m.grantCommand(r)
	if err != nil {
		b.Refuse(tag, err)
		return
	}
	b.add(tag, cmd)
}

// RevokeLease is Manager.RevokeLease.
func (b *Batch) RevokeLease(tag uint64, id ID, by string) {
	if err := text("by", by); err != nil {
		b.Refuse(tag, err)
		return
	}
	b.add(tag, &machine.RevokeLease{Lease: id, By: by})
}

// KeepAlive is Manager.KeepAlive.
func (b *Batch) KeepAlive(tag uint64, ids []ID) {
	p, received := b.port, b.port.m.now()
	c := &confirmation{port: p, reply: Reply{Tag: tag, Op: OpKeepAlive, weight: 1 + int64(len(ids))/64}}
	c.then = func(m *Manager) {
		c.reply.KeepAlive = make([]KeepAlive, len(ids))
		for i, id := range ids {
			c.reply.KeepAlive[i] = m.renew(id, received)
			if t := m.leases[id]; t != nil {
				t.port = p.number
			}
		}
	}
	b.confirm(c)
}

// CheckToken is Manager.CheckToken.
func (b *Batch) CheckToken(tag uint64, lock string, token fence.Token) {
	if err := checkable(lock, token); err != nil {
		b.Refuse(tag, err)
		return
	}
	c := &confirmation{port: b.port, reply: Reply{Tag: tag, Op: OpCheckToken, weight: 1}}
	c.then = func(m *Manager) { c.reply.Check = m.live(lock, token) }
	b.confirm(c)
}

func (b *Batch) confirm(c *confirmation) {
	b.ops++
	b.weight += c.reply.weight
	b.inputs = append(b.inputs, c)
}

// Cancel ends the wait of an Acquire, and undoes a grant that is not yet
// answered; that Acquire is answered context.Canceled. It has no reply.
func (b *Batch) Cancel(tag uint64) { b.inputs = append(b.inputs, &cancel{b.port, tag}) }

// Submit hands a batch to the loop, once there is room for more: a writer that
// does not keep up holds up the reader. Errors: ctx's cause; then nothing was
// done.
func (p *Port) Submit(ctx context.Context, b *Batch) error {
	for p.under.Load() >= p.max {
		select {
		case <-p.room:
		case <-ctx.Done():
			return context.Cause(ctx)
		}
	}
	p.under.Add(b.weight)
	p.all.Add(b.ops)
	if len(b.inputs) > 0 && !p.m.put(&submission{p, b.inputs}) {
		err := p.m.ended()
		for _, in := range b.inputs {
			switch in := in.(type) {
			case *call:
				b.refused = append(b.refused, Reply{Tag: in.tag, Err: err, weight: in.weight})
			case *confirmation:
				in.reply.Err = err
				b.refused = append(b.refused, in.reply)
			}
		}
	}
	if len(b.refused) > 0 {
		p.mu.Lock()
		p.out = append(p.out, b.refused...)
		p.mu.Unlock()
		p.wake()
	}
	return nil
}

// submission is a batch on its way to the loop.
type submission struct {
	port   *Port
	inputs []input
}

func (s *submission) take(m *Manager) {
	if s.port.gone { // the reader was late: nobody hears the answers, nor would end the waits
		return
	}
	m.ports[s.port.number] = s.port
	for _, in := range s.inputs {
		in.take(m)
	}
}

func (p *Port) wake() {
	select {
	case p.ready <- struct{}{}:
	default:
	}
}

// less takes weight off what is under way.
func (p *Port) less(weight int64) {
	if now := p.under.Add(-weight); now < p.max && now+weight >= p.max {
		select {
		case p.room <- struct{}{}:
		default:
		}
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
	defer p.mu.Unlock()
	replies, p.out = p.out, replies[:0]
	losses, p.losses = p.losses, losses[:0]
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
	p.less(weight)
}

// Idle reports whether every operation has been answered, and its reply Sent.
func (p *Port) Idle() bool { return p.all.Load() == 0 }

// Close ends the port once nobody hears its answers. When detached, because
// the caller's connection was lost, waits keep their places for a repeat;
// otherwise they are abandoned, and grants not yet taken are undone. What is
// in the log goes on.
func (p *Port) Close(detached bool) { p.m.put(&closing{p, detached}) }

type closing struct {
	port     *Port
	detached bool
}

func (c *closing) take(m *Manager) {
	p := c.port
	for tag, call := range p.open {
		(&leave{call: call, keep: c.detached && call.key.request < machine.AnonymousRequest}).take(m)
		delete(p.open, tag)
	}
	p.mu.Lock()
	unheard := slices.Concat(p.out, p.staged)
	p.out, p.losses = nil, nil
	p.mu.Unlock()
	p.staged, p.lost, p.gone = nil, nil, true
	delete(m.ports, p.number)
	for _, r := range unheard {
		if r.Grant != nil && (!c.detached || r.Grant.Request >= machine.AnonymousRequest) && m.refuses() == nil {
			m.enqueue(&call{cmd: &machine.Release{Lease: r.Grant.Lease, Token: r.Grant.Token}})
		}
	}
}

type cancel struct {
	port *Port
	tag  uint64
}

func (x *cancel) take(m *Manager) {
	c := x.port.open[x.tag]
	if c == nil {
		return
	}
	(&leave{call: c}).take(m)
	if c.answered { // else it will be: the node does not serve
		x.port.finish(m, c, Reply{Err: context.Canceled})
	}
}

// The rest is called by the loop only.

// admit holds an acquisition against the port's own bound.
func (p *Port) admit(c *call) error {
	cmd, ok := c.cmd.(*machine.Acquire)
	if !ok {
		return nil
	}
	if cmd.Wait && p.parked >= p.waits {
		return &ExhaustedError{What: "waits on one stream", Max: p.waits}
	}
	p.open[c.tag] = c
	return nil
}

// park takes a waiting call out of those under way: it would hold up others.
func (p *Port) park(c *call) {
	c.onPort = true
	p.parked++
	p.less(c.weight)
}

// answer is what the caller of a unary call does with its outcome.
func (p *Port) answer(m *Manager, c *call, r machine.Result, err error) {
	reply := Reply{Err: err}
	switch cmd := c.cmd.(type) {
	case *machine.Acquire:
		reply.Op = OpAcquire
		if err != nil {
			reply.Err = heldError(err, c.explain)
			break
		}
		reply.Grant, reply.TTL = r.Grant, time.Duration(cmd.TTL)
		if t := m.leases[r.Grant.Lease]; t != nil {
			t.port = p.number
			reply.TTL = t.ttl
		} else if cmd.Lease != 0 { // its end is on its way here
			reply.TTL = m.ttl(cmd.Lease)
		}
	case *machine.GrantLease:
		reply.Op = OpGrantLease
		if err == nil {
			reply.Lease, reply.TTL = r.Lease, time.Duration(cmd.TTL)
		}
	case *machine.Release:
		reply.Op = OpRelease
	case *machine.Abandon:
		reply.Op = OpAbandon
	case *machine.ForceRelease:
		reply.Op = OpForceRelease
	case *machine.RevokeLease:
		reply.Op = OpRevokeLease
	}
	p.finish(m, c, reply)
}

func (p *Port) finish(m *Manager, c *call, r Reply) {
	if p.open[c.tag] == c {
		delete(p.open, c.tag)
	}
	if c.onPort {
		c.onPort = false
		p.parked--
		p.under.Add(c.weight)
	}
	r.Tag, r.weight = c.tag, c.weight
	p.stage(m, r)
}

func (p *Port) stage(m *Manager, r Reply) {
	if p.gone {
		return
	}
	p.staged = append(p.staged, r)
	m.rouse(p)
}

func (p *Port) lose(m *Manager, l Loss) {
	if p.gone || len(p.lost) >= maxLosses {
		return
	}
	p.lost = append(p.lost, l)
	m.rouse(p)
}

func (m *Manager) rouse(p *Port) {
	if !p.rung {
		p.rung = true
		m.ringing = append(m.ringing, p)
	}
}

// ring hands what a turn of the loop has staged to the ports, with one wake-up
// for each.
func (m *Manager) ring() {
	for i, p := range m.ringing {
		m.ringing[i] = nil
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
	m.ringing = m.ringing[:0]
}

// follow tells the port that granted or renewed a lease last of its end.
func (m *Manager) follow(e *Event) {
	t := m.leases[e.Lease]
	if t == nil || t.port == 0 || e.Cause == machine.EndReleased {
		return
	}
	p := m.ports[t.port]
	if p == nil {
		return
	}
	l := Loss{Lease: e.Lease, Cause: e.Cause, By: e.By}
	if e.Kind == machine.EventHoldEnded {
		if e.Cause == machine.EndExpired || e.Cause == machine.EndRevoked {
			return // with its lease
		}
		l.Token = e.Token
	}
	p.lose(m, l)
}
