// Package sqlfence guards what stands in an SQL database, through database/sql
// and with no driver of its own: PostgreSQL, MySQL and MariaDB, SQLite.
//
// There are two ways. Guard keeps a row per resource in a table of its own and
// raises it inside the transaction that writes: it guards whatever that
// transaction touches. Column keeps the floor in a column of the guarded row
// itself: one UPDATE compares, raises and writes.
//
// # Why it is right at the default isolation level
//
// The check has to see the newest floor, and nobody may change it until the
// write is committed. Both ways get this from the lock on one row, at any
// isolation level:
//
//   - PostgreSQL (READ COMMITTED): INSERT … ON CONFLICT DO UPDATE, and UPDATE,
//     lock the row's newest committed version, after waiting for whoever has it
//     locked, and compare with that version and not with the snapshot's. The
//     lock lasts until the transaction ends. At REPEATABLE READ and SERIALIZABLE
//     a row that has changed since the snapshot fails the transaction with
//     SQLSTATE 40001 in its place: repeat it.
//   - MySQL and MariaDB, InnoDB (REPEATABLE READ): INSERT … ON DUPLICATE KEY
//     UPDATE, UPDATE and SELECT … FOR UPDATE are locking reads. They see the
//     newest committed version whatever the snapshot shows, and lock it until the
//     transaction ends. Plain reads of the same transaction are of the snapshot,
//     which begins with the first of them: so call Admit before you read.
//     Tables have to be InnoDB's. Other engines keep no such lock.
//   - SQLite (SERIALIZABLE, always): one transaction writes at a time, and a
//     first statement that writes waits for its turn before it reads. Give the
//     connection a busy timeout; without one it fails in place of waiting. A
//     transaction that has read before others wrote fails with SQLITE_BUSY when
//     it comes to write: call Admit before you read.
//
// # What it costs others
//
// Writers to one resource take turns, also the holders of a shared lock: each
// waits until the one before it has committed. A process that is paused inside
// its transaction keeps the row locked, and the next holder waits for it: bound
// that with the context here, and with idle_in_transaction_session_timeout
// (PostgreSQL) or innodb_lock_wait_timeout at the database. When it is thrown
// out its transaction is rolled back, and so its write cannot come late.
package sqlfence

import (
	"context"
	"crypto/sha256"
	"database/sql"
	"errors"
	"fmt"
	"regexp"

	"github.com/distlock/distlock/fence"
)

// Dialect is a database's own SQL.
type Dialect int

// The dialects. MySQL is MariaDB's too.
const (
	PostgreSQL Dialect = iota + 1
	MySQL
	SQLite
)

func (d Dialect) valid() error {
	if d < PostgreSQL || d > SQLite {
		return fmt.Errorf("sqlfence: unknown dialect %d", int(d))
	}
	return nil
}

// Querier is a *sql.Tx, *sql.DB or *sql.Conn.
type Querier interface {
	ExecContext(ctx context.Context, query string, args ...any) (sql.Result, error)
	QueryRowContext(ctx context.Context, query string, args ...any) *sql.Row
}

// identifier is what a name in SQL may be here: it needs no quotes.
var identifier = regexp.MustCompile(`^[A-Za-z_][A-Za-z0-9_]*(\.[A-Za-z_][A-Za-z0-9_]*)?$`)

// DefaultTable is the table that a Guard keeps its rows in.
const DefaultTable = "distlock_fence"

// Guard keeps one row per resource, and raises it inside the transaction that
// writes. All methods are safe for concurrent use.
type Guard struct {
	db      *sql.DB
	dialect Dialect
	table   string
}

var _ fence.Guard[func(*sql.Tx) error] = (*Guard)(nil)

// New guards by rows of the table with that name, DefaultTable for "". db is
// used by Write, Raise and CreateTable only, and may be nil where they are not.
// The table has to be in the database that the guarded writes go to.
func New(db *sql.DB, dialect Dialect, table string) (*Guard, error) {
	if table == "" {
		table = DefaultTable
	}
	if !identifier.MatchString(table) {
		return nil, fmt.Errorf("sqlfence: %q is not the name of a table", table)
	}
	return &Guard{db: db, dialect: dialect, table: table}, dialect.valid()
}

