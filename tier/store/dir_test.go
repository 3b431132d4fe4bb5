package store

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"path"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/flic-migrate/flic-migrate/tier/integrity"
	"github.com/flic-migrate/flic-migrate/tier/vfs"
	"github.com/flic-migrate/flic-migrate/tier/vfs/crashfs"
)

// TestDir holds every implementation of Dir to what a store asks of it.
func TestDir(t *testing.T) {
	for name, make := range map[string]func(t *testing.T) Dir{
		"os": func(t *testing.T) Dir {
			d, err := newPosixDir(vfs.OS, t.TempDir())
			if err != nil {
				t.Fatal(err)
			}
			return d
		},
		"crashfs": func(t *testing.T) Dir {
			d, err := newPosixDir(crashfs.New(0), "/store")
			if err != nil {
				t.Fatal(err)
			}
			return d
		},
		"memory": func(t *testing.T) Dir { return newMemDir() },
	} {
		t.Run(name, func(t *testing.T) { testDir(t, make) })
	}
}

// testDir is the suite. make returns an empty place.
func testDir(t *testing.T, make func(t *testing.T) Dir) {
	ctx := context.Background()
	begin := func(t *testing.T) Dir {
		d := make(t)
		for _, folder := range []string{"", "tmp", "vms/a"} {
			if err := d.Mkdir(ctx, folder); err != nil {
				t.Fatal(err)
			}
		}
		return d
	}
	check := func(t *testing.T, what string, err error, want error) {
		t.Helper()
		if want == nil && err != nil || !errors.Is(err, want) {
			t.Errorf("%s: %v, want %v", what, err, want)
		}
	}
	// object makes an object with content.
	object := func(t *testing.T, d Dir, name, content string) {
		t.Helper()
		f, err := d.Create(ctx, name)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := io.WriteString(f, content); err != nil {
			t.Error(err)
		}
		check(t, "sync", f.Sync(), nil)
		check(t, "close", f.Close(), nil)
	}
	content := func(t *testing.T, d Dir, name, want string) {
		t.Helper()
		b, err := d.Read(ctx, name, 100)
		if err != nil || string(b) != want {
			t.Errorf("%s holds %q, %v, want %q", name, b, err, want)
		}
	}
	names := func(t *testing.T, d Dir, folder string, want ...string) {
		t.Helper()
		list, err := d.List(ctx, folder)
		var got []string
		for _, e := range list {
			got = append(got, fmt.Sprint(e.Name, e.Folder))
		}
		if err != nil || !slices.Equal(got, want) {
			t.Errorf("%s holds %q, %v, want %q", folder, got, err, want)
		}
	}

	t.Run("names", func(t *testing.T) {
		d := begin(t)
		names(t, d, "", "tmptrue", "vmstrue")
		names(t, d, "tmp")
		check(t, "mkdir again", d.Mkdir(ctx, "vms/a"), nil)
		object(t, d, "vms/a/2", "x")
		object(t, d, "vms/a/1", "y")
		names(t, d, "vms/a", "1false", "2false")
		_, err := d.List(ctx, "vms/b")
		check(t, "list of no folder", err, fs.ErrNotExist)
		check(t, "remove", d.Remove(ctx, "vms/a/2"), nil)
		check(t, "remove again", d.Remove(ctx, "vms/a/2"), fs.ErrNotExist)
		names(t, d, "vms/a", "1false")
		check(t, "sync", d.Sync(ctx, "vms/a"), nil)
		if p := d.Path("vms/a/1"); !strings.HasSuffix(p, "vms/a/1") {
			t.Errorf("path %s", p)
		}
	})
	t.Run("stamps", func(t *testing.T) {
		d := begin(t)
		stamp := func(name string) vfs.Stamp {
			t.Helper()
			list, err := d.Look(ctx, "vms/a", nil)
			plain, lerr := d.List(ctx, "vms/a")
			if err != nil || lerr != nil || len(list) != len(plain) {
				t.Fatalf("%v, %v; %v, %v", list, err, plain, lerr)
			}
			var found vfs.Stamp
			for i, e := range list {
				if e.Name != plain[i].Name || e.Folder != plain[i].Folder || e.Odd != plain[i].Odd {
					t.Errorf("look has %v, list %v", e, plain[i])
				}
				if e.Name == name {
					found = e.Stamp
				}
			}
			some, err := d.Look(ctx, "vms/a", func(n string) bool { return n == name })
			if err != nil || len(some) != len(list) {
				t.Fatalf("a look at one: %v, %v", some, err)
			}
			for i, e := range some {
				if want := list[i]; e.Name != name {
					want.Stamp = vfs.Stamp{}
					if e != want {
						t.Errorf("a look at %s has %v, and at all %v", name, e, want)
					}
				}
			}
			return found
		}
		object(t, d, "vms/a/1", "x")
		object(t, d, "vms/a/2", "x")
		one := stamp("1")
		if two := stamp("2"); one.Size != 1 || one == two || one != stamp("1") {
			t.Errorf("%+v, another %+v", one, two)
		}
		time.Sleep(20 * time.Millisecond) // a tick of the clock
		check(t, "write", d.Write(ctx, "vms/a/1", "tmp/s", []byte("y")), nil)
		again := stamp("1")
		if again == one {
			t.Errorf("one of another content is %+v, too", again)
		}
		check(t, "cache", d.Cache(ctx, "vms/a/1", "tmp/s", []byte("z")), nil)
		content(t, d, "vms/a/1", "z")
		if now := stamp("1"); now == again {
			t.Errorf("one of another content is %+v, too", now)
		}
		check(t, "empty", d.Empty(ctx, "vms/a/2", "tmp/s"), nil)
		if e := stamp("2"); e.Size != 0 {
			t.Errorf("an empty one: %+v", e)
		}
		_, err := d.Look(ctx, "vms/b", nil)
		check(t, "look at no folder", err, fs.ErrNotExist)
		check(t, "cache in no folder", d.Cache(ctx, "vms/b/1", "tmp/s", nil), fs.ErrNotExist)
	})
	t.Run("identity", func(t *testing.T) {
		d, other := begin(t), begin(t)
		a, err := d.ID(ctx)
		check(t, "ID", err, nil)
		again, _ := d.ID(ctx)
		b, _ := other.ID(ctx)
		if a == "" || a != again || a == b {
			t.Errorf("%q, again %q, another's %q", a, again, b)
		}
	})
	t.Run("objects", func(t *testing.T) {
		d := begin(t)
		f, err := d.Create(ctx, "tmp/x")
		if err != nil {
			t.Fatal(err)
		}
		_, err = d.Create(ctx, "tmp/x")
		check(t, "create again", err, fs.ErrExist)
		io.WriteString(f, "one ")
		io.WriteString(f, "two")
		b := [3]byte{}
		if n, err := f.ReadAt(b[:], 4); string(b[:n]) != "two" || err != nil && err != io.EOF {
			t.Errorf("read back %q, %v", b[:n], err)
		}
		if n, err := f.ReadAt(b[:], 5); string(b[:n]) != "wo" || err != io.EOF {
			t.Errorf("at the end %q, %v", b[:n], err)
		}
		if n, err := f.Size(); n != 7 || err != nil {
			t.Errorf("size %d, %v", n, err)
		}
		f.Close()
		content(t, d, "tmp/x", "one two")
		_, err = d.Read(ctx, "tmp/x", 6)
		check(t, "read of too much", err, vfs.ErrTooLarge)
		_, err = d.Read(ctx, "tmp/y", 6)
		check(t, "read of nothing", err, fs.ErrNotExist)
		_, err = d.Open(ctx, "tmp/y", Shared)
		check(t, "open of nothing", err, fs.ErrNotExist)
		_, err = d.Open(ctx, "vms/a", Shared)
		if check(t, "open of a folder", err, errNotObject); !integrity.IsCorrupt(err) {
			t.Errorf("open of a folder is no damage: %v", err)
		}
		check(t, "empty", d.Empty(ctx, "tmp/x", "tmp/spare"), nil)
		content(t, d, "tmp/x", "")
		check(t, "empty of nothing", d.Empty(ctx, "tmp/y", "tmp/spare"), fs.ErrNotExist)
		check(t, "write", d.Write(ctx, "vms/a/w", "tmp/spare", []byte("first")), nil)
		check(t, "write over it", d.Write(ctx, "vms/a/w", "tmp/spare", []byte("2nd")), nil)
		content(t, d, "vms/a/w", "2nd")
		names(t, d, "tmp", "xfalse")
	})
	t.Run("commit", func(t *testing.T) {
		d := begin(t)
		object(t, d, "tmp/x", "image")
		object(t, d, "tmp/y", "another")
		check(t, "commit", d.Commit(ctx, "tmp/x", "vms/a/1"), nil)
		content(t, d, "vms/a/1", "image")
		check(t, "commit to a name that is taken", d.Commit(ctx, "tmp/y", "vms/a/1"), fs.ErrExist)
		content(t, d, "vms/a/1", "image")
		content(t, d, "tmp/y", "another")
		check(t, "commit of nothing", d.Commit(ctx, "tmp/x", "vms/a/2"), fs.ErrNotExist)
		names(t, d, "tmp", "yfalse")
		// Of many that want a name one gets it.
		var all sync.WaitGroup
		var won sync.Map
		for i := range 8 {
			name := fmt.Sprintf("tmp/%d", i)
			object(t, d, name, name)
			all.Go(func() {
				if err := d.Commit(ctx, name, "vms/a/3"); err == nil {
					won.Store(name, true)
				} else {
					check(t, "commit together", err, fs.ErrExist)
				}
			})
		}
		all.Wait()
		n := 0
		won.Range(func(name, _ any) bool { n++; content(t, d, "vms/a/3", name.(string)); return true })
		if n != 1 {
			t.Errorf("%d have got the name", n)
		}
	})
	t.Run("stage", func(t *testing.T) {
		d := begin(t)
		_, err := d.Reopen(ctx, "tmp/x")
		check(t, "reopen of nothing", err, fs.ErrNotExist)
		names(t, d, "tmp")
		f, err := d.Stage(ctx, "tmp/x")
		check(t, "stage", err, nil)
		_, err = f.WriteAt([]byte("staged"), 0)
		check(t, "write", err, nil)
		_, err = d.Reopen(ctx, "tmp/x")
		check(t, "reopen of one that is locked", err, vfs.ErrLocked)
		f.Close()
		f, err = d.Reopen(ctx, "tmp/x")
		check(t, "reopen", err, nil)
		_, err = f.WriteAt([]byte("S"), 0)
		check(t, "write", err, nil)
		f.Close()
		content(t, d, "tmp/x", "Staged")
	})
	t.Run("replace", func(t *testing.T) {
		d := begin(t)
		object(t, d, "vms/a/1", "old")
		object(t, d, "tmp/x", "new")
		check(t, "keep", d.Keep(ctx, "vms/a/1", "vms/a/2"), nil)
		check(t, "keep under a name that is taken", d.Keep(ctx, "tmp/x", "vms/a/2"), fs.ErrExist)
		check(t, "keep of nothing", d.Keep(ctx, "tmp/y", "vms/a/3"), fs.ErrNotExist)
		check(t, "replace", d.Replace(ctx, "tmp/x", "vms/a/1"), nil)
		check(t, "replace by nothing", d.Replace(ctx, "tmp/x", "vms/a/1"), fs.ErrNotExist)
		content(t, d, "vms/a/1", "new")
		content(t, d, "vms/a/2", "old")
		names(t, d, "tmp")
	})
	t.Run("locks", func(t *testing.T) {
		d := begin(t)
		f, err := d.Create(ctx, "tmp/x")
		check(t, "create", err, nil)
		_, err = d.Open(ctx, "tmp/x", Shared)
		check(t, "shared of what is being made", err, vfs.ErrLocked)
		u, err := d.Open(ctx, "tmp/x", Unlocked)
		check(t, "unlocked", err, nil)
		u.Close()
		// The lock is the object's, under every name.
		check(t, "commit", d.Commit(ctx, "tmp/x", "vms/a/1"), nil)
		_, err = d.Open(ctx, "vms/a/1", Exclusive)
		check(t, "exclusive of what is being made", err, vfs.ErrLocked)
		f.Close()
		a, err := d.Open(ctx, "vms/a/1", Shared)
		check(t, "shared", err, nil)
		b, err := d.Open(ctx, "vms/a/1", Shared)
		check(t, "shared by two", err, nil)
		a.Close()
		_, err = d.Open(ctx, "vms/a/1", Exclusive)
		check(t, "exclusive of what is read", err, vfs.ErrLocked)
		// A removed object can be read by those who have it.
		check(t, "remove", d.Remove(ctx, "vms/a/1"), nil)
		if _, err := b.Size(); err != nil {
			t.Error(err)
		}
		b.Close()
	})
	t.Run("the lock", func(t *testing.T) {
		d := begin(t)
		l, err := d.Lock(ctx, "lock")
		check(t, "lock", err, nil)
		ended, cancel := context.WithCancelCause(ctx)
		cause := errors.New("the caller has had enough")
		cancel(cause)
		_, err = d.Lock(ended, "lock")
		check(t, "wait with a context that has ended", err, cause)
		got := false
		var waiting sync.WaitGroup
		waiting.Go(func() {
			l, err := d.Lock(ctx, "lock")
			check(t, "lock after the wait", err, nil)
			got = true
			l.Close()
		})
		l.Close()
		waiting.Wait()
		if !got {
			t.Error("nobody has got it")
		}
	})
}

