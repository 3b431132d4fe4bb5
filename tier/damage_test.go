package tier_test

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/flic-migrate/flic-migrate/stream"
	"github.com/flic-migrate/flic-migrate/stream/returnpath"
	"github.com/flic-migrate/flic-migrate/tier/checkpoint"
	"github.com/flic-migrate/flic-migrate/tier/dedup"
	"github.com/flic-migrate/flic-migrate/tier/image"
	"github.com/flic-migrate/flic-migrate/tier/integrity"
	"github.com/flic-migrate/flic-migrate/tier/nvram"
	"github.com/flic-migrate/flic-migrate/tier/restore"
	"github.com/flic-migrate/flic-migrate/tier/save"
	"github.com/flic-migrate/flic-migrate/tier/store"
	"github.com/flic-migrate/flic-migrate/tier/tiertest"
	"github.com/flic-migrate/flic-migrate/tier/vfs"
	"github.com/flic-migrate/flic-migrate/tier/vfs/crashfs"
	"github.com/flic-migrate/flic-migrate/tier/workingset"
)

// tiny is a stream of a few KB with 8 pages of 1 KiB.
func tiny(o tiertest.Options) *tiertest.Stream {
	o.PageSize, o.PageBits = 1<<10, true
	o.Blocks = []tiertest.Block{{Name: "ram", Size: 6 << 10}, {Name: "rom", Size: 2 << 10}}
	o.PartLen = 2
	return tiertest.New(o)
}

// TestTruncated cuts streams at every byte. No cut may leave a checkpoint but
// one: between QEMU_VM_EOF and the vmdescription, where a stream with
// suppress-vmdesc ends.
func TestTruncated(t *testing.T) {
	for name, o := range map[string]tiertest.Options{
		"stopped":        {Seed: 1},
		"live":           {Seed: 2, Passes: 2, Resend: 0.5, XBZRLE: true, Compress: 0.3, Flush: true},
		"no description": {Seed: 3, NoDescription: true, DirtyBitmap: true},
		"return path":    {Seed: 4, ReturnPath: true, NoEnd: true},
		"opaque":         {Seed: 5, Unknown: tiertest.Record},
		"no devices":     {Seed: 6, EmptyTail: true},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			o.Mix = tiertest.Mix{tiertest.Zero: 2, tiertest.Text: 1, tiertest.Random: 1}
			s := tiny(o)
			b, layout := s.Bytes(), s.Layout()
			l := newLab(t, crashfs.New(0), "/")
			so := save.Options{VM: "vm", NVRAM: l.nvram, WorkingSet: hotSet(t, s, every(2)), Workers: 1}
			for n := range b {
				if n%200 == 199 {
					// The disk gets slower with each name it has seen.
					nothingLeft(t, l)
					l = newLab(t, crashfs.New(0), "/")
				}
				var answers bytes.Buffer
				so.ReturnPath = &answers
				_, _, err := l.run(context.Background(), bytes.NewReader(b[:n]), so)
				if int64(n) == layout.EOF+1 {
					if err != nil {
						t.Errorf("without its vmdescription: %v", err)
					}
					l = newLab(t, crashfs.New(0), "/")
					continue
				}
				if !errors.Is(err, stream.ErrTruncated) && !errors.Is(err, stream.ErrNotStream) && !errors.Is(err, stream.ErrDamaged) {
					t.Fatalf("cut after %d of %d bytes (%+v): %v", n, len(b), layout, err)
				}
				if answers.Len() > 0 && !bytes.HasSuffix(answers.Bytes(), returnpath.AppendShut(nil, 1)) {
					t.Errorf("cut after %d bytes: no SHUT with 1", n)
				}
				if refs, err := l.st.List(context.Background(), ""); err != nil || len(refs) != 0 {
					t.Fatalf("cut after %d bytes: %v, %v", n, refs, err)
				}
			}
			nothingLeft(t, l)
		})
	}
}

// TestTruncatedOld cuts a stream without footers, whose tail does not say where
// it ends: outside of the tail no cut may pass.
func TestTruncatedOld(t *testing.T) {
	s := tiertest.New(tiertest.Options{NoConfiguration: true, Blocks: []tiertest.Block{{Name: "m", Size: 16 << 10}}})
	b, layout := s.Bytes(), s.Layout()
	l := newLab(t, crashfs.New(0), "/")
	for n := 0; n <= int(layout.Tail); n += 7 {
		_, _, err := l.run(context.Background(), bytes.NewReader(b[:n]), save.Options{VM: "vm", Workers: 1})
		if !errors.Is(err, stream.ErrTruncated) {
			t.Errorf("cut after %d bytes: %v", n, err)
		}
	}
	nothingLeft(t, l)
}

