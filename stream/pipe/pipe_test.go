package pipe

import (
	"context"
	"errors"
	"io"
	"os"
	"testing"
	"time"
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
