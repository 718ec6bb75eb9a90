package machine

import (
	"encoding/binary"
	"fmt"

	"github.com/tidwall/btree"

	"github.com/distlock/distlock/fence"
)

// The first byte of a snapshot: its version. That of a machine at the first
// level is the one that the first release wrote and reads.
const (
	snapshotFirst   = 2
	snapshotLeveled = 3 // with the level, spans and all losses
)

// chunkSize is about how much Snapshot emits at a time.
const chunkSize = 64 << 10

// A snapshot is a header (version and counters) and then, table by table, the
// number of records and each record with its length before it. Tables that
// follow from others (holders, queues, actors, requests, the indexes of the
// memory) are not written but made anew.

// Snapshot writes the state as versioned bytes, in chunks that are only valid
// during the call. Equal states are equal bytes. It fails only if emit does.
func (m *state) Snapshot(emit func(chunk []byte) error) error {
	w := &writer{emit: emit, buf: make([]byte, 0, chunkSize+4096)}
	first := !m.at(2)
	if first {
		w.buf = append(w.buf, snapshotFirst)
	} else {
		w.buf = append(w.buf, snapshotLeveled)
		w.buf = binary.AppendUvarint(w.buf, uint64(m.level))
	}
	for _, n := range []uint64{m.minted, m.leaseIDs, m.revision, m.places, m.memory.count} {
		w.buf = binary.AppendUvarint(w.buf, n)
	}
	w.table(m.leases.Len())
	m.leases.Scan(func(_ LeaseID, l *lease) bool { return w.record(func(e *encoder) { m.encodeLease(e, l) }) })
	w.table(m.waits + m.grants)
	m.eachAcquisition(func(a *acquisition) bool { return w.record(func(e *encoder) { a.encode(e, first) }) })
	w.table(m.locks.Len())
	m.locks.Scan(func(name string, k *lock) bool { return w.record(func(e *encoder) { m.encodeLock(e, name, k) }) })
	w.table(m.memory.len())
	m.memory.each(func(p *past) bool { return w.record(p.encode) })
	for _, g := range []*generation{&m.memory.old, &m.memory.young} {
		w.table(g.traces.Len())
		g.traces.Scan(func(name string, last fence.Token) bool {
			return w.record(func(e *encoder) {
				e.string(name)
				e.uint(uint64(last))
			})
		})
	}
	if !first {
		w.table(m.ended.Len())
		m.ended.Scan(func(s span) bool {
			return w.record(func(e *encoder) {
				e.uint(uint64(s.lease))
				e.uint(uint64(s.from))
				e.uint(uint64(s.to))
			})
		})
	}
	if m.at(3) {
		w.table(m.marks.Len())
		m.marks.Scan(func(id LeaseID, left Duration) bool {
			return w.record(func(e *encoder) {
				e.uint(uint64(id))
				e.int(int64(left))
			})
		})
	}
	return w.flush()
}

// ErrLevel says that a snapshot is of a machine at a higher level than this
// build knows.
var ErrLevel = fmt.Errorf("a level above %d, the highest that this build knows: %w", NewestLevel, ErrUnknownCommand)

