// Package bound has the means to bound what one peer can make a server keep: a
// count, a listener with so many connections at most, and one that is handed them.
package bound

import (
	"net"
	"sync"
	"sync/atomic"
)

// Count counts what is under way, up to a bound. It may be used from any goroutine.
type Count struct{ n atomic.Int64 }

// Enter counts one more, if there is room for it below most.
func (c *Count) Enter(most int64) bool {
	if c.n.Add(1) <= most {
		return true
	}
	c.n.Add(-1)
	return false
}

// Leave ends one that was counted.
func (c *Count) Leave() { c.n.Add(-1) }

// RefusedAtMost bounds the connections that Listen has refused at once: of more the
// rest is closed without a word.
const RefusedAtMost = 16

// Listen bounds the connections that a listener has open. One too many is handed to
// refuse, which owns it and tells its client why; it is closed at once when
// RefusedAtMost are being told already, or refuse is nil. A client must not use up
// what the log needs to go on: a descriptor for each file.
func Listen(l net.Listener, most int, refuse func(net.Conn)) net.Listener {
	return &listener{Listener: l, most: int64(most), refuse: refuse}
}

type listener struct {
	net.Listener
	most          int64
	open, refused Count
	refuse        func(net.Conn)
}

// Accept implements net.Listener.
func (l *listener) Accept() (net.Conn, error) {
	for {
		conn, err := l.Listener.Accept()
		if err != nil {
			return nil, err
		}
		switch {
		case l.open.Enter(l.most):
			return &counted{Conn: conn, in: &l.open}, nil
		case l.refuse != nil && l.refused.Enter(RefusedAtMost):
			l.refuse(&counted{Conn: conn, in: &l.refused})
		default:
			conn.Close()
		}
	}
}

// counted is a connection that counts until it is closed.
type counted struct {
	net.Conn
	in   *Count
	once sync.Once
}

// Close implements net.Conn.
func (c *counted) Close() error {
	err := c.Conn.Close()
	c.once.Do(c.in.Leave)
	return err
}

// Handed is a listener of the connections that are put into it.
type Handed struct {
	addr   net.Addr
	conns  chan net.Conn
	closed chan struct{}
	once   sync.Once
}

// NewHanded returns one that gives its address as addr.
func NewHanded(addr net.Addr) *Handed {
	return &Handed{addr: addr, conns: make(chan net.Conn), closed: make(chan struct{})}
}

// Put waits until a connection has been accepted; once the listener is closed it
// closes the connection.
func (h *Handed) Put(conn net.Conn) {
	select {
	case h.conns <- conn:
	case <-h.closed:
		conn.Close()
	}
}

// Accept implements net.Listener.
func (h *Handed) Accept() (net.Conn, error) {
	select {
	case conn := <-h.conns:
		return conn, nil
	case <-h.closed:
		return nil, net.ErrClosed
	}
}

// Close implements net.Listener.
func (h *Handed) Close() error {
	h.once.Do(func() { close(h.closed) })
	return nil
}

// Addr implements net.Listener.
func (h *Handed) Addr() net.Addr { return h.addr }
