package main

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/flic-migrate/flic-migrate/tier/vfs"
)

// fault is one operation on files that goes wrong. It travels to the command
// flic-migrate-faulty, which is flic-migrate on such a file system, in the
// environment: QEMU stands between it and the test.
type fault struct {
	op    string        // write, sync (of an image), msync, rename, syncdir (of a VM's directory)
	n     int           // which one of them, from 1
	stall time.Duration // that it takes before it ends
	errno syscall.Errno // that it ends with; 0: then it is done as usual
	mark  string        // file that is made when it begins; MARK.end is made when it ends
}

const faultEnv = "FLIC_TEST_FAULT"

// uri is the exec: URI of a save, which meets with the fault.
func (f fault) uri(l *lab, flags ...string) string {
	return fmt.Sprintf("exec:%s='%s %d %d %d %s' flic-migrate-faulty%s", faultEnv,
		f.op, f.n, f.stall, f.errno, f.mark, strings.TrimPrefix(l.saveCommand(flags...), "flic-migrate"))
}

// faulty is the main function of flic-migrate-faulty.
func faulty() { os.Exit(run(newApp(faultyFS()), os.Args[1:])) }

// faultyFS is the file system that the environment asks for.
func faultyFS() *faultFS {
	fsys := &faultFS{FS: vfs.OS}
	f := &fsys.fault
	if _, err := fmt.Sscan(os.Getenv(faultEnv), &f.op, &f.n, &f.stall, &f.errno, &f.mark); err != nil {
		fmt.Fprintf(os.Stderr, "%s: %v\n", faultEnv, err)
		os.Exit(99)
	}
	return fsys
}

type faultFS struct {
	vfs.FS
	fault
	count atomic.Int64 // of the fault's kind of operation
}

func (f *faultFS) NoLinks(dir string) (_ vfs.FS, err error) {
	f.FS, err = f.FS.NoLinks(dir)
	return f, err
}

// strike is called before an operation.
func (f *faultFS) strike(op, name string) error {
	if op != f.op || f.count.Add(1) != int64(f.n) {
		return nil
	}
	mark(f.mark)
	time.Sleep(f.stall)
	mark(f.mark + ".end")
	if f.errno == 0 {
		return nil
	}
	return &os.PathError{Op: op, Path: name, Err: f.errno}
}

func mark(name string) {
	if err := os.WriteFile(name, nil, 0o600); err != nil {
		panic(err) // the test waits for it in vain, and shows this
	}
}

func (f *faultFS) Create(name string) (vfs.File, error) {
	file, err := f.FS.Create(name)
	return faultFile{file, f}, err
}

func (f *faultFS) OpenRW(name string) (vfs.File, error) {
	file, err := f.FS.OpenRW(name)
	return faultFile{file, f}, err
}

func (f *faultFS) Rename(oldname, newname string) error {
	if err := f.strike("rename", newname); err != nil {
		return err
	}
	return f.FS.Rename(oldname, newname)
}

func (f *faultFS) SyncDir(dir string) error {
	if filepath.Base(filepath.Dir(dir)) == "vms" {
		if err := f.strike("syncdir", dir); err != nil {
			return err
		}
	}
	return f.FS.SyncDir(dir)
}

type faultFile struct {
	vfs.File
	f *faultFS
}

// part tells whether this is an image, and not one of the store's small files.
func (f faultFile) part() bool { return strings.HasSuffix(f.Name(), ".part") }

func (f faultFile) Write(b []byte) (int, error) {
	if f.part() {
		if err := f.f.strike("write", f.Name()); err != nil {
			return 0, err
		}
	}
	return f.File.Write(b)
}

func (f faultFile) WriteAt(b []byte, off int64) (int, error) {
	if f.part() {
		if err := f.f.strike("write", f.Name()); err != nil {
			return 0, err
		}
	}
	return f.File.WriteAt(b, off)
}

func (f faultFile) Sync() error {
	if f.part() {
		if err := f.f.strike("sync", f.Name()); err != nil {
			return err
		}
	}
	return f.File.Sync()
}

func (f faultFile) Map(off, n int64, writable bool) (vfs.Mapping, error) {
	m, err := f.File.Map(off, n, writable)
	if err != nil {
		return nil, err
	}
	return faultMapping{m, f}, nil
}

type faultMapping struct {
	vfs.Mapping
	file faultFile
}

func (m faultMapping) Sync(off, n int64) error {
	if err := m.file.f.strike("msync", m.file.Name()); err != nil {
		return err
	}
	return m.Mapping.Sync(off, n)
}
