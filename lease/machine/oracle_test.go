package machine

import (
	"bytes"
	"fmt"
	"math"
	"reflect"
	"slices"
	"sort"
	"strings"
	"testing"

	"pgregory.net/rapid"

	"github.com/distlock/distlock/fence"
)

// oracle is a second implementation of the machine, as plain as can be: lists
// and linear scans, no index, no order of settling. It shares nothing with the
// machine but the types of commands.
type oracle struct {
	level    Level
	leases   []*oLease
	acqs     []*oAcq // in order of arrival
	delays   map[string][]uint64
	declared map[string]*uint64 // clock
	ended    map[RequestID]bool // own requests that have ended
	gone     map[LeaseID]EndCause
	lost     map[fence.Token]EndCause
	released map[fence.Token]*oAcq
	mintedBy map[fence.Token]LeaseID
	marks    map[LeaseID]Duration
	short    map[uint64]Duration // delays that are marked
	max      fence.Token
}

type oLease struct {
	id     LeaseID
	own    bool
	req    RequestID
	lowest RequestID
	ended  map[RequestID]bool
	ttl    Duration
	losses uint64
}

type oAcq struct {
	lease  LeaseID
	c      *Acquire
	token  fence.Token
	floors []fence.Token
	clocks []uint64
}

func newOracle(level Level) *oracle {
	return &oracle{
		level:  level,
		delays: map[string][]uint64{}, declared: map[string]*uint64{}, ended: map[RequestID]bool{},
		gone: map[LeaseID]EndCause{}, lost: map[fence.Token]EndCause{},
		released: map[fence.Token]*oAcq{}, mintedBy: map[fence.Token]LeaseID{},
		marks: map[LeaseID]Duration{}, short: map[uint64]Duration{},
	}
}

func (o *oracle) lease(id LeaseID) *oLease {
	for _, l := range o.leases {
		if l.id == id {
			return l
		}
	}
	return nil
}

func (o *oracle) find(id LeaseID, req RequestID) *oAcq {
	for _, a := range o.acqs {
		if a.lease == id && a.c.Request == req {
			return a
		}
	}
	return nil
}

func (o *oracle) holding(token fence.Token, name string) *oAcq {
	for _, a := range o.acqs {
		if a.token == token && token != 0 && (name == "" || slices.Contains(a.c.Names, name)) {
			return a
		}
	}
	return nil
}

// conflicts lists what keeps a request from its locks: incompatible holders,
// everyone in front in a queue, delays.
func (o *oracle) blocked(c *Acquire, self *oAcq) bool {
	for _, name := range c.Names {
		holders := 0
		for _, a := range o.acqs {
			if a == self {
				break
			}
			if a.token == 0 && slices.Contains(a.c.Names, name) {
				return true // ahead in the queue
			}
		}
		for _, a := range o.acqs {
			if a.token == 0 || !slices.Contains(a.c.Names, name) {
				continue
			}
			if holders++; a.c.Mode == Exclusive || c.Mode == Exclusive {
				return true
			}
		}
		if c.Limit > 0 && holders >= int(c.Limit) || len(o.delays[name]) > 0 {
			return true
		}
	}
	return false
}

func (o *oracle) remove(a *oAcq) {
	o.acqs = slices.DeleteFunc(o.acqs, func(x *oAcq) bool { return x == a })
}

// end ends an acquisition without settling.
func (o *oracle) end(a *oAcq, cause EndCause) {
	o.remove(a)
	if a.token == 0 {
		return
	}
	if cause == EndReleased {
		o.released[a.token] = a
	} else {
		o.lost[a.token] = cause
		if a.c.LockDelay > 0 && cause != EndUndeclared {
			for _, name := range a.c.Names {
				o.delays[name] = append(o.delays[name], 0) // its id is learnt from the event
			}
		}
	}
}

