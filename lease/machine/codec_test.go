package machine

import (
	"bytes"
	"errors"
	"fmt"
	"reflect"
	"runtime"
	"slices"
	"strings"
	"testing"

	"github.com/distlock/distlock/fence"
)

// every has one of each command, every field set.
var every = []Command{
	&GrantLease{Request: 1, TTL: 2, Owner: "o", Metadata: []Meta{{"k", "v"}}},
	&RevokeLease{Lease: 1 << 60, By: "b"},
	&ExpireLeases{Leases: []LeaseID{1, 2, 1 << 52}, Term: 9},
	&Acquire{
		Lease: 3, Request: 4, LowestOpen: 2, Names: []string{"a", "b\x00c"}, Mode: Shared, Limit: 1<<32 - 1, Wait: true,
		LockDelay: 5, Actor: "x", Metadata: []Meta{{"", "v"}, {"k", ""}}, TTL: 6, Owner: "o", Declared: true,
	},
	&Mark{Leases: []LeaseMark{{1, 2}, {1 << 52, 1 << 62}}, Delays: []DelayMark{{"d", 3, 4}}, Term: 9}, &Clear{Leases: []LeaseID{1, 2}},
	&Abandon{Lease: 1, Request: 1 << 63},
	&AbandonAll{Lease: 1, Requests: []RequestID{1, 1 << 62}, EndLease: true}, &EndWait{Lease: 1, Request: 2},
	&Release{Lease: 1, Name: "a", Token: fence.MaxToken, Request: 3},
	&ForceRelease{Name: "a", Token: 2, By: "b"},
	&EndDelay{Name: "a", Delay: 3},
	&Declare{Name: "a"}, &Undeclare{Name: "a"}, &ReleaseClock{Name: "a", Clock: 1<<64 - 1}, &Forget{Through: 7},
}

func TestCodecRoundTrip(t *testing.T) {
	for _, c := range every {
		v := reflect.ValueOf(c).Elem()
		for i := range v.NumField() {
			if v.Field(i).IsZero() {
				t.Errorf("%T.%s is not set: the test does not cover it", c, v.Type().Field(i).Name)
			}
		}
	}
	want := Batch{Stamp: -5, Commands: every}
	b := AppendBatch([]byte("before"), &want)[len("before"):]
	got, err := DecodeBatch(b)
	if err != nil || !reflect.DeepEqual(got, want) {
		t.Fatalf("%+v, %v", got, err)
	}
	for i := range b {
		if _, err := DecodeBatch(b[:i]); !errors.Is(err, ErrCorrupt) {
			t.Fatalf("the first %d bytes: %v", i, err)
		}
	}
	if _, err := DecodeBatch(append(b, 0)); !errors.Is(err, ErrCorrupt) {
		t.Errorf("a byte more: %v", err)
	}
	b[0]++
	if _, err := DecodeBatch(b); !errors.Is(err, ErrUnknownCommand) {
		t.Errorf("another version: %v", err)
	}
	if _, err := DecodeBatch([]byte{batchVersion, 0, 1, 99}); !errors.Is(err, ErrUnknownCommand) {
		t.Errorf("another command: %v", err)
	}
}

// full is a machine with something in every table and every field.
func full(t testing.TB) *Machine {
	m := New(0)
	m.Apply(Batch{Stamp: 1, Term: 1, Commands: []Command{
		&GrantLease{Request: 50, TTL: 9, Owner: "o", Metadata: []Meta{{"k", "v"}}},
		&Acquire{Lease: 1, Request: 2, LowestOpen: 2, Names: []string{"f"}, Mode: Exclusive},
		&ForceRelease{Name: "f", By: "ops"},
		&Acquire{Lease: 1, Request: 3, LowestOpen: 2, Names: []string{"a", "b"}, Mode: Shared, Limit: 2, LockDelay: 4, Actor: "x", Metadata: []Meta{{"k", "v"}}},
		&Acquire{Request: 51, Names: []string{"a"}, Mode: Shared, Limit: 2, TTL: 5},
		&Acquire{Request: 52, Names: []string{"a"}, Mode: Exclusive, TTL: 5, Wait: true, Actor: "y"},
		&Declare{Name: "d"},
		&Acquire{Request: 53, Names: []string{"d"}, Mode: Exclusive, TTL: 5},
		&Acquire{Request: 54, Names: []string{"z"}, Mode: Exclusive, TTL: 5, LockDelay: 8},
		&RevokeLease{Lease: 5, By: "ops"},
	}})
	var delay DelayMark
	m.EachDelay(func(name string, d Delay) bool { delay = DelayMark{name, d.ID, 3}; return true })
	m.Apply(Batch{Stamp: 2, Term: 1, Commands: []Command{&Mark{Term: 1, Leases: []LeaseMark{{1, 4}, {3, 2}}, Delays: []DelayMark{delay}}}})
	if delay.Delay == 0 || m.marks.Len() != 2 {
		t.Fatalf("%+v, %d marks", delay, m.marks.Len())
	}
	if c := m.Counts(); c.Leases < 4 || c.Waiters != 1 || c.Remembered < 2 || m.memory.young.traces.Len() != 2 || m.actors.Len() != 2 {
		t.Fatalf("%+v", c)
	}
	return m
}

