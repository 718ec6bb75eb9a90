//go:build linux

package e2e

import (
	"context"
	"encoding/json"
	"flag"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/backoff"
	"google.golang.org/grpc/credentials/insecure"

	"github.com/distlock/distlock/client"
	"github.com/distlock/distlock/fence"
	pb "github.com/distlock/distlock/proto/distlock/v1"
)

var (
	kills    = flag.Int("kills", 4, "leaders that TestClusterKills kills")
	election = flag.Duration("election", time.Second, "election timeout of the clusters; the default of a server is shorter, and takes a machine that is not busy")
	measure  = flag.Duration("measure", time.Second, "how long TestClusterThroughput measures each")
	pause    = flag.Int("pauses", 2, "leaders that TestClusterPauses stops")
)

// member is one process of a cluster.
type member struct {
	*server
	id   string
	peer string // peer address, of its proxy

	conn *grpc.ClientConn // for leads
}

// group is the processes of a cluster, with a proxy before each.
type group struct {
	t       *testing.T
	net     *partitions
	members []*member
	dir     string
}

// startGroup starts a new cluster of n.
func startGroup(t *testing.T, n int, args ...string) *group {
	t.Helper()
	g := prepareGroup(t, n, args...)
	g.begin()
	return g
}

// prepareGroup makes one whose processes have not begun.
func prepareGroup(t *testing.T, n int, args ...string) *group {
	t.Helper()
	g := &group{t: t, net: newPartitions(t), dir: t.TempDir()}
	var initial []string
	var listen []string
	for i := range n {
		id := fmt.Sprintf("n%d", i+1)
		at := freeAddress(t)
		m := &member{id: id, peer: g.net.before(id, at)}
		g.members = append(g.members, m)
		listen = append(listen, at)
		initial = append(initial, id+"="+m.peer)
	}
	for i, m := range g.members {
		g.launch(m, listen[i], append([]string{"--initial-cluster", strings.Join(initial, ",")}, args...)...)
	}
	return g
}

func (g *group) begin() {
	for _, m := range g.members {
		m.start()
	}
	g.leader()
}

// launch prepares a member's process.
func (g *group) launch(m *member, listen string, args ...string) {
	m.server = &server{t: g.t, address: freeAddress(g.t), args: append([]string{
		"--node-id", m.id, "--election-timeout", election.String(), "--peer-address", m.peer, "--peer-listen", listen, "--data-dir", filepath.Join(g.dir, m.id),
	}, args...)}
	g.t.Cleanup(func() {
		if m.cmd != nil {
			m.signal(syscall.SIGCONT)
			m.kill()
		}
		if g.t.Failed() {
			g.t.Logf("log of %s:\n%s", m.id, m.logs())
		}
	})
}

// join starts another member, which joins by itself.
func (g *group) join(id, address string, through *member, args ...string) *member {
	g.t.Helper()
	at := freeAddress(g.t)
	m := &member{id: id, peer: g.net.before(id, at)}
	g.launch(m, at, append([]string{"--join", through.address}, args...)...)
	if address != "" {
		m.address = address
	}
	m.start()
	g.members = append(g.members, m)
	return m
}

func (g *group) endpoints() (list []string) {
	for _, m := range g.members {
		list = append(list, m.address)
	}
	return list
}

// clusterStatus is what a member says of the cluster.
type clusterStatus struct {
	ClusterID string
	Leader    string
	Term      uint64
	LastToken uint64
	Members   []struct {
		ID, ClientAddress, PeerAddress, Role string
		Leader, Healthy                      bool
		AppliedIndex                         uint64
	}
}

func (m *member) status() (s clusterStatus, err error) {
	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
	defer cancel()
	out, _ := m.command(ctx, "cluster", "status", "-o", "json", "--timeout", "2s").Output() // exits 1 without a leader
	return s, json.Unmarshal(out, &s)
}

