package lazy

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"runtime"
	"sync/atomic"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/flic-migrate/flic-migrate/ramparse"
	"github.com/flic-migrate/flic-migrate/stream"
	"github.com/flic-migrate/flic-migrate/stream/postcopy"
	"github.com/flic-migrate/flic-migrate/stream/returnpath"
	"github.com/flic-migrate/flic-migrate/tier/bitmap"
	"github.com/flic-migrate/flic-migrate/tier/checkpoint"
	"github.com/flic-migrate/flic-migrate/tier/workingset"
)

// Options of Serve and Recover.
type Options struct {
	// First is sent before everything but demands and the guest's page tables:
	// pages that earlier resumes asked for, in that order. Pages outside the
	// blocks are ignored. It is called
	// once RUN is out, so that a long list does not keep the guest; nil: none.
	First func() []workingset.PageRun
	// HoldBackground keeps everything back that is neither in First nor in
	// NVRAM until the guest has asked for nothing for this long (0: not at
	// all), so that a first resume learns what the guest touches.
	HoldBackground time.Duration
	// MaxHold ends HoldBackground's wait for a guest that never rests.
	MaxHold time.Duration
	// ZeroRest has every page that has not been sent by then sent as zero before
	// END. QEMU 10.2 and later need it: they say completed, and switch userfaultfd
	// off later, with their lock held, so whoever then touches a page that will
	// never come waits for ever. Earlier ones read such pages as zero. It takes QEMU
	// 3 to 4 µs a page, so it should be left out where the version says that it can.
	ZeroRest bool
	// Resize asks for another capacity of the pipe behind out and returns the
	// one in force: small while the guest asks for pages, which wait for what
	// is in the pipe, and larger when it does not. nil: the pipe is as it is.
	Resize func(bytes int) int
	// Begin is called before the first byte is written, when all is done that can
	// fail without QEMU; may be nil. An error ends the server. Neither in nor out is
	// used before.
	Begin func() error

	// Progress is called a few times a second as long as nothing holds the
	// server up, such as a store that does not answer or a QEMU that does not
	// read; may be nil. It is called between two writes: it must not take long.
	Progress func(Progress)
	Log      *slog.Logger // nil: none
}

func (o *Options) begin() error {
	if o.Begin == nil {
		return nil
	}
	return o.Begin()
}

// Progress is how far a restore is.
type Progress struct {
	Running         bool  // the opening, RUN included, has been sent
	Pages, PagesAll int64 // sent, and to be sent
	Demands         int64
}

// Report is what a lazy restore did.
type Report struct {
	Pages     int64 `json:"pages"`     // sent
	BytesOut  int64 `json:"bytes_out"` // written to QEMU
	Demands   int64 `json:"demands"`   // pages asked for; two vCPUs that wait for one page ask twice
	Waited    int64 `json:"waited"`    // those of them that had not been sent when the request came
	Zero      int64 `json:"zero"`      // demands for pages without content
	HotPages  int64 `json:"hot_pages"` // page tables, First, and what was in NVRAM
	Recovered int64 `json:"recovered"` // pages that QEMU had already (Recover)
	ZeroRest  int64 `json:"zero_rest"` // pages sent as zero because nothing else had been (Options.ZeroRest)

	WaitP50 time.Duration `json:"wait_p50_ns"` // from a request's arrival until its page was written
	WaitP99 time.Duration `json:"wait_p99_ns"`
	WaitMax time.Duration `json:"wait_max_ns"`

	Opening  time.Duration `json:"opening_ns"`  // until RUN had been sent
	Loaded   time.Duration `json:"loaded_ns"`   // until QEMU had loaded the devices (Serve)
	Hot      time.Duration `json:"hot_ns"`      // until First and NVRAM had been sent
	Resident time.Duration `json:"resident_ns"` // until the last page had been sent
	Taken    time.Duration `json:"taken_ns"`    // until QEMU said that it has all (Wait); 0 if it did not

	// Touched are the pages that were waited for and the neighbours that were
	// sent with them, in that order: what the next resume's First should have.
	Touched []workingset.PageRun `json:"-"`

	start    time.Time
	received chan error    // why requests are no longer received
	shut     chan struct{} // closed when QEMU says that it has taken in all
}

