package server

import (
	"bufio"
	"context"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/jonboulle/clockwork"
	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"
	"go.uber.org/zap/zaptest/observer"
	"golang.org/x/net/http2"
	"google.golang.org/grpc/codes"
	healthpb "google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/status"

	pb "github.com/distlock/distlock/proto/distlock/v1"
)

// TestStopKeepsEverything: a stop drains at once, waiters are sent away with
// UNAVAILABLE and find their place after the restart, in the order they had.
func TestStopKeepsEverything(t *testing.T) {
	dir := t.TempDir()
	r := start(t, durable(dir))
	g := r.acquire("a", time.Minute)
	first := &pb.AcquireRequest{Names: []string{"a"}, Ttl: span(time.Minute), Owner: "first", WaitForever: true, RequestId: 1}
	second := &pb.AcquireRequest{Names: []string{"a"}, Ttl: span(time.Minute), Owner: "second", WaitForever: true, RequestId: 2}
	waiting := []<-chan answer{r.queue(soon(t), r.locks(), first), r.queue(soon(t), r.locks(), second)}
	watching, err := r.locks().Watch(soon(t), &pb.WatchRequest{})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := watching.Recv(); err != nil {
		t.Fatal(err)
	}
	health, err := healthpb.NewHealthClient(r.conn).Watch(soon(t), &healthpb.HealthCheckRequest{})
	if err != nil {
		t.Fatal(err)
	}
	if resp, err := health.Recv(); err != nil || resp.GetStatus() != healthpb.HealthCheckResponse_SERVING {
		t.Fatal(resp, err)
	}

	began := time.Now()
	if err := r.stop(); err != nil {
		t.Fatal(err)
	}
	if took := time.Since(began); took > r.cfg.DrainTimeout {
		t.Errorf("with waiters and watchers the stop took %v", took)
	}
	for _, done := range waiting {
		refused(t, (<-done).err, codes.Unavailable, "STOPPING")
	}
	_, err = watching.Recv()
	refused(t, err, codes.Unavailable, "STOPPING")
	for { // perhaps NOT_SERVING first
		resp, err := health.Recv()
		if status.Code(err) == codes.Unavailable {
			break
		}
		if resp.GetStatus() != healthpb.HealthCheckResponse_NOT_SERVING {
			t.Fatal(resp, err)
		}
	}

	r = start(t, durable(dir))
	if !r.live("a", g.GetToken()) {
		t.Fatal("the grant is gone")
	}
	// Re-attached in the other order, served in the old one.
	again := map[string]<-chan answer{}
	for _, req := range []*pb.AcquireRequest{second, first} {
		done := make(chan answer, 1)
		go func() {
			resp, err := r.locks().Acquire(soon(t), req)
			done <- answer{resp.GetHold(), err}
		}()
		again[req.GetOwner()] = done
	}
	for _, owner := range []string{"first", "second"} {
		if _, err := r.locks().Release(soon(t), &pb.ReleaseRequest{Name: "a", Token: g.GetToken()}); err != nil {
			t.Fatal(err)
		}
		a := <-again[owner]
		if a.err != nil || a.grant.GetToken() <= g.GetToken() {
			t.Fatalf("%s after the restart: %v", owner, a)
		}
		g = a.grant
	}
}

// TestRestartGivesLeasesTheirFullTTL, or what was left of those that nobody has
// renewed for long; and then they do end.
func TestRestartGivesLeasesTheirFullTTL(t *testing.T) {
	dir := t.TempDir()
	r := start(t, durable(dir)).raised()
	old := r.acquire("old", 10*time.Second)
	r.clock.Advance(9 * time.Second)
	fresh := r.acquire("fresh", 10*time.Second)
	if err := r.stop(); err != nil {
		t.Fatal(err)
	}
	r = start(t, durable(dir))
	ends := func(name string, token uint64, after time.Duration) {
		t.Helper()
		w := r.watch(name, 0)
		r.clock.Advance(after - time.Millisecond)
		if !r.live(name, token) {
			t.Fatalf("%s ended early", name)
		}
		r.clock.Advance(11 * time.Millisecond)
		if e := w.expect(pb.Event_KIND_ENDED); e.GetCause() != pb.EndCause_END_CAUSE_EXPIRED {
			t.Errorf("%s ended as %v", name, e)
		}
	}
	ends("old", old.GetToken(), time.Second)
	ends("fresh", fresh.GetToken(), 9*time.Second-10*time.Millisecond)
}

