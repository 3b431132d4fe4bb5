package loose_test

import (
	"bytes"
	"context"
	"errors"
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/flic-migrate/flic-migrate/tier/loose"
	"github.com/flic-migrate/flic-migrate/tier/vfs"
)

var (
	_ vfs.File = (*loose.Out)(nil)
	_ vfs.File = (*loose.In)(nil)
)

// TestOutWindow writes pieces of all sizes and reads at every offset: what is
// in the window is what was written, and the rest is gone.
func TestOutWindow(t *testing.T) {
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	read := make(chan []byte)
	go func() { b, _ := io.ReadAll(r); read <- b }()
	const window = 100
	o := loose.NewOut(w, window)
	rng := rand.New(rand.NewPCG(1, 1))
	var all []byte
	for _, n := range []int{1, 30, 0, 99, 100, 101, 7, 350, 64, 3} {
		b := make([]byte, n)
		for i := range b {
			b[i] = byte(rng.Uint32())
		}
		if got, err := o.Write(b); got != n || err != nil {
			t.Fatalf("write of %d: %d, %v", n, got, err)
		}
		all = append(all, b...)
		if size, err := o.Size(); err != nil || size != int64(len(all)) {
			t.Fatalf("size %d, %v; %d written", size, err, len(all))
		}
		for off := range len(all) + 2 {
			for _, want := range []int{1, 5, 99, 300} {
				got := make([]byte, want)
				n, err := o.ReadAt(got, int64(off))
				switch {
				case off < len(all)-window:
					if !errors.Is(err, loose.ErrGone) {
						t.Fatalf("offset %d of %d: %v", off, len(all), err)
					}
				case off > len(all) || off+want > len(all):
					if err != io.EOF {
						t.Fatalf("offset %d of %d: %v", off, len(all), err)
					}
				case n != want || err != nil:
					t.Fatalf("offset %d of %d: %d bytes, %v", off, len(all), n, err)
				}
				if off <= len(all) && !bytes.Equal(got[:n], all[off:off+n]) {
					t.Fatalf("offset %d of %d: other bytes", off, len(all))
				}
			}
		}
	}
	if err := o.Sync(); err != nil {
		t.Errorf("sync of a pipe: %v", err)
	}
	w.Close()
	if got := <-read; !bytes.Equal(got, all) {
		t.Error("the reader got something else")
	}
}

// TestOutFails hands on what the descriptor says.
func TestOutFails(t *testing.T) {
	full, err := os.OpenFile("/dev/full", os.O_WRONLY, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer full.Close()
	o := loose.NewOut(full, 10)
	if n, err := o.Write([]byte("x")); err == nil || n != 0 {
		t.Errorf("write: %d, %v", n, err)
	}
	if n, _ := o.Size(); n != 0 {
		t.Errorf("%d bytes after a write that failed", n)
	}
	for name, err := range map[string]error{
		"truncate": o.Truncate(0), "allocate": o.Allocate(0, 1), "lock": o.TryLock(vfs.Shared), "unlock": o.Unlock(),
	} {
		if !errors.Is(err, errors.ErrUnsupported) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// TestIn reads the rest of a file from its offset, and a pipe, in the same way.
func TestIn(t *testing.T) {
	content := []byte("a header of somebody's, then the image")
	const base = 24
	open := map[string]func(t *testing.T) *os.File{
		"file": func(t *testing.T) *os.File {
			name := filepath.Join(t.TempDir(), "f")
			if err := os.WriteFile(name, content, 0o600); err != nil {
				t.Fatal(err)
			}
			f, err := os.Open(name)
			if err == nil {
				_, err = f.Seek(base, io.SeekStart)
			}
			if err != nil {
				t.Fatal(err)
			}
			return f
		},
		"pipe": func(t *testing.T) *os.File {
			r, w, err := os.Pipe()
			if err != nil {
				t.Fatal(err)
			}
			w.Write(content[base:])
			w.Close()
			return r
		},
	}
	for name, open := range open {
		t.Run(name, func(t *testing.T) {
			spool := t.TempDir()
			f := open(t)
			defer f.Close()
			var head []byte
			if name == "pipe" { // somebody had to look at its beginning
				head = make([]byte, 4)
				if _, err := io.ReadFull(f, head); err != nil {
					t.Fatal(err)
				}
			}
			in, err := loose.NewIn(t.Context(), f, head, spool)
			if err != nil {
				t.Fatal(err)
			}
			want := content[base:]
			if n, err := in.Size(); err != nil || n != int64(len(want)) {
				t.Fatalf("size %d, %v", n, err)
			}
			for off := range len(want) + 2 {
				b := make([]byte, 5)
				n, err := in.ReadAt(b, int64(off))
				rest := want[min(off, len(want)):]
				if n != min(5, len(rest)) || !bytes.Equal(b[:n], rest[:n]) || (err != nil) != (n < 5) || err != nil && err != io.EOF {
					t.Errorf("offset %d: %q, %v", off, b[:n], err)
				}
			}
			if _, err := in.ReadAt(make([]byte, 1), -1); err == nil || err == io.EOF {
				t.Errorf("offset -1: %v", err)
			}
			if left, _ := os.ReadDir(spool); len(left) != 0 {
				t.Errorf("%v in the spool directory", left)
			}
			if err := in.Close(); err != nil {
				t.Error(err)
			}
			if _, err := in.Write([]byte("x")); !errors.Is(err, errors.ErrUnsupported) {
				t.Errorf("write: %v", err)
			}
		})
	}
	if _, err := loose.NewIn(t.Context(), open["pipe"](t), nil, filepath.Join(t.TempDir(), "missing")); err == nil {
		t.Error("a spool directory that is not there")
	}
}

// TestInCancelled: who waits for a pipe that nobody writes to any more hears of the end of its
// context, and leaves no copy.
func TestInCancelled(t *testing.T) {
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	defer w.Close()
	if _, err := w.WriteString("the beginning"); err != nil {
		t.Fatal(err)
	}
	cause := errors.New("told to stop")
	ctx, cancel := context.WithCancelCause(t.Context())
	time.AfterFunc(20*time.Millisecond, func() { cancel(cause) })
	spool := t.TempDir()
	if _, err := loose.NewIn(ctx, r, nil, spool); !errors.Is(err, cause) {
		t.Errorf("error %v", err)
	}
	if left, _ := os.ReadDir(spool); len(left) != 0 {
		t.Errorf("%v in the spool directory", left)
	}
}
