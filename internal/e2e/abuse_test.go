//go:build linux

package e2e

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/distlock/distlock/client"
	"github.com/distlock/distlock/fence"
)

// TestDiskFull fills the disk under a working server: it stops acknowledging
// and says so; after space is made a restart has every acknowledged grant.
// It mounts a small tmpfs, for which it must be root.
func TestDiskFull(t *testing.T) {
	if os.Geteuid() != 0 && os.Getenv("CI") == "" {
		t.Skip("mounting a small file system takes root: run the tests as root to include this one")
	}
	dir := t.TempDir()
	if err := syscall.Mount("tmpfs", dir, "tmpfs", 0, "size=160m"); err != nil {
		t.Fatalf("mount: %v", err)
	}
	t.Cleanup(func() { syscall.Unmount(dir, syscall.MNT_DETACH) })
	data := filepath.Join(dir, "data")
	srv := startServer(t, "--data-dir", data)
	// A file that takes all the space the server has not reserved by now.
	ballast, err := os.Create(filepath.Join(dir, "ballast"))
	if err != nil {
		t.Fatal(err)
	}
	block := make([]byte, 1<<16)
	for {
		if _, err := ballast.Write(block); errors.Is(err, syscall.ENOSPC) {
			break
		} else if err != nil {
			t.Fatal(err)
		}
	}
	ballast.Close()

	ctx, cancel := context.WithTimeout(context.Background(), 2*time.Minute)
	defer cancel()
	var (
		mu    sync.Mutex
		known = map[string]fence.Token{}
		group sync.WaitGroup
		count atomic.Int64
	)
	big := map[string]string{"filler": strings.Repeat("x", 4000)}
	for range 16 {
		group.Add(1)
		go func() {
			defer group.Done()
			c, err := client.New([]string{srv.address})
			if err != nil {
				t.Error(err)
				return
			}
			defer c.Close()
			for ctx.Err() == nil {
				name := fmt.Sprintf("full/%d", count.Add(1))
				call, cancel := context.WithTimeout(ctx, 3*time.Second)
				lock, err := c.TryAcquire(call, name, client.TTL(time.Hour), client.NoRenew(), client.Metadata(big))
				cancel()
				if err != nil {
					return
				}
				mu.Lock()
				known[name] = lock.Token()
				mu.Unlock()
			}
		}()
	}
	group.Wait()
	if ctx.Err() != nil {
		t.Fatal("the disk never filled")
	}
	select {
	case <-srv.exited:
	case <-time.After(20 * time.Second):
		t.Fatal("the server neither exits nor acknowledges")
	}
	if code := srv.cmd.ProcessState.ExitCode(); code != 1 {
		t.Errorf("exit code %d, want 1", code)
	}
	if !strings.Contains(srv.logs(), "no space left on device") {
		t.Errorf("the log does not say why:\n%s", srv.logs())
	}
	if err := os.Remove(ballast.Name()); err != nil {
		t.Fatal(err)
	}
	srv.start()
	c, err := client.New([]string{srv.address})
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	for name, token := range known {
		check, err := c.CheckToken(ctx, name, token)
		if err != nil {
			t.Fatal(err)
		}
		if !check.Live {
			t.Fatalf("%s with token %d was acknowledged and is gone: %+v", name, token, check)
		}
	}
	t.Logf("%d grants acknowledged before the disk was full, all there after the restart; the server said:\n%s", len(known), lastLines(srv.logs(), 4))
	lock, err := c.TryAcquire(ctx, "after", client.TTL(time.Minute))
	if err != nil {
		t.Fatal(err)
	}
	for name, token := range known {
		if lock.Token() <= token {
			t.Fatalf("token %d after the restart, %s had %d before", lock.Token(), name, token)
		}
	}
}

func lastLines(text string, n int) string {
	lines := strings.Split(strings.TrimSpace(text), "\n")
	return strings.Join(lines[max(0, len(lines)-n):], "\n")
}

