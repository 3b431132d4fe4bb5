package doctor

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"

	"github.com/flic-migrate/flic-migrate/tier/integrity"
	"github.com/flic-migrate/flic-migrate/tier/nvram"
	"github.com/flic-migrate/flic-migrate/tier/store"
	"github.com/flic-migrate/flic-migrate/tier/vfs"
)

// little is the part of a file system that is worth a warning when no more is free.
const little = 0.05

// Places are where checkpoints are kept.
type Places struct {
	FS     vfs.FS
	Dir    string       // of the store
	Store  *store.Store // nil: it could not be opened,
	Opened error        // because of this
	// NVRAM is the file that the settings name for hot pages; empty: none is. Volatile: it
	// may lose its content at power-off.
	NVRAM    string
	Volatile bool
}

// Storage looks at a store and its NVRAM files.
func Storage(ctx context.Context, p Places) []Finding {
	r := report{topic: "store"}
	at := p.Dir
	switch {
	case errors.Is(p.Opened, store.ErrNotFound):
		r.warn("if it is another one: --store", "there is none at %s; the first save makes it", p.Dir)
		at = existing(p.Dir)
	case p.Opened != nil:
		r.failed(p.Opened, "", p.Dir+" can't be opened")
		at = existing(p.Dir)
	default:
		r.ok("%s is of format %d", p.Dir, store.Version)
	}
	if p.Store == nil {
		r.place(p.FS, at, 0)
		return append(r.list, nvramFiles(ctx, p, nil, nil)...)
	}
	largest, needed := r.checkpoints(ctx, p.Store)
	r.place(p.FS, at, largest)
	st := p.Store
	if err := st.CheckHome(ctx); err != nil {
		r.warn("if that one is gone for good: flic-migrate gc --adopt", "%v", err)
	}
	h, err := st.Health(ctx)
	if err != nil {
		r.failed(err, "", "not all of it was looked at")
	}
	if h.Parts > 0 {
		r.warn("flic-migrate gc", "%d saves that were killed have left %s", h.Parts, human(h.PartBytes))
	}
	for _, path := range h.Strays {
		r.warn("give it its name back, or move it elsewhere", "%s has no name of a store's, or is of no kind; it may be a checkpoint, and as long as it is there gc frees no NVRAM", path)
	}
	for _, err := range h.Unknown {
		r.warn("ask again as the store's owner", "this could not be looked at: %v", err)
	}
	r.armed(ctx, st)
	r.groups(ctx, st)
	return append(r.list, nvramFiles(ctx, p, h.NVRAM, needed)...)
}

// existing is the deepest directory on the way to dir that is there.
func existing(dir string) string {
	for at := filepath.Clean(dir); ; at = filepath.Dir(at) {
		if _, err := os.Stat(at); err == nil || at == filepath.Dir(at) {
			return at
		}
	}
}

// checkpoints counts them, and returns what the largest takes, and which NVRAM files they
// have pages in.
func (r *report) checkpoints(ctx context.Context, st *store.Store) (largest int64, needed map[string]bool) {
	list, err := st.Listing(ctx, "")
	if err != nil {
		r.failed(err, "", "its checkpoints can't be listed")
		return 0, nil
	}
	vms := make(map[string]bool)
	needed = make(map[string]bool)
	for _, l := range list {
		vms[l.Ref.VM] = true
		largest = max(largest, l.ImageBytes)
		if l.Err != nil {
			r.failed(l.Err, "flic-migrate verify "+l.Ref.String()+"; if it is lost: flic-migrate rm "+l.Ref.String(), l.Ref.String()+" can't be read")
		} else if l.Identity.NVRAM != nil {
			needed[l.Identity.NVRAM.Path] = true
		}
		if l.Lacks != nil {
			r.failed(l.Lacks, "bring that file back from a copy of the store; if it is lost: flic-migrate rm "+l.Ref.String(), l.Ref.String()+" is not whole")
		}
	}
	r.ok("%d checkpoints of %d VMs", len(list), len(vms))
	return largest, needed
}

