package lease

import (
	"context"
	"errors"
	"math/rand/v2"
	"slices"
	"time"

	"github.com/distlock/distlock/lease/machine"
)

// The level of the commands that older builds do not know.
const (
	levelAbandonAll = machine.Level(2)
	levelEndWait    = machine.Level(2)
	levelRelease    = machine.Level(2) // of one that names its request
	levelRandom     = machine.Level(2) // ids under a lease that are not sequence numbers
)

// Operation is one thing to ask of a manager: a pointer to one of the request
// types. The manager keeps nothing of it but text, so that it may be used again.
type Operation interface {
	// task checks the operation, and makes of it what the loop takes in.
	// Errors: *InvalidError.
	task(m *Manager) (task, error)
}

// task is an operation on its way through the loop.
type task interface {
	input
	from() *asker
}

// asker is who asks, and hears the answer.
type asker struct {
	sink   sink   // nil when nobody does: the manager asks itself
	tag    uint64 // names the operation there
	weight int64  // of a stream's bound
}

func (a *asker) from() *asker { return a }

// hear hands the answer over.
func (a *asker) hear(l *loop, r Reply) {
	if a.sink != nil {
		r.Tag, r.weight = a.tag, a.weight
		a.sink.hear(l, r)
	}
}

// sink hears the answers of operations: one caller's, or a stream's. Only the
// loop calls it.
type sink interface {
	// admit may refuse an acquisition before anything is tried.
	admit(c *call) error
	// parks and leaves tell that an acquisition waits, and does no more though
	// it is not answered yet.
	parks(c *call)
	leaves(c *call)
	// done tells that an acquisition is about to be answered.
	done(c *call)
	hear(l *loop, r Reply)
	// stream is the number of the Port, 0 for none.
	stream() uint32
}

// caller is a sink of one.
type caller chan Reply // buffered, one

func newCaller() caller { return make(caller, 1) }

func (caller) admit(*call) error       { return nil }
func (caller) parks(*call)             {}
func (caller) leaves(*call)            {}
func (caller) done(*call)              {}
func (caller) stream() uint32          { return 0 }
func (c caller) hear(_ *loop, r Reply) { c <- r }

// Op says which operation a Reply answers. Of one that was refused it may be 0.
type Op uint8

// The operations, by the names of their requests.
const (
	OpAcquire Op = 1 + iota
	OpRelease
	OpAbandon
	OpForceRelease
	OpGrantLease
	OpRevokeLease
	OpKeepAlive
	OpCheckToken
	OpLock
	OpLease
	OpDeclare
	OpUndeclare
	OpReleaseClock
)

// Reply answers one operation: Err, or the results that it has.
type Reply struct {
	Tag       uint64 // on a Port
	Op        Op
	Err       error
	Hold      *machine.Hold // of an Acquire
	TTL       time.Duration // of the lease of an Acquire or a GrantLease
	Lease     ID            // of a GrantLease
	KeptAlive *KeptAlive
	Check     *TokenCheck
	Lock      *LockInfo
	Revision  uint64 // of Lock
	Shown     *LeaseInfo

	weight int64
	asked  *call // of an Acquire on a Port that may have to be undone
	rest   *rest // what is to be added off the loop; nil for most
}

// rest is what takes long to find, and need not be found on the loop.
type rest struct {
	in      *machine.View
	lease   ID
	request RequestID       // whose wait was in vain, to be explained; 0 for the lease, which may have many holds
	left    []time.Duration // of leases, for the answer that lists them
}

// complete adds what is to be added off the loop.
func (r *Reply) complete(m *Manager) {
	if r.rest != nil && r.rest.in != nil {
		r.rest.complete(m, r.Err, r.Shown)
		r.rest = nil
	}
}

func (x *rest) complete(m *Manager, err error, shown *LeaseInfo) {
	var timeout *WaitTimeoutError
	switch {
	case x.request == 0:
		shown.Lease, _ = x.in.Lease(x.lease)
	case errors.As(err, &timeout):
		timeout.Explain = *m.withDelays(x.in.Explain(x.lease, x.request))
	}
}