// TestTokensRiseOverRestarts, also where nothing is kept.
func TestTokensRiseOverRestarts(t *testing.T) {
	dir := t.TempDir()
	for name, set := range map[string]func(*Config){
		"durable":   durable(dir),
		"in memory": func(c *Config) { c.Clock = clockwork.NewRealClock() },
	} {
		t.Run(name, func(t *testing.T) {
			var last uint64
			for range 3 {
				r := start(t, set)
				for range 5 {
					g := r.acquire("a", time.Minute)
					if g.GetToken() <= last || g.GetToken() >= 1<<53 {
						t.Fatalf("token %d after %d", g.GetToken(), last)
					}
					last = g.GetToken()
					if _, err := r.locks().Release(soon(t), &pb.ReleaseRequest{Name: "a", Token: last}); err != nil {
						t.Fatal(err)
					}
				}
				if err := r.stop(); err != nil {
					t.Fatal(err)
				}
			}
		})
	}
}

func TestStatusAndStartLine(t *testing.T) {
	core, logged := observer.New(zapcore.InfoLevel)
	dir := t.TempDir()
	r := start(t, durable(dir), func(c *Config) { c.Logger = zap.New(core) }).raised() // and so it has its id
	r.acquire("a", time.Minute)
	s, err := r.cluster().Status(soon(t), &pb.StatusRequest{})
	if err != nil {
		t.Fatal(err)
	}
	m := s.GetMembers()
	if s.GetVersion() != "test" || s.GetNodeId() != "n1" || s.GetLeader() != "n1" || s.GetClusterId() == "" || s.GetInMemory() ||
		s.GetLeases() != 1 || s.GetLocks() != 1 || s.GetLastToken() != 1 || len(m) != 1 || !m[0].GetLeader() || !m[0].GetHealthy() ||
		m[0].GetRole() != "voter" || m[0].GetClientAddress() != r.Addr().String() || m[0].GetAppliedIndex() == 0 {
		t.Errorf("status %v", s)
	}
	lines := logged.FilterMessage("distlock serves").All()
	if len(lines) != 1 {
		t.Fatalf("%d start lines", len(lines))
	}
	f := lines[0].ContextMap()
	if f["address"] != r.Addr().String() || f["dataDir"] != dir || f["version"] != "test" || f["durability"] == "" {
		t.Errorf("start line %v", f)
	}
}

