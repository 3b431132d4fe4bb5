// Package pipe reads the pipe that QEMU's exec: transport gives its child as
// stdin, or a socket in its place. It adds to a plain read what a save needs: a read that can be
// cancelled, a look whether more bytes are there without taking them, and
// control over the pipe's capacity (fcntl(2), F_SETPIPE_SZ), which is part of
// how much of the stream QEMU believes to be delivered.
package pipe

import (
	"context"
	"errors"
	"io"
	"os"
	"time"

	"golang.org/x/sys/unix"
)

// Reader reads a file descriptor. It is for one goroutine; Cancel may be
// called from any.
type Reader struct {
	fd    int
	wake  [2]int // a pipe; closed for writing when ctx is done
	ctx   context.Context
	stop  func() bool
	drawn bool // the last Read took all there was
	most  int  // what the pipe can hold; 0 if it is not one
	// timeout is how long a Read waits for anything at all, in ms; -1: for ever.
	timeout int
	// socket is not set to non-blocking mode, because its other direction would
	// be, too.
	socket bool
}

const (
	// gather is how much Read would rather find than take what little there
	// is, and gatherWait for how long it then waits for more, at most twice.
	// A reader that is faster than QEMU and takes every 4 KiB as it comes
	// makes both sides wait for each other on every page; measured, that
	// halved the speed of a save. QEMU writes up to 64 pieces of memory at a
	// time, 128 KiB of pages with their headers.
	gather     = 128 << 10
	gatherWait = 30 * time.Microsecond
	// gatherLeast is the least that is worth waiting for: below it the pipe is
	// small, or what is asked for.
	gatherLeast = 32 << 10
)

// New returns a Reader of fd, which stays the caller's to close. Unless it is a
// socket, it is set to non-blocking mode: a pipe's read end belongs to this process
// alone. When ctx is done, a waiting Read returns its cause. Close releases the
// Reader.
func New(ctx context.Context, fd int) (*Reader, error) {
	r := &Reader{fd: fd, ctx: ctx, timeout: -1}
	_, err := unix.GetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_TYPE)
	r.socket = err == nil
	r.most = r.Capacity()
	if err := unix.Pipe2(r.wake[:], unix.O_CLOEXEC); err != nil {
		return nil, err
	}
	if !r.socket {
		if err := unix.SetNonblock(fd, true); err != nil {
			r.closeWake()
			return nil, err
		}
	}
	r.stop = context.AfterFunc(ctx, func() { unix.Close(r.wake[1]) })
	return r, nil
}

// Close releases what New made; the descriptor stays open.
func (r *Reader) Close() error {
	if r.stop() {
		unix.Close(r.wake[1])
	}
	return unix.Close(r.wake[0])
}

func (r *Reader) closeWake() {
	unix.Close(r.wake[0])
	unix.Close(r.wake[1])
}

// SetReadTimeout bounds how long a Read waits for anything to come. Then it returns
// os.ErrDeadlineExceeded. 0 takes the bound away.
func (r *Reader) SetReadTimeout(d time.Duration) {
	r.timeout = -1
	if d > 0 {
		r.timeout = int(max(d.Milliseconds(), 1))
	}
}

// Read reads what is there, up to len(p) bytes, and waits if there is nothing,
// or for a moment if there is little.
func (r *Reader) Read(p []byte) (int, error) {
	for {
		if err := r.ctx.Err(); err != nil {
			return 0, context.Cause(r.ctx)
		}
		// What would fill half of the room keeps nobody waiting.
		if want := min(gather, len(p)/2, r.most/2); r.drawn && want >= gatherLeast {
			if !r.gather(want) {
				return 0, r.silent()
			}
		}
		n, err := r.take(p)
		switch {
		case n > 0:
			r.drawn = n < len(p)
			return n, nil
		case err == nil:
			if len(p) == 0 {
				return 0, nil
			}
			return 0, io.EOF
		case errors.Is(err, unix.EAGAIN):
			ready, err := r.poll(r.timeout)
			if err != nil {
				return 0, err
			}
			if !ready {
				return 0, r.silent()
			}
		case errors.Is(err, unix.EINTR):
		default:
			return 0, err
		}
	}
}

