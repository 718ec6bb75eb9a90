package redisfence_test

import (
	"context"
	"errors"
	"reflect"
	"strings"
	"testing"

	"github.com/distlock/distlock/fence"
	"github.com/distlock/distlock/fence/redisfence"
)

// What the script does is tested against real servers, in the module
// internal/storetest. Here is what the guard sends, and makes of the answers.

// answering is a client to which the script answers so.
func answering(reply any, err error, keys *[]string, args *[]any) *redisfence.Guard {
	return redisfence.New(redisfence.EvalFunc(func(_ context.Context, _ string, k []string, a ...any) (any, error) {
		if keys != nil {
			*keys, *args = k, a
		}
		return reply, err
	}))
}

func TestWhatIsSent(t *testing.T) {
	var keys []string
	var args []any
	g := answering([]any{"7", "OK", int64(1)}, nil, &keys, &args)
	replies, err := g.Do(t.Context(), "orders/42", fence.Pass{Token: 9, Floor: 8},
		redisfence.Do("SET", g.Key("orders/42", "total"), 50), redisfence.Do("HSET", g.Key("orders/42", "by"), "who", "alice"))
	if err != nil || !reflect.DeepEqual(replies, []any{"OK", int64(1)}) {
		t.Errorf("%v, %v", replies, err)
	}
	if want := []string{"fence:{orders/42}", "{orders/42}:total", "{orders/42}:by"}; !reflect.DeepEqual(keys, want) {
		t.Errorf("keys %q, want %q", keys, want)
	}
	if want := []any{"9", "8", "SET", 1, 50, "HSET", 2, "who", "alice"}; !reflect.DeepEqual(args, want) {
		t.Errorf("arguments %v, want %v", args, want)
	}
}

func TestAnswers(t *testing.T) {
	down := errors.New("down")
	pass := fence.Pass{Token: 5, Floor: 5}
	for _, c := range []struct {
		reply any
		err   error
		want  string // in the error; "" for none
	}{
		{[]any{"5", "OK"}, nil, ""},
		{[]any{[]byte("0"), "OK"}, nil, ""},
		{[]any{"6"}, nil, "token 5 is stale"},
		{[]any{[]byte("6")}, nil, "token 5 is stale"},
		{nil, down, "down"},
		{"5", nil, "string"},
		{[]any{}, nil, "list"},
		{[]any{int64(5), "OK"}, nil, "int64"},
		{[]any{"x", "OK"}, nil, "invalid syntax"},
		{[]any{"9007199254740992", "OK"}, nil, "above all tokens"},
		{[]any{"5"}, nil, "0 replies to 1 commands"},
	} {
		err := answering(c.reply, c.err, nil, nil).Write(t.Context(), "r", pass, []redisfence.Command{redisfence.Do("SET", "{r}", "x")})
		if (err == nil) != (c.want == "") || err != nil && !strings.Contains(err.Error(), c.want) {
			t.Errorf("answer %v, %v: %v, want %q", c.reply, c.err, err, c.want)
		}
		if stale := new(fence.StaleError); strings.Contains(c.want, "stale") && (!errors.As(err, &stale) || stale.Stored != 6) {
			t.Errorf("answer %v: %v", c.reply, err)
		}
	}
}

func TestNothingIsSent(t *testing.T) {
	g := redisfence.New(redisfence.EvalFunc(func(context.Context, string, []string, ...any) (any, error) {
		t.Error("something was sent")
		return nil, nil
	}))
	if err := g.Raise(t.Context(), "r", fence.Pass{}); !errors.Is(err, fence.ErrInvalidPass) {
		t.Error(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if err := g.Raise(ctx, "r", fence.Pass{Token: 1, Floor: 1}); !errors.Is(err, context.Canceled) {
		t.Error(err)
	}
}

// TestHashTags: of each key, what Redis takes for its hash tag is the same,
// and names that differ have keys that differ.
func TestHashTags(t *testing.T) {
	// From the specification of Redis Cluster.
	slotOf := func(key string) string {
		if _, after, ok := strings.Cut(key, "{"); ok {
			if tag, _, ok := strings.Cut(after, "}"); ok && tag != "" {
				return tag
			}
		}
		return key
	}
	g := redisfence.New(nil)
	seen := map[string]string{}
	for _, resource := range []string{"", "a", "{a}", "{a}:b", "}", "a}b", "{", "}{", "a:b", "\x00", "sha256:a", g.FloorKey("")[len("fence:{") : len(g.FloorKey(""))-1]} {
		floor := g.FloorKey(resource)
		for _, suffix := range []string{"", "x", "}", "{y}"} {
			if key := g.Key(resource, suffix); slotOf(key) != slotOf(floor) {
				t.Errorf("%q: %q and %q are in different slots", resource, key, floor)
			}
		}
		if other, ok := seen[floor]; ok {
			t.Errorf("%q and %q share the floor in %q", resource, other, floor)
		}
		seen[floor] = resource
	}
}
