package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/flic-migrate/flic-migrate/tier/store"
	"github.com/flic-migrate/flic-migrate/tier/vfs"
)

// listingFS is one on which something happens after a directory was listed.
type listingFS struct {
	vfs.FS
	after func(dir string)
}

func (f listingFS) NoLinks(dir string) (vfs.FS, error) {
	in, err := f.FS.NoLinks(dir)
	return listingFS{in, f.after}, err
}

func (f listingFS) ReadDir(dir string) ([]fs.DirEntry, error) {
	list, err := f.FS.ReadDir(dir)
	f.after(dir)
	return list, err
}

// TestCopyRemoved: what the other store has is removed after it said that it has it. All the
// same the copy comes, with what was not to be sent at first.
func TestCopyRemoved(t *testing.T) {
	dir := t.TempDir()
	here, there := filepath.Join(dir, "here"), filepath.Join(dir, "there")
	stream, err := exec.Command("mkstream", "-size", fmt.Sprint(4<<20)).Output()
	ok(t, err)
	run := func(args ...string) {
		t.Helper()
		cmd := exec.Command("flic-migrate", args...)
		cmd.Env, cmd.Stdin = append(os.Environ(), "FLIC_CONFIG=/dev/null"), bytes.NewReader(stream)
		if out, err := cmd.CombinedOutput(); err != nil {
			t.Fatalf("%v: %v: %s", args, err, out)
		}
	}
	run("save", "--quiet", "--store", here, "--vm", "web1")
	run("save", "--quiet", "--store", here, "--vm", "web1")
	run("copy", "--quiet", "--store", here, "web1@1", "--to", there)
	removed := false
	c := &copyCmd{app: &app{fs: listingFS{vfs.OS, func(dir string) {
		if !removed && dir == filepath.Join(there, "tmp") { // Have looks there last
			removed = true
			run("rm", "--store", there, "web1@1")
		}
	}}}, to: there}
	st, err := store.Open(t.Context(), vfs.OS, here, false)
	ok(t, err)
	var told []string
	err = asking(func(e copiedEntry) error {
		told = append(told, e.words())
		return nil
	}, func(done func(copiedEntry) error) error {
		return c.local(t.Context(), st, []store.Ref{{VM: "web1", N: 2}}, newProgress(os.Stderr, true), done)
	})
	if err != nil || len(told) != 1 || !removed {
		t.Errorf("%v, %q; removed: %v", err, told, removed)
	}
	run("verify", "--store", there, "web1@2")
	// And so on another host.
	run("rm", "--store", there, "web1@2")
	run("copy", "--quiet", "--store", here, "web1@1", "--to", there)
	ssh := filepath.Join(dir, "ssh")
	script := `#!/bin/sh
shift
if [ -e DIR/asked ]; then exec sh -c "$*"; fi
touch DIR/asked DIR/answer
{
	until grep -q '^end' DIR/answer; do sleep 0.05; done
	flic-migrate rm --store DIR/there web1@1 >/dev/null && touch DIR/removed
	cat
} | sh -c "$*" | tee DIR/answer
`
	ok(t, os.WriteFile(ssh, []byte(strings.ReplaceAll(script, "DIR", dir)), 0o755))
	run("copy", "--quiet", "--store", here, "web1@2", "--to", "far:"+there, "--ssh", ssh)
	if _, err := os.Stat(filepath.Join(dir, "removed")); err != nil {
		t.Error(err)
	}
	run("verify", "--store", there, "web1@2")
}

// TestSendStale: what a store had when it was asked is gone when the stream comes. The message
// says what to do, and that works.
func TestSendStale(t *testing.T) {
	dir := t.TempDir()
	here, there := filepath.Join(dir, "here"), filepath.Join(dir, "there")
	stream, err := exec.Command("mkstream", "-size", fmt.Sprint(4<<20)).Output()
	ok(t, err)
	in := stream
	try := func(args ...string) (out, said string, err error) {
		cmd := exec.Command("flic-migrate", args...)
		var stdout, stderr bytes.Buffer
		cmd.Env, cmd.Stdin, cmd.Stdout, cmd.Stderr = append(os.Environ(), "FLIC_CONFIG=/dev/null"), bytes.NewReader(in), &stdout, &stderr
		err = cmd.Run()
		return stdout.String(), stderr.String(), err
	}
	run := func(args ...string) string {
		t.Helper()
		out, said, err := try(args...)
		if err != nil {
			t.Fatalf("%v: %v: %s", args, err, said)
		}
		return out
	}
	run("save", "--quiet", "--store", here, "--vm", "web1")
	run("save", "--quiet", "--store", here, "--vm", "web1")
	run("copy", "--quiet", "--store", here, "web1@1", "--to", there)
	send := func() []byte {
		t.Helper()
		in = []byte(run("receive", "--list", "--store", there))
		return []byte(run("send", "--quiet", "--store", here, "--have", "-", "web1@2"))
	}
	in = send()
	run("rm", "--store", there, "web1@1")
	_, said, err := try("receive", "--quiet", "--store", there)
	if err == nil || !strings.Contains(said, "web1@2") || !strings.Contains(said, "receive --list") || !strings.Contains(said, "send --have") {
		t.Errorf("%v: %s", err, said)
	}
	in = send()
	run("receive", "--quiet", "--store", there)
	run("verify", "--store", there, "web1@2")
}

