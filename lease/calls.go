package lease

import (
	"context"
	"errors"
	"slices"
	"strings"
	"time"

	"github.com/distlock/distlock/fence"
	"github.com/distlock/distlock/lease/machine"
)

// call is one command on its way through the loop, and who waits for it. Its
// fields belong to the loop once it is put there; done is read by the caller.
type call struct {
	cmd  machine.Command // nil-result commands of the manager have no done
	done chan outcome    // buffered, one; nil when nobody waits there
	port *Port           // is answered instead of done
	tag  uint64          // names the call there

	weight int64 // of the port's bound

	// Of an Acquire.
	key     waiter
	bound   time.Duration // of the wait; WaitForever for none
	since   time.Duration // when the loop took it in
	wait    *timer        // while it is parked, if there is a bound
	leaseID ID
	explain *Explanation // once it was refused or has waited in vain

	giveUpOf *call // this is the Abandon of a wait that reached its bound
	room     room  // that it has reserved

	onPort   bool // parked, by the port's count
	answered bool
	givingUp bool // its Abandon is in the log: a grant that comes first is undone
	granted  bool // it was answered with what it asked for
}

// room is what a command may add to the tables.
type room struct{ leases, locks, waiters int32 }

func (r *room) add(o room) { r.leases += o.leases; r.locks += o.locks; r.waiters += o.waiters }
func (r *room) sub(o room) { r.leases -= o.leases; r.locks -= o.locks; r.waiters -= o.waiters }

type outcome struct {
	result  machine.Result
	explain *Explanation
	err     error
}

// take admits a command, or refuses it before anything is tried.
func (c *call) take(m *Manager) {
	err := m.refuses()
	if err == nil && m.draining {
		err = ErrStopping
	}
	if err == nil && c.port != nil {
		err = c.port.admit(c)
	}
	if err == nil {
		err = m.reserve(c)
	}
	if err != nil {
		c.answer(m, machine.Result{}, err)
		return
	}
	c.since = m.now()
	m.enqueue(c)
}

// reserve holds a command against the server's bounds, and reserves what it
// may need until its result is known.
func (m *Manager) reserve(c *call) error {
	var need room
	switch cmd := c.cmd.(type) {
	case *machine.GrantLease:
		need.leases = 1
	case *machine.Declare:
		need.locks = 1
	case *machine.Acquire:
		need.locks = int32(len(cmd.Names))
		if cmd.Lease == 0 {
			need.leases = 1
		}
		if cmd.Wait {
			need.waiters = 1
		}
	default:
		return nil
	}
	if m.exceeded(need) != nil {
		// Close to a bound it matters what is there already.
		need = m.missing(c, need)
		if err := m.exceeded(need); err != nil {
			return err
		}
	}
	c.room = need
	m.reserved.add(need)
	return nil
}

// exceeded says which bound would be broken by granting need beside all that
// is under way; nil when none would.
func (m *Manager) exceeded(need room) error {
	switch {
	case need.leases > 0 && m.counts.Leases+int(m.reserved.leases+need.leases) > m.bounds.MaxLeases:
		return &ExhaustedError{What: "leases", Max: m.bounds.MaxLeases}
	case need.locks > 0 && m.counts.Locks+int(m.reserved.locks+need.locks) > m.bounds.MaxLocks:
		return &ExhaustedError{What: "locks", Max: m.bounds.MaxLocks}
	case need.waiters > 0 && m.counts.Waiters+int(m.reserved.waiters+need.waiters) > m.bounds.MaxWaiters:
		return &ExhaustedError{What: "waiters", Max: m.bounds.MaxWaiters}
	}
	return nil
}

// missing leaves out of need what exists already: locks, and everything of a
// repeat.
func (m *Manager) missing(c *call, need room) room {
	m.store.Read(func(s *machine.Machine) {
		switch cmd := c.cmd.(type) {
		case *machine.Declare:
			if _, exists := s.Lock(cmd.Name); exists {
				need.locks--
			}
		case *machine.Acquire:
			if _, known := s.Find(c.key.lease, c.key.request); known {
				need = room{}
				return
			}
			for _, name := range cmd.Names {
				if _, exists := s.Lock(name); exists {
					need.locks--
				}
			}
		}
	})
	return need
}

