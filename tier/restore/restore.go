package restore

import (
	"context"
	"fmt"
	"io"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/flic-migrate/flic-migrate/ramparse"
	"github.com/flic-migrate/flic-migrate/tier/checkpoint"
	"github.com/flic-migrate/flic-migrate/tier/image"
	"github.com/flic-migrate/flic-migrate/tier/pagemap"
	"github.com/flic-migrate/flic-migrate/tier/progress"
)

// Options of an eager restore.
type Options struct {
	Workers  int                  // decompressing goroutines; 0: GOMAXPROCS
	Progress func(progress.State) // called a few times a second; may be nil
}

// Report is what an eager restore did.
type Report struct {
	BytesOut int64   `json:"bytes_out"` // of the stream
	Pages    int64   `json:"pages"`     // page records written
	Refetch  int64   `json:"refetched"` // segments that had to be decompressed again
	Seconds  float64 `json:"seconds"`
}

// Restore writes the checkpoint's migration stream to w: byte for byte the one
// that was saved if no page occurred in it twice, otherwise with each page's
// last version once, where the page first appeared. Each page is checked before
// it is written. After an error w has an incomplete stream, which QEMU refuses
// before the guest runs.
func Run(ctx context.Context, c *checkpoint.Checkpoint, w io.Writer, o Options) (Report, error) {
	start := time.Now()
	// A page whose source can't exist is found before the first byte goes
	// out.
	if err := c.PageMap.LoadAll(); err != nil {
		return Report{}, err
	}
	g, ctx := errgroup.WithContext(ctx)
	r := newReplayer(ctx, c, w, o)
	p := newPrefetcher(c, o.Workers)
	r.next = p.next
	g.Go(func() error { return p.plan(ctx) })
	for range p.workers {
		g.Go(func() error { return p.work(ctx) })
	}
	g.Go(func() error {
		if err := c.Skeleton(r); err != nil {
			return err
		}
		return r.flush()
	})
	err := g.Wait()
	r.rep.Seconds = time.Since(start).Seconds()
	r.rep.Refetch = p.refetched
	return r.rep, err
}

// replayer turns the skeleton's operations and the pages into the stream.
type replayer struct {
	ctx   context.Context
	c     *checkpoint.Checkpoint
	w     io.Writer
	o     Options
	next  func(ctx context.Context, before *access) (*access, error)
	buf   []byte
	rep   Report
	total int64

	block    int                                 // of the last record, for CONTINUE; -1 before the first
	at       *access                             // the segment of the last page from flash
	nvram    struct{ reads, first, last uint64 } // since slots were let go
	zeroPage []byte
	tick     time.Time
}

// outBuffer is what goes to QEMU in one write: as much as its pipe is asked to
// hold.
const outBuffer = 256 << 10

func newReplayer(ctx context.Context, c *checkpoint.Checkpoint, w io.Writer, o Options) *replayer {
	r := &replayer{ctx: ctx, c: c, w: w, o: o, block: -1, zeroPage: make([]byte, c.Meta.PageSize)}
	r.buf = make([]byte, 0, outBuffer)
	for _, n := range c.Meta.BlockPages() {
		r.total += int64(n)
	}
	return r
}

// Literal implements skeleton.Player.
func (r *replayer) Literal(b []byte) error {
	for len(b) > 0 {
		if err := r.room(1); err != nil {
			return err
		}
		n := min(len(b), cap(r.buf)-len(r.buf))
		r.buf = append(r.buf, b[:n]...)
		b = b[n:]
	}
	return nil
}

// Pages implements skeleton.Player.
func (r *replayer) Pages(block int, page, count uint64, named bool) error {
	for count > 0 {
		run, err := r.c.PageMap.Find(block, page)
		if err != nil {
			return err
		}
		run.Count = min(run.Count, count)
		if err := r.run(run, named); err != nil {
			return err
		}
		named = false
		page += run.Count
		count -= run.Count
	}
	return nil
}

