package save

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"slices"
	"syscall"
	"time"

	"github.com/google/uuid"

	"github.com/flic-migrate/flic-migrate/stream"
	"github.com/flic-migrate/flic-migrate/tier/checkpoint"
	"github.com/flic-migrate/flic-migrate/tier/dedup"
	"github.com/flic-migrate/flic-migrate/tier/digest"
	"github.com/flic-migrate/flic-migrate/tier/image"
	"github.com/flic-migrate/flic-migrate/tier/pagemap"
	"github.com/flic-migrate/flic-migrate/tier/progress"
	"github.com/flic-migrate/flic-migrate/tier/rescue"
	"github.com/flic-migrate/flic-migrate/tier/share"
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

	// Parent is the checkpoint that this one may refer to for what has not changed:
	// ParentAuto or empty, ParentNone, or a name. To refers to none.
	Parent string
	// Since is the checkpoint that the guest goes on from, if that is known: ParentAuto
	// takes it rather than the newest.
	Since store.Ref
	// TrustDomain is whose pages the checkpoint may have in common with others; empty: that
	// of the VM's newest checkpoint, or of the parent if it is the VM's first, or else
	// store.DefaultDomain. A parent of another domain is none, and one that was named fails
	// the save. To has none.
	TrustDomain string
	// Share says where pages are looked for that the parent does not have at their place:
	// ShareStore, ShareVM or ShareNone; empty: ShareStore, but with ParentNone, which stores
	// all anew, ShareNone. A save that is held (Hold), but for a
	// member of a group, looks nowhere, nor does To.
	Share string
	// Peer makes the save a member of a group; nil: it is none. To is none.
	Peer *Peer

	// Disks are disk images that pages are looked for in, as OpenDisks gives them; they
	// stay open until the save has ended. To looks in none.
	Disks []Disk
	// DiskEnough is how many pages must be near each other on a disk for them to be referred
	// to rather than stored; 0: what was measured to be worth it.
	DiskEnough int
	// UnusedDisks are those that it was to look in and can't, for the report.
	UnusedDisks []checkpoint.DiskUnused

	Libvirt *checkpoint.Libvirt // kept with the checkpoint; may be nil
	// VMDisks describes the VM's disks, to be kept with the checkpoint. It is called when
	// the stream has ended: the guest stands still, and QEMU has written all to them. It
	// may be nil, and is for a source that does so.
	VMDisks func() []checkpoint.VMDisk
	// Keeps: VMDisks may tell of disks that the store keeps with the checkpoint. They must
	// be there, durably, and stay until the save has ended.
	Keeps bool

	Hold *Hold // the save waits near the end of the first pass; nil: it does not

	// Commit makes the checkpoint visible, durably, as tx.Commit does: nil is that. The
	// image is whole and synced, and the transaction must have ended when it returns. A
	// group's waits for the other members.
	Commit func(ctx context.Context, tx *store.Tx) (store.Ref, error)

	// After is given what is left to do once the checkpoint stands, for the saves that come: a
	// guest need not stand still for it. It is to be called once, whatever becomes of the
	// checkpoint, and before the report is read for Beside. nil: Run does it.
	After func(rest func(context.Context))

	// ReturnPath is where the answers to a source with the return-path
	// capability go: the process's stdout. Nothing else is written to it. If it
	// has a SetWriteDeadline, no answer waits for long.
	ReturnPath io.Writer

	// Silence is for how long the source may send nothing (ErrSilent); 0: what
	// suits the moment, see feed.patience.
	Silence time.Duration

	Progress func(progress.State) // called a few times a second; may be nil
	Log      *slog.Logger         // warnings; nil: none
}

// tableChunk is how many bytes of the page map are decoded to find one page.
// A lazy restore looks some up before the guest runs: with the largest possible
// chunks, 256 KiB, that took 5 ms and 3 MB for a guest of 2 GB.
const tableChunk = 32 << 10

