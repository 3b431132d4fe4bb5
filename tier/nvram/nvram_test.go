package nvram

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/uuid"

	"github.com/flic-migrate/flic-migrate/tier/integrity"
	"github.com/flic-migrate/flic-migrate/tier/vfs"
	"github.com/flic-migrate/flic-migrate/tier/vfs/crashfs"
)

// small is a geometry with which a test sees many groups in little memory: 15
// extents of data a group, 4 pages of 4 KiB an extent.
var small = geometry{extentSize: 16 << 10, group: 16}

const (
	page       = 4096
	smallSlots = 4
)

var (
	ctx    = context.Background()
	storeA = uuid.MustParse("aaaaaaaa-0000-4000-8000-000000000001")
	storeB = uuid.MustParse("bbbbbbbb-0000-4000-8000-000000000002")
)

func owner(n int) uuid.UUID {
	id := uuid.MustParse("cccccccc-0000-4000-8000-000000000000")
	binary.BigEndian.PutUint32(id[12:], uint32(n))
	return id
}

func must[T any](v T, err error) T {
	if err != nil {
		panic(err)
	}
	return v
}

func check(err error) {
	if err != nil {
		panic(err)
	}
}

// content is what slot s of an owner holds: no two slots of any two owners are
// alike, and neither is any sector of them.
func content(id uuid.UUID, slot, size int) []byte {
	rnd := rand.New(rand.NewPCG(binary.BigEndian.Uint64(id[8:]), uint64(slot)))
	b := bytes.Repeat([]byte("content "), size/8)
	for i := 0; i < size; i += 256 {
		binary.LittleEndian.PutUint64(b[i:], rnd.Uint64())
	}
	return b
}

func fill(r *Region, slots int) error {
	for s := range slots {
		if err := r.Write(s, content(r.owner, s, r.pageSize)); err != nil {
			return err
		}
	}
	return nil
}

// verify compares the first slots of a committed owner.
func verify(f *File, id uuid.UUID, extents []uint32, slots, pageSize int) error {
	r, err := f.OpenRegion(id, extents, pageSize)
	if err != nil {
		return err
	}
	defer r.Close()
	return r.Guard(func() error {
		for s := range slots {
			if !bytes.Equal(r.Page(s), content(id, s, pageSize)) {
				return fmt.Errorf("checkpoint %v: slot %d at offset %d has other content", id, s, r.Offset(s))
			}
		}
		return nil
	})
}

func createSmall(t *testing.T, fsys vfs.FS, o Options) *File {
	t.Helper()
	o.Create = true
	f, err := open(ctx, fsys, "/nvram", o, small)
	if err != nil {
		t.Fatal(err)
	}
	return f
}

func noDamage(t *testing.T, f *File) {
	t.Helper()
	damage, err := f.Check(ctx)
	if err != nil || len(damage) > 0 {
		t.Errorf("Check: %v, %v", damage, err)
	}
}

// TestRoundTrip writes pages of every size in a random order, some of them
// twice, and reads them back through every way there is.
func TestRoundTrip(t *testing.T) {
	path := filepath.Join(t.TempDir(), "nvram")
	f, err := Open(ctx, vfs.OS, path, Options{Create: true})
	if err != nil {
		t.Fatal(err)
	}
	if fi := must(os.Stat(path)); fi.Mode() != 0o600 {
		t.Errorf("mode %v", fi.Mode())
	}
	for size := 1 << 10; size <= 64<<10; size *= 2 {
		id := owner(size)
		r, err := f.Reserve(ctx, id, storeA, 40*ExtentSize-1, size)
		if err != nil {
			t.Fatal(err)
		}
		if r.Slots() != 40*ExtentSize/size || r.PageSize() != size {
			t.Fatalf("%d slots of %d", r.Slots(), r.PageSize())
		}
		slots := r.Slots() - r.perExtent - 1 // the last extent stays empty
		order := rand.New(rand.NewPCG(uint64(size), 0)).Perm(slots)
		for i, s := range order {
			if i%3 == 0 {
				check(r.Write(s, bytes.Repeat([]byte("x"), size)))
			}
		}
		buf := make([]byte, size)
		for i, s := range order {
			b := content(id, s, size)
			check(r.Write(s, b))
			clear(b) // the region has its own copy
			if i%100 == 0 {
				other := order[i/2]
				check(r.ReadPage(other, buf))
				if !bytes.Equal(buf, content(id, other, size)) {
					t.Fatalf("page size %d: slot %d reads wrong while writing", size, other)
				}
			}
		}
		check(r.Trim(ctx, slots))
		check(r.Sync())
		if len(r.Extents()) != 39 {
			t.Errorf("%d extents after Trim", len(r.Extents()))
		}
		for s := range slots {
			if !bytes.Equal(r.Page(s), content(id, s, size)) {
				t.Fatalf("page size %d: slot %d reads wrong after Sync", size, s)
			}
		}
		check(r.Close())
		check(r.Close())

		// Through another File, as a restore does it.
		ro, err := Open(ctx, vfs.OS, path, Options{ReadOnly: true})
		if err != nil {
			t.Fatal(err)
		}
		if ro.UUID() != f.UUID() || ro.Path() != path {
			t.Error("UUID or path differs")
		}
		if err := verify(ro, id, r.Extents(), slots, size); err != nil {
			t.Error(err)
		}
		rr := must(ro.OpenRegion(id, r.Extents(), size))
		rr.DontNeed(5, slots)
		check(rr.ReadPage(7, buf))
		if !bytes.Equal(buf, content(id, 7, size)) || !bytes.Equal(rr.Page(7), buf) {
			t.Error("slot 7 after DontNeed")
		}
		if err := rr.Write(0, buf); err == nil {
			t.Error("write to a region open for reading")
		}
		if err := rr.Trim(ctx, 0); err == nil {
			t.Error("trim of a region open for reading")
		}
		if err := rr.Release(ctx); err == nil {
			t.Error("release of a region open for reading")
		}
		check(ro.Close())
	}
	noDamage(t, f)
	owners := must(f.Owners(ctx, storeA))
	if len(owners) != 7 || owners[0].Extents != 39 || time.Since(owners[0].Since) > time.Minute {
		t.Errorf("%+v", owners)
	}
	check(f.Close())
}

