package share

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"github.com/google/uuid"

	"github.com/flic-migrate/flic-migrate/tier/digest"
	"github.com/flic-migrate/flic-migrate/tier/integrity"
	"github.com/flic-migrate/flic-migrate/tier/sorted"
	"github.com/flic-migrate/flic-migrate/tier/vfs"
)

// Catalog is a directory with the index of one trust domain:
//
//	DIR/
//	├── lock           empty; flock: changes of the runs
//	├── uniting        empty; flock: images are replaced by such as refer to others
//	├── runs.json      sealed {"key":…,"runs":[…]}: the numbers of all runs that there are
//	├── NNNNNNNN.run   a run, by rising numbers
//	├── UUID.part      one that is being made, under the lock
//	├── UUID.N.VM.new  a note that the image with that UUID, VM@N, is new, and in no run yet
//	└── UUID.N.VM.beside  one that others were made beside it, and it is not united with them yet
//
// What is in no run that runs.json lists has a note. If a run is missing, or the list is, all
// images have to be looked at.
//
// Nothing else in it is touched. Nothing in it is synced but what takes the place of what
// is removed: after a power cut some of the index is damaged or not there.
type Catalog struct {
	fs  vfs.FS
	dir string
}

const (
	lockName   = "lock"
	uniting    = "uniting"
	runSuffix  = ".run"
	partSuffix = ".part"
	newSuffix  = ".new"
	// besideSuffix is that of NoteBeside's notes.
	besideSuffix = ".beside"
	sealName     = "runs.json"
)

// NewCatalog is the catalog in a directory, which need not be there.
func NewCatalog(fsys vfs.FS, dir string) *Catalog { return &Catalog{fsys, dir} }

func (c *Catalog) path(name string) string { return filepath.Join(c.dir, name) }

func runName(n int) string { return fmt.Sprintf("%08d%s", n, runSuffix) }

// listing is what is in the directory.
type listing struct {
	runs   []int // rising
	last   int   // the highest number that is taken
	news   []Image
	beside []Image
	parts  []string
}

func (c *Catalog) list() (l listing, err error) {
	entries, err := c.fs.ReadDir(c.dir)
	if errors.Is(err, fs.ErrNotExist) {
		return l, nil
	}
	for _, e := range entries {
		if !e.Type().IsRegular() {
			if s, ok := strings.CutSuffix(e.Name(), runSuffix); ok {
				if n, err := strconv.Atoi(s); err == nil {
					l.last = max(l.last, n)
				}
			}
			continue
		}
		if s, ok := strings.CutSuffix(e.Name(), runSuffix); ok && len(s) == 8 {
			if n, err := strconv.Atoi(s); err == nil && n > 0 {
				l.runs, l.last = append(l.runs, n), max(l.last, n)
			}
		} else if s, ok := strings.CutSuffix(e.Name(), partSuffix); ok && uuid.Validate(s) == nil {
			l.parts = append(l.parts, e.Name())
		} else if s, ok := strings.CutSuffix(e.Name(), newSuffix); ok {
			if im, ok := parseNote(s); ok {
				l.news = append(l.news, im)
			}
		} else if s, ok := strings.CutSuffix(e.Name(), besideSuffix); ok {
			if im, ok := parseNote(s); ok {
				l.beside = append(l.beside, im)
			}
		}
	}
	slices.Sort(l.runs)
	return l, err
}

// noteName is the name of the note that an image is new: the image is told by the name
// alone, so that a note needs no content.
func noteName(im Image) string { return im.note() + newSuffix }

// note is the name of a note about the image, without its suffix.
func (im Image) note() string { return fmt.Sprintf("%v.%d.%s", im.UUID, im.Number, im.VM) }

func parseNote(s string) (im Image, ok bool) {
	id, rest, ok := strings.Cut(s, ".")
	num, vm, ok2 := strings.Cut(rest, ".")
	n, err := strconv.Atoi(num)
	if !ok || !ok2 || err != nil || n < 1 || vm == "" || len(id) != 36 {
		return im, false
	}
	u, err := uuid.Parse(id)
	return Image{u, vm, n}, err == nil
}

// Note notes that there is an image that is in no run. It is a hint, and not synced: it
// spares whoever looks next a look at all images.
func (c *Catalog) Note(im Image) error { return c.note(noteName(im)) }

// NoteBeside notes, as Note does, that pages of an image may be in others too that were made
// beside it, until ForgetBeside.
func (c *Catalog) NoteBeside(im Image) error { return c.note(im.note() + besideSuffix) }

