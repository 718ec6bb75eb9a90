//go:build linux

package e2e

import (
	"context"
	"flag"
	"fmt"
	"math/rand/v2"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/anishathalye/porcupine"
	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/durationpb"

	pb "github.com/distlock/distlock/proto/distlock/v1"
)

var (
	runs       = flag.Int("runs", 2, "histories that TestLinearizable checks, of one node and of three in turn")
	operations = flag.Int("operations", 1000, "operations in each")
)

// A lock as a register of tokens: who holds it, and the last token granted.
type lockState struct{ holder, last uint64 }

type lockOp struct {
	kind  string // "acquire", "release", "get", "check"
	key   string
	token uint64 // of release and check
}

type lockAnswer struct {
	ok    bool   // granted, released, live
	token uint64 // granted, or read
}

// lockModel is what a linearizable lock service does. Leases outlast the run,
// so nothing expires.
var lockModel = porcupine.Model{
	Partition: func(history []porcupine.Operation) [][]porcupine.Operation {
		byKey := map[string][]porcupine.Operation{}
		var keys []string
		for _, op := range history {
			key := op.Input.(lockOp).key
			if byKey[key] == nil {
				keys = append(keys, key)
			}
			byKey[key] = append(byKey[key], op)
		}
		var list [][]porcupine.Operation
		for _, key := range keys {
			list = append(list, byKey[key])
		}
		return list
	},
	Init: func() any { return lockState{} },
	Step: func(state, input, output any) (bool, any) {
		s, in, out := state.(lockState), input.(lockOp), output.(lockAnswer)
		switch in.kind {
		case "acquire":
			if !out.ok {
				return s.holder != 0, s
			}
			return s.holder == 0 && out.token > s.last, lockState{out.token, out.token}
		case "release":
			return s.holder == in.token, lockState{0, s.last}
		case "get":
			return s.holder == out.token, s
		default: // check
			return out.ok == (s.holder == in.token), s
		}
	},
	DescribeOperation: func(input, output any) string { return fmt.Sprintf("%+v -> %+v", input, output) },
	DescribeState:     func(state any) string { return fmt.Sprintf("%+v", state) },
}

// TestModelTellsBadHistories: the model is not a rubber stamp.
func TestModelTellsBadHistories(t *testing.T) {
	op := func(call, ret int64, kind string, token uint64, ok bool, got uint64) porcupine.Operation {
		return porcupine.Operation{Call: call, Return: ret, Input: lockOp{kind, "a", token}, Output: lockAnswer{ok, got}}
	}
	for name, c := range map[string]struct {
		good    bool
		history []porcupine.Operation
	}{
		"in turn":                  {true, []porcupine.Operation{op(1, 2, "acquire", 0, true, 1), op(3, 4, "release", 1, true, 0), op(5, 6, "acquire", 0, true, 2)}},
		"two hold":                 {false, []porcupine.Operation{op(1, 2, "acquire", 0, true, 1), op(3, 4, "acquire", 0, true, 2)}},
		"a token falls":            {false, []porcupine.Operation{op(1, 2, "acquire", 0, true, 5), op(3, 4, "release", 5, true, 0), op(5, 6, "acquire", 0, true, 4)}},
		"a stale read":             {false, []porcupine.Operation{op(1, 2, "acquire", 0, true, 1), op(3, 4, "get", 0, false, 0)}},
		"a read in the middle":     {true, []porcupine.Operation{op(1, 4, "acquire", 0, true, 1), op(2, 3, "get", 0, false, 0)}},
		"refused by a free lock":   {false, []porcupine.Operation{op(1, 2, "acquire", 0, false, 0)}},
		"live after its release":   {false, []porcupine.Operation{op(1, 2, "acquire", 0, true, 1), op(3, 4, "release", 1, true, 0), op(5, 6, "check", 1, true, 0)}},
		"an acknowledged one lost": {false, []porcupine.Operation{op(1, 2, "acquire", 0, true, 1), op(3, 4, "get", 0, true, 0)}},
	} {
		want := porcupine.Illegal
		if c.good {
			want = porcupine.Ok
		}
		if got := porcupine.CheckOperationsTimeout(lockModel, c.history, time.Minute); got != want {
			t.Errorf("%s: %v", name, got)
		}
	}
}

