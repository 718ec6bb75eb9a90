// Package lease is the lease manager: the one loop that owns the machine's
// inputs. It batches commands for the log, runs the timers of leases,
// lock-delays and waits, parks waiters, and answers.
//
// The machine decides, the manager times, the log remembers.
package lease

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/jonboulle/clockwork"
	"go.uber.org/zap"

	"github.com/distlock/distlock/lease/machine"
)

// Config configures a Manager. Clock, Log and Store are required.
type Config struct {
	Clock  clockwork.Clock
	Log    Log
	Store  *Store // the one the Log applies to
	Bounds Bounds
	Logger *zap.Logger
	// Observer is told what happens; nil for nobody.
	Observer Observer
	// Beside is how many commands are worth a batch of their own while another
	// is in the log. A small one costs more than it gains; 0 means 64.
	Beside int
}

// Manager serves leases and locks on the node that leads. All methods may be
// called from any goroutine; Run is called once.
type Manager struct {
	clock    clockwork.Clock
	log      Log
	store    *Store
	bounds   Bounds
	logger   *zap.Logger
	observer Observer
	aside    int          // Config.Beside
	waiting  atomic.Int64 // len(pending), for Pending
	start    time.Time    // times in the manager are spans since it
	ready    chan struct{}

	// The inbox is how other goroutines reach the loop.
	mu     sync.Mutex
	inbox  []input
	spare  []input       // the loop's last inbox, emptied: the next one
	closed bool          // the loop has ended
	wake   chan struct{} // buffered, one
	made   uint32        // number of the last port
	shared Status        // what Status answers, written by the loop

	loop // only the loop's goroutine touches what is in it
}

// input is one thing for the loop to take in.
type input interface{ take(m *Manager) }

// loop is the state that the loop's goroutine owns.
type loop struct {
	leading  bool
	everLed  bool
	readAt   uint64 // revision of the store when this leadership began
	term     uint64
	hint     string
	draining bool
	failed   error

	wheel  *wheel
	leases map[ID]*leaseTimer
	delays map[uint64]*delayTimer // by the delay's id
	waits  map[uint64]*call       // by the number in the wheel

	pending  []*call   // commands for the next batch
	inFlight []*flight // batches in the log, in the order proposed
	landed   []*flight // to be used again
	parked   map[waiter]*call

	// What the tables would hold if all that is pending or in the log were
	// granted is counts (of the last batch applied) and reserved together.
	counts   machine.Counts
	reserved room

	round      uint64 // of confirmation
	confirming bool
	unasked    []*confirmation // arrived since the round in flight began
	asked      []*confirmation

	due      []ID  // leases whose time has come; propose looks at them again
	pause    timer // until more of them are ended
	others   bool  // anything else has been proposed since the last of them
	marks    []mark
	waitID   uint64
	forgetAt timer

	ports   map[uint32]*Port // that have submitted and are not closed, by number
	ringing []*Port          // those to wake at the end of this turn
}

// flight is a batch in the log, and who waits for its commands.
type flight struct {
	term     uint64
	proposed time.Duration
	mass     bool // it ends as many leases as one batch may
	calls    []*call
	commands []machine.Command
}

// leaseTimer is what the manager keeps per live lease. A lease that a parked
// call keeps alive has the deadline never, and is not in the wheel.
type leaseTimer struct {
	timer
	ttl time.Duration
}

type delayTimer struct {
	timer
	name string
}

// waiter identifies a waiting acquisition as its caller knows it: lease 0 for
// one with a lease of its own.
type waiter struct {
	lease   ID
	request RequestID
}

// mark remembers which revision the store had at a time, to forget what ended
// before it.
type mark struct {
	at       time.Duration
	revision uint64
}

const (
	maxFlights    = 4 // batches in the log: it writes together what comes while it syncs
	defaultBeside = 64
	maxBatch      = 4096                  // commands in one batch
	maxBytes      = 4 << 20               // of one batch, about: a log refuses entries without bound
	maxExpiries   = 96                    // leases in one expiry command, under a millisecond with the disk: a mass expiry is smeared
	maxPause      = 10 * time.Millisecond // between batches of a mass expiry
	markEvery     = 30 * time.Second
	remember      = 10 * time.Minute
)

