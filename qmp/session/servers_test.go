package session

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/flic-migrate/flic-migrate/qmp/migration"
	"github.com/flic-migrate/flic-migrate/tier/progress"
)

// observed are servers whose watch's words are kept.
type observed struct {
	*servers
	mu    sync.Mutex
	said  []string
	shown []progress.State
}

func observe(t *testing.T) *observed {
	o := &observed{}
	o.servers = &servers{name: "vm@1", running: make(chan struct{}), at: time.Now(),
		say:  func(text string) { o.mu.Lock(); o.said = append(o.said, text); o.mu.Unlock() },
		show: func(p progress.State) { o.shown = append(o.shown, p) }}
	t.Cleanup(o.close)
	return o
}

// has makes a server the newest; what it says is set by hand.
func (o *observed) has(pid int) *server {
	n := &server{ended: make(chan struct{}), pid: pid}
	o.servers.mu.Lock()
	o.now = n
	o.servers.mu.Unlock()
	return n
}

func TestStalled(t *testing.T) {
	o := observe(t)
	o.look()
	if o.said != nil {
		t.Errorf("said %q without being asked to", o.said)
	}
	o.stalled = time.Nanosecond
	o.look()
	o.look()
	if len(o.said) != 1 || !strings.Contains(o.said[0], "no sign of the server") {
		t.Errorf("without a server: %q", o.said)
	}
	s := o.has(os.Getpid())
	s.beats = 1
	o.look()
	o.look()
	o.look()
	s.beats, s.at = 2, beat{3, 4}
	o.look()
	if len(o.said) != 4 || o.said[1] != "vm@1: the server goes on" || !strings.Contains(o.said[2], "has not run") || strings.Contains(o.said[2], "lost nothing") || o.said[3] != o.said[1] {
		t.Errorf("said %q", o.said)
	}
	// What there is to do depends on whether there is a guest that waits.
	close(o.running)
	o.look()
	o.look()
	if len(o.said) != 5 || !strings.Contains(o.said[4], "lost nothing") || !strings.Contains(o.said[4], "kill -9") {
		t.Errorf("said %q", o.said)
	}
	if len(o.shown) != 2 || o.shown[1].Pages != 3 || o.shown[1].PagesAll != 4 {
		t.Errorf("shown %+v", o.shown)
	}
	// The report is a server's last word.
	s.report = &ServerReport{}
	o.look()
	if len(o.said) != 5 {
		t.Errorf("said %q after the report", o.said)
	}
	if doing(os.Getpid()) != "" || doing(1<<30) != "" {
		t.Error("what is told of this process and of none")
	}
}

// TestServerGone: only a server that has died before the guest ran, and not in a way
// that QEMU notices, ends a resume.
func TestServerGone(t *testing.T) {
	for _, tc := range []struct {
		name                          string
		ended, report, running, again bool
		regained                      bool
		want                          error
	}{
		{name: "died", ended: true, want: migration.ErrBeforeRun},
		{name: "died in a recovery", ended: true, report: true, again: true, want: migration.ErrServerDied},
		{name: "ended with a report", ended: true, report: true},
		{name: "died after RUN", ended: true, running: true},
		{name: "another has been started", ended: true, regained: true},
		{name: "lives"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			t.Parallel()
			o := observe(t)
			o.recover, o.regained = tc.again, tc.regained
			s := o.has(7)
			if tc.ended {
				close(s.ended)
			}
			if tc.report {
				s.report = &ServerReport{Error: "no"}
			}
			if tc.running {
				close(o.running)
			}
			ctx, cancel := context.WithTimeout(t.Context(), lastWord+5*watchEvery)
			defer cancel()
			if err := o.run(ctx); !errors.Is(err, tc.want) {
				t.Errorf("%v, want %v", err, tc.want)
			}
			if gone := o.gone(); gone != tc.ended {
				t.Errorf("gone: %v", gone)
			}
		})
	}
	t.Run("not known", func(t *testing.T) {
		o := observe(t)
		ctx, cancel := context.WithTimeout(t.Context(), lastWord+5*watchEvery)
		defer cancel()
		if err := o.run(ctx); err != nil || o.gone() {
			t.Error(err)
		}
	})
}

// TestRegain: another server goes on, as often as it may, unless it would fail like
// the last.
func TestRegain(t *testing.T) {
	o := observe(t)
	o.restarts = 1
	s := o.has(7)
	s.report = &ServerReport{Error: "killed", ExitCode: 1}
	close(s.ended)
	if !o.regain() || o.newest() != nil || o.gone() {
		t.Error("no other server")
	}
	close(o.has(8).ended)
	if o.regain() {
		t.Error("one too many")
	}
	o = observe(t)
	o.restarts = 5
	s = o.has(7)
	s.report, s.damaged = &ServerReport{Error: "checksum"}, true
	close(s.ended)
	if o.regain() {
		t.Error("what is damaged for one is damaged for all")
	}
}

