package ramparse

import (
	"bytes"
	"compress/zlib"
	"errors"
	"fmt"
	"io"
	"sync"

	"github.com/flic-migrate/flic-migrate/stream"
)

// xbzrleEncoding is the only encoding an XBZRLE record has
// (ENCODING_FLAG_XBZRLE).
const xbzrleEncoding = 0x01

// ApplyXBZRLE applies a delta to page in place: pairs of an unchanged and a
// changed run, whose lengths are uleb128 of at most two bytes, the changed one
// followed by its bytes (migration/xbzrle.c). The delta counts on page holding
// the page's last content. On ErrDamaged page may be partly changed.
func ApplyXBZRLE(page, delta []byte) error {
	d := 0 // position in page
	for i := 0; i < len(delta); {
		run, n := uleb128(delta[i:])
		// Only the first unchanged run may be empty, otherwise two changed runs
		// would have been one.
		if n == 0 || run == 0 && i > 0 || run > len(page)-d {
			return fmt.Errorf("%w: XBZRLE unchanged run at byte %d", stream.ErrDamaged, i)
		}
		i, d = i+n, d+run
		run, n = uleb128(delta[i:])
		if n == 0 || run == 0 || run > len(page)-d || run > len(delta)-i-n {
			return fmt.Errorf("%w: XBZRLE changed run at byte %d", stream.ErrDamaged, i)
		}
		i += n
		copy(page[d:], delta[i:i+run])
		i, d = i+run, d+run
	}
	return nil
}

// uleb128 decodes a number of one or two bytes and returns it with its length,
// 0 if there is none.
func uleb128(b []byte) (v, n int) {
	switch {
	case len(b) > 0 && b[0] < 0x80:
		return int(b[0]), 1
	case len(b) > 1 && b[1] < 0x80:
		return int(b[0]&0x7f) | int(b[1])<<7, 2
	}
	return 0, 0
}

// compressBound is the most that zlib makes of n bytes (its function of that
// name); a page that does not compress comes out larger than it was.
func compressBound(n int) int { return n + n>>12 + n>>14 + n>>25 + 13 }

// inflaters keeps decompressors: one is 40 KiB, too much to make for a page.
var inflaters sync.Pool

// Inflate decompresses the zlib stream of a Compressed record into dst, which
// it must fill exactly. It may be called from many goroutines.
func Inflate(dst, payload []byte) error {
	n, err := inflate(dst, payload)
	if err == nil && n != len(dst) {
		err = fmt.Errorf("%w: compressed page has %d of %d bytes", stream.ErrDamaged, n, len(dst))
	}
	return err
}

// inflate decompresses payload into dst, which need not become full, and
// returns the length.
func inflate(dst, payload []byte) (int, error) {
	src := bytes.NewReader(payload)
	z, ok := inflaters.Get().(io.ReadCloser)
	var err error
	if ok {
		err = z.(zlib.Resetter).Reset(src, nil)
	} else {
		z, err = zlib.NewReader(src)
	}
	if err != nil {
		return 0, fmt.Errorf("%w: compressed page: %v", stream.ErrDamaged, err)
	}
	defer inflaters.Put(z)
	n := 0
	for n < len(dst) && err == nil {
		var k int
		k, err = z.Read(dst[n:])
		n += k
	}
	if err == nil {
		// The checksum is checked where the zlib stream ends, so go there.
		var one [1]byte
		if k, e := z.Read(one[:]); k > 0 {
			err = errors.New("it goes on")
		} else {
			err = e
		}
	}
	if err != io.EOF {
		return 0, fmt.Errorf("%w: compressed page after %d bytes: %v", stream.ErrDamaged, n, err)
	}
	return n, nil
}
