package machine

import (
	"slices"

	"github.com/distlock/distlock/fence"
)

const maxTokens = uint64(fence.MaxToken)

func (m *Machine) abandon(c *Abandon) Result {
	refusal := m.endRequest(c.Lease, c.Request)
	m.settle()
	return Result{Refusal: refusal}
}

// endRequest ends a request, whatever has become of it. The caller settles.
func (m *Machine) endRequest(id LeaseID, req RequestID) *Refusal {
	if id == 0 {
		own, ok := m.requests[req]
		if !ok {
			// Not here yet, or ended: an Acquire that arrives later is late.
			if req != 0 && req < AnonymousRequest && m.memory.request(req) == nil {
				m.memory.remember(past{revision: m.revision, request: req, cause: EndReleased, at: m.stamp})
			}
			return nil
		}
		id = own
	}
	l := m.lease(id)
	if l == nil {
		return nil
	}
	switch a := m.acquisition(id, req); {
	case a != nil:
		m.end(l, a)
	case l.own():
	case !m.canEnd(l, req):
		return &Refusal{Reason: ReasonInvalid, Field: "request_id", Lease: l.id}
	default:
		m.endedUnder(l, req)
	}
	return nil
}

func (m *Machine) abandonAll(c *AbandonAll) Result {
	if !m.at(2) {
		return refuse(Refusal{Reason: ReasonInvalid, Field: "level"})
	}
	// All ends come first: a lock that one of them leaves must not go to a
	// waiter that another of them takes away.
	var refusal *Refusal
	for _, id := range c.Requests {
		if refusal = m.endRequest(c.Lease, id); refusal != nil {
			break
		}
	}
	if l := m.lease(c.Lease); l != nil && c.EndLease && refusal == nil {
		m.endLease(l, EndReleased, "")
	}
	m.settle()
	return Result{Refusal: refusal}
}

func (m *Machine) endWait(c *EndWait) Result {
	if !m.at(2) {
		return refuse(Refusal{Reason: ReasonInvalid, Field: "level"})
	}
	found, ok := m.Find(c.Lease, c.Request)
	switch {
	case !ok && c.Lease == 0:
		return Result{Refusal: m.RequestGone(c.Request)}
	case !ok:
		r := Refusal{Reason: ReasonRequestNotFound, Lease: c.Lease}
		switch l := m.lease(c.Lease); {
		case l == nil:
			return Result{Refusal: m.leaseGone(c.Lease)}
		case !l.own() && c.Request < AnonymousRequest && m.hasEnded(l, c.Request):
			r.Reason = ReasonRequestEnded
		}
		return refuse(r)
	case found.Waiting:
		m.giveBack(m.lease(found.Lease), m.acquisition(found.Lease, c.Request))
		return Result{Lease: found.Lease}
	}
	return found
}

// giveBack ends an acquisition cleanly, waiting or granted, and with it a
// lease of its own.
func (m *Machine) giveBack(l *lease, a *acquisition) {
	m.end(l, a)
	m.settle()
}

// end is giveBack for a caller that settles.
func (m *Machine) end(l *lease, a *acquisition) {
	if a.token == 0 {
		m.leaveQueues(l, a, EndReleased, "")
	} else {
		m.endHold(l, a, EndReleased, "")
	}
	if l.own() {
		m.dropLease(l, EndReleased, "")
	} else {
		m.endedUnder(l, a.request)
	}
}

func (m *Machine) release(c *Release) Result {
	if c.Request != 0 && (!m.at(2) || c.Lease == 0) {
		return refuse(Refusal{Reason: ReasonInvalid, Field: "request_id", Lease: c.Lease})
	}
	if a := m.findHold(c); a != nil {
		if l := m.lease(a.lease); c.Lease == 0 && (l.own() || m.at(2)) {
			m.releaseElsewhere(l, a)
		} else {
			m.giveBack(l, a)
		}
		return Result{}
	}
	l := m.lease(c.Lease)
	if l != nil && !l.own() {
		for _, lost := range l.session.lost {
			if lost.Token == c.Token && lost.Ended.Cause != EndReleased {
				end := lost.Ended
				return Result{Refusal: m.notHeld(c, &end)}
			}
		}
	}
	if p := m.memory.token(c.Token); p != nil && (c.Lease == 0 || p.lease == c.Lease) && p.on(c.Name) {
		if p.cause == EndReleased {
			return Result{}
		}
		return Result{Refusal: m.notHeld(c, p.ended())}
	}
	switch {
	case l == nil:
		if p := m.memory.lease(c.Lease); p != nil {
			return Result{Refusal: m.notHeld(c, p.ended())}
		}
	case c.Request != 0 && !l.own() && m.hold(c.Token) == nil && m.memory.token(c.Token) == nil && uint64(c.Token) <= m.minted &&
		c.Token > max(l.session.after, l.session.droppedTo) && m.hasEnded(l, c.Request):
		return Result{} // released before, so long ago that it is forgotten
	}
	return Result{Refusal: m.notHeld(c, nil)}
}

