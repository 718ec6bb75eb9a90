package replica

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"errors"
	"fmt"
	"io"
	"math/big"
	mathrand "math/rand/v2"
	"net"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/hashicorp/raft"

	"github.com/distlock/distlock/lease"
	"github.com/distlock/distlock/lease/machine"
)

// node is one replica of a test's cluster.
type node struct {
	*Replica
	cfg   Config
	store *lease.Store

	mu    sync.Mutex
	state lease.Leadership // as last told
	done  chan struct{}    // Leadership is closed
}

// cluster is some replicas on one network.
type cluster struct {
	t     *testing.T
	net   *network
	nodes map[string]*node
	alter func(*Config)
}

// lastPort is the last that freeAddress has tried; the first one is chosen at
// random, for there may be other runs of these tests beside this one.
var lastPort atomic.Uint32

func init() { lastPort.Store(mathrand.Uint32N(1 << 16)) }

// freeAddress returns an address that nobody listens on, and that it has not
// returned for long: below those ports that the kernel gives to connections,
// one of which might take it before its node does.
func freeAddress(t *testing.T) string {
	t.Helper()
	const first, count = 2_000, 8_000
	for range count {
		l, err := net.Listen("tcp", fmt.Sprintf("127.0.0.1:%d", first+lastPort.Add(1)%count))
		if err == nil {
			defer l.Close()
			return l.Addr().String()
		}
	}
	t.Fatal("no port is free")
	return ""
}

// newCluster starts n members of a new cluster, n1, n2, …, and waits until each has
// the first entry of the log: who is stopped before that knows of no cluster.
func newCluster(t *testing.T, n int, alter func(*Config)) *cluster {
	t.Helper()
	c := &cluster{t: t, net: newNetwork(), nodes: make(map[string]*node), alter: alter}
	members := make(map[string]string)
	for i := range n {
		members[fmt.Sprintf("n%d", i+1)] = freeAddress(t)
	}
	for id, address := range members {
		c.start(Config{NodeID: id, PeerAddress: address, InitialCluster: members})
	}
	for id, node := range c.nodes {
		eventually(t, id+" is a member", func() bool { return len(node.configuration().servers.Servers) == n })
	}
	return c
}

// start starts a node, on a directory of its own unless it has one.
func (c *cluster) start(cfg Config) *node {
	c.t.Helper()
	n, err := c.tryStart(cfg)
	if err != nil {
		c.t.Fatal(err)
	}
	return n
}

func (c *cluster) tryStart(cfg Config) (*node, error) {
	c.t.Helper()
	if cfg.Dir == "" {
		cfg.Dir = filepath.Join(c.t.TempDir(), "data")
	}
	cfg.Store = lease.NewStore(0)
	cfg.SegmentSize = 1 << 20
	cfg.ClientAddress = "client-of-" + cfg.NodeID
	cfg.dial = c.net.dialer(cfg.NodeID)
	if cfg.ElectionTimeout == 0 {
		cfg.ElectionTimeout = 500 * time.Millisecond // on a busy machine nobody is to be deposed for nothing
	}
	if c.alter != nil {
		c.alter(&cfg)
	}
	c.net.mu.Lock()
	c.net.ids[cfg.PeerAddress] = cfg.NodeID
	c.net.mu.Unlock()
	r, err := Open(cfg)
	if err != nil {
		return nil, err
	}
	n := &node{Replica: r, cfg: cfg, store: cfg.Store, done: make(chan struct{})}
	go func() {
		defer close(n.done)
		for l := range r.Leadership() {
			n.mu.Lock()
			n.state = l
			n.mu.Unlock()
		}
	}()
	c.nodes[cfg.NodeID] = n
	c.t.Cleanup(func() { n.Close(); <-n.done })
	return n, nil
}

// stop stops a node and returns how to start it again.
func (c *cluster) stop(n *node) Config {
	c.t.Helper()
	if err := n.Close(); err != nil {
		c.t.Fatal(err)
	}
	<-n.done
	delete(c.nodes, n.nodeID)
	return n.cfg
}

// end is where the others reach it.
func (n *node) end() end { return end{n.self, n.cfg.PeerAddress} }

func (n *node) told() lease.Leadership {
	n.mu.Lock()
	defer n.mu.Unlock()
	return n.state
}

