package main

import (
	"bytes"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"github.com/spf13/cobra"
)

func completionCommand() *cobra.Command {
	return &cobra.Command{
		Use: "completion SHELL", Short: "Print the completion script for bash, zsh or fish", Args: exactly("SHELL"),
		ValidArgs: []string{"bash", "zsh", "fish"},
		Example:   `  distlock completion bash > ~/.local/share/bash-completion/completions/distlock`,
		RunE: func(cmd *cobra.Command, args []string) error {
			script, err := completionScript(cmd.Root(), args[0])
			if err != nil {
				return err
			}
			_, err = cmd.OutOrStdout().Write(script)
			return err
		},
	}
}

func completionScript(root *cobra.Command, shell string) ([]byte, error) {
	var b bytes.Buffer
	var err error
	switch shell {
	case "bash":
		err = root.GenBashCompletionV2(&b, true)
	case "zsh":
		err = root.GenZshCompletion(&b)
	case "fish":
		err = root.GenFishCompletion(&b, true)
	default:
		return nil, usage("completion is for bash, zsh or fish, not %q", shell)
	}
	return b.Bytes(), err
}

// installFlags adds the flags that the Python tool had for its completion.
func installFlags(root *cobra.Command) {
	root.Flags().Bool("install-completion", false, "install completion for this shell")
	root.Flags().Bool("show-completion", false, "print its completion script")
}

// completionFlags does what those flags say; done tells that one was given.
func completionFlags(cmd *cobra.Command) (done bool, err error) {
	install, _ := cmd.Flags().GetBool("install-completion")
	show, _ := cmd.Flags().GetBool("show-completion")
	if !install && !show {
		return false, nil
	}
	shell := runningShell()
	script, err := completionScript(cmd.Root(), shell)
	if err != nil {
		return true, err
	}
	if show {
		_, err := cmd.OutOrStdout().Write(script)
		return true, err
	}
	return true, installCompletion(cmd, shell, script)
}

// runningShell names the shell that runs this command: its parent, or else
// the user's.
func runningShell() string {
	if comm, err := os.ReadFile(fmt.Sprintf("/proc/%d/comm", os.Getppid())); err == nil {
		switch name := strings.TrimLeft(strings.TrimSpace(string(comm)), "-"); name {
		case "bash", "zsh", "fish":
			return name
		}
	}
	return filepath.Base(os.Getenv("SHELL"))
}

func installCompletion(cmd *cobra.Command, shell string, script []byte) error {
	home, err := os.UserHomeDir()
	if err != nil {
		return err
	}
	data, config := os.Getenv("XDG_DATA_HOME"), os.Getenv("XDG_CONFIG_HOME")
	if data == "" {
		data = filepath.Join(home, ".local", "share")
	}
	if config == "" {
		config = filepath.Join(home, ".config")
	}
	file := map[string]string{
		"bash": filepath.Join(data, "bash-completion", "completions", "distlock"),
		"zsh":  filepath.Join(home, ".zfunc", "_distlock"),
		"fish": filepath.Join(config, "fish", "completions", "distlock.fish"),
	}[shell]
	out := cmd.OutOrStdout()
	if old, err := os.ReadFile(file); err == nil && bytes.Equal(old, script) {
		fmt.Fprintf(out, "%s completion is installed in %s already\n", shell, file)
	} else {
		if err := os.MkdirAll(filepath.Dir(file), 0o755); err != nil {
			return err
		}
		if err := os.WriteFile(file, script, 0o644); err != nil {
			return err
		}
		fmt.Fprintf(out, "%s completion installed in %s; it works in new shells\n", shell, file)
	}
	if shell != "zsh" {
		return nil
	}
	// zsh looks into no directory of the user's unless it is told to.
	const wanted = "fpath+=~/.zfunc; autoload -Uz compinit; compinit"
	rc := filepath.Join(home, ".zshrc")
	text, err := os.ReadFile(rc)
	if err != nil && !os.IsNotExist(err) {
		return err
	}
	if bytes.Contains(text, []byte(wanted)) {
		return nil
	}
	if len(text) > 0 && text[len(text)-1] != '\n' {
		text = append(text, '\n')
	}
	if err := os.WriteFile(rc, append(text, wanted+"\n"...), 0o644); err != nil {
		return err
	}
	fmt.Fprintf(out, "added to %s: %s\n", rc, wanted)
	return nil
}
