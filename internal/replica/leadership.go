package replica

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"fmt"
	"time"

	"github.com/hashicorp/raft"
	"go.uber.org/zap"
	"google.golang.org/grpc"

	"github.com/distlock/distlock/lease"
	peerpb "github.com/distlock/distlock/proto/distlock/peer/v1"
)

// Leadership implements lease.Log.
func (r *Replica) Leadership() <-chan lease.Leadership { return r.leadership }

// watch turns raft's word on leadership into ours: led only once everything
// before the term is applied, and not while the disk stalls.
func (r *Replica) watch() {
	defer r.group.Done()
	defer close(r.leadership)
	changes := r.raft.LeaderCh()
	var told lease.Leadership
	for first := true; ; first = false {
		news := r.heard()
		var again <-chan time.Time
		state := lease.Leadership{Hint: r.known().client}
		if r.raft.State() == raft.Leader && !r.stalled.Load() {
			term := r.raft.CurrentTerm()
			if told.Leader && told.Term == term {
				state = told
				state.Leaving = r.handingOver()
			} else if err := r.settled(); err == nil && r.raft.CurrentTerm() == term && r.raft.State() == raft.Leader && !r.stalled.Load() {
				state = lease.Leadership{Leader: true, Term: term}
				if c := r.configuration(); c.index <= r.raft.CommitIndex() { // all before the barrier is
					r.commit(c)
				}
			} else {
				again = time.After(20 * time.Millisecond)
			}
		}
		if state != told || first && state.Leader {
			if !state.Leader {
				r.setServing(false) // before the manager knows: calls wait for the next leader
			}
			select {
			case r.leadership <- state:
			case <-r.closing:
				return
			}
			gained := state.Leader && (!told.Leader || told.Term != state.Term)
			told = state
			if gained {
				r.setServing(true)
				r.group.Add(1)
				go r.settleIn(state.Term)
			}
		}
		select {
		case <-r.closing:
			return
		case <-changes:
		case <-news:
		case <-again:
		}
	}
}

// handingOver is what the manager closes when it is ready for a hand-over; nil
// while none is prepared.
func (r *Replica) handingOver() chan<- struct{} {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.leaving
}

// prepareHandOver lets the manager write down how much time leases have left; the next
// leader would give them their full TTL again. It waits for that, but not long: the
// hand-over goes on without it.
func (r *Replica) prepareHandOver() {
	ready := make(chan struct{})
	r.setLeaving(ready)
	select {
	case <-ready:
	case <-time.After(prepareWithin):
	case <-r.closing:
	}
}

const prepareWithin = 500 * time.Millisecond

func (r *Replica) setLeaving(ready chan<- struct{}) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.leaving = ready
	r.tellNews()
}

// heard returns a channel that is closed when the leader changes.
func (r *Replica) heard() <-chan struct{} {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.news
}

func (r *Replica) known() leader {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.leader
}

// setLeader takes in who leads, and tells whoever waits to know.
func (r *Replica) setLeader(change func(*leader)) {
	r.mu.Lock()
	defer r.mu.Unlock()
	before := r.leader
	if change(&r.leader); r.leader != before {
		r.tellNews()
	}
	if r.leader.id != before.id || r.leader.serving != before.serving {
		r.endLed()
		r.led, r.endLed = context.WithCancel(context.Background())
	}
}

// tellNews is called with r.mu held.
func (r *Replica) tellNews() {
	close(r.news)
	r.news = make(chan struct{})
}

func (r *Replica) setServing(serving bool) {
	r.setLeader(func(l *leader) {
		if l.serving = serving; serving {
			l.id, l.address, l.client = r.self, r.cfg.PeerAddress, r.cfg.ClientAddress
		} else if l.id == r.self {
			*l = leader{}
		}
	})
}

// settled returns once everything before this leader's term is applied, and the
// cluster has an id. A new cluster gets one before it answers anybody: whoever
// holds a lock of it can tell it from another one from the first answer on.
func (r *Replica) settled() error {
	if err := r.raft.Barrier(0).Error(); err != nil || r.ClusterID() != "" {
		return err
	}
	var random [8]byte
	rand.Read(random[:])
	return r.write(note{ClusterID: hex.EncodeToString(random[:])})
}

// settleIn does what a new leader may find undone: record the peer address of a
// node that was alone before, and raise the level.
func (r *Replica) settleIn(term uint64) {
	defer r.group.Done()
	if r.peers != nil {
		r.recordAddress()
	}
	r.raiseLevel(term)
}

// recordAddress tells the other members of a new peer address of this node.
func (r *Replica) recordAddress() {
	r.members.Lock()
	defer r.members.Unlock()
	for _, s := range r.configuration().servers.Servers {
		if s.ID == r.self && string(s.Address) != r.cfg.PeerAddress {
			if err := r.raft.AddVoter(s.ID, raft.ServerAddress(r.cfg.PeerAddress), 0, 0).Error(); err != nil {
				r.logger.Warn("the new peer address could not be recorded", zap.Error(err))
			}
		}
	}
}

