package check

import (
	"strings"
	"testing"
	"time"
)

const s = time.Second

// good is a history in which everything happens and every promise is kept.
func good() []Event {
	return []Event{
		{At: 0, Kind: Asked, Who: 1, Request: 1},
		{At: 1, Kind: LeaseMade, Lease: 1, TTL: 10 * s},
		{At: 1, Kind: Granted, Request: 1, Lease: 1, Token: 1, Locks: []string{"a"}},
		{At: 2, Kind: Acquired, Who: 1, Request: 1, Lease: 1, Token: 1, Locks: []string{"a"}, TTL: 10 * s},
		{At: 2, Kind: Renewed, Lease: 1, TTL: 10 * s},
		{At: 2, Kind: Believes, Who: 1, Locks: []string{"a"}, Token: 1, Until: 9 * s},
		{At: 3, Kind: Wrote, Locks: []string{"a"}, Token: 1, Floor: 1},
		{At: 3, Kind: Asked, Who: 2, Request: 2},
		{At: 3, Kind: Asked, Who: 3, Request: 3},
		{At: 4, Kind: LeaseMade, Lease: 2, TTL: 20 * s},
		{At: 4, Kind: Queued, Request: 2, Locks: []string{"a"}},
		{At: 5, Kind: LeaseMade, Lease: 3, TTL: 20 * s},
		{At: 5, Kind: Queued, Request: 3, Locks: []string{"a"}},
		{At: 6, Kind: Read, Sent: 5, Locks: []string{"a"}, Holders: []uint64{1}},
		{At: 10 * s, Kind: HoldEnded, Token: 1, Cause: Expired},
		{At: 10 * s, Kind: LeaseEnded, Lease: 1, Cause: Expired},
		{At: 10 * s, Kind: Touched, Lease: 2},
		{At: 10 * s, Kind: Granted, Request: 2, Lease: 2, Token: 2, Locks: []string{"a"}},
		{At: 11 * s, Kind: Acquired, Who: 2, Request: 2, Lease: 2, Token: 2, Locks: []string{"a"}, Sent: 3, TTL: 20 * s},
		{At: 11 * s, Kind: Believes, Who: 2, Locks: []string{"a"}, Token: 2, Until: 18 * s},
		{At: 11 * s, Kind: Wrote, Locks: []string{"a"}, Token: 2, Floor: 2},
		{At: 12 * s, Kind: Left, Request: 3, Locks: []string{"a"}},
		{At: 12 * s, Kind: LeaseEnded, Lease: 3, Cause: Cleanly},
		{At: 13 * s, Kind: Cancelled, Who: 3, Request: 3},
		{At: 14 * s, Kind: Releasing, Who: 2, Token: 2},
		{At: 14 * s, Kind: Doubts, Who: 2, Token: 2},
		{At: 15 * s, Kind: HoldEnded, Token: 2, Cause: Cleanly},
		{At: 15 * s, Kind: LeaseEnded, Lease: 2, Cause: Cleanly},
		{At: 16 * s, Kind: Released, Who: 2, Token: 2},
		{At: 16 * s, Kind: Applied, Who: 1, Index: 9, Hash: 7},
		{At: 17 * s, Kind: Applied, Who: 2, Index: 9, Hash: 7},
		{At: 18 * s, Kind: Read, Sent: 17 * s, Locks: []string{"a"}},
		{At: 19 * s, Kind: Healed},
		{At: 20 * s, Kind: Progressed, Who: 1, Sent: 18 * s},
	}
}

func judge(events []Event) []Violation {
	h := &History{Rate: 0, Lag: s / 100, Heal: 5 * s, End: 30 * s}
	for _, e := range events {
		h.Add(e)
	}
	return All(h)
}

func TestGoodHistory(t *testing.T) {
	for _, v := range judge(good()) {
		t.Error(v)
	}
}

