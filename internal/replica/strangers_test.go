package replica

import (
	"net"
	"testing"
)

// from is a connection from an address.
type from struct {
	net.Conn
	host string
}

func (f from) RemoteAddr() net.Addr { return &net.TCPAddr{IP: net.ParseIP(f.host), Port: 4711} }

func TestWhoIsOneTooMany(t *testing.T) {
	s := newStrangers(4)
	var flood []*visit
	for range 3 {
		v, out := s.enter(from{host: "10.0.0.9"})
		if out != nil {
			t.Fatal("closed one while there was room")
		}
		flood = append(flood, v)
	}
	member, _ := s.enter(from{host: "10.0.0.1"})
	for range 10 {
		v, out := s.enter(from{host: "10.0.0.9"})
		if out != flood[0] {
			t.Fatalf("closed %v, not the oldest of those who have most", out)
		}
		flood = append(flood[1:], v)
	}
	if _, out := s.enter(from{host: "10.0.0.2"}); out != flood[0] {
		t.Fatalf("closed %v", out)
	}
	s.leave(member)
	s.leave(member)
	s.leave(flood[0]) // it is out already
	if s.count != 3 {
		t.Errorf("%d are in", s.count)
	}
	if _, out := s.enter(from{host: "10.0.0.3"}); out != nil || s.count != 4 {
		t.Errorf("closed %v, %d are in", out, s.count)
	}
}

// TestIdleStrangersKeepNobodyOut: whoever connects to a peer port and says
// nothing takes no room from those who do.
func TestIdleStrangersKeepNobodyOut(t *testing.T) {
	c := newCluster(t, 3, nil)
	l := c.leader()
	c.same(l)
	follower := c.nodes[c.others(l)[0]]
	cfg := c.stop(follower)
	var idle []net.Conn
	defer func() {
		for _, conn := range idle {
			conn.Close()
		}
	}()
	flood := func(address string) {
		for range 3 * defaultMaxStrangers {
			conn, err := net.Dial("tcp", address)
			if err != nil {
				t.Fatal(err)
			}
			idle = append(idle, conn)
		}
	}
	flood(l.cfg.PeerAddress)
	if _, err := c.nodes[c.others(l)[0]].peers.introduce(l.cfg.PeerAddress, hello{}); err != nil {
		t.Errorf("a member is not heard: %v", err)
	}
	follower = c.start(cfg)
	flood(follower.cfg.PeerAddress)
	acquire(t, l.Replica, 0)
	c.same(l)
}
