package tier_test

import (
	"bytes"
	"context"
	"fmt"
	"testing"

	"github.com/flic-migrate/flic-migrate/tier/checkpoint"
	"github.com/flic-migrate/flic-migrate/tier/dedup"
	"github.com/flic-migrate/flic-migrate/tier/image"
	"github.com/flic-migrate/flic-migrate/tier/pagemap"
	"github.com/flic-migrate/flic-migrate/tier/save"
	"github.com/flic-migrate/flic-migrate/tier/store"
	"github.com/flic-migrate/flic-migrate/tier/tiertest"
)

var manyBlocks = []tiertest.Block{
	{Name: "vga.vram", Size: 256 << 10}, {Name: "pc.ram", Size: 1200 << 10},
	{Name: "0000:00:03.0/pci.rom", Size: 192 << 10}, {Name: "/rom@etc/table-loader", Size: 64 << 10},
}

// streams are the shapes that a round trip must survive.
var streams = map[string]tiertest.Options{
	"stopped":         {Seed: 1},
	"blocks":          {Seed: 2, Blocks: manyBlocks, Named: 0.05, Fill: true},
	"sparse":          {Seed: 3, Blocks: manyBlocks, Mix: tiertest.Mix{tiertest.Absent: 4, tiertest.Zero: 1, tiertest.Text: 1, tiertest.Duplicate: 1}},
	"live":            {Seed: 4, Blocks: manyBlocks, Passes: 4, Resend: 0.4, Flush: true},
	"live duplicates": {Seed: 5, Passes: 6, Resend: 0.6, Pool: 3, Mix: tiertest.Mix{tiertest.Duplicate: 3, tiertest.Zero: 1}},
	"xbzrle":          {Seed: 6, Blocks: manyBlocks, Passes: 5, Resend: 0.4, XBZRLE: true, Fill: true},
	"compressed":      {Seed: 7, Blocks: manyBlocks, Compress: 1, Shuffle: true},
	"half compressed": {Seed: 8, Passes: 3, Resend: 0.3, Compress: 0.5, XBZRLE: true},
	"background":      {Seed: 9, Blocks: manyBlocks, Shuffle: true, NoEnd: true},
	"return path":     {Seed: 10, ReturnPath: true, Passes: 2, Resend: 0.2},
	"pages of 64K":    {Seed: 11, PageSize: 64 << 10, PageBits: true, Blocks: []tiertest.Block{{Name: "mach-virt.ram", Size: 6 << 20}}, Passes: 2, Resend: 0.2, XBZRLE: true},
	"pages of 16K":    {Seed: 12, PageSize: 16 << 10, PageBits: true, Blocks: []tiertest.Block{{Name: "m", Size: 2<<20 + 5<<10}}},
	"pages of 8K":     {Seed: 13, PageSize: 8 << 10, Advise: true},
	"pages of 1K":     {Seed: 14, PageSize: 1 << 10, PageBits: true, Blocks: []tiertest.Block{{Name: "m", Size: 300 << 10}}},
	"inferred 16K":    {Seed: 15, PageSize: 16 << 10, Mix: tiertest.Mix{tiertest.Random: 1, tiertest.Text: 1}},
	"old machine":     {Seed: 16, NoConfiguration: true, Passes: 2, Resend: 0.3},
	"no description":  {Seed: 17, NoDescription: true, Tail: 200 << 10},
	"long tail":       {Seed: 18, Tail: 900 << 10},
	"no devices":      {Seed: 19, EmptyTail: true},
	"nothing but eof": {Seed: 20, EmptyTail: true, NoDescription: true, NoEnd: true},
	"disks":           {Seed: 21, DirtyBitmap: true, BlockMigration: true, PartLen: 60, Blocks: manyBlocks},
	"disk first":      {Seed: 22, BlocksFirst: 2},
	"shared":          {Seed: 23, IgnoreShared: true, Blocks: []tiertest.Block{{Name: "shm", Size: 1 << 20, Shared: true}, {Name: "pc.ram", Size: 512 << 10, HostPage: 2 << 20}}},
	"only zero":       {Seed: 24, Mix: tiertest.Mix{tiertest.Zero: 1}, Fill: true},
	"only zero data":  {Seed: 25, Mix: tiertest.Mix{tiertest.ZeroData: 1}},
	"all alike":       {Seed: 26, Mix: tiertest.Mix{tiertest.Alike: 1, tiertest.Sparse: 1, tiertest.Duplicate: 1}, Pool: 1},
	"virtio-mem":      {Seed: 28, Early: 3, Blocks: []tiertest.Block{{Name: "vm0", Size: 2 << 20, Shared: true}, {Name: "pc.ram", Size: 512 << 10}}},
	"QEMU 10's":       {Seed: 29, Early: 3, EarlyBehind: true, ReturnPath: true, DirtyBitmap: true, Passes: 2, Resend: 0.3},
	"all unplugged":   {Seed: 30, Early: 1, Blocks: []tiertest.Block{{Name: "vm0", Size: 2 << 20, Shared: true}}},
	"all shared":      {Seed: 27, IgnoreShared: true, Blocks: []tiertest.Block{{Name: "m", Size: 2 << 20, Shared: true}}},
}

