package store

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"slices"
	"strings"
	"syscall"
	"time"

	"github.com/google/uuid"

	"github.com/flic-migrate/flic-migrate/tier/checkpoint"
	"github.com/flic-migrate/flic-migrate/tier/integrity"
)

// A group is checkpoints of several VMs at one moment, made as one: all of them are
// there, or none. Its record names them.
//
//	DIR/groups/NAME@N.commit   a group whose parts are on their way from tmp to vms
//	DIR/groups/NAME@N.json     one whose parts have arrived
//
// That a .commit is durable is the commit of all of them:
//
//	parts whole and synced ─► tmp synced ─► .commit durable ─► each part gets its name ─► .json
//	            nothing of it is there      │      all of it is there
//
// Whoever opens the store next, or takes its lock to begin a save or to sweep, finds a
// .commit that a killed process has left and gives the parts that are still in tmp their
// names. All that happens under the store lock.
//
// Afterwards each member is a checkpoint like any other: it can be resumed and removed
// alone. A record without members that are there is of a group that is gone. The highest
// number of a name keeps its record, so that it is not used twice.
type Group struct {
	Name    string        `json:"name"` // by the rules for VMs' names
	Number  int           `json:"number"`
	UUID    uuid.UUID     `json:"uuid"`
	Created time.Time     `json:"created"`
	Mode    string        `json:"mode"` // how the guests were saved: stop or live
	Members []GroupMember `json:"members"`
	// Removed: all members have been, and the record stands for its number only. A member that
	// comes back from another store does not bring the group back.
	Removed bool `json:"removed,omitempty"`
}

// GroupMember names a checkpoint of a group.
type GroupMember struct {
	VM     string    `json:"vm"`
	Number int       `json:"number"`
	UUID   uuid.UUID `json:"uuid"`
}

// Ref names the member in the store.
func (m GroupMember) Ref() Ref { return Ref{m.VM, m.Number} }

// Ref names the group, which is no VM.
func (g Group) Ref() Ref { return Ref{g.Name, g.Number} }

// MaxMembers is how many checkpoints a group can have. A record of so many fits into
// maxGroup, whatever the names are.
const MaxMembers = 1024

const (
	groupsFolder = "groups"
	groupSuffix  = ".json"
	commitSuffix = ".commit"
	maxGroup     = 1 << 20 // bytes
	groupWhat    = "record of a group"
)

func groupObject(r Ref, suffix string) string {
	return groupsFolder + "/" + r.String() + suffix
}

// groupNames are the names of groups' records, oldest first, by their suffix.
func (s *Store) groupNames(ctx context.Context) (done, committing []Ref, err error) {
	list, err := s.dir.List(ctx, groupsFolder)
	if gone(err) {
		return nil, nil, nil
	}
	for _, e := range list {
		if e.Folder || e.Odd {
			continue
		}
		for _, suffix := range []string{groupSuffix, commitSuffix} {
			stem, ok := strings.CutSuffix(e.Name, suffix)
			if !ok {
				continue
			}
			r, perr := ParseRef(stem)
			switch {
			case perr != nil || r.N == 0:
			case suffix == groupSuffix:
				done = append(done, r)
			default:
				committing = append(committing, r)
			}
		}
	}
	byNumber := func(a, b Ref) int {
		if c := strings.Compare(a.VM, b.VM); c != 0 {
			return c
		}
		return a.N - b.N
	}
	slices.SortFunc(done, byNumber)
	slices.SortFunc(committing, byNumber)
	return done, committing, err
}

// readGroup reads a record, which may be anybody's: it must name what it is, and
// checkpoints that can be.
func (s *Store) readGroup(ctx context.Context, r Ref, suffix string) (g Group, err error) {
	name := groupObject(r, suffix)
	if err := s.readSealed(ctx, name, groupWhat, maxGroup, &g); err != nil {
		return g, err
	}
	err = g.check()
	if err == nil && g.Ref() != r {
		err = fmt.Errorf("it says that it is %v", g.Ref())
	}
	if err != nil {
		err = &integrity.CorruptError{File: s.dir.Path(name), What: groupWhat, Err: err}
	}
	return g, err
}

// check tells whether a record can be one.
func (g Group) check() error {
	if len(g.Members) == 0 || len(g.Members) > MaxMembers {
		return fmt.Errorf("a group has 1 to %d members, not %d", MaxMembers, len(g.Members))
	}
	seen := make(map[string]bool)
	for _, m := range g.Members {
		if err := m.check(); err != nil {
			return err
		}
		if seen[m.VM] {
			return fmt.Errorf("%s is in it twice", m.VM)
		}
		seen[m.VM] = true
	}
	return CheckGroup(g.Name)
}

