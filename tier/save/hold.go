package save

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/google/uuid"

	"github.com/flic-migrate/flic-migrate/ramparse"
	"github.com/flic-migrate/flic-migrate/stream"
	"github.com/flic-migrate/flic-migrate/tier/store"
)

// A save can be held: it reads the first pass over memory at a modest rate while the
// guest runs, and then reads no further, until it is told to go on. QEMU's migration
// thread waits in a write meanwhile, the guest runs, and QEMU keeps account of the
// pages that it writes. Who stops the guest and then lets the save go on gets a
// checkpoint of that moment for the cost of what was written since.
//
//	pass 1 ────────► first stop ─ ─ ─ ─ ─ ► held ─────────► rest of pass 1, pass 2, devices
//	at Hold.Rate     step by step, as far   in Hold.Wait    at full speed
//	                 as Hold.Later says
//	the guest runs   the guest runs         the guest runs  the guest stands still
//
// The hold must come before QEMU has nothing left to send of pass 1, as it then could
// see that it can finish, and stop the guest to do so. So as much of the pass must be
// left as does not fit into what takes bytes though nobody reads: the socket and
// QEMU's own buffer. Holding a page back before it is sent first loses nothing:
// QEMU clears its dirty log for a GiB at a time, with the first page sent of it.
//
// These could all be zero pages of 9 bytes, thousands of them, and mostly they are
// whole ones, a few dozen. So much is left at the first stop, where nothing but the
// stream is asked. From there Hold.Later can go on in steps, who asks QEMU how many
// pages it has not put into its buffers, and the parent which of them had content
// (Rest).

// Hold has a save held near the end of the first pass.
type Hold struct {
	// Rate bounds what is read up to the first stop, in bytes of the stream a second; 0: it
	// does not.
	Rate int64
	// Buffer is how many bytes of the stream the transport takes though nobody reads.
	Buffer int
	// Wide is how many it takes between Widen(true) and Widen(false). The latter is called in
	// any case, once, before the hold: early enough for all of them to have been read by then.
	// 0: it always takes Buffer.
	Wide  int
	Widen func(on bool) error
	// Absent is how many bytes of RAM are known to be listed and not to come; the stream
	// itself tells of some or of none of them. If there are more, pass 1 ends before the
	// hold, which is ErrNotHeld; if there are fewer, the hold comes earlier.
	Absent uint64
	// Hurry, once it is closed, takes the bound of Rate away. It may be nil.
	Hurry <-chan struct{}
	// Begun is called when it is known that enough pages are to come for a hold, with
	// the checkpoint that is in the making. An error ends the save. It may be nil.
	Begun func(ref store.Ref, id uuid.UUID) error
	// Later is asked at the first stop, and whenever what it allowed has been read, how many
	// bytes more of the stream can be read before the hold. If they are fewer than Rest.Need
	// the save is held here. An error ends the save. It is asked nothing if the save has no
	// parent, or if there is memory that is not to come. It may be nil.
	Later func(ctx context.Context, r Rest) (bytes int, err error)
	// Wait is called when nothing is read any more, and all that was placed is
	// durable. It returns when the save is to go on, with the guest's run state before
	// it was stopped, as Options.RunState, or with the reason why it is not to. It must
	// end with ctx.
	Wait func(ctx context.Context) (runState string, err error)
}

// Rest is what has not come of the first pass when Hold.Later is asked.
type Rest struct {
	Unseen   uint64 // pages that have not come; some of them are under way
	PageSize int    // in bytes
	Need     int    // how many bytes are read for one page, at most
	Buffer   int    // Hold.Buffer
	// stored is, by i, how many of the last i pages had content in the parent.
	stored []uint32
}

// Stored is how many of the last pages, in the order in which they come, had content in the
// parent; those after them, the very last, are not counted.
func (r Rest) Stored(last, after uint64) uint64 {
	most := uint64(len(r.stored) - 1)
	last = min(last, most)
	return uint64(r.stored[last] - r.stored[min(after, last)])
}

var (
	// ErrTooSmall: the guest's memory is too small for QEMU to be held.
	ErrTooSmall = errors.New("the guest has too little memory for a checkpoint to be armed")
	// ErrUncounted: nobody knows how many pages the first pass has.
	ErrUncounted = errors.New("QEMU leaves out memory that it lists and does not say how much, so a checkpoint can't be armed (the capability x-ignore-shared does that, and devices that this version does not know)")
	// ErrNotHeld: the first pass was over before it could be held.
	ErrNotHeld = errors.New("QEMU's first pass over memory has ended before it could be held; not all pages were in it")
)

const (
	// holdSpare is how many pages are left beyond what the buffers can hold. QEMU
	// takes a pass for finished as soon as what is left could be sent within
	// downtime-limit, at the rate that it has seen: 1 ms at 2 GB/s is half of it.
	holdSpare = 1024
	// paceEvery is how much is read between two looks at the clock, in bytes.
	paceEvery = 64 << 10
	// besidePage is more than what comes with a page's content until the next page's: its
	// header, the name of its block, and the end of a section and the head of another.
	besidePage = 512
)

// hold is a Hold at work. One goroutine, the save's, has it.
type hold struct {
	Hold
	cur  *stream.Cursor
	tx   func() *store.Tx
	left uint64 // pages of pass 1 that have not come when it holds
	wide uint64 // pages that can be under way until Widen(false); 0: it has been called
	done bool   // it has been held, or is not to be

	rest  Rest  // as Later was asked last; without stored: it was not
	taken int64 // bytes of the stream that have been read
	most  int64 // Later allows so many of them

	since time.Time // pacing began
	read  int64     // bytes, since then
}

