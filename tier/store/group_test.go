package store

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"slices"
	"syscall"
	"testing"

	"github.com/flic-migrate/flic-migrate/tier/integrity"
	"github.com/flic-migrate/flic-migrate/tier/vfs/crashfs"
)

// groupVMs are the members of these tests' groups.
var groupVMs = []string{"a", "b", "c"}

// begin makes whole images of some VMs that have no name yet. The first has a page in
// NVRAM.
func begin(s *Store, vms ...string) (txs []*Tx, err error) {
	for i, vm := range vms {
		t, err := s.Begin(context.Background(), vm)
		if err == nil {
			txs = append(txs, t)
			if i == 0 {
				_, _, err = t.Reserve(context.Background(), Reservation{Path: "/nvram", Capacity: 1 << 20, Bytes: 1, PageSize: 4096})
			}
		}
		if err == nil {
			err = finish(t)
		}
		if err != nil {
			return txs, err
		}
	}
	return txs, nil
}

func commitGroup(s *Store, vms ...string) (Group, error) {
	txs, err := begin(s, vms...)
	if err != nil {
		for _, t := range txs {
			t.Abort()
		}
		return Group{}, err
	}
	return s.CommitGroup(context.Background(), Group{Name: "shop", Mode: "stop"}, txs)
}

func mustCommitGroup(t *testing.T, s *Store, vms ...string) Group {
	t.Helper()
	g, err := commitGroup(s, vms...)
	if err != nil {
		t.Fatal(err)
	}
	return g
}

// names says which group it is and what it lacks.
func (g ListedGroup) names() string { return fmt.Sprint(g.Ref(), " without ", g.Missing) }

func listed(t *testing.T, s *Store) (checkpoints, groups []string) {
	t.Helper()
	refs, err := s.List(t.Context(), "")
	if err != nil {
		t.Fatal(err)
	}
	for _, r := range refs {
		checkpoints = append(checkpoints, r.String())
	}
	list, err := s.Groups(t.Context(), "")
	if err != nil {
		t.Fatal(err)
	}
	for _, g := range list {
		groups = append(groups, g.names())
	}
	return checkpoints, groups
}

func wantListed(t *testing.T, s *Store, checkpoints, groups []string) {
	t.Helper()
	c, g := listed(t, s)
	if !slices.Equal(c, checkpoints) || !slices.Equal(g, groups) {
		t.Errorf("there are %v and %v, want %v and %v", c, g, checkpoints, groups)
	}
}

// TestGroup makes groups and takes them apart.
func TestGroup(t *testing.T) {
	s, disk := newStore(t)
	mustCommit(t, s, "b")
	one := mustCommitGroup(t, s, groupVMs...)
	two := mustCommitGroup(t, s, "b", "c")
	wantListed(t, s, []string{"a@1", "b@1", "b@2", "b@3", "c@1", "c@2"}, []string{"shop@1 without []", "shop@2 without []"})
	if one.Number != 1 || two.Number != 2 || one.UUID == two.UUID || one.Members[1].Ref() != (Ref{"b", 2}) {
		t.Errorf("%+v, %+v", one, two)
	}
	if g, err := s.FindGroup(t.Context(), Ref{VM: "shop"}); err != nil || g.Number != 2 || g.Mode != "stop" || g.UUID != two.UUID {
		t.Errorf("%+v, %v", g, err)
	}
	if g, err := s.FindGroup(t.Context(), Ref{"shop", 1}); err != nil || !slices.Equal(g.Members, one.Members) {
		t.Errorf("%+v, %v", g, err)
	}
	for _, r := range []Ref{{"shop", 3}, {"a", 1}, {VM: "a"}} {
		if _, err := s.FindGroup(t.Context(), r); !errors.Is(err, ErrNotFound) {
			t.Errorf("%v: %v", r, err)
		}
	}
	if of, err := s.GroupOf(t.Context()); err != nil || of[Ref{"b", 3}] != (Ref{"shop", 2}) || of[Ref{"b", 1}] != (Ref{}) {
		t.Errorf("%v, %v", of, err)
	}

	remove := func(refs ...Ref) {
		t.Helper()
		for _, r := range refs {
			if _, err := s.Remove(t.Context(), r); err != nil {
				t.Fatal(err)
			}
		}
	}
	// A group that lacks members says so, and goes with the last.
	remove(Ref{"c", 2})
	wantListed(t, s, []string{"a@1", "b@1", "b@2", "b@3", "c@1"}, []string{"shop@1 without []", "shop@2 without [c@2]"})
	if err := s.ForgetGroup(t.Context(), Ref{"shop", 2}); err != nil {
		t.Fatal(err)
	}
	remove(Ref{"b", 3})
	wantListed(t, s, []string{"a@1", "b@1", "b@2", "c@1"}, []string{"shop@1 without []"})
	remove(Ref{"a", 1}, Ref{"b", 2}, Ref{"c", 1})
	wantListed(t, s, []string{"b@1"}, nil)
	// Numbers are not used twice, also after what remembers them is all that is left.
	if rep, err := s.GC(t.Context()); err != nil || len(rep.Warnings) > 0 {
		t.Errorf("%+v, %v", rep, err)
	}
	entries, err := disk.ReadDir("/store/groups")
	if err != nil || len(entries) != 1 || entries[0].Name() != "shop@2.json" {
		t.Errorf("%v, %v", entries, err)
	}
	if g := mustCommitGroup(t, s, "a"); g.Number != 3 {
		t.Errorf("%+v", g)
	}
}

