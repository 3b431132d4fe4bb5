package pipe

import (
	"context"
	"errors"
	"io"
	"os"
	"path/filepath"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// TestOpen: a FIFO is waited for, and all that is written to it comes; a file is read as
// any other.
func TestOpen(t *testing.T) {
	dir := t.TempDir()
	fifo, file := filepath.Join(dir, "fifo"), filepath.Join(dir, "file")
	if err := unix.Mkfifo(fifo, 0o600); err != nil {
		t.Fatal(err)
	}
	write := func(name string) {
		if err := os.WriteFile(name, []byte("stream"), 0o600); err != nil {
			t.Error(err)
		}
	}
	write(file)
	for _, name := range []string{fifo, file} {
		if name == fifo {
			time.AfterFunc(50*time.Millisecond, func() { write(fifo) })
		}
		in, err := Open(t.Context(), name)
		if err != nil {
			t.Fatal(err)
		}
		got, err := io.ReadAll(in)
		if err != nil || string(got) != "stream" || in.Name() != name {
			t.Errorf("%s: read %q, %v", in.Name(), got, err)
		}
		if err := in.Close(); err != nil {
			t.Error(err)
		}
	}
	if _, err := Open(t.Context(), filepath.Join(dir, "none")); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("what is not there: %v", err)
	}
}

// TestOpenCancelled: who waits for a FIFO that nobody writes to, or that nobody writes to
// any more, hears of the end of its context. A file's reader hears of it, too.
func TestOpenCancelled(t *testing.T) {
	fifo := filepath.Join(t.TempDir(), "fifo")
	if err := unix.Mkfifo(fifo, 0o600); err != nil {
		t.Fatal(err)
	}
	cause := errors.New("told to stop")
	cancelled := func() context.Context {
		ctx, cancel := context.WithCancelCause(t.Context())
		time.AfterFunc(20*time.Millisecond, func() { cancel(cause) })
		return ctx
	}
	if _, err := Open(cancelled(), fifo); !errors.Is(err, cause) {
		t.Errorf("nobody writes: %v", err)
	}
	w, err := os.OpenFile(fifo, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer w.Close()
	if _, err := w.WriteString("s"); err != nil {
		t.Fatal(err)
	}
	in, err := Open(cancelled(), fifo)
	if err != nil {
		t.Fatal(err)
	}
	defer in.Close()
	if got, err := io.ReadAll(in); string(got) != "s" || !errors.Is(err, cause) {
		t.Errorf("nobody writes on: %q, %v", got, err)
	}
	ctx := cancelled()
	zero, err := Open(ctx, "/dev/zero")
	if err != nil {
		t.Fatal(err)
	}
	defer zero.Close()
	if _, err := io.Copy(io.Discard, zero); !errors.Is(err, cause) {
		t.Errorf("what has no end: %v", err)
	}
}
