package sqlfence_test

import (
	"context"
	"database/sql"
	"database/sql/driver"
	"errors"
	"strings"
	"testing"

	"github.com/distlock/distlock/fence"
	"github.com/distlock/distlock/fence/sqlfence"
)

// What the guards do with a database is tested against real ones, in the
// module internal/storetest. Here is what they do before they ask one.

func TestNamesAreChecked(t *testing.T) {
	for _, name := range []string{"a b", "a;drop", `"a"`, "a.b.c", "1a", "a.", "é"} {
		if _, err := sqlfence.New(nil, sqlfence.SQLite, name); err == nil {
			t.Errorf("%q became a table", name)
		}
		for _, c := range []sqlfence.Column{{Table: name, Key: "id"}, {Table: "t", Key: name}, {Table: "t", Key: "id", Floor: name}} {
			c.Dialect = sqlfence.SQLite
			if err := c.Raise(t.Context(), nil, "r", fence.Pass{Token: 1, Floor: 1}, 1); err == nil || !strings.Contains(err.Error(), "not the name") {
				t.Errorf("%+v: %v", c, err)
			}
		}
	}
	for _, d := range []sqlfence.Dialect{0, 4, -1} {
		if _, err := sqlfence.New(nil, d, ""); err == nil {
			t.Errorf("%d is a dialect", d)
		}
		if err := (sqlfence.Column{Dialect: d, Table: "t", Key: "id"}).Raise(t.Context(), nil, "r", fence.Pass{Token: 1, Floor: 1}, 1); err == nil {
			t.Errorf("%d is a dialect", d)
		}
	}
}

func TestSchema(t *testing.T) {
	for d, want := range map[sqlfence.Dialect]string{sqlfence.PostgreSQL: "BYTEA PRIMARY KEY", sqlfence.MySQL: "ENGINE=InnoDB", sqlfence.SQLite: "WITHOUT ROWID"} {
		g, err := sqlfence.New(nil, d, "app.floors")
		if err != nil || !strings.Contains(g.Schema(), want) || !strings.Contains(g.Schema(), "IF NOT EXISTS app.floors (") {
			t.Errorf("%v, %s", err, g.Schema())
		}
	}
}

func TestInvalidPassIsNotAskedAbout(t *testing.T) {
	g, err := sqlfence.New(nil, sqlfence.PostgreSQL, "")
	if err != nil {
		t.Fatal(err)
	}
	if err := g.Admit(t.Context(), nil, "r", fence.Pass{}); !errors.Is(err, fence.ErrInvalidPass) {
		t.Error(err)
	}
	c := sqlfence.Column{Dialect: sqlfence.MySQL, Table: "t", Key: "id"}
	if err := c.Update(t.Context(), nil, "r", fence.Pass{Token: 1, Floor: 2}, 1, "a = 1"); !errors.Is(err, fence.ErrInvalidPass) {
		t.Error(err)
	}
}

// contrary is a driver that changes no row and yet finds one.
type contrary struct{ queries []string }

func (c *contrary) Connect(context.Context) (driver.Conn, error) { return c, nil }
func (c *contrary) Driver() driver.Driver                        { return nil }
func (c *contrary) Begin() (driver.Tx, error)                    { return nil, errors.ErrUnsupported }
func (c *contrary) Close() error                                 { return nil }
func (c *contrary) Prepare(query string) (driver.Stmt, error) {
	c.queries = append(c.queries, query)
	return contraryStmt{}, nil
}

type contraryStmt struct{}

func (contraryStmt) Close() error                               { return nil }
func (contraryStmt) NumInput() int                              { return -1 }
func (contraryStmt) Exec([]driver.Value) (driver.Result, error) { return driver.RowsAffected(0), nil }
func (contraryStmt) Query([]driver.Value) (driver.Rows, error)  { return &contraryRows{}, nil }

type contraryRows struct{}

func (*contraryRows) Columns() []string { return []string{"fence"} }
func (*contraryRows) Close() error      { return nil }
func (*contraryRows) Next(to []driver.Value) error {
	to[0] = int64(1)
	return nil
}

// TestUpdateGivesUp in place of asking for ever.
func TestUpdateGivesUp(t *testing.T) {
	var d contrary
	db := sql.OpenDB(&d)
	defer db.Close()
	c := sqlfence.Column{Dialect: sqlfence.PostgreSQL, Table: "accounts", Key: "id"}
	err := c.Update(t.Context(), db, "r", fence.Pass{Token: 5, Floor: 4}, 42, "balance = balance + $1, at = $2", 50, "now")
	if err == nil || !strings.Contains(err.Error(), "changes no row") || len(d.queries) != 20 {
		t.Errorf("%v after %d queries", err, len(d.queries))
	}
	if got, want := d.queries[0], "UPDATE accounts SET fence = GREATEST(fence, $3), balance = balance + $1, at = $2 WHERE id = $4 AND fence <= $5"; got != want {
		t.Errorf("%s\nwant\n%s", got, want)
	}
}
