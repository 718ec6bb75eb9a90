package transport

import (
	"context"
	"net"
	"sync"
	"sync/atomic"
	"time"

	"google.golang.org/grpc/peer"

	"github.com/distlock/distlock/lease"
)

// conn is a connection of a client, or of another member, with all that the server
// keeps for it. A call finds its own by connOf.
type conn struct {
	net.Conn
	remote connAddr
	peer   bool        // of another member
	closed atomic.Bool // gRPC closes a lost connection before it cancels the calls on it
	box    *outbox     // what waits to be read

	share *lease.Share // of all streams of Multiplex
	mu    sync.Mutex
	ports map[*lease.Port]struct{} // of those that are open

	calls    *calls
	streams  *streams // calls under way, and what is kept of what they ask
	received received
	sent     sent
	headers  atomic.Int64 // bytes of headers, of calls under way that have many
	handled  atomic.Int64 // calls that have been asked and not answered
	busy     atomic.Int64 // unary calls that are being worked on
	cut      atomic.Bool  // closed, for too much of all that
	idle     time.Time    // since when it has too many idle calls; of calls.look

	account // see pace.go
}

// connAddr is what gRPC gives to calls as the address of their client.
type connAddr struct {
	net.Addr
	of *conn
}

// connOf is the connection of a call, nil outside of Serve.
func connOf(ctx context.Context) *conn {
	if p, ok := peer.FromContext(ctx); ok {
		if a, ok := p.Addr.(connAddr); ok {
			return a.of
		}
	}
	return nil
}

// boxOf is what waits for a call's client, nil outside of Serve.
func boxOf(ctx context.Context) *outbox {
	if c := connOf(ctx); c != nil {
		return c.box
	}
	return nil
}

// endOf is why a call's context, which has ended, did: its own error, or
// ErrDetached.
func endOf(ctx context.Context) error {
	if c := connOf(ctx); c != nil && (c.peer || c.closed.Load()) {
		return lease.ErrDetached // a member abandons what its client cancels
	}
	return ctx.Err()
}

// listener makes conns of what it accepts.
type listener struct {
	net.Listener
	peer bool // of other members
	s    *Server
}

// Accept implements net.Listener.
func (l listener) Accept() (net.Conn, error) {
	raw, err := l.Listener.Accept()
	if err != nil {
		return nil, err
	}
	c := &conn{Conn: raw, peer: l.peer, share: lease.NewShare(maxWaits, maxOnConn), ports: make(map[*lease.Port]struct{}), calls: l.s.calls, streams: newStreams(l.s.calls)}
	c.received, c.sent = newReceived(c.streams), sent{streams: c.streams}
	if !c.peer {
		c.calls.open(c)
		c.openAccount(l.s.sources, raw.RemoteAddr())
	}
	c.remote = connAddr{raw.RemoteAddr(), c}
	c.box = l.s.unread.open(c.remote.String(), func() { raw.Close() })
	if l.s.seen != nil {
		l.s.seen(c)
	}
	return c, nil
}

// newPort returns a port for one more stream: the nth of a connection has an nth of
// what one alone has.
func (c *conn) newPort(m Manager) *lease.Port {
	c.mu.Lock()
	defer c.mu.Unlock()
	port := m.NewPort(max(maxUnderWay/(len(c.ports)+1), leastUnderWay), c.share)
	c.ports[port] = struct{}{}
	return port
}

// forget is told that a port's stream is over.
func (c *conn) forget(port *lease.Port) {
	c.mu.Lock()
	defer c.mu.Unlock()
	delete(c.ports, port)
}

// RemoteAddr implements net.Conn.
func (c *conn) RemoteAddr() net.Addr { return c.remote }

// Close implements net.Conn.
func (c *conn) Close() error {
	if !c.closed.Swap(true) && c.source != nil {
		c.calls.close(c)
		c.closeAccount()
	}
	c.box.close()
	return c.Conn.Close()
}
