package save

import (
	"errors"
	"fmt"
	"io"
	"regexp"
	"slices"
	"strconv"
	"time"

	"github.com/google/uuid"

	"github.com/flic-migrate/flic-migrate/ramparse"
	"github.com/flic-migrate/flic-migrate/stream"
	"github.com/flic-migrate/flic-migrate/tier/checkpoint"
	"github.com/flic-migrate/flic-migrate/tier/skeleton"
)

// parser is the first stage. It takes the stream apart, hands pages on, and keeps
// all else in the skeleton, in order. What the stream says of itself goes into meta.
type parser struct {
	feed *feed
	cur  *stream.Cursor
	walk *ramparse.Walker
	skel skeleton.Writer
	meta *checkpoint.Meta
	ans  *answers

	// begin makes the next stage, when the first page comes or when all that will
	// come has; place is nil until then.
	begin func() (stage, error)
	place stage
	// known is called when the RAM blocks are.
	known func() error
	// tick is called now and then.
	tick func(phase string, always bool)
	// hold, if not nil, says when held is called, once.
	hold *hold
	held func() error
	// warn says what the user should know.
	warn func(msg string, args ...any)

	acknowledges bool      // SWITCHOVER_ACK has been sent, or it has been said that it may be missing
	allSeen      time.Time // when every page had come once

	unseen      uint64                       // pages that are listed and have not come
	ahead       *ahead                       // which of them will; nil as long as there is no RAM
	told        uint64                       // what the feed was told last
	resent      int64                        // page records for pages that had come
	last        struct{ block, page uint64 } // of the last page record
	placedBlock uint64                       // of the last page record in the skeleton
}

// stage is what takes the pages: the matcher, or where they can be nowhere else the placer.
type stage interface {
	// has tells whether a page has come.
	has(block int, page uint64) bool
	// put takes the page of a record.
	put(rec *ramparse.Record) error
	// read copies what a page holds so far into dst; zeros if it has not come.
	read(dst []byte, block int, page uint64) error
	// flush hands on whatever is still open. Nothing is put after it.
	flush() error
}

func newParser(f *feed, cur *stream.Cursor, meta *checkpoint.Meta, a *answers) *parser {
	p := &parser{feed: f, cur: cur, meta: meta, ans: a}
	p.walk = ramparse.NewWalker(cur, 0, ramparse.Visitor{
		Frame: p.frame, Record: p.record,
		Bytes: func(b []byte) error { return p.skel.Literal(b) },
	})
	return p
}

// ram takes everything up to the device tail, which it leaves in the pipe. If there
// is something in the stream that is not understood, it takes that and all that
// follows, and meta has OpaqueBytes.
func (p *parser) ram() error {
	err := p.walk.RAM()
	if err == nil && !p.walk.NoDevices && p.meta.Blocks == nil {
		err = stream.Unknown("device section", p.cur.Offset(), "before RAM")
	}
	// What can't be told apart has no place to hold at.
	if errors.Is(err, stream.ErrUnknown) && !p.hold.pending() {
		return p.opaque(err)
	}
	if err == nil && p.place == nil && !p.walk.IgnoreShared {
		var listed uint64
		for _, b := range p.meta.Blocks {
			listed += b.Used
		}
		if listed > p.walk.Absent {
			return ErrNoMemory
		}
	}
	return err
}

// ErrNoMemory: RAM is listed and no page of it has come, nor is it known to be kept
// elsewhere, as shared memory, or to be unplugged. Of a fresh guest too there are pages,
// if only of zeros and of ROM. What leaves all of them out is a migration that hands
// them over to a QEMU on the same host.
var ErrNoMemory = errors.New("the stream has none of the guest's memory: QEMU's migration modes cpr-transfer and cpr-exec leave it out; set the migration parameter mode to normal")

// pageSize is the guest's, as far as it is known; else 0.
func (p *parser) pageSize() int {
	if d := p.walk.Decoder(); d != nil && d.PageSize() != 0 {
		return d.PageSize()
	}
	return p.walk.PageSize
}

