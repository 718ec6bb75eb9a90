package replica

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"net"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/hashicorp/raft"
	"go.uber.org/zap"
)

// Introductions: what nodes ask each other before they are members of anything,
// or are not certain that they still are. A stranger is told nothing.

// introduced answers an introduction; nil means that it gets no answer.
func (p *peers) introduced(h hello, conn net.Conn) *reply {
	r := p.r
	c := r.configuration()
	name := nameOf(h.NodeID)
	if !p.certified(h.NodeID, conn) {
		return nil
	}
	known, found := named(c.servers, name)
	switch {
	case len(c.servers.Servers) > 0:
		if !found && h.Members[r.nodeID] != r.cfg.PeerAddress {
			return nil // it knows nobody here, and nobody knows it
		}
		a := &reply{ClusterID: r.ClusterID(), NodeID: r.self, History: true}
		if !found {
			return a
		}
		a.Known, a.At = known.ID, string(known.Address)
		if h.Address != "" && r.known().serving {
			sure := make(chan error, 1)
			r.Confirm(r.raft.CurrentTerm(), func(err error) { sure <- err })
			a.Leads = <-sure == nil
		}
		return a
	case r.cfg.Join:
		return &reply{NodeID: r.self} // it waits to be added
	case h.Members == nil || r.cfg.InitialCluster[name] == "" && h.Members[r.nodeID] != r.cfg.PeerAddress:
		return nil
	}
	if !maps.Equal(h.Members, r.cfg.InitialCluster) {
		r.fail(excluded{&ListError{NodeID: r.nodeID, Ours: addresses(r.cfg.InitialCluster), Other: name, Theirs: addresses(h.Members)}})
	}
	return &reply{NodeID: r.self, Members: r.cfg.InitialCluster}
}

// introduce asks who is at an address.
func (p *peers) introduce(address string, h hello) (a reply, err error) {
	ctx, cancel := context.WithTimeout(p.ctx, time.Second)
	defer cancel()
	h.NodeID = p.r.self
	conn, answer, a, err := p.greet(ctx, address, kindIntroduce, h)
	if err != nil {
		return a, err
	}
	conn.Close()
	if answer != answerMember {
		return a, errLegacy
	}
	return a, nil
}

// whoIs asks a node that waits to be added for its id. One of a build before
// incarnations has none but its name.
func (p *peers) whoIs(name, address string) (raft.ServerID, error) {
	a, err := p.introduce(address, hello{})
	switch {
	case errors.Is(err, errLegacy) && p.r.cfg.Store.Level() < incarnationsLevel:
		return raft.ServerID(name), nil
	case err != nil:
		return "", err
	case a.History:
		return "", fmt.Errorf("it is of cluster %s", a.ClusterID)
	case nameOf(a.NodeID) != name:
		return "", fmt.Errorf("there is node %s", nameOf(a.NodeID))
	}
	return a.NodeID, nil
}

// keepList keeps the list of a new cluster, before anybody is answered: the node
// may be one of its first members before it knows, and must not begin alone
// when it is started again without the list.
func (r *Replica) keepList() error {
	if r.cfg.Join || len(r.configuration().servers.Servers) > 0 {
		return nil
	}
	kept, given := r.id.List, r.cfg.InitialCluster // Open's goroutine is the only one
	switch {
	case len(given) > 1 && maps.Equal(given, kept):
	case len(given) > 1:
		if err := r.saveIdentity(func(id *identity) { id.List = given }); err != nil {
			return fmt.Errorf("data directory %s: cannot be written: %w", r.dir, cause(err))
		}
	case len(kept) == 0:
	case given != nil:
		return &ListError{NodeID: r.nodeID, Ours: addresses(given), Other: "before that", Theirs: addresses(kept)}
	case r.peers == nil || kept[r.nodeID] != r.cfg.PeerAddress:
		return fmt.Errorf("data directory %s is of a node of a new cluster that has not begun, %s: start it with --peer-address %s", r.dir, addresses(kept), kept[r.nodeID])
	default:
		r.cfg.InitialCluster = kept
	}
	return nil
}

// betweenIntroductions is how long a node waits before it asks again.
const betweenIntroductions = 100 * time.Millisecond

// found begins a new cluster, with the nodes of cfg.InitialCluster. The one with
// the smallest name writes the first entry of the log, once all of them have
// answered with the same list and without a history. A majority would not be enough:
// one of them could be a member that has lost its disk, and an empty cluster would
// be formed beside one that has granted locks. The others are given that entry. It
// ends once this node has it, or with the node.
func (r *Replica) found() {
	defer r.group.Done()
	list := r.cfg.InitialCluster
	names := slices.Sorted(maps.Keys(list))
	began := time.Now() // of the process, for what it tells an operator
	said := false
	for len(r.configuration().servers.Servers) == 0 {
		ids, missing, err := r.meet(names)
		if err != nil {
			r.fail(excluded{err})
			return
		}
		if len(missing) == 0 && names[0] == r.nodeID {
			var first raft.Configuration
			for _, name := range names {
				first.Servers = append(first.Servers, raft.Server{ID: ids[name], Address: raft.ServerAddress(list[name])})
			}
			if err := r.raft.BootstrapCluster(first).Error(); err != nil && !errors.Is(err, raft.ErrCantBootstrap) {
				r.fail(fmt.Errorf("data directory %s: %w", r.dir, cause(err)))
				return
			}
			r.peers.campaign()
		}
		if len(missing) > 0 && !said && time.Since(began) > 2*time.Second {
			said = true
			r.logger.Info("a new cluster begins once all of its members run", zap.String("waitingFor", strings.Join(missing, ", ")))
		}
		select {
		case <-time.After(betweenIntroductions):
		case <-r.closing:
			return
		}
	}
}

