package replica

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/hashicorp/raft"
	"github.com/hashicorp/raft-wal/fs"
	"github.com/hashicorp/raft-wal/metadb"
	"github.com/hashicorp/raft-wal/segment"
	"github.com/hashicorp/raft-wal/types"
	"go.uber.org/goleak"
	"go.uber.org/zap"
	"go.uber.org/zap/zaptest/observer"

	"github.com/distlock/distlock/lease"
	"github.com/distlock/distlock/lease/machine"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// open opens a replica and waits until it leads.
func open(t testing.TB, cfg Config) *Replica {
	t.Helper()
	r, err := tryOpen(cfg)
	if err != nil {
		t.Fatal(err)
	}
	lead(t, r)
	return r
}

func tryOpen(cfg Config) (*Replica, error) {
	if cfg.Store == nil {
		cfg.Store = lease.NewStore(0)
	}
	if cfg.SegmentSize == 0 {
		cfg.SegmentSize = 1 << 20
	}
	return Open(cfg)
}

func lead(t testing.TB, r *Replica) lease.Leadership {
	t.Helper()
	select {
	case l := <-r.Leadership():
		if !l.Leader {
			t.Fatalf("not the leader: %v", r.Err())
		}
		return l
	case <-time.After(10 * time.Second):
		t.Fatal("no leader within 10s")
	}
	panic("unreachable")
}

func propose(r *Replica, commands ...machine.Command) (machine.Outcome, error) {
	type answer struct {
		out machine.Outcome
		err error
	}
	done := make(chan answer, 1)
	r.Propose(machine.Batch{Stamp: 1, Commands: commands}, func(out machine.Outcome, err error) { done <- answer{out, err} })
	a := <-done
	return a.out, a.err
}

func acquire(t testing.TB, r *Replica, n int) {
	t.Helper()
	out, err := propose(r, &machine.Acquire{Request: machine.RequestID(n + 1), Names: []string{fmt.Sprintf("lock/%d", n)}, Mode: machine.Exclusive, TTL: 1e9})
	if err != nil || out.Results[0].Hold == nil {
		t.Fatal(out, err)
	}
}

// locks counts the leading locks lock/0, lock/1, … that a store has, and fails
// when it has any other: a log recovers to a prefix of its history.
func locks(t testing.TB, s *lease.Store) int {
	t.Helper()
	have, prefix := 0, 0
	s.Read(func(m *machine.Machine) {
		have = m.Counts().Locks
		for {
			if _, ok := m.Lock(fmt.Sprintf("lock/%d", prefix)); !ok {
				return
			}
			prefix++
		}
	})
	if have != prefix {
		t.Fatalf("%d locks, of which %d are a prefix of the history", have, prefix)
	}
	return prefix
}

// TestALoneVoterWaitsForNoTimeout: a start must not take a timeout that is long
// so that raft need not wake for it fifty times a second ever after.
func TestALoneVoterWaitsForNoTimeout(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "data")
	for range 2 { // the first start, and another
		core, logs := observer.New(zap.DebugLevel)
		r := open(t, Config{Dir: dir, Logger: zap.New(core)})
		if logs.FilterMessageSnippet("election won").Len() != 1 {
			t.Fatal("raft does not say that it won an election: has its wording changed?")
		}
		if said := logs.FilterMessageSnippet("timeout reached").All(); len(said) > 0 {
			t.Error(said[0].Message)
		}
		r.Close()
	}
}

// TestAClusterHasAnIDBeforeItAnswers: a client that has been answered once can
// tell this cluster from another one at its address.
func TestAClusterHasAnIDBeforeItAnswers(t *testing.T) {
	r := open(t, Config{Dir: filepath.Join(t.TempDir(), "data")})
	defer r.Close()
	if r.ClusterID() == "" {
		t.Error("this node leads a cluster that has no id")
	}
}

func TestReopenHasEverything(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "data")
	for round := range 3 {
		store := lease.NewStore(0)
		r := open(t, Config{Dir: dir, Store: store})
		if n := locks(t, store); n != round*10 {
			t.Fatalf("round %d: %d locks", round, n)
		}
		for i := range 10 {
			acquire(t, r, round*10+i)
		}
		id := r.ClusterID()
		if err := r.Close(); err != nil {
			t.Fatal(err)
		}
		if id == "" || r.NodeID() != "n1" {
			t.Fatalf("cluster %q node %q", id, r.NodeID())
		}
	}
	info, err := os.Stat(dir)
	if err != nil || info.Mode().Perm() != 0o700 {
		t.Fatalf("%v %v", info.Mode(), err)
	}
}