// setting is how a round trip saves.
type setting struct {
	name string
	o    save.Options
	heat func(block int, page uint64) uint8 // nil: no working set
}

var settings = []setting{
	{name: "cold lz4", o: save.Options{Codec: image.LZ4, Energy: dedup.EnergyFull}},
	{name: "cold none, short segments", o: save.Options{Codec: image.None, SegmentPages: 1, Energy: dedup.EnergyFull, SampleSize: 8}},
	{name: "cold zstd, pairs", o: save.Options{Codec: image.Zstd, Energy: dedup.EnergyLow, SegmentPages: 5, Workers: 1}},
	{name: "hot 5 %, s2", o: save.Options{Codec: image.MinLZ, SegmentPages: 256, Energy: dedup.EnergyFull}, heat: every(20)},
	{name: "hot half, pairs", o: save.Options{Codec: image.LZ4, Energy: dedup.EnergyLow}, heat: func(_ int, p uint64) uint8 { return uint8(p / 4 % 2) }},
	{name: "all hot", o: save.Options{Codec: image.LZ4, Energy: dedup.EnergyFull}, heat: every(1)},
	{name: "all hot, pairs", o: save.Options{Codec: image.MinLZ, Energy: dedup.EnergyLow}, heat: every(1)},
	{name: "hot over budget", o: save.Options{Codec: image.LZ4, Energy: dedup.EnergyFull, NVRAMSize: 2 << 18},
		heat: func(b int, p uint64) uint8 { return uint8(p%7) + uint8(b) }},
}

// TestRoundTrip saves every shape under every setting, verifies and restores
// it: byte for byte what was saved, or, where pages came again, each page once
// in its last version.
func TestRoundTrip(t *testing.T) {
	for name, so := range streams {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			s := tiertest.New(so)
			for i, set := range settings {
				t.Run(set.name, func(t *testing.T) {
					kind := "crashfs"
					if i%4 == len(name)%4 {
						kind = "os"
					}
					l := labs(t)[kind](t)
					o := set.o
					if set.heat != nil {
						o.WorkingSet, o.VolatileNVRAM = hotSet(t, s, set.heat), true
					}
					o.ReturnPath = &bytes.Buffer{}
					ref, meta := l.save(t, s, o)
					if ref != (store.Ref{VM: "vm", N: 1}) {
						t.Errorf("saved as %v", ref)
					}
					l.holds(t, ref, s)
					checkMeta(t, l, ref, s, so, meta)
					checkPlacement(t, l, ref, s, set)
					l.noLeaks(t)
				})
			}
		})
	}
}

