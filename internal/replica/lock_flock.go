//go:build darwin || dragonfly || freebsd || linux || netbsd || openbsd

package replica

import (
	"errors"
	"os"
	"syscall"
)

// tryLock takes the lock of an open file, unless another process has it. It is held
// until the file is closed.
func tryLock(f *os.File) (bool, error) {
	err := syscall.Flock(int(f.Fd()), syscall.LOCK_EX|syscall.LOCK_NB)
	if errors.Is(err, syscall.EWOULDBLOCK) {
		return false, nil
	}
	return err == nil, err
}
