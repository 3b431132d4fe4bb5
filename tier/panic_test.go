package tier_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"maps"
	"regexp"
	"slices"
	"strings"
	"sync"
	"testing"

	"github.com/flic-migrate/flic-migrate/stream/returnpath"
	"github.com/flic-migrate/flic-migrate/tier/checkpoint"
	"github.com/flic-migrate/flic-migrate/tier/dedup"
	"github.com/flic-migrate/flic-migrate/tier/nvram"
	"github.com/flic-migrate/flic-migrate/tier/progress"
	"github.com/flic-migrate/flic-migrate/tier/rescue"
	"github.com/flic-migrate/flic-migrate/tier/restore"
	"github.com/flic-migrate/flic-migrate/tier/save"
	"github.com/flic-migrate/flic-migrate/tier/store"
	"github.com/flic-migrate/flic-migrate/tier/tiertest"
	"github.com/flic-migrate/flic-migrate/tier/vfs"
	"github.com/flic-migrate/flic-migrate/tier/vfs/crashfs"
)

// These tests have everything panic that a save calls and that is not its own: its
// input, the file system, the return path, progress, the log. A save that panics
// has failed like any other: the source is told so, and nothing is left.

// bomb panics at its n-th call, from any goroutine; a negative n never does.
type bomb struct {
	mu    sync.Mutex
	n     int
	count int
	at    string // what panicked
}

func (b *bomb) call(what string) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.count++
	if b.count == b.n+1 {
		b.at = what
		panic("bomb in " + what)
	}
}

func (b *bomb) arm(n int) { b.n, b.count, b.at = n, 0, "" }

// bombFS has a bomb in each of its operations but those that only give back.
type bombFS struct {
	vfs.FS
	b *bomb
}

func (f bombFS) file(v vfs.File, err error) (vfs.File, error) {
	if err != nil {
		return nil, err
	}
	return bombFile{v, f.b}, nil
}

func (f bombFS) NoLinks(dir string) (vfs.FS, error) {
	fsys, err := f.FS.NoLinks(dir)
	return bombFS{fsys, f.b}, err
}

func (f bombFS) Create(name string) (vfs.File, error) {
	f.b.call("create " + name)
	return f.file(f.FS.Create(name))
}
func (f bombFS) Open(name string) (vfs.File, error) {
	f.b.call("open " + name)
	return f.file(f.FS.Open(name))
}
func (f bombFS) OpenRW(name string) (vfs.File, error) {
	f.b.call("open " + name)
	return f.file(f.FS.OpenRW(name))
}
func (f bombFS) MkdirAll(dir string) error {
	f.b.call("mkdir " + dir)
	return f.FS.MkdirAll(dir)
}
func (f bombFS) Rename(from, to string) error {
	f.b.call("rename to " + to)
	return f.FS.Rename(from, to)
}
func (f bombFS) Replace(from, to string) error {
	f.b.call("replace " + to)
	return f.FS.Replace(from, to)
}
func (f bombFS) SyncDir(dir string) error {
	f.b.call("syncdir " + dir)
	return f.FS.SyncDir(dir)
}
func (f bombFS) Lock(ctx context.Context, name string, m vfs.LockMode) (vfs.Locked, error) {
	f.b.call("lock " + name)
	return f.FS.Lock(ctx, name, m)
}
func (f bombFS) StatFS(name string) (vfs.FSInfo, error) {
	f.b.call("statfs " + name)
	return f.FS.StatFS(name)
}

type bombFile struct {
	vfs.File
	b *bomb
}

func (f bombFile) Write(p []byte) (int, error) {
	f.b.call("write " + f.Name())
	return f.File.Write(p)
}
func (f bombFile) WriteAt(p []byte, off int64) (int, error) {
	f.b.call("writeat " + f.Name())
	return f.File.WriteAt(p, off)
}
func (f bombFile) ReadAt(p []byte, off int64) (int, error) {
	f.b.call("readat " + f.Name())
	return f.File.ReadAt(p, off)
}
func (f bombFile) Sync() error {
	f.b.call("sync " + f.Name())
	return f.File.Sync()
}
func (f bombFile) TryLock(m vfs.LockMode) error {
	f.b.call("lock " + f.Name())
	return f.File.TryLock(m)
}
func (f bombFile) StartWriteback(off, n int64) {
	f.b.call("writeback " + f.Name())
	f.File.StartWriteback(off, n)
}

// bombReader panics in a Read, bombWriter in a Write.
type bombReader struct {
	io.Reader
	b *bomb
}

func (r bombReader) Read(p []byte) (int, error) {
	r.b.call("read of the stream")
	return r.Reader.Read(p[:min(len(p), 40<<10)])
}

type bombWriter struct {
	bytes.Buffer
	b *bomb
}

