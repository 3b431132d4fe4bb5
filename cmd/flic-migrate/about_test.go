package main

import (
	"errors"
	"fmt"
	"testing"

	"github.com/flic-migrate/flic-migrate/tier/store"
)

// TestAbout: an error names the checkpoint once, whether or not the store's does, and says
// what it wraps.
func TestAbout(t *testing.T) {
	ref := store.Ref{VM: "vm", N: 1}
	for _, c := range []struct {
		err        error
		what, want string
	}{
		{fmt.Errorf("checkpoint %v: %w", ref, store.ErrInUse), "was not removed", "checkpoint vm@1 was not removed: in use by another process"},
		{store.ErrInUse, "was not sent", "checkpoint vm@1 was not sent: in use by another process"},
		{fmt.Errorf("checkpoint %v: %w", ref, store.ErrInUse), "", "checkpoint vm@1: in use by another process"},
		{fmt.Errorf("checkpoint vm@11: %w", store.ErrInUse), "", "checkpoint vm@1: checkpoint vm@11: in use by another process"},
	} {
		got := about(ref, c.what, c.err)
		if got.Error() != c.want || !errors.Is(got, store.ErrInUse) {
			t.Errorf("%q, %q: %q", c.err, c.what, got)
		}
	}
}
