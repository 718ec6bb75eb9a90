//go:build linux

package e2e

import (
	"bufio"
	"context"
	"flag"
	"fmt"
	"os"
	"os/exec"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/net/http2"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/durationpb"

	"github.com/distlock/distlock/client"
	"github.com/distlock/distlock/internal/http2test"
	pb "github.com/distlock/distlock/proto/distlock/v1"
)

var quietly = flag.Int("quiet", 300, "grants that TestHostileClients and TestStrangers measure, alone and among others")

// hostileEnv makes the test's binary a process of hostile clients.
const hostileEnv = "DISTLOCK_E2E_HOSTILE"

// TestHostileClients has watchers that never read, callers that flood the
// server beyond its limits, giant requests and broken frames, all at once,
// beside a client that minds its own business: it is served, and the server's
// memory has a bound. The hostile ones are a process that gets what processor
// time the others leave: on a network they would have processors of their own.
func TestHostileClients(t *testing.T) {
	srv := startServer(t, "--in-memory", "--run-async", "--max-waiters", "2000", "--max-leases", "20000")
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	quiet, err := client.New([]string{srv.address})
	if err != nil {
		t.Fatal(err)
	}
	defer quiet.Close()
	measure := func() (p50, p99 time.Duration) { return grants(t, ctx, quiet) }
	measure()
	p50, p99 := measure()

	cmd := idly(hostileEnv, srv.address)
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	stop := sync.OnceFunc(func() {
		cmd.Process.Kill()
		cmd.Wait()
	})
	defer stop()
	// It says how many it was refused, again and again.
	var exhausted, giants, broken atomic.Int64
	ready, ended := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(ended)
		begun := false
		for lines := bufio.NewScanner(out); lines.Scan(); {
			var e, g, b int64
			fmt.Sscan(lines.Text(), &e, &g, &b)
			exhausted.Store(e)
			giants.Store(g)
			broken.Store(b)
			if !begun && e >= 100 && g >= 10 && b >= 10 {
				begun = true
				close(ready)
			}
		}
	}()
	select {
	case <-ready:
	case <-ended:
	case <-ctx.Done():
	}
	e, g, b, began := exhausted.Load(), giants.Load(), broken.Load(), time.Now()
	if e < 100 || g < 10 || b < 10 {
		t.Fatalf("%d were told that a limit is reached, %d giants were answered, %d connections sent broken frames", e, g, b)
	}
	during50, during99 := measure()
	e, g, b = exhausted.Load()-e, giants.Load()-g, broken.Load()-b
	memory := srv.memory()
	t.Logf("a quiet client's grants: p50 %v and p99 %v alone, %v and %v among hostile ones: %.1fx and %.1fx; "+
		"meanwhile %d calls were refused by a limit, %d giants, and %d connections sent broken frames, within %v; the server took %d MiB",
		p50, p99, during50, during99, float64(during50)/float64(p50), float64(during99)/float64(p99),
		e, g, b, time.Since(began).Round(time.Millisecond), memory>>20)
	if memory > 600<<20 {
		t.Errorf("the server took %d MiB", memory>>20)
	}
	stop()
	if info, err := quiet.Get(ctx, "quiet"); err != nil || len(info.Holders) != 0 {
		t.Errorf("%+v %v", info, err)
	}
}

// idly prepares the test's binary as another process, which gets what processor time
// the others leave.
func idly(env string, args ...string) *exec.Cmd {
	command := append([]string{os.Args[0]}, args...)
	if _, err := exec.LookPath("chrt"); err == nil { // of util-linux
		command = append([]string{"chrt", "--idle", "0"}, command...)
	}
	cmd := exec.Command(command[0], command[1:]...)
	cmd.Env = append(os.Environ(), env+"=1")
	cmd.Stderr = os.Stderr
	return cmd
}

