package check

import (
	"cmp"
	"fmt"
	"slices"
	"time"
)

// inTime returns the events in order of time.
func (h *History) inTime() []Event {
	list := h.Events()
	slices.SortStableFunc(list, func(a, b Event) int { return cmp.Compare(a.At, b.At) })
	return list
}

// inOrder returns the events in the order in which they were added: of what
// the store did, the order of commit.
func (h *History) inOrder() []Event { return h.Events() }

// window is the time in which one client counts on one lock.
type window struct {
	who    int
	token  uint64
	shared bool
	limit  int
	until  time.Duration
}

// ExclusionHolds is I1. At the guarded resource no write is accepted under a
// token below a floor that was accepted before. Of the windows in which
// clients count on a lock by their own clocks no two overlap, unless both are
// shared; and of those with a limit there are no more at once than it. A hold
// that others ended on purpose is covered by fencing only.
func ExclusionHolds(h *History) []Violation {
	v := &collector{name: "I1"}
	open := map[string][]window{}
	shut := map[uint64]bool{} // tokens whose hold others ended
	floors := trueFloors(h, v)
	rising := map[string]uint64{}
	for _, e := range h.inTime() {
		switch e.Kind {
		case Wrote:
			lock := e.Locks[0]
			if e.Token < rising[lock] {
				v.add(e.At, "%s accepted a write under token %d after floor %d", lock, e.Token, rising[lock])
			}
			floor := e.Floor
			if !e.Shared {
				floor = e.Token
			}
			if f, known := floors[floorKey(e.Token, lock)]; known {
				floor = f
			}
			rising[lock] = max(rising[lock], floor)
		case HoldEnded:
			if e.Cause == ByOthers {
				shut[e.Token] = true
			}
		case Doubts:
			for lock, list := range open {
				open[lock] = slices.DeleteFunc(list, func(w window) bool { return w.token == e.Token && w.who == e.Who })
			}
		case Believes:
			for _, lock := range e.Locks {
				list := slices.DeleteFunc(open[lock], func(w window) bool {
					return w.until <= e.At || shut[w.token] || w.token == e.Token && w.who == e.Who
				})
				if shut[e.Token] {
					open[lock] = list
					continue
				}
				for _, w := range list {
					if !e.Shared || !w.shared {
						v.add(e.At, "client %d counts on %s with token %d, and client %d does with token %d until %v",
							e.Who, lock, e.Token, w.who, w.token, w.until)
					}
				}
				if e.Limit > 0 && len(list) >= e.Limit {
					v.add(e.At, "%d clients count on %s, whose limit is %d", len(list)+1, lock, e.Limit)
				}
				open[lock] = append(list, window{e.Who, e.Token, e.Shared, e.Limit, e.Until})
			}
		}
	}
	return v.list
}

func floorKey(token uint64, lock string) string { return fmt.Sprint(token, " ", lock) }

// trueFloors computes every grant's floors anew: the lowest token live on the
// lock at its grant. A floor above it would turn living holders away, one
// below would let dead ones write.
func trueFloors(h *History, v *collector) map[string]uint64 {
	floors := map[string]uint64{}
	live := map[string][]uint64{} // in order of grant, and so of token
	for _, e := range h.inOrder() {
		switch e.Kind {
		case Granted:
			for i, lock := range e.Locks {
				live[lock] = append(live[lock], e.Token)
				floor := live[lock][0]
				floors[floorKey(e.Token, lock)] = floor
				if e.Floors != nil && e.Floors[i] != floor {
					v.add(e.At, "token %d of %s has floor %d, and the lowest live is %d", e.Token, lock, e.Floors[i], floor)
				}
			}
		case HoldEnded:
			for lock, list := range live {
				live[lock] = slices.DeleteFunc(list, func(t uint64) bool { return t == e.Token })
			}
		}
	}
	return floors
}

// TokensRise is I2. In the order of commit every grant's token is above all
// before it; and a grant that was asked for after another was acknowledged has
// the higher token.
func TokensRise(h *History) []Violation {
	v := &collector{name: "I2"}
	var last uint64
	for _, e := range h.inOrder() {
		if e.Kind != Granted {
			continue
		}
		if e.Token <= last {
			v.add(e.At, "token %d of %v was granted after token %d", e.Token, e.Locks, last)
		}
		last = max(last, e.Token)
	}
	var acks []Event
	for _, e := range h.inTime() {
		if e.Kind == Acquired {
			acks = append(acks, e)
		}
	}
	asked := slices.Clone(acks)
	slices.SortStableFunc(asked, func(a, b Event) int { return cmp.Compare(a.Sent, b.Sent) })
	var highest Event
	seen := map[uint64]Event{}
	next := 0
	for _, e := range asked {
		for ; next < len(acks) && acks[next].At < e.Sent; next++ {
			if acks[next].Token > highest.Token {
				highest = acks[next]
			}
		}
		if e.Token == 0 {
			v.add(e.At, "request %d was granted token 0", e.Request)
		}
		if e.Token <= highest.Token && e.Request != highest.Request {
			v.add(e.At, "request %d got token %d, asked for after token %d was acknowledged", e.Request, e.Token, highest.Token)
		}
		if other, ok := seen[e.Token]; ok && other.Request != e.Request {
			v.add(e.At, "token %d was granted to requests %d and %d", e.Token, other.Request, e.Request)
		}
		seen[e.Token] = e
	}
	return v.list
}

