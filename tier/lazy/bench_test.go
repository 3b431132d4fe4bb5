package lazy_test

import (
	"io"
	"testing"

	"github.com/flic-migrate/flic-migrate/stream/returnpath"
	"github.com/flic-migrate/flic-migrate/tier/lazy"
	"github.com/flic-migrate/flic-migrate/tier/save"
	"github.com/flic-migrate/flic-migrate/tier/tiertest"
)

// BenchmarkServe is the server's own work: a QEMU that asks for nothing and reads as
// fast as it can.
func BenchmarkServe(b *testing.B) {
	for _, tc := range []struct {
		name string
		o    tiertest.Options
		hot  uint64
	}{
		{"few runs", tiertest.Options{Mix: tiertest.Mix{tiertest.Text: 1}}, 0},
		{"a run a page", tiertest.Options{Mix: tiertest.Mix{tiertest.Duplicate: 1}, Pool: 8000}, 0},
		{"all hot", tiertest.Options{Mix: tiertest.Mix{tiertest.Text: 1}}, 1},
	} {
		b.Run(tc.name, func(b *testing.B) {
			tc.o.Blocks = []tiertest.Block{{Name: "pc.ram", Size: 256 << 20}}
			s := newSaved(b, tc.o, tc.hot, save.Options{})
			b.SetBytes(256 << 20)
			b.ReportAllocs()
			for b.Loop() {
				in, rp := io.Pipe()
				go rp.Write(returnpath.AppendPong(nil, 3))
				_, err := lazy.Serve(b.Context(), s.ck, in, io.Discard, lazy.Options{})
				check(b, err)
				rp.Close()
			}
		})
	}
}
