package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/flic-migrate/flic-migrate/qmp/migration"
	"github.com/flic-migrate/flic-migrate/tier/progress"
)

// status is what a restore that serves a resume tells it: who it is, how far it is
// and, by changing, that nothing holds it up. QEMU itself neither says how far a
// restore is nor notices a server that hangs.
type status struct {
	PID       int    `json:"pid"`
	Namespace string `json:"pid_namespace"`
	Pages     int64  `json:"pages"`
	PagesAll  int64  `json:"pages_all"`
	Beat      int64  `json:"beat"` // grows a few times a second
}

// statusLen is the length of the file, which is rewritten in place: the longest
// status and blanks.
const statusLen = 256

// statusFile is the restore's end.
type statusFile struct {
	f    *os.File
	last status
}

// newStatusFile returns nil without a path. A status that can't be written is
// no reason not to restore.
func newStatusFile(path string, log *slog.Logger) *statusFile {
	if path == "" {
		return nil
	}
	f, err := os.OpenFile(path, os.O_CREATE|os.O_WRONLY|os.O_TRUNC, 0o600)
	if err != nil {
		log.Warn("no status", "error", err)
		return nil
	}
	s := &statusFile{f: f, last: status{PID: os.Getpid(), Namespace: pidNamespace()}}
	s.write()
	return s
}

func (s *statusFile) write() {
	b, _ := json.Marshal(s.last)
	line := append(bytes.Repeat([]byte{' '}, statusLen-1), '\n')
	copy(line, b)
	// Short, aligned and in the page cache, so that a reader seldom sees half of
	// it, and takes what it can't parse for no news.
	s.f.WriteAt(line, 0)
}

// wrap returns a progress callback that keeps the file up to date.
func (s *statusFile) wrap(next func(progress.State)) func(progress.State) {
	if s == nil {
		return next
	}
	return func(p progress.State) {
		s.last.Pages, s.last.PagesAll = p.Pages, p.PagesAll
		s.last.Beat++
		s.write()
		if next != nil {
			next(p)
		}
	}
}

// serverWatch is the resume's end: it shows the server's progress, notices when there
// is none, and ends a resume whose server has died before the guest ran, which
// QEMU does not notice either.
type serverWatch struct {
	path    string        // of the status
	report  string        // path of the server's report, its last word
	name    string        // of the checkpoint
	stalled time.Duration // how long without a beat is worth a word; 0: any time
	say     func(string)
	show    func(progress.State) // nil: not to be shown
	running <-chan struct{}      // closed when the guest may run
	recover bool
	// regaining: that a server has died is known, and another has been started.
	regaining atomic.Bool

	seen status
	at   time.Time // when seen was new
	told bool      // that it is held up
}

const (
	watchEvery = 100 * time.Millisecond
	// lastWord is how long QEMU may need to take in what a server had written
	// when it ended, and how long a server's report may come after that.
	lastWord = time.Second
)

// run returns when ctx ends, or with the reason why the resume has to.
func (w *serverWatch) run(ctx context.Context) error {
	tick := time.NewTicker(watchEvery)
	defer tick.Stop()
	w.at = time.Now()
	var gone time.Time
	for {
		select {
		case <-ctx.Done():
			w.look() // whoever read that it hangs is to read that it went on
			return nil
		case <-tick.C:
		}
		w.look()
		select {
		case <-w.running:
			gone = time.Time{}
			continue
		default:
		}
		switch {
		case w.regaining.Load(), !w.seen.ended(), exists(w.report) && !w.recover:
			// One that leaves a report has sent all, or made QEMU end; in a
			// recovery it must not.
			gone = time.Time{}
		case gone.IsZero():
			gone = time.Now()
		case time.Since(gone) > lastWord:
			if w.recover {
				return fmt.Errorf("%w (the new one too)", migration.ErrServerDied)
			}
			return fmt.Errorf("%w: its server, process %d, has died, and this QEMU waits for ever: end it and start another", migration.ErrBeforeRun, w.seen.PID)
		}
	}
}

// look reads the status.
func (w *serverWatch) look() {
	var s status
	b, err := os.ReadFile(w.path)
	if w.regaining.Load() && errors.Is(err, fs.ErrNotExist) {
		w.seen = s // nothing is known yet of the one to come
	}
	if err == nil && json.Unmarshal(b, &s) == nil && s != w.seen {
		if w.told {
			w.say(fmt.Sprintf("%s: the server goes on", w.name))
		}
		w.seen, w.at, w.told = s, time.Now(), false
		if w.show != nil {
			w.show(progress.State{Phase: "resume", Pages: s.Pages, PagesAll: s.PagesAll})
		}
		return
	}
	if w.told || w.stalled <= 0 || time.Since(w.at) < w.stalled || exists(w.report) {
		return
	}
	w.told = true
	if w.seen.PID == 0 {
		w.say(fmt.Sprintf("%s: for %v no sign of the server; if QEMU was to start it, its output may say why", w.name, w.stalled))
		return
	}
	w.say(fmt.Sprintf("%s: no progress for %v: the server, process %d, has sent %d of %d pages%s. The guest may be waiting for it, and has lost nothing. "+
		"If the server does not go on, end it with kill -9 %d", w.name, w.stalled, w.seen.PID, w.seen.Pages, w.seen.PagesAll, doing(w.seen.PID), w.seen.PID))
}

// ended tells whether the server is known to be no more.
func (s status) ended() bool {
	return s.PID != 0 && s.Namespace == pidNamespace() && processEnded(s.PID)
}

// processEnded tells whether a process of this PID namespace is no more.
func processEnded(pid int) bool {
	// One that QEMU has not asked for its exit status yet is still listed.
	return errors.Is(syscall.Kill(pid, 0), syscall.ESRCH) || processState(pid) == 'Z'
}

func exists(path string) bool {
	_, err := os.Stat(path)
	return !errors.Is(err, fs.ErrNotExist)
}

// doing says what a process that gets nothing done does, if that is of use.
func doing(pid int) string {
	switch processState(pid) {
	case 'T', 't':
		return " and is stopped (SIGSTOP)"
	case 'D':
		return " and waits for a device"
	}
	return ""
}

// processState is the letter of /proc/PID/stat (proc(5)), 0 if it can't be read.
func processState(pid int) byte {
	b, _ := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	// The name before it may hold anything, brackets too.
	if i := bytes.LastIndexByte(b, ')'); i >= 0 && i+2 < len(b) {
		return b[i+2]
	}
	return 0
}

// pidNamespace says among whose processes a PID counts; QEMU may be in a
// container.
func pidNamespace() string {
	name, _ := os.Readlink("/proc/self/ns/pid")
	return name
}
