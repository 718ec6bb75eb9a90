package machine

import "testing"

// TestAnExpiryOfAnotherTermDoesNothing: whoever leads by the time it is applied
// owns the clocks.
func TestAnExpiryOfAnotherTermDoesNothing(t *testing.T) {
	m := New(0)
	id := m.Apply(Batch{Term: 3, Commands: []Command{&GrantLease{TTL: 1}}}).Results[0].Lease
	for _, proposed := range []uint64{2, 4} {
		m.Apply(Batch{Term: 3, Commands: []Command{&ExpireLeases{Leases: []LeaseID{id}, Term: proposed}}})
		if _, live := m.TTL(id); !live {
			t.Fatalf("proposed in term %d, applied in term 3: the lease has ended", proposed)
		}
	}
	m.Apply(Batch{Term: 3, Commands: []Command{&ExpireLeases{Leases: []LeaseID{id}, Term: 3}}})
	if _, live := m.TTL(id); live {
		t.Fatal("proposed and applied in one term: the lease lives on")
	}
}
