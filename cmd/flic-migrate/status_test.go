package main

import (
	"encoding/json"
	"log/slog"
	"os"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/flic-migrate/flic-migrate/tier/progress"
)

// Who reads the file of --status finds a whole document, whenever that is.
func TestStatus(t *testing.T) {
	path := filepath.Join(t.TempDir(), "status")
	s := newStatusFile(path, slog.New(slog.DiscardHandler))
	read := func() (st status) {
		t.Helper()
		b, err := os.ReadFile(path)
		ok(t, err)
		ok(t, json.Unmarshal(b, &st))
		return st
	}
	first := status{PID: os.Getpid(), Namespace: pidNamespace()}
	if got := read(); got != first {
		t.Errorf("read %+v, want %+v", got, first)
	}
	for i, p := range []progress.State{{Pages: 12345678, PagesAll: 1 << 34}, {Pages: 7, PagesAll: 9}} {
		s.progress(p)
		if got := read(); got.Pages != p.Pages || got.PagesAll != p.PagesAll || got.Beat != int64(i+1) {
			t.Errorf("read %+v", got)
		}
	}
	if fi, err := os.Stat(path); err != nil || fi.Mode().Perm() != 0o600 {
		t.Errorf("%v, %v", fi.Mode(), err)
	}
	if left, _ := os.ReadDir(filepath.Dir(path)); len(left) != 1 {
		t.Errorf("left: %v", left)
	}
	newStatusFile("", nil).progress(progress.State{})
}

// What is no regular file is neither written to, nor replaced, nor waited for.
func TestStatusElsewhere(t *testing.T) {
	dir := t.TempDir()
	target, link, fifo := filepath.Join(dir, "target"), filepath.Join(dir, "link"), filepath.Join(dir, "fifo")
	ok(t, os.WriteFile(target, []byte("precious"), 0o600))
	ok(t, os.Symlink(target, link))
	ok(t, unix.Mkfifo(fifo, 0o600))
	for _, path := range []string{link, fifo, filepath.Join(dir, "no", "such"), dir} {
		before, _ := os.Lstat(path)
		s := newStatusFile(path, slog.New(slog.DiscardHandler))
		s.progress(progress.State{Pages: 1})
		if after, _ := os.Lstat(path); before != nil && !os.SameFile(before, after) {
			t.Errorf("%s was replaced", path)
		}
	}
	if b, err := os.ReadFile(target); err != nil || string(b) != "precious" {
		t.Errorf("%q, %v", b, err)
	}
}
