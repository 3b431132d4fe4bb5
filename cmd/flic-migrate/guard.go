package main

import (
	"encoding/json"
	"io"
	"os"
	"os/exec"
	"os/signal"
	"syscall"

	"golang.org/x/sys/unix"

	"github.com/flic-migrate/flic-migrate/qmp/session"
)

// guardName is what this program is called while it is a guard: it waits for the end of
// the process that has started it, and does then what that one can't do any more if it
// was killed.
const guardName = "flic-migrate-guard"

// guard starts a process that reads the stream of a background snapshot to its
// end if this one is killed: QEMU 7.2 leaves the guest hanging if nobody does.
// The release ends it; the stream must not be closed before. Must be called before
// the stream is made non-blocking.
func guard(stream *os.File) (release func(), err error) {
	g, err := startGuard(nil, stream)
	if err != nil {
		return nil, err
	}
	return g.Release, nil
}

// guardQEMU starts a process that lets a guest run and puts settings back if this one is
// killed meanwhile, or leaves that to it.
func guardQEMU(t session.Target) (*session.Guard, error) {
	b, err := json.Marshal(t)
	if err != nil {
		return nil, err
	}
	return startGuard([]string{string(b)})
}

// startGuard starts one with arguments and, from 4 on, files.
func startGuard(args []string, files ...*os.File) (*session.Guard, error) {
	r, w, err := os.Pipe()
	if err != nil {
		return nil, err
	}
	defer r.Close()
	cmd := exec.Command("/proc/self/exe")
	cmd.Args = append([]string{guardName}, args...)
	cmd.ExtraFiles = append([]*os.File{r}, files...)
	// What is sent to the whole group is not meant for it.
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	if err := cmd.Start(); err != nil {
		w.Close()
		return nil, err
	}
	return &session.Guard{
		Release: func() {
			_ = cmd.Process.Kill()
			_ = cmd.Wait()
			w.Close()
		},
		Leave: func() { w.Close() },
	}, nil
}

// guardMain is the guard's main function: with an argument it is guardQEMU's.
func guardMain() {
	signal.Ignore(syscall.SIGINT, syscall.SIGTERM, syscall.SIGHUP)
	// Nothing is ever written to it: it ends with the process that it guards.
	_, _ = io.Copy(io.Discard, os.NewFile(3, "guarded"))
	if len(os.Args) > 1 {
		var t session.Target
		if json.Unmarshal([]byte(os.Args[1]), &t) == nil {
			_ = session.PutRight(t) // there is nobody to tell; the next checkpoint sees it
		}
		return
	}
	// The guarded process may have made the stream non-blocking, for both.
	if unix.SetNonblock(4, false) == nil {
		_, _ = io.Copy(io.Discard, os.NewFile(4, "migration stream"))
	}
}
