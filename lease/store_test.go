package lease

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"sync"
	"testing"
	"testing/synctest"

	"github.com/distlock/distlock/lease/machine"
)

// take makes an acquisition of one lock with a lease of its own.
func take(name string, request RequestID) *machine.Acquire {
	return &machine.Acquire{Request: request, Names: []string{name}, Mode: machine.Exclusive, TTL: 1}
}

func apply(s *Store, commands ...machine.Command) machine.Outcome {
	return s.Apply(machine.Batch{Commands: commands})
}

func names(events []Event) (list []string) {
	for _, e := range events {
		list = append(list, fmt.Sprint(e.Revision, e.Kind, e.Locks[0].Name))
	}
	return list
}

func TestWatchGivesEveryEventOfThePrefixInOrder(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := NewStore(0)
		apply(s, take("a/1", 1)) // revisions 1 (lease), 2
		ctx, cancel := context.WithCancel(context.Background())
		past, err := s.Watch("a/", 1)
		if err != nil {
			t.Fatal(err)
		}
		future, err := s.Watch("a/", 0)
		if err != nil {
			t.Fatal(err)
		}
		events, revision, err := past.Next(ctx)
		if err != nil || len(events) != 1 || events[0].Revision != 2 || revision != 2 {
			t.Fatal(names(events), revision, err)
		}
		for _, w := range []*Watcher{past, future} {
			go func() {
				events, revision, err := w.Next(ctx)
				if err != nil || len(events) != 1 || events[0].Locks[0].Name != "a/2" || revision != 6 {
					t.Error(names(events), revision, err)
				}
			}()
		}
		synctest.Wait() // both wait
		apply(s, take("b", 2))
		synctest.Wait() // none of theirs
		apply(s, take("a/2", 3))
		synctest.Wait()

		done := make(chan error)
		go func() {
			_, _, err := past.Next(ctx)
			done <- err
		}()
		synctest.Wait()
		cancel()
		if err := <-done; !errors.Is(err, context.Canceled) {
			t.Error(err)
		}
	})
}

func TestWatchOutOfTheRing(t *testing.T) {
	s := NewStore(0)
	var outside *RangeError
	if _, err := s.Watch("", 2); !errors.As(err, &outside) || outside.Asked != 2 {
		t.Errorf("a revision not reached: %v", err)
	}
	slow, err := s.Watch("", 1)
	if err != nil {
		t.Fatal(err)
	}
	for i := range ringSize { // two revisions each
		apply(s, take(fmt.Sprint(i), RequestID(i+1)))
	}
	_, _, err = slow.Next(context.Background())
	if !errors.As(err, &outside) || outside.Asked != 1 || outside.Oldest != ringSize+1 {
		t.Errorf("a watcher that fell behind: %v", err)
	}
	if _, err := s.Watch("", ringSize); !errors.As(err, &outside) {
		t.Errorf("a revision no longer kept: %v", err)
	}
	w, err := s.Watch("", outside.Oldest)
	if err != nil {
		t.Fatal(err)
	}
	got, revision := 0, uint64(0)
	for revision < 2*ringSize {
		var events []Event
		if events, revision, err = w.Next(context.Background()); err != nil {
			t.Fatal(err)
		}
		for _, e := range events {
			if want := ringSize + 2*uint64(got+1); e.Revision != want {
				t.Fatalf("event %d of the ring has revision %d, not %d", got, e.Revision, want)
			}
			got++
		}
	}
	if got != ringSize/2 { // every other event is of a lease, not of a lock
		t.Errorf("%d events", got)
	}

	// A snapshot brings no events with it.
	other := NewStore(0)
	other.Restore(restored(t, s))
	if _, err := other.Watch("", 2*ringSize); !errors.As(err, &outside) || outside.Oldest != 2*ringSize+1 {
		t.Errorf("before a snapshot: %v", err)
	}
	w, err = other.Watch("", 2*ringSize+1)
	if err != nil {
		t.Fatal(err)
	}
	apply(other, take("new", 1<<40))
	if events, _, err := w.Next(context.Background()); err != nil || len(events) != 1 {
		t.Error(names(events), err)
	}
	// One that waits is told.
	older := NewStore(0)
	other.Restore(restored(t, older))
	if _, _, err := w.Next(context.Background()); !errors.As(err, &outside) {
		t.Errorf("after a restore of another state: %v", err)
	}
}

// restored is what a snapshot of a store brings.
func restored(t *testing.T, s *Store) *machine.Machine {
	t.Helper()
	var b bytes.Buffer
	if err := s.View().Snapshot(func(chunk []byte) error { b.Write(chunk); return nil }); err != nil {
		t.Fatal(err)
	}
	m, err := machine.Restore(b.Read)
	if err != nil {
		t.Fatal(err)
	}
	return m
}

// TestViewsStandStill reads copies while the store goes on; the race detector
// watches.
func TestViewsStandStill(t *testing.T) {
	s := NewStore(0)
	var group sync.WaitGroup
	for i := range 200 {
		apply(s, take(fmt.Sprint(i), RequestID(i+1)))
		if i%20 != 0 {
			continue
		}
		view := s.View()
		group.Go(func() {
			for range 20 {
				n := 0
				view.AscendLocks("", func(k machine.Lock) bool {
					n += k.HolderCount
					return true
				})
				if n != i+1 || view.Counts().Locks != i+1 {
					t.Errorf("a view of %d locks shows %d", i+1, n)
				}
			}
		})
	}
	group.Wait()
}

// One batch may have more events than the ring keeps, alone or behind others.
func TestBatchLargerThanTheRing(t *testing.T) {
	s := NewStore(0)
	request := RequestID(0)
	for range 3 {
		var commands []machine.Command
		for range ringSize {
			request++
			commands = append(commands, take(fmt.Sprint(request), request))
		}
		apply(s, commands...) // 2*ringSize events
		last := s.View().Revision()
		w, err := s.Watch("", last-ringSize+1)
		if err != nil {
			t.Fatal(err)
		}
		got := 0
		for revision := uint64(0); revision < last; {
			var events []Event
			if events, revision, err = w.Next(context.Background()); err != nil {
				t.Fatal(err)
			}
			got += len(events)
		}
		if got != ringSize/2 {
			t.Errorf("%d events", got)
		}
		var outside *RangeError
		if _, err := s.Watch("", last-ringSize); !errors.As(err, &outside) {
			t.Errorf("before the ring: %v", err)
		}
	}
}

// What is refused has no events, and is not to cost the ring memory.
func TestTheRingKeepsNoRoomOfRefusals(t *testing.T) {
	s := NewStore(0)
	apply(s, take("a", 1))
	for n := range 100 {
		var commands []machine.Command
		for i := range 1000 {
			commands = append(commands, take("a", RequestID(2+1001*n+i)))
		}
		apply(s, append(commands, take(fmt.Sprint("b", n), RequestID(1002+1001*n)))...)
	}
	room, events := 0, 0
	for _, batch := range s.recent {
		room, events = room+cap(batch), events+len(batch)
	}
	if events != 202 || room > 2*events {
		t.Errorf("room for %d events, of which there are %d", room, events)
	}
}
