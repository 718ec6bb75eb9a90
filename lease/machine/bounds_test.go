package machine

import (
	"fmt"
	"testing"
)

func do(m *Machine, c Command) Result {
	return m.Apply(Batch{Commands: []Command{c}}).Results[0]
}

// TestAbandonedIDsAreBounded: a client that abandons without end, each id apart
// from the others, is refused in time, and what it has done can be read back.
func TestAbandonedIDsAreBounded(t *testing.T) {
	m := New(0)
	id := do(m, &GrantLease{TTL: 1}).Lease
	refused := 0
	for i := range RequestID(100_000) {
		if r := do(m, &Abandon{Lease: id, Request: 2*i + 1}); r.Refusal != nil {
			refused++
		}
	}
	if refused != 100_000-maxSpans {
		t.Errorf("%d of 100,000 refused, beyond a bound of %d", refused, maxSpans)
	}
	m = restored(t, snapshotOf(t, m))
	for i := range RequestID(100_000) {
		r := do(m, &Acquire{Lease: id, Request: 2*i + 1, Names: []string{"a"}, Mode: Exclusive})
		want := ReasonRequestEnded
		if i >= maxSpans {
			want = ReasonInvalid // it could not end
		}
		if r.Refusal == nil || r.Refusal.Reason != want {
			t.Fatalf("request %d: %+v", 2*i+1, r)
		}
	}
	// What joins two runs is always taken, and one that waits can always end.
	for i := range RequestID(10) {
		if r := do(m, &Abandon{Lease: id, Request: 2*i + 2}); r.Refusal != nil {
			t.Fatalf("%+v", r.Refusal)
		}
	}
	if r := do(m, &Acquire{Lease: id, Request: 1 << 40, Names: []string{"a"}, Mode: Exclusive}); r.Hold == nil {
		t.Fatalf("%+v", r)
	}
}

// TestOneLongWaitCostsNothing: however many requests begin and end beside it.
func TestOneLongWaitCostsNothing(t *testing.T) {
	m := New(0)
	id := do(m, &GrantLease{TTL: 1}).Lease
	do(m, &Acquire{Request: 1, Names: []string{"held"}, Mode: Exclusive, TTL: 1})
	if r := do(m, &Acquire{Lease: id, Request: 1, LowestOpen: 1, Names: []string{"held"}, Mode: Exclusive, Wait: true}); !r.Waiting {
		t.Fatalf("%+v", r)
	}
	for i := RequestID(2); i < 200_000; i++ {
		r := do(m, &Acquire{Lease: id, Request: i, LowestOpen: 1, Names: []string{"a"}, Mode: Exclusive})
		if r.Hold == nil {
			t.Fatalf("request %d: %+v", i, r.Refusal)
		}
		do(m, &Release{Lease: id, Token: r.Hold.Token})
	}
	if n := m.lease(id).session.spans; n != 1 {
		t.Errorf("%d runs of ended requests", n)
	}
	m = restored(t, snapshotOf(t, m))
	for _, late := range []RequestID{2, 77_777, 199_999} {
		if r := do(m, &Acquire{Lease: id, Request: late, LowestOpen: 1, Names: []string{"a"}, Mode: Exclusive}); r.Refusal == nil || r.Refusal.Reason != ReasonRequestEnded {
			t.Errorf("request %d, late: %+v", late, r)
		}
	}
	if r := do(m, &Acquire{Lease: id, Request: 1, LowestOpen: 1, Names: []string{"held"}, Mode: Exclusive, Wait: true}); !r.Waiting {
		t.Errorf("the long wait: %+v", r)
	}
}

