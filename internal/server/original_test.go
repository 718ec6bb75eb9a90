package server

import (
	"fmt"
	"math"
	"sync/atomic"
	"testing"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	original "github.com/distlock/distlock/proto/distlock"
	pb "github.com/distlock/distlock/proto/distlock/v1"
)

// says checks an error's code and its text, letter by letter.
func says(t *testing.T, err error, code codes.Code, text string) {
	t.Helper()
	if s := status.Convert(err); s.Code() != code || s.Message() != text {
		t.Errorf("answered %v %q, want %v %q", s.Code(), s.Message(), code, text)
	}
}

func (r *rig) take(key string, seconds int64) *original.Lock {
	r.t.Helper()
	k, err := r.original().AcquireLock(soon(r.t), &original.AcquireLockRequest{Key: key, ExpiresInSeconds: seconds})
	if err != nil {
		r.t.Fatalf("acquire %s: %v", key, err)
	}
	return k
}

func (r *rig) create(key string) {
	r.t.Helper()
	if _, err := r.original().CreateLock(soon(r.t), &original.Lock{Key: key}); err != nil {
		r.t.Fatalf("create %s: %v", key, err)
	}
}

// shows checks a lock as the original's clients see it.
func (r *rig) shows(key string, acquired bool, clock int64, expires time.Time) {
	r.t.Helper()
	got, err := r.original().GetLock(soon(r.t), &original.Lock{Key: key})
	if err != nil {
		r.t.Fatalf("get %s: %v", key, err)
	}
	r.same(got, key, acquired, clock, expires)
}

func (r *rig) same(got *original.Lock, key string, acquired bool, clock int64, expires time.Time) {
	r.t.Helper()
	if got.GetKey() != key || got.GetAcquired() != acquired || got.GetClock() != clock || got.GetExpiresAt() == nil || !got.GetExpiresAt().AsTime().Equal(expires) {
		r.t.Errorf("%v, want %s acquired=%v clock=%d expires_at=%v", got, key, acquired, clock, expires.UTC())
	}
}

var epoch = time.Unix(0, 0)

func TestOriginalLockFromCreationToDeletion(t *testing.T) {
	r := start(t)
	o, ctx := r.original(), soon(t)
	missing := func(err error) { t.Helper(); says(t, err, codes.NotFound, "A lock with key k does not exist") }
	_, err := o.GetLock(ctx, &original.Lock{Key: "k"})
	missing(err)
	_, err = o.AcquireLock(ctx, &original.AcquireLockRequest{Key: "k"})
	missing(err)
	_, err = o.ReleaseLock(ctx, &original.Lock{Key: "k"})
	missing(err)
	_, err = o.DeleteLock(ctx, &original.Lock{Key: "k"})
	missing(err)

	r.create("k")
	_, err = o.CreateLock(ctx, &original.Lock{Key: "k"})
	says(t, err, codes.AlreadyExists, "A lock with key k already exists")
	r.shows("k", false, 0, epoch)

	// Free: the next clock, and 60 seconds when none are named.
	minute := r.clock.Now().Add(time.Minute)
	r.same(r.take("k", 0), "k", true, 1, minute)
	r.shows("k", true, 1, minute)
	// Held: never blocks, and shows the holder's clock and time.
	r.clock.Advance(time.Second)
	r.same(r.take("k", 5), "k", false, 1, minute)

	_, err = o.ReleaseLock(ctx, &original.Lock{Key: "k", Clock: 7})
	says(t, err, codes.Aborted, "A lock with key k has clock 1, not 7")
	_, err = o.ReleaseLock(ctx, &original.Lock{Key: "k", Clock: -1})
	says(t, err, codes.Aborted, "A lock with key k has clock 1, not -1")
	r.shows("k", true, 1, minute)
	for range 2 { // released, and released again
		if _, err := o.ReleaseLock(ctx, &original.Lock{Key: "k", Clock: 1}); err != nil {
			t.Fatal(err)
		}
		if got, err := o.GetLock(ctx, &original.Lock{Key: "k"}); err != nil || got.GetAcquired() || got.GetClock() != 1 {
			t.Errorf("after the release: %v, %v", got, err)
		}
	}

	// Expired: free for the next, and its own release still succeeds.
	w := r.watch("k", 0)
	soonOver := r.clock.Now().Add(5 * time.Second)
	r.same(r.take("k", 5), "k", true, 2, soonOver)
	r.clock.Advance(5*time.Second + 10*time.Millisecond)
	w.await(pb.Event_KIND_ENDED)
	if got, err := o.GetLock(ctx, &original.Lock{Key: "k"}); err != nil || got.GetAcquired() || got.GetClock() != 2 {
		t.Errorf("after it expired: %v, %v", got, err)
	}
	if _, err := o.ReleaseLock(ctx, &original.Lock{Key: "k", Clock: 2}); err != nil {
		t.Errorf("release after expiry: %v", err)
	}
	r.same(r.take("k", 5), "k", true, 3, r.clock.Now().Add(5*time.Second))
	_, err = o.ReleaseLock(ctx, &original.Lock{Key: "k", Clock: 2})
	says(t, err, codes.Aborted, "A lock with key k has clock 3, not 2")

	// Deleted while held; its clock is forgotten.
	if _, err := o.DeleteLock(ctx, &original.Lock{Key: "k"}); err != nil {
		t.Fatal(err)
	}
	_, err = o.GetLock(ctx, &original.Lock{Key: "k"})
	missing(err)
	r.create("k")
	r.shows("k", false, 0, epoch)
	r.same(r.take("k", 5), "k", true, 1, r.clock.Now().Add(5*time.Second))
}

