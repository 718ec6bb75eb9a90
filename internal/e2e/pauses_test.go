//go:build linux

package e2e

import (
	"bufio"
	"context"
	"flag"
	"fmt"
	"math/rand/v2"
	"net"
	"os"
	"os/exec"
	"slices"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/distlock/distlock/client"
	"github.com/distlock/distlock/fence"
	"github.com/distlock/distlock/internal/reliability/check"
)

var faultsEach = flag.Int("faults", 4, "pauses and partitions of each sort in TestPausesAndPartitions")

const (
	holderEnv = "DISTLOCK_E2E_HOLDER"
	holderTTL = 500 * time.Millisecond
)

// holder is a process that takes a lock again and again, tells the judge until
// when it counts on it, and writes to what the lock guards. The judge's clock
// is this machine's, as is the holder's. It ends with its connection. servers
// are their addresses, each with that of the proxy before it.
func holder(servers, name, judge string) error {
	conn, err := net.Dial("tcp", judge)
	if err != nil {
		return err
	}
	fmt.Fprintln(conn, name)
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	go func() { // the judge's word is the end
		bufio.NewReader(conn).ReadByte()
		os.Exit(0)
	}()
	endpoints, dial := through(servers)
	c, err := client.New(endpoints, dial)
	if err != nil {
		return err
	}
	for {
		asked := time.Now()
		lock, err := c.Acquire(ctx, name, client.TTL(holderTTL))
		if err != nil {
			time.Sleep(10 * time.Millisecond)
			continue
		}
		fmt.Fprintf(conn, "acquired %d %d %d\n", lock.Token(), asked.UnixNano(), time.Now().UnixNano())
		for range 1 + rand.IntN(30) {
			now := time.Now() // first: a stop in between must not stretch the window
			left := lock.Remaining()
			if left == 0 || lock.Err() != nil {
				break
			}
			fmt.Fprintf(conn, "believes %d %d %d\n", lock.Token(), now.UnixNano(), now.Add(left).UnixNano())
			if lock.Err() == nil {
				if rand.IntN(40) == 0 { // held up between the look and the write
					time.Sleep(time.Duration(rand.Int64N(int64(2 * holderTTL))))
				}
				fmt.Fprintf(conn, "writes %d %d %d\n", lock.Token(), lock.Pass().Floor, 0)
			}
			time.Sleep(5 * time.Millisecond)
		}
		fmt.Fprintf(conn, "doubts %d %d 0\n", lock.Token(), time.Now().UnixNano())
		bounded, stop := context.WithTimeout(ctx, holderTTL)
		lock.Release(bounded)
		stop()
	}
}

// TestPausesAndPartitions stops servers and holders and harms the network
// between them, for 0.1 to 3 TTLs, while two processes each compete for a lock.
func TestPausesAndPartitions(t *testing.T) {
	all := &tally{counts: make(map[string]int)}
	t.Run("all", func(t *testing.T) { all.run(t) })
	t.Logf("asked for %d of each: %v; %d grants were counted on, %d writes accepted and %d late ones turned away", *faultsEach, all.counts, all.grants, all.accepted, all.refused)
}

// tally adds up what was done in all arenas.
type tally struct {
	mu                        sync.Mutex
	counts                    map[string]int
	grants, accepted, refused int
}

func (all *tally) count(kind string) {
	all.mu.Lock()
	defer all.mu.Unlock()
	all.counts[kind]++
}

// run returns before its parts, which wait most of the time, have ended.
func (all *tally) run(t *testing.T) {
	t.Run("one node", func(t *testing.T) {
		t.Parallel()
		srv := startServer(t, "--data-dir", t.TempDir(), "--run-async")
		newArenas(t, all, 6, []string{srv.address}).play(*faultsEach, []harm{
			{"server stopped", *faultsEach, func(r *rand.Rand, hold func()) {
				srv.signal(syscall.SIGSTOP)
				hold()
				srv.signal(syscall.SIGCONT)
			}},
		})
	})
	const clusters = 6
	for n := range clusters {
		t.Run(fmt.Sprint("three nodes/", n), func(t *testing.T) {
			t.Parallel()
			share := (*faultsEach + n) / clusters
			if share == 0 {
				return
			}
			g := startGroup(t, 3, "--run-async", "--election-timeout", "300ms")
			newArenas(t, all, 2, g.endpoints()).play(0, g.harms(share))
		})
	}
}

// harm is a sort of fault. hold is called for as long as it lasts.
type harm struct {
	name  string
	times int
	do    func(r *rand.Rand, hold func())
}

