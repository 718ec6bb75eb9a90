// Package storetest holds the guards of package fence against real servers:
// PostgreSQL, MariaDB, Redis and SQLite. It is a module of its own, since it
// needs their drivers, which the core does not.
//
//	make stores
package storetest

import (
	"context"
	"crypto/sha256"
	"database/sql"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"sync"
	"sync/atomic"
	"testing"

	"github.com/go-sql-driver/mysql"
	"github.com/redis/go-redis/v9"
	_ "modernc.org/sqlite" // driver "sqlite"

	"github.com/distlock/distlock/fence"
	"github.com/distlock/distlock/fence/fencetest"
	"github.com/distlock/distlock/fence/redisfence"
	"github.com/distlock/distlock/fence/sqlfence"
	"github.com/distlock/distlock/internal/storetest/servers"
)

// lazy is a server that the first test to need it starts, and TestMain stops.
type lazy struct {
	start func() (*servers.Server, error)
	once  sync.Once
	srv   *servers.Server
	err   error
}

func (l *lazy) get(t testing.TB) *servers.Server {
	t.Helper()
	l.once.Do(func() { l.srv, l.err = l.start() })
	if l.err != nil {
		t.Fatal(l.err)
	}
	return l.srv
}

func (l *lazy) stop() error {
	l.once.Do(func() {})
	if l.srv == nil {
		return nil
	}
	return l.srv.Stop()
}

var (
	postgresServer = &lazy{start: func() (*servers.Server, error) { return servers.Postgres(false) }}
	mariadbServer  = &lazy{start: func() (*servers.Server, error) { return servers.MariaDB(false) }}
	redisServer    = &lazy{start: func() (*servers.Server, error) { return servers.Redis(false) }}
	clusterServer  = &lazy{start: func() (*servers.Server, error) { return servers.Redis(false, "--cluster-enabled", "yes") }}

	// For the benchmarks: each commit is on the disk before its answer.
	durablePostgres = &lazy{start: func() (*servers.Server, error) { return servers.Postgres(true) }}
	durableMariaDB  = &lazy{start: func() (*servers.Server, error) { return servers.MariaDB(true) }}
	durableRedis    = &lazy{start: func() (*servers.Server, error) { return servers.Redis(true) }}
)

func TestMain(m *testing.M) {
	if role := os.Getenv(roleEnv); role != "" {
		if err := play(role); err != nil {
			fmt.Println("error:", err)
			os.Exit(1)
		}
		os.Exit(0)
	}
	mysql.SetLogger(&mysql.NopLogger{}) // of servers that are meant to crash
	os.Exit(run(m))
}

func run(m *testing.M) int {
	code := m.Run()
	for _, l := range []*lazy{postgresServer, mariadbServer, redisServer, clusterServer, durablePostgres, durableMariaDB, durableRedis} {
		if err := l.stop(); err != nil {
			fmt.Fprintln(os.Stderr, err)
			code = 1
		}
	}
	return code
}

// database is one of the SQL databases.
type database struct {
	name    string
	driver  string
	dialect sqlfence.Dialect
	dsn     func(t testing.TB) string
	// Its words for a table of texts by id, with a column fence, and for
	// setting a text.
	table, upsert string
	// What names a connection, and what ends it.
	connection, kill string
}

var databases = []*database{
	{
		name: "PostgreSQL", driver: "pgx", dialect: sqlfence.PostgreSQL,
		dsn:        func(t testing.TB) string { return postgresServer.get(t).DSN },
		table:      "CREATE TABLE %s (id BYTEA PRIMARY KEY, text TEXT, fence BIGINT NOT NULL DEFAULT 0)",
		upsert:     "INSERT INTO %s (id, text) VALUES ($1, $2) ON CONFLICT (id) DO UPDATE SET text = EXCLUDED.text",
		connection: "SELECT pg_backend_pid()", kill: "SELECT pg_terminate_backend(%d)",
	},
	{
		name: "MariaDB", driver: "mysql", dialect: sqlfence.MySQL,
		dsn:        func(t testing.TB) string { return mariadbServer.get(t).DSN },
		table:      "CREATE TABLE %s (id BINARY(32) PRIMARY KEY, text LONGTEXT CHARACTER SET utf8mb4, fence BIGINT NOT NULL DEFAULT 0) ENGINE=InnoDB",
		upsert:     "INSERT INTO %s (id, text) VALUES (?, ?) ON DUPLICATE KEY UPDATE text = VALUES(text)",
		connection: "SELECT CONNECTION_ID()", kill: "KILL CONNECTION %d",
	},
	{
		name: "SQLite", driver: "sqlite", dialect: sqlfence.SQLite,
		dsn: func(t testing.TB) string {
			return "file:" + filepath.Join(t.TempDir(), "db") + "?_pragma=busy_timeout(60000)&_pragma=journal_mode(WAL)&_pragma=synchronous(OFF)"
		},
		table:  "CREATE TABLE %s (id BLOB PRIMARY KEY, text TEXT, fence INTEGER NOT NULL DEFAULT 0)",
		upsert: "INSERT INTO %s (id, text) VALUES (?, ?) ON CONFLICT (id) DO UPDATE SET text = excluded.text",
	},
}

