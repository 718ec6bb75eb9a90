//go:build linux

package e2e

import (
	"context"
	"flag"
	"fmt"
	"math/rand/v2"
	"net"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/durationpb"

	"github.com/distlock/distlock/client"
	"github.com/distlock/distlock/internal/http2test"
	pb "github.com/distlock/distlock/proto/distlock/v1"
)

// What one peer can do to the others: each test attacks a server in one way, and
// logs what that does to its memory and to a client that minds its own business.
// docs/reliability.md has the table.
var (
	against = flag.String("against", "", "attack this binary rather than the one that is built, to see what an earlier build did")
	attacks = flag.Int("attacks", 1, "attackers, in multiples of what CI sends")
)

// newClient is a client that lasts as long as the test.
func newClient(t *testing.T, addresses ...string) *client.Client {
	t.Helper()
	c, err := client.New(addresses)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	return c
}

// lists has a server keep locks whose list takes about 1 MiB.
func lists(t *testing.T, ctx context.Context, c *client.Client) {
	t.Helper()
	pad := map[string]string{"pad": strings.Repeat("x", 4000)}
	for i := range 250 {
		if _, err := c.TryAcquire(ctx, fmt.Sprint("listed/", i), client.TTL(time.Hour), client.NoRenew(), client.Metadata(pad)); err != nil {
			t.Fatal(err)
		}
	}
}

// peak samples a server's memory until stopped, and returns the most.
func (s *server) peak() (stop func() int) {
	end, ended := make(chan struct{}), make(chan int)
	go func() {
		most := 0
		for {
			most = max(most, s.memory())
			select {
			case <-end:
				ended <- most
				return
			case <-time.After(10 * time.Millisecond):
			}
		}
	}()
	return func() int { close(end); return <-ended }
}

// TestAttackUnread: connections ask for much and read nothing: lists, watches of
// locks that change all the time, and streams.
func TestAttackUnread(t *testing.T) {
	srv := startServer(t, "--in-memory")
	ctx, cancel := context.WithTimeout(context.Background(), 2*time.Minute)
	defer cancel()
	quiet := newClient(t, srv.address)
	lists(t, ctx, quiet)
	grants(t, ctx, quiet)
	p50, p99 := grants(t, ctx, quiet)
	before, peak := srv.memory(), srv.peak()
	lazy := func() *http2test.Conn { return http2test.Dial(t, srv.address, http2test.Lazy()) }
	for range *attacks {
		c := lazy()
		for range 3000 {
			c.Call(pb.LockService_List_FullMethodName, &pb.ListRequest{PageSize: 1000})
		}
		c = lazy()
		for range 3000 {
			c.Call(pb.LockService_Watch_FullMethodName, &pb.WatchRequest{Prefix: "quiet"})
		}
		c = lazy()
		for range 1000 {
			var ops []*pb.Operation
			for i := range 50 {
				ops = append(ops, &pb.Operation{Id: uint64(i + 1), Call: &pb.Operation_Release{Release: &pb.ReleaseRequest{Name: strings.Repeat("n", 100)}}})
			}
			c.Call(pb.StreamService_Multiplex_FullMethodName, &pb.MultiplexRequest{Operations: ops})
		}
	}
	during50, during99 := grants(t, ctx, quiet)
	conn := srv.dial()
	var listed atomic.Int64
	for range 20 {
		began := time.Now()
		call, cancel := context.WithTimeout(ctx, 20*time.Second)
		if _, err := pb.NewLockServiceClient(conn).List(call, &pb.ListRequest{PageSize: 1000}); err != nil {
			t.Errorf("another client's list: %v", err)
		}
		cancel()
		listed.Add(int64(time.Since(began)))
	}
	most := peak()
	t.Logf("a quiet client's grants: p50 %v and p99 %v alone, %v and %v beside answers that nobody reads; its lists take %v; the server took %d MiB and then %d",
		p50, p99, during50, during99, time.Duration(listed.Load()/20).Round(time.Millisecond), before>>20, most>>20)
	if most > before+400<<20 {
		t.Errorf("the server took %d MiB, and %d before", most>>20, before>>20)
	}
}

