package vfs

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// LockLimit bounds every wait for a lock. Those that are waited for are held for
// one change of names or of a table, and its sync: whoever holds one for longer
// hangs, and a save that waits for it for ever freezes its guest.
const LockLimit = 30 * time.Second

// LockPause is the longest pause between two looks at a lock that somebody else
// has. Locks here are held for milliseconds, which are not worth more wake-ups.
// Whoever takes one again and again leaves it free for longer than that at times.
const LockPause = 20 * time.Millisecond

func (o osFS) Lock(ctx context.Context, name string, mode LockMode) (Locked, error) {
	l, err := WaitLock(ctx, name, func() (Locked, error) { return o.TryLock(name, mode) })
	if err != nil {
		if fi, serr := o.Lstat(name); serr == nil {
			err = heldBy(err, fi)
		}
	}
	return l, err
}

// heldBy adds to the error of a wait which processes it was that were waited for, as
// far as /proc/locks tells.
func heldBy(err error, fi fs.FileInfo) error {
	var pe *fs.PathError
	if who := Holders(fi); errors.As(err, &pe) && len(who) > 0 {
		pe.Err = fmt.Errorf("%s has it: %w", strings.Join(who, ", "), pe.Err)
	}
	return err
}

// Holders names the processes that have a lock on a file, as far as /proc/locks tells.
func Holders(fi fs.FileInfo) (who []string) {
	st, ok := fi.Sys().(*syscall.Stat_t)
	if !ok {
		return nil
	}
	list, err := os.ReadFile("/proc/locks")
	if err != nil {
		return nil
	}
	// 1: FLOCK  ADVISORY  WRITE 4711 fe:00:262158 0 EOF
	id := fmt.Sprintf("%02x:%02x:%d", unix.Major(st.Dev), unix.Minor(st.Dev), st.Ino)
	for line := range strings.Lines(string(list)) {
		f := strings.Fields(line)
		if len(f) < 6 || f[1] != "FLOCK" || f[5] != id || f[4] == "0" || f[4] == "-1" {
			continue
		}
		// What it calls itself: those that began as /proc/self/exe are "exe" to the kernel.
		if line, err := os.ReadFile("/proc/" + f[4] + "/cmdline"); err == nil {
			name, _, _ := strings.Cut(string(line), "\x00")
			who = append(who, fmt.Sprintf("process %s (%s)", f[4], strings.Trim(fmt.Sprintf("%.64q", path.Base(name)), `"`)))
		}
	}
	return who
}

func (o osFS) TryLock(name string, mode LockMode) (Locked, error) {
	for {
		// A lock file is ours: a link or FIFO in its place is somebody else's.
		f, err := o.openFile(name, os.O_RDWR|os.O_CREATE|unix.O_NOFOLLOW)
		if errors.Is(err, syscall.EROFS) || errors.Is(err, fs.ErrPermission) {
			// flock needs no write permission, so a store can be read by
			// those who may only read it.
			f, err = o.openFile(name, os.O_RDONLY|unix.O_NOFOLLOW)
		}
		if err != nil {
			return nil, err
		}
		if err := flock(f, mode); err != nil {
			f.Close()
			return nil, err
		}
		// Between open and flock the holder before us may have removed the
		// file: then this lock is on a file that nobody else will open.
		have, err := f.Stat()
		if err != nil {
			f.Close()
			return nil, err
		}
		if now, err := o.Lstat(name); err == nil && os.SameFile(have, now) {
			return f, nil
		}
		f.Close()
	}
}

func (f *osFile) Lock(ctx context.Context, mode LockMode) error {
	_, err := WaitLock(ctx, f.Name(), func() (struct{}, error) {
		return struct{}{}, f.TryLock(mode)
	})
	if err != nil {
		if fi, serr := f.Stat(); serr == nil {
			err = heldBy(err, fi)
		}
	}
	return err
}

func (f *osFile) TryLock(mode LockMode) error { return flock(f.File, mode) }

func (f *osFile) Unlock() error {
	return f.pathError("unlock", f.control(func(fd int) error { return unix.Flock(fd, unix.LOCK_UN) }))
}

func flock(f *os.File, mode LockMode) error {
	how := unix.LOCK_SH
	if mode == Exclusive {
		how = unix.LOCK_EX
	}
	of := &osFile{File: f}
	err := of.control(func(fd int) error { return unix.Flock(fd, how|unix.LOCK_NB) })
	if err == unix.EWOULDBLOCK {
		err = ErrLocked
	}
	return of.pathError("lock", err)
}

// WaitLock repeats try until it says something else than ErrLocked, until ctx is
// done, or for LockLimit, and says how long it waited for what. After LockLimit
// the error is ErrLocked, else ctx's cause. It is for implementations of FS and
// File. A blocking flock would be fairer, but can be neither cancelled nor timed
// out. The pauses grow to LockPause.
func WaitLock[T any](ctx context.Context, name string, try func() (T, error)) (T, error) {
	began := time.Now()
	pause := 500 * time.Microsecond
	for {
		l, err := try()
		if !errors.Is(err, ErrLocked) {
			return l, err
		}
		waited := time.Since(began)
		why := ErrLocked
		if waited < LockLimit {
			select {
			case <-time.After(pause):
				pause = min(2*pause, LockPause)
				continue
			case <-ctx.Done():
				waited = time.Since(began)
				why = context.Cause(ctx)
			}
		}
		return l, &fs.PathError{Op: "lock", Path: name,
			Err: fmt.Errorf("waited %v for another process to give it up: %w", waited.Round(time.Millisecond), why)}
	}
}
