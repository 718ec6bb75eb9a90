// Package archtest holds the house's plan against its code: which room may
// import which, what the pure machine may use, and what stands at the top.
package archtest

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"go/ast"
	"go/parser"
	"go/token"
	"go/types"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
)

const module = "github.com/distlock/distlock"

// arrows is the plan: for each package of the house the packages of the house
// that its code may import. Every package has a row, so that a new one is a
// decision. docs/architecture.md draws it.
var arrows = map[string][]string{
	"fence":                  {},
	"fence/fencetest":        {"fence"},
	"fence/filefence":        {"internal/flock", "fence"},
	"fence/httpfence":        {"fence", "fence/internal/carry"},
	"fence/grpcfence":        {"fence", "fence/internal/carry"},
	"fence/internal/carry":   {"fence"},
	"fence/sqlfence":         {"fence"},
	"fence/redisfence":       {"fence"},
	"proto/distlock":         {},
	"proto/distlock/v1":      {},
	"proto/distlock/peer/v1": {},
	"lease/machine":          {"fence"},
	"lease":                  {"lease/machine", "fence"},
	"internal/replica":       {"internal/bound", "internal/flock", "lease", "lease/machine", "fence", "proto/distlock/peer/v1"},
	"proto/wire":             {"proto/distlock/v1"},
	"transport":              {"internal/bound", "proto/wire", "lease", "lease/machine", "fence", "proto/distlock", "proto/distlock/v1"},
	"internal/server":        {"internal/bound", "internal/metrics", "internal/replica", "transport", "lease", "lease/machine", "fence", "proto/distlock", "proto/distlock/v1"},
	"client":                 {"proto/wire", "fence", "proto/distlock/v1"},
	"client/clienttest":      {"client", "internal/server", "fence", "proto/distlock/v1"},
	"internal/metrics":       {},
	"internal/bench":         {"client", "proto/wire", "proto/distlock/v1"},
	"cmd/distlock":           {"internal/bench", "internal/server", "client", "fence"},
	"internal/http2test":     {},
	"internal/bound":         {},
	"internal/flock":         {},
	"internal/archtest":      {},
	"internal/doctest":       {},
	"internal/e2e":           {},
}

// inTests are arrows that only test files may follow, beside those above. A
// test may always import its own package.
var inTests = map[string][]string{
	"fence":             {"fence/fencetest"},
	"fence/filefence":   {"fence/fencetest"},
	"fence/httpfence":   {"fence/fencetest"},
	"fence/grpcfence":   {"fence/fencetest"},
	"client":            {"client/clienttest", "internal/server", "lease", "lease/machine", "transport"},
	"internal/bench":    {"internal/server"},
	"client/clienttest": {},
	"transport":         {"internal/server", "internal/http2test", "client"},
	"internal/replica":  {"fence"},
	"internal/server":   {"client"},
	"cmd/distlock":      {"client/clienttest", "proto/distlock", "proto/distlock/v1"},
	"internal/e2e":      {"internal/http2test", "client", "fence", "proto/distlock", "proto/distlock/v1"},
}

// pure is all that the machine's code may import from outside the house:
// nothing that could tell one replica from another.
var pure = []string{"errors", "fmt", "slices", "sort", "strings", "unique", "encoding/binary", "github.com/tidwall/btree"}

// light lists, by the room under fence, what else than the standard library a
// guard may import: whoever guards a resource takes it all into the program,
// and drivers are the program's own choice.
var light = map[string][]string{
	"fence/grpcfence": {"google.golang.org/grpc", "google.golang.org/genproto/googleapis/rpc", "google.golang.org/protobuf"},
}

// heavy tells whether a room under fence imports more than it may.
func heavy(room, path string) bool {
	if room != "fence" && !strings.HasPrefix(room, "fence/") || !strings.Contains(path, ".") {
		return false
	}
	return !slices.ContainsFunc(light[room], func(of string) bool { return path == of || strings.HasPrefix(path, of+"/") })
}

// top is what may stand at the top beside dotfiles.
var top = []string{
	"cmd", "client", "docs", "fence", "internal", "lease", "proto", "transport",
	"go.mod", "go.sum", "README.md", "LICENSE", "CHANGELOG.md", "Makefile",
}

// pkg is what `go list -json` tells of a package.
type pkg struct {
	ImportPath                         string
	Imports, TestImports, XTestImports []string
}

