package replica

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"time"
)

// A data directory gets another history in steps, each one rename, so that
// nothing is lost whenever the process ends, and the directory itself may be a
// mounted volume:
//
//  1. the new files are written into restoring-TIME.part;
//  2. that becomes restoring-TIME.ready: from here on it will be done;
//  3. what the directory had moves into before-restore-TIME;
//  4. restoring-TIME.ready becomes restoring-TIME.placing;
//  5. its files move up into the directory.
//
// finishReplacing goes on from wherever it stopped.
const (
	restoring     = "restoring-"
	partSuffix    = ".part"
	readySuffix   = ".ready"
	placingSuffix = ".placing"
	beforeRestore = "before-restore-"
	stampLayout   = "20060102T150405.000000000Z"
)

// rename is replaced by a test that ends the process in between.
var rename = os.Rename

// ours reports whether an entry of a data directory stays where it is: it is
// no data of a server.
func ours(name string) bool {
	return name == "lock" || name == "lost+found" || strings.HasPrefix(name, restoring) || strings.HasPrefix(name, beforeRestore)
}

// dataIn lists what a directory has of a server.
func dataIn(dir string) (names []string, err error) {
	entries, err := os.ReadDir(dir)
	for _, e := range entries {
		if !ours(e.Name()) {
			names = append(names, e.Name())
		}
	}
	return names, err
}

// replace gives a directory, which the caller has locked, the files that write
// makes. It returns where the old ones are now; "" for none. When it fails in
// write nothing has changed; later the next start or restore goes on.
func replace(dir string, now time.Time, write func(dir string) error) (movedTo string, err error) {
	old, err := filepath.Glob(filepath.Join(dir, restoring+"*"+partSuffix))
	if err != nil {
		return "", err
	}
	for _, part := range old {
		if err := os.RemoveAll(part); err != nil {
			return "", err
		}
	}
	stamp := now.UTC().Format(stampLayout)
	base := filepath.Join(dir, restoring+stamp)
	if err := os.Mkdir(base+partSuffix, 0o700); err != nil {
		return "", err
	}
	if err := write(base + partSuffix); err != nil {
		return "", errors.Join(err, os.RemoveAll(base+partSuffix))
	}
	had, err := dataIn(dir)
	if err != nil {
		return "", errors.Join(err, os.RemoveAll(base+partSuffix))
	}
	if err := move(base+partSuffix, base+readySuffix); err != nil {
		return "", err
	}
	if len(had) > 0 {
		movedTo = filepath.Join(dir, beforeRestore+stamp)
	}
	_, err = finishReplacing(dir)
	return movedTo, err
}

// finishReplacing goes on with what replace began in a directory that the
// caller has locked, and reports whether there was anything to do.
func finishReplacing(dir string) (found bool, err error) {
	ready, err := filepath.Glob(filepath.Join(dir, restoring+"*"+readySuffix))
	if err != nil {
		return false, err
	}
	for _, from := range ready {
		base := strings.TrimSuffix(from, readySuffix)
		aside := filepath.Join(dir, beforeRestore+strings.TrimPrefix(filepath.Base(base), restoring))
		if err := moveAll(dir, aside); err != nil {
			return true, err
		}
		if err := move(from, base+placingSuffix); err != nil {
			return true, err
		}
	}
	placing, err := filepath.Glob(filepath.Join(dir, restoring+"*"+placingSuffix))
	if err != nil {
		return false, err
	}
	for _, from := range placing {
		if err := moveAll(from, dir); err != nil {
			return true, err
		}
		if err := errors.Join(os.Remove(from), syncDir(dir)); err != nil {
			return true, err
		}
	}
	return len(ready)+len(placing) > 0, nil
}

// moveAll moves the data of one directory into another, which is made if there
// is anything to move.
func moveAll(from, to string) error {
	names, err := dataIn(from)
	if err != nil || len(names) == 0 {
		return err
	}
	if err := os.MkdirAll(to, 0o700); err != nil {
		return err
	}
	for _, name := range names {
		if err := rename(filepath.Join(from, name), filepath.Join(to, name)); err != nil {
			return err
		}
	}
	return errors.Join(syncDir(to), syncDir(from))
}

// move renames within a directory, and waits until that is on the disk.
func move(from, to string) error {
	if err := rename(from, to); err != nil {
		return err
	}
	return syncDir(filepath.Dir(to))
}

func syncDir(path string) error {
	dir, err := os.Open(path)
	if err != nil {
		return err
	}
	return errors.Join(dir.Sync(), dir.Close())
}

// tighten takes the rights of others away from what a directory has: earlier
// builds left that to the directory's own mode and the umask.
func tighten(dir string) error {
	return filepath.WalkDir(dir, func(path string, e os.DirEntry, err error) error {
		switch {
		case err != nil && e != nil && e.Name() == "lost+found":
			return filepath.SkipDir
		case err != nil || path == dir:
			return err
		case e.Name() == "lost+found":
			return filepath.SkipDir
		}
		info, err := e.Info()
		if err != nil || info.Mode().Perm()&0o077 == 0 || e.Type()&os.ModeSymlink != 0 {
			return err
		}
		if err := os.Chmod(path, info.Mode().Perm()&^0o077); err != nil {
			return fmt.Errorf("data directory %s: %w", dir, err)
		}
		return nil
	})
}
