package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/flic-migrate/flic-migrate/tier/checkpoint"
	"github.com/flic-migrate/flic-migrate/tier/disk"
	"github.com/flic-migrate/flic-migrate/tier/save"
	"github.com/flic-migrate/flic-migrate/tier/store"
	"github.com/flic-migrate/flic-migrate/tier/tiertest"
	"github.com/flic-migrate/flic-migrate/tier/vfs"
)

// whenRead calls a function when a disk that is kept is read.
type whenRead struct {
	vfs.FS
	call func()
}

type whenReadFile struct {
	vfs.File
	call func()
}

func (d whenRead) NoLinks(dir string) (vfs.FS, error) {
	fsys, err := d.FS.NoLinks(dir)
	return whenRead{fsys, d.call}, err
}

func (d whenRead) Open(name string) (vfs.File, error) {
	f, err := d.FS.Open(name)
	if err == nil && strings.Contains(name, "/frozen/") {
		f = whenReadFile{f, d.call}
	}
	return f, err
}

func (f whenReadFile) ReadAt(b []byte, off int64) (int, error) {
	f.call()
	return f.File.ReadAt(b, off)
}

// TestGCDigests: what gc has freed is said, also if it is interrupted while it reads disks for
// their digests, which may take long. Those are made by the next.
func TestGCDigests(t *testing.T) {
	dir := t.TempDir()
	image, root := filepath.Join(dir, "disk"), filepath.Join(dir, "store")
	ok(t, os.WriteFile(image, bytes.Repeat([]byte("disk"), 1<<20), 0o600))
	fi, err := os.Stat(image)
	ok(t, err)
	st, err := store.Open(t.Context(), vfs.OS, root, true)
	ok(t, err)
	f, err := st.Freeze(t.Context(), image, store.FreezeOptions{Copy: true})
	ok(t, err)
	_, _, err = save.Run(t.Context(), vfs.OS, st, tiertest.New(tiertest.Options{}).Reader(), save.Options{VM: "vm", Keeps: true, VMDisks: func() []checkpoint.VMDisk {
		return []checkpoint.VMDisk{{Name: "vd", Kept: f.UUID, Layers: []disk.Identity{
			{Path: image, Format: disk.Raw, Size: fi.Size(), File: disk.File{Size: fi.Size(), Mtime: fi.ModTime().UnixNano()}}}}}
	}})
	ok(t, errors.Join(err, f.Close()))

	gc := func(ctx context.Context, fsys vfs.FS, o gcOptions) (string, error) {
		t.Helper()
		out, err := os.CreateTemp(dir, "out")
		ok(t, err)
		defer out.Close()
		a := newApp(fsys)
		a.store, a.stdout = root, &output{File: out}
		o.grace, o.copies = store.DefaultGrace, store.StagedFor
		gcErr := a.gc(ctx, o)
		said, err := os.ReadFile(out.Name())
		ok(t, err)
		return string(said), gcErr
	}
	stop := errors.New("stopped by a signal")
	for _, asJSON := range []bool{false, true} {
		ctx, cancel := context.WithCancelCause(t.Context())
		said, err := gc(ctx, whenRead{vfs.OS, func() { cancel(stop) }}, gcOptions{json: asJSON})
		var rep gcReport
		if !errors.Is(err, stop) || !asJSON && !strings.HasPrefix(said, "0 unfinished saves") || asJSON && json.Unmarshal([]byte(said), &rep) != nil {
			t.Errorf("interrupted: %v; it has said %q", err, said)
		}
	}
	if said, err := gc(t.Context(), vfs.OS, gcOptions{}); err != nil || !strings.Contains(said, "1 disk that is kept has digests now, 4.0 MiB read") {
		t.Errorf("%v: %q", err, said)
	}
	// An error that the digests meet is a warning, and that of the others is there.
	ok(t, os.Remove(filepath.Join(root, "frozen", f.UUID.String()+".digests")))
	ok(t, os.Truncate(filepath.Join(root, "frozen", f.UUID.String()), 5))
	said, err := gc(t.Context(), vfs.OS, gcOptions{json: true})
	var rep gcReport
	ok(t, json.Unmarshal([]byte(said), &rep))
	if err != nil || len(rep.Warnings) != 1 || !strings.Contains(rep.Warnings[0], "it was cut") || rep.Disks != 0 {
		t.Errorf("%v: %+v", err, rep)
	}
}
