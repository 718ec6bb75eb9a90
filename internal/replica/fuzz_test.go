package replica

import (
	"bytes"
	"errors"
	"testing"

	"github.com/hashicorp/raft"

	"github.com/distlock/distlock/lease"
	"github.com/distlock/distlock/lease/machine"
)

// FuzzUnseal: what is not a sealed entry, to the bit, is not taken for one.
func FuzzUnseal(f *testing.F) {
	f.Add(seal(&raft.Log{Index: 1, Term: 1, Type: raft.LogCommand, Data: []byte("data")}, 0).Data)
	f.Add(seal(&raft.Log{Index: 1 << 60, Term: 1 << 40, Type: raft.LogNoop}, 1<<20).Data)
	f.Add([]byte{})
	f.Fuzz(func(t *testing.T, b []byte) {
		l, place, err := unseal(b)
		if err != nil {
			if !errors.Is(err, errChecksum) {
				t.Fatalf("untyped error %v", err)
			}
			return
		}
		again, where, err := unseal(seal(&l, place).Data)
		if err != nil || where != place || again.Index != l.Index || again.Term != l.Term || again.Type != l.Type || !bytes.Equal(again.Data, l.Data) {
			t.Fatalf("%+v came back as %+v, %v", l, again, err)
		}
	})
}

// FuzzEntry: whatever an entry holds, it is applied or it stops the node.
func FuzzEntry(f *testing.F) {
	f.Add(machine.AppendBatch(nil, &machine.Batch{Stamp: 1, Commands: []machine.Command{&machine.Declare{Name: "a"}}}))
	f.Add(append([]byte{noteMark}, `{"clusterId":"c"}`...))
	f.Add([]byte{noteMark})
	f.Add([]byte{})
	f.Fuzz(func(t *testing.T, b []byte) {
		var failed error
		x := &fsm{store: empty(), newest: machine.NewestLevel, fail: func(err error) { failed = err }, learned: func(note) {}, configured: func(uint64, raft.Configuration) {}}
		got := x.Apply(&raft.Log{Index: 1, Term: 1, Type: raft.LogCommand, Data: b})
		if _, ok := got.(error); ok != (failed != nil) {
			t.Fatalf("%v, and the node was told %v", got, failed)
		}
		if failed != nil && x.Apply(&raft.Log{Index: 2, Term: 1, Type: raft.LogCommand}) != lease.ErrOutcomeUnknown {
			t.Fatal("an entry was applied after one that could not be")
		}
	})
}

// FuzzSnapshot: a snapshot is read whole or refused, and comes back as it was.
func FuzzSnapshot(f *testing.F) {
	for _, n := range []note{{}, {ClusterID: "c", Restored: &lease.Restored{ClusterID: "d", TokensAbove: 9}}} {
		m := machine.New(7)
		m.Apply(machine.Batch{Commands: []machine.Command{&machine.Declare{Name: "a"}, &machine.GrantLease{TTL: 1}}})
		var b bytes.Buffer
		if err := (snapshot{n, m.Copy()}).write(&b); err != nil {
			f.Fatal(err)
		}
		f.Add(b.Bytes())
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		n, m, err := readSnapshot(bytes.NewReader(b))
		if err != nil {
			return
		}
		var once, twice bytes.Buffer
		if err := (snapshot{n, m.Copy()}).write(&once); err != nil {
			t.Fatal(err)
		}
		n, m, err = readSnapshot(bytes.NewReader(once.Bytes()))
		if err != nil {
			t.Fatal(err)
		}
		if err := (snapshot{n, m.Copy()}).write(&twice); err != nil || !bytes.Equal(once.Bytes(), twice.Bytes()) {
			t.Fatalf("it does not come back as it was: %v", err)
		}
	})
}
