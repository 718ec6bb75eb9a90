package transport

import (
	"context"
	"encoding/binary"
	"reflect"
	"sync"
	"sync/atomic"

	"golang.org/x/net/http2"
	"google.golang.org/grpc"
)

// walk finds the frames of HTTP/2 in what one side sends, piece by piece. What is not
// HTTP/2 it takes for frames all the same.
type walk struct {
	skip int // of what a connection begins with
	head [frameHeader]byte
	have int // of head
	left int // of a payload
}

const frameHeader = 9

// next takes the rest of a frame's header, or a piece of its payload, from p; of
// both there may be nothing. A frame begins when its header is there.
func (w *walk) next(p []byte) (payload, rest []byte, began bool) {
	if w.left > 0 {
		n := min(w.left, len(p))
		w.left -= n
		return p[:n], p[n:], false
	}
	n := copy(w.head[w.have:], p)
	if w.have += n; w.have < frameHeader {
		return nil, p[n:], false
	}
	w.have = 0
	w.left = int(w.head[0])<<16 | int(w.head[1])<<8 | int(w.head[2])
	return nil, p[n:], true
}

func (w *walk) kind() http2.FrameType { return http2.FrameType(w.head[3]) }

func (w *walk) flag(flag http2.Flags) bool { return http2.Flags(w.head[4]).Has(flag) }

func (w *walk) stream() uint32 { return binary.BigEndian.Uint32(w.head[5:]) &^ (1 << 31) }

// received follows the frames that a client sends. It is the reading goroutine's.
type received struct {
	walk
	streams *streams
	length  int  // of the payload of the frame under way
	padded  bool // the next byte says how much padding it has
	padding int  // with that byte
}

func newReceived(s *streams) received {
	return received{walk: walk{skip: len(http2.ClientPreface)}, streams: s}
}

// in takes what has been read, and returns how many frames began in it.
func (f *received) in(p []byte) (n int64) {
	skip := min(f.skip, len(p))
	f.skip -= skip
	for p = p[skip:]; len(p) > 0; {
		var payload []byte
		var began bool
		if payload, p, began = f.next(p); began {
			f.length, f.padding = f.left, 0
			f.padded = f.kind() == http2.FrameData && f.flag(http2.FlagDataPadded)
			if f.kind() == http2.FrameHeaders {
				f.streams.begin(f.stream())
			}
			n++
		}
		if len(payload) > 0 && f.padded {
			f.padded, f.padding = false, 1+int(payload[0])
		}
		if (began || len(payload) > 0) && f.left == 0 {
			f.end()
		}
	}
	return n
}

// end ends a frame.
func (f *received) end() {
	switch f.kind() {
	case http2.FrameRSTStream:
		f.streams.end(f.stream())
	case http2.FrameData:
		f.streams.came(f.stream(), f.length-f.padding, f.length)
	}
}

// sent follows the frames that are sent to a client. It is the writing goroutine's.
type sent struct {
	walk
	streams *streams
}

// out takes what has been written.
func (f *sent) out(p []byte) {
	for len(p) > 0 {
		var began bool
		if _, p, began = f.next(p); !began {
			continue
		}
		if f.kind() == http2.FrameRSTStream || f.kind() == http2.FrameHeaders && f.flag(http2.FlagHeadersEndStream) {
			f.streams.end(f.stream())
		}
	}
}

// streams are the calls of a connection, from their headers on until the last of
// their answer is sent, or one side gives them up. gRPC keeps for each of them what
// has come and no handler has taken: messages that lack their end, that nobody reads.
type streams struct {
	all *calls

	mu   sync.Mutex
	open map[uint32]untaken // nil once the connection is closed
	last uint32             // that has been opened
	kept int64              // about how many bytes gRPC keeps
}

// untaken is what has come on a stream and no handler has taken.
type untaken struct {
	bytes  int64
	frames int64 // that they came in
	kept   int64 // about what gRPC keeps for those
}

func newStreams(all *calls) *streams { return &streams{all: all, open: make(map[uint32]untaken)} }

func (s *streams) begin(id uint32) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if id > s.last && s.open != nil { // others are trailers, or a breach of HTTP/2
		s.last, s.open[id] = id, untaken{}
		s.all.under.Add(1)
	}
}

func (s *streams) end(id uint32) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if u, ok := s.open[id]; ok {
		s.keep(-u.kept)
		delete(s.open, id)
		s.all.under.Add(-1)
	}
}

// close ends all.
func (s *streams) close() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.all.under.Add(-int64(len(s.open)))
	s.keep(-s.kept)
	s.open = nil
}

// count is how many there are.
func (s *streams) count() int64 {
	s.mu.Lock()
	defer s.mu.Unlock()
	return int64(len(s.open))
}

// bytes is about what gRPC keeps for them.
func (s *streams) bytes() int64 {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.kept
}

// keep counts bytes; s.mu is held.
func (s *streams) keep(n int64) {
	if n != 0 {
		s.kept += n
		s.all.kept.Add(n)
	}
}

// came takes a frame of data whose payload has so many bytes of messages, and a length
// with padding. What comes on a stream that is over gRPC does not keep.
func (s *streams) came(id uint32, bytes, length int) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if u, ok := s.open[id]; ok && bytes > 0 {
		kept := pieceOf(length)
		s.open[id] = untaken{u.bytes + int64(bytes), u.frames + 1, u.kept + kept}
		s.keep(kept)
	}
}

// pieceOf is about what gRPC keeps of a frame: a buffer of its pool, and what goes with it.
func pieceOf(length int) int64 {
	for _, size := range [...]int{256, 4 << 10, 16 << 10, 32 << 10} {
		if length <= size {
			return int64(size) + 128
		}
	}
	return 1 << 20
}

// taken is told that a handler has taken so many bytes, all of a stream for less than
// 0, and returns how many frames they came in: not more than are worth it, for who sends
// byte by byte has others work.
func (s *streams) taken(id uint32, bytes int64) (frames int64) {
	s.mu.Lock()
	defer s.mu.Unlock()
	u, ok := s.open[id]
	if !ok || u.bytes == 0 {
		return 0
	}
	if bytes < 0 || bytes > u.bytes {
		bytes = u.bytes
	}
	frames, kept := u.frames*bytes/u.bytes, u.kept*bytes/u.bytes
	s.open[id] = untaken{u.bytes - bytes, u.frames - frames, u.kept - kept}
	s.keep(-kept)
	return min(frames, 2+bytes>>10)
}

// streamOf is the number of a call's stream. gRPC does not tell it; TestStreamsHaveNumbers
// fails should it keep it elsewhere. It is 0 then, and nothing counts as taken.
func streamOf(ctx context.Context) uint32 {
	s := reflect.ValueOf(grpc.ServerTransportStreamFromContext(ctx))
	if s.Kind() != reflect.Pointer || s.Elem().Kind() != reflect.Struct {
		return 0
	}
	index, ok := streamField.Load().([]int)
	if !ok {
		field, found := s.Elem().Type().FieldByName("id")
		if !found || field.Type.Kind() != reflect.Uint32 {
			return 0
		}
		index = field.Index
		streamField.Store(index)
	}
	return uint32(s.Elem().FieldByIndex(index).Uint())
}

var streamField atomic.Value // []int
