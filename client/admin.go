package client

import (
	"context"
	"errors"
	"io"
	"iter"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"

	"github.com/distlock/distlock/fence"
	pb "github.com/distlock/distlock/proto/distlock/v1"
)

// Admin is what operators do: leases and holds by number, whoever made them, and the
// cluster. It is safe for concurrent use.
type Admin struct{ c *Client }

// Admin returns the client's administration.
func (c *Client) Admin() Admin { return Admin{c} }

// Grant makes a lease that nobody keeps alive yet, and returns its id.
func (a Admin) Grant(ctx context.Context, ttl time.Duration, opts ...GrantOption) (uint64, error) {
	id, _, err := a.c.grant(ctx, ttl, opts)
	return id, err
}

// Release gives back a hold by name and token, whoever acquired it.
func (a Admin) Release(ctx context.Context, name string, token fence.Token) error {
	_, err := a.c.operate(ctx, releaseOperation(&pb.ReleaseRequest{Name: name, Token: uint64(token)}))
	return err
}

// ForceRelease breaks the hold with token on a lock, or every hold when token
// is 0. by is shown to the holder; "" is the client's owner.
func (a Admin) ForceRelease(ctx context.Context, name string, token fence.Token, by string) error {
	if by == "" {
		by = a.c.owner
	}
	_, err := a.c.operate(ctx, &pb.Operation{Call: &pb.Operation_ForceRelease{
		ForceRelease: &pb.ForceReleaseRequest{Name: name, Token: uint64(token), By: by},
	}})
	return err
}

// Lease shows a lease. Errors: ErrLeaseGone.
func (a Admin) Lease(ctx context.Context, id uint64, opts ...ReadOption) (LeaseInfo, error) {
	var resp *pb.GetLeaseResponse
	err := a.c.call(ctx, func(ctx context.Context, conn *grpc.ClientConn) (err error) {
		resp, err = leasesOf(conn).Get(ctx, &pb.GetLeaseRequest{LeaseId: id, Consistency: consistency(opts)})
		return err
	})
	return leaseInfo(resp.GetLease()), err
}

// Leases shows all leases in order of id.
func (a Admin) Leases(ctx context.Context, opts ...ReadOption) iter.Seq2[LeaseInfo, error] {
	return func(yield func(LeaseInfo, error) bool) {
		pages(yield, func(token string) (list []LeaseInfo, next string, err error) {
			req := &pb.ListLeasesRequest{PageSize: pageSize, PageToken: token, Consistency: consistency(opts)}
			err = a.c.call(ctx, func(ctx context.Context, conn *grpc.ClientConn) error {
				resp, err := leasesOf(conn).List(ctx, req)
				list, next = each(resp.GetLeases(), leaseInfo), resp.GetNextPageToken()
				return err
			})
			return list, next, err
		})
	}
}

// KeepAlive renews leases once and returns the TTL of each, counted from the
// server's receipt. The first that is gone is the error.
func (a Admin) KeepAlive(ctx context.Context, ids ...uint64) ([]time.Duration, error) {
	answer, err := a.c.operate(ctx, &pb.Operation{Call: &pb.Operation_KeepAlive{KeepAlive: &pb.KeepAliveRequest{LeaseIds: ids}}})
	if err != nil {
		return nil, err
	}
	results := answer.GetKeepAlive().GetResults()
	ttls := make([]time.Duration, len(results))
	for i, r := range results {
		if p := r.GetProblem(); p != nil {
			return nil, goneError(p)
		}
		ttls[i] = r.GetTtl().AsDuration()
	}
	return ttls, nil
}

func goneError(p *pb.Problem) error {
	e := &Error{Reason: p.GetReason(), Code: codes.NotFound}
	e.problem(p)
	lost := &LostError{Cause: e.Cause, By: e.By, LeaseID: e.LeaseID}
	if e.Message = lost.Error(); e.Cause == "" {
		e.Message = "there is no such lease"
	}
	return e
}

// Revoke ends a lease; its holds are lost. by is shown to the holder.
func (a Admin) Revoke(ctx context.Context, id uint64, by string) error {
	if by == "" {
		by = a.c.owner
	}
	_, err := a.c.operate(ctx, &pb.Operation{Call: &pb.Operation_Revoke{Revoke: &pb.RevokeRequest{LeaseId: id, By: by}}})
	return err
}

// Status asks the server how it is.
func (a Admin) Status(ctx context.Context) (Status, error) {
	var r *pb.StatusResponse
	err := a.c.call(ctx, func(ctx context.Context, conn *grpc.ClientConn) (err error) {
		r, err = pb.NewClusterServiceClient(conn).Status(ctx, &pb.StatusRequest{})
		return err
	})
	return statusOf(r), err
}

