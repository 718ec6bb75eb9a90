package machine

// A renewal does not reach the log, so nobody but the leader knows how much of a
// lease's time is left, and the next one gives it all of its TTL again. A mark
// bounds that: what was left, written down of a lease that nobody renews. It
// may always be left out. Taking it away may not, before more time is
// acknowledged: Clear does that for a renewal, and the machine itself where a
// grant, or the repeat of a request, acknowledges a TTL.

// noteMarks writes down what is left. Marks of another term are those of a
// leader that has been replaced, whose successor may have renewed meanwhile.
func (m *Machine) noteMarks(c *Mark, term uint64) Result {
	if !m.at(3) {
		return refuse(Refusal{Reason: ReasonInvalid, Field: "level"})
	}
	if c.Term != term {
		return Result{}
	}
	for _, k := range c.Leases {
		if m.lease(k.Lease) != nil {
			m.marks.Set(k.Lease, max(k.Left, 1))
		}
	}
	for _, k := range c.Delays {
		if d, ok := m.delays.Get(delayOf{k.Name, Delay{ID: k.Delay}}); ok {
			d.Left = max(k.Left, 1)
			m.delays.Set(d)
		}
	}
	return Result{}
}

func (m *Machine) clearMarks(c *Clear) Result {
	if !m.at(3) {
		return refuse(Refusal{Reason: ReasonInvalid, Field: "level"})
	}
	for _, id := range c.Leases {
		m.unmark(id)
	}
	return Result{}
}

// unmark is called wherever a lease is given its full TTL, and at its end.
func (m *Machine) unmark(id LeaseID) {
	if m.marks.Len() > 0 {
		m.marks.Delete(id)
	}
}

// EachMark calls fn for every lease that is marked, with what was left of its
// TTL, until it returns false.
func (m *state) EachMark(fn func(id LeaseID, left Duration) bool) { m.marks.Scan(fn) }
