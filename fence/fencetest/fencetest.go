// Package fencetest holds the tests that every guard has to pass, those of
// this project and those that users write for stores of their own.
//
//	func TestGuard(t *testing.T) {
//		fencetest.Run(t, func(t *testing.T) fencetest.Subject { return open(t) })
//	}
package fencetest

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"

	"github.com/distlock/distlock/fence"
)

// Subject is the guard under test with a store behind it that keeps one text
// per resource. All methods may be called from any goroutine.
type Subject interface {
	fence.Guard[string]
	// Read returns the resource's text, "" for one never written.
	Read(ctx context.Context, resource string) (string, error)
}

// Interrupter is a Subject that can die half way. Implement it for every store
// in which the check and the write are steps of their own.
type Interrupter interface {
	Subject
	// Interrupt begins a Write that must succeed, and breaks off after the
	// check and the write, before both are committed, as if the process had
	// been killed there. It returns an error.
	Interrupt(ctx context.Context, resource string, pass fence.Pass, text string) error
}

const (
	// interleavings is how many races between writers Run lets happen, and of
	// each other kind of race, a tenth.
	interleavings = 10_000
	// abreast is how many races run at a time, each at a resource of its own:
	// a store that syncs for several writers at once is kept busy.
	abreast = 8
)

// Run runs every test of the contract against subjects made by open, each with
// one of its own. open ends its subject by t.Cleanup.
func Run(t *testing.T, open func(t *testing.T) Subject) {
	t.Helper()
	for _, c := range checks {
		t.Run(c.name, func(t *testing.T) {
			if err := c.run(t.Context(), open(t)); err != nil {
				t.Error(err)
			}
		})
	}
}

// checks are the contract, a test each. They answer with an error in place of
// failing a test, so that this package's own tests can hold them against
// guards that are wrong.
var checks = []struct {
	name string
	run  func(context.Context, Subject) error
}{
	{"FirstWrite", firstWrite},
	{"SameTokenAgain", sameTokenAgain},
	{"HigherToken", higherToken},
	{"LowerToken", lowerToken},
	{"RaiseAlone", raiseAlone},
	{"RaiseStale", raiseStale},
	{"InvalidPass", invalidPass},
	{"SharedFloors", sharedFloors},
	{"FloorNeverFalls", floorNeverFalls},
	{"ResourcesApart", resourcesApart},
	{"OddNames", oddNames},
	{"Interrupted", interrupted},
	{"Canceled", canceled},
	{"Concurrent", concurrent},
	{"ConcurrentShared", concurrentShared},
	{"ConcurrentRaise", concurrentRaise},
}

// exclusive is the pass of an exclusive lock's grant.
func exclusive(token fence.Token) fence.Pass { return fence.Pass{Token: token, Floor: token} }

// script runs steps in order against one resource and stops at the first that
// does not go as it should.
type script struct {
	ctx      context.Context
	s        Subject
	resource string
	err      error
}

func on(ctx context.Context, s Subject, resource string) *script {
	return &script{ctx: ctx, s: s, resource: resource}
}

func (c *script) fail(format string, args ...any) {
	if c.err == nil {
		c.err = fmt.Errorf("resource %.40q: "+format, append([]any{c.resource}, args...)...)
	}
}

func (c *script) write(pass fence.Pass, text string) *script {
	if c.err == nil {
		if err := c.s.Write(c.ctx, c.resource, pass, text); err != nil {
			c.fail("Write(%v, %q): %w", pass, text, err)
		}
	}
	return c
}

func (c *script) raise(pass fence.Pass) *script {
	if c.err == nil {
		if err := c.s.Raise(c.ctx, c.resource, pass); err != nil {
			c.fail("Raise(%v): %w", pass, err)
		}
	}
	return c
}

// refused expects a write to be turned away as stale, by a floor of stored.
func (c *script) refused(pass fence.Pass, stored fence.Token) *script {
	if c.err == nil {
		c.stale("Write", c.s.Write(c.ctx, c.resource, pass, "stale"), pass, stored)
	}
	return c
}

func (c *script) raiseRefused(pass fence.Pass, stored fence.Token) *script {
	if c.err == nil {
		c.stale("Raise", c.s.Raise(c.ctx, c.resource, pass), pass, stored)
	}
	return c
}