// New returns a manager. Run starts it.
func New(cfg Config) (*Manager, error) {
	if cfg.Clock == nil || cfg.Log == nil || cfg.Store == nil {
		return nil, errors.New("lease: Config needs a Clock, a Log and a Store")
	}
	if cfg.Logger == nil {
		cfg.Logger = zap.NewNop()
	}
	if cfg.Observer == nil {
		cfg.Observer = unobserved{}
	}
	m := &Manager{
		clock: cfg.Clock, log: cfg.Log, store: cfg.Store, logger: cfg.Logger, observer: cfg.Observer,
		bounds: cfg.Bounds.withDefaults(),
		aside:  cmp.Or(cfg.Beside, defaultBeside),
		start:  cfg.Clock.Now(),
		ready:  make(chan struct{}),
		wake:   make(chan struct{}, 1),
	}
	m.ports = make(map[uint32]*Port)
	m.reset()
	return m, nil
}

func (b Bounds) withDefaults() Bounds {
	d := DefaultBounds()
	for _, f := range []struct{ field, value *time.Duration }{
		{&b.MinTTL, &d.MinTTL}, {&b.MaxTTL, &d.MaxTTL}, {&b.MaxLockDelay, &d.MaxLockDelay},
	} {
		if *f.field == 0 {
			*f.field = *f.value
		}
	}
	for _, f := range []struct{ field, value *int }{
		{&b.MaxNamesPerCall, &d.MaxNamesPerCall}, {&b.MaxLeases, &d.MaxLeases},
		{&b.MaxLocks, &d.MaxLocks}, {&b.MaxWaiters, &d.MaxWaiters},
	} {
		if *f.field == 0 {
			*f.field = *f.value
		}
	}
	return b
}

// reset forgets everything that only a leader knows. No timer of the old wheel
// may be touched afterwards.
func (m *Manager) reset() {
	m.wheel = newWheel()
	m.leases = make(map[ID]*leaseTimer)
	m.delays = make(map[uint64]*delayTimer)
	m.waits = make(map[uint64]*call)
	m.parked = make(map[waiter]*call)
	m.due, m.marks = nil, nil
	m.forgetAt, m.pause = timer{kind: timerForget}, timer{kind: timerPause}
}

// now is the time since the manager was made, on the monotonic clock.
func (m *Manager) now() time.Duration { return m.clock.Since(m.start) }

// Ready is closed once this node has led for the first time.
func (m *Manager) Ready() <-chan struct{} { return m.ready }

// Run is the loop. It returns nil after ctx has ended, and the reason when the
// log stops. Whatever has not been answered by then is answered with an error.
func (m *Manager) Run(ctx context.Context) (err error) {
	alarm := m.clock.NewTimer(time.Hour)
	defer alarm.Stop()
	var alarmAt time.Duration
	leadership := m.log.Leadership()
	defer func() { m.end(err) }()
	for {
		m.takeInbox()
		m.ring()
		if m.leading {
			m.wheel.advance(m.now(), m.fire)
			m.propose()
			m.confirm()
		}
		m.ring()
		m.publish()
		if at, ok := m.wheel.next(); ok && m.leading {
			if at != alarmAt || at <= m.now() {
				alarm.Reset(max(at-m.now(), 0))
				alarmAt = at
			}
		}
		select {
		case <-m.wake:
		case <-alarm.Chan():
			alarmAt = 0
		case l, ok := <-leadership:
			if !ok {
				if err := m.log.Err(); err != nil {
					return fmt.Errorf("%w: %w", ErrLogFailed, err)
				}
				return nil
			}
			m.lead(l)
		case <-ctx.Done():
			return nil
		}
	}
}

// takeInbox takes in what has been put since the last time.
func (m *Manager) takeInbox() {
	m.mu.Lock()
	inbox := m.inbox
	m.inbox, m.spare = m.spare, nil
	m.mu.Unlock()
	for i, in := range inbox {
		in.take(m)
		inbox[i] = nil
	}
	if cap(inbox) > maxSpare {
		inbox = nil
	}
	m.mu.Lock()
	m.spare = inbox[:0]
	m.mu.Unlock()
}

