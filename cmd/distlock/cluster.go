package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"github.com/distlock/distlock/client"
	"github.com/distlock/distlock/fence"
	"github.com/distlock/distlock/internal/server"
)

func clusterCommand() *cobra.Command {
	return group("cluster", "See and change the cluster, back it up",
		clusterStatusCommand(), clusterMembersCommand(), clusterAddCommand(), clusterPromoteCommand(), clusterRemoveCommand(),
		clusterTransferCommand(), clusterBackupCommand(), clusterRestoreCommand(), clusterRecoverCommand())
}

func memberRows(s client.Status) (rows [][]string) {
	for _, m := range s.Members {
		role, healthy := m.Role, "yes"
		if m.Leader {
			role += ", leader"
		}
		if !m.Healthy {
			healthy = "no"
		}
		rows = append(rows, []string{m.ID, role, healthy, dash(m.ClientAddress), dash(m.PeerAddress)})
	}
	return rows
}

func clusterStatusCommand() *cobra.Command {
	r := &remote{}
	return r.addOutput(&cobra.Command{
		Use: "status", Short: "Show the state; exit 1 where there is no leader", Args: noArgs,
		RunE: r.run(func(cmd *cobra.Command, c *client.Client, _ []string) error {
			s, err := c.Admin().Status(cmd.Context())
			if err != nil {
				return err
			}
			rows := memberRows(s)
			err = r.print(cmd.OutOrStdout(), s, func(w io.Writer) {
				durability := "durable"
				if s.InMemory {
					durability = "in memory"
				}
				level := ""
				if s.Level > 0 {
					level = fmt.Sprintf(", level %d", s.Level)
				}
				fmt.Fprintf(w, "distlock %s, up %s, %s%s; term %d, last token %d\n", s.Version, ago(s.StartedAt), durability, level, s.Term, s.LastToken)
				fmt.Fprintf(w, "%s, %s, %d waiting\n", counted(int(s.Leases), "lease"), counted(int(s.Locks), "lock"), s.Waiters)
				if s.Restored != nil {
					fmt.Fprintf(w, "restored %s from a backup of cluster %s\n", s.Restored.At.Local().Format(time.DateTime), s.Restored.ClusterID)
				}
				columns(w, []int{12, 0, 0, 22, 22}, []string{"NODE", "ROLE", "UP", "CLIENTS", "PEERS"}, rows)
			})
			if err == nil && s.Leader == "" {
				return &exitError{exitFailed, fmt.Errorf("there is no leader")}
			}
			return err
		}),
	})
}

func clusterMembersCommand() *cobra.Command {
	r := &remote{}
	return r.addOutput(&cobra.Command{
		Use: "members", Short: "List the members", Args: noArgs,
		Long: `List the members. UP says whether a member answers and has caught up, DISK
which data directory it has: a name with another one is another member.`,
		RunE: r.run(func(cmd *cobra.Command, c *client.Client, _ []string) error {
			s, err := c.Admin().Status(cmd.Context())
			if err != nil {
				return err
			}
			rows := memberRows(s)
			for i, m := range s.Members {
				rows[i] = append(rows[i], dash(m.Incarnation[:min(8, len(m.Incarnation))]))
			}
			return r.print(cmd.OutOrStdout(), map[string]any{"members": s.Members}, func(w io.Writer) {
				columns(w, []int{10, 0, 0, 18, 18, 8}, []string{"NODE", "ROLE", "UP", "CLIENTS", "PEERS", "DISK"}, rows)
			})
		}),
	})
}

// change is a command that makes one change and says so.
func change(use, short, example string, args cobra.PositionalArgs, do func(context.Context, *client.Client, []string) (string, error)) *cobra.Command {
	r := &remote{}
	return r.add(&cobra.Command{
		Use: use, Short: short, Example: example, Args: args,
		RunE: r.run(func(cmd *cobra.Command, c *client.Client, args []string) error {
			said, err := do(cmd.Context(), c, args)
			if err == nil {
				fmt.Fprintln(cmd.OutOrStdout(), said)
			}
			return err
		}),
	})
}

func clusterAddCommand() *cobra.Command {
	return change("add ID PEER-ADDRESS", "Add a node that waits as a learner, or say where a member has moved to",
		"  distlock cluster add n2 10.0.0.2:50052", exactly("ID", "PEER-ADDRESS"),
		func(ctx context.Context, c *client.Client, args []string) (string, error) {
			if _, _, err := net.SplitHostPort(args[1]); err != nil {
				return "", usage("PEER-ADDRESS must be HOST:PORT, and is %q", args[1])
			}
			return fmt.Sprintf("%s at %s is a member", args[0], args[1]), c.Admin().AddMember(ctx, args[0], args[1])
		})
}

func clusterPromoteCommand() *cobra.Command {
	return change("promote ID", "Give a learner that has caught up its vote", "  distlock cluster promote n2", exactly("ID"),
		func(ctx context.Context, c *client.Client, args []string) (string, error) {
			return args[0] + " is a voter", c.Admin().PromoteMember(ctx, args[0])
		})
}

