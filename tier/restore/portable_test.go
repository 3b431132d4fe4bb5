package restore_test

import (
	"bytes"
	"errors"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/klauspost/compress/zstd"

	"github.com/flic-migrate/flic-migrate/ramparse"
	"github.com/flic-migrate/flic-migrate/stream"
	"github.com/flic-migrate/flic-migrate/tier/checkpoint"
	"github.com/flic-migrate/flic-migrate/tier/restore"
	"github.com/flic-migrate/flic-migrate/tier/save"
	"github.com/flic-migrate/flic-migrate/tier/store"
	"github.com/flic-migrate/flic-migrate/tier/tiertest"
	"github.com/flic-migrate/flic-migrate/tier/vfs"
)

// checkpointOf saves a stream and opens the checkpoint.
func checkpointOf(t *testing.T, r io.Reader) *store.Checkpoint {
	t.Helper()
	st, err := store.Open(t.Context(), vfs.OS, filepath.Join(t.TempDir(), "store"), true)
	if err != nil {
		t.Fatal(err)
	}
	ref, _, err := save.Run(t.Context(), vfs.OS, st, r, save.Options{VM: "vm", ReturnPath: io.Discard})
	if err != nil {
		t.Fatal(err)
	}
	c, err := st.OpenCheckpoint(t.Context(), ref, checkpoint.Options{})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	return c
}

// refused is what newer QEMUs refuse in a stream, by what it is.
func refused(t *testing.T, b []byte) map[string]int {
	t.Helper()
	found := make(map[string]int)
	err := ramparse.Walk(bytes.NewReader(b), 0, ramparse.Visitor{
		Frame: func(f *stream.Frame) error {
			switch c := f.Command; {
			case f.Kind != stream.CommandFrame:
			case c.Number == stream.CommandEnableColo:
				found["COLO"]++
			case c.Number == stream.CommandPostcopyAdvise && len(c.Payload) > 0:
				found["advice"]++
			}
			return nil
		},
		Record: func(d *ramparse.Decoder, rec *ramparse.Record) error {
			switch {
			case rec.Kind == ramparse.Compressed:
				found["COMPRESS_PAGE"]++
			case rec.Kind == ramparse.Zero && rec.Fill != 0:
				found["fill"]++
			case rec.Kind == ramparse.MemSize:
				for _, b := range d.Setup().Blocks {
					if b.PageSize != 0 {
						found["page size"]++
					}
				}
			}
			return nil
		},
	})
	if err != nil {
		t.Fatal(err)
	}
	return found
}

// portable restores c in both forms and compares what a destination has of them.
func portable(t *testing.T, c *store.Checkpoint) (as, portable []byte, rep restore.Report) {
	t.Helper()
	var forms [2]bytes.Buffer
	var guests [2]*tiertest.Guest
	for i := range forms {
		var err error
		if rep, err = restore.Run(t.Context(), c.Checkpoint, &forms[i], restore.Options{Portable: i == 1}); err != nil {
			t.Fatal(err)
		}
		if i == 0 && rep.Rewritten != 0 {
			t.Errorf("%d rewritten without being asked for", rep.Rewritten)
		}
		if guests[i], err = tiertest.Load(bytes.NewReader(forms[i].Bytes())); err != nil {
			t.Fatalf("form %d: %v", i, err)
		}
	}
	if err := guests[0].SamePages(guests[1]); err != nil {
		t.Error(err)
	}
	if a, b := guests[0].Records, guests[1].Records; a != b {
		t.Errorf("%d page records became %d", a, b)
	}
	return forms[0].Bytes(), forms[1].Bytes(), rep
}

// insert puts a command before a stream's first section.
func insert(t *testing.T, b, command []byte) []byte {
	t.Helper()
	at := int64(-1)
	err := ramparse.Walk(bytes.NewReader(b), 0, ramparse.Visitor{Frame: func(f *stream.Frame) error {
		if at < 0 && f.Kind == stream.SectionStart {
			at = f.Offset
		}
		return nil
	}})
	if err != nil {
		t.Fatal(err)
	}
	return append(append(append([]byte(nil), b[:at]...), command...), b[at:]...)
}

