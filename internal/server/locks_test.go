package server

import (
	"context"
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/durationpb"

	pb "github.com/distlock/distlock/proto/distlock/v1"
)

func TestAcquireAndRelease(t *testing.T) {
	r := start(t)
	ctx := soon(t)
	req := &pb.AcquireRequest{Names: []string{"b", "a"}, Ttl: span(10 * time.Second), Owner: "me", RequestId: 77, Metadata: map[string]string{"host": "h"}}
	resp, err := r.locks().Acquire(ctx, req)
	if err != nil {
		t.Fatal(err)
	}
	g := resp.GetHold()
	if g.GetToken() == 0 || g.GetLeaseId() == 0 || g.GetTtl().AsDuration() != 10*time.Second || g.GetMode() != pb.Mode_MODE_EXCLUSIVE || g.GetRequestId() != 77 {
		t.Errorf("granted %v", g)
	}
	if len(g.GetLocks()) != 2 || g.GetLocks()[0].GetName() != "a" || g.GetLocks()[0].GetFloor() != g.GetToken() {
		t.Errorf("locks %v", g.GetLocks())
	}
	// A repeat finds the same grant.
	again, err := r.locks().Acquire(ctx, req)
	if err != nil || again.GetHold().GetToken() != g.GetToken() || again.GetHold().GetLeaseId() != g.GetLeaseId() {
		t.Errorf("the repeat got %v, %v", again, err)
	}
	if h := r.get("b").GetHolders(); len(h) != 1 || h[0].GetOwner() != "me" || h[0].GetMetadata()["host"] != "h" || h[0].GetToken() != g.GetToken() {
		t.Errorf("holders %v", h)
	}
	// So does a repeat of the release.
	for range 2 {
		if _, err := r.locks().Release(ctx, &pb.ReleaseRequest{Name: "a", Token: g.GetToken(), LeaseId: g.GetLeaseId()}); err != nil {
			t.Fatal(err)
		}
	}
	if r.live("b", g.GetToken()) {
		t.Error("b is still held")
	}
	// A late duplicate of the request is not granted anew.
	_, err = r.locks().Acquire(ctx, req)
	refused(t, err, codes.FailedPrecondition, "REQUEST_ENDED")
	if next := r.acquire("a", time.Second); next.GetToken() <= g.GetToken() {
		t.Errorf("token %d after %d", next.GetToken(), g.GetToken())
	}
}

func TestSharedAndSemaphore(t *testing.T) {
	r := start(t)
	ctx := soon(t)
	share := func(name string, limit uint32) (*pb.Hold, error) {
		resp, err := r.locks().Acquire(ctx, &pb.AcquireRequest{Names: []string{name}, Mode: pb.Mode_MODE_SHARED, Limit: limit, Ttl: span(time.Minute)})
		return resp.GetHold(), err
	}
	first, err := share("s", 2)
	if err != nil {
		t.Fatal(err)
	}
	second, err := share("s", 2)
	if err != nil {
		t.Fatal(err)
	}
	if second.GetToken() <= first.GetToken() || second.GetLocks()[0].GetFloor() != first.GetToken() {
		t.Errorf("first %v, second %v: the floor is the lowest live token", first, second)
	}
	_, err = share("s", 2)
	if p := refused(t, err, codes.Aborted, "LOCK_HELD"); p.GetObstacles()[0].GetHolderCount() != 2 || p.GetObstacles()[0].GetLimit() != 2 {
		t.Errorf("obstacles %v", p.GetObstacles())
	}
	_, err = share("s", 3)
	if p := refused(t, err, codes.FailedPrecondition, "LIMIT_DISAGREES"); p.GetLimit() != 2 || p.GetAskedLimit() != 3 {
		t.Errorf("limits %d and %d", p.GetLimit(), p.GetAskedLimit())
	}
	_, err = share("s", 0)
	refused(t, err, codes.FailedPrecondition, "LIMIT_DISAGREES")
}

