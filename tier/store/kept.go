package store

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/google/uuid"

	"github.com/flic-migrate/flic-migrate/tier/checkpoint"
	"github.com/flic-migrate/flic-migrate/tier/disk"
	"github.com/flic-migrate/flic-migrate/tier/integrity"
	"github.com/flic-migrate/flic-migrate/tier/sums"
	"github.com/flic-migrate/flic-migrate/tier/vfs"
)

// A copy that is kept has digests of its blocks in a file beside it, by which it is known that
// it is what it was. To read the copy takes time, which the guest does not wait for: the
// checkpoint is durable when that is done, and until then, or if nobody does it, the copy
// is not checked.
//
//	commit ─► DigestKept: read all of it, as it was before and after ─► under the store lock:
//	          the copy is there still ─► frozen/UUID.digests, durable
//
// Digests go with the copy; those without one are gc's.

const digestsSuffix = ".digests"

func digestsObject(id uuid.UUID) string { return frozenObject(id) + digestsSuffix }

// KeptDisk is a disk image that a store keeps with a checkpoint.
type KeptDisk struct {
	Disk   string      `json:"disk"`  // the path of its device in QEMU's object tree
	Image  string      `json:"image"` // the path of what it is a copy of
	Format disk.Format `json:"format"`
	UUID   uuid.UUID   `json:"uuid"`
	File   string      `json:"file"`  // where it is
	Bytes  int64       `json:"bytes"` // that its disk blocks hold, those too that it shares
	// Wrong says what has become of it, or why it can't be looked at; empty: its size and
	// time are as they were.
	Wrong string `json:"wrong,omitempty"`
	// NotChecked: it has no digests yet, and nothing tells whether its bytes are what they were.
	NotChecked bool `json:"not_checked,omitempty"`

	was disk.File
}

// KeptDisks looks at the disk images that the store keeps with a checkpoint.
func (s *Store) KeptDisks(ctx context.Context, m *checkpoint.Meta) (list []KeptDisk) {
	for _, id := range m.Kept {
		k := KeptDisk{UUID: id, File: s.dir.Path(frozenObject(id))}
		if i := slices.IndexFunc(m.VMDisks, func(d checkpoint.VMDisk) bool { return d.Kept == id }); i >= 0 {
			k.Disk = m.VMDisks[i].Name
			if l := m.VMDisks[i].Layers; len(l) > 0 {
				k.Image, k.Format, k.was = l[0].Path, l[0].Format, l[0].File
			}
		}
		if err := s.lookAt(ctx, &k); err != nil {
			k.Wrong = err.Error()
		}
		if f, err := s.dir.Open(ctx, digestsObject(id), Unlocked); err == nil {
			f.Close()
		} else {
			k.NotChecked = gone(err) && k.Wrong == ""
		}
		list = append(list, k)
	}
	return list
}

// KeptDisks is Store.KeptDisks.
func (c *Checkpoint) KeptDisks(ctx context.Context) []KeptDisk { return c.store.KeptDisks(ctx, c.Meta) }

// lookAt finds out what a copy takes, and whether it is as it was.
func (s *Store) lookAt(ctx context.Context, k *KeptDisk) error {
	f, err := s.dir.Open(ctx, frozenObject(k.UUID), Unlocked)
	if err != nil {
		return err
	}
	defer f.Close()
	if k.Bytes, err = f.Allocated(); err != nil {
		return err
	}
	size, err := f.Size()
	if err != nil || k.Image == "" {
		return err
	}
	fi, err := s.fs.Stat(k.File)
	switch {
	case err != nil:
		return err
	case size < k.was.Size:
		return &integrity.CorruptError{File: k.File, What: "disk that is kept", Err: fmt.Errorf("it was cut: it has %d bytes, and had %d", size, k.was.Size)}
	case size != k.was.Size || fi.ModTime().UnixNano() != k.was.Mtime:
		return &integrity.CorruptError{File: k.File, What: "disk that is kept", Err: fmt.Errorf("it was written to, last at %s", fi.ModTime().UTC().Format(time.RFC3339Nano))}
	}
	return nil
}

