package store

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"syscall"

	"github.com/google/uuid"

	"github.com/flic-migrate/flic-migrate/tier/disk"
	"github.com/flic-migrate/flic-migrate/tier/integrity"
	"github.com/flic-migrate/flic-migrate/tier/sums"
	"github.com/flic-migrate/flic-migrate/tier/vfs"
)

// A store can keep copies of disk images with a checkpoint: the state of the disks that
// belongs to its memory, and a place where its pages are.
//
//	Freeze                save                        commit        Close
//	frozen/UUID, locked ► pages on it, vm_disks.kept ► IDENTITY.kept ► unlocked
//
// A copy has the one checkpoint whose IDENTITY lists it, and no other refers to pages on it.
// So it stays for as long as a listed checkpoint's IDENTITY lists it, and no longer: rm and
// gc look at nothing else. A copy that none lists, and that nobody has locked, is of a save
// that has failed.
//
// These are files of the store's directory, whatever Dir keeps the checkpoints in, as
// QEMU and its tools read them.

// frozenFolder is where the copies are, each under its UUID.
const frozenFolder = "frozen"

func frozenObject(id uuid.UUID) string { return frozenFolder + "/" + id.String() }

// ErrNoReflink: disk blocks can't be shared between an image and its copy.
var ErrNoReflink = errors.New("the store's file system can't share disk blocks with it (reflink: XFS, Btrfs and others can, within one file system)")

// FreezeOptions say how to keep a disk image.
type FreezeOptions struct {
	// Copy has the content copied where disk blocks can't be shared.
	Copy bool
}

// Frozen is a disk image that the store keeps. Until Close it stays, whether a checkpoint
// lists it or not.
type Frozen struct {
	UUID   uuid.UUID
	Bytes  int64 // that its disk blocks hold, those too that it shares
	Shared bool  // it shares disk blocks with the image

	s    *Store
	file vfs.File // locked, shared; nil: closed
}

// Freeze keeps a copy of the file path, which nobody may write to meanwhile: the caller sees
// to that, and looks whether it is so. The copy is durable when Freeze has returned, and has
// the time of its last change from the file. After an error nothing is left.
func (s *Store) Freeze(ctx context.Context, path string, o FreezeOptions) (_ *Frozen, err error) {
	if err := context.Cause(ctx); err != nil {
		return nil, err
	}
	fi, err := s.fs.Stat(path)
	if err != nil {
		return nil, err
	}
	if !fi.Mode().IsRegular() {
		return nil, &fs.PathError{Op: "copy", Path: path, Err: vfs.ErrNotRegular}
	}
	if err := s.dir.Mkdir(ctx, frozenFolder); err != nil {
		return nil, err
	}
	f := &Frozen{UUID: uuid.New(), s: s}
	if f.file, err = s.createFrozen(ctx, f.UUID); err != nil {
		return nil, err
	}
	done := false
	defer func() {
		if !done { // also while panicking
			err = errors.Join(err, f.drop(context.WithoutCancel(ctx)))
		}
	}()
	err = f.file.Clone(path)
	switch f.Shared = err == nil; {
	case errors.Is(err, errors.ErrUnsupported) && o.Copy:
		err = s.copyFile(ctx, f.file, path, nil)
	case errors.Is(err, errors.ErrUnsupported):
		err = fmt.Errorf("disk image %s is not kept: %w", path, ErrNoReflink)
	}
	if err != nil {
		return nil, err
	}
	if err := f.file.SetModified(fi.ModTime()); err != nil {
		return nil, err
	}
	if err := f.file.Sync(); err != nil {
		return nil, err
	}
	if err := s.dir.Sync(ctx, frozenFolder); err != nil {
		return nil, err
	}
	f.Bytes, err = f.file.Allocated()
	done = err == nil
	return f, err
}

// createFrozen makes the file of a copy, locked.
func (s *Store) createFrozen(ctx context.Context, id uuid.UUID) (vfs.File, error) {
	d, err := newPosixDir(s.fs, s.root)
	if err != nil {
		return nil, err
	}
	unlock, err := s.lock(ctx)
	if err != nil {
		return nil, err
	}
	defer unlock()
	f, err := d.fs.Create(d.Path(frozenObject(id)))
	if err != nil {
		return nil, err
	}
	// Shared, so that a process that makes the checkpoint can hold it too (HoldFrozen).
	if err := f.TryLock(vfs.Shared); err != nil {
		f.Close()
		d.fs.Remove(f.Name())
		return nil, err
	}
	return f, nil
}

// copySync is how much of an image that is copied is left at most for one sync, which nothing
// interrupts, in bytes: a second of a slow disk.
const copySync = 128 << 20

