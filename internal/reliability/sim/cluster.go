package sim

import (
	"bytes"
	"context"
	"fmt"
	"hash/fnv"
	"math/rand/v2"
	"reflect"
	"sync"
	"sync/atomic"
	"time"

	"github.com/distlock/distlock/fence"
	"github.com/distlock/distlock/internal/reliability/check"
	"github.com/distlock/distlock/lease"
	"github.com/distlock/distlock/lease/machine"
)

const (
	electionLeast = 150 * time.Millisecond
	electionMost  = 600 * time.Millisecond
	slowDisk      = 150 * time.Millisecond
)

// cluster is the consensus as an omniscient observer sees it: one sequence of
// committed entries, one leader at most in a term. What nodes know of it is
// late. Only the scheduler's goroutine touches it.
type cluster struct {
	w       *World
	nodes   []*node
	entries []entry // committed; the first has index 1
	term    uint64
	leader  *node
	rng     *rand.Rand
	seen    uint64 // entries whose events are in the history
	healing bool

	guard     fence.Memory      // at what the locks guard
	leftovers []check.Violation // what no event shows; under the world's mutex
}

type entry struct {
	term    uint64
	data    []byte
	outcome machine.Outcome
}

// node is a replica: what it has applied is on its disk.
type node struct {
	w     *World
	c     *cluster
	id    int
	clock *clock
	rng   *rand.Rand

	up, paused, cut bool
	life            atomic.Int64 // rises with every start
	deferred        []func() bool
	slow            bool // its disk

	// Of the present life.
	store   *lease.Store
	manager *lease.Manager
	log     *log
	stop    context.CancelFunc
	ended   chan struct{}
	applied uint64
	face    *face // to real clients; under their mutex

	snapshot      []byte
	snapshotIndex uint64
}

func newCluster(w *World) *cluster { return &cluster{w: w, rng: w.rng(2)} }

// begin starts n nodes.
func (c *cluster) begin(n int, rate func() float64) {
	for i := range n {
		x := &node{w: c.w, c: c, id: i, rng: c.w.rng(3, uint64(i))}
		x.clock = newClock(c.w, x, rate())
		c.nodes = append(c.nodes, x)
		x.start()
	}
	c.elect(c.nodes[0])
}

// after is World.after for what happens at the node: not once it has crashed,
// and later while it is paused.
func (n *node) after(d time.Duration, key uint64, fn func() bool) {
	life := n.life.Load()
	var run func() bool
	run = func() bool {
		switch {
		case n.life.Load() != life || !n.up:
			return false
		case n.paused:
			n.deferred = append(n.deferred, run)
			return false
		}
		return fn()
	}
	n.w.after(d, key, run)
}

func (n *node) start() {
	n.w.note(n.id, "starts")
	n.life.Add(1)
	n.up, n.paused = true, false
	n.store, n.applied = lease.NewStore(0), 0
	durable := n.log.durable()
	if n.snapshot != nil && n.snapshotIndex <= durable && n.rng.IntN(4) > 0 {
		m, err := machine.Restore(bytes.NewReader(n.snapshot).Read)
		if err != nil {
			panic(fmt.Sprintf("seed %d: a snapshot cannot be read: %v", n.w.seed, err))
		}
		n.store.Restore(m)
		n.applied = n.snapshotIndex
	}
	n.catchUp(durable)
	n.log = &log{n: n, leadership: make(chan lease.Leadership, 1024)}
	n.log.applied = n.applied
	manager, err := lease.New(lease.Config{Clock: n.clock, Log: n.log, Store: n.store, Overlap: 1 + n.rng.IntN(4)})
	if err != nil {
		panic(err)
	}
	n.manager = manager
	ctx, cancel := context.WithCancel(context.Background())
	n.stop, n.ended = cancel, make(chan struct{})
	go func(ended chan struct{}) {
		manager.Run(ctx)
		close(ended)
	}(n.ended)
	if n.w.live != nil {
		n.w.live.serve(n)
	}
}

// crash loses all that is not on the disk.
func (n *node) crash() {
	if !n.up {
		return
	}
	n.up, n.paused, n.deferred = false, false, nil
	n.life.Add(1)
	n.stop()
	if n.w.live != nil {
		n.w.live.gone(n)
	}
	n.w.note(n.id, "is gone")
	if n.c.leader == n {
		n.c.settle(n)
		n.c.leader = nil
	}
}

// catchUp applies committed entries up to an index.
func (n *node) catchUp(index uint64) {
	for ; n.applied < min(index, uint64(len(n.c.entries))); n.applied++ {
		n.apply(&n.c.entries[n.applied], n.applied+1)
	}
	if n.log != nil {
		n.log.applied = n.applied
	}
}

