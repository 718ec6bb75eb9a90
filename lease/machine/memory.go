package machine

import (
	"slices"
	"sort"

	"github.com/tidwall/btree"

	"github.com/distlock/distlock/fence"
)

// MinRemembered is how many of the requests, leases and holds that ended last
// are remembered at least, until Forget; twice as many are at most.
const MinRemembered = 1 << 16

// pastsTogether divides MinRemembered.
const pastsTogether = 1 << 8

// past is one thing that has ended and is remembered: a request with a lease
// of its own, one with a random id under a lease, a lease, a lost hold, or
// several of them at once.
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

// underLease reports whether the past is of a request under a lease that may
// live on.
func (p *past) underLease() bool { return p.request != 0 && p.lease != 0 && !p.leaseEnd }

// lost reports whether the past is of a hold that did not end cleanly.
func (p *past) lost() bool { return p.token != 0 && p.cause != EndReleased }

// memory remembers pasts in the order of their end, and finds them by lease,
// request and token. It keeps two generations, each of up to MinRemembered: as
// a third begins the first goes as a whole, with its indexes, which costs less
// than to take each past out of them.
type memory struct {
	count      uint64 // pasts ever remembered: the n of the last
	young, old generation
}

// generation is the pasts of MinRemembered numbers in a row, less those that
// are forgotten. A View has them without the indexes.
type generation struct {
	// The pasts from first on and before next, none where both are equal: in
	// chunks, the first of which begins at a multiple of pastsTogether, so that
	// none is ever copied to make room. What is in them is not changed.
	first, next uint64
	chunks      []*[pastsTogether]past
	// traces keep the last token of every lock that a lost hold of this
	// generation was on, so that its holder can be told whether anyone came
	// after.
	traces *btree.Map[string, fence.Token]

	// The n of a past, which may be forgotten.
	byLease   map[LeaseID]uint64
	byRequest map[RequestID]uint64
	byUnder   map[underKey]uint64 // nil while there are none
	byToken   map[fence.Token]uint64
}

// underKey is a request under a lease.
type underKey struct {
	lease   LeaseID
	request RequestID
}

func newMemory() memory { return memory{young: newGeneration(), old: newGeneration()} }

func newGeneration() generation {
	return generation{
		traces:    &btree.Map[string, fence.Token]{},
		byLease:   make(map[LeaseID]uint64),
		byRequest: make(map[RequestID]uint64),
		byToken:   make(map[fence.Token]uint64),
	}
}

// view returns what a View has of it.
func (m *memory) view() memory {
	return memory{count: m.count, young: m.young.view(), old: m.old.view()}
}

func (g *generation) view() generation {
	// Without room to grow: what either of the two adds, the other must not
	// see.
	return generation{first: g.first, next: g.next, chunks: slices.Clip(g.chunks), traces: g.traces.IsoCopy()}
}

func (m *memory) len() int { return m.old.len() + m.young.len() }

func (g *generation) len() int { return int(g.next - g.first) }

// each calls fn for the pasts in order, until it returns false.
func (m *memory) each(fn func(*past) bool) {
	for _, g := range []*generation{&m.old, &m.young} {
		for n := g.first; n < g.next; n++ {
			if !fn(g.at(n)) {
				return
			}
		}
	}
}

func (m *memory) remember(p past) {
	p.n = m.count + 1
	m.add(p)
	if p.lost() {
		for _, name := range p.names {
			m.young.traces.Set(name, max(m.last(name), p.token))
		}
	}
}

// add enters a past, and makes it findable.
func (m *memory) add(p past) {
	if p.n/MinRemembered != m.count/MinRemembered {
		m.old, m.young = m.young, m.old
		m.young.clear()
	}
	m.count = p.n
	g := &m.young
	g.append(p)
	if p.leaseEnd {
		g.byLease[p.lease] = p.n
	}
	switch {
	case p.underLease():
		if g.byUnder == nil {
			g.byUnder = make(map[underKey]uint64)
		}
		g.byUnder[underKey{p.lease, p.request}] = p.n
	case p.request != 0:
		g.byRequest[p.request] = p.n
	}
	if p.token != 0 {
		g.byToken[p.token] = p.n
	}
}

func (g *generation) append(p past) {
	if g.len() == 0 {
		g.first, g.next = p.n, p.n
	}
	at := g.chunkOf(p.n)
	if at == len(g.chunks) {
		g.chunks = append(g.chunks, new([pastsTogether]past))
	}
	g.chunks[at][p.n%pastsTogether] = p
	g.next++
}

// chunkOf returns which of the chunks a number is in, once there is a first.
func (g *generation) chunkOf(n uint64) int { return int(n/pastsTogether - g.first/pastsTogether) }

// clear empties a generation; views may have its pasts.
func (g *generation) clear() {
	g.first, g.next, g.chunks = 0, 0, nil
	g.traces = &btree.Map[string, fence.Token]{}
	clear(g.byLease)
	clear(g.byRequest)
	g.byUnder = nil
	clear(g.byToken)
}

// forget drops the pasts up to a revision. Indexes and traces go with the last
// of a generation.
func (m *memory) forget(through uint64) {
	for _, g := range []*generation{&m.old, &m.young} {
		n := g.first + uint64(sort.Search(g.len(), func(i int) bool { return g.at(g.first+uint64(i)).revision > through }))
		if n < g.next {
			g.chunks, g.first = g.chunks[g.chunkOf(n):], n
			return
		}
		g.clear()
	}
}

// at returns the past with a number, or nil when it is forgotten, or n is 0.
func (g *generation) at(n uint64) *past {
	if n < g.first || n >= g.next {
		return nil
	}
	return &g.chunks[g.chunkOf(n)][n%pastsTogether]
}

// find returns the past with one of two numbers, the younger first.
func (m *memory) find(young, old uint64) *past {
	if p := m.young.at(young); p != nil {
		return p
	}
	return m.old.at(old)
}

func (m *memory) lease(id LeaseID) *past {
	return m.find(m.young.byLease[id], m.old.byLease[id])
}

func (m *memory) request(id RequestID) *past {
	return m.find(m.young.byRequest[id], m.old.byRequest[id])
}

func (m *memory) requestUnder(id LeaseID, req RequestID) *past {
	key := underKey{id, req}
	return m.find(m.young.byUnder[key], m.old.byUnder[key])
}

func (m *memory) token(token fence.Token) *past {
	return m.find(m.young.byToken[token], m.old.byToken[token])
}

// granted notes a grant on a lock that a remembered lost hold may have been on.
func (m *memory) granted(name string, token fence.Token) {
	for _, g := range []*generation{&m.young, &m.old} {
		if g.traces.Len() == 0 {
			continue
		}
		if _, ok := g.traces.Get(name); ok {
			g.traces.Set(name, token)
		}
	}
}

// last returns the last token granted on a lock, if a trace of it is kept.
func (m *memory) last(name string) fence.Token {
	if last, ok := m.young.traces.Get(name); ok {
		return last
	}
	last, _ := m.old.traces.Get(name)
	return last
}
