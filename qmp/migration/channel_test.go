package migration

import (
	"context"
	"errors"
	"io"
	"net"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/flic-migrate/flic-migrate/qmp"
	"github.com/flic-migrate/flic-migrate/qmp/qmptest"
)

// takesFiles serves like a QEMU that knows getfd: what it is sent over the file
// it was passed is "stream", once migrate comes.
func takesFiles(c *qmptest.Conn) {
	files := c.Files()
	var named *os.File
	qmptest.Negotiated(func(c *qmptest.Conn, cmd qmptest.Command) {
		switch cmd.Execute {
		case "getfd":
			if named = files.Take(); named == nil {
				c.Refuse(cmd, "GenericError", "No file descriptor supplied via SCM_RIGHTS")
				return
			}
		case "closefd":
			if named == nil {
				c.Refuse(cmd, "GenericError", "not found")
				return
			}
			named.Close()
			named = nil
		case "migrate":
			if !strings.Contains(string(cmd.Args), "fd:"+passedName) {
				c.Refuse(cmd, "GenericError", "unknown migration protocol")
				return
			}
			_, _ = named.WriteString("stream")
			named.Close()
			named = nil
		}
		c.Reply(cmd, `{}`)
	})(c)
}

func TestPassedChannel(t *testing.T) {
	ctx := t.Context()
	for _, d := range []Direction{OneWay, TwoWay} {
		m := dial(t, qmptest.New(t, takesFiles), qmp.Options{})
		ch, err := OpenChannel(ctx, m, d)
		if err != nil || ch.URI != "fd:"+passedName {
			t.Fatalf("%+v, %v", ch, err)
		}
		if err := Start(ctx, m, ch.URI); err != nil {
			t.Fatal(err)
		}
		f, err := ch.Accept(ctx)
		if err != nil {
			t.Fatal(err)
		}
		ch.Discard(ctx) // closes nothing that was handed out
		if b, err := io.ReadAll(f); string(b) != "stream" || err != nil {
			t.Errorf("%q, %v", b, err)
		}
		f.Close()

		// One that is not used is taken back.
		if ch, err = OpenChannel(ctx, m, d); err != nil {
			t.Fatal(err)
		}
		ch.Discard(ctx)
		if err := m.Execute(ctx, "closefd", map[string]any{"fdname": passedName}, nil); err == nil {
			t.Error("the file was left with QEMU")
		}
		m.Close()
	}
}

// makesFiles is an Executor whose QEMU makes the files that it is asked for.
type makesFiles struct{ qmp.Executor }

func (m makesFiles) Execute(ctx context.Context, name string, args, result any) error {
	if name != "pmemsave" {
		return m.Executor.Execute(ctx, name, args, result)
	}
	a := args.(map[string]any)
	if a["size"] != uint64(0) {
		return errors.New("memory of the guest's is to be written")
	}
	return os.WriteFile(a["filename"].(string), nil, 0o644)
}

func (m makesFiles) PassFile(ctx context.Context, name string, f *os.File) error {
	if p, ok := m.Executor.(qmp.FilePasser); ok {
		return p.PassFile(ctx, name, f)
	}
	return qmp.ErrNoFiles
}

// TestEndsFail: ends that could not be made as they were to be are closed.
func TestEndsFail(t *testing.T) {
	failed := errors.New("failed")
	for _, made := range []bool{true, false} {
		var list []*os.File
		_, err := passEnds(t.Context(), nil, nil, func() (ours, theirs *os.File, err error) {
			if !made {
				return nil, nil, failed
			}
			if ours, theirs, err = newEnds(TwoWay); err != nil {
				t.Fatal(err)
			}
			list = append(list, ours, theirs)
			return ours, theirs, failed
		})
		if !errors.Is(err, failed) {
			t.Errorf("made %v: %v", made, err)
		}
		for i, f := range list {
			if err := f.Close(); !errors.Is(err, os.ErrClosed) {
				t.Errorf("end %d is open", i)
			}
		}
	}
}