// TestExpiry: never early, soon after, and told as what it was.
func TestExpiry(t *testing.T) {
	r := start(t)
	ctx := soon(t)
	g := r.acquire("a", 5*time.Second)
	w := r.watch("a", 0)
	r.clock.Advance(5*time.Second - time.Millisecond)
	if !r.live("a", g.GetToken()) {
		t.Fatal("ended before its time")
	}
	r.clock.Advance(11 * time.Millisecond)
	if e := w.expect(pb.Event_KIND_ENDED); e.GetCause() != pb.EndCause_END_CAUSE_EXPIRED || e.GetToken() != g.GetToken() {
		t.Errorf("ended as %v", e)
	}
	_, err := r.locks().Release(ctx, &pb.ReleaseRequest{Name: "a", Token: g.GetToken(), LeaseId: g.GetLeaseId()})
	p := refused(t, err, codes.FailedPrecondition, "NOT_HELD")
	if p.GetCause() != pb.EndCause_END_CAUSE_EXPIRED || p.GetGrantedSince() || p.GetCurrentToken() != 0 || p.GetEndedAt().AsTime().Before(r.clock.Now().Add(-time.Second)) {
		t.Errorf("told %v", p)
	}
	next := r.acquire("a", time.Minute)
	_, err = r.locks().Release(ctx, &pb.ReleaseRequest{Name: "a", Token: g.GetToken()})
	if p := refused(t, err, codes.FailedPrecondition, "NOT_HELD"); !p.GetGrantedSince() || p.GetCurrentToken() != next.GetToken() {
		t.Errorf("told %v", p)
	}
	resp, err := r.leases().KeepAlive(ctx, &pb.KeepAliveRequest{LeaseIds: []uint64{g.GetLeaseId(), next.GetLeaseId()}})
	if err != nil {
		t.Fatal(err)
	}
	if p := resp.GetResults()[0].GetProblem(); p.GetReason() != "LEASE_ENDED" || p.GetCause() != pb.EndCause_END_CAUSE_EXPIRED {
		t.Errorf("the expired lease's renewal: %v", p)
	}
	if resp.GetResults()[1].GetTtl().AsDuration() != time.Minute {
		t.Errorf("the live lease's renewal: %v", resp.GetResults()[1])
	}
}

// TestWaitersAreServedInOrder and one at a time.
func TestWaitersAreServedInOrder(t *testing.T) {
	r := start(t)
	g := r.acquire("a", time.Minute)
	var waiting []<-chan answer
	for n := range 5 {
		waiting = append(waiting, r.queue(soon(t), r.locks(), &pb.AcquireRequest{
			Names: []string{"a"}, Ttl: span(time.Minute), Owner: fmt.Sprint(n), WaitForever: true,
		}))
	}
	for n, done := range waiting {
		if k := r.get("a"); int(k.GetWaiterCount()) != 5-n || k.GetWaiters()[0].GetOwner() != fmt.Sprint(n) {
			t.Fatalf("the queue is %v", k.GetWaiters())
		}
		if _, err := r.locks().Release(soon(t), &pb.ReleaseRequest{Name: "a", Token: g.GetToken()}); err != nil {
			t.Fatal(err)
		}
		a := <-done
		if a.err != nil || a.grant.GetToken() <= g.GetToken() {
			t.Fatalf("waiter %d: %v", n, a)
		}
		g = a.grant
	}
}

// TestAWaitThatEndsExplainsItself: who holds it, who is ahead, and how long a
// lock-delay lasts.
func TestAWaitThatEndsExplainsItself(t *testing.T) {
	r := start(t)
	ctx := soon(t)
	held, err := r.locks().Acquire(ctx, &pb.AcquireRequest{
		Names: []string{"a"}, Ttl: span(time.Hour), Owner: "ann", Metadata: map[string]string{"job": "7"}, LockDelay: span(30 * time.Second),
	})
	if err != nil {
		t.Fatal(err)
	}
	r.queue(ctx, r.locks(), &pb.AcquireRequest{Names: []string{"a"}, Ttl: span(time.Hour), Owner: "bob", WaitForever: true})
	late := r.queue(ctx, r.locks(), &pb.AcquireRequest{Names: []string{"a"}, Ttl: span(time.Hour), Owner: "eve", Wait: span(3 * time.Second)})
	r.clock.Advance(3*time.Second + 10*time.Millisecond)
	p := refused(t, (<-late).err, codes.Aborted, "WAIT_TIMEOUT")
	o := p.GetObstacles()
	if len(o) != 1 || o[0].GetName() != "a" || o[0].GetPosition() != 2 || len(o[0].GetAhead()) != 1 || o[0].GetAhead()[0].GetOwner() != "bob" {
		t.Fatalf("explained as %v", o)
	}
	if h := o[0].GetHolders(); len(h) != 1 || h[0].GetOwner() != "ann" || h[0].GetToken() != held.GetHold().GetToken() || h[0].GetMetadata()["job"] != "7" {
		t.Errorf("holders %v", h)
	}
	if n := r.get("a").GetWaiterCount(); n != 1 {
		t.Errorf("%d still wait", n)
	}
	// Its holder is lost: the lock stays closed for the lock-delay.
	w := r.watch("a", 0)
	if _, err := r.leases().Revoke(ctx, &pb.RevokeRequest{LeaseId: held.GetHold().GetLeaseId(), By: "op"}); err != nil {
		t.Fatal(err)
	}
	w.expect(pb.Event_KIND_ENDED, pb.Event_KIND_DELAY_STARTED)
	r.clock.Advance(10 * time.Second)
	_, err = r.locks().Acquire(ctx, &pb.AcquireRequest{Names: []string{"a"}, Ttl: span(time.Hour)})
	p = refused(t, err, codes.Aborted, "LOCK_HELD")
	if left := p.GetObstacles()[0].GetDelayRemaining().AsDuration(); left != 20*time.Second {
		t.Errorf("the lock-delay lasts for another %v", left)
	}
	if left := r.get("a").GetDelayRemaining().AsDuration(); left != 20*time.Second {
		t.Errorf("and so says get: %v", left)
	}
	r.clock.Advance(20*time.Second + 10*time.Millisecond)
	w.expect(pb.Event_KIND_DELAY_ENDED)
	if e := w.expect(pb.Event_KIND_GRANTED); e.GetOwner() != "bob" {
		t.Errorf("granted to %v", e)
	}
}

