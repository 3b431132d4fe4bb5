// Package saveimage reads and writes what libvirt puts before the migration
// stream in a save file (virsh save, managedsave, snapshots with --memspec;
// qemu_saveimage.h, virQEMUSaveHeader and virQEMUSaveData):
//
//	0   ┌──────────────────────────────────────────────┐
//	    │ "LibvirtQemudSave" (…Part: not finished)     │ 16 B
//	16  │ version, data length, running, format,       │ 5 × u32, in the byte order
//	    │ cookie offset                                │ of the host that wrote it
//	36  │ unused                                       │ 14 × u32
//	92  ├──────────────────────────────────────────────┤
//	    │ domain XML, NUL │ cookie XML, NUL │ padding  │ data length
//	    ├──────────────────────────────────────────────┤
//	    │ migration stream, raw or compressed          │
//	    └──────────────────────────────────────────────┘
//
// libvirt leaves room behind the XML so that it can be edited in place; what is
// in there is kept as it is.
package saveimage

import (
	"bytes"
	"encoding/binary"
	"encoding/xml"
	"errors"
	"fmt"
	"io"

	"github.com/flic-migrate/flic-migrate/stream"
)

const (
	magic   = "LibvirtQemudSave"
	partial = "LibvirtQemudPart"

	// Version is the newest version that is understood.
	Version = 2
	// HeaderLen is the length of the fixed part, in bytes.
	HeaderLen = 92
	// MaxData caps the data behind it. libvirt's XML has some 10 KB, which it
	// pads to 64 KiB, and it sends none that has more than 4 MiB.
	MaxData = 4 << 20
)

// Format says how the stream is compressed (virQEMUSaveFormat).
type Format uint32

// The formats that libvirt has numbers for.
const (
	Raw Format = iota
	Gzip
	Bzip2
	XZ
	Lzop
	Zstd   // from libvirt 10.10 on
	Sparse // from libvirt 11.2 on: a file with holes that QEMU writes itself; see CopySparse
)

var formatNames = [...]string{"raw", "gzip", "bzip2", "xz", "lzop", "zstd", "sparse"}

// String is the format's name, which is that of the program that reads it, if there
// is one.
func (f Format) String() string {
	if int(f) < len(formatNames) {
		return formatNames[f]
	}
	return fmt.Sprintf("format %d", uint32(f))
}

// ErrPartial: libvirt did not get to the end of the save, so the file is none.
var ErrPartial = fmt.Errorf("libvirt did not finish this save file: %w", stream.ErrTruncated)

// Header is what stands before the stream.
type Header struct {
	Version uint32
	Running uint32 // what the domain did when saved: 0 paused, 1 running
	Format  Format

	raw   []byte // all of it, as read or to be written
	order binary.ByteOrder
	xml   []byte // parts of raw, without their NUL
	cook  []byte
}

// Offsets of the fields that are looked at or changed.
const (
	atVersion = 16
	atLength  = 20
	atRunning = 24
	atFormat  = 28
	atCookie  = 32
)

// Read reads a header, and no byte of the stream. Errors wrap stream.ErrNotStream
// if it is no save file, ErrPartial, stream.ErrTruncated or stream.ErrDamaged.
func Read(r io.Reader) (*Header, error) {
	raw := make([]byte, HeaderLen)
	if n, err := io.ReadFull(r, raw); err != nil {
		if n < len(magic) || string(raw[:len(magic)]) != magic && string(raw[:len(magic)]) != partial {
			return nil, fmt.Errorf("no save file of libvirt's: %w", stream.ErrNotStream)
		}
		return nil, stream.Wrap("save file's header", int64(n), err)
	}
	switch string(raw[:len(magic)]) {
	case magic:
	case partial:
		return nil, ErrPartial
	default:
		return nil, fmt.Errorf("no save file of libvirt's: %w", stream.ErrNotStream)
	}
	h := &Header{order: binary.ByteOrder(binary.LittleEndian)}
	if h.order.Uint32(raw[atVersion:]) > 0xffff {
		h.order = binary.BigEndian
	}
	h.Version = h.order.Uint32(raw[atVersion:])
	if h.Version < 1 || h.Version > Version {
		return nil, stream.Damaged("save file's header", atVersion, "version %d is not known here", h.Version)
	}
	n := h.order.Uint32(raw[atLength:])
	if n == 0 || n > MaxData {
		return nil, stream.Damaged("save file's header", atLength, "domain XML of %d bytes", n)
	}
	h.raw = append(raw, make([]byte, n)...)
	if m, err := io.ReadFull(r, h.raw[HeaderLen:]); err != nil {
		return nil, stream.Wrap("save file's domain XML", HeaderLen+int64(m), err)
	}
	return h, h.parse()
}

