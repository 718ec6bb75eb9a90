package machine

import (
	"flag"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"

	"github.com/distlock/distlock/fence"
)

var rewrite = flag.Bool("rewrite", false, "write the transcripts anew from what the machine does")

// TestTranscripts runs testdata/*.txt: commands, then ----, then what the
// machine answered, reported and has. Arguments are key=value; a blank line
// ends a step. Regenerate with -rewrite and read the difference.
func TestTranscripts(t *testing.T) {
	files, err := filepath.Glob("testdata/*.txt")
	if err != nil || len(files) == 0 {
		t.Fatal("no transcripts", err)
	}
	for _, file := range files {
		t.Run(strings.TrimSuffix(filepath.Base(file), ".txt"), func(t *testing.T) {
			text, err := os.ReadFile(file)
			if err != nil {
				t.Fatal(err)
			}
			got := transcript(t, string(text))
			if *rewrite {
				if err := os.WriteFile(file, []byte(got), 0o644); err != nil {
					t.Fatal(err)
				}
				return
			}
			if got != string(text) {
				t.Errorf("%s differs from what the machine does (-rewrite, then read the difference):\n%s", file, got)
			}
		})
	}
}

func transcript(t *testing.T, text string) string {
	m := New(0)
	var out strings.Builder
	stamp := int64(0)
	for _, step := range strings.Split(strings.TrimSpace(text), "\n\n") {
		input, _, _ := strings.Cut(step, "\n----")
		b := Batch{Stamp: stamp, Term: 1}
		for _, line := range strings.Split(input, "\n") {
			if line = strings.TrimSpace(line); line != "" && !strings.HasPrefix(line, "#") {
				b.Commands = append(b.Commands, parse(t, line))
			}
		}
		result := m.Apply(b)
		fmt.Fprintf(&out, "%s\n----\n", input)
		for _, r := range result.Results {
			fmt.Fprintln(&out, describe(r))
		}
		for _, e := range result.Events {
			fmt.Fprintf(&out, "event %d %s\n", e.Revision, describeEvent(e))
		}
		for _, line := range strings.Split(strings.TrimSpace(show(&m.state)), "\n") {
			if line != "" {
				fmt.Fprintf(&out, "  %s\n", line)
			}
		}
		out.WriteString("\n")
		stamp++
	}
	return strings.TrimSpace(out.String()) + "\n"
}

func parse(t *testing.T, line string) Command {
	fields := strings.Fields(line)
	args := map[string]string{}
	for _, f := range fields[1:] {
		key, value, ok := strings.Cut(f, "=")
		if !ok {
			value = "true"
		}
		args[key] = value
	}
	number := func(key string) uint64 {
		n, err := strconv.ParseUint(args[key], 10, 64)
		if err != nil && args[key] != "" {
			t.Fatalf("%q: %v", line, err)
		}
		delete(args, key)
		return n
	}
	word := func(key string) string {
		s := args[key]
		delete(args, key)
		return s
	}
	defer func() {
		if len(args) > 0 {
			t.Fatalf("%q: unknown arguments %v", line, args)
		}
	}()
	switch fields[0] {
	case "grant-lease":
		return &GrantLease{Request: RequestID(number("request")), TTL: Duration(number("ttl")), Owner: word("owner")}
	case "revoke":
		return &RevokeLease{Lease: LeaseID(number("lease")), By: word("by")}
	case "expire":
		c := &ExpireLeases{Term: number("term")}
		for _, s := range strings.Split(word("leases"), ",") {
			n, err := strconv.ParseUint(s, 10, 64)
			if err != nil {
				t.Fatalf("%q: %v", line, err)
			}
			c.Leases = append(c.Leases, LeaseID(n))
		}
		return c
	case "acquire":
		c := &Acquire{
			Lease: LeaseID(number("lease")), Request: RequestID(number("request")), LowestOpen: RequestID(number("lowest")),
			Names: strings.Split(word("lock"), ","), Mode: Exclusive, Limit: uint32(number("limit")),
			Wait: word("wait") != "", LockDelay: Duration(number("delay")), Actor: word("actor"),
			TTL: Duration(number("ttl")), Owner: word("owner"), Declared: word("declared") != "",
		}
		if word("shared") != "" {
			c.Mode = Shared
		}
		return c
	case "abandon":
		return &Abandon{Lease: LeaseID(number("lease")), Request: RequestID(number("request"))}
	case "release":
		return &Release{Lease: LeaseID(number("lease")), Name: word("lock"), Token: fence.Token(number("token"))}
	case "force-release":
		return &ForceRelease{Name: word("lock"), Token: fence.Token(number("token")), By: word("by")}
	case "end-delay":
		return &EndDelay{Name: word("lock"), Delay: number("id")}
	case "declare":
		return &Declare{Name: word("lock")}
	case "undeclare":
		return &Undeclare{Name: word("lock")}
	case "release-clock":
		return &ReleaseClock{Name: word("lock"), Clock: number("clock")}
	case "forget":
		return &Forget{Through: number("through")}
	}
	t.Fatalf("unknown command %q", line)
	return nil
}

func describe(r Result) string {
	switch {
	case r.Refusal != nil:
		return fmt.Sprintf("refused %s: %s", r.Refusal.Reason, r.Refusal.Error())
	case r.Hold != nil:
		s := fmt.Sprintf("granted token %d under lease %d:", r.Hold.Token, r.Hold.Lease)
		for _, k := range r.Hold.Locks {
			s += fmt.Sprintf(" %s floor %d", k.Name, k.Floor)
			if k.Clock > 0 {
				s += fmt.Sprintf(" clock %d", k.Clock)
			}
		}
		return s
	case r.Waiting:
		return fmt.Sprintf("waits under lease %d", r.Lease)
	case r.Lease != 0:
		return fmt.Sprintf("lease %d", r.Lease)
	}
	return "done"
}

var kindNames = map[EventKind]string{
	EventLeaseGranted: "lease granted", EventLeaseEnded: "lease ended", EventQueued: "queued", EventGranted: "granted",
	EventHoldEnded: "hold ended", EventAbandoned: "abandoned", EventDelayStarted: "delay started",
	EventDelayEnded: "delay ended", EventDeclared: "declared", EventUndeclared: "undeclared",
}

func describeEvent(e Event) string {
	s := kindNames[e.Kind]
	if e.Lease != 0 {
		s += fmt.Sprintf(" lease=%d", e.Lease)
	}
	if e.Token != 0 {
		s += fmt.Sprintf(" token=%d", e.Token)
	}
	for _, k := range e.Locks {
		s += " " + k.Name
	}
	if e.Cause != 0 {
		s += " " + (&Ended{Cause: e.Cause, By: e.By}).String()
	}
	if e.Delay.ID != 0 {
		s += fmt.Sprintf(" delay=%d for %d", e.Delay.ID, e.Delay.Duration)
	}
	return s
}
