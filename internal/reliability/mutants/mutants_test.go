package main

import (
	"path/filepath"
	"slices"
	"testing"
)

// TestMutantsCanBePlanted: there are enough of them, and each has a layer that
// must catch it, and a place in the code as it is.
func TestMutantsCanBePlanted(t *testing.T) {
	if len(mutants) < 25 {
		t.Errorf("%d mutants", len(mutants))
	}
	seen := map[string]bool{}
	for _, m := range mutants {
		if _, _, err := mutate(filepath.Join("..", "..", ".."), m); err != nil {
			t.Error(err)
		}
		if seen[m.name] {
			t.Errorf("%s is there twice", m.name)
		}
		seen[m.name] = true
		if !slices.ContainsFunc(layers, func(l layer) bool { return l.name == m.by && l.runs(m) }) {
			t.Errorf("%s: there is no layer %q that runs %s", m.name, m.by, m.room)
		}
	}
}
