package lease

import (
	"context"
	"fmt"
	"time"

	"github.com/distlock/distlock/lease/machine"
)

// loop is the state of the one goroutine that serves, Run's. No other reaches
// it: they put inputs in the Manager's inbox.
type loop struct {
	*Manager

	leading  bool
	everLed  bool
	readAt   uint64 // revision of the store when this leadership began
	term     uint64
	hint     string
	draining bool
	failed   error

	wheel *wheel
	expiry
	marking
	proposals
	waiting waitingCalls
	rounds  confirmations

	streams map[uint32]*Port // that have submitted and are not closed, by number
	ringing []*Port          // those to wake at the end of this turn
}

func newLoop(m *Manager) *loop {
	l := &loop{Manager: m, streams: make(map[uint32]*Port)}
	l.reset()
	return l
}

// reset forgets everything that only a leader knows. No timer of the old wheel
// may be touched afterwards.
func (l *loop) reset() {
	l.wheel = newWheel()
	l.expiry = newExpiry()
	l.marking = marking{markPause: timer{kind: timerPause}, marksOut: l.marksOut}
	l.waiting = newWaitingCalls(l.waiting.serial)
	l.delays.reset()
}

// maxFired bounds the timers that one turn looks at.
const maxFired = 1024

// run is the loop.
func (l *loop) run(ctx context.Context) (err error) {
	alarm := l.clock.NewTimer(time.Hour)
	defer alarm.Stop()
	var alarmAt time.Duration
	leadership := l.log.Leadership()
	defer func() { l.end(err) }()
	for {
		l.inbox.take(func(in input) { in.take(l) })
		l.ring()
		if l.leading {
			l.wheel.advance(l.now(), maxFired, l.fire)
			l.propose()
			l.left()
			l.confirm()
		}
		l.ring()
		l.publish()
		if at, ok := l.wheel.next(); ok && l.leading {
			if at != alarmAt || at <= l.now() {
				alarm.Reset(max(at-l.now(), 0))
				alarmAt = at
			}
		}
		select {
		case <-l.inbox.wake:
		case <-alarm.Chan():
			alarmAt = 0
		case change, ok := <-leadership:
			if !ok {
				if err := l.log.Err(); err != nil {
					return logFailed(err)
				}
				return nil
			}
			l.lead(change)
		case <-ctx.Done():
			return nil
		}
	}
}

// fire acts on a timer whose time has come.
func (l *loop) fire(t *timer) {
	if t.deadline > l.now() {
		l.fade(t)
		return
	}
	switch t.kind {
	case timerLease:
		l.due = append(l.due, ID(t.id))
	case timerDelay:
		if d := l.delayed[t.id]; d != nil {
			l.endDelay(t.id)
			l.enqueue(&call{cmd: &machine.EndDelay{Name: d.name, Delay: t.id}})
		}
	case timerWait:
		if c := l.waiting.bounded[t.id]; c != nil {
			delete(l.waiting.bounded, t.id)
			l.waiting.ending = append(l.waiting.ending, c)
		}
	case timerForget:
		l.forget()
	case timerPause: // propose does the rest
	}
}

// refuses says why the node cannot serve now; nil when it can.
func (l *loop) refuses() error {
	switch {
	case l.failed != nil:
		return l.failed
	case !l.leading:
		return &NotLeaderError{Hint: l.hint}
	}
	return nil
}

// publish lets Status see the leadership.
func (l *loop) publish() {
	l.mu.Lock()
	l.seen.Leader, l.seen.Term, l.seen.Hint = l.leading, l.term, l.hint
	l.mu.Unlock()
	l.queued.Store(int64(len(l.pending)))
}

// end answers everybody once the loop is over.
func (l *loop) end(err error) {
	inbox := l.inbox.close()
	answer := error(ErrStopping)
	if err != nil {
		answer = err
	}
	l.failed, l.leading = answer, false
	l.publish()
	for _, in := range inbox {
		in.take(l)
	}
	for _, f := range l.inFlight {
		for _, c := range f.calls {
			c.answer(l, machine.Result{}, fmt.Errorf("%w: %w", ErrOutcomeUnknown, answer))
		}
	}
	l.abandonServing(answer)
	l.ring()
}

type drain struct{}

func (drain) take(l *loop) {
	l.draining = true
	for _, c := range l.waiting.parked {
		l.wheel.disarm(c.few().wait)
		// Until the end nobody but a restarted server, with full TTLs, is to
		// end the lease of one who waits.
		if c.key.lease == 0 {
			l.suspend(c.few().leaseID)
		}
		c.answer(l, machine.Result{}, ErrStopping)
	}
	l.waiting = newWaitingCalls(l.waiting.serial)
}
