package server

import (
	"context"
	"errors"
	"fmt"
	"time"

	"go.uber.org/zap"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"

	"github.com/distlock/distlock/lease"
	pb "github.com/distlock/distlock/proto/distlock/v1"
)

// member is a server that others elect, or that forwards to the one they have
// elected.
type member struct{ *Server }

func (s member) start(all *parts, stopping, loop context.Context) {
	all.start(s.serve)
	all.start(func() error { return s.transport.ServePeers(s.replica.Forwarded()) })
	all.start(func() error { s.tellWhetherServing(stopping, loop); return nil })
	all.start(func() error { return s.join(loop) })
}

func (s member) fields() []zap.Field {
	return []zap.Field{zap.String("node", s.replica.NodeID()), zap.String("peerAddress", s.cfg.PeerAddress)}
}

// tellWhetherServing has the health service say that this member serves while it is
// known who leads, until it is to stop; it ends with loop.
func (s member) tellWhetherServing(stopping, loop context.Context) {
	for stopping.Err() == nil {
		_, led, err := s.replica.Leader(loop, 0)
		if err != nil {
			return
		}
		s.transport.SetServing(stopping.Err() == nil)
		select {
		case <-led.Done():
			s.transport.SetServing(false)
		case <-stopping.Done():
		case <-loop.Done():
			return
		}
	}
}

// handOver hands the leadership over, if this node has it, unless that takes too
// long.
func (s member) handOver(ctx context.Context) {
	done := make(chan error, 1)
	go func() {
		_, err := s.replica.TransferLeadership("")
		done <- err
	}()
	select {
	case err := <-done:
		if err != nil && !errors.Is(err, lease.ErrNotLeader) {
			s.cfg.Logger.Info("the leadership was not handed over", zap.Error(err))
		}
	case <-ctx.Done():
		s.cfg.Logger.Warn("the leadership was not handed over in time")
	}
}

// betweenJoins is how long a node waits before it asks the cluster again.
const betweenJoins = 200 * time.Millisecond

// join makes this node the member that its flags say: it has itself added as
// a learner, and asks for its vote once it has caught up. It ends once all is
// so, or with ctx; it fails when the cluster says no for good.
func (s member) join(ctx context.Context) error {
	said, added := "", false
	say := func(what string, err error) {
		if line := what + err.Error(); line != said {
			said = line
			s.cfg.Logger.Info(what, zap.Error(err))
		}
	}
	for {
		role := s.replica.Role()
		switch {
		case role == "" && s.cfg.Join != "" && !added: // once: whoever removes it meanwhile means it
			err := s.askToJoin(ctx)
			if added = err == nil; !added {
				switch status.Code(err) {
				case codes.FailedPrecondition, codes.InvalidArgument, codes.Unimplemented:
					return fmt.Errorf("cannot join the cluster at %s: %s", s.cfg.Join, status.Convert(err).Message())
				}
				say("cannot join yet: ", fmt.Errorf("%s: %s", s.cfg.Join, status.Convert(err).Message()))
			}
		case role == "":
		case role == lease.RoleLearner && s.cfg.Join != "" && !s.cfg.Learner:
			if err := s.askLeader(ctx, func(c pb.ClusterServiceClient) error {
				_, err := c.PromoteMember(ctx, &pb.PromoteMemberRequest{Id: s.replica.MemberID()})
				return err
			}); err == nil {
				s.cfg.Logger.Info("joined as a voter", zap.String("cluster", s.replica.ClusterID()))
			}
		default:
			return nil
		}
		select {
		case <-ctx.Done():
			return nil
		case <-time.After(betweenJoins):
		}
	}
}

// askToJoin has this node added, through the member that the flags name.
func (s member) askToJoin(ctx context.Context) error {
	conn, err := grpc.NewClient("passthrough:///"+s.cfg.Join, grpc.WithTransportCredentials(insecure.NewCredentials()), grpc.WithDisableServiceConfig())
	if err != nil {
		return err
	}
	defer conn.Close()
	ctx, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	resp, err := pb.NewClusterServiceClient(conn).AddMember(ctx, &pb.AddMemberRequest{
		Id: s.replica.MemberID(), PeerAddress: s.cfg.PeerAddress, ClusterId: s.replica.ClusterID(),
	})
	if err != nil {
		return err
	}
	return s.replica.Joined(resp.GetClusterId())
}

// askLeader makes a call at the leader, if another node leads.
func (s member) askLeader(ctx context.Context, call func(pb.ClusterServiceClient) error) error {
	conn, _, err := s.replica.Leader(ctx, 0)
	if err != nil || conn == nil { // this node leads: the replica sees to it
		return err
	}
	return call(pb.NewClusterServiceClient(conn))
}
