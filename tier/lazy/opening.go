package lazy

import (
	"bytes"
	"errors"
	"fmt"

	"github.com/flic-migrate/flic-migrate/ramparse"
	"github.com/flic-migrate/flic-migrate/stream"
	"github.com/flic-migrate/flic-migrate/stream/postcopy"
	"github.com/flic-migrate/flic-migrate/tier/checkpoint"
	"github.com/flic-migrate/flic-migrate/tier/image"
)

// ErrNotPossible: this checkpoint can only be restored eagerly.
var ErrNotPossible = errors.New("lazy restore is not possible")

// hostPage is the page size in which a destination's userfaultfd works on
// ordinary memory.
const hostPage = 4096

// Possible tells whether c can be restored lazily; the error wraps
// ErrNotPossible and says why not.
func Possible(c *checkpoint.Checkpoint) error {
	m := c.Meta
	why := ""
	switch {
	case m.OpaqueBytes > 0:
		why = "a part of its stream is kept without being understood"
	case len(m.Foreign) > 0:
		why = fmt.Sprintf("its stream has a %q section", m.Foreign[0])
	case m.IgnoreShared:
		why = "it was saved with x-ignore-shared"
	case m.PageSize != hostPage:
		why = fmt.Sprintf("its target page size is %d", m.PageSize)
	case !m.Footers:
		why = "its machine type is too old to have section footers"
	case len(m.Blocks) == 0:
		why = "it has no RAM"
	}
	for _, b := range m.Blocks {
		if b.PageSize != 0 && b.PageSize != hostPage {
			why = fmt.Sprintf("RAM block %q has pages of %d bytes", b.Name, b.PageSize)
		}
	}
	if why != "" {
		return fmt.Errorf("%w: %s", ErrNotPossible, why)
	}
	return nil
}

// opening is what a lazy restore sends before the first page.
type opening struct {
	bytes []byte
	ramID uint32 // section id of RAM, for PART and END
	// named are the devices behind whose state in the package a PING stands, in order,
	// and the one behind those.
	named []string
	// unplugged is what the guest does not have of virtio-mem devices' blocks: a
	// destination knows that itself, and asks for none of it.
	unplugged []extent
}

// extent is a run of bytes of a block, by its index in META.
type extent struct {
	block         int
	start, length uint64
}

// maxOpening caps the literals before RAM's first page: configuration and RAM
// setup, of which the largest, 4096 blocks with long names, takes 1 MiB.
const maxOpening = 4 << 20

var errStop = errors.New("enough")

// literals collects a skeleton's literals up to the first page.
type literals struct {
	b   []byte
	max int
}

func (l *literals) Literal(b []byte) error {
	if len(l.b)+len(b) > l.max {
		return fmt.Errorf("%w: more than %d bytes before the first page or behind the last", ErrNotPossible, l.max)
	}
	l.b = append(l.b, b...)
	return nil
}

func (l *literals) Pages(int, uint64, uint64, bool) error { return errStop }

// newOpening takes the stored stream apart and puts the opening together in
// the order that QEMU's loadvm_process_command and loadvm_postcopy_* want.
func newOpening(c *checkpoint.Checkpoint) (*opening, error) {
	head := literals{max: maxOpening}
	if err := c.SkeletonChunks(0, c.Meta.TailChunk, &head); err != nil && err != errStop {
		return nil, err
	}
	tail := literals{max: stream.MaxTail}
	if err := c.SkeletonChunks(c.Meta.TailChunk, c.Image.Chunks(image.Skeleton), &tail); err == errStop {
		return nil, c.Image.Corrupt(image.Skeleton, c.Meta.TailChunk, errors.New("pages among the device state"))
	} else if err != nil {
		return nil, err
	}
	o := new(opening)
	if err := o.setup(c, head.b); err != nil {
		return nil, c.Image.Corrupt(image.Skeleton, 0, err)
	}
	if err := o.devices(tail.b); err != nil {
		return nil, c.Image.Corrupt(image.Skeleton, c.Meta.TailChunk, err)
	}
	return o, nil
}

