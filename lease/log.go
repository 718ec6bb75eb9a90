package lease

import (
	"time"

	"github.com/distlock/distlock/fence"
	"github.com/distlock/distlock/lease/machine"
)

// Log is the ordered sequence of batches that every replica applies, in the
// same order, to its Store. The manager is its only proposer on a node.
//
// A Log owns the goroutine that applies: it calls Store.Apply for every
// committed batch, of this node's proposals and of others'.
type Log interface {
	// Propose hands over one batch. It does not wait for the disk. done is
	// called exactly once, on a goroutine of the log's, and must not block:
	// with the outcome once the batch is committed (on disk, on a quorum) and
	// applied; with ErrNotLeader when it certainly was not appended; with
	// ErrOutcomeUnknown when leadership was lost or the log failed with the
	// batch in flight. Batches of one proposer are applied in the order
	// proposed. The log keeps no reference to batch.Commands after done: the
	// array is used again.
	Propose(batch machine.Batch, done func(machine.Outcome, error))

	// Confirm calls done(nil) once it is certain that this node still led in
	// term after Confirm was called, and done(ErrNotLeader) otherwise. A lone
	// member confirms at once, on the caller's goroutine. done must not block.
	Confirm(term uint64, done func(error))

	// Leadership reports each change, the present state first. A leadership
	// is reported only after everything before its term has been applied. A
	// loss may be left out when a leadership in another term has followed it.
	// The channel is closed when the log is closed or has failed for good
	// (Err says which).
	Leadership() <-chan Leadership

	// Err is why the log stopped; nil while it works and after a clean Close.
	Err() error

	// Close stops the log. Batches in flight end with ErrOutcomeUnknown.
	Close() error
}

// Leadership says whether this node may serve, and where the leader is.
type Leadership struct {
	Leader bool
	Term   uint64
	// Hint is the client address of the leader when another node leads and
	// its address is known.
	Hint string
	// Leaving is set of a leadership that is reported again because it is about
	// to be handed over. The manager closes it once what is left of leases that
	// nobody has renewed lately is in the log. When the leadership goes on
	// instead, it is reported once more, without.
	Leaving chan<- struct{}
}

// Member is one node of the cluster that keeps the log.
type Member struct {
	ID            string
	Incarnation   string // of its data directory; "" of one that the first builds made
	PeerAddress   string
	ClientAddress string // "" while it does not answer
	Role          string // RoleVoter or RoleLearner
	Leader        bool
	Healthy       bool // it answers, and has caught up
	AppliedIndex  uint64
}

// Restored says where a history began that was restored from a backup. The
// names in JSON are those that logs have.
type Restored struct {
	At          time.Time   `json:"at"`
	ClusterID   string      `json:"clusterId"` // that the backup is of
	BackupAt    time.Time   `json:"backupAt"`
	TokensAbove fence.Token `json:"tokensAbove"` // every token of this history is
}

// A voter counts towards the quorum; a learner only gets the log.
const (
	RoleVoter   = "voter"
	RoleLearner = "learner"
)