// eventually waits until ok says so.
func eventually(t *testing.T, what string, ok func() bool) {
	t.Helper()
	for until := time.Now().Add(20 * time.Second); !ok(); time.Sleep(5 * time.Millisecond) {
		if time.Now().After(until) {
			t.Fatalf("%s: not within 20s", what)
		}
	}
}

// leader waits until one of the nodes serves, except those named.
func (c *cluster) leader(except ...string) (found *node) {
	c.t.Helper()
	eventually(c.t, "a leader", func() bool {
		for id, n := range c.nodes {
			if n.told().Leader && !strings.Contains(strings.Join(except, " "), id) && n.raft.State() == raft.Leader {
				found = n
				return true
			}
		}
		return false
	})
	return found
}

func (c *cluster) others(n *node) (ids []string) {
	for id := range c.nodes {
		if id != n.nodeID {
			ids = append(ids, id)
		}
	}
	return ids
}

// confirms tells what a round of confirmation says.
func (n *node) confirms(term uint64) error {
	done := make(chan error, 1)
	n.Confirm(term, func(err error) { done <- err })
	return <-done
}

func (n *node) bytes() []byte {
	var b bytes.Buffer
	n.store.View().Snapshot(func(chunk []byte) error { b.Write(chunk); return nil })
	return b.Bytes()
}

// same waits until all nodes have applied what the leader has: their states
// are the same then, byte by byte.
func (c *cluster) same(leader *node) {
	c.t.Helper()
	for id, n := range c.nodes {
		eventually(c.t, id+" has applied what "+leader.nodeID+" has", func() bool {
			return n.AppliedIndex() >= leader.raft.LastIndex() && bytes.Equal(n.bytes(), leader.bytes())
		})
		ours, theirs := n.configuration(), n.raft.GetConfiguration().Configuration()
		if ours.index == 0 || !reflect.DeepEqual(ours.servers, theirs) {
			c.t.Errorf("%s takes %+v for the latest configuration, raft %+v", id, ours, theirs)
		}
	}
}

func TestClusterReplicates(t *testing.T) {
	c := newCluster(t, 3, nil)
	l := c.leader()
	for i := range 50 {
		acquire(t, l.Replica, i)
	}
	c.same(l)
	if err := l.confirms(l.told().Term); err != nil {
		t.Errorf("the leader of a whole cluster: %v", err)
	}
	for id, n := range c.nodes {
		eventually(t, id+" knows the leader and the cluster", func() bool {
			return n.ClusterID() == l.ClusterID() && n.ClusterID() != "" && (n == l || n.told().Hint == "client-of-"+l.nodeID)
		})
		if _, err := propose(n.Replica, &machine.Declare{Name: "x"}); n != l && !errors.Is(err, lease.ErrNotLeader) {
			t.Errorf("%s took a proposal: %v", id, err)
		}
		list, leader, _ := n.Members()
		if len(list) != 3 || leader != l.nodeID {
			t.Errorf("%s: members %v, leader %q", id, list, leader)
		}
		for _, m := range list {
			if !m.Healthy || m.Role != lease.RoleVoter || m.ClientAddress != "client-of-"+m.ID || m.Leader != (m.ID == l.nodeID) {
				t.Errorf("%s: %+v", id, m)
			}
		}
	}
}

func TestFailoverKeepsEverything(t *testing.T) {
	c := newCluster(t, 3, nil)
	for round := range 3 {
		l := c.leader()
		for i := range 20 {
			acquire(t, l.Replica, round*20+i)
		}
		cfg := c.stop(l)
		next := c.leader()
		if got := locks(t, next.store); got != (round+1)*20 {
			t.Fatalf("%d locks after the fail-over, %d were granted", got, (round+1)*20)
		}
		acquireOne := next.store.View().LastToken()
		if int(acquireOne) != (round+1)*20 {
			t.Fatalf("last token %d", acquireOne)
		}
		c.start(cfg)
		c.same(c.leader())
	}
}

