package replica

import (
	"errors"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/hashicorp/raft"

	"github.com/distlock/distlock/lease"
	"github.com/distlock/distlock/lease/machine"
)

// watching starts three members, and waits until they compare their digests.
func watching(t *testing.T) (*cluster, *node) {
	t.Helper()
	c := newCluster(t, 3, nil)
	l := c.leader()
	for _, n := range c.nodes {
		raised(t, n.Replica, machine.NewestLevel)
	}
	return c, l
}

// spoil makes the state of a node another one, as a bit that has flipped would.
func spoil(n *node, request machine.RequestID) {
	n.store.Apply(machine.Batch{Term: 1, Commands: []machine.Command{
		&machine.Acquire{Request: request, Names: []string{fmt.Sprint("spoilt/", request)}, Mode: machine.Exclusive, TTL: machine.Duration(time.Hour)},
	}})
}

func diverged(t *testing.T, n *node, alone bool) {
	t.Helper()
	var e *DivergedError
	if err := stops(t, n); !errors.As(err, &e) || e.NodeID != n.nodeID || e.Ours == e.Theirs || e.Alone != alone || !errors.Is(err, lease.ErrLogFailed) {
		t.Fatalf("%s stopped with %v", n.nodeID, err)
	}
}

// A replica whose state is not that of the other voters stops, and does not
// serve again; the others go on.
func TestAReplicaThatDiffersStops(t *testing.T) {
	for _, leads := range []bool{false, true} {
		c, l := watching(t)
		acquire(t, l.Replica, 0)
		c.same(l)
		bad := l
		if !leads {
			bad = c.nodes[c.others(l)[0]]
		}
		spoil(bad, 99)
		acquire(t, l.Replica, 1)
		diverged(t, bad, true)
		cfg := c.stop(bad)
		var e *DivergedError
		if _, err := c.tryStart(cfg); !errors.As(err, &e) || !strings.Contains(err.Error(), "cluster remove "+cfg.NodeID) {
			t.Fatalf("it starts again: %v", err)
		}
		next := c.leader()
		acquire(t, next.Replica, 2)
		if err := next.RemoveMember(cfg.NodeID); err != nil {
			t.Fatal(err)
		}
		acquire(t, next.Replica, 3)
	}
}

// Where no majority has one state, nobody can tell which is right.
func TestReplicasWithoutAMajorityStop(t *testing.T) {
	t.Run("all three differ", func(t *testing.T) {
		c, l := watching(t)
		acquire(t, l.Replica, 0)
		c.same(l)
		for id, n := range c.nodes {
			for i := range machine.RequestID(id[1] - '0') {
				spoil(n, 99+i)
			}
		}
		acquire(t, l.Replica, 1)
		for _, n := range c.nodes {
			diverged(t, n, false)
		}
	})
	t.Run("one of two that are left", func(t *testing.T) {
		c, l := watching(t)
		ids := c.others(l)
		c.stop(c.nodes[ids[0]])
		acquire(t, l.Replica, 0)
		eventually(t, "it has that", func() bool { return locks(t, c.nodes[ids[1]].store) == 1 })
		spoil(c.nodes[ids[1]], 99)
		acquire(t, l.Replica, 1)
		diverged(t, c.nodes[ids[1]], false)
		diverged(t, l, false)
	})
}

// Digests go on through restarts, snapshots and changes of the members, and
// begin when every member knows them.
func TestDigestsGoOn(t *testing.T) {
	c := newCluster(t, 3, func(cfg *Config) {
		cfg.newest = 2
		cfg.SnapshotEntries, cfg.TrailingEntries, cfg.SnapshotInterval = 20, 5, 50*time.Millisecond
	})
	equal := func(begun uint64) uint64 {
		t.Helper()
		var is uint64
		eventually(t, "all have one digest", func() bool {
			var first sum
			is = 0
			for _, n := range c.nodes {
				b, last := n.sums.last()
				switch {
				case is == 0:
					is, first = b, last
				case b != is, last != first:
					return false
				}
			}
			return (is != 0) == (begun != 0) || begun == 0 && is == 0
		})
		return is
	}
	many := func(from int) {
		for i := range 60 {
			acquire(t, c.leader().Replica, from+i)
		}
	}
	many(0)
	if begun := equal(0); begun != 0 {
		t.Fatalf("a digest before every member knows it, from entry %d", begun)
	}
	for _, id := range []string{"n1", "n2", "n3"} {
		cfg := c.stop(c.nodes[id])
		cfg.newest = 0
		c.alter = nil
		c.start(cfg)
		c.leader()
	}
	for _, n := range c.nodes {
		raised(t, n.Replica, machine.NewestLevel)
	}
	many(100)
	begun := equal(1)
	for i, id := range []string{"n1", "n2", "n3"} {
		cfg := c.stop(c.nodes[id])
		many(200 + 100*i)
		c.start(cfg)
		if again := equal(1); again != begun {
			t.Fatalf("the digest begins at entry %d after a restart, at %d before", again, begun)
		}
	}
	fresh := c.start(Config{NodeID: "n4", PeerAddress: freeAddress(t), Join: true})
	if _, err := c.leader().AddMember("n4", fresh.cfg.PeerAddress, ""); err != nil {
		t.Fatal(err)
	}
	many(600)
	if equal(1) != begun {
		t.Error("a new member's digest begins elsewhere")
	}
	for id, n := range c.nodes {
		if err := n.compareOnce(); err != nil {
			t.Errorf("%s: %v", id, err)
		}
	}
}

