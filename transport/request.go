package transport

import (
	"context"
	"fmt"
	"slices"
	"unicode/utf8"

	"google.golang.org/grpc"
	"google.golang.org/grpc/encoding"
	"google.golang.org/grpc/mem"
	"google.golang.org/protobuf/encoding/protowire"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"

	"github.com/distlock/distlock/lease"
)

// gRPC answers a request that it cannot decode with INTERNAL, before any
// interceptor. Ours are INVALID_ARGUMENT and name the field: the codec puts
// the error beside the message instead of failing, and the handler's decoding
// function takes it from there.

// envelope carries a message to the codec and an error back.
type envelope struct {
	msg any
	err error
}

// codec is gRPC's own for protobuf, for requests of at most max bytes.
type codec struct {
	encoding.CodecV2
	max int
}

// encoded is a message in its bytes: one to decode by whoever receives it, who
// uses the array again, or one that has been encoded in a wire.Buffer.
type encoded struct{ bytes *[]byte }

// Marshal implements encoding.CodecV2.
func (c codec) Marshal(v any) (mem.BufferSlice, error) {
	if a, ok := v.(outgoing); ok {
		return a.bytes, nil
	}
	return c.CodecV2.Marshal(v)
}

// Unmarshal implements encoding.CodecV2.
func (c codec) Unmarshal(data mem.BufferSlice, v any) error {
	e, ok := v.(*envelope)
	if !ok {
		return c.CodecV2.Unmarshal(data, v)
	}
	if n := data.Len(); n > c.max {
		e.err = &lease.InvalidError{Field: "request", Msg: fmt.Sprintf("must be at most %d bytes, and is %d", c.max, n)}
	} else if to, ok := e.msg.(encoded); ok {
		*to.bytes = slices.Grow((*to.bytes)[:0], n)[:n]
		data.CopyTo(*to.bytes)
	} else if c.CodecV2.Unmarshal(data, e.msg) != nil {
		e.err = undecodable(e.msg, data.Materialize())
	}
	return nil
}

// undecodable says why bytes are not the message.
func undecodable(msg any, data []byte) error {
	if m, ok := msg.(proto.Message); ok {
		if field := brokenText(m.ProtoReflect().Descriptor(), data); field != "" {
			return &lease.InvalidError{Field: field, Msg: "must be valid UTF-8"}
		}
	}
	return &lease.InvalidError{Field: "request", Msg: "is not a message of this method"}
}

// brokenText names the first field whose text is not UTF-8, "" for none.
func brokenText(d protoreflect.MessageDescriptor, data []byte) string {
	for len(data) > 0 {
		number, kind, n := protowire.ConsumeTag(data)
		if n < 0 {
			return ""
		}
		data = data[n:]
		size := protowire.ConsumeFieldValue(number, kind, data)
		if size < 0 {
			return ""
		}
		field := d.Fields().ByNumber(number)
		if field != nil && kind == protowire.BytesType {
			value, _ := protowire.ConsumeBytes(data)
			switch field.Kind() {
			case protoreflect.StringKind:
				if !utf8.Valid(value) {
					return string(field.Name())
				}
			case protoreflect.MessageKind: // metadata's entries, say
				if brokenText(field.Message(), value) != "" {
					return string(field.Name())
				}
			}
		}
		data = data[size:]
	}
	return ""
}

// decoding returns a service whose unary methods decode through an envelope.
// Streams decode so in stream.RecvMsg.
func decoding(desc *grpc.ServiceDesc) *grpc.ServiceDesc {
	out := *desc
	out.Methods = make([]grpc.MethodDesc, len(desc.Methods))
	for i, m := range desc.Methods {
		handler := m.Handler
		m.Handler = func(srv any, ctx context.Context, dec func(any) error, interceptor grpc.UnaryServerInterceptor) (any, error) {
			resp, err := handler(srv, ctx, func(msg any) error {
				e := envelope{msg: msg}
				if err := dec(&e); err != nil {
					return err
				}
				return e.err
			}, interceptor)
			if err != nil {
				return nil, asStatus(err)
			}
			return resp, nil
		}
		out.Methods[i] = m
	}
	return &out
}

// stream is a server's stream that decodes through an envelope, ends with ctx,
// and counts what waits to be read.
type stream struct {
	grpc.ServerStream
	ctx  context.Context
	out  *sending
	call *begun // nil for another member's
}

// Context implements grpc.ServerStream.
func (s *stream) Context() context.Context { return s.ctx }

// RecvMsg implements grpc.ServerStream.
func (s *stream) RecvMsg(msg any) error {
	e := envelope{msg: msg}
	if err := s.ServerStream.RecvMsg(&e); err != nil {
		return err
	}
	if s.call != nil {
		n := int64(-1)
		if to, ok := msg.(encoded); ok {
			n = int64(messageHeader + len(*to.bytes))
			s.call.conn.credit(framesOfItem)
		}
		s.call.took(n)
	}
	return e.err
}

// messageHeader is what stands before a message of gRPC.
const messageHeader = 5

// SendMsg implements grpc.ServerStream.
func (s *stream) SendMsg(msg any) error {
	if err := s.out.turn(s.ServerStream.Context()); err != nil {
		return err
	}
	out, err := s.out.encode(msg)
	s.out.done()
	if err != nil {
		return err
	}
	return s.ServerStream.SendMsg(out)
}