// TestCutOffLeaderConfirmsNothing: whoever is alone proves nothing, however
// long it goes on to think that it leads.
func TestCutOffLeaderConfirmsNothing(t *testing.T) {
	for _, row := range []struct {
		name string
		ways func(l string, others []string) []way
	}{
		{"both ways", func(l string, others []string) []way { return both(l, others...) }},
		{"nothing comes in", func(l string, others []string) (list []way) {
			for _, o := range others {
				list = append(list, way{o, l})
			}
			return list
		}},
		{"nothing goes out", func(l string, others []string) (list []way) {
			for _, o := range others {
				list = append(list, way{l, o})
			}
			return list
		}},
	} {
		t.Run(row.name, func(t *testing.T) {
			c := newCluster(t, 3, nil)
			l := c.leader()
			acquire(t, l.Replica, 0)
			term := l.told().Term
			c.net.set(true, row.ways(l.nodeID, c.others(l))...)
			if err := l.confirms(term); !errors.Is(err, lease.ErrNotLeader) {
				t.Errorf("cut off, it confirmed: %v", err)
			}
			next := c.leader(l.nodeID)
			acquire(t, next.Replica, 1)
			if err := l.confirms(term); !errors.Is(err, lease.ErrNotLeader) {
				t.Errorf("deposed, it confirmed: %v", err)
			}
			c.net.set(false, row.ways(l.nodeID, c.others(l))...)
			c.same(c.leader())
		})
	}
}

// TestLearnerConfirmsNothing: a learner that the leader reaches is no voter.
func TestLearnerConfirmsNothing(t *testing.T) {
	c := newCluster(t, 3, nil)
	l := c.leader()
	learner := c.start(Config{NodeID: "n4", PeerAddress: freeAddress(t), Join: true})
	if _, err := l.AddMember("n4", learner.cfg.PeerAddress, ""); err != nil {
		t.Fatal(err)
	}
	acquire(t, l.Replica, 0)
	c.same(l)
	if role := learner.Role(); role != lease.RoleLearner {
		t.Fatalf("n4 is a %q", role)
	}
	term := l.told().Term
	var voters []string
	for _, id := range c.others(l) {
		if id != "n4" {
			voters = append(voters, id)
		}
	}
	c.net.set(true, both(l.nodeID, voters...)...)
	if about, err := l.about(learner.end(), 5*time.Second); err != nil || about.GetNodeId() != string(learner.self) {
		t.Fatalf("the learner is to be reachable: %v", err)
	}
	if err := l.confirms(term); !errors.Is(err, lease.ErrNotLeader) {
		t.Errorf("with a learner only, it confirmed: %v", err)
	}
	c.net.set(false, both(l.nodeID, voters...)...)
	c.same(c.leader())
}

// TestAcknowledgementsInFlightConfirmNothing: answers of the voters that are
// on their way to the old leader while a new one is elected must not confirm
// what it is asked afterwards.
func TestAcknowledgementsInFlightConfirmNothing(t *testing.T) {
	c := newCluster(t, 3, nil)
	l := c.leader()
	acquire(t, l.Replica, 0)
	term := l.told().Term
	var in []way
	for _, o := range c.others(l) {
		in = append(in, way{o, l.nodeID})
	}
	c.net.set(true, in...) // questions go out, answers hang
	early := make(chan error, 1)
	l.Confirm(term, func(err error) { early <- err })
	next := c.leader(l.nodeID)
	acquire(t, next.Replica, 1)
	late := make(chan error, 1)
	l.Confirm(term, func(err error) { late <- err })
	c.net.set(false, in...) // the answers arrive
	if err := <-late; !errors.Is(err, lease.ErrNotLeader) {
		t.Errorf("a new leader had been elected, and the old one confirmed: %v", err)
	}
	if err := <-early; !errors.Is(err, lease.ErrNotLeader) {
		t.Errorf("it does not lead any more when the round ends, and confirmed: %v", err)
	}
}

