package crashfs

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"slices"
	"strings"
	"syscall"
	"testing"

	"github.com/flic-migrate/flic-migrate/tier/vfs"
)

func must[T any](v T, err error) T {
	if err != nil {
		panic(err)
	}
	return v
}

func check(err error) {
	if err != nil {
		panic(err)
	}
}

func content(f *FS, name string) []byte {
	h := must(f.Open(name))
	defer h.Close()
	return must(io.ReadAll(io.NewSectionReader(h, 0, maxFile)))
}

// tree lists every name with its content, so that two disks can be compared.
func tree(f *FS, dir string) string {
	var b strings.Builder
	for _, e := range must(f.ReadDir(dir)) {
		p := dir + "/" + e.Name()
		if e.IsDir() {
			fmt.Fprintf(&b, "%s/\n%s", p, tree(f, p))
		} else {
			fmt.Fprintf(&b, "%s %q\n", p, content(f, p))
		}
	}
	return b.String()
}

// durableFile makes a file whose name and content survive everything.
func durableFile(f *FS, name string, b []byte) vfs.File {
	h := must(f.Create(name))
	must(h.WriteAt(b, 0))
	check(h.Sync())
	check(f.SyncDir("/"))
	return h
}

const seeds = 300

// TestUnsyncedData overwrites a synced file without a sync. A crash must show
// the old content, the new, and mixtures in sectors; never anything else.
func TestUnsyncedData(t *testing.T) {
	for _, mapped := range []bool{false, true} {
		f := New(0)
		h := durableFile(f, "f", bytes.Repeat([]byte("a"), 4*blockSize))
		if mapped {
			m := must(h.Map(0, 4*blockSize, true))
			copy(m.Bytes(), bytes.Repeat([]byte("b"), 4*blockSize))
		} else {
			must(h.WriteAt(bytes.Repeat([]byte("b"), 4*blockSize), 0))
		}
		seen := map[string]int{}
		for seed := range uint64(seeds) {
			got := content(f.CrashClone(seed), "f")
			if len(got) != 4*blockSize {
				t.Fatalf("seed %d: %d bytes", seed, len(got))
			}
			var sectors strings.Builder
			for off := 0; off < len(got); off += sectorSize {
				s := got[off : off+sectorSize]
				if !bytes.Equal(s, bytes.Repeat(s[:1], sectorSize)) {
					t.Fatalf("seed %d: sector at %d is torn", seed, off)
				}
				sectors.WriteByte(s[0])
			}
			switch s := sectors.String(); strings.Trim(s, "a") {
			case "":
				seen["old"]++
			default:
				if strings.Trim(s, "b") == "" {
					seen["new"]++
					break
				}
				seen["mixed"]++
				for b := 0; b < len(s); b += 8 {
					if strings.Trim(s[b:b+8], "a") != "" && strings.Trim(s[b:b+8], "b") != "" {
						seen["torn page"]++
						break
					}
				}
			}
		}
		if len(seen) != 4 {
			t.Errorf("mapped %v: outcomes %v, want old, new, mixed and torn page", mapped, seen)
		}

		check(h.Sync())
		for seed := range uint64(seeds) {
			if got := content(f.CrashClone(seed), "f"); strings.Trim(string(got), "b") != "" {
				t.Fatalf("mapped %v, seed %d: synced data lost", mapped, seed)
			}
		}
	}
}

// TestMiddleVersions: what was overwritten before any sync can still be what
// the disk has.
func TestMiddleVersions(t *testing.T) {
	f := New(0)
	h := durableFile(f, "f", bytes.Repeat([]byte("a"), blockSize))
	for range 50 {
		for _, c := range "bc" {
			must(h.WriteAt(bytes.Repeat([]byte(string(c)), blockSize), 0))
		}
	}
	seen := map[byte]bool{}
	for seed := range uint64(seeds) {
		for _, c := range content(f.CrashClone(seed), "f") {
			seen[c] = true
		}
	}
	if !seen['b'] || !seen['c'] {
		t.Errorf("versions seen: %v", seen)
	}
}

