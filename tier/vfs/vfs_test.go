package vfs_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/flic-migrate/flic-migrate/tier/tiertest"
	"github.com/flic-migrate/flic-migrate/tier/vfs"
	"github.com/flic-migrate/flic-migrate/tier/vfs/crashfs"
)

// forEach runs a test on the real file system and on the simulated one: what
// tests prove on the second is worth something only if the two agree.
func forEach(t *testing.T, test func(t *testing.T, fsys vfs.FS, dir string)) {
	t.Run("os", func(t *testing.T) { test(t, vfs.OS, t.TempDir()) })
	t.Run("crashfs", func(t *testing.T) {
		fsys := crashfs.New(0)
		if err := fsys.MkdirAll("/tmp/test"); err != nil {
			t.Fatal(err)
		}
		test(t, fsys, "/tmp/test")
	})
}

func write(t *testing.T, fsys vfs.FS, name, content string) {
	t.Helper()
	f, err := fsys.Create(name)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := f.Write([]byte(content)); err != nil {
		t.Fatal(err)
	}
	if err := f.Close(); err != nil {
		t.Fatal(err)
	}
}

func read(t *testing.T, fsys vfs.FS, name string) string {
	t.Helper()
	f, err := fsys.Open(name)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	b, err := io.ReadAll(io.NewSectionReader(f, 0, 1<<30))
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}

func wantErr(t *testing.T, what string, err, want error) {
	t.Helper()
	if !errors.Is(err, want) {
		t.Errorf("%s: %v, want %v", what, err, want)
	}
}

func TestFile(t *testing.T) {
	forEach(t, func(t *testing.T, fsys vfs.FS, dir string) {
		name := filepath.Join(dir, "f")
		f, err := fsys.Create(name)
		if err != nil {
			t.Fatal(err)
		}
		_, err = fsys.Create(name)
		wantErr(t, "create twice", err, fs.ErrExist)

		for _, s := range []string{"hello ", "world"} {
			if n, err := f.Write([]byte(s)); n != len(s) || err != nil {
				t.Fatalf("Write: %d, %v", n, err)
			}
		}
		if _, err := f.WriteAt([]byte("J"), 0); err != nil {
			t.Fatal(err)
		}
		if _, err := f.Write([]byte("!")); err != nil { // WriteAt has not moved the offset
			t.Fatal(err)
		}
		if _, err := f.WriteAt([]byte("end"), 5000); err != nil {
			t.Fatal(err)
		}
		want := "Jello world!" + string(make([]byte, 5000-12)) + "end"
		if got := read(t, fsys, name); got != want {
			t.Errorf("content %q", got)
		}
		if n, err := f.Size(); n != 5003 || err != nil {
			t.Errorf("Size: %d, %v", n, err)
		}

		b := make([]byte, 10)
		if n, err := f.ReadAt(b, 4999); n != 4 || err != io.EOF {
			t.Errorf("ReadAt across the end: %d, %v", n, err)
		}
		if n, err := f.ReadAt(b, 6000); n != 0 || err != io.EOF {
			t.Errorf("ReadAt beyond the end: %d, %v", n, err)
		}

		// Bytes cut off must not come back when the file grows again.
		if err := f.Truncate(3); err != nil {
			t.Fatal(err)
		}
		if err := f.Truncate(6); err != nil {
			t.Fatal(err)
		}
		if got := read(t, fsys, name); got != "Jel\x00\x00\x00" {
			t.Errorf("after Truncate %q", got)
		}
		if err := f.Allocate(4, 10); err != nil {
			t.Fatal(err)
		}
		if got := read(t, fsys, name); got != "Jel"+string(make([]byte, 11)) {
			t.Errorf("after Allocate %q", got)
		}
		f.StartWriteback(0, 14)
		if err := f.Sync(); err != nil {
			t.Error(err)
		}
		f.DropCache()
		if got := read(t, fsys, name); got != "Jel"+string(make([]byte, 11)) {
			t.Errorf("after DropCache %q", got)
		}
		if f.Name() != name {
			t.Errorf("Name %q", f.Name())
		}
		if err := f.Close(); err != nil {
			t.Error(err)
		}
		if _, err := f.WriteAt([]byte("x"), 0); err == nil {
			t.Error("write to a closed file")
		}

		ro, err := fsys.Open(name)
		if err != nil {
			t.Fatal(err)
		}
		defer ro.Close()
		if _, err := ro.WriteAt([]byte("x"), 0); err == nil {
			t.Error("write to a file opened for reading")
		}
		rw, err := fsys.OpenRW(name)
		if err != nil {
			t.Fatal(err)
		}
		defer rw.Close()
		if _, err := rw.Write([]byte("M")); err != nil {
			t.Fatal(err)
		}
		if got := read(t, fsys, name); got[:3] != "Mel" {
			t.Errorf("OpenRW and Write: %q", got)
		}
		_, err = fsys.Open(name + "x")
		wantErr(t, "open", err, fs.ErrNotExist)
		_, err = fsys.OpenRW(name + "x")
		wantErr(t, "open", err, fs.ErrNotExist)

		fi, err := fsys.Stat(name)
		if err != nil || fi.Size() != 14 || fi.Mode() != 0o600 || fi.IsDir() {
			t.Errorf("Stat: %v, %v", fi, err)
		}
	})
}

