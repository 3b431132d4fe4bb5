package main

import (
	"io"
	"os"
	"os/exec"
	"os/signal"
	"syscall"

	"golang.org/x/sys/unix"
)

// guardName is what this program is called while it is a guard.
const guardName = "flic-migrate-guard"

// guard starts a process that reads the stream of a background snapshot to its
// end if this one is killed: QEMU 7.2 leaves the guest hanging if nobody does.
// The release ends it; the stream must not be closed before. Must be called before
// the stream is made non-blocking.
func guard(stream *os.File) (release func(), err error) {
	r, w, err := os.Pipe()
	if err != nil {
		return nil, err
	}
	defer r.Close()
	cmd := exec.Command("/proc/self/exe")
	cmd.Args = []string{guardName}
	cmd.ExtraFiles = []*os.File{stream, r}
	// What is sent to the whole group is not meant for it.
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	if err := cmd.Start(); err != nil {
		w.Close()
		return nil, err
	}
	return func() {
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
		w.Close()
	}, nil
}

// guardMain is the guard's main function.
func guardMain() {
	signal.Ignore(syscall.SIGINT, syscall.SIGTERM, syscall.SIGHUP)
	// Nothing is ever written to it: it ends with the process that it guards.
	_, _ = io.Copy(io.Discard, os.NewFile(4, "guarded"))
	// The guarded process may have made the stream non-blocking, for both.
	if unix.SetNonblock(3, false) == nil {
		_, _ = io.Copy(io.Discard, os.NewFile(3, "migration stream"))
	}
}