func (p *parser) frame(f *stream.Frame) error {
	switch f.Kind {
	case stream.Configuration:
		p.meta.Machine = f.MachineType
	case stream.Subsection:
		switch c := &f.Subsection; c.Name {
		case stream.SubsectionCapabilities:
			p.meta.Capabilities, p.meta.IgnoreShared = c.Capabilities, p.walk.IgnoreShared
		case stream.SubsectionUUID:
			p.meta.GuestUUID = uuid.UUID(c.UUID).String()
		}
	case stream.SectionStart:
		if f.Section.Name != ramparse.SectionName {
			p.meta.Foreign = append(p.meta.Foreign, f.Section.Name)
		}
	case stream.CommandFrame:
		if err := p.command(&f.Command); err != nil {
			return err
		}
	}
	return p.skel.Literal(f.Raw)
}

func (p *parser) command(c *stream.Command) error {
	switch c.Number {
	case stream.CommandOpenReturnPath:
		if !p.ans.open() {
			p.warn("the source waits for an answer and there is no return path to give it on")
			return nil
		}
		// From here on the source's "completed" waits for our word, so nothing
		// needs to be held back.
		p.feed.answered()
		if p.acknowledges = takesAck(p.meta.Machine); p.acknowledges {
			return p.ans.acknowledge()
		}
	case stream.CommandPing:
		if len(c.Payload) == 4 {
			return p.ans.pong(be32(c.Payload))
		}
	}
	return nil
}

func (p *parser) record(d *ramparse.Decoder, rec *ramparse.Record) error {
	switch rec.Kind {
	case ramparse.Zero, ramparse.Page, ramparse.XBZRLE, ramparse.Compressed:
		return p.page(d, rec)
	case ramparse.MemSize:
		if p.meta.Blocks != nil {
			return stream.Damaged("ram setup", rec.Offset, "it comes twice")
		}
		// Never nil, so that a second setup is seen, of no blocks too.
		p.meta.Blocks = append([]ramparse.Block{}, d.Setup().Blocks...)
		if err := p.known(); err != nil {
			return err
		}
	case ramparse.EOS:
		p.feed.adjust(p.left())
		p.unacknowledged()
	}
	return p.skel.Literal(rec.Raw)
}

// takesAck tells from a machine type whether a source of it takes the message
// SWITCHOVER_ACK, at any time and only perhaps in vain (MIG_RP_MSG_SWITCHOVER_ACK in
// migration/migration.c). QEMU knows it since 8.1. With the types from 11.1 on the source
// counts the devices that have to be ready (switchover-ack-legacy=off): it waits for
// nothing of ours, and fails at a message too many.
func takesAck(machine string) bool {
	m := versionedMachine.FindStringSubmatch(machine)
	if m == nil {
		return false
	}
	major, err1 := strconv.Atoi(m[1])
	minor, err2 := strconv.Atoi(m[2])
	return err1 == nil && err2 == nil && (major == 8 && minor >= 1 || major == 9 || major == 10 || major == 11 && minor == 0)
}

// versionedMachine is a machine type with QEMU's version, such as pc-q35-8.1.
var versionedMachine = regexp.MustCompile(`-([0-9]+)\.([0-9]+)$`)

// ackTime is how long a source whose memory has all come once may go on before it is
// said that it may be waiting for what it is not sent.
const ackTime = 5 * time.Second

// unacknowledged is called at each section's end. A source with switchover-ack goes on
// for ever without that message, and nothing in the stream tells it from one whose
// guest writes a lot.
func (p *parser) unacknowledged() {
	switch {
	case !p.ans.opened || p.acknowledges || p.place == nil || p.unseen > 0:
	case p.allSeen.IsZero():
		p.allSeen = time.Now()
	case time.Since(p.allSeen) > ackTime:
		p.acknowledges = true // said once
		p.warn("all memory has come, and the source goes on: if its capability switchover-ack is on, switch it off; "+
			"it may be waiting for a message that other QEMUs fail at", "machine", p.meta.Machine)
	}
}

