//go:build linux

package e2e

import (
	"context"
	"flag"
	"fmt"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/protobuf/types/known/durationpb"

	"github.com/distlock/distlock/client"
	pb "github.com/distlock/distlock/proto/distlock/v1"
)

var (
	returning    = flag.Int("returning", 20_000, "leases in TestEverybodyReturns")
	returningTTL = flag.Duration("returning-ttl", 3*time.Second, "their TTL")
)

// TestEverybodyReturns: a server with many leases is stopped, for a third of their
// TTL and for all of it, and everybody comes back at once, on new connections. No
// lease is lost that its holder could still believe in, and soon others are served
// as before.
func TestEverybodyReturns(t *testing.T) {
	ttl := *returningTTL
	ctx, cancel := context.WithTimeout(context.Background(), 60*ttl+time.Minute)
	defer cancel()
	srv := startServer(t, "--data-dir", t.TempDir(), "--run-async")
	fleet := &fleet{address: srv.address, ttl: ttl}
	var group sync.WaitGroup
	defer group.Wait()
	stop, end := context.WithCancel(ctx)
	defer end()
	const connections = 100
	for range connections {
		group.Go(func() { fleet.run(stop, *returning/connections) })
	}
	waitFor(t, ctx, func() bool { return fleet.granted.Load() >= int64(*returning/connections*connections) })

	quiet := newClient(t, srv.address)
	var mu sync.Mutex
	var asked []time.Time
	var took []time.Duration
	group.Go(func() { // one after the other, all the while
		for stop.Err() == nil {
			began := time.Now()
			lock, err := quiet.Acquire(stop, "quiet", client.TTL(ttl))
			if err == nil {
				err = lock.Release(stop)
			}
			if err != nil {
				time.Sleep(time.Millisecond)
				continue
			}
			mu.Lock()
			asked, took = append(asked, began), append(took, time.Since(began))
			mu.Unlock()
			time.Sleep(time.Millisecond)
		}
	})
	// p99 of what was asked within a time.
	p99 := func(from, to time.Time) (time.Duration, int) {
		mu.Lock()
		defer mu.Unlock()
		var list []time.Duration
		for i, at := range asked {
			if !at.Before(from) && at.Before(to) {
				list = append(list, took[i])
			}
		}
		if len(list) == 0 {
			return 0, 0
		}
		slices.Sort(list)
		return list[len(list)*99/100], len(list)
	}
	begin := time.Now()
	time.Sleep(ttl)
	normal, n := p99(begin, time.Now())
	t.Logf("%d leases with a TTL of %v; a client beside them: p99 %v of %d", fleet.granted.Load(), ttl, normal.Round(time.Microsecond), n)

	for _, away := range []time.Duration{ttl / 3, ttl} {
		lost, granted := fleet.lost.Load(), fleet.granted.Load()
		srv.signal(syscall.SIGSTOP)
		fleet.cut()
		time.Sleep(away)
		srv.signal(syscall.SIGCONT)
		back := time.Now()
		time.Sleep(ttl + ttl/3)
		var curve strings.Builder
		step := ttl / 10
		for i := range 12 {
			p, n := p99(back.Add(time.Duration(i)*step), back.Add(time.Duration(i+1)*step))
			fmt.Fprintf(&curve, " %v (%d)", p.Round(100*time.Microsecond), n)
		}
		t.Logf("stopped for %v: %d leases lost that were alive, %d granted anew; p99 of each tenth of a TTL after it:%s",
			away, fleet.lost.Load()-lost, fleet.granted.Load()-granted, &curve)
		if n := fleet.lost.Load() - lost; n > 0 {
			t.Errorf("%d leases were lost that were still alive", n)
		}
		if away < ttl && fleet.granted.Load() != granted {
			t.Errorf("%d leases were granted anew", fleet.granted.Load()-granted)
		}
	}
}

// fleet keeps leases alive from many connections, without the client.
type fleet struct {
	address       string
	ttl           time.Duration
	granted, lost atomic.Int64

	mu    sync.Mutex
	conns map[*grpc.ClientConn]struct{}
}

// cut closes all connections.
func (f *fleet) cut() {
	f.mu.Lock()
	defer f.mu.Unlock()
	for c := range f.conns {
		c.Close()
	}
	clear(f.conns)
}

// run keeps n leases alive until ctx ends.
func (f *fleet) run(ctx context.Context, n int) {
	ids, deadlines := make([]uint64, n), make([]time.Time, n)
	at := make(map[uint64]int, n)
	for ctx.Err() == nil {
		conn, err := grpc.NewClient("passthrough:///"+f.address, grpc.WithTransportCredentials(insecure.NewCredentials()))
		if err != nil {
			panic(err)
		}
		f.mu.Lock()
		if f.conns == nil {
			f.conns = make(map[*grpc.ClientConn]struct{})
		}
		f.conns[conn] = struct{}{}
		f.mu.Unlock()
		f.session(ctx, conn, ids, deadlines, at)
		conn.Close()
		select {
		case <-ctx.Done():
		case <-time.After(10 * time.Millisecond):
		}
	}
}

// session renews all at once, and then every third of the TTL.
func (f *fleet) session(ctx context.Context, conn *grpc.ClientConn, ids []uint64, deadlines []time.Time, at map[uint64]int) {
	rpc, err := pb.NewStreamServiceClient(conn).Multiplex(ctx)
	if err != nil {
		return
	}
	for {
		began := time.Now()
		for from := 0; from < len(ids); from += 1000 {
			chunk := ids[from:min(from+1000, len(ids))]
			msg := &pb.MultiplexRequest{}
			keep := &pb.KeepAliveRequest{}
			for i, id := range chunk {
				if id != 0 {
					keep.LeaseIds = append(keep.LeaseIds, id)
					continue
				}
				msg.Operations = append(msg.Operations, &pb.Operation{
					Id: uint64(from+i) + 2, Call: &pb.Operation_Grant{Grant: &pb.GrantRequest{Ttl: durationpb.New(f.ttl), Owner: "fleet"}},
				})
			}
			if len(keep.LeaseIds) > 0 {
				msg.Operations = append(msg.Operations, &pb.Operation{Id: 1, Call: &pb.Operation_KeepAlive{KeepAlive: keep}})
			}
			sent := time.Now()
			if rpc.Send(msg) != nil {
				return
			}
			for open := len(msg.Operations); open > 0; {
				answer, err := rpc.Recv()
				if err != nil {
					return
				}
				for _, a := range answer.GetAnswers() {
					open--
					if g := a.GetGrant(); g != nil {
						i := int(a.GetId() - 2)
						ids[i], deadlines[i] = g.GetLeaseId(), sent.Add(f.ttl)
						at[ids[i]] = i
						f.granted.Add(1)
					}
					for _, r := range a.GetKeepAlive().GetResults() {
						i := at[r.GetLeaseId()]
						if r.GetProblem() == nil {
							deadlines[i] = sent.Add(f.ttl)
							continue
						}
						if sent.Before(deadlines[i]) {
							f.lost.Add(1)
						}
						delete(at, ids[i])
						ids[i] = 0
					}
				}
			}
		}
		if slices.Contains(ids, 0) {
			continue
		}
		select {
		case <-ctx.Done():
			return
		case <-rpc.Context().Done():
			return
		case <-time.After(f.ttl/3 - time.Since(began)):
		}
	}
}
