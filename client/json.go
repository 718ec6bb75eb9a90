package client

import (
	"bytes"
	"encoding/json"
	"strconv"
	"time"
)

// The JSON of what a server tells is the same here as everywhere (docs/api.md): the names
// of the API in camel case; numbers as numbers, but request ids as text, for they pass 2^53; words in lower
// case; durations as Go writes them and times as RFC 3339. Everything is there but
// durations and times that are not set.

// field is a name and its value in an object; nil for one that is left out.
type field struct {
	name  string
	value any
}

// object is a JSON object with its fields in order.
func object(fields ...field) ([]byte, error) {
	var out bytes.Buffer
	e := json.NewEncoder(&out)
	e.SetEscapeHTML(false)
	out.WriteByte('{')
	for _, m := range fields {
		if m.value == nil {
			continue
		}
		if out.Len() > 1 {
			out.WriteByte(',')
		}
		out.WriteString(strconv.Quote(m.name) + ":")
		if err := e.Encode(m.value); err != nil {
			return nil, err
		}
	}
	out.WriteByte('}')
	return out.Bytes(), nil
}

func durationIn(name string, d time.Duration) field {
	if d == 0 {
		return field{name, nil}
	}
	return field{name, d.String()}
}

func timeIn(name string, t time.Time) field {
	if t.IsZero() {
		return field{name, nil}
	}
	return field{name, t.UTC()}
}

func listIn[T any](name string, list []T) field {
	if list == nil {
		list = []T{}
	}
	return field{name, list}
}

func mapIn(name string, m map[string]string) field {
	if m == nil {
		m = map[string]string{}
	}
	return field{name, m}
}

func modeIn(shared bool) field {
	if shared {
		return field{"mode", "shared"}
	}
	return field{"mode", "exclusive"}
}

// MarshalJSON implements json.Marshaler, in the API's form.
func (k LockInfo) MarshalJSON() ([]byte, error) {
	return object(
		field{"name", k.Name}, listIn("holders", k.Holders), listIn("waiters", k.Waiters), field{"waiterCount", k.WaiterCount},
		field{"limit", k.Limit}, durationIn("delayRemaining", k.DelayRemaining), field{"declared", k.Declared}, field{"clock", k.Clock},
		field{"lastToken", uint64(k.LastToken)}, field{"holderCount", k.HolderCount},
	)
}

// MarshalJSON implements json.Marshaler, in the API's form.
func (h Holder) MarshalJSON() ([]byte, error) {
	return object(
		field{"token", uint64(h.Token)}, field{"floor", uint64(h.Floor)}, field{"leaseId", h.LeaseID}, field{"owner", h.Owner},
		modeIn(h.Shared), timeIn("since", h.Since), field{"actor", h.Actor}, mapIn("metadata", h.Metadata), durationIn("lockDelay", h.LockDelay),
	)
}

// MarshalJSON implements json.Marshaler, in the API's form.
func (w Waiter) MarshalJSON() ([]byte, error) {
	return object(
		field{"leaseId", w.LeaseID}, field{"owner", w.Owner}, modeIn(w.Shared), timeIn("since", w.Since), field{"actor", w.Actor},
		mapIn("metadata", w.Metadata), field{"limit", w.Limit},
	)
}

// MarshalJSON implements json.Marshaler, in the API's form.
func (o Obstacle) MarshalJSON() ([]byte, error) {
	return object(
		field{"name", o.Name}, field{"position", o.Position}, listIn("holders", o.Holders), listIn("ahead", o.Ahead),
		field{"holderCount", o.HolderCount}, durationIn("delayRemaining", o.DelayRemaining), field{"limit", o.Limit},
	)
}

// MarshalJSON implements json.Marshaler, in the API's form.
func (l LeaseInfo) MarshalJSON() ([]byte, error) {
	return object(
		field{"leaseId", l.ID}, durationIn("ttl", l.TTL), durationIn("remaining", l.Remaining), field{"owner", l.Owner}, mapIn("metadata", l.Metadata),
		timeIn("grantedAt", l.GrantedAt), listIn("holds", l.Holds), listIn("waitingFor", l.WaitingFor), field{"own", l.Own},
		field{"holdCount", l.HoldCount}, field{"waitingCount", l.WaitingCount},
	)
}

// MarshalJSON implements json.Marshaler, in the API's form.
func (h Hold) MarshalJSON() ([]byte, error) {
	return object(
		field{"token", uint64(h.Token)}, field{"leaseId", h.LeaseID}, durationIn("ttl", h.TTL), modeIn(h.Shared), listIn("locks", h.Locks),
		field{"requestId", strconv.FormatUint(h.RequestID, 10)}, timeIn("grantedAt", h.GrantedAt),
	)
}

// MarshalJSON implements json.Marshaler, in the API's form.
func (k HeldLock) MarshalJSON() ([]byte, error) {
	return object(field{"name", k.Name}, field{"floor", uint64(k.Floor)})
}

// MarshalJSON implements json.Marshaler, in the API's form.
func (c TokenCheck) MarshalJSON() ([]byte, error) {
	return object(
		field{"live", c.Live}, field{"currentToken", uint64(c.CurrentToken)}, field{"lastToken", uint64(c.LastToken)}, field{"floor", uint64(c.Floor)},
	)
}

// MarshalJSON implements json.Marshaler, in the API's form.
func (e Event) MarshalJSON() ([]byte, error) {
	return object(
		field{"revision", e.Revision}, field{"kind", e.Kind}, field{"name", e.Name}, field{"leaseId", e.LeaseID}, field{"owner", e.Owner},
		field{"token", uint64(e.Token)}, field{"floor", uint64(e.Floor)}, modeIn(e.Shared), field{"cause", e.Cause}, field{"by", e.By},
		timeIn("time", e.Time), durationIn("delay", e.Delay),
	)
}

// MarshalJSON implements json.Marshaler, in the API's form.
func (s Status) MarshalJSON() ([]byte, error) {
	restored := field{"restored", nil}
	if s.Restored != nil {
		restored.value = s.Restored
	}
	return object(
		field{"version", s.Version}, field{"nodeId", s.NodeID}, field{"clusterId", s.ClusterID}, field{"leader", s.Leader}, field{"term", s.Term},
		field{"revision", s.Revision}, field{"lastToken", uint64(s.LastToken)}, field{"leases", s.Leases}, field{"locks", s.Locks},
		field{"waiters", s.Waiters}, field{"inMemory", s.InMemory}, listIn("members", s.Members), timeIn("startedAt", s.StartedAt),
		restored, field{"level", s.Level},
	)
}

// MarshalJSON implements json.Marshaler, in the API's form.
func (r Restored) MarshalJSON() ([]byte, error) {
	return object(
		timeIn("at", r.At), field{"clusterId", r.ClusterID}, timeIn("backupAt", r.BackupAt), field{"tokensAbove", uint64(r.TokensAbove)},
	)
}

// MarshalJSON implements json.Marshaler, in the API's form.
func (m Member) MarshalJSON() ([]byte, error) {
	return object(
		field{"id", m.ID}, field{"clientAddress", m.ClientAddress}, field{"peerAddress", m.PeerAddress}, field{"role", m.Role},
		field{"leader", m.Leader}, field{"healthy", m.Healthy}, field{"appliedIndex", m.AppliedIndex}, field{"incarnation", m.Incarnation},
	)
}