// Run reads a migration stream from in and commits it to the store as a
// checkpoint of o.VM. It returns when the checkpoint is durable, or with an
// error and nothing left behind. A source that opened a return path has then
// been told which of the two it is: QEMU's "completed" is Run's nil.
//
// An in that stays open when the stream has ended, as QEMU's end of a return path
// does, must be a [stream.Pipe]: any other is read to its end.
//
// Errors wrap stream.ErrTruncated, stream.ErrDamaged or stream.ErrNotStream
// if the stream is at fault, and syscall.ENOSPC if there is no room.
func Run(ctx context.Context, fsys vfs.FS, st *store.Store, in io.Reader, o Options) (store.Ref, *checkpoint.Meta, error) {
	s := newSaver(ctx, fsys, st, in, o)
	return s.run(func() (err error) {
		if o.TrustDomain != "" {
			if err := store.CheckDomain(o.TrustDomain); err != nil {
				return err
			}
		}
		if s.out.tx, err = st.Begin(ctx, o.VM); err != nil {
			return err
		}
		if err := s.openParent(); err != nil {
			return err
		}
		return s.openShared()
	})
}

// To is Run into a single file, which is no store's: the caller has opened the
// file, and names or removes it. For a caller whose source learns of a
// failure in another way than by the stream: nothing of it is held back. Hot pages
// go to NVRAM only if tx was begun by a store, which is then st; otherwise that
// is nil.
func To(ctx context.Context, fsys vfs.FS, st *store.Store, tx *store.Tx, in io.Reader, o Options) (*checkpoint.Meta, error) {
	s := newSaver(ctx, fsys, st, in, o)
	s.out.tx, s.single = tx, true
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
	s := &saver{o: o, fs: fsys, st: st, ctx: ctx, begin: time.Now(), ans: answers{w: o.ReturnPath}}
	s.meta = &checkpoint.Meta{
		Identity: checkpoint.Identity{VM: o.VM, Created: s.begin},
		Bulk:     checkpoint.Bulk{Libvirt: o.Libvirt},
	}
	s.rep.Codec, s.rep.UnusedDisks = o.Codec.String(), o.UnusedDisks
	s.out = output{created: s.begin, codec: o.Codec, workers: o.Workers, segment: o.SegmentPages}
	var cur *stream.Cursor
	s.feed, cur = newFeed(ctx, in, o.Silence)
	s.parse = newParser(s.feed, cur, s.meta, &s.ans)
	if o.Hold != nil {
		s.parse.hold, s.parse.held = newHold(*o.Hold, cur, func() *store.Tx { return s.out.tx }), s.hold
		s.feed.hold = s.parse.hold
		// Nothing is known yet of how much RAM is to come.
		cur.SetReadAhead(minPipe)
	}
	s.parse.begin, s.parse.known, s.parse.tick, s.parse.warn = s.place, s.checkSpace, s.tick, s.o.Log.Warn
	s.parse.skel = skeleton.Writer{Limit: image.MaxChunk, Emit: s.emitSkeleton}
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
	s.step("answer", s.ans.done)
	rest := func(ctx context.Context) {
		if s.st != nil && ref.N > 0 {
			s.step("summary of the VM's checkpoints", func() error { s.st.Summarize(ctx, ref); return nil })
		}
		s.step("note for the index of shared pages", func() error { return s.note(ctx) })
	}
	if s.o.After != nil {
		s.o.After(rest)
	} else {
		rest(s.ctx)
	}
	return ref, s.meta, nil
}

