package replica

import (
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/hashicorp/raft"
	wal "github.com/hashicorp/raft-wal"

	"github.com/distlock/distlock/lease"
)

// A node that a cluster has taken in, and that has nothing of its log yet,
// must not begin a history of its own when it is started without --join.
func TestJoinedNodeBeginsNoHistory(t *testing.T) {
	c := newCluster(t, 1, nil)
	first := c.leader()
	eventually(t, "an id", func() bool { return first.ClusterID() != "" })
	n2 := c.start(Config{NodeID: "n2", PeerAddress: freeAddress(t), Join: true})
	if err := n2.Joined(first.ClusterID()); err != nil { // and the leader cannot reach it
		t.Fatal(err)
	}
	cfg := c.stop(n2)
	cfg.Join = false
	again, err := c.tryStart(cfg)
	if err != nil {
		return // it says so
	}
	for until := time.Now().Add(3 * time.Second); time.Now().Before(until); time.Sleep(5 * time.Millisecond) {
		if again.told().Leader {
			t.Fatalf("n2 leads a history of its own as cluster %s", again.ClusterID())
		}
	}
}

// The process died in the first start, after the term and before the first entry.
func TestKilledInBootstrap(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "data")
	cfg := Config{Dir: dir, NodeID: "n1", Join: true, Store: lease.NewStore(0), SegmentSize: 1 << 20}
	r, err := Open(cfg)
	if err != nil {
		t.Fatal(err)
	}
	if err := r.disk.SetUint64([]byte("CurrentTerm"), 1); err != nil {
		t.Fatal(err)
	}
	r.Close()
	cfg.Join, cfg.Store = false, lease.NewStore(0)
	r, err = Open(cfg)
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	select {
	case l := <-r.Leadership():
		if !l.Leader {
			t.Fatal(l)
		}
	case <-time.After(3 * time.Second):
		t.Fatal("it never leads")
	}
}

// fails is a log whose store breaks when its end is asked for the nth time.
type fails struct {
	raft.LogStore
	wal *wal.WAL
	in  int
}

func (f *fails) LastIndex() (uint64, error) {
	last, err := f.LogStore.LastIndex()
	if f.in--; f.in == 0 {
		f.wal.Close()
	}
	return last, err
}

// A first start says what it cannot write, whichever write it is.
func TestFailedWriteInBootstrap(t *testing.T) {
	for in := 1; in <= 3; in++ {
		returned := make(chan error, 1)
		go func() {
			var err error
			defer func() { returned <- err }() // also when the goroutine just ends
			var r *Replica
			r, err = Open(Config{
				Dir: filepath.Join(t.TempDir(), "data"), NodeID: "n1", Store: lease.NewStore(0), SegmentSize: 1 << 20,
				wrapLog: func(l raft.LogStore) raft.LogStore { return &fails{l, l.(*wal.WAL), in} },
			})
			if err == nil {
				r.Close()
			}
		}()
		if err := <-returned; err == nil {
			t.Errorf("the store broke at look %d, and nobody said so", in)
		}
	}
}

// TestAListIsKept: a node that was started as one of three, and then without the
// list or with one of itself, must not begin alone: the others may count on it.
func TestAListIsKept(t *testing.T) {
	c := &cluster{t: t, net: newNetwork(), nodes: make(map[string]*node)}
	list := map[string]string{"n1": freeAddress(t), "n2": freeAddress(t), "n3": freeAddress(t)}
	begin := func(id string) *node {
		return c.start(Config{NodeID: id, PeerAddress: list[id], InitialCluster: list})
	}
	n2 := begin("n2")
	usual := c.stop(n2)
	for _, row := range []struct {
		change func(*Config)
		want   string
	}{
		{func(cfg *Config) { cfg.InitialCluster = map[string]string{"n2": list["n2"]} }, "before that with --initial-cluster " + addresses(list)},
		{func(cfg *Config) { cfg.InitialCluster, cfg.PeerAddress = nil, freeAddress(t) }, "that has not begun"},
		{func(cfg *Config) { cfg.InitialCluster, cfg.PeerAddress = nil, "" }, "start it with --peer-address " + list["n2"]},
	} {
		cfg := usual
		row.change(&cfg)
		if _, err := c.tryStart(cfg); err == nil || !strings.Contains(err.Error(), row.want) {
			t.Errorf("%v, want %q", err, row.want)
		}
	}
	cfg := usual
	cfg.InitialCluster = nil
	c.start(cfg)
	begin("n1")
	begin("n3")
	c.leader()
	for _, id := range []string{"n1", "n2", "n3"} {
		n := c.nodes[id]
		eventually(t, "no list in the directory of "+id, func() bool {
			n.Replica.mu.Lock()
			defer n.Replica.mu.Unlock()
			return n.id.Begun && n.id.List == nil
		})
	}
}

// TestAListOutlivesWhoJoins: a member that has lost its directory and is started
// with --join is no reason for one that waits for its new cluster to give up: the
// third has what it waits for.
func TestAListOutlivesWhoJoins(t *testing.T) {
	c := &cluster{t: t, net: newNetwork(), nodes: make(map[string]*node)}
	list := map[string]string{"n1": freeAddress(t), "n2": freeAddress(t), "n3": freeAddress(t)}
	c.start(Config{NodeID: "n1", PeerAddress: list["n1"], Join: true})
	n3 := c.start(Config{NodeID: "n3", PeerAddress: list["n3"], InitialCluster: list})
	for range 3 {
		ids, missing, err := n3.meet([]string{"n1", "n2", "n3"})
		if err != nil || len(ids) != 1 || len(missing) != 2 || !strings.Contains(missing[0], "was started with --join") {
			t.Errorf("%v, missing %q: %v", ids, missing, err)
		}
	}
	if err := n3.Err(); err != nil {
		t.Error(err)
	}
}
