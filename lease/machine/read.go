package machine

import (
	"fmt"
	"sort"
	"strings"

	"github.com/distlock/distlock/fence"
)

// Revision is that of the last event.
func (m *state) Revision() uint64 { return m.revision }

// LastToken is the highest token minted.
func (m *state) LastToken() fence.Token { return fence.Token(m.minted) }

// Counts are the sizes of the tables.
func (m *state) Counts() Counts {
	return Counts{
		Leases: m.leases.Len(), Locks: m.locks.Len(), Waiters: m.waits,
		Holds: m.holds, Remembered: m.memory.len(), Marks: m.marks.Len(),
	}
}

// TTL returns the TTL of a live lease.
func (m *state) TTL(id LeaseID) (Duration, bool) {
	l := m.lease(id)
	if l == nil {
		return 0, false
	}
	return l.ttl(), true
}

// Lease shows a live lease.
func (m *state) Lease(id LeaseID) (Lease, bool) {
	l := m.lease(id)
	if l == nil {
		return Lease{}, false
	}
	return m.show(l), true
}

func (m *state) show(l *lease) Lease {
	out := Lease{ID: l.id, TTL: l.ttl(), Owner: l.owner(), Since: l.since, Own: l.own(), Request: l.request()}
	if !l.own() {
		out.Metadata = l.session.metadata
	}
	list := m.ofLease(l)
	byToken(list)
	for _, a := range list {
		if a.token == 0 {
			out.Waits = append(out.Waits, Wait{Request: a.request, Names: a.names(), Mode: a.mode, Since: a.since})
		} else {
			out.Holds = append(out.Holds, *a.granted(a.locks()))
		}
	}
	return out
}

// LeaseGone says what is remembered of a lease that is not live.
func (m *Machine) LeaseGone(id LeaseID) *Refusal { return m.leaseGone(id) }

// AscendLeases calls fn for the leases with an id above after, in order,
// until it returns false.
func (m *state) AscendLeases(after LeaseID, fn func(Lease) bool) {
	m.leases.Ascend(after+1, func(_ LeaseID, l *lease) bool { return fn(m.show(l)) })
}

// EachLease calls fn for every live lease, in order of id, until it returns
// false. lossy tells that Losses has some.
func (m *state) EachLease(fn func(id LeaseID, ttl Duration, lossy bool) bool) {
	m.leases.Scan(func(_ LeaseID, l *lease) bool { return fn(l.id, l.ttl(), !l.own() && len(l.session.lost) > 0) })
}

// RequestGone says what is remembered of a request with a lease of its own that
// Find does not find.
func (m *Machine) RequestGone(req RequestID) *Refusal {
	if end := m.memory.request(req); end != nil {
		return &Refusal{Reason: ReasonRequestEnded, Lease: end.lease, Token: end.token, Ended: end.ended()}
	}
	return &Refusal{Reason: ReasonRequestNotFound}
}

// EachWaiter calls fn for every waiting acquisition, until it returns false.
// own tells that its lease was made with it.
func (m *state) EachWaiter(fn func(id LeaseID, own bool, request RequestID) bool) {
	m.queues.Scan(func(p place) bool {
		if a := p.acq; p.key == a.names()[0] {
			l := m.lease(a.lease)
			return fn(a.lease, l != nil && l.own(), a.request)
		}
		return true
	})
}

// EachDelay calls fn for every lock-delay that has not ended.
func (m *state) EachDelay(fn func(name string, d Delay) bool) {
	m.delays.Scan(func(d delayOf) bool { return fn(d.name, d.Delay) })
}

// Find returns an acquisition that waits or is granted. Lease 0 means one
// with a lease of its own.
func (m *Machine) Find(id LeaseID, req RequestID) (Result, bool) {
	if id == 0 {
		own, ok := m.requests[req]
		if !ok {
			return Result{}, false
		}
		id = own
	}
	a := m.acquisition(id, req)
	if a == nil {
		return Result{}, false
	}
	return a.result(), true
}

// Explain says what a waiting acquisition waits for; nil when it does not.
func (m *state) Explain(id LeaseID, req RequestID) []Obstacle {
	a := m.acquisition(id, req)
	if a == nil || a.token != 0 {
		return nil
	}
	return m.obstacles(a.names(), a.mode, a.limit, a.place)
}

