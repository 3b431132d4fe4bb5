package migration

import (
	"context"
	"errors"
	"fmt"
	"os"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/flic-migrate/flic-migrate/qmp"
)

// offer makes a stream ready and returns its place. If the monitor carries files, the
// server begins first: the guest need not wait for that, and a server that can't
// costs nothing but an error. Withdraw takes back what QEMU has refused.
func (o *ResumeOptions) offer(ctx context.Context, x qmp.Executor, lazy bool) (at place, withdraw func(), err error) {
	// A pipe if it is enough: an eager restore through a socket takes up to three
	// times as long.
	kind, direction := EagerServer, OneWay
	if lazy {
		kind, direction = LazyServer, TwoWay
	}
	p, ok := x.(qmp.FilePasser)
	if !ok || o.Serve == nil {
		return place{command: o.Command(kind)}, func() {}, nil
	}
	theirs, ours, err := newEnds(direction)
	if err != nil {
		return at, nil, err
	}
	defer theirs.Close()
	defer ours.Close()
	if err := p.PassFile(ctx, passedName, theirs); notCarried(err) {
		return place{command: o.Command(kind)}, func() {}, nil
	} else if err != nil {
		return at, nil, err
	}
	end, err := o.Serve(kind, ours)
	if err != nil {
		end = func() {}
	}
	withdraw = func() {
		end()
		takeBack(ctx, x, passedName)
	}
	if err == nil {
		ours.Close() // or the server's end would not be seen
		err = begun(ctx, theirs)
	}
	if err != nil {
		withdraw()
		return at, nil, err
	}
	return place{uri: "fd:" + passedName}, withdraw, nil
}

// beginTime is how long a server may take to open its store and write a first byte.
var beginTime = 2 * time.Minute

// begun waits until a migration stream begins in what QEMU has got to read.
func begun(ctx context.Context, in *os.File) error {
	ctx, cancel := context.WithTimeoutCause(ctx, beginTime, fmt.Errorf("%w: its server has written nothing within %v", ErrServer, beginTime))
	defer cancel()
	for ctx.Err() == nil {
		// QEMU has the same open file, whose mode is its own business.
		fds := []unix.PollFd{{Fd: int32(in.Fd()), Events: unix.POLLIN}}
		n, err := unix.Poll(fds, 20)
		if err != nil && !errors.Is(err, unix.EINTR) {
			return err
		}
		if n <= 0 {
			continue
		}
		magic, err := peek(int(in.Fd()), 4)
		switch {
		case errors.Is(err, unix.EAGAIN), errors.Is(err, unix.EINTR):
		case err != nil || len(magic) == 0 || !strings.HasPrefix("QEVM", string(magic)):
			return ErrServer
		case len(magic) == 4:
			return nil
		}
	}
	return context.Cause(ctx)
}

// peek returns the next up to n bytes of a pipe or a socket, and leaves them there.
func peek(fd, n int) ([]byte, error) {
	b := make([]byte, n)
	k, _, err := unix.Recvfrom(fd, b, unix.MSG_PEEK|unix.MSG_DONTWAIT)
	if !errors.Is(err, unix.ENOTSOCK) {
		return b[:max(k, 0)], err
	}
	var copied [2]int
	if err := unix.Pipe2(copied[:], unix.O_CLOEXEC); err != nil {
		return nil, err
	}
	defer unix.Close(copied[0])
	defer unix.Close(copied[1])
	m, err := unix.Tee(fd, copied[1], n, unix.SPLICE_F_NONBLOCK)
	if m <= 0 {
		return nil, err
	}
	k, err = unix.Read(copied[0], b)
	return b[:max(k, 0)], err
}