func clusterRemoveCommand() *cobra.Command {
	return change("remove ID", "Take a node out; it stops serving", "  distlock cluster remove n2", exactly("ID"),
		func(ctx context.Context, c *client.Client, args []string) (string, error) {
			s, err := c.Admin().Status(ctx)
			if err != nil {
				return "", err
			}
			var ids []string
			for _, m := range s.Members {
				ids = append(ids, m.ID)
			}
			if !slices.Contains(ids, args[0]) { // the API takes it for a repeat
				return "", fmt.Errorf("there is no member %s: the members are %s", args[0], strings.Join(ids, ", "))
			}
			return args[0] + " is no member", c.Admin().RemoveMember(ctx, args[0])
		})
}

func clusterTransferCommand() *cobra.Command {
	return change("transfer [ID]", "Make another voter lead", "  distlock cluster transfer n2", func(cmd *cobra.Command, args []string) error {
		if len(args) > 1 {
			return usage("%s takes at most one ID, and was given %d arguments", cmd.CommandPath(), len(args))
		}
		return nil
	}, func(ctx context.Context, c *client.Client, args []string) (string, error) {
		id := ""
		if len(args) == 1 {
			id = args[0]
		}
		leader, err := c.Admin().TransferLeadership(ctx, id)
		return leader + " leads", err
	})
}

func clusterBackupCommand() *cobra.Command {
	r := &remote{}
	var dir string
	cmd := r.add(&cobra.Command{
		Use: "backup FILE", Short: "Write a consistent copy of everything while the server serves", Args: exactly("FILE"),
		Long: `Write a consistent copy of everything while the server serves, or, with
--data-dir, of what a stopped server's directory has.

FILE appears whole, checked and synced, or not at all; what it was is replaced.
A FILE that is no regular file is written to as it comes, and so is standard
output, which is "-".`,
		Example: "  distlock cluster backup /backup/distlock-$(date +%F)\n" +
			"  distlock cluster backup - | ssh backup 'cat >distlock.backup'\n" +
			"  distlock cluster backup saved --data-dir distlock-data",
		RunE: func(cmd *cobra.Command, args []string) error {
			from := func(to io.Writer) error {
				private()
				_, err := server.BackupDirectory(dir, to, versionString(), time.Now())
				return err
			}
			if dir == "" {
				c, err := r.dial()
				if err != nil {
					return err
				}
				defer c.Close()
				from = func(to io.Writer) error { return c.Admin().Backup(cmd.Context(), to) }
			}
			info, said, err := backup(cmd, args[0], from)
			if err != nil {
				return err
			}
			fmt.Fprintf(said, "%s: cluster %s, %s, %s, last token %d\n", args[0], info.ClusterID, counted(int(info.Leases), "lease"), counted(int(info.Locks), "lock"), info.LastToken)
			return nil
		},
	})
	cmd.Flags().StringVar(&dir, "data-dir", "", "of a stopped server, to back up instead")
	return cmd
}

// backup writes a backup to where FILE says, and returns where to say so: not
// into a backup that may go on elsewhere.
func backup(cmd *cobra.Command, file string, from func(io.Writer) error) (info server.BackupInfo, said io.Writer, err error) {
	said = cmd.OutOrStdout()
	if file == "-" {
		info, err = streamBackup(cmd.OutOrStdout(), from)
		return info, cmd.ErrOrStderr(), err
	}
	_, err = os.Lstat(file)
	if errors.Is(err, os.ErrNotExist) {
		info, err = backupFile(file, from)
		return info, said, err
	}
	at, err := os.Stat(file)
	switch {
	case err != nil:
		return info, said, err
	case at.IsDir():
		return info, said, usage("FILE must be a file, and %s is a directory", file)
	case !at.Mode().IsRegular():
		out, err := os.OpenFile(file, os.O_WRONLY, 0)
		if err != nil {
			return info, said, err
		}
		info, err = streamBackup(out, from)
		return info, cmd.ErrOrStderr(), errors.Join(err, out.Close())
	}
	if file, err = filepath.EvalSymlinks(file); err == nil { // a link goes on to name the same file
		info, err = backupFile(file, from)
	}
	return info, said, err
}

// backupFile writes a file that appears whole, checked and synced, or not at all.
func backupFile(file string, from func(io.Writer) error) (info server.BackupInfo, err error) {
	f, err := os.CreateTemp(filepath.Dir(file), filepath.Base(file)+".part-")
	if err != nil {
		return info, err
	}
	defer os.Remove(f.Name())
	defer f.Close()
	if err := from(f); err != nil {
		return info, err
	}
	if err := f.Sync(); err != nil {
		return info, err
	}
	if _, err := f.Seek(0, io.SeekStart); err != nil {
		return info, err
	}
	if info, err = server.CheckBackup(f); err != nil {
		return info, err
	}
	if err := os.Rename(f.Name(), file); err != nil {
		return info, err
	}
	dir, err := os.Open(filepath.Dir(file))
	if err != nil {
		return info, err
	}
	return info, errors.Join(dir.Sync(), dir.Close())
}