func (c *script) stale(what string, err error, pass fence.Pass, stored fence.Token) {
	var stale *fence.StaleError
	want := fence.StaleError{Resource: c.resource, Token: pass.Token, Stored: stored}
	switch {
	case err == nil:
		c.fail("%s(%v) was accepted, over a stored floor of %d", what, pass, stored)
	case !errors.As(err, &stale):
		c.fail("%s(%v) = %w, want a *fence.StaleError", what, pass, err)
	case *stale != want:
		c.fail("%s(%v) = %+v, want %+v", what, pass, *stale, want)
	}
}

func (c *script) invalid(pass fence.Pass) *script {
	if c.err == nil {
		for what, err := range map[string]error{
			"Write": c.s.Write(c.ctx, c.resource, pass, "invalid"),
			"Raise": c.s.Raise(c.ctx, c.resource, pass),
		} {
			if !errors.Is(err, fence.ErrInvalidPass) {
				c.fail("%s(%v) = %v, want fence.ErrInvalidPass", what, pass, err)
			}
		}
	}
	return c
}

func (c *script) reads(want string) *script {
	if c.err == nil {
		text, err := c.s.Read(c.ctx, c.resource)
		if err != nil {
			c.fail("Read: %w", err)
		} else if text != want {
			c.fail("Read = %.80q, want %.80q", text, want)
		}
	}
	return c
}

func firstWrite(ctx context.Context, s Subject) error {
	return on(ctx, s, "r").reads("").write(exclusive(7), "a").reads("a").err
}

func sameTokenAgain(ctx context.Context, s Subject) error {
	return on(ctx, s, "r").write(exclusive(7), "a").write(exclusive(7), "b").reads("b").
		raise(exclusive(7)).write(exclusive(7), "c").reads("c").err
}

func higherToken(ctx context.Context, s Subject) error {
	return on(ctx, s, "r").write(exclusive(7), "a").write(exclusive(8), "b").reads("b").
		write(exclusive(fence.MaxToken), "c").reads("c").refused(exclusive(8), fence.MaxToken).err
}

func lowerToken(ctx context.Context, s Subject) error {
	return on(ctx, s, "r").write(exclusive(7), "a").refused(exclusive(6), 7).refused(exclusive(1), 7).reads("a").
		write(exclusive(7), "b").reads("b").err
}

func raiseAlone(ctx context.Context, s Subject) error {
	return on(ctx, s, "r").raise(exclusive(7)).reads("").refused(exclusive(6), 7).reads("").
		write(exclusive(7), "a").raise(exclusive(9)).reads("a").refused(exclusive(7), 9).reads("a").err
}

func raiseStale(ctx context.Context, s Subject) error {
	return on(ctx, s, "r").write(exclusive(7), "a").raiseRefused(exclusive(6), 7).
		raise(exclusive(8)).raiseRefused(exclusive(7), 8).reads("a").err
}

func invalidPass(ctx context.Context, s Subject) error {
	c := on(ctx, s, "r")
	for _, p := range []fence.Pass{{}, {Token: 0, Floor: 1}, {Token: 5, Floor: 0}, {Token: 5, Floor: 6}, exclusive(fence.MaxToken + 1)} {
		c.invalid(p)
	}
	// None of them has left a trace.
	return c.reads("").write(exclusive(1), "a").reads("a").err
}

// sharedFloors is a semaphore of three, one of whose holders is replaced: the
// two that are left go on beside the new one.
func sharedFloors(ctx context.Context, s Subject) error {
	pass := func(token, floor fence.Token) fence.Pass { return fence.Pass{Token: token, Floor: floor} }
	return on(ctx, s, "r").
		write(pass(3, 3), "a").write(pass(4, 3), "b").write(pass(5, 3), "c").
		// Any order is right while all three hold.
		write(pass(3, 3), "d").write(pass(5, 3), "e").write(pass(4, 3), "f").reads("f").
		// 3 is lost; the lowest that lives is 4 when 6 is granted.
		write(pass(6, 4), "g").refused(pass(3, 3), 4).reads("g").
		write(pass(4, 3), "h").write(pass(5, 3), "i").write(pass(6, 4), "j").reads("j").
		raise(pass(7, 6)).refused(pass(5, 3), 6).write(pass(6, 4), "k").reads("k").err
}