// Skip reads the header that r may begin with and returns its length, 0 if it is
// none. The error is ErrPartial.
func Skip(r io.Reader) (int64, error) {
	h, err := Read(r)
	switch {
	case err == nil:
		return int64(len(h.raw)), nil
	case errors.Is(err, ErrPartial):
		return 0, err
	}
	return 0, nil
}

// parse sets all fields from raw, whose length is right.
func (h *Header) parse() error {
	h.Running = h.order.Uint32(h.raw[atRunning:])
	h.Format = Format(h.order.Uint32(h.raw[atFormat:]))
	data := h.raw[HeaderLen:]
	cookie := h.order.Uint32(h.raw[atCookie:])
	if cookie != 0 {
		if cookie >= uint32(len(data)) {
			return stream.Damaged("save file's header", atCookie, "the cookie is at %d of %d bytes", cookie, len(data))
		}
		h.cook = text(data[cookie:])
		data = data[:cookie]
	}
	if h.xml = text(data); len(h.xml) == 0 {
		return stream.Damaged("save file's domain XML", HeaderLen, "it is empty")
	}
	return nil
}

// text is b up to its first NUL.
func text(b []byte) []byte {
	if i := bytes.IndexByte(b, 0); i >= 0 {
		return b[:i]
	}
	return b
}

// Parse parses what Bytes has given.
func Parse(b []byte) (*Header, error) {
	r := bytes.NewReader(b)
	h, err := Read(r)
	if err == nil && r.Len() != 0 {
		err = stream.Damaged("save file's header", int64(len(b)-r.Len()), "%d bytes behind its end", r.Len())
	}
	return h, err
}

// New makes the header of a file with a raw stream, in this host's byte order.
// The cookie may be empty.
func New(xml, cookie string, running bool) (*Header, error) {
	if len(xml)+len(cookie)+2 > MaxData {
		return nil, fmt.Errorf("domain XML of %d bytes, cookie of %d", len(xml), len(cookie))
	}
	h := &Header{Version: Version, order: binary.ByteOrder(binary.NativeEndian)}
	h.raw = append(make([]byte, HeaderLen), xml...)
	h.raw = append(h.raw, 0)
	copy(h.raw, magic)
	if cookie != "" {
		h.order.PutUint32(h.raw[atCookie:], uint32(len(h.raw)-HeaderLen))
		h.raw = append(append(h.raw, cookie...), 0)
	}
	h.order.PutUint32(h.raw[atVersion:], Version)
	h.order.PutUint32(h.raw[atLength:], uint32(len(h.raw)-HeaderLen))
	if running {
		h.order.PutUint32(h.raw[atRunning:], 1)
	}
	return h, h.parse()
}

// XML is the domain's definition.
func (h *Header) XML() string { return string(h.xml) }

// Cookie is libvirt's own state of the domain, XML too, or empty.
func (h *Header) Cookie() string { return string(h.cook) }

// Bytes is the header as it stands in the file.
func (h *Header) Bytes() []byte { return bytes.Clone(h.raw) }

// SetFormat changes how the header says that the stream is compressed, and
// nothing else.
func (h *Header) SetFormat(f Format) {
	h.Format = f
	h.order.PutUint32(h.raw[atFormat:], uint32(f))
}

// PartialMagic and Magic are a file's first bytes: the former until the stream
// behind the header is whole and durable.
func PartialMagic() []byte { return []byte(partial) }
func Magic() []byte        { return []byte(magic) }

// Domain is the domain's name and UUID, by its XML.
func (h *Header) Domain() (name, uuid string, err error) {
	var d struct {
		XMLName xml.Name `xml:"domain"`
		Name    string   `xml:"name"`
		UUID    string   `xml:"uuid"`
	}
	if err := xml.Unmarshal(h.xml, &d); err != nil {
		return "", "", fmt.Errorf("save file's domain XML: %w", err)
	}
	return d.Name, d.UUID, nil
}