func TestMisuse(t *testing.T) {
	f := createSmall(t, crashfs.New(0), Options{})
	if _, err := f.Reserve(ctx, owner(1), storeA, -1, page); err == nil {
		t.Error("negative size")
	}
	for _, size := range []int{0, 512, 3000, 128 << 10, -4096} {
		if _, err := f.Reserve(ctx, owner(1), storeA, 1, size); err == nil {
			t.Errorf("page size %d", size)
		}
		if _, err := f.OpenRegion(owner(1), nil, size); err == nil {
			t.Errorf("page size %d", size)
		}
	}
	if _, err := f.Reserve(ctx, uuid.Nil, storeA, 1, page); err == nil {
		t.Error("no owner")
	}
	if _, err := f.Reserve(ctx, owner(1), uuid.Nil, 1, page); err == nil {
		t.Error("no store")
	}
	r := must(f.Reserve(ctx, owner(1), storeA, 1, page))
	if _, err := f.Reserve(ctx, owner(1), storeB, 1, page); err == nil {
		t.Error("an owner reserved twice")
	}
	for _, s := range []int{-1, smallSlots} {
		if err := r.Write(s, make([]byte, page)); err == nil {
			t.Errorf("write to slot %d", s)
		}
	}
	if err := r.Write(0, make([]byte, page-1)); err == nil {
		t.Error("short page")
	}
	if err := r.Trim(ctx, smallSlots+1); err == nil {
		t.Error("trim to more")
	}
	check(r.Close())
	for _, err := range []error{r.Write(0, make([]byte, page)), r.Sync(), r.Trim(ctx, 0), r.Release(ctx), r.ReadPage(0, make([]byte, page))} {
		if !errors.Is(err, errClosed) {
			t.Errorf("after Close: %v", err)
		}
	}
	// Nothing at all is a region, too: a VM without hot pages.
	none := must(f.Reserve(ctx, owner(2), storeA, 0, page))
	check(none.Sync())
	check(none.Trim(ctx, 0))
	check(none.Close())
	none = must(f.OpenRegion(owner(2), nil, page))
	check(none.Guard(func() error { return nil }))
	check(none.Close())
	if n := must(f.FreeOwner(ctx, uuid.Nil)); n != 0 {
		t.Error("the zero UUID owns something")
	}
	if _, err := open(ctx, crashfs.New(0), "/x", Options{Create: true, Capacity: small.extentSize}, small); err == nil {
		t.Error("capacity without room for data")
	}
	if _, err := open(ctx, crashfs.New(0), "/x", Options{}, small); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("Open without Create: %v", err)
	}
}

// TestCapacity fills a file up to its cap, over several groups, and uses again
// what is given back.
func TestCapacity(t *testing.T) {
	fsys := crashfs.New(0)
	f := createSmall(t, fsys, Options{Capacity: 40*small.extentSize + 5})
	const dataExtents = 40 - 3 // three groups have begun
	if got := f.Capacity(); got != 40*small.extentSize {
		t.Errorf("Capacity %d", got)
	}
	if got := must(f.Free(ctx)); got != dataExtents*small.extentSize {
		t.Errorf("Free of a new file %d, want %d", got, dataExtents*small.extentSize)
	}
	a := must(f.Reserve(ctx, owner(1), storeA, 20*small.extentSize, page))
	if got := must(f.Free(ctx)); len(a.extents) != 20 || got != 17*small.extentSize {
		t.Errorf("%d extents, %d free", len(a.extents), got)
	}
	b := must(f.Reserve(ctx, owner(2), storeB, 20*small.extentSize, page))
	if len(b.extents) != 17 || must(f.Free(ctx)) != 0 {
		t.Errorf("%d extents of 17 left, %d free", len(b.extents), must(f.Free(ctx)))
	}
	if none := must(f.Reserve(ctx, owner(3), storeA, 1, page)); none.Slots() != 0 {
		t.Errorf("%d slots from a full file", none.Slots())
	}
	if got := must(fsys.Stat("/nvram")).Size(); got != 40*small.extentSize {
		t.Errorf("file of %d bytes", got)
	}
	check(fill(b, b.Slots()))
	check(b.Sync())
	check(a.Trim(ctx, 3*smallSlots+1))
	if got := must(f.Free(ctx)); got != 16*small.extentSize {
		t.Errorf("%d free after Trim", got)
	}
	c := must(f.Reserve(ctx, owner(3), storeA, 18*small.extentSize, page))
	if len(c.extents) != 16 {
		t.Errorf("%d extents after Trim", len(c.extents))
	}
	for _, e := range c.extents {
		if e%16 == 0 {
			t.Errorf("extent %d of a table was given out", e)
		}
	}
	check(fill(c, c.Slots()))
	check(c.Release(ctx))
	if n := must(f.FreeOwner(ctx, owner(1))); n != 4 {
		t.Errorf("FreeOwner freed %d", n)
	}
	if n := must(f.FreeOwner(ctx, owner(1))); n != 0 {
		t.Errorf("FreeOwner freed %d again", n)
	}
	if err := verify(f, owner(2), b.Extents(), b.Slots(), page); err != nil {
		t.Error(err)
	}
	noDamage(t, f)

	// A larger cap is kept in the file; a smaller one is this process's own.
	f = must(open(ctx, fsys, "/nvram", Options{}, small))
	for _, c := range []struct{ option, want, free int64 }{
		{50, 50, 20 + 9}, {41, 50, 20 + 1}, {0, 50, 20 + 9}, {10, 50, 9}, {51, 51, 20 + 10},
	} {
		g := must(open(ctx, fsys, "/nvram", Options{Capacity: c.option * small.extentSize}, small))
		if g.Capacity() != c.want*small.extentSize || must(g.Free(ctx)) != c.free*small.extentSize {
			t.Errorf("with option %d: capacity %d, free %d extents", c.option, g.Capacity()/small.extentSize, must(g.Free(ctx))/small.extentSize)
		}
		noDamage(t, g)
		check(g.Close())
	}
	// f sees what another process has raised.
	d := must(f.Reserve(ctx, owner(4), storeA, 100*small.extentSize, page))
	if len(d.extents) != 20+10 {
		t.Errorf("%d extents after another process has raised the cap", len(d.extents))
	}
}

func TestSweepAndOwners(t *testing.T) {
	f := createSmall(t, crashfs.New(0), Options{})
	for i := range 6 {
		store := storeA
		if i >= 3 {
			store = storeB
		}
		check(must(f.Reserve(ctx, owner(i), store, int64(i+1)*small.extentSize, page)).Close())
	}
	list := func(store uuid.UUID) string {
		s := ""
		for _, o := range must(f.Owners(ctx, store)) {
			s += fmt.Sprintf("%d:%d ", o.UUID[15], o.Extents)
		}
		return s
	}
	if got := list(storeA) + "| " + list(storeB) + "| " + list(uuid.Nil); got != "0:1 1:2 2:3 | 3:4 4:5 5:6 | 0:1 1:2 2:3 3:4 4:5 5:6 " {
		t.Errorf("owners %s", got)
	}
	n, err := f.Sweep(ctx, storeA, func(id uuid.UUID) bool { return id == owner(1) })
	if n != 1+3 || err != nil {
		t.Errorf("Sweep: %d, %v", n, err)
	}
	if got := list(uuid.Nil); got != "1:2 3:4 4:5 5:6 " {
		t.Errorf("owners after Sweep %s", got)
	}
	if n := must(f.Sweep(ctx, uuid.New(), func(uuid.UUID) bool { return false })); n != 0 {
		t.Errorf("Sweep of a store without extents freed %d", n)
	}
	noDamage(t, f)
}

// TestSweepSince: what was reserved anew for an owner, after it was found out that he is not
// live, stays his.
func TestSweepSince(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := createSmall(t, crashfs.New(0), Options{})
		reserve := func(i int) { check(must(f.Reserve(ctx, owner(i), storeA, 2*small.extentSize, page)).Close()) }
		reserve(1)
		reserve(2)
		seen := make(map[uuid.UUID]time.Time)
		for _, o := range must(f.Owners(ctx, storeA)) {
			seen[o.UUID] = o.Since
		}
		must(f.FreeOwner(ctx, owner(1)))
		time.Sleep(time.Second)
		reserve(1)
		n, err := f.SweepSince(ctx, storeA, func(id uuid.UUID, since time.Time) bool { return !since.Equal(seen[id]) })
		if left := must(f.Owners(ctx, storeA)); n != 2 || err != nil || len(left) != 1 || left[0].UUID != owner(1) {
			t.Errorf("%d freed, %v; left %+v", n, err, left)
		}
		check(f.Close())
	})
}