// committed takes the machine's result in.
func (c *call) committed(m *Manager, r machine.Result, serving bool) {
	if c.giveUpOf != nil {
		waited := c.giveUpOf
		m.unpark(waited)
		waited.answer(m, machine.Result{}, &WaitTimeoutError{Waited: waited.bound, Explain: *waited.explain})
		return
	}
	if r.Refusal != nil {
		c.explain = m.withDelays(r.Refusal.Explain)
		c.answer(m, r, r.Refusal)
		return
	}
	if !r.Waiting {
		if c.madeLease() {
			m.renewMade(r.Lease)
		}
		if r.Grant != nil {
			m.observer.Granted(0)
		}
		c.answer(m, r, nil)
		return
	}
	c.leaseID = r.Lease
	switch {
	case m.failed != nil:
		c.answer(m, machine.Result{}, m.failed)
	case !serving:
		c.answer(m, machine.Result{}, &NotLeaderError{Hint: m.hint})
	case m.draining:
		c.answer(m, machine.Result{}, ErrStopping)
	case !c.answered:
		m.park(c)
	}
}

// madeLease reports whether the command makes a lease.
func (c *call) madeLease() bool {
	switch cmd := c.cmd.(type) {
	case *machine.GrantLease:
		return true
	case *machine.Acquire:
		return cmd.Lease == 0
	}
	return false
}

// renewMade renews a lease made by an earlier attempt, whose answer may have
// been lost: whoever repeats the request counts the TTL from the repeat. A
// lease made just now is not in the table yet, and its event arms it.
func (m *Manager) renewMade(id ID) {
	if t := m.leases[id]; t != nil {
		t.deadline = max(t.deadline, later(m.now(), t.ttl))
	}
}

// park lets a call wait for its grant. A repeat takes the place of the call it
// repeats.
func (m *Manager) park(c *call) {
	if old := m.parked[c.key]; old != nil {
		m.unpark(old)
		old.answer(m, machine.Result{}, ErrSuperseded)
	}
	m.parked[c.key] = c
	if c.port != nil {
		c.port.park(c)
	}
	if c.key.lease == 0 {
		m.suspend(c.leaseID)
	}
	if c.bound != WaitForever {
		m.waitID++
		c.wait = &timer{kind: timerWait, id: m.waitID, deadline: later(c.since, c.bound)}
		m.waits[m.waitID] = c
		m.wheel.arm(c.wait)
	}
}

// asked reports whether somebody waits for the answer.
func (c *call) asked() bool { return c.done != nil || c.port != nil }

func (c *call) answer(m *Manager, r machine.Result, err error) {
	if c.answered {
		return
	}
	c.answered, c.granted = true, err == nil
	switch {
	case c.port != nil:
		c.port.answer(m, c, r, err)
	case c.done != nil:
		c.done <- outcome{r, c.explain, err}
	}
}

// leave is a caller that stops waiting for its Acquire.
type leave struct {
	call *call
	keep bool // its connection was lost: it may come back for its place
}

func (l *leave) take(m *Manager) {
	c := l.call
	if m.refuses() != nil || m.draining || c.answered && !c.granted {
		return // above all: a repeat may have taken its place
	}
	if m.parked[c.key] == c {
		m.unpark(c)
		if t := m.leases[c.leaseID]; t != nil && l.keep && c.key.lease == 0 {
			m.armLease(c.leaseID, t.ttl, m.now())
		}
	}
	c.answered = true
	if !l.keep {
		// Also when a grant has won the race: nobody will hear of it.
		m.enqueue(&call{cmd: &machine.Abandon{Lease: c.key.lease, Request: c.key.request}})
	}
}

