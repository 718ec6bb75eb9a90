// Command distlock is the lock server and its command line.
package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/signal"
	"runtime/debug"
	"slices"
	"strings"
	"syscall"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"github.com/distlock/distlock/client"
)

// Exit codes, beside those of the command that `run` runs.
const (
	exitFailed      = 1
	exitUsage       = 2
	exitNotAcquired = 75 // EX_TEMPFAIL of sysexits.h
	exitLost        = 76
)

// version is set by the linker for a release.
var version = ""

func versionString() string {
	if version != "" {
		return version
	}
	if info, ok := debug.ReadBuildInfo(); ok && info.Main.Version != "" && info.Main.Version != "(devel)" {
		return info.Main.Version
	}
	return "dev"
}

// exitError is an error with an exit code of its own; a nil err says nothing.
type exitError struct {
	code int
	err  error
}

func (e *exitError) Error() string {
	if e.err == nil {
		return ""
	}
	return e.err.Error()
}

func (e *exitError) Unwrap() error { return e.err }

func usage(format string, args ...any) error {
	return &exitError{exitUsage, fmt.Errorf(format, args...)}
}

func main() { os.Exit(run(os.Args[1:])) }

func run(args []string) int {
	if len(args) > 0 && args[0] == guardCommand {
		return runGuard(args[1:])
	}
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	root := rootCommand()
	root.SetArgs(args)
	err := root.ExecuteContext(ctx)
	if err == nil {
		return 0
	}
	code := exitFailed
	var exit *exitError
	switch {
	case errors.As(err, &exit):
		code = exit.code
	case errors.Is(err, client.ErrUnavailable): // of a lock, too: nobody has said that it is not free
	case errors.Is(err, client.ErrNotAcquired):
		code = exitNotAcquired
	case errors.Is(err, client.ErrInvalid):
		code = exitUsage
	}
	if text := line(err); text != "" {
		fmt.Fprintln(os.Stderr, "distlock: "+text)
	}
	return code
}

// line is an error in one line.
func line(err error) string {
	text := strings.Join(strings.Fields(strings.ToValidUTF8(err.Error(), "?")), " ")
	if errors.Is(err, context.DeadlineExceeded) && text == context.DeadlineExceeded.Error() {
		return "no server answered in time"
	}
	return text
}

func rootCommand() *cobra.Command {
	root := serveCommand("distlock")
	root.Short = "A lock service with leases and fencing tokens"
	root.Long = `distlock hands out locks that expire, with fencing tokens that only ever rise.

Without a command it runs the server, as 'distlock serve' does.`
	root.Example = `  distlock                                run the server on [::]:50051
  distlock run nightly -- ./backup.sh     run a command while holding a lock
  distlock lock ls                        see who holds what, and who waits`
	root.SilenceErrors, root.SilenceUsage = true, true
	root.CompletionOptions.DisableDefaultCmd = true
	root.SetFlagErrorFunc(func(cmd *cobra.Command, err error) error {
		return usage("%w; see '%s --help'", err, cmd.CommandPath())
	})
	root.PersistentPreRunE = func(cmd *cobra.Command, args []string) error { return fromEnvironment(cmd) }
	installFlags(root)
	serve := serveCommand("serve")
	serve.Short = "Run the server"
	root.AddCommand(serve, runCommand(), lockCommand(), leaseCommand(), clusterCommand(), benchCommand(),
		versionCommand(), completionCommand())
	return root
}

// hasVariable marks the flags that may come from the environment: those of the server,
// and those that say which server to ask and how. What a command does comes from its
// line alone, whatever else set a variable of that name: `run` for its command,
// Kubernetes for a Service, a shell of hours ago.
func hasVariable(flags *pflag.FlagSet, names ...string) {
	for _, name := range names {
		flags.SetAnnotation(name, variable, []string{"DISTLOCK_" + strings.ToUpper(strings.ReplaceAll(name, "-", "_"))})
	}
}

const variable = "variable"

// exclusive are pairs of flags of which one alone has a meaning: a flag that is given is
// not held against what the environment says for the other.
var exclusive = [][2]string{
	{"in-memory", "data-dir"}, {"in-memory", "peer-address"}, {"in-memory", "peer-listen"},
	{"in-memory", "initial-cluster"}, {"in-memory", "join"}, {"initial-cluster", "join"},
}

// excluded reports whether one of the flags given excludes a flag.
func excluded(flag string, given map[string]bool) bool {
	return slices.ContainsFunc(exclusive, func(pair [2]string) bool {
		return pair[0] == flag && given[pair[1]] || pair[1] == flag && given[pair[0]]
	})
}

// fromEnvironment takes flags that were not given from their variables.
func fromEnvironment(cmd *cobra.Command) error {
	var failed error
	given := make(map[string]bool)
	cmd.Flags().Visit(func(f *pflag.Flag) { given[f.Name] = true })
	cmd.Flags().VisitAll(func(f *pflag.Flag) {
		name := f.Annotations[variable]
		if len(name) == 0 || given[f.Name] || failed != nil || excluded(f.Name, given) {
			return
		}
		value, ok := os.LookupEnv(name[0])
		if !ok || value == "" || f.Name == "port" && strings.Contains(value, "://") { // Kubernetes makes that for a Service named distlock
			return
		}
		if err := cmd.Flags().Set(f.Name, value); err != nil {
			failed = usage("%s=%q: %w", name[0], value, err)
		}
	})
	return failed
}

func versionCommand() *cobra.Command {
	return &cobra.Command{
		Use: "version", Short: "Print the version", Args: noArgs,
		Run: func(cmd *cobra.Command, _ []string) { fmt.Fprintln(cmd.OutOrStdout(), "distlock "+versionString()) },
	}
}

func noArgs(cmd *cobra.Command, args []string) error {
	if len(args) == 0 {
		return nil
	}
	if cmd.HasSubCommands() {
		return usage("%q is not a command of %s; see '%s --help'", args[0], cmd.CommandPath(), cmd.CommandPath())
	}
	return usage("%s takes no argument, and was given %q", cmd.CommandPath(), args[0])
}

// exactly is cobra.ExactArgs with our words.
func exactly(names ...string) cobra.PositionalArgs {
	return func(cmd *cobra.Command, args []string) error {
		if len(args) == len(names) {
			return nil
		}
		return usage("%s takes %s, and was given %d arguments", cmd.CommandPath(), strings.Join(names, " "), len(args))
	}
}

func atMostOne(name string) cobra.PositionalArgs {
	return func(cmd *cobra.Command, args []string) error {
		if len(args) <= 1 {
			return nil
		}
		return usage("%s takes at most one %s, and was given %d arguments", cmd.CommandPath(), name, len(args))
	}
}

// group is a command that only has subcommands.
func group(use, short string, commands ...*cobra.Command) *cobra.Command {
	cmd := &cobra.Command{Use: use, Short: short, Args: noArgs, RunE: func(cmd *cobra.Command, args []string) error {
		return usage("%s needs a command; see '%s --help'", cmd.CommandPath(), cmd.CommandPath())
	}}
	cmd.AddCommand(commands...)
	return cmd
}
