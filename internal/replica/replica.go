// Package replica is the durable lease.Log: hashicorp/raft over raft-wal with
// file snapshots. A single node is a cluster of one member; it opens no port.
package replica

import (
	"bufio"
	"crypto/rand"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"sync"
	"syscall"
	"time"

	"github.com/hashicorp/raft"
	"go.uber.org/zap"

	"github.com/distlock/distlock/lease"
	"github.com/distlock/distlock/lease/machine"
)

// ErrLocked says that another server uses the data directory.
var ErrLocked = errors.New("another distlock server uses it")

// CorruptError says that a file in the data directory is damaged: it would be
// unsafe to go on, because acknowledged changes may be missing.
type CorruptError struct {
	File string
	Err  error
}

func (e *CorruptError) Error() string {
	return fmt.Sprintf("%s is damaged (%v): refusing to start, because acknowledged locks may be missing; "+
		"restore the data directory from a copy, or move it away to start empty", e.File, e.Err)
}

// Unwrap returns what is wrong with the file.
func (e *CorruptError) Unwrap() error { return e.Err }

// Config configures a Replica. Dir and Store are required.
type Config struct {
	Dir    string
	Store  *lease.Store // empty; filled from the directory
	Logger *zap.Logger

	// SnapshotEntries is how many log entries are applied between snapshots,
	// and TrailingEntries how many are kept behind one. 0 takes the default.
	SnapshotEntries uint64
	TrailingEntries uint64
	// SnapshotInterval is how often the number of entries is looked at.
	SnapshotInterval time.Duration
	// SegmentSize is the size in bytes at which a log file is followed by the
	// next; its space is reserved when it is made.
	SegmentSize int

	// store and stable are put in front of the files by tests.
	wrapLog func(raft.LogStore) raft.LogStore
}

const (
	defaultSnapshotEntries  = 32_768
	defaultTrailingEntries  = 4_096
	defaultSnapshotInterval = 20 * time.Second
	defaultSegmentSize      = 32 << 20

	// A lone voter need not wait for anyone before it elects itself.
	electionTimeout = 20 * time.Millisecond
)

// Replica is a lease.Log in a directory.
type Replica struct {
	dir        string
	nodeID     string
	clusterID  string
	logger     *zap.Logger
	lock       *os.File
	disk       *disk
	raft       *raft.Raft
	fsm        *fsm
	leadership chan lease.Leadership
	futures    chan inFlight
	closing    chan struct{}
	group      sync.WaitGroup // watch and answer

	mu     sync.Mutex
	err    error // why the log stopped
	closed bool
}

type inFlight struct {
	future raft.ApplyFuture
	done   func(machine.Outcome, error)
}

// identity is kept in identity.json.
type identity struct {
	ClusterID string `json:"clusterId"`
	NodeID    string `json:"nodeId"`
}

// Open opens or makes the log in cfg.Dir and starts its goroutines; Close ends
// them. Errors: ErrLocked, *CorruptError, those of the file system.
func Open(cfg Config) (_ *Replica, err error) {
	if cfg.Logger == nil {
		cfg.Logger = zap.NewNop()
	}
	cfg.SnapshotEntries = orDefault(cfg.SnapshotEntries, defaultSnapshotEntries)
	cfg.TrailingEntries = orDefault(cfg.TrailingEntries, defaultTrailingEntries)
	cfg.SnapshotInterval = orDefault(cfg.SnapshotInterval, defaultSnapshotInterval)
	cfg.SegmentSize = orDefault(cfg.SegmentSize, defaultSegmentSize)
	r := &Replica{
		dir: cfg.Dir, logger: cfg.Logger,
		leadership: make(chan lease.Leadership),
		futures:    make(chan inFlight, 64),
		closing:    make(chan struct{}),
	}
	r.fsm = &fsm{store: cfg.Store, fail: r.fail}
	if err := os.MkdirAll(cfg.Dir, 0o700); err != nil {
		return nil, fmt.Errorf("data directory %s: %w", cfg.Dir, cause(err))
	}
	if r.lock, err = lockDirectory(cfg.Dir); err != nil {
		return nil, fmt.Errorf("data directory %s: %w", cfg.Dir, err)
	}
	defer func() {
		if err != nil {
			r.lock.Close()
		}
	}()
	if err := r.identify(); err != nil {
		return nil, err
	}
	if r.disk, err = openDisk(cfg, r.fail); err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			r.disk.close()
		}
	}()
	if err := r.startRaft(cfg); err != nil {
		return nil, err
	}
	r.group.Add(2)
	go r.watch()
	go r.answer()
	return r, nil
}

func orDefault[T comparable](v, d T) T {
	var zero T
	if v == zero {
		return d
	}
	return v
}

