package machine

import (
	"slices"

	"github.com/distlock/distlock/fence"
)

func (m *Machine) acquire(c *Acquire) Result {
	if field := c.invalid(); field != "" {
		return refuse(Refusal{Reason: ReasonInvalid, Field: field, Lease: c.Lease})
	}
	var l *lease
	if c.Lease == 0 {
		if id, ok := m.requests[c.Request]; ok {
			return m.again(c, id, m.acquisition(id, c.Request))
		}
		if end := m.memory.request(c.Request); end != nil {
			return refuse(Refusal{Reason: ReasonRequestEnded, Lease: end.lease, Token: end.token, Ended: end.ended()})
		}
	} else {
		if l = m.lease(c.Lease); l == nil {
			return Result{Refusal: m.leaseGone(c.Lease)}
		}
		if l.own() {
			return refuse(Refusal{Reason: ReasonInvalid, Field: "lease_id", Lease: l.id})
		}
		if c.Request < AnonymousRequest {
			if !m.random(c.Request) {
				l = m.raiseLowest(l, c.LowestOpen)
			}
			if m.hasEnded(l, c.Request) {
				return refuse(Refusal{Reason: ReasonRequestEnded, Lease: l.id})
			}
			if !m.at(2) && c.Request > l.session.lowest+maxOutstanding {
				return refuse(Refusal{Reason: ReasonInvalid, Field: "request_id", Lease: l.id})
			}
		}
		if a := m.acquisition(l.id, c.Request); a != nil {
			return m.again(c, l.id, a)
		}
		if !m.canEnd(l, c.Request) { // what begins must be able to end
			return refuse(Refusal{Reason: ReasonInvalid, Field: "request_id", Lease: l.id})
		}
	}
	free := true
	for _, name := range c.Names {
		k := m.lock(name)
		if k == nil {
			if c.Declared {
				return m.refuseAcquire(c, l, Refusal{Reason: ReasonLockNotDeclared, Name: name})
			}
			continue
		}
		if c.Declared && !k.declared {
			return m.refuseAcquire(c, l, Refusal{Reason: ReasonLockNotDeclared, Name: name})
		}
		if c.Mode == Shared && k.shared > 0 && k.limit != c.Limit {
			return m.refuseAcquire(c, l, Refusal{Reason: ReasonLimitDisagrees, Name: name, Limit: k.limit, Asked: c.Limit})
		}
		free = free && k.waiters == 0 && k.admits(c.Mode, c.Limit)
	}
	if free && m.minted >= uint64(fence.MaxToken) {
		return m.refuseAcquire(c, l, Refusal{Reason: ReasonTokensExhausted, Name: c.Names[0]})
	}
	if !free {
		if !c.Wait {
			r := Refusal{Reason: ReasonLockHeld, Explain: m.obstacles(c.Names, c.Mode, c.Limit, ^uint64(0))}
			r.Name = r.Explain[0].Name
			if k := m.lock(r.Name); k != nil {
				r.Clock, r.ExpiresAt = k.clock, k.expires
			}
			r.Current, _ = m.live(r.Name)
			return m.refuseAcquire(c, l, r)
		}
		if c.Actor != "" {
			circle, known := m.circle(c)
			switch {
			case circle != nil:
				return m.refuseAcquire(c, l, Refusal{Reason: ReasonDeadlock, Name: circle[0].Name, Circle: circle})
			case !known:
				return m.refuseAcquire(c, l, Refusal{Reason: ReasonDeadlockUnknown, Name: c.Names[0]})
			}
		}
	}
	m.places++
	var a *acquisition
	if l == nil {
		l = &lease{terms: leaseTermsOf(c.Owner, c.TTL)}
		l.acq.request = c.Request
		m.makeLease(l)
		a = &l.acq
	} else {
		a = &acquisition{request: c.Request}
	}
	a.lease, a.place, a.since = l.id, m.places, m.stamp
	a.terms = termsOf(c.Mode, c.Limit, c.LockDelay, c.Actor, c.Metadata, c.Declared && m.at(2))
	a.setNames(c.Names)
	if !free {
		m.enterQueues(l, a)
		return Result{Lease: l.id, Waiting: true}
	}
	return Result{Lease: l.id, Hold: a.granted(m.grant(l, a))}
}

// invalid names the field that no valid request has so; requests are
// validated upstream, and this keeps the machine's own tables sound.
func (c *Acquire) invalid() string {
	switch {
	case len(c.Names) == 0 || c.Names[0] == "":
		return "names"
	case c.Mode != Exclusive && c.Mode != Shared:
		return "mode"
	case c.Mode == Exclusive && c.Limit != 0:
		return "limit"
	case c.Request == 0:
		return "request_id"
	case c.Lease == 0 && c.TTL <= 0:
		return "ttl"
	case c.LockDelay < 0:
		return "lock_delay"
	}
	for i := 1; i < len(c.Names); i++ {
		if c.Names[i-1] >= c.Names[i] {
			return "names"
		}
	}
	return ""
}

// refuseAcquire refuses a request and ends its id: a late duplicate that
// arrives when the lock is free must not be granted either.
func (m *Machine) refuseAcquire(c *Acquire, l *lease, r Refusal) Result {
	if l != nil {
		r.Lease = l.id
		m.endedUnder(l, c.Request)
	} else if c.Request < AnonymousRequest {
		m.memory.remember(past{revision: m.revision, request: c.Request, cause: EndReleased, at: m.stamp})
	}
	return refuse(r)
}

