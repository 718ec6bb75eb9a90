package replica

import (
	"context"
	"errors"
	"fmt"
	"net"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/hashicorp/raft"
	"go.uber.org/zap"

	"github.com/distlock/distlock/lease"
)

// Members asks every member how it is, with the name of the leader if it is
// known, and this node's term. A member is healthy that answers and has caught
// up. Any node answers.
func (r *Replica) Members() (list []lease.Member, leader string, term uint64) {
	known := r.known()
	servers := r.configuration().servers.Servers
	list = make([]lease.Member, len(servers))
	var group sync.WaitGroup
	for i, s := range servers {
		m := &list[i]
		*m = lease.Member{PeerAddress: string(s.Address), Role: lease.RoleVoter, Leader: s.ID == known.id}
		m.ID, m.Incarnation = split(s.ID)
		if s.Suffrage != raft.Voter {
			m.Role = lease.RoleLearner
		}
		if s.ID == r.self {
			m.PeerAddress = r.cfg.PeerAddress
			m.ClientAddress, m.Healthy, m.AppliedIndex = r.cfg.ClientAddress, true, r.raft.AppliedIndex()
			continue
		}
		if r.peers == nil {
			continue
		}
		group.Add(1)
		go func() {
			defer group.Done()
			if about, err := r.about(endOf(s), time.Second); err == nil {
				m.ClientAddress, m.Healthy, m.AppliedIndex = about.GetClientAddress(), true, about.GetAppliedIndex()
			}
		}()
	}
	group.Wait()
	furthest := uint64(0)
	for _, m := range list {
		furthest = max(furthest, m.AppliedIndex)
	}
	near := r.near()
	for i := range list { // who answers and is far behind is no help yet
		list[i].Healthy = list[i].Healthy && list[i].AppliedIndex+near >= furthest
	}
	slices.SortFunc(list, func(a, b lease.Member) int { return strings.Compare(a.ID, b.ID) })
	return list, nameOf(known.id), r.raft.CurrentTerm()
}

// refused makes the error of a change of the membership that is turned down; id is ""
// when it is about no member.
func refused(id, msg string) error { return &lease.MemberError{ID: id, Msg: msg} }

// AddMember makes a node a learner, or records that a member has moved to
// another peer address. id is the node's name, or its name and incarnation,
// which it tells when it asks for itself. cluster is the node's own cluster
// id, if it has one. It returns the cluster's id. Errors: ErrNotLeader,
// *lease.MemberError.
func (r *Replica) AddMember(id, peerAddress, cluster string) (string, error) {
	name := nameOf(raft.ServerID(id))
	if err := checkName(name); err != nil {
		return "", refused(id, err.Error())
	}
	if _, _, err := net.SplitHostPort(peerAddress); err != nil {
		return "", refused(name, "its peer address must be HOST:PORT")
	}
	return r.ClusterID(), r.change(func() error {
		if ours := r.ClusterID(); cluster != "" && cluster != ours {
			return refused(name, fmt.Sprintf("its data directory is of cluster %s, this is cluster %s; start it with an empty one", cluster, ours))
		}
		c := r.configuration()
		member, found := named(c.servers, name)
		switch {
		case found && id != name && member.ID != raft.ServerID(id):
			return refused(name, fmt.Sprintf("it is a member with another data directory: if that is lost, distlock cluster remove %s first", name))
		case found && string(member.Address) == peerAddress:
			return nil
		}
		for _, s := range c.servers.Servers {
			if string(s.Address) == peerAddress {
				return refused(name, fmt.Sprintf("%s is the peer address of %s", peerAddress, nameOf(s.ID)))
			}
		}
		if err := r.quorumOf(voters(c.servers), name); err != nil {
			return err
		}
		if found {
			return r.moved(member, peerAddress, c.index)
		}
		node := end{raft.ServerID(id), peerAddress}
		if id == name { // somebody speaks for the node: ask it who it is
			var err error
			if node.id, err = r.peers.whoIs(name, peerAddress); err != nil {
				return refused(name, fmt.Sprintf("it does not answer at %s as a node that waits to be added: start it there with --join (%v)", peerAddress, err))
			}
		}
		if err := r.knowsLevel(node); err != nil {
			return err
		}
		return r.raft.AddNonvoter(node.id, raft.ServerAddress(peerAddress), c.index, changeWithin).Error()
	})
}

