package session

import (
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/flic-migrate/flic-migrate/tier/progress"
)

// heard is a server that is listened to, and its end of the socket, as a number that
// it would inherit.
func heard(t *testing.T) (s *server, theirs string) {
	t.Helper()
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	ok(t, err)
	f := os.NewFile(uintptr(fds[0]), "control")
	conn, err := net.FileConn(f)
	ok(t, err)
	f.Close()
	s = &server{ended: make(chan struct{})}
	go s.listen(conn)
	t.Cleanup(func() { conn.Close(); <-s.ended })
	return s, fmt.Sprintf("fd:%d", fds[1])
}

func TestControl(t *testing.T) {
	s, theirs := heard(t)
	c, err := Attach(theirs)
	ok(t, err)
	until(t, "hello", func() bool { return s.state().pid == os.Getpid() })
	c.Progress(progress.State{Pages: 1, PagesAll: 9})
	until(t, "progress", func() bool { return s.state().at == beat{1, 9} })
	if st := s.state(); st.ended || st.report != nil || st.beats != 2 {
		t.Errorf("%+v", st)
	}
	c.Progress(progress.State{Pages: 9, PagesAll: 9})
	c.Close(ServerReport{Checkpoint: "vm@1", Error: "damage", ExitCode: 4}, true)
	st := s.final(t.Context())
	if !st.ended || !st.damaged || st.report == nil || st.report.Checkpoint != "vm@1" || st.at.Pages != 9 {
		t.Errorf("%+v", st)
	}

	// Nobody listens, and nobody is to.
	none, err := Attach("")
	ok(t, err)
	none.Progress(progress.State{})
	none.Close(ServerReport{}, false)
	for _, bad := range []string{"fd:", "fd:1", "fd:x", "fd:99999", filepath.Join(t.TempDir(), "none")} {
		if c, err := Attach(bad); err == nil || c != nil {
			t.Errorf("%q: %v", bad, err)
		}
	}
}

// A server does not wait for a resume that does not read, and outlives it.
func TestControlUnread(t *testing.T) {
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	ok(t, err)
	ok(t, unix.SetsockoptInt(fds[1], unix.SOL_SOCKET, unix.SO_SNDBUF, 4096))
	c, err := Attach(fmt.Sprintf("fd:%d", fds[1]))
	ok(t, err)
	start := time.Now()
	for i := range 10000 {
		c.Progress(progress.State{Pages: int64(i)})
		if i%100 == 0 {
			time.Sleep(50 * time.Microsecond)
		}
	}
	if d := time.Since(start); d > 5*time.Second {
		t.Errorf("10000 progresses took %v", d)
	}
	start = time.Now()
	c.Close(ServerReport{Error: strings.Repeat("x", 1<<19)}, false)
	if d := time.Since(start); d > lastWord+2*time.Second {
		t.Errorf("the last word took %v", d)
	}
	unix.Close(fds[0])

	s, theirs := heard(t)
	if c, err = Attach(theirs); err != nil {
		t.Fatal(err)
	}
	until(t, "hello", func() bool { return s.state().pid != 0 })
	c.Progress(progress.State{Pages: 1})
	c.Close(ServerReport{}, false)
	if st := s.final(t.Context()); st.report == nil || !st.ended {
		t.Errorf("%+v", st)
	}
}

// Whatever comes instead of messages is no report, and takes no memory.
func TestControlHostile(t *testing.T) {
	for name, text := range map[string]string{
		"nothing":        "",
		"half a message": `{"report":{"exit_code":0`,
		"no JSON":        "hello\n",
		"another type":   `{"report":7}` + "\n",
		"endless":        strings.Repeat(" ", maxMessage+10),
		"deep":           strings.Repeat("[", 100000) + "\n",
	} {
		t.Run(name, func(t *testing.T) {
			ours, theirs := net.Pipe()
			s := &server{ended: make(chan struct{})}
			go s.listen(ours)
			_, _ = theirs.Write([]byte(text))
			theirs.Close()
			<-s.ended
			if st := s.state(); st.report != nil || st.pid != 0 {
				t.Errorf("%+v", st)
			}
		})
	}
}

func FuzzControl(f *testing.F) {
	f.Add([]byte(`{"hello":{"pid":1}}` + "\n" + `{"progress":{"pages":1,"pages_all":2}}` + "\n" + `{"report":{"exit_code":4,"lazy_report":{"pages":1}},"damaged":true}` + "\n"))
	f.Add([]byte("\n\n{}\nnull\n"))
	f.Fuzz(func(t *testing.T, b []byte) {
		ours, theirs := net.Pipe()
		s := &server{ended: make(chan struct{})}
		go s.listen(ours)
		_, _ = theirs.Write(b)
		theirs.Close()
		<-s.ended
		s.state()
	})
}