// Restore reads a snapshot through read, which is an io.Reader's Read. It
// reads no byte past the snapshot's end. Errors are read's own, ErrCorrupt or
// ErrUnknownCommand (a snapshot of a newer version).
func Restore(read func(p []byte) (int, error)) (*Machine, error) {
	r := &reader{read: read}
	v := r.byte()
	if r.err == nil && v != snapshotFirst && v != snapshotLeveled {
		return nil, fmt.Errorf("snapshot version %d: %w", v, ErrUnknownCommand)
	}
	m := NewAt(0, FirstLevel)
	first := v == snapshotFirst
	if !first {
		level := r.uint()
		switch {
		case r.err != nil:
		case level > uint64(NewestLevel):
			return nil, fmt.Errorf("a snapshot at level %d: %w", level, ErrLevel)
		case level < 2:
			return nil, fmt.Errorf("a snapshot at level %d: %w", level, ErrCorrupt)
		}
		m.level = Level(level)
	}
	var remembered uint64
	for _, n := range []*uint64{&m.minted, &m.leaseIDs, &m.revision, &m.places, &remembered} {
		*n = r.uint()
	}
	r.table(func(d *decoder) {
		l := m.decodeLease(d)
		ascending(d, m.leases, l.id)
		m.leases.Set(l.id, l)
		if !l.own() && l.session.request != 0 {
			m.requests[l.session.request] = l.id
		}
	})
	var before under
	holders := make(map[string]*acquisition) // holder read of a lock
	r.table(func(d *decoder) {
		a := decodeAcquisition(d, first)
		if d.err != nil {
			return
		}
		l := m.lease(a.lease)
		switch {
		case l == nil || l.own() && l.acq.terms != nil:
			d.fail("an acquisition without a lease")
			return
		case l.own():
			l.acq = *a
			a = &l.acq
			m.requests[a.request] = a.lease
		}
		entry := under{a.lease, a.request, a}
		if !lessUnder(before, entry) {
			d.fail("records out of order")
		}
		before = entry
		if !l.own() {
			m.acqs.Set(entry)
		}
		if a.actor != "" {
			m.actors.Set(place{a.actor, a.place, a})
		}
		if a.token == 0 {
			m.waits++
			for _, name := range a.names() {
				m.queues.Set(place{name, a.place, a})
			}
			return
		}
		m.grants++
		m.tokens[a.token] = a
		for _, name := range a.names() {
			m.holds++
			other := holders[name]
			if other == nil {
				holders[name] = a
				continue
			}
			m.holders.Set(place{name, uint64(other.token), other})
			m.holders.Set(place{name, uint64(a.token), a})
		}
	})
	r.table(func(d *decoder) {
		name, k, last, mode := m.decodeLock(d)
		ascending(d, m.locks, name)
		holder := holders[name]
		if (holder != nil) != (k.holders > 0) || holder != nil && holder.mode != mode {
			d.fail("a lock that does not match its holders")
			return
		}
		if k.holders == 1 {
			k.sole = holder
		}
		k.setLast(last)
		m.locks.Set(name, k)
	})
	r.table(func(d *decoder) {
		p := decodePast(d)
		if m.memory.len() > 0 && p.n != m.memory.count+1 {
			d.fail("records out of order")
		}
		m.memory.add(p)
	})
	if r.err == nil && m.memory.len() > 0 && m.memory.count != remembered {
		r.err = fmt.Errorf("not all that ended is there: %w", ErrCorrupt)
	}
	m.memory.count = remembered
	for _, g := range []*generation{&m.memory.old, &m.memory.young} {
		r.table(func(d *decoder) {
			name, last := d.string(), fence.Token(d.uint())
			ascending(d, g.traces, name)
			g.traces.Set(name, last)
		})
	}
	if !first {
		r.table(func(d *decoder) { m.decodeSpan(d) })
	}
	if m.at(3) {
		r.table(func(d *decoder) {
			id, left := LeaseID(d.uint()), Duration(d.int())
			ascending(d, m.marks, id)
			if m.lease(id) == nil || left < 1 {
				d.fail("a mark without a lease")
			}
			m.marks.Set(id, left)
		})
	}
	if r.err == nil {
		r.err = m.check()
	}
	if r.err != nil {
		return nil, fmt.Errorf("restoring a snapshot: %w", r.err)
	}
	return m, nil
}

// ascending refuses a record that does not come after all of its table: the
// same record twice, above all, would be in the tables made anew twice.
func ascending[K ~uint64 | ~string, T any](d *decoder, t *btree.Map[K, T], key K) {
	if last, _, ok := t.Max(); ok && key <= last {
		d.fail("records out of order")
	}
}