// setup writes header, configuration, postcopy's advice, the RAM setup and the
// early device sections as they stand around it, and the discards. The saved
// stream's own commands are left out: they were for another conversation.
func (o *opening) setup(c *checkpoint.Checkpoint, head []byte) error {
	cur := stream.NewCursor(bytes.NewReader(head), len(head))
	rd := stream.NewReader(cur)
	// The advice comes before the first section of any kind, as QEMU sends it.
	advised, started := false, false
	section := func(raw []byte) {
		if !advised {
			advised = true
			o.bytes = postcopy.AppendOpenReturnPath(o.bytes)
			o.bytes = postcopy.AppendAdvise(o.bytes, postcopy.Advise{PageSizes: hostPage, Target: hostPage})
		}
		o.bytes = append(o.bytes, raw...)
	}
	for {
		f, err := rd.Next()
		// A guest of which no page came has nothing behind its setup.
		end := started && errors.Is(err, stream.ErrTruncated) && cur.Offset() == int64(len(head))
		if err != nil && !end {
			return err
		}
		switch {
		case end || started && (f.Kind == stream.SectionPart || f.Kind == stream.SectionEnd):
			for _, b := range c.Meta.Blocks {
				// Whole blocks: at least one discard must come, and it undoes
				// what transparent huge pages have populated.
				o.bytes = postcopy.AppendDiscard(o.bytes, b.Name, []postcopy.Range{{Start: 0, Length: b.Used}})
			}
			return nil
		case f.Kind == stream.Header, f.Kind == stream.Configuration, f.Kind == stream.Subsection, f.Kind == stream.Footer:
			o.bytes = append(o.bytes, f.Raw...)
		case f.Kind == stream.CommandFrame:
		case f.Kind == stream.SectionEarly:
			section(f.Raw)
			if v, ok := ramparse.ParseVirtioMem(&f); ok {
				if block := v.Block(c.Meta.Blocks); block >= 0 {
					v.Unplugged(func(start, length uint64) {
						o.unplugged = append(o.unplugged, extent{block, start, length})
					})
				}
			}
		case f.Kind == stream.SectionStart && f.Section.Name == ramparse.SectionName:
			started = true
			o.ramID = f.Section.ID
			section(f.Raw)
			if err := o.ramSetup(cur); err != nil {
				return err
			}
		default:
			return fmt.Errorf("%v %q around RAM's setup", f.Kind, f.Section.Name)
		}
	}
}

func (o *opening) ramSetup(cur *stream.Cursor) error {
	dec := ramparse.NewDecoder(ramparse.Options{PageSize: hostPage})
	var rec ramparse.Record
	for rec.Kind != ramparse.EOS {
		if err := dec.Next(cur, &rec); err != nil {
			return err
		}
		o.bytes = append(o.bytes, rec.Raw...)
	}
	return nil
}

// footerLength is that of a section's footer, 7e be32 id: Possible asks for them.
const footerLength = 5

// devicesLoaded is the value of the PING that QEMU answers when it has loaded
// the package up to RUN (3, as its own source has it).
const devicesLoaded = 3

// deviceLoaded is the value of the PING behind the first device's state; the next
// ones count on from there. QEMU answers it when it has read so far, and so says by
// its silence which device it could not load. Nothing else does: its own reason is in
// its output or, from 10.2 on, nowhere.
const deviceLoaded = 0x1000

// devices writes the package: LISTEN, every device's section, PING, RUN.
func (o *opening) devices(tail []byte) error {
	end := stream.SectionsEnd(tail)
	if end < 0 {
		return errors.New("device tail does not end in QEMU_VM_EOF")
	}
	pack := postcopy.AppendListen(nil)
	at := 0
	// Without a vmdescription, or with a wrong one, it is not known where sections end.
	parsed, _ := stream.ParseTail(tail)
	for i, s := range parsed.Sections {
		o.named = append(o.named, s.Name)
		if s.Fields == nil {
			break // where it ends was found by looks, which a guest could imitate
		}
		next := s.Offset + s.Length + footerLength
		pack = append(pack, tail[at:next]...)
		pack = postcopy.AppendPing(pack, deviceLoaded+uint32(i))
		at = next
	}
	pack = append(pack, tail[at:end]...)
	pack = postcopy.AppendPing(pack, devicesLoaded)
	pack = postcopy.AppendRun(pack)
	o.bytes = postcopy.AppendPackage(o.bytes, pack)
	return nil
}
