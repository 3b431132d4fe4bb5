package nvram

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"path/filepath"
	"slices"
	"syscall"

	"github.com/google/uuid"

	"github.com/flic-migrate/flic-migrate/tier/integrity"
	"github.com/flic-migrate/flic-migrate/tier/vfs"
)

// ErrNotBlank: a file that is to become an NVRAM file holds something else, or
// may do so. Options.Format overwrites it.
var ErrNotBlank = errors.New("it holds something else")

// lookLimit bounds how much of a file is read to find out that it is all zero.
// Holes are not read.
var lookLimit = int64(1 << 30)

// Options of Open.
type Options struct {
	// Capacity caps the whole file in bytes, tables included. A new file
	// keeps it, and a larger value raises the cap of an existing one. A
	// smaller value limits only what this File takes. 0 is the cap that the
	// file has; for a new file, no cap but the file system's.
	Capacity int64
	// Create makes the file if it is missing, and formats it if it is empty
	// or zero from its beginning to its end. Anything else that is not an NVRAM
	// file is refused (ErrNotBlank), and so is one that would take too long to
	// read. A file that has all its disk blocks when it is formatted keeps them
	// for good; of any other, freed extents give theirs back.
	Create bool
	// Format has Create overwrite what is no NVRAM file, whatever it holds. One
	// that has been an NVRAM file is left alone, damaged or not: it may have
	// checkpoints.
	Format bool
	// Beside is a directory whose owner gets a file that root has Create make: he
	// could open it for nothing otherwise. Empty: it stays root's.
	Beside string
	// ReadOnly opens for OpenSome, Owners, Free and Check only.
	ReadOnly bool
}

// Open opens the NVRAM file at path. If it had to be made, it is durable, and after an
// error it is not there. ctx ends
// the wait for the file's lock, here and in every method that has one.
func Open(ctx context.Context, fsys vfs.FS, path string, o Options) (*File, error) {
	return open(ctx, fsys, path, o, geometry{ExtentSize, groupExtents})
}

// open is Open with the geometry for new files; tests use a smaller one.
func open(ctx context.Context, fsys vfs.FS, path string, o Options, g geometry) (f *File, err error) {
	for range 3 {
		if f, err = tryOpen(ctx, fsys, path, o, g); !errors.Is(err, errUnmade) {
			break
		}
	}
	return f, err
}

// errUnmade: the file that was opened is there no more, because whoever had made it could
// not format it.
var errUnmade = errors.New("it has been removed while it was opened")

func tryOpen(ctx context.Context, fsys vfs.FS, path string, o Options, g geometry) (_ *File, err error) {
	if o.Capacity < 0 || o.Capacity > 0 && o.Capacity < 2*g.extentSize {
		return nil, fmt.Errorf("%s: an NVRAM file has at least %d bytes, not %d", path, 2*g.extentSize, o.Capacity)
	}
	f := &File{fs: fsys, path: path, turn: make(chan struct{}, 1)}
	made := false
	if o.ReadOnly {
		f.f, err = fsys.Open(path)
	} else {
		f.f, err = fsys.OpenRW(path)
		if o.Create && errors.Is(err, fs.ErrNotExist) {
			f.f, err = create(fsys, path, o.Beside)
			made = err == nil
			if errors.Is(err, fs.ErrExist) { // another process was faster
				f.f, err = fsys.OpenRW(path)
			}
		}
	}
	if errors.Is(err, vfs.ErrNotRegular) && character(fsys, path) {
		// A device-DAX node can be mapped only: no read, write or fsync, and its
		// lines must be flushed by user code. Its file-system or block form does
		// all this in the kernel.
		return nil, fmt.Errorf("%w (an NVRAM file can be on /dev/pmem*, or on a file system mounted with -o dax)", err)
	}
	if err != nil {
		return nil, err
	}
	opened := false
	defer func() {
		if opened {
			return
		}
		if made { // also while panicking
			f.unmake()
		}
		f.f.Close()
	}()
	info, err := fsys.StatFS(path)
	if err != nil {
		return nil, err
	}
	f.volatile = info.Volatile
	fi, err := fsys.Stat(path)
	if err != nil {
		return nil, err
	}
	f.device = fi.Mode()&fs.ModeDevice != 0
	if f.device {
		f.volatile = false // that was the file system of the device node
	}
	if !o.ReadOnly && !f.device {
		// Not only after Create: the one who made the file may not have got
		// to this yet, and we are going to rely on the name. A directory
		// that we can't read is no place where one of us makes files.
		err := fsys.SyncDir(filepath.Dir(path))
		if err != nil && !errors.Is(err, fs.ErrPermission) {
			return nil, err
		}
	}
	mode := vfs.Exclusive
	if o.ReadOnly {
		mode = vfs.Shared
	}
	err = f.locked(ctx, mode, func() error { return f.loadOrFormat(ctx, o, g) })
	if err != nil {
		return nil, err
	}
	opened = true
	return f, nil
}

