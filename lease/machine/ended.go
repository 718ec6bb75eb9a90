package machine

import "github.com/tidwall/btree"

// span is a run of sequence numbers under a lease that have ended. Most
// requests end in order, so that a lease has few, however many have ended.
type span struct {
	lease    LeaseID
	from, to RequestID // both in it
}

// maxSpans bounds those of one lease: a million bytes of its snapshot.
const maxSpans = 1 << 16

func lessSpan(a, b span) bool {
	if a.lease != b.lease {
		return a.lease < b.lease
	}
	return a.from < b.from
}

func newSpans() *btree.BTreeG[span] { return table(lessSpan) }

// spanAt returns the last span of a lease that begins at or before an id.
func (m *state) spanAt(id LeaseID, req RequestID) (s span, ok bool) {
	m.ended.Descend(span{lease: id, from: req}, func(found span) bool {
		s, ok = found, found.lease == id
		return false
	})
	return s, ok
}

// endedAt reports whether a sequence number has ended under a live session.
func (m *state) endedAt(l *lease, req RequestID) bool {
	if req < l.session.lowest {
		return true
	}
	s, ok := m.spanAt(l.id, req)
	return ok && req <= s.to
}

// eachSpan calls fn for a lease's spans in order, until it returns false.
func (m *state) eachSpan(id LeaseID, fn func(span) bool) {
	m.ended.Ascend(span{lease: id}, func(s span) bool { return s.lease == id && fn(s) })
}

// addEnded notes that a sequence number has ended. It reports false when the
// lease has too many spans already.
func (m *Machine) addEnded(l *lease, req RequestID) bool {
	before, joinsBefore := m.spanAt(l.id, req)
	if joinsBefore && req <= before.to {
		return true
	}
	joinsBefore = joinsBefore && before.to+1 == req
	after, joinsAfter := m.ended.Get(span{lease: l.id, from: req + 1})
	joined := span{lease: l.id, from: req, to: req}
	more := int32(1)
	if joinsBefore {
		joined.from = before.from // takes its place
		more--
	}
	if joinsAfter {
		joined.to = after.to
		more--
	}
	if more > 0 && l.session.spans >= maxSpans && m.at(2) {
		return false
	}
	if joinsAfter {
		m.ended.Delete(after)
	}
	m.ended.Set(joined)
	if more != 0 {
		seq := *l.session
		seq.spans += more
		m.setSession(l, &seq)
	}
	return true
}

// raiseLowest moves the lowest open sequence number up.
func (m *Machine) raiseLowest(l *lease, lowest RequestID) *lease {
	if lowest <= l.session.lowest {
		return l
	}
	seq := *l.session
	seq.lowest = lowest
	m.dropSpans(l.id, &seq, lowest)
	return m.setSession(l, &seq)
}

// dropSpans drops what a lease has of spans below an id.
func (m *Machine) dropSpans(id LeaseID, seq *session, below RequestID) {
	for seq.spans > 0 {
		var first span
		m.eachSpan(id, func(s span) bool {
			first = s
			return false
		})
		if first.from >= below {
			return
		}
		m.ended.Delete(first)
		if first.to >= below {
			first.from = below
			m.ended.Set(first)
			return
		}
		seq.spans--
	}
}

// random reports whether a request under a lease has an id that is not a
// sequence number, of one of several clients that have the lease.
func (m *state) random(req RequestID) bool {
	return req >= RandomRequest && req < AnonymousRequest && m.at(2)
}

// hasEnded reports whether a request under a live session has ended.
func (m *Machine) hasEnded(l *lease, req RequestID) bool {
	if m.random(req) {
		return m.memory.requestUnder(l.id, req) != nil
	}
	return m.endedAt(l, req)
}

// canEnd reports whether the end of a request that is not there can be
// remembered.
func (m *Machine) canEnd(l *lease, req RequestID) bool {
	if !m.at(2) || m.random(req) || req >= AnonymousRequest || l.session.spans < maxSpans {
		return true
	}
	if m.endedAt(l, req) {
		return true
	}
	before, ok := m.spanAt(l.id, req)
	_, after := m.ended.Get(span{lease: l.id, from: req + 1})
	return after || ok && before.to+1 == req
}

// endedUnder marks a request as ended under a live lease, so that a late
// duplicate is refused.
func (m *Machine) endedUnder(l *lease, req RequestID) {
	switch {
	case l.own() || req == 0 || req >= AnonymousRequest:
	case m.random(req):
		if m.memory.requestUnder(l.id, req) == nil {
			m.memory.remember(past{revision: m.revision, lease: l.id, request: req, cause: EndReleased, at: m.stamp})
		}
	case req >= l.session.lowest:
		m.addEnded(l, req)
	}
}