func TestOriginalRefusesWhatNoLockCanBe(t *testing.T) {
	r := start(t)
	o, ctx := r.original(), soon(t)
	r.create("k")
	_, err := o.CreateLock(ctx, &original.Lock{})
	if p := refused(t, err, codes.InvalidArgument, "INVALID_ARGUMENT"); p.GetField() != "key" {
		t.Errorf("field %q", p.GetField())
	}
	for _, seconds := range []int64{-1, 100_000_000, math.MaxInt64, math.MinInt64} {
		_, err = o.AcquireLock(ctx, &original.AcquireLockRequest{Key: "k", ExpiresInSeconds: seconds})
		if p := refused(t, err, codes.InvalidArgument, "INVALID_ARGUMENT"); p.GetField() != "expires_in_seconds" {
			t.Errorf("%d seconds: field %q", seconds, p.GetField())
		}
	}
	r.shows("k", false, 0, epoch)
}

// TestOriginalListsItsOwn, all of them and in order; not those that only our
// clients use.
func TestOriginalListsItsOwn(t *testing.T) {
	r := start(t)
	const count = 2500 // more than a page
	var group errgroup
	for part := range 10 {
		group.run(func() error {
			for n := part; n < count; n += 10 {
				if _, err := r.original().CreateLock(soon(t), &original.Lock{Key: fmt.Sprintf("k%05d", n)}); err != nil {
					return err
				}
			}
			return nil
		})
	}
	if err := group.wait(); err != nil {
		t.Fatal(err)
	}
	r.acquire("k00000-ours", time.Hour)
	r.take("k00007", 30)
	list, err := r.original().ListLocks(soon(t), &original.EmptyRequest{})
	if err != nil {
		t.Fatal(err)
	}
	if len(list.GetLocks()) != count {
		t.Fatalf("%d locks", len(list.GetLocks()))
	}
	for n, k := range list.GetLocks() {
		if want := fmt.Sprintf("k%05d", n); k.GetKey() != want || k.GetAcquired() != (n == 7) {
			t.Fatalf("place %d has %v", n, k)
		}
	}
}

