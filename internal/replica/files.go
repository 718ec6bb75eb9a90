package replica

import (
	"os"

	"github.com/hashicorp/raft-wal/fs"
	"github.com/hashicorp/raft-wal/types"
)

// files are raft-wal's files, synced by what is needed to read them again: the
// space of a segment is reserved when it is made, so most syncs need not write
// its times to the file system's journal as well.
type files struct{ *fs.FS }

// Create implements types.VFS.
func (f files) Create(dir, name string, size uint64) (types.WritableFile, error) {
	w, err := f.FS.Create(dir, name, size)
	if err != nil {
		return nil, err
	}
	file, ok := w.(*fs.File)
	if !ok {
		return w, nil
	}
	return &newFile{File: file}, nil
}

// OpenWriter implements types.VFS.
func (f files) OpenWriter(dir, name string) (types.WritableFile, error) {
	w, err := f.FS.OpenWriter(dir, name)
	if err != nil {
		return nil, err
	}
	file, ok := w.(*os.File)
	if !ok {
		return w, nil
	}
	return oldFile{file}, nil
}

// newFile syncs everything the first time, its directory included.
type newFile struct {
	*fs.File
	synced bool // Sync is called by one goroutine, raft-wal's writer
}

// Sync implements types.WritableFile.
func (f *newFile) Sync() error {
	if f.synced {
		return syncData(&f.File.File)
	}
	if err := f.File.Sync(); err != nil {
		return err
	}
	f.synced = true
	return nil
}

type oldFile struct{ *os.File }

// Sync implements types.WritableFile.
func (f oldFile) Sync() error { return syncData(f.File) }
