package machine

import "testing"

// TestDelayedLockKnowsItsLastToken: a lock that nothing but a lock-delay keeps
// in existence still tells which token was the last.
func TestDelayedLockKnowsItsLastToken(t *testing.T) {
	m := New(0)
	m.Apply(Batch{Commands: []Command{
		&Acquire{Request: 1, Names: []string{"a"}, Mode: Exclusive, TTL: 1, LockDelay: 5},
		&RevokeLease{Lease: 1},
	}})
	k, ok := m.Lock("a")
	if !ok || len(k.Delays) != 1 || k.Last != 1 {
		t.Fatalf("%+v", k)
	}
}

// TestCountsWaitersOnce: one that waits for several locks is one.
func TestCountsWaitersOnce(t *testing.T) {
	m := New(0)
	m.Apply(Batch{Commands: []Command{
		&Acquire{Request: 1, Names: []string{"a"}, Mode: Exclusive, TTL: 1},
		&Acquire{Request: 2, Names: []string{"a", "b", "c"}, Mode: Exclusive, TTL: 1, Wait: true},
	}})
	if n := m.Counts().Waiters; n != 1 {
		t.Fatalf("%d waiters, one acquisition waits", n)
	}
}

// TestALockThatComesBackKnowsItsLastToken: a lost hold leaves a trace, also
// when nothing has kept the lock in existence.
func TestALockThatComesBackKnowsItsLastToken(t *testing.T) {
	m := New(0)
	m.Apply(Batch{Commands: []Command{
		&Acquire{Request: 1, Names: []string{"a"}, Mode: Exclusive, TTL: 1},
		&RevokeLease{Lease: 1},
		&Declare{Name: "a"},
	}})
	if k, _ := m.Lock("a"); k.Last != 1 {
		t.Fatalf("%+v", k)
	}
}

// TestARepeatedGrantLeaseMustMatch in its TTL and its owner.
func TestARepeatedGrantLeaseMustMatch(t *testing.T) {
	m := New(0)
	for _, c := range []struct {
		grant  GrantLease
		reason Reason
	}{
		{GrantLease{Request: 5, TTL: 2, Owner: "o"}, ""},
		{GrantLease{Request: 5, TTL: 2, Owner: "o"}, ""},
		{GrantLease{Request: 5, TTL: 3, Owner: "o"}, ReasonRequestMismatch},
		{GrantLease{Request: 5, TTL: 2, Owner: "p"}, ReasonRequestMismatch},
	} {
		got := m.Apply(Batch{Commands: []Command{&c.grant}}).Results[0]
		reason := Reason("")
		if got.Refusal != nil {
			reason = got.Refusal.Reason
		}
		if reason != c.reason || reason == "" && got.Lease != 1 {
			t.Errorf("%+v: %+v, %q", c.grant, got, reason)
		}
	}
}
