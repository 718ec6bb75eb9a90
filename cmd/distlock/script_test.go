package main

import (
	"context"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/rogpeppe/go-internal/testscript"

	"github.com/distlock/distlock/internal/server"
)

func TestMain(m *testing.M) {
	testscript.Main(m, map[string]func(){"distlock": main})
}

// TestScripts runs testdata/*.txt: the real command against a server of the
// script's own, at $DISTLOCK_ENDPOINTS. `long NAME N [TEXT]` sets a variable to
// N times TEXT.
func TestScripts(t *testing.T) {
	testscript.Run(t, testscript.Params{
		Dir: "testdata",
		Setup: func(env *testscript.Env) error {
			listener, err := net.Listen("tcp", "127.0.0.1:0")
			if err != nil {
				return err
			}
			s, err := server.New(server.Config{
				Listener: listener, DrainTimeout: time.Second, Version: "test",
				InMemory: !strings.HasSuffix(env.WorkDir, "script-cluster"), DataDir: filepath.Join(env.WorkDir, "served"),
			})
			if err != nil {
				return err
			}
			ctx, cancel := context.WithCancel(context.Background())
			done := make(chan error, 1)
			go func() { done <- s.Run(ctx) }()
			env.Defer(func() {
				cancel()
				<-done
			})
			env.Setenv("DISTLOCK_ENDPOINTS", listener.Addr().String())
			env.Setenv("HOME", env.WorkDir)
			env.Setenv("PORT", fmt.Sprint(listener.Addr().(*net.TCPAddr).Port))
			return nil
		},
		Cmds: map[string]func(ts *testscript.TestScript, neg bool, args []string){
			"long": func(ts *testscript.TestScript, neg bool, args []string) {
				var n int
				fmt.Sscan(args[1], &n)
				text := "x"
				if len(args) > 2 {
					text = args[2]
				}
				ts.Setenv(args[0], strings.Repeat(text, n))
			},
			// oneline FILE: it has exactly one line, and no stack trace.
			"oneline": func(ts *testscript.TestScript, neg bool, args []string) {
				text := ts.ReadFile(args[0])
				if strings.Count(text, "\n") != 1 || !strings.HasPrefix(text, "distlock: ") || strings.Contains(text, "goroutine") {
					ts.Fatalf("want one line that begins with distlock:, got %q", text)
				}
			},
			// status N CMD...: the command exits with N.
			"status": func(ts *testscript.TestScript, neg bool, args []string) {
				err := ts.Exec(args[1], args[2:]...)
				code := 0
				if e, ok := err.(interface{ ExitCode() int }); ok {
					code = e.ExitCode()
				} else if err != nil {
					ts.Fatalf("%v", err)
				}
				if fmt.Sprint(code) != args[0] {
					ts.Fatalf("exit code %d, want %s", code, args[0])
				}
			},
			// narrow FILE: no line is wider than 80 columns.
			"narrow": func(ts *testscript.TestScript, neg bool, args []string) {
				for line := range strings.Lines(ts.ReadFile(args[0])) {
					if n := len([]rune(strings.TrimSuffix(line, "\n"))); n > 80 {
						ts.Fatalf("%d columns: %s", n, line)
					}
				}
			},
			"invalidutf8": func(ts *testscript.TestScript, neg bool, args []string) {
				ts.Setenv(args[0], "a\xffb")
			},
			"isroot": func(ts *testscript.TestScript, neg bool, args []string) {
				if os.Geteuid() == 0 {
					ts.Setenv("ROOT", "yes")
				}
			},
		},
	})
}
