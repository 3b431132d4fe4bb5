package ramparse

import "encoding/binary"

// AppendSetup appends a MemSize record. A page size is written for blocks with
// PageSize not 0, a GPA for those with one.
func AppendSetup(dst []byte, s *Setup) []byte {
	dst = binary.BigEndian.AppendUint64(dst, s.Total|flagMemSize)
	for _, b := range s.Blocks {
		dst = appendName(dst, b.Name)
		dst = binary.BigEndian.AppendUint64(dst, b.Used)
		if b.PageSize != 0 {
			dst = binary.BigEndian.AppendUint64(dst, b.PageSize)
		}
		if b.GPA != nil {
			dst = binary.BigEndian.AppendUint64(dst, *b.GPA)
		}
	}
	return dst
}

// The Append functions for pages write the block's name, or CONTINUE if name
// is empty. addr is the page's byte offset within the block.

// AppendZero appends a Zero record.
func AppendZero(dst []byte, name string, addr uint64, fill byte) []byte {
	return append(appendHeader(dst, flagZero, name, addr), fill)
}

// AppendPage appends a Page record.
func AppendPage(dst []byte, name string, addr uint64, page []byte) []byte {
	return append(AppendPageHeader(dst, name, addr), page...)
}

// AppendPageHeader appends a Page record up to where its content begins, for
// callers who write the content from where it lies.
func AppendPageHeader(dst []byte, name string, addr uint64) []byte {
	return appendHeader(dst, flagPage, name, addr)
}

// AppendXBZRLE appends an XBZRLE record. A delta has at most 65535 bytes.
func AppendXBZRLE(dst []byte, name string, addr uint64, delta []byte) []byte {
	dst = append(appendHeader(dst, flagXBZRLE, name, addr), xbzrleEncoding)
	dst = binary.BigEndian.AppendUint16(dst, uint16(len(delta)))
	return append(dst, delta...)
}

// AppendCompressed appends a Compressed record.
func AppendCompressed(dst []byte, name string, addr uint64, payload []byte) []byte {
	dst = appendHeader(dst, flagCompress, name, addr)
	dst = binary.BigEndian.AppendUint32(dst, uint32(len(payload)))
	return append(dst, payload...)
}

// AppendFlush appends a Flush record.
func AppendFlush(dst []byte) []byte { return binary.BigEndian.AppendUint64(dst, flagFlush) }

// AppendHook appends a Hook record.
func AppendHook(dst []byte) []byte { return binary.BigEndian.AppendUint64(dst, flagHook) }

// AppendEOS appends the end of a section's payload.
func AppendEOS(dst []byte) []byte { return binary.BigEndian.AppendUint64(dst, flagEOS) }

func appendHeader(dst []byte, flag uint64, name string, addr uint64) []byte {
	if name == "" {
		return binary.BigEndian.AppendUint64(dst, addr|flag|flagContinue)
	}
	return appendName(binary.BigEndian.AppendUint64(dst, addr|flag), name)
}

// appendName appends a counted string. A name over 255 bytes has no encoding
// and is the caller's mistake.
func appendName(dst []byte, name string) []byte {
	if len(name) > 255 {
		panic("ramparse: block name longer than 255 bytes")
	}
	return append(append(dst, byte(len(name))), name...)
}
