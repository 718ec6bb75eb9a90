package machine

import (
	"fmt"

	"github.com/distlock/distlock/fence"
)

// HistoryGap is by how much a new history raises every counter: at 100,000
// grants a second the old one needs five years to get there, and some 500
// restores fit below fence.MaxToken.
const HistoryGap = 1 << 44

// ErrTokensExhausted says that there is no room for the tokens of another
// history.
var ErrTokensExhausted = fmt.Errorf("the tokens of a new history would exceed %d", fence.MaxToken)

// NewHistory makes the state of a backup the beginning of a history of its
// own: the one that the backup was taken of may have gone on. All leases end,
// and tokens, lease ids, revisions and the clocks of declared locks go on
// above whatever the old history can have given out, tokens also above above.
// It returns the token that all new ones are above. Only the owning goroutine
// may call it. Errors: ErrTokensExhausted, with nothing changed.
func (m *Machine) NewHistory(above fence.Token, stamp int64) (fence.Token, error) {
	minted := max(m.minted+HistoryGap, uint64(above))
	ids, revision := m.leaseIDs+HistoryGap, m.revision+HistoryGap
	if minted >= maxTokens || ids >= maxTokens || revision >= maxTokens {
		return 0, ErrTokensExhausted
	}
	m.stamp = stamp
	m.minted, m.leaseIDs, m.revision = minted, ids, revision
	var all []*lease
	m.leases.Scan(func(_ LeaseID, l *lease) bool {
		all = append(all, l)
		return true
	})
	for _, l := range all {
		m.endLease(l, EndRevoked, "restore")
	}
	m.settle()
	var declared []string
	m.locks.Scan(func(name string, k *lock) bool {
		if k.declared {
			declared = append(declared, name)
		}
		return true
	})
	for _, name := range declared {
		k := m.editLock(name)
		k.setClock(k.clock+HistoryGap, k.expires)
	}
	m.events = nil
	return fence.Token(minted), nil
}
