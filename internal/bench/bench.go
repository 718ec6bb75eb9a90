// Package bench is the load generator of `distlock bench`: it drives a server
// in one of several ways, beside a bare gRPC echo of its own, and tells
// rates, latencies and what the server used meanwhile.
package bench

import (
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"strconv"
	"sync/atomic"
	"time"

	"github.com/HdrHistogram/hdrhistogram-go"

	"github.com/distlock/distlock/client"
)

// The modes.
const (
	Uncontended = "uncontended" // each worker takes and gives back a lock of its own
	Handoff     = "handoff"     // all workers want one lock
	KeepAlive   = "keepalive"   // leases are kept alive
	Expiry      = "expiry"      // leases are left to expire
)

// Modes are all of them, with what they do.
var Modes = [][2]string{
	{Uncontended, "each worker acquires and releases a lock of its own"},
	{Handoff, "all workers want one lock; each hands it to the next"},
	{KeepAlive, "makes --leases leases with a lock each and keeps them alive"},
	{Expiry, "makes --leases leases of 2 to 5 s and sees how late they end"},
}

// Config says what to measure.
type Config struct {
	Endpoint    string
	Mode        string
	Workers     int
	Connections int
	// Pipeline, when above 0, drives the stream with that many operations
	// outstanding in all and no goroutine for each; Uncontended only.
	Pipeline int
	Unary    bool // each operation is a call of its own
	Duration time.Duration
	Leases   int           // of KeepAlive and Expiry
	TTL      time.Duration // of KeepAlive's leases
	Every    time.Duration // how often KeepAlive renews each
	// Echo is the command line of a process that runs ServeEcho, to measure
	// the bare echo first; none for not.
	Echo []string
	// Metrics is the URL of the server's metrics, for its CPU and memory.
	Metrics  string
	Progress io.Writer
}

// Result is one row of what was measured. Times are in microseconds.
type Result struct {
	What        string  `json:"what"`
	Workers     int     `json:"workers,omitempty"`
	Connections int     `json:"connections"`
	Seconds     float64 `json:"seconds"`
	Operations  int64   `json:"operations"`
	PerSecond   float64 `json:"perSecond"`
	// OfEcho is PerSecond as a ratio to that of a pair of bare unary echoes,
	// and OfStreamEcho to that of a pair batched on streams, of the same run.
	OfEcho       float64 `json:"ofEcho,omitempty"`
	OfStreamEcho float64 `json:"ofStreamEcho,omitempty"`
	MeanMicros   float64 `json:"meanMicros"`
	P50Micros    int64   `json:"p50Micros"`
	P90Micros    int64   `json:"p90Micros"`
	P99Micros    int64   `json:"p99Micros"`
	P999Micros   int64   `json:"p999Micros"`
	MaxMicros    int64   `json:"maxMicros"`
	// Early counts leases that ended before their time.
	Early int64 `json:"early,omitempty"`
	// Fairness is the fewest hand-offs of a worker by the most of one.
	Fairness float64 `json:"fairness,omitempty"`

	ServerMicrosPerOperation float64 `json:"serverMicrosPerOperation,omitempty"`
	ServerCPUSeconds         float64 `json:"serverCpuSeconds,omitempty"`
	ServerResidentBytes      int64   `json:"serverResidentBytes,omitempty"`
	ServerHeapBytes          int64   `json:"serverHeapBytes,omitempty"`
	ServerHeapBytesPerLease  float64 `json:"serverHeapBytesPerLease,omitempty"`
}

// Run measures. The results are the echoes, where asked for, and what the mode
// measures.
func Run(ctx context.Context, cfg Config) ([]Result, error) {
	if cfg.Progress == nil {
		cfg.Progress = io.Discard
	}
	b := &bench{Config: cfg, run: strconv.FormatUint(rand.Uint64N(1<<40), 36)}
	c, err := client.New([]string{cfg.Endpoint})
	if err != nil {
		return nil, err
	}
	defer c.Close()
	if _, err := c.Admin().Status(ctx); err != nil { // before the load: is it there?
		return nil, err
	}
	var results []Result
	var unary, stream Result
	if len(cfg.Echo) > 0 {
		if unary, stream, err = b.echoes(ctx); err != nil {
			return nil, err
		}
		results = append(results, unary, stream)
	}
	var got []Result
	switch {
	case cfg.Mode == Uncontended && cfg.Pipeline > 0:
		got, err = b.pipelined(ctx)
	case cfg.Mode == Uncontended:
		got, err = b.uncontended(ctx)
	case cfg.Mode == Handoff:
		got, err = b.handoff(ctx)
	case cfg.Mode == KeepAlive:
		got, err = b.keepAlive(ctx)
	case cfg.Mode == Expiry:
		got, err = b.expiry(ctx)
	default:
		err = fmt.Errorf("there is no mode %q", cfg.Mode)
	}
	if err != nil {
		return nil, err
	}
	for i := range got {
		if unary.PerSecond > 0 {
			got[i].OfEcho = got[i].PerSecond / unary.PerSecond
			got[i].OfStreamEcho = got[i].PerSecond / stream.PerSecond
		}
	}
	return append(results, got...), nil
}

type bench struct {
	Config
	run string // tells the names of this run from those of others
}

func (b *bench) name(worker int) string { return fmt.Sprintf("bench/%s/%d", b.run, worker) }

