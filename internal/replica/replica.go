// Package replica is the durable lease.Log: hashicorp/raft over raft-wal with
// file snapshots. A single node is a cluster of one member; without a peer
// address it opens no port.
package replica

import (
	"context"
	"crypto/tls"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"sync"
	"sync/atomic"
	"time"

	"github.com/hashicorp/raft"
	"go.uber.org/zap"

	"github.com/distlock/distlock/internal/flock"
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

// excluded is why this node must stop though nothing is wrong with its log: the
// error says by itself what is.
type excluded struct{ error }

func (e excluded) Unwrap() error        { return e.error }
func (e excluded) Is(target error) bool { return target == lease.ErrLogFailed }

// RemovedError says that the node is no longer a member of its cluster.
type RemovedError struct{ NodeID, ClusterID string }

func (e *RemovedError) Error() string {
	return fmt.Sprintf("node %s was removed from cluster %s: to add it again, start it with an empty data directory and --join", e.NodeID, e.ClusterID)
}

// Config configures a Replica. Dir and Store are required.
type Config struct {
	Dir    string
	Store  *lease.Store // empty; filled from the directory
	Logger *zap.Logger

	newest machine.Level // that this build is to know, in tests; 0: what it does
	// Synced is told how long each write to the log took, disk and all; nil
	// for nobody. It must not block.
	Synced func(time.Duration)

	// NodeID names this member; "" takes the directory's, n1 in a new one.
	NodeID string
	// PeerAddress is where the other members reach this one, host:port. ""
	// opens no port: such a node is alone.
	PeerAddress string
	// PeerListen is the address to listen on for them; "" is PeerAddress.
	PeerListen string
	// MaxStrangers bounds the connections to the peer port on which nobody has
	// said yet who it is.
	MaxStrangers int
	// InitialCluster has the peer addresses, by node id, of the members that
	// a new cluster begins with, this one among them; nil for this one alone.
	// A directory that has been used knows its members and ignores it.
	InitialCluster map[string]string
	// Join makes a new directory wait until a cluster adds this node.
	Join bool
	// PeerTLS secures the traffic between members: every side shows a
	// certificate that the other verifies. nil for none.
	PeerTLS *tls.Config
	// ElectionTimeout is how long, at least, a member hears nothing of the
	// leader before it stands for election; 0 is DefaultElectionTimeout.
	ElectionTimeout time.Duration
	// ClientAddress is where clients reach this node, told to the others.
	ClientAddress string
	Version       string

	// SnapshotBytes is how much is written to the log between snapshots, and
	// SnapshotEntries how many entries, whichever comes first. TrailingEntries
	// is how many are kept behind one. 0 takes the default.
	SnapshotBytes   int64
	SnapshotEntries uint64
	TrailingEntries uint64
	// SnapshotInterval is how often the number of entries is looked at.
	SnapshotInterval time.Duration
	// SegmentSize is the size in bytes at which a log file is followed by the
	// next; its space is reserved when it is made.
	SegmentSize int

	// dial replaces the network in tests.
	dial func(ctx context.Context, address string) (net.Conn, error)
	// wrapLog is put in front of the files by tests.
	wrapLog func(raft.LogStore) raft.LogStore
	// snapshotFailed is Open's own.
	snapshotFailed func(error)
}

const (
	// DefaultSnapshotBytes bounds what a restart has to read.
	DefaultSnapshotBytes    = 64 << 20
	defaultSnapshotEntries  = 32_768
	defaultTrailingEntries  = 4_096
	defaultSnapshotInterval = 20 * time.Second
	defaultSegmentSize      = 32 << 20

	// DefaultElectionTimeout suits a network whose round trips take less than
	// some 10 ms.
	DefaultElectionTimeout = 200 * time.Millisecond

	// A lone voter waits for nobody: it is told to elect itself. The timeout is
	// how often raft wakes to look at a lease that nobody contests.
	loneElectionTimeout = time.Second
)

// Replica is a lease.Log in a directory.
type Replica struct {
	cfg        Config
	dir        string
	nodeID     string        // this node's name
	self       raft.ServerID // its name and incarnation
	start      start         // this one, of its starts
	starts     *starts       // of the others; nil without a peer port
	logger     *zap.Logger
	lock       *os.File
	disk       *disk
	raft       *raft.Raft
	peers      *peers // nil without a peer port
	fsm        *fsm
	newest     machine.Level // that this build knows
	beganAlone bool          // a history of its own, with this start
	leadership chan lease.Leadership
	futures    chan inFlight
	started    chan struct{} // closed once raft is set: raft's own goroutines begin before
	closing    chan struct{}
	group      sync.WaitGroup // the goroutines of Open

	sums            sums         // of what this node has applied
	differing       atomic.Int64 // members whose state is not that of most voters
	failedSnapshots atomic.Int64
	transferring    atomic.Bool   // the leadership: nothing is confirmed meanwhile
	stalled         atomic.Bool   // the disk has: this node does not act as leader
	suspects        chan struct{} // buffered, one: this node may have been removed
	members         sync.Mutex    // held while the membership is being changed
	saving          sync.Mutex    // held while identity.json is written
	proposing       sync.RWMutex  // held to propose, and by Close to end that

	mu        sync.Mutex
	id        identity
	note      note
	err       error // why the log stopped
	closed    bool
	leader    leader          // as known here
	leaving   chan<- struct{} // see handingOver
	news      chan struct{}   // closed and made anew when leader changes
	led       context.Context // ends when another leads, or nobody
	endLed    context.CancelFunc
	committed configuration // the last known to be
}

// leader is who leads, as one node knows it.
type leader struct {
	id      raft.ServerID
	address string // peer address
	client  string // client address, once known
	serving bool   // it is this node, and its manager has been told
}

type inFlight struct {
	future raft.ApplyFuture
	done   func(machine.Outcome, error)
}

// identity is kept in identity.json.
type identity struct {
	ClusterID string `json:"clusterId"` // empty until it is known
	NodeID    string `json:"nodeId"`
	// Incarnation is the directory's; "" in those of the first builds.
	Incarnation string `json:"incarnation,omitempty"`
	Starts      uint64 `json:"starts,omitempty"` // with a peer port
	// Address is the peer address that a leader has confirmed: the log may not
	// have it yet.
	Address string `json:"address,omitempty"`
	// List is cfg.InitialCluster, until the cluster has begun.
	List map[string]string `json:"initialCluster,omitempty"`
	// Begun says that the directory has had a history: without one it has lost it.
	Begun   bool `json:"begun,omitempty"`
	Removed bool `json:"removed,omitempty"` // from the cluster
	// Diverged says that the state was not that of the other voters.
	Diverged *DivergedError `json:"diverged,omitempty"`
}

// Open opens or makes the log in cfg.Dir and starts its goroutines; Close ends
// them. Errors: ErrLocked, *CorruptError, *RemovedError, those of the file
// system and of the configuration.
func Open(cfg Config) (_ *Replica, err error) {
	if cfg.Logger == nil {
		cfg.Logger = zap.NewNop()
	}
	cfg.SnapshotBytes = orDefault(cfg.SnapshotBytes, DefaultSnapshotBytes)
	cfg.SnapshotEntries = orDefault(cfg.SnapshotEntries, defaultSnapshotEntries)
	cfg.TrailingEntries = orDefault(cfg.TrailingEntries, defaultTrailingEntries)
	cfg.SnapshotInterval = orDefault(cfg.SnapshotInterval, defaultSnapshotInterval)
	cfg.SegmentSize = orDefault(cfg.SegmentSize, defaultSegmentSize)
	cfg.ElectionTimeout = orDefault(cfg.ElectionTimeout, DefaultElectionTimeout)
	cfg.PeerListen = orDefault(cfg.PeerListen, cfg.PeerAddress)
	cfg.MaxStrangers = orDefault(cfg.MaxStrangers, defaultMaxStrangers)
	r := &Replica{
		cfg: cfg, dir: cfg.Dir, logger: cfg.Logger,
		leadership: make(chan lease.Leadership),
		futures:    make(chan inFlight, 64),
		started:    make(chan struct{}),
		closing:    make(chan struct{}),
		news:       make(chan struct{}),
		suspects:   make(chan struct{}, 1),
	}
	r.led, r.endLed = context.WithCancel(context.Background())
	r.newest = orDefault(cfg.newest, machine.NewestLevel)
	// A history begins at the first level, whoever makes the first member: the
	// log raises it.
	cfg.Store.Restore(machine.NewAt(0, machine.FirstLevel))
	r.fsm = &fsm{store: cfg.Store, newest: r.newest, fail: r.fail, learned: r.learned, configured: r.configured, sums: &r.sums}
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
	if again, err := finishReplacing(cfg.Dir); err != nil {
		return nil, fmt.Errorf("data directory %s: cannot finish the restore that was interrupted: %w", cfg.Dir, err)
	} else if again {
		r.logger.Info("finished the restore that was interrupted", zap.String("dataDir", cfg.Dir))
	}
	if err := tighten(cfg.Dir); err != nil {
		return nil, err
	}
	if err := r.identify(); err != nil {
		return nil, err
	}
	cfg.snapshotFailed = r.snapshotFailed
	if r.disk, err = openDisk(cfg, r.fail); err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			r.disk.close()
		}
	}()
	if cfg.PeerAddress != "" {
		if r.starts, err = openStarts(cfg.Dir); err != nil {
			return nil, err
		}
		r.start.Nonce = newIncarnation()
		if err := r.saveIdentity(func(id *identity) { id.Starts++; r.start.Start = id.Starts }); err != nil {
			return nil, fmt.Errorf("data directory %s: cannot be written: %w", cfg.Dir, cause(err))
		}
		if r.peers, err = listenPeers(r); err != nil {
			return nil, err
		}
		defer func() {
			if err != nil {
				r.peers.close()
			}
		}()
	}
	how, err := r.begins()
	if err != nil {
		return nil, err
	}
	if err := r.startRaft(how); err != nil {
		return nil, err
	}
	r.group.Add(3)
	go r.watch()
	go r.answer()
	go r.compact()
	if r.peers != nil {
		r.group.Add(3)
		go r.compare()
		go r.findLeader()
		go r.guard()
	}
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
	switch locked, err := flock.Try(f); {
	case err != nil:
		f.Close()
		return nil, fmt.Errorf("cannot be locked: %w", err)
	case !locked:
		f.Close()
		return nil, ErrLocked
	}
	return f, nil
}

