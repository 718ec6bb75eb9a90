package wire

import (
	"unicode/utf8"

	"google.golang.org/protobuf/encoding/protowire"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/timestamppb"

	pb "github.com/distlock/distlock/proto/distlock/v1"
)

// fields calls fn for each field of a message, with what a number or the text
// of it is, until it returns false. It reports whether all is of these two
// kinds, is sound, and fn took it.
func fields(data []byte, fn func(field protowire.Number, number uint64, text []byte) bool) bool {
	for len(data) > 0 {
		field, kind, n := protowire.ConsumeTag(data)
		if n < 0 {
			return false
		}
		data = data[n:]
		var number uint64
		var text []byte
		switch kind {
		case protowire.VarintType:
			number, n = protowire.ConsumeVarint(data)
		case protowire.BytesType:
			if text, n = protowire.ConsumeBytes(data); text == nil {
				text = []byte{}
			}
		default:
			return false
		}
		if n < 0 || !fn(field, number, text) {
			return false
		}
		data = data[n:]
	}
	return true
}

// Operations reads MultiplexRequests, into messages that it uses again. It is
// for one goroutine.
type Operations struct {
	data  []byte
	whole *pb.MultiplexRequest // in place of data, when protobuf has decoded it

	op      pb.Operation
	acquire pb.Operation_Acquire
	release pb.Operation_Release
	asked   pb.AcquireRequest
	ended   pb.ReleaseRequest
	spans   [3]durationpb.Duration
	owner   string // of the last acquisition: most clients have one
}

// Reset takes a message in, which must stay as it is until the next call, and
// returns how many operations it has. Error: protobuf's.
func (o *Operations) Reset(data []byte) (n int, err error) {
	o.data, o.whole = data, nil
	if fields(data, func(field protowire.Number, _ uint64, text []byte) bool {
		n++
		return field == 1 && text != nil
	}) {
		return n, nil
	}
	o.whole = &pb.MultiplexRequest{}
	err = proto.Unmarshal(data, o.whole)
	return len(o.whole.GetOperations()), err
}

// Each calls fn for each operation, which it must not keep, until fn fails.
// Errors: fn's, protobuf's.
func (o *Operations) Each(fn func(*pb.Operation) error) (err error) {
	if o.whole != nil {
		for _, op := range o.whole.GetOperations() {
			if err := fn(op); err != nil {
				return err
			}
		}
		return nil
	}
	fields(o.data, func(_ protowire.Number, _ uint64, text []byte) bool {
		op := &o.op
		if !o.operation(text) {
			op = &pb.Operation{}
			err = proto.Unmarshal(text, op)
		}
		if err == nil {
			err = fn(op)
		}
		return err == nil
	})
	return err
}

// operation decodes one into o.op, if it is of the common kinds.
func (o *Operations) operation(data []byte) bool {
	o.op.Id, o.op.Call = 0, nil
	return fields(data, func(field protowire.Number, number uint64, text []byte) bool {
		switch {
		case field == 1 && text == nil:
			o.op.Id = number
			return true
		case text == nil || o.op.Call != nil: // protobuf merges the second with the first
			return false
		case field == 2:
			o.acquire.Acquire, o.op.Call = &o.asked, &o.acquire
			return o.acquisition(text)
		case field == 3:
			o.release.Release, o.op.Call = &o.ended, &o.release
			return o.ending(text)
		}
		return false
	}) && o.op.Call != nil
}

func (o *Operations) acquisition(data []byte) bool {
	r := &o.asked
	r.Names, r.Mode, r.Limit, r.LeaseId, r.Ttl, r.Owner, r.Wait = r.Names[:0], 0, 0, 0, nil, "", nil
	r.WaitForever, r.LockDelay, r.RequestId, r.LowestOpenRequestId, r.Actor, r.Attempt = false, nil, 0, 0, "", 0
	return fields(data, func(field protowire.Number, number uint64, text []byte) bool {
		if text == nil {
			switch field {
			case 2:
				r.Mode = pb.Mode(number)
			case 3:
				r.Limit = uint32(number)
			case 4:
				r.LeaseId = number
			case 8:
				r.WaitForever = protowire.DecodeBool(number)
			case 10:
				r.RequestId = number
			case 11:
				r.LowestOpenRequestId = number
			case 14:
				r.Attempt = uint32(number)
			default:
				return false
			}
			return true
		}
		switch field {
		case 1, 6, 12:
			if !utf8.Valid(text) {
				return false
			}
		}
		switch field {
		case 1:
			r.Names = append(r.Names, string(text))
		case 5:
			return r.Ttl == nil && o.span(0, &r.Ttl, text)
		case 6:
			if string(text) != o.owner {
				o.owner = string(text)
			}
			r.Owner = o.owner
		case 7:
			return r.Wait == nil && o.span(1, &r.Wait, text)
		case 9:
			return r.LockDelay == nil && o.span(2, &r.LockDelay, text)
		case 12:
			r.Actor = string(text)
		default:
			return false
		}
		return true
	})
}

func (o *Operations) span(i int, to **durationpb.Duration, data []byte) bool {
	*to = &o.spans[i]
	return span(data, &o.spans[i].Seconds, &o.spans[i].Nanos)
}

