package replica

import (
	"crypto/rand"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"

	"github.com/hashicorp/raft"

	"github.com/distlock/distlock/lease/machine"
)

// A name means one disk. Each data directory has an incarnation, made at random
// with it, and a member goes by its name and its directory's incarnation
// wherever members speak of each other: in raft's configurations, in greetings
// and in what they ask each other. Whoever comes with the same name and another
// directory is somebody else. Directories that the first builds made have none;
// their members go by the bare name.

const (
	incarnationMark   = "#"
	incarnationLength = 16 // hexadecimal digits
)

func newIncarnation() string {
	var random [incarnationLength / 2]byte
	rand.Read(random[:])
	return hex.EncodeToString(random[:])
}

func serverID(name, incarnation string) raft.ServerID {
	if incarnation == "" {
		return raft.ServerID(name)
	}
	return raft.ServerID(name + incarnationMark + incarnation)
}

// split returns a member's name and its incarnation; "" for a bare name.
func split(id raft.ServerID) (name, incarnation string) {
	name, incarnation, found := cutLast(string(id), incarnationMark)
	if _, err := hex.DecodeString(incarnation); !found || err != nil || len(incarnation) != incarnationLength {
		return string(id), ""
	}
	return name, incarnation
}

func cutLast(s, mark string) (before, after string, found bool) {
	if i := strings.LastIndex(s, mark); i >= 0 {
		return s[:i], s[i+len(mark):], true
	}
	return s, "", false
}

func nameOf(id raft.ServerID) string {
	name, _ := split(id)
	return name
}

// checkName refuses names that could not be told from the rest of an id, or
// of a list of members.
func checkName(name string) error {
	if name == "" || len(name) > 64 {
		return errors.New("a node id has 1 to 64 bytes")
	}
	if strings.ContainsAny(name, "#=,\n") {
		return fmt.Errorf("a node id has none of # = , and is %q", name)
	}
	return nil
}

// named returns the server of a configuration with a name, or with an id.
func named(c raft.Configuration, name string) (raft.Server, bool) {
	for _, s := range c.Servers {
		if string(s.ID) == name {
			return s, true
		}
	}
	for _, s := range c.Servers {
		if nameOf(s.ID) == name {
			return s, true
		}
	}
	return raft.Server{}, false
}

// addresses lists members as --initial-cluster does.
func addresses(members map[string]string) string {
	var list []string
	for _, name := range slices.Sorted(maps.Keys(members)) {
		list = append(list, name+"="+members[name])
	}
	return strings.Join(list, ",")
}

// start is one start of a member: its number in order, and a random number.
type start struct {
	Start uint64 `json:"start"`
	Nonce string `json:"nonce"`
}

// starts remembers the last start of every other member that has been heard
// of, in peers.json: a start that is not the last is that of a copy of the
// member's data directory, or of a disk that has been set back.
type starts struct {
	file string

	mu   sync.Mutex
	seen map[raft.ServerID]start
}

const startsFile = "peers.json"

func openStarts(dir string) (*starts, error) {
	s := &starts{file: filepath.Join(dir, startsFile), seen: make(map[raft.ServerID]start)}
	text, err := os.ReadFile(s.file)
	if errors.Is(err, os.ErrNotExist) {
		return s, nil
	}
	if err == nil && json.Unmarshal(text, &s.seen) != nil {
		err = &CorruptError{File: s.file, Err: machine.ErrCorrupt}
	}
	return s, err
}

// staleError says that a start of a member is not its last.
type staleError struct {
	id         raft.ServerID
	this, last uint64
}

func (e *staleError) Error() string {
	return fmt.Sprintf("start %d of member %s is not its last, which is start %d", e.this, nameOf(e.id), e.last)
}

// see takes in a start of a member, on the disk before it returns. Errors:
// *staleError, the file system's.
func (s *starts) see(id raft.ServerID, now start) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	last := s.seen[id]
	switch {
	case now == last:
		return nil
	case now.Start <= last.Start:
		return &staleError{id, now.Start, last.Start}
	}
	next := maps.Clone(s.seen)
	next[id] = now
	text, err := json.Marshal(next)
	if err != nil {
		return err
	}
	if err := writeFile(s.file, append(text, '\n')); err != nil {
		return err
	}
	s.seen = next
	return nil
}

// CopyError says that members know of a later start of this node: this process runs on
// a copy of its directory, or on a disk that was set back.
type CopyError struct {
	NodeID     string
	This, Last uint64
}

func (e *CopyError) Error() string {
	return fmt.Sprintf("this is start %d of node %s, and the other members know start %d: another process runs on a copy of this data directory, or the directory is an old copy; "+
		"a copy must not run: distlock cluster remove %s, then start it with an empty directory and --join", e.This, e.NodeID, e.Last, e.NodeID)
}

// ListError says that the nodes of a new cluster were given different lists of
// its members.
type ListError struct {
	NodeID, Ours  string
	Other, Theirs string
}

func (e *ListError) Error() string {
	theirs := "--initial-cluster " + e.Theirs
	if e.Theirs == "" {
		theirs = "no such list"
	}
	return fmt.Sprintf("node %s was started with --initial-cluster %s, and %s with %s: give all of them the same list", e.NodeID, e.Ours, e.Other, theirs)
}

// ReplacedError says that a cluster has a node of this name already, with
// another data directory.
type ReplacedError struct{ NodeID, Other, ClusterID string }

func (e *ReplacedError) Error() string {
	return fmt.Sprintf("cluster %s, of which %s is, has a member %s with another data directory than this one, which is empty: start %s with its own directory; "+
		"if that is lost: distlock cluster remove %s, then start it with --join", e.ClusterID, e.Other, e.NodeID, e.NodeID, e.NodeID)
}

// MovedError says that the cluster knows this node at another address.
type MovedError struct{ NodeID, Recorded, Address string }

func (e *MovedError) Error() string {
	return fmt.Sprintf("the cluster knows node %s at %s, not at %s: if it has moved, and nothing runs at its old address, distlock cluster add %s %s, then start it again",
		e.NodeID, e.Recorded, e.Address, e.NodeID, e.Address)
}
