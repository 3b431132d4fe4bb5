package store

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"time"

	"github.com/google/uuid"

	"github.com/flic-migrate/flic-migrate/tier/checkpoint"
	"github.com/flic-migrate/flic-migrate/tier/image"
	"github.com/flic-migrate/flic-migrate/tier/integrity"
	"github.com/flic-migrate/flic-migrate/tier/nvram"
)

// Removed says what a removal has freed.
type Removed struct {
	Ref        Ref
	As         uuid.UUID // of its image; Nil if that can't be read
	FlashBytes int64
	NVRAMBytes int64
	// FrozenBytes is what the disk blocks held of the disk images that were kept with it.
	FrozenBytes int64
	// Kept names the checkpoints that need bytes of its image, which is not free
	// before they are removed too.
	Kept []Ref
	// Left is why something of it was not freed, if so. The checkpoint is gone all
	// the same, and gc frees what belongs to nobody.
	Left error
}

// Remover removes checkpoints of a store, one after the other, and reads of the others
// only once what they refer to.
type Remover struct {
	// Wait is how long it still waits for checkpoints that are in use, all told: a save that
	// borrows pages has an image open for as long as it takes. 0: it does not.
	Wait time.Duration
	// Waiting is called, if not nil, when a checkpoint has been waited for for a moment, with
	// the processes that have it, as far as that can be told.
	Waiting func(r Ref, who []string)
	// Force removes an image also if it is another checkpoint's, whose own place lacks it.
	Force bool

	s    *Store
	look *lookup
}

// Remover returns one, which does not wait.
func (s *Store) Remover() *Remover { return &Remover{s: s, look: s.lookup()} }

// Remove is Remover.Remove of one checkpoint.
func (s *Store) Remove(ctx context.Context, r Ref) (Removed, error) {
	return s.Remover().Remove(ctx, r)
}

// Remove removes a checkpoint, which nobody may have open (ErrInUse), durably, and
// then gives back what it took, and what of unlisted images only it needed. It needs no
// space for that: the store may be full.
//
// An image that is not in its place is removed there, and no more: the checkpoint
// that it is, and that one's NVRAM, are another's. It is refused (ErrOnlyCopy) if that one's
// own place lacks it, as when two images have been exchanged.
func (m *Remover) Remove(ctx context.Context, r Ref) (rm Removed, err error) {
	for range flattenings {
		if rm, err = m.remove(ctx, r); !errors.Is(err, ErrChanged) {
			break
		}
		r = rm.Ref
	}
	return rm, err
}

// flattenings is how many of them can come between before a removal is given up.
const flattenings = 3

