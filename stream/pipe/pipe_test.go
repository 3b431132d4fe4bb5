package pipe

import (
	"context"
	"errors"
	"io"
	"os"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

func testPipe(t *testing.T, ctx context.Context) (*Reader, *os.File) {
	t.Helper()
	rf, wf, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	r, err := New(ctx, int(rf.Fd()))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { r.Close(); rf.Close(); wf.Close() })
	return r, wf
}

func TestReadWaitsAndEnds(t *testing.T) {
	r, w := testPipe(t, context.Background())
	if r.Ready(0) {
		t.Fatal("an empty pipe is ready")
	}
	go func() {
		time.Sleep(20 * time.Millisecond)
		w.WriteString("stream")
		w.Close()
	}()
	got, err := io.ReadAll(r)
	if err != nil || string(got) != "stream" {
		t.Fatalf("read %q, %v", got, err)
	}
	if !r.Ready(0) {
		t.Error("the end of the input would make a Read wait")
	}
}

func TestCancelWakesRead(t *testing.T) {
	ctx, cancel := context.WithCancelCause(context.Background())
	r, _ := testPipe(t, ctx)
	cause := errors.New("told to stop")
	time.AfterFunc(20*time.Millisecond, func() { cancel(cause) })
	if n, err := r.Read(make([]byte, 10)); n != 0 || !errors.Is(err, cause) {
		t.Fatalf("Read = %d, %v; want 0 and the cause of the cancellation", n, err)
	}
}

// A socket's other direction belongs to somebody else, who may rely on its mode.
func TestSocket(t *testing.T) {
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(fds[0])
	ctx, cancel := context.WithCancelCause(context.Background())
	r, err := New(ctx, fds[0])
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	flags, err := unix.FcntlInt(uintptr(fds[0]), unix.F_GETFL, 0)
	if err != nil || flags&unix.O_NONBLOCK != 0 {
		t.Errorf("flags %#x, %v", flags, err)
	}
	if r.Capacity() != 0 {
		t.Errorf("capacity %d", r.Capacity())
	}
	time.AfterFunc(20*time.Millisecond, func() { unix.Write(fds[1], []byte("request")) })
	buf := make([]byte, 100)
	if n, err := r.Read(buf); err != nil || string(buf[:n]) != "request" {
		t.Errorf("read %q, %v", buf[:n], err)
	}
	cause := errors.New("told to stop")
	time.AfterFunc(20*time.Millisecond, func() { cancel(cause) })
	if n, err := r.Read(buf); n != 0 || !errors.Is(err, cause) {
		t.Errorf("Read = %d, %v", n, err)
	}
	unix.Close(fds[1])
	again, err := New(context.Background(), fds[0])
	if err != nil {
		t.Fatal(err)
	}
	defer again.Close()
	if n, err := again.Read(buf); n != 0 || err != io.EOF {
		t.Errorf("Read = %d, %v", n, err)
	}
}

// What is on the way to a reader that is slow stays about what was asked for.
func TestSetCapacity(t *testing.T) {
	var p, s [2]int // reading end, writing end
	if err := errors.Join(unix.Pipe2(p[:], unix.O_CLOEXEC), unix.SetNonblock(p[1], true)); err != nil {
		t.Fatal(err)
	}
	s, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
	if err != nil {
		t.Fatal(err)
	}
	for _, fds := range [][2]int{p, s} {
		defer unix.Close(fds[0])
		defer unix.Close(fds[1])
		for _, want := range []int{16 << 10, 64 << 10} {
			if n := SetCapacity(fds[1], want); n != want {
				t.Errorf("capacity %d, want %d", n, want)
			}
			held, buf := 0, make([]byte, 8<<10)
			for {
				n, err := unix.Write(fds[1], buf)
				if err != nil {
					break
				}
				held += n
			}
			if held < want/4 || held > want*3/2 {
				t.Errorf("held %d bytes, asked for %d", held, want)
			}
			for held > 0 {
				n, err := unix.Read(fds[0], buf)
				if err != nil {
					t.Fatal(err)
				}
				held -= n
			}
		}
	}
}

// A save's promise rests on this: a full pipe can't be shrunk at once, but it
// can after it has been read.
func TestCapacity(t *testing.T) {
	r, w := testPipe(t, context.Background())
	if c := r.Capacity(); c < 4096 {
		t.Fatalf("capacity %d", c)
	}
	if _, err := w.Write(make([]byte, 40<<10)); err != nil {
		t.Fatal(err)
	}
	if c := r.SetCapacity(4096); c < 40<<10 {
		t.Fatalf("capacity %d with 40 KiB in the pipe", c)
	}
	if _, err := io.ReadFull(r, make([]byte, 40<<10)); err != nil {
		t.Fatal(err)
	}
	if c := r.SetCapacity(4096); c != 4096 {
		t.Fatalf("capacity %d after the pipe was emptied", c)
	}
}

func TestRegularFile(t *testing.T) {
	f, err := os.CreateTemp(t.TempDir(), "")
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	f.WriteString("recorded")
	f.Seek(0, io.SeekStart)
	r, err := New(context.Background(), int(f.Fd()))
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	if r.Capacity() != 0 {
		t.Error("a file has a pipe's capacity")
	}
	if got, err := io.ReadAll(r); err != nil || string(got) != "recorded" {
		t.Fatalf("read %q, %v", got, err)
	}
}

// A Read gives up when nothing has come for long enough, also when it would rather
// gather more than little.
func TestReadTimeout(t *testing.T) {
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	defer w.Close()
	p, err := New(t.Context(), int(r.Fd()))
	if err != nil {
		t.Fatal(err)
	}
	defer p.Close()
	p.SetReadTimeout(30 * time.Millisecond)
	big := make([]byte, 1<<20)
	for i := range 2 {
		start := time.Now()
		if n, err := p.Read(big); n != 0 || !errors.Is(err, os.ErrDeadlineExceeded) {
			t.Fatalf("read of an empty pipe: %d, %v", n, err)
		}
		if d := time.Since(start); d < 30*time.Millisecond || d > 5*time.Second {
			t.Errorf("it took %v", d)
		}
		if i == 0 {
			w.Write([]byte("little"))
			if n, err := p.Read(big); n != 6 || err != nil {
				t.Fatalf("%d, %v", n, err)
			}
		}
	}
	p.SetReadTimeout(0)
	time.AfterFunc(50*time.Millisecond, func() { w.Close() })
	if n, err := p.Read(big); n != 0 || err != io.EOF {
		t.Errorf("without a bound: %d, %v", n, err)
	}
}
