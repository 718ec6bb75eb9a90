package main

import (
	"cmp"
	"crypto/tls"
	"crypto/x509"
	"fmt"
	"net"
	"os"
	"strings"
	"syscall"
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
	snapshotMiB int64
	logFormat   string
	logLevel    string
	maxWorkers  int

	initialCluster            []string
	peerCert, peerKey, peerCA string
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
	flags.IntVar(&f.MaxConnections, "max-connections", 0, "connections of clients; 0: as files allow")
	flags.IntVar(&f.MaxCalls, "max-calls", 100_000, "calls and streams at once")
	flags.IntVar(&f.maxWorkers, "max-workers", 5, "requests worked on at once")
	flags.BoolVar(&f.runAsync, "run-async", false, "no such bound; --max-workers is ignored")
	flags.StringVar(&f.DataDir, "data-dir", "distlock-data", "log directory")
	flags.Int64Var(&f.snapshotMiB, "snapshot-mib", 64, "MiB of log between snapshots")
	flags.BoolVar(&f.InMemory, "in-memory", false, "keep nothing on disk")
	flags.StringVar(&f.NodeID, "node-id", "", "name of this member (default n1)")
	flags.StringVar(&f.PeerAddress, "peer-address", "", "other members reach this one at `ADDR`")
	flags.StringVar(&f.PeerListen, "peer-listen", "", "listen for them on `ADDR` instead")
	flags.StringSliceVar(&f.initialCluster, "initial-cluster", nil, "a new cluster's `ID=ADDR`,... of peers")
	flags.StringVar(&f.Join, "join", "", "join the cluster with a member at `ADDR`")
	flags.BoolVar(&f.Learner, "learner", false, "join without a vote")
	flags.StringVar(&f.AdvertiseAddress, "advertise-address", "", "clients reach this node at `ADDR`")
	flags.StringVar(&f.peerCert, "peer-cert", "", "certificate `FILE` for other members")
	flags.StringVar(&f.peerKey, "peer-key", "", "its key `FILE`")
	flags.StringVar(&f.peerCA, "peer-ca", "", "`FILE` of the members' authority")
	flags.DurationVar(&f.ElectionTimeout, "election-timeout", 200*time.Millisecond, "silence before another leads")
	flags.DurationVar(&f.DrainTimeout, "drain-timeout", 5*time.Second, "time for calls when stopping")
	flags.DurationVar(&f.Bounds.MinTTL, "min-ttl", 100*time.Millisecond, "shortest TTL accepted")
	flags.DurationVar(&f.Bounds.MaxTTL, "max-ttl", 24*time.Hour, "longest TTL accepted")
	flags.IntVar(&f.Bounds.MaxLeases, "max-leases", 2_000_000, "live leases at most")
	flags.IntVar(&f.Bounds.MaxLocks, "max-locks", 2_000_000, "existing locks at most")
	flags.IntVar(&f.Bounds.MaxWaiters, "max-waiters", 1_000_000, "waiting requests at most")
	flags.StringVar(&f.MetricsAddress, "metrics-address", "", "HOST:PORT to serve Prometheus metrics on")
	flags.BoolVar(&f.Pprof, "pprof", false, "serve Go's profiles there too")
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
	host, port, err := net.SplitHostPort(f.Address)
	switch {
	case err == nil:
		return usage("--address has no port, and is %q: give --address %s --port %s", f.Address, cmp.Or(host, "::"), port)
	case f.Port < 0 || f.Port > 65535:
		return usage("--port must be from 0 to 65535, and is %d", f.Port)
	case f.MaxConnections < 0:
		return usage("--max-connections must not be negative, and is %d", f.MaxConnections)
	case f.MaxCalls < 1:
		return usage("--max-calls must be at least 1, and is %d", f.MaxCalls)
	case f.maxWorkers < 1 && !f.runAsync:
		return usage("--max-workers must be at least 1, and is %d; --run-async sets no bound", f.maxWorkers)
	case f.Bounds.MinTTL <= 0 || f.Bounds.MaxTTL < f.Bounds.MinTTL:
		return usage("--min-ttl must be above 0 and at most --max-ttl, and they are %v and %v", f.Bounds.MinTTL, f.Bounds.MaxTTL)
	case f.Bounds.MaxLeases < 1 || f.Bounds.MaxLocks < 1 || f.Bounds.MaxWaiters < 1:
		return usage("--max-leases, --max-locks and --max-waiters must be at least 1")
	case f.snapshotMiB < 1 || f.snapshotMiB > 1<<20:
		return usage("--snapshot-mib must be at least 1, and is %d", f.snapshotMiB)
	case f.Pprof && f.MetricsAddress == "":
		return usage("--pprof needs --metrics-address HOST:PORT, where the profiles are served")
	case f.DrainTimeout <= 0:
		return usage("--drain-timeout must be above 0, and is %v", f.DrainTimeout)
	}
	f.SnapshotBytes = f.snapshotMiB << 20
	if !f.runAsync {
		f.MaxWorkers = f.maxWorkers
	}
	if err := f.cluster(); err != nil {
		return err
	}
	logger, err := newLogger(f.logFormat, f.logLevel)
	if err != nil {
		return err
	}
	defer logger.Sync()
	f.Logger, f.Version = logger, versionString()
	private()
	s, err := server.New(f.Config)
	if err != nil {
		return err
	}
	go tuneGC(cmd.Context())
	return s.Run(cmd.Context())
}