// obstacles lists what stands between a request and its locks; before is its
// place in the queues, or the highest number for one that is in none.
func (m *state) obstacles(names []string, mode Mode, limit uint32, before uint64) []Obstacle {
	var list []Obstacle
	for _, name := range names {
		k := m.lock(name)
		if k == nil {
			continue
		}
		ahead := int(k.waiters)
		if before != ^uint64(0) {
			ahead = m.rank(place{key: name, n: before}) - m.rank(place{key: name})
		}
		if ahead == 0 && k.admits(mode, limit) {
			continue
		}
		o := Obstacle{Name: name, Limit: limit, HolderCount: int(k.holders), Delays: m.delaysOf(name, k, MaxExplained)}
		if before != ^uint64(0) {
			o.Position = ahead + 1
		}
		m.queues.Ascend(place{key: name}, func(p place) bool {
			if p.key != name || p.n >= before || len(o.Ahead) == MaxExplained {
				return false
			}
			o.Ahead = append(o.Ahead, m.showWaiter(p.acq))
			return true
		})
		m.eachHolder(name, k, func(a *acquisition) bool {
			o.Holders = append(o.Holders, m.showHolder(name, a))
			return len(o.Holders) < MaxExplained
		})
		list = append(list, o)
	}
	return list
}

// rank counts the places before one in the table of all queues, in O(log² n).
func (m *state) rank(p place) int {
	return sort.Search(m.queues.Len(), func(i int) bool {
		at, _ := m.queues.GetAt(i)
		return !lessPlace(at, p)
	})
}

func (m *state) showHolder(name string, a *acquisition) Holder {
	h := Holder{
		Lease: a.lease, Request: a.request, Token: a.token, Mode: a.mode, Since: a.since,
		LockDelay: a.delay, Actor: a.actor, Metadata: a.metadata,
	}
	if l := m.lease(a.lease); l != nil {
		h.Owner = l.owner()
	}
	for i, n := range a.names() {
		if n == name {
			h.Floor = a.floor(i)
		}
	}
	return h
}

func (m *state) showWaiter(a *acquisition) Waiter {
	w := Waiter{Lease: a.lease, Request: a.request, Mode: a.mode, Limit: a.limit, Since: a.since, Actor: a.actor, Metadata: a.metadata}
	if l := m.lease(a.lease); l != nil {
		w.Owner = l.owner()
	}
	return w
}

// Lock shows a lock; false when nothing keeps it in existence.
func (m *state) Lock(name string) (Lock, bool) {
	k := m.lock(name)
	if k == nil {
		return Lock{Name: name, Last: m.memory.last(name)}, false
	}
	return m.showLock(name, k), true
}

func (m *state) showLock(name string, k *lock) Lock {
	out := Lock{
		Name: name, Delays: m.delaysOf(name, k, MaxListed), Declared: k.declared, Clock: k.clock, ExpiresAt: k.expires,
		Last: k.last(), HolderCount: int(k.holders), WaiterCount: int(k.waiters),
	}
	if k.shared > 0 {
		out.Limit = k.limit
	}
	m.eachHolder(name, k, func(a *acquisition) bool {
		out.Holders = append(out.Holders, m.showHolder(name, a))
		return len(out.Holders) < MaxListed
	})
	m.queues.Ascend(place{key: name}, func(p place) bool {
		if p.key != name || len(out.Waiters) == MaxListed {
			return false
		}
		out.Waiters = append(out.Waiters, m.showWaiter(p.acq))
		return true
	})
	return out
}

// AscendLocks calls fn for the locks with a name of at least from, in order,
// until it returns false.
func (m *state) AscendLocks(from string, fn func(Lock) bool) {
	m.locks.Ascend(from, func(name string, k *lock) bool { return fn(m.showLock(name, k)) })
}

// Live returns the highest and the lowest token that hold a lock, 0 when it is
// free; whether token is one of them; and the last one granted, when known.
func (m *state) Live(name string, token fence.Token) (highest, lowest fence.Token, live bool, last fence.Token) {
	highest, lowest = m.live(name)
	return highest, lowest, m.holder(name, token) != nil, m.lastOn(name)
}

// String names the mode.
func (m Mode) String() string {
	switch m {
	case Exclusive:
		return "exclusive"
	case Shared:
		return "shared"
	}
	return fmt.Sprintf("mode %d", uint8(m))
}

