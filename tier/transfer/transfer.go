// Package transfer is the form in which checkpoints go from one store to another: a stream
// of records, which needs no way back, and a list of what a store has, which may come before
// it.
//
//	0  ┌──────────────────────────────────┐
//	   │ magic, version, CRC-32C          │
//	16 ├──────────────────────────────────┤
//	   │ BEGIN  what is to come           │  a checkpoint
//	   │ IMAGE  0: its own image follows, │
//	   │        and its pages elsewhere   │
//	   │ DATA   position, bytes           │
//	   │ …                                │
//	   │ IMAGE  1: one that it refers to  │
//	   │ DATA   …                         │
//	   │ END                              │
//	   ├──────────────────────────────────┤
//	   │ GROUP  what is in it             │  its members follow, and only
//	   │ BEGIN  …                         │  with the last it is one
//	   ├──────────────────────────────────┤
//	   │ LAST                             │  nothing is behind it
//
// Each record is under a CRC-32C that counts the records, so that none is missing, comes
// twice or is another's. docs/format.md has every byte. What the bytes come to is not known
// here: package store makes and takes them.
package transfer

import (
	"crypto/sha256"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"time"

	"github.com/google/uuid"

	"github.com/flic-migrate/flic-migrate/tier/integrity"
	"github.com/flic-migrate/flic-migrate/tier/source"
)

const (
	magic = "FLICSND\x00"
	// Version is the version of the stream. In version 1 no pages of disks were sent.
	Version = 2

	headLen   = 16
	recordLen = 8 // before the payload
	crcLen    = 4
	posLen    = 8 // before the bytes of DATA
)

// Kind is what a record is.
type Kind uint8

// The kinds.
const (
	Begin Kind = 1 // JSON: Checkpoint
	Image Kind = 2 // u32: which of the checkpoint's images the DATA that follows is of
	Data  Kind = 3 // u64 position, bytes
	End   Kind = 4 // nothing: the checkpoint is whole
	Last  Kind = 5 // nothing: the stream is
	Group Kind = 6 // JSON: GroupHead
)

const (
	// MaxData is how many bytes a DATA record has at most.
	MaxData = 256 << 10
	// MaxBegin caps a BEGIN record.
	MaxBegin = 16 << 20
	// MaxGroup caps a GROUP record.
	MaxGroup = 1 << 20
	// maxImages is as many as a checkpoint can refer to, and itself.
	maxImages = 1 + 1024
	// maxMembers is how many a group can have.
	maxMembers = 1024
	// maxLength caps what is said of lengths, in bytes.
	maxLength = 1 << 50
)

var (
	// ErrNotStream: it is no stream of checkpoints at all.
	ErrNotStream = errors.New("no stream of flic-migrate send")
	// ErrTruncated: the stream ends amid a checkpoint.
	ErrTruncated = errors.New("the stream is truncated")
	// ErrDamaged: the stream is not what was sent, or can't have been.
	ErrDamaged = errors.New("the stream is damaged")
)

// Error says where in the stream something is wrong.
type Error struct {
	Offset int64
	Err    error
}

func (e *Error) Error() string { return fmt.Sprintf("received stream: offset %d: %v", e.Offset, e.Err) }
func (e *Error) Unwrap() error { return e.Err }

// Checkpoint is what a BEGIN record says. Without images the receiver has it already.
type Checkpoint struct {
	VM     string    `json:"vm"`
	Number int       `json:"number"`
	UUID   uuid.UUID `json:"uuid"`
	Origin uuid.UUID `json:"origin,omitzero"` // of the image, see checkpoint.Identity
	// Images are what is sent: the checkpoint's own first, then those that it refers to and
	// that the receiver lacks, or lacks a part of.
	Images sentList `json:"images,omitempty"`
	// Has are those that it refers to and of which the receiver has all that is needed.
	Has idList `json:"has,omitempty"`
	// Label and Touched are what lies beside the image: see package store.
	Label   json.RawMessage `json:"label,omitempty"`
	Touched json.RawMessage `json:"touched,omitempty"`
}

// The lists have types of their own because each has its limit, which is checked while it is
// decoded: {} is short and what it stands for is not.
type (
	sentList []Sent
	idList   []uuid.UUID
)

func (l *sentList) UnmarshalJSON(b []byte) error { return integrity.DecodeList(l, b, maxImages) }
func (l *idList) UnmarshalJSON(b []byte) error   { return integrity.DecodeList(l, b, maxImages) }

