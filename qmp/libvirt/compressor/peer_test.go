package compressor

import (
	"bytes"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
)

// neighbour runs this binary under a name, with files at descriptors 0, 1 and
// from 3 on, until the test ends.
func neighbour(t *testing.T, name string, args []string, stdin, stdout *os.File, more ...*os.File) {
	t.Helper()
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(filepath.Join(link(t, name), name), args...)
	cmd.Stdin, cmd.Stdout = stdin, stdout
	cmd.ExtraFiles = make([]*os.File, 7) // descriptors 3 to 9
	copy(cmd.ExtraFiles, more)
	cmd.ExtraFiles[6] = r
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	r.Close()
	t.Cleanup(func() { w.Close(); cmd.Wait() })
}

func pipes(t *testing.T) (r, w *os.File) {
	t.Helper()
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { r.Close(); w.Close() })
	return r, w
}

func create(t *testing.T) *os.File {
	t.Helper()
	f, err := os.Create(filepath.Join(t.TempDir(), "web 1.save"))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.Close() })
	return f
}

// TestSource finds the domain whose QEMU writes to a pipe, and only that.
func TestSource(t *testing.T) {
	r, w := pipes(t)
	if d := Source(r); d != (Domain{}) {
		t.Errorf("nobody but us: %+v", d)
	}
	// One that reads from it, or has nothing to do with it, is not the source.
	neighbour(t, "qemu-system-x86_64", []string{"-name", "guest=reader"}, r, nil)
	neighbour(t, "qemu-system-x86_64", []string{"-name", "guest=stranger"}, nil, nil)
	if d := Source(r); d != (Domain{}) {
		t.Errorf("nobody else writes: %+v", d)
	}
	neighbour(t, "qemu-system-x86_64", []string{"-name", "guest=web,,1,debug-threads=on", "-S", "-uuid", "c1ce425f-9cad-4404-91ca-45d819a4805d"}, nil, nil, w)
	if d := Source(r); d != (Domain{"web,1", "c1ce425f-9cad-4404-91ca-45d819a4805d"}) {
		t.Errorf("%+v", d)
	}
	if d := Source(create(t)); d != (Domain{}) {
		t.Errorf("a file: %+v", d)
	}
}

// TestTarget finds the file at the end of a pipe, through libvirt's helper and
// nothing else.
func TestTarget(t *testing.T) {
	file := create(t)
	if got := Target(file); got != file.Name() {
		t.Errorf("a file itself: %q", got)
	}
	r, w := pipes(t)
	if got := Target(w); got != "" {
		t.Errorf("a pipe of our own: %q", got)
	}
	neighbour(t, "qemu-system-x86_64", nil, r, create(t))
	if got := Target(w); got != "" {
		t.Errorf("somebody's pipe: %q", got)
	}
	neighbour(t, "libvirt_iohelper", []string{file.Name(), "1"}, r, file)
	if got := Target(w); got != file.Name() {
		t.Errorf("libvirt's pipe: %q", got)
	}
	in, out := pipes(t)
	neighbour(t, "libvirt_iohelper", []string{file.Name(), "0"}, file, out)
	if got := Input(in); got != file.Name() {
		t.Errorf("input from libvirt's pipe: %q", got)
	}
	// A name that is another file's by now is none.
	if err := os.Remove(file.Name()); err != nil {
		t.Fatal(err)
	}
	if got := Target(w); got != "" {
		t.Errorf("a file that was removed: %q", got)
	}
	if err := os.WriteFile(file.Name(), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if got := Target(w); got != "" {
		t.Errorf("a file that was replaced: %q", got)
	}
}

// TestNoProc: where nothing can be seen, nothing is known.
func TestNoProc(t *testing.T) {
	r, w := pipes(t)
	p := proc(filepath.Join(t.TempDir(), "missing"))
	if d := p.source(r); d != (Domain{}) || p.target(w) != "" || p.input(r) != "" {
		t.Error("something is known")
	}
}

func TestParseQEMU(t *testing.T) {
	for args, want := range map[string]Domain{
		"qemu -name guest=a":                       {Name: "a"},
		"qemu -name guest=a,debug-threads=on":      {Name: "a"},
		"qemu -name guest=a,,b,,,,,process=x":      {Name: "a,b,,"},
		"qemu -name plain -uuid u":                 {UUID: "u"},
		"qemu -uuid":                               {},
		"qemu -name":                               {},
		"-name guest=no":                           {},
		"qemu -name guest=first -name guest=last,": {Name: "last"},
		"": {},
	} {
		if got := parseQEMU(strings.Split(args, " ")); got != want {
			t.Errorf("%q: %+v, want %+v", args, got, want)
		}
	}
}

// FuzzCommandLine: anything can stand in /proc/PID/cmdline.
func FuzzCommandLine(f *testing.F) {
	f.Add([]byte("qemu\x00-name\x00guest=a,,b\x00-uuid\x00u\x00"))
	f.Add([]byte("-name\x00guest=\x00\x00"))
	f.Fuzz(func(t *testing.T, b []byte) {
		d := parseQEMU(strings.Split(string(b), "\x00"))
		if d.Name != "" && !bytes.Contains(b, []byte("guest="+fmt.Sprintf("%.1s", d.Name))) && d.Name[0] != ',' {
			t.Errorf("%q is nowhere in %q", d.Name, b)
		}
	})
}
