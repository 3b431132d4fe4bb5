package main

import (
	"fmt"
	"math/rand/v2"
	"os"
	"slices"
	"time"

	"golang.org/x/sys/unix"

	"github.com/flic-migrate/flic-migrate/scripts/measure"
	"github.com/flic-migrate/flic-migrate/tier/disk"
)

const (
	// placesRead is how many places of 4 KiB are read.
	placesRead = 256
	// placesApart is how far they are from each other at the least, in bytes: nothing that
	// is read for one is of use to another.
	placesApart = 1 << 20
	// inOneGo is how much is read in one go for comparison, in pieces of readPiece.
	inOneGo, readPiece = 128 << 20, 1 << 20
)

// places measures what it costs to read a place on a disk image: single blocks all over a
// file, one after the other and all asked for before the first is read, beside as much as
// there is read in one go. It prints how much of that takes as long as one place.
func (b *bench) places() error {
	i, err := disk.OpenLayer(b.image, disk.Raw)
	if err != nil {
		return err
	}
	defer i.Close()
	f, err := os.Open(b.image)
	if err != nil {
		return err
	}
	defer f.Close()
	var starts []int64 // of what the file has
	for off := int64(0); ; off += placesApart {
		if off, err = unix.Seek(int(f.Fd()), off, unix.SEEK_DATA); err != nil {
			break // ENXIO: there is no more
		}
		starts = append(starts, off)
	}
	if len(starts) < placesRead || i.Size() < inOneGo {
		return fmt.Errorf("%s is too small", b.image)
	}
	piece, block := make([]byte, readPiece), make([]byte, disk.BlockSize)
	fmt.Printf("\n%d blocks of %d bytes of %d MB, medians of %d.\n\n", placesRead, len(block), int64(len(starts))*placesApart>>20, b.runs)
	fmt.Println("| | in one go, MB/s | a place, µs | = KiB in one go | a place asked for ahead, µs | = KiB in one go |")
	fmt.Println("|---|---:|---:|---:|---:|---:|")
	for _, what := range []string{"cold", "cached"} {
		var seq, single, ahead []time.Duration
		timed := func(list *[]time.Duration, fn func() error) error {
			if what == "cold" {
				if err := unix.Fadvise(int(f.Fd()), 0, 0, unix.FADV_DONTNEED); err != nil {
					return err
				}
			}
			start := time.Now()
			err := fn()
			*list = append(*list, time.Since(start))
			return err
		}
		for range b.runs + 1 {
			some := slices.Clone(starts)
			rand.Shuffle(len(some), func(i, k int) { some[i], some[k] = some[k], some[i] })
			some = some[:placesRead]
			read := func() error {
				for _, at := range some {
					if n, err := i.ReadAt(block, at); n < len(block) {
						return err
					}
				}
				return nil
			}
			err := timed(&seq, func() error {
				for at := int64(0); at < inOneGo; at += readPiece {
					if n, err := i.ReadAt(piece, starts[0]+at); n < len(piece) {
						return err
					}
				}
				return nil
			})
			if err == nil {
				err = timed(&single, read)
			}
			if err == nil {
				err = timed(&ahead, func() error {
					for _, at := range some {
						i.WillNeed(at, disk.BlockSize)
					}
					return read()
				})
			}
			if err != nil {
				return err
			}
		}
		perKiB := measure.Median(seq[1:]).Seconds() / (inOneGo >> 10)
		of := func(list []time.Duration) (us, kib float64) {
			s := measure.Median(list[1:]).Seconds() / placesRead
			return s * 1e6, s / perKiB
		}
		us, kib := of(single)
		usAhead, kibAhead := of(ahead)
		fmt.Printf("| %s | %.0f | %.1f | %.0f | %.1f | %.0f |\n", what, 1024/perKiB/1e6, us, kib, usAhead, kibAhead)
	}
	return nil
}
