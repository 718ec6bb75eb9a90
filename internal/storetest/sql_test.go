package storetest

import (
	"database/sql"
	"errors"
	"fmt"
	"testing"

	"github.com/distlock/distlock/fence"
	"github.com/distlock/distlock/fence/sqlfence"
)

func pass(token fence.Token) fence.Pass { return fence.Pass{Token: token, Floor: token} }

func isStale(err error, token, stored fence.Token) bool {
	var stale *fence.StaleError
	return errors.As(err, &stale) && stale.Token == token && stale.Stored == stored
}

// TestOldSnapshotAdmitsNobody: a transaction that began to read before it was
// overtaken is turned away, at every isolation level. At the default one, where
// the database can tell, by the guard's own error.
func TestOldSnapshotAdmitsNobody(t *testing.T) {
	for _, on := range databases {
		for _, level := range []sql.IsolationLevel{sql.LevelDefault, sql.LevelReadCommitted, sql.LevelRepeatableRead, sql.LevelSerializable} {
			if on.dialect == sqlfence.SQLite && level != sql.LevelDefault {
				continue // it has no other
			}
			for _, way := range []string{"row", "column"} {
				t.Run(fmt.Sprintf("%s/%v/%s", on.name, level, way), func(t *testing.T) {
					ctx := t.Context()
					x := newTexts(t, on, on.open(t))
					write := func(q *sql.Tx, p fence.Pass, s string) error {
						if way == "column" {
							return columns{x}.update(ctx, q, "r", p, s)
						}
						if err := x.guard.Admit(ctx, q, "r", p); err != nil {
							return err
						}
						return x.set(ctx, q, "r", s)
					}
					// Both ways begin with a row that both can see.
					if err := (columns{x}).make(ctx, "r"); err != nil {
						t.Fatal(err)
					}
					if err := x.guard.Raise(ctx, "r", pass(6)); err != nil {
						t.Fatal(err)
					}
					alice, err := x.db.BeginTx(ctx, &sql.TxOptions{Isolation: level})
					if err != nil {
						t.Fatal(err)
					}
					defer alice.Rollback()
					first := "SELECT COUNT(*) FROM " + x.table
					if on.dialect == sqlfence.MySQL && level == sql.LevelSerializable {
						first = "SELECT 1" // a read would lock, and Bob wait
					}
					var n int
					if err := alice.QueryRowContext(ctx, first).Scan(&n); err != nil || n != 1 {
						t.Fatal(n, err)
					}
					bob, err := x.db.BeginTx(ctx, nil)
					if err != nil {
						t.Fatal(err)
					}
					defer bob.Rollback()
					if err := write(bob, pass(8), "bob's"); err != nil {
						t.Fatal(err)
					}
					if err := bob.Commit(); err != nil {
						t.Fatal(err)
					}
					err = write(alice, pass(7), "alice's")
					if err == nil {
						err = alice.Commit()
					}
					if err == nil {
						t.Error("alice's write was accepted")
					}
					if level == sql.LevelDefault && on.dialect != sqlfence.SQLite && !isStale(err, 7, 8) {
						t.Errorf("alice: %v, want a StaleError", err)
					}
					if text, err := x.Read(ctx, "r"); err != nil || text != "bob's" {
						t.Errorf("the text is %q, %v", text, err)
					}
				})
			}
		}
	}
}

// TestOwnTransaction: what a transaction of the caller's own does around Admit
// is one step with it, in all tables.
func TestOwnTransaction(t *testing.T) {
	for _, on := range databases {
		t.Run(on.name, func(t *testing.T) {
			ctx := t.Context()
			db := on.open(t)
			a, b := newTexts(t, on, db), newTexts(t, on, db)
			do := func(p fence.Pass, s string, commit bool) error {
				tx, err := db.BeginTx(ctx, nil)
				if err != nil {
					return err
				}
				defer tx.Rollback()
				if err := a.guard.Admit(ctx, tx, "r", p); err != nil {
					return err
				}
				if err := errors.Join(a.set(ctx, tx, "r", s), b.set(ctx, tx, "r", s)); err != nil || !commit {
					return err
				}
				// Twice is once.
				if err := a.guard.Admit(ctx, tx, "r", p); err != nil {
					return err
				}
				return tx.Commit()
			}
			reads := func(want string) {
				t.Helper()
				for _, x := range []*texts{a, b} {
					if s, err := x.Read(ctx, "r"); err != nil || s != want {
						t.Errorf("read %q, %v, want %q", s, err, want)
					}
				}
			}
			if err := do(pass(9), "undone", false); err != nil {
				t.Fatal(err)
			}
			reads("")
			if err := do(pass(7), "seven", true); err != nil {
				t.Fatal(err)
			}
			reads("seven")
			if err := do(pass(6), "six", true); !isStale(err, 6, 7) {
				t.Error(err)
			}
			reads("seven")
		})
	}
}

