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
	count     uint64               // pasts ever remembered
	order     *btree.BTreeG[*past] // by n
	byLease   *btree.BTreeG[*past]
	byRequest *btree.BTreeG[*past]
	byToken   *btree.BTreeG[*past]
	// traces keep the last token of every lock that a remembered lost hold
	// was on, so that its holder can be told whether anyone came after.
	traces *btree.BTreeG[trace]
}

type trace struct {
	name string
	last fence.Token
	refs int
}

func newMemory() memory {
	return memory{
		order:     table(func(a, b *past) bool { return a.n < b.n }),
		byLease:   table(func(a, b *past) bool { return a.lease < b.lease }),
		byRequest: table(func(a, b *past) bool { return a.request < b.request }),
		byToken:   table(func(a, b *past) bool { return a.token < b.token }),
		traces:    table(func(a, b trace) bool { return a.name < b.name }),
	}
}

func (m *memory) copy() memory {
	return memory{
		count: m.count, order: m.order.IsoCopy(), byLease: m.byLease.IsoCopy(), byRequest: m.byRequest.IsoCopy(),
		byToken: m.byToken.IsoCopy(), traces: m.traces.IsoCopy(),
	}
}

func (m *memory) remember(p past) {
	m.count++
	p.n = m.count
	record := &p
	m.order.Set(record)
	m.index(record)
	if p.lost() {
		for _, name := range p.names {
			t, ok := m.traces.Get(trace{name: name})
			if !ok {
				t = trace{name: name}
			}
			t.refs++
			t.last = max(t.last, p.token)
			m.traces.Set(t)
		}
	}
	for m.order.Len() > MaxRemembered {
		oldest, _ := m.order.Min()
		m.drop(oldest)
	}
}

// index makes a past findable.
func (m *memory) index(p *past) {
	if p.leaseEnd {
		m.byLease.Set(p)
	}
	if p.request != 0 {
		m.byRequest.Set(p)
	}
	if p.token != 0 {
		m.byToken.Set(p)
	}
}

func (m *memory) drop(p *past) {
	m.order.Delete(p)
	if found, ok := m.byLease.Get(p); ok && found == p {
		m.byLease.Delete(p)
	}
	if found, ok := m.byRequest.Get(p); ok && found == p {
		m.byRequest.Delete(p)
	}
	if found, ok := m.byToken.Get(p); ok && found == p {
		m.byToken.Delete(p)
	}
	if p.lost() {
		for _, name := range p.names {
			t, ok := m.traces.Get(trace{name: name})
			if !ok {
				continue
			}
			if t.refs--; t.refs == 0 {
				m.traces.Delete(t)
			} else {
				m.traces.Set(t)
			}
		}
	}
}

func (m *memory) forget(through uint64) {
	for {
		oldest, ok := m.order.Min()
		if !ok || oldest.revision > through {
			return
		}
		m.drop(oldest)
	}
}

func (m *memory) lease(id LeaseID) *past {
	p, _ := m.byLease.Get(&past{lease: id})
	return p
}

func (m *memory) request(id RequestID) *past {
	p, _ := m.byRequest.Get(&past{request: id})
	return p
}

func (m *memory) token(t fence.Token) *past {
	p, _ := m.byToken.Get(&past{token: t})
	return p
}

// granted notes a grant on a lock that a remembered lost hold was on.
func (m *memory) granted(name string, token fence.Token) {
	if m.traces.Len() == 0 {
		return
	}
	if t, ok := m.traces.Get(trace{name: name}); ok {
		t.last = token
		m.traces.Set(t)
	}
}

// last returns the last token granted on a lock, if a trace of it is kept.
func (m *memory) last(name string) fence.Token {
	t, _ := m.traces.Get(trace{name: name})
	return t.last
}
