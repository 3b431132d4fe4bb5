package save

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"syscall"
	"time"

	"github.com/google/uuid"

	"github.com/flic-migrate/flic-migrate/ramparse"
	"github.com/flic-migrate/flic-migrate/stream"
	"github.com/flic-migrate/flic-migrate/stream/returnpath"
	"github.com/flic-migrate/flic-migrate/tier/checkpoint"
	"github.com/flic-migrate/flic-migrate/tier/dedup"
	"github.com/flic-migrate/flic-migrate/tier/image"
	"github.com/flic-migrate/flic-migrate/tier/pagemap"
	"github.com/flic-migrate/flic-migrate/tier/progress"
	"github.com/flic-migrate/flic-migrate/tier/rescue"
	"github.com/flic-migrate/flic-migrate/tier/skeleton"
	"github.com/flic-migrate/flic-migrate/tier/store"
	"github.com/flic-migrate/flic-migrate/tier/vfs"
	"github.com/flic-migrate/flic-migrate/tier/workingset"
)

// Options say where a save goes and how. The zero value of everything but
// VM is usable.
type Options struct {
	VM string

	NVRAM         string          // path of the NVRAM file; empty: everything is cold
	NVRAMSize     int64           // cap on the NVRAM file in bytes; 0: as it is
	NVRAMFormat   bool            // make NVRAM an NVRAM file whatever it holds, unless it is one
	VolatileNVRAM bool            // accept an NVRAM file that power-off empties
	WorkingSet    *workingset.Set // nil: everything is cold

	// RunState is what the guest did before it was stopped to be saved, such
	// as "running"; empty if the stream tells it.
	RunState string

	SampleSize   int          // bytes of a partial hash; 0: dedup.DefaultSampleSize
	Energy       dedup.Energy // "": auto
	Battery      int          // percent below which EnergyAuto saves; 0: the default
	Codec        image.Codec  // of cold pages
	SegmentPages int          // 0: as many as make the codec's DefaultSegment
	Workers      int          // compressing goroutines; 0: GOMAXPROCS

	// TablesTime bounds the search for the guest's page tables, for which the
	// guest stands still; 0: 250 ms.
	TablesTime time.Duration

	Libvirt *checkpoint.Libvirt // kept with the checkpoint; may be nil

	// ReturnPath is where the answers to a source with the return-path
	// capability go: the process's stdout. Nothing else is written to it.
	ReturnPath io.Writer
	Progress   func(progress.State) // called a few times a second; may be nil
	Log        *slog.Logger         // warnings; nil: none
}

// tableChunk is how many bytes of the page map are decoded to find one page.
// A lazy restore looks some up before the guest runs: with the largest possible
// chunks, 256 KiB, that took 5 ms and 3 MB for a guest of 2 GB.
const tableChunk = 32 << 10

// Save reads a migration stream from in and commits it to the store as a
// checkpoint of o.VM. It returns when the checkpoint is durable, or with an
// error and nothing left behind. A source that opened a return path has then
// been told which of the two it is: QEMU's "completed" is Save's nil.
//
// An in that stays open when the stream has ended, as QEMU's end of a return path
// does, must be a [Pipe]: any other is read to its end.
//
// Errors wrap stream.ErrTruncated, stream.ErrDamaged or stream.ErrNotStream
// if the stream is at fault, and syscall.ENOSPC if there is no room.
func Run(ctx context.Context, fsys vfs.FS, st *store.Store, in io.Reader, o Options) (store.Ref, *checkpoint.Meta, error) {
	s := newSaver(ctx, fsys, st, in, o)
	return s.run(func() (err error) {
		s.tx, err = st.Begin(ctx, o.VM)
		return err
	})
}

// To is Save into a single file, which is no store's: the caller has opened the
// file, and names or removes it. For a caller whose source learns of a
// failure in another way than by the stream: nothing of it is held back. Hot pages
// go to NVRAM only if tx was begun by a store, which is then st; otherwise that
// is nil.
func To(ctx context.Context, fsys vfs.FS, st *store.Store, tx *store.Tx, in io.Reader, o Options) (*checkpoint.Meta, error) {
	s := newSaver(ctx, fsys, st, in, o)
	s.tx, s.single = tx, true
	_, meta, err := s.run(func() error {
		s.feed.release()
		return nil
	})
	return meta, err
}

