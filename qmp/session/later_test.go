package session

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/flic-migrate/flic-migrate/qmp/migration"
	"github.com/flic-migrate/flic-migrate/qmp/qmptest"
	"github.com/flic-migrate/flic-migrate/ramparse"
	"github.com/flic-migrate/flic-migrate/stream"
	"github.com/flic-migrate/flic-migrate/tier/save"
	"github.com/flic-migrate/flic-migrate/tier/tiertest"
	"github.com/flic-migrate/flic-migrate/tier/vfs"
)

// source is a QEMU that is armed: what its monitor says, and what it has put into its
// buffers of a stream that somebody reads.
type source struct {
	bytes, parent []byte
	pages         []int64 // where each page of the first pass begins
	pass2         int64   // where the next begins

	mu      sync.Mutex
	put     int64 // bytes of the stream
	queries int
	status  string
	run     string
	params  map[string]json.RawMessage
	sent    []string
	// at is called before query-migrate is answered, with how many times it was.
	at func(query int)
	// finishes: from this query on QEMU has begun another pass and stops the guest.
	finishes int
	// given is closed when somebody who had the monitor has given it back.
	given chan struct{}
	once  sync.Once
}

// firstPages is how many pages there are.
const firstPages = 20000

// twoPasses is the stream of a guest all of whose pages have content.
var twoPasses = sync.OnceValue(func() []byte {
	return tiertest.New(tiertest.Options{ReturnPath: true, Passes: 2, Resend: 0.05,
		Blocks: []tiertest.Block{{Name: "pc.ram", Size: firstPages * 4096}}, Mix: tiertest.Mix{tiertest.Text: 1}}).Bytes()
})

// newSource has zeros for the last pages of the first pass, which in the parent have content.
func newSource(t *testing.T, zeros int) *source {
	t.Helper()
	s := &source{parent: twoPasses(), bytes: make([]byte, 0, len(twoPasses())), status: "active", run: "running", given: make(chan struct{}),
		params: map[string]json.RawMessage{"max-bandwidth": json.RawMessage(fmt.Sprint(1<<40 + 0xf11c + 2)), "downtime-limit": json.RawMessage("1")}}
	cur := stream.NewCursor(bytes.NewReader(s.parent), 0)
	w := ramparse.NewWalker(cur, 0, ramparse.Visitor{
		Frame: func(f *stream.Frame) error { s.bytes = append(s.bytes, f.Raw...); return nil },
		Bytes: func(b []byte) error { s.bytes = append(s.bytes, b...); return nil },
		Record: func(_ *ramparse.Decoder, r *ramparse.Record) error {
			at := int64(len(s.bytes))
			switch first := len(s.pages) < firstPages; {
			case r.Kind != ramparse.Page:
			case first && len(s.pages) >= firstPages-zeros:
				s.pages = append(s.pages, at)
				head := len(s.bytes)
				s.bytes = append(s.bytes, r.Raw[:len(r.Raw)-len(r.Data)]...)
				s.bytes[head+7] ^= 0x08 | 0x02 // RAM_SAVE_FLAG_PAGE, _ZERO
				s.bytes = append(s.bytes, 0)
				return nil
			case first:
				s.pages = append(s.pages, at)
			case s.pass2 == 0:
				s.pass2 = at
			}
			s.bytes = append(s.bytes, r.Raw...)
			return nil
		},
	})
	ok(t, w.RAM())
	s.bytes = append(s.bytes, s.parent[cur.Offset():]...)
	if s.pass2 == 0 {
		t.Fatal("there is no second pass")
	}
	return s
}

// left is how many pages of the first pass have not been put into a buffer.
func (s *source) left() int {
	at, _ := slices.BinarySearch(s.pages, s.put)
	return len(s.pages) - at
}

// write writes the stream as QEMU does: what is in its buffer waits for the socket.
func (s *source) write(f *os.File) {
	for b := s.bytes; len(b) > 0; {
		n := min(len(b), 32<<10)
		s.mu.Lock()
		s.put += int64(n)
		s.mu.Unlock()
		if _, err := f.Write(b[:n]); err != nil {
			s.mu.Lock()
			if s.status == "active" {
				s.status = "failed"
				if s.finishes == 0 { // who does not trust in that is tested with it
					s.run = "running"
				}
			}
			s.mu.Unlock()
			return
		}
		b = b[n:]
	}
}

