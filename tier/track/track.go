// Package track finds the pages that a running guest writes, from a migration
// that is never meant to complete. QEMU has no command that hands out its dirty
// bitmap, but its stream tells: after the first pass over memory only pages
// written since are sent again.
//
//	pass 1 ──────────► hold ─────────► pass 2 ──────► pass 3, or the end
//	at full speed      the interval    = the pages     the set is complete
//	                   (QEMU waits,    written since
//	                   the guest runs)
//
// No page's content is kept. The interval is held by reading no further, which
// QEMU bears well: its migration thread waits in a write and the guest runs.
package track

import (
	"context"
	"errors"
	"fmt"
	"os"
	"time"

	"github.com/flic-migrate/flic-migrate/ramparse"
	"github.com/flic-migrate/flic-migrate/stream"

	"github.com/flic-migrate/flic-migrate/tier/bitmap"
	"github.com/flic-migrate/flic-migrate/tier/workingset"
)

const (
	minPipe = 4 << 10

	// maxPages caps what a stream may claim: 16 TiB in pages of 4 KiB.
	maxPages = 1 << 32

	// After the hold the stream is read in pieces with a pause between. QEMU
	// takes a pass for finished as soon as what is left could be sent within
	// downtime-limit (1 ms) at the rate it has seen, and does not send that:
	// the faster the filter, the more pages would be missing. This is some
	// 50 MB/s, and so at most about a dozen pages.
	pieceBytes = 64 << 10
	piecePause = time.Millisecond

	// patience is for how long QEMU may send nothing while it is read. It always has
	// something: max-bandwidth, however small, lets some of it through each 100 ms,
	// and a migration that has converged is cancelled at once.
	patience = 30 * time.Second
)

// holdPages is how many pages of pass 1 are left when the hold begins. While
// QEMU has something of pass 1 to send it can't see that it could finish, which
// would stop the guest. The tail of the pass must therefore not fit into what
// takes bytes though nobody reads: the pipe or socket, of so many bytes, and QEMU's
// own buffer. Some pages more are left for what QEMU sends within downtime-limit.
//
// Holding before their first sending loses nothing: QEMU clears its dirty log
// for a GiB at a time, with the first page sent of it.
func holdPages(buffer int) int64 { return int64(ramparse.Underway(buffer)) + 448 }

var (
	// ErrTooSmall: the guest's memory is too small for QEMU to be held.
	ErrTooSmall = errors.New("the guest has too little memory for its writes to be tracked")
	// ErrEnded: the migration ended before the interval was over.
	ErrEnded = errors.New("the migration ended before the pages written since could be seen")
	// ErrSilent: QEMU sends nothing and does not end.
	ErrSilent = fmt.Errorf("QEMU has sent nothing for %v", patience)
	// ErrSwitchover: somebody lets the migration complete.
	ErrSwitchover = errors.New("the migration goes on to the devices: a tracking migration must not complete")
)

// Filter reads the stream of a migration up to the end of its second pass, with
// the interval between the first and the second, and returns the pages that came
// again, each with heat 1. If the migration is cancelled after the interval, the
// set has what had come by then. A pipe is shrunk to its minimum; anything else
// is taken for a Unix socket, which holds more, so that the guest must be larger
// (ErrTooSmall).
func Filter(ctx context.Context, in stream.Pipe, interval time.Duration) (*workingset.Set, error) {
	f := &filter{ctx: ctx, in: in, interval: interval, holdPages: holdPages(minPipe)}
	if in.Capacity() == 0 {
		f.holdPages = holdPages(stream.SocketBuffer)
	}
	if p, ok := in.(interface{ SetReadTimeout(time.Duration) }); ok {
		p.SetReadTimeout(patience)
	}
	f.cur = stream.NewCursor(f, 128<<10)
	f.walk = ramparse.NewWalker(f.cur, 0, ramparse.Visitor{Frame: f.frame, Record: f.record})
	err := f.walk.RAM()
	if err == nil {
		err = ErrSwitchover // the device tail begins
	}
	switch {
	case errors.Is(err, errDone):
		return f.set, nil
	case errors.Is(err, stream.ErrTruncated) && ctx.Err() == nil:
		if f.held {
			return f.set, nil
		}
		return nil, fmt.Errorf("%w: %w", ErrEnded, err)
	}
	return nil, err
}

