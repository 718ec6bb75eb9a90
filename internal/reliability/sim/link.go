package sim

import (
	"context"
	"io"
	"math/rand/v2"
	"net"
	"sync"
	"time"

	"github.com/jonboulle/clockwork"
)

// Drift returns a clock that runs at a rate of its own on the time of the
// synctest bubble, for a server or client that runs as it is.
func Drift(rate float64) clockwork.Clock {
	return drift{clockwork.NewRealClock(), time.Now(), rate}
}

type drift struct {
	clockwork.Clock
	origin time.Time
	rate   float64
}

// out turns a span of this clock into one of the bubble's, rounded up: a timer
// must not fire before its time.
func (d drift) out(t time.Duration) time.Duration {
	if t <= 0 {
		return 0
	}
	return time.Duration(float64(t)/d.rate) + 1
}

// Now implements clockwork.Clock.
func (d drift) Now() time.Time {
	return d.origin.Add(time.Duration(float64(time.Since(d.origin)) * d.rate))
}

// Since implements clockwork.Clock.
func (d drift) Since(t time.Time) time.Duration { return d.Now().Sub(t) }

// Until implements clockwork.Clock.
func (d drift) Until(t time.Time) time.Duration { return t.Sub(d.Now()) }

// After implements clockwork.Clock.
func (d drift) After(t time.Duration) <-chan time.Time { return d.Clock.After(d.out(t)) }

// Sleep implements clockwork.Clock.
func (d drift) Sleep(t time.Duration) { d.Clock.Sleep(d.out(t)) }

// NewTimer implements clockwork.Clock.
func (d drift) NewTimer(t time.Duration) clockwork.Timer {
	return driftTimer{d.Clock.NewTimer(d.out(t)), d}
}

// AfterFunc implements clockwork.Clock.
func (d drift) AfterFunc(t time.Duration, fn func()) clockwork.Timer {
	return driftTimer{d.Clock.AfterFunc(d.out(t), fn), d}
}

// NewTicker implements clockwork.Clock.
func (d drift) NewTicker(t time.Duration) clockwork.Ticker {
	return driftTicker{d.Clock.NewTicker(d.out(t)), d}
}

type driftTimer struct {
	clockwork.Timer
	d drift
}

// Reset implements clockwork.Timer.
func (t driftTimer) Reset(d time.Duration) bool { return t.Timer.Reset(t.d.out(d)) }

type driftTicker struct {
	clockwork.Ticker
	d drift
}

// Reset implements clockwork.Ticker.
func (t driftTicker) Reset(d time.Duration) { t.Ticker.Reset(t.d.out(d)) }

// Link is a network in memory between clients and a server: every way has a
// latency, and can be stopped or broken. It implements net.Listener for the
// server.
type Link struct {
	accept chan net.Conn
	closed chan struct{}
	once   sync.Once

	mu    sync.Mutex
	rng   *rand.Rand
	stall map[int]time.Time // by client: nothing passes until then
	slow  map[int]time.Duration
	ice   bool // nothing passes
	conns map[int][]net.Conn
}

// NewLink returns a network whose latencies a seed decides.
func NewLink(seed uint64) *Link {
	return &Link{
		accept: make(chan net.Conn), closed: make(chan struct{}), rng: rand.New(rand.NewPCG(seed, 77)),
		stall: make(map[int]time.Time), slow: make(map[int]time.Duration), conns: make(map[int][]net.Conn),
	}
}

// Accept implements net.Listener.
func (l *Link) Accept() (net.Conn, error) {
	select {
	case c := <-l.accept:
		return c, nil
	case <-l.closed:
		return nil, net.ErrClosed
	}
}

// Close implements net.Listener.
func (l *Link) Close() error {
	l.once.Do(func() { close(l.closed) })
	return nil
}

// Addr implements net.Listener.
func (l *Link) Addr() net.Addr { return &net.TCPAddr{IP: net.IPv4(10, 0, 0, 1), Port: 50051} }

// Dial connects a client.
func (l *Link) Dial(ctx context.Context, client int) (net.Conn, error) {
	near, a := net.Pipe()
	b, far := net.Pipe()
	go l.carry(client, a, b)
	go l.carry(client, b, a)
	l.mu.Lock()
	l.conns[client] = append(l.conns[client], near, far)
	l.mu.Unlock()
	select {
	case l.accept <- far:
		return near, nil
	case <-l.closed:
		return nil, net.ErrClosed
	case <-ctx.Done():
		return nil, ctx.Err()
	}
}

// carry takes bytes one way, in order, each piece after its latency.
func (l *Link) carry(client int, from, to net.Conn) {
	type piece struct {
		at   time.Time
		data []byte
	}
	way := make(chan piece, 1024)
	go func() {
		for p := range way {
			time.Sleep(time.Until(p.at))
			for {
				l.mu.Lock()
				until, ice := l.stall[client], l.ice
				l.mu.Unlock()
				if ice {
					time.Sleep(10 * time.Millisecond)
					continue
				}
				if d := time.Until(until); d > 0 {
					time.Sleep(d)
					continue
				}
				break
			}
			if _, err := to.Write(p.data); err != nil {
				break
			}
		}
		to.Close()
		from.Close()
		for range way {
			continue
		}
	}()
	defer close(way)
	for {
		buf := make([]byte, 32<<10)
		n, err := from.Read(buf)
		if n > 0 {
			l.mu.Lock()
			d := time.Duration(50+l.rng.IntN(1500))*time.Microsecond + l.slow[client]
			l.mu.Unlock()
			way <- piece{time.Now().Add(d), buf[:n]}
		}
		if err != nil {
			if err != io.EOF {
				from.Close()
			}
			return
		}
	}
}

// Stall lets nothing pass to or from a client for a while.
func (l *Link) Stall(client int, d time.Duration) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.stall[client] = time.Now().Add(d)
}

// Slow adds to a client's latency, each way.
func (l *Link) Slow(client int, d time.Duration) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.slow[client] = d
}

// Reset breaks a client's connections.
func (l *Link) Reset(client int) {
	l.mu.Lock()
	list := l.conns[client]
	l.conns[client] = nil
	l.mu.Unlock()
	for _, c := range list {
		c.Close()
	}
}

// Freeze lets nothing pass at all, until it is told so again.
func (l *Link) Freeze(frozen bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.ice = frozen
}

// Mend ends what Stall did. Who is slow, for he is far away, stays so.
func (l *Link) Mend() {
	l.mu.Lock()
	defer l.mu.Unlock()
	clear(l.stall)
}

// End closes the link and breaks every connection.
func (l *Link) End() {
	l.Close()
	l.Freeze(false)
	l.mu.Lock()
	var clients []int
	for client := range l.conns {
		clients = append(clients, client)
	}
	l.mu.Unlock()
	for _, client := range clients {
		l.Reset(client)
	}
}
