package nvram

import (
	"context"
	"errors"
	"fmt"
	"io"
	"sync/atomic"
	"time"

	"github.com/google/uuid"

	"github.com/flic-migrate/flic-migrate/tier/integrity"
	"github.com/flic-migrate/flic-migrate/tier/vfs"
)

// File is an open NVRAM file. Its methods may be called from several
// goroutines.
type File struct {
	fs       vfs.FS
	path     string
	f        vfs.File
	device   bool // fixed size, always fully backed
	volatile bool
	limit    int64 // Options.Capacity in extents; 0 is no limit

	// h is the header as Open found it; its capacity may be old.
	h header

	// turn is the lock within the process: all goroutines share one open file
	// and so one flock. Whoever has put something in has it.
	turn     chan struct{}
	capacity atomic.Int64 // the header's when the file was last locked
}

// Close closes the file. Its regions must have been closed before.
func (f *File) Close() error { return f.f.Close() }

// UUID identifies the file, so that a checkpoint can tell its own NVRAM file
// from another one put in its place.
func (f *File) UUID() uuid.UUID { return f.h.id }

// Path is the name the file was opened with.
func (f *File) Path() string { return f.path }

// Volatile tells if the file's content is lost at a power cut because it is on
// tmpfs or ramfs.
func (f *File) Volatile() bool { return f.volatile }

// Capacity is the cap on the file in bytes, tables included, as far as it was
// known when it was last locked; 0 if there is none.
func (f *File) Capacity() int64 {
	return f.capacity.Load() * f.h.extentSize
}

func (f *File) corrupt(off int64, format string, args ...any) error {
	return &integrity.CorruptError{File: f.path, Offset: off, Err: fmt.Errorf(format, args...)}
}

// locked runs fn with the file locked against other goroutines and processes,
// and the header read anew. It waits until ctx is done, and for vfs.LockLimit at
// most: whoever has the lock has it for one change of a table and its sync.
func (f *File) locked(ctx context.Context, mode vfs.LockMode, fn func() error) (err error) {
	select {
	case f.turn <- struct{}{}:
		defer func() { <-f.turn }()
	case <-ctx.Done():
		return fmt.Errorf("%s: waited for its lock: %w", f.path, context.Cause(ctx))
	case <-time.After(vfs.LockLimit):
		return fmt.Errorf("%s: waited %v for this process's own use of it: %w", f.path, vfs.LockLimit, vfs.ErrLocked)
	}
	if err := f.f.Lock(ctx, mode); err != nil {
		return err
	}
	defer func() { err = errors.Join(err, f.f.Unlock()) }()
	if f.h.extentSize != 0 {
		// Another process may have raised the capacity.
		h, _, err := f.readHeader()
		if err != nil {
			return err
		}
		if h.id != f.h.id || h.geometry != f.h.geometry {
			return f.corrupt(0, "the file has been formatted anew while it was open")
		}
		f.capacity.Store(h.capacity)
	}
	return fn()
}

// readAt reads b, with zeros for what is beyond the end of the file.
func (f *File) readAt(b []byte, off int64) error {
	n, err := f.f.ReadAt(b, off)
	if err == io.EOF {
		clear(b[n:])
		err = nil
	}
	return err
}

// syncRange makes a range durable without waiting for the pages that others
// have dirty in the file.
func (f *File) syncRange(off, n int64) error {
	start := off &^ (64<<10 - 1) // whatever the machine's page size is
	m, err := f.f.Map(start, off+n-start, false)
	if err != nil {
		return err
	}
	err = m.Sync(off-start, n)
	return errors.Join(err, m.Close())
}

// readHeader returns the newer valid copy, and if both are valid.
func (f *File) readHeader() (h header, both bool, err error) {
	b := make([]byte, headerCopy+headerSize)
	if err := f.readAt(b, 0); err != nil {
		return header{}, false, err
	}
	h1, err1 := decodeHeader(b)
	h2, err2 := decodeHeader(b[headerCopy:])
	switch {
	case err1 != nil && err2 != nil:
		return header{}, false, f.corrupt(0, "%v; second copy at %d: %v", err1, headerCopy, err2)
	case err1 != nil || err2 == nil && h2.generation > h1.generation:
		return h2, err1 == nil, nil
	}
	return h1, err2 == nil, nil
}

// holes tells if a part of the file has no disk blocks. On a file system that
// compresses it may say so of one that has them all.
func (f *File) holes() (bool, error) {
	if f.device {
		return false, nil
	}
	size, err := f.f.Size()
	if err != nil {
		return false, err
	}
	blocks, err := f.f.Allocated()
	return blocks < size, err
}

// table reads the owner table of a group; zeros if the file does not reach it.
func (f *File) table(group int64) ([]byte, error) {
	b := make([]byte, f.h.tableSize())
	return b, f.readAt(b, f.h.tableOffset(group))
}

// extents is the number of whole extents in the file now.
func (f *File) extents() (int64, error) {
	size, err := f.f.Size()
	return min(size/f.h.extentSize, maxExtents), err
}

// forEach calls fn for every entry that is not free, of every table of which the
// file has at least a part: a crash while the file grew can leave it so. fn must
// not keep b. The file is locked.
func (f *File) forEach(fn func(extent uint32, b []byte, e entry, s entryState) error) error {
	size, err := f.f.Size()
	if err != nil {
		return err
	}
	for group := int64(0); f.h.tableOffset(group) < size; group++ {
		first := group * f.h.group
		table, err := f.table(group)
		if err != nil {
			return err
		}
		for i := range f.h.group {
			b := table[i*entrySize:][:entrySize]
			extent := uint32(first + i)
			e, s := f.h.decodeEntry(b, extent)
			if s == free {
				continue
			}
			if err := fn(extent, b, e, s); err != nil {
				return err
			}
		}
	}
	return nil
}

// runs calls fn for each stretch of consecutive numbers in list that lies in one
// group: list[i:j].
func (g geometry) runs(list []uint32, fn func(i, j int) error) error {
	for i := 0; i < len(list); {
		j := i + 1
		for j < len(list) && list[j] == list[j-1]+1 && int64(list[j])%g.group != 0 {
			j++
		}
		if err := fn(i, j); err != nil {
			return err
		}
		i = j
	}
	return nil
}

// setEntries writes the table entries of the extents in list, rising, durably.
// fill makes one of zeros. The file is locked.
func (f *File) setEntries(list []uint32, fill func(b []byte, i int)) error {
	err := f.h.runs(list, func(i, j int) error {
		b := make([]byte, (j-i)*entrySize)
		for k := i; k < j; k++ {
			fill(b[(k-i)*entrySize:][:entrySize], k)
		}
		_, err := f.f.WriteAt(b, f.h.entryOffset(int64(list[i])))
		return err
	})
	if err != nil {
		return err
	}
	for i := 0; i < len(list); {
		j := i + 1
		for j < len(list) && int64(list[j])/f.h.group == int64(list[i])/f.h.group {
			j++
		}
		first, last := f.h.entryOffset(int64(list[i])), f.h.entryOffset(int64(list[j-1]))
		if err := f.syncRange(first, last+entrySize-first); err != nil {
			return err
		}
		i = j
	}
	return nil
}

// clearEntries frees the extents in list, rising, durably. The file is locked.
func (f *File) clearEntries(list []uint32) error {
	return f.setEntries(list, func([]byte, int) {})
}

// PerExtent is how many slots of a page size an extent has.
func (f *File) PerExtent(pageSize int) int { return int(f.h.extentSize) / pageSize }
