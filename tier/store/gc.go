package store

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/google/uuid"

	"github.com/flic-migrate/flic-migrate/tier/image"
	"github.com/flic-migrate/flic-migrate/tier/integrity"
	"github.com/flic-migrate/flic-migrate/tier/nvram"
	"github.com/flic-migrate/flic-migrate/tier/vfs"
)

// GCReport says what a GC freed.
type GCReport struct {
	Parts        int      `json:"unfinished_saves"`   // images in the making that nobody makes any more
	Removed      int      `json:"removed_images"`     // images of removed checkpoints
	Bytes        int64    `json:"flash_bytes"`        // the size of both
	Trimmed      int      `json:"trimmed_images"`     // images of removed checkpoints, needed in part
	TrimmedBytes int64    `json:"trimmed_bytes"`      // what was freed of them on flash
	NVRAMExtents int      `json:"nvram_extents"`      // extents freed
	NVRAMBytes   int64    `json:"nvram_bytes"`        // their size
	Indexes      int      `json:"unfinished_indexes"` // of disk images, that nobody builds any more
	FrozenDisks  int      `json:"frozen_disks"`       // copies of disk images that no checkpoint has
	FrozenBytes  int64    `json:"frozen_bytes"`       // what their disk blocks held
	GoneFiles    int      `json:"gone_files"`         // images outside of the store whose file is gone, their NVRAM kept for now
	Staged       int      `json:"unfinished_copies"`  // images that were received in part, kept for now
	StagedBytes  int64    `json:"staged_bytes"`       // their size
	Warnings     []string `json:"warnings,omitempty"` // what could not be looked at
}

func (rep *GCReport) warn(err error) { rep.Warnings = append(rep.Warnings, err.Error()) }

// GC frees what ended or killed saves and interrupted removals have left: their
// objects, and their extents in the NVRAM files this store has used. It can run
// at any time beside saves and restores, and holds the store lock for moments only.
func (s *Store) GC(ctx context.Context) (GCReport, error) {
	return s.GCAfter(ctx, DefaultGrace, StagedFor)
}

// GCAfter is GC with other grace periods: for the hot pages of images outside of
// the store whose file is gone, and for what transfers that were cut off have left.
//
// Who is live is found out without a lock, by the order of the looks:
//
//	owners in NVRAM, then loose images and those in the making, then the VMs'
//
// An owner was announced before it took NVRAM, as an object in tmp or loose, and
// goes from tmp to its VM's folder in one step. So an owner of the first look that
// none of the later ones sees has been removed in between, or is dead.
func (s *Store) GCAfter(ctx context.Context, grace, staged time.Duration) (rep GCReport, err error) {
	g := gc{Store: s, look: s.lookup(), rep: &rep, staged: staged, live: make(map[uuid.UUID]bool), had: make(reservations)}
	if err := s.CheckHome(ctx); err != nil {
		rep.warn(err) // and NVRAM stays as it is
	} else if err := g.openNVRAM(ctx); err != nil {
		return rep, err
	}
	defer g.close()
	if err := g.loose(ctx, grace); err != nil {
		return rep, err
	}
	if err := g.tmp(ctx); err != nil {
		return rep, err
	}
	if err := g.armed(ctx); err != nil {
		return rep, err
	}
	if err := g.disks(ctx); err != nil {
		return rep, err
	}
	if err := g.vms(ctx); err != nil {
		return rep, err
	}
	if err := g.groups(ctx); err != nil {
		return rep, err
	}
	if err := g.frozen(ctx); err != nil {
		return rep, err
	}
	if err := g.shares(ctx); err != nil {
		return rep, err
	}
	if err := g.renoteSharing(ctx); err != nil {
		return rep, err
	}
	return rep, g.sweep(ctx)
}

// gc is one run of GC.
type gc struct {
	*Store
	look   *lookup
	rep    *GCReport
	staged time.Duration // how long what was received in part is kept
	live   map[uuid.UUID]bool
	files  []*nvramOwners
	had    reservations // of those in files
	// keep: there is something that may be a checkpoint, and can't say which. No
	// NVRAM is given back then, and no removed image that another may refer to.
	keep bool
}

// nvramOwners is an NVRAM file, and whose extents of this store's were in it at
// first.
type nvramOwners struct {
	*nvram.File
	owners []nvram.Owner
}

func (g *gc) close() {
	for _, f := range g.files {
		f.Close()
	}
}