// TestBothMajoritiesConfirm: while the membership changes, a majority of the
// members before counts as well as one of those after.
func TestBothMajoritiesConfirm(t *testing.T) {
	voter := func(ids ...string) configuration {
		var c configuration
		for _, id := range ids {
			c.servers.Servers = append(c.servers.Servers, raft.Server{ID: raft.ServerID(id)})
		}
		return c
	}
	for _, row := range []struct {
		before, after []string
		yes, no       string
		won, lost     bool
	}{
		{[]string{"1", "2", "3"}, nil, "1 2", "", true, false},
		{[]string{"1", "2", "3"}, nil, "1", "2", false, false},
		{[]string{"1", "2", "3"}, nil, "1", "2 3", false, true},
		{[]string{"1", "2", "3"}, []string{"1", "2", "3", "4"}, "1 2", "", false, false},
		{[]string{"1", "2", "3"}, []string{"1", "2", "3", "4"}, "1 2 4", "", true, false},
		{[]string{"1", "2", "3", "4"}, []string{"1", "2", "3"}, "1 2", "", false, false},
		{[]string{"1", "2", "3", "4"}, []string{"1", "2", "3"}, "1 2 4", "", true, false},
		{[]string{"1"}, nil, "1", "", true, false},
	} {
		b := &ballot{}
		for _, g := range [][]string{row.before, row.after} {
			if g != nil {
				b.counts = append(b.counts, newCount(voters(voter(g...).servers)))
			}
		}
		for _, id := range strings.Fields(row.yes) {
			b.add(raft.ServerID(id), true)
		}
		for _, id := range strings.Fields(row.no) {
			b.add(raft.ServerID(id), false)
		}
		if won, lost := b.outcome(); won != row.won || lost != row.lost {
			t.Errorf("%v to %v, yes %q, no %q: won %v, lost %v", row.before, row.after, row.yes, row.no, won, lost)
		}
	}
}

func TestTransferConfirmsNothing(t *testing.T) {
	c := newCluster(t, 3, nil)
	l := c.leader()
	term := l.told().Term
	l.transferring.Store(true)
	if err := l.confirms(term); !errors.Is(err, lease.ErrNotLeader) {
		t.Errorf("during a transfer it confirmed: %v", err)
	}
	l.transferring.Store(false)
	if err := l.confirms(term); err != nil {
		t.Errorf("after a transfer that came to nothing: %v", err)
	}
	to := c.others(l)[0]
	got, err := l.TransferLeadership(to)
	if err != nil || got != to {
		t.Fatalf("leader %q, %v", got, err)
	}
	if next := c.leader(l.nodeID); next.nodeID != to {
		t.Errorf("%s leads, not %s", next.nodeID, to)
	}
	if err := l.confirms(term); !errors.Is(err, lease.ErrNotLeader) {
		t.Errorf("it handed over and confirmed: %v", err)
	}
}

// gate is a log store whose writes can be made to hang.
type gate struct {
	raft.LogStore
	mu   sync.Mutex
	open chan struct{} // closed: writes pass
}

func (g *gate) StoreLogs(logs []*raft.Log) error {
	g.mu.Lock()
	open := g.open
	g.mu.Unlock()
	<-open
	return g.LogStore.StoreLogs(logs)
}

func (g *gate) IsMonotonic() bool { return true }

func (g *gate) set(open bool) {
	g.mu.Lock()
	defer g.mu.Unlock()
	if open {
		close(g.open)
	} else {
		g.open = make(chan struct{})
	}
}

// TestStalledDiskHandsOver: a leader whose fsync hangs does not hold the
// cluster, though it could still send heartbeats.
func TestStalledDiskHandsOver(t *testing.T) {
	gates := make(map[string]*gate)
	c := newCluster(t, 3, func(cfg *Config) {
		g := &gate{open: make(chan struct{})}
		close(g.open)
		gates[cfg.NodeID] = g
		cfg.wrapLog = func(s raft.LogStore) raft.LogStore { g.LogStore = s; return g }
	})
	l := c.leader()
	acquire(t, l.Replica, 0)
	term := l.told().Term
	gates[l.nodeID].set(false)
	hung := make(chan error, 1)
	go func() {
		_, err := propose(l.Replica, &machine.Declare{Name: "never written"})
		hung <- err
	}()
	next := c.leader(l.nodeID)
	acquire(t, next.Replica, 1)
	if l.told().Leader {
		t.Error("the manager of the stalled node is still told that it leads")
	}
	if err := l.confirms(term); !errors.Is(err, lease.ErrNotLeader) {
		t.Errorf("stalled, it confirmed: %v", err)
	}
	gates[l.nodeID].set(true)
	if err := <-hung; !errors.Is(err, lease.ErrOutcomeUnknown) {
		t.Errorf("the write that hung: %v", err)
	}
	acquire(t, next.Replica, 2)
	c.same(c.leader())
}

