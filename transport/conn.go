package transport

import (
	"context"
	"net"
	"runtime"
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

	streams atomic.Int64 // of Multiplex, that are open
	share   *lease.Share // of those

	headers atomic.Int64 // bytes, of calls under way that have many
	silent  atomic.Int64 // calls that have begun and not said what they ask
	cut     atomic.Bool  // for either of those

	since    time.Time
	answered atomic.Int64 // calls whose clients had not ended them
	debt     atomic.Int64 // see pause

	begun int // calls that the last read began; the reading goroutine's own
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
	c := &conn{Conn: raw, peer: l.peer, since: time.Now(), share: lease.NewShare(maxWaits)} // of the process
	c.remote = connAddr{raw.RemoteAddr(), c}
	c.box = l.s.unread.open(c.remote.String(), func() { raw.Close() })
	if l.s.seen != nil {
		l.s.seen(c)
	}
	return c, nil
}

// RemoteAddr implements net.Conn.
func (c *conn) RemoteAddr() net.Addr { return c.remote }

const (
	readBuffer = 8 << 10
	manyCalls  = 32 // begun by one read
	littleRead = 512
)

// Read implements net.Conn. Who sends without a pause lets others have a turn after
// each buffer, for a goroutine that never waits is stopped only every 10 ms; and who
// begins many calls at once is read little by little, for each is a goroutine.
func (c *conn) Read(p []byte) (int, error) {
	most := len(p)
	d := c.pause()
	if d > 0 {
		time.Sleep(d)
	}
	if d == longPause || d <= 0 && c.begun > manyCalls {
		most = min(most, littleRead)
	}
	c.begun = 0
	n, err := c.Conn.Read(p[:most])
	if n == most && (n >= readBuffer || most < len(p)) {
		runtime.Gosched()
	}
	return n, err
}

// Close implements net.Conn.
func (c *conn) Close() error {
	c.closed.Store(true)
	c.box.close()
	return c.Conn.Close()
}

// Calls that are begun and not gone on with, or ended by their client at once, are
// work for nothing: a connection may have freeCalls of them and debtPerSecond each
// second, and creditEach for each that was answered. A kibibyte of headers counts
// like a call. A connection beyond that is read more slowly, and ten times as slowly
// when it is far beyond; not more, for renewals may stand behind a pause.
const (
	freeCalls     = 256
	debtPerSecond = 1000
	creditEach    = 8
	shortPause    = 50 * time.Millisecond
	longPause     = 500 * time.Millisecond
)

// pause is how long the connection is not read for now.
func (c *conn) pause() time.Duration {
	debt := c.debt.Load() - freeCalls
	if debt <= 0 { // as for nearly all connections
		return 0
	}
	debt -= creditEach * c.answered.Load()
	earned := time.Duration(debt) * time.Second / debtPerSecond
	due := earned - time.Since(c.since) // of the process
	if due > 10*time.Second {
		return longPause
	}
	return min(due, shortPause)
}
