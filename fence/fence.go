// Package fence holds the half of a lock that lives at the guarded resource:
// the fencing token and the one rule by which a resource turns away a holder
// that has been replaced without noticing.
//
// The rule, for every mode of lock: reject a write whose token is below the
// stored floor; otherwise store max(stored floor, the write's floor),
// atomically with the write.
//
// Memory guards what lives in this process. The packages below guard what lives
// elsewhere: sqlfence, redisfence, filefence; httpfence and grpcfence carry
// passes to servers; fencetest holds the tests that every guard has to pass.
package fence

import "strconv"

// MaxToken is the highest token distlock ever mints. Tokens stay below 2^53
// so that a JSON number holds them exactly.
const MaxToken Token = 1<<53 - 1

// Token is a fencing token: minted at grant from one store-wide counter,
// strictly rising in grant order, never 0 and never reused.
type Token uint64

// String returns the token in decimal.
func (t Token) String() string { return strconv.FormatUint(uint64(t), 10) }

// Pass is what a holder shows to a guarded resource for one lock.
type Pass struct {
	// Token of the grant.
	Token Token
	// Floor is the lowest token still live on the lock at the moment of the
	// grant. It equals Token for an exclusive lock.
	Floor Token
}

// Holder is what shows the passes of a lock that it holds; *client.Lock is one. It
// is safe for concurrent use.
type Holder interface {
	// PassFor is the pass for the resource that the lock's name guards; false
	// when the lock is not on that name.
	PassFor(name string) (Pass, bool)
	// Err is nil while the lock may be believed held.
	Err() error
}
