// Pays into an account in Redis, by go-redis.
package main

import (
	"context"
	"fmt"
	"log"
	"os"
	"time"

	"github.com/redis/go-redis/v9"

	"github.com/distlock/distlock/client"
	"github.com/distlock/distlock/fence"
	"github.com/distlock/distlock/fence/redisfence"
)

func main() {
	ctx := context.Background()
	locks, err := client.New([]string{os.Getenv("DISTLOCK")}) // localhost:50051
	check(err)
	defer locks.Close()
	store := redis.NewClient(&redis.Options{Addr: os.Getenv("STORE")}) // localhost:6379
	defer store.Close()
	guard := redisfence.New(redisfence.EvalFunc(func(ctx context.Context, script string, keys []string, args ...any) (any, error) {
		return store.Eval(ctx, script, keys, args...).Result()
	}))

	pay := func(pass fence.Pass, amount int) error {
		return guard.Write(ctx, "account/1", pass, []redisfence.Command{
			redisfence.Do("INCRBY", guard.Key("account/1", "balance"), amount),
		})
	}

	// Alice holds the lock, and nothing renews it, as if she were paused here.
	alice, err := locks.Acquire(ctx, "account/1", client.TTL(time.Second), client.NoRenew())
	check(err)
	// Bob is granted the lock once her lease has ended. Then both write.
	bob, err := locks.Acquire(ctx, "account/1")
	check(err)
	fmt.Println("bob:", pay(bob.Pass(), 50))
	fmt.Println("alice:", pay(alice.Pass(), 30))
	check(bob.Release(ctx))
	// bob: <nil>
	// alice: resource "account/1": token 1 is stale, the resource has seen 2
}

func check(err error) {
	if err != nil {
		log.Fatal(err)
	}
}
