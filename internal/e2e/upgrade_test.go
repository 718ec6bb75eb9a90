//go:build upgrade && linux

package e2e

import (
	"flag"
	"fmt"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/distlock/distlock/client"
	"github.com/distlock/distlock/internal/reliability/believe"
	"github.com/distlock/distlock/lease/machine"
)

var oldBinary = flag.String("old", "", "a build of the level before")

// restart ends a member in good order and starts it again, as another build.
func (m *member) restart(t *testing.T, exe string) {
	t.Helper()
	m.signal(syscall.SIGTERM)
	<-m.exited
	m.binary = exe
	m.start()
}

// TestUpgrade replaces the build of a cluster under load, member by member, the
// leader last and the leader first. Nothing that is held is lost. The level
// rises once every member is new, and not before: until then a member may go
// back.
func TestUpgrade(t *testing.T) {
	if *oldBinary == "" {
		t.Fatal("-old must name a build of the level before; make upgrade makes one")
	}
	for _, order := range []string{"leader last", "leader first"} {
		t.Run(order, func(t *testing.T) {
			g := startOldGroup(t)
			endpoints := g.endpoints()
			c, err := client.New(endpoints)
			if err != nil {
				t.Fatal(err)
			}
			defer c.Close()
			lease, err := c.Grant(t.Context(), 10*time.Second)
			if err != nil {
				t.Fatal(err)
			}
			var kept []*client.Lock
			for i := range 20 {
				own, err := c.Acquire(t.Context(), fmt.Sprint("own/", i), client.TTL(10*time.Second))
				if err != nil {
					t.Fatal(err)
				}
				under, err := lease.Acquire(t.Context(), fmt.Sprint("under/", i))
				if err != nil {
					t.Fatal(err)
				}
				kept = append(kept, own, under)
			}
			l := startLoad(t, loadConfig{endpoints: endpoints, clients: 8, locks: 50, queues: 2, keepers: 10, ttl: 10 * time.Second})
			l.nextGrant(time.Now())

			level := func() uint32 {
				t.Helper()
				s, err := c.Admin().Status(t.Context())
				if err != nil {
					t.Fatal(err)
				}
				return s.Level
			}
			before := level()
			replace := func(m *member, exe string) {
				t.Helper()
				m.restart(t, exe)
				g.settled(m, 3)
				l.nextGrant(time.Now())
			}
			leader := g.leader()
			var members []*member
			for _, m := range g.members {
				if m != leader {
					members = append(members, m)
				}
			}
			if order == "leader first" {
				members = append([]*member{leader}, members...)
			} else {
				members = append(members, leader)
			}
			replace(members[0], "")
			replace(members[0], *oldBinary) // it may go back
			replace(members[0], "")
			replace(members[1], "")
			time.Sleep(3 * time.Second)           // the leader asks every second
			if n := level(); n > max(before, 1) { // the first builds do not say theirs, which is 1
				t.Fatalf("level %d beside an old member", n)
			}
			replace(members[2], "")
			for until := time.Now().Add(20 * time.Second); level() != uint32(machine.NewestLevel); time.Sleep(50 * time.Millisecond) {
				if time.Now().After(until) {
					t.Fatalf("level %d with no old member", level())
				}
			}
			l.nextGrant(time.Now())
			t.Logf("%d grants", l.stop())
			g.sameEverywhere()
			for _, k := range kept {
				if err := k.Err(); err != nil {
					t.Errorf("%s: %v", k.Name(), err)
					continue
				}
				if check, err := c.CheckToken(t.Context(), k.Name(), k.Token()); err != nil || !check.Live {
					t.Errorf("%s: believed with token %d: %+v %v", k.Name(), k.Token(), check, err)
				}
				if err := k.Release(t.Context()); err != nil {
					t.Errorf("%s: %v", k.Name(), err)
				}
			}
			if err := lease.Revoke(t.Context()); err != nil {
				t.Error(err)
			}
			workUnderNew(t, c, endpoints)

			// The way back is a restored backup: an old build stops, and says so.
			m := g.leader()
			m.signal(syscall.SIGTERM)
			<-m.exited
			m.binary = *oldBinary
			m.spawn()
			select {
			case <-m.exited:
			case <-time.After(20 * time.Second):
				t.Fatal("an old build runs on data of a level that it does not know")
			}
			if log := m.logs(); !strings.Contains(log, "newer version") && !strings.Contains(log, "refusing to start") {
				t.Errorf("the old build says:\n%s", log[max(0, len(log)-1000):])
			}
			m.binary = ""
			m.start() // nothing was harmed
			g.settled(m, 3)
		})
	}
}

// startOldGroup starts three members of the build before.
func startOldGroup(t *testing.T) *group {
	g := prepareGroup(t, 3, "--election-timeout", "500ms")
	for _, m := range g.members {
		m.binary = *oldBinary
	}
	g.begin()
	return g
}

// workUnderNew has crowds work at the new level, and agree with the servers.
func workUnderNew(t *testing.T, look *client.Client, endpoints []string) {
	t.Helper()
	var crowds believe.Crowds
	for i := range 2 {
		c, err := believe.Start(believe.Config{
			Endpoints: endpoints, Owner: fmt.Sprint("crowd", i), Seed: uint64(i), Hot: 2, Callers: 3, Locks: 200,
			MinTTL: time.Second, MaxTTL: 3 * time.Second, Pause: 10 * time.Millisecond,
		})
		if err != nil {
			t.Fatal(err)
		}
		crowds = append(crowds, c)
	}
	time.Sleep(3 * time.Second)
	if _, err := believe.Round(t.Context(), look, crowds, 20*time.Second); err != nil {
		t.Error(err)
	}
	for _, c := range crowds {
		c.Close()
	}
}

// TestUpgradeOfOneNode: a data directory of the build before is read on, also
// after a kill.
func TestUpgradeOfOneNode(t *testing.T) {
	s := &server{t: t, address: freeAddress(t), args: []string{"--data-dir", t.TempDir()}, binary: *oldBinary}
	t.Cleanup(func() { s.kill() })
	s.start()
	c, err := client.New([]string{s.address})
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	var kept []*client.Lock
	for i := range 50 {
		l, err := c.Acquire(t.Context(), fmt.Sprint("a", i), client.TTL(20*time.Second))
		if err != nil {
			t.Fatal(err)
		}
		kept = append(kept, l)
	}
	s.kill()
	s.binary = ""
	s.start()
	for _, l := range kept {
		if check, err := c.CheckToken(t.Context(), l.Name(), l.Token()); err != nil || !check.Live || l.Err() != nil {
			t.Fatalf("%s: %+v %v %v", l.Name(), check, err, l.Err())
		}
		if err := l.Release(t.Context()); err != nil {
			t.Error(err)
		}
	}
	if s, err := c.Admin().Status(t.Context()); err != nil || s.Level != uint32(machine.NewestLevel) {
		t.Errorf("level %d, %v", s.Level, err)
	}
	next, err := c.Acquire(t.Context(), "b")
	if err != nil || next.Token() <= kept[len(kept)-1].Token() {
		t.Errorf("token %d after %d, %v", next.Token(), kept[len(kept)-1].Token(), err)
	}
	if err := next.Release(t.Context()); err != nil {
		t.Error(err)
	}
	workUnderNew(t, c, []string{s.address})
}
