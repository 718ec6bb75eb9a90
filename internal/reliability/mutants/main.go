// Command mutants measures the tests: it plants one bug at a time, by an
// overlay that leaves the working tree alone, and runs the layers against it.
// Every bug must be caught. It prints the table of docs/reliability.md.
package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"time"
)

// layer is what may catch a mutant: a go test that fails.
type layer struct {
	name  string
	rooms []string // where a bug must be for the layer to run it
	args  []string
}

// A failing property leaves no file behind: it would be in the working tree.
var layers = []layer{
	{"machine", []string{"lease/machine"}, []string{"./lease/machine", "-args", "-rapid.nofailfile"}},
	{"manager", []string{"lease", "lease/machine"}, []string{"./lease", "-args", "-rapid.nofailfile"}},
	{"simulation", []string{"lease", "lease/machine", "fence"}, []string{"./internal/reliability/sim", "-run", "TestSeeds", "-args", "-seeds", "300"}},
	{"client", []string{"client"}, []string{"./client"}},
	{"shipped", []string{"client", "lease", "lease/machine"}, []string{"./internal/reliability/sim", "-run", "TestShipped", "-args", "-live", "40"}},
	{"clients", []string{"client", "lease"}, []string{"./internal/reliability/sim", "-run", "TestRealClients|TestFarAway"}},
	{"files", []string{"internal/replica"}, []string{"./internal/replica", "-run", "Prefix|Flip|Damaged|Torn|FailedWrite|Killed|ManySegments"}},
	{"members", []string{"internal/replica"}, []string{"./internal/replica", "-run", "TestA[A-Z]?[a-z]|TestLists|TestStrangers|TestEvery|TestStarts|TestNoChange|TestWhatWaits|TestGrow|TestReplicas|TestDigests|TestWhoIs|TestIdle"}},
	{"crashes", []string{"internal/replica"}, []string{"./internal/e2e", "-run", "TestCrashes$|TestEveryAcknowledgement", "-args", "-crashes", "6"}},
	{"transport", []string{"transport", "internal/bound"}, []string{"./transport"}},
	{"fence", []string{"fence"}, []string{"./fence", "./fence/fencetest"}},
}

func (l layer) runs(m mutant) bool { return slices.Contains(l.rooms, m.room) }

func main() {
	gate := flag.Bool("gate", false, "run only the layer that must catch each mutant")
	match := flag.String("run", "", "only mutants whose name matches")
	sample := flag.Int("sample", 0, "only so many of them, chosen at random; 0 for all")
	flag.Parse()
	if err := run(*gate, *match, *sample); err != nil {
		fmt.Fprintln(os.Stderr, "mutants:", err)
		os.Exit(1)
	}
}

func run(gate bool, match string, sample int) error {
	pattern, err := regexp.Compile(match)
	if err != nil {
		return err
	}
	dir, err := os.MkdirTemp("", "mutants")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	var list []mutant
	for _, m := range mutants {
		if pattern.MatchString(m.name) {
			list = append(list, m)
		}
	}
	if sample > 0 && sample < len(list) {
		rand.Shuffle(len(list), func(i, j int) { list[i], list[j] = list[j], list[i] })
		list = list[:sample]
	}
	began := time.Now()
	survived, outgrown := 0, 0
	fmt.Print("| planted bug | in |")
	for _, l := range layers {
		fmt.Printf(" %s |", l.name)
	}
	fmt.Printf("\n|---|---|%s\n", strings.Repeat("---|", len(layers)))
	for _, m := range list {
		overlay, err := plant(dir, m)
		if errors.Is(err, errOutgrown) {
			fmt.Fprintln(os.Stderr, "mutants:", err)
			outgrown++
			continue
		}
		if err != nil {
			return err
		}
		caught := map[string]bool{}
		row := fmt.Sprintf("| %s | `%s` |", m.name, m.room)
		for _, l := range layers {
			switch {
			case !l.runs(m):
				row += " - |"
				continue
			case gate && l.name != m.by:
				row += "  |"
				continue
			}
			// A mutant that hangs is caught too. The gate is not to take long
			// over it; the table is to be right on a busy machine.
			patience := "5m"
			if gate {
				patience = "1m"
			}
			args := slices.Concat([]string{"test", "-count=1", "-failfast", "-timeout", patience}, l.args)
			if out, err := goTool(overlay, args...); err != nil {
				var exit *exec.ExitError
				if !errors.As(err, &exit) {
					return err
				}
				if strings.Contains(out, "[build failed]") || strings.Contains(out, "[setup failed]") {
					row += " does not build |"
					fmt.Fprintf(os.Stderr, "mutants: %s does not build:\n%s", m.name, out)
					continue
				}
				caught[l.name] = true
				row += " caught |"
			} else {
				row += "  |"
			}
		}
		fmt.Println(row)
		if !caught[m.by] {
			survived++
			fmt.Fprintf(os.Stderr, "mutants: %q is not caught by layer %q\n", m.name, m.by)
		}
	}
	fmt.Printf("\n%d mutants, %d not caught by their layer, in %v\n", len(list), survived, time.Since(began).Round(time.Second))
	switch {
	case survived > 0:
		return fmt.Errorf("%d mutants live", survived)
	case outgrown > 0 && sample == 0:
		return fmt.Errorf("%d mutants must be planted anew", outgrown)
	}
	return nil
}

// plant writes the mutated file and the overlay that puts it in place.
func plant(dir string, m mutant) (string, error) {
	place, text, err := mutate(".", m)
	if err != nil {
		return "", err
	}
	file := filepath.Join(dir, "mutant.go")
	if err := os.WriteFile(file, text, 0o600); err != nil {
		return "", err
	}
	path, err := filepath.Abs(place)
	if err != nil {
		return "", err
	}
	overlay, err := json.Marshal(map[string]any{"Replace": map[string]string{path: file}})
	if err != nil {
		return "", err
	}
	name := filepath.Join(dir, "overlay.json")
	return name, os.WriteFile(name, overlay, 0o600)
}

var errOutgrown = errors.New("the code has outgrown it")

// mutate returns the file of the mutant's room that has the text to change, and
// the file with the bug in it. The text must be there exactly once: code may
// move within its room, but a mutant that it has outgrown must be planted anew.
func mutate(root string, m mutant) (place string, text []byte, err error) {
	files, err := filepath.Glob(filepath.Join(root, m.room, "*.go"))
	if err != nil {
		return "", nil, err
	}
	found := 0
	for _, file := range files {
		if strings.HasSuffix(file, "_test.go") {
			continue
		}
		all, err := os.ReadFile(file)
		if err != nil {
			return "", nil, err
		}
		if n := bytes.Count(all, []byte(m.old)); n > 0 {
			found += n
			place, text = file, bytes.Replace(all, []byte(m.old), []byte(m.new), 1)
		}
	}
	if found != 1 {
		return "", nil, fmt.Errorf("%s: %w: the text to change is %d times in %s", m.name, errOutgrown, found, m.room)
	}
	return place, text, nil
}

// goTool runs the go command with the mutant in place, also for what tests
// build themselves.
func goTool(overlay string, args ...string) (string, error) {
	ctx, cancel := context.WithTimeout(context.Background(), 6*time.Minute)
	defer cancel()
	cmd := exec.CommandContext(ctx, "go", args...)
	cmd.Env = append(os.Environ(), "GOFLAGS=-overlay="+overlay)
	out, err := cmd.CombinedOutput()
	return string(out), err
}
