// Package machine is the pure state machine of distlock: leases, locks,
// queues, grants and the wait-for graph. It has no clock, no goroutine, no
// I/O and no randomness: the same batches give the same state, byte for byte.
//
// A Machine belongs to one goroutine. Copy gives another goroutine a view, at a
// cost that does not depend on its size: the tables are copy-on-write, and a
// record is replaced, never changed, once a view may have it.
//
// It is no API, as package lease is none.
package machine

import (
	"sort"
	"unique"

	"github.com/tidwall/btree"

	"github.com/distlock/distlock/fence"
)

// Machine is the replicated state. Apply is its only way to change.
type Machine struct {
	state

	// Only to look up in, and so not ordered, nor in a View.
	tokens   map[fence.Token]*acquisition // granted ones
	requests map[RequestID]LeaseID        // live leases by the request that made them

	// Of the batch being applied.
	stamp  int64
	events []Event
	listed []HeldLock // of the events, which share its memory
	dirty  []string   // locks to look at again once the command is done
}

// View is what a Machine was when Copy made it: to be listed and snapshotted
// by anybody, while the Machine goes on.
type View struct{ state }

// state is what of a Machine can be read, with the methods that do. The tables
// are copy-on-write. Keys stand beside the pointers to records, so that a
// search touches no record on its way. What most leases and locks have once is
// in their record: an own lease's acquisition, a lock's sole holder.
type state struct {
	level    Level
	minted   uint64 // highest token minted
	leaseIDs uint64 // highest lease id minted
	revision uint64 // of the last event
	places   uint64 // highest place in a queue given out

	waits  int // acquisitions that wait
	grants int // acquisitions that are granted
	holds  int // locks that they hold, each counted once for each holder

	leases  *btree.Map[LeaseID, *lease]
	acqs    *btree.BTreeG[under]          // under leases of clients, by lease, request
	locks   *btree.Map[string, *lock]     // by name
	holders *btree.BTreeG[place]          // of locks with several, by lock name, token
	queues  *btree.BTreeG[place]          // by lock name, place
	actors  *btree.BTreeG[place]          // acquisitions by actor, place
	ended   *btree.BTreeG[span]           // sequence numbers, by lease
	delays  *btree.BTreeG[delayOf]        // lock-delays by lock name, id
	marks   *btree.Map[LeaseID, Duration] // what was left of leases, see Mark
	memory  memory
}

// lease is the record of a live lease: of its own, made with an acquisition
// and ended with it, or of a client's session.
type lease struct {
	id      LeaseID
	terms   unique.Handle[leaseTerms]
	since   int64       // stamp of its grant
	session *session    // nil for an own lease
	acq     acquisition // of an own lease
}

// leaseTerms are what many leases have in common.
type leaseTerms struct {
	owner string
	ttl   Duration
}

func leaseTermsOf(owner string, ttl Duration) unique.Handle[leaseTerms] {
	return unique.Make(leaseTerms{owner, ttl})
}

func (l *lease) owner() string { return l.terms.Value().owner }
func (l *lease) ttl() Duration { return l.terms.Value().ttl }
func (l *lease) own() bool     { return l.session == nil }

// request made the lease; 0 for none.
func (l *lease) request() RequestID {
	if l.own() {
		return l.acq.request
	}
	return l.session.request
}

// session is what a client's lease has. It is replaced, never changed.
type session struct {
	request  RequestID // made it
	metadata []Meta
	after    fence.Token // highest token minted before the lease was made

	// What it remembers of its requests (RIFL).
	lowest RequestID // sequence numbers below it are refused
	spans  int32     // in the table of those at or above it that have ended

	// Holds lost under the live lease, oldest first; how many were left out,
	// and the highest token of those.
	lost      []Lost
	dropped   uint64
	droppedTo fence.Token
}

const (
	maxOutstanding = 1 << 16 // sequence numbers above a lease's lowest open one, at the first level
	maxLost        = 64      // lost holds remembered per lease
)

// acquisition is one request for locks, waiting (token 0) or granted. It is
// replaced by a new record at its grant.
type acquisition struct {
	lease   LeaseID
	request RequestID
	place   uint64 // in its queues; order of arrival, store-wide
	token   fence.Token
	since   int64 // stamp of when it joined its queues; of the grant once there is one
	*terms        // never nil; replaced, never changed
	name    [1]string
}