// TestFormat compares a file with its bytes as docs/format-nvram.md gives them.
func TestFormat(t *testing.T) {
	fsys := crashfs.New(0)
	f, err := Open(ctx, fsys, "/nvram", Options{Create: true, Capacity: 1 << 30})
	if err != nil {
		t.Fatal(err)
	}
	f.h.id = uuid.MustParse("00112233-4455-6677-8899-aabbccddeeff")
	h := f.h.encode()
	const wantHeader = "464c49434e564d31" + "02000000" + "00000400" + "00040000" + "00000000" +
		"0200000000000000" + "00112233445566778899aabbccddeeff" + "0010000000000000" + "00000000" + "09ace3ea"
	if got := fmt.Sprintf("%x", h); got != wantHeader {
		t.Errorf("header\n%s, want\n%s", got, wantHeader)
	}
	b := make([]byte, entrySize)
	f.h.encodeEntry(b, 1025, entry{storeA, storeB, 7, 4096, time.Unix(1700000000, 5)})
	const wantEntry = "aaaaaaaa000040008000000000000001" + "bbbbbbbb000040008000000000000002" +
		"07000000" + "0c010000" + "00f1536500000000" + "0000000000000000" + "00000000" + "a68fed53"
	if got := fmt.Sprintf("%x", b); got != wantEntry {
		t.Errorf("entry\n%s, want\n%s", got, wantEntry)
	}
	e, s := f.h.decodeEntry(b, 1025)
	if s != taken || e != (entry{storeA, storeB, 7, 4096, time.Unix(1700000000, 0)}) {
		t.Errorf("%v %+v", s, e)
	}
	if off := f.h.entryOffset(1025); off != 256<<20+8192+64 {
		t.Errorf("entry of extent 1025 at %d", off)
	}
	if off := f.h.offset(1025); off != 1025*ExtentSize {
		t.Errorf("extent 1025 at %d", off)
	}
	// What a later version may put into reserved fields is not taken for ours.
	for _, i := range []int{37, 38, 39, 48, 59} {
		c := bytes.Clone(b)
		c[i] ^= 2
		binary.LittleEndian.PutUint32(c[60:], f.h.checksum(c, 1025))
		if _, s := f.h.decodeEntry(c, 1025); s != damaged {
			t.Errorf("reserved byte %d: state %d", i, s)
		}
	}
	// An incompatible feature is refused by its number, a compatible one kept.
	for i, feature := range map[int]string{20: "feature 1 ", 23: "feature 25 "} {
		c := bytes.Clone(h)
		c[i] ^= 2
		binary.LittleEndian.PutUint32(c[60:], integrity.Checksum(c[:60]))
		if _, err := decodeHeader(c); err == nil || !strings.Contains(err.Error(), feature) {
			t.Errorf("incompatible feature in byte %d: %v", i, err)
		}
	}
	for _, i := range []int{56, 59} {
		c := bytes.Clone(h)
		c[i] ^= 2
		binary.LittleEndian.PutUint32(c[60:], integrity.Checksum(c[:60]))
		if d, err := decodeHeader(c); err != nil || !bytes.Equal(d.encode(), c) {
			t.Errorf("compatible feature in byte %d: %v", i, err)
		}
	}
	// The entry counts in its place only.
	if _, s := f.h.decodeEntry(b, 1026); s != damaged {
		t.Error("an entry is believed in another place")
	}
	other := f.h
	other.id = uuid.New()
	if _, s := other.decodeEntry(b, 1025); s != damaged {
		t.Error("an entry is believed in another file")
	}
}

// TestTornEntry: an entry of which only some 8-byte words have reached the
// medium is told from one that is damaged.
func TestTornEntry(t *testing.T) {
	f := createSmall(t, crashfs.New(0), Options{})
	full := make([]byte, entrySize)
	f.h.encodeEntry(full, 3, entry{uuid.New(), uuid.New(), 0, 4096, time.Now()})
	for mask := range 256 {
		b := make([]byte, entrySize)
		for w := range 8 {
			if mask>>w&1 != 0 {
				copy(b[w*8:], full[w*8:w*8+8])
			}
		}
		_, s := f.h.decodeEntry(b, 3)
		want := torn
		switch {
		case bytes.Equal(b, full):
			want = taken
		case bytes.Equal(b, make([]byte, entrySize)):
			want = free
		}
		if s != want {
			t.Errorf("words %08b: state %d, want %d", mask, s, want)
		}
	}
	for bit := range entrySize * 8 {
		b := bytes.Clone(full)
		b[bit/8] ^= 1 << (bit % 8)
		if _, s := f.h.decodeEntry(b, 3); s != damaged {
			t.Errorf("bit %d flipped: state %d", bit, s)
		}
	}
}

// flip inverts bits of a file.
func flip(fsys vfs.FS, off int64, mask byte) {
	h := must(fsys.OpenRW("/nvram"))
	defer h.Close()
	b := make([]byte, 1)
	must(h.ReadAt(b, off))
	b[0] ^= mask
	must(h.WriteAt(b, off))
}

func wantCorrupt(t *testing.T, what string, err error, off int64) {
	t.Helper()
	var c *integrity.CorruptError
	if !errors.As(err, &c) || !integrity.IsCorrupt(err) {
		t.Errorf("%s: %v, want a CorruptError", what, err)
		return
	}
	if c.Offset != off || c.File != "/nvram" || !strings.HasPrefix(err.Error(), fmt.Sprintf("/nvram: offset %d: ", off)) {
		t.Errorf("%s: %v, want offset %d", what, err, off)
	}
}