// shutTime is how long QEMU may take, after the last byte has been written, to read
// what is in the pipe, to clean up, and to say that it is done.
const shutTime = 10 * time.Second

// ErrNoShut: QEMU has read everything, as far as can be seen, and has not said that
// its memory is whole.
var ErrNoShut = fmt.Errorf("QEMU has not said within %v that it has all memory: the guest may wait for pages for ever", shutTime)

// Wait waits, after a Serve or a Recover without an error, until QEMU has taken in
// everything, for shutTime at the most. A process that ends before that takes the
// return path away from a guest that touches a page which was never sent: QEMU's
// fault thread takes it for a broken migration and waits to be recovered, and the
// end of the migration waits for the fault thread (migration/postcopy-ram.c,
// postcopy_ram_incoming_cleanup).
//
// The error is QEMU's, or ErrGone if it ends without a word, ErrNoShut if it stays
// silent, ctx's cause: in each case nobody has said that the guest is whole.
func (r *Report) Wait(ctx context.Context) error {
	limit := time.NewTimer(shutTime)
	defer limit.Stop()
	var err error
	select {
	case <-r.shut:
	case err = <-r.received:
	case <-limit.C:
		err = ErrNoShut
	case <-ctx.Done():
		err = context.Cause(ctx)
	}
	// Whatever came after that word does no harm.
	if closed(r.shut) {
		r.Taken, err = time.Since(r.start), nil
	}
	return err
}

// ErrGone: QEMU closed its end before it had everything.
var ErrGone = errors.New("QEMU has closed the return path: it has ended or given up the restore")

// Serve restores c to the QEMU at the other ends of in (its return path) and
// out. It returns after the last byte is written; the caller then calls Report.Wait,
// and ends the process, because QEMU may wait for that.
// An error leaves QEMU in postcopy-paused if RUN had been sent, from where
// Recover goes on. Nothing but stream is written in any case.
//
// QEMU may stop reading, or never answer. So that ctx ends Serve then as well, in
// and out should have SetReadDeadline and SetWriteDeadline, as a net.Conn and a
// pipe.Writer do, or end with ctx by themselves, as a pipe.Reader does. After a
// Serve that ctx has ended their deadlines have passed.
func Serve(ctx context.Context, c *checkpoint.Checkpoint, in io.Reader, out io.Writer, o Options) (*Report, error) {
	return serve(ctx, c, in, out, o, func(p *pump, op *opening, _ *returnpath.Reader) error {
		return p.write(op.bytes)
	})
}

// Recover goes on where a Serve of the same checkpoint was cut off, after
// QEMU's migrate-recover. Nothing of the first server's state is needed: QEMU
// says what it has. Once the first byte is written, or a socket is connected, QEMU
// must hear everything up to RESUME or it crashes (migration/savevm.c,
// postcopy_pause_incoming), so all that can fail is done before, and then
// Options.Begin is called. Otherwise it is as Serve.
func Recover(ctx context.Context, c *checkpoint.Checkpoint, in io.Reader, out io.Writer, o Options) (*Report, error) {
	return serve(ctx, c, in, out, o, func(p *pump, _ *opening, rd *returnpath.Reader) error {
		close(p.loaded) // or QEMU would not be in postcopy-paused
		return p.handshake(rd)
	})
}

// serve is Serve and Recover, which begin the conversation differently.
func serve(ctx context.Context, c *checkpoint.Checkpoint, in io.Reader, out io.Writer, o Options,
	hello func(*pump, *opening, *returnpath.Reader) error) (*Report, error) {
	if err := Possible(c); err != nil {
		return nil, err
	}
	start := time.Now()
	op, err := newOpening(c)
	if err != nil {
		return nil, err
	}
	p := newPump(c, out, op.ramID, o, start)
	if err := o.begin(); err != nil {
		return p.report(), err
	}
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	defer endWith(ctx, in, out)()
	rd := returnpath.NewReader(in)
	if err = hello(p, op, rd); err == nil {
		p.rep.Opening = time.Since(start)
		err = p.run(ctx, cancel, rd)
	}
	if errors.Is(err, os.ErrDeadlineExceeded) && ctx.Err() != nil {
		err = context.Cause(ctx)
	}
	return p.report(), err
}