// Schema is the statement that makes the table, for your migrations. Rows are
// found by the SHA-256 of the resource's name: no database's rules on text,
// case or length apply to names. Rows must never be deleted while a write may
// still be late.
func (g *Guard) Schema() string {
	switch g.dialect {
	case PostgreSQL:
		return "CREATE TABLE IF NOT EXISTS " + g.table + " (id BYTEA PRIMARY KEY, resource BYTEA NOT NULL, floor BIGINT NOT NULL)"
	case MySQL:
		return "CREATE TABLE IF NOT EXISTS " + g.table + " (id BINARY(32) PRIMARY KEY, resource MEDIUMBLOB NOT NULL, floor BIGINT NOT NULL) ENGINE=InnoDB"
	default:
		return "CREATE TABLE IF NOT EXISTS " + g.table + " (id BLOB PRIMARY KEY, resource BLOB NOT NULL, floor INTEGER NOT NULL) WITHOUT ROWID"
	}
}

// CreateTable makes the table unless it is there.
func (g *Guard) CreateTable(ctx context.Context) error {
	_, err := g.db.ExecContext(ctx, g.Schema())
	return err
}

// Admit checks pass and raises the resource's row inside a transaction of the
// caller's own. From then on, until tx ends, no other pass is admitted: what tx
// writes, before or after, is one step with the check. Call it before tx reads.
//
// The floor is stored when tx commits. After any error, roll tx back:
// *fence.StaleError and fence.ErrInvalidPass are those of fence.Guard, others
// the driver's.
func (g *Guard) Admit(ctx context.Context, tx *sql.Tx, resource string, pass fence.Pass) error {
	if _, err := fence.Next(resource, 0, pass); err != nil {
		return err
	}
	// One statement makes the row or raises it. The higher of the stored floor
	// and the pass's is right whether or not pass may write: a floor is never
	// above its token, so that over a higher stored floor it changes nothing.
	// And pass may write if what is stored then is not above its token.
	id := sha256.Sum256([]byte(resource))
	token, floor := int64(pass.Token), int64(pass.Floor)
	var stored int64
	var err error
	switch g.dialect {
	case PostgreSQL:
		err = tx.QueryRowContext(ctx, "INSERT INTO "+g.table+" AS f (id, resource, floor) VALUES ($1, $2, $3) "+
			"ON CONFLICT (id) DO UPDATE SET floor = GREATEST(f.floor, EXCLUDED.floor) RETURNING floor", id[:], []byte(resource), floor).Scan(&stored)
	case MySQL:
		_, err = tx.ExecContext(ctx, "INSERT INTO "+g.table+" (id, resource, floor) VALUES (?, ?, ?) "+
			"ON DUPLICATE KEY UPDATE floor = GREATEST(floor, ?)", id[:], []byte(resource), floor, floor)
		if err == nil {
			err = tx.QueryRowContext(ctx, "SELECT floor FROM "+g.table+" WHERE id = ? FOR UPDATE", id[:]).Scan(&stored)
		}
	default:
		err = tx.QueryRowContext(ctx, "INSERT INTO "+g.table+" (id, resource, floor) VALUES (?, ?, ?) "+
			"ON CONFLICT (id) DO UPDATE SET floor = MAX(floor, excluded.floor) RETURNING floor", id[:], []byte(resource), floor).Scan(&stored)
	}
	if err != nil {
		return fmt.Errorf("sqlfence: %w", err)
	}
	if stored > token {
		return &fence.StaleError{Resource: resource, Token: pass.Token, Stored: fence.Token(stored)}
	}
	return nil
}

// Write runs write in a transaction of its own, at the database's default
// isolation level, after Admit. An error of write, which is returned as it is,
// or a panic rolls it back. write must neither commit nor roll back. An error
// of the commit itself leaves open whether the write has happened, as with any
// database.
func (g *Guard) Write(ctx context.Context, resource string, pass fence.Pass, write func(tx *sql.Tx) error) error {
	tx, err := g.db.BeginTx(ctx, nil)
	if err != nil {
		return err
	}
	defer tx.Rollback() // without effect after Commit
	if err := g.Admit(ctx, tx, resource, pass); err != nil {
		return err
	}
	if err := write(tx); err != nil {
		return err
	}
	return tx.Commit()
}

// Raise stores the higher floor without writing, as fence.Guard describes it.
func (g *Guard) Raise(ctx context.Context, resource string, pass fence.Pass) error {
	return g.Write(ctx, resource, pass, func(*sql.Tx) error { return nil })
}

// Column guards the rows of a table by a column of theirs, which keeps the
// floor: BIGINT NOT NULL DEFAULT 0. A row is inserted with 0 there, by anybody
// at any time, and changed through here only. It is cheaper than a Guard, one
// statement and no transaction, and guards one row. It is safe for concurrent
// use.
type Column struct {
	Dialect Dialect
	Table   string
	Key     string // the column that names a row; unique
	Floor   string // the column with the floor; "" for "fence"
}

