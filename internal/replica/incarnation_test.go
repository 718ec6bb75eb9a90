package replica

import (
	"context"
	"encoding/json"
	"errors"
	"io"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/hashicorp/raft"

	"github.com/distlock/distlock/lease"
	"github.com/distlock/distlock/lease/machine"
)

// stops waits until a node has stopped by itself, and returns why.
func stops(t *testing.T, n *node) error {
	t.Helper()
	select {
	case <-n.done:
	case <-time.After(20 * time.Second):
		t.Fatalf("%s goes on", n.nodeID)
	}
	return n.Err()
}

// A voter that has lost its disk has no vote: n1 and n2 acknowledge a grant, n1
// fails, n2 comes back empty, and n3, which knows nothing of the grant, returns.
func TestAWipedVoterHasNoVote(t *testing.T) {
	c := newCluster(t, 3, nil)
	l := c.leader()
	ids := c.others(l)
	behind, wiped := ids[0], ids[1]
	c.same(l) // who has nothing yet cannot say that there is a history
	cfgBehind := c.stop(c.nodes[behind])
	acquire(t, l.Replica, 0)
	cfgWiped := c.stop(c.nodes[wiped])
	cfgLeader := c.stop(l)
	cfgWiped.Dir = filepath.Join(t.TempDir(), "empty")
	c.start(cfgBehind)
	empty := c.start(cfgWiped)
	err := stops(t, empty)
	var replaced *ReplacedError
	if !errors.As(err, &replaced) || replaced.NodeID != wiped || !strings.Contains(err.Error(), "cluster remove "+wiped) || !strings.Contains(err.Error(), "--join") {
		t.Fatalf("it stopped with %v", err)
	}
	c.stop(empty)
	// With --join it is refused, too, until the old one has been removed.
	cfgWiped.Join, cfgWiped.InitialCluster = true, nil
	joiner := c.start(cfgWiped)
	c.start(cfgLeader)
	next := c.leader()
	var refusal *lease.MemberError
	if _, err := next.AddMember(joiner.MemberID(), cfgWiped.PeerAddress, ""); !errors.As(err, &refusal) || !strings.Contains(err.Error(), "another data directory") {
		t.Fatalf("a wiped voter was taken in: %v", err)
	}
	// Nor at another address.
	if _, err := next.AddMember(joiner.MemberID(), freeAddress(t), ""); !errors.As(err, &refusal) || !strings.Contains(err.Error(), "another data directory") {
		t.Fatalf("a wiped voter was taken in at another address: %v", err)
	}
	if got := locks(t, next.store); got != 1 {
		t.Fatalf("%d locks: the acknowledged grant is lost", got)
	}
	if err := next.RemoveMember(wiped); err != nil {
		t.Fatal(err)
	}
	eventually(t, "it is a learner", func() bool {
		_, err := c.leader().AddMember(joiner.MemberID(), cfgWiped.PeerAddress, "")
		return err == nil
	})
	eventually(t, "it votes", func() bool { return c.leader().PromoteMember(wiped) == nil })
	acquire(t, c.leader().Replica, 1)
	c.same(c.leader())
}

// A copy of a member's directory is refused where it starts at another
// address, also when the leader is away, and by everybody at its own.
func TestACopyOfAMember(t *testing.T) {
	c := newCluster(t, 3, nil)
	l := c.leader()
	acquire(t, l.Replica, 0)
	original := c.nodes[c.others(l)[0]]
	cfg := c.stop(original)
	twin := cfg
	twin.Dir = copyDir(t, cfg.Dir)
	c.start(cfg)
	c.same(c.leader())
	twin.PeerAddress = freeAddress(t)
	var moved *MovedError
	if _, err := c.tryStart(twin); !errors.As(err, &moved) || moved.Recorded != cfg.PeerAddress || !strings.Contains(err.Error(), "cluster add") {
		t.Fatalf("a copy started at another address: %v", err)
	}
	// Nor does the cluster move a member that runs.
	var refusal *lease.MemberError
	if _, err := c.leader().AddMember(cfg.NodeID, twin.PeerAddress, ""); !errors.As(err, &refusal) || !strings.Contains(err.Error(), "stop it there first") {
		if c.leader().nodeID != cfg.NodeID {
			t.Fatalf("a running member was moved: %v", err)
		}
	}
	acquire(t, c.leader().Replica, 1)
}

