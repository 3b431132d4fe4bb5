package lazy

import (
	"context"
	"errors"
	"fmt"
	"io"
	"sync/atomic"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/flic-migrate/flic-migrate/ramparse"
	"github.com/flic-migrate/flic-migrate/stream"
	"github.com/flic-migrate/flic-migrate/stream/returnpath"
	"github.com/flic-migrate/flic-migrate/tier/bitmap"
	"github.com/flic-migrate/flic-migrate/tier/checkpoint"
	"github.com/flic-migrate/flic-migrate/tier/rescue"
	"github.com/flic-migrate/flic-migrate/tier/source"
)

// pump owns everything that is written to QEMU and the record of it.
type pump struct {
	c     *checkpoint.Checkpoint
	out   io.Writer
	ramID uint32
	o     Options
	start time.Time

	blocks map[string]int
	sent   []bitmap.Bitmap
	none   map[int]bitmap.Bitmap // by block: pages that zeroRest leaves out
	buf    []byte
	named  int // block of the last record in buf; -1 at a section's start
	set    *source.Set
	cache  *source.Cache
	asked  *pages // that are demanded, and their neighbours
	rest   *pages // of batches, which wait for those in the middle of a run
	follow func(source.Need)
	// recent are the last demands, in a few places because there are several
	// vCPUs; faulted is when the last one came.
	recent  [4]demand
	faulted time.Time
	holding bool // hold is under way, so what is sent is what is learned
	turns   int  // of the last writes that waited, how many more have waited for a CPU than not
	wanted  int  // capacity of the pipe that was asked for last
	pipe    int  // and the one in force

	rep    Report
	waits  waits
	stored int64 // pages sent that are not zero
	total  int64
	tick   time.Time

	demands chan demand
	serving atomic.Bool // one of them is being answered
	// devices are opening.named, of which loadedDevices are known to be loaded; heard
	// is when QEMU has last said anything, in ns since start.
	devices       []string
	loadedDevices atomic.Int64
	heard         atomic.Int64
	// loaded is closed when QEMU has loaded the devices, at loadedAt.
	loaded   chan struct{}
	loadedAt time.Time
	ended    chan struct{} // closed when END is written
}

const (
	// keptSegments is how many decoded segments are kept beside those that are being
	// sent: a guest that touches a page touches its neighbours.
	keptSegments = 32
	// zeroChunk is how many pages zeroRest sends in one write, and zeroPause how
	// long it then waits: about as long as QEMU takes for them. A zero page's record
	// has 9 bytes, so a full pipe holds two thousand, behind which a demand would
	// wait for 7 ms.
	zeroChunk, zeroPause = 256, time.Millisecond
)

func newPump(c *checkpoint.Checkpoint, out io.Writer, op *opening, o Options, start time.Time) *pump {
	p := &pump{
		c: c, out: out, ramID: op.ramID, devices: op.named, o: o, start: start, named: -1,
		blocks: make(map[string]int), demands: make(chan demand, maxDemands),
		loaded: make(chan struct{}), ended: make(chan struct{}),
		set: c.Sources(),
		rep: Report{start: start, received: make(chan error, 1), shut: make(chan struct{})},
	}
	p.cache = c.NewCache(keptSegments + source.MaxNeeds*(allBatches+2))
	p.cache.CountRefills()
	p.asked, p.rest = newPages(c, p.set, p.cache), newPages(c, p.set, p.cache)
	for i, n := range c.Meta.BlockPages() {
		p.blocks[c.Meta.Blocks[i].Name] = i
		p.sent = append(p.sent, bitmap.New(int64(n)))
	}
	saved := c.Meta.Report
	p.total = saved.Hot + saved.Cold + saved.Disk + saved.Delta + saved.Unchanged
	if o.ZeroRest {
		p.total = 0
		for _, b := range p.sent {
			p.total += b.Pages()
		}
	}
	for i := range p.recent {
		p.recent[i].block = -1
	}
	return p
}

