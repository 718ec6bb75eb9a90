//go:build linux

package e2e

import (
	"context"
	"flag"
	"fmt"
	"os"
	"regexp"
	"sort"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/distlock/distlock/client"
)

var manyLocks = flag.Int("held", 5_000, "locks held in TestManyLocks and TestMassExpiry")

// sample is one acquire and release.
type sample struct {
	at   time.Time
	took time.Duration
}

// TestManyLocks holds many locks, and measures what others notice: of
// snapshots, of a restart, and of the end of all leases at once.
func TestManyLocks(t *testing.T) {
	const ttl = 15 * time.Minute
	s := startServer(t, "--data-dir", t.TempDir(), "--snapshot-mib", "1", "--log-level", "debug", "--run-async")
	ctx, cancel := context.WithTimeout(context.Background(), 30*time.Minute)
	defer cancel()
	began := time.Now()
	s.hold(ctx, "held", *manyLocks, ttl)
	t.Logf("%d locks taken in %v, server memory %d MiB", *manyLocks, time.Since(began).Round(time.Second), s.memory()>>20)

	// Snapshots: grants go on.
	w := s.watch(ctx, 8)
	var inside, outside []time.Duration
	for min(len(inside), len(outside)) < 100 && ctx.Err() == nil {
		time.Sleep(500 * time.Millisecond)
		inside, outside = w.split(s.snapshots())
	}
	w.stop()
	in50, in99, inMax := quantiles(inside)
	out50, out99, outMax := quantiles(outside)
	t.Logf("acquire and release by 8 workers: during snapshots p50 %v p99 %v max %v (%d), between them p50 %v p99 %v max %v (%d): p99 %.1fx",
		in50, in99, inMax, len(inside), out50, out99, outMax, len(outside), float64(in99)/float64(out99))

	// A restart.
	s.kill()
	began = time.Now()
	s.spawn()
	c, err := client.New([]string{s.address})
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	lock, err := c.Acquire(ctx, "first", client.TTL(time.Minute))
	if err != nil {
		t.Fatal(err)
	}
	t.Logf("kill -9: the first grant came %v after the start of the process", time.Since(began).Round(time.Millisecond))
	if err := lock.Release(ctx); err != nil {
		t.Fatal(err)
	}
	st, err := c.Admin().Status(ctx)
	if err != nil || st.Locks < int64(*manyLocks) {
		t.Fatalf("%d locks after the restart, %v", st.Locks, err)
	}
}

// TestMassExpiry lets all leases end at once: grants of others go on.
func TestMassExpiry(t *testing.T) {
	s := startServer(t, "--data-dir", t.TempDir(), "--run-async")
	ctx, cancel := context.WithTimeout(context.Background(), 30*time.Minute)
	defer cancel()
	s.hold(ctx, "held", *manyLocks, 6*time.Second+time.Duration(*manyLocks/5_000)*time.Second)
	w := s.watch(ctx, 8)
	time.Sleep(2 * time.Second)
	w.stop()
	_, before := w.split(nil)
	_, before99, _ := quantiles(before)
	c, err := client.New([]string{s.address})
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	if st, err := c.Admin().Status(ctx); err != nil || st.Locks < int64(*manyLocks) {
		t.Fatalf("%d locks of %d are held still, %v", st.Locks, *manyLocks, err)
	}
	s.signal(syscall.SIGTERM)
	<-s.exited
	s.start() // from now on all have the same deadline
	w = s.watch(ctx, 8)
	from := time.Now()
	var first, last time.Time
	for last.IsZero() {
		st, err := c.Admin().Status(ctx)
		if err != nil {
			t.Fatal(err)
		}
		if first.IsZero() && st.Locks < int64(*manyLocks) {
			first = time.Now()
		}
		if st.Locks < 100 {
			last = time.Now()
		}
		time.Sleep(10 * time.Millisecond)
	}
	w.stop()
	inside, _ := w.split([][2]time.Time{{first.Add(-10 * time.Millisecond), last}})
	p50, p99, most := quantiles(inside)
	t.Logf("%d leases ended at once, %v after the restart, within %v; meanwhile acquire and release by 8 workers p50 %v p99 %v max %v (%d), with as many held p99 %v: %.1fx",
		*manyLocks, first.Sub(from).Round(time.Second), last.Sub(first).Round(time.Millisecond), p50, p99, most, len(inside), before99, float64(p99)/float64(before99))
}

