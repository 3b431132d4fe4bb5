// Package store keeps the checkpoints of many VMs in one place, a directory today:
//
//	DIR/
//	├── store.json                 version, the store's UUID, and where its home is
//	├── lock                       the store lock
//	├── flash-rate.json            how fast this place is read
//	├── sharing.json               there are images that refer to others
//	├── tmp/NAME@N.UUID.part       a save under way, locked by its process
//	├── nvram/UUID.json            an NVRAM file that saves of this store used
//	├── loose/UUID.json            an image outside of the store (loose.go)
//	├── armed/NAME.json            a checkpoint that is armed (armed.go)
//	├── groups/NAME@N.json         checkpoints that were made as one (group.go)
//	├── disks/                     indexes of disk images (package disk)
//	├── frozen/UUID                a disk image that is kept with a checkpoint (frozen.go)
//	├── share/DOMAIN/              a trust domain's key (trust.go)
//	├── summaries/NAME             who a VM's images say they are, a cache (summary.go)
//	└── vms/NAME/
//	    ├── 00000001.flic          checkpoint 1: a flash image (package image)
//	    ├── 00000001.UUID.1.moved  what was moved of its NVRAM part to flash (demote.go)
//	    ├── 00000001.touched       what resumes of checkpoint 1 have learned
//	    ├── 00000001.label         what users say of checkpoint 1: tags and a note
//	    ├── 00000002.flic
//	    ├── 00000002.UUID.gone     what checkpoint 2 was before it was flattened
//	    └── 00000003.gone          checkpoint 3, removed: empty, or others need it
//
// A checkpoint is visible exactly if its image has its name under vms: that it gets
// it is the commit; for several as one, that their group's record is there (group.go).
// Everything else can be rebuilt from the images, and the store
// touches no object that has another name than these. Something else under vms may be
// a checkpoint that somebody has renamed: as long as it is there, gc frees no NVRAM.
//
// What a store asks of its place is [Dir]. What it stores is opened with package
// checkpoint, which knows no store.
//
// # The lock rule
//
// There are three locks, always taken in this order, and this is the only
// place that says so:
//
//  1. The store lock covers changes of names: making a .part, the commit, rm, and
//     the changes that gc makes. It is held for milliseconds: never while page data
//     moves, while NVRAM tables are searched or other file systems are looked at.
//  2. Each image is locked as long as it is in use: exclusively by the save that
//     writes it, shared by those who read it, or refer to it in a checkpoint that
//     is not committed yet. rm and gc touch no image and no .part that they cannot
//     lock exclusively. So it is with disk images that are kept: who makes the checkpoint
//     locks them, shared, until it is committed. Readers take this lock while they hold the store lock, so
//     no image is removed between being found and being locked; list and show take
//     none, because what they read of an image is checked, and an image that goes
//     away meanwhile is not there. Summaries are read and written without any. What an open checkpoint refers to is opened without
//     the store lock: it can't go away, and who finds it locked, because somebody frees
//     what nobody needs of it, waits for that moment to pass.
//  3. The NVRAM file's own lock (package nvram), for allocation only.
//
// Before all of them Unite takes one of its own, and those of the index of shared pages are
// never waited for with one of these held. A receiver takes one of each image that it puts
// together (receiveclaim.go), while it has others locked: who waits for those has none of
// these, and waits for an hour at most.
//
// Locks end with their process, so whatever can be locked has no owner any more.
// Every wait for one ends with the context, and after vfs.LockLimit; the one for another
// Unite after uniteWait.
//
// # Numbers
//
// A checkpoint's number is taken when its save begins, and stands in its image,
// which so can be told from a copy in another place. Numbers rise, and no save is given one
// again that was visible; one of a save that failed is. A checkpoint that is received has the
// number that it had, if nobody has it now: so one that was removed comes back, and another
// can have taken its number. UUIDs tell them apart.
package store

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"syscall"

	"github.com/google/uuid"

	"github.com/flic-migrate/flic-migrate/tier/digest"
	"github.com/flic-migrate/flic-migrate/tier/integrity"
	"github.com/flic-migrate/flic-migrate/tier/loose"
	"github.com/flic-migrate/flic-migrate/tier/vfs"
)

// Version is the version of the store's layout.
const Version = 2

var (
	// ErrNotFound: no such store, VM or checkpoint.
	ErrNotFound = errors.New("not found")
	// ErrInUse: another process reads or writes the checkpoint.
	ErrInUse = errors.New("in use by another process")
	// ErrName: a VM name or checkpoint reference that can't be.
	ErrName = errors.New("not a valid name")
	// ErrCopied: the store is a copy of another one, and what is in NVRAM is that
	// one's.
	ErrCopied = errors.New("this store is a copy")
	// ErrInside: what is to be an NVRAM file is in a store's directory.
	ErrInside = errors.New("it is in the store's directory, where no NVRAM file can be")
)

