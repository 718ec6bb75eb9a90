package replica

import (
	"context"
	"fmt"
	"hash/crc32"
	"slices"
	"sort"
	"strings"
	"sync"
	"time"

	"github.com/hashicorp/raft"
	"go.uber.org/zap"

	"github.com/distlock/distlock/lease/machine"
	peerpb "github.com/distlock/distlock/proto/distlock/peer/v1"
)

// Replicas watch each other. Each keeps a digest of all that it has applied, and
// asks the voters once a second for theirs after the same entry. Replicas of one
// log that differ have a damaged memory or disk, or a bug: whoever is not with a
// majority stops for good, before more is granted out of a wrong state.
//
// In the digest are the entries and what they did, as numbers: never a text or
// an encoding of this build's, or the next build would differ from it.

// chain is the digest of the entries of a log, from the entry on with which every
// member knew how to make it. It is kept in snapshots.
type chain struct {
	Begun uint64 `json:"begun"` // that entry's index: only chains with one beginning compare
	Index uint64 `json:"index"` // of the last entry in it
	Sum   uint64 `json:"sum"`
}

// digestLevel is the level from which digests are kept.
const digestLevel machine.Level = 3

// add takes in numbers.
func (c *chain) add(list ...uint64) {
	for _, n := range list {
		// The finalizer of SplitMix64 (Steele, Lea and Flood, OOPSLA 2014).
		n += c.Sum*0x9e3779b97f4a7c15 + 0x632be59bd9b4e019
		n = (n ^ n>>30) * 0xbf58476d1ce4e5b9
		n = (n ^ n>>27) * 0x94d049bb133111eb
		c.Sum = n ^ n>>31
	}
}

// entry takes in a log entry, as it is in the log.
func (c *chain) entry(l *raft.Log) {
	c.Index = l.Index
	c.add(l.Index, l.Term, uint64(len(l.Data)), uint64(crc32.Checksum(l.Data, castagnoli)))
}

// outcome takes in what a batch did.
func (c *chain) outcome(out *machine.Outcome, revision, lastToken uint64) {
	n := &out.Counts
	c.add(revision, lastToken, uint64(n.Leases), uint64(n.Locks), uint64(n.Waiters), uint64(n.Holds))
	for i := range out.Results {
		switch r := &out.Results[i]; {
		case r.Refusal != nil:
			c.add(3)
		case r.Hold != nil:
			c.add(2, uint64(r.Hold.Token))
		case r.Waiting:
			c.add(1)
		default:
			c.add(0)
		}
	}
}

// configuration takes in a committed configuration.
func (c *chain) configuration(index uint64, servers raft.Configuration) {
	c.Index = index
	c.add(index)
	for _, s := range servers.Servers {
		c.add(uint64(s.Suffrage), uint64(crc32.Checksum([]byte(s.ID), castagnoli)), uint64(crc32.Checksum([]byte(s.Address), castagnoli)))
	}
}

// sums has the recent values of this node's chain, for whoever asks. The
// goroutine that applies writes it.
type sums struct {
	mu    sync.Mutex
	begun uint64
	list  []sum // in order of index; recent of them, from next on
	next  int
	told  map[raft.ServerID]sum // the last that others have said when they asked
}

type sum struct{ index, sum uint64 }

// recentSums is how many values a node has: some seconds at the highest rate.
const recentSums = 1 << 13

// note takes in a value; one of a chain that begins elsewhere replaces all.
func (s *sums) note(c chain) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.begun != c.Begun || len(s.list) > 0 && c.Index <= s.lastLocked().index {
		s.begun, s.list, s.next, s.told = c.Begun, s.list[:0], 0, nil
	}
	if len(s.list) < recentSums {
		s.list = append(s.list, sum{c.Index, c.Sum})
		return
	}
	s.list[s.next] = sum{c.Index, c.Sum}
	s.next = (s.next + 1) % recentSums
}