// place looks at the file system that the store is on, or will be.
func (r *report) place(fsys vfs.FS, dir string, largest int64) {
	info, err := fsys.StatFS(dir)
	if err != nil {
		r.failed(err, "", "its file system can't be looked at")
		return
	}
	switch free := human(info.Free); {
	case info.Free == 0:
		r.fault("flic-migrate prune --keep-last N removes old checkpoints", "no space is left (%s)", info.Type)
		r.list[len(r.list)-1].Err = syscall.ENOSPC
	case info.Free < largest:
		r.warn("flic-migrate prune --keep-last N removes old checkpoints", "%s are free (%s), less than the largest checkpoint takes, %s", free, info.Type, human(largest))
	case float64(info.Free) < little*float64(info.Total):
		r.warn("flic-migrate prune --keep-last N removes old checkpoints", "%s are free (%s), less than a twentieth", free, info.Type)
	default:
		r.ok("%s of %s are free (%s)", free, human(info.Total), info.Type)
	}
	if info.Volatile {
		r.warn("put it on a disk", "%s is on %s: its checkpoints are gone after a power-off", dir, info.Type)
	}
	if unix.Access(dir, unix.W_OK|unix.X_OK) != nil {
		r.warn("run saves as its owner", "this user (%d) can't save into %s", os.Getuid(), dir)
		return
	}
	can, cannot, unknown := features(dir)
	if len(can) > 0 {
		r.ok("the file system has %s", strings.Join(can, " and "))
	}
	if slices.Contains(cannot, punching) {
		r.warn("", "the file system has no %s: what others need of a removed checkpoint keeps all of its space", punching)
	}
	if slices.Contains(cannot, cloning) {
		r.ok("the file system has no %s: copies of disks there take time and space", cloning)
	}
	if unknown != nil {
		r.ok("what the file system can was not tried: %v", unknown)
	}
}

const (
	punching = "holes (fallocate)"
	cloning  = "reflinks"
)

// features tries what a directory's file system can, with files that have no name and end
// here (O_TMPFILE).
func features(dir string) (can, cannot []string, err error) {
	open := func() (*os.File, error) {
		return os.OpenFile(dir, os.O_RDWR|unix.O_TMPFILE, 0o600)
	}
	a, err := open()
	if err != nil {
		return nil, nil, err
	}
	defer a.Close()
	b, err := open()
	if err != nil {
		return nil, nil, err
	}
	defer b.Close()
	const block = 64 << 10
	if _, err := a.Write(make([]byte, 2*block)); err != nil {
		return nil, nil, err
	}
	for _, try := range []struct {
		name string
		fn   func() error
	}{
		{punching, func() error {
			return unix.Fallocate(int(a.Fd()), unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_KEEP_SIZE, 0, block)
		}},
		{cloning, func() error { return unix.IoctlFileClone(int(b.Fd()), int(a.Fd())) }},
	} {
		if try.fn() == nil {
			can = append(can, try.name)
		} else {
			cannot = append(cannot, try.name)
		}
	}
	return can, cannot, nil
}

// armed names the VMs whose next checkpoint is armed, and the notes of dead processes.
func (r *report) armed(ctx context.Context, st *store.Store) {
	vms, err := st.Armed(ctx)
	if err != nil {
		r.warn("", "armed checkpoints can't be looked for: %v", err)
	}
	for _, vm := range vms {
		a, lives, err := st.ArmedFor(ctx, vm)
		switch {
		case integrity.IsCorrupt(err):
			r.warn("flic-migrate gc, and flic-migrate disarm --qmp or --domain if it is armed still", "the note of %s's armed checkpoint is damaged: %v", vm, err)
		case err != nil:
			r.warn("", "the note of %s's armed checkpoint can't be read: %v", vm, err)
		case a != nil && lives:
			r.ok("the next checkpoint of %s is armed, by process %d", vm, a.PID)
		case a != nil:
			r.warn("flic-migrate disarm "+vm, "the process %d that had the next checkpoint of %s armed is dead, and has left its settings in QEMU", a.PID, vm)
		}
	}
}

// groups names the groups of which the record can't be read, and those that lack members.
func (r *report) groups(ctx context.Context, st *store.Store) {
	list, err := st.Groups(ctx, "")
	if err != nil {
		r.failed(err, "", "its groups can't be listed")
	}
	for _, g := range list {
		name := g.Ref().String()
		switch {
		case g.Err != nil:
			r.failed(g.Err, "flic-migrate rm --group "+name+"; its members, if any, are checkpoints of their own then", "what group "+name+" has for members can't be read")
		case len(g.Missing) > 0:
			var gone []string
			for _, m := range g.Missing {
				gone = append(gone, m.String())
			}
			r.warn("flic-migrate rm --group "+name+" if the others are of no use without", "group %s is not whole: of %d members these were removed: %s", name, len(g.Members), strings.Join(gone, ", "))
		}
	}
	if len(list) > 0 {
		r.ok("%d groups", len(list))
	}
}

