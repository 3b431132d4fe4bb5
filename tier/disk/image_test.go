package disk

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// qemu runs qemu-img or qemu-io.
func qemu(t testing.TB, args ...string) string {
	t.Helper()
	out, err := exec.Command(args[0], args[1:]...).CombinedOutput()
	if err != nil {
		t.Fatalf("%s: %v: %s", strings.Join(args, " "), err, out)
	}
	return string(out)
}

func write(t testing.TB, path string, b []byte) string {
	t.Helper()
	if err := os.WriteFile(path, b, 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

// content is a disk of n bytes: noise, zeros, and what compresses.
func content(n int, seed uint64) []byte {
	r := rand.New(rand.NewPCG(seed, 1))
	b := make([]byte, n)
	for at := 0; at < n; {
		run := min(n-at, (1+r.IntN(40))*BlockSize)
		switch r.IntN(4) {
		case 0:
		case 1:
			for i := range b[at : at+run] {
				b[at+i] = byte(i / 64)
			}
		default:
			for i := at; i+8 <= at+run; i += 8 {
				binary.LittleEndian.PutUint64(b[i:], r.Uint64())
			}
		}
		at += run
	}
	return b
}

// same compares an image with what it must hold, by reads of all kinds of ranges.
func same(t *testing.T, i *Image, want []byte) {
	t.Helper()
	if i.Size() != int64(len(want)) {
		t.Fatalf("%d bytes in place of %d", i.Size(), len(want))
	}
	got := make([]byte, len(want))
	if n, err := i.ReadAt(got, 0); n != len(got) || err != nil {
		t.Fatalf("%d bytes of %d, %v", n, len(got), err)
	}
	if !bytes.Equal(got, want) {
		t.Fatal("other bytes")
	}
	r := rand.New(rand.NewPCG(1, 2))
	for range 300 {
		off := r.IntN(len(want))
		p := make([]byte, 1+r.IntN(1<<(1+r.IntN(18))))
		n, err := i.ReadAt(p, int64(off))
		if w := min(len(p), len(want)-off); n != w || (err == io.EOF) != (w < len(p)) || err != nil && err != io.EOF {
			t.Fatalf("%d bytes at %d of %d: %d, %v", len(p), off, len(want), n, err)
		}
		if !bytes.Equal(p[:n], want[off:off+n]) {
			t.Fatalf("other bytes in %d at %d", len(p), off)
		}
	}
}

// stored checks that what a layer would read ahead is what it has: of one that is not
// compressed, the very bytes.
func stored(t *testing.T, i *Image, compressed bool) {
	t.Helper()
	file, err := os.ReadFile(i.Path())
	if err != nil {
		t.Fatal(err)
	}
	file = append(file, make([]byte, SectorSize)...) // QEMU fills the last sector up
	calls := 0
	for off := int64(0); ; {
		from, to, err := i.ownRun(t.Context(), off)
		if err == io.EOF {
			break
		}
		if err != nil {
			t.Fatal(err)
		}
		off = to
		want := make([]byte, to-from)
		if n, err := i.ReadAt(want, from); n < len(want) {
			t.Fatal(err)
		}
		var got []byte
		i.stored(from, to-from, func(at, n int64) {
			calls++
			switch {
			case at <= 0 && i.Format() != Raw || n <= 0 || at+n > int64(len(file)) && !compressed:
				t.Errorf("%d bytes at %d of a file of %d would be read ahead", n, at, len(file))
			case !compressed:
				got = append(got, file[at:at+n]...)
			}
		})
		if !compressed && !bytes.Equal(got, want) {
			t.Errorf("of %d bytes from %d on, %d others would be read ahead", len(want), from, len(got))
		}
	}
	if calls == 0 {
		t.Error("nothing would be read ahead")
	}
	i.stored(i.Size(), 1, func(at, n int64) { t.Errorf("%d bytes at %d, behind the disk", n, at) })
}

// TestImages reads what QEMU's own tools have written, alone and in chains.
func TestImages(t *testing.T) {
	for _, c := range []struct {
		name string
		base []string // qemu-img convert of the base; none: raw
		top  []string // qemu-img create of an overlay; none: no overlay
	}{
		{name: "raw"},
		{name: "qcow2", base: []string{"-O", "qcow2"}},
		{name: "version 2", base: []string{"-O", "qcow2", "-o", "compat=0.10"}, top: []string{"-o", "compat=0.10"}},
		{name: "small clusters", base: []string{"-O", "qcow2", "-o", "cluster_size=512"}, top: []string{"-o", "cluster_size=1024"}},
		{name: "large clusters", base: []string{"-O", "qcow2", "-o", "cluster_size=2M"}, top: []string{"-o", "cluster_size=2M"}},
		{name: "deflate", base: []string{"-c", "-O", "qcow2"}, top: []string{"-o", "cluster_size=4096"}},
		{name: "zstd", base: []string{"-c", "-O", "qcow2", "-o", "compression_type=zstd"}, top: []string{}},
		{name: "zstd, large clusters", base: []string{"-c", "-O", "qcow2", "-o", "compression_type=zstd,cluster_size=2M"}, top: []string{}},
		{name: "raw below", top: []string{}},
	} {
		t.Run(c.name, func(t *testing.T) {
			dir := t.TempDir()
			want := content(5<<20+3*BlockSize+512, 7)
			path, format := write(t, filepath.Join(dir, "raw"), want), Raw
			if c.base != nil {
				raw := path
				path, format = filepath.Join(dir, "base"), Qcow2
				qemu(t, append(append([]string{"qemu-img", "convert", "-f", "raw"}, c.base...), raw, path)...)
				if err := os.Remove(raw); err != nil {
					t.Fatal(err)
				}
			}
			stored(t, open(t, path, "", format, want), slices.Contains(c.base, "-c"))
			if c.top == nil {
				return
			}
			// The overlay is larger, and named by a path that counts from its own.
			over := filepath.Join(dir, "over")
			size := len(want) + 1<<20
			qemu(t, append(append([]string{"qemu-img", "create", "-q", "-f", "qcow2", "-b", filepath.Base(path), "-F", string(format)}, c.top...), over, fmt.Sprint(size))...)
			want = append(want, make([]byte, 1<<20)...)
			var io []string
			for i, w := range []struct {
				off, n int
				zero   bool
			}{{0, 4096, false}, {1 << 20, 300 << 10, false}, {1<<20 + 100<<10, 80 << 10, true}, {3 << 20, 1536, false}, {len(want) - 512, 512, false}, {len(want) - 1<<20 - 1024, 8192, false}} {
				fill := byte(0xa0 + i)
				cmd := fmt.Sprintf("write -P %d %d %d", fill, w.off, w.n)
				if w.zero {
					fill, cmd = 0, fmt.Sprintf("write -z %d %d", w.off, w.n)
				}
				io = append(io, "-c", cmd)
				copy(want[w.off:], bytes.Repeat([]byte{fill}, w.n))
			}
			qemu(t, append(append([]string{"qemu-io", "-f", "qcow2"}, io...), over)...)
			i := open(t, over, Qcow2, Qcow2, want)
			if i.Backing() == nil || i.Backing().Format() != format || i.Backing().Path() != path || i.Backing().Backing() != nil {
				t.Errorf("it stands on %+v", i.Backing())
			}
			// Alone it has what was written to it, and zeros.
			alone, err := OpenLayer(over, "")
			if err != nil {
				t.Fatal(err)
			}
			defer alone.Close()
			stored(t, alone, false)
			stored(t, i.Backing(), slices.Contains(c.base, "-c"))
			if alone.Identity() != i.Identity() || alone.Backing() != nil {
				t.Errorf("%+v, %+v", alone.Identity(), i.Identity())
			}
			own := make([]byte, len(want))
			for off := int64(0); ; {
				from, to, err := alone.ownRun(t.Context(), off)
				if err == ioEOF {
					break
				}
				if err != nil || from < off || to <= from || to > int64(len(want)) {
					t.Fatalf("run %d–%d from %d: %v", from, to, off, err)
				}
				copy(own[from:to], want[from:to])
				off = to
			}
			same(t, alone, own)
		})
	}
}

var ioEOF = io.EOF

// open opens an image that the test must be able to read, and compares it.
func open(t *testing.T, path string, ask, format Format, want []byte) *Image {
	t.Helper()
	i, err := Open(t.Context(), path, ask)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { i.Close() })
	if i.Format() != format || i.Path() != path {
		t.Fatalf("%s of format %s", i.Path(), i.Format())
	}
	same(t, i, want)
	return i
}

// TestChain looks at what a chain may be made of.
func TestChain(t *testing.T) {
	dir := t.TempDir()
	base := write(t, filepath.Join(dir, "base"), content(1<<20, 3))
	create := func(name, backing, format string) string {
		path := filepath.Join(dir, name)
		args := []string{"qemu-img", "create", "-q", "-u", "-f", "qcow2", "-b", backing, "-F", format, path, "1M"}
		qemu(t, args...)
		return path
	}
	refused := func(path, want string) {
		t.Helper()
		i, err := Open(t.Context(), path, Qcow2)
		if err == nil {
			i.Close()
			t.Errorf("%s is taken", path)
		} else if !strings.Contains(err.Error(), want) {
			t.Errorf("%v; want %q", err, want)
		}
	}
	refused(create("missing", "nothing", "raw"), "no such file")
	refused(create("nbd", "nbd://localhost/x", "raw"), "is no path")
	refused(create("json", `json:{"driver":"raw"}`, "raw"), "is no path")
	refused(create("dev", "/dev/null", "raw"), "not a regular file")
	refused(create("vmdk", base, "vmdk"), `format "vmdk"`)
	refused(base, "not a qcow2 image")
	if err := unix.Mkfifo(filepath.Join(dir, "fifo"), 0o600); err != nil {
		t.Fatal(err)
	}
	refused(create("waits", "fifo", "raw"), "not a regular file")
	create("ring1", "ring2", "qcow2")
	refused(create("ring2", "ring1", "qcow2"), "in a ring")

	// Links are followed; names count from the link, as in QEMU.
	sub := filepath.Join(dir, "sub")
	if err := os.Mkdir(sub, 0o700); err != nil {
		t.Fatal(err)
	}
	over := create("sub/over", "base", "raw")
	refused(over, "no such file")
	link := filepath.Join(dir, "link")
	if err := os.Symlink(over, link); err != nil {
		t.Fatal(err)
	}
	i, err := Open(t.Context(), link, "")
	if err != nil {
		t.Fatal(err)
	}
	defer i.Close()
	if i.Path() != over || i.Backing().Path() != base {
		t.Errorf("%s on %s", i.Path(), i.Backing().Path())
	}

	// A header that does not say the format.
	b, err := os.ReadFile(over)
	if err != nil {
		t.Fatal(err)
	}
	at := bytes.Index(b, []byte{0xe2, 0x79, 0x2a, 0xca})
	binary.BigEndian.PutUint32(b[at:], 0x6803f857)
	refused(write(t, filepath.Join(dir, "untold"), b), "does not say which format")

	for n := range maxDepth {
		on, f := fmt.Sprint("deep", n-1), "qcow2"
		if n == 0 {
			on, f = "base", "raw"
		}
		create(fmt.Sprint("deep", n), on, f)
	}
	refused(filepath.Join(dir, fmt.Sprint("deep", maxDepth-1)), "stands on more than")
	deep, err := Open(t.Context(), filepath.Join(dir, fmt.Sprint("deep", maxDepth-2)), Qcow2)
	if err != nil {
		t.Fatal(err)
	}
	deep.Close()
	ctx, cancel := context.WithCancelCause(t.Context())
	cause := errors.New("enough")
	cancel(cause)
	if _, err := Open(ctx, base, Raw); !errors.Is(err, cause) {
		t.Errorf("%v", err)
	}
	if _, err := ParseFormat("vdi"); err == nil {
		t.Error("vdi is known")
	}
	if f, err := ParseFormat("qcow2"); f != Qcow2 || err != nil {
		t.Error(f, err)
	}
}

// TestIdentity changes a file in all the ways that a user may.
func TestIdentity(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "disk")
	was := func() Identity {
		t.Helper()
		i, err := OpenLayer(path, Raw)
		if err != nil {
			t.Fatal(err)
		}
		defer i.Close()
		return i.Identity()
	}
	start := time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC)
	reset := func() {
		t.Helper()
		write(t, path, content(64<<10, 1))
		if err := os.Chtimes(path, start, start); err != nil {
			t.Fatal(err)
		}
	}
	reset()
	id := was()
	if err := id.Check(); err != nil || id.Differs(id) != "" || id.Touched(id) {
		t.Fatalf("%+v: %v", id, err)
	}
	for _, c := range []struct {
		what   string
		change func() error
		want   string
	}{
		{"written", func() error {
			f, err := os.OpenFile(path, os.O_WRONLY, 0)
			if err != nil {
				return err
			}
			defer f.Close()
			_, err = f.WriteAt([]byte{1}, 77)
			return err
		}, "was written to, last at 20"},
		{"truncated", func() error { return os.Truncate(path, 4096) }, "was made smaller: the disk has 4096 bytes now, and had 65536"},
		{"grown", func() error { return os.Truncate(path, 1<<20) }, "was made larger"},
		{"replaced", func() error {
			tmp := filepath.Join(dir, "new")
			b, err := os.ReadFile(path)
			if err == nil {
				err = os.WriteFile(tmp, b, 0o600)
			}
			if err == nil {
				err = os.Chtimes(tmp, start, start)
			}
			if err == nil {
				err = os.Rename(tmp, path)
			}
			return err
		}, "is another file now"},
		{"renamed and back", func() error {
			return errors.Join(os.Rename(path, path+"x"), os.Rename(path+"x", path))
		}, ""},
		{"mode", func() error { return os.Chmod(path, 0o400) }, ""},
	} {
		reset()
		id = was()
		if err := c.change(); err != nil {
			t.Fatalf("%s: %v", c.what, err)
		}
		now := was()
		if got := id.Differs(now); !strings.HasPrefix(got, c.want) || (got == "") != (c.want == "") {
			t.Errorf("%s: %q, want %q", c.what, got, c.want)
		}
		if c.what == "mode" && !id.Touched(now) {
			t.Error("a change of mode leaves no trace")
		}
		os.Chmod(path, 0o600)
	}
	q := id
	q.Format = Qcow2
	if got := id.Differs(q); got != "is qcow2 now, and was raw" {
		t.Errorf("%q", got)
	}
	q = id
	q.File.Size--
	if got := id.Differs(q); !strings.HasPrefix(got, "was cut") {
		t.Errorf("%q", got)
	}
	for _, bad := range []Identity{{}, {Path: "x", Format: Raw}, {Path: "/" + strings.Repeat("x", maxPath), Format: Raw}, {Path: "/x", Format: "vdi"},
		{Path: "/x", Format: Raw, Size: -1}, {Path: "/x", Format: Raw, Size: maxSize + 1}, {Path: "/x", Format: Raw, File: File{Size: -1}}} {
		if bad.Check() == nil {
			t.Errorf("%.100v is taken", bad)
		}
	}

	// What is open is asked, whatever has its name now.
	reset()
	i, err := OpenLayer(path, Raw)
	if err != nil {
		t.Fatal(err)
	}
	defer i.Close()
	if err := os.Truncate(path, 5000); err != nil {
		t.Fatal(err)
	}
	now, err := i.Now()
	if err != nil || now.Size != 5120 || !strings.Contains(i.Identity().Differs(now), "smaller") {
		t.Errorf("%+v, %v", now, err)
	}
}