// damaged is a checkpoint whose files are about to be damaged.
type damaged struct {
	*lab
	ref  store.Ref
	s    *tiertest.Stream
	want []byte
}

func newDamaged(t *testing.T, s *tiertest.Stream, codec image.Codec) *damaged {
	l := newLab(t, crashfs.New(0), "/")
	ref, meta := l.save(t, s, save.Options{WorkingSet: hotSet(t, s, func(b int, p uint64) uint8 { return uint8(1 - min(b+int(p), 1)) }), Codec: codec, SegmentPages: 2, Energy: dedup.EnergyFull})
	if meta.NVRAM == nil || meta.Report.Cold == 0 {
		t.Fatal("the checkpoint is not in both tiers")
	}
	d := &damaged{lab: l, ref: ref, s: s}
	d.holds(t, ref, s)
	d.want = d.restored(t, ref)
	return d
}

func (d *damaged) image() string { return d.dir + "/vms/vm/00000001.flic" }

func (d *damaged) size(t *testing.T, name string) int64 {
	fi, err := d.fs.Stat(name)
	if err != nil {
		t.Fatal(err)
	}
	return fi.Size()
}

// units are where the parts of the image begin that have a checksum of their own,
// in order.
func (d *damaged) units(t *testing.T) (starts []int64) {
	t.Helper()
	f, err := d.fs.Open(d.image())
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	im, err := image.Open(f)
	if err != nil {
		t.Fatal(err)
	}
	starts = []int64{0}
	err = im.Frames(func(_ image.Kind, _ uint32, off int64) error {
		starts = append(starts, off)
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	b := make([]byte, image.FooterLen)
	footer := d.size(t, d.image()) - image.FooterLen
	if _, err := f.ReadAt(b, footer); err != nil {
		t.Fatal(err)
	}
	identity := footer - image.FrameHeaderLen - int64(len(im.Tail.Identity))
	return append(starts, int64(binary.LittleEndian.Uint64(b[32:])), identity, footer)
}

// restoreReads tells whether a restore of the checkpoint reads the unit that begins at
// an offset: its digests are for those who refer to it.
func (d *damaged) restoreReads(t *testing.T, unit int64) bool {
	t.Helper()
	f, err := d.fs.Open(d.image())
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	var kind [1]byte
	if _, err := f.ReadAt(kind[:], unit); err != nil {
		t.Fatal(err)
	}
	return image.Kind(kind[0]) != image.Digests
}

// unit is the start of the unit that a byte is in.
func unit(starts []int64, off int64) int64 {
	i, found := slices.BinarySearch(starts, off)
	if !found {
		i--
	}
	return starts[i]
}

// namesAt tells whether an error says which file is damaged and where the damaged
// unit begins.
func namesAt(err error, file string, at int64) bool {
	var c *integrity.CorruptError
	return errors.As(err, &c) && c.File == file && c.Offset == at
}

// names is namesAt for an offset that depends on what was found first.
func names(err error, file string, size int64) bool {
	var c *integrity.CorruptError
	return errors.As(err, &c) && c.File == file && c.Offset >= 0 && c.Offset < size
}

// expect checks that verify names the file and the place, and that a restore does
// not give wrong bytes. With mustFail it may not succeed at all. A negative place
// can be any.
func (d *damaged) expect(t *testing.T, what, file string, at int64, mustFail bool) {
	t.Helper()
	named := func(err error) bool { return namesAt(err, file, at) }
	if at < 0 {
		size := d.size(t, file)
		named = func(err error) bool { return names(err, file, size) }
	}
	found := d.verify(d.ref)
	if !slices.ContainsFunc(found, named) {
		t.Errorf("%s: verify found %v", what, found)
	}
	if c, err := d.st.OpenCheckpoint(context.Background(), d.ref, checkpoint.Options{}); err != nil {
		return // a restore gets no further than this
	} else {
		c.Close()
	}
	var b bytes.Buffer
	err := d.restore(d.ref, &b)
	if err == nil && !bytes.Equal(b.Bytes(), d.want) {
		t.Errorf("%s: wrong bytes restored", what)
	}
	if err == nil && mustFail {
		t.Errorf("%s: restored", what)
	}
	if err != nil && !named(err) {
		t.Errorf("%s: restore: %v", what, err)
	}
	if err != nil && !bytes.HasPrefix(d.want, b.Bytes()) {
		t.Errorf("%s: wrong bytes before the restore failed", what)
	}
}

// flip flips one bit and returns how to flip it back.
func (d *damaged) flip(t *testing.T, file string, off int64, bit int) (back func()) {
	t.Helper()
	f, err := d.fs.OpenRW(file)
	if err != nil {
		t.Fatal(err)
	}
	var b [1]byte
	if _, err := f.ReadAt(b[:], off); err != nil {
		t.Fatal(err)
	}
	b[0] ^= 1 << bit
	if _, err := f.WriteAt(b[:], off); err != nil {
		t.Fatal(err)
	}
	return func() {
		b[0] ^= 1 << bit
		f.WriteAt(b[:], off)
		f.Close()
	}
}

// TestFlippedBit flips every bit of a stored checkpoint, one at a time.
func TestFlippedBit(t *testing.T) {
	s := tiny(tiertest.Options{Seed: 5, Mix: tiertest.Mix{tiertest.Zero: 1, tiertest.Sparse: 1}})
	t.Run("image", func(t *testing.T) {
		t.Parallel()
		d := newDamaged(t, s, image.LZ4)
		size, units := d.size(t, d.image()), d.units(t)
		for off := range size {
			for bit := range 8 {
				read := d.restoreReads(t, unit(units, off))
				back := d.flip(t, d.image(), off, bit)
				d.expect(t, fmt.Sprintf("bit %d at %d of %d", bit, off, size), d.image(), unit(units, off), read)
				back()
			}
			if t.Failed() {
				return
			}
		}
		d.holds(t, d.ref, s)
		d.noLeaks(t)
	})
	t.Run("NVRAM", func(t *testing.T) {
		t.Parallel()
		d := newDamaged(t, s, image.LZ4)
		c, err := d.st.OpenCheckpoint(context.Background(), d.ref, checkpoint.Options{})
		if err != nil {
			t.Fatal(err)
		}
		slots := int64(len(c.NVRAMSlots()))
		c.Close()
		type part struct {
			name     string
			off, len int64
			unit     int64 // bytes that have one checksum
			mustFail bool
		}
		// The file is new, so the checkpoint has extent 1. There are two
		// copies of the header, of which one is enough.
		parts := []part{
			{"first header", 0, 64, 64, false}, {"second header", 4096, 64, 64, false},
			{"owner", 8192 + 64, 64, 64, true}, {"pages", nvram.ExtentSize, slots << 10, 1 << 10, true},
		}
		for _, p := range parts {
			for off := p.off; off < p.off+p.len; off++ {
				for bit := range 8 {
					back := d.flip(t, d.nvram, off, bit)
					d.expect(t, fmt.Sprintf("%s: bit %d at %d", p.name, bit, off), d.nvram, off-off%p.unit, p.mustFail)
					back()
				}
				if t.Failed() {
					return
				}
			}
		}
		d.holds(t, d.ref, s)
		d.noLeaks(t)
	})
}

// TestFlippedBitSampled flips bits of images that are too large, or too many, for
// every one of them: with several chunks of each kind, and of each kind of stream.
func TestFlippedBitSampled(t *testing.T) {
	streams := map[string]*tiertest.Stream{
		"many chunks": tiertest.New(tiertest.Options{Seed: 9, PageSize: 1 << 10, PageBits: true, Shuffle: true, Named: 0.5,
			Mix:    tiertest.Mix{tiertest.Zero: 2, tiertest.Duplicate: 3, tiertest.Sparse: 2},
			Blocks: []tiertest.Block{{Name: "ram", Size: 96 << 20}}}),
	}
	for i, o := range seeds {
		o.Mix = tiertest.Mix{tiertest.Zero: 1, tiertest.Text: 2, tiertest.Random: 1}
		streams[fmt.Sprintf("stream %d", i)] = tiny(o)
	}
	for name, s := range streams {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			l := newLab(t, vfs.OS, t.TempDir())
			o := save.Options{VolatileNVRAM: true, WorkingSet: hotSet(t, s, func(_ int, page uint64) uint8 { return uint8(page % 6) })}
			if name != "many chunks" {
				o.SegmentPages = 2
			}
			ref, meta := l.save(t, s, o)
			d := &damaged{lab: l, ref: ref, s: s, want: l.restored(t, ref)}
			size, units := d.size(t, d.image()), d.units(t)
			if name == "many chunks" {
				f, err := d.fs.Open(d.image())
				if err != nil {
					t.Fatal(err)
				}
				defer f.Close()
				im, err := image.Open(f)
				if err != nil {
					t.Fatal(err)
				}
				for _, k := range []image.Kind{image.Skeleton, image.PageMap, image.NVRAM} {
					if n := im.Chunks(k); n < 2 {
						t.Errorf("%d chunks of %v", n, k)
					}
				}
			}
			// A restore has no use for a segment whose pages have all come again.
			mustFail := meta.Report.Superseded == 0
			r := rand.New(rand.NewPCG(1, uint64(size)))
			// The head and the end of each unit, or of some if there are many,
			// and anything.
			var offs []int64
			for _, i := range r.Perm(len(units))[:min(len(units), 8)] {
				end := size
				if i+1 < len(units) {
					end = units[i+1]
				}
				offs = append(offs, units[i]+r.Int64N(image.FrameHeaderLen), end-1)
			}
			for range 8 {
				offs = append(offs, r.Int64N(size))
			}
			for _, off := range offs {
				bit := r.IntN(8)
				read := d.restoreReads(t, unit(units, off))
				back := d.flip(t, d.image(), off, bit)
				d.expect(t, fmt.Sprintf("bit %d at %d of %d", bit, off, size), d.image(), unit(units, off), mustFail && read)
				back()
				if t.Failed() {
					return
				}
			}
			if !bytes.Equal(d.restored(t, d.ref), d.want) {
				t.Error("whole again, it is restored differently")
			}
		})
	}
}

