package fence

import (
	"context"
	"errors"
	"fmt"
)

// Guard stands at resources that only the holder of a lock may change, and
// turns away holders that have been replaced. W is one write in the words of
// the store behind it: a function for memory, bytes for a file, a function of
// the transaction for a database.
//
// A guard keeps one stored floor per resource, 0 at first, and never lets it
// fall. It forgets no floor while the resource exists: a guard that caches
// floors per process, or drops them on a restart, guards nothing.
//
// All methods may be called from any goroutine and any process that reaches
// the store. Package fencetest holds the tests that every guard has to pass.
type Guard[W any] interface {
	// Write makes the write if pass may still write, and stores the higher
	// floor with it: both happen, or neither, also when the process or the
	// store dies in between. A write that fails on its own account leaves the
	// stored floor as it was, and its error is returned as it is.
	//
	// A pass that has been overtaken gets a *StaleError, and one that no
	// grant can have given an error that is ErrInvalidPass.
	Write(ctx context.Context, resource string, pass Pass, write W) error

	// Raise stores the higher floor without writing. A holder that reads
	// before it writes calls it right after its grant: from then on no
	// overtaken holder can change what was read. Errors are those of Write.
	Raise(ctx context.Context, resource string, pass Pass) error
}

// ErrInvalidPass is a pass that no grant can have given: the token or floor is
// 0 or above MaxToken, or the floor is above the token.
var ErrInvalidPass = errors.New("not a pass of any grant")

// StaleError turns away a pass that has been overtaken: somebody was granted
// the lock later, and has been at the resource since.
type StaleError struct {
	Resource string
	Token    Token // of the pass that was turned away
	Stored   Token // the resource's floor, above Token
}

func (e *StaleError) Error() string {
	return fmt.Sprintf("resource %q: token %d is stale, the resource has seen %d", e.Resource, e.Token, e.Stored)
}

// Next is the rule: given the floor that is stored for a resource, 0 for none,
// it answers with the floor to store with pass's write, or with the reason to
// turn the write away, as Guard.Write describes it. Reading stored, the write
// and storing the answer must be one atomic step.
//
// A pass whose token equals the stored floor may write: it is the holder's own
// second write.
func Next(resource string, stored Token, pass Pass) (Token, error) {
	if pass.Token == 0 || pass.Token > MaxToken || pass.Floor == 0 || pass.Floor > pass.Token {
		return stored, fmt.Errorf("resource %q: token %d with floor %d: %w", resource, pass.Token, pass.Floor, ErrInvalidPass)
	}
	if pass.Token < stored {
		return stored, &StaleError{Resource: resource, Token: pass.Token, Stored: stored}
	}
	return max(stored, pass.Floor), nil
}
