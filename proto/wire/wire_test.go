package wire

import (
	"bytes"
	"testing"

	"google.golang.org/grpc/mem"
	"google.golang.org/protobuf/encoding/protowire"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"
	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/timestamppb"

	pb "github.com/distlock/distlock/proto/distlock/v1"
)

// requests are of every kind, usual and unusual.
func requests() []*pb.MultiplexRequest {
	acquire := func(r *pb.AcquireRequest) *pb.Operation {
		return &pb.Operation{Id: 1, Call: &pb.Operation_Acquire{Acquire: r}}
	}
	release := func(r *pb.ReleaseRequest) *pb.Operation {
		return &pb.Operation{Id: 1 << 40, Call: &pb.Operation_Release{Release: r}}
	}
	operations := []*pb.Operation{
		acquire(&pb.AcquireRequest{Names: []string{"orders/1"}, Mode: pb.Mode_MODE_EXCLUSIVE, Ttl: &durationpb.Duration{Seconds: 30}, Owner: "host:1", WaitForever: true, RequestId: 1 << 62}),
		acquire(&pb.AcquireRequest{Names: []string{"a", "b", ""}, Mode: pb.Mode_MODE_SHARED, Limit: 3, LeaseId: 9, Wait: &durationpb.Duration{Nanos: 5},
			LockDelay: &durationpb.Duration{Seconds: -1, Nanos: -7}, LowestOpenRequestId: 4, Actor: "å", Owner: "host:1", Attempt: 1<<32 - 1}),
		acquire(&pb.AcquireRequest{Names: []string{"m"}, Metadata: map[string]string{"k": "v"}, Ttl: &durationpb.Duration{}}),
		acquire(&pb.AcquireRequest{Mode: -1, Owner: "another"}),
		acquire(nil),
		release(&pb.ReleaseRequest{Token: 7, LeaseId: 8}),
		release(&pb.ReleaseRequest{Token: ^uint64(0), Name: "orders/1"}),
		release(&pb.ReleaseRequest{}),
		{Call: &pb.Operation_Release{Release: &pb.ReleaseRequest{Token: 1}}},
		{Id: 3},
		{},
		{Id: 4, Call: &pb.Operation_Cancel{Cancel: &pb.CancelRequest{Id: 2}}},
		{Id: 5, Call: &pb.Operation_KeepAlive{KeepAlive: &pb.KeepAliveRequest{LeaseIds: []uint64{1, 2, 3}}}},
		{Id: 6, Call: &pb.Operation_Grant{Grant: &pb.GrantRequest{Ttl: &durationpb.Duration{Seconds: 1}, Owner: "o"}}},
	}
	list := []*pb.MultiplexRequest{{}, {Operations: operations}}
	for _, op := range operations {
		list = append(list, &pb.MultiplexRequest{Operations: []*pb.Operation{op}})
	}
	return list
}

func responses() []*pb.MultiplexResponse {
	granted := func(g *pb.Hold) *pb.Answer {
		return &pb.Answer{Id: 1, Result: &pb.Answer_Acquire{Acquire: &pb.AcquireResponse{Hold: g}}}
	}
	answers := []*pb.Answer{
		granted(&pb.Hold{Token: 5, LeaseId: 6, Ttl: &durationpb.Duration{Seconds: 30}, Mode: pb.Mode_MODE_EXCLUSIVE, RequestId: 1 << 60,
			Locks: []*pb.HeldLock{{Name: "orders/1", Floor: 5}}, GrantedAt: &timestamppb.Timestamp{Seconds: 1_700_000_000, Nanos: 999_999_999}}),
		granted(&pb.Hold{Token: 5, Locks: []*pb.HeldLock{{Name: "a"}, {Name: "b", Floor: 2}, {}}, Ttl: &durationpb.Duration{}, GrantedAt: &timestamppb.Timestamp{Seconds: -5}}),
		granted(&pb.Hold{}),
		granted(nil),
		{Id: 2, Result: &pb.Answer_Release{Release: &pb.ReleaseResponse{}}},
		{Result: &pb.Answer_Release{}},
		{Id: 3, Result: &pb.Answer_Failure{Failure: &pb.Failure{Code: 9, Message: "held", Reason: "LOCK_HELD", Metadata: map[string]string{"lock": "a"}}}},
		{Id: 4, Result: &pb.Answer_Revoke{Revoke: &pb.RevokeResponse{}}},
		{Id: 5},
		{},
	}
	losses := []*pb.Loss{{LeaseId: 1, Cause: pb.EndCause(2), By: "me"}, {}}
	list := []*pb.MultiplexResponse{{}, {Answers: answers, Losses: losses}, {Losses: losses}, {ClusterId: "6fa1"}, {Answers: answers, Losses: losses, ClusterId: "6fa1"}}
	for _, a := range answers {
		list = append(list, &pb.MultiplexResponse{Answers: []*pb.Answer{a}})
	}
	return list
}

