package disk

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"runtime"
	"time"

	"github.com/zeebo/blake3"
	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"

	"github.com/flic-migrate/flic-migrate/tier/digest"
	"github.com/flic-migrate/flic-migrate/tier/progress"
	"github.com/flic-migrate/flic-migrate/tier/rescue"
	"github.com/flic-migrate/flic-migrate/tier/sorted"
	"github.com/flic-migrate/flic-migrate/tier/vfs"
)

// ErrWriter: a layer that somebody can write to gets no index.
var ErrWriter = errors.New("somebody has it open and can write to it: only what it stands on can be indexed")

// ErrChanging: a layer was changed while it was read.
var ErrChanging = errors.New("it was changed while it was being indexed")

const (
	// readSize is how much is read at a time: pieces that a disk reads at its full
	// speed, and of which a few are under way.
	readSize = 1 << 20
	// runRecords is how many records are sorted in memory: of 4 GiB of a disk. Three
	// times as many are there at a time, 72 MiB.
	runRecords = 1 << 20
)

// racily is how long a file must have been left alone before it is read: the clock of
// file systems is coarse, and a change in the tick of the last one leaves no trace. A
// kernel's tick has up to 10 ms, the times of some file systems two seconds.
const racily = 2 * time.Second

// source is what is indexed: an Image, or for tests something that needs no disk.
type source interface {
	io.ReaderAt
	Size() int64
	// ownRun is as Image.ownRun.
	ownRun(ctx context.Context, off int64) (from, to int64, err error)
}

// builder makes one index.
type builder struct {
	src    source
	head   header // id and built are set; the rest is found
	hasher *digest.Hasher
	show   func(progress.State)
	total  int64 // bytes to be read
	sort   sorter
	sum    *blake3.Hasher
}

// write fills an index file.
func (b *builder) write(ctx context.Context, f vfs.File) error {
	b.head.regions = regions(b.src, b.src.Size())
	b.sum = blake3.New()
	defer b.sort.close()
	if err := b.read(ctx); err != nil {
		return err
	}
	b.sum.Sum(b.head.content[:0])
	// The header comes last: until then the file is no index.
	if err := f.Truncate(headerSize); err != nil {
		return err
	}
	w := leafWriter{Writer: sorted.NewWriter(f, headerSize, recordSize)}
	err := b.sort.each(ctx, w.add)
	if err == nil {
		err = w.End()
	}
	if err != nil {
		return err
	}
	b.head.records = w.Records()
	h, err := b.head.encode()
	if err == nil {
		_, err = f.WriteAt(h, 0)
	}
	return err
}

// chunk is a part of the disk on its way: read, digested, collected, each by somebody
// else, in the disk's order.
type chunk struct {
	at   int64 // on the disk, in bytes
	data []byte
	sums []digest.Sum  // of the blocks; those that are zero have none
	done chan struct{} // closed when sums are there
}

// read reads what the layer has, and collects the records.
//
//	runs ─► reader ─┬─► digests, on all processors ─┐
//	                └─► in order ───────────────────┴─► collector ─► sorter
func (b *builder) read(ctx context.Context) error {
	workers := runtime.GOMAXPROCS(0)
	g, ctx := errgroup.WithContext(ctx)
	work, order := make(chan *chunk, workers), make(chan *chunk, 2*workers)
	free := make(chan *chunk, 3*workers+2)
	for range cap(free) {
		free <- &chunk{data: make([]byte, readSize), sums: make([]digest.Sum, 0, readSize/BlockSize)}
	}
	rescue.Go(g, func() error {
		defer close(work)
		defer close(order)
		return b.runs(ctx, func(from, to int64) error {
			for from < to {
				var c *chunk
				select {
				case c = <-free:
				case <-ctx.Done():
					return context.Cause(ctx)
				}
				c.at, c.data, c.done = from, c.data[:min(to-from, readSize)], make(chan struct{})
				if n, err := b.src.ReadAt(c.data, from); n < len(c.data) {
					if err == nil || err == io.EOF {
						err = io.ErrUnexpectedEOF
					}
					return err
				}
				from += int64(len(c.data))
				for _, to := range []chan *chunk{order, work} {
					select {
					case to <- c:
					case <-ctx.Done():
						return context.Cause(ctx)
					}
				}
			}
			return nil
		})
	})
	for range workers {
		rescue.Go(g, func() error {
			for c := range work {
				b.digest(c)
				close(c.done)
			}
			return nil
		})
	}
	rescue.Go(g, func() error {
		last := time.Now()
		for c := range order {
			select {
			case <-c.done:
			case <-ctx.Done():
				return context.Cause(ctx)
			}
			if err := b.collect(c); err != nil {
				return err
			}
			b.head.data += int64(len(c.data))
			c.data = c.data[:cap(c.data)]
			free <- c
			if now := time.Now(); b.show != nil && now.Sub(last) >= progress.Every {
				last = now
				b.show(progress.State{Phase: "index", Pages: b.head.data / BlockSize, PagesAll: b.total / BlockSize, BytesIn: b.head.data})
			}
		}
		return nil
	})
	return g.Wait()
}