func TestNames(t *testing.T) {
	forEach(t, func(t *testing.T, fsys vfs.FS, dir string) {
		p := func(s string) string { return filepath.Join(dir, s) }
		deep := p("a/b/c")
		for range 2 {
			if err := fsys.MkdirAll(deep); err != nil {
				t.Fatal(err)
			}
		}
		if fi, err := fsys.Stat(p("a/b")); err != nil || fi.Mode() != fs.ModeDir|0o700 {
			t.Errorf("mode of a directory: %v, %v", fi, err)
		}
		write(t, fsys, p("a/old"), "old")
		write(t, fsys, p("a/other"), "other")

		err := fsys.Rename(p("a/old"), p("a/other"))
		wantErr(t, "rename over a file", err, fs.ErrExist)
		if got := read(t, fsys, p("a/other")); got != "other" {
			t.Errorf("a refused rename replaced the file: %q", got)
		}
		if err := fsys.Rename(p("a/old"), p("a/b/new")); err != nil {
			t.Fatal(err)
		}
		if got := read(t, fsys, p("a/b/new")); got != "old" {
			t.Errorf("renamed: %q", got)
		}
		_, err = fsys.Stat(p("a/old"))
		wantErr(t, "stat of the old name", err, fs.ErrNotExist)
		if err := fsys.Link(p("a/b/new"), p("a/other")); !errors.Is(err, fs.ErrExist) {
			t.Errorf("link to a name that is taken: %v", err)
		}
		if err := fsys.Link(p("a/b/none"), p("a/link")); !errors.Is(err, fs.ErrNotExist) {
			t.Errorf("link to nothing: %v", err)
		}
		if err := fsys.Link(p("a/b/new"), p("a/link")); err != nil {
			t.Error(err)
		}
		if f, err := fsys.Open(p("a/link")); err != nil {
			t.Error(err)
		} else {
			if n, err := f.Links(); n != 2 || err != nil {
				t.Errorf("%d names, %v", n, err)
			}
			inode, err := f.Inode()
			if err != nil {
				t.Error(err)
			}
			for dir, same := range map[string]bool{"a": true, "a/b": true, "": false} {
				list, err := fsys.ReadStamps(p(dir), nil)
				if err != nil || slices.ContainsFunc(list, func(s vfs.Stamped) bool { return s.Inode == inode }) != same {
					t.Errorf("inode %d in %q: %+v, %v", inode, dir, list, err)
				}
			}
			f.Close()
		}
		if err := fsys.Remove(p("a/link")); err != nil {
			t.Error(err)
		}
		if err := fsys.Replace(p("a/b/new"), p("a/other")); err != nil {
			t.Fatal(err)
		}
		if got := read(t, fsys, p("a/other")); got != "old" {
			t.Errorf("replaced: %q", got)
		}
		err = fsys.Rename(p("a/none"), p("a/x"))
		wantErr(t, "rename of nothing", err, fs.ErrNotExist)

		write(t, fsys, p("a/0"), "")
		list, err := fsys.ReadDir(p("a"))
		if err != nil {
			t.Fatal(err)
		}
		var got []string
		for _, e := range list {
			got = append(got, fmt.Sprint(e.Name(), e.IsDir()))
		}
		if fmt.Sprint(got) != "[0false btrue otherfalse]" {
			t.Errorf("ReadDir: %v", got)
		}

		wantErr(t, "remove of a full directory", fsys.Remove(p("a")), syscall.ENOTEMPTY)
		wantErr(t, "mkdir through a file", fsys.MkdirAll(p("a/0/x")), syscall.ENOTDIR)
		wantErr(t, "remove of nothing", fsys.Remove(p("a/none")), fs.ErrNotExist)
		for _, n := range []string{"a/0", "a/other", "a/b/c", "a/b", "a"} {
			if err := fsys.Remove(p(n)); err != nil {
				t.Error(err)
			}
		}
		if err := fsys.SyncDir(dir); err != nil {
			t.Error(err)
		}
		wantErr(t, "sync of nothing", fsys.SyncDir(p("a")), fs.ErrNotExist)
		if info, err := fsys.StatFS(dir); err != nil || info.Type == "" || info.Free <= 0 || info.Total < info.Free || info.Volatile {
			t.Errorf("StatFS: %+v, %v", info, err)
		}
		_, err = fsys.StatFS(p("a"))
		wantErr(t, "StatFS of nothing", err, fs.ErrNotExist)
	})
}