// identify reads who this node is, or makes it up on the first start.
func (r *Replica) identify() error {
	file := filepath.Join(r.dir, identityFile)
	text, err := os.ReadFile(file)
	if err == nil {
		if err := json.Unmarshal(text, &r.id); err != nil || r.id.NodeID == "" {
			return &CorruptError{File: file, Err: machine.ErrCorrupt}
		}
		r.nodeID = r.id.NodeID
		r.self = serverID(r.nodeID, r.id.Incarnation)
		switch {
		case r.id.Removed:
			return &RemovedError{NodeID: r.nodeID, ClusterID: r.id.ClusterID}
		case r.id.Diverged != nil:
			return r.id.Diverged
		case r.cfg.NodeID != "" && r.cfg.NodeID != r.nodeID:
			return fmt.Errorf("data directory %s belongs to node %s, not %s: start it with --node-id %s, or with another directory",
				r.dir, r.nodeID, r.cfg.NodeID, r.nodeID)
		}
		return nil
	}
	if !errors.Is(err, os.ErrNotExist) {
		return err
	}
	if _, err := os.Stat(filepath.Join(r.dir, metaFile)); err == nil {
		return &CorruptError{File: file, Err: os.ErrNotExist}
	}
	r.nodeID = orDefault(r.cfg.NodeID, "n1")
	if err := checkName(r.nodeID); err != nil {
		return err
	}
	if r.cfg.InitialCluster != nil && r.cfg.InitialCluster[r.nodeID] == "" {
		return fmt.Errorf("the initial cluster does not name this node, %s", r.nodeID)
	}
	if err := r.saveIdentity(func(id *identity) { id.NodeID, id.Incarnation = r.nodeID, newIncarnation() }); err != nil {
		return fmt.Errorf("data directory %s: cannot be written: %w", r.dir, cause(err))
	}
	r.self = serverID(r.nodeID, r.id.Incarnation)
	return nil
}

