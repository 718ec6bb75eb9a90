package machine

import (
	"bytes"
	"testing"
)

// TestALateDuplicateIsRefusedAfterARestore: what a lease remembers of its
// requests is part of a snapshot.
func TestALateDuplicateIsRefusedAfterARestore(t *testing.T) {
	m := New(0)
	id := m.Apply(Batch{Commands: []Command{&GrantLease{TTL: 1}}}).Results[0].Lease
	acquire := func(m *Machine, r RequestID) Result {
		return m.Apply(Batch{Commands: []Command{
			&Acquire{Lease: id, Request: r, LowestOpen: 1, Names: []string{"a"}, Mode: Exclusive},
		}}).Results[0]
	}
	for _, r := range []RequestID{3, 5} {
		g := acquire(m, r).Hold
		if g == nil {
			t.Fatalf("request %d is not granted", r)
		}
		m.Apply(Batch{Commands: []Command{&Release{Lease: id, Token: g.Token}}})
	}
	var b bytes.Buffer
	if err := m.Snapshot(func(chunk []byte) error { b.Write(chunk); return nil }); err != nil {
		t.Fatal(err)
	}
	again, err := Restore(bytes.NewReader(b.Bytes()).Read)
	if err != nil {
		t.Fatal(err)
	}
	for _, m := range []*Machine{m, again} {
		for _, r := range []RequestID{3, 5} {
			if got := acquire(m, r); got.Refusal == nil || got.Refusal.Reason != ReasonRequestEnded {
				t.Errorf("request %d, late: %+v", r, got)
			}
		}
		if got := acquire(m, 4); got.Hold == nil {
			t.Errorf("request 4, in time: %+v", got)
		}
	}
}