func TestSnapshotRoundTrip(t *testing.T) {
	m := full(t)
	b := snapshotOf(t, m)
	back := restored(t, b)
	if !bytes.Equal(snapshotOf(t, back), b) || show(&back.state) != show(&m.state) {
		t.Fatalf("\n%s\nis not\n%s", show(&back.state), show(&m.state))
	}
	for i := range b {
		if _, err := Restore(bytes.NewReader(b[:i]).Read); err == nil {
			t.Fatalf("the first %d of %d bytes were taken for a snapshot", i, len(b))
		}
	}
	// It reads no byte past its end.
	r := bytes.NewReader(append(bytes.Clone(b), "more"...))
	if _, err := Restore(r.Read); err != nil || r.Len() != 4 {
		t.Errorf("%v, %d bytes left", err, r.Len())
	}
	b[0]++
	if _, err := Restore(bytes.NewReader(b).Read); !errors.Is(err, ErrUnknownCommand) {
		t.Errorf("another version: %v", err)
	}
}

func FuzzDecodeBatch(f *testing.F) {
	for _, c := range every {
		f.Add(AppendBatch(nil, &Batch{Stamp: 1, Commands: []Command{c}}))
	}
	f.Add(AppendBatch(nil, &Batch{Stamp: 1, Commands: every}))
	f.Fuzz(func(t *testing.T, b []byte) {
		batch, err := DecodeBatch(b)
		if err != nil {
			if !errors.Is(err, ErrCorrupt) && !errors.Is(err, ErrUnknownCommand) {
				t.Fatalf("untyped error %v", err)
			}
			return
		}
		again, err := DecodeBatch(AppendBatch(nil, &batch))
		if err != nil || !reflect.DeepEqual(again, batch) {
			t.Fatalf("%+v came back as %+v, %v", batch, again, err)
		}
		// Whatever was decoded can be applied, and leaves a state that is sound.
		m := full(t)
		m.Apply(batch)
		restored(t, snapshotOf(t, m))
	})
}

func FuzzRestore(f *testing.F) {
	f.Add(snapshotOf(f, full(f)))
	f.Add(snapshotOf(f, New(1<<50)))
	f.Fuzz(func(t *testing.T, b []byte) {
		m, err := Restore(bytes.NewReader(b).Read)
		if err != nil {
			return
		}
		once := snapshotOf(t, m)
		if !bytes.Equal(snapshotOf(t, restored(t, once)), once) {
			t.Fatal("a restored snapshot does not restore to itself")
		}
		// Whatever was restored can be worked with.
		m.Apply(Batch{Term: 1, Commands: every})
		show(&m.state)
	})
}

