package main

import (
	"unsafe"

	"golang.org/x/sys/unix"
)

// mincore tells of each page of a mapping whether it is in memory, by bit 0.
func mincore(m, there []byte) error {
	_, _, err := unix.Syscall(unix.SYS_MINCORE, uintptr(unsafe.Pointer(&m[0])), uintptr(len(m)), uintptr(unsafe.Pointer(&there[0])))
	if err != 0 {
		return err
	}
	return nil
}
