package sim

import (
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"runtime"
	"strings"
	"sync"
	"testing/synctest"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"

	shipped "github.com/distlock/distlock/client"
	"github.com/distlock/distlock/internal/reliability/believe"
	"github.com/distlock/distlock/internal/reliability/check"
	"github.com/distlock/distlock/lease"
	"github.com/distlock/distlock/transport"
)

// live has clients of package client talk to the replicas as they are, over a
// network in memory: managers, transport, forwarding between members. Only the
// log and the clocks are simulated. The faults are the seed's; what clients do
// meanwhile does not replay, for they draw their own random numbers.
type live struct {
	w *World

	mu    sync.Mutex // of the nodes' networks
	group sync.WaitGroup
}

// face is how a node is reached in one life.
type face struct {
	server         *transport.Server
	clients, peers *Link
	conns          map[int]*grpc.ClientConn // to the other members
}

const nodeAddress = "10.0.0.%d:50051"

func (n *node) address() string { return fmt.Sprintf(nodeAddress, n.id) }

// serve starts a node's transport.
func (v *live) serve(n *node) {
	seed := v.w.seed<<8 | uint64(n.life.Load())<<2 | uint64(n.id)
	f := &face{clients: NewLink(seed), peers: NewLink(seed + 1<<40), conns: make(map[int]*grpc.ClientConn)}
	f.server = transport.NewServer(transport.Config{
		MaxMessageBytes: 1 << 20,
		Manager:         n.manager, Cluster: member{n, n.log, f}, Leaderless: time.Second,
		Node: func() transport.Node { return transport.Node{ID: fmt.Sprint(n.id)} },
	})
	f.server.SetServing(true)
	v.group.Go(func() { f.server.Serve(f.clients) })
	v.group.Go(func() { f.server.ServePeers(f.peers) })
	v.mu.Lock()
	n.face = f
	v.mu.Unlock()
}

// gone ends it as a crash does: nothing that is on its way arrives.
func (v *live) gone(n *node) {
	v.mu.Lock()
	f := n.face
	n.face = nil
	conns := f.conns
	f.conns = nil
	v.mu.Unlock()
	f.clients.End()
	f.peers.End()
	v.group.Go(func() {
		for _, conn := range conns {
			conn.Close()
		}
		at, cancel := context.WithCancel(context.Background())
		cancel()
		f.server.Stop(at)
	})
}

// freeze stops what goes to and from a node, as a stop of its process does.
func (v *live) freeze(n *node, frozen bool) {
	v.mu.Lock()
	f := n.face
	v.mu.Unlock()
	f.clients.Freeze(frozen)
	f.peers.Freeze(frozen)
}

var errDown = errors.New("sim: connection refused")

// dial connects a client to a node.
func (v *live) dial(ctx context.Context, address string, client int) (net.Conn, error) {
	var id int
	fmt.Sscanf(address, nodeAddress, &id)
	v.mu.Lock()
	f := v.w.cluster.nodes[id].face
	v.mu.Unlock()
	if f == nil {
		return nil, errDown
	}
	return f.clients.Dial(ctx, client)
}

// each does something to a client's connections, whatever they lead to.
func (v *live) each(fn func(*Link)) {
	v.mu.Lock()
	defer v.mu.Unlock()
	for _, n := range v.w.cluster.nodes {
		if n.face != nil {
			fn(n.face.clients)
		}
	}
}

// leadership is what a node knows of who leads, under its log's mutex.
type leadership struct {
	hint string
	led  context.Context
	over context.CancelFunc
}

func (k *leadership) change(hint string) {
	if k.over != nil {
		k.over()
	}
	k.hint = hint
	k.led, k.over = context.WithCancel(context.Background())
}

// member implements transport.Cluster for one life of a node.
type member struct {
	n *node
	l *log
	f *face
}

// Leader implements transport.Cluster.
func (m member) Leader(ctx context.Context, _ int) (grpc.ClientConnInterface, context.Context, error) {
	for {
		m.l.mu.Lock()
		term, known := m.l.term, m.l.known
		m.l.mu.Unlock()
		switch {
		case term != 0:
			return nil, known.led, nil
		case known.hint != "":
			conn, err := m.to(known.hint)
			return conn, known.led, err
		}
		select {
		case <-time.After(5 * time.Millisecond):
		case <-ctx.Done():
			return nil, nil, &lease.NotLeaderError{}
		}
	}
}

