package machine

// Level says which commands and which state a machine may have. All replicas
// of a log are at the same level: it is raised by an entry of the log, once
// every member knows the higher one.
type Level uint32

// The levels. A machine at FirstLevel does with every command to its state what
// the first release did, byte for byte of a snapshot.
const (
	FirstLevel Level = 1
	// At level 2 came AbandonAll, EndWait, Release.Request, request ids under a
	// lease that are not sequence numbers, losses counted, and bounds on what
	// one lease remembers and one search for a deadlock looks at.
	//
	// At level 3 came Mark and Clear. Every member has an incarnation.
	NewestLevel Level = 3
)

// Level is what the machine is at.
func (m *state) Level() Level { return m.level }

// Raise brings the machine to a level; it does nothing when that is not higher.
// Only the owning goroutine may call it.
func (m *Machine) Raise(level Level) { m.level = max(m.level, level) }

// at reports whether a level has been reached.
func (m *state) at(level Level) bool { return m.level >= level }
