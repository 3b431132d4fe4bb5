package main

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"github.com/flic-migrate/flic-migrate/qmp/migration"
	"github.com/flic-migrate/flic-migrate/qmp/session"
	"github.com/flic-migrate/flic-migrate/tier/integrity"
	"github.com/flic-migrate/flic-migrate/tier/store"
	"github.com/flic-migrate/flic-migrate/tier/vfs"
)

// groupFlags are those of the commands that work on the QEMUs of several VMs at once.
type groupFlags struct {
	name    string
	members string // a file
}

func (g *groupFlags) add(fs *pflag.FlagSet) {
	fs.StringVar(&g.name, "group", "", "name of a group: the arguments are its members, VM=SOCKET or VM=domain:DOMAIN")
	fs.StringVar(&g.members, "members", "", "--group: file with a member on each line, beside those that are arguments")
	setKey(fs, "group", "") // it is of one run
	setKey(fs, "members", "")
}

// args are the arguments that a command takes: one name, or with --group members.
func (g *groupFlags) args(cmd *cobra.Command, args []string) error {
	if !cmd.Flags().Changed("group") {
		if g.members != "" {
			return usageError{errors.New("--members goes with --group")}
		}
		return cobra.ExactArgs(1)(cmd, args)
	}
	if g.name == "" {
		return usageError{errors.New("--group needs a name")}
	}
	if g.members == "" {
		return cobra.MinimumNArgs(1)(cmd, args)
	}
	return nil
}

// domainPrefix begins the target of a member that is libvirt's.
const domainPrefix = "domain:"

// maxMembersFile is the largest file of members, in bytes: so many with long paths.
const maxMembersFile = 1 << 20

// list are the members of the arguments and of the file. connect is where libvirt is.
func (g *groupFlags) list(fsys vfs.FS, args []string, connect string) ([]session.Member, error) {
	if g.members != "" {
		b, err := vfs.ReadFile(fsys, g.members, maxMembersFile)
		if err != nil {
			return nil, err
		}
		lines := bufio.NewScanner(bytes.NewReader(b))
		for lines.Scan() {
			if line := strings.TrimSpace(lines.Text()); line != "" && !strings.HasPrefix(line, "#") {
				args = append(args, line)
			}
		}
		if err := lines.Err(); err != nil {
			return nil, err
		}
	}
	var members []session.Member
	seen := make(map[string]bool)
	for _, arg := range args {
		vm, target, ok := strings.Cut(arg, "=")
		if !ok || target == "" {
			return nil, usageError{fmt.Errorf("member %q: give it as VM=SOCKET or VM=domain:DOMAIN", arg)}
		}
		if err := store.CheckVM(vm); err != nil {
			return nil, err
		}
		if seen[vm] {
			return nil, usageError{fmt.Errorf("%s is in the group twice", vm)}
		}
		seen[vm] = true
		m := session.Member{VM: vm, Target: session.Target{QMP: target}}
		if domain, is := strings.CutPrefix(target, domainPrefix); is {
			m.Target = session.Target{Domain: domain, Connect: connect}
		}
		members = append(members, m)
	}
	if len(members) == 0 {
		return nil, usageError{errors.New("the group has no members")}
	}
	return members, nil
}

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
	if rep.Saved {
		for _, m := range rep.Members {
			c.digest(ctx, st, m.CheckpointReport)
		}
	}
	err = errors.Join(explainNVRAM(err), c.showGroup(rep, err))
	if !rep.Saved {
		return err
	}
	for _, m := range members {
		if c.keepLast.n == 0 {
			break
		}
		removed, perr := c.prune(ctx, st, m.VM)
		for _, line := range removed {
			fmt.Fprintf(c.stderr, "flic-migrate: %s\n", line)
		}
		err = errors.Join(err, perr)
	}
	for _, m := range rep.Members {
		c.unite(ctx, st, m.Checkpoint, m.Save, c.share.where.value, c.quiet)
	}
	return err
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

// groupFlag has the names that a command is given be those of groups.
func groupFlag(fs *pflag.FlagSet, group *bool) {
	fs.BoolVar(group, "group", false, "the names are those of groups")
	setKey(fs, "group", "")
}