func (s *source) serve(c *qmptest.Conn) {
	qmptest.Negotiated(func(c *qmptest.Conn, cmd qmptest.Command) {
		s.mu.Lock()
		if cmd.Execute == "query-migrate" {
			s.queries++
			if at, n := s.at, s.queries; at != nil {
				s.mu.Unlock()
				at(n)
				s.mu.Lock()
			}
		}
		defer s.mu.Unlock()
		s.sent = append(s.sent, cmd.Execute)
		answer := "{}"
		switch cmd.Execute {
		case "query-status":
			answer = fmt.Sprintf(`{"running": %v, "status": %q}`, s.run == "running", s.run)
		case "query-migrate":
			passes := 1
			if s.put > s.pass2 || s.finishes > 0 && s.queries >= s.finishes {
				passes = 2
				if s.status == "active" {
					s.run = "finish-migrate"
				}
			}
			answer = fmt.Sprintf(`{"status": %q, "ram": {"remaining": %d, "page-size": 4096, "dirty-sync-count": %d, "mbps": 8.5}}`, s.status, s.left()*4096, passes)
		case "query-migrate-capabilities", "query-yank":
			answer = "[]"
		case "query-migrate-parameters":
			b, _ := json.Marshal(s.params)
			answer = string(b)
		case "migrate-set-parameters":
			var set map[string]json.RawMessage
			_ = json.Unmarshal(cmd.Args, &set)
			for k, v := range set {
				s.params[k] = v
			}
		case "migrate_cancel":
			if s.status == "active" || s.status == "failed" {
				s.status = "cancelled"
			}
		case "cont":
			s.run = "running"
		}
		c.Reply(cmd, answer)
	})(c)
	s.once.Do(func() { close(s.given) })
}

// laterTest is armedConfig.LaterTime of the tests: a busy host gets to the hold too.
const laterTest = 2 * time.Minute

// arms starts the process with the monitor at addr.
func (s *source) arms(t *testing.T, addr string) *armedTest {
	t.Helper()
	a := newArmedTest(t)
	_, _, err := save.Run(t.Context(), vfs.OS, a.st, bytes.NewReader(s.parent), save.Options{VM: "vm"})
	ok(t, err)
	a.run(context.WithoutCancel(t.Context()), armedConfig{Buffer: 24 << 10, LaterTime: laterTest, Target: Target{QMP: addr},
		Kept: migration.Kept{Parameters: map[string]any{"max-bandwidth": 7, "downtime-limit": 300}}}, 8<<10)
	var writing sync.WaitGroup
	writing.Go(func() { s.write(a.stream) })
	t.Cleanup(func() {
		a.conn.Close()
		a.stream.Close()
		writing.Wait()
	})
	if a.hear().Hello == nil {
		t.Fatal("no hello")
	}
	return a
}

// goes has the checkpoint made, which must succeed.
func (a *armedTest) goes() {
	a.t.Helper()
	a.ask("ready")
	if !a.hear().Held {
		a.t.Fatal("it is not held")
	}
	a.ask("go")
	if r := a.hear().Report; r == nil || r.Error != "" {
		a.t.Errorf("report: %+v", r)
	}
	a.ask("done")
	ok(a.t, <-a.ended)
}

// isHeld waits until the process has given the monitor back.
func (s *source) isHeld(t *testing.T) {
	t.Helper()
	select {
	case <-s.given:
	case <-time.After(laterTest + time.Minute):
		t.Fatal("the process keeps the monitor")
	}
}

// TestArmedLater holds a stream late, unless what is under way shows that the guest's memory is
// not what it was. Where that shows too late, QEMU comes to the end of its pass: the guest is
// let run.
func TestArmedLater(t *testing.T) {
	for name, c := range map[string]struct {
		zeros       int
		least, most int // pages that are left
		outrun      bool
	}{
		"content":              {0, 256, 900, false},
		"all zeroed":           {8000, 500, 7000, false},
		"some zeroed":          {500, 500, 900, false},
		"the last ones zeroed": {2000, 0, 0, true},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			s := newSource(t, c.zeros)
			a := s.arms(t, qmptest.New(t, s.serve).Addr)
			if c.outrun {
				a.outrun(s)
				return
			}
			s.isHeld(t)
			s.mu.Lock()
			left, sent := s.left(), slices.Clone(s.sent)
			s.mu.Unlock()
			if left < c.least || left > c.most {
				t.Errorf("%d pages are left", left)
			}
			if slices.Contains(sent, "migrate_cancel") || slices.Contains(sent, "cont") || len(sent) > 500 {
				t.Errorf("%q", sent)
			}
			a.goes()
		})
	}
}

