package nvram

import (
	"bytes"
	"encoding/binary"
	"testing"
	"time"

	"github.com/google/uuid"

	"github.com/flic-migrate/flic-migrate/tier/integrity"
	"github.com/flic-migrate/flic-migrate/tier/vfs/crashfs"
)

// sample is a small file of two groups as the writer makes it.
func sample() []byte {
	fsys := crashfs.New(0)
	f := must(open(ctx, fsys, "/nvram", Options{Create: true, Capacity: 40 * small.extentSize}, small))
	f.h.id = uuid.MustParse("00112233-4455-6677-8899-aabbccddeeff") // the same in every run
	for range 2 {
		f.h.generation++
		must(f.f.WriteAt(f.h.encode(), f.h.copyOffset()))
	}
	for i, extents := range []int64{3, 12, 2} {
		r := must(f.Reserve(ctx, owner(i), storeA, extents*small.extentSize, page<<i))
		check(r.Write(0, content(owner(i), 0, page<<i)))
		check(r.Sync())
	}
	must(f.FreeOwner(ctx, owner(1)))
	b := make([]byte, must(f.f.Size()))
	must(f.f.ReadAt(b, 0))
	return b
}

// FuzzFile opens arbitrary files. The checksum of the first header is made
// right, or nearly nothing would get past it.
func FuzzFile(f *testing.F) {
	b := sample()
	f.Add(b[:headerSize], b[tableOffset:][:small.tableSize()], uint16(19), true)
	f.Add(b[headerCopy:][:headerSize], b[tableOffset:][:5*entrySize], uint16(2), true)
	f.Add(b[:headerSize], []byte{}, uint16(0), false)
	f.Add([]byte{}, []byte{1}, uint16(1), true)
	f.Fuzz(func(t *testing.T, head, table []byte, quarters uint16, fix bool) {
		h := make([]byte, headerSize)
		copy(h, head)
		if fix {
			binary.LittleEndian.PutUint32(h[60:], integrity.Checksum(h[:60]))
		}
		fsys := crashfs.New(64 << 20)
		w := must(fsys.Create("/nvram"))
		must(w.WriteAt(h, 0))
		must(w.WriteAt(table[:min(len(table), 64<<10)], tableOffset))
		check(w.Truncate(int64(quarters%256) * small.extentSize / 4))
		check(w.Close())

		file, err := open(ctx, fsys, "/nvram", Options{Create: true, Capacity: 1 << 20}, small)
		if err != nil {
			return
		}
		if _, err := file.Check(ctx); err != nil {
			t.Fatal(err)
		}
		foreign := map[uuid.UUID]int{}
		for _, o := range must(file.Owners(ctx, uuid.Nil)) {
			if o.Store != storeA {
				foreign[o.UUID] += o.Extents
			}
		}
		if r, err := file.OpenRegion(owner(0), []uint32{1, 2, 3}, page); err == nil {
			r.Guard(func() error {
				for s := range r.Slots() {
					bytes.Equal(r.Page(s), r.Page(0))
				}
				return nil
			})
			check(r.Close())
		}
		must(file.Free(ctx))
		// A fresh owner gets its pages back, whatever the tables say.
		id := uuid.New()
		r, err := file.Reserve(ctx, id, storeA, 5*small.extentSize, page)
		if err != nil {
			return // no room, or a table beyond the end
		}
		check(fill(r, r.Slots()))
		check(r.Sync())
		check(verify(file, id, r.Extents(), r.Slots(), page))
		check(r.Close())
		must(file.Sweep(ctx, storeA, func(uuid.UUID) bool { return false }))
		for _, o := range must(file.Owners(ctx, uuid.Nil)) {
			if o.Store == storeA {
				t.Errorf("%+v is left after Sweep", o)
			}
			foreign[o.UUID] -= o.Extents
		}
		for id, n := range foreign {
			if n != 0 {
				t.Errorf("%d extents of %v, of another store, are gone", n, id)
			}
		}
	})
}

// FuzzEntry: what the decoder believes, the encoder writes.
func FuzzEntry(f *testing.F) {
	h := header{geometry: small, id: uuid.MustParse("00112233-4455-6677-8899-aabbccddeeff")}
	b := make([]byte, entrySize)
	h.encodeEntry(b, 3, entry{storeA, storeB, 7, 4096, time.Unix(1700000000, 0)})
	f.Add(b, uint32(3), true)
	f.Add(make([]byte, entrySize), uint32(0), false)
	f.Fuzz(func(t *testing.T, b []byte, extent uint32, fix bool) {
		if len(b) < entrySize {
			return
		}
		b = b[:entrySize]
		if fix {
			binary.LittleEndian.PutUint32(b[60:], h.checksum(b, extent))
		}
		e, s := h.decodeEntry(b, extent)
		if s != taken {
			return
		}
		again := make([]byte, entrySize)
		h.encodeEntry(again, extent, e)
		if e2, s2 := h.decodeEntry(again, extent); s2 != taken || e2 != e {
			t.Errorf("%+v, %+v", e, e2)
		}
	})
}
