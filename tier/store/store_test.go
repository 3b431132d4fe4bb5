package store

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"reflect"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/uuid"

	"github.com/flic-migrate/flic-migrate/tier/checkpoint"
	"github.com/flic-migrate/flic-migrate/tier/image"
	"github.com/flic-migrate/flic-migrate/tier/integrity"
	"github.com/flic-migrate/flic-migrate/tier/nvram"
	"github.com/flic-migrate/flic-migrate/tier/transfer"
	"github.com/flic-migrate/flic-migrate/tier/vfs"
	"github.com/flic-migrate/flic-migrate/tier/vfs/crashfs"
	"github.com/flic-migrate/flic-migrate/tier/workingset"
)

// childEnv makes the test binary another process that commits to the store it
// names.
const childEnv = "FLIC_TEST_STORE_CHILD"

func TestMain(m *testing.M) {
	if dir := os.Getenv(childEnv); dir != "" {
		child(dir)
		return
	}
	os.Exit(m.Run())
}

func child(dir string) {
	s, err := Open(context.Background(), vfs.OS, dir, true)
	if err != nil {
		fmt.Println(err)
		os.Exit(1)
	}
	for range 20 {
		ref, err := commit(s, "vm")
		if err != nil {
			fmt.Println(err)
			os.Exit(1)
		}
		fmt.Println(ref.N)
	}
}

// commit commits an image of nothing.
func commit(s *Store, vm string) (Ref, error) {
	p, err := s.Begin(context.Background(), vm)
	if err != nil {
		return Ref{}, err
	}
	if err := finish(p); err != nil {
		p.Abort()
		return Ref{}, err
	}
	return p.Commit(context.Background())
}

func finish(p *Tx) error {
	w, err := image.NewWriter(p.image, image.Header{PageSize: 4096, SegmentPages: 2, UUID: p.uuid, Created: time.Now()}, image.None, 1)
	if err != nil {
		return err
	}
	m := checkpoint.Meta{Identity: checkpoint.Identity{VM: p.ref.VM, Number: p.ref.N, UUID: p.uuid, PageSize: 4096}}
	if p.nvfile != nil {
		m.NVRAM = &checkpoint.NVRAM{Path: p.nvfile.Path(), UUID: p.nvfile.UUID(), Slots: 1, Bytes: 4096}
	}
	doc, id, err := m.Documents()
	if err != nil {
		return err
	}
	return w.Finish(doc, id)
}

func mustCommit(t testing.TB, s *Store, vm string) Ref {
	t.Helper()
	ref, err := commit(s, vm)
	if err != nil {
		t.Fatal(err)
	}
	return ref
}

func newStore(t testing.TB) (*Store, *crashfs.FS) {
	t.Helper()
	disk := crashfs.New(0)
	s, err := Open(context.Background(), disk, "/store", true)
	if err != nil {
		t.Fatal(err)
	}
	return s, disk
}

// put replaces a file's content.
func put(t testing.TB, fsys vfs.FS, name string, b []byte) {
	t.Helper()
	fsys.Remove(name)
	f, err := fsys.Create(name)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if _, err := f.Write(b); err != nil {
		t.Fatal(err)
	}
}

func TestNames(t *testing.T) {
	long := strings.Repeat("x", 128)
	for name, ok := range map[string]bool{
		"vm": true, "web-1.example": true, "ä ö": true, "v": true, long: true, "a.": true, "a\\b": true,
		"": false, ".": false, "..": false, ".hidden": false, "-flag": false, "a/b": false, "/": false, "a@1": false,
		long + "x": false, "a\x00b": false, "a\nb": false, "\xff": false, "a\u2028b": false, "a\u00a0b": false,
	} {
		if err := CheckVM(name); (err == nil) != ok || err != nil && !errors.Is(err, ErrName) {
			t.Errorf("%q: %v", name, err)
		}
	}
	for s, want := range map[string]Ref{
		"vm": {"vm", 0}, "vm@1": {"vm", 1}, "vm@99999999": {"vm", MaxNumber}, "ä b@20": {"ä b", 20},
	} {
		if got, err := ParseRef(s); err != nil || got != want || got.String() != s {
			t.Errorf("%q: %v, %v", s, got, err)
		}
	}
	for _, s := range []string{"", "@1", "vm@", "vm@0", "vm@-1", "vm@01", "vm@+1", "vm@1 ", "vm@100000000", "vm@1@2", "vm@x", "../vm@1",
		"vm@99999999999999999999"} {
		if got, err := ParseRef(s); !errors.Is(err, ErrName) {
			t.Errorf("%q: %v, %v", s, got, err)
		}
	}
	s, _ := newStore(t)
	for _, name := range []string{"../escape", "a/b", ".", ""} {
		if _, err := s.Begin(context.Background(), name); !errors.Is(err, ErrName) {
			t.Errorf("Begin(%q): %v", name, err)
		}
		if _, err := s.Resolve(context.Background(), Ref{VM: name, N: 1}); !errors.Is(err, ErrName) {
			t.Errorf("Resolve(%q): %v", name, err)
		}
		if _, _, err := s.open(context.Background(), Ref{VM: name}, Shared); !errors.Is(err, ErrName) {
			t.Errorf("OpenImage(%q): %v", name, err)
		}
		if _, err := s.Remove(context.Background(), Ref{VM: name, N: 1}); !errors.Is(err, ErrName) {
			t.Errorf("Remove(%q): %v", name, err)
		}
	}
}

func TestOpen(t *testing.T) {
	disk := crashfs.New(0)
	if _, err := Open(context.Background(), disk, "/store", false); !errors.Is(err, ErrNotFound) {
		t.Errorf("no store: %v", err)
	}
	s, err := Open(context.Background(), disk, "/deep/er/store", true)
	if err != nil {
		t.Fatal(err)
	}
	again, err := Open(context.Background(), disk, "/deep/er/store", false)
	if err != nil || again.UUID() != s.UUID() || s.UUID() == uuid.Nil || again.Dir() != "/deep/er/store" {
		t.Errorf("opened again: %v, %v", again, err)
	}
	if again, err := Open(context.Background(), disk, "/deep/er/store", true); err != nil || again.UUID() != s.UUID() {
		t.Errorf("made again: %v, %v", again, err)
	}
	sealed := func(f storeDoc) []byte {
		b, err := integrity.Seal(f)
		if err != nil {
			t.Fatal(err)
		}
		return b
	}
	for name, b := range map[string][]byte{
		"empty":        {},
		"not JSON":     []byte("store"),
		"too large":    make([]byte, maxSealed+1),
		"another kind": sealed(storeDoc{Format: "another store", Version: 2, UUID: uuid.New()}),
		"no UUID":      sealed(storeDoc{Format: formatName, Version: Version}),
	} {
		put(t, disk, "/deep/er/store/store.json", b)
		if _, err := Open(context.Background(), disk, "/deep/er/store", true); !integrity.IsCorrupt(err) {
			t.Errorf("%s: %v", name, err)
		}
	}
	put(t, disk, "/deep/er/store/store.json", sealed(storeDoc{Format: formatName, Version: Version + 1, UUID: uuid.New()}))
	if _, err := Open(context.Background(), disk, "/deep/er/store", true); err == nil || integrity.IsCorrupt(err) || !strings.Contains(err.Error(), "version 3") {
		t.Errorf("a later version: %v", err)
	}
}

// A store that was made for nothing goes again, in whole, and only if nothing is in it; and
// who has opened it meanwhile saves all the same.
func TestUnmake(t *testing.T) {
	ctx := t.Context()
	s, disk := newStore(t)
	other, err := Open(ctx, disk, "/store", true)
	if err != nil {
		t.Fatal(err)
	}
	if err := other.Unmake(ctx); err != nil {
		t.Fatal(err)
	}
	if _, err := disk.Stat("/store/store.json"); err != nil {
		t.Fatalf("one that did not make it has taken it away: %v", err)
	}
	if err := s.Unmake(ctx); err != nil {
		t.Fatal(err)
	}
	if _, err := disk.Stat("/store"); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("it is still there: %v", err)
	}
	if _, err := Open(ctx, disk, "/store", false); !errors.Is(err, ErrNotFound) {
		t.Errorf("it can be opened: %v", err)
	}
	if err := s.Unmake(ctx); err != nil {
		t.Errorf("again: %v", err)
	}
	if ref := mustCommit(t, other, "vm"); ref.N != 1 {
		t.Errorf("%v", ref)
	}
	// It is the one's that has made it now, and in use.
	if err := other.Unmake(ctx); err != nil {
		t.Error(err)
	}
	if _, err := other.Resolve(ctx, Ref{"vm", 1}); err != nil {
		t.Error(err)
	}
	// A directory that was there stays, and so does a store in which somebody saves.
	if err := disk.MkdirAll("/bare"); err != nil {
		t.Fatal(err)
	}
	for _, inUse := range []bool{false, true} {
		if s, err = Open(ctx, disk, "/bare", true); err != nil {
			t.Fatal(err)
		}
		if inUse {
			tx, err := s.Begin(ctx, "vm")
			if err != nil {
				t.Fatal(err)
			}
			defer tx.Abort()
		}
		if err := s.Unmake(ctx); err != nil {
			t.Error(err)
		}
		_, err = disk.Stat("/bare/store.json")
		if _, derr := disk.Stat("/bare"); derr != nil || (err == nil) != inUse {
			t.Errorf("in use %v: %v, %v", inUse, err, derr)
		}
	}
}

