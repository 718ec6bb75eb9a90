package sim_test

import (
	"context"
	"net"
	"testing"
	"testing/synctest"
	"time"

	"google.golang.org/grpc"

	"github.com/distlock/distlock/client"
	"github.com/distlock/distlock/internal/reliability/sim"
	"github.com/distlock/distlock/internal/server"
)

// TestFarAway: a client whose packets take 400 ms each way waits for a lock,
// gets it over whatever connection there is by then, and keeps it.
func TestFarAway(t *testing.T) {
	for _, unary := range []bool{false, true} {
		synctest.Test(t, func(t *testing.T) { farAway(t, unary) })
	}
}

func farAway(t *testing.T, unary bool) {
	const near, far = 1, 2
	link := sim.NewLink(1)
	link.Slow(far, 400*time.Millisecond)
	srv, err := server.New(server.Config{Listener: link, InMemory: true, Clock: sim.Drift(1)})
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan error, 1)
	go func() { ended <- srv.Run(ctx) }()
	dial := func(who int) *client.Client {
		opts := []client.Option{client.WithClock(sim.Drift(1)), client.WithDialOptions(grpc.WithContextDialer(
			func(ctx context.Context, _ string) (net.Conn, error) { return link.Dial(ctx, who) }))}
		if unary {
			opts = append(opts, client.WithUnary())
		}
		c, err := client.New([]string{"10.0.0.1:50051"}, opts...)
		if err != nil {
			t.Fatal(err)
		}
		return c
	}
	holder, waiter := dial(near), dial(far)
	for i := range 10 {
		held, err := holder.Acquire(ctx, "a")
		if err != nil {
			t.Fatal(err)
		}
		time.AfterFunc(2*time.Second, func() { link.Reset(far) })
		time.AfterFunc(2*time.Second+time.Duration(i)*200*time.Millisecond, func() { held.Release(ctx) })
		within, stop := context.WithTimeout(ctx, time.Minute)
		l, err := waiter.Acquire(within, "a", client.TTL(3*time.Second))
		stop()
		if err != nil {
			t.Fatalf("unary %v, released %d: %v", unary, i, err)
		}
		time.Sleep(time.Minute)
		if err := l.Err(); err != nil {
			t.Fatalf("unary %v: %v", unary, err)
		}
		l.Release(ctx)
	}
	// One that is too far away for its TTL stands in nobody's way for long.
	for range 10 {
		held, err := holder.Acquire(ctx, "a")
		if err != nil {
			t.Fatal(err)
		}
		hopeless, stop := context.WithCancel(ctx)
		done := make(chan struct{})
		go func() {
			defer close(done)
			waiter.Acquire(hopeless, "a", client.TTL(900*time.Millisecond))
		}()
		time.Sleep(2 * time.Second)
		link.Reset(far)
		time.Sleep(time.Second)
		held.Release(ctx)
		within, over := context.WithTimeout(ctx, 10*time.Second)
		if held, err = holder.Acquire(within, "a"); err != nil {
			t.Fatalf("unary %v: %v", unary, err)
		}
		over()
		held.Release(ctx)
		stop()
		<-done
	}
	holder.Close()
	waiter.Close()
	cancel()
	if err := <-ended; err != nil {
		t.Error(err)
	}
	time.Sleep(10 * time.Second) // what is on its way arrives
}
