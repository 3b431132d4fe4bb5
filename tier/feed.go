package tier

import (
	"encoding/binary"
	"io"
	"time"

	"github.com/flic-migrate/flic-migrate/stream"
)

// Pipe is what Save can use of its input besides reading, if it has it
// (package stream/pipe has).
type Pipe interface {
	io.Reader
	// Ready waits up to d and tells whether a Read would return at once.
	Ready(d time.Duration) bool
	// Capacity in bytes, 0 if it is no pipe; SetCapacity asks for another
	// and returns the one in force.
	Capacity() int
	SetCapacity(n int) int
}

const (
	minPipe     = 4 << 10
	defaultPipe = 64 << 10
	// releasedPipe is used once nothing needs to be held back: an unprivileged
	// process may have this much (/proc/sys/fs/pipe-max-size).
	releasedPipe = 1 << 20
	// shortestRecord is the shortest that a page can be in the stream: a ZERO
	// record with CONTINUE.
	shortestRecord = 9
)

// feed is the save's input. It keeps the device tail in QEMU's hands until the
// RAM is durable.
//
// Without a return path QEMU takes a migration for completed once the last
// device is in the pipe; whatever the save says afterwards is not heard. So
// what is in the pipe and in the cursor must never reach into the device tail
// by much. RAM ends no sooner than every page has come once, and each takes at
// least shortestRecord bytes, which bounds what can safely be read ahead and
// left in the pipe: a lot for most of the save, and less and less at its end.
type feed struct {
	in   io.Reader
	pipe Pipe // nil if in is not one
	cur  *stream.Cursor
	want int // capacity the pipe should have
	have int
}

// newFeed returns the feed and the cursor that reads from it.
func newFeed(in io.Reader) (*feed, *stream.Cursor) {
	f := &feed{in: in}
	f.cur = stream.NewCursor(f, 4*defaultPipe)
	if p, ok := in.(Pipe); ok && p.Capacity() > 0 {
		f.pipe, f.have = p, p.Capacity()
		f.want = f.have
		// Nothing is known yet of how much RAM is to come.
		f.cur.SetReadAhead(minPipe)
	}
	return f, f.cur
}

// Read is called by the cursor alone.
func (f *feed) Read(p []byte) (int, error) {
	n, err := f.in.Read(p)
	if f.want < f.have {
		// Now is when the pipe is emptiest. While more is in it than it is
		// to hold, the kernel refuses, and the next read tries again.
		f.have = f.pipe.SetCapacity(f.want)
	}
	return n, err
}

// adjust is told how many pages have not come yet.
func (f *feed) adjust(unseen uint64) {
	if f.pipe == nil || f.want == releasedPipe {
		return
	}
	budget := unseen * shortestRecord
	ahead := 0
	switch {
	case budget >= 4*defaultPipe:
		f.want, ahead = defaultPipe, defaultPipe
	case budget >= defaultPipe:
		// The pipe can be made smaller only when it is almost empty, so the
		// cursor goes on taking all there is.
		f.want, ahead = 16<<10, defaultPipe
	case budget >= 4*minPipe:
		f.want, ahead = minPipe, 2*minPipe
	default:
		f.want = minPipe
	}
	f.cur.SetReadAhead(ahead)
}

// release ends the holding back.
func (f *feed) release() {
	f.cur.SetReadAhead(-1)
	if f.pipe != nil {
		f.want = releasedPipe
		f.have = f.pipe.SetCapacity(releasedPipe)
	}
}

// ready waits up to d for more input or its end.
func (f *feed) ready(d time.Duration) bool {
	p, ok := f.in.(Pipe)
	return !ok || p.Ready(d)
}

func be32(b []byte) uint32 { return binary.BigEndian.Uint32(b) }
func be64(b []byte) uint64 { return binary.BigEndian.Uint64(b) }