// A start of a member that is not its last stops: its directory is an old copy,
// or has been set back, and others have its later votes.
func TestADirectorySetBackStops(t *testing.T) {
	c := newCluster(t, 3, nil)
	l := c.leader()
	acquire(t, l.Replica, 0)
	cfg := c.stop(c.nodes[c.others(l)[0]])
	old := cfg
	old.Dir = copyDir(t, cfg.Dir)
	for i := range 2 {
		n := c.start(cfg)
		acquire(t, c.leader().Replica, i+1)
		c.same(c.leader())
		if i == 1 {
			break
		}
		c.stop(n)
	}
	c.stop(c.nodes[cfg.NodeID])
	again := c.start(old)
	err := stops(t, again)
	var stale *CopyError
	if !errors.As(err, &stale) || stale.NodeID != cfg.NodeID || stale.This >= stale.Last && stale.Last == 0 {
		t.Fatalf("it stopped with %v", err)
	}
	c.stop(again)
	c.start(cfg)
	acquire(t, c.leader().Replica, 3)
	c.same(c.leader())
}

// A member that has moved says nothing before the cluster agrees.
func TestAMoveIsAgreed(t *testing.T) {
	c := newCluster(t, 3, nil)
	l := c.leader()
	acquire(t, l.Replica, 0)
	cfg := c.stop(c.nodes[c.others(l)[0]])
	cfg.PeerAddress = freeAddress(t)
	var moved *MovedError
	if _, err := c.tryStart(cfg); !errors.As(err, &moved) {
		t.Fatalf("it started at an address that nobody knows: %v", err)
	}
	for range 2 { // it may be repeated
		if _, err := l.AddMember(cfg.NodeID, cfg.PeerAddress, ""); err != nil {
			t.Fatal(err)
		}
	}
	c.start(cfg)
	acquire(t, c.leader().Replica, 1)
	c.same(c.leader())
	if s, _ := c.leader().server(c.nodes[cfg.NodeID].self); string(s.Address) != cfg.PeerAddress || s.Suffrage != raft.Voter {
		t.Errorf("recorded: %+v", s)
	}
}

// A member that has lost its directory, and is started without a list, begins a
// history alone: it ends as soon as a member of its cluster looks for it. One that
// is there for longer does not.
func TestAWipedMemberDoesNotLeadAlone(t *testing.T) {
	c := newCluster(t, 3, nil)
	l := c.leader()
	acquire(t, l.Replica, 0)
	cfg := c.stop(c.nodes[c.others(l)[0]])
	own := cfg.Dir
	cfg.Dir, cfg.InitialCluster = t.TempDir(), nil
	alone := c.start(cfg)
	var replaced *ReplacedError
	if err := stops(t, alone); !errors.As(err, &replaced) || replaced.NodeID != cfg.NodeID || replaced.ClusterID != l.ClusterID() {
		t.Fatalf("it stopped with %v", err)
	}
	c.stop(alone)
	again := c.start(cfg) // an operator insists
	time.Sleep(time.Second)
	if err := again.Err(); err != nil {
		t.Errorf("it stopped with %v", err)
	}
	c.stop(again)
	cfg.Dir = own
	c.start(cfg)
	c.same(c.leader())
}

// A member that has moved may be killed before it has that in its log, and be
// needed to elect the next leader.
func TestAMoveIsRememberedWithoutTheLog(t *testing.T) {
	c := newCluster(t, 3, nil)
	l := c.leader()
	acquire(t, l.Replica, 0)
	ids := c.others(l)
	cfg := c.stop(c.nodes[ids[0]])
	before := copyDir(t, cfg.Dir)
	cfg.PeerAddress = freeAddress(t)
	if _, err := l.AddMember(cfg.NodeID, cfg.PeerAddress, ""); err != nil {
		t.Fatal(err)
	}
	c.start(cfg)
	stopped := c.stop(c.nodes[cfg.NodeID])
	// Its log is what it was before the move, and what it was told is kept.
	told, err := os.ReadFile(filepath.Join(stopped.Dir, identityFile))
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(before, identityFile), told, 0o600); err != nil {
		t.Fatal(err)
	}
	cfg.Dir = before
	c.stop(c.nodes[ids[1]])
	c.start(cfg)
	acquire(t, c.leader().Replica, 1)
}