// do sends one command through the loop and waits for its result. When ctx
// ends first the command goes on, and may or may not take effect.
func (m *Manager) do(ctx context.Context, cmd machine.Command) (outcome, error) {
	c := &call{cmd: cmd, done: make(chan outcome, 1)}
	if !m.put(c) {
		return outcome{}, m.ended()
	}
	select {
	case o := <-c.done:
		return o, o.err
	case <-ctx.Done():
		return outcome{}, context.Cause(ctx)
	}
}

// GrantLease makes a lease. Errors: *InvalidError, *ExhaustedError, *Refusal.
func (m *Manager) GrantLease(ctx context.Context, r GrantLeaseRequest) (LeaseInfo, error) {
	cmd, err := m.grantCommand(r)
	if err != nil {
		return LeaseInfo{}, err
	}
	o, err := m.do(ctx, cmd)
	if err != nil {
		return LeaseInfo{}, err
	}
	return LeaseInfo{
		Lease:     machine.Lease{ID: o.result.Lease, TTL: machine.Duration(r.TTL), Owner: r.Owner, Request: r.Request},
		Remaining: r.TTL,
	}, nil
}

func (m *Manager) grantCommand(r GrantLeaseRequest) (*machine.GrantLease, error) {
	if err := errors.Join(
		m.bounds.ttl(r.TTL), text("owner", r.Owner), metadata(r.Metadata), requestID(r.Request),
	); err != nil {
		return nil, first(err)
	}
	return &machine.GrantLease{
		Request: r.Request, TTL: machine.Duration(r.TTL), Owner: r.Owner, Metadata: sortedMetadata(r.Metadata),
	}, nil
}

// KeepAlive renews leases: each lives for its TTL from now. The answers are in
// the order asked; those of leases that are gone carry a *Refusal. The error
// is of the whole: then nothing is known to have been renewed.
func (m *Manager) KeepAlive(ctx context.Context, ids []ID) ([]KeepAlive, error) {
	received := m.now()
	answers := make([]KeepAlive, len(ids))
	err := m.linearize(ctx, func(m *Manager) {
		for i, id := range ids {
			answers[i] = m.renew(id, received)
		}
	})
	if err != nil {
		return nil, err
	}
	return answers, nil
}

func (m *Manager) renew(id ID, received time.Duration) KeepAlive {
	t := m.leases[id]
	switch {
	case t == nil:
		var gone *Refusal
		m.store.Read(func(s *machine.Machine) {
			if _, live := s.TTL(id); !live {
				gone = s.LeaseGone(id)
			}
		})
		if gone == nil { // its grant is applied, and its event on its way here
			return KeepAlive{Lease: id, Err: ErrOutcomeUnknown}
		}
		return KeepAlive{Lease: id, Err: gone}
	case t.expiring:
		return KeepAlive{Lease: id, Err: &Refusal{Reason: machine.ReasonLeaseEnded, Lease: id, Ended: &machine.Ended{Cause: machine.EndExpired, At: m.clock.Now().UnixNano()}}}
	}
	// Only the deadline moves; the wheel notices at the old one.
	t.deadline = max(t.deadline, later(received, t.ttl))
	return KeepAlive{Lease: id, TTL: t.ttl}
}

// RevokeLease ends a lease; its holds are lost. Errors: *Refusal.
func (m *Manager) RevokeLease(ctx context.Context, id ID, by string) error {
	if err := text("by", by); err != nil {
		return err
	}
	_, err := m.do(ctx, &machine.RevokeLease{Lease: id, By: by})
	return err
}

// Lease shows one lease. Errors: *Refusal when it is gone.
func (m *Manager) Lease(ctx context.Context, id ID) (LeaseInfo, error) {
	var info LeaseInfo
	var gone *Refusal
	err := m.linearize(ctx, func(m *Manager) {
		m.store.Read(func(s *machine.Machine) {
			var ok bool
			if info.Lease, ok = s.Lease(id); !ok {
				gone = s.LeaseGone(id)
			}
		})
		info.Remaining = m.remaining(id)
	})
	switch {
	case err != nil:
		return LeaseInfo{}, err
	case gone != nil:
		return LeaseInfo{}, gone
	}
	return info, nil
}

