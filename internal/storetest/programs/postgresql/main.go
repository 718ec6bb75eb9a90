// Pays into an account in PostgreSQL, guarded by a row in a table of its own.
package main

import (
	"context"
	"database/sql"
	"fmt"
	"log"
	"os"
	"time"

	_ "github.com/jackc/pgx/v5/stdlib"

	"github.com/distlock/distlock/client"
	"github.com/distlock/distlock/fence"
	"github.com/distlock/distlock/fence/sqlfence"
)

func main() {
	ctx := context.Background()
	locks, err := client.New([]string{os.Getenv("DISTLOCK")}) // localhost:50051
	check(err)
	defer locks.Close()
	db, err := sql.Open("pgx", os.Getenv("STORE")) // postgres://user@localhost/bank
	check(err)
	defer db.Close()
	_, err = db.ExecContext(ctx, "CREATE TABLE IF NOT EXISTS accounts (id BIGINT PRIMARY KEY, balance BIGINT NOT NULL)")
	check(err)
	_, err = db.ExecContext(ctx, "INSERT INTO accounts VALUES (1, 100) ON CONFLICT DO NOTHING")
	check(err)
	guard, err := sqlfence.New(db, sqlfence.PostgreSQL, "")
	check(err)
	check(guard.CreateTable(ctx))

	pay := func(pass fence.Pass, amount int) error {
		return guard.Write(ctx, "account/1", pass, func(tx *sql.Tx) error {
			// All that happens to tx is one step with the check of the pass.
			var balance int
			if err := tx.QueryRowContext(ctx, "SELECT balance FROM accounts WHERE id = 1").Scan(&balance); err != nil {
				return err
			}
			_, err := tx.ExecContext(ctx, "UPDATE accounts SET balance = $1 WHERE id = 1", balance+amount)
			return err
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