// Nodes of a new cluster that have different lists do not begin, and say both.
func TestListsThatDiffer(t *testing.T) {
	start := func(lists map[string][]string) (*cluster, map[string]string) {
		c := &cluster{t: t, net: newNetwork(), nodes: make(map[string]*node)}
		at := make(map[string]string)
		for _, id := range []string{"n1", "n2", "n3"} {
			at[id] = freeAddress(t)
		}
		for id, names := range lists {
			list := make(map[string]string)
			for _, name := range names {
				list[name] = at[name]
			}
			c.start(Config{NodeID: id, PeerAddress: at[id], InitialCluster: list})
		}
		return c, at
	}
	t.Run("one is shorter", func(t *testing.T) {
		c, at := start(map[string][]string{"n1": {"n1", "n2"}, "n2": {"n1", "n2", "n3"}, "n3": {"n1", "n2", "n3"}})
		for _, id := range []string{"n1", "n2"} {
			var lists *ListError
			if err := stops(t, c.nodes[id]); !errors.As(err, &lists) || !strings.Contains(err.Error(), "n1="+at["n1"]+",n2="+at["n2"]+",") ||
				!strings.Contains(err.Error(), "n3="+at["n3"]) {
				t.Errorf("%s stopped with %v", id, err)
			}
		}
		if n3 := c.nodes["n3"]; n3.raft.LastIndex() > 0 {
			t.Error("n3 has begun")
		}
	})
	t.Run("one is alone", func(t *testing.T) {
		c, _ := start(map[string][]string{"n1": {"n1"}})
		first := c.leader()
		acquire(t, first.Replica, 0)
		for _, id := range []string{"n2", "n3"} {
			list := map[string]string{"n1": first.cfg.PeerAddress, "n2": freeAddress(t), "n3": freeAddress(t)}
			n := c.start(Config{NodeID: id, PeerAddress: list[id], InitialCluster: list})
			if err := stops(t, n); err == nil || !strings.Contains(err.Error(), "n1 at ") || !strings.Contains(err.Error(), "has a history already") {
				t.Errorf("%s stopped with %v", id, err)
			}
		}
		acquire(t, first.Replica, 1)
		if err := first.Err(); err != nil {
			t.Errorf("who serves stopped for a stranger's list: %v", err)
		}
	})
}

// A new cluster begins once all of its members have answered, and not with a
// majority of them: one of that could be a member that has lost its disk.
func TestANewClusterWaitsForAll(t *testing.T) {
	c := &cluster{t: t, net: newNetwork(), nodes: make(map[string]*node)}
	list := map[string]string{"n1": freeAddress(t), "n2": freeAddress(t), "n3": freeAddress(t)}
	for _, id := range []string{"n1", "n2"} {
		c.start(Config{NodeID: id, PeerAddress: list[id], InitialCluster: list})
	}
	time.Sleep(5 * betweenIntroductions) // they would begin in the first
	for _, id := range []string{"n1", "n2"} {
		if n := c.nodes[id]; n.raft.LastIndex() > 0 || n.Err() != nil {
			t.Errorf("%s has begun: %v", id, n.Err())
		}
		cfg := c.stop(c.nodes[id]) // and may be stopped, and started again
		c.start(cfg)
	}
	c.start(Config{NodeID: "n3", PeerAddress: list["n3"], InitialCluster: list})
	l := c.leader()
	acquire(t, l.Replica, 0)
	c.same(l)
	for id, n := range c.nodes {
		if name, incarnation := split(n.self); name != id || incarnation == "" {
			t.Errorf("%s goes by %q", id, n.self)
		}
	}
}

// A member that still has its name and no log has lost its history.
func TestAMemberWithoutItsLog(t *testing.T) {
	c := newCluster(t, 3, nil)
	l := c.leader()
	acquire(t, l.Replica, 0)
	c.same(l)
	cfg := c.stop(c.nodes[c.others(l)[0]])
	entries, err := os.ReadDir(cfg.Dir)
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range entries {
		if e.Name() != identityFile {
			if err := os.RemoveAll(filepath.Join(cfg.Dir, e.Name())); err != nil {
				t.Fatal(err)
			}
		}
	}
	var corrupt *CorruptError
	for _, join := range []bool{false, true} {
		cfg.Join = join
		if join {
			cfg.InitialCluster = nil
		}
		if _, err := c.tryStart(cfg); !errors.As(err, &corrupt) {
			t.Errorf("it started without its log: %v", err)
		}
	}
}