// TestFlippedBitOfHint flips every bit of what resumes have learned: verify says
// so, restores and saves do without.
func TestFlippedBitOfHint(t *testing.T) {
	s := tiny(tiertest.Options{Seed: 5, Mix: tiertest.Mix{tiertest.Text: 1}})
	d := newDamaged(t, s, image.LZ4)
	runs := []workingset.PageRun{{Block: 0, Page: 1, Count: 2}, {Block: 1, Page: 0, Count: 1}}
	if err := d.st.AddTouched(context.Background(), d.ref, 1<<10, []string{"ram", "rom"}, runs); err != nil {
		t.Fatal(err)
	}
	file := strings.TrimSuffix(d.image(), ".flic") + ".touched"
	for off := range d.size(t, file) {
		for bit := range 8 {
			back := d.flip(t, file, off, bit)
			d.expect(t, fmt.Sprintf("bit %d at %d", bit, off), file, 0, false)
			back()
		}
	}
	d.holds(t, d.ref, s)
	d.flip(t, file, d.size(t, file)/2, 3)
	d.save(t, s, save.Options{})
}

// TestFlippedBitOfStore flips every bit of the store's own small files.
func TestFlippedBitOfStore(t *testing.T) {
	d := newDamaged(t, tiny(tiertest.Options{Seed: 4}), image.LZ4)
	if err := d.remove(d.ref); err != nil {
		t.Fatal(err)
	}
	var uses string
	for _, name := range d.tree(t) {
		if strings.HasPrefix(name, "nvram/") {
			uses = filepath.Join(d.dir, name)
		}
	}
	try := map[string]func() error{
		d.dir + "/store.json": func() error {
			_, err := store.Open(context.Background(), d.fs, d.dir, false)
			return err
		},
		uses: func() error {
			rep, err := d.st.GC(context.Background())
			if err == nil && len(rep.Warnings) == 1 && strings.Contains(rep.Warnings[0], uses) {
				return &integrity.CorruptError{File: uses}
			}
			return err
		},
	}
	for file, use := range try {
		size := d.size(t, file)
		for off := range size {
			for bit := range 8 {
				back := d.flip(t, file, off, bit)
				if err := use(); !names(err, file, size) {
					t.Errorf("%s: bit %d at %d: %v", file, bit, off, err)
				}
				back()
			}
		}
	}
	// In order again, all of it works.
	d.open(t)
	if ref, _ := d.save(t, d.s, save.Options{}); ref.N != 2 {
		t.Errorf("the next checkpoint is %v", ref)
	}
}