// maxSpare bounds the arrays that are kept to be used again.
const maxSpare = 1 << 14

// put hands an input to the loop; false when the loop has ended.
func (m *Manager) put(in input) bool {
	m.mu.Lock()
	if m.closed {
		m.mu.Unlock()
		return false
	}
	m.inbox = append(m.inbox, in)
	first := len(m.inbox) == 1
	m.mu.Unlock()
	if first {
		select {
		case m.wake <- struct{}{}:
		default:
		}
	}
	return true
}

// end answers everybody once the loop is over.
func (m *Manager) end(err error) {
	m.mu.Lock()
	m.closed = true
	inbox := m.inbox
	m.inbox = nil
	m.shared.Leader = false
	m.mu.Unlock()
	answer := error(ErrStopping)
	if err != nil {
		answer = err
	}
	m.failed = answer
	m.leading = false
	for _, in := range inbox {
		in.take(m)
	}
	for _, f := range m.inFlight {
		for _, c := range f.calls {
			c.answer(m, machine.Result{}, fmt.Errorf("%w: %w", ErrOutcomeUnknown, answer))
		}
	}
	m.abandonServing(answer)
	m.ring()
}

// abandonServing answers whoever waits with err; places in queues stay.
func (m *Manager) abandonServing(err error) {
	for _, c := range m.pending {
		m.reserved.sub(c.room)
		c.answer(m, machine.Result{}, err)
	}
	m.pending = nil
	for _, c := range m.parked {
		c.answer(m, machine.Result{}, err)
	}
	clear(m.parked)
	for _, c := range append(m.asked, m.unasked...) {
		c.answer(m, err)
	}
	m.asked, m.unasked, m.confirming = nil, nil, false
}

// lead takes a change of leadership in. A log may leave out a loss when it is
// followed by a gain: another term is another leadership.
func (m *Manager) lead(l Leadership) {
	if !l.Leader {
		if m.leading {
			m.logger.Warn("lost the leadership", zap.Uint64("term", m.term), zap.String("leader", l.Hint))
		}
		m.leading, m.hint = false, l.Hint
		m.abandonServing(&NotLeaderError{Hint: l.Hint})
		m.reset()
		return
	}
	if m.leading {
		if l.Term == m.term {
			return
		}
		m.abandonServing(&NotLeaderError{})
	}
	// Whatever an earlier leader knew of the time is gone: every lease gets
	// its full TTL, every lock-delay its full length.
	m.reset()
	m.leading, m.term, m.hint = true, l.Term, ""
	now := m.now()
	m.wheel.now = uint64(now / tick)
	m.store.Read(func(s *machine.Machine) {
		m.counts, m.readAt = s.Counts(), s.Revision()
		m.leases = make(map[ID]*leaseTimer, m.counts.Leases)
		s.EachLease(func(id ID, ttl machine.Duration) bool {
			m.armLease(id, time.Duration(ttl), now)
			return true
		})
		s.EachDelay(func(name string, d machine.Delay) bool {
			m.armDelay(name, d, now)
			return true
		})
		s.EachWaiter(func(id ID, own bool, request RequestID) bool {
			if request >= machine.AnonymousRequest {
				// Its caller waited elsewhere, and cannot ask for it again.
				if own {
					id = 0
				}
				m.enqueue(&call{cmd: &machine.Abandon{Lease: id, Request: request}})
			}
			return true
		})
	})
	m.forgetAt.deadline = now + markEvery
	m.wheel.arm(&m.forgetAt)
	m.logger.Info("leading", zap.Uint64("term", l.Term), zap.Int("leases", len(m.leases)))
	if !m.everLed {
		m.everLed = true
		close(m.ready)
	}
}

func (m *Manager) armLease(id ID, ttl, now time.Duration) {
	t := m.leases[id]
	if t == nil {
		t = &leaseTimer{timer: timer{kind: timerLease, id: uint64(id)}, ttl: ttl}
		m.leases[id] = t
	}
	t.deadline = later(now, ttl)
	m.wheel.arm(&t.timer)
}