// TestCancelledWaitLeavesTheQueue; one whose connection is lost keeps its
// place, and finds it again by its request id.
func TestCancelledWaitLeavesTheQueue(t *testing.T) {
	r := start(t)
	g := r.acquire("a", time.Hour)
	lost, cut := r.lossy()
	req := &pb.AcquireRequest{Names: []string{"a"}, Ttl: span(time.Minute), Owner: "first", WaitForever: true, RequestId: 5}
	first := r.queue(soon(t), pb.NewLockServiceClient(lost), req)
	ctx, cancel := context.WithCancel(soon(t))
	second := r.queue(ctx, r.locks(), &pb.AcquireRequest{Names: []string{"a"}, Ttl: span(time.Minute), Owner: "second", WaitForever: true})

	w := r.watch("a", 0)
	cancel()
	if e := w.expect(pb.Event_KIND_ABANDONED); e.GetOwner() != "second" {
		t.Errorf("abandoned: %v", e)
	}
	<-second

	cut()
	if a := <-first; status.Code(a.err) != codes.Unavailable {
		t.Errorf("the cut call got %v", a)
	}
	third := r.queue(soon(t), r.locks(), &pb.AcquireRequest{Names: []string{"a"}, Ttl: span(time.Minute), Owner: "third", WaitForever: true})
	// The repeat is answered though "third" has come since.
	again := make(chan answer, 1)
	go func() {
		resp, err := r.locks().Acquire(soon(t), req)
		again <- answer{resp.GetHold(), err}
	}()
	if _, err := r.locks().Release(soon(t), &pb.ReleaseRequest{Name: "a", Token: g.GetToken()}); err != nil {
		t.Fatal(err)
	}
	a := <-again
	if a.err != nil || !r.live("a", a.grant.GetToken()) {
		t.Fatalf("the repeat got %v", a)
	}
	select {
	case b := <-third:
		t.Errorf("the one behind it got %v", b)
	default:
	}
}

// TestALostWaiterLeavesAfterOneTTL when nobody comes back for its place.
func TestALostWaiterLeavesAfterOneTTL(t *testing.T) {
	r := start(t)
	r.acquire("a", time.Hour)
	lost, cut := r.lossy()
	done := r.queue(soon(t), pb.NewLockServiceClient(lost), &pb.AcquireRequest{Names: []string{"a"}, Ttl: span(2 * time.Second), WaitForever: true})
	w := r.watch("a", 0)
	// As long as its call waits the server keeps its lease alive.
	r.clock.Advance(time.Minute)
	if n := r.get("a").GetWaiterCount(); n != 1 {
		t.Fatalf("%d wait", n)
	}
	cut()
	<-done
	gone := make(chan *pb.Event, 1)
	go func() { gone <- w.next() }()
	for {
		r.clock.Advance(time.Second)
		select {
		case e := <-gone:
			if e.GetKind() != pb.Event_KIND_ABANDONED {
				t.Errorf("event %v", e)
			}
			return
		case <-time.After(10 * time.Millisecond): // the server notices the cut in its own time
		}
	}
}

