package checkpoint

import (
	"bytes"
	"fmt"
	"os"
	"reflect"
	"runtime/metrics"
	"strings"
	"testing"
	"time"

	"github.com/google/uuid"

	"github.com/flic-migrate/flic-migrate/ramparse"
	"github.com/flic-migrate/flic-migrate/tier/image"
	"github.com/flic-migrate/flic-migrate/tier/integrity"
	"github.com/flic-migrate/flic-migrate/tier/pagemap"
	"github.com/flic-migrate/flic-migrate/tier/vfs/crashfs"
	"github.com/flic-migrate/flic-migrate/tier/workingset"
)

// TestNVRAMPart reads back what was written, and refuses what can't be.
func TestNVRAMPart(t *testing.T) {
	pages := []uint64{10, 0, 3}
	part := &NVRAMPart{Extents: []uint32{1, 2, 1<<32 - 1}, Slots: []NVRAMSlot{{1, 0, 9}, {2, 2, 0}, {1<<32 - 1, 2, 2}}}
	stored := part.Append(nil)
	got, err := parseNVRAMPart(stored)
	if err != nil || fmt.Sprint(got) != fmt.Sprint(part) || got.check(pages) != nil {
		t.Errorf("%v, %v", got, err)
	}
	if empty, err := parseNVRAMPart((&NVRAMPart{}).Append(nil)); err != nil || len(empty.Extents)+len(empty.Slots) != 0 {
		t.Errorf("nothing: %v, %v", empty, err)
	}
	for n := range stored {
		if _, err := parseNVRAMPart(stored[:n]); err == nil {
			t.Errorf("cut to %d bytes of %d", n, len(stored))
		}
	}
	if _, err := parseNVRAMPart(append(bytes.Clone(stored), 0)); err == nil {
		t.Error("one byte more")
	}
	for _, at := range []int{0, 12, 15} {
		bad := bytes.Clone(stored)
		bad[at] += 2
		if _, err := parseNVRAMPart(bad); err == nil || !strings.Contains(err.Error(), "version") {
			t.Errorf("reserved byte %d: %v", at, err)
		}
	}
	for _, s := range []NVRAMSlot{{Block: 0, Page: 10}, {Block: 1, Page: 0}, {Block: 3, Page: 0}, {Block: 1 << 31}, {Page: 1 << 63}} {
		if p, err := parseNVRAMPart((&NVRAMPart{Slots: []NVRAMSlot{s}}).Append(nil)); err != nil || p.check(pages) == nil {
			t.Errorf("slot of %+v", s)
		}
	}
	// A length alone must not size an allocation.
	if n := testing.AllocsPerRun(1, func() {
		parseNVRAMPart([]byte{1, 0, 0, 0, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0, 0, 0, 0})
	}); n > 20 {
		t.Errorf("%v allocations", n)
	}
}

