package transport

import (
	"net"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/keepalive"

	"github.com/distlock/distlock/internal/bound"
	"github.com/distlock/distlock/lease"
)

// refuseWithin is how long a connection lasts for which there is no room.
const refuseWithin = time.Second

// refusing answers every call on connections for which there is no room, for a
// moment, so that their clients learn why.
type refusing struct {
	server *grpc.Server
	conns  *bound.Handed
}

func newRefusing(most int, refused func(reason string)) *refusing {
	err := &lease.ExhaustedError{What: "connections", Max: most}
	reason, _ := describe(err)
	r := &refusing{conns: bound.NewHanded(&net.TCPAddr{})}
	r.server = grpc.NewServer(
		grpc.UnknownServiceHandler(func(any, grpc.ServerStream) error {
			refused(reason)
			return toStatus(err)
		}),
		grpc.ConnectionTimeout(refuseWithin), grpc.MaxConcurrentStreams(8), grpc.MaxHeaderListSize(16<<10),
		grpc.ReadBufferSize(4<<10), grpc.WriteBufferSize(4<<10),
		grpc.KeepaliveParams(keepalive.ServerParameters{MaxConnectionAge: refuseWithin, MaxConnectionAgeGrace: refuseWithin}),
	)
	return r
}
