//go:build linux

package e2e

import (
	"bytes"
	"context"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"
)

// run starts `distlock run` and returns it running.
func (s *server) run(ctx context.Context, output *bytes.Buffer, args ...string) *exec.Cmd {
	s.t.Helper()
	cmd := s.command(ctx, append([]string{"run"}, args...)...)
	if output != nil {
		cmd.Stdout, cmd.Stderr = output, output
	}
	if err := cmd.Start(); err != nil {
		s.t.Fatal(err)
	}
	return cmd
}

func exitCode(err error) int {
	var exit *exec.ExitError
	if errors.As(err, &exit) {
		return exit.ExitCode()
	}
	if err != nil {
		return -1
	}
	return 0
}

// alive reports whether a process runs; a zombie does not.
func alive(pid int) bool {
	stat, err := os.ReadFile("/proc/" + strconv.Itoa(pid) + "/stat")
	if err != nil {
		return false
	}
	rest := string(stat[bytes.LastIndexByte(stat, ')')+1:])
	return !strings.HasPrefix(strings.TrimSpace(rest), "Z")
}

func readPID(t *testing.T, ctx context.Context, file string) int {
	t.Helper()
	var pid int
	waitFor(t, ctx, func() bool {
		text, err := os.ReadFile(file)
		if err != nil {
			return false
		}
		pid, err = strconv.Atoi(strings.TrimSpace(string(text)))
		return err == nil
	})
	return pid
}

// TestRunOneAfterTheOther: the second command starts only when the first has
// ended, and has the higher token.
func TestRunOneAfterTheOther(t *testing.T) {
	srv := startServer(t, "--in-memory")
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	log := filepath.Join(t.TempDir(), "log")
	script := `echo "start $DISTLOCK_TOKEN $DISTLOCK_NAME" >>` + log + `; sleep 0.5; echo "end $DISTLOCK_TOKEN" >>` + log
	var commands []*exec.Cmd
	for range 3 {
		commands = append(commands, srv.run(ctx, nil, "job", "--ttl", "5s", "--", "sh", "-c", script))
	}
	for _, cmd := range commands {
		if err := cmd.Wait(); err != nil {
			t.Fatal(err)
		}
	}
	text, err := os.ReadFile(log)
	if err != nil {
		t.Fatal(err)
	}
	lines := strings.Split(strings.TrimSpace(string(text)), "\n")
	if len(lines) != 6 {
		t.Fatalf("log:\n%s", text)
	}
	last := 0
	for i := 0; i < len(lines); i += 2 {
		start, end := strings.Fields(lines[i]), strings.Fields(lines[i+1])
		token, err := strconv.Atoi(start[1])
		if err != nil || start[0] != "start" || start[2] != "job" || end[0] != "end" || end[1] != start[1] || token <= last {
			t.Fatalf("log:\n%s", text)
		}
		last = token
	}
}

// TestRunParentStopped: SIGSTOP of `distlock run` for longer than its TTL. Its
// command is dead before the next one starts, though its parent could not lift
// a finger.
func TestRunParentStopped(t *testing.T) {
	srv := startServer(t, "--in-memory")
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	dir := t.TempDir()
	first := srv.run(ctx, nil, "job", "--ttl", "2s", "--", "sh", "-c", "echo $$ >"+dir+"/first; exec sleep 60")
	child := readPID(t, ctx, dir+"/first")
	second := srv.run(ctx, nil, "job", "--ttl", "2s", "--", "sh", "-c",
		"if kill -0 "+strconv.Itoa(child)+" 2>/dev/null && ! grep -q '^State:.Z' /proc/"+strconv.Itoa(child)+"/status; then echo alive; else echo dead; fi >"+dir+"/verdict; echo $$ >"+dir+"/second")
	if err := first.Process.Signal(syscall.SIGSTOP); err != nil {
		t.Fatal(err)
	}
	readPID(t, ctx, dir+"/second")
	verdict, err := os.ReadFile(dir + "/verdict")
	if err != nil || strings.TrimSpace(string(verdict)) != "dead" {
		t.Errorf("when the second command started, the first was %q (%v)", verdict, err)
	}
	if err := second.Wait(); err != nil {
		t.Errorf("the second: %v", err)
	}
	if err := first.Process.Signal(syscall.SIGCONT); err != nil {
		t.Fatal(err)
	}
	if code := exitCode(first.Wait()); code != 76 {
		t.Errorf("the first exits with %d, want 76", code)
	}
}

// TestRunServerStopped: the server does not answer for longer than the TTL.
// The command and all its children are killed before the deadline it was
// told, also when they ignore SIGTERM; the exit code is 76.
func TestRunServerStopped(t *testing.T) {
	srv := startServer(t, "--in-memory")
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	dir := t.TempDir()
	var output bytes.Buffer
	cmd := srv.run(ctx, &output, "job", "--ttl", "3s", "--", "sh", "-c",
		`trap "" TERM; sh -c 'trap "" TERM; echo $$ >`+dir+`/grandchild; while :; do sleep 0.1; done' & echo $$ >`+dir+`/child; wait; while :; do sleep 0.1; done`)
	child, grandchild := readPID(t, ctx, dir+"/child"), readPID(t, ctx, dir+"/grandchild")
	srv.signal(syscall.SIGSTOP)
	stopped := time.Now()
	defer srv.signal(syscall.SIGCONT)
	// Nothing acknowledged after the stop: the deadline is at most a TTL away.
	waitFor(t, ctx, func() bool { return !alive(child) && !alive(grandchild) })
	if took := time.Since(stopped); took > 3*time.Second {
		t.Errorf("the group died %v after the server stopped, after its TTL of 3s", took)
	}
	if code := exitCode(cmd.Wait()); code != 76 {
		t.Errorf("exit code %d, want 76; output:\n%s", code, output.String())
	}
	t.Logf("output: %s", output.String())
}

// TestRunKilled: kill -9 of `distlock run` takes its command along.
func TestRunKilled(t *testing.T) {
	srv := startServer(t, "--in-memory")
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	dir := t.TempDir()
	cmd := srv.run(ctx, nil, "job", "--ttl", "5s", "--", "sh", "-c", "sleep 60 & echo $! >"+dir+"/grandchild; echo $$ >"+dir+"/child; wait")
	child, grandchild := readPID(t, ctx, dir+"/child"), readPID(t, ctx, dir+"/grandchild")
	if err := cmd.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	cmd.Wait()
	waitFor(t, ctx, func() bool { return !alive(child) && !alive(grandchild) })
}

// TestRunAnotherCluster: whoever holds a lock is told that the server which
// answers has another history than the one before, and that the lock is lost.
func TestRunAnotherCluster(t *testing.T) {
	srv := startServer(t, "--data-dir", t.TempDir())
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	started := t.TempDir() + "/started"
	var output bytes.Buffer
	cmd := srv.run(ctx, &output, "job", "--ttl", "6s", "--", "sh", "-c", "echo $$ >"+started+"; sleep 60")
	readPID(t, ctx, started)
	srv.kill()
	srv.args = []string{"--data-dir", t.TempDir()}
	srv.start()
	if code := exitCode(cmd.Wait()); code != 76 {
		t.Errorf("exit code %d, want 76", code)
	}
	if got := output.String(); !strings.Contains(got, "distlock: another cluster answers: it was ") {
		t.Error(got)
	}
	t.Logf("output: %s", output.String())
}
