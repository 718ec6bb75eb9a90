package machine

import (
	"encoding/binary"
	"errors"
	"fmt"

	"github.com/distlock/distlock/fence"
)

// ErrCorrupt says that bytes are not an encoding this package wrote.
var ErrCorrupt = errors.New("corrupt encoding")

// ErrUnknownCommand says that a batch has a command, or a form of encoding,
// that this version does not know. A newer version wrote it: the node must
// stop rather than diverge from those that know it.
var ErrUnknownCommand = errors.New("a command of a newer version")

// batchVersion is the first byte of an encoded batch.
const batchVersion = 1

// The kinds of commands, as encoded. Numbers are never used again.
const (
	kindGrantLease = 1 + iota
	kindRevokeLease
	kindExpireLeases
	kindAcquire
	kindAbandon
	kindRelease
	kindForceRelease
	kindEndDelay
	kindDeclare
	kindUndeclare
	kindReleaseClock
	kindForget
	kindAbandonAll
	kindEndWait
	kindReleaseRequest // a Release that names its request
	kindMark
	kindClear
)

// AppendBatch appends the encoding of a batch: unsigned varints, and strings
// with their length before them.
func AppendBatch(dst []byte, b *Batch) []byte {
	e := encoder{append(dst, batchVersion)}
	e.int(b.Stamp)
	e.uint(uint64(len(b.Commands)))
	for _, c := range b.Commands {
		e.command(c)
	}
	return e.b
}

// DecodeBatch is the reverse of AppendBatch. The result shares no memory with
// src. Errors are ErrCorrupt or ErrUnknownCommand.
func DecodeBatch(src []byte) (Batch, error) {
	d := decoder{b: src}
	if v := d.byte(); d.err == nil && v != batchVersion {
		return Batch{}, fmt.Errorf("batch version %d: %w", v, ErrUnknownCommand)
	}
	b := Batch{Stamp: d.int()}
	n := d.count(1)
	b.Commands = make([]Command, 0, n)
	for i := range n {
		d.left = n - i
		c := d.command()
		if d.err != nil {
			return Batch{}, d.err
		}
		b.Commands = append(b.Commands, c)
	}
	if d.err == nil && len(d.b) > 0 {
		d.err = fmt.Errorf("%d bytes follow the batch: %w", len(d.b), ErrCorrupt)
	}
	if d.err != nil {
		return Batch{}, d.err
	}
	return b, nil
}

func (e *encoder) command(c Command) {
	switch c := c.(type) {
	case *GrantLease:
		e.byte(kindGrantLease)
		e.uint(uint64(c.Request))
		e.int(int64(c.TTL))
		e.string(c.Owner)
		e.metadata(c.Metadata)
	case *RevokeLease:
		e.byte(kindRevokeLease)
		e.uint(uint64(c.Lease))
		e.string(c.By)
	case *ExpireLeases:
		e.byte(kindExpireLeases)
		e.uint(c.Term)
		e.leases(c.Leases)
	case *Mark:
		e.byte(kindMark)
		e.uint(c.Term)
		e.uint(uint64(len(c.Leases)))
		for _, k := range c.Leases {
			e.uint(uint64(k.Lease))
			e.int(int64(k.Left))
		}
		e.uint(uint64(len(c.Delays)))
		for _, k := range c.Delays {
			e.string(k.Name)
			e.uint(k.Delay)
			e.int(int64(k.Left))
		}
	case *Clear:
		e.byte(kindClear)
		e.leases(c.Leases)
	case *Acquire:
		e.byte(kindAcquire)
		e.uint(uint64(c.Lease))
		e.uint(uint64(c.Request))
		e.uint(uint64(c.LowestOpen))
		e.strings(c.Names)
		e.byte(byte(c.Mode))
		e.uint(uint64(c.Limit))
		e.bools(c.Wait, c.Declared)
		e.int(int64(c.LockDelay))
		e.string(c.Actor)
		e.metadata(c.Metadata)
		e.int(int64(c.TTL))
		e.string(c.Owner)
	case *Abandon:
		e.byte(kindAbandon)
		e.uint(uint64(c.Lease))
		e.uint(uint64(c.Request))
	case *AbandonAll:
		e.byte(kindAbandonAll)
		e.uint(uint64(c.Lease))
		e.bools(c.EndLease)
		e.uint(uint64(len(c.Requests)))
		for _, id := range c.Requests {
			e.uint(uint64(id))
		}
	case *EndWait:
		e.byte(kindEndWait)
		e.uint(uint64(c.Lease))
		e.uint(uint64(c.Request))
	case *Release:
		if c.Request != 0 {
			e.byte(kindReleaseRequest)
		} else {
			e.byte(kindRelease)
		}
		e.uint(uint64(c.Lease))
		e.string(c.Name)
		e.uint(uint64(c.Token))
		if c.Request != 0 {
			e.uint(uint64(c.Request))
		}
	case *ForceRelease:
		e.byte(kindForceRelease)
		e.string(c.Name)
		e.uint(uint64(c.Token))
		e.string(c.By)
	case *EndDelay:
		e.byte(kindEndDelay)
		e.string(c.Name)
		e.uint(c.Delay)
	case *Declare:
		e.byte(kindDeclare)
		e.string(c.Name)
	case *Undeclare:
		e.byte(kindUndeclare)
		e.string(c.Name)
	case *ReleaseClock:
		e.byte(kindReleaseClock)
		e.string(c.Name)
		e.uint(c.Clock)
	case *Forget:
		e.byte(kindForget)
		e.uint(c.Through)
	default:
		panic("machine: a command outside the closed set")
	}
}

