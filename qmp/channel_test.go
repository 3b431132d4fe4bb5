package qmp

import (
	"bufio"
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
)

// carried is a fake QEMU's connection on which files may come: it keeps the last.
type carried struct {
	*client
	mu   sync.Mutex
	file *os.File
}

func (c *carried) Read(b []byte) (int, error) {
	oob := make([]byte, unix.CmsgSpace(4))
	n, oobn, _, _, err := c.Conn.(*net.UnixConn).ReadMsgUnix(b, oob)
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
func takesFiles(c *client) {
	k := &carried{client: c}
	c.lines.Reset(k)
	var named *os.File
	negotiated(func(c *client, cmd command) {
		switch cmd.Execute {
		case "getfd":
			if named = k.take(); named == nil {
				c.refuse(cmd, "GenericError", "No file descriptor supplied via SCM_RIGHTS")
				return
			}
		case "closefd":
			if named == nil {
				c.refuse(cmd, "GenericError", "not found")
				return
			}
			named.Close()
			named = nil
		case "migrate":
			if !strings.Contains(string(cmd.Args), "fd:"+passedName) {
				c.refuse(cmd, "GenericError", "unknown migration protocol")
				return
			}
			_, _ = named.WriteString("stream")
			named.Close()
			named = nil
		}
		c.reply(cmd, `{}`)
	})(c)
}

func TestPassedChannel(t *testing.T) {
	ctx := t.Context()
	for _, d := range []Direction{OneWay, TwoWay} {
		m := newFake(t, takesFiles).dial(Options{})
		ch, err := OpenChannel(ctx, m, d)
		if err != nil || ch.URI != "fd:"+passedName {
			t.Fatalf("%+v, %v", ch, err)
		}
		if err := Migrate(ctx, m, ch.URI); err != nil {
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
	refuses := newFake(t, negotiated(func(c *client, cmd command) { c.refuse(cmd, "GenericError", "no") })).dial(Options{})
	ours, theirs := net.Pipe()
	go func() {
		negotiated(func(*client, command) {})(&client{Conn: theirs, t: t, lines: bufio.NewReader(theirs)})
		theirs.Close()
	}()
	pipe, err := New(ctx, ours, "pipe", Options{})
	if err != nil {
		t.Fatal(err)
	}
	defer pipe.Close()
	if err := pipe.PassFile(ctx, "x", os.Stderr); !errors.Is(err, ErrNoFiles) {
		t.Errorf("no Unix socket: %v", err)
	}
	for _, x := range []Executor{&recorder{}, refuses, pipe} {
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
