package client_test

import (
	"context"
	"errors"
	"fmt"
	"log"
	"testing"
	"time"

	"github.com/distlock/distlock/client"
	"github.com/distlock/distlock/client/clienttest"
)

// endpoint starts a server for the examples below; yours is localhost:50051.
func endpoint() (string, func()) {
	t := &exampleT{}
	s := clienttest.Start(t)
	return s.Endpoint, t.end
}

// exampleT lets an example use what is made for tests.
type exampleT struct {
	testing.TB
	cleanups []func()
}

func (t *exampleT) Helper()           {}
func (t *exampleT) Cleanup(fn func()) { t.cleanups = append(t.cleanups, fn) }
func (t *exampleT) Fatal(args ...any) { log.Fatal(args...) }
func (t *exampleT) Error(args ...any) { log.Print(args...) }
func (t *exampleT) end() {
	for _, fn := range t.cleanups {
		fn()
	}
}

func Example() {
	address, stop := endpoint()
	defer stop()
	ctx := context.Background()

	c, err := client.New([]string{address})
	if err != nil {
		log.Fatal(err)
	}
	defer c.Close()

	lock, err := c.Acquire(ctx, "reports/nightly", client.TTL(30*time.Second))
	if err != nil {
		log.Fatal(err)
	}
	// Show lock.Pass() to whatever the lock guards, and stop when the lock is
	// lost: lock.Context() ends then, with the reason as its cause.
	fmt.Println("holding", lock.Name(), "still:", lock.Err() == nil)

	if err := lock.Release(ctx); err != nil {
		log.Fatal(err)
	}
	fmt.Println(lock.Err())
	// Output:
	// holding reports/nightly still: true
	// released
}

func ExampleClient_TryAcquire() {
	address, stop := endpoint()
	defer stop()
	ctx := context.Background()
	c, err := client.New([]string{address}, client.WithOwner("worker-1"))
	if err != nil {
		log.Fatal(err)
	}
	defer c.Close()

	if _, err := c.TryAcquire(ctx, "orders/42"); err != nil {
		log.Fatal(err)
	}
	_, err = c.TryAcquire(ctx, "orders/42")
	var e *client.Error
	if errors.Is(err, client.ErrNotAcquired) && errors.As(err, &e) {
		fmt.Println("held by", e.Obstacles[0].Holders[0].Owner)
	}
	// Output: held by worker-1
}

func ExampleClient_AcquireAll() {
	address, stop := endpoint()
	defer stop()
	ctx := context.Background()
	c, err := client.New([]string{address})
	if err != nil {
		log.Fatal(err)
	}
	defer c.Close()

	// Both or none, under one token: two such requests cannot deadlock.
	lock, err := c.AcquireAll(ctx, []string{"accounts/2", "accounts/1"})
	if err != nil {
		log.Fatal(err)
	}
	fmt.Println(lock.Names())
	// Output: [accounts/1 accounts/2]
}

func ExampleLimit() {
	address, stop := endpoint()
	defer stop()
	ctx := context.Background()
	c, err := client.New([]string{address})
	if err != nil {
		log.Fatal(err)
	}
	defer c.Close()

	for range 3 {
		_, err := c.TryAcquire(ctx, "gpu", client.Limit(2))
		fmt.Println(err == nil)
	}
	// Output:
	// true
	// true
	// false
}

func ExampleClient_Grant() {
	address, stop := endpoint()
	defer stop()
	ctx := context.Background()
	c, err := client.New([]string{address})
	if err != nil {
		log.Fatal(err)
	}
	defer c.Close()

	// Many locks that live and die together, for the price of one renewal.
	lease, err := c.Grant(ctx, 30*time.Second)
	if err != nil {
		log.Fatal(err)
	}
	first, err := lease.Acquire(ctx, "shards/1")
	if err != nil {
		log.Fatal(err)
	}
	second, err := lease.Acquire(ctx, "shards/2")
	if err != nil {
		log.Fatal(err)
	}
	fmt.Println(first.LeaseID() == second.LeaseID(), first.Token() < second.Token())
	// Output: true true
}