// cause leaves out what a path error repeats.
func cause(err error) error {
	var path *os.PathError
	if errors.As(err, &path) {
		return path.Err
	}
	return err
}

func lockDirectory(dir string) (*os.File, error) {
	f, err := os.OpenFile(filepath.Join(dir, "lock"), os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		return nil, fmt.Errorf("cannot be written: %w", cause(err))
	}
	if err := syscall.Flock(int(f.Fd()), syscall.LOCK_EX|syscall.LOCK_NB); err != nil {
		f.Close()
		if errors.Is(err, syscall.EWOULDBLOCK) {
			return nil, ErrLocked
		}
		return nil, fmt.Errorf("cannot be locked: %w", err)
	}
	return f, nil
}

// identify reads who this node is, or makes it up on the first start.
func (r *Replica) identify() error {
	file := filepath.Join(r.dir, "identity.json")
	text, err := os.ReadFile(file)
	if err == nil {
		var id identity
		if err := json.Unmarshal(text, &id); err != nil || id.ClusterID == "" || id.NodeID == "" {
			return &CorruptError{File: file, Err: machine.ErrCorrupt}
		}
		r.clusterID, r.nodeID = id.ClusterID, id.NodeID
		return nil
	}
	if !errors.Is(err, os.ErrNotExist) {
		return err
	}
	if _, err := os.Stat(filepath.Join(r.dir, metaFile)); err == nil {
		return &CorruptError{File: file, Err: os.ErrNotExist}
	}
	var random [8]byte
	rand.Read(random[:])
	id := identity{ClusterID: hex.EncodeToString(random[:]), NodeID: "n1"}
	text, err = json.Marshal(id)
	if err != nil {
		return err
	}
	if err := writeFile(file, append(text, '\n')); err != nil {
		return fmt.Errorf("data directory %s: cannot be written: %w", r.dir, cause(err))
	}
	r.clusterID, r.nodeID = id.ClusterID, id.NodeID
	return nil
}

// writeFile makes a file appear whole or not at all, also after a power cut.
func writeFile(file string, text []byte) error {
	tmp := file + ".tmp"
	f, err := os.OpenFile(tmp, os.O_CREATE|os.O_WRONLY|os.O_TRUNC, 0o600)
	if err != nil {
		return err
	}
	_, err = f.Write(text)
	if err == nil {
		err = f.Sync()
	}
	if err := errors.Join(err, f.Close()); err != nil {
		return err
	}
	if err := os.Rename(tmp, file); err != nil {
		return err
	}
	dir, err := os.Open(filepath.Dir(file))
	if err != nil {
		return err
	}
	defer dir.Close()
	return dir.Sync()
}

func (r *Replica) startRaft(cfg Config) error {
	address, transport := raft.NewInmemTransport(raft.ServerAddress(r.nodeID))
	config := raft.DefaultConfig()
	config.LocalID = raft.ServerID(r.nodeID)
	config.HeartbeatTimeout, config.ElectionTimeout = electionTimeout, electionTimeout
	config.LeaderLeaseTimeout, config.CommitTimeout = electionTimeout, electionTimeout
	config.SnapshotInterval, config.SnapshotThreshold = cfg.SnapshotInterval, cfg.SnapshotEntries
	config.TrailingLogs = cfg.TrailingEntries
	config.BatchApplyCh = true
	config.Logger = quiet(cfg.Logger.Named("raft"), nil)
	existing, err := raft.HasExistingState(r.disk, r.disk, r.disk.snapshots)
	if err != nil {
		return &CorruptError{File: r.dir, Err: err}
	}
	if !existing {
		members := raft.Configuration{Servers: []raft.Server{{ID: config.LocalID, Address: address}}}
		if err := raft.BootstrapCluster(config, r.disk, r.disk, r.disk.snapshots, transport, members); err != nil {
			return fmt.Errorf("data directory %s: %w", r.dir, cause(err))
		}
	}
	if r.raft, err = raft.NewRaft(config, r.fsm, r.disk, r.disk, r.disk.snapshots, transport); err != nil {
		return &CorruptError{File: r.dir, Err: err}
	}
	return nil
}

// NodeID names this member.
func (r *Replica) NodeID() string { return r.nodeID }

// ClusterID names the cluster: it is made at random with the data directory.
func (r *Replica) ClusterID() string { return r.clusterID }

// AppliedIndex is the last log entry that has been applied.
func (r *Replica) AppliedIndex() uint64 { return r.raft.AppliedIndex() }

// Propose implements lease.Log.
func (r *Replica) Propose(batch machine.Batch, done func(machine.Outcome, error)) {
	if r.Err() != nil {
		done(machine.Outcome{}, lease.ErrNotLeader)
		return
	}
	future := r.raft.Apply(machine.AppendBatch(nil, &batch), 0)
	select {
	case r.futures <- inFlight{future, done}:
	case <-r.closing:
		done(machine.Outcome{}, lease.ErrOutcomeUnknown)
	}
}

