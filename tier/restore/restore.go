package restore

import (
	"context"
	"fmt"
	"io"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/flic-migrate/flic-migrate/ramparse"
	"github.com/flic-migrate/flic-migrate/tier/checkpoint"
	"github.com/flic-migrate/flic-migrate/tier/pagemap"
	"github.com/flic-migrate/flic-migrate/tier/progress"
	"github.com/flic-migrate/flic-migrate/tier/rescue"
	"github.com/flic-migrate/flic-migrate/tier/skeleton"
	"github.com/flic-migrate/flic-migrate/tier/source"
)

// Options of an eager restore.
type Options struct {
	Workers  int                  // decompressing goroutines; 0: GOMAXPROCS
	Progress func(progress.State) // called a few times a second; may be nil
	// Portable puts what every QEMU loads in the place of what some refuse; see
	// Portable.
	Portable bool
}

// Report is what an eager restore did.
type Report struct {
	BytesOut int64 `json:"bytes_out"` // of the stream
	Pages    int64 `json:"pages"`     // page records written
	Refetch  int64 `json:"refetched"` // segments that had to be decompressed again
	// Rewritten are records and commands that are not in the form in which they were
	// saved (Options.Portable).
	Rewritten int64 `json:"rewritten,omitempty"`
	// Reads is how many places were read for the pages; nil of a lazy restore.
	Reads   *source.Reads `json:"reads,omitempty"`
	Seconds float64       `json:"seconds"`
}

// Run writes the checkpoint's migration stream to w: byte for byte the one
// that was saved if no page occurred in it twice, otherwise with each page's
// last version once, where the page first appeared, and always with each page's
// content. Each page is checked before it is written. After an error w has an incomplete
// stream, which QEMU refuses before the guest runs.
func Run(ctx context.Context, c *checkpoint.Checkpoint, w io.Writer, o Options) (Report, error) {
	start := time.Now()
	if o.Portable {
		if err := Portable(c); err != nil {
			return Report{}, err
		}
	}
	// A page whose bytes can't be had is found before the first byte goes out.
	if err := c.PageMap.Runs(c.Readable); err != nil {
		return Report{}, err
	}
	g, ctx := errgroup.WithContext(ctx)
	set := c.Sources()
	p := newPrefetcher(c, set, o.Workers)
	r := newReplayer(ctx, c, w, o)
	r.pages = set.NewPlannedReader(p.cache, p.next)
	r.set = set
	ahead, stop := context.WithCancel(ctx)
	rescue.Go(g, func() error { return p.readDisksAhead(ahead) })
	rescue.Go(g, func() error { return p.plan(ctx) })
	for range p.workers {
		rescue.Go(g, func() error { return p.work(ctx) })
	}
	rescue.Go(g, func() error {
		defer stop()
		if err := r.play(); err != nil {
			return err
		}
		return r.flush()
	})
	err := g.Wait()
	r.rep.Seconds = time.Since(start).Seconds()
	r.rep.Refetch = p.cache.Refilled()
	reads := source.NewReads(p.cache.Filled(), r.stored, c.Meta.PageSize)
	r.rep.Reads = &reads
	return r.rep, err
}

// replayer turns the skeleton's operations and the pages into the stream.
type replayer struct {
	ctx   context.Context
	c     *checkpoint.Checkpoint
	w     io.Writer
	o     Options
	set   *source.Set
	pages *source.Reader
	buf   []byte
	rep   Report
	// stored are the pages so far that have bytes somewhere, total those of all blocks.
	stored, total int64

	block    int                                       // of the last record, for CONTINUE; -1 before the first
	run      pagemap.Run                               // that is being written
	named    bool                                      // its first record carries the block's name
	write    func(i, n uint64, c source.Content) error // r.records
	zeroPage []byte
	scratch  []byte // portable: a page that lies nowhere as it is
	tick     time.Time
}

// outBuffer is what goes to QEMU in one write: as much as its pipe is asked to
// hold.
const outBuffer = 256 << 10

func newReplayer(ctx context.Context, c *checkpoint.Checkpoint, w io.Writer, o Options) *replayer {
	r := &replayer{ctx: ctx, c: c, w: w, o: o, block: -1, zeroPage: make([]byte, c.Meta.PageSize)}
	if o.Portable {
		r.scratch = make([]byte, c.Meta.PageSize)
	}
	r.buf, r.write = make([]byte, 0, outBuffer), r.records
	for _, n := range c.Meta.BlockPages() {
		r.total += int64(n)
	}
	return r
}

// play plays the skeleton.
func (r *replayer) play() error {
	if !r.o.Portable {
		return r.c.Skeleton(r)
	}
	h := &head{Player: r, c: r.c}
	err := r.c.Skeleton(h)
	if err == nil {
		err = h.end()
	}
	r.rep.Rewritten += h.changed
	return err
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
		if !r.set.Row(run.Kind).Saved() {
			return fmt.Errorf("%w: places page %s, which was never saved", skeleton.ErrDamaged, r.c.PageName(block, page))
		}
		r.run, r.named = run, named
		if err := r.pages.Read(r.ctx, run, r.write); err != nil {
			return err
		}
		named = false
		page += run.Count
		count -= run.Count
	}
	return nil
}

// records writes the records of n pages, which hold the same, from the run's i-th on.
func (r *replayer) records(i, n uint64, c source.Content) error {
	size := r.c.Meta.PageSize
	name := ""
	// A record of a page whose block is not the last record's must carry
	// the name, even where the saved stream did not need it because of
	// records that are left out now.
	if r.named && i == 0 || r.run.Block != r.block {
		name = r.c.Meta.Blocks[r.run.Block].Name
	}
	r.block = r.run.Block
	if c.Form == source.Whole || c.Form == source.Deflated {
		r.stored += int64(n)
	}
	if r.o.Portable && (c.Form == source.Deflated || c.Form == source.Filled && c.Fill != 0) {
		if err := c.Copy(r.scratch); err != nil {
			return fmt.Errorf("page %s: %w", r.c.PageName(r.run.Block, r.run.Page+i), err)
		}
		c = source.Content{Form: source.Whole, Data: r.scratch}
		r.rep.Rewritten += int64(n)
	}
	for page := r.run.Page + i; page < r.run.Page+i+n; page++ {
		// Largest head: be64, u8, name.
		if err := r.room(8 + 256 + size + 64); err != nil {
			return err
		}
		addr := page * uint64(size)
		switch c.Form {
		case source.Filled:
			r.buf = ramparse.AppendZero(r.buf, name, addr, c.Fill)
		case source.Zeros:
			r.buf = ramparse.AppendPage(r.buf, name, addr, r.zeroPage)
		case source.Deflated:
			r.buf = ramparse.AppendCompressed(r.buf, name, addr, c.Data)
		default:
			r.buf = ramparse.AppendPage(r.buf, name, addr, c.Data)
		}
		name = ""
		if r.rep.Pages++; r.rep.Pages%1024 == 0 {
			r.progress()
		}
	}
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
