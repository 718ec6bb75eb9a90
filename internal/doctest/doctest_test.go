//go:build linux

// Package doctest runs what the README and the docs show: every command of
// every ```console block, against real servers, and compares what they print
// with what the docs say. Go programs in the docs are compiled.
//
// A section (a heading of level two) is a session with a directory and a port
// of its own. In docs/ a server runs already when it begins; the README starts
// its own. A block begins with ```console, and may name its terminal:
//
//	```console terminal-2
//	$ distlock lock get demo
//	demo: free
//	```
//
// Blocks of the same terminal share a shell. A command whose block ends in the
// word "waits" is left running; a later block of that terminal that begins
// with output shows how it went on. Times, durations, addresses and versions
// may differ from what the docs say; nothing else may. Lines that begin with
// [1] are the interactive shell's word on its jobs, and a line of three dots
// stands for any lines.
//
//	go test ./internal/doctest -rewrite
//
// replaces what the docs say with what the commands print.
package doctest

import (
	"bufio"
	"flag"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"
)

var rewrite = flag.Bool("rewrite", false, "replace the output shown in the docs with the commands' own")

// patience is how long any command may take to print what the docs say.
const patience = 30 * time.Second

var (
	repository string // its top
	binaries   string // a directory with the distlock that all sessions run
)

func TestMain(m *testing.M) {
	flag.Parse()
	os.Exit(run(m))
}

func run(m *testing.M) int {
	var err error
	if repository, err = filepath.Abs("../.."); err != nil {
		panic(err)
	}
	if binaries, err = os.MkdirTemp("", "distlock-docs"); err != nil {
		panic(err)
	}
	defer os.RemoveAll(binaries)
	build := exec.Command("go", "build", "-o", binaries, "./cmd/distlock")
	build.Dir, build.Stdout, build.Stderr = repository, os.Stderr, os.Stderr
	if err := build.Run(); err != nil {
		fmt.Fprintln(os.Stderr, "building distlock:", err)
		return 1
	}
	return m.Run()
}

// step is one command and what follows it in the docs.
type step struct {
	command string // "" for the rest of a command that was left running
	output  []string
	line    int // of the first line of output, from 0
	waits   bool
}

// block is a fenced block.
type block struct {
	language string
	terminal string
	waits    bool // its last command is left running
	text     []string
	line     int // of its first line of text
	steps    []step
}

// section is a session's worth of blocks.
type section struct {
	title  string
	blocks []block
}

// parse takes a document apart.
func parse(lines []string) (sections []section, err error) {
	sections = []section{{title: "top"}}
	var in *block
	for i, line := range lines {
		fence, isFence := strings.CutPrefix(strings.TrimSpace(line), "```")
		switch {
		case in == nil && isFence:
			in = &block{line: i + 1}
			for n, word := range strings.Fields(fence) {
				switch {
				case n == 0:
					in.language = word
				case word == "waits":
					in.waits = true
				default:
					in.terminal = word
				}
			}
		case isFence:
			if in.language == "console" {
				if err := in.split(); err != nil {
					return nil, err
				}
			}
			s := &sections[len(sections)-1]
			s.blocks = append(s.blocks, *in)
			in = nil
		case in != nil:
			in.text = append(in.text, line)
		case strings.HasPrefix(line, "## "):
			sections = append(sections, section{title: line[3:]})
		}
	}
	if in != nil {
		return nil, fmt.Errorf("line %d: a block has no end", in.line)
	}
	return sections, nil
}

// split takes a console block apart into commands and their output.
func (b *block) split() error {
	for i, line := range b.text {
		if command, ok := strings.CutPrefix(line, "$ "); ok {
			b.steps = append(b.steps, step{command: command, line: b.line + i + 1})
			continue
		}
		if len(b.steps) == 0 {
			b.steps = append(b.steps, step{line: b.line + i})
		}
		s := &b.steps[len(b.steps)-1]
		if more, ok := strings.CutPrefix(line, "> "); ok && len(s.output) == 0 && s.command != "" {
			s.command += "\n" + more
			s.line++
			continue
		}
		s.output = append(s.output, line)
	}
	if len(b.steps) == 0 {
		return fmt.Errorf("line %d: a console block without a command", b.line)
	}
	b.steps[len(b.steps)-1].waits = b.waits
	return nil
}

