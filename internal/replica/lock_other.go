//go:build !(darwin || dragonfly || freebsd || linux || netbsd || openbsd)

package replica

import (
	"errors"
	"os"
)

// tryLock would let two servers write one log: they keep none on disk here.
func tryLock(*os.File) (bool, error) { return false, errors.ErrUnsupported }
