package disk

import (
	"cmp"
	"context"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"time"

	"github.com/google/uuid"
	"github.com/zeebo/blake3"

	"github.com/flic-migrate/flic-migrate/tier/digest"
	"github.com/flic-migrate/flic-migrate/tier/integrity"
	"github.com/flic-migrate/flic-migrate/tier/progress"
	"github.com/flic-migrate/flic-migrate/tier/vfs"
)

// Catalog is a directory with the indexes of layers, one key for all of them:
//
//	DIR/
//	├── lock           empty; flock: changes of names
//	├── key.json       sealed {"algorithm":…,"key":…}
//	├── ID.index       the index of the layer whose path and format have this ID
//	└── ID.UUID.part   one that is being built, flocked by its process
//
// Nothing else in it is touched. The directory is made with the first index. All of it
// is a cache: what is lost is built again.
//
// The lock is held for moments, and not while another is waited for; who holds it may
// take that of a .part, without waiting. An index that is in use has no lock: it is
// replaced by a rename, and stays there for whoever has it open.
type Catalog struct {
	// Key is asked for the key of a catalog that has none yet; after an error, or if it is
	// nil, the catalog makes one.
	Key func(ctx context.Context) (*digest.Hasher, error)

	fs  vfs.FS
	dir string
}

const (
	lockName    = "lock"
	keyName     = "key.json"
	indexSuffix = ".index"
	partSuffix  = ".part"
)

// NewCatalog is the catalog in a directory, which need not be there.
func NewCatalog(fsys vfs.FS, dir string) *Catalog { return &Catalog{fs: fsys, dir: dir} }

func (c *Catalog) path(name string) string { return filepath.Join(c.dir, name) }

// ID is the name of a layer's index: the same for all VMs that stand on the layer.
func ID(id Identity) string {
	sum := blake3.Sum256([]byte(string(id.Format) + "\x00" + id.Path))
	return hex.EncodeToString(sum[:16])
}

// keyDoc is what key.json says.
type keyDoc struct {
	Algorithm digest.Algorithm `json:"algorithm"`
	Key       digest.Key       `json:"key"`
}

// maxKey caps key.json, in bytes.
const maxKey = 4 << 10

// Hasher makes the digests that all indexes of the catalog know; fs.ErrNotExist if there
// has been none yet.
func (c *Catalog) Hasher(ctx context.Context) (*digest.Hasher, error) {
	name := c.path(keyName)
	b, err := vfs.ReadFile(c.fs, name, maxKey)
	if err != nil {
		return nil, err
	}
	var doc keyDoc
	if err := integrity.Unseal(b, &doc); err != nil {
		return nil, &integrity.CorruptError{File: name, What: "key of disk indexes", Err: err}
	}
	return digest.New(doc.Algorithm, doc.Key)
}

var errNoKey = errors.New("nobody has a key")

// key is Hasher, but makes a key if there is none that can be used: the indexes of one
// that is lost are stale. The caller holds the lock.
func (c *Catalog) key(ctx context.Context) (*digest.Hasher, error) {
	h, err := c.Hasher(ctx)
	if err == nil || !errors.Is(err, fs.ErrNotExist) && !integrity.IsCorrupt(err) {
		return h, err
	}
	if err = errNoKey; c.Key != nil {
		h, err = c.Key(ctx)
	}
	if err != nil {
		h = digest.Fresh()
	}
	b, err := integrity.Seal(keyDoc{h.Algorithm(), h.Key()})
	if err != nil {
		return nil, err
	}
	// Its first name is a part's, so that what a power cut leaves is swept.
	tmp := c.path(strings.Repeat("0", 32) + "." + uuid.NewString() + partSuffix)
	return h, vfs.WriteFile(c.fs, c.path(keyName), vfs.Writing{Temporary: tmp}, vfs.Bytes(b))
}