func TestSecondServerIsRefused(t *testing.T) {
	dir := t.TempDir()
	r := open(t, Config{Dir: dir})
	defer r.Close()
	if _, err := tryOpen(Config{Dir: dir}); !errors.Is(err, ErrLocked) || !strings.Contains(err.Error(), dir) {
		t.Fatal(err)
	}
}

func TestSnapshotAndRestart(t *testing.T) {
	dir := t.TempDir()
	r := open(t, Config{Dir: dir, SnapshotEntries: 50, TrailingEntries: 10, SnapshotInterval: 10 * time.Millisecond})
	for i := range 300 {
		acquire(t, r, i)
	}
	deadline := time.Now().Add(10 * time.Second)
	for {
		list, err := r.disk.snapshots.List()
		if err != nil {
			t.Fatal(err)
		}
		if len(list) > 0 && list[0].Index > 200 {
			break
		}
		if time.Now().After(deadline) {
			t.Fatal("no snapshot")
		}
		time.Sleep(time.Millisecond)
	}
	if err := r.Close(); err != nil {
		t.Fatal(err)
	}
	store := lease.NewStore(0)
	r = open(t, Config{Dir: dir, Store: store})
	defer r.Close()
	if first, err := r.disk.wal.FirstIndex(); err != nil || first < 50 {
		t.Errorf("the log begins at %d: it was not cut (%v)", first, err)
	}
	if n := locks(t, store); n != 300 {
		t.Fatalf("%d locks", n)
	}
	acquire(t, r, 300)
}

// history makes a log of n grants and returns its newest segment.
func history(t *testing.T, dir string, n int) string {
	t.Helper()
	r := open(t, Config{Dir: dir})
	for i := range n {
		acquire(t, r, i)
	}
	if err := r.Close(); err != nil {
		t.Fatal(err)
	}
	return filepath.Join(dir, newestSegment(dir))
}

func copyDir(t *testing.T, from string) string {
	t.Helper()
	to := t.TempDir()
	if err := os.CopyFS(to, os.DirFS(from)); err != nil {
		t.Fatal(err)
	}
	return to
}

// beforeMagic is what raft-wal writes of an entry before our part of it: the
// frame's header and the entry's, while indexes are below 128.
const beforeMagic = 8 + 4

// used is where the written part of a segment ends.
func used(text []byte) int {
	n := len(text)
	for n > 0 && text[n-1] == 0 {
		n--
	}
	return n
}

// TestTornTail cuts the log at many places of its last write, as a crash in
// the middle of it does: everything before is there.
func TestTornTail(t *testing.T) {
	const n = 20
	dir := t.TempDir()
	segment := history(t, dir, n)
	text, err := os.ReadFile(segment)
	if err != nil {
		t.Fatal(err)
	}
	last := strings.LastIndex(string(text), string(entryMagic[:])) - beforeMagic
	for cut := last; cut <= used(text); cut += 3 {
		torn := copyDir(t, dir)
		damaged := append([]byte(nil), text...)
		clear(damaged[cut:])
		if err := os.WriteFile(filepath.Join(torn, filepath.Base(segment)), damaged, 0o600); err != nil {
			t.Fatal(err)
		}
		store := lease.NewStore(0)
		r := open(t, Config{Dir: torn, Store: store})
		if got := locks(t, store); got < n-1 {
			t.Fatalf("cut at %d of %d: %d locks of %d", cut, used(text), got, n)
		} else if cut == last && got != n-1 {
			t.Fatalf("the last write is cut off and yet there: %d", got)
		} else if got == n-1 {
			acquire(t, r, n-1)
		}
		if err := r.Close(); err != nil {
			t.Fatal(err)
		}
	}
}

// TestFlippedBits flips bits all over the log. Each flip is either refused,
// with the file's name and what to do, or harmless: nothing is missing. Only
// the last write cannot be told from one that a crash has torn.
func TestFlippedBits(t *testing.T) {
	const n = 20
	dir := t.TempDir()
	segment := history(t, dir, n)
	text, err := os.ReadFile(segment)
	if err != nil {
		t.Fatal(err)
	}
	last := strings.LastIndex(string(text), string(entryMagic[:])) - beforeMagic
	refused := 0
	for at := 0; at < last; at += 7 {
		flipped := copyDir(t, dir)
		damaged := append([]byte(nil), text...)
		damaged[at] ^= 1 << (at % 8)
		if err := os.WriteFile(filepath.Join(flipped, filepath.Base(segment)), damaged, 0o600); err != nil {
			t.Fatal(err)
		}
		store := lease.NewStore(0)
		r, err := tryOpen(Config{Dir: flipped, Store: store})
		if err != nil {
			var corrupt *CorruptError
			if !errors.As(err, &corrupt) || !strings.Contains(err.Error(), flipped) || strings.Contains(err.Error(), "\n") {
				t.Fatalf("flip at %d: %v", at, err)
			}
			refused++
			continue
		}
		lead(t, r)
		if got := locks(t, store); got != n {
			t.Errorf("flip at %d of %d: %d locks of %d, and no error", at, last, got, n)
		}
		if err := r.Close(); err != nil {
			t.Fatal(err)
		}
	}
	if refused < last/7/2 {
		t.Errorf("%d of %d flips were refused", refused, last/7)
	}
	t.Logf("%d of %d flips refused, the others harmless", refused, last/7+1)
}