// cluster reads the flags of a member of a cluster.
func (f *serveFlags) cluster() error {
	for _, a := range []struct{ flag, value string }{
		{"peer-address", f.PeerAddress}, {"peer-listen", f.PeerListen}, {"join", f.Join}, {"advertise-address", f.AdvertiseAddress},
	} {
		if _, _, err := net.SplitHostPort(a.value); a.value != "" && err != nil {
			return usage("--%s must be HOST:PORT, and is %q", a.flag, a.value)
		}
	}
	for _, m := range f.initialCluster {
		id, address, ok := strings.Cut(m, "=")
		if _, _, err := net.SplitHostPort(address); !ok || id == "" || err != nil {
			return usage("--initial-cluster must be ID=HOST:PORT,ID=HOST:PORT,..., and has %q", m)
		}
		if f.InitialCluster == nil {
			f.InitialCluster = make(map[string]string)
		}
		if f.InitialCluster[id] != "" {
			return usage("--initial-cluster names %s twice", id)
		}
		f.InitialCluster[id] = address
	}
	switch {
	case f.PeerAddress == "" && (f.InitialCluster != nil || f.Join != "" || f.PeerListen != ""):
		return usage("a member of a cluster needs --peer-address HOST:PORT, where the others reach it")
	case f.NodeID == "" && (f.InitialCluster != nil || f.Join != ""):
		return usage("a member of a cluster needs a --node-id")
	case f.InitialCluster != nil && f.Join != "":
		return usage("--initial-cluster is for a new cluster and --join for one that runs; give one of them")
	case f.InitialCluster != nil && f.InitialCluster[f.NodeID] != f.PeerAddress:
		return usage("--initial-cluster must name this node as --node-id and --peer-address do: %s=%s", f.NodeID, f.PeerAddress)
	case f.PeerAddress != "" && f.InMemory:
		return usage("a member of a cluster keeps its log on disk; leave --in-memory or --peer-address out")
	case f.ElectionTimeout < 50*time.Millisecond || f.ElectionTimeout > time.Minute:
		return usage("--election-timeout must be from 50ms to 1m, and is %v", f.ElectionTimeout)
	case f.peerCert == "" && f.peerKey == "" && f.peerCA == "":
		return nil
	case f.peerCert == "" || f.peerKey == "" || f.peerCA == "":
		return usage("--peer-cert, --peer-key and --peer-ca belong together")
	}
	pair, err := tls.LoadX509KeyPair(f.peerCert, f.peerKey)
	if err != nil {
		return fmt.Errorf("--peer-cert %s and --peer-key %s: %w", f.peerCert, f.peerKey, err)
	}
	text, err := os.ReadFile(f.peerCA)
	if err != nil {
		return fmt.Errorf("--peer-ca: %w", err)
	}
	roots := x509.NewCertPool()
	if !roots.AppendCertsFromPEM(text) {
		return fmt.Errorf("--peer-ca %s has no certificate in PEM", f.peerCA)
	}
	f.PeerTLS = &tls.Config{Certificates: []tls.Certificate{pair}, RootCAs: roots, MinVersion: tls.VersionTLS13}
	return nil
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

// private makes every file that this process makes the owner's alone: a data
// directory holds the names of everything that is locked, and by whom.
func private() { syscall.Umask(0o077) }
