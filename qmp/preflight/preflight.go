// Package preflight looks at a QEMU that waits for a migration before anything is
// loaded into it. What a QEMU finds out while it loads costs that QEMU, and its words
// are those of its source; here the same is found before, in a user's words, with what
// to do about it:
//
//	             asked of QEMU                     compared with
//	machine      qom-get /machine, query-machines  the configuration's machine type
//	memory       info ramblock, /objects, statfs   RAM's setup; what userfaultfd serves
//	processors   query-cpus-fast                   sections cpu_common and cpu
//	devices      info qtree                        the sections' names
//	disks        query-migrate-capabilities        sections of block migration
//
// A false alarm is worse than no check. So only what QEMU surely refuses is refused; what
// follows from names, which another version may give otherwise, can be forced; what can
// go either way is a warning; and what QEMU does not tell is not looked at.
package preflight

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strings"

	"github.com/flic-migrate/flic-migrate/qmp"
	"github.com/flic-migrate/flic-migrate/ramparse"
	"github.com/flic-migrate/flic-migrate/stream"
	"github.com/flic-migrate/flic-migrate/tier/checkpoint"
	"github.com/flic-migrate/flic-migrate/tier/restore"
)

// ErrMismatch: the QEMU is not the machine that was saved.
var ErrMismatch = errors.New("this QEMU is not the machine that was saved")

// Saved is what a checkpoint says of the machine that it was saved from. Empty fields
// are not compared.
type Saved struct {
	Machine  string           // QEMU's machine type, such as pc-q35-7.2
	Blocks   []ramparse.Block // of RAM
	Sections []stream.Section // of devices, by name and instance
	// Block: the stream has sections of block migration, which are loaded as they are.
	Block bool
}

// Describe reads what c says. What it does not say, for want of a vmdescription or
// because its stream was not understood, is left empty.
func Describe(c *checkpoint.Checkpoint) (Saved, error) {
	s := Saved{Machine: c.Meta.Machine, Blocks: c.Meta.Blocks, Block: slices.Contains(c.Meta.Foreign, restore.BlockSection)}
	if c.Meta.OpaqueBytes > 0 {
		return s, nil
	}
	tail, err := c.DeviceTail()
	if err != nil {
		return s, err
	}
	s.Sections = stream.Described(tail)
	return s, nil
}

// Options of Check.
type Options struct {
	// Force makes warnings of what may be wrong.
	Force bool
	// PID is QEMU's process, which may see other files under a name than this one does;
	// 0: not known, or on another host.
	PID int
	// Version is QEMU's; zero: not known.
	Version qmp.Version
}

// Result is what a QEMU that nothing speaks against is like.
type Result struct {
	// NotLazy is why this QEMU can't restore lazily; nil if nothing is known of that.
	NotLazy error
	// Warnings are what the user should know.
	Warnings []string
}

// Check compares the QEMU at x, which must be in inmigrate, with what was saved. The
// error wraps ErrMismatch and names all that differs. Nothing is changed.
func Check(ctx context.Context, x qmp.Executor, saved Saved, o Options) (Result, error) {
	c := &check{ctx: ctx, x: x, saved: saved, o: o}
	for _, step := range []func() error{c.machine, c.memory, c.backends, c.processors, c.devices, c.disks} {
		if err := step(); err != nil {
			return Result{}, err
		}
	}
	return c.result()
}

// check is one Check.
type check struct {
	ctx   context.Context
	x     qmp.Executor
	saved Saved
	o     Options

	refused []string // that QEMU surely refuses
	doubted []string // that may be wrong
	notLazy []string
	warned  []string
}

func (c *check) refuse(format string, a ...any) {
	c.refused = append(c.refused, fmt.Sprintf(format, a...))
}
func (c *check) doubt(format string, a ...any) {
	c.doubted = append(c.doubted, fmt.Sprintf(format, a...))
}
func (c *check) warn(format string, a ...any) { c.warned = append(c.warned, fmt.Sprintf(format, a...)) }
func (c *check) eager(format string, a ...any) {
	c.notLazy = append(c.notLazy, fmt.Sprintf(format, a...))
}

func (c *check) result() (Result, error) {
	if c.o.Force {
		for _, d := range c.doubted {
			c.warn("%s; going on, as --force says", d)
		}
		c.doubted = nil
	}
	if all := append(c.refused, c.doubted...); len(all) > 0 {
		help := ""
		if len(c.refused) == 0 {
			help = " (--force to try it all the same)"
		}
		return Result{Warnings: c.warned}, fmt.Errorf("%w: %s%s", ErrMismatch, strings.Join(all, "; "), help)
	}
	r := Result{Warnings: c.warned}
	if len(c.notLazy) > 0 {
		r.NotLazy = errors.New(strings.Join(c.notLazy, "; "))
	}
	return r, nil
}

// ask executes a command that QEMU may refuse, or not know: then it is not answered,
// and there is nothing to compare.
func (c *check) ask(command string, args, result any) (answered bool, err error) {
	err = c.x.Execute(c.ctx, command, args, result)
	if refused(err) {
		return false, nil
	}
	return err == nil, err
}

// refused tells whether QEMU has answered, and not with a result.
func refused(err error) bool {
	answer := new(qmp.Error)
	return errors.As(err, &answer)
}

// property is an object's property, in QMP's own form; nil if it has none.
func (c *check) property(path, name string) (value json.RawMessage, err error) {
	_, err = c.ask("qom-get", map[string]any{"path": path, "property": name}, &value)
	return value, err
}

// processors compares the numbers of vCPUs. Sections for more than there are have
// nowhere to go. Ones that were not saved stay as after a reset, and what has a part for
// each does not fit, such as a virtio disk with as many queues ("Failed to load
// PCIDevice:config").
func (c *check) processors() error {
	saved := max(c.instances("cpu_common"), c.instances("cpu"))
	if saved == 0 {
		return nil
	}
	var cpus []json.RawMessage
	if answered, err := c.ask("query-cpus-fast", nil, &cpus); !answered || len(cpus) == 0 {
		return err
	}
	if have := len(cpus); have != saved {
		c.doubt("it has %s, and %d when it was saved (-smp %d, or fewer and the rest plugged in)", count(have, "vCPU"), saved, saved)
	}
	return nil
}

// instances is how many sections of a name were saved.
func (c *check) instances(name string) (n int) {
	for _, s := range c.saved.Sections {
		if s.Name == name {
			n++
		}
	}
	return n
}

// disks refuses what only an old QEMU loads: the capability went with the code.
func (c *check) disks() error {
	if !c.saved.Block {
		return nil
	}
	var list []struct {
		Capability string `json:"capability"`
	}
	if answered, err := c.ask("query-migrate-capabilities", nil, &list); !answered {
		return err
	}
	for _, l := range list {
		if l.Capability == "block" {
			return nil
		}
	}
	c.refuse("the checkpoint was saved with the content of its disks (block migration), which QEMU 9.1 and later can't load: use an older one, up to 9.0")
	return nil
}

func count(n int, what string) string {
	if n == 1 {
		return "1 " + what
	}
	return fmt.Sprintf("%d %ss", n, what)
}
