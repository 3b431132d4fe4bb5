package sums

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"
	"testing"

	"github.com/google/uuid"

	"github.com/flic-migrate/flic-migrate/tier/integrity"
)

// memory is an image in memory, whose blocks of zeros are holes if sparse says so.
type memory struct {
	b      []byte
	sparse bool
	bad    int64 // offset of a block that can't be read; 0: none
	reads  int
}

var errMedium = errors.New("input/output error")

func (m *memory) Size() (int64, error) { return int64(len(m.b)), nil }

func (m *memory) ReadAt(p []byte, off int64) (int, error) {
	m.reads++
	if m.bad != 0 && off == m.bad {
		return 0, errMedium
	}
	n := copy(p, m.b[off:])
	if n < len(p) {
		return n, io.EOF
	}
	return n, nil
}

// Data says where the first byte is that is not zero, which may be within a block.
func (m *memory) Data(off int64) (int64, error) {
	if !m.sparse {
		return off, nil
	}
	for ; off < int64(len(m.b)); off++ {
		if m.b[off] != 0 {
			return off, nil
		}
	}
	return 0, io.EOF
}

// disk is an image of so many blocks and a half, of which every third is zero.
func disk(blocks int) *memory {
	m := &memory{b: make([]byte, blocks*BlockSize+BlockSize/2)}
	for i := range blocks + 1 {
		if i%3 != 1 {
			binary.LittleEndian.PutUint64(m.b[i*BlockSize+4096:], uint64(i)+1)
		}
	}
	return m
}

var id = uuid.MustParse("6a1f7c1e-8d55-4a4b-9a61-0f2c5d7f3b11")

func digests(t *testing.T, m *memory) []byte {
	t.Helper()
	file, _, err := Make(t.Context(), m, id)
	if err != nil {
		t.Fatal(err)
	}
	return file
}

// differ returns what Check finds, and its error.
func differ(t *testing.T, file []byte, m *memory) (found []string, err error) {
	t.Helper()
	d, err := Open(bytes.NewReader(file), int64(len(file)), "digests", id)
	if err != nil {
		return nil, err
	}
	_, err = d.Check(t.Context(), m, "disk", func(err error) error {
		var c *integrity.CorruptError
		if !errors.As(err, &c) || c.File != "disk" {
			t.Errorf("found %v", err)
		}
		found = append(found, fmt.Sprintf("%d: %v", c.Offset, c.Err))
		return nil
	}, nil)
	return found, err
}

// TestCheck: an image is what it was, with holes or without, or each block is named that is
// not.
func TestCheck(t *testing.T) {
	for _, blocks := range []int{0, 1, 5, 160} { // which is more than one leaf has
		m := disk(blocks)
		file := digests(t, m)
		for _, sparse := range []bool{false, true} {
			same := &memory{b: m.b, sparse: sparse}
			if found, err := differ(t, file, same); err != nil || len(found) > 0 {
				t.Errorf("%d blocks: %v, %v", blocks, found, err)
			}
			if sparse && same.reads > blocks+1-(blocks+1)/3 {
				t.Errorf("%d blocks: %d reads, and a third of it are holes", blocks, same.reads)
			}
			if !bytes.Equal(digests(t, same), file) {
				t.Errorf("%d blocks: the digests depend on holes", blocks)
			}
		}
	}
	const last = 5 * BlockSize
	for name, c := range map[string]struct {
		change func(m *memory)
		want   []string
	}{
		"a bit":     {func(m *memory) { m.b[3*BlockSize+70000] ^= 4 }, []string{"3145728: digest mismatch"}},
		"the last":  {func(m *memory) { m.b[len(m.b)-1] ^= 1 }, []string{fmt.Sprintf("%d: digest mismatch", last)}},
		"zeros":     {func(m *memory) { clear(m.b[2*BlockSize : 4*BlockSize]) }, []string{"2097152: " + ErrZero.Error(), "3145728: " + ErrZero.Error()}},
		"all zeros": {func(m *memory) { clear(m.b) }, []string{"0: " + ErrZero.Error(), "2097152: " + ErrZero.Error(), "3145728: " + ErrZero.Error(), "5242880: " + ErrZero.Error()}},
		"not zero":  {func(m *memory) { m.b[4*BlockSize+5] = 1 }, []string{"4194304: " + ErrNotZero.Error()}},
		"exchanged": {func(m *memory) {
			a := slices.Clone(m.b[2*BlockSize : 3*BlockSize])
			copy(m.b[2*BlockSize:], m.b[3*BlockSize:4*BlockSize])
			copy(m.b[3*BlockSize:], a)
		}, []string{"2097152: digest mismatch", "3145728: digest mismatch"}},
		"moved": {func(m *memory) {
			copy(m.b[4*BlockSize:5*BlockSize], m.b[3*BlockSize:4*BlockSize])
			clear(m.b[3*BlockSize : 4*BlockSize])
		}, []string{"3145728: " + ErrZero.Error(), "4194304: " + ErrNotZero.Error()}},
		"longer":  {func(m *memory) { m.b = append(m.b, 0) }, []string{"0: it has 5767169 bytes, and had 5767168"}},
		"shorter": {func(m *memory) { m.b = m.b[:last] }, []string{"0: it has 5242880 bytes, and had 5767168"}},
	} {
		for _, sparse := range []bool{false, true} {
			m := disk(5)
			file := digests(t, m)
			m.sparse = sparse
			c.change(m)
			if found, err := differ(t, file, m); err != nil || !slices.Equal(found, c.want) {
				t.Errorf("%s: %q, %v", name, found, err)
			}
		}
	}
	m := disk(5)
	file := digests(t, m)
	m.bad = 3 * BlockSize
	if _, err := differ(t, file, m); !integrity.IsCorrupt(err) || !errors.Is(err, errMedium) || !strings.Contains(err.Error(), "offset 3145728") {
		t.Errorf("a block that can't be read: %v", err)
	}
	if _, _, err := Make(t.Context(), m, id); !errors.Is(err, errMedium) {
		t.Errorf("a block that can't be read: %v", err)
	}
}

