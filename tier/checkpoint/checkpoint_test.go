package checkpoint

import (
	"bytes"
	"encoding/json"
	"fmt"
	"strings"
	"testing"

	"github.com/flic-migrate/flic-migrate/tier/workingset"
)

// TestNVRAMPart reads back what was written, and refuses what can't be.
func TestNVRAMPart(t *testing.T) {
	pages := []uint64{10, 0, 3}
	part := &NVRAMPart{Extents: []uint32{1, 2, 1<<32 - 1}, Slots: []NVRAMSlot{{1, 0, 9}, {2, 2, 0}, {1<<32 - 1, 2, 2}}}
	stored := part.Append(nil)
	got, err := parseNVRAMPart(stored, pages)
	if err != nil || fmt.Sprint(got) != fmt.Sprint(part) {
		t.Errorf("%v, %v", got, err)
	}
	if empty, err := parseNVRAMPart((&NVRAMPart{}).Append(nil), nil); err != nil || len(empty.Extents)+len(empty.Slots) != 0 {
		t.Errorf("nothing: %v, %v", empty, err)
	}
	for n := range stored {
		if _, err := parseNVRAMPart(stored[:n], pages); err == nil {
			t.Errorf("cut to %d bytes of %d", n, len(stored))
		}
	}
	if _, err := parseNVRAMPart(append(bytes.Clone(stored), 0), pages); err == nil {
		t.Error("one byte more")
	}
	for _, s := range []NVRAMSlot{{Block: 0, Page: 10}, {Block: 1, Page: 0}, {Block: 3, Page: 0}, {Block: 1 << 31}, {Page: 1 << 63}} {
		if _, err := parseNVRAMPart((&NVRAMPart{Slots: []NVRAMSlot{s}}).Append(nil), pages); err == nil {
			t.Errorf("slot of %+v", s)
		}
	}
	// A length alone must not size an allocation.
	if n := testing.AllocsPerRun(1, func() { parseNVRAMPart([]byte{0xff, 0xff, 0xff, 0xff}, pages) }); n > 20 {
		t.Errorf("%v allocations", n)
	}
}

// TestMeta refuses documents that describe nothing that can be.
func TestMeta(t *testing.T) {
	gpa := uint64(1 << 32)
	good := Meta{VM: "vm", PageSize: 4096, Blocks: []Block{{Name: "a", Used: 4097, GPA: &gpa}, {Name: "b"}, {Name: "c", Used: 1 << 46}},
		PageTables: []workingset.PageRun{{Page: 1, Count: 1}, {Block: 2, Page: 1 << 30, Count: 1 << 20}},
		NVRAM:      &NVRAM{Path: "/n", Slots: 5}, Libvirt: &Libvirt{XML: "<domain/>"}}
	doc, err := json.Marshal(good)
	if err != nil {
		t.Fatal(err)
	}
	m, err := parseMeta(doc)
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
		"too many blocks":   func(m *Meta) { m.Blocks = make([]Block, MaxBlocks+1) },
		"block of no name":  func(m *Meta) { m.Blocks = []Block{{}} },
		"block of 256":      func(m *Meta) { m.Blocks = []Block{{Name: strings.Repeat("x", 256)}} },
		"huge block":        func(m *Meta) { m.Blocks = []Block{{Name: "a", Used: 1<<46 + 1}} },
		"negative in NVRAM": func(m *Meta) { m.NVRAM = &NVRAM{Slots: -1} },
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
		doc, err := json.Marshal(bad)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := parseMeta(doc); err == nil {
			t.Errorf("%s: accepted", name)
		}
	}
	if _, err := parseMeta([]byte("{")); err == nil {
		t.Error("no JSON")
	}
}

// FuzzNVRAMPart parses anything. What is accepted is written the same again.
func FuzzNVRAMPart(f *testing.F) {
	f.Add((&NVRAMPart{}).Append(nil))
	f.Add((&NVRAMPart{Extents: []uint32{1, 5}, Slots: []NVRAMSlot{{7, 0, 3}, {8, 1, 1}}}).Append(nil))
	f.Fuzz(func(t *testing.T, b []byte) {
		p, err := parseNVRAMPart(b, []uint64{300, 2})
		if err == nil && !bytes.Equal(p.Append(nil), b) {
			t.Error("written again it is another")
		}
	})
}

// FuzzMeta parses anything. Whatever is accepted can be used.
func FuzzMeta(f *testing.F) {
	doc, err := json.Marshal(Meta{VM: "vm", PageSize: 4096, Blocks: []Block{{Name: "pc.ram", Used: 1 << 30, PageSize: 2 << 20}},
		Capabilities: []string{"x-ignore-shared"}, NVRAM: &NVRAM{Path: "/dev/pmem0", Slots: 3}, Libvirt: &Libvirt{XML: "<domain/>", Cookie: "<cookie/>"}})
	if err != nil {
		f.Fatal(err)
	}
	f.Add(doc)
	f.Fuzz(func(t *testing.T, b []byte) {
		m, err := parseMeta(b)
		if err != nil {
			return
		}
		for i, n := range m.BlockPages() {
			if n*uint64(m.PageSize) < m.Blocks[i].Used {
				t.Errorf("%d pages of %d bytes for %d", n, m.PageSize, m.Blocks[i].Used)
			}
		}
		if _, err := json.Marshal(m); err != nil {
			t.Error(err)
		}
	})
}