func (r *replayer) run(run pagemap.Run, named bool) error {
	pageSize := uint64(r.c.Meta.PageSize)
	for i := range run.Count {
		// A record of a page whose block is not the last record's must carry
		// the name, even where the saved stream did not need it because of
		// records that are left out now.
		name := ""
		if named && i == 0 || run.Block != r.block {
			name = r.c.Meta.Blocks[run.Block].Name
		}
		r.block = run.Block
		// Largest head: be64, u8, name.
		if err := r.room(8 + 256 + r.c.Meta.PageSize + 64); err != nil {
			return err
		}
		addr := (run.Page + i) * pageSize
		value := run.First + i*run.Step
		var err error
		switch run.Kind {
		case pagemap.Fill:
			r.buf = ramparse.AppendZero(r.buf, name, addr, byte(value))
		case pagemap.ZeroData:
			r.buf = ramparse.AppendPage(r.buf, name, addr, r.zeroPage)
		case pagemap.NVRAM:
			err = r.nvramPage(run, i, name, addr, value)
		case pagemap.Flash:
			err = r.flashPage(name, addr, value)
		default:
			err = r.c.Image.Corrupt(image.Skeleton, 0, fmt.Errorf("places page %s, which was never saved", r.c.PageName(run.Block, run.Page+i)))
		}
		if err != nil {
			return err
		}
		r.rep.Pages++
		if r.rep.Pages%1024 == 0 {
			r.progress()
		}
	}
	return nil
}

// dropEvery is how many slots are read from NVRAM before they are let go. Mapped
// pages count as the process's memory as long as they are mapped.
const dropEvery = 1024

func (r *replayer) nvramPage(run pagemap.Run, i uint64, name string, addr, slot uint64) error {
	r.letGo(slot)
	return r.c.GuardNVRAM(func() error {
		b, err := r.c.NVRAMPage(slot, run.Block, run.Page+i)
		if err != nil {
			return err
		}
		r.buf = ramparse.AppendPage(r.buf, name, addr, b)
		return nil
	})
}

// letGo is told which slot is read next.
func (r *replayer) letGo(slot uint64) {
	if v := &r.nvram; v.reads > 0 && v.reads < dropEvery {
		v.reads, v.first, v.last = v.reads+1, min(v.first, slot), max(v.last, slot)
		return
	} else if v.reads > 0 {
		r.c.DropNVRAM(v.first, v.last-v.first+1)
	}
	r.nvram.reads, r.nvram.first, r.nvram.last = 1, slot, slot
}

func (r *replayer) flashPage(name string, addr, slot uint64) error {
	per := uint64(r.c.Image.SegmentPages)
	n, i := uint32(slot/per), int(slot%per)
	if r.at == nil || r.at.number != n {
		var err error
		if r.at, err = r.next(r.ctx, r.at); err != nil {
			return err
		}
	}
	segment := r.at.segment
	if segment.Kind == image.Records {
		b, err := segment.Record(i)
		if err != nil {
			return err
		}
		r.buf = ramparse.AppendCompressed(r.buf, name, addr, b)
		return nil
	}
	b, err := segment.Page(i)
	if err != nil {
		return err
	}
	r.buf = ramparse.AppendPage(r.buf, name, addr, b)
	return nil
}

func (r *replayer) room(n int) error {
	if cap(r.buf)-len(r.buf) >= n {
		return nil
	}
	return r.flush()
}

func (r *replayer) flush() error {
	if err := r.ctx.Err(); err != nil {
		return context.Cause(r.ctx)
	}
	n, err := r.w.Write(r.buf)
	r.rep.BytesOut += int64(n)
	r.buf = r.buf[:0]
	return err
}

func (r *replayer) progress() {
	if now := time.Now(); r.o.Progress != nil && now.Sub(r.tick) >= progress.Every {
		r.tick = now
		r.o.Progress(progress.State{Phase: "restore", Pages: r.rep.Pages, PagesAll: r.total, BytesOut: r.rep.BytesOut})
	}
}
