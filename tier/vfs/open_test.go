package vfs_test

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"github.com/flic-migrate/flic-migrate/tier/vfs"
	"github.com/flic-migrate/flic-migrate/tier/vfs/crashfs"
)

// TestOpenNeverWaits: a FIFO, without anybody at its other end, is refused at
// once by everything that opens.
func TestOpenNeverWaits(t *testing.T) {
	dir := t.TempDir()
	name := filepath.Join(dir, "fifo")
	must(t, syscall.Mkfifo(name, 0o600))
	guarded, err := vfs.OS.NoLinks(dir)
	must(t, err)
	for _, fsys := range []vfs.FS{vfs.OS, guarded} {
		for what, open := range map[string]func() error{
			"Open":     func() error { _, err := fsys.Open(name); return err },
			"OpenRW":   func() error { _, err := fsys.OpenRW(name); return err },
			"Lock":     func() error { _, err := fsys.Lock(t.Context(), name, vfs.Shared); return err },
			"ReadFile": func() error { _, err := vfs.ReadFile(fsys, name, 1<<20); return err },
		} {
			done := make(chan error, 1)
			go func() { done <- open() }()
			select {
			case err := <-done:
				wantErr(t, what, err, vfs.ErrNotRegular)
			case <-time.After(10 * time.Second):
				t.Fatalf("%s waits", what)
			}
		}
		wantErr(t, "SyncDir", fsys.SyncDir(name), syscall.ENOTDIR)
		_, err := fsys.ReadDir(name)
		wantErr(t, "ReadDir", err, syscall.ENOTDIR)
	}
	_, err = vfs.OS.Open("/dev/zero")
	wantErr(t, "character device", err, vfs.ErrNotRegular)
}

// TestNoLinks puts a link in each place of a guarded directory, and sees that
// what it leads to is neither read, changed nor made.
func TestNoLinks(t *testing.T) {
	top := t.TempDir()
	outside, store := filepath.Join(top, "outside"), filepath.Join(top, "store")
	must(t, vfs.OS.MkdirAll(outside))
	write(t, vfs.OS, filepath.Join(outside, "secret"), "secret")
	must(t, vfs.OS.MkdirAll(filepath.Join(store, "real")))
	must(t, os.Symlink("../outside", filepath.Join(store, "dir")))
	must(t, os.Symlink("../../outside/secret", filepath.Join(store, "real/file")))
	must(t, os.Symlink("../../outside/new", filepath.Join(store, "real/dangling")))
	must(t, os.Symlink("real", filepath.Join(store, "inside"))) // leads to the store itself
	// The store may be named by a link, and relative to any directory.
	must(t, os.Symlink("store", filepath.Join(top, "alias")))
	t.Chdir(top)
	for _, dir := range []string{store, filepath.Join(top, "alias"), "store", "./alias/", "real/.."} {
		if dir == "real/.." {
			t.Chdir(store)
		}
		fsys, err := vfs.OS.NoLinks(dir)
		must(t, err)
		p := func(s string) string { return filepath.Join(dir, s) }
		plain := p("real/plain")
		write(t, fsys, plain, "x")
		opened := func(f vfs.File, err error) error {
			if err == nil {
				f.Close()
			}
			return err
		}
		for what, do := range map[string]func() error{
			"Open":          func() error { return opened(fsys.Open(p("real/file"))) },
			"Open below":    func() error { return opened(fsys.Open(p("dir/secret"))) },
			"Open inside":   func() error { return opened(fsys.Open(p("inside/plain"))) },
			"OpenRW":        func() error { return opened(fsys.OpenRW(p("real/file"))) },
			"Create below":  func() error { return opened(fsys.Create(p("dir/made"))) },
			"Stat":          func() error { _, err := fsys.Stat(p("real/file")); return err },
			"Stat below":    func() error { _, err := fsys.Stat(p("dir/secret")); return err },
			"Lstat below":   func() error { _, err := fsys.Lstat(p("dir/secret")); return err },
			"StatFS below":  func() error { _, err := fsys.StatFS(p("dir/secret")); return err },
			"ReadDir":       func() error { _, err := fsys.ReadDir(p("dir")); return err },
			"SyncDir":       func() error { return fsys.SyncDir(p("dir")) },
			"MkdirAll":      func() error { return fsys.MkdirAll(p("dir")) },
			"MkdirAll more": func() error { return fsys.MkdirAll(p("dir/made")) },
			"Remove below":  func() error { return fsys.Remove(p("dir/secret")) },
			"Rename out":    func() error { return fsys.Rename(plain, p("dir/made")) },
			"Rename in":     func() error { return fsys.Rename(p("dir/secret"), p("real/got")) },
			"Replace out":   func() error { return fsys.Replace(plain, p("dir/secret")) },
			"Lock":          func() error { _, err := fsys.Lock(t.Context(), p("real/dangling"), vfs.Shared); return err },
			"TryLock":       func() error { _, err := fsys.TryLock(p("real/file"), vfs.Shared); return err },
			"WriteFile":     func() error { return vfs.WriteFile(fsys, p("real/file"), vfs.Writing{}, vfs.Bytes(nil)) },
		} {
			err := do()
			wantErr(t, dir+": "+what, err, vfs.ErrLink)
			if err != nil && !strings.Contains(err.Error(), "symbolic link") {
				t.Errorf("%s: %v", what, err)
			}
		}
		if list, err := os.ReadDir(outside); err != nil || len(list) != 1 {
			t.Fatalf("outside of %s: %v, %v", dir, list, err)
		}
		if got := read(t, vfs.OS, filepath.Join(outside, "secret")); got != "secret" {
			t.Fatalf("%q", got)
		}

		// Everything else goes on as ever: below, the links themselves, and beside.
		must(t, fsys.MkdirAll(p("real/a/b")))
		must(t, fsys.Rename(plain, p("real/a/b/c")))
		if got := read(t, fsys, p("real/a/b/c")); got != "x" {
			t.Errorf("%q", got)
		}
		if fi, err := fsys.Lstat(p("real/file")); err != nil || fi.Mode()&os.ModeSymlink == 0 {
			t.Errorf("%v, %v", fi, err)
		}
		if list, err := fsys.ReadDir(p("real")); err != nil || len(list) != 3 {
			t.Errorf("%v, %v", list, err)
		}
		if _, err := fsys.StatFS(p("real/a")); err != nil {
			t.Error(err)
		}
		for _, n := range []string{"real/a/b/c", "real/a/b", "real/a"} {
			must(t, fsys.Remove(p(n)))
		}
		must(t, fsys.SyncDir(dir))
		if got := read(t, fsys, filepath.Join(outside, "secret")); got != "secret" {
			t.Errorf("%q", got)
		}
	}
	fsys, err := vfs.OS.NoLinks(store)
	must(t, err)
	must(t, fsys.Remove(filepath.Join(store, "dir"))) // the link, not what it names
	if got := read(t, vfs.OS, filepath.Join(outside, "secret")); got != "secret" {
		t.Errorf("%q", got)
	}
}

