// Package filefence guards files and directories on a local disk.
//
//	guard, err := filefence.New("/srv/reports")
//	...
//	err = guard.Write(ctx, "daily.csv", lock.Pass(), filefence.Bytes(text, 0o644))
//
// A resource is one entry of the guard's directory: a file or a directory,
// replaced as a whole. Readers open Path and see an old version or a new one,
// never half of one; for a directory that is replaced there is a moment with
// neither, and Read waits for it to pass.
//
// # How a write is made
//
// Everything that the guard keeps stands in the subdirectory .fence, three
// names for a resource: a lock file, a token file with the stored floor, and
// the version being written. A write takes the lock (flock, which ends with its
// process), compares, makes the new version under a temporary name, syncs it to
// the disk, and renames it. Where the floor rises with the write, the token
// file is replaced first and names the version that goes with it: that rename
// is the moment at which the write happens. A process that dies before it
// leaves no trace, and what one that dies after it has left undone is done by
// whoever takes the lock next. An unguarded reader may see the old version
// until then; a holder that calls Raise before it reads does not.
//
// # Where it holds
//
// On one machine: flock and rename over a network file system promise less.
// Every writer has to go through the guard, and nothing stops one that does
// not. A process that is paused in the middle of a write keeps the lock: others
// wait for it, as long as their contexts allow, until it goes on or is killed.
// Where the file system ignores case, as on macOS, names must differ in more
// than case.
//
// The package works on Linux, macOS and the BSDs; elsewhere all methods return
// errors.ErrUnsupported.
package filefence

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/distlock/distlock/fence"
	"github.com/distlock/distlock/internal/flock"
)

// Content makes the new version of a resource at path: a file, or a directory
// with what belongs into it. Nothing is there when it is called. It runs while
// the resource is locked, and must not use the guard for the same resource. The
// guard syncs what it has made, and throws it away when it returns an error.
type Content func(path string) error

// Bytes is a file with the given content and permissions (before umask).
func Bytes(content []byte, perm fs.FileMode) Content {
	return func(path string) error { return os.WriteFile(path, content, perm) }
}

// Stream is a file with the given permissions (before umask) and what write
// writes to it.
func Stream(perm fs.FileMode, write func(io.Writer) error) Content {
	return func(path string) error {
		f, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_EXCL, perm)
		if err != nil {
			return err
		}
		return errors.Join(write(f), f.Close())
	}
}

// Guard guards the entries of one directory. All methods are safe for use by
// any number of goroutines and processes.
type Guard struct {
	root string
	own  string // the subdirectory that the guard keeps for itself

	// at is called at each step of a write where a process may die; an error
	// ends the write there, with nothing tidied. For tests.
	at func(step string) error
}

var _ fence.Guard[Content] = (*Guard)(nil)

// New guards the entries of the directory root, which has to exist.
func New(root string) (*Guard, error) {
	own := filepath.Join(root, ".fence")
	if err := os.Mkdir(own, 0o777); err != nil && !errors.Is(err, fs.ErrExist) {
		return nil, fmt.Errorf("filefence: %w", err)
	}
	if err := syncPath(root); err != nil {
		return nil, fmt.Errorf("filefence: %w", err)
	}
	return &Guard{root: root, own: own, at: func(string) error { return nil }}, nil
}

// Path is where the resource stands. A name of letters, digits and "._-" that
// does not begin with a dot is a file name as it is; other bytes are escaped
// as in URLs, and a long name is cut and marked with its hash.
func (g *Guard) Path(resource string) string { return filepath.Join(g.root, fileName(resource)) }

// Write replaces the resource by what content makes, as fence.Guard describes
// it.
func (g *Guard) Write(ctx context.Context, resource string, pass fence.Pass, content Content) error {
	return g.locked(ctx, resource, func(e *entry) error {
		next, err := fence.Next(resource, e.floor, pass)
		if err != nil {
			return err
		}
		made := e.version(e.number + 1)
		if err := os.RemoveAll(made); err != nil { // of a process that died
			return err
		}
		if err := content(made); err != nil {
			os.RemoveAll(made)
			return err
		}
		if err := g.at("made"); err != nil {
			return err
		}
		isDir, err := syncTree(made)
		if err != nil {
			os.RemoveAll(made)
			return err
		}
		if err := g.at("synced"); err != nil {
			return err
		}
		if next == e.floor && !isDir && !isDirectory(e.path) {
			// The floor stays: the rename alone is the write.
			if err := os.Rename(made, e.path); err != nil {
				os.RemoveAll(made)
				return err
			}
			return errors.Join(syncPath(g.root), syncPath(g.own))
		}
		if err := e.commit(next, e.number+1); err != nil {
			return err
		}
		if err := g.at("committed"); err != nil {
			return err
		}
		return e.finish()
	})
}

// Raise stores the higher floor without writing, as fence.Guard describes it.
func (g *Guard) Raise(ctx context.Context, resource string, pass fence.Pass) error {
	return g.locked(ctx, resource, func(e *entry) error {
		next, err := fence.Next(resource, e.floor, pass)
		if err != nil || next == e.floor {
			return err
		}
		return e.commit(next, e.number)
	})
}

// Read calls read with the resource's path while nobody writes to it. There is
// nothing at path when the resource was never written. Reading Path without it
// is right too, but see the package's comment on directories.
func (g *Guard) Read(ctx context.Context, resource string, read func(path string) error) error {
	return g.locked(ctx, resource, func(e *entry) error { return read(e.path) })
}