// moved records another peer address of a member, which must have left the old
// one: else two processes would speak for it.
func (r *Replica) moved(member raft.Server, peerAddress string, prev uint64) error {
	name := nameOf(member.ID)
	if member.ID != r.self {
		if _, err := r.about(endOf(member), time.Second); err == nil {
			return refused(name, fmt.Sprintf("it answers at %s: stop it there first", member.Address))
		}
	}
	if member.Suffrage == raft.Voter {
		return r.raft.AddVoter(member.ID, raft.ServerAddress(peerAddress), prev, changeWithin).Error()
	}
	return r.raft.AddNonvoter(member.ID, raft.ServerAddress(peerAddress), prev, changeWithin).Error()
}

// PromoteMember gives a learner that has caught up its vote. Errors:
// ErrNotLeader, *lease.MemberError.
func (r *Replica) PromoteMember(id string) error {
	return r.change(func() error {
		c := r.configuration()
		s, ok := named(c.servers, id)
		switch {
		case !ok:
			return refused(id, "there is no such member; add it first")
		case s.Suffrage == raft.Voter:
			return nil
		}
		about, err := r.about(endOf(s), time.Second)
		if err != nil {
			return refused(id, fmt.Sprintf("it does not answer at %s; promote it once it runs", s.Address))
		}
		if err := r.knowsLevel(endOf(s)); err != nil {
			return err
		}
		if last := r.raft.LastIndex(); about.GetAppliedIndex()+r.near() < last {
			return refused(id, fmt.Sprintf("it is %d log entries behind; promote it once it has caught up", last-about.GetAppliedIndex()))
		}
		if err := r.quorumOf(append(voters(c.servers), s), id); err != nil {
			return err
		}
		return r.raft.AddVoter(s.ID, s.Address, c.index, changeWithin).Error()
	})
}

// quorumOf refuses a change of the membership after which nothing could be
// committed: unless a majority of the voters that there would be, this node
// among them, answers in this term and has nearly all of the log. One of them
// may still be lost a moment later.
func (r *Replica) quorumOf(next []raft.Server, id string) error {
	live := r.live(next, func(live map[raft.ServerID]uint64) bool { return len(live) > len(next)/2 })
	if len(live) > len(next)/2 {
		return nil
	}
	var silent []string
	for _, s := range next {
		if _, ok := live[s.ID]; !ok {
			silent = append(silent, nameOf(s.ID))
		}
	}
	return refused(id, fmt.Sprintf("only %d of the %d voters that there would be answer and have caught up, and nothing could be granted: bring back or remove %s first",
		len(live), len(next), strings.Join(silent, ", ")))
}

// live asks servers how they are. For each that answers in this node's term and has
// caught up (which only the leader can tell) it returns the last index of that one's
// log. Until there are enough of them it asks again for a while: just after an
// election some have not heard of the term.
func (r *Replica) live(servers []raft.Server, enough func(map[raft.ServerID]uint64) bool) map[raft.ServerID]uint64 {
	for until := time.Now().Add(askLiveWithin); ; {
		live := r.liveNow(servers)
		if enough(live) || time.Now().After(until) {
			return live
		}
		select {
		case <-time.After(askLiveWithin / 20):
		case <-r.closing:
			return live
		}
	}
}

const askLiveWithin = time.Second

