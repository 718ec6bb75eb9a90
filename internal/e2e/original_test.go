//go:build original && linux

package e2e

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"strings"
	"testing"
	"time"

	"github.com/distlock/distlock/client"
	"github.com/distlock/distlock/fence"
)

// python is Debian's, which Debian's grpc packages belong to.
const python = "/usr/bin/python3"

// TestOriginalProtocol drives the original's protocol from Python, with
// Debian's python3-grpcio and stubs that python3-grpc-tools makes from our
// copy of the proto: a real client that is not ours. It is behind the build
// tag "original" because of those packages; see `make original`.
func TestOriginalProtocol(t *testing.T) {
	for _, mode := range [][]string{nil, {"--run-async"}} {
		t.Run("serve "+strings.Join(mode, " "), func(t *testing.T) { originalProtocol(t, mode) })
	}
}

func originalProtocol(t *testing.T, mode []string) {
	stubs := t.TempDir()
	generate := exec.Command(python, "-m", "grpc_tools.protoc", "-I", "../../proto/distlock",
		"--python_out="+stubs, "--grpc_python_out="+stubs, "distlock.proto")
	if out, err := generate.CombinedOutput(); err != nil {
		t.Fatalf("making Python stubs failed: %v\n%s\nInstall them with: apt-get install python3-grpcio python3-grpc-tools", err, out)
	}
	srv := startServer(t, append([]string{"--data-dir", t.TempDir()}, mode...)...)
	ctx, cancel := context.WithTimeout(context.Background(), 2*time.Minute)
	defer cancel()
	c, err := client.New([]string{srv.address})
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()

	cmd := exec.CommandContext(ctx, python, "testdata/original_client.py", srv.address)
	cmd.Env = append(os.Environ(), "PYTHONPATH="+stubs, "PYTHONDONTWRITEBYTECODE=1")
	cmd.Stderr = os.Stderr
	stdin, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	stdout, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	passed := false
	lines := bufio.NewScanner(stdout)
	for lines.Scan() {
		line := lines.Text()
		if ask, ok := strings.CutPrefix(line, "ASK "); ok {
			answer, err := answerOriginal(ctx, srv, c, ask)
			if err != nil {
				answer = "error " + err.Error()
			}
			io.WriteString(stdin, answer+"\n")
			continue
		}
		passed = passed || strings.HasPrefix(line, "PASSED ")
		t.Log(line)
	}
	if err := cmd.Wait(); err != nil || !passed {
		t.Fatalf("the Python client: %v, passed: %v", err, passed)
	}
}

// answerOriginal does what the Python client asks of our side.
func answerOriginal(ctx context.Context, srv *server, c *client.Client, ask string) (string, error) {
	words := strings.Fields(ask)
	switch words[0] {
	case "restart":
		srv.kill()
		srv.start()
		return "ok", nil
	case "take":
		lock, err := c.TryAcquire(ctx, words[1], client.TTL(time.Minute), client.NoRenew())
		if err != nil {
			return "", err
		}
		return "ok " + lock.Token().String(), nil
	case "release":
		var token fence.Token
		fmt.Sscan(words[2], &token)
		return "ok", c.Admin().Release(ctx, words[1], token)
	case "held":
		if lock, err := c.TryAcquire(ctx, words[1]); err == nil {
			return "", fmt.Errorf("our client got token %d of a lock that an original client holds", lock.Token())
		}
		out, _, code := srv.distlock(ctx, "lock", "ls")
		if code != 0 || !strings.Contains(out, words[1]) {
			return "", fmt.Errorf("lock ls does not show %s: exit %d", words[1], code)
		}
		return "ok", nil
	}
	return "", fmt.Errorf("unknown request %q", ask)
}

// distlock runs one command of the binary against the server.
func (s *server) distlock(ctx context.Context, args ...string) (stdout, stderr string, code int) {
	s.t.Helper()
	cmd := s.command(ctx, args...)
	var out, errs bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &errs
	err := cmd.Run()
	var exit *exec.ExitError
	if err != nil && !errors.As(err, &exit) {
		s.t.Fatalf("distlock %s: %v", strings.Join(args, " "), err)
	}
	return out.String(), errs.String(), cmd.ProcessState.ExitCode()
}
