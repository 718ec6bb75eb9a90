package server

import (
	"context"
	"fmt"
	"io"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	pb "github.com/distlock/distlock/proto/distlock/v1"
)

// plex is one stream of many operations.
type plex struct {
	t *testing.T
	grpc.BidiStreamingClient[pb.MultiplexRequest, pb.MultiplexResponse]
	losses []*pb.Loss
}

func multiplex(t *testing.T, ctx context.Context, conn *grpc.ClientConn) *plex {
	t.Helper()
	s, err := pb.NewStreamServiceClient(conn).Multiplex(ctx)
	if err != nil {
		t.Fatal(err)
	}
	return &plex{t: t, BidiStreamingClient: s}
}

func (p *plex) ask(ops ...*pb.Operation) {
	p.t.Helper()
	if err := p.Send(&pb.MultiplexRequest{Operations: ops}); err != nil {
		p.t.Fatal(err)
	}
}

// hear returns the next n answers, by id.
func (p *plex) hear(n int) map[uint64]*pb.Answer {
	p.t.Helper()
	got := make(map[uint64]*pb.Answer)
	for len(got) < n {
		msg, err := p.Recv()
		if err != nil {
			p.t.Fatalf("after %d of %d answers: %v", len(got), n, err)
		}
		for _, a := range msg.GetAnswers() {
			got[a.GetId()] = a
		}
		p.losses = append(p.losses, msg.GetLosses()...)
	}
	return got
}

// waiters waits until a lock has n.
func (r *rig) waiters(name string, n int32) {
	r.t.Helper()
	for deadline := time.Now().Add(20 * time.Second); r.get(name).GetWaiterCount() != n; time.Sleep(time.Millisecond) {
		if time.Now().After(deadline) {
			r.t.Fatalf("%s has %d waiters, not %d", name, r.get(name).GetWaiterCount(), n)
		}
	}
}

func acquireOp(id uint64, name string, wait bool) *pb.Operation {
	return &pb.Operation{Id: id, Call: &pb.Operation_Acquire{Acquire: &pb.AcquireRequest{
		Names: []string{name}, Ttl: span(time.Minute), RequestId: id, WaitForever: wait, Owner: fmt.Sprint("o", id),
	}}}
}

func releaseOp(id uint64, g *pb.Hold) *pb.Operation {
	return &pb.Operation{Id: id, Call: &pb.Operation_Release{Release: &pb.ReleaseRequest{LeaseId: g.GetLeaseId(), Token: g.GetToken()}}}
}

