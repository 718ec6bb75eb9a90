package replica

import (
	"bytes"
	"errors"
	"flag"
	"fmt"
	"hash/fnv"
	"math/rand/v2"
	"os"
	"path/filepath"
	"testing"

	"github.com/hashicorp/raft"
	"go.uber.org/zap"

	"github.com/distlock/distlock/fence"
	"github.com/distlock/distlock/lease"
	"github.com/distlock/distlock/lease/machine"
)

var (
	records = flag.Int("records", 60, "entries of the log whose every prefix is recovered")
	flips   = flag.Int("flips", 60, "bits of that log to flip, one at a time")
)

// recovered reads what the disk's part of opening a directory finds, and
// applies it. Raft is not started: it would append to the log.
func recovered(dir string) (*machine.View, error) {
	d, err := openDisk(Config{Dir: dir, Logger: zap.NewNop(), SegmentSize: 1 << 20}, func(error) {})
	if err != nil {
		return nil, err
	}
	defer d.close()
	first, err := d.FirstIndex()
	if err != nil {
		return nil, err
	}
	last, err := d.LastIndex()
	if err != nil {
		return nil, err
	}
	var failed error
	f := &fsm{store: empty(), newest: machine.NewestLevel, fail: func(err error) { failed = err }, learned: func(note) {}, configured: func(uint64, raft.Configuration) {}}
	var l raft.Log
	for i := max(first, 1); i <= last; i++ {
		if err := d.GetLog(i, &l); err != nil {
			return nil, err
		}
		if l.Type != raft.LogCommand {
			continue
		}
		f.Apply(&l)
	}
	return f.store.View(), failed
}

// empty is a store as a history begins: at the first level.
func empty() *lease.Store {
	s := lease.NewStore(0)
	s.Restore(machine.NewAt(0, machine.FirstLevel))
	return s
}

func digest(m *machine.View) uint64 {
	sum := fnv.New64a()
	m.Snapshot(func(chunk []byte) error { sum.Write(chunk); return nil })
	return sum.Sum64()
}

// mixed makes a log of n entries of every sort, and returns the digests of the
// states that it goes through.
func mixed(t *testing.T, dir string, n int) []uint64 {
	t.Helper()
	r := open(t, Config{Dir: dir})
	defer func() {
		if err := r.Close(); err != nil {
			t.Fatal(err)
		}
	}()
	rng := rand.New(rand.NewPCG(7, 7))
	raised(t, r, machine.NewestLevel)
	states := []uint64{digest(r.fsm.store.View())}
	var tokens []fence.Token
	for i := range n {
		var cmd machine.Command
		name := fmt.Sprint("lock/", rng.IntN(8))
		switch k := rng.IntN(8); {
		case k < 4:
			cmd = &machine.Acquire{Request: machine.RequestID(i + 1), Names: []string{name}, Mode: machine.Exclusive, TTL: 1e9, Wait: k < 2,
				Owner: "somebody", Metadata: []machine.Meta{{Key: "n", Value: fmt.Sprint(i)}}}
		case k < 6 && len(tokens) > 0:
			cmd = &machine.Release{Token: tokens[rng.IntN(len(tokens))]}
		case k < 7:
			cmd = &machine.ExpireLeases{Leases: []machine.LeaseID{machine.LeaseID(rng.IntN(i + 1))}, Term: r.raft.CurrentTerm()}
		default:
			cmd = &machine.GrantLease{Request: machine.RequestID(1<<40 + i), TTL: 1e9}
		}
		out, err := propose(r, cmd)
		if err != nil {
			t.Fatal(err)
		}
		if g := out.Results[0].Hold; g != nil {
			tokens = append(tokens, g.Token)
		}
		states = append(states, digest(r.fsm.store.View()))
	}
	return states
}

// entriesOf finds where in a segment each sealed entry begins.
func entriesOf(text []byte) []int {
	var list []int
	for at := 0; ; {
		i := bytes.Index(text[at:], entryMagic[:])
		if i < 0 {
			return list
		}
		list = append(list, at+i)
		at += i + len(entryMagic)
	}
}