// TestCopyAnswer: an answer that is none ends a copy, also when the other end reads no more
// and stays.
func TestCopyAnswer(t *testing.T) {
	dir := t.TempDir()
	program, err := exec.LookPath("flic-migrate")
	ok(t, err)
	stream, err := exec.Command("mkstream", "-size", fmt.Sprint(8<<20)).Output()
	ok(t, err)
	save := exec.Command(program, "save", "--quiet", "--store", filepath.Join(dir, "here"), "--vm", "web1")
	save.Env, save.Stdin = append(os.Environ(), "FLIC_CONFIG=/dev/null"), bytes.NewReader(stream)
	if out, err := save.CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	for name, answer := range map[string]string{
		"nonsense": "nonsense", "long": strings.Repeat("x", 2<<20),
		"without end": strings.Repeat(`{"checkpoint":"`+strings.Repeat("x", 1<<19)+"\"}\n", 1+maxAnswers>>19),
	} {
		ok(t, os.WriteFile(filepath.Join(dir, "answer"), []byte("flic-migrate have 1\nend\n"+answer+"\n"), 0o600))
		ssh := filepath.Join(dir, "ssh")
		ok(t, os.WriteFile(ssh, []byte("#!/bin/sh\ncat "+filepath.Join(dir, "answer")+"\nexec sleep 120\n"), 0o755))
		ctx, stop := context.WithTimeout(t.Context(), time.Minute)
		defer stop()
		cmd := exec.CommandContext(ctx, program, "copy", "--quiet", "--store", filepath.Join(dir, "here"), "web1", "--to", "host:/far", "--ssh", ssh)
		cmd.Env = save.Env
		out, err := cmd.CombinedOutput()
		if err == nil || ctx.Err() != nil || !bytes.Contains(out, []byte("flic-migrate: ")) {
			t.Errorf("%s: %v (%v): %.200s", name, err, ctx.Err(), out)
		}
	}
}

// TestCopySilent: a receiver that says nothing, or reads no more, ends a copy, though the
// connection stays: what it has started, too, holds the pipes.
func TestCopySilent(t *testing.T) {
	dir := t.TempDir()
	here := filepath.Join(dir, "here")
	stream, err := exec.Command("mkstream", "-size", fmt.Sprint(8<<20)).Output()
	ok(t, err)
	save := exec.Command("flic-migrate", "save", "--quiet", "--store", here, "--vm", "web1", "--codec", "none")
	save.Env, save.Stdin = append(os.Environ(), "FLIC_CONFIG=/dev/null"), bytes.NewReader(stream)
	if out, err := save.CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	have := "printf 'flic-migrate have 1\\nend\\n'; "
	for name, script := range map[string]string{
		"says nothing":      "sleep 30",
		"has not said all":  "printf 'flic-migrate have 1\\n'; sleep 30",
		"reads nothing":     have + "sleep 30",
		"reads some":        have + "head -c 100000 >/dev/null; sleep 30",
		"does not answer":   have + "cat >/dev/null; sleep 30",
		"does not end":      have + "exec >&-; cat >/dev/null; sleep 30",
		"says it, and sits": have + "echo '{}'; cat >/dev/null; sleep 30",
	} {
		t.Run(name, func(t *testing.T) {
			ssh := filepath.Join(t.TempDir(), "ssh")
			ok(t, os.WriteFile(ssh, []byte("#!/bin/sh\nexec 2>/dev/null\n"+script+"; exit\n"), 0o755))
			c := &copyCmd{app: &app{fs: vfs.OS}, ssh: ssh, program: "flic-migrate", silent: 300 * time.Millisecond}
			st, err := store.Open(t.Context(), vfs.OS, here, false)
			ok(t, err)
			start := time.Now()
			err = c.remote(t.Context(), st, []store.Ref{{VM: "web1", N: 1}}, "host", "/far", newProgress(os.Stderr, true), func(copiedEntry) error { return nil })
			if !errors.Is(err, errSilent) {
				t.Error(err)
			}
			if d := time.Since(start); d > 20*time.Second {
				t.Errorf("it took %v", d)
			}
		})
	}
}