// TestGrow: a node that was alone for months becomes three, with all it had.
func TestGrow(t *testing.T) {
	c := &cluster{t: t, net: newNetwork(), nodes: make(map[string]*node)}
	dir := filepath.Join(t.TempDir(), "data")
	alone := open(t, Config{Dir: dir})
	for i := range 20 {
		acquire(t, alone, i)
	}
	id := alone.ClusterID()
	if _, err := alone.AddMember("n2", "127.0.0.1:1", ""); err == nil || !strings.Contains(err.Error(), "--peer-address") {
		t.Errorf("a node without a peer address took a member: %v", err)
	}
	if err := alone.Close(); err != nil {
		t.Fatal(err)
	}
	first := c.start(Config{NodeID: "n1", PeerAddress: freeAddress(t), Dir: dir})
	c.leader()
	eventually(t, "the peer address is recorded", func() bool { s, _ := first.server(first.self); return string(s.Address) == first.cfg.PeerAddress })
	for i, id := range []string{"n2", "n3"} {
		n := c.start(Config{NodeID: id, PeerAddress: freeAddress(t), Join: true})
		if err := first.PromoteMember(id); err == nil || !strings.Contains(err.Error(), "no such member") {
			t.Errorf("promoting a stranger: %v", err)
		}
		for range 2 { // it may be repeated
			if _, err := first.AddMember(id, n.cfg.PeerAddress, n.ClusterID()); err != nil {
				t.Fatal(err)
			}
		}
		acquire(t, first.Replica, 20+i)
		eventually(t, id+" catches up", func() bool { return first.PromoteMember(id) == nil })
		if err := first.PromoteMember(id); err != nil {
			t.Error(err)
		}
	}
	c.same(first)
	if first.ClusterID() != id {
		t.Errorf("the cluster's id has changed from %s to %s", id, first.ClusterID())
	}
	c.stop(first)
	next := c.leader()
	if got := locks(t, next.store); got != 22 {
		t.Errorf("%d locks, 22 were granted", got)
	}
}

// TestRemovedNodeStops, says why, and does so again when it is started again;
// also when it was down meanwhile.
func TestRemovedNodeStops(t *testing.T) {
	c := newCluster(t, 3, nil)
	l := c.leader()
	acquire(t, l.Replica, 0)
	gone := c.nodes[c.others(l)[0]]
	if err := l.RemoveMember(gone.nodeID); err != nil {
		t.Fatal(err)
	}
	<-gone.done
	var removed *RemovedError
	if err := gone.Err(); !errors.As(err, &removed) || removed.NodeID != gone.nodeID {
		t.Errorf("the removed node stopped with %v", err)
	}
	cfg := c.stop(gone)
	if _, err := c.tryStart(cfg); !errors.As(err, &removed) {
		t.Errorf("started again: %v", err)
	}
	if err := l.RemoveMember(gone.nodeID); err != nil {
		t.Errorf("removed again: %v", err)
	}
	// Another, that does not hear of it.
	down := c.nodes[c.others(l)[0]]
	cfg = c.stop(down)
	fresh := c.start(Config{NodeID: "n9", PeerAddress: freeAddress(t), Join: true})
	// Two voters, one of them down: nothing can be changed.
	if _, err := l.AddMember("n9", fresh.cfg.PeerAddress, ""); err == nil {
		t.Error("a change without a quorum succeeded")
	}
	again := c.start(cfg)
	c.leader()
	eventually(t, "n9 is added", func() bool { _, err := c.leader().AddMember("n9", fresh.cfg.PeerAddress, ""); return err == nil })
	eventually(t, "n9 votes", func() bool { return c.leader().PromoteMember("n9") == nil })
	l = c.leader()
	if l == again {
		to := c.others(l)[0]
		if _, err := l.TransferLeadership(to); err != nil {
			t.Fatal(err)
		}
		l = c.leader(again.nodeID)
	}
	cfg = c.stop(again)
	if err := l.RemoveMember(cfg.NodeID); err != nil {
		t.Fatal(err)
	}
	again = c.start(cfg)
	<-again.done
	if err := again.Err(); !errors.As(err, &removed) {
		t.Errorf("removed while it was down, it stopped with %v", err)
	}
	c.stop(again)
	acquire(t, c.leader().Replica, 1)
}

