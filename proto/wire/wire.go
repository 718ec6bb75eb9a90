// Package wire encodes and decodes the messages of a stream by hand where
// protobuf's reflection and its allocations are most of what an operation
// costs: acquisitions, releases and their answers. Everything else, and what
// is written in an unusual way, it leaves to protobuf; the bytes and the
// messages are the same either way.
package wire

import (
	"unicode/utf8"

	"google.golang.org/grpc/encoding"
	_ "google.golang.org/grpc/encoding/proto" // the codec of that name
	"google.golang.org/grpc/mem"
	"google.golang.org/protobuf/encoding/protowire"
	"google.golang.org/protobuf/proto"

	pb "github.com/distlock/distlock/proto/distlock/v1"
)

// Proto is gRPC's own codec for protobuf.
var Proto = encoding.GetCodecV2("proto")

// Codec is Proto, but for the messages of a client's stream.
type Codec struct{ encoding.CodecV2 }

// Marshal implements encoding.CodecV2.
func (c Codec) Marshal(v any) (mem.BufferSlice, error) {
	msg, ok := v.(*pb.MultiplexRequest)
	if !ok {
		return c.CodecV2.Marshal(v)
	}
	out := Buffer(64 * len(msg.GetOperations()))
	for _, op := range msg.GetOperations() {
		var err error
		if *out, err = AppendOperation(*out, op); err != nil {
			return nil, err
		}
	}
	return Slice(out), nil
}

// Unmarshal implements encoding.CodecV2.
func (c Codec) Unmarshal(data mem.BufferSlice, v any) error {
	msg, ok := v.(*pb.MultiplexResponse)
	if !ok {
		return c.CodecV2.Unmarshal(data, v)
	}
	buf := data.MaterializeToBuffer(mem.DefaultBufferPool())
	defer buf.Free()
	return unmarshalResponse(buf.ReadOnlyData(), msg)
}

// Buffer returns an empty buffer for about n bytes, for Slice.
func Buffer(n int) *[]byte {
	buf := mem.DefaultBufferPool().Get(n)
	*buf = (*buf)[:0]
	return buf
}

// Slice gives a buffer to gRPC, which puts it back.
func Slice(buf *[]byte) mem.BufferSlice {
	return mem.BufferSlice{mem.NewBuffer(buf, mem.DefaultBufferPool())}
}

// The numbers of the fields below are those of the .proto files.

func appendUint(b []byte, field protowire.Number, v uint64) []byte {
	if v == 0 {
		return b
	}
	return protowire.AppendVarint(protowire.AppendTag(b, field, protowire.VarintType), v)
}

func appendString(b []byte, field protowire.Number, v string) []byte {
	if v == "" {
		return b
	}
	return protowire.AppendString(protowire.AppendTag(b, field, protowire.BytesType), v)
}

// nest makes what has been appended from at on a message in a field.
func nest(b []byte, at int, field protowire.Number) []byte {
	size := len(b) - at
	head := protowire.SizeTag(field) + protowire.SizeVarint(uint64(size))
	var room [2 * 10]byte
	b = append(b, room[:head]...)
	copy(b[at+head:], b[at:at+size])
	protowire.AppendVarint(protowire.AppendTag(b[:at], field, protowire.BytesType), uint64(size))
	return b
}

// appendSpan appends a Duration or a Timestamp.
func appendSpan(b []byte, field protowire.Number, s interface {
	GetSeconds() int64
	GetNanos() int32
}) []byte {
	at := len(b)
	b = appendUint(b, 1, uint64(s.GetSeconds()))
	b = appendUint(b, 2, uint64(s.GetNanos()))
	return nest(b, at, field)
}

// appendMessage has protobuf append a message in a field.
func appendMessage(b []byte, field protowire.Number, m proto.Message) ([]byte, error) {
	at := len(b)
	b, err := proto.MarshalOptions{}.MarshalAppend(b, m)
	if err != nil {
		return nil, err
	}
	return nest(b, at, field), nil
}