// TestSize grows and shrinks a file without a sync.
func TestSize(t *testing.T) {
	f := New(0)
	h := durableFile(f, "f", bytes.Repeat([]byte("a"), 1000))
	must(h.WriteAt(bytes.Repeat([]byte("b"), 9000), 1000))
	sizes := map[int]bool{}
	for seed := range uint64(seeds) {
		got := content(f.CrashClone(seed), "f")
		sizes[len(got)] = true
		if len(got) < 1000 || len(got) > 10000 || strings.Trim(string(got[:1000]), "a") != "" ||
			strings.Trim(string(got[1000:]), "b\x00") != "" {
			t.Fatalf("seed %d: %d bytes", seed, len(got))
		}
	}
	if !sizes[10000] || len(sizes) < 3 { // the kernel may have written some of it back
		t.Errorf("sizes %v", sizes)
	}

	check(h.Sync())
	check(h.Truncate(500))
	sizes = map[int]bool{}
	for seed := range uint64(seeds) {
		sizes[len(content(f.CrashClone(seed), "f"))] = true
	}
	if !sizes[500] || !sizes[10000] {
		t.Errorf("sizes after Truncate %v", sizes)
	}
	check(h.Sync())
	check(h.Truncate(2000))
	for seed := range uint64(seeds) {
		got := content(f.CrashClone(seed), "f")
		if len(got) < 500 || strings.Trim(string(got[500:]), "\x00") != "" {
			t.Fatalf("seed %d: bytes that were cut off came back", seed)
		}
	}
}

func TestMapSyncIsARange(t *testing.T) {
	f := New(0)
	h := durableFile(f, "f", make([]byte, 4*blockSize))
	m := must(h.Map(blockSize, 2*blockSize, true))
	copy(m.Bytes(), bytes.Repeat([]byte("x"), 2*blockSize))
	check(m.Sync(0, blockSize))
	lost := false
	for seed := range uint64(seeds) {
		got := content(f.CrashClone(seed), "f")[blockSize:]
		if strings.Trim(string(got[:blockSize]), "x") != "" {
			t.Fatalf("seed %d: synced range lost", seed)
		}
		lost = lost || bytes.IndexByte(got[blockSize:2*blockSize], 0) >= 0
	}
	if !lost {
		t.Error("what was outside the synced range is never lost")
	}
}

// TestNamesSurviveInOrder creates files in two directories without syncing.
func TestNamesSurviveInOrder(t *testing.T) {
	f := New(0)
	check(f.MkdirAll("a"))
	check(f.MkdirAll("b"))
	for i := range 4 {
		check(must(f.Create(fmt.Sprintf("a/%d", i))).Close())
		check(must(f.Create(fmt.Sprintf("b/%d", i))).Close())
	}
	names := func(f *FS, dir string) string {
		s := ""
		for _, e := range must(f.ReadDir(dir)) {
			s += e.Name()
		}
		return s
	}
	seen := map[string]bool{}
	for seed := range uint64(2 * seeds) {
		c := f.CrashClone(seed)
		a, b := names(c, "a"), names(c, "b")
		if !strings.HasPrefix("0123", a) || !strings.HasPrefix("0123", b) {
			t.Fatalf("seed %d: %q, %q", seed, a, b)
		}
		seen[a+"|"+b] = true
	}
	for _, want := range []string{"|", "0123|0123", "|0123", "0123|"} {
		if !seen[want] {
			t.Errorf("%q never happens", want)
		}
	}
	check(f.SyncDir("a"))
	lost := false
	for seed := range uint64(seeds) {
		c := f.CrashClone(seed)
		if got := names(c, "a"); got != "0123" {
			t.Fatalf("seed %d: synced directory has %q", seed, got)
		}
		lost = lost || names(c, "b") == ""
	}
	if !lost {
		t.Error("the sync of one directory synced the other")
	}
}

// TestRenameAcrossDirectories: in one of the two or the other, never in both or
// in none, and there for good when the target is synced.
func TestRenameAcrossDirectories(t *testing.T) {
	f := New(0)
	check(f.MkdirAll("a"))
	check(f.MkdirAll("b"))
	check(must(f.Create("a/x")).Close())
	check(f.SyncDir("a"))
	check(must(f.Create("a/y")).Close())
	check(f.Rename("a/x", "b/x"))
	exists := func(f *FS, name string) bool {
		_, err := f.Stat(name)
		return err == nil
	}
	seen := map[bool]bool{}
	for seed := range uint64(seeds) {
		c := f.CrashClone(seed)
		if exists(c, "a/x") == exists(c, "b/x") {
			t.Fatalf("seed %d: in a %v, in b %v", seed, exists(c, "a/x"), exists(c, "b/x"))
		}
		seen[exists(c, "b/x")] = true
	}
	if len(seen) != 2 {
		t.Error("the rename is never lost, or always")
	}
	check(f.SyncDir("b"))
	for seed := range uint64(seeds) {
		// a/y was made before in the directory that the rename left.
		if c := f.CrashClone(seed); !exists(c, "b/x") || exists(c, "a/x") || !exists(c, "a/y") {
			t.Fatalf("seed %d: synced rename lost", seed)
		}
	}
}

