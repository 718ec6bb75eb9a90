package main

import (
	"path/filepath"
	"slices"
	"testing"
)

// TestMutantsCanBePlanted: there are enough of them, and each has a layer that
// must catch it. One whose place the code has outgrown is told of here, and
// fails make mutants.
func TestMutantsCanBePlanted(t *testing.T) {
	if len(mutants) < 25 {
		t.Errorf("%d mutants", len(mutants))
	}
	seen, planted := map[string]bool{}, 0
	for _, m := range mutants {
		if _, err := mutate(filepath.Join("..", "..", ".."), m); err != nil {
			t.Log(err)
		} else {
			planted++
		}
		if seen[m.name] {
			t.Errorf("%s is there twice", m.name)
		}
		seen[m.name] = true
		if !slices.ContainsFunc(layers, func(l layer) bool { return l.name == m.by && l.runs(m.file) }) {
			t.Errorf("%s: there is no layer %q that runs %s", m.name, m.by, m.file)
		}
	}
	if planted < 25 {
		t.Errorf("%d mutants can be planted", planted)
	}
}