func (d *decoder) command() Command {
	switch kind := d.byte(); kind {
	case kindGrantLease:
		return &GrantLease{Request: RequestID(d.uint()), TTL: Duration(d.int()), Owner: d.string(), Metadata: d.metadata()}
	case kindRevokeLease:
		return &RevokeLease{Lease: LeaseID(d.uint()), By: d.string()}
	case kindExpireLeases:
		return &ExpireLeases{Term: d.uint(), Leases: d.leases()}
	case kindMark:
		c := &Mark{Term: d.uint()}
		for range d.count(2) {
			c.Leases = append(c.Leases, LeaseMark{LeaseID(d.uint()), Duration(d.int())})
		}
		for range d.count(3) {
			c.Delays = append(c.Delays, DelayMark{d.string(), d.uint(), Duration(d.int())})
		}
		return c
	case kindClear:
		return &Clear{Leases: d.leases()}
	case kindAcquire:
		c := one(&d.acquires, d.left)
		c.Lease, c.Request, c.LowestOpen = LeaseID(d.uint()), RequestID(d.uint()), RequestID(d.uint())
		c.Names = d.strings()
		c.Mode = Mode(d.byte())
		c.Limit = uint32(d.below(1 << 32))
		c.Wait, c.Declared = d.bools()
		c.LockDelay = Duration(d.int())
		c.Actor = d.string()
		c.Metadata = d.metadata()
		c.TTL = Duration(d.int())
		c.Owner = d.sameString(&d.owner)
		return c
	case kindAbandon:
		return &Abandon{Lease: LeaseID(d.uint()), Request: RequestID(d.uint())}
	case kindAbandonAll:
		c := &AbandonAll{Lease: LeaseID(d.uint())}
		c.EndLease, _ = d.bools()
		n := d.count(1)
		c.Requests = make([]RequestID, 0, n)
		for range n {
			c.Requests = append(c.Requests, RequestID(d.uint()))
		}
		return c
	case kindEndWait:
		return &EndWait{Lease: LeaseID(d.uint()), Request: RequestID(d.uint())}
	case kindRelease, kindReleaseRequest:
		c := one(&d.releases, d.left)
		c.Lease, c.Name, c.Token = LeaseID(d.uint()), d.string(), fence.Token(d.uint())
		if kind == kindReleaseRequest {
			if c.Request = RequestID(d.uint()); c.Request == 0 {
				d.fail("a release that names no request")
			}
		}
		return c
	case kindForceRelease:
		return &ForceRelease{Name: d.string(), Token: fence.Token(d.uint()), By: d.string()}
	case kindEndDelay:
		return &EndDelay{Name: d.string(), Delay: d.uint()}
	case kindDeclare:
		return &Declare{Name: d.string()}
	case kindUndeclare:
		return &Undeclare{Name: d.string()}
	case kindReleaseClock:
		return &ReleaseClock{Name: d.string(), Clock: d.uint()}
	case kindForget:
		return &Forget{Through: d.uint()}
	default:
		if d.err == nil {
			d.err = fmt.Errorf("command kind %d: %w", kind, ErrUnknownCommand)
		}
		return nil
	}
}

type encoder struct{ b []byte }

func (e *encoder) byte(v byte)   { e.b = append(e.b, v) }
func (e *encoder) uint(v uint64) { e.b = binary.AppendUvarint(e.b, v) }
func (e *encoder) int(v int64)   { e.b = binary.AppendVarint(e.b, v) }