// names are the locks asked for, in order. Nobody may change them.
func (a *acquisition) names() []string {
	if a.several != nil {
		return a.several
	}
	return a.name[:]
}

func (a *acquisition) setNames(names []string) {
	if len(names) == 1 {
		a.name[0] = names[0]
		return
	}
	own := *a.terms
	own.several = names
	a.terms = &own
}

// terms are those of an acquisition. Most have plain ones and share them.
type terms struct {
	mode     Mode
	limit    uint32
	delay    Duration
	actor    string
	declared bool // every lock had to be
	metadata []Meta
	several  []string      // the locks, when there are more than one
	floors   []fence.Token // by name, when they differ from token
	clocks   []uint64      // by name, when a lock is declared
}

var plain = [...]*terms{Exclusive: {mode: Exclusive}, Shared: {mode: Shared}}

func termsOf(mode Mode, limit uint32, delay Duration, actor string, metadata []Meta, declared bool) *terms {
	if limit == 0 && delay == 0 && actor == "" && len(metadata) == 0 && !declared {
		return plain[mode]
	}
	return &terms{mode: mode, limit: limit, delay: delay, actor: actor, metadata: metadata, declared: declared}
}

// lock is the record of a lock that is held, waited for, delayed or declared.
// Its name is its key in the table.
type lock struct {
	sole    *acquisition // the holder, while holders is 1
	*traits              // never nil; replaced, never changed
	holders int32
	waiters int32
}

// traits are what most locks do not have: they share noTraits.
type traits struct {
	shared   int32  // holders and waiters in shared mode: while > 0 limit is the lock's
	limit    uint32 // meaningful while shared > 0
	declared bool
	delays   int32       // in the table
	clock    uint64      // of a declared lock
	expires  int64       // of a declared lock's last grant
	last     fence.Token // granted on it, unless that is the sole holder's
}

var noTraits = &traits{}

// change gives the lock, which is the caller's to change, other traits.
func (l *lock) change(fn func(*traits)) {
	own := *l.traits
	fn(&own)
	l.traits = &own
}

// share counts n holders or waiters more in shared mode, who agree on a limit.
func (l *lock) share(n int32, limit uint32) {
	l.change(func(t *traits) { t.shared, t.limit = t.shared+n, limit })
}

func (l *lock) setClock(clock uint64, expires int64) {
	l.change(func(t *traits) { t.clock, t.expires = clock, expires })
}

func (l *lock) addDelays(n int32) { l.change(func(t *traits) { t.delays += n }) }

// last is the last token granted on the lock, as far as is remembered.
func (l *lock) last() fence.Token {
	if l.sole != nil {
		return max(l.sole.token, l.traits.last)
	}
	return l.traits.last
}

func (l *lock) setLast(last fence.Token) {
	if last != l.last() {
		l.change(func(t *traits) { t.last = last })
	}
}

// mode is the mode that the holders share; there must be at least one.
func (l *lock) mode() Mode {
	if l.sole != nil {
		return l.sole.mode
	}
	return Shared // as several hold it
}

// place is an acquisition's entry in an ordered table: of a lock's holders by
// token, of its queue or of an actor's by place.
type place struct {
	key string
	n   uint64
	acq *acquisition
}

// delayOf is a lock-delay's entry in the table.
type delayOf struct {
	name string
	Delay
}

func lessDelay(a, b delayOf) bool {
	if a.name != b.name {
		return a.name < b.name
	}
	return a.ID < b.ID
}

// under is an acquisition's entry in the table of all.
type under struct {
	lease   LeaseID
	request RequestID
	acq     *acquisition
}

func table[T any](less func(a, b T) bool) *btree.BTreeG[T] {
	return btree.NewBTreeGOptions(less, btree.Options{NoLocks: true})
}

func lessPlace(a, b place) bool {
	if a.key != b.key {
		return a.key < b.key
	}
	return a.n < b.n
}

func lessUnder(a, b under) bool {
	if a.lease != b.lease {
		return a.lease < b.lease
	}
	return a.request < b.request
}

// New returns an empty machine at the newest level, whose first token and first
// lease id are the successor of base.
func New(base uint64) *Machine { return NewAt(base, NewestLevel) }

