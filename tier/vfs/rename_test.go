package vfs

import (
	"errors"
	"os"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"
)

// TestLinkAndUnlink renames as where the file system has no rename that never replaces, and
// has the steps fail or be asked for twice.
func TestLinkAndUnlink(t *testing.T) {
	failing := func(which ...string) func(int, string, int) error {
		return func(dir int, base string, flags int) error {
			for _, w := range which {
				if filepath.Base(base) == w {
					return unix.EIO
				}
			}
			return unix.Unlinkat(dir, base, flags)
		}
	}
	for name, tc := range map[string]struct {
		there    string // what has the new name before: "", "the file", "another"
		unlink   func(int, string, int) error
		err      error
		old, new bool // names that the file has afterwards
	}{
		"plain":                  {"", failing(), nil, false, true},
		"taken":                  {"another", failing(), unix.EEXIST, true, false},
		"linked before":          {"the file", failing(), nil, false, true},
		"unlinked before":        {"", func(d int, b string, f int) error { unix.Unlinkat(d, b, f); return unix.ENOENT }, nil, false, true},
		"unlink fails":           {"", failing("old"), unix.EIO, true, false},
		"neither can be removed": {"", failing("old", "new"), unix.EIO, true, true},
	} {
		t.Run(name, func(t *testing.T) {
			dir := t.TempDir()
			oldname, newname := filepath.Join(dir, "old"), filepath.Join(dir, "new")
			if err := os.WriteFile(oldname, []byte("file"), 0o600); err != nil {
				t.Fatal(err)
			}
			var err error
			switch tc.there {
			case "the file":
				err = os.Link(oldname, newname)
			case "another":
				err = os.WriteFile(newname, []byte("another"), 0o600)
			}
			if err != nil {
				t.Fatal(err)
			}
			err = linkAndUnlink(place{dir: unix.AT_FDCWD, base: oldname}, place{dir: unix.AT_FDCWD, base: newname}, tc.unlink)
			if !errors.Is(err, tc.err) {
				t.Errorf("the error is %v", err)
			}
			for path, want := range map[string]bool{oldname: tc.old, newname: tc.new} {
				b, _ := os.ReadFile(path)
				if got := string(b) == "file"; got != want {
					t.Errorf("%s has %q", path, b)
				}
			}
			if b, _ := os.ReadFile(newname); tc.there == "another" && string(b) != "another" {
				t.Errorf("what was there has become %q", b)
			}
		})
	}
	t.Run("itself", func(t *testing.T) {
		name := filepath.Join(t.TempDir(), "a")
		if err := os.WriteFile(name, nil, 0o600); err != nil {
			t.Fatal(err)
		}
		p := place{dir: unix.AT_FDCWD, base: name}
		if err := linkAndUnlink(p, p, unix.Unlinkat); err != unix.EEXIST {
			t.Errorf("the error is %v", err)
		}
		if _, err := os.Lstat(name); err != nil {
			t.Error(err)
		}
	})
}
