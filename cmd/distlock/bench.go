package main

import (
	"context"
	"fmt"
	"io"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/spf13/cobra"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/health"
	healthpb "google.golang.org/grpc/health/grpc_health_v1"
	"net"

	"github.com/distlock/distlock/client"
)

type benchFlags struct {
	workers     int
	connections int
	duration    time.Duration
	kind        string
}

type benchResult struct {
	Kind       string  `json:"kind"`
	Workers    int     `json:"workers"`
	Operations int64   `json:"operations"`
	PerSecond  float64 `json:"perSecond"`
	P50        string  `json:"p50"`
	P99        string  `json:"p99"`
	Max        string  `json:"max"`
	// OfEcho is PerSecond as a ratio to that of a bare gRPC echo in this
	// process, measured in the same run.
	OfEcho float64 `json:"ofEcho,omitempty"`
}

func benchCommand() *cobra.Command {
	r, f := &remote{}, &benchFlags{}
	cmd := &cobra.Command{
		Use: "bench", Short: "Measure a server under load", Args: noArgs,
		Long: `Measure a server under load, beside a bare gRPC echo in this process.

  uncontended  each worker acquires and releases a lock of its own
  contended    all workers acquire and release one lock`,
		Example: `  distlock bench --workers 64 --duration 10s`,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if f.workers < 1 || f.connections < 1 || f.duration <= 0 {
				return usage("--workers and --connections must be at least 1, --duration above 0")
			}
			if f.kind != "uncontended" && f.kind != "contended" {
				return usage("--kind must be uncontended or contended, and is %q", f.kind)
			}
			results, err := f.run(cmd.Context(), r, cmd.ErrOrStderr())
			if err != nil {
				return err
			}
			return r.print(cmd.OutOrStdout(), map[string]any{"results": results}, func(w io.Writer) {
				var rows [][]string
				for _, b := range results {
					ratio := "-"
					if b.OfEcho > 0 {
						ratio = fmt.Sprintf("%.2fx", b.OfEcho)
					}
					rows = append(rows, []string{b.Kind, fmt.Sprint(b.Workers), fmt.Sprintf("%.0f", b.PerSecond), ratio, b.P50, b.P99, b.Max})
				}
				columns(w, make([]int, 7), []string{"WHAT", "WORKERS", "PER SECOND", "OF ECHO", "P50", "P99", "MAX"}, rows)
			})
		},
	}
	cmd.Flags().IntVar(&f.workers, "workers", 64, "workers")
	cmd.Flags().IntVar(&f.connections, "connections", 4, "connections they share")
	cmd.Flags().DurationVar(&f.duration, "duration", 5*time.Second, "time for each measurement")
	cmd.Flags().StringVar(&f.kind, "kind", "uncontended", "uncontended or contended")
	return r.addOutput(cmd)
}

func (f *benchFlags) run(ctx context.Context, r *remote, progress io.Writer) ([]benchResult, error) {
	var clients []*client.Client
	for range f.connections {
		c, err := r.dial()
		if err != nil {
			return nil, err
		}
		defer c.Close()
		clients = append(clients, c)
	}
	if _, err := clients[0].Status(ctx); err != nil { // before the load: is it there?
		return nil, err
	}
	fmt.Fprintf(progress, "echo for %v...\n", f.duration)
	echo, err := f.echo(ctx)
	if err != nil {
		return nil, err
	}
	fmt.Fprintf(progress, "%s for %v...\n", f.kind, f.duration)
	run := time.Now().UnixNano()
	locks, err := f.measure(ctx, f.kind+" pairs", func(ctx context.Context, worker int) error {
		name := fmt.Sprintf("bench/%d", run)
		if f.kind == "uncontended" {
			name = fmt.Sprintf("bench/%d/%d", run, worker)
		}
		lock, err := clients[worker%len(clients)].Acquire(ctx, name)
		if err != nil {
			return err
		}
		return lock.Release(ctx)
	})
	if err != nil {
		return nil, err
	}
	locks.OfEcho = locks.PerSecond / echo.PerSecond
	return []benchResult{echo, locks}, nil
}

// echo measures a bare gRPC call, the health service's, in this process.
func (f *benchFlags) echo(ctx context.Context) (benchResult, error) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return benchResult{}, err
	}
	s := grpc.NewServer()
	healthpb.RegisterHealthServer(s, health.NewServer())
	go s.Serve(l)
	defer s.Stop()
	var conns []healthpb.HealthClient
	for range f.connections {
		conn, err := grpc.NewClient(l.Addr().String(), grpc.WithTransportCredentials(insecure.NewCredentials()))
		if err != nil {
			return benchResult{}, err
		}
		defer conn.Close()
		conns = append(conns, healthpb.NewHealthClient(conn))
	}
	return f.measure(ctx, "bare gRPC echo", func(ctx context.Context, worker int) error {
		_, err := conns[worker%len(conns)].Check(ctx, &healthpb.HealthCheckRequest{})
		return err
	})
}

// measure repeats op on every worker until the time is up.
func (f *benchFlags) measure(ctx context.Context, kind string, op func(ctx context.Context, worker int) error) (benchResult, error) {
	var stop atomic.Bool
	times := make([][]time.Duration, f.workers)
	errs := make(chan error, f.workers)
	var group sync.WaitGroup
	begin := time.Now()
	for w := range f.workers {
		group.Add(1)
		go func() {
			defer group.Done()
			for !stop.Load() {
				at := time.Now()
				if err := op(ctx, w); err != nil {
					stop.Store(true)
					errs <- err
					return
				}
				times[w] = append(times[w], time.Since(at))
			}
		}()
	}
	select {
	case <-time.After(f.duration):
	case <-ctx.Done():
	}
	stop.Store(true)
	group.Wait()
	took := time.Since(begin)
	select {
	case err := <-errs:
		return benchResult{}, err
	default:
	}
	all := slices.Concat(times...)
	slices.Sort(all)
	if len(all) == 0 {
		return benchResult{}, fmt.Errorf("no operation ended within %v", f.duration)
	}
	at := func(q float64) string { return all[int(q*float64(len(all)-1))].Round(time.Microsecond).String() }
	return benchResult{
		Kind: kind, Workers: f.workers, Operations: int64(len(all)), PerSecond: float64(len(all)) / took.Seconds(),
		P50: at(0.5), P99: at(0.99), Max: at(1),
	}, nil
}
