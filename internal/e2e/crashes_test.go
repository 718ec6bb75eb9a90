//go:build linux

package e2e

import (
	"context"
	"flag"
	"fmt"
	"maps"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/durationpb"

	"github.com/distlock/distlock/internal/reliability/check"
	pb "github.com/distlock/distlock/proto/distlock/v1"
)

var (
	crashes      = flag.Int("crashes", 6, "times that TestCrashes kills the server")
	firstCrashes = flag.Int("first-crashes", 1, "how many of each call TestCrashesInTheFirstStart kills at")
)

// TestCrashes kills the server under load: at random, and at the entry to its
// nth write or sync, wherever that is, and to the calls by which a snapshot
// takes its place and the one before it goes. Every restart is held against
// all that was acknowledged, and what was not is asked for again by its
// request id. Writes and syncs that fail (EIO, ENOSPC) must end the server
// before it acknowledges anything more.
func TestCrashes(t *testing.T) {
	if _, err := exec.LookPath("strace"); err != nil {
		if os.Getenv("CI") != "" {
			t.Fatal(err)
		}
		t.Skip("strace is not installed: apt-get install strace to include this one")
	}
	// Snapshots take so much load that every start would be slow with what it
	// leaves behind: they have a server of their own.
	writes, snapshots := newCrasher(t), newCrasher(t, "--snapshot-mib", "1")
	begin := time.Now()
	rng := rand.New(rand.NewPCG(uint64(time.Now().UnixNano()), 1))
	// strace counts the calls of each thread by itself, which decides how far
	// into them a kill makes sense.
	calls := []string{"pwrite64", "write", "fdatasync"}
	most := map[string]int{"pwrite64": 10, "fdatasync": 8, "write": 40}
	ofSnapshots := map[string]int{"mkdirat": 1, "fsync": 3, "renameat": 1, "unlinkat": 2}
	killed := map[string]int{}
	k := 0
	for ; k < *crashes && !spent(begin) && !t.Failed(); k++ {
		c, point := writes, ""
		switch call := calls[rng.IntN(len(calls))]; {
		case k%8 == 7:
			c = snapshots
			names := slices.Sorted(maps.Keys(ofSnapshots))
			call = names[rng.IntN(len(names))]
			point = fmt.Sprintf("%s:signal=KILL:when=%d", call, 1+rng.IntN(ofSnapshots[call]))
		case k%4 == 0: // at random
			c.srv.wrap = nil
		case k%4 == 3: // an error in place of the call
			call = []string{"pwrite64", "fdatasync"}[rng.IntN(2)]
			point = fmt.Sprintf("%s:error=%s:when=%d", call, []string{"EIO", "ENOSPC"}[rng.IntN(2)], 1+rng.IntN(most[call]))
		default:
			point = fmt.Sprintf("%s:signal=KILL:when=%d", call, 1+rng.IntN(most[call]))
		}
		if point != "" {
			name, _, _ := strings.Cut(point, ":")
			c.srv.wrap = []string{"strace", "-f", "-qq", "-o", "/dev/null", "-e", "trace=" + name, "-e", "inject=" + point}
		}
		c.srv.spawn()
		how := c.load(k, time.Duration(50+rng.IntN(250))*time.Millisecond, c == snapshots)
		if point == "" {
			how = "at random"
		} else {
			how += " " + strings.NewReplacer(":signal=KILL", "", ":error=", " that fails with ").Replace(point[:strings.LastIndexByte(point, ':')])
		}
		killed[how]++
		c.srv.wrap = nil
		c.srv.start()
		c.verify()
		c.srv.kill()
	}
	for _, c := range []*crasher{writes, snapshots} {
		c.history.End = time.Since(c.begin)
		for _, v := range check.All(c.history) {
			t.Error(v)
		}
	}
	t.Logf("%d of %d kills; %d acquisitions and %d releases acknowledged, %d unknown ones resolved by request id, %d reads compared; by kind: %v",
		k, *crashes, writes.acquired+snapshots.acquired, writes.released+snapshots.released, writes.resolved+snapshots.resolved, writes.reads+snapshots.reads, killed)
}

func newCrasher(t *testing.T, args ...string) *crasher {
	c := &crasher{t: t, begin: time.Now(), history: &check.History{}, asked: map[uint64]time.Duration{}, open: map[uint64]*pb.AcquireRequest{}}
	c.srv = &server{t: t, address: freeAddress(t), args: append([]string{"--data-dir", t.TempDir(), "--run-async"}, args...)}
	t.Cleanup(func() {
		if c.srv.cmd != nil {
			c.srv.killAll()
		}
		if t.Failed() {
			t.Logf("server log:\n%s", lastLines(c.srv.logs(), 40))
		}
	})
	return c
}

