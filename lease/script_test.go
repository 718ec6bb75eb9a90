package lease

import (
	"errors"
	"fmt"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/distlock/distlock/lease/machine"
)

// script is a log that does what a test says: it commits at once, or holds
// batches and confirmations until it is told what becomes of them.
type script struct {
	store      *Store
	leadership chan Leadership

	mu           sync.Mutex
	term         uint64
	hold         bool // batches wait
	holdConfirms bool
	batches      []proposal
	confirms     []func(error)
	sizes        []int // of the batches seen, encoded
	counts       []int // of their commands
	err          error
}

func newScript(store *Store) *script {
	l := &script{store: store, leadership: make(chan Leadership, 8)}
	l.lead(1)
	return l
}

func startScript(t *testing.T) (*rig, *script) {
	store := NewStore(0)
	l := newScript(store)
	return start(t, store, l), l
}

func (l *script) Propose(b machine.Batch, done func(machine.Outcome, error)) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.sizes = append(l.sizes, len(machine.AppendBatch(nil, &b)))
	l.counts = append(l.counts, len(b.Commands))
	switch {
	case l.err != nil || l.term == 0:
		done(machine.Outcome{}, ErrNotLeader)
	case l.hold:
		// The manager may use the array again once done is called, not before.
		l.batches = append(l.batches, proposal{b, done})
	default:
		b.Term = l.term
		done(l.store.Apply(b), nil)
	}
}

func (l *script) Confirm(term uint64, done func(error)) {
	l.mu.Lock()
	defer l.mu.Unlock()
	switch {
	case l.holdConfirms:
		l.confirms = append(l.confirms, done)
	case term != l.term:
		done(ErrNotLeader)
	default:
		done(nil)
	}
}

func (l *script) Leadership() <-chan Leadership { return l.leadership }

func (l *script) Err() error {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.err
}

func (l *script) Close() error { return nil }

// What a test tells the log comes once everybody waits, and returns when
// everybody waits again.

// lead reports a gain.
func (l *script) lead(term uint64) {
	synctest.Wait()
	l.mu.Lock()
	l.term = term
	l.mu.Unlock()
	l.leadership <- Leadership{Leader: true, Term: term}
	synctest.Wait()
}

// lose reports a loss.
func (l *script) lose(hint string) {
	synctest.Wait()
	l.mu.Lock()
	l.term = 0
	l.mu.Unlock()
	l.leadership <- Leadership{Hint: hint}
	synctest.Wait()
}

// fail is a disk that is full.
func (l *script) fail(err error) {
	synctest.Wait()
	l.mu.Lock()
	l.err = err
	l.mu.Unlock()
	close(l.leadership)
	synctest.Wait()
}

func (l *script) holding(batches, confirms bool) {
	l.mu.Lock()
	l.hold, l.holdConfirms = batches, confirms
	l.mu.Unlock()
}

// fill has the log hold as many batches as the manager gives it, of one grant
// each.
func (l *script) fill(r *rig) (list []<-chan answer[Hold]) {
	l.holding(true, true)
	for i := range maxFlights {
		list = append(list, background(func() (Hold, error) { return r.own(fmt.Sprint("fill/", i), time.Hour, 0, 0) }))
	}
	return list
}

// take returns the oldest batch held.
func (l *script) take() proposal {
	synctest.Wait()
	l.mu.Lock()
	defer l.mu.Unlock()
	p := l.batches[0]
	l.batches = l.batches[1:]
	p.batch.Term = l.term
	return p
}

// commit applies the oldest batch held and answers it.
func (l *script) commit() {
	p := l.take()
	p.done(l.store.Apply(p.batch), nil)
	synctest.Wait()
}

// drop answers the oldest batch held with err; applied tells whether it takes
// effect all the same, in the term of its proposer.
func (l *script) drop(term uint64, applied bool, err error) {
	p := l.take()
	if applied {
		p.batch.Term = term
		l.store.Apply(p.batch)
	}
	p.done(machine.Outcome{}, err)
	synctest.Wait()
}

// confirm answers the oldest confirmation held.
func (l *script) confirm(err error) {
	synctest.Wait()
	l.mu.Lock()
	done := l.confirms[0]
	l.confirms = l.confirms[1:]
	l.mu.Unlock()
	done(err)
	synctest.Wait()
}

func (l *script) held() (batches, confirms int) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return len(l.batches), len(l.confirms)
}

var errDisk = errors.New("no space left on device")
