package replica

import (
	"context"
	"net"
	"os"
	"sync"
	"time"
)

// network joins the replicas of a test and can be cut, each way apart. What
// is sent over a cut way is neither lost nor answered: it hangs, as it does
// in a network that drops packets, and goes on when the way is mended.
type network struct {
	mu      sync.Mutex
	cut     map[way]bool
	ids     map[string]string // node by peer address
	changed chan struct{}
	dialed  func(from, address string) // before it connects; may be nil
}

// way is from one node to another.
type way struct{ from, to string }

func newNetwork() *network {
	return &network{cut: make(map[way]bool), ids: make(map[string]string), changed: make(chan struct{})}
}

// set cuts or mends ways.
func (n *network) set(cut bool, ways ...way) {
	n.mu.Lock()
	defer n.mu.Unlock()
	for _, w := range ways {
		n.cut[w] = cut
	}
	close(n.changed)
	n.changed = make(chan struct{})
}

// both is the two ways between a node and others.
func both(id string, others ...string) (list []way) {
	for _, o := range others {
		list = append(list, way{id, o}, way{o, id})
	}
	return list
}

func (n *network) state(w way) (bool, <-chan struct{}) {
	n.mu.Lock()
	defer n.mu.Unlock()
	return n.cut[w], n.changed
}

// dialer is Config.dial of a node.
func (n *network) dialer(from string) func(context.Context, string) (net.Conn, error) {
	return func(ctx context.Context, address string) (net.Conn, error) {
		n.mu.Lock()
		to, dialed := n.ids[address], n.dialed
		n.mu.Unlock()
		if dialed != nil {
			dialed(from, address)
		}
		for {
			there, changed := n.state(way{from, to})
			back, _ := n.state(way{to, from})
			if !there && !back {
				break
			}
			select {
			case <-changed:
			case <-ctx.Done():
				return nil, ctx.Err()
			}
		}
		conn, err := (&net.Dialer{}).DialContext(ctx, "tcp", address)
		if err != nil {
			return nil, err
		}
		return &link{Conn: conn, n: n, out: way{from, to}, in: way{to, from}, closed: make(chan struct{})}, nil
	}
}

// link is one connection over the network, at the end that dialed it.
type link struct {
	net.Conn
	n       *network
	out, in way
	once    sync.Once
	closed  chan struct{}

	mu       sync.Mutex
	deadline [2]time.Time // of reads and writes
}

func (l *link) pass(w way, which int) error {
	for {
		cut, changed := l.n.state(w)
		if !cut {
			return nil
		}
		l.mu.Lock()
		deadline := l.deadline[which]
		l.mu.Unlock()
		var late <-chan time.Time
		if !deadline.IsZero() {
			late = time.After(time.Until(deadline))
		}
		select {
		case <-changed:
		case <-late:
			return os.ErrDeadlineExceeded
		case <-time.After(20 * time.Millisecond): // the deadline may have moved
		case <-l.closed:
			return net.ErrClosed
		}
	}
}

func (l *link) Write(p []byte) (int, error) {
	if err := l.pass(l.out, 1); err != nil {
		return 0, err
	}
	return l.Conn.Write(p)
}

func (l *link) Read(p []byte) (int, error) {
	n, err := l.Conn.Read(p)
	if err == nil {
		if err := l.pass(l.in, 0); err != nil {
			l.Close()
			return 0, err
		}
	}
	return n, err
}

func (l *link) Close() error {
	l.once.Do(func() { close(l.closed) })
	return l.Conn.Close()
}

func (l *link) SetDeadline(t time.Time) error {
	l.SetReadDeadline(t)
	return l.SetWriteDeadline(t)
}

func (l *link) SetReadDeadline(t time.Time) error {
	l.mu.Lock()
	l.deadline[0] = t
	l.mu.Unlock()
	return l.Conn.SetReadDeadline(t)
}

func (l *link) SetWriteDeadline(t time.Time) error {
	l.mu.Lock()
	l.deadline[1] = t
	l.mu.Unlock()
	return l.Conn.SetWriteDeadline(t)
}
