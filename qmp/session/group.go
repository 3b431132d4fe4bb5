package session

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"runtime"
	"slices"
	"sync"
	"time"

	"github.com/flic-migrate/flic-migrate/qmp"
	"github.com/flic-migrate/flic-migrate/qmp/migration"
	"github.com/flic-migrate/flic-migrate/tier/rescue"
	"github.com/flic-migrate/flic-migrate/tier/save"
	"github.com/flic-migrate/flic-migrate/tier/store"
	"github.com/flic-migrate/flic-migrate/tier/vfs"
)

// A group checkpoint is a checkpoint of each of several VMs, in goroutines of one process
// that meet four times:
//
//	member 1  connect, watch, open disks ─┬─ stop ─┬─ save ─┐            ┌─ confirmed ─┐
//	member 2  connect, watch, open disks ─┼─ stop ─┼─ save ─┼─ commit ───┼─ confirmed ─┼─ cont
//	member 3  connect, watch, open disks ─┴─ stop ─┴─ save ─┘ (one for   └─ confirmed ─┘
//	                                    Ready    Stopped       all)                  Agree
//
// In ModeLive most of the first pass is saved before Ready. Whoever fails before the commit
// ends the context of all, and each member's own way out lets its guest run on. After
// the commit the group stands, whatever becomes of a QEMU, unless one says that what
// it has sent was not its guest: then all of it is removed.

// Member is a VM of a group.
type Member struct {
	VM     string
	Target Target
}

// GroupOptions say how to make a group checkpoint.
type GroupOptions struct {
	Name    string
	Mode    migration.Mode // stop or live
	Members []Member
	// Options are those of one member's checkpoint, which is made in the group's mode. They
	// must not have Arm.
	Options func(Member) CheckpointOptions
	// NVRAMKeep is CheckpointOptions.NVRAMKeep, once for all.
	NVRAMKeep int
	Log       *slog.Logger // of warnings
}

// GroupReport is what was done. It is the command's JSON document.
type GroupReport struct {
	Group string         `json:"group,omitempty"` // NAME@N; missing if it was not made
	Mode  migration.Mode `json:"mode"`
	// Saved tells, beside an error, that the group is there.
	Saved bool `json:"-"`
	// Skew is how much later the last of the guests stood still than the first, and
	// SkewBy says by what: the times of QEMU's STOP events, or where there are none, as
	// with libvirt, those at which guests were told to stop.
	Skew   time.Duration `json:"skew_ns"`
	SkewBy string        `json:"skew_by,omitempty"` // events or commands; missing if fewer than two ran
	// Downtime is the longest of the members'.
	Downtime time.Duration `json:"downtime_ns"`
	Total    time.Duration `json:"total_ns"`
	Sum      GroupSum      `json:"sum"`
	Members  []GroupRow    `json:"members"`
	// Demoted is what went from NVRAM to flash afterwards; missing if nothing did.
	Demoted *store.Demoted `json:"demoted,omitempty"`
}

// GroupSum is what the members' checkpoints come to, in pages and bytes.
type GroupSum struct {
	Pages      int64 `json:"pages"`
	Peers      int64 `json:"peers"` // pages whose bytes another member's checkpoint has
	BytesIn    int64 `json:"bytes_in"`
	FlashBytes int64 `json:"flash_bytes"`
	NVRAMBytes int64 `json:"nvram_bytes"`
}

// GroupRow is a member's report.
type GroupRow struct {
	VM    string `json:"vm"`
	Error string `json:"error,omitempty"`
	CheckpointReport
}

// MemberError is what has ended the checkpoints of a group's other members.
type MemberError struct {
	VM  string
	Err error
}

func (e *MemberError) Error() string { return fmt.Sprintf("%s: %v", e.VM, e.Err) }

func (e *MemberError) Unwrap() error { return e.Err }

// GivenUp begins the error of a member that was given up because of another one's, which
// follows.
const GivenUp = "given up with its group"

// agreeTime is how long a member waits to hear that the QEMUs of the others confirm what
// was saved. Each has migration's own limit for that, which is shorter.
const agreeTime = time.Minute