func TestReplaceIsAtomic(t *testing.T) {
	f := New(0)
	durableFile(f, "cur", []byte("old"))
	durableFile(f, "tmp", []byte("new"))
	check(f.Replace("tmp", "cur"))
	seen := map[string]bool{}
	for seed := range uint64(seeds) {
		seen[tree(f.CrashClone(seed), "")] = true
	}
	want := map[string]bool{"/cur \"new\"\n": true, "/cur \"old\"\n/tmp \"new\"\n": true}
	if fmt.Sprint(seen) != fmt.Sprint(want) {
		t.Errorf("%v", seen)
	}
}

func TestRemovalCanBeUndone(t *testing.T) {
	f := New(0)
	durableFile(f, "f", []byte("data")).Close()
	check(f.Remove("f"))
	seen := map[string]bool{}
	for seed := range uint64(seeds) {
		seen[tree(f.CrashClone(seed), "")] = true
	}
	if len(seen) != 2 || !seen[""] || !seen["/f \"data\"\n"] {
		t.Errorf("%v", seen)
	}
}

// TestFailedSync: a second sync reports success but has not written what the
// first one lost.
func TestFailedSync(t *testing.T) {
	for _, mapped := range []bool{false, true} {
		f := New(0)
		h := durableFile(f, "f", bytes.Repeat([]byte("a"), 2*blockSize))
		sync := h.Sync
		if mapped {
			m := must(h.Map(0, 2*blockSize, true))
			sync = func() error { return m.Sync(0, 2*blockSize) }
		}
		must(h.WriteAt(bytes.Repeat([]byte("b"), 2*blockSize), 0))
		f.FailAt(0, syscall.EIO)
		if err := sync(); !errors.Is(err, syscall.EIO) {
			t.Fatal(err)
		}
		must(h.WriteAt([]byte("c"), 0)) // makes its page dirty again, and no other
		check(sync())
		if got := content(f, "f"); got[2*blockSize-1] != 'b' {
			t.Error("the page cache must still show what was written")
		}
		lost := false
		for seed := range uint64(seeds) {
			got := string(content(f.CrashClone(seed), "f"))
			if got[0] != 'c' || strings.Trim(got[1:blockSize], "b") != "" {
				t.Fatalf("seed %d: what was written after the failed sync is lost", seed)
			}
			lost = lost || strings.Contains(got[blockSize:], "a")
		}
		if !lost {
			t.Errorf("mapped %v: a failed sync has no consequence", mapped)
		}
	}
}

func TestKill(t *testing.T) {
	f := New(0)
	h := durableFile(f, "f", make([]byte, blockSize))
	check(h.TryLock(vfs.Exclusive))
	l := must(f.TryLock("lock", vfs.Exclusive))
	m := must(h.Map(0, blockSize, true))
	copy(m.Bytes(), "before")
	f.KillAt(1)
	must(h.WriteAt([]byte("written"), 100))
	if f.Killed() {
		t.Error("dead too early")
	}
	n, err := h.WriteAt(bytes.Repeat([]byte("z"), 20000), 200)
	if !errors.Is(err, ErrKilled) || !f.Killed() {
		t.Fatalf("%v", err)
	}
	copy(m.Bytes(), "after!")

	next := f.Fork()
	b := content(next, "f")
	if string(b[:6]) != "before" || string(b[100:107]) != "written" {
		t.Errorf("unsynced writes of a killed process are lost: %q", b[:110])
	}
	if got := bytes.Count(b, []byte("z")); got != n || n > 20000 || n > 0 && (n+200)%blockSize != 0 {
		t.Errorf("%d bytes of the killed write, said %d", got, n)
	}
	must(next.TryLock("lock", vfs.Exclusive)).Close()
	check(must(next.OpenRW("f")).TryLock(vfs.Exclusive))

	_, errCreate := f.Create("g")
	_, errOpen := f.Open("f")
	_, errStat := f.Stat("f")
	_, errRead := h.ReadAt(b, 0)
	_, errSize := h.Size()
	_, errMap := h.Map(0, 1, false)
	_, errLock := f.TryLock("x", vfs.Shared)
	_, errDir := f.ReadDir("/")
	_, errFS := f.StatFS("/")
	for i, err := range []error{errCreate, errOpen, errStat, errRead, errSize, errMap, errLock, errDir, errFS,
		h.Sync(), h.Truncate(0), h.Allocate(0, 1), h.Unlock(), h.TryLock(vfs.Shared), h.Close(), l.Close(), m.Sync(0, 1),
		f.MkdirAll("d"), f.Rename("f", "g"), f.Replace("f", "g"), f.Remove("f"), f.SyncDir("/")} {
		if !errors.Is(err, ErrKilled) {
			t.Errorf("operation %d of a dead process: %v", i, err)
		}
	}
	if err := m.Close(); err != nil {
		t.Error(err)
	}
	f.Kill() // no harm
	if got := content(next, "f"); !bytes.Equal(got, b) {
		t.Error("a dead process has changed the file")
	}
}