// TestNewSaysWhatIsWrong in one line that a user can act on.
func TestNewSaysWhatIsWrong(t *testing.T) {
	dir := t.TempDir()
	r := start(t, durable(dir))
	_, taken, _ := net.SplitHostPort(r.Addr().String())
	file := filepath.Join(t.TempDir(), "file")
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	broken := t.TempDir()
	if err := os.WriteFile(filepath.Join(broken, "identity.json"), []byte("{"), 0o600); err != nil {
		t.Fatal(err)
	}
	port := r.Addr().(*net.TCPAddr).Port
	for _, c := range []struct {
		what string
		cfg  Config
		says []string
	}{
		{"port in use", Config{Address: "127.0.0.1", Port: port, InMemory: true}, []string{"127.0.0.1:" + taken, "in use", "--port"}},
		{"bad address", Config{Address: "256.0.0.1", InMemory: true}, []string{"cannot listen on 256.0.0.1:0"}},
		{"directory in use", Config{Address: "127.0.0.1", DataDir: dir}, []string{dir, "another distlock server uses it"}},
		{"directory is a file", Config{Address: "127.0.0.1", DataDir: file}, []string{file, "not a directory"}},
		{"directory under a file", Config{Address: "127.0.0.1", DataDir: filepath.Join(file, "data")}, []string{file, "not a directory"}},
		{"damaged directory", Config{Address: "127.0.0.1", DataDir: broken}, []string{"identity.json is damaged"}},
	} {
		t.Run(c.what, func(t *testing.T) {
			s, err := New(c.cfg)
			if err == nil {
				s.Close()
				t.Fatal("no error")
			}
			if strings.Contains(err.Error(), "\n") {
				t.Errorf("more than one line: %v", err)
			}
			for _, text := range c.says {
				if !strings.Contains(err.Error(), text) {
					t.Errorf("%q does not say %q", err, text)
				}
			}
		})
	}
	everywhere, err := New(Config{InMemory: true})
	if err != nil {
		t.Fatal(err)
	}
	if a := everywhere.Addr().(*net.TCPAddr); !a.IP.IsUnspecified() {
		t.Errorf("by default it listens on %v", a)
	}
	if err := everywhere.Close(); err != nil {
		t.Error(err)
	}
	// A failed start leaves neither port nor directory taken.
	again, err := New(Config{Address: "127.0.0.1", DataDir: t.TempDir()})
	if err != nil {
		t.Fatal(err)
	}
	if err := again.Close(); err != nil {
		t.Error(err)
	}
}

// TestStrangersHurtNobody: garbage, HTTP/1, and connections that say nothing
// or stop in the middle.
func TestStrangersHurtNobody(t *testing.T) {
	r := start(t)
	address := r.Addr().String()
	var idle []net.Conn
	defer func() {
		for _, c := range idle {
			c.Close()
		}
	}()
	for n := range 300 {
		conn, err := net.Dial("tcp", address)
		if err != nil {
			t.Fatal(err)
		}
		idle = append(idle, conn)
		switch n % 3 {
		case 1:
			io.WriteString(conn, http2.ClientPreface[:10])
		case 2: // the preface, and half a frame
			io.WriteString(conn, http2.ClientPreface)
			http2.NewFramer(conn, conn).WriteSettings()
			conn.Write([]byte{0, 0x40, 0})
		}
	}
	for _, garbage := range []string{
		"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
		http2.ClientPreface + strings.Repeat("\xff", 4096),
		strings.Repeat("\x00", 1<<16),
		"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", // TLS
	} {
		conn, err := net.Dial("tcp", address)
		if err != nil {
			t.Fatal(err)
		}
		io.WriteString(conn, garbage)
		conn.SetReadDeadline(time.Now().Add(20 * time.Second))
		if conn.(*net.TCPConn).CloseWrite(); garbage[0] == 'G' {
			// No HTTP/1 answer is promised, only an end.
			if resp, err := http.ReadResponse(bufio.NewReader(conn), nil); err == nil {
				resp.Body.Close()
			}
		}
		if _, err := io.Copy(io.Discard, conn); os.IsTimeout(err) {
			t.Errorf("%.20q is not cut off", garbage)
		}
		conn.Close()
	}
	for range 50 {
		g := r.acquire("a", time.Minute)
		if _, err := r.locks().Release(soon(t), &pb.ReleaseRequest{Name: "a", Token: g.GetToken()}); err != nil {
			t.Fatal(err)
		}
	}
}

// TestRunEndsWithTheLog: when the log stops under it the server says so, and
// does not hang.
func TestRunEndsWithTheLog(t *testing.T) {
	s, err := New(Config{Address: "127.0.0.1", InMemory: true})
	if err != nil {
		t.Fatal(err)
	}
	ended := make(chan error, 1)
	go func() { ended <- s.Run(context.Background()) }()
	<-s.manager.Ready()
	if err := s.log.Close(); err != nil {
		t.Fatal(err)
	}
	if err := <-ended; err == nil {
		t.Error("Run returned nil though the log was closed under it")
	}
}
