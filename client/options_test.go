package client_test

import (
	"testing"
	"time"

	"github.com/distlock/distlock/client"
)

// TestOptionsOfEachCall: an option compiles for the calls for which it has a meaning,
// and for no other.
func TestOptionsOfEachCall(t *testing.T) {
	hold := [...]bool{true, true, true, true, false, false}
	lease := [...]bool{true, true, false, false, false, false}
	for name, of := range map[string]struct {
		option any
		// Acquire, TryAcquire, the same of a lease, Grant, reads.
		want [6]bool
	}{
		"Shared":       {client.Shared(), hold},
		"Limit":        {client.Limit(1), hold},
		"LockDelay":    {client.LockDelay(1), hold},
		"Actor":        {client.Actor("a"), hold},
		"Metadata":     {client.Metadata(nil), [...]bool{true, true, true, true, true, false}},
		"Wait":         {client.Wait(1), [...]bool{true, false, true, false, false, false}},
		"TTL":          {client.TTL(1), lease},
		"UnderLeaseID": {client.UnderLeaseID(1), lease},
		"NoRenew":      {client.NoRenew(), lease},
		"OnRenew":      {client.OnRenew(func(time.Time) {}), lease},
		"Owner":        {client.Owner("o"), [...]bool{true, true, false, false, true, false}},
		"Stale":        {client.Stale(), [...]bool{false, false, false, false, false, true}},
	} {
		var got [6]bool
		_, got[0] = of.option.(client.AcquireOption)
		_, got[1] = of.option.(client.TryAcquireOption)
		_, got[2] = of.option.(client.LeaseAcquireOption)
		_, got[3] = of.option.(client.LeaseTryAcquireOption)
		_, got[4] = of.option.(client.GrantOption)
		_, got[5] = of.option.(client.ReadOption)
		if got != of.want {
			t.Errorf("%s is for %v, not %v", name, got, of.want)
		}
	}
}