// streamBackup checks a backup while it is written.
func streamBackup(to io.Writer, from func(io.Writer) error) (info server.BackupInfo, err error) {
	in, out := io.Pipe()
	checked := make(chan error, 1)
	go func() {
		var err error
		info, err = server.CheckBackup(in)
		in.CloseWithError(err) // whoever writes on is told
		checked <- err
	}()
	err = from(io.MultiWriter(to, out))
	out.CloseWithError(err)
	if wrong := <-checked; err == nil {
		err = wrong
	}
	return info, err
}

func clusterRestoreCommand() *cobra.Command {
	var cfg server.RestoreConfig
	var above uint64
	cmd := &cobra.Command{
		Use: "restore FILE", Short: "Make a data directory of a backup: a history of its own", Args: exactly("FILE"),
		Long: `Make a data directory of a backup, for a server to start on.

The cluster that the backup was taken of may have gone on: the new one has
another id, all leases have ended, and its tokens go on far above. Give the
highest token that any resource has seen with --above if it could be higher.`,
		Example: "  distlock cluster restore /backup/distlock-2026-11-23 --data-dir distlock-data",
		RunE: func(cmd *cobra.Command, args []string) error {
			var err error
			if cfg.Above, err = tokenAbove(above); err != nil {
				return err
			}
			f, err := os.Open(args[0])
			if err != nil {
				return err
			}
			defer f.Close()
			cfg.From, cfg.Now = f, time.Now()
			private()
			res, err := server.Restore(cfg)
			if err != nil {
				return fmt.Errorf("%s was not restored: %w", args[0], err)
			}
			sayMoved(cmd.OutOrStdout(), cfg.Dir, res)
			fmt.Fprintf(cmd.OutOrStdout(), "restored %s into %s: cluster %s, tokens above %d, %s ended\n", args[0], cfg.Dir, res.NewClusterID, res.TokensAbove, counted(int(res.Leases), "lease"))
			return nil
		},
	}
	flags := cmd.Flags()
	flags.StringVar(&cfg.Dir, "data-dir", "distlock-data", "directory to make")
	aboveFlag(flags, &above)
	flags.BoolVar(&cfg.Force, "force", false, "move aside what the directory has")
	flags.StringVar(&cfg.NodeID, "node-id", "n1", "name of the node")
	flags.StringVar(&cfg.PeerAddress, "peer-address", "", "HOST:PORT where other members will reach it")
	return cmd
}

func aboveFlag(flags *pflag.FlagSet, above *uint64) {
	flags.Uint64Var(above, "above", 0, "every new token is above it")
}

func tokenAbove(above uint64) (fence.Token, error) {
	if above > uint64(fence.MaxToken) {
		return 0, usage("--above must be at most %d, and is %d", fence.MaxToken, above)
	}
	return fence.Token(above), nil
}

func sayMoved(out io.Writer, dir string, res server.RestoreResult) {
	if res.MovedTo != "" {
		fmt.Fprintf(out, "what %s had is now in %s\n", dir, res.MovedTo)
	}
}

func clusterRecoverCommand() *cobra.Command {
	var cfg server.RestoreConfig
	var above uint64
	cmd := &cobra.Command{
		Use: "recover --data-dir DIR", Short: "Make a lone survivor's data directory a cluster of its own", Args: noArgs,
		Long: `Make the data directory of a member a cluster of its own, with that one member:
for when most of the members are lost for good. Run it on the one that is
furthest, with no server running on it, and never start the others again but
with empty directories and --join.

It begins a history of its own, as restore does: another cluster id, all leases
have ended, tokens go on far above. What the lost members had acknowledged and
this one has not received is lost. The old data is kept, aside.`,
		Example: "  distlock cluster recover --data-dir distlock-data",
		RunE: func(cmd *cobra.Command, _ []string) error {
			if cfg.Dir == "" {
				return usage("--data-dir must say which directory to recover")
			}
			var err error
			if cfg.Above, err = tokenAbove(above); err != nil {
				return err
			}
			cfg.Now = time.Now()
			private()
			res, err := server.Recover(cfg)
			if err != nil {
				return fmt.Errorf("%s was not recovered: %w", cfg.Dir, err)
			}
			sayMoved(cmd.OutOrStdout(), cfg.Dir, res)
			fmt.Fprintf(cmd.OutOrStdout(), "%s is node %s of cluster %s, alone: tokens above %d, %s ended\n", cfg.Dir, res.NodeID, res.NewClusterID, res.TokensAbove, counted(int(res.Leases), "lease"))
			return nil
		},
	}
	flags := cmd.Flags()
	flags.StringVar(&cfg.Dir, "data-dir", "", "directory of the survivor")
	aboveFlag(flags, &above)
	flags.StringVar(&cfg.PeerAddress, "peer-address", "", "HOST:PORT where other members will reach it")
	return cmd
}