func (m member) to(address string) (grpc.ClientConnInterface, error) {
	v := m.n.w.live
	var id int
	fmt.Sscanf(address, nodeAddress, &id)
	v.mu.Lock()
	defer v.mu.Unlock()
	if m.f.conns == nil {
		return nil, errDown
	}
	if conn := m.f.conns[id]; conn != nil {
		return conn, nil
	}
	conn, err := grpc.NewClient("passthrough:///"+address, grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithContextDialer(func(ctx context.Context, _ string) (net.Conn, error) {
			v.mu.Lock()
			f := v.w.cluster.nodes[id].face
			v.mu.Unlock()
			if f == nil {
				return nil, errDown
			}
			return f.peers.Dial(ctx, m.n.id)
		}))
	if err == nil {
		m.f.conns[id] = conn
	}
	return conn, err
}

var errNot = errors.New("sim: not simulated")

// Members implements transport.Cluster.
func (m member) Members() ([]lease.Member, string, uint64) { return nil, "", 0 }

// AddMember implements transport.Cluster.
func (m member) AddMember(string, string, string) (string, error) { return "", errNot }

// PromoteMember implements transport.Cluster.
func (m member) PromoteMember(string) error { return errNot }

// RemoveMember implements transport.Cluster.
func (m member) RemoveMember(string) error { return errNot }

// TransferLeadership implements transport.Cluster.
func (m member) TransferLeadership(string) (string, error) { return "", errNot }

// Backup implements transport.Cluster.
func (m member) Backup(io.Writer) error { return errNot }

// enter lets a goroutine that the scheduler does not know of touch what is the
// scheduler's; the function returned ends that.
func (w *World) enter() func() {
	if w.live == nil {
		return func() {}
	}
	w.stage.Lock()
	return w.stage.Unlock
}

const (
	liveTTL     = 2 * time.Second
	liveFaults  = faultsFor - 3*time.Second
	slowest     = 250 * time.Millisecond     // there and back: twice the longest that network adds
	livePatient = 4*liveTTL + 10*time.Second // an operation may take twice the longest TTL, and a call ten seconds; giving back many locks, one by one, more
)

