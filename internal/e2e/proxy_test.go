//go:build linux

package e2e

import (
	binaryenc "encoding/binary"
	"encoding/json"
	"io"
	"net"
	"strings"
	"sync"
	"testing"
	"time"
)

// partitions stands between the members of a cluster: each member's peer
// address is a proxy, which learns from the greeting who connects, so that
// each way between two members can be cut apart. What is sent over a cut way
// hangs, as it does where packets are dropped, and goes on once it is mended.
type partitions struct {
	t       testing.TB
	mu      sync.Mutex
	cut     map[way]bool
	delay   time.Duration
	changed chan struct{}
	open    map[net.Conn]struct{}
	closed  bool
	group   sync.WaitGroup
}

type way struct{ from, to string }

func newPartitions(t testing.TB) *partitions {
	p := &partitions{t: t, cut: make(map[way]bool), changed: make(chan struct{}), open: make(map[net.Conn]struct{})}
	t.Cleanup(func() {
		p.mu.Lock()
		p.closed = true
		for c := range p.open {
			c.Close()
		}
		close(p.changed)
		p.changed = make(chan struct{})
		p.mu.Unlock()
		p.group.Wait()
	})
	return p
}

// before puts a proxy before the member to, which listens at address.
func (p *partitions) before(to, address string) string {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		p.t.Fatal(err)
	}
	p.t.Cleanup(func() { l.Close() })
	p.group.Add(1)
	go func() {
		defer p.group.Done()
		for {
			conn, err := l.Accept()
			if err != nil {
				return
			}
			p.group.Add(1)
			go func() {
				defer p.group.Done()
				p.carry(conn, to, address)
			}()
		}
	}()
	return l.Addr().String()
}

// set cuts or mends ways.
func (p *partitions) set(cut bool, ways ...way) {
	p.mu.Lock()
	defer p.mu.Unlock()
	for _, w := range ways {
		p.cut[w] = cut
	}
	close(p.changed)
	p.changed = make(chan struct{})
}

// slow delays what is sent between members, each piece by d.
func (p *partitions) slow(d time.Duration) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.delay = d
}

// reset breaks all connections between members.
func (p *partitions) reset() {
	p.mu.Lock()
	defer p.mu.Unlock()
	for c := range p.open {
		if tcp, ok := c.(*net.TCPConn); ok {
			tcp.SetLinger(0)
		}
		c.Close()
	}
}

// mend ends all cuts and delays.
func (p *partitions) mend() {
	p.mu.Lock()
	defer p.mu.Unlock()
	clear(p.cut)
	p.delay = 0
	close(p.changed)
	p.changed = make(chan struct{})
}

// pass waits until a way is open; false at the end of the test.
func (p *partitions) pass(w way) bool {
	for {
		p.mu.Lock()
		cut, delay, changed, closed := p.cut[w], p.delay, p.changed, p.closed
		p.mu.Unlock()
		if closed {
			return false
		}
		if !cut {
			time.Sleep(delay)
			return true
		}
		<-changed
	}
}

func (p *partitions) track(c net.Conn) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.closed {
		c.Close()
		return false
	}
	p.open[c] = struct{}{}
	return true
}

func (p *partitions) drop(c net.Conn) {
	c.Close()
	p.mu.Lock()
	delete(p.open, c)
	p.mu.Unlock()
}

func (p *partitions) carry(in net.Conn, to, address string) {
	if !p.track(in) {
		return
	}
	defer p.drop(in)
	// The greeting: 16 bytes that never change, the kind, and JSON with its
	// length before it.
	in.SetReadDeadline(time.Now().Add(5 * time.Second))
	head := make([]byte, 16+1+2)
	if _, err := io.ReadFull(in, head); err != nil {
		return
	}
	text := make([]byte, binaryenc.BigEndian.Uint16(head[17:]))
	if _, err := io.ReadFull(in, text); err != nil {
		return
	}
	in.SetReadDeadline(time.Time{})
	var hello struct{ NodeID string }
	if err := json.Unmarshal(text, &hello); err != nil {
		return
	}
	name, _, _ := strings.Cut(hello.NodeID, "#") // without its data directory's incarnation
	there, back := way{name, to}, way{to, name}
	if !p.pass(there) {
		return
	}
	out, err := net.Dial("tcp", address)
	if err != nil || !p.track(out) {
		return
	}
	defer p.drop(out)
	out.Write(append(head, text...))
	p.group.Add(1)
	go func() {
		defer p.group.Done()
		p.copy(in, out, back)
	}()
	p.copy(out, in, there)
}

func (p *partitions) copy(to, from net.Conn, w way) {
	buf := make([]byte, 64<<10)
	for {
		n, err := from.Read(buf)
		if n > 0 {
			if !p.pass(w) {
				return
			}
			if _, err := to.Write(buf[:n]); err != nil {
				break
			}
		}
		if err != nil {
			break
		}
	}
	if p.pass(w) { // an end travels like anything else
		to.Close()
		from.Close()
	}
}
