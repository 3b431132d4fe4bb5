// Command record makes the recorded streams in testdata with real QEMUs: the
// system's (scripts/deps qemu qemu-aarch64 guest), and those of Debian suites, which
// scripts/suite makes:
//
//	go run ./scripts/record            all of them; takes some minutes
//	go run ./scripts/record NAME...    those, and what is derived from them
//	go run ./scripts/record -list
//
// Each stream is taken apart to see that it shows what it is recorded for, and
// loaded into a second QEMU, whose RAM must be the first one's. Only then it
// replaces the one in testdata. Those with ".refused." in the name are damaged
// ones, made of another recording, and QEMU must refuse them. The table in
// testdata/README.md is written anew.
//
// Background snapshots need userfaultfd, so run it as root, or with
// vm.unprivileged_userfaultfd=1.
package main

import (
	"context"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"path/filepath"
	"slices"

	"github.com/flic-migrate/flic-migrate/qmp/qemutest"
)

const suffix = ".stream.zst"

func main() {
	list := flag.Bool("list", false, "print the names")
	child := flag.String("answer", "", "be the exec: child of a migration with a return path and write the stream to this `file`")
	flag.Parse()
	if *child != "" {
		exitOn(answer(os.Stdin, os.Stdout, *child))
		return
	}
	if *list {
		for _, r := range recordings {
			fmt.Println(r.name)
		}
		return
	}
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt)
	defer stop()
	root, err := qemutest.ModuleRoot()
	exitOn(err)
	testdata := filepath.Join(root, "testdata")
	exitOn(os.MkdirAll(testdata, 0o755))
	for _, name := range flag.Args() {
		if find(name) == nil {
			exitOn(fmt.Errorf("no recording %q; see -list", name))
		}
	}
	failed := false
	for i := range recordings {
		r := &recordings[i]
		if names := flag.Args(); len(names) > 0 && !slices.Contains(names, r.name) && !slices.Contains(names, r.from) {
			continue
		}
		if err := r.make(ctx, testdata); err != nil {
			fmt.Fprintf(os.Stderr, "%s: %v\n", r.name, err)
			failed = true
			continue
		}
		fmt.Println(r.name)
	}
	exitOn(writeReadme(ctx, testdata))
	if failed {
		os.Exit(1)
	}
}

func find(name string) *recording {
	for i := range recordings {
		if recordings[i].name == name {
			return &recordings[i]
		}
	}
	return nil
}

func exitOn(err error) {
	if err != nil {
		fmt.Fprintln(os.Stderr, "record:", err)
		os.Exit(1)
	}
}
