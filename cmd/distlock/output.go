package main

import (
	"encoding/json"
	"fmt"
	"io"
	"strconv"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/spf13/cobra"
	"sigs.k8s.io/yaml"

	"github.com/distlock/distlock/client"
)

// remote are the flags of commands that talk to a server.
type remote struct {
	endpoints   []string
	timeout     time.Duration
	output      string
	consistency string
}

func (r *remote) add(cmd *cobra.Command) *cobra.Command {
	flags := cmd.Flags()
	flags.StringSliceVar(&r.endpoints, "endpoints", []string{client.DefaultEndpoint}, "servers, host:port each")
	flags.DurationVar(&r.timeout, "timeout", 10*time.Second, "time for a server to answer")
	hasVariable(flags, "endpoints", "timeout")
	return cmd
}

func (r *remote) addOutput(cmd *cobra.Command) *cobra.Command {
	cmd.Flags().StringVarP(&r.output, "output", "o", "table", "table, json or yaml")
	hasVariable(cmd.Flags(), "output")
	return r.add(cmd)
}

// addRead adds the flags of a command that reads.
func (r *remote) addRead(cmd *cobra.Command) *cobra.Command {
	cmd.Flags().StringVar(&r.consistency, "consistency", "linearizable", "linearizable, or stale: what the server asked has")
	hasVariable(cmd.Flags(), "consistency")
	return r.addOutput(cmd)
}

// read is how to read, as the flags say.
func (r *remote) read() []client.ReadOption {
	if r.stale() {
		return []client.ReadOption{client.Stale()}
	}
	return nil
}

func (r *remote) stale() bool { return r.consistency == "stale" }

// left is the time left of a lease, which only the leader knows.
func (r *remote) left(d time.Duration) string {
	if r.stale() {
		return "-"
	}
	return short(d)
}

func (r *remote) dial(opts ...client.Option) (*client.Client, error) {
	switch {
	case r.output != "" && r.output != "table" && r.output != "json" && r.output != "yaml":
		return nil, usage("--output must be table, json or yaml, and is %q", r.output)
	case r.consistency != "" && r.consistency != "linearizable" && r.consistency != "stale":
		return nil, usage("--consistency must be linearizable or stale, and is %q", r.consistency)
	case r.timeout <= 0:
		return nil, usage("--timeout must be above 0, and is %v", r.timeout)
	}
	return client.New(r.endpoints, append([]client.Option{client.WithCallTimeout(r.timeout)}, opts...)...)
}

// run is a command's RunE with a client that lasts as long.
func (r *remote) run(do func(*cobra.Command, *client.Client, []string) error) func(*cobra.Command, []string) error {
	return func(cmd *cobra.Command, args []string) error {
		c, err := r.dial()
		if err != nil {
			return err
		}
		defer c.Close()
		return do(cmd, c, args)
	}
}

// print writes v as JSON or YAML, or calls table.
func (r *remote) print(w io.Writer, v any, table func(w io.Writer)) error {
	switch r.output {
	case "json":
		return writeJSON(w, v)
	case "yaml":
		text, err := yaml.Marshal(v)
		if err == nil {
			_, err = w.Write(text)
		}
		return err
	}
	table(w)
	return nil
}

func writeJSON(w io.Writer, v any) error {
	e := json.NewEncoder(w)
	e.SetEscapeHTML(false)
	return e.Encode(v)
}

// columns writes a table that fits into 80 columns: cells are cut to the width
// given for their column, 0 for as wide as they are.
func columns(w io.Writer, widths []int, header []string, rows [][]string) {
	t := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	put := func(cells []string) {
		for i, cell := range cells {
			if i > 0 {
				fmt.Fprint(t, "\t")
			}
			fmt.Fprint(t, cut(printable(cell), widths[i]))
		}
		fmt.Fprintln(t)
	}
	put(header)
	for _, row := range rows {
		put(row)
	}
	t.Flush()
}

// printable keeps names and owners from moving the cursor.
func printable(s string) string {
	return strings.Map(func(r rune) rune {
		if r < ' ' || r == 0x7f || r >= 0x80 && r < 0xa0 {
			return '?'
		}
		return r
	}, s)
}

func cut(s string, width int) string {
	runes := []rune(s)
	if width == 0 || len(runes) <= width {
		return s
	}
	return string(runes[:width-1]) + "…"
}

// short is a duration for people.
func short(d time.Duration) string {
	switch {
	case d <= 0:
		return "0s"
	case d < time.Second:
		return d.Round(time.Millisecond).String()
	case d < 10*time.Second:
		return d.Round(100 * time.Millisecond).String()
	case d < time.Hour:
		return d.Round(time.Second).String()
	}
	h := d.Round(time.Minute)
	return fmt.Sprintf("%dh%dm", int(h.Hours()), int(h.Minutes())%60)
}

func ago(t time.Time) string { return short(time.Since(t)) }

func dash(s string) string {
	if s == "" {
		return "-"
	}
	return s
}

func modeName(shared bool) string {
	if shared {
		return "shared"
	}
	return "exclusive"
}

// counted is "1 lease", "2 leases".
func counted(n int, what string) string {
	if n != 1 {
		what += "s"
	}
	return strconv.Itoa(n) + " " + what
}
