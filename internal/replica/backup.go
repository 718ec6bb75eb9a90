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
	view := r.cfg.Store.View()
	counts := view.Counts()
	info := BackupInfo{
		ClusterID: r.ClusterID(), At: time.Now().UTC().Truncate(time.Second), LastToken: view.LastToken(),
		Leases: counts.Leases, Locks: counts.Locks, Version: r.cfg.Version,
	}
	text, err := json.Marshal(info)
	if err != nil {
		return err
	}
	sum := sha256.New()
	out := io.MultiWriter(to, sum)
	if _, err := out.Write(append(append([]byte(backupMagic), text...), '\n')); err != nil {
		return err
	}
	r.mu.Lock()
	n := r.note
	r.mu.Unlock()
	if err := (snapshot{n, view}).write(out); err != nil {
		return err
	}
	_, err = to.Write(sum.Sum(nil))
	return err
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
	Dir   string // becomes a data directory
	From  io.Reader
	Above fence.Token // every new token is above it, whatever the backup says
	// Force moves a directory that has data aside, under the name that
	// RestoreResult gives.
	Force       bool
	NodeID      string // "" is n1
	PeerAddress string // of a node that others will join; may be given later
	Now         time.Time
}

// RestoreResult says what was restored.
type RestoreResult struct {
	BackupInfo
	NewClusterID string
	TokensAbove  fence.Token
	MovedTo      string // where the directory's data was moved; "" for none
}

// Restore makes a data directory of a backup, for a server to start on: a
// cluster of its own, with one member. Errors: ErrLocked, ErrNotBackup,
// machine.ErrTokensExhausted, the file system's; nothing is changed then.
func Restore(cfg RestoreConfig) (res RestoreResult, err error) {
	info, _, m, err := readBackup(cfg.From)
	if err != nil {
		return res, err
	}
	res.BackupInfo = info
	var random [8]byte
	rand.Read(random[:])
	res.NewClusterID = hex.EncodeToString(random[:])
	if res.TokensAbove, err = m.NewHistory(cfg.Above, cfg.Now.UnixNano()); err != nil {
		return res, err
	}
	n := note{ClusterID: res.NewClusterID, Restored: &Restored{
		At: cfg.Now.UTC().Truncate(time.Second), ClusterID: info.ClusterID, BackupAt: info.At, TokensAbove: res.TokensAbove,
	}}

	inUse, err := hasData(cfg.Dir)
	if err != nil {
		return res, err
	}
	if inUse && !cfg.Force {
		return res, fmt.Errorf("data directory %s has data: restore into an empty one, or with --force, which moves it aside", cfg.Dir)
	}
	// It is made beside the directory and takes its place at the end.
	if err := os.MkdirAll(filepath.Dir(filepath.Clean(cfg.Dir)), 0o700); err != nil {
		return res, err
	}
	fresh, err := os.MkdirTemp(filepath.Dir(filepath.Clean(cfg.Dir)), filepath.Base(cfg.Dir)+".restoring-")
	if err != nil {
		return res, err
	}
	defer os.RemoveAll(fresh)
	if err := writeHistory(fresh, orDefault(cfg.NodeID, "n1"), cfg.PeerAddress, snapshot{n, m.Copy()}); err != nil {
		return res, err
	}
	if inUse {
		res.MovedTo = cfg.Dir + ".before-restore-" + cfg.Now.UTC().Format("20060102T150405Z")
		if err := os.Rename(cfg.Dir, res.MovedTo); err != nil {
			return res, err
		}
	} else if err := os.RemoveAll(cfg.Dir); err != nil { // empty, or with a lock file only
		return res, err
	}
	return res, os.Rename(fresh, cfg.Dir)
}

// hasData tells whether a directory has data of a server, which must not run.
func hasData(dir string) (bool, error) {
	entries, err := os.ReadDir(dir)
	if errors.Is(err, os.ErrNotExist) {
		return false, nil
	}
	if err != nil {
		return false, err
	}
	found := false
	for _, e := range entries {
		found = found || e.Name() != "lock"
	}
	if len(entries) == 0 {
		return false, nil
	}
	lock, err := lockDirectory(dir)
	if err != nil {
		return false, fmt.Errorf("data directory %s: %w", dir, err)
	}
	return found, lock.Close()
}

// writeHistory writes a data directory that begins with a snapshot.
func writeHistory(dir, nodeID, peerAddress string, s snapshot) error {
	text, err := json.Marshal(identity{ClusterID: s.note.ClusterID, NodeID: nodeID})
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
	address, transport := raft.NewInmemTransport(raft.ServerAddress(orDefault(peerAddress, nodeID)))
	servers := raft.Configuration{Servers: []raft.Server{{ID: raft.ServerID(nodeID), Address: address}}}
	sink, err := d.snapshots.Create(raft.SnapshotVersionMax, index, term, servers, index, transport)
	if err == nil {
		err = s.Persist(sink)
	}
	if err == nil {
		err = d.SetUint64([]byte("CurrentTerm"), term)
	}
	return errors.Join(err, failed, d.close())
}