func marshal(t testing.TB, m proto.Message) []byte {
	data, err := proto.MarshalOptions{Deterministic: true}.Marshal(m)
	if err != nil {
		t.Fatal(err)
	}
	return data
}

func flat(s mem.BufferSlice) []byte {
	data := s.Materialize()
	s.Free()
	return data
}

// read is what Operations makes of data: a copy.
func read(o *Operations, data []byte) (*pb.MultiplexRequest, int, error) {
	msg := &pb.MultiplexRequest{}
	n, err := o.Reset(data)
	if err == nil {
		err = o.Each(func(op *pb.Operation) error {
			msg.Operations = append(msg.Operations, proto.CloneOf(op))
			return nil
		})
	}
	return msg, n, err
}

func withoutUnknown(m proto.Message) {
	m.ProtoReflect().SetUnknown(nil)
}

// checkRequest holds what Operations makes of data against protobuf.
func checkRequest(t *testing.T, o *Operations, data []byte) {
	t.Helper()
	want := &pb.MultiplexRequest{}
	wantErr := proto.Unmarshal(data, want)
	withoutUnknown(want) // of the message itself, which nobody asks for
	got, n, err := read(o, data)
	if (err == nil) != (wantErr == nil) {
		t.Fatalf("%x: %v, protobuf says %v", data, err, wantErr)
	}
	if err == nil && (n != len(want.Operations) || !proto.Equal(got, want)) {
		t.Fatalf("%x: %d operations\n%v\nprotobuf says\n%v", data, n, got, want)
	}
}

func checkResponse(t *testing.T, data []byte) {
	t.Helper()
	want, got := &pb.MultiplexResponse{}, &pb.MultiplexResponse{}
	wantErr := proto.Unmarshal(data, want)
	err := Codec{Proto}.Unmarshal(mem.BufferSlice{mem.SliceBuffer(data)}, got)
	if (err == nil) != (wantErr == nil) {
		t.Fatalf("%x: %v, protobuf says %v", data, err, wantErr)
	}
	if err == nil && !proto.Equal(got, want) {
		t.Fatalf("%x:\n%v\nprotobuf says\n%v", data, got, want)
	}
}

func TestRequestsAreProtobufs(t *testing.T) {
	var o Operations
	for _, msg := range requests() {
		want := marshal(t, msg)
		got, err := Codec{Proto}.Marshal(msg)
		if err != nil {
			t.Fatal(err)
		}
		if got := flat(got); !bytes.Equal(got, want) {
			t.Errorf("%v\n%x\nprotobuf says\n%x", msg, got, want)
		}
		checkRequest(t, &o, want)
		for i := range want { // cut short, and with a flipped bit
			checkRequest(t, &o, want[:i])
			for bit := range 8 {
				flipped := bytes.Clone(want)
				flipped[i] ^= 1 << bit
				checkRequest(t, &o, flipped)
			}
		}
	}
}

func TestResponsesAreProtobufs(t *testing.T) {
	for _, msg := range responses() {
		want := marshal(t, msg)
		var got []byte
		var err error
		for _, a := range msg.GetAnswers() {
			if got, err = AppendAnswer(got, a); err != nil {
				t.Fatal(err)
			}
		}
		for _, l := range msg.GetLosses() {
			if got, err = AppendLoss(got, l); err != nil {
				t.Fatal(err)
			}
		}
		got = AppendCluster(got, msg.GetClusterId())
		if !bytes.Equal(got, want) {
			t.Errorf("%v\n%x\nprotobuf says\n%x", msg, got, want)
		}
		checkResponse(t, want)
		for i := range want {
			checkResponse(t, want[:i])
			for bit := range 8 {
				flipped := bytes.Clone(want)
				flipped[i] ^= 1 << bit
				checkResponse(t, flipped)
			}
		}
	}
}

