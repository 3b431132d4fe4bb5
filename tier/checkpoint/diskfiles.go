package checkpoint

import (
	"context"
	"errors"
	"fmt"
	"io"
	"time"

	"github.com/google/uuid"

	"github.com/flic-migrate/flic-migrate/tier/digest"
	"github.com/flic-migrate/flic-migrate/tier/disk"
	"github.com/flic-migrate/flic-migrate/tier/image"
	"github.com/flic-migrate/flic-migrate/tier/integrity"
	"github.com/flic-migrate/flic-migrate/tier/moved"
	"github.com/flic-migrate/flic-migrate/tier/progress"
	"github.com/flic-migrate/flic-migrate/tier/source"
)

// DiskFile is the file of a disk, opened for reading.
type DiskFile interface {
	io.ReaderAt // as the guest sees the disk
	io.Closer
	// Identity is what the file was when it was opened, Now what it is.
	Identity() disk.Identity
	Now() (disk.Identity, error)
	// WillNeed says that a stretch will be read soon, ReadIn reads it into the page cache,
	// unless it is there. Neither promises anything.
	WillNeed(off, n int64)
	ReadIn(off, n int64)
}

// DiskCheck is when the pages that a checkpoint has on disks are compared with their
// digests. Each is when it is read, whatever else is asked for.
type DiskCheck uint8

const (
	// CheckChanged compares all that are on a disk that is not what it was when the
	// checkpoint was saved, before anything is restored.
	CheckChanged DiskCheck = iota
	// CheckAll compares all.
	CheckAll
	// CheckRead compares those that are read: for who reads all of them anyway.
	CheckRead
)

// DiskOptions are how Open deals with the disks that a checkpoint has pages on.
type DiskOptions struct {
	// Moved are the paths of disks that are no longer where the checkpoint says, by the
	// paths that it says.
	Moved map[string]string
	Check DiskCheck
	// Missing lets disks be missing: then their pages can't be read.
	Missing  bool
	Progress func(progress.State) // of a comparison of all; may be nil
	// Kept finds the file of a disk that the store keeps; nil: there is no store.
	Kept func(id uuid.UUID) (path string, err error)
	// Open opens a disk's file; nil: disk.OpenLayer.
	Open func(path string, f disk.Format) (DiskFile, error)
}

func (o *DiskOptions) open(path string, f disk.Format) (DiskFile, error) {
	if o.Open != nil {
		return o.Open(path, f)
	}
	i, err := disk.OpenLayer(path, f)
	if err != nil {
		return nil, err
	}
	return i, nil
}

var errNoKept = errors.New("it is kept in the store that the checkpoint was made in")

// kept finds the file of a disk that a store keeps, and which is a copy of the image at
// path. Of one that can't be found it returns the image's name.
func (o *DiskOptions) kept(id uuid.UUID, path string) (string, error) {
	if o.Kept == nil {
		return path, errNoKept
	}
	file, err := o.Kept(id)
	if err != nil {
		return path, fmt.Errorf("the copy of it that was kept: %w", err)
	}
	return file, nil
}

// openDisks are the disks that a checkpoint has pages on, opened.
type openDisks struct {
	*disks
	files  []diskFile // in the order of the list
	hasher *digest.Hasher
	sums   *digest.Table
	// here has the pages, that of slot 0 as page base, if no disk is needed; else nil. Some
	// can be in pieces of other images.
	here *moved.Set
	base uint64
}

type diskFile struct {
	DiskFile        // nil: missing
	path     string // where it is now
	changed  string // in what it is not what it was, to follow its path; "": in nothing
	err      error  // why it is missing
}

// openDisks opens the disks, and compares what has to be compared before pages are read.
func (c *Checkpoint) openDisks(ctx context.Context, d *disks, cache *digest.Cache, o DiskOptions) (err error) {
	if d == nil {
		return nil
	}
	c.disks = &openDisks{disks: d, hasher: c.check.hasher}
	c.check.disks = c.disks
	if c.disks.sums, err = openDigests(c.Image, c.Meta.Digests.Root, cache); err != nil {
		return err
	}
	if n := c.disks.sums.Disk; n != d.slots {
		return c.Image.Corrupt(image.Disks, 0, fmt.Errorf("%d disk slots, and %d have digests", d.slots, n))
	}
	if c.Meta.DiskSlots > 0 {
		return c.openHere(ctx, o)
	}
	for i := range d.list {
		was := &d.list[i].Identity
		f := diskFile{path: was.Path}
		if kept := d.list[i].Kept; kept != uuid.Nil {
			f.path, f.err = o.kept(kept, f.path)
		} else if to := o.Moved[f.path]; to != "" {
			f.path = to
		}
		if f.err == nil {
			f.DiskFile, f.err = o.open(f.path, was.Format)
		}
		if f.err != nil {
			f.DiskFile = nil // whatever it is
			if !o.Missing {
				return fmt.Errorf("checkpoint %s: it has pages on disk image %s: %w", c.name, f.path, f.err)
			}
		} else {
			f.changed = was.Differs(f.Identity())
		}
		c.disks.files = append(c.disks.files, f)
	}
	if o.Check == CheckRead {
		return nil
	}
	return c.disks.checkAll(ctx, c.name, o)
}