// note tells who saves next that there is a checkpoint that is in no index, and counts those
// that have come meanwhile. In this order: of two saves that end at the same time one at
// least sees the other.
func (s *saver) note(ctx context.Context) error {
	known := s.shared.known()
	s.shared.close()
	if s.st == nil || s.meta.TrustDomain == "" || s.meta.Digests == nil {
		return nil
	}
	c, err := s.st.Share(s.meta.TrustDomain)
	im := share.Image{UUID: s.meta.UUID, VM: s.meta.VM, Number: s.meta.Number}
	if err == nil {
		err = c.Note(im)
	}
	// Who saves energy does not look twice.
	if err != nil || s.rep.NotShared != "" || s.rep.ChunkSize > s.meta.PageSize {
		return err
	}
	s.meta.Report.Beside, err = s.beside(ctx, c, known)
	if err == nil && s.meta.Report.Beside > 0 {
		err = c.NoteBeside(im) // whoever is to unite them may be killed
	}
	return err
}

// beside counts the images of its domain that known does not know, but for those of its own
// group.
func (s *saver) beside(ctx context.Context, c *share.Catalog, known func(uuid.UUID) bool) (n int64, err error) {
	list, err := c.News()
	if err != nil {
		return 0, err
	}
	x, err := c.Open(ctx, share.NewKeyID(s.out.hash))
	if err != nil {
		return 0, err
	}
	defer x.Close()
	seen := map[uuid.UUID]bool{s.meta.UUID: true}
	if p := s.o.Peer; p != nil {
		for _, m := range p.members {
			seen[m.ref.UUID] = true
		}
	}
	for _, im := range append(list, x.Images()...) {
		if !seen[im.UUID] && !known(im.UUID) && (s.o.Share != ShareVM || im.VM == s.o.VM) {
			n++
		}
		seen[im.UUID] = true
	}
	return n, nil
}

// peer is the save as a member of a group that pages can be shared with; nil: none can. A
// member whose parent has another key than the others is one all the same.
func (s *saver) peer() *Peer {
	if p := s.o.Peer; p != nil && s.out.hash != nil && len(p.members) <= maxPeers && p.hash.Same(s.out.hash) {
		return p
	}
	return nil
}

// maxPeers keeps the references of a checkpoint to those that the format allows.
const maxPeers = 512

// openShared begins to look for what pages can be shared with. What goes wrong with it
// costs no save.
func (s *saver) openShared() error {
	why, err := s.notShared()
	if err == nil && why == "" {
		s.shared, err = openShared(s.ctx, s.st, s.out.tx, s.meta.TrustDomain, s.out.hash, &s.o)
	}
	if s.ctx.Err() != nil {
		return context.Cause(s.ctx)
	}
	if err != nil {
		why = err.Error()
	}
	s.rep.NotShared, s.rep.ShareVM = why, s.o.Share == ShareVM
	if s.shared != nil || s.peer() != nil {
		s.out.features.Incompat |= image.HasReferences
	}
	return nil
}

// notShared is why no pages are looked for in other checkpoints, if they are not.
func (s *saver) notShared() (string, error) {
	switch {
	case s.o.Share == ShareNone:
		return "it was not asked for", nil
	case s.o.Share == "" && s.o.Parent == ParentNone:
		return "all is stored anew: --parent none", nil
	case s.meta.TrustDomain == "" && s.par != nil:
		return "its parent is in no trust domain: --parent none begins anew", nil
	case s.meta.TrustDomain == "":
		return "it is in no trust domain", nil
	case s.o.Hold != nil && s.o.Peer == nil:
		// What it could refer to could not be removed as long as it waits.
		return "it was armed before", nil
	}
	h, err := s.st.Trust(s.ctx, s.meta.TrustDomain)
	if err == nil && !h.Same(s.out.hash) {
		return "its parent is not of this store: --parent none begins anew", nil
	}
	return "", err
}

// save is the stages, one after the other.
func (s *saver) save() (store.Ref, error) {
	if err := s.parse.ram(); err != nil {
		return store.Ref{}, err
	}
	if s.parse.hold.pending() {
		return store.Ref{}, ErrNotHeld
	}
	s.rep.Seconds.RAM = s.since(s.begin)
	if err := s.sync(); err != nil {
		return store.Ref{}, err
	}
	// What was not understood has taken the tail with it.
	if s.meta.OpaqueBytes == 0 {
		if err := s.tail(); err != nil {
			return store.Ref{}, err
		}
	}
	return s.commit()
}

