// Command flic-migrate saves QEMU virtual machines into an NVRAM file and a
// flash image, as the child of a migration to exec:, and gives them back.
//
// It has a file and a test script for each verb; what a verb does is in the
// packages below tier, so that a program can do it without this command.
package main

import (
	"os"
	"path/filepath"
	"runtime"
	"runtime/debug"

	"github.com/flic-migrate/flic-migrate/qmp/libvirt/compressor"
	"github.com/flic-migrate/flic-migrate/tier/vfs"
)

func main() {
	collectLater()
	os.Exit(start(vfs.OS, os.Args))
}

// collectLater has the first garbage collection wait until the heap has 16 MiB
// instead of 4. Most runs end before that; and while QEMU loads its devices in a
// lazy restore, every millisecond of its CPU counts (collections took 17 of 40 ms
// to running). After the first one all is as usual, because a large guest's
// tables must not take five times their size.
func collectLater() {
	debug.SetGCPercent(400)
	s := new(*byte) // has a pointer: others share their memory with what lives on
	runtime.AddCleanup(s, func(int) { debug.SetGCPercent(100) }, 0)
}

// start is the program under whatever name it was called.
func start(fsys vfs.FS, args []string) int {
	switch name := filepath.Base(args[0]); {
	case name == guardName:
		guardMain()
		return exitOK
	case name == armedName:
		return armedMain(fsys)
	case name == uniteName:
		return uniteMain(fsys, args[1:])
	case compressor.Known(name):
		return standIn(fsys, name, args[1:])
	}
	return run(newApp(fsys), args[1:])
}