// CheckpointGroup saves the guests of all members at one moment. If the report says Saved
// the group is there, even if there is an error as well.
func CheckpointGroup(ctx context.Context, fs vfs.FS, st *store.Store, o GroupOptions) (rep GroupReport, err error) {
	if err := o.check(); err != nil {
		return rep, err
	}
	start := time.Now()
	n := len(o.Members)
	rep.Mode, rep.Members = o.Mode, make([]GroupRow, n)
	outer := ctx
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	g := &group{
		ctx: ctx, cancel: cancel, st: st, txs: make([]*store.Tx, n),
		record: store.Group{Name: o.Name, Mode: string(o.Mode)},
		ready:  newMeeting(n), stopped: newMeeting(n), agreed: newMeeting(n), committed: make(chan struct{}),
	}
	options := make([]CheckpointOptions, n)
	for i, m := range o.Members {
		rep.Members[i].VM = m.VM
		co := o.Options(m)
		co.member, co.Save.VM, co.Guest.Mode = &member{g, i, m.VM}, m.VM, o.Mode
		co.NVRAMKeep, co.Arm = 0, nil
		if co.Save.Workers == 0 {
			co.Save.Workers = (runtime.GOMAXPROCS(0) + n - 1) / n
		}
		options[i] = co
	}
	if g.peers, err = makePeers(ctx, st, options); err != nil {
		return rep, fmt.Errorf("no group was made: %w", err)
	}
	errs := make([]error, n)
	var members sync.WaitGroup
	for i, m := range o.Members {
		members.Go(func() {
			errs[i] = rescue.Call(func() (err error) {
				rep.Members[i].CheckpointReport, err = Checkpoint(ctx, fs, st, m.Target, options[i])
				return err
			})
			if errs[i] != nil {
				g.fail(m.VM, errs[i])
			}
		})
	}
	members.Wait()
	rep.Total = time.Since(start)
	rep.Saved = g.stands()
	rep.sum(o.Members)
	if rep.Saved {
		rep.Group = g.record.Ref().String()
		rep.Demoted = (&CheckpointOptions{NVRAMKeep: o.NVRAMKeep, Log: o.Log}).demote(ctx, st)
		for _, m := range g.record.Members {
			indexShared(ctx, st, m.Ref().String(), o.Log)
		}
	}
	for i, err := range errs {
		switch {
		case err == nil:
		case g.givenUp() && errors.Is(err, save.ErrPeer) && len(rep.Members[i].Snapshots) == 0:
			rep.Members[i].Error = fmt.Sprintf("%s: %v", GivenUp, g.failed)
		default:
			rep.Members[i].Error = err.Error()
		}
	}
	switch err = g.cause(o.Members, errs); {
	case err == nil:
		return rep, nil
	case rep.Saved:
		return rep, fmt.Errorf("group %s is saved, but: %w", rep.Group, err)
	case outer.Err() != nil:
		err = context.Cause(outer) // whatever the members make of it
	}
	return rep, fmt.Errorf("no group was made: %w", err)
}

// makePeers has members of one trust domain store a page that several of them have once.
// Those that are to share with no other VM are nobody's peers.
func makePeers(ctx context.Context, st *store.Store, options []CheckpointOptions) (all []*save.Peers, err error) {
	of := make(map[string][]*save.Options)
	for i := range options {
		so := &options[i].Save
		if so.Share != "" && so.Share != save.ShareStore {
			continue
		}
		domain := so.TrustDomain
		if domain == "" {
			if domain, err = st.DomainOf(ctx, so.VM); err != nil {
				return nil, err
			}
		}
		if domain != "" {
			of[domain] = append(of[domain], so)
		}
	}
	for domain, list := range of {
		hash, err := st.Trust(ctx, domain)
		if err != nil {
			return nil, err
		}
		peers := save.NewPeers(len(list), hash)
		for i, so := range list {
			so.Peer = peers.Member(i)
		}
		all = append(all, peers)
	}
	return all, nil
}