// saver is one save: its stages, and what they have in common. One goroutine runs
// it; the image's Writer has its own.
type saver struct {
	o     Options
	fs    vfs.FS
	st    *store.Store // nil: To without NVRAM
	ctx   context.Context
	begin time.Time

	feed  *feed
	parse *parser
	out   output
	ans   answers

	meta *checkpoint.Meta // filled as the stream tells
	rep  checkpoint.Report
	past past
	par  *parent // nil: there is none
	// match and placer are the stages behind the parser, once there are pages; match
	// is nil if pages can be nowhere else.
	match  *matcher
	placer *placer
	shared *shared // nil: no other images are looked in
	// single is set if the image goes to a file that is no store's.
	single bool

	skeletonChunks int // emitted
	lastTick       time.Time
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
	if s.match != nil {
		s.step("end of the comparison", func() error { s.match.stop(); return nil })
	}
	s.step("word to the other members", func() error { s.o.Peer.fail(cause); return nil })
	s.step("end of the index", func() error { s.shared.close(); return nil })
	if s.out.img != nil {
		s.step("end of the image", func() error { s.out.img.Abort(); return nil })
	}
	if s.out.tx != nil {
		s.step("release of the NVRAM, which gc will do,", s.out.tx.Abort)
	}
	s.step("answer", func() error {
		err := s.ans.failed()
		if errors.Is(err, syscall.EPIPE) || errors.Is(err, syscall.ECONNRESET) || errors.Is(err, fs.ErrClosed) {
			return nil // nobody waits for it, as when the source, or we, have given up
		}
		return err
	})
}

// step does one thing of a save's end. That it fails is worth a warning and no more.
func (s *saver) step(what string, fn func() error) {
	if err := rescue.Call(fn); err != nil {
		_ = rescue.Call(func() error {
			s.o.Log.Warn(what+" failed", "error", err)
			return nil
		})
	}
}

// checkSpace looks at the VM's newest checkpoint, and fails at once where it can be
// foreseen that the save won't fit: when not even half of what that took is free. What
// an increment will take is not known before.
func (s *saver) checkSpace() error {
	if s.st == nil {
		return nil
	}
	s.past = newPast(s.ctx, s.st, s.o.VM, s.o.NVRAM != "", s.o.Log)
	if s.single || s.par != nil || s.past.meta == nil {
		return nil
	}
	info, err := s.fs.StatFS(s.st.Dir())
	if err != nil {
		return err
	}
	need := s.past.meta.Report.FlashBytes
	switch {
	case info.Free < need/2:
		return &SpaceError{Dir: s.st.Dir(), Free: info.Free, Need: need}
	case info.Free < need:
		s.o.Log.Warn("the store may be too full", "free", info.Free, "last checkpoint took", need)
	}
	return nil
}

// defaultPageSize is what the image has if it must begin before a page has told.
const defaultPageSize = 4096

// open begins the image: with the first page record, or when there is something to
// write before one has come.
func (s *saver) open() error {
	if s.meta.PageSize != 0 {
		return nil
	}
	size := s.parse.pageSize()
	if size == 0 {
		// If the decoder finds another size later, the rest is kept as it is
		// (see parser.page). It must not be told to believe in this one: pages of
		// 8 KiB cut in the middle look like a damaged stream.
		size = defaultPageSize
	}
	if err := s.out.open(size); err != nil {
		return err
	}
	s.meta.PageSize, s.meta.UUID, s.meta.Number = size, s.out.tx.UUID(), s.out.tx.Ref().N
	return nil
}