// errDone ends the reading when the third pass begins.
var errDone = errors.New("the second pass is over")

type filter struct {
	ctx      context.Context
	in       stream.Pipe
	interval time.Duration
	// holdPages are left of pass 1 when the hold begins.
	holdPages int64

	cur  *stream.Cursor
	walk *ramparse.Walker

	set    *workingset.Set
	seen   []bitmap.Bitmap // by block: pages sent at least once
	unseen int64
	early  []int // blocks whose first page came before the page size was known
	shrunk bool  // the pipe has been asked to shrink
	passes *ramparse.PassCounter
	held   bool
	piece  int // bytes read since the last pause
}

// Read is called by the cursor alone.
func (f *filter) Read(p []byte) (int, error) {
	if f.ctx.Err() != nil {
		return 0, context.Cause(f.ctx)
	}
	if f.held && f.piece >= pieceBytes {
		f.piece = 0
		time.Sleep(piecePause)
	}
	n, err := f.in.Read(p)
	if errors.Is(err, os.ErrDeadlineExceeded) {
		err = ErrSilent
	}
	f.piece += n
	return n, err
}

func (f *filter) frame(fr *stream.Frame) error {
	if fr.Kind == stream.CommandFrame && fr.Command.Number == stream.CommandPackaged {
		return ErrSwitchover
	}
	return nil
}

func (f *filter) record(d *ramparse.Decoder, rec *ramparse.Record) error {
	switch rec.Kind {
	case ramparse.Zero, ramparse.Page, ramparse.XBZRLE, ramparse.Compressed:
		return f.page(d, rec)
	}
	return nil
}

// start makes the set ready once blocks and page size are known. A record with
// address 0 can come before the page size is.
func (f *filter) start(d *ramparse.Decoder) error {
	su, size := d.Setup(), uint64(d.PageSize())
	var blocks []workingset.Block
	for _, b := range su.Blocks {
		n := int64(b.Used / size)
		blocks = append(blocks, workingset.Block{Name: b.Name, Pages: n})
		f.unseen += n
	}
	f.unseen -= min(f.unseen, int64(f.walk.Absent/size))
	// Before anything is allocated: the sizes are only claims.
	if f.unseen > maxPages {
		return stream.Damaged("ram setup", f.cur.Offset(), "%d pages", f.unseen)
	}
	if f.unseen < 2*f.holdPages {
		return fmt.Errorf("%w: %d pages, it needs %d", ErrTooSmall, f.unseen, 2*f.holdPages)
	}
	for _, b := range blocks {
		f.seen = append(f.seen, bitmap.New(b.Pages))
	}
	for _, b := range f.early {
		if f.seen[b].Set(0) {
			f.unseen--
		}
	}
	f.passes = ramparse.NewPassCounter(su, int(size))
	var err error
	f.set, err = workingset.New(int(size), blocks)
	return err
}

func (f *filter) page(d *ramparse.Decoder, rec *ramparse.Record) error {
	if d.PageSize() == 0 {
		// Only pages at address 0 can come before it is known.
		if len(f.early) < ramparse.MaxBlocks {
			f.early = append(f.early, rec.Block)
		}
		return nil
	}
	if f.set == nil {
		if err := f.start(d); err != nil {
			return err
		}
	}
	if f.passes.Add(rec.Block, rec.Page) && f.held && f.passes.Passes() > 2 {
		return errDone
	}
	if !f.seen[rec.Block].Set(int64(rec.Page)) {
		f.set.SetHeat(rec.Block, int64(rec.Page), 1)
		return nil
	}
	f.unseen--
	switch {
	case f.held:
	case f.unseen <= f.holdPages:
		return f.hold()
	case f.unseen <= 2*f.holdPages && (!f.shrunk || f.unseen%64 == 0 && f.in.Capacity() > minPipe):
		// From here the cursor takes no more than it needs and the pipe
		// shrinks; the kernel refuses while too much is in it, so it is tried
		// again.
		f.shrunk = true
		f.cur.SetReadAhead(0)
		f.in.SetCapacity(minPipe)
	}
	return nil
}

// hold lets the interval pass without reading.
func (f *filter) hold() error {
	select {
	case <-f.ctx.Done():
		return context.Cause(f.ctx)
	case <-time.After(f.interval):
	}
	f.held = true
	f.cur.SetReadAhead(minPipe)
	return nil
}