func TestDocs(t *testing.T) {
	files, err := filepath.Glob(filepath.Join(repository, "docs", "*.md"))
	if err != nil {
		t.Fatal(err)
	}
	commands := 0
	for _, file := range append(files, filepath.Join(repository, "README.md")) {
		text, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		lines := strings.Split(string(text), "\n")
		sections, err := parse(lines)
		if err != nil {
			t.Fatalf("%s: %v", file, err)
		}
		doc := &document{lines: lines}
		name := strings.TrimSuffix(filepath.Base(file), ".md")
		for _, s := range sections {
			var console []block
			for _, b := range s.blocks {
				if b.language == "console" {
					console = append(console, b)
					commands += len(b.steps)
				}
				if b.language == "go" && b.terminal != "stores" { // those are internal/storetest's
					t.Run(fmt.Sprintf("%s/%s/line %d", name, s.title, b.line), func(t *testing.T) { compile(t, b) })
				}
			}
			if len(console) > 0 {
				t.Run(name+"/"+s.title, func(t *testing.T) { doc.session(t, console, name != "README") })
			}
		}
		if *rewrite {
			doc.save(t, file)
		}
	}
	if commands < 20 {
		t.Errorf("the docs show %d commands only", commands)
	}
}

// TestFlagsAreDocumented: docs/operations.md has every flag of the server.
func TestFlagsAreDocumented(t *testing.T) {
	help, err := exec.Command(filepath.Join(binaries, "distlock"), "serve", "--help").Output()
	if err != nil {
		t.Fatal(err)
	}
	text, err := os.ReadFile(filepath.Join(repository, "docs", "operations.md"))
	if err != nil {
		t.Fatal(err)
	}
	flags := regexp.MustCompile(`(?m)^\s+(?:-\w, )?--([a-z-]+)`).FindAllStringSubmatch(string(help), -1)
	for _, f := range flags {
		switch name := f[1]; name {
		case "help", "version", "no-version", "install-completion", "show-completion":
		default:
			if !strings.Contains(string(text), "`--"+name+"`") {
				t.Errorf("docs/operations.md does not speak of --%s", name)
			}
		}
	}
	if len(flags) < 10 {
		t.Errorf("serve --help shows %d flags only:\n%s", len(flags), help)
	}
}

// TestMetricsAreDocumented: docs/operations.md has every metric.
func TestMetricsAreDocumented(t *testing.T) {
	code, text := read(t, "internal", "metrics", "metrics.go"), read(t, "docs", "operations.md")
	names := regexp.MustCompile(`(?:counter|histogram|desc)\("(\w+)", "|Name: "distlock_(\w+)"`).FindAllStringSubmatch(code, -1)
	for _, m := range names {
		if name := "`distlock_" + m[1] + m[2]; !strings.Contains(text, name) {
			t.Errorf("docs/operations.md does not speak of %s`", name)
		}
	}
	if len(names) < 15 {
		t.Errorf("only %d metrics were found", len(names))
	}
}

// TestMethodsAreDocumented: docs/api.md has every method.
func TestMethodsAreDocumented(t *testing.T) {
	text := read(t, "docs", "api.md")
	methods := 0
	for _, file := range []string{"distlock.proto", "stream.proto"} {
		service := ""
		for _, line := range strings.Split(read(t, "proto", "distlock", "v1", file), "\n") {
			if m := regexp.MustCompile(`^service (\w+)`).FindStringSubmatch(line); m != nil {
				service = m[1]
			}
			m := regexp.MustCompile(`^  rpc (\w+)\(`).FindStringSubmatch(line)
			if m == nil {
				continue
			}
			methods++
			row := regexp.MustCompile("(?m)^\\| `" + service + "\\.[^|]*`(?:" + service + "\\.)?" + m[1] + "`|^\\| `" + service + "\\." + m[1] + "`")
			if !row.MatchString(text) {
				t.Errorf("docs/api.md does not speak of %s.%s", service, m[1])
			}
		}
	}
	if methods < 15 {
		t.Errorf("only %d methods were found", methods)
	}
}

// TestContributingNamesWhatIsThere: every file, test and target that
// docs/contributing.md names is there.
func TestContributingNamesWhatIsThere(t *testing.T) {
	text := read(t, "docs", "contributing.md")
	named := regexp.MustCompile("`([^`]+)`").FindAllStringSubmatch(text, -1)
	targets, tests := read(t, "Makefile"), 0
	for _, m := range named {
		switch name := m[1]; {
		case strings.HasPrefix(name, "make "):
			if target := strings.Fields(name)[1]; !strings.Contains(targets, "\n"+target+":") {
				t.Errorf("there is no target %s", target)
			}
		case strings.HasPrefix(name, "Test"):
			tests++
			out, err := exec.Command("git", "-C", repository, "grep", "-l", "func "+name+"(").Output()
			if err != nil || len(out) == 0 {
				t.Errorf("there is no test %s", name)
			}
		case strings.Contains(name, "/") && !strings.ContainsAny(name, " *<"):
			if _, err := os.Stat(filepath.Join(repository, name)); err != nil {
				t.Errorf("%s is not there", name)
			}
		}
	}
	if len(named) < 40 || tests < 4 {
		t.Errorf("only %d names were found, %d of them tests", len(named), tests)
	}
}

