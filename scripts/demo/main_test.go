package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
	"unicode/utf8"

	"github.com/flic-migrate/flic-migrate/qmp/qemutest"
)

var program string // the program, built once

func TestMain(m *testing.M) {
	dir, err := os.MkdirTemp("", "flic-demo-test")
	if err == nil {
		program = filepath.Join(dir, "flic-migrate")
		err = qemutest.Build(context.Background(), program)
	}
	status := 1
	if err == nil {
		status = m.Run()
	}
	if err = errors.Join(err, os.RemoveAll(dir)); err != nil {
		fmt.Fprintln(os.Stderr, err)
		status = 1
	}
	os.Exit(status)
}

// small is a story that is told soon, in a directory where it must leave nothing.
func small(t *testing.T) (o options, screen *bytes.Buffer) {
	t.Helper()
	screen = new(bytes.Buffer)
	o = options{memory: 128, fill: 24, binary: program, out: screen}
	t.Setenv("TMPDIR", t.TempDir())
	// Settings of whoever calls have no effect.
	t.Setenv("FLIC_STORE", "/nowhere")
	t.Setenv("FLIC_CODEC", "none")
	t.Setenv("FLIC_CONFIG", "/nowhere")
	return o, screen
}

// leaves fails the test if a file or a process of the story is there.
func leaves(t *testing.T) {
	t.Helper()
	dir := os.Getenv("TMPDIR")
	files, err := os.ReadDir(dir)
	if err != nil || len(files) > 0 {
		t.Errorf("it has left %v, %v", files, err)
	}
	processes, err := filepath.Glob("/proc/[0-9]*/cmdline")
	if err != nil {
		t.Fatal(err)
	}
	for _, name := range processes {
		if line, _ := os.ReadFile(name); bytes.Contains(line, []byte(dir)) {
			t.Errorf("%s is still there: %q", name, line)
		}
	}
}

// TestDemo: the whole story fits a screen and is true in what does not depend on how busy
// the machine is.
func TestDemo(t *testing.T) {
	o, screen := small(t)
	f, err := run(t.Context(), o)
	t.Logf("\n%s", screen)
	if err != nil {
		t.Fatal(err)
	}
	lines := strings.Split(strings.TrimSpace(screen.String()), "\n")
	if len(lines) > 40 {
		t.Errorf("it takes %d lines", len(lines))
	}
	for _, line := range lines {
		if utf8.RuneCountInString(line) > 80 || strings.ContainsFunc(line, func(r rune) bool { return r < ' ' }) {
			t.Errorf("%q is no line of a screen", line)
		}
	}
	if n := strings.Count(screen.String(), "    ok  "); n != 4 {
		t.Errorf("%d things were checked", n)
	}
	if f.firstNVRAM == 0 || f.secondBytes == 0 || f.secondBytes > f.firstBytes/2 || f.secondBytes > f.lz4AgainBytes/2 ||
		f.overlaidDisks > f.copiedDisks/4 || f.lazyRuns == 0 || f.clonesRun == 0 || f.stood == 0 {
		t.Errorf("%+v", f)
	}
	leaves(t)
}

// cutAt ends a context some time after a line has been written.
type cutAt struct {
	*bytes.Buffer
	line  string
	after time.Duration
	cut   func()
}

func (c *cutAt) Write(b []byte) (int, error) {
	n, err := c.Buffer.Write(b)
	if strings.Contains(string(b), c.line) {
		time.AfterFunc(c.after, c.cut)
	}
	return n, err
}

// TestDemoInterrupted ends the story amid a checkpoint, while the guest is watched, and amid
// the resumes of the clones.
func TestDemoInterrupted(t *testing.T) {
	for line, after := range map[string]time.Duration{"$ flic-migrate checkpoint": time.Second, "clone2.qmp": 20 * time.Millisecond} {
		o, screen := small(t)
		ctx, cut := context.WithCancel(t.Context())
		defer cut()
		o.out = &cutAt{screen, line, after, cut}
		if _, err := run(ctx, o); err == nil || err.Error() != "interrupted" { // and nothing of what was being done
			t.Errorf("%v, after\n%s", err, screen)
		}
		leaves(t)
	}
}

// TestDemoFails: a command that fails is not passed over.
func TestDemoFails(t *testing.T) {
	o, screen := small(t)
	o.binary = "/bin/false"
	if _, err := run(t.Context(), o); err == nil || !strings.Contains(err.Error(), "flic-migrate checkpoint: exit status 1") {
		t.Errorf("%v, after\n%s", err, screen)
	}
	leaves(t)
}