// leads asks the member whether it does. It is asked so often that running the
// command would take more of the machine than the cluster does.
func (m *member) leads() bool {
	if m.conn == nil {
		m.conn = connect(m.t, m.address)
		m.t.Cleanup(func() { m.conn.Close() })
	}
	ctx, cancel := context.WithTimeout(context.Background(), 2*time.Second)
	defer cancel()
	s, err := pb.NewClusterServiceClient(m.conn).Status(ctx, &pb.StatusRequest{})
	return err == nil && s.GetLeader() == m.id
}

// connect makes a connection that, unlike gRPC's own, does not wait for up to
// two minutes between attempts.
func connect(t testing.TB, address string) *grpc.ClientConn {
	conn, err := grpc.NewClient("passthrough:///"+address, grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithConnectParams(grpc.ConnectParams{
			Backoff:           backoff.Config{BaseDelay: 20 * time.Millisecond, Multiplier: 1.5, MaxDelay: 200 * time.Millisecond},
			MinConnectTimeout: 2 * time.Second,
		}))
	if err != nil {
		t.Fatal(err)
	}
	return conn
}

// leader waits until a member other than those excepted leads.
func (g *group) leader(except ...*member) *member {
	g.t.Helper()
	for until := time.Now().Add(30 * time.Second); time.Now().Before(until); time.Sleep(10 * time.Millisecond) {
	asked:
		for _, m := range g.members {
			for _, x := range except {
				if m == x {
					continue asked
				}
			}
			if m.leads() {
				return m
			}
		}
	}
	g.t.Fatal("no leader within 30s")
	return nil
}

// settled waits until a member sees this many voters, all of them up.
func (g *group) settled(at *member, voters int) clusterStatus {
	g.t.Helper()
	var s clusterStatus
	for until := time.Now().Add(60 * time.Second); time.Now().Before(until); time.Sleep(20 * time.Millisecond) {
		var err error
		if s, err = at.status(); err != nil || s.Leader == "" {
			continue
		}
		n := 0
		for _, m := range s.Members {
			if m.Role == "voter" && m.Healthy {
				n++
			}
		}
		if n == voters && n == len(s.Members) {
			return s
		}
	}
	g.t.Fatalf("not %d voters within 60s: %+v", voters, s)
	return s
}

// run runs a command against the cluster and returns what it prints.
func (g *group) run(at *member, args ...string) string {
	g.t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 60*time.Second)
	defer cancel()
	out, err := at.command(ctx, args...).CombinedOutput()
	if err != nil {
		g.t.Fatalf("distlock %s: %v\n%s", strings.Join(args, " "), err, out)
	}
	return string(out)
}

// TestClusterKills kills leader after leader under load. Nothing that was
// acknowledged is lost, tokens rise, and whoever renews keeps its locks.
func TestClusterKills(t *testing.T) {
	g := startGroup(t, 3)
	l := startLoad(t, loadConfig{endpoints: g.endpoints(), clients: 16, locks: 200, queues: 2, keepers: 20, ttl: 20 * time.Second})
	var spans []time.Duration
	for n := range *kills {
		leader := g.leader()
		l.nextGrant(time.Now())
		killed := time.Now()
		leader.kill()
		spans = append(spans, l.nextGrant(killed))
		leader.start()
		g.settled(g.members[n%3], 3)
	}
	grants := l.stop()
	p50, p99, most := quantiles(spans)
	t.Logf("%d leaders killed, %d grants, highest token %d; next grant after p50 %v, p99 %v, max %v",
		len(spans), grants, l.highest, p50.Round(time.Millisecond), p99.Round(time.Millisecond), most.Round(time.Millisecond))
	g.sameEverywhere()
}