func newSaver(ctx context.Context, fsys vfs.FS, st *store.Store, in io.Reader, o Options) *saver {
	if o.Log == nil {
		o.Log = slog.New(slog.DiscardHandler)
	}
	s := &saver{o: o, fs: fsys, st: st, ctx: ctx, begin: time.Now()}
	s.rep.Codec = o.Codec.String()
	s.feed, s.cur = newFeed(ctx, in)
	s.rd = stream.NewReader(s.cur)
	return s
}

// run is a whole save: begin gets it what it needs, and whatever happens then, the
// save has failed until its commit has returned nil. A panic is a failure too.
func (s *saver) run(begin func() error) (ref store.Ref, meta *checkpoint.Meta, err error) {
	err = rescue.Call(func() (err error) {
		if err = begin(); err != nil {
			return err
		}
		ref, err = s.save()
		return err
	})
	if err != nil {
		s.abandon(err)
		return store.Ref{}, nil, err
	}
	// The checkpoint stands, and nothing that fails from here on changes that.
	if s.returnPath {
		s.step("answer", func() error {
			_, err := s.o.ReturnPath.Write(returnpath.AppendShut(nil, 0)) // the tree's only "all is well"
			return err
		})
	}
	return ref, s.meta, nil
}

func (s *saver) save() (store.Ref, error) {
	s.skel = skeleton.Writer{Limit: image.MaxChunk, Emit: s.emitSkeleton}
	if err := s.ram(); err != nil {
		return store.Ref{}, err
	}
	if err := s.tail(); err != nil {
		return store.Ref{}, err
	}
	return s.commit()
}

// saver is one save. One goroutine runs it; the image's Writer has its own.
type saver struct {
	o     Options
	fs    vfs.FS
	st    *store.Store // nil: To without NVRAM
	ctx   context.Context
	begin time.Time

	feed *feed
	cur  *stream.Cursor
	rd   *stream.Reader
	dec  *ramparse.Decoder
	meta *checkpoint.Meta // filled as the stream tells

	tx *store.Tx
	// single is set if the image goes to a file that is no store's.
	single bool
	img    *image.Writer
	skel   skeleton.Writer
	table  *pagemap.Builder
	place  *placer
	// parent describes the VM's newest checkpoint, or is nil.
	parent *checkpoint.Meta
	rep    checkpoint.Report

	skeletonChunks int    // emitted
	early          int    // device sections ahead of RAM's pages
	hidden         uint64 // bytes of RAM that certainly don't come
	uncertain      bool   // how much comes is not known
	ramID          uint32
	head           []byte                       // of a foreign section, not yet in the skeleton
	inForeign      bool                         // amid one, which can't be interrupted
	inRAM          bool                         // inside the payload of a RAM section
	last           struct{ block, page uint64 } // of the last page record
	placedBlock    uint64                       // of the last page record in the skeleton

	unseen     uint64 // pages that have not come yet
	returnPath bool
	noDevices  bool // QEMU_VM_EOF came without a device section
	lastTick   time.Time
	scratch    []byte // one page
}

// abandon ends a save that failed with cause, and leaves nothing of it. The source
// is told last: when QEMU hears of a failure, the space is free already. A step that
// fails, or panics, keeps none of the others from being done.
func (s *saver) abandon(cause error) {
	var bug *rescue.Error
	if errors.As(cause, &bug) {
		s.step("log", func() error {
			s.o.Log.Error(bug.Error(), "stack", string(bug.Stack))
			return nil
		})
	}
	if s.img != nil {
		s.step("end of the image", func() error { s.img.Abort(); return nil })
	}
	if s.tx != nil {
		s.step("release of the NVRAM, which gc will do,", s.tx.Abort)
	}
	if s.returnPath {
		s.step("answer", func() error {
			_, err := s.o.ReturnPath.Write(returnpath.AppendShut(nil, failed))
			return err
		})
	}
}

// failed is what SHUT says of a save that left no checkpoint: anything but 0.
const failed = 1

