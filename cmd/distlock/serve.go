package main

import (
	"fmt"
	"time"

	"github.com/spf13/cobra"
	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"

	"github.com/distlock/distlock/internal/server"
)

type serveFlags struct {
	server.Config
	runAsync    bool
	showVersion bool
	noVersion   bool
	logFormat   string
	logLevel    string
	maxWorkers  int
}

func serveCommand(use string) *cobra.Command {
	f := &serveFlags{}
	cmd := &cobra.Command{
		Use: use, Args: noArgs,
		Example: `  distlock serve --data-dir /var/lib/distlock
  distlock serve --in-memory --port 6000`,
		RunE: func(cmd *cobra.Command, _ []string) error { return f.run(cmd) },
	}
	flags := cmd.Flags()
	flags.SortFlags = false
	flags.StringVar(&f.Address, "address", "[::]", "address to listen on")
	flags.IntVar(&f.Port, "port", 50051, "port to listen on; 0 for any")
	flags.IntVar(&f.maxWorkers, "max-workers", 5, "requests worked on at once")
	flags.BoolVar(&f.runAsync, "run-async", false, "no such bound; --max-workers is ignored")
	flags.StringVar(&f.DataDir, "data-dir", "distlock-data", "directory of the log")
	flags.BoolVar(&f.InMemory, "in-memory", false, "keep nothing on disk")
	flags.DurationVar(&f.DrainTimeout, "drain-timeout", 5*time.Second, "time to finish calls when stopping")
	flags.DurationVar(&f.Bounds.MinTTL, "min-ttl", 100*time.Millisecond, "shortest TTL accepted")
	flags.DurationVar(&f.Bounds.MaxTTL, "max-ttl", 24*time.Hour, "longest TTL accepted")
	flags.IntVar(&f.Bounds.MaxLeases, "max-leases", 2_000_000, "live leases at most")
	flags.IntVar(&f.Bounds.MaxLocks, "max-locks", 2_000_000, "existing locks at most")
	flags.IntVar(&f.Bounds.MaxWaiters, "max-waiters", 1_000_000, "waiting requests at most")
	flags.StringVar(&f.logFormat, "log-format", "console", "console or json")
	flags.StringVar(&f.logLevel, "log-level", "info", "debug, info, warn or error")
	flags.BoolVar(&f.showVersion, "version", false, "print the version")
	flags.BoolVar(&f.noVersion, "no-version", false, "do not")
	return cmd
}

func (f *serveFlags) run(cmd *cobra.Command) error {
	if done, err := completionFlags(cmd); done || err != nil {
		return err
	}
	if f.showVersion && !f.noVersion {
		fmt.Fprintln(cmd.OutOrStdout(), "distlock "+versionString())
		return nil
	}
	switch {
	case f.Port < 0 || f.Port > 65535:
		return usage("--port must be from 0 to 65535, and is %d", f.Port)
	case f.maxWorkers < 1 && !f.runAsync:
		return usage("--max-workers must be at least 1, and is %d; --run-async sets no bound", f.maxWorkers)
	case f.Bounds.MinTTL <= 0 || f.Bounds.MaxTTL < f.Bounds.MinTTL:
		return usage("--min-ttl must be above 0 and at most --max-ttl, and they are %v and %v", f.Bounds.MinTTL, f.Bounds.MaxTTL)
	case f.Bounds.MaxLeases < 1 || f.Bounds.MaxLocks < 1 || f.Bounds.MaxWaiters < 1:
		return usage("--max-leases, --max-locks and --max-waiters must be at least 1")
	case f.DrainTimeout <= 0:
		return usage("--drain-timeout must be above 0, and is %v", f.DrainTimeout)
	}
	if !f.runAsync {
		f.MaxWorkers = f.maxWorkers
	}
	logger, err := newLogger(f.logFormat, f.logLevel)
	if err != nil {
		return err
	}
	defer logger.Sync()
	f.Logger, f.Version = logger, versionString()
	s, err := server.New(f.Config)
	if err != nil {
		return err
	}
	return s.Run(cmd.Context())
}

func newLogger(format, level string) (*zap.Logger, error) {
	var l zapcore.Level
	if err := l.UnmarshalText([]byte(level)); err != nil || l > zapcore.ErrorLevel {
		return nil, usage("--log-level must be debug, info, warn or error, and is %q", level)
	}
	cfg := zap.NewProductionConfig()
	cfg.Level = zap.NewAtomicLevelAt(l)
	cfg.Sampling, cfg.DisableCaller, cfg.DisableStacktrace = nil, true, true
	cfg.EncoderConfig.EncodeTime = zapcore.RFC3339TimeEncoder
	cfg.EncoderConfig.EncodeDuration = zapcore.StringDurationEncoder
	switch format {
	case "json":
	case "console":
		cfg.Encoding = "console"
		cfg.EncoderConfig.EncodeLevel = zapcore.CapitalLevelEncoder
		cfg.EncoderConfig.ConsoleSeparator = " "
	default:
		return nil, usage("--log-format must be console or json, and is %q", format)
	}
	return cfg.Build()
}