func (m *Manager) armDelay(name string, d machine.Delay, now time.Duration) {
	t := &delayTimer{timer: timer{kind: timerDelay, id: d.ID, deadline: later(now, time.Duration(d.Duration))}, name: name}
	m.delays[d.ID] = t
	m.wheel.arm(&t.timer)
}

// fire acts on a timer whose time has come.
func (m *Manager) fire(t *timer) {
	switch t.kind {
	case timerLease:
		m.due = append(m.due, ID(t.id))
	case timerDelay:
		if d := m.delays[t.id]; d != nil {
			delete(m.delays, t.id)
			m.enqueue(&call{cmd: &machine.EndDelay{Name: d.name, Delay: t.id}})
		}
	case timerWait:
		c := m.waits[t.id]
		delete(m.waits, t.id)
		if c != nil && !c.answered {
			m.giveUp(c)
		}
	case timerForget:
		m.forget()
	case timerPause: // propose does the rest
	}
}

// forget proposes to drop what ended more than ten minutes ago.
func (m *Manager) forget() {
	now := m.now()
	var remembered int
	var revision uint64
	m.store.Read(func(s *machine.Machine) { remembered, revision = s.Counts().Remembered, s.Revision() })
	old := -1
	for i, k := range m.marks {
		if now-k.at >= remember {
			old = i
		}
	}
	if old >= 0 {
		if remembered > 0 {
			m.enqueue(&call{cmd: &machine.Forget{Through: m.marks[old].revision}})
		}
		m.marks = append(m.marks[:0], m.marks[old+1:]...)
	}
	if remembered > 0 {
		m.marks = append(m.marks, mark{now, revision})
	}
	m.forgetAt.deadline = now + markEvery
	m.wheel.arm(&m.forgetAt)
}

// enqueue adds a command to the next batch.
func (m *Manager) enqueue(c *call) { m.pending = append(m.pending, c) }

// propose sends what is pending to the log. While a batch is in it the next one
// gathers, until it is worth a way through the log of its own; while maxFlights
// are, or leases have fallen due, whatever its size: what is in the log may keep
// one of the leases, as a waiter does that has come back.
func (m *Manager) propose() {
	for (len(m.inFlight) == 0 || m.beside()) && m.proposeBatch() {
	}
}

// beside reports whether another batch may join those in the log.
func (m *Manager) beside() bool {
	return len(m.inFlight) < maxFlights && len(m.pending) >= m.aside && !m.expire()
}

// expire reports whether leases are to be ended now.
func (m *Manager) expire() bool { return len(m.due) > 0 && !m.pause.armed() }

// proposeBatch reports false when there was nothing to propose.
func (m *Manager) proposeBatch() bool {
	f := &flight{}
	if n := len(m.landed); n > 0 {
		f, m.landed = m.landed[n-1], m.landed[:n-1]
	}
	// Expiries come first, so that nothing else in the batch finds a lease
	// alive of which the manager already says that it is not.
	if c := m.expiries(); c != nil {
		f.add(c)
		f.mass, m.others = len(c.cmd.(*machine.ExpireLeases).Leases) == maxExpiries, false
	}
	n, bytes := 0, 0
	for ; n < len(m.pending) && len(f.calls) < maxBatch && bytes < maxBytes; n++ {
		c := m.pending[n]
		if c.giveUpOf != nil {
			if c.giveUpOf.answered {
				continue // granted before its time was up
			}
			c.giveUpOf.givingUp = true
		}
		bytes += size(c.cmd)
		f.add(c)
	}
	clear(m.pending[:n])
	if m.pending = m.pending[n:]; len(m.pending) == 0 {
		m.pending = nil
	}
	m.others = m.others || n > 0
	if len(f.calls) == 0 {
		m.landed = append(m.landed, f)
		return false
	}
	f.term, f.proposed = m.term, m.now()
	m.inFlight = append(m.inFlight, f)
	batch := machine.Batch{Stamp: m.clock.Now().UnixNano(), Commands: f.commands}
	m.log.Propose(batch, func(out machine.Outcome, err error) {
		m.put(&committed{f, out, err})
	})
	return true
}