// TestGroupRefused: what can't be a group leaves nothing.
func TestGroupRefused(t *testing.T) {
	s, _ := newStore(t)
	ended := func(txs []*Tx) []*Tx { txs[1].Abort(); return txs }
	same := func(txs []*Tx) []*Tx { return txs }
	for name, test := range map[string]struct {
		group string
		vms   []string
		then  func([]*Tx) []*Tx
	}{
		"no members":     {"shop", nil, same},
		"one twice":      {"shop", []string{"a", "b", "a"}, same},
		"one has failed": {"shop", groupVMs, ended},
		"no name":        {"", groupVMs, same},
		"a path":         {"../x", groupVMs, same},
	} {
		txs, err := begin(s, test.vms...)
		if err != nil {
			t.Fatal(err)
		}
		if g, err := s.CommitGroup(t.Context(), Group{Name: test.group}, test.then(txs)); err == nil {
			t.Errorf("%s: %+v", name, g)
		}
		wantListed(t, s, nil, nil)
		if rep, err := s.GC(t.Context()); err != nil || rep.Parts+rep.NVRAMExtents > 0 {
			t.Errorf("%s: this was left: %+v, %v", name, rep, err)
		}
	}
}

// allOrNone looks at a store as the next process finds it: it has the checkpoints of
// before, and all of a group's or none; gc changes nothing of that, and leaves nothing
// else. It tells whether the group is there.
func allOrNone(t *testing.T, disk *crashfs.FS, before []string) bool {
	t.Helper()
	s, err := Open(t.Context(), disk, "/store", false)
	if err != nil {
		t.Fatal(err)
	}
	refs, groups := listed(t, s)
	all := append([]string{"a@1", "a@2", "b@1", "c@1"}, before[1:]...)
	there := len(groups) == 1
	switch {
	case there && slices.Equal(refs, all) && groups[0] == "shop@1 without []":
	case len(groups) == 0 && slices.Equal(refs, before):
	default:
		t.Fatalf("there are %v and %v", refs, groups)
	}
	for range 2 {
		rep, err := s.GC(t.Context())
		if err != nil || len(rep.Warnings) > 0 {
			t.Fatalf("%+v, %v", rep, err)
		}
		again, _ := listed(t, s)
		if !slices.Equal(again, refs) {
			t.Fatalf("there were %v, and after gc %v", refs, again)
		}
	}
	entries, err := disk.ReadDir("/store/tmp")
	if err != nil || len(entries) > 0 {
		t.Errorf("left in tmp: %v, %v", entries, err)
	}
	if rep, err := s.GC(t.Context()); err != nil || rep.NVRAMExtents > 0 {
		t.Errorf("%+v, %v", rep, err)
	}
	if there {
		// Its NVRAM is its own: removing it gives that back.
		rm, err := s.Remove(t.Context(), Ref{"a", 2})
		if err != nil || rm.NVRAMBytes == 0 || rm.Left != nil {
			t.Errorf("%+v, %v", rm, err)
		}
	}
	// Numbers that were visible are not used again.
	if g := mustCommitGroup(t, s, "c"); there && (g.Number < 2 || g.Members[0].Number < 2) {
		t.Errorf("%+v", g)
	}
	return there
}