// TestLinearizable has callers, eight a lock, take, release and read locks of
// real processes while these are killed, stopped and cut off, and looks for an
// order in which a single lock service would have answered the same. Every
// other caller speaks through a stream, which it shares.
func TestLinearizable(t *testing.T) {
	all := &histories{faults: map[string]int{}}
	t.Run("all", func(t *testing.T) {
		t.Run("one node", func(t *testing.T) {
			t.Parallel()
			srv := startServer(t, "--data-dir", t.TempDir(), "--run-async", "--snapshot-mib", "1")
			all.play(t, (*runs+1)/2, []string{srv.address}, func(l *linear) string { return l.harmOne(srv) })
		})
		const clusters = 2
		for n := range clusters {
			share := (*runs/2 + n) / clusters
			if share == 0 {
				continue
			}
			t.Run(fmt.Sprint("three nodes/", n), func(t *testing.T) {
				t.Parallel()
				g := startGroup(t, 3, "--run-async", "--snapshot-mib", "1", "--election-timeout", "300ms")
				all.play(t, share, g.endpoints(), func(l *linear) string { return l.harmThree(g) })
			})
		}
	})
	t.Logf("%d of %d histories, of %d operations in all, linearizable; faults: %v", all.played, *runs, all.operations, all.faults)
}

// histories counts what was played.
type histories struct {
	mu                 sync.Mutex
	played, operations int
	faults             map[string]int
}

// play plays and judges one history after the other.
func (all *histories) play(t *testing.T, runs int, endpoints []string, harm func(*linear) string) {
	begin := time.Now()
	for run := 0; run < runs && !spent(begin); run++ {
		l := &linear{t: t, run: run, begin: time.Now(), rng: rand.New(rand.NewPCG(uint64(run), uint64(time.Now().UnixNano()))), endpoints: endpoints}
		l.next.Store(uint64(time.Now().UnixNano()))
		history := l.play(func() {
			fault := harm(l)
			all.mu.Lock()
			defer all.mu.Unlock()
			all.faults[fault]++
		})
		if t.Failed() {
			return
		}
		switch got := porcupine.CheckOperationsTimeout(lockModel, history, 2*time.Minute); got {
		case porcupine.Ok:
		default: // Unknown is a failure too
			t.Fatalf("run %d of %d operations: %v", run, len(history), got)
		}
		all.mu.Lock()
		all.played++
		all.operations += len(history)
		all.mu.Unlock()
	}
}

// The faults in one history: also on a machine so fast that the operations
// are soon done, and on one so slow that it would see little else.
const minFaults, maxFaults = 2, 5

// linear plays one history.
type linear struct {
	t         *testing.T
	run       int
	begin     time.Time
	rng       *rand.Rand
	endpoints []string
	next      atomic.Uint64 // request id
	done      atomic.Int64
	faults    atomic.Int64

	mu      sync.Mutex
	history []porcupine.Operation
}

// play runs the callers, and a fault now and then.
func (l *linear) play(fault func()) []porcupine.Operation {
	const keys, callers = 4, 8
	ctx, cancel := context.WithTimeout(context.Background(), 2*time.Minute)
	defer cancel()
	var group sync.WaitGroup
	for key := range keys {
		var lines []*line
		for _, e := range l.endpoints {
			line := newLine(l.t, e)
			defer line.close()
			lines = append(lines, line)
		}
		for n := range callers {
			group.Go(func() { l.caller(ctx, key*callers+n, fmt.Sprintf("linear/%d/%d", l.run, key), lines, n%2 == 1) })
		}
	}
	stop := make(chan struct{})
	harming := make(chan struct{})
	go func() {
		defer close(harming)
		for {
			select {
			case <-stop:
				return
			case <-time.After(time.Duration(50+l.rng.IntN(300)) * time.Millisecond):
				fault()
				if l.faults.Add(1) == maxFaults {
					return
				}
			}
		}
	}()
	group.Wait()
	close(stop)
	<-harming
	return l.history
}

// line is how the callers of one lock reach one endpoint: a connection, and a
// stream on it.
type line struct {
	pb.LockServiceClient
	conn *grpc.ClientConn

	mu      sync.Mutex
	stream  grpc.BidiStreamingClient[pb.MultiplexRequest, pb.MultiplexResponse]
	end     context.CancelFunc // of the stream
	last    uint64             // id of an operation
	waiting map[uint64]chan *pb.Answer
	group   sync.WaitGroup
}

