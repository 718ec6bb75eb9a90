package lease

import (
	"context"
	"slices"
	"sort"
	"strings"
	"sync"
	"sync/atomic"

	"github.com/distlock/distlock/lease/machine"
)

// ringSize is how many recent events a node keeps for watchers.
const ringSize = 1 << 14

// Store is the machine as one node has it, with the recent events. The log's
// apply goroutine writes it; everybody may read.
type Store struct {
	mu      sync.RWMutex
	machine *machine.Machine
	level   atomic.Uint32 // the machine's
	recent  [][]Event     // of the last batches, in order: the ring, and what is left of its first batch
	oldest  uint64        // lowest revision in the ring; above the machine's: none
	changed chan struct{}
}

// NewStore returns an empty store. Tokens and lease ids start above base: 0
// where a log remembers them, a number that rises from one start to the next
// (microseconds since 1970) where nothing does.
func NewStore(base uint64) *Store {
	s := &Store{machine: machine.New(base), oldest: 1, changed: make(chan struct{})}
	s.level.Store(uint32(s.machine.Level()))
	return s
}

// Apply executes a committed batch. Only the log's apply goroutine calls it.
func (s *Store) Apply(b machine.Batch) machine.Outcome {
	s.mu.Lock()
	defer s.mu.Unlock()
	out := s.machine.Apply(b)
	if len(out.Events) == 0 {
		return out
	}
	events := out.Events
	if cap(events) > 2*len(events) { // of a batch mostly refused: the room is not kept
		events = slices.Clone(events)
	}
	s.recent = append(s.recent, events)
	if last := s.machine.Revision(); last >= s.oldest+ringSize {
		s.oldest = last - ringSize + 1
		for len(s.recent) > 1 && s.recent[1][0].Revision <= s.oldest {
			s.recent[0] = nil
			s.recent = s.recent[1:]
		}
	}
	close(s.changed)
	s.changed = make(chan struct{})
	return out
}

// Level is the machine's. It costs next to nothing.
func (s *Store) Level() machine.Level { return machine.Level(s.level.Load()) }

// Raise brings the machine to a level. The log calls it, never while it
// applies.
func (s *Store) Raise(level machine.Level) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.machine.Raise(level)
	s.level.Store(uint32(s.machine.Level()))
}

// View returns a copy to read at leisure. It costs the same whatever the size.
func (s *Store) View() *machine.View {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.machine.Copy()
}

// Read calls fn with the machine, which must not be kept or changed. Writers
// wait meanwhile: fn must be short.
func (s *Store) Read(fn func(*machine.Machine)) {
	s.mu.RLock()
	defer s.mu.RUnlock()
	fn(s.machine)
}

// Restore replaces everything by a machine read from a snapshot. The log
// calls it, never while it applies.
func (s *Store) Restore(m *machine.Machine) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.machine = m
	s.level.Store(uint32(m.Level()))
	s.recent, s.oldest = nil, m.Revision()+1
	close(s.changed)
	s.changed = make(chan struct{})
}

// Watcher reads events in order from the store's ring. It holds nothing but a
// position, so a slow one costs no memory; one that falls out of the ring gets
// a *RangeError. It belongs to one goroutine.
type Watcher struct {
	store  *Store
	prefix string
	next   uint64
	told   uint64 // the last revision that Next returned
}

// Watch returns a watcher of the locks whose names begin with prefix, from
// revision from on; 0 means from now on. Errors: *RangeError.
func (s *Store) Watch(prefix string, from uint64) (*Watcher, error) {
	s.mu.RLock()
	defer s.mu.RUnlock()
	switch {
	case from == 0:
		from = s.machine.Revision() + 1
	case from < s.oldest || from > s.machine.Revision()+1:
		return nil, &RangeError{Asked: from, Oldest: s.oldest}
	}
	return &Watcher{store: s, prefix: prefix, next: from, told: from - 1}, nil
}

const (
	// maxScan bounds the events looked at, and so returned, by one Next.
	maxScan = 1024
	// maxSilent is how far a watcher gets without telling its caller: one of
	// quiet locks must be able to resume while that is still in the ring.
	maxSilent = ringSize / 4
)

// Next waits for events and returns them, with the revision up to which the
// watcher is complete. It returns none when that has risen far without any.
// Errors: ctx's, *RangeError.
func (w *Watcher) Next(ctx context.Context) ([]Event, uint64, error) {
	for {
		events, changed, err := w.scan()
		if err != nil || len(events) > 0 || w.next-w.told > maxSilent {
			w.told = w.next - 1
			return events, w.told, err
		}
		if changed == nil { // not at the end yet
			if err := ctx.Err(); err != nil {
				return nil, 0, err
			}
			continue
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return nil, 0, ctx.Err()
		}
	}
}

func (w *Watcher) scan() ([]Event, <-chan struct{}, error) {
	s := w.store
	s.mu.RLock()
	defer s.mu.RUnlock()
	last := s.machine.Revision()
	if w.next < s.oldest || w.next > last+1 {
		return nil, nil, &RangeError{Asked: w.next, Oldest: s.oldest}
	}
	var events []Event
	end := min(last, w.next+maxScan-1)
	at := sort.Search(len(s.recent), func(i int) bool { return s.recent[i][0].Revision > w.next }) - 1
	for ; w.next <= end; at++ {
		batch := s.recent[at]
		for _, e := range batch[w.next-batch[0].Revision:] {
			if w.next > end {
				break
			}
			w.next++
			if slices.ContainsFunc(e.Locks, func(k machine.GrantedLock) bool { return strings.HasPrefix(k.Name, w.prefix) }) {
				events = append(events, e)
			}
		}
	}
	if w.next > last {
		return events, s.changed, nil
	}
	return events, nil, nil
}