// Open opens the index of a layer: of it alone, not of what it stands on. It is
// ErrNoIndex if there is none, and ErrStale, with the reason, if it can't be used.
func (c *Catalog) Open(ctx context.Context, img *Image) (*Index, error) {
	name := c.path(ID(img.id) + indexSuffix)
	stale := func(why string) error {
		return fmt.Errorf("%s: %w: %s", img.Path(), ErrStale, why)
	}
	x, err := openIndex(c.fs, name)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return nil, fmt.Errorf("%s: %w", img.Path(), ErrNoIndex)
	case integrity.IsCorrupt(err) || errors.Is(err, vfs.ErrNotRegular) || errors.Is(err, vfs.ErrLink) || errors.Is(err, syscall.EISDIR):
		return nil, stale(err.Error())
	case err != nil:
		return nil, err
	}
	if err = c.fits(ctx, x, img); err != nil {
		x.Close()
		return nil, err
	}
	return x, nil
}

// fits checks that an index is one of the layer as it is now.
func (c *Catalog) fits(ctx context.Context, x *Index, img *Image) error {
	stale := func(why string) error {
		return fmt.Errorf("%s: %w: %s", img.Path(), ErrStale, why)
	}
	h, err := c.Hasher(ctx)
	if errors.Is(err, fs.ErrNotExist) || integrity.IsCorrupt(err) {
		return stale("the key of the store's indexes is lost")
	}
	if err != nil {
		return err
	}
	x.hasher = h
	now, err := img.Now()
	if err != nil {
		return err
	}
	switch what := x.head.id.Differs(now); {
	case x.head.keyID != keyID(h):
		return stale("it has another key than the store's other ones")
	case x.head.id.Path != now.Path:
		return stale("it is that of " + x.head.id.Path)
	case what != "":
		return stale("the image " + what)
	}
	if !x.head.id.Touched(now) {
		return nil
	}
	// As a rule somebody has changed the owner. But times can be set, too.
	ok, err := x.sample(img)
	if err == nil && !ok {
		err = stale("the image has other content, although its times are as they were")
	}
	return err
}

// samples is how many blocks are looked at where only a file's attributes were changed:
// a fraction of a second's reading from any disk.
const samples = 32

// sample compares blocks from all over the index with the image.
func (x *Index) sample(img *Image) (same bool, err error) {
	type expected struct {
		sector int64
		sum    digest.Sum
	}
	var list []expected
	err = vfs.CatchFault(func() error {
		n := x.table.Leaves()
		for i := range min(n, samples) {
			leaf, err := x.table.Leaf(i * n / min(n, samples))
			if err != nil {
				return err
			}
			r := getRecord(leaf)
			list = append(list, expected{sectorOf(x.head.regions, r.block), digest.Sum(leaf[:digest.Size])})
		}
		return nil
	})
	if err != nil {
		return false, err
	}
	slices.SortFunc(list, func(a, b expected) int { return cmp.Compare(a.sector, b.sector) })
	b := make([]byte, BlockSize)
	for _, e := range list {
		if n, err := img.ReadAt(b, e.sector*SectorSize); n < len(b) {
			return false, err
		}
		if x.hasher.Sum(b) != e.sum {
			return false, nil
		}
	}
	return true, nil
}

// Built says what a Build did.
type Built struct {
	Why    string        // why it was built, if there was an index that could not be used
	Kept   bool          // nothing was done: there is one that fits
	Blocks int64         // that the index knows
	Data   int64         // bytes that the layer has of its own
	Bytes  int64         // of the index file
	Took   time.Duration // 0 if it was kept
}

// BuildOptions says how to build.
type BuildOptions struct {
	// Again builds an index even if there is one that fits.
	Again bool
	// Frozen: the caller knows that who wrote to the layer last will not do so again, as
	// of a disk that was frozen while its guest stood still. A layer that was written to
	// just now is then not left alone for a while first.
	Frozen bool
	// Progress is called now and then; it may be nil.
	Progress func(progress.State)
}

