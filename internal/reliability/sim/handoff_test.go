package sim

import (
	"flag"
	"testing"

	"github.com/distlock/distlock/fence"
	"github.com/distlock/distlock/lease/machine"
)

var handOffs = flag.Int("handoffs", 50_000, "times that TestNobodyStarves hands a lock on")

// TestNobodyStarves hands one lock on among many who always want it again, some
// for sharing, and counts how often each is passed over: never more often than
// there are others.
func TestNobodyStarves(t *testing.T) {
	const contenders = 40
	m := machine.New(0)
	var leases []machine.LeaseID
	for range contenders {
		leases = append(leases, m.Apply(machine.Batch{Commands: []machine.Command{&machine.GrantLease{TTL: 1e9}}}).Results[0].Lease)
	}
	request := make([]machine.RequestID, contenders)
	acquire := func(who int) machine.Command {
		request[who]++
		c := &machine.Acquire{Lease: leases[who], Request: request[who], LowestOpen: request[who], Names: []string{"hot"}, Mode: machine.Exclusive, Wait: true}
		if who%5 == 0 {
			c.Mode = machine.Shared
		}
		return c
	}
	of := map[machine.LeaseID]int{}
	for i, l := range leases {
		of[l] = i
	}
	type grant struct {
		who   int
		token fence.Token
	}
	var holders []grant
	last := make([]int, contenders)
	granted, most := 0, 0
	take := func(out machine.Outcome) {
		for _, e := range out.Events {
			if e.Kind != machine.EventGranted {
				continue
			}
			granted++
			who := of[e.Lease]
			if gap := granted - last[who]; granted > 2*contenders {
				most = max(most, gap)
			}
			last[who] = granted
			holders = append(holders, grant{who, e.Token})
		}
	}
	for who := range contenders {
		take(m.Apply(machine.Batch{Commands: []machine.Command{acquire(who)}}))
	}
	for granted < *handOffs {
		if len(holders) == 0 {
			t.Fatalf("nobody holds the lock after %d grants", granted)
		}
		g := holders[0]
		holders = holders[1:]
		take(m.Apply(machine.Batch{Commands: []machine.Command{&machine.Release{Lease: leases[g.who], Token: g.token}, acquire(g.who)}}))
	}
	for who, at := range last {
		if granted-at > contenders {
			t.Errorf("I6: contender %d was granted last at %d of %d", who, at, granted)
		}
	}
	if most > contenders {
		t.Errorf("I6: somebody waited for %d grants, among %d contenders", most, contenders)
	}
	t.Logf("%d hand-offs among %d contenders, the longest wait was %d grants", granted, contenders, most)
}