// A field that comes twice, and one that nobody knows: protobuf takes the last,
// merges, and keeps.
func TestUnusualBytes(t *testing.T) {
	var o Operations
	field := func(number protowire.Number, inner ...[]byte) []byte {
		return protowire.AppendBytes(protowire.AppendTag(nil, number, protowire.BytesType), bytes.Join(inner, nil))
	}
	number := func(n protowire.Number, v uint64) []byte {
		return protowire.AppendVarint(protowire.AppendTag(nil, n, protowire.VarintType), v)
	}
	fixed := protowire.AppendFixed32(protowire.AppendTag(nil, 99, protowire.Fixed32Type), 1)
	group := append(protowire.AppendTag(nil, 98, protowire.StartGroupType), protowire.AppendTag(nil, 98, protowire.EndGroupType)...)
	ttl := func(s uint64) []byte { return field(5, number(1, s)) }
	for _, unusual := range [][]byte{
		field(1, number(1, 5), number(1, 6)),                                                           // an id twice
		field(1, number(1, 5), field(2, field(1, []byte("a"))), field(2, field(1, []byte("b")))),       // merged
		field(1, number(1, 5), field(2, field(1, []byte("a"))), field(3, number(1, 9))),                // the last of two kinds
		field(1, number(1, 5), field(2, ttl(1), ttl(2), field(5, number(2, 3)))),                       // merged
		field(1, number(1, 5), field(2, field(1, []byte("a")), fixed)),                                 // unknown
		field(1, number(1, 5), field(3, number(1, 9), number(77, 1))),                                  // unknown
		field(1, number(1, 5), field(3, field(1, []byte("x")))),                                        // of another kind
		field(1, number(1, 5), number(2, 1)),                                                           // the same
		bytes.Join([][]byte{fixed, field(1, number(1, 5), field(3, number(1, 9))), number(1, 3)}, nil), // around
		field(1, number(1, 5), field(2, field(1, []byte("\xff")))),                                     // no text
		field(1, number(1, 5), field(3, field(3, []byte("\xff")))),
		field(1, number(1, 5), field(2, number(3, 1<<40), number(2, 1<<33+1), number(8, 7))), // out of range
		field(1, group),
		group,
	} {
		checkRequest(t, &o, unusual)
		checkResponse(t, unusual)
	}
	grant := field(1, number(1, 5), field(3, number(1, 1)), field(7, number(1, 1)), field(5, field(1, []byte("a"))))
	for _, unusual := range [][]byte{
		field(1, number(1, 5), field(3, grant, grant)),
		field(1, number(1, 5), field(3, grant), field(3, grant)),
		field(1, number(1, 5), field(3, grant), field(4)),
		field(1, number(1, 5), field(4), field(3, grant)),
		field(1, number(1, 5), field(4, number(1, 1))),
		field(1, number(1, 5), field(3, field(1, field(3, number(1, 1)), field(3, number(2, 1))))),
		field(1, number(1, 5), field(3, field(1, field(7, number(1, 1)), field(7, number(2, 1))))),
		field(1, number(1, 5), field(3, field(1, field(5, field(1, []byte("\xff")))))),
		field(1, number(1, 5), field(3, field(1, field(5, number(9, 9))))),
	} {
		checkResponse(t, unusual)
	}
}

// What is not UTF-8 is refused as protobuf does.
func TestTextIsUTF8(t *testing.T) {
	for _, r := range []*pb.AcquireRequest{{Names: []string{"a\xff"}}, {Owner: "\xff"}, {Actor: "\xff"}} {
		if _, err := AppendOperation(nil, &pb.Operation{Id: 1, Call: &pb.Operation_Acquire{Acquire: r}}); err == nil {
			t.Errorf("%v was encoded", r)
		}
	}
	if _, err := AppendOperation(nil, &pb.Operation{Id: 1, Call: &pb.Operation_Release{Release: &pb.ReleaseRequest{Name: "\xff"}}}); err == nil {
		t.Error("a release was encoded")
	}
	g := NewGranted()
	g.Hold.Locks = []*pb.HeldLock{{Name: "\xff"}}
	if _, err := AppendAnswer(nil, &g.Answer); err == nil {
		t.Error("an answer was encoded")
	}
}

