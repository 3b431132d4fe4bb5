package session

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/flic-migrate/flic-migrate/qmp/migration"
	"github.com/flic-migrate/flic-migrate/qmp/qmptest"
	"github.com/flic-migrate/flic-migrate/stream"
	"github.com/flic-migrate/flic-migrate/tier/save"
	"github.com/flic-migrate/flic-migrate/tier/store"
	"github.com/flic-migrate/flic-migrate/tier/tiertest"
	"github.com/flic-migrate/flic-migrate/tier/vfs"
)

// cluster is some machines and a store.
type cluster struct {
	machines []*machine
	members  []Member
	st       *store.Store
}

func newCluster(t *testing.T, n int) *cluster {
	t.Helper()
	c := &cluster{}
	for i := range n {
		s := tiertest.New(tiertest.Options{Seed: uint64(i), Blocks: []tiertest.Block{{Name: "pc.ram", Size: 1 << 20}}, ReturnPath: true})
		q := &machine{stream: s.Bytes(), running: true, status: "none"}
		l, err := net.Listen("unix", fmt.Sprintf("%s/qmp%d", t.TempDir(), i))
		ok(t, err)
		c.machines = append(c.machines, q)
		c.members = append(c.members, Member{VM: fmt.Sprint("vm", i), Target: Target{QMP: qmptest.Serve(t, l, q.serve(t)).Addr}})
	}
	var err error
	c.st, err = store.Open(t.Context(), vfs.OS, t.TempDir()+"/store", true)
	ok(t, err)
	return c
}

func (c *cluster) checkpoint(ctx context.Context, o GroupOptions) (GroupReport, error) {
	o.Name, o.Log = "shop", slog.New(slog.DiscardHandler)
	if o.Mode == "" {
		o.Mode = migration.ModeStop
	}
	if o.Members == nil {
		o.Members = c.members
	}
	if o.Options == nil {
		o.Options = func(Member) CheckpointOptions { return CheckpointOptions{Log: o.Log} }
	}
	rep, err := CheckpointGroup(ctx, vfs.OS, c.st, o)
	for _, q := range c.machines {
		q.writing.Wait()
	}
	return rep, err
}

// goOn checks that all guests run, and that each was stopped only when all could be.
func (c *cluster) goOn(t *testing.T) {
	t.Helper()
	for i, q := range c.machines {
		q.mu.Lock()
		if !q.running {
			t.Errorf("guest %d does not run, after %v", i, q.sent)
		}
		q.mu.Unlock()
	}
}

// nothing checks that no checkpoint and no group is left, nor anything of one.
func (c *cluster) nothing(t *testing.T) {
	t.Helper()
	refs, err := c.st.List(t.Context(), "")
	ok(t, err)
	groups, err := c.st.Groups(t.Context(), "")
	ok(t, err)
	if len(refs)+len(groups) > 0 {
		t.Errorf("there are %v, %v", refs, groups)
	}
	if rep, err := c.st.GC(t.Context()); err != nil || rep.Parts > 0 {
		t.Errorf("gc: %+v, %v", rep, err)
	}
}

// TestGroup saves three guests as one.
func TestGroup(t *testing.T) {
	c := newCluster(t, 3)
	rep, err := c.checkpoint(t.Context(), GroupOptions{})
	if err != nil || !rep.Saved || rep.Group != "shop@1" || rep.Mode != migration.ModeStop {
		t.Fatalf("%+v, %v", rep, err)
	}
	c.goOn(t)
	g, err := c.st.FindGroup(t.Context(), store.Ref{VM: "shop"})
	ok(t, err)
	if len(g.Members) != 3 || len(g.Missing) > 0 || g.Mode != "stop" {
		t.Errorf("%+v", g)
	}
	var pages, bytes int64
	for i, r := range rep.Members {
		if r.VM != c.members[i].VM || r.Checkpoint != g.Members[i].Ref().String() || r.Error != "" || r.Save == nil || r.State != "running" {
			t.Errorf("%+v", r)
		}
		pages, bytes = pages+r.Save.Pages, bytes+r.Save.FlashBytes
	}
	if rep.Sum.Pages != pages || rep.Sum.FlashBytes != bytes || rep.SkewBy != "events" || rep.Skew > 5*time.Second {
		t.Errorf("%+v", rep)
	}
	// Once more, of some.
	rep, err = c.checkpoint(t.Context(), GroupOptions{Members: c.members[1:]})
	if err != nil || rep.Group != "shop@2" || rep.Members[0].Checkpoint != "vm1@2" {
		t.Errorf("%+v, %v", rep, err)
	}
}