// Store is an opened store. It holds no lock and no state but its identity; it
// may be used from several goroutines and by several processes.
type Store struct {
	// LooseHeader knows what stands before an image in the files that loose images
	// are in; nil: nothing does.
	LooseHeader loose.Header

	dir   Dir
	fs    vfs.FS // of the NVRAM files
	root  string
	doc   storeDoc
	makes bool // Open was to make it if there is none
	made  bool // and has
	bare  bool // there was a directory for it
}

// storeDoc is the content of store.json.
type storeDoc struct {
	Format  string    `json:"format"`
	Version int       `json:"version"`
	UUID    uuid.UUID `json:"uuid"`
	Home    home      `json:"home"`
}

// home is where a store was made, or taken over. Its UUID owns room in NVRAM files,
// and a copy of the store has the same one.
type home struct {
	Path string `json:"path"` // absolute
	ID   string `json:"id"`   // Dir.ID
}

const formatName = "flic-migrate store"

// Open opens the store in the directory dir; with create it makes one if there is
// none.
func Open(ctx context.Context, fsys vfs.FS, dir string, create bool) (*Store, error) {
	d, err := newPosixDir(fsys, dir)
	if err != nil {
		return nil, err
	}
	s := &Store{dir: d, fs: fsys, root: dir, makes: create}
	err = s.readDoc(ctx)
	if gone(err) && create {
		_, serr := fsys.Stat(dir)
		s.bare = !gone(serr)
		err = s.create(ctx)
	}
	if gone(err) {
		return nil, fmt.Errorf("no store at %s: %w", dir, ErrNotFound)
	}
	if err != nil {
		return nil, err
	}
	s.settleGroups(ctx)
	return s, nil
}

func (s *Store) readDoc(ctx context.Context) error {
	var doc storeDoc
	err := s.readSealed(ctx, storeFile, "store description", maxSealed, &doc)
	if errors.Is(err, errEarlier) {
		return fmt.Errorf("%s: an earlier flic-migrate wrote this store, in version 1; this one reads version %d only", s.dir.Path(storeFile), Version)
	}
	if err != nil {
		return err
	}
	if doc.Format != formatName || doc.UUID == uuid.Nil {
		return &integrity.CorruptError{File: s.dir.Path(storeFile), What: "store description", Err: errors.New("not a flic-migrate store")}
	}
	if doc.Version != Version {
		return fmt.Errorf("%s: store version %d is not known here", s.dir.Path(storeFile), doc.Version)
	}
	s.doc = doc
	return nil
}

func (s *Store) create(ctx context.Context) error {
	if err := s.checkEmpty(ctx); err != nil {
		return err
	}
	for _, folder := range []string{"", tmpFolder, nvramFolder, domainFolder(DefaultDomain), vmsFolder} {
		if err := s.dir.Mkdir(ctx, folder); err != nil {
			return err
		}
	}
	unlock, err := s.lock(ctx)
	if err != nil {
		return err
	}
	defer unlock()
	// Another process may have been first.
	if err := s.readDoc(ctx); !gone(err) {
		return err
	}
	at, err := s.place(ctx)
	if err != nil {
		return err
	}
	// A save that fails is to leave nothing, so that this is not for the first one to make.
	if err := s.writeDomain(ctx, DefaultDomain, digest.Fresh()); err != nil {
		return err
	}
	if err := s.writeSealed(ctx, storeFile, storeDoc{formatName, Version, uuid.New(), at}); err != nil {
		return err
	}
	s.made = true
	return s.readDoc(ctx)
}

// Unmake takes away a store that this Store's Open has made and that holds nothing: its
// caller has failed, and who reads must not find a store where none is in use. Another
// process may have opened it meanwhile: its Begin makes it again.
func (s *Store) Unmake(ctx context.Context) error {
	if !s.made {
		return nil
	}
	unlock, err := s.lock(ctx)
	if err != nil {
		return err
	}
	defer unlock()
	all, empty, err := s.unused(ctx)
	if err != nil || !empty {
		return err
	}
	// The description goes first, durably: a store without folders would be a broken one.
	if err := s.dir.Remove(ctx, storeFile); err != nil {
		return err
	}
	s.made = false
	if err := s.dir.Sync(ctx, ""); err != nil {
		return err
	}
	for _, name := range append(all, lockName) {
		if err := s.dir.Remove(ctx, name); err != nil {
			return err
		}
	}
	if s.bare {
		return nil
	}
	err = s.dir.Remove(ctx, "")
	if errors.Is(err, syscall.ENOTEMPTY) {
		err = nil // somebody has begun to make it again
	}
	return err
}

// unused tells whether a store has nothing in it but what it was made with, and keys of trust
// domains, and names that but for its description and its lock: what is in a folder before
// the folder.
func (s *Store) unused(ctx context.Context) (all []string, empty bool, err error) {
	root, err := s.dir.List(ctx, "")
	if err != nil {
		return nil, false, err
	}
	for _, e := range root {
		var list []Entry
		switch e.Name {
		case storeFile, lockName:
			continue
		case tmpFolder, nvramFolder, vmsFolder, shareFolder, frozenFolder:
			if list, err = s.dir.List(ctx, e.Name); err != nil {
				return nil, false, err
			}
		default:
			return nil, false, nil
		}
		for _, domain := range list {
			folder := e.Name + "/" + domain.Name
			if e.Name != shareFolder || !domain.Folder {
				return nil, false, nil
			}
			keys, err := s.dir.List(ctx, folder)
			if err != nil {
				return nil, false, err
			}
			for _, k := range keys {
				if k.Name != keyName {
					return nil, false, nil
				}
				all = append(all, folder+"/"+keyName)
			}
			all = append(all, folder)
		}
		all = append(all, e.Name)
	}
	return all, true, nil
}

