package vfs_test

import (
	"os"
	"path/filepath"
	"syscall"
	"testing"

	"github.com/flic-migrate/flic-migrate/tier/vfs"
)

// TestReplaceFile: a new file has the mode that was asked for, one that is replaced keeps its
// own, a link stays one, and nothing else is in the directory, after a failure too.
func TestReplaceFile(t *testing.T) {
	defer syscall.Umask(syscall.Umask(0o077))
	dir := filepath.Join(t.TempDir(), "a", "b")
	path, link := filepath.Join(dir, "x.conf"), filepath.Join(dir, "link")
	is := func(text string, mode os.FileMode, names int) {
		t.Helper()
		b, err := os.ReadFile(path)
		if err != nil || string(b) != text {
			t.Errorf("%q, %v; want %q", b, err, text)
		}
		if fi, err := os.Stat(path); err != nil || fi.Mode() != mode {
			t.Errorf("mode %v, %v; want %v", fi.Mode(), err, mode)
		}
		if list, err := os.ReadDir(dir); err != nil || len(list) != names {
			t.Errorf("%v, %v", list, err)
		}
	}
	for _, err := range []error{
		vfs.ReplaceFile(path, []byte("new"), 0o644),
		os.Chmod(path, 0o640),
		os.Symlink("x.conf", link),
	} {
		if err != nil {
			t.Fatal(err)
		}
	}
	is("new", 0o640, 2)
	if err := vfs.ReplaceFile(link, []byte("other"), 0o644); err != nil {
		t.Error(err)
	}
	is("other", 0o640, 2)
	if fi, err := os.Lstat(link); err != nil || fi.Mode()&os.ModeSymlink == 0 {
		t.Errorf("the link is %v, %v", fi.Mode(), err)
	}
	if err := os.Mkdir(filepath.Join(dir, "folder"), 0o700); err != nil {
		t.Fatal(err)
	}
	if err := vfs.ReplaceFile(filepath.Join(dir, "folder"), []byte("x"), 0o644); err == nil {
		t.Error("a directory has been replaced")
	}
	is("other", 0o640, 3)
}