// check finds out whether there can be such a group.
func (o *GroupOptions) check() error {
	if err := store.CheckGroup(o.Name); err != nil {
		return err
	}
	if o.Mode != migration.ModeStop && o.Mode != migration.ModeLive {
		return fmt.Errorf("a group is saved with its guests stopped, or live, not in mode %s", o.Mode)
	}
	if len(o.Members) == 0 || len(o.Members) > store.MaxMembers {
		return fmt.Errorf("a group has 1 to %d members, not %d", store.MaxMembers, len(o.Members))
	}
	vms, targets := make(map[string]bool), make(map[Target]string)
	for _, m := range o.Members {
		if err := store.CheckVM(m.VM); err != nil {
			return err
		}
		if vms[m.VM] {
			return fmt.Errorf("%s is in the group twice", m.VM)
		}
		if other, is := targets[m.Target]; is {
			return fmt.Errorf("%s and %s are the same QEMU: %v", other, m.VM, m.Target)
		}
		vms[m.VM], targets[m.Target] = true, m.VM
		if !m.Target.Given() {
			return fmt.Errorf("%s: no QEMU is given", m.VM)
		}
		if err := m.Target.Check(); err != nil {
			return fmt.Errorf("%s: %w", m.VM, err)
		}
	}
	return nil
}

// sum adds the members up.
func (rep *GroupReport) sum(members []Member) {
	var stopped []time.Time
	by := "events"
	for i, r := range rep.Members {
		rep.Downtime = max(rep.Downtime, r.Downtime)
		if !r.Stopped.IsZero() {
			stopped = append(stopped, r.Stopped)
			if members[i].Target.Domain != "" {
				by = "commands"
			}
		}
		if rep.Saved && r.Save != nil {
			rep.Sum.Pages += r.Save.Pages
			rep.Sum.Peers += r.Save.Peers
			rep.Sum.BytesIn += r.Save.BytesIn
			rep.Sum.FlashBytes += r.Save.FlashBytes
			rep.Sum.NVRAMBytes += r.Save.NVRAMBytes
		}
	}
	if len(stopped) > 1 {
		rep.SkewBy = by
		rep.Skew = slices.MaxFunc(stopped, time.Time.Compare).Sub(slices.MinFunc(stopped, time.Time.Compare))
	}
}

// group is a group checkpoint under way.
type group struct {
	ctx                    context.Context // of all members
	cancel                 context.CancelCauseFunc
	st                     *store.Store
	ready, stopped, agreed *meeting
	committed              chan struct{} // closed when record and err are known
	peers                  []*save.Peers // one a trust domain

	mu          sync.Mutex
	txs         []*store.Tx // by member; nil: it is not that far
	committing  bool        // nothing that fails now keeps the others from being saved
	failed      error       // why nothing is committed
	record      store.Group
	err         error // of the commit
	unconfirmed error // why what was committed is removed
	undo        sync.Once
	undone      error // of that
	removed     bool
}

// stands tells whether the group is there, when all members have ended.
func (g *group) stands() bool {
	g.mu.Lock()
	defer g.mu.Unlock()
	return g.committing && g.err == nil && !g.removed
}

// fail ends the other members, if there is no commit yet. What counts is the first failure
// that is not another member's: the saves hear of each other's before their members do.
func (g *group) fail(vm string, err error) {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.committing || g.failed != nil && (!errors.Is(g.failed, save.ErrPeer) || errors.Is(err, save.ErrPeer)) {
		return
	}
	g.failed = &MemberError{vm, err}
	for _, p := range g.peers {
		p.Fail(g.failed) // also of a member that has never begun to save
	}
	g.cancel(fmt.Errorf("%s: %w", GivenUp, g.failed))
}

// cause is what went wrong, if anything: what has ended the group, and of other members
// what is not that.
func (g *group) cause(members []Member, errs []error) error {
	g.mu.Lock()
	defer g.mu.Unlock()
	first := g.failed
	if first == nil {
		first = g.err
	}
	if first == nil {
		first = g.unconfirmed
	}
	all := []error{first}
	for i, err := range errs {
		if err != nil && !errors.Is(err, save.ErrPeer) && (first == nil || !errors.Is(err, first) && !errors.Is(first, err)) {
			all = append(all, &MemberError{members[i].VM, err})
		}
	}
	return errors.Join(all...)
}

// member is one VM's place in a group.
type member struct {
	g  *group
	i  int
	vm string
}