// step does one thing of a save's end. That it fails is worth a warning and no more.
func (s *saver) step(what string, fn func() error) {
	if err := rescue.Call(fn); err != nil {
		_ = rescue.Call(func() error {
			s.o.Log.Warn(what+" failed", "error", err)
			return nil
		})
	}
}

// ram takes everything up to the device tail, which it leaves in the pipe
// until the RAM is durable.
func (s *saver) ram() error {
	s.meta = &checkpoint.Meta{
		Identity: checkpoint.Identity{VM: s.o.VM, Created: s.begin},
		Bulk:     checkpoint.Bulk{Libvirt: s.o.Libvirt},
	}
	err := s.frames()
	if errors.Is(err, stream.ErrUnknown) {
		return s.opaque(err)
	}
	if err != nil {
		return err
	}
	s.rep.Seconds.RAM = s.since(s.begin)
	return s.sync()
}

// sync makes all that was placed durable.
func (s *saver) sync() error {
	start := time.Now()
	s.tick("sync", true)
	if err := s.start(); err != nil {
		return err
	}
	if err := s.place.flush(); err != nil {
		return err
	}
	if err := s.place.syncNVRAM(); err != nil {
		return err
	}
	err := s.img.Sync()
	s.rep.Seconds.Sync = s.since(start)
	return err
}

func (s *saver) since(t time.Time) float64 { return time.Since(t).Seconds() }

// frames reads frame after frame until the device tail begins.
func (s *saver) frames() error {
	for {
		f, err := s.rd.Next()
		if err != nil {
			return err
		}
		switch f.Kind {
		case stream.SectionFull:
			if s.meta.Blocks == nil {
				return stream.Unknown("device section", f.Offset, "before RAM")
			}
			return nil
		case stream.EOF:
			s.noDevices = true
			return nil
		}
		switch f.Kind {
		case stream.SectionStart, stream.SectionPart, stream.SectionEnd:
			if f.Section.Name != ramparse.SectionName {
				if err := s.foreign(f); err != nil {
					return err
				}
				continue
			}
		}
		if err := s.skel.Literal(f.Raw); err != nil {
			return err
		}
		switch f.Kind {
		case stream.SectionEarly:
			s.early++
			s.absent(unplugged(&f))
		case stream.Configuration:
			s.meta.Machine = f.MachineType
		case stream.Subsection:
			s.subsection(f.Subsection)
		case stream.CommandFrame:
			err = s.command(f.Command)
		case stream.SectionStart, stream.SectionPart, stream.SectionEnd:
			s.ramID = f.Section.ID
			err = s.records()
		}
		if err != nil {
			return err
		}
	}
}

// foreign takes an iterable section that is not RAM's. Its head is kept back
// until something of its payload is understood, so that opaque can still put a
// record in front of it.
func (s *saver) foreign(f stream.Frame) error {
	if f.Kind == stream.SectionStart {
		s.meta.Foreign = append(s.meta.Foreign, f.Section.Name)
	}
	s.head = bytes.Clone(f.Raw)
	err := s.rd.CopyForeign(func(b []byte) error {
		if s.head != nil {
			if err := s.skel.Literal(s.head); err != nil {
				return err
			}
			s.head, s.inForeign = nil, true
		}
		return s.skel.Literal(b)
	})
	s.inForeign = s.inForeign && err != nil
	return err
}

// absent notes what an early section says of RAM that will not come.
func (s *saver) absent(bytes uint64, ok bool) {
	s.hidden += bytes
	s.uncertain = s.uncertain || !ok
}

func (s *saver) subsection(c stream.ConfigSubsection) {
	switch c.Name {
	case stream.SubsectionTargetPageBits:
		s.meta.PageSize = 1 << c.TargetPageBits
	case stream.SubsectionCapabilities:
		s.meta.Capabilities = c.Capabilities
		for _, name := range c.Capabilities {
			s.meta.IgnoreShared = s.meta.IgnoreShared || name == "x-ignore-shared"
		}
	case stream.SubsectionUUID:
		s.meta.GuestUUID = uuid.UUID(c.UUID).String()
	}
}