func floorNeverFalls(ctx context.Context, s Subject) error {
	return on(ctx, s, "r").write(exclusive(7), "a").
		// A pass with an older floor may write, and may not lower the floor.
		write(fence.Pass{Token: 9, Floor: 2}, "b").refused(exclusive(6), 7).
		raise(fence.Pass{Token: 9, Floor: 2}).refused(exclusive(6), 7).reads("b").err
}

func resourcesApart(ctx context.Context, s Subject) error {
	if err := on(ctx, s, "a").write(exclusive(9), "9").err; err != nil {
		return err
	}
	if err := on(ctx, s, "b").reads("").write(exclusive(3), "3").reads("3").err; err != nil {
		return err
	}
	return on(ctx, s, "a").reads("9").refused(exclusive(3), 9).err
}

// oddNames: every name is a resource of its own, whatever its bytes mean to
// the store's language.
func oddNames(ctx context.Context, s Subject) error {
	names := []string{
		" ", "a ", "A", "a", "a/b", "../a", ".", `it's "quoted" \ back`, "'; DROP TABLE fence; --", "a\x00b", "a\x00", "%s%n", "*", "{a}:b",
		"line\nbreak", "ключ", "🔒", "e\u0301", "é", strings.Repeat("n", 10<<10), strings.Repeat("n", 10<<10-1) + "m",
	}
	for i, name := range names {
		if err := on(ctx, s, name).reads("").write(exclusive(fence.Token(100+i)), name).err; err != nil {
			return err
		}
	}
	for i, name := range names {
		token := fence.Token(100 + i)
		if err := on(ctx, s, name).reads(name).refused(exclusive(token-1), token).reads(name).err; err != nil {
			return err
		}
	}
	return nil
}

// interrupted: a write that dies between check and commit leaves neither its
// text nor its floor.
func interrupted(ctx context.Context, s Subject) error {
	i, ok := s.(Interrupter)
	if !ok {
		return nil // check and write are one step of the store
	}
	c := on(ctx, s, "r").write(exclusive(5), "a")
	if c.err == nil {
		if err := i.Interrupt(ctx, "r", exclusive(9), "half"); err == nil {
			return errors.New("an interrupted write returned no error")
		}
	}
	return c.reads("a").write(exclusive(5), "b").reads("b").refused(exclusive(4), 5).write(exclusive(9), "c").reads("c").err
}

// canceled: a context that has ended changes nothing.
func canceled(ctx context.Context, s Subject) error {
	c := on(ctx, s, "r").write(exclusive(5), "a")
	if c.err != nil {
		return c.err
	}
	ended, cancel := context.WithCancel(ctx)
	cancel()
	if err := s.Write(ended, "r", exclusive(9), "late"); err == nil {
		return errors.New("a write with an ended context was accepted")
	}
	if err := s.Raise(ended, "r", exclusive(9)); err == nil {
		return errors.New("a raise with an ended context was accepted")
	}
	return c.reads("a").write(exclusive(5), "b").reads("b").err
}

// concurrent lets writers race, each with a token of its own.
func concurrent(ctx context.Context, s Subject) error {
	return races(ctx, s, interleavings, race)
}

// concurrentShared lets the holders of a semaphore race, while one of them is
// replaced.
func concurrentShared(ctx context.Context, s Subject) error {
	return races(ctx, s, interleavings/10, raceShared)
}

// concurrentRaise lets a holder raise the floor and read, while the one before
// writes late.
func concurrentRaise(ctx context.Context, s Subject) error {
	return races(ctx, s, interleavings/10, raceRaise)
}

// races runs n races, several at a time, each at a resource of its own, until
// one goes wrong.
func races(ctx context.Context, s Subject, n int, race func(context.Context, Subject, string) error) error {
	ctx, stop := context.WithCancelCause(ctx)
	defer stop(nil)
	var (
		rounds atomic.Int64
		group  sync.WaitGroup
	)
	for range abreast {
		group.Go(func() {
			for ctx.Err() == nil {
				round := rounds.Add(1)
				if round > int64(n) {
					return
				}
				if err := race(ctx, s, "race/"+strconv.FormatInt(round, 10)); err != nil {
					stop(fmt.Errorf("race %d: %w", round, err))
				}
			}
		})
	}
	group.Wait()
	return context.Cause(ctx)
}

