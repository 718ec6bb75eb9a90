// Pays into an account in MySQL or MariaDB, guarded by a column of its row.
package main

import (
	"context"
	"database/sql"
	"fmt"
	"log"
	"os"
	"time"

	_ "github.com/go-sql-driver/mysql"

	"github.com/distlock/distlock/client"
	"github.com/distlock/distlock/fence"
	"github.com/distlock/distlock/fence/sqlfence"
)

func main() {
	ctx := context.Background()
	locks, err := client.New([]string{os.Getenv("DISTLOCK")}) // localhost:50051
	check(err)
	defer locks.Close()
	db, err := sql.Open("mysql", os.Getenv("STORE")) // user:password@tcp(localhost:3306)/bank
	check(err)
	defer db.Close()
	_, err = db.ExecContext(ctx, "CREATE TABLE IF NOT EXISTS accounts (id BIGINT PRIMARY KEY, balance BIGINT NOT NULL, fence BIGINT NOT NULL DEFAULT 0) ENGINE=InnoDB")
	check(err)
	_, err = db.ExecContext(ctx, "INSERT IGNORE INTO accounts (id, balance) VALUES (1, 100)")
	check(err)
	accounts := sqlfence.Column{Dialect: sqlfence.MySQL, Table: "accounts", Key: "id", Floor: "fence"}

	pay := func(pass fence.Pass, amount int) error {
		return accounts.Update(ctx, db, "account/1", pass, 1, "balance = balance + ?", amount)
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
