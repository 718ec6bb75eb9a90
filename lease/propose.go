package lease

import (
	"errors"
	"slices"
	"time"

	"github.com/distlock/distlock/lease/machine"
)

const (
	maxFlights = 4       // batches in the log: it writes together what comes while it syncs
	maxBatch   = 512     // commands in one batch: more gain nothing, and hold up others
	maxBytes   = 4 << 20 // of one batch, about: a log refuses entries without bound
	maxWork    = 1 << 14 // requests abandoned in one batch
)

// proposals is the part of the loop that puts commands into the log and takes
// what they did.
type proposals struct {
	pending  []*call   // commands for the next batch
	inFlight []*flight // batches in the log, in the order proposed
	landed   []*flight // to be used again
	others   bool      // anything else has been proposed since leases were ended last

	// What the tables would hold if all that is pending or in the log were
	// granted is counts (of the last batch applied) and reserved together.
	counts   machine.Counts
	reserved room
}

// flight is a batch in the log, and who waits for its commands.
type flight struct {
	term     uint64
	proposed time.Duration
	mass     bool // it ends as many leases as one batch may
	calls    []*call
	commands []machine.Command
}

func (f *flight) add(c *call) {
	f.calls, f.commands = append(f.calls, c), append(f.commands, c.cmd)
}

// enqueue adds a command to the next batch.
func (l *loop) enqueue(c *call) {
	l.pending = append(l.pending, c)
	c.pends(1)
}

// pends counts a command for the connection that asked for it.
func (c *call) pends(n int) {
	if p, ok := c.sink.(*Port); ok {
		p.share.pending += n
	}
}

// propose sends what is pending to the log. While a batch is in it the next one
// gathers, until it is worth a way through the log of its own; while maxFlights
// are, or leases have fallen due or are to be marked, whatever its size: what is
// in the log may keep one of the leases, as a waiter does that has come back.
func (l *loop) propose() {
	for (len(l.inFlight) == 0 || l.mayOverlap()) && l.proposeBatch() {
	}
}

// mayOverlap reports whether another batch may join those in the log.
func (l *loop) mayOverlap() bool {
	return len(l.inFlight) < maxFlights && len(l.pending) >= l.overlap && !l.leasesDue() && !l.marksDue()
}

// proposeBatch reports false when there was nothing to propose.
func (l *loop) proposeBatch() bool {
	f := &flight{}
	if n := len(l.landed); n > 0 {
		f, l.landed = l.landed[n-1], l.landed[:n-1]
	}
	if c := l.marks(); c != nil {
		f.add(c)
	}
	// Expiries come first, so that nothing else in the batch finds a lease
	// alive of which the manager already says that it is not.
	if c := l.expiries(); c != nil {
		f.add(c)
		f.mass, l.others = len(c.cmd.(*machine.ExpireLeases).Leases) == maxExpiries, false
	}
	l.endings(f)
	n, bytes, work := 0, 0, 0
	for ; n < len(l.pending) && len(f.calls) < maxBatch && bytes < maxBytes && work < maxWork; n++ {
		c := l.pending[n]
		more, parts := size(c.cmd)
		bytes, work = bytes+more, work+parts
		c.pends(-1)
		f.add(c)
	}
	clear(l.pending[:n])
	if l.pending = l.pending[n:]; len(l.pending) == 0 {
		l.pending = nil
	}
	l.others = l.others || n > 0
	if len(f.calls) == 0 {
		l.landed = append(l.landed, f)
		return false
	}
	f.term, f.proposed = l.term, l.now()
	l.inFlight = append(l.inFlight, f)
	batch := machine.Batch{Stamp: l.clock.Now().UnixNano(), Commands: f.commands}
	l.log.Propose(batch, func(out machine.Outcome, err error) {
		l.inbox.put(&committed{f, out, err})
	})
	return true
}

