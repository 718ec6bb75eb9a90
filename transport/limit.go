package transport

import (
	"net"
	"sync"
	"sync/atomic"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/keepalive"

	"github.com/distlock/distlock/lease"
)

// Limit bounds the connections that a listener has open. One too many is handed
// to refuse, which owns it and tells its client why; it is closed at once when
// refuseAtMost are being told already, or refuse is nil. A client must not use up
// what the log needs to go on: a descriptor for each file.
func Limit(l net.Listener, most int, refuse func(net.Conn)) net.Listener {
	return &limited{Listener: l, most: int64(most), refuse: refuse}
}

const (
	refuseAtMost = 16
	refuseWithin = time.Second
)

type limited struct {
	net.Listener
	most          int64
	open, refused atomic.Int64
	refuse        func(net.Conn)
}

// Accept implements net.Listener.
func (l *limited) Accept() (net.Conn, error) {
	for {
		conn, err := l.Listener.Accept()
		if err != nil {
			return nil, err
		}
		switch {
		case room(&l.open, l.most):
			return &counted{Conn: conn, in: &l.open}, nil
		case l.refuse != nil && room(&l.refused, refuseAtMost):
			l.refuse(&counted{Conn: conn, in: &l.refused})
		default:
			conn.Close()
		}
	}
}

// room counts one more, if there is room for it.
func room(in *atomic.Int64, most int64) bool {
	if in.Add(1) <= most {
		return true
	}
	in.Add(-1)
	return false
}

// counted is a connection that counts until it is closed.
type counted struct {
	net.Conn
	in   *atomic.Int64
	once sync.Once
}

// Close implements net.Conn.
func (c *counted) Close() error {
	err := c.Conn.Close()
	c.once.Do(func() { c.in.Add(-1) })
	return err
}

// refusing answers every call on connections for which there is no room, for a
// moment, so that their clients learn why.
type refusing struct {
	server *grpc.Server
	conns  *handed
}

func newRefusing(most int, refused func(reason string)) *refusing {
	err := &lease.ExhaustedError{What: "connections", Max: most}
	reason, _ := describe(err)
	r := &refusing{conns: &handed{ch: make(chan net.Conn), closed: make(chan struct{})}}
	r.server = grpc.NewServer(
		grpc.UnknownServiceHandler(func(any, grpc.ServerStream) error {
			refused(reason)
			return toStatus(err)
		}),
		grpc.ConnectionTimeout(refuseWithin), grpc.MaxConcurrentStreams(8), grpc.MaxHeaderListSize(16<<10),
		grpc.ReadBufferSize(4<<10), grpc.WriteBufferSize(4<<10),
		grpc.KeepaliveParams(keepalive.ServerParameters{MaxConnectionAge: refuseWithin, MaxConnectionAgeGrace: refuseWithin}),
	)
	return r
}

// handed is a listener of the connections that it is handed.
type handed struct {
	net.Listener
	ch     chan net.Conn
	closed chan struct{}
	once   sync.Once
}

func (h *handed) put(conn net.Conn) {
	select {
	case h.ch <- conn:
	case <-h.closed:
		conn.Close()
	}
}

// Accept implements net.Listener.
func (h *handed) Accept() (net.Conn, error) {
	select {
	case conn := <-h.ch:
		return conn, nil
	case <-h.closed:
		return nil, net.ErrClosed
	}
}

// Close implements net.Listener.
func (h *handed) Close() error {
	h.once.Do(func() { close(h.closed) })
	return nil
}

// Addr implements net.Listener.
func (h *handed) Addr() net.Addr { return &net.TCPAddr{} }
