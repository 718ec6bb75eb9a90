package transport

import (
	"math"
	"net"
	"net/netip"
	"runtime"
	"sync"
	"sync/atomic"
	"time"
)

// What a client has the server do for nothing is a debt: each frame of HTTP/2 that it
// sends, for settings, pings and windows cost it next to nothing, and more for a call
// that is begun and not gone on with, or ended by its client at once. A kibibyte of
// headers counts like a call. What is asked pays for its own frames, once it has come
// whole, and each answer for some more. What is left is earned by time. A connection is
// in debt once that is more than is free; it is read more slowly then, and ten times as
// slowly when it is far beyond; not more, for renewals may stand behind a pause.
const (
	costOfCall    = 8                // frames
	freeDebt      = 256 * costOfCall // of a connection
	debtPerSecond = 500 * costOfCall // earned, by all connections of an address that are in debt together
	framesOfCall  = 3                // headers, and what acknowledges the answer
	framesOfItem  = 1                // what acknowledges that to a message of a stream
	creditEach    = 2 * costOfCall   // for an answer, and for each 4 KiB of those that are counted
	costOfOpening = 8 * costOfCall   // a connection on which nothing is answered
	shortPause    = 50 * time.Millisecond
	longPause     = 500 * time.Millisecond
	farBeyond     = 10 * debtPerSecond

	readBuffer = 8 << 10
	muchAtOnce = 32 * costOfCall // by one read
	littleRead = 512
	leastRead  = 64
)

// account is what a connection owes.
type account struct {
	source *source // nil for another member: nothing is counted
	debt   atomic.Int64
	useful atomic.Bool   // something was answered
	late   time.Duration // before the first read

	// The reading goroutine's own:
	begun  bool
	made   int64     // debt, by the last read
	handed int64     // bytes of answers that have been counted
	at     time.Time // up to then time has earned
	sharer bool      // counted by the source
}

// openAccount begins the account of a connection from an address that may be in debt.
func (c *conn) openAccount(s *sources, from net.Addr) {
	c.at = time.Now() // of the process
	c.source = s.open(prefixOf(from), c.at)
	owed, sharers := c.source.owed(c.at)
	if owed > freeDebt {
		// Who comes back after an outage pays it, too.
		c.late = min(earning(owed-freeDebt, 1), shortPause)
	}
	if owed > freeDebt || sharers > 0 {
		c.debt.Store(freeDebt - costOfOpening) // only its first call is free
	}
}

// closeAccount leaves what a connection owes to the next ones from its address. It is
// called once.
func (c *conn) closeAccount() {
	owed := max(c.debt.Load()-freeDebt, 0)
	if !c.useful.Load() {
		owed += costOfOpening
	}
	c.source.close(owed, time.Now()) // of the process
}

func (a *account) charge(n int64) { a.debt.Add(n) }
func (a *account) credit(n int64) { a.debt.Add(-n) }

// answered counts an answer.
func (a *account) answered() {
	if !a.useful.Load() {
		a.useful.Store(true)
	}
	a.credit(creditEach)
}

// owed is the debt beyond what is free, and how many connections of the address have
// one. What is earned when there is no debt is not kept. It is for the reading
// goroutine.
func (c *conn) owed() (debt int64, sharers int) {
	switch d := c.debt.Load(); {
	case d < 0:
		c.debt.CompareAndSwap(d, 0)
		return 0, 0
	case d <= freeDebt: // as of nearly all connections
		if c.sharer {
			c.sharer = false
			c.source.share(-1)
		}
		return 0, 0
	}
	if !c.sharer {
		c.sharer = true
		sharers = c.source.share(1)
	} else {
		sharers = c.source.share(0)
	}
	now := time.Now() // of the process
	handed := c.box.handed()
	earned := int64(now.Sub(c.at).Seconds()*debtPerSecond)/int64(sharers) + creditEach*((handed-c.handed)/countedBytes)
	c.at, c.handed = now, handed
	c.credit(min(earned, c.debt.Load()))
	return max(c.debt.Load()-freeDebt, 0), sharers
}

// earning is how long it takes until a debt has been earned.
func earning(debt int64, sharers int) time.Duration {
	return time.Duration(debt) * time.Second / debtPerSecond * time.Duration(sharers)
}

// pause is how long the connection is not read for now, and how much is read then.
func (c *conn) pause() (time.Duration, int) {
	owed, sharers := c.owed()
	switch {
	case owed == 0 && c.made <= muchAtOnce:
		return 0, math.MaxInt
	case owed == 0:
		return 0, littleRead
	case owed > farBeyond:
		return longPause, max(littleRead/sharers, leastRead)
	case c.made > muchAtOnce:
		return min(earning(owed, sharers), shortPause), max(littleRead/sharers, leastRead)
	}
	return min(earning(owed, sharers), shortPause), math.MaxInt
}

