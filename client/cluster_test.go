package client

import (
	"errors"
	"testing"

	"go.uber.org/zap"
)

// TestAnotherClusterIsToldOnce: whoever keeps nothing on disk has no id, and is
// not another cluster.
func TestAnotherClusterIsToldOnce(t *testing.T) {
	var told []ClusterError
	c := &Client{logger: zap.NewNop(), warn: func(w Warning) {
		var other *ClusterError
		if !errors.As(w.Err, &other) || w.LeaseID != 0 {
			t.Errorf("%+v", w)
			return
		}
		told = append(told, *other)
	}}
	for _, id := range []string{"", "a", "a", "", "a", "b", "", "b", "a"} {
		c.hear(id)
	}
	if len(told) != 2 || told[0] != (ClusterError{"a", "b"}) || told[1] != (ClusterError{"b", "a"}) {
		t.Errorf("%+v", told)
	}
}
