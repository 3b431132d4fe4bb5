package replay

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"go.uber.org/goleak"

	"github.com/flic-migrate/flic-migrate/tier/image"
	"github.com/flic-migrate/flic-migrate/tier/save"
	"github.com/flic-migrate/flic-migrate/tier/store"
	"github.com/flic-migrate/flic-migrate/tier/tiertest"
	"github.com/flic-migrate/flic-migrate/tier/vfs"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func newReplayer(t testing.TB, fsys vfs.FS) *Replayer {
	t.Helper()
	st, err := store.Open(context.Background(), vfs.OS, t.TempDir()+"/store", true)
	if err != nil {
		t.Fatal(err)
	}
	return &Replayer{FS: fsys, Store: st, Scratch: t.TempDir(), Options: save.Options{Codec: image.MinLZ}}
}

func write(t testing.TB, name string, b []byte) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), name)
	if err := os.WriteFile(path, b, 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

func TestStream(t *testing.T) {
	for name, o := range tiertest.Shapes {
		for _, hot := range []int{0, 3} {
			p := newReplayer(t, vfs.OS)
			p.HotEvery = hot
			s := tiertest.New(o)
			want := Identical
			if o.Passes > 1 {
				want = Equal
			}
			res, err := p.Stream(context.Background(), write(t, "s", s.Bytes()))
			if err != nil || res.Result != want || res.Bytes != s.Layout().Len || res.FlashBytes == 0 {
				t.Errorf("%s, every %dth hot: %+v, %v", name, hot, res, err)
			}
			if (res.NVRAMBytes > 0) != (hot > 0 && name != "fill") {
				t.Errorf("%s, every %dth hot: %d bytes in NVRAM", name, hot, res.NVRAMBytes)
			}
			if refs, err := p.Store.List(context.Background(), ""); err != nil || len(refs) > 0 {
				t.Errorf("%s: left %v, %v", name, refs, err)
			}
			if rep, err := p.Store.GC(context.Background()); err != nil || rep.NVRAMExtents > 0 || rep.Parts > 0 {
				t.Errorf("%s: left %+v, %v", name, rep, err)
			}
		}
	}
}

func TestStreamRefused(t *testing.T) {
	whole := tiertest.New(tiertest.Options{}).Bytes()
	cut := whole[:len(whole)/2]
	for _, c := range []struct {
		name   string
		b      []byte
		want   string
		reason string
	}{
		{"a.refused.stream", cut, Refused, "truncated"},
		{"a.stream", cut, Different, "truncated"},
		{"a.refused.stream", whole, Different, "has to be refused"},
		{"a.refused.zst", []byte("what is this"), Refused, "not a QEMU migration stream"},
		{"a.refused", cut, Different, "truncated"}, // the dot behind it counts
	} {
		p := newReplayer(t, vfs.OS)
		p.HotEvery = 2
		res, err := p.Stream(context.Background(), write(t, c.name, c.b))
		if err != nil || res.Result != c.want || !strings.Contains(res.Reason, c.reason) {
			t.Errorf("%s: %+v, %v", c.name, res, err)
		}
	}
}

// fullDisk has no room for a single byte.
type fullDisk struct{ vfs.FS }

type fullFile struct{ vfs.File }

func (fullFile) Write([]byte) (int, error) { return 0, syscall.ENOSPC }

func (d fullDisk) NoLinks(dir string) (vfs.FS, error) {
	fsys, err := d.FS.NoLinks(dir)
	return fullDisk{fsys}, err
}

func (d fullDisk) Create(name string) (vfs.File, error) {
	f, err := d.FS.Create(name)
	return fullFile{f}, err
}

// A replay that could not be done is no verdict.
func TestStreamFails(t *testing.T) {
	path := write(t, "a.refused.stream", tiertest.New(tiertest.Options{}).Bytes())
	p := newReplayer(t, vfs.OS)
	st, err := store.Open(context.Background(), fullDisk{vfs.OS}, p.Store.Dir(), false)
	if err != nil {
		t.Fatal(err)
	}
	p.Store = st
	if res, err := p.Stream(context.Background(), path); !errors.Is(err, syscall.ENOSPC) {
		t.Errorf("%+v, %v", res, err)
	}
	if res, err := p.Stream(context.Background(), path+"x"); !os.IsNotExist(err) {
		t.Errorf("%+v, %v", res, err)
	}
}

// A checkpoint of another stream than the one it is compared with: the check
// sees it, whatever the difference.
func TestCheckFindsDifference(t *testing.T) {
	ctx := context.Background()
	for name, c := range map[string]struct{ saved, recorded tiertest.Options }{
		"bytes":           {tiertest.Options{}, tiertest.Options{Seed: 1}},
		"bytes, resent":   {tiertest.Options{Seed: 1}, tiertest.Options{Passes: 2, Resend: 0.5}},
		"a version":       {tiertest.Options{}, tiertest.Options{Passes: 2, Resend: 0.5}},
		"a device":        {tiertest.Options{}, tiertest.Options{Tail: 2000}},
		"nothing is sent": {tiertest.Options{}, tiertest.Options{Mix: tiertest.Mix{tiertest.Absent: 1}}},
	} {
		p := newReplayer(t, vfs.OS)
		ref, meta, err := save.Run(ctx, p.FS, p.Store, tiertest.New(c.saved).Reader(), save.Options{VM: vm})
		if err != nil {
			t.Fatal(err)
		}
		res := Result{}
		err = p.check(ctx, write(t, "s", tiertest.New(c.recorded).Bytes()), ref, meta, &res)
		if err != nil || res.Result != Different || !strings.Contains(res.Reason, "differs") {
			t.Errorf("%s: %+v, %v", name, res, err)
		}
	}
}

// A damaged checkpoint is a difference, named by verify.
func TestCheckFindsDamage(t *testing.T) {
	ctx := context.Background()
	p := newReplayer(t, vfs.OS)
	b := tiertest.New(tiertest.Options{}).Bytes()
	ref, meta, err := save.Run(ctx, p.FS, p.Store, strings.NewReader(string(b)), save.Options{VM: vm})
	if err != nil {
		t.Fatal(err)
	}
	name := filepath.Join(p.Store.Dir(), "vms", vm, "00000001.flic")
	img, err := os.ReadFile(name)
	if err != nil {
		t.Fatal(err)
	}
	img[1000] ^= 1
	if err := os.WriteFile(name, img, 0o600); err != nil {
		t.Fatal(err)
	}
	res := Result{}
	if err := p.check(ctx, write(t, "s", b), ref, meta, &res); err != nil || res.Result != Different || !strings.HasPrefix(res.Reason, "verify: "+name) {
		t.Errorf("%+v, %v", res, err)
	}
}

func TestStreamCancelled(t *testing.T) {
	ctx, cancel := context.WithCancel(context.Background())
	path := write(t, "s", tiertest.New(tiertest.Options{}).Bytes())
	p := newReplayer(t, vfs.OS)
	cancel()
	if res, err := p.Stream(ctx, path); !errors.Is(err, context.Canceled) {
		t.Errorf("%+v, %v", res, err)
	}
}