func (f *flight) add(c *call) {
	f.calls, f.commands = append(f.calls, c), append(f.commands, c.cmd)
}

// expiries makes the command that ends the leases whose time has come, and has
// not been moved since; nil when there are none. From here on their renewals
// are refused.
func (m *Manager) expiries() *call {
	if !m.expire() {
		return nil
	}
	now := m.now()
	var list []ID
	n := 0
	for ; n < len(m.due) && len(list) < maxExpiries; n++ {
		t := m.leases[m.due[n]]
		switch {
		case t == nil: // ended by other means
		case t.expiring || t.deadline <= now:
			t.expiring = true
			list = append(list, m.due[n])
		case t.deadline != never && !t.armed():
			m.wheel.arm(&t.timer)
		}
	}
	if m.due = m.due[n:]; len(m.due) == 0 {
		m.due = nil
	}
	if list == nil {
		return nil
	}
	return &call{cmd: &machine.ExpireLeases{Leases: list, Term: m.term}}
}

// size is about what a command takes in a log entry.
func size(cmd machine.Command) int {
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
		return n
	case *machine.GrantLease:
		n := small + len(c.Owner)
		for _, e := range c.Metadata {
			n += len(e.Key) + len(e.Value)
		}
		return n
	}
	return small + MaxName
}

// committed is the answer of the log to a batch in flight.
type committed struct {
	*flight
	out machine.Outcome
	err error
}

func (c *committed) take(m *Manager) {
	// The first, but when the log refuses a later one at once.
	at := slices.Index(m.inFlight, c.flight)
	m.inFlight = slices.Delete(m.inFlight, at, at+1)
	calls := c.calls
	for _, call := range calls {
		m.reserved.sub(call.room)
	}
	defer m.land(c.flight)
	if c.mass && len(m.due) > 0 && m.others && m.leading {
		// It takes half of the time at most: others want theirs. What took
		// longer was the disk, or a process that was stopped.
		m.pause.deadline = m.now() + min(m.now()-c.proposed, maxPause)
		m.wheel.arm(&m.pause)
	}
	if c.err != nil {
		m.uncommitted(calls, c)
		return
	}
	serving := m.leading && c.term == m.term
	now := m.now()
	m.observer.Committed(len(calls), now-c.proposed)
	// Results come before events: an acquisition must be parked before the
	// event that grants it, and a lease that is there already was made by an
	// earlier attempt.
	for i, call := range calls {
		call.committed(m, c.out.Results[i], serving)
	}
	// A batch of an earlier term may be committed by the log in this one: it is
	// applied after the store was read.
	if m.leading {
		m.counts = c.out.Counts
		for i := range c.out.Events {
			if e := &c.out.Events[i]; e.Revision > m.readAt {
				m.observe(e, now)
			}
		}
		for i, call := range calls { // whose leases the events have made
			if call.port != nil && call.granted {
				if t := m.leases[c.out.Results[i].Lease]; t != nil {
					t.port = call.port.number
				}
			}
		}
	}
}

// uncommitted answers the calls of a batch that the log did not commit.
func (m *Manager) uncommitted(calls []*call, c *committed) {
	err := c.err
	if errors.Is(err, ErrNotLeader) {
		err = &NotLeaderError{Hint: m.hint}
	}
	again := m.leading && c.term == m.term && m.failed == nil
	for _, call := range calls {
		call.answer(m, machine.Result{}, err)
		// What the manager itself proposed is decided anew by whoever leads
		// next; if that is still this node, it must go on trying. All of it
		// may be applied twice.
		if !again || call.asked() {
			continue
		}
		if cmd, ok := call.cmd.(*machine.ExpireLeases); ok {
			m.due = append(cmd.Leases, m.due...)
			continue
		}
		m.enqueue(call)
	}
}

// land empties the arrays of a batch that has been answered.
func (m *Manager) land(f *flight) {
	clear(f.calls)
	clear(f.commands)
	f.calls, f.commands, f.mass = f.calls[:0], f.commands[:0], false
	m.landed = append(m.landed, f)
}