// Beside are the images that NoteBeside has noted.
func (c *Catalog) Beside() ([]Image, error) {
	l, err := c.list()
	return l.beside, err
}

// ForgetBeside removes the note.
func (c *Catalog) ForgetBeside(im Image) error {
	err := c.fs.Remove(c.path(im.note() + besideSuffix))
	if errors.Is(err, fs.ErrNotExist) {
		err = nil
	}
	return err
}

func (c *Catalog) note(name string) error {
	f, err := c.fs.Create(c.path(name))
	if errors.Is(err, fs.ErrExist) {
		return nil
	}
	if err != nil {
		return err
	}
	return f.Close()
}

// News are the images that notes name.
func (c *Catalog) News() ([]Image, error) {
	l, err := c.list()
	return l.news, err
}

// Open opens the index as it is now: the runs with digests of a key. What can't be opened
// is left out, and Broken says why; whoever has Lock removes it with Clean.
func (c *Catalog) Open(ctx context.Context, key KeyID) (_ *Index, err error) {
	x := &Index{known: make(map[uuid.UUID]bool)}
	defer func() {
		if err != nil {
			x.Close()
		}
	}()
	l, err := c.list()
	if err != nil {
		return nil, err
	}
	for _, n := range l.runs {
		if err := context.Cause(ctx); err != nil {
			return nil, err
		}
		r, err := openRun(c.fs, c.path(runName(n)))
		switch {
		case errors.Is(err, fs.ErrNotExist):
			continue // merged meanwhile: its pages may be missed, this once
		case integrity.IsCorrupt(err) || errors.Is(err, vfs.ErrNotRegular):
			x.Broken = errors.Join(x.Broken, err)
			continue
		case err != nil:
			return nil, err
		case r.head.key != key:
			r.close()
			continue
		}
		x.runs = append(x.runs, r)
	}
	// What most is in is found first.
	slices.SortStableFunc(x.runs, func(a, b *run) int { return cmp.Compare(b.head.records, a.head.records) })
	for _, r := range x.runs {
		r.first = len(x.images)
		x.images = append(x.images, r.images...)
		for i := range r.images {
			x.known[r.images[i].UUID] = true
		}
	}
	return x, nil
}

// sealDoc is the content of runs.json.
type sealDoc struct {
	Key  string `json:"key"`
	Runs []int  `json:"runs"`
}

// maxSeal caps runs.json, in bytes.
const maxSeal = 64 << 10

// State says what is known of an index.
type State int

const (
	Unknown  State = iota // nothing: it has never been made, or all of it is lost
	Complete              // what is in no run has a note
	Broken                // some of it is lost
)

// State tells whether an open index has all that it should have.
func (c *Catalog) State(x *Index, key KeyID) (State, error) {
	b, err := vfs.ReadFile(c.fs, c.path(sealName), maxSeal)
	if errors.Is(err, fs.ErrNotExist) && x.Broken == nil {
		return Unknown, nil
	}
	var doc sealDoc
	switch {
	case errors.Is(err, fs.ErrNotExist) || errors.Is(err, vfs.ErrTooLarge) || errors.Is(err, vfs.ErrNotRegular) || errors.Is(err, vfs.ErrLink):
		return Broken, nil
	case err != nil:
		return Unknown, err
	}
	if x.Broken != nil || integrity.Unseal(b, &doc) != nil || doc.Key != key.String() {
		return Broken, nil
	}
	there := make(map[string]bool)
	for _, r := range x.runs {
		there[filepath.Base(r.file.Name())] = true
	}
	for _, n := range doc.Runs {
		if !there[runName(n)] {
			return Broken, nil
		}
	}
	return Complete, nil
}

// Seal notes which runs there are, and that all images are in one or have a note.
func (c *Locked) Seal(key KeyID) error {
	l, err := c.list()
	if err != nil {
		return err
	}
	b, err := integrity.Seal(sealDoc{key.String(), l.runs})
	if err != nil {
		return err
	}
	return vfs.WriteFile(c.fs, c.path(sealName), vfs.Writing{Temporary: c.path(uuid.NewString() + partSuffix), NoSync: true}, vfs.Bytes(b))
}

// Source is an image that is to be added.
type Source struct {
	Image
	// Each calls fn with the digest of each page that others can refer to, and its slot.
	// An error that is about this image is its own; fn's is given back.
	Each func(fn func(s digest.Sum, slot uint64) error) error
}

// Locked is a Catalog that nobody else changes.
type Locked struct {
	*Catalog
	lock vfs.Locked
}