// TestLaggingMemberRemovesNobody: a member that has only the beginning of the
// log knows an old configuration without most of the others. It says so when
// it is asked, and is not believed.
func TestLaggingMemberRemovesNobody(t *testing.T) {
	c := newCluster(t, 1, nil)
	first := c.leader()
	for _, id := range []string{"n2", "n3"} {
		n := c.start(Config{NodeID: id, PeerAddress: freeAddress(t), Join: true})
		if _, err := first.AddMember(id, n.cfg.PeerAddress, ""); err != nil {
			t.Fatal(err)
		}
		eventually(t, id+" votes", func() bool { return first.PromoteMember(id) == nil })
	}
	acquire(t, first.Replica, 0)
	c.same(first)
	// What n2 would say while it still replays the log.
	old := configuration{1, raft.Configuration{Servers: []raft.Server{{ID: first.self, Address: raft.ServerAddress(first.cfg.PeerAddress)}}}}
	index, member := isMember(c.nodes["n3"].self, old, old, 1)
	if member || index != 1 {
		t.Fatalf("%d, %v", index, member)
	}
	n3 := c.nodes["n3"]
	n3.hearRemoval(&removedError{index})
	if err := n3.Err(); err != nil {
		t.Errorf("believed a member that is behind: %v", err)
	}
	if index, member := c.nodes["n2"].member(c.nodes["n3"].self); !member {
		t.Errorf("n2 does not take n3 for a member, as of %d", index)
	}
}

func TestLeaderRemovesItself(t *testing.T) {
	c := newCluster(t, 3, nil)
	l := c.leader()
	acquire(t, l.Replica, 0)
	if err := l.RemoveMember(l.nodeID); !errors.Is(err, lease.ErrNotLeader) {
		t.Fatalf("%v; it hands over first", err)
	}
	next := c.leader(l.nodeID)
	if err := next.RemoveMember(l.nodeID); err != nil {
		t.Fatal(err)
	}
	<-l.done
	acquire(t, next.Replica, 1)
	if got := locks(t, next.store); got != 2 {
		t.Errorf("%d locks", got)
	}
}

func TestAnotherClustersDataIsRefused(t *testing.T) {
	a, b := newCluster(t, 3, nil), newCluster(t, 3, nil)
	la, lb := a.leader(), b.leader()
	acquire(t, la.Replica, 0)
	acquire(t, lb.Replica, 0)
	// A follower learns the id a heartbeat after its leader, and objects to
	// nobody until then.
	eventually(t, "the ids are known", func() bool {
		for _, c := range []*cluster{a, b} {
			for _, n := range c.nodes {
				if n.ClusterID() == "" {
					return false
				}
			}
		}
		return true
	})
	stray := b.nodes[b.others(lb)[0]]
	if _, err := la.AddMember("n4", stray.cfg.PeerAddress, stray.ClusterID()); err == nil || !strings.Contains(err.Error(), lb.ClusterID()) {
		t.Errorf("a member of another cluster was added: %v", err)
	}
	cfg := b.stop(stray)
	cfg.InitialCluster = map[string]string{cfg.NodeID: cfg.PeerAddress}
	for id, n := range a.nodes {
		if id != cfg.NodeID {
			cfg.InitialCluster[id] = n.cfg.PeerAddress
		}
	}
	n := b.start(cfg)
	if err := n.ForeignPeers(); err == nil || !strings.Contains(err.Error(), la.ClusterID()) {
		t.Errorf("started among another cluster's members: %v", err)
	}
	if err := a.nodes["n1"].ForeignPeers(); err != nil {
		t.Errorf("a member among its own: %v", err)
	}
}

// TestStrangersHearNothing: a peer port does not answer who does not greet it.
func TestStrangersHearNothing(t *testing.T) {
	c := newCluster(t, 1, nil)
	l := c.leader()
	for _, greeting := range []string{
		"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
		"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
		"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
		greetingMagic + "r\xff\xff",
		greetingMagic + "r\x00\x02[]",
		strings.Repeat("\x00", 4096),
	} {
		conn, err := net.Dial("tcp", l.cfg.PeerAddress)
		if err != nil {
			t.Fatal(err)
		}
		io.WriteString(conn, greeting)
		conn.(*net.TCPConn).CloseWrite()
		conn.SetReadDeadline(time.Now().Add(10 * time.Second))
		if b, err := io.ReadAll(conn); len(b) > 0 {
			t.Errorf("%q was answered with %q, %v", greeting, b, err)
		}
		conn.Close()
	}
	acquire(t, l.Replica, 0)
}

