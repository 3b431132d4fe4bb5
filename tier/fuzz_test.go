package tier_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"path/filepath"
	"runtime/metrics"
	"testing"

	"github.com/flic-migrate/flic-migrate/stream"
	"github.com/flic-migrate/flic-migrate/tier/checkpoint"
	"github.com/flic-migrate/flic-migrate/tier/dedup"
	"github.com/flic-migrate/flic-migrate/tier/image"
	"github.com/flic-migrate/flic-migrate/tier/restore"
	"github.com/flic-migrate/flic-migrate/tier/save"
	"github.com/flic-migrate/flic-migrate/tier/store"
	"github.com/flic-migrate/flic-migrate/tier/tiertest"
	"github.com/flic-migrate/flic-migrate/tier/tiertest/chain"
	"github.com/flic-migrate/flic-migrate/tier/vfs/crashfs"
)

// allocated is how many bytes this process has allocated so far.
func allocated() uint64 {
	s := []metrics.Sample{{Name: "/gc/heap/allocs:bytes"}}
	metrics.Read(s)
	return s[0].Value.Uint64()
}

// seeds are streams with little of everything.
var seeds = []tiertest.Options{
	{Seed: 1},
	{Seed: 2, Passes: 3, Resend: 0.5, XBZRLE: true, Flush: true, Fill: true},
	{Seed: 3, Compress: 0.5, Shuffle: true, NoEnd: true, NoDescription: true},
	{Seed: 4, ReturnPath: true, DirtyBitmap: true, Named: 0.5},
	{Seed: 5, NoConfiguration: true, Passes: 2, Resend: 0.3},
	{Seed: 6, Unknown: tiertest.Record, Passes: 3, Resend: 0.4, UnknownPass: 2},
	{Seed: 7, Unknown: tiertest.Section},
	{Seed: 8, IgnoreShared: true, EmptyTail: true},
	{Seed: 9, Early: 1, ReturnPath: true},
	{Seed: 10, Early: 1, EarlyBehind: true, DirtyBitmap: true},
}

// FuzzSave saves any stream. Whatever is accepted verifies, and is the same
// guest when it is restored, loaded, saved and restored again. It may not take
// memory out of proportion.
func FuzzSave(f *testing.F) {
	for i, o := range seeds {
		o.Mix = tiertest.Mix{tiertest.Zero: 3, tiertest.Sparse: 2, tiertest.Duplicate: 1}
		f.Add(tiny(o).Bytes(), byte(i))
	}
	f.Fuzz(func(t *testing.T, b []byte, mode byte) {
		o := save.Options{VM: "vm", Codec: image.LZ4, SegmentPages: 2, Workers: 1, Energy: dedup.EnergyFull, ReturnPath: io.Discard}
		if mode&1 != 0 {
			o.Energy = dedup.EnergyLow
		}
		l := newLab(t, crashfs.New(0), "/")
		if mode&2 != 0 {
			o.NVRAM, o.WorkingSet = l.nvram, hotSet(t, tiny(tiertest.Options{}), every(2))
		}
		before := allocated()
		ref, meta, err := l.run(context.Background(), bytes.NewReader(b), o)
		// A page record can make a leaf of the page map.
		if n := allocated() - before; n > 64<<20+4096*uint64(len(b)) {
			t.Errorf("%d bytes allocated for a stream of %d", n, len(b))
		}
		if err != nil {
			if refs, err := l.st.List(context.Background(), ""); err != nil || len(refs) != 0 {
				t.Errorf("failed, and %v is there: %v", refs, err)
			}
			l.noLeaks(t)
			return
		}
		for _, err := range l.verify(ref) {
			t.Errorf("verify: %v", err)
		}
		once := l.restored(t, ref)
		if meta.Report.Resent == 0 && !bytes.Equal(once, b) {
			t.Error("each page came once, and the restored stream is another")
		}
		again, againMeta, err := l.run(context.Background(), bytes.NewReader(once), o)
		if err != nil {
			t.Fatalf("the restored stream can't be saved: %v", err)
		}
		twice := l.restored(t, again)
		if againMeta.Report.Resent == 0 && !bytes.Equal(once, twice) {
			t.Error("saved and restored again it is another")
		}
		// Streams that can't be loaded by us are given back as they came.
		want, err := tiertest.Load(bytes.NewReader(b))
		if err != nil {
			if !errors.Is(err, stream.ErrUnknown) && meta.OpaqueBytes == 0 {
				t.Errorf("accepted, and does not load: %v", err)
			}
			return
		}
		for _, b := range [][]byte{once, twice} {
			got, err := tiertest.Load(bytes.NewReader(b))
			if err != nil {
				t.Fatalf("the restored stream does not load: %v", err)
			}
			if err := want.SamePages(got); err != nil {
				t.Errorf("%v", err)
			}
		}
		l.noLeaks(t)
	})
}