func read(t *testing.T, path ...string) string {
	t.Helper()
	text, err := os.ReadFile(filepath.Join(append([]string{repository}, path...)...))
	if err != nil {
		t.Fatal(err)
	}
	return string(text)
}

// TestLinks: every link from one document of the repository to another leads
// somewhere.
func TestLinks(t *testing.T) {
	link := regexp.MustCompile(`\]\(([^)#:]+)(?:#([^)]+))?\)`)
	heading := regexp.MustCompile(`(?m)^#+ (.+)$`)
	seen := 0
	for _, pattern := range []string{"*.md", "docs/*.md", "docs/adr/*.md"} {
		files, err := filepath.Glob(filepath.Join(repository, pattern))
		if err != nil || len(files) == 0 {
			t.Fatalf("%s: %v", pattern, err)
		}
		for _, file := range files {
			text, err := os.ReadFile(file)
			if err != nil {
				t.Fatal(err)
			}
			for _, to := range link.FindAllStringSubmatch(string(text), -1) {
				seen++
				target := filepath.Join(filepath.Dir(file), to[1])
				if _, err := os.Stat(target); err != nil {
					t.Errorf("%s links to %s, which is not there", file, to[1])
					continue
				}
				if to[2] == "" {
					continue
				}
				page, err := os.ReadFile(target)
				if err != nil {
					t.Fatal(err)
				}
				found := false
				for _, h := range heading.FindAllStringSubmatch(string(page), -1) {
					found = found || strings.ReplaceAll(strings.ToLower(h[1]), " ", "-") == to[2]
				}
				if !found {
					t.Errorf("%s links to %s#%s, and there is no such heading", file, to[1], to[2])
				}
			}
		}
	}
	if seen < 10 {
		t.Errorf("%d links seen only", seen)
	}
}

// compile builds a Go program shown in the docs.
func compile(t *testing.T, b block) {
	text := strings.Join(b.text, "\n")
	if !strings.HasPrefix(text, "package ") {
		t.Fatalf("line %d: a Go block must be a whole file", b.line)
	}
	// The overlay puts the program into the module, so that it finds the
	// packages, without a file there.
	dir := t.TempDir()
	source := filepath.Join(dir, "main.go")
	if err := os.WriteFile(source, []byte(text+"\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	place := filepath.Join(repository, "internal", "doctest", "shown", "main.go")
	overlay := filepath.Join(dir, "overlay.json")
	if err := os.WriteFile(overlay, fmt.Appendf(nil, `{"Replace":{%q:%q}}`, place, source), 0o600); err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command("go", "build", "-overlay", overlay, "-o", filepath.Join(dir, "out"), "./internal/doctest/shown")
	cmd.Dir = repository
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Errorf("%v\n%s", err, out)
	}
	if out, err := exec.Command("gofmt", "-l", source).CombinedOutput(); err != nil || len(out) > 0 {
		t.Errorf("not formatted: %v %s", err, out)
	}
}

// document collects new lines for old ones.
type document struct {
	lines []string
	edits []edit
}

type edit struct {
	from, to int // lines [from, to) are replaced
	text     []string
}

func (d *document) save(t *testing.T, file string) {
	var out []string
	at := 0
	for _, e := range d.edits {
		out = append(append(out, d.lines[at:e.from]...), e.text...)
		at = e.to
	}
	out = append(out, d.lines[at:]...)
	if err := os.WriteFile(file, []byte(strings.Join(out, "\n")), 0o644); err != nil {
		t.Fatal(err)
	}
}

// session runs the blocks of a section.
func (d *document) session(t *testing.T, blocks []block, withServer bool) {
	dir := t.TempDir()
	if err := os.Symlink(filepath.Join(binaries, "distlock"), filepath.Join(dir, "distlock")); err != nil {
		t.Fatal(err)
	}
	port := freePort(t)
	env := append(os.Environ(),
		"PATH="+binaries+":"+os.Getenv("PATH"), "HOME="+dir,
		"DISTLOCK_ADDRESS=127.0.0.1", "DISTLOCK_PORT="+port, "DISTLOCK_ENDPOINTS=127.0.0.1:"+port,
		"GOCACHE="+goenv(t, "GOCACHE"), "GOMODCACHE="+goenv(t, "GOMODCACHE"), "GOFLAGS="+goenv(t, "GOFLAGS"), "GOPATH="+goenv(t, "GOPATH"),
	)
	terminals := make(map[string]*terminal)
	open := func(name string) *terminal {
		if terminals[name] == nil {
			terminals[name] = openTerminal(t, dir, env)
		}
		return terminals[name]
	}
	if withServer {
		server := open("the section's own server")
		server.enter("exec distlock --data-dir "+filepath.Join(dir, "data"), false)
		server.until(func(lines []string) bool { return strings.Contains(strings.Join(lines, "\n"), "leading") })
	}
	for _, b := range blocks {
		term := open(b.terminal)
		for _, s := range b.steps {
			got, ok := term.step(s)
			if *rewrite && (ok || !s.waits) {
				d.edits = append(d.edits, edit{s.line, s.line + len(s.output), shown(got)})
			} else if !ok {
				t.Fatalf("line %d: $ %s\nprints\n\t%s\nand the docs say\n\t%s", s.line, s.command,
					strings.Join(shown(got), "\n\t"), strings.Join(s.output, "\n\t"))
			}
		}
	}
}

func goenv(t *testing.T, name string) string {
	t.Helper()
	out, err := exec.Command("go", "env", name).Output()
	if err != nil {
		t.Fatal(err)
	}
	return strings.TrimSpace(string(out))
}

func freePort(t *testing.T) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	_, port, _ := net.SplitHostPort(l.Addr().String())
	return port
}

