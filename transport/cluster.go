package transport

import (
	"bufio"
	"context"
	"sync/atomic"

	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/distlock/distlock/internal/bound"
	"github.com/distlock/distlock/lease"
	pb "github.com/distlock/distlock/proto/distlock/v1"
)

// clusterID is which cluster this is. Once that is settled it does not change, and
// nobody is asked again: answers to renewals carry it.
type clusterID struct {
	node  func() Node
	known atomic.Pointer[string]
}

// get returns the id: "" where nothing is kept on disk, and on a follower of a new
// cluster that has not heard of it yet. Only the second may still change: settled is
// false.
func (c *clusterID) get() (id string, settled bool) {
	if id := c.known.Load(); id != nil {
		return *id, true
	}
	n := c.node()
	if settled = n.ClusterID != "" || n.InMemory; settled {
		c.known.Store(&n.ClusterID)
	}
	return n.ClusterID, settled
}

type clusterService struct {
	pb.UnimplementedClusterServiceServer
	m       Manager
	node    func() Node
	cluster Cluster
	work    workers
	backups bound.Count // under way
}

// Status is answered by each node, leader or not, from what it has.
func (s *clusterService) Status(ctx context.Context, _ *pb.StatusRequest) (*pb.StatusResponse, error) {
	st, node := s.m.Status(), s.node()
	out := &pb.StatusResponse{
		Version: node.Version, NodeId: node.ID, ClusterId: node.ClusterID, Term: st.Term, Revision: st.Revision,
		LastToken: st.LastToken, Leases: int64(st.Leases), Locks: int64(st.Locks), Waiters: int64(st.Waiters),
		InMemory: node.InMemory, StartedAt: timestamppb.New(node.StartedAt), Level: uint32(st.Level),
	}
	if r := node.Restored; r != nil {
		out.Restored = &pb.Restored{
			At: timestamppb.New(r.At), BackupAt: timestamppb.New(r.BackupAt), ClusterId: r.ClusterID, TokensAbove: uint64(r.TokensAbove),
		}
	}
	if s.cluster == nil {
		out.Leader = node.ID
		out.Members = []*pb.Member{{Id: node.ID, ClientAddress: node.ClientAddress, Role: lease.RoleVoter, Leader: true, Healthy: true}}
		return out, nil
	}
	var list []lease.Member
	s.work.yield(ctx, func() { list, out.Leader, out.Term = s.cluster.Members() })
	for _, m := range list {
		out.Members = append(out.Members, &pb.Member{
			Id: m.ID, ClientAddress: m.ClientAddress, PeerAddress: m.PeerAddress, Role: m.Role, Leader: m.Leader,
			Healthy: m.Healthy, AppliedIndex: m.AppliedIndex, Incarnation: m.Incarnation,
		})
	}
	return out, nil
}

// change makes one change of the members. It gives the worker back meanwhile.
func (s *clusterService) change(ctx context.Context, fn func(Cluster) error) (err error) {
	if s.cluster == nil {
		return &lease.MemberError{Msg: "a server that keeps nothing on disk is alone; start it without --in-memory"}
	}
	s.work.yield(ctx, func() { err = fn(s.cluster) })
	return err
}

func (s *clusterService) AddMember(ctx context.Context, r *pb.AddMemberRequest) (*pb.AddMemberResponse, error) {
	out := &pb.AddMemberResponse{}
	return out, s.change(ctx, func(c Cluster) (err error) {
		out.ClusterId, err = c.AddMember(r.GetId(), r.GetPeerAddress(), r.GetClusterId())
		return err
	})
}

func (s *clusterService) PromoteMember(ctx context.Context, r *pb.PromoteMemberRequest) (*pb.PromoteMemberResponse, error) {
	return &pb.PromoteMemberResponse{}, s.change(ctx, func(c Cluster) error { return c.PromoteMember(r.GetId()) })
}

func (s *clusterService) RemoveMember(ctx context.Context, r *pb.RemoveMemberRequest) (*pb.RemoveMemberResponse, error) {
	return &pb.RemoveMemberResponse{}, s.change(ctx, func(c Cluster) error { return c.RemoveMember(r.GetId()) })
}

func (s *clusterService) TransferLeadership(ctx context.Context, r *pb.TransferLeadershipRequest) (*pb.TransferLeadershipResponse, error) {
	out := &pb.TransferLeadershipResponse{}
	return out, s.change(ctx, func(c Cluster) (err error) {
		out.Leader, err = c.TransferLeadership(r.GetId())
		return err
	})
}

const (
	// backupChunk is about how much of a backup one message carries.
	backupChunk = 256 << 10
	// maxBackups bounds those under way: each keeps everything in memory as it was
	// when it began, for as long as its client takes to read it.
	maxBackups = 2
)

func (s *clusterService) Backup(_ *pb.BackupRequest, stream pb.ClusterService_BackupServer) error {
	if s.cluster == nil {
		return &lease.MemberError{Msg: "a server that keeps nothing on disk has nothing to back up"}
	}
	if !s.backups.Enter(maxBackups) {
		return &lease.ExhaustedError{What: "backups at once", Max: maxBackups}
	}
	defer s.backups.Leave()
	w := bufio.NewWriterSize(chunks{stream}, backupChunk)
	if err := s.cluster.Backup(w); err != nil {
		return err
	}
	return w.Flush()
}

// chunks sends what is written to it.
type chunks struct {
	stream pb.ClusterService_BackupServer
}

// Write implements io.Writer. The message has been encoded when it returns.
func (c chunks) Write(p []byte) (int, error) {
	if err := sendingOf(c.stream.Context()).reserve(c.stream.Context(), int64(len(p))); err != nil {
		return 0, err
	}
	if err := c.stream.Send(&pb.BackupResponse{Chunk: p}); err != nil {
		return 0, err
	}
	return len(p), nil
}
