package tiertest

import (
	"encoding/binary"

	"github.com/flic-migrate/flic-migrate/tier/image"
	"github.com/flic-migrate/flic-migrate/tier/integrity"
)

// Reseal puts right what is left of a flash image that was changed anyhow: magic
// numbers, checksums, and the footer's idea of where the index is. Fuzzing would
// not get behind them otherwise.
func Reseal(b []byte) {
	le := binary.LittleEndian
	if len(b) < image.HeaderLen+image.FooterLen {
		return
	}
	end := len(b) - image.FooterLen
	foot := b[end:]
	copy(b, "FLICIMG\x00")
	copy(foot, "FLICEND\x00")
	for at := image.HeaderLen; at+image.FrameHeaderLen <= end; {
		head := b[at : at+image.FrameHeaderLen]
		stored := int(le.Uint32(head[8:]))
		if stored > end-at-image.FrameHeaderLen {
			break
		}
		payload := b[at+image.FrameHeaderLen:][:stored]
		le.PutUint32(head[16:], integrity.Checksum(payload))
		le.PutUint32(head[20:], integrity.Checksum(head[:20]))
		if image.Kind(head[0]) == image.Index {
			le.PutUint64(foot[16:], uint64(at))
			le.PutUint32(foot[24:], uint32(stored))
			le.PutUint32(foot[28:], uint32(stored/9))
		}
		at += image.FrameHeaderLen + stored
	}
	le.PutUint32(b[60:], integrity.Checksum(b[:60]))
	le.PutUint64(foot[32:], uint64(len(b)))
	copy(foot[40:56], b[24:40])
	le.PutUint32(foot[60:], integrity.Checksum(foot[:60]))
}
