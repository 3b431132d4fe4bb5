// Package vfs is the small file-system interface through which every write of
// a store goes.
//
// It exists for one reason: what a store promises about crashes can only be
// believed if each of its writes can be cut off, fail or be lost in a test.
// Production code uses [OS]; tests use package crashfs, which forgets what was
// not synced and fails on demand. So no package below tier opens, renames or
// removes a file in any other way.
//
// The durability rules every implementation follows, and that callers must
// assume nothing beyond:
//
//   - Written data survives a power cut only after [File.Sync], or, for the
//     mapped range, [Mapping.Sync].
//   - A created, renamed or removed name survives only after [FS.SyncDir] of
//     its directory. Syncing a file does not make its name durable.
//   - After a Sync has failed, what it should have made durable is lost, even if
//     a second Sync succeeds: Linux marks the pages clean when it reports the
//     error. The file must be given up, never synced again.
package vfs

import (
	"context"
	"errors"
	"io"
	"io/fs"
	"path/filepath"
	"time"
)

// ErrLocked is returned by TryLock when another open file holds a conflicting
// lock.
var ErrLocked = errors.New("locked by another process")

var (
	// ErrNotRegular: where a regular file has to be there is something else.
	ErrNotRegular = errors.New("not a regular file")
	// ErrLink: a symbolic link stands where none is followed.
	ErrLink = errors.New("a symbolic link, which is not followed here")
)

// LockMode says who else may hold a lock at the same time.
type LockMode int

const (
	Shared    LockMode = iota // any number of Shared holders
	Exclusive                 // nobody else
)

func (m LockMode) String() string {
	if m == Exclusive {
		return "exclusive"
	}
	return "shared"
}

// FS is a file system. All methods may be called from several goroutines.
// Errors are *fs.PathError or *os.LinkError, so they carry operation and name,
// and match fs.ErrExist, fs.ErrNotExist and the syscall.Errno behind them.
type FS interface {
	// NoLinks returns the same file system with one difference: on the way
	// from dir down to a name, and as that name, a symbolic link is refused
	// (ErrLink), and a file can only be a regular one. dir itself may be named
	// by a link. Names that are not below dir are as before. A store is read
	// and written through it, so that what somebody has put into its directory
	// leads nobody out of it. What root makes there belongs to whoever has the
	// directory that it is made in. One directory can be guarded at a time.
	NoLinks(dir string) (FS, error)

	// Create makes a new file of mode 0600, whatever the umask is, open for
	// reading and writing. It fails with fs.ErrExist rather than touch a file
	// that is there.
	Create(name string) (File, error)

	// CreateUnnamed makes a new file as Create does, on the file system of dir, which
	// must exist, but of no name, until File.LinkAs gives it one. Without a name it goes
	// away when it is closed, however its process ends. errors.ErrUnsupported if the file
	// system can't.
	CreateUnnamed(dir string) (File, error)

	// Open opens an existing file for reading. It never waits: a FIFO, a
	// socket, a character device is ErrNotRegular. A block device can be an
	// NVRAM file.
	Open(name string) (File, error)

	// OpenRW opens an existing file for reading and writing, of the kinds that
	// Open opens. The offset of Write starts at 0.
	OpenRW(name string) (File, error)

	// MkdirAll makes dir and its missing parents, durably, with mode 0700
	// whatever the umask is: it
	// syncs the parent of each directory made, and of the deepest one found,
	// because another process may have made that one a moment ago and not
	// have got to the sync.
	MkdirAll(dir string) error

	// Rename moves a file to a name that must not exist (fs.ErrExist), as
	// one atomic step: of two processes that commit to one name, one wins.
	// After an error other than that one the file may have both names, where
	// the file system has no such step but link(2).
	Rename(oldname, newname string) error

	// Replace moves a file over whatever file has the new name, atomically.
	Replace(oldname, newname string) error

	// Link gives a file another name, which must not exist (fs.ErrExist).
	// errors.ErrUnsupported if the file system has no hard links.
	Link(oldname, newname string) error

	// Remove removes a file or an empty directory.
	Remove(name string) error

	// ReadDir returns the entries of a directory, sorted by name.
	ReadDir(dir string) ([]fs.DirEntry, error)

	// ReadStamps is ReadDir that looks at those entries too whose names look wants, or at
	// all if it is nil, in a fraction of the time that as many Lstats take. What goes away
	// meanwhile is left out.
	ReadStamps(dir string, look func(name string) bool) ([]Stamped, error)

	// Stat follows symbolic links, Lstat describes the last one itself.
	Stat(name string) (fs.FileInfo, error)
	Lstat(name string) (fs.FileInfo, error)

	// ID tells a file or directory from every copy of it: it stays the same
	// under every name, and after a mount at another place. A file system that
	// numbers its files anew at each mount changes it all the same.
	ID(name string) (string, error)

	// SyncDir makes the creations, renames and removals of names in dir
	// durable.
	SyncDir(dir string) error

	// Lock opens the lock file name, creating it if missing, and waits for
	// the lock until ctx is done, and no longer than LockLimit. The error says
	// for what it waited and how long. The caller closes the returned Locked to
	// give the lock up; the end of the process does it too. The file stays; a
	// holder that removes it gives the lock up with that.
	Lock(ctx context.Context, name string, mode LockMode) (Locked, error)

	// TryLock is Lock without waiting: ErrLocked if it is held.
	TryLock(name string, mode LockMode) (Locked, error)

	// StatFS describes the file system that holds name, which must exist.
	StatFS(name string) (FSInfo, error)
}

