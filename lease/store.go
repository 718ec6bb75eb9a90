package lease

import (
	"slices"
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
	waiting watching
}

// NewStore returns an empty store. Tokens and lease ids start above base: 0
// where a log remembers them, a number that rises from one start to the next
// (microseconds since 1970) where nothing does.
func NewStore(base uint64) *Store {
	s := &Store{machine: machine.New(base), oldest: 1}
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
	s.waiting.happened(out.Events)
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
	s.waiting.all()
}