// GroupHead is what a GROUP record says: the checkpoints that follow are those of a group.
type GroupHead struct {
	Name    string     `json:"name"`
	Number  int        `json:"number"`
	UUID    uuid.UUID  `json:"uuid"`
	Created time.Time  `json:"created"`
	Mode    string     `json:"mode"`
	Members memberList `json:"members"`
}

// Member is a checkpoint of a group, as it is called in the sender's store.
type Member struct {
	VM     string    `json:"vm"`
	Number int       `json:"number"`
	UUID   uuid.UUID `json:"uuid"`
	Origin uuid.UUID `json:"origin,omitzero"` // of the image, see checkpoint.Identity
}

type memberList []Member

func (l *memberList) UnmarshalJSON(b []byte) error { return integrity.DecodeList(l, b, maxMembers) }

func (g *GroupHead) check() error {
	if g.UUID == uuid.Nil || len(g.Members) == 0 || len(g.Members) > maxMembers {
		return fmt.Errorf("group %v of %d members", g.UUID, len(g.Members))
	}
	seen := make(map[uuid.UUID]bool)
	for _, m := range g.Members {
		if seen[m.UUID] || m.UUID == uuid.Nil {
			return fmt.Errorf("member %v twice, or none", m.UUID)
		}
		seen[m.UUID] = true
	}
	return nil
}

// Sent says what is sent of an image. Positions below Length are of the image; from Base on
// the pages of its NVRAM part follow that are in Slots, and behind these the pages of its disk
// slots that are in Disk.
type Sent struct {
	UUID     uuid.UUID     `json:"uuid"`
	VM       string        `json:"vm"` // its name in the sender's store
	Number   int           `json:"number"`
	Length   int64         `json:"length"`    // of the image
	PageSize int           `json:"page_size"` // bytes
	All      bool          `json:"all,omitempty"`
	Segments source.Ranges `json:"segments,omitempty"` // if not All: those that are sent
	Had      source.Ranges `json:"had,omitempty"`      // if All: those that are not, as the receiver has them
	Slots    source.Ranges `json:"slots,omitempty"`    // of the NVRAM part
	Disk     source.Ranges `json:"disk,omitempty"`     // disk slots
	// DiskFrom is a checkpoint of which the receiver has the pages of disks, and among them
	// those that Disk leaves out: zero if it has all.
	DiskFrom uuid.UUID `json:"disk_from,omitzero"`
	Start    int64     `json:"start,omitempty"` // position that the receiver has it up to
}

// slotUnit is what Base is a multiple of.
const slotUnit = 4 << 10

// Base is the position of the first page of the NVRAM part.
func (s *Sent) Base() int64 { return (s.Length + slotUnit - 1) / slotUnit * slotUnit }

// End is the position behind all that is sent.
func (s *Sent) End() int64 {
	if s.Pages() == 0 {
		return s.Length
	}
	return s.Base() + int64(s.Pages())*int64(s.PageSize)
}

// Pages is how many pages follow the image.
func (s *Sent) Pages() uint64 { return s.Slots.Count() + s.Disk.Count() }

// FirstDisk is the position of the first page of a disk slot.
func (s *Sent) FirstDisk() int64 { return s.Base() + int64(s.Slots.Count())*int64(s.PageSize) }

// HasDisk tells whether the image has pages on disks that the receiver is to have without.
func (s *Sent) HasDisk() bool { return len(s.Disk) > 0 || s.DiskFrom != uuid.Nil }

// Key names what is sent of the image, for a transfer that is cut off and goes on: images
// do not change, so that the same key is the same bytes at the same positions.
func (s *Sent) Key() uuid.UUID {
	k := *s
	k.Start = 0
	b, err := json.Marshal(k)
	if err != nil {
		panic(err) // it has nothing that JSON can't have
	}
	sum := sha256.Sum256(b)
	return uuid.UUID(sum[:16])
}

func (s *Sent) check() error {
	switch {
	case s.UUID == uuid.Nil || s.Length < 256 || s.Length > maxLength:
		return fmt.Errorf("image %v of %d bytes", s.UUID, s.Length)
	case s.PageSize < 256 || s.PageSize > 64<<10 || s.PageSize&(s.PageSize-1) != 0:
		return fmt.Errorf("page size %d", s.PageSize)
	case !rising(s.Segments) || !rising(s.Slots) || !rising(s.Disk) || !rising(s.Had):
		return errors.New("ranges that do not rise")
	case len(s.Had) > 0 && !s.All:
		return errors.New("an image of which the receiver has some is sent in part")
	case s.HasDisk() && !s.All:
		return errors.New("pages of disks of an image that is not sent as a checkpoint's own")
	case s.Start < 0 || s.Start > s.End():
		return fmt.Errorf("it begins at %d of %d", s.Start, s.End())
	}
	return nil
}