// endWith has the reads of in and the writes of out that wait end when ctx does,
// until release is called.
func endWith(ctx context.Context, in io.Reader, out io.Writer) (release func()) {
	passed := time.Unix(1, 0)
	ended := make(chan struct{})
	stop := context.AfterFunc(ctx, func() {
		defer close(ended)
		if r, ok := in.(interface{ SetReadDeadline(time.Time) error }); ok {
			_ = r.SetReadDeadline(passed)
		}
		if w, ok := out.(interface{ SetWriteDeadline(time.Time) error }); ok {
			_ = w.SetWriteDeadline(passed)
		}
	})
	return func() {
		if !stop() {
			<-ended // the caller may close both now
		}
	}
}

// handshake tells QEMU that the migration goes on and learns which pages it
// has (migration/savevm.c, loadvm_handle_recv_bitmap and
// loadvm_postcopy_handle_resume).
func (p *pump) handshake(rd *returnpath.Reader) error {
	for i, blk := range p.c.Meta.Blocks {
		// One by one: QEMU can't read on while its answer, which may be longer
		// than a pipe, waits to be read.
		if err := p.write(postcopy.AppendRecvBitmap(nil, blk.Name)); err != nil {
			return err
		}
		m, err := next(rd, returnpath.RecvBitmap)
		if err != nil {
			return err
		}
		if m.Block != blk.Name {
			return fmt.Errorf("QEMU sends the bitmap of RAM block %q, expected %q", m.Block, blk.Name)
		}
		// QEMU rounds up to whole 64-bit words. Of a bitmap that is shorter
		// the missing pages would be taken for missing in the guest, too, and
		// be sent twice.
		if err := p.sent[i].Fill(m.Bitmap); err != nil {
			return fmt.Errorf("QEMU sends for RAM block %q a %w", blk.Name, err)
		}
		p.rep.Recovered += p.sent[i].Count()
	}
	if err := p.write(postcopy.AppendResume(nil)); err != nil {
		return err
	}
	_, err := next(rd, returnpath.ResumeAck)
	return err
}

// next reads the message of the given type that must come next.
func next(rd *returnpath.Reader, want returnpath.Type) (returnpath.Message, error) {
	for {
		m, err := rd.Next()
		if err == io.EOF {
			err = ErrGone
		}
		if err != nil || m.Type == want {
			return m, err
		}
		// Requests may come before QEMU has read the command; it repeats
		// those that still matter after RESUME.
		if m.Type != returnpath.ReqPages && m.Type != returnpath.ReqPagesID {
			return m, fmt.Errorf("QEMU answers %v, expected %v", m.Type, want)
		}
	}
}

// demand is a page that QEMU asks for.
type demand struct {
	block int
	page  uint64
	at    time.Time
}

// pump owns everything that is written to QEMU and the record of it.
type pump struct {
	c     *checkpoint.Checkpoint
	out   io.Writer
	ramID uint32
	o     Options
	start time.Time

	blocks map[string]int
	row    row
	sent   []bitmap.Bitmap
	buf    []byte
	named  int // block of the last record in buf; -1 at a section's start
	fill   []byte

	pages  *pageSource
	follow func(segment uint32)
	// recent are the last demands, in a few places because there are several
	// vCPUs; faulted is when the last one came.
	recent  [4]demand
	faulted time.Time
	holding bool // hold is under way, so what is sent is what is learned
	wanted  int  // capacity of the pipe that was asked for last
	pipe    int  // and the one in force

	rep   Report
	waits waits
	total int64
	tick  time.Time

	demands chan demand
	serving atomic.Bool // one of them is being answered
	// loaded is closed when QEMU has loaded the devices, at loadedAt.
	loaded   chan struct{}
	loadedAt time.Time
	ended    chan struct{} // closed when END is written
}