// authority signs certificates for 127.0.0.1.
func authority(t *testing.T) func() *tls.Config {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	ca := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "authority"}, IsCA: true, BasicConstraintsValid: true,
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour), KeyUsage: x509.KeyUsageCertSign,
	}
	der, err := x509.CreateCertificate(rand.Reader, ca, ca, &key.PublicKey, key)
	if err != nil {
		t.Fatal(err)
	}
	root, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	roots := x509.NewCertPool()
	roots.AddCert(root)
	return func() *tls.Config {
		own, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
		if err != nil {
			t.Fatal(err)
		}
		der, err := x509.CreateCertificate(rand.Reader, &x509.Certificate{
			SerialNumber: big.NewInt(2), Subject: pkix.Name{CommonName: "member"}, IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)},
			NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
			ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth, x509.ExtKeyUsageServerAuth},
		}, root, &own.PublicKey, key)
		if err != nil {
			t.Fatal(err)
		}
		return &tls.Config{RootCAs: roots, MinVersion: tls.VersionTLS13, Certificates: []tls.Certificate{{Certificate: [][]byte{der}, PrivateKey: own}}}
	}
}

func TestPeerTLS(t *testing.T) {
	member, foreign := authority(t), authority(t)
	c := newCluster(t, 3, func(cfg *Config) {
		if cfg.PeerTLS == nil {
			cfg.PeerTLS = member()
		}
	})
	l := c.leader()
	acquire(t, l.Replica, 0)
	c.same(l)
	if err := l.confirms(l.told().Term); err != nil {
		t.Error(err)
	}
	// A stranger, with a certificate of another authority or none.
	for name, cfg := range map[string]*tls.Config{"foreign": foreign(), "none": {InsecureSkipVerify: true}} {
		cfg.InsecureSkipVerify = true
		raw, err := net.Dial("tcp", l.cfg.PeerAddress)
		if err != nil {
			t.Fatal(err)
		}
		raw.SetDeadline(time.Now().Add(10 * time.Second))
		conn := tls.Client(raw, cfg)
		writeMessage(conn, append([]byte(greetingMagic), kindPeer), hello{ClusterID: l.ClusterID(), NodeID: c.nodes["n2"].self, To: l.self, start: c.nodes["n2"].start})
		if n, err := conn.Read(make([]byte, 1)); err == nil || n > 0 {
			t.Errorf("%s: answered", name)
		}
		raw.Close()
	}
	// And one that speaks no TLS at all.
	plain := c.start(Config{NodeID: "n9", PeerAddress: freeAddress(t), Join: true, PeerTLS: foreign()})
	if err := plain.peers.probe(l.end(), 5*time.Second); err == nil {
		t.Error("a node with another authority's certificate was welcomed")
	}
}

// TestSlowFollowerCatchesUpBySnapshot: what it missed has been cut off the log.
func TestSlowFollowerCatchesUpBySnapshot(t *testing.T) {
	c := newCluster(t, 3, func(cfg *Config) {
		cfg.SnapshotEntries, cfg.TrailingEntries, cfg.SnapshotInterval = 50, 10, 20*time.Millisecond
	})
	l := c.leader()
	acquire(t, l.Replica, 0)
	cfg := c.stop(c.nodes[c.others(l)[0]])
	for i := range 300 {
		acquire(t, l.Replica, i+1)
	}
	eventually(t, "the log is cut", func() bool { first, err := l.disk.FirstIndex(); return err == nil && first > 100 })
	c.start(cfg)
	c.same(c.leader())
}

func TestLeaderIsWaitedFor(t *testing.T) {
	c := newCluster(t, 3, nil)
	l := c.leader()
	if conn, _, err := l.Leader(context.Background(), 0); conn != nil || err != nil {
		t.Errorf("at the leader: %v %v", conn, err)
	}
	follower := c.nodes[c.others(l)[0]]
	if conn, _, err := follower.Leader(context.Background(), 0); conn == nil || err != nil {
		t.Errorf("at a follower: %v %v", conn, err)
	}
	for _, id := range c.others(l) {
		if id != follower.nodeID {
			c.stop(c.nodes[id])
		}
	}
	c.stop(l)
	eventually(t, "the leader is known to be gone", func() bool { return follower.known().id == "" })
	ctx, cancel := context.WithTimeout(context.Background(), 50*time.Millisecond)
	defer cancel()
	if _, _, err := follower.Leader(ctx, 0); !errors.Is(err, lease.ErrNotLeader) {
		t.Errorf("without a leader: %v", err)
	}
}

