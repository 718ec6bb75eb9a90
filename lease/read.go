package lease

import (
	"context"
	"strings"

	"github.com/distlock/distlock/lease/machine"
)

// Leases lists at most limit leases (at least 1) in order of id, from the one
// after after; more tells that there are others behind.
func (m *Manager) Leases(ctx context.Context, after ID, limit int) (list []LeaseInfo, more bool, err error) {
	if _, err := m.Do(ctx, timesLeft(nil)); err != nil {
		return nil, false, err
	}
	list, more = leasesIn(m.store.View(), after, limit)
	ids := make(timesLeft, len(list))
	for i := range list {
		ids[i] = list[i].ID
	}
	r, err := m.Do(ctx, ids)
	if err == nil {
		for i, left := range r.rest.left {
			list[i].Remaining = left
		}
	}
	return list, more, err
}

func leasesIn(view *machine.View, after ID, limit int) (list []LeaseInfo, more bool) {
	limit = max(limit, 1)
	view.AscendLeases(after, func(l machine.Lease) bool {
		if more = len(list) == limit; !more {
			list = append(list, LeaseInfo{Lease: l})
		}
		return !more
	})
	return list, more
}

// Locks lists at most limit locks (at least 1) whose names begin with prefix
// and come after after, in order of name, with the revision of the answer;
// more tells that there are others behind.
func (m *Manager) Locks(ctx context.Context, prefix, after string, limit int) (list []LockInfo, more bool, revision uint64, err error) {
	if _, err := m.Do(ctx, timesLeft(nil)); err != nil {
		return nil, false, 0, err
	}
	list, more, revision = locksIn(m.store.View(), prefix, after, limit)
	// What is left of delays is the leader's word too.
	_, err = m.Do(ctx, timesLeft(nil))
	for i := range list {
		list[i].DelayRemaining = m.remaining(list[i].Delays)
	}
	return list, more, revision, err
}

func locksIn(view *machine.View, prefix, after string, limit int) (list []LockInfo, more bool, revision uint64) {
	limit = max(limit, 1)
	from := prefix
	if after != "" {
		from = max(from, after+"\x00")
	}
	view.AscendLocks(from, func(k machine.Lock) bool {
		if !strings.HasPrefix(k.Name, prefix) {
			return false
		}
		if more = len(list) == limit; !more {
			list = append(list, LockInfo{Lock: k})
		}
		return !more
	})
	return list, more, view.Revision()
}

// StaleLock shows one lock as this node has it, whether it leads or not.
// Another node may know better; what is left of lock-delays only the leader
// knows. Errors: *InvalidError.
func (m *Manager) StaleLock(lock string) (LockInfo, uint64, error) {
	if err := name("name", lock); err != nil {
		return LockInfo{}, 0, err
	}
	var info LockInfo
	var revision uint64
	m.store.Read(func(s *machine.Machine) {
		info.Lock, _ = s.Lock(lock)
		revision = s.Revision()
	})
	return info, revision, nil
}

// StaleLocks lists locks like Locks, as this node has them.
func (m *Manager) StaleLocks(prefix, after string, limit int) (list []LockInfo, more bool, revision uint64) {
	return locksIn(m.store.View(), prefix, after, limit)
}

// StaleLease shows one lease as this node has it; its remaining time only the
// leader knows. Errors: *Refusal when it is gone.
func (m *Manager) StaleLease(id ID) (info LeaseInfo, err error) {
	m.store.Read(func(s *machine.Machine) {
		var ok bool
		if info.Lease, ok = s.Lease(id); !ok {
			err = s.LeaseGone(id)
		}
	})
	return info, err
}

// StaleLeases lists leases like Leases, as this node has them.
func (m *Manager) StaleLeases(after ID, limit int) ([]LeaseInfo, bool) {
	return leasesIn(m.store.View(), after, limit)
}

// Watch follows the locks whose names begin with prefix, from revision from
// on; 0 means from now on. Any node serves it. Errors: *RangeError.
func (m *Manager) Watch(prefix string, from uint64) (*Watcher, error) {
	return m.store.Watch(prefix, from)
}