// openParent opens the checkpoint that this one may refer to. Digests are its digests'
// like, so that they compare; without one they are those of the trust domain.
func (s *saver) openParent() (err error) {
	if s.par, err = openParent(s.ctx, s.st, s.out.tx, s.o, s.o.workers()); err != nil {
		return err
	}
	if len(s.o.Disks) > 0 {
		s.out.features.Incompat = image.HasDisks
	}
	if s.o.Keeps {
		s.out.features.Incompat |= image.HasKept
	}
	switch {
	case s.par != nil:
		s.out.hash, s.meta.TrustDomain = s.par.sums.Hasher, s.par.c.Meta.TrustDomain
		s.out.features.Incompat |= image.HasDeltas | image.HasReferences | image.HasPieces
		if s.par.c.Meta.Disks > 0 {
			s.out.features.Incompat |= image.HasDisks
		}
	default:
		return s.trust()
	}
	return nil
}

// trust finds out which trust domain the checkpoint begins in, and how that makes digests.
// What goes wrong with it costs no save: the checkpoint is then in none.
func (s *saver) trust() (err error) {
	domain := s.o.TrustDomain
	if domain == "" {
		domain, err = s.st.DomainOf(s.ctx, s.o.VM)
	}
	if domain == "" {
		domain = store.DefaultDomain // it begins anew after those of earlier versions
	}
	if err == nil {
		s.out.hash, err = s.st.Trust(s.ctx, domain)
	}
	if s.ctx.Err() != nil {
		return context.Cause(s.ctx)
	}
	if err != nil {
		s.o.Log.Warn("no other VM will have pages in common with the checkpoint", "error", err)
		s.out.hash = digest.Fresh()
		return nil
	}
	s.meta.TrustDomain = domain
	return nil
}

// place makes the stages that take pages, once the blocks and the page size are known.
func (s *saver) place() (stage, error) {
	if err := s.open(); err != nil {
		return nil, err
	}
	pages := s.meta.BlockPages()
	for _, n := range pages {
		s.rep.Pages += int64(n)
	}
	to := target{img: s.out.img, hash: s.out.hash}
	var err error
	if to.pages, err = pagemap.New(pages); err != nil {
		return nil, stream.Damaged("ram setup", s.parse.cur.Offset(), "%v", err)
	}
	if s.par != nil {
		if err := s.par.bind(s.meta.Blocks, s.meta.PageSize); err != nil {
			s.o.Log.Warn("nothing is referred to of what should be the parent", "error", err)
		} else {
			to.par = s.par
		}
	}
	// Pages on disks are nothing without their digests.
	if !s.single && s.rep.Pages <= digest.MaxPages {
		d := newDisks(s.o.Disks, s.out.hash, s.meta.PageSize, s.o.Log)
		if to.par != nil {
			to.par.carried = d.carry(to.par.c.Disks())
		}
		if len(d.list) > 0 {
			to.disks = d
		}
	} else if to.par != nil {
		to.par.carried = slices.Repeat([]int{-1}, len(to.par.c.Disks()))
	}
	if to.par != nil {
		to.refs = &to.par.refs
	}
	if s.shared != nil && s.rep.Pages <= digest.MaxPages {
		if to.refs == nil {
			to.refs = new(refs)
		}
		to.shared, s.shared.refs, s.shared.par, s.shared.pageSize = s.shared, to.refs, to.par, s.meta.PageSize
	}
	if s.peer() != nil && s.rep.Pages <= digest.MaxPages {
		if to.refs == nil {
			to.refs = new(refs)
		}
		to.peers = &peerRefs{s.o.Peer, to.refs.addPeers(len(s.o.Peer.members))}
		s.o.Peer.begin(s.out.img, s.meta.PageSize)
	}
	surplus, err := s.reserve(&to)
	if err != nil {
		return nil, err
	}
	battery, energy, sample := s.o.Battery, s.o.Energy, s.o.SampleSize
	if battery == 0 {
		battery = dedup.DefaultBatteryThreshold
	}
	if energy == "" {
		energy = dedup.EnergyAuto
	}
	if sample == 0 {
		sample = dedup.DefaultSampleSize
	}
	chunk := energy.ChunkPages(dedup.PowerSupplyDir, battery)
	s.rep.ChunkSize, s.rep.SampleSize = chunk*s.meta.PageSize, sample
	// A full hash costs about 100 B; one for every eighth page at most keeps
	// the promise of 32 B a page.
	p := newPlacer(to, s.meta.PageSize, chunk, sample, max(1<<16, int(s.rep.Pages/8)))
	p.count.Surplus = surplus
	s.placer = p
	if to.par == nil && to.disks == nil && to.shared == nil && to.peers == nil {
		return p, nil
	}
	s.match = newMatcher(s.ctx, p, to.par, s.o.workers(), cmp.Or(s.o.DiskEnough, diskEnough))
	return s.match, nil
}