func (o *oracle) endLease(l *oLease, cause EndCause) {
	for _, a := range slices.Clone(o.acqs) {
		if a.lease == l.id {
			o.end(a, cause)
		}
	}
	o.leases = slices.DeleteFunc(o.leases, func(x *oLease) bool { return x == l })
	o.gone[l.id] = cause
	delete(o.marks, l.id)
	if l.own {
		o.ended[l.req] = true
	}
}

// giveBack ends an acquisition, and its own lease, for the cause.
func (o *oracle) giveBack(a *oAcq, cause EndCause) {
	l := o.lease(a.lease)
	if l.own {
		o.endLease(l, cause)
		return
	}
	if cause != EndReleased {
		l.losses++
	}
	o.end(a, cause)
	l.ended[a.c.Request] = true
}

// answer is what the oracle expects of a command.
type answer struct {
	reason  Reason
	waiting bool
	granted bool
	lease   LeaseID // 0: a new one, or none
}

func (o *oracle) apply(c Command, term uint64, nextLease LeaseID) answer {
	switch c := c.(type) {
	case *GrantLease:
		o.leases = append(o.leases, &oLease{id: nextLease, ended: map[RequestID]bool{}, ttl: c.TTL})
		return answer{lease: nextLease}
	case *RevokeLease:
		if l := o.lease(c.Lease); l != nil {
			o.endLease(l, EndRevoked)
			return answer{lease: c.Lease}
		}
		if o.gone[c.Lease] == EndRevoked {
			return answer{lease: c.Lease}
		}
		return answer{reason: o.leaseGone(c.Lease)}
	case *ExpireLeases:
		if c.Term == term {
			for _, id := range c.Leases {
				if l := o.lease(id); l != nil {
					o.endLease(l, EndExpired)
				}
			}
		}
	case *Mark:
		if o.level < 3 {
			return answer{reason: ReasonInvalid}
		}
		for _, k := range c.Leases {
			if o.lease(k.Lease) != nil && c.Term == term {
				o.marks[k.Lease] = k.Left
			}
		}
		for _, k := range c.Delays {
			if slices.Contains(o.delays[k.Name], k.Delay) && c.Term == term {
				o.short[k.Delay] = k.Left
			}
		}
	case *Clear:
		if o.level < 3 {
			return answer{reason: ReasonInvalid}
		}
		for _, id := range c.Leases {
			delete(o.marks, id)
		}
	case *Acquire:
		return o.acquire(c, nextLease)
	case *Abandon:
		o.abandon(c)
	case *AbandonAll:
		if o.level < 2 {
			return answer{reason: ReasonInvalid}
		}
		for _, id := range c.Requests {
			o.abandon(&Abandon{Lease: c.Lease, Request: id})
		}
		if l := o.lease(c.Lease); l != nil && c.EndLease {
			o.endLease(l, EndReleased)
		}
	case *EndWait:
		if o.level < 2 {
			return answer{reason: ReasonInvalid}
		}
		return o.endWait(c)
	case *Release:
		return answer{reason: o.release(c)}
	case *ForceRelease:
		return answer{reason: o.force(c)}
	case *EndDelay:
		if i := slices.Index(o.delays[c.Name], c.Delay); i >= 0 {
			o.delays[c.Name] = slices.Delete(o.delays[c.Name], i, i+1)
		}
	case *Declare:
		if o.declared[c.Name] != nil {
			return answer{reason: ReasonLockDeclared}
		}
		o.declared[c.Name] = new(uint64)
	case *Undeclare:
		if o.declared[c.Name] == nil {
			return answer{reason: ReasonLockNotDeclared}
		}
		delete(o.declared, c.Name)
		o.breakAll(c.Name, 0, EndUndeclared)
	case *ReleaseClock:
		clock := o.declared[c.Name]
		if clock == nil {
			return answer{reason: ReasonLockNotDeclared}
		}
		if *clock != c.Clock {
			return answer{reason: ReasonClockDisagrees}
		}
		for _, a := range o.acqs {
			if i := slices.Index(a.c.Names, c.Name); a.token != 0 && i >= 0 && a.clocks[i] == c.Clock {
				o.giveBack(a, EndReleased)
				break
			}
		}
	}
	return answer{}
}

