package image

import (
	"errors"
	"fmt"

	"github.com/klauspost/compress/zstd"
	"github.com/minio/minlz"
	"github.com/pierrec/lz4/v4"
)

// Codec is a frame's compression. Numbers are part of the format.
type Codec uint8

// The codecs, each of which is the best at something; docs/lab/performance.md has the
// measurement.
const (
	None  Codec = 0 // stored as it is
	LZ4   Codec = 1 // LZ4 block format: decoded soonest
	MinLZ Codec = 2 // MinLZ block format: encoded soonest
	Zstd  Codec = 3 // one Zstandard frame: the smallest
)

// DefaultCodec is the one that lets a guest that is being saved go on soonest.
const DefaultCodec = MinLZ

// Codecs names every codec, for flags and reports.
var Codecs = map[string]Codec{"none": None, "lz4": LZ4, "minlz": MinLZ, "zstd": Zstd}

// DefaultSegment is the size of a full segment, in bytes, if nothing else is asked
// for. Of 128 KiB a demanded page costs some 50 µs of decompression, and the codec
// finds most of its matches. Who takes Zstandard wants the smallest image: twice
// as much makes it 2 % smaller.
func (c Codec) DefaultSegment() int {
	if c == Zstd {
		return 256 << 10
	}
	return 128 << 10
}

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
	if codec == MinLZ && len(src) > minlz.MaxBlockSize {
		codec = LZ4 // only META can be so long
	}
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
	case MinLZ:
		dst = grow(dst, minlz.MaxEncodedLen(len(src)))
		b, err := minlz.Encode(dst[head:cap(dst)], src, minlz.LevelFastest)
		if err != nil {
			return nil, 0, err
		}
		if len(b) <= limit {
			return dst[:head+len(b)], MinLZ, nil
		}
	case Zstd:
		if c.zstd == nil {
			z, err := zstd.NewWriter(nil, zstd.WithEncoderLevel(zstd.SpeedFastest), zstd.WithEncoderConcurrency(1),
				zstd.WithEncoderCRC(false), zstd.WithLowerEncoderMem(true), zstd.WithWindowSize(zstdWindow))
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
	case MinLZ:
		// The length is checked first: minlz.Decode would allocate whatever a
		// damaged block claims. It would take a block of Snappy's for its own, too.
		isMinLZ, n, err := minlz.IsMinLZ(src)
		if err == nil && !isMinLZ {
			err = errors.New("not a MinLZ block")
		}
		if err == nil && n == len(dst) {
			_, err = minlz.Decode(dst, src)
		}
		return decoded(n, err, dst)
	case Zstd:
		if d.zstd == nil {
			z, err := zstd.NewReader(nil, zstd.WithDecoderConcurrency(1), zstd.WithDecoderLowmem(true),
				zstd.WithDecoderMaxMemory(MaxMeta), zstd.WithDecodeAllCapLimit(true))
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
