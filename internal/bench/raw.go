package bench

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/HdrHistogram/hdrhistogram-go"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/protobuf/types/known/durationpb"

	pb "github.com/distlock/distlock/proto/distlock/v1"
	"github.com/distlock/distlock/proto/wire"
)

type multiplexClient = grpc.BidiStreamingClient[pb.MultiplexRequest, pb.MultiplexResponse]

// streams opens one stream per connection, without the client.
func (b *bench) streams(ctx context.Context) ([]multiplexClient, func(), error) {
	ctx, cancel := context.WithCancel(ctx)
	var conns []*grpc.ClientConn
	done := func() {
		cancel()
		for _, conn := range conns {
			conn.Close()
		}
	}
	var list []multiplexClient
	for range b.Connections {
		conn, err := grpc.NewClient("passthrough:///"+b.Endpoint, grpc.WithTransportCredentials(insecure.NewCredentials()))
		if err != nil {
			done()
			return nil, nil, err
		}
		conns = append(conns, conn)
		rpc, err := pb.NewStreamServiceClient(conn).Multiplex(ctx, grpc.ForceCodecV2(wire.Codec{CodecV2: wire.Proto})) // as the client's
		if err != nil {
			done()
			return nil, nil, err
		}
		list = append(list, rpc)
	}
	return list, done, nil
}

// share is how many of n fall to one of the connections.
func (b *bench) share(n, connection int) int {
	return n/b.Connections + min(1, max(0, n%b.Connections-connection))
}

// failure is the error of an answer.
func failure(f *pb.Failure) error { return errors.New(f.GetMessage()) }

// pipelined keeps Pipeline operations outstanding: each answer is followed by
// the next operation of its lock, and the answers of one message by one
// message.
func (b *bench) pipelined(ctx context.Context) ([]Result, error) {
	streams, done, err := b.streams(ctx)
	if err != nil {
		return nil, err
	}
	defer done()
	var pairs atomic.Int64
	var stop atomic.Bool
	what := "acquire+release, pipelined"
	ended := make(chan workerEnd, len(streams))
	before := b.server(ctx)
	begin := time.Now()
	for i, rpc := range streams {
		go func() {
			h := histogram()
			ended <- workerEnd{h, b.pipe(rpc, i, b.share(b.Pipeline, i), h, &pairs, &stop)}
		}()
	}
	failed := b.watch(ctx, what, pairs.Load, nil, ended)
	after := b.server(ctx)
	took, n := time.Since(begin), pairs.Load()
	stop.Store(true)
	if failed.err != nil {
		return nil, failed.err
	}
	all := histogram()
	for range streams {
		e := <-ended
		if e.err != nil {
			return nil, e.err
		}
		all.Merge(e.h)
	}
	r := Result{What: what, Workers: b.Pipeline, Connections: b.Connections}
	r.rate(n, took)
	r.latencies(all)
	r.used(before, after)
	return []Result{r}, nil
}

