package client

import (
	"testing"
	"time"
)

// What the server answers only once it is in its log holds up no other renewal.
func TestLateRenewalsTravelApart(t *testing.T) {
	const ttl = 9 * time.Second
	now := 100 * time.Second
	at := func(id uint64, ago time.Duration) *session { return &session{id: id, ttl: ttl, sent: now - ago} }
	waiting := func(request uint64, ago time.Duration) *wait {
		return &wait{request: request, ttl: ttl, since: now - ago}
	}
	list := new(Client).renewals(now,
		[]*session{at(1, 3*time.Second), at(2, 5*time.Second), at(3, 4*time.Second), at(4, ttl/2)},
		[]*wait{waiting(5, 8*time.Second), waiting(6, 3*time.Second)})
	var got [][]uint64
	for _, r := range list {
		var ids []uint64
		for _, s := range r.sessions {
			ids = append(ids, s.id)
		}
		got = append(got, append(ids, r.requests...))
	}
	want := [][]uint64{{1, 3}, {2, 4}, {6}, {5}}
	if len(got) != len(want) {
		t.Fatalf("%v", got)
	}
	for i := range want {
		if len(got[i]) != len(want[i]) || got[i][0] != want[i][0] || got[i][len(got[i])-1] != want[i][len(want[i])-1] {
			t.Errorf("%v, want %v", got, want)
		}
	}
}