func (w *bombWriter) Write(p []byte) (int, error) {
	w.b.call("answer")
	return w.Buffer.Write(p)
}

// TestPanic has a save panic at each place in turn.
func TestPanic(t *testing.T) {
	s := tiertest.New(tiertest.Options{ReturnPath: true, Passes: 3, Resend: 0.3, XBZRLE: true, PartLen: 60,
		Blocks: []tiertest.Block{{Name: "pc.ram", Size: 768 << 10}, {Name: "rom", Size: 32 << 10}}})
	b := s.Bytes()
	was := tiertest.New(tiertest.Options{Passes: 2, Resend: 0.3,
		Blocks: []tiertest.Block{{Name: "pc.ram", Size: 768 << 10}, {Name: "rom", Size: 32 << 10}}})
	for name, scene := range map[string]struct {
		fs, in, answer, progress bool
		parent                   bool // there is a checkpoint before
	}{
		"file system":                {fs: true},
		"file system, with a parent": {fs: true, parent: true},
		"input":                      {in: true},
		"answers":                    {answer: true},
		"progress":                   {progress: true},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			seen := map[string]bool{}
			for n := 0; ; n++ {
				armed := &bomb{n: -1}
				var fsys vfs.FS = crashfs.New(0)
				if scene.fs {
					fsys = bombFS{fsys, armed}
				}
				l := newLab(t, fsys, "/")
				// A file that a panic has left half formatted is nobody's yet.
				if f, err := nvram.Open(context.Background(), l.fs, l.nvram, nvram.Options{Capacity: 40 << 18, Create: true}); err != nil || f.Close() != nil {
					t.Fatal(err)
				}
				if scene.parent {
					l.save(t, was, save.Options{NVRAM: l.nvram, WorkingSet: hotSet(t, was, every(3)), SegmentPages: 12})
				}
				var in io.Reader = bytes.NewReader(b)
				if scene.in {
					in = bombReader{in, armed}
				}
				answers := &bombWriter{b: &bomb{n: -1}}
				if scene.answer {
					answers.b = armed
				}
				var logged bytes.Buffer
				o := save.Options{VM: "vm", ReturnPath: answers, NVRAM: l.nvram, WorkingSet: hotSet(t, s, every(2)),
					NVRAMSize: 40 << 18, Energy: dedup.EnergyFull, SegmentPages: 12, Workers: 2,
					Log: slog.New(slog.NewTextHandler(&logged, nil))}
				if scene.progress {
					o.Progress = func(p progress.State) { armed.call("progress " + p.Phase) }
				}
				armed.arm(n)
				_, _, err := l.run(t.Context(), in, o)
				at := armed.at
				armed.arm(-1)
				if at == "" {
					if err != nil {
						t.Fatalf("save without a panic: %v", err)
					}
					break
				}
				seen[regexp.MustCompile(`[0-9a-f]{8}-[0-9a-f-]{27}`).ReplaceAllString(at, "UUID")] = true
				if (strings.HasPrefix(at, "answer") || !scene.parent && (strings.Contains(at, "/share/") || strings.Contains(at, "/summaries/"))) && err == nil {
					// The last word is said after the commit, which stands, and so does a save
					// that can't share.
					l.holdsOnly(t)
					continue
				}
				if scene.parent && err == nil {
					// A parent that can't be read does without.
					continue
				}
				var bug *rescue.Error
				if !errors.As(err, &bug) {
					t.Fatalf("%s panicked: %v", at, err)
				}
				if !strings.Contains(logged.String(), "bomb in") {
					t.Errorf("%s: no stack in the log:\n%s", at, logged.String())
				}
				if opened := answers.Len() > 0; opened && !bytes.HasSuffix(answers.Bytes(), returnpath.AppendShut(nil, 1)) {
					t.Errorf("%s: the source was not told that it failed", at)
				}
				if bytes.Contains(answers.Bytes(), returnpath.AppendShut(nil, 0)) {
					t.Errorf("%s: the source was told that all is well", at)
				}
				if strings.HasSuffix(at, l.nvram) || strings.HasPrefix(at, "rename") {
					// Extents of a table that is half written, and of an image
					// that may have its name, are gc's to free.
					if _, err := l.st.GC(context.Background()); err != nil {
						t.Error(err)
					}
				}
				if scene.parent {
					l.holdsOnly(t)
					l.remove(store.Ref{VM: "vm", N: 1})
				} else {
					nothingLeft(t, l)
				}
				if t.Failed() {
					t.Fatalf("panic %d, in %s: %v\n%s", n, at, err, bug.Stack)
				}
			}
			t.Logf("%d kinds of places: %v", len(seen), slices.Sorted(maps.Keys(seen)))
		})
	}
}

