package vfs_test

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"github.com/flic-migrate/flic-migrate/tier/vfs"
	"github.com/flic-migrate/flic-migrate/tier/vfs/crashfs"
)

// onlyFile checks that a directory holds one file and nothing besides.
func onlyFile(t *testing.T, fsys vfs.FS, name, content string) {
	t.Helper()
	list, err := fsys.ReadDir(filepath.Dir(name))
	if err != nil || len(list) != 1 || list[0].Name() != filepath.Base(name) {
		t.Fatalf("%v, %v", list, err)
	}
	if got := read(t, fsys, name); got != content {
		t.Fatalf("%q, want %q", got, content)
	}
	if fi, err := fsys.Stat(name); err != nil || fi.Mode() != 0o600 {
		t.Fatalf("%v, %v", fi, err)
	}
}

func TestWriteFile(t *testing.T) {
	forEach(t, func(t *testing.T, fsys vfs.FS, dir string) {
		name := filepath.Join(dir, "f")
		write := func(o vfs.Writing, content string) error {
			return vfs.WriteFile(fsys, name, o, vfs.Bytes([]byte(content)))
		}
		for i, o := range []vfs.Writing{{New: true}, {}, {NoSync: true}, {Temporary: filepath.Join(dir, "tmp")}} {
			content := strings.Repeat("x", i)
			if err := write(o, content); err != nil {
				t.Fatal(err)
			}
			onlyFile(t, fsys, name, content)
		}
		wantErr(t, "New over a file", write(vfs.Writing{New: true}, "y"), fs.ErrExist)
		onlyFile(t, fsys, name, "xxx")

		want := errors.New("from write")
		wantErr(t, "write", vfs.WriteFile(fsys, name, vfs.Writing{}, func(f vfs.File) error {
			f.Write([]byte("half"))
			return want
		}), want)
		onlyFile(t, fsys, name, "xxx")

		func() {
			defer func() { recover() }()
			vfs.WriteFile(fsys, name, vfs.Writing{}, func(vfs.File) error { panic("in write") })
		}()
		onlyFile(t, fsys, name, "xxx")

		if err := fsys.MkdirAll(filepath.Join(dir, "d")); err != nil {
			t.Fatal(err)
		}
		wantErr(t, "over a directory", vfs.WriteFile(fsys, filepath.Join(dir, "d"), vfs.Writing{}, vfs.Bytes(nil)), vfs.ErrNotRegular)
		wantErr(t, "in no directory", vfs.WriteFile(fsys, filepath.Join(dir, "none/f"), vfs.Writing{}, vfs.Bytes(nil)), fs.ErrNotExist)
	})
}

// TestWriteFileReplacesFilesOnly: what is no regular file stays what it is. As
// root a report to a device would have replaced the device.
func TestWriteFileReplacesFilesOnly(t *testing.T) {
	dir := t.TempDir()
	for name, c := range map[string]struct {
		make func(string) error
		want error
	}{
		"fifo":   {func(n string) error { return syscall.Mkfifo(n, 0o600) }, vfs.ErrNotRegular},
		"link":   {func(n string) error { return os.Symlink("target", n) }, vfs.ErrLink},
		"device": {func(n string) error { return os.Symlink("/dev/null", n) }, vfs.ErrLink},
	} {
		path := filepath.Join(dir, name)
		if err := c.make(path); err != nil {
			t.Fatal(err)
		}
		before, _ := os.Lstat(path)
		wantErr(t, name, vfs.WriteFile(vfs.OS, path, vfs.Writing{}, vfs.Bytes([]byte("x"))), c.want)
		if after, err := os.Lstat(path); err != nil || !os.SameFile(before, after) {
			t.Errorf("%s was replaced: %v, %v", name, after, err)
		}
	}
	if list, _ := os.ReadDir(dir); len(list) != 3 {
		t.Errorf("left behind: %v", list)
	}
}

// TestWriteFileLeavesNothing: a file that is being written has no name, so that a killed
// process leaves none, but where the file system has only files with one.
func TestWriteFileLeavesNothing(t *testing.T) {
	during := func(t *testing.T, fsys vfs.FS, dir string, o vfs.Writing) int {
		t.Helper()
		n := 0
		must(t, vfs.WriteFile(fsys, filepath.Join(dir, "f"), o, func(vfs.File) error {
			list, err := fsys.ReadDir(dir)
			n = len(list)
			return err
		}))
		onlyFile(t, fsys, filepath.Join(dir, "f"), "")
		return n
	}
	forEach(t, func(t *testing.T, fsys vfs.FS, dir string) {
		if n := during(t, fsys, dir, vfs.Writing{New: true}); n != 0 {
			t.Errorf("%d names while it is made", n)
		}
		if n := during(t, fsys, dir, vfs.Writing{}); n != 1 {
			t.Errorf("%d names while it is replaced", n)
		}
	})
	nfs := crashfs.New(0)
	nfs.SetNoUnnamed(true)
	must(t, nfs.MkdirAll("/d"))
	if n := during(t, nfs, "/d", vfs.Writing{New: true}); n != 1 {
		t.Errorf("%d names on a file system whose files have one", n)
	}
	if n := during(t, nfs, "/d", vfs.Writing{}); n != 2 {
		t.Errorf("%d names on a file system whose files have one", n)
	}
}