// TestAReleaseOfAForgottenTokenIsRefused: nobody is told that a hold is
// released which had been lost.
func TestAReleaseOfAForgottenTokenIsRefused(t *testing.T) {
	m := New(0)
	id := do(m, &GrantLease{TTL: 1}).Lease
	other := do(m, &GrantLease{TTL: 1}).Lease
	hold := func(lease LeaseID, request RequestID, name string) *Hold {
		t.Helper()
		r := do(m, &Acquire{Lease: lease, Request: request, Names: []string{name}, Mode: Exclusive})
		if r.Hold == nil {
			t.Fatalf("%+v", r)
		}
		return r.Hold
	}
	// The first of 65 that are force-released, and one of another lease.
	first := hold(id, 1, "a1")
	for i := RequestID(2); i <= 65; i++ {
		hold(id, i, fmt.Sprint("a", i))
	}
	theirs := hold(other, 1, "theirs")
	for i := RequestID(1); i <= 65; i++ {
		do(m, &ForceRelease{Name: fmt.Sprint("a", i)})
	}
	do(m, &ExpireLeases{Leases: []LeaseID{other}})
	released := hold(id, 66, "b")
	if r := do(m, &Release{Lease: id, Token: released.Token, Request: 66}); r.Refusal != nil {
		t.Fatalf("%+v", r.Refusal)
	}
	do(m, &Forget{Through: ^uint64(0)})
	do(m, &Forget{Through: ^uint64(0)})
	for _, m := range []*Machine{m, restored(t, snapshotOf(t, m))} {
		for what, c := range map[string]*Release{
			"its own, force-released before 64 others": {Lease: id, Name: "a1", Token: first.Token, Request: 1},
			"the same, without its request":            {Lease: id, Name: "a1", Token: first.Token},
			"the same, from elsewhere":                 {Name: "a1", Token: first.Token},
			"of another lease, which expired":          {Lease: id, Name: "theirs", Token: theirs.Token},
			"the same, from elsewhere, ":               {Name: "theirs", Token: theirs.Token},
			"one that nobody ever had":                 {Lease: id, Token: 1 << 40},
		} {
			if r := do(m, c); r.Refusal == nil || r.Refusal.Reason != ReasonNotHeld {
				t.Errorf("%s: %+v", what, r)
			}
		}
		if r := do(m, &Release{Lease: id, Token: released.Token, Request: 66}); r.Refusal != nil {
			t.Errorf("one that it did release, repeated: %+v", r.Refusal)
		}
	}
}

// TestHoldsThatAreBrokenTogether end before anyone behind them is granted: the
// floor of who comes next is not that of a hold which is about to end.
func TestHoldsThatAreBrokenTogether(t *testing.T) {
	m := New(0)
	for request := RequestID(1); request <= 4; request++ {
		id := do(m, &GrantLease{TTL: 1}).Lease
		do(m, &Acquire{Lease: id, Request: 1, Names: []string{"a"}, Mode: Shared, Limit: 2, Wait: true})
	}
	out := m.Apply(Batch{Commands: []Command{&ForceRelease{Name: "a"}}})
	granted := 0
	for _, e := range out.Events {
		if e.Kind == EventGranted {
			if granted++; e.Locks[0].Floor != 3 {
				t.Errorf("token %d has the floor %d: 1 and 2 were broken together", e.Token, e.Locks[0].Floor)
			}
		}
	}
	if granted != 2 {
		t.Errorf("%d granted", granted)
	}
}

// TestAGrantLetsThoseBehindItIn at each of its locks.
func TestAGrantLetsThoseBehindItIn(t *testing.T) {
	m := New(0)
	ask := func(request RequestID, mode Mode, names ...string) Result {
		return do(m, &Acquire{Request: request, Names: names, Mode: mode, TTL: 1, Wait: true})
	}
	holder := ask(1, Exclusive, "a").Hold
	ask(2, Shared, "a", "b") // the first in line at b, for the sake of a
	ask(3, Shared, "b")
	ask(4, Shared, "b", "c")
	ask(5, Shared, "c")
	do(m, &Release{Token: holder.Token})
	for request := RequestID(2); request <= 5; request++ {
		if r, ok := m.Find(0, request); !ok || r.Hold == nil {
			t.Errorf("request %d is not granted: %+v", request, r)
		}
	}
}

