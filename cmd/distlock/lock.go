package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"strconv"
	"time"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"github.com/distlock/distlock/client"
	"github.com/distlock/distlock/fence"
)

func lockCommand() *cobra.Command {
	return group("lock", "Take, give back and inspect locks",
		acquireCommand(), releaseCommand(), getCommand(), lsCommand(), checkCommand(), watchCommand())
}

// acquireFlags are shared by `lock acquire` and `run`.
type acquireFlags struct {
	ttl, wait, lockDelay time.Duration
	shared               bool
	limit                uint32
	owner, actor         string
	metadata             map[string]string
	leaseID              uint64
}

func (f *acquireFlags) add(flags *pflag.FlagSet, ttl time.Duration) {
	flags.DurationVar(&f.ttl, "ttl", ttl, "time to live of the lock's lease")
	flags.DurationVar(&f.wait, "wait", 0, "time to wait for the lock")
	flags.BoolVar(&f.shared, "shared", false, "share the lock with others that share it")
	flags.Uint32Var(&f.limit, "limit", 0, "share it with at most so many in all (a semaphore)")
	flags.DurationVar(&f.lockDelay, "lock-delay", 0, "keep the lock ungrantable for so long if it is lost")
	flags.StringVar(&f.owner, "owner", "", "who holds it (default host:pid)")
	flags.StringVar(&f.actor, "actor", "", "thread of work, for deadlock detection")
	flags.StringToStringVar(&f.metadata, "metadata", nil, "key=value, shown to those who wait")
}

func (f *acquireFlags) options(cmd *cobra.Command) ([]client.AcquireOption, error) {
	if cmd.Flags().Changed("limit") && f.limit == 0 {
		return nil, usage("--limit must be at least 1")
	}
	if f.wait < 0 {
		return nil, usage("--wait must not be negative, and is %v", f.wait)
	}
	opts := []client.AcquireOption{client.LockDelay(f.lockDelay), client.Metadata(f.metadata), client.Actor(f.actor)}
	if f.leaseID == 0 {
		opts = append(opts, client.TTL(f.ttl))
	} else if cmd.Flags().Changed("ttl") {
		return nil, usage("--ttl is the lease's own: leave it out with --lease")
	}
	if f.owner != "" {
		opts = append(opts, client.Owner(f.owner))
	}
	if f.shared {
		opts = append(opts, client.Shared())
	}
	if f.limit > 0 {
		opts = append(opts, client.Limit(f.limit))
	}
	return opts, nil
}

type acquiredView struct {
	Name    string         `json:"name"`
	Token   uint64         `json:"token"`
	Floor   uint64         `json:"floor"`
	LeaseID uint64         `json:"leaseId"`
	TTL     string         `json:"ttl"`
	Locks   []acquiredLock `json:"locks,omitempty"` // when there are several
}

type acquiredLock struct {
	Name  string `json:"name"`
	Floor uint64 `json:"floor"`
}

func acquireCommand() *cobra.Command {
	r, f := &remote{}, &acquireFlags{}
	cmd := &cobra.Command{
		Use: "acquire NAME...", Short: "Take a lock, or several at once",
		Long: `Take a lock, or several all at once, and print the fencing token.

Nothing renews the lock once the command has ended: it expires after its TTL
unless 'distlock lease keepalive' renews its lease.`,
		Example: `  distlock lock acquire orders/42 --ttl 30s
  distlock lock acquire a b --wait 10s -o json`,
		Args: needNames,
		RunE: r.run(func(cmd *cobra.Command, c *client.Client, names []string) error {
			opts, err := f.options(cmd)
			if err != nil {
				return err
			}
			opts = append(opts, client.NoRenew(), client.Wait(f.wait))
			if f.leaseID != 0 {
				opts = append(opts, client.UnderLeaseID(f.leaseID))
			}
			ctx, cancel := context.WithTimeout(cmd.Context(), f.wait+r.timeout)
			defer cancel()
			lock, err := c.AcquireAll(ctx, names, opts...)
			if err != nil {
				return notAcquired(err)
			}
			v := acquiredView{
				Name: lock.Name(), Token: uint64(lock.Token()), Floor: uint64(lock.Pass().Floor),
				LeaseID: lock.LeaseID(), TTL: lock.TTL().String(),
			}
			if len(names) > 1 {
				for _, name := range lock.Names() {
					pass, _ := lock.PassFor(name)
					v.Locks = append(v.Locks, acquiredLock{name, uint64(pass.Floor)})
				}
			}
			return r.print(cmd.OutOrStdout(), v, func(w io.Writer) {
				for _, name := range lock.Names() {
					fmt.Fprintf(w, "acquired %s: token %d, lease %d, expires in %s\n", printable(name), v.Token, v.LeaseID, v.TTL)
				}
			})
		}),
	}
	f.add(cmd.Flags(), client.DefaultTTL)
	cmd.Flags().Uint64Var(&f.leaseID, "lease", 0, "hold it under this lease, in place of one of its own")
	return r.addOutput(cmd)
}

