package ramparse

import "github.com/flic-migrate/flic-migrate/stream"

// The RAM section's identity in the stream.
const (
	SectionName    = "ram"
	SectionVersion = 4
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

// Setup is what the RAM section's START announces.
type Setup struct {
	Total  uint64 // bytes, the sum of the blocks' Used
	Blocks []Block
}

// Block is one of QEMU's RAM blocks.
type Block struct {
	Name     string // idstr, 1 to 255 bytes
	Used     uint64 // bytes
	PageSize uint64 // host page size in bytes if it is in the stream, or 0
	GPA      uint64 // guest-physical address, if HasGPA
	HasGPA   bool   // with the capability x-ignore-shared
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

// Options say what the rest of the stream has told about RAM.
type Options struct {
	PageSize     int  // target page size in bytes; 0: infer it
	IgnoreShared bool // x-ignore-shared is among the configuration's capabilities
}

// A Decoder decodes the payloads of the RAM section. It lives as long as the
// stream: the current block is carried from section to section.
type Decoder struct {
	pageSize int
}

// NewDecoder returns a Decoder.
func NewDecoder(o Options) *Decoder { return &Decoder{pageSize: o.PageSize} }

// Next decodes the record at the cursor into rec and consumes it. On an error
// nothing is consumed. The section's payload ends with a record of Kind EOS.
func (d *Decoder) Next(c *stream.Cursor, rec *Record) error { panic("unfinished") }

// Setup returns what the MemSize record said; nil before one was decoded.
func (d *Decoder) Setup() *Setup { panic("unfinished") }

// PageSize returns the target page size in bytes, 0 as long as it is not
// known. It is known from the first Page record on at the latest.
func (d *Decoder) PageSize() int { return d.pageSize }

// SetPageSize tells the decoder the target page size, as from POSTCOPY_ADVISE.
// A size that contradicts the one in use gives ErrDamaged.
func (d *Decoder) SetPageSize(n int) error { panic("unfinished") }

// ApplyXBZRLE applies a delta to page in place. On ErrDamaged page may be
// partly changed.
func ApplyXBZRLE(page, delta []byte) error { panic("unfinished") }

// Inflate decompresses the zlib stream of a Compressed record into dst, which
// it must fill exactly.
func Inflate(dst, payload []byte) error { panic("unfinished") }

// AppendSetup appends a MemSize record.
func AppendSetup(dst []byte, s *Setup) []byte { panic("unfinished") }

// The Append functions for pages write the block's name, or CONTINUE if name
// is empty. addr is the page's byte offset within the block.

// AppendZero appends a Zero record.
func AppendZero(dst []byte, name string, addr uint64, fill byte) []byte { panic("unfinished") }

// AppendPage appends a Page record.
func AppendPage(dst []byte, name string, addr uint64, page []byte) []byte { panic("unfinished") }

// AppendPageHeader appends a Page record up to where its content begins, for
// callers who write the content from where it lies.
func AppendPageHeader(dst []byte, name string, addr uint64) []byte { panic("unfinished") }

// AppendXBZRLE appends an XBZRLE record.
func AppendXBZRLE(dst []byte, name string, addr uint64, delta []byte) []byte { panic("unfinished") }

// AppendCompressed appends a Compressed record.
func AppendCompressed(dst []byte, name string, addr uint64, payload []byte) []byte {
	panic("unfinished")
}

// AppendFlush appends a Flush record.
func AppendFlush(dst []byte) []byte { panic("unfinished") }

// AppendEOS appends the end of a section's payload.
func AppendEOS(dst []byte) []byte { panic("unfinished") }

// A PassCounter tells the passes of a save apart.
type PassCounter struct{}

// NewPassCounter returns a counter for the given blocks.
func NewPassCounter(s *Setup, pageSize int) *PassCounter { panic("unfinished") }

// Add notes a page record and reports whether a new pass begins with it: true
// for the very first.
func (p *PassCounter) Add(block int, page uint64) bool { panic("unfinished") }

// Passes returns the number of passes so far.
func (p *PassCounter) Passes() int { panic("unfinished") }