// TryLock makes sure that nobody else changes the catalog; vfs.ErrLocked if somebody does.
// The directory must be there.
func (c *Catalog) TryLock() (*Locked, error) {
	l, err := c.fs.TryLock(c.path(lockName), vfs.Exclusive)
	if err != nil {
		return nil, err
	}
	return &Locked{c, l}, nil
}

// Lock is TryLock, but waits.
func (c *Catalog) Lock(ctx context.Context) (*Locked, error) {
	l, err := c.fs.Lock(ctx, c.path(lockName), vfs.Exclusive)
	if err != nil {
		return nil, err
	}
	return &Locked{c, l}, nil
}

// TryLockUniting makes sure that nobody else unites images of the trust domain, until the
// lock is closed; vfs.ErrLocked if somebody does. It is another lock than Lock's, and taken
// before that.
func (c *Catalog) TryLockUniting() (vfs.Locked, error) {
	return c.fs.TryLock(c.path(uniting), vfs.Exclusive)
}

// Unlock ends it.
func (c *Locked) Unlock() error { return c.lock.Close() }

// sortRecords is how many records are sorted in memory: a run of 8 GiB of pages. They take
// 64 MiB. It is a variable for tests.
var sortRecords = 2 << 20

// Add makes runs of images, and removes the notes of them. Images that can't be read are
// left out, and failed says why.
func (c *Locked) Add(ctx context.Context, key KeyID, list []Source) (failed, err error) {
	var recs, spare []record
	var images []Image
	write := func() error {
		if len(images) == 0 {
			return nil
		}
		if len(spare) < len(recs) {
			spare = make([]record, cap(recs))
		}
		w, err := c.newRun(key, images)
		if err != nil {
			return err
		}
		for _, r := range sort(recs, spare) {
			if err := w.add(r); err != nil {
				w.abort()
				return err
			}
		}
		recs, images = recs[:0], nil
		return w.commit(false)
	}
	for i := range list {
		if err := context.Cause(ctx); err != nil {
			return failed, err
		}
		src := &list[i]
		// One that fills several runs is listed in each.
		before := len(recs)
		images = append(images, src.Image)
		var full error
		err := src.Each(func(s digest.Sum, slot uint64) error {
			if slot >= 1<<32 {
				return nil
			}
			if len(recs) == sortRecords {
				if full = write(); full != nil {
					return full
				}
				before, images = 0, append(images, src.Image)
			}
			recs = append(recs, record{binary64(s), uint16(len(images) - 1), uint32(slot)})
			return nil
		})
		if full != nil {
			return failed, full
		}
		if err != nil {
			failed = errors.Join(failed, fmt.Errorf("%s@%d: %w", src.VM, src.Number, err))
			recs, images = recs[:before], images[:len(images)-1]
		}
		if len(images) == maxImages {
			if err := write(); err != nil {
				return failed, err
			}
		}
	}
	if err := write(); err != nil {
		return failed, err
	}
	for i := range list {
		err := c.fs.Remove(c.path(noteName(list[i].Image)))
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			return failed, err
		}
	}
	return failed, nil
}

// Clean removes what is of no use: parts that were cut off, runs of other keys or that can't
// be opened, and notes of images that alive says are gone.
func (c *Locked) Clean(key KeyID, alive func(Image) bool) (removed int, err error) {
	l, err := c.list()
	if err != nil {
		return 0, err
	}
	names := l.parts
	for _, im := range l.news {
		if !alive(im) {
			names = append(names, noteName(im))
		}
	}
	for _, n := range l.runs {
		r, err := openRun(c.fs, c.path(runName(n)))
		if err == nil {
			ok := r.head.key == key
			r.close()
			if ok {
				continue
			}
		} else if !integrity.IsCorrupt(err) {
			return removed, err
		}
		names = append(names, runName(n))
	}
	for _, name := range names {
		if err := c.fs.Remove(c.path(name)); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return removed, err
		}
		removed++
	}
	return removed, nil
}

// Discard removes the runs in which a lookup has met damage, so that what they had is added
// again.
func (c *Catalog) Discard(x *Index) error {
	var first error
	for _, r := range x.runs {
		if r.damage.Load() == nil {
			continue
		}
		if err := c.fs.Remove(r.file.Name()); err != nil && !errors.Is(err, fs.ErrNotExist) && first == nil {
			first = err
		}
	}
	return first
}

const (
	// fanout is how many times as large as all smaller runs together one is at most that is
	// merged with them. So each run is more than that much larger than the next, 16 of them
	// have 10^10 records, and a record is written again when its run has grown by a half.
	fanout = 2
	// mostRuns is how many runs are merged at a time.
	mostRuns = 64
)

