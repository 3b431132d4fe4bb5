package save

import (
	"bytes"
	"cmp"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"slices"
	"sync"

	"github.com/google/uuid"

	"github.com/flic-migrate/flic-migrate/tier/checkpoint"
	"github.com/flic-migrate/flic-migrate/tier/digest"
	"github.com/flic-migrate/flic-migrate/tier/disk"
	"github.com/flic-migrate/flic-migrate/tier/image"
	"github.com/flic-migrate/flic-migrate/tier/integrity"
	"github.com/flic-migrate/flic-migrate/tier/pagemap"
	"github.com/flic-migrate/flic-migrate/tier/rescue"
	"github.com/flic-migrate/flic-migrate/tier/source"
)

// Disk is a disk image, one layer, that the guest's pages are looked for in. Nobody may
// write to it.
type Disk struct {
	checkpoint.Disk
	File  checkpoint.DiskFile
	Index DiskIndex
	// Touched: something about the file was changed since the index was made, as its owner,
	// or its times were set back to hide it. What the index says is compared with the disk.
	Touched bool
}

// DiskIndex finds pages in a disk, by digests with one key for all disks of a store.
type DiskIndex interface {
	Digester() *digest.Hasher
	// LookupNear is the sector at which the disk has the page with a digest: the given
	// one, if it is in several places and that is one of them.
	LookupNear(sum digest.Sum, near int64) (sector int64, ok bool)
}

// disks are the disks that pages of a save may be in: those that it looks in, and those
// that the parent has pages on. While pages are placed an entry of kind Disk has for its
// value where the page is, a checkpoint.DiskSlot; the slots are numbered when all of them
// are known. Looking is safe from several goroutines.
type disks struct {
	hash    *digest.Hasher // the checkpoint's
	index   *digest.Hasher // of the indexes; nil: there are none
	list    []Disk         // as the checkpoint will list them, and perhaps more
	indexed int            // the first so many have an index
	log     *slog.Logger
	warned  sync.Once
}

// newDisks are those that a save is told of. The page size decides whether their indexes
// are of use.
func newDisks(list []Disk, hash *digest.Hasher, pageSize int, log *slog.Logger) *disks {
	d := &disks{hash: hash, log: log}
	if pageSize != disk.BlockSize {
		return d
	}
	d.list = slices.Clone(list[:min(len(list), checkpoint.MaxDisks)])
	if d.indexed = len(d.list); d.indexed > 0 {
		d.index = d.list[0].Index.Digester()
	}
	return d
}

// diskEntry is that of a page that is on a disk.
func diskEntry(at checkpoint.DiskSlot) pagemap.Entry { return pagemap.Make(pagemap.Disk, uint64(at)) }

func onDisk(e pagemap.Entry) bool { return e.Kind() == pagemap.Disk }

// damaged says once that what is on a disk can't be read: what can't be is stored anew,
// or stays where it is.
func (d *disks) damaged(err error) {
	if bug := (*rescue.Error)(nil); errors.As(err, &bug) {
		panic(bug)
	}
	d.warned.Do(func() { d.log.Warn("a disk image can't be read", "error", err) })
}

// carry tells which disks of this save are the disks of the parent's, by its numbers, and
// adds those that it has not: -1 for those that are not what they were, or one too many.
func (d *disks) carry(theirs []checkpoint.DiskState) []int {
	carried := make([]int, len(theirs))
	for i, t := range theirs {
		carried[i] = slices.IndexFunc(d.list, func(o Disk) bool { return o.Path == t.Path && o.Kept == t.Kept })
		switch {
		case t.Changed != "" || t.Missing != "" || t.Here || t.Kept != uuid.Nil:
			// What is kept goes with the checkpoint that it is kept with.
			carried[i] = -1
		case carried[i] >= 0:
			if o := &d.list[carried[i]]; o.Differs(t.Identity) != "" || o.Identity.Touched(t.Identity) {
				carried[i] = -1 // its pages are looked for again
			}
		case len(d.list) < checkpoint.MaxDisks:
			carried[i] = len(d.list)
			d.list = append(d.list, Disk{Disk: t.Disk, File: t.File})
		}
	}
	return carried
}

