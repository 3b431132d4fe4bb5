package tier_test

import (
	"bytes"
	"context"
	"errors"
	"io"
	"os"
	"path/filepath"
	"runtime/debug"
	"sync"
	"sync/atomic"
	"testing"

	"github.com/flic-migrate/flic-migrate/tier/checkpoint"
	"github.com/flic-migrate/flic-migrate/tier/dedup"
	"github.com/flic-migrate/flic-migrate/tier/nvram"
	"github.com/flic-migrate/flic-migrate/tier/progress"
	"github.com/flic-migrate/flic-migrate/tier/restore"
	"github.com/flic-migrate/flic-migrate/tier/save"
	"github.com/flic-migrate/flic-migrate/tier/store"
	"github.com/flic-migrate/flic-migrate/tier/tiertest"
	"github.com/flic-migrate/flic-migrate/tier/vfs"
	"github.com/flic-migrate/flic-migrate/tier/vfs/crashfs"
	"github.com/flic-migrate/flic-migrate/tier/workingset"
)

// lab is a store and an NVRAM file on some file system.
type lab struct {
	fs    *countingFS
	dir   string
	nvram string
	st    *store.Store
}

// newLab makes a store on fsys in dir, which must be absolute.
func newLab(t testing.TB, fsys vfs.FS, dir string) *lab {
	t.Helper()
	l := &lab{fs: newCountingFS(fsys), dir: filepath.Join(dir, "store"), nvram: filepath.Join(dir, "nvram.img")}
	l.open(t)
	return l
}

func (l *lab) open(t testing.TB) {
	t.Helper()
	st, err := store.Open(context.Background(), l.fs, l.dir, true)
	if err != nil {
		t.Fatalf("open the store: %v", err)
	}
	l.st = st
}

// on returns the same store and NVRAM file as another process or the next boot
// sees them.
func (l *lab) on(t testing.TB, fsys vfs.FS) *lab {
	t.Helper()
	n := &lab{fs: newCountingFS(fsys), dir: l.dir, nvram: l.nvram}
	n.open(t)
	return n
}

// labs are the file systems that round trips run on.
func labs(t *testing.T) map[string]func(t *testing.T) *lab {
	return map[string]func(t *testing.T) *lab{
		"os":      func(t *testing.T) *lab { return newLab(t, vfs.OS, t.TempDir()) },
		"crashfs": func(t *testing.T) *lab { return newLab(t, crashfs.New(0), "/") },
	}
}

// noLeaks fails if a file, mapping or lock is still open.
func (l *lab) noLeaks(t testing.TB) {
	t.Helper()
	for _, name := range l.fs.leaks() {
		t.Errorf("still open: %s", name)
	}
}

// save saves a stream under o and must succeed.
func (l *lab) save(t testing.TB, s *tiertest.Stream, o save.Options) (store.Ref, *checkpoint.Meta) {
	t.Helper()
	ref, meta, err := l.trySave(s, o)
	if err != nil {
		t.Fatalf("save: %v", err)
	}
	return ref, meta
}

func (l *lab) trySave(s *tiertest.Stream, o save.Options) (store.Ref, *checkpoint.Meta, error) {
	r := s.Reader()
	defer r.Close()
	if o.VM == "" {
		o.VM = "vm"
	}
	if o.WorkingSet != nil && o.NVRAM == "" {
		o.NVRAM = l.nvram
	}
	return l.run(context.Background(), r, o)
}

// run is save.Run into the lab's store, with progress on as the command has it.
func (l *lab) run(ctx context.Context, in io.Reader, o save.Options) (store.Ref, *checkpoint.Meta, error) {
	if o.Progress == nil {
		o.Progress = func(progress.State) {}
	}
	return save.Run(ctx, l.fs, l.st, in, o)
}

// restore writes a checkpoint's stream to w.
func (l *lab) restore(ref store.Ref, w io.Writer) error {
	c, err := l.st.OpenCheckpoint(context.Background(), ref, checkpoint.Options{})
	if err != nil {
		return err
	}
	_, err = restore.Run(context.Background(), c.Checkpoint, w, restore.Options{})
	return errors.Join(err, c.Close())
}

