package tier_test

import (
	"bytes"
	"context"
	"errors"
	"os"
	"path/filepath"
	"testing"

	"github.com/flic-migrate/flic-migrate/ramparse"
	"github.com/flic-migrate/flic-migrate/tier/checkpoint"
	"github.com/flic-migrate/flic-migrate/tier/coredump"
	"github.com/flic-migrate/flic-migrate/tier/image"
	"github.com/flic-migrate/flic-migrate/tier/integrity"
	"github.com/flic-migrate/flic-migrate/tier/mmu"
	"github.com/flic-migrate/flic-migrate/tier/save"
	"github.com/flic-migrate/flic-migrate/tier/store"
	"github.com/flic-migrate/flic-migrate/tier/tiertest"
	"github.com/flic-migrate/flic-migrate/tier/vfs/crashfs"
)

// dump writes the guest memory of a checkpoint into a file.
func (l *lab) dump(t *testing.T, ref store.Ref, format coredump.Format) ([]byte, *coredump.Report, error) {
	t.Helper()
	c, err := l.st.OpenCheckpoint(context.Background(), ref, checkpoint.Options{})
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	f, err := os.Create(filepath.Join(t.TempDir(), "memory"))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	rep, err := coredump.Write(context.Background(), c.Checkpoint, f, coredump.Options{Format: format})
	if err != nil {
		return nil, nil, err
	}
	b, err := os.ReadFile(f.Name())
	if err != nil {
		t.Fatal(err)
	}
	return b, rep, nil
}

// TestCoreDump: the raw file of a recorded guest has each page that is in its stream where
// the guest has it, and the ELF file ends with the same; damage ends both with an error.
func TestCoreDump(t *testing.T) {
	in := recordedLinux(t)
	l := newLab(t, crashfs.New(0), "/")
	ref, _, err := l.run(t.Context(), bytes.NewReader(in), save.Options{VM: "vm", Codec: image.LZ4, SegmentPages: 6})
	if err != nil {
		t.Fatal(err)
	}
	raw, rep, err := l.dump(t, ref, coredump.Raw)
	if err != nil {
		t.Fatal(err)
	}
	if rep.Memory != int64(len(raw)) || rep.Bytes != rep.Memory || rep.VCPUs != 0 || len(rep.LeftOut) == 0 {
		t.Errorf("%d bytes, %+v", len(raw), rep)
	}
	pages := 0
	err = ramparse.Walk(bytes.NewReader(in), 0, ramparse.Visitor{
		Record: func(d *ramparse.Decoder, r *ramparse.Record) error {
			if r.Kind == ramparse.Page && d.Setup().Blocks[r.Block].Name == "pc.ram" {
				pages++
				if !bytes.Equal(raw[r.Addr:][:len(r.Data)], r.Data) {
					t.Fatalf("at %#x it is another page", r.Addr)
				}
			}
			return nil
		},
	})
	if err != nil || pages < 1000 {
		t.Fatalf("%d pages: %v", pages, err)
	}
	core, rep, err := l.dump(t, ref, coredump.ELF)
	if err != nil || rep.VCPUs != 1 || !bytes.Equal(core[len(core)-len(raw):], raw) || string(core[:4]) != "\x7fELF" {
		t.Errorf("%+v, %v", rep, err)
	}

	const name = "/vms/vm/00000001.flic"
	b := l.file(t, name)
	b[len(b)/2] ^= 1 // a segment: these are nearly all of the file
	l.write(t, name, b)
	for _, f := range []coredump.Format{coredump.Raw, coredump.ELF} {
		if _, _, err := l.dump(t, ref, f); !integrity.IsCorrupt(err) {
			t.Errorf("damaged: %v", err)
		}
	}
	l.noLeaks(t)
}

// TestCoreDumpUnknown: a guest of which nothing is known is refused in words.
func TestCoreDumpUnknown(t *testing.T) {
	l := newLab(t, crashfs.New(0), "/")
	ref, _ := l.save(t, tiertest.New(tiertest.Options{Seed: 1}), save.Options{})
	for _, f := range []coredump.Format{coredump.Raw, coredump.ELF} {
		if _, _, err := l.dump(t, ref, f); !errors.Is(err, mmu.ErrUnsupported) {
			t.Errorf("%s: %v", f, err)
		}
	}
}