// check holds the tables that were read against those made anew, so that a
// damaged snapshot cannot bring a machine up that contradicts itself.
func (m *Machine) check() error {
	var err error
	bad := func(format string, args ...any) bool {
		err = fmt.Errorf(format+": %w", append(args, ErrCorrupt)...)
		return false
	}
	if last, _, ok := m.leases.Max(); ok && uint64(last) > m.leaseIDs {
		bad("lease %d was never made", last)
	}
	m.leases.Scan(func(id LeaseID, l *lease) bool {
		if l.own() && l.acq.terms == nil {
			return bad("lease %d is without its acquisition", id)
		}
		return true
	})
	if err != nil {
		return err
	}
	places := 0
	m.eachAcquisition(func(a *acquisition) bool {
		places += len(a.names())
		if uint64(a.token) > m.minted || a.place > m.places {
			return bad("an acquisition of lease %d was never made", a.lease)
		}
		for i := 1; i < len(a.names()); i++ {
			if a.names()[i] <= a.names()[i-1] {
				return bad("an acquisition of lease %d names a lock twice", a.lease)
			}
		}
		return true
	})
	if err == nil && (m.grants != len(m.tokens) || places != m.holds+m.queues.Len()) {
		bad("two acquisitions with one token or place")
	}
	holders, queued := 0, 0
	m.locks.Scan(func(name string, k *lock) bool {
		shared := 0
		n := 0
		m.eachHolder(name, k, func(a *acquisition) bool {
			n++
			if a.mode == Shared {
				shared++
			}
			if a.mode != k.mode() {
				n = -1 << 30
			}
			return true
		})
		if several := m.severalHold(name); n < 2 == several {
			n = -1 << 30
		}
		waiters := 0
		m.queues.Ascend(place{key: name}, func(p place) bool {
			if p.key != name {
				return false
			}
			waiters++
			if p.acq.mode == Shared {
				shared++
			}
			return true
		})
		if n != int(k.holders) || waiters != int(k.waiters) || shared != int(k.shared) {
			return bad("lock %q does not match its holders and waiters", name)
		}
		holders, queued = holders+n, queued+waiters
		return true
	})
	if err == nil && (holders != m.holds || queued != m.queues.Len()) {
		bad("holders or waiters of a lock that is not there")
	}
	return err
}

// severalHold reports whether the table of holders knows the lock.
func (m *state) severalHold(name string) (found bool) {
	m.holders.Ascend(place{key: name}, func(p place) bool {
		found = p.key == name
		return false
	})
	return found
}

// eachAcquisition calls fn for all, by lease and request, until it returns
// false.
func (m *state) eachAcquisition(fn func(*acquisition) bool) {
	m.leases.Scan(func(_ LeaseID, l *lease) bool {
		more := true
		m.eachOf(l, func(a *acquisition) bool {
			more = fn(a)
			return more
		})
		return more
	})
}

func (m *state) encodeLease(e *encoder, l *lease) {
	e.uint(uint64(l.id))
	e.int(int64(l.ttl()))
	e.string(l.owner())
	s := l.session
	if l.own() {
		s = &session{request: l.acq.request}
	}
	first := !m.at(2)
	e.metadata(s.metadata)
	e.int(l.since)
	used := s.lowest > 0 || first && s.spans > 0 || len(s.lost) > 0
	e.bools(l.own(), used)
	e.uint(uint64(s.request))
	e.uint(uint64(s.after))
	if !used {
		return
	}
	e.uint(uint64(s.lowest))
	if first {
		m.encodeEnded(e, l)
	}
	e.uint(uint64(len(s.lost)))
	for _, f := range s.lost {
		e.uint(uint64(f.Token))
		e.byte(byte(f.Ended.Cause))
		e.string(f.Ended.By)
		e.int(f.Ended.At)
		e.uint(f.Ended.Revision)
	}
	if !first {
		e.uint(s.dropped)
		e.uint(uint64(s.droppedTo))
	}
}

// encodeEnded writes a lease's spans as the list that they were in the first
// version.
func (m *state) encodeEnded(e *encoder, l *lease) {
	n := uint64(0)
	m.eachSpan(l.id, func(s span) bool {
		n += uint64(s.to-s.from) + 1
		return true
	})
	e.uint(n)
	m.eachSpan(l.id, func(s span) bool {
		for id := s.from; id <= s.to; id++ {
			e.uint(uint64(id))
		}
		return true
	})
}

func (m *Machine) decodeLease(d *decoder) *lease {
	l := &lease{id: LeaseID(d.uint())}
	ttl, owner := Duration(d.int()), d.string()
	l.terms = leaseTermsOf(owner, ttl)
	s := &session{metadata: d.metadata()}
	l.since = d.int()
	own, used := d.bools()
	s.request, s.after = RequestID(d.uint()), fence.Token(d.uint())
	if used {
		s.lowest = RequestID(d.uint())
		if !m.at(2) {
			m.decodeEnded(d, l.id, s)
		}
		for range d.count(5) {
			f := Lost{Token: fence.Token(d.uint())}
			f.Ended = Ended{Cause: EndCause(d.byte()), By: d.string(), At: d.int(), Revision: d.uint()}
			s.lost = append(s.lost, f)
		}
		if m.at(2) {
			s.dropped, s.droppedTo = d.uint(), fence.Token(d.uint())
		}
	}
	if !own {
		l.session = s
	}
	return l
}

