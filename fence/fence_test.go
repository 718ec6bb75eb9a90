package fence_test

import (
	"context"
	"errors"
	"fmt"
	"math"
	"sync"
	"testing"

	"go.uber.org/goleak"

	"github.com/distlock/distlock/fence"
	"github.com/distlock/distlock/fence/fencetest"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func TestNext(t *testing.T) {
	const top = fence.MaxToken
	for _, c := range []struct {
		stored, token, floor fence.Token
		want                 fence.Token
		stale, invalid       bool
	}{
		{stored: 0, token: 1, floor: 1, want: 1},
		{stored: 5, token: 5, floor: 5, want: 5},
		{stored: 5, token: 6, floor: 6, want: 6},
		{stored: 5, token: 9, floor: 3, want: 5},
		{stored: 5, token: 9, floor: 7, want: 7},
		{stored: 0, token: top, floor: top, want: top},
		{stored: 5, token: 4, floor: 4, want: 5, stale: true},
		{stored: top, token: top - 1, floor: 1, want: top, stale: true},
		{stored: 5, token: 0, floor: 0, want: 5, invalid: true},
		{stored: 5, token: 6, floor: 0, want: 5, invalid: true},
		{stored: 5, token: 6, floor: 7, want: 5, invalid: true},
		{stored: 5, token: top + 1, floor: 1, want: 5, invalid: true},
		{stored: 5, token: math.MaxUint64, floor: math.MaxUint64, want: 5, invalid: true},
	} {
		got, err := fence.Next("r", c.stored, fence.Pass{Token: c.token, Floor: c.floor})
		var stale *fence.StaleError
		isStale := errors.As(err, &stale)
		if got != c.want || isStale != c.stale || errors.Is(err, fence.ErrInvalidPass) != c.invalid || (err != nil) != (c.stale || c.invalid) {
			t.Errorf("Next(stored %d, token %d, floor %d) = %d, %v", c.stored, c.token, c.floor, got, err)
		}
		if isStale && *stale != (fence.StaleError{Resource: "r", Token: c.token, Stored: c.stored}) {
			t.Errorf("%+v", *stale)
		}
	}
}

// cells is a Memory with a text per resource behind it.
type cells struct {
	fence.Memory
	mu    sync.Mutex
	texts map[string]string
}

func (c *cells) Write(ctx context.Context, resource string, pass fence.Pass, text string) error {
	return c.Memory.Write(ctx, resource, pass, func() error {
		c.mu.Lock()
		defer c.mu.Unlock()
		c.texts[resource] = text
		return nil
	})
}

func (c *cells) Interrupt(ctx context.Context, resource string, pass fence.Pass, _ string) error {
	return c.Memory.Write(ctx, resource, pass, func() error { return errors.New("killed") })
}

func (c *cells) Read(_ context.Context, resource string) (string, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.texts[resource], nil
}

func TestMemoryMeetsTheContract(t *testing.T) {
	fencetest.Run(t, func(*testing.T) fencetest.Subject { return &cells{texts: map[string]string{}} })
}

func TestMemoryReturnsTheWritesError(t *testing.T) {
	var guard fence.Memory
	full := errors.New("full")
	if err := guard.Write(t.Context(), "r", fence.Pass{Token: 3, Floor: 3}, func() error { return full }); err != full {
		t.Errorf("Write = %v, want the write's own error", err)
	}
	if stored := guard.Stored("r"); stored != 0 {
		t.Errorf("a failed write stored the floor %d", stored)
	}
}

func TestMemorySurvivesAPanic(t *testing.T) {
	var guard fence.Memory
	func() {
		defer func() { recover() }()
		guard.Write(t.Context(), "r", fence.Pass{Token: 3, Floor: 3}, func() error { panic("bug") })
	}()
	if stored := guard.Stored("r"); stored != 0 {
		t.Errorf("a write that panicked stored the floor %d", stored)
	}
	if err := guard.Raise(t.Context(), "r", fence.Pass{Token: 4, Floor: 4}); err != nil || guard.Stored("r") != 4 {
		t.Errorf("after a panic: Raise = %v, stored %d", err, guard.Stored("r"))
	}
}

// TestMemoryResourcesDoNotWait: a write may use another resource meanwhile.
func TestMemoryResourcesDoNotWait(t *testing.T) {
	var guard fence.Memory
	pass := fence.Pass{Token: 1, Floor: 1}
	err := guard.Write(t.Context(), "a", pass, func() error { return guard.Raise(t.Context(), "b", pass) })
	if err != nil || guard.Stored("a") != 1 || guard.Stored("b") != 1 {
		t.Errorf("%v, stored %d and %d", err, guard.Stored("a"), guard.Stored("b"))
	}
}

// A holder that was replaced without noticing is turned away.
func Example() {
	ctx := context.Background()
	var guard fence.Memory
	balance := 100

	// In a program these come from client.Lock.Pass.
	first := fence.Pass{Token: 7, Floor: 7}
	second := fence.Pass{Token: 8, Floor: 8}

	// The first holder reads 100, and is paused for longer than its lease.
	// The second is granted the lock and writes.
	err := guard.Write(ctx, "account", second, func() error { balance += 50; return nil })
	fmt.Println(balance, err)

	// The first wakes and writes what it had computed.
	err = guard.Write(ctx, "account", first, func() error { balance = 100 - 30; return nil })
	fmt.Println(balance, err)

	var stale *fence.StaleError
	fmt.Println(errors.As(err, &stale))
	// Output:
	// 150 <nil>
	// 150 resource "account": token 7 is stale, the resource has seen 8
	// true
}

// A careful holder raises the floor before it reads: from then on nobody who
// was overtaken can change what it has read.
func ExampleMemory_Raise() {
	ctx := context.Background()
	var guard fence.Memory
	balance := 100

	second := fence.Pass{Token: 8, Floor: 8}
	if err := guard.Raise(ctx, "account", second); err != nil {
		fmt.Println(err)
	}
	read := balance

	// The first holder writes late, between the second's read and write.
	err := guard.Write(ctx, "account", fence.Pass{Token: 7, Floor: 7}, func() error { balance = 70; return nil })
	fmt.Println(err)

	err = guard.Write(ctx, "account", second, func() error { balance = read + 50; return nil })
	fmt.Println(balance, err)
	// Output:
	// resource "account": token 7 is stale, the resource has seen 8
	// 150 <nil>
}

// Floors let the holders of a shared lock write beside each other, in any
// order, and keep out the one that was replaced.
func ExampleMemory_shared() {
	ctx := context.Background()
	var guard fence.Memory
	write := func(pass fence.Pass) {
		fmt.Println(pass.Token, guard.Write(ctx, "pool", pass, func() error { return nil }))
	}
	// A semaphore of two: 3 and 4 hold it.
	write(fence.Pass{Token: 4, Floor: 3})
	write(fence.Pass{Token: 3, Floor: 3})
	// 3 expires, 5 is granted; the lowest that lives is 4 now.
	write(fence.Pass{Token: 5, Floor: 4})
	write(fence.Pass{Token: 4, Floor: 3})
	write(fence.Pass{Token: 3, Floor: 3})
	// Output:
	// 4 <nil>
	// 3 <nil>
	// 5 <nil>
	// 4 <nil>
	// 3 resource "pool": token 3 is stale, the resource has seen 4
}

func BenchmarkMemory(b *testing.B) {
	var guard fence.Memory
	pass := fence.Pass{Token: 1, Floor: 1}
	write := func() error { return nil }
	b.ReportAllocs()
	for b.Loop() {
		if err := guard.Write(b.Context(), "r", pass, write); err != nil {
			b.Fatal(err)
		}
	}
}