const identityFile = "identity.json"

// saveIdentity changes what the directory says of this node.
func (r *Replica) saveIdentity(change func(*identity)) error {
	r.saving.Lock()
	defer r.saving.Unlock()
	r.mu.Lock()
	id := r.id
	r.mu.Unlock()
	change(&id)
	text, err := json.Marshal(id)
	if err != nil {
		return err
	}
	if err := writeFile(filepath.Join(r.dir, identityFile), append(text, '\n')); err != nil {
		return err
	}
	r.mu.Lock()
	r.id = id
	r.mu.Unlock()
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
	return syncDir(filepath.Dir(file))
}

// beginning is how a node comes by its log.
type beginning int

const (
	goesOn   beginning = iota // it has one
	alone                     // it writes the first entry
	together                  // with the others of its list
	joins                     // a leader gives it one
)

// begins settles how this node comes by its log, and takes what a first start that was
// killed has left undone. It is called before raft runs.
func (r *Replica) begins() (beginning, error) {
	if err := r.forgetHalfBegun(); err != nil {
		return 0, &CorruptError{File: r.dir, Err: err}
	}
	if err := r.keepList(); err != nil {
		return 0, err
	}
	if r.peers != nil {
		if err := r.confirmAddress(); err != nil {
			return 0, err
		}
	}
	existing, err := raft.HasExistingState(r.disk, r.disk, r.disk.snapshots)
	switch {
	case err != nil:
		return 0, &CorruptError{File: r.dir, Err: err}
	case existing:
		return goesOn, nil
	case r.begun():
		return 0, &CorruptError{File: filepath.Join(r.dir, metaFile), Err: errors.New("the log is gone")}
	case r.cfg.Join:
		return joins, nil
	case r.ClusterID() != "": // two histories would go by one name
		return 0, fmt.Errorf("data directory %s is of a node that cluster %s took in and that has nothing of its log yet: start it with --join", r.dir, r.ClusterID())
	case len(r.cfg.InitialCluster) > 1 && r.peers != nil:
		return together, nil
	}
	return alone, nil
}

