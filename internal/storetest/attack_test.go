package storetest

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/distlock/distlock/client"
	"github.com/distlock/distlock/fence"
	"github.com/distlock/distlock/internal/server"
)

// roleEnv makes this test binary another program in place of a test; the
// others say what it works on.
const (
	roleEnv   = "DISTLOCK_STORETEST_ROLE"
	serverEnv = "DISTLOCK_STORETEST_SERVER"
	specEnv   = "DISTLOCK_STORETEST_SPEC"
)

// play is the program of a child process.
func play(role string) error {
	var s spec
	if err := json.Unmarshal([]byte(os.Getenv(specEnv)), &s); err != nil {
		return err
	}
	c, err := client.New([]string{os.Getenv(serverEnv)})
	if err != nil {
		return err
	}
	defer c.Close()
	switch role {
	case "holder":
		return holder(c, s)
	case "rounds":
		return holdInRounds(c, s)
	}
	return fmt.Errorf("unknown role %q", role)
}

// serve runs a distlock server, and tells its address.
func serve(t testing.TB) string {
	t.Helper()
	srv, err := server.New(server.Config{Address: "127.0.0.1", InMemory: true})
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- srv.Run(ctx) }()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
	return srv.Addr().String()
}

// What the guards of transports need of a lock, the client's has.
var _ fence.Holder = (*client.Lock)(nil)

// child is a child process that is spoken with in lines.
type child struct {
	t   testing.TB
	cmd *exec.Cmd
	in  io.WriteCloser
	out *bufio.Scanner
}

func startChild(t testing.TB, role, address string, s spec) *child {
	t.Helper()
	cmd := exec.Command(os.Args[0])
	cmd.Env = append(os.Environ(), roleEnv+"="+role, serverEnv+"="+address, specEnv+"="+s.String())
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
	return &child{t: t, cmd: cmd, in: in, out: bufio.NewScanner(out)}
}

// says is the next line that the child prints.
func (c *child) says() (string, error) {
	if !c.out.Scan() {
		return "", fmt.Errorf("the child ended: %v", c.out.Err())
	}
	return c.out.Text(), nil
}

func (c *child) tell(line string) error {
	_, err := io.WriteString(c.in, line+"\n")
	return err
}

func (c *child) signal(s syscall.Signal) error { return c.cmd.Process.Signal(s) }

// stop stops the process, and returns once all its threads stand still.
func (c *child) stop() error {
	if err := c.signal(syscall.SIGSTOP); err != nil {
		return err
	}
	for {
		var status syscall.WaitStatus
		if _, err := syscall.Wait4(c.cmd.Process.Pid, &status, syscall.WUNTRACED, nil); err != nil && err != syscall.EINTR {
			return err
		}
		if status.Stopped() {
			return nil
		}
	}
}

// holder takes the lock, sees that it holds it, and writes when it is told to.
func holder(c *client.Client, s spec) error {
	ctx := context.Background()
	to, err := connect(s)
	if err != nil {
		return err
	}
	defer to.close()
	lock, err := c.Acquire(ctx, s.Resource, client.TTL(500*time.Millisecond))
	if err != nil {
		return err
	}
	pass := lock.Pass()
	if err := lock.Err(); err != nil {
		return err
	}
	fmt.Println("holds")
	if _, err := bufio.NewReader(os.Stdin).ReadString('\n'); err != nil {
		return err
	}
	err = to.write(ctx, pass, "alice's")
	fmt.Println(verdict(err))
	return nil
}

func verdict(err error) string {
	var stale *fence.StaleError
	switch {
	case err == nil:
		return "accepted"
	case errors.As(err, &stale) && stale.Stored > stale.Token:
		return "stale"
	default:
		return "failed: " + err.Error()
	}
}

// TestLateWrite is what the guards are for. Alice, a process of her own, holds
// the lock, has just seen that she does, and is stopped for longer than her
// TTL. Bob is granted the lock and writes. Alice wakes, and writes. The guard
// turns her away. Without it Bob's write is lost, though the lock service did
// everything right: so the test can fail.
func TestLateWrite(t *testing.T) {
	address := serve(t)
	for _, kind := range kinds {
		for _, guarded := range []bool{true, false} {
			name := kind + "/guarded"
			if !guarded {
				name = kind + "/unguarded"
			}
			t.Run(strings.ReplaceAll(name, " ", "-"), func(t *testing.T) {
				t.Parallel()
				ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
				defer cancel()
				s := newTarget(t, kind, guarded)
				to, err := connect(s)
				if err != nil {
					t.Fatal(err)
				}
				defer to.close()
				alice := startChild(t, "holder", address, s)
				if line, err := alice.says(); err != nil || line != "holds" {
					t.Fatal(line, err)
				}
				if err := alice.stop(); err != nil {
					t.Fatal(err)
				}
				if err := alice.tell("write"); err != nil { // it does not get there yet
					t.Fatal(err)
				}

				c, err := client.New([]string{address})
				if err != nil {
					t.Fatal(err)
				}
				defer c.Close()
				bob, err := c.Acquire(ctx, s.Resource, client.TTL(time.Minute)) // once Alice's lease has ended
				if err != nil {
					t.Fatal(err)
				}
				if err := to.write(ctx, bob.Pass(), "bob's"); err != nil {
					t.Fatal(err)
				}

				if err := alice.signal(syscall.SIGCONT); err != nil {
					t.Fatal(err)
				}
				wantVerdict, wantText := "stale", "bob's"
				if !guarded {
					wantVerdict, wantText = "accepted", "alice's"
				}
				if line, err := alice.says(); err != nil || line != wantVerdict {
					t.Errorf("alice's late write: %s, %v; want %s", line, err, wantVerdict)
				}
				if text, err := to.read(ctx); err != nil || text != wantText {
					t.Errorf("the document is %q, %v; want %q", text, err, wantText)
				}
				if guarded { // and Bob goes on
					if err := to.write(ctx, bob.Pass(), "bob's second"); err != nil {
						t.Error(err)
					}
				}
				if err := bob.Release(ctx); err != nil {
					t.Error(err)
				}
			})
		}
	}
}