func TestMultiplexCarriesEveryOperation(t *testing.T) {
	r := start(t)
	p := multiplex(t, soon(t), r.conn)
	p.ask(
		acquireOp(1, "a", false), acquireOp(2, "a", false), acquireOp(3, "a", true), acquireOp(4, "", false),
		&pb.Operation{Id: 5, Call: &pb.Operation_Grant{Grant: &pb.GrantRequest{Ttl: span(time.Hour), RequestId: 9}}},
		&pb.Operation{Id: 6, Call: &pb.Operation_Grant{Grant: &pb.GrantRequest{Ttl: span(1 << 62)}}},
		&pb.Operation{Id: 7, Call: &pb.Operation_Abandon{Abandon: &pb.AbandonRequest{RequestId: 77}}},
		&pb.Operation{Id: 8, Call: &pb.Operation_KeepAlive{KeepAlive: &pb.KeepAliveRequest{LeaseIds: make([]uint64, 10_001)}}},
		&pb.Operation{Id: 9, Call: &pb.Operation_Acquire{Acquire: &pb.AcquireRequest{Names: []string{"b"}, Mode: 9}}},
		&pb.Operation{Id: 10},
	)
	got := p.hear(9) // all but the wait
	g := got[1].GetAcquire().GetHold()
	if g.GetToken() == 0 || g.GetLocks()[0].GetName() != "a" || g.GetTtl().AsDuration() != time.Minute || g.GetRequestId() != 1 {
		t.Errorf("granted: %v", got[1])
	}
	// A failure is what the call on its own says.
	_, err := r.locks().Acquire(soon(t), &pb.AcquireRequest{Names: []string{"a"}, Ttl: span(time.Minute)})
	f := got[2].GetFailure()
	if s := status.Convert(err); codes.Code(f.GetCode()) != s.Code() || f.GetReason() != "LOCK_HELD" ||
		f.GetProblem().GetReason() != "LOCK_HELD" || f.GetProblem().GetObstacles()[0].GetHolders()[0].GetOwner() != "o1" || f.GetMessage() == "" {
		t.Errorf("held: %v, on its own %v", f, err)
	}
	for id, field := range map[uint64]string{4: "name", 6: "ttl", 8: "lease_ids", 9: "mode", 10: "call"} {
		f := got[id].GetFailure()
		if codes.Code(f.GetCode()) != codes.InvalidArgument || f.GetProblem().GetField() != field {
			t.Errorf("operation %d: %v, want one about %s", id, got[id], field)
		}
	}
	if got[5].GetGrant().GetLeaseId() == 0 || got[5].GetGrant().GetTtl().AsDuration() != time.Hour || got[7].GetAbandon() == nil {
		t.Errorf("%v %v", got[5], got[7])
	}
	p.ask(
		&pb.Operation{Id: 11, Call: &pb.Operation_CheckToken{CheckToken: &pb.CheckTokenRequest{Name: "a", Token: g.GetToken()}}},
		&pb.Operation{Id: 12, Call: &pb.Operation_KeepAlive{KeepAlive: &pb.KeepAliveRequest{LeaseIds: []uint64{g.GetLeaseId(), 99}}}},
	)
	got = p.hear(2)
	if !got[11].GetCheckToken().GetLive() {
		t.Errorf("%v", got[11])
	}
	if k := got[12].GetKeepAlive().GetResults(); len(k) != 2 || k[0].GetTtl().AsDuration() != time.Minute || k[1].GetProblem().GetReason() != "LEASE_NOT_FOUND" {
		t.Errorf("%v", got[12])
	}
	p.ask(&pb.Operation{Id: 13, Call: &pb.Operation_ForceRelease{ForceRelease: &pb.ForceReleaseRequest{Name: "a", By: "ops"}}})
	got = p.hear(2) // and the grant to whoever waited
	next := got[3].GetAcquire().GetHold()
	if got[13].GetForceRelease() == nil || next.GetToken() <= g.GetToken() {
		t.Errorf("%v", got)
	}
	p.ask(releaseOp(14, next), &pb.Operation{Id: 15, Call: &pb.Operation_Revoke{Revoke: &pb.RevokeRequest{LeaseId: 99}}})
	got = p.hear(2)
	if got[14].GetRelease() == nil || got[15].GetFailure().GetReason() != "LEASE_NOT_FOUND" {
		t.Errorf("%v", got)
	}
	if len(p.losses) != 2 || p.losses[0].GetCause() != pb.EndCause_END_CAUSE_FORCE_RELEASED || p.losses[0].GetBy() != "ops" ||
		p.losses[0].GetToken() != g.GetToken() || p.losses[1].GetLeaseId() != g.GetLeaseId() {
		t.Errorf("losses: %v", p.losses)
	}
	// Closing the sending side lets what waits finish.
	p.ask(acquireOp(20, "c", false), acquireOp(21, "c", true))
	g = p.hear(1)[20].GetAcquire().GetHold()
	if err := p.CloseSend(); err != nil {
		t.Fatal(err)
	}
	if _, err := r.locks().Release(soon(t), &pb.ReleaseRequest{LeaseId: g.GetLeaseId(), Token: g.GetToken()}); err != nil {
		t.Fatal(err)
	}
	if got := p.hear(1); got[21].GetAcquire() == nil {
		t.Errorf("%v", got)
	}
	if _, err := p.Recv(); err != io.EOF {
		t.Errorf("the stream ends with %v", err)
	}
}

