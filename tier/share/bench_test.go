package share

import (
	"fmt"
	"math/rand/v2"
	"runtime"
	"testing"

	"github.com/google/uuid"

	"github.com/flic-migrate/flic-migrate/tier/digest"
	"github.com/flic-migrate/flic-migrate/tier/vfs"
)

// prefixOf is the digest of page i of n, of which the first 8 bytes rise with i.
func prefixOf(i, n uint64) (s digest.Sum) {
	v := ^uint64(0)/n*i + rand.New(rand.NewPCG(i, 3)).Uint64N(^uint64(0)/n)
	for k := range 8 {
		s[k] = byte(v >> (56 - 8*k))
	}
	return s
}

// generated makes an index of n pages, of a thousand images, in one run, and says what it
// takes of the disk.
func generated(b *testing.B, n uint64) (*lab, *Index) {
	l := newLab(b)
	if info, err := vfs.OS.StatFS(l.c.dir); err != nil || info.Free < 4*int64(n)*recordSize {
		b.Fatalf("%d bytes are free, and %d are needed: %v", info.Free, 4*int64(n)*recordSize, err)
	}
	var images []Image
	for i := range 1000 {
		images = append(images, Image{uuid.New(), fmt.Sprint("vm", i), 1})
	}
	l.locked(func(c *Locked) error {
		w, err := c.newRun(l.key, images)
		if err != nil {
			return err
		}
		for i := range n {
			if err := w.add(record{binary64(prefixOf(i, n)), uint16(i % 1000), uint32(i / 1000)}); err != nil {
				return err
			}
		}
		return w.commit(false)
	})
	return l, l.open()
}

// BenchmarkLookup looks pages up, of which half are there, in indexes of 10^6 and of 10^8
// pages: bytes a page, and memory that is not the page cache's, beside the time.
func BenchmarkLookup(b *testing.B) {
	for _, n := range []uint64{1e6, 1e8} {
		b.Run(fmt.Sprint(n), func(b *testing.B) {
			var before, after runtime.MemStats
			l, y := generated(b, n)
			y.Close()
			runtime.GC()
			runtime.ReadMemStats(&before)
			x := l.open()
			runtime.GC()
			runtime.ReadMemStats(&after)
			var sums [1 << 16]digest.Sum
			r := rand.New(rand.NewPCG(1, 1))
			for i := range sums {
				if sums[i] = prefixOf(r.Uint64N(n), n); i%2 == 0 {
					sums[i][7] ^= 1 // with all likelihood it is not there
				}
			}
			found, i := 0, 0
			for b.Loop() {
				x.Each(sums[i%len(sums)], func(int, uint64) bool { found++; return false })
				i++
			}
			if share := float64(found) / float64(i); i > 1000 && (share < 0.45 || share > 0.55) {
				b.Errorf("%f of the pages are found", share)
			}
			b.ReportMetric(float64(x.Bytes())/float64(x.Records()), "B/page")
			b.ReportMetric(float64(after.HeapAlloc-before.HeapAlloc), "B-heap")
		})
	}
}

// BenchmarkAdd adds an image of a guest of 4 GB, and merges it with an index of as much.
func BenchmarkAdd(b *testing.B) {
	const pages = 1e6
	for b.Loop() {
		l := newLab(b)
		l.add(made("a", 0, pages))
		l.add(made("b", pages, pages))
		l.locked(func(c *Locked) error { return c.Merge(b.Context(), l.key, 1<<40, all) })
	}
	b.ReportMetric(float64(b.Elapsed().Nanoseconds())/float64(b.N)/(2*pages), "ns/page")
}
