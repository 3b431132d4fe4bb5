package delta

import (
	"bytes"
	"cmp"
	"encoding/binary"
	"fmt"
	"io"
	"math/bits"
	"os"
	"slices"
	"strings"
	"testing"

	"github.com/klauspost/compress/zstd"
	"github.com/minio/minlz"
	"github.com/pierrec/lz4/v4"

	"github.com/flic-migrate/flic-migrate/tier/tiertest"
)

// streamsEnv names recorded streams, separated by commas: of the first and the second,
// the third and the fourth, and so on, each two of one guest some seconds apart, come
// the page pairs of BenchmarkEncodings. scripts/bench-incremental -keep makes some.
const streamsEnv = "FLIC_DELTA_STREAMS"

// pair is a page at two moments.
type pair struct{ base, page []byte }

// realPairs are pages that have changed between the streams of streamsEnv; without
// that, those of a stream that can be made here.
func realPairs(b *testing.B) (list []pair) {
	names := strings.Split(os.Getenv(streamsEnv), ",")
	if len(names) < 2 {
		s := tiertest.Options{Blocks: []tiertest.Block{{Name: "pc.ram", Size: 16 << 20}}, Resend: 0.5}
		s.Passes = 1
		was := tiertest.New(s)
		s.Passes = 3
		return append(list, changedPages(load(b, was.Reader()), load(b, tiertest.New(s).Reader()))...)
	}
	var was *tiertest.Guest
	for i, name := range names {
		f, err := os.Open(name)
		if err != nil {
			b.Fatal(err)
		}
		now := load(b, f)
		f.Close()
		if i%2 == 1 {
			list = append(list, changedPages(was, now)...)
		}
		was = now
	}
	return list
}

func load(b *testing.B, r io.Reader) *tiertest.Guest {
	g, err := tiertest.Load(r)
	if err != nil {
		b.Fatal(err)
	}
	return g
}

func changedPages(was, now *tiertest.Guest) (list []pair) {
	zero := make([]byte, now.PageSize)
	var ids []tiertest.PageID
	for id := range now.Pages {
		ids = append(ids, id)
	}
	slices.SortFunc(ids, func(a, b tiertest.PageID) int {
		return cmp.Or(cmp.Compare(a.Block, b.Block), cmp.Compare(a.Page, b.Page))
	})
	for _, id := range ids {
		base, page := was.Pages[id], now.Pages[id]
		if base != nil && !bytes.Equal(base, page) && !bytes.Equal(base, zero) && !bytes.Equal(page, zero) {
			list = append(list, pair{base, page})
		}
	}
	return list
}

// What an encoding consists of: where the changed words are, what of each is kept, and
// in which order their bytes come.
var (
	positions = map[string]func(changed []byte) []byte{
		"bitmap": func(changed []byte) []byte { return changed },
		"levels": func(changed []byte) []byte {
			b := make([]byte, (len(changed)+7)/8)
			for i, c := range changed {
				if c != 0 {
					b[i/8] |= 1 << (i % 8)
					b = append(b, c)
				}
			}
			return b
		},
		"runs": func(changed []byte) (b []byte) {
			run := 0 // words that are alike: changed or not, in turn
			was := false
			for i := range 8 * len(changed) {
				if is := changed[i/8]>>(i%8)&1 != 0; is != was {
					b, run, was = binary.AppendUvarint(b, uint64(run)), 0, is
				}
				run++
			}
			return binary.AppendUvarint(b, uint64(run))
		},
	}
	values = map[string]func(now, was uint64) uint64{
		"as is":      func(now, _ uint64) uint64 { return now },
		"xor":        func(now, was uint64) uint64 { return now ^ was },
		"difference": func(now, was uint64) uint64 { return now - was },
	}
	layouts = map[string]func(words []uint64) []byte{
		"rows": func(words []uint64) (b []byte) {
			for _, w := range words {
				b = binary.LittleEndian.AppendUint64(b, w)
			}
			return b
		},
		"planes": func(words []uint64) (b []byte) {
			for k := range 8 {
				for _, w := range words {
					b = append(b, byte(w>>(8*k)))
				}
			}
			return b
		},
		"bytes": func(words []uint64) (b []byte) { // a mask for each word, and its bytes that are not 0
			var rest []byte
			for _, w := range words {
				mask := byte(0)
				for k := range 8 {
					if c := byte(w >> (8 * k)); c != 0 {
						mask |= 1 << k
						rest = append(rest, c)
					}
				}
				b = append(b, mask)
			}
			return append(b, rest...)
		},
	}
	codecs = map[string]func(b []byte) int{
		"raw": func(b []byte) int { return len(b) },
		"lz4": func(b []byte) int {
			var c lz4.Compressor
			n, _ := c.CompressBlock(b, make([]byte, lz4.CompressBlockBound(len(b))))
			return n
		},
		"minlz": func(b []byte) int { c, _ := minlz.Encode(nil, b, minlz.LevelFastest); return len(c) },
		"zstd": func(b []byte) int {
			z, _ := zstd.NewWriter(nil, zstd.WithEncoderLevel(zstd.SpeedFastest), zstd.WithEncoderConcurrency(1))
			return len(z.EncodeAll(b, nil))
		},
	}
)

// BenchmarkEncodings prints what the changed pages of real guests come to, in % of the
// bytes that they have, encoded and compressed 32 to a block as an image does it. limit
// is the longest delta that is made, in eighths of a page; the other pages are whole.
func BenchmarkEncodings(b *testing.B) {
	const inBlock = 32
	pairs := realPairs(b)
	size := len(pairs[0].page)
	// all is the compressed size of blocks.
	all := func(blocks [][]byte, codec string) (sum int) {
		for c := range slices.Chunk(blocks, inBlock) {
			data := slices.Concat(c...)
			n := codecs[codec](data)
			if n == 0 || n > len(data) {
				n = len(data)
			}
			sum += n
		}
		return sum
	}
	for position, encodePositions := range positions {
		for value, of := range values {
			for layout, lay := range layouts {
				for _, limit := range []int{2, 4, 6, 7, 8} {
					if limit != 6 && (position != "bitmap" || value != "as is" || layout != "rows") {
						continue // it is looked at for what was chosen
					}
					b.Run(fmt.Sprintf("%s/%s/%s/limit=%d", position, value, layout, limit), func(b *testing.B) {
						var deltas, whole [][]byte
						for b.Loop() {
							deltas, whole = nil, nil
							for _, p := range pairs {
								changed := make([]byte, size/64)
								var words []uint64
								for i := range size / 8 {
									now, was := binary.LittleEndian.Uint64(p.page[8*i:]), binary.LittleEndian.Uint64(p.base[8*i:])
									if now != was {
										changed[i/8] |= 1 << (i % 8)
										words = append(words, of(now, was))
									}
								}
								count := 0
								for _, c := range changed {
									count += bits.OnesCount8(c)
								}
								if size/64+8*count > size*limit/8 {
									whole = append(whole, p.page)
								} else {
									deltas = append(deltas, append(slices.Clone(encodePositions(changed)), lay(words)...))
								}
							}
						}
						for codec := range codecs {
							b.ReportMetric(100*float64(all(deltas, codec)+all(whole, codec))/float64(len(pairs)*size), codec+"-%")
						}
						b.ReportMetric(0, "ns/op")
					})
				}
			}
		}
	}
}