// TestMultiplexIsEndedByWhatItCannotBe: without an id, or with too many
// operations, there is no answering one by one.
func TestMultiplexIsEndedByWhatItCannotBe(t *testing.T) {
	r := start(t)
	for name, msg := range map[string]*pb.MultiplexRequest{
		"id":         {Operations: []*pb.Operation{acquireOp(0, "a", false)}},
		"operations": {Operations: make([]*pb.Operation, 8193)},
		"request":    {Operations: []*pb.Operation{acquireOp(1, string(make([]byte, 2<<20)), false)}},
	} {
		for i, op := range msg.Operations {
			if op == nil {
				msg.Operations[i] = &pb.Operation{Id: uint64(i + 1)}
			}
		}
		p := multiplex(t, soon(t), r.conn)
		p.ask(msg.Operations...)
		_, err := p.Recv()
		if field := refused(t, err, codes.InvalidArgument, "INVALID_ARGUMENT").GetField(); field != name {
			t.Errorf("%s: the field is %q", name, field)
		}
	}
}

// TestAStreamThatEnds: its waits are abandoned by a client that ends it, and
// keep their places when the connection is lost.
func TestAStreamThatEnds(t *testing.T) {
	r := start(t)
	r.acquire("a", time.Hour)
	ctx, cancel := context.WithCancel(soon(t))
	p := multiplex(t, ctx, r.conn)
	p.ask(acquireOp(1, "a", true))
	r.waiters("a", 1)
	cancel()
	r.waiters("a", 0)

	conn, cut := r.lossy()
	p = multiplex(t, soon(t), conn)
	p.ask(acquireOp(2, "a", true))
	r.waiters("a", 1)
	before := r.get("a").GetWaiters()[0].GetLeaseId()
	cut()
	if _, err := p.Recv(); status.Code(err) != codes.Unavailable {
		t.Errorf("the client of a lost connection got %v", err)
	}
	p = multiplex(t, soon(t), r.conn)
	p.ask(acquireOp(2, "a", true), acquireOp(3, "b", false))
	p.hear(1)
	if w := r.get("a").GetWaiters(); len(w) != 1 || w[0].GetLeaseId() != before {
		t.Errorf("%v, the place was of lease %d", w, before)
	}
}

// TestStopAnswersTheStream: waits are answered STOPPING and keep their places,
// and the stream ends with the same.
func TestStopAnswersTheStream(t *testing.T) {
	dir := t.TempDir()
	r := start(t, durable(dir))
	r.acquire("a", time.Hour)
	p := multiplex(t, soon(t), r.conn)
	p.ask(acquireOp(1, "a", true))
	r.waiters("a", 1)
	stopped := make(chan error, 1)
	go func() { stopped <- r.stop() }()
	if got := p.hear(1); got[1].GetFailure().GetReason() != "STOPPING" || codes.Code(got[1].GetFailure().GetCode()) != codes.Unavailable {
		t.Errorf("%v", got)
	}
	if _, err := p.Recv(); status.Code(err) != codes.Unavailable {
		t.Errorf("the stream ended with %v", err)
	}
	if err := <-stopped; err != nil {
		t.Error(err)
	}
	r = start(t, durable(dir))
	if n := r.get("a").GetWaiterCount(); n != 1 {
		t.Errorf("%d waiters", n)
	}
}

// TestAClientThatDoesNotRead: the server stops reading from it, and serves
// others meanwhile.
func TestAClientThatDoesNotRead(t *testing.T) {
	r := start(t)
	ctx, cancel := context.WithCancel(soon(t))
	defer cancel()
	p := multiplex(t, ctx, dial(t, r.Addr().String()))
	sent := make(chan int, 1)
	go func() {
		n := 0
		defer func() { sent <- n }()
		for ; n < 1_000_000; n++ {
			ops := make([]*pb.Operation, 100)
			for i := range ops {
				ops[i] = &pb.Operation{Id: uint64(n*100 + i + 1), Call: &pb.Operation_CheckToken{CheckToken: &pb.CheckTokenRequest{Name: "a", Token: 1}}}
			}
			if p.Send(&pb.MultiplexRequest{Operations: ops}) != nil {
				return
			}
		}
	}()
	// It stands still once everything between the two is full.
	other := multiplex(t, soon(t), r.conn)
	for i := range uint64(20) {
		other.ask(acquireOp(i+1, fmt.Sprint(i), false))
		if a := other.hear(1)[i+1]; a.GetAcquire() == nil {
			t.Fatalf("another client: %v", a)
		}
		time.Sleep(10 * time.Millisecond)
	}
	cancel()
	if n := <-sent; n >= 10_000 {
		t.Errorf("%d messages of 100 were taken from a client that does not read", n)
	}
}
