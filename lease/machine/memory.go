package machine

import (
	"github.com/tidwall/btree"

	"github.com/distlock/distlock/fence"
)

// MaxRemembered bounds what is remembered of requests, leases and holds that
// have ended; the oldest are dropped first.
const MaxRemembered = 1 << 16

// past is one thing that has ended and is remembered: a request with a lease
// of its own, a lease, a lost hold, or several of them at once.
type past struct {
	n        uint64 // in order of end
	revision uint64 // the store's at the end
	lease    LeaseID
	leaseEnd bool // the lease ended, not only a hold under it
	request  RequestID
	token    fence.Token
	names    []string // of the hold, when it was lost
	cause    EndCause
	by       string
	at       int64
}

func (p *past) ended() *Ended {
	return &Ended{Cause: p.cause, By: p.by, At: p.at, Revision: p.revision}
}

// lost reports whether the past is of a hold that did not end cleanly.
func (p *past) lost() bool { return p.token != 0 && p.cause != EndReleased }

// memory remembers pasts in the order of their end, and finds them by lease,
// request and token.
type memory struct {
	count uint64  // pasts ever remembered
	order []*past // by n; what is in it is not changed, as copies share it
	// traces keep the last token of every lock that a remembered lost hold
	// was on, so that its holder can be told whether anyone came after.
	traces *btree.Map[string, trace]

	// Only to look up in, and not copied.
	byLease   map[LeaseID]*past
	byRequest map[RequestID]*past
	byToken   map[fence.Token]*past
}

type trace struct {
	name string
	last fence.Token
	refs int
}

func newMemory() memory {
	return memory{
		byLease:   make(map[LeaseID]*past),
		byRequest: make(map[RequestID]*past),
		byToken:   make(map[fence.Token]*past),
		traces:    &btree.Map[string, trace]{},
	}
}

// copy returns what a view shows of it.
func (m *memory) copy() memory {
	// Without room to grow: what either of the two adds, the other must not
	// see.
	return memory{count: m.count, order: m.order[:len(m.order):len(m.order)], traces: m.traces.IsoCopy()}
}

func (m *memory) remember(p past) {
	m.count++
	p.n = m.count
	record := &p
	m.order = append(m.order, record)
	m.index(record)
	if p.lost() {
		for _, name := range p.names {
			t, ok := m.traces.Get(name)
			if !ok {
				t = trace{name: name}
			}
			t.refs++
			t.last = max(t.last, p.token)
			m.traces.Set(t.name, t)
		}
	}
	for len(m.order) > MaxRemembered {
		m.dropOldest()
	}
}

// index makes a past findable.
func (m *memory) index(p *past) {
	if p.leaseEnd {
		m.byLease[p.lease] = p
	}
	if p.request != 0 {
		m.byRequest[p.request] = p
	}
	if p.token != 0 {
		m.byToken[p.token] = p
	}
}

func (m *memory) dropOldest() {
	p := m.order[0]
	m.order = m.order[1:]
	// Another past may have taken its place in an index since.
	if p.leaseEnd && m.byLease[p.lease] == p {
		delete(m.byLease, p.lease)
	}
	if p.request != 0 && m.byRequest[p.request] == p {
		delete(m.byRequest, p.request)
	}
	if p.token != 0 && m.byToken[p.token] == p {
		delete(m.byToken, p.token)
	}
	if p.lost() {
		for _, name := range p.names {
			t, ok := m.traces.Get(name)
			if !ok {
				continue
			}
			if t.refs--; t.refs == 0 {
				m.traces.Delete(t.name)
			} else {
				m.traces.Set(t.name, t)
			}
		}
	}
}

func (m *memory) forget(through uint64) {
	for len(m.order) > 0 && m.order[0].revision <= through {
		m.dropOldest()
	}
}

func (m *memory) lease(id LeaseID) *past        { return m.byLease[id] }
func (m *memory) request(id RequestID) *past    { return m.byRequest[id] }
func (m *memory) token(token fence.Token) *past { return m.byToken[token] }

// granted notes a grant on a lock that a remembered lost hold was on.
func (m *memory) granted(name string, token fence.Token) {
	if m.traces.Len() == 0 {
		return
	}
	if t, ok := m.traces.Get(name); ok {
		t.last = token
		m.traces.Set(t.name, t)
	}
}

// last returns the last token granted on a lock, if a trace of it is kept.
func (m *memory) last(name string) fence.Token {
	t, _ := m.traces.Get(name)
	return t.last
}
