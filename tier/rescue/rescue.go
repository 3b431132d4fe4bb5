// Package rescue turns a panic into an error.
//
// A save must tell its source that it has failed, and free what it took, whatever
// went wrong in it: a QEMU that hears nothing, or the wrong word, costs a guest.
// A panic that ends the process does neither, and its exit code would be Go's, 2, which
// is "nothing was done" here. So the outermost call of a verb and each goroutine that is
// started run under Call; TestGoroutines names those that need not. Nobody goes on with a
// state that a panic has left: the error ends the verb as any other does.
package rescue

import (
	"fmt"
	"runtime/debug"

	"golang.org/x/sync/errgroup"
)

// Error is a panic that was caught. It unwraps to nothing: what the panic's value
// happens to wrap, such as syscall.ENOSPC, must not decide how the failure is taken.
type Error struct {
	Value any    // what panic was called with
	Stack []byte // of the goroutine, as debug.Stack gives it
}

func (e *Error) Error() string { return fmt.Sprintf("internal error: %v", e.Value) }

// Call calls fn and returns its error, or an *Error if it panicked. runtime.Goexit
// and what the runtime takes for fatal, such as a lack of memory, are not caught.
func Call(fn func() error) (err error) {
	defer func() {
		if v := recover(); v != nil {
			err = &Error{v, debug.Stack()}
		}
	}()
	return fn()
}

// Go is g.Go of fn under Call: a panic is the group's error as any other. An errgroup
// catches none itself.
func Go(g *errgroup.Group, fn func() error) {
	g.Go(func() error { return Call(fn) })
}
