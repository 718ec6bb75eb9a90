package replica

import (
	"cmp"
	"slices"
	"sync"

	"github.com/hashicorp/raft"
)

// configurations follows which configurations the log has, by index. Raft
// keeps them to itself: what its GetConfiguration answers has the members and,
// in 1.7.3, the index 0 whatever the log has.
type configurations struct {
	mu   sync.Mutex
	list []configuration // in order of index
}

// configuration is the members as of one entry of the log.
type configuration struct {
	index   uint64
	servers raft.Configuration
}

func (c *configurations) add(index uint64, servers raft.Configuration) {
	c.mu.Lock()
	defer c.mu.Unlock()
	i, found := slices.BinarySearchFunc(c.list, index, func(x configuration, index uint64) int { return cmp.Compare(x.index, index) })
	if found {
		c.list[i].servers = servers
	} else {
		c.list = slices.Insert(c.list, i, configuration{index, servers})
	}
	if n := len(c.list) - 16; n > 0 { // at most one of them is not committed
		c.list = slices.Delete(c.list, 0, n)
	}
}

// stored looks for configurations in what has been written to the log.
func (c *configurations) stored(logs []*raft.Log) {
	for _, l := range logs {
		if l.Type == raft.LogConfiguration {
			c.add(l.Index, raft.DecodeConfiguration(l.Data))
		}
	}
}

// cut forgets those from an index on, which are no longer in the log.
func (c *configurations) cut(from uint64) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.list = slices.DeleteFunc(c.list, func(x configuration) bool { return x.index >= from })
}

// latest is the last one, committed or not; the zero value when there is none.
func (c *configurations) latest() configuration {
	c.mu.Lock()
	defer c.mu.Unlock()
	if len(c.list) == 0 {
		return configuration{}
	}
	return c.list[len(c.list)-1]
}

// snapshots is raft's store. One that a leader sends brings its configuration.
type snapshots struct {
	raft.SnapshotStore
	configs *configurations
	failed  func(error) // one could not be written; nil for nobody
}

// Create implements raft.SnapshotStore.
func (s *snapshots) Create(version raft.SnapshotVersion, index, term uint64, servers raft.Configuration, configIndex uint64, t raft.Transport) (raft.SnapshotSink, error) {
	sink, err := s.SnapshotStore.Create(version, index, term, servers, configIndex, t)
	switch {
	case err == nil:
		s.configs.add(configIndex, servers)
	case s.failed != nil:
		s.failed(err)
	}
	if s.failed == nil || err != nil {
		return sink, err
	}
	return &watchedSink{SnapshotSink: sink, failed: s.failed}, nil
}

// watchedSink tells of a snapshot that is not written to its end.
type watchedSink struct {
	raft.SnapshotSink
	failed func(error)
	err    error
}

func (s *watchedSink) Write(p []byte) (int, error) {
	n, err := s.SnapshotSink.Write(p)
	return n, s.tell(err)
}

func (s *watchedSink) Close() error { return s.tell(s.SnapshotSink.Close()) }

// tell reports err if it is the first, and returns it.
func (s *watchedSink) tell(err error) error {
	if err != nil && s.err == nil {
		s.err = err
		s.failed(err)
	}
	return err
}