// TestUnnamed: a file without a name gets one with all its content, and takes nobody's.
func TestUnnamed(t *testing.T) {
	forEach(t, func(t *testing.T, fsys vfs.FS, dir string) {
		_, err := fsys.CreateUnnamed(filepath.Join(dir, "none"))
		wantErr(t, "in no directory", err, fs.ErrNotExist)
		name := filepath.Join(dir, "f")
		write(t, fsys, name, "there")
		_, err = fsys.CreateUnnamed(name)
		wantErr(t, "in a file", err, syscall.ENOTDIR)
		f, err := fsys.CreateUnnamed(dir)
		must(t, err)
		defer f.Close()
		if n, err := f.Links(); n != 0 || err != nil || filepath.Dir(f.Name()) != dir {
			t.Errorf("%d links, %v, name %s", n, err, f.Name())
		}
		_, err = f.Write([]byte("content"))
		must(t, err)
		wantErr(t, "over a file", f.LinkAs(name), fs.ErrExist)
		if got := read(t, fsys, name); got != "there" {
			t.Errorf("what was there is %q", got)
		}
		wantErr(t, "into no directory", f.LinkAs(filepath.Join(dir, "none/f")), fs.ErrNotExist)
		must(t, fsys.Remove(name))
		must(t, f.LinkAs(name))
		onlyFile(t, fsys, name, "content")
		if n, err := f.Links(); n != 1 || err != nil {
			t.Errorf("%d links, %v", n, err)
		}
	})
}

// TestUnnamedGuarded: a file that gets a name follows no link in a guarded directory, and has
// its mode whatever the umask is.
func TestUnnamedGuarded(t *testing.T) {
	dir, outside := t.TempDir(), t.TempDir()
	must(t, os.Symlink(outside, filepath.Join(dir, "link")))
	fsys, err := vfs.OS.NoLinks(dir)
	must(t, err)
	_, err = fsys.CreateUnnamed(filepath.Join(dir, "link"))
	wantErr(t, "in a link", err, vfs.ErrLink)
	defer syscall.Umask(syscall.Umask(0o777))
	f, err := fsys.CreateUnnamed(dir)
	must(t, err)
	defer f.Close()
	wantErr(t, "through a link", f.LinkAs(filepath.Join(dir, "link/f")), vfs.ErrLink)
	must(t, f.LinkAs(filepath.Join(dir, "f")))
	if fi, err := fsys.Stat(filepath.Join(dir, "f")); err != nil || fi.Mode() != 0o600 {
		t.Error(fi, err)
	}
}

// TestWriteFileCrash ends the process, or the power, at each operation: the
// file is the old or the new one, and the new one once WriteFile has returned. A file that is
// new has no other name at any time.
func TestWriteFileCrash(t *testing.T) {
	old, renewed := strings.Repeat("old", 3000), strings.Repeat("newer", 3000)
	for _, c := range []struct{ named, isNew bool }{{false, false}, {true, false}, {false, true}, {true, true}} {
		for n := 0; ; n++ {
			fsys := crashfs.New(0)
			fsys.SetNoUnnamed(c.named)
			must(t, fsys.MkdirAll("/d"))
			if !c.isNew {
				must(t, vfs.WriteFile(fsys, "/d/f", vfs.Writing{}, vfs.Bytes([]byte(old))))
			}
			fsys.KillAt(n)
			err := vfs.WriteFile(fsys, "/d/f", vfs.Writing{New: c.isNew}, vfs.Bytes([]byte(renewed)))
			for seed := range uint64(40) {
				after := fsys.CrashClone(seed)
				if list, lerr := after.ReadDir("/d"); lerr != nil || c.isNew && !c.named && (len(list) > 1 || len(list) == 1 && list[0].Name() != "f") {
					t.Fatalf("%+v, killed at operation %d, seed %d: %v, %v", c, n, seed, list, lerr)
				}
				if _, serr := after.Stat("/d/f"); c.isNew && err != nil && errors.Is(serr, fs.ErrNotExist) {
					continue
				}
				if got := read(t, after, "/d/f"); got != renewed && (err == nil || c.isNew || got != old) {
					t.Fatalf("%+v, killed at operation %d (%v), seed %d: %d bytes: %.20q", c, n, err, seed, len(got), got)
				}
			}
			if err == nil {
				if n < 5 {
					t.Errorf("only %d operations", n)
				}
				break
			}
		}
	}
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func TestReadFile(t *testing.T) {
	forEach(t, func(t *testing.T, fsys vfs.FS, dir string) {
		name := filepath.Join(dir, "f")
		write(t, fsys, name, "twelve bytes")
		if b, err := vfs.ReadFile(fsys, name, 12); err != nil || string(b) != "twelve bytes" {
			t.Errorf("%q, %v", b, err)
		}
		_, err := vfs.ReadFile(fsys, name, 11)
		wantErr(t, "too large", err, vfs.ErrTooLarge)
		_, err = vfs.ReadFile(fsys, filepath.Join(dir, "none"), 11)
		wantErr(t, "missing", err, fs.ErrNotExist)
		_, err = vfs.ReadFile(fsys, dir, 11)
		wantErr(t, "directory", err, syscall.EISDIR)
		write(t, fsys, name+"0", "")
		if b, err := vfs.ReadFile(fsys, name+"0", 0); err != nil || len(b) != 0 {
			t.Errorf("%q, %v", b, err)
		}
	})
	// 1 TiB that a hole stands for is refused before it is memory.
	name := filepath.Join(t.TempDir(), "sparse")
	write(t, vfs.OS, name, "")
	must(t, os.Truncate(name, 1<<40))
	_, err := vfs.ReadFile(vfs.OS, name, 1<<20)
	wantErr(t, "sparse", err, vfs.ErrTooLarge)
}