// size is about how many bytes a command takes in a log entry, and of how many
// parts it is.
func size(cmd machine.Command) (bytes, parts int) {
	const small = 64
	switch c := cmd.(type) {
	case *machine.Acquire:
		n := small + len(c.Actor) + len(c.Owner)
		for _, name := range c.Names {
			n += len(name)
		}
		for _, e := range c.Metadata {
			n += len(e.Key) + len(e.Value)
		}
		return n, 1
	case *machine.GrantLease:
		n := small + len(c.Owner)
		for _, e := range c.Metadata {
			n += len(e.Key) + len(e.Value)
		}
		return n, 1
	case *machine.Clear:
		return small + 10*len(c.Leases), 1 + len(c.Leases)/16
	case *machine.AbandonAll:
		return small + 10*len(c.Requests), len(c.Requests)
	}
	return small + MaxName, 1
}

// committed is the answer of the log to a batch in flight.
type committed struct {
	*flight
	out machine.Outcome
	err error
}

func (c *committed) take(l *loop) {
	// The first, but when the log refuses a later one at once.
	at := slices.Index(l.inFlight, c.flight)
	l.inFlight = slices.Delete(l.inFlight, at, at+1)
	calls := c.calls
	for _, call := range calls {
		l.reserved.sub(call.room)
		if _, ok := call.cmd.(*machine.Mark); ok {
			l.marksOut--
		}
	}
	defer l.land(c.flight)
	if c.mass && len(l.due) > 0 && l.others && l.leading {
		// It takes half of the time at most: others want theirs. What took
		// longer was the disk, or a process that was stopped.
		l.pause.deadline = l.now() + min(l.now()-c.proposed, maxPause)
		l.wheel.arm(&l.pause)
	}
	if c.err != nil {
		l.uncommitted(calls, c)
		return
	}
	serving := l.leading && c.term == l.term && c.out.Term == c.term
	now := l.now()
	l.observer.Committed(len(calls), now-c.proposed)
	// Results come before events: an acquisition must be parked before the
	// event that grants it, and a lease that is there already was made by an
	// earlier attempt.
	for i, call := range calls {
		call.committed(l, c.out.Results[i], serving)
	}
	// A batch of an earlier term may be committed by the log in this one: it is
	// applied after the store was read.
	if l.leading {
		l.counts = c.out.Counts
		for i := range c.out.Events {
			if e := &c.out.Events[i]; e.Revision > l.readAt {
				l.observe(e, now)
			}
		}
		for i, call := range calls { // whose leases the events have made
			if call.granted && call.sink != nil && call.sink.stream() != 0 {
				if t := l.leases[c.out.Results[i].Lease]; t != nil {
					t.port = call.sink.stream()
				}
			}
		}
	}
}

// uncommitted answers the calls of a batch that the log did not commit. What
// the manager itself proposed is decided anew by whoever leads next; if that is
// still this node, it must go on trying. All of it may be applied twice.
func (l *loop) uncommitted(calls []*call, c *committed) {
	err := c.err
	refused := errors.Is(err, ErrNotLeader)
	if refused {
		err = &NotLeaderError{Hint: l.hint}
	}
	again := l.leading && c.term == l.term && l.failed == nil
	for _, call := range calls {
		switch cmd := call.cmd.(type) {
		case *machine.ExpireLeases:
			if again {
				l.unexpired(cmd.Leases, refused)
			}
		case *machine.Mark: // it may be there, or not
		default:
			switch {
			case !again || call.asked():
				call.answer(l, machine.Result{}, err)
			case call.few().ends != nil:
				waits := call.few().ends
				waits.givingUp = false
				l.waiting.ending = append(l.waiting.ending, waits)
			default:
				l.enqueue(call)
			}
		}
	}
}

// land empties the arrays of a batch that has been answered.
func (l *loop) land(f *flight) {
	clear(f.calls)
	clear(f.commands)
	f.calls, f.commands, f.mass = f.calls[:0], f.commands[:0], false
	l.landed = append(l.landed, f)
}

