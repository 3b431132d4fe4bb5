package store

import (
	"os"
	"path/filepath"
	"reflect"
	"testing"

	"github.com/google/uuid"

	"github.com/flic-migrate/flic-migrate/tier/nvram"
	"github.com/flic-migrate/flic-migrate/tier/vfs"
)

// names are the paths of all that is in a directory, with sizes and times.
func names(t *testing.T, dir string) (list []string) {
	t.Helper()
	err := filepath.Walk(dir, func(path string, fi os.FileInfo, err error) error {
		if err == nil {
			list = append(list, path+" "+fi.Mode().String()+" "+fi.ModTime().String())
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return list
}

// TestHealth: what killed saves have left is found, what is in use is not taken for that,
// and nothing is changed by looking.
func TestHealth(t *testing.T) {
	s, vms := diskStore(t)
	look := func() Health {
		t.Helper()
		before := names(t, s.root)
		h, err := s.Health(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		if after := names(t, s.root); !reflect.DeepEqual(before, after) {
			t.Errorf("before: %q\nafter: %q", before, after)
		}
		return h
	}
	h := look()
	if h.Parts != 0 || len(h.Strays) != 0 || len(h.Unknown) != 0 || len(h.NVRAM) != 1 || h.NVRAM[0].Leaked != 0 || h.NVRAM[0].Err != nil {
		t.Errorf("of a store that is well: %+v", h)
	}

	// A save that is under way is none that was killed.
	tx, err := s.Begin(t.Context(), "a")
	if err != nil {
		t.Fatal(err)
	}
	defer tx.Abort()
	if _, _, err := tx.Reserve(t.Context(), Reservation{Path: h.NVRAM[0].Path, Bytes: 4096, PageSize: 4096, Volatile: true}); err != nil {
		t.Fatal(err)
	}
	if h := look(); h.Parts != 0 || h.NVRAM[0].Leaked != 0 {
		t.Errorf("beside a save: %+v", h)
	}

	// One that was killed has left an image, and an extent of another one's.
	part := s.dir.(*posixDir).Path(partName(Ref{"a", 9}, uuid.New()))
	if err := os.WriteFile(part, make([]byte, 1000), 0o600); err != nil {
		t.Fatal(err)
	}
	f, err := nvram.Open(t.Context(), vfs.OS, h.NVRAM[0].Path, nvram.Options{})
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	region, err := f.Reserve(t.Context(), uuid.New(), s.UUID(), 2*nvram.ExtentSize, 4096)
	if err != nil {
		t.Fatal(err)
	}
	defer region.Close()
	if h := look(); h.Parts != 1 || h.PartBytes != 1000 || h.NVRAM[0].Leaked != 2*nvram.ExtentSize {
		t.Errorf("after a save that was killed: %+v", h)
	}

	// What may be a checkpoint may own it.
	if err := os.Rename(vms+"/a/00000001.flic", vms+"/a/best.flic"); err != nil {
		t.Fatal(err)
	}
	if h := look(); len(h.Strays) != 1 || h.NVRAM[0].Leaked != 0 {
		t.Errorf("with a checkpoint that was renamed: %+v", h)
	}

	if err := os.Remove(h.NVRAM[0].Path); err != nil {
		t.Fatal(err)
	}
	if h := look(); h.NVRAM[0].Err == nil {
		t.Errorf("without the NVRAM file: %+v", h)
	}
}