// TestUmask: with any umask a directory can be entered by its owner and by
// nobody else, and a file can be read by its owner and by nobody else.
func TestUmask(t *testing.T) {
	dir := t.TempDir()
	for _, mask := range []int{0, 0o022, 0o700, 0o777} {
		old := syscall.Umask(mask)
		sub := filepath.Join(dir, "m"+time.Duration(mask).String())
		must(t, vfs.OS.MkdirAll(filepath.Join(sub, "d/e")))
		write(t, vfs.OS, filepath.Join(sub, "d/e/f"), "")
		must(t, vfs.WriteFile(vfs.OS, filepath.Join(sub, "d/whole"), vfs.Writing{}, vfs.Bytes(nil)))
		l, err := vfs.OS.TryLock(filepath.Join(sub, "d/lock"), vfs.Exclusive)
		must(t, err)
		must(t, l.Close())
		syscall.Umask(old)
		for name, want := range map[string]os.FileMode{"": 0o700, "d": 0o700, "d/e": 0o700, "d/e/f": 0o600, "d/whole": 0o600, "d/lock": 0o600} {
			if fi, err := os.Stat(filepath.Join(sub, name)); err != nil || fi.Mode().Perm() != want {
				t.Errorf("umask %04o: %s: %v, %v", mask, name, fi.Mode(), err)
			}
		}
	}
}

// TestLockLimit: no wait for a lock is without end, and the error says for what
// and how long.
func TestLockLimit(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		fsys := crashfs.New(0)
		l, err := fsys.TryLock("/lock", vfs.Exclusive)
		must(t, err)
		defer l.Close()
		f, err := fsys.OpenRW("/lock")
		must(t, err)
		defer f.Close()
		for _, wait := range []func(context.Context) error{
			func(ctx context.Context) error { _, err := fsys.Lock(ctx, "/lock", vfs.Shared); return err },
			func(ctx context.Context) error { return f.Lock(ctx, vfs.Shared) },
		} {
			began := time.Now()
			err := wait(context.Background())
			wantErr(t, "wait", err, vfs.ErrLocked)
			if d := time.Since(began); d < vfs.LockLimit || d > vfs.LockLimit+time.Second {
				t.Errorf("waited %v", d)
			}
			if !strings.Contains(err.Error(), "/lock: waited 30") {
				t.Errorf("%v", err)
			}
			why := errors.New("told to stop")
			ctx, cancel := context.WithCancelCause(context.Background())
			time.AfterFunc(3*time.Second, func() { cancel(why) })
			err = wait(ctx)
			wantErr(t, "wait", err, why)
			if !strings.Contains(err.Error(), "/lock: waited 3") {
				t.Errorf("%v", err)
			}
		}
	})
}
