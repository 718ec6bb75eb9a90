package fence

import (
	"context"
	"sync"
)

// Memory guards resources that live in this process: a write is a function,
// run while its resource is locked. Writes of different resources do not wait
// for each other. A write must not use the guard for its own resource.
//
// Floors are kept for as long as the Memory is, which is right for resources
// that end with the process too, and for no others. The zero value is ready to
// use, and must not be copied after first use.
type Memory struct {
	mu        sync.Mutex // guards the map; taken before no other lock
	resources map[string]*resource
}

type resource struct {
	mu     sync.Mutex // held while a write runs; taken without Memory.mu
	stored Token
}

var _ Guard[func() error] = (*Memory)(nil)

// Write runs write if pass may still write. A write that returns an error, or
// panics, leaves the floor as it was; what it has changed by then is its own
// to undo.
func (m *Memory) Write(ctx context.Context, name string, pass Pass, write func() error) error {
	r := m.resource(name)
	r.mu.Lock()
	defer r.mu.Unlock()
	if err := context.Cause(ctx); err != nil {
		return err
	}
	next, err := Next(name, r.stored, pass)
	if err != nil {
		return err
	}
	if err := write(); err != nil {
		return err
	}
	r.stored = next
	return nil
}

// Raise stores the higher floor, as Guard.Raise describes it.
func (m *Memory) Raise(ctx context.Context, name string, pass Pass) error {
	return m.Write(ctx, name, pass, func() error { return nil })
}

// Stored is the floor of a resource, 0 for one that nobody has written to or
// raised.
func (m *Memory) Stored(name string) Token {
	r := m.resource(name)
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.stored
}

func (m *Memory) resource(name string) *resource {
	m.mu.Lock()
	defer m.mu.Unlock()
	r, ok := m.resources[name]
	if !ok {
		if m.resources == nil {
			m.resources = make(map[string]*resource)
		}
		r = new(resource)
		m.resources[name] = r
	}
	return r
}
