// Pays into an account in SQLite, in a transaction of the program's own.
package main

import (
	"context"
	"database/sql"
	"fmt"
	"log"
	"os"
	"time"

	_ "modernc.org/sqlite"

	"github.com/distlock/distlock/client"
	"github.com/distlock/distlock/fence"
	"github.com/distlock/distlock/fence/sqlfence"
)

func main() {
	ctx := context.Background()
	locks, err := client.New([]string{os.Getenv("DISTLOCK")}) // localhost:50051
	check(err)
	defer locks.Close()
	// Without a busy timeout SQLite fails where it should wait.
	db, err := sql.Open("sqlite", "file:"+os.Getenv("STORE")+"?_pragma=busy_timeout(10000)")
	check(err)
	defer db.Close()
	_, err = db.ExecContext(ctx, "CREATE TABLE IF NOT EXISTS accounts (id INTEGER PRIMARY KEY, balance INTEGER NOT NULL)")
	check(err)
	_, err = db.ExecContext(ctx, "INSERT INTO accounts VALUES (1, 100) ON CONFLICT DO NOTHING")
	check(err)
	guard, err := sqlfence.New(db, sqlfence.SQLite, "")
	check(err)
	check(guard.CreateTable(ctx))

	pay := func(pass fence.Pass, amount int) error {
		tx, err := db.BeginTx(ctx, nil)
		if err != nil {
			return err
		}
		defer tx.Rollback()
		// First of all: what is read and written below is one step with it.
		if err := guard.Admit(ctx, tx, "account/1", pass); err != nil {
			return err
		}
		if _, err := tx.ExecContext(ctx, "UPDATE accounts SET balance = balance + ? WHERE id = 1", amount); err != nil {
			return err
		}
		return tx.Commit()
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
