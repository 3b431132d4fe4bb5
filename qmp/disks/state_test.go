package disks

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/flic-migrate/flic-migrate/qmp"
	"github.com/flic-migrate/flic-migrate/tier/checkpoint"
	"github.com/flic-migrate/flic-migrate/tier/disk"
)

func file(t *testing.T, path string, n int) string {
	t.Helper()
	if err := os.WriteFile(path, make([]byte, n), 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

// TestCompare changes raw disks; what QEMU does with overlays is tested with one.
func TestCompare(t *testing.T) {
	dir := t.TempDir()
	a, b := file(t, filepath.Join(dir, "a"), 4096), file(t, filepath.Join(dir, "b"), 8192)
	list := []Disk{
		{Name: "/m/a", Layers: []Layer{{a, "raw"}}},
		{Name: "/m/b", ReadOnly: true, Layers: []Layer{{b, "raw"}}},
		{Name: "/m/nbd", Layers: []Layer{{"", "raw"}}},
		{Name: "/m/gone", Layers: []Layer{{filepath.Join(dir, "gone"), "raw"}}},
		{Name: "/m/vmdk", Layers: []Layer{{a, "vmdk"}}},
	}
	was := Record(list, false, nil)
	if len(was) != 5 || len(was[0].Layers) != 1 || was[0].Layers[0].Path != a || !was[1].ReadOnly || was[2].Layers != nil || was[3].Layers != nil || was[4].Layers != nil {
		t.Fatalf("%+v", was)
	}
	differ := func(now []Disk, was []checkpoint.VMDisk, want ...string) {
		t.Helper()
		got, err := Compare(t.Context(), now, was)
		if err != nil || len(got) != len(want) {
			t.Fatalf("%q, %v; want %q", got, err, want)
		}
		for i := range want {
			if !strings.Contains(got[i], want[i]) {
				t.Errorf("%q; want %q", got[i], want[i])
			}
		}
	}
	differ(list, was)
	// What nothing is known of can't differ.
	differ(list, nil)
	differ(list[1:], was, "there is no disk /m/a, which was "+a)
	differ([]Disk{{Name: "/m/a", Layers: []Layer{{b, "raw"}}}, list[1]}, was, b+" is not "+a)
	differ([]Disk{{Name: "/m/a", Layers: []Layer{{"", "raw"}}}, list[1]}, was, "/m/a can't be compared")
	differ([]Disk{{Name: "/m/a"}, list[1]}, was, "/m/a has no file")
	differ([]Disk{{Name: "/m/a", Layers: []Layer{{a, "qcow2"}}}, list[1]}, was, a+" can't be compared: ")
	if got, err := Compare(t.Context(), AsSaved(was), was); err != nil || len(got) != 0 {
		t.Error(got, err)
	}
	frozen := Record(list, true, nil)
	if !frozen[0].Frozen || frozen[1].Frozen {
		t.Errorf("%+v", frozen)
	}
	differ(list, frozen, a+" was frozen with the checkpoint, and would be written to")

	later := time.Now().Add(time.Hour)
	if err := os.Chtimes(a, later, later); err != nil {
		t.Fatal(err)
	}
	differ(list, was, a+" was written to")
	if err := os.Truncate(b, 100); err != nil {
		t.Fatal(err)
	}
	if got, err := Compare(t.Context(), AsSaved(was), was); err != nil || len(got) != 2 || !strings.Contains(got[1], b+" was made smaller") {
		t.Error(got, err)
	}
}

// TestTakeSnapshots looks at what QEMU is asked: one step for all disks that the guest
// writes to.
func TestTakeSnapshots(t *testing.T) {
	dir := t.TempDir()
	a, b := file(t, filepath.Join(dir, "a.qcow2"), 4096), file(t, filepath.Join(dir, "b.img"), 8192)
	list := []Disk{
		{Name: "/m/a", Device: "d0", Node: "n0", Layers: []Layer{{a, "raw"}}},
		{Name: "/m/ro", Device: "d1", ReadOnly: true, Layers: []Layer{{b, "raw"}}},
		{Name: "/m/b", Node: "n2", Layers: []Layer{{b, "raw"}}},
	}
	f := &fake{answers: map[string]string{"transaction": "{}"}}
	at := time.UnixMilli(1000)
	got, err := Overlays(list, at)
	suffix := ".flic-19700101T000001.000Z.qcow2"
	if err != nil || len(got) != 2 || got[0] != (Snapshot{"/m/a", a, filepath.Join(dir, "a"+suffix)}) || got[1] != (Snapshot{"/m/b", b, b + suffix}) {
		t.Fatalf("%+v, %v", got, err)
	}
	if err := TakeSnapshots(t.Context(), f, list, got); err != nil {
		t.Fatal(err)
	}
	want := `transaction {"actions":[{"type":"blockdev-snapshot-sync","data":{"device":"d0","format":"qcow2","mode":"absolute-paths","snapshot-file":"` +
		got[0].Now + `"}},{"type":"blockdev-snapshot-sync","data":{"format":"qcow2","mode":"absolute-paths","node-name":"n2","snapshot-file":"` + got[1].Now + `"}}]}`
	if len(f.asked) != 1 || f.asked[0] != want {
		t.Errorf("%q\nwant %q", f.asked, want)
	}
	// QEMU leaves the files that it has made for what it then refuses; those of a QEMU that
	// does not answer may be in use.
	for _, refusal := range []error{&qmp.Error{Command: "transaction", Desc: "no"}, qmp.ErrLost} {
		over := file(t, got[0].Now, 4096)
		err := TakeSnapshots(t.Context(), &fake{refusal: refusal}, list, got)
		_, left := os.Stat(over)
		if !errors.Is(err, refusal) || (left == nil) != (refusal == qmp.ErrLost) {
			t.Errorf("%v: %v, %v", refusal, err, left)
		}
	}
	if got, err := Overlays(list[1:2], at); err != nil || got != nil {
		t.Error(got, err)
	}
	over := file(t, got[0].Now, 4096)
	list[0].Layers[0].Path = over
	if got, err := Overlays(list[:1], at.Add(time.Second)); err != nil || got[0] != (Snapshot{"/m/a", over, filepath.Join(dir, "a.flic-19700101T000002.000Z.qcow2")}) {
		t.Errorf("%+v, %v", got, err)
	}
	list[0].Layers[0].Path = ""
	if _, err := Overlays(list, at); err == nil {
		t.Error("a disk that is no file has a snapshot")
	}
	list[0].Layers = nil
	if _, err := Overlays(list, at); err == nil {
		t.Error("a disk of which nothing is known has a snapshot")
	}
}

// TestIdle: a disk that QEMU itself writes to is not one that stands still.
func TestIdle(t *testing.T) {
	if err := Idle(t.Context(), &fake{answers: map[string]string{"query-block-jobs": "[]"}}); err != nil {
		t.Error(err)
	}
	busy := &fake{answers: map[string]string{"query-block-jobs": `[{"type":"commit","device":"d0","len":1}]`}}
	if err := Idle(t.Context(), busy); !errors.Is(err, ErrJobs) || !strings.Contains(err.Error(), "commit") {
		t.Error(err)
	}
	if err := Idle(t.Context(), &fake{}); err == nil || errors.Is(err, ErrJobs) {
		t.Errorf("a QEMU that does not say: %v", err)
	}
}

// TestOverlayModes: what a guest writes to an overlay is for nobody's eyes who can't read
// the disk that it stands on, and no file is written over.
func TestOverlayModes(t *testing.T) {
	dir := t.TempDir()
	// A qemu-img that makes a file if there is none, and fails for one name.
	bin := filepath.Join(dir, "bin")
	if err := os.Mkdir(bin, 0o700); err != nil {
		t.Fatal(err)
	}
	script := "#!/bin/sh\nfor f; do :; done\ncase $f in */bad*) exit 1;; esac\necho overlay >\"$f\"\n"
	if err := os.WriteFile(filepath.Join(bin, "qemu-img"), []byte(script), 0o700); err != nil {
		t.Fatal(err)
	}
	t.Setenv("PATH", bin+":"+os.Getenv("PATH"))
	defer syscall.Umask(syscall.Umask(0o022))
	at := time.UnixMilli(1000)
	modes := map[string]os.FileMode{"private": 0o600, "group": 0o660, "open": 0o644, "protected": 0o440}
	var was []checkpoint.VMDisk
	for name, mode := range modes {
		path := file(t, filepath.Join(dir, name), 4096)
		if err := os.Chmod(path, mode); err != nil {
			t.Fatal(err)
		}
		was = append(was, checkpoint.VMDisk{Name: name, Frozen: true, Layers: []disk.Identity{{Path: path, Format: disk.Raw}}})
	}
	check := func(overlays []Snapshot, made os.FileMode) {
		t.Helper()
		for _, s := range overlays {
			fi, err := os.Stat(s.Now)
			if err != nil {
				t.Fatal(err)
			}
			if want := (modes[s.Disk] | 0o600) & made; fi.Mode().Perm() != want {
				t.Errorf("the overlay on a file of mode %o has mode %o, not %o", modes[s.Disk], fi.Mode().Perm(), want)
			}
		}
	}
	overlays, _, err := MakeOverlays(t.Context(), was, at)
	if err != nil || len(overlays) != len(modes) {
		t.Fatal(overlays, err)
	}
	check(overlays, 0o666)

	if again, _, err := MakeOverlays(t.Context(), was, at); !errors.Is(err, os.ErrExist) || again != nil {
		t.Errorf("%+v, %v", again, err)
	}
	for _, s := range overlays {
		if b, err := os.ReadFile(s.Now); err != nil || string(b) != "overlay\n" {
			t.Errorf("the overlay that there was: %q, %v", b, err)
		}
	}

	// As QEMU makes them.
	for _, s := range overlays {
		if err := os.Chmod(s.Now, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	if err := Restrict(overlays); err != nil {
		t.Error(err)
	}
	check(overlays, 0o644)
	if err := Restrict([]Snapshot{{Frozen: overlays[0].Frozen, Now: filepath.Join(dir, "none")}}); !errors.Is(err, os.ErrNotExist) {
		t.Error(err)
	}

	bad := file(t, filepath.Join(dir, "bad"), 4096)
	was = append(was, checkpoint.VMDisk{Name: "bad", Frozen: true, Layers: []disk.Identity{{Path: bad, Format: disk.Raw}}})
	RemoveOverlays(overlays)
	if _, _, err := MakeOverlays(t.Context(), was, at); err == nil {
		t.Error("an overlay that qemu-img does not make is made")
	}
	if left, err := filepath.Glob(filepath.Join(dir, "*.flic-*")); err != nil || len(left) != 0 {
		t.Errorf("left: %v, %v", left, err)
	}
}
