package replica

import (
	"errors"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/hashicorp/raft"
	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"
	"go.uber.org/zap/zaptest/observer"

	"github.com/distlock/distlock/lease"
)

// A change of the membership after which no majority would answer is refused,
// and names who does not: it could not be undone.
func TestNoChangeWithoutAQuorumAfterIt(t *testing.T) {
	c := newCluster(t, 3, nil)
	l := c.leader()
	acquire(t, l.Replica, 0)
	ids := c.others(l)
	dead, live := ids[0], ids[1]
	c.stop(c.nodes[dead])
	var refusal *lease.MemberError
	err := l.RemoveMember(live)
	if !errors.As(err, &refusal) || refusal.ID != live || !strings.Contains(err.Error(), "only 1 of the 2 voters") || !strings.Contains(err.Error(), dead) {
		t.Fatalf("a live voter was removed beside a dead one: %v", err)
	}
	acquire(t, l.Replica, 1)
	// A learner more is no voter more; its vote would be the third of four.
	fresh := c.start(Config{NodeID: "n9", PeerAddress: freeAddress(t), Join: true})
	if _, err := l.AddMember("n9", fresh.cfg.PeerAddress, ""); err != nil {
		t.Fatal(err)
	}
	eventually(t, "n9 votes", func() bool { return l.PromoteMember("n9") == nil })
	if err := l.RemoveMember(dead); err != nil {
		t.Fatalf("the dead one was not removed: %v", err)
	}
	acquire(t, l.Replica, 2)
	c.same(l)
}

// A change is for the members that it was decided upon: when those have changed
// meanwhile it is refused, and nothing is changed.
func TestAChangeOfOtherMembers(t *testing.T) {
	c := newCluster(t, 3, nil)
	l := c.leader()
	other := raft.Server{ID: serverID("n8", newIncarnation()), Address: raft.ServerAddress(freeAddress(t))}
	at := freeAddress(t)
	once := sync.OnceFunc(func() {
		if err := l.raft.AddNonvoter(other.ID, other.Address, 0, 0).Error(); err != nil {
			t.Error(err)
		}
	})
	c.net.mu.Lock()
	c.net.dialed = func(from, to string) {
		if from == l.nodeID && to == at {
			once()
		}
	}
	c.net.mu.Unlock()
	fresh := c.start(Config{NodeID: "n9", PeerAddress: at, Join: true})
	var refusal *lease.MemberError
	if _, err := l.AddMember("n9", at, ""); !errors.As(err, &refusal) || !strings.Contains(err.Error(), "changed meanwhile") {
		t.Fatalf("added to members that it was not meant for: %v", err)
	}
	if _, member := l.server(fresh.self); member {
		t.Error("n9 is a member")
	}
	if err := l.RemoveMember("n8"); err != nil {
		t.Fatal(err)
	}
	if _, err := l.AddMember("n9", at, ""); err != nil {
		t.Fatal(err)
	}
}

// A transfer to a member that does not answer is refused at once, as often as
// it is tried, and holds up no grant.
func TestATransferToASilentMember(t *testing.T) {
	c := newCluster(t, 3, nil)
	l := c.leader()
	ids := c.others(l)
	silent, live := ids[0], ids[1]
	c.net.set(true, both(silent, l.nodeID, live)...)
	eventually(t, silent+" is silent", func() bool { return l.peers.silent(c.nodes[silent].self) })
	for i := range 3 {
		var refusal *lease.MemberError
		if _, err := l.TransferLeadership(silent); !errors.As(err, &refusal) || refusal.ID != silent {
			t.Fatalf("transfer %d: %v", i, err)
		}
		acquire(t, l.Replica, i)
	}
	if got, err := l.TransferLeadership(""); err != nil || got != live {
		t.Fatalf("%q leads, %v", got, err)
	}
	next := c.leader(l.nodeID)
	acquire(t, next.Replica, 9)
	c.net.set(false, both(silent, l.nodeID, live)...)
	c.same(next)
}

// What raft replicates to a member that is down waits for its heartbeat, and
// does not fail again and again: raft would leave the member alone for up to
// 10 s after it is back.
func TestAMemberThatIsBackIsNotLeftAlone(t *testing.T) {
	logs, seen := observer.New(zapcore.DebugLevel)
	c := newCluster(t, 3, func(cfg *Config) { cfg.Logger = zap.New(logs) })
	l := c.leader()
	acquire(t, l.Replica, 0)
	cfg := c.stop(c.nodes[c.others(l)[0]])
	count := func(text string) (n int) {
		for _, e := range seen.All() {
			if strings.Contains(e.Message, text) && strings.Contains(e.Message, cfg.PeerAddress) {
				n++
			}
		}
		return n
	}
	i := 1
	eventually(t, "many heartbeats have failed", func() bool {
		acquire(t, l.Replica, i)
		i++
		return count("failed to heartbeat") >= 8
	})
	if n := count("failed to appendEntries"); n > 3 { // raft's backoff is 40 ms then
		t.Errorf("raft was told of %d failures beside 8 of heartbeats", n)
	}
	c.start(cfg)
	c.same(l)
}

// What waits for a silent member's heartbeat ends with the leadership, and
// with the node.
func TestWhatWaitsForASilentMemberEnds(t *testing.T) {
	c := newCluster(t, 3, nil)
	l := c.leader()
	term := l.raft.CurrentTerm()
	id := c.others(l)[0]
	self := c.nodes[id].self
	awaits := func(n *node, term uint64) error {
		reach := n.peers.reach
		reach.heard(self, errors.New("it does not answer"))
		done := make(chan error, 1)
		go func() { done <- reach.await(self, term) }()
		select {
		case err := <-done:
			return err
		case <-time.After(20 * time.Second):
			t.Error("it waits for ever")
			return nil
		}
	}
	if err := awaits(l, term); err != nil {
		t.Errorf("heartbeats go through, and yet: %v", err)
	}
	follower := c.nodes[id]
	if err := awaits(follower, term); err == nil {
		t.Error("of a node that does not lead it waited for a heartbeat that nobody sends")
	}
	c.net.set(true, both(id, l.nodeID)...)
	eventually(t, id+" is silent", func() bool { return l.peers.silent(self) })
	if err := awaits(l, term-1); !errors.Is(err, errNotWanted) {
		t.Errorf("of an old term: %v", err)
	}
	done := make(chan error, 1)
	go func() { done <- l.peers.reach.await(self, l.raft.CurrentTerm()) }()
	c.stop(l)
	if err := <-done; err == nil {
		t.Error("its node ended, and it was told that the member answers")
	}
	c.net.set(false, both(id, l.nodeID)...)
	acquire(t, c.leader().Replica, 0)
}
