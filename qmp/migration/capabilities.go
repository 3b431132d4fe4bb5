package migration

import (
	"context"
	"fmt"
	"slices"

	"github.com/flic-migrate/flic-migrate/qmp"
)

// adjusted are the capabilities of a QEMU that is to load: what they were, and are.
type adjusted struct {
	was, is map[string]bool
}

// adjust looks at the capabilities and changes none.
func adjust(ctx context.Context, x qmp.Executor) (*adjusted, error) {
	was, err := Capabilities(ctx, x)
	if err != nil {
		return nil, err
	}
	a := &adjusted{was: was, is: make(map[string]bool)}
	for name, on := range was {
		a.is[name] = on
	}
	return a, nil
}

// set makes each capability what want says, given what it was. Only what differs is
// touched, all of it or nothing.
func (a *adjusted) set(ctx context.Context, x qmp.Executor, want func(name string, was bool) bool) error {
	change := make(map[string]bool)
	for name, is := range a.is {
		if on := want(name, a.was[name]); on != is {
			change[name] = on
		}
	}
	if len(change) == 0 {
		return nil
	}
	if err := SetCapabilities(ctx, x, change); err != nil {
		return err
	}
	for name, on := range change {
		a.is[name] = on
	}
	return nil
}

// putBack makes them what they were, but for postcopy-ram and what needs it, which is
// off: with it the next migration to exec: would wait for answers on a return path.
func (a *adjusted) putBack(ctx context.Context, x qmp.Executor) error {
	return a.set(ctx, x, func(name string, was bool) bool { return was && name != "postcopy-ram" && name != "postcopy-preempt" })
}

// loads tells which capabilities an incoming migration has. saved are those that the
// saved QEMU had and names in its stream, which this one must have, too
// (configuration_validate_capabilities in migration/savevm.c). Those that do no harm are
// as the user has set them. The others are off: they expect another kind of stream
// (multifd, mapped-ram), or another channel (postcopy-preempt), or memory that is there
// already (x-ignore-shared).
func loads(saved []string, lazy bool) func(name string, was bool) bool {
	return func(name string, was bool) bool {
		switch {
		case name == "events", slices.Contains(saved, name):
			return true
		case name == "postcopy-ram":
			return lazy
		case name == "compress":
			return was && !lazy // QEMU does not compress in postcopy, nor unpack
		}
		return was && slices.Contains(harmless, name)
	}
}

// harmful are capabilities with which a save that somebody starts with migrate "exec:…"
// fails, or lacks a part of the memory. Checkpoint and Resume switch them off meanwhile.
var harmful = []string{"background-snapshot", "block", "mapped-ram", "multifd", "pause-before-switchover", "postcopy-preempt",
	"postcopy-ram", "release-ram", "switchover-ack", "x-colo", "x-ignore-shared", "zero-copy-send"}

// Harmful names the capabilities of a QEMU that are on and that a save does not go with.
func Harmful(ctx context.Context, x qmp.Executor) (on []string, err error) {
	have, err := Capabilities(ctx, x)
	for _, name := range harmful {
		if have[name] {
			on = append(on, name)
		}
	}
	return on, err
}

// checkCapabilities finds out whether QEMU knows the capabilities that the saved one
// names.
func (a *adjusted) checkCapabilities(saved []string) error {
	for _, name := range saved {
		if _, ok := a.was[name]; !ok {
			return fmt.Errorf("the QEMU that was saved had the migration capability %s, and this one has none of that name", name)
		}
	}
	return nil
}