func (r *Replica) liveNow(servers []raft.Server) map[raft.ServerID]uint64 {
	var mu sync.Mutex
	live := make(map[raft.ServerID]uint64)
	term, last, near := r.raft.CurrentTerm(), r.raft.LastIndex(), r.near()
	var group sync.WaitGroup
	for _, s := range servers {
		if s.ID == r.self {
			mu.Lock()
			live[s.ID] = last
			mu.Unlock()
			continue
		}
		group.Go(func() {
			about, err := r.about(endOf(s), time.Second)
			if err == nil && about.GetTerm() == term && about.GetLastIndex()+near >= last {
				mu.Lock()
				live[s.ID] = about.GetLastIndex()
				mu.Unlock()
			}
		})
	}
	group.Wait()
	return live
}

// A member that is no further behind than this has caught up: under load some batches
// of up to 4 MiB are always on their way.
const (
	caughtUp      = 1000 // entries
	caughtUpBytes = 8 << 20
)

// near is the same as a number of entries.
func (r *Replica) near() uint64 { return uint64(min(caughtUp, r.disk.sizes.within(caughtUpBytes))) }

// RemoveMember takes a node out of the cluster. A leader that is to remove
// itself hands over first, and answers ErrNotLeader: ask the next one. Errors:
// ErrNotLeader, *lease.MemberError.
func (r *Replica) RemoveMember(id string) error {
	return r.change(func() error {
		c := r.configuration()
		s, ok := named(c.servers, id)
		if !ok {
			return nil
		}
		if s.Suffrage == raft.Voter && r.voters() == 1 {
			return refused(id, "it is the only voter")
		}
		if s.ID == r.self {
			if _, err := r.transfer(""); err != nil {
				return err
			}
			return r.notLeader()
		}
		next := slices.DeleteFunc(voters(c.servers), func(v raft.Server) bool { return v.ID == s.ID })
		if err := r.quorumOf(next, id); err != nil {
			return err
		}
		if err := r.raft.RemoveServer(s.ID, c.index, changeWithin).Error(); err != nil {
			return err
		}
		r.logger.Info("removed a member", zap.String("node", id))
		return nil
	})
}

// TransferLeadership makes another voter lead: id, or if that is "" the voter whose log
// is longest.
// It returns who leads. Errors: ErrNotLeader, *lease.MemberError.
func (r *Replica) TransferLeadership(id string) (leader string, err error) {
	if r.raft.State() != raft.Leader {
		return "", r.notLeader()
	}
	if r.stalled.Load() { // raft's loop is behind it
		return "", refused("", "the disk of the leader stalls")
	}
	if id == r.nodeID || id == string(r.self) {
		return r.nodeID, nil
	}
	r.members.Lock()
	defer r.members.Unlock()
	return r.transfer(id)
}

// transfer hands over to a voter that answers and has caught up, and to no
// other: raft would keep every change waiting for one that does not.
func (r *Replica) transfer(id string) (string, error) {
	others := slices.DeleteFunc(voters(r.configuration().servers), func(s raft.Server) bool { return s.ID == r.self })
	if len(others) == 0 {
		return "", refused("", "there is no other voter to lead")
	}
	if id != "" {
		others = slices.DeleteFunc(others, func(s raft.Server) bool { return string(s.ID) != id && nameOf(s.ID) != id })
		if len(others) == 0 {
			return "", refused(id, "there is no such voter")
		}
	}
	live := r.live(others, func(live map[raft.ServerID]uint64) bool { return len(live) > 0 })
	var to raft.Server
	for _, s := range others { // the furthest
		if last, ok := live[s.ID]; ok && !r.peers.silent(s.ID) && (to.ID == "" || last > live[to.ID]) {
			to = s
		}
	}
	switch {
	case to.ID == "" && id != "":
		return "", refused(id, "it does not answer, or has not caught up: it cannot lead now")
	case to.ID == "":
		return "", refused("", "no other voter answers and has caught up")
	}
	r.prepareHandOver()
	defer r.setLeaving(nil)
	r.transferring.Store(true)
	defer r.transferring.Store(false)
	future := r.raft.LeadershipTransferToServer(to.ID, to.Address)
	if err := future.Error(); err != nil {
		if errors.Is(err, raft.ErrNotLeader) {
			return "", r.notLeader()
		}
		return "", refused(nameOf(to.ID), fmt.Sprintf("the leadership could not be handed over: %v", err))
	}
	// Raft is done when the other has been told; wait until it leads.
	ctx, cancel := context.WithTimeout(context.Background(), changeWithin)
	defer cancel()
	for {
		news, l := r.heard(), r.known()
		if l.id != "" && l.id != r.self {
			return nameOf(l.id), nil
		}
		select {
		case <-news:
		case <-ctx.Done():
			return "", refused(id, "the leadership was handed over, and nobody is known to lead yet")
		case <-r.closing:
			return "", r.notLeader()
		}
	}
}

