package disks

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"regexp"
	"slices"
	"strings"
	"syscall"
	"time"

	"github.com/google/uuid"

	"github.com/flic-migrate/flic-migrate/qmp"
	"github.com/flic-migrate/flic-migrate/tier/checkpoint"
	"github.com/flic-migrate/flic-migrate/tier/disk"
)

// Memory that was saved is of use only with the disks as they were at that moment: a
// guest that goes on with others takes what its page cache says for true, and writes it
// where something else stands now.

// Record describes the disks for a checkpoint, as their files are now. The guest stands
// still, and QEMU has written all that it had to. Files that can't be looked at are left
// out; frozen says that a snapshot of those that the guest writes to has been taken, and
// kept which copies of them the store keeps, by the disks' names.
func Record(list []Disk, frozen bool, kept map[string]uuid.UUID) (out []checkpoint.VMDisk) {
	for _, d := range list {
		v := checkpoint.VMDisk{Name: d.Name, ReadOnly: d.ReadOnly, Frozen: frozen && !d.ReadOnly, Kept: kept[d.Name]}
		for _, l := range d.Layers {
			id, err := Identify(l)
			if err != nil {
				break
			}
			v.Layers = append(v.Layers, id)
		}
		out = append(out, v)
	}
	return out
}

// Identify says what the file of a layer is now.
func Identify(l Layer) (disk.Identity, error) {
	i, err := open(l)
	if err != nil {
		return disk.Identity{}, err
	}
	defer i.Close()
	return i.Identity(), nil
}

var errNoFile = errors.New("not a file that can be looked at")

func open(l Layer) (*disk.Image, error) {
	if l.Path == "" || l.Format == "" {
		return nil, errNoFile
	}
	f, err := disk.ParseFormat(l.Format)
	if err != nil {
		return nil, err
	}
	return disk.OpenLayer(l.Path, f)
}

// ErrOtherDisks: a checkpoint's disks are not those that it would go on with.
var ErrOtherDisks = errors.New("the disks are not as they were when the checkpoint was made")

// Compare tells in what the disks of a QEMU that is to go on from a checkpoint differ
// from the checkpoint's, a line each; none if they don't, or if it can't be told. A disk
// may have overlays that nobody has written to yet, and one that was frozen must have
// one: something else stands on it.
func Compare(ctx context.Context, now []Disk, was []checkpoint.VMDisk) (differ []string, err error) {
	for _, w := range was {
		if err := context.Cause(ctx); err != nil {
			return nil, err
		}
		if len(w.Layers) == 0 {
			continue
		}
		i := slices.IndexFunc(now, func(d Disk) bool { return d.Name == w.Name })
		if i < 0 {
			differ = append(differ, fmt.Sprintf("there is no disk %s, which was %s", w.Name, w.Layers[0].Path))
			continue
		}
		if what := compare(ctx, now[i].Layers, w); what != "" {
			differ = append(differ, what)
		}
	}
	return differ, nil
}

// AsSaved are the disks of a QEMU that will be started with the files that the checkpoint
// names.
func AsSaved(was []checkpoint.VMDisk) (now []Disk) {
	for _, w := range was {
		d := Disk{Name: w.Name, ReadOnly: w.ReadOnly}
		for _, l := range w.Layers {
			d.Layers = append(d.Layers, Layer{l.Path, string(l.Format)})
		}
		now = append(now, d)
	}
	return now
}

// compare tells in what a disk differs.
func compare(ctx context.Context, now []Layer, was checkpoint.VMDisk) string {
	first := ""
	for k, l := range now {
		i, err := open(l)
		if err != nil {
			if first == "" {
				first = fmt.Sprintf("%s can't be compared: %v", cmp.Or(l.Path, was.Name), err)
			}
			break
		}
		what := differs(was.Layers[0], i.Identity())
		if what == "" {
			i.Close()
			if k == 0 && was.Frozen {
				return fmt.Sprintf("%s was frozen with the checkpoint, and would be written to: put an overlay on it (qemu-img create -f qcow2 -b %s -F %s OVERLAY)",
					l.Path, l.Path, l.Format)
			}
			return below(now[k:], was)
		}
		if first == "" {
			if i.Path() != was.Layers[0].Path {
				what = "is not " + was.Layers[0].Path + ", nor an empty overlay on it"
			}
			first = fmt.Sprintf("%s %s", l.Path, what)
		}
		// What lies below counts only if this one adds nothing.
		empty, err := i.Empty(ctx)
		i.Close()
		if err != nil || !empty {
			break
		}
	}
	if first == "" {
		first = fmt.Sprintf("%s has no file", was.Name)
	}
	return first
}