func (o *oracle) leaseGone(id LeaseID) Reason {
	if o.gone[id] != 0 {
		return ReasonLeaseEnded
	}
	return ReasonLeaseNotFound
}

func (o *oracle) acquire(c *Acquire, nextLease LeaseID) answer {
	var l *oLease
	id := c.Lease
	if id == 0 {
		for _, other := range o.leases {
			if other.own && other.req == c.Request {
				id = other.id
			}
		}
		if o.ended[c.Request] {
			return answer{reason: ReasonRequestEnded}
		}
	} else {
		if l = o.lease(id); l == nil {
			return answer{reason: o.leaseGone(id)}
		}
		if l.own {
			return answer{reason: ReasonInvalid}
		}
		random := c.Request >= RandomRequest && o.level >= 2
		if !random {
			l.lowest = max(l.lowest, c.LowestOpen)
		}
		if !random && c.Request < l.lowest || l.ended[c.Request] {
			return answer{reason: ReasonRequestEnded}
		}
		if o.level < 2 && c.Request > l.lowest+maxOutstanding {
			return answer{reason: ReasonInvalid}
		}
	}
	if a := o.find(id, c.Request); id != 0 && a != nil {
		same := *a.c // what may differ
		same.Wait, same.LowestOpen = c.Wait, c.LowestOpen
		if o.level < 2 {
			same.Declared = c.Declared
		}
		if c.Lease != 0 {
			same.TTL, same.Owner = c.TTL, c.Owner
		}
		if !reflect.DeepEqual(&same, c) {
			return answer{reason: ReasonRequestMismatch}
		}
		if c.Lease == 0 {
			delete(o.marks, id)
		}
		return answer{lease: id, waiting: a.token == 0, granted: a.token != 0}
	}
	no := func(r Reason) answer {
		if l != nil {
			l.ended[c.Request] = true
		} else {
			o.ended[c.Request] = true
		}
		return answer{reason: r}
	}
	for _, name := range c.Names {
		if c.Declared && o.declared[name] == nil {
			return no(ReasonLockNotDeclared)
		}
		for _, a := range o.acqs {
			if c.Mode == Shared && a.c.Mode == Shared && slices.Contains(a.c.Names, name) && a.c.Limit != c.Limit {
				return no(ReasonLimitDisagrees)
			}
		}
	}
	blocked := o.blocked(c, nil)
	if blocked && !c.Wait {
		return no(ReasonLockHeld)
	}
	if blocked && c.Actor != "" && o.reaches(c.Names, nil, c.Actor, map[*oAcq]bool{}) {
		return no(ReasonDeadlock)
	}
	if l == nil {
		l = &oLease{id: nextLease, own: true, req: c.Request, ended: map[RequestID]bool{}, ttl: c.TTL}
		o.leases = append(o.leases, l)
	}
	o.acqs = append(o.acqs, &oAcq{lease: l.id, c: c})
	return answer{lease: l.id, waiting: blocked, granted: !blocked}
}

// reaches reports whether whoever waits for names must wait for the actor.
func (o *oracle) reaches(names []string, self *oAcq, actor string, seen map[*oAcq]bool) bool {
	passed := false
	for _, a := range o.acqs {
		if passed = passed || a == self; passed && a.token == 0 {
			continue // behind, or itself
		}
		if !slices.ContainsFunc(a.c.Names, func(n string) bool { return slices.Contains(names, n) }) || a == self {
			continue
		}
		if a.c.Actor == actor {
			return true
		}
		if seen[a] {
			continue
		}
		seen[a] = true
		if a.token == 0 && o.reaches(a.c.Names, a, actor, seen) {
			return true
		}
		for _, w := range o.acqs {
			if a.c.Actor != "" && w.token == 0 && w.c.Actor == a.c.Actor && o.reaches(w.c.Names, w, actor, seen) {
				return true
			}
		}
	}
	return false
}