func (r *Replica) raftConfig() *raft.Config {
	config := raft.DefaultConfig()
	config.LocalID = r.self
	timeout := r.cfg.ElectionTimeout
	if r.peers == nil {
		timeout = loneElectionTimeout
	}
	config.HeartbeatTimeout, config.ElectionTimeout = timeout, timeout
	config.LeaderLeaseTimeout, config.CommitTimeout = timeout, min(timeout, 20*time.Millisecond)
	config.SnapshotInterval, config.SnapshotThreshold = r.cfg.SnapshotInterval, r.cfg.SnapshotEntries
	config.TrailingLogs = r.cfg.TrailingEntries
	config.MaxAppendEntries = 16 // an entry is a batch, of up to some MiB
	config.BatchApplyCh = true
	config.ShutdownOnRemove = false // it is ours to say so
	config.Logger = quiet(r.logger.Named("raft"), nil)
	return config
}

// startRaft starts raft, and reads what the directory has.
func (r *Replica) startRaft(how beginning) (err error) {
	config := r.raftConfig()
	var transport raft.Transport
	address := raft.ServerAddress(r.cfg.PeerAddress)
	if r.peers == nil {
		var itself *raft.InmemTransport
		address, itself = raft.NewInmemTransport(raft.ServerAddress(r.self))
		itself.Connect(address, itself)
		transport = itself
	} else {
		transport = r.peers.raftTransport()
	}
	if how == alone {
		servers := raft.Configuration{Servers: []raft.Server{{ID: config.LocalID, Address: address}}}
		// The log itself keeps the term: it returns its errors, while disk's
		// SetUint64 ends raft's goroutine, which is not running yet.
		if err := raft.BootstrapCluster(config, r.disk, r.disk.wal, r.disk.snapshots, transport, servers); err != nil {
			return fmt.Errorf("data directory %s: %w", r.dir, cause(err))
		}
		r.beganAlone = true
	}
	r.raft, err = raft.NewRaft(config, r.fsm, r.disk, r.disk, r.disk.snapshots, transport)
	// Raft goes on with an older snapshot, which the log may not continue.
	if err == nil && r.fsm.unread != nil {
		r.raft.Shutdown().Error()
	}
	var level *LevelError
	switch unread := r.fsm.unread; {
	case errors.Is(unread, machine.ErrUnknownCommand), errors.As(unread, &level):
		return fmt.Errorf("data directory %s is of a newer version: %w", r.dir, unread)
	case err != nil, unread != nil:
		return &CorruptError{File: r.dir, Err: errors.Join(err, unread)}
	}
	close(r.started)
	if n := len(r.configuration().servers.Servers); n > 1 && r.peers == nil {
		r.raft.Shutdown().Error()
		return fmt.Errorf("data directory %s is of a member of a cluster of %d: give this node's --peer-address", r.dir, n)
	}
	if r.peers != nil {
		r.peers.serve()
		if how == together {
			r.group.Add(1)
			go r.found()
		}
		return nil
	}
	// Should it not be heard, the timeout comes to the same.
	if err := transport.TimeoutNow(config.LocalID, address, &raft.TimeoutNowRequest{RPCHeader: raft.RPCHeader{ProtocolVersion: config.ProtocolVersion}}, &raft.TimeoutNowResponse{}); err != nil {
		r.logger.Warn("raft was not told to elect this node", zap.Error(err))
	}
	return nil
}

