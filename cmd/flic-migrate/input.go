package main

import (
	"context"
	"errors"
	"io"

	"github.com/flic-migrate/flic-migrate/stream/pipe"
)

// input is what a verb was told to read: a file, a pipe, or with - standard input. Its
// reads end with the cause of ctx, so that a signal ends a verb whose input does not come.
func (a *app) input(ctx context.Context, name string) (io.ReadCloser, error) {
	if name != "-" {
		return pipe.Open(ctx, name)
	}
	if isTerminal(a.stdin) {
		return nil, usageError{errors.New("- is standard input, which is a terminal")}
	}
	return pipe.New(ctx, int(a.stdin.Fd()))
}
