package client_test

import (
	"errors"
	"sync/atomic"
	"testing"
	"time"

	"github.com/distlock/distlock/client"
	"github.com/distlock/distlock/client/clienttest"
)

// sleeper is a machine that sleeps when it is told to, as its client sees it.
type sleeper struct {
	start       time.Time
	slept, seen atomic.Int64
}

func (s *sleeper) now() time.Duration {
	slept := s.slept.Load()
	s.seen.Store(slept)
	return time.Since(s.start) + time.Duration(slept)
}

func (s *sleeper) lately() time.Duration { return time.Since(s.start) + time.Duration(s.seen.Load()) }

// TestTheMachineSleeps: what was held before is lost the moment anybody looks,
// and the first grant after it counts from after it.
func TestTheMachineSleeps(t *testing.T) {
	server := clienttest.Start(t)
	machine := &sleeper{start: time.Now()}
	c, err := client.New([]string{server.Endpoint}, client.WithTimeline(machine.now, machine.lately))
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	if err := acquire(t, c, "awake").Release(t.Context()); err != nil {
		t.Fatal(err)
	}
	machine.slept.Add(int64(time.Hour))
	l := acquire(t, c, "rested", client.TTL(time.Minute))
	if err := l.Err(); err != nil || l.Remaining() < 30*time.Second {
		t.Fatalf("the first lock after the sleep: %v, remaining %v", err, l.Remaining())
	}
	machine.slept.Add(int64(time.Hour))
	var lost *client.LostError
	if err := l.Err(); !errors.As(err, &lost) || lost.Cause != client.CauseUnreachable {
		t.Fatalf("a lock that was slept over: %v", err)
	}
}

func TestLatelyIsNeverLate(t *testing.T) {
	now, lately := client.Boottime()
	for range 10_000 {
		if l, n := lately(), now(); l > n {
			t.Fatalf("%v is after %v", l, n)
		}
		before := now()
		if l, n := lately(), now(); l > n || l < before-time.Minute {
			t.Fatalf("%v is not between %v and %v", l, before, n)
		}
	}
}
