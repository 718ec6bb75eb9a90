package lease

import (
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"time"
	"unicode/utf8"

	"github.com/distlock/distlock/lease/machine"
)

// What a name, a text and metadata may take, in bytes.
const (
	MaxName     = 512
	MaxText     = 256
	MaxMetadata = 4096
)

// admits refuses new work, on its caller's goroutine and for next to nothing, while
// more waits for the log than it can write in a second or so. What has been begun
// is finished: twice as many repeats and commands that give something back are let
// in. Renewals and reads wait for no log, and are let in always.
func (m *Manager) admits(t task) error {
	c, ok := t.(*call)
	if !ok {
		return nil
	}
	if most := c.pendingAtMost(m.bounds.MaxPending); m.queued.Load() >= int64(most) {
		return &ExhaustedError{What: "commands that wait for the log", Max: most}
	}
	return nil
}

// crowds refuses it while what one connection's streams ask for takes up an eighth of
// that: others want their part.
func (l *loop) crowds(c *call) error {
	p, ok := c.sink.(*Port)
	if !ok {
		return nil
	}
	if most := c.pendingAtMost(max(l.bounds.MaxPending/8, 1)); p.share.pending >= most {
		return &ExhaustedError{What: "commands of one connection that wait for the log", Max: most}
	}
	return nil
}

// pendingAtMost is at how many pending commands a call is one too many.
func (c *call) pendingAtMost(most int) int {
	if c.op == OpGrantLease || c.op == OpDeclare || c.op == OpAcquire && c.attempt <= 1 {
		return most
	}
	return 2 * most
}

func (b *Bounds) acquire(r *AcquireRequest) error {
	if len(r.Names) == 0 || len(r.Names) > b.MaxNamesPerCall {
		return &InvalidError{Field: "names", Msg: fmt.Sprintf("must be 1 to %d locks, not %d", b.MaxNamesPerCall, len(r.Names))}
	}
	for _, n := range r.Names {
		if err := name("name", n); err != nil {
			return err
		}
	}
	switch {
	case r.Mode > machine.Shared:
		return &InvalidError{Field: "mode", Msg: "must be exclusive or shared"}
	case r.Limit > 0 && r.Mode != machine.Shared:
		return &InvalidError{Field: "limit", Msg: "goes with shared mode only"}
	case r.Wait < 0 && r.Wait != WaitForever:
		return &InvalidError{Field: "wait", Msg: fmt.Sprintf("must not be negative, and is %v", r.Wait)}
	case r.LockDelay < 0 || r.LockDelay > b.MaxLockDelay:
		return &InvalidError{Field: "lock_delay", Msg: fmt.Sprintf("must be from 0 to %v, and is %v", b.MaxLockDelay, r.LockDelay)}
	case r.LowestOpen > 0 && (r.Lease == 0 || r.LowestOpen > r.Request):
		return &InvalidError{Field: "lowest_open_request_id", Msg: "goes with lease_id, and is at most request_id"}
	case r.Lease != 0 && (r.TTL != 0 || r.Owner != ""):
		return &InvalidError{Field: "ttl", Msg: "ttl and owner are the lease's: leave them out with lease_id"}
	}
	if r.Lease == 0 {
		if err := b.ttl(r.TTL); err != nil {
			return err
		}
	}
	return first(errors.Join(requestID(r.Request), text("owner", r.Owner), text("actor", r.Actor), metadata(r.Metadata)))
}

func (b *Bounds) ttl(ttl time.Duration) error {
	if ttl < b.MinTTL || ttl > b.MaxTTL {
		return &InvalidError{Field: "ttl", Msg: fmt.Sprintf("must be from %v to %v, and is %v", b.MinTTL, b.MaxTTL, ttl)}
	}
	return nil
}

func name(field, s string) error {
	switch {
	case s == "":
		return &InvalidError{Field: field, Msg: fmt.Sprintf("must not be empty: a lock's name is 1 to %d bytes", MaxName)}
	case len(s) > MaxName:
		return &InvalidError{Field: field, Msg: fmt.Sprintf("must be at most %d bytes, and is %d", MaxName, len(s))}
	case !utf8.ValidString(s):
		return &InvalidError{Field: field, Msg: "must be valid UTF-8"}
	}
	return nil
}

func text(field, s string) error {
	switch {
	case len(s) > MaxText:
		return &InvalidError{Field: field, Msg: fmt.Sprintf("must be at most %d bytes, and is %d", MaxText, len(s))}
	case !utf8.ValidString(s):
		return &InvalidError{Field: field, Msg: "must be valid UTF-8"}
	}
	return nil
}

func metadata(list []machine.Meta) error {
	size := 0
	for _, m := range list {
		size += len(m.Key) + len(m.Value)
		if !utf8.ValidString(m.Key) || !utf8.ValidString(m.Value) {
			return &InvalidError{Field: "metadata", Msg: "must be valid UTF-8"}
		}
	}
	if size > MaxMetadata {
		return &InvalidError{Field: "metadata", Msg: fmt.Sprintf("must be at most %d bytes in all, and is %d", MaxMetadata, size)}
	}
	return nil
}

func requestID(id RequestID) error {
	if id >= machine.AnonymousRequest {
		return &InvalidError{Field: "request_id", Msg: "must be below 2^63"}
	}
	return nil
}

// first returns the first of joined errors: one clear line.
func first(err error) error {
	if joined, ok := err.(interface{ Unwrap() []error }); ok {
		return joined.Unwrap()[0]
	}
	return err
}

func sortedMetadata(list []machine.Meta) []machine.Meta {
	if len(list) == 0 {
		return nil
	}
	out := slices.Clone(list)
	slices.SortFunc(out, func(a, b machine.Meta) int { return strings.Compare(a.Key, b.Key) })
	return out
}

func quoted(s string) string { return strconv.Quote(s) }

// WithDefaults returns the bounds with defaults for those that are 0.
func (b Bounds) WithDefaults() Bounds {
	d := DefaultBounds()
	for _, f := range []struct{ field, value *time.Duration }{
		{&b.MinTTL, &d.MinTTL}, {&b.MaxTTL, &d.MaxTTL}, {&b.MaxLockDelay, &d.MaxLockDelay},
	} {
		if *f.field == 0 {
			*f.field = *f.value
		}
	}
	for _, f := range []struct{ field, value *int }{
		{&b.MaxNamesPerCall, &d.MaxNamesPerCall}, {&b.MaxLeases, &d.MaxLeases},
		{&b.MaxLocks, &d.MaxLocks}, {&b.MaxWaiters, &d.MaxWaiters}, {&b.MaxPending, &d.MaxPending},
	} {
		if *f.field == 0 {
			*f.field = *f.value
		}
	}
	return b
}