// groupScene is a store with a checkpoint of the first member, so that one folder is there and
// others are to be made.
func groupScene(t *testing.T) (*Store, *crashfs.FS) {
	t.Helper()
	s, disk := newStore(t)
	mustCommit(t, s, "a")
	return s, disk
}

// TestKillGroup ends the process at every operation of a group's commit, its power too.
func TestKillGroup(t *testing.T) {
	before := []string{"a@1"}
	var all, none int
	for n := 0; ; n++ {
		s, disk := groupScene(t)
		txs, err := begin(s, groupVMs...)
		if err != nil {
			t.Fatal(err)
		}
		disk.KillAt(n)
		_, err = s.CommitGroup(t.Context(), Group{Name: "shop"}, txs)
		if disk.Killed() == (err == nil) {
			t.Fatalf("operation %d: killed: %v; %v", n, disk.Killed(), err)
		}
		for seed := range uint64(6) {
			if allOrNone(t, disk.CrashClone(seed), before) {
				all++
			} else if none++; err == nil {
				t.Errorf("what was committed is gone with the power")
			}
		}
		if there := allOrNone(t, disk.Fork(), before); err == nil && !there {
			t.Errorf("what was committed is gone")
		}
		if t.Failed() {
			t.Fatalf("at operation %d: %v", n, disk.Ops()[max(0, len(disk.Ops())-8):])
		}
		if err == nil {
			if n < 15 || all < 20 || none < 20 {
				t.Errorf("%d operations, %d times all, %d times none", n, all, none)
			}
			return
		}
	}
}

// TestKillGroupTwice ends the process that finishes a group for a killed one, at every
// operation.
func TestKillGroupTwice(t *testing.T) {
	// As one is killed between the record and the first name.
	half := func() *crashfs.FS {
		s, disk := groupScene(t)
		txs, err := begin(s, groupVMs...)
		if err != nil {
			t.Fatal(err)
		}
		// The first rename of a part fails for good, and what would undo it too.
		ops := len(disk.Ops())
		probe := func() int {
			s, disk := groupScene(t)
			txs, err := begin(s, groupVMs...)
			if err != nil {
				t.Fatal(err)
			}
			from := len(disk.Ops())
			if _, err := s.CommitGroup(t.Context(), Group{Name: "shop"}, txs); err != nil {
				t.Fatal(err)
			}
			for i, op := range disk.Ops()[from:] {
				if op.Kind == crashfs.Rename && op.Name == "/store/vms/a/00000002.flic" {
					return i
				}
			}
			t.Fatalf("no rename of a part: %v", disk.Ops()[from:])
			return 0
		}()
		disk.KillAt(probe)
		if _, err := s.CommitGroup(t.Context(), Group{Name: "shop"}, txs); err == nil {
			t.Fatalf("not killed: %v", disk.Ops()[ops:])
		}
		return disk
	}
	for n := 0; ; n++ {
		next := half().Fork()
		next.KillAt(n)
		_, _ = Open(t.Context(), next, "/store", false)
		for seed := range uint64(3) {
			if !allOrNone(t, next.CrashClone(seed), []string{"a@1"}) {
				t.Errorf("operation %d: a committed group is gone", n)
			}
		}
		if !allOrNone(t, next.Fork(), []string{"a@1"}) {
			t.Errorf("operation %d: a committed group is gone", n)
		}
		if t.Failed() || !next.Killed() {
			if n < 8 {
				t.Errorf("only %d operations", n)
			}
			return
		}
	}
}