// What ended is remembered until at least MinRemembered others have; a machine
// from a snapshot forgets it at the same moment.
func TestMemoryIsBounded(t *testing.T) {
	m := New(0)
	twin := m
	largest := 0
	for i := range 3*MinRemembered + 100 {
		if i == MinRemembered+MinRemembered/2 {
			twin = restored(t, snapshotOf(t, m))
		}
		for _, x := range slices.Compact([]*Machine{m, twin}) {
			x.Apply(Batch{Commands: []Command{&Abandon{Request: RequestID(i + 1)}}})
		}
		n := m.Counts().Remembered
		if largest = max(largest, n); n < min(i+1, MinRemembered) || n > 2*MinRemembered || twin.Counts().Remembered != n {
			t.Fatalf("%d remembered after %d, and %d", n, i+1, twin.Counts().Remembered)
		}
		oldest := RequestID(i + 2 - n)
		if m.memory.request(oldest) == nil || twin.memory.request(oldest) == nil || m.memory.request(oldest-1) != nil || twin.memory.request(oldest-1) != nil {
			t.Fatal("it is not the oldest that were dropped")
		}
	}
	if largest < 2*MinRemembered-1 {
		t.Errorf("at most %d remembered", largest)
	}
	if !bytes.Equal(snapshotOf(t, m), snapshotOf(t, twin)) {
		t.Error("they differ")
	}
	for through := m.revision + 1; m.Counts().Remembered > 0; through++ {
		for _, x := range []*Machine{m, twin} {
			x.Apply(Batch{Commands: []Command{&Forget{Through: through}}})
		}
	}
	if twin.Counts().Remembered != 0 || m.memory.request(3*MinRemembered) != nil {
		t.Error("not all is forgotten")
	}
}

// Forget takes the oldest, over the border of the generations.
func TestForgetOverGenerations(t *testing.T) {
	m := New(0)
	var ends []uint64 // revision at the end of lock i
	const n = MinRemembered + 1000
	for i := range n {
		m.Apply(Batch{Commands: []Command{&Acquire{Request: RequestID(i + 1), Names: []string{"a"}, Mode: Exclusive, TTL: 1}}})
		m.Apply(Batch{Commands: []Command{&RevokeLease{Lease: LeaseID(i + 1)}}})
		ends = append(ends, m.revision)
	}
	for _, i := range []int{10, MinRemembered - 10, MinRemembered + 10, n - 1} {
		m.Apply(Batch{Commands: []Command{&Forget{Through: ends[i]}}})
		back := restored(t, snapshotOf(t, m))
		for _, x := range []*Machine{m, back} {
			if got := x.Counts().Remembered; got != n-1-i {
				t.Fatalf("%d remembered after %d were forgotten", got, i+1)
			}
			if x.memory.lease(LeaseID(i+1)) != nil || x.memory.token(fence.Token(i+1)) != nil || x.memory.request(RequestID(i+1)) != nil {
				t.Fatalf("%d is not forgotten", i)
			}
			if p := x.memory.lease(LeaseID(i + 2)); i+1 < n && (p == nil || p != x.memory.token(fence.Token(i+2)) || p != x.memory.request(RequestID(i+2)) || p.cause != EndRevoked) {
				t.Fatalf("%d is forgotten: %+v", i+1, p)
			}
			if last := x.memory.last("a"); (last != 0) != (i < n-1) {
				t.Fatalf("the last token is %d after %d were forgotten", last, i+1)
			}
		}
	}
}

func TestTokensEndBelowTwoToThe53(t *testing.T) {
	m := New(uint64(fence.MaxToken) - 1)
	out := m.Apply(Batch{Commands: []Command{
		&Acquire{Request: 1, Names: []string{"a"}, Mode: Exclusive, TTL: 1},
		&Acquire{Request: 2, Names: []string{"b"}, Mode: Exclusive, TTL: 1},
		&Acquire{Request: 3, Names: []string{"a"}, Mode: Exclusive, TTL: 1, Wait: true},
		&Release{Name: "a", Token: fence.MaxToken},
	}})
	if g := out.Results[0].Hold; g == nil || g.Token != fence.MaxToken {
		t.Fatalf("%+v", out.Results[0])
	}
	if r := out.Results[1].Refusal; r == nil || r.Reason != ReasonTokensExhausted {
		t.Fatalf("%+v", out.Results[1])
	}
	if k, _ := m.Lock("a"); len(k.Waiters) != 1 {
		t.Fatalf("%+v", k)
	}
}