// TestDamage flips every bit of the headers and of a checkpoint's table entries.
func TestDamage(t *testing.T) {
	fsys := crashfs.New(0)
	f := createSmall(t, fsys, Options{})
	r := must(f.Reserve(ctx, owner(1), storeA, 3*small.extentSize, page))
	check(fill(r, r.Slots()))
	check(r.Sync())
	check(r.Close())
	reopen := func() (*File, error) { return open(ctx, fsys, "/nvram", Options{ReadOnly: true}, small) }

	for bit := range 8 * headerSize {
		off, mask := int64(bit/8), byte(1)<<(bit%8)
		for copies := 1; copies <= 3; copies++ {
			for c := range int64(2) {
				if copies>>c&1 != 0 {
					flip(fsys, off+c*headerCopy, mask)
				}
			}
			g, err := reopen()
			if copies == 3 {
				wantCorrupt(t, fmt.Sprintf("both headers, bit %d", bit), err, 0)
				if _, err := open(ctx, fsys, "/nvram", Options{Create: true}, small); err == nil {
					t.Fatalf("a damaged file was formatted anew (bit %d)", bit)
				}
			} else if err != nil {
				t.Errorf("one header damaged (%d), bit %d: %v", copies, bit, err)
			} else {
				damage := must(g.Check(ctx))
				if len(damage) != 1 {
					t.Fatalf("Check of a damaged header: %v", damage)
				}
				wantCorrupt(t, "Check", damage[0], int64(copies-1)*headerCopy)
				check(verify(g, owner(1), r.Extents(), r.Slots(), page))
			}
			for c := range int64(2) {
				if copies>>c&1 != 0 {
					flip(fsys, off+c*headerCopy, mask)
				}
			}
		}
	}

	for bit := range 8 * 3 * entrySize {
		off, mask := small.entryOffset(1)+int64(bit/8), byte(1)<<(bit%8)
		at := small.entryOffset(int64(1 + bit/8/entrySize))
		flip(fsys, off, mask)
		_, err := f.OpenRegion(owner(1), r.Extents(), page)
		wantCorrupt(t, fmt.Sprintf("entry bit %d", bit), err, at)
		damage := must(f.Check(ctx))
		if len(damage) != 1 {
			t.Fatalf("Check, entry bit %d: %v", bit, damage)
		}
		wantCorrupt(t, "Check", damage[0], at)
		// Nobody may take an extent that is only damaged.
		if n := must(f.Sweep(ctx, storeA, func(uuid.UUID) bool { return true })); n != 0 {
			t.Fatalf("Sweep took a damaged entry (bit %d)", bit)
		}
		flip(fsys, off, mask)
	}

	// A table entry for the table itself, and a reserved header field.
	flip(fsys, small.entryOffset(0), 1)
	if damage := must(f.Check(ctx)); len(damage) != 1 {
		t.Errorf("Check: %v", damage)
	}
	flip(fsys, small.entryOffset(0), 1)
	noDamage(t, f)

	// A torn entry is found, and reclaimed.
	h := must(fsys.OpenRW("/nvram"))
	must(h.WriteAt(make([]byte, 32), small.entryOffset(2)))
	damage := must(f.Check(ctx))
	if len(damage) != 1 {
		t.Fatalf("Check: %v", damage)
	}
	wantCorrupt(t, "Check", damage[0], small.entryOffset(2))
	_, err := f.OpenRegion(owner(1), r.Extents(), page)
	wantCorrupt(t, "torn entry", err, small.entryOffset(2))
	if n := must(f.Sweep(ctx, storeB, func(uuid.UUID) bool { return false })); n != 1 {
		t.Errorf("Sweep freed %d", n)
	}
	_, err = f.OpenRegion(owner(1), r.Extents(), page)
	wantCorrupt(t, "free extent", err, small.entryOffset(2))

	// Two owners' lines that say the same thing.
	b := make([]byte, entrySize)
	f.h.encodeEntry(b, 9, entry{owner(1), storeA, 2, page, time.Now()})
	must(h.WriteAt(b, small.entryOffset(9)))
	if damage := must(f.Check(ctx)); len(damage) != 2 { // and extent 9 is beyond the end
		t.Errorf("Check: %v", damage)
	}

	// FreeOwner frees what still shows its owner's name.
	flip(fsys, small.entryOffset(1)+50, 1)
	if n := must(f.FreeOwner(ctx, owner(1))); n != 3 {
		t.Errorf("FreeOwner freed %d", n)
	}
	noDamage(t, f)
}

func TestWrongRegion(t *testing.T) {
	f := createSmall(t, crashfs.New(0), Options{})
	a := must(f.Reserve(ctx, owner(1), storeA, 3*small.extentSize, page)).Extents()
	b := must(f.Reserve(ctx, owner(2), storeA, 2*small.extentSize, 2*page)).Extents()
	for name, c := range map[string]struct {
		id      uuid.UUID
		extents []uint32
		size    int
		off     int64
	}{
		"another's":         {owner(1), []uint32{a[0], b[0]}, page, small.entryOffset(int64(b[0]))},
		"order":             {owner(1), []uint32{a[0], a[2], a[1]}, page, small.entryOffset(int64(a[2]))},
		"twice":             {owner(1), []uint32{a[0], a[0]}, page, small.entryOffset(int64(a[0]))},
		"unknown owner":     {owner(3), a, page, small.entryOffset(int64(a[0]))},
		"table":             {owner(1), []uint32{0}, page, 0},
		"beyond the end":    {owner(1), []uint32{a[0], 14}, page, small.offset(14)},
		"far beyond":        {owner(1), []uint32{1<<32 - 1}, page, small.offset(1<<32 - 1)},
		"another page size": {owner(2), b, page, small.entryOffset(int64(b[0]))},
	} {
		_, err := f.OpenRegion(c.id, c.extents, c.size)
		wantCorrupt(t, name, err, c.off)
	}
}

// TestTruncated cuts the file at every extent, and in between: an error with an
// offset, whatever is missing, and never a SIGBUS.
func TestTruncated(t *testing.T) {
	for cut := int64(0); cut <= 20*small.extentSize; cut += small.extentSize / 2 {
		fsys := crashfs.New(0)
		f := createSmall(t, fsys, Options{})
		r := must(f.Reserve(ctx, owner(1), storeA, 20*small.extentSize, page)) // two groups
		check(fill(r, r.Slots()))
		check(r.Sync())
		check(r.Close())
		check(f.f.Truncate(cut))

		g, err := open(ctx, fsys, "/nvram", Options{ReadOnly: true}, small)
		if cut == 0 {
			wantCorrupt(t, "empty file", err, 0)
			continue
		}
		if err != nil {
			t.Fatal(err)
		}
		_, err = g.OpenRegion(owner(1), r.Extents(), page)
		var c *integrity.CorruptError
		if !errors.As(err, &c) || c.Offset+small.extentSize <= cut {
			t.Errorf("cut at %d: %v", cut, err)
		}
		// Cut exactly at the second group, the rest is a whole file by itself.
		if damage := must(g.Check(ctx)); cut >= small.extentSize && cut/small.extentSize != 16 && len(damage) == 0 {
			t.Errorf("cut at %d: Check finds nothing", cut)
		}
		// The rest can be reclaimed and used.
		n, err := f.FreeOwner(ctx, owner(1))
		if cut < small.extentSize {
			continue // not even the table is whole
		}
		if err != nil || n < 15 {
			t.Errorf("cut at %d: FreeOwner: %d, %v", cut, n, err)
		}
		r = must(f.Reserve(ctx, owner(2), storeA, 10*small.extentSize, page))
		check(fill(r, r.Slots()))
		check(r.Sync())
		check(verify(f, owner(2), r.Extents(), r.Slots(), page))
	}
}