// terminal is a shell, and what its commands have printed.
type terminal struct {
	t     *testing.T
	stdin *bufio.Writer
	typed int // commands so far

	mu      sync.Mutex
	lines   []string      // not yet compared
	changed chan struct{} // buffered, one
}

// openTerminal starts a shell in a process group of its own, which ends with
// the test whatever is in it.
func openTerminal(t *testing.T, dir string, env []string) *terminal {
	t.Helper()
	cmd := exec.Command("bash", "--norc", "--noprofile")
	cmd.Dir, cmd.Env, cmd.SysProcAttr = dir, env, &syscall.SysProcAttr{Setpgid: true}
	stdin, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	out, in, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	cmd.Stdout, cmd.Stderr = in, in
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	in.Close()
	term := &terminal{t: t, stdin: bufio.NewWriter(stdin), changed: make(chan struct{}, 1)}
	read := make(chan struct{})
	go func() {
		defer close(read)
		for lines := bufio.NewScanner(out); lines.Scan(); {
			term.mu.Lock()
			term.lines = append(term.lines, strings.ReplaceAll(lines.Text(), dir+"/", ""))
			term.mu.Unlock()
			select {
			case term.changed <- struct{}{}:
			default:
			}
		}
	}()
	t.Cleanup(func() {
		syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL)
		cmd.Wait()
		<-read
		out.Close()
	})
	return term
}

const mark = "=== end of command"

// enter types a command. Its end and exit code are marked in the output, and
// the code is kept for a command that asks for it.
func (x *terminal) enter(command string, marked bool) {
	// A person's pace: a process that was killed needs a moment to be gone.
	time.Sleep(100 * time.Millisecond)
	x.typed++
	fmt.Fprintln(x.stdin, command)
	if marked {
		fmt.Fprintf(x.stdin, "__code=$?; printf '%s %d\\n'; (exit $__code)\n", mark, x.typed)
	}
	if err := x.stdin.Flush(); err != nil {
		x.t.Fatal(err)
	}
}

// until waits until what has been printed is as it should be, and takes it.
// After patience it takes what there is.
func (x *terminal) until(ok func(lines []string) bool) ([]string, bool) {
	timeout := time.After(patience)
	for {
		x.mu.Lock()
		lines := x.lines
		if ok(lines) {
			x.lines = nil
			x.mu.Unlock()
			return lines, true
		}
		x.mu.Unlock()
		select {
		case <-x.changed:
		case <-timeout:
			return lines, false
		}
	}
}

// reading matches commands that only look: they may be repeated until what
// another terminal began has happened.
var reading = regexp.MustCompile(`^(cat|(\./)?distlock (lock (get|ls)|lease (get|ls)|cluster status))\b`)

