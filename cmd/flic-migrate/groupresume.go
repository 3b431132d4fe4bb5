package main

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"slices"
	"strings"

	"github.com/flic-migrate/flic-migrate/qmp/migration"
	"github.com/flic-migrate/flic-migrate/qmp/session"
	"github.com/flic-migrate/flic-migrate/tier/checkpoint"
	"github.com/flic-migrate/flic-migrate/tier/store"
)

// groupResumeReport is the JSON document of a group's resume.
type groupResumeReport struct {
	Group    string `json:"group"` // NAME@N
	ExitCode int    `json:"exit_code"`
	Error    string `json:"error,omitempty"`
	session.GroupResumeReport
}

// runGroup resumes the members of a group.
func (r *resumeCmd) runGroup(ctx context.Context, args []string) error {
	ref, err := store.ParseGroup(r.group.name)
	if err != nil {
		return err
	}
	switch {
	case r.monitor.Given():
		return usageError{errors.New("with --group the members name their QEMUs: leave --qmp and --domain out")}
	case r.recover:
		return usageError{errors.New("--recover goes on with one VM's restore: give its checkpoint, and no --group")}
	case r.print:
		return usageError{errors.New("--print is for one VM, and goes with no group")}
	}
	if err := r.care.check(r); err != nil {
		return err
	}
	members, err := r.group.list(r.fs, args, r.monitor.Connect)
	if err != nil {
		return err
	}
	notLibvirts := func(m session.Member) bool { return m.Target.Domain == "" }
	if r.care.asked() && (r.care.agent != "" || slices.ContainsFunc(members, notLibvirts)) {
		return usageError{errors.New("--guest-time and --guest-run with --group are for members that are domains, whose agents libvirt has")}
	}
	if r.overlay && slices.ContainsFunc(members, notLibvirts) {
		return usageError{errors.New("--overlay with --group is for members that are domains: a QEMU of your own is started with overlays on its disks (qemu-img create -f qcow2 -b FILE -F FORMAT OVERLAY)")}
	}
	st, err := r.openStore(ctx, false)
	if err != nil {
		return err
	}
	dir, err := filepath.Abs(st.Dir())
	if err != nil {
		return err
	}
	g, err := st.FindGroup(ctx, ref)
	if err != nil {
		return err
	}
	refs, err := r.membersOf(g, members)
	if err != nil {
		return err
	}
	// All are opened before any QEMU is touched.
	var all []session.ResumeMember
	var measures []*serverMetrics
	for i, m := range members {
		c, err := st.OpenCheckpoint(ctx, refs[i], checkpoint.Options{NVRAM: r.nvram, Disks: r.disks.options(nil)})
		if err != nil {
			return err
		}
		defer c.Close()
		own := *r.app
		own.measures = metricsBeside(r.measures, m.VM)
		one := *r // its server is its own, and so is its file of metrics
		one.app, one.monitor.Target = &own, m.Target
		measures = append(measures, one.measureHere(m.VM))
		o := one.options(dir, c)
		o.Progress = measures[i].with(nil)
		o.Log = r.log().With("vm", m.VM)
		all = append(all, session.ResumeMember{Member: m, Checkpoint: c, Options: o})
	}
	doc := groupResumeReport{Group: g.Ref().String()}
	doc.GroupResumeReport, err = session.ResumeGroup(ctx, st, all)
	for i, row := range doc.Members {
		code := 0
		if row.Error != "" {
			code = exitCode(err)
		}
		r.ended(measures[i], row.Server, code)
		if row.Reason != "" {
			r.log().Info("restored eagerly", "vm", row.VM, "reason", row.Reason)
		}
		if errors.Is(err, migration.ErrServerDied) && strings.Contains(row.Error, migration.ErrServerDied.Error()) {
			one := *r
			one.monitor.Target = members[i].Target
			err = fmt.Errorf("%w: for %s run %s", err, row.VM, one.again(dir, refs[i]))
		}
	}
	return errors.Join(err, r.showGroup(doc, err))
}

// membersOf are the checkpoints of the members in a group. Who is in it and is not resumed
// is said: the others may miss it.
func (r *resumeCmd) membersOf(g store.ListedGroup, members []session.Member) (refs []store.Ref, err error) {
	of := make(map[string]store.Ref)
	for _, m := range g.Members {
		of[m.VM] = m.Ref()
	}
	for _, m := range members {
		ref, is := of[m.VM]
		if !is {
			return nil, usageError{fmt.Errorf("%s is not in group %v", m.VM, g.Ref())}
		}
		if slices.Contains(g.Missing, ref) {
			return nil, fmt.Errorf("checkpoint %v of group %v has been removed: %w", ref, g.Ref(), store.ErrNotFound)
		}
		refs = append(refs, ref)
		delete(of, m.VM)
	}
	for _, m := range g.Members {
		if _, left := of[m.VM]; left {
			r.log().Warn("a member of the group is not resumed with the others", "group", g.Ref().String(), "member", m.Ref().String())
		}
	}
	return refs, nil
}

// showGroup prints the report of a group's resume, which may have failed.
func (r *resumeCmd) showGroup(doc groupResumeReport, failed error) error {
	if r.json {
		if doc.ExitCode = exitCode(failed); failed != nil {
			doc.Error = oneLine(failed)
		}
		return printJSON(r.stdout, doc)
	}
	for _, row := range doc.Members {
		if row.Error != "" {
			fmt.Fprintf(r.stderr, "flic-migrate: %s: %s\n", row.VM, oneLine(errors.New(row.Error)))
		}
	}
	if r.quiet || failed != nil {
		return nil
	}
	fmt.Fprintf(r.stderr, "flic-migrate: group %s: %s run after %d ms, all memory after %d ms\n",
		doc.Group, plural(len(doc.Members), "guest"), doc.Running.Milliseconds(), doc.Resident.Milliseconds())
	return nil
}
