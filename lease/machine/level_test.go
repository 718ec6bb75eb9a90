package machine

import (
	"bufio"
	"compress/gzip"
	"encoding/hex"
	"fmt"
	"hash/fnv"
	"os"
	"strings"
	"testing"
)

// TestTheFirstLevelIsWhatItWas: beside members of the build before this one
// does the same, to the byte. testdata/level1.gz was written by that build: 300
// sequences of random commands, each with the sum of the snapshot after it.
func TestTheFirstLevelIsWhatItWas(t *testing.T) {
	f, err := os.Open("testdata/level1.gz")
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	z, err := gzip.NewReader(f)
	if err != nil {
		t.Fatal(err)
	}
	m := NewAt(0, FirstLevel)
	steps, sequences := 0, 0
	for in := bufio.NewScanner(z); in.Scan(); {
		entry, want, ok := strings.Cut(in.Text(), " ")
		if !ok { // the next sequence
			m = NewAt(0, FirstLevel)
			sequences++
			continue
		}
		data, err := hex.DecodeString(entry)
		if err != nil {
			t.Fatal(err)
		}
		batch, err := DecodeBatch(data)
		if err != nil {
			t.Fatal(err)
		}
		batch.Term = 1
		out := m.Apply(batch)
		sum := fnv.New64a()
		if err := m.Snapshot(func(chunk []byte) error { sum.Write(chunk); return nil }); err != nil {
			t.Fatal(err)
		}
		if got := fmt.Sprintf("%016x", sum.Sum64()); got != want {
			t.Fatalf("sequence %d: after %T%+v: %+v: another state", sequences, batch.Commands[0], batch.Commands[0], out.Results[0])
		}
		steps++
	}
	if sequences != 300 || steps < 10_000 {
		t.Errorf("%d sequences of %d steps", sequences, steps)
	}
}

// TestTheLevelIsKept by a snapshot, and does not sink.
func TestTheLevelIsKept(t *testing.T) {
	for level := FirstLevel; level <= NewestLevel; level++ {
		m := restored(t, snapshotOf(t, NewAt(7, level)))
		if m.Level() != level {
			t.Errorf("level %d after a restore of one at %d", m.Level(), level)
		}
	}
	m := NewAt(0, NewestLevel)
	m.Raise(FirstLevel)
	if m.Level() != NewestLevel {
		t.Errorf("the level sank to %d", m.Level())
	}
}
