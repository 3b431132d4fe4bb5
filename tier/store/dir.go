package store

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"syscall"

	"github.com/google/uuid"

	"github.com/flic-migrate/flic-migrate/tier/image"
	"github.com/flic-migrate/flic-migrate/tier/integrity"
	"github.com/flic-migrate/flic-migrate/tier/rescue"
	"github.com/flic-migrate/flic-migrate/tier/vfs"
)

// Dir is all that a store asks of the place that it is kept in: objects of bytes
// under names of a few parts with slashes between them, in folders that hold one
// kind of object each. There is one implementation for use, a directory of a POSIX
// file system; testDir says what any other has to do.
//
// Errors match fs.ErrNotExist and fs.ErrExist, vfs.ErrLocked for a lock that
// somebody else has, and syscall.ENOSPC for a place that is full.
type Dir interface {
	// Path is what messages call an object; of "", what they call the place.
	Path(name string) string

	// ID tells the place from every copy of it. It stays the same when the place
	// is moved.
	ID(ctx context.Context) (string, error)

	// Mkdir makes a folder, and those that it is in, durably. One that is there
	// is no error, and is made durable too.
	Mkdir(ctx context.Context, folder string) error

	// List names what is in a folder, in order. What is changed meanwhile may be
	// in the list or not.
	List(ctx context.Context, folder string) ([]Entry, error)

	// Look is List with the Stamp of each entry whose name look wants, or of all if it is
	// nil.
	Look(ctx context.Context, folder string, look func(name string) bool) ([]Entry, error)

	// Sync makes durable what List shows of a folder now, removals too.
	Sync(ctx context.Context, folder string) error

	// Read returns an object's content, and refuses one of more than limit bytes
	// (vfs.ErrTooLarge).
	Read(ctx context.Context, name string, limit int64) ([]byte, error)

	// Write makes or replaces an object, whole or not at all, and durably. spare
	// is a name that the object may have until then, in another folder.
	Write(ctx context.Context, name, spare string, b []byte) error

	// Cache is Write of what can be made again: whatever a power cut leaves of it is
	// good enough.
	Cache(ctx context.Context, name, spare string, b []byte) error

	// Create makes an object (fs.ErrExist) to be filled, and locks it exclusively.
	Create(ctx context.Context, name string) (Object, error)

	// Stage opens an object to be written to at any place, and makes it if there is none. It
	// is locked exclusively (vfs.ErrLocked).
	Stage(ctx context.Context, name string) (Stage, error)

	// Reopen is Stage of an object that there must be.
	Reopen(ctx context.Context, name string) (Stage, error)

	// Open opens an object for reading, and locks it unless lock is Unlocked:
	// without waiting, until it is closed or the process ends. What stands there
	// and is no object, as a folder, is damage (errNotObject).
	Open(ctx context.Context, name string, lock Locking) (Object, error)

	// Holders names the processes that have an object locked, as messages have them; none if
	// it can't be told.
	Holders(ctx context.Context, name string) []string

	// Commit gives an object the name to, durably, as one step: it fails if there
	// is one of that name (fs.ErrExist), and of two that want it one gets it.
	// After an error the object has its old name, unless IsUncertain says so.
	Commit(ctx context.Context, from, to string) error

	// Replace gives an object the name of another, which goes, or keeps the other names
	// that Keep gave it: durably, as one step. After an error it may have happened, or
	// be so after a power cut.
	Replace(ctx context.Context, from, to string) error

	// Keep gives an object a second name in its folder, durably; errors.ErrUnsupported
	// if the place can't do that.
	Keep(ctx context.Context, name, second string) error

	// Remove removes an object. A folder's removals are durable after Sync.
	Remove(ctx context.Context, name string) error

	// Empty takes an object's content away, and needs no space for that. Who is
	// reading it must not be there any more. What else the place has of the same
	// content, as hard links to it, keeps it: then space is needed, and spare is a
	// name as in Write.
	Empty(ctx context.Context, name, spare string) error

	// Punch gives up what is in ranges of an object, which nobody needs any more; what
	// is there then is undefined. It returns how many bytes that has freed: none where
	// the place can't do so, or has the content under another name too. It is durable,
	// or has not happened, or in part, as the place likes.
	Punch(ctx context.Context, name string, ranges []byteRange) (freed int64, err error)

	// Lock waits for the lock name, which only one can hold, until ctx is done and
	// no longer than vfs.LockLimit. Close gives it up, and so does the end of the
	// process.
	Lock(ctx context.Context, name string) (io.Closer, error)
}

// byteRange is the bytes of an object from off up to end.
type byteRange struct{ off, end int64 }

// Entry is one of a folder's.
type Entry struct {
	Name   string // without the folder's
	Folder bool
	Odd    bool // neither folder nor object: a link, a FIFO, a device
	// Stamp tells an object from what it was before, and from every other (Look); zero if
	// it was not looked at.
	Stamp vfs.Stamp
}

// errNotObject: where an object is to be, something else stands.
var errNotObject = errors.New("no file of a store's")