func (o *oracle) abandon(c *Abandon) {
	id := c.Lease
	if id == 0 {
		for _, l := range o.leases {
			if l.own && l.req == c.Request {
				id = l.id
			}
		}
		if id == 0 {
			o.ended[c.Request] = true
			return
		}
	}
	if a := o.find(id, c.Request); a != nil {
		o.giveBack(a, EndReleased)
	} else if l := o.lease(id); l != nil && !l.own {
		l.ended[c.Request] = true
	}
}

func (o *oracle) endWait(c *EndWait) answer {
	id := c.Lease
	for _, l := range o.leases {
		if id == 0 && l.own && l.req == c.Request {
			id = l.id
		}
	}
	a := o.find(id, c.Request)
	l := o.lease(c.Lease)
	switch {
	case id != 0 && a != nil && a.token != 0:
		return answer{lease: id, granted: true}
	case id != 0 && a != nil:
		o.giveBack(a, EndReleased)
		return answer{lease: id}
	case c.Lease == 0 && o.ended[c.Request]:
		return answer{reason: ReasonRequestEnded}
	case c.Lease == 0:
		return answer{reason: ReasonRequestNotFound}
	case l == nil:
		return answer{reason: o.leaseGone(c.Lease)}
	case !l.own && (l.ended[c.Request] || c.Request < l.lowest):
		return answer{reason: ReasonRequestEnded}
	}
	return answer{reason: ReasonRequestNotFound}
}

func (o *oracle) release(c *Release) Reason {
	if c.Request != 0 && (o.level < 2 || c.Lease == 0) {
		return ReasonInvalid
	}
	if a := o.holding(c.Token, c.Name); a != nil && (c.Lease == 0 || a.lease == c.Lease) && (c.Request == 0 || c.Request == a.c.Request) {
		if l := o.lease(a.lease); c.Lease == 0 && o.level >= 2 {
			l.losses++ // which matters of a client's lease
		}
		o.giveBack(a, EndReleased)
		return ""
	}
	if by, was := o.released[c.Token]; was && (c.Lease == 0 || c.Lease == by.lease) && (c.Name == "" || slices.Contains(by.c.Names, c.Name)) {
		return ""
	}
	return ReasonNotHeld
}

func (o *oracle) force(c *ForceRelease) Reason {
	if !o.breakAll(c.Name, c.Token, EndForceReleased) {
		return ReasonNotHeld
	}
	return ""
}

func (o *oracle) breakAll(name string, token fence.Token, cause EndCause) bool {
	any := false
	for _, a := range slices.Clone(o.acqs) {
		if a.token != 0 && slices.Contains(a.c.Names, name) && (token == 0 || a.token == token) {
			o.giveBack(a, cause)
			any = true
		}
	}
	return any
}

// settle grants whatever can be granted, in any order: the outcome is the same.
// It learns the tokens from the machine, and holds them against the rules.
func (o *oracle) settle(t interface{ Fatalf(string, ...any) }, m *Machine) {
	before := o.max
	for again := true; again; {
		again = false
		for _, a := range o.acqs {
			if a.token != 0 || o.blocked(a.c, a) {
				continue
			}
			found, ok := m.Find(a.lease, a.c.Request)
			if !ok || found.Hold == nil {
				t.Fatalf("lease %d request %d can be granted and is not", a.lease, a.c.Request)
			}
			a.token = found.Hold.Token
			if a.token <= before {
				t.Fatalf("token %d minted after %d", a.token, before)
			}
			if o.mintedBy[a.token] != 0 {
				t.Fatalf("token %d minted twice", a.token)
			}
			if o.lease(a.lease).own {
				delete(o.marks, a.lease)
			}
			o.mintedBy[a.token], o.max = a.lease, max(o.max, a.token)
			for _, k := range found.Hold.Locks {
				a.floors, a.clocks = append(a.floors, k.Floor), append(a.clocks, k.Clock)
			}
			again = true
		}
	}
	// Floors and clocks, and the order of tokens within each lock's queue.
	fresh := slices.Clone(o.acqs)
	sort.SliceStable(fresh, func(i, j int) bool { return fresh[i].token < fresh[j].token })
	for _, a := range fresh {
		if a.token <= before {
			continue
		}
		for i, name := range a.c.Names {
			floor := a.token
			for _, b := range o.acqs {
				if b.token != 0 && b.token < a.token && slices.Contains(b.c.Names, name) {
					floor = min(floor, b.token)
				}
				if b.token == 0 && slices.Index(o.acqs, b) < slices.Index(o.acqs, a) && slices.Contains(b.c.Names, name) {
					t.Fatalf("%s: request %d overtook request %d", name, a.c.Request, b.c.Request)
				}
				if b.token > a.token && slices.Index(o.acqs, b) < slices.Index(o.acqs, a) && slices.Contains(b.c.Names, name) {
					t.Fatalf("%s: token %d went to an earlier request than token %d", name, b.token, a.token)
				}
			}
			if a.floors[i] != floor {
				t.Fatalf("%s token %d has floor %d, want %d", name, a.token, a.floors[i], floor)
			}
			var clock uint64
			if p := o.declared[name]; p != nil {
				*p++
				clock = *p
			}
			if a.clocks[i] != clock {
				t.Fatalf("%s token %d has clock %d, want %d", name, a.token, a.clocks[i], clock)
			}
		}
	}
}