// sameEverywhere waits until all members list the same locks.
func (g *group) sameEverywhere() {
	g.t.Helper()
	list := func(m *member) string {
		conn, err := grpc.NewClient("passthrough:///"+m.address, grpc.WithTransportCredentials(insecure.NewCredentials()))
		if err != nil {
			g.t.Fatal(err)
		}
		defer conn.Close()
		ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
		defer cancel()
		out := ""
		for token := ""; ; {
			r, err := pb.NewLockServiceClient(conn).List(ctx, &pb.ListRequest{PageSize: 1000, PageToken: token, Consistency: pb.Consistency_CONSISTENCY_STALE})
			if err != nil {
				return err.Error()
			}
			for _, k := range r.GetLocks() {
				k.DelayRemaining = nil
				out += k.String() + "\n"
			}
			if token = r.GetNextPageToken(); token == "" {
				return strings.ReplaceAll(out, "  ", " ")
			}
		}
	}
	for until := time.Now().Add(20 * time.Second); ; time.Sleep(50 * time.Millisecond) {
		first := list(g.members[0])
		same := true
		for _, m := range g.members[1:] {
			same = same && list(m) == first
		}
		if same {
			return
		}
		if time.Now().After(until) {
			g.t.Fatal("the members do not come to the same state")
		}
	}
}

// TestClusterQueueSurvives: a queue of twenty keeps its order over the deaths
// of the leaders.
func TestClusterQueueSurvives(t *testing.T) {
	const waiters = 20
	g := startGroup(t, 3)
	ctx, cancel := context.WithTimeout(context.Background(), 2*time.Minute)
	defer cancel()
	var clients []*client.Client
	for n := range waiters + 1 {
		c, err := client.New(g.endpoints(), client.WithOwner(fmt.Sprint(n)))
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		clients = append(clients, c)
	}
	first, err := clients[waiters].Acquire(ctx, "queue", client.TTL(20*time.Second))
	if err != nil {
		t.Fatal(err)
	}
	type turn struct {
		n    int
		lock *client.Lock
	}
	turns := make(chan turn, waiters)
	var group sync.WaitGroup
	for n := range waiters {
		group.Add(1)
		go func() {
			defer group.Done()
			lock, err := clients[n].Acquire(ctx, "queue", client.TTL(20*time.Second))
			if err != nil {
				t.Errorf("waiter %d: %v", n, err)
				return
			}
			turns <- turn{n, lock}
		}()
		for {
			info, err := clients[waiters].Get(ctx, "queue")
			if err != nil {
				t.Fatal(err)
			}
			if info.WaiterCount == n+1 {
				break
			}
		}
	}
	lock, token := first, fence.Token(0)
	for want := range waiters {
		if want%7 == 3 {
			leader := g.leader()
			leader.kill()
			if err := lock.Release(ctx); err != nil {
				t.Fatal(err)
			}
			leader.start()
		} else if err := lock.Release(ctx); err != nil {
			t.Fatal(err)
		}
		got := <-turns
		if got.n != want {
			t.Fatalf("waiter %d came before %d", got.n, want)
		}
		if got.lock.Token() <= token {
			t.Errorf("token %d after %d", got.lock.Token(), token)
		}
		lock, token = got.lock, got.lock.Token()
	}
	group.Wait()
}

// reads asks one member, and nobody else, for a linearizable read.
func (m *member) reads(name string, within time.Duration) (*pb.Lock, error) {
	conn, err := grpc.NewClient("passthrough:///"+m.address, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		return nil, err
	}
	defer conn.Close()
	ctx, cancel := context.WithTimeout(context.Background(), within)
	defer cancel()
	r, err := pb.NewLockServiceClient(conn).Get(ctx, &pb.GetRequest{Name: name})
	return r.GetLock(), err
}