// notObject is the damage that something at path is not an object, because of err.
func notObject(path string, err error) error {
	var pe *fs.PathError
	if errors.As(err, &pe) {
		err = pe.Err
	}
	return &integrity.CorruptError{File: path, Err: fmt.Errorf("%w: %w", errNotObject, err)}
}

// Locking says which lock Open takes.
type Locking int

const (
	Unlocked  Locking = iota
	Shared            // any number of readers
	Exclusive         // nobody else
)

// Object is an open object. What Create gives can be written to, front to back,
// while it is read.
type Object interface {
	image.Source
	image.Sink
	io.Closer
	// Allocated is how many bytes it takes of the place.
	Allocated() (int64, error)
	// Links is how many names it has, here and elsewhere; 0 if it was removed, or another took
	// its name.
	Links() (int, error)
	// Inode tells it from every other object that there is, under whatever names.
	Inode() (uint64, error)
	// Map maps [off, off+n) of it, as vfs.File has it; the mapping stays when the
	// object is closed.
	Map(off, n int64, writable bool) (vfs.Mapping, error)
}

// posixDir is a directory of a file system.
type posixDir struct {
	fs   vfs.FS // follows no link below root
	root string
}

// newPosixDir is the directory root, which may be named by a link; what is in it
// is not.
func newPosixDir(fsys vfs.FS, root string) (*posixDir, error) {
	guarded, err := fsys.NoLinks(root)
	return &posixDir{guarded, root}, err
}

func (d *posixDir) Path(name string) string { return filepath.Join(d.root, filepath.FromSlash(name)) }

func (d *posixDir) ID(context.Context) (string, error) { return d.fs.ID(d.root) }

func (d *posixDir) Mkdir(_ context.Context, folder string) error {
	return d.fs.MkdirAll(d.Path(folder))
}

func (d *posixDir) List(_ context.Context, folder string) ([]Entry, error) {
	list, err := d.fs.ReadDir(d.Path(folder))
	entries := make([]Entry, len(list))
	for i, e := range list {
		entries[i] = Entry{Name: e.Name(), Folder: e.IsDir(), Odd: !e.IsDir() && !e.Type().IsRegular()}
	}
	return entries, err
}

func (d *posixDir) Look(_ context.Context, folder string, look func(string) bool) ([]Entry, error) {
	list, err := d.fs.ReadStamps(d.Path(folder), look)
	entries := make([]Entry, len(list))
	for i, e := range list {
		entries[i] = Entry{Name: e.Name, Folder: e.Type.IsDir(), Odd: !e.Type.IsDir() && !e.Type.IsRegular(), Stamp: e.Stamp}
	}
	return entries, err
}

func (d *posixDir) Sync(_ context.Context, folder string) error { return d.fs.SyncDir(d.Path(folder)) }

func (d *posixDir) Read(_ context.Context, name string, limit int64) ([]byte, error) {
	return vfs.ReadFile(d.fs, d.Path(name), limit)
}

func (d *posixDir) Write(_ context.Context, name, spare string, b []byte) error {
	return vfs.WriteFile(d.fs, d.Path(name), vfs.Writing{Temporary: d.Path(spare)}, vfs.Bytes(b))
}

func (d *posixDir) Cache(_ context.Context, name, spare string, b []byte) error {
	return vfs.WriteFile(d.fs, d.Path(name), vfs.Writing{Temporary: d.Path(spare), NoSync: true}, vfs.Bytes(b))
}

func (d *posixDir) Create(_ context.Context, name string) (_ Object, err error) {
	f, err := d.fs.Create(d.Path(name))
	if err != nil {
		return nil, err
	}
	locked := false
	defer func() {
		if !locked { // also while panicking
			f.Close()
			d.fs.Remove(d.Path(name))
		}
	}()
	if err := f.TryLock(vfs.Exclusive); err != nil {
		return nil, err
	}
	locked = true
	return f, nil
}

func (d *posixDir) Stage(ctx context.Context, name string) (Stage, error) {
	f, err := d.Reopen(ctx, name)
	if gone(err) {
		var made vfs.File
		if made, err = d.fs.Create(d.Path(name)); err == nil {
			return staged(made)
		}
	}
	return f, err
}

func (d *posixDir) Reopen(_ context.Context, name string) (Stage, error) {
	f, err := d.fs.OpenRW(d.Path(name))
	if err != nil {
		return nil, err
	}
	return staged(f)
}

// staged locks what is to be written to.
func staged(f vfs.File) (Stage, error) {
	if err := f.TryLock(vfs.Exclusive); err != nil {
		f.Close()
		return nil, err
	}
	return f, nil
}

func (d *posixDir) Open(_ context.Context, name string, lock Locking) (Object, error) {
	f, err := d.fs.Open(d.Path(name))
	if errors.Is(err, vfs.ErrNotRegular) || errors.Is(err, vfs.ErrLink) || errors.Is(err, syscall.EISDIR) {
		return nil, notObject(d.Path(name), err)
	}
	if err != nil {
		return nil, err
	}
	switch lock {
	case Shared:
		err = f.TryLock(vfs.Shared)
	case Exclusive:
		err = f.TryLock(vfs.Exclusive)
	}
	if err != nil {
		f.Close()
		return nil, err
	}
	return f, nil
}

