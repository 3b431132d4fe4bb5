package qemutest

import (
	"bytes"
	"context"
	"fmt"
	"net"
	"regexp"
	"strings"
	"sync"
	"testing"
	"time"
)

// ConsoleTimeout is how long WaitFor waits: a Linux guest boots in 10 s on two
// idle cores, and tests run beside one another.
const ConsoleTimeout = 3 * time.Minute

// console is a guest's serial port. One goroutine takes what the guest writes,
// at any time, because a guest whose output nobody reads stands still.
type console struct {
	conn net.Conn

	mu   sync.Mutex
	text []byte
	came []arrival     // when it did, in order
	read int           // how far the waits have come
	more chan struct{} // closed and replaced when text has grown or ended
	end  bool
}

// arrival says that the console's text up to end had come by then.
type arrival struct {
	end int
	at  time.Time
}

func newConsole(conn net.Conn) *console {
	c := &console{conn: conn, more: make(chan struct{})}
	go func() {
		buf := make([]byte, 4096)
		for {
			n, err := conn.Read(buf)
			c.mu.Lock()
			c.text = append(c.text, buf[:n]...)
			c.came = append(c.came, arrival{len(c.text), time.Now()})
			c.end = err != nil
			close(c.more)
			c.more = make(chan struct{})
			c.mu.Unlock()
			if err != nil {
				return
			}
		}
	}()
	return c
}

func (c *console) close() { c.conn.Close() }

// expect returns the first match after the last one returned, with its groups.
func (c *console) expect(ctx context.Context, pattern string) ([]string, error) {
	re, err := regexp.Compile(pattern)
	if err != nil {
		return nil, err
	}
	for {
		c.mu.Lock()
		rest := c.text[c.read:]
		found, more, end := re.FindSubmatchIndex(rest), c.more, c.end
		var groups []string
		if found != nil {
			for i := 0; i < len(found); i += 2 {
				group := ""
				if found[i] >= 0 {
					group = string(rest[found[i]:found[i+1]])
				}
				groups = append(groups, group)
			}
			c.read += found[1]
		}
		last := tail(string(rest), 500)
		c.mu.Unlock()
		switch {
		case groups != nil:
			return groups, nil
		case end:
			return nil, fmt.Errorf("the guest's console has ended without %q; its end: %q", pattern, last)
		}
		select {
		case <-more:
		case <-ctx.Done():
			return nil, fmt.Errorf("no %q on the guest's console: %w; its end: %q", pattern, ctx.Err(), last)
		}
	}
}

// begun waits until the guest has written something or its port has ended.
func (c *console) begun(ctx context.Context) bool {
	for {
		c.mu.Lock()
		some, more := len(c.text) > 0 || c.end, c.more
		c.mu.Unlock()
		if some {
			return true
		}
		select {
		case <-more:
		case <-ctx.Done():
			return false
		}
	}
}

// Expect waits until the guest has written something that matches the regular
// expression, after what earlier calls have matched, and returns the match and
// its groups. Lines end in "\r\n"; a pattern that ends in (\w+) should go on to
// the line's end, or it matches half a word.
func (vm *VM) Expect(ctx context.Context, pattern string) ([]string, error) {
	return vm.console.expect(ctx, pattern)
}

// WaitFor is Expect for tests: a guest that does not say it within
// ConsoleTimeout fails the test.
func (vm *VM) WaitFor(t testing.TB, pattern string) []string {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), ConsoleTimeout)
	defer cancel()
	match, err := vm.Expect(ctx, pattern)
	if err != nil {
		t.Fatal(err)
	}
	return match
}

// Ask sends a line and waits for its answer, a line that begins with the same
// word; it returns what follows that word.
func (vm *VM) Ask(t testing.TB, line string) string {
	t.Helper()
	if err := vm.Send(line); err != nil {
		t.Fatal(err)
	}
	word := regexp.MustCompile(`^\S*`).FindString(line)
	return vm.WaitFor(t, `(?:^|\n)(?:`+regexp.QuoteMeta(word)+` |(?:error: ))([^\r\n]*)\r?\n`)[1]
}

// Send writes a line to the guest's serial port.
func (vm *VM) Send(line string) error {
	_, err := vm.console.conn.Write([]byte(line + "\n"))
	return err
}

// Console returns everything the guest has written.
func (vm *VM) Console() string {
	vm.console.mu.Lock()
	defer vm.console.mu.Unlock()
	return string(vm.console.text)
}

// Line is a whole line that the guest has written, without its end, and when the last of it
// came.
type Line struct {
	Text string
	At   time.Time
}

// Lines returns the lines that begin at or behind byte from of what the guest has written,
// and how far they go.
func (vm *VM) Lines(from int) (lines []Line, end int) {
	c := vm.console
	c.mu.Lock()
	defer c.mu.Unlock()
	came := c.came
	for end = from; ; {
		n := bytes.IndexByte(c.text[end:], '\n')
		if n < 0 {
			return lines, end
		}
		text := strings.TrimSuffix(string(c.text[end:end+n]), "\r")
		end += n + 1
		for came[0].end < end {
			came = came[1:]
		}
		lines = append(lines, Line{text, came[0].at})
	}
}