// TestClusterPartitions cuts the leader off in several ways while clients
// reach every member: no two of them rightly believe in one lock, and the
// cut-off leader answers no linearizable read.
func TestClusterPartitions(t *testing.T) {
	g := startGroup(t, 3)
	for _, row := range []struct {
		name  string
		ways  func(leader string, others []string) []way
		alone bool // nobody but the leader can have the majority's word
	}{
		{"leader alone", func(l string, o []string) []way { return []way{{l, o[0]}, {o[0], l}, {l, o[1]}, {o[1], l}} }, true},
		{"nothing reaches the leader", func(l string, o []string) []way { return []way{{o[0], l}, {o[1], l}} }, true},
		{"nothing leaves the leader", func(l string, o []string) []way { return []way{{l, o[0]}, {l, o[1]}} }, true},
		{"leader and one follower apart", func(l string, o []string) []way { return []way{{l, o[0]}, {o[0], l}} }, false},
	} {
		t.Run(row.name, func(t *testing.T) {
			g.t = t
			leader := g.leader()
			var others []string
			for _, m := range g.members {
				if m != leader {
					others = append(others, m.id)
				}
			}
			l := startLoad(t, loadConfig{endpoints: g.endpoints(), clients: 8, locks: 20, queues: 1, ttl: time.Second, mayLose: true})
			l.nextGrant(time.Now())
			g.net.set(true, row.ways(leader.id, others)...)
			cutAt := time.Now()
			if row.alone {
				next := g.leader(leader)
				span := l.nextGrant(cutAt)
				before := g.run(next, "lock", "acquire", "read/"+row.name, "--ttl", "1m", "-o", "json")
				if k, err := leader.reads("read/"+row.name, 2*time.Second); err == nil && len(k.GetHolders()) == 0 {
					t.Errorf("the cut-off leader answered that it is free, after %s", before)
				}
				t.Logf("next grant %v after the cut", span.Round(time.Millisecond))
			}
			// Flap: the ways open and close each second.
			for range 2 {
				time.Sleep(time.Second)
				g.net.mend()
				time.Sleep(time.Second)
				g.net.set(true, row.ways(leader.id, others)...)
			}
			g.net.mend()
			mended := time.Now()
			span := l.nextGrant(mended)
			g.settled(leader, 3)
			t.Logf("next grant %v after it was mended; %d grants, %d lost", span.Round(time.Millisecond), l.stop(), l.lost)
			g.sameEverywhere()
		})
	}
	g.t = t
}

// TestClusterPauses stops the leader's process for up to three TTLs.
func TestClusterPauses(t *testing.T) {
	const ttl = time.Second
	g := startGroup(t, 3)
	l := startLoad(t, loadConfig{endpoints: g.endpoints(), clients: 8, locks: 20, queues: 1, ttl: ttl, mayLose: true})
	for n := range *pause {
		leader := g.leader()
		l.nextGrant(time.Now())
		stopped := time.Now()
		leader.signal(syscall.SIGSTOP)
		span := ttl/2 + time.Duration(n%6)*ttl/2
		next := l.nextGrant(stopped)
		time.Sleep(time.Until(stopped.Add(span)))
		if got := g.leader(leader); got == leader {
			t.Error("it leads on")
		}
		leader.signal(syscall.SIGCONT)
		resumed := time.Now()
		after := l.nextGrant(resumed)
		g.settled(leader, 3)
		t.Logf("stopped for %v: next grant %v after it stopped, %v after it went on", span, next.Round(time.Millisecond), after.Round(time.Millisecond))
	}
	grants := l.stop()
	t.Logf("%d grants, %d lost", grants, l.lost)
	g.sameEverywhere()
}