func (n *node) apply(e *entry, index uint64) machine.Outcome {
	batch, err := machine.DecodeBatch(e.data)
	if err != nil {
		panic(fmt.Sprintf("seed %d: an entry cannot be read: %v", n.w.seed, err))
	}
	batch.Term = e.term
	out := n.store.Apply(batch)
	hash := fnv.New64a()
	var v *machine.View
	n.store.Read(func(m *machine.Machine) {
		fmt.Fprint(hash, m.Revision(), m.LastToken(), m.Counts())
		if index%16 == 0 {
			v = m.Copy()
		}
	})
	if v != nil {
		v.Snapshot(func(chunk []byte) error { hash.Write(chunk); return nil })
	}
	if index > n.c.seen {
		n.c.seen = index
		e.outcome = out
		n.c.publish(out)
	} else if !reflect.DeepEqual(e.outcome, out) {
		hash.Write([]byte("another outcome"))
	}
	n.w.record(check.Event{Kind: check.Applied, Who: n.id, Index: index, Hash: hash.Sum64()})
	return out
}

// publish puts what an entry did into the history, once.
func (c *cluster) publish(out machine.Outcome) {
	for _, e := range out.Events {
		x := check.Event{Request: uint64(e.Request), Lease: uint64(e.Lease), Token: uint64(e.Token), TTL: time.Duration(e.TTL), Shared: e.Mode == machine.Shared}
		if !e.Own { // sequence numbers are of one lease
			x.Request |= uint64(e.Lease) << 40
		}
		for _, k := range e.Locks {
			x.Locks = append(x.Locks, k.Name)
			x.Floors = append(x.Floors, uint64(k.Floor))
		}
		switch e.Cause {
		case 0:
		case machine.EndReleased:
			x.Cause = check.Cleanly
		case machine.EndExpired:
			x.Cause = check.Expired
		default:
			x.Cause = check.ByOthers
		}
		switch e.Kind {
		case machine.EventLeaseGranted:
			x.Kind = check.LeaseMade
		case machine.EventLeaseEnded:
			x.Kind = check.LeaseEnded
		case machine.EventQueued:
			x.Kind = check.Queued
		case machine.EventGranted:
			x.Kind = check.Granted
			if e.Own {
				c.w.record(check.Event{Kind: check.Touched, Lease: uint64(e.Lease)})
			}
		case machine.EventHoldEnded:
			x.Kind = check.HoldEnded
		case machine.EventAbandoned:
			x.Kind = check.Left
		default:
			continue
		}
		c.w.record(x)
	}
}

// reaches tells whether a majority hears the node.
func (c *cluster) reaches(n *node) bool {
	if len(c.nodes) == 1 {
		return true
	}
	if n.cut {
		return false
	}
	count := 0
	for _, o := range c.nodes {
		if o.up && !o.paused && !o.cut {
			count++
		}
	}
	return count > len(c.nodes)/2
}

// settle decides the fate of what a deposed or dead leader had in flight: a
// prefix of it reached those who elected the next.
func (c *cluster) settle(old *node) {
	for _, p := range old.log.take() {
		if p.term == c.term && c.rng.IntN(2) == 0 {
			c.commit(p.term, p.data)
		} else {
			p.lost = true
		}
		if !p.lost {
			continue
		}
		break
	}
}

func (c *cluster) commit(term uint64, data []byte) {
	c.entries = append(c.entries, entry{term: term, data: data})
}

// elect makes a node the leader of the next term.
func (c *cluster) elect(n *node) {
	old := c.leader
	if old != nil {
		c.settle(old)
	}
	c.term++
	c.leader = n
	term := c.term
	c.w.note(n.id, "elected in term %d", term)
	c.w.record(check.Event{Kind: check.Disturbed, Who: n.id}) // what the last leader proposed may count now
	n.catchUp(uint64(len(c.entries)))
	if old == n && c.rng.IntN(2) == 0 {
		n.log.lose("") // otherwise the loss is left out
	}
	if old != nil && old != n && old.up {
		old.learn(time.Duration(c.rng.IntN(400))*time.Millisecond, term)
	}
	for _, o := range c.nodes {
		if o != n && o != old {
			o.learn(time.Duration(c.rng.IntN(50))*time.Millisecond, term)
		}
	}
	n.after(time.Duration(1+c.rng.IntN(20))*time.Millisecond, 2<<56|term, func() bool {
		if c.leader != n || c.term != term {
			return false
		}
		n.log.lead(term)
		c.w.record(check.Event{Kind: check.Disturbed, Who: n.id})
		return true
	})
}