// TestCrashesInTheFirstStart kills the server at each of the calls that make
// its data directory, one after the other: what is left behind must start.
func TestCrashesInTheFirstStart(t *testing.T) {
	if _, err := exec.LookPath("strace"); err != nil {
		if os.Getenv("CI") != "" {
			t.Fatal(err)
		}
		t.Skip("strace is not installed: apt-get install strace to include this one")
	}
	killed := 0
	for _, call := range []string{"renameat", "mkdirat", "fsync", "ftruncate", "fallocate", "fdatasync", "pwrite64", "openat"} {
		for n := 1; n <= *firstCrashes; n++ {
			srv := &server{t: t, address: freeAddress(t), args: []string{"--data-dir", t.TempDir() + "/data"}}
			srv.wrap = []string{"strace", "-f", "-qq", "-o", "/dev/null", "-P", srv.args[1], "-e", "trace=" + call}
			if call == "openat" { // of the directory's files only, of which there are dozens
				n += n / 2
			} else {
				srv.wrap = append(srv.wrap[:5:5], srv.wrap[7:]...)
			}
			srv.wrap = append(srv.wrap, "-e", fmt.Sprintf("inject=%s:signal=KILL:when=%d", call, n))
			srv.spawn()
			select {
			case <-srv.exited:
				killed++
			case <-time.After(400 * time.Millisecond):
			}
			srv.killAll()
			srv.wrap = nil
			srv.start()
			ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
			if out, err := srv.command(ctx, "lock", "acquire", "a").CombinedOutput(); err != nil {
				t.Errorf("killed at %s number %d: %v\n%s", call, n, err, out)
			}
			cancel()
			srv.kill()
			if t.Failed() {
				t.Fatalf("%s\n", srv.logs())
			}
		}
	}
	t.Logf("%d first starts killed", killed)
}

