package e2e

import (
	"io"
	"net"
	"sync"
	"testing"
	"time"
)

// faulty is a TCP proxy before one server for one client, whose network can be
// harmed: either way held up, delayed, or all connections broken.
type faulty struct {
	target  string
	address string

	mu      sync.Mutex
	changed *sync.Cond
	held    [2]bool // to the server, from it
	delay   time.Duration
	conns   map[net.Conn]struct{}
	closed  bool
	group   sync.WaitGroup
}

const toServer, fromServer = 0, 1

func newFaulty(t testing.TB, target string) *faulty {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	p := &faulty{target: target, address: l.Addr().String(), conns: make(map[net.Conn]struct{})}
	p.changed = sync.NewCond(&p.mu)
	p.group.Go(func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			p.group.Go(func() { p.serve(c) })
		}
	})
	t.Cleanup(func() {
		l.Close()
		p.set(func() { p.closed = true })
		p.reset()
		p.group.Wait()
	})
	return p
}

func (p *faulty) set(fn func()) {
	p.mu.Lock()
	defer p.mu.Unlock()
	fn()
	p.changed.Broadcast()
}

// hold stops what goes one way, or both; what is sent goes on once mended.
func (p *faulty) hold(ways ...int) {
	p.set(func() {
		for _, w := range ways {
			p.held[w] = true
		}
	})
}

func (p *faulty) slow(d time.Duration) { p.set(func() { p.delay = d }) }

func (p *faulty) mend() { p.set(func() { p.held, p.delay = [2]bool{}, 0 }) }

// reset breaks all connections; new ones may be made.
func (p *faulty) reset() {
	p.set(func() {
		for c := range p.conns {
			if tcp, ok := c.(*net.TCPConn); ok {
				tcp.SetLinger(0)
			}
			c.Close()
		}
		clear(p.conns)
	})
}

func (p *faulty) serve(near net.Conn) {
	far, err := net.Dial("tcp", p.target)
	if err != nil {
		near.Close()
		return
	}
	ended := false
	p.set(func() {
		if ended = p.closed; !ended {
			p.conns[near], p.conns[far] = struct{}{}, struct{}{}
		}
	})
	if ended {
		near.Close()
		far.Close()
		return
	}
	p.group.Go(func() { p.carry(near, far, fromServer) })
	p.carry(far, near, toServer)
}

func (p *faulty) carry(to, from net.Conn, way int) {
	defer to.Close()
	defer from.Close()
	buf := make([]byte, 64<<10)
	for {
		n, err := from.Read(buf)
		if n > 0 {
			p.mu.Lock()
			for p.held[way] && !p.closed {
				p.changed.Wait()
			}
			d := p.delay
			p.mu.Unlock()
			time.Sleep(d)
			if _, err := to.Write(buf[:n]); err != nil {
				return
			}
		}
		if err != nil {
			if err != io.EOF {
				return
			}
			return
		}
	}
}