// wrap says of which disk an error is.
func (k *KeptDisk) wrap(err error) error {
	return fmt.Errorf("disk %s, which is kept with the checkpoint: %w", k.Image, err)
}

// verifyKept finds what is wrong with the disks that are kept with a checkpoint, as far as
// that is seen without reading them.
func (c *Checkpoint) verifyKept(ctx context.Context, found func(error)) {
	for _, k := range c.KeptDisks(ctx) {
		if k.Wrong != "" {
			found(k.wrap(errors.New(k.Wrong)))
		}
	}
}

// VerifyKept reads the disks that are kept with a checkpoint, and compares them with their
// digests. It leaves out those of which Verify finds that something is wrong. It returns
// those that have no digests; the error is for a check that could not be done.
func (c *Checkpoint) VerifyKept(ctx context.Context, found func(error)) (notChecked []KeptDisk, err error) {
	for _, k := range c.KeptDisks(ctx) {
		switch {
		case k.Wrong != "":
			continue
		case k.NotChecked:
			notChecked = append(notChecked, k)
			continue
		}
		err := c.store.checkKept(ctx, k, func(err error) { found(k.wrap(err)) })
		if integrity.IsCorrupt(err) {
			found(k.wrap(err))
		} else if err != nil {
			return notChecked, err
		}
	}
	return notChecked, nil
}

// checkKept compares a copy with its digests.
func (s *Store) checkKept(ctx context.Context, k KeptDisk, found func(error)) error {
	was, close, err := s.openDigests(ctx, k.UUID)
	if err != nil {
		return err
	}
	defer close()
	f, err := s.openFrozen(k.UUID)
	if err != nil {
		return err
	}
	defer f.Close()
	_, err = was.Check(ctx, f, k.File, func(err error) error { found(err); return nil }, nil)
	return err
}

// openDigests opens the digests of a copy: fs.ErrNotExist if it has none.
func (s *Store) openDigests(ctx context.Context, id uuid.UUID) (was *sums.Digests, close func() error, err error) {
	name := digestsObject(id)
	f, err := s.dir.Open(ctx, name, Unlocked)
	if err != nil {
		return nil, nil, err
	}
	size, err := f.Size()
	if err == nil {
		was, err = sums.Open(f, size, s.dir.Path(name), id)
	}
	if err != nil {
		f.Close()
		return nil, nil, err
	}
	return was, f.Close, nil
}

// openFrozen opens a copy as a file.
func (s *Store) openFrozen(id uuid.UUID) (vfs.File, error) {
	d, err := newPosixDir(s.fs, s.root)
	if err != nil {
		return nil, err
	}
	return d.fs.Open(d.Path(frozenObject(id)))
}

// Digested says what DigestKept has done.
type Digested struct {
	Disks int   `json:"digested_disks"` // that have digests now
	Read  int64 `json:"digested_bytes"` // that were read for them
}

// DigestKept makes the digests of the disks that are kept with a checkpoint, of those that
// have none. A disk that is not as it was gets none: that is an error, which is returned when
// the others have theirs.
func (s *Store) DigestKept(ctx context.Context, r Ref) (done Digested, err error) {
	d, err := s.Describe(ctx, r)
	if err != nil {
		return done, err
	}
	for _, k := range s.KeptDisks(ctx, d.Meta) {
		switch {
		case k.Wrong != "":
			err = errors.Join(err, k.wrap(errors.New(k.Wrong)))
		case k.NotChecked:
			if derr := s.digestKept(ctx, k, &done); derr != nil && !gone(derr) { // removed meanwhile
				err = errors.Join(err, k.wrap(derr))
			}
		}
	}
	return done, err
}

// DigestAllKept is DigestKept of all checkpoints. left are the reasons why some have none; err
// is for what ends it.
func (s *Store) DigestAllKept(ctx context.Context) (done Digested, left []error, err error) {
	list, err := s.Identities(ctx, "")
	for _, l := range list {
		if l.Identity == nil || len(l.Identity.Kept) == 0 {
			continue
		}
		one, err := s.DigestKept(ctx, l.Ref)
		done.Disks += one.Disks
		done.Read += one.Read
		switch {
		case ctx.Err() != nil:
			return done, left, context.Cause(ctx)
		case err != nil && !errors.Is(err, ErrNotFound):
			left = append(left, fmt.Errorf("checkpoint %v: %w", l.Ref, err))
		}
	}
	return done, left, err
}

