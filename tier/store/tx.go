package store

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"

	"github.com/google/uuid"

	"github.com/flic-migrate/flic-migrate/tier/image"
	"github.com/flic-migrate/flic-migrate/tier/integrity"
	"github.com/flic-migrate/flic-migrate/tier/nvram"
	"github.com/flic-migrate/flic-migrate/tier/vfs"
)

// ErrVolatile: the NVRAM file is on a file system that does not survive
// power-off, and nobody said that this is fine.
var ErrVolatile = errors.New("NVRAM file is on a volatile file system: hot pages would be lost at power-off")

// Sink is an image in the making.
type Sink interface {
	image.Sink
	Close() error
}

// Tx is a checkpoint in the making: its image, and its part of an NVRAM file. It
// has failed until Commit has returned nil. Abort undoes whatever there is of it;
// it can be called at any time and more than once, and does nothing after a
// commit, so that a deferred Abort covers every way out, panics included.
type Tx struct {
	s     *Store // nil: BeginFile
	ref   Ref    // zero if the image is no store's
	uuid  uuid.UUID
	image Sink
	name  string // of the image's object; not with loose
	known bool   // the VM's folder was there, and durable, at the beginning
	ended bool

	nvfile *nvram.File
	region *nvram.Region
	holds  []heldImage   // what it refers to, or might, locked
	opened []*Checkpoint // likewise
	refers []uuid.UUID   // what it refers to, of the images that those are
	// lenders are the VMs whose images those are.
	lenders map[string]bool
	// keep is set when the checkpoint may become visible in spite of an error:
	// its NVRAM is then not given back.
	keep bool
	// stays is set when a group's record may name its part in spite of an error: the part
	// then stays, and its NVRAM.
	stays bool

	label Label  // what users say of it, as of what it is a copy of
	again bool   // it is another image of a checkpoint that there is
	loose *Loose // BeginLoose
	entry Object // the lock of its entry, exclusively locked
}

// Begin starts the next checkpoint of VM vm.
func (s *Store) Begin(ctx context.Context, vm string) (*Tx, error) {
	if err := CheckVM(vm); err != nil {
		return nil, err
	}
	t, err := s.begin(ctx, vm)
	if gone(err) && s.makes {
		// Who has made the store has failed, and has taken it away (Unmake).
		if err = s.create(ctx); err == nil {
			t, err = s.begin(ctx, vm)
		}
	}
	return t, err
}

func (s *Store) begin(ctx context.Context, vm string) (*Tx, error) {
	t := &Tx{s: s, uuid: uuid.New()}
	unlock, err := s.lock(ctx)
	if err != nil {
		return nil, err
	}
	defer unlock()
	// A number is taken by a group that is committed, too.
	if err := s.placeGroups(ctx); err != nil && !integrity.IsCorrupt(err) {
		return nil, err
	}
	o, err := s.objects(ctx, vm)
	if err != nil {
		return nil, err
	}
	t.ref = Ref{vm, max(o.last(), 0)}
	if err := s.skipNumbers(ctx, &t.ref); err != nil {
		return nil, err
	}
	if t.ref.N++; t.ref.N > MaxNumber {
		return nil, fmt.Errorf("VM %q has used up its checkpoint numbers", vm)
	}
	// While the guest runs is the time for this; at the commit it stands still.
	if t.known = o.last() > 0; t.known {
		if err := s.dir.Mkdir(ctx, vmFolder(vm)); err != nil {
			return nil, err
		}
	}
	t.name = partName(t.ref, t.uuid)
	if t.image, err = s.dir.Create(ctx, t.name); err != nil {
		return nil, err
	}
	return t, nil
}

// skipNumbers raises r's number to the highest that a save under way has. The caller
// holds the store lock.
func (s *Store) skipNumbers(ctx context.Context, r *Ref) error {
	numbers, err := s.underWay(ctx, r.VM, r.N+1)
	for _, n := range numbers {
		r.N = max(r.N, n)
	}
	return err
}

// underWay are the numbers, from one on, that images in the making of a VM have. The caller
// holds the store lock: who looks whether one is locked is in the way of who makes it.
func (s *Store) underWay(ctx context.Context, vm string, from int) (numbers []int, err error) {
	list, err := s.dir.List(ctx, tmpFolder)
	if err != nil {
		return nil, err
	}
	for _, e := range list {
		part, _, suffix, ok := parseTmp(e.Name)
		if !ok || suffix != partSuffix || part.VM != vm || part.N < from {
			continue
		}
		f, err := s.dir.Open(ctx, tmpFolder+"/"+e.Name, Exclusive)
		if err == nil {
			f.Close() // its save is dead
			continue
		}
		if !gone(err) {
			numbers = append(numbers, part.N)
		}
	}
	return numbers, nil
}