// hold takes n locks and does not renew them.
func (s *server) hold(ctx context.Context, prefix string, n int, ttl time.Duration) {
	s.t.Helper()
	var next atomic.Int64
	var group sync.WaitGroup
	for range 4 {
		c, err := client.New([]string{s.address})
		if err != nil {
			s.t.Fatal(err)
		}
		defer c.Close()
		for range 256 {
			group.Add(1)
			go func() {
				defer group.Done()
				for {
					i := int(next.Add(1)) - 1
					if i >= n {
						return
					}
					if _, err := c.Acquire(ctx, fmt.Sprintf("%s/%d", prefix, i), client.TTL(ttl), client.NoRenew()); err != nil {
						s.t.Errorf("lock %d: %v", i, err)
						return
					}
				}
			}()
		}
	}
	group.Wait()
}

// watcher is workers that measure pairs of acquire and release.
type watcher struct {
	cancel  context.CancelFunc
	group   sync.WaitGroup
	mu      sync.Mutex
	samples []sample
}

func (s *server) watch(ctx context.Context, workers int) *watcher {
	s.t.Helper()
	w := &watcher{}
	ctx, w.cancel = context.WithCancel(ctx)
	for n := range workers {
		c, err := client.New([]string{s.address})
		if err != nil {
			s.t.Fatal(err)
		}
		w.group.Add(1)
		go func() {
			defer w.group.Done()
			defer c.Close()
			for ctx.Err() == nil {
				at := time.Now()
				lock, err := c.Acquire(ctx, fmt.Sprintf("worker/%d", n), client.TTL(time.Minute))
				if err != nil {
					continue
				}
				lock.Release(context.WithoutCancel(ctx))
				w.mu.Lock()
				w.samples = append(w.samples, sample{at, time.Since(at)})
				w.mu.Unlock()
				time.Sleep(2 * time.Millisecond)
			}
		}()
	}
	return w
}

func (w *watcher) stop() {
	w.cancel()
	w.group.Wait()
}

// split parts the samples that overlap any of some spans from the others.
func (w *watcher) split(spans [][2]time.Time) (inside, outside []time.Duration) {
	w.mu.Lock()
	defer w.mu.Unlock()
	for _, x := range w.samples {
		in := false
		for _, s := range spans {
			in = in || x.at.Before(s[1]) && x.at.Add(x.took).After(s[0])
		}
		if in {
			inside = append(inside, x.took)
		} else {
			outside = append(outside, x.took)
		}
	}
	return inside, outside
}

var stampOfLog = regexp.MustCompile(`^(\S+) DEBUG raft (starting snapshot|snapshot complete)`)

// snapshots are the spans in which the server took one. Its log has seconds
// only: the spans are wider than what they tell of.
func (s *server) snapshots() (spans [][2]time.Time) {
	var from time.Time
	for line := range strings.Lines(s.logs()) {
		m := stampOfLog.FindStringSubmatch(line)
		if m == nil {
			continue
		}
		at, err := time.Parse(time.RFC3339, m[1])
		switch {
		case err != nil:
		case m[2] == "starting snapshot":
			from = at
		case !from.IsZero():
			spans = append(spans, [2]time.Time{from, at.Add(time.Second)})
			from = time.Time{}
		}
	}
	sort.Slice(spans, func(i, j int) bool { return spans[i][0].Before(spans[j][0]) })
	return spans
}

// memory is the server's resident memory.
func (s *server) memory() int {
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/statm", s.cmd.Process.Pid))
	if err != nil {
		return 0
	}
	pages, _ := strconv.Atoi(strings.Fields(string(text))[1])
	return pages * os.Getpagesize()
}