// list runs `go list` over the house. A house that does not build is the
// compiler's business: the arrows are seen all the same.
func list(t *testing.T, flags ...string) []pkg {
	t.Helper()
	args := append([]string{"list", "-e", "-json=ImportPath,Imports,TestImports,XTestImports"}, flags...)
	cmd := exec.Command("go", append(args, module+"/...")...)
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("go list: %v\n%s", err, &stderr)
	}
	var pkgs []pkg
	for d := json.NewDecoder(bytes.NewReader(out)); ; {
		var p pkg
		if err := d.Decode(&p); errors.Is(err, io.EOF) {
			return pkgs
		} else if err != nil {
			t.Fatal(err)
		}
		pkgs = append(pkgs, p)
	}
}

// broken lists every arrow that is not in the plan.
func broken(pkgs []pkg) []string {
	var found []string
	for _, p := range pkgs {
		room := strings.TrimPrefix(p.ImportPath, module+"/")
		code, ok := arrows[room]
		if !ok {
			found = append(found, fmt.Sprintf("%s has no row in archtest's plan", room))
			continue
		}
		for _, path := range p.Imports {
			to, house := strings.CutPrefix(path, module+"/")
			switch {
			case house && !slices.Contains(code, to):
				found = append(found, fmt.Sprintf("%s imports %s", room, to))
			case !house && room == "lease/machine" && !slices.Contains(pure, path):
				found = append(found, fmt.Sprintf("%s imports %s, and is not pure", room, path))
			case !house && heavy(room, path):
				found = append(found, fmt.Sprintf("%s imports %s, and everybody who guards a resource with it", room, path))
			}
		}
		for _, path := range slices.Concat(p.TestImports, p.XTestImports) {
			to, house := strings.CutPrefix(path, module+"/")
			if house && to != room && !slices.Contains(code, to) && !slices.Contains(inTests[room], to) {
				found = append(found, fmt.Sprintf("a test of %s imports %s", room, to))
			}
		}
	}
	return found
}

func TestArrows(t *testing.T) {
	pkgs := list(t)
	if len(pkgs) < 10 {
		t.Fatalf("go list names %d packages only", len(pkgs))
	}
	for _, b := range broken(pkgs) {
		t.Error(b)
	}
}

// TestCoreBringsNoDriver: who gets the core gets no database's client with it.
// The tests that need them are a module of their own.
func TestCoreBringsNoDriver(t *testing.T) {
	text, err := os.ReadFile(filepath.Join(root(t), "go.mod"))
	if err != nil {
		t.Fatal(err)
	}
	for _, driver := range []string{"jackc/", "lib/pq", "go-sql-driver/", "redis", "sqlite"} {
		if strings.Contains(string(text), driver) {
			t.Errorf("go.mod requires %s", driver)
		}
	}
	if _, err := os.Stat(filepath.Join(root(t), "internal", "storetest", "go.mod")); err != nil {
		t.Error(err)
	}
}

// TestBrokenArrowsAreSeen adds a file to the house, for go list's eyes only,
// and expects the plan to object.
func TestBrokenArrowsAreSeen(t *testing.T) {
	for _, c := range []struct{ file, imports, want string }{
		{"lease/machine/broken.go", "time", "lease/machine imports time, and is not pure"},
		{"lease/machine/broken.go", "math/rand/v2", "lease/machine imports math/rand/v2, and is not pure"},
		{"lease/machine/broken.go", module + "/lease", "lease/machine imports lease"},
		{"lease/broken.go", module + "/transport", "lease imports transport"},
		{"lease/broken.go", module + "/proto/distlock/v1", "lease imports proto/distlock/v1"},
		{"client/broken.go", module + "/internal/server", "client imports internal/server"},
		{"client/broken.go", module + "/lease", "client imports lease"},
		{"proto/distlock/v1/broken.go", module + "/lease", "proto/distlock/v1 imports lease"},
		{"fence/broken.go", module + "/lease/machine", "fence imports lease/machine"},
		{"fence/broken.go", "google.golang.org/grpc", "fence imports google.golang.org/grpc, and everybody who guards a resource with it"},
		{"fence/filefence/broken.go", "google.golang.org/grpc", "fence/filefence imports google.golang.org/grpc, and everybody who guards a resource with it"},
		{"fence/filefence/broken.go", module + "/client", "fence/filefence imports client"},
		{"cmd/distlock/broken.go", module + "/lease", "cmd/distlock imports lease"},
		{"transport/broken_test.go", module + "/cmd/distlock", "a test of transport imports cmd/distlock"},
		{"internal/attic/broken.go", "time", "internal/attic has no row in archtest's plan"},
	} {
		t.Run(c.want, func(t *testing.T) {
			dir := t.TempDir()
			source := filepath.Join(dir, "broken.go")
			write(t, source, fmt.Sprintf("package %s\n\nimport _ %q\n", packageName(c.file), c.imports))
			overlay, err := json.Marshal(map[string]any{"Replace": map[string]string{filepath.Join(root(t), c.file): source}})
			if err != nil {
				t.Fatal(err)
			}
			write(t, filepath.Join(dir, "overlay.json"), string(overlay))
			if got := broken(list(t, "-overlay", filepath.Join(dir, "overlay.json"))); !slices.Contains(got, c.want) {
				t.Errorf("not seen; seen were %q", got)
			}
		})
	}
}