// TestEveryAcknowledgementIsSynced: a kill does not lose what the kernel has;
// a power cut does. Of acquisitions made one after the other, each needs a sync
// of its own before its answer.
func TestEveryAcknowledgementIsSynced(t *testing.T) {
	if _, err := exec.LookPath("strace"); err != nil {
		if os.Getenv("CI") != "" {
			t.Fatal(err)
		}
		t.Skip("strace is not installed: apt-get install strace to include this one")
	}
	syncs := filepath.Join(t.TempDir(), "syncs")
	srv := &server{t: t, address: freeAddress(t), args: []string{"--data-dir", t.TempDir(), "--run-async"}}
	srv.wrap = []string{"strace", "-f", "-qq", "-o", syncs, "-e", "trace=fsync,fdatasync"}
	srv.start()
	defer srv.killAll()
	count := func() int {
		text, err := os.ReadFile(syncs)
		if err != nil {
			t.Fatal(err)
		}
		return strings.Count(string(text), " = 0\n") + strings.Count(string(text), " = 0 ")
	}
	ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
	defer cancel()
	conn, err := grpc.NewClient("passthrough:///"+srv.address, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	locks := pb.NewLockServiceClient(conn)
	const n = 40
	for i := range n + 1 {
		before := count()
		_, err := locks.Acquire(ctx, &pb.AcquireRequest{Names: []string{fmt.Sprint("synced/", i)}, Mode: pb.Mode_MODE_EXCLUSIVE, Ttl: durationpb.New(time.Minute)}, grpc.WaitForReady(true))
		if err != nil {
			t.Fatal(err)
		}
		if i > 0 && count() == before {
			t.Fatalf("acquisition %d was acknowledged without a sync", i)
		}
	}
}

// killAll ends the process and whoever traces it.
func (s *server) killAll() {
	if s.wrap != nil {
		syscall.Kill(-s.cmd.Process.Pid, syscall.SIGKILL)
	}
	s.cmd.Process.Kill()
	<-s.exited
}

// crasher keeps the history over all of a server's lives.
type crasher struct {
	t       *testing.T
	srv     *server
	begin   time.Time
	history *check.History

	mu                                  sync.Mutex
	asked                               map[uint64]time.Duration      // when requests were sent first
	open                                map[uint64]*pb.AcquireRequest // outcome unknown, by id
	recent                              []string
	acquired, released, resolved, reads int
}

func (c *crasher) now() time.Duration { return time.Since(c.begin) }

func (c *crasher) dial() *grpc.ClientConn { return connect(c.t, c.srv.address) }

const crashTTL = 20 * time.Minute

// load works until the server is gone, or for a while; with metadata that soon
// makes it take a snapshot, if that is wanted.
func (c *crasher) load(round int, after time.Duration, snapshots bool) (how string) {
	patience, held := 1500*time.Millisecond, 2
	var metadata map[string]string
	if snapshots {
		patience, held = 4*time.Second, 20
		metadata = map[string]string{"filler": strings.Repeat("x", 4000)}
	}
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	var group sync.WaitGroup
	for worker := range 4 {
		group.Go(func() {
			conn := c.dial()
			defer conn.Close()
			locks := pb.NewLockServiceClient(conn)
			for i := 0; ctx.Err() == nil; i++ {
				name := fmt.Sprintf("crash/%d/%d/%d", round, worker, i)
				id := uint64(round+1)<<32 | uint64(worker)<<24 | uint64(i+1)
				req := &pb.AcquireRequest{Names: []string{name}, Mode: pb.Mode_MODE_EXCLUSIVE, Ttl: durationpb.New(crashTTL), RequestId: id, Owner: "crash", Metadata: metadata}
				g, err := c.acquire(ctx, locks, req)
				if err != nil {
					if i == 0 && ctx.Err() == nil { // not up yet
						i--
						time.Sleep(5 * time.Millisecond)
						continue
					}
					return
				}
				if i%held != 1 {
					if err := c.release(ctx, locks, g); err != nil {
						return
					}
				}
			}
		})
	}
	began := time.Now()
	select {
	case <-c.srv.exited:
		how = "at its"
	case <-time.After(after):
		if c.srv.wrap == nil {
			break
		}
		// Its injection may still be ahead, or behind in a start that it cut.
		select {
		case <-c.srv.exited:
			how = "at its"
		case <-time.After(max(0, patience-time.Since(began))):
			how = "at random, before its"
		}
	}
	c.srv.killAll() // before the calls are given up: the server must not hear of it
	cancel()
	group.Wait()
	return how
}

// acquire makes one attempt and records what it learns.
func (c *crasher) acquire(ctx context.Context, locks pb.LockServiceClient, req *pb.AcquireRequest) (*pb.Hold, error) {
	c.mu.Lock()
	sent, again := c.asked[req.RequestId]
	if !again {
		sent = c.now()
		c.asked[req.RequestId] = sent
	}
	c.mu.Unlock()
	resp, err := locks.Acquire(ctx, req)
	c.mu.Lock()
	defer c.mu.Unlock()
	if err != nil {
		c.open[req.RequestId] = req
		return nil, err
	}
	delete(c.open, req.RequestId)
	c.acquired++
	c.recent = append(c.recent, req.Names[0])
	g := resp.GetHold()
	c.history.Add(check.Event{At: c.now(), Kind: check.Acquired, Request: req.RequestId, Token: g.GetToken(), Lease: g.GetLeaseId(), Locks: req.Names, Sent: sent, TTL: crashTTL})
	return g, nil
}

func (c *crasher) release(ctx context.Context, locks pb.LockServiceClient, g *pb.Hold) error {
	c.history.Add(check.Event{At: c.now(), Kind: check.Releasing, Token: g.GetToken()})
	_, err := locks.Release(ctx, &pb.ReleaseRequest{LeaseId: g.GetLeaseId(), Name: g.GetLocks()[0].GetName(), Token: g.GetToken()})
	if err != nil {
		return err
	}
	c.history.Add(check.Event{At: c.now(), Kind: check.Released, Token: g.GetToken()})
	c.mu.Lock()
	c.released++
	c.mu.Unlock()
	return nil
}

// verify asks again for what is unknown, twice, and reads every lock that was
// acknowledged since the last time.
func (c *crasher) verify() {
	ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
	defer cancel()
	conn := c.dial()
	defer conn.Close()
	locks := pb.NewLockServiceClient(conn)
	open := c.open
	c.open = map[uint64]*pb.AcquireRequest{}
	// The first connection may still reach the process that was killed.
	answered := func(call func() error) (err error) {
		for ctx.Err() == nil {
			if err = call(); status.Code(err) != codes.Unavailable {
				return err
			}
			time.Sleep(10 * time.Millisecond)
		}
		return err
	}
	for _, req := range open {
		for range 2 {
			if err := answered(func() error {
				_, err := c.acquire(ctx, locks, req)
				return err
			}); err != nil {
				c.t.Errorf("request %d, asked again: %v", req.RequestId, err)
				return
			}
		}
		c.resolved++
	}
	for _, name := range c.recent {
		sent := c.now()
		var resp *pb.GetResponse
		if err := answered(func() (err error) {
			resp, err = locks.Get(ctx, &pb.GetRequest{Name: name})
			return err
		}); err != nil {
			c.t.Errorf("get %s: %v", name, err)
			return
		}
		e := check.Event{At: c.now(), Kind: check.Read, Locks: []string{name}, Sent: sent}
		for _, h := range resp.GetLock().GetHolders() {
			e.Holders = append(e.Holders, h.GetToken())
		}
		c.history.Add(e)
		c.reads++
	}
	// Some of the old ones are read again after every restart.
	rand.Shuffle(len(c.recent), func(i, j int) { c.recent[i], c.recent[j] = c.recent[j], c.recent[i] })
	c.recent = c.recent[:min(len(c.recent), 40)]
}