func TestDeadlockIsNamed(t *testing.T) {
	r := start(t)
	ctx := soon(t)
	take := func(name, actor string, wait bool) *pb.AcquireRequest {
		return &pb.AcquireRequest{Names: []string{name}, Ttl: span(time.Hour), Actor: actor, WaitForever: wait}
	}
	for name, actor := range map[string]string{"a": "x", "b": "y"} {
		if _, err := r.locks().Acquire(ctx, take(name, actor, false)); err != nil {
			t.Fatal(err)
		}
	}
	r.queue(ctx, r.locks(), take("b", "x", true))
	_, err := r.locks().Acquire(ctx, take("a", "y", true))
	p := refused(t, err, codes.Aborted, "DEADLOCK")
	var actors []string
	for _, l := range p.GetCircle() {
		actors = append(actors, l.GetActor())
	}
	if !slices.Contains(actors, "x") || !slices.Contains(actors, "y") {
		t.Errorf("the circle is %v", p.GetCircle())
	}
}

func TestLeases(t *testing.T) {
	r := start(t)
	ctx := soon(t)
	made, err := r.leases().Grant(ctx, &pb.GrantRequest{Ttl: span(time.Minute), Owner: "me", Metadata: map[string]string{"k": "v"}, RequestId: 9})
	if err != nil {
		t.Fatal(err)
	}
	id := made.GetLeaseId()
	if again, err := r.leases().Grant(ctx, &pb.GrantRequest{Ttl: span(time.Minute), Owner: "me", Metadata: map[string]string{"k": "v"}, RequestId: 9}); err != nil || again.GetLeaseId() != id {
		t.Errorf("the repeat made lease %d, %v", again.GetLeaseId(), err)
	}
	under, err := r.locks().Acquire(ctx, &pb.AcquireRequest{Names: []string{"a", "b"}, LeaseId: id, RequestId: 1, LowestOpenRequestId: 1})
	if err != nil {
		t.Fatal(err)
	}
	if under.GetHold().GetTtl().AsDuration() != time.Minute {
		t.Errorf("the grant's TTL is %v", under.GetHold().GetTtl())
	}
	r.clock.Advance(20 * time.Second)
	got, err := r.leases().Get(ctx, &pb.GetLeaseRequest{LeaseId: id})
	if err != nil {
		t.Fatal(err)
	}
	l := got.GetLease()
	if l.GetOwner() != "me" || l.GetRemaining().AsDuration() != 40*time.Second || l.GetMetadata()["k"] != "v" || l.GetOwn() || l.GetHoldCount() != 1 || len(l.GetHolds()[0].GetLocks()) != 2 {
		t.Errorf("lease %v", l)
	}
	for range 2 { // revoking again succeeds
		if _, err := r.leases().Revoke(ctx, &pb.RevokeRequest{LeaseId: id, By: "op"}); err != nil {
			t.Fatal(err)
		}
	}
	_, err = r.leases().Get(ctx, &pb.GetLeaseRequest{LeaseId: id})
	if p := refused(t, err, codes.FailedPrecondition, "LEASE_ENDED"); p.GetCause() != pb.EndCause_END_CAUSE_REVOKED || p.GetBy() != "op" {
		t.Errorf("told %v", p)
	}
	_, err = r.locks().Release(ctx, &pb.ReleaseRequest{LeaseId: id, Token: under.GetHold().GetToken()})
	if p := refused(t, err, codes.FailedPrecondition, "NOT_HELD"); p.GetBy() != "op" {
		t.Errorf("told %v", p)
	}
	_, err = r.leases().Get(ctx, &pb.GetLeaseRequest{LeaseId: id + 1000})
	refused(t, err, codes.NotFound, "LEASE_NOT_FOUND")
	_, err = r.locks().Acquire(ctx, &pb.AcquireRequest{Names: []string{"a"}, LeaseId: id + 1000})
	refused(t, err, codes.NotFound, "LEASE_NOT_FOUND")
	_, err = r.leases().Revoke(ctx, &pb.RevokeRequest{LeaseId: id + 1000})
	refused(t, err, codes.NotFound, "LEASE_NOT_FOUND")
}

func TestForceRelease(t *testing.T) {
	r := start(t)
	ctx := soon(t)
	g := r.acquire("a", time.Minute)
	if _, err := r.locks().ForceRelease(ctx, &pb.ForceReleaseRequest{Name: "a", Token: g.GetToken(), By: "op"}); err != nil {
		t.Fatal(err)
	}
	_, err := r.locks().Release(ctx, &pb.ReleaseRequest{Name: "a", Token: g.GetToken(), LeaseId: g.GetLeaseId()})
	if p := refused(t, err, codes.FailedPrecondition, "NOT_HELD"); p.GetCause() != pb.EndCause_END_CAUSE_FORCE_RELEASED || p.GetBy() != "op" {
		t.Errorf("told %v", p)
	}
	_, err = r.locks().ForceRelease(ctx, &pb.ForceReleaseRequest{Name: "a", By: "op"})
	refused(t, err, codes.FailedPrecondition, "NOT_HELD")
}