// packageName is the package clause of a file's room.
func packageName(file string) string {
	switch room := filepath.Dir(file); room {
	case "cmd/distlock":
		return "main"
	case "proto/distlock/v1":
		return "distlockv1"
	default:
		return filepath.Base(room)
	}
}

// impure lists what in the machine's files could make replicas differ, or run
// beside them, that no import shows.
func impure(files []*ast.File, fset *token.FileSet) []string {
	// The types of other packages are not needed to tell a map of our own, and
	// so the errors of leaving them out do not matter.
	info := &types.Info{Types: make(map[ast.Expr]types.TypeAndValue)}
	config := types.Config{Importer: nothing{}, Error: func(error) {}}
	config.Check("machine", fset, files, info)

	var found []string
	object := func(n ast.Node, what string) {
		found = append(found, fmt.Sprintf("%s: %s", fset.Position(n.Pos()), what))
	}
	for _, file := range files {
		ast.Inspect(file, func(n ast.Node) bool {
			switch n := n.(type) {
			case *ast.GoStmt:
				object(n, "a goroutine")
			case *ast.SelectStmt:
				object(n, "a select")
			case *ast.ChanType:
				object(n, "a channel")
			case *ast.RangeStmt:
				if of := info.TypeOf(n.X); of == nil {
					object(n, "a range over what has no type")
				} else if _, ok := of.Underlying().(*types.Map); ok {
					object(n, "a range over a map, in another order every time")
				}
			}
			return true
		})
	}
	return found
}

// nothing imports packages without anything in them.
type nothing struct{}

func (nothing) Import(path string) (*types.Package, error) {
	p := types.NewPackage(path, filepath.Base(path))
	p.MarkComplete()
	return p, nil
}

func TestMachineIsPure(t *testing.T) {
	fset := token.NewFileSet()
	names, err := filepath.Glob(filepath.Join(root(t), "lease", "machine", "*.go"))
	if err != nil {
		t.Fatal(err)
	}
	var files []*ast.File
	for _, name := range names {
		if strings.HasSuffix(name, "_test.go") {
			continue
		}
		file, err := parser.ParseFile(fset, name, nil, parser.SkipObjectResolution)
		if err != nil {
			t.Fatal(err)
		}
		files = append(files, file)
	}
	if len(files) < 5 {
		t.Fatalf("the machine has %d files only", len(files))
	}
	for _, i := range impure(files, fset) {
		t.Error(i)
	}
}

func TestImpurityIsSeen(t *testing.T) {
	for body, pure := range map[string]bool{
		"go g()": false, "select {}": false, "_ = make(chan int)": false,
		"for range map[string]int{} {}":                             false,
		"type m map[string]bool; var s struct{m}; for range s.m {}": false,
		"m := make(map[int]int); m[1]++":                            true,
		"for range []int{} {}":                                      true,
	} {
		fset := token.NewFileSet()
		file, err := parser.ParseFile(fset, "x.go", "package machine\nfunc g() {\n"+body+"\n}\n", 0)
		if err != nil {
			t.Fatal(err)
		}
		if got := impure([]*ast.File{file}, fset); (len(got) == 0) != pure {
			t.Errorf("%q: %q", body, got)
		}
	}
}

// strays lists what stands at the top and should not, and what is missing.
func strays(names, ignored []string) []string {
	var found []string
	for _, name := range names {
		if !strings.HasPrefix(name, ".") && !slices.Contains(top, name) && !matches(ignored, name) {
			found = append(found, name+" stands at the top: find it a room")
		}
	}
	for _, name := range top {
		if !slices.Contains(names, name) {
			found = append(found, name+" is missing")
		}
	}
	return found
}