// decodeEnded reads the list of the first version as spans.
func (m *Machine) decodeEnded(d *decoder, id LeaseID, s *session) {
	var last span
	for range d.count(1) {
		req := RequestID(d.uint())
		switch {
		case d.err != nil:
			return
		case req < s.lowest || s.spans > 0 && req <= last.to || req >= AnonymousRequest:
			d.fail("requests out of order")
			return
		case s.spans > 0 && req == last.to+1:
			last.to = req
		default:
			last = span{lease: id, from: req, to: req}
			s.spans++
		}
		m.ended.Set(last)
	}
}

func (m *Machine) decodeSpan(d *decoder) {
	s := span{lease: LeaseID(d.uint()), from: RequestID(d.uint()), to: RequestID(d.uint())}
	l := m.lease(s.lease)
	last, ok := m.ended.Max()
	switch {
	case d.err != nil:
		return
	case l == nil || l.own():
		d.fail("an ended request without a lease")
	case s.from < l.session.lowest || s.to < s.from || s.to >= AnonymousRequest,
		ok && (s.lease < last.lease || s.lease == last.lease && s.from <= last.to+1):
		d.fail("requests out of order")
	default:
		l.session.spans++
		m.ended.Set(s)
	}
}

func (a *acquisition) encode(e *encoder, first bool) {
	e.uint(uint64(a.lease))
	e.uint(uint64(a.request))
	e.uint(a.place)
	e.uint(uint64(a.token))
	e.strings(a.names())
	e.bools(a.floors != nil, a.clocks != nil, a.declared && !first)
	for _, f := range a.floors {
		e.uint(uint64(f))
	}
	for _, c := range a.clocks {
		e.uint(c)
	}
	e.byte(byte(a.mode))
	e.uint(uint64(a.limit))
	e.int(int64(a.delay))
	e.int(a.since)
	e.string(a.actor)
	e.metadata(a.metadata)
}

func decodeAcquisition(d *decoder, first bool) *acquisition {
	a := &acquisition{lease: LeaseID(d.uint()), request: RequestID(d.uint()), place: d.uint(), token: fence.Token(d.uint())}
	names := d.strings()
	hasFloors, hasClocks, declared := d.threeBools()
	var floors []fence.Token
	var clocks []uint64
	if hasFloors {
		floors = make([]fence.Token, len(names))
		for i := range floors {
			floors[i] = fence.Token(d.uint())
		}
	}
	if hasClocks {
		clocks = make([]uint64, len(names))
		for i := range clocks {
			clocks[i] = d.uint()
		}
	}
	mode, limit, delay := Mode(d.byte()), uint32(d.below(1<<32)), Duration(d.int())
	a.since = d.int()
	actor, metadata := d.string(), d.metadata()
	if mode != Exclusive && mode != Shared || len(names) == 0 || declared && first {
		d.fail("an acquisition that cannot be")
		return a
	}
	a.terms = termsOf(mode, limit, delay, actor, metadata, declared)
	if hasFloors || hasClocks {
		own := *a.terms
		own.floors, own.clocks = floors, clocks
		a.terms = &own
	}
	a.setNames(names)
	return a
}

func (m *state) encodeLock(e *encoder, name string, k *lock) {
	e.string(name)
	e.uint(uint64(k.holders))
	e.uint(uint64(k.waiters))
	e.uint(uint64(k.shared))
	// What has no meaning is written as nothing: equal states, equal bytes.
	var limit uint32
	if k.shared > 0 {
		limit = k.limit
	}
	var mode Mode
	if k.holders > 0 {
		mode = k.mode()
	}
	e.uint(uint64(limit))
	e.byte(byte(mode))
	e.bools(k.declared)
	e.uint(uint64(k.delays))
	if k.delays > 0 {
		m.delays.Ascend(delayOf{name: name}, func(d delayOf) bool {
			if d.name == name {
				e.uint(d.ID)
				e.int(int64(d.Duration))
				e.int(d.Since)
				if m.at(3) {
					e.int(int64(d.Left))
				}
			}
			return d.name == name
		})
	}
	e.uint(k.clock)
	e.int(k.expires)
	e.uint(uint64(k.last()))
}