// call is one command on its way through the loop. Its fields belong to the
// loop once it is put there.
type call struct {
	asker
	cmd machine.Command
	op  Op

	// Of an Acquire.
	attempt uint32
	key     waiter
	bound   time.Duration // of the wait; WaitForever for none
	since   time.Duration // when the loop took it in

	aside *aside // what few calls have; nil for most
	room  room   // that it has reserved

	onPort   bool // parked, by the port's count
	answered bool
	left     bool // its caller has stopped waiting
	undone   bool // and its undoing is on its way
	givingUp bool // its Abandon is in the log: a grant that comes first is undone
	granted  bool // it was answered with what it asked for
}

// aside is what few calls have, apart so that all others are small.
type aside struct {
	serial  uint64       // of an Acquire, among those that do not count attempts
	leaseID ID           // of an Acquire that waits
	wait    *timer       // while it is parked, if there is a bound
	explain *Explanation // once it was refused

	before *machine.View // what stood before an ended wait
	part   *several      // of which this is one
	ends   *call         // this ends a wait that has reached its bound
	undoes *call         // this undoes a call that has left
	renews *confirmation // this takes away the marks of leases that it renews
}

// few reads what is aside.
func (c *call) few() *aside {
	if c.aside == nil {
		return &noneAside
	}
	return c.aside
}

var noneAside aside // never changed

// with is few, to be changed.
func (c *call) with() *aside {
	if c.aside == nil {
		c.aside = &aside{}
	}
	return c.aside
}

// room is what a command may add to the tables.
type room struct{ leases, locks, waiters int32 }

func (r *room) add(o room) { r.leases += o.leases; r.locks += o.locks; r.waiters += o.waiters }
func (r *room) sub(o room) { r.leases -= o.leases; r.locks -= o.locks; r.waiters -= o.waiters }

// asked reports whether somebody waits for the answer.
func (c *call) asked() bool { return c.sink != nil || c.few().part != nil }

// acquires reports whether the call is an Acquire.
func (c *call) acquires() bool { return c.op == OpAcquire }

// named reports whether an Acquire has an id by which it may be repeated.
func (c *call) named() bool { return c.key.request < machine.AnonymousRequest }

// makesLease reports whether the command makes a lease.
func (c *call) makesLease() bool {
	return c.op == OpGrantLease || c.acquires() && c.key.lease == 0
}

// take admits a command, or refuses it before anything is tried.
func (c *call) take(l *loop) {
	err := l.refuses()
	if err == nil && l.draining {
		err = ErrStopping
	}
	if err == nil && c.op == OpAbandon && c.few().serial != 0 && l.waiting.newest[c.key] != c.few().serial {
		c.answer(l, machine.Result{}, nil) // a later call goes on with it
		return
	}
	if err == nil {
		err = l.crowds(c)
	}
	if err == nil && c.acquires() {
		err = c.sink.admit(c)
	}
	if err == nil {
		err = l.reserve(c)
	}
	if err != nil {
		c.answer(l, machine.Result{}, err)
		return
	}
	c.since = l.now()
	if c.acquires() {
		l.waiting.arrived(c)
	}
	l.enqueue(c)
}

// reserve holds a command against the server's bounds, and reserves what it
// may need until its result is known.
func (l *loop) reserve(c *call) error {
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
	if l.exceeded(need) != nil {
		// Close to a bound it matters what is there already.
		need = l.missing(c, need)
		if err := l.exceeded(need); err != nil {
			return err
		}
	}
	c.room = need
	l.reserved.add(need)
	return nil
}

// exceeded says which bound would be broken by granting need beside all that
// is under way; nil when none would.
func (l *loop) exceeded(need room) error {
	switch {
	case need.leases > 0 && l.counts.Leases+int(l.reserved.leases+need.leases) > l.bounds.MaxLeases:
		return &ExhaustedError{What: "leases", Max: l.bounds.MaxLeases}
	case need.locks > 0 && l.counts.Locks+int(l.reserved.locks+need.locks) > l.bounds.MaxLocks:
		return &ExhaustedError{What: "locks", Max: l.bounds.MaxLocks}
	case need.waiters > 0 && l.counts.Waiters+int(l.reserved.waiters+need.waiters) > l.bounds.MaxWaiters:
		return &ExhaustedError{What: "waiters", Max: l.bounds.MaxWaiters}
	}
	return nil
}