// checkMeta compares what a checkpoint says about itself with the stream.
func checkMeta(t *testing.T, l *lab, ref store.Ref, s *tiertest.Stream, so tiertest.Options, saved *checkpoint.Meta) {
	t.Helper()
	m, err := l.st.Describe(context.Background(), ref)
	if err != nil {
		t.Fatal(err)
	}
	if m.VM != ref.VM || m.PageSize != s.PageSize() && so.Mix[tiertest.Absent] == 0 || m.OpaqueBytes != 0 || m.UUID != saved.UUID {
		t.Errorf("META says VM %q, pages of %d bytes, %d opaque bytes", m.VM, m.PageSize, m.OpaqueBytes)
	}
	if (m.Machine == "pc-q35-7.2") == so.NoConfiguration || (m.RunState == "paused") == so.EmptyTail {
		t.Errorf("META says machine %q, run state %q", m.Machine, m.RunState)
	}
	layout := s.Layout()
	r := saved.Report
	if r.BytesIn != layout.Len {
		t.Errorf("%d bytes in, the stream has %d", r.BytesIn, layout.Len)
	}
	if fi, err := l.fs.Stat(fmt.Sprintf("%s/vms/vm/%08d.flic", l.dir, ref.N)); err != nil || fi.Size() != r.FlashBytes {
		t.Errorf("report has %d flash bytes, the image %v, %v", r.FlashBytes, fi, err)
	}
	var zero, fill, data, absent, pages int64
	page := make([]byte, s.PageSize())
	for b, blk := range s.Blocks() {
		pages += int64(blk.Size+uint64(s.PageSize())-1) / int64(s.PageSize())
		for p := range s.Pages(b) {
			sent := s.Page(page, b, p)
			kind := s.Kind(b, p)
			switch {
			case !sent:
				absent++
			case kind == tiertest.ZeroData || kind == tiertest.Zero && page[0] == 0:
				zero++
			case kind == tiertest.Zero:
				fill++
			default:
				data++
			}
		}
		if blk.Size%uint64(s.PageSize()) != 0 {
			absent++
		}
	}
	if m.PageSize == s.PageSize() && (r.Pages != pages || r.Zero != zero || r.Hot+r.Cold != data || pages != absent+zero+fill+data) {
		t.Errorf("report: %d pages, %d zero, %d hot, %d cold; the stream has %d pages: %d zero, %d filled, %d with data, %d not sent",
			r.Pages, r.Zero, r.Hot, r.Cold, pages, zero, fill, data, absent)
	}
}

// checkPlacement looks where the pages of a stream that sends each once went:
// all that is in the working set and has content must be in NVRAM as far as
// there is room, and a cold page is there only if it equals a hot one.
func checkPlacement(t *testing.T, l *lab, ref store.Ref, s *tiertest.Stream, set setting) {
	t.Helper()
	c, err := l.st.OpenCheckpoint(context.Background(), ref, checkpoint.Options{})
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	if set.heat == nil {
		if c.NVRAMSlots() != nil || c.Meta.Report.Hot != 0 {
			t.Error("pages in NVRAM without a working set")
		}
		return
	}
	inNVRAM := map[uint64]bool{} // slots that a hot page has
	if c.Meta.Report.Resent > 0 {
		return
	}
	type where struct {
		block int
		page  uint64
	}
	var cold []where
	for b := range s.Blocks() {
		for p := range s.Pages(b) {
			run, err := c.PageMap.Find(b, p)
			if err != nil {
				t.Fatal(err)
			}
			switch {
			case run.Kind == pagemap.NVRAM && set.heat(b, p) > 0:
				inNVRAM[run.First] = true
			case run.Kind == pagemap.NVRAM:
				cold = append(cold, where{b, p})
			case run.Kind == pagemap.Flash && set.heat(b, p) > 0 && c.Meta.Report.Surplus == 0 && !hasRecords(c.Checkpoint, run.First):
				t.Errorf("hot page %s is on flash", c.PageName(b, p))
			}
		}
	}
	for _, w := range cold {
		if run, _ := c.PageMap.Find(w.block, w.page); !inNVRAM[run.First] {
			t.Errorf("cold page %s has an NVRAM slot of its own", c.PageName(w.block, w.page))
		}
	}
}

// hasRecords tells whether a flash slot is in a segment of deflated records,
// which stay on flash as QEMU made them.
func hasRecords(c *checkpoint.Checkpoint, slot uint64) bool {
	var sr image.SegmentReader
	seg, err := c.Image.Segment(&sr, uint32(slot/uint64(c.Image.SegmentPages)))
	return err == nil && seg.Kind == image.Records
}
