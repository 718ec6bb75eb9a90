package replica

import (
	"bufio"
	"bytes"
	"crypto/rand"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"hash"
	"io"
	"os"
	"path/filepath"
	"time"

	"github.com/hashicorp/raft"
	"go.uber.org/zap"

	"github.com/distlock/distlock/fence"
	"github.com/distlock/distlock/lease"
	"github.com/distlock/distlock/lease/machine"
)

// A backup is a line that says what it is, a line of JSON that says of what, a
// snapshot, and the SHA-256 of all of that.
const backupMagic = "distlock backup 1\n"

// BackupInfo says what a backup is of.
type BackupInfo struct {
	ClusterID string      `json:"clusterId"`
	At        time.Time   `json:"at"`
	LastToken fence.Token `json:"lastToken"`
	Leases    int         `json:"leases"`
	Locks     int         `json:"locks"`
	Version   string      `json:"version"` // of the server
}

// Backup writes a consistent copy of everything, while grants go on. Only the
// leader does, once it is certain that it leads: every change acknowledged
// before the call is in it. Errors: lease.ErrNotLeader, to's.
func (r *Replica) Backup(to io.Writer) error {
	confirmed := make(chan error, 1)
	r.Confirm(r.raft.CurrentTerm(), func(err error) { confirmed <- err })
	if err := <-confirmed; err != nil {
		return r.notLeader()
	}
	r.mu.Lock()
	n := r.note
	r.mu.Unlock()
	n.ClusterID = r.ClusterID()
	_, err := writeBackup(to, snapshot{n, r.cfg.Store.View()}, r.cfg.Version, time.Now())
	return err
}

func writeBackup(to io.Writer, s snapshot, version string, now time.Time) (info BackupInfo, err error) {
	info = backupInfo(s, version, now)
	text, err := json.Marshal(info)
	if err != nil {
		return info, err
	}
	sum := sha256.New()
	out := io.MultiWriter(to, sum)
	if _, err := out.Write(append(append([]byte(backupMagic), text...), '\n')); err != nil {
		return info, err
	}
	if err := s.write(out); err != nil {
		return info, err
	}
	_, err = to.Write(sum.Sum(nil))
	return info, err
}

func backupInfo(s snapshot, version string, now time.Time) BackupInfo {
	counts := s.view.Counts()
	return BackupInfo{
		ClusterID: s.note.ClusterID, At: now.UTC().Truncate(time.Second), LastToken: s.view.LastToken(),
		Leases: counts.Leases, Locks: counts.Locks, Version: version,
	}
}

// ErrNotBackup says that a file is not a whole backup.
var ErrNotBackup = errors.New("not a whole backup")

// CheckBackup reads a backup to its end and says what it is of. Errors:
// ErrNotBackup, from's.
func CheckBackup(from io.Reader) (info BackupInfo, err error) {
	info, _, _, err = readBackup(from)
	return info, err
}

func readBackup(from io.Reader) (info BackupInfo, n note, m *machine.Machine, err error) {
	in := bufio.NewReaderSize(from, 1<<20)
	sum := sha256.New()
	for i, want := range []string{backupMagic, ""} {
		line, err := in.ReadSlice('\n')
		if err != nil || i == 0 && string(line) != want {
			return info, n, nil, fmt.Errorf("%w: it does not begin like one", ErrNotBackup)
		}
		sum.Write(line)
		if i == 1 {
			if err := json.Unmarshal(line, &info); err != nil {
				return info, n, nil, fmt.Errorf("%w: %w", ErrNotBackup, err)
			}
		}
	}
	body := &summed{in: in, sum: sum}
	n, m, err = readSnapshot(body)
	if err == nil {
		_, err = io.Copy(io.Discard, body)
	}
	if err != nil {
		return info, n, nil, fmt.Errorf("%w: %w", ErrNotBackup, err)
	}
	if !bytes.Equal(sum.Sum(nil), body.tail) {
		return info, n, nil, fmt.Errorf("%w: its checksum does not match", ErrNotBackup)
	}
	return info, n, m, nil
}

// summed reads all but the last sha256.Size bytes of in, which end up in tail,
// and sums what it reads.
type summed struct {
	in   *bufio.Reader
	sum  hash.Hash
	tail []byte
}

// Read implements io.Reader.
func (s *summed) Read(p []byte) (int, error) {
	// What stays in the buffer is at least what may be the tail.
	ahead, err := s.in.Peek(sha256.Size + 1)
	if len(ahead) <= sha256.Size {
		if s.tail == nil {
			s.tail = bytes.Clone(ahead)
		}
		if err == nil || errors.Is(err, io.EOF) {
			return 0, io.EOF
		}
		return 0, err
	}
	n := min(len(p), s.in.Buffered()-sha256.Size)
	n, err = s.in.Read(p[:n])
	s.sum.Write(p[:n])
	return n, err
}