// show is the state in words, the same for both.
func (o *oracle) show() string {
	var b strings.Builder
	for _, l := range o.leases {
		fmt.Fprintf(&b, "lease %d own=%v%s\n", l.id, l.own, showLeft(o.marks[l.id]))
	}
	var names []string
	for _, a := range o.acqs {
		names = append(names, a.c.Names...)
	}
	for name := range o.declared {
		names = append(names, name)
	}
	for name, d := range o.delays {
		if len(d) > 0 {
			names = append(names, name)
		}
	}
	slices.Sort(names)
	for _, name := range slices.Compact(names) {
		fmt.Fprintf(&b, "%s", name)
		if p := o.declared[name]; p != nil {
			fmt.Fprintf(&b, " clock=%d", *p)
		}
		list := slices.Clone(o.acqs)
		sort.SliceStable(list, func(i, j int) bool { return list[i].token < list[j].token && list[i].token != 0 })
		for _, a := range list {
			if i := slices.Index(a.c.Names, name); i >= 0 && a.token != 0 {
				fmt.Fprintf(&b, " hold(%d,%d,%v)", a.token, a.floors[i], a.c.Mode)
			}
		}
		for _, a := range o.acqs {
			if slices.Contains(a.c.Names, name) && a.token == 0 {
				fmt.Fprintf(&b, " wait(%d,%d)", a.lease, a.c.Request)
			}
		}
		ids := slices.Clone(o.delays[name])
		slices.Sort(ids)
		fmt.Fprintf(&b, " delays%v", ids)
		for _, id := range ids {
			b.WriteString(showLeft(o.short[id]))
		}
		fmt.Fprintln(&b)
	}
	return b.String()
}

func showLeft(left Duration) string {
	if left == 0 {
		return ""
	}
	return fmt.Sprintf(" left=%d", left)
}

func show(m *state) string {
	var b strings.Builder
	m.AscendLeases(0, func(l Lease) bool {
		left, _ := m.marks.Get(l.ID)
		fmt.Fprintf(&b, "lease %d own=%v%s\n", l.ID, l.Own, showLeft(left))
		return true
	})
	m.AscendLocks("", func(k Lock) bool {
		fmt.Fprintf(&b, "%s", k.Name)
		if k.Declared {
			fmt.Fprintf(&b, " clock=%d", k.Clock)
		}
		for _, h := range k.Holders {
			fmt.Fprintf(&b, " hold(%d,%d,%v)", h.Token, h.Floor, h.Mode)
		}
		for _, w := range k.Waiters {
			fmt.Fprintf(&b, " wait(%d,%d)", w.Lease, w.Request)
		}
		ids := []uint64{}
		for _, d := range k.Delays {
			ids = append(ids, d.ID)
		}
		slices.Sort(ids)
		fmt.Fprintf(&b, " delays%v", ids)
		for _, d := range k.Delays {
			b.WriteString(showLeft(d.Left))
		}
		fmt.Fprintln(&b)
		return true
	})
	return b.String()
}