// runs calls fn with each range of the disk that has whole blocks in the layer's own
// bytes. Runs that touch are one: a block may lie in two of them.
func (b *builder) runs(ctx context.Context, fn func(from, to int64) error) error {
	for off := int64(0); ; {
		from, to, err := b.src.ownRun(ctx, off)
		if err == io.EOF {
			return nil
		}
		if err != nil {
			return err
		}
		for to < b.src.Size() {
			f, t, err := b.src.ownRun(ctx, to)
			if err != nil && err != io.EOF {
				return err
			}
			if err == io.EOF || f != to {
				break
			}
			to = t
		}
		if err := pieces(b.head.regions, from, to, fn); err != nil {
			return err
		}
		off = to
	}
}

var zeroBlock [BlockSize]byte

// digest makes the digests of a chunk's blocks.
func (b *builder) digest(c *chunk) {
	c.sums = c.sums[:len(c.data)/BlockSize]
	for i := range c.sums {
		block := (*[BlockSize]byte)(c.data[i*BlockSize:])
		if *block == zeroBlock {
			c.sums[i] = digest.Sum{}
			continue
		}
		b.hasher.Put(&c.sums[i], block[:])
	}
}

// collect takes a chunk's records.
func (b *builder) collect(c *chunk) error {
	var buf [readSize / BlockSize * recordSize]byte
	n := 0
	for i := range c.sums {
		s := &c.sums[i]
		if *s == (digest.Sum{}) {
			continue
		}
		block := uint32((c.at + int64(i)*BlockSize) / BlockSize)
		binary.LittleEndian.PutUint32(buf[n:], block)
		copy(buf[n+4:], s[:])
		n += recordSize
		if err := b.sort.add(newRecord(s, block)); err != nil {
			return err
		}
	}
	b.sum.Write(buf[:n])
	return nil
}

// leafWriter writes records, which come in order, but for all too many of one content.
type leafWriter struct {
	*sorted.Writer
	last   record
	copies int // of the last one's content, so far
}

func (w *leafWriter) add(r *record) error {
	if w.Records() > 0 && r.sameDigest(&w.last) {
		if w.copies++; w.copies > maxCopies {
			return nil
		}
	} else {
		w.copies = 1
	}
	w.last = *r
	var b [recordSize]byte
	r.put(b[:])
	return w.Add(b[:])
}

// amount is how many bytes of its own a layer has.
func amount(ctx context.Context, src source) (n int64, err error) {
	for off := int64(0); ; {
		from, to, err := src.ownRun(ctx, off)
		if err == io.EOF {
			return n, nil
		}
		if err != nil {
			return 0, err
		}
		n, off = n+to-from, to
	}
}

// settled waits until a layer's last change is so long ago that another would be seen.
func settled(ctx context.Context, img *Image) error {
	id, err := img.Now()
	if err != nil {
		return err
	}
	if what := img.id.Differs(id); what != "" {
		return fmt.Errorf("%s: %w: it %s", img.Path(), ErrChanging, what)
	}
	age := time.Since(time.Unix(0, id.File.Mtime))
	if age < 0 || age >= racily { // one of the future is no change of now
		return nil
	}
	t := time.NewTimer(racily - age)
	defer t.Stop()
	select {
	case <-t.C:
		return nil
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

// unchanged tells whether a layer is as it was when it was opened, and nobody can write
// to it.
func unchanged(img *Image) error {
	id, err := img.Now()
	if err != nil {
		return err
	}
	if what := img.id.Differs(id); what != "" {
		return fmt.Errorf("%s: %w: it %s", img.Path(), ErrChanging, what)
	}
	w, err := img.Writer()
	if err == nil && w {
		err = fmt.Errorf("%s: %w", img.Path(), ErrWriter)
	}
	return err
}

// readAhead tells the kernel that a layer will be read once, from front to back: it
// reads ahead, and the pages need not push out those of others.
func readAhead(img *Image) {
	unix.Fadvise(int(img.file.Fd()), 0, 0, unix.FADV_SEQUENTIAL)
	unix.Fadvise(int(img.file.Fd()), 0, 0, unix.FADV_NOREUSE)
}