// pipe drives one stream with depth locks of its own, until stop; then it gives
// back what it holds.
func (b *bench) pipe(rpc multiplexClient, connection, depth int, h *hdrhistogram.Histogram, pairs *atomic.Int64, stop *atomic.Bool) error {
	// A lock has one operation under way at a time, and Send is done with a
	// message when it returns: the operations are made once.
	type slot struct {
		asked            time.Time
		acquire, release *pb.Operation
		acquired         *pb.AcquireRequest
		released         *pb.ReleaseRequest
	}
	slots := make([]slot, depth)
	ttl := durationpb.New(time.Minute)
	owner := fmt.Sprint("bench ", connection)
	acquire := func(s *slot, now time.Time) *pb.Operation {
		s.asked = now
		s.acquired.RequestId = rand.Uint64N(1<<63-1) + 1
		return s.acquire
	}
	var out []*pb.Operation
	now := time.Now()
	for i := range slots {
		s, name := &slots[i], b.name(connection*1_000_000+i)
		s.acquired = &pb.AcquireRequest{Names: []string{name}, Ttl: ttl, Owner: owner, WaitForever: true, Attempt: 1}
		s.released = &pb.ReleaseRequest{Name: name}
		s.acquire = &pb.Operation{Id: uint64(i + 1), Call: &pb.Operation_Acquire{Acquire: s.acquired}}
		s.release = &pb.Operation{Id: uint64(i + 1), Call: &pb.Operation_Release{Release: s.released}}
		out = append(out, acquire(s, now))
	}
	open := depth
	for {
		if len(out) > 0 {
			if err := rpc.Send(&pb.MultiplexRequest{Operations: out}); err != nil {
				return err
			}
		}
		if open == 0 {
			return nil
		}
		msg, err := rpc.Recv()
		if err != nil {
			return err
		}
		out = out[:0]
		now := time.Now()
		released := 0
		for _, a := range msg.GetAnswers() {
			s := &slots[a.GetId()-1]
			switch r := a.GetResult().(type) {
			case *pb.Answer_Acquire:
				g := r.Acquire.GetHold()
				s.released.LeaseId, s.released.Token = g.GetLeaseId(), g.GetToken()
				out = append(out, s.release)
			case *pb.Answer_Release:
				released++
				record(h, now.Sub(s.asked))
				if stop.Load() {
					open--
				} else {
					out = append(out, acquire(s, now))
				}
			case *pb.Answer_Failure:
				return failure(r.Failure)
			}
		}
		pairs.Add(int64(released))
	}
}

// made are leases of one connection.
type made struct {
	rpc    multiplexClient
	ids    []uint64
	asked  []time.Time
	heard  []time.Time
	tokens []uint64
}

// make makes the leases, each with a lock, in messages of 500.
func (b *bench) make(ctx context.Context, streams []multiplexClient, ttl func(i int) time.Duration) ([]*made, error) {
	list := make([]*made, len(streams))
	errs := make([]error, len(streams))
	var count atomic.Int64
	var group sync.WaitGroup
	for c, rpc := range streams {
		group.Add(1)
		go func() {
			defer group.Done()
			n := b.share(b.Leases, c)
			m := &made{rpc: rpc, ids: make([]uint64, n), asked: make([]time.Time, n), heard: make([]time.Time, n), tokens: make([]uint64, n)}
			list[c] = m
			renewed := time.Now()
			for at := 0; at < n && errs[c] == nil; at += 500 {
				errs[c] = m.chunk(b, c, at, min(at+500, n), ttl, &count)
				// What is made first must live until the last is made.
				if b.Mode == KeepAlive && errs[c] == nil && time.Since(renewed) > b.Every/4 {
					renewed = time.Now()
					for ids := range slices.Chunk(m.ids[:min(at+500, n)], 10_000) {
						if _, err := m.ask(1, ids); err != nil {
							errs[c] = err
						}
					}
				}
			}
		}()
	}
	finished := make(chan struct{})
	go func() { group.Wait(); close(finished) }()
	patient := *b
	patient.Duration = time.Hour
	e := patient.watch(ctx, "making leases", count.Load, finished, nil)
	if e.err != nil {
		return nil, e.err
	}
	return list, errors.Join(errs...)
}

func (m *made) chunk(b *bench, connection, from, to int, ttl func(int) time.Duration, count *atomic.Int64) error {
	msg := &pb.MultiplexRequest{}
	now := time.Now()
	for i := from; i < to; i++ {
		m.asked[i] = now
		msg.Operations = append(msg.Operations, &pb.Operation{Id: uint64(i + 1), Call: &pb.Operation_Acquire{Acquire: &pb.AcquireRequest{
			Names: []string{b.name(connection*10_000_000 + i)}, Ttl: durationpb.New(ttl(i)), Owner: "bench",
			RequestId: rand.Uint64N(1<<63-1) + 1, Attempt: 1,
		}}})
	}
	if err := m.rpc.Send(msg); err != nil {
		return err
	}
	for n := from; n < to; {
		in, err := m.rpc.Recv()
		if err != nil {
			return err
		}
		now := time.Now()
		for _, a := range in.GetAnswers() {
			if f := a.GetFailure(); f != nil {
				return failure(f)
			}
			i := int(a.GetId()) - 1
			g := a.GetAcquire().GetHold()
			m.ids[i], m.tokens[i], m.heard[i] = g.GetLeaseId(), g.GetToken(), now
			n++
			count.Add(1)
		}
	}
	return nil
}