// BeginFile starts a checkpoint whose image goes into a file that the caller has
// opened, names and removes. It belongs to no store and has no NVRAM: Commit gives
// it no name, and Abort leaves the file.
func BeginFile(f Sink) *Tx { return &Tx{image: f, uuid: uuid.New()} }

// UUID is the checkpoint's.
func (t *Tx) UUID() uuid.UUID { return t.uuid }

// Ref is the checkpoint's to be, for its IDENTITY; zero if it is no store's.
func (t *Tx) Ref() Ref { return t.ref }

// Image is the image to be, empty at first. Commit and Abort close it.
func (t *Tx) Image() Sink { return t.image }

// HasNVRAM tells whether the checkpoint can have a part in NVRAM: one that no
// store knows of can't, because nobody would give it back.
func (t *Tx) HasNVRAM() bool { return t.s != nil }

// Hold keeps an open checkpoint, and what it refers to, from going away until the
// transaction has ended, and closes it then.
func (t *Tx) Hold(c *Checkpoint) {
	t.opened = append(t.opened, c)
	t.lends(c.Ref.VM)
	for _, ref := range c.References() {
		t.lends(ref.VM)
	}
}

// lends notes that an image of a VM's is referred to.
func (t *Tx) lends(vm string) {
	if t.lenders == nil {
		t.lenders = make(map[string]bool)
	}
	t.lenders[vm] = true
}

// Refer is called before the commit of a checkpoint that refers to others: from then on
// a store has to look for references. ids are all that it refers to, but for what other members
// of its group have. It keeps these images, if Hold and Borrow do not, from going away until the
// transaction has ended; the committed checkpoint's IDENTITY does so after that. The commit
// fails if one of them was replaced.
//
// A killed process can have left a name that is seen and not durable. What is referred to
// must not go with a power cut that this checkpoint survives: the names of others' images are
// made durable here, and of its own VM's when it gets its own.
func (t *Tx) Refer(ctx context.Context, ids ...uuid.UUID) error {
	if t.ref == (Ref{}) {
		return errors.New("an image outside of a store can't refer to others")
	}
	t.refers = append(t.refers, ids...)
	have := t.images()
	held, err := t.s.hold(ctx, slices.DeleteFunc(slices.Clone(ids), func(id uuid.UUID) bool {
		return slices.ContainsFunc(have, func(h heldImage) bool { return h.id == id })
	}))
	if err != nil {
		return err
	}
	t.holds = append(t.holds, held...)
	for vm := range t.lenders {
		if vm == t.ref.VM || CheckVM(vm) != nil {
			continue
		}
		if err := t.s.dir.Sync(ctx, vmFolder(vm)); err != nil && !gone(err) {
			return err
		}
	}
	return t.s.noteSharing(ctx)
}

// images are those that it has locked.
func (t *Tx) images() []heldImage {
	list := slices.Clone(t.holds)
	for _, c := range t.opened {
		list = append(list, c.images...)
	}
	return list
}

// Reservation is what a checkpoint wants of an NVRAM file.
type Reservation struct {
	Path     string // of the file, made if it is missing
	Capacity int64  // cap on the file in bytes; 0: the one that it has
	Volatile bool   // accept a file that loses its content at power-off
	Format   bool   // overwrite what is no NVRAM file and not blank
	Bytes    int64
	PageSize int // bytes a slot
}

// Reserve takes room in an NVRAM file, once in a transaction: as much as there is,
// up to what was asked for. The region, and the file behind it, are closed with
// the transaction, and given back if it fails.
func (t *Tx) Reserve(ctx context.Context, r Reservation) (*nvram.Region, *nvram.File, error) {
	if !t.HasNVRAM() || t.nvfile != nil {
		return nil, nil, errors.New("no room in NVRAM can be reserved here")
	}
	f, err := t.s.useNVRAM(ctx, r)
	if err != nil {
		return nil, nil, err
	}
	t.nvfile = f
	if t.region, err = f.Reserve(ctx, t.uuid, t.s.doc.UUID, r.Bytes, r.PageSize); err != nil {
		return nil, nil, err
	}
	return t.region, f, nil
}