// answer waits for what is in flight, in order, and tells its proposer.
func (r *Replica) answer() {
	defer r.group.Done()
	for {
		select {
		case f := <-r.futures:
			f.done(result(f.future))
		case <-r.closing:
			for {
				select {
				case f := <-r.futures:
					f.done(result(f.future))
				default:
					return
				}
			}
		}
	}
}

func result(future raft.ApplyFuture) (machine.Outcome, error) {
	if err := future.Error(); err != nil {
		if errors.Is(err, raft.ErrNotLeader) {
			return machine.Outcome{}, lease.ErrNotLeader
		}
		return machine.Outcome{}, fmt.Errorf("%w: %w", lease.ErrOutcomeUnknown, err)
	}
	out, ok := future.Response().(machine.Outcome)
	if !ok { // the entry could not be applied, and the node is stopping
		return machine.Outcome{}, lease.ErrOutcomeUnknown
	}
	return out, nil
}

// Confirm implements lease.Log. A lone member leads as long as it has not been
// told otherwise: there is nobody who could have elected another.
func (r *Replica) Confirm(term uint64, done func(error)) {
	if r.raft.State() != raft.Leader || r.raft.CurrentTerm() != term || r.Err() != nil {
		done(lease.ErrNotLeader)
		return
	}
	done(nil)
}

// Leadership implements lease.Log.
func (r *Replica) Leadership() <-chan lease.Leadership { return r.leadership }

// watch turns raft's word on leadership into ours: led only once everything
// before the term is applied.
func (r *Replica) watch() {
	defer r.group.Done()
	defer close(r.leadership)
	changes := r.raft.LeaderCh()
	for {
		state := lease.Leadership{}
		select {
		case <-r.closing:
			return
		case leads := <-changes:
			if leads {
				term := r.raft.CurrentTerm()
				if err := r.raft.Barrier(0).Error(); err != nil || r.raft.CurrentTerm() != term || r.raft.State() != raft.Leader {
					continue // another change is on its way
				}
				state = lease.Leadership{Leader: true, Term: term}
			}
		}
		select {
		case r.leadership <- state:
		case <-r.closing:
			return
		}
	}
}

// Err implements lease.Log.
func (r *Replica) Err() error {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.err
}

// fail stops the log: nothing is acknowledged from now on. The process must
// be started again, once what is wrong has been mended.
func (r *Replica) fail(err error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.err != nil || r.closed {
		return
	}
	r.err = err
	r.logger.Error("the log cannot go on: nothing is acknowledged from now on", zap.Error(err))
	close(r.closing)
}

// Close implements lease.Log.
func (r *Replica) Close() error {
	r.mu.Lock()
	if r.closed {
		r.mu.Unlock()
		return nil
	}
	r.closed = true
	if r.err == nil {
		close(r.closing)
	}
	r.mu.Unlock()
	err := r.raft.Shutdown().Error()
	r.group.Wait()
	return errors.Join(err, r.disk.close(), r.lock.Close())
}

// fsm applies entries to the store. Raft calls it on one goroutine.
type fsm struct {
	store   *lease.Store
	fail    func(error)
	stopped bool // an entry could not be applied: none after it may be
}

// Apply implements raft.FSM.
func (f *fsm) Apply(l *raft.Log) any {
	if f.stopped {
		return lease.ErrOutcomeUnknown
	}
	batch, err := machine.DecodeBatch(l.Data)
	if err != nil {
		f.stopped = true
		f.fail(fmt.Errorf("log entry %d: %w", l.Index, err))
		return err
	}
	batch.Term = l.Term
	return f.store.Apply(batch)
}

// Snapshot implements raft.FSM: a copy-on-write view, whatever the size.
func (f *fsm) Snapshot() (raft.FSMSnapshot, error) {
	if f.stopped {
		return nil, lease.ErrLogFailed
	}
	return snapshot{f.store.View()}, nil
}

// Restore implements raft.FSM.
func (f *fsm) Restore(from io.ReadCloser) error {
	defer from.Close()
	m, err := machine.Restore(bufio.NewReaderSize(from, 1<<20).Read)
	if err != nil {
		return err
	}
	f.store.Restore(m)
	return nil
}

type snapshot struct{ view *machine.Machine }

// Persist implements raft.FSMSnapshot, beside everything else.
func (s snapshot) Persist(sink raft.SnapshotSink) error {
	err := s.view.Snapshot(func(chunk []byte) error {
		_, err := sink.Write(chunk)
		return err
	})
	if err != nil {
		return errors.Join(err, sink.Cancel())
	}
	return sink.Close()
}

// Release implements raft.FSMSnapshot.
func (s snapshot) Release() {}
