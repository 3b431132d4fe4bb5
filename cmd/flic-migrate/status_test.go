package main

import (
	"context"
	"errors"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/flic-migrate/flic-migrate/qmp/migration"
	"github.com/flic-migrate/flic-migrate/tier/progress"
)

// observed is a serverWatch whose words are kept.
type observed struct {
	*serverWatch
	said  []string
	shown []progress.State
}

func observe(t *testing.T) *observed {
	dir := t.TempDir()
	o := &observed{}
	o.serverWatch = &serverWatch{path: filepath.Join(dir, "status"), report: filepath.Join(dir, "report"), name: "vm@1",
		running: make(chan struct{}), at: time.Now()}
	o.say = func(text string) { o.said = append(o.said, text) }
	o.show = func(p progress.State) { o.shown = append(o.shown, p) }
	return o
}

func TestStatus(t *testing.T) {
	o := observe(t)
	s := newStatusFile(o.path, slog.New(slog.DiscardHandler))
	var next []progress.State
	beat := s.wrap(func(p progress.State) { next = append(next, p) })
	o.look()
	beat(progress.State{Pages: 12345678, PagesAll: 1 << 34})
	o.look()
	o.look()
	beat(progress.State{Pages: 7, PagesAll: 9}) // shorter than what is there
	o.look()
	if want := (status{PID: os.Getpid(), Namespace: pidNamespace(), Pages: 7, PagesAll: 9, Beat: 2}); o.seen != want {
		t.Errorf("read %+v, want %+v", o.seen, want)
	}
	if len(next) != 2 || len(o.shown) != 3 || o.shown[1].Pages != 12345678 || o.shown[1].PagesAll != 1<<34 {
		t.Errorf("passed on %+v, shown %+v", next, o.shown)
	}

	// Half of one, or none, is no news.
	for _, text := range []string{"", `{"pid":1`, strings.Repeat(" ", statusLen)} {
		was := o.seen
		ok(t, os.WriteFile(o.path, []byte(text), 0o600))
		o.look()
		if o.seen != was {
			t.Errorf("%q gave %+v", text, o.seen)
		}
	}
	if newStatusFile("", nil).wrap(nil) != nil {
		t.Error("a callback without a file or anyone to call")
	}
	if newStatusFile(filepath.Join(t.TempDir(), "no", "such"), slog.New(slog.DiscardHandler)) != nil {
		t.Error("a status file where there can be none")
	}
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
	s := newStatusFile(o.path, slog.New(slog.DiscardHandler))
	o.look()
	o.look()
	o.look()
	s.wrap(nil)(progress.State{})
	o.look()
	if len(o.said) != 4 || o.said[1] != "vm@1: the server goes on" || !strings.Contains(o.said[2], "kill -9") || o.said[3] != o.said[1] {
		t.Errorf("said %q", o.said)
	}
	// The report is a server's last word.
	ok(t, os.WriteFile(o.report, nil, 0o600))
	o.look()
	if len(o.said) != 4 {
		t.Errorf("said %q after the report", o.said)
	}
}

// TestServerGone: only a server that is known to have died before the guest ran
// ends a resume.
func TestServerGone(t *testing.T) {
	child := exec.Command("true")
	ok(t, child.Start())
	// A zombie, as a server is until QEMU asks for it.
	until(t, "the child's end", func() bool { return processState(child.Process.Pid) == 'Z' })
	t.Cleanup(func() { child.Wait() })
	dead := status{PID: child.Process.Pid, Namespace: pidNamespace()}
	for _, tc := range []struct {
		name    string
		server  status
		report  bool
		running bool
		recover bool
		want    error
	}{
		{"died", dead, false, false, false, migration.ErrBeforeRun},
		{"died in a recovery", dead, true, false, true, migration.ErrServerDied},
		{"ended with a report", dead, true, false, false, nil},
		{"died after RUN", dead, false, true, false, nil},
		{"lives", status{PID: os.Getpid(), Namespace: pidNamespace()}, false, false, false, nil},
		{"somewhere else", status{PID: child.Process.Pid, Namespace: "pid:[1]"}, false, false, false, nil},
		{"not known", status{}, false, false, false, nil},
	} {
		t.Run(tc.name, func(t *testing.T) {
			t.Parallel()
			o := observe(t)
			o.seen, o.recover = tc.server, tc.recover
			if tc.report {
				ok(t, os.WriteFile(o.report, nil, 0o600))
			}
			if tc.running {
				done := make(chan struct{})
				close(done)
				o.running = done
			}
			ctx, cancel := context.WithTimeout(t.Context(), lastWord+5*watchEvery)
			defer cancel()
			if err := o.run(ctx); !errors.Is(err, tc.want) {
				t.Errorf("%v, want %v", err, tc.want)
			}
		})
	}
	if doing(os.Getpid()) != "" || doing(1<<30) != "" || !processEnded(1<<30) || processEnded(os.Getpid()) {
		t.Error("what is told of this process and of none")
	}
}