// start begins the next stage, if it has not begun.
func (p *parser) start() error {
	if p.place != nil {
		return nil
	}
	place, err := p.begin()
	if err != nil {
		return err
	}
	p.place = place
	pages := p.meta.BlockPages()
	for _, n := range pages {
		p.unseen += n
	}
	if len(pages) > 0 {
		p.ahead = newAhead(p.meta.Blocks, pages)
	}
	absent := p.walk.Absent
	if p.hold != nil {
		absent = max(absent, p.hold.Absent)
	}
	p.unseen -= min(p.unseen, absent/uint64(p.meta.PageSize))
	if p.walk.Uncertain {
		// Blocks are listed that are not sent, so what has not come says nothing
		// about how near the device tail is.
		p.unseen = 0
	}
	p.feed.adjust(p.left())
	switch {
	case p.hold == nil:
		return nil
	case p.walk.Uncertain:
		return ErrUncounted
	}
	return p.hold.start(p.unseen, p.meta.PageSize)
}

// left is how many pages are certain to come.
func (p *parser) left() uint64 {
	if p.ahead == nil {
		return 0
	}
	return p.ahead.left(p.unseen)
}

// page takes one page record.
func (p *parser) page(d *ramparse.Decoder, rec *ramparse.Record) error {
	if n := d.PageSize(); p.meta.PageSize != 0 && n != 0 && n != p.meta.PageSize {
		// The image had to begin before a page told its size, and cannot
		// hold pages of another one. All is kept, at the price of tiers.
		if err := p.skel.Literal(rec.Raw); err != nil {
			return err
		}
		return stream.Unknown("ram section", rec.Offset, "pages of %d bytes in an image for pages of %d", n, p.meta.PageSize)
	}
	if err := p.start(); err != nil {
		return err
	}
	p.last.block, p.last.page = uint64(rec.Block), rec.Page
	again := p.place.has(rec.Block, rec.Page)
	p.ahead.add(rec.Block, rec.Page, again)
	if again {
		if p.hold.pending() {
			// Passes have begun that were to wait.
			return ErrNotHeld
		}
		if p.resent++; p.resent%1024 == 0 {
			p.tick("ram", false)
		}
		return p.place.put(rec)
	}
	p.placedBlock = uint64(rec.Block)
	if err := p.skel.Page(rec.Block, rec.Page, rec.Named); err != nil {
		return err
	}
	if p.unseen > 0 {
		p.unseen--
	}
	// It falls by more than one where pages are left out.
	if left := p.left(); left != p.told && (adjustAt(left) || left+adjustEvery < p.told) {
		p.told = left
		p.feed.adjust(left)
	}
	if p.unseen%1024 == 0 {
		p.tick("ram", false)
	}
	if err := p.place.put(rec); err != nil {
		return err
	}
	if !p.hold.pending() {
		return nil
	}
	if err := p.hold.near(p.unseen); err != nil {
		return err
	}
	if p.hold.reached(p.unseen) {
		return p.held()
	}
	return nil
}

// tail reads the device tail and whatever follows it, up to the end of the stream.
func (p *parser) tail() ([]byte, error) {
	p.feed.release()
	sc := stream.NewTailScanner(p.walk.Footers())
	if p.walk.NoDevices {
		sc.Write(stream.AppendEOF(nil))
	}
	complete := func() stream.Completion {
		if p.walk.NoDevices && len(sc.Bytes()) == 1 {
			return stream.WithFooter
		}
		return sc.Complete()
	}
	for {
		if p.ans.opened {
			if ended := p.endsOpen(complete); ended {
				break
			}
		}
		more, err := p.more("device tail")
		if err != nil {
			return nil, err
		}
		if more == nil {
			break
		}
		if _, err := sc.Write(more); err != nil {
			return nil, stream.Wrap("device tail", p.cur.Offset(), err)
		}
	}
	switch complete() {
	case stream.Incomplete:
		return nil, stream.Wrap("device tail", p.cur.Offset(), io.ErrUnexpectedEOF)
	case stream.Weak:
		p.warn("the machine type is too old for its stream to say where it ends; it was taken to be whole")
	}
	return sc.Bytes(), nil
}