func (s *sums) lastLocked() sum {
	if len(s.list) == 0 {
		return sum{}
	}
	return s.list[(s.next+len(s.list)-1)%len(s.list)]
}

// last is the newest value, and where the chain begins; 0 for no chain.
func (s *sums) last() (begun uint64, last sum) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.begun, s.lastLocked()
}

// hear takes in what another node says of itself.
func (s *sums) hear(id raft.ServerID, begun uint64, said sum) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if begun != s.begun || begun == 0 {
		return
	}
	if s.told == nil {
		s.told = make(map[raft.ServerID]sum)
	}
	s.told[id] = said
}

// heard is what another node has said of itself last.
func (s *sums) heard(id raft.ServerID) sum {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.told[id]
}

// at returns the value after an entry, if it is still there.
func (s *sums) at(begun, index uint64) (uint64, bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if begun != s.begun {
		return 0, false
	}
	get := func(i int) sum { return s.list[(s.next+i)%len(s.list)] }
	i := sort.Search(len(s.list), func(i int) bool { return get(i).index >= index })
	if i == len(s.list) || get(i).index != index {
		return 0, false
	}
	return get(i).sum, true
}

// DivergedError says that this node's state is not that of the other voters. It
// is kept in the directory: the node does not serve again.
type DivergedError struct {
	NodeID string `json:"nodeId"`
	Index  uint64 `json:"index"` // of the entry after which they were compared
	Ours   uint64 `json:"ours"`
	Theirs uint64 `json:"theirs"`
	// Alone tells that a majority of the voters has Theirs. Otherwise no digest
	// has a majority, and all must stop.
	Alone bool `json:"alone"`
}

func (e *DivergedError) Error() string {
	what := fmt.Sprintf("node %s is stopped for good: after log entry %d the digest of its state is %016x, and ", e.NodeID, e.Index, e.Ours)
	if e.Alone {
		return what + fmt.Sprintf("that of most voters %016x; its disk or memory is damaged, or this is a bug: "+
			"distlock cluster remove %s, then start it with an empty directory and --join", e.Theirs, e.NodeID)
	}
	return what + fmt.Sprintf("another voter's is %016x, with no majority for either: nobody can tell which is right, and all stop; "+
		"restore a backup, or make one member's directory a cluster of its own with distlock cluster recover", e.Theirs)
}

// Differing counts the members whose state is not that of most voters, as of the
// last time that this node asked.
func (r *Replica) Differing() int { return int(r.differing.Load()) }

const (
	compareEvery  = time.Second
	compareWithin = 3 * time.Second // once two differ: for the others to be asked
)

// compare holds this node's digest against the voters', until the node ends.
func (r *Replica) compare() {
	defer r.group.Done()
	every := time.NewTicker(compareEvery)
	defer every.Stop()
	for {
		select {
		case <-every.C:
		case <-r.closing:
			return
		}
		err := r.compareOnce()
		if err == nil {
			continue
		}
		if saved := r.saveIdentity(func(id *identity) { id.Diverged = err }); saved != nil {
			r.logger.Error("cannot write that this node must not serve again", zap.Error(saved))
		}
		r.differing.Store(1)
		r.fail(excluded{err})
		return
	}
}

