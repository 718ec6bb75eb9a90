package transport

import (
	"net"
	"sync/atomic"
	"testing"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/distlock/distlock/internal/bound"
	pb "github.com/distlock/distlock/proto/distlock/v1"
)

// TestConnectionsAreBounded: a call on a connection too many is told why, more
// of them than can be told are closed, and whoever leaves makes room.
func TestConnectionsAreBounded(t *testing.T) {
	var told atomic.Int64
	r := serve(t, Config{Manager: running(t), MaxConnections: 2, Refused: func(reason string) {
		if reason == ReasonExhausted {
			told.Add(1)
		}
	}})
	get := func(locks pb.LockServiceClient) error {
		_, err := locks.Get(t.Context(), &pb.GetRequest{Name: "a"})
		return err
	}
	if err := get(r.locks()); status.Code(err) == codes.ResourceExhausted {
		t.Fatal(err)
	}
	idle, err := net.Dial("tcp", r.address)
	if err != nil {
		t.Fatal(err)
	}
	defer idle.Close()
	conn := dial(t, r.address)
	defer conn.Close()
	third := pb.NewLockServiceClient(conn)
	err = get(third)
	if status.Code(err) != codes.ResourceExhausted || reasonOf(err) != ReasonExhausted {
		t.Errorf("the third connection: %v", err)
	}
	if told.Load() != 1 {
		t.Errorf("counted %d times", told.Load())
	}
	if err := get(r.locks()); status.Code(err) == codes.ResourceExhausted {
		t.Errorf("the first connection: %v", err)
	}
	var rest []net.Conn
	for range bound.RefusedAtMost + 1 {
		c, err := net.Dial("tcp", r.address)
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		rest = append(rest, c)
	}
	last := rest[len(rest)-1]
	last.SetReadDeadline(time.Now().Add(20 * time.Second))
	for buf := make([]byte, 100); ; {
		if _, err := last.Read(buf); err != nil {
			if ne, ok := err.(net.Error); ok && ne.Timeout() {
				t.Error("the last one is left open")
			}
			break
		}
	}
	idle.Close()
	for until := time.Now().Add(20 * time.Second); ; {
		if err = get(third); status.Code(err) != codes.ResourceExhausted && status.Code(err) != codes.Unavailable {
			break
		}
		if time.Now().After(until) {
			t.Fatalf("there is no room: %v", err)
		}
	}
}