func (s *saver) command(c stream.Command) error {
	switch c.Number {
	case stream.CommandOpenReturnPath:
		if s.o.ReturnPath == nil {
			s.o.Log.Warn("the source waits for an answer and there is no return path to give it on")
			return nil
		}
		// From here on the source's "completed" waits for our word, so
		// nothing needs to be held back.
		s.returnPath = true
		s.feed.release()
	case stream.CommandPing:
		if s.returnPath && len(c.Payload) == 4 {
			_, err := s.o.ReturnPath.Write(returnpath.AppendPong(nil, be32(c.Payload)))
			return err
		}
	case stream.CommandPostcopyAdvise:
		if len(c.Payload) == 16 && s.meta.PageSize == 0 {
			if n := be64(c.Payload[8:]); n >= 1<<10 && n <= 1<<16 && n&(n-1) == 0 {
				s.meta.PageSize = int(n)
			}
		}
	case stream.CommandPackaged:
		return s.rd.CopyPackage(s.skel.Literal)
	}
	return nil
}

// records takes the payload of one RAM section.
func (s *saver) records() error {
	if s.dec == nil {
		s.dec = ramparse.NewDecoder(ramparse.Options{PageSize: s.meta.PageSize, IgnoreShared: s.meta.IgnoreShared})
	}
	var rec ramparse.Record
	s.inRAM = true
	for {
		if err := s.dec.Next(s.cur, &rec); err != nil {
			return err
		}
		switch rec.Kind {
		case ramparse.MemSize:
			if s.meta.Blocks != nil {
				return stream.Damaged("ram setup", rec.Offset, "it comes twice")
			}
			if err := s.setup(s.dec.Setup()); err != nil {
				return err
			}
			if err := s.skel.Literal(rec.Raw); err != nil {
				return err
			}
		case ramparse.Zero, ramparse.Page, ramparse.XBZRLE, ramparse.Compressed:
			if err := s.page(&rec); err != nil {
				return err
			}
		default:
			if err := s.skel.Literal(rec.Raw); err != nil {
				return err
			}
			if rec.Kind == ramparse.EOS {
				s.inRAM = false
				s.feed.adjust(s.unseen)
				return nil
			}
		}
	}
}

func (s *saver) setup(su *ramparse.Setup) error {
	s.meta.Blocks = make([]checkpoint.Block, len(su.Blocks))
	for i, b := range su.Blocks {
		s.meta.Blocks[i] = checkpoint.Block{Name: b.Name, Used: b.Used, PageSize: b.PageSize}
		if b.HasGPA {
			gpa := b.GPA
			s.meta.Blocks[i].GPA = &gpa
		}
	}
	return s.checkSpace()
}

// checkSpace fails at once where it can be foreseen that the save won't fit:
// when not even half of what this VM's newest checkpoint took is free.
func (s *saver) checkSpace() error {
	if s.single {
		return nil
	}
	last, err := s.st.Describe(s.ctx, store.Ref{VM: s.o.VM})
	if err != nil {
		return nil // no earlier checkpoint to learn from
	}
	s.parent = last.Meta
	info, err := s.fs.StatFS(s.st.Dir())
	if err != nil {
		return err
	}
	need := last.Report.FlashBytes
	switch {
	case info.Free < need/2:
		return &SpaceError{Dir: s.st.Dir(), Free: info.Free, Need: need}
	case info.Free < need:
		s.o.Log.Warn("the store may be too full", "free", info.Free, "last checkpoint took", need)
	}
	return nil
}

// openImage opens the image once the page size is known: with the first page
// record, or when there is something to write before one has come.
func (s *saver) openImage() error {
	if s.img != nil {
		return nil
	}
	if s.dec != nil && s.dec.PageSize() != 0 {
		s.meta.PageSize = s.dec.PageSize()
	}
	if s.meta.PageSize == 0 {
		// If the decoder finds another size later, the rest is kept as it is
		// (see page). It must not be told to believe in this one: pages of
		// 8 KiB cut in the middle look like a damaged stream.
		s.meta.PageSize = defaultPageSize
	}
	segment := s.o.SegmentPages
	if segment == 0 {
		segment = max(2, s.o.Codec.DefaultSegment()/s.meta.PageSize)
	}
	s.meta.UUID = s.tx.UUID()
	var err error
	s.img, err = image.NewWriter(s.tx.Image(), image.Header{
		PageSize: s.meta.PageSize, SegmentPages: segment, UUID: s.tx.UUID(), Created: s.begin,
	}, s.o.Codec, s.o.Workers)
	return err
}

