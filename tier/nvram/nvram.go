package nvram

import (
	"errors"

	"github.com/google/uuid"

	"github.com/flic-migrate/flic-migrate/tier/vfs"
)

// ExtentSize is the unit of allocation in bytes.
const ExtentSize = 256 << 10

// ErrCorrupt is matched by every error that says that the file's content is not
// what it should be (as against an operation that failed).
var ErrCorrupt = errors.New("damaged NVRAM file")

// CorruptError names the place of a damage. It matches ErrCorrupt.
type CorruptError struct {
	File   string
	Offset int64 // bytes from the start of the file
	Reason string
}

// Options of Open.
type Options struct {
	// Capacity caps the whole file in bytes, headers included, and is kept
	// in the file. 0 keeps the file's own capacity; for a new file it means
	// no cap but the file system's. A larger value than the file's raises
	// it, a smaller one is an error.
	Capacity int64
	// Create makes the file if it is missing and formats it if it is empty
	// or all zero (a device, a preallocated file). Anything else that is not
	// an NVRAM file is refused, never overwritten.
	Create bool
	// ReadOnly is for restore and verify: only Open, OpenRegion, Owners,
	// Check work.
	ReadOnly bool
}

// File is an open NVRAM file. Its methods may be called from several
// goroutines.
type File struct {
	fs   vfs.FS
	path string
}

// Owner is one checkpoint that has extents in the file.
type Owner struct {
	UUID    uuid.UUID // of the checkpoint
	Store   uuid.UUID
	Extents []uint32 // by index within the owner; numbers as in Region.Extents
}

// Open opens the NVRAM file at path.
func Open(fs vfs.FS, path string, o Options) (*File, error) { return nil, errors.ErrUnsupported }

// Close closes the file. Regions must have been closed before.
func (f *File) Close() error { return errors.ErrUnsupported }

// UUID identifies the file, so that a checkpoint can tell its own NVRAM file
// from another one put in its place.
func (f *File) UUID() uuid.UUID { return uuid.UUID{} }

// Path is the name the file was opened with.
func (f *File) Path() string { return f.path }

// Capacity is the cap on the file in bytes; 0 if there is none.
func (f *File) Capacity() int64 { return 0 }

// Volatile tells if the file's content is lost at a power cut: it is on tmpfs
// or ramfs.
func (f *File) Volatile() bool { return false }

// Free is the number of bytes that Reserve could give out now: free extents,
// and what the file may still grow within its capacity and the space left on
// the file system.
func (f *File) Free() (int64, error) { return 0, errors.ErrUnsupported }

// Reserve takes extents for bytes of page slots of pageSize (a power of two,
// 1 KiB to 64 KiB) in the name of the checkpoint owner of store. It may give
// fewer than asked for, down to none, if the capacity is used up: look at
// Region.Slots. A full disk is ENOSPC, with nothing taken. The extents are
// durably the owner's when it returns, and nobody's else until Release, Trim,
// FreeOwner or Sweep. An owner can reserve only once.
func (f *File) Reserve(owner, store uuid.UUID, bytes int64, pageSize int) (*Region, error) {
	return nil, errors.ErrUnsupported
}

// OpenRegion opens the extents of a committed checkpoint for reading. It checks
// that each of them has been taken by this owner as that number, and lies
// within the file; a CorruptError otherwise. The content of the pages is
// covered by the caller's own checksums.
func (f *File) OpenRegion(owner uuid.UUID, extents []uint32, pageSize int) (*Region, error) {
	return nil, errors.ErrUnsupported
}

// FreeOwner frees all extents of a checkpoint, durably, and returns how many.
// None is no error: freeing can be repeated after a crash. Call it only after
// the checkpoint's removal is durable.
func (f *File) FreeOwner(owner uuid.UUID) (freed int, err error) { return 0, errors.ErrUnsupported }

// Owners lists the checkpoints of a store that have extents (of all stores for
// the zero UUID), ordered by UUID.
func (f *File) Owners(store uuid.UUID) ([]Owner, error) { return nil, errors.ErrUnsupported }

// Sweep frees, durably, the extents of store whose owner is not live, and those
// whose table entry a crash has left unreadable; it returns how many. Extents
// of other stores are not touched. live must also say true for a save that is
// under way.
func (f *File) Sweep(store uuid.UUID, live func(owner uuid.UUID) bool) (freed int, err error) {
	return 0, errors.ErrUnsupported
}

// Check reads headers and owner tables and returns each damage found
// (*CorruptError). The error is for a check that could not be done.
func (f *File) Check() ([]error, error) { return nil, errors.ErrUnsupported }

// Region is the page slots of one checkpoint: from Reserve for writing, from
// OpenRegion for reading. Slot s of n slots per extent is in Extents()[s/n].
type Region struct{}

// Slots is the number of page slots.
func (r *Region) Slots() int { return 0 }

// Extents are the numbers of the extents, in order, to be kept in the flash
// image. Extent e is at file offset e*ExtentSize.
func (r *Region) Extents() []uint32 { return nil }

// Offset is the file offset of a slot, for messages.
func (r *Region) Offset(slot int) int64 { return 0 }

// Write copies a page into its slot. A slot may be written again until Sync.
// Writes of different slots may run at the same time. Fastest when slots rise.
func (r *Region) Write(slot int, page []byte) error { return errors.ErrUnsupported }

// Sync makes all written pages durable. If it fails, the region must be
// released: a second Sync proves nothing.
func (r *Region) Sync() error { return errors.ErrUnsupported }

// Trim gives back, durably, the extents beyond the first slotsUsed slots. Call
// it before the commit: later, nobody knows that they are unused.
func (r *Region) Trim(slotsUsed int) error { return errors.ErrUnsupported }

// Release gives all extents back and closes the region: the save has failed.
func (r *Region) Release() error { return errors.ErrUnsupported }

// Close unmaps the region and leaves its extents taken.
func (r *Region) Close() error { return errors.ErrUnsupported }

// Page returns the content of a slot, in the mapping, without a copy: valid
// until Close, read only. Touching it can fault if the medium fails: do so
// within Guard.
func (r *Region) Page(slot int) []byte { return nil }

// Guard runs fn and turns a fault in the region's mapping into an error that
// names file and offset. fn must do its work in the calling goroutine.
func (r *Region) Guard(fn func() error) error { return errors.ErrUnsupported }

// ReadAhead starts reading slots [first, first+n) into memory.
func (r *Region) ReadAhead(first, n int) {}

// DontNeed takes slots [first, first+n) out of the process's resident memory.
func (r *Region) DontNeed(first, n int) {}
