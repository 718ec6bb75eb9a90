package main

import (
	"fmt"
	"io"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/distlock/distlock/client"
)

func leaseCommand() *cobra.Command {
	return group("lease", "Make, renew, inspect and end leases",
		leaseGrantCommand(), leaseKeepaliveCommand(), leaseGetCommand(), leaseLsCommand(), leaseRevokeCommand())
}

// leaseID reads an ID argument.
func leaseID(text string) (uint64, error) {
	id, err := strconv.ParseUint(text, 10, 64)
	if err != nil || id == 0 {
		return 0, usage("%q is not the id of a lease: 'distlock lease ls' shows them", text)
	}
	return id, nil
}

func leaseGrantCommand() *cobra.Command {
	r := &remote{}
	var ttl time.Duration
	var owner string
	var metadata map[string]string
	cmd := &cobra.Command{
		Use: "grant", Short: "Make a lease to hold locks under", Args: noArgs,
		Example: `  distlock lease grant --ttl 1m
  distlock lock acquire orders/42 --lease 7`,
		RunE: r.run(func(cmd *cobra.Command, c *client.Client, _ []string) error {
			opts := []client.GrantOption{client.Metadata(metadata)}
			if owner != "" {
				opts = append(opts, client.Owner(owner))
			}
			id, err := c.Admin().Grant(cmd.Context(), ttl, opts...)
			if err != nil {
				return err
			}
			return r.print(cmd.OutOrStdout(), map[string]any{"leaseId": id, "ttl": ttl.String()}, func(w io.Writer) {
				fmt.Fprintf(w, "lease %d, expires in %s\n", id, ttl)
			})
		}),
	}
	cmd.Flags().DurationVar(&ttl, "ttl", client.DefaultTTL, "time to live")
	cmd.Flags().StringVar(&owner, "owner", "", "whose lease it is (default host:pid)")
	cmd.Flags().StringToStringVar(&metadata, "metadata", nil, "key=value, shown with the lease")
	return r.addOutput(cmd)
}

func leaseKeepaliveCommand() *cobra.Command {
	r := &remote{}
	var once bool
	cmd := &cobra.Command{
		Use: "keepalive ID", Short: "Renew a lease until interrupted", Args: exactly("ID"),
		Example: `  distlock lease keepalive 7
  distlock lease keepalive 7 --once`,
		RunE: r.run(func(cmd *cobra.Command, c *client.Client, args []string) error {
			id, err := leaseID(args[0])
			if err != nil {
				return err
			}
			for {
				ttls, err := c.Admin().KeepAlive(cmd.Context(), id)
				if cmd.Context().Err() != nil {
					return nil
				}
				if err != nil {
					return err
				}
				fmt.Fprintf(cmd.OutOrStdout(), "lease %d renewed for %s\n", id, ttls[0])
				if once {
					return nil
				}
				select {
				case <-cmd.Context().Done():
					return nil
				case <-time.After(ttls[0] / 3):
				}
			}
		}),
	}
	cmd.Flags().BoolVar(&once, "once", false, "renew it once")
	return r.add(cmd)
}

func leaseGetCommand() *cobra.Command {
	r := &remote{}
	return r.addRead(&cobra.Command{
		Use: "get ID", Short: "Show one lease with what is held under it", Args: exactly("ID"),
		RunE: r.run(func(cmd *cobra.Command, c *client.Client, args []string) error {
			id, err := leaseID(args[0])
			if err != nil {
				return err
			}
			l, err := c.Admin().Lease(cmd.Context(), id, r.read()...)
			if err != nil {
				return err
			}
			return r.print(cmd.OutOrStdout(), l, func(w io.Writer) {
				fmt.Fprintf(w, "lease %d of %s: %s of %s left\n", l.ID, printable(dash(l.Owner)), r.left(l.Remaining), l.TTL)
				var rows [][]string
				for _, h := range l.Holds {
					for _, name := range h.Names() {
						rows = append(rows, []string{"holds", h.Token.String(), ago(h.GrantedAt), name})
					}
				}
				for _, name := range l.WaitingFor {
					rows = append(rows, []string{"waits", "-", "-", name})
				}
				if len(rows) > 0 {
					columns(w, []int{0, 0, 0, 50}, []string{"", "TOKEN", "FOR", "LOCK"}, rows)
				}
				if more := l.HoldCount - len(l.Holds); more > 0 {
					fmt.Fprintf(w, "and %d more held\n", more)
				}
				if more := l.WaitingCount - len(l.WaitingFor); more > 0 {
					fmt.Fprintf(w, "and %d more waited for\n", more)
				}
			})
		}),
	})
}

func leaseLsCommand() *cobra.Command {
	r := &remote{}
	return r.addRead(&cobra.Command{
		Use: "ls", Short: "List leases", Args: noArgs,
		RunE: r.run(func(cmd *cobra.Command, c *client.Client, _ []string) error {
			list := []client.LeaseInfo{}
			var rows [][]string
			for l, err := range c.Admin().Leases(cmd.Context(), r.read()...) {
				if err != nil {
					return err
				}
				list = append(list, l)
				var names []string
				for _, h := range l.Holds {
					names = append(names, h.Names()...)
				}
				rows = append(rows, []string{
					strconv.FormatUint(l.ID, 10), short(l.TTL), r.left(l.Remaining), dash(l.Owner), dash(strings.Join(names, " ")),
				})
			}
			return r.print(cmd.OutOrStdout(), map[string]any{"leases": list}, func(w io.Writer) {
				if len(rows) == 0 {
					fmt.Fprintln(w, "no leases")
					return
				}
				columns(w, []int{16, 0, 0, 18, 20}, []string{"ID", "TTL", "LEFT", "OWNER", "HOLDS"}, rows)
			})
		}),
	})
}

func leaseRevokeCommand() *cobra.Command {
	r := &remote{}
	var by string
	cmd := &cobra.Command{
		Use: "revoke ID", Short: "End a lease; what is held under it is lost", Args: exactly("ID"),
		RunE: r.run(func(cmd *cobra.Command, c *client.Client, args []string) error {
			id, err := leaseID(args[0])
			if err != nil {
				return err
			}
			if err := c.Admin().Revoke(cmd.Context(), id, by); err != nil {
				return err
			}
			fmt.Fprintf(cmd.OutOrStdout(), "revoked lease %d\n", id)
			return nil
		}),
	}
	cmd.Flags().StringVar(&by, "by", "", "who revokes it, shown to the holder (default host:pid)")
	return r.add(cmd)
}
