package vfs

import (
	"fmt"
	"runtime/debug"
)

// FaultError is a memory access that the kernel refused: in practice a SIGBUS
// in a mapping, because the file was truncated, the disk was full under a hole,
// or persistent memory has lost a cell.
type FaultError struct {
	Addr uintptr
}

func (e *FaultError) Error() string {
	return fmt.Sprintf("memory fault at %#x: mapped file truncated, disk full or medium error", e.Addr)
}

// Within tells if the fault was in b, and at which index.
func (e *FaultError) Within(b []byte) (index int64, ok bool) {
	base := addrOf(b)
	if base == 0 || e.Addr < base || e.Addr >= base+uintptr(len(b)) {
		return 0, false
	}
	return int64(e.Addr - base), true
}

// CatchFault runs fn, in which mapped memory may be touched, and returns a fault
// as a *FaultError. Without it a fault ends the process with a stack dump, which
// for a restore means a guest lost to one bad memory cell. It covers the calling
// goroutine only; a system call that is handed a bad mapping fails with EFAULT
// by itself. Any other panic goes through.
func CatchFault(fn func() error) (err error) {
	defer debug.SetPanicOnFault(debug.SetPanicOnFault(true))
	defer func() {
		r := recover()
		if r == nil {
			return
		}
		// The runtime's fault error is the one that has an address. A nil
		// dereference is a plain runtime error without one: a bug of ours.
		f, ok := r.(interface{ Addr() uintptr })
		if !ok {
			panic(r)
		}
		err = &FaultError{Addr: f.Addr()}
	}()
	return fn()
}
