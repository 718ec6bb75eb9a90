package fencetest

import (
	"context"
	"errors"
	"runtime"
	"slices"
	"strings"
	"sync"
	"testing"

	"go.uber.org/goleak"

	"github.com/distlock/distlock/fence"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// mutant is a guard with one thing wrong, or none. It is what a first attempt
// at a guard looks like.
type mutant struct {
	key     func(resource string) string
	next    func(resource string, stored fence.Token, pass fence.Pass) (fence.Token, error)
	noRaise bool // Raise checks and stores nothing
	gap     bool // the check and the write are not one step
	floor   bool // an interrupted write leaves its floor
	deaf    bool // an ended context is not looked at

	mu     sync.Mutex
	floors map[string]fence.Token
	texts  map[string]string
}

func newMutant() *mutant {
	return &mutant{
		key:    func(resource string) string { return resource },
		next:   fence.Next,
		floors: map[string]fence.Token{}, texts: map[string]string{},
	}
}

func (m *mutant) Write(ctx context.Context, resource string, pass fence.Pass, text string) error {
	return m.apply(ctx, resource, pass, func(key string, next fence.Token) error {
		m.floors[key], m.texts[key] = next, text
		return nil
	})
}

func (m *mutant) Raise(ctx context.Context, resource string, pass fence.Pass) error {
	return m.apply(ctx, resource, pass, func(key string, next fence.Token) error {
		if !m.noRaise {
			m.floors[key] = next
		}
		return nil
	})
}

func (m *mutant) Interrupt(ctx context.Context, resource string, pass fence.Pass, text string) error {
	return m.apply(ctx, resource, pass, func(key string, next fence.Token) error {
		if m.floor {
			m.floors[key] = next
		}
		return errors.New("killed")
	})
}

func (m *mutant) apply(ctx context.Context, resource string, pass fence.Pass, commit func(string, fence.Token) error) error {
	if err := ctx.Err(); err != nil && !m.deaf {
		return err
	}
	key := m.key(resource)
	m.mu.Lock()
	defer m.mu.Unlock()
	next, err := m.next(resource, m.floors[key], pass)
	if err != nil {
		return err
	}
	if m.gap {
		m.mu.Unlock()
		runtime.Gosched()
		m.mu.Lock()
	}
	return commit(key, next)
}

func (m *mutant) Read(_ context.Context, resource string) (string, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.texts[m.key(resource)], nil
}

func failed(t *testing.T, make func() *mutant) []string {
	var names []string
	for _, c := range checks {
		if err := c.run(t.Context(), make()); err != nil {
			names = append(names, c.name)
		}
	}
	return names
}

func TestARightGuardPasses(t *testing.T) {
	Run(t, func(*testing.T) Subject { return newMutant() })
}

// TestWrongGuardsFail: every classic mistake is noticed, by the test that is
// there for it.
func TestWrongGuardsFail(t *testing.T) {
	stale := func(resource string, stored fence.Token, pass fence.Pass) error {
		return &fence.StaleError{Resource: resource, Token: pass.Token, Stored: stored}
	}
	for _, c := range []struct {
		mistake string
		by      string
		make    func(*mutant)
	}{
		{"nothing is checked", "LowerToken", func(m *mutant) {
			m.next = func(_ string, _ fence.Token, p fence.Pass) (fence.Token, error) { return p.Floor, nil }
		}},
		{"the holder's second write is refused", "SameTokenAgain", func(m *mutant) {
			m.next = func(r string, stored fence.Token, p fence.Pass) (fence.Token, error) {
				if p.Token <= stored {
					return stored, stale(r, stored, p)
				}
				return fence.Next(r, stored, p)
			}
		}},
		{"the token is stored in place of the floor", "SharedFloors", func(m *mutant) {
			m.next = func(r string, stored fence.Token, p fence.Pass) (fence.Token, error) {
				if _, err := fence.Next(r, stored, p); err != nil {
					return stored, err
				}
				return max(stored, p.Token), nil
			}
		}},
		{"the floor falls", "FloorNeverFalls", func(m *mutant) {
			m.next = func(r string, stored fence.Token, p fence.Pass) (fence.Token, error) {
				if _, err := fence.Next(r, stored, p); err != nil {
					return stored, err
				}
				return p.Floor, nil
			}
		}},
		{"any pass will do", "InvalidPass", func(m *mutant) {
			m.next = func(r string, stored fence.Token, p fence.Pass) (fence.Token, error) {
				if p.Token < stored {
					return stored, stale(r, stored, p)
				}
				return max(stored, p.Floor), nil
			}
		}},
		{"the error does not say what is stored", "LowerToken", func(m *mutant) {
			m.next = func(r string, stored fence.Token, p fence.Pass) (fence.Token, error) {
				next, err := fence.Next(r, stored, p)
				if errors.As(err, new(*fence.StaleError)) {
					err = stale(r, 0, p)
				}
				return next, err
			}
		}},
		{"one floor for all resources", "ResourcesApart", func(m *mutant) { m.key = func(string) string { return "" } }},
		{"names end at a NUL", "OddNames", func(m *mutant) {
			m.key = func(r string) string { r, _, _ = strings.Cut(r, "\x00"); return r }
		}},
		{"names are cut", "OddNames", func(m *mutant) { m.key = func(r string) string { return r[:min(len(r), 255)] } }},
		{"names ignore case", "OddNames", func(m *mutant) { m.key = strings.ToLower }},
		{"names ignore spaces at the end", "OddNames", func(m *mutant) { m.key = strings.TrimSpace }},
		{"Raise stores nothing", "RaiseAlone", func(m *mutant) { m.noRaise = true }},
		{"check, then write", "Concurrent", func(m *mutant) { m.gap = true }},
		{"check, then write, at a shared lock", "ConcurrentShared", func(m *mutant) { m.gap = true }},
		{"check, then write, around a raise", "ConcurrentRaise", func(m *mutant) { m.gap = true }},
		{"the floor is stored before the write", "Interrupted", func(m *mutant) { m.floor = true }},
		{"an ended context writes", "Canceled", func(m *mutant) { m.deaf = true }},
	} {
		t.Run(c.mistake, func(t *testing.T) {
			got := failed(t, func() *mutant {
				m := newMutant()
				c.make(m)
				return m
			})
			if !slices.Contains(got, c.by) {
				t.Errorf("%s does not notice; these do: %v", c.by, got)
			}
		})
	}
}
