//go:build unix

package flock

import (
	"os"
	"path/filepath"
	"testing"
)

// TestTry: one open file has the lock, until it is closed.
func TestTry(t *testing.T) {
	name := filepath.Join(t.TempDir(), "lock")
	open := func() *os.File {
		f, err := os.OpenFile(name, os.O_CREATE|os.O_RDWR, 0o600)
		if err != nil {
			t.Fatal(err)
		}
		return f
	}
	first, second := open(), open()
	defer second.Close()
	if ok, err := Try(first); !ok || err != nil {
		t.Fatal(ok, err)
	}
	if ok, err := Try(second); ok || err != nil {
		t.Fatal(ok, err)
	}
	first.Close()
	if ok, err := Try(second); !ok || err != nil {
		t.Fatal(ok, err)
	}
}
