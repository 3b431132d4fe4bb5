// Package store keeps the checkpoints of many VMs in one directory:
//
//	DIR/
//	├── store.json                 format version and the store's UUID
//	├── lock                       the store lock
//	├── tmp/UUID.part              a save under way, locked by its process
//	├── nvram/UUID.json            an NVRAM file that saves of this store used
//	└── vms/NAME/
//	    ├── 00000001.flic          checkpoint 1: a flash image (package image)
//	    ├── 00000001.touched       what resumes of checkpoint 1 have learned
//	    ├── 00000002.flic
//	    └── last                   highest number of a removed checkpoint
//
// A checkpoint is visible exactly if its image has its name under vms: the
// rename is the commit. Everything else can be rebuilt from the images.
//
// # The lock rule
//
// There are three locks, always taken in this order, and this is the only
// place that says so:
//
//  1. The store lock (flock on DIR/lock) covers changes of names: making a
//     .part file, the commit's rename, rm, gc. It is held for milliseconds,
//     never while page data moves.
//  2. Each image file is locked as long as it is in use: exclusively by the
//     save that writes it, shared by those who read it. rm and gc touch no
//     image and no .part file that they cannot lock exclusively. Readers take
//     this lock while they hold the store lock, so no image is removed between
//     being found and being locked.
//  3. The NVRAM file's own lock (package nvram), for allocation only.
//
// Locks end with their process, so whatever can be locked has no owner any
// more.
package store

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"path/filepath"
	"slices"
	"sort"
	"strconv"
	"strings"
	"time"
	"unicode"
	"unicode/utf8"

	"github.com/google/uuid"

	"github.com/flic-migrate/flic-migrate/tier/image"
	"github.com/flic-migrate/flic-migrate/tier/integrity"
	"github.com/flic-migrate/flic-migrate/tier/loose"
	"github.com/flic-migrate/flic-migrate/tier/nvram"
	"github.com/flic-migrate/flic-migrate/tier/rescue"
	"github.com/flic-migrate/flic-migrate/tier/vfs"
	"github.com/flic-migrate/flic-migrate/tier/workingset"
)

// Version is the version of the directory's layout.
const Version = 1

// MaxNumber is the highest checkpoint number.
const MaxNumber = 99999999

var (
	// ErrNotFound: no such store, VM or checkpoint.
	ErrNotFound = errors.New("not found")
	// ErrInUse: another process reads or writes the checkpoint.
	ErrInUse = errors.New("in use by another process")
	// ErrName: a VM name or checkpoint reference that can't be.
	ErrName = errors.New("not a valid name")
)

// Store is an opened store. It holds no lock and no state but its identity; it
// may be used from several goroutines and by several processes.
type Store struct {
	fs   vfs.FS
	dir  string
	uuid uuid.UUID

	// LooseHeader knows what stands before an image in the files that loose images
	// are parts of. Without it GC keeps the hot pages of all of them.
	LooseHeader loose.Header
}

type storeFile struct {
	Format  string    `json:"format"`
	Version int       `json:"version"`
	UUID    uuid.UUID `json:"uuid"`
}

const formatName = "flic-migrate store"

// Open opens the store in dir; with create it makes one if there is none.
func Open(ctx context.Context, fsys vfs.FS, dir string, create bool) (*Store, error) {
	s := &Store{fs: fsys, dir: dir}
	err := s.readStoreFile()
	if errors.Is(err, fs.ErrNotExist) && create {
		err = s.create(ctx)
	}
	if errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("no store at %s: %w", dir, ErrNotFound)
	}
	if err != nil {
		return nil, err
	}
	return s, nil
}

func (s *Store) readStoreFile() error {
	name := s.path("store.json")
	b, err := readSmall(s.fs, name)
	if err != nil {
		return err
	}
	var f storeFile
	if err = unseal(b, &f); err == nil && (f.Format != formatName || f.UUID == uuid.Nil) {
		err = errors.New("not a flic-migrate store")
	}
	if err != nil {
		return &integrity.CorruptError{File: name, What: "store description", Err: err}
	}
	if f.Version != Version {
		return fmt.Errorf("%s: store version %d is not known here", name, f.Version)
	}
	s.uuid = f.UUID
	return nil
}