// Read implements net.Conn. Who sends without a pause lets others have a turn after
// each buffer, for a goroutine that never waits is stopped only every 10 ms; who
// begins much at once is read little by little, for each call is a goroutine; and who
// has much worked on waits until that is done.
func (c *conn) Read(p []byte) (int, error) {
	most := len(p)
	if c.source != nil {
		if c.late > 0 && !c.begun {
			time.Sleep(c.late)
		}
		c.begun = true
		c.awaitTurn()
		d, n := c.pause()
		if d > 0 {
			time.Sleep(d)
		}
		most = min(most, n)
	}
	n, err := c.Conn.Read(p[:most])
	if c.source != nil {
		c.made = c.received.in(p[:n])
		c.charge(c.made)
		c.calls.cutIfTooMuch(c)
	}
	if n == most && (n >= readBuffer || most < len(p)) {
		runtime.Gosched()
	}
	return n, err
}

// Write implements net.Conn.
func (c *conn) Write(p []byte) (int, error) {
	n, err := c.Conn.Write(p)
	if c.source != nil {
		c.sent.out(p[:n])
	}
	return n, err
}

const (
	// mostBusy is how many calls of one connection are worked on before more of it is
	// read; when very many are in all, fewBusy.
	mostBusy, fewBusy = 128, 8
	veryManyBusy      = 1024
	busyPause         = time.Millisecond
	busyPauses        = 100 // at most, whatever they wait for
)

// awaitTurn waits while many calls of the connection are being worked on.
func (c *conn) awaitTurn() {
	for range busyPauses {
		busy := c.busy.Load()
		if busy <= fewBusy || busy <= mostBusy && c.calls.busy.Load() <= veryManyBusy {
			return
		}
		time.Sleep(busyPause)
	}
}

// sources remembers the addresses that have connections, and those of which
// connections were in debt, until it has been earned.
type sources struct {
	mu   sync.Mutex
	m    map[netip.Prefix]*source
	idle int // without connections
}

// source is an address. Its sources' mutex guards it.
type source struct {
	of      *sources
	from    netip.Prefix
	conns   int
	sharers int       // of them, in debt
	debt    int64     // of connections that have been closed
	at      time.Time // when it was that
}

// mostSources bounds the addresses without connections that are remembered.
const mostSources = 4096

func newSources() *sources { return &sources{m: make(map[netip.Prefix]*source)} }

func (s *sources) open(from netip.Prefix, now time.Time) *source {
	s.mu.Lock()
	defer s.mu.Unlock()
	o := s.m[from]
	if o == nil {
		o = &source{of: s, from: from, at: now}
		s.m[from] = o
	} else if o.conns == 0 {
		s.idle--
	}
	o.conns++
	return o
}

// owed is the debt of an address, part of which is free, and how many of its
// connections are in debt.
func (o *source) owed(now time.Time) (debt int64, sharers int) {
	o.of.mu.Lock()
	defer o.of.mu.Unlock()
	return o.debtAt(now), o.sharers
}

func (o *source) debtAt(now time.Time) int64 {
	return max(o.debt-int64(now.Sub(o.at).Seconds()*debtPerSecond), 0)
}

// share counts connections in debt, and returns how many there are then, 1 at least.
func (o *source) share(n int) int {
	o.of.mu.Lock()
	defer o.of.mu.Unlock()
	o.sharers += n
	return max(o.sharers, 1)
}

// close counts a connection that is closed, and its debt.
func (o *source) close(debt int64, now time.Time) {
	s := o.of
	s.mu.Lock()
	defer s.mu.Unlock()
	o.conns--
	// Not more, so that an address is forgiven soon.
	o.debt, o.at = min(o.debtAt(now)+debt, freeDebt+farBeyond), now
	switch {
	case o.conns > 0:
	case o.debt == 0:
		delete(s.m, o.from)
	default:
		if s.idle++; s.idle > mostSources {
			s.forget(now)
		}
	}
}

// forget forgets some addresses without connections: first of all those that owe
// nothing.
func (s *sources) forget(now time.Time) {
	drop := func(owing bool, most int) {
		for from, o := range s.m {
			if s.idle <= most {
				return
			}
			if o.conns == 0 && (owing || o.debtAt(now) == 0) {
				delete(s.m, from)
				s.idle--
			}
		}
	}
	drop(false, 0)
	if s.idle > mostSources {
		drop(true, mostSources*3/4) // not each time
	}
}

// prefixOf is what counts as one address: of IPv6 what one customer has at least.
func prefixOf(addr net.Addr) netip.Prefix {
	tcp, ok := addr.(*net.TCPAddr)
	if !ok {
		return netip.Prefix{}
	}
	ip := tcp.AddrPort().Addr().Unmap().WithZone("")
	bits := ip.BitLen()
	if ip.Is6() {
		bits = 64
	}
	prefix, _ := ip.Prefix(bits)
	return prefix
}