func (e *encoder) string(s string) {
	e.uint(uint64(len(s)))
	e.b = append(e.b, s...)
}

func (e *encoder) strings(list []string) {
	e.uint(uint64(len(list)))
	for _, s := range list {
		e.string(s)
	}
}

func (e *encoder) leases(list []LeaseID) {
	e.uint(uint64(len(list)))
	for _, id := range list {
		e.uint(uint64(id))
	}
}

func (e *encoder) metadata(list []Meta) {
	e.uint(uint64(len(list)))
	for _, m := range list {
		e.string(m.Key)
		e.string(m.Value)
	}
}

func (e *encoder) bools(list ...bool) {
	var v byte
	for i, b := range list {
		if b {
			v |= 1 << i
		}
	}
	e.byte(v)
}

// decoder reads what encoder wrote; after an error it returns zeros.
type decoder struct {
	b   []byte
	err error

	// Of a batch, whose most frequent commands are made together.
	left     int // commands, with the one being decoded
	acquires []Acquire
	releases []Release
	names    []string // of acquisitions of one lock
	owner    string   // of the last acquisition: most of a batch have one
}

// together is how many commands of a batch are made in one piece of memory.
const together = 16

// one returns a new element of a list, which is replaced when it is full.
func one[T any](list *[]T, left int) *T {
	if len(*list) == cap(*list) {
		*list = make([]T, 0, max(1, min(left, together)))
	}
	*list = (*list)[:len(*list)+1]
	return &(*list)[len(*list)-1]
}

func (d *decoder) fail(what string) {
	if d.err == nil {
		d.err = fmt.Errorf("%s: %w", what, ErrCorrupt)
	}
	d.b = nil
}

func (d *decoder) byte() byte {
	if len(d.b) == 0 {
		d.fail("short of a byte")
		return 0
	}
	v := d.b[0]
	d.b = d.b[1:]
	return v
}

func (d *decoder) uint() uint64 {
	v, n := binary.Uvarint(d.b)
	if n <= 0 {
		d.fail("not a number")
		return 0
	}
	d.b = d.b[n:]
	return v
}

func (d *decoder) int() int64 {
	v, n := binary.Varint(d.b)
	if n <= 0 {
		d.fail("not a number")
		return 0
	}
	d.b = d.b[n:]
	return v
}

func (d *decoder) below(limit uint64) uint64 {
	v := d.uint()
	if v >= limit {
		d.fail("a number out of range")
		return 0
	}
	return v
}

// count reads the length of a list whose elements take at least size bytes
// each, so that a forged length cannot make the decoder allocate much.
func (d *decoder) count(size int) int {
	v := d.uint()
	if v > uint64(len(d.b)/size) {
		d.fail("a list longer than its bytes")
		return 0
	}
	return int(v)
}

func (d *decoder) string() string {
	n := d.count(1)
	s := string(d.b[:n])
	d.b = d.b[n:]
	return s
}

func (d *decoder) strings() []string {
	n := d.count(1)
	if n == 0 {
		return nil
	}
	if n == 1 { // the machine keeps no list of one
		name := one(&d.names, d.left)
		*name = d.string()
		return d.names[len(d.names)-1 : len(d.names) : len(d.names)]
	}
	list := make([]string, n)
	for i := range list {
		list[i] = d.string()
	}
	return list
}

// sameString is string for a text that is often the same as the last.
func (d *decoder) sameString(last *string) string {
	n := d.count(1)
	if string(d.b[:n]) != *last {
		*last = string(d.b[:n])
	}
	d.b = d.b[n:]
	return *last
}

func (d *decoder) leases() []LeaseID {
	n := d.count(1)
	list := make([]LeaseID, 0, n)
	for range n {
		list = append(list, LeaseID(d.uint()))
	}
	return list
}

func (d *decoder) metadata() []Meta {
	n := d.count(2)
	if n == 0 {
		return nil
	}
	list := make([]Meta, n)
	for i := range list {
		list[i] = Meta{d.string(), d.string()}
	}
	return list
}

func (d *decoder) bools() (a, b bool) {
	a, b, c := d.threeBools()
	if c {
		d.fail("unknown flags")
	}
	return a, b
}

func (d *decoder) threeBools() (a, b, c bool) {
	v := d.byte()
	if v > 7 {
		d.fail("unknown flags")
	}
	return v&1 != 0, v&2 != 0, v&4 != 0
}