func TestRemovedFileStaysOpen(t *testing.T) {
	forEach(t, func(t *testing.T, fsys vfs.FS, dir string) {
		name := filepath.Join(dir, "f")
		write(t, fsys, name, "data")
		f, err := fsys.Open(name)
		if err != nil {
			t.Fatal(err)
		}
		defer f.Close()
		if err := fsys.Remove(name); err != nil {
			t.Fatal(err)
		}
		b := make([]byte, 4)
		if _, err := f.ReadAt(b, 0); err != nil || string(b) != "data" {
			t.Errorf("%q, %v", b, err)
		}
	})
}

func TestMap(t *testing.T) {
	forEach(t, func(t *testing.T, fsys vfs.FS, dir string) {
		const page = 4096
		f, err := fsys.Create(filepath.Join(dir, "f"))
		if err != nil {
			t.Fatal(err)
		}
		defer f.Close()
		if err := f.Allocate(0, 4*page); err != nil {
			t.Fatal(err)
		}
		m, err := f.Map(page, 2*page, true)
		if err != nil {
			t.Fatal(err)
		}
		other, err := f.Map(0, 3*page, false)
		if err != nil {
			t.Fatal(err)
		}
		defer other.Close()
		if len(m.Bytes()) != 2*page {
			t.Fatalf("%d bytes mapped", len(m.Bytes()))
		}
		copy(m.Bytes()[10:], "mapped")
		b := make([]byte, 6)
		if _, err := f.ReadAt(b, page+10); err != nil || string(b) != "mapped" {
			t.Errorf("ReadAt sees %q, %v", b, err)
		}
		if _, err := f.WriteAt([]byte("written"), 2*page); err != nil {
			t.Fatal(err)
		}
		if got := other.Bytes()[page+10:][:6]; string(got) != "mapped" {
			t.Errorf("another mapping sees %q", got)
		}
		if got := m.Bytes()[page:][:7]; string(got) != "written" {
			t.Errorf("the mapping sees %q", got)
		}
		if err := m.Sync(1, page); err != nil {
			t.Error(err)
		}
		wantErr(t, "sync beyond the mapping", m.Sync(page, 2*page), syscall.EINVAL)
		m.WillNeed(0, 2*page)
		m.DontNeed(0, 2*page)
		if got := m.Bytes()[10:16]; string(got) != "mapped" {
			t.Errorf("after DontNeed %q", got)
		}
		// A mapping lives on when the file has grown or is closed.
		if err := f.Truncate(100 * page); err != nil {
			t.Fatal(err)
		}
		copy(m.Bytes(), "still")
		if _, err := f.ReadAt(b[:5], page); err != nil || string(b[:5]) != "still" {
			t.Errorf("ReadAt sees %q, %v", b[:5], err)
		}
		for range 2 {
			if err := m.Close(); err != nil {
				t.Error(err)
			}
		}
		for _, r := range [][2]int64{{0, 101 * page}, {100 * page, 1}, {-page, page}, {1, page}, {0, 0}, {page, 1<<63 - 1}} {
			_, err := f.Map(r[0], r[1], false)
			wantErr(t, fmt.Sprintf("map %d+%d", r[0], r[1]), err, syscall.EINVAL)
		}
		ro, err := fsys.Open(f.Name())
		if err != nil {
			t.Fatal(err)
		}
		defer ro.Close()
		_, err = ro.Map(0, page, true)
		wantErr(t, "writable mapping of a file opened for reading", err, fs.ErrPermission)
	})
}

