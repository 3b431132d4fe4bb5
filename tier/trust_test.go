package tier_test

import (
	"bytes"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/flic-migrate/flic-migrate/tier/checkpoint"
	"github.com/flic-migrate/flic-migrate/tier/digest"
	"github.com/flic-migrate/flic-migrate/tier/disk"
	"github.com/flic-migrate/flic-migrate/tier/image"
	"github.com/flic-migrate/flic-migrate/tier/save"
	"github.com/flic-migrate/flic-migrate/tier/store"
	"github.com/flic-migrate/flic-migrate/tier/tiertest"
	"github.com/flic-migrate/flic-migrate/tier/tiertest/chain"
	"github.com/flic-migrate/flic-migrate/tier/vfs"
	"github.com/flic-migrate/flic-migrate/tier/vfs/crashfs"
)

// keyOf is the key of a checkpoint's digests.
func keyOf(m *checkpoint.Meta) digest.Key { return m.Digests.Key }

// TestTrustDomain looks at which domains checkpoints are in, and that all of one have one
// key, whatever becomes of the file that it is in.
func TestTrustDomain(t *testing.T) {
	l := newLab(t, vfs.OS, t.TempDir())
	s := tiertest.New(tiertest.Options{Seed: 1})
	in := func(vm, asked, want string, o save.Options) *checkpoint.Meta {
		t.Helper()
		o.VM, o.TrustDomain = vm, asked
		ref, meta := l.save(t, s, o)
		if meta.TrustDomain != want {
			t.Errorf("%v is in domain %q, want %q", ref, meta.TrustDomain, want)
		}
		if id, err := l.st.Describe(t.Context(), ref); err != nil || id.TrustDomain != want {
			t.Errorf("%v says that it is in %q: %v", ref, id.TrustDomain, err)
		}
		return meta
	}
	a := in("a", "", store.DefaultDomain, save.Options{})
	b := in("b", "", store.DefaultDomain, save.Options{})
	c := in("c", "c's", "c's", save.Options{})
	if keyOf(a) != keyOf(b) || keyOf(a) == keyOf(c) {
		t.Error("keys are not by domain")
	}
	// It goes on in its domain, whether it has a parent or not.
	if n := in("c", "", "c's", save.Options{}); keyOf(n) != keyOf(c) || n.Report.Parent != "c@1" {
		t.Errorf("after %v: parent %q, another key %t", c.Created, n.Report.Parent, keyOf(n) != keyOf(c))
	}
	if n := in("c", "", "c's", save.Options{Parent: save.ParentNone}); keyOf(n) != keyOf(c) {
		t.Error("without a parent it has another key")
	}
	// Another domain: nothing is referred to, and that is said.
	var log bytes.Buffer
	n := in("c", "default", store.DefaultDomain, save.Options{Share: save.ShareNone, Log: slog.New(slog.NewTextHandler(&log, nil))})
	if n.Report.Parent != "" || len(n.References) > 0 || keyOf(n) != keyOf(a) || !strings.Contains(log.String(), "c's") {
		t.Errorf("it refers to another domain's %q, or does not say that it can't: %s", n.Report.Parent, &log)
	}
	if _, _, err := l.trySave(s, save.Options{VM: "d", Parent: "a@1", TrustDomain: "c's"}); err == nil || !strings.Contains(err.Error(), "trust domain") {
		t.Errorf("a parent of another domain: %v", err)
	}
	// Whose parent is named stays in its own domain all the same.
	if _, _, err := l.trySave(s, save.Options{VM: "c", Parent: "c@1"}); err == nil || !strings.Contains(err.Error(), "trust domain") {
		t.Errorf("a named parent of another domain than the newest: %v", err)
	}
	if n := in("d", "", "c's", save.Options{Parent: "c@1"}); n.Report.Parent != "c@1" {
		t.Errorf("the parent is %q", n.Report.Parent)
	}
	if _, _, err := l.trySave(s, save.Options{VM: "d", TrustDomain: "../d"}); err == nil {
		t.Error("a path is taken for a domain")
	}
	// Lost or damaged, the key is found in the checkpoints.
	key := filepath.Join(l.dir, "share", "c's", "key.json")
	for _, harm := range []func() error{
		func() error { return os.Remove(key) },
		func() error { return os.WriteFile(key, []byte("nonsense"), 0o600) },
		func() error { return os.RemoveAll(filepath.Join(l.dir, "share")) },
	} {
		if err := harm(); err != nil {
			t.Fatal(err)
		}
		if n := in("new", "c's", "c's", save.Options{Parent: save.ParentNone}); keyOf(n) != keyOf(c) {
			t.Error("a lost key was not found again")
		}
	}
	l.noLeaks(t)
}

// TestTrustOfDisks makes the key of disk images and that of the default domain in either
// order: they are one, so that a page has one digest.
func TestTrustOfDisks(t *testing.T) {
	for _, first := range []bool{false, true} {
		l := newLab(t, vfs.OS, t.TempDir())
		var key digest.Key
		index := func() {
			path := filepath.Join(t.TempDir(), "disk.img")
			if err := os.WriteFile(path, make([]byte, 1<<20), 0o600); err != nil {
				t.Fatal(err)
			}
			if old := time.Now().Add(-time.Hour); os.Chtimes(path, old, old) != nil {
				t.Fatal("its times can't be set")
			}
			img, err := disk.Open(t.Context(), path, disk.Raw)
			if err != nil {
				t.Fatal(err)
			}
			defer img.Close()
			c, err := l.st.Disks()
			if err != nil {
				t.Fatal(err)
			}
			if _, err := c.Build(t.Context(), img, disk.BuildOptions{}); err != nil {
				t.Fatal(err)
			}
			h, err := c.Hasher(t.Context())
			if err != nil {
				t.Fatal(err)
			}
			key = h.Key()
		}
		if first {
			index()
		}
		_, meta := l.save(t, tiertest.New(tiertest.Options{Seed: 1}), save.Options{})
		if !first {
			index()
		}
		if keyOf(meta) != key {
			t.Errorf("disks first %t: two keys", first)
		}
	}
}

// TestTrustOfEarlier saves a VM of which an earlier version made the first checkpoint: it
// goes on without a domain, and begins anew in one.
func TestTrustOfEarlier(t *testing.T) {
	l := newLab(t, crashfs.New(0), "/")
	streams := generations(5, 2, chainBlocks)
	list := chain.Build(t, l.st, chain.Options{Seed: 5, Streams: streams, Codec: image.LZ4})
	vm, s := list[0].Ref.VM, tiertest.New(streams[1])
	_, meta := l.save(t, s, save.Options{VM: vm, TrustDomain: store.DefaultDomain})
	if meta.TrustDomain != "" || meta.Report.Parent == "" {
		t.Errorf("it has a key of its own, and is in domain %q", meta.TrustDomain)
	}
	if _, meta = l.save(t, s, save.Options{VM: vm, Parent: save.ParentNone}); meta.TrustDomain != store.DefaultDomain {
		t.Errorf("anew, it is in domain %q", meta.TrustDomain)
	}
}
