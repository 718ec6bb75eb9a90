//go:build linux

package e2e

import (
	"bufio"
	"context"
	"flag"
	"fmt"
	"io/fs"
	"math/rand/v2"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/distlock/distlock/client"
)

var soak = flag.Duration("soak", 6*time.Second, "how long TestSoak works a server")

// TestSoak works a server with everything that comes and goes: connections,
// leases that are left to expire, waits that are given up, watches, locks of
// new names. Heap, goroutines, file descriptors and disk must be flat.
func TestSoak(t *testing.T) {
	dir, metrics := t.TempDir(), freeAddress(t)
	srv := startServer(t, "--data-dir", dir, "--run-async", "--metrics-address", metrics)
	ctx, cancel := context.WithTimeout(context.Background(), *soak)
	defer cancel()
	var workers sync.WaitGroup
	for n := range 8 {
		workers.Go(func() {
			r := rand.New(rand.NewPCG(uint64(n), 3))
			for i := 0; ctx.Err() == nil; i++ {
				soakOnce(ctx, t, srv.address, n, i, r)
			}
		})
	}
	var samples []usage
	for every := *soak / 24; ctx.Err() == nil; {
		select {
		case <-ctx.Done():
		case <-time.After(every):
			u, err := srv.usage(metrics, dir)
			if err != nil {
				t.Error(err)
			}
			samples = append(samples, u)
		}
	}
	workers.Wait()
	if len(samples) < 12 {
		t.Fatalf("%d samples", len(samples))
	}
	early, late := samples[len(samples)/4:len(samples)/2], samples[3*len(samples)/4:]
	for _, c := range []struct {
		what   string
		of     func(usage) float64
		factor float64
		room   float64 // what is remembered of the past has a bound, which is reached in time
	}{
		{"heap bytes", func(u usage) float64 { return u.heap }, 1.25, 48 << 20},
		{"goroutines", func(u usage) float64 { return u.goroutines }, 1.25, 40},
		{"file descriptors", func(u usage) float64 { return u.files }, 1.25, 20},
		{"bytes on disk", func(u usage) float64 { return u.disk }, 1.25, 160 << 20},
	} {
		a, b := median(early, c.of), median(late, c.of)
		t.Logf("%s: %.0f early, %.0f late", c.what, a, b)
		if b > a*c.factor+c.room {
			t.Errorf("%s grow: from %.0f to %.0f", c.what, a, b)
		}
	}
}

// soakOnce is the life of one client.
func soakOnce(ctx context.Context, t *testing.T, address string, n, i int, r *rand.Rand) {
	c, err := client.New([]string{address}, client.WithOwner(fmt.Sprint("soak-", n)))
	if err != nil {
		t.Error(err)
		return
	}
	defer c.Close()
	watching, stop := context.WithCancel(ctx)
	defer stop()
	var group sync.WaitGroup
	group.Go(func() {
		for _, err := range c.Watch(watching, "soak/", 0) {
			if err != nil {
				return
			}
		}
	})
	for k := range 200 {
		if ctx.Err() != nil {
			break
		}
		name := fmt.Sprintf("soak/%d", r.IntN(20))
		if r.IntN(3) == 0 {
			name = fmt.Sprintf("soak/%d/%d/%d", n, i, k)
		}
		bounded, cancel := context.WithTimeout(ctx, time.Duration(20+r.IntN(200))*time.Millisecond)
		lock, err := c.Acquire(bounded, name, client.TTL(time.Duration(200+r.IntN(1000))*time.Millisecond))
		cancel()
		if err != nil {
			continue // given up
		}
		switch r.IntN(8) {
		case 0:
			c.Admin().Grant(ctx, 300*time.Millisecond) // nobody renews it
		case 1:
			c.TryAcquire(ctx, name+"/left", client.TTL(300*time.Millisecond), client.NoRenew())
		}
		lock.Release(ctx)
	}
	stop()
	group.Wait()
}

// usage is what a server process takes.
type usage struct{ heap, goroutines, files, disk float64 }

func (s *server) usage(metrics, dir string) (u usage, err error) {
	resp, err := http.Get("http://" + metrics + "/metrics")
	if err != nil {
		return u, err
	}
	defer resp.Body.Close()
	for lines := bufio.NewScanner(resp.Body); lines.Scan(); {
		f := strings.Fields(lines.Text())
		if len(f) != 2 {
			continue
		}
		v, _ := strconv.ParseFloat(f[1], 64)
		switch f[0] {
		case "go_memstats_heap_inuse_bytes":
			u.heap = v
		case "go_goroutines":
			u.goroutines = v
		}
	}
	if u.heap == 0 || u.goroutines == 0 {
		return u, fmt.Errorf("the metrics tell of no heap or no goroutines")
	}
	files, err := os.ReadDir(fmt.Sprintf("/proc/%d/fd", s.cmd.Process.Pid))
	if err != nil {
		return u, err
	}
	u.files = float64(len(files))
	filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		var st syscall.Stat_t
		if err == nil && !d.IsDir() && syscall.Stat(path, &st) == nil {
			u.disk += float64(st.Blocks) * 512
		}
		return nil // files come and go
	})
	return u, nil
}

func median(list []usage, of func(usage) float64) float64 {
	values := make([]float64, len(list))
	for i, u := range list {
		values[i] = of(u)
	}
	slices.Sort(values)
	return values[len(values)/2]
}
