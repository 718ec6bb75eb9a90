package client_test

import (
	"net"
	"sync"
	"testing"
	"time"

	"github.com/distlock/distlock/client"
	"github.com/distlock/distlock/client/clienttest"
)

// A server that has stopped, and whose kernel still takes connections, is
// turned away from also by calls that are not on the stream.
func TestCallsLeaveASilentServer(t *testing.T) {
	s := clienttest.Start(t)
	silent, err := net.Listen("tcp", "127.0.0.1:0") // nobody accepts
	if err != nil {
		t.Fatal(err)
	}
	defer silent.Close()
	c, err := client.New([]string{silent.Addr().String(), s.Endpoint}, client.WithUnary())
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	l, err := c.Acquire(t.Context(), "a")
	if err != nil {
		t.Fatal(err)
	}
	l.Release(t.Context())
}

// TestABalancerThatSwallows packets of the connections that it has forgotten
// costs a client of one endpoint no lease: the next connection is its own.
func TestABalancerThatSwallows(t *testing.T) {
	t.Parallel()
	s := clienttest.Start(t)
	stop := make(chan struct{})
	var ticking sync.WaitGroup
	ticking.Go(func() { // the server's clock goes on with this machine's
		for last := time.Now(); ; {
			select {
			case <-stop:
				return
			case <-time.After(5 * time.Millisecond):
			}
			now := time.Now()
			s.Clock.Advance(now.Sub(last))
			last = now
		}
	})
	defer ticking.Wait()
	defer close(stop)
	b := newBalancer(t, s.Endpoint)
	for _, unary := range []bool{false, true} {
		var opts []client.Option
		if unary {
			opts = append(opts, client.WithUnary())
		}
		c, err := client.New([]string{b.address}, opts...)
		if err != nil {
			t.Fatal(err)
		}
		renewed := make(chan struct{}, 100)
		l, err := c.Acquire(t.Context(), "a", client.TTL(9*time.Second), client.OnRenew(func(time.Time) { renewed <- struct{}{} }))
		if err != nil {
			t.Fatal(err)
		}
		b.forget()
		select {
		case <-renewed:
		case <-l.Done():
			t.Errorf("unary %v: %v", unary, l.Err())
		}
		l.Release(t.Context())
		c.Close()
	}
}

// balancer passes bytes on, except on connections that it has forgotten.
type balancer struct {
	address string

	mu    sync.Mutex
	now   int // generation of the connections that it knows
	conns []net.Conn
}

func newBalancer(t *testing.T, to string) *balancer {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	b := &balancer{address: l.Addr().String()}
	var group sync.WaitGroup
	t.Cleanup(func() {
		l.Close()
		b.mu.Lock()
		for _, c := range b.conns {
			c.Close()
		}
		b.mu.Unlock()
		group.Wait()
	})
	group.Go(func() {
		for {
			near, err := l.Accept()
			if err != nil {
				return
			}
			far, err := net.Dial("tcp", to)
			if err != nil {
				near.Close()
				continue
			}
			b.mu.Lock()
			of := b.now
			b.conns = append(b.conns, near, far)
			b.mu.Unlock()
			pass := func(to, from net.Conn) {
				defer to.Close()
				defer from.Close()
				buf := make([]byte, 32<<10)
				for {
					n, err := from.Read(buf)
					b.mu.Lock()
					known := of == b.now
					b.mu.Unlock()
					if n > 0 && known {
						to.Write(buf[:n])
					}
					if err != nil {
						return
					}
				}
			}
			group.Go(func() { pass(far, near) })
			group.Go(func() { pass(near, far) })
		}
	})
	return b
}

func (b *balancer) forget() {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.now++
}