// useNVRAM opens the NVRAM file in which room is to be reserved, and makes it if it is
// missing. The store remembers it.
func (s *Store) useNVRAM(ctx context.Context, r Reservation) (*nvram.File, error) {
	// The original would take it for what a dead save of its own has left.
	if err := s.CheckHome(ctx); err != nil {
		return nil, err
	}
	// META says where the file is, to a restore with another working directory.
	path, err := filepath.Abs(r.Path)
	if err != nil {
		return nil, err
	}
	if err := CheckNVRAM(s.fs, s.root, path); err != nil {
		return nil, err
	}
	if !r.Volatile {
		// Before the file is made, which nobody would remove.
		if err := CheckLasting(s.fs, path); err != nil {
			return nil, err
		}
	}
	f, err := nvram.Open(ctx, s.fs, path, nvram.Options{Capacity: r.Capacity, Create: true, Format: r.Format, Beside: s.root})
	if err != nil {
		return nil, err
	}
	kept := false
	defer func() {
		if !kept { // also while panicking
			f.Close()
		}
	}()
	if f.Volatile() && !r.Volatile {
		return nil, fmt.Errorf("%s: %w", r.Path, ErrVolatile)
	}
	if err := s.rememberNVRAM(ctx, path, f.UUID()); err != nil {
		return nil, err
	}
	kept = true
	return f, nil
}

// CheckLasting refuses an NVRAM file that would lose its content at power-off
// (ErrVolatile), and one whose directory is missing, before anything is begun. The file
// itself need not exist. Reserve checks the file that it has opened.
func CheckLasting(fsys vfs.FS, path string) error {
	at := path
	fi, err := fsys.Stat(path)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		at = filepath.Dir(path)
	case err != nil:
		return err
	case fi.Mode()&fs.ModeDevice != 0:
		return nil // its node is on a tmpfs
	}
	info, err := fsys.StatFS(at)
	if err == nil && info.Volatile {
		err = fmt.Errorf("%s: %w", path, ErrVolatile)
	}
	return err
}

// CheckNVRAM refuses an NVRAM file in the directory of a store (ErrInside), under
// whatever name it is reached, before anything is opened: it would overwrite the
// store's own. Neither need exist.
func CheckNVRAM(fsys vfs.FS, store, path string) error {
	dir, err := resolve(store)
	if err != nil {
		return err
	}
	file, err := resolve(path)
	if err != nil {
		return err
	}
	root, err := fsys.Stat(dir)
	if err != nil && !gone(err) {
		return err
	}
	for at := file; ; at = filepath.Dir(at) {
		inside := at == dir
		if !inside && root != nil {
			// A mount can give the directory another name.
			fi, err := fsys.Stat(at)
			inside = err == nil && os.SameFile(fi, root)
		}
		if inside {
			return fmt.Errorf("%s: %w (%s)", path, ErrInside, store)
		}
		if at == filepath.Dir(at) {
			return nil
		}
	}
}

// resolve is a path without links, of which the end need not exist.
func resolve(path string) (string, error) {
	path, err := filepath.Abs(path)
	if err != nil {
		return "", err
	}
	rest := ""
	for at := path; ; at = filepath.Dir(at) {
		real, err := filepath.EvalSymlinks(at)
		if err == nil {
			return filepath.Join(real, rest), nil
		}
		if !gone(err) || at == filepath.Dir(at) {
			return "", err
		}
		rest = filepath.Join(filepath.Base(at), rest)
	}
}

// Commit gives the image, which must be whole and synced, its name and returns
// the checkpoint's reference once the name is durable. After an error nothing is
// visible, unless [IsUncertain] says so, and the transaction is aborted. Nothing is
// synced but the VM's own folder.
func (t *Tx) Commit(ctx context.Context) (Ref, error) {
	if t.ended {
		return Ref{}, errors.New("the transaction has ended")
	}
	defer t.Abort()
	var err error
	switch {
	case t.loose != nil:
		err = t.commitLoose(ctx)
	case t.s != nil:
		err = t.commit(ctx)
	}
	if err != nil {
		return Ref{}, err
	}
	t.ended = true
	return t.ref, t.close()
}

