package ramparse

import (
	"encoding/binary"
	"strings"

	"github.com/flic-migrate/flic-migrate/stream"
)

// virtioMemEarly is the end of the name of virtio-mem's early section.
const virtioMemEarly = "/virtio-mem-device-early"

// unplugged returns how many bytes of a virtio-mem device's RAM block are not
// plugged: QEMU lists the whole block and sends what is plugged, which does not
// change during a migration. It is false for the early section of any other device,
// which may keep back anything (hw/virtio/virtio-mem.c, vmstate_virtio_mem_device_early):
//
//	be64 address, be64 region size, be64 block size, be32 node, be64 plugged size, ...
func unplugged(f *stream.Frame) (bytes uint64, ok bool) {
	body, _ := f.Body()
	if !strings.HasSuffix(f.Section.Name, virtioMemEarly) || f.Section.Version != 1 || len(body) < 36 {
		return 0, false
	}
	region, plugged := binary.BigEndian.Uint64(body[8:]), binary.BigEndian.Uint64(body[28:])
	return region - min(region, plugged), true
}