// keepAlive renews each lease every Every, in messages of what falls due
// together, while one client takes and gives back locks beside it.
func (b *bench) keepAlive(ctx context.Context) ([]Result, error) {
	streams, done, err := b.streams(ctx)
	if err != nil {
		return nil, err
	}
	defer done()
	b.collect(ctx)
	empty := b.server(ctx)
	leases, err := b.make(ctx, streams, func(int) time.Duration { return b.TTL })
	if err != nil {
		return nil, err
	}
	var renewed, lost atomic.Int64
	var stop atomic.Bool
	ended := make(chan workerEnd, len(streams))
	full := b.server(ctx)
	begin := time.Now()
	for _, m := range leases {
		go func() {
			h := histogram()
			ended <- workerEnd{h, m.renew(b.Every, h, &renewed, &lost, &stop)}
		}()
	}
	// The grants beside it, too few to matter.
	probes := make(chan workerEnd, 1)
	go func() {
		h := histogram()
		probes <- workerEnd{h, b.probe(ctx, h, &stop)}
	}()
	failed := b.watch(ctx, "renewals", renewed.Load, nil, ended)
	after := b.server(ctx)
	took, n := time.Since(begin), renewed.Load()
	stop.Store(true)
	if failed.err != nil {
		return nil, failed.err
	}
	all := histogram()
	for range streams {
		e := <-ended
		if e.err != nil {
			return nil, e.err
		}
		all.Merge(e.h)
	}
	r := Result{What: fmt.Sprintf("renewals of %d leases", b.Leases), Connections: b.Connections}
	r.rate(n, took)
	r.latencies(all)
	r.used(full, after)
	p := <-probes
	if p.err != nil {
		return nil, p.err
	}
	b.collect(ctx)
	r.ServerHeapBytesPerLease = heapOf(b.Leases, empty, after, b.server(ctx))
	beside := Result{What: "acquire+release beside it", Workers: 1, Connections: 1}
	beside.rate(p.h.TotalCount(), took)
	beside.latencies(p.h)
	if lost.Load() > 0 {
		return nil, fmt.Errorf("%d leases were lost although they were renewed", lost.Load())
	}
	return []Result{r, beside}, nil
}

// probe acquires and releases a lock, five times a second.
func (b *bench) probe(ctx context.Context, h *hdrhistogram.Histogram, stop *atomic.Bool) error {
	one := *b
	one.Connections = 1
	clients, done, err := one.clients()
	if err != nil {
		return err
	}
	defer done()
	tick := time.NewTicker(200 * time.Millisecond)
	defer tick.Stop()
	for !stop.Load() {
		at := time.Now()
		lock, err := clients[0].Acquire(ctx, b.name(-2))
		if err != nil {
			return err
		}
		record(h, time.Since(at))
		if err := lock.Release(ctx); err != nil {
			return err
		}
		<-tick.C
	}
	return nil
}

// renew goes round the leases in time, in messages of what falls due within a
// tenth of a second.
func (m *made) renew(every time.Duration, h *hdrhistogram.Histogram, renewed, lost *atomic.Int64, stop *atomic.Bool) error {
	const beat = 100 * time.Millisecond
	tick := time.NewTicker(beat)
	defer tick.Stop()
	per := max(int(int64(len(m.ids))*int64(beat)/int64(every)), 1)
	for at, id := 0, uint64(1); !stop.Load(); id++ {
		ids := make([]uint64, 0, per)
		for range min(per, len(m.ids)) {
			ids = append(ids, m.ids[at])
			at = (at + 1) % len(m.ids)
		}
		if len(ids) == 0 {
			return nil
		}
		asked := time.Now()
		gone, err := m.ask(id, ids)
		if err != nil {
			return err
		}
		record(h, time.Since(asked))
		lost.Add(gone)
		renewed.Add(int64(len(ids)))
		<-tick.C
	}
	return nil
}

