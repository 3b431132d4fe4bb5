package stream

import (
	"io"
	"time"
)

// Pipe is what a reader of a live stream can use of its input besides reading, if
// the input has it (package stream/pipe has).
type Pipe interface {
	io.Reader
	// Ready waits up to d and tells whether a Read would return at once.
	Ready(d time.Duration) bool
	// Capacity in bytes, 0 if it is no pipe; SetCapacity asks for another
	// and returns the one in force.
	Capacity() int
	SetCapacity(n int) int
}

// SocketBuffer is how many bytes wait in a Unix socket though nobody reads, as Linux's
// net.core.wmem_default has it, which only the sender can change: that bound, and the
// last write that was let in below it (unix_stream_sendmsg in net/unix/af_unix.c).
const SocketBuffer = 248 << 10