func (d *posixDir) Holders(_ context.Context, name string) []string {
	fi, err := d.fs.Lstat(d.Path(name))
	if err != nil {
		return nil
	}
	return vfs.Holders(fi)
}

func (d *posixDir) Commit(_ context.Context, from, to string) error {
	old, final := d.Path(from), d.Path(to)
	err := rescue.Call(func() error { return d.fs.Rename(old, final) })
	if bug := (*rescue.Error)(nil); errors.As(err, &bug) {
		return &uncertainError{err} // nobody knows how far it got
	}
	if err != nil && !d.unmoved(old, final, err) {
		return &uncertainError{err}
	}
	if err != nil {
		return err
	}
	dir := filepath.Dir(final)
	err = rescue.Call(func() error { return d.fs.SyncDir(dir) })
	if err == nil {
		return nil
	}
	// The name may or may not be durable; take it back. If that does not become
	// durable either, or can't be done, the name is or can come up.
	if d.fs.Rename(final, old) != nil || d.fs.SyncDir(dir) != nil {
		err = &uncertainError{err}
	}
	return err
}

// unmoved tells whether it is known that a Rename that has failed with err has not given the
// file its new name. On a network's file system it may have: what is not answered is an error.
func (d *posixDir) unmoved(old, final string, err error) bool {
	now, missing := d.fs.Lstat(final)
	if missing != nil || !errors.Is(err, fs.ErrExist) {
		return gone(missing)
	}
	had, missing := d.fs.Lstat(old)
	return missing == nil && !os.SameFile(had, now)
}

func (d *posixDir) Replace(_ context.Context, from, to string) error {
	if err := d.fs.Replace(d.Path(from), d.Path(to)); err != nil {
		return err
	}
	return d.fs.SyncDir(filepath.Dir(d.Path(to)))
}

func (d *posixDir) Keep(_ context.Context, name, second string) error {
	err := d.fs.Link(d.Path(name), d.Path(second))
	if err == nil || errors.Is(err, fs.ErrExist) {
		err = errors.Join(err, d.fs.SyncDir(filepath.Dir(d.Path(second))))
	}
	return err
}

func (d *posixDir) Remove(_ context.Context, name string) error { return d.fs.Remove(d.Path(name)) }

// Empty shortens a file that has this one name only. One with more, as in a snapshot
// that cp -al or rsync --link-dest made of the store, is the snapshot's too: it loses
// the name here, to an empty file.
func (d *posixDir) Empty(ctx context.Context, name, spare string) error {
	f, err := d.fs.OpenRW(d.Path(name))
	if err != nil {
		return err
	}
	links, err := f.Links()
	if err == nil && links == 1 {
		err = f.Truncate(0)
	}
	if err = errors.Join(err, f.Close()); err != nil || links == 1 {
		return err
	}
	return d.Write(ctx, name, spare, nil)
}

// punchUnit is what ranges are cut to: a file system frees whole blocks, and as a rule
// they have 4 KiB.
const punchUnit = 4 << 10

func (r byteRange) whole() byteRange {
	return byteRange{(r.off + punchUnit - 1) / punchUnit * punchUnit, r.end / punchUnit * punchUnit}
}

func (d *posixDir) Punch(_ context.Context, name string, ranges []byteRange) (freed int64, err error) {
	f, err := d.fs.OpenRW(d.Path(name))
	if err != nil {
		return 0, err
	}
	defer func() { err = errors.Join(err, f.Close()) }()
	links, err := f.Links()
	if err != nil || links != 1 {
		return 0, err
	}
	before, err := f.Allocated()
	if err != nil {
		return 0, err
	}
	for _, r := range ranges {
		if r = r.whole(); r.off >= r.end {
			continue
		}
		at, err := f.Data(r.off)
		if err == io.EOF || err == nil && at >= r.end {
			continue // as it was left the last time
		}
		if err == nil {
			err = f.Punch(r.off, r.end-r.off)
		}
		if errors.Is(err, errors.ErrUnsupported) || errors.Is(err, syscall.ENOSPC) {
			break
		}
		if err != nil {
			return 0, err
		}
	}
	after, err := f.Allocated()
	return max(0, before-after), err
}

func (d *posixDir) Lock(ctx context.Context, name string) (io.Closer, error) {
	return d.fs.Lock(ctx, d.Path(name), vfs.Exclusive)
}

// uncertainError is the failure of a Commit after which the object may have its
// new name all the same, at once or after a power cut.
type uncertainError struct{ error }

func (e *uncertainError) Unwrap() error { return e.error }

// IsUncertain tells whether err is that of a commit after which the checkpoint may
// be there all the same, whole.
func IsUncertain(err error) bool {
	var u *uncertainError
	return errors.As(err, &u)
}

// spare is a name for Dir.Write.
func spare() string { return tmpFolder + "/" + uuid.NewString() + newSuffix }

// gone tells whether err says only that something is not there.
func gone(err error) bool { return errors.Is(err, fs.ErrNotExist) }