// start makes everything ready for pages, once the blocks and the page size are
// known.
func (s *saver) start() error {
	if s.place != nil {
		return nil
	}
	err := s.openImage()
	if err != nil {
		return err
	}
	pages := s.meta.BlockPages()
	if s.table, err = pagemap.New(pages); err != nil {
		return stream.Damaged("ram setup", s.cur.Offset(), "%v", err)
	}
	for _, n := range pages {
		s.unseen += n
	}
	s.rep.Pages = int64(s.unseen)
	s.unseen -= min(s.unseen, s.hidden/uint64(s.meta.PageSize))
	if s.meta.IgnoreShared || s.uncertain {
		// Shared blocks are listed and never sent, so what has not come says
		// nothing about how near the device tail is.
		s.unseen = 0
	}
	s.scratch = make([]byte, s.meta.PageSize)
	s.feed.adjust(s.unseen)
	s.place = newPlacer(s)
	return s.place.openNVRAM()
}

const defaultPageSize = 4096

// emitSkeleton writes a chunk of the skeleton log.
func (s *saver) emitSkeleton(chunk []byte) error {
	if err := s.openImage(); err != nil {
		return err
	}
	s.skeletonChunks++
	return s.chunk(image.Skeleton, chunk)
}

func (s *saver) chunk(k image.Kind, b []byte) error {
	buf := s.img.NewBuffer(k)
	buf.Data = append(buf.Data, b...)
	return s.img.Submit(buf)
}

// page takes one page record.
func (s *saver) page(rec *ramparse.Record) error {
	if n := s.dec.PageSize(); s.img != nil && n != 0 && n != s.meta.PageSize {
		// The image had to begin before a page told its size, and cannot
		// hold pages of another one. All is kept, at the price of tiers.
		if err := s.skel.Literal(rec.Raw); err != nil {
			return err
		}
		return stream.Unknown("ram section", rec.Offset, "pages of %d bytes in an image for pages of %d", n, s.meta.PageSize)
	}
	if s.place == nil {
		if err := s.start(); err != nil {
			return err
		}
	}
	s.last.block, s.last.page = uint64(rec.Block), rec.Page
	old := s.table.Get(rec.Block, rec.Page)
	if old.Kind() == pagemap.Absent {
		s.placedBlock = uint64(rec.Block)
		if err := s.skel.Page(rec.Block, rec.Page, rec.Named); err != nil {
			return err
		}
		if s.unseen > 0 {
			s.unseen--
		}
		if adjustAt(s.unseen) {
			s.feed.adjust(s.unseen)
		}
		if s.unseen%1024 == 0 {
			s.tick("ram", false)
		}
	} else {
		s.rep.Resent++
		if s.rep.Resent%1024 == 0 {
			s.tick("ram", false)
		}
	}
	switch rec.Kind {
	case ramparse.Zero:
		s.place.fill(rec.Block, rec.Page, rec.Fill)
		return nil
	case ramparse.Page:
		return s.place.page(rec.Block, rec.Page, rec.Data)
	case ramparse.Compressed:
		return s.place.record(rec.Block, rec.Page, rec.Data)
	}
	// XBZRLE changes the page's last content, wherever that is by now.
	if err := s.place.content(s.scratch, old); err != nil {
		return err
	}
	if err := ramparse.ApplyXBZRLE(s.scratch, rec.Data); err != nil {
		return stream.Damaged("xbzrle page", rec.Offset, "%v", err)
	}
	return s.place.page(rec.Block, rec.Page, s.scratch)
}