// observe follows what happened to leases, delays and waiters.
func (m *Manager) observe(e *Event, now time.Duration) {
	switch e.Kind {
	case machine.EventLeaseGranted:
		m.armLease(e.Lease, time.Duration(e.TTL), now)
	case machine.EventLeaseEnded:
		m.follow(e)
		if t := m.leases[e.Lease]; t != nil {
			if e.Cause == machine.EndExpired {
				m.observer.Expired(max(now-t.deadline, 0))
			}
			m.wheel.disarm(&t.timer)
			delete(m.leases, e.Lease)
		}
	case machine.EventQueued:
		// A waiter's own lease is kept alive by its parked call.
		if c := m.parked[m.waiterOf(e)]; c != nil && e.Own {
			m.suspend(e.Lease)
		}
	case machine.EventGranted:
		if e.Own {
			m.armLease(e.Lease, time.Duration(e.TTL), now)
		}
		if c := m.parked[m.waiterOf(e)]; c != nil && !c.givingUp {
			m.unpark(c)
			m.observer.Granted(max(now-c.since, 1))
			c.answer(m, machine.Result{Lease: e.Lease, Grant: grantOf(e)}, nil)
		}
	case machine.EventHoldEnded:
		m.follow(e)
	case machine.EventAbandoned:
		if c := m.parked[m.waiterOf(e)]; c != nil && !c.givingUp {
			m.unpark(c)
			refusal := &Refusal{Reason: machine.ReasonRequestEnded, Lease: e.Lease}
			if e.Cause != machine.EndReleased { // with its lease
				refusal.Reason = machine.ReasonLeaseEnded
				refusal.Ended = &machine.Ended{Cause: e.Cause, By: e.By, At: e.Stamp, Revision: e.Revision}
			}
			c.answer(m, machine.Result{}, refusal)
		}
	case machine.EventDelayStarted:
		m.armDelay(e.Locks[0].Name, e.Delay, now)
	case machine.EventDelayEnded:
		if t := m.delays[e.Delay.ID]; t != nil {
			m.wheel.disarm(&t.timer)
			delete(m.delays, e.Delay.ID)
		}
	}
}

func (m *Manager) waiterOf(e *Event) waiter {
	if e.Own {
		return waiter{0, e.Request}
	}
	return waiter{e.Lease, e.Request}
}

func grantOf(e *Event) *machine.Grant {
	return &machine.Grant{Lease: e.Lease, Request: e.Request, Token: e.Token, Mode: e.Mode, Since: e.Stamp, Locks: e.Locks}
}

// suspend stops a lease's time while a parked call keeps it alive.
func (m *Manager) suspend(id ID) {
	if t := m.leases[id]; t != nil {
		t.deadline = never
		m.wheel.disarm(&t.timer)
	}
}

// unpark takes a call out of the waiting ones.
func (m *Manager) unpark(c *call) {
	if m.parked[c.key] == c {
		delete(m.parked, c.key)
	}
	if c.wait.armed() {
		m.wheel.disarm(c.wait)
		delete(m.waits, c.wait.id)
	}
}

// giveUp ends a wait whose bound has been reached: it is explained now and
// answered once the machine has taken the waiter out.
func (m *Manager) giveUp(c *call) {
	c.explain = m.explain(c)
	m.enqueue(&call{cmd: &machine.Abandon{Lease: c.key.lease, Request: c.key.request}, giveUpOf: c})
}

// explain says what a parked call waits for, with the time left of delays.
func (m *Manager) explain(c *call) *Explanation {
	var list []machine.Obstacle
	m.store.Read(func(s *machine.Machine) { list = s.Explain(c.leaseID, c.key.request) })
	return m.withDelays(list)
}

func (m *Manager) withDelays(list []machine.Obstacle) *Explanation {
	e := &Explanation{}
	for _, o := range list {
		e.Obstacles = append(e.Obstacles, Obstacle{Obstacle: o, DelayRemaining: m.delayRemaining(o.Delays)})
	}
	return e
}

func (m *Manager) delayRemaining(list []machine.Delay) time.Duration {
	var longest time.Duration
	for _, d := range list {
		if t := m.delays[d.ID]; t != nil {
			longest = max(longest, t.deadline-m.now())
		}
	}
	return longest
}