// TestUnmakeLeft: what saves that have failed leave in a store is no reason for it to stay; what
// somebody may need is.
func TestUnmakeLeft(t *testing.T) {
	ctx := t.Context()
	armed := Armed{VM: "vm", Part: uuid.New(), Number: 1}
	stays := func(path string) func(*testing.T, *Store, *crashfs.FS) {
		return func(t *testing.T, s *Store, disk *crashfs.FS) {
			if err := disk.MkdirAll("/store/" + filepath.Dir(path)); err != nil {
				t.Fatal(err)
			}
			put(t, disk, "/store/"+path, nil)
		}
	}
	for name, c := range map[string]struct {
		left func(*testing.T, *Store, *crashfs.FS)
		goes bool
	}{
		"rate": {func(t *testing.T, s *Store, disk *crashfs.FS) {
			if _, err := s.FlashRate(ctx); err != nil {
				t.Fatal(err)
			}
		}, true},
		"armed and not any more": {func(t *testing.T, s *Store, disk *crashfs.FS) {
			if err := s.NoteArmed(ctx, armed); err != nil {
				t.Fatal(err)
			}
			if err := s.ForgetArmed(ctx, armed); err != nil {
				t.Fatal(err)
			}
		}, true},
		"armed": {func(t *testing.T, s *Store, disk *crashfs.FS) {
			if err := s.NoteArmed(ctx, armed); err != nil {
				t.Fatal(err)
			}
		}, false},
		"a checkpoint": {func(t *testing.T, s *Store, disk *crashfs.FS) { mustCommit(t, s, "vm") }, false},
		"disks": {func(t *testing.T, s *Store, disk *crashfs.FS) {
			stays("disks/key.json")(t, s, disk)
			stays("disks/lock")(t, s, disk)
		}, true},
		"an index":          {stays("disks/x.index"), false},
		"a loose image":     {stays("loose/x.json"), false},
		"an NVRAM file":     {stays("nvram/x.json"), false},
		"somebody's file":   {stays("notes.txt"), false},
		"somebody's folder": {stays("vms/vm/old/00000001.flic"), false},
	} {
		t.Run(name, func(t *testing.T) {
			s, disk := newStore(t)
			c.left(t, s, disk)
			disk.Heal()
			if err := s.Unmake(ctx); err != nil {
				t.Fatal(err)
			}
			_, err := disk.Stat("/store/store.json")
			if _, derr := disk.Stat("/store"); (err != nil) != c.goes || (derr != nil) != c.goes {
				t.Errorf("the store: %v, its directory: %v", err, derr)
			}
		})
	}
}

// TestUnmakeFailed: of a first checkpoint, or group, whose commit fails nothing is left, with the
// store.
func TestUnmakeFailed(t *testing.T) {
	ctx := t.Context()
	for name, commit := range map[string]func(*Store, *Tx) error{
		"checkpoint": func(_ *Store, tx *Tx) error {
			_, err := tx.Commit(ctx)
			return err
		},
		"group": func(s *Store, tx *Tx) error {
			_, err := s.CommitGroup(ctx, Group{Name: "shop", Mode: "stop"}, []*Tx{tx})
			return err
		},
	} {
		n := 0
		for ; ; n++ {
			s, disk := newStore(t)
			tx, err := s.Begin(ctx, "vm")
			if err == nil {
				err = finish(tx)
			}
			if err == nil {
				err = tx.Refer(ctx)
			}
			if err != nil {
				t.Fatal(err)
			}
			disk.FailAt(n, syscall.EIO)
			err = commit(s, tx)
			disk.Heal()
			if err == nil {
				break
			}
			if err := s.Unmake(ctx); err != nil {
				t.Errorf("%s, operation %d: %v", name, n, err)
			}
			if _, serr := disk.Stat("/store"); serr == nil && !IsUncertain(err) {
				t.Errorf("%s, operation %d: the store is there after %v", name, n, err)
			}
		}
		if n < 5 {
			t.Errorf("%s: only %d operations", name, n)
		}
	}
}

// TestOpenTogether makes one store from many processes at the same time.
func TestOpenTogether(t *testing.T) {
	disk := crashfs.New(0)
	var ids sync.Map
	var all sync.WaitGroup
	for range 8 {
		all.Go(func() {
			s, err := Open(context.Background(), disk.Fork(), "/store", true)
			if err != nil {
				t.Error(err)
				return
			}
			ids.Store(s.UUID(), true)
		})
	}
	all.Wait()
	var n int
	ids.Range(func(any, any) bool { n++; return true })
	if n != 1 {
		t.Errorf("%d different stores", n)
	}
}

// TestNumbers gives each checkpoint of a VM the next number, and none twice.
func TestNumbers(t *testing.T) {
	s, disk := newStore(t)
	for want := 1; want <= 4; want++ {
		if ref := mustCommit(t, s, "vm"); ref != (Ref{"vm", want}) {
			t.Errorf("checkpoint %v, want number %d", ref, want)
		}
	}
	if ref := mustCommit(t, s, "another"); ref.N != 1 {
		t.Errorf("another VM starts at %v", ref)
	}
	rm := func(n int) {
		t.Helper()
		if _, err := s.Remove(context.Background(), Ref{"vm", n}); err != nil {
			t.Fatal(err)
		}
	}
	rm(2)
	if ref := mustCommit(t, s, "vm"); ref.N != 5 {
		t.Errorf("after number 2 was removed: %v", ref)
	}
	rm(5)
	rm(4)
	if ref := mustCommit(t, s, "vm"); ref.N != 6 {
		t.Errorf("after the last two were removed: %v", ref)
	}
	for _, n := range []int{1, 6, 3} {
		rm(n)
	}
	if vms, err := s.VMs(context.Background()); err != nil || !slices.Equal(vms, []string{"another"}) {
		t.Errorf("VMs with checkpoints: %v, %v", vms, err)
	}
	if ref := mustCommit(t, s, "vm"); ref.N != 7 {
		t.Errorf("after all were removed: %v", ref)
	}
	// What is no checkpoint's name does not count.
	for _, name := range []string{"8.flic", "00000009", "0000000a.flic", "00000000.flic", "000000010.flic", "-0000011.flic", "00000012.flic.new"} {
		put(t, disk, "/store/vms/vm/"+name, nil)
	}
	refs, err := s.List(context.Background(), "")
	if err != nil || !slices.Equal(refs, []Ref{{"another", 1}, {"vm", 7}}) {
		t.Errorf("list: %v, %v", refs, err)
	}
	if refs, err := s.List(context.Background(), "nobody"); err != nil || len(refs) != 0 {
		t.Errorf("list of a VM that is not there: %v, %v", refs, err)
	}
	// And at the end of all numbers it is over.
	put(t, disk, fmt.Sprintf("/store/vms/vm/%08d.flic", MaxNumber), nil)
	if ref, err := commit(s, "vm"); err == nil {
		t.Errorf("a checkpoint after the last: %v", ref)
	}
	if entries, err := disk.ReadDir("/store/tmp"); err != nil || len(entries) != 0 {
		t.Errorf("left in tmp: %v, %v", entries, err)
	}
}

func TestResolve(t *testing.T) {
	s, _ := newStore(t)
	for range 3 {
		mustCommit(t, s, "vm")
	}
	if _, err := s.Remove(context.Background(), Ref{"vm", 3}); err != nil {
		t.Fatal(err)
	}
	for ref, want := range map[Ref]int{{"vm", 0}: 2, {"vm", 1}: 1, {"vm", 2}: 2} {
		if got, err := s.Resolve(context.Background(), ref); err != nil || got.N != want {
			t.Errorf("%v: %v, %v", ref, got, err)
		}
		f, got, err := s.open(context.Background(), ref, Shared)
		if err != nil || got.N != want {
			t.Fatalf("open %v: %v, %v", ref, got, err)
		}
		f.Close()
	}
	for _, ref := range []Ref{{"vm", 3}, {"vm", 4}, {"nobody", 0}, {"nobody", 1}} {
		if _, err := s.Resolve(context.Background(), ref); !errors.Is(err, ErrNotFound) {
			t.Errorf("%v: %v", ref, err)
		}
		if _, _, err := s.open(context.Background(), ref, Shared); !errors.Is(err, ErrNotFound) {
			t.Errorf("open %v: %v", ref, err)
		}
		if _, err := s.Remove(context.Background(), ref); !errors.Is(err, ErrNotFound) {
			t.Errorf("remove %v: %v", ref, err)
		}
	}
}

