package replica

import (
	"bufio"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"runtime"
	"sync/atomic"

	"github.com/hashicorp/raft"

	"github.com/distlock/distlock/lease"
	"github.com/distlock/distlock/lease/machine"
)

// fsm applies entries to the store. Raft calls it on one goroutine.
//
// An entry is a batch for the machine or, with noteMark as its first byte, a
// note: what the members know together that is not the machine's.
type fsm struct {
	store      *lease.Store
	newest     machine.Level // that this build knows
	note       note
	fail       func(error)
	learned    func(note)                       // a note was applied or restored
	configured func(uint64, raft.Configuration) // a configuration was committed
	rose       atomic.Bool                      // the level has, by an entry: compact takes a snapshot
	chain      chain                            // begun or not
	sums       *sums                            // its recent values; may be nil
	unread     error                            // of a snapshot that could not be restored
	stopped    bool                             // an entry could not be applied: none after it may be
}

// note is kept with the machine, in the log and in snapshots, as JSON.
type note struct {
	ClusterID string          `json:"clusterId"`
	Restored  *lease.Restored `json:"restored,omitempty"`
	// Level, in the log, is what the machine is raised to. In a snapshot the
	// machine has it itself. The first release does not know it.
	Level machine.Level `json:"level,omitempty"`
	// Chain, in a snapshot, is the digest of what has been applied.
	Chain *chain `json:"chain,omitempty"`
}

// noteMark is the first byte of an entry that is a note; a batch begins with
// its version.
const noteMark = 0xc0

// maxNote bounds a note in a snapshot.
const maxNote = 1 << 16

// Apply implements raft.FSM.
func (f *fsm) Apply(l *raft.Log) any {
	if f.stopped {
		return lease.ErrOutcomeUnknown
	}
	if len(l.Data) > 0 && l.Data[0] == noteMark {
		var n note
		if err := json.Unmarshal(l.Data[1:], &n); err != nil {
			return f.stop(l, err)
		}
		if n.Level > f.newest {
			return f.stop(l, &LevelError{Level: n.Level, Newest: f.newest})
		}
		if n.Level > f.store.Level() {
			f.store.Raise(n.Level)
			if f.chain.Begun == 0 && n.Level >= digestLevel {
				f.chain = chain{Begun: l.Index}
			}
			f.rose.Store(true)
		}
		if f.note.ClusterID == "" { // two leaders may both have made one up
			f.note.ClusterID = n.ClusterID
		}
		f.learned(f.note)
		if f.chain.Begun != 0 {
			f.chain.entry(l)
			f.chained()
		}
		return nil
	}
	batch, err := machine.DecodeBatch(l.Data)
	if err != nil {
		return f.stop(l, err)
	}
	batch.Term = l.Term
	out := f.store.Apply(batch)
	f.digest(l, &out)
	return out
}

// digest takes what an entry did into the digest, which costs 1 to 2 % of
// doing it (BenchmarkApply).
func (f *fsm) digest(l *raft.Log, out *machine.Outcome) {
	if f.chain.Begun == 0 {
		return
	}
	f.chain.entry(l)
	var revision, last uint64
	f.store.Read(func(m *machine.Machine) { revision, last = m.Revision(), uint64(m.LastToken()) })
	f.chain.outcome(out, revision, last)
	f.chained()
}

// chained lets others compare this node's digest.
func (f *fsm) chained() {
	if f.sums != nil {
		f.sums.note(f.chain)
	}
}

func (f *fsm) stop(l *raft.Log, err error) error {
	f.stopped = true
	f.fail(fmt.Errorf("log entry %d: %w", l.Index, err))
	return err
}

// StoreConfiguration implements raft.ConfigurationStore.
func (f *fsm) StoreConfiguration(index uint64, c raft.Configuration) {
	if f.chain.Begun != 0 && index > f.chain.Index {
		f.chain.configuration(index, c)
		f.chained()
	}
	f.configured(index, c)
}

// Snapshot implements raft.FSM: a copy-on-write view, whatever the size.
func (f *fsm) Snapshot() (raft.FSMSnapshot, error) {
	if f.stopped {
		return nil, lease.ErrLogFailed
	}
	n := f.note
	if f.chain.Begun != 0 {
		n.Chain = new(f.chain)
	}
	return snapshot{n, f.store.View()}, nil
}

// Restore implements raft.FSM.
func (f *fsm) Restore(from io.ReadCloser) error {
	defer from.Close()
	n, m, err := readSnapshot(from)
	if err == nil && m.Level() > f.newest {
		err = &LevelError{Level: m.Level(), Newest: f.newest}
	}
	if err != nil {
		f.unread = err
		return err
	}
	f.note = n
	f.note.Chain, f.chain = nil, chain{}
	if n.Chain != nil {
		f.chain = *n.Chain
		f.chained()
	}
	f.store.Restore(m)
	f.learned(n)
	return nil
}

func readSnapshot(from io.Reader) (n note, m *machine.Machine, err error) {
	in := bufio.NewReaderSize(from, 1<<20)
	size, err := binary.ReadUvarint(in)
	if err == nil && size > maxNote {
		err = machine.ErrCorrupt
	}
	if err != nil {
		return n, nil, err
	}
	text := make([]byte, size)
	if _, err = io.ReadFull(in, text); err == nil {
		err = json.Unmarshal(text, &n)
	}
	if err != nil {
		return n, nil, err
	}
	m, err = machine.Restore(in.Read)
	return n, m, err
}

// snapshot is a note, with its length before it, and a machine.
type snapshot struct {
	note note
	view *machine.View
}

func (s snapshot) write(to io.Writer) error {
	text, err := json.Marshal(s.note)
	if err != nil {
		return err
	}
	if _, err := to.Write(append(binary.AppendUvarint(nil, uint64(len(text))), text...)); err != nil {
		return err
	}
	return s.view.Snapshot(func(chunk []byte) error {
		_, err := to.Write(chunk)
		runtime.Gosched() // whoever serves comes first, also on one processor
		return err
	})
}

// Persist implements raft.FSMSnapshot, beside everything else.
func (s snapshot) Persist(sink raft.SnapshotSink) error {
	if err := s.write(sink); err != nil {
		return errors.Join(err, sink.Cancel())
	}
	return sink.Close()
}

// Release implements raft.FSMSnapshot.
func (s snapshot) Release() {}