// AppendOperation appends one operation of a MultiplexRequest, which must have
// no unknown fields: one that was made, not decoded. Error: protobuf's, for
// text that is not UTF-8.
func AppendOperation(b []byte, op *pb.Operation) ([]byte, error) {
	at := len(b)
	b = appendUint(b, 1, op.GetId())
	inner := len(b)
	switch call := op.GetCall().(type) {
	case *pb.Operation_Acquire:
		if r := call.Acquire; len(r.GetMetadata()) == 0 && isText(r.GetNames()...) && isText(r.GetOwner(), r.GetActor()) {
			return nest(nest(appendAcquire(b, r), inner, 2), at, 1), nil
		}
	case *pb.Operation_Release:
		if r := call.Release; isText(r.GetName()) {
			b = appendUint(b, 1, r.GetToken())
			b = appendUint(b, 2, r.GetLeaseId())
			b = appendString(b, 3, r.GetName())
			b = appendUint(b, 4, r.GetRequestId())
			return nest(nest(b, inner, 3), at, 1), nil
		}
	}
	return appendMessage(b[:at], 1, op)
}

func isText(list ...string) bool {
	for _, s := range list {
		if !utf8.ValidString(s) {
			return false
		}
	}
	return true
}

func appendAcquire(b []byte, r *pb.AcquireRequest) []byte {
	for _, name := range r.GetNames() {
		b = protowire.AppendString(protowire.AppendTag(b, 1, protowire.BytesType), name)
	}
	b = appendUint(b, 2, uint64(r.GetMode()))
	b = appendUint(b, 3, uint64(r.GetLimit()))
	b = appendUint(b, 4, r.GetLeaseId())
	if r.GetTtl() != nil {
		b = appendSpan(b, 5, r.GetTtl())
	}
	b = appendString(b, 6, r.GetOwner())
	if r.GetWait() != nil {
		b = appendSpan(b, 7, r.GetWait())
	}
	b = appendUint(b, 8, protowire.EncodeBool(r.GetWaitForever()))
	if r.GetLockDelay() != nil {
		b = appendSpan(b, 9, r.GetLockDelay())
	}
	b = appendUint(b, 10, r.GetRequestId())
	b = appendUint(b, 11, r.GetLowestOpenRequestId())
	b = appendString(b, 12, r.GetActor())
	return appendUint(b, 14, uint64(r.GetAttempt()))
}

// AppendAnswer appends one answer of a MultiplexResponse, as AppendOperation
// does an operation.
func AppendAnswer(b []byte, a *pb.Answer) ([]byte, error) {
	at := len(b)
	b = appendUint(b, 1, a.GetId())
	inner := len(b)
	switch r := a.GetResult().(type) {
	case *pb.Answer_Acquire:
		g := r.Acquire.GetHold()
		if g == nil || !lockNames(g) {
			break
		}
		return nest(nest(nest(appendGrant(b, g), inner, 1), inner, 3), at, 1), nil
	case *pb.Answer_Release:
		return nest(nest(b, inner, 4), at, 1), nil
	}
	return appendMessage(b[:at], 1, a)
}

func lockNames(g *pb.Hold) bool {
	for _, k := range g.GetLocks() {
		if k == nil || !utf8.ValidString(k.GetName()) {
			return false
		}
	}
	return true
}

func appendGrant(b []byte, g *pb.Hold) []byte {
	b = appendUint(b, 1, g.GetToken())
	b = appendUint(b, 2, g.GetLeaseId())
	if g.GetTtl() != nil {
		b = appendSpan(b, 3, g.GetTtl())
	}
	b = appendUint(b, 4, uint64(g.GetMode()))
	for _, k := range g.GetLocks() {
		at := len(b)
		b = appendString(b, 1, k.GetName())
		b = appendUint(b, 2, k.GetFloor())
		b = nest(b, at, 5)
	}
	b = appendUint(b, 6, g.GetRequestId())
	if g.GetGrantedAt() != nil {
		b = appendSpan(b, 7, g.GetGrantedAt())
	}
	return b
}

// AppendCluster appends the id of the cluster to a MultiplexResponse.
func AppendCluster(b []byte, id string) []byte { return appendString(b, 3, id) }

// AppendLoss appends one loss of a MultiplexResponse.
func AppendLoss(b []byte, l *pb.Loss) ([]byte, error) { return appendMessage(b, 2, l) }