// TestFailGroup lets every operation of a group's commit fail: none is there then, at once
// and for the next process, or the error says that this is not certain.
func TestFailGroup(t *testing.T) {
	for name, arm := range map[string]func(*crashfs.FS, int){
		"EIO":             func(d *crashfs.FS, n int) { d.FailAt(n, syscall.EIO) },
		"ENOSPC":          func(d *crashfs.FS, n int) { d.FailAt(n, syscall.ENOSPC) },
		"EIO for good":    func(d *crashfs.FS, n int) { d.FailFrom(n, syscall.EIO) },
		"ENOSPC for good": func(d *crashfs.FS, n int) { d.FailFrom(n, syscall.ENOSPC) },
	} {
		t.Run(name, func(t *testing.T) {
			uncertain := 0
			for n := 0; ; n++ {
				s, disk := groupScene(t)
				txs, err := begin(s, groupVMs...)
				if err != nil {
					t.Fatal(err)
				}
				from := len(disk.Ops())
				arm(disk, n)
				_, err = s.CommitGroup(t.Context(), Group{Name: "shop"}, txs)
				done := len(disk.Ops())-from <= n
				disk.Heal()
				// A full disk makes only those fail that need space.
				if err == nil && !done && name[:3] == "EIO" {
					t.Errorf("%v failed and the commit did not", disk.Ops()[from+n])
				}
				if IsUncertain(err) {
					uncertain++
				}
				for seed := range uint64(3) {
					there := allOrNone(t, disk.CrashClone(seed), []string{"a@1"})
					if err == nil && !there || err != nil && !IsUncertain(err) && there {
						t.Errorf("there: %v, after %v", there, err)
					}
				}
				there := allOrNone(t, disk.Fork(), []string{"a@1"})
				if err == nil && !there || err != nil && !IsUncertain(err) && there {
					t.Errorf("there: %v, after %v", there, err)
				}
				if t.Failed() {
					t.Fatalf("operation %d: %v: %v", n, err, disk.Ops()[from:])
				}
				if done {
					if n < 15 {
						t.Errorf("only %d operations", n)
					}
					return
				}
			}
		})
	}
}

// TestGroupRecordDamaged: a damaged record hides no other, costs no checkpoint and no part
// of a save that may be its own, and can be removed.
func TestGroupRecordDamaged(t *testing.T) {
	s, disk := newStore(t)
	mustCommitGroup(t, s, groupVMs...)
	mustCommitGroup(t, s, groupVMs...)
	put(t, disk, "/store/groups/shop@1.json", []byte("00000000 {}\n"))
	list, err := s.Groups(t.Context(), "shop")
	if err != nil || len(list) != 2 || !integrity.IsCorrupt(list[0].Err) || list[1].Err != nil {
		t.Fatalf("%+v, %v", list, err)
	}
	if _, err := s.FindGroup(t.Context(), Ref{"shop", 1}); !integrity.IsCorrupt(err) {
		t.Errorf("%v", err)
	}
	rep, err := s.GC(t.Context())
	if err != nil || len(rep.Warnings) != 1 {
		t.Errorf("%+v, %v", rep, err)
	}
	if err := s.ForgetGroup(t.Context(), Ref{"shop", 1}); err != nil {
		t.Fatal(err)
	}
	if _, err := disk.Stat("/store/groups/shop@1.json"); !errors.Is(err, fs.ErrNotExist) {
		t.Error(err)
	}
	// A commit that was cut off, and of which nobody can tell the parts.
	txs, err := begin(s, "d")
	if err != nil {
		t.Fatal(err)
	}
	part := txs[0].name
	put(t, disk, "/store/groups/shop@3.commit", []byte("x"))
	disk.Kill()
	disk = disk.Fork()
	next, err := Open(t.Context(), disk, "/store", false)
	if err != nil {
		t.Fatal(err)
	}
	if rep, err = next.GC(t.Context()); err != nil || len(rep.Warnings) != 1 || rep.Parts > 0 {
		t.Errorf("%+v, %v", rep, err)
	}
	if _, err := disk.Stat("/store/" + part); err != nil {
		t.Error(err)
	}
	// Others go on.
	if g := mustCommitGroup(t, next, "a"); g.Number != 4 {
		t.Errorf("%+v", g)
	}
	// It is listed, and once it is removed what may have been its part is swept.
	if list, err := next.Groups(t.Context(), "shop"); err != nil || !slices.ContainsFunc(list, func(l ListedGroup) bool { return l.Number == 3 && integrity.IsCorrupt(l.Err) }) {
		t.Errorf("%+v, %v", list, err)
	}
	if err := next.ForgetGroup(t.Context(), Ref{"shop", 3}); err != nil {
		t.Error(err)
	}
	if rep, err := next.GC(t.Context()); err != nil || len(rep.Warnings) > 0 || rep.Parts != 1 {
		t.Errorf("%+v, %v", rep, err)
	}
}
