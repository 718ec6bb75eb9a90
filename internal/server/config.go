package server

import (
	"cmp"
	"crypto/tls"
	"fmt"
	"maps"
	"net"
	"slices"
	"strings"
	"time"

	"github.com/jonboulle/clockwork"
	"go.uber.org/zap"

	"github.com/distlock/distlock/lease"
)

// Config configures a Server. The zero value of a field takes its default, which
// Defaults has.
type Config struct {
	Address string // "[::]" or an IP or host name
	Port    int    // 0 takes any free port
	// Listener is used in place of Address and Port when it is set.
	Listener net.Listener

	DataDir  string
	InMemory bool // keep nothing on disk; DataDir is not used

	// SnapshotBytes is how much is written to the log between snapshots.
	SnapshotBytes int64

	// Of a member of a cluster; a server without PeerAddress is alone.
	NodeID         string            // default: the data directory's, n1 in a new one
	PeerAddress    string            // where the other members reach this one
	PeerListen     string            // where to listen for them; default PeerAddress
	InitialCluster map[string]string // peer addresses by node id, of a new cluster
	Join           string            // client address of a member of the cluster to join
	Learner        bool              // join without a vote
	// AdvertiseAddress is where clients reach this node; default: where it
	// listens or, if that is every address, at the peer address's host.
	AdvertiseAddress string
	PeerTLS          *tls.Config // default: none
	ElectionTimeout  time.Duration

	// MaxWorkers bounds the requests being worked on at once; 0 for no bound.
	MaxWorkers int
	// MaxConnections bounds the connections of clients; 0 is what the limit of
	// open files leaves.
	MaxConnections  int
	MaxCalls        int // under way, of all clients
	MaxMessageBytes int // of one request
	Bounds          lease.Bounds
	// DrainTimeout bounds how long calls under way may take to finish once
	// the server stops.
	DrainTimeout time.Duration

	Logger  *zap.Logger     // default: none
	Clock   clockwork.Clock // default: the real one
	Version string

	// MetricsAddress is where Prometheus's metrics are served (host:port);
	// default: nowhere. With Pprof, Go's profiles are served there too.
	MetricsAddress string
	Pprof          bool
}

// Defaults are the fields whose default is not their zero value.
func Defaults() Config {
	return Config{
		Address: "[::]", DataDir: "distlock-data", SnapshotBytes: 64 << 20, ElectionTimeout: 200 * time.Millisecond,
		MaxCalls: 100_000, MaxMessageBytes: 1 << 20, Bounds: lease.DefaultBounds(), DrainTimeout: 5 * time.Second,
		Logger: zap.NewNop(), Clock: clockwork.NewRealClock(),
	}
}

// FieldError says what is wrong with a Config.
type FieldError struct {
	msg string // with the names of fields in braces
}

func wrong(format string, args ...any) error { return &FieldError{fmt.Sprintf(format, args...)} }

// Error names fields as a Config does.
func (e *FieldError) Error() string { return e.Named(func(field string) string { return field }) }

// Named is the message with other names for the fields, the flags' for instance.
func (e *FieldError) Named(name func(field string) string) string {
	var out strings.Builder
	for rest := e.msg; ; {
		before, after, found := strings.Cut(rest, "{")
		out.WriteString(before)
		if !found {
			return out.String()
		}
		var field string
		field, rest, _ = strings.Cut(after, "}")
		out.WriteString(name(field))
	}
}

