package bench

import (
	"bufio"
	"context"
	"io"
	"net/http"
	"net/url"
	"strconv"
	"strings"
	"time"
)

// usage is what a server has used so far, by its own metrics.
type usage struct {
	cpu            float64 // seconds
	resident, heap float64 // bytes
	live           float64 // of the heap, at the last collection
	collections    float64 // of garbage
	known          bool
}

// collect has the server collect its garbage, if it serves its profiles.
func (b *bench) collect(ctx context.Context) {
	at, err := url.Parse(b.Metrics)
	if b.Metrics == "" || err != nil {
		return
	}
	at.Path, at.RawQuery = "/debug/pprof/heap", "gc=1"
	get(ctx, at.String(), func(answer io.Reader) { io.Copy(io.Discard, answer) })
}

// get hands what is at an address to read, or nothing where nobody answers.
func get(ctx context.Context, address string, read func(io.Reader)) {
	ctx, cancel := context.WithTimeout(ctx, 5*time.Second)
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, address, nil)
	if err != nil {
		return
	}
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		return
	}
	defer resp.Body.Close()
	read(resp.Body)
}

// heapOf is how much of the heap each of n things takes that were made between
// empty and full; 0 when garbage has not been collected since full, and before
// empty: what was live then says nothing.
func heapOf(n int, empty, full, settled usage) float64 {
	if n == 0 || empty.collections == 0 || settled.collections <= full.collections {
		return 0
	}
	return (settled.live - empty.live) / float64(n)
}

// server asks the server; what it does not tell stays unknown.
func (b *bench) server(ctx context.Context) (u usage) {
	if b.Metrics != "" {
		get(ctx, b.Metrics, u.read)
	}
	return u
}

func (u *usage) read(metrics io.Reader) {
	lines := bufio.NewScanner(metrics)
	for lines.Scan() {
		name, text, ok := strings.Cut(lines.Text(), " ")
		value, err := strconv.ParseFloat(text, 64)
		if !ok || err != nil {
			continue
		}
		switch name {
		case "process_cpu_seconds_total":
			u.cpu, u.known = value, true
		case "process_resident_memory_bytes":
			u.resident = value
		case "go_memstats_heap_alloc_bytes":
			u.heap = value
		case "go_gc_duration_seconds_count":
			u.collections = value
		case "go_gc_heap_live_bytes":
			u.live = value
		}
	}
}

func (r *Result) used(before, after usage) {
	if !before.known || !after.known {
		return
	}
	r.ServerCPUSeconds = after.cpu - before.cpu
	if r.Operations > 0 {
		r.ServerMicrosPerOperation = r.ServerCPUSeconds * 1e6 / float64(r.Operations)
	}
	r.ServerResidentBytes, r.ServerHeapBytes = int64(after.resident), int64(after.heap)
}