// harms are the faults of a cluster's processes and of the network between them.
func (g *group) harms(times int) []harm {
	stop := func(m *member, hold func()) {
		m.signal(syscall.SIGSTOP)
		hold()
		m.signal(syscall.SIGCONT)
	}
	cut := func(hold func(), ways ...way) {
		g.net.set(true, ways...)
		hold()
		g.net.mend()
	}
	// others are the followers, in random order.
	others := func(r *rand.Rand, leader *member) (list []*member) {
		for _, i := range r.Perm(len(g.members)) {
			if m := g.members[i]; m != leader {
				list = append(list, m)
			}
		}
		return list
	}
	apart := func(to, from bool, peers int) func(*rand.Rand, func()) {
		return func(r *rand.Rand, hold func()) {
			leader := g.leader()
			var ways []way
			for _, m := range others(r, leader)[:peers] {
				if to {
					ways = append(ways, way{m.id, leader.id})
				}
				if from {
					ways = append(ways, way{leader.id, m.id})
				}
			}
			cut(hold, ways...)
		}
	}
	return []harm{
		{"leader stopped", times, func(r *rand.Rand, hold func()) { stop(g.leader(), hold) }},
		{"follower stopped", times, func(r *rand.Rand, hold func()) { stop(others(r, g.leader())[0], hold) }},
		{"leader alone", times, apart(true, true, 2)},
		{"nothing reaches the leader", times, apart(true, false, 2)},
		{"nothing leaves the leader", times, apart(false, true, 2)},
		{"leader and a follower apart", times, apart(true, true, 1)},
		{"members slow", times, func(r *rand.Rand, hold func()) {
			g.net.slow(time.Duration(r.Int64N(int64(holderTTL / 4))))
			hold()
			g.net.mend()
		}},
		{"members' connections reset", times, func(r *rand.Rand, hold func()) { g.net.reset() }},
	}
}

// arenas is where holders compete, two for each lock, each behind a network of
// its own, and one referee judges them all.
type arenas struct {
	t       *testing.T
	begin   time.Time
	referee *referee
	names   []string
	holders [][2]*exec.Cmd
	nets    [][2]*faulty
	servers []string
	tally   *tally
}

// newArenas starts the holders of n locks.
func newArenas(t *testing.T, all *tally, n int, servers []string) *arenas {
	begin := time.Now()
	a := &arenas{t: t, begin: begin, servers: servers, tally: all}
	a.referee = &referee{t: t, begin: begin, history: &check.History{Heal: 5 * time.Second}}
	a.referee.listen()
	t.Cleanup(func() {
		for _, pair := range a.holders {
			for _, cmd := range pair {
				if cmd != nil {
					cmd.Process.Kill()
					cmd.Wait()
				}
			}
		}
	})
	for i := range n {
		name := fmt.Sprint("arena/", i)
		a.names = append(a.names, name)
		a.holders, a.nets = append(a.holders, [2]*exec.Cmd{}), append(a.nets, [2]*faulty{})
		for k := range 2 {
			net := newFaulty(t, servers...)
			cmd := exec.Command(os.Args[0], net.pairs(servers), name, a.referee.address)
			cmd.Env = append(os.Environ(), holderEnv+"=1")
			cmd.Stderr = os.Stderr
			if err := cmd.Start(); err != nil {
				t.Fatal(err)
			}
			a.holders[i][k], a.nets[i][k] = cmd, net
		}
	}
	return a
}

// lasts is how long a fault goes on.
func lasts(r *rand.Rand) time.Duration {
	return holderTTL/10 + time.Duration(r.Int64N(int64(3*holderTTL-holderTTL/10)))
}

// play harms the servers in each way, one after the other, and the holders each
// times, and as long as the servers are being harmed. Then it judges.
func (a *arenas) play(each int, servers []harm) {
	t := a.t
	kinds := []string{"holder stopped", "cut both ways", "cut to the server", "cut from the server", "slow", "reset"}
	if len(a.servers) > 1 {
		kinds = append(kinds, "cut from one of the servers")
	}
	var group sync.WaitGroup
	var faults atomic.Int64
	harmed := make(chan struct{})
	for n := range a.names {
		group.Go(func() {
			r := rand.New(rand.NewPCG(uint64(n), uint64(a.begin.UnixNano())))
			for i := n; ; i += len(a.names) {
				if i >= each*len(kinds) || spent(a.begin) {
					select {
					case <-harmed:
						return
					default:
					}
				}
				time.Sleep(time.Duration(50+r.IntN(250)) * time.Millisecond)
				a.harmHolder(r, kinds[(n+i/len(a.names))%len(kinds)], n)
				faults.Add(1)
			}
		})
	}
	r := rand.New(rand.NewPCG(99, uint64(a.begin.UnixNano())))
	for round, more := 0, true; more; round++ {
		more = false
		for _, h := range servers {
			if round < h.times && !spent(a.begin) {
				time.Sleep(time.Duration(100+r.IntN(500)) * time.Millisecond)
				h.do(r, func() { time.Sleep(lasts(r)) })
				a.tally.count(h.name)
				faults.Add(1)
				more = true
			}
		}
	}
	close(harmed)
	group.Wait()
	j := a.referee
	j.history.Add(check.Event{At: time.Since(a.begin), Kind: check.Healed})
	j.mu.Lock()
	j.healed = true
	j.mu.Unlock()
	j.await(a.names)
	j.close()
	j.history.End = time.Since(a.begin)
	for _, v := range check.All(j.history) {
		t.Error(v)
	}
	j.mu.Lock()
	defer j.mu.Unlock()
	if n := faults.Load(); len(j.tokens) < int(n)/2 {
		t.Errorf("only %d grants beside %d faults", len(j.tokens), n)
	}
	a.tally.mu.Lock()
	defer a.tally.mu.Unlock()
	a.tally.grants += len(j.tokens)
	a.tally.accepted += j.accepted
	a.tally.refused += j.refused
	for _, name := range a.names {
		if !j.after[name] {
			t.Errorf("I8: nobody was granted %s after the last fault", name)
		}
	}
}

