package transport

import (
	"context"
	"fmt"
	"net"
	"testing"
	"time"

	"github.com/jonboulle/clockwork"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/protobuf/types/known/durationpb"

	"github.com/distlock/distlock/lease"
	pb "github.com/distlock/distlock/proto/distlock/v1"
)

// benchServer serves a manager over the memory log, without a client.
func benchServer(b *testing.B) *grpc.ClientConn {
	store := lease.NewStore(0)
	log := lease.NewMemoryLog(store)
	m, err := lease.New(lease.Config{Clock: clockwork.NewRealClock(), Log: log, Store: store})
	if err != nil {
		b.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan error, 1)
	go func() { ended <- m.Run(ctx) }()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		b.Fatal(err)
	}
	s := NewServer(Config{Manager: m, Node: func() Node { return Node{} }, MaxMessageBytes: 1 << 20})
	served := make(chan error, 1)
	go func() { served <- s.Serve(l) }()
	conn, err := grpc.NewClient("passthrough:///"+l.Addr().String(), grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() {
		conn.Close()
		stop, done := context.WithTimeout(context.Background(), time.Second)
		defer done()
		s.Stop(stop)
		<-served
		cancel()
		<-ended
		log.Close()
	})
	return conn
}

func benchAcquire(i int) *pb.AcquireRequest {
	return &pb.AcquireRequest{Names: []string{fmt.Sprintf("orders/%d", i)}, Ttl: durationpb.New(time.Minute), Owner: "host:12345", WaitForever: true}
}

// BenchmarkUnary is an acquisition and its release, one call after the other,
// client and server together.
func BenchmarkUnary(b *testing.B) {
	locks := pb.NewLockServiceClient(benchServer(b))
	ctx := context.Background()
	b.ReportAllocs()
	for b.Loop() {
		resp, err := locks.Acquire(ctx, benchAcquire(1))
		if err == nil {
			_, err = locks.Release(ctx, &pb.ReleaseRequest{LeaseId: resp.GetHold().GetLeaseId(), Token: resp.GetHold().GetToken()})
		}
		if err != nil {
			b.Fatal(err)
		}
	}
}

// BenchmarkMultiplex is an acquisition and its release, of 64 at a time on one
// stream, client and server together.
func BenchmarkMultiplex(b *testing.B) {
	s, err := pb.NewStreamServiceClient(benchServer(b)).Multiplex(context.Background())
	if err != nil {
		b.Fatal(err)
	}
	round := func(msg *pb.MultiplexRequest, answer func(*pb.Answer)) {
		if err := s.Send(msg); err != nil {
			b.Fatal(err)
		}
		for n := 0; n < len(msg.Operations); {
			in, err := s.Recv()
			if err != nil {
				b.Fatal(err)
			}
			for _, a := range in.GetAnswers() {
				if a.GetFailure() != nil {
					b.Fatal(a)
				}
				answer(a)
				n++
			}
		}
	}
	b.ReportAllocs()
	b.ResetTimer()
	for done := 0; done < b.N; done += 64 {
		acquire, release := &pb.MultiplexRequest{}, &pb.MultiplexRequest{}
		for i := range 64 {
			acquire.Operations = append(acquire.Operations, &pb.Operation{Id: uint64(i + 1), Call: &pb.Operation_Acquire{Acquire: benchAcquire(i)}})
		}
		round(acquire, func(a *pb.Answer) {
			g := a.GetAcquire().GetHold()
			release.Operations = append(release.Operations, &pb.Operation{Id: a.GetId(), Call: &pb.Operation_Release{
				Release: &pb.ReleaseRequest{LeaseId: g.GetLeaseId(), Token: g.GetToken()},
			}})
		})
		round(release, func(*pb.Answer) {})
	}
}
