package replica

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"os"
	"path/filepath"
	"runtime"
	"sort"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/hashicorp/go-hclog"
	"github.com/hashicorp/raft"
	wal "github.com/hashicorp/raft-wal"
	"github.com/hashicorp/raft-wal/fs"
	"github.com/hashicorp/raft-wal/metadb"
	"github.com/hashicorp/raft-wal/segment"
	"github.com/hashicorp/raft-wal/types"
	"go.uber.org/zap"

	"github.com/distlock/distlock/lease/machine"
)

const (
	metaFile     = "wal-meta.db" // raft-wal's list of segments, and raft's term and vote
	snapshotsDir = "snapshots"
	keep         = 2 // snapshots
)

// disk is raft's log store and stable store, with every failure to write
// reported, once, to fail. Raft itself would step down and be elected again.
type disk struct {
	raft.LogStore
	wal       *wal.WAL
	snapshots raft.SnapshotStore
	fail      func(error)
	synced    func(time.Duration)
	last      *lastError
	configs   configurations
	written   atomic.Int64 // bytes since the last snapshot, about
	opened    time.Time
	since     atomic.Int64 // when the write under way began, after opened; 0 for none
	sizes     sizes
}

// writing is how long the write under way has taken so far; 0 for none.
func (d *disk) writing() time.Duration {
	if since := d.since.Load(); since != 0 {
		return time.Since(d.opened) - time.Duration(since) // of the monotonic clock
	}
	return 0
}

func openDisk(cfg Config, fail func(error)) (*disk, error) {
	if err := checkSnapshots(cfg.Dir); err != nil {
		return nil, err
	}
	if f, err := os.OpenFile(filepath.Join(cfg.Dir, metaFile), os.O_RDWR, 0); err == nil {
		f.Close()
	} else if !errors.Is(err, os.ErrNotExist) {
		return nil, fmt.Errorf("data directory %s: cannot be written: %w", cfg.Dir, cause(err))
	}
	d := &disk{fail: fail, synced: cfg.Synced, last: &lastError{}, opened: time.Now()}
	d.sizes.most = int(cfg.TrailingEntries)
	logger := quiet(cfg.Logger.Named("wal"), d.last)
	var err error
	d.wal, err = openWAL(cfg, logger)
	if err != nil {
		return nil, err
	}
	d.LogStore = d.wal
	if err := d.check(cfg.Dir); err != nil {
		d.wal.Close()
		return nil, err
	}
	if cfg.wrapLog != nil {
		d.LogStore = cfg.wrapLog(d.wal)
	}
	files, err := raft.NewFileSnapshotStoreWithLogger(cfg.Dir, keep, quiet(cfg.Logger.Named("snapshot"), nil))
	var list []*raft.SnapshotMeta
	if err == nil {
		list, err = files.List()
	}
	if err != nil {
		d.wal.Close()
		return nil, fmt.Errorf("data directory %s: cannot be written: %w", cfg.Dir, cause(err))
	}
	d.snapshots = &snapshots{SnapshotStore: files, configs: &d.configs, failed: cfg.snapshotFailed}
	for _, meta := range list {
		d.configs.add(meta.ConfigurationIndex, meta.Configuration)
	}
	return d, nil
}

// openWAL opens the log; a panic of the store's library on damaged files is
// damage found.
func openWAL(cfg Config, logger hclog.Logger) (w *wal.WAL, err error) {
	defer func() {
		if p := recover(); p != nil {
			err = &CorruptError{File: filepath.Join(cfg.Dir, metaFile), Err: fmt.Errorf("%v", p)}
		}
	}()
	if err = finishRotation(cfg); err == nil {
		w, err = wal.Open(cfg.Dir, wal.WithLogger(logger), wal.WithSegmentSize(cfg.SegmentSize),
			wal.WithSegmentFiler(segment.NewFiler(cfg.Dir, files{fs.New()})))
	}
	switch {
	case err == nil:
		return w, nil
	case errors.Is(err, os.ErrPermission) || strings.Contains(err.Error(), "no space left"):
		return nil, fmt.Errorf("data directory %s: cannot be written: %w", cfg.Dir, cause(err))
	}
	return nil, &CorruptError{File: filepath.Join(cfg.Dir, newestSegment(cfg.Dir)), Err: err}
}

