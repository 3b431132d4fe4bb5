// Command flic-migrate saves QEMU virtual machines into an NVRAM file and a
// flash image, as the child of a migration to exec:, and gives them back.
//
// It has a file and a test script for each verb; what a verb does is in the
// packages below tier, so that a program can do it without this command.
package main

import (
	"os"

	"github.com/flic-migrate/flic-migrate/tier/vfs"
)

func main() { os.Exit(run(vfs.OS, os.Args[1:])) }