func TestAbandonUndoesAGrant(t *testing.T) {
	r := start(t)
	ctx := soon(t)
	if _, err := r.locks().Acquire(ctx, &pb.AcquireRequest{Names: []string{"a"}, Ttl: span(time.Minute), RequestId: 3}); err != nil {
		t.Fatal(err)
	}
	for range 2 {
		if _, err := r.locks().Abandon(ctx, &pb.AbandonRequest{RequestId: 3}); err != nil {
			t.Fatal(err)
		}
	}
	if h := r.get("a").GetHolders(); len(h) > 0 {
		t.Errorf("held by %v", h)
	}
}

func TestListInPages(t *testing.T) {
	r := start(t)
	for n := range 25 {
		r.acquire(fmt.Sprintf("jobs/%02d", n), time.Hour)
	}
	r.acquire("other", time.Hour)
	var names []string
	req := &pb.ListRequest{Prefix: "jobs/", PageSize: 10}
	for pages := 1; ; pages++ {
		resp, err := r.locks().List(soon(t), req)
		if err != nil {
			t.Fatal(err)
		}
		for _, k := range resp.GetLocks() {
			names = append(names, k.GetName())
		}
		if req.PageToken = resp.GetNextPageToken(); req.PageToken == "" {
			if pages != 3 {
				t.Errorf("%d pages", pages)
			}
			break
		}
	}
	if len(names) != 25 || !slices.IsSorted(names) || names[0] != "jobs/00" || names[24] != "jobs/24" {
		t.Errorf("listed %v", names)
	}
	var leases int
	lreq := &pb.ListLeasesRequest{PageSize: 7}
	for {
		resp, err := r.leases().List(soon(t), lreq)
		if err != nil {
			t.Fatal(err)
		}
		leases += len(resp.GetLeases())
		if lreq.PageToken = resp.GetNextPageToken(); lreq.PageToken == "" {
			break
		}
	}
	if leases != 26 {
		t.Errorf("%d leases", leases)
	}
}