// leaveOut has zeroRest leave out what the guest has not plugged in, which may be many
// times its memory, and which a zero page would populate where pages are files'.
func (p *pump) leaveOut(unplugged []extent) {
	p.none = make(map[int]bitmap.Bitmap)
	for _, u := range unplugged {
		pages := p.sent[u.block].Pages()
		if _, ok := p.none[u.block]; !ok {
			p.none[u.block] = bitmap.New(pages)
		}
		first, size := int64(u.start)/int64(p.c.Meta.PageSize), int64(p.c.Meta.PageSize)
		for page := first; page < min(pages, first+int64(u.length)/size); page++ {
			p.none[u.block].Set(page)
			p.total--
		}
	}
}

// run serves until all pages are sent. What goes wrong in one goroutine cancels
// ctx, and so ends the others.
func (p *pump) run(ctx context.Context, cancel context.CancelCauseFunc, rd *returnpath.Reader) error {
	// The receiver is not waited for: it ends when its pipe does, at the
	// latest with the process.
	go func() {
		err := rescue.Call(func() error { return p.receive(ctx, rd) })
		p.rep.received <- err
		cancel(err)
	}()

	var g errgroup.Group
	start := func(fn func(context.Context) error) {
		g.Go(func() error {
			err := rescue.Call(func() error { return fn(ctx) })
			if err != nil {
				cancel(err)
			}
			return err
		})
	}
	ld := newLoader(p.c, p.set, p.cache, p.o.First, p.loaded, func() bool { return p.serving.Load() || len(p.demands) > 0 })
	p.follow = ld.follow
	start(ld.run)
	start(func(ctx context.Context) error { return p.serve(ctx, ld) })
	err := g.Wait()
	if err == nil {
		p.rep.Resident = time.Since(p.start)
	}
	// The receiver may still be at work, and writes loadedAt before it closes loaded.
	if p.devicesLoaded() && !p.loadedAt.IsZero() {
		p.rep.Loaded = p.loadedAt.Sub(p.start)
	}
	return err
}

func (p *pump) devicesLoaded() bool { return closed(p.loaded) }

func closed(c <-chan struct{}) bool {
	select {
	case <-c:
		return true
	default:
		return false
	}
}

// serve sends what the loader brings, and before it whatever is asked for.
func (p *pump) serve(ctx context.Context, ld *loader) error {
	// What QEMU's threads do with other pages would only keep it from loading
	// the devices, and the guest from running.
	if err := p.untilLoaded(ctx); err != nil {
		return err
	}
	for {
		if err := p.yield(ctx); err != nil {
			return err
		}
		select {
		case d := <-p.demands:
			if err := p.demanded(ctx, d); err != nil {
				return err
			}
		case b, ok := <-ld.batches:
			if !ok {
				return p.finish(ctx)
			}
			if err := p.batch(ctx, b); err != nil {
				return err
			}
			ld.done(b)
		case <-ctx.Done():
			return context.Cause(ctx)
		}
	}
}

// untilLoaded serves demands alone until QEMU has loaded the devices. Nor may
// the migration end before: a zero page that a device touches after END is asked
// for in vain, and QEMU waits for the device and the device for the page
// (migration/savevm.c, postcopy_ram_listen_thread waits for
// main_thread_load_event).
func (p *pump) untilLoaded(ctx context.Context) error {
	p.heard.Store(int64(time.Since(p.start)))
	look := time.NewTicker(p.o.LoadTime / 10)
	defer look.Stop()
	for !p.devicesLoaded() {
		select {
		case <-look.C:
			if time.Since(p.start)-time.Duration(p.heard.Load()) > p.o.LoadTime {
				return ErrNotLoaded
			}
		case d := <-p.demands:
			if err := p.demanded(ctx, d); err != nil {
				return err
			}
		case <-p.loaded:
		case <-ctx.Done():
			return context.Cause(ctx)
		}
	}
	return nil
}

// atDevice adds to QEMU's end, or its silence, at which device that was.
func (p *pump) atDevice(err error) error {
	at := int(p.loadedDevices.Load())
	if at >= len(p.devices) || p.devicesLoaded() || !errors.Is(err, ErrGone) && !errors.Is(err, ErrFailed) && !errors.Is(err, ErrNotLoaded) {
		return err
	}
	return fmt.Errorf("%w: it has not loaded the state of device %q", err, p.devices[at])
}

// yield writes what is there and serves the demands that have come.
func (p *pump) yield(ctx context.Context) error {
	if err := p.flush(); err != nil {
		return err
	}
	if err := ctx.Err(); err != nil {
		return context.Cause(ctx)
	}
	for {
		select {
		case d := <-p.demands:
			if err := p.demanded(ctx, d); err != nil {
				return err
			}
		default:
			return nil
		}
	}
}

