package believe_test

import (
	"context"
	"fmt"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/distlock/distlock/client"
	"github.com/distlock/distlock/internal/reliability/believe"
	"github.com/distlock/distlock/internal/server"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// TestCompareSeesEveryDifference: what it is for, each alone.
func TestCompareSeesEveryDifference(t *testing.T) {
	hold := believe.Hold{Name: "a", Token: 1}
	crowd := []believe.Report{{Holds: []believe.Hold{hold}, Waits: map[string]int{"b": 1}}}
	state := func(holds map[believe.Hold]string, waits map[string]int) believe.State {
		return believe.State{Holds: holds, Waits: waits}
	}
	same := state(map[believe.Hold]string{hold: "x"}, map[string]int{"b": 1})
	if d := believe.Compare(crowd, same, crowd, true); !d.None() {
		t.Errorf("the same: %v", d)
	}
	for what, s := range map[string]believe.State{
		"not held":        state(nil, map[string]int{"b": 1}),
		"another's":       state(map[believe.Hold]string{hold: "x", {Name: "a", Token: 2}: "y"}, map[string]int{"b": 1}),
		"not in a queue":  state(map[believe.Hold]string{hold: "x"}, nil),
		"a ghost waits":   state(map[believe.Hold]string{hold: "x"}, map[string]int{"b": 2}),
		"granted to many": state(map[believe.Hold]string{{Name: "a", Token: 2}: "y"}, map[string]int{"b": 1}),
	} {
		if d := believe.Compare(crowd, s, crowd, true); d.None() {
			t.Errorf("%s: no difference", what)
		}
	}
	operated := []believe.Report{{Holds: []believe.Hold{{Name: "op/a", Token: 1}}}}
	if d := believe.Compare(operated, state(nil, nil), operated, false); !d.None() {
		t.Errorf("what an operator has just ended: %v", d)
	}
	if d := believe.Compare(operated, state(nil, nil), operated, true); d.None() {
		t.Error("what an operator ended long ago: no difference")
	}
}

// TestACrowdWithoutFaults comes to rest, agrees with the server, and leaves
// nothing behind.
func TestACrowdWithoutFaults(t *testing.T) {
	srv, err := server.New(server.Config{Address: "127.0.0.1", InMemory: true})
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan error, 1)
	go func() { ended <- srv.Run(ctx) }()
	defer func() {
		cancel()
		<-ended
	}()
	look, err := client.New([]string{srv.Addr().String()})
	if err != nil {
		t.Fatal(err)
	}
	defer look.Close()
	var crowds believe.Crowds
	for i := range 4 {
		cfg := believe.Config{
			Endpoints: []string{srv.Addr().String()}, Owner: fmt.Sprint("crowd", i), Seed: uint64(i), Hot: 2, Callers: 4, Locks: 200,
			MinTTL: 300 * time.Millisecond, MaxTTL: time.Second, Pause: 5 * time.Millisecond,
		}
		if i%2 == 1 {
			cfg.Options = append(cfg.Options, client.WithUnary())
		}
		c, err := believe.Start(cfg)
		if err != nil {
			t.Fatal(err)
		}
		crowds = append(crowds, c)
	}
	for range 3 {
		time.Sleep(700 * time.Millisecond)
		ops, err := believe.Round(ctx, look, crowds, 3*time.Second)
		if err != nil {
			t.Fatal(err)
		}
		t.Logf("%d operations", ops)
	}
	for _, c := range crowds {
		c.Close()
	}
}