// rewrite replaces a file by what fn makes of its content.
func (d *damaged) rewrite(t *testing.T, name string, fn func([]byte) []byte) {
	t.Helper()
	f, err := d.fs.OpenRW(name)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	size, err := f.Size()
	if err != nil {
		t.Fatal(err)
	}
	b := make([]byte, size)
	if _, err := f.ReadAt(b, 0); err != nil {
		t.Fatal(err)
	}
	b = fn(b)
	if err := f.Truncate(0); err != nil {
		t.Fatal(err)
	}
	if _, err := f.WriteAt(b, 0); err != nil {
		t.Fatal(err)
	}
}

// TestWrongImage puts something else in an image's place.
func TestWrongImage(t *testing.T) {
	s := tiny(tiertest.Options{Seed: 7, Mix: tiertest.Mix{tiertest.Random: 1}})
	t.Run("truncated", func(t *testing.T) {
		d := newDamaged(t, s, image.LZ4)
		for n := d.size(t, d.image()) - 1; n >= 0; n -= 13 {
			d.rewrite(t, d.image(), func(b []byte) []byte { return b[:n] })
			if n == 0 {
				if found := d.verify(d.ref); len(found) == 0 {
					t.Error("an empty image passes")
				}
				continue
			}
			d.expect(t, fmt.Sprintf("cut to %d bytes", n), d.image(), -1, true)
		}
	})
	t.Run("longer", func(t *testing.T) {
		d := newDamaged(t, s, image.LZ4)
		d.rewrite(t, d.image(), func(b []byte) []byte { return append(b, 0) })
		d.expect(t, "one more byte", d.image(), -1, true)
	})
	t.Run("swapped segments", func(t *testing.T) {
		// Random pages don't compress, so the first two segments are alike.
		d := newDamaged(t, s, image.None)
		const frame = image.FrameHeaderLen + 2<<10
		d.rewrite(t, d.image(), func(b []byte) []byte {
			h := b[image.HeaderLen:]
			first, second := bytes.Clone(h[:frame]), bytes.Clone(h[frame:2*frame])
			if le := binary.LittleEndian; h[0] != byte(image.Pages) || le.Uint32(h[8:]) != 2<<10 || le.Uint32(h[frame+8:]) != 2<<10 {
				t.Fatal("the image does not begin with two whole segments")
			}
			copy(h, second)
			copy(h[frame:], first)
			return b
		})
		d.expect(t, "swapped segments", d.image(), -1, true)
	})
	t.Run("another VM's", func(t *testing.T) {
		d := newDamaged(t, s, image.LZ4)
		d.save(t, tiny(tiertest.Options{Seed: 8}), save.Options{VM: "other"})
		var other []byte
		d.rewrite(t, d.dir+"/vms/other/00000001.flic", func(b []byte) []byte { other = b; return b })
		d.rewrite(t, d.image(), func([]byte) []byte { return other })
		d.expect(t, "another VM's image", d.image(), -1, true)
	})
	t.Run("header of another", func(t *testing.T) {
		d := newDamaged(t, s, image.LZ4)
		d.save(t, s, save.Options{VM: "other", SegmentPages: 2})
		var other []byte
		d.rewrite(t, d.dir+"/vms/other/00000001.flic", func(b []byte) []byte { other = b; return b })
		d.rewrite(t, d.image(), func(b []byte) []byte { return append(bytes.Clone(other[:image.HeaderLen]), b[image.HeaderLen:]...) })
		d.expect(t, "another image's header", d.image(), -1, true)
	})
}

