package client_test

import (
	"context"
	"encoding/binary"
	"io"
	"net"
	"sync"
	"testing"
	"time"

	"golang.org/x/net/http2"
	"google.golang.org/protobuf/proto"

	"github.com/distlock/distlock/client"
	pb "github.com/distlock/distlock/proto/distlock/v1"
)

// refusing is a server that looks at no stream's message, as one that is about to
// stop does, and says so. It tells of the acquisitions in them.
func refusing(conn net.Conn, told func(*pb.AcquireRequest)) {
	defer conn.Close()
	if _, err := io.ReadFull(conn, make([]byte, len(http2.ClientPreface))); err != nil {
		return
	}
	f := http2.NewFramer(conn, conn)
	f.WriteSettings()
	data := make(map[uint32][]byte)
	for {
		frame, err := f.ReadFrame()
		if err != nil {
			return
		}
		switch frame := frame.(type) {
		case *http2.SettingsFrame:
			if !frame.IsAck() {
				f.WriteSettingsAck()
			}
		case *http2.PingFrame:
			if !frame.IsAck() {
				f.WritePing(true, frame.Data)
			}
		case *http2.DataFrame:
			id := frame.StreamID
			data[id] = append(data[id], frame.Data()...)
			got := data[id]
			if len(got) < 5 || len(got) < 5+int(binary.BigEndian.Uint32(got[1:])) {
				continue
			}
			var msg pb.MultiplexRequest
			if proto.Unmarshal(got[5:], &msg) == nil {
				for _, op := range msg.GetOperations() {
					if a := op.GetAcquire(); a != nil {
						told(a)
					}
				}
			}
			f.WriteRSTStream(id, http2.ErrCodeRefusedStream)
		}
	}
}

// TestStreamsAreNotReplayed: gRPC does not send again what a stream has carried.
// Whoever asked does, and counts that as another attempt; while gRPC waits for a
// connection to do so it would hold up everybody who sends.
func TestStreamsAreNotReplayed(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	var group sync.WaitGroup
	defer group.Wait()
	defer l.Close()
	attempts := make(chan uint32, 1000)
	group.Go(func() {
		for {
			conn, err := l.Accept()
			if err != nil {
				return
			}
			group.Go(func() { refusing(conn, func(a *pb.AcquireRequest) { attempts <- a.GetAttempt() }) })
		}
	})
	c, err := client.New([]string{l.Addr().String()})
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
	defer cancel()
	done := make(chan struct{})
	go func() {
		defer close(done)
		c.Acquire(ctx, "a")
	}()
	seen := make(map[uint32]bool)
	for len(seen) < 3 {
		select {
		case a := <-attempts:
			if seen[a] {
				t.Fatalf("attempt %d was sent twice", a)
			}
			seen[a] = true
		case <-ctx.Done():
			t.Fatalf("only %d attempts", len(seen))
		}
	}
	cancel()
	<-done
}
