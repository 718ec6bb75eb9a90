package main

import (
	"os"
	"regexp"
	"slices"
	"testing"
)

// TestFieldsHaveFlags: what a server says of a field of its Config names a flag that
// there is.
func TestFieldsHaveFlags(t *testing.T) {
	text, err := os.ReadFile("../../internal/server/config.go")
	if err != nil {
		t.Fatal(err)
	}
	flags := serveCommand("serve").Flags()
	none := []string{"MaxMessageBytes", "MaxPending", "MaxNamesPerCall", "MaxLockDelay", "SnapshotBytes"}
	named := regexp.MustCompile(`\{([A-Z]\w+)\}|\{"([A-Z]\w+)", `).FindAllStringSubmatch(string(text), -1)
	for _, m := range named {
		field := m[1] + m[2]
		if flag := flagOf(field); flags.Lookup(flag[2:]) == nil && !slices.Contains(none, field) {
			t.Errorf("%s is not a flag", flag)
		}
	}
	if len(named) < 30 {
		t.Errorf("only %d names of fields were found", len(named))
	}
}