// lookUp finds a page on the disks, unless something better has been found for it. near is
// where the last one was, and keeps pages together that lie together.
func (d *disks) lookUp(it *item, near *checkpoint.DiskSlot) {
	if d == nil || d.index == nil || it.found == isEqual || it.found == isZero {
		return
	}
	same := d.index.Same(d.hash)
	if same && it.sum == (digest.Sum{}) {
		d.hash.Put(&it.sum, it.data)
	}
	sum := it.sum
	if !same {
		d.index.Put(&sum, it.data)
	}
	for k := range d.indexed {
		// What is found most often is found first.
		n := (near.Disk() + k) % d.indexed
		sector, ok := d.list[n].Index.LookupNear(sum, near.Sector()+disk.BlockSize/disk.SectorSize)
		if !ok || sector < 0 || sector > (d.list[n].Size-disk.BlockSize)/disk.SectorSize {
			continue
		}
		if at := checkpoint.MakeDiskSlot(n, sector); d.list[n].Touched && !d.has(at, it.data) {
			continue
		}
		*near = checkpoint.MakeDiskSlot(n, sector)
		it.found, it.cold, it.entry = isOnDisk, true, diskEntry(*near)
		if it.sum == (digest.Sum{}) {
			d.hash.Put(&it.sum, it.data)
		}
		return
	}
}

// has tells whether the disk itself has a page where its index says so.
func (d *disks) has(at checkpoint.DiskSlot, page []byte) bool {
	b := make([]byte, len(page))
	if err := d.read(b, at); err != nil {
		d.damaged(err)
		return false
	}
	return bytes.Equal(b, page)
}

const (
	// diskCell is how much of a disk is read together, in bytes: less than what a restore
	// reads in vain rather than to make two reads of it.
	diskCell = 32 << 10
	// diskEnough is how many pages on a disk must be near each other to be referred to, of
	// the 24 blocks of three cells: as many bytes as are read in one go in the time that it
	// takes to get there, 28 KiB on a fast disk (scripts/bench-disk -places).
	diskEnough = 8
)

// spot is where a page was found outside of the checkpoint, if it is to be seen whether
// reading it there is worth it: one that the guest waits for is stored anyway.
func (m *matcher) spot(it *item) (s spot, ok bool) {
	if it.found == isShared {
		return it.spotAt, !it.hot
	}
	if it.hot || it.found != isOnDisk && it.found != isEqual || !onDisk(it.entry) {
		return s, false
	}
	at := checkpoint.DiskSlot(it.entry.Value())
	return spot{uint64(at.Disk())<<48 | uint64(at.Sector())/(diskCell/disk.SectorSize), m.enough}, true
}

// read copies the page that is on a disk into dst.
func (d *disks) read(dst []byte, at checkpoint.DiskSlot) error {
	f := &d.list[at.Disk()]
	n, err := f.File.ReadAt(dst, at.Sector()*disk.SectorSize)
	if n == len(dst) {
		return nil
	}
	if err == io.EOF {
		err = errors.New("the disk ends before it")
	}
	return fmt.Errorf("disk image %s: sector %d: %w", f.Path, at.Sector(), err)
}

// check finds out whether the disks that pages are on are what they were when the save
// began. One that is not may have lost the pages.
func (d *disks) check(used []int) error {
	for _, n := range used {
		f := &d.list[n]
		now, err := f.File.Now()
		if err != nil {
			return fmt.Errorf("disk image %s: %w", f.Path, err)
		}
		if what := f.Differs(now); what != "" {
			return fmt.Errorf("disk image %s %s while pages were found on it: %w", f.Path, what, errDiskChanged)
		}
	}
	return nil
}

var errManyDisks = fmt.Errorf("a checkpoint can have pages on %d disk images", checkpoint.MaxDisks)

var errDiskChanged = errors.New("it can't be referred to")

// diskPage is a page that is on a disk, and its digest.
type diskPage struct {
	at  checkpoint.DiskSlot
	sum digest.Sum
}

// diskPages are the pages of a save that are on disks. One goroutine has them.
type diskPages struct {
	list []diskPage // also of pages that have come again since
	// by finds one in the list; nil before one is read.
	by map[checkpoint.DiskSlot]int
	// most is how many the list has before those that are in it twice are left out.
	most int
}

// leastPages is how many are in the list, 24 bytes each, before it is looked at.
const leastPages = 1 << 16

func (p *diskPages) add(at checkpoint.DiskSlot, sum digest.Sum) {
	if len(p.list) >= max(p.most, leastPages) {
		// Of pages that come again and again.
		p.sort()
		p.most, p.by = 2*len(p.list), nil
	}
	if p.by != nil {
		p.by[at] = len(p.list)
	}
	if len(p.list) == cap(p.list) {
		p.list = slices.Grow(p.list, max(len(p.list), 4096)) // not by a quarter, of which there would be many
	}
	p.list = append(p.list, diskPage{at, sum})
}

// sort puts the list in the order of places, each once.
func (p *diskPages) sort() {
	slices.SortFunc(p.list, func(a, b diskPage) int { return cmp.Compare(a.at, b.at) })
	p.list = slices.CompactFunc(p.list, func(a, b diskPage) bool { return a.at == b.at })
}

// sum is the digest of a page that was added.
func (p *diskPages) sum(at checkpoint.DiskSlot) digest.Sum {
	if p.by == nil {
		p.by = make(map[checkpoint.DiskSlot]int)
		for i := range p.list {
			p.by[p.list[i].at] = i
		}
	}
	return p.list[p.by[at]].sum
}

