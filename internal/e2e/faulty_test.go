//go:build linux

package e2e

import (
	"context"
	"io"
	"net"
	"strings"
	"sync"
	"testing"
	"time"

	"google.golang.org/grpc"

	"github.com/distlock/distlock/client"
)

// faulty is one client's network: a TCP proxy before each server, which can be
// harmed: either way held up, delayed, or all connections broken.
type faulty struct {
	addresses map[string]string // of the proxy, by that of the server

	mu      sync.Mutex
	changed *sync.Cond
	held    [2]bool // to the servers, from them
	only    string  // the server that is held up; all where it is empty
	delay   time.Duration
	twin    bool // what the client sends on a new connection reaches the server on a second one, too
	conns   map[net.Conn]struct{}
	lost    map[net.Conn]struct{} // those that carry nothing any more
	closed  bool
	group   sync.WaitGroup
}

const toServer, fromServer = 0, 1

func newFaulty(t testing.TB, servers ...string) *faulty {
	t.Helper()
	p := &faulty{addresses: make(map[string]string), conns: make(map[net.Conn]struct{}), lost: make(map[net.Conn]struct{})}
	p.changed = sync.NewCond(&p.mu)
	var listeners []net.Listener
	t.Cleanup(func() {
		for _, l := range listeners {
			l.Close()
		}
		p.set(func() { p.closed = true })
		p.reset()
		p.group.Wait()
	})
	for _, server := range servers {
		l, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		listeners = append(listeners, l)
		p.addresses[server] = l.Addr().String()
		p.group.Go(func() {
			for {
				c, err := l.Accept()
				if err != nil {
					return
				}
				p.group.Go(func() { p.serve(c, server) })
			}
		})
	}
	return p
}

// pairs names each server and the proxy before it, for a process of clients.
func (p *faulty) pairs(servers []string) string {
	var list []string
	for _, s := range servers {
		list = append(list, s+"="+p.addresses[s])
	}
	return strings.Join(list, ",")
}

// through is the other side of pairs: the servers, and how to reach each.
func through(pairs string) (endpoints []string, dial client.Option) {
	proxies := map[string]string{}
	for _, pair := range strings.Split(pairs, ",") {
		server, proxy, _ := strings.Cut(pair, "=")
		endpoints, proxies[server] = append(endpoints, server), proxy
	}
	return endpoints, client.WithDialOptions(grpc.WithContextDialer(func(ctx context.Context, server string) (net.Conn, error) {
		return new(net.Dialer).DialContext(ctx, "tcp", proxies[server])
	}))
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

func (p *faulty) mend() { p.set(func() { p.held, p.only, p.delay, p.twin = [2]bool{}, "", 0, false }) }

// swallow has the connections that there are carry nothing any more, though
// they stay open: new ones may be made.
func (p *faulty) swallow() {
	p.set(func() {
		for c := range p.conns {
			p.lost[c] = struct{}{}
		}
	})
}

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

func (p *faulty) serve(near net.Conn, server string) {
	far, err := net.Dial("tcp", server)
	if err != nil {
		near.Close()
		return
	}
	ended, twin := false, false
	p.set(func() {
		if ended, twin = p.closed, p.twin; !ended {
			p.conns[near], p.conns[far] = struct{}{}, struct{}{}
		}
	})
	if ended {
		near.Close()
		far.Close()
		return
	}
	var second net.Conn
	if twin {
		if second, err = net.Dial("tcp", server); err == nil {
			p.group.Go(func() { io.Copy(io.Discard, second) })
			defer second.Close()
		}
	}
	p.group.Go(func() { p.carry(near, far, nil, server, fromServer) })
	p.carry(far, near, second, server, toServer)
}

// carry takes bytes one way, and to the second, if there is one, as well.
func (p *faulty) carry(to, from, second net.Conn, server string, way int) {
	defer to.Close()
	defer from.Close()
	defer p.set(func() {
		delete(p.conns, from)
		delete(p.lost, from)
	})
	buf := make([]byte, 64<<10)
	for {
		n, err := from.Read(buf)
		if n > 0 {
			p.mu.Lock()
			for p.held[way] && (p.only == "" || p.only == server) && !p.closed {
				p.changed.Wait()
			}
			d := p.delay
			_, lost := p.lost[from]
			p.mu.Unlock()
			if lost {
				continue
			}
			time.Sleep(d)
			if second != nil {
				second.Write(buf[:n])
			}
			if _, err := to.Write(buf[:n]); err != nil {
				return
			}
		}
		if err != nil {
			return
		}
	}
}