// below compares what a layer that is the same stands on.
func below(now []Layer, was checkpoint.VMDisk) string {
	for k, w := range was.Layers {
		if k >= len(now) {
			break
		}
		id, err := Identify(now[k])
		if err != nil {
			break // it could be looked at when it was saved, but nobody writes to it as a rule
		}
		if what := differs(w, id); what != "" {
			return fmt.Sprintf("%s, on which %s stands, %s", now[k].Path, now[0].Path, what)
		}
	}
	return ""
}

// differs is Identity.Differs, but takes a copy that has the same times for the same.
func differs(was, now disk.Identity) string {
	if was.Check() != nil {
		return ""
	}
	was.File.Inode = now.File.Inode
	return was.Differs(now)
}

// Snapshot is what a disk goes on in after a snapshot was taken.
type Snapshot struct {
	Disk   string `json:"disk"`   // its name
	Frozen string `json:"frozen"` // the file that has the disk as it was
	Now    string `json:"now"`    // the overlay on it that the guest writes to now
}

// overlayEnd is how the names of our overlays end, but for .qcow2.
var overlayEnd = regexp.MustCompile(`\.flic-[0-9]{8}T[0-9]{6}\.[0-9]{3}Z$`)

// overlayOn names an overlay: beside the file that it stands on, and for the time. What
// stands on an overlay of ours is named like that one, and no longer.
func overlayOn(path string, at time.Time) string {
	path = overlayEnd.ReplaceAllString(strings.TrimSuffix(path, ".qcow2"), "")
	return path + at.UTC().Format(".flic-20060102T150405.000Z") + ".qcow2"
}

// overlayTime bounds the making of all overlays of a VM, each of which is a small file.
const overlayTime = time.Minute

// MakeOverlays makes an overlay on each disk that was frozen with a checkpoint, for a VM
// that is to be started. now are the disks that the VM will then have.
func MakeOverlays(ctx context.Context, was []checkpoint.VMDisk, at time.Time) (overlays []Snapshot, now []Disk, err error) {
	ctx, cancel := context.WithTimeout(ctx, overlayTime)
	defer cancel()
	defer func() {
		if err != nil {
			RemoveOverlays(overlays)
			overlays = nil
		}
	}()
	for _, d := range AsSaved(was) {
		i := slices.IndexFunc(was, func(w checkpoint.VMDisk) bool { return w.Name == d.Name })
		if was[i].Frozen && len(d.Layers) > 0 {
			on := d.Layers[0]
			s := Snapshot{d.Name, on.Path, overlayOn(on.Path, at)}
			if err := makeLike(s.Now, on.Path); err != nil {
				return overlays, nil, fmt.Errorf("an overlay on %s: %w", on.Path, err)
			}
			overlays = append(overlays, s)
			// No option comes before it that a path could be taken for.
			cmd := exec.CommandContext(ctx, "qemu-img", "create", "-q", "-f", "qcow2", "-b", on.Path, "-F", on.Format, s.Now)
			if out, err := cmd.CombinedOutput(); err != nil {
				return overlays, nil, fmt.Errorf("an overlay on %s: qemu-img: %w: %s", on.Path, err, bytes.TrimSpace(out))
			}
			d.Layers = slices.Insert(d.Layers, 0, Layer{s.Now, string(disk.Qcow2)})
		}
		now = append(now, d)
	}
	if len(overlays) == 0 {
		err = ErrNotFrozen
	}
	return overlays, now, err
}

// makeLike makes an empty file, which must be new, that those can use who can use another
// one, and nobody else. qemu-img keeps a file's mode and owner, and makes one that everybody
// can read if there is none.
func makeLike(path, other string) error {
	fi, err := os.Stat(other)
	if err != nil {
		return err
	}
	f, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return err
	}
	// Who may not give it away has it for himself: his group is another one.
	if st, ok := fi.Sys().(*syscall.Stat_t); ok && f.Chown(int(st.Uid), int(st.Gid)) == nil {
		err = f.Chmod(usable(fi.Mode()))
	}
	if err = errors.Join(err, f.Close()); err != nil {
		os.Remove(path)
	}
	return err
}

// usable is the mode of an overlay on a file of this mode: a frozen one may be protected
// from its owner, and the overlay is to be written to.
func usable(frozen fs.FileMode) fs.FileMode { return frozen&0o666 | 0o600 }