// learn tells a node of a newer term, once it can hear of it.
func (n *node) learn(d time.Duration, term uint64) {
	n.after(d, 3<<56|uint64(n.id)<<48|term, func() bool {
		if n.cut {
			n.learn(20*time.Millisecond, term)
			return false
		}
		if n.c.term != term {
			return false // there is newer news on its way
		}
		hint := ""
		if n.c.leader != nil {
			hint = n.c.leader.address()
		}
		n.log.lose(hint)
		n.catchUp(uint64(len(n.c.entries)))
		return true
	})
}

// replicate tells the others of what has been committed.
func (c *cluster) replicate() {
	index := uint64(len(c.entries))
	for _, o := range c.nodes {
		if o == c.leader {
			continue
		}
		d := time.Duration(c.rng.IntN(int(5 * time.Millisecond)))
		if c.rng.IntN(10) == 0 {
			d *= 100
		}
		o.after(d, 4<<56|uint64(o.id)<<48|index, func() bool {
			if !o.cut && !o.log.leads() {
				o.catchUp(index)
			}
			return false
		})
	}
}

// watch elects another leader when the present one has been out of reach for
// an election timeout.
func (c *cluster) watch(missing time.Duration) {
	const every = 20 * time.Millisecond
	c.w.after(every, 5<<56, func() bool {
		if c.leader != nil && c.leader.up && !c.leader.paused && c.reaches(c.leader) {
			c.watch(0)
			return false
		}
		if missing < electionLeast+time.Duration(c.rng.Int64N(int64(electionMost-electionLeast))) {
			c.watch(missing + every)
			return false
		}
		var able []*node
		for _, n := range c.nodes {
			if n.up && !n.paused && !n.cut {
				able = append(able, n)
			}
		}
		if len(able) <= len(c.nodes)/2 {
			c.watch(missing)
			return false
		}
		c.elect(able[c.rng.IntN(len(able))])
		c.watch(0)
		return true
	})
}

// trouble schedules the faults of a run.
func (c *cluster) trouble(r *rand.Rand) {
	c.watch(0)
	at := time.Duration(0)
	for i := uint64(0); at < faultsFor-3*time.Second; i++ {
		at += time.Duration(r.IntN(1500)) * time.Millisecond
		kind, which := r.IntN(len(faults)), r.IntN(len(c.nodes))
		lasts := time.Duration(r.IntN(3000)) * time.Millisecond
		if r.IntN(2) == 0 {
			lasts /= 10
		}
		coin := r.IntN(2) == 0
		c.w.after(at, 6<<56|i, func() bool { return !c.healing && c.fault(kind, which, lasts, coin) })
	}
}

var faults = [...]string{
	"election", "election", "power cut", "power cut", "clean restart", "stopped", "stopped", "cut off", "cut off",
	"wall clock jumps", "snapshot", "slow disk", "hand-over",
}

func (c *cluster) fault(kind, which int, lasts time.Duration, coin bool) bool {
	n := c.nodes[which]
	if coin && c.leader != nil {
		n = c.leader
	}
	c.w.note(n.id, "%s for %v", faults[kind], lasts)
	later := func(fn func()) {
		c.w.after(lasts, 7<<56|uint64(n.id), func() bool { fn(); return true })
	}
	switch kind {
	case 0, 1: // leadership moves, or is won again
		if n.up && !n.paused && !n.cut && c.leader != nil {
			c.elect(n)
		}
	case 2, 3: // power cut
		if n.up {
			n.crash()
			later(n.restart)
		}
	case 4: // clean restart
		if n.up && !n.paused {
			n.manager.Drain()
			c.w.after(time.Duration(1+c.rng.IntN(30))*time.Millisecond, 8<<56|uint64(n.id), func() bool {
				n.crash()
				later(n.restart)
				return true
			})
		}
	case 5, 6: // a stop of the process
		n.pause()
		later(n.resume)
	case 7, 8: // a partition
		n.cut = true
		later(func() { n.join() })
	case 9: // the wall clock
		d := time.Hour
		if which == 0 {
			d = -time.Hour
		}
		n.clock.jump(d)
		return false
	case 10: // a snapshot
		n.snap()
		return false
	case 11: // the disk
		n.slow = true
		later(func() { n.slow = false })
		return false
	case 12: // a hand-over, which may not come off
		if c.leader != nil && c.leader.up && !c.leader.paused && c.leader.log.leads() {
			c.handOver(c.leader, c.term)
		}
		return false
	}
	return true
}