// forgetHalfBegun lets a first start be made anew whose process died after
// raft's BootstrapCluster had written term 1 and before it wrote the first
// entry: raft takes the term for a history, and would wait for ever for a
// leader. Nobody can have voted in term 1.
func (r *Replica) forgetHalfBegun() error {
	key := []byte("CurrentTerm")
	if term, err := r.disk.GetUint64(key); r.cfg.Join || err != nil || term != 1 {
		return nil // an error is HasExistingState's to tell
	}
	last, err := r.disk.LastIndex()
	if err != nil || last > 0 {
		return err
	}
	if list, err := r.disk.snapshots.List(); err != nil || len(list) > 0 {
		return err
	}
	return r.disk.wal.SetUint64(key, 0)
}

// configuration is the latest one, which may not be committed yet.
func (r *Replica) configuration() configuration { return r.disk.configs.latest() }

// NodeID names this member.
func (r *Replica) NodeID() string { return r.nodeID }

// MemberID is this member's name with its data directory's incarnation, by
// which the members know each other.
func (r *Replica) MemberID() string { return string(r.self) }

// ClusterID names the cluster; "" until a new one has been led for the first
// time. It is made at random.
func (r *Replica) ClusterID() string {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.id.ClusterID
}

// begun reports whether this directory has had a history.
func (r *Replica) begun() bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.id.Begun
}

// Restored says which backup this history began with; nil for none.
func (r *Replica) Restored() *lease.Restored {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.note.Restored
}

// AppliedIndex is the last log entry that has been applied.
func (r *Replica) AppliedIndex() uint64 { return r.raft.AppliedIndex() }

// Propose implements lease.Log.
func (r *Replica) Propose(batch machine.Batch, done func(machine.Outcome, error)) {
	entry := machine.AppendBatch(make([]byte, 0, 64*len(batch.Commands)), &batch)
	r.proposing.RLock()
	defer r.proposing.RUnlock()
	select {
	case <-r.closing:
		done(machine.Outcome{}, lease.ErrNotLeader)
		return
	default:
	}
	r.futures <- inFlight{r.raft.Apply(entry, 0), done} // answer takes it
}

// answer waits for what is in flight, in order, and tells its proposer.
func (r *Replica) answer() {
	defer r.group.Done()
	for f := range r.futures {
		f.done(result(f.future))
	}
}

