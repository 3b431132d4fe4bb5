package qmp

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	goqemu "github.com/digitalocean/go-qemu/qmp"

	"github.com/flic-migrate/flic-migrate/qmp/qmptest"
	"github.com/flic-migrate/flic-migrate/tier/rescue"
)

func TestVersionAndResult(t *testing.T) {
	f := qmptest.New(t, qmptest.Negotiated(func(c *qmptest.Conn, cmd qmptest.Command) {
		if cmd.Execute != "query-status" || cmd.Args != nil {
			t.Errorf("command %+v", cmd)
		}
		c.Reply(cmd, `{"status": "running", "running": true}`)
	}))
	m := dial(t, f, Options{})
	if v := m.Version().String(); v != "7.2.22" {
		t.Errorf("version %q", v)
	}
	var s RunState
	if err := m.Execute(t.Context(), "query-status", nil, &s); err != nil {
		t.Fatal(err)
	}
	if s != (RunState{Running: true, Status: "running"}) {
		t.Errorf("got %+v", s)
	}
}

func TestTCP(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		conn, err := l.Accept()
		if err != nil {
			t.Error(err)
			return
		}
		defer conn.Close()
		c := qmptest.NewConn(t, conn)
		c.Send(qmptest.Greeting)
		// One byte at a time, on a connection without Nagle's delay.
		for _, b := range []byte(`{"return": {}, "id": 1}` + "\n") {
			c.Send(string(b))
			time.Sleep(time.Millisecond)
		}
	}()
	m, err := Dial(t.Context(), l.Addr().String(), Options{})
	if err != nil {
		t.Fatal(err)
	}
	defer m.Close()
	<-ended
}