// String names the cause.
func (c EndCause) String() string {
	switch c {
	case EndReleased:
		return "released"
	case EndExpired:
		return "expired"
	case EndRevoked:
		return "revoked"
	case EndForceReleased:
		return "force-released"
	case EndUndeclared:
		return "undeclared"
	}
	return fmt.Sprintf("cause %d", uint8(c))
}

// String says how something ended, and by whom.
func (e *Ended) String() string {
	if e.By != "" {
		return e.Cause.String() + " by " + e.By
	}
	return e.Cause.String()
}

// Error says in one line what was refused and why.
func (r *Refusal) Error() string {
	switch r.Reason {
	case ReasonLeaseNotFound:
		return fmt.Sprintf("there is no lease %d", r.Lease)
	case ReasonLeaseEnded:
		return fmt.Sprintf("lease %d has ended: %v", r.Lease, r.Ended)
	case ReasonRequestEnded:
		return "the request has ended: use a new request id"
	case ReasonRequestNotFound:
		return "there is no such request: it has not arrived, or is forgotten"
	case ReasonRequestMismatch:
		return "the request id was used for a different request"
	case ReasonLockHeld:
		return fmt.Sprintf("lock %q is not free: %s", r.Name, why(r.Explain))
	case ReasonLimitDisagrees:
		return fmt.Sprintf("lock %q is shared with limit %s, the request has limit %s", r.Name, limited(r.Limit), limited(r.Asked))
	case ReasonDeadlock:
		return fmt.Sprintf("waiting for lock %q would deadlock: %s", r.Name, circled(r.Circle))
	case ReasonDeadlockUnknown:
		return fmt.Sprintf("lock %q: too many wait for each other to find out whether to wait for it would deadlock; try again when fewer do", r.Name)
	case ReasonNotHeld:
		return r.notHeld()
	case ReasonLockNotDeclared:
		return fmt.Sprintf("A lock with key %s does not exist", r.Name)
	case ReasonLockDeclared:
		return fmt.Sprintf("A lock with key %s already exists", r.Name)
	case ReasonClockDisagrees:
		return fmt.Sprintf("A lock with key %s has clock %d, the release has clock %d", r.Name, r.Clock, r.AskedClock)
	case ReasonTokensExhausted:
		return "the store has no tokens left"
	case ReasonInvalid:
		return r.Field + " is not valid"
	}
	return string(r.Reason)
}

func (r *Refusal) notHeld() string {
	var b strings.Builder
	fmt.Fprintf(&b, "token %d does not hold", r.Token)
	if r.Token == 0 {
		b.Reset()
		b.WriteString("nobody holds")
	}
	if r.Name != "" {
		fmt.Fprintf(&b, " lock %q", r.Name)
	} else {
		b.WriteString(" a lock")
	}
	if r.Ended != nil {
		fmt.Fprintf(&b, ": %v", r.Ended)
	}
	switch {
	case r.Current != 0:
		fmt.Fprintf(&b, "; token %d holds it now", r.Current)
	case r.GrantedSince:
		fmt.Fprintf(&b, "; it was granted since, last with token %d", r.Last)
	}
	return b.String()
}

func limited(n uint32) string {
	if n == 0 {
		return "none"
	}
	return fmt.Sprint(n)
}

func why(list []Obstacle) string {
	if len(list) == 0 {
		return "it is being granted to another"
	}
	o := list[0]
	switch {
	case len(o.Holders) > 0:
		h := o.Holders[0]
		who := ""
		if h.Owner != "" {
			who = " by " + h.Owner
		}
		if o.HolderCount > 1 {
			return fmt.Sprintf("held%s with token %d and %d more", who, h.Token, o.HolderCount-1)
		}
		return fmt.Sprintf("held%s with token %d", who, h.Token)
	case len(o.Delays) > 0:
		return "its lock-delay has not ended"
	}
	return fmt.Sprintf("%d requests are ahead", len(o.Ahead))
}

func circled(circle []Link) string {
	parts := make([]string, 0, len(circle))
	for _, l := range circle {
		actor := l.Actor
		if actor == "" {
			actor = fmt.Sprintf("lease %d", l.Lease)
		}
		if l.Name == "" {
			parts = append(parts, actor)
			continue
		}
		parts = append(parts, fmt.Sprintf("%s waits for %q held or awaited by", actor, l.Name))
	}
	return strings.Join(parts, " ")
}