// TestCutWhileReading truncates a real file under a reader's mapping.
func TestCutWhileReading(t *testing.T) {
	path := filepath.Join(t.TempDir(), "nvram")
	f := must(open(ctx, vfs.OS, path, Options{Create: true}, small))
	defer f.Close()
	w := must(f.Reserve(ctx, owner(1), storeA, 4*small.extentSize, page))
	check(fill(w, w.Slots()))
	check(w.Sync())
	check(w.Close())
	r := must(f.OpenRegion(owner(1), w.Extents(), page))
	defer r.Close()
	check(os.Truncate(path, 3*small.extentSize))
	sum := 0
	err := r.Guard(func() error {
		for s := range r.Slots() {
			sum += int(r.Page(s)[100])
		}
		return nil
	})
	var c *integrity.CorruptError
	if !errors.As(err, &c) || c.Offset != 3*small.extentSize+100 {
		t.Errorf("%v (%d)", err, sum)
	}
	if err := r.ReadPage(r.Slots()-1, make([]byte, page)); !errors.Is(err, io.EOF) {
		t.Errorf("ReadPage: %v", err)
	}
	other := errors.New("other")
	if err := r.Guard(func() error { return other }); err != other {
		t.Errorf("Guard: %v", err)
	}
}

// TestFullDisk: what does not fit is not given, and what is given can be
// written.
func TestFullDisk(t *testing.T) {
	for blocks := int64(4); blocks < 4*20; blocks += 3 {
		fsys := crashfs.New(blocks * 4096)
		f, err := open(ctx, fsys, "/nvram", Options{Create: true}, small)
		if err != nil {
			t.Fatal(err)
		}
		freeSpace := must(f.Free(ctx))
		r := must(f.Reserve(ctx, owner(1), storeA, 100*small.extentSize, page))
		if got := int64(r.Slots()) * page; got != freeSpace || got > blocks*4096 || got < (blocks-12)*4096 {
			t.Errorf("%d blocks: %d bytes reserved, Free said %d", blocks, got, freeSpace)
		}
		check(fill(r, r.Slots()))
		check(r.Sync())
		check(verify(f, owner(1), r.Extents(), r.Slots(), page))
	}
	fsys := crashfs.New(3 * 4096)
	if _, err := open(ctx, fsys, "/nvram", Options{Create: true}, small); !errors.Is(err, syscall.ENOSPC) {
		t.Errorf("no room for the first extent: %v", err)
	}
}

// TestDiskFillsUp: the disk fills up between the look and the allocation.
func TestDiskFillsUp(t *testing.T) {
	fsys := crashfs.New(40 * 4096)
	f := createSmall(t, fsys, Options{})
	check(must(f.Reserve(ctx, owner(1), storeA, small.extentSize, page)).Close())
	size := must(fsys.Stat("/nvram")).Size()
	f.fs = spacious{fsys}
	_, err := f.Reserve(ctx, owner(2), storeA, 20*small.extentSize, page)
	if !errors.Is(err, syscall.ENOSPC) {
		t.Fatalf("%v", err)
	}
	if got := must(fsys.Stat("/nvram")).Size(); got != size {
		t.Errorf("file of %d bytes after a failed Reserve, was %d", got, size)
	}
	if owners := must(f.Owners(ctx, uuid.Nil)); len(owners) != 1 {
		t.Errorf("%+v", owners)
	}
	f.fs = fsys
	check(must(f.Reserve(ctx, owner(2), storeA, 5*small.extentSize, page)).Close())
}

// spacious says that there is room where there is none.
type spacious struct{ vfs.FS }

func (s spacious) StatFS(name string) (vfs.FSInfo, error) {
	return vfs.FSInfo{Free: 1 << 40}, nil
}

// altered is a file system that calls its files devices, or has no fallocate.
type altered struct {
	vfs.FS
	mode       fs.FileMode
	noAllocate bool
}

type alteredInfo struct {
	fs.FileInfo
	mode fs.FileMode
}

func (i alteredInfo) Mode() fs.FileMode { return i.mode }

func (a altered) Stat(name string) (fs.FileInfo, error) {
	fi, err := a.FS.Stat(name)
	return alteredInfo{fi, a.mode | 0o600}, err
}

func (a altered) Create(name string) (vfs.File, error) {
	f, err := a.FS.Create(name)
	return alteredFile{f, a}, err
}

func (a altered) OpenRW(name string) (vfs.File, error) {
	f, err := a.FS.OpenRW(name)
	return alteredFile{f, a}, err
}

type alteredFile struct {
	vfs.File
	a altered
}

func (f alteredFile) Allocate(off, n int64) error {
	if f.a.mode != 0 {
		panic("fallocate of a device")
	}
	if f.a.noAllocate {
		return &fs.PathError{Op: "fallocate", Path: f.Name(), Err: errors.ErrUnsupported}
	}
	return f.File.Allocate(off, n)
}

func (f alteredFile) Truncate(size int64) error {
	if f.a.mode != 0 {
		panic("truncate of a device")
	}
	return f.File.Truncate(size)
}

// TestDevice uses a file as a device of fixed size, with rubbish in all but its
// first extent.
func TestDevice(t *testing.T) {
	disk := crashfs.New(0)
	h := must(disk.Create("/pmem0"))
	must(h.WriteAt(bytes.Repeat([]byte("rubbish"), 40*16384/7), 0))
	dev := altered{FS: disk, mode: fs.ModeDevice}
	_, err := open(ctx, dev, "/pmem0", Options{Create: true}, small)
	if !integrity.IsCorrupt(err) {
		t.Fatalf("a device in use was formatted: %v", err)
	}
	if _, err := open(ctx, dev, "/pmem0", Options{Format: true}, small); !integrity.IsCorrupt(err) {
		t.Errorf("Format without Create: %v", err)
	}
	disk.SetVolatile(true) // devices are on a devtmpfs
	f := must(open(ctx, dev, "/pmem0", Options{Create: true, Format: true}, small))
	if f.Volatile() {
		t.Error("a device is called volatile because its node is on a tmpfs")
	}
	noDamage(t, f)
	const data = 39 - 3 // 40 extents but for the rounding, 3 groups
	if got := must(f.Free(ctx)); got != data*small.extentSize {
		t.Errorf("%d free", got)
	}
	r := must(f.Reserve(ctx, owner(1), storeA, 100*small.extentSize, page))
	if len(r.extents) != data {
		t.Errorf("%d extents", len(r.extents))
	}
	check(fill(r, r.Slots()))
	check(r.Sync())
	check(verify(f, owner(1), r.Extents(), r.Slots(), page))
	noDamage(t, f)

	tiny := must(disk.Create("/pmem1"))
	must(tiny.WriteAt(make([]byte, small.extentSize+10), 0))
	if _, err := open(ctx, dev, "/pmem1", Options{Create: true}, small); !errors.Is(err, syscall.ENOSPC) {
		t.Errorf("device without room for data: %v", err)
	}
}

// TestPreallocated formats a sparse file made beforehand, and grows beyond it.
func TestPreallocated(t *testing.T) {
	fsys := crashfs.New(0)
	h := must(fsys.Create("/nvram"))
	check(h.Truncate(20 * small.extentSize))
	f := createSmall(t, fsys, Options{})
	r := must(f.Reserve(ctx, owner(1), storeA, 40*small.extentSize, page))
	check(fill(r, r.Slots()))
	check(r.Sync())
	check(verify(f, owner(1), r.Extents(), r.Slots(), page))
	if r.Slots() != 40*smallSlots {
		t.Errorf("%d slots", r.Slots())
	}
}

