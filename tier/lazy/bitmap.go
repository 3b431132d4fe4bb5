package lazy

import (
	"encoding/binary"
	"math/bits"
)

// bitmap has a bit for each page of a RAM block.
type bitmap struct {
	words []uint64
	pages uint64
}

func newBitmap(pages uint64) bitmap {
	return bitmap{make([]uint64, (pages+63)/64), pages}
}

func (b bitmap) has(page uint64) bool { return b.words[page/64]>>(page%64)&1 != 0 }
func (b bitmap) set(page uint64)      { b.words[page/64] |= 1 << (page % 64) }

// fill takes over a RECV_BITMAP: bit i%8 of byte i/8. It returns how many pages
// are set.
func (b bitmap) fill(raw []byte) (n int64) {
	for i := range b.words {
		if 8*i+8 > len(raw) {
			break
		}
		w := binary.LittleEndian.Uint64(raw[8*i:])
		if rest := b.pages - 64*uint64(i); rest < 64 {
			w &= 1<<rest - 1
		}
		b.words[i] = w
		n += int64(bits.OnesCount64(w))
	}
	return n
}