// locked runs do while no other process or goroutine is at the resource, after
// it has finished what a dead one has left.
func (g *Guard) locked(ctx context.Context, resource string, do func(*entry) error) error {
	if err := context.Cause(ctx); err != nil {
		return err
	}
	name := fileName(resource)
	f, err := os.OpenFile(filepath.Join(g.own, name+".lock"), os.O_RDWR|os.O_CREATE, 0o666)
	if err != nil {
		return err
	}
	defer f.Close() // and so unlocks
	// A wait in the kernel could not be called off: ask again and again.
	for pause := 100 * time.Microsecond; ; pause = min(2*pause, 20*time.Millisecond) {
		ok, err := flock.Try(f)
		if err != nil {
			return &fs.PathError{Op: "lock", Path: f.Name(), Err: err}
		}
		if ok {
			break
		}
		select {
		case <-ctx.Done():
			return context.Cause(ctx)
		case <-time.After(pause):
		}
	}
	e := &entry{guard: g, path: filepath.Join(g.root, name), own: filepath.Join(g.own, name)}
	if err := e.load(); err != nil {
		return err
	}
	if err := e.finish(); err != nil {
		return err
	}
	return do(e)
}

// entry is a resource while it is locked.
type entry struct {
	guard *Guard
	path  string
	own   string // beginning of the names of what the guard keeps

	// What the token file says.
	floor  fence.Token
	number uint64 // of the version that goes with the floor
}

// version is where the version with that number is made.
func (e *entry) version(number uint64) string { return fmt.Sprintf("%s.%d", e.own, number) }

// The token file, one line. It is replaced as a whole, and so what cannot be
// read is damage: it is refused, and never taken for a floor of 0.
const tokenFormat = "distlock-fence 1 floor %d version %d\n"

func (e *entry) load() error {
	name := e.own + ".token"
	text, err := os.ReadFile(name)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	_, err = fmt.Sscanf(string(text), tokenFormat, &e.floor, &e.number)
	if err != nil || fmt.Sprintf(tokenFormat, e.floor, e.number) != string(text) || e.floor > fence.MaxToken {
		return fmt.Errorf("%s is damaged: %.100q", name, text)
	}
	return nil
}

// commit stores a floor and the number of the version that goes with it.
func (e *entry) commit(floor fence.Token, number uint64) error {
	fresh := e.own + ".token.new"
	f, err := os.OpenFile(fresh, os.O_WRONLY|os.O_CREATE|os.O_TRUNC, 0o666)
	if err != nil {
		return err
	}
	_, err = fmt.Fprintf(f, tokenFormat, floor, number)
	if err := errors.Join(err, f.Sync(), f.Close()); err != nil {
		return err
	}
	// The version's name has to be on the disk before the token file says it.
	if err := syncPath(e.guard.own); err != nil {
		return err
	}
	if err := e.guard.at("token made"); err != nil {
		return err
	}
	if err := os.Rename(fresh, e.own+".token"); err != nil {
		return err
	}
	e.floor, e.number = floor, number
	return syncPath(e.guard.own)
}

// finish puts the version that was committed last into its place, unless that
// is done.
func (e *entry) finish() error {
	made := e.version(e.number)
	info, err := os.Lstat(made)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	old := e.own + ".old"
	aside := info.IsDir() || isDirectory(e.path)
	if aside { // no rename replaces a directory that is not empty
		if err := os.RemoveAll(old); err != nil {
			return err
		}
		if err := os.Rename(e.path, old); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
		if err := e.guard.at("aside"); err != nil {
			return err
		}
	}
	if err := os.Rename(made, e.path); err != nil {
		return err
	}
	if err := errors.Join(syncPath(e.guard.root), syncPath(e.guard.own)); err != nil {
		return err
	}
	if aside {
		return os.RemoveAll(old)
	}
	return nil
}

func isDirectory(path string) bool {
	info, err := os.Lstat(path)
	return err == nil && info.IsDir()
}

// syncTree brings path, and all that is in it, to the disk.
func syncTree(path string) (isDir bool, err error) {
	info, err := os.Lstat(path)
	if err != nil {
		return false, fmt.Errorf("filefence: the write has made nothing: %w", err)
	}
	err = filepath.WalkDir(path, func(path string, d fs.DirEntry, err error) error {
		if err != nil || !d.IsDir() && !d.Type().IsRegular() {
			return err
		}
		return syncPath(path)
	})
	return info.IsDir(), err
}

func syncPath(path string) error {
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	return errors.Join(f.Sync(), f.Close())
}

// longest is the length of a name from which on it is cut: what is made of a
// longer one is longer than any that is not cut, and so cannot be taken for
// one. With the guard's own endings both stay below 255.
const longest = 200

func fileName(resource string) string {
	var b strings.Builder
	for i := range len(resource) {
		c := resource[i]
		switch {
		case 'a' <= c && c <= 'z', 'A' <= c && c <= 'Z', '0' <= c && c <= '9', c == '_', c == '-', c == '.' && i > 0:
			b.WriteByte(c)
		default:
			fmt.Fprintf(&b, "%%%02X", c)
		}
	}
	switch name := b.String(); {
	case name == "":
		return "%"
	case len(name) > longest:
		return fmt.Sprintf("%s%%%x", name[:longest-2*sha256.Size+4], sha256.Sum256([]byte(resource)))
	default:
		return name
	}
}