// TestGroupMemberFails: whichever member fails, wherever, there is no group, all others run
// on, and the reason is said with its name.
func TestGroupMemberFails(t *testing.T) {
	full := fmt.Errorf("full: %w", syscall.ENOSPC)
	for name, test := range map[string]struct {
		arrange func(*cluster)
		options func(Member) CheckpointOptions
		ctx     func(context.Context) context.Context
		is      error
		says    string
	}{
		"no such QEMU":                 {arrange: func(c *cluster) { c.members[1].Target.QMP += "x" }, is: os.ErrNotExist, says: "vm1: "},
		"what it sends is no guest":    {arrange: func(c *cluster) { c.machines[1].stream = make([]byte, 1<<16) }, is: stream.ErrNotStream, says: "vm1: "},
		"QEMU says that it has failed": {arrange: func(c *cluster) { c.machines[1].fails = true }, is: migration.ErrUnconfirmed, says: "vm1: "},
		"before its guest is stopped": {options: func(m Member) CheckpointOptions {
			o := CheckpointOptions{}
			if m.VM == "vm1" {
				o.PutRight = func(Target) (*Guard, error) { return nil, full }
			}
			return o
		}, is: full, says: "vm1: "},
		"when its guest stands still": {options: func(m Member) CheckpointOptions {
			o := CheckpointOptions{}
			if m.VM == "vm1" {
				o.Save = save.Options{Parent: "vm1@7"}
			}
			return o
		}, is: store.ErrNotFound, says: "vm1: "},
		"a panic": {options: func(m Member) CheckpointOptions {
			o := CheckpointOptions{}
			if m.VM == "vm1" {
				o.PutRight = func(Target) (*Guard, error) { panic("unforeseen") }
			}
			return o
		}, says: "vm1: internal error: unforeseen"},
		"interrupted": {ctx: func(ctx context.Context) context.Context {
			ctx, cancel := context.WithCancelCause(ctx)
			cancel(full)
			return ctx
		}, is: full},
	} {
		t.Run(name, func(t *testing.T) {
			c := newCluster(t, 3)
			if test.arrange != nil {
				test.arrange(c)
			}
			ctx := t.Context()
			if test.ctx != nil {
				ctx = test.ctx(ctx)
			}
			o := GroupOptions{}
			if test.options != nil {
				o.Options = func(m Member) CheckpointOptions {
					co := test.options(m)
					co.Log = slog.New(slog.DiscardHandler)
					return co
				}
			}
			rep, err := c.checkpoint(ctx, o)
			if err == nil || rep.Saved || rep.Group != "" || rep.Sum != (GroupSum{}) {
				t.Fatalf("%+v, %v", rep, err)
			}
			if test.is != nil && !errors.Is(err, test.is) || !strings.Contains(err.Error(), test.says) {
				t.Errorf("%v", err)
			}
			for _, r := range rep.Members {
				if r.Error == "" {
					t.Errorf("%+v", r)
				}
			}
			c.goOn(t)
			c.nothing(t)
			// The next one is made.
			for i, q := range c.machines {
				q.mu.Lock()
				q.fails, q.status = false, "none"
				q.stream = tiertest.New(tiertest.Options{Seed: uint64(i), Blocks: []tiertest.Block{{Name: "pc.ram", Size: 1 << 20}}, ReturnPath: true}).Bytes()
				q.mu.Unlock()
			}
			c.members[1].Target.QMP = strings.TrimSuffix(c.members[1].Target.QMP, "x")
			if rep, err := c.checkpoint(t.Context(), GroupOptions{}); err != nil || !rep.Saved {
				t.Errorf("%+v, %v", rep, err)
			}
		})
	}
}

