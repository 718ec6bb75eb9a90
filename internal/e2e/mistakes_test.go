//go:build linux

package e2e

import (
	"context"
	"flag"
	"fmt"
	"maps"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/distlock/distlock/client"
)

var (
	mistakes      = flag.Int("mistakes", 2, "how many sequences TestMistakes runs")
	firstMistakes = flag.Uint64("first-mistakes", 4, "the first of them; 0 for one at random")
)

// TestMistakes lets an operator make mistakes with a cluster of three, one after
// the other, each mended by what the docs say, while members are killed, stopped,
// cut off and started: directories are lost, copied, set back and started twice, members
// get other addresses and lists, leave and come back, and in the end two of three
// are lost. Meanwhile locks are granted. No token may be granted twice, nothing that was
// acknowledged be lost without a word like recover, and the members' states must be
// equal in the end.
func TestMistakes(t *testing.T) {
	begin := time.Now()
	first := *firstMistakes
	if first == 0 {
		first = 1 + rand.Uint64N(1<<30)
	}
	n := 0
	for ; n < *mistakes && !spent(begin); n++ {
		seed := first + uint64(n)
		t.Run(fmt.Sprint(seed), func(t *testing.T) { newOperator(t, seed).run() })
		if t.Failed() {
			break
		}
	}
	t.Logf("%d sequences of %d", n, *mistakes)
}

// operator has three members, and makes mistakes.
type operator struct {
	t       *testing.T
	rng     *rand.Rand
	dir     string
	net     *partitions
	members []*server
	peers   []string // addresses, of a proxy before each
	listen  []string // where they listen themselves
	dirs    []string
	list    string
	mending sync.WaitGroup
	extra   int // directories made beside the members'
	did     []string
	c       *client.Client

	mu    sync.Mutex
	acked map[string]uint64 // token by lock
	by    map[uint64]string // lock by token, ever
}

func newOperator(t *testing.T, seed uint64) *operator {
	o := &operator{t: t, rng: rand.New(rand.NewPCG(seed, 7)), dir: t.TempDir(), acked: map[string]uint64{}, by: map[uint64]string{}}
	o.net = newPartitions(t)
	for i := range 3 {
		o.listen = append(o.listen, freeAddress(t))
		o.peers = append(o.peers, o.net.before(fmt.Sprintf("n%d", i+1), o.listen[i]))
		o.dirs = append(o.dirs, filepath.Join(o.dir, fmt.Sprintf("n%d", i+1)))
	}
	o.list = fmt.Sprintf("n1=%s,n2=%s,n3=%s", o.peers[0], o.peers[1], o.peers[2])
	var endpoints []string
	for i := range 3 {
		m := &server{t: t, address: freeAddress(t)}
		m.args = o.args(i)
		o.members = append(o.members, m)
		endpoints = append(endpoints, m.address)
		m.spawn()
	}
	t.Cleanup(func() {
		o.mending.Wait()
		for i, m := range o.members {
			m.kill()
			if t.Failed() {
				log := m.logs()
				t.Logf("log of n%d:\n%s", i+1, log[max(0, len(log)-3000):])
			}
		}
		if t.Failed() {
			t.Logf("what the operator did:\n%s", strings.Join(o.did, "\n"))
		}
	})
	var err error
	if o.c, err = client.New(endpoints); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { o.c.Close() })
	return o
}

func (o *operator) args(i int, more ...string) []string {
	return append([]string{"--node-id", fmt.Sprintf("n%d", i+1), "--peer-address", o.peers[i], "--peer-listen", o.listen[i],
		"--data-dir", o.dirs[i], "--initial-cluster", o.list, "--drain-timeout", "1s"}, more...)
}

func (o *operator) note(format string, args ...any) {
	o.did = append(o.did, time.Now().Format("15:04:05.000 ")+fmt.Sprintf(format, args...))
}

func (o *operator) run() {
	o.healthy(3)
	stop := make(chan struct{})
	var group sync.WaitGroup
	for range 2 {
		group.Add(1)
		go func() {
			defer group.Done()
			o.work(stop)
		}()
	}
	all := []func(int){o.wipe, o.wipeAndJoin, o.copyElsewhere, o.copyInPlace, o.wrongList, o.wrongAddress, o.move, o.startTwice, o.leave, o.crash, o.pause}
	for range 6 {
		o.disturb()
		all[o.rng.IntN(len(all))](o.rng.IntN(3))
		o.healthy(3)
	}
	close(stop)
	group.Wait()
	o.judge()
	if o.rng.IntN(2) == 0 {
		o.loseTwo(o.rng.IntN(3))
	}
}

// work takes locks, one after the other, and keeps them.
func (o *operator) work(stop <-chan struct{}) {
	for i := 0; ; i++ {
		select {
		case <-stop:
			return
		case <-time.After(20 * time.Millisecond):
		}
		o.take(fmt.Sprintf("lock/%p/%d", &i, i))
	}
}

