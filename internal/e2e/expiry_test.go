//go:build linux

package e2e

import (
	"context"
	"flag"
	"fmt"
	"math/rand/v2"
	"sort"
	"sync"
	"testing"
	"time"

	"github.com/distlock/distlock/client"
)

var leases = flag.Int("leases", 20_000, "leases that TestExpiryLag lets expire")

// TestExpiryLag lets many leases with a TTL of 2 to 5 s expire unrenewed.
// None ends before its time: the end is seen no sooner than the TTL after the
// request was sent. The lag is printed, not asserted: it depends on the
// machine.
func TestExpiryLag(t *testing.T) {
	srv := startServer(t, "--data-dir", t.TempDir())
	ctx, cancel := context.WithTimeout(context.Background(), 3*time.Minute)
	defer cancel()
	type life struct {
		ttl            time.Duration
		asked, granted time.Time
	}
	lives := make([]life, *leases)
	ends := make(chan []time.Time, 1)
	watcher, err := client.New([]string{srv.address})
	if err != nil {
		t.Fatal(err)
	}
	defer watcher.Close()
	start, err := watcher.Admin().Status(ctx)
	if err != nil {
		t.Fatal(err)
	}
	go func() {
		ended := make([]time.Time, *leases)
		missing := *leases
		for event, err := range watcher.Watch(ctx, "expiry/", start.Revision+1) {
			now := time.Now()
			if err != nil {
				t.Error(err)
				break
			}
			if event.Kind != client.EventEnded {
				continue
			}
			if event.Cause != client.CauseExpired {
				t.Errorf("%s ended as %v", event.Name, event.Cause)
			}
			var n int
			fmt.Sscanf(event.Name, "expiry/%d", &n)
			ended[n] = now
			if missing--; missing == 0 {
				break
			}
		}
		ends <- ended
	}()
	var group sync.WaitGroup
	const workers = 64
	for w := range workers {
		group.Add(1)
		go func() {
			defer group.Done()
			c, err := client.New([]string{srv.address})
			if err != nil {
				t.Error(err)
				return
			}
			defer c.Close()
			random := rand.New(rand.NewPCG(2, uint64(w)))
			for n := w; n < *leases; n += workers {
				l := &lives[n]
				l.ttl = 2*time.Second + time.Duration(random.IntN(3000))*time.Millisecond
				l.asked = time.Now()
				if _, err := c.TryAcquire(ctx, fmt.Sprintf("expiry/%d", n), client.TTL(l.ttl), client.NoRenew()); err != nil {
					t.Error(err)
					return
				}
				l.granted = time.Now()
			}
		}()
	}
	group.Wait()
	ended := <-ends
	lags := make([]time.Duration, 0, *leases)
	for n, l := range lives {
		if ended[n].IsZero() {
			t.Fatalf("lease %d never ended", n)
		}
		if early := l.asked.Add(l.ttl).Sub(ended[n]); early > 0 {
			t.Fatalf("lease %d of %v ended %v before its time", n, l.ttl, early)
		}
		lags = append(lags, ended[n].Sub(l.granted.Add(l.ttl)))
	}
	sort.Slice(lags, func(i, j int) bool { return lags[i] < lags[j] })
	t.Logf("%d leases of 2 to 5 s, none ended early; lag from (grant seen + TTL) to (end seen): p50 %v, p99 %v, max %v",
		*leases, lags[len(lags)/2], lags[len(lags)*99/100], lags[len(lags)-1])
}