// Unnamed is what a file without a name is called in messages. It leads to no file, and
// least of all to dir.
func Unnamed(dir string) string { return filepath.Join(dir, "(file without a name)") }

// Stamp tells a file from what it was, and from every other file of its file system, as
// far as that can be told without reading it. A change that comes within a tick of the
// clock after another, some milliseconds, can leave the same Stamp.
type Stamp struct {
	Size  int64
	Mtime int64 // of the last change of its content, ns since 1970
	Ctime int64 // of the last change of anything of it, its names included
	Inode uint64
}

// Stamped is an entry of a directory.
type Stamped struct {
	Name  string
	Type  fs.FileMode // the type bits
	Stamp             // zero if it was not looked at
}

// Locked is a held lock of [FS.Lock].
type Locked interface {
	io.Closer
}

// File is an open file. ReadAt, WriteAt, Sync and the other methods that do not
// use the offset may be called from several goroutines; Write may not.
type File interface {
	io.ReaderAt
	io.Writer // at the offset, which it advances
	io.WriterAt
	io.Closer

	// Name is the name the file was opened with; of CreateUnnamed's, Unnamed.
	Name() string

	// Size is the length in bytes; of a block device, its capacity.
	Size() (int64, error)

	// Links is how many names the file has; 0 if it was removed.
	Links() (int, error)

	// Inode tells the file from every other of its file system, under whatever names: Stamp's.
	Inode() (uint64, error)

	// LinkAs gives a file of CreateUnnamed's a name, which must not exist (fs.ErrExist), on
	// the same file system: with all its content, in one step.
	LinkAs(name string) error

	// Restrict takes a regular file's mode back to 0600 if it lets the group or
	// others in. It fails with fs.ErrPermission if the file is another user's and
	// this is not root. A block device is left alone.
	Restrict() error

	// GiveTo makes the owner of dir the file's, if root has made it there for
	// somebody else's dir; it does nothing for others than root.
	GiveTo(dir fs.FileInfo) error

	// Sync makes the file's data and size durable. See the package comment
	// for what a failure means.
	Sync() error

	// Truncate sets the length. New bytes read as zero and have no disk
	// blocks yet.
	Truncate(size int64) error

	// Allocate gives [off, off+n) disk blocks and extends the file to off+n
	// if it is shorter. Bytes that had no blocks read as zero; others keep
	// their content. A full disk is ENOSPC here, and then no longer a SIGBUS
	// in a mapping later. errors.ErrUnsupported if the file system can't.
	Allocate(off, n int64) error

	// Punch gives the disk blocks of [off, off+n) back; the range then reads as
	// zero, also in mappings, and the length stays. It is durable, or has not
	// happened, or in a part of its blocks, as a write: only after Sync.
	// errors.ErrUnsupported if the file system can't.
	Punch(off, n int64) error

	// Clone gives the file, which is empty, the content of the regular file name: both
	// have the same disk blocks until one of them is written to. What name has in memory
	// only is written to its blocks first. Durable after Sync. errors.ErrUnsupported if
	// the file system can't, or name is on another one.
	Clone(name string) error

	// SetModified sets the time of the last change of the content.
	SetModified(at time.Time) error

	// Allocated is the number of bytes that the file's disk blocks hold. It can
	// be less than Size, if the file has holes, or more.
	Allocated() (int64, error)

	// Data returns the first offset from off on that may hold something else
	// than zero because it has disk blocks; io.EOF if only a hole follows, or
	// the end of the file. A file system that knows no holes says off.
	Data(off int64) (int64, error)

	// StartWriteback asks the kernel to begin writing dirty pages of
	// [off, off+n) without waiting, so that a later Sync has little left to
	// do. It promises nothing, so it has no error.
	StartWriteback(off, n int64)

	// DropCache asks the kernel to forget the file's clean pages, so that the
	// next read is one of the medium. It promises nothing either.
	DropCache()

	// Map maps [off, off+n) of the file, shared. off is a multiple of the
	// machine's page size, and the range lies within the file: mapped bytes
	// beyond the end would be a SIGBUS when touched.
	Map(off, n int64, writable bool) (Mapping, error)

	// Lock waits for a lock on this open file as FS.Lock does; TryLock
	// returns ErrLocked instead of waiting. A lock belongs to the open file:
	// two opens of one file by the same process exclude each other. It ends
	// with Unlock, Close or the end of the process.
	Lock(ctx context.Context, mode LockMode) error
	TryLock(mode LockMode) error
	Unlock() error
}

// Mapping is a mapped range of a file. off and n count from the start of the
// mapping. Reading or writing Bytes can fault (SIGBUS) when the file is
// truncated by someone else, when a page has no disk block and the disk is
// full, or when the medium has an error: writers call File.Allocate first, and
// both sides touch the bytes inside [CatchFault].
type Mapping interface {
	// Bytes is the mapped memory. It must not be used after Close.
	Bytes() []byte

	// Sync makes the range durable, and only this range: data that others
	// have dirty in the same file is not waited for. It covers WriteAt to the
	// range as well, and the file size up to the end of the range.
	Sync(off, n int64) error

	// WillNeed asks for the range to be read ahead.
	WillNeed(off, n int64)

	// DontNeed takes the range's pages out of the process (not out of the
	// page cache; nothing is lost), so that a pass over a large mapping
	// keeps a small resident size.
	DontNeed(off, n int64)

	Close() error
}

// FSInfo describes a mounted file system.
type FSInfo struct {
	Type     string // "ext4", "xfs", "tmpfs", ..., or the hexadecimal magic
	Total    int64  // bytes
	Free     int64  // bytes that this process may still allocate
	Volatile bool   // the content is gone after a power cut (tmpfs, ramfs)
}