func (g *gc) openNVRAM(ctx context.Context) error {
	list, err := g.dir.List(ctx, nvramFolder)
	if err != nil {
		return err
	}
	for _, e := range list {
		var nf nvramFile
		err := g.readSealed(ctx, nvramFolder+"/"+e.Name, "NVRAM file's name", maxSealed, &nf)
		if err != nil {
			g.rep.warn(err)
			continue
		}
		f, err := g.Store.openNVRAM(ctx, nf)
		if err != nil {
			g.rep.warn(fmt.Errorf("NVRAM file %s was not looked at: %w%s", nf.Path, err, g.forgetHint(nf, err)))
			continue
		}
		o := &nvramOwners{File: f}
		g.files = append(g.files, o)
		if o.owners, err = f.Owners(ctx, g.doc.UUID); err != nil {
			g.rep.warn(err)
		}
		for _, owner := range o.owners {
			g.had[owner.UUID] = reservation{since: owner.Since}
		}
	}
	return nil
}

// forgetHint says what can be done about an NVRAM file that is gone.
func (g *gc) forgetHint(nf nvramFile, err error) string {
	if !gone(err) {
		return ""
	}
	return fmt.Sprintf(" (if it is gone for good: flic-migrate gc --forget-nvram %q)", nf.Path)
}

// tmp removes what no process has locked; images that are being made are live.
func (g *gc) tmp(ctx context.Context) error {
	unlock, err := g.lock(ctx)
	if err != nil {
		return err
	}
	defer unlock()
	// What a killed process has committed as a group is not swept.
	unplaced := g.placeGroups(ctx)
	if unplaced != nil && !integrity.IsCorrupt(unplaced) {
		return unplaced
	}
	if unplaced != nil {
		g.rep.warn(fmt.Errorf("saves that may belong to a group are kept: %w", unplaced))
	}
	list, err := g.dir.Look(ctx, tmpFolder, nil)
	if err != nil {
		return err
	}
	removed := false
	for _, e := range list {
		_, id, suffix, ok := parseTmp(e.Name)
		if !ok || e.Folder {
			continue
		}
		name := tmpFolder + "/" + e.Name
		f, err := g.dir.Open(ctx, name, Exclusive)
		switch {
		case errors.Is(err, vfs.ErrLocked):
			g.live[id] = true
			continue
		case gone(err):
			continue // a save that was given up does not wait for the lock
		case err != nil:
			// It may be somebody's.
			g.live[id] = true
			g.rep.warn(err)
			continue
		}
		if suffix == stagedSuffix && time.Since(time.Unix(0, e.Stamp.Mtime)) < g.staged {
			if size, err := f.Size(); err == nil {
				g.rep.Staged++
				g.rep.StagedBytes += size
			}
			f.Close() // a transfer that was cut off may go on
			continue
		}
		if suffix == partSuffix && unplaced != nil {
			g.live[id] = true
			f.Close()
			continue
		}
		if !removed {
			// A power cut must not bring back a group's record without its parts.
			if err := g.dir.Sync(ctx, groupsFolder); err != nil && !gone(err) {
				f.Close()
				return err
			}
		}
		size, _ := f.Size()
		err = g.dir.Remove(ctx, name)
		f.Close()
		if gone(err) {
			continue // a summary, or another hint, that has its name by now: nobody locks those
		}
		if err != nil {
			return err
		}
		removed = true
		g.rep.Bytes += size
		if suffix == partSuffix || suffix == stagedSuffix {
			g.rep.Parts++
		}
	}
	if removed {
		return g.dir.Sync(ctx, tmpFolder)
	}
	return nil
}

// disks removes indexes of disk images that killed builds have left.
func (g *gc) disks(ctx context.Context) error {
	c, err := g.Disks()
	if err == nil {
		g.rep.Indexes, err = c.Sweep(ctx)
	}
	return err
}

// shares brings the indexes of shared pages up to date. They are a cache, so what is wrong
// with one is no failure.
func (g *gc) shares(ctx context.Context) error {
	_, warnings, err := g.tendShares(ctx)
	if ctx.Err() != nil {
		return context.Cause(ctx)
	}
	for _, w := range append(warnings, err) {
		if w != nil {
			g.rep.warn(fmt.Errorf("index of shared pages: %w", w))
		}
	}
	return nil
}

