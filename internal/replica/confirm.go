package replica

import (
	"context"
	"sync"
	"time"

	"github.com/hashicorp/raft"

	"github.com/distlock/distlock/lease"
	peerpb "github.com/distlock/distlock/proto/distlock/peer/v1"
)

// Confirm implements lease.Log. The voters are asked for their terms after the
// call began. A majority that is still in this node's term says that nobody
// had been elected in a later one: that takes a majority which has persisted
// the later term, and two majorities share a voter. Raft's own VerifyLeader
// does not prove it: it counts non-voters, and acknowledgements that were
// under way before it was called.
//
// A lone voter leads as long as it has not been told otherwise: there is
// nobody who could have elected another.
func (r *Replica) Confirm(term uint64, done func(error)) {
	if !r.leads(term) {
		done(lease.ErrNotLeader)
		return
	}
	latest := r.configuration()
	groups := [][]raft.Server{voters(latest.servers)}
	if latest.index > r.raft.CommitIndex() {
		// While a change is being made a leader may be elected by the members
		// before it as well as by those after.
		r.mu.Lock()
		groups = append(groups, voters(r.committed.servers))
		r.mu.Unlock()
	}
	b := &ballot{r: r, term: term, done: done}
	asked := make(map[raft.ServerID]bool)
	b.mu.Lock()
	for _, g := range groups {
		b.counts = append(b.counts, newCount(g))
	}
	b.add(r.self, true)
	b.mu.Unlock()
	if b.decided() {
		return
	}
	for _, g := range groups {
		for _, s := range g {
			if s.ID == r.self || asked[s.ID] {
				continue
			}
			asked[s.ID] = true
			if !r.peers.start(func() { b.vote(s.ID, r.asksTerm(s) == term) }) {
				b.vote(s.ID, false)
			}
		}
	}
}

// leads tells whether this node leads in term, as far as it knows.
func (r *Replica) leads(term uint64) bool {
	return r.raft.State() == raft.Leader && r.raft.CurrentTerm() == term &&
		!r.transferring.Load() && !r.stalled.Load() && r.Err() == nil
}

// confirmWithin bounds how long a voter may take to tell its term.
const confirmWithin = time.Second

// asksTerm asks a voter for its term; 0 when it does not answer.
func (r *Replica) asksTerm(voter raft.Server) uint64 {
	ctx, cancel := context.WithTimeout(r.peers.ctx, confirmWithin)
	defer cancel()
	conn, err := r.peers.conn(endOf(voter), kindPeer, 0)
	if err != nil {
		return 0
	}
	resp, err := peerpb.NewPeerServiceClient(conn).Term(ctx, &peerpb.TermRequest{})
	if err != nil {
		return 0
	}
	return resp.GetTerm()
}

func voters(c raft.Configuration) []raft.Server {
	var list []raft.Server
	for _, s := range c.Servers {
		if s.Suffrage == raft.Voter {
			list = append(list, s)
		}
	}
	return list
}

// ballot counts the answers of one round.
type ballot struct {
	r    *Replica
	term uint64

	mu     sync.Mutex
	counts []*count
	done   func(error) // nil once called
}

// count is of one configuration's voters.
type count struct {
	members map[raft.ServerID]bool
	need    int // more votes
	left    int // voters that have not answered
}

func newCount(voters []raft.Server) *count {
	c := &count{members: make(map[raft.ServerID]bool), need: len(voters)/2 + 1, left: len(voters)}
	for _, s := range voters {
		c.members[s.ID] = true
	}
	return c
}

func (b *ballot) vote(id raft.ServerID, same bool) {
	b.mu.Lock()
	b.add(id, same)
	b.mu.Unlock()
	b.decided()
}

func (b *ballot) add(id raft.ServerID, same bool) {
	for _, c := range b.counts {
		if !c.members[id] {
			continue
		}
		if c.left--; same {
			c.need--
		}
	}
}

// outcome tells whether every configuration has its majority, and whether one
// cannot have it any more. The caller holds b.mu.
func (b *ballot) outcome() (won, lost bool) {
	won = true
	for _, c := range b.counts {
		won = won && c.need <= 0
		lost = lost || c.need > c.left
	}
	return won, lost
}

// decided calls done when the round has an end. This node's own vote counts
// only if it still leads in the term.
func (b *ballot) decided() bool {
	b.mu.Lock()
	done := b.done
	won, lost := b.outcome()
	if done == nil || !won && !lost {
		b.mu.Unlock()
		return done == nil
	}
	b.done = nil
	b.mu.Unlock()
	if won && b.r.leads(b.term) {
		done(nil)
	} else {
		done(lease.ErrNotLeader)
	}
	return true
}
