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
	"sync"
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
// is this machine's, as is the holder's. It ends with its connection.
func holder(endpoint, name, judge string) error {
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
	c, err := client.New([]string{endpoint})
	if err != nil {
		return err
	}
	for {
		lock, err := c.Acquire(ctx, name, client.TTL(holderTTL))
		if err != nil {
			time.Sleep(10 * time.Millisecond)
			continue
		}
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
	const arenas = 6
	srv := startServer(t, "--data-dir", t.TempDir(), "--run-async")
	begin := time.Now()
	h := &check.History{Heal: 5 * time.Second}
	j := &referee{t: t, begin: begin, history: h}
	j.listen()
	var group sync.WaitGroup
	var mu sync.Mutex
	counts := map[string]int{}
	count := func(kind string) {
		mu.Lock()
		defer mu.Unlock()
		counts[kind]++
	}
	kinds := []string{"holder stopped", "cut both ways", "cut to the server", "cut from the server", "slow", "reset"}
	total := *faultsEach * len(kinds)
	var procs []*exec.Cmd
	for a := range arenas {
		name := fmt.Sprint("arena/", a)
		var proxies []*faulty
		var holders []*exec.Cmd
		for range 2 {
			p := newFaulty(t, srv.address)
			cmd := exec.Command(os.Args[0], p.address, name, j.address)
			cmd.Env = append(os.Environ(), holderEnv+"=1")
			cmd.Stderr = os.Stderr
			if err := cmd.Start(); err != nil {
				t.Fatal(err)
			}
			proxies, holders, procs = append(proxies, p), append(holders, cmd), append(procs, cmd)
		}
		group.Go(func() {
			r := rand.New(rand.NewPCG(uint64(a), uint64(begin.UnixNano())))
			for n := a; n < total; n += arenas {
				time.Sleep(time.Duration(50+r.IntN(250)) * time.Millisecond)
				i, lasts := r.IntN(2), holderTTL/10+time.Duration(r.Int64N(int64(3*holderTTL-holderTTL/10)))
				kind := kinds[(a+n/arenas)%len(kinds)]
				switch kind {
				case "holder stopped":
					holders[i].Process.Signal(syscall.SIGSTOP)
					time.Sleep(lasts)
					holders[i].Process.Signal(syscall.SIGCONT)
				case "cut both ways":
					proxies[i].hold(toServer, fromServer)
					time.Sleep(lasts)
				case "cut to the server":
					proxies[i].hold(toServer)
					time.Sleep(lasts)
				case "cut from the server":
					proxies[i].hold(fromServer)
					time.Sleep(lasts)
				case "slow":
					proxies[i].slow(time.Duration(r.Int64N(int64(holderTTL))))
					time.Sleep(lasts)
				case "reset":
					proxies[i].reset()
				}
				proxies[i].mend()
				count(kind)
			}
		})
	}
	t.Cleanup(func() {
		for _, cmd := range procs {
			cmd.Process.Kill()
			cmd.Wait()
		}
	})
	done := make(chan struct{})
	group.Go(func() {
		r := rand.New(rand.NewPCG(99, uint64(begin.UnixNano())))
		for range *faultsEach {
			time.Sleep(time.Duration(200+r.IntN(600)) * time.Millisecond)
			srv.signal(syscall.SIGSTOP)
			time.Sleep(holderTTL/10 + time.Duration(r.Int64N(int64(3*holderTTL))))
			srv.signal(syscall.SIGCONT)
			count("server stopped")
		}
	})
	go func() { group.Wait(); close(done) }()
	<-done
	h.Add(check.Event{At: time.Since(begin), Kind: check.Healed})
	j.mu.Lock()
	j.healed = true
	j.mu.Unlock()
	time.Sleep(3 * time.Second)
	j.close()
	h.End = time.Since(begin)
	for _, v := range check.All(h) {
		t.Error(v)
	}
	j.mu.Lock()
	defer j.mu.Unlock()
	t.Logf("%v; %d grants were counted on, %d writes accepted and %d late ones turned away", counts, len(j.tokens), j.accepted, j.refused)
	if len(j.tokens) < total {
		t.Errorf("only %d grants", len(j.tokens))
	}
	for a := range arenas {
		if name := fmt.Sprint("arena/", a); !j.after[name] {
			t.Errorf("I8: nobody was granted %s after the last fault", name)
		}
	}
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
