package save

import (
	"encoding/binary"
	"math/rand/v2"
	"slices"
	"testing"
)

// marksOneByOne are the marks of a page as they are defined: a stretch of 32 bytes is marked if
// the product of its first 8 says so, unless these are zero or as those of the mark before.
func marksOneByOne(page []byte) (list []uint64) {
	const f1, f2, f3, f4 = 0x9e3779b97f4a7c15, 0xc2b2ae3d27d4eb4f, 0x165667b19e3779f9, 0xd6e8feb86659fd93
	last := uint64(0)
	for i := 0; i+32 <= len(page) && len(list) < maxMarks; i++ {
		word := func(n int) uint64 { return binary.LittleEndian.Uint64(page[i+n:]) }
		if v := word(0); v*f1>>markShift == 0 && v != 0 && v != last {
			last = v
			h := v*f2 ^ word(8)*f3 ^ word(16)*f4
			h ^= h >> 29
			h = h*f1 ^ word(24)*f2
			h ^= h >> 32
			list = append(list, h*f3)
		}
	}
	return list
}

// markPages are pages of all sorts, by name: of noise, of words with zeros between them, of one word, of
// stretches that are marked at each place where the loop over them begins or ends anew.
func markPages() map[string][]byte {
	rnd := rand.New(rand.NewPCG(1, 2))
	noise := func(n int) []byte {
		b := make([]byte, n)
		for i := range b {
			b[i] = byte(rnd.Uint32())
		}
		return b
	}
	// marked are 8 bytes that begin a mark.
	marked := func() uint64 {
		for {
			if v := rnd.Uint64(); v*markFactor>>markShift == 0 {
				return v
			}
		}
	}
	pages := map[string][]byte{"noise": noise(4096), "zero": make([]byte, 4096), "noise of 1 KiB": noise(1024), "short": noise(40), "too short": noise(31)}
	words, ends, many := make([]byte, 4096), make([]byte, 4096), make([]byte, 4096)
	for i := 0; i < len(words); i += 8 {
		if rnd.IntN(3) == 0 {
			binary.LittleEndian.PutUint64(words[i:], rnd.Uint64N(1<<24))
		}
		binary.LittleEndian.PutUint64(many[i:], marked())
	}
	for i := range 9 {
		binary.LittleEndian.PutUint64(ends[i*9:], marked())
		binary.LittleEndian.PutUint64(ends[4096-32-i*9:], marked())
	}
	pages["words"], pages["ends"], pages["more than are looked at"] = words, ends, many
	one := marked()
	same := make([]byte, 0, 4096)
	for range 4096 / 8 {
		same = binary.LittleEndian.AppendUint64(same, one)
	}
	pages["one word"] = same
	return pages
}

func TestMarks(t *testing.T) {
	for name, page := range markPages() {
		head := []uint64{1, 2}
		if got, want := appendMarks(head, page), append(head, marksOneByOne(page)...); !slices.Equal(got, want) {
			t.Errorf("%s: %x instead of %x", name, got, want)
		}
	}
}