func TestWithoutFallocate(t *testing.T) {
	disk := crashfs.New(0)
	fsys := altered{FS: disk, noAllocate: true}
	f := createSmall(t, fsys, Options{})
	for i := range 3 {
		r := must(f.Reserve(ctx, owner(i), storeA, 11*small.extentSize, page))
		if got := must(disk.Stat("/nvram")).Size(); got != int64(r.extents[10]+1)*small.extentSize {
			t.Errorf("file of %d bytes", got)
		}
		check(fill(r, r.Slots()))
		check(r.Sync())
		check(verify(f, owner(i), r.Extents(), r.Slots(), page))
	}
	full := crashfs.New(30 * 4096)
	f = createSmall(t, altered{FS: full, noAllocate: true}, Options{})
	f.fs = spacious{full}
	if _, err := f.Reserve(ctx, owner(1), storeA, 20*small.extentSize, page); !errors.Is(err, syscall.ENOSPC) {
		t.Errorf("full disk: %v", err)
	}
}

func TestNotOurs(t *testing.T) {
	fsys := crashfs.New(0)
	h := must(fsys.Create("/nvram"))
	for _, off := range []int64{0, 7, 64, headerCopy, 10000, small.extentSize - 1, small.extentSize, 1<<20 - 1, 1 << 20, 5<<20 + 77} {
		check(h.Truncate(0))
		must(h.WriteAt([]byte{1}, off))
		_, err := open(ctx, fsys, "/nvram", Options{Create: true}, small)
		wantCorrupt(t, fmt.Sprintf("byte at %d", off), err, off)
		if !errors.Is(err, ErrNotBlank) {
			t.Errorf("byte at %d: %v", off, err)
		}
		if got := make([]byte, 1); must(h.ReadAt(got, off)) != 1 || got[0] != 1 {
			t.Errorf("byte at %d was overwritten", off)
		}
	}
	// Another version, and a damaged file: Format spares them too.
	check(h.Truncate(small.extentSize))
	f := header{geometry: small, generation: 1, id: uuid.New()}
	for v, want := range map[byte]string{1: "earlier flic-migrate", 3: "later flic-migrate", 2: "checksum"} {
		b := f.encode()
		b[8] = v
		if v != version {
			binary.LittleEndian.PutUint32(b[60:], integrity.Checksum(b[:60]))
		} else {
			b[30] ^= 1
		}
		must(h.WriteAt(b, 0))
		for _, format := range []bool{false, true} {
			_, err := open(ctx, fsys, "/nvram", Options{Create: true, Format: format}, small)
			if err == nil || !strings.Contains(err.Error(), want) {
				t.Errorf("version %d: %v", v, err)
			}
		}
	}
}

// TestFormatOverwrites: with Format whatever is there goes, and nothing of it is
// taken for a table.
func TestFormatOverwrites(t *testing.T) {
	fsys := crashfs.New(0)
	h := must(fsys.Create("/nvram"))
	must(h.WriteAt(bytes.Repeat([]byte("rubbish"), 40*16384/7), 0))
	_, err := open(ctx, fsys, "/nvram", Options{Create: true}, small)
	wantCorrupt(t, "without Format", err, 0)
	f := must(open(ctx, fsys, "/nvram", Options{Create: true, Format: true}, small))
	noDamage(t, f)
	r := must(f.Reserve(ctx, owner(1), storeA, 30*small.extentSize, page))
	check(fill(r, r.Slots()))
	check(r.Sync())
	check(f.Close())
	// A second time it is an NVRAM file.
	f = must(open(ctx, fsys, "/nvram", Options{Create: true, Format: true}, small))
	check(verify(f, owner(1), r.Extents(), r.Slots(), page))
}

// TestBlankIsLookedForInData: holes are not read, and not more than a bound of
// what is none.
func TestBlankIsLookedForInData(t *testing.T) {
	dir := t.TempDir()
	sparse := filepath.Join(dir, "sparse")
	check(os.WriteFile(sparse, nil, 0o600))
	check(os.Truncate(sparse, 1<<40))
	f := must(Open(ctx, vfs.OS, sparse, Options{Create: true}))
	check(f.Close())

	late := filepath.Join(dir, "late")
	check(os.WriteFile(late, nil, 0o600))
	check(os.Truncate(late, 1<<40))
	w := must(os.OpenFile(late, os.O_WRONLY, 0))
	must(w.WriteAt([]byte("x"), 1<<39+5))
	check(w.Close())
	_, err := Open(ctx, vfs.OS, late, Options{Create: true})
	var c *integrity.CorruptError
	if !errors.As(err, &c) || c.Offset != 1<<39+5 {
		t.Errorf("a byte behind half a TiB of holes: %v", err)
	}

	defer func(n int64) { lookLimit = n }(lookLimit)
	lookLimit = 4 << 20
	zeros := filepath.Join(dir, "zeros")
	for size, want := range map[int]error{4 << 20: nil, 4<<20 + 1: ErrNotBlank} {
		check(os.WriteFile(zeros, make([]byte, size), 0o600))
		f, err := Open(ctx, vfs.OS, zeros, Options{Create: true})
		if !errors.Is(err, want) {
			t.Errorf("%d zeros: %v, want %v", size, err, want)
		}
		if err == nil {
			check(f.Close())
		}
		check(os.Remove(zeros))
	}
}

// TestKilledSavesGiveBlocksBack: the file keeps nothing of 96 saves that were
// killed, once their store has swept it, on a real file system and on the other.
func TestKilledSavesGiveBlocksBack(t *testing.T) {
	for name, fsys := range map[string]vfs.FS{"os": vfs.OS, "crashfs": newDisk()} {
		t.Run(name, func(t *testing.T) {
			dir := "/dir"
			if fsys == vfs.OS {
				dir = t.TempDir()
			}
			path := filepath.Join(dir, "nvram")
			f := must(open(ctx, fsys, path, Options{Create: true}, small))
			defer f.Close()
			m := model{}
			check(m.save(f, owner(1), storeA, 3, 12, true))
			blocks, size := must(f.f.Allocated()), must(f.f.Size())
			const each = 10
			for i := range 96 {
				killed := must(open(ctx, fsys, path, Options{Create: true}, small))
				r := must(killed.Reserve(ctx, owner(100+i), storeA, each*small.extentSize, page))
				check(fill(r, r.Slots()))
				check(killed.Close()) // and no more: the process is gone
			}
			if got := must(f.f.Allocated()); got < 96*each*small.extentSize {
				t.Fatalf("%d bytes of disk space in use by 96 saves", got)
			}
			// One is in the middle of it all and lives.
			check(m.save(f, owner(2), storeB, 2, 8, true))
			_, err := f.FreeOwner(ctx, owner(120))
			check(err)
			m[owner(140)] = committed{store: storeA}
			n := must(f.Sweep(ctx, storeA, m.live))
			if n != 94*each {
				t.Errorf("%d extents swept", n)
			}
			// Two checkpoints are left, and the tables before them.
			if got := must(f.f.Allocated()); got > blocks+(each+2+96*each/15+2)*small.extentSize {
				t.Errorf("%d bytes of disk space after Sweep, %d before", got, blocks)
			}
			delete(m, owner(140))
			_, err = f.FreeOwner(ctx, owner(2))
			check(err)
			must(f.Sweep(ctx, storeA, m.live))
			if b, s := must(f.f.Allocated()), must(f.f.Size()); b > blocks+small.extentSize || s != size { // an extent for the file system's own
				t.Errorf("%d bytes of disk space, size %d; %d and %d before", b, s, blocks, size)
			}
			check(verify(f, owner(1), m[owner(1)].extents, 12, page))
			// What was given back is taken again, with its blocks.
			check(m.save(f, owner(3), storeA, 50, 200, true))
			check(verify(f, owner(3), m[owner(3)].extents, 200, page))
			noDamage(t, f)
		})
	}
}

