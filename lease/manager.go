// Package lease is the lease manager: the one loop that owns the machine's
// inputs. It batches commands for the log, runs the timers of leases,
// lock-delays and waits, parks waiters, and answers.
//
// The machine decides, the manager times, the log remembers.
//
// It is the server's, and no API: names change as they need to. Programs that use
// distlock import client, fence, or proto.
package lease

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"sync"
	"sync/atomic"
	"time"

	"github.com/jonboulle/clockwork"
	"go.uber.org/zap"

	"github.com/distlock/distlock/lease/machine"
)

// Config configures a Manager. Clock, Log and Store are required.
type Config struct {
	Clock  clockwork.Clock
	Log    Log
	Store  *Store // the one the Log applies to
	Bounds Bounds
	Logger *zap.Logger
	// Observer is told what happens; nil for nobody.
	Observer Observer
	// Overlap is how many commands are worth a batch of their own while another
	// is in the log. A small one costs more than it gains; 0 means 64.
	Overlap int
}

const defaultOverlap = 64

// Manager serves leases and locks on the node that leads. All methods may be
// called from any goroutine; Run is called once. What the loop knows is the
// loop's: the two meet in the inbox, and in what the loop publishes.
type Manager struct {
	clock    clockwork.Clock
	log      Log
	store    *Store
	bounds   Bounds
	logger   *zap.Logger
	observer Observer
	overlap  int       // Config.Beside
	start    time.Time // times in the manager are spans since it

	inbox   inbox
	ports   atomic.Uint32 // number of the last port made
	ready   chan struct{} // closed by the loop
	queued  atomic.Int64  // commands that wait for the next batch, as of the loop's last turn
	callers sync.Pool     // those that have been answered, to be used again
	delays  deadlines     // of lock-delays, by the delay's id; only the loop changes them

	mu   sync.Mutex
	seen Status // the leadership, as of the loop's last turn
}

// New returns a manager. Run starts it.
func New(cfg Config) (*Manager, error) {
	if cfg.Clock == nil || cfg.Log == nil || cfg.Store == nil {
		return nil, errors.New("lease: Config needs a Clock, a Log and a Store")
	}
	if cfg.Logger == nil {
		cfg.Logger = zap.NewNop()
	}
	if cfg.Observer == nil {
		cfg.Observer = unobserved{}
	}
	return &Manager{
		clock: cfg.Clock, log: cfg.Log, store: cfg.Store, logger: cfg.Logger, observer: cfg.Observer,
		bounds:  cfg.Bounds.WithDefaults(),
		overlap: cmp.Or(cfg.Overlap, defaultOverlap),
		start:   cfg.Clock.Now(),
		inbox:   inbox{wake: make(chan struct{}, 1)},
		ready:   make(chan struct{}),
	}, nil
}

// now is the time since the manager was made, on the monotonic clock.
func (m *Manager) now() time.Duration { return m.clock.Since(m.start) }

// Ready is closed once this node has led for the first time.
func (m *Manager) Ready() <-chan struct{} { return m.ready }

// Run serves. It returns nil after ctx has ended, and the reason when the log
// stops. Whatever has not been answered by then is answered with an error.
func (m *Manager) Run(ctx context.Context) error { return newLoop(m).run(ctx) }

// Drain prepares the end: every parked waiter is answered ErrStopping and
// keeps its place, and so is new work. What is in the log is still answered.
func (m *Manager) Drain() { m.inbox.put(drain{}) }

// Do hands an operation to the loop and waits for its answer, whose Err is the
// error too. When ctx ends first the operation goes on, and may or may not take
// effect; of an Acquire see AcquireRequest.Attempt. An Acquire without one that
// ends with the cause ErrDetached keeps its place for a repeat, for one TTL.
//
// Errors: *InvalidError, *ExhaustedError, *HeldError, *WaitTimeoutError,
// *Refusal, *NotLeaderError, ErrStopping, ErrSuperseded, ErrOutcomeUnknown,
// ErrLogFailed, ctx's cause.
func (m *Manager) Do(ctx context.Context, op Operation) (Reply, error) {
	t, err := op.task(m)
	if err == nil {
		err = m.admits(t)
	}
	if err != nil {
		return Reply{Err: err}, err
	}
	caller, ok := m.callers.Get().(caller)
	if !ok {
		caller = newCaller()
	}
	t.from().sink = caller
	if !m.inbox.put(t) {
		err := m.over()
		return Reply{Err: err}, err
	}
	var r Reply
	answered := false
	select {
	case r = <-caller:
		answered = true
		m.callers.Put(caller) // nothing else comes
	case <-ctx.Done():
	}
	if ctx.Err() != nil && r.Err == nil { // nobody hears the answer, if there is one
		cause := context.Cause(ctx)
		if c, ok := t.(*call); ok && c.acquires() && (!answered || c.attempt == 0) {
			m.inbox.put(&leave{call: c, lost: errors.Is(cause, ErrDetached)})
		}
		return Reply{Err: cause}, cause
	}
	r.complete(m)
	return r, r.Err
}

