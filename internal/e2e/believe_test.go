//go:build linux

package e2e

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"os/exec"
	"strconv"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/distlock/distlock/client"
	"github.com/distlock/distlock/internal/reliability/believe"
)

var (
	believing = flag.Duration("believe", 10*time.Second, "how long TestBelieve harms clients and servers")
	operated  = flag.Int("believed", 0, "how many operations TestBelieve goes on for at least; 0 for as long as -believe says")
)

const crowdEnv = "DISTLOCK_E2E_CROWD"

const (
	crowdTTL = 5 * time.Second // the longest
	// An operation may take twice the longest TTL, and a call ten seconds.
	crowdPatience = 4*crowdTTL + 10*time.Second
)

// crowd is a process of one believe.Crowd, which does what its standard input
// says and answers each line with one.
func crowd(servers, owner, seed string) error {
	endpoints, dial := through(servers)
	n, err := strconv.ParseUint(seed, 10, 64)
	if err != nil {
		return err
	}
	options := []client.Option{dial}
	if n%2 == 1 {
		options = append(options, client.WithUnary())
	}
	locks := []int{8, 40, 150, 500}[n/2%4]
	c, err := believe.Start(believe.Config{
		Endpoints: endpoints, Options: options, Owner: owner, Seed: n, Hot: 3, Callers: 4, Locks: locks,
		MinTTL: time.Second, MaxTTL: crowdTTL, Pause: 20 * time.Millisecond,
	})
	if err != nil {
		return err
	}
	in := bufio.NewScanner(os.Stdin)
	for in.Scan() {
		switch order := in.Text(); order {
		case "report":
			line, err := json.Marshal(c.Report())
			if err != nil {
				return err
			}
			fmt.Println(string(line))
		case "close":
			c.Close()
			fmt.Println("closed")
			return nil
		default:
			believe.Crowds{c}.Tell(believe.Order(order))
			fmt.Println("ok")
		}
	}
	return nil // whoever started it is gone
}

// worker is a process of a crowd, behind a network of its own.
type worker struct {
	cmd *exec.Cmd
	net *faulty

	mu  sync.Mutex
	in  io.Writer
	out *bufio.Scanner
	ops int // as of its last report
}

func (w *worker) ask(order string) (string, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if _, err := fmt.Fprintln(w.in, order); err != nil {
		return "", err
	}
	if !w.out.Scan() {
		return "", fmt.Errorf("a crowd ended: %w", errors.Join(w.out.Err(), io.ErrUnexpectedEOF))
	}
	return w.out.Text(), nil
}

// workers are a believe.Party of processes.
type workers struct {
	t       *testing.T
	servers []string
	made    uint64
	before  int // operations of those that have been killed

	mu   sync.Mutex
	list []*worker
}

func (p *workers) start() {
	p.made++
	net := newFaulty(p.t, p.servers...)
	cmd := exec.Command(os.Args[0], net.pairs(p.servers), fmt.Sprint("crowd", p.made), fmt.Sprint(p.made))
	cmd.Env = append(os.Environ(), crowdEnv+"=1")
	cmd.Stderr = os.Stderr
	in, err := cmd.StdinPipe()
	if err != nil {
		p.t.Fatal(err)
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		p.t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		p.t.Fatal(err)
	}
	w := &worker{cmd: cmd, net: net, in: in, out: bufio.NewScanner(out)}
	w.out.Buffer(nil, 16<<20)
	p.mu.Lock()
	p.list = append(p.list, w)
	p.mu.Unlock()
}

// all are those that live.
func (p *workers) all() []*worker {
	p.mu.Lock()
	defer p.mu.Unlock()
	return append([]*worker(nil), p.list...)
}

// Tell implements believe.Party.
func (p *workers) Tell(o believe.Order) error {
	for _, w := range p.all() {
		if _, err := w.ask(string(o)); err != nil {
			return err
		}
	}
	return nil
}

// Reports implements believe.Party.
func (p *workers) Reports() (list []believe.Report, err error) {
	for _, w := range p.all() {
		line, err := w.ask("report")
		if err != nil {
			return nil, err
		}
		var r believe.Report
		if err := json.Unmarshal([]byte(line), &r); err != nil {
			return nil, err
		}
		w.ops = r.Ops
		list = append(list, r)
	}
	return list, nil
}

func (p *workers) ops() (n int) {
	for _, w := range p.all() {
		n += w.ops
	}
	return n + p.before
}

// replace kills one and starts another in its place.
func (p *workers) replace(i int) {
	p.mu.Lock()
	w := p.list[i]
	p.list = append(p.list[:i:i], p.list[i+1:]...)
	p.mu.Unlock()
	p.before += w.ops
	w.cmd.Process.Kill()
	w.cmd.Wait()
	p.start()
}