// TestPreallocatedKeepsBlocks: whoever has made the file with its blocks wants
// them to be there when the disk is full.
func TestPreallocatedKeepsBlocks(t *testing.T) {
	fsys := crashfs.New(0)
	h := must(fsys.Create("/nvram"))
	check(h.Allocate(0, 40*small.extentSize))
	f := createSmall(t, fsys, Options{})
	r := must(f.Reserve(ctx, owner(1), storeA, 50*small.extentSize, page)) // and grows
	check(fill(r, r.Slots()))
	check(r.Sync())
	check(r.Trim(ctx, 3))
	check(r.Close())
	must(f.FreeOwner(ctx, owner(1)))
	must(f.Sweep(ctx, storeA, func(uuid.UUID) bool { return false }))
	if b := must(h.Allocated()); b < 50*small.extentSize {
		t.Errorf("%d bytes of disk space left", b)
	}
	// A larger cap does not make it forget.
	check(f.Close())
	f = createSmall(t, fsys, Options{Capacity: 60 * small.extentSize})
	if !f.keeps() {
		t.Error("not known to keep its blocks")
	}
}

// TestHolesNeedSpace: extents that gave their blocks back are counted as free only
// as far as the disk can back them again.
func TestHolesNeedSpace(t *testing.T) {
	fsys := crashfs.New(60 * 4096) // of 4 blocks each extent
	f := createSmall(t, fsys, Options{})
	a := must(f.Reserve(ctx, owner(1), storeA, 8*small.extentSize, page))
	b := must(f.Reserve(ctx, owner(2), storeA, small.extentSize, page))
	check(a.Release(ctx))
	other := must(fsys.Create("/other"))
	check(other.Allocate(0, 47*4096)) // of 52
	if got := must(f.Free(ctx)); got != small.extentSize {
		t.Errorf("%d bytes free, want one extent", got)
	}
	r := must(f.Reserve(ctx, owner(3), storeA, 8*small.extentSize, page))
	if len(r.extents) != 1 {
		t.Errorf("%d extents, want one", len(r.extents))
	}
	check(fill(r, r.Slots()))
	check(r.Sync())
	check(verify(f, owner(3), r.Extents(), r.Slots(), page))
	check(b.Close())
}

// TestLockEnds: the wait for the file's lock ends with its context, whether
// another process or this one has it.
func TestLockEnds(t *testing.T) {
	fsys := crashfs.New(0)
	f := createSmall(t, fsys, Options{})
	other := must(fsys.OpenRW("/nvram"))
	check(other.TryLock(vfs.Exclusive))
	why := errors.New("told to stop")
	short := func() context.Context {
		c, cancel := context.WithCancelCause(ctx)
		time.AfterFunc(30*time.Millisecond, func() { cancel(why) })
		return c
	}
	waits := map[string]func(context.Context) error{
		"Open":    func(c context.Context) error { _, err := open(c, fsys, "/nvram", Options{}, small); return err },
		"Reserve": func(c context.Context) error { _, err := f.Reserve(c, owner(1), storeA, 1, page); return err },
		"Free":    func(c context.Context) error { _, err := f.Free(c); return err },
		"Owners":  func(c context.Context) error { _, err := f.Owners(c, storeA); return err },
		"Check":   func(c context.Context) error { _, err := f.Check(c); return err },
		"Sweep":   func(c context.Context) error { _, err := f.Sweep(c, storeA, nil); return err },
		"FreeOwner": func(c context.Context) error {
			_, err := f.FreeOwner(c, owner(1))
			return err
		},
	}
	for name, wait := range waits {
		if err := wait(short()); !errors.Is(err, why) || !strings.Contains(err.Error(), "/nvram: waited") {
			t.Errorf("%s beside another process: %v", name, err)
		}
	}
	check(other.Unlock())
	f.turn <- struct{}{}
	for name, wait := range waits {
		if name == "Open" {
			continue
		}
		if err := wait(short()); !errors.Is(err, why) || !strings.Contains(err.Error(), "/nvram: waited") {
			t.Errorf("%s beside another goroutine: %v", name, err)
		}
	}
}

// TestNotAFile: what is no file and no block device is refused at once.
func TestNotAFile(t *testing.T) {
	path := filepath.Join(t.TempDir(), "fifo")
	check(syscall.Mkfifo(path, 0o600))
	for _, o := range []Options{{Create: true}, {ReadOnly: true}, {Create: true, Format: true}} {
		if _, err := Open(ctx, vfs.OS, path, o); !errors.Is(err, vfs.ErrNotRegular) {
			t.Errorf("%+v: %v", o, err)
		}
	}
}

func TestVolatile(t *testing.T) {
	fsys := crashfs.New(0)
	if createSmall(t, fsys, Options{}).Volatile() {
		t.Error("volatile")
	}
	fsys.SetVolatile(true)
	if !createSmall(t, fsys, Options{}).Volatile() {
		t.Error("not volatile on tmpfs")
	}
}

// TestFormattedAnew: somebody makes a new file in place of the one that is open.
func TestFormattedAnew(t *testing.T) {
	fsys := crashfs.New(0)
	f := createSmall(t, fsys, Options{})
	must(f.f.WriteAt(make([]byte, headerCopy+headerSize), 0))
	createSmall(t, fsys, Options{})
	_, err := f.Reserve(ctx, owner(1), storeA, 1, page)
	wantCorrupt(t, "Reserve", err, 0)
}

// TestReadErrors: an error of the medium while reading tables is passed on.
func TestReadErrors(t *testing.T) {
	for n := range 12 {
		fsys := crashfs.New(0)
		f := createSmall(t, fsys, Options{})
		r := must(f.Reserve(ctx, owner(1), storeA, 20*small.extentSize, page))
		fsys.FailReadAt(n, syscall.EIO)
		errs := []error{}
		_, err := f.Owners(ctx, uuid.Nil)
		errs = append(errs, err)
		_, err = f.Check(ctx)
		errs = append(errs, err)
		_, err = f.OpenRegion(owner(1), r.Extents(), page)
		errs = append(errs, err)
		if err := errors.Join(errs...); !errors.Is(err, syscall.EIO) {
			t.Errorf("read %d failed: %v", n, err)
		}
	}
}

