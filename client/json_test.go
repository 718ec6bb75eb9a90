package client

import (
	"bytes"
	"encoding/json"
	"fmt"
	"strconv"
	"strings"
	"testing"
	"time"

	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"
	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/timestamppb"

	pb "github.com/distlock/distlock/proto/distlock/v1"
)

// TestOneJSON: what the client tells has the JSON of the message that it came in, by
// the rules that docs/api.md gives for every message, whatever of it is set.
func TestOneJSON(t *testing.T) {
	for _, try := range []struct {
		msg  proto.Message
		told func(proto.Message) any
	}{
		{&pb.Lock{}, func(m proto.Message) any { return lockInfo(m.(*pb.Lock)) }},
		{&pb.Lease{}, func(m proto.Message) any { return leaseInfo(m.(*pb.Lease)) }},
		{&pb.Event{}, func(m proto.Message) any { return event(m.(*pb.Event)) }},
		{&pb.CheckTokenResponse{}, func(m proto.Message) any { return tokenCheck(m.(*pb.CheckTokenResponse)) }},
		{&pb.StatusResponse{}, func(m proto.Message) any { return statusOf(m.(*pb.StatusResponse)) }},
		{&pb.Obstacle{}, func(m proto.Message) any { return obstacle(m.(*pb.Obstacle)) }},
	} {
		full := try.msg.ProtoReflect().New().Interface()
		n := int64(0)
		fillIn(full.ProtoReflect(), &n)
		for what, m := range map[string]proto.Message{"empty": try.msg, "full": full} {
			want, err := json.Marshal(inJSON(m.ProtoReflect()))
			if err != nil {
				t.Fatal(err)
			}
			got, err := json.Marshal(try.told(m))
			if err != nil {
				t.Fatal(err)
			}
			if !bytes.Equal(got, want) {
				t.Errorf("%s %T:\n%s, and by the rules\n%s", what, m, got, want)
			}
			var any map[string]any
			if err := json.Unmarshal(got, &any); err != nil {
				t.Errorf("%s %T: %v", what, m, err)
			}
		}
	}
}

// TestJSONKeepsText: names may have anything in them.
func TestJSONKeepsText(t *testing.T) {
	name := "a\"<&>\\\x01\u2028é"
	text, err := json.Marshal(LockInfo{Name: name})
	if err != nil {
		t.Fatal(err)
	}
	var got struct{ Name string }
	if err := json.Unmarshal(text, &got); err != nil || got.Name != name {
		t.Errorf("%q, %v of %s", got.Name, err, text)
	}
}

// inJSON gives a message the members that the rules say.
func inJSON(m protoreflect.Message) ordered {
	var out ordered
	fields := m.Descriptor().Fields()
	for i := range fields.Len() {
		f := fields.Get(i)
		v := m.Get(f)
		put := func(v any) { out = append(out, field{f.JSONName(), v}) }
		switch {
		case f.IsMap():
			all := map[string]string{}
			v.Map().Range(func(k protoreflect.MapKey, v protoreflect.Value) bool {
				all[k.String()] = v.String()
				return true
			})
			put(all)
		case f.IsList():
			all := []any{}
			for i := range v.List().Len() {
				all = append(all, one(f, v.List().Get(i)))
			}
			put(all)
		case f.Message() != nil && !m.Has(f):
		default:
			put(one(f, v))
		}
	}
	return out
}

func one(f protoreflect.FieldDescriptor, v protoreflect.Value) any {
	switch {
	case strings.HasSuffix(string(f.Name()), "request_id"):
		return strconv.FormatUint(v.Uint(), 10)
	case f.Enum() != nil:
		name := string(f.Enum().Values().ByNumber(v.Enum()).Name())
		_, word, _ := strings.Cut(name, map[string]string{"Mode": "MODE_", "Kind": "KIND_", "EndCause": "END_CAUSE_"}[string(f.Enum().Name())])
		if word == "UNSPECIFIED" {
			return map[bool]string{true: "exclusive"}[f.Enum().Name() == "Mode"]
		}
		return strings.ToLower(strings.ReplaceAll(word, "_", "-"))
	case f.Message() != nil:
		switch m := v.Message().Interface().(type) {
		case *durationpb.Duration:
			return m.AsDuration().String()
		case *timestamppb.Timestamp:
			return m.AsTime().Format(time.RFC3339Nano)
		}
		return inJSON(v.Message())
	}
	return v.Interface()
}

// ordered is an object with its members in order.
type ordered []field

func (o ordered) MarshalJSON() ([]byte, error) { return object(o...) }

// fillIn sets all of a message, to values that differ.
func fillIn(m protoreflect.Message, n *int64) {
	fields := m.Descriptor().Fields()
	for i := range fields.Len() {
		f := fields.Get(i)
		switch {
		case f.IsMap():
			m.Mutable(f).Map().Set(protoreflect.ValueOfString("key").MapKey(), protoreflect.ValueOfString("value"))
		case f.IsList():
			list := m.Mutable(f).List()
			for range 2 {
				if f.Message() != nil {
					fillIn(list.AppendMutable().Message(), n)
				} else {
					list.Append(value(f, n))
				}
			}
		case f.Message() != nil:
			fillIn(m.Mutable(f).Message(), n)
		default:
			m.Set(f, value(f, n))
		}
	}
}

func value(f protoreflect.FieldDescriptor, n *int64) protoreflect.Value {
	*n++
	switch f.Kind() {
	case protoreflect.StringKind:
		return protoreflect.ValueOfString(fmt.Sprint("text ", *n))
	case protoreflect.BoolKind:
		return protoreflect.ValueOfBool(true)
	case protoreflect.EnumKind:
		return protoreflect.ValueOfEnum(protoreflect.EnumNumber(1 + *n%int64(f.Enum().Values().Len()-1)))
	case protoreflect.Int32Kind:
		return protoreflect.ValueOfInt32(int32(*n))
	case protoreflect.Int64Kind:
		return protoreflect.ValueOfInt64(*n)
	case protoreflect.Uint32Kind:
		return protoreflect.ValueOfUint32(uint32(*n))
	}
	return protoreflect.ValueOfUint64(uint64(*n))
}