// TestAnEqualRepeatIsEqualInEverything that it asks for.
func TestAnEqualRepeatIsEqualInEverything(t *testing.T) {
	base := Acquire{
		Request: 1, Names: []string{"a", "b"}, Mode: Shared, Limit: 3, TTL: 10, Owner: "o", LockDelay: 5,
		Actor: "x", Metadata: []Meta{{Key: "k", Value: "v"}},
	}
	changes := map[string]func(c *Acquire){
		"names":      func(c *Acquire) { c.Names = []string{"a"} },
		"mode":       func(c *Acquire) { c.Mode, c.Limit = Exclusive, 0 },
		"limit":      func(c *Acquire) { c.Limit = 4 },
		"TTL":        func(c *Acquire) { c.TTL = 11 },
		"owner":      func(c *Acquire) { c.Owner = "p" },
		"lock-delay": func(c *Acquire) { c.LockDelay = 6 },
		"actor":      func(c *Acquire) { c.Actor = "y" },
		"metadata":   func(c *Acquire) { c.Metadata = nil },
		"declared":   func(c *Acquire) { c.Declared = true },
	}
	for _, waiting := range []bool{false, true} {
		for _, level := range []Level{FirstLevel, NewestLevel} {
			m := NewAt(0, level)
			do(m, &Declare{Name: "a"})
			do(m, &Declare{Name: "b"})
			if waiting {
				do(m, &Acquire{Request: 9, Names: []string{"a"}, Mode: Exclusive, TTL: 1})
			}
			first := base
			first.Wait = waiting
			do(m, &first)
			same := base
			same.Wait, same.LowestOpen = !waiting, 7
			if r := do(m, &same); r.Waiting != waiting || r.Refusal != nil {
				t.Errorf("equal: %+v", r)
			}
			for what, change := range changes {
				if what == "declared" && level == FirstLevel {
					continue // which does not remember it
				}
				c := base
				change(&c)
				if r := do(m, &c); r.Refusal == nil || r.Refusal.Reason != ReasonRequestMismatch {
					t.Errorf("level %d, waiting %v, another %s: %+v", level, waiting, what, r)
				}
			}
		}
	}
}

// TestRequestsAbandonedTogether end before anyone behind them is granted: one of
// them is not granted in between, and who is has the floor of none of them.
func TestRequestsAbandonedTogether(t *testing.T) {
	m := New(0)
	for request := RequestID(1); request <= 4; request++ {
		do(m, &Acquire{Request: request, Names: []string{"a"}, Mode: Shared, Limit: 2, TTL: 1, Wait: true})
	}
	out := m.Apply(Batch{Commands: []Command{&AbandonAll{Requests: []RequestID{1, 2, 3}}}})
	for _, e := range out.Events {
		if e.Kind == EventGranted && (e.Request != 4 || e.Locks[0].Floor != e.Token) {
			t.Errorf("request %d is granted with token %d and floor %d", e.Request, e.Token, e.Locks[0].Floor)
		}
	}
	if r, ok := m.Find(0, 4); !ok || r.Hold == nil {
		t.Errorf("%+v", r)
	}
}

// TestAReleaseUnderAnothersRequest: a token that is remembered is judged by what
// is remembered, whatever has become of the request that is named with it.
func TestAReleaseUnderAnothersRequest(t *testing.T) {
	m := New(0)
	id := do(m, &GrantLease{TTL: 1}).Lease
	g := do(m, &Acquire{Request: 1, Names: []string{"a"}, Mode: Exclusive, TTL: 1}).Hold
	do(m, &Release{Name: "a", Token: g.Token})
	do(m, &Abandon{Lease: id, Request: 7})
	if r := do(m, &Release{Lease: id, Token: g.Token, Request: 7}); r.Refusal == nil || r.Refusal.Reason != ReasonNotHeld {
		t.Errorf("%+v", r)
	}
}