func (d *database) open(t testing.TB) *sql.DB {
	t.Helper()
	return openDSN(t, d.driver, d.dsn(t))
}

func openDSN(t testing.TB, driver, dsn string) *sql.DB {
	t.Helper()
	db, err := sql.Open(driver, dsn)
	if err != nil {
		t.Fatal(err)
	}
	db.SetMaxOpenConns(16)
	db.SetMaxIdleConns(16)
	t.Cleanup(func() { db.Close() })
	return db
}

// place is the placeholder of a statement's n-th argument.
func (d *database) place(n int) string {
	if d.dialect == sqlfence.PostgreSQL {
		return fmt.Sprintf("$%d", n)
	}
	return "?"
}

var tables atomic.Int64

// texts is a table of texts, and the guards of its rows.
type texts struct {
	db     *sql.DB
	on     *database
	table  string
	guard  *sqlfence.Guard
	column sqlfence.Column
}

func newTexts(t testing.TB, on *database, db *sql.DB) *texts {
	t.Helper()
	n := tables.Add(1)
	x := &texts{db: db, on: on, table: fmt.Sprintf("texts_%d", n)}
	x.column = sqlfence.Column{Dialect: on.dialect, Table: x.table, Key: "id"}
	var err error
	if x.guard, err = sqlfence.New(db, on.dialect, fmt.Sprintf("fence_%d", n)); err != nil {
		t.Fatal(err)
	}
	if err := x.guard.CreateTable(t.Context()); err != nil {
		t.Fatal(err)
	}
	if err := x.guard.CreateTable(t.Context()); err != nil {
		t.Fatal("again: ", err)
	}
	if _, err := db.ExecContext(t.Context(), fmt.Sprintf(on.table, x.table)); err != nil {
		t.Fatal(err)
	}
	return x
}

// hash is the key of a resource's row: any name is a resource.
func hash(resource string) []byte {
	h := sha256.Sum256([]byte(resource))
	return h[:]
}

// set writes a text without a guard.
func (x *texts) set(ctx context.Context, q sqlfence.Querier, resource, s string) error {
	_, err := q.ExecContext(ctx, fmt.Sprintf(x.on.upsert, x.table), hash(resource), fmt.Sprintf("%x", s))
	return err
}

func (x *texts) Read(ctx context.Context, resource string) (string, error) {
	var hex sql.NullString
	err := x.db.QueryRowContext(ctx, fmt.Sprintf("SELECT text FROM %s WHERE id = %s", x.table, x.on.place(1)), hash(resource)).Scan(&hex)
	if errors.Is(err, sql.ErrNoRows) {
		return "", nil
	}
	if err != nil {
		return "", err
	}
	var s []byte
	if hex.String != "" {
		_, err = fmt.Sscanf(hex.String, "%x", &s)
	}
	return string(s), err
}

// rows is a subject that guards by rows of the guard's own.
type rows struct{ *texts }

func (r rows) Write(ctx context.Context, resource string, pass fence.Pass, s string) error {
	return r.guard.Write(ctx, resource, pass, func(tx *sql.Tx) error { return r.set(ctx, tx, resource, s) })
}

func (r rows) Raise(ctx context.Context, resource string, pass fence.Pass) error {
	return r.guard.Raise(ctx, resource, pass)
}

// Interrupt has the database end the connection after the write, before the
// commit.
func (r rows) Interrupt(ctx context.Context, resource string, pass fence.Pass, s string) error {
	return r.guard.Write(ctx, resource, pass, func(tx *sql.Tx) error {
		if err := r.set(ctx, tx, resource, s); err != nil {
			return err
		}
		return r.cut(ctx, tx)
	})
}

// cut ends the transaction's connection from another one. SQLite has none: its
// transaction is rolled back.
func (x *texts) cut(ctx context.Context, tx *sql.Tx) error {
	if x.on.connection == "" {
		return errors.New("cut")
	}
	var id int64
	if err := tx.QueryRowContext(ctx, x.on.connection).Scan(&id); err != nil {
		return err
	}
	_, err := x.db.ExecContext(ctx, fmt.Sprintf(x.on.kill, id))
	return err
}

// columns is a subject that guards by a column of the row itself.
type columns struct{ *texts }

