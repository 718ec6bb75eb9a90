package server

import (
	"io"
	"net/http"
	"strings"
	"testing"
	"time"

	pb "github.com/distlock/distlock/proto/distlock/v1"
)

// scrape reads a path of the server's metrics, and its status.
func (r *rig) scrape(path string) (string, int) {
	r.t.Helper()
	req, err := http.NewRequestWithContext(soon(r.t), http.MethodGet, "http://"+r.MetricsAddr().String()+path, nil)
	if err != nil {
		r.t.Fatal(err)
	}
	client := http.Client{Transport: &http.Transport{DisableKeepAlives: true}}
	resp, err := client.Do(req)
	if err != nil {
		r.t.Fatal(err)
	}
	defer resp.Body.Close()
	text, err := io.ReadAll(resp.Body)
	if err != nil {
		r.t.Fatal(err)
	}
	return string(text), resp.StatusCode
}

func TestMetrics(t *testing.T) {
	r := start(t, durable(t.TempDir()), func(c *Config) { c.MetricsAddress = "127.0.0.1:0" })
	held := r.acquire("a", time.Hour)
	r.acquire("b", time.Minute)
	if _, err := r.locks().Acquire(soon(t), &pb.AcquireRequest{Names: []string{"a"}, Ttl: span(time.Minute)}); err == nil {
		t.Fatal("granted twice")
	}
	p := multiplex(t, soon(t), r.conn)
	p.ask(acquireOp(1, "a", true), acquireOp(2, "a", false))
	p.hear(1)
	r.waiters("a", 1)
	text, _ := r.scrape("/metrics")
	for _, line := range []string{
		"distlock_grants_total 2", "distlock_leases 3", "distlock_locks 2", "distlock_holds 2", "distlock_waiters 1",
		"distlock_leader 1", `distlock_refused_total{reason="LOCK_HELD"} 2`, `distlock_build_info{version="test"} 1`,
		"distlock_wait_seconds_count 0", "distlock_expiry_lag_seconds_count 0",
	} {
		if !strings.Contains(text, line+"\n") {
			t.Errorf("no line %q", line)
		}
	}
	p.ask(releaseOp(3, held))
	p.hear(2)
	r.clock.Advance(2 * time.Minute)
	for deadline := time.Now().Add(10 * time.Second); ; {
		text, _ = r.scrape("/metrics")
		if strings.Contains(text, "distlock_expiry_lag_seconds_count 2\n") {
			break
		}
		if time.Now().After(deadline) {
			t.Fatal("no expiries are counted")
		}
	}
	if !strings.Contains(text, "distlock_wait_seconds_count 1\n") || strings.Contains(text, "distlock_fsync_seconds_count 0\n") ||
		strings.Contains(text, "distlock_commit_seconds_count 0\n") || strings.Contains(text, "distlock_batch_commands_count 0\n") {
		t.Error("waits, syncs, commits or batches are not counted")
	}
	if _, code := r.scrape("/debug/pprof/"); code != http.StatusNotFound {
		t.Errorf("profiles that nobody asked for: %d", code)
	}
}

func TestProfilesOnlyWhenAskedFor(t *testing.T) {
	r := start(t, func(c *Config) { c.MetricsAddress, c.Pprof = "127.0.0.1:0", true })
	if _, code := r.scrape("/debug/pprof/goroutine?debug=1"); code != http.StatusOK {
		t.Errorf("status %d", code)
	}
	if _, err := New(Config{Address: "127.0.0.1", InMemory: true, MetricsAddress: r.MetricsAddr().String()}); err == nil {
		t.Error("two servers on one metrics address")
	}
}
