package main

import (
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"os"
	"strings"
	"unicode"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"
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
	d := server.Defaults()
	f := &serveFlags{}
	cmd := &cobra.Command{
		Use: use, Args: noArgs,
		Example: `  distlock serve --data-dir /var/lib/distlock
  distlock serve --in-memory --port 6000`,
		RunE: func(cmd *cobra.Command, _ []string) error { return f.run(cmd) },
	}
	flags := cmd.Flags()
	flags.SortFlags = false
	flags.StringVar(&f.Address, "address", d.Address, "address to listen on")
	flags.IntVar(&f.Port, "port", 50051, "port to listen on; 0 for any")
	flags.IntVar(&f.MaxConnections, "max-connections", 0, "connections of clients; 0: as files allow")
	flags.IntVar(&f.MaxCalls, "max-calls", d.MaxCalls, "calls and streams at once")
	flags.IntVar(&f.maxWorkers, "max-workers", 5, "requests worked on at once")
	flags.BoolVar(&f.runAsync, "run-async", false, "no such bound; --max-workers is ignored")
	flags.StringVar(&f.DataDir, "data-dir", d.DataDir, "log directory")
	flags.Int64Var(&f.snapshotMiB, "snapshot-mib", d.SnapshotBytes>>20, "MiB of log between snapshots")
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
	flags.DurationVar(&f.ElectionTimeout, "election-timeout", d.ElectionTimeout, "silence before another leads")
	flags.DurationVar(&f.DrainTimeout, "drain-timeout", d.DrainTimeout, "time for calls when stopping")
	flags.DurationVar(&f.Bounds.MinTTL, "min-ttl", d.Bounds.MinTTL, "shortest TTL accepted")
	flags.DurationVar(&f.Bounds.MaxTTL, "max-ttl", d.Bounds.MaxTTL, "longest TTL accepted")
	flags.IntVar(&f.Bounds.MaxLeases, "max-leases", d.Bounds.MaxLeases, "live leases at most")
	flags.IntVar(&f.Bounds.MaxLocks, "max-locks", d.Bounds.MaxLocks, "existing locks at most")
	flags.IntVar(&f.Bounds.MaxWaiters, "max-waiters", d.Bounds.MaxWaiters, "waiting requests at most")
	flags.StringVar(&f.MetricsAddress, "metrics-address", "", "HOST:PORT to serve Prometheus metrics on")
	flags.BoolVar(&f.Pprof, "pprof", false, "serve Go's profiles there too")
	flags.StringVar(&f.logFormat, "log-format", "console", "console or json")
	flags.StringVar(&f.logLevel, "log-level", "info", "debug, info, warn or error")
	flags.VisitAll(func(flag *pflag.Flag) { hasVariable(flags, flag.Name) })
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
	switch err := f.zeros(cmd); {
	case f.maxWorkers < 1 && !f.runAsync:
		return usage("--max-workers must be at least 1, and is %d; --run-async sets no bound", f.maxWorkers)
	case f.snapshotMiB < 1 || f.snapshotMiB > 1<<20:
		return usage("--snapshot-mib must be at least 1, and is %d", f.snapshotMiB)
	case err != nil:
		return err
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
	var wrong *server.FieldError
	if errors.As(err, &wrong) {
		return usage("%s", wrong.Named(flagOf))
	}
	if err != nil {
		return err
	}
	go tuneGC(cmd.Context())
	return s.Run(cmd.Context())
}

// zeros refuses a zero that is given where it would mean the default.
func (f *serveFlags) zeros(cmd *cobra.Command) (err error) {
	cmd.Flags().Visit(func(flag *pflag.Flag) {
		switch value := flag.Value.String(); {
		case err != nil || value == flag.DefValue:
		case value == "0" && flag.DefValue != "0" && flag.Name != "port", value == "0s":
			err = usage("--%s must be above 0, and is %s", flag.Name, value)
		}
	})
	return err
}

// flagOf is the flag of a field of a server's Config.
func flagOf(field string) string {
	var flag strings.Builder
	for i, r := range field {
		if i > 0 && unicode.IsUpper(r) && (unicode.IsLower(rune(field[i-1])) || i+1 < len(field) && unicode.IsLower(rune(field[i+1]))) {
			flag.WriteByte('-')
		}
		flag.WriteRune(unicode.ToLower(r))
	}
	return "--" + flag.String()
}

// cluster reads the flags of a member of a cluster.
func (f *serveFlags) cluster() error {
	for _, m := range f.initialCluster {
		id, address, ok := strings.Cut(m, "=")
		if !ok {
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