// TestPortable: what some QEMUs refuse is gone from a portable stream, and each page
// is what it was; a stream without anything of the kind is the same, byte for byte.
func TestPortable(t *testing.T) {
	blocks := []tiertest.Block{{Name: "pc.ram", Size: 600 << 10}, {Name: "pc.rom", Size: 128 << 10}}
	huge := []tiertest.Block{{Name: "m0", Size: 2 << 20, HostPage: 2 << 20}, {Name: "pc.ram", Size: 256 << 10}}
	colo := stream.AppendCommand(nil, stream.CommandEnableColo, nil)
	for name, test := range map[string]struct {
		o      tiertest.Options
		insert []byte
		has    string // what the saved stream has
	}{
		"nothing":       {o: tiertest.Options{Seed: 1, Blocks: blocks, ReturnPath: true, Named: 0.1}},
		"compressed":    {o: tiertest.Options{Seed: 2, Blocks: blocks, Compress: 0.6, Shuffle: true, Named: 0.2}, has: "COMPRESS_PAGE"},
		"all of it":     {o: tiertest.Options{Seed: 3, Compress: 1, Fill: true, NoEnd: true, NoDescription: true}, insert: colo, has: "COMPRESS_PAGE"},
		"fill":          {o: tiertest.Options{Seed: 4, Blocks: blocks, Fill: true, Mix: tiertest.Mix{tiertest.Zero: 2, tiertest.Text: 1}}, has: "fill"},
		"COLO":          {o: tiertest.Options{Seed: 5, ReturnPath: true}, insert: colo, has: "COLO"},
		"advice":        {o: tiertest.Options{Seed: 6, Advise: true, ReturnPath: true}, has: "advice"},
		"huge pages":    {o: tiertest.Options{Seed: 7, Advise: true, Blocks: huge, DirtyBitmap: true}, has: "page size"},
		"pages of 16K":  {o: tiertest.Options{Seed: 8, PageSize: 16 << 10, PageBits: true, Compress: 0.5, Fill: true}, has: "COMPRESS_PAGE"},
		"early":         {o: tiertest.Options{Seed: 9, Early: 2, Compress: 0.5}, insert: colo, has: "COLO"},
		"early, behind": {o: tiertest.Options{Seed: 10, Early: 2, EarlyBehind: true, Advise: true}, has: "advice"},
		"shared":        {o: tiertest.Options{Seed: 11, IgnoreShared: true, Fill: true, Blocks: append(blocks, tiertest.Block{Name: "shm", Size: 64 << 10, Shared: true})}, has: "fill"},
		"no pages":      {o: tiertest.Options{Seed: 12, IgnoreShared: true, Mix: tiertest.Mix{tiertest.Absent: 1}}, insert: colo, has: "COLO"},
		"old machine":   {o: tiertest.Options{Seed: 13, NoConfiguration: true, Fill: true}, has: "fill"},
	} {
		t.Run(name, func(t *testing.T) {
			b := tiertest.New(test.o).Bytes()
			if test.insert != nil {
				b = insert(t, b, test.insert)
			}
			as, portable, rep := portable(t, checkpointOf(t, bytes.NewReader(b)))
			if !bytes.Equal(as, b) {
				t.Error("the other form is not what was saved")
			}
			if found := refused(t, as); test.has != "" && found[test.has] == 0 {
				t.Fatalf("what was saved has only %v", found)
			}
			if left := refused(t, portable); len(left) > 0 {
				t.Errorf("left: %v", left)
			}
			if changed := rep.Rewritten > 0; changed == bytes.Equal(as, portable) || changed != (test.has != "") {
				t.Errorf("%d rewritten; the same %v", rep.Rewritten, !changed)
			}
		})
	}
}

// TestPortableRecorded does so with what real QEMUs have written.
func TestPortableRecorded(t *testing.T) {
	for _, name := range []string{
		"q35-compress", "q35-postcopy-ram", "q35-block", "q35-11-mapped-ram", "q35-11-postcopy-ram", "q35-10-virtio-mem",
		"q35-11-virtio-mem", "q35-ignore-shared", "q35-dirty-bitmap", "pc-2.3-stopped", "virt-stopped", "microvm-stopped",
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			f, err := os.Open("../../testdata/" + name + ".stream.zst")
			if err != nil {
				t.Fatal(err)
			}
			defer f.Close()
			z, err := zstd.NewReader(f)
			if err != nil {
				t.Fatal(err)
			}
			defer z.Close()
			c := checkpointOf(t, z)
			// Neither can be, and nothing else.
			if why := map[string]string{"q35-block": "content of a disk", "q35-11-mapped-ram": "without being understood"}[name]; why != "" {
				var out bytes.Buffer
				_, err := restore.Run(t.Context(), c.Checkpoint, &out, restore.Options{Portable: true})
				if !errors.Is(err, restore.ErrNotPortable) || !strings.Contains(err.Error(), why) || out.Len() > 0 {
					t.Errorf("%v, after %d bytes", err, out.Len())
				}
				return
			}
			as, portable, rep := portable(t, c)
			if left := refused(t, portable); len(left) > 0 {
				t.Errorf("left: %v", left)
			}
			found := refused(t, as)
			want := len(found) > 0
			if want != (rep.Rewritten > 0) || want == bytes.Equal(as, portable) {
				t.Errorf("%d rewritten of what has %v", rep.Rewritten, found)
			}
			if has := name == "q35-compress" || name == "q35-postcopy-ram"; has && !want {
				t.Error("it has nothing that newer QEMUs refuse")
			}
		})
	}
}

// TestPortableOpaque: what is not understood can't be rewritten, and is no less exact
// without being asked for.
func TestPortableOpaque(t *testing.T) {
	s := tiertest.New(tiertest.Options{Seed: 1, Compress: 0.5, Unknown: tiertest.Section})
	c := checkpointOf(t, s.Reader())
	var out bytes.Buffer
	if _, err := restore.Run(t.Context(), c.Checkpoint, &out, restore.Options{Portable: true}); !errors.Is(err, restore.ErrNotPortable) || out.Len() > 0 {
		t.Errorf("%v, after %d bytes", err, out.Len())
	}
	if _, err := restore.Run(t.Context(), c.Checkpoint, &out, restore.Options{}); err != nil || !bytes.Equal(out.Bytes(), s.Bytes()) {
		t.Errorf("%v, %d bytes", err, out.Len())
	}
}