// Build builds the index of a layer, which was opened with what it stands on: of the
// layer alone. It reads what the layer has once, and takes some 100 MiB of memory for a
// disk of any size. The index is there, durably, when Build has returned, and so is what the
// layer holds; after an error the one that was there before is there still. A layer that
// somebody can write to (ErrWriter), or that is changed meanwhile (ErrChanging), gets none;
// vfs.ErrLocked says that somebody else is building it.
func (c *Catalog) Build(ctx context.Context, img *Image, o BuildOptions) (_ *Built, err error) {
	x, err := c.Open(ctx, img)
	done := &Built{}
	switch {
	case err == nil && !o.Again:
		defer x.Close()
		done.Kept, done.Blocks, done.Data, done.Bytes = true, x.head.records, x.head.data, x.head.size()
		return done, nil
	case err == nil:
		x.Close()
	case errors.Is(err, ErrStale):
		done.Why = err.Error()
	case !errors.Is(err, ErrNoIndex):
		return nil, err
	}
	start := time.Now()
	if err := unchanged(img); err != nil {
		return nil, err
	}
	if !o.Frozen {
		if err := settled(ctx, img); err != nil {
			return nil, err
		}
	}
	if err := c.fs.MkdirAll(c.dir); err != nil {
		return nil, err
	}
	b := &builder{src: img, show: o.Progress, head: header{id: img.id, built: start.UnixNano()}}
	if b.total, err = amount(ctx, img); err != nil {
		return nil, err
	}
	if err := c.room(b.total); err != nil {
		return nil, err
	}
	id := ID(img.id)
	part, hasher, err := c.begin(ctx, id)
	if err != nil {
		return nil, fmt.Errorf("index of %s: %w", img.Path(), err)
	}
	defer func() {
		if part != nil { // also while panicking
			part.Close()
			c.fs.Remove(part.Name())
		}
	}()
	b.hasher, b.head.keyID = hasher, keyID(hasher)
	b.sort.limit = int(min(runRecords, b.total/BlockSize+1))
	b.sort.scratch = func() (vfs.File, error) { return c.scratch(id) }
	readAhead(img)
	if err := b.write(ctx, part); err != nil {
		return nil, err
	}
	// Checkpoints that refer to it are called durable.
	if err := img.Sync(); err != nil {
		return nil, err
	}
	if err := unchanged(img); err != nil {
		return nil, err
	}
	if err := part.Sync(); err != nil {
		return nil, err
	}
	if err := c.commit(ctx, part, id); err != nil {
		return nil, err
	}
	name := part.Name()
	err = part.Close()
	part = nil
	if err != nil {
		return nil, fmt.Errorf("%s: %w", name, err)
	}
	done.Blocks, done.Data, done.Bytes, done.Took = b.head.records, b.head.data, b.head.size(), time.Since(start)
	return done, nil
}

// room refuses a build that would fill the store up: the index, and as much again for
// the runs that are merged.
func (c *Catalog) room(data int64) error {
	info, err := c.fs.StatFS(c.dir)
	if err != nil {
		return err
	}
	need := data/BlockSize*recordSize + headerSize
	if data/BlockSize > runRecords {
		need *= 2
	}
	if need > info.Free {
		return fmt.Errorf("%s: an index of %d bytes of disk needs %d bytes, and %d are free: %w", c.dir, data, need, info.Free, syscall.ENOSPC)
	}
	return nil
}

// begin makes the file of an index that is to be built, locked, and finds or makes the
// key.
func (c *Catalog) begin(ctx context.Context, id string) (vfs.File, *digest.Hasher, error) {
	unlock, err := c.lock(ctx)
	if err != nil {
		return nil, nil, err
	}
	defer unlock()
	// One that somebody builds is not built twice.
	if _, err := c.parts(id, false); err != nil {
		return nil, nil, err
	}
	h, err := c.key(ctx)
	if err != nil {
		return nil, nil, err
	}
	f, err := c.fs.Create(c.path(id + "." + uuid.NewString() + partSuffix))
	if err != nil {
		return nil, nil, err
	}
	if err := f.TryLock(vfs.Exclusive); err != nil {
		f.Close()
		c.fs.Remove(f.Name())
		return nil, nil, err
	}
	return f, h, nil
}

