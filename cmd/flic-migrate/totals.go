package main

import (
	"context"
	"fmt"
	"io"
	"slices"
	"strconv"

	"github.com/flic-migrate/flic-migrate/tier/store"
)

// listTotals prints what VMs and trust domains take: of one VM, or of all.
func (a *app) listTotals(ctx context.Context, vm string, asJSON bool) error {
	if vm != "" {
		if err := store.CheckVM(vm); err != nil {
			return err
		}
	}
	st, err := a.openStore(ctx, false)
	if err != nil {
		return err
	}
	list, left, err := st.Totals(ctx)
	if err != nil {
		return err
	}
	if vm != "" {
		one := []store.Total{}
		for _, t := range list {
			if t.VM == vm {
				one = append(one, t)
			}
		}
		if list = one; len(one) == 0 {
			return fmt.Errorf("VM %q in store %s: %w", vm, st.Dir(), store.ErrNotFound)
		}
	}
	if asJSON {
		if list == nil {
			list = []store.Total{}
		}
		err = printJSON(a.stdout, list)
	} else {
		err = printTotals(a.stdout, list)
	}
	if err != nil {
		return err
	}
	return left
}

func printTotals(w io.Writer, list []store.Total) error {
	t := newTable(w)
	// This column is for those who use it.
	disks := slices.ContainsFunc(list, func(e store.Total) bool { return e.Frozen > 0 })
	row := func(cells ...string) {
		if !disks {
			cells = cells[:len(cells)-1]
		}
		t.row(cells...)
	}
	row("VM", "DOMAIN", "CHECKPOINTS", "FLASH", "NVRAM", "KEPT", "LENT", "BORROWED", "DISKS")
	for _, e := range list {
		lent, borrowed := human(e.Lent), human(e.Borrowed)
		if e.VM == "" {
			lent, borrowed = "", ""
		}
		row(dash(e.VM), dash(e.TrustDomain), strconv.Itoa(e.Checkpoints), human(e.Flash), human(e.NVRAM),
			human(e.Kept), lent, borrowed, human(e.Frozen))
	}
	return t.flush()
}
