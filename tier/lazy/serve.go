package lazy

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"time"

	"github.com/flic-migrate/flic-migrate/stream/returnpath"
	"github.com/flic-migrate/flic-migrate/tier/checkpoint"
	"github.com/flic-migrate/flic-migrate/tier/source"
	"github.com/flic-migrate/flic-migrate/tier/workingset"
)

// Options of Serve and Recover.
type Options struct {
	// First gives the pages that earlier resumes asked for. They are sent in that
	// order, before everything but demands and the guest's page tables. Pages
	// outside the blocks are ignored. It is called once RUN is out, so that a long
	// list does not keep the guest; nil: none.
	First func() []workingset.PageRun
	// HoldBackground keeps everything but First and NVRAM back until the guest has
	// been quiet for this long (0: not at all), so that a first resume learns what
	// the guest touches.
	HoldBackground time.Duration
	// MaxHold ends HoldBackground's wait for a guest that never rests.
	MaxHold time.Duration
	// ZeroRest has every page that has not been sent by then sent as zero before
	// END, but for those of virtio-mem devices that the guest has not plugged in. QEMU
	// 10.2 and later need it: they say completed, and switch userfaultfd off later, with
	// their lock held, so whoever then touches a page that will never come waits for
	// ever. Earlier ones read such pages as zero. It takes QEMU 3 to 4 µs a page, so it
	// should be left out where the version says that it can.
	ZeroRest bool
	// Resize asks for another capacity of the pipe behind out and returns the
	// one in force. A page that the guest asks for waits for what is in the pipe,
	// so it is small while the guest asks. nil: the pipe is as it is.
	Resize func(bytes int) int
	// LoadTime is how long QEMU may say nothing while it loads the devices, or takes up
	// a recovery, which it does in milliseconds; 0 means 30 s. QEMU 10.2 and later, when they have failed to
	// load one, wait in silence for the end of the stream.
	LoadTime time.Duration
	// Begin is called when all is done that can fail without QEMU; may be nil. An
	// error ends the server. Only after it are in and out used.
	Begin func() error

	// Progress is called a few times a second, between two writes, so it must be
	// quick; may be nil. It stops when the server is held up, by a store that does
	// not answer or a QEMU that does not read.
	Progress func(Progress)
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
	ZeroRest  int64 `json:"zero_rest"` // pages sent as zero at the end (Options.ZeroRest)

	// Reads is how many places were read for the pages, of those sent that are not zero.
	Reads source.Reads `json:"reads"`

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

// ErrFailed: QEMU says that it could not load.
var ErrFailed = errors.New("QEMU reports that loading failed")

// ErrNotLoaded: QEMU has said nothing for Options.LoadTime that brings it nearer to a
// guest that runs.
var ErrNotLoaded = errors.New("QEMU does not go on loading")

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
	return serve(ctx, c, in, out, o, func(_ context.Context, p *pump, op *opening, _ *returnpath.Reader) error {
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
	return serve(ctx, c, in, out, o, func(ctx context.Context, p *pump, _ *opening, rd *returnpath.Reader) error {
		close(p.loaded) // or QEMU would not be in postcopy-paused
		return p.handshake(ctx, rd)
	})
}

// serve is Serve and Recover, which begin the conversation differently.
func serve(ctx context.Context, c *checkpoint.Checkpoint, in io.Reader, out io.Writer, o Options,
	hello func(context.Context, *pump, *opening, *returnpath.Reader) error) (*Report, error) {
	if err := Possible(c); err != nil {
		return nil, err
	}
	start := time.Now()
	op, err := newOpening(c)
	if err != nil {
		return nil, err
	}
	if o.LoadTime <= 0 {
		o.LoadTime = 30 * time.Second
	}
	p := newPump(c, out, op, o, start)
	if o.ZeroRest {
		p.leaveOut(op.unplugged)
	}
	if err := o.begin(); err != nil {
		return p.report(), err
	}
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	defer endWith(ctx, in, out)()
	rd := returnpath.NewReader(in)
	if err = hello(ctx, p, op, rd); err == nil {
		p.rep.Opening = time.Since(start)
		err = p.run(ctx, cancel, rd)
	}
	if errors.Is(err, os.ErrDeadlineExceeded) && ctx.Err() != nil {
		err = context.Cause(ctx)
	}
	return p.report(), p.atDevice(err)
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
