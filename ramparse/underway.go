package ramparse

// ShortestPage is the length of the shortest record of a page, in bytes: a ZERO record
// with CONTINUE, whose block has no name in it.
const ShortestPage = 9

const (
	// SourceBuffer is QEMU's own buffer in bytes (IO_BUF_SIZE, migration/qemu-file.c);
	// beside it QEMU holds up to SourcePages pages by reference.
	SourceBuffer = 32 << 10
	SourcePages  = 64
)

// Underway is how many pages of RAM a source can have sent though nobody has read them,
// at most, if the transport takes buffer bytes.
func Underway(buffer int) uint64 { return uint64((buffer+SourceBuffer)/ShortestPage + SourcePages) }
