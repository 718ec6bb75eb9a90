package e2e

import (
	"context"
	"flag"
	"fmt"
	"math/rand/v2"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
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
	quiet, err := client.New([]string{srv.address})
	if err != nil {
		t.Fatal(err)
	}
	defer quiet.Close()
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
	conn, err := grpc.NewClient("passthrough:///"+srv.address, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
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
	var follower *member
	for _, m := range g.members {
		if m != leader {
			follower = m
		}
	}
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
				_, err := leases.KeepAlive(ctx, &pb.KeepAliveRequest{LeaseIds: []uint64{held.GetGrant().GetLeaseId()}})
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
