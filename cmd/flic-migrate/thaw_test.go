package main

import (
	"bytes"
	"encoding/json"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/flic-migrate/flic-migrate/tier/checkpoint"
	"github.com/flic-migrate/flic-migrate/tier/disk"
	"github.com/flic-migrate/flic-migrate/tier/integrity"
	"github.com/flic-migrate/flic-migrate/tier/save"
	"github.com/flic-migrate/flic-migrate/tier/store"
	"github.com/flic-migrate/flic-migrate/tier/tiertest"
	"github.com/flic-migrate/flic-migrate/tier/vfs"
)

// TestDiskThaw: of a VM's disks each becomes a file, or none does.
func TestDiskThaw(t *testing.T) {
	dir := t.TempDir()
	root := filepath.Join(dir, "store")
	st, err := store.Open(t.Context(), vfs.OS, root, true)
	ok(t, err)
	// keep makes a checkpoint of a VM with these disks, and returns the store's copies.
	keep := func(vm string, images ...string) (copies []string) {
		t.Helper()
		var list []checkpoint.VMDisk
		for _, name := range images {
			image := filepath.Join(dir, name)
			ok(t, os.MkdirAll(filepath.Dir(image), 0o700))
			ok(t, os.WriteFile(image, bytes.Repeat([]byte(name), 1<<17), 0o600))
			fi, err := os.Stat(image)
			ok(t, err)
			f, err := st.Freeze(t.Context(), image, store.FreezeOptions{Copy: true})
			ok(t, err)
			defer f.Close()
			copies = append(copies, f.Path())
			list = append(list, checkpoint.VMDisk{Name: name, Kept: f.UUID, Layers: []disk.Identity{
				{Path: image, Format: disk.Raw, Size: fi.Size(), File: disk.File{Size: fi.Size(), Mtime: fi.ModTime().UnixNano()}}}})
		}
		ref, _, err := save.Run(t.Context(), vfs.OS, st, tiertest.New(tiertest.Options{}).Reader(), save.Options{VM: vm, Keeps: true,
			VMDisks: func() []checkpoint.VMDisk { return list }})
		ok(t, err)
		_, err = st.DigestKept(t.Context(), ref)
		ok(t, err)
		return copies
	}
	thaw := func(name, to string, asJSON bool) (string, error) {
		t.Helper()
		out, err := os.CreateTemp(t.TempDir(), "out")
		ok(t, err)
		defer out.Close()
		a := newApp(vfs.OS)
		a.store, a.stdout = root, &output{File: out}
		thawErr := a.diskThaw(t.Context(), name, to, store.ThawOptions{}, asJSON)
		said, err := os.ReadFile(out.Name())
		ok(t, err)
		return string(said), thawErr
	}
	holds := func(folder string, want ...string) {
		t.Helper()
		list, err := os.ReadDir(folder)
		ok(t, err)
		var got []string
		for _, e := range list {
			got = append(got, e.Name())
		}
		if strings.Join(got, " ") != strings.Join(want, " ") {
			t.Errorf("%s holds %q, want %q", folder, got, want)
		}
	}
	to := filepath.Join(dir, "to")
	ok(t, os.Mkdir(to, 0o700))

	keep("twins", "a/disk0", "b/disk0")
	if said, err := thaw("twins", to, false); err == nil || !strings.Contains(err.Error(), filepath.Join(dir, "a/disk0")) || !strings.Contains(err.Error(), filepath.Join(dir, "b/disk0")) || said != "" {
		t.Errorf("two disks of one name: %v, %q", err, said)
	}
	holds(to)
	said, err := thaw("twins", "", true)
	ok(t, err)
	var files []thawed
	ok(t, json.Unmarshal([]byte(said), &files))
	if len(files) != 2 || files[0].Path != filepath.Join(dir, "a/disk0.twins@1") || files[0].NotChecked {
		t.Errorf("%+v", files)
	}
	holds(filepath.Join(dir, "a"), "disk0", "disk0.twins@1")
	holds(filepath.Join(dir, "b"), "disk0", "disk0.twins@1")

	// The second one is not what it was.
	copies := keep("vm", "c/disk1", "d/disk2")
	fi, err := os.Stat(copies[1])
	ok(t, err)
	f, err := os.OpenFile(copies[1], os.O_WRONLY, 0)
	ok(t, err)
	_, err = f.WriteAt([]byte("x"), 4096)
	ok(t, errors.Join(err, f.Close(), os.Chtimes(copies[1], fi.ModTime(), fi.ModTime())))
	if said, err := thaw("vm", to, false); !integrity.IsCorrupt(err) || said != "" {
		t.Errorf("%v, %q", err, said)
	}
	holds(to)
}
