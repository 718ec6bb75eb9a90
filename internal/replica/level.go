package replica

import (
	"encoding/json"
	"fmt"
	"time"

	"github.com/hashicorp/raft"
	"go.uber.org/zap"

	"github.com/distlock/distlock/lease/machine"
)

// LevelError says that a cluster is at a level that this build does not know:
// it would not do what the other members do.
type LevelError struct{ Level, Newest machine.Level }

func (e *LevelError) Error() string {
	return fmt.Sprintf("the cluster is at level %d, and this build knows level %d at most: start a build that is at least as new as the one that raised it", e.Level, e.Newest)
}

// incarnationsLevel is the level from which every member greets by incarnation:
// whoever does not is refused.
const incarnationsLevel machine.Level = 3

// askLevelsEvery is how long a leader waits before it asks again whether every
// member knows a higher level.
const askLevelsEvery = time.Second

// raiseLevel raises the level of the cluster to the highest that every member
// knows. It is the goroutine of a leadership, and ends with it, or at the
// highest level that this build knows.
func (r *Replica) raiseLevel(term uint64) {
	for r.cfg.Store.Level() < r.newest {
		if r.raft.State() != raft.Leader || r.raft.CurrentTerm() != term {
			return
		}
		if err := r.tryRaise(); err != nil {
			r.logger.Debug("the level stays", zap.Uint32("level", uint32(r.cfg.Store.Level())), zap.Error(err))
		}
		if r.cfg.Store.Level() >= r.newest {
			return
		}
		select {
		case <-time.After(askLevelsEvery):
		case <-r.closing:
			return
		}
	}
}

// tryRaise lets no change of the membership begin meanwhile: a node that does not know
// the level must not come in between the answers and the note.
func (r *Replica) tryRaise() error {
	r.members.Lock()
	defer r.members.Unlock()
	level := r.newest
	r.mu.Lock()
	servers := append([]raft.Server(nil), r.committed.servers.Servers...)
	r.mu.Unlock()
	for _, s := range append(servers, r.configuration().servers.Servers...) {
		if s.ID == r.self {
			continue
		}
		if r.peers == nil {
			return fmt.Errorf("member %s cannot be asked without a peer address", s.ID)
		}
		about, err := r.about(endOf(s), time.Second)
		if err != nil {
			return fmt.Errorf("member %s does not answer: %w", s.ID, err)
		}
		level = min(level, machine.Level(about.GetLevel()))
	}
	if level <= r.cfg.Store.Level() {
		return fmt.Errorf("not every member knows a higher level than %d", level)
	}
	if err := r.write(note{ClusterID: r.ClusterID(), Level: level}); err != nil {
		return err
	}
	if r.voters() > 1 { // what one node does alone is no news
		r.logger.Info("raised the level", zap.Uint32("level", uint32(level)))
	}
	return nil
}

// write puts a note into the log, and waits until it is applied.
func (r *Replica) write(n note) error {
	text, err := json.Marshal(n)
	if err != nil {
		return err
	}
	return r.raft.Apply(append([]byte{noteMark}, text...), 0).Error()
}

// knowsLevel refuses a node that would not do what the members do. One that
// does not answer is no danger: it stops at the first entry that it does not
// know, and gets no vote before it answers.
func (r *Replica) knowsLevel(node end) error {
	about, err := r.about(node, time.Second)
	if ours := r.cfg.Store.Level(); err == nil && machine.Level(about.GetLevel()) < ours {
		return refused(nameOf(node.id), fmt.Sprintf("its build knows level %d at most, and the cluster is at level %d: start it with the build of the others", about.GetLevel(), ours))
	}
	return nil
}