// Restrict takes from overlays that QEMU has made what permissions the files that they stand
// on do not give: QEMU makes files that everybody can read. The guest has not written to them
// yet. QEMU's user, who has them open and is their owner, can use them all the same.
func Restrict(overlays []Snapshot) (err error) {
	for _, s := range overlays {
		frozen, ferr := os.Stat(s.Frozen)
		now, nerr := os.Stat(s.Now)
		if err = errors.Join(err, ferr, nerr); ferr != nil || nerr != nil {
			continue
		}
		if mode := now.Mode().Perm() & usable(frozen.Mode()); mode != now.Mode().Perm() {
			err = errors.Join(err, os.Chmod(s.Now, mode))
		}
	}
	return err
}

// ErrNotFrozen: overlays are wanted on disks that the VM has gone on to write to.
var ErrNotFrozen = errors.New("no disk was frozen with the checkpoint (checkpoint --disks snapshot), so that overlays would stand on what the VM has written since")

// RemoveOverlays removes overlays that no VM has been started with.
func RemoveOverlays(overlays []Snapshot) {
	for _, s := range overlays {
		os.Remove(s.Now)
	}
}

// Overlays names an overlay for each disk that the guest can write to.
func Overlays(list []Disk, at time.Time) (overlays []Snapshot, err error) {
	writable, err := Writable(list)
	if err != nil {
		return nil, fmt.Errorf("no snapshot of %w", err)
	}
	for _, d := range writable {
		overlays = append(overlays, Snapshot{d.Name, d.Layers[0].Path, overlayOn(d.Layers[0].Path, at)})
	}
	return overlays, nil
}

// Writable are the disks that the guest can write to, each of which must be in a file that
// can be looked at.
func Writable(list []Disk) (writable []Disk, err error) {
	for _, d := range list {
		if d.ReadOnly {
			continue
		}
		err := errNoFile
		if len(d.Layers) > 0 {
			_, err = Identify(d.Layers[0])
		}
		if err != nil {
			return nil, fmt.Errorf("the disk %s: %w", d.Name, err)
		}
		writable = append(writable, d)
	}
	return writable, nil
}

// ErrJobs: QEMU writes to a VM's disks, or will, though the guest stands still.
var ErrJobs = errors.New("QEMU has block jobs at work on the VM's disks")

// Idle fails if QEMU has block jobs (ErrJobs): a mirror, a backup, or the commit or streaming
// of an image goes on while the guest stands still.
func Idle(ctx context.Context, x qmp.Executor) error {
	var jobs []struct {
		Type   string `json:"type"`
		Device string `json:"device"`
	}
	if err := x.Execute(ctx, "query-block-jobs", nil, &jobs); err != nil {
		return fmt.Errorf("QEMU's block jobs: %w", err)
	}
	if len(jobs) == 0 {
		return nil
	}
	return fmt.Errorf("%w: %.60q of %.60q, and perhaps others", ErrJobs, jobs[0].Type, jobs[0].Device)
}

// TakeSnapshots makes the overlays, which are Overlays of the list, all of them in one step
// or none (QEMU's transaction). The guest stands still, and all that it has written is in
// the files when TakeSnapshots returns. The overlays are the VM's disks from then on. After
// an error that is no *qmp.Error, as when QEMU does not answer in time, they may become that
// yet: see InUse.
func TakeSnapshots(ctx context.Context, x qmp.Executor, list []Disk, overlays []Snapshot) error {
	type action struct {
		Type string         `json:"type"`
		Data map[string]any `json:"data"`
	}
	var actions []action
	for _, s := range overlays {
		i := slices.IndexFunc(list, func(d Disk) bool { return d.Name == s.Disk })
		data := map[string]any{"snapshot-file": s.Now, "format": "qcow2", "mode": "absolute-paths"}
		if list[i].Device != "" {
			data["device"] = list[i].Device
		} else {
			data["node-name"] = list[i].Node
		}
		actions = append(actions, action{"blockdev-snapshot-sync", data})
	}
	err := x.Execute(ctx, "transaction", map[string]any{"actions": actions}, nil)
	if err == nil {
		return nil
	}
	var refused *qmp.Error
	if errors.As(err, &refused) {
		// QEMU has made the files of those that it could, and leaves them.
		RemoveOverlays(overlays)
	}
	return fmt.Errorf("snapshots of the disks: %w", err)
}

// InUse are those of the overlays that the guest writes to, of a VM that has these disks.
func InUse(list []Disk, overlays []Snapshot) (used []Snapshot) {
	for _, s := range overlays {
		if slices.ContainsFunc(list, func(d Disk) bool { return d.Name == s.Disk && len(d.Layers) > 0 && d.Layers[0].Path == s.Now }) {
			used = append(used, s)
		}
	}
	return used
}