// TestClusterGrowsAndIsReplaced begins with a node that was alone, makes it
// three under load, and replaces one after the other until none of the first
// machines is left. The tokens of one lock never step back.
func TestClusterGrowsAndIsReplaced(t *testing.T) {
	g := &group{t: t, net: newPartitions(t), dir: t.TempDir()}
	at := freeAddress(t)
	first := &member{id: "n1", peer: g.net.before("n1", at)}
	dir := filepath.Join(g.dir, "n1")
	// It has run for a while as a single server, with a holder and a waiter.
	g.launch(first, at)
	alone := &server{t: t, address: first.address, args: []string{"--data-dir", dir}}
	alone.start()
	g.members = []*member{first}
	endpoints := []string{first.address} // the others are not there yet
	for range 5 {
		endpoints = append(endpoints, freeAddress(t))
	}
	l := startLoad(t, loadConfig{endpoints: endpoints, clients: 4, locks: 20, queues: 1, keepers: 5, ttl: 20 * time.Second})
	l.nextGrant(time.Now())
	// At most one restart, to give it a peer address.
	alone.signal(syscall.SIGTERM)
	<-alone.exited
	first.start()
	l.nextGrant(time.Now())
	g.join("n2", endpoints[1], first)
	g.settled(first, 2)
	g.join("n3", endpoints[2], first)
	before := g.settled(first, 3)
	for i, id := range []string{"n4", "n5", "n6"} {
		gone := g.members[0]
		fresh := g.join(id, endpoints[i+3], g.members[1])
		g.settled(fresh, 4)
		out := g.run(fresh, "cluster", "remove", gone.id)
		<-gone.exited
		if !strings.Contains(gone.logs(), "was removed from cluster") || gone.cmd.ProcessState.ExitCode() != 1 {
			t.Errorf("%s was removed (%q), ended with %d and said\n%s", gone.id, out, gone.cmd.ProcessState.ExitCode(), gone.logs())
		}
		g.members = g.members[1:]
		g.settled(g.members[0], 3)
		l.nextGrant(time.Now())
	}
	after := g.settled(g.members[0], 3)
	grants := l.stop()
	if after.ClusterID != before.ClusterID {
		t.Errorf("the cluster's id changed from %s to %s", before.ClusterID, after.ClusterID)
	}
	t.Logf("1 to 3 members, then all three replaced: %d grants, highest token %d, nothing lost", grants, l.highest)
	g.sameEverywhere()
}

// TestClusterRollingRestart restarts one member after the other under load.
func TestClusterRollingRestart(t *testing.T) {
	g := startGroup(t, 3)
	l := startLoad(t, loadConfig{endpoints: g.endpoints(), clients: 16, locks: 200, queues: 2, keepers: 20, ttl: 20 * time.Second})
	l.nextGrant(time.Now())
	for _, m := range g.members {
		began := time.Now()
		m.signal(syscall.SIGTERM)
		<-m.exited
		if code := m.cmd.ProcessState.ExitCode(); code != 0 {
			t.Errorf("%s ended with %d", m.id, code)
		}
		m.start()
		g.settled(m, 3)
		l.nextGrant(time.Now())
		t.Logf("%s restarted: longest time without a grant %v", m.id, l.gap(began, time.Now()).Round(time.Millisecond))
	}
	t.Logf("%d grants", l.stop())
	g.sameEverywhere()
}

// TestClusterBackup takes a backup under load and restores it elsewhere: the
// first token of the new history is above all that the old one has given, also
// after the backup.
func TestClusterBackup(t *testing.T) {
	g := startGroup(t, 3)
	l := startLoad(t, loadConfig{endpoints: g.endpoints(), clients: 8, locks: 50, queues: 1, keepers: 10, ttl: 20 * time.Second})
	l.nextGrant(time.Now())
	file := filepath.Join(t.TempDir(), "backup")
	for _, m := range g.members { // whoever is asked
		out := g.run(m, "cluster", "backup", file)
		if !strings.Contains(out, "last token") {
			t.Errorf("%s", out)
		}
	}
	l.nextGrant(time.Now())
	l.stop()
	dir := filepath.Join(t.TempDir(), "restored")
	out, err := exec.Command(binary, "cluster", "restore", file, "--data-dir", dir).CombinedOutput()
	if err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	t.Logf("highest token of the old cluster %d; %s", l.highest, out)
	s := startServer(t, "--data-dir", dir)
	var grant struct{ Token uint64 }
	text, err := s.command(context.Background(), "lock", "acquire", "lock/1", "-o", "json").Output()
	if err != nil || json.Unmarshal(text, &grant) != nil {
		t.Fatal(err, string(text))
	}
	if grant.Token <= uint64(l.highest) {
		t.Errorf("the first token is %d, the old cluster gave %d", grant.Token, l.highest)
	}
	out, _ = exec.Command(binary, "cluster", "restore", file, "--data-dir", dir, "--force").CombinedOutput()
	if !strings.Contains(string(out), "another distlock server uses it") {
		t.Errorf("over a running server: %s", out)
	}
	s.kill()
	out, _ = exec.Command(binary, "cluster", "restore", file, "--data-dir", dir).CombinedOutput()
	if !strings.Contains(string(out), "--force") {
		t.Errorf("over data: %s", out)
	}
	if out, err = exec.Command(binary, "cluster", "restore", file, "--data-dir", dir, "--force", "--above", "5000000000000000").CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	if err := os.WriteFile(file, []byte("not a backup"), 0o600); err != nil {
		t.Fatal(err)
	}
	out, err = exec.Command(binary, "cluster", "restore", file, "--data-dir", filepath.Join(t.TempDir(), "x")).CombinedOutput()
	if err == nil || !strings.Contains(string(out), "not a whole backup") {
		t.Errorf("%v: %s", err, out)
	}
	s.start()
	text, err = s.command(context.Background(), "lock", "acquire", "lock/1", "-o", "json").Output()
	if err != nil || json.Unmarshal(text, &grant) != nil || grant.Token <= 5_000_000_000_000_000 {
		t.Errorf("--above: %v %s", err, text)
	}
	status, err := s.command(context.Background(), "cluster", "status").Output()
	if err != nil || !strings.Contains(string(status), "restored ") {
		t.Errorf("%v\n%s", err, status)
	}
}