// committed takes the machine's result in.
func (c *call) committed(l *loop, r machine.Result, serving bool) {
	switch {
	case c.few().ends != nil:
		l.waitEnded(c, r)
	case c.few().renews != nil:
		l.cleared(c, serving)
	case c.left && !c.undone:
		c.answer(l, machine.Result{}, errCanceled)
	case r.Refusal != nil:
		c.with().explain = l.withDelays(r.Refusal.Explain)
		c.answer(l, r, r.Refusal)
	case c.left: // its undoing is on its way
	case c.makesLease() && !l.repeated(r.Lease):
		c.answer(l, machine.Result{}, ErrOutcomeUnknown) // its lease is being ended
	case !r.Waiting:
		if r.Hold != nil {
			l.observer.Granted(0)
		}
		c.answer(l, r, nil)
	case l.failed != nil:
		c.answer(l, machine.Result{}, l.failed)
	case !serving:
		c.answer(l, machine.Result{}, &NotLeaderError{Hint: l.hint})
	case l.draining:
		c.answer(l, machine.Result{}, ErrStopping)
	case !c.answered:
		c.with().leaseID = r.Lease
		l.park(c)
	}
}

// observe follows what happened to leases, delays and waiters.
func (l *loop) observe(e *Event, now time.Duration) {
	switch e.Kind {
	case machine.EventLeaseGranted:
		l.armLease(e.Lease, time.Duration(e.TTL), now)
	case machine.EventLeaseEnded:
		l.follow(e)
		if t := l.leases[e.Lease]; t != nil && e.Cause == machine.EndExpired {
			l.observer.Expired(max(now-t.deadline, 0))
		}
		l.endLease(e.Lease)
	case machine.EventQueued:
		// The own lease of a waiter that cannot renew it is kept by its call.
		if c := l.waiting.parked[waiterOf(e)]; c != nil && e.Own && c.attempt == 0 {
			l.suspend(e.Lease)
		}
	case machine.EventGranted:
		if e.Own {
			l.armLease(e.Lease, time.Duration(e.TTL), now)
		}
		if c := l.waiting.parked[waiterOf(e)]; c != nil && !c.givingUp {
			l.unpark(c)
			l.observer.Granted(max(now-c.since, 1))
			c.answer(l, machine.Result{Lease: e.Lease, Hold: holdOf(e)}, nil)
		}
	case machine.EventHoldEnded:
		l.waiting.over(waiterOf(e))
		l.lost(e)
	case machine.EventAbandoned:
		l.waiting.over(waiterOf(e))
		if c := l.waiting.parked[waiterOf(e)]; c != nil && !c.givingUp {
			l.unpark(c)
			refusal := &Refusal{Reason: machine.ReasonRequestEnded, Lease: e.Lease}
			if e.Cause != machine.EndReleased { // with its lease
				refusal.Reason = machine.ReasonLeaseEnded
				refusal.Ended = &machine.Ended{Cause: e.Cause, By: e.By, At: e.Stamp, Revision: e.Revision}
			}
			c.answer(l, machine.Result{}, refusal)
		}
	case machine.EventDelayStarted:
		l.armDelay(e.Locks[0].Name, e.Delay, now)
	case machine.EventDelayEnded:
		l.endDelay(e.Delay.ID)
	}
}

// lost notes a hold that ended otherwise than by the word of who has its lease,
// while that lives on, and pushes it.
func (l *loop) lost(e *Event) {
	loses := e.Elsewhere
	switch e.Cause {
	case machine.EndForceReleased, machine.EndUndeclared:
		loses = true
	}
	if !loses {
		return // released, or with its lease
	}
	if !e.Own {
		l.lossy[e.Lease] = struct{}{}
	}
	l.follow(e)
}

// follow tells the stream that granted or renewed a lease last of its end, or
// of that of a hold under it.
func (l *loop) follow(e *Event) {
	t := l.leases[e.Lease]
	if t == nil || t.port == 0 || e.Cause == machine.EndReleased && !e.Elsewhere {
		return
	}
	p := l.streams[t.port]
	if p == nil {
		return
	}
	loss := Loss{Lease: e.Lease, Cause: e.Cause, By: e.By}
	if e.Kind == machine.EventHoldEnded {
		loss.Token = e.Token
	}
	p.lose(l, loss)
}