// commit is save.Options.Commit: the last that comes commits all.
func (m *member) commit(ctx context.Context, tx *store.Tx) (store.Ref, error) {
	g := m.g
	g.mu.Lock()
	if g.failed != nil {
		defer g.mu.Unlock()
		return store.Ref{}, g.failed
	}
	g.txs[m.i] = tx
	g.committing = !slices.Contains(g.txs, nil)
	last := g.committing
	g.mu.Unlock()
	if last {
		// One member's context is no reason to leave the others without an answer.
		record, err := g.record, error(nil)
		err = rescue.Call(func() (err error) {
			record, err = g.st.CommitGroup(g.ctx, record, g.txs)
			return err
		})
		g.mu.Lock()
		g.record, g.err = record, err
		g.mu.Unlock()
		close(g.committed)
	}
	select {
	case <-g.committed:
	case <-ctx.Done():
		// It counts only if it comes before the commit.
		if g.fail(m.vm, context.Cause(ctx)); g.givenUp() {
			return store.Ref{}, context.Cause(ctx)
		}
		<-g.committed
	}
	return tx.Ref(), g.err
}

// givenUp tells whether the group was.
func (g *group) givenUp() bool {
	g.mu.Lock()
	defer g.mu.Unlock()
	return g.failed != nil
}

// together is migration.CheckpointOptions.Together; save is the consumer of the stream.
func (m *member) together(save func(ctx context.Context, f *os.File, before qmp.RunState, hold *save.Hold) error) *migration.Together {
	return &migration.Together{
		Ready: m.g.ready.meet, Stopped: m.g.stopped.meet,
		Agree: m.agree,
		Precopy: func(ctx context.Context, f *os.File, before qmp.RunState, h migration.Held) error {
			return save(ctx, f, before, holdUntil(h, before))
		},
	}
}

// holdUntil holds a save until the guest stands still.
func holdUntil(h migration.Held, before qmp.RunState) *save.Hold {
	return &save.Hold{
		Buffer: h.Buffer, Wide: h.Wide, Widen: h.Widen, Absent: h.Absent,
		Wait: func(ctx context.Context) (string, error) {
			if err := h.Stop(ctx); err != nil {
				return "", err
			}
			return before.Status, nil
		},
	}
}

// agree is migration.Together.Agree.
func (m *member) agree(ctx context.Context, err error) error {
	g := m.g
	g.mu.Lock()
	if errors.Is(err, migration.ErrUnconfirmed) && g.unconfirmed == nil {
		g.unconfirmed = &MemberError{m.vm, err}
	}
	g.mu.Unlock()
	// The guest stands still: nobody waits for ever for one that has come to grief.
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), agreeTime)
	defer cancel()
	_ = g.agreed.meet(ctx)
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.unconfirmed == nil || errors.Is(err, migration.ErrUnconfirmed) {
		return err
	}
	return errors.Join(g.unconfirmed, err)
}

// takeBack is migration.CheckpointOptions.Undo: it removes the whole group, once.
func (m *member) takeBack(ctx context.Context) error {
	g := m.g
	g.undo.Do(func() {
		remover := g.st.Remover()
		var err error
		for _, part := range g.record.Members {
			_, rerr := remover.Remove(ctx, part.Ref())
			if errors.Is(rerr, store.ErrNotFound) {
				rerr = nil
			}
			err = errors.Join(err, rerr)
		}
		err = errors.Join(err, g.st.ForgetGroup(ctx, g.record.Ref()))
		g.mu.Lock()
		g.undone, g.removed = err, err == nil
		g.mu.Unlock()
	})
	return g.undone
}

// meeting is where all members of a group wait for the last.
type meeting struct {
	mu   sync.Mutex
	left int
	all  chan struct{}
}

func newMeeting(n int) *meeting { return &meeting{left: n, all: make(chan struct{})} }

// come says that one more has come, who can then wait.
func (m *meeting) come() {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.left--; m.left == 0 {
		close(m.all)
	}
}

// meet comes and waits.
func (m *meeting) meet(ctx context.Context) error {
	m.come()
	return m.wait(ctx)
}

// wait returns when all have come, or when ctx ends.
func (m *meeting) wait(ctx context.Context) error {
	select {
	case <-m.all:
		return nil
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}