// scratch makes a file that has no name any more.
func (c *Catalog) scratch(id string) (vfs.File, error) {
	f, err := c.fs.Create(c.path(id + "." + uuid.NewString() + partSuffix))
	if err != nil {
		return nil, err
	}
	// Somebody who sweeps may have been faster.
	if err := c.fs.Remove(f.Name()); err != nil && !errors.Is(err, fs.ErrNotExist) {
		f.Close()
		return nil, err
	}
	return f, nil
}

// commit gives a durable part its name.
func (c *Catalog) commit(ctx context.Context, part vfs.File, id string) error {
	unlock, err := c.lock(ctx)
	if err != nil {
		return err
	}
	defer unlock()
	if err := c.fs.Replace(part.Name(), c.path(id+indexSuffix)); err != nil {
		return err
	}
	return c.fs.SyncDir(c.dir)
}

func (c *Catalog) lock(ctx context.Context) (unlock func(), err error) {
	l, err := c.fs.Lock(ctx, c.path(lockName), vfs.Exclusive)
	if err != nil {
		return nil, fmt.Errorf("the lock of disk indexes in %s: %w", c.dir, err)
	}
	return func() { l.Close() }, nil
}

// isPart tells whether name is that of a part, of id if that is not empty.
func isPart(name, id string) bool {
	have, rest, ok := strings.Cut(name, ".")
	u, isPart := strings.CutSuffix(rest, partSuffix)
	return ok && isPart && isID(have) && (id == "" || id == have) && uuid.Validate(u) == nil
}

func isID(s string) bool {
	b, err := hex.DecodeString(s)
	return err == nil && len(b) == 16 && strings.ToLower(s) == s
}

// parts removes the parts of killed builds, of one layer or of all. One that is being
// built is vfs.ErrLocked, or with pass passed over. The caller holds the lock.
func (c *Catalog) parts(id string, pass bool) (removed int, err error) {
	list, err := c.fs.ReadDir(c.dir)
	if err != nil {
		return 0, err
	}
	for _, e := range list {
		if !isPart(e.Name(), id) || !e.Type().IsRegular() {
			continue
		}
		name := c.path(e.Name())
		f, err := c.fs.Open(name)
		if errors.Is(err, fs.ErrNotExist) {
			continue // a scratch file, which has its name for a moment
		}
		if err != nil {
			return removed, err
		}
		err = f.TryLock(vfs.Exclusive)
		if err == nil {
			err = c.fs.Remove(name)
		}
		f.Close()
		switch {
		case err == nil:
			removed++
		case errors.Is(err, fs.ErrNotExist) || pass && errors.Is(err, vfs.ErrLocked):
		case errors.Is(err, vfs.ErrLocked):
			return removed, fmt.Errorf("it is being built: %w", err)
		default:
			return removed, err
		}
	}
	return removed, nil
}

// Sweep removes what killed builds have left, and says how many files that were. A
// catalog that is not there has none.
func (c *Catalog) Sweep(ctx context.Context) (removed int, err error) {
	if _, err := c.fs.Lstat(c.dir); errors.Is(err, fs.ErrNotExist) {
		return 0, nil
	}
	unlock, err := c.lock(ctx)
	if err != nil {
		return 0, err
	}
	defer unlock()
	removed, err = c.parts("", true)
	if err == nil && removed > 0 {
		err = c.fs.SyncDir(c.dir)
	}
	return removed, err
}

