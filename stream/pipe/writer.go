package pipe

import (
	"errors"
	"os"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"
)

// Writer writes to a pipe or a socket whose other end may stop reading. A Write
// that waits for it ends when its deadline passes: a plain write(2) would hang
// until the other end is gone, whatever this process is asked to do meanwhile. It
// is for one goroutine; SetWriteDeadline may be called from any.
//
// An os.File of Go's poller has deadlines, too, but wakes a waiting Write by way of
// the scheduler, which takes longer than poll(2) in the writing thread. A page
// that a guest waits for would come that much later.
type Writer struct {
	f        *os.File // kept, so that nobody closes the descriptor
	fd       int
	wake     int          // an eventfd: the deadline has changed
	deadline atomic.Int64 // Unix time in ns; 0: none
	socket   bool
}

// NewWriter returns a Writer of f, which stays the caller's to close. A pipe is
// set to non-blocking mode: its write end belongs to this process alone. A socket is
// left as it is. Close releases the Writer.
func NewWriter(f *os.File) (*Writer, error) {
	w := &Writer{f: f, fd: int(f.Fd())}
	_, err := unix.GetsockoptInt(w.fd, unix.SOL_SOCKET, unix.SO_TYPE)
	w.socket = err == nil
	if w.wake, err = unix.Eventfd(0, unix.EFD_CLOEXEC|unix.EFD_NONBLOCK); err != nil {
		return nil, err
	}
	if capacity(w.fd) > 0 {
		if err := unix.SetNonblock(w.fd, true); err != nil {
			unix.Close(w.wake)
			return nil, err
		}
	}
	return w, nil
}

// Close releases what NewWriter made; the file stays open. No Write and no
// SetWriteDeadline may be under way.
func (w *Writer) Close() error { return unix.Close(w.wake) }

// SetWriteDeadline has a Write that waits after t, also one that waits already,
// return os.ErrDeadlineExceeded. The zero time takes the deadline away.
func (w *Writer) SetWriteDeadline(t time.Time) error {
	var ns int64
	if !t.IsZero() {
		ns = t.UnixNano()
	}
	w.deadline.Store(ns)
	_, err := unix.Write(w.wake, []byte{1, 0, 0, 0, 0, 0, 0, 0})
	return err
}

// Write writes all of p, unless it returns an error.
func (w *Writer) Write(p []byte) (n int, err error) {
	for n < len(p) {
		k, err := w.put(p[n:])
		n += max(k, 0)
		switch {
		case err == nil, errors.Is(err, unix.EINTR):
		case errors.Is(err, unix.EAGAIN):
			if err := w.wait(); err != nil {
				return n, err
			}
		default:
			return n, &os.PathError{Op: "write", Path: w.f.Name(), Err: err}
		}
	}
	return n, nil
}

// put writes as much as there is room for, without waiting.
func (w *Writer) put(p []byte) (int, error) {
	if !w.socket {
		return unix.Write(w.fd, p)
	}
	return unix.SendmsgN(w.fd, p, nil, nil, unix.MSG_DONTWAIT|unix.MSG_NOSIGNAL)
}

// wait waits until there is room, or until the other end is gone, which the next
// write reports.
func (w *Writer) wait() error {
	fds := []unix.PollFd{{Fd: int32(w.fd), Events: unix.POLLOUT}, {Fd: int32(w.wake), Events: unix.POLLIN}}
	for {
		ms := -1
		if ns := w.deadline.Load(); ns != 0 {
			left := time.Until(time.Unix(0, ns))
			if left <= 0 {
				return os.ErrDeadlineExceeded
			}
			ms = int(min(left, time.Hour).Milliseconds()) + 1
		}
		_, err := unix.Poll(fds, ms)
		switch {
		case errors.Is(err, unix.EINTR):
		case err != nil:
			return err
		case fds[0].Revents != 0:
			return nil
		case fds[1].Revents != 0:
			var b [8]byte
			_, _ = unix.Read(w.wake, b[:])
		}
	}
}