// TestOriginalAndOursExcludeEachOther: one machine behind both protocols.
func TestOriginalAndOursExcludeEachOther(t *testing.T) {
	r := start(t)
	ctx := soon(t)
	r.create("k")
	theirs := r.take("k", 30)
	_, err := r.locks().Acquire(ctx, &pb.AcquireRequest{Names: []string{"k"}, Ttl: span(time.Minute)})
	refused(t, err, codes.Aborted, "LOCK_HELD")
	k := r.get("k")
	if !k.GetDeclared() || k.GetClock() != 1 || len(k.GetHolders()) != 1 || k.GetHolders()[0].GetToken() == 0 {
		t.Errorf("our clients see %v", k)
	}
	ours := r.queue(ctx, r.locks(), &pb.AcquireRequest{Names: []string{"k"}, Ttl: span(time.Minute), WaitForever: true})
	if _, err := r.original().ReleaseLock(ctx, &original.Lock{Key: "k", Clock: theirs.GetClock()}); err != nil {
		t.Fatal(err)
	}
	a := <-ours
	if a.err != nil || a.grant.GetToken() <= k.GetHolders()[0].GetToken() {
		t.Fatalf("our waiter got %v", a)
	}
	// Every grant raises the clock, whoever asked for it.
	r.same(r.take("k", 30), "k", false, 2, r.clock.Now().Add(time.Minute))
	// Deleting it is a loss that says so.
	if _, err := r.original().DeleteLock(ctx, &original.Lock{Key: "k"}); err != nil {
		t.Fatal(err)
	}
	_, err = r.locks().Release(ctx, &pb.ReleaseRequest{Name: "k", Token: a.grant.GetToken(), LeaseId: a.grant.GetLeaseId()})
	if p := refused(t, err, codes.FailedPrecondition, "NOT_HELD"); p.GetCause() != pb.EndCause_END_CAUSE_UNDECLARED {
		t.Errorf("told %v", p)
	}
	// A lock that only our clients use does not exist for the original's.
	r.acquire("mine", time.Minute)
	_, err = r.original().GetLock(ctx, &original.Lock{Key: "mine"})
	says(t, err, codes.NotFound, "A lock with key mine does not exist")
	_, err = r.original().AcquireLock(ctx, &original.AcquireLockRequest{Key: "mine"})
	says(t, err, codes.NotFound, "A lock with key mine does not exist")
}

// TestOriginalOutlivesARestart, clock and hold and all.
func TestOriginalOutlivesARestart(t *testing.T) {
	dir := t.TempDir()
	r := start(t, durable(dir))
	r.create("k")
	r.take("k", 30)
	if _, err := r.original().ReleaseLock(soon(t), &original.Lock{Key: "k", Clock: 1}); err != nil {
		t.Fatal(err)
	}
	held := r.take("k", 30)
	if err := r.stop(); err != nil {
		t.Fatal(err)
	}
	r = start(t, durable(dir))
	r.shows("k", true, 2, held.GetExpiresAt().AsTime())
	if _, err := r.original().ReleaseLock(soon(t), &original.Lock{Key: "k", Clock: 2}); err != nil {
		t.Fatal(err)
	}
	if got := r.take("k", 30); !got.GetAcquired() || got.GetClock() != 3 {
		t.Errorf("after the restart: %v", got)
	}
}

// TestOriginalUnderContention: one at a time, with strictly rising clocks, in
// both of the server's modes.
func TestOriginalUnderContention(t *testing.T) {
	for _, workers := range []int{5, 0} {
		t.Run(fmt.Sprint("workers ", workers), func(t *testing.T) {
			r := start(t, func(c *Config) { c.MaxWorkers = workers })
			r.create("hot")
			var inside, last atomic.Int64
			var group errgroup
			for range 20 {
				group.run(func() error {
					for got := 0; got < 10; {
						k, err := r.original().AcquireLock(soon(t), &original.AcquireLockRequest{Key: "hot"})
						if err != nil {
							return err
						}
						if !k.GetAcquired() {
							continue
						}
						got++
						if n := inside.Add(1); n != 1 {
							return fmt.Errorf("%d inside", n)
						}
						if before := last.Swap(k.GetClock()); before >= k.GetClock() {
							return fmt.Errorf("clock %d after %d", k.GetClock(), before)
						}
						inside.Add(-1)
						if _, err := r.original().ReleaseLock(soon(t), &original.Lock{Key: "hot", Clock: k.GetClock()}); err != nil {
							return err
						}
					}
					return nil
				})
			}
			if err := group.wait(); err != nil {
				t.Fatal(err)
			}
			if last.Load() != 200 {
				t.Errorf("the last clock is %d after 200 grants", last.Load())
			}
		})
	}
}