func (t *Tx) commit(ctx context.Context) error {
	unlock, err := t.s.lock(ctx)
	if err != nil {
		return err
	}
	defer unlock()
	if err := t.stillNamed(ctx); err != nil {
		return err
	}
	if !t.known {
		if err := t.s.dir.Mkdir(ctx, vmFolder(t.ref.VM)); err != nil {
			return err
		}
	}
	err = t.s.place(ctx, t.name, t.ref, t.label, func() error {
		// Until it is known that the image has not got its name, it may be there, and
		// be so after a power cut: its NVRAM must then stay its own until gc has seen
		// the folder synced.
		t.keep = true
		return nil
	})
	t.keep = IsUncertain(err)
	return err
}

// errReplaced: an image that is held is not the one any more that has its name: a whole copy of
// it came, or one that has more of it. To hold it keeps nobody from freeing that one.
var errReplaced = errors.New("it was replaced meanwhile")

// heldImage is an image that is locked, so that a new checkpoint can refer to it.
type heldImage struct {
	Object
	at Ref // where it is
	id uuid.UUID
}

// stillNamed finds out that images which are held, so that a new checkpoint can refer to them,
// are those that have their names. The caller holds the store lock, and commits.
func (s *Store) stillNamed(ctx context.Context, list []heldImage) error {
	for _, h := range list {
		named, err := s.isNamed(ctx, h.Object, h.at.imageObjects(h.id)...)
		if err == nil && !named {
			err = fmt.Errorf("%s: %w: %w", h.Name(), errReplaced, ErrInUse)
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// stillNamed is Store.stillNamed of the images that it refers to.
func (t *Tx) stillNamed(ctx context.Context) error {
	return t.s.stillNamed(ctx, slices.DeleteFunc(t.images(), func(h heldImage) bool { return !slices.Contains(t.refers, h.id) }))
}

// isNamed tells whether an object has one of these names now. How many names it has says less: a
// snapshot that cp -al or rsync --link-dest made of the store has names for it too.
func (s *Store) isNamed(ctx context.Context, f Object, names ...string) (bool, error) {
	held, err := f.Inode()
	if err != nil {
		return false, err
	}
	for _, name := range names {
		there, err := s.dir.Open(ctx, name, Unlocked)
		if gone(err) || errors.Is(err, errNotObject) {
			continue
		}
		if err != nil {
			return false, err
		}
		inode, err := there.Inode()
		there.Close()
		if err != nil || inode == held {
			return err == nil, err
		}
	}
	return false, nil
}

// place gives a new checkpoint's image its name, durably, when what belongs beside it is there
// and no more: l, and what write writes, which is called right before that, if it is not nil.
// The name that the image has is from. As in Dir.Commit, after an error nothing is there unless IsUncertain says so.
// The caller holds the store lock.
func (s *Store) place(ctx context.Context, from string, r Ref, l Label, write func() error) error {
	err := s.clearBeside(ctx, r)
	if err == nil && !l.empty() {
		err = s.writeSealed(ctx, r.object(labelSuffix), l)
	}
	if err == nil && write != nil {
		err = write()
	}
	if err == nil {
		err = s.dir.Commit(ctx, from, r.object(imageSuffix))
	}
	if err != nil && !IsUncertain(err) {
		_ = s.clearBeside(ctx, r)
	}
	return err
}

// close closes what is open, and frees nothing.
func (t *Tx) close() error {
	if t.region != nil {
		t.region.Close()
	}
	if t.nvfile != nil {
		t.nvfile.Close()
	}
	if t.entry != nil {
		t.entry.Close()
	}
	for _, f := range t.holds {
		f.Close()
	}
	for _, c := range t.opened {
		c.Close()
	}
	err := t.image.Close()
	if t.ref.N > 0 {
		err = nil // it is synced: nothing can be lost any more
	}
	return err
}

// Abort gives the transaction up. It returns an error if NVRAM was not given
// back: gc will.
func (t *Tx) Abort() error {
	if t.ended {
		return nil
	}
	t.ended = true
	defer t.close()
	// Whatever has ended the save is no reason to keep what it took; the waits have
	// limits of their own.
	ctx := context.Background()
	if t.stays {
		return nil
	}
	switch {
	case t.loose != nil:
		defer t.s.removeLoose(ctx, t.uuid)
	case t.s != nil:
		defer t.s.dir.Remove(ctx, t.name)
	}
	if t.region != nil && !t.keep {
		return t.region.Release(ctx)
	}
	return nil
}
