package tiertest

import (
	"encoding/binary"

	"github.com/flic-migrate/flic-migrate/tier/image"
	"github.com/flic-migrate/flic-migrate/tier/integrity"
)

// Reseal puts right what is left of a flash image that was changed anyhow: magic
// numbers, checksums, and the footer's idea of where index, META and IDENTITY are.
// Fuzzing would not get behind them otherwise.
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
		switch image.Kind(head[0]) {
		case image.Index:
			le.PutUint64(foot[32:], uint64(at))
			le.PutUint32(foot[40:], uint32(stored))
			le.PutUint32(foot[44:], uint32(stored/9))
		case image.Meta:
			le.PutUint32(foot[48:], uint32(stored))
		case image.Identity:
			le.PutUint32(foot[52:], uint32(stored))
		}
		at += image.FrameHeaderLen + stored
	}
	le.PutUint64(foot[56:], uint64(len(b)))
	ResealEnds(b)
}

// ResealEnds puts right the checksums of header and footer alone, and makes them
// agree on what both say.
func ResealEnds(b []byte) {
	foot := b[len(b)-image.FooterLen:]
	copy(foot[16:32], b[24:40]) // features
	copy(foot[64:80], b[40:56]) // UUID
	SealEnd(b[:image.HeaderLen])
	SealEnd(foot)
}

// SealEnd puts the checksum at the end of a header or footer right.
func SealEnd(b []byte) {
	n := len(b) - 4
	binary.LittleEndian.PutUint32(b[n:], integrity.Checksum(b[:n]))
}
