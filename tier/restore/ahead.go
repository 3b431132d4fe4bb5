package restore

import (
	"context"
	"slices"

	"golang.org/x/sync/errgroup"

	"github.com/flic-migrate/flic-migrate/tier/bitmap"
	"github.com/flic-migrate/flic-migrate/tier/rescue"
	"github.com/flic-migrate/flic-migrate/tier/source"
)

const (
	// aheadWindow is how many segments of disk slots are read in the order in which they lie
	// on disks, 4 MiB: one window follows another as the restore needs them.
	aheadWindow = 32
	// aheadReaders is how many windows are read at a time.
	aheadReaders = 2
	// aheadMost is how many segments are read before they are needed, 256 MiB: they must
	// not drive each other out of the page cache.
	aheadMost = 2048
)

// diskAhead reads what is on disks into the page cache before it is needed. It goes through
// the skeleton as the replayer will.
type diskAhead struct {
	*prefetcher
	ctx     context.Context
	seen    bitmap.Bitmap
	window  []uint32
	windows chan []uint32 // to the readers
}

// readDisksAhead reads all that is on disks, until ctx ends: with the restore. What is
// wrong with the checkpoint is the plan's to say; the error is a panic.
func (p *prefetcher) readDisksAhead(ctx context.Context) error {
	if p.set.Disk == 0 {
		return nil
	}
	g, ctx := errgroup.WithContext(ctx)
	a := &diskAhead{prefetcher: p, ctx: ctx, windows: make(chan []uint32)}
	a.seen = bitmap.New(int64(p.set.Spaces[p.set.Disk].Segments.Count()))
	for range aheadReaders {
		rescue.Go(g, func() error {
			for w := range a.windows {
				p.c.ReadDisksIn(ctx, w)
			}
			return nil
		})
	}
	rescue.Go(g, func() error {
		defer close(a.windows)
		if p.c.Skeleton(&walk{prefetcher: p, each: a.add}) == nil {
			_ = a.read() // it fails with ctx
		}
		return nil
	})
	return g.Wait()
}

// add has the segments read that are on disks, each once.
func (a *diskAhead) add(needs []source.Need) error {
	if a.ctx.Err() != nil {
		return context.Cause(a.ctx)
	}
	for _, need := range needs {
		if need.Space != a.set.Disk || !a.seen.Set(int64(need.Number)) {
			continue
		}
		if a.window = append(a.window, need.Number); len(a.window) < aheadWindow {
			continue
		}
		if err := a.read(); err != nil {
			return err
		}
	}
	return nil
}

// read has the window read, and then waits until so little is ahead that more can be.
func (a *diskAhead) read() error {
	slices.Sort(a.window)
	select {
	case a.windows <- a.window:
	case <-a.ctx.Done():
		return context.Cause(a.ctx)
	}
	for range a.window {
		select {
		case a.ahead <- struct{}{}:
		case <-a.ctx.Done():
			return context.Cause(a.ctx)
		}
	}
	a.window = nil
	return nil
}

// arrived is told of what a worker has decoded.
func (p *prefetcher) arrived(n source.Need) {
	if p.set.Disk == 0 || n.Space != p.set.Disk {
		return
	}
	select {
	case <-p.ahead:
	default: // it was needed before it was read ahead, or is decoded again
	}
}
