package servers

import (
	"errors"
	"strings"
	"syscall"
	"testing"
)

// TestMissingServerSaysWhatToInstall: where a server is missing the tests
// fail, and tell a developer what to do.
func TestMissingServerSaysWhatToInstall(t *testing.T) {
	_, err := find("no-such-server", "some-package", "/nowhere/*/no-such-server")
	if err == nil || !strings.Contains(err.Error(), "apt-get install postgresql mariadb-server redis-server") || !strings.Contains(err.Error(), "some-package") {
		t.Error(err)
	}
}

// TestStopEndsTheServer, and nothing of it is left.
func TestStopEndsTheServer(t *testing.T) {
	s, err := Redis(true)
	if err != nil {
		t.Fatal(err)
	}
	if err := s.Stop(); err != nil {
		t.Fatal(err)
	}
	if err := syscall.Kill(s.Pid(), 0); !errors.Is(err, syscall.ESRCH) {
		t.Errorf("process %d is still there: %v", s.Pid(), err)
	}
}