// RestoreConfig says how to begin a history from a backup.
type RestoreConfig struct {
	Dir   string      // becomes a data directory; may be a mounted volume
	From  io.Reader   // nil in Recover
	Above fence.Token // every new token is above it, whatever the backup says
	// Force moves what the directory has of a server into a directory in it
	// that RestoreResult names. Recover always does.
	Force       bool
	NodeID      string // "" is n1; in Recover the directory's
	PeerAddress string // of a node that others will join; may be given later
	Now         time.Time
}

// RestoreResult says what was restored.
type RestoreResult struct {
	BackupInfo
	NewClusterID string
	NodeID       string
	TokensAbove  fence.Token
	MovedTo      string // where the directory's data was moved; "" for none
}

// Restore makes a data directory of a backup, for a server to start on: a
// cluster of its own, with one member. Errors: ErrLocked, ErrNotBackup,
// machine.ErrTokensExhausted, the file system's. Nothing is changed then, or
// the next start or restore goes on where it stopped.
func Restore(cfg RestoreConfig) (RestoreResult, error) {
	info, _, m, err := readBackup(cfg.From)
	if err != nil {
		return RestoreResult{}, err
	}
	made, err := makeDirectory(cfg.Dir)
	if err != nil {
		return RestoreResult{}, err
	}
	lock, err := lockDirectory(cfg.Dir)
	if err != nil {
		return RestoreResult{}, fmt.Errorf("data directory %s: %w", cfg.Dir, err)
	}
	defer lock.Close()
	res, err := begin(cfg, info, m)
	if err != nil && made && res.NewClusterID == "" {
		os.RemoveAll(cfg.Dir)
	}
	return res, err
}

// makeDirectory makes a data directory, unless it is there already.
func makeDirectory(dir string) (made bool, err error) {
	if err := os.MkdirAll(filepath.Dir(filepath.Clean(dir)), 0o700); err != nil {
		return false, err
	}
	err = os.Mkdir(dir, 0o700)
	if errors.Is(err, os.ErrExist) {
		return false, nil
	}
	return err == nil, err
}

// begin begins a history in a directory, which the caller has locked. Without
// a new cluster id in the result nothing is changed.
func begin(cfg RestoreConfig, info BackupInfo, m *machine.Machine) (res RestoreResult, err error) {
	if _, err := finishReplacing(cfg.Dir); err != nil {
		return res, err
	}
	had, err := dataIn(cfg.Dir)
	if err != nil {
		return res, err
	}
	if len(had) > 0 && !cfg.Force {
		return res, fmt.Errorf("data directory %s has data: restore into an empty one, or with --force, which moves it aside", cfg.Dir)
	}
	var random [8]byte
	rand.Read(random[:])
	id := hex.EncodeToString(random[:])
	above, err := m.NewHistory(cfg.Above, cfg.Now.UnixNano())
	if err != nil {
		return res, err
	}
	n := note{ClusterID: id, Restored: &lease.Restored{
		At: cfg.Now.UTC().Truncate(time.Second), ClusterID: info.ClusterID, BackupAt: info.At, TokensAbove: above,
	}}
	node := orDefault(cfg.NodeID, "n1")
	moved, err := replace(cfg.Dir, cfg.Now, func(dir string) error {
		return writeHistory(dir, node, cfg.PeerAddress, snapshot{n, m.Copy()})
	})
	if err != nil {
		return res, err
	}
	return RestoreResult{BackupInfo: info, NewClusterID: id, NodeID: node, TokensAbove: above, MovedTo: moved}, nil
}

// ErrNoHistory says that a directory has nothing of a server's history.
var ErrNoHistory = errors.New("it has no history of a server")

// BackupDirectory writes a backup of what a stopped server's directory has:
// its newest snapshot and all of its log, also what was not yet acknowledged.
// Errors: ErrLocked, ErrNoHistory, *CorruptError, *LevelError, to's.
func BackupDirectory(dir string, to io.Writer, version string, now time.Time) (BackupInfo, error) {
	lock, err := lockStopped(dir)
	if err != nil {
		return BackupInfo{}, err
	}
	defer lock.Close()
	_, s, err := readDirectory(dir)
	if err != nil {
		return BackupInfo{}, err
	}
	return writeBackup(to, s, version, now)
}

// Recover makes the directory of a member, of a cluster whose majority is lost
// for good, a cluster of its own with one member: by the rules of Restore, from
// what the directory has. What other members had acknowledged and this one had
// not received is lost. Errors: those of BackupDirectory and Restore.
func Recover(cfg RestoreConfig) (res RestoreResult, err error) {
	lock, err := lockStopped(cfg.Dir)
	if err != nil {
		return res, err
	}
	defer lock.Close()
	id, s, err := readDirectory(cfg.Dir)
	if err != nil {
		return res, err
	}
	var b bytes.Buffer
	info, err := writeBackup(&b, s, "", cfg.Now)
	if err != nil {
		return res, err
	}
	_, _, m, err := readBackup(&b)
	if err != nil {
		return res, err
	}
	cfg.NodeID, cfg.Force = id.NodeID, true
	return begin(cfg, info, m)
}