// Whoever is no member is told nothing, whatever it knows of names, and no
// word of it reaches raft.
func TestStrangersAreToldNothing(t *testing.T) {
	c := newCluster(t, 3, nil)
	l := c.leader()
	acquire(t, l.Replica, 0)
	raised(t, l.Replica, machine.NewestLevel)
	follower := c.nodes[c.others(l)[0]]
	eventually(t, "the follower knows the cluster", func() bool { return follower.ClusterID() != "" && follower.store.Level() == machine.NewestLevel })
	known := follower.self
	name := raft.ServerID(follower.nodeID)
	for what, h := range map[string]hello{
		"nothing":                    {},
		"a name":                     {NodeID: name},
		"a name and the cluster":     {NodeID: name, ClusterID: l.ClusterID()},
		"a member, and for nobody":   {NodeID: known, ClusterID: l.ClusterID()},
		"a member, and for a name":   {NodeID: known, ClusterID: l.ClusterID(), To: raft.ServerID(l.nodeID)},
		"a member's earlier start":   {NodeID: known, ClusterID: l.ClusterID(), To: l.self, start: start{Start: 1, Nonce: "another"}},
		"a member without a start":   {NodeID: known, ClusterID: l.ClusterID(), To: l.self},
		"a stranger for this node":   {NodeID: "n9", ClusterID: l.ClusterID(), To: l.self, start: start{Start: 1, Nonce: "x"}},
		"another disk of a member's": {NodeID: serverID(follower.nodeID, newIncarnation()), ClusterID: l.ClusterID(), To: l.self, start: start{Start: 9, Nonce: "x"}},
		"of another cluster":         {NodeID: known, ClusterID: "another", To: l.self, start: follower.start},
		"for another disk of this":   {NodeID: known, ClusterID: l.ClusterID(), To: serverID(l.nodeID, newIncarnation()), start: follower.start},
	} {
		for _, kind := range []byte{kindRaft, kindPeer, kindForward, kindProbe} {
			conn, err := net.Dial("tcp", l.cfg.PeerAddress)
			if err != nil {
				t.Fatal(err)
			}
			conn.SetDeadline(time.Now().Add(10 * time.Second))
			if err := writeMessage(conn, append([]byte(greetingMagic), kind), h); err != nil {
				t.Fatal(err)
			}
			told, _ := io.ReadAll(conn)
			conn.Close()
			if len(told) > 0 && (told[0] == answerMember || told[0] == answerWelcome) {
				t.Errorf("%s, %c: welcome", what, kind)
			}
			if h.To != l.self && (strings.Contains(string(told), l.ClusterID()) || strings.Contains(string(told), string(l.self))) {
				t.Errorf("%s, %c: told %q", what, kind, told)
			}
		}
	}
	// An introduction by who knows no name is not answered.
	for _, h := range []hello{{}, {NodeID: "n9"}, {NodeID: "n9", Members: map[string]string{"n9": "here"}}} {
		conn, err := net.Dial("tcp", l.cfg.PeerAddress)
		if err != nil {
			t.Fatal(err)
		}
		conn.SetDeadline(time.Now().Add(10 * time.Second))
		if err := writeMessage(conn, append([]byte(greetingMagic), kindIntroduce), h); err != nil {
			t.Fatal(err)
		}
		if told, _ := io.ReadAll(conn); len(told) > 0 {
			t.Errorf("%+v: told %q", h, told)
		}
		conn.Close()
	}
	if now := c.leader(); now != l {
		t.Errorf("%s leads", now.nodeID)
	}
}