// equal reports whether a request asks for what an acquisition is. What only
// says how long to wait, and which requests are open, may differ.
func (m *Machine) equal(c *Acquire, id LeaseID, a *acquisition) bool {
	if !slices.Equal(a.names(), c.Names) || a.mode != c.Mode || a.limit != c.Limit || a.delay != c.LockDelay ||
		a.actor != c.Actor || !slices.Equal(a.metadata, c.Metadata) || m.at(2) && a.declared != c.Declared {
		return false
	}
	return c.Lease != 0 || m.lease(id).terms == leaseTermsOf(c.Owner, c.TTL)
}

// again answers a repeat of a request that is waiting or granted.
func (m *Machine) again(c *Acquire, id LeaseID, a *acquisition) Result {
	if a == nil || !m.equal(c, id, a) {
		return refuse(Refusal{Reason: ReasonRequestMismatch, Lease: id})
	}
	if c.Lease == 0 {
		m.unmark(id)
	}
	return a.result()
}

// result is how an acquisition stands.
func (a *acquisition) result() Result {
	if a.token == 0 {
		return Result{Lease: a.lease, Waiting: true}
	}
	return Result{Lease: a.lease, Hold: a.granted(a.locks())}
}

// granted shows a granted acquisition, whose locks() are given.
func (a *acquisition) granted(locks []HeldLock) *Hold {
	return &Hold{Lease: a.lease, Request: a.request, Token: a.token, Mode: a.mode, Since: a.since, Locks: locks}
}

func (a *acquisition) locks() []HeldLock {
	return a.appendLocks(make([]HeldLock, 0, len(a.names())))
}

func (a *acquisition) appendLocks(list []HeldLock) []HeldLock {
	for i, name := range a.names() {
		list = append(list, HeldLock{Name: name, Floor: a.floor(i), Clock: a.clock(i)})
	}
	return list
}

// locksOf is locks, for an event: out of a piece of memory that all of a
// batch's events share, as long as there is room.
func (m *Machine) locksOf(a *acquisition) []HeldLock {
	from := len(m.listed)
	if from+len(a.names()) > cap(m.listed) {
		return a.locks()
	}
	m.listed = a.appendLocks(m.listed)
	return m.listed[from:len(m.listed):len(m.listed)]
}

func (a *acquisition) floor(i int) fence.Token {
	if a.floors == nil {
		return a.token
	}
	return a.floors[i]
}

func (a *acquisition) clock(i int) uint64 {
	if a.clocks == nil {
		return 0
	}
	return a.clocks[i]
}

// admits reports whether the lock, queue aside, has room for one more holder.
func (k *lock) admits(mode Mode, limit uint32) bool {
	switch {
	case k.delays > 0:
		return false
	case k.holders == 0:
		return true
	case mode == Exclusive || k.mode() == Exclusive:
		return false
	}
	return limit == 0 || int64(k.holders) < int64(limit)
}

// grant gives an acquisition its locks, all of which admit it, under the next
// token. Its record is the caller's to change. It returns what the event has of
// the locks, which nobody changes.
func (m *Machine) grant(l *lease, a *acquisition) []HeldLock {
	m.minted++
	a.token, a.since = fence.Token(m.minted), m.stamp
	for i, name := range a.names() {
		k := m.editLock(name)
		m.eachHolder(name, k, func(other *acquisition) bool {
			a.setFloor(i, other.token) // shared with others: the lowest of them
			return false
		})
		m.addHolder(name, k, a)
		if a.mode == Shared {
			k.share(1, a.limit)
		}
		if k.declared {
			k.setClock(k.clock+1, m.stamp+int64(l.ttl()))
			a.setClock(i, k.clock)
		}
		m.memory.granted(name, a.token)
	}
	m.enter(l, a)
	m.tokens[a.token] = a
	m.grants++
	if l.own() {
		m.unmark(l.id)
	}
	locks := m.locksOf(a)
	m.emit(Event{Kind: EventGranted, Lease: l.id, Request: a.request, Owner: l.owner(), Token: a.token, Mode: a.mode, Locks: locks, TTL: l.ttl(), Own: l.own()})
	return locks
}

func (a *acquisition) setFloor(i int, floor fence.Token) {
	own := *a.terms
	own.floors = slices.Clone(own.floors)
	if own.floors == nil {
		own.floors = make([]fence.Token, len(a.names()))
		for j := range own.floors {
			own.floors[j] = a.token
		}
	}
	own.floors[i] = floor
	a.terms = &own
}

func (a *acquisition) setClock(i int, clock uint64) {
	own := *a.terms
	own.clocks = slices.Clone(own.clocks)
	if own.clocks == nil {
		own.clocks = make([]uint64, len(a.names()))
	}
	own.clocks[i] = clock
	a.terms = &own
}

// live returns the highest and the lowest token that hold a lock now.
func (m *state) live(name string) (highest, lowest fence.Token) {
	k := m.lock(name)
	m.eachHolder(name, k, func(a *acquisition) bool {
		lowest = a.token
		return false
	})
	if k == nil || k.holders < 2 {
		return lowest, lowest
	}
	m.holders.Descend(place{key: name, n: ^uint64(0)}, func(p place) bool {
		if p.key == name {
			highest = fence.Token(p.n)
		}
		return false
	})
	return highest, lowest
}
