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
	for _, pages := range guestSizes() {
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

// guestSizes are numbers of pages from where the pipe's first size is no matter. What is
// left when the pipe is to become smaller is another in each.
func guestSizes() (sizes []int) {
	for n := 13 << 10; n < 1<<20; n += n/29 + 13 {
		sizes = append(sizes, n)
	}
	return append(sizes, 16<<10, 32<<10, 128<<10, 1<<20)
}

// The pipe is as large as it can be: what it holds QEMU needs not wait for. So many pages of a
// guest of 512 MB go through pipes of less than 256 KiB, and so many of less than 64.
func TestFeedIsLarge(t *testing.T) {
	const pages = 128 << 10
	source := &busySource{in: zeros{}, capacity: defaultPipe, n: 1}
	f, cur := newFeed(t.Context(), source, 0)
	through := map[int]int{}
	for unseen := pages; unseen > 0; unseen-- {
		if adjustAt(uint64(unseen)) {
			f.adjust(uint64(unseen))
		}
		if _, err := cur.Next(ramparse.ShortestPage); err != nil {
			t.Fatal(err)
		}
		through[source.capacity]++
	}
	small, less := 0, 0
	for n, pages := range through {
		if n < 256<<10 {
			less += pages
		}
		if n < 64<<10 {
			small += pages
		}
	}
	if less > 80<<10 || small > 28<<10 {
		t.Errorf("%d pages came through a pipe of less than 256 KiB, %d of less than 64: %v", less, small, through)
	}
}

type zeros struct{}

func (zeros) Read(p []byte) (int, error) {
	clear(p)
	return len(p), nil
}