// tail reads the device tail and whatever follows it.
func (s *saver) tail() error {
	if s.meta.OpaqueBytes > 0 {
		return nil // the rest of the stream has been taken already
	}
	start := time.Now()
	s.tick("tail", true)
	s.feed.release()
	sc := stream.NewTailScanner(s.rd.Footers())
	if s.noDevices {
		sc.Write([]byte{0})
	}
	var done stream.Completion
	for {
		if s.returnPath {
			if done = s.endWithoutEOF(sc); done != stream.Incomplete {
				break
			}
		}
		if _, err := s.cur.Peek(1); err == io.EOF {
			done = s.complete(sc)
			break
		} else if err != nil {
			return stream.Wrap("device tail", s.cur.Offset(), err)
		}
		b, err := s.cur.Next(s.cur.Buffered())
		if err != nil {
			return err
		}
		if _, err := sc.Write(b); err != nil {
			return stream.Wrap("device tail", s.cur.Offset(), err)
		}
	}
	switch done {
	case stream.Incomplete:
		return stream.Wrap("device tail", s.cur.Offset(), io.ErrUnexpectedEOF)
	case stream.Weak:
		s.o.Log.Warn("the machine type is too old for its stream to say where it ends; it was taken to be whole")
	}
	t, err := stream.ParseTail(sc.Bytes())
	if err == nil && t.Description != nil && t.Early != s.early {
		err = fmt.Errorf("%d sections stand before RAM, %d are described", s.early, t.Early)
	}
	if err != nil {
		// The tail is kept verbatim whether it is understood or not.
		s.o.Log.Warn("device tail is not as its vmdescription says", "error", err)
	}
	if s.meta.RunState = t.RunState; s.o.RunState != "" {
		s.meta.RunState = s.o.RunState
	}
	if err := s.findTables(sc.Bytes(), &t); err != nil {
		return err
	}
	s.rep.Seconds.Tail = s.since(start)
	// The tail gets chunks of its own: a lazy restore sends it first.
	if err := s.skel.Flush(); err != nil {
		return err
	}
	s.meta.TailChunk, s.meta.Footers = s.skeletonChunks, s.rd.Footers()
	return s.skel.Literal(sc.Bytes())
}

// quiet is how long a source with a return path must have sent nothing before
// a tail without vmdescription counts as whole: such a source keeps the pipe
// open until it is answered.
const quiet = time.Second

func (s *saver) complete(sc *stream.TailScanner) stream.Completion {
	if s.noDevices && len(sc.Bytes()) == 1 {
		return stream.WithFooter
	}
	return sc.Complete()
}

// endWithoutEOF tells whether the stream has ended although the pipe is open.
func (s *saver) endWithoutEOF(sc *stream.TailScanner) stream.Completion {
	if s.cur.Buffered() > 0 || s.feed.ready(0) {
		return stream.Incomplete
	}
	c := s.complete(sc)
	if c != stream.WithDescription && c != stream.Incomplete && s.feed.ready(quiet) {
		return stream.Incomplete
	}
	return c
}

// opaque keeps the rest of the stream verbatim because of cause, the first
// thing in it that is not understood. What was placed before stays placed.
func (s *saver) opaque(cause error) error {
	s.o.Log.Warn("the rest of the stream is kept as it is, not understood", "cause", cause)
	s.feed.release()
	if err := s.restoreBlock(); err != nil {
		return fmt.Errorf("%w: %w", err, cause)
	}
	if err := s.skel.Literal(s.head); err != nil {
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
		if s.returnPath && s.cur.Buffered() == 0 && !s.feed.ready(quiet) && ended() {
			break
		}
		_, err := s.cur.Peek(1)
		if err == io.EOF {
			if !ended() {
				return stream.Wrap("opaque tail", s.cur.Offset(), io.ErrUnexpectedEOF)
			}
			break
		}
		if err != nil {
			return stream.Wrap("opaque tail", s.cur.Offset(), err)
		}
		b, err := s.cur.Next(s.cur.Buffered())
		if err != nil {
			return err
		}
		s.meta.OpaqueBytes += int64(len(b))
		if err := s.skel.Literal(b); err != nil {
			return err
		}
		if len(last)+len(b) > 2*window {
			last = append(last[:0], last[len(last)-window:]...)
		}
		last = append(last, b...)
	}
	s.rep.Seconds.RAM = s.since(s.begin)
	return s.sync()
}

