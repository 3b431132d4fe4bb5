package disks

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/flic-migrate/flic-migrate/tier/checkpoint"
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
	if err := TakeSnapshots(t.Context(), &fake{}, list, got); err == nil {
		t.Error("a refusal is no error")
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
