package replay

import (
	"bufio"
	"bytes"
	"compress/gzip"
	"context"
	"fmt"
	"io"

	"github.com/klauspost/compress/zstd"
	"github.com/pierrec/lz4/v4"

	"github.com/flic-migrate/flic-migrate/stream/pipe"
)

// Open opens a recorded stream. Whether and how it is compressed is told by its
// first bytes: zstd, gzip and lz4 are known, everything else is taken for the
// stream itself. A pipe will do. Open and all reads return ctx's cause when that is done.
func Open(ctx context.Context, path string) (io.ReadCloser, error) {
	f, err := pipe.Open(ctx, path)
	if err != nil {
		return nil, err
	}
	r, closeCodec, err := Decompress(f)
	if err != nil {
		f.Close()
		return nil, err
	}
	return &recorded{r, closeCodec, f}, nil
}

type recorded struct {
	r          io.Reader
	closeCodec func()
	file       *pipe.Input
}

// Read keeps a recording that was cut apart from a stream that was: the codecs
// report it as io.ErrUnexpectedEOF, by which a reader of streams would tell that
// QEMU has stopped in the middle.
func (r *recorded) Read(b []byte) (int, error) {
	n, err := r.r.Read(b)
	if err == io.ErrUnexpectedEOF {
		err = fmt.Errorf("%s: the compressed file is truncated", r.file.Name())
	}
	return n, err
}

func (r *recorded) Close() error {
	r.closeCodec()
	return r.file.Close()
}

// maxWindow caps what a zstd stream may make its reader allocate. zstd's own
// command line makes nothing larger than 128 MiB without --ultra --long.
const maxWindow = 128 << 20

// Decompress returns what r has, decompressed if it is compressed, and a
// function to be called when it is no longer needed.
func Decompress(r io.Reader) (io.Reader, func(), error) {
	b := bufio.NewReaderSize(r, 256<<10)
	magic, _ := b.Peek(4) // a short file is no compressed one
	switch {
	case bytes.Equal(magic, []byte{0x28, 0xb5, 0x2f, 0xfd}):
		d, err := zstd.NewReader(b, zstd.WithDecoderMaxWindow(maxWindow), zstd.WithDecoderConcurrency(1))
		if err != nil {
			return nil, nil, err
		}
		return d, d.Close, nil
	case bytes.HasPrefix(magic, []byte{0x1f, 0x8b}):
		d, err := gzip.NewReader(b)
		return d, func() {}, err
	case bytes.Equal(magic, []byte{0x04, 0x22, 0x4d, 0x18}):
		return lz4.NewReader(b), func() {}, nil
	}
	return b, func() {}, nil
}
