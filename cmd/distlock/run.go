package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/signal"
	"strconv"
	"syscall"
	"time"

	"github.com/spf13/cobra"

	"github.com/distlock/distlock/client"
)

func runCommand() *cobra.Command {
	r, f := &remote{}, &acquireFlags{}
	cmd := &cobra.Command{
		Use: "run NAME... -- CMD ARGS...", Short: "Run a command while holding a lock",
		Long: `Run a command while holding a lock, which is waited for and kept alive.

The command runs without a shell in a process group of its own, with
DISTLOCK_NAME, DISTLOCK_TOKEN, DISTLOCK_FLOOR, DISTLOCK_LEASE_ID and
DISTLOCK_DEADLINE set. Signals are passed on to it. When the lock cannot be
renewed it gets SIGTERM, and its whole group SIGKILL before the lock can be
granted to another. When it ends, what is left of its group is killed, and only
then is the lock released.

Exit codes: the command's own; 75 not acquired in time; 76 lock lost.`,
		Example: `  distlock run nightly -- ./backup.sh
  distlock run nightly --ttl 10s --wait 1h -- ./backup.sh --full`,
		Args: func(cmd *cobra.Command, args []string) error {
			dash := cmd.ArgsLenAtDash()
			switch {
			case dash < 0 || dash == len(args):
				return usage("run needs a command after --, as in: distlock run NAME -- CMD ARGS")
			case dash == 0:
				return usage("run needs the NAME of a lock before --")
			}
			return nil
		},
		RunE: func(cmd *cobra.Command, args []string) error {
			opts, err := f.options(cmd)
			if err != nil {
				return err
			}
			if cmd.Flags().Changed("wait") {
				opts = append(opts, client.Wait(f.wait))
			}
			dash := cmd.ArgsLenAtDash()
			return (&runner{remote: r, names: args[:dash], argv: args[dash:], opts: opts}).run()
		},
	}
	f.add(cmd.Flags(), client.DefaultTTL)
	cmd.Flags().Lookup("wait").Usage = "time to wait for the lock (default: without end)"
	return r.add(cmd)
}

// runner is one `distlock run`. The command's parent is not this process but
// a guard (see guard_linux.go), which kills it in time even when this process
// has been stopped or killed.
type runner struct {
	*remote
	names []string
	argv  []string
	opts  []client.AcquireOption
}

func (r *runner) run() error {
	signals := make(chan os.Signal, 16)
	signal.Notify(signals, forwarded...)
	defer signal.Stop(signals)
	c, err := r.dial(client.WithOnWarning(func(w client.Warning) {
		var other *client.ClusterError
		if errors.As(w.Err, &other) && w.LeaseID == 0 {
			fmt.Fprintln(os.Stderr, "distlock: "+other.Error())
			return
		}
		fmt.Fprintln(os.Stderr, "distlock: no renewal for half the TTL; the command ends if this lasts")
	}))
	if err != nil {
		return err
	}
	defer c.Close()

	g := &guard{}
	lock, err := r.acquire(c, g, signals)
	if err != nil {
		return err
	}
	if err := g.start(lock, r.argv); err != nil {
		err = fmt.Errorf("cannot run %s: %w", r.argv[0], err)
		if releaseErr := r.release(lock); releaseErr != nil {
			err = fmt.Errorf("%w; and the lock was not released: %w", err, releaseErr)
		}
		return &exitError{127, err}
	}
	ended := make(chan verdict, 1)
	go func() { ended <- g.wait() }()
	lost := lock.Done()
	var v verdict
	for running := true; running; {
		select {
		case s := <-signals:
			g.send("signal", int64(s.(syscall.Signal)))
		case <-lost:
			// Whoever broke it may have granted it already: no grace.
			g.send("kill", 0)
			lost = nil
		case v = <-ended:
			running = false
		}
	}
	if v.err != nil {
		r.release(lock)
		return &exitError{127, fmt.Errorf("cannot run %s: %w", r.argv[0], v.err)}
	}
	cause := lock.Err()
	releaseErr := r.release(lock)
	switch {
	case cause != nil || v.killed:
		if cause == nil {
			cause = releaseErr
		}
		if cause == nil {
			cause = &client.LostError{Cause: client.CauseUnreachable, Names: lock.Names(), LeaseID: lock.LeaseID(), Token: lock.Token()}
		}
		return &exitError{exitLost, fmt.Errorf("%w; the command was stopped", cause)}
	case releaseErr != nil:
		fmt.Fprintln(os.Stderr, "distlock: the command ended, and the lock was not released: "+line(releaseErr))
	}
	if v.code != 0 {
		return &exitError{code: v.code}
	}
	return nil
}

// acquire waits for the lock; a signal ends the wait.
func (r *runner) acquire(c *client.Client, g *guard, signals <-chan os.Signal) (*client.Lock, error) {
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	type result struct {
		lock *client.Lock
		err  error
	}
	got := make(chan result, 1)
	go func() {
		lock, err := c.AcquireAll(ctx, r.names, append(r.opts, client.OnRenew(func(time.Time) { g.renewed() }))...)
		got <- result{lock, err}
	}()
	for {
		select {
		case res := <-got:
			if res.err != nil {
				return nil, notAcquired(res.err)
			}
			return res.lock, nil
		case s := <-signals:
			if s == windowChanged {
				continue
			}
			cancel()
			if res := <-got; res.err == nil { // granted in the race
				r.release(res.lock)
			}
			return nil, &exitError{code: 128 + int(s.(syscall.Signal))}
		}
	}
}

func (r *runner) release(lock *client.Lock) error {
	ctx, cancel := context.WithTimeout(context.Background(), min(r.timeout, 3*time.Second))
	defer cancel()
	return lock.Release(ctx)
}

// environment is what the command finds set.
func environment(lock *client.Lock) []string {
	return append(os.Environ(),
		"DISTLOCK_NAME="+lock.Name(),
		"DISTLOCK_TOKEN="+lock.Token().String(),
		"DISTLOCK_FLOOR="+lock.Pass().Floor.String(),
		"DISTLOCK_LEASE_ID="+strconv.FormatUint(lock.LeaseID(), 10),
		"DISTLOCK_DEADLINE="+lock.Deadline().Format(time.RFC3339Nano),
	)
}

// verdict is how the command ended.
type verdict struct {
	code   int   // its exit code, or 128 and the signal's number
	killed bool  // the guard ended it because the lock was in danger or lost
	err    error // it could not be started
}

var errGuardDied = errors.New("its guard was killed")