// finishRotation completes the change from one segment to the next when the
// process ended in the middle of it: after the write that sealed the segment,
// and before the list of segments said so. raft-wal 0.4.2 opens such a log and
// then refuses every write, for ever ("segment is sealed"). What is done here
// is what it would have done next.
func finishRotation(cfg Config) (err error) {
	if len(segments(cfg.Dir)) == 0 {
		return nil
	}
	meta := &metadb.BoltMetaDB{}
	state, err := meta.Load(cfg.Dir)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, meta.Close()) }()
	if len(state.Segments) == 0 {
		return nil
	}
	tail := &state.Segments[len(state.Segments)-1]
	if !tail.SealTime.IsZero() {
		return nil
	}
	file, err := segment.NewFiler(cfg.Dir, fs.New()).RecoverTail(*tail)
	if errors.Is(err, os.ErrNotExist) {
		return nil // raft-wal makes it
	}
	if err != nil {
		return err
	}
	defer file.Close()
	sealed, index, err := file.Sealed()
	if err != nil || !sealed {
		return err
	}
	entries := file.LastIndex() + 1 - tail.BaseIndex
	if whole, err := indexIsWhole(filepath.Join(cfg.Dir, segment.FileName(*tail)), int64(index), int64(entries)); err != nil || !whole {
		return err
	}
	tail.SealTime, tail.MaxIndex, tail.IndexStart = tail.CreateTime, file.LastIndex(), index
	state.Segments = append(state.Segments, types.SegmentInfo{
		ID: state.NextSegmentID, BaseIndex: tail.MaxIndex + 1, MinIndex: tail.MaxIndex + 1,
		SizeLimit: uint32(cfg.SegmentSize), Codec: tail.Codec, CreateTime: tail.CreateTime,
	})
	state.NextSegmentID++
	return meta.CommitState(state)
}

// indexIsWhole tells whether the index that raft-wal has found in the last
// segment, with its first entry at an offset, is of as many entries as were
// committed. If not, the write that was to seal the segment was cut short, as
// by a full disk, and raft-wal 0.4.2 goes by the index's header alone: that is
// taken back.
func indexIsWhole(file string, offset, entries int64) (whole bool, err error) {
	const header, each, commit = 8, 4, 3
	f, err := os.OpenFile(file, os.O_RDWR, 0)
	if err != nil {
		return false, err
	}
	defer func() { err = errors.Join(err, f.Close()) }()
	var length [4]byte
	if _, err := f.ReadAt(length[:], offset-header+4); err != nil {
		return false, err
	}
	if int64(binary.LittleEndian.Uint32(length[:])) == entries*each {
		var next [1]byte // frames begin at multiples of eight
		if _, err := f.ReadAt(next[:], offset+(entries*each+7)/8*8); err == nil && next[0] == commit {
			return true, nil
		}
	}
	if _, err := f.WriteAt(make([]byte, header), offset-header); err != nil {
		return false, err
	}
	return false, f.Sync()
}

func (d *disk) close() error { return d.wal.Close() }

// StoreLogs implements raft.LogStore. It returns when the entries are on disk.
func (d *disk) StoreLogs(logs []*raft.Log) error {
	sealed := make([]*raft.Log, len(logs))
	for i, l := range logs {
		sealed[i] = seal(l, uint64(i))
		d.written.Add(int64(len(sealed[i].Data)))
	}
	began := time.Now()
	d.since.Store(max(int64(began.Sub(d.opened)), 1))
	err := d.LogStore.StoreLogs(sealed)
	d.since.Store(0)
	if d.synced != nil {
		d.synced(time.Since(began))
	}
	if err != nil {
		d.failed("write the log", err)
		return err
	}
	d.configs.stored(logs)
	d.sizes.stored(sealed)
	return nil
}

// StoreLog implements raft.LogStore.
func (d *disk) StoreLog(l *raft.Log) error { return d.StoreLogs([]*raft.Log{l}) }

// GetLog implements raft.LogStore.
func (d *disk) GetLog(index uint64, l *raft.Log) error {
	if err := d.LogStore.GetLog(index, l); err != nil {
		return err
	}
	opened, _, err := unseal(l.Data)
	if err == nil && (opened.Index != index || opened.Index != l.Index || opened.Term != l.Term || opened.Type != l.Type) {
		err = errChecksum
	}
	if err != nil {
		return fmt.Errorf("entry %d: %w", index, err)
	}
	l.Data = opened.Data
	return nil
}

// DeleteRange implements raft.LogStore: the beginning of the log, behind a
// snapshot, or an end that another leader's entries take the place of.
func (d *disk) DeleteRange(first, last uint64) error {
	begin, err := d.LogStore.FirstIndex()
	if err == nil {
		err = d.LogStore.DeleteRange(first, last)
	}
	if err == nil && first > begin {
		d.configs.cut(first)
	}
	return err
}

// IsMonotonic implements raft.MonotonicLogStore, as raft-wal does: indexes
// leave no gap.
func (d *disk) IsMonotonic() bool { return true }