func snapshotOf(t interface{ Fatalf(string, ...any) }, m interface {
	Snapshot(func([]byte) error) error
}) []byte {
	var b []byte
	if err := m.Snapshot(func(chunk []byte) error { b = append(b, chunk...); return nil }); err != nil {
		t.Fatalf("snapshot: %v", err)
	}
	return b
}

func restored(t interface{ Fatalf(string, ...any) }, b []byte) *Machine {
	m, err := Restore(bytes.NewReader(b).Read)
	if err != nil {
		t.Fatalf("restore: %v", err)
	}
	return m
}

// deadlockIsFound looks for the deadlock that a request would close from both
// ends: they agree, and what they find is one.
func deadlockIsFound(t interface{ Fatalf(string, ...any) }, m *Machine, c Command) {
	a, ok := c.(*Acquire)
	if !ok || a.Actor == "" {
		return
	}
	ahead, known := m.forward(a, math.MaxInt)
	behind, known2 := m.backward(a, math.MaxInt)
	if (ahead == nil) != (behind == nil) || !known || !known2 {
		t.Fatalf("%+v: forward %v, backward %v\n%s", a, ahead, behind, show(&m.state))
	}
	for _, path := range [][]Link{ahead, behind} {
		for i := range path[:max(len(path)-1, 0)] {
			if !m.waitsFor(a, path[i], path[i+1], i == 0) {
				t.Fatalf("%+v: %v, of which %v does not wait for %v\n%s", a, path, path[i], path[i+1], show(&m.state))
			}
		}
		if n := len(path); n > 0 && (n < 2 || path[0].Actor != a.Actor || path[n-1].Actor != a.Actor) {
			t.Fatalf("%+v: %v is no circle", a, path)
		}
	}
}

// waitsFor reports whether one link of a circle is true: the first one is the
// request's own.
func (m *Machine) waitsFor(c *Acquire, link, next Link, first bool) bool {
	of := func(a *acquisition, l Link) bool { return a.actor == l.Actor && (l.Actor != "" || a.lease == l.Lease) }
	before := []uint64{}
	if first {
		before = append(before, math.MaxUint64)
	} else {
		m.queues.Scan(func(p place) bool {
			if p.key == link.Name && of(p.acq, link) {
				before = append(before, p.n)
			}
			return true
		})
	}
	for _, n := range before {
		found := false
		m.eachHolder(link.Name, m.lock(link.Name), func(h *acquisition) bool {
			found = found || of(h, next)
			return true
		})
		m.queues.Ascend(place{key: link.Name}, func(p place) bool {
			found = found || p.key == link.Name && p.n < n && of(p.acq, next)
			return p.key == link.Name
		})
		if found {
			return true
		}
	}
	return false
}