// copyFile copies the content of the file path, and leaves out what is zero. was are the
// digests that it has to have; nil: there are none.
func (s *Store) copyFile(ctx context.Context, to vfs.File, path string, was *sums.Digests) error {
	from, err := s.fs.Open(path)
	if err != nil {
		return err
	}
	defer from.Close()
	size, err := from.Size()
	if err == nil {
		err = to.Truncate(size)
	}
	if err != nil {
		return err
	}
	dirty := 0
	write := func(off int64, b []byte) error {
		if _, err := to.WriteAt(b, off); err != nil {
			return err
		}
		if dirty += len(b); dirty < copySync {
			return nil
		}
		dirty = 0
		return to.Sync()
	}
	if was != nil {
		_, err := was.Check(ctx, from, path, refuse, write)
		return err
	}
	_, err = sums.Each(ctx, from, write)
	if unread := (*sums.ReadError)(nil); errors.As(err, &unread) {
		err = fmt.Errorf("%s: %w", path, err)
	}
	return err
}

// refuse ends a check at the first damage.
func refuse(err error) error { return err }

// TryFreeze finds out, while the guest runs, whether Freeze can keep these files. Where
// disk blocks can be shared that has the kernel write what it has of the files in memory,
// which Freeze then need not wait for.
func (s *Store) TryFreeze(ctx context.Context, paths []string, o FreezeOptions) error {
	var need int64
	for _, path := range paths {
		f, err := s.Freeze(ctx, path, FreezeOptions{})
		if errors.Is(err, ErrNoReflink) && o.Copy {
			n, err := s.allocated(path)
			if err != nil {
				return err
			}
			need += n
			continue
		}
		if err != nil {
			return err
		}
		if err := f.drop(ctx); err != nil {
			return err
		}
	}
	info, err := s.fs.StatFS(s.root)
	if err == nil && need > info.Free {
		err = fmt.Errorf("%s: copies of the disks need %d bytes, and %d are free: %w", s.root, need, info.Free, syscall.ENOSPC)
	}
	return err
}

// allocated is how much a file takes.
func (s *Store) allocated(path string) (int64, error) {
	f, err := s.fs.Open(path)
	if err != nil {
		return 0, err
	}
	defer f.Close()
	return f.Allocated()
}

// Path is where the copy is.
func (f *Frozen) Path() string { return f.s.dir.Path(frozenObject(f.UUID)) }

// Close lets the copy go: it stays if a checkpoint lists it. It can be called more than
// once.
func (f *Frozen) Close() error {
	if f.file == nil {
		return nil
	}
	err := f.file.Close()
	f.file = nil
	return err
}

// drop closes the copy and removes it: nobody has heard of it yet.
func (f *Frozen) drop(ctx context.Context) error {
	return errors.Join(f.Close(), f.s.dir.Remove(ctx, frozenObject(f.UUID)))
}

// Discard closes the copy, and removes it if no checkpoint lists it. After a failure that
// leaves it open whether there is a checkpoint, that finds it out.
func (f *Frozen) Discard(ctx context.Context) error {
	err := f.Close()
	_, rerr := f.s.freeFrozen(ctx, f.s.lookup(), []uuid.UUID{f.UUID})
	return errors.Join(err, rerr)
}

// Unindex removes what was kept to find pages in the copy.
func (f *Frozen) Unindex(ctx context.Context) error {
	c, err := f.s.Disks()
	if err != nil {
		return err
	}
	return dropIndex(ctx, c, f.Path())
}

// HoldFrozen keeps a copy that another process has made from going away until it is closed.
func (s *Store) HoldFrozen(ctx context.Context, id uuid.UUID) (io.Closer, error) {
	return s.dir.Open(ctx, frozenObject(id), Shared)
}

// frozenPath finds the file of a copy.
func (s *Store) frozenPath(ctx context.Context, id uuid.UUID) (string, error) {
	f, err := s.dir.Open(ctx, frozenObject(id), Unlocked)
	if err != nil {
		return "", err
	}
	f.Close()
	return s.dir.Path(frozenObject(id)), nil
}

// frozenBytes is what the disk blocks of a copy hold.
func (s *Store) frozenBytes(ctx context.Context, id uuid.UUID) (int64, error) {
	f, err := s.dir.Open(ctx, frozenObject(id), Unlocked)
	if err != nil {
		return 0, err
	}
	defer f.Close()
	return f.Allocated()
}

// frozenFreed says what was freed of copies.
type frozenFreed struct {
	files int
	bytes int64 // that their disk blocks held, those too that they shared
}