// vms looks at the VMs' folders: their images are live, and what belongs to none
// is removed.
func (g *gc) vms(ctx context.Context) error {
	// Anybody can have renamed an image, or put a link in the place of a VM's folder.
	// Whoever it was must not lose the hot pages because of it.
	stray := func(name string) {
		g.unknown(fmt.Errorf("%s: it has no name, or is of no kind, of a store's, and may be a checkpoint", g.dir.Path(name)))
	}
	list, err := g.dir.List(ctx, vmsFolder)
	if err != nil {
		return err
	}
	var vms []string
	for _, e := range list {
		if e.Folder && CheckVM(e.Name) == nil {
			vms = append(vms, e.Name)
		} else {
			stray(vmFolder(e.Name))
		}
	}
	all := make([]vmObjects, len(vms))
	for i, vm := range vms {
		if all[i], err = g.look.objects(ctx, vm); err != nil {
			return err
		}
		for _, name := range all[i].strays {
			stray(name)
		}
		for _, n := range all[i].odd {
			_, err := g.owner(ctx, Ref{vm, n}.object(imageSuffix))
			if errors.Is(err, errNotObject) {
				g.unknown(err)
			}
		}
	}
	if err := g.owners(ctx, vms, all); err != nil {
		return err
	}
	v, err := g.needs(ctx, vms, all)
	if err != nil {
		return err
	}
	defer g.look.keep(ctx)
	// Whose images were not seen can have been removed or replaced since their folder was
	// listed, and be kept for others.
	again := len(g.unaccounted()) > 0
	for i, vm := range vms {
		if again || len(all[i].removed) > 0 || len(all[i].kept) > 0 || len(all[i].beside) > 0 || len(all[i].moved) > 0 {
			if err := g.leftovers(ctx, vm, v); err != nil {
				return err
			}
		}
	}
	return g.summaries(ctx, vms, all)
}

// summaries removes those of VMs that have no checkpoints.
func (g *gc) summaries(ctx context.Context, vms []string, all []vmObjects) error {
	list, err := g.dir.List(ctx, summaryFolder)
	if gone(err) {
		return nil
	}
	if err != nil {
		return err
	}
	for _, e := range list {
		if e.Folder || e.Odd || CheckVM(e.Name) != nil {
			continue
		}
		if i := slices.Index(vms, e.Name); i >= 0 && len(all[i].images) > 0 {
			continue
		}
		if err := g.dir.Remove(ctx, summaryObject(e.Name)); err != nil && !gone(err) {
			return err
		}
	}
	return nil
}

// needs finds out what listed checkpoints need of the images that are not listed.
func (g *gc) needs(ctx context.Context, vms []string, all []vmObjects) (*survey, error) {
	var ids []uuid.UUID
	for i, vm := range vms {
		for _, st := range all[i].unlisted(vm) {
			empty, err := g.look.unlistedIs(ctx, &st)
			if err == nil && !empty {
				ids = append(ids, st.uuid)
			}
			if err != nil && !cannotTell(err) && !gone(err) {
				return nil, err
			}
		}
	}
	v := g.look.survey(ids...)
	if len(ids) > 0 {
		if err := v.update(ctx); err != nil {
			return nil, err
		}
		if v.unclear != nil && !isUnsupported(v.unclear) {
			return nil, v.unclear
		}
	}
	return v, nil
}

// cannotTell tells whether err is that of an image that can't say who it is.
func cannotTell(err error) bool { return integrity.IsCorrupt(err) || isUnsupported(err) }

// unknown keeps NVRAM because of something that may own a part of it.
func (g *gc) unknown(err error) {
	g.keep = true
	g.rep.warn(fmt.Errorf("no NVRAM is freed, because it can't be told what this owns: %w", err))
}

// owners finds the images that own what is in NVRAM: the newest of each VM first,
// then those before, because NVRAM has the newest as a rule. It reads nothing once
// all owners are found.
func (g *gc) owners(ctx context.Context, vms []string, all []vmObjects) error {
	open := g.unaccounted()
	for depth, more := 1, true; more && len(open) > 0; depth++ {
		more = false
		for i, vm := range vms {
			if depth > len(all[i].images) || len(open) == 0 {
				continue
			}
			more = true
			if err := context.Cause(ctx); err != nil {
				return err
			}
			r := Ref{vm, all[i].images[len(all[i].images)-depth]}
			id, err := g.look.owner(ctx, r.object(imageSuffix))
			if gone(err) || errors.Is(err, errNotObject) {
				continue // if there is something, vms has said so
			}
			if isUnsupported(err) {
				g.unknown(err)
				continue
			}
			if err != nil {
				// Its NVRAM must not be given away because of it.
				return fmt.Errorf("gc stops, because it can't tell which NVRAM this checkpoint owns: %w", err)
			}
			g.live[id] = true
			delete(open, id)
		}
	}
	return nil
}