func rising(list source.Ranges) bool {
	next := uint64(0)
	for _, r := range list {
		if uint64(r.First) < next || r.Count == 0 || r.End() > 1<<32 {
			return false
		}
		next = r.End() + 1
	}
	return true
}

func (c *Checkpoint) check() error {
	seen := make(map[uuid.UUID]bool)
	for i := range c.Images {
		if err := c.Images[i].check(); err != nil {
			return err
		}
		if seen[c.Images[i].UUID] {
			return fmt.Errorf("image %v twice", c.Images[i].UUID)
		}
		seen[c.Images[i].UUID] = true
	}
	if len(c.Images) > 0 && (c.Images[0].UUID != c.UUID || !c.Images[0].All) {
		return errors.New("the first image is not the checkpoint's own, or not all of it")
	}
	return nil
}

// Writer writes a stream.
type Writer struct {
	w    io.Writer
	n    uint64 // records
	head [recordLen + posLen]byte
}

// NewWriter begins a stream.
func NewWriter(w io.Writer) (*Writer, error) {
	b := make([]byte, headLen)
	copy(b, magic)
	binary.LittleEndian.PutUint32(b[8:], Version)
	binary.LittleEndian.PutUint32(b[12:], integrity.Checksum(b[:12]))
	_, err := w.Write(b)
	return &Writer{w: w}, err
}

// Begin writes a BEGIN record.
func (w *Writer) Begin(c *Checkpoint) error {
	if err := c.check(); err != nil {
		return err
	}
	b, err := json.Marshal(c)
	if err == nil && len(b) > MaxBegin {
		err = fmt.Errorf("what is to be sent takes %d bytes to say", len(b))
	}
	if err != nil {
		return err
	}
	return w.record(Begin, nil, b)
}

// Group writes a GROUP record: the members' checkpoints are to follow.
func (w *Writer) Group(g *GroupHead) error {
	if err := g.check(); err != nil {
		return err
	}
	b, err := json.Marshal(g)
	if err != nil {
		return err
	}
	return w.record(Group, nil, b)
}

// Image says of which image the DATA that follows is.
func (w *Writer) Image(i int) error {
	return w.record(Image, nil, binary.LittleEndian.AppendUint32(nil, uint32(i)))
}

// Data writes bytes from a position on, in as many records as it takes.
func (w *Writer) Data(pos int64, b []byte) error {
	for len(b) > 0 {
		n := min(len(b), MaxData)
		if err := w.record(Data, binary.LittleEndian.AppendUint64(nil, uint64(pos)), b[:n]); err != nil {
			return err
		}
		pos, b = pos+int64(n), b[n:]
	}
	return nil
}

// End ends a checkpoint.
func (w *Writer) End() error { return w.record(End, nil, nil) }

// Close ends the stream. One without this end was cut off, or its sender has failed.
func (w *Writer) Close() error { return w.record(Last, nil, nil) }

func (w *Writer) record(k Kind, front, b []byte) error {
	head := append(w.head[:0], byte(k), 0, 0, 0)
	head = binary.LittleEndian.AppendUint32(head, uint32(len(front)+len(b)))
	head = append(head, front...)
	crc := checksum(w.n, head, b)
	w.n++
	for _, part := range [][]byte{head, b, binary.LittleEndian.AppendUint32(nil, crc)} {
		if len(part) == 0 {
			continue
		}
		if _, err := w.w.Write(part); err != nil {
			return err
		}
	}
	return nil
}

// checksum is that of the n-th record.
func checksum(n uint64, parts ...[]byte) uint32 {
	h := integrity.Hash()
	h.Write(binary.LittleEndian.AppendUint64(nil, n))
	for _, p := range parts {
		h.Write(p)
	}
	return h.Sum32()
}

// Reader reads a stream, of which it believes nothing.
type Reader struct {
	r    io.Reader
	off  int64
	n    uint64
	last bool // LAST has come
	buf  []byte
}

// NewReader reads the beginning of a stream.
func NewReader(r io.Reader) (*Reader, error) {
	var b [headLen]byte
	n, err := io.ReadFull(r, b[:])
	le := binary.LittleEndian
	switch {
	case err != nil && err != io.EOF && err != io.ErrUnexpectedEOF:
		return nil, err
	case n < 8 || string(b[:8]) != magic:
		return nil, &Error{0, ErrNotStream}
	case err != nil:
		return nil, &Error{int64(n), ErrTruncated}
	case le.Uint32(b[12:]) != integrity.Checksum(b[:12]):
		return nil, &Error{0, fmt.Errorf("%w: %w", ErrDamaged, integrity.ErrChecksum)}
	case le.Uint32(b[8:]) < 1 || le.Uint32(b[8:]) > Version:
		return nil, fmt.Errorf("it is in version %d of the stream, and this flic-migrate reads up to version %d", le.Uint32(b[8:]), Version)
	}
	return &Reader{r: r, off: headLen}, nil
}