// FuzzCheckpoint puts any file in an image's place, as it is and with its
// checksums put right.
func FuzzCheckpoint(f *testing.F) {
	l := newLab(f, crashfs.New(0), "/")
	const name = "/store/vms/vm/00000001.flic"
	file := func(t testing.TB) (b []byte) {
		h, err := l.fs.Open(name)
		if err != nil {
			t.Fatal(err)
		}
		defer h.Close()
		n, err := h.Size()
		if err != nil {
			t.Fatal(err)
		}
		b = make([]byte, n)
		if _, err := h.ReadAt(b, 0); err != nil {
			t.Fatal(err)
		}
		return b
	}
	for i, o := range seeds {
		s := tiny(o)
		so := save.Options{Codec: image.None, SegmentPages: 2}
		if i == len(seeds)-1 {
			// The one whose NVRAM part there is later on.
			so.WorkingSet = hotSet(f, s, every(3))
		}
		ref, _ := l.save(f, s, so)
		if ref.N == 1 {
			f.Add(file(f))
			continue
		}
		if err := l.fs.Replace("/store/vms/vm/0000000"+string(rune('0'+ref.N))+".flic", name); err != nil {
			f.Fatal(err)
		}
		f.Add(file(f))
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		if len(b) > 1<<20 {
			return
		}
		before := allocated()
		for range 2 {
			h, err := l.fs.OpenRW(name)
			if err != nil {
				t.Fatal(err)
			}
			h.Truncate(0)
			h.WriteAt(b, 0)
			h.Close()
			readAll(t, l, store.Ref{VM: "vm", N: 1})
			b = bytes.Clone(b)
			tiertest.Reseal(b)
		}
		if n := allocated() - before; n > 512<<20+256*uint64(len(b)) {
			t.Errorf("%d bytes allocated for an image of %d", n, len(b))
		}
		l.noLeaks(t)
	})
}

// FuzzReferences puts any file in the place of one of three images of a chain, as it is
// and with its checksums put right, and reads the last of them.
func FuzzReferences(f *testing.F) {
	l := newLab(f, crashfs.New(0), "/")
	streams := generations(1, 3, []tiertest.Block{{Name: "ram", Size: 40 << 10}, {Name: "rom", Size: 2 << 10}})
	for i := range streams {
		streams[i].PageSize, streams[i].PageBits = 1<<10, true
	}
	list := chain.Build(f, l.st, chain.Options{Seed: 1, Streams: streams, Codec: image.None, NVRAM: l.nvram, Deltas: 0.9, Scattered: 0.2,
		Disk: filepath.Join(f.TempDir(), "disk")})
	name := func(n int) string { return fmt.Sprintf("/vms/vm/%08d.flic", 1+n) }
	var was [][]byte
	for n := range list {
		was = append(was, l.file(f, name(n)))
		f.Add(was[n], byte(n))
	}
	f.Fuzz(func(t *testing.T, b []byte, which byte) {
		if len(b) > 1<<20 {
			return
		}
		n := int(which) % len(list)
		before := allocated()
		for range 2 {
			l.write(t, name(n), b)
			readAll(t, l, list[2].Ref)
			b = bytes.Clone(b)
			tiertest.Reseal(b)
		}
		if n := allocated() - before; n > 512<<20+256*uint64(len(b)) {
			t.Errorf("%d bytes allocated for an image of %d", n, len(b))
		}
		l.write(t, name(n), was[n])
		l.noLeaks(t)
	})
}

// readAll verifies and restores what is there, up to some MB of stream.
func readAll(t *testing.T, l *lab, ref store.Ref) {
	c, err := l.st.OpenCheckpoint(context.Background(), ref, checkpoint.Options{})
	if err != nil {
		return
	}
	defer c.Close()
	var found []error
	if err := c.Verify(context.Background(), func(err error) { found = append(found, err) }); err != nil {
		t.Errorf("verify: %v", err)
	}
	enough := errors.New("enough")
	_, err = restore.Run(context.Background(), c.Checkpoint, &failingWriter{left: 4 << 20, err: enough}, restore.Options{Workers: 1})
	if err != nil && !errors.Is(err, enough) && len(found) == 0 {
		t.Errorf("verify found nothing, and the restore: %v", err)
	}
}
