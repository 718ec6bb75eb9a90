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