func statusOf(r *pb.StatusResponse) Status {
	s := Status{
		Version: r.GetVersion(), NodeID: r.GetNodeId(), ClusterID: r.GetClusterId(), Leader: r.GetLeader(),
		Term: r.GetTerm(), Revision: r.GetRevision(), LastToken: fence.Token(r.GetLastToken()),
		Leases: r.GetLeases(), Locks: r.GetLocks(), Waiters: r.GetWaiters(), InMemory: r.GetInMemory(),
		StartedAt: timeOf(r.GetStartedAt()), Level: r.GetLevel(),
		Members: each(r.GetMembers(), func(m *pb.Member) Member {
			return Member{
				ID: m.GetId(), ClientAddress: m.GetClientAddress(), PeerAddress: m.GetPeerAddress(), Role: m.GetRole(),
				Leader: m.GetLeader(), Healthy: m.GetHealthy(), AppliedIndex: m.GetAppliedIndex(), Incarnation: m.GetIncarnation(),
			}
		}),
	}
	if x := r.GetRestored(); x != nil {
		s.Restored = &Restored{
			At: timeOf(x.GetAt()), BackupAt: timeOf(x.GetBackupAt()), ClusterID: x.GetClusterId(), TokensAbove: fence.Token(x.GetTokensAbove()),
		}
	}
	return s
}

func clusterOf(conn *grpc.ClientConn) pb.ClusterServiceClient {
	return pb.NewClusterServiceClient(conn)
}

// AddMember makes a node that waits for it a learner of the cluster, or records
// that a member, stopped, has moved to another peer address. Errors:
// ErrMembership.
func (a Admin) AddMember(ctx context.Context, id, peerAddress string) error {
	return a.c.call(ctx, func(ctx context.Context, conn *grpc.ClientConn) error {
		_, err := clusterOf(conn).AddMember(ctx, &pb.AddMemberRequest{Id: id, PeerAddress: peerAddress})
		return err
	})
}

// PromoteMember gives a learner that has caught up its vote. Errors:
// ErrMembership.
func (a Admin) PromoteMember(ctx context.Context, id string) error {
	return a.c.call(ctx, func(ctx context.Context, conn *grpc.ClientConn) error {
		_, err := clusterOf(conn).PromoteMember(ctx, &pb.PromoteMemberRequest{Id: id})
		return err
	})
}

// RemoveMember takes a node out of the cluster. Errors: ErrMembership.
func (a Admin) RemoveMember(ctx context.Context, id string) error {
	return a.c.call(ctx, func(ctx context.Context, conn *grpc.ClientConn) error {
		_, err := clusterOf(conn).RemoveMember(ctx, &pb.RemoveMemberRequest{Id: id})
		return err
	})
}

// TransferLeadership makes another voter lead, id or whichever is furthest,
// and returns who does. Which one is decided once, before it is asked for, so
// that a repeat after a lost answer moves the leadership no further. Errors:
// ErrMembership.
func (a Admin) TransferLeadership(ctx context.Context, id string) (leader string, err error) {
	if id == "" {
		s, err := a.Status(ctx)
		if err != nil {
			return "", err
		}
		id = successor(s)
	}
	err = a.c.call(ctx, func(ctx context.Context, conn *grpc.ClientConn) error {
		r, err := clusterOf(conn).TransferLeadership(ctx, &pb.TransferLeadershipRequest{Id: id})
		leader = r.GetLeader()
		return err
	})
	return leader, err
}

// successor is the healthy voter that is furthest, beside the leader; "" where
// there is none, or no leader: the server says so.
func successor(s Status) string {
	var best Member
	for _, m := range s.Members {
		if s.Leader != "" && m.ID != s.Leader && m.Healthy && m.Role == "voter" && (best.ID == "" || m.AppliedIndex > best.AppliedIndex) {
			best = m
		}
	}
	return best.ID
}

// Backup writes a backup of everything to w, as of a moment after the call
// began. When it fails, w has a part of one that does not restore.
func (a Admin) Backup(ctx context.Context, w io.Writer) error {
	begun := false
	return a.c.retry(ctx, 0, func(ctx context.Context, conn *grpc.ClientConn) error {
		stream, err := clusterOf(conn).Backup(ctx, &pb.BackupRequest{})
		if err != nil {
			return err
		}
		for {
			r, err := stream.Recv()
			switch {
			case errors.Is(err, io.EOF):
				return nil
			case err != nil && begun:
				return &Error{Code: codes.Aborted, Message: "the backup broke off: " + toError(err).Message}
			case err != nil:
				return err
			}
			begun = true
			if _, err := w.Write(r.GetChunk()); err != nil {
				return &Error{Code: codes.Aborted, Message: "the backup cannot be written: " + err.Error()}
			}
		}
	})
}