// TestRemoveInUse keeps a checkpoint that somebody reads.
func TestRemoveInUse(t *testing.T) {
	t.Run("holder", func(t *testing.T) {
		s, err := Open(t.Context(), vfs.OS, filepath.Join(t.TempDir(), "store"), true)
		if err != nil {
			t.Fatal(err)
		}
		ref := mustCommit(t, s, "vm")
		f, _, err := s.open(t.Context(), ref, Shared)
		if err != nil {
			t.Fatal(err)
		}
		defer f.Close()
		if _, err := s.Remove(t.Context(), ref); !errors.Is(err, ErrInUse) || !strings.Contains(err.Error(), fmt.Sprintf("process: process %d (", os.Getpid())) {
			t.Errorf("the message names nobody: %v", err)
		}
	})
	s, disk := newStore(t)
	ref := mustCommit(t, s, "vm")
	reader, err := Open(context.Background(), disk.Fork(), "/store", false)
	if err != nil {
		t.Fatal(err)
	}
	var readers []Object
	for range 2 {
		f, _, err := reader.open(context.Background(), ref, Shared)
		if err != nil {
			t.Fatalf("readers exclude each other: %v", err)
		}
		readers = append(readers, f)
	}
	for _, f := range readers {
		if _, err := s.Remove(context.Background(), ref); !errors.Is(err, ErrInUse) {
			t.Errorf("remove while it is read: %v", err)
		}
		if rep, err := s.GC(context.Background()); err != nil || rep.Parts != 0 {
			t.Errorf("gc: %+v, %v", rep, err)
		}
		f.Close()
	}
	if _, err := s.Remove(context.Background(), ref); err != nil {
		t.Errorf("remove: %v", err)
	}
	// While it is removed nobody can open it.
	ref = mustCommit(t, s, "vm")
	f, err := disk.Open("/store/vms/vm/00000002.flic")
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if err := f.TryLock(vfs.Exclusive); err != nil {
		t.Fatal(err)
	}
	if _, _, err := s.open(context.Background(), ref, Shared); !errors.Is(err, ErrInUse) {
		t.Errorf("open of a locked image: %v", err)
	}
}

// TestOpenWaits: who opens a checkpoint waits for somebody who has it for himself, as a
// removal or a flattening has for a moment, and no longer than he may. So does a copy.
func TestOpenWaits(t *testing.T) {
	s, disk := newStore(t)
	other, _ := newStore(t)
	ref := mustCommit(t, s, "vm")
	taken := func() vfs.File {
		t.Helper()
		f, err := disk.Open("/store/vms/vm/00000001.flic")
		if err == nil {
			err = f.TryLock(vfs.Exclusive)
		}
		if err != nil {
			t.Fatal(err)
		}
		return f
	}
	defer func(was time.Duration) { openLimit = was }(openLimit)
	for what, open := range map[string]func() error{
		"open": func() error {
			c, err := s.OpenCheckpoint(t.Context(), ref, checkpoint.Options{})
			if err == nil {
				err = c.Close()
			}
			return err
		},
		"send": func() error {
			w, err := transfer.NewWriter(io.Discard)
			if err != nil {
				return err
			}
			have, err := other.Have(t.Context())
			if err == nil {
				_, err = s.Send(t.Context(), ref, w, have, SendOptions{})
			}
			return err
		},
	} {
		openLimit = time.Minute
		f := taken()
		time.AfterFunc(20*time.Millisecond, func() { f.Close() })
		if err := open(); errors.Is(err, ErrInUse) {
			t.Errorf("%s has not waited: %v", what, err)
		}
		openLimit = 20 * time.Millisecond
		f = taken()
		if err := open(); !errors.Is(err, ErrInUse) {
			t.Errorf("%s of what stays in use: %v", what, err)
		}
		f.Close()
	}
}

// TestSoon: it is tried until it need not be, until the time is up, or nobody waits any more.
func TestSoon(t *testing.T) {
	in := errors.New("in use")
	tries := 0
	waited, err := soon(t.Context(), time.Minute, func() (bool, error) { tries++; return tries < 4, nil })
	if err != nil || tries != 4 || waited < 7*time.Millisecond {
		t.Errorf("%d tries in %v, %v", tries, waited, err)
	}
	if waited, err := soon(t.Context(), time.Minute, func() (bool, error) { return false, in }); waited != 0 || err != in {
		t.Errorf("one that need not wait has waited %v, %v", waited, err)
	}
	if waited, err := soon(t.Context(), 30*time.Millisecond, func() (bool, error) { return true, in }); waited < 30*time.Millisecond || err != in {
		t.Errorf("after %v: %v", waited, err)
	}
	if waited, err := soon(t.Context(), 0, func() (bool, error) { return true, in }); waited != 0 || err != in {
		t.Errorf("without a limit to wait for: %v, %v", waited, err)
	}
	ctx, stop := context.WithCancel(t.Context())
	time.AfterFunc(10*time.Millisecond, stop)
	if _, err := soon(ctx, time.Hour, func() (bool, error) { return true, in }); !errors.Is(err, context.Canceled) {
		t.Error(err)
	}
}

// TestPending keeps a save under way from gc, and frees an ended one at once.
func TestPending(t *testing.T) {
	s, disk := newStore(t)
	p, err := s.Begin(context.Background(), "vm")
	if err != nil {
		t.Fatal(err)
	}
	if rep, err := s.GC(context.Background()); err != nil || rep.Parts != 0 {
		t.Errorf("gc during a save: %+v, %v", rep, err)
	}
	if refs, err := s.List(context.Background(), ""); err != nil || len(refs) != 0 {
		t.Errorf("a save under way is visible: %v, %v", refs, err)
	}
	p.Abort()
	if entries, err := disk.ReadDir("/store/tmp"); err != nil || len(entries) != 0 {
		t.Errorf("after Abort: %v, %v", entries, err)
	}
	// One whose process has died is gc's.
	dead := disk.Fork()
	other, err := Open(context.Background(), dead, "/store", false)
	if err != nil {
		t.Fatal(err)
	}
	if p, err = other.Begin(context.Background(), "vm"); err != nil {
		t.Fatal(err)
	}
	if err := finish(p); err != nil {
		t.Fatal(err)
	}
	size, _ := p.image.(Object).Size()
	dead.Kill()
	if rep, err := s.GC(context.Background()); err != nil || rep.Parts != 1 || rep.Bytes != size {
		t.Errorf("gc of a dead save of %d bytes: %+v, %v", size, rep, err)
	}
	if rep, err := s.GC(context.Background()); err != nil || rep.Parts != 0 {
		t.Errorf("second gc: %+v, %v", rep, err)
	}
}

// TestCommitTogether commits from many processes on one simulated disk.
func TestCommitTogether(t *testing.T) {
	s, disk := newStore(t)
	var mu sync.Mutex
	seen := map[int]bool{}
	var all sync.WaitGroup
	for range 6 {
		all.Go(func() {
			s, err := Open(context.Background(), disk.Fork(), "/store", false)
			if err != nil {
				t.Error(err)
				return
			}
			for range 10 {
				ref, err := commit(s, "vm")
				mu.Lock()
				if err != nil || seen[ref.N] {
					t.Errorf("%v, again %v: %v", ref, seen[ref.N], err)
				}
				seen[ref.N] = true
				mu.Unlock()
			}
		})
	}
	all.Go(func() {
		for range 10 {
			if _, err := s.GC(context.Background()); err != nil {
				t.Error(err)
			}
		}
	})
	all.Wait()
	if refs, err := s.List(context.Background(), "vm"); err != nil || len(refs) != 60 || refs[59].N != 60 {
		t.Errorf("%d checkpoints, %v", len(refs), err)
	}
}

// TestTwoProcesses does it with real ones.
func TestTwoProcesses(t *testing.T) {
	exe, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	dir := filepath.Join(t.TempDir(), "store")
	var outs [2]strings.Builder
	var cmds [2]*exec.Cmd
	for i := range cmds {
		cmds[i] = exec.Command(exe)
		cmds[i].Env = append(os.Environ(), childEnv+"="+dir)
		cmds[i].Stdout = &outs[i]
		if err := cmds[i].Start(); err != nil {
			t.Fatal(err)
		}
	}
	seen := map[int]bool{}
	for i, c := range cmds {
		if err := c.Wait(); err != nil {
			t.Fatalf("%v: %s", err, outs[i].String())
		}
		for _, line := range strings.Fields(outs[i].String()) {
			n, err := strconv.Atoi(line)
			if err != nil || seen[n] {
				t.Errorf("number %q, again %v", line, seen[n])
			}
			seen[n] = true
		}
	}
	for n := 1; n <= 40; n++ {
		if !seen[n] {
			t.Errorf("number %d was left out", n)
		}
	}
}