func (m *Manager) remaining(id ID) time.Duration {
	t := m.leases[id]
	switch {
	case t == nil || t.expiring:
		return 0
	case t.deadline == never: // kept alive by its parked call
		return t.ttl
	}
	return max(t.deadline-m.now(), 0)
}

// Leases lists at most limit leases (at least 1) in order of id, from the one
// after after; more tells that there are others behind.
func (m *Manager) Leases(ctx context.Context, after ID, limit int) (list []LeaseInfo, more bool, err error) {
	if err := m.linearize(ctx, nil); err != nil {
		return nil, false, err
	}
	list, more = leasesIn(m.store.View(), after, limit)
	err = m.linearize(ctx, func(m *Manager) {
		for i := range list {
			list[i].Remaining = m.remaining(list[i].ID)
		}
	})
	return list, more, err
}

func leasesIn(view *machine.View, after ID, limit int) (list []LeaseInfo, more bool) {
	limit = max(limit, 1)
	view.AscendLeases(after, func(l machine.Lease) bool {
		if more = len(list) == limit; !more {
			list = append(list, LeaseInfo{Lease: l})
		}
		return !more
	})
	return list, more
}

// Acquire takes locks, all or none, waiting as long as the request says. When
// ctx is cancelled the wait is abandoned, and a grant that won the race undone;
// when it is cancelled with the cause ErrDetached the place is kept for a
// repeat. Errors: *InvalidError, *ExhaustedError, *HeldError,
// *WaitTimeoutError, *Refusal, *NotLeaderError, ErrStopping, ErrSuperseded,
// ErrOutcomeUnknown, ErrLogFailed, ctx's cause.
func (m *Manager) Acquire(ctx context.Context, r AcquireRequest) (Grant, error) {
	c, cmd, err := m.acquireCall(r)
	if err != nil {
		return Grant{}, err
	}
	c.done = make(chan outcome, 1)
	if !m.put(c) {
		return Grant{}, m.ended()
	}
	var o outcome
	select {
	case o = <-c.done:
	case <-ctx.Done():
	}
	if ctx.Err() != nil && o.err == nil { // nobody hears the answer, if there is one
		cause := context.Cause(ctx)
		// Nobody could ask again for the place of an anonymous request.
		keep := errors.Is(cause, ErrDetached) && cmd.Request < machine.AnonymousRequest
		m.put(&leave{call: c, keep: keep})
		return Grant{}, cause
	}
	if o.err != nil {
		return Grant{}, heldError(o.err, o.explain)
	}
	g := Grant{Grant: *o.result.Grant, TTL: r.TTL}
	if r.Lease != 0 {
		g.TTL = m.ttl(r.Lease)
	}
	return g, nil
}

// heldError is the refusal of a lock that is not free, explained; other errors
// stay as they are.
func heldError(err error, explain *Explanation) error {
	var refusal *Refusal
	if errors.As(err, &refusal) && refusal.Reason == machine.ReasonLockHeld {
		return &HeldError{Refusal: refusal, Explain: *explain}
	}
	return err
}

// ttl is that of a live lease; 0 when it is gone.
func (m *Manager) ttl(id ID) (ttl time.Duration) {
	m.store.Read(func(s *machine.Machine) {
		d, _ := s.TTL(id)
		ttl = time.Duration(d)
	})
	return ttl
}

