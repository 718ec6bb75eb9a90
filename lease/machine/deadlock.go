package machine

import (
	"slices"
)

// A request would deadlock if it had to wait for its own actor: for a hold or a
// waiter of the actor, or for one whose end waits for such, and so on. An
// acquisition that waits has in front of it, at each of its locks, the holders
// and the waiters ahead; of a queue it is enough to look at the next one ahead,
// and at the holders from its head. An actor whose acquisition is in the way may
// itself be waiting with another one. A hold without an actor assumes nothing
// and ends the path; a waiter without one is really blocked, so the path goes on
// through it.
//
// Edges only disappear between requests (queues only shrink ahead of a waiter),
// so looking when a request enters is enough.

// maxSteps bounds how many of these relations are looked at for one request,
// from either end: about a millisecond.
const maxSteps = 4096

// circle returns the deadlock that a request would close, nil when there is
// none. known is false when that is not found out within the bound. It looks
// from both ends in turn, and further each time: the smaller side decides.
func (m *Machine) circle(c *Acquire) (path []Link, known bool) {
	alone := true
	m.actors.Ascend(place{key: c.Actor}, func(p place) bool {
		alone = p.key != c.Actor
		return false
	})
	if alone {
		return nil, true // nothing waits for an actor that has nothing
	}
	for steps := 64; ; steps *= 4 {
		for _, find := range []func(*Acquire, int) ([]Link, bool){m.forward, m.backward} {
			if path, known := find(c, steps); known {
				return path, true
			}
		}
		if steps >= maxSteps && m.at(2) || steps > 1<<56 {
			return nil, false
		}
	}
}

// waiting is a step of a search: an acquisition that waits, and the lock and the
// step by which it was come to.
type waiting struct {
	acq   *acquisition // nil for the request itself
	by    string       // forward: what the step before waits for; backward: what this does
	from  int          // the step before; -1 for none
	front *acquisition // backward: what this has in front of it
}

// search is a walk over what waits.
type search struct {
	m      *Machine
	list   []waiting
	seen   map[uint64]bool // places
	actors map[string]bool // whose acquisitions have been looked at
	left   int             // steps
}

func (m *Machine) newSearch(steps int) *search {
	return &search{m: m, seen: make(map[uint64]bool), actors: make(map[string]bool), left: steps}
}

func (s *search) push(w waiting) {
	if !s.seen[w.acq.place] {
		s.seen[w.acq.place] = true
		s.list = append(s.list, w)
	}
}

// forward looks for the request's actor in front of the request.
func (m *Machine) forward(c *Acquire, steps int) (path []Link, known bool) {
	s := m.newSearch(steps)
	s.list = append(s.list, waiting{from: -1})
	for i := 0; i < len(s.list); i++ {
		names, before := c.Names, ^uint64(0)
		if a := s.list[i].acq; a != nil {
			names, before = a.names(), a.place
		}
		for _, name := range names {
			var found *acquisition
			s.m.inFront(name, before, func(y *acquisition) bool {
				if s.left--; s.left < 0 {
					return false
				}
				if y.actor == c.Actor {
					found = y
					return false
				}
				if y.token == 0 {
					s.push(waiting{acq: y, by: name, from: i})
				}
				if y.actor != "" && !s.actors[y.actor] {
					s.actors[y.actor] = true
					s.eachOf(y.actor, func(u *acquisition) bool {
						if u.token == 0 {
							s.push(waiting{acq: u, by: name, from: i})
						}
						return true
					})
				}
				return s.left >= 0
			})
			if found != nil {
				return s.ahead(c, i, name, found), true
			}
			if s.left < 0 {
				return nil, false
			}
		}
	}
	return nil, true
}

// inFront calls fn for what a waiter at a place has directly in front of it at
// a lock, until it returns false.
func (m *state) inFront(name string, before uint64, fn func(*acquisition) bool) {
	var next *acquisition
	m.queues.Descend(place{key: name, n: before}, func(p place) bool {
		if p.key == name && p.n == before {
			return true
		}
		if p.key == name {
			next = p.acq
		}
		return false
	})
	if next != nil {
		fn(next)
		return
	}
	m.eachHolder(name, m.lock(name), fn)
}

// eachOf calls fn for an actor's acquisitions, until it returns false or no
// steps are left.
func (s *search) eachOf(actor string, fn func(*acquisition) bool) {
	s.m.actors.Ascend(place{key: actor}, func(p place) bool {
		if p.key != actor {
			return false
		}
		s.left--
		return s.left >= 0 && fn(p.acq)
	})
}

// ahead is the circle from the request, by the steps to i, to its actor's own.
func (s *search) ahead(c *Acquire, i int, name string, own *acquisition) (path []Link) {
	last := uint64(0) // place of the link before
	for ; i >= 0; i = s.list[i].from {
		link := Link{Actor: c.Actor, Name: name, Lease: c.Lease}
		before := ^uint64(0)
		if a := s.list[i].acq; a != nil {
			link.Actor, link.Lease, before = a.actor, a.lease, a.place
		}
		// Whoever is in front of one who waits ahead of it in the same queue is
		// in front of it, too.
		if n := len(path); n > 0 && path[n-1].Name == name && last < before {
			path = path[:n-1]
		}
		path, last = append(path, link), before
		name = s.list[i].by
	}
	slices.Reverse(path)
	return append(path, Link{Actor: own.actor, Lease: own.lease})
}

// backward looks for the request behind its actor's acquisitions.
func (m *Machine) backward(c *Acquire, steps int) (path []Link, known bool) {
	s := m.newSearch(steps)
	var met *acquisition
	var at string
	// blocks goes through whoever waits directly behind an acquisition. It
	// reports false when the search is over.
	blocks := func(a *acquisition, from int) bool {
		for _, name := range a.names() {
			if s.left--; s.left < 0 {
				return false
			}
			if _, found := slices.BinarySearch(c.Names, name); found {
				met, at = a, name
				return false
			}
			s.m.behind(name, a, func(w *acquisition) { s.push(waiting{w, name, from, a}) })
		}
		return true
	}
	// all does that for an actor's acquisitions.
	all := func(actor string, from int) {
		s.actors[actor] = true
		s.eachOf(actor, func(a *acquisition) bool { return blocks(a, from) })
	}
	all(c.Actor, -1)
	last := -1
	for i := 0; i < len(s.list) && met == nil && s.left >= 0; i++ {
		last = i
		w := s.list[i].acq
		if w.actor == "" {
			blocks(w, i)
		} else if !s.actors[w.actor] {
			all(w.actor, i)
		}
	}
	switch {
	case met != nil && met.actor == c.Actor:
		return []Link{{Actor: c.Actor, Name: at, Lease: c.Lease}, {Actor: c.Actor, Lease: met.lease}}, true
	case met != nil:
		path = []Link{{Actor: c.Actor, Name: at, Lease: c.Lease}}
		for i := last; ; i = s.list[i].from {
			w := s.list[i]
			path = append(path, Link{Actor: w.acq.actor, Name: w.by, Lease: w.acq.lease})
			if w.from < 0 {
				return append(path, Link{Actor: c.Actor, Lease: w.front.lease}), true
			}
		}
	case s.left < 0:
		return nil, false
	}
	return nil, true
}

// behind calls fn for the waiter that has an acquisition directly in front of
// it at a lock, if there is one.
func (m *state) behind(name string, a *acquisition, fn func(*acquisition)) {
	from := place{key: name}
	if a.token == 0 {
		from.n = a.place + 1
	}
	m.queues.Ascend(from, func(p place) bool {
		if p.key == name {
			fn(p.acq)
		}
		return false
	})
}