// TestGCStops does not give NVRAM away while it can't tell whose it is.
func TestGCStops(t *testing.T) {
	s, disk := newStore(t)
	mustCommit(t, s, "vm")
	p, err := s.Begin(t.Context(), "other")
	if err != nil {
		t.Fatal(err)
	}
	if _, _, err := p.Reserve(t.Context(), Reservation{Path: "/nvram.img", Bytes: 4096, PageSize: 4096}); err != nil {
		t.Fatal(err)
	}
	p.keep = true // as if it had been killed
	p.Abort()
	put(t, disk, "/store/vms/vm/00000002.flic", []byte("half an image"))
	if _, err := s.GC(context.Background()); !integrity.IsCorrupt(err) || !strings.Contains(err.Error(), "00000002.flic") {
		t.Errorf("gc: %v", err)
	}
}

// TestGCNVRAM frees what nobody owns, leaves other stores alone, and says what
// it could not look at.
func TestGCNVRAM(t *testing.T) {
	s, disk := newStore(t)
	f, err := nvram.Open(context.Background(), disk, "/nvram.img", nvram.Options{Create: true})
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	for range 2 { // the second time it is known already
		if err := s.rememberNVRAM(context.Background(), "/nvram.img", f.UUID()); err != nil {
			t.Fatal(err)
		}
	}
	p, err := s.Begin(context.Background(), "vm")
	if err != nil {
		t.Fatal(err)
	}
	if err := finish(p); err != nil {
		t.Fatal(err)
	}
	for owner, st := range map[uuid.UUID]uuid.UUID{p.uuid: s.UUID(), uuid.New(): s.UUID(), uuid.New(): uuid.New()} {
		r, err := f.Reserve(context.Background(), owner, st, 2*nvram.ExtentSize, 4096)
		if err != nil {
			t.Fatal(err)
		}
		r.Close()
	}
	if rep, err := s.GC(context.Background()); err != nil || rep.NVRAMExtents != 2 || rep.NVRAMBytes != 2*nvram.ExtentSize || len(rep.Warnings) != 0 {
		t.Errorf("gc: %+v, %v", rep, err)
	}
	if _, err := p.Commit(context.Background()); err != nil {
		t.Fatal(err)
	}
	if rep, err := s.GC(context.Background()); err != nil || rep.NVRAMExtents != 0 {
		t.Errorf("gc took the NVRAM of a checkpoint: %+v, %v", rep, err)
	}
	// A description that is damaged is made anew by the next save.
	name := "/store/nvram/" + f.UUID().String() + ".json"
	put(t, disk, name, []byte("{"))
	if rep, err := s.GC(context.Background()); err != nil || len(rep.Warnings) != 1 || !strings.Contains(rep.Warnings[0], name) {
		t.Errorf("gc with a damaged description: %+v, %v", rep, err)
	}
	if err := s.rememberNVRAM(context.Background(), "/nvram.img", f.UUID()); err != nil {
		t.Fatal(err)
	}
	if _, err := s.Remove(context.Background(), Ref{"vm", 1}); err != nil {
		t.Fatal(err)
	}
	if rep, err := s.GC(context.Background()); err != nil || rep.NVRAMExtents != 2 || len(rep.Warnings) != 0 {
		t.Errorf("gc: %+v, %v", rep, err)
	}
	if err := s.rememberNVRAM(context.Background(), "/gone.img", uuid.New()); err != nil {
		t.Fatal(err)
	}
	if rep, err := s.GC(context.Background()); err != nil || len(rep.Warnings) != 1 || !strings.Contains(rep.Warnings[0], "/gone.img") {
		t.Errorf("gc with a file that is gone: %+v, %v", rep, err)
	}
	if err := disk.Remove("/nvram.img"); err != nil {
		t.Fatal(err)
	}
	other, err := nvram.Open(context.Background(), disk, "/nvram.img", nvram.Options{Create: true})
	if err != nil {
		t.Fatal(err)
	}
	other.Close()
	if rep, err := s.GC(context.Background()); err != nil || len(rep.Warnings) != 2 {
		t.Errorf("gc with another file in its place: %+v, %v", rep, err)
	}
}

// TestTouched keeps what resumes learn, as long as the checkpoint.
func TestTouched(t *testing.T) {
	s, disk := newStore(t)
	ref := mustCommit(t, s, "vm")
	blocks := []string{"pc.ram"}
	if got, err := s.Touched(context.Background(), ref); err != nil || len(got.Runs) != 0 {
		t.Errorf("before a resume: %+v, %v", got, err)
	}
	first, second := workingset.PageRun{Page: 7, Count: 1}, workingset.PageRun{Page: 3, Count: 2}
	for _, r := range []workingset.PageRun{first, second} {
		if err := s.AddTouched(context.Background(), ref, 4096, blocks, []workingset.PageRun{r}); err != nil {
			t.Fatal(err)
		}
	}
	if got, err := s.Touched(context.Background(), ref); err != nil || !slices.Equal(got.Runs, []workingset.PageRun{first, second}) || got.PageSize != 4096 {
		t.Errorf("after two: %+v, %v", got, err)
	}
	// What does not fit, or is damaged, is begun anew.
	if err := s.AddTouched(context.Background(), ref, 8192, blocks, []workingset.PageRun{second}); err != nil {
		t.Fatal(err)
	}
	if got, err := s.Touched(context.Background(), ref); err != nil || len(got.Runs) != 1 || got.PageSize != 8192 {
		t.Errorf("with another page size: %+v, %v", got, err)
	}
	put(t, disk, "/store/vms/vm/00000001.touched", []byte("{}"))
	if _, err := s.Touched(context.Background(), ref); !integrity.IsCorrupt(err) {
		t.Errorf("damaged: %v", err)
	}
	if err := s.AddTouched(context.Background(), ref, 4096, blocks, []workingset.PageRun{first}); err != nil {
		t.Fatal(err)
	}
	if _, err := s.Remove(context.Background(), ref); err != nil {
		t.Fatal(err)
	}
	if _, err := disk.Stat("/store/vms/vm/00000001.touched"); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("it outlives its checkpoint: %v", err)
	}
	if err := s.AddTouched(context.Background(), ref, 4096, blocks, []workingset.PageRun{first}); !errors.Is(err, ErrNotFound) {
		t.Errorf("of a checkpoint that is gone: %v", err)
	}
	put(t, disk, "/store/vms/vm/00000009.touched", []byte("left by a crash"))
	if _, err := s.GC(context.Background()); err != nil {
		t.Fatal(err)
	}
	if _, err := disk.Stat("/store/vms/vm/00000009.touched"); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("gc left what belongs to no checkpoint: %v", err)
	}
}

// What users say of a checkpoint is durable, stays with it, and goes with it.
func TestLabel(t *testing.T) {
	ctx := t.Context()
	s, disk := newStore(t)
	ref := mustCommit(t, s, "vm")
	tag := func(tags ...string) func(*Label) {
		return func(l *Label) { l.Tags = append(l.Tags, tags...) }
	}
	if l, err := s.Label(ctx, ref); err != nil || !reflect.DeepEqual(l, Label{}) {
		t.Errorf("at first: %+v, %v", l, err)
	}
	at, l, lost, err := s.ChangeLabel(ctx, Ref{VM: "vm"}, tag("b", "a", "b"))
	if at != ref || !reflect.DeepEqual(l, Label{Tags: []string{"a", "b"}}) || lost != nil || err != nil {
		t.Errorf("%v, %+v, %v, %v", at, l, lost, err)
	}
	want := Label{[]string{"a", "b"}, "a <note>\nof two lines"}
	if _, _, _, err := s.ChangeLabel(ctx, ref, func(l *Label) { l.Note = want.Note }); err != nil {
		t.Fatal(err)
	}
	// A power cut takes nothing of it.
	s, err = Open(ctx, disk.CrashClone(0), "/store", false)
	if err != nil {
		t.Fatal(err)
	}
	list, err := s.Identities(ctx, "")
	if err != nil || len(list) != 1 || !reflect.DeepEqual(list[0].Label, want) {
		t.Errorf("listed: %+v, %v", list, err)
	}
	strays, err := s.Strays(ctx, "")
	if len(strays) > 0 || err != nil {
		t.Errorf("strays %q, %v", strays, err)
	}
	for _, bad := range []string{"", "-a", "a b", "a,b", "a\tb", strings.Repeat("x", 65), "\xff"} {
		if _, _, _, err := s.ChangeLabel(ctx, ref, tag(bad)); !errors.Is(err, ErrName) {
			t.Errorf("tag %q: %v", bad, err)
		}
	}
	many := make([]string, MaxTags)
	for i := range many {
		many[i] = fmt.Sprintf("%s%02d", strings.Repeat("<", 62), i)
	}
	longest := Label{many, strings.Repeat("<", 4096)}
	if _, _, _, err := s.ChangeLabel(ctx, ref, func(l *Label) { *l = longest }); err != nil {
		t.Fatal(err)
	}
	if l, err := s.Label(ctx, ref); err != nil || !reflect.DeepEqual(l, longest) {
		t.Errorf("the longest: %v", err)
	}
	for _, change := range []func(*Label){tag("one"), func(l *Label) { l.Note += "<" }, func(l *Label) { l.Note = "\x1b[31m" }} {
		if _, _, _, err := s.ChangeLabel(ctx, ref, change); !errors.Is(err, ErrName) {
			t.Errorf("%v", err)
		}
	}
	if l, err := s.Label(ctx, ref); err != nil || !reflect.DeepEqual(l, longest) {
		t.Errorf("refused, and changed: %v", err)
	}
	if _, _, _, err := s.ChangeLabel(ctx, Ref{"vm", 9}, tag("a")); !errors.Is(err, ErrNotFound) {
		t.Errorf("of no checkpoint: %v", err)
	}
	// Nothing to say is no object, and a removal takes it along; what a cut-off one has
	// left gc takes.
	if _, _, _, err := s.ChangeLabel(ctx, ref, func(l *Label) { *l = Label{} }); err != nil {
		t.Fatal(err)
	}
	name := s.dir.Path(ref.object(labelSuffix))
	if _, err := s.fs.Stat(name); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("of nothing: %v", err)
	}
	if _, _, _, err := s.ChangeLabel(ctx, ref, tag("a")); err != nil {
		t.Fatal(err)
	}
	mustCommit(t, s, "vm")
	if _, err := s.Remove(ctx, ref); err != nil {
		t.Fatal(err)
	}
	if _, err := s.fs.Stat(name); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("after rm: %v", err)
	}
	put(t, s.fs, "/store/vms/vm/00000001.label", []byte("left by a crash"))
	if _, err := s.GC(ctx); err != nil {
		t.Fatal(err)
	}
	if _, err := s.fs.Stat(name); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("after gc: %v", err)
	}
}