// acquireCall checks a request, of which it keeps nothing but text, and makes
// the call and its command in one piece of memory.
func (m *Manager) acquireCall(r AcquireRequest) (*call, *machine.Acquire, error) {
	if err := m.bounds.acquire(&r); err != nil {
		return nil, nil, err
	}
	made := &struct {
		call
		cmd  machine.Acquire
		name [1]string
	}{}
	names := append(made.name[:0], r.Names...)
	slices.Sort(names)
	for i := 1; i < len(names); i++ {
		if names[i] == names[i-1] {
			return nil, nil, &InvalidError{Field: "names", Msg: "names " + quoted(names[i]) + " twice; name each lock once"}
		}
	}
	if r.Request == 0 {
		r.Request, r.LowestOpen = anonymous(), 0
	}
	if r.Mode == 0 {
		r.Mode = machine.Exclusive
	}
	cmd := &made.cmd
	*cmd = machine.Acquire{
		Lease: r.Lease, Request: r.Request, LowestOpen: r.LowestOpen, Names: names, Mode: r.Mode, Limit: r.Limit,
		Wait: r.Wait != 0, LockDelay: machine.Duration(r.LockDelay), Actor: r.Actor,
		Metadata: sortedMetadata(r.Metadata), Declared: r.Declared,
	}
	if r.Lease == 0 {
		cmd.TTL, cmd.Owner = machine.Duration(r.TTL), r.Owner
	}
	c := &made.call
	c.cmd, c.key, c.bound = cmd, waiter{r.Lease, cmd.Request}, r.Wait
	return c, cmd, nil
}

// Release gives a hold back. Errors: *Refusal, which says why the hold is gone
// and whether anyone was granted since.
func (m *Manager) Release(ctx context.Context, r ReleaseRequest) error {
	if err := r.check(); err != nil {
		return err
	}
	_, err := m.do(ctx, &machine.Release{Lease: r.Lease, Name: r.Name, Token: r.Token})
	return err
}

func (r *ReleaseRequest) check() error {
	if r.Token == 0 {
		return &InvalidError{Field: "token", Msg: "must be the token of the grant, which is never 0"}
	}
	if r.Lease == 0 || r.Name != "" {
		return name("name", r.Name)
	}
	return nil
}

// Abandon ends a request whatever became of it.
func (m *Manager) Abandon(ctx context.Context, lease ID, request RequestID) error {
	if err := abandonable(request); err != nil {
		return err
	}
	_, err := m.do(ctx, &machine.Abandon{Lease: lease, Request: request})
	return err
}

func abandonable(request RequestID) error {
	if request == 0 || request >= machine.AnonymousRequest {
		return &InvalidError{Field: "request_id", Msg: "must be the request id of the acquisition, from 1 to 2^63-1"}
	}
	return nil
}

// ForceRelease breaks the hold with token on a lock, or every hold when token
// is 0. Errors: *Refusal.
func (m *Manager) ForceRelease(ctx context.Context, lock string, token fence.Token, by string) error {
	if err := errors.Join(name("name", lock), text("by", by)); err != nil {
		return first(err)
	}
	_, err := m.do(ctx, &machine.ForceRelease{Name: lock, Token: token, By: by})
	return err
}

// Lock shows one lock, with the revision of the answer. A lock that nobody
// holds, waits for or declared is an answer too.
func (m *Manager) Lock(ctx context.Context, lock string) (LockInfo, uint64, error) {
	if err := name("name", lock); err != nil {
		return LockInfo{}, 0, err
	}
	var info LockInfo
	var revision uint64
	err := m.linearize(ctx, func(m *Manager) {
		m.store.Read(func(s *machine.Machine) {
			info.Lock, _ = s.Lock(lock)
			revision = s.Revision()
		})
		info.DelayRemaining = m.delayRemaining(info.Delays)
	})
	return info, revision, err
}

// Locks lists at most limit locks (at least 1) whose names begin with prefix
// and come after after, in order of name, with the revision of the answer;
// more tells that there are others behind.
func (m *Manager) Locks(ctx context.Context, prefix, after string, limit int) (list []LockInfo, more bool, revision uint64, err error) {
	if err := m.linearize(ctx, nil); err != nil {
		return nil, false, 0, err
	}
	list, more, revision = locksIn(m.store.View(), prefix, after, limit)
	err = m.linearize(ctx, func(m *Manager) {
		for i := range list {
			list[i].DelayRemaining = m.delayRemaining(list[i].Delays)
		}
	})
	return list, more, revision, err
}