// reserve takes room in NVRAM for the working set, if there is one, and returns how
// many hot pages have none.
func (s *saver) reserve(to *target) (surplus int64, err error) {
	if s.o.NVRAM == "" || s.st == nil {
		return 0, nil
	}
	ws, err := s.past.workingSet(s.o.WorkingSet, s.meta.PageSize, s.meta.WorkingSetBlocks())
	if err != nil || ws == nil {
		return 0, err
	}
	hot := hotPages(ws)
	if hot == 0 {
		return 0, nil
	}
	err = s.out.reserve(s.ctx, store.Reservation{
		Path: s.o.NVRAM, Capacity: s.o.NVRAMSize, Format: s.o.NVRAMFormat, Volatile: s.o.VolatileNVRAM,
		Bytes: (hot + s.past.expectTables(s.rep.Pages)) * int64(s.meta.PageSize), PageSize: s.meta.PageSize,
	})
	if err != nil {
		return 0, err
	}
	slots := int64(s.out.region.Slots())
	to.region, to.hot = s.out.region, newHotSet(ws, slots)
	return max(0, hot-slots), nil
}

// emitSkeleton writes a chunk of the skeleton log.
func (s *saver) emitSkeleton(chunk []byte) error {
	if err := s.open(); err != nil {
		return err
	}
	s.skeletonChunks++
	return s.out.chunk(image.Skeleton, chunk)
}

// sync hands over all that was placed, and makes it durable if the source must not go on before
// that is so: if the device tail is held back, or other members of a group wait for it. If not,
// the image's end is soon enough, and what the guest stands still for is one fsync less.
func (s *saver) sync() error {
	start := time.Now()
	s.tick("sync", true)
	if err := s.parse.start(); err != nil {
		return err
	}
	if err := s.parse.place.flush(); err != nil {
		return err
	}
	var err error
	if s.feed.released && s.o.Peer == nil {
		err = s.out.start()
	} else if err = s.out.sync(); err == nil {
		s.o.Peer.flush()
	}
	s.rep.Seconds.Sync = s.since(start)
	return err
}

// tail takes the device tail, and what it says about RAM.
func (s *saver) tail() error {
	start := time.Now()
	s.tick("tail", true)
	b, err := s.parse.tail()
	if err != nil {
		return err
	}
	t, err := stream.ParseTail(b)
	if early := s.parse.walk.Early; err == nil && t.Description != nil && t.Early != early {
		err = fmt.Errorf("%d sections stand before RAM, %d are described", early, t.Early)
	}
	if err != nil {
		// The tail is kept verbatim whether it is understood or not.
		s.o.Log.Warn("device tail is not as its vmdescription says", "error", err)
	}
	if s.meta.RunState = t.RunState; s.o.RunState != "" {
		s.meta.RunState = s.o.RunState
	}
	if err := s.findTables(b, &t); err != nil {
		return err
	}
	s.rep.Seconds.Tail = s.since(start)
	return s.parse.keepTail(b, &s.skeletonChunks)
}