// groupEntry is the JSON document of show --group, and an element of list's.
type groupEntry struct {
	Group      string        `json:"group"` // NAME@N
	UUID       string        `json:"uuid,omitempty"`
	Created    time.Time     `json:"created,omitzero"`
	Mode       string        `json:"mode,omitempty"` // stop or live
	RAMBytes   uint64        `json:"ram_bytes"`      // of the members that are there
	FlashBytes int64         `json:"flash_bytes"`
	NVRAMBytes int64         `json:"nvram_bytes"`
	MovedBytes int64         `json:"moved_bytes"`
	Members    []groupMember `json:"members"`
	Error      string        `json:"error,omitempty"`
}

// groupMember is a member of a group.
type groupMember struct {
	Removed bool `json:"removed,omitempty"`
	listEntry
}

func newGroupEntry(ctx context.Context, st *store.Store, l store.ListedGroup) (e groupEntry, damage, err error) {
	e = groupEntry{Group: l.Ref().String(), Members: []groupMember{}}
	if l.Err != nil {
		e.Error = oneLine(l.Err)
		return e, l.Err, nil
	}
	e.UUID, e.Created, e.Mode = l.UUID.String(), l.Created, l.Mode
	members, err := st.MembersOf(ctx, l.Group)
	if err != nil {
		return e, nil, err
	}
	for _, m := range members {
		if errors.Is(m.Err, store.ErrNotFound) {
			e.Members = append(e.Members, groupMember{true, listEntry{Checkpoint: m.Ref.String(), VM: m.Ref.VM, Number: m.Ref.N}})
			continue
		}
		if m.Err != nil && !cannotBeRead(m.Err) {
			return e, nil, m.Err
		}
		if wrong := errors.Join(m.Err, m.Lacks); wrong != nil && !integrity.IsCorrupt(damage) {
			damage = wrong
		}
		row := newListEntry(m)
		row.Group = e.Group
		e.RAMBytes += row.RAMBytes
		e.FlashBytes += row.FlashBytes
		e.NVRAMBytes += row.NVRAMBytes
		e.MovedBytes += row.MovedBytes
		e.Members = append(e.Members, groupMember{false, row})
	}
	return e, damage, nil
}

// removed is how many members are not there any more.
func (e groupEntry) removed() (n int) {
	for _, m := range e.Members {
		if m.Removed {
			n++
		}
	}
	return n
}

// listGroups is list --group.
func (a *app) listGroups(ctx context.Context, name string, asJSON bool) error {
	st, err := a.openStore(ctx, false)
	if err != nil {
		return err
	}
	list, err := st.Groups(ctx, name)
	if err != nil {
		return err
	}
	if name != "" && len(list) == 0 {
		return fmt.Errorf("group %q in store %s: %w", name, st.Dir(), store.ErrNotFound)
	}
	var damage error
	entries := []groupEntry{}
	for _, l := range list {
		e, wrong, err := newGroupEntry(ctx, st, l)
		if err != nil {
			return err
		}
		if wrong != nil && !integrity.IsCorrupt(damage) {
			damage = wrong
		}
		entries = append(entries, e)
	}
	if asJSON {
		err = printJSON(a.stdout, entries)
	} else {
		err = printGroups(a.stdout, entries)
	}
	if err != nil {
		return err
	}
	return damage
}

func printGroups(w io.Writer, entries []groupEntry) error {
	t := tabwriter.NewWriter(w, 0, 8, 2, ' ', 0)
	fmt.Fprintln(t, "GROUP\tCREATED\tMEMBERS\tRAM\tFLASH\tNVRAM\tMODE")
	for _, e := range entries {
		members, mode := fmt.Sprint(len(e.Members)), dash(e.Mode)
		if n := e.removed(); n > 0 {
			members = fmt.Sprintf("%d of %d", len(e.Members)-n, len(e.Members))
		}
		if e.Error != "" {
			members, mode = "-", "damaged"
		}
		for _, m := range e.Members {
			if m.Error != "" {
				mode += ", " + m.Checkpoint + " " + m.State
			}
		}
		fmt.Fprintf(t, "%s\t%s\t%s\t%s\t%s\t%s\t%s\n", e.Group, localTime(e.Created), members, human(int64(e.RAMBytes)),
			human(e.FlashBytes+e.MovedBytes), human(e.NVRAMBytes), mode)
	}
	return t.Flush()
}

