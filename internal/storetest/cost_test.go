package storetest

import (
	"context"
	"fmt"
	"math"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"testing"
	"time"

	"github.com/redis/go-redis/v9"

	"github.com/distlock/distlock/fence"
	"github.com/distlock/distlock/fence/filefence"
)

// BenchmarkCost compares guarded writes with unguarded ones, by turns in one
// run, at servers that bring each write to the disk. It reports the median of
// each, in microseconds, and their ratio.
//
//	cd internal/storetest && go test -run '^$' -bench Cost -benchtime 2000x
func BenchmarkCost(b *testing.B) {
	const text = "0123456789abcdef0123456789abcdef"
	p := pass(7)
	ctx := context.Background()

	for _, on := range databases {
		sqls := func(b *testing.B) *texts {
			var dsn string
			switch on.name {
			case "PostgreSQL":
				dsn = durablePostgres.get(b).DSN
			case "MariaDB":
				dsn = durableMariaDB.get(b).DSN
			default:
				dsn = "file:" + filepath.Join(b.TempDir(), "db") + "?_pragma=busy_timeout(60000)&_pragma=journal_mode(WAL)&_pragma=synchronous(FULL)"
			}
			x := newTexts(b, on, openDSN(b, on.driver, dsn))
			if err := (rows{x}).Write(ctx, "r", p, text); err != nil {
				b.Fatal(err)
			}
			return x
		}
		// The value changes each time: a database may do nothing for one that
		// does not.
		update := func(x *texts) string {
			return fmt.Sprintf("UPDATE %s SET text = %s WHERE id = %s", x.table, on.place(1), on.place(2))
		}
		b.Run(on.name+"/column", func(b *testing.B) {
			x := sqls(b)
			compare(b, func(n int) error {
				_, err := x.db.ExecContext(ctx, update(x), strconv.Itoa(n), hash("r"))
				return err
			}, func(n int) error {
				return x.column.Update(ctx, x.db, "r", p, hash("r"), "text = "+on.place(1), strconv.Itoa(n))
			})
		})
		b.Run(on.name+"/row", func(b *testing.B) {
			x := sqls(b)
			compare(b, func(n int) error {
				tx, err := x.db.BeginTx(ctx, nil)
				if err != nil {
					return err
				}
				defer tx.Rollback()
				if _, err := tx.ExecContext(ctx, update(x), strconv.Itoa(n), hash("r")); err != nil {
					return err
				}
				return tx.Commit()
			}, func(n int) error {
				tx, err := x.db.BeginTx(ctx, nil)
				if err != nil {
					return err
				}
				defer tx.Rollback()
				if err := x.guard.Admit(ctx, tx, "r", p); err != nil {
					return err
				}
				if _, err := tx.ExecContext(ctx, update(x), strconv.Itoa(n), hash("r")); err != nil {
					return err
				}
				return tx.Commit()
			})
		})
	}
	b.Run("Redis", func(b *testing.B) {
		c := redis.NewClient(&redis.Options{Addr: durableRedis.get(b).DSN})
		defer c.Close()
		v := newValues(c)
		compare(b, func(n int) error { return c.Set(ctx, v.key("r"), strconv.Itoa(n), 0).Err() },
			func(n int) error { return v.Write(ctx, "r", p, strconv.Itoa(n)) })
	})
	for _, rises := range []bool{false, true} {
		name := "file/same grant"
		if rises {
			name = "file/first write of a grant"
		}
		b.Run(name, func(b *testing.B) {
			dir := b.TempDir()
			g, err := filefence.New(dir)
			if err != nil {
				b.Fatal(err)
			}
			token := p
			compare(b, func(n int) error { return replace(dir, strconv.Itoa(n)) }, func(n int) error {
				if rises {
					token.Token++
					token.Floor++
				}
				return g.Write(ctx, "r", token, filefence.Bytes([]byte(strconv.Itoa(n)), 0o600))
			})
		})
	}
	for _, kind := range []string{"HTTP", "gRPC"} {
		b.Run(kind, func(b *testing.B) {
			open := func(guarded bool) target {
				s := newTarget(b, kind, guarded)
				to, err := connect(s)
				if err != nil {
					b.Fatal(err)
				}
				b.Cleanup(func() { to.close() })
				return to
			}
			bare, guarded := open(false), open(true)
			compare(b, func(n int) error { return bare.write(ctx, fence.Pass{Token: 7, Floor: 7}, strconv.Itoa(n)) },
				func(n int) error { return guarded.write(ctx, fence.Pass{Token: 7, Floor: 7}, strconv.Itoa(n)) })
		})
	}
}

// replace is what a careful program does without a guard: write under another
// name, sync, rename, sync the directory.
func replace(dir, text string) error {
	f, err := os.Create(filepath.Join(dir, "bare.new"))
	if err != nil {
		return err
	}
	defer f.Close()
	if _, err := f.WriteString(text); err != nil {
		return err
	}
	if err := f.Sync(); err != nil {
		return err
	}
	if err := os.Rename(f.Name(), filepath.Join(dir, "bare")); err != nil {
		return err
	}
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	defer d.Close()
	return d.Sync()
}

// compare runs both by turns, and which goes first changes too.
func compare(b *testing.B, bare, guarded func(n int) error) {
	b.Helper()
	writes := [2]func(int) error{bare, guarded}
	var took [2][]time.Duration
	n := 0
	for turn := 0; b.Loop(); turn++ {
		for i := range 2 {
			i = (i + turn) % 2
			n++
			began := time.Now()
			if err := writes[i](n); err != nil {
				b.Fatal(err)
			}
			took[i] = append(took[i], time.Since(began))
		}
	}
	var median [2]float64
	for i := range took {
		slices.Sort(took[i])
		median[i] = float64(took[i][len(took[i])/2]) / float64(time.Microsecond)
	}
	b.ReportMetric(0, "ns/op") // of both together: says nothing
	b.ReportMetric(math.Round(median[0]), "µs-bare")
	b.ReportMetric(math.Round(median[1]), "µs-guarded")
	b.ReportMetric(median[1]/median[0], "ratio")
}
