package checkpoint

import (
	"encoding/binary"
	"errors"
	"fmt"

	"github.com/google/uuid"

	"github.com/flic-migrate/flic-migrate/tier/digest"
	"github.com/flic-migrate/flic-migrate/tier/image"
	"github.com/flic-migrate/flic-migrate/tier/source"
)

// Reference is another checkpoint that has bytes of this one's pages, and which of
// its bytes those are. What is listed must be kept as long as this checkpoint is
// there; the rest of that one is nothing to it.
type Reference struct {
	UUID uuid.UUID
	// Root is the digest of its DIGESTS' table: whatever is taken from it is checked
	// up to this value, which is under this checkpoint's own checksums.
	Root digest.Root
	// VM and Number are its name in its store: for messages, and where to look first.
	VM     string
	Number int

	SegmentPages int    // pages in a full segment of its image
	Segments     uint32 // of its image: one more than the highest number
	Slots        uint32 // of its NVRAM part in use

	NeedSegments source.Ranges // those with bytes of this checkpoint's pages
	NeedSlots    source.Ranges // and those of its NVRAM part
}

// Name is the reference's name for messages.
func (r *Reference) Name() string { return fmt.Sprintf("%s@%d (%v)", r.VM, r.Number, r.UUID) }

// References is the content of the REFERENCES frames; a page map's foreign entries
// count through it. Stored little-endian, cut into chunks anywhere:
//
//	u32 version, 1; u32 number of references
//	for each reference:
//	    UUID, 16 B; root of its DIGESTS, 32 B
//	    u32 number in its store; u16 length of its VM's name; u16 pages in a segment
//	    u32 segments; u32 NVRAM slots
//	    u32 number of ranges of segments; u32 number of ranges of NVRAM slots
//	    the VM's name
//	    for each range of segments, then of NVRAM slots: u32 first, u32 count
type References []Reference

const (
	referencesVersion = 1
	referencesHeadLen = 8
	referenceLen      = 72 // without name and ranges
	rangeLen          = 8
	maxVMName         = 128 // as package store has it

	// maxReferences caps the document. Ranges are made coarse so that it suffices:
	// at the 48 references that a save makes at most, each keeps its segments to the
	// 20000th of them.
	maxReferences = 16 << 20
)

// Append appends the stored form. Where there are too many ranges the smallest gaps
// between them are closed: what is in them is kept for nobody.
func (rs References) Append(dst []byte) []byte {
	le := binary.LittleEndian
	dst = le.AppendUint32(dst, referencesVersion)
	dst = le.AppendUint32(dst, uint32(len(rs)))
	for i := range rs {
		r := &rs[i]
		// A share of the document for each list.
		most := (maxReferences/len(rs) - referenceLen - maxVMName - referencesHeadLen) / (2 * rangeLen)
		segments, slots := r.NeedSegments.Coarse(most), r.NeedSlots.Coarse(most)
		dst = append(dst, r.UUID[:]...)
		dst = append(dst, r.Root[:]...)
		dst = le.AppendUint32(dst, uint32(r.Number))
		dst = le.AppendUint16(dst, uint16(len(r.VM)))
		dst = le.AppendUint16(dst, uint16(r.SegmentPages))
		dst = le.AppendUint32(dst, r.Segments)
		dst = le.AppendUint32(dst, r.Slots)
		dst = le.AppendUint32(dst, uint32(len(segments)))
		dst = le.AppendUint32(dst, uint32(len(slots)))
		dst = append(dst, r.VM...)
		for _, list := range []source.Ranges{segments, slots} {
			for _, r := range list {
				dst = le.AppendUint32(dst, r.First)
				dst = le.AppendUint32(dst, r.Count)
			}
		}
	}
	return dst
}

var errShortReferences = errors.New("it ends inside a reference")

