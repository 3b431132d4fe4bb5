package ramparse_test

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"testing"

	"github.com/flic-migrate/flic-migrate/ramparse"
	"github.com/flic-migrate/flic-migrate/stream"
)

// earlyFrame is an early section's frame as the Reader returns it.
func earlyFrame(name string, version uint32, body []byte) *stream.Frame {
	s := stream.Section{ID: 7, Name: name, Version: version}
	return &stream.Frame{Kind: stream.SectionEarly, Section: s, Raw: append(stream.AppendFull(nil, s), body...)}
}

func virtioMemBody(region, part, plugged uint64, words ...uint64) []byte {
	b := binary.BigEndian.AppendUint64(nil, 1<<32)
	b = binary.BigEndian.AppendUint64(b, region)
	b = binary.BigEndian.AppendUint64(b, part)
	b = binary.BigEndian.AppendUint32(b, 0)
	b = binary.BigEndian.AppendUint64(b, plugged)
	for _, w := range words {
		b = binary.BigEndian.AppendUint64(b, w)
	}
	return b
}

// What is plugged in is taken from the bitmap if that agrees with the rest, and
// otherwise nothing is said to be absent for sure.
func TestParseVirtioMem(t *testing.T) {
	const mib, name = 1 << 20, "0000:00:01.0/virtio-mem-device-early"
	for what, test := range map[string]struct {
		frame  *stream.Frame
		ok     bool
		absent uint64
		runs   string // start+length in parts of 2 MiB
	}{
		"half of it":              {earlyFrame(name, 1, virtioMemBody(128*mib, 2*mib, 64*mib, 1<<32-1)), true, 64 * mib, "32+32 "},
		"holes":                   {earlyFrame(name, 1, virtioMemBody(20*mib, 2*mib, 6*mib, 0b0100110000)), true, 14 * mib, "0+4 6+2 9+1 "},
		"all":                     {earlyFrame(name, 1, virtioMemBody(4*mib, 2*mib, 4*mib, 3)), true, 0, ""},
		"none":                    {earlyFrame(name, 1, virtioMemBody(4*mib, 2*mib, 0, 0)), true, 4 * mib, "0+2 "},
		"a second word":           {earlyFrame(name, 1, virtioMemBody(132*mib, 2*mib, 4*mib, 1, 2)), true, 128 * mib, "1+64 "},
		"the bitmap says less":    {earlyFrame(name, 1, virtioMemBody(4*mib, 2*mib, 4*mib, 1)), true, 0, ""},
		"it is cut":               {earlyFrame(name, 1, virtioMemBody(132*mib, 2*mib, 2*mib, 1)), true, 130 * mib, ""},
		"parts of no size":        {earlyFrame(name, 1, virtioMemBody(4*mib, 0, 2*mib, 1)), true, 2 * mib, ""},
		"parts of an odd size":    {earlyFrame(name, 1, virtioMemBody(6*mib, 3*mib, 3*mib, 1)), true, 3 * mib, ""},
		"a region of half a part": {earlyFrame(name, 1, virtioMemBody(mib, 2*mib, 0, 0)), true, mib, ""},
		"more than there is":      {earlyFrame(name, 1, virtioMemBody(2*mib, 2*mib, 4*mib, 3)), true, 0, ""},
		"a later version":         {earlyFrame(name, 2, virtioMemBody(4*mib, 2*mib, 2*mib, 1)), false, 0, ""},
		"too short":               {earlyFrame(name, 1, make([]byte, 35)), false, 0, ""},
		"another device":          {earlyFrame("0000:00:01.0/virtio-iommu", 1, virtioMemBody(4*mib, 2*mib, 2*mib, 1)), false, 0, ""},
	} {
		v, ok := ramparse.ParseVirtioMem(test.frame)
		runs := ""
		v.Unplugged(func(start, length uint64) { runs += fmt.Sprintf("%d+%d ", start/(2*mib), length/(2*mib)) })
		if ok != test.ok || v.Absent() != test.absent || runs != test.runs {
			t.Errorf("%s: %v, %d bytes are absent, %q unplugged", what, ok, v.Absent(), runs)
		}
	}
	v, _ := ramparse.ParseVirtioMem(earlyFrame(name, 1, virtioMemBody(4*mib, 2*mib, 2*mib, 1)))
	mine, other := ramparse.Block{Name: "0000:00:01.0/vm0", Used: 4 * mib}, ramparse.Block{Name: "0000:00:01.0/rom", Used: mib}
	for _, test := range []struct {
		blocks []ramparse.Block
		want   int
	}{{[]ramparse.Block{other, mine}, 1}, {[]ramparse.Block{other}, -1}, {nil, -1},
		{[]ramparse.Block{mine, {Name: "0000:00:01.0/too", Used: 4 * mib}}, -1},
		{[]ramparse.Block{{Name: "0000:00:01.00/vm0", Used: 4 * mib}}, -1}} {
		if got := v.Block(test.blocks); got != test.want {
			t.Errorf("block %d of %+v", got, test.blocks)
		}
	}
}

// FuzzVirtioMem: what is said to be unplugged lies in the region, in order, and is as
// much as is absent.
func FuzzVirtioMem(f *testing.F) {
	f.Add(virtioMemBody(20<<20, 2<<20, 6<<20, 0b0100110000))
	f.Add(virtioMemBody(132<<20, 2<<20, 4<<20, 1, 2))
	f.Add(virtioMemBody(20<<20, 2<<20, 2<<20, 1<<20)) // a part that the region does not have
	f.Fuzz(func(t *testing.T, body []byte) {
		v, ok := ramparse.ParseVirtioMem(earlyFrame("d/virtio-mem-device-early", 1, bytes.Clone(body)))
		if !ok {
			return
		}
		var end, total uint64
		v.Unplugged(func(start, length uint64) {
			if length == 0 || start < end || start+length > v.Region {
				t.Fatalf("%d bytes from %d, after %d, of %d", length, start, end, v.Region)
			}
			end, total = start+length, total+length
		})
		if v.Part != 0 && total != v.Absent() {
			t.Fatalf("%d bytes are unplugged, %d absent", total, v.Absent())
		}
	})
}