// clients are one per connection.
func (b *bench) clients() ([]*client.Client, func(), error) {
	var list []*client.Client
	closeAll := func() {
		for _, c := range list {
			c.Close()
		}
	}
	for range b.Connections {
		var opts []client.Option
		if b.Unary {
			opts = append(opts, client.WithUnary())
		}
		c, err := client.New([]string{b.Endpoint}, opts...)
		if err != nil {
			closeAll()
			return nil, nil, err
		}
		list = append(list, c)
	}
	return list, closeAll, nil
}

// by is how the operations travel, for the results' names.
func (b *bench) by() string {
	if b.Unary {
		return "unary"
	}
	return "stream"
}

func (b *bench) uncontended(ctx context.Context) ([]Result, error) {
	clients, done, err := b.clients()
	if err != nil {
		return nil, err
	}
	defer done()
	r, err := b.measure(ctx, "acquire+release, "+b.by(), func(ctx context.Context, worker int) error {
		lock, err := clients[worker%len(clients)].Acquire(ctx, b.name(worker))
		if err != nil {
			return err
		}
		return lock.Release(ctx)
	})
	return []Result{r}, err
}

func (b *bench) handoff(ctx context.Context) ([]Result, error) {
	clients, done, err := b.clients()
	if err != nil {
		return nil, err
	}
	defer done()
	counts := make([]atomic.Int64, b.Workers)
	r, err := b.measure(ctx, "hand-offs, "+b.by(), func(ctx context.Context, worker int) error {
		lock, err := clients[worker%len(clients)].Acquire(ctx, b.name(-1))
		if err != nil {
			return err
		}
		counts[worker].Add(1)
		return lock.Release(ctx)
	})
	fewest, most := int64(1<<62), int64(0)
	for i := range counts {
		n := counts[i].Load()
		fewest, most = min(fewest, n), max(most, n)
	}
	if most > 0 {
		r.Fairness = float64(fewest) / float64(most)
	}
	return []Result{r}, err
}

// histogram counts microseconds up to ten minutes, to three digits.
func histogram() *hdrhistogram.Histogram { return hdrhistogram.New(1, 10*60*1e6, 3) }

func (r *Result) latencies(h *hdrhistogram.Histogram) {
	r.MeanMicros = h.Mean()
	r.P50Micros, r.P90Micros = h.ValueAtQuantile(50), h.ValueAtQuantile(90)
	r.P99Micros, r.P999Micros, r.MaxMicros = h.ValueAtQuantile(99), h.ValueAtQuantile(99.9), h.Max()
}

func record(h *hdrhistogram.Histogram, d time.Duration) { h.RecordValue(max(d.Microseconds(), 1)) }

// measure repeats op on every worker until the time is up.
func (b *bench) measure(ctx context.Context, what string, op func(ctx context.Context, worker int) error) (Result, error) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	var stop atomic.Bool
	counts := make([]counter, b.Workers)
	ended := make(chan workerEnd, b.Workers)
	before := b.server(ctx)
	begin := time.Now()
	for w := range b.Workers {
		go func() {
			h := histogram()
			var err error
			for !stop.Load() && err == nil {
				at := time.Now()
				if err = op(ctx, w); err == nil {
					record(h, time.Since(at))
					counts[w].n.Add(1)
				}
			}
			ended <- workerEnd{h, err}
		}()
	}
	total := func() (n int64) {
		for i := range counts {
			n += counts[i].n.Load()
		}
		return n
	}
	failed := b.watch(ctx, what, total, nil, ended)
	after := b.server(ctx)
	took, operations := time.Since(begin), total()
	stop.Store(true)
	all, err := histogram(), failed.err
	n := b.Workers
	if failed.h != nil {
		n--
		cancel() // the others stop at once
	}
	for range n {
		e := <-ended
		all.Merge(e.h)
		if err == nil {
			err = e.err
		}
	}
	if err == nil && operations == 0 {
		err = fmt.Errorf("no operation ended within %v", b.Duration)
	}
	r := Result{What: what, Workers: b.Workers, Connections: b.Connections}
	r.rate(operations, took)
	r.latencies(all)
	r.used(before, after)
	return r, err
}

type counter struct {
	n atomic.Int64
	_ [56]byte // a cache line each
}

type workerEnd struct {
	h   *hdrhistogram.Histogram
	err error
}

func (r *Result) rate(n int64, took time.Duration) {
	r.Operations, r.Seconds, r.PerSecond = n, took.Seconds(), float64(n)/took.Seconds()
}

// patience is how much longer than asked a measurement goes on until its first
// operation has ended.
const patience = 20 * time.Second

// watch tells the progress every second until the time is up, ctx ends, done
// is closed, or a worker has failed, which it returns.
func (b *bench) watch(ctx context.Context, what string, total func() int64, done <-chan struct{}, ended <-chan workerEnd) workerEnd {
	end := time.NewTimer(b.Duration)
	defer end.Stop()
	tick := time.NewTicker(time.Second)
	defer tick.Stop()
	begin, last := time.Now(), int64(0)
	for {
		select {
		case <-tick.C:
			n := total()
			fmt.Fprintf(b.Progress, "%-28s %4.0fs  %10d done  %9d/s\n", what, time.Since(begin).Seconds(), n, n-last)
			last = n
		case e := <-ended:
			return e
		case <-end.C:
			if total() == 0 && time.Since(begin) < b.Duration+patience { // a slow machine, a short time
				end.Reset(10 * time.Millisecond)
				continue
			}
			return workerEnd{}
		case <-done:
			return workerEnd{}
		case <-ctx.Done():
			return workerEnd{err: errors.Join(ctx.Err(), errors.New("interrupted"))}
		}
	}
}
