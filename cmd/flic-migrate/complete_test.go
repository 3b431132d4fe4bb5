package main

import (
	"bytes"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
)

func TestArgumentsOf(t *testing.T) {
	for use, want := range map[string]string{
		"show [flags] NAME[@N]":                                                   "[CHECKPOINT] false",
		"diff [flags] NAME[@A] NAME[@B]":                                          "[CHECKPOINT CHECKPOINT] false",
		"rm [flags] {NAME@N... | --all NAME...}":                                  "[CHECKPOINT] true",
		"verify [flags] {NAME[@N]... | --all}":                                    "[CHECKPOINT] true",
		"restore [flags] NAME[@N] > STREAM":                                       "[CHECKPOINT] false",
		"resume [flags] (--qmp SOCKET | --domain NAME) NAME[@N]":                  "[CHECKPOINT] false",
		"checkpoint [flags] {--qmp SOCKET | --domain DOMAIN} NAME\n  another one": "[VM] false",
		"disarm [flags] {NAME | --qmp SOCKET | --domain DOMAIN}":                  "[VM] false",
		"export [flags] NAME[@N] FILE.save":                                       "[CHECKPOINT FILE] false",
		"memory [flags] NAME[@N] -o FILE":                                         "[CHECKPOINT] false",
		"prune [flags] [NAME...]":                                                 "[VM] true",
		"list [flags] [NAME]":                                                     "[VM] false",
		"replay [flags] STREAM...":                                                "[FILE] true",
		"rm [flags] {FILE... | --all}":                                            "[FILE] true",
		"tag [flags] NAME[@N] [TAG...]":                                           "[CHECKPOINT TAG] true",
		"save --vm NAME [flags] < STREAM":                                         "[] false",
		"gc [flags]":                                                              "[] false",
		"version":                                                                 "[] false",
	} {
		kinds, more := argumentsOf(use)
		if got := fmt.Sprint(kinds, more); got != want {
			t.Errorf("%q: %s, want %s", use, got, want)
		}
	}
}

// TestBashScript: bash itself, with words that it ends at @ as at others, gets the part of a
// name that is behind it.
func TestBashScript(t *testing.T) {
	bash, err := exec.LookPath("bash")
	if err != nil {
		t.Fatal(err)
	}
	root := newRoot(&app{stdout: &output{File: os.Stdout}, stdin: os.Stdin, stderr: os.Stderr})
	text, err := bashScript(root, true)
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	write(t, filepath.Join(dir, "script"), text)
	// What bash-completion and flic-migrate would say for "flic-migrate show web1@".
	c := exec.Command(bash, "-c", `
		. ./script
		compopt() { :; }
		_init_completion() { [ "$2" = "=:@" ] || return 1; cur=web1@ prev=show words=(flic-migrate show web1@) cword=2; }
		flic-migrate() { printf 'web1@2\nweb1@1\n:36\n'; }
		COMP_WORDBREAKS=' =:@' COMP_TYPE=63
		__start_flic-migrate
		echo "${COMPREPLY[@]}"`)
	c.Dir = dir
	var stderr bytes.Buffer
	c.Stderr = &stderr
	out, err := c.Output()
	if err != nil || strings.TrimSpace(string(out)) != "2 1" {
		t.Errorf("%v, %q, %s", err, out, &stderr)
	}
}
