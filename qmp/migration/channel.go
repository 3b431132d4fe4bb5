package migration

import (
	"cmp"
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/flic-migrate/flic-migrate/qmp"
	"github.com/flic-migrate/flic-migrate/stream"
)

// Channel carries the stream of one outgoing migration from QEMU into this
// process. Compared with an exec: child that is nothing to start, so it works
// where QEMU may start nothing (libvirt's -sandbox spawn=deny), needs no common
// user or directory, and ends with this process.
//
// It is opened before the migration; a migration to URI then feeds the stream
// that Accept returns.
type Channel struct {
	URI string
	// buffer is how many bytes of the stream wait, at most, though nobody reads.
	buffer int
	// wide is how many do after widen(true), until widen(false), which is the last call of it;
	// 0: neither is to be called.
	wide  int
	widen func(on bool) error
	// theirs and lives are ArmedStream's, if there are any.
	theirs, lives *os.File

	accept  func(context.Context) (*os.File, error)
	discard func(context.Context)
}

// Direction says what a Channel is for.
type Direction bool

// The directions.
const (
	// OneWay is for a reader that lets QEMU wait. If the channel is a pipe,
	// how much it holds is the reader's to say.
	OneWay Direction = false
	// TwoWay has a return path.
	TwoWay Direction = true
)

// OpenFunc opens a Channel from the QEMU at x.
type OpenFunc func(ctx context.Context, x qmp.Executor, d Direction) (*Channel, error)

// Accept waits until QEMU has connected, which it does during the command
// migrate, or after it. The file is the caller's. It may be called once.
func (c *Channel) Accept(ctx context.Context) (*os.File, error) { return c.accept(ctx) }

// Discard releases what Accept has not handed out. It is called in any case.
func (c *Channel) Discard(ctx context.Context) { c.discard(ctx) }

// OpenChannel is the OpenFunc for who has no better one: QEMU is given one end
// of a pipe or a socket pair if the monitor can carry it, and else the path of a
// socket in the temporary directory.
func OpenChannel(ctx context.Context, x qmp.Executor, d Direction) (*Channel, error) {
	p, ok := x.(qmp.FilePasser)
	if !ok {
		return ListenChannel(ctx, x, "")
	}
	c, err := passChannel(ctx, x, p, d)
	if notCarried(err) {
		return ListenChannel(ctx, x, "")
	}
	return c, err
}

// newEnds makes a pipe, or a pair of sockets if it is to have two ways.
func newEnds(d Direction) (reader, writer *os.File, err error) {
	var fds [2]int
	if d == TwoWay {
		fds, err = unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	} else {
		err = unix.Pipe2(fds[:], unix.O_CLOEXEC)
	}
	if err != nil {
		return nil, nil, err
	}
	return os.NewFile(uintptr(fds[0]), "migration stream"), os.NewFile(uintptr(fds[1]), "migration stream"), nil
}

// waiting is how many bytes wait in a Unix socket, whose sending end f is, though nobody
// reads. The kernel takes a write as long as what it has is below the bound, and in
// pieces of half of that, or of 36 KiB (unix_stream_sendmsg in net/unix/af_unix.c).
// It is 0 for what is no socket.
func waiting(f *os.File) int {
	n, err := unix.GetsockoptInt(int(f.Fd()), unix.SOL_SOCKET, unix.SO_SNDBUF)
	if err != nil {
		return 0
	}
	return n + min(n/2, 36<<10)
}

// setSendBuffer bounds what waits in a socket; the kernel takes the double of what it
// is told (socket(7)). The file may be closed at any time.
func setSendBuffer(f *os.File, n int) error {
	c, err := f.SyscallConn()
	if err != nil {
		return err
	}
	closed := c.Control(func(fd uintptr) { err = unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_SNDBUF, n/2) })
	return cmp.Or(closed, err)
}

// passedName is the channel's name in QEMU. One is enough, as QEMU runs one
// migration at a time, and a name used again releases what it meant before.
const passedName = "flic-migrate"

// notCarried tells whether PassFile has failed because files can't be passed, to
// this QEMU or over this monitor.
func notCarried(err error) bool {
	var refused *qmp.Error
	return errors.Is(err, qmp.ErrNoFiles) || errors.As(err, &refused)
}

// takeBack has QEMU close a file that it was passed, also when ctx has ended: that may be why.
func takeBack(ctx context.Context, x qmp.Executor, name string) {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), restoreTime)
	defer cancel()
	// Refused if a migration has taken it.
	_ = x.Execute(ctx, "closefd", map[string]any{"fdname": name}, nil)
}

func passChannel(ctx context.Context, x qmp.Executor, p qmp.FilePasser, d Direction) (*Channel, error) {
	return passEnds(ctx, x, p, func() (ours, theirs *os.File, err error) { return newEnds(d) })
}