func (s *Store) create(ctx context.Context) error {
	for _, d := range []string{"", "tmp", "nvram", "vms"} {
		if err := s.fs.MkdirAll(s.path(d)); err != nil {
			return err
		}
	}
	unlock, err := s.lock(ctx)
	if err != nil {
		return err
	}
	defer unlock()
	// Another process may have been first.
	if err := s.readStoreFile(); !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	b, err := seal(storeFile{formatName, Version, uuid.New()})
	if err != nil {
		return err
	}
	if err := s.writeSmall(s.path("store.json"), b); err != nil {
		return err
	}
	return s.readStoreFile()
}

// Dir is the store's directory.
func (s *Store) Dir() string { return s.dir }

// UUID is the store's identity, which marks its extents in NVRAM files.
func (s *Store) UUID() uuid.UUID { return s.uuid }

func (s *Store) path(elem ...string) string {
	return filepath.Join(append([]string{s.dir}, elem...)...)
}

// lock takes the store lock, waiting for it until ctx is done.
func (s *Store) lock(ctx context.Context) (unlock func(), err error) {
	l, err := s.fs.Lock(ctx, s.path("lock"), vfs.Exclusive)
	if err != nil {
		return nil, err
	}
	return func() { l.Close() }, nil
}

// sealed is how small JSON files are stored, so that no stored byte is without
// a checksum: {"crc32c":…, "body":{…}}.
type sealed struct {
	CRC  uint32          `json:"crc32c"`
	Body json.RawMessage `json:"body"`
}

func seal(v any) ([]byte, error) {
	body, err := json.Marshal(v)
	if err != nil {
		return nil, err
	}
	return json.Marshal(sealed{integrity.Checksum(body), body})
}

func unseal(b []byte, v any) error {
	var f sealed
	if err := json.Unmarshal(b, &f); err != nil {
		return err
	}
	if integrity.Checksum(f.Body) != f.CRC {
		return integrity.ErrChecksum
	}
	// Only what seal wrote is accepted: a byte changed outside of the body,
	// such as a space, is damage too.
	again, err := json.Marshal(f)
	if err != nil || string(again) != string(b) {
		return errors.New("not as it was written")
	}
	return json.Unmarshal(f.Body, v)
}

// maxSmall caps a sealed file: the largest holds workingset.MaxTouched runs.
const maxSmall = 32 << 20

func readSmall(fsys vfs.FS, name string) ([]byte, error) {
	f, err := fsys.Open(name)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	n, err := f.Size()
	if err != nil {
		return nil, err
	}
	if n > maxSmall {
		return nil, &integrity.CorruptError{File: name, What: "file", Err: fmt.Errorf("%d bytes", n)}
	}
	b := make([]byte, n)
	if n > 0 {
		if _, err := f.ReadAt(b, 0); err != nil {
			return nil, err
		}
	}
	return b, nil
}

// writeSmall replaces name by a file with content b, durably. The caller holds
// the store lock, which keeps GC from the temporary file.
func (s *Store) writeSmall(name string, b []byte) error {
	tmp := s.path("tmp", uuid.NewString()+".new")
	f, err := s.fs.Create(tmp)
	if err != nil {
		return err
	}
	err = rescue.Call(func() error {
		_, err := f.Write(b)
		if err == nil {
			err = f.Sync()
		}
		return err
	})
	if cerr := f.Close(); err == nil {
		err = cerr
	}
	if err == nil {
		err = rescue.Call(func() error { return s.fs.Replace(tmp, name) })
	}
	if err != nil {
		s.fs.Remove(tmp)
		return err
	}
	return s.fs.SyncDir(filepath.Dir(name))
}

// CheckVM tells whether name can be a VM's name: 1 to 128 bytes of printable
// UTF-8 without '/' and '@', not starting with '.' or '-'.
func CheckVM(name string) error {
	bad := name == "" || len(name) > 128 || !utf8.ValidString(name) || strings.ContainsAny(name, "/@") ||
		name[0] == '.' || name[0] == '-'
	for _, r := range name {
		bad = bad || !unicode.IsPrint(r)
	}
	if bad {
		return fmt.Errorf("VM name %q: %w", name, ErrName)
	}
	return nil
}

// Ref names a checkpoint: the N-th of a VM; N = 0 means the newest.
type Ref struct {
	VM string
	N  int
}

