//go:build linux

// Package e2e runs the real binary as its users do, in processes of its own:
// it is killed, stopped, starved of disk and talked to by strangers.
package e2e

import (
	"bufio"
	"bytes"
	"cmp"
	"context"
	"errors"
	"flag"
	"fmt"
	"math/rand/v2"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"
)

// binary is the distlock that every test here runs, built once by TestMain.
var binary string

func TestMain(m *testing.M) {
	// The tests' processes of clients are this binary too.
	for env, client := range map[string]func(args []string) error{
		holderEnv:  func(args []string) error { return holder(args[0], args[1], args[2]) },
		writerEnv:  func(args []string) error { return writer(args[0], args[1], args[2]) },
		hostileEnv: func(args []string) error { return hostile(args[0]) },
		attackEnv:  func(args []string) error { return attack(args[0], args[1]) },
		crowdEnv:   func(args []string) error { return crowd(args[0], args[1], args[2]) },
	} {
		if os.Getenv(env) == "" {
			continue
		}
		if err := client(os.Args[1:]); err != nil {
			fmt.Fprintf(os.Stderr, "%s: %v\n", env, err)
			os.Exit(1)
		}
		return
	}
	dir, err := os.MkdirTemp("", "distlock-e2e")
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	binary = filepath.Join(dir, "distlock")
	build := exec.Command("go", "build", "-o", binary, "github.com/distlock/distlock/cmd/distlock")
	build.Stdout, build.Stderr = os.Stderr, os.Stderr
	if err := build.Run(); err != nil {
		fmt.Fprintln(os.Stderr, "building distlock:", err)
		os.Exit(1)
	}
	code := m.Run()
	os.RemoveAll(dir)
	os.Exit(code)
}

var within = flag.Duration("within", 0, "how long a layer of the reliability suite goes on before it ends short of its budget; 0 for as long as it takes")

// spent reports whether that time is over.
func spent(begin time.Time) bool { return *within > 0 && time.Since(begin) > *within }

// server is one distlock server process. It can be killed and started again
// on the same address and data directory.
type server struct {
	t       testing.TB
	address string
	args    []string
	binary  string   // that it runs; by default the one under test
	wrap    []string // a command to run the server under; it leads a process group

	cmd    *exec.Cmd
	exited chan struct{} // closed once cmd has been waited for

	mu  sync.Mutex
	log bytes.Buffer // standard error of all its processes
}

// startServer starts a server on a free port of the loopback interface and
// waits until it answers. Its processes end with the test.
func startServer(t testing.TB, args ...string) *server {
	t.Helper()
	return (&server{t: t, address: freeAddress(t), args: args}).started()
}

// started starts a server as it has been prepared, for as long as the test lasts.
func (s *server) started() *server {
	s.t.Helper()
	s.t.Cleanup(func() {
		if s.cmd != nil {
			s.kill()
		}
		if s.t.Failed() {
			s.t.Logf("server log:\n%s", s.logs())
		}
	})
	s.start()
	return s
}

// lastPort is the last that freeAddress has tried; the first one is chosen at
// random, for there may be other runs of these tests beside this one.
var lastPort atomic.Uint32

func init() { lastPort.Store(rand.Uint32N(1 << 16)) }

// freeAddress returns an address that nobody listens on, and that it has not
// returned for long: below those ports that the kernel gives to connections,
// one of which might take it before its server does.
func freeAddress(t testing.TB) string {
	t.Helper()
	const first, count = 10_000, 22_000
	for range count {
		l, err := net.Listen("tcp", fmt.Sprintf("127.0.0.1:%d", first+lastPort.Add(1)%count))
		if err == nil {
			defer l.Close()
			return l.Addr().String()
		}
	}
	t.Fatal("no port is free")
	return ""
}

// spawn starts the process and does not wait for it to answer.
func (s *server) spawn() {
	s.t.Helper()
	host, port, _ := net.SplitHostPort(s.address)
	args := append([]string{"--address", host, "--port", port}, s.args...)
	exe := cmp.Or(s.binary, *against, binary)
	cmd := exec.Command(exe, args...)
	if s.wrap != nil {
		cmd = exec.Command(s.wrap[0], append(append(s.wrap[1:len(s.wrap):len(s.wrap)], exe), args...)...)
		cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	}
	pipe, err := cmd.StderrPipe()
	if err != nil {
		s.t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		s.t.Fatal(err)
	}
	s.cmd, s.exited = cmd, make(chan struct{})
	go func(cmd *exec.Cmd, exited chan struct{}) {
		lines := bufio.NewScanner(pipe)
		lines.Buffer(nil, 1<<20)
		for lines.Scan() {
			s.mu.Lock()
			s.log.WriteString(lines.Text() + "\n")
			s.mu.Unlock()
		}
		cmd.Wait()
		close(exited)
	}(cmd, s.exited)
}

// start starts the process and waits until it accepts connections.
func (s *server) start() {
	s.t.Helper()
	s.spawn()
	deadline := time.Now().Add(30 * time.Second)
	for {
		conn, err := net.DialTimeout("tcp", s.address, time.Second)
		if err == nil {
			conn.Close()
			return
		}
		select {
		case <-s.exited:
			s.t.Fatalf("the server exited: %v\n%s", s.cmd.ProcessState, s.logs())
		case <-time.After(5 * time.Millisecond):
		}
		if time.Now().After(deadline) {
			s.t.Fatalf("the server does not answer on %s\n%s", s.address, s.logs())
		}
	}
}

func (s *server) logs() string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.log.String()
}

func (s *server) signal(sig syscall.Signal) {
	s.t.Helper()
	if err := s.cmd.Process.Signal(sig); err != nil && !errors.Is(err, os.ErrProcessDone) {
		s.t.Fatal(err)
	}
}

// kill is kill -9, and returns once the process is gone.
func (s *server) kill() {
	s.signal(syscall.SIGKILL)
	<-s.exited
}

// command prepares a command of the binary that talks to the server.
func (s *server) command(ctx context.Context, args ...string) *exec.Cmd {
	cmd := exec.CommandContext(ctx, binary, args...)
	cmd.Env = append(os.Environ(), "DISTLOCK_ENDPOINTS="+s.address)
	return cmd
}