// checkEmpty refuses to make a store around checkpoints that there are: they are of
// one whose description is lost, and with it the UUID that their NVRAM is under.
func (s *Store) checkEmpty(ctx context.Context) error {
	for _, folder := range []string{vmsFolder, looseFolder} {
		list, err := s.dir.List(ctx, folder)
		if err != nil && !gone(err) {
			return err
		}
		if len(list) == 0 {
			continue
		}
		// A process that makes the store at the same time may have got this far.
		// It has written the description before.
		if err := s.readDoc(ctx); !gone(err) {
			return err
		}
		return &integrity.CorruptError{File: s.dir.Path(storeFile), What: "store description",
			Err: errors.New("there are checkpoints here and no store.json; no store is made around them")}
	}
	return nil
}

// place is where the store is now.
func (s *Store) place(ctx context.Context) (home, error) {
	path, err := filepath.Abs(s.root)
	if err != nil {
		return home{}, err
	}
	id, err := s.dir.ID(ctx)
	return home{path, id}, err
}

// CheckHome tells a store from a copy of one (ErrCopied), as cp -a or a snapshot of
// a disk make them. Both have the same UUID, and so in NVRAM files the same
// property: a copy must neither take nor give back any. It can be read.
func (s *Store) CheckHome(ctx context.Context) error {
	at, err := s.place(ctx)
	if err != nil {
		return err
	}
	was := s.doc.Home
	if at == was {
		return nil
	}
	copied := at.ID != was.ID
	if !copied {
		// It was moved, or a disk was copied with all that is on it: then the
		// original is still in its place. A place that can't be looked at has none.
		copied, _ = s.original(ctx)
	}
	if !copied {
		return nil
	}
	of := "the one in " + was.Path
	if at.Path == was.Path {
		of = "the one that was here before it"
	}
	return fmt.Errorf("%s: %w of %s, whose NVRAM is left alone; if that one is gone for good, \"flic-migrate gc --adopt\" takes it over",
		s.root, ErrCopied, of)
}

// same tells whether the directory at path is the store's own, under another name.
func (s *Store) same(path string) bool {
	if own, err := filepath.Abs(s.root); err == nil && own == path {
		return true
	}
	a, err := s.fs.Stat(s.root)
	if err != nil {
		return false
	}
	b, err := s.fs.Stat(path)
	return err == nil && os.SameFile(a, b)
}

// original tells whether at the store's recorded home there is a store with the same
// UUID that is not this very directory: the one that this is a copy of. An error says
// that this can't be found out.
func (s *Store) original(ctx context.Context) (bool, error) {
	at := s.doc.Home.Path
	if s.same(at) {
		return false, nil
	}
	d, err := newPosixDir(s.fs, at)
	if err != nil {
		return false, err
	}
	other := &Store{dir: d, fs: s.fs, root: at}
	err = other.readDoc(ctx)
	if gone(err) || errors.Is(err, syscall.ENOTDIR) {
		return false, nil
	}
	return err == nil && other.doc.UUID == s.doc.UUID, err
}

// Adopt makes the store's present place its home: the caller knows that the store
// that it was copied from is gone for good. From then on that one is the copy. It
// refuses while that one can be seen in its place (ErrCopied), and if nobody can tell:
// two owners would each give back what the other needs.
func (s *Store) Adopt(ctx context.Context) error {
	unlock, err := s.lock(ctx)
	if err != nil {
		return err
	}
	defer unlock()
	at, err := s.place(ctx)
	if err != nil {
		return err
	}
	there, err := s.original(ctx)
	if err != nil {
		return fmt.Errorf("%s: not adopted, because it can't be seen whether the store that it is a copy of is gone from %s: %w", s.root, s.doc.Home.Path, err)
	}
	if there {
		return fmt.Errorf("%s: not adopted: %w of the one in %s, which is still there and owns what is in NVRAM", s.root, ErrCopied, s.doc.Home.Path)
	}
	doc := s.doc
	doc.Home = at
	if err := s.writeSealed(ctx, storeFile, doc); err != nil {
		return err
	}
	return s.readDoc(ctx)
}

// Dir is the store's directory.
func (s *Store) Dir() string { return s.root }

// UUID is the store's identity, which marks its extents in NVRAM files.
func (s *Store) UUID() uuid.UUID { return s.doc.UUID }

// lock takes the store lock, waiting for it until ctx is done.
func (s *Store) lock(ctx context.Context) (unlock func(), err error) {
	l, err := s.dir.Lock(ctx, lockName)
	if err != nil {
		return nil, fmt.Errorf("the lock of store %s: %w", s.root, err)
	}
	return func() { l.Close() }, nil
}