const (
	// maxDemands bounds the requests that have arrived and were not looked
	// at: each of a guest's vCPUs and of QEMU's own threads waits for one
	// page, so this many never wait. Beyond it the return path is read later.
	maxDemands = 1024
	// askingPages and restingPages are how many pages go out in one write while the
	// guest asks for pages and when it does not. A demand waits for at most one
	// such write.
	askingPages, restingPages = 1, 8
	// askingPipe and restingPipe are the capacities of the pipe while the
	// guest asks for pages and when it does not. With the smaller one there are
	// more changes of context, and it takes half as long again until all memory is
	// there; with more than the larger one nothing is gained.
	askingPipe, restingPipe = 16 << 10, 64 << 10
	// asking is how long after a demand the guest is taken to be asking. Each time
	// that it begins again, a request waits for a full pipe.
	asking = 500 * time.Millisecond
	// drainStep is the time between two looks whether QEMU has read as much as
	// must be out of a pipe before it can be made smaller, and drainSteps how
	// many there are at the most: it reads on in less if it reads at all.
	drainStep, drainSteps = 50 * time.Microsecond, 20
	// near is how many pages, the demanded one among them, are sent together
	// as far as they cost no more decoding, and far how many if the guest
	// reads on; powers of two.
	near, far = 8, 64
	// zeroChunk is how many pages zeroRest sends in one write, and zeroPause how
	// long it then waits: about as long as QEMU takes for them. A zero page's record
	// has 9 bytes, so a full pipe holds two thousand, behind which a demand would
	// wait for 7 ms.
	zeroChunk, zeroPause = 256, time.Millisecond
)

