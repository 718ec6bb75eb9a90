package machine

import (
	"slices"

	"github.com/distlock/distlock/fence"
)

const maxTokens = uint64(fence.MaxToken)

func (m *Machine) abandon(c *Abandon) Result {
	id := c.Lease
	if id == 0 {
		own, ok := m.requests[c.Request]
		if !ok {
			// Not here yet, or ended: an Acquire that arrives later is late.
			if c.Request != 0 && c.Request < AnonymousRequest && m.memory.request(c.Request) == nil {
				m.memory.remember(past{revision: m.revision, request: c.Request, cause: EndReleased, at: m.stamp})
			}
			return Result{}
		}
		id = own
	}
	l := m.lease(id)
	if l == nil {
		return Result{}
	}
	if a := m.acquisition(id, c.Request); a != nil {
		m.giveBack(l, a)
	} else {
		m.endedUnder(l, c.Request)
	}
	return Result{}
}

// giveBack ends an acquisition cleanly, waiting or granted, and with it a
// lease of its own.
func (m *Machine) giveBack(l *lease, a *acquisition) {
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
	m.settle()
}

func (m *Machine) release(c *Release) Result {
	a := m.findHold(c)
	if a != nil {
		m.giveBack(m.lease(a.lease), a)
		return Result{}
	}
	if p := m.memory.token(c.Token); p != nil && (c.Lease == 0 || p.lease == c.Lease) && p.on(c.Name) {
		if p.cause == EndReleased {
			return Result{}
		}
		return Result{Refusal: m.notHeld(c, p.ended())}
	}
	if l := m.lease(c.Lease); l != nil {
		if refusal := m.neverHeld(l, c); refusal != nil {
			return Result{Refusal: refusal}
		}
		return Result{} // released before, so long ago that it is forgotten
	}
	if p := m.memory.lease(c.Lease); p != nil {
		return Result{Refusal: m.notHeld(c, p.ended())}
	}
	return Result{Refusal: m.notHeld(c, nil)}
}

func (p *past) on(name string) bool {
	return name == "" || slices.Contains(p.names, name)
}

// findHold finds the live hold that a release means, or nil.
func (m *Machine) findHold(c *Release) *acquisition {
	a := m.hold(c.Token)
	if a == nil || c.Lease != 0 && c.Lease != a.lease || c.Name != "" && !slices.Contains(a.names(), c.Name) {
		return nil
	}
	return a
}

// neverHeld refuses a release, under a live lease, of a token that the lease
// has lost or cannot have had. Nil means that it was released before.
func (m *Machine) neverHeld(l *lease, c *Release) *Refusal {
	if l.own() { // its one hold is live, with another token
		return m.notHeld(c, nil)
	}
	for _, f := range l.session.forced {
		if f.token == c.Token {
			end := f.end
			return m.notHeld(c, &end)
		}
	}
	switch {
	case c.Token <= l.session.after || uint64(c.Token) > m.minted, // minted before the lease, or never
		m.hold(c.Token) != nil,         // of another lease, or on other locks
		m.memory.token(c.Token) != nil: // likewise, and ended
		return m.notHeld(c, nil)
	}
	return nil
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
		r.Since = c.Token != 0 && r.Last > c.Token
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
		m.recordForced(l.id, a.token, Ended{Cause: cause, By: by, At: m.stamp, Revision: m.revision})
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