// NothingIsLost is I3. Whatever a client was told is in the store, and was
// before it was told; a request has one answer, however often it was asked; and
// a read never contradicts what was acknowledged before it began.
func NothingIsLost(h *History) []Violation {
	v := &collector{name: "I3"}
	store := false
	granted := map[uint64]Event{}   // by token
	requests := map[uint64]uint64{} // request → token granted
	ended := map[uint64]Event{}     // holds, by token
	leases := map[uint64]Event{}    // ended
	events := h.inTime()
	for _, e := range events {
		switch e.Kind {
		case Granted:
			store = true
			if before, again := requests[e.Request]; again {
				v.add(e.At, "request %d was granted token %d and token %d", e.Request, before, e.Token)
			}
			requests[e.Request], granted[e.Token] = e.Token, e
		case HoldEnded:
			ended[e.Token] = e
		case LeaseEnded:
			leases[e.Lease] = e
		}
	}
	answers := map[uint64]Event{} // by request
	acked := map[uint64]Event{}   // Acquired, by token
	releasing := map[uint64]Event{}
	released := map[uint64]Event{}
	for _, e := range events {
		switch e.Kind {
		case Acquired:
			if a, again := answers[e.Request]; again && a.Token != e.Token {
				v.add(e.At, "request %d was answered with token %d and token %d", e.Request, a.Token, e.Token)
			}
			answers[e.Request], acked[e.Token] = e, e
			if !store {
				continue
			}
			if g, ok := granted[e.Token]; !ok || g.Request != e.Request {
				v.add(e.At, "token %d was acknowledged to request %d and never granted to it", e.Token, e.Request)
			} else if g.At > e.At {
				v.add(e.At, "token %d was acknowledged before its grant was committed, at %v", e.Token, g.At)
			}
		case Releasing:
			if _, again := releasing[e.Token]; !again {
				releasing[e.Token] = e
			}
		case Released:
			if _, again := released[e.Token]; !again {
				released[e.Token] = e
			}
			if end, ok := ended[e.Token]; store && (!ok || end.At > e.At) {
				v.add(e.At, "the release of token %d was acknowledged, and the hold lived on", e.Token)
			}
		case Revoked:
			if end, ok := leases[e.Lease]; store && (!ok || end.At > e.At) {
				v.add(e.At, "the revocation of lease %d was acknowledged, and the lease lived on", e.Lease)
			}
		case Read:
			for token, a := range acked {
				if !slices.Contains(a.Locks, e.Locks[0]) {
					continue
				}
				held := slices.Contains(e.Holders, token)
				r, gone := released[token]
				_, going := releasing[token]
				end, lost := ended[token]
				switch {
				case held && gone && r.At < e.Sent:
					v.add(e.At, "%s is read as held with token %d, whose release was acknowledged at %v", e.Locks[0], token, r.At)
				case !held && !going && a.At < e.Sent && e.At < a.Sent+a.TTL && !(lost && end.At <= e.At):
					v.add(e.At, "%s is read without token %d, which was acknowledged at %v and not given back", e.Locks[0], token, a.At)
				}
			}
		}
	}
	return v.list
}

// NoLeaseEndsEarly is I4, by the fastest of the servers' clocks.
func NoLeaseEndsEarly(h *History) []Violation {
	v := &collector{name: "I4"}
	promised := map[uint64]time.Duration{}
	for _, e := range h.inOrder() {
		if e.Kind == Renewed {
			promised[e.Lease] = max(promised[e.Lease], e.Sent+time.Duration(float64(e.TTL)/(1+h.Rate)))
		}
	}
	for _, e := range h.inOrder() {
		if p := promised[e.Lease]; e.Kind == LeaseEnded && e.Cause == Expired && e.At < p {
			v.add(e.At, "lease %d expired %v before the time promised to its client", e.Lease, p-e.At)
		}
	}
	return v.list
}

