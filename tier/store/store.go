package store

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path"
	"path/filepath"
	"slices"
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

// notMounted is vfs.NotMounted: a store is not made on what a mount will hide.
var notMounted = vfs.NotMounted

// Open opens the store in the directory dir; with create it makes one if there is
// none.
func Open(ctx context.Context, fsys vfs.FS, dir string, create bool) (*Store, error) {
	d, err := newPosixDir(fsys, dir)
	if err != nil {
		return nil, err
	}
	s := &Store{dir: d, fs: fsys, root: dir, makes: create}
	err = s.readDoc(ctx)
	if gone(err) {
		if at := notMounted(dir); at != "" {
			return nil, fmt.Errorf("no store at %s: %w: nothing is mounted at %s, which is in /etc/fstab", dir, ErrNotFound, at)
		}
	}
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
	at, err := s.whereNow(ctx)
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

// storeFolders are all folders that a store can have, as path.Match has them.
var storeFolders = []string{
	tmpFolder, nvramFolder, looseFolder, armedFolder, groupsFolder, disksFolder, frozenFolder,
	summaryFolder, shareFolder, shareFolder + "/*", vmsFolder, vmsFolder + "/*",
}

// idleFiles are files of a store that mean nothing where no checkpoint is: they are made again,
// or are as good as new ones.
var idleFiles = []string{
	rateFile, sharingFile, disksFolder + "/" + keyName, disksFolder + "/" + lockName, summaryFolder + "/*",
	shareFolder + "/*/" + keyName, shareFolder + "/*/" + lockName,
}

// unused tells whether a store has nothing in it but empty folders and idle files, and names
// that but for its description and its lock: what is in a folder before the folder.
func (s *Store) unused(ctx context.Context) (all []string, empty bool, err error) {
	empty = true
	var walk func(folder string) error
	walk = func(folder string) error {
		list, err := s.dir.List(ctx, folder)
		if err != nil {
			return err
		}
		for _, e := range list {
			name, may := path.Join(folder, e.Name), idleFiles
			if name == storeFile || name == lockName {
				continue
			}
			if e.Folder {
				may = storeFolders
			}
			if e.Odd || !slices.ContainsFunc(may, func(p string) bool { ok, _ := path.Match(p, name); return ok }) {
				empty = false
				return nil
			}
			if e.Folder {
				if err := walk(name); err != nil || !empty {
					return err
				}
			}
			all = append(all, name)
		}
		return nil
	}
	err = walk("")
	return all, empty, err
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

// whereNow is where the store is now.
func (s *Store) whereNow(ctx context.Context) (home, error) {
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
	at, err := s.whereNow(ctx)
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
	at, err := s.whereNow(ctx)
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

// createTmp makes a file in tmp, locked. It takes the store lock: gc removes there, under that, what
// nobody has locked, and a file is made before it can be. Who holds the store lock already calls
// Dir.Create.
func (s *Store) createTmp(ctx context.Context, name string) (Object, error) {
	unlock, err := s.lock(ctx)
	if err != nil {
		return nil, err
	}
	defer unlock()
	return s.dir.Create(ctx, name)
}