// step runs one command, or looks at more output of the last one.
func (x *terminal) step(s step) ([]string, bool) {
	if s.command == "" {
		return x.finish(s)
	}
	command, runs := x.command(s.command)
	if !runs {
		return s.output, true
	}
	for began := time.Now(); ; {
		x.enter(command, true)
		got, ok := x.finish(s)
		again := reading.MatchString(s.command) && time.Since(began) < 5*time.Second
		if ok || !again {
			return got, ok
		}
		time.Sleep(100 * time.Millisecond) // until another process has done its part
	}
}

// finish waits for the end of a command, unless it is to go on, and for what
// it or what it left in the background prints.
func (x *terminal) finish(s step) ([]string, bool) {
	end := fmt.Sprintf("%s %d", mark, x.typed)
	background := strings.HasSuffix(s.command, "&")
	if !s.waits {
		var before []string
		ended := func(lines []string) bool {
			for i, line := range lines {
				if text, found := strings.CutSuffix(line, end); found {
					before = lines[:i:i]
					if text != "" {
						before = append(before, text)
					}
					before = append(before, lines[i+1:]...)
					return true
				}
			}
			return false
		}
		lines, ok := x.until(ended)
		if !ok {
			return lines, false
		}
		if ok := s.matches(before); ok || !background {
			return before, ok
		}
		x.mu.Lock()
		x.lines = append(before, x.lines...)
		x.mu.Unlock()
	}
	return x.until(s.matches)
}

// matches reports whether this is what the docs say; while they are being
// rewritten, as many lines as they say.
func (s step) matches(printed []string) bool {
	if *rewrite {
		return len(significant(printed)) >= len(significant(s.output))
	}
	return same(s.output, printed)
}

// command is what to run for a command of the docs: those of go find the
// repository, and write nothing there.
func (x *terminal) command(shown string) (command string, runs bool) {
	in := "(cd " + repository + " && "
	switch {
	case shown == "go run ./cmd/distlock":
		return `DISTLOCK_DATA_DIR="$PWD/distlock-data" ` + `bash -c 'cd ` + repository + ` && exec go run ./cmd/distlock'`, true
	case shown == "go build ./cmd/distlock":
		return in + "go build -o " + binaries + " ./cmd/distlock)", true
	case shown == "go test -race ./..." || strings.HasPrefix(shown, "make "):
		return "", false // this test is part of it
	case strings.HasPrefix(shown, "go "):
		x.t.Fatalf("$ %s: this test does not know how to run it", shown)
	}
	return shown, true
}

// Parts of the output that differ from run to run.
var masks = []struct {
	pattern *regexp.Regexp
	mask    string
}{
	{regexp.MustCompile(`\b\d{8}T\d{6}(\.\d+)?Z`), "TIME"},
	{regexp.MustCompile(`\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d+)?(Z|[+-]\d\d:\d\d)`), "TIME"},
	{regexp.MustCompile(`\b\d\d:\d\d:\d\d(\.\d+)?\b`), "TIME"},
	{regexp.MustCompile(`(\[::\]|[A-Za-z0-9_.-]+):\d+\b`), "HOST:N"},
	{regexp.MustCompile(`\b(\d+h)?(\d+m)?\d+(\.\d+)?(h|m|s|ms|µs)\b`), "DURATION"},
	{regexp.MustCompile(`\b(dev\b|v\d+\.\d+\.\d+[-+.\w]*)`), "VERSION"},
	{regexp.MustCompile(`"clusterId": "[0-9a-f]+"`), `"clusterId": "ID"`},
	{regexp.MustCompile(`\bcluster [0-9a-f]{16}\b`), "cluster ID"},
	{regexp.MustCompile(`(?m)(HOST:N +)[0-9a-f]{8}$`), "HOST:N DISK"},
	{regexp.MustCompile(` +`), " "},
}

// jobs matches the shell's word on its jobs, interactive or not.
var jobs = regexp.MustCompile(`^(\[\d\]|bash: line \d+: +\d+ Killed)`)

// masked is a line without what may differ.
func masked(line string) string {
	for _, m := range masks {
		line = m.pattern.ReplaceAllString(line, m.mask)
	}
	return strings.TrimSpace(line)
}

// same compares what the docs say with what was printed.
func same(said, printed []string) bool {
	said, printed = significant(said), significant(printed)
	for len(said) > 0 {
		if said[0] == "..." {
			for i := range len(printed) + 1 {
				if same(said[1:], printed[i:]) {
					return true
				}
			}
			return false
		}
		if len(printed) == 0 || said[0] != printed[0] {
			return false
		}
		said, printed = said[1:], printed[1:]
	}
	return len(printed) == 0
}

