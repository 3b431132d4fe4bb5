package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"sync"
	"time"

	"github.com/flic-migrate/flic-migrate/stream/pipe"
	"github.com/flic-migrate/flic-migrate/tier/checkpoint"
	"github.com/flic-migrate/flic-migrate/tier/image"
	"github.com/flic-migrate/flic-migrate/tier/lazy"
	"github.com/flic-migrate/flic-migrate/tier/restore"
	"github.com/flic-migrate/flic-migrate/tier/save"
	"github.com/flic-migrate/flic-migrate/tier/store"
	"github.com/flic-migrate/flic-migrate/tier/vfs"
	"github.com/flic-migrate/flic-migrate/tier/workingset"
)

// childEnv names the file that says what a child of QEMU's is to do: the
// program is its own exec: child, because the command has no slow flash.
const childEnv = "FLIC_BENCH_CHILD"

type child struct {
	Op     string // save, lazy, eager
	Store  string
	Rate   int64         // of the flash tier in bytes a second; 0: as it is
	Pipe   int           // capacity of the pipe to QEMU; 0: as the server likes
	Hold   time.Duration // lazy.Options
	Learn  bool          // keep and use what was learned
	Report string
}

// uri is the exec: URI of a child.
func (c child) uri() (string, error) {
	b, err := json.Marshal(c)
	if err != nil {
		return "", err
	}
	f, err := os.CreateTemp(filepath.Dir(c.Store), "child")
	if err != nil {
		return "", err
	}
	defer f.Close()
	if _, err := f.Write(b); err != nil {
		return "", err
	}
	exe, err := os.Executable()
	return fmt.Sprintf("exec:%s=%s exec %s", childEnv, f.Name(), exe), err
}

func runChild(ctx context.Context, spec string) error {
	b, err := os.ReadFile(spec)
	if err != nil {
		return err
	}
	var c child
	if err := json.Unmarshal(b, &c); err != nil {
		return err
	}
	fsys := slowFS(c.Rate)
	st, err := store.Open(context.Background(), fsys, c.Store, true)
	if err != nil {
		return err
	}
	in, err := pipe.New(ctx, 0)
	if err != nil {
		return err
	}
	if c.Op == "save" {
		_, _, err := save.Run(ctx, fsys, st, in, save.Options{VM: "vm", Codec: image.MinLZ, ReturnPath: os.Stdout})
		return err
	}
	ck, err := st.OpenCheckpoint(context.Background(), store.Ref{VM: "vm"}, checkpoint.Options{})
	if err != nil {
		return err
	}
	if c.Op == "eager" {
		_, err := restore.Run(ctx, ck.Checkpoint, os.Stdout, restore.Options{})
		return err
	}
	lazy.TuneProcess(ck.Checkpoint)
	resize := func(n int) int { return pipe.SetCapacity(int(os.Stdout.Fd()), n) }
	o := lazy.Options{HoldBackground: c.Hold, MaxHold: 10 * c.Hold, Resize: resize}
	if c.Pipe > 0 {
		resize(c.Pipe)
		o.Resize = nil
	}
	if c.Learn {
		o.First = func() []workingset.PageRun {
			t, err := st.Touched(context.Background(), ck.Ref)
			if err != nil {
				fmt.Fprintln(os.Stderr, "child:", err)
				return nil
			}
			return t.Bind(ck.Meta.PageSize, workingSetBlocks(ck.Meta))
		}
	}
	out, err := pipe.NewWriter(os.Stdout)
	if err != nil {
		return err
	}
	rep, err := lazy.Serve(ctx, ck.Checkpoint, in, out, o)
	if err != nil {
		return err
	}
	if c.Learn {
		var names []string
		for _, b := range ck.Meta.Blocks {
			names = append(names, b.Name)
		}
		err = st.AddTouched(context.Background(), ck.Ref, ck.Meta.PageSize, names, rep.Touched)
	}
	err = errors.Join(err, rep.Wait(ctx))
	b, jerr := json.Marshal(rep)
	return errors.Join(err, jerr, os.WriteFile(c.Report+".new", b, 0o600), os.Rename(c.Report+".new", c.Report))
}

func workingSetBlocks(m *checkpoint.Meta) []workingset.Block {
	var list []workingset.Block
	for i, n := range m.BlockPages() {
		list = append(list, workingset.Block{Name: m.Blocks[i].Name, Pages: int64(n)})
	}
	return list
}

// slowFS is the file system with reads of at most rate bytes a second in all,
// one after the other, as from a flash device.
func slowFS(rate int64) vfs.FS {
	if rate == 0 {
		return vfs.OS
	}
	return &limitedFS{FS: vfs.OS, rate: rate}
}

type limitedFS struct {
	vfs.FS
	rate int64
	mu   sync.Mutex
	free time.Time // when the device has done what it was asked for
}

func (l *limitedFS) NoLinks(dir string) (_ vfs.FS, err error) {
	l.FS, err = l.FS.NoLinks(dir)
	return l, err
}

func (l *limitedFS) Open(name string) (vfs.File, error) {
	f, err := l.FS.Open(name)
	return &limitedFile{f, l}, err
}

type limitedFile struct {
	vfs.File
	fs *limitedFS
}

func (f *limitedFile) ReadAt(b []byte, off int64) (int, error) {
	l := f.fs
	l.mu.Lock()
	if now := time.Now(); l.free.Before(now) {
		l.free = now
	}
	l.free = l.free.Add(time.Duration(len(b)) * time.Second / time.Duration(l.rate))
	done := l.free
	l.mu.Unlock()
	n, err := f.File.ReadAt(b, off)
	time.Sleep(time.Until(done))
	return n, err
}
