package transport

import (
	"encoding/binary"
	"sync"

	"golang.org/x/net/http2"
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
	frame   int64 // the number of the one under way
	padded  bool  // the next byte says how much padding it has, at its end
	padding int
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
			f.begin()
			n++
		}
		if len(payload) > 0 && f.kind() == http2.FrameData {
			f.data(payload)
		}
		if (began || len(payload) > 0) && f.left == 0 {
			f.end()
		}
	}
	return n
}

func (f *received) begin() {
	f.frame++
	f.padded, f.padding = f.flag(http2.FlagDataPadded), 0
	if f.kind() == http2.FrameHeaders {
		f.streams.begin(f.stream())
	}
}

// data takes a piece of the payload of a frame of data.
func (f *received) data(p []byte) {
	if f.padded {
		f.padded, f.padding = false, int(p[0])
		p = p[1:]
	}
	// What is left of the frame is padding first of all.
	if n := len(p) - max(f.padding-f.left, 0); n > 0 {
		f.streams.data(f.stream(), p[:n], f.frame)
	}
}

// end ends a frame.
func (f *received) end() {
	switch f.kind() {
	case http2.FrameRSTStream:
		f.streams.end(f.stream())
	case http2.FrameData, http2.FrameHeaders:
		if f.flag(http2.FlagDataEndStream) {
			f.streams.asked(f.stream())
		}
	}
}

// sent follows the frames that are sent to a client. It is the writing goroutine's.
type sent struct {
	walk
	streams *streams
	number  uint32 // of what has come of a window's update
}

// out takes what has been written.
func (f *sent) out(p []byte) {
	for len(p) > 0 {
		var payload []byte
		var began bool
		payload, p, began = f.next(p)
		switch f.kind() {
		case http2.FrameRSTStream:
			if began {
				f.streams.end(f.stream())
			}
		case http2.FrameHeaders:
			if began && f.flag(http2.FlagHeadersEndStream) {
				f.streams.end(f.stream())
			}
		case http2.FrameWindowUpdate:
			for _, b := range payload {
				f.number = f.number<<8 | uint32(b)
			}
			if len(payload) > 0 && f.left == 0 && f.stream() != 0 {
				f.streams.read(f.stream(), int64(f.number&^(1<<31)))
			}
		}
	}
}

// streams are the calls of a connection, from their headers on until the last of
// their answer is sent, or one side gives them up. gRPC keeps something for each of
// them: above all of messages that have not come whole, and that nobody reads.
type streams struct {
	all *calls

	mu   sync.Mutex
	open map[uint32]asking // nil once the connection is closed
	last uint32            // that has been opened
	kept int64             // bytes
}

// asking is what has come on a stream.
type asking struct {
	part   *message // nil when nothing has come of one that has not come whole
	unread int64    // bytes that have come beyond those that the server has said it has read
	frames int64    // of those, and the number of the last
	last   int64
}

// message is one that has not come whole.
type message struct {
	head [messageHeader]byte
	have int // of head
	left int // of the message, once head is there
	kept int64
	last int64 // the number of the last frame with something of it
}

const (
	messageHeader = 5
	// eachPiece is about what gRPC keeps of a frame beside its bytes.
	eachPiece = 256
	// gRPC says that it has read once that is a quarter of the window. Until then what
	// has come may have been read: that much, in not very many frames, does not count.
	mayBeRead       = streamWindow / 4
	mayBeReadFrames = 1024
)

// kept is about what gRPC keeps of it.
func (a *asking) kept() int64 {
	n := max(a.unread-mayBeRead, 0) + eachPiece*max(a.frames-mayBeReadFrames, 0)
	if a.part != nil { // of a large one gRPC says beforehand that it reads it
		n = max(n, a.part.kept)
	}
	return n
}

func newStreams(all *calls) *streams { return &streams{all: all, open: make(map[uint32]asking)} }

func (s *streams) begin(id uint32) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if id > s.last && s.open != nil { // others are trailers, or a breach of HTTP/2
		s.last, s.open[id] = id, asking{}
		s.all.under.Add(1)
	}
}

func (s *streams) end(id uint32) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if a, ok := s.open[id]; ok {
		s.keep(-a.kept())
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

// set puts in what has come on a stream, of which so many bytes were kept before;
// s.mu is held.
func (s *streams) set(id uint32, a asking, before int64) {
	s.open[id] = a
	s.keep(a.kept() - before)
}

// asked is told that the client sends no more on a stream.
func (s *streams) asked(id uint32) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if a, ok := s.open[id]; ok && a.part != nil {
		before := a.kept()
		a.part = nil
		s.set(id, a, before)
	}
}

// read is told that the server lets the client send so much more on a stream: it has
// read as much.
func (s *streams) read(id uint32, bytes int64) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if a, ok := s.open[id]; ok {
		before := a.kept()
		a.unread, a.frames = a.unread-bytes, 0
		s.set(id, a, before)
	}
}

// data takes a piece of a stream's messages, of the frame with that number. What comes
// on a stream that is over gRPC does not keep.
func (s *streams) data(id uint32, p []byte, frame int64) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if a, ok := s.open[id]; ok {
		before := a.kept()
		a.data(p, frame)
		s.set(id, a, before)
	}
}

func (a *asking) data(p []byte, frame int64) {
	a.unread += int64(len(p))
	if a.last != frame {
		a.frames, a.last = a.frames+1, frame
	}
	for m := a.part; len(p) > 0; {
		if m == nil {
			if len(p) >= messageHeader {
				if n := messageHeader + int(binary.BigEndian.Uint32(p[1:])); n <= len(p) {
					p = p[n:] // whole, as nearly all are
					continue
				}
			}
			m = &message{}
			a.part = m
		}
		n := 0
		if m.have < messageHeader {
			n = copy(m.head[m.have:], p)
			if m.have += n; m.have == messageHeader {
				m.left = int(binary.BigEndian.Uint32(m.head[1:]))
			}
		} else {
			n = min(m.left, len(p))
			m.left -= n
		}
		p = p[n:]
		m.kept += int64(n)
		if m.last != frame {
			m.last = frame
			m.kept += eachPiece
		}
		if m.have == messageHeader && m.left == 0 {
			m, a.part = nil, nil
		}
	}
}