// Merge merges runs until none is small enough to be merged with the smaller ones, or limit
// records would have to be written at a time. It leaves out images that alive does not know.
// After an integrity.CorruptError the damaged runs are gone, and what they had is to be added
// again.
func (c *Locked) Merge(ctx context.Context, key KeyID, limit int64, alive func(Image) bool) error {
	for {
		again, err := c.mergeSome(ctx, key, limit, alive)
		if err != nil || !again {
			return err
		}
	}
}

func (c *Locked) mergeSome(ctx context.Context, key KeyID, limit int64, alive func(Image) bool) (bool, error) {
	x, err := c.Open(ctx, key)
	if err != nil {
		return false, err
	}
	defer x.Close()
	runs := slices.Clone(x.runs)
	slices.Reverse(runs) // rising by size
	for i := range runs {
		var some []*run
		sum, images := int64(0), 0
		for _, r := range runs[i:] {
			n := r.head.records
			if len(some) > 0 && n > fanout*sum || len(some) == mostRuns || images+len(r.images) > maxImages || sum+n > limit {
				break
			}
			some, sum, images = append(some, r), sum+n, images+len(r.images)
		}
		if len(some) < 2 {
			continue
		}
		lives := make(map[*run][]bool)
		for _, r := range some {
			for i := range r.images {
				lives[r] = append(lives[r], alive(r.images[i]))
			}
		}
		return true, c.mergeWhole(ctx, key, x, some, lives)
	}
	return false, nil
}

// mergeWhole is merge of some runs of x; those that are damaged it removes, and fails with
// what is wrong with them.
func (c *Locked) mergeWhole(ctx context.Context, key KeyID, x *Index, some []*run, lives map[*run][]bool) error {
	err := c.merge(ctx, key, some, lives)
	if integrity.IsCorrupt(err) {
		err = errors.Join(err, c.Discard(x))
	}
	return err
}

// Drop writes the runs again of which half or more of the images are gone.
func (c *Locked) Drop(ctx context.Context, key KeyID, alive func(Image) bool) error {
	x, err := c.Open(ctx, key)
	if err != nil {
		return err
	}
	defer x.Close()
	for _, r := range x.runs {
		lives, n := []bool(nil), 0
		for i := range r.images {
			ok := alive(r.images[i])
			if lives = append(lives, ok); ok {
				n++
			}
		}
		if 2*n > len(lives) {
			continue
		}
		if err := c.mergeWhole(ctx, key, x, []*run{r}, map[*run][]bool{r: lives}); err != nil {
			return err
		}
	}
	return nil
}

// merge makes one run of some, durably, and removes them.
func (c *Locked) merge(ctx context.Context, key KeyID, some []*run, lives map[*run][]bool) error {
	var images []Image
	numbers := make(map[uuid.UUID]uint16)
	renumber := make(map[*run][]uint16)
	for _, r := range some {
		list := make([]uint16, len(r.images))
		for i, im := range r.images {
			n, ok := numbers[im.UUID]
			if !ok && lives[r][i] {
				n = uint16(len(images))
				numbers[im.UUID], images = n, append(images, im)
			}
			list[i] = n
		}
		renumber[r] = list
	}
	if len(images) > 0 {
		w, err := c.newRun(key, images)
		if err != nil {
			return err
		}
		err = vfs.CatchFault(func() error {
			return eachMerged(ctx, some, func(r *run, rec record) error {
				if int(rec.image) >= len(r.images) || !lives[r][rec.image] {
					return nil
				}
				rec.image = renumber[r][rec.image]
				return w.add(rec)
			})
		})
		if err == nil {
			err = w.commit(true)
		} else {
			w.abort()
		}
		if err != nil {
			return err
		}
	}
	for _, r := range some {
		if err := c.fs.Remove(r.file.Name()); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
	}
	return nil
}

// eachMerged calls fn with the records of all runs, in the order of their prefixes.
func eachMerged(ctx context.Context, runs []*run, fn func(r *run, rec record) error) error {
	type head struct {
		r    *run
		leaf int64
		rest []byte
	}
	var heads []*head
	more := func(h *head) (bool, error) {
		for len(h.rest) == 0 {
			if h.leaf == h.r.table.Leaves() {
				return false, nil
			}
			if err := context.Cause(ctx); err != nil {
				return false, err
			}
			var err error
			if h.rest, err = h.r.table.Leaf(h.leaf); err != nil {
				h.r.damage.CompareAndSwap(nil, &err)
				return false, err
			}
			h.leaf++
		}
		return true, nil
	}
	for _, r := range runs {
		h := &head{r: r}
		ok, err := more(h)
		if err != nil {
			return err
		}
		if ok {
			heads = append(heads, h)
		}
	}
	for len(heads) > 0 {
		least := 0
		for i := 1; i < len(heads); i++ {
			if bytes.Compare(heads[i].rest[:prefixSize], heads[least].rest[:prefixSize]) < 0 {
				least = i
			}
		}
		h := heads[least]
		if err := fn(h.r, getRecord(h.rest)); err != nil {
			return err
		}
		h.rest = h.rest[recordSize:]
		ok, err := more(h)
		if err != nil {
			return err
		}
		if !ok {
			heads = slices.Delete(heads, least, least+1)
		}
	}
	return nil
}