func newPump(c *checkpoint.Checkpoint, out io.Writer, ramID uint32, o Options, start time.Time) *pump {
	if o.Log == nil {
		o.Log = slog.New(slog.DiscardHandler)
	}
	p := &pump{
		c: c, out: out, ramID: ramID, o: o, start: start, named: -1,
		blocks: make(map[string]int), demands: make(chan demand, maxDemands),
		loaded: make(chan struct{}), ended: make(chan struct{}),
		fill: make([]byte, c.Meta.PageSize), pages: newPageSource(c), row: newRow(c.Meta.BlockPages()),
		rep: Report{start: start, received: make(chan error, 1), shut: make(chan struct{})},
	}
	for i, n := range c.Meta.BlockPages() {
		p.blocks[c.Meta.Blocks[i].Name] = i
		p.sent = append(p.sent, bitmap.New(int64(n)))
	}
	p.total = c.Meta.Report.Hot + c.Meta.Report.Cold
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

// run serves until all pages are sent. What goes wrong in one goroutine cancels
// ctx, and so ends the others.
func (p *pump) run(ctx context.Context, cancel context.CancelCauseFunc, rd *returnpath.Reader) error {
	// The receiver is not waited for: it ends when its pipe does, at the
	// latest with the process.
	go func() {
		err := p.receive(ctx, rd)
		p.rep.received <- err
		cancel(err)
	}()

	var g errgroup.Group
	start := func(fn func(context.Context) error) {
		g.Go(func() error {
			err := fn(ctx)
			if err != nil {
				cancel(err)
			}
			return err
		})
	}
	ld := newLoader(p.c, p.o.First, p.loaded, func() bool { return p.serving.Load() || len(p.demands) > 0 })
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

// receive turns the return path's requests into demands.
func (p *pump) receive(ctx context.Context, rd *returnpath.Reader) error {
	for {
		m, err := rd.Next()
		if err == io.EOF {
			return ErrGone
		}
		if err != nil {
			return err
		}
		switch m.Type {
		case returnpath.Shut:
			if m.Value != 0 {
				return fmt.Errorf("QEMU reports that loading failed (SHUT %d)", m.Value)
			}
			if !closed(p.rep.shut) {
				close(p.rep.shut)
			}
			continue
		case returnpath.Pong:
			if m.Value == devicesLoaded && !p.devicesLoaded() {
				p.loadedAt = time.Now()
				close(p.loaded)
			}
			continue
		case returnpath.ReqPages, returnpath.ReqPagesID:
		default:
			continue
		}
		b, ok := p.blocks[m.Block]
		size := uint64(p.c.Meta.PageSize)
		first, n := m.Start/size, max(1, uint64(m.Length)/size)
		if !ok || m.Start%size != 0 || first >= p.c.PageMap.Pages(b) || n > p.c.PageMap.Pages(b)-first {
			return fmt.Errorf("QEMU asks for %d bytes at %s:%#x, which the checkpoint does not have", m.Length, m.Block, m.Start)
		}
		at := time.Now()
		for page := first; page < first+n; page++ {
			select {
			case p.demands <- demand{b, page, at}:
			case <-p.ended: // it reads as zero, as soon as QEMU has read END
			case <-ctx.Done():
				if !closed(p.ended) {
					return context.Cause(ctx)
				}
			}
		}
		// Otherwise this thread goes back to wait in poll(2), which Go's scheduler
		// notices late, and the pump has to be woken up on another.
		runtime.Gosched()
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
			if err := p.demanded(d); err != nil {
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
	for !p.devicesLoaded() {
		select {
		case d := <-p.demands:
			if err := p.demanded(d); err != nil {
				return err
			}
		case <-p.loaded:
		case <-ctx.Done():
			return context.Cause(ctx)
		}
	}
	return nil
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
			if err := p.demanded(d); err != nil {
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
			if err := p.demanded(d); err != nil {
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

// demanded answers a request.
func (p *pump) demanded(d demand) error {
	p.serving.Store(true)
	defer p.serving.Store(false)
	p.rep.Demands++
	p.faulted = time.Now()
	if p.sent[d.block].Has(int64(d.page)) {
		return nil // on its way, or another vCPU's request
	}
	if err := p.flush(); err != nil {
		return err
	}
	segment, err := p.pages.visit(d.block, d.page, func(block int, page uint64, data []byte) error {
		if data == nil {
			p.rep.Zero++
		}
		return p.append(block, page, data)
	})
	if err == nil {
		err = p.flush()
	}
	if err != nil {
		return err
	}
	p.rep.Waited++
	p.waits.add(time.Since(d.at))
	p.touch(d.block, d.page)
	return p.around(d, segment)
}

// around sends what lies near a demanded page, and has the loader go on there.
// Otherwise a guest that reads all its memory would be in front of the loader all
// the way and wait for each page. Guests do that in both directions: much of what
// Linux allocates in a row lies in descending order.
func (p *pump) around(d demand, segment int64) error {
	n, next := uint64(near), segment
	if !p.holding && p.devicesLoaded() {
		if was, ok := p.readsOn(d); ok {
			// By the time the guest is through with this, the next is there.
			n, next = far, segment+1
			if d.page < was.page {
				next = segment - 1
			}
		}
		if next >= 0 && segment >= 0 {
			p.follow(uint32(next))
		}
		copy(p.recent[1:], p.recent[:])
		p.recent[0] = d
	}
	err := p.pages.around(d.block, d.page, n, func(block int, page uint64, data []byte) error {
		if p.sent[block].Has(int64(page)) {
			return nil
		}
		// Whether the guest touches it can't be seen any more once it is sent.
		p.touch(block, page)
		if err := p.append(block, page, data); err != nil || !p.full() {
			return err
		}
		if n == far && len(p.demands) > 0 {
			return errStop // others wait for theirs
		}
		return p.flush()
	})
	if err != nil && err != errStop {
		return err
	}
	if err := p.flush(); err != nil {
		return err
	}
	p.pages.leave()
	return nil
}

// readsOn tells whether a demand is near a recent one, and which.
func (p *pump) readsOn(d demand) (demand, bool) {
	for _, r := range p.recent {
		if r.block == d.block && r.page < d.page+2*far && d.page < r.page+2*far {
			return r, true
		}
	}
	return demand{}, false
}

// asking tells whether the guest is taken to be asking for pages.
func (p *pump) asking() bool { return time.Since(p.faulted) < asking }

// resize makes the pipe fit for what the guest does.
func (p *pump) resize() {
	if p.o.Resize == nil {
		return
	}
	want := restingPipe
	if p.asking() {
		want = askingPipe
	}
	if want == p.wanted && p.pipe <= want {
		return
	}
	steps := 1 // the writes that follow ask again, once each
	if want != p.wanted {
		p.wanted, steps = want, drainSteps
	}
	// The kernel refuses while more is in it than it is to hold. What is to be
	// written now would have to wait for that, too.
	for i := range steps {
		if i > 0 {
			time.Sleep(drainStep)
		}
		if p.pipe = p.o.Resize(want); p.pipe <= want {
			return
		}
	}
}

func (p *pump) touch(block int, page uint64) {
	t := p.rep.Touched
	if n := len(t); n > 0 && t[n-1].Block == block && t[n-1].Page+t[n-1].Count == page {
		t[n-1].Count++
		return
	}
	if len(t) == workingset.MaxTouched {
		return
	}
	p.rep.Touched = append(t, workingset.PageRun{Block: block, Page: page, Count: 1})
}

// batch sends the pages of a batch, looking for demands at every write.
func (p *pump) batch(ctx context.Context, b *batch) error {
	if b.hotEnd {
		p.rep.Hot = time.Since(p.start)
		p.rep.HotPages = p.rep.Pages
		return p.hold(ctx)
	}
	send := p.send
	if b.zero {
		send = p.append
	}
	for _, r := range b.pages {
		block, page := p.row.page(r.page())
		for i := range r.count() {
			if p.sent[block].Has(int64(page + i)) {
				continue
			}
			if err := content(p.c, b.segment, p.fill, block, page+i, r.source(i), send); err != nil {
				return err
			}
			if p.full() {
				if err := p.yield(ctx); err != nil {
					return err
				}
			}
		}
	}
	return p.flush()
}

// send adds a page's record unless it has been sent or reads as zero anyway.
func (p *pump) send(block int, page uint64, data []byte) error {
	if data == nil || p.sent[block].Has(int64(page)) {
		return nil
	}
	return p.append(block, page, data)
}

// append adds a page's record; no data means zero.
func (p *pump) append(block int, page uint64, data []byte) error {
	if len(p.buf) == 0 {
		p.buf = stream.AppendPart(p.buf, p.ramID)
		p.named = -1
	}
	name := ""
	if block != p.named {
		name, p.named = p.c.Meta.Blocks[block].Name, block
	}
	addr := page * uint64(p.c.Meta.PageSize)
	if data == nil {
		p.buf = ramparse.AppendZero(p.buf, name, addr, 0)
	} else {
		p.buf = ramparse.AppendPage(p.buf, name, addr, data)
	}
	p.sent[block].Set(int64(page))
	p.rep.Pages++
	return nil
}

func (p *pump) full() bool {
	n := restingPages
	if p.asking() {
		n = askingPages
	}
	return len(p.buf) >= n*p.c.Meta.PageSize
}

// flush ends the open section and writes it.
func (p *pump) flush() error {
	if len(p.buf) == 0 {
		return nil
	}
	p.buf = ramparse.AppendEOS(p.buf)
	p.buf = stream.AppendFooter(p.buf, p.ramID)
	p.resize()
	err := p.write(p.buf)
	p.buf = p.buf[:0]
	p.progress()
	return err
}

func (p *pump) write(b []byte) error {
	n, err := p.out.Write(b)
	p.rep.BytesOut += int64(n)
	return err
}

// zeroRest sends all pages that have not been sent as zero, in pieces between
// which demands are answered: what a guest begins to use now is among them.
func (p *pump) zeroRest(ctx context.Context) error {
	pause := time.NewTimer(0)
	defer pause.Stop()
	n := 0
	for block, sent := range p.sent {
		for page := range sent.Pages() {
			if sent.Has(page) {
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
			if err := p.demanded(d); err != nil {
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

// progressEvery is the time between two calls of Options.Progress.
const progressEvery = 200 * time.Millisecond

func (p *pump) progress() {
	if p.o.Progress == nil {
		return
	}
	if now := time.Now(); now.Sub(p.tick) >= progressEvery {
		p.tick = now
		p.o.Progress(Progress{Running: true, Pages: p.rep.Pages + p.rep.Recovered, PagesAll: p.total, Demands: p.rep.Demands})
	}
}

func (p *pump) report() *Report {
	p.rep.WaitP50, p.rep.WaitP99, p.rep.WaitMax = p.waits.percentile(50), p.waits.percentile(99), p.waits.max
	return &p.rep
}