func result(future raft.ApplyFuture) (machine.Outcome, error) {
	if err := future.Error(); err != nil {
		if errors.Is(err, raft.ErrNotLeader) || errors.Is(err, raft.ErrLeadershipTransferInProgress) {
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

// compact takes a snapshot when much has been written since the last. Raft
// does so by the number of entries, which says little of their size. When the
// level has risen, as many are taken as are kept: an older build stops when it
// can read none, while it would read the log only as far as the members tell
// it, which do not speak to it.
func (r *Replica) compact() {
	defer r.group.Done()
	every := time.NewTicker(time.Second)
	defer every.Stop()
	var notBefore time.Time // after one that failed
	for {
		select {
		case <-every.C:
		case <-r.closing:
			return
		}
		r.trail()
		due, rose := 0, r.fsm.rose.Load() && r.voters() > 1
		switch {
		case time.Now().Before(notBefore):
			rose = false // for now
		case rose:
			due = keep
		case r.disk.written.Load() >= r.cfg.SnapshotBytes:
			due = 1
		}
		for ; due > 0; due-- {
			written := r.disk.written.Load()
			if err := r.raft.Snapshot().Error(); err != nil && !errors.Is(err, raft.ErrNothingNewToSnapshot) {
				notBefore = time.Now().Add(snapshotAgain)
				break
			}
			r.disk.written.Add(-written)
		}
		if rose && due == 0 {
			r.fsm.rose.Store(false)
		}
	}
}

const snapshotAgain = 10 * time.Second

// trail bounds the entries that stay in the log behind a snapshot, for followers
// that are a little behind: they take a restart no longer to read than those
// that come between snapshots.
func (r *Replica) trail() {
	now := r.raft.ReloadableConfig()
	most := uint64(r.disk.sizes.within(r.cfg.SnapshotBytes))
	if most < now.TrailingLogs || most > now.TrailingLogs*5/4 {
		now.TrailingLogs = most
		if err := r.raft.ReloadConfig(now); err != nil {
			r.logger.Warn("raft does not take how many entries are to stay in the log", zap.Error(err))
		}
	}
}

// snapshotFailed says that a snapshot could not be written: the log grows
// meanwhile, and a restart takes longer.
func (r *Replica) snapshotFailed(err error) {
	r.failedSnapshots.Add(1)
	r.logger.Warn("a snapshot could not be written: the log grows until one can", zap.Error(cause(err)))
}

// FailedSnapshots counts the snapshots that could not be written.
func (r *Replica) FailedSnapshots() int { return int(r.failedSnapshots.Load()) }

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
func (r *Replica) Close() error { return r.CloseWithin(closeWithin) }

// CloseWithin is Close that waits so long at most for a disk that may hang.
func (r *Replica) CloseWithin(d time.Duration) error {
	until := time.Now().Add(d) // of the process
	r.proposing.Lock()         // nobody is between looking at closed and handing over
	r.mu.Lock()
	if r.closed {
		r.mu.Unlock()
		r.proposing.Unlock()
		return nil
	}
	r.closed = true
	if r.err == nil {
		close(r.closing)
	}
	r.mu.Unlock()
	close(r.futures)
	r.proposing.Unlock()
	if r.peers != nil {
		r.peers.cancel()
	}
	// What has been handed to raft is answered while raft runs: what it has
	// not looked at when it is shut down would never be.
	ended := make(chan struct{})
	go func() {
		r.group.Wait()
		close(ended)
	}()
	r.await(ended, until)
	if r.peers != nil {
		r.peers.stop()
	}
	over := make(chan struct{})
	var err error
	go func() { // which has the rest, for a disk may answer after all
		defer close(over)
		err = r.raft.Shutdown().Error()
		<-ended
		r.setLeader(func(l *leader) { *l = leader{} })
		r.endLed()
		if r.peers != nil {
			r.peers.close()
		}
		err = errors.Join(err, r.disk.close(), r.lock.Close())
	}()
	if !r.await(over, until) {
		return errors.New("the disk did not answer: the log could not be closed")
	}
	return err
}

// await waits until something has ended, until a time at most, and no longer than
// until a write has taken as long as that of a disk that hangs.
func (r *Replica) await(ended <-chan struct{}, until time.Time) bool {
	look := time.NewTicker(20 * time.Millisecond)
	defer look.Stop()
	for time.Now().Before(until) && r.disk.writing() < r.stallAfter() {
		select {
		case <-ended:
			return true
		case <-look.C:
		}
	}
	select {
	case <-ended:
		return true
	default:
		return false
	}
}

// closeWithin bounds how long Close waits for a disk.
const closeWithin = 5 * time.Second
