package pipe

import (
	"bytes"
	"errors"
	"io"
	"os"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// writers are a Writer of each kind of file and the end that reads it.
func writers(t *testing.T) map[string]func() (*Writer, *os.File) {
	t.Helper()
	make := func(rf, wf *os.File) (*Writer, *os.File) {
		w, err := NewWriter(wf)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { w.Close(); wf.Close(); rf.Close() })
		return w, rf
	}
	return map[string]func() (*Writer, *os.File){
		"pipe": func() (*Writer, *os.File) {
			rf, wf, err := os.Pipe()
			if err != nil {
				t.Fatal(err)
			}
			return make(rf, wf)
		},
		"socket": func() (*Writer, *os.File) {
			fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
			if err != nil {
				t.Fatal(err)
			}
			return make(os.NewFile(uintptr(fds[0]), "reader"), os.NewFile(uintptr(fds[1]), "writer"))
		},
	}
}

// TestWriterWhole: what is longer than the pipe arrives whole.
func TestWriterWhole(t *testing.T) {
	want := bytes.Repeat([]byte("0123456789abcde\n"), 100_000)
	for name, open := range writers(t) {
		t.Run(name, func(t *testing.T) {
			w, r := open()
			wrote := make(chan error, 1)
			go func() {
				n, err := w.Write(want)
				if n != len(want) && err == nil {
					err = io.ErrShortWrite
				}
				wrote <- err
			}()
			got := make([]byte, len(want))
			if _, err := io.ReadFull(r, got); err != nil || !bytes.Equal(got, want) {
				t.Errorf("read: %v, equal: %v", err, bytes.Equal(got, want))
			}
			if err := <-wrote; err != nil {
				t.Error(err)
			}
		})
	}
}

// TestWriterDeadline: nobody reads, and the write ends all the same; with the
// deadline taken away it goes on.
func TestWriterDeadline(t *testing.T) {
	for name, open := range writers(t) {
		t.Run(name, func(t *testing.T) {
			w, r := open()
			big := make([]byte, 4<<20)
			wrote := make(chan int, 1)
			go func() {
				n, err := w.Write(big)
				if !errors.Is(err, os.ErrDeadlineExceeded) {
					t.Errorf("%d bytes written, %v", n, err)
				}
				wrote <- n
			}()
			time.Sleep(20 * time.Millisecond) // it waits by now
			if err := w.SetWriteDeadline(time.Unix(1, 0)); err != nil {
				t.Fatal(err)
			}
			n := <-wrote
			if n == 0 || n == len(big) {
				t.Fatalf("%d bytes written", n)
			}
			// One that lies ahead ends a write, too.
			if err := w.SetWriteDeadline(time.Now().Add(10 * time.Millisecond)); err != nil {
				t.Fatal(err)
			}
			k, err := w.Write(big)
			if !errors.Is(err, os.ErrDeadlineExceeded) {
				t.Errorf("%d bytes written, %v", k, err)
			}
			if err := w.SetWriteDeadline(time.Time{}); err != nil {
				t.Fatal(err)
			}
			go io.Copy(io.Discard, r)
			if _, err := w.Write(big); err != nil {
				t.Error(err)
			}
		})
	}
}

// TestWriterGone: a reader that is gone ends a write that waits.
func TestWriterGone(t *testing.T) {
	for name, open := range writers(t) {
		t.Run(name, func(t *testing.T) {
			w, r := open()
			wrote := make(chan error, 1)
			go func() {
				_, err := w.Write(make([]byte, 4<<20))
				wrote <- err
			}()
			time.Sleep(20 * time.Millisecond)
			r.Close()
			if err := <-wrote; !errors.Is(err, unix.EPIPE) && !errors.Is(err, unix.ECONNRESET) {
				t.Error(err)
			}
		})
	}
}