// NoLeaseEndsLate is I5, by the slowest of the servers' clocks: a lease lives
// no longer than its TTL from when the leader last gave it one, and the lag.
func NoLeaseEndsLate(h *History) []Violation {
	v := &collector{name: "I5"}
	type life struct{ from, ttl time.Duration }
	live := map[uint64]life{}
	made := map[uint64]uint64{} // request → lease
	var disturbed time.Duration
	late := func(id uint64, l life, at time.Duration) {
		due := max(l.from, disturbed) + time.Duration(float64(l.ttl)*(1+h.Rate)) + h.Lag
		if at > due {
			v.add(at, "lease %d lived %v longer than its TTL and the lag allow", id, at-due)
		}
	}
	for _, e := range h.inTime() {
		switch e.Kind {
		case Disturbed:
			disturbed = e.At
		case LeaseMade:
			live[e.Lease], made[e.Request] = life{e.At, e.TTL}, e.Lease
		case Touched:
			if e.Lease == 0 {
				e.Lease = made[e.Request]
			}
			if l, ok := live[e.Lease]; ok {
				live[e.Lease] = life{e.At, l.ttl}
			}
		case LeaseEnded:
			if l, ok := live[e.Lease]; ok && e.Cause == Expired {
				late(e.Lease, l, e.At)
			}
			delete(live, e.Lease)
		}
	}
	ids := make([]uint64, 0, len(live))
	for id := range live {
		ids = append(ids, id)
	}
	slices.Sort(ids)
	for _, id := range ids {
		late(id, live[id], h.End)
	}
	return v.list
}

// QueuesAreFair is I6. Grants go to the head of each queue, and past none; a
// request whose abandonment was acknowledged is not granted later; and every
// request has a definite answer by the end, if its client lived. A waiter
// without a bound leaves its queues by its client's word or its lease's end.
func QueuesAreFair(h *History) []Violation {
	v := &collector{name: "I6"}
	queues := map[string][]uint64{}
	leave := func(e Event) {
		for _, lock := range e.Locks {
			queues[lock] = slices.DeleteFunc(queues[lock], func(r uint64) bool { return r == e.Request })
		}
	}
	cancelled := map[uint64]time.Duration{}
	cancelling := map[uint64]bool{}
	asked := map[uint64]Event{}
	gone := map[int]bool{}
	for _, e := range h.inOrder() {
		switch e.Kind {
		case Asked:
			if _, again := asked[e.Request]; !again {
				asked[e.Request] = e
			}
		case Gone:
			gone[e.Who] = true
		case Queued:
			for _, lock := range e.Locks {
				queues[lock] = append(queues[lock], e.Request)
			}
		case Cancelling:
			cancelling[e.Request] = true
		case Left:
			leave(e)
			if a, ok := asked[e.Request]; ok && a.Forever && e.Cause == Cleanly && !cancelling[e.Request] && !gone[a.Who] {
				v.add(e.At, "request %d of client %d left its queues, and would have waited for ever", e.Request, a.Who)
			}
		case Granted:
			for _, lock := range e.Locks {
				if q := queues[lock]; len(q) > 0 && q[0] != e.Request {
					v.add(e.At, "%s was granted to request %d past %d", lock, e.Request, q[0])
				}
			}
			leave(e)
			if at, ok := cancelled[e.Request]; ok && at < e.At {
				v.add(e.At, "request %d was granted, and its abandonment was acknowledged at %v", e.Request, at)
			}
		case Cancelled:
			cancelled[e.Request] = e.At
		}
	}
	for _, e := range h.inOrder() {
		if e.Kind == Acquired || e.Kind == Refused || e.Kind == Cancelled {
			delete(asked, e.Request)
		}
	}
	for _, e := range h.inOrder() {
		if a, open := asked[e.Request]; open && e.Kind == Asked && !gone[e.Who] && a.At == e.At {
			v.add(h.End, "request %d of client %d, asked at %v, is never answered", e.Request, e.Who, e.At)
		}
	}
	return v.list
}

// ReplicasAgree is I7.
func ReplicasAgree(h *History) []Violation {
	v := &collector{name: "I7"}
	first := map[uint64]Event{}
	for _, e := range h.inOrder() {
		if e.Kind != Applied {
			continue
		}
		if f, ok := first[e.Index]; !ok {
			first[e.Index] = e
		} else if f.Hash != e.Hash {
			v.add(e.At, "at index %d replica %d has state %x, replica %d has %x", e.Index, e.Who, e.Hash, f.Who, f.Hash)
		}
	}
	return v.list
}

// FaultsHeal is I8: whoever asked while the last fault was there, or later, is
// served within the bound.
func FaultsHeal(h *History) []Violation {
	v := &collector{name: "I8"}
	var healed time.Duration
	ever, served := false, false
	events := h.inTime()
	for _, e := range events {
		if e.Kind == Healed {
			healed, ever = e.At, true
		}
	}
	for _, e := range events {
		if e.Kind != Progressed || e.At < healed {
			continue
		}
		served = true
		if took := e.At - max(e.Sent, healed); ever && took > h.Heal {
			v.add(e.At, "client %d was served %v after the last fault had ended", e.Who, took)
		}
	}
	if ever && !served {
		v.add(h.End, "nobody was served after the last fault had ended")
	}
	return v.list
}
