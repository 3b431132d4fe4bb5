package main

import (
	"bytes"
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

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
	for name, answer := range map[string]string{"nonsense": "nonsense", "long": strings.Repeat("x", 2<<20)} {
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