// campaign has this node stand for election now: nobody leads, and raft would wait for
// a timeout first. If nobody hears it, raft's timeout comes as it would have.
func (p *peers) campaign() {
	header := raft.RPCHeader{ProtocolVersion: raft.ProtocolVersionMax, ID: []byte(p.r.self), Addr: []byte(p.r.cfg.PeerAddress)}
	if err := p.reach.TimeoutNow(p.r.self, raft.ServerAddress(p.r.cfg.PeerAddress), &raft.TimeoutNowRequest{RPCHeader: header}, &raft.TimeoutNowResponse{}); err != nil {
		p.r.logger.Debug("raft was not told to elect this node", zap.Error(err))
	}
}

// meet introduces this node to the others of a new cluster, and returns their
// ids, and those that do not answer. It fails when this node is not one of them.
func (r *Replica) meet(names []string) (ids map[string]raft.ServerID, missing []string, err error) {
	list := r.cfg.InitialCluster
	ids = map[string]raft.ServerID{r.nodeID: r.self}
	answers := r.askAll(names, hello{Members: list})
	for i, name := range names {
		a, err := answers[i].reply, answers[i].err
		switch {
		case name == r.nodeID:
		case err != nil:
			missing = append(missing, fmt.Sprintf("%s (%s)", name, list[name]))
		case a.History && a.Known == r.self: // it has begun without our noticing
			missing = append(missing, name)
		case a.History && a.Known == "":
			return nil, nil, fmt.Errorf("node %s at %s has a history already, of cluster %s, without %s: start %s with --join to add it, or all with the same --initial-cluster and empty directories",
				nameOf(a.NodeID), list[name], a.ClusterID, r.nodeID, r.nodeID)
		case a.History:
			return nil, nil, &ReplacedError{NodeID: r.nodeID, Other: nameOf(a.NodeID), ClusterID: a.ClusterID}
		case a.Members == nil: // it may have lost the directory of a member, or be one of the list by mistake
			missing = append(missing, fmt.Sprintf("%s (%s was started with --join)", name, list[name]))
		case !maps.Equal(a.Members, list):
			return nil, nil, &ListError{NodeID: r.nodeID, Ours: addresses(list), Other: nameOf(a.NodeID), Theirs: addresses(a.Members)}
		case nameOf(a.NodeID) != name:
			return nil, nil, fmt.Errorf("--initial-cluster says that %s is at %s, where %s is", name, list[name], nameOf(a.NodeID))
		default:
			ids[name] = a.NodeID
		}
	}
	return ids, missing, nil
}

// introduction is how a node answered one.
type introduction struct {
	reply
	err error
}

var errItself = errors.New("the node itself")

// askAll introduces this node to those of cfg.InitialCluster, at once: they may
// be far away.
func (r *Replica) askAll(names []string, h hello) []introduction {
	answers := make([]introduction, len(names))
	var group sync.WaitGroup
	for i, name := range names {
		if name == r.nodeID {
			answers[i].err = errItself
			continue
		}
		group.Go(func() { answers[i].reply, answers[i].err = r.peers.introduce(r.cfg.InitialCluster[name], h) })
	}
	group.Wait()
	return answers
}

// confirmAddress is for a member whose peer address is not the one in its log. Before
// raft starts it makes certain that the member was meant to move, and that this is no
// copy of its directory: only the leader can say so. It fails when the leader says
// no, or cannot be asked within a while.
func (r *Replica) confirmAddress() error {
	c := r.configuration()
	us, member := r.server(r.self)
	if !member || string(us.Address) == r.cfg.PeerAddress || len(voters(c.servers)) < 2 || r.confirmed() == r.cfg.PeerAddress {
		return nil
	}
	moved := &MovedError{NodeID: r.nodeID, Recorded: string(us.Address), Address: r.cfg.PeerAddress}
	for until := time.Now().Add(confirmAddressWithin); ; time.Sleep(betweenIntroductions) {
		for _, s := range c.servers.Servers {
			if s.ID == r.self {
				continue
			}
			a, err := r.peers.introduce(string(s.Address), hello{ClusterID: r.ClusterID(), Address: r.cfg.PeerAddress})
			if err == nil && a.Leads && a.Known == r.self {
				if a.At == r.cfg.PeerAddress {
					// The next start may be one without a leader, which this
					// member is needed to elect.
					return r.saveIdentity(func(id *identity) { id.Address = a.At })
				}
				moved.Recorded = a.At
				return moved
			}
		}
		if time.Now().After(until) {
			return fmt.Errorf("no leader could be asked: %w", moved)
		}
	}
}

func (r *Replica) confirmed() string {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.id.Address
}

// confirmAddressWithin bounds the wait for a leader.
const confirmAddressWithin = 10 * time.Second

// ForeignPeers asks the other members of cfg.InitialCluster whether they belong to
// this node's cluster, before anything is served. It fails when all that answer
// belong to another.
func (r *Replica) ForeignPeers() error {
	if r.peers == nil || r.ClusterID() == "" {
		return nil
	}
	names := slices.Sorted(maps.Keys(r.cfg.InitialCluster))
	var foreign *strangerError
	for i, a := range r.askAll(names, hello{Members: r.cfg.InitialCluster}) {
		switch {
		case a.err != nil || !a.History || a.ClusterID == "":
		case a.ClusterID == r.ClusterID():
			return nil
		default:
			foreign = &strangerError{r.cfg.InitialCluster[names[i]], a.reply}
		}
	}
	if foreign != nil {
		return fmt.Errorf("data directory %s is of cluster %s, but %w: start this node with its own cluster's addresses, or with an empty directory", r.dir, r.ClusterID(), foreign)
	}
	return nil
}
