package machine

import (
	"slices"

	"github.com/distlock/distlock/fence"
)

func (m *Machine) grantLease(c *GrantLease) Result {
	if c.TTL <= 0 {
		return refuse(Refusal{Reason: ReasonInvalid, Field: "ttl"})
	}
	if c.Request != 0 {
		if id, ok := m.requests[c.Request]; ok {
			l := m.lease(id)
			if l.own() || l.terms != leaseTermsOf(c.Owner, c.TTL) || !slices.Equal(l.session.metadata, c.Metadata) {
				return refuse(Refusal{Reason: ReasonRequestMismatch, Lease: l.id})
			}
			m.unmark(l.id)
			return Result{Lease: l.id}
		}
		if end := m.memory.request(c.Request); end != nil {
			return refuse(Refusal{Reason: ReasonRequestEnded, Lease: end.lease, Ended: end.ended()})
		}
	}
	l := &lease{terms: leaseTermsOf(c.Owner, c.TTL), session: &session{
		request: c.Request, metadata: c.Metadata, after: fence.Token(m.minted),
	}}
	m.makeLease(l)
	m.leases.Set(l.id, l)
	return Result{Lease: l.id}
}

// makeLease gives a lease its id. The caller enters it, one of its own with its
// acquisition.
func (m *Machine) makeLease(l *lease) {
	m.leaseIDs++
	l.id, l.since = LeaseID(m.leaseIDs), m.stamp
	request := l.request()
	if request != 0 {
		m.requests[request] = l.id
	}
	m.emit(Event{Kind: EventLeaseGranted, Lease: l.id, Request: request, Owner: l.owner(), TTL: l.ttl(), Own: l.own()})
}

func (m *Machine) revokeLease(c *RevokeLease) Result {
	l := m.lease(c.Lease)
	if l == nil {
		if end := m.memory.lease(c.Lease); end != nil && end.cause == EndRevoked {
			return Result{Lease: c.Lease}
		}
		return Result{Refusal: m.leaseGone(c.Lease)}
	}
	m.endLease(l, EndRevoked, c.By)
	m.settle()
	return Result{Lease: c.Lease}
}

func (m *Machine) expireLeases(c *ExpireLeases, term uint64) Result {
	if c.Term != term {
		return Result{}
	}
	// All ends come first: a lock that one of them leaves must not go to a
	// waiter that another of them takes away.
	for _, id := range c.Leases {
		if l := m.lease(id); l != nil {
			m.endLease(l, EndExpired, "")
		}
	}
	m.settle()
	return Result{}
}

// leaseGone says what is remembered of a lease that is not there.
func (m *Machine) leaseGone(id LeaseID) *Refusal {
	if end := m.memory.lease(id); end != nil {
		return &Refusal{Reason: ReasonLeaseEnded, Lease: id, Token: end.token, Ended: end.ended()}
	}
	return &Refusal{Reason: ReasonLeaseNotFound, Lease: id}
}

// endLease ends a lease with everything under it. The caller settles.
func (m *Machine) endLease(l *lease, cause EndCause, by string) {
	list := m.ofLease(l)
	byToken(list)
	for _, a := range list {
		if a.token == 0 {
			m.leaveQueues(l, a, cause, by)
		} else {
			m.endHold(l, a, cause, by)
		}
	}
	m.dropLease(l, cause, by)
}

// dropLease takes a lease, whose acquisitions have ended, out of the tables.
func (m *Machine) dropLease(l *lease, cause EndCause, by string) {
	m.leases.Delete(l.id)
	m.unmark(l.id)
	if !l.own() && l.session.spans > 0 {
		m.dropSpans(l.id, &session{spans: l.session.spans}, AnonymousRequest)
	}
	request := l.request()
	if request != 0 {
		delete(m.requests, request)
	}
	rev := m.emit(Event{Kind: EventLeaseEnded, Lease: l.id, Request: request, Owner: l.owner(), Cause: cause, By: by, Own: l.own()})
	end := past{revision: rev, lease: l.id, leaseEnd: true, cause: cause, by: by, at: m.stamp}
	if request&AnonymousRequest == 0 {
		end.request = request
	}
	if l.own() {
		end.token, end.names = l.acq.token, l.acq.names()
	}
	m.memory.remember(end)
}

func (m *Machine) setSession(l *lease, s *session) *lease {
	fresh := *l
	fresh.session = s
	m.leases.Set(l.id, &fresh)
	return &fresh
}

// recordLost keeps, on a live lease, that one of its holds ended otherwise than
// by the word of who has it.
func (m *Machine) recordLost(id LeaseID, token fence.Token, end Ended) {
	l := m.lease(id)
	seq := *l.session
	list := slices.Clone(seq.lost)
	if len(list) == maxLost {
		if m.at(2) {
			seq.dropped++
			seq.droppedTo = max(seq.droppedTo, list[0].Token)
		}
		list = list[1:]
	}
	seq.lost = append(list, Lost{token, end})
	m.setSession(l, &seq)
}

// Losses returns the latest losses under a live lease, at most 64, the oldest
// first, and how many there were in all. Nobody may change the list.
func (m *state) Losses(id LeaseID) ([]Lost, uint64) {
	l := m.lease(id)
	if l == nil || l.own() {
		return nil, 0
	}
	return l.session.lost, l.session.dropped + uint64(len(l.session.lost))
}