// TestStoreLockLimit: who waits for a store lock that nobody gives up is told what
// for, and waits no longer than the limit.
func TestStoreLockLimit(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s, disk := newStore(t)
		l, err := disk.Lock(t.Context(), "/store/lock", vfs.Exclusive)
		if err != nil {
			t.Fatal(err)
		}
		defer l.Close()
		other, err := Open(t.Context(), disk.Fork(), "/store", false)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := other.Begin(t.Context(), "vm"); !errors.Is(err, vfs.ErrLocked) || !strings.Contains(err.Error(), "lock of store /store") {
			t.Errorf("begin: %v", err)
		}
		// The others need no lock, or end with their context.
		if _, err := s.Identities(t.Context(), ""); err != nil {
			t.Error(err)
		}
		ctx, cancel := context.WithCancel(t.Context())
		cancel()
		if _, err := s.GC(ctx); !errors.Is(err, context.Canceled) {
			t.Errorf("gc: %v", err)
		}
	})
}

// memDir is a Dir in memory, as an object store would be one: it has no files, no
// renames but Commit, and no locks but its own.
type memDir struct {
	mu      sync.Mutex
	id      string
	folders map[string]bool
	objects map[string]*memObject
	lock    chan struct{} // full while it is held
}

type memObject struct {
	b       []byte
	serial  uint64
	readers int
	writer  bool
}

