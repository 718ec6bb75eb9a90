package lease

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"strings"
	"sync"
	"testing"
	"testing/synctest"

	"github.com/distlock/distlock/lease/machine"
)

// park starts watchers that wait until ctx ends.
func park(t testing.TB, s *Store, ctx context.Context, n int, prefix func(int) string) *sync.WaitGroup {
	t.Helper()
	var group sync.WaitGroup
	for i := range n {
		w, err := s.Watch(prefix(i), 0)
		if err != nil {
			t.Fatal(err)
		}
		group.Go(func() {
			for ctx.Err() == nil {
				w.Next(ctx)
			}
		})
	}
	return &group
}

// TestAnEventWakesNoOther: those who watch other locks go on waiting, but for a
// few at a time that are told how far they have got.
func TestAnEventWakesNoOther(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := NewStore(0)
		ctx, cancel := context.WithCancel(context.Background())
		const others = 1000
		group := park(t, s, ctx, others, func(i int) string { return fmt.Sprint("other/", i) })
		synctest.Wait()
		waiting := func() int {
			s.mu.Lock()
			defer s.mu.Unlock()
			return s.waiting.ordered.Len()
		}
		for i := range 4000 { // of two events each
			apply(s, take(fmt.Sprint("mine/", i), RequestID(i+1)))
			if got := waiting(); got != others {
				t.Fatalf("the event wakes %d others", others-got)
			}
		}
		for i := 4000; i < 6000; i++ {
			apply(s, take(fmt.Sprint("mine/", i), RequestID(i+1)))
			if got := others - waiting(); got > maxProgress {
				t.Fatalf("an event wakes %d", got)
			}
			synctest.Wait()
		}
		s.mu.Lock()
		oldest := s.waiting.ordered.Front().Value.(*Watcher).told
		s.mu.Unlock()
		if behind := s.machine.Revision() - oldest; behind > maxSilent+2*others+2 {
			t.Errorf("somebody was told %d revisions ago", behind)
		}
		cancel()
		group.Wait()
		if s.waiting.ordered.Len()+len(s.waiting.byPrefix)+len(s.waiting.lengths) != 0 {
			t.Errorf("what is left: %+v", s.waiting)
		}
	})
}

// TestWatchersMissNothing: whatever is watched, given up for a while and gone on
// with, and however slowly it is read, every event comes once and in order.
func TestWatchersMissNothing(t *testing.T) {
	s := NewStore(0)
	prefixes := []string{"", "a", "a/", "a/1", "b/", "b/17", "nothing"}
	got := make([][]uint64, 2*len(prefixes))
	ctx, cancel := context.WithCancel(context.Background())
	var group sync.WaitGroup
	var last uint64
	var mu sync.Mutex
	for i := range got {
		w, err := s.Watch(prefixes[i%len(prefixes)], 1)
		if err != nil {
			t.Fatal(err)
		}
		r := rand.New(rand.NewPCG(7, uint64(i)))
		group.Go(func() {
			for {
				try, stop := context.WithCancel(ctx)
				if r.IntN(3) == 0 {
					go stop()
				}
				events, revision, err := w.Next(try)
				stop()
				for _, e := range events {
					got[i] = append(got[i], e.Revision)
				}
				mu.Lock()
				over := last != 0 && revision == last
				mu.Unlock()
				if err != nil && !errors.Is(err, context.Canceled) {
					t.Error(err)
				}
				if over || err != nil && ctx.Err() != nil {
					return
				}
			}
		})
	}
	want := make([][]uint64, len(got))
	r := rand.New(rand.NewPCG(7, 99))
	for i := range 3000 {
		var batch []machine.Command
		for k := range 1 + r.IntN(3) {
			batch = append(batch, take(fmt.Sprint(string("abc"[r.IntN(3)]), "/", r.IntN(40)), RequestID(1+4*i+k)))
		}
		for _, e := range apply(s, batch...).Events {
			for j := range want {
				if len(e.Locks) > 0 && strings.HasPrefix(e.Locks[0].Name, prefixes[j%len(prefixes)]) {
					want[j] = append(want[j], e.Revision)
				}
			}
		}
	}
	mu.Lock()
	last = s.machine.Revision()
	mu.Unlock()
	apply(s, take("a/17/last", 1<<40), take("b/17/last", 1<<41), take("nothing/last", 1<<42))
	for i := 0; ; i++ { // until all have seen that
		all := true
		s.mu.Lock()
		waiting := s.waiting.ordered.Len()
		s.mu.Unlock()
		all = waiting == len(got)
		if all || i > 1<<20 {
			break
		}
	}
	cancel()
	group.Wait()
	for i := range got {
		if len(got[i]) < len(want[i]) {
			t.Errorf("%q: %d events of %d", prefixes[i%len(prefixes)], len(got[i]), len(want[i]))
			continue
		}
		for k := range want[i] {
			if got[i][k] != want[i][k] {
				t.Errorf("%q: event %d has revision %d, not %d", prefixes[i%len(prefixes)], k, got[i][k], want[i][k])
				break
			}
		}
	}
}

// BenchmarkWatched applies commands while nobody watches, and while ten thousand
// watch other locks: both of one run, their ratio counts.
func BenchmarkWatched(b *testing.B) {
	for _, n := range []int{0, 10_000} {
		b.Run(fmt.Sprint("others=", n), func(b *testing.B) {
			s := NewStore(0)
			ctx, cancel := context.WithCancel(context.Background())
			group := park(b, s, ctx, n, func(i int) string { return fmt.Sprint("other/", i) })
			for i := 0; b.Loop(); i++ {
				apply(s, take("mine", RequestID(i+1)), &machine.Release{Name: "mine", Token: s.machine.LastToken() + 1})
			}
			cancel()
			group.Wait()
		})
	}
}