// Damaged is the error that what was read last can't be.
func (r *Reader) Damaged(format string, args ...any) error {
	return &Error{r.off, fmt.Errorf("%w: %s", ErrDamaged, fmt.Sprintf(format, args...))}
}

// Next reads a record; its payload is good until the next call. io.EOF: LAST has come, and
// nothing behind it.
func (r *Reader) Next() (Kind, []byte, error) {
	var head [recordLen]byte
	n, err := io.ReadFull(r.r, head[:])
	switch {
	case r.last && err == io.EOF:
		return 0, nil, err
	case r.last && n > 0:
		return 0, nil, r.Damaged("something behind the last record")
	case err != nil:
		return 0, nil, r.cut(n, err)
	}
	k, length := Kind(head[0]), binary.LittleEndian.Uint32(head[4:])
	most := uint32(0)
	switch k {
	case Begin:
		most = MaxBegin
	case Group:
		most = MaxGroup
	case Image:
		most = 4
	case Data:
		most = posLen + MaxData
	case End, Last:
	default:
		return 0, nil, r.Damaged("a record of kind %d", k)
	}
	if length > most || head[1] != 0 || head[2] != 0 || head[3] != 0 {
		return 0, nil, r.Damaged("a record of kind %d with %d bytes", k, length)
	}
	// What is said to come is not believed before it has.
	r.buf = r.buf[:0]
	for want := int(length) + crcLen; len(r.buf) < want; {
		part := min(want-len(r.buf), MaxData+posLen+crcLen)
		at := len(r.buf)
		r.buf = append(r.buf, make([]byte, part)...)
		if n, err := io.ReadFull(r.r, r.buf[at:]); err != nil {
			return 0, nil, r.cut(recordLen+at+n, err)
		}
	}
	b := r.buf[:length]
	if binary.LittleEndian.Uint32(r.buf[length:]) != checksum(r.n, head[:], b) {
		return 0, nil, r.Damaged("record %d: %v", r.n, integrity.ErrChecksum)
	}
	r.n++
	r.off += recordLen + int64(length) + crcLen
	if k == Last {
		r.last = true
		return r.Next()
	}
	return k, b, nil
}

// cut is the error of a record of which only n bytes could be read.
func (r *Reader) cut(n int, err error) error {
	if err == io.EOF || err == io.ErrUnexpectedEOF {
		return &Error{r.off + int64(n), ErrTruncated}
	}
	return err
}

// ParseBegin reads what a BEGIN record says.
func (r *Reader) ParseBegin(b []byte) (*Checkpoint, error) {
	c := new(Checkpoint)
	if err := json.Unmarshal(b, c); err != nil {
		return nil, r.Damaged("BEGIN: %v", err)
	}
	if err := c.check(); err != nil {
		return nil, r.Damaged("BEGIN: %v", err)
	}
	return c, nil
}

// ParseGroup reads what a GROUP record says.
func (r *Reader) ParseGroup(b []byte) (*GroupHead, error) {
	g := new(GroupHead)
	if err := json.Unmarshal(b, g); err != nil {
		return nil, r.Damaged("GROUP: %v", err)
	}
	if err := g.check(); err != nil {
		return nil, r.Damaged("GROUP: %v", err)
	}
	return g, nil
}

// ParseImage reads which image an IMAGE record says, of n.
func (r *Reader) ParseImage(b []byte, n int) (int, error) {
	if len(b) != 4 || binary.LittleEndian.Uint32(b) >= uint32(n) {
		return 0, r.Damaged("IMAGE of %d images", n)
	}
	return int(binary.LittleEndian.Uint32(b)), nil
}

// ParseData splits a DATA record, whose bytes must lie between two positions.
func (r *Reader) ParseData(b []byte, from, to int64) (pos int64, data []byte, err error) {
	if len(b) <= posLen {
		return 0, nil, r.Damaged("DATA of %d bytes", len(b))
	}
	p, data := binary.LittleEndian.Uint64(b), b[posLen:]
	if p > uint64(to) || int64(p) < from || int64(p)+int64(len(data)) > to {
		return 0, nil, r.Damaged("DATA at %d, and it goes on at %d and ends at %d", p, from, to)
	}
	return int64(p), data, nil
}
