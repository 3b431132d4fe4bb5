package session

import (
	"bufio"
	"context"
	"encoding/json"
	"fmt"
	"net"
	"os"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/flic-migrate/flic-migrate/tier/lazy"
	"github.com/flic-migrate/flic-migrate/tier/progress"
	"github.com/flic-migrate/flic-migrate/tier/restore"
)

// A server tells the resume that it serves over a Unix socket who it is, how far it
// is, and how it went: lines of JSON, a message each. The socket's end is the
// server's, whatever it died of. Nothing is sent the other way, and a server that is
// not heard serves on.
//
//	resume ◄─ {"hello":{"pid":1234}}
//	       ◄─ {"progress":{"pages":1,"pages_all":9}}   as long as nothing holds it up
//	       ◄─ {"report":{…},"damaged":false}           its last word
//
// A server that the resume starts inherits one end of a pair. One that QEMU starts
// connects to a path.
type message struct {
	Hello    *hello        `json:"hello,omitempty"`
	Progress *beat         `json:"progress,omitempty"`
	Report   *ServerReport `json:"report,omitempty"`
	// Damaged, beside a report: what is stored is damaged, and another server would
	// fail like this one.
	Damaged bool `json:"damaged,omitempty"`
}

type hello struct {
	PID int `json:"pid"` // as the server sees it
}

type beat struct {
	Pages    int64 `json:"pages"`
	PagesAll int64 `json:"pages_all"`
}

// ServerReport is how a server went: the JSON document of the command restore.
type ServerReport struct {
	Checkpoint string `json:"checkpoint,omitempty"` // NAME@N
	ExitCode   int    `json:"exit_code"`
	Error      string `json:"error,omitempty"`
	Lazy       bool   `json:"lazy"`
	Reason     string `json:"reason,omitempty"` // why it is eager although it might have been lazy
	restore.Report
	LazyReport *lazy.Report `json:"lazy_report,omitempty"`
}

const (
	// maxMessage caps one message, in bytes. A report has some hundred, and an error
	// in it as much as file names are long.
	maxMessage = 1 << 20
	// lastWord is how long QEMU may need to take in what a server had written
	// when it ended, and how long a server's report may come after that.
	lastWord = time.Second
)

// inherited begins what is said of an inherited end: its number follows.
const inherited = "fd:"

// Control is a server's end. A nil one is heard by nobody.
type Control struct {
	conn net.Conn
	wake chan struct{}
	done chan struct{}

	mu   sync.Mutex
	next beat // to be sent
	news bool
	last *message
}

// Attach makes the server's end of where, "fd:NUMBER" or a path, and says hello. It
// returns nil for an empty where.
func Attach(where string) (*Control, error) {
	if where == "" {
		return nil, nil
	}
	conn, err := attach(where)
	if err != nil {
		return nil, fmt.Errorf("the resume's control socket: %w", err)
	}
	c := &Control{conn: conn, wake: make(chan struct{}, 1), done: make(chan struct{})}
	go c.run()
	return c, nil
}

func attach(where string) (net.Conn, error) {
	number, ok := strings.CutPrefix(where, inherited)
	if !ok {
		return net.DialTimeout("unix", where, 5*time.Second)
	}
	fd, err := strconv.Atoi(number)
	if err != nil || fd < 3 {
		return nil, fmt.Errorf("%q is not the number of an inherited socket", number)
	}
	f := os.NewFile(uintptr(fd), "control")
	defer f.Close()
	return net.FileConn(f)
}

// Progress says how far the server is, and that it lives. It does not wait: what
// can't be sent yet is replaced by what comes after it.
func (c *Control) Progress(p progress.State) {
	if c == nil {
		return
	}
	c.mu.Lock()
	c.next, c.news = beat{p.Pages, p.PagesAll}, true
	c.mu.Unlock()
	c.notify()
}

// Close sends the report, the last word, and hangs up. It waits for a resume that
// does not read for a second.
func (c *Control) Close(report ServerReport, damaged bool) {
	if c == nil {
		return
	}
	c.mu.Lock()
	c.last = &message{Report: &report, Damaged: damaged}
	c.mu.Unlock()
	c.notify()
	_ = c.conn.SetWriteDeadline(time.Now().Add(lastWord))
	<-c.done
}

func (c *Control) notify() {
	select {
	case c.wake <- struct{}{}:
	default:
	}
}

// run is the only one who writes, so that nobody else waits for the resume.
func (c *Control) run() {
	defer close(c.done)
	defer c.conn.Close()
	out := json.NewEncoder(c.conn)
	err := out.Encode(message{Hello: &hello{os.Getpid()}})
	for err == nil {
		<-c.wake
		c.mu.Lock()
		next, news, last := c.next, c.news, c.last
		c.news = false
		c.mu.Unlock()
		if news {
			err = out.Encode(message{Progress: &next})
		}
		if last != nil {
			if err == nil {
				_ = out.Encode(last)
			}
			return
		}
	}
}

// server is one server, as its resume knows it.
type server struct {
	ended chan struct{} // closed at its end

	mu      sync.Mutex
	pid     int // 0: not known
	at      beat
	beats   int // how many messages have come
	report  *ServerReport
	damaged bool
}

// state is what a server has said so far.
type state struct {
	pid     int
	at      beat
	beats   int
	report  *ServerReport
	damaged bool
	ended   bool
}

func (s *server) state() state {
	if s == nil {
		return state{}
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	st := state{pid: s.pid, at: s.at, beats: s.beats, report: s.report, damaged: s.damaged}
	select {
	case <-s.ended:
		st.ended = true
	default:
	}
	return st
}

// listen hears a server until its end. What is no message is its end, too.
func (s *server) listen(conn net.Conn) {
	defer close(s.ended)
	defer conn.Close()
	lines := bufio.NewScanner(conn)
	lines.Buffer(nil, maxMessage)
	for lines.Scan() {
		var m message
		if json.Unmarshal(lines.Bytes(), &m) != nil {
			return
		}
		s.mu.Lock()
		s.beats++
		switch {
		case m.Hello != nil:
			if s.pid == 0 {
				s.pid = m.Hello.PID
			}
		case m.Progress != nil:
			s.at = *m.Progress
		case m.Report != nil:
			s.report, s.damaged = m.Report, m.Damaged
		}
		s.mu.Unlock()
	}
}

// final waits for a server's last word, or its end, for as long as it may take.
func (s *server) final(ctx context.Context) state {
	limit := time.NewTimer(lastWord)
	defer limit.Stop()
	if s != nil {
		select {
		case <-s.ended:
		case <-limit.C:
		case <-ctx.Done():
		}
	}
	return s.state()
}