// TestEveryPrefixOfTheLog cuts a log of n records behind, and in the middle of,
// every one of them: what is recovered is the state that the store had after
// as many records, never another. (go test -args -records 1000)
func TestEveryPrefixOfTheLog(t *testing.T) {
	dir := t.TempDir()
	states := mixed(t, dir, *records)
	segment := newestSegment(dir)
	text, err := os.ReadFile(filepath.Join(dir, segment))
	if err != nil {
		t.Fatal(err)
	}
	position := map[uint64]int{digest(empty().View()): 0}
	for i, s := range states {
		position[s] = i
	}
	entries := entriesOf(text)
	if len(entries) < *records {
		t.Fatalf("%d entries in the file, %d records", len(entries), *records)
	}
	rng := rand.New(rand.NewPCG(8, 8))
	before, cuts := -1, 0
	for i, at := range entries {
		end := used(text)
		if i+1 < len(entries) {
			end = entries[i+1] - beforeMagic - 1
		}
		for _, cut := range []int{at + rng.IntN(end-at), end} {
			torn := append([]byte(nil), text...)
			clear(torn[cut:])
			m, err := recovered(withSegment(t, dir, segment, torn))
			if err != nil {
				t.Fatalf("cut at %d: %v", cut, err)
			}
			n, ok := position[digest(m)]
			if !ok {
				t.Fatalf("cut at %d: a state that the store never had", cut)
			}
			// Some records change nothing, so a state has its last place.
			if n < before {
				t.Fatalf("cut at %d: the state after %d records, and a shorter log had %d", cut, n, before)
			}
			before = n
			cuts++
		}
	}
	if before != position[states[len(states)-1]] {
		t.Fatalf("the whole log recovers to the state after %d records", before)
	}
	t.Logf("%d cuts of a log of %d records, each a prefix of its history", cuts, *records)
}

// withSegment copies a directory and replaces one file in the copy.
func withSegment(t *testing.T, dir, segment string, text []byte) string {
	t.Helper()
	to := t.TempDir()
	files, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range files {
		if f.IsDir() || f.Name() == segment {
			continue
		}
		b, err := os.ReadFile(filepath.Join(dir, f.Name()))
		if err == nil {
			err = os.WriteFile(filepath.Join(to, f.Name()), b, 0o600)
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	if err := os.WriteFile(filepath.Join(to, segment), text, 0o600); err != nil {
		t.Fatal(err)
	}
	return to
}

// TestFlippedBitsAreNeverServed flips bits all over the same log: either the
// damage is found, or nothing that was written is touched by it. In the last
// record alone damage cannot be told from a write that a crash has torn.
func TestFlippedBitsAreNeverServed(t *testing.T) {
	dir := t.TempDir()
	states := mixed(t, dir, *records)
	segment := newestSegment(dir)
	text, err := os.ReadFile(filepath.Join(dir, segment))
	if err != nil {
		t.Fatal(err)
	}
	whole := states[len(states)-1]
	entries := entriesOf(text)
	last := entries[len(entries)-1] - beforeMagic - 1
	rng := rand.New(rand.NewPCG(9, 9))
	found, harmless := 0, 0
	for range *flips {
		at, bit := rng.IntN(last), rng.IntN(8)
		damaged := append([]byte(nil), text...)
		damaged[at] ^= 1 << bit
		m, err := recovered(withSegment(t, dir, segment, damaged))
		var corrupt *CorruptError
		switch {
		case errors.As(err, &corrupt):
			found++
		case err != nil:
			t.Fatalf("bit %d of byte %d: %v", bit, at, err)
		case digest(m) != whole:
			t.Fatalf("bit %d of byte %d (of %d): another state, and no error", bit, at, last)
		default:
			harmless++
		}
	}
	t.Logf("%d flipped bits: %d found, %d harmless", *flips, found, harmless)
	if found < *flips/2 {
		t.Errorf("only %d of %d were found", found, *flips)
	}
}
