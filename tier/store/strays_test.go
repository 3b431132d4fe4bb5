package store

import (
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"github.com/flic-migrate/flic-migrate/tier/integrity"
	"github.com/flic-migrate/flic-migrate/tier/nvram"
	"github.com/flic-migrate/flic-migrate/tier/vfs"
)

// diskStore is a store of a real file system, with checkpoints a@1 and a@2, and the
// first of them has an extent in NVRAM.
func diskStore(t *testing.T) (s *Store, vms string) {
	t.Helper()
	dir := t.TempDir()
	s, err := Open(t.Context(), vfs.OS, dir+"/store", true)
	if err != nil {
		t.Fatal(err)
	}
	p, err := s.Begin(t.Context(), "a")
	if err != nil {
		t.Fatal(err)
	}
	defer p.Abort()
	if _, _, err := p.Reserve(t.Context(), Reservation{Path: dir + "/nvram", Bytes: 4096, PageSize: 4096, Capacity: 64 * nvram.ExtentSize, Volatile: true}); err != nil {
		t.Fatal(err)
	}
	if err := finish(p); err != nil {
		t.Fatal(err)
	}
	if _, err := p.Commit(t.Context()); err != nil {
		t.Fatal(err)
	}
	mustCommit(t, s, "a")
	return s, dir + "/store/vms"
}

// version1 is an image of version 1 of the format, of header and footer only.
var version1 = "FLICIMG\x00\x01" + strings.Repeat("\x00", 51) + "\x53\xaa\x0b\x13" +
	"FLICEND\x00\x01" + strings.Repeat("\x00", 51) + "\x3b\x2d\xd1\xf1"

// TestStrays: an image that somebody has renamed, or hidden behind something else,
// keeps its NVRAM, and gc says because of what.
func TestStrays(t *testing.T) {
	moved := func(to string) func(string) error {
		return func(vms string) error { return os.Rename(vms+"/a/00000001.flic", vms+"/a/"+to) }
	}
	folder := func(to string, instead func(name string) error) func(string) error {
		return func(vms string) error {
			if err := os.Rename(vms+"/a", filepath.Join(vms, to)); err != nil || instead == nil {
				return err
			}
			return instead(vms + "/a")
		}
	}
	fifo := func(name string) error { return syscall.Mkfifo(name, 0o600) }
	for name, c := range map[string]struct {
		do    func(vms string) error
		stray string
	}{
		"folder is a link":  {folder("../../away", func(n string) error { return os.Symlink("../../away", n) }), "a"},
		"folder is a FIFO":  {folder("../../away", fifo), "a"},
		"folder is a file":  {folder("../../away", func(n string) error { return os.WriteFile(n, nil, 0o600) }), "a"},
		"folder in NFD":     {folder("cafe\u0301", nil), "cafe\u0301"},
		"folder is hidden":  {folder(".hidden", nil), ".hidden"},
		"folder with an @":  {folder("a@x", nil), "a@x"},
		"short number":      {moved("1.flic"), "a/1.flic"},
		"long number":       {moved("000000001.flic"), "a/000000001.flic"},
		"number too high":   {moved("100000000.flic"), "a/100000000.flic"},
		"number 0":          {moved("00000000.flic"), "a/00000000.flic"},
		"backup":            {moved("00000001.flic.bak"), "a/00000001.flic.bak"},
		"folder of a .gone": {func(vms string) error { moved("../../x")(vms); return os.Mkdir(vms+"/a/00000001.gone", 0o700) }, "a/00000001.gone"},
		// These are no strays to a list, because it shows them as damaged.
		"directory in its place": {func(vms string) error { moved("../../x")(vms); return os.Mkdir(vms+"/a/00000001.flic", 0o700) }, ""},
		"FIFO in its place":      {func(vms string) error { moved("../../x")(vms); return fifo(vms + "/a/00000001.flic") }, ""},
		"link in its place": {func(vms string) error {
			moved("../../x")(vms)
			return os.Symlink("../../x", vms+"/a/00000001.flic")
		}, ""},
		"image of version 1": {func(vms string) error {
			return os.WriteFile(vms+"/a/00000001.flic", []byte(version1), 0o600)
		}, ""},
	} {
		t.Run(name, func(t *testing.T) {
			s, vms := diskStore(t)
			if err := c.do(vms); err != nil {
				t.Fatal(err)
			}
			if err := os.WriteFile(vms+"/../"+partName(Ref{"b", 1}, s.UUID()), []byte("dead"), 0o600); err != nil {
				t.Fatal(err)
			}
			strays, err := s.Strays(t.Context(), "")
			path := filepath.Join(vms, c.stray)
			if err != nil || (len(strays) == 1 && strays[0] == path) != (c.stray != "") || len(strays) > 1 {
				t.Errorf("strays: %q, %v", strays, err)
			}
			if c.stray == "" {
				path += "/a/00000001.flic"
			}
			rep, err := s.GC(t.Context())
			if err != nil || rep.NVRAMExtents != 0 || rep.Parts != 1 || len(rep.Warnings) != 1 || !strings.Contains(rep.Warnings[0], path) {
				t.Errorf("gc: %+v, %v", rep, err)
			}
		})
	}
	// Without any, it is free.
	s, vms := diskStore(t)
	if err := os.Remove(vms + "/a/00000001.flic"); err != nil {
		t.Fatal(err)
	}
	if rep, err := s.GC(t.Context()); err != nil || rep.NVRAMExtents != 1 || len(rep.Warnings) != 0 {
		t.Errorf("gc: %+v, %v", rep, err)
	}
}