// restoreBlock makes CONTINUE mean in the restored stream what it means in the
// saved one, for what is kept verbatim from here on. Records of pages that came
// again are left out, and the last of them may have been in another block than
// the last one that stays; then its page is written once more.
func (s *saver) restoreBlock() error {
	if s.place == nil || s.placedBlock == s.last.block {
		return nil
	}
	if s.inForeign {
		// A migration that fails can be repeated; a guest with pages in the
		// wrong block can't.
		return errors.New("what follows would not mean the same in a restored stream")
	}
	e := s.table.Get(int(s.last.block), s.last.page)
	if err := s.place.content(s.scratch, e); err != nil {
		return err
	}
	var b []byte
	if !s.inRAM {
		b = stream.AppendPart(b, s.ramID)
	}
	b = ramparse.AppendPage(b, s.meta.Blocks[s.last.block].Name, s.last.page*uint64(s.meta.PageSize), s.scratch)
	if !s.inRAM {
		b = ramparse.AppendEOS(b)
		if s.rd.Footers() {
			b = stream.AppendFooter(b, s.ramID)
		}
	}
	return s.skel.Literal(b)
}

// commit writes what describes the checkpoint and makes it visible.
func (s *saver) commit() (store.Ref, error) {
	start := time.Now()
	s.tick("commit", true)
	if err := s.skel.Flush(); err != nil {
		return store.Ref{}, err
	}
	err := s.table.Encode(tableChunk, func(at pagemap.Start, b []byte) error {
		s.meta.MapChunks = append(s.meta.MapChunks, at)
		return s.chunk(image.PageMap, b)
	})
	if err != nil {
		return store.Ref{}, err
	}
	if err := s.place.writeNVRAMPart(); err != nil {
		return store.Ref{}, err
	}
	if err := s.img.Drain(); err != nil {
		return store.Ref{}, err
	}
	s.report()
	// META states the size of the file that holds it: what follows it is
	// known to the byte but for META's own frame, so that is left out.
	s.rep.FlashBytes = s.img.Len()
	s.rep.Seconds.Commit = s.since(start)
	s.rep.Seconds.Total = s.since(s.begin)
	s.meta.Report = s.rep
	meta, identity, err := s.meta.Documents()
	if err != nil {
		return store.Ref{}, err
	}
	if err := s.img.Finish(meta, identity); err != nil {
		return store.Ref{}, err
	}
	s.rep.FlashBytes = s.img.Len()
	ref, err := s.tx.Commit(s.ctx)
	if err != nil {
		return store.Ref{}, fmt.Errorf("commit of checkpoint %v: %w", s.tx.UUID(), err)
	}
	s.rep.Seconds.Commit = s.since(start)
	s.rep.Seconds.Total = s.since(s.begin)
	s.meta.Report = s.rep
	return ref, nil
}

// report counts what the page map came to.
func (s *saver) report() {
	s.rep.BytesIn = s.cur.Offset()
	s.place.report(&s.rep)
	s.table.Runs(func(r pagemap.Run) error {
		n := int64(r.Count)
		switch r.Kind {
		case pagemap.Fill:
			if r.First == 0 {
				s.rep.Zero += n
			}
		case pagemap.ZeroData:
			s.rep.Zero += n
			s.rep.ZeroAsData += n
		case pagemap.NVRAM:
			s.rep.Hot += n
		case pagemap.Flash:
			s.rep.Cold += n
		}
		return nil
	})
}

func (s *saver) tick(phase string, always bool) {
	if s.o.Progress == nil {
		return
	}
	now := time.Now()
	if !always && now.Sub(s.lastTick) < progress.Every {
		return
	}
	s.lastTick = now
	p := progress.State{Phase: phase, PagesAll: s.rep.Pages, Pages: s.rep.Pages - int64(s.unseen), BytesIn: s.cur.Offset()}
	if s.img != nil {
		p.BytesOut = s.img.Len()
	}
	if s.place != nil {
		// The image can be open before there is a page to place.
		p.BytesOut += s.place.nvramBytes()
	}
	s.o.Progress(p)
}

// SpaceError says that a save was given up because it would not have fitted.
type SpaceError struct {
	Dir        string
	Free, Need int64 // bytes
}

func (e *SpaceError) Error() string {
	return fmt.Sprintf("%s: no space: %d bytes are free, and this VM's last checkpoint took %d", e.Dir, e.Free, e.Need)
}

// Unwrap lets callers treat it like a write that found the disk full.
func (e *SpaceError) Unwrap() error { return syscall.ENOSPC }