// passEnds passes QEMU the second of the ends that are made; those that come with an error
// are closed.
func passEnds(ctx context.Context, x qmp.Executor, p qmp.FilePasser, ends func() (ours, theirs *os.File, err error)) (*Channel, error) {
	ours, theirs, err := ends()
	if err != nil {
		ours.Close() // that of a nil File does nothing
		theirs.Close()
		return nil, err
	}
	// Ours would hide QEMU's end.
	defer theirs.Close()
	if err := p.PassFile(ctx, passedName, theirs); err != nil {
		ours.Close()
		return nil, err
	}
	return &Channel{
		URI:    "fd:" + passedName,
		buffer: waiting(theirs),
		accept: func(context.Context) (*os.File, error) {
			f := ours
			ours = nil
			return f, nil
		},
		discard: func(ctx context.Context) {
			if ours == nil {
				return
			}
			ours.Close()
			takeBack(ctx, x, passedName)
		},
	}, nil
}

// ListenChannel returns a Channel that is a socket in dir, which QEMU must be
// able to reach under the same path; "" is the temporary directory. Both
// directions are possible.
//
// Who may connect is QEMU's user alone. The socket's path is no secret: the kernel
// shows it to everybody (/proc/net/unix), so whoever came first could give a stream
// of his own for the guest's.
func ListenChannel(ctx context.Context, x qmp.Executor, dir string) (*Channel, error) {
	// QEMU may be another user's: its directory can be passed, and not listed.
	dir, err := os.MkdirTemp(dir, "flic-")
	if err != nil {
		return nil, err
	}
	err = os.Chmod(dir, 0o711)
	var uid uint32
	if err == nil {
		uid, err = Owner(ctx, x, dir)
	}
	var l *net.UnixListener
	path := filepath.Join(dir, rand.Text())
	if err == nil {
		l, err = net.ListenUnix("unix", &net.UnixAddr{Name: path, Net: "unix"})
	}
	if err == nil {
		if err = os.Chmod(path, 0o666); err != nil {
			l.Close()
		}
	}
	if err != nil {
		os.RemoveAll(dir)
		return nil, fmt.Errorf("a socket for the migration stream: %w", err)
	}
	return &Channel{
		URI:     "unix:" + path,
		buffer:  stream.SocketBuffer,
		accept:  func(ctx context.Context) (*os.File, error) { return acceptFrom(ctx, l, uid) },
		discard: func(context.Context) { l.Close(); os.RemoveAll(dir) },
	}, nil
}

// errNoFile: QEMU's user can't be found out.
var errNoFile = errors.New("QEMU can't make a file in the temporary directory, by which it is told from others")

// Owner finds out which user QEMU is, whoever holds its monitor, and in whatever
// container it runs: it is asked for an empty file with a name that nobody else
// knows, in a directory in dir ("": the temporary directory) that nobody can list.
func Owner(ctx context.Context, x qmp.Executor, dir string) (uid uint32, err error) {
	// Of its own, because whoever may make a file may also replace a socket.
	dir, err = os.MkdirTemp(dir, "flic-")
	if err != nil {
		return 0, err
	}
	defer os.RemoveAll(dir)
	if err := os.Chmod(dir, 0o733); err != nil {
		return 0, err
	}
	path := filepath.Join(dir, rand.Text())
	// Of no memory at all, and so the same on every machine.
	if err := qmp.PMemSave(ctx, x, 0, 0, path); err != nil {
		return 0, fmt.Errorf("%w: %w", errNoFile, err)
	}
	fi, err := os.Lstat(path)
	if err != nil {
		return 0, fmt.Errorf("%w: %w", errNoFile, err)
	}
	return fi.Sys().(*syscall.Stat_t).Uid, nil
}

// acceptTime is how long QEMU may take to connect after it has been told to. It
// needs nothing but its main loop for it.
var acceptTime = 30 * time.Second

// acceptFrom waits for a connection of this user's, and ends all others.
func acceptFrom(ctx context.Context, l *net.UnixListener, uid uint32) (*os.File, error) {
	ctx, cancel := context.WithTimeoutCause(ctx, acceptTime, fmt.Errorf("QEMU has not connected within %v", acceptTime))
	defer cancel()
	stop := context.AfterFunc(ctx, func() { l.Close() })
	defer stop()
	for {
		conn, err := l.AcceptUnix()
		if ctx.Err() != nil {
			if err == nil {
				conn.Close()
			}
			return nil, context.Cause(ctx)
		}
		if err != nil {
			return nil, err
		}
		if peer, known := qmp.PeerOf(conn); known && peer.Uid == uid {
			defer conn.Close()
			return conn.File()
		}
		conn.Close()
	}
}