// A monitor that carries no files, for whatever reason, means a socket.
func TestListenChannel(t *testing.T) {
	t.Setenv("TMPDIR", t.TempDir())
	ctx := t.Context()
	refuses := dial(t, qmptest.New(t, qmptest.Negotiated(func(c *qmptest.Conn, cmd qmptest.Command) { c.Refuse(cmd, "GenericError", "no") })), qmp.Options{})
	ours, theirs := net.Pipe()
	go func() {
		qmptest.Negotiated(func(*qmptest.Conn, qmptest.Command) {})(qmptest.NewConn(t, theirs))
		theirs.Close()
	}()
	pipe, err := qmp.New(ctx, ours, "pipe", qmp.Options{})
	if err != nil {
		t.Fatal(err)
	}
	defer pipe.Close()
	if err := pipe.PassFile(ctx, "x", os.Stderr); !errors.Is(err, qmp.ErrNoFiles) {
		t.Errorf("no Unix socket: %v", err)
	}
	for _, x := range []qmp.Executor{&recorder{}, refuses, pipe} {
		ch, err := OpenChannel(ctx, makesFiles{x}, TwoWay)
		if err != nil {
			t.Fatal(err)
		}
		path, ok := strings.CutPrefix(ch.URI, "unix:")
		if !ok {
			t.Fatalf("URI %s", ch.URI)
		}
		conn, err := net.Dial("unix", path)
		if err != nil {
			t.Fatal(err)
		}
		f, err := ch.Accept(ctx)
		if err != nil {
			t.Fatal(err)
		}
		go conn.Write([]byte("stream"))
		b := make([]byte, 6)
		if _, err := io.ReadFull(f, b); string(b) != "stream" || err != nil {
			t.Errorf("%q, %v", b, err)
		}
		if _, err := f.WriteString("answer"); err != nil {
			t.Error(err)
		}
		if _, err := io.ReadFull(conn, b); string(b) != "answer" || err != nil {
			t.Errorf("%q, %v", b, err)
		}
		ch.Discard(ctx)
		f.Close()
		conn.Close()
	}
	if left, err := os.ReadDir(os.TempDir()); err != nil || len(left) > 0 {
		t.Errorf("left: %v, %v", left, err)
	}
}

// A QEMU that never connects holds nobody up for longer than is wanted, and one that
// makes no file is not waited for.
func TestListenChannelEnds(t *testing.T) {
	dir := t.TempDir()
	ch, err := ListenChannel(t.Context(), makesFiles{&recorder{}}, dir)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Millisecond)
	defer cancel()
	if f, err := ch.Accept(ctx); f != nil || !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("%v, %v", f, err)
	}
	ch.Discard(t.Context())

	defer func(was time.Duration) { acceptTime = was }(acceptTime)
	acceptTime = 20 * time.Millisecond
	if ch, err = ListenChannel(t.Context(), makesFiles{&recorder{}}, dir); err != nil {
		t.Fatal(err)
	}
	if f, err := ch.Accept(t.Context()); f != nil || err == nil || !strings.Contains(err.Error(), "has not connected") {
		t.Errorf("%v, %v", f, err)
	}
	ch.Discard(t.Context())

	if _, err := ListenChannel(t.Context(), &recorder{}, dir); !errors.Is(err, errNoFile) {
		t.Errorf("a QEMU that says yes and makes no file: %v", err)
	}
	if _, err := ListenChannel(t.Context(), &recorder{answers: map[string][]string{"pmemsave": {"timeout"}}}, dir); !errors.Is(err, errNoFile) {
		t.Errorf("a QEMU that can't make a file: %v", err)
	}
	if _, err := ListenChannel(t.Context(), makesFiles{&recorder{}}, dir+"/"+strings.Repeat("x", 120)); err == nil {
		t.Error("a directory that is not there")
	}
	if left, err := os.ReadDir(dir); err != nil || len(left) > 0 {
		t.Errorf("left: %v, %v", left, err)
	}
}

// Whoever connects first is not taken for QEMU: the stream of another user's process
// would become a checkpoint of the guest's.
func TestListenChannelStranger(t *testing.T) {
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: t.TempDir() + "/s", Net: "unix"})
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	conn, err := net.Dial("unix", l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	_, _ = conn.Write([]byte("QEVM and so on"))
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	// For a QEMU of another user's this process is a stranger.
	if f, err := acceptFrom(ctx, l, uint32(os.Getuid()+1)); f != nil || !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("%v, %v", f, err)
	}
	if _, err := conn.Read(make([]byte, 1)); err == nil {
		t.Error("the stranger is still connected")
	}
	// A process of its own user's is not.
	l2, err := net.ListenUnix("unix", &net.UnixAddr{Name: t.TempDir() + "/s", Net: "unix"})
	if err != nil {
		t.Fatal(err)
	}
	defer l2.Close()
	ours, err := net.Dial("unix", l2.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	defer ours.Close()
	f, err := acceptFrom(t.Context(), l2, uint32(os.Getuid()))
	if err != nil {
		t.Fatal(err)
	}
	f.Close()
}