// create makes the file, which belongs to the owner of the directory beside.
func create(fsys vfs.FS, path, beside string) (_ vfs.File, err error) {
	f, err := fsys.Create(path)
	if err != nil || beside == "" {
		return f, err
	}
	fi, err := fsys.Stat(beside)
	if err == nil {
		err = f.GiveTo(fi)
	}
	if err != nil {
		f.Close()
		fsys.Remove(path)
		return nil, err
	}
	return f, nil
}

// unmake removes the file, which this Open has made, if it has no header. Another process
// may have found it, and may be waiting for its lock: that one sees that it is gone.
func (f *File) unmake() {
	if f.f.TryLock(vfs.Exclusive) != nil {
		return // it is the other's now
	}
	defer f.f.Unlock()
	if _, _, err := f.readHeader(); integrity.IsCorrupt(err) {
		f.fs.Remove(f.path)
	}
}

// character tells whether path is a character device.
func character(fsys vfs.FS, path string) bool {
	fi, err := fsys.Stat(path)
	return err == nil && fi.Mode()&fs.ModeCharDevice != 0
}

// loadOrFormat reads the header, makes it if the file is blank, and writes a new
// one if a copy is not valid or the capacity is to be raised.
func (f *File) loadOrFormat(ctx context.Context, o Options, g geometry) error {
	h, both, err := f.readHeader()
	format := err != nil
	if format {
		if !o.Create || o.ReadOnly || !integrity.IsCorrupt(err) {
			return err
		}
		if err := f.mayFormat(ctx, err, o.Format, g); err != nil {
			return err
		}
	}
	// Guest memory goes in here. What is not to be an NVRAM file keeps its mode.
	if !o.ReadOnly {
		if err := f.f.Restrict(); err != nil {
			return err
		}
	}
	if format {
		if links, err := f.f.Links(); err != nil || links == 0 {
			return errors.Join(err, fmt.Errorf("%s: %w", f.path, errUnmade))
		}
		both = true
		h, err = f.format(o, g)
		if err != nil {
			return fmt.Errorf("format: %w", err)
		}
	}
	limit := o.Capacity / h.extentSize
	raise := h.capacity > 0 && limit > h.capacity
	if (raise || !both) && !o.ReadOnly {
		if raise {
			h.capacity = min(limit, maxExtents)
		}
		h.generation++ // which takes it to the place of the older copy
		if _, err := f.f.WriteAt(h.encode(), h.copyOffset()); err != nil {
			return err
		}
		if err := f.syncRange(h.copyOffset(), headerSize); err != nil {
			return err
		}
	}
	f.h, f.limit = h, limit
	f.capacity.Store(h.capacity)
	return nil
}

// mayFormat returns nil if the file, whose header is no header for the reason
// given, can be made an NVRAM file without harm, or with force.
func (f *File) mayFormat(ctx context.Context, reason error, force bool, g geometry) error {
	b := make([]byte, tableOffset)
	if err := f.readAt(b, 0); err != nil {
		return err
	}
	if bytes.HasPrefix(b, magic[:]) || bytes.HasPrefix(b[headerCopy:], magic[:]) {
		return reason
	}
	if force {
		return nil
	}
	return f.blank(ctx, g)
}