// showGroup is show --group.
func (a *app) showGroup(ctx context.Context, name string, asJSON bool) error {
	ref, err := store.ParseGroup(name)
	if err != nil {
		return err
	}
	st, err := a.openStore(ctx, false)
	if err != nil {
		return err
	}
	l, err := st.FindGroup(ctx, ref)
	if err != nil {
		return err
	}
	e, damage, err := newGroupEntry(ctx, st, l)
	if err != nil {
		return err
	}
	if asJSON {
		err = printJSON(a.stdout, e)
	} else {
		err = printGroup(a.stdout, e)
	}
	return errors.Join(err, damage)
}

func printGroup(w io.Writer, e groupEntry) error {
	t := tabwriter.NewWriter(w, 0, 8, 2, ' ', 0)
	fmt.Fprintf(t, "group\t%s\nuuid\t%s\ncreated\t%s\nmode\t%s\n", e.Group, e.UUID, localTime(e.Created), dash(e.Mode))
	for _, m := range e.Members {
		what := fmt.Sprintf("%s of RAM, %s of flash, %s of NVRAM, %s", human(int64(m.RAMBytes)), human(m.FlashBytes+m.MovedBytes), human(m.NVRAMBytes), m.State)
		if m.Removed {
			what = "removed"
		}
		fmt.Fprintf(t, "  %s\t%s\n", m.Checkpoint, what)
	}
	fmt.Fprintf(t, "in all\t%s of RAM, %s of flash, %s of NVRAM\n", human(int64(e.RAMBytes)), human(e.FlashBytes+e.MovedBytes), human(e.NVRAMBytes))
	return t.Flush()
}

// rmGroups is rm --group: it removes the members, and then what names them.
func (a *app) rmGroups(ctx context.Context, names []string, o rmOptions) error {
	if err := o.check(); err != nil {
		return err
	}
	for _, name := range names {
		ref, err := store.ParseGroup(name)
		switch {
		case err != nil:
			return err
		case o.all && ref.N != 0:
			return usageError{fmt.Errorf("%s is one group, and --all goes with names", name)}
		case !o.all && ref.N == 0:
			return usageError{fmt.Errorf("which group %s? Give it as %s@N, or remove all of them with --all", name, name)}
		}
	}
	st, err := a.openStore(ctx, false)
	if err != nil {
		return err
	}
	// All are found before anything is removed.
	var groups []store.ListedGroup
	for _, name := range names {
		ref, _ := store.ParseGroup(name)
		list, err := st.Groups(ctx, ref.VM)
		if err != nil {
			return err
		}
		found := len(groups)
		for _, l := range list {
			if o.all || l.Number == ref.N {
				groups = append(groups, l)
			}
		}
		if len(groups) == found {
			return fmt.Errorf("group %v in store %s: %w", ref, st.Dir(), store.ErrNotFound)
		}
	}
	entries := []rmEntry{}
	remover := a.remover(st, o)
	for _, l := range groups {
		var failed error
		for _, m := range l.Members {
			if slices.Contains(l.Missing, m.Ref()) {
				continue // removed before; another checkpoint can have the number now
			}
			e, rerr := a.removeOne(ctx, st, remover, m.Ref())
			if errors.Is(rerr, store.ErrNotFound) {
				continue // removed before
			}
			if rerr != nil {
				failed = errors.Join(failed, rerr)
				continue
			}
			entries = append(entries, e)
			if !o.json {
				fmt.Fprintf(a.stdout, "%s: %s\n", e.Checkpoint, e.words())
			}
		}
		if failed == nil {
			failed = st.ForgetGroup(ctx, l.Ref())
		}
		if failed == nil && l.Err != nil {
			a.log().Warn("the record of the group was damaged, and is removed; its members, if any, are checkpoints of their own now", "group", l.Ref().String())
		}
		if err = errors.Join(err, failed); ctx.Err() != nil {
			break
		}
	}
	if o.json {
		err = errors.Join(err, printJSON(a.stdout, entries))
	}
	return err
}