// make inserts the row, with a floor of 0 and no text, as anybody may.
func (c columns) make(ctx context.Context, resource string) error {
	insert := fmt.Sprintf("INSERT INTO %s (id) SELECT %s WHERE NOT EXISTS (SELECT 1 FROM %s WHERE id = %s)", c.table, c.on.place(1), c.table, c.on.place(2))
	switch c.on.dialect {
	case sqlfence.PostgreSQL:
		insert = fmt.Sprintf("INSERT INTO %s (id) VALUES ($1) ON CONFLICT DO NOTHING", c.table)
	case sqlfence.MySQL:
		insert = fmt.Sprintf("INSERT IGNORE INTO %s (id) VALUES (?)", c.table)
	case sqlfence.SQLite:
		insert = fmt.Sprintf("INSERT INTO %s (id) VALUES (?) ON CONFLICT DO NOTHING", c.table)
	}
	_, err := c.db.ExecContext(ctx, insert, hash(resource))
	return err
}

func (c columns) update(ctx context.Context, q sqlfence.Querier, resource string, pass fence.Pass, s string) error {
	return c.column.Update(ctx, q, resource, pass, hash(resource), "text = "+c.on.place(1), fmt.Sprintf("%x", s))
}

func (c columns) Write(ctx context.Context, resource string, pass fence.Pass, s string) error {
	err := c.update(ctx, c.db, resource, pass, s)
	if errors.Is(err, sql.ErrNoRows) {
		if err := c.make(ctx, resource); err != nil {
			return err
		}
		err = c.update(ctx, c.db, resource, pass, s)
	}
	return err
}

func (c columns) Raise(ctx context.Context, resource string, pass fence.Pass) error {
	err := c.column.Raise(ctx, c.db, resource, pass, hash(resource))
	if errors.Is(err, sql.ErrNoRows) {
		if err := c.make(ctx, resource); err != nil {
			return err
		}
		err = c.column.Raise(ctx, c.db, resource, pass, hash(resource))
	}
	return err
}

func (c columns) Interrupt(ctx context.Context, resource string, pass fence.Pass, s string) error {
	tx, err := c.db.BeginTx(ctx, nil)
	if err != nil {
		return err
	}
	defer tx.Rollback()
	if err := c.update(ctx, tx, resource, pass, s); err != nil {
		return err
	}
	if err := c.cut(ctx, tx); err != nil {
		return err
	}
	return tx.Commit()
}

var (
	_ fencetest.Interrupter = rows{}
	_ fencetest.Interrupter = columns{}
)

// values is a subject in Redis, where the script is one step.
type values struct {
	guard *redisfence.Guard
	redis redis.UniversalClient
}

func newValues(c redis.UniversalClient) values {
	return values{guard: redisfence.New(redisfence.EvalFunc(func(ctx context.Context, script string, keys []string, args ...any) (any, error) {
		return c.Eval(ctx, script, keys, args...).Result()
	})), redis: c}
}

func (v values) key(resource string) string { return v.guard.Key(resource, "text") }

func (v values) Write(ctx context.Context, resource string, pass fence.Pass, s string) error {
	return v.guard.Write(ctx, resource, pass, []redisfence.Command{redisfence.Do("SET", v.key(resource), s)})
}

func (v values) Raise(ctx context.Context, resource string, pass fence.Pass) error {
	return v.guard.Raise(ctx, resource, pass)
}

func (v values) Read(ctx context.Context, resource string) (string, error) {
	s, err := v.redis.Get(ctx, v.key(resource)).Result()
	if errors.Is(err, redis.Nil) {
		err = nil
	}
	return s, err
}

// Interrupt fails in the script, at a command that its key does not allow.
func (v values) Interrupt(ctx context.Context, resource string, pass fence.Pass, s string) error {
	return v.guard.Write(ctx, resource, pass, []redisfence.Command{redisfence.Do("LPUSH", v.key(resource), s)})
}

func openRedis(t testing.TB, on *lazy) redis.UniversalClient {
	t.Helper()
	c := redis.NewClient(&redis.Options{Addr: on.get(t).DSN, MaxRetries: -1, PoolSize: 16})
	t.Cleanup(func() { c.Close() })
	if err := c.FlushAll(t.Context()).Err(); err != nil {
		t.Fatal(err)
	}
	return c
}

func TestGuardRowMeetsTheContract(t *testing.T) {
	for _, on := range databases {
		t.Run(on.name, func(t *testing.T) {
			t.Parallel()
			db := on.open(t)
			fencetest.Run(t, func(t *testing.T) fencetest.Subject { return rows{newTexts(t, on, db)} })
		})
	}
}

func TestFenceColumnMeetsTheContract(t *testing.T) {
	for _, on := range databases {
		t.Run(on.name, func(t *testing.T) {
			t.Parallel()
			db := on.open(t)
			fencetest.Run(t, func(t *testing.T) fencetest.Subject { return columns{newTexts(t, on, db)} })
		})
	}
}

func TestRedisMeetsTheContract(t *testing.T) {
	fencetest.Run(t, func(t *testing.T) fencetest.Subject { return newValues(openRedis(t, redisServer)) })
}
