package ramparse

// The RAM section's identity in the stream.
const (
	SectionName    = "ram"
	SectionVersion = 4
)

// The flags of a record, RAM_SAVE_FLAG_* in QEMU's migration/ram.c. 0x01 was
// FULL, which no version 4 stream has.
const (
	flagZero     = 0x02
	flagMemSize  = 0x04
	flagPage     = 0x08
	flagEOS      = 0x10
	flagContinue = 0x20
	flagXBZRLE   = 0x40
	flagHook     = 0x80
	flagCompress = 0x100
	flagFlush    = 0x200

	// flagMask is where flags can be whatever the page size is: the smallest
	// target page has 1024 bytes. Larger pages leave more low bits free, which
	// later versions may use.
	flagMask = 0x3ff
)

// Caps on what a stream may announce. QEMU's own limits are far lower; these
// keep a hostile stream from making its reader allocate.
const (
	MaxBlocks = 4096
	MaxTotal  = 64 << 40 // bytes

	MinPageSize = 1 << 10 // bytes
	MaxPageSize = 64 << 10
)

// Kind says what a Record is.
type Kind uint8

// The kinds of records.
const (
	MemSize    Kind = iota + 1 // the blocks; only in START; see Decoder.Setup
	Zero                       // a page filled with one byte
	Page                       // a page's content
	XBZRLE                     // a difference to the page's last content
	Compressed                 // a page's content as a zlib stream
	Flush                      // MULTIFD_FLUSH, no payload
	Hook                       // RDMA's, no payload in a pipe
	EOS                        // ends the section's payload
)

var kindNames = [...]string{
	MemSize: "MEM_SIZE", Zero: "ZERO", Page: "PAGE", XBZRLE: "XBZRLE",
	Compressed: "COMPRESS_PAGE", Flush: "MULTIFD_FLUSH", Hook: "HOOK", EOS: "EOS",
}

// String returns QEMU's name for the record.
func (k Kind) String() string {
	if int(k) < len(kindNames) && kindNames[k] != "" {
		return kindNames[k]
	}
	return "unknown record"
}

// Setup is what the RAM section's START announces.
type Setup struct {
	Total  uint64 // bytes, the sum of the blocks' Used
	Blocks []Block
}

// Block is one of QEMU's RAM blocks. Blocks come in order of falling maximum
// length, so main RAM need not be first, and its name depends on the machine. It is
// the tree's one type for them; checkpoints keep it as JSON.
type Block struct {
	Name     string  `json:"name"`                // idstr, 1 to 255 bytes
	Used     uint64  `json:"used"`                // bytes
	PageSize uint64  `json:"page_size,omitempty"` // host page size in bytes if it is in the stream, or 0
	GPA      *uint64 `json:"gpa,omitempty"`       // guest-physical address: with the capability x-ignore-shared
}

// Equal compares two blocks, their addresses by value.
func (b Block) Equal(o Block) bool {
	if (b.GPA == nil) != (o.GPA == nil) || b.GPA != nil && *b.GPA != *o.GPA {
		return false
	}
	b.GPA, o.GPA = nil, nil
	return b == o
}

// A Record is one element of the RAM section. Data and Raw point into the
// cursor's buffer and are valid until the next call on it.
type Record struct {
	Kind   Kind
	Named  bool   // the block's name stands in the record (no CONTINUE flag)
	Fill   byte   // Zero: the byte the page is filled with
	Block  int    // index into Setup.Blocks; for Zero, Page, XBZRLE, Compressed
	Addr   uint64 // the page's byte offset within its block
	Page   uint64 // the page's index within its block
	Data   []byte // Page: content; XBZRLE: delta; Compressed: zlib stream
	Raw    []byte // the whole record verbatim
	Offset int64  // stream offset of the record
}