// commit writes what describes the checkpoint and makes it visible.
func (s *saver) commit() (store.Ref, error) {
	start := time.Now()
	s.tick("commit", true)
	place := s.placer
	if err := s.parse.skel.Flush(); err != nil {
		return store.Ref{}, err
	}
	s.recordDisks()
	refers, err := s.refer()
	if err != nil {
		return store.Ref{}, err
	}
	err = place.to.pages.Encode(tableChunk, func(at pagemap.Start, b []byte) error {
		s.meta.MapChunks = append(s.meta.MapChunks, at)
		return s.out.chunk(image.PageMap, b)
	})
	if err != nil {
		return store.Ref{}, err
	}
	if s.meta.NVRAM, err = s.out.finishNVRAM(s.ctx, place.slots, s.meta.PageSize); err != nil {
		return store.Ref{}, err
	}
	if s.meta.Digests, err = s.out.digests(place.sums); err != nil {
		return store.Ref{}, err
	}
	// Digests depend on no reference, so that each member of a group can name the others'.
	if err := s.out.img.Drain(); err != nil {
		return store.Ref{}, err
	}
	if err := s.meet(s.ctx, refers); err != nil {
		return store.Ref{}, err
	}
	if err := s.references(s.ctx, refers); err != nil {
		return store.Ref{}, err
	}
	if err := s.out.img.Drain(); err != nil {
		return store.Ref{}, err
	}
	s.rep.BytesIn, s.rep.Resent = s.parse.cur.Offset(), s.parse.resent
	place.report(&s.rep)
	if s.match != nil {
		s.rep.Isolated = s.match.budget.stored
	}
	// META states the size of the file that holds it: what follows it is
	// known to the byte but for META's own frame, so that is left out.
	s.rep.FlashBytes = s.out.len()
	s.rep.Seconds.Commit = s.since(start)
	s.rep.Seconds.Total = s.since(s.begin)
	s.meta.Report = s.rep
	meta, identity, err := s.meta.Documents()
	if err != nil {
		return store.Ref{}, err
	}
	if err := s.out.img.Finish(meta, identity); err != nil {
		return store.Ref{}, err
	}
	s.rep.FlashBytes = s.out.len()
	commit := s.o.Commit
	if commit == nil {
		commit = func(ctx context.Context, tx *store.Tx) (store.Ref, error) { return tx.Commit(ctx) }
	}
	ref, err := commit(s.ctx, s.out.tx)
	if err != nil {
		return store.Ref{}, fmt.Errorf("commit of checkpoint %v: %w", s.out.tx.UUID(), err)
	}
	s.rep.Seconds.Commit = s.since(start)
	s.rep.Seconds.Total = s.since(s.begin)
	s.meta.Report = s.rep
	return ref, nil
}

// recordDisks takes down what the VM's disks are. It is done whether the device tail was
// understood or not: pages may be on those that are kept.
func (s *saver) recordDisks() {
	if s.o.VMDisks == nil {
		return
	}
	s.meta.VMDisks = s.o.VMDisks()
	for _, d := range s.meta.VMDisks {
		if d.Kept != uuid.Nil && s.o.Keeps {
			s.meta.Kept = append(s.meta.Kept, d.Kept)
		}
	}
}

func (s *saver) since(t time.Time) float64 { return time.Since(t).Seconds() }

func (s *saver) tick(phase string, always bool) {
	if s.o.Progress == nil {
		return
	}
	now := time.Now()
	if !always && now.Sub(s.lastTick) < progress.Every {
		return
	}
	s.lastTick = now
	p := progress.State{Phase: phase, PagesAll: s.rep.Pages, Pages: s.rep.Pages - int64(s.parse.unseen),
		BytesIn: s.parse.cur.Offset(), BytesOut: s.out.len()}
	if s.placer != nil {
		// The image can be open before there is a page to place.
		p.BytesOut += s.placer.nvramBytes()
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