func TestDamagedSnapshotIsRefused(t *testing.T) {
	dir := t.TempDir()
	r := open(t, Config{Dir: dir})
	acquire(t, r, 0)
	if err := r.raft.Snapshot().Error(); err != nil {
		t.Fatal(err)
	}
	if err := r.Close(); err != nil {
		t.Fatal(err)
	}
	for _, file := range []string{"state.bin", "meta.json"} {
		damaged := copyDir(t, dir)
		list, _ := filepath.Glob(filepath.Join(damaged, snapshotsDir, "*", file))
		text, err := os.ReadFile(list[0])
		if err != nil {
			t.Fatal(err)
		}
		text[0] ^= 0x41
		if err := os.WriteFile(list[0], text, 0o600); err != nil {
			t.Fatal(err)
		}
		var corrupt *CorruptError
		if _, err := tryOpen(Config{Dir: damaged}); !errors.As(err, &corrupt) || !strings.Contains(err.Error(), file) {
			t.Errorf("%s damaged: %v", file, err)
		}
	}
}

// TestKilledBetweenSealAndRotation: the process ends after the write that
// sealed a segment and before the list of segments says so. raft-wal alone
// would refuse every write from then on.
func TestKilledBetweenSealAndRotation(t *testing.T) {
	dir := t.TempDir()
	history(t, dir, 20)
	meta := &metadb.BoltMetaDB{}
	state, err := meta.Load(dir)
	if err != nil {
		t.Fatal(err)
	}
	tail, err := segment.NewFiler(dir, fs.New()).RecoverTail(state.Segments[len(state.Segments)-1])
	if err != nil {
		t.Fatal(err)
	}
	if _, err := tail.ForceSeal(); err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(tail.Close(), meta.Close()); err != nil {
		t.Fatal(err)
	}
	for n := 20; n < 22; n++ { // and again, from the new segment
		store := lease.NewStore(0)
		r := open(t, Config{Dir: dir, Store: store})
		if got := locks(t, store); got != n {
			t.Fatalf("%d locks, want %d", got, n)
		}
		acquire(t, r, n)
		if err := r.Close(); err != nil {
			t.Fatal(err)
		}
	}
}

// TestTornSeal: the write that was to seal a segment is cut short, as by a full
// disk. raft-wal alone takes the piece of the index that is there for a whole
// one.
func TestTornSeal(t *testing.T) {
	t.Run("with an entry", func(t *testing.T) { testTornSeal(t, false) })
	t.Run("alone", func(t *testing.T) { testTornSeal(t, true) })
}

func testTornSeal(t *testing.T, forced bool) {
	const n = 20
	dir := t.TempDir()
	file := history(t, dir, n)
	text, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	from := used(text)
	meta := &metadb.BoltMetaDB{}
	state, err := meta.Load(dir)
	if err != nil {
		t.Fatal(err)
	}
	info := state.Segments[len(state.Segments)-1]
	info.SizeLimit = 1 // so that the next write seals
	tail, err := segment.NewFiler(dir, fs.New()).RecoverTail(info)
	if err != nil {
		t.Fatal(err)
	}
	if forced {
		_, err = tail.ForceSeal()
	} else {
		err = tail.Append([]types.LogEntry{{Index: tail.LastIndex() + 1, Data: bytes.Repeat([]byte("x"), 100)}})
	}
	if err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(tail.Close(), meta.Close()); err != nil {
		t.Fatal(err)
	}
	if text, err = os.ReadFile(file); err != nil {
		t.Fatal(err)
	}
	if used(text)-from < 80 {
		t.Fatalf("%d bytes were written: nothing was sealed", used(text)-from)
	}
	for cut := from; cut < used(text); cut += 7 {
		torn := copyDir(t, dir)
		damaged := bytes.Clone(text)
		clear(damaged[cut:])
		if err := os.WriteFile(filepath.Join(torn, filepath.Base(file)), damaged, 0o600); err != nil {
			t.Fatal(err)
		}
		for want := n; want < n+2; want++ {
			store := lease.NewStore(0)
			r := open(t, Config{Dir: torn, Store: store})
			if got := locks(t, store); got != want {
				t.Fatalf("cut at %d of %d: %d locks, want %d", cut-from, used(text)-from, got, want)
			}
			acquire(t, r, want)
			if err := r.Close(); err != nil {
				t.Fatal(err)
			}
		}
	}
}

