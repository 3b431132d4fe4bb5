package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"time"

	"github.com/flic-migrate/flic-migrate/tier/integrity"
	"github.com/flic-migrate/flic-migrate/tier/store"
)

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
	t := newTable(w)
	t.row("GROUP", "CREATED", "MEMBERS", "RAM", "FLASH", "NVRAM", "MODE")
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
		t.row(e.Group, localTime(e.Created), members, human(int64(e.RAMBytes)),
			human(e.FlashBytes+e.MovedBytes), human(e.NVRAMBytes), mode)
	}
	return t.flush()
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
	t := newTable(w)
	t.row("group", e.Group)
	t.row("uuid", e.UUID)
	t.row("created", localTime(e.Created))
	t.row("mode", dash(e.Mode))
	for _, m := range e.Members {
		what := fmt.Sprintf("%s of RAM, %s of flash, %s of NVRAM, %s", human(int64(m.RAMBytes)), human(m.FlashBytes+m.MovedBytes), human(m.NVRAMBytes), m.State)
		if m.Removed {
			what = "removed"
		}
		t.row("  "+m.Checkpoint, what)
	}
	t.row("in all", fmt.Sprintf("%s of RAM, %s of flash, %s of NVRAM", human(int64(e.RAMBytes)), human(e.FlashBytes+e.MovedBytes), human(e.NVRAMBytes)))
	return t.flush()
}
