//go:build unix

package filefence

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"

	"go.uber.org/goleak"

	"github.com/distlock/distlock/fence"
	"github.com/distlock/distlock/fence/fencetest"
)

// dieEnv makes this test binary a writer that is killed at the named step.
const dieEnv = "FILEFENCE_TEST_DIE"

func TestMain(m *testing.M) {
	if step := os.Getenv(dieEnv); step != "" {
		fmt.Println(writeAndDie(os.Args[1], step))
		os.Exit(1)
	}
	goleak.VerifyTestMain(m)
}

func pass(token fence.Token) fence.Pass { return fence.Pass{Token: token, Floor: token} }

func open(t testing.TB, dir string) *Guard {
	t.Helper()
	g, err := New(dir)
	if err != nil {
		t.Fatal(err)
	}
	return g
}

// tempDir is in memory where that can be had: the tests with 10,000 races are
// about order, and a disk takes milliseconds for each.
func tempDir(t testing.TB) string {
	t.Helper()
	if info, err := os.Stat("/dev/shm"); err != nil || !info.IsDir() {
		return t.TempDir()
	}
	dir, err := os.MkdirTemp("/dev/shm", "filefence")
	if err != nil {
		return t.TempDir()
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	return dir
}

// subject is two guards of one directory, used by turns: what excludes them
// excludes two processes.
type subject struct {
	guards [2]*Guard
	turn   atomic.Uint64
	as     func(text string) Content
	file   string // below Path
}

func (s *subject) guard() *Guard { return s.guards[s.turn.Add(1)%2] }

func (s *subject) Write(ctx context.Context, resource string, p fence.Pass, text string) error {
	return s.guard().Write(ctx, resource, p, s.as(text))
}

func (s *subject) Raise(ctx context.Context, resource string, p fence.Pass) error {
	return s.guard().Raise(ctx, resource, p)
}

func (s *subject) Read(ctx context.Context, resource string) (text string, err error) {
	err = s.guard().Read(ctx, resource, func(path string) error {
		b, err := os.ReadFile(filepath.Join(path, s.file))
		if errors.Is(err, fs.ErrNotExist) {
			return nil
		}
		text = string(b)
		return err
	})
	return text, err
}

// Interrupt breaks off where the new version is on the disk, and nothing says
// so yet.
func (s *subject) Interrupt(ctx context.Context, resource string, p fence.Pass, text string) error {
	g := *s.guard()
	g.at = func(step string) error {
		if step == "token made" {
			return errors.New("killed")
		}
		return nil
	}
	return g.Write(ctx, resource, p, s.as(text))
}

func asFile(text string) Content { return Bytes([]byte(text), 0o600) }

func asDirectory(text string) Content {
	return func(path string) error {
		return errors.Join(os.MkdirAll(filepath.Join(path, "sub"), 0o700), os.WriteFile(filepath.Join(path, "sub", "text"), []byte(text), 0o600))
	}
}

func TestFilesMeetTheContract(t *testing.T) {
	fencetest.Run(t, func(t *testing.T) fencetest.Subject {
		dir := tempDir(t)
		return &subject{guards: [2]*Guard{open(t, dir), open(t, dir)}, as: asFile}
	})
}

func TestDirectoriesMeetTheContract(t *testing.T) {
	fencetest.Run(t, func(t *testing.T) fencetest.Subject {
		dir := tempDir(t)
		return &subject{guards: [2]*Guard{open(t, dir), open(t, dir)}, as: asDirectory, file: "sub/text"}
	})
}

// steps are where a write may die, and whether it has happened by then.
var steps = []struct {
	name string
	done bool
}{{"writing", false}, {"made", false}, {"synced", false}, {"token made", false}, {"committed", true}, {"aside", true}}

// contents is what the resource r holds, as a file or as a directory.
func contents(t *testing.T, g *Guard) string {
	t.Helper()
	var text string
	err := g.Read(t.Context(), "r", func(path string) error {
		if isDirectory(path) {
			path = filepath.Join(path, "sub", "text")
		}
		b, err := os.ReadFile(path)
		text = string(b)
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return text
}

// writeAndDie writes, by token 9, until the step; there the process is killed.
func writeAndDie(dir, step string) error {
	g, err := New(dir)
	if err != nil {
		return err
	}
	die := func() { syscall.Kill(os.Getpid(), syscall.SIGKILL); select {} }
	g.at = func(at string) error {
		if at == step {
			die()
		}
		return nil
	}
	return g.Write(context.Background(), "r", pass(9), func(path string) error {
		if step == "writing" {
			os.WriteFile(path, []byte("ha"), 0o600)
			die()
		}
		return asDirectory("new")(path)
	})
}

// TestKilledAtEveryStep kills a process at each step of a write that replaces
// a file by a directory. Either all of it happened, and the floor stands, or
// nothing did.
func TestKilledAtEveryStep(t *testing.T) {
	for _, step := range steps {
		t.Run(step.name, func(t *testing.T) {
			dir := t.TempDir()
			g := open(t, dir)
			if err := g.Write(t.Context(), "r", pass(5), asFile("old")); err != nil {
				t.Fatal(err)
			}
			cmd := exec.Command(os.Args[0], dir)
			cmd.Env = append(os.Environ(), dieEnv+"="+step.name)
			out, err := cmd.Output()
			if status, ok := cmd.ProcessState.Sys().(syscall.WaitStatus); !ok || status.Signal() != syscall.SIGKILL {
				t.Fatalf("the writer ended with %v: %s", err, out)
			}
			want, next := "old", fence.Token(5)
			if step.done {
				want, next = "new", 9
			}
			if got := contents(t, g); got != want {
				t.Errorf("read %q, want %q", got, want)
			}
			var stale *fence.StaleError
			if err := g.Write(t.Context(), "r", pass(next-1), asFile("stale")); !errors.As(err, &stale) || stale.Stored != next {
				t.Errorf("a write by %d: %v, want it refused by %d", next-1, err, next)
			}
			if err := g.Write(t.Context(), "r", pass(next), asFile("more")); err != nil {
				t.Fatal(err)
			}
			if got := contents(t, g); got != "more" {
				t.Errorf("read %q after a write", got)
			}
			left, err := filepath.Glob(filepath.Join(dir, ".fence", "*"))
			left = slices.DeleteFunc(left, func(name string) bool { return strings.HasSuffix(name, ".token.new") }) // for the next
			if err != nil || len(left) != 2 {                                                                       // lock and token
				t.Errorf("left behind: %q, %v", left, err)
			}
		})
	}
}

// TestReaderSeesOldOrNew: a plain reader never sees half a file.
func TestReaderSeesOldOrNew(t *testing.T) {
	g := open(t, tempDir(t))
	long := func(c string) string { return strings.Repeat(c, 1<<16) }
	if err := g.Write(t.Context(), "r", pass(1), asFile(long("0"))); err != nil {
		t.Fatal(err)
	}
	stop, done := make(chan struct{}), make(chan error)
	go func() {
		for {
			b, err := os.ReadFile(g.Path("r"))
			if err == nil && string(b) != long(string(b[:1])) {
				err = errors.New("half a file")
			}
			select {
			case <-stop:
				done <- err
				return
			default:
			}
			if err != nil {
				<-stop
				done <- err
				return
			}
		}
	}()
	for i := range 200 {
		err := g.Write(t.Context(), "r", pass(fence.Token(1+i/2)), Stream(0o600, func(w io.Writer) error {
			for range 1 << 6 {
				if _, err := io.WriteString(w, strings.Repeat(strconv.Itoa(i%10), 1<<10)); err != nil {
					return err
				}
			}
			return nil
		}))
		if err != nil {
			t.Error(err)
		}
	}
	close(stop)
	if err := <-done; err != nil {
		t.Error(err)
	}
}

func TestContentThatFails(t *testing.T) {
	g := open(t, t.TempDir())
	full := errors.New("full")
	err := g.Write(t.Context(), "r", pass(5), func(path string) error {
		os.WriteFile(path, []byte("half"), 0o600)
		return full
	})
	if !errors.Is(err, full) {
		t.Errorf("Write = %v, want the content's error", err)
	}
	if err := g.Write(t.Context(), "r", pass(4), func(string) error { return nil }); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("of nothing: %v", err)
	}
	// Neither has stored its floor.
	if err := g.Write(t.Context(), "r", pass(3), asFile("a")); err != nil {
		t.Error(err)
	}
}

// TestDamageIsNoFloor: a token file that cannot be read is never taken for
// floor 0.
func TestDamageIsNoFloor(t *testing.T) {
	for _, text := range []string{"", "distlock-fence 1 floor 7", "distlock-fence 2 floor 7 version 1\n", "distlock-fence 1 floor 7 version 1\nx",
		"distlock-fence 1 floor 9007199254740992 version 1\n", "distlock-fence 1 floor -7 version 1\n"} {
		dir := t.TempDir()
		g := open(t, dir)
		if err := os.WriteFile(filepath.Join(dir, ".fence", "r.token"), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		if err := g.Write(t.Context(), "r", pass(9), asFile("a")); err == nil || !strings.Contains(err.Error(), "damaged") {
			t.Errorf("with token file %q: %v", text, err)
		}
	}
}

// TestWaitEndsWithItsContext: who waits for a process that stands still may
// give up.
func TestWaitEndsWithItsContext(t *testing.T) {
	dir := t.TempDir()
	one, other := open(t, dir), open(t, dir)
	ctx, cancel := context.WithCancel(t.Context())
	err := one.Write(t.Context(), "r", pass(5), func(path string) error {
		cause := make(chan error)
		go func() { cause <- other.Write(ctx, "r", pass(6), asFile("b")) }()
		cancel()
		if err := <-cause; !errors.Is(err, context.Canceled) {
			return fmt.Errorf("the waiting write: %w", err)
		}
		// Another resource does not wait.
		if err := other.Write(t.Context(), "s", pass(1), asFile("s")); err != nil {
			return err
		}
		return asFile("a")(path)
	})
	if err != nil {
		t.Fatal(err)
	}
	if got := contents(t, one); got != "a" {
		t.Errorf("read %q", got)
	}
}

func TestNewWithoutADirectory(t *testing.T) {
	if _, err := New(filepath.Join(t.TempDir(), "none")); !errors.Is(err, fs.ErrNotExist) {
		t.Error(err)
	}
}

func TestFileNames(t *testing.T) {
	for resource, want := range map[string]string{
		"daily-2026_11.csv": "daily-2026_11.csv", ".fence": "%2Efence", "..": "%2E.", "a/b": "a%2Fb", "": "%", "%": "%25", "é": "%C3%A9",
	} {
		if got := fileName(resource); got != want {
			t.Errorf("%q stands in %q, want %q", resource, got, want)
		}
	}
	for _, n := range []int{longest - 1, longest, longest + 1, 10 << 10} {
		name := fileName(strings.Repeat("n", n))
		if cut := n > longest; cut != (len(name) == 205) || !cut && len(name) != n {
			t.Errorf("a name of %d bytes stands in one of %d", n, len(name))
		}
	}
}

func Example() {
	ctx := context.Background()
	dir, err := os.MkdirTemp("", "reports")
	if err != nil {
		panic(err)
	}
	defer os.RemoveAll(dir)
	guard, err := New(dir)
	if err != nil {
		panic(err)
	}
	// In a program these come from client.Lock.Pass.
	bob, alice := fence.Pass{Token: 8, Floor: 8}, fence.Pass{Token: 7, Floor: 7}
	fmt.Println(guard.Write(ctx, "daily.csv", bob, Bytes([]byte("bob's"), 0o644)))
	fmt.Println(guard.Write(ctx, "daily.csv", alice, Bytes([]byte("alice's"), 0o644)))
	text, err := os.ReadFile(guard.Path("daily.csv"))
	fmt.Println(string(text), err)
	// Output:
	// <nil>
	// resource "daily.csv": token 7 is stale, the resource has seen 8
	// bob's <nil>
}