// TestNewBeside: what lies under a number without an image, as when somebody has removed that
// by hand, is not the next checkpoint's; what lies beside an image stays that one's.
func TestNewBeside(t *testing.T) {
	s, disk := newStore(t)
	ctx := t.Context()
	// left has users say something of a checkpoint, and resumes of it learn something.
	left := func(r Ref) {
		t.Helper()
		if _, _, _, err := s.ChangeLabel(ctx, r, func(l *Label) { l.Tags = []string{"golden"} }); err != nil {
			t.Fatal(err)
		}
		if err := s.AddTouched(ctx, r, 4096, []string{"ram"}, []workingset.PageRun{{Count: 1}}); err != nil {
			t.Fatal(err)
		}
	}
	bare := func(what string, r Ref) {
		t.Helper()
		if l, err := s.Label(ctx, r); err != nil || !l.empty() {
			t.Errorf("%s: %v says %+v, %v", what, r, l, err)
		}
		if have, err := s.Touched(ctx, r); err != nil || len(have.Runs) > 0 {
			t.Errorf("%s: resumes of %v have learned %v, %v", what, r, have.Runs, err)
		}
	}
	image := func(r Ref) string { return "/store/" + r.object(imageSuffix) }
	for _, vm := range []string{"a", "b"} {
		ref := mustCommit(t, s, vm)
		left(ref)
		if err := disk.Remove(image(ref)); err != nil {
			t.Fatal(err)
		}
	}
	bare("a checkpoint", mustCommit(t, s, "a"))
	for _, m := range mustCommitGroup(t, s, "b").Members {
		bare("a group's", m.Ref())
	}
	// Somebody has put an image where a save that is under way wants to have its own.
	p, err := s.Begin(ctx, "a")
	if err == nil {
		err = finish(p)
	}
	if err != nil {
		t.Fatal(err)
	}
	put(t, disk, image(p.ref), []byte("another"))
	left(p.ref)
	if _, err := p.Commit(ctx); !errors.Is(err, fs.ErrExist) {
		t.Errorf("a number that is taken: %v", err)
	}
	if l, err := s.Label(ctx, p.ref); err != nil || l.empty() {
		t.Errorf("the other one has lost what users say of it: %v", err)
	}
}

// A damaged label is damage, for verify as well, and is replaced by the next one; hostile
// ones are refused.
func TestLabelDamage(t *testing.T) {
	ctx := t.Context()
	s, disk := newStore(t)
	ref := mustCommit(t, s, "vm")
	for _, body := range []string{`{"tags":["a b"]}`, `{"tags":["b","a"]}`, `{"note":"\u001b"}`, `{"tags":[""]}`, `{"tags":7}`} {
		put(t, disk, "/store/vms/vm/00000001.label", fmt.Appendf(nil, "%08x %s\n", integrity.Checksum([]byte(body)), body))
		if l, err := s.Label(ctx, ref); !integrity.IsCorrupt(err) || !reflect.DeepEqual(l, Label{}) {
			t.Errorf("%s: %+v, %v", body, l, err)
		}
	}
	if list, err := s.Identities(ctx, ""); err != nil || !integrity.IsCorrupt(list[0].LabelErr) || list[0].Err != nil {
		t.Errorf("%+v, %v", list, err)
	}
	_, l, lost, err := s.ChangeLabel(ctx, ref, func(l *Label) { l.Note = "new" })
	if !integrity.IsCorrupt(lost) || err != nil || l.Note != "new" {
		t.Errorf("%+v, %v, %v", l, lost, err)
	}
	if l, err = s.Label(ctx, ref); err != nil || l.Note != "new" {
		t.Errorf("%+v, %v", l, err)
	}
}

// TestUncertain tells the commit that can't be taken back from one that can.
func TestUncertain(t *testing.T) {
	for name, c := range map[string]struct {
		also      int // the operation after the failed sync that fails too
		uncertain bool
	}{
		"sync": {-1, false}, "sync and removal": {1, true}, "sync twice": {2, true},
	} {
		s, disk := newStore(t)
		mustCommit(t, s, "vm")
		p, err := s.Begin(context.Background(), "vm")
		if err != nil {
			t.Fatal(err)
		}
		if err := finish(p); err != nil {
			t.Fatal(err)
		}
		// Lock, removals of what lies beside, rename, sync of the VM's directory, and the
		// last two backwards.
		const synced = 5
		disk.FailAt(synced, syscall.EIO)
		if c.also > 0 {
			disk.FailAt(synced+c.also, syscall.EIO)
		}
		_, err = p.Commit(context.Background())
		if !errors.Is(err, syscall.EIO) || IsUncertain(err) != c.uncertain || IsUncertain(fmt.Errorf("x: %w", err)) != c.uncertain {
			t.Errorf("%s: %v, uncertain %v", name, err, IsUncertain(err))
		}
		if refs, _ := s.List(context.Background(), "vm"); !c.uncertain && len(refs) != 1 {
			t.Errorf("%s: %v", name, refs)
		}
	}
}

// bothNames is a file system whose Rename links and does not get to unlink: as a server that
// does not answer any more leaves it.
type bothNames struct {
	vfs.FS
	broken bool
}

func (f *bothNames) NoLinks(string) (vfs.FS, error) { return f, nil }

func (f *bothNames) Rename(from, to string) error {
	if !f.broken {
		return f.FS.Rename(from, to)
	}
	if err := f.FS.Link(from, to); err != nil {
		return err
	}
	return &os.LinkError{Op: "rename", Old: from, New: to, Err: syscall.EIO}
}

// TestBothNames: a commit whose rename has failed, and has given the image its name, says that
// this is not certain, and not that there is no checkpoint.
func TestBothNames(t *testing.T) {
	disk := &bothNames{FS: crashfs.New(0)}
	s, err := Open(t.Context(), disk, "/store", true)
	if err != nil {
		t.Fatal(err)
	}
	mustCommit(t, s, "vm")
	p, err := s.Begin(t.Context(), "vm")
	if err != nil {
		t.Fatal(err)
	}
	if err := finish(p); err != nil {
		t.Fatal(err)
	}
	disk.broken = true
	if _, err := p.Commit(t.Context()); !errors.Is(err, syscall.EIO) || !IsUncertain(err) {
		t.Errorf("%v, uncertain %v", err, IsUncertain(err))
	}
	if refs, err := s.List(t.Context(), "vm"); err != nil || len(refs) != 2 {
		t.Errorf("%v, %v", refs, err)
	}
	// A name that is taken is no such case.
	if p, err = s.Begin(t.Context(), "vm"); err != nil {
		t.Fatal(err)
	}
	if err := finish(p); err != nil {
		t.Fatal(err)
	}
	if err := disk.Link("/store/vms/vm/00000001.flic", "/store/vms/vm/00000003.flic"); err != nil {
		t.Fatal(err)
	}
	if _, err := p.Commit(t.Context()); !errors.Is(err, fs.ErrExist) || IsUncertain(err) {
		t.Errorf("%v, uncertain %v", err, IsUncertain(err))
	}
}