func (m GroupMember) check() error {
	if err := CheckVM(m.VM); err != nil {
		return err
	}
	if m.Number < 1 || m.Number > MaxNumber {
		return fmt.Errorf("%s: number %d: %w", m.VM, m.Number, ErrName)
	}
	return nil
}

// CheckGroup tells whether name can be a group's: by the rules for a VM's name.
func CheckGroup(name string) error { return checkName("group name", name) }

// CommitGroup commits transactions of several VMs as one group: of g, Name and Mode are
// the caller's to set. Their images must be whole and synced. When it returns nil all of
// them are there, durably, and the group has its number; after an error none is, unless
// [IsUncertain] says so: then the next who opens the store finds all or none. The
// transactions have ended in either case.
func (s *Store) CommitGroup(ctx context.Context, g Group, txs []*Tx) (_ Group, err error) {
	defer func() {
		for _, t := range txs {
			t.Abort() // does nothing after a commit
		}
	}()
	g.UUID, g.Created = uuid.New(), time.Now()
	for _, t := range txs {
		if t.s != s || t.ended || t.loose != nil {
			return g, errors.New("what is to be committed as a group is no open transaction of the store's")
		}
		g.Members = append(g.Members, GroupMember{t.ref.VM, t.ref.N, t.uuid})
	}
	if err := g.check(); err != nil {
		return g, err
	}
	unlock, err := s.lock(ctx)
	if err != nil {
		return g, err
	}
	defer unlock()
	if g.Number, err = s.nextGroup(ctx, g.Name); err != nil {
		return g, err
	}
	for _, t := range txs {
		err := t.stillNamed(ctx)
		if err == nil && !t.known {
			err = s.dir.Mkdir(ctx, vmFolder(t.ref.VM))
		}
		if err == nil {
			err = s.clearBeside(ctx, t.ref)
		}
		if err != nil {
			return g, err
		}
	}
	if err := s.dir.Mkdir(ctx, groupsFolder); err != nil {
		return g, err
	}
	// A power cut must not leave a record of parts that have no name.
	if err := s.dir.Sync(ctx, tmpFolder); err != nil {
		return g, err
	}
	// From here on they may become visible in spite of an error.
	setStays(txs, true)
	err = s.writeSealed(ctx, groupObject(g.Ref(), commitSuffix), g)
	if err == nil {
		err = s.placeGroup(ctx, g)
	}
	if err != nil {
		if s.takeBack(ctx, g) != nil {
			return g, &uncertainError{err}
		}
		setStays(txs, false)
		return g, err
	}
	for _, t := range txs {
		t.ended = true
		t.close() // all is synced: nothing can be lost any more
	}
	return g, nil
}

func setStays(txs []*Tx, stays bool) {
	for _, t := range txs {
		t.stays = stays
	}
}

// nextGroup is the number of the next group of a name. The caller holds the store lock.
func (s *Store) nextGroup(ctx context.Context, name string) (int, error) {
	if err := s.placeGroups(ctx); err != nil && !integrity.IsCorrupt(err) {
		return 0, err
	}
	done, committing, err := s.groupNames(ctx)
	last := 0
	for _, r := range append(done, committing...) {
		if r.VM == name {
			last = max(last, r.N)
		}
	}
	if last == MaxNumber {
		return 0, fmt.Errorf("group %q has used up its numbers", name)
	}
	return last + 1, err
}

// placeGroup gives the parts of a committed group their names, those that have none yet,
// durably, and its record the name that it keeps. It can be done again. The caller holds
// the store lock.
func (s *Store) placeGroup(ctx context.Context, g Group) error {
	for _, m := range g.Members {
		r := m.Ref()
		part := partName(r, m.UUID)
		f, err := s.dir.Open(ctx, part, Unlocked)
		switch {
		case err == nil:
			f.Close()
			if err = s.dir.Mkdir(ctx, vmFolder(r.VM)); err == nil {
				err = s.dir.Commit(ctx, part, r.object(imageSuffix))
			}
		case gone(err):
			// It has its name, but that may not be durable; or it was removed since.
			if err = s.dir.Sync(ctx, vmFolder(r.VM)); gone(err) {
				err = nil
			}
		}
		if err != nil {
			return err
		}
	}
	return s.dir.Commit(ctx, groupObject(g.Ref(), commitSuffix), groupObject(g.Ref(), groupSuffix))
}

