//go:build !unix

package server

// openFiles is where there is no limit but memory.
func openFiles() int { return 1 << 20 }
