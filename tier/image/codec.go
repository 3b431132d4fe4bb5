package image

import (
	"errors"
	"fmt"

	"github.com/klauspost/compress/s2"
	"github.com/klauspost/compress/zstd"
	"github.com/pierrec/lz4/v4"
)

// Codec is a frame's compression. Numbers are part of the format.
type Codec uint8

// The codecs. docs/performance.md has the measurement behind the default.
const (
	None Codec = 0 // stored as it is
	LZ4  Codec = 1 // LZ4 block format
	S2   Codec = 2 // S2 block format (a superset of Snappy's)
	Zstd Codec = 3 // one Zstandard frame
)

// Codecs names every codec, for flags and reports.
var Codecs = map[string]Codec{"none": None, "lz4": LZ4, "s2": S2, "zstd": Zstd}

func (c Codec) String() string {
	for name, k := range Codecs {
		if k == c {
			return name
		}
	}
	return fmt.Sprintf("codec %d", uint8(c))
}

// compressor holds one worker's codec state; it is not shared.
type compressor struct {
	lz4  lz4.Compressor
	zstd *zstd.Encoder
}

// zstdWindow is the size of the largest chunk: a larger window would only cost
// memory.
const zstdWindow = 256 << 10

// compress appends src, compressed, to dst and returns it with the codec really
// used: None when compression gains less than 1/32, because then a restore is
// better off without decompressing.
func (c *compressor) compress(codec Codec, dst, src []byte) ([]byte, Codec, error) {
	head := len(dst)
	limit := len(src) - len(src)/32
	switch codec {
	case LZ4:
		dst = grow(dst, lz4.CompressBlockBound(len(src)))
		n, err := c.lz4.CompressBlock(src, dst[head:cap(dst)])
		if err != nil {
			return nil, 0, err
		}
		if n > 0 && n <= limit {
			return dst[:head+n], LZ4, nil
		}
	case S2:
		dst = grow(dst, s2.MaxEncodedLen(len(src)))
		if b := s2.Encode(dst[head:cap(dst)], src); len(b) <= limit {
			return dst[:head+len(b)], S2, nil
		}
	case Zstd:
		if c.zstd == nil {
			z, err := zstd.NewWriter(nil, zstd.WithEncoderConcurrency(1), zstd.WithEncoderCRC(false),
				zstd.WithLowerEncoderMem(true), zstd.WithWindowSize(zstdWindow))
			if err != nil {
				return nil, 0, err
			}
			c.zstd = z
		}
		if out := c.zstd.EncodeAll(src, dst); len(out)-head <= limit {
			return out, Zstd, nil
		}
	case None:
	default:
		return nil, 0, fmt.Errorf("unknown %v", codec)
	}
	return append(dst[:head], src...), None, nil
}

// decompressor holds one reader's codec state; it is not shared.
type decompressor struct {
	zstd *zstd.Decoder
}

// decompress fills dst, whose length is the raw length the frame header
// promised, from src. Anything but exactly len(dst) bytes is an error.
func (d *decompressor) decompress(codec Codec, dst, src []byte) error {
	switch codec {
	case None:
		if len(src) != len(dst) {
			return errors.New("stored length differs from raw length")
		}
		copy(dst, src)
		return nil
	case LZ4:
		n, err := lz4.UncompressBlock(src, dst)
		return decoded(n, err, dst)
	case S2:
		// The length is checked first: s2.Decode would allocate whatever a
		// damaged block claims.
		n, err := s2.DecodedLen(src)
		if err == nil && n == len(dst) {
			_, err = s2.Decode(dst, src)
		}
		return decoded(n, err, dst)
	case Zstd:
		if d.zstd == nil {
			z, err := zstd.NewReader(nil, zstd.WithDecoderConcurrency(1), zstd.WithDecoderLowmem(true),
				zstd.WithDecoderMaxMemory(maxMeta), zstd.WithDecodeAllCapLimit(true))
			if err != nil {
				return err
			}
			d.zstd = z
		}
		out, err := d.zstd.DecodeAll(src, dst[:0:len(dst)])
		return decoded(len(out), err, dst)
	}
	return fmt.Errorf("unknown %v", codec)
}

func decoded(n int, err error, dst []byte) error {
	if err != nil {
		return err
	}
	if n != len(dst) {
		return fmt.Errorf("%d bytes decoded, %d promised", n, len(dst))
	}
	return nil
}

// grow makes room for n more bytes behind b.
func grow(b []byte, n int) []byte {
	if cap(b)-len(b) >= n {
		return b
	}
	return append(make([]byte, 0, len(b)+n), b...)
}