// decodeLock also returns the lock's name, its last token, and the mode of the
// holders.
func (m *Machine) decodeLock(d *decoder) (string, *lock, fence.Token, Mode) {
	name := d.string()
	k := &lock{holders: int32(d.below(1 << 31)), waiters: int32(d.below(1 << 31)), traits: noTraits}
	t := traits{shared: int32(d.below(1 << 31)), limit: uint32(d.below(1 << 32))}
	mode := Mode(d.byte())
	t.declared, _ = d.bools()
	last := uint64(0)
	for range d.count(3) {
		delay := Delay{ID: d.uint(), Duration: Duration(d.int()), Since: d.int()}
		if m.at(3) {
			delay.Left = Duration(d.int())
		}
		if delay.ID <= last {
			d.fail("lock-delays out of order")
		}
		last = delay.ID
		t.delays++
		m.delays.Set(delayOf{name, delay})
	}
	t.clock, t.expires = d.uint(), d.int()
	if t.shared != 0 || t.limit != 0 || t.declared || t.clock != 0 || t.expires != 0 || t.delays != 0 {
		k.traits = &t
	}
	return name, k, fence.Token(d.uint()), mode
}

func (p *past) encode(e *encoder) {
	e.uint(p.n)
	e.uint(p.revision)
	e.uint(uint64(p.lease))
	e.bools(p.leaseEnd)
	e.uint(uint64(p.request))
	e.uint(uint64(p.token))
	e.strings(p.names)
	e.byte(byte(p.cause))
	e.string(p.by)
	e.int(p.at)
}

func decodePast(d *decoder) past {
	p := past{n: d.uint(), revision: d.uint(), lease: LeaseID(d.uint())}
	p.leaseEnd, _ = d.bools()
	p.request, p.token, p.names = RequestID(d.uint()), fence.Token(d.uint()), d.strings()
	p.cause, p.by, p.at = EndCause(d.byte()), d.string(), d.int()
	return p
}

// writer gathers records into chunks.
type writer struct {
	emit    func([]byte) error
	buf     []byte
	scratch encoder
	err     error
}

func (w *writer) table(n int) { w.buf = binary.AppendUvarint(w.buf, uint64(n)) }

func (w *writer) record(encode func(*encoder)) bool {
	w.scratch.b = w.scratch.b[:0]
	encode(&w.scratch)
	w.buf = binary.AppendUvarint(w.buf, uint64(len(w.scratch.b)))
	w.buf = append(w.buf, w.scratch.b...)
	if len(w.buf) >= chunkSize {
		w.flush()
	}
	return w.err == nil
}

func (w *writer) flush() error {
	if w.err == nil && len(w.buf) > 0 {
		w.err = w.emit(w.buf)
	}
	w.buf = w.buf[:0]
	return w.err
}

// reader takes a snapshot apart. It never reads ahead, so records are read in
// two steps: the varint of their length byte by byte, then the bytes.
type reader struct {
	read func([]byte) (int, error)
	err  error
	one  [1]byte
	buf  []byte
}

const maxRecord = 16 << 20

func (r *reader) full(p []byte) {
	for len(p) > 0 && r.err == nil {
		n, err := r.read(p)
		p = p[n:]
		if err != nil && len(p) > 0 {
			r.err = err
		} else if n == 0 && err == nil {
			r.err = fmt.Errorf("the snapshot is cut short: %w", ErrCorrupt)
		}
	}
}

func (r *reader) byte() byte {
	r.one[0] = 0
	r.full(r.one[:])
	return r.one[0]
}

func (r *reader) uint() uint64 {
	var v uint64
	for shift := 0; shift < 64; shift += 7 {
		b := r.byte()
		if r.err != nil {
			return 0
		}
		v |= uint64(b&0x7f) << shift
		if b < 0x80 {
			return v
		}
	}
	r.err = fmt.Errorf("not a number: %w", ErrCorrupt)
	return 0
}

func (r *reader) table(decode func(*decoder)) {
	for n := r.uint(); n > 0 && r.err == nil; n-- {
		size := r.uint()
		if size > maxRecord {
			r.err = fmt.Errorf("a record of %d bytes: %w", size, ErrCorrupt)
		}
		if r.err != nil {
			return
		}
		if uint64(cap(r.buf)) < size {
			r.buf = make([]byte, size)
		}
		r.buf = r.buf[:size]
		if r.full(r.buf); r.err != nil {
			return
		}
		d := &decoder{b: r.buf}
		decode(d)
		if d.err == nil && len(d.b) > 0 {
			d.fail("bytes follow a record")
		}
		if r.err == nil {
			r.err = d.err
		}
	}
}