func (p *workers) close() {
	for _, w := range p.all() {
		if _, err := w.ask("close"); err != nil {
			p.t.Error(err)
		}
		w.cmd.Wait()
	}
}

// TestBelieve harms clients, servers and the networks between them, while
// processes take and lose locks in every way there is. No lock may be believed
// that is not held, and at each quiet moment between the faults the servers
// have exactly what the clients believe.
func TestBelieve(t *testing.T) {
	t.Run("one node", func(t *testing.T) {
		t.Parallel()
		srv := startServer(t, "--data-dir", t.TempDir(), "--run-async")
		believeUnder(t, []string{srv.address}, []harm{
			{name: "server stopped", do: func(_ *rand.Rand, hold func()) {
				srv.signal(syscall.SIGSTOP)
				hold()
				srv.signal(syscall.SIGCONT)
			}},
			{name: "server killed", do: func(_ *rand.Rand, hold func()) {
				srv.kill()
				hold()
				srv.start()
			}},
		})
	})
	t.Run("three nodes", func(t *testing.T) {
		t.Parallel()
		g := startGroup(t, 3, "--run-async", "--election-timeout", "300ms")
		harms := append(g.harms(0), harm{name: "leader killed", do: func(_ *rand.Rand, hold func()) {
			m := g.leader()
			m.kill()
			hold()
			m.start()
		}})
		believeUnder(t, g.endpoints(), harms)
	})
}

func believeUnder(t *testing.T, servers []string, harms []harm) {
	look, err := client.New(servers)
	if err != nil {
		t.Fatal(err)
	}
	defer look.Close()
	p := &workers{t: t, servers: servers}
	t.Cleanup(func() {
		for _, w := range p.all() {
			w.cmd.Process.Kill()
			w.cmd.Wait()
		}
	})
	for range 4 {
		p.start()
	}
	began := time.Now()
	r := rand.New(rand.NewPCG(uint64(began.UnixNano()), 0))
	counts := map[string]int{}
	rounds := 0
	for time.Since(began) < *believing || p.ops() < *operated {
		within, stop := context.WithTimeout(t.Context(), 8*time.Second)
		twice := make(chan error, 1)
		go func() {
			for within.Err() == nil {
				if err := believe.Twice(within, look, p); err != nil {
					twice <- err
					return
				}
				time.Sleep(200 * time.Millisecond)
			}
			twice <- nil
		}()
		for within.Err() == nil {
			time.Sleep(time.Duration(r.IntN(400)) * time.Millisecond)
			counts[believeFault(r, p, harms)]++
		}
		err := <-twice
		stop()
		if err != nil {
			t.Fatalf("after %v: %v; %v", time.Since(began), err, counts)
		}
		i := r.IntN(len(p.all()))
		if rounds%2 == 1 {
			p.replace(i)
			counts["client killed"]++
		}
		quiet := time.Now()
		if _, err := believe.Round(t.Context(), look, p, crowdPatience); err != nil {
			t.Fatalf("at the quiet moment after %v: %v; %v", time.Since(began), err, counts)
		}
		rounds++
		t.Logf("%v: %d operations; quiet within %v", time.Since(began).Round(time.Second), p.ops(), time.Since(quiet).Round(time.Millisecond))
	}
	p.close()
	t.Logf("%d operations without a difference at %d quiet moments, under %v", p.ops(), rounds, counts)
}

// believeFault harms somebody for a while, from a moment to longer than most
// TTLs, and says how.
func believeFault(r *rand.Rand, p *workers, harms []harm) string {
	span := 50*time.Millisecond + time.Duration(r.Int64N(int64(time.Second)))
	if r.IntN(4) == 0 {
		span *= 3
	}
	hold := func() { time.Sleep(span) }
	if r.IntN(3) == 0 {
		h := harms[r.IntN(len(harms))]
		h.do(r, hold)
		return h.name
	}
	list := p.all()
	w := list[r.IntN(len(list))]
	defer w.net.mend()
	switch r.IntN(8) {
	case 0:
		w.cmd.Process.Signal(syscall.SIGSTOP)
		hold()
		w.cmd.Process.Signal(syscall.SIGCONT)
		return "client stopped"
	case 1:
		w.net.hold(toServer, fromServer)
		hold()
		return "cut"
	case 2:
		w.net.hold(toServer)
		hold()
		return "cut to the server"
	case 3:
		w.net.hold(fromServer)
		hold()
		return "cut from the server"
	case 4:
		w.net.slow(span / 10)
		hold()
		return "slow"
	case 5:
		w.net.swallow()
		hold()
		return "swallowed"
	case 6:
		w.net.set(func() { w.net.twin = true })
		w.net.reset()
		hold()
		return "twins"
	}
	for range 1 + r.IntN(5) {
		w.net.reset()
		time.Sleep(span / 10)
	}
	return "reset"
}