// draw makes a command over few names, leases, requests and actors, so that
// they meet.
func draw(t *rapid.T, m *Machine, delays []EndDelay, tokens fence.Token) Command {
	names := []string{"a", "b", "c"}
	name := func() string { return rapid.SampledFrom(names).Draw(t, "name") }
	leaseID := func() LeaseID { return LeaseID(rapid.IntRange(1, max(2, int(m.leaseIDs))).Draw(t, "lease")) }
	token := func() fence.Token {
		return fence.Token(rapid.IntRange(1, int(tokens)+1).Draw(t, "token"))
	}
	req := func() RequestID { return RequestID(rapid.IntRange(1, 9).Draw(t, "request")) }
	underLease := func() RequestID {
		if rapid.IntRange(0, 3).Draw(t, "random") == 0 {
			return RandomRequest + req()
		}
		return req()
	}
	switch k := rapid.IntRange(0, 36).Draw(t, "kind"); {
	case k < 13:
		c := &Acquire{Request: req(), Mode: Exclusive, Wait: rapid.IntRange(0, 3).Draw(t, "wait") > 0, TTL: 5}
		switch rapid.IntRange(0, 7).Draw(t, "names") {
		case 0:
			c.Names = []string{"a", "b"}
		case 1:
			c.Names = []string{"b", "c"}
		case 2:
			c.Names = []string{"a", "b", "c"}
		default:
			c.Names = []string{name()}
		}
		if m := rapid.IntRange(0, 5).Draw(t, "mode"); m > 2 {
			c.Mode = Shared
			c.Limit = uint32([]int{0, 2, 2, 3}[rapid.IntRange(0, 3).Draw(t, "limit")])
		}
		if rapid.IntRange(0, 2).Draw(t, "own") == 0 {
			c.Lease, c.TTL, c.Request = leaseID(), 0, underLease()
			c.LowestOpen = min(RequestID(rapid.IntRange(0, 2).Draw(t, "lowest")), c.Request)
		}
		if rapid.IntRange(0, 3).Draw(t, "delay") == 0 {
			c.LockDelay = 7
		}
		c.Actor = []string{"", "", "x", "y", "z"}[rapid.IntRange(0, 4).Draw(t, "actor")]
		c.Declared = rapid.IntRange(0, 9).Draw(t, "declared") == 0
		return c
	case k < 15:
		return &GrantLease{TTL: 5}
	case k < 20:
		c := &Release{Token: token()}
		switch rapid.IntRange(0, 2).Draw(t, "how") {
		case 0:
			c.Name = name()
		case 1:
			c.Lease = leaseID()
		case 2:
			c.Lease, c.Name = leaseID(), name()
		}
		if rapid.IntRange(0, 2).Draw(t, "by request") == 0 {
			c.Request = underLease()
		}
		return c
	case k < 22:
		c := &Abandon{Request: req()}
		if rapid.Bool().Draw(t, "under") {
			c.Lease, c.Request = leaseID(), underLease()
		}
		return c
	case k < 23:
		return &RevokeLease{Lease: leaseID(), By: "op"}
	case k < 25:
		return &ExpireLeases{Leases: []LeaseID{leaseID(), leaseID()}, Term: uint64(rapid.IntRange(1, 5).Draw(t, "term")/5 + 1)}
	case k < 26:
		c := &ForceRelease{Name: name(), By: "op"}
		if rapid.Bool().Draw(t, "by token") {
			c.Token = token()
		}
		return c
	case k < 27:
		if len(delays) > 0 {
			d := delays[rapid.IntRange(0, len(delays)-1).Draw(t, "delay")]
			return &d
		}
		return &EndDelay{Name: name(), Delay: 1}
	case k < 28:
		return &Declare{Name: name()}
	case k < 31:
		if rapid.Bool().Draw(t, "own") {
			return &EndWait{Request: req()}
		}
		return &EndWait{Lease: leaseID(), Request: underLease()}
	case k < 32:
		c := &AbandonAll{}
		under := rapid.Bool().Draw(t, "under")
		if under {
			c.Lease, c.EndLease = leaseID(), rapid.Bool().Draw(t, "end")
		}
		for range rapid.IntRange(0, 3).Draw(t, "requests") {
			if under {
				c.Requests = append(c.Requests, underLease())
			} else {
				c.Requests = append(c.Requests, req())
			}
		}
		return c
	case k > 32 && k < 36:
		c := &Mark{Term: uint64(rapid.IntRange(1, 5).Draw(t, "term")/5 + 1)}
		for range rapid.IntRange(0, 3).Draw(t, "marks") {
			c.Leases = append(c.Leases, LeaseMark{leaseID(), Duration(rapid.IntRange(1, 4).Draw(t, "left"))})
		}
		for _, d := range delays {
			if rapid.IntRange(0, 1).Draw(t, "delay") == 0 {
				c.Delays = append(c.Delays, DelayMark{d.Name, d.Delay, 2})
			}
		}
		return c
	case k == 36:
		return &Clear{Leases: []LeaseID{leaseID(), leaseID()}}
	case k < 33 && rapid.Bool().Draw(t, "clock"):
		return &ReleaseClock{Name: name(), Clock: uint64(rapid.IntRange(0, 4).Draw(t, "clock"))}
	}
	return &Undeclare{Name: name()}
}

