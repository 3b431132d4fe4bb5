package main

import (
	"context"
	"os"
	"os/exec"
	"os/signal"
	"syscall"

	"github.com/flic-migrate/flic-migrate/qmp/session"
	"github.com/flic-migrate/flic-migrate/tier/rescue"
	"github.com/flic-migrate/flic-migrate/tier/store"
	"github.com/flic-migrate/flic-migrate/tier/vfs"
)

// armedName is what this program is called while it has a checkpoint ready.
const armedName = session.ArmedName

// startArmed returns what starts the armed process: of a session of its own, with
// nothing of this one's but the files, and with its messages in a log if there is one.
// vm is the VM's name for the metrics, which go to a file if one is named.
func startArmed(log, metrics, vm string) func(files []*os.File) (*os.Process, error) {
	return func(files []*os.File) (*os.Process, error) {
		cmd := exec.Command("/proc/self/exe")
		cmd.Args = []string{armedName}
		if metrics != "" {
			cmd.Args = append(cmd.Args, metrics, vm)
		}
		cmd.ExtraFiles = files
		cmd.Dir = "/"
		cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
		if log != "" {
			f, err := os.OpenFile(log, os.O_CREATE|os.O_WRONLY|os.O_APPEND, 0o600)
			if err != nil {
				return nil, err
			}
			defer f.Close()
			cmd.Stderr = f
		}
		if err := cmd.Start(); err != nil {
			return nil, err
		}
		go func() { _ = cmd.Wait() }() // or it would stay a zombie if it ends before us
		return cmd.Process, nil
	}
}

// armedMain is the armed process's main function.
func armedMain(fsys vfs.FS) int {
	signal.Ignore(syscall.SIGPIPE, syscall.SIGHUP)
	ctx, stop := withSignals(context.Background())
	defer stop()
	files := make([]*os.File, session.ArmedFiles)
	for i := range files {
		files[i] = os.NewFile(uintptr(3+i), "inherited")
		syscall.CloseOnExec(3 + i)
	}
	a := &app{fs: fsys, stderr: os.Stderr}
	p := session.ArmedProcess{FS: fsys, ExitCode: exitCode, Log: a.log(),
		Open: func(ctx context.Context, dir string) (*store.Store, error) {
			b := *a
			b.store = dir
			return b.openStore(ctx, false)
		},
	}
	measured := measureArmed(ctx, os.Args)
	err := rescue.Call(func() error { return p.Run(ctx, files) })
	measured(exitCode(err))
	if err != nil {
		p.Log.Error("the armed checkpoint has ended", "reason", oneLine(err))
	}
	return exitCode(err)
}