var memDirs int

// memSerial numbers the objects of all memDirs.
var memSerial atomic.Uint64

func newMemDir() *memDir {
	memDirs++
	return &memDir{id: fmt.Sprint("memory ", memDirs), folders: map[string]bool{}, objects: map[string]*memObject{}, lock: make(chan struct{}, 1)}
}

func memError(op, name string, err error) error {
	return &fs.PathError{Op: op, Path: "memory:" + name, Err: err}
}

func (d *memDir) Path(name string) string            { return "memory:" + name }
func (d *memDir) ID(context.Context) (string, error) { return d.id, nil }
func (d *memDir) Sync(context.Context, string) error { return nil }

func (d *memDir) find(op, name string) (*memObject, error) {
	if o := d.objects[name]; o != nil {
		return o, nil
	}
	return nil, memError(op, name, fs.ErrNotExist)
}

func (d *memDir) Mkdir(_ context.Context, folder string) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	for ; folder != "." && folder != ""; folder = path.Dir(folder) {
		d.folders[folder] = true
	}
	return nil
}

func (d *memDir) List(_ context.Context, folder string) (list []Entry, err error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if folder != "" && !d.folders[folder] {
		return nil, memError("list", folder, fs.ErrNotExist)
	}
	in := func(name string) bool { return path.Dir(name) == cmp.Or(folder, ".") }
	for name := range d.folders {
		if in(name) {
			list = append(list, Entry{Name: path.Base(name), Folder: true})
		}
	}
	for name := range d.objects {
		if in(name) {
			o := d.objects[name]
			list = append(list, Entry{Name: path.Base(name), Stamp: vfs.Stamp{Size: int64(len(o.b)), Inode: o.serial}})
		}
	}
	slices.SortFunc(list, func(a, b Entry) int { return cmp.Compare(a.Name, b.Name) })
	return list, nil
}