// TestOracle runs random sequences against the machine and the oracle. At
// every step the machine also goes through its codec, a snapshot and a
// restore: same commands, same bytes. Run more of them with -rapid.checks.
func TestOracle(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		level := Level(rapid.IntRange(int(FirstLevel), int(NewestLevel)).Draw(t, "level"))
		m, twin, o := NewAt(0, level), NewAt(0, level), newOracle(level)
		var delays []EndDelay
		steps := rapid.IntRange(1, 24).Draw(t, "steps")
		for step := range steps {
			c := draw(t, m, delays, fence.Token(m.minted))
			batch := Batch{Stamp: int64(step), Commands: []Command{c}}
			decoded, err := DecodeBatch(AppendBatch(nil, &batch))
			if err != nil {
				t.Fatalf("%+v: %v", c, err)
			}
			batch.Term, decoded.Term = 1, 1
			// Whoever reads a copy is not disturbed.
			before := show(&m.state)
			copied, was := m.Copy(), snapshotOf(t, m)
			deadlockIsFound(t, m, c)
			want := o.apply(c, 1, LeaseID(m.leaseIDs+1))
			out := m.Apply(batch)
			if !bytes.Equal(snapshotOf(t, copied), was) {
				t.Fatalf("step %d %T%+v: a copy changed:\n%s\nwas\n%s", step, c, c, show(&copied.state), before)
			}
			got := out.Results[0]
			reason := Reason("")
			if got.Refusal != nil {
				reason = got.Refusal.Reason
				if got.Refusal.Error() == "" || strings.Contains(got.Refusal.Error(), "\n") {
					t.Fatalf("refusal %q", got.Refusal.Error())
				}
			}
			if reason != want.reason {
				t.Fatalf("step %d %T%+v: refused %q, want %q\n%s", step, c, c, reason, want.reason, before)
			}
			for _, e := range out.Events {
				if e.Kind == EventDelayStarted {
					delays = append(delays, EndDelay{Name: e.Locks[0].Name, Delay: e.Delay.ID})
					list := o.delays[e.Locks[0].Name]
					if i := slices.Index(list, 0); i >= 0 {
						list[i] = e.Delay.ID
					} else {
						t.Fatalf("step %d: a delay on %s that should not be", step, e.Locks[0].Name)
					}
				}
			}
			o.settle(t, m)
			if got.Waiting != want.waiting || (got.Hold != nil) != want.granted {
				t.Fatalf("step %d %T%+v: waiting %v granted %v, want %v %v", step, c, c, got.Waiting, got.Hold != nil, want.waiting, want.granted)
			}
			if a, b := show(&m.state), o.show(); a != b {
				t.Fatalf("step %d %T%+v\nmachine:\n%s\noracle:\n%s", step, c, c, a, b)
			}
			for _, l := range o.leases {
				if _, n := m.Losses(l.id); !l.own && n != l.losses {
					t.Fatalf("step %d %T%+v: lease %d has %d losses, want %d", step, c, c, l.id, n, l.losses)
				}
			}
			for i, e := range out.Events {
				if want := copied.Revision() + uint64(i) + 1; e.Revision != want {
					t.Fatalf("event %d has revision %d, want %d", i, e.Revision, want)
				}
			}
			// The twin lives through a snapshot and a restore at every step.
			twin = restored(t, snapshotOf(t, twin))
			twin.Apply(decoded)
			if a, b := snapshotOf(t, m), snapshotOf(t, twin); !bytes.Equal(a, b) {
				t.Fatalf("step %d %T%+v: the twin differs\n%s\ntwin:\n%s", step, c, c, show(&m.state), show(&twin.state))
			}
		}
	})
}
