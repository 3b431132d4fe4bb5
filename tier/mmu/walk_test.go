package mmu

import (
	"context"
	"encoding/binary"
	"errors"
	"math/rand/v2"
	"slices"
	"testing"
)

// ram is a guest's memory for tests, of which tables are given out from the
// bottom.
type ram struct {
	bytes []byte
	used  uint64
}

func (r *ram) read(gpa uint64, buf []byte) (bool, error) {
	if gpa > uint64(len(r.bytes)) || uint64(len(buf)) > uint64(len(r.bytes))-gpa {
		return false, nil
	}
	copy(buf, r.bytes[gpa:])
	return true, nil
}

func (r *ram) table(granule int) uint64 {
	size := uint64(1) << granule
	at := (r.used + size - 1) &^ (size - 1)
	r.used = at + size
	return at
}

// mapping is a page or block to be found again.
type mapping struct{ va, pa, size uint64 }

// put maps m, with as many tables as it takes, and adds the new ones to list.
func (r *ram) put(s *Space, m mapping, list *[]uint64) {
	at := s.Root
	for level := s.Levels; ; level-- {
		shift := s.Granule + (level-1)*s.index()
		n := s.index()
		if level == s.Levels {
			n = s.TopBits
		}
		slot := r.bytes[at+8*(m.va>>shift&(1<<n-1)):]
		le := binary.LittleEndian
		// Attribute bits of all kinds surround the address.
		attributes := uint64(1)<<63 | 0xe00 | 0x60
		if s.arm {
			attributes = uint64(1)<<54 | 0x700
		}
		if m.size == 1<<shift {
			e := m.pa | attributes | 1
			switch {
			case s.arm && level == 1:
				e |= 2
			case !s.arm && level > 1:
				e |= 1<<7 | 1<<12 // PAT is within a large page's address
			}
			le.PutUint64(slot, e)
			return
		}
		if le.Uint64(slot) == 0 {
			next := r.table(s.Granule)
			*list = append(*list, next)
			e := next | attributes&^0x80 | 1
			if s.arm {
				e |= 2
			}
			le.PutUint64(slot, e)
		}
		at = le.Uint64(slot) & (1<<48 - 1) &^ (1<<s.Granule - 1)
	}
}

func (r *ram) walker(tables *[]uint64, leaves *[]mapping) *Walker {
	return &Walker{
		Read: r.read, Max: 1 << 16,
		Table: func(gpa uint64, size int) error { *tables = append(*tables, gpa); return nil },
		Leaf:  func(va, pa, size uint64) { *leaves = append(*leaves, mapping{va, pa, size}) },
	}
}

// spaces of all the forms that are known.
func forms() map[string]Space {
	m := map[string]Space{
		"x86-64, 4 levels": {Levels: 4, Granule: 12, TopBits: 9},
		"x86-64, 5 levels": {Levels: 5, Granule: 12, TopBits: 9},
	}
	for name, h := range map[string]armHalf{
		"aarch64, 4 KiB, 48 bits":                  {tsz: 16, granule: 12},
		"aarch64, 4 KiB, 48 bits, upper":           {tsz: 16, granule: 12, base: ^uint64(0)},
		"aarch64, 4 KiB, 39 bits, upper":           {tsz: 25, granule: 12, base: ^uint64(0)},
		"aarch64, 4 KiB, 36 bits":                  {tsz: 28, granule: 12},
		"aarch64, 4 KiB, 52 bits":                  {tsz: 12, granule: 12},
		"aarch64, 16 KiB, 48 bits, two at the top": {tsz: 16, granule: 14},
		"aarch64, 16 KiB, 47 bits, upper":          {tsz: 17, granule: 14, base: ^uint64(0)},
		"aarch64, 64 KiB, 48 bits":                 {tsz: 16, granule: 16},
		"aarch64, 64 KiB, 42 bits, upper":          {tsz: 22, granule: 16, base: ^uint64(0)},
		"aarch64, 64 KiB, 52 bits":                 {tsz: 12, granule: 16},
	} {
		s, ok := h.space(0)
		if !ok {
			panic(name)
		}
		m[name] = s
	}
	return m
}