// TestOddImage: what stands in an image's place and is no file is listed as damaged,
// hides no other, and its name can be removed.
func TestOddImage(t *testing.T) {
	for name, make := range map[string]func(name string) error{
		"link":      func(n string) error { return os.Symlink("00000001.flic", n) },
		"FIFO":      func(n string) error { return syscall.Mkfifo(n, 0o600) },
		"directory": func(n string) error { return os.Mkdir(n, 0o700) },
		"socket":    func(n string) error { return syscall.Mknod(n, syscall.S_IFSOCK|0o600, 0) },
	} {
		t.Run(name, func(t *testing.T) {
			s, vms := diskStore(t)
			odd := vms + "/a/00000003.flic"
			if err := make(odd); err != nil {
				t.Fatal(err)
			}
			list, err := s.Identities(t.Context(), "")
			if err != nil || len(list) != 3 || list[1].Err != nil || !integrity.IsCorrupt(list[2].Err) || !strings.Contains(list[2].Err.Error(), odd) {
				t.Errorf("list: %+v, %v", list, err)
			}
			rm, err := s.Remove(t.Context(), Ref{"a", 3})
			if err != nil || !integrity.IsCorrupt(rm.Left) || rm.FlashBytes != 0 {
				t.Errorf("remove: %+v, %v", rm, err)
			}
			list, err = s.Identities(t.Context(), "a")
			if err != nil || len(list) != 2 || list[0].Err != nil {
				t.Errorf("list afterwards: %+v, %v", list, err)
			}
			// The number is remembered all the same.
			if ref := mustCommit(t, s, "a"); ref.N != 4 {
				t.Errorf("checkpoint %v", ref)
			}
			if rep, err := s.GC(t.Context()); err != nil || len(rep.Warnings) != 0 || rep.NVRAMExtents != 0 {
				t.Errorf("gc: %+v, %v", rep, err)
			}
		})
	}
}

// TestHardLinks: an image that a snapshot of the store has too is not emptied, by
// whoever removes it here.
func TestHardLinks(t *testing.T) {
	s, vms := diskStore(t)
	image, snapshot := vms+"/a/00000002.flic", vms+"/../../snapshot"
	link := func(from string) int64 {
		t.Helper()
		os.Remove(snapshot)
		fi, err := os.Stat(from)
		if err == nil {
			err = os.Link(from, snapshot)
		}
		if err != nil {
			t.Fatal(err)
		}
		return fi.Size()
	}
	check := func(what string, size int64) {
		t.Helper()
		if fi, err := os.Stat(snapshot); err != nil || fi.Size() != size || size == 0 {
			t.Errorf("%s: the snapshot has %v, %v, not %d bytes", what, fi, err, size)
		}
		if fi, err := os.Stat(vms + "/a/00000002.gone"); err != nil || fi.Size() != 0 {
			t.Errorf("%s: the number is not remembered by an empty file: %v, %v", what, fi, err)
		}
	}
	size := link(image)
	if rm, err := s.Remove(t.Context(), Ref{"a", 2}); err != nil || rm.Left != nil || rm.FlashBytes != size {
		t.Errorf("remove: %+v, %v", rm, err)
	}
	check("remove", size)

	// A removal that was interrupted before that is completed by gc.
	if err := os.Rename(vms+"/a/00000001.flic", vms+"/a/00000002.gone"); err != nil {
		t.Fatal(err)
	}
	size = link(vms + "/a/00000002.gone")
	if rep, err := s.GC(t.Context()); err != nil || rep.Removed != 1 {
		t.Errorf("gc: %+v, %v", rep, err)
	}
	check("gc", size)
	if ref := mustCommit(t, s, "a"); ref.N != 3 {
		t.Errorf("checkpoint %v", ref)
	}
}