// What a message left in the memory that is used again is not in the next.
func TestOperationsLeaveNothing(t *testing.T) {
	var o Operations
	list := requests()
	for i := range list {
		for j := range list {
			checkRequest(t, &o, marshal(t, list[i]))
			checkRequest(t, &o, marshal(t, list[j]))
		}
	}
}

func TestOperationsEndWithTheFirstError(t *testing.T) {
	var o Operations
	data := marshal(t, &pb.MultiplexRequest{Operations: []*pb.Operation{{Id: 1}, {Id: 2}, {Id: 3}}})
	for _, data := range [][]byte{data, append(data, 0x78, 1)} { // and with a field that nobody knows
		if n, err := o.Reset(data); n != 3 || err != nil {
			t.Fatal(n, err)
		}
		seen := 0
		if err := o.Each(func(op *pb.Operation) error {
			if seen++; op.GetId() == 2 {
				return proto.Error
			}
			return nil
		}); err != proto.Error || seen != 2 {
			t.Fatal(seen, err)
		}
	}
}

func FuzzRequest(f *testing.F) {
	for _, msg := range requests() {
		f.Add(marshal(f, msg))
	}
	var o Operations
	f.Fuzz(func(t *testing.T, data []byte) {
		checkRequest(t, &o, data)
		msg, again := &pb.MultiplexRequest{}, &pb.MultiplexRequest{}
		if (proto.UnmarshalOptions{DiscardUnknown: true}).Unmarshal(data, msg) != nil {
			return
		}
		encoded, err := Codec{Proto}.Marshal(msg)
		if err == nil {
			err = proto.Unmarshal(flat(encoded), again)
		}
		if err != nil || !proto.Equal(msg, again) {
			t.Fatalf("%v became %v: %v", msg, again, err)
		}
	})
}

func FuzzResponse(f *testing.F) {
	for _, msg := range responses() {
		f.Add(marshal(f, msg))
	}
	f.Fuzz(func(t *testing.T, data []byte) {
		checkResponse(t, data)
		msg, again := &pb.MultiplexResponse{}, &pb.MultiplexResponse{}
		if (proto.UnmarshalOptions{DiscardUnknown: true}).Unmarshal(data, msg) != nil {
			return
		}
		var encoded []byte
		var err error
		for _, a := range msg.GetAnswers() {
			if encoded, err = AppendAnswer(encoded, a); err != nil {
				t.Fatal(err)
			}
		}
		for _, l := range msg.GetLosses() {
			if encoded, err = AppendLoss(encoded, l); err != nil {
				t.Fatal(err)
			}
		}
		encoded = AppendCluster(encoded, msg.GetClusterId())
		if err := proto.Unmarshal(encoded, again); err != nil || !proto.Equal(msg, again) {
			t.Fatalf("%v became %v: %v", msg, again, err)
		}
	})
}

// TestEveryFieldIsCarried: a field that is added to a message that is encoded by hand
// must be encoded, decoded and forgotten here too.
func TestEveryFieldIsCarried(t *testing.T) {
	carried := 0
	for _, op := range []*pb.Operation{
		{Id: 1, Call: &pb.Operation_Acquire{Acquire: &pb.AcquireRequest{Names: []string{"a"}}}},
		{Id: 1, Call: &pb.Operation_Release{Release: &pb.ReleaseRequest{Token: 7}}},
	} {
		each(op.ProtoReflect(), func(field string) {
			carried++
			data, err := AppendOperation(nil, op)
			if err != nil {
				t.Fatal(err)
			}
			var got pb.MultiplexRequest
			if err := proto.Unmarshal(data, &got); err != nil || len(got.Operations) != 1 || !proto.Equal(got.Operations[0], op) {
				t.Errorf("%s is lost by AppendOperation: %v", field, &got)
			}
			var ops Operations
			if _, err := ops.Reset(data); err != nil {
				t.Fatal(err)
			}
			if err := ops.Each(func(o *pb.Operation) error {
				if !proto.Equal(o, op) {
					t.Errorf("%s is lost by Operations: %v", field, o)
				}
				return nil
			}); err != nil {
				t.Fatal(err)
			}
			// What has been decoded before must leave nothing behind.
			plain := &pb.Operation{Id: 2, Call: &pb.Operation_Acquire{Acquire: &pb.AcquireRequest{Names: []string{"b"}}}}
			if op.GetRelease() != nil {
				plain.Call = &pb.Operation_Release{Release: &pb.ReleaseRequest{Token: 1}}
			}
			if data, err = AppendOperation(nil, plain); err != nil {
				t.Fatal(err)
			}
			if _, err := ops.Reset(data); err != nil {
				t.Fatal(err)
			}
			ops.Each(func(o *pb.Operation) error {
				if !proto.Equal(o, plain) {
					t.Errorf("%s is left over in Operations: %v", field, o)
				}
				return nil
			})
		})
	}
	for _, a := range []*pb.Answer{
		{Id: 1, Result: &pb.Answer_Acquire{Acquire: &pb.AcquireResponse{Hold: &pb.Hold{Token: 1, Locks: []*pb.HeldLock{{Name: "a"}}}}}},
		{Id: 1, Result: &pb.Answer_Release{Release: &pb.ReleaseResponse{}}},
	} {
		each(a.ProtoReflect(), func(field string) {
			carried++
			data, err := AppendAnswer(nil, a)
			if err != nil {
				t.Fatal(err)
			}
			var whole, ours pb.MultiplexResponse
			if err := proto.Unmarshal(data, &whole); err != nil || len(whole.Answers) != 1 || !proto.Equal(whole.Answers[0], a) {
				t.Errorf("%s is lost by AppendAnswer: %v", field, &whole)
			}
			if err := unmarshalResponse(data, &ours); err != nil || !proto.Equal(&ours, &whole) {
				t.Errorf("%s is lost by the client's codec: %v", field, &ours)
			}
		})
	}
	if carried < 25 {
		t.Errorf("only %d fields were tried", carried)
	}
}

