// Package http2test speaks HTTP/2 by hand, as no client of gRPC would: it opens
// no windows, ends no streams, and breaks frames, for tests of what a server does
// then.
package http2test

import (
	"bytes"
	"encoding/binary"
	"net"
	"testing"
	"time"

	"golang.org/x/net/http2"
	"golang.org/x/net/http2/hpack"
	"google.golang.org/protobuf/proto"
)

// Conn is a connection to a gRPC server. One goroutine may write, and one read.
type Conn struct {
	net.Conn
	*http2.Framer
	t    testing.TB
	next uint32
	head bytes.Buffer
	enc  *hpack.Encoder
}

// Dial begins to speak with a server, which it tells the settings given. It ends
// with the test, and within 20 seconds: what does not come fails.
func Dial(t testing.TB, address string, settings ...http2.Setting) *Conn {
	t.Helper()
	c, err := Open(address, settings...)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	c.t = t
	c.SetDeadline(time.Now().Add(20 * time.Second))
	return c
}

// Open is Dial outside of a test. What needs one is not to be called.
func Open(address string, settings ...http2.Setting) (*Conn, error) {
	conn, err := net.DialTimeout("tcp", address, 5*time.Second)
	if err != nil {
		return nil, err
	}
	c := &Conn{Conn: conn, Framer: http2.NewFramer(conn, conn), next: 1}
	c.enc = hpack.NewEncoder(&c.head)
	if _, err = conn.Write([]byte(http2.ClientPreface)); err == nil {
		err = c.WriteSettings(settings...)
	}
	if err != nil {
		conn.Close()
		return nil, err
	}
	return c, nil
}

// Lazy are the settings of who lets a server send nothing of a call's answer until
// Open.
func Lazy() http2.Setting { return http2.Setting{ID: http2.SettingInitialWindowSize, Val: 0} }

// Headers are those of a call of a new stream, with more behind them.
func (c *Conn) Headers(method string, more ...string) (id uint32, block []byte) {
	id = c.next
	c.next += 2
	c.head.Reset()
	list := append([]string{
		":method", "POST", ":scheme", "http", ":path", method, ":authority", "x", "content-type", "application/grpc", "te", "trailers",
	}, more...)
	for i := 0; i < len(list); i += 2 {
		c.enc.WriteField(hpack.HeaderField{Name: list[i], Value: list[i+1]})
	}
	return id, c.head.Bytes()
}

// Begin sends the headers of a call, and returns its stream.
func (c *Conn) Begin(method string, more ...string) (uint32, error) {
	id, block := c.Headers(method, more...)
	return id, c.WriteHeaders(http2.HeadersFrameParam{StreamID: id, BlockFragment: block, EndHeaders: true})
}

// Message is a message as it stands in a stream.
func Message(msg proto.Message) ([]byte, error) {
	data, err := proto.Marshal(msg)
	return append(binary.BigEndian.AppendUint32([]byte{0}, uint32(len(data))), data...), err
}

// Call makes a call of one small message, and returns its stream.
func (c *Conn) Call(method string, msg proto.Message) uint32 {
	c.t.Helper()
	id, err := c.Begin(method)
	if err != nil {
		c.t.Fatal(err)
	}
	data, err := Message(msg)
	if err != nil {
		c.t.Fatal(err)
	}
	if err := c.WriteData(id, true, data); err != nil {
		c.t.Fatal(err)
	}
	return id
}

// Open lets the server send so many bytes of the answers to a call, 0 for all.
func (c *Conn) Open(id uint32, bytes uint32) {
	c.t.Helper()
	if err := c.WriteWindowUpdate(id, bytes); err != nil {
		c.t.Fatal(err)
	}
}

// Next reads something of a call: how many bytes, or its end.
func (c *Conn) Next() (id uint32, n int, end bool) {
	c.t.Helper()
	for {
		frame, err := c.ReadFrame()
		if err != nil {
			c.t.Fatal(err)
		}
		switch f := frame.(type) {
		case *http2.DataFrame:
			return f.StreamID, len(f.Data()), false
		case *http2.HeadersFrame:
			if f.StreamEnded() {
				return f.StreamID, 0, true
			}
		}
	}
}

// Ended reads until a call has ended, and returns how many bytes have come of it.
func (c *Conn) Ended(id uint32) (sum int) {
	c.t.Helper()
	for {
		switch of, n, end := c.Next(); {
		case of == id && end:
			return sum
		case of == id:
			sum += n
		}
	}
}

// Cut reads until the server has closed the connection.
func (c *Conn) Cut() {
	c.t.Helper()
	for {
		if _, err := c.ReadFrame(); err != nil {
			if e, ok := err.(net.Error); ok && e.Timeout() {
				c.t.Error("the server has not closed the connection")
			}
			return
		}
	}
}
