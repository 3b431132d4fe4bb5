package session

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/flic-migrate/flic-migrate/qmp"
	"github.com/flic-migrate/flic-migrate/qmp/migration"
	"github.com/flic-migrate/flic-migrate/tier/progress"
)

// servers are those of one resume, one after the other: it starts them or has them
// started, shows their progress, notices when there is none, and ends a resume whose
// server has died before the guest ran. QEMU neither says how far a restore is nor
// notices any of that.
type servers struct {
	name     string        // of the checkpoint
	recover  bool          // the first one already goes on for another
	stalled  time.Duration // how long without a message is worth a word; 0: any time
	restarts int           // how many may still be started for one that has died
	say      func(string)
	show     func(progress.State) // nil: not to be shown
	running  chan struct{}        // closed when the guest may run

	mu       sync.Mutex
	now      *server // the newest; nil: none is known
	regained bool    // another has been started for one that has died
	door     *net.UnixListener
	dir      string // where the door is
	failed   error  // why there is none

	seen  int       // beats of the newest, by the watch
	at    time.Time // when that was new
	told  bool      // that it is held up
	watch *server   // whose beats they are
}

const watchEvery = 100 * time.Millisecond

// start starts a server, whose command line is what args makes of its end of the
// control socket. It writes a stream to out, unless that is nil, and, if it is both
// ways, reads QEMU's requests from it. It outlives this process and its terminal,
// because the guest needs it. End kills it.
func (s *servers) start(args func(control string) []string, out *os.File, bothWays bool) (end func(), err error) {
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, err
	}
	ours, theirs := os.NewFile(uintptr(fds[0]), "control"), os.NewFile(uintptr(fds[1]), "control")
	defer ours.Close()
	// Or the server's end would not be seen.
	defer theirs.Close()
	conn, err := net.FileConn(ours)
	if err != nil {
		return nil, err
	}
	line := args(inherited + "3") // the first of ExtraFiles
	cmd := exec.Command(line[0], line[1:]...)
	cmd.ExtraFiles = []*os.File{theirs}
	if bothWays {
		cmd.Stdin = out
	}
	if out != nil {
		cmd.Stdout = out
	}
	cmd.Stderr = os.Stderr
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	if err := cmd.Start(); err != nil {
		conn.Close()
		return nil, err
	}
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		_ = cmd.Wait() // its report says more
	}()
	s.hear(conn, cmd.Process.Pid)
	return func() {
		_ = cmd.Process.Kill()
		select {
		case <-ended:
		case <-time.After(killTime):
		}
	}, nil
}

// killTime is how long a process that is killed may take to be gone. One that waits
// for a device is gone when the device answers, and nobody needs that.
const killTime = 5 * time.Second

// hear takes conn for the newest server's.
func (s *servers) hear(conn net.Conn, pid int) {
	n := &server{ended: make(chan struct{}), pid: pid}
	s.mu.Lock()
	s.now = n
	s.mu.Unlock()
	go n.listen(conn)
}

// newest is the server that was heard of last.
func (s *servers) newest() *server {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.now
}

// expect returns the path for a server that QEMU starts, and the same each time;
// empty if there can be none: then nothing will be known of that server. user tells
// which user QEMU is.
func (s *servers) expect(user func() int) string {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.door == nil && s.failed == nil {
		if s.failed = s.open(user()); s.failed != nil {
			s.say(fmt.Sprintf("%s: it will not be known how the server does: %v", s.name, s.failed))
		}
	}
	if s.door == nil {
		return ""
	}
	return s.door.Addr().String()
}

func (s *servers) open(uid int) (err error) {
	if s.dir, err = os.MkdirTemp("", "flic-resume-"); err != nil { // mode 0700
		return err
	}
	path := filepath.Join(s.dir, "s")
	if s.door, err = net.ListenUnix("unix", &net.UnixAddr{Name: path, Net: "unix"}); err != nil {
		return err
	}
	if uid != os.Getuid() && os.Getuid() == 0 {
		if err = errors.Join(os.Chown(path, uid, -1), os.Chown(s.dir, uid, -1)); err != nil {
			s.door.Close()
			s.door = nil
			return err
		}
	}
	go s.admit(s.door, uid)
	return nil
}

// admits tells whether a process of the user peer may be at the other end of a socket, whose path
// the kernel shows to all: of this process's user, of another one that may, or root. A server's
// other one is QEMU's, and an armed process's the store's.
func admits(peer uint32, self, other int) bool {
	return peer == 0 || int(peer) == self || int(peer) == other
}

// admit hears the servers that connect.
func (s *servers) admit(door *net.UnixListener, uid int) {
	for {
		conn, err := door.AcceptUnix()
		if err != nil {
			return
		}
		peer, known := qmp.PeerOf(conn)
		if !known || !admits(peer.Uid, os.Getuid(), uid) {
			conn.Close()
			continue
		}
		s.hear(conn, int(peer.Pid))
	}
}

// close lets no more servers in. Those that serve go on.
func (s *servers) close() {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.door != nil {
		s.door.Close()
	}
	if s.dir != "" {
		os.RemoveAll(s.dir)
	}
}