func newLine(t *testing.T, endpoint string) *line {
	conn := connect(t, endpoint)
	return &line{LockServiceClient: pb.NewLockServiceClient(conn), conn: conn}
}

func (l *line) close() {
	l.conn.Close()
	l.group.Wait()
}

// do has an operation done on the stream, and its failure as the error that a
// unary call ends with.
func (l *line) do(ctx context.Context, op *pb.Operation) (*pb.Answer, error) {
	answer := make(chan *pb.Answer, 1)
	l.mu.Lock()
	if l.stream == nil {
		of, end := context.WithCancel(context.Background())
		stream, err := pb.NewStreamServiceClient(l.conn).Multiplex(of)
		if err != nil {
			end()
			l.mu.Unlock()
			return nil, err
		}
		l.stream, l.end, l.waiting = stream, end, map[uint64]chan *pb.Answer{}
		l.group.Go(func() { l.listen(stream) })
	}
	l.last++
	op.Id = l.last
	l.waiting[op.Id] = answer
	l.stream.Send(&pb.MultiplexRequest{Operations: []*pb.Operation{op}}) // after an error the stream ends, and answers
	l.mu.Unlock()
	select {
	case a := <-answer:
		if a == nil {
			return nil, status.Error(codes.Unavailable, "the stream ended")
		}
		if f := a.GetFailure(); f != nil {
			s, err := status.New(codes.Code(f.GetCode()), f.GetMessage()).WithDetails(&errdetails.ErrorInfo{Reason: f.GetReason()})
			if err != nil {
				return nil, err
			}
			return nil, s.Err()
		}
		return a, nil
	case <-ctx.Done():
		return nil, ctx.Err()
	}
}

func (l *line) listen(stream grpc.BidiStreamingClient[pb.MultiplexRequest, pb.MultiplexResponse]) {
	for {
		m, err := stream.Recv()
		l.mu.Lock()
		if err != nil {
			for _, answer := range l.waiting {
				close(answer)
			}
			l.end()
			l.stream, l.waiting = nil, nil
			l.mu.Unlock()
			return
		}
		for _, a := range m.GetAnswers() {
			if answer := l.waiting[a.GetId()]; answer != nil {
				answer <- a
				delete(l.waiting, a.GetId())
			}
		}
		l.mu.Unlock()
	}
}

