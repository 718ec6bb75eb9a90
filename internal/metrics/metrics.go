// Package metrics tells Prometheus how a server is. Others tell it what
// happens through small interfaces and functions of theirs; it knows none of
// them.
package metrics

import (
	"net/http"
	"net/http/pprof"
	"regexp"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
	"github.com/prometheus/client_golang/prometheus/promhttp"
)

// Status is how the node is at the moment of a scrape.
type Status struct {
	Leader                        bool
	Term, Revision, LastToken     uint64
	Leases, Locks, Holds, Waiters int
	// Pending counts the commands that wait for the next batch.
	Pending int
	// Differing counts the members whose state is not that of most voters.
	Differing int
	// FailedSnapshots counts those that could not be written.
	FailedSnapshots int
}

// Metrics are one server's. It is a lease.Observer; its methods may be called
// from any goroutine and return at once.
type Metrics struct {
	registry *prometheus.Registry
	grants   prometheus.Counter
	waits    prometheus.Histogram
	expiries prometheus.Histogram
	batches  prometheus.Histogram
	commits  prometheus.Histogram
	syncs    prometheus.Histogram
	refusals *prometheus.CounterVec
}

// New returns metrics that ask status at every scrape.
func New(version string, status func() Status) *Metrics {
	fast := prometheus.ExponentialBuckets(50e-6, 2, 16) // 50 µs to 1.6 s
	m := &Metrics{
		registry: prometheus.NewRegistry(),
		grants:   counter("grants_total", "Acquisitions granted, at once or after a wait."),
		waits:    histogram("wait_seconds", "How long grants that had to wait did.", prometheus.ExponentialBuckets(1e-3, 4, 12)),
		expiries: histogram("expiry_lag_seconds", "How long after their deadlines leases ended that nobody renewed.", prometheus.ExponentialBuckets(1e-3, 2, 14)),
		batches:  histogram("batch_commands", "Commands in one entry of the log.", prometheus.ExponentialBuckets(1, 2, 13)),
		commits:  histogram("commit_seconds", "From the proposal of a batch to its being applied.", fast),
		syncs:    histogram("fsync_seconds", "Time to write and sync entries to the log on disk.", fast),
		refusals: prometheus.NewCounterVec(prometheus.CounterOpts{Name: "distlock_refused_total", Help: "Requests refused, by reason."}, []string{"reason"}),
	}
	m.registry.MustRegister(m.grants, m.waits, m.expiries, m.batches, m.commits, m.syncs, m.refusals,
		collectors.NewGoCollector(collectors.WithGoCollectorRuntimeMetrics(collectors.GoRuntimeMetricsRule{Matcher: regexp.MustCompile("^/gc/heap/live:bytes$")})),
		collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}),
		&gauges{status: status, list: []gauge{
			{desc("leader", "1 while this node leads."), func(s *Status) float64 {
				if s.Leader {
					return 1
				}
				return 0
			}},
			{desc("term", "Term of the leadership."), func(s *Status) float64 { return float64(s.Term) }},
			{desc("revision", "Revision of the store."), func(s *Status) float64 { return float64(s.Revision) }},
			{desc("last_token", "Highest fencing token granted."), func(s *Status) float64 { return float64(s.LastToken) }},
			{desc("leases", "Live leases."), func(s *Status) float64 { return float64(s.Leases) }},
			{desc("locks", "Locks that exist: held, waited for, delayed or declared."), func(s *Status) float64 { return float64(s.Locks) }},
			{desc("holds", "Acquisitions that hold their locks."), func(s *Status) float64 { return float64(s.Holds) }},
			{desc("waiters", "Acquisitions in queues."), func(s *Status) float64 { return float64(s.Waiters) }},
			{desc("differing_members", "Members whose state is not that of most voters, as this node knows."), func(s *Status) float64 { return float64(s.Differing) }},
			{desc("failed_snapshots", "Snapshots that could not be written since the start."), func(s *Status) float64 { return float64(s.FailedSnapshots) }},
			{desc("pending_commands", "Commands that wait for the next batch."), func(s *Status) float64 { return float64(s.Pending) }},
		}},
	)
	build := prometheus.NewGaugeVec(prometheus.GaugeOpts{Name: "distlock_build_info", Help: "1, with the version."}, []string{"version"})
	build.WithLabelValues(version).Set(1)
	m.registry.MustRegister(build)
	return m
}

func counter(name, help string) prometheus.Counter {
	return prometheus.NewCounter(prometheus.CounterOpts{Name: "distlock_" + name, Help: help})
}

func histogram(name, help string, buckets []float64) prometheus.Histogram {
	return prometheus.NewHistogram(prometheus.HistogramOpts{Name: "distlock_" + name, Help: help, Buckets: buckets})
}

func desc(name, help string) *prometheus.Desc {
	return prometheus.NewDesc("distlock_"+name, help, nil, nil)
}

// gauges reads one Status for all of them.
type gauges struct {
	status func() Status
	list   []gauge
}

type gauge struct {
	desc *prometheus.Desc
	of   func(*Status) float64
}

// Describe implements prometheus.Collector.
func (g *gauges) Describe(out chan<- *prometheus.Desc) {
	for _, k := range g.list {
		out <- k.desc
	}
}

// Collect implements prometheus.Collector.
func (g *gauges) Collect(out chan<- prometheus.Metric) {
	s := g.status()
	for _, k := range g.list {
		out <- prometheus.MustNewConstMetric(k.desc, prometheus.GaugeValue, k.of(&s))
	}
}

// Granted is told of each grant, and how long it waited: 0 if it did not.
func (m *Metrics) Granted(waited time.Duration) {
	m.grants.Inc()
	if waited > 0 {
		m.waits.Observe(waited.Seconds())
	}
}

// Expired is told of each lease that ended because nobody renewed it.
func (m *Metrics) Expired(lag time.Duration) { m.expiries.Observe(lag.Seconds()) }

// Committed is told of each batch once it is applied.
func (m *Metrics) Committed(commands int, took time.Duration) {
	m.batches.Observe(float64(commands))
	m.commits.Observe(took.Seconds())
}

// Synced is told of each write to the log.
func (m *Metrics) Synced(took time.Duration) { m.syncs.Observe(took.Seconds()) }

// Refused is told of each request that is answered with an error.
func (m *Metrics) Refused(reason string) { m.refusals.WithLabelValues(reason).Inc() }

// Handler serves /metrics, and with profile Go's profiles under /debug/pprof.
func (m *Metrics) Handler(profile bool) http.Handler {
	mux := http.NewServeMux()
	mux.Handle("/metrics", promhttp.HandlerFor(m.registry, promhttp.HandlerOpts{}))
	if profile {
		mux.HandleFunc("/debug/pprof/", pprof.Index)
		mux.HandleFunc("/debug/pprof/cmdline", pprof.Cmdline)
		mux.HandleFunc("/debug/pprof/profile", pprof.Profile)
		mux.HandleFunc("/debug/pprof/symbol", pprof.Symbol)
		mux.HandleFunc("/debug/pprof/trace", pprof.Trace)
	}
	return mux
}