// gone tells whether the newest server is known to have ended before its work.
func (s *servers) gone() bool {
	st := s.newest().state()
	if st.report != nil {
		return st.report.Error != ""
	}
	return st.ended
}

// regain decides whether another server is to go on for one that has died.
func (s *servers) regain() bool {
	last := s.newest().final(context.Background())
	if s.restarts <= 0 || last.damaged {
		return false
	}
	s.restarts--
	s.mu.Lock()
	s.regained = true
	s.now = nil // nothing is known yet of the one to come
	s.mu.Unlock()
	s.say(fmt.Sprintf("%s: the restore's server has died; another goes on", s.name))
	return true
}

// run watches the servers until ctx ends, or returns the reason why the resume has
// to.
func (s *servers) run(ctx context.Context) error {
	tick := time.NewTicker(watchEvery)
	defer tick.Stop()
	s.at = time.Now()
	var since time.Time
	for {
		select {
		case <-ctx.Done():
			s.look() // whoever read that it hangs is to read that it went on
			return nil
		case <-tick.C:
		}
		now := s.look()
		if !s.leftQEMU(now) {
			since = time.Time{}
			continue
		}
		switch {
		case since.IsZero():
			since = time.Now()
		case time.Since(since) < lastWord:
		case s.recover:
			return fmt.Errorf("%w (the new one too)", migration.ErrServerDied)
		default:
			return fmt.Errorf("%w: its server, process %d, has died, and this QEMU waits for ever: end it and start another", migration.ErrBeforeRun, now.pid)
		}
	}
}

// leftQEMU tells whether the server has ended and QEMU may not notice.
func (s *servers) leftQEMU(now state) bool {
	if s.ran() {
		return false // it notices
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	// One that leaves a report has sent all, or made QEMU end; in a recovery it must
	// not.
	return now.ended && !s.regained && (now.report == nil || s.recover)
}

// look reads what the newest server has said, shows it, and says how it is.
func (s *servers) look() state {
	n := s.newest()
	now := n.state()
	if n != s.watch {
		s.watch, s.seen = n, 0
	}
	if now.beats != s.seen {
		if s.told {
			s.say(fmt.Sprintf("%s: the server goes on", s.name))
		}
		s.seen, s.at, s.told = now.beats, time.Now(), false
		if s.show != nil {
			s.show(progress.State{Phase: "resume", Pages: now.at.Pages, PagesAll: now.at.PagesAll})
		}
		return now
	}
	if s.told || s.stalled <= 0 || time.Since(s.at) < s.stalled || now.report != nil {
		return now
	}
	s.told = true
	if n == nil {
		s.say(fmt.Sprintf("%s: for %v no sign of the server; if QEMU was to start it, its output may say why", s.name, s.stalled))
		return now
	}
	text := fmt.Sprintf("%s: no progress for %v: the server, process %d, has sent %d of %d pages%s. ", s.name, s.stalled, now.pid, now.at.Pages, now.at.PagesAll, doing(now.pid))
	if s.ran() {
		text += fmt.Sprintf("The guest may be waiting for it, and has lost nothing. If the server does not go on, end it with kill -9 %d", now.pid)
	} else {
		text += "The guest has not run, and the checkpoint is untouched: to give up, end that QEMU"
	}
	s.say(text)
	return now
}

// afterwards says what becomes of the guest, whose run state is known if it may run, when
// this process is asked to end amid a resume. The server outlives it.
func (s *servers) afterwards(runState string) string {
	n := s.newest()
	now := n.state()
	serves := n != nil && !now.ended && now.report == nil
	switch {
	case s.ran() && serves:
		return fmt.Sprintf("the guest is %s, and process %d, which has sent %d of %d pages, brings the rest of its memory. If that dies nobody starts another, and resume --recover %s goes on",
			runState, now.pid, now.at.Pages, now.at.PagesAll, s.name)
	case s.ran():
		return fmt.Sprintf("the guest is %s, and it is not known whether all of its memory will come; if its server has died, resume --recover %s goes on", runState, s.name)
	case serves:
		return fmt.Sprintf("the guest has not run. Process %d goes on loading it, and leaves it paused: cont lets it run; or end that QEMU, as the checkpoint is untouched", now.pid)
	}
	return "the guest has not run, and the checkpoint is untouched: end that QEMU"
}

// ran tells whether the guest may run.
func (s *servers) ran() bool {
	select {
	case <-s.running:
		return true
	default:
		return false
	}
}

// doing says what a process that gets nothing done does, if that is of use and can
// be seen.
func doing(pid int) string {
	b, _ := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	// proc(5): the state's letter comes after the name, which may hold anything,
	// brackets too.
	i := bytes.LastIndexByte(b, ')')
	if i < 0 || i+2 >= len(b) {
		return ""
	}
	switch b[i+2] {
	case 'T', 't':
		return " and is stopped (SIGSTOP)"
	case 'D':
		return " and waits for a device"
	}
	return ""
}