func significant(lines []string) []string {
	var out []string
	for _, line := range lines {
		if line = masked(line); line != "" && !jobs.MatchString(line) {
			out = append(out, line)
		}
	}
	return out
}

// shown is output as the docs show it: of no machine in particular.
func shown(lines []string) []string {
	host, _ := os.Hostname()
	var out []string
	for _, line := range lines {
		if host != "" {
			line = strings.ReplaceAll(line, host+":", "myhost:")
		}
		if jobs.MatchString(line) {
			continue
		}
		line = regexp.MustCompile(`127\.0\.0\.1:\d+`).ReplaceAllStringFunc(line, func(address string) string {
			if strings.HasPrefix(address, "127.0.0.1:64") && len(address) == len("127.0.0.1:6441") {
				return address // chosen by the docs
			}
			return "[::]:50051"
		})
		out = append(out, line)
	}
	for len(out) > 0 && strings.TrimSpace(out[len(out)-1]) == "" {
		out = out[:len(out)-1]
	}
	return out
}

func TestParse(t *testing.T) {
	doc := "# T\n```console\n$ a\n```\n## S\ntext\n```console two waits\n$ b \\\n> c\nx\ny\n$ d\n```\n```console two\nmore\n```\n```go\npackage p\n```\n"
	sections, err := parse(strings.Split(doc, "\n"))
	if err != nil || len(sections) != 2 || len(sections[1].blocks) != 3 {
		t.Fatalf("%+v, %v", sections, err)
	}
	if b := sections[0].blocks[0]; b.terminal != "" || len(b.steps) != 1 || b.steps[0].command != "a" || b.steps[0].waits {
		t.Errorf("%+v", b)
	}
	b := sections[1].blocks[0]
	if b.terminal != "two" || len(b.steps) != 2 || b.steps[0].command != "b \\\nc" || len(b.steps[0].output) != 2 ||
		b.steps[0].line != 9 || b.steps[0].waits || !b.steps[1].waits {
		t.Errorf("%+v", b)
	}
	if b := sections[1].blocks[1]; b.terminal != "two" || b.steps[0].command != "" || b.steps[0].output[0] != "more" {
		t.Errorf("%+v", b)
	}
	for _, bad := range []string{"```console\n$ a\n", "```console\n```\n"} {
		if _, err := parse(strings.Split(bad, "\n")); err == nil {
			t.Errorf("%q parses", bad)
		}
	}
}

func TestSame(t *testing.T) {
	for _, c := range []struct {
		said, printed string
		want          bool
	}{
		{"token 1", "token 1", true},
		{"token 1", "token 2", false},
		{"token 1", "", false},
		{"", "token 1", false},
		{"a  1  3s  myhost:17", "a  1  12s  vm:4242", true},
		{"expires in 30s", "expires in never", false},
		{"since 2026-11-23T04:50:55Z", "since 2027-01-02T03:04:05.5+01:00", true},
		{"distlock dev", "distlock v1.2.3", true},
		{"[1] 4242\na", "a", true},
		{"a\n...\nd", "a\nb\nc\nd", true},
		{"a\n...\nd", "a\nb\nc", false},
		{"a\n...", "a", true},
	} {
		if got := same(strings.Split(c.said, "\n"), strings.Split(c.printed, "\n")); got != c.want {
			t.Errorf("said %q, printed %q: %v", c.said, c.printed, got)
		}
	}
}

// TestTerminal: a shell keeps its state and its exit codes, and what differs
// from the docs is noticed.
func TestTerminal(t *testing.T) {
	x := openTerminal(t, t.TempDir(), os.Environ())
	for _, s := range []step{
		{command: "a=1; false"},
		{command: "echo $? $a", output: []string{"1 1"}},
		{command: "printf x", output: []string{"x"}},
		{command: "(sleep 0.2; echo late) &", output: []string{"late"}},
		{command: "echo to stderr >&2", output: []string{"to stderr"}},
		{command: "echo now; sleep 0.2; echo then", output: []string{"now"}, waits: true},
		{output: []string{"then"}},
	} {
		if got, ok := x.step(s); !ok {
			t.Fatalf("$ %s: %q", s.command, got)
		}
	}
	if got, ok := x.step(step{command: "echo b", output: []string{"a"}}); ok {
		t.Errorf("%q passes for a", got)
	}
}