// FuzzUnseal opens any sealed file. What is accepted says the same when it is
// sealed again.
func FuzzUnseal(f *testing.F) {
	for _, v := range []any{storeDoc{formatName, Version, uuid.UUID{1}, home{"/<store>", "inode 7"}}, nvramFile{"/dev/<pmem>&", uuid.UUID{2}}, 12,
		workingset.Touched{PageSize: 4096, Blocks: []string{"a"}, Runs: []workingset.PageRun{{Page: 1, Count: 2}}}} {
		b, err := integrity.Seal(v)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(b)
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		// Behind the checksum, too.
		unsealTwice(t, fmt.Appendf(nil, "%08x %s\n", integrity.Checksum(b), b))
		unsealTwice(t, b)
	})
}

func unsealTwice(t *testing.T, b []byte) {
	for _, pair := range [][2]any{
		{new(storeDoc), new(storeDoc)}, {new(nvramFile), new(nvramFile)}, {new(int), new(int)},
		{new(workingset.Touched), new(workingset.Touched)},
	} {
		if unseal(b, pair[0]) != nil {
			continue
		}
		again, err := integrity.Seal(pair[0])
		if err != nil {
			t.Fatal(err)
		}
		if err := unseal(again, pair[1]); err != nil || !reflect.DeepEqual(pair[0], pair[1]) {
			t.Errorf("%q sealed again is %q (%v)", b, again, err)
		}
	}
}

// TestForeignNames: what has no name of a store's is nobody's, and gc leaves it.
func TestForeignNames(t *testing.T) {
	s, disk := newStore(t)
	mustCommit(t, s, "vm")
	id := uuid.NewString()
	ours := []string{"tmp/vm@7." + id + ".part", "tmp/" + id + ".new", "tmp/" + id + ".rate", "vms/vm/00000009.touched"}
	others := []string{"tmp/notes", "tmp/" + id, "tmp/" + id + ".part", "tmp/vm@0." + id + ".part", "tmp/-@1." + id + ".part",
		"tmp/x" + id + ".new", "tmp/" + strings.ToUpper(id) + ".new", "vms/vm/9.touched", "vms/vm/notes", "vms/vm/last", "loose.json", "nvram.txt"}
	for _, name := range slices.Concat(ours, others) {
		put(t, disk, "/store/"+name, []byte("x"))
	}
	rep, err := s.GC(t.Context())
	if err != nil || rep.Parts != 1 || len(rep.Warnings) != 3 { // one for each of vms/vm
		t.Errorf("gc: %+v, %v", rep, err)
	}
	for _, name := range ours {
		if _, err := disk.Stat("/store/" + name); !errors.Is(err, fs.ErrNotExist) {
			t.Errorf("%s is left: %v", name, err)
		}
	}
	for _, name := range others {
		if _, err := disk.Stat("/store/" + name); err != nil {
			t.Errorf("%s is gone: %v", name, err)
		}
	}
}

// TestEarlierVersion is told what it is.
func TestEarlierVersion(t *testing.T) {
	_, disk := newStore(t)
	put(t, disk, "/store/store.json", []byte(`{"crc32c":1,"body":{"format":"flic-migrate store","version":1,"uuid":"7e8f0c1e-6d1f-4c3b-9b0a-8f5a4f2d6c11"}}`))
	for _, create := range []bool{false, true} {
		if _, err := Open(t.Context(), disk, "/store", create); err == nil || integrity.IsCorrupt(err) || !strings.Contains(err.Error(), "an earlier flic-migrate wrote this store, in version 1; this one reads version 2") {
			t.Errorf("open: %v", err)
		}
	}
}

// TestNormalForm: of two spellings that look the same only one is a name.
func TestNormalForm(t *testing.T) {
	if err := CheckVM("caf\u00e9"); err != nil {
		t.Error(err)
	}
	if err := CheckVM("cafe\u0301"); !errors.Is(err, ErrName) || !strings.Contains(err.Error(), "NFC") {
		t.Errorf("NFD: %v", err)
	}
}

// TestTouchedCap: a document that is short and stands for much is not believed.
func TestTouchedCap(t *testing.T) {
	s, disk := newStore(t)
	ref := mustCommit(t, s, "vm")
	for name, doc := range map[string]string{
		"runs":  `{"page_size":4096,"blocks":["a"],"runs":[` + strings.Repeat("{},", 1<<20) + `{}]}`,
		"names": `{"page_size":4096,"blocks":[` + strings.Repeat(`"",`, 1<<20) + `""],"runs":[]}`,
		"size":  `{"page_size":4096,"blocks":["` + strings.Repeat("a", 8<<20) + `"],"runs":[]}`,
	} {
		put(t, disk, "/store/vms/vm/00000001.touched", fmt.Appendf(nil, "%08x %s\n", integrity.Checksum([]byte(doc)), doc))
		var before, after runtime.MemStats
		runtime.ReadMemStats(&before)
		_, err := s.Touched(t.Context(), ref)
		runtime.ReadMemStats(&after)
		if !integrity.IsCorrupt(err) {
			t.Errorf("%s: %v", name, err)
		}
		if n := after.TotalAlloc - before.TotalAlloc; n > 40<<20 {
			t.Errorf("%s: %d MB", name, n>>20)
		}
	}
	// As much as a resume can learn is kept.
	runs := make([]workingset.PageRun, workingset.MaxTouched)
	for i := range runs {
		runs[i] = workingset.PageRun{Block: 4095, Page: 1<<34 + uint64(i), Count: 1 << 34}
	}
	if err := s.AddTouched(t.Context(), ref, 4096, []string{"pc.ram"}, runs); err != nil {
		t.Fatal(err)
	}
	if got, err := s.Touched(t.Context(), ref); err != nil || len(got.Runs) != len(runs) {
		t.Errorf("%v", err)
	}
}

// TestNumbersOfSaves: two saves of one VM have two numbers from their beginning, and
// that of one that failed is given to the next.
func TestNumbersOfSaves(t *testing.T) {
	s, disk := newStore(t)
	a, err := s.Begin(t.Context(), "vm")
	if err != nil {
		t.Fatal(err)
	}
	dead := disk.Fork()
	other, err := Open(t.Context(), dead, "/store", false)
	if err != nil {
		t.Fatal(err)
	}
	b, err := other.Begin(t.Context(), "vm")
	if err != nil || a.Ref().N != 1 || b.Ref().N != 2 {
		t.Fatalf("%v, %v, %v", a.Ref(), b.Ref(), err)
	}
	dead.Kill()
	if ref := mustCommit(t, s, "vm"); ref.N != 2 {
		t.Errorf("after a save that was killed: %v", ref)
	}
	if err := finish(a); err != nil {
		t.Fatal(err)
	}
	if ref, err := a.Commit(t.Context()); err != nil || ref.N != 1 {
		t.Errorf("the first one: %v, %v", ref, err)
	}
	if r, err := s.Resolve(t.Context(), Ref{VM: "vm"}); err != nil || r.N != 2 {
		t.Errorf("the newest is the one that began last: %v, %v", r, err)
	}
}

// TestCommitSyncsItsOwn: a commit makes no other VM's folder durable, and with its
// VM known before, not even the folder of all.
func TestCommitSyncsItsOwn(t *testing.T) {
	s, disk := newStore(t)
	mustCommit(t, s, "a")
	mustCommit(t, s, "b")
	p, err := s.Begin(t.Context(), "a")
	if err != nil {
		t.Fatal(err)
	}
	if err := finish(p); err != nil {
		t.Fatal(err)
	}
	before := len(disk.Ops())
	if _, err := p.Commit(t.Context()); err != nil {
		t.Fatal(err)
	}
	for _, op := range disk.Ops()[before:] {
		if op.Kind == crashfs.SyncDir && !strings.HasSuffix(op.Name, "/vms/a") {
			t.Errorf("%v", op)
		}
	}
}

