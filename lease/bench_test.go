package lease

import (
	"context"
	"fmt"
	"runtime"
	"sync/atomic"
	"testing"
	"time"

	"github.com/jonboulle/clockwork"

	"github.com/distlock/distlock/lease/machine"
)

func benchManager(b *testing.B, commands ...machine.Command) *Manager {
	store := NewStore(0)
	store.Apply(machine.Batch{Commands: commands})
	log := NewMemoryLog(store)
	m, err := New(Config{Clock: clockwork.NewRealClock(), Log: log, Store: store})
	if err != nil {
		b.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan error)
	go func() { ended <- m.Run(ctx) }()
	<-m.Ready()
	b.Cleanup(func() {
		cancel()
		<-ended
		log.Close()
	})
	return m
}

// BenchmarkAcquireRelease is a grant and its release, by 64 callers on locks
// of their own, over the memory log.
func BenchmarkAcquireRelease(b *testing.B) {
	m := benchManager(b)
	ctx := context.Background()
	var callers atomic.Uint64
	b.SetParallelism(32)
	b.ReportAllocs()
	b.ResetTimer()
	b.RunParallel(func(pb *testing.PB) {
		names := []string{fmt.Sprint("lock", callers.Add(1))}
		for pb.Next() {
			g, err := m.Acquire(ctx, AcquireRequest{Names: names, TTL: time.Minute})
			if err == nil {
				err = m.Release(ctx, ReleaseRequest{Lease: g.Lease, Name: names[0], Token: g.Token})
			}
			if err != nil {
				b.Error(err)
				return
			}
		}
	})
}

// BenchmarkKeepAlive renews one of a million leases per message, as a million
// clients would.
func BenchmarkKeepAlive(b *testing.B) {
	commands := make([]machine.Command, 1_000_000)
	for i := range commands {
		commands[i] = &machine.GrantLease{TTL: machine.Duration(time.Hour)}
	}
	m := benchManager(b, commands...)
	ctx := context.Background()
	var n atomic.Uint64
	b.SetParallelism(32)
	b.ReportAllocs()
	b.ResetTimer()
	b.RunParallel(func(pb *testing.PB) {
		for pb.Next() {
			id := ID(n.Add(7919)%1_000_000 + 1)
			if list, err := m.KeepAlive(ctx, []ID{id}); err != nil || list[0].Err != nil {
				b.Error(err, list)
				return
			}
		}
	})
}

// BenchmarkLead takes a leadership over a million leases, and tells what the
// manager keeps for each.
func BenchmarkLead(b *testing.B) {
	const n = 1_000_000
	commands := make([]machine.Command, n)
	for i := range commands {
		commands[i] = &machine.GrantLease{TTL: machine.Duration(time.Hour)}
	}
	store := NewStore(0)
	store.Apply(machine.Batch{Commands: commands})
	log := NewMemoryLog(store)
	defer log.Close()
	m, err := New(Config{Clock: clockwork.NewRealClock(), Log: log, Store: store})
	if err != nil {
		b.Fatal(err)
	}
	var before, after runtime.MemStats
	runtime.GC()
	runtime.ReadMemStats(&before)
	l, term := newLoop(m), uint64(0)
	for b.Loop() {
		term++
		l.lead(Leadership{Leader: true, Term: term})
	}
	runtime.GC()
	runtime.ReadMemStats(&after)
	b.ReportMetric(float64(after.HeapAlloc-before.HeapAlloc)/n, "B/lease")
	runtime.KeepAlive(l)
}