// ParseReferences reads the stored form. No number in it makes it take more memory
// than it has bytes, twice over.
func ParseReferences(b []byte) (References, error) {
	le := binary.LittleEndian
	if len(b) < referencesHeadLen {
		return nil, errShortReferences
	}
	version, n := le.Uint32(b), int(le.Uint32(b[4:]))
	if version != referencesVersion {
		return nil, fmt.Errorf("it is in version %d, which this flic-migrate does not know", version)
	}
	if b = b[referencesHeadLen:]; n > maxRefs || n > len(b)/referenceLen {
		return nil, fmt.Errorf("%d references in %d bytes", n, len(b))
	}
	rs := make(References, n)
	seen := make(map[uuid.UUID]bool, n)
	for i := range rs {
		r := &rs[i]
		if len(b) < referenceLen {
			return nil, errShortReferences
		}
		copy(r.UUID[:], b)
		copy(r.Root[:], b[16:])
		r.Number = int(le.Uint32(b[48:]))
		name := int(le.Uint16(b[52:]))
		r.SegmentPages = int(le.Uint16(b[54:]))
		r.Segments, r.Slots = le.Uint32(b[56:]), le.Uint32(b[60:])
		segments, slots := int(le.Uint32(b[64:])), int(le.Uint32(b[68:]))
		b = b[referenceLen:]
		if name > maxVMName || name > len(b) {
			return nil, fmt.Errorf("VM name of %d bytes", name)
		}
		r.VM, b = string(b[:name]), b[name:]
		switch {
		case r.UUID == uuid.Nil || seen[r.UUID]:
			return nil, fmt.Errorf("reference %d: %v, twice or nobody's", i, r.UUID)
		case r.SegmentPages < 1 || r.SegmentPages > image.MaxSegmentPages:
			return nil, fmt.Errorf("reference %d: %d pages in a segment", i, r.SegmentPages)
		}
		seen[r.UUID] = true
		var err error
		if r.NeedSegments, b, err = parseRanges(b, segments, r.Segments); err == nil {
			r.NeedSlots, b, err = parseRanges(b, slots, r.Slots)
		}
		if err != nil {
			return nil, fmt.Errorf("reference %d: %w", i, err)
		}
	}
	if len(b) > 0 {
		return nil, fmt.Errorf("%d bytes behind the last reference", len(b))
	}
	return rs, nil
}

// parseRanges reads n ranges of numbers below end.
func parseRanges(b []byte, n int, end uint32) (source.Ranges, []byte, error) {
	if n > len(b)/rangeLen {
		return nil, nil, fmt.Errorf("%d ranges in %d bytes", n, len(b))
	}
	if n == 0 {
		return nil, b, nil
	}
	le := binary.LittleEndian
	list := make(source.Ranges, n)
	next := uint64(0) // the lowest that a range may begin with
	for i := range list {
		r := source.Range{First: le.Uint32(b[rangeLen*i:]), Count: le.Uint32(b[rangeLen*i+4:])}
		if uint64(r.First) < next || r.Count == 0 || r.End() > uint64(end) {
			return nil, nil, fmt.Errorf("range %d of %d numbers from %d on, of %d", i, r.Count, r.First, end)
		}
		list[i], next = r, r.End()+1
	}
	return list, b[rangeLen*n:], nil
}

// ReadReferences reads what an image refers to: its index and those frames, and nothing
// else of it.
func ReadReferences(src image.Source) (References, error) {
	im, err := image.Open(src)
	if err != nil {
		return nil, err
	}
	return ReferencesOf(im)
}

// ReferencesOf reads what an image refers to; nothing if it has no such frame.
func ReferencesOf(im *image.Image) (References, error) {
	if im.Chunks(image.References) == 0 {
		return nil, nil
	}
	var b []byte
	for i := range im.Chunks(image.References) {
		chunk, err := im.Chunk(image.References, i)
		if err != nil {
			return nil, err
		}
		if len(b)+len(chunk) > maxReferences {
			return nil, im.Corrupt(image.References, i, fmt.Errorf("more than %d bytes of references", maxReferences))
		}
		b = append(b, chunk...)
	}
	rs, err := ParseReferences(b)
	if err != nil {
		return nil, im.Corrupt(image.References, 0, err)
	}
	for i := range rs {
		if rs[i].UUID == im.UUID {
			return nil, im.Corrupt(image.References, 0, errors.New("it refers to itself"))
		}
	}
	return rs, nil
}