// takeBack undoes a commit that has failed: parts that have their names go back, and only
// then the record goes, so that a crash in between leaves all of it. An error says that
// this was not done, or is not durable.
func (s *Store) takeBack(ctx context.Context, g Group) error {
	// Whatever has ended the commit is no reason to leave it halfway.
	ctx = context.WithoutCancel(ctx)
	for _, m := range g.Members {
		r := m.Ref()
		if id, err := s.owner(ctx, r.object(imageSuffix)); gone(err) || err == nil && id != m.UUID {
			continue
		}
		if err := s.dir.Commit(ctx, r.object(imageSuffix), partName(r, m.UUID)); err != nil {
			return err
		}
		if err := s.dir.Sync(ctx, vmFolder(r.VM)); err != nil {
			return err
		}
	}
	for _, suffix := range []string{commitSuffix, groupSuffix} {
		if err := s.dir.Remove(ctx, groupObject(g.Ref(), suffix)); err != nil && !gone(err) {
			return err
		}
	}
	return s.dir.Sync(ctx, groupsFolder)
}

// placeGroups finishes the commits of groups that killed processes have left. A record
// that can't be read is an error at the end. The caller holds the store lock.
func (s *Store) placeGroups(ctx context.Context) error {
	_, committing, err := s.groupNames(ctx)
	if err != nil {
		return err
	}
	var damage error
	for _, r := range committing {
		g, err := s.readGroup(ctx, r, commitSuffix)
		if err == nil {
			err = s.placeGroup(ctx, g)
		}
		if integrity.IsCorrupt(err) {
			damage = errors.Join(damage, err)
		} else if err != nil {
			return fmt.Errorf("the commit of group %v, which was cut off, can't be finished: %w", r, err)
		}
	}
	return damage
}

// settleGroups is placeGroups for who opens the store: the lock is taken only if there is
// something to do. What can't be done now, as in a store that can only be read, is left to
// who needs it done.
func (s *Store) settleGroups(ctx context.Context) {
	if _, committing, err := s.groupNames(ctx); err != nil || len(committing) == 0 {
		return
	}
	unlock, err := s.lock(ctx)
	if err != nil {
		return
	}
	defer unlock()
	_ = s.placeGroups(ctx)
}

// ListedGroup is a group as a list shows it.
type ListedGroup struct {
	Group
	// Missing are members that have been removed; another checkpoint can have the number now.
	Missing []Ref
	// Err is what is wrong with the record, if it can't be read; only Name and Number are
	// then known.
	Err error
}

// Groups lists the groups of a name, or all if it is empty, oldest first, without those of
// which no member is left.
func (s *Store) Groups(ctx context.Context, name string) ([]ListedGroup, error) {
	if name != "" {
		if err := CheckGroup(name); err != nil {
			return nil, err
		}
	}
	done, committing, err := s.groupNames(ctx)
	if err != nil {
		return nil, err
	}
	here := present{look: s.lookup(), of: make(map[string]vmObjects)}
	list := []ListedGroup{}
	// One whose commit was cut off is finished when the store is opened, unless it is damaged.
	for _, r := range committing {
		if _, err := s.readGroup(ctx, r, commitSuffix); integrity.IsCorrupt(err) && (name == "" || r.VM == name) {
			list = append(list, ListedGroup{Group: Group{Name: r.VM, Number: r.N}, Err: err})
		}
	}
	for _, r := range done {
		if name != "" && r.VM != name {
			continue
		}
		l := ListedGroup{}
		l.Group, l.Err = s.readGroup(ctx, r, groupSuffix)
		switch {
		case gone(l.Err):
			continue
		case integrity.IsCorrupt(l.Err):
			l.Group = Group{Name: r.VM, Number: r.N}
		case l.Err != nil:
			return nil, l.Err
		default:
			if l.Missing, err = here.missing(ctx, l.Group); err != nil {
				return nil, err
			}
			if l.Removed || len(l.Missing) == len(l.Members) {
				continue
			}
		}
		list = append(list, l)
	}
	return list, nil
}

// present tells which members of groups are there, and looks into each folder once.
type present struct {
	look *lookup
	of   map[string]vmObjects // by VM
}

func (p *present) missing(ctx context.Context, g Group) (refs []Ref, err error) {
	for _, m := range g.Members {
		o, known := p.of[m.VM]
		if !known {
			if o, err = p.look.objects(ctx, m.VM); err != nil && !gone(err) {
				return nil, err
			}
			p.of[m.VM] = o
		}
		there := false
		if _, listed := slices.BinarySearch(o.images, m.Number); listed {
			id, err := p.look.whoIs(ctx, m.Ref().object(imageSuffix))
			if err != nil && !gone(err) && !cannotTell(err) && !errors.Is(err, errNotObject) {
				return nil, err
			}
			// One that can't say who it is is taken for the member, which is damaged.
			there = !gone(err) && (id == nil || m.is(id))
		}
		if !there {
			refs = append(refs, m.Ref())
		}
	}
	return refs, nil
}