func TestFaults(t *testing.T) {
	f := New(0)
	h := must(f.Create("f"))
	f.FailAt(1, syscall.EIO)
	must(h.Write([]byte("0")))
	if _, err := h.Write([]byte("1")); !errors.Is(err, syscall.EIO) {
		t.Error(err)
	}
	must(h.Write([]byte("2")))
	f.ShortWriteAt(0)
	if n, err := h.Write([]byte("abcdef")); n != 3 || !errors.Is(err, syscall.ENOSPC) {
		t.Errorf("%d, %v", n, err)
	}
	f.ShortWriteAt(0)
	if err := f.Rename("f", "g"); !errors.Is(err, syscall.ENOSPC) {
		t.Error(err)
	}
	if got := content(f, "f"); string(got) != "02abc" {
		t.Errorf("%q", got)
	}

	f.FailFrom(1, syscall.ENOSPC)
	must(h.Write([]byte("d")))
	for range 2 {
		if _, err := h.Write([]byte("e")); !errors.Is(err, syscall.ENOSPC) {
			t.Error(err)
		}
		check(f.SyncDir("/"))
		check(must(f.TryLock("f", vfs.Shared)).Close())
	}
	if _, err := f.Create("g"); !errors.Is(err, syscall.ENOSPC) {
		t.Error(err)
	}
	f.Heal()
	must(h.Write([]byte("e")))

	f.FailReadAt(1, syscall.EIO)
	must(h.Write([]byte("f"))) // no read
	must(h.Size())
	if _, err := f.Open("f"); !errors.Is(err, syscall.EIO) {
		t.Error(err)
	}
	check(f.Remove("f"))

	var got []string
	for _, op := range f.Ops() {
		got = append(got, op.String())
	}
	want := []string{"create of f", "write of f", "write of f", "write of f", "write of f", "rename of g", "write of f",
		"write of f", "fsync of directory of /", "lock of f", "write of f", "fsync of directory of /", "lock of f",
		"create of g", "write of f", "write of f", "remove of f"}
	if !slices.Equal(got, want) {
		t.Errorf("log %q", got)
	}
	if len(f.Fork().Ops()) != 0 {
		t.Error("another process has the log")
	}
}

// TestSameSeedSameDisk: a failure found by seed must be found again.
func TestSameSeedSameDisk(t *testing.T) {
	build := func() *FS {
		f := New(0)
		check(f.MkdirAll("d/e"))
		for i := range 20 {
			h := must(f.Create(fmt.Sprintf("d/%d", i)))
			for j := range 5 {
				must(h.Write(bytes.Repeat([]byte{byte(i), byte(j)}, 700)))
			}
		}
		return f
	}
	a, b := build(), build()
	differ := map[string]bool{}
	for seed := range uint64(20) {
		ta := tree(a.CrashClone(seed), "")
		if tb := tree(b.CrashClone(seed), ""); ta != tb {
			t.Fatalf("seed %d gives two disks", seed)
		}
		differ[ta] = true
	}
	if len(differ) < 10 {
		t.Errorf("20 seeds give %d disks", len(differ))
	}
}

func TestCloneIsIndependent(t *testing.T) {
	f := New(8 * blockSize)
	f.SetVolatile(true)
	h := durableFile(f, "f", bytes.Repeat([]byte("a"), 3*blockSize))
	c := f.CrashClone(1)
	info := must(c.StatFS("/"))
	if info.Free != 5*blockSize || !info.Volatile {
		t.Errorf("clone: %+v", info)
	}
	must(h.WriteAt([]byte("b"), 0))
	must(must(c.OpenRW("f")).WriteAt([]byte("c"), 1))
	if got := content(f, "f"); string(got[:2]) != "ba" {
		t.Errorf("%q", got[:2])
	}
	if got := content(c, "f"); string(got[:2]) != "ac" {
		t.Errorf("%q", got[:2])
	}
}

