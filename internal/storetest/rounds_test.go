package storetest

import (
	"bufio"
	"context"
	"database/sql"
	"fmt"
	"math/rand/v2"
	"os"
	"strconv"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/distlock/distlock/client"
	"github.com/distlock/distlock/fence"
)

// TTL of the holders in rounds. Renewals keep it while nobody is stopped.
const roundTTL = 300 * time.Millisecond

// logged writes the text of a resource, and an entry into the log, in one
// transaction. The lock on the text's row, or before it on the guard's, makes
// the order of the entries that of the commits.
func (x sqlTarget) logged(ctx context.Context, pass fence.Pass, s string) error {
	write := func(tx *sql.Tx) error {
		if err := x.set(ctx, tx, x.Resource, s); err != nil {
			return err
		}
		_, err := tx.ExecContext(ctx, "INSERT INTO "+x.table+"_log (resource, token, text) VALUES ($1, $2, $3)", x.Resource, int64(pass.Token), s)
		return err
	}
	if x.Guarded {
		return x.guard.Write(ctx, x.Resource, pass, write)
	}
	tx, err := x.db.BeginTx(ctx, nil)
	if err != nil {
		return err
	}
	defer tx.Rollback()
	if err := write(tx); err != nil {
		return err
	}
	return tx.Commit()
}

// holdInRounds takes the lock and writes, for each line it is told. It does not
// look whether it still holds it: the worst of holders.
func holdInRounds(c *client.Client, s spec) error {
	ctx := context.Background()
	to, err := connect(s)
	if err != nil {
		return err
	}
	defer to.close()
	for in := bufio.NewScanner(os.Stdin); in.Scan(); {
		lock, err := c.Acquire(ctx, s.Resource, client.TTL(roundTTL))
		for range 20 { // a slow machine may lose so short a lease before it has it
			if err == nil {
				break
			}
			lock, err = c.Acquire(ctx, s.Resource, client.TTL(roundTTL))
		}
		if err != nil {
			return err
		}
		pass := lock.Pass()
		fmt.Println("holds")
		time.Sleep(rand.N(4 * time.Millisecond)) // its work, to be stopped in
		err = to.(sqlTarget).logged(ctx, pass, "alice's "+in.Text())
		lock.Release(ctx) // she may have lost it
		fmt.Println(verdict(err))
	}
	return nil
}

// tally is what came of the rounds.
type tally struct {
	rounds, accepted, refused atomic.Int64
	stale                     int // entries after one with a higher token
	lost                      int // of these, the last word on their resource
}

// play plays n rounds, several at a time, each at its own resource. In a round
// Alice, a process, takes the lock and writes, and is stopped for a random time
// at a random moment, be it before her write, in the middle of her transaction
// or after it; Bob waits for the lock and writes.
func playRounds(t *testing.T, n, abreast int, guarded bool) *tally {
	ctx, cancel := context.WithTimeout(t.Context(), 5*time.Minute)
	defer cancel()
	address := serve(t)
	s := newTarget(t, "PostgreSQL row", guarded)
	admin := openDSN(t, "pgx", s.DSN)
	if _, err := admin.ExecContext(ctx, "CREATE TABLE "+s.Table+"_log (id BIGSERIAL PRIMARY KEY, resource TEXT, token BIGINT, text TEXT)"); err != nil {
		t.Fatal(err)
	}
	bobs, err := client.New([]string{address})
	if err != nil {
		t.Fatal(err)
	}
	defer bobs.Close()

	var r tally
	round := func(alice *child, to sqlTarget, number string) error {
		if err := alice.tell(number); err != nil {
			return err
		}
		if line, err := alice.says(); err != nil || line != "holds" {
			return fmt.Errorf("alice: %s, %w", line, err)
		}
		time.Sleep(rand.N(5 * time.Millisecond)) // the random moment
		if err := alice.stop(); err != nil {
			return err
		}
		bob := make(chan error, 1)
		go func() {
			lock, err := bobs.Acquire(ctx, to.Resource, client.TTL(10*time.Second))
			if err == nil {
				err = to.logged(ctx, lock.Pass(), "bob's "+number)
				lock.Release(ctx)
			}
			bob <- err
		}()
		time.Sleep(rand.N(5 * roundTTL / 2)) // the random pause
		if err := alice.signal(syscall.SIGCONT); err != nil {
			return err
		}
		line, err := alice.says()
		switch {
		case err != nil:
			return err
		case line == "accepted":
			r.accepted.Add(1)
		case line == "stale":
			r.refused.Add(1)
		default:
			return fmt.Errorf("alice: %s", line)
		}
		r.rounds.Add(1)
		return <-bob
	}

	var group sync.WaitGroup
	var next atomic.Int64
	for i := range abreast {
		mine := s
		mine.Resource = "document/" + strconv.Itoa(i)
		alice := startChild(t, "rounds", address, mine)
		opened, err := connect(mine)
		if err != nil {
			t.Fatal(err)
		}
		defer opened.close()
		group.Go(func() {
			for n := int64(n); ctx.Err() == nil; {
				number := next.Add(1)
				if number > n {
					return
				}
				if err := round(alice, opened.(sqlTarget), strconv.FormatInt(number, 10)); err != nil {
					t.Errorf("round %d: %v", number, err)
					return
				}
			}
		})
	}
	group.Wait()

	// The log tells what was committed, in order.
	rows, err := admin.QueryContext(ctx, "SELECT resource, token FROM "+s.Table+"_log ORDER BY id")
	if err != nil {
		t.Fatal(err)
	}
	defer rows.Close()
	highest, last := map[string]int64{}, map[string]int64{}
	for rows.Next() {
		var resource string
		var token int64
		if err := rows.Scan(&resource, &token); err != nil {
			t.Fatal(err)
		}
		if token < highest[resource] {
			r.stale++
		}
		highest[resource], last[resource] = max(highest[resource], token), token
	}
	if err := rows.Err(); err != nil {
		t.Fatal(err)
	}
	for resource, token := range last {
		if token < highest[resource] {
			r.lost++
		}
	}
	t.Logf("%d rounds: of Alice's writes %d were accepted and %d refused; %d stale writes were accepted, and %d of %d documents lost their last write",
		r.rounds.Load(), r.accepted.Load(), r.refused.Load(), r.stale, r.lost, len(last))
	return &r
}

// TestRounds: in 1,000 rounds with random pauses no stale write is accepted;
// and without the guard some are, so that the test can fail.
func TestRounds(t *testing.T) {
	t.Run("guarded", func(t *testing.T) {
		r := playRounds(t, 1000, 24, true)
		if r.rounds.Load() != 1000 || r.stale != 0 || r.lost != 0 {
			t.Errorf("%d stale writes were accepted in %d rounds", r.stale, r.rounds.Load())
		}
		if r.refused.Load() == 0 || r.accepted.Load() == 0 {
			t.Errorf("the pauses missed: %d accepted, %d refused", r.accepted.Load(), r.refused.Load())
		}
	})
	t.Run("unguarded", func(t *testing.T) {
		if r := playRounds(t, 100, 24, false); r.stale == 0 {
			t.Error("without a guard, no stale write was accepted: the attack is none")
		}
	})
}