// Entry is an index that there is.
type Entry struct {
	ID       string   // the first part of its file's name
	Identity Identity // of the layer, when it was read; zero if the index is damaged
	Built    time.Time
	Blocks   int64 // that it knows
	Data     int64 // bytes that the layer had of its own
	Bytes    int64 // of the index file
	State    State
	Why      string // what is wrong with it, if anything is
}

// State says of what use an index is.
type State string

const (
	Current State = "current" // the image is as it was
	Stale   State = "stale"   // it is not: the index is not used before it is built again
	Missing State = "missing" // the image is not there, or can't be opened
	Damaged State = "damaged" // the index is
)

// List says which indexes there are, in the order of the images' paths.
func (c *Catalog) List(ctx context.Context) ([]Entry, error) {
	list, err := c.fs.ReadDir(c.dir)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	var entries []Entry
	for _, e := range list {
		id, ok := strings.CutSuffix(e.Name(), indexSuffix)
		if !ok || !isID(id) {
			continue
		}
		if err := context.Cause(ctx); err != nil {
			return nil, err
		}
		entry, err := c.describe(ctx, id)
		if errors.Is(err, fs.ErrNotExist) {
			continue // removed meanwhile
		}
		if err != nil {
			return nil, err
		}
		entries = append(entries, entry)
	}
	slices.SortFunc(entries, func(a, b Entry) int {
		return cmp.Or(strings.Compare(a.Identity.Path, b.Identity.Path), strings.Compare(a.ID, b.ID))
	})
	return entries, nil
}

// describe looks at one index and at its image.
func (c *Catalog) describe(ctx context.Context, id string) (Entry, error) {
	name := c.path(id + indexSuffix)
	e := Entry{ID: id, State: Damaged}
	fi, err := c.fs.Lstat(name)
	if err != nil {
		return e, err
	}
	e.Bytes = fi.Size()
	x, err := openIndex(c.fs, name)
	if err != nil {
		if errors.Is(err, fs.ErrNotExist) {
			return e, err
		}
		e.Why = err.Error()
		return e, nil
	}
	defer x.Close()
	e.Identity, e.Built, e.Blocks, e.Data = x.head.id, x.Built(), x.head.records, x.head.data
	if ID(x.head.id) != id {
		e.Why = "it has another layer's name"
		return e, nil
	}
	img, err := OpenLayer(x.head.id.Path, x.head.id.Format)
	if err != nil {
		e.State, e.Why = Missing, err.Error()
		return e, nil
	}
	defer img.Close()
	switch err := c.fits(ctx, x, img); {
	case err == nil:
		e.State = Current
	case errors.Is(err, ErrStale) || integrity.IsCorrupt(err):
		e.State, e.Why = Stale, err.Error()
	default:
		return e, err
	}
	return e, nil
}

// Remove removes the index with this ID, whatever state it is in; fs.ErrNotExist if
// there is none. No checkpoint needs it.
func (c *Catalog) Remove(ctx context.Context, id string) error {
	name := c.path(id + indexSuffix)
	if !isID(id) {
		return &fs.PathError{Op: "remove", Path: name, Err: fs.ErrNotExist}
	}
	if _, err := c.fs.Lstat(c.dir); err != nil {
		return err
	}
	unlock, err := c.lock(ctx)
	if err != nil {
		return err
	}
	defer unlock()
	if err := c.fs.Remove(name); err != nil {
		return err
	}
	return c.fs.SyncDir(c.dir)
}

// Find returns the IDs of those indexes in a list that are of the file at path, of
// whatever format, and also if the file is not there any more. path may be an ID.
func Find(list []Entry, path string) []string {
	full, err := filepath.Abs(path)
	if err != nil {
		full = path
	}
	resolved, err := filepath.EvalSymlinks(full)
	if err != nil {
		resolved = full
	}
	var ids []string
	for _, e := range list {
		if e.ID == path || e.Identity.Path != "" && (e.Identity.Path == full || e.Identity.Path == resolved) {
			ids = append(ids, e.ID)
		}
	}
	return ids
}