// TestMappedHole: code that maps without allocating would die on a full disk,
// so it must not pass here.
func TestMappedHole(t *testing.T) {
	f := New(0)
	h := must(f.Create("f"))
	check(h.Truncate(2 * blockSize))
	check(h.Allocate(0, blockSize))
	m := must(h.Map(0, 2*blockSize, true))
	m.Bytes()[0] = 1
	check(m.Sync(0, 2*blockSize))
	m.Bytes()[blockSize] = 1
	defer func() {
		if recover() == nil {
			t.Error("a store into a hole went unnoticed")
		}
	}()
	m.Sync(0, blockSize)
}

// TestPunchIsNotDurable: before a sync a punched hole may be one after a power
// cut or not, in a part of its blocks; after it, it is one. The disk's account is
// right either way.
func TestPunchIsNotDurable(t *testing.T) {
	const blocks = 8
	old := bytes.Repeat([]byte("x"), blocks*blockSize)
	f := New(1 << 20)
	h := durableFile(f, "f", old)
	check(h.Punch(0, blocks*blockSize))
	if info := must(f.StatFS("/")); info.Free != 1<<20 {
		t.Errorf("%d bytes free after Punch", info.Free)
	}
	seen := map[string]int{}
	for seed := range uint64(200) {
		c := f.CrashClone(seed)
		b := content(c, "f")
		kept := 0
		for off := 0; off < len(b); off += sectorSize {
			switch s := b[off : off+sectorSize]; {
			case bytes.Equal(s, old[:sectorSize]):
				kept++
			case !isZero(s):
				t.Fatalf("seed %d: sector at %d is neither old nor zero", seed, off)
			}
		}
		switch kept {
		case 0:
			seen["punched"]++
		case len(old) / sectorSize:
			seen["lost"]++
		default:
			seen["in part"]++
		}
		backed := 0
		for off := 0; off < len(b); off += blockSize {
			if !isZero(b[off : off+blockSize]) {
				backed += blockSize
			}
		}
		if info := must(c.StatFS("/")); info.Free != 1<<20-int64(backed) {
			t.Fatalf("seed %d: %d bytes free, %d are not zero", seed, info.Free, backed)
		}
		h := must(c.OpenRW("f"))
		m := must(h.Map(0, blocks*blockSize, true))
		check(m.Close()) // which looks for content without a block
	}
	if len(seen) != 3 {
		t.Errorf("after a power cut: %v", seen)
	}
	check(h.Sync())
	for seed := range uint64(50) {
		if b := content(f.CrashClone(seed), "f"); !bytes.Equal(b, make([]byte, len(old))) {
			t.Fatalf("seed %d: content after Punch and Sync", seed)
		}
	}
}

// commit replaces the file cur by the protocol that stores use. With a step left
// out it is wrong, and the model must be able to show it.
func commit(f *FS, b []byte, without string) error {
	h, err := f.Create("tmp")
	if errors.Is(err, fs.ErrExist) {
		if err = f.Remove("tmp"); err == nil {
			h, err = f.Create("tmp")
		}
	}
	if err != nil {
		return err
	}
	defer h.Close()
	if _, err := h.Write(b); err != nil {
		return err
	}
	if without != "sync" {
		if err := h.Sync(); err != nil {
			return err
		}
	}
	if err := f.Replace("tmp", "cur"); err != nil {
		return err
	}
	if without != "syncdir" {
		return f.SyncDir("/")
	}
	return nil
}

func TestCommitProtocol(t *testing.T) {
	for without, wantBroken := range map[string]bool{"": false, "sync": true, "syncdir": true} {
		old, fresh := bytes.Repeat([]byte("a"), 5000), bytes.Repeat([]byte("b"), 6000)
		broken := ""
		for kill := range 8 {
			f := New(0)
			check(commit(f, old, ""))
			f.KillAt(kill)
			err := commit(f, fresh, without)
			for seed := range uint64(50) {
				got := content(f.CrashClone(seed), "cur")
				if !bytes.Equal(got, fresh) && (err == nil || !bytes.Equal(got, old)) {
					broken = fmt.Sprintf("killed at %d (%v), seed %d: %d bytes", kill, err, seed, len(got))
				}
			}
			if got := content(f.Fork(), "cur"); !bytes.Equal(got, fresh) && !bytes.Equal(got, old) {
				broken = fmt.Sprintf("killed at %d, no power cut", kill)
			}
		}
		if (broken != "") != wantBroken {
			t.Errorf("without %q: broken %q, want %v", without, broken, wantBroken)
		}
	}
}
