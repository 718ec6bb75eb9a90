package transport

import (
	"maps"
	"net"
	"net/netip"
	"runtime"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/net/http2"
)

// What a client has the server do for nothing is a debt: each frame of HTTP/2 that it
// sends, for settings, pings and windows cost it next to nothing, and more for a call
// that is begun and not gone on with, or ended by its client at once. A kibibyte of
// headers counts like a call. A connection is in debt once that is more than is free,
// earned by time, and earned by answers; it is read more slowly then, and ten times as
// slowly when it is far beyond; not more, for renewals may stand behind a pause.
const (
	costOfCall    = 8                // frames
	freeDebt      = 256 * costOfCall // of a connection
	debtPerSecond = 500 * costOfCall // earned
	creditEach    = 8 * costOfCall   // for an answer, and for each 4 KiB of those that are counted
	costOfOpening = 8 * costOfCall   // a connection on which nothing is answered
	shortPause    = 50 * time.Millisecond
	longPause     = 500 * time.Millisecond
	farBeyond     = 10 * debtPerSecond

	readBuffer = 8 << 10
	muchAtOnce = 32 * costOfCall // by one read
	littleRead = 512
)

// account is what a connection owes.
type account struct {
	sources  *sources // nil for another member: nothing is counted
	from     netip.Prefix
	since    time.Time
	answered atomic.Int64 // calls whose clients had not ended them
	debt     atomic.Int64

	late time.Duration // before the first read

	// The reading goroutine's own:
	begun bool
	read  frameCount
	made  int64 // debt, by the last read
}

// open begins the account of a connection from an address that may be in debt.
func (a *account) open(s *sources, from net.Addr, peer bool) {
	a.since = time.Now() // of the process
	a.read.skip = len(http2.ClientPreface)
	if peer {
		return
	}
	a.sources, a.from = s, prefixOf(from)
	if owed := s.owed(a.from, a.since); owed > freeDebt {
		a.debt.Store(freeDebt)                           // nothing is free
		a.late = min(earning(owed-freeDebt), shortPause) // who comes back after an outage pays it, too
	}
}

// settle leaves what a connection owes to the next ones from its address.
func (a *account) settle(handed int64) {
	if a.sources == nil {
		return
	}
	owed := max(a.owed(handed), 0)
	if a.answered.Load() == 0 && handed == 0 {
		owed += costOfOpening
	}
	a.sources.add(a.from, owed, time.Now()) // of the process
}

func (a *account) charge(n int64) { a.debt.Add(n) }
func (a *account) credit(n int64) { a.debt.Add(-n) }

// owed is the debt beyond what is free and has been earned; handed are the bytes of
// answers that are counted.
func (a *account) owed(handed int64) int64 {
	debt := a.debt.Load() - freeDebt
	if debt <= 0 { // as for nearly all connections
		return 0
	}
	debt -= creditEach * (a.answered.Load() + handed/countedBytes)
	return debt - int64(time.Since(a.since).Seconds()*debtPerSecond) // of the process
}

// earning is how long it takes until a debt has been earned.
func earning(debt int64) time.Duration { return time.Duration(debt) * time.Second / debtPerSecond }

// pause is how long the connection is not read for now.
func (c *conn) pause() time.Duration {
	if c.debt.Load() <= freeDebt {
		return 0
	}
	switch owed := c.owed(c.box.handed()); {
	case owed <= 0:
		return 0
	case owed > farBeyond:
		return longPause
	default:
		return min(earning(owed), shortPause)
	}
}

// Read implements net.Conn. Who sends without a pause lets others have a turn after
// each buffer, for a goroutine that never waits is stopped only every 10 ms; and who
// begins much at once is read little by little, for each call is a goroutine.
func (c *conn) Read(p []byte) (int, error) {
	if c.late > 0 && !c.begun {
		time.Sleep(c.late)
	}
	c.begun = true
	most := len(p)
	d := c.pause()
	if d > 0 {
		time.Sleep(d)
	}
	if d == longPause || c.made > muchAtOnce {
		most = min(most, littleRead)
	}
	n, err := c.Conn.Read(p[:most])
	if c.made = 0; c.sources != nil {
		c.made = c.read.frames(p[:n])
		c.charge(c.made)
	}
	if n == most && (n >= readBuffer || most < len(p)) {
		runtime.Gosched()
	}
	return n, err
}

// frameCount counts the frames of HTTP/2 in what is read. Of something else it counts
// what it takes for frames.
type frameCount struct {
	head [9]byte
	have int // of head
	skip int // what is left of a payload, or of what a connection begins with
}

func (f *frameCount) frames(p []byte) (n int64) {
	for {
		skip := min(f.skip, len(p))
		f.skip -= skip
		p = p[skip:]
		if len(p) == 0 {
			return n
		}
		got := copy(f.head[f.have:], p)
		p = p[got:]
		if f.have += got; f.have == len(f.head) {
			f.have, f.skip = 0, int(f.head[0])<<16|int(f.head[1])<<8|int(f.head[2])
			n++
		}
	}
}

// sources remembers which addresses have made connections that are in debt, until it
// has been earned.
type sources struct {
	mu sync.Mutex
	m  map[netip.Prefix]source
}

type source struct {
	debt int64
	at   time.Time // when it was that
}

// mostSources is how many are remembered before those are forgotten that owe nothing.
const mostSources = 4096

func newSources() *sources { return &sources{m: make(map[netip.Prefix]source)} }

// owed is the debt of an address, part of which is free.
func (s *sources) owed(from netip.Prefix, now time.Time) int64 {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.m[from].owed(now)
}

func (s source) owed(now time.Time) int64 {
	return max(s.debt-int64(now.Sub(s.at).Seconds()*debtPerSecond), 0)
}

func (s *sources) add(from netip.Prefix, debt int64, now time.Time) {
	if debt == 0 {
		return
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if len(s.m) >= mostSources {
		maps.DeleteFunc(s.m, func(_ netip.Prefix, o source) bool { return o.owed(now) == 0 })
	}
	if _, known := s.m[from]; !known && len(s.m) >= mostSources {
		for other := range s.m { // any
			delete(s.m, other)
			break
		}
	}
	// Not more, so that an address is forgiven soon.
	s.m[from] = source{min(s.m[from].owed(now)+debt, freeDebt+farBeyond), now}
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