// TestMeta refuses documents that describe nothing that can be.
func TestMeta(t *testing.T) {
	gpa := uint64(1 << 32)
	good := Meta{Identity{VM: "vm", PageSize: 4096, NVRAM: &NVRAM{Path: "/n", Slots: 5, Bytes: 5 << 12}}, Bulk{Blocks: []ramparse.Block{{Name: "a", Used: 4097, GPA: &gpa}, {Name: "b"}, {Name: "c", Used: 1 << 46}},
		PageTables: []workingset.PageRun{{Page: 1, Count: 1}, {Block: 2, Page: 1 << 30, Count: 1 << 20}},
		Libvirt:    &Libvirt{XML: "<domain/>"}}}
	meta, identity, err := good.Documents()
	if err != nil {
		t.Fatal(err)
	}
	if len(identity) > 1000 || !bytes.Contains(meta, []byte("<domain/>")) {
		t.Errorf("IDENTITY %s, META %s", identity, meta)
	}
	m, err := parseMeta(meta, identity)
	if err != nil {
		t.Fatal(err)
	}
	if got := m.BlockPages(); got[0] != 2 || got[1] != 0 || got[2] != 1<<34 {
		t.Errorf("pages of the blocks: %v", got)
	}
	for name, change := range map[string]func(m *Meta){
		"no page size":      func(m *Meta) { m.PageSize = 0 },
		"negative":          func(m *Meta) { m.PageSize = -4096 },
		"odd page size":     func(m *Meta) { m.PageSize = 4095 },
		"too many blocks":   func(m *Meta) { m.Blocks = make([]ramparse.Block, MaxBlocks+1) },
		"block of no name":  func(m *Meta) { m.Blocks = []ramparse.Block{{}} },
		"block of 256":      func(m *Meta) { m.Blocks = []ramparse.Block{{Name: strings.Repeat("x", 256)}} },
		"huge block":        func(m *Meta) { m.Blocks = []ramparse.Block{{Name: "a", Used: 1<<46 + 1}} },
		"negative in NVRAM": func(m *Meta) { m.NVRAM = &NVRAM{Slots: -1, Bytes: -4096} },
		"bytes in NVRAM":    func(m *Meta) { m.NVRAM = &NVRAM{Slots: 2, Bytes: 4096} },
		"huge page size":    func(m *Meta) { m.PageSize = 1 << 17 },
		"many table runs":   func(m *Meta) { m.PageTables = make([]workingset.PageRun, MaxTableRuns+1) },
		"many capabilities": func(m *Meta) { m.Capabilities = make([]string, maxNames+1) },
		"many chunks":       func(m *Meta) { m.MapChunks = make([]pagemap.Start, maxMapChunks+1) },
		"many references":   func(m *Meta) { m.References = make([]uuid.UUID, maxRefs+1) },
		"many bases":        func(m *Meta) { m.Bases = make([]pagemap.Start, maxMapChunks+1) },
		"tables nowhere":    func(m *Meta) { m.PageTables = []workingset.PageRun{{Block: 3, Count: 1}} },
		"tables before":     func(m *Meta) { m.PageTables = []workingset.PageRun{{Block: -1, Count: 1}} },
		"tables behind":     func(m *Meta) { m.PageTables = []workingset.PageRun{{Page: 1, Count: 2}} },
		"tables overflow":   func(m *Meta) { m.PageTables = []workingset.PageRun{{Page: 1, Count: 1<<64 - 1}} },
		"table in no page":  func(m *Meta) { m.PageTables = []workingset.PageRun{{Block: 1}} },
		"too many tables": func(m *Meta) {
			m.Blocks = m.Blocks[:1]
			m.PageTables = []workingset.PageRun{{Count: 2}, {Page: 1, Count: 1}}
		},
		"no domain":   func(m *Meta) { m.Libvirt = &Libvirt{Cookie: "<cookie/>"} },
		"huge domain": func(m *Meta) { m.Libvirt = &Libvirt{XML: strings.Repeat("x", MaxLibvirt+1)} },
		"huge cookie": func(m *Meta) { m.Libvirt = &Libvirt{XML: "x", Cookie: strings.Repeat("x", MaxLibvirt+1)} },
	} {
		bad := good
		change(&bad)
		if _, _, err := bad.Documents(); err == nil {
			t.Errorf("%s: written", name)
		}
		meta, err := encode(bad.Bulk)
		if err != nil {
			t.Fatal(err)
		}
		identity, err := encode(bad.Identity)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := parseMeta(meta, identity); err == nil {
			t.Errorf("%s: accepted", name)
		}
	}
	for _, digests := range []string{`{"key":"00"}`, `{"root":7}`, `{"key":"` + strings.Repeat("g", 64) + `"}`, `{"root":"` + strings.Repeat("0", 66) + `"}`} {
		if _, err := parseIdentity([]byte(`{"page_size":4096,"digests":` + digests + `}`)); err == nil {
			t.Errorf("digests %s", digests)
		}
	}
	for _, doc := range []string{"{", `{"blocks":{}}`, `{"blocks":[`, `{"blocks":7}`, `{"ram_bytes":1}`} {
		if _, err := parseMeta([]byte(doc), identity); err == nil {
			t.Errorf("META %s", doc)
		}
		if _, err := parseMeta(meta, []byte(doc)); err == nil {
			t.Errorf("IDENTITY %s", doc)
		}
	}
	// Another RAM than IDENTITY's.
	if _, err := parseMeta([]byte(`{"blocks":[{"name":"a","used":1}],"table":null}`), identity); err == nil {
		t.Error("RAM of another size")
	}
	// More sections than there are names for are no reason to lose a save.
	good.Foreign = make([]string, maxNames+1)
	if _, _, err := good.Documents(); err != nil || len(good.Foreign) != maxNames {
		t.Errorf("%d foreign sections: %v", len(good.Foreign), err)
	}
}