// nvramFiles judges the NVRAM files that the store's saves have used, and the one of the
// settings. needed are those that checkpoints have pages in.
func nvramFiles(ctx context.Context, p Places, list []store.NVRAMHealth, needed map[string]bool) []Finding {
	r := report{topic: "nvram"}
	seen := false
	for _, h := range list {
		seen = seen || h.Path == p.NVRAM
		r.used(h, needed[h.Path])
	}
	if p.NVRAM != "" {
		r.configured(ctx, p, seen)
	}
	return r.list
}

func (r *report) used(h store.NVRAMHealth, needed bool) {
	switch {
	case h.Err != nil && needed:
		r.failed(h.Err, "checkpoints that have pages there can't be restored without it", h.Path+" can't be looked at")
		return
	case h.Err != nil:
		r.warn("", "%s can't be looked at, and no checkpoint has pages there: %v", h.Path, h.Err)
		return
	}
	for _, d := range h.Damage {
		r.failed(d, "flic-migrate verify --all says which checkpoints it hurts", h.Path+" is damaged")
	}
	room := human(h.Free) + " are free"
	if h.Capacity > 0 {
		room = human(h.Free) + " of " + human(h.Capacity) + " are free"
	}
	r.ok("%s, %s: %s", h.Path, kind(h.Path), room)
	if h.Volatile {
		r.warn("flic-migrate persist NAME@N copies its pages to flash", "%s loses its content at power-off", h.Path)
	}
	if h.Leaked > 0 {
		r.warn("flic-migrate gc", "%s in %s belong to no checkpoint: killed saves have left them", human(h.Leaked), h.Path)
	}
	if h.Free < nvram.ExtentSize {
		r.warn("flic-migrate gc moves what only old checkpoints need to flash; --nvram-size raises its cap", "%s is full: pages of the working set go to flash", h.Path)
	}
}

// configured looks at the file that the settings name. seen: what is in it was looked at.
func (r *report) configured(ctx context.Context, p Places, seen bool) {
	if err := store.CheckNVRAM(p.FS, p.Dir, p.NVRAM); err != nil {
		r.failed(err, "name a file elsewhere", "--nvram "+p.NVRAM)
		return
	}
	if err := store.CheckLasting(p.FS, p.NVRAM); err != nil && !(p.Volatile && errors.Is(err, store.ErrVolatile)) {
		r.failed(err, "a file on persistent memory (mount -o dax) or on a disk, or --volatile-nvram", "saves with --nvram would fail")
		return
	}
	if seen {
		return
	}
	f, err := nvram.Open(ctx, p.FS, p.NVRAM, nvram.Options{ReadOnly: true})
	switch {
	case errors.Is(err, fs.ErrNotExist):
		r.ok("%s is not there yet; the first save with a working set makes it", p.NVRAM)
	case err != nil:
		r.failed(err, "if nobody needs what is in it: save --nvram-format", p.NVRAM+" can't be used")
	default:
		defer f.Close()
		r.ok("%s, %s: no save of this store has used it", p.NVRAM, kind(p.NVRAM))
	}
}

// kind says what an NVRAM file is on.
func kind(path string) string {
	var st unix.Statx_t
	if err := unix.Statx(unix.AT_FDCWD, path, 0, unix.STATX_BASIC_STATS, &st); err != nil {
		return "of unknown kind"
	}
	dax := st.Attributes&unix.STATX_ATTR_DAX != 0
	what := "a file"
	if st.Mode&unix.S_IFMT == unix.S_IFBLK {
		what = "a block device"
		b, err := os.ReadFile(fmt.Sprintf("/sys/dev/block/%d:%d/queue/dax", st.Rdev_major, st.Rdev_minor))
		dax = err == nil && strings.TrimSpace(string(b)) == "1"
	}
	if dax {
		return what + " with DAX"
	}
	return what + " without DAX"
}