// Every table and every mapping that was made is found, once, with its address.
func TestWalk(t *testing.T) {
	for name, s := range forms() {
		r := rand.New(rand.NewPCG(1, uint64(len(name))))
		mem := &ram{bytes: make([]byte, 64<<20), used: 1 << 20}
		s.Root = mem.table(s.Granule)
		tables := []uint64{s.Root}
		var want []mapping
		va := s.Granule + (s.Levels-1)*s.index() + s.TopBits
		taken := map[uint64]bool{}
		for range 200 {
			level := 1
			if r.IntN(4) == 0 {
				level = 1 + r.IntN(min(3, s.Levels)) // a block
			}
			if s.Granule != 12 && level == 3 {
				level = 2 // no such blocks
			}
			shift := s.Granule + (level-1)*s.index()
			m := mapping{va: r.Uint64() & (1<<va - 1) &^ (1<<shift - 1), size: 1 << shift}
			m.pa = r.Uint64() & (1<<47 - 1) &^ (1<<shift - 1)
			// Blocks and pages must not meet: each has a top entry of its own.
			top := m.va >> (va - min(s.TopBits, 6))
			if s.TopBits > 3 && taken[top] {
				continue
			} else if s.TopBits <= 3 && level != 1 {
				continue
			}
			taken[top] = true
			mem.put(&s, m, &tables)
			m.va |= s.Base
			if !s.arm && m.va>>(va-1) != 0 {
				m.va |= ^uint64(0) << va
			}
			want = append(want, m)
		}
		var gotTables []uint64
		var got []mapping
		if err := mem.walker(&gotTables, &got).Walk(t.Context(), []Space{s}); err != nil {
			t.Fatalf("%s: %v", name, err)
		}
		if gotTables[0] != s.Root {
			t.Errorf("%s: the top table is not the first", name)
		}
		slices.Sort(gotTables)
		slices.Sort(tables)
		if !slices.Equal(gotTables, tables) {
			t.Errorf("%s: %d tables, %d were made", name, len(gotTables), len(tables))
		}
		// Without Leaf the same are found, and none of the lowest level is read.
		read, lowest := 0, 0
		var again []uint64
		w := mem.walker(&again, nil)
		w.Leaf = nil
		w.Read = func(gpa uint64, buf []byte) (bool, error) { read++; return mem.read(gpa, buf) }
		for _, m := range want {
			if m.size == 1<<s.Granule {
				lowest++ // at most one for each, and at least one
			}
		}
		err := w.Walk(t.Context(), []Space{s})
		slices.Sort(again)
		if err != nil || !slices.Equal(again, tables) || read >= len(tables) || s.Levels > 1 && read < len(tables)-lowest {
			t.Errorf("%s: %d tables, %d of %d were read, %v", name, len(again), read, len(tables), err)
		}
		order := func(a, b mapping) int {
			if a.va < b.va {
				return -1
			}
			return 1
		}
		slices.SortFunc(got, order)
		slices.SortFunc(want, order)
		if !slices.Equal(got, want) || len(want) < 10 {
			t.Errorf("%s: mappings\n got %x\nwant %x", name, got, want)
		}
	}
}

// Two vCPUs with a kernel in common share its tables.
func TestWalkShared(t *testing.T) {
	mem := &ram{bytes: make([]byte, 1<<20)}
	a := Space{Root: mem.table(12), Levels: 4, Granule: 12, TopBits: 9}
	var tables []uint64
	mem.put(&a, mapping{0xffff_8000_0000_0000 & (1<<48 - 1), 0x5000, 4096}, &tables)
	b := a
	b.CPU, b.Root = 1, mem.table(12)
	copy(mem.bytes[b.Root+2048:b.Root+4096], mem.bytes[a.Root+2048:])
	mem.put(&b, mapping{0x1000, 0x6000, 4096}, &tables)
	same := a
	same.CPU = 2
	var got []uint64
	var leaves []mapping
	if err := mem.walker(&got, &leaves).Walk(t.Context(), []Space{a, b, same}); err != nil {
		t.Fatal(err)
	}
	want := append([]uint64{a.Root, b.Root}, tables...)
	slices.Sort(got)
	slices.Sort(want)
	if !slices.Equal(got, want) || len(leaves) != 2 {
		t.Errorf("tables %x, want %x; %x", got, want, leaves)
	}
}

// Tables that no guest should have.
func TestWalkHostile(t *testing.T) {
	s := Space{Levels: 4, Granule: 12, TopBits: 9}
	mem := &ram{bytes: make([]byte, 1<<20)}
	// Every entry of the top table names the table itself.
	for i := range 512 {
		binary.LittleEndian.PutUint64(mem.bytes[8*i:], 1)
	}
	var tables []uint64
	var leaves []mapping
	if err := mem.walker(&tables, &leaves).Walk(t.Context(), []Space{s}); err != nil || len(tables) != 1 {
		t.Errorf("%x, %v", tables, err)
	}
	// All of memory is tables that name each other, and what is no RAM.
	for i := 0; i < len(mem.bytes); i += 8 {
		binary.LittleEndian.PutUint64(mem.bytes[i:], uint64(i)*512|1)
	}
	tables = nil
	w := mem.walker(&tables, &leaves)
	w.Max = 100
	if err := w.Walk(t.Context(), []Space{s}); !errors.Is(err, ErrTooMany) || len(tables) > 100 {
		t.Errorf("%d tables, %v", len(tables), err)
	}
	// The root is nowhere.
	tables = nil
	s.Root = 1 << 40
	if err := mem.walker(&tables, &leaves).Walk(t.Context(), []Space{s}); err != nil || len(tables) != 0 {
		t.Errorf("%x, %v", tables, err)
	}
	for _, bad := range []Space{{}, {Levels: 6, Granule: 12}, {Levels: 4, Granule: 17}, {Levels: 4, Granule: 12, TopBits: 10}, {Levels: 4, Granule: 3}} {
		if err := mem.walker(&tables, &leaves).Walk(t.Context(), []Space{bad}); err == nil {
			t.Errorf("%+v was walked", bad)
		}
	}
}

