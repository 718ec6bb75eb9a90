package main

import (
	"fmt"
	"io"
	"os"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/distlock/distlock/internal/bench"
)

func benchCommand() *cobra.Command {
	r, f := &remote{}, &bench.Config{}
	stream, noEcho := true, false
	cmd := &cobra.Command{
		Use: "bench [MODE]", Short: "Measure a server under load",
		Args: func(cmd *cobra.Command, args []string) error {
			if len(args) > 1 {
				return usage("bench takes one mode, and was given %d", len(args))
			}
			return nil
		},
		Example: `  distlock bench --workers 64 --duration 10s
  distlock bench uncontended --pipeline 4096 --metrics http://localhost:9090/metrics
  distlock bench handoff --workers 32
  distlock bench keepalive --leases 100000 -o json`,
		RunE: func(cmd *cobra.Command, args []string) error {
			f.Mode = bench.Uncontended
			if len(args) == 1 {
				f.Mode = args[0]
			}
			if !slices.ContainsFunc(bench.Modes, func(m [2]string) bool { return m[0] == f.Mode }) {
				return usage("there is no mode %q; see distlock bench --help", f.Mode)
			}
			switch {
			case f.Workers < 1 || f.Connections < 1 || f.Leases < 1:
				return usage("--workers, --connections and --leases must be at least 1")
			case f.Duration <= 0 || f.TTL <= 0 || f.Every <= 0:
				return usage("--duration, --ttl and --every must be above 0")
			case f.Pipeline < 0 || f.Pipeline > 0 && (f.Mode != bench.Uncontended || f.Unary):
				return usage("--pipeline is for the mode uncontended on streams")
			case len(r.endpoints) != 1:
				return usage("--endpoints must name the one server to measure")
			case f.Unary && cmd.Flags().Changed("stream") && stream:
				return usage("--unary and --stream exclude each other")
			}
			f.Unary = f.Unary || !stream
			if _, err := r.dial(); err != nil { // the flags are right?
				return err
			}
			f.Endpoint, f.Progress = r.endpoints[0], cmd.ErrOrStderr()
			if self, err := os.Executable(); err == nil && !noEcho {
				f.Echo = []string{self, "bench", "echo-server"}
			}
			results, err := bench.Run(cmd.Context(), *f)
			if err != nil {
				return err
			}
			return r.print(cmd.OutOrStdout(), map[string]any{"results": results}, func(w io.Writer) { benchTable(w, results) })
		},
	}
	var long strings.Builder
	fmt.Fprint(&long, "Measure a server under load, beside a pair of bare gRPC echoes to a process\nthat does nothing else, in one of these modes (the first unless another is\nnamed):\n\n")
	for _, m := range bench.Modes {
		fmt.Fprintf(&long, "  %-12s %s\n", m[0], m[1])
	}
	cmd.Long = strings.TrimRight(long.String(), "\n")
	flags := cmd.Flags()
	flags.IntVar(&f.Workers, "workers", 64, "workers, each with one operation at a time")
	flags.IntVar(&f.Connections, "connections", 4, "connections they share")
	flags.IntVar(&f.Pipeline, "pipeline", 0, "this many operations outstanding instead of workers")
	flags.BoolVar(&f.Unary, "unary", false, "each operation is a call of its own")
	flags.BoolVar(&stream, "stream", true, "operations share a stream per connection")
	flags.DurationVar(&f.Duration, "duration", 5*time.Second, "time for each measurement")
	flags.IntVar(&f.Leases, "leases", 10_000, "leases, for keepalive and expiry")
	flags.DurationVar(&f.TTL, "ttl", 30*time.Second, "TTL of the leases kept alive")
	flags.DurationVar(&f.Every, "every", 20*time.Second, "time between a lease's renewals")
	flags.BoolVar(&noEcho, "no-echo", false, "leave out the echo")
	flags.StringVar(&f.Metrics, "metrics", "", "URL of the server's metrics, for its CPU and memory")
	cmd.AddCommand(&cobra.Command{
		Use: "echo-server", Hidden: true, Args: noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error { return bench.ServeEcho(cmd.Context(), cmd.OutOrStdout()) },
	})
	return r.addOutput(cmd)
}

func benchTable(w io.Writer, results []bench.Result) {
	ratio := func(x float64) string {
		if x == 0 {
			return "-"
		}
		return fmt.Sprintf("%.2fx", x)
	}
	micros := func(us int64) string { return (time.Duration(us) * time.Microsecond).String() }
	var rows [][]string
	var notes []string
	for _, b := range results {
		rows = append(rows, []string{
			b.What, fmt.Sprintf("%.0f", b.PerSecond), ratio(b.OfEcho), micros(b.P50Micros), micros(b.P99Micros), micros(b.MaxMicros),
		})
		if b.ServerCPUSeconds > 0 {
			notes = append(notes, fmt.Sprintf("%s: server CPU %.1f µs each, resident %d MiB, heap %d MiB", b.What,
				b.ServerMicrosPerOperation, b.ServerResidentBytes>>20, b.ServerHeapBytes>>20))
		}
		if b.ServerHeapBytesPerLease > 0 {
			notes = append(notes, fmt.Sprintf("%s: %.0f bytes of the server's heap each", b.What, b.ServerHeapBytesPerLease))
		}
		if b.Fairness > 0 {
			notes = append(notes, fmt.Sprintf("%s: the fewest of a worker are %.2f of the most", b.What, b.Fairness))
		}
		if b.Early > 0 {
			notes = append(notes, fmt.Sprintf("%s: %d ended EARLY", b.What, b.Early))
		}
	}
	columns(w, make([]int, 6), []string{"WHAT", "PER SECOND", "OF ECHO", "P50", "P99", "MAX"}, rows)
	for _, n := range notes {
		fmt.Fprintln(w, n)
	}
}