func (d *memDir) Look(ctx context.Context, folder string, look func(string) bool) ([]Entry, error) {
	list, err := d.List(ctx, folder)
	for i := range list {
		if look != nil && !look(list[i].Name) {
			list[i].Stamp = vfs.Stamp{}
		}
	}
	return list, err
}

func (d *memDir) Read(_ context.Context, name string, limit int64) ([]byte, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	o, err := d.find("read", name)
	if err == nil && int64(len(o.b)) > limit {
		err = memError("read", name, vfs.ErrTooLarge)
	}
	if err != nil {
		return nil, err
	}
	return bytes.Clone(o.b), nil
}

func (d *memDir) Write(_ context.Context, name, _ string, b []byte) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.objects[name] = &memObject{b: bytes.Clone(b), serial: memSerial.Add(1)}
	return nil
}

func (d *memDir) Cache(ctx context.Context, name, spare string, b []byte) error {
	d.mu.Lock()
	there := d.folders[path.Dir(name)]
	d.mu.Unlock()
	if !there {
		return memError("cache", name, fs.ErrNotExist)
	}
	return d.Write(ctx, name, spare, b)
}

func (d *memDir) Create(_ context.Context, name string) (Object, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.objects[name] != nil {
		return nil, memError("create", name, fs.ErrExist)
	}
	o := &memObject{writer: true, serial: memSerial.Add(1)}
	d.objects[name] = o
	return &memHandle{d, o, name, Exclusive}, nil
}