func (s *Store) digestKept(ctx context.Context, k KeptDisk, done *Digested) error {
	f, err := s.openFrozen(k.UUID)
	if err != nil {
		return err
	}
	defer f.Close()
	file, read, err := sums.Make(ctx, f, k.UUID)
	if err != nil {
		return err
	}
	// Nobody has written to it while it was read.
	if err := s.lookAt(ctx, &k); err != nil {
		return err
	}
	unlock, err := s.lock(ctx)
	if err != nil {
		return err
	}
	defer unlock()
	there, err := s.dir.Open(ctx, frozenObject(k.UUID), Unlocked)
	if err != nil {
		return err
	}
	there.Close()
	// Another may have been faster, and what was read first is what counts.
	if was, err := s.dir.Open(ctx, digestsObject(k.UUID), Unlocked); err == nil {
		return was.Close()
	}
	if err := s.dir.Write(ctx, digestsObject(k.UUID), spare(), file); err != nil {
		return err
	}
	done.Disks++
	done.Read += read
	return nil
}

// strayDigests removes digests whose copy is gone. list is what is in frozen.
func (g *gc) strayDigests(ctx context.Context, list []Entry) error {
	there := make(map[string]bool)
	for _, e := range list {
		there[e.Name] = true
	}
	var stray []uuid.UUID
	for _, e := range list {
		name, is := strings.CutSuffix(e.Name, digestsSuffix)
		if id, err := uuid.Parse(name); is && err == nil && id.String() == name && !there[name] && !e.Folder && !e.Odd {
			stray = append(stray, id)
		}
	}
	if len(stray) == 0 {
		return nil
	}
	unlock, err := g.lock(ctx)
	if err != nil {
		return err
	}
	defer unlock()
	for _, id := range stray {
		if f, err := g.dir.Open(ctx, frozenObject(id), Unlocked); !gone(err) {
			if err == nil {
				f.Close()
			}
			continue
		}
		if err := g.dir.Remove(ctx, digestsObject(id)); err != nil && !gone(err) {
			return err
		}
	}
	return g.dir.Sync(ctx, frozenFolder)
}

// ThawOptions say how to make a file of a kept disk.
type ThawOptions struct {
	// SkipCheck leaves out the comparison with the digests, for which all of it is read.
	SkipCheck bool
}

// Thaw makes a new file of a disk image that is kept, which is the caller's: of the same
// content, and changed last when the image was, so that resume knows it again. Disk blocks
// are shared where that can be. It is compared with the digests that there are, and there
// is no file if it is another. A file that is there is not touched (fs.ErrExist).
func (s *Store) Thaw(ctx context.Context, k KeptDisk, to string, o ThawOptions) (err error) {
	if k.Wrong != "" {
		return k.wrap(errors.New(k.Wrong))
	}
	held, err := s.HoldFrozen(ctx, k.UUID)
	if err != nil {
		return err
	}
	defer held.Close()
	var was *sums.Digests
	if !k.NotChecked && !o.SkipCheck {
		var close func() error
		if was, close, err = s.openDigests(ctx, k.UUID); err != nil {
			return k.wrap(err)
		}
		defer close()
	}
	return vfs.WriteFile(s.fs, to, vfs.Writing{New: true}, func(f vfs.File) error {
		err := f.Clone(k.File)
		switch {
		case errors.Is(err, errors.ErrUnsupported):
			err = s.copyFile(ctx, f, k.File, was)
		case err == nil && was != nil:
			// The same disk blocks, which whoever uses the file then finds in memory.
			_, err = was.Check(ctx, f, k.File, refuse, nil)
		}
		if integrity.IsCorrupt(err) {
			return k.wrap(err)
		}
		if err == nil {
			err = f.SetModified(time.Unix(0, k.was.Mtime))
		}
		return err
	})
}