// Raft's calls name no target, so every connection does: what is meant for one
// disk reaches no other that answers at its address.
func TestEveryConnectionIsForOneDisk(t *testing.T) {
	c := newCluster(t, 3, nil)
	l := c.leader()
	id := c.others(l)[0]
	right := c.nodes[id].end()
	wrong := end{serverID(id, newIncarnation()), right.address}
	var other *otherError
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	for _, kind := range []byte{kindRaft, kindPeer, kindForward, kindProbe} {
		if _, err := l.peers.dial(ctx, wrong, kind); !errors.As(err, &other) {
			t.Errorf("%c reached another disk: %v", kind, err)
		}
		conn, err := l.peers.dial(ctx, right, kind)
		if err != nil {
			t.Fatal(err)
		}
		conn.Close()
	}
	if _, err := l.about(wrong, time.Second); err == nil {
		t.Error("another disk told about itself")
	}
	for _, call := range []func() error{
		func() error {
			return l.peers.reach.RequestVote(wrong.id, raft.ServerAddress(wrong.address), &raft.RequestVoteRequest{}, &raft.RequestVoteResponse{})
		},
		func() error {
			return l.peers.reach.RequestPreVote(wrong.id, raft.ServerAddress(wrong.address), &raft.RequestPreVoteRequest{}, &raft.RequestPreVoteResponse{})
		},
		func() error {
			return l.peers.reach.AppendEntries(wrong.id, raft.ServerAddress(wrong.address), &raft.AppendEntriesRequest{}, &raft.AppendEntriesResponse{})
		},
		func() error {
			_, err := l.peers.reach.AppendEntriesPipeline(wrong.id, raft.ServerAddress(wrong.address))
			return err
		},
		func() error {
			return l.peers.reach.TimeoutNow(wrong.id, raft.ServerAddress(wrong.address), &raft.TimeoutNowRequest{}, &raft.TimeoutNowResponse{})
		},
	} {
		if err := call(); !errors.As(err, &other) {
			t.Errorf("raft reached another disk: %v", err)
		}
	}
}

// The starts of others are on the disk before they are believed.
func TestStartsAreRemembered(t *testing.T) {
	dir := t.TempDir()
	for i := range 2 {
		s, err := openStarts(dir)
		if err != nil {
			t.Fatal(err)
		}
		var stale *staleError
		if err := s.see("n1", start{2, "a"}); i > 0 && !errors.As(err, &stale) {
			t.Errorf("forgotten: %v", err)
		}
		for _, x := range []struct {
			start
			ok bool
		}{{start{3, "a"}, true}, {start{3, "a"}, true}, {start{3, "b"}, false}, {start{2, "a"}, false}, {start{}, false}} {
			if err := s.see("n1", x.start); (err == nil) != x.ok || err != nil && !errors.As(err, &stale) {
				t.Errorf("%+v: %v", x.start, err)
			}
		}
	}
	if err := os.WriteFile(filepath.Join(dir, startsFile), []byte("{"), 0o600); err != nil {
		t.Fatal(err)
	}
	var corrupt *CorruptError
	if _, err := openStarts(dir); !errors.As(err, &corrupt) {
		t.Errorf("damaged: %v", err)
	}
}

// A directory of the builds before incarnations goes by its bare name for good.
func TestADirectoryOfAnEarlierBuild(t *testing.T) {
	dir := t.TempDir()
	r, err := tryOpen(Config{Dir: dir, newest: machine.FirstLevel})
	if err != nil {
		t.Fatal(err)
	}
	lead(t, r)
	acquire(t, r, 0)
	if err := r.Close(); err != nil {
		t.Fatal(err)
	}
	bare(t, dir)
	for range 2 {
		r = open(t, Config{Dir: dir, PeerAddress: freeAddress(t)})
		acquire(t, r, 1)
		if r.self != "n1" {
			t.Errorf("it goes by %s", r.self)
		}
		if err := r.Close(); err != nil {
			t.Fatal(err)
		}
	}
}

// bare makes a directory one of the builds before incarnations: it has been led
// by a lone node.
func bare(t *testing.T, dir string) {
	t.Helper()
	text, err := json.Marshal(map[string]string{"nodeId": "n1"})
	if err != nil {
		t.Fatal(err)
	}
	entries, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range entries {
		if err := os.RemoveAll(filepath.Join(dir, e.Name())); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.WriteFile(filepath.Join(dir, identityFile), text, 0o600); err != nil {
		t.Fatal(err)
	}
}

func TestNames(t *testing.T) {
	for name, ok := range map[string]bool{"n1": true, "a.b-c_d@e": true, "": false, strings.Repeat("x", 65): false, "a#b": false, "a=b": false, "a,b": false} {
		if err := checkName(name); (err == nil) != ok {
			t.Errorf("%q: %v", name, err)
		}
	}
	for _, x := range []struct{ id, name, incarnation string }{
		{"n1", "n1", ""}, {"n1#0123456789abcdef", "n1", "0123456789abcdef"}, {"a#b", "a#b", ""}, {"a#b#0123456789abcdef", "a#b", "0123456789abcdef"},
		{"n1#0123456789abcdeg", "n1#0123456789abcdeg", ""},
	} {
		if name, incarnation := split(raft.ServerID(x.id)); name != x.name || incarnation != x.incarnation {
			t.Errorf("%q is %q and %q", x.id, name, incarnation)
		}
	}
}