func (d *memDir) Stage(_ context.Context, name string) (Stage, error) {
	return d.stage(name, true)
}

func (d *memDir) Reopen(_ context.Context, name string) (Stage, error) {
	return d.stage(name, false)
}

func (d *memDir) stage(name string, create bool) (Stage, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	o := d.objects[name]
	if o == nil && !create {
		return nil, memError("reopen", name, fs.ErrNotExist)
	}
	if o == nil {
		o = &memObject{serial: memSerial.Add(1)}
		d.objects[name] = o
	}
	if o.writer || o.readers > 0 {
		return nil, memError("stage", name, vfs.ErrLocked)
	}
	o.writer = true
	return &memHandle{d, o, name, Exclusive}, nil
}

func (h *memHandle) WriteAt(b []byte, off int64) (int, error) {
	h.d.mu.Lock()
	defer h.d.mu.Unlock()
	if end := off + int64(len(b)); end > int64(len(h.o.b)) {
		h.o.b = append(h.o.b, make([]byte, end-int64(len(h.o.b)))...)
	}
	return copy(h.o.b[off:], b), nil
}

func (h *memHandle) Truncate(size int64) error {
	h.d.mu.Lock()
	defer h.d.mu.Unlock()
	h.o.b = append(bytes.Clone(h.o.b), make([]byte, max(0, size-int64(len(h.o.b))))...)[:size]
	return nil
}

func (d *memDir) Open(_ context.Context, name string, lock Locking) (Object, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.folders[name] {
		return nil, notObject(d.Path(name), memError("open", name, fs.ErrInvalid))
	}
	o, err := d.find("open", name)
	if err != nil {
		return nil, err
	}
	if lock != Unlocked && o.writer || lock == Exclusive && o.readers > 0 {
		return nil, memError("open", name, vfs.ErrLocked)
	}
	switch lock {
	case Shared:
		o.readers++
	case Exclusive:
		o.writer = true
	}
	return &memHandle{d, o, name, lock}, nil
}

func (d *memDir) Holders(context.Context, string) []string { return nil }

func (d *memDir) Commit(_ context.Context, from, to string) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	o, err := d.find("commit", from)
	if err != nil {
		return err
	}
	if d.objects[to] != nil {
		return memError("commit", to, fs.ErrExist)
	}
	d.objects[to] = o
	delete(d.objects, from)
	return nil
}

func (d *memDir) Replace(_ context.Context, from, to string) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	o, err := d.find("replace", from)
	if err == nil {
		d.objects[to] = o
		delete(d.objects, from)
	}
	return err
}

func (d *memDir) Keep(_ context.Context, name, second string) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	o, err := d.find("keep", name)
	if err == nil && d.objects[second] != nil {
		err = memError("keep", second, fs.ErrExist)
	}
	if err == nil {
		d.objects[second] = o
	}
	return err
}