func (r Ref) String() string {
	if r.N == 0 {
		return r.VM
	}
	return fmt.Sprintf("%s@%d", r.VM, r.N)
}

// ParseRef parses NAME[@N].
func ParseRef(s string) (Ref, error) {
	vm, num, numbered := strings.Cut(s, "@")
	if err := CheckVM(vm); err != nil {
		return Ref{}, err
	}
	if !numbered {
		return Ref{VM: vm}, nil
	}
	n, err := strconv.Atoi(num)
	if err != nil || n < 1 || n > MaxNumber || strconv.Itoa(n) != num {
		return Ref{}, fmt.Errorf("checkpoint number %q: %w", num, ErrName)
	}
	return Ref{vm, n}, nil
}

const (
	imageSuffix   = ".flic"
	touchedSuffix = ".touched"
)

func imageName(n int) string { return fmt.Sprintf("%08d", n) + imageSuffix }

func parseImageName(name string) (int, bool) {
	num, ok := strings.CutSuffix(name, imageSuffix)
	n, err := strconv.Atoi(num)
	return n, ok && err == nil && n >= 1 && imageName(n) == name
}

func (s *Store) imagePath(r Ref) string { return s.path("vms", r.VM, imageName(r.N)) }

// numbers lists a VM's checkpoints in rising order; none if the VM is unknown.
func (s *Store) numbers(vm string) ([]int, error) {
	entries, err := s.fs.ReadDir(s.path("vms", vm))
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	var ns []int
	for _, e := range entries {
		if n, ok := parseImageName(e.Name()); ok {
			ns = append(ns, n)
		}
	}
	sort.Ints(ns)
	return ns, nil
}

// VMs lists the names of the VMs that have checkpoints.
func (s *Store) VMs(ctx context.Context) ([]string, error) {
	entries, err := s.fs.ReadDir(s.path("vms"))
	if err != nil {
		return nil, err
	}
	var vms []string
	for _, e := range entries {
		if ns, err := s.numbers(e.Name()); err != nil {
			return nil, err
		} else if len(ns) > 0 {
			vms = append(vms, e.Name())
		}
	}
	return vms, nil
}

// List names all checkpoints: of one VM, or of all if vm is empty.
func (s *Store) List(ctx context.Context, vm string) ([]Ref, error) {
	vms := []string{vm}
	if vm == "" {
		var err error
		if vms, err = s.VMs(ctx); err != nil {
			return nil, err
		}
	}
	var refs []Ref
	for _, v := range vms {
		ns, err := s.numbers(v)
		if err != nil {
			return nil, err
		}
		for _, n := range ns {
			refs = append(refs, Ref{v, n})
		}
	}
	return refs, nil
}

// Resolve gives the number of the newest checkpoint to a Ref without one, and
// checks that the checkpoint exists.
func (s *Store) Resolve(ctx context.Context, r Ref) (Ref, error) {
	if err := CheckVM(r.VM); err != nil {
		return r, err
	}
	ns, err := s.numbers(r.VM)
	if err != nil {
		return r, err
	}
	if r.N == 0 && len(ns) > 0 {
		r.N = ns[len(ns)-1]
	}
	i := sort.SearchInts(ns, r.N)
	if r.N == 0 || i == len(ns) || ns[i] != r.N {
		return r, fmt.Errorf("checkpoint %v in store %s: %w", r, s.dir, ErrNotFound)
	}
	return r, nil
}

// openImage opens a checkpoint's image and keeps it from being removed until
// the file is closed.
func (s *Store) openImage(ctx context.Context, r Ref) (vfs.File, Ref, error) {
	unlock, err := s.lock(ctx)
	if err != nil {
		return nil, r, err
	}
	defer unlock()
	if r, err = s.Resolve(ctx, r); err != nil {
		return nil, r, err
	}
	f, err := s.fs.Open(s.imagePath(r))
	if err != nil {
		return nil, r, err
	}
	if err := f.TryLock(vfs.Shared); err != nil {
		f.Close()
		if errors.Is(err, vfs.ErrLocked) {
			err = fmt.Errorf("checkpoint %v: %w", r, ErrInUse)
		}
		return nil, r, err
	}
	return f, r, nil
}