// TestWrongNVRAM takes the NVRAM file away, or puts another in its place.
func TestWrongNVRAM(t *testing.T) {
	s := tiny(tiertest.Options{Seed: 4, Mix: tiertest.Mix{tiertest.Text: 1}})
	say := func(t *testing.T, d *damaged, what string) {
		t.Helper()
		found := d.verify(d.ref)
		err := d.restore(d.ref, io.Discard)
		if err == nil || !strings.Contains(err.Error(), d.nvram) {
			t.Errorf("%s: restore: %v", what, err)
		}
		if !slices.ContainsFunc(found, func(err error) bool { return strings.Contains(err.Error(), d.nvram) }) {
			t.Errorf("%s: verify: %v", what, found)
		}
		d.noLeaks(t)
	}
	t.Run("missing", func(t *testing.T) {
		d := newDamaged(t, s, image.LZ4)
		if err := d.fs.Remove(d.nvram); err != nil {
			t.Fatal(err)
		}
		say(t, d, "without the file")
	})
	t.Run("truncated", func(t *testing.T) {
		d := newDamaged(t, s, image.LZ4)
		for n := d.size(t, d.nvram) - 4096; n >= 0; n -= 4096 * 7 {
			d.rewrite(t, d.nvram, func(b []byte) []byte { return b[:n] })
			say(t, d, fmt.Sprintf("cut to %d bytes", n))
		}
	})
	t.Run("another file", func(t *testing.T) {
		d := newDamaged(t, s, image.LZ4)
		d.save(t, s, save.Options{VM: "other", NVRAM: "/other.img", WorkingSet: hotSet(t, s, every(3)), Energy: dedup.EnergyFull})
		var other []byte
		d.rewrite(t, "/other.img", func(b []byte) []byte { other = bytes.Clone(b); return b })
		d.rewrite(t, d.nvram, func([]byte) []byte { return other })
		say(t, d, "another file")
	})
	t.Run("moved", func(t *testing.T) {
		d := newDamaged(t, s, image.LZ4)
		if err := d.fs.Rename(d.nvram, "/moved.img"); err != nil {
			t.Fatal(err)
		}
		c, err := d.st.OpenCheckpoint(context.Background(), d.ref, checkpoint.Options{NVRAM: "/moved.img"})
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		var b bytes.Buffer
		if _, err := restore.Run(context.Background(), c.Checkpoint, &b, restore.Options{}); err != nil || !bytes.Equal(b.Bytes(), d.want) {
			t.Errorf("restore from a moved file: %v", err)
		}
	})
	t.Run("given away", func(t *testing.T) {
		d := newDamaged(t, s, image.LZ4)
		f, err := nvram.Open(context.Background(), d.fs, d.nvram, nvram.Options{})
		if err != nil {
			t.Fatal(err)
		}
		owners, err := f.Owners(context.Background(), d.st.UUID())
		if err != nil || len(owners) != 1 {
			t.Fatal(owners, err)
		}
		if _, err := f.FreeOwner(context.Background(), owners[0].UUID); err != nil {
			t.Fatal(err)
		}
		f.Close()
		say(t, d, "extents freed")
		d.save(t, s, save.Options{VM: "other", WorkingSet: hotSet(t, s, every(3))})
		say(t, d, "extents another's")
	})
}