func TestBackupAndRestore(t *testing.T) {
	c := newCluster(t, 3, nil)
	l := c.leader()
	for i := range 20 {
		acquire(t, l.Replica, i)
	}
	if _, err := propose(l.Replica, &machine.Declare{Name: "declared"}); err != nil {
		t.Fatal(err)
	}
	var b bytes.Buffer
	follower := c.nodes[c.others(l)[0]]
	if err := follower.Backup(&b); !errors.Is(err, lease.ErrNotLeader) {
		t.Errorf("a follower's backup: %v", err)
	}
	if err := l.Backup(&b); err != nil {
		t.Fatal(err)
	}
	after := 0
	for ; after < 100; after++ {
		acquire(t, l.Replica, 20+after)
	}
	text := b.Bytes()
	info, err := CheckBackup(bytes.NewReader(text))
	if err != nil || info.ClusterID != l.ClusterID() || info.Leases != 20 || info.LastToken != 20 {
		t.Fatalf("%+v, %v", info, err)
	}
	for at := 0; at < len(text); at += 1 + len(text)/200 {
		damaged := bytes.Clone(text)
		damaged[at] ^= 4
		if _, err := CheckBackup(bytes.NewReader(damaged)); !errors.Is(err, ErrNotBackup) {
			t.Fatalf("byte %d of %d flipped: %v", at, len(text), err)
		}
		if _, err := CheckBackup(bytes.NewReader(text[:at])); !errors.Is(err, ErrNotBackup) {
			t.Fatalf("cut at %d of %d: %v", at, len(text), err)
		}
	}

	dir := filepath.Join(t.TempDir(), "restored")
	restore := func(cfg RestoreConfig) (RestoreResult, error) {
		cfg.From, cfg.Dir, cfg.Now = bytes.NewReader(text), dir, time.Unix(1_800_000_000, 0)
		return Restore(cfg)
	}
	res, err := restore(RestoreConfig{})
	if err != nil {
		t.Fatal(err)
	}
	if want := 20 + uint64(machine.HistoryGap); uint64(res.TokensAbove) != want || res.NewClusterID == l.ClusterID() {
		t.Fatalf("%+v, tokens should be above %d", res, want)
	}
	store := lease.NewStore(0)
	r := open(t, Config{Dir: dir, Store: store})
	if _, err := restore(RestoreConfig{Force: true}); !errors.Is(err, ErrLocked) {
		t.Errorf("restored under a running server: %v", err)
	}
	out, err := propose(r, &machine.Acquire{Request: 1e6, Names: []string{"lock/0"}, Mode: machine.Exclusive, TTL: 1e9})
	if err != nil || out.Results[0].Hold == nil || uint64(out.Results[0].Hold.Token) <= uint64(20+after) {
		t.Fatalf("the first grant of the new history: %+v, %v", out, err)
	}
	if k, ok := store.View().Lock("declared"); !ok || !k.Declared || k.Clock != machine.HistoryGap {
		t.Errorf("the declared lock: %+v", k)
	}
	if n := store.View().Counts().Leases; n != 1 {
		t.Errorf("%d leases live on", n)
	}
	if r.ClusterID() != res.NewClusterID || r.Restored() == nil || r.Restored().ClusterID != l.ClusterID() {
		t.Errorf("cluster %s, restored %+v", r.ClusterID(), r.Restored())
	}
	if err := r.Close(); err != nil {
		t.Fatal(err)
	}
	if _, err := restore(RestoreConfig{}); err == nil || !strings.Contains(err.Error(), "--force") {
		t.Errorf("restored over data: %v", err)
	}
	res, err = restore(RestoreConfig{Force: true, Above: 1 << 50})
	if err != nil || res.TokensAbove != 1<<50 {
		t.Fatalf("%+v, %v", res, err)
	}
	if _, err := os.Stat(filepath.Join(res.MovedTo, identityFile)); err != nil {
		t.Errorf("what was there is gone: %v", err)
	}
	r = open(t, Config{Dir: dir})
	if err := r.Close(); err != nil {
		t.Fatal(err)
	}
	if _, err := restore(RestoreConfig{Force: true, Above: 1<<53 - 1}); !errors.Is(err, machine.ErrTokensExhausted) {
		t.Errorf("no room for tokens: %v", err)
	}
}
