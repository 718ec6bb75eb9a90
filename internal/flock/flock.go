// Package flock takes the lock of an open file, which ends with the process at the
// latest.
package flock

import "os"

// Try takes the lock of f, unless another open file has it. Closing f gives it back,
// and so does the end of the process. Where files cannot be locked like that it is
// errors.ErrUnsupported.
func Try(f *os.File) (bool, error) { return try(f) }
