package lease

import (
	"container/list"
	"context"
	"slices"
	"sort"
	"strings"

	"github.com/distlock/distlock/lease/machine"
)

// Watcher reads events in order from the store's ring. It holds nothing but a
// position, so a slow one costs no memory; one that falls out of the ring gets
// a *RangeError. It belongs to one goroutine.
type Watcher struct {
	store  *Store
	prefix string
	next   uint64
	told   uint64 // the last revision that Next returned
	ready  bool   // Next does not wait

	// While it waits, under the store's mutex: it has nothing to see before next.
	alarm   chan struct{} // buffered, one
	among   *list.Element // of those that wait with its prefix; nil when it does not wait
	ordered *list.Element // of all that wait
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
	return &Watcher{store: s, prefix: prefix, next: from, told: from - 1, alarm: make(chan struct{}, 1)}, nil
}

const (
	// maxScan bounds the events looked at, and so returned, by one Next.
	maxScan = 1024
	// maxSilent is how far a watcher gets without telling its caller: one of
	// quiet locks must be able to resume while that is still in the ring.
	maxSilent = ringSize / 2
	// maxProgress bounds the watchers that are woken for that by one batch: where
	// there are thousands they are told less often.
	maxProgress = 1
)

// Next waits for events and returns them, with the revision up to which the
// watcher is complete. It returns none when that has risen far without any.
// Errors: ctx's, *RangeError.
func (w *Watcher) Next(ctx context.Context) ([]Event, uint64, error) {
	for {
		if err := w.Ready(ctx); err != nil {
			return nil, 0, err
		}
		w.ready = false
		events, err := w.scan()
		if err != nil || len(events) > 0 || w.next-w.told > maxSilent {
			w.told = w.next - 1
			return events, w.told, err
		}
		if err := ctx.Err(); err != nil {
			return nil, 0, err
		}
	}
}

// Ready waits until there is something for Next to look at, and keeps none of it:
// who must wait for room first has but its position meanwhile. Error: ctx's.
func (w *Watcher) Ready(ctx context.Context) error {
	if !w.ready && w.wait() {
		select {
		case <-w.alarm:
		case <-ctx.Done():
			w.leave()
			return ctx.Err()
		}
	}
	w.ready = true
	return nil
}

// scan looks at events from next on.
func (w *Watcher) scan() (events []Event, err error) {
	s := w.store
	s.mu.RLock()
	defer s.mu.RUnlock()
	last := s.machine.Revision()
	if w.next < s.oldest || w.next > last+1 {
		return nil, &RangeError{Asked: w.next, Oldest: s.oldest}
	}
	end := min(last, w.next+maxScan-1)
	at := sort.Search(len(s.recent), func(i int) bool { return s.recent[i][0].Revision > w.next }) - 1
	for ; w.next <= end; at++ {
		batch := s.recent[at]
		for _, e := range batch[w.next-batch[0].Revision:] {
			if w.next > end {
				break
			}
			w.next++
			if slices.ContainsFunc(e.Locks, func(k machine.HeldLock) bool { return strings.HasPrefix(k.Name, w.prefix) }) {
				events = append(events, e)
			}
		}
	}
	return events, nil
}

// wait enters the watcher among those that wait; false when there is something
// to look at.
func (w *Watcher) wait() bool {
	s := w.store
	s.mu.Lock()
	defer s.mu.Unlock()
	if w.next != s.machine.Revision()+1 {
		return false
	}
	select { // of a wait that ended with its context
	case <-w.alarm:
	default:
	}
	s.waiting.enter(w)
	return true
}

// leave takes it out again.
func (w *Watcher) leave() {
	w.store.mu.Lock()
	defer w.store.mu.Unlock()
	w.store.waiting.leave(w)
}

// watching has the watchers that have seen everything, by prefix: an event wakes
// those that want it, and costs nothing for all others. It belongs to the
// store's mutex.
type watching struct {
	byPrefix map[string]*list.List
	lengths  map[int]int // of the prefixes: how many there are
	ordered  list.List   // as they came: who waits for long is told how far it has got
}

func (g *watching) enter(w *Watcher) {
	if g.byPrefix == nil {
		g.byPrefix, g.lengths = make(map[string]*list.List), make(map[int]int)
	}
	l := g.byPrefix[w.prefix]
	if l == nil {
		l = list.New()
		g.byPrefix[w.prefix] = l
		g.lengths[len(w.prefix)]++
	}
	w.among, w.ordered = l.PushBack(w), g.ordered.PushBack(w)
}

func (g *watching) leave(w *Watcher) {
	if w.among == nil {
		return
	}
	l := g.byPrefix[w.prefix]
	l.Remove(w.among)
	g.ordered.Remove(w.ordered)
	w.among, w.ordered = nil, nil
	if l.Len() > 0 {
		return
	}
	delete(g.byPrefix, w.prefix)
	if g.lengths[len(w.prefix)]--; g.lengths[len(w.prefix)] == 0 {
		delete(g.lengths, len(w.prefix))
	}
}

// wake ends the wait of a watcher that has nothing to see before next.
func (g *watching) wake(w *Watcher, next uint64) {
	g.leave(w)
	w.next = next
	w.alarm <- struct{}{}
}

// happened wakes whoever waits for one of the events, the last of all.
func (g *watching) happened(events []Event) {
	if g.ordered.Len() == 0 {
		return
	}
	for i := range events {
		for _, k := range events[i].Locks {
			for n := range g.lengths {
				if n > len(k.Name) {
					continue
				}
				for l := g.byPrefix[k.Name[:n]]; l != nil && l.Len() > 0; {
					g.wake(l.Front().Value.(*Watcher), events[i].Revision)
				}
			}
		}
	}
	last := events[len(events)-1].Revision
	for range maxProgress {
		e := g.ordered.Front()
		if e == nil || last-e.Value.(*Watcher).told <= maxSilent {
			return
		}
		g.wake(e.Value.(*Watcher), last+1)
	}
}

// all wakes everybody.
func (g *watching) all() {
	for e := g.ordered.Front(); e != nil; e = g.ordered.Front() {
		w := e.Value.(*Watcher)
		g.wake(w, w.next)
	}
}
