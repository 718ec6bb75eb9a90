package replica

import (
	"errors"
	"testing"
	"time"

	"github.com/distlock/distlock/lease"
	"github.com/distlock/distlock/lease/machine"
)

// raised waits until a replica is at a level.
func raised(t *testing.T, r *Replica, level machine.Level) {
	t.Helper()
	for end := time.Now().Add(20 * time.Second); r.cfg.Store.Level() < level; time.Sleep(5 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("%s is at level %d", r.nodeID, r.cfg.Store.Level())
		}
	}
}

// TestALoneNodeRaisesItsLevel: nobody else has to know it.
func TestALoneNodeRaisesItsLevel(t *testing.T) {
	dir := t.TempDir()
	old := open(t, Config{Dir: dir, newest: machine.FirstLevel})
	out, err := propose(old, &machine.Acquire{Request: 1, Names: []string{"a"}, Mode: machine.Exclusive, TTL: 1e9})
	if err != nil {
		t.Fatal(err)
	}
	if old.cfg.Store.Level() != machine.FirstLevel {
		t.Fatal("raised above what it knows")
	}
	if err := old.Close(); err != nil {
		t.Fatal(err)
	}
	// The next build reads on what the one before wrote.
	r := open(t, Config{Dir: dir})
	raised(t, r, machine.NewestLevel)
	var hold machine.Lease
	r.cfg.Store.Read(func(m *machine.Machine) { hold, _ = m.Lease(out.Results[0].Lease) })
	if len(hold.Holds) != 1 {
		t.Errorf("%+v", hold)
	}
	if err := r.Close(); err != nil {
		t.Fatal(err)
	}
	// And the one before does not go on where it cannot follow.
	again, err := Open(Config{Dir: dir, Store: lease.NewStore(0), SegmentSize: 1 << 20, newest: machine.FirstLevel})
	if err != nil {
		t.Fatal(err)
	}
	for range again.Leadership() {
	}
	var level *LevelError
	if !errors.As(again.Err(), &level) || level.Level != machine.NewestLevel {
		t.Errorf("a build of the first level on a history of the second: %v", again.Err())
	}
	again.Close()
	if r = open(t, Config{Dir: dir}); r.cfg.Store.Level() < machine.FirstLevel {
		t.Error("harmed")
	}
	raised(t, r, machine.NewestLevel)
	if err := r.Close(); err != nil {
		t.Fatal(err)
	}
}

// TestTheLevelRisesWithTheLastMember: while one member does not know a level,
// or does not say so, the cluster does not use it; and who does not know it is
// not taken in afterwards.
func TestTheLevelRisesWithTheLastMember(t *testing.T) {
	c := newCluster(t, 3, func(cfg *Config) {
		if cfg.NodeID == "n2" || cfg.NodeID == "n3" {
			cfg.newest = machine.FirstLevel
		}
	})
	leader := c.leader()
	stays := func(why string) {
		t.Helper()
		for range 3 {
			if err := c.leader().tryRaise(); err == nil {
				t.Fatalf("%s: raised", why)
			}
		}
		for id, n := range c.nodes {
			if n.store.Level() != machine.FirstLevel {
				t.Fatalf("%s: %s is at level %d", why, id, n.store.Level())
			}
		}
	}
	stays("two members of the build before")
	c.alter = nil
	upgrade := func(id string) {
		cfg := c.stop(c.nodes[id])
		cfg.newest = 0
		c.start(cfg)
		leader = c.leader()
	}
	upgrade("n2")
	stays("one member of the build before")
	down := c.stop(c.nodes["n3"])
	leader = c.leader()
	stays("a member that does not answer")
	down.newest = 0
	c.start(down)
	for id := range c.nodes {
		raised(t, c.nodes[id].Replica, machine.NewestLevel)
	}
	leader = c.leader()
	old := c.start(Config{NodeID: "n4", PeerAddress: freeAddress(t), Join: true, newest: machine.FirstLevel})
	var refused *lease.MemberError
	if _, err := leader.AddMember("n4", old.cfg.PeerAddress, ""); !errors.As(err, &refused) {
		t.Fatalf("a node of the build before was added: %v", err)
	}
	c.stop(old)
	fresh := c.start(Config{NodeID: "n5", PeerAddress: freeAddress(t), Join: true})
	if _, err := leader.AddMember("n5", fresh.cfg.PeerAddress, ""); err != nil {
		t.Fatal(err)
	}
	raised(t, fresh.Replica, machine.NewestLevel)
}

// TestABuildThatCannotReadTheSnapshot: members do not speak to a build without
// incarnations, so it would not hear how far the log is agreed upon, and wait
// for ever. It finds the level in a snapshot, says so, and harms nothing.
func TestABuildThatCannotReadTheSnapshot(t *testing.T) {
	c := newCluster(t, 3, nil)
	l := c.leader()
	acquire(t, l.Replica, 0)
	for _, n := range c.nodes {
		eventually(t, "a snapshot at the new level", func() bool {
			snapshots, err := n.disk.snapshots.List()
			return err == nil && len(snapshots) > 0
		})
	}
	cfg := c.stop(c.nodes[c.others(l)[0]])
	cfg.newest = machine.FirstLevel
	var level *LevelError
	if _, err := c.tryStart(cfg); !errors.As(err, &level) {
		t.Fatalf("it started on data of a newer version: %v", err)
	}
	cfg.newest = 0
	c.start(cfg)
	acquire(t, c.leader().Replica, 1)
	c.same(c.leader())
}