// TestDocs: docs/format.md has every field of both documents, but for the report's,
// which are a command's.
func TestDocs(t *testing.T) {
	doc, err := os.ReadFile("../../docs/format.md")
	if err != nil {
		t.Fatal(err)
	}
	seen := 0
	var fields func(ty reflect.Type, path string)
	fields = func(ty reflect.Type, path string) {
		for ty.Kind() == reflect.Pointer || ty.Kind() == reflect.Slice {
			ty = ty.Elem()
		}
		if ty.Kind() != reflect.Struct || ty == reflect.TypeFor[time.Time]() || ty == reflect.TypeFor[Report]() {
			return
		}
		for f := range ty.Fields() {
			name, _, _ := strings.Cut(f.Tag.Get("json"), ",")
			if f.Anonymous {
				fields(f.Type, path)
				continue
			}
			if seen++; !bytes.Contains(doc, []byte("`"+path+name+"`")) {
				t.Errorf("docs/format.md lacks %s", path+name)
			}
			fields(f.Type, path+name+".")
		}
	}
	fields(reflect.TypeFor[Meta](), "")
	if seen < 35 {
		t.Errorf("only %d fields were looked for", seen)
	}
}

// TestMetaMemory reads descriptions as long as they may be, made to take as much
// memory as can be, from an image of some hundred KB. IDENTITY takes next to none.
func TestMetaMemory(t *testing.T) {
	for list, element := range map[string]string{"blocks": "{},", "capabilities": `"",`, "table": "{},"} {
		n := (image.MaxMeta - 100) / len(element)
		meta := []byte(`{"` + list + `":[` + strings.Repeat(element, n) + element[:2] + "]}")
		f, err := crashfs.New(0).Create("/image")
		if err != nil {
			t.Fatal(err)
		}
		defer f.Close()
		id := uuid.New()
		w, err := image.NewWriter(f, image.Header{PageSize: 4096, SegmentPages: 32, UUID: id}, image.MinLZ, 1)
		if err != nil {
			t.Fatal(err)
		}
		if err := w.Finish(meta, []byte(`{"vm":"vm","page_size":4096,"uuid":"`+id.String()+`"}`)); err != nil {
			t.Fatal(err)
		}
		if size, _ := f.Size(); size > 2<<20 {
			t.Fatalf("the image has %d bytes", size)
		}
		took := allocated(func() {
			if id, err := ReadIdentity(f); err != nil || id.VM != "vm" {
				t.Errorf("%s: IDENTITY: %v", list, err)
			}
		})
		if took > 64<<10 {
			t.Errorf("%s: IDENTITY took %d bytes", list, took)
		}
		took = allocated(func() {
			if _, err := ReadMeta(f); !integrity.IsCorrupt(err) {
				t.Errorf("%s: %v", list, err)
			}
		})
		if took > 80<<20 { // all in all, most of it given back at once
			t.Errorf("%s: META took %d bytes", list, took)
		}
	}
}

// allocated is how many bytes fn allocates, freed or not.
func allocated(fn func()) uint64 {
	s := []metrics.Sample{{Name: "/gc/heap/allocs:bytes"}}
	metrics.Read(s)
	before := s[0].Value.Uint64()
	fn()
	metrics.Read(s)
	return s[0].Value.Uint64() - before
}

// FuzzNVRAMPart parses anything. What is accepted is written the same again.
func FuzzNVRAMPart(f *testing.F) {
	f.Add((&NVRAMPart{}).Append(nil))
	f.Add((&NVRAMPart{Extents: []uint32{1, 5}, Slots: []NVRAMSlot{{7, 0, 3}, {8, 1, 1}}}).Append(nil))
	f.Fuzz(func(t *testing.T, b []byte) {
		p, err := parseNVRAMPart(b)
		if err == nil && !bytes.Equal(p.Append(nil), b) {
			t.Error("written again it is another")
		}
	})
}

// FuzzMeta parses anything. Whatever is accepted can be used, and written again.
func FuzzMeta(f *testing.F) {
	m := Meta{Identity{VM: "vm", PageSize: 4096, NVRAM: &NVRAM{Path: "/dev/pmem0", Slots: 3, Bytes: 3 << 12}, References: []uuid.UUID{{1}}},
		Bulk{Blocks: []ramparse.Block{{Name: "pc.ram", Used: 1 << 30, PageSize: 2 << 20}}, Capabilities: []string{"x-ignore-shared"},
			Libvirt: &Libvirt{XML: "<domain/>", Cookie: "<cookie/>"}}}
	meta, identity, err := m.Documents()
	if err != nil {
		f.Fatal(err)
	}
	f.Add(meta, identity)
	f.Fuzz(func(t *testing.T, meta, identity []byte) {
		m, err := parseMeta(meta, identity)
		if err != nil {
			return
		}
		for i, n := range m.BlockPages() {
			if n*uint64(m.PageSize) < m.Blocks[i].Used {
				t.Errorf("%d pages of %d bytes for %d", n, m.PageSize, m.Blocks[i].Used)
			}
		}
		if _, _, err := m.Documents(); err != nil {
			t.Error(err)
		}
	})
}
