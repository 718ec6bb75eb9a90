//go:build linux

package e2e

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/distlock/distlock/client"
	"github.com/distlock/distlock/fence"
)

// writerEnv makes this test binary a writer in place of a test: see writer.
const writerEnv = "DISTLOCK_E2E_WRITER"

// writer is a program as its users write it. It takes the lock, looks whether
// it still holds it, and writes its text to the document at the URL; between
// looking and writing it is paused. It says on standard output how far it is,
// and goes on by a line on standard input.
func writer(server, url, text string) error {
	in := bufio.NewReader(os.Stdin)
	c, err := client.New([]string{server})
	if err != nil {
		return err
	}
	defer c.Close()
	lock, err := c.Acquire(context.Background(), "document", client.TTL(time.Second))
	if err != nil {
		return err
	}
	if err := lock.Err(); err != nil {
		return err
	}
	fmt.Println("held by token", lock.Token())
	if _, err := in.ReadString('\n'); err != nil {
		return err
	}
	pass := lock.Pass()
	req, err := http.NewRequest(http.MethodPut, url, strings.NewReader(text))
	if err != nil {
		return err
	}
	req.Header.Set("Token", pass.Token.String())
	req.Header.Set("Floor", pass.Floor.String())
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	answer, err := io.ReadAll(resp.Body)
	fmt.Println(strings.TrimSpace(resp.Status + " " + string(answer)))
	return err
}

// document is a resource: a text that is written over HTTP.
type document struct {
	guarded bool
	guard   fence.Memory

	mu   sync.Mutex
	text string
}

// ServeHTTP answers 412 to a write that the guard turns away.
func (d *document) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	body, err := io.ReadAll(r.Body)
	if err != nil {
		http.Error(w, err.Error(), http.StatusBadRequest)
		return
	}
	write := func() error {
		d.mu.Lock()
		defer d.mu.Unlock()
		d.text = string(body)
		return nil
	}
	if !d.guarded {
		write()
		return
	}
	token, _ := strconv.ParseUint(r.Header.Get("Token"), 10, 64)
	floor, _ := strconv.ParseUint(r.Header.Get("Floor"), 10, 64)
	err = d.guard.Write(r.Context(), "document", fence.Pass{Token: fence.Token(token), Floor: fence.Token(floor)}, write)
	var stale *fence.StaleError
	switch {
	case errors.As(err, &stale):
		http.Error(w, err.Error(), http.StatusPreconditionFailed)
	case err != nil:
		http.Error(w, err.Error(), http.StatusBadRequest)
	}
}

func (d *document) read() string {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.text
}

// writing is a writer's process.
type writing struct {
	t   *testing.T
	cmd *exec.Cmd
	in  io.WriteCloser
	out *bufio.Scanner
}

func startWriter(t *testing.T, ctx context.Context, srv *server, url, text string) *writing {
	t.Helper()
	cmd := exec.CommandContext(ctx, os.Args[0], srv.address, url, text)
	cmd.Env = append(os.Environ(), writerEnv+"=1")
	cmd.Stderr = os.Stderr
	in, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		cmd.Process.Kill() // also when it is stopped
		cmd.Wait()
	})
	return &writing{t: t, cmd: cmd, in: in, out: bufio.NewScanner(out)}
}

// says is the next line that the writer prints.
func (w *writing) says() string {
	w.t.Helper()
	if !w.out.Scan() {
		w.t.Fatalf("the writer ended: %v", w.out.Err())
	}
	return w.out.Text()
}

func (w *writing) write() {
	w.t.Helper()
	if _, err := io.WriteString(w.in, "write\n"); err != nil {
		w.t.Fatal(err)
	}
}

// stop stops the process, and returns once all its threads stand still.
func (w *writing) stop() {
	w.t.Helper()
	w.signal(syscall.SIGSTOP)
	var status syscall.WaitStatus
	for !status.Stopped() {
		if _, err := syscall.Wait4(w.cmd.Process.Pid, &status, syscall.WUNTRACED, nil); err != nil && err != syscall.EINTR {
			w.t.Fatal(err)
		}
	}
}

func (w *writing) signal(sig syscall.Signal) {
	w.t.Helper()
	if err := w.cmd.Process.Signal(sig); err != nil {
		w.t.Fatal(err)
	}
}

// TestLateWrite is what fencing is for. Alice holds the lock, has just seen
// that she does, and is stopped for longer than her TTL. Bob is granted the
// lock and writes. Alice wakes and writes. A guard turns her away; without one
// Bob's write is lost, though the lock service did everything right.
func TestLateWrite(t *testing.T) {
	for _, c := range []struct {
		name    string
		guarded bool
		answer  string // to Alice
		text    string // in the end
	}{
		{"guarded", true, `412 Precondition Failed resource "document": token 1 is stale, the resource has seen 2`, "bob's"},
		{"unguarded", false, "200 OK", "alice's"},
	} {
		t.Run(c.name, func(t *testing.T) {
			srv := startServer(t, "--data-dir", t.TempDir())
			ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
			defer cancel()
			doc := &document{guarded: c.guarded}
			resource := httptest.NewServer(doc)
			defer resource.Close()

			alice := startWriter(t, ctx, srv, resource.URL, "alice's")
			if got := alice.says(); got != "held by token 1" {
				t.Fatalf("alice: %s", got)
			}
			alice.stop()
			alice.write() // the write is on its way, and does not get there

			bob := startWriter(t, ctx, srv, resource.URL, "bob's")
			if got := bob.says(); got != "held by token 2" { // once alice's lease has ended
				t.Fatalf("bob: %s", got)
			}
			bob.write()
			if got := bob.says(); got != "200 OK" {
				t.Fatalf("bob: %s", got)
			}

			alice.signal(syscall.SIGCONT)
			if got := alice.says(); got != c.answer {
				t.Errorf("alice, late: %s, want %s", got, c.answer)
			}
			if got := doc.read(); got != c.text {
				t.Errorf("the document is %s in the end, want %s", got, c.text)
			}
		})
	}
}