// TestBadInput: every request is refused with the field named and one line,
// and nothing has changed.
func TestBadInput(t *testing.T) {
	r := start(t)
	r.acquire("semaphore", time.Hour)
	before, err := r.cluster().Status(soon(t), &pb.StatusRequest{})
	if err != nil {
		t.Fatal(err)
	}
	ok := func(change func(*pb.AcquireRequest)) *pb.AcquireRequest {
		req := &pb.AcquireRequest{Names: []string{"a"}, Ttl: span(time.Minute)}
		change(req)
		return req
	}
	for _, c := range []struct {
		what, field string
		call        func(context.Context) error
	}{
		{"no name", "names", r.try(ok(func(q *pb.AcquireRequest) { q.Names = nil }))},
		{"empty name", "name", r.try(ok(func(q *pb.AcquireRequest) { q.Names = []string{""} }))},
		{"name of 513 bytes", "name", r.try(ok(func(q *pb.AcquireRequest) { q.Names = []string{strings.Repeat("n", 513)} }))},
		{"65 names", "names", r.try(ok(func(q *pb.AcquireRequest) { q.Names = strings.Split(strings.Repeat("n", 65), "") }))},
		{"a name twice", "names", r.try(ok(func(q *pb.AcquireRequest) { q.Names = []string{"a", "b", "a"} }))},
		{"no TTL", "ttl", r.try(ok(func(q *pb.AcquireRequest) { q.Ttl = nil }))},
		{"TTL 0", "ttl", r.try(ok(func(q *pb.AcquireRequest) { q.Ttl = span(0) }))},
		{"negative TTL", "ttl", r.try(ok(func(q *pb.AcquireRequest) { q.Ttl = span(-time.Second) }))},
		{"TTL of 100 years", "ttl", r.try(ok(func(q *pb.AcquireRequest) { q.Ttl = span(100 * 365 * 24 * time.Hour) }))},
		{"TTL beyond time", "ttl", r.try(ok(func(q *pb.AcquireRequest) { q.Ttl = &durationpb.Duration{Seconds: 1 << 40} }))},
		{"limit of an exclusive lock", "limit", r.try(ok(func(q *pb.AcquireRequest) { q.Limit = 2 }))},
		{"unknown mode", "mode", r.try(ok(func(q *pb.AcquireRequest) { q.Mode = 7 }))},
		{"negative wait", "wait", r.try(ok(func(q *pb.AcquireRequest) { q.Wait = span(-1) }))},
		{"negative lock-delay", "lock_delay", r.try(ok(func(q *pb.AcquireRequest) { q.LockDelay = span(-1) }))},
		{"lock-delay of a day", "lock_delay", r.try(ok(func(q *pb.AcquireRequest) { q.LockDelay = span(24 * time.Hour) }))},
		{"metadata over 4 KiB", "metadata", r.try(ok(func(q *pb.AcquireRequest) { q.Metadata = map[string]string{"k": strings.Repeat("v", 4096)} }))},
		{"1 MiB of metadata", "request", r.try(ok(func(q *pb.AcquireRequest) { q.Metadata = map[string]string{"k": strings.Repeat("v", 1<<20)} }))},
		{"owner over 256 bytes", "owner", r.try(ok(func(q *pb.AcquireRequest) { q.Owner = strings.Repeat("o", 257) }))},
		{"actor over 256 bytes", "actor", r.try(ok(func(q *pb.AcquireRequest) { q.Actor = strings.Repeat("o", 257) }))},
		{"request id of the server's", "request_id", r.try(ok(func(q *pb.AcquireRequest) { q.RequestId = 1 << 63 }))},
		{"TTL and lease", "ttl", r.try(ok(func(q *pb.AcquireRequest) { q.LeaseId = 1 }))},
		{"lowest open without lease", "lowest_open_request_id", r.try(ok(func(q *pb.AcquireRequest) { q.RequestId, q.LowestOpenRequestId = 5, 4 }))},
		{"release of token 0", "token", func(ctx context.Context) error {
			_, err := r.locks().Release(ctx, &pb.ReleaseRequest{Name: "semaphore"})
			return err
		}},
		{"release without name or lease", "name", func(ctx context.Context) error {
			_, err := r.locks().Release(ctx, &pb.ReleaseRequest{Token: 1})
			return err
		}},
		{"check of token 0", "token", func(ctx context.Context) error {
			_, err := r.locks().CheckToken(ctx, &pb.CheckTokenRequest{Name: "a"})
			return err
		}},
		{"get without name", "name", func(ctx context.Context) error {
			_, err := r.locks().Get(ctx, &pb.GetRequest{})
			return err
		}},
		{"force-release by a novel", "by", func(ctx context.Context) error {
			_, err := r.locks().ForceRelease(ctx, &pb.ForceReleaseRequest{Name: "semaphore", By: strings.Repeat("b", 257)})
			return err
		}},
		{"abandon of nothing", "request_id", func(ctx context.Context) error {
			_, err := r.locks().Abandon(ctx, &pb.AbandonRequest{})
			return err
		}},
		{"lease with TTL 0", "ttl", func(ctx context.Context) error {
			_, err := r.leases().Grant(ctx, &pb.GrantRequest{})
			return err
		}},
		{"revoke by a novel", "by", func(ctx context.Context) error {
			_, err := r.leases().Revoke(ctx, &pb.RevokeRequest{LeaseId: 1, By: strings.Repeat("b", 257)})
			return err
		}},
		{"lease page token", "page_token", func(ctx context.Context) error {
			_, err := r.leases().List(ctx, &pb.ListLeasesRequest{PageToken: "YQ"})
			return err
		}},
	} {
		t.Run(c.what, func(t *testing.T) {
			err := c.call(soon(t))
			p := refused(t, err, codes.InvalidArgument, "INVALID_ARGUMENT")
			if p.GetField() != c.field {
				t.Errorf("field %q (%v), want %q", p.GetField(), err, c.field)
			}
			if m := status.Convert(err).Message(); m == "" || strings.Contains(m, "\n") || !strings.HasPrefix(m, c.field+": ") {
				t.Errorf("message %q", m)
			}
		})
	}
	after, err := r.cluster().Status(soon(t), &pb.StatusRequest{})
	if err != nil {
		t.Fatal(err)
	}
	if after.GetRevision() != before.GetRevision() || after.GetLeases() != 1 || after.GetLocks() != 1 {
		t.Errorf("before %v\nafter  %v", before, after)
	}
}

func (r *rig) try(req *pb.AcquireRequest) func(context.Context) error {
	return func(ctx context.Context) error {
		_, err := r.locks().Acquire(ctx, req)
		return err
	}
}