func TestLock(t *testing.T) {
	forEach(t, func(t *testing.T, fsys vfs.FS, dir string) {
		name := filepath.Join(dir, "lock")
		ctx := t.Context()
		a, err := fsys.Lock(ctx, name, vfs.Shared)
		if err != nil {
			t.Fatal(err)
		}
		b, err := fsys.TryLock(name, vfs.Shared)
		if err != nil {
			t.Fatal(err)
		}
		_, err = fsys.TryLock(name, vfs.Exclusive)
		wantErr(t, "exclusive beside shared", err, vfs.ErrLocked)
		if err := a.Close(); err != nil {
			t.Error(err)
		}
		short, cancel := context.WithTimeout(ctx, 30*time.Millisecond)
		defer cancel()
		_, err = fsys.Lock(short, name, vfs.Exclusive)
		wantErr(t, "wait", err, context.DeadlineExceeded)
		go func() {
			time.Sleep(20 * time.Millisecond)
			b.Close()
		}()
		c, err := fsys.Lock(ctx, name, vfs.Exclusive)
		if err != nil {
			t.Fatal(err)
		}
		_, err = fsys.TryLock(name, vfs.Shared)
		wantErr(t, "shared beside exclusive", err, vfs.ErrLocked)

		// The lock of an open file is the same kind of lock.
		f, err := fsys.OpenRW(name)
		if err != nil {
			t.Fatal(err)
		}
		defer f.Close()
		wantErr(t, "file lock beside a held one", f.TryLock(vfs.Exclusive), vfs.ErrLocked)
		c.Close()
		if err := f.Lock(ctx, vfs.Exclusive); err != nil {
			t.Fatal(err)
		}
		_, err = fsys.TryLock(name, vfs.Shared)
		wantErr(t, "beside a file lock", err, vfs.ErrLocked)
		if err := f.Unlock(); err != nil {
			t.Error(err)
		}
		d, err := fsys.TryLock(name, vfs.Exclusive)
		if err != nil {
			t.Fatal(err)
		}
		d.Close()
	})
}

// TestLockExcludes has many goroutines add to a counter that only the lock
// protects; one of them removes the lock file now and then, as its last act
// under the lock.
func TestLockExcludes(t *testing.T) {
	forEach(t, func(t *testing.T, fsys vfs.FS, dir string) {
		name := filepath.Join(dir, "lock")
		var wg sync.WaitGroup
		var inside atomic.Int32
		total := 0 // a data race if the lock does not exclude
		for g := range 8 {
			wg.Go(func() {
				for i := range 20 {
					l, err := fsys.Lock(context.Background(), name, vfs.Exclusive)
					if err != nil {
						t.Error(err)
						return
					}
					if inside.Add(1) != 1 {
						t.Error("two holders of an exclusive lock")
					}
					total++
					inside.Add(-1)
					if g == 0 && i%5 == 0 {
						if err := fsys.Remove(name); err != nil {
							t.Error(err)
						}
					}
					l.Close()
				}
			})
		}
		wg.Wait()
		if total != 160 {
			t.Errorf("%d of 160", total)
		}
	})
}

// TestLockEndsWithProcess: a killed save must not lock the store for ever.
func TestLockEndsWithProcess(t *testing.T) {
	name := filepath.Join(t.TempDir(), "lock")
	cmd := exec.Command(os.Args[0], "-test.run=^TestHelperHoldLock$")
	cmd.Env = append(os.Environ(), "VFS_TEST_LOCK="+name)
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	if _, err := out.Read(make([]byte, 1)); err != nil {
		t.Fatal(err)
	}
	_, err = vfs.OS.TryLock(name, vfs.Shared)
	wantErr(t, "lock held by another process", err, vfs.ErrLocked)
	cmd.Process.Kill()
	cmd.Wait()
	l, err := vfs.OS.Lock(t.Context(), name, vfs.Exclusive)
	if err != nil {
		t.Fatal(err)
	}
	l.Close()
}

// TestHelperHoldLock is the other process of TestLockEndsWithProcess.
func TestHelperHoldLock(t *testing.T) {
	name := os.Getenv("VFS_TEST_LOCK")
	if name == "" {
		return
	}
	if _, err := vfs.OS.TryLock(name, vfs.Exclusive); err != nil {
		t.Fatal(err)
	}
	fmt.Print("held\n")
	time.Sleep(time.Minute)
}

