package believe

import (
	"context"
	"fmt"
	"slices"
	"strings"

	"github.com/distlock/distlock/client"
)

// State is what the server has, all names together.
type State struct {
	Holds map[Hold]string // with their owners
	Waits map[string]int
}

// Read lists what the server has.
func Read(ctx context.Context, c *client.Client) (State, error) {
	s := State{Holds: make(map[Hold]string), Waits: make(map[string]int)}
	for k, err := range c.List(ctx, "") {
		if err != nil {
			return s, err
		}
		if len(k.Holders) != k.HolderCount {
			return s, fmt.Errorf("%s: %d of %d holders listed", k.Name, len(k.Holders), k.HolderCount)
		}
		for _, h := range k.Holders {
			s.Holds[Hold{k.Name, uint64(h.Token)}] = h.Owner
		}
		if k.WaiterCount > 0 {
			s.Waits[k.Name] = k.WaiterCount
		}
	}
	return s, nil
}

// Difference is what the server has and the crowds do not agree on.
type Difference struct {
	// Twice are holds that were believed before and after the server was read,
	// and are not there: their locks may have been granted to others.
	Twice []string
	// Unknown are holds that nobody believes, and waits that nobody waits.
	Unknown []string
	// Missing are waits that the server does not have.
	Missing []string
}

// None reports whether there is none.
func (d Difference) None() bool { return len(d.Twice)+len(d.Unknown)+len(d.Missing) == 0 }

func (d Difference) String() string {
	var b strings.Builder
	for _, part := range []struct {
		what string
		list []string
	}{{"believed, and not held", d.Twice}, {"held or waiting, and nobody knows", d.Unknown}, {"waiting, and not in the queue", d.Missing}} {
		if n := len(part.list); n > 0 {
			fmt.Fprintf(&b, "%s: %d: %s; ", part.what, n, strings.Join(part.list[:min(n, 12)], ", "))
		}
	}
	return strings.TrimSuffix(b.String(), "; ")
}

// Compare holds a state against what crowds reported before it was read, and
// what they reported after. Holds that operators may end are told later to who
// believes in them, so that they count only when nothing goes on.
func Compare(before []Report, s State, after []Report, quiet bool) (d Difference) {
	believed := map[Hold]int{}
	waits := map[string]int{}
	for _, list := range [][]Report{before, after} {
		for _, r := range list {
			for _, h := range r.Holds {
				believed[h]++
			}
		}
	}
	for _, r := range after {
		for name, n := range r.Waits {
			waits[name] += n
		}
	}
	for h, n := range believed {
		if _, held := s.Holds[h]; !held && n == 2 && (quiet || !strings.HasPrefix(h.Name, "op/")) {
			d.Twice = append(d.Twice, fmt.Sprint(h.Name, "#", h.Token))
		}
	}
	for h, owner := range s.Holds {
		if believed[h] == 0 {
			d.Unknown = append(d.Unknown, fmt.Sprint(h.Name, "#", h.Token, " of ", owner))
		}
	}
	for name, n := range s.Waits {
		if n > waits[name] {
			d.Unknown = append(d.Unknown, fmt.Sprint(n-waits[name], " more for ", name))
		}
	}
	for name, n := range waits {
		if n > s.Waits[name] {
			d.Missing = append(d.Missing, fmt.Sprint(n-s.Waits[name], " for ", name))
		}
	}
	slices.Sort(d.Twice)
	slices.Sort(d.Unknown)
	slices.Sort(d.Missing)
	return d
}