// freeFrozen removes those of some copies that no listed checkpoint lists, and that nobody
// has locked. It frees nothing if a checkpoint can't say what it lists.
func (s *Store) freeFrozen(ctx context.Context, look *lookup, ids []uuid.UUID) (fr frozenFreed, err error) {
	if len(ids) == 0 {
		return fr, nil
	}
	// As much as can be without the lock is read without it.
	if _, err := look.listedFrozen(ctx); err != nil {
		return fr, err
	}
	var removed []uuid.UUID
	if removed, fr, err = s.dropFrozen(ctx, look, ids); len(removed) == 0 {
		return fr, err
	}
	catalog, cerr := s.Disks()
	for _, id := range removed {
		if cerr == nil {
			cerr = dropIndex(ctx, catalog, s.dir.Path(frozenObject(id)))
		}
	}
	return fr, errors.Join(err, cerr)
}

// dropFrozen is freeFrozen under the store lock, but for the indexes.
func (s *Store) dropFrozen(ctx context.Context, look *lookup, ids []uuid.UUID) (removed []uuid.UUID, fr frozenFreed, err error) {
	unlock, err := s.lock(ctx)
	if err != nil {
		return nil, fr, err
	}
	defer unlock()
	// What a killed process has committed as a group is listed, too.
	if err := s.placeGroups(ctx); err != nil {
		return nil, fr, err
	}
	listed, err := look.listedFrozen(ctx)
	if err != nil {
		return nil, fr, err
	}
	for _, id := range ids {
		if listed[id] {
			continue
		}
		f, err := s.dir.Open(ctx, frozenObject(id), Exclusive)
		if errors.Is(err, vfs.ErrLocked) || gone(err) || errors.Is(err, errNotObject) {
			continue
		}
		if err != nil {
			return removed, fr, err
		}
		bytes, err := f.Allocated()
		if err == nil && len(removed) == 0 {
			// Who lists it and is not there must not come back.
			err = s.settle(ctx)
			if serr := s.dir.Sync(ctx, groupsFolder); err == nil && !gone(serr) {
				err = serr
			}
		}
		if err == nil {
			err = s.dir.Remove(ctx, frozenObject(id))
		}
		if err == nil {
			if err = s.dir.Remove(ctx, digestsObject(id)); gone(err) {
				err = nil
			}
		}
		f.Close()
		if err != nil {
			return removed, fr, err
		}
		removed = append(removed, id)
		fr.files++
		fr.bytes += bytes
	}
	if len(removed) > 0 {
		err = s.dir.Sync(ctx, frozenFolder)
	}
	return removed, fr, err
}

// dropIndex removes what a save has kept to find pages in the file path, if it is there
// still.
func dropIndex(ctx context.Context, c *disk.Catalog, path string) error {
	full, err := resolve(path)
	if err != nil {
		return err
	}
	for _, format := range []disk.Format{disk.Raw, disk.Qcow2} {
		if err := c.Remove(ctx, disk.ID(disk.Identity{Path: full, Format: format})); err != nil && !gone(err) {
			return err
		}
	}
	return nil
}

// listedFrozen are the copies that listed checkpoints list.
func (l *lookup) listedFrozen(ctx context.Context) (map[uuid.UUID]bool, error) {
	listed := make(map[uuid.UUID]bool)
	err := l.eachVM(ctx, "", func(vm string, o vmObjects) error {
		for _, n := range o.images {
			if err := context.Cause(ctx); err != nil {
				return err
			}
			id, err := l.whoIs(ctx, Ref{vm, n}.object(imageSuffix))
			switch {
			case gone(err) || errors.Is(err, errNotObject):
				continue
			case err != nil:
				return fmt.Errorf("it can't be told which disks are kept with which checkpoint: %w", err)
			case id == nil:
				continue
			}
			for _, k := range id.Kept {
				listed[k] = true
			}
		}
		return nil
	})
	return listed, err
}

// frozen frees what saves that failed, and removals that were cut off, have left of copies.
func (g *gc) frozen(ctx context.Context) error {
	list, err := g.dir.List(ctx, frozenFolder)
	if gone(err) {
		return nil
	}
	if err != nil {
		return err
	}
	var ids []uuid.UUID
	for _, e := range list {
		if id, err := uuid.Parse(e.Name); err == nil && id.String() == e.Name && !e.Folder && !e.Odd {
			ids = append(ids, id)
		}
	}
	if err := g.strayDigests(ctx, list); err != nil {
		return err
	}
	// Something that may be a checkpoint may list one.
	if g.keep {
		return nil
	}
	fr, err := g.freeFrozen(ctx, g.look, ids)
	g.rep.FrozenDisks += fr.files
	g.rep.FrozenBytes += fr.bytes
	if cannotTell(err) || integrity.IsCorrupt(err) {
		g.rep.warn(err)
		err = nil
	}
	return err
}