// outrun waits for the end of a process that has let QEMU come to the end of its pass: all is as
// it was.
func (a *armedTest) outrun(s *source) {
	t := a.t
	t.Helper()
	// The stream can tell it first.
	if err := <-a.ended; !errors.Is(err, migration.ErrOutrun) && !errors.Is(err, errNoAnswer) && !errors.Is(err, save.ErrNotHeld) {
		t.Error(err)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.run != "running" || s.status == "active" || string(s.params["max-bandwidth"]) != "7" || string(s.params["downtime-limit"]) != "300" {
		t.Errorf("the guest is %s, the migration %s, settings %s", s.run, s.status, s.params)
	}
	if note, _, err := a.st.ArmedFor(t.Context(), "vm"); note != nil || err != nil {
		t.Errorf("there is a note: %+v, %v", note, err)
	}
	if left, _ := filepath.Glob(a.st.Dir() + "/tmp/*"); len(left) > 0 {
		t.Errorf("%q", left)
	}
}

// TestArmedMonitorTaken stays where it first stops if somebody has the monitor, and does not
// have who waits for the hold wait for that.
func TestArmedMonitorTaken(t *testing.T) {
	t.Parallel()
	s := newSource(t, 0)
	q := qmptest.New(t, s.serve)
	other, err := net.Dial("unix", q.Addr)
	ok(t, err)
	defer other.Close()
	a := s.arms(t, q.Addr)
	start := time.Now()
	a.goes()
	if d := time.Since(start); d > 30*time.Second {
		t.Errorf("it took %v", d)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.queries > 0 {
		t.Errorf("%q", s.sent)
	}
}

// TestArmedOnItsWay has a command come, or end it, while the process has the monitor.
func TestArmedOnItsWay(t *testing.T) {
	for _, ask := range []string{"ready", "disarm"} {
		t.Run(ask, func(t *testing.T) {
			t.Parallel()
			s := newSource(t, 0)
			there, going := make(chan struct{}), make(chan struct{})
			s.at = func(n int) {
				if n == 7 {
					close(there)
					<-going
				}
			}
			a := s.arms(t, qmptest.New(t, s.serve).Addr)
			<-there
			a.ask(ask)
			time.AfterFunc(50*time.Millisecond, func() { close(going) })
			start := time.Now()
			if ask == "ready" {
				if !a.hear().Held {
					t.Error("it is not held")
				}
				s.mu.Lock()
				if left := s.left(); left < 1500 {
					t.Errorf("%d pages are left: it came to the end", left)
				}
				s.mu.Unlock()
				a.goes()
			} else {
				if r := a.hear().Report; r == nil || r.Error == "" {
					t.Errorf("%+v", r)
				}
				if err := <-a.ended; !errors.Is(err, errDisarmed) || s.status != "cancelled" || string(s.params["max-bandwidth"]) != "7" {
					t.Errorf("%v; %s, %s", err, s.status, s.params)
				}
			}
			if d := time.Since(start); d > 30*time.Second {
				t.Errorf("it took %v", d)
			}
		})
	}
}

// TestArmedOutrun has QEMU begin to finish though nothing says why: the guest is let run, also
// if QEMU does not answer before its stream is closed.
func TestArmedOutrun(t *testing.T) {
	for _, locked := range []bool{false, true} {
		t.Run(fmt.Sprint("locked ", locked), func(t *testing.T) {
			t.Parallel()
			s := newSource(t, 0)
			s.finishes = 20
			if locked {
				s.at = func(n int) {
					for n == 20 {
						s.mu.Lock()
						closed := s.status != "active"
						s.mu.Unlock()
						if closed {
							return
						}
						time.Sleep(time.Millisecond)
					}
				}
			}
			s.arms(t, qmptest.New(t, s.serve).Addr).outrun(s)
		})
	}
}
