package save

import (
	"bytes"
	"io"
	"testing"
	"time"

	"github.com/flic-migrate/flic-migrate/ramparse"
)

// busySource is a pipe that is always full when it is read. Between a Read and
// the attempt to make it smaller a write of 32 KiB gets in, as QEMU's are, but for
// every n-th time.
type busySource struct {
	in       io.Reader
	capacity int
	held     int // bytes in the pipe
	n        int
	asked    int
	read     int64
	reads    int
}

func (b *busySource) Read(p []byte) (int, error) {
	n, err := b.in.Read(p[:min(len(p), b.capacity)])
	b.read += int64(n)
	b.reads++
	b.held = b.capacity - n
	return n, err
}

func (b *busySource) Ready(time.Duration) bool { return true }
func (b *busySource) Capacity() int            { return b.capacity }

func (b *busySource) SetCapacity(n int) int {
	if b.asked++; b.asked%b.n != 0 {
		b.held = min(b.held+32<<10, b.capacity)
	}
	if b.held <= n {
		b.capacity = n
	}
	return b.capacity
}

// The pipe must be small when RAM ends, also if the source prevents that every
// other time, and next to nothing of what follows RAM may have been taken then.
func TestFeedHoldsBack(t *testing.T) {
	for _, pages := range []int{16 << 10, 32 << 10, 128 << 10, 1 << 20} {
		for _, n := range []int{1, 2} {
			ram := int64(pages * ramparse.ShortestPage)
			source := &busySource{in: io.LimitReader(zeros{}, ram+1<<20), capacity: defaultPipe, n: n}
			f, cur := newFeed(t.Context(), source, 0)
			largest := 0
			for unseen := pages; unseen > 0; unseen-- {
				if adjustAt(uint64(unseen)) {
					f.adjust(uint64(unseen))
				}
				if b, err := cur.Next(ramparse.ShortestPage); err != nil || !bytes.Equal(b, make([]byte, ramparse.ShortestPage)) {
					t.Fatalf("%x, %v", b, err)
				}
				largest = max(largest, source.capacity)
			}
			f.adjust(0)
			if delivered := source.read + int64(source.capacity); delivered > ram+int64(4*n*minPipe) {
				t.Errorf("%d pages, every %d. attempt undisturbed: %d bytes behind RAM were delivered, the pipe holds %d",
					pages, n, delivered-ram, source.capacity)
			}
			if source.read > ram {
				t.Errorf("%d pages, every %d. attempt undisturbed: the cursor has %d bytes from behind RAM", pages, n, source.read-ram)
			}
			// Records of a few bytes each must not become reads of a few bytes.
			if most := int(ram/minPipe) + 2*adjustEvery; source.reads > most {
				t.Errorf("%d pages, every %d. attempt undisturbed: %d reads, want at most %d", pages, n, source.reads, most)
			}
			if pages == 1<<20 && largest != maxPipe {
				t.Errorf("%d pages: the pipe was never larger than %d", pages, largest)
			}
		}
	}
}

type zeros struct{}

func (zeros) Read(p []byte) (int, error) {
	clear(p)
	return len(p), nil
}
