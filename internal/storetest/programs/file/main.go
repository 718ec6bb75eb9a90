// Writes a report to a file.
package main

import (
	"context"
	"fmt"
	"log"
	"os"
	"time"

	"github.com/distlock/distlock/client"
	"github.com/distlock/distlock/fence"
	"github.com/distlock/distlock/fence/filefence"
)

func main() {
	ctx := context.Background()
	locks, err := client.New([]string{os.Getenv("DISTLOCK")}) // localhost:50051
	check(err)
	defer locks.Close()
	guard, err := filefence.New(os.Getenv("STORE")) // /srv/reports
	check(err)

	report := func(pass fence.Pass, text string) error {
		return guard.Write(ctx, "daily.csv", pass, filefence.Bytes([]byte(text), 0o644))
	}

	// Alice holds the lock, and nothing renews it, as if she were paused here.
	alice, err := locks.Acquire(ctx, "daily.csv", client.TTL(time.Second), client.NoRenew())
	check(err)
	// Bob is granted the lock once her lease has ended. Then both write.
	bob, err := locks.Acquire(ctx, "daily.csv")
	check(err)
	fmt.Println("bob:", report(bob.Pass(), "bob's\n"))
	fmt.Println("alice:", report(alice.Pass(), "alice's\n"))
	check(bob.Release(ctx))
	// bob: <nil>
	// alice: resource "daily.csv": token 1 is stale, the resource has seen 2
}

func check(err error) {
	if err != nil {
		log.Fatal(err)
	}
}
