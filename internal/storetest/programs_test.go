package storetest

import (
	"context"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/redis/go-redis/v9"
)

// number is what may differ between two runs of a program.
var number = regexp.MustCompile(`\d+`)

// shows is what a program says that it prints: its last comments in main.
func shows(program string) string {
	var lines []string
	for line := range strings.Lines(program) {
		if text, ok := strings.CutPrefix(line, "\t// "); ok {
			lines = append(lines, text)
		} else if strings.HasPrefix(line, "}") && len(lines) > 0 {
			break
		} else {
			lines = nil
		}
	}
	return strings.Join(lines, "")
}

// programs are the programs of docs/fencing.md, and their stores.
var programs = []struct {
	name  string
	store func(t *testing.T) string
	// after is what the store holds in the end.
	after func(t *testing.T, store string) (string, error)
	want  string
}{
	{"postgresql", func(t *testing.T) string { return fresh(t, "pgx", postgresServer.get(t).DSN) }, balance("pgx"), "150"},
	{"mysql", func(t *testing.T) string { return fresh(t, "mysql", mariadbServer.get(t).DSN) }, balance("mysql"), "150"},
	{"sqlite", func(t *testing.T) string { return filepath.Join(t.TempDir(), "bank") }, balance("sqlite"), "150"},
	{"redis", func(t *testing.T) string { openRedis(t, redisServer); return redisServer.get(t).DSN }, func(t *testing.T, store string) (string, error) {
		c := redis.NewClient(&redis.Options{Addr: store})
		defer c.Close()
		return c.Get(t.Context(), "{account/1}:balance").Result()
	}, "50"},
	{"file", func(t *testing.T) string { return t.TempDir() }, func(t *testing.T, store string) (string, error) {
		b, err := os.ReadFile(filepath.Join(store, "daily.csv"))
		return string(b), err
	}, "bob's\n"},
	{"http", nil, nil, ""},
	{"grpc", nil, nil, ""},
}

// fresh is a database without what an earlier run has left.
func fresh(t *testing.T, driver, dsn string) string {
	for _, table := range []string{"accounts", "distlock_fence"} {
		if _, err := openDSN(t, driver, dsn).ExecContext(t.Context(), "DROP TABLE IF EXISTS "+table); err != nil {
			t.Fatal(err)
		}
	}
	return dsn
}

func balance(driver string) func(t *testing.T, store string) (string, error) {
	return func(t *testing.T, store string) (string, error) {
		var balance string
		err := openDSN(t, driver, store).QueryRowContext(t.Context(), "SELECT balance FROM accounts WHERE id = 1").Scan(&balance)
		return balance, err
	}
}

// TestPrograms builds each program of the document, runs it, and holds what it
// prints, and leaves in its store, against what it says.
func TestPrograms(t *testing.T) {
	address := serve(t)
	dir := t.TempDir()
	if out, err := exec.Command("go", "build", "-o", dir, "./programs/...").CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	for _, p := range programs {
		t.Run(p.name, func(t *testing.T) {
			text, err := os.ReadFile(filepath.Join("programs", p.name, "main.go"))
			if err != nil {
				t.Fatal(err)
			}
			ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
			defer cancel()
			cmd := exec.CommandContext(ctx, filepath.Join(dir, p.name))
			cmd.Env = append(os.Environ(), "DISTLOCK="+address)
			var store string
			if p.store != nil {
				store = p.store(t)
				cmd.Env = append(cmd.Env, "STORE="+store)
			}
			out, err := cmd.Output()
			if exit := new(exec.ExitError); errors.As(err, &exit) {
				t.Fatalf("%v: %s%s", err, out, exit.Stderr)
			}
			if err != nil {
				t.Fatal(err)
			}
			want := shows(string(text))
			if want == "" || number.ReplaceAllString(string(out), "N") != number.ReplaceAllString(want, "N") {
				t.Errorf("prints\n%swant\n%s", out, want)
			}
			if p.after != nil {
				if got, err := p.after(t, store); err != nil || got != p.want {
					t.Errorf("the store holds %q in the end, %v; want %q", got, err, p.want)
				}
			}
		})
	}
}

// TestDocumentShowsThePrograms as they are, all of them.
func TestDocumentShowsThePrograms(t *testing.T) {
	doc, err := os.ReadFile("../../docs/fencing.md")
	if err != nil {
		t.Fatal(err)
	}
	var shown []string
	for _, block := range regexp.MustCompile("(?ms)^```go stores\n(.*?)^```$").FindAllStringSubmatch(string(doc), -1) {
		shown = append(shown, block[1])
	}
	for _, p := range programs {
		text, err := os.ReadFile(filepath.Join("programs", p.name, "main.go"))
		if err != nil {
			t.Fatal(err)
		}
		i := slices.Index(shown, string(text))
		if i < 0 {
			t.Errorf("docs/fencing.md does not show programs/%s/main.go as it is", p.name)
			continue
		}
		shown = slices.Delete(shown, i, i+1)
	}
	for _, block := range shown {
		t.Errorf("docs/fencing.md shows a program that is not in programs:\n%.200s", block)
	}
	files, err := filepath.Glob("programs/*/main.go")
	if err != nil || len(files) != len(programs) {
		t.Errorf("there are programs that are not tested: %q, %v", files, err)
	}
}