// unaccounted are the owners of NVRAM of whom it is not known yet whether they live.
func (g *gc) unaccounted() map[uuid.UUID]bool {
	open := make(map[uuid.UUID]bool)
	for _, f := range g.files {
		for _, o := range f.owners {
			if !g.live[o.UUID] {
				open[o.UUID] = true
			}
		}
	}
	return open
}

func (s *Store) owner(ctx context.Context, name string) (uuid.UUID, error) {
	f, err := s.dir.Open(ctx, name, Unlocked)
	if err != nil {
		return uuid.Nil, err
	}
	defer f.Close()
	h, err := image.ReadHeader(f)
	return h.UUID, s.unlessGone(ctx, name, err)
}

// leftovers removes from a VM's folder what was learned of checkpoints that are
// gone, images of removed ones that nobody needs and what nobody needs of the others,
// and what stands for any number but the highest.
func (g *gc) leftovers(ctx context.Context, vm string, v *survey) error {
	idle, err := g.withoutNVRAM(ctx, vm, v)
	bytes, left := g.freeNVRAM(ctx, idle...)
	g.rep.NVRAMExtents += int(bytes / nvram.ExtentSize)
	g.rep.NVRAMBytes += bytes
	if left != nil && !errors.Is(left, ErrCopied) { // of that GCAfter has warned
		g.rep.warn(left)
	}
	return err
}

// withoutNVRAM is leftovers, but for the NVRAM that is idle.
func (g *gc) withoutNVRAM(ctx context.Context, vm string, v *survey) (free []idle, err error) {
	unlock, err := g.look.lock(ctx)
	if err != nil {
		return nil, err
	}
	defer unlock()
	o, err := g.look.again(ctx, vm)
	if err != nil {
		return nil, err
	}
	for suffix, numbers := range o.beside {
		for _, n := range numbers {
			if _, ok := slices.BinarySearch(o.images, n); ok {
				if suffix == lentSuffix {
					if err := g.staleLent(ctx, Ref{vm, n}); err != nil {
						return free, err
					}
				}
				continue
			}
			if err := g.dropBeside(ctx, Ref{vm, n}, o); err != nil {
				return free, err
			}
		}
	}
	settled := false
	for _, st := range o.unlisted(vm) {
		empty, err := g.look.unlistedIs(ctx, &st)
		if gone(err) || errors.Is(err, errNotObject) {
			continue // a stray
		}
		if cannotTell(err) {
			// As a rule it is what a power cut has left of one that was emptied.
			missing, merr := g.missing(ctx, v)
			if merr != nil {
				return free, merr
			}
			if missing {
				g.unknown(fmt.Errorf("what is left of a removed checkpoint can't be read, and is kept, because others refer to one that is not there: %w", err))
				continue
			}
			err = nil
		}
		if err != nil {
			return free, err
		}
		done, err := g.untwin(ctx, st)
		if err != nil {
			return free, err
		}
		if done {
			continue
		}
		f, err := g.dir.Open(ctx, st.name, Exclusive)
		if errors.Is(err, vfs.ErrLocked) {
			// Somebody reads it, or is about to refer to it.
			g.live[st.uuid] = true
			continue
		}
		if err != nil {
			return free, err
		}
		if !settled && !empty {
			if err = v.update(ctx); err == nil {
				err = g.settle(ctx)
			}
			settled = true
		}
		if err == nil {
			err = g.leftover(ctx, st, empty, f, o, v, &free)
		} else {
			f.Close()
		}
		if err != nil {
			return free, err
		}
	}
	if len(o.moved) == 0 {
		return free, nil
	}
	return free, g.orphans(ctx, vm)
}

