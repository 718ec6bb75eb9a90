package bench

import (
	"context"
	"fmt"
	"net"
	"net/http"
	"net/http/httptest"
	"sync/atomic"
	"testing"
	"time"

	"github.com/distlock/distlock/internal/server"
)

// TestModes runs each mode for a moment against a server in this process.
func TestModes(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	s, err := server.New(server.Config{Listener: l, InMemory: true})
	if err != nil {
		t.Fatal(err)
	}
	ctx, stop := context.WithCancel(t.Context())
	ended := make(chan error, 1)
	go func() { ended <- s.Run(ctx) }()
	defer func() {
		stop()
		if err := <-ended; err != nil {
			t.Error(err)
		}
	}()
	var collections atomic.Int64
	metrics := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path == "/debug/pprof/heap" && r.FormValue("gc") == "1" {
			collections.Add(1)
			return
		}
		n := collections.Load()
		fmt.Fprintf(w, "# HELP x\nprocess_cpu_seconds_total 1.5\nprocess_resident_memory_bytes 2e+06\ngo_gc_heap_live_bytes %d\ngo_gc_duration_seconds_count %d\n", n*1000, n)
	}))
	defer metrics.Close()
	base := Config{
		Endpoint: l.Addr().String(), Workers: 4, Connections: 3, Duration: 200 * time.Millisecond,
		Leases: 50, TTL: 10 * time.Second, Every: time.Second, Metrics: metrics.URL,
	}
	for name, set := range map[string]func(*Config){
		"uncontended": func(c *Config) { c.Mode = Uncontended },
		"unary":       func(c *Config) { c.Mode, c.Unary = Uncontended, true },
		"pipelined":   func(c *Config) { c.Mode, c.Pipeline = Uncontended, 40 },
		"handoff":     func(c *Config) { c.Mode = Handoff },
		"keepalive":   func(c *Config) { c.Mode = KeepAlive },
		"expiry":      func(c *Config) { c.Mode = Expiry },
	} {
		t.Run(name, func(t *testing.T) {
			cfg := base
			set(&cfg)
			results, err := Run(ctx, cfg)
			if err != nil {
				t.Fatal(err)
			}
			r := results[0]
			if r.Operations == 0 || r.PerSecond <= 0 || r.P99Micros < r.P50Micros || r.MaxMicros < r.P99Micros || r.ServerResidentBytes != 2e6 || r.Early != 0 {
				t.Errorf("%+v", r)
			}
			if name == "handoff" && r.Fairness <= 0 {
				t.Errorf("%+v", r)
			}
			if name == "keepalive" && (len(results) != 2 || r.ServerHeapBytesPerLease != 1000/50) {
				t.Errorf("%+v", results)
			}
		})
	}
	// What was live at a collection before the leases were made is not theirs.
	if n := heapOf(10, usage{collections: 1}, usage{collections: 2, live: 500}, usage{collections: 2, live: 500}); n != 0 {
		t.Errorf("%v bytes each, of a heap that nobody has measured", n)
	}
	t.Run("none", func(t *testing.T) {
		if _, err := Run(ctx, Config{Endpoint: base.Endpoint, Mode: "?"}); err == nil {
			t.Error("an unknown mode runs")
		}
		if _, err := Run(ctx, Config{Endpoint: base.Endpoint, Mode: Handoff, Connections: 1, Echo: []string{"/nonexistent"}}); err == nil {
			t.Error("an echo that cannot be started is no error")
		}
	})
}