// TestFailedWrite: after an error a region accepts nothing any more, and says so
// at Sync, even if the disk has recovered.
func TestFailedWrite(t *testing.T) {
	fsys := crashfs.New(0)
	f := createSmall(t, fsys, Options{})
	r := must(f.Reserve(ctx, owner(1), storeA, 2*small.extentSize, page))
	fsys.ShortWriteAt(0)
	if err := fill(r, smallSlots); !errors.Is(err, syscall.ENOSPC) {
		t.Fatalf("%v", err)
	}
	for _, err := range []error{r.Write(smallSlots, make([]byte, page)), r.Sync(), r.Sync()} {
		if !errors.Is(err, syscall.ENOSPC) {
			t.Errorf("after a failed write: %v", err)
		}
	}
	check(r.Release(ctx))
	if got := must(f.Owners(ctx, uuid.Nil)); len(got) != 0 {
		t.Errorf("%+v", got)
	}

	r = must(f.Reserve(ctx, owner(1), storeA, 2*small.extentSize, page))
	check(fill(r, r.Slots()))
	fsys.FailAt(0, syscall.EIO)
	for range 2 {
		if err := r.Sync(); !errors.Is(err, syscall.EIO) {
			t.Errorf("Sync: %v", err)
		}
	}
}

// TestWritesAreWholeExtents: pages written in address order, and in the order of
// a few heats at a time, must not become a system call a page.
func TestWritesAreWholeExtents(t *testing.T) {
	for _, fronts := range []int{1, 8} {
		fsys := crashfs.New(0)
		f := must(Open(ctx, fsys, "/nvram", Options{Create: true}))
		r := must(f.Reserve(ctx, owner(1), storeA, 32*ExtentSize, page))
		before := len(fsys.Ops())
		each := r.Slots() / fronts
		for i := range each {
			for front := range fronts {
				check(r.Write(front*each+i, content(owner(1), front*each+i, page)))
			}
		}
		if got := len(fsys.Ops()) - before; got != 32 {
			t.Errorf("%d fronts: %d writes of 32 extents", fronts, got)
		}
		check(r.Sync())
		check(verify(f, owner(1), r.Extents(), r.Slots(), page))
	}
}

// rss is the process's resident memory in bytes.
func rss() int64 {
	b := must(os.ReadFile("/proc/self/statm"))
	return must(strconv.ParseInt(strings.Fields(string(b))[1], 10, 64)) * int64(os.Getpagesize())
}

// TestMemory writes and reads 256 MiB; neither may come near that in memory.
func TestMemory(t *testing.T) {
	const size, limit = 256 << 20, 24 << 20
	f := must(Open(ctx, vfs.OS, filepath.Join(t.TempDir(), "nvram"), Options{Create: true}))
	defer f.Close()
	r := must(f.Reserve(ctx, owner(1), storeA, size, page))
	b := content(owner(1), 0, page)
	before := rss()
	peak := before
	for s := range r.Slots() {
		check(r.Write(s, b))
		if s%4096 == 0 {
			peak = max(peak, rss())
		}
	}
	check(r.Sync())
	if peak = max(peak, rss()); peak-before > limit {
		t.Errorf("writing took %d MiB", (peak-before)>>20)
	}
	check(r.Close())

	rr := must(f.OpenRegion(owner(1), r.Extents(), page))
	defer rr.Close()
	before = rss()
	peak = before
	for s := range rr.Slots() {
		if s%1024 == 0 {
			rr.DontNeed(s-1024, 1024)
			peak = max(peak, rss())
		}
		if !bytes.Equal(rr.Page(s), b) {
			t.Fatalf("slot %d", s)
		}
	}
	if peak-before > limit {
		t.Errorf("reading took %d MiB", (peak-before)>>20)
	}
}

// TestConcurrentWrites writes one region from several goroutines.
func TestConcurrentWrites(t *testing.T) {
	f := createSmall(t, crashfs.New(0), Options{})
	r := must(f.Reserve(ctx, owner(1), storeA, 60*small.extentSize, page))
	var wg sync.WaitGroup
	for g := range 6 {
		wg.Go(func() {
			for s := g; s < r.Slots(); s += 6 {
				if err := r.Write(s, content(owner(1), s, page)); err != nil {
					t.Error(err)
				}
				b := make([]byte, page)
				if err := r.ReadPage(s, b); err != nil || !bytes.Equal(b, content(owner(1), s, page)) {
					t.Errorf("slot %d: %v", s, err)
				}
			}
		})
	}
	wg.Wait()
	check(r.Sync())
	check(verify(f, owner(1), r.Extents(), r.Slots(), page))
}

func BenchmarkWrite(b *testing.B) {
	f := must(Open(ctx, vfs.OS, filepath.Join(b.TempDir(), "nvram"), Options{Create: true}))
	defer f.Close()
	buf := content(owner(1), 0, page)
	b.SetBytes(page)
	const slots = 64 << 10
	var r *Region
	for i := 0; b.Loop(); i++ {
		if i%slots == 0 {
			if r != nil {
				check(r.Sync())
				check(r.Release(ctx))
			}
			r = must(f.Reserve(ctx, uuid.New(), storeA, slots*page, page))
		}
		check(r.Write(i%slots, buf))
	}
}

// TestFreeSome gives back a part of what an owner has: the others are read as before, and
// what is needed of the part is missed.
func TestFreeSome(t *testing.T) {
	f := createSmall(t, crashfs.New(0), Options{Capacity: 60 * small.extentSize})
	defer f.Close()
	per := f.PerExtent(page)
	w := must(f.Reserve(ctx, owner(1), storeA, 6*small.extentSize, page))
	check(fill(w, w.Slots()))
	check(w.Sync())
	extents := w.Extents()
	check(w.Close())
	free := must(f.Free(ctx))
	gone := func(index int) bool { return index < 2 || index == 4 }
	owned, since, err := f.Owned(ctx, owner(1))
	if fmt.Sprint(owned) != "[0 1 2 3 4 5]" || err != nil {
		t.Errorf("owned: %v, %v", owned, err)
	}
	for _, another := range []time.Time{since.Add(-time.Second), since.Add(time.Second)} {
		if n := must(f.FreeSome(ctx, owner(1), another, gone)); n != 0 {
			t.Errorf("%d extents freed that are of another reservation", n)
		}
	}
	if n := must(f.FreeSome(ctx, owner(1), since, gone)); n != 3 {
		t.Errorf("%d extents freed", n)
	}
	if n := must(f.FreeSome(ctx, owner(1), since, gone)); n != 0 {
		t.Errorf("%d extents freed again", n)
	}
	if now := must(f.Free(ctx)); now != free+3*small.extentSize {
		t.Errorf("%d bytes free, were %d", now, free)
	}
	if owned, _, err := f.Owned(ctx, owner(1)); fmt.Sprint(owned) != "[2 3 5]" || err != nil {
		t.Errorf("owned: %v, %v", owned, err)
	}
	r := must(f.OpenSome(owner(1), extents, page, func(index int) bool { return index == 3 || index == 5 }))
	for _, slot := range []int{3 * per, 4*per - 1, 5 * per, 6*per - 1} {
		if !bytes.Equal(r.Page(slot), content(owner(1), slot, page)) {
			t.Errorf("slot %d", slot)
		}
	}
	r.DontNeed(3*per, per)
	check(r.Close())
	for _, need := range []func(int) bool{nil, gone, func(index int) bool { return index > 3 }} {
		if _, err := f.OpenSome(owner(1), extents, page, need); !integrity.IsCorrupt(err) {
			t.Errorf("what is not there is opened: %v", err)
		}
	}
	if n := must(f.FreeOwner(ctx, owner(1))); n != 3 {
		t.Errorf("%d extents freed in the end", n)
	}
	noDamage(t, f)
}