// handOver tells a leader's manager of a hand-over. A while later, whether that
// is ready or not, another leads, or the leadership goes on.
func (c *cluster) handOver(from *node, term uint64) {
	from.log.tell(lease.Leadership{Leader: true, Term: term, Leaving: make(chan struct{})})
	to := c.nodes[c.rng.IntN(len(c.nodes))]
	goesOn := c.rng.IntN(3) == 0
	c.w.after(time.Duration(1+c.rng.IntN(60))*time.Millisecond, 14<<56|term, func() bool {
		switch {
		case c.leader != from || c.term != term || !from.log.leads():
			return false
		case goesOn:
			from.log.tell(lease.Leadership{Leader: true, Term: term})
			return false
		case !to.up || to.paused || to.cut || to == from:
			return false
		}
		c.elect(to)
		return true
	})
}

func (n *node) restart() {
	if n.up {
		return
	}
	n.start()
	if len(n.c.nodes) == 1 {
		n.c.elect(n)
	} else if n.c.leader != nil {
		n.learn(time.Millisecond, n.c.term)
	}
}

func (n *node) pause() {
	n.paused = n.up
	if n.w.live != nil && n.up {
		n.w.live.freeze(n, true)
	}
}

func (n *node) resume() {
	if !n.paused {
		return
	}
	n.paused = false
	if n.w.live != nil {
		n.w.live.freeze(n, false)
	}
	n.w.note(n.id, "goes on")
	list := n.deferred
	n.deferred = nil
	for i, fn := range list {
		n.w.after(1, 9<<56|uint64(n.id)<<32|uint64(i), fn) // all at one time, in order
	}
	n.w.record(check.Event{Kind: check.Disturbed, Who: n.id})
}

func (n *node) join() {
	n.cut = false
	n.w.note(n.id, "reached again")
	n.w.record(check.Event{Kind: check.Disturbed, Who: n.id})
	if n.up && n.c.leader != nil && n.c.leader != n {
		n.learn(time.Millisecond, n.c.term)
	}
}

func (n *node) snap() {
	if !n.up {
		return
	}
	var b bytes.Buffer
	n.store.View().Snapshot(func(chunk []byte) error { b.Write(chunk); return nil })
	n.snapshot, n.snapshotIndex = b.Bytes(), n.applied
}

// heal ends all faults.
func (c *cluster) heal() {
	c.healing = true
	for _, n := range c.nodes {
		n.slow = false
		if n.cut {
			n.join()
		}
		n.resume()
		n.restart()
	}
}

// broken adds a promise broken that no event shows.
func (c *cluster) broken(invariant, format string, args ...any) {
	c.w.mu.Lock()
	defer c.w.mu.Unlock()
	c.leftovers = append(c.leftovers, check.Violation{Invariant: invariant, At: c.w.time(), Msg: fmt.Sprintf(format, args...)})
}

// stop ends the run: nothing may be left in the store by now.
func (c *cluster) stop() {
	for _, n := range c.nodes {
		if n == c.leader {
			if s := n.manager.Status(); s.Leases+s.Locks+s.Waiters+s.Holds > 0 {
				c.broken("I5", "left behind at the end: %+v", s.Counts)
			}
			c.leader.catchUp(uint64(len(c.entries)))
		}
	}
	c.end()
	if c.leader == nil {
		c.broken("I8", "nobody leads at the end")
	}
}

// end stops all nodes, once each has all there is.
func (c *cluster) end() {
	for _, n := range c.nodes {
		if n.up {
			n.catchUp(uint64(len(c.entries)))
			n.stop()
			<-n.ended
			if c.w.live != nil {
				c.w.live.gone(n)
			}
		}
	}
}

// log is a node's lease.Log.
type log struct {
	n          *node
	leadership chan lease.Leadership
	applied    uint64
	told       time.Duration // when the last change reaches the manager: in order

	mu      sync.Mutex
	term    uint64 // that the node believes to lead; 0 for none
	known   leadership
	pending []*proposal
	count   uint64
}

type proposal struct {
	term uint64
	data []byte
	done func(machine.Outcome, error)
	lost bool
	over bool
}

// durable is what a node finds on its disk.
func (l *log) durable() uint64 {
	if l == nil {
		return 0
	}
	return l.applied
}

// take empties what is in flight.
func (l *log) take() []*proposal {
	l.mu.Lock()
	defer l.mu.Unlock()
	return append([]*proposal(nil), l.pending...)
}

func (l *log) leads() bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.term != 0
}

