package tier_test

import (
	"bytes"
	"context"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"syscall"
	"testing"
	"time"

	"github.com/flic-migrate/flic-migrate/ramparse"
	"github.com/flic-migrate/flic-migrate/stream"
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
		in, closeIn := piped(b, data)
		before := cpuTime(b)
		if _, _, err := l.run(b.Context(), in, save.Options{VM: "vm", Codec: image.DefaultCodec}); err != nil {
			b.Fatal(err)
		}
		cpu += cpuTime(b) - before
		closeIn()
		os.RemoveAll(l.dir)
	}
	b.ReportMetric(float64(cpu.Milliseconds())/float64(b.N), "cpu-ms")
}

// piped is a pipe that a stream comes through as QEMU sends it.
func piped(b *testing.B, data []byte) (in *pipe.Reader, closeIn func()) {
	b.Helper()
	r, w, err := os.Pipe()
	if err != nil {
		b.Fatal(err)
	}
	go func() {
		defer w.Close()
		for some := range slices.Chunk(data, 32<<10) {
			if _, err := w.Write(some); err != nil {
				return
			}
		}
	}()
	if in, err = pipe.New(b.Context(), int(r.Fd())); err != nil {
		b.Fatal(err)
	}
	return in, func() {
		in.Close()
		r.Close()
	}
}

// cpuTime is what this process has used so far.
func cpuTime(b *testing.B) time.Duration {
	var u syscall.Rusage
	if err := syscall.Getrusage(syscall.RUSAGE_SELF, &u); err != nil {
		b.Fatal(err)
	}
	return time.Duration(u.Utime.Nano() + u.Stime.Nano())
}

// BenchmarkHeld lets a save go on that is held, again and again, as an armed checkpoint is. Of
// one guest the streams of FLIC_BENCH_STREAMS come one after the other, separated by colons:
// all but the last two are its checkpoints so far, the last but one is held, and then those
// pages come that are different in the last. release-ms is from there until all is durable,
// and cpu-ms this process's CPU time meanwhile, the feeding of the pages included.
func BenchmarkHeld(b *testing.B) {
	list := filepath.SplitList(os.Getenv("FLIC_BENCH_STREAMS"))
	if len(list) < 3 {
		b.Skip("FLIC_BENCH_STREAMS names no streams")
	}
	var streams [][]byte
	for _, name := range list {
		data, err := os.ReadFile(name)
		if err != nil {
			b.Fatal(err)
		}
		streams = append(streams, data)
	}
	n := len(streams) - 2
	held := sentAgain(b, streams[n], streams[n+1])
	l := newLab(b, vfs.OS, b.TempDir())
	for _, data := range streams[:n] {
		if _, _, err := l.run(b.Context(), bytes.NewReader(data), save.Options{VM: "vm"}); err != nil {
			b.Fatal(err)
		}
	}
	parent := fmt.Sprintf("vm@%d", n)
	var wall, cpu time.Duration
	var size int64
	for b.Loop() {
		in, closeIn := piped(b, held)
		var start time.Time
		var before time.Duration
		ref, meta, err := l.run(b.Context(), in, save.Options{VM: "vm", Parent: parent, Codec: image.DefaultCodec, Hold: &save.Hold{
			Buffer: 64 << 10,
			Wait: func(context.Context) (string, error) {
				time.Sleep(time.Second / 2) // as a guest runs for a while
				start, before = time.Now(), cpuTime(b)
				return "", nil
			},
		}})
		if err != nil {
			b.Fatal(err)
		}
		wall, cpu = wall+time.Since(start), cpu+cpuTime(b)-before
		size += meta.Report.FlashBytes
		closeIn()
		if err := l.remove(ref); err != nil {
			b.Fatal(err)
		}
	}
	b.ReportMetric(wall.Seconds()*1e3/float64(b.N), "release-ms")
	b.ReportMetric(cpu.Seconds()*1e3/float64(b.N), "cpu-ms")
	b.ReportMetric(float64(size)/1e6/float64(b.N), "MB")
}

// sentAgain is the first stream, but for this: before RAM ends, those pages come again that are
// different in the second.
func sentAgain(b *testing.B, first, second []byte) []byte {
	b.Helper()
	type place struct {
		block int
		page  uint64
	}
	pages := make(map[place]string)
	walk := func(data []byte, record func(*ramparse.Decoder, *ramparse.Record) error) {
		c := stream.NewCursor(bytes.NewReader(data), 0)
		if err := ramparse.NewWalker(c, 0, ramparse.Visitor{Record: record}).RAM(); err != nil {
			b.Fatal(err)
		}
	}
	content := func(rec *ramparse.Record) string {
		if rec.Kind == ramparse.Zero {
			return string([]byte{rec.Fill})
		}
		return string(rec.Data)
	}
	var eos int64
	walk(first, func(_ *ramparse.Decoder, rec *ramparse.Record) error {
		switch rec.Kind {
		case ramparse.Zero, ramparse.Page:
			pages[place{rec.Block, rec.Page}] = content(rec)
		case ramparse.EOS:
			eos = rec.Offset
		}
		return nil
	})
	out := slices.Clone(first[:eos])
	walk(second, func(d *ramparse.Decoder, rec *ramparse.Record) error {
		if rec.Kind != ramparse.Zero && rec.Kind != ramparse.Page || pages[place{rec.Block, rec.Page}] == content(rec) {
			return nil
		}
		name := d.Setup().Blocks[rec.Block].Name
		if rec.Kind == ramparse.Zero {
			out = ramparse.AppendZero(out, name, rec.Addr, rec.Fill)
		} else {
			out = ramparse.AppendPage(out, name, rec.Addr, rec.Data)
		}
		return nil
	})
	return append(out, first[eos:]...)
}
