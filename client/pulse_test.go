package client_test

import (
	"net"
	"testing"

	"github.com/distlock/distlock/client"
	"github.com/distlock/distlock/client/clienttest"
)

// A server that has stopped, and whose kernel still takes connections, is
// turned away from also by calls that are not on the stream.
func TestCallsLeaveASilentServer(t *testing.T) {
	s := clienttest.Start(t)
	silent, err := net.Listen("tcp", "127.0.0.1:0") // nobody accepts
	if err != nil {
		t.Fatal(err)
	}
	defer silent.Close()
	c, err := client.New([]string{silent.Addr().String(), s.Endpoint}, client.WithUnary())
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	l, err := c.Acquire(t.Context(), "a")
	if err != nil {
		t.Fatal(err)
	}
	l.Release(t.Context())
}