// harmHolder harms one of the two that compete for a lock.
func (a *arenas) harmHolder(r *rand.Rand, kind string, arena int) {
	i := r.IntN(2)
	p, process := a.nets[arena][i], a.holders[arena][i].Process
	switch kind {
	case "holder stopped":
		process.Signal(syscall.SIGSTOP)
		defer process.Signal(syscall.SIGCONT)
	case "cut both ways":
		p.hold(toServer, fromServer)
	case "cut to the server":
		p.hold(toServer)
	case "cut from the server":
		p.hold(fromServer)
	case "cut from one of the servers":
		p.set(func() { p.only = a.servers[r.IntN(len(a.servers))] })
		p.hold(toServer, fromServer)
	case "slow":
		p.slow(time.Duration(r.Int64N(int64(holderTTL))))
	case "reset":
		p.reset()
	}
	if kind != "reset" {
		time.Sleep(lasts(r))
	}
	p.mend()
	a.tally.count(kind)
}

// referee hears what holders say and stands at what the locks guard.
type referee struct {
	t       *testing.T
	begin   time.Time
	history *check.History
	address string
	l       net.Listener
	guard   fence.Memory
	group   sync.WaitGroup

	mu       sync.Mutex
	conns    []net.Conn
	tokens   map[uint64]bool
	after    map[string]bool // locks granted after the last fault
	healed   bool
	closed   bool
	accepted int
	refused  int
	acquired uint64
}

// await waits until each lock was granted again, for as long as that may take
// at most.
func (j *referee) await(names []string) {
	for until := time.Now().Add(j.history.Heal); time.Now().Before(until); time.Sleep(10 * time.Millisecond) {
		j.mu.Lock()
		missing := slices.ContainsFunc(names, func(name string) bool { return !j.after[name] })
		j.mu.Unlock()
		if !missing {
			return
		}
	}
}

func (j *referee) listen() {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		j.t.Fatal(err)
	}
	j.l, j.address, j.tokens, j.after = l, l.Addr().String(), map[uint64]bool{}, map[string]bool{}
	j.group.Go(func() {
		for who := 0; ; who++ {
			c, err := l.Accept()
			if err != nil {
				return
			}
			j.mu.Lock()
			j.conns = append(j.conns, c)
			j.mu.Unlock()
			j.group.Go(func() { j.hear(c, who) })
		}
	})
	j.t.Cleanup(j.close)
}

func (j *referee) close() {
	j.mu.Lock()
	again := j.closed
	j.closed = true
	for _, c := range j.conns {
		c.Close()
	}
	j.mu.Unlock()
	j.l.Close()
	if !again {
		j.group.Wait()
	}
}

func (j *referee) at(ns int64) time.Duration { return time.Duration(ns - j.begin.UnixNano()) }

func (j *referee) hear(c net.Conn, who int) {
	lines := bufio.NewScanner(c)
	name := ""
	if lines.Scan() { // its first line names the lock
		name = lines.Text()
	}
	for lines.Scan() {
		var what string
		var token uint64
		var x, y int64
		if _, err := fmt.Sscan(lines.Text(), &what, &token, &x, &y); err != nil {
			continue
		}
		switch what {
		case "acquired":
			j.mu.Lock()
			j.acquired++
			id := j.acquired
			j.mu.Unlock()
			j.history.Add(check.Event{At: j.at(y), Kind: check.Acquired, Who: who, Request: id, Token: token, Locks: []string{name}, Sent: j.at(x)})
		case "believes":
			j.history.Add(check.Event{At: j.at(x), Kind: check.Believes, Who: who, Token: token, Locks: []string{name}, Until: j.at(y)})
			j.mu.Lock()
			if j.healed && !j.tokens[token] {
				j.after[name] = true
				j.history.Add(check.Event{At: time.Since(j.begin), Sent: time.Since(j.begin), Kind: check.Progressed, Who: who})
			}
			j.tokens[token] = true
			j.mu.Unlock()
		case "doubts":
			j.history.Add(check.Event{At: j.at(x), Kind: check.Doubts, Who: who, Token: token})
		case "writes":
			pass := fence.Pass{Token: fence.Token(token), Floor: fence.Token(x)}
			err := j.guard.Write(context.Background(), name, pass, func() error {
				j.history.Add(check.Event{At: time.Since(j.begin), Kind: check.Wrote, Who: who, Locks: []string{name}, Token: token, Floor: uint64(x)})
				return nil
			})
			j.mu.Lock()
			if err == nil {
				j.accepted++
			} else {
				j.refused++
			}
			j.mu.Unlock()
		}
	}
}