// compareOnce asks every other voter, and once more for a while when one of them
// differs. An error says that this node has to stop: not because it differs from
// somebody, but because it is not with a majority of the voters.
func (r *Replica) compareOnce() *DivergedError {
	begun, last := r.sums.last()
	if begun == 0 {
		return nil
	}
	all := voters(r.configuration().servers)
	others := slices.DeleteFunc(slices.Clone(all), func(s raft.Server) bool { return s.ID == r.self })
	with := len(all) - len(others) // this node, if it votes
	differ := r.differs(begun, others, r.digests(others, begun, last, compareEvery, false))
	if len(differ) > 0 {
		begun, last = r.sums.last()
		answers := r.digests(others, begun, last, compareWithin, true)
		differ = r.differs(begun, others, answers)
		for _, a := range answers {
			if ours, ok := r.sums.at(begun, a.index); ok && ours == a.sum {
				with++
			}
		}
	}
	r.differing.Store(int64(len(differ)))
	switch {
	case len(differ) == 0:
		return nil
	case 2*with > len(all):
		var names []string
		for id := range differ {
			names = append(names, nameOf(id))
		}
		slices.Sort(names)
		r.logger.Error("the state of a member differs from that of most voters: it must stop", zap.String("nodes", strings.Join(names, ", ")), zap.Uint64("index", last.index))
		return nil
	}
	e := &DivergedError{NodeID: r.nodeID}
	same := make(map[sum]int)
	for _, a := range differ {
		if same[a]++; same[a] >= same[sum{e.Index, e.Theirs}] {
			e.Index, e.Theirs = a.index, a.sum
		}
	}
	e.Alone = 2*same[sum{e.Index, e.Theirs}] > len(all)
	e.Ours, _ = r.sums.at(begun, e.Index)
	return e
}

// differs returns the members whose state is not this node's, by their answers or,
// where there is none, by what they said before.
func (r *Replica) differs(begun uint64, members []raft.Server, answers map[raft.ServerID]sum) map[raft.ServerID]sum {
	list := make(map[raft.ServerID]sum)
	for _, s := range members {
		a, ok := answers[s.ID]
		if !ok {
			a = r.sums.heard(s.ID)
		}
		if ours, ok := r.sums.at(begun, a.index); ok && ours != a.sum {
			list[s.ID] = a
		}
	}
	return list
}

// digests asks members for their digests after this node's last entry. A member that
// has not got that far answers with that of its own last entry; with exact it is
// asked again until it has. Members that do not answer in time are left out.
func (r *Replica) digests(members []raft.Server, begun uint64, last sum, within time.Duration, exact bool) map[raft.ServerID]sum {
	ctx, cancel := context.WithTimeout(r.peers.ctx, within)
	defer cancel()
	answers := make(map[raft.ServerID]sum)
	var mu sync.Mutex
	var group sync.WaitGroup
	for _, s := range members {
		group.Go(func() {
			for {
				answer, err := r.digestOf(ctx, endOf(s), begun, last)
				if err == nil && answer.index != 0 {
					mu.Lock()
					answers[s.ID] = answer
					mu.Unlock()
				}
				if !exact || err == nil && answer.index == last.index {
					return
				}
				select {
				case <-time.After(within / 30):
				case <-ctx.Done():
					return
				}
			}
		})
	}
	group.Wait()
	return answers
}

// digestOf asks one member; index 0 is no answer.
func (r *Replica) digestOf(ctx context.Context, member end, begun uint64, last sum) (sum, error) {
	conn, err := r.peers.conn(member, kindPeer, 0)
	if err != nil {
		return sum{}, err
	}
	a, err := peerpb.NewPeerServiceClient(conn).Digest(ctx, &peerpb.DigestRequest{Begun: begun, Index: last.index, Sum: last.sum, NodeId: string(r.self)})
	return sum{a.GetIndex(), a.GetSum()}, err
}

// Digest implements the service.
func (s *peerService) Digest(_ context.Context, q *peerpb.DigestRequest) (*peerpb.DigestResponse, error) {
	a := &peerpb.DigestResponse{}
	s.r.sums.hear(raft.ServerID(q.GetNodeId()), q.GetBegun(), sum{q.GetIndex(), q.GetSum()})
	if found, ok := s.r.sums.at(q.GetBegun(), q.GetIndex()); ok {
		a.Index, a.Sum = q.GetIndex(), found
	} else if begun, last := s.r.sums.last(); begun == q.GetBegun() && last.index < q.GetIndex() {
		a.Index, a.Sum = last.index, last.sum
	}
	return a, nil
}
