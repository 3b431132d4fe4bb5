package vfs

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"syscall"
)

// ReplaceFile gives a file of somebody else's, as a daemon's settings, new content: in one
// step, and durably when it has returned. It keeps mode and owner, and what a link leads to
// is replaced, and the link stays. If there is none it is made, with this mode whatever the
// umask is, and so is its directory. What is ours is written with WriteFile.
func ReplaceFile(path string, b []byte, mode fs.FileMode) (err error) {
	if real, err := filepath.EvalSymlinks(path); err == nil {
		path = real
	}
	dir := filepath.Dir(path)
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return err
	}
	tmp, err := os.CreateTemp(dir, ".flic-migrate-*")
	if err != nil {
		return err
	}
	defer os.Remove(tmp.Name()) // nothing once it has its name
	fi, err := os.Stat(path)
	if err == nil {
		mode = fi.Mode().Perm()
		st := fi.Sys().(*syscall.Stat_t)
		err = tmp.Chown(int(st.Uid), int(st.Gid))
	} else if errors.Is(err, fs.ErrNotExist) {
		err = nil
	}
	if err == nil {
		err = tmp.Chmod(mode)
	}
	if err == nil {
		_, err = tmp.Write(b)
	}
	if err == nil {
		err = tmp.Sync()
	}
	if cerr := tmp.Close(); err == nil {
		err = cerr
	}
	if err == nil {
		err = os.Rename(tmp.Name(), path)
	}
	if err == nil {
		err = OS.SyncDir(dir)
	}
	return err
}