// TestWriteThatPanics leaves neither text nor floor, nor a connection in use.
func TestWriteThatPanics(t *testing.T) {
	for _, on := range databases {
		t.Run(on.name, func(t *testing.T) {
			x := newTexts(t, on, on.open(t))
			func() {
				defer func() { recover() }()
				x.guard.Write(t.Context(), "r", pass(9), func(tx *sql.Tx) error {
					if err := x.set(t.Context(), tx, "r", "half"); err != nil {
						t.Error(err)
					}
					panic("bug")
				})
			}()
			if s, err := x.Read(t.Context(), "r"); err != nil || s != "" {
				t.Errorf("read %q, %v", s, err)
			}
			if err := (rows{x}).Write(t.Context(), "r", pass(1), "one"); err != nil {
				t.Error(err)
			}
			if n := x.db.Stats().InUse; n != 0 {
				t.Errorf("%d connections are in use", n)
			}
		})
	}
}

// TestColumnTellsStaleFromMissing, and a row that stays as it is from both.
func TestColumnTellsStaleFromMissing(t *testing.T) {
	for _, on := range databases {
		t.Run(on.name, func(t *testing.T) {
			ctx := t.Context()
			x := columns{newTexts(t, on, on.open(t))}
			if err := x.update(ctx, x.db, "r", pass(7), "a"); !errors.Is(err, sql.ErrNoRows) {
				t.Errorf("no row: %v", err)
			}
			if err := x.column.Raise(ctx, x.db, "r", pass(7), hash("r")); !errors.Is(err, sql.ErrNoRows) {
				t.Errorf("no row: %v", err)
			}
			if err := x.make(ctx, "r"); err != nil {
				t.Fatal(err)
			}
			for what, err := range map[string]error{
				"a write":            x.update(ctx, x.db, "r", pass(7), "a"),
				"the same again":     x.update(ctx, x.db, "r", pass(7), "a"),
				"a raise":            x.column.Raise(ctx, x.db, "r", pass(7), hash("r")),
				"a lower floor":      x.update(ctx, x.db, "r", fence.Pass{Token: 9, Floor: 3}, "a"),
				"twice, one by one":  errors.Join(x.update(ctx, x.db, "r", pass(7), "b"), x.update(ctx, x.db, "r", pass(7), "b")),
				"without its effect": x.update(ctx, x.db, "r", pass(7), "b"),
			} {
				if err != nil {
					t.Errorf("%s: %v", what, err)
				}
			}
			if err := x.update(ctx, x.db, "r", pass(6), "late"); !isStale(err, 6, 7) {
				t.Errorf("stale: %v", err)
			}
			if err := x.column.Raise(ctx, x.db, "r", pass(6), hash("r")); !isStale(err, 6, 7) {
				t.Errorf("stale: %v", err)
			}
			if s, err := x.Read(ctx, "r"); err != nil || s != "b" {
				t.Errorf("read %q, %v", s, err)
			}
			var floor int64
			if err := x.db.QueryRowContext(ctx, "SELECT fence FROM "+x.table).Scan(&floor); err != nil || floor != 7 {
				t.Errorf("the floor is %d, %v", floor, err)
			}
		})
	}
}

// TestPlainSelectGuardsNothing is a classic mistake: the check is a plain
// SELECT, in the transaction of the write, and is right at no database's
// default level but SQLite's.
func TestPlainSelectGuardsNothing(t *testing.T) {
	for _, on := range databases {
		if on.dialect == sqlfence.SQLite {
			continue // refuses the second writer
		}
		t.Run(on.name, func(t *testing.T) {
			ctx := t.Context()
			x := newTexts(t, on, on.open(t))
			if err := (columns{x}).make(ctx, "r"); err != nil {
				t.Fatal(err)
			}
			check := func(tx *sql.Tx, p fence.Pass) {
				t.Helper()
				var stored int64
				if err := tx.QueryRowContext(ctx, "SELECT fence FROM "+x.table).Scan(&stored); err != nil || fence.Token(stored) > p.Token {
					t.Fatal(stored, err)
				}
			}
			write := func(tx *sql.Tx, p fence.Pass, s string) {
				t.Helper()
				if _, err := tx.ExecContext(ctx, fmt.Sprintf("UPDATE %s SET fence = %d, text = '%x'", x.table, p.Token, s)); err != nil {
					t.Fatal(err)
				}
				if err := tx.Commit(); err != nil {
					t.Fatal(err)
				}
			}
			alice, err := x.db.BeginTx(ctx, nil)
			if err != nil {
				t.Fatal(err)
			}
			defer alice.Rollback()
			check(alice, pass(7))
			bob, err := x.db.BeginTx(ctx, nil)
			if err != nil {
				t.Fatal(err)
			}
			defer bob.Rollback()
			check(bob, pass(8))
			write(bob, pass(8), "bob's")
			write(alice, pass(7), "alice's")
			if text, err := x.Read(ctx, "r"); err != nil || text != "alice's" {
				t.Errorf("the text is %q, %v: the mistake has no effect here", text, err)
			}
		})
	}
}