// releaseElsewhere ends a hold on the word of somebody who knows its token, but
// not its lease: to who has the lease it is lost, though cleanly.
func (m *Machine) releaseElsewhere(l *lease, a *acquisition) {
	m.endHold(l, a, EndReleased, "")
	if l.own() {
		m.dropLease(l, EndReleased, "")
	} else {
		m.recordLost(l.id, a.token, Ended{Cause: EndReleased, At: m.stamp, Revision: m.revision})
		m.endedUnder(m.lease(l.id), a.request)
	}
	m.events[len(m.events)-1].Elsewhere = true
	m.settle()
}

func (p *past) on(name string) bool {
	return name == "" || slices.Contains(p.names, name)
}

// findHold finds the live hold that a release means, or nil.
func (m *Machine) findHold(c *Release) *acquisition {
	a := m.hold(c.Token)
	if a == nil || c.Lease != 0 && c.Lease != a.lease || c.Name != "" && !slices.Contains(a.names(), c.Name) ||
		c.Request != 0 && c.Request != a.request {
		return nil
	}
	return a
}

// notHeld says why a token is not of a live hold, and how the lock stands.
func (m *Machine) notHeld(c *Release, end *Ended) *Refusal {
	r := &Refusal{Reason: ReasonNotHeld, Name: c.Name, Lease: c.Lease, Token: c.Token, Ended: end}
	if c.Name == "" {
		if p := m.memory.token(c.Token); p != nil && len(p.names) > 0 {
			r.Name = p.names[0]
		}
	}
	if r.Name != "" {
		r.Current, _ = m.live(r.Name)
		r.Last = m.lastOn(r.Name)
		r.GrantedSince = c.Token != 0 && r.Last > c.Token
	}
	return r
}

func (m *state) lastOn(name string) fence.Token {
	if k := m.lock(name); k != nil {
		return k.last()
	}
	return m.memory.last(name)
}

func (m *Machine) forceRelease(c *ForceRelease) Result {
	var list []*acquisition
	if c.Token != 0 {
		if a := m.holder(c.Name, c.Token); a != nil {
			list = append(list, a)
		}
	} else {
		list = m.holdersOf(c.Name)
	}
	if len(list) == 0 {
		var end *Ended
		if p := m.memory.token(c.Token); p != nil {
			end = p.ended()
		}
		return Result{Refusal: m.notHeld(&Release{Name: c.Name, Token: c.Token}, end)}
	}
	m.breakHolds(list, EndForceReleased, c.By)
	return Result{}
}

func (m *state) holdersOf(name string) (list []*acquisition) {
	m.eachHolder(name, m.lock(name), func(a *acquisition) bool {
		list = append(list, a)
		return true
	})
	return list
}

// breakHolds ends holds against their holders' will. All end before anyone
// behind them is granted.
func (m *Machine) breakHolds(list []*acquisition, cause EndCause, by string) {
	for _, a := range list {
		l := m.lease(a.lease)
		m.endHold(l, a, cause, by)
		if l.own() {
			m.dropLease(l, cause, by)
			continue
		}
		m.recordLost(l.id, a.token, Ended{Cause: cause, By: by, At: m.stamp, Revision: m.revision})
		m.endedUnder(m.lease(l.id), a.request)
	}
	m.settle()
}

func (m *Machine) declare(c *Declare) Result {
	if c.Name == "" {
		return refuse(Refusal{Reason: ReasonInvalid, Field: "name"})
	}
	if k := m.lock(c.Name); k != nil && k.declared {
		return refuse(Refusal{Reason: ReasonLockDeclared, Name: c.Name})
	}
	m.editLock(c.Name).change(func(t *traits) { t.declared = true })
	m.emit(Event{Kind: EventDeclared, Locks: named([]string{c.Name})})
	return Result{}
}

func (m *Machine) undeclare(c *Undeclare) Result {
	k := m.lock(c.Name)
	if k == nil || !k.declared {
		return refuse(Refusal{Reason: ReasonLockNotDeclared, Name: c.Name})
	}
	k = m.editLock(c.Name)
	k.change(func(t *traits) { t.declared, t.clock, t.expires = false, 0, 0 })
	m.emit(Event{Kind: EventUndeclared, Locks: named([]string{c.Name})})
	m.dropIfIdle(c.Name, k)
	m.breakHolds(m.holdersOf(c.Name), EndUndeclared, "")
	return Result{}
}

func (m *Machine) releaseClock(c *ReleaseClock) Result {
	k := m.lock(c.Name)
	if k == nil || !k.declared {
		return refuse(Refusal{Reason: ReasonLockNotDeclared, Name: c.Name})
	}
	if k.clock != c.Clock {
		return refuse(Refusal{Reason: ReasonClockDisagrees, Name: c.Name, Clock: k.clock, AskedClock: c.Clock})
	}
	for _, a := range m.holdersOf(c.Name) {
		for i, name := range a.names() {
			if name == c.Name && a.clock(i) == c.Clock {
				m.giveBack(m.lease(a.lease), a)
				return Result{}
			}
		}
	}
	return Result{} // expired or released before; the original succeeds too
}