func (d *disk) failed(what string, err error) {
	if reason := d.last.get(); reason != "" && !strings.Contains(reason, err.Error()) {
		err = fmt.Errorf("%w (%s)", err, reason)
	}
	d.fail(fmt.Errorf("cannot %s: %w", what, err))
}

// Set implements raft.StableStore. Raft panics when its term or vote cannot be
// written; its goroutine ends here instead, and the node with it.
func (d *disk) Set(key, value []byte) error {
	if err := d.wal.Set(key, value); err != nil {
		d.failed("write the vote", err)
		runtime.Goexit()
	}
	return nil
}

// SetUint64 implements raft.StableStore.
func (d *disk) SetUint64(key []byte, value uint64) error {
	if err := d.wal.SetUint64(key, value); err != nil {
		d.failed("write the term", err)
		runtime.Goexit()
	}
	return nil
}

// Get implements raft.StableStore.
func (d *disk) Get(key []byte) ([]byte, error) { return d.wal.Get(key) }

// GetUint64 implements raft.StableStore.
func (d *disk) GetUint64(key []byte) (uint64, error) { return d.wal.GetUint64(key) }

// check reads the whole log before raft does, which would panic on damage, and
// looks behind its end for what a torn write cannot leave there.
func (d *disk) check(dir string) error {
	first, err := d.wal.FirstIndex()
	if err == nil {
		var last uint64
		if last, err = d.wal.LastIndex(); err == nil && last > 0 {
			var l raft.Log
			for i := first; i <= last; i++ {
				if err := d.GetLog(i, &l); err != nil {
					return &CorruptError{File: segmentOf(dir, i), Err: err}
				}
				d.configs.stored([]*raft.Log{&l})
				d.sizes.stored([]*raft.Log{&l})
			}
		}
		if err == nil {
			return checkTail(filepath.Join(dir, newestSegment(dir)), last)
		}
	}
	return &CorruptError{File: filepath.Join(dir, metaFile), Err: err}
}

// checkTail tells a torn write from damage. The log's library takes the first
// entry that does not add up for the torn end of the last write. Writes are
// made one after the other, each synced before the next begins: a sound entry
// of a write that began behind the entry that follows the end proves that what
// does not add up was once sound and synced.
func checkTail(file string, last uint64) error {
	text, err := os.ReadFile(file)
	if errors.Is(err, os.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	for at := 0; ; at += len(entryMagic) {
		i := bytes.Index(text[at:], entryMagic[:])
		if i < 0 {
			return nil
		}
		at += i
		if l, place, err := unseal(text[at:]); err == nil && l.Index > last+1+place {
			return &CorruptError{File: file, Err: fmt.Errorf("entry %d cannot be read, entry %d after it can", last+1, l.Index)}
		}
	}
}

// segments lists the log's files in order of their first entry.
func segments(dir string) []string {
	list, _ := filepath.Glob(filepath.Join(dir, "*.wal"))
	for i, file := range list {
		list[i] = filepath.Base(file)
	}
	sort.Strings(list) // names begin with the first index, padded with zeros
	return list
}

func newestSegment(dir string) string {
	list := segments(dir)
	if len(list) == 0 {
		return metaFile
	}
	return list[len(list)-1]
}

func segmentOf(dir string, index uint64) string {
	found := ""
	for _, file := range segments(dir) {
		var base uint64
		if _, err := fmt.Sscanf(file, "%020d-", &base); err == nil && base <= index {
			found = file
		}
	}
	return filepath.Join(dir, found)
}

// checkSnapshots refuses a damaged snapshot. Raft would fall back on an older
// one, whose successors may have been cut off the log.
func checkSnapshots(dir string) error {
	entries, err := os.ReadDir(filepath.Join(dir, snapshotsDir))
	if errors.Is(err, os.ErrNotExist) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("data directory %s: cannot be read: %w", dir, cause(err))
	}
	var whole []string
	for _, e := range entries {
		if e.IsDir() && !strings.HasSuffix(e.Name(), ".tmp") {
			whole = append(whole, e.Name())
		}
	}
	if len(whole) == 0 {
		return nil
	}
	store, err := raft.NewFileSnapshotStoreWithLogger(dir, keep, hclog.NewNullLogger())
	if err != nil {
		return fmt.Errorf("data directory %s: cannot be written: %w", dir, cause(err))
	}
	found, err := store.List()
	if err != nil {
		return err
	}
	known := make(map[string]bool)
	for _, s := range found {
		known[s.ID] = true
	}
	for _, name := range whole {
		if len(found) < min(keep, len(whole)) && !known[name] {
			return &CorruptError{File: filepath.Join(dir, snapshotsDir, name, "meta.json"), Err: machine.ErrCorrupt}
		}
	}
	_, content, err := store.Open(found[0].ID) // compares its checksum
	if err != nil {
		return &CorruptError{File: filepath.Join(dir, snapshotsDir, found[0].ID, "state.bin"), Err: err}
	}
	return content.Close()
}