// take acquires a lock, for long, and notes what was acknowledged.
func (o *operator) take(name string) {
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	lock, err := o.c.TryAcquire(ctx, name, client.TTL(time.Hour))
	if err != nil {
		return // what that did is unknown
	}
	o.mu.Lock()
	defer o.mu.Unlock()
	token := uint64(lock.Token())
	if other, ok := o.by[token]; ok {
		o.t.Errorf("token %d was granted for %s and for %s", token, other, name)
	}
	o.by[token], o.acked[name] = name, token
}

// cli runs a command against the cluster.
func (o *operator) cli(args ...string) (string, error) {
	ctx, cancel := context.WithTimeout(context.Background(), 15*time.Second)
	defer cancel()
	cmd := exec.CommandContext(ctx, binary, args...)
	var endpoints []string
	for _, m := range o.members {
		endpoints = append(endpoints, m.address)
	}
	cmd.Env = append(os.Environ(), "DISTLOCK_ENDPOINTS="+strings.Join(endpoints, ","))
	out, err := cmd.CombinedOutput()
	return strings.TrimSpace(string(out)), err
}

// must repeats a command until it succeeds: an election may be on its way.
func (o *operator) must(args ...string) {
	o.t.Helper()
	o.note("distlock %s", strings.Join(args, " "))
	for until := time.Now().Add(40 * time.Second); ; time.Sleep(200 * time.Millisecond) {
		out, err := o.cli(args...)
		if err == nil {
			return
		}
		if time.Now().After(until) {
			o.t.Fatalf("distlock %s: %v: %s", strings.Join(args, " "), err, out)
		}
	}
}

// healthy waits until so many voters are up, and starts those that should be and
// are not: a member may have been killed.
func (o *operator) healthy(n int) {
	o.t.Helper()
	for until := time.Now().Add(60 * time.Second); ; time.Sleep(100 * time.Millisecond) {
		out, err := o.cli("cluster", "members")
		up := 0
		for line := range strings.Lines(out) {
			if f := strings.Fields(line); err == nil && strings.Contains(line, "voter") && slices.Contains(f, "yes") {
				up++
			}
		}
		if up == n {
			return
		}
		if time.Now().After(until) {
			o.t.Fatalf("%d of %d are up:\n%s", up, n, out)
		}
	}
}

// ends waits until a process that must not run has ended by itself, with a line
// that says why.
func (o *operator) ends(m *server, why ...string) {
	o.t.Helper()
	select {
	case <-m.exited:
	case <-time.After(40 * time.Second):
		o.t.Fatalf("it runs, and should have ended: %s\n%s", why, m.logs())
	}
	log := strings.TrimSpace(m.logs())
	last := log[strings.LastIndex(log, "\n")+1:]
	if m.cmd.ProcessState.ExitCode() != 1 || !strings.HasPrefix(last, "distlock: ") || !slices.ContainsFunc(why, func(s string) bool { return strings.Contains(last, s) }) {
		o.t.Fatalf("it ended with %v, and says\n%s\nwant %q", m.cmd.ProcessState, last, why)
	}
	m.mu.Lock()
	m.log.Reset()
	m.mu.Unlock()
}

// stranger is a process beside the members.
func (o *operator) stranger(args ...string) *server {
	m := &server{t: o.t, address: freeAddress(o.t), args: args}
	m.spawn()
	o.t.Cleanup(m.kill)
	return m
}

func (o *operator) aside() string {
	o.extra++
	return filepath.Join(o.dir, fmt.Sprint("aside", o.extra))
}

func (o *operator) copyOf(dir string) string {
	var out []byte
	var err error
	for range 20 { // of a directory in use: a file may go meanwhile
		to := o.aside()
		if out, err = exec.Command("cp", "-r", dir, to).CombinedOutput(); err == nil {
			return to
		}
	}
	o.t.Fatalf("%v: %s", err, out)
	return ""
}

// disturb kills, stops or cuts off a member now and then, which comes back by
// itself.
func (o *operator) disturb() {
	switch i := o.rng.IntN(3); o.rng.IntN(5) {
	case 0:
		o.crash(i)
	case 1:
		o.pause(i)
	case 2, 3:
		o.cut(i)
	}
}

// cut cuts a member off for a while, from one or both of the others, both ways or
// one; what comes next begins meanwhile.
func (o *operator) cut(i int) {
	var ways []way
	a := fmt.Sprintf("n%d", i+1)
	for k := range 3 {
		if b := fmt.Sprintf("n%d", k+1); k != i {
			for _, w := range []way{{a, b}, {b, a}} {
				if o.rng.IntN(4) > 0 {
					ways = append(ways, w)
				}
			}
		}
	}
	d := time.Duration(o.rng.IntN(4000)) * time.Millisecond
	o.note("cut for %v: %v", d, ways)
	o.net.set(true, ways...)
	o.mending.Go(func() {
		time.Sleep(d)
		o.net.mend()
	})
}

