package main

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"regexp"
	"strconv"
	"syscall"
	"testing"

	"github.com/flic-migrate/flic-migrate/qmp/migration"
	"github.com/flic-migrate/flic-migrate/qmp/session"
	"github.com/flic-migrate/flic-migrate/stream"
	"github.com/flic-migrate/flic-migrate/tier/integrity"
	"github.com/flic-migrate/flic-migrate/tier/save"
	"github.com/flic-migrate/flic-migrate/tier/store"
)

// The numbers, not the constants: scripts outside of this repository have them.
func TestExitCode(t *testing.T) {
	corrupt := &integrity.CorruptError{File: "f", Offset: 7, What: "w", Err: integrity.ErrChecksum}
	for _, c := range []struct {
		err  error
		want int
	}{
		{nil, 0},
		{errors.New("anything"), 1},
		{&fs.PathError{Op: "open", Path: "f", Err: syscall.EACCES}, 1},
		{syscall.EIO, 1},
		{fmt.Errorf("x: %w", store.ErrVolatile), 1},
		{store.ErrInUse, 1},
		{usageError{errors.New("no such flag")}, 2},
		{store.CheckVM("../etc"), 2},
		{fmt.Errorf("x: %w", store.ErrNotFound), 3},
		{&fs.PathError{Op: "open", Path: "f", Err: syscall.ENOENT}, 3},
		{fmt.Errorf("x: %w", corrupt), 4},
		{fmt.Errorf("ws: %w", &integrity.CorruptError{File: "working set", Err: errors.New("w")}), 4},
		{fmt.Errorf("1 of 2: %w", errDamaged), 4},
		{fmt.Errorf("%w: %w", &migration.Error{Status: migration.StatusFailed}, stream.Wrap("header", 0, io.EOF)), 1},
		{stream.Wrap("header", 0, io.EOF), 5},
		{stream.Damaged("footer", 12, "x"), 5},
		{&stream.Error{Op: "header", Err: stream.ErrNotStream}, 5},
		{&fs.PathError{Op: "write", Path: "f", Err: syscall.ENOSPC}, 6},
		{&fs.PathError{Op: "write", Path: "f", Err: syscall.EDQUOT}, 6},
		{&save.SpaceError{Dir: "d"}, 6},
		// A save fed by a restore: what is stored is at fault.
		{stream.Wrap("page", 9, corrupt), 4},
		// Another process has failed, and what it says is a code of ours or none.
		{&remoteError{"h", copiedEntry{Error: "x", ExitCode: 4}}, 4},
		{&remoteError{"h", copiedEntry{Error: "x"}}, 1},
		{&remoteError{"h", copiedEntry{Error: "x", ExitCode: 256}}, 1},
		{&remoteError{"h", copiedEntry{Error: "x", ExitCode: -1}}, 1},
		{&session.ArmedError{Text: "x"}, 1},
		{&session.ServerError{Err: io.EOF, Server: &session.ServerReport{Error: "x"}}, 1},
		// The name was not found because it can't be one.
		{usageError{store.ErrNotFound}, 2},
	} {
		if got := exitCode(c.err); got != c.want {
			t.Errorf("exit code of %v is %d, want %d", c.err, got, c.want)
		}
	}
}

// The help and the documentation list the codes that there are.
func TestExitCodesAreDocumented(t *testing.T) {
	doc, err := os.ReadFile("../../docs/cli.md")
	if err != nil {
		t.Fatal(err)
	}
	for code := exitOK; code <= exitNoSpace; code++ {
		n := strconv.Itoa(code)
		if !regexp.MustCompile(`(?m)^  ` + n + `  \S`).MatchString(exitHelp) {
			t.Errorf("help does not explain exit code %d", code)
		}
		if !regexp.MustCompile(`(?m)^\| ` + n + ` \| \S`).Match(doc) {
			t.Errorf("docs/cli.md does not explain exit code %d", code)
		}
	}
}

func TestOneLine(t *testing.T) {
	err := errors.Join(errors.New("first"), errors.New("second\r\nthird"))
	if got := oneLine(err); got != "first; second; third" {
		t.Errorf("%q", got)
	}
}