// Every entry is sealed before it goes to the log store: raft-wal has a
// checksum per write, and does not look at it when it reads.
//
//	magic (4) | CRC-32C of what follows (4) | length of what follows (4) |
//	index | term | place in its write | type | data
var entryMagic = [4]byte{0xd1, 0x57, 0x10, 0xc1}

const sealHeader = 12

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

var errChecksum = errors.New("its checksum does not match")

// seal returns a copy of an entry whose data can be checked, and found in a
// damaged file. place counts the entries before it in the same write.
func seal(l *raft.Log, place uint64) *raft.Log {
	b := make([]byte, sealHeader, sealHeader+4*binary.MaxVarintLen64+len(l.Data))
	copy(b, entryMagic[:])
	b = binary.AppendUvarint(b, l.Index)
	b = binary.AppendUvarint(b, l.Term)
	b = binary.AppendUvarint(b, place)
	b = append(b, byte(l.Type))
	b = append(b, l.Data...)
	binary.LittleEndian.PutUint32(b[8:], uint32(len(b)-sealHeader))
	binary.LittleEndian.PutUint32(b[4:], crc32.Checksum(b[8:], castagnoli))
	sealed := *l
	sealed.Data = b
	return &sealed
}

// unseal is the reverse of seal on data that begins with a sealed entry; the
// result shares its memory.
func unseal(b []byte) (l raft.Log, place uint64, err error) {
	if len(b) < sealHeader || !bytes.Equal(b[:4], entryMagic[:]) {
		return l, 0, errChecksum
	}
	size := uint64(binary.LittleEndian.Uint32(b[8:]))
	if size > uint64(len(b)-sealHeader) {
		return l, 0, errChecksum
	}
	b = b[:sealHeader+size]
	if binary.LittleEndian.Uint32(b[4:]) != crc32.Checksum(b[8:], castagnoli) {
		return l, 0, errChecksum
	}
	b = b[sealHeader:]
	for _, v := range []*uint64{&l.Index, &l.Term, &place} {
		n := 0
		if *v, n = binary.Uvarint(b); n <= 0 {
			return l, 0, errChecksum
		}
		b = b[n:]
	}
	if len(b) == 0 {
		return l, 0, errChecksum
	}
	l.Type, l.Data = raft.LogType(b[0]), b[1:]
	return l, place, nil
}

// lastError remembers the last error that a library only logged.
type lastError struct{ text chan string }

func (l *lastError) get() string {
	if l.text == nil {
		return ""
	}
	select {
	case s := <-l.text:
		return s
	default:
		return ""
	}
}

func (l *lastError) put(s string) {
	select {
	case <-l.text:
	default:
	}
	select {
	case l.text <- s:
	default:
	}
}

// quiet gives a library's log to ours, for debugging: what it calls a warning
// or an error is one of its own concerns, and ours are reported by us.
func quiet(logger *zap.Logger, last *lastError) hclog.Logger {
	if last != nil {
		last.text = make(chan string, 1)
	}
	return hclog.New(&hclog.LoggerOptions{
		Level: hclog.Info, Output: lines{logger, last}, DisableTime: true,
	})
}

type lines struct {
	logger *zap.Logger
	last   *lastError
}

// Write implements io.Writer: one line a call.
func (w lines) Write(p []byte) (int, error) {
	line := strings.TrimSpace(string(p))
	level, text, _ := strings.Cut(line, "]")
	text = strings.TrimLeft(text, " :")
	if strings.Contains(level, "ERROR") && w.last != nil {
		w.last.put(text)
	}
	w.logger.Debug(text)
	return len(p), nil
}

// sizes are those of the last entries of the log, about.
type sizes struct {
	mu   sync.Mutex
	most int
	list []int // of the last most of them at least
}

func (s *sizes) stored(logs []*raft.Log) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, l := range logs {
		s.list = append(s.list, len(l.Data))
	}
	if len(s.list) > 2*s.most {
		s.list = append(s.list[:0], s.list[len(s.list)-s.most:]...)
	}
}

// within is how many of the last entries take no more than that many bytes
// together; one at least.
func (s *sizes) within(bytes int64) int {
	s.mu.Lock()
	defer s.mu.Unlock()
	n := 0
	for n < s.most && n < len(s.list) {
		if bytes -= int64(s.list[len(s.list)-1-n]); bytes < 0 {
			return max(n, 1)
		}
		n++
	}
	return s.most // those that are there fit
}
