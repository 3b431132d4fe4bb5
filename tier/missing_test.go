package tier_test

import (
	"errors"
	"strings"
	"testing"

	"github.com/flic-migrate/flic-migrate/tier/checkpoint"
	"github.com/flic-migrate/flic-migrate/tier/integrity"
	"github.com/flic-migrate/flic-migrate/tier/save"
	"github.com/flic-migrate/flic-migrate/tier/store"
	"github.com/flic-migrate/flic-migrate/tier/vfs/crashfs"
)

// TestMissingImage: of an image that is not there, and that a checkpoint refers to, both who
// describes it and who opens it say which it was, and where.
func TestMissingImage(t *testing.T) {
	disk := crashfs.New(0)
	l := newLab(t, disk, "/")
	l.save(t, small(1), save.Options{VM: "a"})
	ref, meta := l.save(t, grown(1), save.Options{VM: "b", Parent: "a@1"})
	if len(meta.References) != 1 {
		t.Fatalf("it refers to %v", meta.References)
	}
	if err := disk.Remove("/store/vms/a/00000001.flic"); err != nil {
		t.Fatal(err)
	}
	says := func(what, text string) {
		t.Helper()
		for _, part := range []string{"/store/vms/a/00000001.flic", "a@1", meta.References[0].String()} {
			if !strings.Contains(text, part) {
				t.Errorf("%s says %q, and not %q", what, text, part)
			}
		}
	}
	sh, err := l.st.Sharing(t.Context(), ref)
	if err != nil || len(sh.RefersTo) != 1 {
		t.Fatalf("%+v, %v", sh, err)
	}
	says("show", sh.RefersTo[0].Missing)
	_, err = l.st.OpenCheckpoint(t.Context(), ref, checkpoint.Options{})
	if !integrity.IsCorrupt(err) || !errors.Is(err, store.ErrNotFound) {
		t.Fatal(err)
	}
	says("open", err.Error())
}