func BenchmarkAcquireRelease(b *testing.B) {
	for _, locks := range []int{1_000, 10_000, 100_000, 1_000_000} {
		b.Run(fmt.Sprint(locks), func(b *testing.B) {
			m := New(0)
			for i := range locks {
				m.Apply(Batch{Commands: []Command{&Acquire{Request: RequestID(i + 1), Names: []string{fmt.Sprintf("lock/%d", i)}, Mode: Exclusive, TTL: 1}}})
			}
			b.ReportAllocs()
			req := RequestID(locks)
			names := []string{"mine"}
			for b.Loop() {
				req++
				out := m.Apply(Batch{Commands: []Command{&Acquire{Request: req, Names: names, Mode: Exclusive, TTL: 1}}})
				m.Apply(Batch{Commands: []Command{&Release{Name: "mine", Token: out.Results[0].Hold.Token}}})
			}
		})
	}
}

// batchOf is a batch as the manager makes them under load.
func batchOf(n int) Batch {
	b := Batch{Stamp: 1_800_000_000_000_000_000}
	for i := range n {
		if i%2 == 0 {
			b.Commands = append(b.Commands, &Acquire{
				Request: RequestID(i*7919 + 1), Names: []string{fmt.Sprintf("orders/%d", i)}, Mode: Exclusive, Wait: true,
				TTL: 30_000_000_000, Owner: "host:12345",
			})
		} else {
			b.Commands = append(b.Commands, &Release{Lease: LeaseID(i), Name: fmt.Sprintf("orders/%d", i), Token: fence.Token(i)})
		}
	}
	return b
}

func BenchmarkEncodeBatch(b *testing.B) {
	batch := batchOf(64)
	b.ReportAllocs()
	var text []byte
	for b.Loop() {
		text = AppendBatch(nil, &batch)
	}
	b.ReportMetric(float64(len(text))/64, "B/command")
}

func BenchmarkDecodeBatch(b *testing.B) {
	batch := batchOf(64)
	text := AppendBatch(nil, &batch)
	b.ReportAllocs()
	for b.Loop() {
		if _, err := DecodeBatch(text); err != nil {
			b.Fatal(err)
		}
	}
}

// BenchmarkSnapshot writes 100,000 leases with a lock each.
func BenchmarkSnapshot(b *testing.B) {
	m := New(0)
	for i := range 100_000 {
		m.Apply(Batch{Commands: []Command{&Acquire{Request: RequestID(i + 1), Names: []string{fmt.Sprintf("lock/%d", i)}, Mode: Exclusive, TTL: 1}}})
	}
	b.ReportAllocs()
	for b.Loop() {
		m.Copy().Snapshot(func([]byte) error { return nil })
	}
}

// BenchmarkHeld tells what the machine keeps for a lease with one lock.
func BenchmarkHeld(b *testing.B) {
	const n = 100_000
	var before, after runtime.MemStats
	for b.Loop() {
		runtime.GC()
		runtime.ReadMemStats(&before)
		m := New(0)
		for i := 0; i < n; i += 100 {
			var batch Batch
			for j := i; j < i+100; j++ {
				batch.Commands = append(batch.Commands, &Acquire{
					Request: RequestID(j*7919 + 1), Names: []string{fmt.Sprintf("bench/123456/%d", j)}, Mode: Exclusive, TTL: 1, Owner: strings.Clone("bench"),
				})
			}
			m.Apply(batch)
		}
		runtime.GC()
		runtime.ReadMemStats(&after)
		runtime.KeepAlive(m)
	}
	b.ReportMetric(float64(after.HeapAlloc-before.HeapAlloc)/n, "B/lease")
}

// TestCommandsOfABatchAreApart: they are made together, and each is its own.
func TestCommandsOfABatchAreApart(t *testing.T) {
	var want Batch
	for i := range 3*together + 1 {
		owner := []string{"o", "o", "p", ""}[i%4]
		want.Commands = append(want.Commands,
			&Acquire{Request: RequestID(i + 1), Names: []string{fmt.Sprint("a", i)}, Mode: Exclusive, TTL: 1, Owner: owner},
			&Release{Name: fmt.Sprint("r", i), Token: fence.Token(i + 1)})
	}
	got, err := DecodeBatch(AppendBatch(nil, &want))
	if err != nil || !reflect.DeepEqual(got, want) {
		t.Fatalf("%+v, %v", got, err)
	}
	for _, c := range got.Commands {
		if c, ok := c.(*Acquire); ok {
			_ = append(c.Names, "another")
		}
	}
	if !reflect.DeepEqual(got, want) {
		t.Error("a name was written over another's")
	}
}