func (o *operator) crash(i int) {
	o.note("kill -9 n%d, and start it", i+1)
	o.members[i].kill()
	o.members[i].spawn()
}

func (o *operator) pause(i int) {
	o.note("SIGSTOP n%d", i+1)
	o.members[i].signal(syscall.SIGSTOP)
	time.Sleep(time.Duration(300+o.rng.IntN(1500)) * time.Millisecond)
	o.members[i].signal(syscall.SIGCONT)
}

// wipe loses a member's directory, and starts it as always. It is refused, and
// replaced.
func (o *operator) wipe(i int) {
	o.note("n%d loses its directory", i+1)
	o.members[i].kill()
	o.rename(o.dirs[i], o.aside())
	o.members[i].spawn()
	o.ends(o.members[i], "another data directory")
	if o.rng.IntN(2) == 0 {
		o.disturbOther(i)
	}
	o.rejoin(i)
}

// disturbOther kills another member, of two that are left, and starts it again.
func (o *operator) disturbOther(i int) {
	o.crash((i + 1 + o.rng.IntN(2)) % 3)
	o.healthy(2)
}

// rejoin makes a member whose directory is gone another one of its name.
func (o *operator) rejoin(i int) {
	o.must("cluster", "remove", fmt.Sprintf("n%d", i+1))
	if _, err := os.Stat(o.dirs[i]); err == nil {
		o.rename(o.dirs[i], o.aside())
	}
	o.join(i)
}

// join starts a node that is no member with an empty directory.
func (o *operator) join(i int) {
	name := fmt.Sprintf("n%d", i+1)
	o.note("%s joins", name)
	m := o.members[i]
	other := o.members[(i+1+o.rng.IntN(2))%3]
	m.args = o.joining(i, other)
	m.spawn()
	o.healthy(3)
}

// joining is how a node is started that is to join through another.
func (o *operator) joining(i int, through *server) []string {
	return []string{"--node-id", fmt.Sprintf("n%d", i+1), "--peer-address", o.peers[i], "--peer-listen", o.listen[i],
		"--data-dir", o.dirs[i], "--join", through.address, "--drain-timeout", "1s"}
}

// wipeAndJoin skips the removal.
func (o *operator) wipeAndJoin(i int) {
	o.note("n%d loses its directory and joins", i+1)
	o.members[i].kill()
	o.rename(o.dirs[i], o.aside())
	m := o.members[i]
	usual := m.args
	m.args = o.joining(i, o.members[(i+1)%3])
	m.spawn()
	o.ends(m, "another data directory")
	m.args = usual
	o.rejoin(i)
}

// copyElsewhere starts a copy of a member's directory at an address of its own.
func (o *operator) copyElsewhere(i int) {
	o.note("a copy of n%d at another address", i+1)
	dir := o.copyOf(o.dirs[i])
	o.ends(o.stranger("--peer-address", freeAddress(o.t), "--data-dir", dir), "nothing runs at its old address")
}

// copyInPlace starts an older copy of a member's directory instead of it.
func (o *operator) copyInPlace(i int) {
	o.note("an old copy of n%d in its place", i+1)
	m := o.members[i]
	m.kill()
	old := o.copyOf(o.dirs[i])
	m.spawn()
	o.healthy(3)
	m.kill()
	twin := &server{t: o.t, address: m.address, args: []string{"--peer-address", o.peers[i], "--peer-listen", o.listen[i], "--data-dir", old}}
	twin.spawn()
	o.t.Cleanup(twin.kill)
	o.ends(twin, "this is start")
	m.spawn()
}

// wrongList starts a member that has nothing with a list in which it is alone
// with the others, and one with a list of itself and a stranger.
func (o *operator) wrongList(i int) {
	o.note("a new node with a list of the old")
	at := freeAddress(o.t)
	list := fmt.Sprintf("n9=%s,n1=%s,n2=%s", at, o.peers[0], o.peers[1])
	o.ends(o.stranger("--node-id", "n9", "--peer-address", at, "--data-dir", o.aside(), "--initial-cluster", list), "has a history already")
}

// wrongAddress starts a member where the others do not look for it.
func (o *operator) wrongAddress(i int) {
	o.note("n%d at a wrong address", i+1)
	m := o.members[i]
	m.kill()
	usual := slices.Clone(m.args)
	at := slices.Index(m.args, "--peer-address")
	m.args[at+1] = freeAddress(o.t)
	m.args = withoutList(m.args)
	m.spawn()
	o.ends(m, "cluster add n", "that has not begun") // it may have nothing yet
	m.args = usual
	m.spawn()
}