// TestStartServer: a process is heard over the socket that it inherits, and its end
// is noticed however it comes.
func TestStartServer(t *testing.T) {
	o := observe(t)
	shell := func(script string) func(string) []string {
		return func(control string) []string { return []string{"/bin/sh", "-c", script, control} }
	}
	out, err := os.Create(filepath.Join(t.TempDir(), "out"))
	ok(t, err)
	defer out.Close()
	end, err := o.start(shell(`test "$0" = fd:3 && echo '{"report":{"checkpoint":"vm@1"}}' >&3; echo stream`), out, false)
	ok(t, err)
	st := o.newest().final(t.Context())
	if !st.ended || st.report == nil || st.report.Checkpoint != "vm@1" || st.pid == 0 || o.gone() {
		t.Errorf("%+v", st)
	}
	end()
	if b, _ := os.ReadFile(out.Name()); string(b) != "stream\n" {
		t.Errorf("wrote %q", b)
	}

	end, err = o.start(shell("exec sleep 60"), nil, false)
	ok(t, err)
	if st := o.newest().state(); st.ended || st.pid == 0 {
		t.Errorf("%+v", st)
	}
	end()
	if st := o.newest().final(t.Context()); !st.ended || !o.gone() {
		t.Errorf("killed: %+v", st)
	}
	if _, err := o.start(func(string) []string { return []string{"/no/such/program"} }, nil, false); err == nil {
		t.Error("started what is not there")
	}
}

// TestExpect: a server that QEMU starts is heard, and a stranger is not.
func TestExpect(t *testing.T) {
	t.Setenv("TMPDIR", t.TempDir())
	o := observe(t)
	path := o.expect(os.Getuid)
	if again := o.expect(os.Getuid); path == "" || again != path {
		t.Fatalf("%q, %q", path, again)
	}
	if fi, err := os.Stat(filepath.Dir(path)); err != nil || fi.Mode().Perm() != 0o700 {
		t.Errorf("%v, %v", fi, err)
	}
	c, err := Attach(path)
	ok(t, err)
	until(t, "hello", func() bool { return o.newest().state().pid == os.Getpid() })
	c.Close(ServerReport{Checkpoint: "vm@1"}, false)
	if st := o.newest().final(t.Context()); st.report == nil || st.report.Checkpoint != "vm@1" {
		t.Errorf("%+v", st)
	}
	o.close()
	if left, err := os.ReadDir(os.TempDir()); err != nil || len(left) > 0 {
		t.Errorf("left: %v, %v", left, err)
	}

	// Where no socket can be, the resume goes on without.
	t.Setenv("TMPDIR", filepath.Join(t.TempDir(), strings.Repeat("long", 30)))
	ok(t, os.MkdirAll(os.TempDir(), 0o700))
	o = observe(t)
	if path := o.expect(os.Getuid); path != "" || len(o.said) != 1 || o.expect(os.Getuid) != "" {
		t.Errorf("%q, said %q", path, o.said)
	}
}

// Who is no server of ours may not speak for one.
func TestAdmits(t *testing.T) {
	for _, test := range []struct {
		peer, self, qemu int
		want             bool
	}{
		{1000, 1000, 1000, true}, // all are one user's
		{107, 0, 107, true},      // QEMU's, of a resume by root
		{0, 1000, 107, true},     // root may do all that this could do
		{1000, 1000, 107, true},
		{65534, 0, 107, false},
		{65534, 1000, 1000, false},
	} {
		if got := admits(uint32(test.peer), test.self, test.qemu); got != test.want {
			t.Errorf("%+v: %v", test, got)
		}
	}
}

// Who ends a resume is told what becomes of the guest, which goes on without it.
func TestAfterwards(t *testing.T) {
	o := observe(t)
	check := func(runState string, words ...string) {
		t.Helper()
		text := o.afterwards(runState)
		for _, w := range words {
			if !strings.Contains(text, w) {
				t.Errorf("%q does not say %q", text, w)
			}
		}
	}
	check("", "has not run", "untouched", "end that QEMU")
	s := o.has(4711)
	s.at = beat{3, 4}
	check("", "has not run", "Process 4711", "cont")
	close(o.running)
	check("running", "the guest is running", "process 4711", "3 of 4 pages", "resume --recover vm@1")
	close(s.ended)
	check("paused", "the guest is paused", "not known", "resume --recover vm@1")
}
