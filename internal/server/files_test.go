package server

import "testing"

func TestFilesAreSharedOut(t *testing.T) {
	for limit, want := range map[int]files{
		64:      {8, 8, 4},
		128:     {72, 12, 4},
		1024:    {683, 102, 32},
		4096:    {3072, 256, 64},
		1 << 20: {1<<20 - 1024, 256, 64},
	} {
		got := share(limit)
		if got != want {
			t.Errorf("of %d: %+v, want %+v", limit, got, want)
		}
		if aside := limit - got.connections - got.strangers - got.metrics - 16; aside < 20 {
			t.Errorf("of %d only %d are left for files and members", limit, aside)
		}
	}
}
