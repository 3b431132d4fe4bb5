// Package qmptest has a QEMU's monitor for tests: a socket that greets, negotiates
// and then answers what the test says.
package qmptest

import (
	"bufio"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// Greeting is what a QEMU says first.
const Greeting = `{"QMP": {"version": {"qemu": {"micro": 22, "minor": 2, "major": 7}, "package": "test"}, "capabilities": ["oob"]}}` + "\r\n"

// QEMU is the other end of a monitor: a listening socket and what it does with
// each connection.
type QEMU struct {
	Addr string
}

// Conn is one connection to a QEMU.
type Conn struct {
	net.Conn
	t     *testing.T
	Lines *bufio.Reader
}

// Command is one command that has come.
type Command struct {
	Execute string          `json:"execute"`
	OOB     string          `json:"exec-oob"`
	Args    json.RawMessage `json:"arguments"`
	ID      uint64          `json:"id"`
}

// NewConn is the other end of one connection.
func NewConn(t *testing.T, conn net.Conn) *Conn {
	return &Conn{Conn: conn, t: t, Lines: bufio.NewReader(conn)}
}

// New serves each connection with serve, from the greeting on, until the
// test ends.
func New(t *testing.T, serve func(*Conn)) *QEMU {
	t.Helper()
	l, err := net.Listen("unix", filepath.Join(t.TempDir(), "qmp"))
	if err != nil {
		t.Fatal(err)
	}
	return Serve(t, l, serve)
}

// Serve is New on a listener, which it closes.
func Serve(t *testing.T, l net.Listener, serve func(*Conn)) *QEMU {
	t.Helper()
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		for {
			conn, err := l.Accept()
			if err != nil {
				return
			}
			serve(NewConn(t, conn))
			conn.Close()
		}
	}()
	t.Cleanup(func() {
		l.Close()
		select {
		case <-ended:
		case <-time.After(10 * time.Second):
			t.Error("the fake QEMU does not end: is the Monitor closed?")
		}
	})
	return &QEMU{Addr: l.Addr().String()}
}

// Negotiated serves a connection with answer after a proper negotiation; answer
// gets each command and writes what it likes.
func Negotiated(answer func(*Conn, Command)) func(*Conn) {
	return func(c *Conn) {
		c.Send(Greeting)
		for {
			cmd, ok := c.Next()
			if !ok {
				return
			}
			if cmd.Execute == "qmp_capabilities" {
				c.Reply(cmd, `{}`)
				continue
			}
			answer(c, cmd)
		}
	}
}

// Next is the next command; false at the end of the connection.
func (c *Conn) Next() (Command, bool) {
	var cmd Command
	line, err := c.Lines.ReadString('\n')
	if err != nil {
		return cmd, false
	}
	if err := json.Unmarshal([]byte(line), &cmd); err != nil {
		c.t.Errorf("a command that is no JSON: %q", line)
		return cmd, false
	}
	return cmd, true
}

// Send ignores errors: the tests end connections at every possible moment.
func (c *Conn) Send(s string) { _, _ = c.Write([]byte(s)) }

// Reply answers a command with a JSON value.
func (c *Conn) Reply(cmd Command, value string) {
	c.Send(fmt.Sprintf(`{"return": %s, "id": %d}`+"\r\n", value, cmd.ID))
}

// Refuse answers a command with an error.
func (c *Conn) Refuse(cmd Command, class, desc string) {
	c.Send(fmt.Sprintf(`{"error": {"class": %q, "desc": %q}, "id": %d}`+"\r\n", class, desc, cmd.ID))
}

// Event sends an event.
func (c *Conn) Event(name string) {
	c.Send(fmt.Sprintf(`{"timestamp": {"seconds": 1, "microseconds": 2}, "event": %q, "data": {"n": 3}}`+"\r\n", name))
}

// Mention fails the test unless err says each of the words.
func Mention(t *testing.T, err error, words ...string) {
	t.Helper()
	if err == nil {
		t.Fatalf("no error; want one about %q", words)
	}
	for _, w := range words {
		if !strings.Contains(err.Error(), w) {
			t.Errorf("error %q does not say %q", err, w)
		}
	}
}

// Files are the files that come over a connection, which QEMU takes with getfd. Of
// those that nobody has taken the last is kept.
type Files struct {
	conn *net.UnixConn
	mu   sync.Mutex
	last *os.File
}

// Files has the connection, of a Unix socket, take files from now on.
func (c *Conn) Files() *Files {
	f := &Files{conn: c.Conn.(*net.UnixConn)}
	c.Lines.Reset(f)
	return f
}

// Read is for the connection's lines.
func (f *Files) Read(b []byte) (int, error) {
	oob := make([]byte, unix.CmsgSpace(4))
	n, oobn, _, _, err := f.conn.ReadMsgUnix(b, oob)
	if messages, e := unix.ParseSocketControlMessage(oob[:oobn]); e == nil && len(messages) == 1 {
		if fds, e := unix.ParseUnixRights(&messages[0]); e == nil && len(fds) == 1 {
			f.mu.Lock()
			f.last = os.NewFile(uintptr(fds[0]), "passed")
			f.mu.Unlock()
		}
	}
	if n == 0 && err == nil {
		err = io.EOF
	}
	return max(n, 0), err // -1 after a reset
}

// Take returns the file that has come, nil if there is none.
func (f *Files) Take() *os.File {
	f.mu.Lock()
	defer f.mu.Unlock()
	last := f.last
	f.last = nil
	return last
}