// TestPanicRestore has what an eager restore calls panic at each place in turn: its output,
// the file system, progress. The panic is the restore's error, and not the process's end.
func TestPanicRestore(t *testing.T) {
	s := tiertest.New(tiertest.Options{Passes: 2, Resend: 0.3, Blocks: []tiertest.Block{{Name: "pc.ram", Size: 12 << 20}}})
	armed := &bomb{n: -1}
	l := newLab(t, bombFS{crashfs.New(0), armed}, "/")
	ref, _ := l.save(t, s, save.Options{WorkingSet: hotSet(t, s, every(3)), NVRAMSize: 40 << 18, SegmentPages: 96})
	out := &bombWriter{b: armed}
	seen := map[string]bool{}
	for n := 0; ; n++ {
		armed.arm(n)
		var c *store.Checkpoint
		err := rescue.Call(func() (err error) {
			if c, err = l.st.OpenCheckpoint(t.Context(), ref, checkpoint.Options{}); err != nil {
				return err
			}
			_, err = restore.Run(t.Context(), c.Checkpoint, out, restore.Options{Workers: 2,
				Progress: func(progress.State) { armed.call("progress") }})
			return err
		})
		at := armed.at
		armed.arm(-1)
		if c != nil {
			if err := c.Close(); err != nil {
				t.Fatal(err)
			}
		}
		var bug *rescue.Error
		switch {
		case at == "" && err == nil:
			for _, what := range []string{"answer", "progress", "readat"} {
				if !seen[what] {
					t.Errorf("nothing panicked in %s", what)
				}
			}
			l.holds(t, ref, s)
			return
		case at == "" || !errors.As(err, &bug):
			t.Fatalf("panic %d, in %q: %v", n, at, err)
		}
		what, _, _ := strings.Cut(at, " ")
		seen[what] = true
	}
}

// holdsOnly fails unless there is one checkpoint, whole.
func (l *lab) holdsOnly(t *testing.T) {
	t.Helper()
	refs, err := l.st.List(context.Background(), "")
	if err != nil || len(refs) != 1 {
		t.Fatalf("checkpoints %v, %v", refs, err)
	}
	for _, err := range l.verify(refs[0]) {
		t.Error(err)
	}
}

// TestFailureBeforePages breaks a save off, with progress on, when its image has
// been begun but no page has come: OPEN_RETURN_PATH, a disk's data, and then
// something unknown, the end, or a cancellation. (A virtual machine with virtio-mem
// on QEMU 11 did that, and was told that all is well.)
func TestFailureBeforePages(t *testing.T) {
	whole := tiertest.New(tiertest.Options{ReturnPath: true, BlocksFirst: 2, BlockMigration: true})
	opaque := tiertest.New(tiertest.Options{ReturnPath: true, BlocksFirst: 2, Unknown: tiertest.Record, Mix: tiertest.Mix{tiertest.Absent: 1}})
	t.Run("unknown", func(t *testing.T) {
		l := newLab(t, crashfs.New(0), "/")
		var answers bytes.Buffer
		var phases []string
		ref, meta, err := l.run(t.Context(), bytes.NewReader(opaque.Bytes()), save.Options{VM: "vm", ReturnPath: &answers,
			Progress: func(p progress.State) { phases = append(phases, p.Phase) }})
		if err != nil || meta.OpaqueBytes == 0 {
			t.Fatalf("%+v, %v", meta, err)
		}
		if !bytes.Equal(l.restored(t, ref), opaque.Bytes()) {
			t.Error("restored stream differs")
		}
		if !bytes.HasSuffix(answers.Bytes(), returnpath.AppendShut(nil, 0)) {
			t.Error("no SHUT with value 0")
		}
	})
	b := whole.Bytes()
	for _, cut := range []int64{300 << 10, 600 << 10, 1<<20 + 700<<10} {
		for _, how := range []string{"ends", "is cancelled"} {
			t.Run(fmt.Sprintf("%s at %d", how, cut), func(t *testing.T) {
				l := newLab(t, crashfs.New(0), "/")
				ctx, cancel := context.WithCancelCause(t.Context())
				defer cancel(nil)
				why := errors.New("operator's wish")
				var in io.Reader = bytes.NewReader(b[:cut])
				if how == "is cancelled" {
					in = &atOffset{r: bytes.NewReader(b), left: cut, fn: func() { cancel(why) }}
				}
				var answers bytes.Buffer
				_, _, err := l.run(ctx, in, save.Options{VM: "vm", ReturnPath: &answers})
				if err == nil || how == "is cancelled" && !errors.Is(err, why) {
					t.Fatal(err)
				}
				if !bytes.HasSuffix(answers.Bytes(), returnpath.AppendShut(nil, 1)) {
					t.Error("no SHUT with value 1")
				}
				nothingLeft(t, l)
			})
		}
	}
}