// TestAttackForwarding: waits that a follower forwards, as many as connections can
// carry and more, hold up nobody else there.
func TestAttackForwarding(t *testing.T) {
	g := startGroup(t, 3)
	leader := g.leader()
	g.settled(leader, 3)
	follower := g.follower(leader)
	ctx, cancel := context.WithTimeout(context.Background(), 2*time.Minute)
	defer cancel()
	quiet := follower.dial()
	locks, leases := pb.NewLockServiceClient(quiet), pb.NewLeaseServiceClient(quiet)
	held, err := locks.Acquire(ctx, &pb.AcquireRequest{Names: []string{"hot"}, Ttl: durationpb.New(time.Hour)})
	if err != nil {
		t.Fatal(err)
	}
	var refused atomic.Int64
	var group sync.WaitGroup
	defer group.Wait()
	flood, end := context.WithCancel(ctx)
	defer end()
	for range 2 * *attacks {
		c := pb.NewLockServiceClient(follower.dial())
		for range 6000 {
			group.Go(func() {
				for flood.Err() == nil {
					_, err := c.Acquire(flood, &pb.AcquireRequest{Names: []string{"hot"}, Ttl: durationpb.New(time.Minute), WaitForever: true})
					if status.Code(err) != codes.ResourceExhausted {
						return
					}
					refused.Add(1)
					select {
					case <-flood.Done():
					case <-time.After(time.Second):
					}
				}
			})
		}
	}
	waitFor(t, ctx, func() bool {
		r, err := pb.NewLockServiceClient(leader.dial()).Get(ctx, &pb.GetRequest{Name: "hot"})
		return err == nil && r.GetLock().GetWaiterCount() >= 7000 && (refused.Load() > 0 || *against != "")
	})
	slowest := make(map[string]time.Duration)
	for range 100 {
		for what, call := range map[string]func(context.Context) error{
			"KeepAlive": func(ctx context.Context) error {
				_, err := leases.KeepAlive(ctx, &pb.KeepAliveRequest{LeaseIds: []uint64{held.GetHold().GetLeaseId()}})
				return err
			},
			"Grant": func(ctx context.Context) error {
				_, err := leases.Grant(ctx, &pb.GrantRequest{Ttl: durationpb.New(time.Minute)})
				return err
			},
			"Get": func(ctx context.Context) error {
				_, err := locks.Get(ctx, &pb.GetRequest{Name: "hot"})
				return err
			},
			"TryAcquire": func(ctx context.Context) error {
				_, err := locks.Acquire(ctx, &pb.AcquireRequest{Names: []string{fmt.Sprint("own/", rand.Uint64())}, Ttl: durationpb.New(time.Minute)})
				return err
			},
		} {
			bounded, cancel := context.WithTimeout(ctx, 5*time.Second)
			began := time.Now()
			if err := call(bounded); err != nil {
				t.Fatalf("%s through the follower: %v", what, err)
			}
			slowest[what] = max(slowest[what], time.Since(began).Round(time.Microsecond))
			cancel()
		}
	}
	t.Logf("the slowest of 100 beside forwarded waits: %v; %d waits were refused", slowest, refused.Load())
}

// TestAttackBackups: backups that nobody reads keep everything as it was when they
// began; there are but a few at once, and those are cut.
func TestAttackBackups(t *testing.T) {
	srv := startServer(t, "--data-dir", t.TempDir())
	ctx, cancel := context.WithTimeout(context.Background(), 2*time.Minute)
	defer cancel()
	quiet := newClient(t, srv.address)
	lists(t, ctx, quiet)
	grants(t, ctx, quiet)
	p50, p99 := grants(t, ctx, quiet)
	before, peak := srv.memory(), srv.peak()
	for range 10 * *attacks {
		c := http2test.Dial(t, srv.address, http2test.Lazy())
		for range 100 {
			c.Call(pb.ClusterService_Backup_FullMethodName, &pb.BackupRequest{})
		}
		// What it keeps is not what is now.
		for i := range 250 {
			lock, err := quiet.TryAcquire(ctx, fmt.Sprint("churn/", i), client.TTL(time.Hour))
			if err != nil {
				t.Fatal(err)
			}
			if err := lock.Release(ctx); err != nil {
				t.Fatal(err)
			}
		}
	}
	during50, during99 := grants(t, ctx, quiet)
	most := peak()
	t.Logf("a quiet client's grants: p50 %v and p99 %v alone, %v and %v beside backups that nobody reads; the server took %d MiB and then %d",
		p50, p99, during50, during99, before>>20, most>>20)
	conn := srv.dial()
	b, err := pb.NewClusterServiceClient(conn).Backup(ctx, &pb.BackupRequest{})
	if err == nil {
		_, err = b.Recv()
	}
	if status.Code(err) != codes.ResourceExhausted && *against == "" {
		t.Errorf("one more: %v", err)
	}
	if most > before+200<<20 {
		t.Errorf("the server took %d MiB, and %d before", most>>20, before>>20)
	}
}