// NewAt is New at a level.
func NewAt(base uint64, level Level) *Machine {
	return &Machine{
		state: state{
			level: level, minted: base, leaseIDs: base,
			leases:  &btree.Map[LeaseID, *lease]{},
			acqs:    table(lessUnder),
			locks:   &btree.Map[string, *lock]{},
			holders: table(lessPlace),
			queues:  table(lessPlace),
			actors:  table(lessPlace),
			ended:   newSpans(),
			delays:  table(lessDelay),
			marks:   &btree.Map[LeaseID, Duration]{},
			memory:  newMemory(),
		},
		tokens:   make(map[fence.Token]*acquisition),
		requests: make(map[RequestID]LeaseID),
	}
}

// Copy returns a view at a cost that does not depend on the size.
func (m *Machine) Copy() *View {
	v := &View{m.state}
	v.leases, v.acqs, v.locks = m.leases.IsoCopy(), m.acqs.IsoCopy(), m.locks.IsoCopy()
	v.holders, v.queues, v.actors = m.holders.IsoCopy(), m.queues.IsoCopy(), m.actors.IsoCopy()
	v.ended, v.delays, v.marks = m.ended.IsoCopy(), m.delays.IsoCopy(), m.marks.IsoCopy()
	v.memory = m.memory.view()
	return v
}

// Apply executes a batch. It cannot fail: refusals are results. Only the
// owning goroutine may call it.
func (m *Machine) Apply(b Batch) Outcome {
	// Most commands are an acquisition or its release, of two events each.
	m.stamp, m.events = b.Stamp, make([]Event, 0, 2*len(b.Commands))
	m.listed = make([]HeldLock, 0, len(b.Commands))
	results := make([]Result, len(b.Commands))
	for i, c := range b.Commands {
		results[i] = m.apply(c, b.Term)
	}
	out := Outcome{Results: results, Events: m.events, Counts: m.Counts(), Term: b.Term}
	if len(out.Events) == 0 {
		out.Events = nil
	}
	m.events, m.listed = nil, nil
	return out
}

func (m *Machine) apply(c Command, term uint64) Result {
	switch c := c.(type) {
	case *GrantLease:
		return m.grantLease(c)
	case *RevokeLease:
		return m.revokeLease(c)
	case *ExpireLeases:
		return m.expireLeases(c, term)
	case *Mark:
		return m.noteMarks(c, term)
	case *Clear:
		return m.clearMarks(c)
	case *Acquire:
		return m.acquire(c)
	case *Abandon:
		return m.abandon(c)
	case *AbandonAll:
		return m.abandonAll(c)
	case *EndWait:
		return m.endWait(c)
	case *Release:
		return m.release(c)
	case *ForceRelease:
		return m.forceRelease(c)
	case *EndDelay:
		return m.endDelay(c)
	case *Declare:
		return m.declare(c)
	case *Undeclare:
		return m.undeclare(c)
	case *ReleaseClock:
		return m.releaseClock(c)
	case *Forget:
		m.memory.forget(c.Through)
		return Result{}
	}
	// The decoder lets no other command through, and the set is closed.
	panic("machine: a command outside the closed set")
}

// emit reports an event under the next revision and returns that revision.
func (m *Machine) emit(e Event) uint64 {
	m.revision++
	e.Revision, e.Stamp = m.revision, m.stamp
	m.events = append(m.events, e)
	return m.revision
}

func refuse(r Refusal) Result { return Result{Refusal: &r} }

func (m *state) lease(id LeaseID) *lease {
	l, _ := m.leases.Get(id)
	return l
}

// acquisition returns what a lease has under a request, or nil.
func (m *state) acquisition(id LeaseID, req RequestID) *acquisition {
	if l := m.lease(id); l != nil && l.own() {
		if l.acq.request == req {
			return &l.acq
		}
		return nil
	}
	u, _ := m.acqs.Get(under{lease: id, request: req})
	return u.acq
}

// enter makes an acquisition the one that its lease has under its request, and
// its actor at its place. An own lease, whose record it is in, is entered with
// it.
func (m *Machine) enter(l *lease, a *acquisition) {
	if a.actor != "" {
		m.actors.Set(place{a.actor, a.place, a})
	}
	if l.own() {
		m.leases.Set(l.id, l)
		return
	}
	m.acqs.Set(under{a.lease, a.request, a})
}