// orphans removes what was moved from NVRAM of images of a VM that are not there any more.
// The caller holds the store lock.
func (g *gc) orphans(ctx context.Context, vm string) error {
	o, err := g.objects(ctx, vm)
	if err != nil || len(o.moved) == 0 || g.keep {
		return err
	}
	type place struct {
		n  int
		id uuid.UUID
	}
	there := make(map[place]bool)
	unsure := make(map[int]bool) // numbers of images that can't say who they are
	for _, st := range o.all(vm) {
		id, err := g.look.owner(ctx, st.name)
		size := int64(1)
		if err != nil {
			if f, oerr := g.dir.Open(ctx, st.name, Unlocked); oerr == nil {
				size, _ = f.Size()
				f.Close()
			}
		}
		switch {
		case err == nil:
			there[place{st.ref.N, id}] = true
		case size > 0:
			unsure[st.ref.N] = true
		}
	}
	settled := false
	for _, m := range o.moved {
		if there[place{m.n, m.id}] || unsure[m.n] {
			continue
		}
		if !settled {
			if err := g.settle(ctx); err != nil {
				return err
			}
			settled = true
		}
		bytes, err := g.dropMoved(ctx, Ref{vm, m.n}, m.id, o)
		if g.rep.Bytes += bytes; err != nil {
			return err
		}
	}
	return nil
}

// missing tells whether a listed checkpoint refers to an image that can't be found.
func (g *gc) missing(ctx context.Context, v *survey) (bool, error) {
	if err := v.update(ctx); err != nil || v.unclear != nil {
		return true, err
	}
	there, wanted := make(map[uuid.UUID]bool), make(map[uuid.UUID]bool)
	err := g.look.eachVMSeen(ctx, func(vm string, o vmObjects) error {
		for _, st := range o.unlisted(vm) {
			g.look.unlistedIs(ctx, &st)
			there[st.uuid] = true
		}
		for _, n := range o.images {
			id, err := g.look.whoIs(ctx, Ref{vm, n}.object(imageSuffix))
			if err != nil || id == nil {
				continue // it is not there any more, or v is unclear
			}
			there[id.UUID] = true
			for _, to := range id.References {
				wanted[to] = true
			}
		}
		return nil
	})
	for to := range wanted {
		if !there[to] {
			return true, err
		}
	}
	return err != nil, err
}

// leftover frees one unlisted image, which is locked as f, or what nobody needs of it; the
// NVRAM that is idle is added to a list. It closes f, unless that belongs to the list now.
func (g *gc) leftover(ctx context.Context, st stored, empty bool, f Object, o vmObjects, v *survey, list *[]idle) error {
	if empty {
		defer f.Close()
		if st.ref.N == o.last() {
			return nil
		}
		return g.dir.Remove(ctx, st.name)
	}
	// It can have come since the look, and a stray may need it.
	if _, known := v.of[st.uuid]; g.keep || !known && st.uuid != uuid.Nil {
		g.live[st.uuid] = true
		f.Close()
		return nil
	}
	fr, left, err := g.free(ctx, st, f, o, v, g.had)
	*list = append(*list, fr.idle...)
	if left != nil {
		g.rep.warn(left)
	}
	if !fr.removed {
		g.live[st.uuid] = true
	}
	switch {
	case fr.removed:
		g.rep.Removed++
		g.rep.Bytes += fr.flash
	case fr.flash > 0:
		g.rep.Trimmed++
		g.rep.TrimmedBytes += fr.flash
	}
	return err
}

// sweep gives back the extents of owners that are not live.
func (g *gc) sweep(ctx context.Context) error {
	dead := g.unaccounted()
	if g.keep {
		clear(dead)
	}
	if len(dead) > 0 {
		// That an image is not there is only believed once it is durable: a removal
		// that a power cut undoes must not have lost its NVRAM part (see commit).
		if err := g.settle(ctx); err != nil {
			return err
		}
	}
	for _, f := range g.files {
		// A checkpoint that was removed can come back meanwhile, from another store.
		had := make(map[uuid.UUID]time.Time)
		for _, o := range f.owners {
			if dead[o.UUID] {
				had[o.UUID] = o.Since
			}
		}
		freed, err := f.SweepSince(ctx, g.doc.UUID, func(owner uuid.UUID, since time.Time) bool {
			before, is := had[owner]
			return !is || !since.Equal(before) // earlier, if the clock was set back
		})
		g.rep.NVRAMExtents += freed
		g.rep.NVRAMBytes += int64(freed) * nvram.ExtentSize
		if err != nil {
			g.rep.warn(err)
		}
	}
	return nil
}