func TestWalkErrors(t *testing.T) {
	s := Space{Levels: 4, Granule: 12, TopBits: 9}
	mem := &ram{bytes: make([]byte, 1<<16)}
	binary.LittleEndian.PutUint64(mem.bytes, 0x1001)
	boom := errors.New("boom")
	w := mem.walker(new([]uint64), new([]mapping))
	w.Read = func(gpa uint64, buf []byte) (bool, error) {
		if gpa == 0x1000 {
			return false, boom
		}
		return mem.read(gpa, buf)
	}
	if err := w.Walk(t.Context(), []Space{s}); !errors.Is(err, boom) {
		t.Errorf("a read that fails: %v", err)
	}
	w.Read = mem.read
	w.Table = func(uint64, int) error { return boom }
	if err := w.Walk(t.Context(), []Space{s}); !errors.Is(err, boom) {
		t.Errorf("a visit that fails: %v", err)
	}
	ctx, cancel := context.WithCancelCause(t.Context())
	cancel(boom)
	if err := w.Walk(ctx, []Space{s}); !errors.Is(err, boom) {
		t.Errorf("cancelled: %v", err)
	}
}

// What no register can say is refused, before an address is computed from it.
func TestImpossibleSpaces(t *testing.T) {
	for _, s := range []Space{
		{Levels: 0, Granule: 12, TopBits: 9}, {Levels: 6, Granule: 12, TopBits: 9},
		{Levels: 4, Granule: 11, TopBits: 8}, {Levels: 4, Granule: 17, TopBits: 9},
		{Levels: 4, Granule: 12, TopBits: 10}, {Levels: 4, Granule: 12, TopBits: -1},
		{Levels: 5, Granule: 16, TopBits: 4, arm: true}, {Levels: 4, Granule: 16, TopBits: 13, arm: true},
	} {
		w := &Walker{Max: 10, Read: func(uint64, []byte) (bool, error) {
			t.Errorf("%+v is walked", s)
			return false, nil
		}}
		if err := w.Walk(t.Context(), []Space{s}); err == nil {
			t.Errorf("%+v is possible", s)
		}
	}
}

// Whatever is in memory, a walk ends, visits no table twice and none outside.
func FuzzWalk(f *testing.F) {
	for name, s := range forms() {
		mem := &ram{bytes: make([]byte, 1<<18)}
		s.Root = mem.table(s.Granule)
		var tables []uint64
		if s.Granule == 12 {
			mem.put(&s, mapping{0x12345 << 12, 0x5000, 4096}, &tables)
			mem.put(&s, mapping{0x12346 << 12, 0x6000, 4096}, &tables)
			f.Add(mem.bytes[:mem.used], uint16(s.Root>>12), uint8(s.Granule), uint8(s.Levels), uint8(s.TopBits), len(name) > 20)
		}
	}
	// More bits of address than there are.
	f.Add(append([]byte{0x61}, make([]byte, 4095)...), uint16(0), uint8(16), uint8(5), uint8(4), true)
	f.Fuzz(func(t *testing.T, bytes []byte, root uint16, granule, levels, top uint8, arm bool) {
		if len(bytes) > 1<<20 {
			return
		}
		mem := &ram{bytes: bytes}
		s := Space{Root: uint64(root) << 12, Levels: int(levels), Granule: int(granule), TopBits: int(top), arm: arm}
		seen := map[uint64]bool{}
		w := &Walker{Read: mem.read, Max: 64, Leaf: func(_, _, size uint64) {
			if size < 4096 {
				t.Fatalf("page of %d", size)
			}
		}}
		w.Table = func(gpa uint64, size int) error {
			if seen[gpa] || gpa+uint64(size) > uint64(len(bytes)) || len(seen) == 64 {
				t.Fatalf("table %#x of %d, %d seen", gpa, size, len(seen))
			}
			seen[gpa] = true
			return nil
		}
		_ = w.Walk(t.Context(), []Space{s, s})
	})
}
