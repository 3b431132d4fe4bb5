package pipe

import (
	"context"
	"io/fs"
	"os"

	"golang.org/x/sys/unix"
)

// An Input is a Reader of what somebody has named: a file, a FIFO, a process's output as
// the shell names it. It is for one goroutine.
type Input struct {
	*Reader
	f *os.File
}

// Open opens it. Like a Read it waits for a FIFO's other end, and returns ctx's cause when
// that is done: open(2) would wait without hearing of it.
func Open(ctx context.Context, name string) (*Input, error) {
	fd, err := unix.Open(name, unix.O_RDONLY|unix.O_NONBLOCK|unix.O_NOCTTY|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, &fs.PathError{Op: "open", Path: name, Err: err}
	}
	f := os.NewFile(uintptr(fd), name)
	r, err := New(ctx, fd)
	if err != nil {
		f.Close()
		return nil, err
	}
	in := &Input{r, f}
	// One that nobody has opened for writing yet reads as if it had ended. Of a file there
	// is always something to read, or its end.
	if _, err := r.poll(r.timeout); err != nil {
		in.Close()
		return nil, err
	}
	return in, nil
}

// Name is what it was opened by.
func (in *Input) Name() string { return in.f.Name() }

// Close closes it.
func (in *Input) Close() error {
	err := in.Reader.Close()
	if cerr := in.f.Close(); err == nil {
		err = cerr
	}
	return err
}