// caller plays one of those who want a lock.
func (l *linear) caller(ctx context.Context, n int, key string, lines []*line, streams bool) {
	rng := rand.New(rand.NewPCG(uint64(l.run), uint64(n)))
	at := n % len(lines)
	// try repeats a call until it is answered; attempts counts.
	try := func(fn func(*line) error) (reason string, attempts int, err error) {
		for {
			attempts++
			err := fn(lines[at])
			if err == nil {
				return "", attempts, nil
			}
			for _, d := range status.Convert(err).Details() {
				if info, ok := d.(*errdetails.ErrorInfo); ok {
					reason = info.GetReason()
				}
			}
			if ctx.Err() != nil || status.Code(err) != codes.Unavailable {
				return reason, attempts, err
			}
			at = (at + 1) % len(lines)
			time.Sleep(time.Duration(5+rng.IntN(20)) * time.Millisecond)
		}
	}
	acquire := func(s *line, r *pb.AcquireRequest) (*pb.AcquireResponse, error) {
		if !streams {
			return s.Acquire(ctx, r)
		}
		a, err := s.do(ctx, &pb.Operation{Call: &pb.Operation_Acquire{Acquire: r}})
		return a.GetAcquire(), err
	}
	release := func(s *line, r *pb.ReleaseRequest) (err error) {
		if streams {
			_, err = s.do(ctx, &pb.Operation{Call: &pb.Operation_Release{Release: r}})
		} else {
			_, err = s.Release(ctx, r)
		}
		return err
	}
	check := func(s *line, r *pb.CheckTokenRequest) (*pb.CheckTokenResponse, error) {
		if !streams {
			return s.CheckToken(ctx, r)
		}
		a, err := s.do(ctx, &pb.Operation{Call: &pb.Operation_CheckToken{CheckToken: r}})
		return a.GetCheckToken(), err
	}
	add := func(call time.Time, in lockOp, out lockAnswer) {
		l.done.Add(1)
		l.mu.Lock()
		defer l.mu.Unlock()
		l.history = append(l.history, porcupine.Operation{ClientId: n, Call: int64(call.Sub(l.begin)), Return: int64(time.Since(l.begin)), Input: in, Output: out})
	}
	var token, leaseID, last uint64
	for (l.done.Load() < int64(*operations) || l.faults.Load() < minFaults) && ctx.Err() == nil {
		call := time.Now()
		switch k := rng.IntN(8); {
		case token != 0 && k < 5:
			_, _, err := try(func(s *line) error {
				return release(s, &pb.ReleaseRequest{LeaseId: leaseID, Name: key, Token: token})
			})
			if err != nil {
				l.t.Errorf("run %d: release of token %d: %v", l.run, token, err)
				return
			}
			add(call, lockOp{"release", key, token}, lockAnswer{ok: true})
			last, token = token, 0
		case token == 0 && k < 5:
			id := l.next.Add(1)
			var g *pb.Hold
			reason, attempts, err := try(func(s *line) error {
				resp, err := acquire(s, &pb.AcquireRequest{RequestId: id & (1<<63 - 1), Names: []string{key}, Mode: pb.Mode_MODE_EXCLUSIVE, Ttl: durationpb.New(time.Hour)})
				g = resp.GetHold()
				return err
			})
			switch {
			case err == nil:
				token, leaseID = g.GetToken(), g.GetLeaseId()
				add(call, lockOp{"acquire", key, 0}, lockAnswer{true, token})
			case reason == "LOCK_HELD":
				add(call, lockOp{"acquire", key, 0}, lockAnswer{})
			case reason == "REQUEST_ENDED" && attempts > 1:
				// An attempt whose answer was lost was refused.
			default:
				l.t.Errorf("run %d: acquire: %v", l.run, err)
				return
			}
		case k < 7:
			var held uint64
			if _, _, err := try(func(s *line) error {
				resp, err := s.Get(ctx, &pb.GetRequest{Name: key})
				held = 0
				for _, h := range resp.GetLock().GetHolders() {
					held = h.GetToken()
				}
				return err
			}); err != nil {
				l.t.Errorf("run %d: get: %v", l.run, err)
				return
			}
			add(call, lockOp{"get", key, 0}, lockAnswer{token: held})
		case max(token, last) != 0:
			var live bool
			if _, _, err := try(func(s *line) error {
				resp, err := check(s, &pb.CheckTokenRequest{Name: key, Token: max(token, last)})
				live = resp.GetLive()
				return err
			}); err != nil {
				l.t.Errorf("run %d: check: %v", l.run, err)
				return
			}
			add(call, lockOp{"check", key, max(token, last)}, lockAnswer{ok: live})
		}
	}
	if ctx.Err() != nil {
		l.t.Errorf("run %d: no end in sight after %d operations", l.run, l.done.Load())
	}
}

func (l *linear) harmOne(s *server) string {
	if l.rng.IntN(3) == 0 {
		s.signal(syscall.SIGSTOP)
		time.Sleep(time.Duration(l.rng.IntN(200)) * time.Millisecond)
		s.signal(syscall.SIGCONT)
		return "stopped, alone"
	}
	s.kill()
	s.start()
	return "killed, alone"
}

func (l *linear) harmThree(g *group) string {
	m := g.leader()
	switch l.rng.IntN(3) {
	case 0:
		m.kill()
		time.Sleep(time.Duration(l.rng.IntN(300)) * time.Millisecond)
		m.start()
		return "leader killed"
	case 1:
		m.signal(syscall.SIGSTOP)
		time.Sleep(time.Duration(l.rng.IntN(1500)) * time.Millisecond)
		m.signal(syscall.SIGCONT)
		return "leader stopped"
	}
	var ways []way
	for _, o := range g.members {
		if o != m {
			ways = append(ways, way{m.id, o.id})
			if l.rng.IntN(3) > 0 { // otherwise one way only
				ways = append(ways, way{o.id, m.id})
			}
		}
	}
	g.net.set(true, ways...)
	time.Sleep(time.Duration(300+l.rng.IntN(1500)) * time.Millisecond)
	g.net.mend()
	return "leader cut off"
}
