// Package servers starts PostgreSQL, MariaDB and Redis for tests: each on a
// free port of the loopback interface, with its data in a temporary directory,
// as a child of the test's process, which ends it by its id.
package servers

import (
	"bytes"
	"context"
	"database/sql"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"os/user"
	"path/filepath"
	"strconv"
	"sync"
	"syscall"
	"time"

	_ "github.com/go-sql-driver/mysql" // driver "mysql"
	_ "github.com/jackc/pgx/v5/stdlib" // driver "pgx"
	"github.com/redis/go-redis/v9"
)

// Server is a running server. Stop ends it and removes its data.
type Server struct {
	// DSN is how to reach it: for sql.Open, or host and port for Redis.
	DSN string

	as     *syscall.Credential
	args   []string
	ping   func(ctx context.Context, dsn string) error
	cmd    *exec.Cmd
	dir    string
	log    *lockedBuffer
	exited chan struct{}
	err    error // of the process; valid once exited is closed
	quit   syscall.Signal
	crash  syscall.Signal
}

// Pid is the process that the server is.
func (s *Server) Pid() int { return s.cmd.Process.Pid }

// Crash ends the server as if it had crashed, and waits for it.
func (s *Server) Crash() error {
	if err := s.cmd.Process.Signal(s.crash); err != nil {
		return err
	}
	<-s.exited
	return nil
}

// Restart starts a server that has ended, where it was and with its data.
func (s *Server) Restart() error { return s.run() }

// Stop ends the server by its id, and waits for it.
func (s *Server) Stop() error {
	s.cmd.Process.Signal(s.quit)
	select {
	case <-s.exited:
	case <-time.After(20 * time.Second):
		s.cmd.Process.Kill()
		<-s.exited
	}
	return os.RemoveAll(s.dir)
}

// Durable says whether a server brings each commit to the disk. Tests about
// order need no disk, and are ten times faster without.
type Durable bool

// Postgres starts PostgreSQL.
func Postgres(durable Durable) (*Server, error) {
	initdb, err := find("initdb", "postgresql", "/usr/lib/postgresql/*/bin/initdb")
	if err != nil {
		return nil, err
	}
	postgres, err := find("postgres", "postgresql", "/usr/lib/postgresql/*/bin/postgres")
	if err != nil {
		return nil, err
	}
	as, err := asUser("postgres")
	if err != nil {
		return nil, err
	}
	dir, err := tempDir(as)
	if err != nil {
		return nil, err
	}
	data := filepath.Join(dir, "data")
	if err := run(as, dir, initdb, "--pgdata", data, "--username", "test", "--auth", "trust", "--encoding", "UTF8", "--no-sync"); err != nil {
		os.RemoveAll(dir)
		return nil, err
	}
	s, err := start(as, dir, func(port string) ([]string, string) {
		args := []string{postgres, "-D", data, "-p", port, "-k", dir, "-c", "listen_addresses=127.0.0.1", "-c", "max_connections=200"}
		if !durable {
			args = append(args, "-c", "fsync=off", "-c", "synchronous_commit=off", "-c", "full_page_writes=off")
		}
		return args, "postgres://test@127.0.0.1:" + port + "/postgres?sslmode=disable"
	}, pingSQL("pgx"))
	if err == nil {
		// A fast shutdown, and an immediate one, after which it recovers from
		// its log. Killed by SIGKILL it would leave processes behind.
		s.quit, s.crash = syscall.SIGINT, syscall.SIGQUIT
	}
	return s, err
}

// MariaDB starts MariaDB.
func MariaDB(durable Durable) (*Server, error) {
	install, err := find("mariadb-install-db", "mariadb-server", "/usr/bin/mariadb-install-db")
	if err != nil {
		return nil, err
	}
	mariadbd, err := find("mariadbd", "mariadb-server", "/usr/sbin/mariadbd")
	if err != nil {
		return nil, err
	}
	as, err := asUser("mysql")
	if err != nil {
		return nil, err
	}
	dir, err := tempDir(as)
	if err != nil {
		return nil, err
	}
	data := filepath.Join(dir, "data")
	if err := run(as, dir, install, "--no-defaults", "--datadir="+data, "--auth-root-authentication-method=normal", "--skip-test-db"); err != nil {
		os.RemoveAll(dir)
		return nil, err
	}
	return start(as, dir, func(port string) ([]string, string) {
		args := []string{mariadbd, "--no-defaults", "--datadir=" + data, "--socket=" + filepath.Join(dir, "socket"), "--pid-file=" + filepath.Join(dir, "pid"),
			"--bind-address=127.0.0.1", "--port=" + port, "--max-connections=200"}
		if !durable {
			args = append(args, "--innodb-flush-log-at-trx-commit=0", "--innodb-flush-method=O_DSYNC", "--innodb-doublewrite=0")
		}
		return args, "root@tcp(127.0.0.1:" + port + ")/mysql"
	}, pingSQL("mysql"))
}

