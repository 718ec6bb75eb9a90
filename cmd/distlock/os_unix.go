//go:build unix

package main

import (
	"os"
	"syscall"
)

// private makes every file that this process makes the owner's alone: a data
// directory holds the names of everything that is locked, and by whom.
func private() { syscall.Umask(0o077) }

// forwarded are the signals that the command gets in place of this process.
var forwarded = []os.Signal{
	syscall.SIGHUP, syscall.SIGINT, syscall.SIGQUIT, syscall.SIGTERM, syscall.SIGUSR1, syscall.SIGUSR2, windowChanged,
}

// windowChanged comes when a terminal's window has another size.
const windowChanged = syscall.SIGWINCH