// What a digest is made of decides whether members of two builds agree: it must
// not change while the level does not.
func TestADigestStaysWhatItIs(t *testing.T) {
	c := chain{Begun: 5}
	c.entry(&raft.Log{Index: 6, Term: 2, Data: []byte("batch")})
	c.outcome(&machine.Outcome{
		Results: []machine.Result{{}, {Waiting: true}, {Hold: &machine.Hold{Token: 9}}, {Refusal: &machine.Refusal{}}},
		Counts:  machine.Counts{Leases: 1, Locks: 2, Waiters: 3, Holds: 4},
	}, 7, 9)
	c.configuration(8, raft.Configuration{Servers: []raft.Server{{ID: "n1#0123456789abcdef", Address: "h:1"}}})
	if want := uint64(0x2a5ee12152fd634d); c.Index != 8 || c.Sum != want {
		t.Errorf("%d, %#x, want %#x", c.Index, c.Sum, want)
	}
}

// A node has the latest values, each after its entry.
func TestSums(t *testing.T) {
	var s sums
	for i := range uint64(3 * recentSums / 2) {
		s.note(chain{Begun: 1, Index: 10 + 2*i, Sum: i})
	}
	begun, last := s.last()
	if begun != 1 || last.index != 10+3*recentSums-2 {
		t.Fatalf("%d %+v", begun, last)
	}
	for i := range uint64(3 * recentSums / 2) {
		got, ok := s.at(1, 10+2*i)
		if want := i >= recentSums/2; ok != want || ok && got != i {
			t.Fatalf("after entry %d: %d %v", 10+2*i, got, ok)
		}
		if _, ok := s.at(1, 11+2*i); ok {
			t.Fatalf("after entry %d", 11+2*i)
		}
	}
	if _, ok := s.at(2, last.index); ok {
		t.Error("of another chain")
	}
	s.note(chain{Begun: 7, Index: 8, Sum: 1})
	if begun, last := s.last(); begun != 7 || last.index != 8 || len(s.list) != 1 {
		t.Errorf("%d %+v", begun, last)
	}
}

// BenchmarkApply applies batches of 32 acquisitions and 32 releases, as under
// full load, and apart from that takes what each did into a digest: both are of
// one run, and their ratio counts.
func BenchmarkApply(b *testing.B) {
	store := lease.NewStore(0)
	store.Restore(machine.NewAt(0, machine.NewestLevel))
	f := &fsm{store: store, newest: machine.NewestLevel, fail: func(err error) { b.Error(err) }, sums: &sums{}}
	index := uint64(1)
	entry := func() *raft.Log {
		token := store.View().LastToken()
		batch := machine.Batch{Stamp: 1}
		for k := range 32 {
			request := machine.RequestID(index*32) + machine.RequestID(k)
			batch.Commands = append(batch.Commands, &machine.Acquire{Request: request, Names: []string{fmt.Sprint("orders/", k)}, Mode: machine.Exclusive, TTL: 1e9, Owner: "host:1"})
		}
		for k := range 32 {
			token++
			batch.Commands = append(batch.Commands, &machine.Release{Name: fmt.Sprint("orders/", k), Token: token})
		}
		index++
		return &raft.Log{Index: index, Term: 2, Data: machine.AppendBatch(nil, &batch)}
	}
	b.Run("apply", func(b *testing.B) {
		for b.Loop() {
			b.StopTimer()
			l := entry()
			b.StartTimer()
			f.Apply(l)
		}
	})
	b.Run("digest", func(b *testing.B) {
		l := entry()
		out := f.Apply(l).(machine.Outcome)
		f.chain = chain{Begun: 1}
		for b.Loop() {
			f.digest(l, &out)
		}
	})
}