// missing leaves out of need what exists already: locks, and everything of a
// repeat.
func (l *loop) missing(c *call, need room) room {
	l.store.Read(func(s *machine.Machine) {
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

// errCanceled answers an Acquire whose caller has left.
var errCanceled error = context.Canceled

// answer tells whoever asked; later answers are not heard.
func (c *call) answer(l *loop, r machine.Result, err error) {
	if undone := c.few().undoes; undone != nil { // whatever became of the undoing
		undone.answer(l, machine.Result{}, errCanceled)
		return
	}
	if c.answered {
		return
	}
	c.answered, c.granted = true, err == nil
	if renews := c.few().renews; renews != nil {
		renews.answer(l, err)
		return
	}
	switch {
	case c.few().part != nil:
		c.aside.part.answer(l, c.op, err)
		return
	case c.sink == nil:
		return
	}
	reply := Reply{Op: c.op, Err: err}
	switch cmd := c.cmd.(type) {
	case *machine.Acquire:
		c.sink.done(c)
		if err != nil {
			l.refused(c)
			few := c.few()
			reply.Err = heldError(err, few.explain)
			if few.before != nil {
				reply.rest = &rest{in: few.before, lease: few.leaseID, request: c.key.request}
			}
			break
		}
		reply.Hold, reply.TTL = r.Hold, time.Duration(cmd.TTL)
		if cmd.Lease != 0 {
			reply.TTL = l.ttlOf(cmd.Lease)
		} else if t := l.leases[r.Hold.Lease]; t != nil {
			reply.TTL = t.span
		}
		if t := l.leases[r.Hold.Lease]; t != nil && c.sink.stream() != 0 {
			t.port = c.sink.stream()
		}
		if c.attempt == 0 {
			reply.asked = c
		}
	case *machine.GrantLease:
		reply.Lease, reply.TTL = r.Lease, time.Duration(cmd.TTL)
	}
	c.hear(l, reply)
}

// refused forgets a call that was the newest of its request.
func (l *loop) refused(c *call) {
	if serial := c.few().serial; serial != 0 && l.waiting.newest[c.key] == serial {
		l.waiting.over(c.key)
	}
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

// anonymous makes a request id for a caller that gave none.
func anonymous() RequestID { return RequestID(rand.Uint64()) | machine.AnonymousRequest }

func (r *AcquireRequest) task(m *Manager) (task, error) {
	if err := m.bounds.acquire(r); err != nil {
		return nil, err
	}
	made := &struct { // one piece of memory
		call
		cmd  machine.Acquire
		name [1]string
	}{}
	names := append(made.name[:0], r.Names...)
	slices.Sort(names)
	for i := 1; i < len(names); i++ {
		if names[i] == names[i-1] {
			return nil, &InvalidError{Field: "names", Msg: "names " + quoted(names[i]) + " twice; name each lock once"}
		}
	}
	request, lowest, attempt := r.Request, r.LowestOpen, r.Attempt
	if request == 0 || r.Lease != 0 && request >= machine.RandomRequest && m.store.Level() < levelRandom {
		request, lowest, attempt = anonymous(), 0, 0
	}
	made.cmd = machine.Acquire{
		Lease: r.Lease, Request: request, LowestOpen: lowest, Names: names, Mode: r.Mode, Limit: r.Limit,
		Wait: r.Wait != 0, LockDelay: machine.Duration(r.LockDelay), Actor: r.Actor,
		Metadata: sortedMetadata(r.Metadata), Declared: r.Declared,
	}
	if made.cmd.Mode == 0 {
		made.cmd.Mode = machine.Exclusive
	}
	if r.Lease == 0 {
		made.cmd.TTL, made.cmd.Owner = machine.Duration(r.TTL), r.Owner
	}
	c := &made.call
	c.cmd, c.op, c.key, c.bound, c.attempt = &made.cmd, OpAcquire, waiter{r.Lease, request}, r.Wait, attempt
	c.weight = int64(len(names) + len(made.cmd.Metadata))
	if r.Call != 0 {
		c.with().serial = r.Call
	}
	return c, nil
}

func (r *ReleaseRequest) task(m *Manager) (task, error) {
	if r.Token == 0 {
		return nil, &InvalidError{Field: "token", Msg: "must be the token of the grant, which is never 0"}
	}
	if r.Lease == 0 || r.Name != "" {
		if err := name("name", r.Name); err != nil {
			return nil, err
		}
	}
	made := &struct { // one piece of memory
		call
		cmd machine.Release
	}{cmd: machine.Release{Lease: r.Lease, Name: r.Name, Token: r.Token}}
	if r.Request != 0 && r.Lease != 0 && m.store.Level() >= levelRelease {
		made.cmd.Request = r.Request
	}
	made.call.cmd, made.call.op, made.call.weight = &made.cmd, OpRelease, 1
	return &made.call, nil
}

// command is the task of one command.
func command(op Op, cmd machine.Command) *call {
	return &call{asker: asker{weight: 1}, cmd: cmd, op: op}
}

const (
	maxAbandoned = 4096 // requests in one AbandonRequest
	abandonEach  = 256  // in one command
)

// several are commands of one operation, which is done when all are.
type several struct {
	asker
	calls []*call
	open  int   // not done yet
	err   error // of one that was not done
}

func (s *several) take(l *loop) {
	s.open = len(s.calls)
	for _, c := range s.calls {
		c.with().part = s
		c.take(l)
	}
}

func (s *several) answer(l *loop, op Op, err error) {
	if err != nil {
		s.err = err
	}
	if s.open--; s.open == 0 {
		s.hear(l, Reply{Op: op, Err: s.err})
	}
}

func (r *AbandonRequest) task(m *Manager) (task, error) {
	switch {
	case len(r.Requests) > maxAbandoned:
		return nil, &InvalidError{Field: "request_ids", Msg: "must be at most 4096"}
	case r.EndLease && r.Lease == 0:
		return nil, &InvalidError{Field: "lease_id", Msg: "must be the lease to end"}
	case len(r.Requests) == 0 && !r.EndLease:
		return nil, invalidRequest
	}
	for _, id := range r.Requests {
		if id == 0 || id >= machine.AnonymousRequest {
			return nil, invalidRequest
		}
	}
	var list []*call
	if m.store.Level() < levelAbandonAll || len(r.Requests) == 1 && !r.EndLease {
		for _, id := range r.Requests {
			list = append(list, command(OpAbandon, &machine.Abandon{Lease: r.Lease, Request: id}))
		}
		if r.EndLease {
			list = append(list, command(OpAbandon, &machine.RevokeLease{Lease: r.Lease}))
		}
	} else {
		for chunk := range slices.Chunk(r.Requests, abandonEach) {
			list = append(list, command(OpAbandon, &machine.AbandonAll{Lease: r.Lease, Requests: slices.Clone(chunk)}))
		}
		if r.EndLease {
			list = append(list, command(OpAbandon, &machine.AbandonAll{Lease: r.Lease, EndLease: true}))
		}
	}
	if len(list) == 1 {
		if c := list[0]; r.Call != 0 {
			c.key, c.with().serial = waiter{r.Lease, r.Requests[0]}, r.Call
		}
		return list[0], nil
	}
	return &several{asker: asker{weight: 1 + int64(len(r.Requests))/64}, calls: list}, nil
}

var invalidRequest = &InvalidError{Field: "request_id", Msg: "must be the request id of the acquisition, from 1 to 2^63-1"}

func (r *ForceReleaseRequest) task(*Manager) (task, error) {
	if err := errors.Join(name("name", r.Name), text("by", r.By)); err != nil {
		return nil, first(err)
	}
	return command(OpForceRelease, &machine.ForceRelease{Name: r.Name, Token: r.Token, By: r.By}), nil
}

func (r *GrantLeaseRequest) task(m *Manager) (task, error) {
	if err := errors.Join(
		m.bounds.ttl(r.TTL), text("owner", r.Owner), metadata(r.Metadata), requestID(r.Request),
	); err != nil {
		return nil, first(err)
	}
	return command(OpGrantLease, &machine.GrantLease{
		Request: r.Request, TTL: machine.Duration(r.TTL), Owner: r.Owner, Metadata: sortedMetadata(r.Metadata),
	}), nil
}

func (r *RevokeLeaseRequest) task(*Manager) (task, error) {
	if err := text("by", r.By); err != nil {
		return nil, err
	}
	return command(OpRevokeLease, &machine.RevokeLease{Lease: r.Lease, By: r.By}), nil
}

func (r *DeclareRequest) task(*Manager) (task, error) {
	return named(OpDeclare, r.Name, &machine.Declare{Name: r.Name})
}

func (r *UndeclareRequest) task(*Manager) (task, error) {
	return named(OpUndeclare, r.Name, &machine.Undeclare{Name: r.Name})
}

func (r *ReleaseClockRequest) task(*Manager) (task, error) {
	return named(OpReleaseClock, r.Name, &machine.ReleaseClock{Name: r.Name, Clock: r.Clock})
}

// named is the task of a command of the original's protocol.
func named(op Op, lock string, cmd machine.Command) (task, error) {
	if err := name("key", lock); err != nil {
		return nil, err
	}
	return command(op, cmd), nil
}

// confirming is the task of a read or renewal.
func confirming(op Op, weight int, then func(l *loop, r *Reply)) *confirmation {
	return &confirmation{asker: asker{weight: int64(weight)}, reply: Reply{Op: op}, then: then}
}

func (r *KeepAliveRequest) task(m *Manager) (task, error) {
	received := m.now()
	leases, requests := slices.Clone(r.Leases), slices.Clone(r.Requests)
	var c *confirmation
	c = confirming(OpKeepAlive, 1+(len(leases)+len(requests))/64, func(l *loop, r *Reply) {
		kept := &KeptAlive{}
		if len(leases) > 0 {
			kept.Leases = make([]KeepAlive, len(leases))
		}
		if len(requests) > 0 {
			kept.Requests = make([]KeepWaiting, len(requests))
		}
		stream := c.sink.stream()
		for i, id := range leases {
			kept.Leases[i] = l.renew(id, received)
			if t := l.leases[id]; t != nil && stream != 0 {
				t.port = stream
			}
		}
		for i, id := range requests {
			kept.Requests[i] = l.renewWaiting(id, received)
		}
		r.KeptAlive = kept
	})
	c.first = func(l *loop) bool { return l.clears(c, leases, requests, received) }
	return c, nil
}

func (r *CheckTokenRequest) task(*Manager) (task, error) {
	if err := name("name", r.Name); err != nil {
		return nil, err
	}
	if r.Token == 0 {
		return nil, &InvalidError{Field: "token", Msg: "must be the token of a grant, which is never 0"}
	}
	lock, token := r.Name, r.Token
	return confirming(OpCheckToken, 1, func(l *loop, r *Reply) {
		r.Check = &TokenCheck{}
		l.store.Read(func(s *machine.Machine) {
			r.Check.Current, r.Check.Floor, r.Check.Live, r.Check.Last = s.Live(lock, token)
		})
	}), nil
}

func (r *LockRequest) task(*Manager) (task, error) {
	if err := name("name", r.Name); err != nil {
		return nil, err
	}
	lock := r.Name
	return confirming(OpLock, 1, func(l *loop, r *Reply) {
		r.Lock = &LockInfo{}
		l.store.Read(func(s *machine.Machine) {
			r.Lock.Lock, _ = s.Lock(lock)
			r.Revision = s.Revision()
		})
		r.Lock.DelayRemaining = l.remaining(r.Lock.Delays)
	}), nil
}

func (r *LeaseRequest) task(*Manager) (task, error) {
	id := r.Lease
	return confirming(OpLease, 1, func(l *loop, r *Reply) {
		r.Shown = &LeaseInfo{Remaining: l.timeLeft(id)}
		view := l.store.View()
		if _, live := view.TTL(id); live {
			r.rest = &rest{in: view, lease: id}
			return
		}
		l.store.Read(func(s *machine.Machine) { r.Err = s.LeaseGone(id) })
	}), nil
}

// timesLeft asks how long leases live; it also makes certain that this node
// leads.
type timesLeft []ID

func (ids timesLeft) task(*Manager) (task, error) {
	return confirming(0, 1, func(l *loop, r *Reply) {
		r.rest = &rest{}
		for _, id := range ids {
			r.rest.left = append(r.rest.left, l.timeLeft(id))
		}
	}), nil
}