func matches(patterns []string, name string) bool {
	return slices.ContainsFunc(patterns, func(p string) bool {
		ok, _ := filepath.Match(strings.Trim(p, "/"), name)
		return ok
	})
}

func TestTopLevel(t *testing.T) {
	entries, err := fs.ReadDir(os.DirFS(root(t)), ".")
	if err != nil {
		t.Fatal(err)
	}
	var names []string
	for _, e := range entries {
		names = append(names, e.Name())
	}
	ignore, err := os.ReadFile(filepath.Join(root(t), ".gitignore"))
	if err != nil {
		t.Fatal(err)
	}
	for _, s := range strays(names, strings.Fields(string(ignore))) {
		t.Error(s)
	}
}

func TestStraysAreSeen(t *testing.T) {
	names := append(slices.Clone(top), ".git", "distlock-data", "x.test")
	ignored := []string{"/distlock-data/", "*.test"}
	if got := strays(names, ignored); len(got) != 0 {
		t.Errorf("of a tidy top: %q", got)
	}
	if got := strays(append(names, "utils"), ignored); len(got) != 1 {
		t.Errorf("with a stray: %q", got)
	}
	if got := strays(names[1:], ignored); len(got) != 1 {
		t.Errorf("without %s: %q", names[0], got)
	}
}

// root is the top of the house.
func root(t *testing.T) string {
	t.Helper()
	dir, err := filepath.Abs(filepath.Join("..", ".."))
	if err != nil {
		t.Fatal(err)
	}
	return dir
}

func write(t *testing.T, name, text string) {
	t.Helper()
	if err := os.WriteFile(name, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
}

// TestDesignsNameEveryFile: a room's DESIGN.md that has a table of its files has all
// of them.
func TestDesignsNameEveryFile(t *testing.T) {
	designs, err := filepath.Glob(filepath.Join(root(t), "*", "DESIGN.md"))
	if err != nil {
		t.Fatal(err)
	}
	for _, pattern := range []string{"*/*/DESIGN.md", "*/*/*/DESIGN.md"} {
		more, err := filepath.Glob(filepath.Join(root(t), pattern))
		if err != nil {
			t.Fatal(err)
		}
		designs = append(designs, more...)
	}
	tables := 0
	for _, design := range designs {
		text, err := os.ReadFile(design)
		if err != nil {
			t.Fatal(err)
		}
		if !strings.Contains(string(text), "\n| file | |\n") {
			continue
		}
		tables++
		files, err := filepath.Glob(filepath.Join(filepath.Dir(design), "*.go"))
		if err != nil {
			t.Fatal(err)
		}
		for _, file := range files {
			name := filepath.Base(file)
			if strings.HasSuffix(name, "_test.go") || strings.Contains(name, "_linux.") || strings.Contains(name, "_other.") {
				continue
			}
			if !strings.Contains(string(text), "`"+name+"`") {
				t.Errorf("%s does not say what %s is for", design, name)
			}
		}
	}
	if tables < 2 {
		t.Errorf("only %d tables of files were found", tables)
	}
}

// TestCommentsNameErrorsThatExist: a comment that promises ErrX promises one that
// there is.
func TestCommentsNameErrorsThatExist(t *testing.T) {
	named := regexp.MustCompile(`\bErr[A-Z]\w+`)
	var inComments []string // "file: name"
	there := make(map[string]bool)
	err := filepath.WalkDir(root(t), func(path string, d fs.DirEntry, err error) error {
		if err != nil || !strings.HasSuffix(path, ".go") || strings.Contains(path, "/.") {
			return err
		}
		file, err := parser.ParseFile(token.NewFileSet(), path, nil, parser.ParseComments)
		if err != nil {
			return err
		}
		for _, group := range file.Comments {
			for _, name := range named.FindAllString(group.Text(), -1) {
				inComments = append(inComments, path+": "+name)
			}
		}
		ast.Inspect(file, func(n ast.Node) bool { // also those of others' packages, by their use
			if id, ok := n.(*ast.Ident); ok {
				there[id.Name] = true
			}
			return true
		})
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range inComments {
		if _, name, _ := strings.Cut(c, ": "); !there[name] {
			t.Errorf("%s is not there", c)
		}
	}
	if len(inComments) < 20 {
		t.Errorf("only %d names were found", len(inComments))
	}
}
