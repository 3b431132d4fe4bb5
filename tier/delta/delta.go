// Package delta stores a page as what has changed of another one, in words of 8 bytes,
// as FITDOC does.
//
//	0                 n/64
//	┌─────────────────┬──────────────┬──────────────┬───
//	│ bitmap, a bit   │ first word   │ next word    │ …     of the page, as they are
//	│ for each word   │ that changed │ that changed │
//	└─────────────────┴──────────────┴──────────────┴───
//
// n is the length of the page, a multiple of 64. Bit i%8 of byte i/8 stands for word i.
// So the length of a delta follows from its bitmap, and any other is damage.
//
// The codec of the image compresses deltas, many at a time. What it makes of them
// decides: runs in place of the bitmap, a bitmap of two levels, words as differences or
// XORed with the base's, in rows or in planes of bytes all come to the same with LZ
// codecs, within 0.5 %; with Zstandard all else comes to more, by up to 6 % where words
// lose their alignment (BenchmarkEncodings). The plainest is taken.
package delta

import (
	"encoding/binary"
	"errors"
	"fmt"
	"math/bits"
)

const wordLen = 8

// ErrDamaged is wrapped by what Apply refuses.
var ErrDamaged = errors.New("not a delta of this page")

// MaxLen is how long a delta of a page of n bytes can be: three quarters of it. What is
// longer hardly pays in bytes, with any codec, and costs a reader two reads for one.
func MaxLen(n int) int { return n - n/4 }

// Encode appends to dst what makes page of base. Both have the same length, a multiple
// of 64 bytes. It returns dst as it was, and false, if so much has changed that it does
// not pay.
func Encode(dst, page, base []byte) ([]byte, bool) {
	head := len(dst)
	n := len(page)
	base = base[:n]
	room := MaxLen(n) - n/64
	dst = append(dst, make([]byte, n/64)...)
	for at := 0; at < n; at += 64 {
		p, b := (*[64]byte)(page[at:]), (*[64]byte)(base[at:])
		if *p == *b {
			continue // most often so, and compared as a whole
		}
		var changed byte
		for i := 0; i < 64; i += wordLen {
			now := binary.LittleEndian.Uint64(p[i:])
			if now == binary.LittleEndian.Uint64(b[i:]) {
				continue
			}
			changed |= 1 << (i / wordLen)
			dst = binary.LittleEndian.AppendUint64(dst, now)
		}
		if room -= wordLen * bits.OnesCount8(changed); room < 0 {
			return dst[:head], false
		}
		dst[head+at/64] = changed
	}
	return dst, true
}

// Apply makes in dst the page that delta makes of base. dst and base have the length
// of a page and may be the same. A delta that Encode can't have made is an error that
// wraps ErrDamaged, and leaves dst in no particular state.
func Apply(dst, base, delta []byte) error {
	n := len(base)
	if len(dst) != n || n%64 != 0 {
		return fmt.Errorf("%w: pages of %d and %d bytes", ErrDamaged, n, len(dst))
	}
	if len(delta) < n/64 {
		return fmt.Errorf("%w: %d bytes", ErrDamaged, len(delta))
	}
	bitmap, words := delta[:n/64], delta[n/64:]
	count := 0
	for _, b := range bitmap {
		count += bits.OnesCount8(b)
	}
	if len(words) != wordLen*count {
		return fmt.Errorf("%w: %d bytes for %d words", ErrDamaged, len(words), count)
	}
	copy(dst, base)
	for i, b := range bitmap {
		for ; b != 0; b &= b - 1 {
			copy(dst[64*i+wordLen*bits.TrailingZeros8(b):][:wordLen], words)
			words = words[wordLen:]
		}
	}
	return nil
}