// changeWithin bounds how long a change of the membership waits to begin.
const changeWithin = 5 * time.Second

// change makes one change of the membership at a time, on the leader.
func (r *Replica) change(fn func() error) error {
	if r.peers == nil {
		return refused("", "this node has no peer address: restart it with --node-id and --peer-address to make it a member of a cluster")
	}
	if r.raft.State() != raft.Leader {
		return r.notLeader()
	}
	r.members.Lock()
	defer r.members.Unlock()
	err := fn()
	switch {
	case errors.Is(err, raft.ErrNotLeader), errors.Is(err, raft.ErrLeadershipTransferInProgress):
		return r.notLeader()
	case errors.Is(err, raft.ErrLeadershipLost), errors.Is(err, raft.ErrRaftShutdown), errors.Is(err, raft.ErrEnqueueTimeout):
		return fmt.Errorf("%w: %w", lease.ErrOutcomeUnknown, err)
	case err != nil && strings.Contains(err.Error(), "configuration changed since"): // raft has no type for it
		return refused("", "the members have changed meanwhile: look at them again")
	}
	return err
}

// notLeader says where the leader is, if it is known.
func (r *Replica) notLeader() error {
	l := r.known()
	if l.id == r.self {
		l.client = ""
	}
	return &lease.NotLeaderError{Hint: l.client}
}

func (r *Replica) server(id raft.ServerID) (raft.Server, bool) {
	for _, s := range r.configuration().servers.Servers {
		if s.ID == id {
			return s, true
		}
	}
	return raft.Server{}, false
}

// Role is this node's role: voter, learner, or "" while it is no member.
func (r *Replica) Role() string {
	s, ok := r.server(r.self)
	switch {
	case !ok:
		return ""
	case s.Suffrage == raft.Voter:
		return lease.RoleVoter
	}
	return lease.RoleLearner
}

// Joined records the cluster that has taken this node in.
func (r *Replica) Joined(cluster string) error {
	return r.saveIdentity(func(id *identity) {
		if id.ClusterID == "" {
			id.ClusterID = cluster
		}
	})
}

// askWhetherRemoved asks the members that this node knows whether it is still
// one of them.
func (r *Replica) askWhetherRemoved() {
	for _, s := range r.configuration().servers.Servers {
		if s.ID != r.self {
			r.hearRemoval(r.peers.probe(endOf(s), time.Second))
		}
	}
}

// hearRemoval looks at what a member said to this one's greeting, and stops
// this node if it has been removed. A member that knows only an older
// configuration than this node is behind.
func (r *Replica) hearRemoval(err error) {
	var removed *removedError
	if !errors.As(err, &removed) {
		return
	}
	latest := r.configuration()
	_, ours := r.server(r.self)
	if len(latest.servers.Servers) == 0 || removed.index < latest.index || removed.index == latest.index && ours {
		return
	}
	if err := r.saveIdentity(func(id *identity) { id.Removed = true }); err != nil {
		r.logger.Warn("cannot record the removal", zap.Error(err))
	}
	r.fail(excluded{&RemovedError{NodeID: r.nodeID, ClusterID: r.ClusterID()}})
}
