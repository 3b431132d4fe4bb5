package main

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/flic-migrate/flic-migrate/qmp/migration"
	"github.com/flic-migrate/flic-migrate/qmp/session"
	"github.com/flic-migrate/flic-migrate/tier/store"
)

// groupReport is the JSON document of a group's checkpoint.
type groupReport struct {
	session.GroupReport
	ExitCode int    `json:"exit_code"`
	Error    string `json:"error,omitempty"`
}

// runGroup makes a group checkpoint.
func (c *checkpointCmd) runGroup(ctx context.Context, args []string, timed bool) error {
	ref, err := store.ParseGroup(c.group.name)
	if err != nil {
		return err
	}
	if ref.N != 0 {
		return usageError{fmt.Errorf("the group's number is not to be chosen: --group %s", ref.VM)}
	}
	members, err := c.group.list(c.fs, args, c.monitor.Connect)
	if err != nil {
		return err
	}
	timer, err := c.checkGroup(members)
	if err != nil {
		return err
	}
	// What is wrong with the flags is known before QEMU is touched.
	if _, err := c.options("", timer, timed); err != nil {
		return err
	}
	st, err := c.openStore(ctx, true)
	if err != nil {
		return err
	}
	rep, err := session.CheckpointGroup(ctx, c.fs, st, session.GroupOptions{
		Name: ref.VM, Mode: migration.Mode(c.mode.value), Members: members,
		Options: func(m session.Member) session.CheckpointOptions {
			o, _ := c.options(m.VM, timer, timed) // as above
			o.Log = c.log().With("vm", m.VM)
			o.Save.Log = o.Log
			return o
		},
		NVRAMKeep: c.nvramKeep.n, Log: c.log(),
	})
	err = explainNVRAM(err)
	if !rep.Saved {
		return errors.Join(err, c.showGroup(rep, err))
	}
	// Before the report, which has the exit code.
	removed, perr := c.pruneMembers(ctx, st, members)
	if perr != nil {
		err = errors.Join(err, fmt.Errorf("group %s is saved, but: %w", rep.Group, perr))
	}
	for _, m := range rep.Members {
		c.digest(ctx, st, m.CheckpointReport)
	}
	err = errors.Join(err, c.showGroup(rep, err))
	for _, line := range removed {
		fmt.Fprintf(c.stderr, "flic-migrate: %s\n", line)
	}
	for _, m := range rep.Members {
		c.unite(ctx, st, m.Checkpoint, m.Save, c.share.where.value, c.quiet)
	}
	return err
}

// pruneMembers is prune of each member's VM.
func (c *checkpointCmd) pruneMembers(ctx context.Context, st *store.Store, members []session.Member) (removed []string, err error) {
	if c.keepLast.n == 0 {
		return nil, nil
	}
	for _, m := range members {
		lines, perr := c.prune(ctx, st, m.VM)
		removed, err = append(removed, lines...), errors.Join(err, perr)
	}
	return removed, err
}

// checkGroup checks the flags of a group checkpoint, and returns the timer, 0 for auto.
func (c *checkpointCmd) checkGroup(members []session.Member) (time.Duration, error) {
	domains := 0
	for _, m := range members {
		if m.Target.Domain != "" {
			domains++
		}
	}
	switch {
	case c.monitor.Given():
		return 0, usageError{errors.New("with --group the members name their QEMUs: leave --qmp and --domain out")}
	case c.mode.value == string(migration.ModeBackground):
		return 0, usageError{errors.New("a group's guests are stopped at one moment, and --mode background stops none")}
	case c.arm:
		return 0, usageError{errors.New("--arm has one VM's next checkpoint ready, and goes with no group")}
	case c.workingSet != "":
		return 0, usageError{errors.New("--working-set is one VM's, and goes with no group")}
	case c.agent != "" || c.sync && domains < len(members):
		return 0, usageError{errors.New("--guest-sync with --group is for members that are domains, whose agents libvirt has")}
	}
	if err := c.checkSnapshot(); err != nil {
		return 0, err
	}
	return c.checkValues()
}

// showGroup prints the report of a group checkpoint, which may have failed.
func (c *checkpointCmd) showGroup(rep session.GroupReport, failed error) error {
	if c.json {
		doc := groupReport{GroupReport: rep, ExitCode: exitCode(failed)}
		if failed != nil {
			doc.Error = oneLine(failed)
		}
		return printJSON(c.stdout, doc)
	}
	for _, m := range rep.Members {
		switch {
		case strings.HasPrefix(m.Error, session.GivenUp) && len(m.Snapshots) == 0: // the other's reason is said
		case m.Error != "":
			fmt.Fprintf(c.stderr, "flic-migrate: %s: %s\n", m.VM, oneLine(errors.New(m.Error)))
		case c.quiet || !rep.Saved:
		default:
			ref, err := store.ParseRef(m.Checkpoint)
			if err != nil {
				return err
			}
			stood := ""
			if m.Downtime > 0 {
				stood = fmt.Sprintf("stood still for %d ms, ", m.Downtime.Milliseconds())
			}
			fmt.Fprintf(c.stderr, "flic-migrate: %s; %snow it is %s\n", summary(ref, m.Save), stood, m.State)
			c.saySnapshots(m.CheckpointReport)
		}
	}
	if c.quiet || !rep.Saved {
		return nil
	}
	skew := ""
	if rep.SkewBy != "" {
		skew = fmt.Sprintf("; the guests were stopped within %.1f ms", float64(rep.Skew.Microseconds())/1e3)
	}
	if rep.Downtime > 0 {
		skew += fmt.Sprintf("; they stood still for %d ms at most", rep.Downtime.Milliseconds())
	}
	fmt.Fprintf(c.stderr, "flic-migrate: group %s: %s, %s in, %d pages as another member has them, %s to flash, %s to NVRAM%s; %.2f s in all\n",
		rep.Group, plural(len(rep.Members), "checkpoint"), human(rep.Sum.BytesIn), rep.Sum.Peers, human(rep.Sum.FlashBytes), human(rep.Sum.NVRAMBytes),
		skew, rep.Total.Seconds())
	if d := rep.Demoted; d != nil {
		fmt.Fprintf(c.stderr, "flic-migrate: %s of older checkpoints moved to flash, %s of NVRAM freed\n", human(d.Bytes), human(d.NVRAMBytes))
	}
	return nil
}