// remove is the reverse of enter. An own lease must be dropped, too.
func (m *Machine) remove(l *lease, a *acquisition) {
	if a.actor != "" {
		m.actors.Delete(place{key: a.actor, n: a.place})
	}
	if !l.own() {
		m.acqs.Delete(under{lease: a.lease, request: a.request})
	}
}

// eachOf calls fn for a lease's acquisitions in order of request, until it
// returns false.
func (m *state) eachOf(l *lease, fn func(*acquisition) bool) {
	if l.own() {
		fn(&l.acq)
		return
	}
	m.acqs.Ascend(under{lease: l.id}, func(u under) bool { return u.lease == l.id && fn(u.acq) })
}

// ofLease returns the lease's acquisitions in order of request.
func (m *state) ofLease(l *lease) (list []*acquisition) {
	m.eachOf(l, func(a *acquisition) bool {
		list = append(list, a)
		return true
	})
	return list
}

// eachHolder calls fn for a lock's holders in order of token, until it returns
// false.
func (m *state) eachHolder(name string, k *lock, fn func(*acquisition) bool) {
	switch {
	case k == nil || k.holders == 0:
	case k.sole != nil:
		fn(k.sole)
	default:
		m.holders.Ascend(place{key: name}, func(p place) bool { return p.key == name && fn(p.acq) })
	}
}

// addHolder takes a lock that is the caller's to change, and a new grant.
func (m *Machine) addHolder(name string, k *lock, a *acquisition) {
	if k.sole != nil {
		m.holders.Set(place{name, uint64(k.sole.token), k.sole})
		k.sole = nil
	}
	if k.holders == 0 {
		k.sole = a
	} else {
		m.holders.Set(place{name, uint64(a.token), a})
	}
	k.setLast(a.token)
	k.holders++
	m.holds++
}

// removeHolder is the reverse of addHolder.
func (m *Machine) removeHolder(name string, k *lock, a *acquisition) {
	k.holders--
	m.holds--
	if k.sole != nil {
		last := k.last()
		k.sole = nil
		k.setLast(last)
		return
	}
	m.holders.Delete(place{key: name, n: uint64(a.token)})
	if k.holders == 1 {
		m.eachHolder(name, k, func(last *acquisition) bool {
			k.sole = last
			return false
		})
		m.holders.Delete(place{key: name, n: uint64(k.sole.token)})
	}
}

// holder returns the hold with a token on a lock, or nil.
func (m *state) holder(name string, token fence.Token) *acquisition {
	k := m.lock(name)
	switch {
	case k == nil:
		return nil
	case k.sole != nil:
		if k.sole.token == token {
			return k.sole
		}
		return nil
	}
	p, _ := m.holders.Get(place{key: name, n: uint64(token)})
	return p.acq
}

// hold returns the live hold that has a token, on whatever locks, or nil.
func (m *Machine) hold(token fence.Token) *acquisition { return m.tokens[token] }

// byToken sorts acquisitions by token, then place: the order of their events.
func byToken(list []*acquisition) {
	sort.Slice(list, func(i, j int) bool {
		if list[i].token != list[j].token {
			return list[i].token < list[j].token
		}
		return list[i].place < list[j].place
	})
}

// editLock returns a copy of the lock to change, or a new one, and puts it in
// the table. The copy belongs to the caller until the next Copy.
func (m *Machine) editLock(name string) *lock {
	old, ok := m.locks.Get(name)
	fresh := &lock{traits: noTraits}
	if ok {
		*fresh = *old
	} else {
		fresh.setLast(m.memory.last(name))
	}
	m.locks.Set(name, fresh)
	return fresh
}

func (m *state) lock(name string) *lock {
	l, _ := m.locks.Get(name)
	return l
}

// onlyHeldOnce reports whether nothing but its one hold keeps the lock in
// existence.
func (l *lock) onlyHeldOnce() bool {
	return l.holders == 1 && l.waiters == 0 && l.delays == 0 && !l.declared
}

// dropIfIdle forgets a lock that nothing keeps in existence.
func (m *Machine) dropIfIdle(name string, l *lock) {
	if l.holders == 0 && l.waiters == 0 && l.delays == 0 && !l.declared {
		m.locks.Delete(name)
	}
}