// readDisk copies a page that was placed on a disk into dst, checked.
func (p *placer) readDisk(dst []byte, at checkpoint.DiskSlot) error {
	if err := p.to.disks.read(dst, at); err != nil {
		return err
	}
	if d := p.to.disks; d.hash.Sum(dst) != p.disk.sum(at) {
		return &integrity.CorruptError{File: d.list[at.Disk()].Path, Offset: at.Sector() * disk.SectorSize, What: "block of the disk", Err: digest.ErrMismatch}
	}
	return nil
}

// numbered are the disk slots of a checkpoint that is placed: what DISKS and DIGESTS list.
type numbered struct {
	disks []checkpoint.Disk
	slots []checkpoint.DiskSlot
	sums  []digest.Sum
	uses  []checkpoint.DiskUse
}

// number gives each page that is on a disk a disk slot: entries have that for their value
// from then on, those of n's bases too.
func (p *placer) number(n *referred) (*numbered, error) {
	d := p.to.disks
	if d == nil || len(p.disk.list) == 0 {
		return nil, nil
	}
	used := make([]checkpoint.DiskSlot, 0, len(p.disk.list))
	pages := make([]int64, len(d.list))
	err := p.to.pages.Runs(func(r pagemap.Run) error {
		if r.Kind != pagemap.Disk {
			return nil
		}
		for i := range r.Count {
			at := checkpoint.DiskSlot(r.First + i*r.Step)
			pages[at.Disk()]++
			used = append(used, at)
		}
		return nil
	})
	if err != nil {
		return nil, err
	}
	for i := range n.bases {
		if e := n.bases[i].base; onDisk(e) {
			used = append(used, checkpoint.DiskSlot(e.Value()))
		}
	}
	slices.Sort(used)
	used = slices.Compact(used)
	if len(used) == 0 {
		return nil, nil
	}
	// Disks of which nothing is left are not listed.
	out := &numbered{slots: make([]checkpoint.DiskSlot, 0, len(used)), sums: make([]digest.Sum, 0, len(used))}
	var numbers []int // in d.list, by number in out
	now := make([]int, len(d.list))
	for _, at := range used {
		if k := at.Disk(); len(numbers) == 0 || numbers[len(numbers)-1] != k {
			now[k] = len(numbers)
			numbers = append(numbers, k)
			out.disks = append(out.disks, d.list[k].Disk)
			out.uses = append(out.uses, checkpoint.DiskUse{Path: d.list[k].Path, Kept: d.list[k].Kept != uuid.Nil, Pages: pages[k]})
		}
	}
	if err := d.check(numbers); err != nil {
		return nil, err
	}
	p.disk.sort()
	rest := p.disk.list
	for _, at := range used {
		for rest[0].at != at {
			rest = rest[1:]
		}
		k := now[at.Disk()]
		out.slots = append(out.slots, checkpoint.MakeDiskSlot(k, at.Sector()))
		out.sums = append(out.sums, rest[0].sum)
		out.uses[k].Bytes += int64(p.pageSize)
	}
	p.disk = diskPages{}
	last := 0 // pages that follow each other often lie behind each other
	move := func(e pagemap.Entry) pagemap.Entry {
		if !onDisk(e) {
			return e
		}
		at := checkpoint.DiskSlot(e.Value())
		if last++; last >= len(used) || used[last] != at {
			last, _ = slices.BinarySearch(used, at)
		}
		return pagemap.Make(pagemap.Disk, uint64(last))
	}
	for b := range p.to.pages.Blocks() {
		p.to.pages.Change(b, move)
	}
	for i := range n.bases {
		n.bases[i].base = move(n.bases[i].base)
	}
	return out, nil
}

// disks writes what says which pages are on disks, and remembers their digests.
func (s *saver) disks(n *numbered) error {
	if n == nil {
		return nil
	}
	chunks, err := checkpoint.DiskChunks(n.disks, n.slots)
	if err != nil {
		return err
	}
	for _, b := range chunks {
		if err := s.out.chunk(image.Disks, b); err != nil {
			return err
		}
	}
	s.meta.Disks, s.rep.Disks, s.out.onDisk = len(n.disks), n.uses, n.sums
	return nil
}

// diskOf is where a page is on a disk that the parent has on one, as this save names it.
func (p *parent) diskOf(at source.Location) (checkpoint.DiskSlot, bool) {
	theirs, err := p.c.DiskSlot(at.Slot)
	if err != nil {
		p.damaged(err)
		return 0, false
	}
	k := p.carried[theirs.Disk()]
	return checkpoint.MakeDiskSlot(max(0, k), theirs.Sector()), k >= 0
}
