package ramparse

import (
	"encoding/binary"
	"math/bits"
	"strings"

	"github.com/flic-migrate/flic-migrate/stream"
)

// VirtioMem is what a virtio-mem device says ahead of RAM: which parts of its RAM
// block are plugged. QEMU lists the whole block and sends those parts, which do not
// change during a migration; nothing may come of the others.
type VirtioMem struct {
	Device  string // the path of the device, with which its block's name begins
	Region  uint64 // bytes of its block
	Part    uint64 // bytes that are plugged at once; 0: Bitmap says nothing
	Plugged uint64 // bytes
	Bitmap  []byte // of the parts: be64 words, in each of which the lowest bit is first
}

// virtioMemEarly is the end of the name of virtio-mem's early section.
const virtioMemEarly = "/virtio-mem-device-early"

// ParseVirtioMem takes a SectionEarly frame apart. It is false for the early section
// of any other device, which may keep back anything. Bitmap points into the frame
// (hw/virtio/virtio-mem.c, vmstate_virtio_mem_device_early):
//
//	be64 address, be64 region size, be64 part size, be32 node, be64 plugged size, bitmap
func ParseVirtioMem(f *stream.Frame) (v VirtioMem, ok bool) {
	const head = 36
	device, ok := strings.CutSuffix(f.Section.Name, virtioMemEarly)
	body, _ := f.Body()
	if !ok || f.Section.Version != 1 || len(body) < head {
		return v, false
	}
	v = VirtioMem{Device: device, Region: binary.BigEndian.Uint64(body[8:]), Plugged: binary.BigEndian.Uint64(body[28:])}
	part, bitmap := binary.BigEndian.Uint64(body[16:]), body[head:]
	if part < MinPageSize || part&(part-1) != 0 || v.Region%part != 0 {
		return v, true
	}
	// What does not add up is not used.
	n, set := v.Region/part, uint64(0)
	if uint64(len(bitmap)) != (n+63)/64*8 {
		return v, true
	}
	for i := 0; i < len(bitmap); i += 8 {
		word := binary.BigEndian.Uint64(bitmap[i:])
		if left := n - uint64(i)*8; left < 64 && word>>left != 0 {
			return v, true // a part behind the region
		}
		set += uint64(bits.OnesCount64(word))
	}
	if set*part == v.Plugged {
		v.Part, v.Bitmap = part, bitmap
	}
	return v, true
}

// Absent is how many bytes of the block will not come.
func (v *VirtioMem) Absent() uint64 { return v.Region - min(v.Region, v.Plugged) }

// Block returns the index of the device's block among these; -1 if that can't be told.
func (v *VirtioMem) Block(blocks []Block) int {
	found := -1
	for i, b := range blocks {
		if !strings.HasPrefix(b.Name, v.Device+"/") || b.Used != v.Region {
			continue
		}
		if found >= 0 {
			return -1
		}
		found = i
	}
	return found
}

// Unplugged calls fn for each run of bytes of the block that are not plugged, in
// order; for none if Bitmap does not say.
func (v *VirtioMem) Unplugged(fn func(start, length uint64)) {
	if v.Part == 0 {
		return
	}
	n := v.Region / v.Part
	plugged := func(i uint64) bool {
		return v.Bitmap[i/64*8+7-i%64/8]&(1<<(i%8)) != 0
	}
	for i := uint64(0); i < n; {
		first := i
		for i < n && !plugged(i) {
			i++
		}
		if i > first {
			fn(first*v.Part, (i-first)*v.Part)
		}
		i++
	}
}
