package lease

import (
	"sync"

	"github.com/distlock/distlock/lease/machine"
)

// MemoryLog is a Log that keeps nothing: it applies each batch, in order, on a
// goroutine of its own. It always leads, in term 1.
type MemoryLog struct {
	store      *Store
	leadership chan Leadership

	mu      sync.Mutex
	queue   []proposal
	closed  bool
	wake    chan struct{} // buffered, one
	stopped chan struct{}
}

type proposal struct {
	batch machine.Batch
	done  func(machine.Outcome, error)
}

// NewMemoryLog returns a log over store and starts its goroutine, which ends
// with Close.
func NewMemoryLog(store *Store) *MemoryLog {
	l := &MemoryLog{
		store:      store,
		leadership: make(chan Leadership, 1),
		wake:       make(chan struct{}, 1),
		stopped:    make(chan struct{}),
	}
	l.leadership <- Leadership{Leader: true, Term: 1}
	go l.run()
	return l
}

func (l *MemoryLog) run() {
	defer close(l.stopped)
	var queue []proposal
	for range l.wake {
		clear(queue) // and its array is used again
		l.mu.Lock()
		queue, l.queue = l.queue, queue[:0]
		closed := l.closed
		l.mu.Unlock()
		for _, p := range queue {
			p.batch.Term = 1
			p.done(l.store.Apply(p.batch), nil)
		}
		if closed {
			return
		}
	}
}

// Propose implements Log.
func (l *MemoryLog) Propose(batch machine.Batch, done func(machine.Outcome, error)) {
	l.mu.Lock()
	closed := l.closed
	if !closed {
		l.queue = append(l.queue, proposal{batch, done})
	}
	l.mu.Unlock()
	if closed {
		done(machine.Outcome{}, ErrNotLeader)
		return
	}
	l.signal()
}

func (l *MemoryLog) signal() {
	select {
	case l.wake <- struct{}{}:
	default:
	}
}

// Confirm implements Log: nobody else can lead.
func (l *MemoryLog) Confirm(term uint64, done func(error)) { done(nil) }

// Leadership implements Log.
func (l *MemoryLog) Leadership() <-chan Leadership { return l.leadership }

// Err implements Log.
func (l *MemoryLog) Err() error { return nil }

// Close implements Log: what was proposed is applied first.
func (l *MemoryLog) Close() error {
	l.mu.Lock()
	first := !l.closed
	l.closed = true
	l.mu.Unlock()
	if first {
		l.signal()
	}
	<-l.stopped
	if first {
		close(l.leadership)
	}
	return nil
}
