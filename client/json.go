package client

import (
	"bytes"
	"encoding/json"
	"strconv"
	"time"
)

// What a server tells has one JSON, whoever prints it: the names of the API in camel
// case; numbers as numbers, but request ids as text, for they pass 2^53; words in lower
// case; durations as Go writes them and times as RFC 3339. Everything is there but
// durations and times that are not set.

// member is a name and its value in an object; nil for one that is left out.
type member struct {
	name  string
	value any
}

// object is a JSON object with its members in order.
func object(members ...member) ([]byte, error) {
	var out bytes.Buffer
	e := json.NewEncoder(&out)
	e.SetEscapeHTML(false)
	out.WriteByte('{')
	for _, m := range members {
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

func spanIn(name string, d time.Duration) member {
	if d == 0 {
		return member{name, nil}
	}
	return member{name, d.String()}
}

func timeIn(name string, t time.Time) member {
	if t.IsZero() {
		return member{name, nil}
	}
	return member{name, t.UTC()}
}

func listIn[T any](name string, list []T) member {
	if list == nil {
		list = []T{}
	}
	return member{name, list}
}

func mapIn(name string, m map[string]string) member {
	if m == nil {
		m = map[string]string{}
	}
	return member{name, m}
}

func modeIn(shared bool) member {
	if shared {
		return member{"mode", "shared"}
	}
	return member{"mode", "exclusive"}
}

// MarshalJSON implements json.Marshaler, in the API's form.
func (k LockInfo) MarshalJSON() ([]byte, error) {
	return object(
		member{"name", k.Name}, listIn("holders", k.Holders), listIn("waiters", k.Waiters), member{"waiterCount", k.WaiterCount},
		member{"limit", k.Limit}, spanIn("delayRemaining", k.DelayRemaining), member{"declared", k.Declared}, member{"clock", k.Clock},
		member{"lastToken", uint64(k.LastToken)}, member{"holderCount", k.HolderCount},
	)
}

// MarshalJSON implements json.Marshaler, in the API's form.
func (h Holder) MarshalJSON() ([]byte, error) {
	return object(
		member{"token", uint64(h.Token)}, member{"floor", uint64(h.Floor)}, member{"leaseId", h.LeaseID}, member{"owner", h.Owner},
		modeIn(h.Shared), timeIn("since", h.Since), member{"actor", h.Actor}, mapIn("metadata", h.Metadata), spanIn("lockDelay", h.LockDelay),
	)
}

// MarshalJSON implements json.Marshaler, in the API's form.
func (w Waiter) MarshalJSON() ([]byte, error) {
	return object(
		member{"leaseId", w.LeaseID}, member{"owner", w.Owner}, modeIn(w.Shared), timeIn("since", w.Since), member{"actor", w.Actor},
		mapIn("metadata", w.Metadata), member{"limit", w.Limit},
	)
}

// MarshalJSON implements json.Marshaler, in the API's form.
func (o Obstacle) MarshalJSON() ([]byte, error) {
	return object(
		member{"name", o.Name}, member{"position", o.Position}, listIn("holders", o.Holders), listIn("ahead", o.Ahead),
		member{"holderCount", o.HolderCount}, spanIn("delayRemaining", o.DelayRemaining), member{"limit", o.Limit},
	)
}

// MarshalJSON implements json.Marshaler, in the API's form.
func (l LeaseInfo) MarshalJSON() ([]byte, error) {
	return object(
		member{"leaseId", l.ID}, spanIn("ttl", l.TTL), spanIn("remaining", l.Remaining), member{"owner", l.Owner}, mapIn("metadata", l.Metadata),
		timeIn("grantedAt", l.GrantedAt), listIn("holds", l.Holds), listIn("waitingFor", l.WaitingFor), member{"own", l.Own},
		member{"holdCount", l.HoldCount}, member{"waitingCount", l.WaitingCount},
	)
}

// MarshalJSON implements json.Marshaler, in the API's form.
func (h Hold) MarshalJSON() ([]byte, error) {
	return object(
		member{"token", uint64(h.Token)}, member{"leaseId", h.LeaseID}, spanIn("ttl", h.TTL), modeIn(h.Shared), listIn("locks", h.Locks),
		member{"requestId", strconv.FormatUint(h.RequestID, 10)}, timeIn("grantedAt", h.GrantedAt),
	)
}

// MarshalJSON implements json.Marshaler, in the API's form.
func (k HeldLock) MarshalJSON() ([]byte, error) {
	return object(member{"name", k.Name}, member{"floor", uint64(k.Floor)})
}

// MarshalJSON implements json.Marshaler, in the API's form.
func (c TokenCheck) MarshalJSON() ([]byte, error) {
	return object(
		member{"live", c.Live}, member{"currentToken", uint64(c.CurrentToken)}, member{"lastToken", uint64(c.LastToken)}, member{"floor", uint64(c.Floor)},
	)
}

// MarshalJSON implements json.Marshaler, in the API's form.
func (e Event) MarshalJSON() ([]byte, error) {
	return object(
		member{"revision", e.Revision}, member{"kind", e.Kind}, member{"name", e.Name}, member{"leaseId", e.LeaseID}, member{"owner", e.Owner},
		member{"token", uint64(e.Token)}, member{"floor", uint64(e.Floor)}, modeIn(e.Shared), member{"cause", e.Cause}, member{"by", e.By},
		timeIn("time", e.Time), spanIn("delay", e.Delay),
	)
}

// MarshalJSON implements json.Marshaler, in the API's form.
func (s Status) MarshalJSON() ([]byte, error) {
	restored := member{"restored", nil}
	if s.Restored != nil {
		restored.value = s.Restored
	}
	return object(
		member{"version", s.Version}, member{"nodeId", s.NodeID}, member{"clusterId", s.ClusterID}, member{"leader", s.Leader}, member{"term", s.Term},
		member{"revision", s.Revision}, member{"lastToken", uint64(s.LastToken)}, member{"leases", s.Leases}, member{"locks", s.Locks},
		member{"waiters", s.Waiters}, member{"inMemory", s.InMemory}, listIn("members", s.Members), timeIn("startedAt", s.StartedAt),
		restored, member{"level", s.Level},
	)
}

// MarshalJSON implements json.Marshaler, in the API's form.
func (r Restored) MarshalJSON() ([]byte, error) {
	return object(
		timeIn("at", r.At), member{"clusterId", r.ClusterID}, timeIn("backupAt", r.BackupAt), member{"tokensAbove", uint64(r.TokensAbove)},
	)
}

// MarshalJSON implements json.Marshaler, in the API's form.
func (m Member) MarshalJSON() ([]byte, error) {
	return object(
		member{"id", m.ID}, member{"clientAddress", m.ClientAddress}, member{"peerAddress", m.PeerAddress}, member{"role", m.Role},
		member{"leader", m.Leader}, member{"healthy", m.Healthy}, member{"appliedIndex", m.AppliedIndex}, member{"incarnation", m.Incarnation},
	)
}
