package e2e

import (
	"bytes"
	"context"
	"fmt"
	"net"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/net/http2"
	"golang.org/x/net/http2/hpack"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/durationpb"

	"github.com/distlock/distlock/client"
	pb "github.com/distlock/distlock/proto/distlock/v1"
)

// TestHostileClients has watchers that never read, callers that flood the
// server beyond its limits, giant requests and broken frames, all at once,
// beside a client that minds its own business: it is served, and the server's
// memory has a bound.
func TestHostileClients(t *testing.T) {
	srv := startServer(t, "--in-memory", "--run-async", "--max-waiters", "2000", "--max-leases", "20000")
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	quiet, err := client.New([]string{srv.address})
	if err != nil {
		t.Fatal(err)
	}
	defer quiet.Close()
	measure := func(n int) (p99 time.Duration) {
		var took []time.Duration
		for range n {
			began := time.Now()
			lock, err := quiet.TryAcquire(ctx, "quiet", client.TTL(10*time.Second)) // of waiting places there may be none
			if err != nil {
				t.Fatalf("the quiet client: %v", err)
			}
			took = append(took, time.Since(began))
			if err := lock.Release(ctx); err != nil {
				t.Fatalf("the quiet client: %v", err)
			}
		}
		slices.Sort(took)
		return took[len(took)*99/100]
	}
	before := measure(300)

	hostile, stop := context.WithCancel(ctx)
	var group sync.WaitGroup
	defer group.Wait()
	defer stop()
	dial := func() *grpc.ClientConn {
		conn, err := grpc.NewClient("passthrough:///"+srv.address, grpc.WithTransportCredentials(insecure.NewCredentials()),
			grpc.WithDefaultCallOptions(grpc.MaxCallSendMsgSize(64<<20)))
		if err != nil {
			t.Fatal(err)
		}
		return conn
	}
	// Watchers that never read: their windows fill up.
	for range 50 {
		conn := dial()
		defer conn.Close()
		if _, err := pb.NewLockServiceClient(conn).Watch(hostile, &pb.WatchRequest{}); err != nil {
			t.Fatal(err)
		}
	}
	// Floods: waits beyond the limit on waiters, grants beyond that on leases.
	exhausted := make(chan struct{}, 1<<16)
	metadata := map[string]string{"filler": strings.Repeat("x", 3000)}
	for n := range 8 {
		conn := dial()
		defer conn.Close()
		slots := make(chan struct{}, 400)
		group.Go(func() {
			for i := 0; hostile.Err() == nil; i++ {
				slots <- struct{}{}
				group.Go(func() {
					defer func() { <-slots }()
					_, err := pb.NewLockServiceClient(conn).Acquire(hostile, &pb.AcquireRequest{
						Names: []string{fmt.Sprintf("flood/%d", n%2)}, Mode: pb.Mode_MODE_EXCLUSIVE, Ttl: durationpb.New(time.Minute),
						WaitForever: true, RequestId: uint64(n)<<40 | uint64(i+1), Metadata: metadata,
					})
					if status.Code(err) == codes.ResourceExhausted {
						select {
						case exhausted <- struct{}{}:
						default:
						}
						time.Sleep(500 * time.Millisecond) // they share our processors
					}
				})
			}
		})
	}
	// Giants, refused by their size.
	giants := make(chan codes.Code, 1<<16)
	group.Go(func() {
		conn := dial()
		defer conn.Close()
		for hostile.Err() == nil {
			_, err := pb.NewLockServiceClient(conn).Acquire(hostile, &pb.AcquireRequest{Names: []string{strings.Repeat("n", 8<<20)}, Ttl: durationpb.New(time.Second)})
			select {
			case giants <- status.Code(err):
			default:
			}
			time.Sleep(5 * time.Millisecond)
		}
	})
	// Broken frames, and streams that begin and never end.
	group.Go(func() {
		for hostile.Err() == nil {
			brokenFrames(srv.address)
			time.Sleep(2 * time.Millisecond)
		}
	})
	for len(exhausted) < 100 || len(giants) < 10 {
		if ctx.Err() != nil {
			t.Fatalf("%d were told that a limit is reached, %d giants were answered", len(exhausted), len(giants))
		}
		time.Sleep(5 * time.Millisecond)
	}
	during := measure(300)
	memory := srv.memory()
	t.Logf("a quiet client's p99: %v alone, %v among hostile ones; %d refused by a limit, %d giants; the server took %d MiB",
		before, during, len(exhausted), len(giants), memory>>20)
	if memory > 600<<20 {
		t.Errorf("the server took %d MiB", memory>>20)
	}
	for len(giants) > 0 {
		if code := <-giants; code != codes.InvalidArgument && code != codes.ResourceExhausted && code != codes.Canceled {
			t.Fatalf("a giant was answered %v", code)
		}
	}
	stop()
	group.Wait()
	if info, err := quiet.Get(ctx, "quiet"); err != nil || len(info.Holders) != 0 {
		t.Errorf("%+v %v", info, err)
	}
}

// brokenFrames speaks HTTP/2 up to a point.
func brokenFrames(address string) {
	conn, err := net.DialTimeout("tcp", address, time.Second)
	if err != nil {
		return
	}
	defer conn.Close()
	conn.SetDeadline(time.Now().Add(time.Second))
	conn.Write([]byte(http2.ClientPreface))
	f := http2.NewFramer(conn, conn)
	f.WriteSettings()
	var head bytes.Buffer
	enc := hpack.NewEncoder(&head)
	for _, h := range [][2]string{
		{":method", "POST"}, {":scheme", "http"}, {":path", "/distlock.v1.LockService/Acquire"}, {":authority", "x"},
		{"content-type", "application/grpc"}, {"te", "trailers"},
	} {
		enc.WriteField(hpack.HeaderField{Name: h[0], Value: h[1]})
	}
	for id := uint32(1); id < 20; id += 2 {
		f.WriteHeaders(http2.HeadersFrameParam{StreamID: id, BlockFragment: head.Bytes(), EndHeaders: true})
		f.WriteData(id, false, []byte{0, 0, 0, 0, 200, 1, 2, 3}) // promises 200 bytes
		f.WriteData(id, id%4 == 1, []byte{9, 0xff, 0xff, 0xff, 0xff})
	}
	f.WriteRawFrame(http2.FrameType(0xee), 0xff, 0, make([]byte, 100))
	f.WriteRawFrame(http2.FrameHeaders, 0, 1<<30+1, []byte{0xff, 0xff, 0xff})
	conn.Read(make([]byte, 4096))
}
