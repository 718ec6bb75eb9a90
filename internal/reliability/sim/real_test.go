package sim_test

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"google.golang.org/grpc"

	"github.com/distlock/distlock/client"
	"github.com/distlock/distlock/internal/reliability/check"
	"github.com/distlock/distlock/internal/reliability/sim"
	"github.com/distlock/distlock/internal/server"
)

// TestRealClients has clients of package client talk to a server of package
// server, both as they are, in virtual time over a network in memory that is
// slow, stalls and breaks, with clocks that differ by 1 %. A judge looks every
// millisecond who counts on which lock.
func TestRealClients(t *testing.T) {
	n := 12
	if testing.Short() {
		n = 3
	}
	for seed := range uint64(n) { // nothing of the client is kept from one bubble to the next
		if !t.Failed() {
			synctest.Test(t, func(t *testing.T) { realClients(t, seed) })
		}
	}
}

func realClients(t *testing.T, seed uint64) {
	const clients, rounds = 4, 12
	rng := rand.New(rand.NewPCG(seed, 5))
	serverRate, clientRate := 1.01, 1.0
	if seed%2 == 0 {
		serverRate, clientRate = 1.0, 0.99
	}
	link := sim.NewLink(seed)
	srv, err := server.New(server.Config{Listener: link, InMemory: true, Clock: sim.Drift(serverRate)})
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan error, 1)
	go func() { ended <- srv.Run(ctx) }()

	j := &judge{held: map[string]map[uint64]*client.Lock{}, history: &check.History{Rate: 0.0101, Lag: time.Hour, Heal: time.Minute}, begin: time.Now()}
	stop := make(chan struct{})
	var watching, working sync.WaitGroup
	watching.Go(func() {
		for {
			select {
			case <-stop:
				return
			case <-time.After(time.Millisecond):
				j.look(t)
			}
		}
	})
	watching.Go(func() { // faults
		for {
			select {
			case <-stop:
				return
			case <-time.After(time.Duration(rng.IntN(700)) * time.Millisecond):
			}
			who := rng.IntN(clients)
			switch rng.IntN(4) {
			case 0:
				link.Stall(who, time.Duration(rng.IntN(3000))*time.Millisecond)
			case 1:
				link.Slow(who, time.Duration(rng.IntN(120))*time.Millisecond)
			case 2:
				link.Slow(who, 0)
			case 3:
				link.Reset(who)
			}
		}
	})
	for id := range clients {
		r := rand.New(rand.NewPCG(seed, uint64(id)+100))
		working.Go(func() {
			c, err := client.New([]string{"10.0.0.1:50051"}, client.WithClock(sim.Drift(clientRate)), client.WithOwner(fmt.Sprint(id)),
				client.WithDialOptions(grpc.WithContextDialer(func(ctx context.Context, _ string) (net.Conn, error) { return link.Dial(ctx, id) })))
			if err != nil {
				t.Error(err)
				return
			}
			defer c.Close()
			for range rounds {
				j.use(ctx, c, id, r)
				time.Sleep(time.Duration(r.IntN(200)) * time.Millisecond)
			}
		})
	}
	working.Wait()
	close(stop)
	watching.Wait()
	cancel()
	if err := <-ended; err != nil {
		t.Error(err)
	}
	time.Sleep(10 * time.Second) // what is still on its way arrives
	j.history.End = time.Since(j.begin)
	for _, v := range check.All(j.history) {
		t.Error(v)
	}
	if j.grants < clients*rounds/4 {
		t.Errorf("%d grants", j.grants)
	}
}

// judge knows all clients' locks, and asks each whether it is still counted on.
type judge struct {
	begin   time.Time
	history *check.History

	mu     sync.Mutex
	held   map[string]map[uint64]*client.Lock
	grants int
}

func (j *judge) look(t *testing.T) {
	j.mu.Lock()
	defer j.mu.Unlock()
	for name, list := range j.held {
		var tokens []uint64
		for token, l := range list {
			if l.Err() == nil {
				tokens = append(tokens, token)
			}
		}
		if len(tokens) > 1 {
			t.Errorf("I1 at %v: tokens %v of %s are counted on at once", time.Since(j.begin), tokens, name)
			for _, token := range tokens {
				delete(list, token)
			}
		}
	}
}

// use takes a lock for a while.
func (j *judge) use(ctx context.Context, c *client.Client, id int, r *rand.Rand) {
	name := string(rune('a' + r.IntN(2)))
	ttl := time.Duration(400+r.IntN(2000)) * time.Millisecond
	ctx, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	asked := time.Since(j.begin)
	lock, err := c.Acquire(ctx, name, client.TTL(ttl))
	if err != nil {
		return
	}
	token := uint64(lock.Token())
	j.mu.Lock()
	j.grants++
	if j.held[name] == nil {
		j.held[name] = map[uint64]*client.Lock{}
	}
	j.held[name][token] = lock
	j.mu.Unlock()
	j.history.Add(check.Event{At: time.Since(j.begin), Kind: check.Acquired, Who: id, Request: token, Token: token, Locks: []string{name}, Sent: asked, TTL: ttl})
	select {
	case <-lock.Done():
	case <-time.After(time.Duration(r.Int64N(int64(2 * ttl)))):
	}
	j.mu.Lock()
	delete(j.held[name], token)
	j.mu.Unlock()
	bounded, stop := context.WithTimeout(context.Background(), 2*time.Second)
	defer stop()
	var lost *client.LostError
	if err := lock.Release(bounded); err == nil {
		j.history.Add(check.Event{At: time.Since(j.begin), Kind: check.Released, Who: id, Token: token})
	} else if !errors.As(err, &lost) && errors.Is(err, client.ErrNotHeld) {
		j.history.Add(check.Event{At: time.Since(j.begin), Kind: check.Gone, Who: id, Token: token})
	}
}