// findLeader follows who leads, and asks the leader where clients reach it.
func (r *Replica) findLeader() {
	defer r.group.Done()
	heard := make(chan raft.Observation, 1)
	observer := raft.NewObserver(heard, false, func(o *raft.Observation) bool {
		_, ok := o.Data.(raft.LeaderObservation)
		return ok
	})
	r.raft.RegisterObserver(observer)
	defer r.raft.DeregisterObserver(observer)
	again := time.NewTicker(100 * time.Millisecond)
	defer again.Stop()
	for {
		address, id := r.raft.LeaderWithID()
		if id != r.self {
			r.setLeader(func(l *leader) {
				if l.id != id || l.address != string(address) {
					*l = leader{id: id, address: string(address)}
				}
			})
		}
		if l := r.known(); l.id != "" && l.id != r.self && l.client == "" {
			if about, err := r.about(end{l.id, l.address}, time.Second); err == nil {
				r.setLeader(func(now *leader) {
					if now.id == l.id {
						now.client = about.GetClientAddress()
					}
				})
			}
		}
		select {
		case <-heard:
		case <-again.C:
		case <-r.closing:
			return
		}
	}
}

// about asks a member how it is.
func (r *Replica) about(member end, within time.Duration) (*peerpb.AboutResponse, error) {
	ctx, cancel := context.WithTimeout(r.peers.ctx, within)
	defer cancel()
	conn, err := r.peers.conn(member, kindPeer, 0)
	if err != nil {
		return nil, err
	}
	about, err := peerpb.NewPeerServiceClient(conn).About(ctx, &peerpb.AboutRequest{})
	if err == nil && about.GetNodeId() != string(member.id) {
		return nil, fmt.Errorf("at %s answers %s", member.address, about.GetNodeId())
	}
	return about, err
}

// Leader waits until it is known who leads, and returns a connection on which
// the leader takes forwarded calls, nil when this node leads, and a context
// that ends once it is not known to lead any more. Each lane has a connection of
// its own, so that what fills one holds up no other.
func (r *Replica) Leader(ctx context.Context, lane int) (grpc.ClientConnInterface, context.Context, error) {
	for {
		r.mu.Lock()
		news, l, led, err := r.news, r.leader, r.led, r.err
		r.mu.Unlock()
		switch {
		case err != nil:
			return nil, nil, lease.ErrNotLeader
		case l.serving:
			return nil, led, nil
		case l.id != "" && l.id != r.self:
			conn, err := r.peers.conn(end{l.id, l.address}, kindForward, lane)
			return conn, led, err
		}
		select {
		case <-news:
		case <-ctx.Done():
			return nil, nil, lease.ErrNotLeader
		case <-r.closing:
			return nil, nil, lease.ErrNotLeader
		}
	}
}

// stallAfter is how long a write may take before another member had better
// lead.
func (r *Replica) stallAfter() time.Duration { return max(time.Second, 4*r.cfg.ElectionTimeout) }

// guard watches over what raft does not. A leader whose disk hangs goes on to
// send heartbeats, and would hold the cluster for ever: it stops to, so that
// another is elected. A member that hears of no leader asks whether it has
// been removed.
func (r *Replica) guard() {
	defer r.group.Done()
	every := time.NewTicker(r.cfg.ElectionTimeout / 2)
	defer every.Stop()
	lonely := 0
	for {
		select {
		case <-r.closing:
			return
		case <-r.suspects:
			r.askWhetherRemoved()
		case <-every.C:
		}
		stalled := r.disk.writing() > r.stallAfter() && r.voters() > 1
		if r.stalled.Swap(stalled) != stalled {
			if stalled {
				r.logger.Error("the disk stalls: leaving the leadership to others", zap.Duration("after", r.stallAfter()))
			} else {
				r.logger.Info("the disk works again")
			}
			r.mu.Lock()
			r.tellNews() // watch looks again
			r.mu.Unlock()
		}
		if r.known().id != "" {
			lonely = 0
		} else if lonely++; lonely%10 == 0 {
			r.askWhetherRemoved()
		}
	}
}

func (r *Replica) voters() int {
	n := 0
	for _, s := range r.configuration().servers.Servers {
		if s.Suffrage == raft.Voter {
			n++
		}
	}
	return n
}

// configured takes in a committed configuration, on the goroutine that
// applies.
func (r *Replica) configured(index uint64, c raft.Configuration) {
	r.commit(configuration{index, c})
	for _, s := range c.Servers {
		if s.ID == r.self {
			return
		}
	}
	// Either the configuration is from before this node was added, or this node has
	// been removed.
	select {
	case r.suspects <- struct{}{}:
	default:
	}
}

func (r *Replica) commit(c configuration) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if c.index >= r.committed.index {
		r.committed = c
	}
}

// learned takes in what the members know together, on the goroutine that
// applies.
func (r *Replica) learned(n note) {
	r.mu.Lock()
	r.note = n
	r.mu.Unlock()
	switch ours := r.ClusterID(); {
	case n.ClusterID == "", n.ClusterID == ours && r.begun(): // a snapshot may be from before the cluster got its id
	case ours == "", n.ClusterID == ours:
		if err := r.saveIdentity(func(id *identity) { id.ClusterID, id.Begun, id.List = n.ClusterID, true, nil }); err != nil {
			r.fail(fmt.Errorf("cannot write who this node is: %w", cause(err)))
		}
	default:
		r.fail(fmt.Errorf("the log is of cluster %s, the data directory of %s", n.ClusterID, ours))
	}
}
