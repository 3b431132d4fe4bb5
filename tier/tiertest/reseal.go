package tiertest

import (
	"encoding/binary"

	"github.com/flic-migrate/flic-migrate/tier/image"
)

// Reseal puts right the checksums of a flash image that was changed, as far as
// it can be followed from its beginning and from its end, and whatever else
// follows from its length: fuzzing would not get behind them otherwise.
func Reseal(b []byte) {
	le := binary.LittleEndian
	if len(b) < image.HeaderLen+image.FooterLen {
		return
	}
	le.PutUint32(b[60:], image.Checksum(b[:60]))
	end := len(b) - image.FooterLen
	for at := image.HeaderLen; at+image.FrameHeaderLen <= end; {
		head := b[at : at+image.FrameHeaderLen]
		stored := int(le.Uint32(head[8:]))
		at += image.FrameHeaderLen
		if stored > end-at {
			return
		}
		le.PutUint32(head[16:], image.Checksum(b[at:at+stored]))
		le.PutUint32(head[20:], image.Checksum(head[:20]))
		at += stored
	}
	foot := b[end:]
	le.PutUint64(foot[32:], uint64(len(b)))
	copy(foot[40:56], b[24:40])
	le.PutUint32(foot[60:], image.Checksum(foot[:60]))
}