// TestWriter asks of an image that qemu-io has open.
func TestWriter(t *testing.T) {
	path := filepath.Join(t.TempDir(), "disk")
	qemu(t, "qemu-img", "create", "-q", "-f", "qcow2", path, "1M")
	i, err := Open(t.Context(), path, Qcow2)
	if err != nil {
		t.Fatal(err)
	}
	defer i.Close()
	for _, c := range []struct {
		flag string
		want bool
	}{{"-r", false}, {"-n", true}} {
		if held(t, path, c.flag, i) != c.want {
			t.Errorf("qemu-io %s: a writer is seen: %v", c.flag, !c.want)
		}
	}
	if w, err := i.Writer(); w || err != nil {
		t.Errorf("%v, %v, with nobody there", w, err)
	}
}

// held asks Writer while qemu-io has the image open.
func held(t *testing.T, path, flag string, i *Image) bool {
	t.Helper()
	defer hold(t, path, flag)()
	w, err := i.Writer()
	if err != nil {
		t.Fatal(err)
	}
	return w
}

// hold makes qemu-io keep an image of 1 MiB open until stop is called.
func hold(t *testing.T, path, flag string) (stop func()) {
	t.Helper()
	cmd := exec.Command("qemu-io", flag, "-f", "qcow2", path)
	in, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	stop = sync.OnceFunc(func() {
		in.Close()
		cmd.Wait()
	})
	t.Cleanup(stop)
	// Its answer comes once the image is open.
	if _, err := io.WriteString(in, "length\n"); err != nil {
		t.Fatal(err)
	}
	for b, all := make([]byte, 256), ""; !strings.Contains(all, "1 MiB"); {
		n, err := out.Read(b)
		if err != nil {
			t.Fatalf("%v after %q", err, all)
		}
		all += string(b[:n])
	}
	return stop
}
