package save

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math/bits"
	"os"
	"time"

	"github.com/flic-migrate/flic-migrate/ramparse"
	"github.com/flic-migrate/flic-migrate/stream"
)

const (
	// minPipe is the smallest capacity a pipe can have.
	minPipe = 4 << 10
	// defaultPipe is what pipes hold if nobody asks for something else.
	defaultPipe = 64 << 10
	// maxPipe is half of what an unprivileged process may ask for
	// (/proc/sys/fs/pipe-max-size): what the cursor's buffer can take, so that
	// the pipe can be made smaller again.
	maxPipe = 512 << 10
	// maxAhead is the most that the cursor reads ahead of need: what of it was
	// read first should still be in the CPU's cache when it is looked at.
	maxAhead = 256 << 10
	// maxBudget is a number of pages that are to come which allows everything.
	maxBudget = 1 << 24
)

// feed is the save's input. It keeps the device tail in QEMU's hands until the
// RAM is durable.
//
// Without a return path QEMU takes a migration for completed once the last
// device is in the pipe; whatever the save says afterwards is not heard. So
// what is in the pipe and in the cursor must never reach into the device tail
// by much. RAM ends no sooner than every page has come that is certain to (see
// ahead), and each takes at least ramparse.ShortestPage bytes, which bounds what can
// safely be read ahead and left in the pipe: a lot for most of the save, and less and
// less at its end.
type feed struct {
	ctx  context.Context
	in   io.Reader
	pipe stream.Pipe // nil if in is not one
	cur  *stream.Cursor
	want int // capacity the pipe should have
	have int
	// pages is what adjust was told last, and sudden that it had fallen so far that the
	// pipe is far larger than it should be.
	pages  uint64
	sudden bool
	// released tells that nothing is held back any more.
	released bool

	silence time.Duration // Options.Silence
	waits   bool          // the source waits for our answer
	first   bool          // pages have come, and not every page once

	hold *hold // nil: the save is not held
}

// newFeed returns the feed and the cursor that reads from it.
func newFeed(ctx context.Context, in io.Reader, silence time.Duration) (*feed, *stream.Cursor) {
	f := &feed{ctx: ctx, in: in, silence: silence}
	f.cur = stream.NewCursor(f, 2*maxAhead)
	if p, ok := in.(stream.Pipe); ok && p.Capacity() > 0 {
		f.pipe, f.have = p, p.Capacity()
		f.want = f.have
		// Nothing is known yet of how much RAM is to come.
		f.cur.SetReadAhead(minPipe)
	}
	return f, f.cur
}

// Read is called by the cursor alone. It is where a save notices that it has
// been cancelled; a Read that waits for a source that sends nothing is the
// Pipe's to end.
func (f *feed) Read(p []byte) (int, error) {
	if f.ctx.Err() != nil {
		return 0, context.Cause(f.ctx)
	}
	if err := f.listen(); err != nil {
		return 0, err
	}
	n, err := f.in.Read(p)
	if errors.Is(err, os.ErrDeadlineExceeded) {
		err = f.silent()
	}
	if err == nil && f.hold.pending() {
		err = f.hold.pace(f.ctx, n)
	}
	for try := 1; err == nil && f.want < f.have; try++ {
		// Now is when the pipe is emptiest.
		if f.have = f.pipe.SetCapacity(f.want); f.have <= f.want {
			break
		}
		// The source was waiting to write and has been quicker: the kernel
		// refuses while more is in the pipe than it is to hold. A source that
		// is done with that write needs a moment for the next.
		if try == shrinkTries || n == len(p) || !f.pipe.Ready(0) {
			break
		}
		var more int
		more, err = f.in.Read(p[n:])
		n += more
	}
	f.hold.took(n)
	return n, err
}

// ErrSilent: the source sends nothing and does not end. Whatever it is, a guest may
// be standing still because of it.
var ErrSilent = errors.New("the source has sent nothing for too long")

// How long a source may be silent.
//
// One that waits for our answer must not be waited for without end. QEMU 10 and 11
// wait for our end of the return path, monitor dead and guest stopped, before they
// let go of a migration that was cancelled or failed, and we would wait for them.
// Amid the first pass over memory a sound QEMU always has something to send, and
// max-bandwidth, however small, lets some of it through each 100 ms. Before it the
// source may be getting ready. After it the disks of a stopped guest may be flushed,
// and with pause-before-switchover somebody else is waited for.
//
// One that does not wait for an answer closes the pipe when it gives up.
const (
	patienceInPass = 10 * time.Second
	patienceRound  = time.Minute
	patienceElse   = 10 * time.Minute
)

// patience is how long the source may be silent now.
func (f *feed) patience() time.Duration {
	switch {
	case f.silence > 0:
		return f.silence
	case f.waits && f.first:
		return patienceInPass
	case f.waits:
		return patienceRound
	}
	return patienceElse
}