// normalize sets the defaults and holds every field against its rules. Error:
// *FieldError.
func (c *Config) normalize() error {
	d := Defaults()
	c.Address, c.DataDir = cmp.Or(c.Address, d.Address), cmp.Or(c.DataDir, d.DataDir)
	c.SnapshotBytes, c.ElectionTimeout = cmp.Or(c.SnapshotBytes, d.SnapshotBytes), cmp.Or(c.ElectionTimeout, d.ElectionTimeout)
	c.MaxCalls, c.MaxMessageBytes = cmp.Or(c.MaxCalls, d.MaxCalls), cmp.Or(c.MaxMessageBytes, d.MaxMessageBytes)
	c.DrainTimeout, c.Logger = cmp.Or(c.DrainTimeout, d.DrainTimeout), cmp.Or(c.Logger, d.Logger)
	if c.Clock == nil {
		c.Clock = d.Clock
	}
	for _, n := range []struct {
		field string
		value int64
	}{
		{"MaxConnections", int64(c.MaxConnections)}, {"MaxCalls", int64(c.MaxCalls)}, {"MaxWorkers", int64(c.MaxWorkers)},
		{"MaxMessageBytes", int64(c.MaxMessageBytes)}, {"SnapshotBytes", c.SnapshotBytes},
		{"MaxLeases", int64(c.Bounds.MaxLeases)}, {"MaxLocks", int64(c.Bounds.MaxLocks)}, {"MaxWaiters", int64(c.Bounds.MaxWaiters)},
		{"MaxPending", int64(c.Bounds.MaxPending)}, {"MaxNamesPerCall", int64(c.Bounds.MaxNamesPerCall)},
	} {
		if n.value < 0 {
			return wrong("{%s} must not be negative, and is %d", n.field, n.value)
		}
	}
	for _, n := range []struct {
		field string
		value time.Duration
	}{
		{"DrainTimeout", c.DrainTimeout}, {"MinTTL", c.Bounds.MinTTL}, {"MaxTTL", c.Bounds.MaxTTL}, {"MaxLockDelay", c.Bounds.MaxLockDelay},
	} {
		if n.value < 0 {
			return wrong("{%s} must not be negative, and is %v", n.field, n.value)
		}
	}
	c.Bounds = c.Bounds.WithDefaults()
	host, port, err := net.SplitHostPort(c.Address)
	switch b := c.Bounds; {
	case err == nil:
		return wrong("{Address} has no port, and is %q: give {Address} %s {Port} %s", c.Address, cmp.Or(host, "::"), port)
	case c.Port < 0 || c.Port > 65535:
		return wrong("{Port} must be from 0 to 65535, and is %d", c.Port)
	case c.MaxMessageBytes > 64<<20:
		return wrong("{MaxMessageBytes} must be at most 64 MiB, and is %d bytes", c.MaxMessageBytes)
	case b.MaxTTL < b.MinTTL:
		return wrong("{MinTTL} must be at most {MaxTTL}, and they are %v and %v", b.MinTTL, b.MaxTTL)
	case c.Pprof && c.MetricsAddress == "":
		return wrong("{Pprof} needs {MetricsAddress} HOST:PORT, where the profiles are served")
	}
	return c.normalizeMember()
}

// normalizeMember does so for what a member of a cluster is.
func (c *Config) normalizeMember() error {
	for _, a := range []struct{ field, value string }{
		{"PeerAddress", c.PeerAddress}, {"PeerListen", c.PeerListen}, {"Join", c.Join}, {"AdvertiseAddress", c.AdvertiseAddress},
	} {
		if _, _, err := net.SplitHostPort(a.value); a.value != "" && err != nil {
			return wrong("{%s} must be HOST:PORT, and is %q", a.field, a.value)
		}
	}
	for _, id := range slices.Sorted(maps.Keys(c.InitialCluster)) {
		if _, _, err := net.SplitHostPort(c.InitialCluster[id]); err != nil || id == "" {
			return wrong("{InitialCluster} must be ID=HOST:PORT,ID=HOST:PORT,..., and has %q", id+"="+c.InitialCluster[id])
		}
	}
	switch {
	case c.PeerAddress == "" && (c.InitialCluster != nil || c.Join != "" || c.PeerListen != ""):
		return wrong("a member of a cluster needs {PeerAddress} HOST:PORT, where the others reach it")
	case c.NodeID == "" && (c.InitialCluster != nil || c.Join != ""):
		return wrong("a member of a cluster needs a {NodeID}")
	case c.InitialCluster != nil && c.Join != "":
		return wrong("{InitialCluster} is for a new cluster and {Join} for one that runs; give one of them")
	case c.InitialCluster != nil && c.InitialCluster[c.NodeID] != c.PeerAddress:
		return wrong("{InitialCluster} must name this node as {NodeID} and {PeerAddress} do: %s=%s", c.NodeID, c.PeerAddress)
	case c.PeerAddress != "" && c.InMemory:
		return wrong("a member of a cluster keeps its log on disk; leave {InMemory} or {PeerAddress} out")
	case c.ElectionTimeout < 50*time.Millisecond || c.ElectionTimeout > time.Minute:
		return wrong("{ElectionTimeout} must be from 50ms to 1m, and is %v", c.ElectionTimeout)
	}
	return nil
}