func (m *Remover) remove(ctx context.Context, r Ref) (rm Removed, err error) {
	s := m.s
	rm.Ref = r
	f, r, err := m.open(ctx, r)
	if errors.Is(err, errNotObject) {
		rm.Ref, rm.Left = r, err
		return rm, s.removeOdd(ctx, r)
	}
	if err != nil {
		return rm, err
	}
	closed := false
	defer func() {
		if !closed {
			f.Close()
		}
	}()
	rm.Ref = r
	size, err := f.Size()
	if err != nil {
		return rm, err
	}
	id, err := checkpoint.ReadIdentity(f)
	if err == nil {
		err = checkPlace(f.Name(), r, id)
	}
	if err != nil && !integrity.IsCorrupt(err) && !isUnsupported(err) {
		return rm, err
	}
	if errors.Is(err, errMisplaced) && !m.Force {
		if err := s.checkCopy(ctx, r, id, err); err != nil {
			return rm, err
		}
	}
	if rm.Left = err; err != nil {
		id = &checkpoint.Identity{} // it is nobody's
	}
	rm.As = id.UUID
	defer m.look.keep(ctx)
	// Of what is listed nothing is freed, so nobody need be asked about it.
	theirs, err := m.look.unlistedAmong(ctx, id.References)
	if err != nil {
		return rm, err
	}
	v := m.look.survey(append(slices.Clone(theirs), id.UUID)...)
	v.leave = id.UUID
	keep := false
	// Nobody can begin to refer to it while it is locked; who does so already holds
	// a lock on it, or is committed.
	if rm.Left == nil {
		if err := v.update(ctx); err != nil {
			return rm, err
		}
		if keep = v.needed(id.UUID); keep {
			rm.Kept, rm.Left = v.of[id.UUID].by, v.unclear
		}
	}
	had, err := m.look.reservedBy(ctx, id, theirs)
	if err != nil {
		return rm, err
	}
	unlock, err := m.look.lock(ctx)
	if err != nil {
		return rm, err
	}
	defer func() { unlock() }()
	if rm.Left == nil && !keep {
		// Who held another copy of it, which this one took the place of, can have been committed.
		if err := v.update(ctx); err != nil {
			return rm, err
		}
		if keep = v.needed(id.UUID); keep {
			rm.Kept, rm.Left = v.of[id.UUID].by, v.unclear
		}
	}
	left, err := m.look.unlist(ctx, r, id.UUID, keep)
	if err != nil {
		return rm, err
	}
	var own []idle
	if keep {
		// It is an unlisted image now, as those that it refers to may be.
		theirs = append(theirs, id.UUID)
	} else {
		rm.FlashBytes = size
		if rm.Left == nil && id.InNVRAM() {
			own = []idle{{id: id, had: had[id.UUID]}}
		}
		moved, err := m.look.tidy(ctx, r, id.UUID, left)
		rm.FlashBytes += moved
		rm.Left = errors.Join(rm.Left, err)
	}
	f.Close()
	closed = true
	fr, why, err := s.freeUnlisted(ctx, v, theirs, had)
	unlock()
	unlock = func() {}
	rm.FlashBytes += fr.flash
	if why != nil && rm.Left != nil && why.Error() == rm.Left.Error() {
		why = nil
	}
	rm.Left = errors.Join(rm.Left, why, err)
	rm.NVRAMBytes, err = s.freeNVRAM(ctx, append(own, fr.idle...)...)
	rm.Left = errors.Join(rm.Left, err)
	kept, err := s.freeFrozen(ctx, m.look, id.Kept)
	rm.FrozenBytes, rm.Left = kept.bytes, errors.Join(rm.Left, err)
	return rm, nil
}

// open opens a checkpoint's image, and locks it for its removal, as soon as nobody else has
// it.
func (m *Remover) open(ctx context.Context, r Ref) (Object, Ref, error) {
	var f Object
	begun := time.Now()
	told := m.Waiting == nil
	waited, err := soon(ctx, m.Wait, func() (again bool, err error) {
		if f, r, err = m.s.open(ctx, r, Exclusive); !errors.Is(err, ErrInUse) {
			return false, err
		}
		if !told && time.Since(begun) > waitingTold {
			told = true
			m.Waiting(r, m.s.dir.Holders(ctx, r.object(imageSuffix)))
		}
		// One that is armed keeps what it refers to for as long as it likes.
		_, armed, aerr := m.s.ArmedFor(ctx, r.VM)
		return !armed || aerr != nil, err
	})
	m.Wait -= waited
	if errors.Is(err, ErrInUse) {
		if who := m.s.dir.Holders(ctx, r.object(imageSuffix)); len(who) > 0 {
			err = fmt.Errorf("%w: %s", err, strings.Join(who, ", "))
		}
	}
	return f, r, err
}

// waitingTold is how long nobody is told that there is a wait.
const waitingTold = 500 * time.Millisecond

// ErrOnlyCopy: an image that is to be removed is another checkpoint's, and its only one.
var ErrOnlyCopy = errors.New("its own place lacks it")