// Update changes the row whose key column is key: set is what follows SET, with
// the dialect's own placeholders for args (from $1 on for PostgreSQL), and must
// not touch the floor.
//
//	err := accounts.Update(ctx, db, "account/42", pass, 42, "balance = balance + $1", 50)
//
// It is one statement, and may be part of a transaction. No such row is
// sql.ErrNoRows; *fence.StaleError and fence.ErrInvalidPass are those of
// fence.Guard; resource is for the error only.
//
// With MySQL it sets the connection's LAST_INSERT_ID.
func (c Column) Update(ctx context.Context, q Querier, resource string, pass fence.Pass, key any, set string, args ...any) error {
	if c.Floor == "" {
		c.Floor = "fence"
	}
	for _, name := range []string{c.Table, c.Key, c.Floor} {
		if !identifier.MatchString(name) {
			return fmt.Errorf("sqlfence: %q is not the name of a table or column", name)
		}
	}
	if err := c.Dialect.valid(); err != nil {
		return err
	}
	if _, err := fence.Next(resource, 0, pass); err != nil {
		return err
	}
	// A row that is inserted between the statements makes them disagree: ask
	// again, and not for ever, since with a wrong driver they always would.
	for range 10 {
		done, err := c.update(ctx, q, pass, key, set, args)
		if err != nil {
			return fmt.Errorf("sqlfence: %w", err)
		}
		if done {
			return nil
		}
		// Stale, or no such row?
		var stored int64
		err = q.QueryRowContext(ctx, c.read(), key).Scan(&stored)
		if errors.Is(err, sql.ErrNoRows) {
			return fmt.Errorf("sqlfence: no row of %s has %s %v: %w", c.Table, c.Key, key, err)
		}
		if err != nil {
			return fmt.Errorf("sqlfence: %w", err)
		}
		if fence.Token(stored) > pass.Token {
			return &fence.StaleError{Resource: resource, Token: pass.Token, Stored: fence.Token(stored)}
		}
	}
	return fmt.Errorf("sqlfence: the update of %s changes no row, and yet there is one that it may change", c.Table)
}

// Raise stores the higher floor without writing, as fence.Guard describes it,
// with the errors of Update.
func (c Column) Raise(ctx context.Context, q Querier, resource string, pass fence.Pass, key any) error {
	return c.Update(ctx, q, resource, pass, key, "")
}

// update reports whether there was a row that pass may change.
func (c Column) update(ctx context.Context, q Querier, pass fence.Pass, key any, set string, args []any) (bool, error) {
	token, floor := int64(pass.Token), int64(pass.Floor)
	if set != "" {
		set = ", " + set
	}
	switch c.Dialect {
	case PostgreSQL:
		n := len(args)
		r, err := q.ExecContext(ctx, fmt.Sprintf("UPDATE %s SET %s = GREATEST(%s, $%d)%s WHERE %s = $%d AND %s <= $%d",
			c.Table, c.Floor, c.Floor, n+1, set, c.Key, n+2, c.Floor, n+3), append(args[:n:n], floor, key, token)...)
		return affected(r, err)
	case MySQL:
		// The number of rows is that of rows with other values than before,
		// and so may be 0 for a row that is there. The id is the floor of the
		// row that was found, and 0 for none.
		r, err := q.ExecContext(ctx, fmt.Sprintf("UPDATE %s SET %s = LAST_INSERT_ID(GREATEST(%s, ?))%s WHERE %s = ? AND %s <= ?",
			c.Table, c.Floor, c.Floor, set, c.Key, c.Floor), append(append([]any{floor}, args...), key, token)...)
		if err != nil {
			return false, err
		}
		id, err := r.LastInsertId()
		return id > 0, err
	default:
		r, err := q.ExecContext(ctx, fmt.Sprintf("UPDATE %s SET %s = MAX(%s, ?)%s WHERE %s = ? AND %s <= ?",
			c.Table, c.Floor, c.Floor, set, c.Key, c.Floor), append(append([]any{floor}, args...), key, token)...)
		return affected(r, err)
	}
}

func affected(r sql.Result, err error) (bool, error) {
	if err != nil {
		return false, err
	}
	n, err := r.RowsAffected()
	return n > 0, err
}

// read is the query for a row's floor, as new as what update has compared
// with.
func (c Column) read() string {
	switch q := fmt.Sprintf("SELECT %s FROM %s WHERE %s = ", c.Floor, c.Table, c.Key); c.Dialect {
	case PostgreSQL:
		return q + "$1"
	case MySQL:
		return q + "? FOR UPDATE"
	default:
		return q + "?"
	}
}