// listen sees to it that the Read that follows waits no longer than patience. Where
// the input has no means of its own it is asked whether something comes; what can't
// be asked either waits as it does.
func (f *feed) listen() error {
	limit := f.patience()
	if in, ok := f.in.(interface{ SetReadTimeout(time.Duration) }); ok {
		in.SetReadTimeout(limit)
		return nil
	}
	in, ok := f.in.(stream.Pipe)
	if !ok {
		return nil
	}
	start := time.Now()
	if in.Ready(limit) {
		return nil
	}
	if f.ctx.Err() != nil {
		return context.Cause(f.ctx)
	}
	if time.Since(start) < limit {
		return nil // it was woken by something else; Read waits
	}
	return f.silent()
}

func (f *feed) silent() error { return fmt.Errorf("%w: %v", ErrSilent, f.patience()) }

// answered is called when the source has opened its return path: it waits for our
// word, and nothing needs to be held back.
func (f *feed) answered() {
	f.waits = true
	f.release()
}

// shrinkTries is how often one Read tries to make the pipe smaller. A source that
// does nothing but write, which QEMU is not, is quicker about every other time.
const shrinkTries = 16

// adjustEvery is how many new pages there are between two calls of adjust, if
// more than that are to come.
const adjustEvery = 128

// adjustAt tells whether the feed is to be adjusted when so many pages have
// not come yet: now and then, and near the end the more often.
func adjustAt(unseen uint64) bool {
	return unseen%adjustEvery == 0 || unseen < adjustEvery && bits.OnesCount64(unseen) == 1
}

// adjust is told how many pages are certain to come, at least whenever adjustAt
// says so.
func (f *feed) adjust(unseen uint64) {
	f.first = unseen > 0
	if f.pipe == nil || f.released {
		return
	}
	f.sudden = f.sudden || unseen+2*adjustEvery < f.pages
	f.pages = unseen
	pages := int(min(unseen, maxBudget))
	// What is certainly RAM of what comes, until the next call.
	sure := (pages - min(pages, adjustEvery, pages/2+1)) * ramparse.ShortestPage
	f.want = minPipe
	for f.want < maxPipe && sure >= enough(2*f.want) {
		f.want *= 2
	}
	if f.want > f.have {
		f.have = f.pipe.SetCapacity(f.want)
	}
	f.readAhead(sure)
}

// enough is how much must be certain to come for the pipe to hold n bytes: as much, half of
// that for the cursor, and what it takes to make the pipe smaller. A pipe of no more than
// that is left earlier: four times as much lets the source prevent it twice.
func enough(n int) int { return min(4*n, n+n/2+spare(n)) }

// spare is how much more than it holds must be certain to come before a pipe of n bytes is
// made smaller. Each time that this is tried the source may have written once more, and the
// pipe has to become smaller by half some times. This much was right for guests of all sizes
// (TestFeedHoldsBack), and one write less for each half was not.
func spare(n int) int { return sourceWrite * (1 + 3*bits.Len(uint(n/defaultPipe))) }

// sourceWrite is what QEMU writes at once.
const sourceWrite = 32 << 10

// readAhead sets how far the cursor reads ahead of need: never over the end of
// RAM. A pipe can be made smaller only when it is almost empty and only by a
// Read. So as long as it is to shrink the cursor takes what there is too much of, and one
// write that comes meanwhile; more would be missed when the next half has to go.
func (f *feed) readAhead(sure int) {
	ahead := sure
	if f.have > minPipe {
		ahead /= 2
	}
	f.sudden = f.sudden && f.have > f.want
	switch {
	case f.sudden:
		// A pipe that can hold a small machine's devices is worse than a
		// cursor that has some of them.
		ahead = max(ahead, f.have)
	case f.have < defaultPipe:
	case f.have > f.want:
		ahead = min(f.have, f.have-f.want+sourceWrite)
	default:
		ahead = max(0, min(ahead, sure-f.have-spare(f.have)))
	}
	f.cur.SetReadAhead(min(ahead, max(f.have, maxAhead)))
}

// release ends the holding back. How far is read ahead is the hold's to say, as long
// as there is to be one.
func (f *feed) release() {
	f.released, f.first = true, false
	if !f.hold.pending() {
		f.cur.SetReadAhead(maxAhead)
	}
	if f.pipe != nil {
		f.want = maxPipe
		f.have = f.pipe.SetCapacity(maxPipe)
	}
}

// ready waits up to d for more input or its end.
func (f *feed) ready(d time.Duration) bool {
	p, ok := f.in.(stream.Pipe)
	return !ok || p.Ready(d)
}

func be32(b []byte) uint32 { return binary.BigEndian.Uint32(b) }
