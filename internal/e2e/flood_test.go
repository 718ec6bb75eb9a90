//go:build linux

package e2e

import (
	"context"
	"fmt"
	"io"
	"math/rand/v2"
	"net/http"
	"regexp"
	"strconv"
	"sync"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/protobuf/types/known/durationpb"

	"github.com/distlock/distlock/client"
	pb "github.com/distlock/distlock/proto/distlock/v1"
)

const flooding = "flood"

// flood asks for everything faster than a log can write it: by streams and by unary
// calls, of which it hears the answers and heeds none.
func flood(address string) error {
	ctx := context.Background()
	var group sync.WaitGroup
	ttl := durationpb.New(time.Second)
	for range 4 {
		conn, err := grpc.NewClient("passthrough:///"+address, grpc.WithTransportCredentials(insecure.NewCredentials()))
		if err != nil {
			return err
		}
		for range 8 {
			group.Go(func() {
				for {
					rpc, err := pb.NewStreamServiceClient(conn).Multiplex(ctx)
					if err != nil {
						continue
					}
					go func() {
						for {
							if _, err := rpc.Recv(); err != nil {
								return
							}
						}
					}()
					for id := uint64(1); ; {
						msg := &pb.MultiplexRequest{}
						for range 200 {
							request := rand.Uint64N(1<<62) + 1
							a := &pb.AcquireRequest{Names: []string{fmt.Sprint("flood/", rand.N(1000))}, Ttl: ttl, RequestId: request, Attempt: 1, Wait: ttl}
							msg.Operations = append(msg.Operations,
								&pb.Operation{Id: id, Call: &pb.Operation_Acquire{Acquire: a}},
								&pb.Operation{Id: id + 1, Call: &pb.Operation_Grant{Grant: &pb.GrantRequest{Ttl: ttl}}},
								&pb.Operation{Id: id + 2, Call: &pb.Operation_Cancel{Cancel: &pb.CancelRequest{Id: id}}},
								&pb.Operation{Id: id + 3, Call: &pb.Operation_Abandon{Abandon: &pb.AbandonRequest{RequestId: request}}},
							)
							id += 4
						}
						if rpc.Send(msg) != nil {
							break
						}
					}
				}
			})
		}
		for range 250 {
			group.Go(func() {
				for {
					call, cancel := context.WithTimeout(ctx, time.Second)
					pb.NewLeaseServiceClient(conn).Grant(call, &pb.GrantRequest{Ttl: ttl})
					cancel()
				}
			})
		}
	}
	group.Wait()
	return nil
}

// TestAttackFlood: whoever asks for more than the log can write is refused, and a
// lease beside it is kept alive.
func TestAttackFlood(t *testing.T) {
	at := freeAddress(t)
	srv := startServer(t, "--data-dir", t.TempDir(), "--metrics-address", at)
	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Minute)
	defer cancel()
	quiet := newClient(t, srv.address)
	held, err := quiet.Acquire(ctx, "held", client.TTL(2*time.Second))
	if err != nil {
		t.Fatal(err)
	}
	grants(t, ctx, quiet)
	p50, p99 := grants(t, ctx, quiet)
	before, peak := srv.memory(), srv.peak()
	defer srv.attacked(flooding)()
	var during50, during99 time.Duration
	for until := time.Now().Add(time.Duration(*attacks) * 4 * time.Second); time.Now().Before(until); {
		during50, during99 = grants(t, ctx, quiet)
	}
	most := peak()
	t.Logf("a quiet client's grants: p50 %v and p99 %v alone, %v and %v beside a flood, of which %d were refused; the server took %d MiB and then %d",
		p50, p99, during50, during99, refusals(t, at), before>>20, most>>20)
	if err := held.Err(); err != nil {
		t.Errorf("the lease: %v", err)
	}
	if most > before+600<<20 {
		t.Errorf("the server took %d MiB, and %d before", most>>20, before>>20)
	}
}

// refusals is how many requests were refused for a bound.
func refusals(t *testing.T, metrics string) (n int) {
	t.Helper()
	r, err := http.Get("http://" + metrics + "/metrics")
	if err != nil {
		t.Fatal(err)
	}
	defer r.Body.Close()
	text, err := io.ReadAll(r.Body)
	if err != nil {
		t.Fatal(err)
	}
	for _, m := range regexp.MustCompile(`distlock_refused_total\{reason="RESOURCE_EXHAUSTED"\} (\S+)`).FindAllStringSubmatch(string(text), -1) {
		f, err := strconv.ParseFloat(m[1], 64)
		if err != nil {
			t.Fatal(err)
		}
		n += int(f)
	}
	return n
}