// TestBoundsOfTheServer are refusals that name which one is reached.
func TestBoundsOfTheServer(t *testing.T) {
	r := start(t, func(c *Config) { c.Bounds.MaxLeases, c.Bounds.MaxLocks, c.Bounds.MaxWaiters = 4, 3, 1 })
	ctx := soon(t)
	for _, name := range []string{"a", "b", "c"} {
		r.acquire(name, time.Hour)
	}
	_, err := r.locks().Acquire(ctx, &pb.AcquireRequest{Names: []string{"d"}, Ttl: span(time.Hour)})
	refused(t, err, codes.ResourceExhausted, "RESOURCE_EXHAUSTED")
	if m := status.Convert(err).Message(); m != "the server's limit of 3 locks is reached" {
		t.Errorf("message %q", m)
	}
	made, err := r.leases().Grant(ctx, &pb.GrantRequest{Ttl: span(time.Hour)})
	if err != nil {
		t.Fatal(err)
	}
	_, err = r.leases().Grant(ctx, &pb.GrantRequest{Ttl: span(time.Hour)})
	refused(t, err, codes.ResourceExhausted, "RESOURCE_EXHAUSTED")
	if _, err := r.locks().Release(ctx, &pb.ReleaseRequest{Name: "c", Token: r.get("c").GetHolders()[0].GetToken()}); err != nil {
		t.Fatal(err)
	}
	wait := func() *pb.AcquireRequest {
		return &pb.AcquireRequest{Names: []string{"a"}, LeaseId: made.GetLeaseId(), WaitForever: true}
	}
	r.queue(ctx, r.locks(), wait())
	_, err = r.locks().Acquire(ctx, wait())
	refused(t, err, codes.ResourceExhausted, "RESOURCE_EXHAUSTED")
}

// TestAFullQueueNeverBlocksARelease, even with a single worker.
func TestAFullQueueNeverBlocksARelease(t *testing.T) {
	for _, workers := range []int{1, 0} {
		t.Run(fmt.Sprint("workers ", workers), func(t *testing.T) {
			r := start(t, func(c *Config) { c.MaxWorkers = workers })
			g := r.acquire("a", time.Hour)
			var waiting []<-chan answer
			for range 30 {
				waiting = append(waiting, r.queue(soon(t), r.locks(), &pb.AcquireRequest{Names: []string{"a"}, Ttl: span(time.Hour), WaitForever: true}))
			}
			for _, done := range waiting {
				if _, err := r.locks().Release(soon(t), &pb.ReleaseRequest{Name: "a", Token: g.GetToken()}); err != nil {
					t.Fatal(err)
				}
				a := <-done
				if a.err != nil {
					t.Fatal(a.err)
				}
				g = a.grant
			}
		})
	}
}

func TestWatch(t *testing.T) {
	r := start(t)
	ctx := soon(t)
	w := r.watch("jobs/", 0)
	r.acquire("other", time.Hour)
	resp, err := r.locks().Acquire(ctx, &pb.AcquireRequest{Names: []string{"jobs/a", "jobs/b", "x"}, Ttl: span(time.Hour), Owner: "me"})
	if err != nil {
		t.Fatal(err)
	}
	g := resp.GetHold()
	for _, name := range []string{"jobs/a", "jobs/b"} { // one each of the locks watched
		if e := w.expect(pb.Event_KIND_GRANTED); e.GetName() != name || e.GetToken() != g.GetToken() || e.GetFloor() != g.GetToken() || e.GetOwner() != "me" || e.GetLeaseId() != g.GetLeaseId() || !e.GetTime().AsTime().Equal(r.clock.Now().UTC()) {
			t.Errorf("event %v", e)
		}
	}
	seen := w.at
	w.cancel() // the stream breaks
	if _, err := r.locks().Release(ctx, &pb.ReleaseRequest{Name: "x", Token: g.GetToken()}); err != nil {
		t.Fatal(err)
	}
	r.acquire("jobs/a", time.Hour)
	resumed := r.watch("jobs/", seen+1)
	for _, name := range []string{"jobs/a", "jobs/b"} {
		if e := resumed.expect(pb.Event_KIND_ENDED); e.GetName() != name || e.GetCause() != pb.EndCause_END_CAUSE_RELEASED {
			t.Errorf("event %v", e)
		}
	}
	if e := resumed.expect(pb.Event_KIND_GRANTED); e.GetName() != "jobs/a" {
		t.Errorf("event %v", e)
	}
	// List says where to go on from.
	list, err := r.locks().List(ctx, &pb.ListRequest{Prefix: "jobs/"})
	if err != nil {
		t.Fatal(err)
	}
	onward := r.watch("", list.GetRevision()+1)
	r.acquire("y", time.Hour)
	if e := onward.expect(pb.Event_KIND_GRANTED); e.GetName() != "y" {
		t.Errorf("event %v", e)
	}
	stream, err := r.locks().Watch(ctx, &pb.WatchRequest{FromRevision: 1 << 40})
	if err == nil {
		_, err = stream.Recv()
	}
	refused(t, err, codes.OutOfRange, "OUT_OF_RANGE")
}