// checkCopy finds out that an image in r's place, which is another checkpoint's because of
// why, is in its own place too.
func (s *Store) checkCopy(ctx context.Context, r Ref, id *checkpoint.Identity, why error) error {
	own := Ref{id.VM, id.Number}
	if CheckVM(own.VM) != nil || own.N < 1 || own.N > MaxNumber {
		return nil // it has none
	}
	name := own.object(imageSuffix)
	there, err := s.owner(ctx, name)
	if err == nil && there == id.UUID {
		return nil
	}
	if err != nil && !gone(err) && !cannotTell(err) && !errors.Is(err, errNotObject) {
		return err
	}
	return fmt.Errorf("%w, and %w: move it to %s first", why, ErrOnlyCopy, s.dir.Path(name))
}

// removeOdd removes what stands in an image's place and is no file: its name, and
// nothing that it leads to.
func (s *Store) removeOdd(ctx context.Context, r Ref) error {
	unlock, err := s.lock(ctx)
	if err != nil {
		return err
	}
	defer unlock()
	o, err := s.objects(ctx, r.VM)
	if err != nil {
		return err
	}
	if !slices.Contains(o.odd, r.N) {
		return fmt.Errorf("checkpoint %v in store %s: %w", r, s.root, ErrNotFound)
	}
	if r.N == o.last() && !slices.Contains(o.removed, r.N) {
		// It can't be what remembers the number.
		if err := s.dir.Write(ctx, r.object(removedSuffix), spare(), nil); err != nil {
			return err
		}
	}
	if err := s.dir.Remove(ctx, r.object(imageSuffix)); err != nil {
		return err
	}
	if err := s.dir.Sync(ctx, vmFolder(r.VM)); err != nil {
		return err
	}
	_ = s.dropBeside(ctx, r, o)
	return nil
}

func isUnsupported(err error) bool {
	var u *image.UnsupportedError
	return errors.As(err, &u)
}

// unlist takes a checkpoint's name away, durably. Its image, which has this UUID unless that
// is Nil, is locked, and so is the store, by the lookup. left tells whether the image is there
// now as that of a removed one: with keep, and if it stands for the highest number.
func (l *lookup) unlist(ctx context.Context, r Ref, id uuid.UUID, keep bool) (left bool, err error) {
	s := l.s
	o, err := l.again(ctx, r.VM)
	if err != nil {
		return false, err
	}
	old := r.object(imageSuffix)
	if _, ok := slices.BinarySearch(o.images, r.N); !ok {
		return false, fmt.Errorf("checkpoint %v in store %s: %w", r, s.root, ErrNotFound)
	}
	// A flattening can have put another image in its place, which is not locked: somebody
	// may read that one, or refer to it.
	if id != uuid.Nil {
		now, err := s.owner(ctx, old)
		if err != nil {
			return false, err
		}
		if now != id {
			return false, fmt.Errorf("checkpoint %v: %w", r, ErrChanged)
		}
		some, err := s.dropTwins(ctx, r, id)
		if err != nil {
			return false, err
		}
		if some {
			defer delete(l.held, r.VM)
		}
	}
	// The highest number is remembered by what is left of its image. A new name
	// of the same length fits where the old one was, so that a full disk is no
	// reason to fail.
	if keep = keep || r.N == o.last(); keep {
		removed := r.object(removedSuffix)
		if slices.Contains(o.removed, r.N) {
			// Somebody has put the image back under a number that was gone.
			if err := s.makeWay(ctx, r); err != nil {
				return false, err
			}
			defer delete(l.held, r.VM)
		}
		err := s.dir.Commit(ctx, old, removed)
		if errors.Is(err, syscall.ENOSPC) && s.dir.Remove(ctx, r.object(touchedSuffix)) == nil {
			err = s.dir.Commit(ctx, old, removed) // in the place of the hint's name
		}
		if err != nil {
			return false, err
		}
	} else {
		if err := s.dir.Remove(ctx, old); err != nil {
			return false, err
		}
		if err := s.dir.Sync(ctx, vmFolder(r.VM)); err != nil {
			return false, err
		}
	}
	_ = s.dropBeside(ctx, r, o)
	l.vms[r.VM].objects = o.without(r.N, keep)
	return keep, nil
}

