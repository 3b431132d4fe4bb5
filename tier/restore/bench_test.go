package restore_test

import (
	"context"
	"io"
	"path/filepath"
	"testing"

	"github.com/flic-migrate/flic-migrate/tier/checkpoint"
	"github.com/flic-migrate/flic-migrate/tier/dedup"
	"github.com/flic-migrate/flic-migrate/tier/image"
	"github.com/flic-migrate/flic-migrate/tier/restore"
	"github.com/flic-migrate/flic-migrate/tier/save"
	"github.com/flic-migrate/flic-migrate/tier/store"
	"github.com/flic-migrate/flic-migrate/tier/tiertest"
	"github.com/flic-migrate/flic-migrate/tier/tiertest/chain"
	"github.com/flic-migrate/flic-migrate/tier/vfs"
	"github.com/flic-migrate/flic-migrate/tier/workingset"
)

// saved saves a stream of 256 MiB of RAM on the real file system, each fifth page of
// it hot, and opens the checkpoint.
func saved(b *testing.B, codec image.Codec, mix tiertest.Mix) *store.Checkpoint {
	b.Helper()
	dir := b.TempDir()
	st, err := store.Open(b.Context(), vfs.OS, filepath.Join(dir, "store"), true)
	if err != nil {
		b.Fatal(err)
	}
	s := tiertest.New(tiertest.Options{Seed: 1, Mix: mix, Blocks: []tiertest.Block{{Name: "pc.ram", Size: 256 << 20}}})
	ws, err := workingset.New(s.PageSize(), []workingset.Block{{Name: "pc.ram", Pages: int64(s.Pages(0))}})
	if err != nil {
		b.Fatal(err)
	}
	for p := int64(0); p < int64(s.Pages(0)); p += 5 {
		ws.SetHeat(0, p, 1)
	}
	r := s.Reader()
	defer r.Close()
	ref, _, err := save.Run(b.Context(), vfs.OS, st, r, save.Options{VM: "vm", Codec: codec, Energy: dedup.EnergyFull,
		NVRAM: filepath.Join(dir, "nvram"), VolatileNVRAM: true, WorkingSet: ws})
	if err != nil {
		b.Fatal(err)
	}
	c, err := st.OpenCheckpoint(b.Context(), ref, checkpoint.Options{})
	if err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() { c.Close() })
	b.SetBytes(256 << 20)
	return c
}

var mixes = map[string]tiertest.Mix{
	"warm":       {tiertest.Zero: 1, tiertest.Text: 3, tiertest.Random: 1},
	"duplicates": {tiertest.Zero: 1, tiertest.Text: 2, tiertest.Duplicate: 1},
	"zero":       {tiertest.Zero: 8, tiertest.Sparse: 1},
}

func BenchmarkRestore(b *testing.B) {
	for name, mix := range mixes {
		for _, codec := range []image.Codec{image.LZ4, image.None} {
			b.Run(name+"/"+codec.String(), func(b *testing.B) {
				c := saved(b, codec, mix)
				for b.Loop() {
					if _, err := restore.Run(context.Background(), c.Checkpoint, io.Discard, restore.Options{}); err != nil {
						b.Fatal(err)
					}
				}
			})
		}
	}
}

// BenchmarkRestoreIncrement restores the second of two checkpoints, of which most pages
// are in the first, the tenth of ten, whose pages are in all of them, and copies of both
// that have all pages themselves.
func BenchmarkRestoreIncrement(b *testing.B) {
	for name, generations := range map[string]int{"second": 2, "tenth": 10} {
		const size = 64 << 20
		dir := b.TempDir()
		st, err := store.Open(b.Context(), vfs.OS, filepath.Join(dir, "store"), true)
		if err != nil {
			b.Fatal(err)
		}
		var streams []tiertest.Options
		for n := range generations {
			streams = append(streams, tiertest.Options{Seed: 1, Mix: mixes["warm"], Passes: 1 + n, Resend: 0.1, Blocks: []tiertest.Block{{Name: "pc.ram", Size: size}}})
		}
		list := chain.Build(b, st, chain.Options{Seed: 1, Streams: streams, Codec: image.MinLZ, Deltas: 0.9, Segment: func(int) int { return 32 }})
		last := list[len(list)-1].Ref
		c, err := st.OpenCheckpoint(b.Context(), last, checkpoint.Options{})
		if err != nil {
			b.Fatal(err)
		}
		whole, _, err := st.Copy(b.Context(), c, store.CopyOptions{Codec: image.MinLZ})
		if err != nil {
			b.Fatal(err)
		}
		c.Close()
		for kind, ref := range map[string]store.Ref{"increment": last, "whole": whole} {
			b.Run(name+"/"+kind, func(b *testing.B) {
				b.SetBytes(size)
				for b.Loop() {
					c, err := st.OpenCheckpoint(b.Context(), ref, checkpoint.Options{})
					if err != nil {
						b.Fatal(err)
					}
					rep, err := restore.Run(context.Background(), c.Checkpoint, io.Discard, restore.Options{})
					if err != nil {
						b.Fatal(err)
					}
					b.ReportMetric(rep.Reads.PerMB, "places/MB")
					b.ReportMetric(float64(rep.Refetch), "refetched")
					c.Close()
				}
			})
		}
	}
}

func BenchmarkVerify(b *testing.B) {
	for name, mix := range mixes {
		b.Run(name, func(b *testing.B) {
			c := saved(b, image.LZ4, mix)
			for b.Loop() {
				if err := c.Verify(context.Background(), func(err error) { b.Error(err) }); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}