// blank returns nil if the file is as zeros or an interrupted format leave it: all
// zero but for headers without their magic number.
func (f *File) blank(ctx context.Context, g geometry) error {
	b := make([]byte, max(g.extentSize, 1<<20))
	zeros := make([]byte, len(b))
	read := int64(0)
	for next := int64(0); ; next += int64(len(b)) {
		off, err := f.f.Data(next)
		if err == io.EOF {
			return nil
		}
		if err == nil {
			err = ctx.Err()
		}
		if err != nil {
			return err
		}
		if read += int64(len(b)); read > lookLimit {
			return f.corrupt(off, "no NVRAM file, and larger than what is looked through for zeros, %d MiB: %w", lookLimit>>20, ErrNotBlank)
		}
		if err := f.readAt(b, off); err != nil {
			return err
		}
		for _, at := range [...]int64{0, headerCopy} {
			if at >= off {
				clear(b[at-off+int64(len(magic)) : at-off+headerSize])
			}
		}
		if !bytes.Equal(b, zeros) {
			i := slices.IndexFunc(b, func(c byte) bool { return c != 0 })
			return f.corrupt(off+int64(i), "no NVRAM file (no magic number at 0 and %d), and not blank: %w", headerCopy, ErrNotBlank)
		}
		next = off
	}
}

// format writes the first two headers. The magic numbers come last: whatever a
// crash leaves before them is blank, so the next Open formats again.
func (f *File) format(o Options, g geometry) (_ header, err error) {
	size, err := f.f.Size()
	if err != nil {
		return header{}, err
	}
	if f.device && size < 2*g.extentSize {
		return header{}, fmt.Errorf("%s: a device of %d bytes is too small: %w", f.path, size, syscall.ENOSPC)
	}
	keep, err := f.preallocated(size, g)
	if err != nil {
		return header{}, err
	}
	if err := f.allocate(0, g.extentSize, size); err != nil {
		return header{}, err
	}
	if o.Format {
		// Also a header's place, so that all of it is blank if this goes no further.
		if _, err := f.f.WriteAt(make([]byte, g.extentSize), 0); err != nil {
			return header{}, err
		}
	}
	// A device is not zero where it has never been an NVRAM file, and what is
	// no free line of a table would be lost for good.
	zeros := make([]byte, g.tableSize())
	for off := g.tableOffset(1); off < size; off += g.group * g.extentSize {
		b := make([]byte, min(g.tableSize(), size-off))
		if err := f.readAt(b, off); err != nil {
			return header{}, err
		}
		if bytes.Equal(b, zeros[:len(b)]) {
			continue // writing would give a hole its blocks
		}
		if _, err := f.f.WriteAt(zeros[:len(b)], off); err != nil {
			return header{}, err
		}
	}
	id, err := uuid.NewRandom()
	if err != nil {
		return header{}, err
	}
	h := header{geometry: g, generation: 1, id: id, capacity: min(o.Capacity/g.extentSize, maxExtents)}
	if keep {
		h.compatible |= featureKeep
	}
	second := h
	second.generation++
	defer func() {
		if err != nil {
			// A header that the sync has not made durable would still be
			// believed by the next Open, as long as the power lasts.
			f.f.WriteAt(zeroEntry[:], 0)
			f.f.WriteAt(zeroEntry[:], headerCopy)
		}
	}()
	for _, from := range []int{len(magic), 0} {
		for _, h := range []header{h, second} {
			if _, err := f.f.WriteAt(h.encode()[from:], h.copyOffset()+int64(from)); err != nil {
				return header{}, err
			}
		}
		if err := f.f.Sync(); err != nil {
			return header{}, err
		}
	}
	return second, nil
}

// preallocated tells if a file of size bytes, which is about to be formatted, has
// the disk blocks already that its extents will need: somebody wants them to be
// there whatever else fills the disk.
func (f *File) preallocated(size int64, g geometry) (bool, error) {
	if f.device || size < 2*g.extentSize {
		return false, nil
	}
	blocks, err := f.f.Allocated()
	return blocks >= size-g.extentSize, err
}