// makeWay frees the name that an unlisted image of a checkpoint has, for another one.
// One that has content may be needed, and gets a name of its own. What can't say who it is gets
// some name: gc judges it.
func (s *Store) makeWay(ctx context.Context, r Ref) error {
	st := stored{name: r.object(removedSuffix)}
	empty, err := s.unlistedIs(ctx, &st)
	if gone(err) {
		return nil // a twin
	}
	if empty && err == nil || errors.Is(err, errNotObject) {
		return s.dir.Remove(ctx, st.name)
	}
	if err != nil && !cannotTell(err) {
		return err
	}
	if st.uuid != uuid.Nil {
		err = s.dir.Commit(ctx, st.name, r.keptObject(st.uuid))
		if st.id != nil || !errors.Is(err, fs.ErrExist) {
			return err
		}
	}
	return s.dir.Commit(ctx, st.name, r.keptObject(uuid.New()))
}

// tidy frees what is left of a removed image that nobody needs, and what stood for
// lower numbers. The image, whose UUID is Nil if it is not known, is locked, and so is the
// store, by the lookup. left is unlist's: without it what has the name of a removed one is
// another image, which had the number before and which others may need. moved is how many bytes
// were freed of what had been moved from NVRAM.
func (l *lookup) tidy(ctx context.Context, r Ref, id uuid.UUID, left bool) (moved int64, err error) {
	s := l.s
	o, err := l.again(ctx, r.VM)
	if err != nil {
		return 0, err
	}
	if left {
		if err := s.dir.Empty(ctx, r.object(removedSuffix), spare()); err != nil {
			return 0, err
		}
	}
	if moved, err = s.dropMoved(ctx, r, id, o); err != nil {
		return moved, err
	}
	for _, n := range o.removed {
		if n == o.last() {
			break
		}
		at := Ref{r.VM, n}
		if size, ok := l.size(r.VM, numbered(n, removedSuffix)); ok && size > 0 {
			continue // an image that others may need: gc looks
		}
		if err := s.removeEmpty(ctx, at); err != nil {
			return moved, err
		}
	}
	return moved, nil
}

// removeEmpty removes what stands for a number that need not be remembered any
// more. The caller holds the store lock.
func (s *Store) removeEmpty(ctx context.Context, r Ref) error {
	f, err := s.dir.Open(ctx, r.object(removedSuffix), Unlocked)
	if errors.Is(err, errNotObject) {
		return nil // a stray
	}
	if err != nil {
		return err
	}
	size, err := f.Size()
	f.Close()
	if err != nil || size > 0 {
		return err // an image that others may need: gc looks
	}
	return s.dir.Remove(ctx, r.object(removedSuffix))
}

// nvramFile is the content of nvram/UUID.json.
type nvramFile struct {
	Path string    `json:"path"`
	UUID uuid.UUID `json:"uuid"`
}

// errOtherNVRAM: where an NVRAM file was is another one.
var errOtherNVRAM = errors.New("it is another one now")

// openNVRAM opens an NVRAM file and refuses another one in its place.
func (s *Store) openNVRAM(ctx context.Context, nf nvramFile) (*nvram.File, error) {
	f, err := nvram.Open(ctx, s.fs, nf.Path, nvram.Options{})
	if err != nil {
		return nil, err
	}
	if f.UUID() != nf.UUID {
		f.Close()
		return nil, fmt.Errorf("NVRAM file %s: %w", nf.Path, errOtherNVRAM)
	}
	return f, nil
}

// ErrNeeded: something of a store still needs what is to be forgotten.
var ErrNeeded = errors.New("it is still needed")