func (l *lab) restored(t testing.TB, ref store.Ref) []byte {
	t.Helper()
	var b bytes.Buffer
	if err := l.restore(ref, &b); err != nil {
		t.Fatalf("restore of %v: %v", ref, err)
	}
	return b.Bytes()
}

// verify returns the damages that a verify of a checkpoint finds; what keeps it
// from being opened counts as one.
func (l *lab) verify(ref store.Ref) []error {
	c, err := l.st.OpenCheckpoint(context.Background(), ref, checkpoint.Options{})
	if err != nil {
		return []error{err}
	}
	defer c.Close()
	var found []error
	if err := c.Verify(context.Background(), func(err error) { found = append(found, err) }); err != nil {
		found = append(found, err)
	}
	return found
}

// holds fails unless the checkpoint verifies and gives the expected stream.
func (l *lab) holds(t testing.TB, ref store.Ref, s *tiertest.Stream) {
	t.Helper()
	for _, err := range l.verify(ref) {
		t.Errorf("verify of %v: %v", ref, err)
	}
	r := s.Expected()
	defer r.Close()
	cmp := &tiertest.Compare{R: r}
	if err := l.restore(ref, cmp); err != nil {
		t.Errorf("restore of %v: %v", ref, err)
	} else if err := cmp.Close(); err != nil {
		t.Errorf("restore of %v: %v", ref, err)
	}
}

// remove removes a checkpoint with its NVRAM part, which must be freed too.
func (l *lab) remove(ref store.Ref) error {
	rm, err := l.st.Remove(context.Background(), ref)
	return errors.Join(err, rm.Left)
}

// nvramFree is the room in the NVRAM file in bytes; -1 if there is no file.
func (l *lab) nvramFree(t testing.TB) int64 {
	t.Helper()
	if _, err := l.fs.Stat(l.nvram); err != nil {
		return -1
	}
	f, err := nvram.Open(context.Background(), l.fs, l.nvram, nvram.Options{ReadOnly: true})
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	n, err := f.Free(context.Background())
	if err != nil {
		t.Fatal(err)
	}
	return n
}

// tree lists the files of the store.
func (l *lab) tree(t testing.TB) []string {
	t.Helper()
	var list []string
	var walk func(dir string)
	walk = func(dir string) {
		entries, err := l.fs.ReadDir(filepath.Join(l.dir, dir))
		if err != nil {
			t.Fatal(err)
		}
		for _, e := range entries {
			name := filepath.Join(dir, e.Name())
			if e.IsDir() {
				walk(name)
			} else {
				list = append(list, name)
			}
		}
	}
	walk("")
	return list
}

// hotSet makes a working set of the pages for which heat is not 0.
func hotSet(t testing.TB, s *tiertest.Stream, heat func(block int, page uint64) uint8) *workingset.Set {
	t.Helper()
	ws, err := newHotSet(s, heat)
	if err != nil {
		t.Fatal(err)
	}
	return ws
}

func newHotSet(s *tiertest.Stream, heat func(block int, page uint64) uint8) (*workingset.Set, error) {
	blocks := make([]workingset.Block, len(s.Blocks()))
	for b := range blocks {
		blocks[b] = workingset.Block{Name: s.Blocks()[b].Name, Pages: int64(s.Pages(b))}
	}
	ws, err := workingset.New(s.PageSize(), blocks)
	if err != nil {
		return nil, err
	}
	for b := range blocks {
		for p := range s.Pages(b) {
			if h := heat(b, p); h != 0 {
				ws.SetHeat(b, int64(p), h)
			}
		}
	}
	return ws, nil
}

// every makes each n-th page of a block hot.
func every(n uint64) func(int, uint64) uint8 {
	return func(_ int, page uint64) uint8 {
		if page%n == 0 {
			return 1
		}
		return 0
	}
}

