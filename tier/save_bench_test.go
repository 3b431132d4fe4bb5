package tier_test

import (
	"os"
	"syscall"
	"testing"
	"time"

	"github.com/flic-migrate/flic-migrate/stream/pipe"
	"github.com/flic-migrate/flic-migrate/tier/image"
	"github.com/flic-migrate/flic-migrate/tier/save"
	"github.com/flic-migrate/flic-migrate/tier/tiertest"
	"github.com/flic-migrate/flic-migrate/tier/vfs"
)

// BenchmarkSave saves a stream that comes through a pipe in pieces of 32 KiB, as
// QEMU's does: that of the file FLIC_BENCH_STREAM, or a synthetic one. cpu-ms is the
// CPU time of a save and of what feeds it; on a busy machine it says more than the
// wall time.
func BenchmarkSave(b *testing.B) {
	var data []byte
	if name := os.Getenv("FLIC_BENCH_STREAM"); name != "" {
		var err error
		if data, err = os.ReadFile(name); err != nil {
			b.Fatal(err)
		}
	} else {
		data = tiertest.New(tiertest.Options{Blocks: []tiertest.Block{{Name: "pc.ram", Size: 128 << 20}}}).Bytes()
	}
	b.SetBytes(int64(len(data)))
	var cpu time.Duration
	for b.Loop() {
		l := newLab(b, vfs.OS, b.TempDir())
		r, w, err := os.Pipe()
		if err != nil {
			b.Fatal(err)
		}
		go func() {
			for rest := data; len(rest) > 0; {
				n, err := w.Write(rest[:min(len(rest), 32<<10)])
				if err != nil {
					break
				}
				rest = rest[n:]
			}
			w.Close()
		}()
		in, err := pipe.New(b.Context(), int(r.Fd()))
		if err != nil {
			b.Fatal(err)
		}
		before := cpuTime(b)
		if _, _, err := l.run(b.Context(), in, save.Options{VM: "vm", Codec: image.DefaultCodec}); err != nil {
			b.Fatal(err)
		}
		cpu += cpuTime(b) - before
		in.Close()
		r.Close()
		os.RemoveAll(l.dir)
	}
	b.ReportMetric(float64(cpu.Milliseconds())/float64(b.N), "cpu-ms")
}

// cpuTime is what this process has used so far.
func cpuTime(b *testing.B) time.Duration {
	var u syscall.Rusage
	if err := syscall.Getrusage(syscall.RUSAGE_SELF, &u); err != nil {
		b.Fatal(err)
	}
	return time.Duration(u.Utime.Nano() + u.Stime.Nano())
}
