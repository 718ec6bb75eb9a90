package replica

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/hashicorp/raft"
	"go.uber.org/zap"

	"github.com/distlock/distlock/lease"
	"github.com/distlock/distlock/lease/machine"
)

func put(t *testing.T, dir string, files ...string) {
	t.Helper()
	for _, f := range files {
		path := filepath.Join(dir, f)
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, []byte(f), 0o644); err != nil {
			t.Fatal(err)
		}
	}
}

// filesIn lists the files below a directory, with their content.
func filesIn(t *testing.T, dir string) map[string]string {
	t.Helper()
	all := make(map[string]string)
	err := filepath.WalkDir(dir, func(path string, e fs.DirEntry, err error) error {
		if err != nil || e.IsDir() {
			return err
		}
		text, err := os.ReadFile(path)
		name, _ := filepath.Rel(dir, path)
		all[name] = string(text)
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return all
}

// Whenever the process ends while a directory is given another history, the
// next start finds all of the old one or all of the new one, and the old one
// is kept.
func TestAReplacedDirectoryAtEveryStep(t *testing.T) {
	defer func() { rename = os.Rename }()
	died := errors.New("died")
	for _, before := range []bool{true, false} { // died before the rename, or after it
		for step := 1; ; step++ {
			dir := t.TempDir()
			put(t, dir, "lock", "lost+found/x", "identity.json", "a.wal", "snapshots/1/state")
			n := 0
			rename = func(from, to string) error {
				if n++; n > step || n == step && before {
					return died
				}
				if err := os.Rename(from, to); err != nil {
					return err
				}
				if n == step {
					return died
				}
				return nil
			}
			_, err := replace(dir, time.Unix(1, 2), func(to string) error {
				if err := os.WriteFile(filepath.Join(to, "identity.json"), []byte("new"), 0o600); err != nil {
					return err
				}
				return os.WriteFile(filepath.Join(to, "b.wal"), []byte("new"), 0o600)
			})
			rename = os.Rename
			done := err == nil
			if !done && !errors.Is(err, died) {
				t.Fatal(err)
			}
			if _, err := finishReplacing(dir); err != nil {
				t.Fatalf("step %d: %v", step, err)
			}
			got := filesIn(t, dir)
			want := map[string]string{"lock": "lock", "lost+found/x": "lost+found/x"}
			switch aside := beforeRestore + time.Unix(1, 2).UTC().Format(stampLayout) + "/"; got["identity.json"] {
			case "identity.json":
				if step > 1 || !before {
					t.Fatalf("step %d: the new history is lost: %v", step, got)
				}
				for _, f := range []string{"identity.json", "a.wal", "snapshots/1/state"} {
					want[f] = f
				}
				part := restoring + time.Unix(1, 2).UTC().Format(stampLayout) + partSuffix + "/"
				want[part+"identity.json"], want[part+"b.wal"] = "new", "new"
			case "new":
				want["identity.json"], want["b.wal"] = "new", "new"
				for _, f := range []string{"identity.json", "a.wal", "snapshots/1/state"} {
					want[aside+f] = f
				}
			}
			if fmt.Sprint(got) != fmt.Sprint(want) {
				t.Fatalf("step %d:\n%v\nwant\n%v", step, got, want)
			}
			if done {
				if step < 5 {
					t.Fatalf("only %d renames", step)
				}
				break
			}
		}
	}
}

// A server that starts finishes what a restore began.
func TestAStartFinishesARestore(t *testing.T) {
	defer func() { rename = os.Rename }()
	dir := t.TempDir()
	r := open(t, Config{Dir: dir})
	acquire(t, r, 1)
	var b bytes.Buffer
	if err := r.Backup(&b); err != nil {
		t.Fatal(err)
	}
	old := r.ClusterID()
	if err := r.Close(); err != nil {
		t.Fatal(err)
	}
	n := 0
	rename = func(from, to string) error {
		if n++; n > 2 {
			return errors.New("died")
		}
		return os.Rename(from, to)
	}
	if _, err := Restore(RestoreConfig{Dir: dir, From: &b, Force: true, Now: time.Unix(5, 0)}); err == nil {
		t.Fatal("it did not die")
	}
	rename = os.Rename
	store := lease.NewStore(0)
	r = open(t, Config{Dir: dir, Store: store})
	if r.ClusterID() == old || r.Restored() == nil || store.View().LastToken() < machine.HistoryGap {
		t.Errorf("cluster %s, restored %v, tokens %d", r.ClusterID(), r.Restored(), store.View().LastToken())
	}
	if err := r.Close(); err != nil {
		t.Fatal(err)
	}
}

// A data directory may be a mount point: it is never itself renamed, and what
// a file system keeps in its root is left alone.
func TestARestoreIntoAVolume(t *testing.T) {
	r := open(t, Config{Dir: t.TempDir()})
	acquire(t, r, 1)
	var b bytes.Buffer
	if err := r.Backup(&b); err != nil {
		t.Fatal(err)
	}
	if err := r.Close(); err != nil {
		t.Fatal(err)
	}
	parent := t.TempDir()
	dir := filepath.Join(parent, "volume")
	put(t, dir, "lost+found/x")
	before, err := os.Stat(dir)
	if err != nil {
		t.Fatal(err)
	}
	for i := range 3 {
		res, err := Restore(RestoreConfig{Dir: dir, From: bytes.NewReader(b.Bytes()), Force: i > 0, Now: time.Unix(int64(i), 0)})
		if err != nil || (res.MovedTo != "") != (i > 0) {
			t.Fatalf("%+v, %v", res, err)
		}
		after, err := os.Stat(dir)
		if err != nil || !os.SameFile(before, after) {
			t.Fatalf("the directory was replaced: %v", err)
		}
		if filesIn(t, dir)["lost+found/x"] == "" {
			t.Fatal("lost+found was touched")
		}
		if err := open(t, Config{Dir: dir}).Close(); err != nil {
			t.Fatal(err)
		}
	}
	beside, err := os.ReadDir(parent)
	if err != nil || len(beside) != 1 {
		t.Errorf("beside the directory: %v, %v", beside, err)
	}
}

// What cannot be restored leaves nothing behind.
func TestARefusedRestoreLeavesNothing(t *testing.T) {
	parent := t.TempDir()
	r := open(t, Config{Dir: t.TempDir()})
	var b bytes.Buffer
	if err := r.Backup(&b); err != nil {
		t.Fatal(err)
	}
	if err := r.Close(); err != nil {
		t.Fatal(err)
	}
	for _, cfg := range []RestoreConfig{
		{From: bytes.NewReader(b.Bytes()[:b.Len()-1])},
		{From: bytes.NewReader(b.Bytes()), Above: 1<<53 - 1},
	} {
		cfg.Dir, cfg.Now = filepath.Join(parent, "new"), time.Unix(1, 0)
		if _, err := Restore(cfg); err == nil {
			t.Fatal("restored")
		}
		if left, _ := os.ReadDir(parent); len(left) > 0 {
			t.Errorf("left: %v", left)
		}
	}
	if _, err := Recover(RestoreConfig{Dir: filepath.Join(parent, "none"), Now: time.Unix(1, 0)}); !errors.Is(err, ErrNoHistory) {
		t.Errorf("recovered nothing: %v", err)
	}
	if left, _ := os.ReadDir(parent); len(left) > 0 {
		t.Errorf("left: %v", left)
	}
}

// A survivor becomes a cluster of its own with all that it had, and a stopped
// server's directory is backed up like a running one.
func TestRecoverASurvivor(t *testing.T) {
	c := newCluster(t, 3, nil)
	l := c.leader()
	for i := range 30 {
		acquire(t, l.Replica, i)
	}
	id := c.others(l)[0]
	survivor := c.nodes[id]
	last := l.raft.LastIndex()
	eventually(t, "the survivor has everything", func() bool { return survivor.AppliedIndex() >= last })
	old, dir := l.ClusterID(), survivor.cfg.Dir
	if _, err := Recover(RestoreConfig{Dir: dir, Now: time.Unix(9, 0)}); !errors.Is(err, ErrLocked) {
		t.Fatalf("recovered under a running server: %v", err)
	}
	for _, n := range c.nodes {
		if err := n.Close(); err != nil {
			t.Fatal(err)
		}
	}
	before := filesIn(t, dir)
	var b bytes.Buffer
	info, err := BackupDirectory(dir, &b, "v", time.Unix(8, 0))
	if err != nil || info.ClusterID != old || info.Leases != 30 || info.LastToken != 30 {
		t.Fatalf("%+v, %v", info, err)
	}
	if checked, err := CheckBackup(&b); err != nil || checked != info {
		t.Fatalf("%+v, %v", checked, err)
	}
	if after := filesIn(t, dir); len(after) != len(before) {
		t.Errorf("a backup changed the directory: %v", after)
	}
	res, err := Recover(RestoreConfig{Dir: dir, Now: time.Unix(9, 0)})
	if err != nil || res.NodeID != id || res.NewClusterID == old || res.Leases != 30 || uint64(res.TokensAbove) != 30+machine.HistoryGap {
		t.Fatalf("%+v, %v", res, err)
	}
	kept := filesIn(t, res.MovedTo)
	for name := range before {
		if _, ok := kept[name]; !ok && name != "lock" && name != "wal-meta.db" {
			t.Errorf("%s is gone", name)
		}
	}
	r := open(t, Config{Dir: dir})
	if r.ClusterID() != res.NewClusterID || len(r.configuration().servers.Servers) != 1 {
		t.Errorf("cluster %s, members %v", r.ClusterID(), r.configuration().servers)
	}
	out, err := propose(r, &machine.Acquire{Request: 1e6, Names: []string{"lock/0"}, Mode: machine.Exclusive, TTL: 1e9})
	if err != nil || out.Results[0].Hold == nil || out.Results[0].Hold.Token <= res.TokensAbove {
		t.Fatalf("the first grant of the new history: %+v, %v", out, err)
	}
	if err := r.Close(); err != nil {
		t.Fatal(err)
	}
}

// What a data directory has is for its owner alone, whatever its mode was.
func TestFilesAreTheOwnersAlone(t *testing.T) {
	dir := t.TempDir()
	put(t, dir, "lost+found/x")
	if err := os.Chmod(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	r := open(t, Config{Dir: dir})
	acquire(t, r, 1)
	if err := r.raft.Snapshot().Error(); err != nil {
		t.Fatal(err)
	}
	if err := r.Close(); err != nil {
		t.Fatal(err)
	}
	put(t, dir, "of an earlier build") // for all to read
	r = open(t, Config{Dir: dir})
	defer r.Close()
	var readable []string
	err := filepath.WalkDir(dir, func(path string, e fs.DirEntry, err error) error {
		if err != nil || path == dir || e.Name() == "lost+found" || filepath.Base(filepath.Dir(path)) == "lost+found" {
			return err
		}
		if info, err := e.Info(); err != nil || info.Mode().Perm()&0o077 != 0 {
			readable = append(readable, path)
		}
		return nil
	})
	if err != nil || len(readable) > 0 {
		t.Errorf("others may read %v, %v", readable, err)
	}
	if info, err := os.Stat(filepath.Join(dir, "lost+found", "x")); err != nil || info.Mode().Perm() != 0o644 {
		t.Errorf("lost+found was touched: %v, %v", info.Mode(), err)
	}
}

// A snapshot may have been taken before the first leader gave the cluster its
// id, and the directory have learned it afterwards.
func TestASnapshotFromBeforeTheClustersID(t *testing.T) {
	dir := t.TempDir()
	r := open(t, Config{Dir: dir})
	eventually(t, "the id is known", func() bool { return r.ClusterID() != "" })
	id := r.ClusterID()
	if err := r.Close(); err != nil {
		t.Fatal(err)
	}
	if err := os.RemoveAll(filepath.Join(dir, snapshotsDir)); err != nil {
		t.Fatal(err)
	}
	d, err := openDisk(Config{Dir: dir, Logger: zap.NewNop(), SegmentSize: 1 << 20}, func(err error) { t.Error(err) })
	if err != nil {
		t.Fatal(err)
	}
	// As of entry 1, the configuration, with the entries after it in the log.
	c := d.configs.latest()
	_, transport := raft.NewInmemTransport("n1")
	sink, err := d.snapshots.Create(raft.SnapshotVersionMax, 1, 1, c.servers, c.index, transport)
	if err != nil {
		t.Fatal(err)
	}
	if err := (snapshot{note{}, machine.New(0).Copy()}).Persist(sink); err != nil {
		t.Fatal(err)
	}
	if err := d.close(); err != nil {
		t.Fatal(err)
	}
	r = open(t, Config{Dir: dir})
	defer r.Close()
	acquire(t, r, 1)
	if err := r.Err(); err != nil || r.ClusterID() != id {
		t.Errorf("cluster %s, not %s: %v", r.ClusterID(), id, err)
	}
}