// each sets every field below a message to something, one at a time, but for those
// of a oneof, which choose among messages.
func each(m protoreflect.Message, try func(field string)) {
	fields := m.Descriptor().Fields()
	for i := range fields.Len() {
		f := fields.Get(i)
		switch {
		case f.ContainingOneof() != nil && !f.HasOptionalKeyword():
			if m.Has(f) {
				each(m.Mutable(f).Message(), try)
			}
			continue
		case f.IsList() && f.Kind() == protoreflect.MessageKind && m.Has(f):
			each(m.Mutable(f).List().Get(0).Message(), try)
			continue
		case f.Kind() == protoreflect.MessageKind && !f.IsList() && !f.IsMap() && m.Has(f):
			each(m.Mutable(f).Message(), try)
			continue
		}
		before := m.Has(f)
		was := m.Get(f)
		switch {
		case f.IsMap():
			m.Mutable(f).Map().Set(protoreflect.ValueOfString("key").MapKey(), protoreflect.ValueOfString("value"))
		case f.IsList() && f.Kind() == protoreflect.StringKind:
			m.Mutable(f).List().Append(protoreflect.ValueOfString("more"))
			try(string(f.FullName()))
			continue
		case f.IsList():
			m.Mutable(f).List().AppendMutable()
		case f.Kind() == protoreflect.MessageKind:
			sub := m.Mutable(f).Message() // a Duration or a Timestamp, for one
			sub.Set(sub.Descriptor().Fields().Get(0), sub.NewField(sub.Descriptor().Fields().Get(0)))
			if sub.Descriptor().Fields().Get(0).Kind() == protoreflect.Int64Kind {
				sub.Set(sub.Descriptor().Fields().Get(0), protoreflect.ValueOfInt64(5))
			}
		case f.Kind() == protoreflect.StringKind:
			m.Set(f, protoreflect.ValueOfString("text"))
		case f.Kind() == protoreflect.BoolKind:
			m.Set(f, protoreflect.ValueOfBool(true))
		case f.Kind() == protoreflect.EnumKind:
			m.Set(f, protoreflect.ValueOfEnum(1))
		case f.Kind() == protoreflect.Uint64Kind:
			m.Set(f, protoreflect.ValueOfUint64(9))
		case f.Kind() == protoreflect.Uint32Kind:
			m.Set(f, protoreflect.ValueOfUint32(9))
		case f.Kind() == protoreflect.Int64Kind:
			m.Set(f, protoreflect.ValueOfInt64(9))
		case f.Kind() == protoreflect.Int32Kind:
			m.Set(f, protoreflect.ValueOfInt32(9))
		default:
			panic("a kind of field that this test does not know: " + f.Kind().String())
		}
		try(string(f.FullName()))
		if before && !f.IsList() && !f.IsMap() {
			m.Set(f, was)
		} else {
			m.Clear(f)
		}
	}
}