// is tells whether an image in the member's place is the member's, whatever has become of it
// since, and none of another checkpoint that has come under its number.
func (m GroupMember) is(id *checkpoint.Identity) bool {
	return id.UUID == m.UUID || id.First() == m.UUID
}

// FindGroup returns a group, the newest of its name without a number, of which at least
// one member must be there.
func (s *Store) FindGroup(ctx context.Context, r Ref) (ListedGroup, error) {
	list, err := s.Groups(ctx, r.VM)
	if err != nil {
		return ListedGroup{}, err
	}
	for _, l := range slices.Backward(list) {
		if r.N == 0 || l.Number == r.N {
			return l, l.Err
		}
	}
	return ListedGroup{}, fmt.Errorf("group %v in store %s: %w", r, s.root, ErrNotFound)
}

// MembersOf describes a group's members as Listing does. One that has been removed, whoever
// has its number now, has ErrNotFound.
func (s *Store) MembersOf(ctx context.Context, g Group) ([]Listed, error) {
	list := make([]Listed, len(g.Members))
	p := s.presence()
	for i, m := range g.Members {
		if err := context.Cause(ctx); err != nil {
			return nil, err
		}
		o, err := p.look.objects(ctx, m.VM)
		if err == nil {
			p.add(m.VM, o)
			list[i], err = p.look.listed(ctx, m.Ref(), o)
		}
		if gone(err) || err == nil && list[i].Identity != nil && !m.is(list[i].Identity) {
			list[i], err = Listed{Ref: m.Ref(), Err: ErrNotFound}, nil
		}
		if err != nil {
			return nil, err
		}
	}
	return list, p.lacks(ctx, list)
}

// GroupOf names the groups that checkpoints are in.
func (s *Store) GroupOf(ctx context.Context) (map[Ref]Ref, error) {
	list, err := s.Groups(ctx, "")
	of := make(map[Ref]Ref)
	for _, l := range list {
		for _, m := range l.Members {
			if !slices.Contains(l.Missing, m.Ref()) {
				of[m.Ref()] = l.Ref()
			}
		}
	}
	return of, err
}

// ForgetGroup removes the record of a group of which no member is left, or whose record
// can't be read: its members, if any, are checkpoints of their own then. The highest
// number's stays as what remembers it, if it can be read.
func (s *Store) ForgetGroup(ctx context.Context, r Ref) error {
	unlock, err := s.lock(ctx)
	if err != nil {
		return err
	}
	defer unlock()
	return s.forgetGroup(ctx, r)
}

// forgetGroup is ForgetGroup for who holds the store lock.
func (s *Store) forgetGroup(ctx context.Context, r Ref) error {
	suffix := groupSuffix
	g, err := s.readGroup(ctx, r, suffix)
	if gone(err) {
		// A damaged one of a commit that was cut off names no parts, and keeps all from
		// being swept.
		suffix = commitSuffix
		if _, err = s.readGroup(ctx, r, suffix); !integrity.IsCorrupt(err) {
			return nil
		}
	}
	if err != nil && !integrity.IsCorrupt(err) {
		return err
	}
	if err == nil && !g.Removed {
		here := present{look: s.lookup(), of: make(map[string]vmObjects)}
		missing, err := here.missing(ctx, g)
		if err != nil || len(missing) < len(g.Members) {
			return err
		}
	}
	if err == nil {
		done, committing, err := s.groupNames(ctx)
		if err != nil {
			return err
		}
		highest := true
		for _, other := range append(done, committing...) {
			highest = highest && (other.VM != r.VM || other.N <= r.N)
		}
		if highest && g.Removed {
			return nil
		}
		if highest {
			g.Removed = true
			err := s.writeSealed(ctx, groupObject(r, suffix), g)
			if errors.Is(err, syscall.ENOSPC) || errors.Is(err, syscall.EDQUOT) {
				return nil // a removal needs no space
			}
			return err
		}
	}
	if err := s.dir.Remove(ctx, groupObject(r, suffix)); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return s.dir.Sync(ctx, groupsFolder)
}

// groups removes the records of groups that are gone.
func (g *gc) groups(ctx context.Context) error {
	done, _, err := g.groupNames(ctx)
	if err != nil || len(done) == 0 {
		return err
	}
	unlock, err := g.lock(ctx)
	if err != nil {
		return err
	}
	defer unlock()
	for _, r := range done {
		if _, err := g.readGroup(ctx, r, groupSuffix); integrity.IsCorrupt(err) {
			g.rep.warn(err) // rm --group removes it
			continue
		}
		if err := g.forgetGroup(ctx, r); err != nil {
			return err
		}
	}
	return nil
}