// grants measures a client that takes a lock and gives it back, again and again.
func grants(t *testing.T, ctx context.Context, c *client.Client) (p50, p99 time.Duration) {
	t.Helper()
	var took []time.Duration
	for range *quietly {
		began := time.Now()
		lock, err := c.TryAcquire(ctx, "quiet", client.TTL(10*time.Second)) // of waiting places there may be none
		if err != nil {
			t.Fatalf("the quiet client: %v", err)
		}
		took = append(took, time.Since(began))
		if err := lock.Release(ctx); err != nil {
			t.Fatalf("the quiet client: %v", err)
		}
	}
	slices.Sort(took)
	return took[len(took)/2], took[len(took)*99/100]
}

// hostile does all that at once, and prints every 10 ms how many calls were
// refused by a limit, how many giants, and how many connections it has sent
// broken frames on. It ends by being killed.
func hostile(address string) error {
	ctx := context.Background()
	dial := func() pb.LockServiceClient {
		conn, err := grpc.NewClient("passthrough:///"+address, grpc.WithTransportCredentials(insecure.NewCredentials()),
			grpc.WithDefaultCallOptions(grpc.MaxCallSendMsgSize(64<<20)))
		if err != nil {
			panic(err)
		}
		return pb.NewLockServiceClient(conn)
	}
	// Watchers that never read: their windows fill up.
	for range 50 {
		if _, err := dial().Watch(ctx, &pb.WatchRequest{}); err != nil {
			return err
		}
	}
	var exhausted, giants, broken atomic.Int64
	// Floods: waits beyond the limit on waiters, grants beyond that on leases.
	metadata := map[string]string{"filler": strings.Repeat("x", 3000)}
	for n := range 8 {
		conn, first := dial(), uint64(time.Now().UnixNano())>>8<<8
		var next atomic.Uint64
		for range 400 {
			go func() {
				for {
					_, err := conn.Acquire(ctx, &pb.AcquireRequest{
						Names: []string{fmt.Sprintf("flood/%d", n%2)}, Mode: pb.Mode_MODE_EXCLUSIVE, Ttl: durationpb.New(time.Minute),
						WaitForever: true, RequestId: (first+uint64(n))<<24&(1<<62-1) | next.Add(1), Metadata: metadata,
					})
					if status.Code(err) == codes.ResourceExhausted {
						exhausted.Add(1)
						time.Sleep(500 * time.Millisecond)
					}
				}
			}()
		}
	}
	// Giants, refused by their size.
	wrong := make(chan error, 1)
	go func() {
		conn, giant := dial(), strings.Repeat("n", 8<<20)
		for {
			_, err := conn.Acquire(ctx, &pb.AcquireRequest{Names: []string{giant}, Ttl: durationpb.New(time.Second)})
			if code := status.Code(err); code != codes.InvalidArgument && code != codes.ResourceExhausted {
				wrong <- fmt.Errorf("a giant was answered %w", err)
			}
			giants.Add(1)
			time.Sleep(5 * time.Millisecond)
		}
	}()
	// Broken frames, and streams that begin and never end.
	go func() {
		for {
			brokenFrames(address)
			broken.Add(1)
			time.Sleep(2 * time.Millisecond)
		}
	}()
	for {
		select {
		case err := <-wrong:
			return err
		case <-time.After(10 * time.Millisecond):
			fmt.Println(exhausted.Load(), giants.Load(), broken.Load())
		}
	}
}

// brokenFrames speaks HTTP/2 up to a point.
func brokenFrames(address string) {
	f, err := http2test.Open(address)
	if err != nil {
		return
	}
	defer f.Close()
	f.SetDeadline(time.Now().Add(time.Second))
	for range 10 {
		id, _ := f.Begin(pb.LockService_Acquire_FullMethodName)
		f.WriteData(id, false, []byte{0, 0, 0, 0, 200, 1, 2, 3}) // promises 200 bytes
		f.WriteData(id, id%4 == 1, []byte{9, 0xff, 0xff, 0xff, 0xff})
	}
	f.WriteRawFrame(http2.FrameType(0xee), 0xff, 0, make([]byte, 100))
	f.WriteRawFrame(http2.FrameHeaders, 0, 1<<30+1, []byte{0xff, 0xff, 0xff})
	f.Read(make([]byte, 4096))
}