func (l *log) lead(term uint64) {
	l.mu.Lock()
	l.term = term
	l.known.change("")
	l.mu.Unlock()
	l.fail()
	l.tell(lease.Leadership{Leader: true, Term: term})
}

// lose tells the manager of the loss, and what is in flight of its end, in
// either order: each is a step of its own.
func (l *log) lose(hint string) {
	l.mu.Lock()
	l.term = 0
	l.known.change(hint)
	l.mu.Unlock()
	if l.told > l.n.w.time() || l.n.rng.IntN(2) == 0 {
		l.fail()
		l.tell(lease.Leadership{Hint: hint})
		return
	}
	l.leadership <- lease.Leadership{Hint: hint}
	l.n.after(time.Microsecond, l.key(13), func() bool { l.fail(); return true })
}

// tell reports a leadership a little later, as a step of its own.
func (l *log) tell(state lease.Leadership) {
	l.told = max(l.told, l.n.w.time()) + time.Duration(1+l.n.rng.IntN(5000))*time.Microsecond
	l.n.after(l.told-l.n.w.time(), l.key(12), func() bool { l.leadership <- state; return true })
}

func (l *log) key(kind uint64) uint64 {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.count++
	return kind<<56 | uint64(l.n.id)<<48 | l.count
}

// fail ends what is in flight: nobody here knows what became of it.
func (l *log) fail() {
	l.mu.Lock()
	list := l.pending
	l.pending = nil
	l.mu.Unlock()
	for _, p := range list {
		if !p.over {
			p.over = true
			p.done(machine.Outcome{}, lease.ErrOutcomeUnknown)
		}
	}
}

// Propose implements lease.Log.
func (l *log) Propose(b machine.Batch, done func(machine.Outcome, error)) {
	defer l.n.w.enter()()
	l.mu.Lock()
	term := l.term
	p := &proposal{term: term, data: machine.AppendBatch(nil, &b), done: done}
	if term != 0 {
		l.pending = append(l.pending, p)
	}
	l.mu.Unlock()
	key := l.key(10)
	if term == 0 {
		l.n.after(time.Millisecond, key, func() bool { done(machine.Outcome{}, lease.ErrNotLeader); return true })
		return
	}
	took := time.Duration(100+l.n.rng.IntN(8000)) * time.Microsecond
	if l.n.slow {
		took = time.Duration(l.n.rng.Int64N(int64(slowDisk)))
	}
	l.n.after(took, key, func() bool { return l.arrive(p, key) })
}

// arrive commits a proposal that is on a quorum's disks, if its proposer still
// leads. The outcome of one that does not come to that is told later.
func (l *log) arrive(p *proposal, key uint64) bool {
	c, n := l.n.c, l.n
	switch {
	case p.over || p.lost || c.leader != n || c.term != p.term:
		return false
	case !c.reaches(n):
		n.after(10*time.Millisecond, key, func() bool {
			c.w.record(check.Event{Kind: check.Disturbed, Who: n.id})
			return l.arrive(p, key)
		})
		return false
	}
	l.mu.Lock()
	first := l.pending[0] == p
	if first {
		l.pending = append([]*proposal(nil), l.pending[1:]...)
	}
	l.mu.Unlock()
	if !first { // a log keeps the order
		n.after(100*time.Microsecond, key, func() bool { return l.arrive(p, key) })
		return false
	}
	c.commit(p.term, p.data)
	p.over = true
	e := &c.entries[len(c.entries)-1]
	n.applied++
	out := n.apply(e, n.applied)
	l.applied = n.applied
	c.replicate()
	p.done(out, nil)
	return true
}

// Confirm implements lease.Log: one round to the voters and back.
func (l *log) Confirm(term uint64, done func(error)) {
	defer l.n.w.enter()()
	n, c := l.n, l.n.c
	if len(c.nodes) == 1 {
		done(nil)
		return
	}
	key := l.key(11)
	there := time.Duration(100+n.rng.IntN(5000)) * time.Microsecond
	back := time.Duration(100+n.rng.IntN(5000)) * time.Microsecond
	n.w.after(there, key, func() bool { // at the voters
		sound := c.leader == n && c.term == term && c.reaches(n)
		n.after(back, key, func() bool {
			if sound {
				done(nil)
			} else {
				done(lease.ErrNotLeader)
			}
			return true
		})
		return false
	})
}

// Leadership implements lease.Log.
func (l *log) Leadership() <-chan lease.Leadership { return l.leadership }

// Err implements lease.Log.
func (l *log) Err() error { return nil }

// Close implements lease.Log.
func (l *log) Close() error { return nil }
