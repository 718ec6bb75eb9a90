package lease

import (
	"errors"
	"sync"
	"testing"

	"github.com/distlock/distlock/lease/machine"
)

func TestMemoryLogAppliesInOrderAndAnswersAll(t *testing.T) {
	store := NewStore(41)
	l := NewMemoryLog(store)
	if first := <-l.Leadership(); !first.Leader || first.Term != 1 {
		t.Fatalf("%+v", first)
	}
	const n = 1000
	var mu sync.Mutex
	var tokens []uint64
	for i := range n {
		l.Propose(machine.Batch{Commands: []machine.Command{take(string(rune('a'+i%3)), RequestID(i+1)), &machine.Abandon{Request: RequestID(i + 1)}}},
			func(out machine.Outcome, err error) {
				if err != nil || out.Results[0].Hold == nil {
					t.Errorf("%+v %v", out, err)
					return
				}
				mu.Lock()
				tokens = append(tokens, uint64(out.Results[0].Hold.Token))
				mu.Unlock()
			})
	}
	confirmed := false
	l.Confirm(1, func(err error) { confirmed = err == nil })
	if !confirmed {
		t.Error("not confirmed at once")
	}
	var group sync.WaitGroup
	for range 3 { // closing twice, and at once, is fine
		group.Go(func() { l.Close() })
	}
	group.Wait()
	for i, token := range tokens {
		if token != 42+uint64(i) {
			t.Fatalf("token %d is %d", i, token)
		}
	}
	if len(tokens) != n {
		t.Errorf("%d of %d answered", len(tokens), n)
	}
	if _, open := <-l.Leadership(); open {
		t.Error("leadership is not closed")
	}
	answered := make(chan error, 1)
	l.Propose(machine.Batch{}, func(_ machine.Outcome, err error) { answered <- err })
	if err := <-answered; !errors.Is(err, ErrNotLeader) {
		t.Errorf("a proposal to a closed log: %v", err)
	}
	if err := l.Err(); err != nil {
		t.Error(err)
	}
}

// TestExpiryOfAnotherTermIsDropped: the log stamps the term, not the proposer.
func TestExpiryOfAnotherTermIsDropped(t *testing.T) {
	store := NewStore(0)
	l := NewMemoryLog(store)
	defer l.Close()
	done := make(chan struct{})
	l.Propose(machine.Batch{Term: 2, Commands: []machine.Command{take("a", 1), &machine.ExpireLeases{Leases: []ID{1}, Term: 2}}},
		func(machine.Outcome, error) { close(done) })
	<-done
	store.Read(func(m *machine.Machine) {
		if m.Counts().Leases != 1 {
			t.Error("an expiry of term 2 took effect in term 1")
		}
	})
}