// TestStrangers: garbage and 10,000 idle connections on the port do not keep
// others from their locks.
func TestStrangers(t *testing.T) {
	srv := startServer(t, "--in-memory")
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	for _, garbage := range []string{
		"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
		"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + strings.Repeat("\xff", 4096),
		strings.Repeat("\x00", 1<<16),
		"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
	} {
		conn, err := net.Dial("tcp", srv.address)
		if err != nil {
			t.Fatal(err)
		}
		conn.Write([]byte(garbage))
		conn.SetReadDeadline(time.Now().Add(200 * time.Millisecond))
		io.Copy(io.Discard, conn)
		conn.Close()
	}
	c, err := client.New([]string{srv.address})
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	grants(t, ctx, c)
	p50, p99 := grants(t, ctx, c)
	const idle = 10_000
	raiseFiles(t, idle+1000)
	var conns []net.Conn
	defer func() {
		for _, conn := range conns {
			conn.Close()
		}
	}()
	for range idle {
		conn, err := net.Dial("tcp", srv.address)
		if err != nil {
			t.Fatalf("connection %d: %v", len(conns), err)
		}
		conns = append(conns, conn)
	}
	among50, among99 := grants(t, ctx, c)
	t.Logf("a client's grants: p50 %v and p99 %v alone, %v and %v among %d idle connections; the server took %d MiB",
		p50, p99, among50, among99, idle, srv.memory()>>20)
}

// raiseFiles lets this process and its server open n files.
func raiseFiles(t *testing.T, n uint64) {
	t.Helper()
	var limit syscall.Rlimit
	if err := syscall.Getrlimit(syscall.RLIMIT_NOFILE, &limit); err != nil {
		t.Fatal(err)
	}
	if limit.Cur >= n {
		return
	}
	limit.Cur = min(n, limit.Max)
	if limit.Max < n {
		limit.Cur, limit.Max = n, n
	}
	if err := syscall.Setrlimit(syscall.RLIMIT_NOFILE, &limit); err != nil {
		t.Fatalf("raising the limit of open files to %d: %v", n, err)
	}
}

// TestTooManyConnections: with few descriptors clients that only connect cannot
// keep the log from its files. A call on a connection too many is answered, and
// when the others have gone there is room again.
func TestTooManyConnections(t *testing.T) {
	srv := (&server{t: t, address: freeAddress(t), args: []string{"--data-dir", t.TempDir(), "--snapshot-mib", "1"},
		wrap: []string{"sh", "-c", `ulimit -n 128; exec "$0" "$@"`}}).started()
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	c, err := client.New([]string{srv.address})
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	held, err := c.Acquire(ctx, "held", client.TTL(2*time.Second))
	if err != nil {
		t.Fatal(err)
	}
	var idle []net.Conn
	for range 300 {
		conn, err := net.Dial("tcp", srv.address)
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close()
		idle = append(idle, conn)
	}
	late, err := client.New([]string{srv.address}, client.WithCallTimeout(5*time.Second))
	if err != nil {
		t.Fatal(err)
	}
	defer late.Close()
	waitFor(t, ctx, func() bool {
		_, err := late.Acquire(ctx, "late")
		if err == nil {
			t.Fatal("there was room")
		}
		return errors.Is(err, client.ErrExhausted) && strings.Contains(err.Error(), "connections")
	})
	// Snapshots are written meanwhile, which open files.
	pad := map[string]string{"pad": strings.Repeat("x", 4000)}
	for i := range 1000 {
		l, err := c.Acquire(ctx, fmt.Sprint("lock/", i), client.Metadata(pad))
		if err != nil {
			t.Fatal(err)
		}
		if err := l.Release(ctx); err != nil {
			t.Fatal(err)
		}
	}
	if err := held.Err(); err != nil {
		t.Errorf("who had a connection lost the lock: %v", err)
	}
	if strings.Contains(srv.logs(), "too many open files") {
		t.Error("descriptors have run out")
	}
	for _, conn := range idle {
		conn.Close()
	}
	waitFor(t, ctx, func() bool {
		_, err := late.Acquire(ctx, "late")
		return err == nil
	})
}
