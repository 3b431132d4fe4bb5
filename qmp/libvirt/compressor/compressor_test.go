package compressor

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
)

// TestMain makes this binary, under the name "lzop", a program that hands
// everything over, and under that of libvirt's helper one that waits.
func TestMain(m *testing.M) {
	switch filepath.Base(os.Args[0]) {
	case "lzop":
		var head []byte
		if n := os.Getenv("HEAD"); n != "" {
			head = make([]byte, len(n))
			io.ReadFull(os.Stdin, head)
		}
		status, err := HandOver("lzop", os.Args[1:], head)
		if err != nil {
			fmt.Fprintln(os.Stderr, "hand over:", err)
			status = 99
		}
		os.Exit(status)
	case "libvirt_iohelper", "qemu-system-x86_64":
		io.Copy(io.Discard, os.NewFile(9, "wait"))
		os.Exit(0)
	case "virtqemud":
		io.Copy(io.Discard, os.Stdin)
		os.Exit(0)
	}
	os.Exit(m.Run())
}

func TestJobOf(t *testing.T) {
	for args, want := range map[string]Job{
		"-c": Compress, "-c -3": Compress, "-3 -c": Compress, // qemuSaveImageCreate, for xz
		"-dc": Decompress, "-dc --ignore-warn": Decompress,
		"": Other, "-d": Other, "-c file": Other, "-dc file": Other, "-c -dc": Other, "--ignore-warn": Other, "-c -c": Other,
		"-cd": Other, "-c --": Other, "-c -0": Other, "-V": Other, "--version": Other,
	} {
		if got := JobOf(strings.Fields(args)); got != want {
			t.Errorf("%q: %v, want %v", args, got, want)
		}
	}
	for _, name := range Names {
		if !Known(name) {
			t.Errorf("%s is not known", name)
		}
	}
	if Known("flic-migrate") || Known("cat") || Known("raw") {
		t.Error("knows too much")
	}
}

func TestPeek(t *testing.T) {
	name := filepath.Join(t.TempDir(), "f")
	if err := os.WriteFile(name, []byte("headimage"), 0o600); err != nil {
		t.Fatal(err)
	}
	f, err := os.Open(name)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	f.Seek(4, io.SeekStart)
	for _, n := range []int{3, 5, 8} {
		head, taken, err := Peek(f, n)
		if string(head) != "image"[:min(n, 5)] || taken || err != nil {
			t.Errorf("file: %q, %v, %v", head, taken, err)
		}
	}
	if rest, _ := io.ReadAll(f); string(rest) != "image" {
		t.Errorf("after a look the file gives %q", rest)
	}
	for content, want := range map[string]string{"image": "ima", "im": "im", "": ""} {
		r, w, err := os.Pipe()
		if err != nil {
			t.Fatal(err)
		}
		w.WriteString(content)
		w.Close()
		head, taken, err := Peek(r, 3)
		if string(head) != want || !taken || err != nil {
			t.Errorf("pipe of %q: %q, %v, %v", content, head, taken, err)
		}
		if rest, _ := io.ReadAll(r); string(rest) != content[len(want):] {
			t.Errorf("pipe of %q gives %q after %q", content, rest, want)
		}
		r.Close()
	}
}

// link makes a directory in which this binary has a name.
func link(t *testing.T, name string) string {
	t.Helper()
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	if err := os.Symlink(self, filepath.Join(dir, name)); err != nil {
		t.Fatal(err)
	}
	return dir
}

// script makes a directory with a shell script of that name.
func script(t *testing.T, name, text string) string {
	t.Helper()
	dir := t.TempDir()
	if err := os.WriteFile(filepath.Join(dir, name), []byte("#!/bin/sh\n"+text), 0o755); err != nil {
		t.Fatal(err)
	}
	return dir
}

// TestReal passes over links to this program, directories, and what can't be
// run.
func TestReal(t *testing.T) {
	dull := t.TempDir()
	if err := os.WriteFile(filepath.Join(dull, "lzop"), nil, 0o644); err != nil {
		t.Fatal(err)
	}
	folder := t.TempDir()
	if err := os.Mkdir(filepath.Join(folder, "lzop"), 0o755); err != nil {
		t.Fatal(err)
	}
	real := script(t, "lzop", "")
	us := link(t, "lzop")
	t.Setenv("PATH", strings.Join([]string{us, dull, folder, "", ".", link(t, "lzop"), real, script(t, "lzop", "")}, ":"))
	if got, err := Real("lzop"); err != nil || got != filepath.Join(real, "lzop") {
		t.Errorf("%s, %v", got, err)
	}
	t.Setenv("PATH", us)
	if got, err := Real("lzop"); !errors.Is(err, exec.ErrNotFound) || !strings.Contains(fmt.Sprint(err), "lzop") {
		t.Errorf("%s, %v", got, err)
	}
}

// TestHandOver: the real program gets the arguments and every byte, and its
// output, errors and exit status are this program's.
func TestHandOver(t *testing.T) {
	us := link(t, "lzop")
	input := bytes.Repeat([]byte("some input\n"), 100_000)
	for name, c := range map[string]struct {
		script string
		status int
		out    string // %s: the input
		stderr string
	}{
		"all":     {`echo "$0 $*"; cat; echo why >&2`, 0, "-c -3\n%s", "why\n"},
		"fails":   {`cat >/dev/null; echo why >&2; exit 7`, 7, "", "why\n"},
		"stops":   {`head -c 100 >/dev/null; exit 3`, 3, "", ""},
		"stops 0": {`echo enough`, 0, "enough\n", ""},
		"killed":  {`kill -9 $$`, 128 + int(syscall.SIGKILL), "", ""},
	} {
		real := script(t, "lzop", strings.Replace(c.script, "$0 ", "", 1)+"\n")
		for _, head := range []string{"", "12345"} {
			var out, stderr bytes.Buffer
			cmd := exec.Command(filepath.Join(us, "lzop"), "-c", "-3")
			cmd.Env = append(os.Environ(), "PATH="+us+":"+real+":/usr/bin:/bin", "HEAD="+head)
			cmd.Stdin, cmd.Stdout, cmd.Stderr = bytes.NewReader(input), &out, &stderr
			err := cmd.Run()
			status := cmd.ProcessState.ExitCode()
			if s := cmd.ProcessState.Sys().(syscall.WaitStatus); s.Signaled() {
				status = 128 + int(s.Signal())
			}
			if status != c.status {
				t.Errorf("%s, head %q: %v, want %d\n%s", name, head, err, c.status, stderr.String())
			}
			if want := strings.Replace(c.out, "%s", string(input), 1); out.String() != want || stderr.String() != c.stderr {
				t.Errorf("%s, head %q: %d bytes, want %d; stderr %q", name, head, out.Len(), len(want), stderr.String())
			}
		}
	}
	cmd := exec.Command(filepath.Join(us, "lzop"), "-c")
	cmd.Env = []string{"PATH=" + us}
	if out, err := cmd.CombinedOutput(); err == nil || !strings.Contains(string(out), "lzop itself is not installed") {
		t.Errorf("%s, %v", out, err)
	}
}
