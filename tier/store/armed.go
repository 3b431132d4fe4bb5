package store

import (
	"context"
	"encoding/json"
	"errors"
	"strings"
	"time"

	"github.com/google/uuid"

	"github.com/flic-migrate/flic-migrate/tier/integrity"
	"github.com/flic-migrate/flic-migrate/tier/vfs"
)

// Armed is a note of a process that has a VM's next checkpoint ready: how to find it,
// and what must be done if it is dead. The process writes it when its image has begun,
// and takes it back at its end.
//
//	DIR/armed/NAME.json
//
// The process lives as long as its image, a .part, is locked. A note whose process is
// dead is taken back by whoever sees it, and by gc.
type Armed struct {
	VM      string    `json:"vm"`
	Part    uuid.UUID `json:"uuid"`    // of the checkpoint in the making
	Number  int       `json:"number"`  // its number
	Parent  string    `json:"parent"`  // the checkpoint that it was armed after, NAME@N
	PID     int       `json:"pid"`     // for messages
	Control string    `json:"control"` // path of the socket that the process listens on
	Target  string    `json:"target"`  // which QEMU it is, as commands name it
	Created time.Time `json:"created"` // when it was armed
	// State is what its process knows of that QEMU, and not for the store to know.
	State json.RawMessage `json:"state"`
}

const armedFolder = "armed"

func armedObject(vm string) string { return armedFolder + "/" + vm + ".json" }

// NoteArmed notes that a VM is armed. A note of a dead process is replaced; beside a
// living one ErrInUse.
func (s *Store) NoteArmed(ctx context.Context, a Armed) error {
	unlock, err := s.lock(ctx)
	if err != nil {
		return err
	}
	defer unlock()
	switch was, lives, err := s.ArmedFor(ctx, a.VM); {
	case err != nil && !integrity.IsCorrupt(err):
		return err
	case lives && was.Part != a.Part:
		return ErrInUse
	}
	if err := s.dir.Mkdir(ctx, armedFolder); err != nil {
		return err
	}
	return s.writeSealed(ctx, armedObject(a.VM), a)
}

// ArmedFor returns the note of a VM, nil if there is none, and whether its process
// lives.
func (s *Store) ArmedFor(ctx context.Context, vm string) (a *Armed, lives bool, err error) {
	a = new(Armed)
	err = s.readSealed(ctx, armedObject(vm), "note of an armed checkpoint", maxSealed, a)
	if gone(err) {
		return nil, false, nil
	}
	if err == nil && a.VM != vm {
		err = &integrity.CorruptError{File: s.dir.Path(armedObject(vm)), What: "note of an armed checkpoint", Err: errors.New("it is another VM's")}
	}
	if err != nil {
		return nil, false, err
	}
	f, err := s.dir.Open(ctx, partName(Ref{vm, a.Number}, a.Part), Exclusive)
	switch {
	case err == nil:
		return a, false, f.Close()
	case errors.Is(err, vfs.ErrLocked):
		return a, true, nil
	case gone(err):
		return a, false, nil
	}
	return nil, false, err
}

// Armed names the VMs that there are notes of.
func (s *Store) Armed(ctx context.Context) (vms []string, err error) {
	list, err := s.dir.List(ctx, armedFolder)
	if gone(err) {
		return nil, nil
	}
	for _, e := range list {
		if vm, ok := strings.CutSuffix(e.Name, ".json"); ok && !e.Folder && !e.Odd && CheckVM(vm) == nil {
			vms = append(vms, vm)
		}
	}
	return vms, err
}

// ForgetArmed takes a note back, unless it is another's by now.
func (s *Store) ForgetArmed(ctx context.Context, a Armed) error {
	unlock, err := s.lock(ctx)
	if err != nil {
		return err
	}
	defer unlock()
	return s.forgetArmed(ctx, a.VM, &a.Part)
}

// forgetArmed removes a VM's note, if it is of this checkpoint or of none. The caller
// holds the store lock.
func (s *Store) forgetArmed(ctx context.Context, vm string, part *uuid.UUID) error {
	now, _, err := s.ArmedFor(ctx, vm)
	if now == nil && err == nil || now != nil && part != nil && now.Part != *part {
		return nil
	}
	if err != nil && !integrity.IsCorrupt(err) {
		return err
	}
	if err := s.dir.Remove(ctx, armedObject(vm)); err != nil && !gone(err) {
		return err
	}
	return nil
}

// armed takes back the notes of dead processes, and those that can't be read. The
// settings in a QEMU that they had kept are then QEMU's defaults for the next
// checkpoint of it; a living note is not touched.
func (g *gc) armed(ctx context.Context) error {
	vms, err := g.Armed(ctx)
	if err != nil || len(vms) == 0 {
		return err
	}
	unlock, err := g.lock(ctx)
	if err != nil {
		return err
	}
	defer unlock()
	for _, vm := range vms {
		_, lives, err := g.ArmedFor(ctx, vm)
		if err != nil && !integrity.IsCorrupt(err) {
			return err
		}
		if !lives {
			if err := g.forgetArmed(ctx, vm, nil); err != nil {
				return err
			}
		}
	}
	return nil
}