// TestReplacedBeforeCommit: an image that a new checkpoint refers to is replaced, as by a whole
// copy that is received, after it was held: what has its name now is not held, and the
// checkpoint is not made, alone and in a group.
func TestReplacedBeforeCommit(t *testing.T) {
	for _, group := range []bool{false, true} {
		dir := t.TempDir()
		s, err := Open(t.Context(), vfs.OS, dir+"/store", true)
		if err != nil {
			t.Fatal(err)
		}
		id := mustCommit(t, s, "a")
		d, err := s.Describe(t.Context(), id)
		if err != nil {
			t.Fatal(err)
		}
		p, err := s.Begin(t.Context(), "b")
		if err != nil {
			t.Fatal(err)
		}
		defer p.Abort()
		if err := p.Refer(t.Context(), d.UUID); err != nil {
			t.Fatal(err)
		}
		if err := finish(p); err != nil {
			t.Fatal(err)
		}
		name := dir + "/store/vms/a/00000001.flic"
		b, err := os.ReadFile(name)
		if err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(dir+"/copy", b, 0o600); err != nil {
			t.Fatal(err)
		}
		if err := os.Rename(dir+"/copy", name); err != nil {
			t.Fatal(err)
		}
		if group {
			_, err = s.CommitGroup(t.Context(), Group{Name: "g", Mode: "stop"}, []*Tx{p})
		} else {
			_, err = p.Commit(t.Context())
		}
		if !errors.Is(err, ErrInUse) || !errors.Is(err, errReplaced) {
			t.Errorf("group %v: %v", group, err)
		}
		if list, err := s.List(t.Context(), "b"); err != nil || len(list) > 0 {
			t.Errorf("group %v: %v, %v", group, list, err)
		}
	}
}

// refer commits a checkpoint that refers to others.
func refer(t testing.TB, s *Store, vm string, ids ...uuid.UUID) Ref {
	t.Helper()
	p, err := s.Begin(t.Context(), vm)
	if err != nil {
		t.Fatal(err)
	}
	defer p.Abort()
	if err := p.Refer(t.Context(), ids...); err != nil {
		t.Fatal(err)
	}
	h := image.Header{PageSize: 4096, SegmentPages: 2, UUID: p.uuid, Created: time.Now(), Features: image.Features{Incompat: image.HasReferences}}
	w, err := image.NewWriter(p.image, h, image.None, 1)
	if err != nil {
		t.Fatal(err)
	}
	m := checkpoint.Meta{Identity: checkpoint.Identity{VM: p.ref.VM, Number: p.ref.N, UUID: p.uuid, PageSize: 4096, References: ids}}
	var refs checkpoint.References
	for _, id := range ids {
		refs = append(refs, checkpoint.Reference{UUID: id, VM: "vm", Number: 1, SegmentPages: 2})
	}
	b := w.NewBuffer(image.References)
	b.Data = refs.Append(b.Data)
	if err := w.Submit(b); err != nil {
		t.Fatal(err)
	}
	doc, id, err := m.Documents()
	if err == nil {
		err = w.Finish(doc, id)
	}
	if err != nil {
		t.Fatal(err)
	}
	ref, err := p.Commit(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	return ref
}

// TestRemoveAgain: a removed image that others need stays when another one that has got its
// number since is removed too, in whichever order numbers come.
func TestRemoveAgain(t *testing.T) {
	ctx := t.Context()
	for _, last := range []bool{false, true} {
		s, disk := newStore(t)
		first := mustCommit(t, s, "vm")
		was, err := s.owner(ctx, first.object(imageSuffix))
		if err != nil {
			t.Fatal(err)
		}
		borrower := "vm"
		if last {
			borrower = "other"
		}
		by := refer(t, s, borrower, was)
		if _, err := s.Remove(ctx, first); err != nil {
			t.Fatal(err)
		}
		// It comes back, as from another store in which it was flattened.
		p, err := s.Begin(ctx, "vm")
		if err == nil {
			p.ref = first
			err = finish(p)
		}
		if err == nil {
			_, err = p.Commit(ctx)
		}
		if err == nil {
			_, err = s.Remove(ctx, first)
		}
		if err == nil {
			_, err = s.GC(ctx)
		}
		if err != nil {
			t.Fatal(err)
		}
		f, at, err := s.openReferred(ctx, first, was)
		if err != nil {
			t.Fatalf("last %v: what %v needs is lost: %v", last, by, err)
		}
		f.Close()
		if _, err := s.Remove(ctx, by); err != nil {
			t.Fatal(err)
		}
		if f, err := disk.Open("/store/" + at.object(removedSuffix)); err == nil {
			if size, _ := f.Size(); size > 0 {
				t.Errorf("last %v: %d bytes are left that nobody needs", last, size)
			}
			f.Close()
		}
	}
}

// TestRemoveBesideRemains: what a power cut has left of an image that was emptied does not keep a
// checkpoint that has come back to its number from being removed, whether others need that or
// not.
func TestRemoveBesideRemains(t *testing.T) {
	ctx := t.Context()
	for what, left := range map[string]int{"nothing to be read": 0, "another's header": image.HeaderLen} {
		for _, needed := range []bool{false, true} {
			for _, named := range []bool{false, true} { // its own name is taken
				s, disk := newStore(t)
				r := mustCommit(t, s, "vm")
				id, err := s.owner(ctx, r.object(imageSuffix))
				if err != nil {
					t.Fatal(err)
				}
				whose := mustCommit(t, s, "other").object(imageSuffix)
				other, err := s.owner(ctx, whose)
				if err != nil {
					t.Fatal(err)
				}
				b, err := s.dir.Read(ctx, whose, 1<<20)
				if err != nil {
					t.Fatal(err)
				}
				if named {
					put(t, disk, s.dir.Path(r.keptObject(other)), b)
				}
				clear(b[left:])
				put(t, disk, s.dir.Path(r.object(removedSuffix)), b)
				if needed {
					refer(t, s, "third", id)
				}
				rm, err := s.Remove(ctx, r)
				if err != nil || rm.Left != nil || needed != (len(rm.Kept) == 1) {
					t.Errorf("%s, needed %v: %+v, %v", what, needed, rm, err)
				}
				rep, err := s.GC(ctx)
				if err != nil || len(rep.Warnings) > 0 {
					t.Errorf("%s, needed %v: gc: %v, %v", what, needed, rep.Warnings, err)
				}
				o, err := s.objects(ctx, "vm")
				if err != nil || len(o.images) > 0 || len(o.removed) != 1 || len(o.kept) > 0 {
					t.Errorf("%s, needed %v: it leaves %+v, %v", what, needed, o, err)
				}
				if f, _, err := s.openReferred(ctx, r, id); needed != (err == nil) {
					t.Errorf("%s, needed %v: %v", what, needed, err)
				} else if needed {
					f.Close()
				}
			}
		}
	}
}

// TestReferences: an image that others refer to stays when it is removed, unlisted,
// and goes with the last of them.
func TestReferences(t *testing.T) {
	s, disk := newStore(t)
	base := mustCommit(t, s, "vm")
	id, size, err := s.identity(t.Context(), base)
	if err != nil {
		t.Fatal(err)
	}
	first, second := refer(t, s, "vm", id.UUID), refer(t, s, "other", id.UUID)
	if to, by, err := s.References(t.Context(), base); err != nil || len(to) != 0 || !slices.Equal(by, []Ref{second, first}) {
		t.Errorf("references of the first: %v, %v, %v", to, by, err)
	}
	if to, by, err := s.References(t.Context(), first); err != nil || !slices.Equal(to, []uuid.UUID{id.UUID}) || len(by) != 0 {
		t.Errorf("references of the second: %v, %v, %v", to, by, err)
	}
	// Held, but not committed yet.
	held, err := s.Begin(t.Context(), "third")
	if err != nil {
		t.Fatal(err)
	}
	if err := held.Refer(t.Context(), id.UUID); err != nil {
		t.Fatal(err)
	}
	if _, err := s.Remove(t.Context(), base); !errors.Is(err, ErrInUse) {
		t.Errorf("remove of what a save refers to: %v", err)
	}
	// Who waits gets it, and no longer than it may wait in all.
	short := s.Remover()
	short.Wait = 30 * time.Millisecond
	for range 2 {
		begin := time.Now()
		if _, err := short.Remove(t.Context(), base); !errors.Is(err, ErrInUse) || time.Since(begin) > 10*time.Second {
			t.Errorf("after %v: %v", time.Since(begin), err)
		}
	}
	if short.Wait > 0 {
		t.Errorf("it has %v to wait", short.Wait)
	}
	ended, stop := context.WithCancel(t.Context())
	long := s.Remover()
	long.Wait = time.Hour
	time.AfterFunc(10*time.Millisecond, stop)
	if _, err := long.Remove(ended, base); !errors.Is(err, context.Canceled) {
		t.Error(err)
	}
	time.AfterFunc(50*time.Millisecond, func() { held.Abort() })
	rm, err := long.Remove(t.Context(), base)
	if err != nil || rm.FlashBytes != 0 || len(rm.Kept) != 2 || rm.Left != nil {
		t.Errorf("remove: %+v, %v", rm, err)
	}
	if refs, err := s.List(t.Context(), ""); err != nil || slices.Contains(refs, base) {
		t.Errorf("it is listed: %v, %v", refs, err)
	}
	kept := func() int64 {
		t.Helper()
		if rep, err := s.GC(t.Context()); err != nil || len(rep.Warnings) != 0 {
			t.Errorf("gc: %+v, %v", rep, err)
		}
		fi, err := disk.Stat("/store/vms/vm/00000001.gone")
		if err != nil {
			return 0
		}
		return fi.Size()
	}
	for _, r := range []Ref{first, second} {
		if n := kept(); n != size {
			t.Errorf("%d bytes of %d are kept for %v", n, size, r)
		}
		if _, err := s.Remove(t.Context(), r); err != nil {
			t.Error(err)
		}
	}
	if n := kept(); n != 0 {
		t.Errorf("%d bytes are kept for nobody", n)
	}
	p, err := s.Begin(t.Context(), "vm")
	if err != nil {
		t.Fatal(err)
	}
	defer p.Abort()
	if err := p.Refer(t.Context(), id.UUID); !errors.Is(err, ErrNotFound) {
		t.Errorf("a reference to what is gone: %v", err)
	}
}

// TestListing: an image that others refer to can be listed or not, and of any VM; one that is
// not there makes the checkpoints incomplete that refer to it, and no others.
func TestListing(t *testing.T) { synctest.Test(t, testListing) }

func testListing(t *testing.T) {
	s, disk := newStore(t)
	base := mustCommit(t, s, "vm")
	id, _, err := s.identity(t.Context(), base)
	if err != nil {
		t.Fatal(err)
	}
	one, two := refer(t, s, "vm", id.UUID), refer(t, s, "other", id.UUID)
	g := mustCommitGroup(t, s, "other", "third")
	lacking := func(list []Listed, err error) (refs []Ref) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
		for _, l := range list {
			switch {
			case l.Lacks == nil:
			case l.Identity == nil || !integrity.IsCorrupt(l.Lacks) || !strings.Contains(l.Lacks.Error(), id.UUID.String()):
				t.Errorf("%+v", l)
			default:
				refs = append(refs, l.Ref)
			}
		}
		return refs
	}
	check := func(what string, want ...Ref) {
		t.Helper()
		for vm, want := range map[string][]Ref{
			"": want, "third": nil,
			"vm":    slices.DeleteFunc(slices.Clone(want), func(r Ref) bool { return r.VM != "vm" }),
			"other": slices.DeleteFunc(slices.Clone(want), func(r Ref) bool { return r.VM != "other" }),
		} {
			if got := lacking(s.Listing(t.Context(), vm)); !slices.Equal(got, want) {
				t.Errorf("%s, list of %q: %v are said to be incomplete, not %v", what, vm, got, want)
			}
		}
	}
	check("all is there")
	if _, err := s.Remove(t.Context(), base); err != nil {
		t.Fatal(err)
	}
	check("it was removed")
	gone, away := "/store/vms/vm/00000001.gone", "/store/away"
	if err := disk.Rename(gone, away); err != nil {
		t.Fatal(err)
	}
	check("it is away", two, one)
	if _, err := s.Remove(t.Context(), one); err != nil {
		t.Fatal(err)
	}
	check("one was removed", two)
	// Somebody puts it back while it is looked for.
	time.AfterFunc(presencePause/2, func() { disk.Rename(away, gone) })
	check("it is back")
	if err := disk.Rename(gone, away); err != nil {
		t.Fatal(err)
	}
	member, _, err := s.identity(t.Context(), two)
	if err != nil {
		t.Fatal(err)
	}
	with := Group{Name: "g", Members: append(slices.Clone(g.Members), GroupMember{VM: two.VM, Number: two.N, UUID: member.UUID})}
	if got := lacking(s.MembersOf(t.Context(), with)); !slices.Equal(got, []Ref{two}) {
		t.Errorf("of the group's members %v are said to be incomplete", got)
	}
}