// Redis starts Redis; args are added to its command line.
func Redis(durable Durable, args ...string) (*Server, error) {
	server, err := find("redis-server", "redis-server", "/usr/bin/redis-server")
	if err != nil {
		return nil, err
	}
	dir, err := tempDir(nil)
	if err != nil {
		return nil, err
	}
	return start(nil, dir, func(port string) ([]string, string) {
		all := []string{server, "--port", port, "--bind", "127.0.0.1", "--dir", dir, "--save", "", "--maxmemory-policy", "noeviction"}
		if durable {
			all = append(all, "--appendonly", "yes", "--appendfsync", "always")
		}
		return append(all, args...), "127.0.0.1:" + port
	}, func(ctx context.Context, address string) error {
		c := redis.NewClient(&redis.Options{Addr: address, MaxRetries: -1})
		defer c.Close()
		return c.Ping(ctx).Err()
	})
}

func pingSQL(driver string) func(context.Context, string) error {
	return func(ctx context.Context, dsn string) error {
		db, err := sql.Open(driver, dsn)
		if err != nil {
			return err
		}
		defer db.Close()
		return db.PingContext(ctx)
	}
}

// find is the newest of a server's programs. Where there is none, the error
// says what to install.
func find(name, debian, pattern string) (string, error) {
	if found, err := filepath.Glob(pattern); err == nil && len(found) > 0 {
		return found[len(found)-1], nil
	}
	if path, err := exec.LookPath(name); err == nil {
		return path, nil
	}
	return "", fmt.Errorf("these tests run against real servers, and %s is not installed: apt-get install postgresql mariadb-server redis-server (here: %s)", name, debian)
}

// asUser is the user to run a server as, nil for the test's own: PostgreSQL
// refuses to run as root.
func asUser(name string) (*syscall.Credential, error) {
	if os.Getuid() != 0 {
		return nil, nil
	}
	u, err := user.Lookup(name)
	if errors.As(err, new(user.UnknownUserError)) {
		u, err = user.Lookup("nobody")
	}
	if err != nil {
		return nil, err
	}
	uid, err := strconv.ParseUint(u.Uid, 10, 32)
	if err != nil {
		return nil, err
	}
	gid, err := strconv.ParseUint(u.Gid, 10, 32)
	if err != nil {
		return nil, err
	}
	return &syscall.Credential{Uid: uint32(uid), Gid: uint32(gid)}, nil
}

func tempDir(as *syscall.Credential) (string, error) {
	dir, err := os.MkdirTemp("", "distlock-store")
	if err == nil && as != nil {
		err = os.Chown(dir, int(as.Uid), int(as.Gid))
	}
	return dir, err
}

func command(as *syscall.Credential, dir string, name string, args ...string) *exec.Cmd {
	cmd := exec.Command(name, args...)
	cmd.Dir = dir
	cmd.Env = append(os.Environ(), "HOME="+dir, "LC_ALL=C")
	cmd.SysProcAttr = attr(as)
	return cmd
}

func run(as *syscall.Credential, dir string, name string, args ...string) error {
	if out, err := command(as, dir, name, args...).CombinedOutput(); err != nil {
		return fmt.Errorf("%s: %w\n%s", name, err, out)
	}
	return nil
}

// start starts a server and waits until it answers. Between looking for a free
// port and taking it, another may have: then it tries again.
func start(as *syscall.Credential, dir string, args func(port string) (args []string, dsn string), ping func(ctx context.Context, dsn string) error) (*Server, error) {
	var err error
	for range 3 {
		var s *Server
		if s, err = startOnce(as, dir, args, ping); err == nil {
			return s, nil
		}
	}
	os.RemoveAll(dir)
	return nil, err
}

func startOnce(as *syscall.Credential, dir string, args func(string) ([]string, string), ping func(context.Context, string) error) (*Server, error) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return nil, err
	}
	_, port, err := net.SplitHostPort(l.Addr().String())
	l.Close()
	if err != nil {
		return nil, err
	}
	all, dsn := args(port)
	s := &Server{DSN: dsn, as: as, args: all, ping: ping, dir: dir, log: new(lockedBuffer), quit: syscall.SIGTERM, crash: syscall.SIGKILL}
	return s, s.run()
}

// run starts the process, and waits until it answers.
func (s *Server) run() error {
	s.cmd, s.exited = command(s.as, s.dir, s.args[0], s.args[1:]...), make(chan struct{})
	s.cmd.Stdout, s.cmd.Stderr = s.log, s.log
	if err := s.cmd.Start(); err != nil {
		return err
	}
	go func() {
		s.err = s.cmd.Wait()
		close(s.exited)
	}()
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	for {
		err := s.ping(ctx, s.DSN)
		if err == nil {
			return nil
		}
		select {
		case <-s.exited:
			return fmt.Errorf("%s ended: %w\n%s", s.args[0], s.err, s.log)
		case <-ctx.Done():
			s.cmd.Process.Kill()
			<-s.exited
			return fmt.Errorf("%s does not answer: %w\n%s", s.args[0], err, s.log)
		case <-time.After(50 * time.Millisecond): // until it listens
		}
	}
}

// lockedBuffer is a server's output.
type lockedBuffer struct {
	mu  sync.Mutex
	buf bytes.Buffer
}

var _ io.Writer = (*lockedBuffer)(nil)

func (b *lockedBuffer) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.buf.Write(p)
}

func (b *lockedBuffer) String() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.buf.String()
}