// lastNumber is the highest number that a VM's checkpoints have had.
func (s *Store) lastNumber(vm string) (int, error) {
	ns, err := s.numbers(vm)
	if err != nil {
		return 0, err
	}
	last := 0
	if len(ns) > 0 {
		last = ns[len(ns)-1]
	}
	name := s.path("vms", vm, "last")
	b, err := readSmall(s.fs, name)
	if errors.Is(err, fs.ErrNotExist) {
		return last, nil
	}
	if err != nil {
		return 0, err
	}
	var removed int
	if err := unseal(b, &removed); err != nil {
		return 0, &integrity.CorruptError{File: name, What: "last number", Err: err}
	}
	return max(last, removed), nil
}

func (s *Store) touchedPath(r Ref) string {
	return strings.TrimSuffix(s.imagePath(r), imageSuffix) + touchedSuffix
}

// Touched returns what resumes of a checkpoint have learned; empty if there is
// nothing.
func (s *Store) Touched(ctx context.Context, r Ref) (*workingset.Touched, error) {
	t := new(workingset.Touched)
	name := s.touchedPath(r)
	b, err := readSmall(s.fs, name)
	if errors.Is(err, fs.ErrNotExist) {
		return t, nil
	}
	if err != nil {
		return nil, err
	}
	if err := unseal(b, t); err != nil {
		return nil, &integrity.CorruptError{File: name, What: "touched pages", Err: err}
	}
	return t, nil
}

// AddTouched adds what a resume has learned. Several resumes of one checkpoint
// may do so. What can't be read is replaced: it is a hint, not data.
func (s *Store) AddTouched(ctx context.Context, r Ref, pageSize int, blocks []string, runs []workingset.PageRun) error {
	unlock, err := s.lock(ctx)
	if err != nil {
		return err
	}
	defer unlock()
	if _, err := s.Resolve(ctx, r); err != nil {
		return err
	}
	t, err := s.Touched(ctx, r)
	if err != nil || t.PageSize != pageSize || !slices.Equal(t.Blocks, blocks) {
		t = &workingset.Touched{PageSize: pageSize, Blocks: blocks}
	}
	t.Add(runs)
	b, err := seal(t)
	if err != nil {
		return err
	}
	return s.writeSmall(s.touchedPath(r), b)
}

type nvramFile struct {
	Path string    `json:"path"`
	UUID uuid.UUID `json:"uuid"`
}

// useNVRAM records, before any extent of it is reserved, that saves of this
// store use an NVRAM file, so that GC finds what a killed save has left there.
func (s *Store) useNVRAM(ctx context.Context, path string, id uuid.UUID) error {
	abs, err := filepath.Abs(path)
	if err != nil {
		return err
	}
	name := s.path("nvram", id.String()+".json")
	want := nvramFile{abs, id}
	var have nvramFile
	if b, err := readSmall(s.fs, name); err == nil && unseal(b, &have) == nil && have == want {
		return nil
	}
	b, err := seal(want)
	if err != nil {
		return err
	}
	unlock, err := s.lock(ctx)
	if err != nil {
		return err
	}
	defer unlock()
	return s.writeSmall(name, b)
}

// GCReport says what a GC freed.
type GCReport struct {
	Parts        int      `json:"unfinished_saves"`   // .part files removed
	Bytes        int64    `json:"flash_bytes"`        // their size
	NVRAMExtents int      `json:"nvram_extents"`      // extents freed
	NVRAMBytes   int64    `json:"nvram_bytes"`        // their size
	GoneFiles    int      `json:"gone_files"`         // images outside of the store whose file is gone, their NVRAM kept for now
	Warnings     []string `json:"warnings,omitempty"` // what could not be looked at
}

// GC frees what ended or killed saves and interrupted removals have left: their
// files, and their extents in the NVRAM files this store has used. It can run
// at any time beside saves and restores.
func (s *Store) GC(ctx context.Context) (GCReport, error) { return s.GCAfter(ctx, DefaultGrace) }