// hold serves demands alone until the guest has been quiet for a while.
func (p *pump) hold(ctx context.Context) error {
	if p.o.HoldBackground <= 0 {
		return nil
	}
	p.holding = true
	defer func() { p.holding = false }()
	begin := time.Now()
	quiet := time.NewTimer(p.o.HoldBackground)
	defer quiet.Stop()
	beat := time.NewTicker(progressEvery)
	defer beat.Stop()
	for p.o.MaxHold <= 0 || time.Since(begin) < p.o.MaxHold {
		select {
		case d := <-p.demands:
			if err := p.demanded(ctx, d); err != nil {
				return err
			}
			quiet.Reset(p.o.HoldBackground)
		case <-quiet.C:
			return nil
		case <-beat.C:
			p.progress()
		case <-ctx.Done():
			return context.Cause(ctx)
		}
	}
	return nil
}

// batch sends the pages of a batch, looking for demands at every write.
func (p *pump) batch(ctx context.Context, b *batch) error {
	if b.hotEnd {
		p.rep.Hot = time.Since(p.start)
		p.rep.HotPages = p.rep.Pages
		return p.hold(ctx)
	}
	send := func(block int, page uint64, data []byte) error {
		if data == nil && !b.zero || p.sent[block].Has(int64(page)) {
			return nil
		}
		if err := p.append(block, page, data); err != nil || !p.full() {
			return err
		}
		return p.yield(ctx)
	}
	for _, r := range b.runs {
		for r.Count > 0 {
			n := uint64(0)
			for n < r.Count && !p.sent[r.Block].Has(int64(r.Page+n)) {
				n++
			}
			if n == 0 {
				r = r.From(1)
				continue
			}
			stretch := r
			stretch.Count = n
			if err := p.rest.read(ctx, stretch, send); err != nil {
				return err
			}
			r = r.From(n)
		}
	}
	if err := p.flush(); err != nil {
		return err
	}
	p.rest.rd.LetGo()
	return nil
}

// zeroRest sends all pages that have not been sent as zero, in pieces between
// which demands are answered: what a guest begins to use now is among them.
func (p *pump) zeroRest(ctx context.Context) error {
	pause := time.NewTimer(0)
	defer pause.Stop()
	n := 0
	for block, sent := range p.sent {
		none, left := p.none[block]
		for page := range sent.Pages() {
			if sent.Has(page) || left && none.Has(page) {
				continue
			}
			if err := p.append(block, uint64(page), nil); err != nil {
				return err
			}
			p.rep.ZeroRest++
			if n++; n%zeroChunk > 0 {
				continue
			}
			if err := p.flush(); err != nil {
				return err
			}
			pause.Reset(zeroPause)
			if err := p.serveUntil(ctx, pause.C); err != nil {
				return err
			}
		}
	}
	return p.flush()
}

// serveUntil serves demands alone until something comes from done.
func (p *pump) serveUntil(ctx context.Context, done <-chan time.Time) error {
	for {
		select {
		case d := <-p.demands:
			if err := p.demanded(ctx, d); err != nil {
				return err
			}
		case <-done:
			return nil
		case <-ctx.Done():
			return context.Cause(ctx)
		}
	}
}

// finish ends the migration.
func (p *pump) finish(ctx context.Context) error {
	if p.o.ZeroRest {
		if err := p.zeroRest(ctx); err != nil {
			return err
		}
	}
	if err := p.yield(ctx); err != nil {
		return err
	}
	b := stream.AppendEnd(nil, p.ramID)
	b = ramparse.AppendEOS(b)
	b = stream.AppendFooter(b, p.ramID)
	if err := p.write(stream.AppendEOF(b)); err != nil {
		return err
	}
	close(p.ended)
	return nil
}

func (p *pump) report() *Report {
	p.rep.WaitP50, p.rep.WaitP99, p.rep.WaitMax = p.waits.percentile(50), p.waits.percentile(99), p.waits.max
	p.rep.Reads = source.NewReads(p.cache.Filled(), p.stored, p.c.Meta.PageSize)
	return &p.rep
}
