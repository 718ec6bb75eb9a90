package main

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"os/signal"
	"runtime"
	"strings"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/distlock/distlock/client"
)

// guardCommand is the first argument of the guard: this same binary between
// `distlock run` and the command. A stopped parent cannot kill its child, so
// the guard has the deadline and kills by itself. It has a process group of
// its own, out of reach of the terminal's signals; the command dies with it
// (PR_SET_PDEATHSIG), and it kills the command when `distlock run` dies
// (its pipe closes).
//
// The parent writes lines to it: "deadline NS" (CLOCK_BOOTTIME), "signal N" and
// "kill". It writes one line back: "exit CODE KILLED" or "error TEXT".
const guardCommand = "__guard"

// guard is the parent's end.
type guard struct {
	mu   sync.Mutex
	lock *client.Lock
	ttl  time.Duration
	to   *os.File
	from *os.File
	cmd  *exec.Cmd
}

func bootNow() time.Duration {
	var ts unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_BOOTTIME, &ts); err != nil {
		panic(err) // since Linux 2.6.39 it can be read
	}
	return time.Duration(ts.Nano())
}

func (g *guard) start(lock *client.Lock, argv []string) error {
	path, err := exec.LookPath(argv[0])
	if err != nil {
		return cause(err)
	}
	self, err := os.Executable()
	if err != nil {
		return err
	}
	fromParent, to, err := os.Pipe()
	if err != nil {
		return err
	}
	from, toParent, err := os.Pipe()
	if err != nil {
		return err
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	g.lock, g.ttl, g.to, g.from = lock, lock.TTL(), to, from
	g.cmd = exec.Command(self, append([]string{guardCommand, lock.TTL().String(), path}, argv...)...)
	g.cmd.Stdin, g.cmd.Stdout, g.cmd.Stderr = os.Stdin, os.Stdout, os.Stderr
	g.cmd.ExtraFiles = []*os.File{fromParent, toParent}
	g.cmd.Env = environment(lock)
	g.cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	err = g.cmd.Start()
	fromParent.Close()
	toParent.Close()
	if err != nil {
		return err
	}
	g.deadline()
	return nil
}

// cause leaves out what the message says already.
func cause(err error) error {
	var e *exec.Error
	if errors.As(err, &e) {
		err = e.Err
	}
	var path *os.PathError
	if errors.As(err, &path) {
		return path.Err
	}
	return err
}

// renewed tells the guard of a new deadline.
func (g *guard) renewed() {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.to != nil {
		g.deadline()
	}
}

// deadline sends the lock's. The clock is read first: if this process is
// stopped before the other reading, the deadline sent is too early, not late.
func (g *guard) deadline() {
	now := bootNow()
	fmt.Fprintf(g.to, "deadline %d\n", int64(now+g.lock.Remaining()))
}

func (g *guard) send(what string, n int64) {
	g.mu.Lock()
	defer g.mu.Unlock()
	fmt.Fprintf(g.to, "%s %d\n", what, n)
}

// wait returns once the command and its whole group are dead.
func (g *guard) wait() verdict {
	text, _ := io.ReadAll(g.from)
	g.cmd.Wait()
	g.mu.Lock()
	defer g.mu.Unlock()
	g.to.Close()
	var v verdict
	if n, _ := fmt.Sscanf(string(text), "exit %d %t", &v.code, &v.killed); n == 2 {
		return v
	}
	if text, ok := strings.CutPrefix(string(text), "error "); ok {
		return verdict{err: errors.New(strings.TrimSpace(text))}
	}
	return verdict{code: 128 + int(syscall.SIGKILL), err: errGuardDied}
}

// runGuard is the guard's main: TTL, path, argv.
func runGuard(args []string) int {
	// The command's death signal is tied to the thread that starts it, which
	// must live as long as the process.
	runtime.LockOSThread()
	// Caught, and not acted on: the parent passes signals on. Ignored ones
	// would be ignored by the command too.
	signal.Notify(make(chan os.Signal, 1), append(forwarded, syscall.SIGPIPE)...)
	// What the command's group leaves behind becomes our child, to be reaped.
	unix.Prctl(unix.PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
	from, to := os.NewFile(3, "from"), os.NewFile(4, "to")
	syscall.CloseOnExec(3)
	syscall.CloseOnExec(4)
	if len(args) < 3 {
		return exitUsage
	}
	ttl, err := time.ParseDuration(args[0])
	if err != nil {
		return exitUsage
	}
	lines := make(chan string)
	go func() {
		defer close(lines)
		for s := bufio.NewScanner(from); s.Scan(); {
			lines <- s.Text()
		}
	}()
	var deadline int64
	first, ok := <-lines
	if n, _ := fmt.Sscanf(first, "deadline %d", &deadline); !ok || n != 1 {
		return exitFailed // the parent died before the command began
	}
	w := &warden{ttl: ttl, deadline: time.Duration(deadline), lines: lines}
	if w.left() <= 0 {
		fmt.Fprintln(to, "exit 137 true")
		return 0
	}
	cmd := &exec.Cmd{Path: args[1], Args: args[2:], Stdin: os.Stdin, Stdout: os.Stdout, Stderr: os.Stderr}
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true, Pdeathsig: syscall.SIGKILL}
	if err := cmd.Start(); err != nil {
		fmt.Fprintf(to, "error %v\n", cause(err))
		return 0
	}
	code, killed := w.watch(cmd.Process.Pid)
	fmt.Fprintf(to, "exit %d %t\n", code, killed)
	return 0
}

// warden ends a process group in time.
type warden struct {
	ttl      time.Duration
	deadline time.Duration // CLOCK_BOOTTIME
	lines    <-chan string
	group    int
	killed   bool
	termed   bool
}

// The command gets SIGTERM a quarter of the TTL before the deadline, and its
// group SIGKILL a twentieth before it.
func (w *warden) left() time.Duration      { return w.deadline - w.ttl/20 - bootNow() }
func (w *warden) untilTerm() time.Duration { return w.deadline - w.ttl/4 - bootNow() }

func (w *warden) watch(pid int) (code int, killed bool) {
	w.group = pid
	done := make(chan int, 1)
	go func() { done <- reap(pid) }()
	for {
		next := w.left()
		if !w.termed {
			next = min(next, w.untilTerm())
		}
		select {
		case code = <-done:
			// Nothing of the group outlives the lock.
			syscall.Kill(-w.group, syscall.SIGKILL)
			for syscall.Kill(-w.group, 0) == nil {
				var status syscall.WaitStatus
				syscall.Wait4(-w.group, &status, syscall.WNOHANG, nil)
				time.Sleep(time.Millisecond)
				syscall.Kill(-w.group, syscall.SIGKILL)
			}
			return code, w.killed
		case line, ok := <-w.lines:
			w.obey(line, ok)
		// Timers do not count suspension: the clock is looked at often.
		case <-time.After(min(max(next, 0), 250*time.Millisecond)):
		}
		switch {
		case w.left() <= 0:
			w.kill()
		case w.untilTerm() <= 0 && !w.termed:
			w.termed, w.killed = true, true
			syscall.Kill(-w.group, syscall.SIGTERM)
			syscall.Kill(-w.group, syscall.SIGCONT)
		}
	}
}

func (w *warden) kill() {
	w.killed = true
	syscall.Kill(-w.group, syscall.SIGKILL)
}

func (w *warden) obey(line string, ok bool) {
	if !ok { // the parent is gone, and nobody renews
		w.lines = nil
		w.kill()
		return
	}
	var what string
	var n int64
	fmt.Sscanf(line, "%s %d", &what, &n)
	switch what {
	case "deadline":
		w.deadline = max(w.deadline, time.Duration(n))
	case "signal":
		syscall.Kill(-w.group, syscall.Signal(n))
	case "kill":
		w.kill()
	}
}

// reap waits for the command.
func reap(pid int) int {
	for {
		var status syscall.WaitStatus
		_, err := syscall.Wait4(pid, &status, 0, nil)
		switch {
		case err == syscall.EINTR:
		case err != nil:
			return exitFailed
		case status.Exited():
			return status.ExitStatus()
		case status.Signaled():
			return 128 + int(status.Signal())
		}
	}
}