// more returns what comes next of the stream, nil at its end.
func (p *parser) more(what string) ([]byte, error) {
	if _, err := p.cur.Peek(1); err == io.EOF {
		return nil, nil
	} else if err != nil {
		return nil, stream.Wrap(what, p.cur.Offset(), err)
	}
	return p.cur.Next(p.cur.Buffered())
}

// quiet is how long a source with a return path must have sent nothing before
// a tail without vmdescription counts as whole: such a source keeps the pipe
// open until it is answered.
const quiet = time.Second

// endsOpen tells whether the stream has ended although the pipe is open.
func (p *parser) endsOpen(complete func() stream.Completion) bool {
	if p.cur.Buffered() > 0 || p.feed.ready(0) {
		return false
	}
	switch complete() {
	case stream.Incomplete:
		return false
	case stream.WithDescription:
		return true
	}
	return !p.feed.ready(quiet)
}

// keepTail ends the skeleton with the device tail.
func (p *parser) keepTail(tail []byte, chunks *int) error {
	// The tail gets chunks of its own: a lazy restore sends it first.
	if err := p.skel.Flush(); err != nil {
		return err
	}
	p.meta.TailChunk, p.meta.Footers = *chunks, p.walk.Footers()
	return p.skel.Literal(tail)
}

// opaque keeps the rest of the stream verbatim because of cause, the first
// thing in it that is not understood. What was placed before stays placed.
func (p *parser) opaque(cause error) error {
	p.warn("the rest of the stream is kept as it is, not understood", "cause", cause)
	p.feed.release()
	if err := p.restoreBlock(); err != nil {
		return fmt.Errorf("%w: %w", err, cause)
	}
	if err := p.skel.Literal(p.walk.Header()); err != nil {
		return err
	}
	// The end of the stream must still be recognised: a cut one is no
	// checkpoint.
	var last []byte
	const window = 4 << 20
	ended := func() bool {
		sc := stream.NewTailScanner(true)
		sc.Write(last)
		return sc.Complete() != stream.Incomplete
	}
	for {
		if p.ans.opened && p.cur.Buffered() == 0 && !p.feed.ready(quiet) && ended() {
			return nil
		}
		b, err := p.more("opaque tail")
		if err != nil {
			return err
		}
		if b == nil {
			if !ended() {
				return stream.Wrap("opaque tail", p.cur.Offset(), io.ErrUnexpectedEOF)
			}
			return nil
		}
		p.meta.OpaqueBytes += int64(len(b))
		if err := p.skel.Literal(b); err != nil {
			return err
		}
		if len(last)+len(b) > 2*window {
			last = slices.Delete(last, 0, len(last)-window)
		}
		last = append(last, b...)
	}
}

// restoreBlock makes CONTINUE mean in the restored stream what it means in the
// saved one, for what is kept verbatim from here on. Records of pages that came
// again are left out, and the last of them may have been in another block than
// the last one that stays; then its page is written once more.
func (p *parser) restoreBlock() error {
	if p.place == nil || p.placedBlock == p.last.block {
		return nil
	}
	if p.walk.InForeign {
		// A migration that fails can be repeated; a guest with pages in the
		// wrong block can't.
		return errors.New("what follows would not mean the same in a restored stream")
	}
	page := make([]byte, p.meta.PageSize)
	if err := p.place.read(page, int(p.last.block), p.last.page); err != nil {
		return err
	}
	var b []byte
	if !p.walk.InRAM {
		b = stream.AppendPart(b, p.walk.RAMSection)
	}
	b = ramparse.AppendPage(b, p.meta.Blocks[p.last.block].Name, p.last.page*uint64(p.meta.PageSize), page)
	if !p.walk.InRAM {
		b = ramparse.AppendEOS(b)
		if p.walk.Footers() {
			b = stream.AppendFooter(b, p.walk.RAMSection)
		}
	}
	return p.skel.Literal(b)
}
