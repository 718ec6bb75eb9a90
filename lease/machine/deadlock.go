package machine

// circle looks for a deadlock that a new request would close: it follows, from
// the request, every acquisition that must end before it can be granted, and
// from each of them whatever its actor waits for, until it meets the request's
// own actor. A hold without an actor assumes nothing and ends the path; a
// waiter without one is really blocked, so the path goes on through it.
//
// Edges only disappear between requests (queues only shrink ahead of a
// waiter), so looking when a request enters is enough.
func (m *Machine) circle(c *Acquire) []Link {
	s := search{m: m, actor: c.Actor, seen: make(map[uint64]bool)}
	if s.blocked(c.Names, ^uint64(0), Link{Actor: c.Actor, Lease: c.Lease}) {
		return s.path
	}
	return nil
}

type search struct {
	m     *Machine
	actor string
	seen  map[uint64]bool // places visited; only asked for membership
	path  []Link
}

// blocked visits everything ahead of place in the queues of names and every
// holder of them; from is the waiter, as it will stand in the path.
func (s *search) blocked(names []string, before uint64, from Link) bool {
	for _, name := range names {
		from.Name = name
		s.path = append(s.path, from)
		for _, a := range s.m.inFront(name, before) {
			if s.visit(a) {
				return true
			}
		}
		s.path = s.path[:len(s.path)-1]
	}
	return false
}

// visit reports whether the search's actor must act before a can end.
func (s *search) visit(a *acquisition) bool {
	if a.actor == s.actor {
		s.path = append(s.path, Link{Actor: a.actor, Lease: a.lease})
		return true
	}
	if s.seen[a.place] {
		return false
	}
	s.seen[a.place] = true
	if a.token == 0 && s.blocked(a.names(), a.place, Link{Actor: a.actor, Lease: a.lease}) {
		return true
	}
	if a.actor == "" {
		return false
	}
	for _, w := range s.m.waitsOf(a.actor) {
		if !s.seen[w.place] {
			s.seen[w.place] = true
			if s.blocked(w.names(), w.place, Link{Actor: w.actor, Lease: w.lease}) {
				return true
			}
		}
	}
	return false
}

// inFront lists a lock's holders, then the waiters ahead of a place.
func (m *Machine) inFront(name string, before uint64) []*acquisition {
	list := m.holdersOf(name)
	m.queues.Ascend(place{key: name}, func(p place) bool {
		if p.key != name || p.n >= before {
			return false
		}
		list = append(list, p.acq)
		return true
	})
	return list
}

func (m *Machine) waitsOf(actor string) []*acquisition {
	var list []*acquisition
	m.actors.Ascend(place{key: actor}, func(p place) bool {
		if p.key != actor {
			return false
		}
		list = append(list, p.acq)
		return true
	})
	return list
}