// cpu is how much processor time a process has used.
func (s *server) cpu() time.Duration {
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", s.cmd.Process.Pid))
	if err != nil {
		return 0
	}
	fields := strings.Fields(string(text[strings.LastIndex(string(text), ")")+1:]))
	user, _ := strconv.Atoi(fields[11])
	system, _ := strconv.Atoi(fields[12])
	return time.Duration(user+system) * 10 * time.Millisecond
}

// TestClusterThroughput compares three members with a single server, and what
// the followers pay, in one run.
func TestClusterThroughput(t *testing.T) {
	const workers = 64
	pairs := func(address []string) float64 {
		var done atomic.Int64
		ctx, cancel := context.WithTimeout(context.Background(), *measure)
		defer cancel()
		var group sync.WaitGroup
		for n := range 4 {
			c, err := client.New(address)
			if err != nil {
				t.Fatal(err)
			}
			defer c.Close()
			for w := range workers / 4 {
				group.Add(1)
				go func() {
					defer group.Done()
					for ctx.Err() == nil {
						lock, err := c.Acquire(ctx, fmt.Sprintf("w/%d/%d", n, w), client.TTL(time.Minute))
						if err != nil {
							continue
						}
						if lock.Release(context.WithoutCancel(ctx)) == nil {
							done.Add(1)
						}
					}
				}()
			}
		}
		group.Wait()
		return float64(done.Load()) / measure.Seconds()
	}
	one := startServer(t, "--data-dir", t.TempDir(), "--run-async")
	g := startGroup(t, 3, "--run-async")
	g.settled(g.members[0], 3)
	leader := g.leader()
	for range 2 {
		before := one.cpu()
		single := pairs([]string{one.address})
		cpuOne := (one.cpu() - before).Seconds() / (single * measure.Seconds()) * 1e6
		spent := make(map[*member]time.Duration)
		for _, m := range g.members {
			spent[m] = m.cpu()
		}
		three := pairs(g.endpoints())
		line := ""
		for _, m := range g.members {
			role := "follower"
			if m == leader {
				role = "leader"
			}
			line += fmt.Sprintf(", %s %.0f µs", role, (m.cpu()-spent[m]).Seconds()/(three*measure.Seconds())*1e6)
		}
		t.Logf("%d workers: one server %.0f pairs/s, three %.0f, %.2fx; CPU a pair: one server %.0f µs; of three%s", workers, single, three, three/single, cpuOne, line)
		if single == 0 || three == 0 {
			t.Error("nothing was granted")
		}
	}
}