// TestManySegments runs over many rotations and restarts.
func TestManySegments(t *testing.T) {
	dir := t.TempDir()
	n := 0
	for range 5 {
		store := lease.NewStore(0)
		r := open(t, Config{Dir: dir, Store: store, SegmentSize: 4096})
		if got := locks(t, store); got != n {
			t.Fatalf("%d locks, want %d", got, n)
		}
		for range 100 {
			acquire(t, r, n)
			n++
		}
		if err := r.Close(); err != nil {
			t.Fatal(err)
		}
	}
}

// failing is a log store whose disk becomes full.
type failing struct {
	raft.LogStore
	full atomic.Bool
}

func (f *failing) StoreLogs(logs []*raft.Log) error {
	if f.full.Load() {
		return syscall.ENOSPC
	}
	return f.LogStore.StoreLogs(logs)
}

func TestFailedWriteStopsTheLog(t *testing.T) {
	dir := t.TempDir()
	var store *failing
	r := open(t, Config{Dir: dir, wrapLog: func(l raft.LogStore) raft.LogStore {
		store = &failing{LogStore: l}
		return store
	}})
	acquire(t, r, 0)
	raised(t, r, machine.NewestLevel) // nothing else is on its way
	store.full.Store(true)
	_, err := propose(r, &machine.Declare{Name: "d"})
	if !errors.Is(err, lease.ErrOutcomeUnknown) {
		t.Errorf("in flight: %v", err)
	}
	if _, open := <-r.Leadership(); open {
		if _, open := <-r.Leadership(); open {
			t.Error("leadership goes on")
		}
	}
	if err := r.Err(); !errors.Is(err, syscall.ENOSPC) {
		t.Errorf("Err: %v", err)
	}
	if _, err := propose(r, &machine.Declare{Name: "e"}); err == nil {
		t.Error("acknowledged after a failed write")
	}
	if err := r.Close(); err != nil {
		t.Fatal(err)
	}
	again := lease.NewStore(0)
	r = open(t, Config{Dir: dir, Store: again})
	defer r.Close()
	if n := locks(t, again); n != 1 {
		t.Errorf("%d locks", n)
	}
}

func TestUnknownCommandStopsTheNode(t *testing.T) {
	r := open(t, Config{Dir: t.TempDir()})
	defer r.Close()
	future := r.raft.Apply([]byte{1, 0, 1, 200}, 0)
	if err := future.Error(); err != nil {
		t.Fatal(err)
	}
	<-r.closing
	if !errors.Is(r.Err(), machine.ErrUnknownCommand) {
		t.Fatal(r.Err())
	}
}

func BenchmarkPropose(b *testing.B) {
	r := open(b, Config{Dir: b.TempDir(), SegmentSize: 32 << 20})
	defer r.Close()
	b.ReportAllocs()
	for i := 0; b.Loop(); i++ {
		acquire(b, r, i)
	}
}

// BenchmarkRestart measures opening a directory with held locks, up to the
// moment of leading, from a snapshot.
func BenchmarkRestart(b *testing.B) {
	for _, n := range []int{1_000, 1_000_000} {
		b.Run(fmt.Sprint(n), func(b *testing.B) {
			dir := b.TempDir()
			r := open(b, Config{Dir: dir, SegmentSize: 32 << 20})
			var commands []machine.Command
			for i := range n {
				commands = append(commands, &machine.Acquire{Request: machine.RequestID(i + 1), Names: []string{fmt.Sprintf("lock/%d", i)}, Mode: machine.Exclusive, TTL: 1e9})
				if len(commands) == 1000 {
					if _, err := propose(r, commands...); err != nil {
						b.Fatal(err)
					}
					commands = nil
				}
			}
			if err := r.raft.Snapshot().Error(); err != nil {
				b.Fatal(err)
			}
			r.Close()
			for b.Loop() {
				open(b, Config{Dir: dir}).Close()
			}
		})
	}
}

