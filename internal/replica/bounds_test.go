package replica

import (
	"bytes"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/hashicorp/raft"

	"github.com/distlock/distlock/lease/machine"
)

// Nobody leads a new cluster, and its first leader waits for no timeout.
func TestTheFirstLeaderWaitsForNoTimeout(t *testing.T) {
	c := newCluster(t, 3, func(cfg *Config) { cfg.ElectionTimeout = 5 * time.Minute })
	l := c.leader()
	acquire(t, l.Replica, 0)
}

// A message to a follower has an entry at least, and no more bytes than a slow
// link takes in time.
func TestMessagesAreBoundedInBytes(t *testing.T) {
	entry := func(n int) *raft.Log { return &raft.Log{Data: make([]byte, n)} }
	for _, x := range []struct {
		entries []*raft.Log
		want    int
	}{
		{nil, 0},
		{[]*raft.Log{entry(4 << 20)}, 1},
		{[]*raft.Log{entry(4 << 20), entry(1)}, 1},
		{[]*raft.Log{entry(100 << 10), entry(100 << 10), entry(100 << 10)}, 2},
		{[]*raft.Log{entry(1), entry(1), entry(1)}, 3},
	} {
		args := &raft.AppendEntriesRequest{Entries: x.entries}
		shorten(args)
		if len(args.Entries) != x.want {
			t.Errorf("%d entries of %d, want %d", len(args.Entries), len(x.entries), x.want)
		}
	}
}

// A follower that was down while large entries were written gets them all.
func TestAFollowerCatchesUpWithLargeEntries(t *testing.T) {
	c := newCluster(t, 3, nil)
	l := c.leader()
	cfg := c.stop(c.nodes[c.others(l)[0]])
	large(t, l.Replica, 40)
	c.start(cfg)
	c.same(c.leader())
}

// large writes entries of about 128 KiB.
func large(t *testing.T, r *Replica, n int) {
	t.Helper()
	text := strings.Repeat("x", 128<<10)
	for range n {
		if _, err := propose(r, &machine.GrantLease{TTL: machine.Duration(time.Hour), Metadata: []machine.Meta{{Key: "k", Value: text}}}); err != nil {
			t.Fatal(err)
		}
	}
}

// What stays in the log behind a snapshot is bounded in bytes: a restart reads no
// more than a snapshot and twice what may come between two.
func TestALogOfLargeEntriesIsBounded(t *testing.T) {
	const most = 1 << 20
	cfg := Config{Dir: t.TempDir(), SnapshotBytes: most, SegmentSize: 256 << 10}
	for range 2 {
		r := open(t, cfg)
		large(t, r, 40)
		eventually(t, "the log is cut", func() bool {
			if err := r.raft.Snapshot().Error(); err != nil {
				t.Fatal(err)
			}
			first, err := r.disk.FirstIndex()
			if err != nil {
				t.Fatal(err)
			}
			last, err := r.disk.LastIndex()
			if err != nil {
				t.Fatal(err)
			}
			return (last-first)*(128<<10) <= most
		})
		if err := r.Close(); err != nil {
			t.Fatal(err)
		}
	}
}

// A snapshot that cannot be written is told of, and tried again.
func TestASnapshotThatFailsIsTold(t *testing.T) {
	dir := t.TempDir()
	r := open(t, Config{Dir: dir, SnapshotBytes: 1})
	snapshots := filepath.Join(dir, snapshotsDir)
	if err := os.RemoveAll(snapshots); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(snapshots, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	acquire(t, r, 0)
	eventually(t, "one has failed", func() bool { return r.FailedSnapshots() > 0 })
	acquire(t, r, 1) // the log goes on
	if err := os.Remove(snapshots); err != nil {
		t.Fatal(err)
	}
	eventually(t, "one is there", func() bool {
		list, err := r.disk.snapshots.List()
		return err == nil && len(list) > 0 || r.raft.Snapshot().Error() == nil && false
	})
	if err := r.Close(); err != nil {
		t.Fatal(err)
	}
}

// The snapshots that a higher level asks for are tried again, too.
func TestASnapshotOfANewLevelIsTriedAgain(t *testing.T) {
	c := newCluster(t, 3, nil)
	n := c.leader()
	raised(t, n.Replica, machine.NewestLevel)
	listed := func() int {
		list, _ := n.disk.snapshots.List()
		return len(list)
	}
	eventually(t, "the first are there", func() bool { return listed() == keep && !n.fsm.rose.Load() })
	dir := filepath.Join(n.cfg.Dir, snapshotsDir)
	if err := os.RemoveAll(dir); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(dir, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	n.fsm.rose.Store(true)
	eventually(t, "one has failed", func() bool { return n.FailedSnapshots() > 0 })
	if err := os.Remove(dir); err != nil {
		t.Fatal(err)
	}
	eventually(t, "they are there", func() bool { return listed() == keep })
}

// hangs is a disk that takes no write any more once it is told to.
type hangs struct {
	raft.LogStore
	until chan struct{} // nil while it works
}

func (h *hangs) StoreLogs(logs []*raft.Log) error {
	if until := h.until; until != nil && bytes.Contains(logs[len(logs)-1].Data, []byte("hang")) {
		<-until
	}
	return h.LogStore.StoreLogs(logs)
}

// A node whose disk hangs ends all the same, and says why. Once the disk answers,
// nothing is left of it: no goroutine, and no lock on the directory.
func TestCloseWithADiskThatHangs(t *testing.T) {
	until := make(chan struct{})
	dir := t.TempDir()
	r := open(t, Config{Dir: dir, NodeID: "n1", PeerAddress: freeAddress(t), wrapLog: func(l raft.LogStore) raft.LogStore { return &hangs{l, until} }})
	raised(t, r, machine.NewestLevel) // nothing else is on its way
	answered := make(chan error, 1)
	r.Propose(machine.Batch{Commands: []machine.Command{
		&machine.GrantLease{TTL: 1, Owner: "hang"},
	}}, func(_ machine.Outcome, err error) { answered <- err })
	began := time.Now()
	err := r.Close()
	if err == nil || !strings.Contains(err.Error(), "disk did not answer") {
		t.Errorf("%v", err)
	}
	if took := time.Since(began); took > closeWithin {
		t.Errorf("it took %v", took)
	}
	close(until)
	<-answered
	eventually(t, "the directory can be opened again", func() bool {
		again, err := tryOpen(Config{Dir: dir, NodeID: "n1", PeerAddress: r.cfg.PeerAddress})
		if err != nil {
			return false
		}
		if err := again.Close(); err != nil {
			t.Error(err)
		}
		return true
	})
}