// lockStopped locks the directory of a server that must not run.
func lockStopped(dir string) (*os.File, error) {
	if _, err := os.Stat(filepath.Join(dir, identityFile)); err != nil {
		if !errors.Is(err, os.ErrNotExist) {
			return nil, err
		}
		if part, _ := filepath.Glob(filepath.Join(dir, restoring+"*")); len(part) == 0 {
			return nil, fmt.Errorf("data directory %s: %w", dir, ErrNoHistory)
		}
	}
	lock, err := lockDirectory(dir)
	if err != nil {
		return nil, fmt.Errorf("data directory %s: %w", dir, err)
	}
	if _, err := finishReplacing(dir); err != nil {
		return nil, errors.Join(err, lock.Close())
	}
	return lock, nil
}

// readDirectory reads all that a stopped server's directory has. The caller
// has locked it.
func readDirectory(dir string) (id identity, s snapshot, err error) {
	file := filepath.Join(dir, identityFile)
	text, err := os.ReadFile(file)
	if errors.Is(err, os.ErrNotExist) {
		return id, s, fmt.Errorf("data directory %s: %w", dir, ErrNoHistory)
	}
	if err != nil {
		return id, s, err
	}
	if err := json.Unmarshal(text, &id); err != nil || id.NodeID == "" {
		return id, s, &CorruptError{File: file, Err: machine.ErrCorrupt}
	}
	var failed error
	store := lease.NewStore(0)
	store.Restore(machine.NewAt(0, machine.FirstLevel))
	f := &fsm{
		store: store, newest: machine.NewestLevel, fail: func(err error) { failed = err },
		learned: func(note) {}, configured: func(uint64, raft.Configuration) {},
	}
	d, err := openDisk(Config{Dir: dir, Logger: zap.NewNop(), SegmentSize: defaultSegmentSize}, f.fail)
	if err != nil {
		return id, s, err
	}
	defer func() { err = errors.Join(err, d.close()) }()
	list, err := d.snapshots.List()
	if err != nil {
		return id, s, err
	}
	from := uint64(0)
	if len(list) > 0 {
		_, content, err := d.snapshots.Open(list[0].ID)
		if err != nil {
			return id, s, err
		}
		if err := f.Restore(content); err != nil {
			return id, s, &CorruptError{File: filepath.Join(dir, snapshotsDir, list[0].ID), Err: err}
		}
		from = list[0].Index
	}
	first, err := d.FirstIndex()
	if err != nil {
		return id, s, err
	}
	last, err := d.LastIndex()
	if err != nil {
		return id, s, err
	}
	switch {
	case last == 0 && from == 0:
		return id, s, fmt.Errorf("data directory %s: %w", dir, ErrNoHistory)
	case last > from && first > from+1:
		return id, s, &CorruptError{File: dir, Err: fmt.Errorf("entries %d to %d are missing", from+1, first-1)}
	}
	for i := from + 1; i <= last; i++ {
		var l raft.Log
		if err := d.GetLog(i, &l); err != nil {
			return id, s, errors.Join(err, failed)
		}
		if l.Type == raft.LogCommand {
			f.Apply(&l)
		}
		if failed != nil {
			return id, s, failed
		}
	}
	n := f.note
	n.ClusterID = orDefault(n.ClusterID, id.ClusterID)
	return id, snapshot{n, store.View()}, nil
}

// writeHistory writes a data directory that begins with a snapshot.
func writeHistory(dir, nodeID, peerAddress string, s snapshot) error {
	id := identity{ClusterID: s.note.ClusterID, NodeID: nodeID, Incarnation: newIncarnation()}
	text, err := json.Marshal(id)
	if err != nil {
		return err
	}
	if err := writeFile(filepath.Join(dir, identityFile), append(text, '\n')); err != nil {
		return err
	}
	var failed error
	d, err := openDisk(Config{Dir: dir, Logger: zap.NewNop(), SegmentSize: defaultSegmentSize}, func(err error) { failed = err })
	if err != nil {
		return err
	}
	const term, index = 1, 1
	if s.view.Level() >= digestLevel { // no entry will begin it
		s.note.Chain = &chain{Begun: index, Index: index}
	}
	address, transport := raft.NewInmemTransport(raft.ServerAddress(orDefault(peerAddress, nodeID)))
	servers := raft.Configuration{Servers: []raft.Server{{ID: serverID(nodeID, id.Incarnation), Address: address}}}
	sink, err := d.snapshots.Create(raft.SnapshotVersionMax, index, term, servers, index, transport)
	if err == nil {
		err = s.Persist(sink)
	}
	if err == nil {
		err = d.SetUint64([]byte("CurrentTerm"), term)
	}
	return errors.Join(err, failed, d.close())
}