// move changes a member's address, as the docs say.
func (o *operator) move(i int) {
	m := o.members[i]
	m.kill()
	o.listen[i] = freeAddress(o.t)
	o.peers[i] = o.net.before(fmt.Sprintf("n%d", i+1), o.listen[i])
	m.args[slices.Index(m.args, "--peer-address")+1] = o.peers[i]
	m.args[slices.Index(m.args, "--peer-listen")+1] = o.listen[i]
	m.args = withoutList(m.args)
	o.must("cluster", "add", fmt.Sprintf("n%d", i+1), o.peers[i])
	m.spawn()
}

// withoutList leaves the first list out, which is for the first start only.
func withoutList(args []string) []string {
	if at := slices.Index(args, "--initial-cluster"); at >= 0 {
		return slices.Delete(args, at, at+2)
	}
	return args
}

// startTwice starts a second process on a member's directory.
func (o *operator) startTwice(i int) {
	o.healthy(3) // it has the directory
	o.note("a second process on the directory of n%d", i+1)
	o.ends(o.stranger("--peer-address", freeAddress(o.t), "--data-dir", o.dirs[i]), "another")
}

// leave removes a member that runs, and lets it come back.
func (o *operator) leave(i int) {
	o.note("n%d leaves", i+1)
	o.must("cluster", "remove", fmt.Sprintf("n%d", i+1))
	o.ends(o.members[i], "was removed from")
	o.members[i].spawn()
	o.ends(o.members[i], "was removed from")
	o.rename(o.dirs[i], o.aside())
	o.join(i)
}

func (o *operator) rename(from, to string) {
	o.t.Helper()
	if err := os.Rename(from, to); err != nil {
		o.t.Fatal(err)
	}
}

// judge holds what was acknowledged against what the members have.
func (o *operator) judge() {
	o.t.Helper()
	o.healthy(3)
	states := make([]map[string]uint64, 3)
	for i, m := range o.members {
		states[i] = o.state(m.address)
	}
	stale := make([]map[string]uint64, 3)
	for until := time.Now().Add(20 * time.Second); ; time.Sleep(100 * time.Millisecond) {
		for i, m := range o.members {
			stale[i] = o.state(m.address, client.Stale())
		}
		if maps.Equal(stale[0], stale[1]) && maps.Equal(stale[1], stale[2]) {
			break
		}
		if time.Now().After(until) {
			o.t.Fatalf("the members have %d, %d and %d locks", len(stale[0]), len(stale[1]), len(stale[2]))
		}
	}
	o.mu.Lock()
	defer o.mu.Unlock()
	for name, token := range o.acked {
		for i := range states {
			if got := states[i][name]; got != token {
				o.t.Errorf("%s was acknowledged with token %d, and n%d has %d", name, token, i+1, got)
			}
		}
	}
	o.note("%d acknowledged locks are there", len(o.acked))
	if len(o.acked) == 0 {
		o.t.Error("nothing was granted")
	}
}

// state is what a member has: the token that holds each lock.
func (o *operator) state(address string, how ...client.ReadOption) map[string]uint64 {
	o.t.Helper()
	c, err := client.New([]string{address})
	if err != nil {
		o.t.Fatal(err)
	}
	defer c.Close()
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
	defer cancel()
	list := map[string]uint64{}
	for k, err := range c.List(ctx, "", how...) {
		if err != nil {
			o.t.Fatal(err)
		}
		for _, h := range k.Holders {
			list[k.Name] = uint64(h.Token)
		}
	}
	return list
}

// loseTwo loses the directories of all but one, which becomes a cluster of its
// own: what was acknowledged is lost with a word, and no token comes again.
func (o *operator) loseTwo(survivor int) {
	o.note("all but n%d are lost", survivor+1)
	for i, m := range o.members {
		m.kill()
		if i != survivor {
			o.rename(o.dirs[i], o.aside())
		}
	}
	out, err := o.cli("cluster", "recover", "--data-dir", o.dirs[survivor])
	if err != nil || !strings.Contains(out, "alone: tokens above") {
		o.t.Fatalf("recover: %v: %s", err, out)
	}
	name := fmt.Sprintf("n%d", survivor+1)
	o.members[survivor].args = []string{"--node-id", name, "--peer-address", o.peers[survivor], "--peer-listen", o.listen[survivor], "--data-dir", o.dirs[survivor]}
	o.members[survivor].spawn()
	o.healthy(1)
	for i, m := range o.members {
		if i == survivor {
			continue
		}
		m.args = o.joining(i, o.members[survivor])
		m.spawn()
	}
	o.healthy(3)
	o.mu.Lock()
	clear(o.acked)
	o.mu.Unlock()
	for i := range 50 {
		o.take(fmt.Sprint("after/", i))
	}
	o.judge()
}
