package migration

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"slices"

	"github.com/flic-migrate/flic-migrate/qmp"
)

// settings are the migration capabilities and parameters that a migration of
// ours needs, and what they were before. Only what differs is touched.
type settings struct {
	have             map[string]bool // all capabilities QEMU knows
	on, off          map[string]bool // capabilities: needed, before
	during, formerly map[string]any  // parameters: needed, before
	left             Leftover
}

// The value of max-bandwidth while a migration of ours is prepared or runs. It
// is no limit, and it is one that nobody else sets: a process that is killed
// can't put anything back, and whoever comes next knows by it that it found no
// setting of the user's, and who stopped the guest. (armedBandwidth is between these.)
const (
	ourBandwidth     int64 = 1<<40 + 0xf11c
	stoppedBandwidth       = ourBandwidth + 1
	liveBandwidth          = ourBandwidth + 3
)

// Leftover is what a killed process of ours has left of itself.
type Leftover int

const (
	LeftNothing  Leftover = iota
	LeftSettings          // settings that were not the user's
	LeftStopped           // and a guest that we stopped and should have let run
	LeftArmed             // settings, and a migration if the process that has its stream lives
	LeftLive              // settings, and a guest that QEMU has stopped for us if it had come so far
)

// stopped tells whether a guest that is in s was stopped for us, and should have been let run.
// During a live checkpoint, and long after one that was killed, it can be the user who has
// paused it.
func (l Leftover) stopped(s qmp.RunState) bool {
	switch l {
	case LeftStopped:
		return slices.Contains(stoppedByMigration, s.Status)
	case LeftLive:
		return slices.Contains(stoppedByQEMU, s.Status)
	}
	return false
}

// leftIn reads it from QEMU's parameters.
func leftIn(parameters map[string]json.RawMessage) Leftover {
	switch string(parameters["max-bandwidth"]) {
	case fmt.Sprint(ourBandwidth):
		return LeftSettings
	case fmt.Sprint(stoppedBandwidth):
		return LeftStopped
	case fmt.Sprint(armedBandwidth):
		return LeftArmed
	case fmt.Sprint(liveBandwidth):
		return LeftLive
	}
	return LeftNothing
}

// LeftBehind tells what a process of ours has left in a QEMU: one that was killed, or one
// that is at work now.
//
// A live checkpoint's is LeftStopped if QEMU has stopped the guest, and else LeftSettings.
func LeftBehind(ctx context.Context, x qmp.Executor) (Leftover, error) {
	p, err := Parameters(ctx, x)
	left := leftIn(p)
	if left != LeftLive {
		return left, err
	}
	s, err := qmp.QueryStatus(ctx, x)
	if left.stopped(s) {
		return LeftStopped, err
	}
	return LeftSettings, err
}

// QEMU's defaults (migration/migration.c), for settings whose former values
// went with a killed process.
const (
	defaultBandwidth = 128 << 20
	defaultDowntime  = 300
)

// planSettings finds out what there is to change: need tells for each capability
// QEMU knows what it must be, given what it is. A parameter QEMU does not know
// is an error.
func planSettings(ctx context.Context, x qmp.Executor, need func(name string, is bool) bool, during map[string]any) (settings, error) {
	now, err := look(ctx, x)
	if err != nil {
		return settings{}, err
	}
	return now.settings.plan(need, during)
}

// plan is planSettings for who has asked already.
func (now asIs) plan(need func(name string, is bool) bool, during map[string]any) (settings, error) {
	parameters := now.parameters
	s := settings{have: now.capabilities, on: map[string]bool{}, off: map[string]bool{}, during: maps.Clone(during), formerly: map[string]any{}}
	s.during["max-bandwidth"] = ourBandwidth
	// With credentials set, QEMU would talk TLS to us.
	if was, ok := parameters["tls-creds"]; ok && string(was) != `""` && string(was) != "null" {
		s.during["tls-creds"] = ""
	}
	// QEMU (8.2) would go by what the user has of his network rather than by what it has measured
	// of us, and take a pass for finished that is to be held.
	if was, ok := parameters["avail-switchover-bandwidth"]; ok && string(was) != "0" {
		s.during["avail-switchover-bandwidth"] = 0
	}
	for name := range s.during {
		was, ok := parameters[name]
		if !ok {
			return s, fmt.Errorf("this QEMU has no migration parameter %s", name)
		}
		s.formerly[name] = was
	}
	s.left = leftIn(parameters)
	if s.left != LeftNothing {
		s.formerly["max-bandwidth"] = defaultBandwidth
		s.formerly["downtime-limit"] = defaultDowntime
	}
	for name, is := range s.have {
		was := is
		if s.left != LeftNothing && slices.Contains(ourCapabilities, name) {
			was = false
		}
		if want := need(name, is); want != is || want != was {
			s.on[name], s.off[name] = want, was
		}
	}
	return s, nil
}

// ourCapabilities are those that migrations of ours turn on.
var ourCapabilities = []string{"events", "pause-before-switchover", "return-path", "background-snapshot"}

// set sets the mark first, so that whatever is changed can be known as ours. A migration
// of somebody else's may just have ended; parameters do it no harm.
func (s settings) set(ctx context.Context, x qmp.Executor) error {
	if err := letGo(ctx, x, parametersCall(s.during)); err != nil {
		return err
	}
	return SetCapabilities(ctx, x, s.on)
}

// restore is refused by QEMU while a migration runs. Parameters do no harm to one that
// QEMU has not let go of.
//
// The mark goes last, and stays if anything is not as it was: then restore, PutRight and
// Disarm can be called again. What is also asked comes after it.
func (s settings) restore(ctx context.Context, x qmp.Executor, also ...qmp.Call) error {
	err := letGo(ctx, x)
	if err == nil {
		err = SetCapabilities(ctx, x, s.off)
	}
	formerly := s.formerly
	if err != nil {
		formerly = maps.Clone(formerly)
		delete(formerly, "max-bandwidth")
	}
	return errors.Join(append([]error{err}, qmp.Together(ctx, x, append([]qmp.Call{parametersCall(formerly)}, also...)...)...)...)
}
