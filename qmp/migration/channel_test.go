package migration

import (
	"context"
	"errors"
	"io"
	"net"
	"os"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/flic-migrate/flic-migrate/qmp"
	"github.com/flic-migrate/flic-migrate/qmp/qmptest"
)

// carried is a fake QEMU's connection on which files may come: it keeps the last.
type carried struct {
	*qmptest.Conn
	mu   sync.Mutex
	file *os.File
}

func (c *carried) Read(b []byte) (int, error) {
	oob := make([]byte, unix.CmsgSpace(4))
	n, oobn, _, _, err := c.Conn.Conn.(*net.UnixConn).ReadMsgUnix(b, oob)
	if messages, e := unix.ParseSocketControlMessage(oob[:oobn]); e == nil && len(messages) == 1 {
		if fds, e := unix.ParseUnixRights(&messages[0]); e == nil && len(fds) == 1 {
			c.mu.Lock()
			c.file = os.NewFile(uintptr(fds[0]), "passed")
			c.mu.Unlock()
		}
	}
	if n == 0 && err == nil {
		err = io.EOF
	}
	return n, err
}

func (c *carried) take() *os.File {
	c.mu.Lock()
	defer c.mu.Unlock()
	f := c.file
	c.file = nil
	return f
}

// takesFiles serves like a QEMU that knows getfd: what it is sent over the file
// it was passed is "stream", once migrate comes.
func takesFiles(c *qmptest.Conn) {
	k := &carried{Conn: c}
	c.Lines.Reset(k)
	var named *os.File
	qmptest.Negotiated(func(c *qmptest.Conn, cmd qmptest.Command) {
		switch cmd.Execute {
		case "getfd":
			if named = k.take(); named == nil {
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
		ch, err := OpenChannel(ctx, x, TwoWay)
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

// A QEMU that never connects holds nobody up for longer than is wanted.
func TestListenChannelEnds(t *testing.T) {
	ch, err := ListenChannel(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Millisecond)
	defer cancel()
	if f, err := ch.Accept(ctx); f != nil || !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("%v, %v", f, err)
	}
	ch.Discard(t.Context())
	if _, err := ListenChannel(t.TempDir() + "/" + strings.Repeat("x", 120)); err == nil {
		t.Error("a directory that is not there")
	}
}