// TestCutWhileOpen cuts files of a checkpoint that is open: a fault of the
// mapping must be an error and not the end of the process.
func TestCutWhileOpen(t *testing.T) {
	s := tiertest.New(tiertest.Options{Mix: tiertest.Mix{tiertest.Random: 1}})
	for _, which := range []string{"nvram", "image"} {
		t.Run(which, func(t *testing.T) {
			l := newLab(t, vfs.OS, t.TempDir())
			ref, _ := l.save(t, s, save.Options{WorkingSet: hotSet(t, s, every(2)), VolatileNVRAM: true})
			c, err := l.st.OpenCheckpoint(context.Background(), ref, checkpoint.Options{})
			if err != nil {
				t.Fatal(err)
			}
			defer c.Close()
			name := map[string]string{"nvram": l.nvram, "image": l.dir + "/vms/vm/00000001.flic"}[which]
			f, err := l.fs.OpenRW(name)
			if err != nil {
				t.Fatal(err)
			}
			if err := f.Truncate(300 << 10); err != nil {
				t.Fatal(err)
			}
			f.Close()
			var found []error
			if err := c.Verify(context.Background(), func(err error) { found = append(found, err) }); err != nil {
				t.Errorf("verify: %v", err)
			}
			if len(found) == 0 || !names(found[0], name, 2<<20) {
				t.Errorf("verify found %v", found)
			}
			if _, err := restore.Run(context.Background(), c.Checkpoint, io.Discard, restore.Options{}); !names(err, name, 2<<20) {
				t.Errorf("restore: %v", err)
			}
		})
	}
}