// TestGroupStopsTogether: nobody is stopped before all are ready.
func TestGroupStopsTogether(t *testing.T) {
	c := newCluster(t, 3)
	let := make(chan struct{})
	done := make(chan error)
	go func() {
		_, err := c.checkpoint(t.Context(), GroupOptions{Options: func(m Member) CheckpointOptions {
			o := CheckpointOptions{Log: slog.New(slog.DiscardHandler)}
			if m.VM == "vm2" {
				o.PutRight = func(Target) (*Guard, error) {
					<-let
					return &Guard{Release: func() {}}, nil
				}
			}
			return o
		}})
		done <- err
	}()
	// The others are ready once they have set what a migration needs.
	for _, q := range c.machines[:2] {
		for ready := false; !ready; time.Sleep(time.Millisecond) {
			q.mu.Lock()
			ready = slices.Contains(q.sent, "migrate-set-capabilities")
			q.mu.Unlock()
		}
	}
	time.Sleep(50 * time.Millisecond)
	for i, q := range c.machines {
		q.mu.Lock()
		if slices.Contains(q.sent, "stop") {
			t.Errorf("guest %d was stopped before the last was ready", i)
		}
		q.mu.Unlock()
	}
	close(let)
	ok(t, <-done)
	c.goOn(t)
}

// TestGroupRefused: what can't be a group is refused before anything is asked of a QEMU.
func TestGroupRefused(t *testing.T) {
	c := newCluster(t, 2)
	for name, o := range map[string]GroupOptions{
		"a VM twice":   {Members: []Member{c.members[0], {c.members[0].VM, c.members[1].Target}}},
		"a QEMU twice": {Members: []Member{c.members[0], {"other", c.members[0].Target}}},
		"no QEMU":      {Members: []Member{{VM: "vm0"}}},
		"two QEMUs":    {Members: []Member{{"vm0", Target{QMP: "a", Domain: "b"}}}},
		"nobody":       {Members: []Member{}},
		"no name":      {Members: []Member{{"", c.members[0].Target}}},
		"background":   {Mode: migration.ModeBackground},
	} {
		if rep, err := c.checkpoint(t.Context(), o); err == nil {
			t.Errorf("%s: %+v", name, rep)
		}
	}
	for _, q := range c.machines {
		if len(q.sent) > 0 {
			t.Errorf("asked: %v", q.sent)
		}
	}
	c.nothing(t)
}

// TestGroupBlame: the saves of a group hear that one has failed before its member does. That
// one is blamed all the same, and alone.
func TestGroupBlame(t *testing.T) {
	cut := fmt.Errorf("its stream: %w", stream.ErrTruncated)
	heard := fmt.Errorf("migration failed: %w: %w", save.ErrPeer, cut)
	members := []Member{{VM: "a"}, {VM: "b"}, {VM: "c"}}
	for name, order := range map[string][]int{"heard first": {0, 1, 2}, "failed first": {1, 0, 2}} {
		g := &group{cancel: func(error) {}}
		errs := []error{heard, cut, nil}
		for _, i := range order {
			if i == 2 {
				errs[i] = fmt.Errorf("%s: %w", GivenUp, g.failed)
			}
			g.fail(members[i].VM, errs[i])
		}
		if err := g.cause(members, errs); err == nil || !strings.HasPrefix(err.Error(), "b: its stream: ") || strings.Contains(err.Error(), "a: ") || strings.Contains(err.Error(), "\nc: ") {
			t.Errorf("%s: %v", name, err)
		}
	}
}