func TestVolatile(t *testing.T) {
	for dir, want := range map[string]bool{"/dev/shm": true, t.TempDir(): false} {
		info, err := vfs.OS.StatFS(dir)
		if err != nil {
			t.Fatal(err)
		}
		// The temporary directory of this machine may itself be a tmpfs.
		var st syscall.Statfs_t
		if err := syscall.Statfs(dir, &st); err != nil {
			t.Fatal(err)
		}
		const tmpfs = 0x01021994
		if want = st.Type == tmpfs; info.Volatile != want {
			t.Errorf("%s: %+v, want volatile %v", dir, info, want)
		}
	}
}

func TestCatchFault(t *testing.T) {
	f, err := vfs.OS.Create(filepath.Join(t.TempDir(), "f"))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if err := f.Allocate(0, 8192); err != nil {
		t.Fatal(err)
	}
	m, err := f.Map(0, 8192, false)
	if err != nil {
		t.Fatal(err)
	}
	defer m.Close()
	if err := f.Truncate(100); err != nil {
		t.Fatal(err)
	}
	var sum byte
	err = vfs.CatchFault(func() error {
		sum += m.Bytes()[4096+5]
		return nil
	})
	var fault *vfs.FaultError
	if !errors.As(err, &fault) {
		t.Fatalf("%v (%d), want a FaultError", err, sum)
	}
	if i, ok := fault.Within(m.Bytes()); !ok || i != 4096+5 {
		t.Errorf("fault at %d, %v", i, ok)
	}
	if _, ok := fault.Within(make([]byte, 10)); ok {
		t.Error("fault within other memory")
	}
	if _, ok := fault.Within(nil); ok {
		t.Error("fault within no memory")
	}

	want := errors.New("from fn")
	wantErr(t, "CatchFault", vfs.CatchFault(func() error { return want }), want)
	for name, bug := range map[string]func(){
		"index": func() { _ = make([]byte, 1)[len(fault.Error())] },
		"panic": func() { panic("x") },
		"nil":   func() { var m vfs.Mapping; m.Bytes() },
	} {
		func() {
			defer func() {
				if recover() == nil {
					t.Errorf("%s: a bug was taken for a fault", name)
				}
			}()
			vfs.CatchFault(func() error { bug(); return nil })
		}()
	}
}

// TestFullDisk is for the simulated disk only: every test of a full disk rests
// on it.
func TestFullDisk(t *testing.T) {
	fsys := crashfs.New(10 * 4096)
	f, err := fsys.Create("f")
	if err != nil {
		t.Fatal(err)
	}
	if err := f.Truncate(1 << 20); err != nil { // a hole needs no space
		t.Fatal(err)
	}
	if err := f.Allocate(0, 8*4096); err != nil {
		t.Fatal(err)
	}
	if _, err := f.WriteAt(bytes.Repeat([]byte("x"), 8*4096), 0); err != nil {
		t.Fatal(err)
	}
	n, err := f.WriteAt(make([]byte, 3*4096), 8*4096)
	if n != 2*4096 {
		t.Errorf("%d bytes written of 2 blocks left", n)
	}
	wantErr(t, "write", err, syscall.ENOSPC)
	wantErr(t, "allocate", f.Allocate(20*4096, 1), syscall.ENOSPC)
	if info, err := fsys.StatFS("/"); err != nil || info.Free != 0 {
		t.Errorf("%+v, %v", info, err)
	}
	if err := fsys.Remove("f"); err != nil {
		t.Fatal(err)
	}
	if info, _ := fsys.StatFS("/"); info.Free != 0 {
		t.Error("an open file's blocks were given back")
	}
	f.Close()
	if info, _ := fsys.StatFS("/"); info.Free != 10*4096 {
		t.Errorf("%d bytes free of a disk emptied", info.Free)
	}
}

