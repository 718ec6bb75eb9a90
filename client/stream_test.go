package client_test

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/distlock/distlock/client"
	"github.com/distlock/distlock/client/clienttest"
)

// TestLossIsToldAtOnce: nobody moves the clock, so that no renewal could tell.
func TestLossIsToldAtOnce(t *testing.T) {
	s := clienttest.Start(t)
	c, ops := s.Client(t), s.Client(t, client.WithOwner("ops"))
	forced, revoked := acquire(t, c, "forced"), acquire(t, c, "revoked")
	lease, err := c.Grant(t.Context(), time.Minute)
	if err != nil {
		t.Fatal(err)
	}
	under, err := lease.Acquire(t.Context(), "under")
	if err != nil {
		t.Fatal(err)
	}
	beside, err := lease.Acquire(t.Context(), "beside")
	if err != nil {
		t.Fatal(err)
	}
	if err := ops.Admin().Revoke(t.Context(), revoked.LeaseID(), "them"); err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"forced", "under"} {
		if err := ops.Admin().ForceRelease(t.Context(), name, 0, "ops"); err != nil {
			t.Fatal(err)
		}
	}
	for lock, want := range map[*client.Lock]client.LostError{
		forced:  {Cause: client.CauseForceReleased, By: "ops"},
		under:   {Cause: client.CauseForceReleased, By: "ops"},
		revoked: {Cause: client.CauseRevoked, By: "them"},
	} {
		if lost := lostAs(t, lock); lost.Cause != want.Cause || lost.By != want.By {
			t.Errorf("%s: %+v", lock.Name(), lost)
		}
	}
	if beside.Err() != nil || lease.Err() != nil {
		t.Errorf("the lease and its other lock: %v, %v", lease.Err(), beside.Err())
	}
}

// TestManyCallersOnOneStream: each gets its own answer, whatever becomes of
// the others and of the connection.
func TestManyCallersOnOneStream(t *testing.T) {
	s := clienttest.Start(t)
	c := s.Client(t)
	var group sync.WaitGroup
	for i := range 64 {
		group.Add(1)
		go func() {
			defer group.Done()
			for n := range 10 {
				own, shared := fmt.Sprint("own", i), fmt.Sprint("shared", i%8)
				lock, err := c.Acquire(t.Context(), own)
				if err != nil || lock.Name() != own {
					t.Errorf("%v", err)
					return
				}
				if _, err := c.TryAcquire(t.Context(), own); !errors.Is(err, client.ErrNotAcquired) {
					t.Errorf("its own lock again: %v", err)
				}
				ctx, cancel := context.WithTimeout(t.Context(), time.Duration(n)*time.Millisecond)
				if other, err := c.Acquire(ctx, shared); err == nil {
					other.Release(t.Context())
				} else if !errors.Is(err, context.DeadlineExceeded) {
					t.Errorf("a wait of %d ms: %v", n, err)
				}
				cancel()
				if err := lock.Release(t.Context()); err != nil {
					t.Error(err)
				}
			}
		}()
	}
	for range 5 {
		time.Sleep(20 * time.Millisecond)
		s.Cut()
		s.Restore()
	}
	group.Wait()
	eventually(t, "nothing is held or waited for", func() bool {
		n := 0
		for _, err := range c.List(t.Context(), "") {
			if err != nil {
				t.Fatal(err)
			}
			n++
		}
		return n == 0
	})
}

// TestTextThatIsNone: it concerns its own call only.
func TestTextThatIsNone(t *testing.T) {
	s := clienttest.Start(t)
	c := s.Client(t)
	lock := acquire(t, c, "a")
	got := make(chan error, 1)
	go func() {
		l, err := c.Acquire(t.Context(), "a")
		if err == nil {
			err = l.Release(t.Context())
		}
		got <- err
	}()
	for what, opts := range map[string][]client.AcquireOption{
		"\xff":                    nil,
		"owner":                   {client.Owner("\xff")},
		"actor":                   {client.Actor("\xff")},
		"metadata":                {client.Metadata(map[string]string{"k": "\xff"})},
		strings.Repeat("x", 2000): nil,
		"large":                   {client.Metadata(map[string]string{"k": strings.Repeat("x", 2<<20)})},
	} {
		if _, err := c.Acquire(t.Context(), what, opts...); !errors.Is(err, client.ErrInvalid) {
			t.Errorf("%.10q: %v", what, err)
		}
	}
	_, check := c.CheckToken(t.Context(), "\xff", 1)
	_, grant := c.Admin().Grant(t.Context(), time.Minute, client.Owner("\xff"))
	_, large := c.Admin().Grant(t.Context(), time.Minute, client.Metadata(map[string]string{"k": strings.Repeat("x", 2<<20)}))
	for what, err := range map[string]error{
		"release": c.Admin().Release(t.Context(), "\xff", 1), "check": check, "grant": grant, "a large grant": large,
		"force-release": c.Admin().ForceRelease(t.Context(), "a", 1, "\xff"), "revoke": c.Admin().Revoke(t.Context(), 1, "\xff"),
	} {
		if !errors.Is(err, client.ErrInvalid) {
			t.Errorf("%s: %v", what, err)
		}
	}
	if err := lock.Release(t.Context()); err != nil {
		t.Fatal(err)
	}
	if err := <-got; err != nil {
		t.Errorf("another's wait on the same stream: %v", err)
	}
}

// TestUnary: the same without a stream; a loss is told by the next renewal.
func TestUnary(t *testing.T) {
	s := clienttest.Start(t)
	c, ops := s.Client(t, client.WithUnary()), s.Client(t)
	lock := acquire(t, c, "a", client.TTL(3*time.Second))
	if _, err := c.TryAcquire(t.Context(), "a"); !errors.Is(err, client.ErrNotAcquired) {
		t.Error(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	if _, err := c.Acquire(ctx, "a"); !errors.Is(err, context.DeadlineExceeded) {
		t.Error(err)
	}
	s.Advance(10 * time.Second)
	if err := lock.Err(); err != nil {
		t.Fatal(err)
	}
	if err := ops.Admin().ForceRelease(t.Context(), "a", 0, "ops"); err != nil {
		t.Fatal(err)
	}
	s.Advance(2 * time.Second)
	if lost := lostAs(t, lock); lost.Cause != client.CauseForceReleased || lost.By != "ops" {
		t.Errorf("%+v", lost)
	}
	if err := acquire(t, c, "b").Release(t.Context()); err != nil {
		t.Error(err)
	}
}
