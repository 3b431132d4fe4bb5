package qmp

import (
	"bufio"
	"encoding/json"
	"fmt"
	"net"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"go.uber.org/goleak"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

const greeting = `{"QMP": {"version": {"qemu": {"micro": 22, "minor": 2, "major": 7}, "package": "test"}, "capabilities": ["oob"]}}` + "\r\n"

// fakeQEMU is the other end of a monitor: a listening socket and what it does
// with each connection.
type fakeQEMU struct {
	t    *testing.T
	addr string
}

// client is one connection to a fakeQEMU.
type client struct {
	net.Conn
	t     *testing.T
	lines *bufio.Reader
}

type command struct {
	Execute string          `json:"execute"`
	OOB     string          `json:"exec-oob"`
	Args    json.RawMessage `json:"arguments"`
	ID      uint64          `json:"id"`
}

// newFake serves each connection with serve, from the greeting on, until the
// test ends.
func newFake(t *testing.T, serve func(*client)) *fakeQEMU {
	t.Helper()
	addr := filepath.Join(t.TempDir(), "qmp")
	l, err := net.Listen("unix", addr)
	if err != nil {
		t.Fatal(err)
	}
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		for {
			conn, err := l.Accept()
			if err != nil {
				return
			}
			serve(&client{Conn: conn, t: t, lines: bufio.NewReader(conn)})
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
	return &fakeQEMU{t: t, addr: addr}
}

// negotiated serves a connection with answer after a proper negotiation; answer
// gets each command and writes what it likes.
func negotiated(answer func(*client, command)) func(*client) {
	return func(c *client) {
		c.send(greeting)
		for {
			cmd, ok := c.next()
			if !ok {
				return
			}
			if cmd.Execute == "qmp_capabilities" {
				c.reply(cmd, `{}`)
				continue
			}
			answer(c, cmd)
		}
	}
}

func (c *client) next() (command, bool) {
	var cmd command
	line, err := c.lines.ReadString('\n')
	if err != nil {
		return cmd, false
	}
	if err := json.Unmarshal([]byte(line), &cmd); err != nil {
		c.t.Errorf("a command that is no JSON: %q", line)
		return cmd, false
	}
	return cmd, true
}

// send ignores errors: the tests end connections at every possible moment.
func (c *client) send(s string) { _, _ = c.Write([]byte(s)) }

func (c *client) reply(cmd command, value string) {
	c.send(fmt.Sprintf(`{"return": %s, "id": %d}`+"\r\n", value, cmd.ID))
}

func (c *client) refuse(cmd command, class, desc string) {
	c.send(fmt.Sprintf(`{"error": {"class": %q, "desc": %q}, "id": %d}`+"\r\n", class, desc, cmd.ID))
}

func (c *client) event(name string) {
	c.send(fmt.Sprintf(`{"timestamp": {"seconds": 1, "microseconds": 2}, "event": %q, "data": {"n": 3}}`+"\r\n", name))
}

// dial connects and closes at the end of the test.
func (f *fakeQEMU) dial(options Options) *Monitor {
	f.t.Helper()
	m, err := Dial(f.t.Context(), f.addr, options)
	if err != nil {
		f.t.Fatal(err)
	}
	f.t.Cleanup(func() { m.Close() })
	return m
}

// mention fails the test unless err says each of the words.
func mention(t *testing.T, err error, words ...string) {
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