// countingFS knows which files, mappings and locks are open, with those of what its NoLinks
// has returned.
type countingFS struct {
	vfs.FS
	*counts
}

// counts are a countingFS's, and of all that come from it.
type counts struct {
	mu    sync.Mutex
	open  map[any]string
	reads atomic.Int64 // of files
}

func newCountingFS(fsys vfs.FS) *countingFS { return &countingFS{fsys, new(counts)} }

func (c *countingFS) NoLinks(dir string) (vfs.FS, error) {
	fsys, err := c.FS.NoLinks(dir)
	return &countingFS{fsys, c.counts}, err
}

func (c *counts) leaks() (names []string) {
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, name := range c.open {
		names = append(names, name)
	}
	return names
}

func (c *counts) add(x any, name string) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.open == nil {
		c.open = make(map[any]string)
	}
	c.open[x] = name
}

func (c *counts) remove(x any) {
	c.mu.Lock()
	defer c.mu.Unlock()
	delete(c.open, x)
}

type countedFile struct {
	vfs.File
	c *countingFS
}

func (c *countingFS) file(f vfs.File, err error) (vfs.File, error) {
	if err != nil {
		return nil, err
	}
	n := &countedFile{f, c}
	c.add(n, "file "+f.Name())
	return n, nil
}

func (c *countingFS) Create(name string) (vfs.File, error) { return c.file(c.FS.Create(name)) }
func (c *countingFS) Open(name string) (vfs.File, error)   { return c.file(c.FS.Open(name)) }
func (c *countingFS) OpenRW(name string) (vfs.File, error) { return c.file(c.FS.OpenRW(name)) }

func (f *countedFile) ReadAt(b []byte, off int64) (int, error) {
	f.c.reads.Add(1)
	return f.File.ReadAt(b, off)
}

func (f *countedFile) Close() error { f.c.remove(f); return f.File.Close() }

type countedMapping struct {
	vfs.Mapping
	c *countingFS
}

func (f *countedFile) Map(off, n int64, writable bool) (vfs.Mapping, error) {
	m, err := f.File.Map(off, n, writable)
	if err != nil {
		return nil, err
	}
	cm := &countedMapping{m, f.c}
	f.c.add(cm, "mapping of "+f.Name())
	return cm, nil
}

func (m *countedMapping) Close() error { m.c.remove(m); return m.Mapping.Close() }

type countedLock struct {
	vfs.Locked
	c *countingFS
}

func (c *countingFS) lock(l vfs.Locked, err error, name string) (vfs.Locked, error) {
	if err != nil {
		return nil, err
	}
	n := &countedLock{l, c}
	c.add(n, "lock "+name)
	return n, nil
}

func (c *countingFS) Lock(ctx context.Context, name string, mode vfs.LockMode) (vfs.Locked, error) {
	l, err := c.FS.Lock(ctx, name, mode)
	return c.lock(l, err, name)
}

func (c *countingFS) TryLock(name string, mode vfs.LockMode) (vfs.Locked, error) {
	l, err := c.FS.TryLock(name, mode)
	return c.lock(l, err, name)
}

func (l *countedLock) Close() error { l.c.remove(l); return l.Locked.Close() }

// fewer is how many seeds of n a test tries: a quarter under -short, as under the race detector,
// which finds in few what it finds in many, and takes ten times as long for each.
func fewer(n int) int {
	if testing.Short() {
		return n / 4
	}
	return n
}

// energies are the ways to look for equal pages that a test tries.
func energies() []dedup.Energy {
	if testing.Short() {
		return []dedup.Energy{dedup.EnergyFull}
	}
	return []dedup.Energy{dedup.EnergyFull, dedup.EnergyLow}
}

// TestMain lets garbage pile up: these tests make thousands of short saves, each
// with the buffers of a long one.
func TestMain(m *testing.M) {
	if doc := os.Getenv(childEnv); doc != "" {
		os.Exit(childMain(doc))
	}
	debug.SetGCPercent(800)
	os.Exit(m.Run())
}