// TestBadHistories breaks the good history in one way at a time, and expects
// the invariant that this breaks to say so.
func TestBadHistories(t *testing.T) {
	at := func(list []Event, kind Kind, n int) *Event {
		for i := range list {
			if list[i].Kind == kind {
				if n--; n < 0 {
					return &list[i]
				}
			}
		}
		panic("the good history has no such event")
	}
	for _, c := range []struct {
		name, invariant, says string
		spoil                 func([]Event) []Event
	}{
		{"a late write is accepted", "I1", "accepted a write under token 1", func(l []Event) []Event {
			return append(l, Event{At: 20 * s, Kind: Wrote, Locks: []string{"a"}, Token: 1, Floor: 1})
		}},
		{"a floor is too high", "I1", "has floor 2, and the lowest live is 1", func(l []Event) []Event {
			at(l, Granted, 0).Floors = []uint64{2}
			return l
		}},
		{"a late write passes a floor that is too low", "I1", "accepted a write under token 1 after floor 2", func(l []Event) []Event {
			at(l, Wrote, 1).Floor = 1
			return append(l, Event{At: 12 * s, Kind: Wrote, Locks: []string{"a"}, Token: 1, Floor: 1})
		}},
		{"two believe", "I1", "client 1 does with token 1", func(l []Event) []Event {
			at(l, Believes, 0).Until = 12 * s
			return l
		}},
		{"a shared and an exclusive one believe", "I1", "counts on a", func(l []Event) []Event {
			return append(l, Event{At: 12 * s, Kind: Believes, Who: 9, Token: 9, Locks: []string{"a"}, Shared: true, Until: 13 * s})
		}},
		{"a limit is exceeded", "I1", "whose limit is 1", func(l []Event) []Event {
			for who := range 2 {
				l = append(l, Event{At: 20 * s, Kind: Believes, Who: who, Token: uint64(20 + who), Locks: []string{"b"}, Shared: true, Limit: 1, Until: 25 * s})
			}
			return l
		}},
		{"a token is granted twice", "I2", "token 1 of [a] was granted after token 1", func(l []Event) []Event {
			at(l, Granted, 1).Token = 1
			return l
		}},
		{"a token falls for the clients", "I2", "asked for after token 2 was acknowledged", func(l []Event) []Event {
			return append(l, Event{At: 20 * s, Kind: Acquired, Request: 8, Token: 1, Sent: 19 * s})
		}},
		{"token 0", "I2", "token 0", func(l []Event) []Event {
			return append(l, Event{At: 20 * s, Kind: Acquired, Request: 8, Sent: 19 * s})
		}},
		{"a token for two", "I2", "granted to requests", func(l []Event) []Event {
			return append(l, Event{At: 20 * s, Kind: Acquired, Request: 8, Token: 2, Sent: 5})
		}},
		{"an acknowledged grant is not in the store", "I3", "never granted", func(l []Event) []Event {
			return append(l, Event{At: 20 * s, Kind: Acquired, Request: 8, Token: 88, Sent: 19 * s})
		}},
		{"a grant is acknowledged before its commit", "I3", "before its grant was committed", func(l []Event) []Event {
			at(l, Acquired, 1).At = 9 * s
			return l
		}},
		{"a request is granted twice", "I3", "was granted token 1 and token 3", func(l []Event) []Event {
			return append(l, Event{At: 20 * s, Kind: Granted, Request: 1, Token: 3, Locks: []string{"a"}})
		}},
		{"a request is answered twice", "I3", "answered with token", func(l []Event) []Event {
			return append(l, Event{At: 20 * s, Kind: Acquired, Request: 1, Token: 2, Sent: 3})
		}},
		{"an acknowledged release is lost", "I3", "the hold lived on", func(l []Event) []Event {
			at(l, HoldEnded, 1).At = 17 * s
			return l
		}},
		{"an acknowledged revocation is lost", "I3", "the lease lived on", func(l []Event) []Event {
			return append(l, Event{At: 11 * s, Kind: Revoked, Lease: 2})
		}},
		{"a read misses a hold", "I3", "is read without token 1", func(l []Event) []Event {
			at(l, Read, 0).Holders = nil
			return l
		}},
		{"a read shows what was released", "I3", "is read as held with token 2", func(l []Event) []Event {
			at(l, Read, 1).Holders = []uint64{2}
			return l
		}},
		{"a lease ends early", "I4", "before the time promised", func(l []Event) []Event {
			at(l, LeaseEnded, 0).At = 9 * s
			return l
		}},
		{"a lease ends late", "I5", "longer than its TTL", func(l []Event) []Event {
			at(l, LeaseEnded, 0).At = 10*s + s/2
			return l
		}},
		{"a lease never ends", "I5", "longer than its TTL", func(l []Event) []Event {
			return append(l, Event{At: 5 * s, Kind: LeaseMade, Lease: 9, TTL: s})
		}},
		{"a waiter is passed over", "I6", "past 2", func(l []Event) []Event {
			*at(l, Granted, 1) = Event{At: 10 * s, Kind: Granted, Request: 3, Lease: 3, Token: 2, Locks: []string{"a"}}
			return l
		}},
		{"a waiter is forgotten", "I6", "never answered", func(l []Event) []Event {
			return append(l, Event{At: 5 * s, Kind: Asked, Who: 5, Request: 5})
		}},
		{"a waiter is put out", "I6", "would have waited for ever", func(l []Event) []Event {
			at(l, Asked, 2).Forever = true
			at(l, Left, 0).Cause = Cleanly
			return l
		}},
		{"a cancelled one is granted", "I6", "its abandonment was acknowledged", func(l []Event) []Event {
			return append(l, Event{At: 20 * s, Kind: Granted, Request: 3, Token: 3, Locks: []string{"a"}})
		}},
		{"replicas differ", "I7", "at index 9", func(l []Event) []Event {
			at(l, Applied, 1).Hash = 8
			return l
		}},
		{"no progress", "I8", "nobody was served", func(l []Event) []Event { return l[:len(l)-1] }},
		{"progress comes late", "I8", "after the last fault", func(l []Event) []Event {
			at(l, Progressed, 0).At = 29 * s
			return l
		}},
	} {
		t.Run(c.name, func(t *testing.T) {
			for _, v := range judge(c.spoil(good())) {
				if v.Invariant == c.invariant && strings.Contains(v.String(), c.says) {
					return
				}
			}
			t.Errorf("%s does not object; what was said: %v", c.invariant, judge(c.spoil(good())))
		})
	}
}

func TestEndedByOthersIsCoveredByFencingOnly(t *testing.T) {
	l := good()
	for i := range l {
		if l[i].Kind == Believes && l[i].Token == 1 {
			l[i].Until = 12 * s
		}
		if l[i].Kind == HoldEnded && l[i].Token == 1 || l[i].Kind == LeaseEnded && l[i].Lease == 1 {
			l[i].Cause = ByOthers
		}
	}
	for _, v := range judge(l) {
		t.Error(v)
	}
}
