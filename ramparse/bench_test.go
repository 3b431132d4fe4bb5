package ramparse

import (
	"bytes"
	"testing"

	"github.com/flic-migrate/flic-migrate/stream"
)

func benchmark(b *testing.B, record func(dst []byte, addr uint64) []byte) {
	const pages = 16 << 10
	s := &Setup{Total: pages * 4096, Blocks: []Block{{Name: "pc.ram", Used: pages * 4096}}}
	in := AppendZero(AppendSetup(nil, s), "pc.ram", 0, 0)
	for i := uint64(1); i < pages; i++ {
		in = record(in, i*4096)
	}
	in = AppendEOS(in)
	b.SetBytes(int64(len(in)))
	b.ReportAllocs()
	for b.Loop() {
		c := stream.NewCursor(bytes.NewReader(in), 256<<10)
		d := NewDecoder(Options{PageSize: 4096})
		var rec Record
		for rec.Kind != EOS {
			if err := d.Next(c, &rec); err != nil {
				b.Fatal(err)
			}
		}
	}
}

func BenchmarkPage(b *testing.B) {
	page := bytes.Repeat([]byte{7}, 4096)
	benchmark(b, func(dst []byte, addr uint64) []byte { return AppendPage(dst, "", addr, page) })
}

func BenchmarkZero(b *testing.B) {
	benchmark(b, func(dst []byte, addr uint64) []byte { return AppendZero(dst, "", addr, 0) })
}