// TestCheckEnds: Check ends with what found, each or the context says, and each is given all
// that is not zero.
func TestCheckEnds(t *testing.T) {
	m := disk(5)
	file := digests(t, m)
	d, err := Open(bytes.NewReader(file), int64(len(file)), "digests", id)
	if err != nil {
		t.Fatal(err)
	}
	copied := make([]byte, len(m.b))
	none := func(err error) error { return err }
	// Twice, as one can be used for several.
	for range 2 {
		clear(copied)
		read, err := d.Check(t.Context(), m, "disk", none, func(off int64, b []byte) error { copy(copied[off:], b); return nil })
		if err != nil || !bytes.Equal(copied, m.b) || read != int64(len(m.b)) {
			t.Errorf("%d bytes read, %v", read, err)
		}
	}
	full := errors.New("no space")
	if _, err := d.Check(t.Context(), m, "disk", none, func(int64, []byte) error { return full }); !errors.Is(err, full) {
		t.Error(err)
	}
	m.b[2*BlockSize] ^= 1
	got := 0
	if _, err := d.Check(t.Context(), m, "disk", none, func(int64, []byte) error { got++; return nil }); !errors.Is(err, ErrDigest) || got != 1 {
		t.Errorf("%d blocks were given out, %v", got, err)
	}
	ended, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := d.Check(ended, m, "disk", none, nil); !errors.Is(err, context.Canceled) {
		t.Error(err)
	}
}

// TestDamaged: whatever byte of a file of digests is another, that is found as damage.
func TestDamaged(t *testing.T) {
	m := disk(3)
	file := digests(t, m)
	for i := range file {
		bad := slices.Clone(file)
		bad[i] ^= 0x41
		if found, err := differ(t, bad, m); !integrity.IsCorrupt(err) || len(found) > 0 {
			t.Fatalf("byte %d: %q, %v", i, found, err)
		}
	}
	for _, n := range []int{0, 100, pageLen, len(file) - 1} {
		if _, err := differ(t, file[:n], m); !integrity.IsCorrupt(err) {
			t.Errorf("cut to %d: %v", n, err)
		}
	}
	if _, err := Open(bytes.NewReader(file), int64(len(file)), "digests", uuid.New()); !integrity.IsCorrupt(err) {
		t.Errorf("another disk's: %v", err)
	}
	// What has its checksum, and can't be.
	for name, change := range map[string]func(b []byte){
		"version":        func(b []byte) { b[8] = 2 },
		"block size":     func(b []byte) { b[12]++ },
		"size":           func(b []byte) { b[sizeAt+7] = 0x80 },
		"records":        func(b []byte) { b[recordsAt] = 200 },
		"reserved":       func(b []byte) { b[reservedAt] = 1 },
		"order":          func(b []byte) { b[pageLen+recordLen] = 0 },
		"behind the end": func(b []byte) { b[pageLen+2*recordLen] = 9 },
		"negative":       func(b []byte) { b[pageLen+7] = 0x80 },
		"padding":        func(b []byte) { b[pageLen+3*recordLen] = 1 },
	} {
		bad := slices.Clone(file)
		change(bad)
		seal(bad[:pageLen])
		seal(bad[pageLen:])
		if _, err := differ(t, bad, m); !integrity.IsCorrupt(err) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// FuzzDigests: a file may say what it likes. It is refused, or is what Make makes of some image.
func FuzzDigests(f *testing.F) {
	m := disk(3)
	file, _, err := Make(context.Background(), m, id)
	if err != nil {
		f.Fatal(err)
	}
	f.Add(file)
	f.Add(file[:pageLen])
	f.Fuzz(func(t *testing.T, b []byte) {
		file := slices.Clone(b)
		for at := 0; at+pageLen <= len(file); at += pageLen {
			seal(file[at:][:pageLen])
		}
		found, err := differ(t, file, m)
		if err != nil && !integrity.IsCorrupt(err) {
			t.Fatal(err)
		}
		if err == nil && len(found) == 0 && !bytes.Equal(file, digests(t, m)) {
			t.Errorf("%d bytes are digests of it", len(file))
		}
	})
}