func locksIn(view *machine.View, prefix, after string, limit int) (list []LockInfo, more bool, revision uint64) {
	limit = max(limit, 1)
	from := prefix
	if after != "" {
		from = max(from, after+"\x00")
	}
	view.AscendLocks(from, func(k machine.Lock) bool {
		if !strings.HasPrefix(k.Name, prefix) {
			return false
		}
		if more = len(list) == limit; !more {
			list = append(list, LockInfo{Lock: k})
		}
		return !more
	})
	return list, more, view.Revision()
}

// StaleLock shows one lock as this node has it, whether it leads or not.
// Another node may know better; what is left of lock-delays only the leader
// knows. Errors: *InvalidError.
func (m *Manager) StaleLock(lock string) (LockInfo, uint64, error) {
	if err := name("name", lock); err != nil {
		return LockInfo{}, 0, err
	}
	var info LockInfo
	var revision uint64
	m.store.Read(func(s *machine.Machine) {
		info.Lock, _ = s.Lock(lock)
		revision = s.Revision()
	})
	return info, revision, nil
}

// StaleLocks lists locks like Locks, as this node has them.
func (m *Manager) StaleLocks(prefix, after string, limit int) (list []LockInfo, more bool, revision uint64) {
	return locksIn(m.store.View(), prefix, after, limit)
}

// StaleLease shows one lease as this node has it; its remaining time only the
// leader knows. Errors: *Refusal when it is gone.
func (m *Manager) StaleLease(id ID) (info LeaseInfo, err error) {
	m.store.Read(func(s *machine.Machine) {
		var ok bool
		if info.Lease, ok = s.Lease(id); !ok {
			err = s.LeaseGone(id)
		}
	})
	return info, err
}

// StaleLeases lists leases like Leases, as this node has them.
func (m *Manager) StaleLeases(after ID, limit int) ([]LeaseInfo, bool) {
	return leasesIn(m.store.View(), after, limit)
}

// CheckToken tells whether a token is of a live hold on a lock.
func (m *Manager) CheckToken(ctx context.Context, lock string, token fence.Token) (TokenCheck, error) {
	if err := checkable(lock, token); err != nil {
		return TokenCheck{}, err
	}
	var check TokenCheck
	err := m.linearize(ctx, func(m *Manager) { check = *m.live(lock, token) })
	return check, err
}

func checkable(lock string, token fence.Token) error {
	if err := name("name", lock); err != nil {
		return err
	}
	if token == 0 {
		return &InvalidError{Field: "token", Msg: "must be the token of a grant, which is never 0"}
	}
	return nil
}

func (m *Manager) live(lock string, token fence.Token) *TokenCheck {
	check := &TokenCheck{}
	m.store.Read(func(s *machine.Machine) {
		check.Current, check.Floor, check.Live, check.Last = s.Live(lock, token)
	})
	return check
}

// Watch follows the locks whose names begin with prefix, from revision from
// on; 0 means from now on. Any node serves it. Errors: *RangeError.
func (m *Manager) Watch(prefix string, from uint64) (*Watcher, error) {
	return m.store.Watch(prefix, from)
}

// Declare makes a lock exist without a holder. Errors: *Refusal.
func (m *Manager) Declare(ctx context.Context, lock string) error {
	return m.named(ctx, lock, &machine.Declare{Name: lock})
}

// Undeclare forgets a declared lock; its holds are lost. Errors: *Refusal.
func (m *Manager) Undeclare(ctx context.Context, lock string) error {
	return m.named(ctx, lock, &machine.Undeclare{Name: lock})
}

// ReleaseClock releases a declared lock by its clock. Errors: *Refusal.
func (m *Manager) ReleaseClock(ctx context.Context, lock string, clock uint64) error {
	return m.named(ctx, lock, &machine.ReleaseClock{Name: lock, Clock: clock})
}

func (m *Manager) named(ctx context.Context, lock string, cmd machine.Command) error {
	if err := name("key", lock); err != nil {
		return err
	}
	_, err := m.do(ctx, cmd)
	return err
}