// ask renews leases, in one message, and tells how many are gone.
func (m *made) ask(id uint64, ids []uint64) (gone int64, err error) {
	if err := m.rpc.Send(&pb.MultiplexRequest{Operations: []*pb.Operation{
		{Id: id, Call: &pb.Operation_KeepAlive{KeepAlive: &pb.KeepAliveRequest{LeaseIds: ids}}},
	}}); err != nil {
		return 0, err
	}
	for {
		in, err := m.rpc.Recv()
		if err != nil {
			return 0, err
		}
		for _, a := range in.GetAnswers() {
			if f := a.GetFailure(); f != nil {
				return 0, failure(f)
			}
			for _, r := range a.GetKeepAlive().GetResults() {
				if r.GetProblem() != nil {
					gone++
				}
			}
			return gone, nil
		}
	}
}

// expiry makes leases of 2 to 5 s and lets them end. The lag is from when the
// grant was heard of, plus the TTL, to when the loss was.
func (b *bench) expiry(ctx context.Context) ([]Result, error) {
	streams, done, err := b.streams(ctx)
	if err != nil {
		return nil, err
	}
	defer done()
	ttls := make([]time.Duration, b.Leases/b.Connections+1)
	for i := range ttls {
		ttls[i] = 2*time.Second + rand.N(3*time.Second)
	}
	before := b.server(ctx)
	begin := time.Now()
	// Losses of those that end while others are being made are in the answers
	// that make skips, so the TTLs are stretched by how long that may take.
	stretch := time.Duration(b.Leases/20_000) * time.Second
	leases, err := b.make(ctx, streams, func(i int) time.Duration { return ttls[i] + stretch })
	if err != nil {
		return nil, err
	}
	var ends, early atomic.Int64
	h := histogram()
	var mu sync.Mutex
	errs := make(chan error, len(leases))
	for _, m := range leases {
		go func() {
			at := make(map[uint64]int, len(m.ids))
			for i, id := range m.ids {
				at[id] = i
			}
			for len(at) > 0 {
				in, err := m.rpc.Recv()
				if err != nil {
					errs <- err
					return
				}
				now := time.Now()
				mu.Lock()
				for _, l := range in.GetLosses() {
					i, ok := at[l.GetLeaseId()]
					if !ok || l.GetToken() != 0 {
						continue
					}
					delete(at, l.GetLeaseId())
					ends.Add(1)
					ttl := ttls[i] + stretch
					if now.Sub(m.asked[i]) < ttl {
						early.Add(1)
					}
					record(h, now.Sub(m.heard[i])-ttl)
				}
				mu.Unlock()
			}
			errs <- nil
		}()
	}
	finished := make(chan struct{})
	var failed error
	go func() {
		for range leases {
			failed = errors.Join(failed, <-errs)
		}
		close(finished)
	}()
	patient := *b
	patient.Duration = stretch + 5*time.Second + time.Minute
	if e := patient.watch(ctx, "ends", ends.Load, finished, nil); e.err != nil {
		return nil, e.err
	}
	select {
	case <-finished:
	default:
		return nil, fmt.Errorf("%d of %d leases have not ended", int64(b.Leases)-ends.Load(), b.Leases)
	}
	if failed != nil {
		return nil, failed
	}
	r := Result{What: fmt.Sprintf("lag of %d expiries", b.Leases), Connections: b.Connections, Early: early.Load()}
	r.rate(ends.Load(), time.Since(begin))
	r.latencies(h)
	r.used(before, b.server(ctx))
	return []Result{r}, nil
}