// over is why the loop is over.
func (m *Manager) over() error {
	if err := m.log.Err(); err != nil {
		return logFailed(err)
	}
	return ErrStopping
}

// logFailed is an error as one of the log's; it may say by itself what it is.
func logFailed(err error) error {
	if errors.Is(err, ErrLogFailed) {
		return err
	}
	return fmt.Errorf("%w: %w", ErrLogFailed, err)
}

// Status is how a node is at a glance.
type Status struct {
	Leader bool
	Term   uint64
	Hint   string // client address of the leader, when another leads
	machine.Counts
	Revision  uint64
	LastToken uint64
	Level     machine.Level // of the commands that the cluster uses
}

// Status may be asked of any node, and is not linearizable.
func (m *Manager) Status() Status {
	m.mu.Lock()
	s := m.seen
	m.mu.Unlock()
	m.store.Read(func(x *machine.Machine) {
		s.Counts, s.Revision, s.LastToken, s.Level = x.Counts(), x.Revision(), uint64(x.LastToken()), x.Level()
	})
	return s
}

// Pending counts the commands that wait for the next batch, as of the loop's
// last turn.
func (m *Manager) Pending() int { return int(m.queued.Load()) }

// inbox is how other goroutines reach the loop.
type inbox struct {
	mu     sync.Mutex
	list   []input
	spare  []input       // the loop's last list, emptied: the next one
	closed bool          // the loop is over
	wake   chan struct{} // buffered, one
}

// input is one thing for the loop to take in.
type input interface{ take(l *loop) }

// put hands an input to the loop; false when the loop is over.
func (b *inbox) put(in input) bool {
	b.mu.Lock()
	if b.closed {
		b.mu.Unlock()
		return false
	}
	b.list = append(b.list, in)
	first := len(b.list) == 1
	b.mu.Unlock()
	if first {
		select {
		case b.wake <- struct{}{}:
		default:
		}
	}
	return true
}

// maxSpare bounds the arrays that are kept to be used again.
const maxSpare = 1 << 14

// take hands over what has been put since the last time, to fn in order.
func (b *inbox) take(fn func(input)) {
	b.mu.Lock()
	list := b.list
	b.list, b.spare = b.spare, nil
	b.mu.Unlock()
	for i, in := range list {
		fn(in)
		list[i] = nil
	}
	if cap(list) > maxSpare {
		list = nil
	}
	b.mu.Lock()
	b.spare = list[:0]
	b.mu.Unlock()
}

// close takes nothing more in, and returns what has not been taken.
func (b *inbox) close() []input {
	b.mu.Lock()
	defer b.mu.Unlock()
	list := b.list
	b.list, b.closed = nil, true
	return list
}

// deadlines are times that one goroutine moves and many read.
type deadlines struct {
	mu sync.Mutex
	at map[uint64]time.Duration
}

func (d *deadlines) set(id uint64, at time.Duration) {
	d.mu.Lock()
	d.at[id] = at
	d.mu.Unlock()
}

func (d *deadlines) remove(id uint64) {
	d.mu.Lock()
	delete(d.at, id)
	d.mu.Unlock()
}

func (d *deadlines) reset() {
	d.mu.Lock()
	d.at = make(map[uint64]time.Duration)
	d.mu.Unlock()
}

// remaining is the time left of the longest of some lock-delays.
func (m *Manager) remaining(list []machine.Delay) time.Duration {
	if len(list) == 0 {
		return 0
	}
	now := m.now()
	m.delays.mu.Lock()
	defer m.delays.mu.Unlock()
	var longest time.Duration
	for _, d := range list {
		if at, ok := m.delays.at[d.ID]; ok {
			longest = max(longest, at-now)
		}
	}
	return longest
}

// withDelays adds to what stands before a request what its clock knows.
func (m *Manager) withDelays(list []machine.Obstacle) *Explanation {
	e := &Explanation{}
	for _, o := range list {
		e.Obstacles = append(e.Obstacles, Obstacle{Obstacle: o, DelayRemaining: m.remaining(o.Delays)})
	}
	return e
}