// TestCloseAnswersEverything: raft forgets what it has been handed and not
// looked at when it is shut down; nobody may wait for that.
func TestCloseAnswersEverything(t *testing.T) {
	dir := t.TempDir()
	for round := range 8 {
		r := open(t, Config{Dir: dir})
		var asked, answered atomic.Int64
		var group sync.WaitGroup
		for range 4 {
			group.Add(1)
			go func() {
				defer group.Done()
				for asked.Add(1); ; asked.Add(1) {
					var stop bool
					done := make(chan struct{})
					r.Propose(machine.Batch{Commands: []machine.Command{&machine.Forget{}}}, func(_ machine.Outcome, err error) {
						answered.Add(1)
						stop = err != nil
						close(done)
					})
					if <-done; stop {
						return
					}
				}
			}()
		}
		for asked.Load() < int64(20+round) {
			runtime.Gosched()
		}
		if err := r.Close(); err != nil {
			t.Fatal(err)
		}
		group.Wait()
		if asked.Load() != answered.Load() {
			t.Fatalf("%d proposals, %d answers", asked.Load(), answered.Load())
		}
	}
}

// TestCloseRightAfterLeading: a new leader's first acts are in raft's hands
// when it is closed.
func TestCloseRightAfterLeading(t *testing.T) {
	for range 60 {
		r := open(t, Config{Dir: t.TempDir()})
		closed := make(chan error, 1)
		go func() { closed <- r.Close() }()
		select {
		case err := <-closed:
			if err != nil {
				t.Fatal(err)
			}
		case <-time.After(30 * time.Second):
			t.Fatal("Close does not return")
		}
	}
}

// TestTornWriteOfSeveralEntries cuts off the end of a write of three entries,
// behind the first of them and behind all: no crash leaves damage.
func TestTornWriteOfSeveralEntries(t *testing.T) {
	const n = 5
	dir := t.TempDir()
	file := history(t, dir, n)
	before, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	d, err := openDisk(Config{Dir: dir, Logger: zap.NewNop(), SegmentSize: 1 << 20}, func(err error) { t.Error(err) })
	if err != nil {
		t.Fatal(err)
	}
	last, err := d.wal.LastIndex()
	if err != nil {
		t.Fatal(err)
	}
	var logs []*raft.Log
	for i := range uint64(3) {
		batch := machine.Batch{Commands: []machine.Command{&machine.Declare{Name: fmt.Sprintf("declared/%d", i)}}}
		logs = append(logs, &raft.Log{Index: last + 1 + i, Term: 2, Type: raft.LogCommand, Data: machine.AppendBatch(nil, &batch)})
	}
	if err := errors.Join(d.StoreLogs(logs), d.close()); err != nil {
		t.Fatal(err)
	}
	text, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	for cut := used(before); cut < used(text); cut++ {
		torn := copyDir(t, dir)
		damaged := bytes.Clone(text)
		clear(damaged[cut:])
		if err := os.WriteFile(filepath.Join(torn, filepath.Base(file)), damaged, 0o600); err != nil {
			t.Fatal(err)
		}
		d, err := openDisk(Config{Dir: torn, Logger: zap.NewNop(), SegmentSize: 1 << 20}, func(err error) { t.Error(err) })
		if err != nil {
			t.Fatalf("cut %d bytes before the end: %v", used(text)-cut, err)
		}
		if got, err := d.wal.LastIndex(); err != nil || got != last {
			t.Fatalf("cut %d bytes before the end: last entry %d, %v, want %d", used(text)-cut, got, err, last)
		}
		if err := d.close(); err != nil {
			t.Fatal(err)
		}
	}
}

// TestHowFarBehind: with large entries few are too many to have caught up.
func TestHowFarBehind(t *testing.T) {
	r := open(t, Config{Dir: t.TempDir()})
	defer r.Close()
	acquire(t, r, 0)
	if got := r.near(); got != caughtUp {
		t.Errorf("of small entries %d", got)
	}
	pad := strings.Repeat("x", 4000)
	for i := range 25 {
		var batch []machine.Command
		for k := range 256 {
			n := 1 + i*256 + k
			batch = append(batch, &machine.Acquire{Request: machine.RequestID(n + 1), Names: []string{fmt.Sprint("large/", n)}, Mode: machine.Exclusive, TTL: 1e9,
				Metadata: []machine.Meta{{Key: "pad", Value: pad}}})
		}
		if _, err := propose(r, batch...); err != nil {
			t.Fatal(err)
		}
	}
	if got := r.near(); got < 7 || got > 8 { // of about 1 MiB each
		t.Errorf("of large entries %d", got)
	}
}