// span decodes a Duration or a Timestamp.
func span(data []byte, seconds *int64, nanos *int32) bool {
	*seconds, *nanos = 0, 0
	return fields(data, func(field protowire.Number, number uint64, text []byte) bool {
		switch {
		case field == 1 && text == nil:
			*seconds = int64(number)
		case field == 2 && text == nil:
			*nanos = int32(number)
		default:
			return false
		}
		return true
	})
}

func (o *Operations) ending(data []byte) bool {
	r := &o.ended
	r.Token, r.LeaseId, r.Name, r.RequestId = 0, 0, "", 0
	return fields(data, func(field protowire.Number, number uint64, text []byte) bool {
		switch {
		case field == 1 && text == nil:
			r.Token = number
		case field == 2 && text == nil:
			r.LeaseId = number
		case field == 3 && text != nil && utf8.Valid(text):
			r.Name = string(text)
		case field == 4 && text == nil:
			r.RequestId = number
		default:
			return false
		}
		return true
	})
}

// unmarshalResponse decodes a message into an empty one.
func unmarshalResponse(data []byte, msg *pb.MultiplexResponse) error {
	n := 0
	if !fields(data, func(field protowire.Number, _ uint64, text []byte) bool {
		n++
		return (field == 1 || field == 2 || field == 3 && utf8.Valid(text)) && text != nil
	}) {
		return proto.Unmarshal(data, msg)
	}
	var err error
	msg.Answers = make([]*pb.Answer, 0, n)
	fields(data, func(field protowire.Number, _ uint64, text []byte) bool {
		switch field {
		case 2:
			loss := &pb.Loss{}
			err = proto.Unmarshal(text, loss)
			msg.Losses = append(msg.Losses, loss)
			return err == nil
		case 3:
			msg.ClusterId = string(text)
			return true
		}
		a := answer(text)
		if a == nil {
			a = &pb.Answer{}
			err = proto.Unmarshal(text, a)
		}
		msg.Answers = append(msg.Answers, a)
		return err == nil
	})
	return err
}

// released is the answer to every release, which says nothing.
var released = &pb.Answer_Release{Release: &pb.ReleaseResponse{}}

// answer decodes one of the common kinds; nil for another.
func answer(data []byte) (a *pb.Answer) {
	var id uint64
	if !fields(data, func(field protowire.Number, number uint64, text []byte) bool {
		switch {
		case field == 1 && text == nil:
			id = number
		case text == nil || a != nil:
			return false
		case field == 3:
			if a = acquired(text); a == nil {
				return false
			}
		case field == 4 && len(text) == 0:
			a = &pb.Answer{Result: released}
		default:
			return false
		}
		return true
	}) || a == nil {
		return nil
	}
	a.Id = id
	return a
}

// acquired decodes an AcquireResponse.
func acquired(data []byte) *pb.Answer {
	var g *Granted
	if !fields(data, func(field protowire.Number, _ uint64, text []byte) bool {
		if field != 1 || text == nil || g != nil {
			return false
		}
		g = NewGranted()
		return g.decode(text)
	}) || g == nil {
		return nil
	}
	return &g.Answer
}

// Granted is an Answer with a grant of one lock, whose messages are of one
// piece of memory.
type Granted struct {
	pb.Answer
	Hold     pb.Hold
	TTL      durationpb.Duration   // Hold's, once it is set there
	At       timestamppb.Timestamp // the same
	Lock     pb.HeldLock           // the first of Hold's, once it is set there
	Locks    [1]*pb.HeldLock
	result   pb.Answer_Acquire
	response pb.AcquireResponse
}

// NewGranted returns an answer with a grant that has nothing yet.
func NewGranted() *Granted {
	g := &Granted{}
	g.Reset()
	return g
}

// Reset makes it what NewGranted returns.
func (g *Granted) Reset() {
	g.result.Acquire, g.response.Hold = &g.response, &g.Hold
	g.Answer.Id, g.Answer.Result = 0, &g.result
	r := &g.Hold
	r.Token, r.LeaseId, r.Ttl, r.Mode, r.Locks, r.RequestId, r.GrantedAt = 0, 0, nil, 0, g.Locks[:0], 0, nil
}

func (g *Granted) decode(data []byte) bool {
	r := &g.Hold
	return fields(data, func(field protowire.Number, number uint64, text []byte) bool {
		if text == nil {
			switch field {
			case 1:
				r.Token = number
			case 2:
				r.LeaseId = number
			case 4:
				r.Mode = pb.Mode(number)
			case 6:
				r.RequestId = number
			default:
				return false
			}
			return true
		}
		switch field {
		case 3:
			first := r.Ttl == nil
			r.Ttl = &g.TTL
			return first && span(text, &g.TTL.Seconds, &g.TTL.Nanos)
		case 5:
			lock := &g.Lock
			if len(r.Locks) > 0 {
				lock = &pb.HeldLock{}
			}
			r.Locks = append(r.Locks, lock)
			return fields(text, func(field protowire.Number, number uint64, text []byte) bool {
				switch {
				case field == 1 && text != nil && utf8.Valid(text):
					lock.Name = string(text)
				case field == 2 && text == nil:
					lock.Floor = number
				default:
					return false
				}
				return true
			})
		case 7:
			first := r.GrantedAt == nil
			r.GrantedAt = &g.At
			return first && span(text, &g.At.Seconds, &g.At.Nanos)
		}
		return false
	})
}
