//go:build !linux

package main

import (
	"errors"

	"github.com/distlock/distlock/client"
)

const guardCommand = "__guard"

func runGuard([]string) int { return exitUsage }

// guard needs Linux: a child that dies with its parent, a subreaper, and a
// clock that counts suspension.
type guard struct{}

func (g *guard) start(*client.Lock, []string) error {
	return errors.New("distlock run needs Linux")
}
func (g *guard) renewed()           {}
func (g *guard) send(string, int64) {}
func (g *guard) wait() verdict      { return verdict{err: errGuardDied} }