func needNames(cmd *cobra.Command, args []string) error {
	if len(args) == 0 {
		return usage("%s needs the NAME of a lock", cmd.CommandPath())
	}
	return nil
}

// notAcquired adds to a refusal what the request waited for.
func notAcquired(err error) error {
	var e *client.Error
	if !errors.As(err, &e) || !errors.Is(err, client.ErrNotAcquired) || len(e.Obstacles) == 0 {
		return err
	}
	o := e.Obstacles[0]
	text := fmt.Sprintf("lock %q not acquired: %s", o.Name, obstacle(o))
	if e.Reason == "WAIT_TIMEOUT" {
		text = e.Message + ": " + fmt.Sprintf("lock %q is %s", o.Name, obstacle(o))
	}
	return &exitError{exitNotAcquired, errors.New(text)}
}

func obstacle(o client.Obstacle) string {
	text := "free, and others are ahead in its queue"
	switch {
	case len(o.Holders) > 0:
		h := o.Holders[0]
		text = fmt.Sprintf("held by %s with token %d for %s", printable(dash(h.Owner)), h.Token, ago(h.Since))
		if o.HolderCount > 1 {
			text += fmt.Sprintf(" and %d more", o.HolderCount-1)
		}
	case o.DelayRemaining > 0:
		text = fmt.Sprintf("delayed for %s more, because its holder was lost", short(o.DelayRemaining))
	}
	if o.Position > 1 {
		text += fmt.Sprintf(", %d ahead in the queue", o.Position-1)
	} else if n := len(o.Ahead); n > 0 {
		text += fmt.Sprintf(", %d waiting", n)
	}
	return text
}

func releaseCommand() *cobra.Command {
	r := &remote{}
	var token uint64
	var force bool
	var by string
	cmd := &cobra.Command{
		Use: "release NAME --token N", Short: "Give a lock back, or break it with --force",
		Example: `  distlock lock release orders/42 --token 17
  distlock lock release orders/42 --force`,
		Args: exactly("NAME"),
		RunE: r.run(func(cmd *cobra.Command, c *client.Client, args []string) error {
			switch {
			case !force && !cmd.Flags().Changed("token"):
				return usage("--token is needed: the token that 'distlock lock get' shows; --force breaks the lock without")
			case cmd.Flags().Changed("token") && token == 0:
				return usage("--token must be the token of a grant, which is never 0")
			case by != "" && !force:
				return usage("--by goes with --force")
			}
			var err error
			if force {
				err = c.Admin().ForceRelease(cmd.Context(), args[0], fence.Token(token), by)
			} else {
				err = c.Admin().Release(cmd.Context(), args[0], fence.Token(token))
			}
			if err == nil {
				fmt.Fprintf(cmd.OutOrStdout(), "released %s\n", printable(args[0]))
			}
			return err
		}),
	}
	cmd.Flags().Uint64Var(&token, "token", 0, "the token of the hold")
	cmd.Flags().BoolVar(&force, "force", false, "break the lock: its holder is told, a lock-delay applies;\nwithout --token, every hold on it")
	cmd.Flags().StringVar(&by, "by", "", "who breaks it, shown to the holder (default host:pid)")
	return r.add(cmd)
}

func getCommand() *cobra.Command {
	r := &remote{}
	return r.addRead(&cobra.Command{
		Use: "get NAME", Short: "Show one lock with its holders and waiters", Args: exactly("NAME"),
		Example: `  distlock lock get orders/42`,
		RunE: r.run(func(cmd *cobra.Command, c *client.Client, args []string) error {
			k, err := c.Get(cmd.Context(), args[0], r.read()...)
			if err != nil {
				return err
			}
			return r.print(cmd.OutOrStdout(), k, func(w io.Writer) { showLock(w, k) })
		}),
	})
}

func showLock(w io.Writer, k client.LockInfo) {
	state := "free"
	switch {
	case len(k.Holders) > 0:
		state = "held, " + modeName(k.Holders[0].Shared)
		if k.Limit > 0 {
			state += fmt.Sprintf(", %d of at most %d", k.HolderCount, k.Limit)
		}
	case k.DelayRemaining > 0:
		state = fmt.Sprintf("delayed for %s more", short(k.DelayRemaining))
	}
	if k.Declared {
		state += fmt.Sprintf("; declared, clock %d", k.Clock)
	}
	fmt.Fprintf(w, "%s: %s\n", printable(k.Name), state)
	var rows [][]string
	for _, h := range k.Holders {
		rows = append(rows, []string{"holds", h.Token.String(), strconv.FormatUint(h.LeaseID, 10), ago(h.Since), dash(h.Owner)})
	}
	for i, x := range k.Waiters {
		rows = append(rows, []string{fmt.Sprintf("waits %d", i+1), "-", strconv.FormatUint(x.LeaseID, 10), ago(x.Since), dash(x.Owner)})
	}
	if len(rows) > 0 {
		columns(w, []int{0, 0, 0, 0, 30}, []string{"", "TOKEN", "LEASE", "FOR", "OWNER"}, rows)
	}
	if more := k.HolderCount - len(k.Holders); more > 0 {
		fmt.Fprintf(w, "and %d more holding\n", more)
	}
	if more := k.WaiterCount - len(k.Waiters); more > 0 {
		fmt.Fprintf(w, "and %d more waiting\n", more)
	}
}