// TestAQuietWatchCanResume: it is told how far the store has come, so that a
// break after many events of other locks does not cost it its place.
func TestAQuietWatchCanResume(t *testing.T) {
	r := start(t)
	ctx := soon(t)
	stream, err := r.locks().Watch(ctx, &pb.WatchRequest{Prefix: "quiet/"})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := stream.Recv(); err != nil {
		t.Fatal(err)
	}
	var group errgroup
	for n := range 32 {
		group.run(func() error {
			name := fmt.Sprint("busy/", n)
			for range 20_000 / 4 / 32 { // four events each; the ring keeps 16,384
				resp, err := r.locks().Acquire(ctx, &pb.AcquireRequest{Names: []string{name}, Ttl: span(time.Hour)})
				if err != nil {
					return err
				}
				if _, err := r.locks().Release(ctx, &pb.ReleaseRequest{Name: name, Token: resp.GetHold().GetToken()}); err != nil {
					return err
				}
			}
			return nil
		})
	}
	if err := group.wait(); err != nil {
		t.Fatal(err)
	}
	store, err := r.cluster().Status(ctx, &pb.StatusRequest{})
	if err != nil {
		t.Fatal(err)
	}
	var at uint64
	for at+16_384/2 < store.GetRevision() {
		resp, err := stream.Recv()
		if err != nil {
			t.Fatal(err)
		}
		if len(resp.GetEvents()) > 0 || resp.GetRevision() <= at {
			t.Fatalf("after revision %d: %v", at, resp)
		}
		at = resp.GetRevision()
	}
	resumed := r.watch("quiet/", at+1)
	r.acquire("quiet/a", time.Hour)
	resumed.expect(pb.Event_KIND_GRANTED)
}

// TestASlowWatcherHoldsUpNobody: it costs a position, and when it has fallen
// too far behind it is told so.
func TestASlowWatcherHoldsUpNobody(t *testing.T) {
	r := start(t)
	ctx := soon(t)
	// A window of fixed size, so that flow control stops the stream soon.
	narrow := dial(t, r.Addr().String(), grpc.WithInitialWindowSize(64<<10), grpc.WithInitialConnWindowSize(64<<10))
	stream, err := pb.NewLockServiceClient(narrow).Watch(ctx, &pb.WatchRequest{})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := stream.Recv(); err != nil { // it is in place, and does not read on
		t.Fatal(err)
	}
	cycle := func(names []string) error {
		resp, err := r.locks().Acquire(ctx, &pb.AcquireRequest{Names: names, Ttl: span(time.Hour)})
		if err != nil {
			return err
		}
		_, err = r.locks().Release(ctx, &pb.ReleaseRequest{Name: names[0], Token: resp.GetHold().GetToken()})
		return err
	}
	// Each time round is some 40 KiB of events: more than the window takes.
	var long []string
	for n := range 64 {
		long = append(long, fmt.Sprintf("%s-%02d", strings.Repeat("n", 480), n))
	}
	for range 20 {
		if err := cycle(long); err != nil {
			t.Fatal(err)
		}
	}
	// Then more events than the ring keeps, four each time round: it drops whole
	// batches, and keeps more than its bound by up to one.
	var group errgroup
	for n := range 32 {
		group.run(func() error {
			for range 16_384 / 2 / 32 {
				if err := cycle([]string{fmt.Sprint(n)}); err != nil {
					return err
				}
			}
			return nil
		})
	}
	if err := group.wait(); err != nil {
		t.Fatal(err)
	}
	var last uint64
	for err == nil {
		var resp *pb.WatchResponse
		resp, err = stream.Recv()
		for _, e := range resp.GetEvents() {
			if e.GetRevision() < last {
				t.Fatalf("revision %d after %d", e.GetRevision(), last)
			}
			last = e.GetRevision()
		}
	}
	refused(t, err, codes.OutOfRange, "OUT_OF_RANGE")
}