// TestAttackSlowMember: a follower that is stopped keeps what it lacks on the
// leader's disk, not in its memory, and costs others nothing.
func TestAttackSlowMember(t *testing.T) {
	g := startGroup(t, 3)
	leader := g.leader()
	g.settled(leader, 3)
	follower := g.follower(leader)
	ctx, cancel := context.WithTimeout(context.Background(), 2*time.Minute)
	defer cancel()
	quiet := newClient(t, leader.address)
	pad := client.Metadata(map[string]string{"pad": strings.Repeat("x", 4000)})
	load := func() {
		var group sync.WaitGroup
		defer group.Wait()
		for w := range 32 {
			group.Go(func() {
				for i := range 100 * *attacks {
					lock, err := quiet.TryAcquire(ctx, fmt.Sprint("load/", w, "/", i), client.TTL(time.Minute), pad)
					if err == nil {
						err = lock.Release(ctx)
					}
					if err != nil {
						t.Error(err)
						return
					}
				}
			})
		}
	}
	load()
	grants(t, ctx, quiet)
	p50, p99 := grants(t, ctx, quiet)
	before := leader.memory()
	follower.signal(syscall.SIGSTOP)
	peak := leader.peak()
	load()
	during50, during99 := grants(t, ctx, quiet)
	most := peak()
	follower.signal(syscall.SIGCONT)
	g.settled(leader, 3)
	t.Logf("a quiet client's grants: p50 %v and p99 %v with all members, %v and %v with one that is stopped; the leader took %d MiB and then %d",
		p50, p99, during50, during99, before>>20, most>>20)
	if most > before+200<<20 {
		t.Errorf("the leader took %d MiB, and %d before", most>>20, before>>20)
	}
}

// TestAttackPeerPort: whoever connects to the peer ports and says nothing keeps no
// member out: one that starts again is back, another leads when the leader dies, and
// a lease goes on. Over mutual TLS, for a handshake is dearer than a greeting.
func TestAttackPeerPort(t *testing.T) {
	g := startSecureGroup(t)
	var addresses []string
	for _, m := range g.members {
		addresses = append(addresses, m.address)
	}
	leader := g.leader()
	g.settled(leader, 3)
	ctx, cancel := context.WithTimeout(context.Background(), 2*time.Minute)
	defer cancel()
	quiet := newClient(t, addresses...)
	held, err := quiet.Acquire(ctx, "held", client.TTL(10*time.Second))
	if err != nil {
		t.Fatal(err)
	}
	idle := 1000 * *attacks
	raiseFiles(t, uint64(3*idle+1000))
	var group sync.WaitGroup
	defer group.Wait()
	attack, end := context.WithCancel(ctx)
	defer end()
	var open, made atomic.Int64
	for _, m := range g.members {
		for range idle {
			group.Go(func() { // it comes back when it is closed
				for attack.Err() == nil {
					if conn, err := net.Dial("tcp", m.peer); err == nil {
						open.Add(1)
						made.Add(1)
						stop := context.AfterFunc(attack, func() { conn.Close() })
						conn.Read(make([]byte, 1))
						stop()
						conn.Close()
						open.Add(-1)
					}
					select {
					case <-attack.Done():
					case <-time.After(time.Second):
					}
				}
			})
		}
	}
	waitFor(t, ctx, func() bool { return made.Load() >= int64(3*idle) })
	follower := g.follower(leader)
	follower.kill()
	began := time.Now()
	follower.start()
	g.settled(leader, 3)
	back := time.Since(began)
	began = time.Now()
	leader.kill()
	g.leader(leader)
	elected := time.Since(began)
	leader.start()
	if err := held.Err(); err != nil {
		t.Errorf("the lease: %v", err)
	}
	t.Logf("%d idle connections to each peer port, %d made: a member that starts again is back after %v, another leads after %v (election timeout %v)",
		idle, made.Load(), back.Round(time.Millisecond), elected.Round(time.Millisecond), *election)
}

// TestAttackWatches: watches of other locks cost who works on his own nothing.
func TestAttackWatches(t *testing.T) {
	srv := startServer(t, "--in-memory")
	ctx, cancel := context.WithTimeout(context.Background(), 2*time.Minute)
	defer cancel()
	quiet := newClient(t, srv.address)
	cycles := func() (n int) {
		var group sync.WaitGroup
		var count atomic.Int64
		for until, w := time.Now().Add(2*time.Second), 0; w < 16; w++ {
			group.Go(func() {
				for time.Now().Before(until) {
					lock, err := quiet.TryAcquire(ctx, fmt.Sprint("own/", w), client.TTL(time.Minute))
					if err == nil {
						err = lock.Release(ctx)
					}
					if err != nil {
						t.Error(err)
						return
					}
					count.Add(1)
				}
			})
		}
		group.Wait()
		return int(count.Load())
	}
	cycles()
	alone := cycles()
	conn := srv.dial()
	watch, end := context.WithCancel(ctx)
	defer end()
	const watches = 9990
	for i := range watches {
		w, err := pb.NewLockServiceClient(conn).Watch(watch, &pb.WatchRequest{Prefix: fmt.Sprint("other/", i)})
		if err == nil {
			_, err = w.Recv()
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	t.Logf("lock cycles of 16 workers in 2s: %d alone, %d beside %d silent watches", alone, cycles(), watches)
}