func newHold(h Hold, cur *stream.Cursor, tx func() *store.Tx) *hold {
	n := &hold{Hold: h, cur: cur, tx: tx, left: ramparse.Underway(h.Buffer) + holdSpare}
	if h.Wide > 0 {
		n.wide = ramparse.Underway(h.Wide)
	}
	return n
}

// pending tells whether the save is still to be held. A nil hold is not.
func (h *hold) pending() bool { return h != nil && !h.done }

// start is called when it is known how many pages are to come, and of what size.
func (h *hold) start(unseen uint64, pageSize int) error {
	h.rest = Rest{PageSize: pageSize, Need: pageSize + besidePage, Buffer: h.Buffer}
	if unseen < 2*h.left {
		return fmt.Errorf("%w: it has %d pages, and needs %d", ErrTooSmall, unseen, 2*h.left)
	}
	if h.wide > 0 && unseen > 2*(h.left+h.wide) {
		if err := h.Widen(true); err != nil {
			return err
		}
	} else if err := h.narrow(); err != nil {
		return err
	}
	if h.Begun == nil {
		return nil
	}
	return h.Begun(h.tx().Ref(), h.tx().UUID())
}

// narrow has the transport take no more than Buffer from now on.
func (h *hold) narrow() error {
	if h.wide == 0 {
		return nil
	}
	h.wide = 0
	return h.Widen(false)
}

// near is told how many pages have not come yet, after each that has come first. When so few
// are left that all that can be under way would reach up to the hold, no more is to be: what
// waits then is read before the hold.
func (h *hold) near(unseen uint64) error {
	if unseen > h.left+h.wide {
		return nil
	}
	return h.narrow()
}

// reached is told how many pages have not come yet, after each that has come first,
// and tells whether now is the time to hold.
func (h *hold) reached(unseen uint64) bool {
	if unseen <= h.left {
		return h.taken+int64(h.rest.Need) > h.most
	}
	// What is read ahead must not reach beyond the hold: it would be out of QEMU's
	// hands. Half of the way is far enough until the next adjustment, unless that is
	// the last.
	if far := unseen - h.left; far <= 2*adjustEvery {
		h.cur.SetReadAhead(0)
	} else if far%adjustEvery == 0 {
		h.cur.SetReadAhead(int(min(far*ramparse.ShortestPage/2, paceEvery)))
	}
	return false
}

// further tells whether more is to be read before the hold.
func (s *saver) further() (bool, error) {
	h := s.parse.hold
	if h.Later == nil || s.par == nil || h.Absent > 0 || s.parse.walk.Absent > 0 {
		return false, nil
	}
	h.rest.Unseen = s.parse.unseen
	if h.rest.stored == nil {
		h.rest.stored = s.par.lastStored(s.meta.BlockPages(), s.parse.unseen)
	}
	n, err := h.Later(s.ctx, h.rest)
	h.most = h.taken + int64(n)
	return n >= h.rest.Need, err
}

// lastStored is Rest.stored, for up to most of the last pages of a save whose blocks have so
// many pages. What can't be read counts as none.
func (p *parent) lastStored(blocks []uint64, most uint64) []uint32 {
	list := append(make([]uint32, 0, most+1), 0)
	r := parentReader{parent: p}
	for b := len(blocks) - 1; b >= 0; b-- {
		for page := blocks[b]; page > 0 && uint64(len(list)) <= most; page-- {
			n := list[len(list)-1]
			if _, stored := r.find(b, page-1); stored {
				n++
			}
			list = append(list, n)
		}
	}
	return list
}

// took is told of bytes that have been read. A nil hold counts none.
func (h *hold) took(n int) {
	if h != nil {
		h.taken += int64(n)
	}
}

// pace waits after a read of n bytes for as long as Rate asks for.
func (h *hold) pace(ctx context.Context, n int) error {
	if h.Rate <= 0 || h.most > 0 {
		return nil
	}
	if h.since.IsZero() {
		h.since = time.Now()
	}
	if h.read += int64(n); h.read < paceEvery {
		return nil
	}
	ahead := time.Duration(float64(h.read)/float64(h.Rate)*float64(time.Second)) - time.Since(h.since)
	if ahead < time.Millisecond {
		if ahead < -time.Second {
			// What QEMU did not send is not made up for later.
			h.since, h.read = time.Time{}, 0
		}
		return nil
	}
	timer := time.NewTimer(ahead)
	defer timer.Stop()
	select {
	case <-timer.C:
	case <-h.Hurry:
		h.Rate = 0
	case <-ctx.Done():
		return context.Cause(ctx)
	}
	return nil
}

// hold lets the guest run until the save is to go on, unless more is to be read before.
// What comes then is the checkpoint, and so is its time.
func (s *saver) hold() error {
	h := s.parse.hold
	if more, err := s.further(); more || err != nil {
		return err
	}
	// All that can be done before the guest stands still.
	if s.match != nil {
		if err := s.match.drain(); err != nil {
			return err
		}
	}
	if err := s.out.sync(); err != nil {
		return err
	}
	s.tick("held", true)
	var state string
	err := s.prepareWhile(func() (err error) {
		state, err = h.Wait(s.ctx)
		return err
	})
	if err != nil {
		return err
	}
	h.done = true
	s.begin = time.Now()
	s.meta.Created, s.o.RunState = s.begin, state
	s.feed.release()
	return nil
}