// openHere finds the pages that were copied from disks, which are not opened.
func (c *Checkpoint) openHere(ctx context.Context, o DiskOptions) error {
	d := c.disks
	d.here, d.base = c.moved, uint64(c.Meta.FirstDiskSlot())
	all := source.Ranges{{First: uint32(d.base), Count: uint32(d.slots)}}
	if lacks := all.Minus(c.moved.Slots()); len(lacks) > 0 {
		return c.Image.Corrupt(image.Disks, 0, fmt.Errorf("%d of the pages that were copied from disks are in no .moved piece, and no image lends them", lacks.Count()))
	}
	for i := range d.list {
		d.files = append(d.files, diskFile{path: d.list[i].Path})
	}
	if o.Check != CheckAll {
		return nil
	}
	return d.checkAll(ctx, c.name, o)
}

// checkAll compares the pages on disks with their digests, unless only those on disks
// that have changed are asked for. It goes over each disk once, from its beginning.
func (d *openDisks) checkAll(ctx context.Context, name string, o DiskOptions) error {
	must := func(disk int) bool { return o.Check == CheckAll || d.files[disk].changed != "" }
	var sr image.SegmentReader
	var tick time.Time
	for first := uint64(0); first < d.slots; first += source.DiskSegment {
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		low, err := d.slot(first)
		if err != nil {
			return err
		}
		high, err := d.slot(min(first+source.DiskSegment, d.slots) - 1)
		if err != nil {
			return err
		}
		asked := false
		for disk := low.Disk(); disk <= high.Disk() && disk < len(d.files); disk++ {
			asked = asked || must(disk)
		}
		if !asked {
			continue
		}
		if err := d.checkSegment(&sr, uint32(first/source.DiskSegment)); err != nil {
			var wrong *wrongBlock
			if errors.As(err, &wrong) && d.files[wrong.disk].changed != "" {
				err = fmt.Errorf("disk image %s %s: %w", d.files[wrong.disk].path, d.files[wrong.disk].changed, err)
			}
			return fmt.Errorf("checkpoint %s: %w", name, err)
		}
		if now := time.Now(); o.Progress != nil && now.Sub(tick) >= progress.Every {
			tick = now
			o.Progress(progress.State{Phase: "disks", Pages: int64(first), PagesAll: int64(d.slots)})
		}
	}
	return nil
}

func (d *openDisks) checkSegment(sr *image.SegmentReader, number uint32) error {
	if err := d.fetch(&sr.Stored, number); err != nil {
		return err
	}
	s, err := sr.Decode(&sr.Stored)
	if err != nil {
		return err
	}
	defer sr.Recycle(s)
	return d.check(number, s)
}

// wrongBlock is damage of a page that is on a disk.
type wrongBlock struct {
	*integrity.CorruptError
	disk int
}

func (w *wrongBlock) Unwrap() error { return w.CorruptError }

// wrong makes an error of what is wrong with the page of a slot. If the disk's file was what
// it had been when it was opened, it says what has happened to it since.
func (d *openDisks) wrong(s DiskSlot, err error) error {
	if f := &d.files[s.Disk()]; f.changed == "" {
		if now, nerr := f.Now(); nerr == nil {
			if what := d.list[s.Disk()].Differs(now); what != "" {
				err = fmt.Errorf("%w: the image %s", err, what)
			}
		}
	}
	return &wrongBlock{&integrity.CorruptError{File: d.files[s.Disk()].path, Offset: s.offset(),
		What: "block of the disk", Err: err}, s.Disk()}
}

var errDiskEnds = errors.New("the disk ends before it")