// GCAfter is GC with another grace period for the hot pages of images outside of
// the store whose file is gone.
func (s *Store) GCAfter(ctx context.Context, grace time.Duration) (GCReport, error) {
	var rep GCReport
	unlock, err := s.lock(ctx)
	if err != nil {
		return rep, err
	}
	defer unlock()
	live := make(map[uuid.UUID]bool)
	if err := s.gcTmp(live, &rep); err != nil {
		return rep, err
	}
	if err := s.liveImages(ctx, live); err != nil {
		return rep, err
	}
	if err := s.gcLoose(ctx, grace, live, &rep); err != nil {
		return rep, err
	}
	entries, err := s.fs.ReadDir(s.path("nvram"))
	if err != nil {
		return rep, err
	}
	for _, e := range entries {
		if err := s.gcNVRAM(ctx, e.Name(), live, &rep); err != nil {
			rep.Warnings = append(rep.Warnings, err.Error())
		}
	}
	return rep, nil
}

// gcTmp removes what no process has locked, and adds the others to live.
func (s *Store) gcTmp(live map[uuid.UUID]bool, rep *GCReport) error {
	entries, err := s.fs.ReadDir(s.path("tmp"))
	if err != nil {
		return err
	}
	for _, e := range entries {
		path := s.path("tmp", e.Name())
		f, err := s.fs.Open(path)
		if err != nil {
			return err
		}
		size, _ := f.Size()
		if err := f.TryLock(vfs.Exclusive); err == nil {
			if err := s.fs.Remove(path); err != nil {
				f.Close()
				return err
			}
			rep.Parts++
			rep.Bytes += size
		} else if id, perr := uuid.Parse(strings.TrimSuffix(e.Name(), ".part")); perr == nil {
			live[id] = true
		}
		f.Close()
	}
	return s.fs.SyncDir(s.path("tmp"))
}

// gcTouched removes what was learned of checkpoints that are gone.
func (s *Store) gcTouched(vm string) error {
	entries, err := s.fs.ReadDir(s.path("vms", vm))
	if err != nil {
		return err
	}
	for _, e := range entries {
		stem, ok := strings.CutSuffix(e.Name(), touchedSuffix)
		if !ok {
			continue
		}
		if _, err := s.fs.Stat(s.path("vms", vm, stem+imageSuffix)); errors.Is(err, fs.ErrNotExist) {
			if err := s.fs.Remove(s.path("vms", vm, e.Name())); err != nil {
				return err
			}
		}
	}
	return nil
}

// liveImages adds the owners of all committed images. An image whose header
// can't be read stops GC: its NVRAM must not be given away because of it.
func (s *Store) liveImages(ctx context.Context, live map[uuid.UUID]bool) error {
	// What is listed below is only believed once it is durable: a removal
	// that a power cut undoes must not have lost its NVRAM part (see commit).
	vms, err := s.fs.ReadDir(s.path("vms"))
	if err != nil {
		return err
	}
	for _, e := range vms {
		if err := s.gcTouched(e.Name()); err != nil {
			return err
		}
		if err := s.fs.SyncDir(s.path("vms", e.Name())); err != nil {
			return err
		}
	}
	refs, err := s.List(ctx, "")
	if err != nil {
		return err
	}
	for _, r := range refs {
		f, err := s.fs.Open(s.imagePath(r))
		if err != nil {
			return err
		}
		h, err := image.ReadHeader(f)
		f.Close()
		if err != nil {
			return fmt.Errorf("gc stops, because it can't tell which NVRAM this checkpoint owns: %w", err)
		}
		live[h.UUID] = true
	}
	return nil
}

func (s *Store) gcNVRAM(ctx context.Context, name string, live map[uuid.UUID]bool, rep *GCReport) error {
	path := s.path("nvram", name)
	b, err := readSmall(s.fs, path)
	if err != nil {
		return err
	}
	var nf nvramFile
	if err := unseal(b, &nf); err != nil {
		return &integrity.CorruptError{File: path, What: "NVRAM file's name", Err: err}
	}
	f, err := nvram.Open(ctx, s.fs, nf.Path, nvram.Options{})
	if err != nil {
		return fmt.Errorf("NVRAM file %s was not looked at: %w", nf.Path, err)
	}
	defer f.Close()
	if f.UUID() != nf.UUID {
		return fmt.Errorf("NVRAM file %s is another one now", nf.Path)
	}
	freed, err := f.Sweep(ctx, s.uuid, func(owner uuid.UUID) bool { return live[owner] })
	rep.NVRAMExtents += freed
	rep.NVRAMBytes += int64(freed) * nvram.ExtentSize
	return err
}
