package main

import (
	"bytes"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/spf13/pflag"
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

// Flags whose values are files, or directories, as shells complete them.
var fileFlags = strings.Fields(`arm-log config control disk guest-agent have libvirt-root members metrics nvram nvram-from
	out output qmp remote-program report root socket spool status store to forget-nvram working-set working-sets xml`)

// TestEveryFlagIsCompleted: a value is one of some words, or of what there is, or a file; files
// are offered where nothing else can be meant.
func TestEveryFlagIsCompleted(t *testing.T) {
	root := newRoot(&app{stdout: &output{File: os.Stdout}, stdin: os.Stdin, stderr: os.Stderr})
	for _, c := range append(commands(root), root) {
		c.LocalFlags().VisitAll(func(f *pflag.Flag) {
			if f.Value.Type() == "bool" {
				return
			}
			if file := slices.Contains(fileFlags, f.Name); file == (completerOf(f) != nil) {
				t.Errorf("%s --%s: takes a file: %v; something else completes it: %v", c.CommandPath(), f.Name, file, completerOf(f) != nil)
			}
		})
		kinds, _ := argumentsOf(c.Use)
		for _, kind := range kinds {
			if kind != "FILE" && kind != "TEXT" && completers[kind] == nil {
				t.Errorf("%s: nothing completes %s", c.CommandPath(), kind)
			}
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