// take reads without waiting.
func (r *Reader) take(p []byte) (int, error) {
	if !r.socket {
		return unix.Read(r.fd, p)
	}
	n, _, err := unix.Recvfrom(r.fd, p, unix.MSG_DONTWAIT)
	return n, err
}

// silent is why a Read waits no longer.
func (r *Reader) silent() error {
	if r.ctx.Err() != nil {
		return context.Cause(r.ctx)
	}
	return os.ErrDeadlineExceeded
}

// gather waits a little for as much as is wanted, and as long as it takes for anything
// at all. It is false if nothing came.
func (r *Reader) gather(want int) bool {
	if ready, err := r.poll(r.timeout); !ready {
		return err != nil && r.ctx.Err() == nil // the read that follows has the error
	}
	for range 2 {
		if n, err := unix.IoctlGetInt(r.fd, unix.TIOCINQ); err != nil || n >= want {
			return true
		}
		if r.ended() {
			return true
		}
		d := unix.NsecToTimespec(gatherWait.Nanoseconds())
		unix.Nanosleep(&d, nil)
	}
	return true
}

// ended tells whether nobody writes to the pipe any more.
func (r *Reader) ended() bool {
	fds := []unix.PollFd{{Fd: int32(r.fd), Events: unix.POLLIN}}
	n, err := unix.Poll(fds, 0)
	return err == nil && n > 0 && fds[0].Revents&unix.POLLHUP != 0
}

// Ready waits up to d for bytes or the end of the input, and tells whether a
// Read would return at once.
func (r *Reader) Ready(d time.Duration) bool {
	ready, _ := r.poll(int(d.Milliseconds()))
	return ready
}

func (r *Reader) poll(ms int) (ready bool, err error) {
	fds := []unix.PollFd{{Fd: int32(r.fd), Events: unix.POLLIN}, {Fd: int32(r.wake[0]), Events: unix.POLLIN}}
	for {
		_, err := unix.Poll(fds, ms)
		if errors.Is(err, unix.EINTR) {
			continue
		}
		if err != nil {
			return false, err
		}
		if fds[1].Revents != 0 {
			return false, context.Cause(r.ctx)
		}
		return fds[0].Revents != 0, nil
	}
}

// Capacity is the pipe's capacity in bytes; 0 if the input is not a pipe.
func (r *Reader) Capacity() int { return capacity(r.fd) }

func capacity(fd int) int {
	n, err := unix.FcntlInt(uintptr(fd), unix.F_GETPIPE_SZ, 0)
	if err != nil {
		return 0
	}
	return n
}

// SetCapacity asks for a capacity of n bytes (rounded up by the kernel to a
// power of two of at least 4 KiB) and returns the one in force. The kernel
// refuses to shrink a pipe below what is in it: try again after a Read.
func (r *Reader) SetCapacity(n int) int {
	unix.FcntlInt(uintptr(r.fd), unix.F_SETPIPE_SZ, n)
	r.most = r.Capacity()
	return r.most
}

// SetCapacity bounds what waits to be read from a pipe or a socket, whose writing
// end fd is, to about n bytes, and returns the bound in force. A pipe is as with
// Reader.SetCapacity; a socket takes any, and what it has already stays.
func SetCapacity(fd, n int) int {
	if capacity(fd) == 0 {
		// The kernel doubles it and counts its own overhead (socket(7)), but looks
		// at it before it takes a write, not after.
		unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_SNDBUF, n*3/8)
		return n
	}
	unix.FcntlInt(uintptr(fd), unix.F_SETPIPE_SZ, n)
	return capacity(fd)
}