// A reply may come in any number of pieces, with others in the same piece.
func TestSplitReplies(t *testing.T) {
	f := qmptest.New(t, qmptest.Negotiated(func(c *qmptest.Conn, cmd qmptest.Command) {
		whole := fmt.Sprintf("{\"event\": \"A\", \"data\": {},\n \"timestamp\": {}}\n{\"return\":\n {\"v\": \"{]\\\"\"}, \"id\": %d}{\"event\": \"B\"}", cmd.ID)
		for i := range len(whole) {
			c.Send(whole[i : i+1])
			if i%16 == 0 {
				time.Sleep(time.Millisecond)
			}
		}
	}))
	m := dial(t, f, Options{})
	events, err := m.Events(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	for range 3 {
		var r struct{ V string }
		if err := m.Execute(t.Context(), "x", nil, &r); err != nil {
			t.Fatal(err)
		}
		if r.V != `{]"` {
			t.Errorf("got %q", r.V)
		}
		for _, want := range []string{"A", "B"} {
			if e := <-events; e.Event != want {
				t.Errorf("event %q, want %q", e.Event, want)
			}
		}
	}
}

func TestGiantReply(t *testing.T) {
	const size = 20 << 20
	f := qmptest.New(t, qmptest.Negotiated(func(c *qmptest.Conn, cmd qmptest.Command) {
		c.Reply(cmd, `"`+strings.Repeat("x", size)+`"`)
	}))
	m := dial(t, f, Options{})
	// Two of them: the second must not overwrite what the first caller holds.
	var first, second json.RawMessage
	for _, r := range []*json.RawMessage{&first, &second} {
		if err := m.Execute(t.Context(), "human-monitor-command", nil, r); err != nil {
			t.Fatal(err)
		}
	}
	first[1] = 'y'
	if len(second) != size+2 || second[1] != 'x' || second[size] != 'x' {
		t.Errorf("second reply has %d bytes, first byte %q", len(second), second[1])
	}
}

// Memory must not follow a peer that never ends its message.
func TestEndlessLineIsCapped(t *testing.T) {
	for name, sends := range map[string]string{
		"string":  `{"return": "`,
		"spaces":  ` `,
		"nesting": `{"return": ` + strings.Repeat("[", 20000),
	} {
		t.Run(name, func(t *testing.T) {
			f := qmptest.New(t, qmptest.Negotiated(func(c *qmptest.Conn, _ qmptest.Command) {
				c.Send(sends)
				for {
					if _, err := c.Write([]byte(strings.Repeat(" ", 64<<10))); err != nil {
						return
					}
				}
			}))
			m := dial(t, f, Options{MaxMessage: 1 << 20})
			err := m.Execute(t.Context(), "query-status", nil, nil)
			if !errors.Is(err, ErrProtocol) {
				t.Fatalf("got %v, want ErrProtocol", err)
			}
		})
	}
}

// A human monitor is told from other things that are no QMP.
func TestHumanMonitor(t *testing.T) {
	for greeting, human := range map[string]bool{
		"QEMU 7.2.22 monitor - type 'help' for more information\r\n(qemu) ": true,
		"SSH-2.0-OpenSSH_9.2\r\n": false,
		"QE":                      false,
	} {
		f := qmptest.New(t, func(c *qmptest.Conn) {
			c.Send(greeting)
			c.Next()
		})
		_, err := Dial(t.Context(), f.Addr, Options{Greeting: 200 * time.Millisecond})
		if err == nil || errors.Is(err, ErrHumanMonitor) != human {
			t.Errorf("%q: %v", greeting, err)
		}
	}
}

func TestHostileMessages(t *testing.T) {
	for name, message := range map[string]string{
		"no JSON":            "hello\n",
		"binary":             "\x00\xff\xfe\n",
		"array":              "[1, 2]\n",
		"number":             "7\n",
		"null":               "null\n",
		"neither":            "{}\n",
		"no id":              `{"error": {"class": "GenericError", "desc": "JSON parse error"}}` + "\n",
		"id of another kind": `{"return": {}, "id": "x"}` + "\n",
		"negative id":        `{"return": {}, "id": -1}` + "\n",
		"event of no name":   `{"event": 7}` + "\n",
		"event with a list":  `{"event": "STOP", "data": []}` + "\n",
		"too deep":           strings.Repeat(`{"a":`, 20000),
	} {
		t.Run(name, func(t *testing.T) {
			f := qmptest.New(t, qmptest.Negotiated(func(c *qmptest.Conn, _ qmptest.Command) {
				c.Send(message)
				c.Next() // until the Monitor hangs up
			}))
			m := dial(t, f, Options{})
			err := m.Execute(t.Context(), "query-status", nil, nil)
			if !errors.Is(err, ErrProtocol) {
				t.Fatalf("got %v, want ErrProtocol", err)
			}
			if len(err.Error()) > 400 {
				t.Errorf("the error has %d bytes", len(err.Error()))
			}
			<-m.Done()
			if err := m.Execute(t.Context(), "query-status", nil, nil); !errors.Is(err, ErrProtocol) {
				t.Errorf("after it: %v, want the same reason", err)
			}
		})
	}
}

// Answers to calls that nobody made, or that were answered already, are dropped.
func TestStrayAnswers(t *testing.T) {
	f := qmptest.New(t, qmptest.Negotiated(func(c *qmptest.Conn, cmd qmptest.Command) {
		c.Send(`{"return": 1, "id": 999}` + "\n")
		c.Reply(cmd, `2`)
		c.Reply(cmd, `3`)
	}))
	m := dial(t, f, Options{})
	for range 3 {
		var n int
		if err := m.Execute(t.Context(), "x", nil, &n); err != nil || n != 2 {
			t.Fatalf("got %d, %v", n, err)
		}
	}
}

func TestRefusal(t *testing.T) {
	f := qmptest.New(t, qmptest.Negotiated(func(c *qmptest.Conn, cmd qmptest.Command) {
		c.Refuse(cmd, "CommandNotFound", "The command frobnicate has not been found")
	}))
	m := dial(t, f, Options{})
	err := m.Execute(t.Context(), "frobnicate", nil, nil)
	var refusal *Error
	if !errors.As(err, &refusal) {
		t.Fatalf("got %T %v", err, err)
	}
	if *refusal != (Error{Command: "frobnicate", Class: "CommandNotFound", Desc: "The command frobnicate has not been found"}) {
		t.Errorf("got %+v", *refusal)
	}
	qmptest.Mention(t, err, "frobnicate", "CommandNotFound", "not been found")
	if m.Err() != nil {
		t.Error("a refusal has ended the connection")
	}
}

func TestResultOfAnotherShape(t *testing.T) {
	f := qmptest.New(t, qmptest.Negotiated(func(c *qmptest.Conn, cmd qmptest.Command) { c.Reply(cmd, `[1]`) }))
	var s RunState
	if err := dial(t, f, Options{}).Execute(t.Context(), "query-status", nil, &s); !errors.Is(err, ErrProtocol) {
		t.Errorf("got %v", err)
	}
}

func TestArgumentsThatCannotBeSent(t *testing.T) {
	f := qmptest.New(t, qmptest.Negotiated(func(c *qmptest.Conn, cmd qmptest.Command) { c.Reply(cmd, `{}`) }))
	m := dial(t, f, Options{})
	qmptest.Mention(t, m.Execute(t.Context(), "x", map[string]any{"f": func() {}}, nil), "x", "unsupported type")
	if err := m.Execute(t.Context(), "x", map[string]any{"f": 1}, nil); err != nil {
		t.Errorf("the next call: %v", err)
	}
}

// Events that nobody reads must not hold up answers, whether nobody asked for
// them or a reader has fallen asleep.
func TestEventFlood(t *testing.T) {
	const flood = 20000
	f := qmptest.New(t, qmptest.Negotiated(func(c *qmptest.Conn, cmd qmptest.Command) {
		for i := range flood {
			c.Send(fmt.Sprintf(`{"event": "E", "data": {"n": %d}}`+"\n", i))
		}
		c.Reply(cmd, `{}`)
	}))
	m := dial(t, f, Options{})
	if err := m.Execute(t.Context(), "x", nil, nil); err != nil {
		t.Fatal(err)
	}
	asleep, err := m.Events(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if err := m.Execute(t.Context(), "x", nil, nil); err != nil {
		t.Fatal(err)
	}
	if n := m.lostEvents.Load(); n != flood-eventBuffer {
		t.Errorf("%d events lost, want %d", n, flood-eventBuffer)
	}
	// The newest are there, in order.
	for i := range eventBuffer {
		e := <-asleep
		if n := int(e.Data["n"].(float64)); n != flood-eventBuffer+i {
			t.Fatalf("event %d is number %d, want %d", i, n, flood-eventBuffer+i)
		}
	}
}

func TestEventReaders(t *testing.T) {
	f := qmptest.New(t, qmptest.Negotiated(func(c *qmptest.Conn, cmd qmptest.Command) {
		c.Event("STOP")
		c.Reply(cmd, `{}`)
	}))
	m := dial(t, f, Options{})
	ctx, cancel := context.WithCancel(t.Context())
	one, err := m.Events(ctx)
	if err != nil {
		t.Fatal(err)
	}
	two, err := m.Events(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if err := m.Execute(t.Context(), "stop", nil, nil); err != nil {
		t.Fatal(err)
	}
	for _, events := range []<-chan Event{one, two} {
		e := <-events
		if e.Event != "STOP" || e.Data["n"] != 3.0 || e.Timestamp.Microseconds != 2 {
			t.Errorf("got %+v", e)
		}
	}
	cancel()
	if _, ok := <-one; ok {
		t.Error("the channel gives an event after its context ended")
	}
	if err := m.Execute(t.Context(), "stop", nil, nil); err != nil {
		t.Fatal(err)
	}
	if e := <-two; e.Event != "STOP" {
		t.Errorf("the other reader got %+v", e)
	}
	m.Close()
	if _, ok := <-two; ok {
		t.Error("the channel gives an event after Close")
	}
	if _, err := m.Events(t.Context()); !errors.Is(err, ErrClosed) {
		t.Errorf("Events after Close: %v", err)
	}
}

// A QEMU that dies takes every waiting call with it, with a reason.
func TestServerDies(t *testing.T) {
	const calls = 20
	var arrived sync.WaitGroup
	arrived.Add(calls)
	f := qmptest.New(t, func(c *qmptest.Conn) {
		c.Send(qmptest.Greeting)
		for range calls + 1 {
			cmd, ok := c.Next()
			if !ok {
				return
			}
			if cmd.Execute == "qmp_capabilities" {
				c.Reply(cmd, `{}`)
				continue
			}
			arrived.Done()
		}
		c.Send(`{"return": {"status": "runn`)
	})
	m := dial(t, f, Options{})
	events, err := m.Events(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	failed := make(chan error, calls)
	for range calls {
		go func() { failed <- m.Execute(t.Context(), "query-status", nil, nil) }()
	}
	arrived.Wait()
	for range calls {
		err := <-failed
		if !errors.Is(err, ErrLost) {
			t.Fatalf("got %v, want ErrLost", err)
		}
		qmptest.Mention(t, err, "query-status", f.Addr, "lost")
	}
	if _, ok := <-events; ok {
		t.Error("an event from a dead QEMU")
	}
	<-m.Done()
	if !errors.Is(m.Err(), ErrLost) {
		t.Errorf("Err says %v", m.Err())
	}
	if err := m.Execute(t.Context(), "query-status", nil, nil); !errors.Is(err, ErrLost) {
		t.Errorf("a later call: %v", err)
	}
}

// The answer to quit and the end of the connection come in one piece.
func TestAnswerBeforeTheEnd(t *testing.T) {
	for range 50 {
		f := qmptest.New(t, func(c *qmptest.Conn) {
			c.Send(qmptest.Greeting)
			for {
				cmd, ok := c.Next()
				if !ok {
					return
				}
				c.Reply(cmd, `{}`)
				if cmd.Execute == "quit" {
					return
				}
			}
		})
		m := dial(t, f, Options{})
		if err := m.Execute(t.Context(), "quit", nil, nil); err != nil {
			t.Fatal(err)
		}
	}
}

func TestCloseEndsCalls(t *testing.T) {
	arrived := make(chan struct{})
	f := qmptest.New(t, qmptest.Negotiated(func(*qmptest.Conn, qmptest.Command) { close(arrived) }))
	m := dial(t, f, Options{})
	go func() {
		<-arrived
		m.Close()
	}()
	if err := m.Execute(t.Context(), "x", nil, nil); !errors.Is(err, ErrClosed) {
		t.Fatalf("got %v, want ErrClosed", err)
	}
	m.Close() // a second time does nothing
	if !errors.Is(m.Err(), ErrClosed) {
		t.Errorf("Err says %v", m.Err())
	}
}

// A call that is given up leaves the connection fit for the next, and its late
// answer is nobody else's.
func TestTimeout(t *testing.T) {
	release := make(chan struct{})
	f := qmptest.New(t, qmptest.Negotiated(func(c *qmptest.Conn, cmd qmptest.Command) {
		if cmd.Execute == "slow" {
			<-release
			c.Reply(cmd, `"late"`)
			return
		}
		c.Reply(cmd, `"ok"`)
	}))
	m := dial(t, f, Options{Timeout: 50 * time.Millisecond})
	err := m.Execute(t.Context(), "slow", nil, nil)
	if !errors.Is(err, context.DeadlineExceeded) {
		t.Fatalf("got %v", err)
	}
	qmptest.Mention(t, err, "slow", "no answer")
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if err := m.Execute(ctx, "never", nil, nil); !errors.Is(err, context.Canceled) {
		t.Errorf("with a cancelled context: %v", err)
	}
	close(release)
	ctx, cancel = context.WithTimeout(t.Context(), 10*time.Second)
	defer cancel()
	var s string
	if err := m.Execute(ctx, "fast", nil, &s); err != nil || s != "ok" {
		t.Fatalf("the next call: %q, %v", s, err)
	}
}

// A QEMU that takes no more commands must not hang a caller, and a command that
// is half written must not be given up.
func TestSocketIsFull(t *testing.T) {
	begun, read := make(chan struct{}), make(chan struct{})
	f := qmptest.New(t, func(c *qmptest.Conn) {
		c.Send(qmptest.Greeting)
		cmd, _ := c.Next()
		c.Reply(cmd, `{}`)
		// One piece of the big command is taken, and the rest waits.
		if _, err := c.Lines.Peek(1); err != nil {
			return
		}
		close(begun)
		<-read
		for {
			cmd, ok := c.Next()
			if !ok {
				return
			}
			c.Reply(cmd, `{}`)
		}
	})
	m := dial(t, f, Options{})
	ctx, giveUp := context.WithCancel(t.Context())
	big := make(chan error, 1)
	go func() {
		big <- m.Execute(ctx, "big", map[string]string{"x": strings.Repeat("x", 4<<20)}, nil)
	}()
	<-begun
	short, cancel := context.WithTimeout(t.Context(), 20*time.Millisecond)
	defer cancel()
	qmptest.Mention(t, m.Execute(short, "second", nil, nil), "second", "not sent")
	giveUp()
	if err := <-big; !errors.Is(err, context.Canceled) {
		t.Errorf("the big one: %v", err)
	}
	close(read)
	if err := m.Execute(t.Context(), "third", nil, nil); err != nil {
		t.Fatal(err)
	}
}

func TestBusy(t *testing.T) {
	release := make(chan struct{})
	f := qmptest.New(t, func(c *qmptest.Conn) { <-release })
	defer close(release)
	start := time.Now()
	_, err := Dial(t.Context(), f.Addr, Options{Greeting: 50 * time.Millisecond})
	if !errors.Is(err, ErrBusy) {
		t.Fatalf("got %v, want ErrBusy", err)
	}
	qmptest.Mention(t, err, "another client", f.Addr, "no greeting within 50ms")
	if d := time.Since(start); d > 5*time.Second {
		t.Errorf("took %v", d)
	}
	ctx, cancel := context.WithCancel(t.Context())
	time.AfterFunc(50*time.Millisecond, cancel)
	if _, err := Dial(ctx, f.Addr, Options{Greeting: time.Hour}); !errors.Is(err, context.Canceled) {
		t.Errorf("cancelled while it waited for the greeting: %v", err)
	}
}

func TestNotAMonitor(t *testing.T) {
	for name, test := range map[string]struct {
		sends string
		words []string
	}{
		"closes":        {"", []string{"before the greeting"}},
		"another JSON":  {`{"return": {}}` + "\n", []string{"instead of a greeting"}},
		"a number":      {"220 mail ready\r\n", []string{"220", "does not speak QMP"}},
		"another proto": {"SSH-2.0-x\r\n", []string{"invalid character", "does not speak QMP"}},
	} {
		t.Run(name, func(t *testing.T) {
			f := qmptest.New(t, func(c *qmptest.Conn) { c.Send(test.sends) })
			_, err := Dial(t.Context(), f.Addr, Options{})
			qmptest.Mention(t, err, append(test.words, f.Addr)...)
		})
	}
}

func TestNegotiationRefused(t *testing.T) {
	f := qmptest.New(t, func(c *qmptest.Conn) {
		c.Send(qmptest.Greeting)
		cmd, _ := c.Next()
		c.Refuse(cmd, "GenericError", "no")
	})
	_, err := Dial(t.Context(), f.Addr, Options{})
	var refusal *Error
	if !errors.As(err, &refusal) || refusal.Command != "qmp_capabilities" {
		t.Errorf("got %v", err)
	}
}

func TestDialErrors(t *testing.T) {
	dir := t.TempDir()
	_, err := Dial(t.Context(), filepath.Join(dir, "none"), Options{})
	qmptest.Mention(t, err, "connect", "no such file")
	_, err = Dial(t.Context(), filepath.Join(dir, strings.Repeat("x", 200)), Options{})
	qmptest.Mention(t, err, "107 bytes")
}

func TestOOB(t *testing.T) {
	slowIsOut := make(chan struct{})
	f := qmptest.New(t, func(c *qmptest.Conn) {
		c.Send(qmptest.Greeting)
		cmd, _ := c.Next()
		if string(cmd.Args) != `{"enable":["oob"]}` {
			t.Errorf("negotiation with %s", cmd.Args)
		}
		c.Reply(cmd, `{}`)
		slow, _ := c.Next()
		close(slowIsOut)
		fast, _ := c.Next()
		if fast.OOB != "migrate-recover" || fast.Execute != "" {
			t.Errorf("got %+v", fast)
		}
		c.Reply(fast, `"fast"`)
		c.Reply(slow, `"slow"`)
		c.Next()
	})
	m := dial(t, f, Options{OOB: true})
	slow := make(chan error, 1)
	var slowAnswer, fastAnswer string
	go func() { slow <- m.Execute(t.Context(), "query-status", nil, &slowAnswer) }()
	<-slowIsOut
	if err := m.ExecuteOOB(t.Context(), "migrate-recover", nil, &fastAnswer); err != nil {
		t.Fatal(err)
	}
	if err := <-slow; err != nil {
		t.Fatal(err)
	}
	if fastAnswer != "fast" || slowAnswer != "slow" {
		t.Errorf("answers mixed up: %q, %q", fastAnswer, slowAnswer)
	}
}

func TestOOBNotThere(t *testing.T) {
	plain := strings.Replace(qmptest.Greeting, `"oob"`, `{"new": 1}`, 1)
	f := qmptest.New(t, func(c *qmptest.Conn) {
		c.Send(plain)
		cmd, _ := c.Next()
		if strings.Contains(string(cmd.Args), "oob") {
			t.Errorf("asked for what is not offered: %s", cmd.Args)
		}
		c.Reply(cmd, `{}`)
		c.Next()
	})
	_, err := Dial(t.Context(), f.Addr, Options{OOB: true})
	qmptest.Mention(t, err, "out-of-band")
	for _, o := range []Options{{}, {OOB: true, IfOffered: true}} {
		m := dial(t, f, o)
		qmptest.Mention(t, m.ExecuteOOB(t.Context(), "migrate-recover", nil, nil), "out-of-band")
		m.Close()
	}
}

// Many goroutines on one connection, with events between and answers in another
// order: each gets its own.
func TestConcurrentCalls(t *testing.T) {
	var held []qmptest.Command
	f := qmptest.New(t, qmptest.Negotiated(func(c *qmptest.Conn, cmd qmptest.Command) {
		held = append(held, cmd)
		if len(held) == 4 {
			for i := range held {
				c.Event("E")
				c.Reply(held[3-i], string(held[3-i].Args))
			}
			held = nil
		}
	}))
	m := dial(t, f, Options{})
	if _, err := m.Events(t.Context()); err != nil {
		t.Fatal(err)
	}
	var wg sync.WaitGroup
	for i := range 4 {
		wg.Go(func() {
			for j := range 200 {
				sent := map[string]int{"n": i*1000 + j}
				var got map[string]int
				if err := m.Execute(t.Context(), "echo", sent, &got); err != nil {
					t.Error(err)
					return
				}
				if got["n"] != sent["n"] {
					t.Errorf("sent %d, got %d", sent["n"], got["n"])
					return
				}
			}
		})
	}
	wg.Wait()
}

func TestGoQEMUInterface(t *testing.T) {
	f := qmptest.New(t, qmptest.Negotiated(func(c *qmptest.Conn, cmd qmptest.Command) {
		if cmd.Execute == "bad" {
			c.Refuse(cmd, "GenericError", "bad")
			return
		}
		c.Reply(cmd, fmt.Sprintf(`[%q, %s]`, cmd.Execute, cmd.Args))
	}))
	var m goqemu.Monitor = dial(t, f, Options{})
	if err := m.Connect(); err != nil {
		t.Fatal(err)
	}
	// A number that float64 cannot hold must arrive as it is.
	out, err := m.Run([]byte(`{"execute": "x", "arguments": {"n": 18446744073709551615}, "id": "mine"}`))
	if err != nil {
		t.Fatal(err)
	}
	if want := `{"return":["x",{"n":18446744073709551615}]}`; string(out) != want {
		t.Errorf("got %s, want %s", out, want)
	}
	var refusal *Error
	if _, err := m.Run([]byte(`{"execute": "bad"}`)); !errors.As(err, &refusal) {
		t.Errorf("got %v", err)
	}
	for _, bad := range []string{"", "{", "[]"} {
		if _, err := m.Run([]byte(bad)); err == nil {
			t.Errorf("%q was run", bad)
		}
	}
	if err := m.Disconnect(); err != nil {
		t.Fatal(err)
	}
	if err := m.Connect(); !errors.Is(err, ErrClosed) {
		t.Errorf("Connect after Disconnect: %v", err)
	}
}

func TestSplitAddress(t *testing.T) {
	for address, want := range map[string][2]string{
		"/run/qmp":         {"unix", "/run/qmp"},
		"qmp.sock":         {"unix", "qmp.sock"},
		"./a:1":            {"unix", "./a:1"},
		"vm:qmp":           {"unix", "vm:qmp"},
		"unix:host:4444":   {"unix", "host:4444"},
		"localhost:4444":   {"tcp", "localhost:4444"},
		"[::1]:4444":       {"tcp", "[::1]:4444"},
		"tcp:host:service": {"tcp", "host:service"},
	} {
		if network, addr := splitAddress(address); network != want[0] || addr != want[1] {
			t.Errorf("%s: %s %s, want %s", address, network, addr, want)
		}
	}
}

// FuzzMonitor: whatever a peer writes, a call ends, with an answer or an error,
// and nothing panics.
func FuzzMonitor(f *testing.F) {
	f.Add([]byte(`{"return": {}, "id": 2}`))
	f.Add([]byte(`{"error": {"class": "GenericError", "desc": "x"}, "id": 2}`))
	f.Add([]byte(`{"event": "STOP", "data": {}, "timestamp": {"seconds": 1, "microseconds": 2}} {"return": null, "id": 2}`))
	f.Add([]byte("[[[[{}]]]]\xff"))
	f.Fuzz(func(t *testing.T, sends []byte) {
		ours, theirs := net.Pipe()
		ended := make(chan struct{})
		go func() {
			defer close(ended)
			defer theirs.Close()
			c := qmptest.NewConn(t, theirs)
			c.Send(qmptest.Greeting)
			buf := make([]byte, 4096)
			if _, err := theirs.Read(buf); err != nil {
				return
			}
			c.Send(`{"return": {}, "id": 1}`)
			if _, err := theirs.Read(buf); err != nil {
				return
			}
			_, _ = theirs.Write(sends)
		}()
		m, err := New(t.Context(), ours, "pipe", Options{MaxMessage: 1 << 16})
		if err != nil {
			t.Fatal(err)
		}
		var result any
		err = m.Execute(t.Context(), "x", nil, &result)
		var refusal *Error
		var op *OpError
		if err != nil && !errors.As(err, &refusal) && !errors.As(err, &op) {
			t.Errorf("an error of no known type: %T %v", err, err)
		}
		if errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("the call has hung: %v", err)
		}
		m.Close()
		<-ended
	})
}

// Commands that are sent together are all there before the first is answered, in their order,
// and each has its own answer.
func TestTogether(t *testing.T) {
	var came []qmptest.Command
	f := qmptest.New(t, qmptest.Negotiated(func(c *qmptest.Conn, cmd qmptest.Command) {
		if came = append(came, cmd); len(came) < 3 {
			return
		}
		c.Reply(came[2], `{"status": "paused", "running": false}`)
		c.Refuse(came[1], "GenericError", "not now")
		c.Reply(came[0], `"first"`)
		came = nil
	}))
	m := dial(t, f, Options{Timeout: 10 * time.Second})
	for range 2 {
		var first string
		var status RunState
		errs := Together(t.Context(), m, Call{"one", nil, &first}, Call{"two", map[string]any{"x": 1}, nil}, Call{"query-status", nil, &status})
		var refused *Error
		if len(errs) != 3 || errs[0] != nil || errs[2] != nil || !errors.As(errs[1], &refused) || refused.Command != "two" || refused.Desc != "not now" {
			t.Fatalf("errors %v", errs)
		}
		if first != "first" || status.Status != "paused" {
			t.Errorf("answers %q, %+v", first, status)
		}
	}
	// What can't be written does not keep the others from being asked.
	errs := Together(t.Context(), m, Call{"one", nil, nil}, Call{"bad", func() {}, nil}, Call{"two", nil, nil}, Call{"three", nil, nil})
	var refused *Error
	if errs[0] != nil || errs[1] == nil || !errors.As(errs[2], &refused) || errs[3] != nil {
		t.Errorf("errors %v", errs)
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	if len(m.waiting) != 0 {
		t.Errorf("%d answers are still waited for", len(m.waiting))
	}
}

// The end of the connection, and of the context, is the end of all that are under way.
func TestTogetherEnds(t *testing.T) {
	calls := []Call{{"one", nil, nil}, {"two", nil, nil}}
	f := qmptest.New(t, qmptest.Negotiated(func(c *qmptest.Conn, cmd qmptest.Command) {
		if cmd.Execute == "two" {
			c.Close()
		}
	}))
	for i, err := range Together(t.Context(), dial(t, f, Options{}), calls...) {
		var op *OpError
		if !errors.Is(err, ErrLost) || !errors.As(err, &op) || op.Op != calls[i].Command {
			t.Errorf("%s: %v", calls[i].Command, err)
		}
	}
	silent := qmptest.New(t, qmptest.Negotiated(func(*qmptest.Conn, qmptest.Command) {}))
	m := dial(t, silent, Options{})
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	for range 2 {
		for _, err := range Together(ctx, m, calls...) {
			if !errors.Is(err, context.DeadlineExceeded) {
				t.Error(err)
			}
		}
	}
}

// single is an Executor that is no Monitor.
type single struct{ sent []string }

func (s *single) Execute(_ context.Context, command string, _, result any) error {
	s.sent = append(s.sent, command)
	if command == "two" {
		return &Error{Command: command}
	}
	return nil
}

func (s *single) Events(context.Context) (<-chan Event, error) { return nil, ErrClosed }

func TestTogetherElsewhere(t *testing.T) {
	var s single
	errs := Together(t.Context(), &s, Call{"one", nil, nil}, Call{"two", nil, nil}, Call{"three", nil, nil})
	if errs[0] != nil || errs[1] == nil || errs[2] != nil || strings.Join(s.sent, " ") != "one two three" {
		t.Errorf("%v, sent %v", errs, s.sent)
	}
}

// bombConn panics in a read or a write.
type bombConn struct {
	net.Conn
	read, write atomic.Bool
}

func (c *bombConn) Read(b []byte) (int, error) {
	if c.read.Load() {
		panic("bomb")
	}
	return c.Conn.Read(b)
}

func (c *bombConn) Write(b []byte) (int, error) {
	if c.write.Load() {
		panic("bomb")
	}
	return c.Conn.Write(b)
}

// TestPanic has the monitor's goroutines panic: that ends the connection, with the panic as the
// reason, and not the process, which has a guest to put right.
func TestPanic(t *testing.T) {
	for name, write := range map[string]bool{"read": false, "write": true} {
		t.Run(name, func(t *testing.T) {
			f := qmptest.New(t, qmptest.Negotiated(func(c *qmptest.Conn, cmd qmptest.Command) { c.Reply(cmd, `{}`) }))
			conn, err := net.Dial("unix", strings.TrimPrefix(f.Addr, "unix:"))
			if err != nil {
				t.Fatal(err)
			}
			bomb := &bombConn{Conn: conn}
			m, err := New(t.Context(), bomb, f.Addr, Options{})
			if err != nil {
				t.Fatal(err)
			}
			defer m.Close()
			// The reader is in a read now, and the writer waits.
			bomb.write.Store(write)
			bomb.read.Store(!write)
			err = m.Execute(t.Context(), "query-status", nil, nil)
			if err == nil {
				err = m.Execute(t.Context(), "query-status", nil, nil)
			}
			var bug *rescue.Error
			if !errors.As(err, &bug) || bug.Value != "bomb" {
				t.Errorf("the error is %v", err)
			}
		})
	}
}
