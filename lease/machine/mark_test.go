package machine

import "testing"

// Whatever acknowledges a lease's TTL takes its mark away: a later leader would
// end it too early.
func TestWhatAcknowledgesATTLClearsTheMark(t *testing.T) {
	grant := &GrantLease{Request: 7, TTL: 10}
	own := &Acquire{Request: 8, Names: []string{"own"}, Mode: Exclusive, TTL: 10}
	waits := &Acquire{Request: 9, Names: []string{"own"}, Mode: Exclusive, TTL: 10, Wait: true}
	for what, test := range map[string]struct {
		command Command
		clears  LeaseID // 0 for none
	}{
		"a repeated grant":                 {grant, 1},
		"a repeated acquisition":           {own, 2},
		"a wait that is taken up again":    {waits, 3},
		"the grant of one that waited":     {&Release{Name: "own", Token: 1}, 3},
		"a renewal":                        {&Clear{Leases: []LeaseID{1}}, 1},
		"an acquisition under the lease":   {&Acquire{Lease: 1, Request: 1, Names: []string{"x"}, Mode: Exclusive}, 0},
		"a repeat that asks for something": {&Acquire{Request: 8, Names: []string{"other"}, Mode: Exclusive, TTL: 10}, 0},
		"a mark of a leader before":        {&Mark{Term: 1, Leases: []LeaseMark{{1, 99}}}, 0},
	} {
		t.Run(what, func(t *testing.T) {
			m := New(0)
			m.Apply(Batch{Term: 2, Commands: []Command{grant, own, waits, &Mark{Term: 2, Leases: []LeaseMark{{1, 5}, {2, 5}, {3, 5}}}}})
			m.Apply(Batch{Term: 2, Commands: []Command{test.command}})
			for id := LeaseID(1); id <= 3; id++ {
				left, marked := m.marks.Get(id)
				live := m.lease(id) != nil
				if want := id != test.clears && live; marked != want || marked && left != 5 {
					t.Errorf("lease %d: marked %v with %d left, want %v", id, marked, left, want)
				}
			}
		})
	}
}
