// Command flic-migrate saves QEMU virtual machines into an NVRAM file and a
// flash image, as the child of a migration to exec:, and gives them back.
//
// It has a file and a test script for each verb; what a verb does is in the
// packages below tier, so that a program can do it without this command.
package main

import (
	"os"
	"path/filepath"

	"github.com/flic-migrate/flic-migrate/qmp/libvirt/compressor"
	"github.com/flic-migrate/flic-migrate/tier/vfs"
)

func main() {
	collectLater()
	os.Exit(start(vfs.OS, os.Args))
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