// race lets four writers start at once, in any order. In the end the text is
// that of the highest token, which is never turned away; and no write that
// began after one with a higher token was acknowledged may be accepted.
func race(ctx context.Context, s Subject, resource string) error {
	const writers = 4
	var (
		mu    sync.Mutex
		acked fence.Token // highest token acknowledged
		errs  []error
		group sync.WaitGroup
	)
	start := make(chan struct{})
	for _, n := range rand.Perm(writers) {
		token := fence.Token(n + 1)
		group.Go(func() {
			<-start
			mu.Lock()
			before := acked
			mu.Unlock()
			err := s.Write(ctx, resource, exclusive(token), token.String())
			mu.Lock()
			defer mu.Unlock()
			var stale *fence.StaleError
			switch {
			case err == nil && token < before:
				errs = append(errs, fmt.Errorf("token %d was accepted after %d had been acknowledged", token, before))
			case err == nil:
				acked = max(acked, token)
			case !errors.As(err, &stale):
				errs = append(errs, fmt.Errorf("token %d: %w", token, err))
			case token == writers:
				errs = append(errs, fmt.Errorf("the highest token was turned away: %w", err))
			}
		})
	}
	close(start)
	group.Wait()
	if len(errs) > 0 {
		return errors.Join(errs...)
	}
	return on(ctx, s, resource).reads(strconv.Itoa(writers)).refused(exclusive(writers-1), writers).err
}

// raceShared is a semaphore of three, held by 3, 4 and 5, where 6 replaces 3.
// All write at once: only 3 may be turned away, and only by 6.
func raceShared(ctx context.Context, s Subject, resource string) error {
	var (
		replaced atomic.Bool // 6 has been acknowledged
		errs     = make([]error, 4)
		group    sync.WaitGroup
	)
	start := make(chan struct{})
	for i, pass := range []fence.Pass{{Token: 3, Floor: 3}, {Token: 4, Floor: 3}, {Token: 5, Floor: 3}, {Token: 6, Floor: 4}} {
		group.Go(func() {
			<-start
			late := replaced.Load()
			err := s.Write(ctx, resource, pass, pass.Token.String())
			var stale *fence.StaleError
			switch {
			case pass.Token == 6 && err == nil:
				replaced.Store(true)
			case pass.Token != 3 && err != nil:
				errs[i] = fmt.Errorf("token %d: %w", pass.Token, err)
			case pass.Token == 3 && err == nil && late:
				errs[i] = errors.New("token 3 was accepted after its replacement had been acknowledged")
			case err != nil && !errors.As(err, &stale):
				errs[i] = err
			}
		})
	}
	close(start)
	group.Wait()
	if err := errors.Join(errs...); err != nil {
		return err
	}
	return on(ctx, s, resource).refused(fence.Pass{Token: 3, Floor: 3}, 4).
		write(fence.Pass{Token: 5, Floor: 3}, "e").write(fence.Pass{Token: 4, Floor: 3}, "f").reads("f").err
}

// raceRaise lets 2 raise the floor and then read, while 1 writes: what 2 reads
// is what is there when both are done, and what it writes then lasts.
func raceRaise(ctx context.Context, s Subject, resource string) error {
	var (
		late  error
		group sync.WaitGroup
	)
	start := make(chan struct{})
	group.Go(func() {
		<-start
		late = s.Write(ctx, resource, exclusive(1), "late")
	})
	close(start)
	c := on(ctx, s, resource).raise(exclusive(2))
	read, err := s.Read(ctx, resource)
	group.Wait()
	var stale *fence.StaleError
	switch {
	case c.err != nil:
		return c.err
	case err != nil:
		return err
	case late != nil && !errors.As(late, &stale):
		return late
	}
	if c.reads(read); c.err != nil {
		return fmt.Errorf("a late write came after the raise: %w", c.err)
	}
	return c.write(exclusive(2), "mine").refused(exclusive(1), 2).reads("mine").err
}