// TestSurvey: what is committed between the look without a lock and the one under it
// counts, also if what was there at first has gone away.
func TestSurvey(t *testing.T) {
	s, disk := newStore(t)
	base := mustCommit(t, s, "vm")
	id, _, err := s.identity(t.Context(), base)
	if err != nil {
		t.Fatal(err)
	}
	first := refer(t, s, "vm", id.UUID)
	v := s.lookup().survey(id.UUID)
	look := func(want ...Ref) {
		t.Helper()
		if err := v.update(t.Context()); err != nil || v.unclear != nil || !slices.Equal(v.of[id.UUID].by, want) {
			t.Errorf("%v, %v, %v, want %v", v.of[id.UUID].by, err, v.unclear, want)
		}
	}
	look(first)
	look(first)
	second := refer(t, s, "other", id.UUID)
	if _, err := s.Remove(t.Context(), first); err != nil {
		t.Fatal(err)
	}
	look(first, second)
	// One that can't say what it needs may need all.
	put(t, disk, "/store/vms/other/00000007.flic", []byte("no image"))
	if err := v.update(t.Context()); err != nil || v.unclear == nil || !v.needed(uuid.New()) {
		t.Errorf("%v, %v", err, v.unclear)
	}
	rm, err := s.Remove(t.Context(), base)
	if err != nil || rm.Left == nil || rm.FlashBytes != 0 {
		t.Errorf("removal beside it: %+v, %v", rm, err)
	}
	if _, err := s.GC(t.Context()); !integrity.IsCorrupt(err) {
		t.Errorf("gc: %v", err)
	}
	if rm, err := s.Remove(t.Context(), Ref{"other", 7}); err != nil || rm.FlashBytes != 8 {
		t.Errorf("its own removal: %+v, %v", rm, err)
	}
	if rep, err := s.GC(t.Context()); err != nil || len(rep.Warnings) > 0 || rep.Removed != 0 {
		t.Errorf("gc: %+v, %v", rep, err)
	}
	if rm, err := s.Remove(t.Context(), second); err != nil || rm.Left != nil {
		t.Errorf("%+v, %v", rm, err)
	}
	if fi, err := disk.Stat("/store/vms/vm/00000001.gone"); err == nil {
		t.Errorf("%d bytes are kept for nobody", fi.Size())
	}
}

// openingFS is one on which something happens before a file is opened.
type openingFS struct {
	vfs.FS
	before func(name string)
}

func (f *openingFS) NoLinks(string) (vfs.FS, error) { return f, nil }

func (f *openingFS) Open(name string) (vfs.File, error) {
	f.before(name)
	return f.FS.Open(name)
}

// TestHoldMoved: an image that gets another name between the look and the lock, or the look and
// the first byte, is found under that one.
func TestHoldMoved(t *testing.T) {
	for nth := 1; nth <= 2; nth++ { // open: who it is, and to lock it
		s, disk := newStore(t)
		id, _, err := s.identity(t.Context(), mustCommit(t, s, "vm"))
		if err != nil {
			t.Fatal(err)
		}
		was, opened := "/store/vms/vm/00000001.flic", 0
		slow, err := Open(t.Context(), &openingFS{disk, func(name string) {
			if name != was {
				return
			}
			if opened++; opened == nth {
				if err := disk.Rename(was, "/store/vms/vm/00000001.gone"); err != nil {
					t.Error(err)
				}
			}
		}}, "/store", false)
		if err != nil {
			t.Fatal(err)
		}
		held, err := slow.hold(t.Context(), []uuid.UUID{id.UUID})
		if err != nil || len(held) != 1 {
			t.Errorf("opened for the %d. time: %d held, %v", nth, len(held), err)
		}
		for _, f := range held {
			f.Close()
		}
		if opened < nth {
			t.Errorf("opened %d times", opened)
		}
		// One that is gone is not waited for.
		if err := disk.Remove("/store/vms/vm/00000001.gone"); err != nil {
			t.Fatal(err)
		}
		if _, err := slow.hold(t.Context(), []uuid.UUID{id.UUID}); !errors.Is(err, ErrNotFound) {
			t.Error(err)
		}
	}
}

// TestUnlessGone: what is read of an image while a removal empties it is no damage, also where its
// name stays.
func TestUnlessGone(t *testing.T) {
	s, _ := newStore(t)
	ctx := t.Context()
	damage := &integrity.CorruptError{File: "x", What: "DIGESTS", Err: errors.New("cut short")}
	if err := s.dir.Mkdir(ctx, vmFolder("vm")); err != nil {
		t.Fatal(err)
	}
	r := Ref{"vm", 1}
	for name, c := range map[string]struct {
		content []byte
		gone    bool
	}{
		r.object(removedSuffix):            {nil, true},
		Ref{"vm", 2}.object(removedSuffix): {[]byte("image"), false},
		r.object(imageSuffix):              {nil, false},
	} {
		if err := s.dir.Write(ctx, name, spare(), c.content); err != nil {
			t.Fatal(err)
		}
		if err := s.unlessGone(ctx, name, damage); gone(err) != c.gone || !c.gone && err != error(damage) {
			t.Errorf("%s: %v", name, err)
		}
	}
	if err := s.unlessGone(ctx, Ref{"vm", 3}.object(imageSuffix), damage); !gone(err) {
		t.Error(err)
	}
	if err := s.unlessGone(ctx, r.object(imageSuffix), errNeeded); err != errNeeded {
		t.Error(err)
	}
}
