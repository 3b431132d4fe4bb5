package tier_test

import (
	"fmt"
	"testing"
	"time"

	"github.com/flic-migrate/flic-migrate/tier/checkpoint"
	"github.com/flic-migrate/flic-migrate/tier/image"
	"github.com/flic-migrate/flic-migrate/tier/save"
	"github.com/flic-migrate/flic-migrate/tier/store"
	"github.com/flic-migrate/flic-migrate/tier/tiertest"
	"github.com/flic-migrate/flic-migrate/tier/vfs"
)

// BenchmarkThousand makes checkpoint after checkpoint of one guest, of which some pages
// change each time, and says what a save, a list, a removal and a gc take with 100 and
// with 1000 of them there, and what the store takes for each. The removed one is in the
// middle, where others need it.
func BenchmarkThousand(b *testing.B) {
	for b.Loop() {
		l := newLab(b, vfs.OS, b.TempDir())
		var streams []*tiertest.Stream
		for i := range 16 {
			streams = append(streams, generation(tiertest.Options{Seed: 1, Blocks: []tiertest.Block{{Name: "pc.ram", Size: 4 << 20}}}, i+1))
		}
		took := func(name string, n int, fn func() error) {
			begin := time.Now()
			if err := fn(); err != nil {
				b.Fatal(err)
			}
			b.ReportMetric(float64(time.Since(begin).Microseconds())/1e3, fmt.Sprintf("ms-%s-%d", name, n))
		}
		last, before := int64(0), 0
		for n := 1; n <= 1000; n++ {
			one := func() error {
				_, _, err := l.trySave(streams[n%len(streams)], save.Options{Codec: image.LZ4})
				return err
			}
			if n != 100 && n != 1000 {
				if err := one(); err != nil {
					b.Fatal(err)
				}
				continue
			}
			took("save", n, one)
			took("list", n, func() error {
				list, err := l.st.Listing(b.Context(), "")
				if err == nil && len(list) < n-1 {
					err = fmt.Errorf("%d are listed", len(list))
				}
				return err
			})
			took("show", n, func() error { _, err := l.st.Sharing(b.Context(), store.Ref{VM: "vm", N: n}); return err })
			took("open", n, func() error {
				c, err := l.st.OpenCheckpoint(b.Context(), store.Ref{VM: "vm"}, checkpoint.Options{})
				if err == nil {
					err = c.Close()
				}
				return err
			})
			took("rm", n, func() error { return l.remove(store.Ref{VM: "vm", N: n / 2}) })
			took("gc", n, func() error { _, err := l.st.GC(b.Context()); return err })
			flash, _ := l.taken(b)
			b.ReportMetric(float64(flash-last)/1024/float64(n-before), fmt.Sprintf("KiB-each-%d", n))
			last, before = flash, n
		}
		refs, err := l.st.List(b.Context(), "")
		if err != nil {
			b.Fatal(err)
		}
		took("rm-all", len(refs), func() error {
			rm := l.st.Remover()
			for i := len(refs) - 1; i >= 0; i-- {
				if _, err := rm.Remove(b.Context(), refs[i]); err != nil {
					return err
				}
			}
			return nil
		})
		if flash, _ := l.taken(b); flash != 0 {
			b.Errorf("%d bytes are not free", flash)
		}
	}
}