// RunLive simulates a seed with clients of package client: faults, and then a
// quiet moment at which server and clients must agree. It must be called inside
// a synctest bubble. It returns how much they did.
func RunLive(seed uint64) (ops int, err error) {
	w := newWorld(seed)
	w.history = &check.History{Lag: time.Hour, Heal: time.Hour}
	v := &live{w: w}
	w.live = v
	r := w.rng(1)
	nodes, serversDrift, rate := shape(r)
	w.stage.Lock()
	w.cluster = newCluster(w)
	w.cluster.begin(nodes, func() float64 { return rate(serversDrift) })
	w.stage.Unlock()
	synctest.Wait()
	w.advance(100 * time.Millisecond)

	var endpoints []string
	for _, n := range w.cluster.nodes {
		endpoints = append(endpoints, n.address())
	}
	option := func(id int, rate float64) []shipped.Option {
		list := []shipped.Option{shipped.WithClock(Drift(rate)), shipped.WithDialOptions(grpc.WithContextDialer(
			func(ctx context.Context, address string) (net.Conn, error) { return v.dial(ctx, address, id) }))}
		if id%3 == 1 {
			list = append(list, shipped.WithUnary())
		}
		return list
	}
	var crowds believe.Crowds
	const observer = 99
	look, err := shipped.New(endpoints, option(observer, 1)...)
	if err != nil {
		return 0, err
	}
	locks := 8
	if r.IntN(8) == 0 {
		locks = 150
	}
	count := 2 + r.IntN(3)
	for i := range count {
		crowd, err := believe.Start(believe.Config{
			Endpoints: endpoints, Options: option(i, rate(!serversDrift)), Owner: fmt.Sprint("crowd", i), Seed: seed<<8 | uint64(i),
			Hot: 1 + r.IntN(3), Callers: 3, Locks: locks, MinTTL: 300 * time.Millisecond, MaxTTL: liveTTL, Pause: 50 * time.Millisecond,
		})
		if err != nil {
			return 0, err
		}
		crowds = append(crowds, crowd)
	}
	w.cluster.trouble(r)
	w.network(w.rng(4), count)
	result := make(chan error, 1)
	stop := make(chan struct{})
	go func() { // the judge
		for {
			select {
			case <-stop:
				result <- nil
				return
			case <-time.After(10 * time.Millisecond):
			}
			if err := exclusive(crowds); err != nil {
				result <- fmt.Errorf("at %v: %w", w.time(), err)
				return
			}
		}
	}()
	within, giveUp := context.WithCancel(context.Background())
	twice := make(chan error, 1)
	go func() {
		for within.Err() == nil {
			if err := believe.Twice(within, look, crowds); err != nil {
				twice <- fmt.Errorf("at %v: %w", w.time(), err)
				return
			}
			time.Sleep(100 * time.Millisecond)
		}
		twice <- nil
	}()
	w.advance(w.time() + liveFaults)
	w.stage.Lock()
	w.cluster.heal()
	w.stage.Unlock()
	v.each(func(l *Link) { l.Mend() })
	giveUp()
	// advance while something is awaited
	await := func(done <-chan error) error {
		for {
			select {
			case err := <-done:
				return err
			default:
				w.advance(w.time() + 20*time.Millisecond)
			}
		}
	}
	err = await(twice)
	if err == nil {
		done := make(chan error, 1)
		go func() {
			var err error
			ops, err = believe.Round(context.Background(), look, crowds, livePatient+time.Duration(locks)*slowest)
			done <- err
		}()
		err = await(done)
	}
	if err != nil {
		err = fmt.Errorf("%w\nwho waits there then:\n%s\nwhat members were told:\n%s", err, waiting(), v.told())
	}
	close(stop)
	err = errors.Join(err, await(result))
	closed := make(chan error, 1)
	go func() {
		for _, c := range crowds {
			c.Close()
		}
		closed <- look.Close()
	}()
	err = errors.Join(err, await(closed))
	w.stage.Lock()
	w.cluster.end()
	w.stage.Unlock()
	ended := make(chan error, 1)
	go func() {
		v.group.Wait()
		ended <- nil
	}()
	err = errors.Join(err, await(ended))
	time.Sleep(10 * time.Second) // what is still on its way arrives
	for _, broken := range check.All(w.history) {
		err = errors.Join(err, errors.New(broken.String()))
	}
	return ops, err
}

// waiting are the goroutines of acquisitions and their attempts: where each
// stands when a round has failed.
func waiting() string {
	buf := make([]byte, 16<<20)
	buf = buf[:runtime.Stack(buf, true)]
	var list []string
	for _, g := range strings.Split(string(buf), "\n\n") {
		if strings.Contains(g, "client.(*Client).acquire(") || strings.Contains(g, "client.(*stream)") {
			list = append(list, g)
		}
	}
	return strings.Join(list, "\n\n")
}

// told is the story of the members, and what their managers count now.
func (v *live) told() string {
	var list []string
	for _, e := range v.w.history.Events() {
		if e.Kind == check.Noted {
			list = append(list, e.String())
		}
	}
	for _, n := range v.w.cluster.nodes {
		list = append(list, fmt.Sprintf("%d: %+v", n.id, n.manager.Status()))
	}
	return strings.Join(list, "\n")
}

// exclusive fails when a lock is believed twice at one moment.
func exclusive(crowds believe.Crowds) error {
	tokens := map[string]uint64{}
	for _, c := range crowds {
		for _, h := range c.Report().Holds {
			if other, ok := tokens[h.Name]; ok && other != h.Token {
				return fmt.Errorf("I1: tokens %d and %d of %s are believed at once", other, h.Token, h.Name)
			}
			tokens[h.Name] = h.Token
		}
	}
	return nil
}

// network schedules the faults between clients and servers.
func (w *World) network(r *rand.Rand, clients int) {
	at := time.Duration(0)
	for i := uint64(0); ; i++ {
		at += time.Duration(r.IntN(900)) * time.Millisecond
		if at > liveFaults {
			return
		}
		who, kind, d := r.IntN(clients), r.IntN(5), time.Duration(r.IntN(2500))*time.Millisecond
		w.after(at, 14<<56|i, func() bool {
			w.live.each(func(l *Link) {
				switch kind {
				case 0:
					l.Stall(who, d)
				case 1:
					l.Slow(who, d/20)
				case 2:
					l.Slow(who, 0)
				default:
					l.Reset(who)
				}
			})
			return true
		})
	}
}