// Punch implements Dir: it can't.
func (d *memDir) Punch(context.Context, string, []byteRange) (int64, error) { return 0, nil }

func (d *memDir) Remove(_ context.Context, name string) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	_, err := d.find("remove", name)
	delete(d.objects, name)
	return err
}

func (d *memDir) Empty(_ context.Context, name, _ string) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	o, err := d.find("empty", name)
	if err == nil {
		o.b = nil
	}
	return err
}

func (d *memDir) Lock(ctx context.Context, name string) (io.Closer, error) {
	if ctx.Err() == nil {
		select {
		case d.lock <- struct{}{}:
			return closer(func() { <-d.lock }), nil
		case <-ctx.Done():
		}
	}
	return nil, memError("lock", name, context.Cause(ctx))
}

type closer func()

func (c closer) Close() error { c(); return nil }

// memMapping is a copy of what an object had.
type memMapping []byte

func (m memMapping) Bytes() []byte           { return m }
func (m memMapping) Sync(off, n int64) error { return nil }
func (m memMapping) WillNeed(off, n int64)   {}
func (m memMapping) DontNeed(off, n int64)   {}
func (m memMapping) Close() error            { return nil }

func (h *memHandle) Map(off, n int64, _ bool) (vfs.Mapping, error) {
	h.d.mu.Lock()
	defer h.d.mu.Unlock()
	return memMapping(bytes.Clone(h.o.b[off : off+n])), nil
}

type memHandle struct {
	d    *memDir
	o    *memObject
	name string
	lock Locking
}

func (h *memHandle) Name() string                { return h.d.Path(h.name) }
func (h *memHandle) Sync() error                 { return nil }
func (h *memHandle) StartWriteback(off, n int64) {}

func (h *memHandle) Size() (int64, error) {
	h.d.mu.Lock()
	defer h.d.mu.Unlock()
	return int64(len(h.o.b)), nil
}

func (h *memHandle) Allocated() (int64, error) { return h.Size() }

func (h *memHandle) Links() (n int, err error) {
	h.d.mu.Lock()
	defer h.d.mu.Unlock()
	for _, o := range h.d.objects {
		if o == h.o {
			n++
		}
	}
	return n, nil
}

func (h *memHandle) Inode() (uint64, error) { return h.o.serial, nil }

func (h *memHandle) ReadAt(b []byte, off int64) (int, error) {
	h.d.mu.Lock()
	defer h.d.mu.Unlock()
	return bytes.NewReader(h.o.b).ReadAt(b, off)
}

func (h *memHandle) Write(b []byte) (int, error) {
	h.d.mu.Lock()
	defer h.d.mu.Unlock()
	h.o.b = append(h.o.b, b...)
	return len(b), nil
}

func (h *memHandle) Close() error {
	h.d.mu.Lock()
	defer h.d.mu.Unlock()
	switch h.lock {
	case Shared:
		h.o.readers--
	case Exclusive:
		h.o.writer = false
	}
	h.lock = Unlocked
	return nil
}

// TestStoreInMemory runs a store's life on the Dir in memory.
func TestStoreInMemory(t *testing.T) {
	s := &Store{dir: newMemDir(), fs: crashfs.New(0), root: "/"}
	if err := s.create(t.Context()); err != nil {
		t.Fatal(err)
	}
	for n := 1; n <= 3; n++ {
		if ref := mustCommit(t, s, "vm"); ref.N != n {
			t.Errorf("checkpoint %v", ref)
		}
	}
	for _, n := range []int{3, 1} {
		if rm, err := s.Remove(t.Context(), Ref{"vm", n}); err != nil || rm.Left != nil || rm.FlashBytes == 0 {
			t.Errorf("remove: %+v, %v", rm, err)
		}
	}
	if rep, err := s.GC(t.Context()); err != nil || rep.Parts+rep.Removed != 0 {
		t.Errorf("gc: %+v, %v", rep, err)
	}
	list, err := s.Identities(t.Context(), "")
	if err != nil || len(list) != 1 || list[0].Ref.N != 2 || list[0].Identity.Number != 2 {
		t.Errorf("list: %+v, %v", list, err)
	}
	if ref := mustCommit(t, s, "vm"); ref.N != 4 {
		t.Errorf("checkpoint %v", ref)
	}
}