// runWriter writes a run.
type runWriter struct {
	c     *Locked
	file  vfs.File
	w     *sorted.Writer
	head  header
	table []byte
	group []record // those of one prefix, not written yet
	buf   [recordSize]byte
}

func (c *Locked) newRun(key KeyID, images []Image) (*runWriter, error) {
	w := &runWriter{c: c, head: header{images: len(images), key: key}}
	for i := range images {
		w.table = appendImage(w.table, &images[i])
	}
	w.head.table, w.head.sum = len(w.table), integrity.Checksum(w.table)
	f, err := c.fs.Create(c.path(uuid.NewString() + partSuffix))
	if err != nil {
		return nil, err
	}
	w.file, w.w = f, sorted.NewWriter(f, w.head.leaves(), recordSize)
	return w, nil
}

// add takes the next record; they rise by prefix.
func (w *runWriter) add(r record) error {
	if len(w.group) > 0 && w.group[0].prefix != r.prefix {
		if err := w.flush(); err != nil {
			return err
		}
	}
	if len(w.group) < maxCopies {
		w.group = append(w.group, r)
	}
	return nil
}

// flush writes what is known of one prefix.
func (w *runWriter) flush() error {
	// Those of several runs come one run after the other.
	slices.SortFunc(w.group, func(a, b record) int { return cmp.Or(cmp.Compare(a.image, b.image), cmp.Compare(a.slot, b.slot)) })
	for i := range w.group {
		w.group[i].put(w.buf[:])
		if err := w.w.Add(w.buf[:]); err != nil {
			return err
		}
	}
	w.group = w.group[:0]
	return nil
}

func (w *runWriter) abort() {
	w.file.Close()
	w.c.fs.Remove(w.file.Name())
}

// commit gives the run its name; with sync it is durable then.
func (w *runWriter) commit(sync bool) (err error) {
	defer func() {
		if err != nil {
			w.abort()
		}
	}()
	if err := w.flush(); err != nil {
		return err
	}
	if err := w.w.End(); err != nil {
		return err
	}
	w.head.records = w.w.Records()
	if _, err := w.file.WriteAt(w.table, headerSize); err != nil {
		return err
	}
	if _, err := w.file.WriteAt(w.head.encode(), 0); err != nil {
		return err
	}
	if sync {
		if err := w.file.Sync(); err != nil {
			return err
		}
	}
	l, err := w.c.list()
	if err != nil {
		return err
	}
	if err := w.c.fs.Replace(w.file.Name(), w.c.path(runName(l.last+1))); err != nil {
		return err
	}
	if sync {
		if err := w.c.fs.SyncDir(w.c.dir); err != nil {
			return err
		}
	}
	return w.file.Close()
}

func binary64(s digest.Sum) uint64 {
	return uint64(s[0])<<56 | uint64(s[1])<<48 | uint64(s[2])<<40 | uint64(s[3])<<32 |
		uint64(s[4])<<24 | uint64(s[5])<<16 | uint64(s[6])<<8 | uint64(s[7])
}

// bucketBits: so many of a prefix's first bits put a record near its place, and what is left
// to sort are a few hundred at a time, which stay in the processor's cache.
const bucketBits = 12

// sort sorts list, by way of spare, which is as long.
func sort(list, spare []record) []record {
	var at [1<<bucketBits + 1]int
	for i := range list {
		at[list[i].prefix>>(64-bucketBits)+1]++
	}
	for i := range 1 << bucketBits {
		at[i+1] += at[i]
	}
	ends := at
	for i := range list {
		b := list[i].prefix >> (64 - bucketBits)
		spare[ends[b]] = list[i]
		ends[b]++
	}
	for b := range 1 << bucketBits {
		slices.SortFunc(spare[at[b]:at[b+1]], func(x, y record) int {
			return cmp.Or(cmp.Compare(x.prefix, y.prefix), cmp.Compare(x.image, y.image), cmp.Compare(x.slot, y.slot))
		})
	}
	return spare[:len(list)]
}