// confirm begins a round of confirmation for everything that has arrived.
func (m *Manager) confirm() {
	if m.confirming || len(m.unasked) == 0 {
		return
	}
	m.round++
	m.confirming = true
	m.asked, m.unasked = m.unasked, nil
	round := m.round
	m.log.Confirm(m.term, func(err error) { m.put(&confirmed{round, err}) })
}

// confirmed is the answer of the log to a round of confirmation.
type confirmed struct {
	round uint64
	err   error
}

func (c *confirmed) take(m *Manager) {
	// Of a round that a change of leadership cut short nobody waits: it must
	// not vouch for those who arrived after it began.
	if !m.confirming || c.round != m.round || m.failed != nil {
		return
	}
	m.confirming = false
	err := c.err
	if errors.Is(err, ErrNotLeader) {
		err = &NotLeaderError{Hint: m.hint}
	}
	asked := m.asked
	m.asked = nil
	for _, q := range asked {
		q.answer(m, err)
	}
}

// confirmation is a renewal or read that waits until it is certain that this
// node still leads. then runs on the loop.
type confirmation struct {
	then  func(m *Manager)
	done  chan error // buffered, one
	port  *Port      // is answered instead of done, with
	reply Reply
}

func (c *confirmation) take(m *Manager) {
	if err := m.refuses(); err != nil {
		c.answer(m, err)
		return
	}
	m.unasked = append(m.unasked, c)
}

func (c *confirmation) answer(m *Manager, err error) {
	if err == nil && c.then != nil {
		c.then(m)
	}
	if c.port != nil {
		c.reply.Err = err
		c.port.stage(m, c.reply)
		return
	}
	c.done <- err
}

// refuses says why the node cannot serve now; nil when it can.
func (m *Manager) refuses() error {
	switch {
	case m.failed != nil:
		return m.failed
	case !m.leading:
		return &NotLeaderError{Hint: m.hint}
	}
	return nil
}

// linearize returns once it is certain that this node led after the call, and
// has run then on the loop.
func (m *Manager) linearize(ctx context.Context, then func(m *Manager)) error {
	c := &confirmation{then: then, done: make(chan error, 1)}
	if !m.put(c) {
		return m.ended()
	}
	select {
	case err := <-c.done:
		return err
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

// ended is why the loop is over.
func (m *Manager) ended() error {
	if err := m.log.Err(); err != nil {
		return fmt.Errorf("%w: %w", ErrLogFailed, err)
	}
	return ErrStopping
}

// Status is how a node is at a glance.
type Status struct {
	Leader bool
	Term   uint64
	Hint   string // client address of the leader, when another leads
	machine.Counts
	Revision  uint64
	LastToken uint64
}

// publish lets Status see the leadership.
func (m *Manager) publish() {
	m.mu.Lock()
	m.shared.Leader, m.shared.Term, m.shared.Hint = m.leading, m.term, m.hint
	m.mu.Unlock()
	m.waiting.Store(int64(len(m.pending)))
}

// Status may be asked of any node, and is not linearizable.
func (m *Manager) Status() Status {
	m.mu.Lock()
	s := m.shared
	m.mu.Unlock()
	m.store.Read(func(x *machine.Machine) {
		s.Counts, s.Revision, s.LastToken = x.Counts(), x.Revision(), uint64(x.LastToken())
	})
	return s
}

// Drain prepares the end: every parked waiter is answered ErrStopping and
// keeps its place, and so is new work. What is in the log is still answered.
func (m *Manager) Drain() { m.put(drain{}) }

type drain struct{}

func (drain) take(m *Manager) {
	m.draining = true
	// The parked calls' own leases stay without a deadline: until the end
	// nobody but a restarted server, with full TTLs, is to end them.
	for _, c := range m.parked {
		if c.wait.armed() {
			m.wheel.disarm(c.wait)
		}
		c.answer(m, machine.Result{}, ErrStopping)
	}
	clear(m.parked)
	clear(m.waits)
}

// anonymous makes a request id for a caller that gave none.
func anonymous() RequestID { return RequestID(rand.Uint64()) | machine.AnonymousRequest }
