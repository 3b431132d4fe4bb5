package vfs_test

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/flic-migrate/flic-migrate/tier/vfs"
)

// TestRootInAnothersDirectory: what root makes in a guarded directory of another user
// is that user's; elsewhere it stays root's.
func TestRootInAnothersDirectory(t *testing.T) {
	dir := t.TempDir()
	mine := os.Geteuid()
	want := mine
	if mine == 0 {
		want = 12345
		if err := os.Chown(dir, want, want); err != nil {
			t.Fatal(err)
		}
	}
	fsys, err := vfs.OS.NoLinks(dir)
	if err != nil {
		t.Fatal(err)
	}
	if err := fsys.MkdirAll(filepath.Join(dir, "a", "b")); err != nil {
		t.Fatal(err)
	}
	f, err := fsys.Create(filepath.Join(dir, "a", "b", "file"))
	if err != nil {
		t.Fatal(err)
	}
	f.Close()
	l, err := fsys.Lock(t.Context(), filepath.Join(dir, "lock"), vfs.Exclusive)
	if err != nil {
		t.Fatal(err)
	}
	l.Close()
	// A name of somebody else's file gives nobody that file.
	other := filepath.Join(t.TempDir(), "other")
	if err := os.WriteFile(other, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Link(other, filepath.Join(dir, "linked")); err != nil {
		t.Fatal(err)
	}
	if l, err = fsys.Lock(t.Context(), filepath.Join(dir, "linked"), vfs.Exclusive); err != nil {
		t.Fatal(err)
	}
	l.Close()
	if f, err = vfs.OS.Create(filepath.Join(dir, "unguarded")); err != nil {
		t.Fatal(err)
	}
	f.Close()
	for name, fsys := range map[string]vfs.FS{"a/b/unnamed": fsys, "a/b/rootsown": vfs.OS} {
		path := filepath.Join(dir, name)
		if f, err = fsys.CreateUnnamed(filepath.Dir(path)); err != nil {
			t.Fatal(err)
		}
		if err := f.LinkAs(path); err != nil {
			t.Fatal(err)
		}
		f.Close()
	}
	for name, uid := range map[string]int{"a": want, "a/b": want, "a/b/file": want, "a/b/unnamed": want, "a/b/rootsown": mine, "lock": want, "unguarded": mine, "linked": mine} {
		fi, err := os.Lstat(filepath.Join(dir, name))
		if err != nil {
			t.Fatal(err)
		}
		if got := int(fi.Sys().(*syscall.Stat_t).Uid); got != uid {
			t.Errorf("%s belongs to %d, want %d", name, got, uid)
		}
	}
}

// TestWhoHasTheLock: a wait that ends says for which process it was.
func TestWhoHasTheLock(t *testing.T) {
	name := filepath.Join(t.TempDir(), "lock")
	l, err := vfs.OS.Lock(t.Context(), name, vfs.Exclusive)
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Millisecond)
	defer cancel()
	_, err = vfs.OS.Lock(ctx, name, vfs.Exclusive)
	if err == nil || !strings.Contains(err.Error(), fmt.Sprintf("process %d (", os.Getpid())) {
		t.Errorf("%v", err)
	}
}

// TestID tells a directory from a copy of it, and knows it under another name.
func TestID(t *testing.T) {
	dir := t.TempDir()
	a, b := filepath.Join(dir, "a"), filepath.Join(dir, "b")
	for _, d := range []string{a, b} {
		if err := os.Mkdir(d, 0o700); err != nil {
			t.Fatal(err)
		}
	}
	id, err := vfs.OS.ID(a)
	if err != nil || id == "" {
		t.Fatal(err)
	}
	if other, err := vfs.OS.ID(b); err != nil || other == id {
		t.Errorf("another directory has the ID %q, %v", other, err)
	}
	if err := os.Rename(a, filepath.Join(dir, "c")); err != nil {
		t.Fatal(err)
	}
	if moved, err := vfs.OS.ID(filepath.Join(dir, "c")); err != nil || moved != id {
		t.Errorf("renamed, it has the ID %q and not %q, %v", moved, id, err)
	}
	if _, err := vfs.OS.ID(a); err == nil {
		t.Error("what is not there has an ID")
	}
}
