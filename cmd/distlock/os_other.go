//go:build !unix

package main

import (
	"os"
	"syscall"
)

// private is for systems whose files belong to their maker.
func private() {}

// forwarded are the signals that the command gets in place of this process.
var forwarded = []os.Signal{os.Interrupt}

// windowChanged comes never.
const windowChanged = syscall.Signal(0xff)