// fetch reads the pages of a segment of disk slots: those that follow each other on a
// disk in one go.
func (d *openDisks) fetch(st *image.Stored, number uint32) error {
	if d.here != nil {
		return d.fetchHere(st, number)
	}
	first := uint64(number) * source.DiskSegment
	var at [source.DiskSegment]DiskSlot
	n := 0
	for ; n < len(at) && first+uint64(n) < d.slots; n++ {
		var err error
		if at[n], err = d.slot(first + uint64(n)); err != nil {
			return err
		}
	}
	// What lies apart is read at one time, and not one after the other.
	for i := 1; i < n; i++ {
		if at[i].Disk() != at[0].Disk() || at[i].offset() > at[i-1].offset()+int64(d.page)+aheadGap {
			_ = d.stretches(first, first+uint64(n), func(disk int, off, n int64) {
				if f := d.files[disk].DiskFile; f != nil {
					f.WillNeed(off, n)
				}
			})
			break
		}
	}
	room := st.Pages(d.files[at[0].Disk()].path, number, d.page, n)
	for i := 0; i < n; {
		k := 1
		for i+k < n && at[i+k].Disk() == at[i].Disk() && at[i+k].offset() == at[i].offset()+int64(k*d.page) {
			k++
		}
		f := &d.files[at[i].Disk()]
		if f.DiskFile == nil {
			return fmt.Errorf("disk image %s: %w", f.path, f.err)
		}
		part := room[i*d.page : (i+k)*d.page]
		if got, err := f.ReadAt(part, at[i].offset()); got < len(part) {
			if err == io.EOF {
				err = d.wrong(at[i+got/d.page], errDiskEnds)
			}
			return err
		}
		i += k
	}
	return nil
}

// fetchHere is fetch of pages that were copied from disks.
func (d *openDisks) fetchHere(st *image.Stored, number uint32) error {
	first := uint64(number) * source.DiskSegment
	n := min(source.DiskSegment, d.slots-first)
	name, _ := d.here.Where(d.base + first)
	room := st.Pages(name, number, d.page, int(n))
	return d.here.Guard(func() error {
		for i := range n {
			copy(room[i*uint64(d.page):], d.here.Page(d.base+first+i))
		}
		return nil
	})
}

// wrongSlot is the error of what is wrong with the page of a slot.
func (d *openDisks) wrongSlot(slot uint64, err error) error {
	if d.here != nil {
		file, off := d.here.Where(d.base + slot)
		return &integrity.CorruptError{File: file, Offset: off, What: "page that was copied from a disk", Err: err}
	}
	at, serr := d.slot(slot)
	if serr != nil {
		return serr
	}
	return d.wrong(at, err)
}

// check compares the pages of a segment with their digests.
func (d *openDisks) check(number uint32, s *image.Segment) error {
	first := uint64(number) * source.DiskSegment
	for i := range s.Len() {
		page, err := s.Page(i)
		if err != nil {
			return err
		}
		want, err := d.sums.DiskSlot(first + uint64(i))
		if err != nil {
			return err
		}
		if d.hasher.Sum(page) != want {
			return d.wrongSlot(first+uint64(i), digest.ErrMismatch)
		}
	}
	return nil
}

func (d *openDisks) close() {
	for i := range d.files {
		if f := d.files[i].DiskFile; f != nil {
			f.Close()
		}
	}
}

// ReadDisksIn reads what is in segments of disk slots, whose numbers rise, into the page
// cache, in the order in which it lies on disks. It promises nothing, and ends with ctx.
func (c *Checkpoint) ReadDisksIn(ctx context.Context, segments []uint32) {
	d := c.disks
	for i := 0; d != nil && i < len(segments); {
		k := i + 1
		for k < len(segments) && segments[k] == segments[k-1]+1 {
			k++
		}
		// What can't be known says so to who reads it.
		_ = d.stretches(uint64(segments[i])*source.DiskSegment, (uint64(segments[k-1])+1)*source.DiskSegment, func(disk int, off, n int64) {
			if f := d.files[disk].DiskFile; f != nil && ctx.Err() == nil {
				f.ReadIn(off, n)
			}
		})
		i = k
	}
}

// DiskState is a disk that a checkpoint has pages on, and what has become of it.
type DiskState struct {
	Disk
	File DiskFile // as long as the checkpoint is open; nil: missing
	// Changed says in what it is not what it was, to follow its path, Missing why it can't
	// be read; both are empty if it is what it was.
	Changed, Missing string
	// Here: its pages were copied, and the file is not opened.
	Here bool
}

// Disks are the disks that the checkpoint has pages on, in the order in which its slots
// count them.
func (c *Checkpoint) Disks() []DiskState {
	if c.disks == nil {
		return nil
	}
	list := make([]DiskState, len(c.disks.list))
	for i := range list {
		list[i] = DiskState{Disk: c.disks.list[i], File: c.disks.files[i].DiskFile, Changed: c.disks.files[i].changed, Here: c.disks.here != nil}
		if err := c.disks.files[i].err; err != nil {
			list[i].Missing = err.Error()
		}
	}
	return list
}

// DiskSlot is where the page of a disk slot is, which must exist.
func (c *Checkpoint) DiskSlot(slot uint64) (DiskSlot, error) { return c.disks.slot(slot) }
