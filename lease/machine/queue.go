package machine

import "slices"

// enterQueues gives an acquisition its place in the queue of each of its
// locks, in one step: that two such requests enter atomically is why they
// cannot deadlock each other.
func (m *Machine) enterQueues(l *lease, a *acquisition) {
	for _, name := range a.names() {
		k := m.editLock(name)
		k.waiters++
		if a.mode == Shared {
			k.share(1, a.limit)
		}
		m.queues.Set(place{name, a.place, a})
	}
	m.enter(l, a)
	m.waits++
	m.emit(Event{Kind: EventQueued, Lease: l.id, Request: a.request, Owner: l.owner(), Mode: a.mode, Locks: named(a.names()), Own: l.own()})
}

// dequeue takes an acquisition out of its queues.
func (m *Machine) dequeue(a *acquisition) {
	m.waits--
	for _, name := range a.names() {
		k := m.editLock(name)
		k.waiters--
		if a.mode == Shared {
			k.share(-1, k.limit)
		}
		m.queues.Delete(place{key: name, n: a.place})
		m.dropIfIdle(name, k)
	}
}

// leaveQueues ends a waiting acquisition without a grant. The caller settles.
func (m *Machine) leaveQueues(l *lease, a *acquisition, cause EndCause, by string) {
	m.dequeue(a)
	m.remove(l, a)
	m.dirty = append(m.dirty, a.names()...)
	m.emit(Event{Kind: EventAbandoned, Lease: l.id, Request: a.request, Owner: l.owner(), Mode: a.mode, Locks: named(a.names()), Cause: cause, By: by, Own: l.own()})
}

// endHold ends a granted acquisition. Its locks are delayed if it was lost.
// The caller settles.
func (m *Machine) endHold(l *lease, a *acquisition, cause EndCause, by string) {
	delayed := cause != EndReleased && cause != EndUndeclared && a.delay > 0
	for _, name := range a.names() {
		if !delayed && m.lock(name).onlyHeldOnce() {
			m.locks.Delete(name)
			m.holds--
			continue
		}
		k := m.editLock(name)
		m.removeHolder(name, k, a)
		if a.mode == Shared {
			k.share(-1, k.limit)
		}
		if !delayed {
			m.dropIfIdle(name, k)
		}
	}
	m.remove(l, a)
	delete(m.tokens, a.token)
	m.grants--
	m.dirty = append(m.dirty, a.names()...)
	rev := m.emit(Event{Kind: EventHoldEnded, Lease: l.id, Request: a.request, Owner: l.owner(), Token: a.token, Mode: a.mode, Locks: m.locksOf(a), Cause: cause, By: by, Own: l.own()})
	if delayed {
		for _, name := range a.names() {
			m.startDelay(name, a.delay)
		}
	}
	if !l.own() { // an own lease is remembered with its one hold
		m.memory.remember(past{revision: rev, lease: l.id, token: a.token, names: a.names(), cause: cause, by: by, at: m.stamp})
	}
}

func (m *Machine) startDelay(name string, d Duration) {
	// The delay's id is its event's revision: unique, and the same everywhere.
	delay := Delay{ID: m.revision + 1, Duration: d, Since: m.stamp}
	m.editLock(name).addDelays(1)
	m.delays.Set(delayOf{name, delay})
	m.emit(Event{Kind: EventDelayStarted, Locks: named([]string{name}), Delay: delay})
}

func (m *Machine) endDelay(c *EndDelay) Result {
	ended, ok := m.delays.Delete(delayOf{c.Name, Delay{ID: c.Delay}})
	if !ok {
		return Result{}
	}
	k := m.editLock(c.Name)
	k.addDelays(-1)
	m.dropIfIdle(c.Name, k)
	m.emit(Event{Kind: EventDelayEnded, Locks: named([]string{c.Name}), Delay: ended.Delay})
	m.dirty = append(m.dirty, c.Name)
	m.settle()
	return Result{}
}

// delaysOf lists the latest lock-delays of a lock, in order, at most limit.
func (m *state) delaysOf(name string, k *lock, limit int) (list []Delay) {
	if k == nil || k.delays == 0 {
		return nil
	}
	m.delays.Descend(delayOf{name, Delay{ID: ^uint64(0)}}, func(d delayOf) bool {
		if d.name != name || len(list) == limit {
			return false
		}
		list = append(list, d.Delay)
		return true
	})
	slices.Reverse(list)
	return list
}

// settle grants whatever has become grantable at the locks in m.dirty, in the
// order in which they were touched. A queue moves from its head only: a head
// that still waits for another lock keeps its place and blocks those behind.
func (m *Machine) settle() {
	for i := 0; i < len(m.dirty); i++ {
		name := m.dirty[i]
		for {
			a := m.head(name)
			if a == nil || !m.grantable(a) {
				break
			}
			m.dequeue(a)
			m.grant(m.toChange(a))
			for _, other := range a.names() {
				if other != name {
					m.dirty = append(m.dirty, other)
				}
			}
		}
	}
	m.dirty = m.dirty[:0]
}

// toChange returns copies of an acquisition and, if it is its own, its lease.
func (m *Machine) toChange(a *acquisition) (*lease, *acquisition) {
	l := m.lease(a.lease)
	if l.own() {
		fresh := *l
		return &fresh, &fresh.acq
	}
	fresh := *a
	return l, &fresh
}

func (m *Machine) head(name string) (head *acquisition) {
	if k := m.lock(name); k == nil || k.waiters == 0 {
		return nil
	}
	m.queues.Ascend(place{key: name}, func(p place) bool {
		if p.key == name {
			head = p.acq
		}
		return false
	})
	return head
}

// grantable reports whether a waiting acquisition is at the head of each of
// its queues and each lock has room for it.
func (m *Machine) grantable(a *acquisition) bool {
	if m.minted >= maxTokens {
		return false
	}
	for _, name := range a.names() {
		if m.head(name) != a || !m.lock(name).admits(a.mode, a.limit) {
			return false
		}
	}
	return true
}

func named(names []string) []HeldLock {
	list := make([]HeldLock, len(names))
	for i, name := range names {
		list[i].Name = name
	}
	return list
}