func lsCommand() *cobra.Command {
	r := &remote{}
	return r.addRead(&cobra.Command{
		Use: "ls [PREFIX]", Short: "List locks: who holds what, and how many wait", Args: atMostOne("PREFIX"),
		Example: `  distlock lock ls
  distlock lock ls orders/ -o json`,
		RunE: r.run(func(cmd *cobra.Command, c *client.Client, args []string) error {
			prefix := ""
			if len(args) > 0 {
				prefix = args[0]
			}
			list := []client.LockInfo{}
			var rows [][]string
			for k, err := range c.List(cmd.Context(), prefix, r.read()...) {
				if err != nil {
					return err
				}
				list = append(list, k)
				rows = append(rows, lockRow(k))
			}
			return r.print(cmd.OutOrStdout(), map[string]any{"locks": list}, func(w io.Writer) {
				if len(rows) == 0 {
					fmt.Fprintln(w, "no locks")
					return
				}
				columns(w, []int{28, 16, 0, 0, 16}, []string{"NAME", "TOKEN", "FOR", "WAITING", "OWNER"}, rows)
			})
		}),
	})
}

func lockRow(k client.LockInfo) []string {
	token, since, owner := "-", "-", "-"
	if n := len(k.Holders); n > 0 {
		h := k.Holders[0]
		token, since, owner = h.Token.String(), ago(h.Since), dash(h.Owner)
		if n = k.HolderCount; n > 1 {
			token = fmt.Sprintf("%s (+%d)", token, n-1)
		}
	} else if k.DelayRemaining > 0 {
		token = "delayed"
	}
	return []string{k.Name, token, since, strconv.Itoa(k.WaiterCount), owner}
}

func checkCommand() *cobra.Command {
	r := &remote{}
	var token uint64
	cmd := &cobra.Command{
		Use: "check NAME --token N", Short: "Tell whether a token holds a lock now; exit 1 if not", Args: exactly("NAME"),
		Example: `  distlock lock check orders/42 --token 17`,
		RunE: r.run(func(cmd *cobra.Command, c *client.Client, args []string) error {
			if token == 0 {
				return usage("--token is needed: the token of a grant, which is never 0")
			}
			check, err := c.CheckToken(cmd.Context(), args[0], fence.Token(token))
			if err != nil {
				return err
			}
			err = r.print(cmd.OutOrStdout(), check, func(w io.Writer) {
				switch {
				case check.Live:
					fmt.Fprintf(w, "token %d holds %s\n", token, printable(args[0]))
				case check.CurrentToken != 0:
					fmt.Fprintf(w, "token %d does not hold %s; token %d does\n", token, printable(args[0]), check.CurrentToken)
				default:
					fmt.Fprintf(w, "token %d does not hold %s; nobody does\n", token, printable(args[0]))
				}
			})
			if err == nil && !check.Live {
				return &exitError{code: exitFailed}
			}
			return err
		}),
	}
	cmd.Flags().Uint64Var(&token, "token", 0, "the token in question")
	return r.addOutput(cmd)
}

func watchCommand() *cobra.Command {
	r := &remote{}
	var from uint64
	cmd := &cobra.Command{
		Use: "watch [PREFIX]", Short: "Print what happens to locks, as it happens", Args: atMostOne("PREFIX"),
		Example: `  distlock lock watch orders/`,
		RunE: r.run(func(cmd *cobra.Command, c *client.Client, args []string) error {
			prefix := ""
			if len(args) > 0 {
				prefix = args[0]
			}
			for e, err := range c.Watch(cmd.Context(), prefix, from) {
				if cmd.Context().Err() != nil {
					return nil
				}
				if err != nil {
					return err
				}
				if err := r.print(cmd.OutOrStdout(), e, func(w io.Writer) { showEvent(w, e) }); err != nil {
					return err
				}
			}
			return nil
		}),
	}
	cmd.Flags().Uint64Var(&from, "from", 0, "first revision wanted; 0 for from now on")
	return r.addOutput(cmd)
}

func showEvent(w io.Writer, e client.Event) {
	what := string(e.Kind)
	if e.Kind == client.EventEnded {
		what = string(e.Cause)
		if e.By != "" {
			what += " by " + printable(e.By)
		}
	}
	fmt.Fprintf(w, "%s %s %s", e.Time.Local().Format("15:04:05.000"), printable(e.Name), what)
	if e.Token != 0 {
		fmt.Fprintf(w, " token %d", e.Token)
	}
	if e.Owner != "" {
		fmt.Fprintf(w, " %s", printable(e.Owner))
	}
	fmt.Fprintln(w)
}
