package wire

import (
	"fmt"
	"testing"
	"time"

	"google.golang.org/grpc/encoding"
	"google.golang.org/grpc/mem"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/durationpb"

	pb "github.com/distlock/distlock/proto/distlock/v1"
)

// BenchmarkMessages is 32 acquisitions and 32 releases, and the answers to them:
// encoded by the sender and decoded by the receiver, by hand and by protobuf.
func BenchmarkMessages(b *testing.B) {
	asked, answered := &pb.MultiplexRequest{}, &pb.MultiplexResponse{}
	for i := uint64(1); i <= 32; i++ {
		asked.Operations = append(asked.Operations,
			&pb.Operation{Id: i, Call: &pb.Operation_Acquire{Acquire: &pb.AcquireRequest{
				Names: []string{fmt.Sprint("orders/", i)}, Ttl: durationpb.New(time.Minute), Owner: "host:12345", RequestId: i, Attempt: 1, WaitForever: true,
			}}},
			&pb.Operation{Id: i + 32, Call: &pb.Operation_Release{Release: &pb.ReleaseRequest{LeaseId: i, Token: i}}},
		)
		answered.Answers = append(answered.Answers,
			&pb.Answer{Id: i, Result: &pb.Answer_Acquire{Acquire: &pb.AcquireResponse{Hold: &pb.Hold{
				LeaseId: i, Token: i, Ttl: durationpb.New(time.Minute), RequestId: i, Locks: []*pb.HeldLock{{Name: fmt.Sprint("orders/", i), Floor: i}},
			}}}},
			&pb.Answer{Id: i + 32, Result: &pb.Answer_Release{Release: &pb.ReleaseResponse{}}},
		)
	}
	must := func(err error) {
		if err != nil {
			b.Fatal(err)
		}
	}
	var codec encoding.CodecV2 = Codec{Proto}
	b.Run("by=hand", func(b *testing.B) {
		b.ReportAllocs()
		var operations Operations
		for b.Loop() {
			out, err := codec.Marshal(asked)
			must(err)
			_, err = operations.Reset(out.Materialize())
			must(err)
			must(operations.Each(func(*pb.Operation) error { return nil }))
			out.Free()
			back := Buffer(4 << 10)
			for _, a := range answered.GetAnswers() {
				*back, err = AppendAnswer(*back, a)
				must(err)
			}
			in := mem.BufferSlice{mem.NewBuffer(back, mem.DefaultBufferPool())}
			must(codec.Unmarshal(in, &pb.MultiplexResponse{}))
			in.Free()
		}
	})
	b.Run("by=protobuf", func(b *testing.B) {
		b.ReportAllocs()
		for b.Loop() {
			for _, m := range []struct{ from, to proto.Message }{{asked, &pb.MultiplexRequest{}}, {answered, &pb.MultiplexResponse{}}} {
				out, err := Proto.Marshal(m.from)
				must(err)
				must(Proto.Unmarshal(out, m.to))
				out.Free()
			}
		}
	})
}