// TestPunch: blocks are given back, and nothing is left to read there.
func TestPunch(t *testing.T) {
	forEach(t, func(t *testing.T, fsys vfs.FS, dir string) {
		const block = 64 << 10
		f, err := fsys.Create(filepath.Join(dir, "f"))
		must(t, err)
		defer f.Close()
		_, err = f.WriteAt(bytes.Repeat([]byte("x"), 4*block), 0)
		must(t, err)
		m, err := f.Map(0, 4*block, false)
		must(t, err)
		defer m.Close()
		if at, err := f.Data(block); at != block || err != nil {
			t.Errorf("Data: %d, %v", at, err)
		}
		must(t, f.Punch(block, 2*block))
		must(t, f.Punch(0, 1)) // not a whole block: zero, and still there
		want := make([]byte, 4*block)
		for i := range want {
			if i > 0 && i < block || i >= 3*block {
				want[i] = 'x'
			}
		}
		if got := read(t, fsys, f.Name()); got != string(want) {
			t.Error("content after Punch")
		}
		if !bytes.Equal(m.Bytes(), want) {
			t.Error("content of the mapping after Punch")
		}
		for off, data := range map[int64]int64{0: 0, 1: 1, block: 3 * block, 2*block + 7: 3 * block, 4*block - 1: 4*block - 1} {
			if at, err := f.Data(off); at != data || err != nil {
				t.Errorf("Data from %d: %d, %v, want %d", off, at, err, data)
			}
		}
		_, err = f.Data(4 * block)
		wantErr(t, "Data at the end", err, io.EOF)
		must(t, f.Punch(3*block, 9*block)) // beyond the end
		if n, err := f.Size(); n != 4*block || err != nil {
			t.Errorf("Size: %d, %v", n, err)
		}
		_, err = f.Data(block)
		wantErr(t, "Data before a hole", err, io.EOF)
		must(t, f.Allocate(block, block))
		if got := read(t, fsys, f.Name()); got[block:] != string(make([]byte, 3*block)) {
			t.Error("content after Allocate")
		}
		wantErr(t, "nothing to punch", f.Punch(0, 0), syscall.EINVAL)
		ro, err := fsys.Open(f.Name())
		must(t, err)
		defer ro.Close()
		wantErr(t, "punch of a file opened for reading", ro.Punch(0, block), syscall.EBADF)
	})
}

// TestClone: a clone has the content, shares its blocks where it can be seen, and neither
// file changes with the other. Where that can't be it says so, and the file is as it was.
func TestClone(t *testing.T) {
	test := func(t *testing.T, fsys vfs.FS, dir string, can bool) {
		src, dst := filepath.Join(dir, "src"), filepath.Join(dir, "dst")
		content := bytes.Repeat([]byte("0123456789abcdef"), 300<<10/16)
		write(t, fsys, src, string(content))
		f, err := fsys.Create(dst)
		if err != nil {
			t.Fatal(err)
		}
		defer f.Close()
		err = f.Clone(src)
		if !can {
			wantErr(t, "clone", err, errors.ErrUnsupported)
			if size, err := f.Size(); size != 0 || err != nil {
				t.Errorf("%d bytes, %v", size, err)
			}
		} else if err != nil {
			t.Fatal(err)
		} else if err := f.Sync(); err != nil || read(t, fsys, dst) != string(content) {
			t.Errorf("another content; %v", err)
		}
		at := time.Unix(1234567890, 987654321)
		if err := f.SetModified(at); err != nil {
			t.Error(err)
		}
		if fi, err := fsys.Stat(dst); err != nil || !fi.ModTime().Equal(at) {
			t.Errorf("changed at %v, %v", fi.ModTime(), err)
		}
		if can {
			w, err := fsys.OpenRW(src)
			if err == nil {
				_, err = w.WriteAt([]byte("XX"), 100)
				w.Close()
			}
			if err != nil || read(t, fsys, dst) != string(content) {
				t.Errorf("the clone changes with the file; %v", err)
			}
		}
		wantErr(t, "clone of nothing", f.Clone(filepath.Join(dir, "none")), fs.ErrNotExist)
	}
	for _, can := range []bool{true, false} {
		t.Run(fmt.Sprint("crashfs ", can), func(t *testing.T) {
			fsys := crashfs.New(0)
			fsys.SetNoClones(!can)
			test(t, fsys, "/", can)
		})
	}
	t.Run("tmpfs", func(t *testing.T) {
		dir, err := os.MkdirTemp("/dev/shm", "flic-test")
		if err != nil {
			t.Fatal(err)
		}
		defer os.RemoveAll(dir)
		test(t, vfs.OS, dir, false)
	})
	t.Run("reflink", func(t *testing.T) {
		if dir := tiertest.ReflinkDir(t); dir != "" {
			test(t, vfs.OS, dir, true)
		}
	})
}
