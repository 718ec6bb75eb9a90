package machine

import (
	"bytes"
	"errors"
	"testing"

	"github.com/distlock/distlock/fence"
)

// TestNewHistory: what begins from a backup can meet nothing of what the old
// history went on to give out.
func TestNewHistory(t *testing.T) {
	m := New(0)
	m.Apply(Batch{Commands: []Command{
		&GrantLease{Request: 9, TTL: 1},
		&Declare{Name: "declared"},
		&Acquire{Request: 1, Names: []string{"declared"}, Mode: Exclusive, TTL: 1, Declared: true},
		&Acquire{Request: 2, Names: []string{"a", "b"}, Mode: Exclusive, TTL: 1, LockDelay: 5},
		&Acquire{Request: 3, Names: []string{"b", "declared"}, Mode: Exclusive, TTL: 1, Wait: true},
		&Acquire{Request: 4, Names: []string{"b"}, Mode: Shared, Limit: 3, TTL: 1, Wait: true},
	}})
	before := snapshotOf(t, m)
	if _, err := m.NewHistory(fence.MaxToken, 7); !errors.Is(err, ErrTokensExhausted) || !bytes.Equal(snapshotOf(t, m), before) {
		t.Fatalf("without room for tokens: %v, or something was changed", err)
	}
	revision, ids := m.Revision(), m.leaseIDs
	above, err := m.NewHistory(100, 7)
	if err != nil || above != HistoryGap+2 {
		t.Fatalf("tokens above %d, %v", above, err)
	}
	if c := m.Counts(); c.Leases != 0 || c.Holds != 0 || c.Waiters != 0 {
		t.Errorf("still alive: %+v", c)
	}
	if m.Revision() < revision+HistoryGap || m.leaseIDs < ids+HistoryGap {
		t.Errorf("revision %d, lease ids %d", m.Revision(), m.leaseIDs)
	}
	k, _ := m.Lock("declared")
	if !k.Declared || k.Clock != 1+HistoryGap {
		t.Errorf("%+v", k)
	}
	if k, _ := m.Lock("a"); len(k.Delays) != 1 {
		t.Errorf("the lock-delay of a lost hold: %+v", k)
	}
	again := restored(t, snapshotOf(t, m))
	out := again.Apply(Batch{Commands: []Command{&Acquire{Request: 5, Names: []string{"c"}, Mode: Exclusive, TTL: 1}}})
	if g := out.Results[0].Hold; g == nil || g.Token <= above || uint64(g.Lease) <= ids+HistoryGap {
		t.Errorf("%+v", out.Results[0])
	}
	if above, err = m.NewHistory(1<<50, 8); err != nil || above != 1<<50 {
		t.Errorf("tokens above %d, %v", above, err)
	}
}