// ForgetNVRAM has the store forget NVRAM files that it knows under a path and that are gone,
// so that gc looks for them no longer. It refuses as long as the file is there, because then
// gc can free what it has of this store's, and as long as a checkpoint, or an image outside
// of the store, has pages in it (ErrNeeded). A later save that uses the file again makes it
// known again.
//
// A checkpoint in a version that can't be read here does not keep it: its pages there, if it
// has any, are no longer than the file. It is a warning.
func (s *Store) ForgetNVRAM(ctx context.Context, path string) (warnings []error, err error) {
	if path, err = filepath.Abs(path); err != nil {
		return nil, err
	}
	list, err := s.dir.List(ctx, nvramFolder)
	if err != nil {
		return nil, err
	}
	var names []string
	for _, e := range list {
		var nf nvramFile
		name := nvramFolder + "/" + e.Name
		if err := s.readSealed(ctx, name, "NVRAM file's name", maxSealed, &nf); err != nil || nf.Path != path {
			continue // gc says what can't be read
		}
		if warnings, err = s.forgettable(ctx, nf); err != nil {
			return nil, fmt.Errorf("NVRAM file %s is not forgotten: %w", path, err)
		}
		names = append(names, name)
	}
	if len(names) == 0 {
		return nil, fmt.Errorf("NVRAM file %s, of this store: %w", path, ErrNotFound)
	}
	unlock, err := s.lock(ctx)
	if err != nil {
		return nil, err
	}
	defer unlock()
	for _, name := range names {
		if err := s.dir.Remove(ctx, name); err != nil && !gone(err) {
			return nil, err
		}
	}
	return warnings, s.dir.Sync(ctx, nvramFolder)
}

// forgettable finds out that an NVRAM file is gone and no image has pages in it. A damaged
// image may have some; one of another version is a warning. It takes no lock: nobody begins
// to need a file that is gone.
func (s *Store) forgettable(ctx context.Context, nf nvramFile) (warnings []error, err error) {
	f, err := s.openNVRAM(ctx, nf)
	if err == nil {
		f.Close()
		return nil, errors.New("it is there, and gc frees what it has of this store's")
	}
	if !gone(err) && !errors.Is(err, errOtherNVRAM) {
		return nil, fmt.Errorf("it can't be seen whether it is gone: %w", err)
	}
	look := s.lookup()
	err = look.eachVM(ctx, "", func(vm string, o vmObjects) error {
		for _, st := range o.all(vm) {
			id, err := look.whoIs(ctx, st.name)
			switch {
			case gone(err) || st.gone && cannotTell(err):
			case isUnsupported(err):
				warnings = append(warnings, fmt.Errorf("%v may have had pages in NVRAM file %s, which is forgotten: %w", st.ref, nf.Path, err))
			case err != nil:
				return fmt.Errorf("it can't be told what has pages in it: %w", err)
			case id != nil && id.NVRAM != nil && id.NVRAM.UUID == nf.UUID:
				return fmt.Errorf("%w: %v has pages in it, and rm removes that", ErrNeeded, st.ref)
			}
		}
		return context.Cause(ctx)
	})
	if err != nil {
		return nil, err
	}
	// These do not say in which file their pages are.
	others, err := s.Loose(ctx)
	if err == nil && len(others) > 0 {
		err = fmt.Errorf("%w: %s, outside of the store, may have pages in it", ErrNeeded, others[0].Place.Path)
	}
	return warnings, err
}

func nvramObject(id uuid.UUID) string { return nvramFolder + "/" + id.String() + ".json" }

// rememberNVRAM records, before any extent of it is reserved, that saves of this
// store use an NVRAM file, so that GC finds what a killed save has left there.
func (s *Store) rememberNVRAM(ctx context.Context, path string, id uuid.UUID) error {
	want := nvramFile{path, id}
	var have nvramFile
	if s.readSealed(ctx, nvramObject(id), "NVRAM file's name", maxSealed, &have) == nil && have == want {
		return nil
	}
	unlock, err := s.lock(ctx)
	if err != nil {
		return err
	}
	defer unlock()
	return s.writeSealed(ctx, nvramObject(id), want)
}
