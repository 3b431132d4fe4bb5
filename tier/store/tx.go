package store

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"

	"github.com/google/uuid"

	"github.com/flic-migrate/flic-migrate/tier/nvram"
	"github.com/flic-migrate/flic-migrate/tier/rescue"
	"github.com/flic-migrate/flic-migrate/tier/vfs"
)

// ErrVolatile: the NVRAM file is on a file system that does not survive
// power-off, and nobody said that this is fine.
var ErrVolatile = errors.New("NVRAM file is on a volatile file system: hot pages would be lost at power-off")

// Tx is a checkpoint in the making: its image, and its part of an NVRAM file. It
// has failed until Commit has returned nil. Abort undoes whatever there is of it;
// it can be called at any time and more than once, and does nothing after a
// commit, so that a deferred Abort covers every way out, panics included.
type Tx struct {
	s     *Store // nil: BeginFile
	vm    string
	uuid  uuid.UUID
	image vfs.File // exclusively locked if it is the store's
	path  string   // of the image, or with loose of its entry
	ended bool

	nvfile *nvram.File
	region *nvram.Region
	// keep is set when the checkpoint may become visible in spite of an error:
	// its NVRAM is then not given back.
	keep bool

	loose *Loose   // BeginLoose
	entry vfs.File // its entry, exclusively locked
}

// Begin starts a checkpoint of VM vm.
func (s *Store) Begin(ctx context.Context, vm string) (_ *Tx, err error) {
	if err := CheckVM(vm); err != nil {
		return nil, err
	}
	t := &Tx{s: s, vm: vm, uuid: uuid.New()}
	t.path = s.path("tmp", t.uuid.String()+".part")
	unlock, err := s.lock(ctx)
	if err != nil {
		return nil, err
	}
	defer unlock()
	if t.image, err = s.fs.Create(t.path); err != nil {
		return nil, err
	}
	begun := false
	defer func() {
		if !begun {
			t.Abort()
		}
	}()
	if err = t.image.TryLock(vfs.Exclusive); err != nil {
		return nil, err
	}
	begun = true
	return t, nil
}

// BeginFile starts a checkpoint whose image goes into a file that the caller has
// opened, names and removes. It belongs to no store and has no NVRAM: Commit gives
// it no name, and Abort leaves the file.
func BeginFile(f vfs.File) *Tx { return &Tx{image: f, uuid: uuid.New()} }

// UUID is the checkpoint's.
func (t *Tx) UUID() uuid.UUID { return t.uuid }

// Image is the image to be, empty at first. Commit and Abort close it.
func (t *Tx) Image() vfs.File { return t.image }

// HasNVRAM tells whether the checkpoint can have a part in NVRAM: one that no
// store knows of can't, because nobody would give it back.
func (t *Tx) HasNVRAM() bool { return t.s != nil }

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
	// META says where the file is, to a restore with another working directory.
	path, err := filepath.Abs(r.Path)
	if err != nil {
		return nil, nil, err
	}
	t.nvfile, err = nvram.Open(ctx, t.s.fs, path, nvram.Options{Capacity: r.Capacity, Create: true, Format: r.Format})
	if err != nil {
		return nil, nil, err
	}
	if t.nvfile.Volatile() && !r.Volatile {
		return nil, nil, fmt.Errorf("%s: %w", r.Path, ErrVolatile)
	}
	if err := t.s.useNVRAM(ctx, path, t.nvfile.UUID()); err != nil {
		return nil, nil, err
	}
	if t.region, err = t.nvfile.Reserve(ctx, t.uuid, t.s.uuid, r.Bytes, r.PageSize); err != nil {
		return nil, nil, err
	}
	return t.region, t.nvfile, nil
}

// Commit gives the image, which must be whole and synced, its name and returns
// the checkpoint's reference once the name is durable. After an error nothing is
// visible, unless [IsUncertain] says so, and the transaction is aborted.
func (t *Tx) Commit(ctx context.Context) (ref Ref, err error) {
	if t.ended {
		return Ref{}, errors.New("the transaction has ended")
	}
	defer t.Abort()
	switch {
	case t.loose != nil:
		err = t.commitLoose(ctx)
	case t.s != nil:
		ref, err = t.commit(ctx)
	}
	if err != nil {
		return Ref{}, err
	}
	t.ended = true
	return ref, t.close()
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
	err := t.image.Close()
	if t.s != nil && t.loose == nil {
		err = nil // it is synced: nothing can be lost any more
	}
	return err
}

func (t *Tx) commit(ctx context.Context) (Ref, error) {
	s := t.s
	unlock, err := s.lock(ctx)
	if err != nil {
		return Ref{}, err
	}
	defer unlock()
	dir := s.path("vms", t.vm)
	if err := s.fs.MkdirAll(dir); err != nil {
		return Ref{}, err
	}
	n, err := s.lastNumber(t.vm)
	if err != nil {
		return Ref{}, err
	}
	ref := Ref{t.vm, n + 1}
	if ref.N > MaxNumber {
		return Ref{}, fmt.Errorf("VM %q has used up its checkpoint numbers", t.vm)
	}
	final := s.imagePath(ref)
	// Until the rename has failed for sure, or is undone for sure, the checkpoint
	// may be there.
	t.keep = true
	if err := s.fs.Rename(t.path, final); err != nil {
		t.keep = false
		return Ref{}, err
	}
	if err := rescue.Call(func() error { return s.fs.SyncDir(dir) }); err != nil {
		// The name may or may not be durable; take it back. If that does not
		// become durable either, or can't be done, the name is or can come
		// up, so the NVRAM part must stay its own until GC has seen the
		// directory synced.
		if s.fs.Remove(final) != nil || s.fs.SyncDir(dir) != nil {
			return Ref{}, &uncertainError{err}
		}
		t.keep = false
		return Ref{}, err
	}
	return ref, nil
}

// uncertainError is a Commit's failure after which the checkpoint may be there
// all the same, at once or after a power cut.
type uncertainError struct{ error }

func (e *uncertainError) Unwrap() error { return e.error }

// IsUncertain tells whether err is that of a Commit after which the checkpoint
// may be there all the same.
func IsUncertain(err error) bool {
	var u *uncertainError
	return errors.As(err, &u)
}

// Abort gives the transaction up. It returns an error if NVRAM was not given
// back: gc will.
func (t *Tx) Abort() error {
	if t.ended {
		return nil
	}
	t.ended = true
	defer t.close()
	if t.s != nil {
		defer t.s.fs.Remove(t.path)
	}
	if t.region != nil && !t.keep {
		// Whatever has ended the save is no reason to keep its NVRAM; the wait for
		// the file has a limit of its own.
		return t.region.Release(context.Background())
	}
	return nil
}
