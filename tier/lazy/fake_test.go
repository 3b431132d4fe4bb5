package lazy_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"github.com/flic-migrate/flic-migrate/ramparse"
	"github.com/flic-migrate/flic-migrate/stream"
	"github.com/flic-migrate/flic-migrate/stream/postcopy"
	"github.com/flic-migrate/flic-migrate/stream/returnpath"
	"github.com/flic-migrate/flic-migrate/tier/checkpoint"
	"github.com/flic-migrate/flic-migrate/tier/lazy"
	"github.com/flic-migrate/flic-migrate/tier/save"
	"github.com/flic-migrate/flic-migrate/tier/store"
	"github.com/flic-migrate/flic-migrate/tier/tiertest"
	"github.com/flic-migrate/flic-migrate/tier/vfs"
	"github.com/flic-migrate/flic-migrate/tier/workingset"
)

// saved is a synthetic stream and the checkpoint made of it.
type saved struct {
	*tiertest.Stream
	dir string
	st  *store.Store
	ck  *checkpoint.Checkpoint
}

// newSaved saves a stream of the given shape. Every hot-th page goes to NVRAM,
// none if hot is 0.
func newSaved(t testing.TB, o tiertest.Options, hot uint64, so save.Options) *saved {
	t.Helper()
	s := &saved{Stream: tiertest.New(o), dir: t.TempDir()}
	var err error
	s.st, err = store.Open(context.Background(), vfs.OS, filepath.Join(s.dir, "store"), true)
	check(t, err)
	so.VM = "vm"
	if hot > 0 {
		so.NVRAM = filepath.Join(s.dir, "nvram")
		so.VolatileNVRAM = true // wherever TMPDIR is
		so.WorkingSet, err = workingset.New(s.PageSize(), s.blocks())
		check(t, err)
		for b := range s.Blocks() {
			for p := uint64(0); p < s.Pages(b); p += hot {
				so.WorkingSet.SetHeat(b, int64(p), 1)
			}
		}
	}
	r := s.Reader()
	defer r.Close()
	_, _, err = save.Run(context.Background(), vfs.OS, s.st, r, so)
	check(t, err)
	s.ck = s.open(t)
	return s
}

// open opens the checkpoint once more, to the end of the test.
func (s *saved) open(t testing.TB) *checkpoint.Checkpoint {
	t.Helper()
	ck, err := s.st.OpenCheckpoint(context.Background(), store.Ref{VM: "vm"}, checkpoint.Options{})
	check(t, err)
	t.Cleanup(func() { check(t, ck.Close()) })
	return ck.Checkpoint
}

func (s *saved) blocks() []workingset.Block {
	var list []workingset.Block
	for b, blk := range s.Blocks() {
		list = append(list, workingset.Block{Name: blk.Name, Pages: int64(s.Pages(b))})
	}
	return list
}

// page is what a page must hold; nil if it reads as zero.
func (s *saved) page(id tiertest.PageID) []byte {
	b := make([]byte, s.PageSize())
	s.Page(b, id.Block, id.Page)
	if bytes.Equal(b, make([]byte, len(b))) {
		return nil
	}
	return b
}

// random picks a page of any block.
func (s *saved) random(r *rand.Rand) tiertest.PageID {
	b := r.IntN(len(s.Blocks()))
	return tiertest.PageID{Block: b, Page: r.Uint64N(s.Pages(b))}
}

// arrival is a page as it came.
type arrival struct {
	tiertest.PageID
	section int // number of the PART it came in
}

// fakeQEMU is what a lazy restore talks to: it checks the order and the
// rules of the wire as QEMU would, and asks for pages when its hooks say so.
type fakeQEMU struct {
	s  *saved
	rp io.Writer // the return path

	// had are the pages of an earlier server, for a recovery.
	had []map[uint64]bool
	// onRun is called when the guest would run, afterPart after every section.
	onRun     func()
	afterPart func(section int)
	// loading keeps the PING in the package from being answered.
	loading bool
	pings   int // of devices in the package, which nobody has answered

	mu       sync.Mutex
	lastName string // block of the last REQ_PAGES_ID
	asked    map[tiertest.PageID]bool
	mayZero  map[tiertest.PageID]bool // ZERO is right for these

	got      map[tiertest.PageID]bool
	order    []arrival
	sections int
	ended    bool // END and EOF have come
}

func newFakeQEMU(s *saved) *fakeQEMU {
	return &fakeQEMU{s: s, asked: make(map[tiertest.PageID]bool),
		mayZero: make(map[tiertest.PageID]bool), got: make(map[tiertest.PageID]bool)}
}

// ask writes a request, in the short form when QEMU would.
func (d *fakeQEMU) ask(id tiertest.PageID) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.asked[id] = true
	d.allowZero(id)
	name := d.s.Blocks()[id.Block].Name
	if name == d.lastName {
		name = ""
	} else {
		d.lastName = name
	}
	_, err := d.rp.Write(returnpath.AppendReqPages(nil, name, id.Page*uint64(d.s.PageSize()), uint32(d.s.PageSize())))
	return err
}

// allowZero allows ZERO for a page and for those that come with it.
func (d *fakeQEMU) allowZero(id tiertest.PageID) {
	for p := id.Page &^ 63; p <= id.Page|63; p++ {
		d.mayZero[tiertest.PageID{Block: id.Block, Page: p}] = true
	}
}

// mayZeroAll allows ZERO for every page.
func (d *fakeQEMU) mayZeroAll() {
	for b := range d.s.Blocks() {
		for p := range d.s.Pages(b) {
			d.mayZero[tiertest.PageID{Block: b, Page: p}] = true
		}
	}
}

// pong says that the devices are loaded. A server that has ended does not care.
func (d *fakeQEMU) pong() { d.rp.Write(returnpath.AppendPong(nil, 3)) }

// load reads what a server writes, up to its end. A server that stops before
// END gives an error that wraps stream.ErrTruncated, and whatever came before
// was checked.
func (d *fakeQEMU) load(r io.Reader) error {
	open := d.loadOpening
	if d.had != nil {
		// What a running QEMU remembers of the dead server's opening.
		setup, err := d.s.setup()
		if err != nil {
			return err
		}
		r, open = io.MultiReader(bytes.NewReader(setup), r), d.loadResume
	}
	cur := stream.NewCursor(r, 0)
	cur.SetReadAhead(0)
	rd := stream.NewReader(cur)
	dec := ramparse.NewDecoder(ramparse.Options{PageSize: d.s.PageSize()})
	if err := open(rd, dec); err != nil {
		return err
	}
	if d.had == nil && !d.loading {
		d.pong()
	}
	if d.onRun != nil {
		d.onRun()
	}
	if err := d.loadPages(rd, dec); err != nil {
		return err
	}
	// Nothing may follow EOF: QEMU would read it as the vmdescription.
	if b, err := cur.Peek(1); err != io.EOF {
		return fmt.Errorf("% x, %v after EOF", b, err)
	}
	d.ended = true
	return d.complete()
}

// setup is the saved stream up to the end of RAM's START.
func (s *saved) setup() ([]byte, error) {
	all := s.Bytes()
	cur := stream.NewCursor(bytes.NewReader(all), 0)
	err := loadSetup(stream.NewReader(cur), ramparse.NewDecoder(ramparse.Options{PageSize: s.PageSize()}))
	return all[:cur.Offset()], err
}

// nextFrame is the next frame, which must be of a kind (0: any).
func nextFrame(rd *stream.Reader, kind stream.Kind) (stream.Frame, error) {
	f, err := rd.Next()
	if err == nil && kind != 0 && f.Kind != kind {
		err = fmt.Errorf("%v in place of %v", f.Kind, kind)
	}
	return f, err
}

func nextCommand(rd *stream.Reader, number uint16) ([]byte, error) {
	f, err := nextFrame(rd, stream.CommandFrame)
	if err == nil && f.Command.Number != number {
		err = fmt.Errorf("command %d in place of %d", f.Command.Number, number)
	}
	return f.Command.Payload, err
}

// loadOpening reads everything up to RUN.
func (d *fakeQEMU) loadOpening(rd *stream.Reader, dec *ramparse.Decoder) error {
	if _, err := nextFrame(rd, stream.Header); err != nil {
		return err
	}
	if _, err := nextFrame(rd, stream.Configuration); err != nil {
		return err
	}
	if _, err := nextCommand(rd, stream.CommandOpenReturnPath); err != nil {
		return err
	}
	b, err := nextCommand(rd, stream.CommandPostcopyAdvise)
	if err != nil {
		return err
	}
	if a, err := postcopy.ParseAdvise(b); err != nil || a != (postcopy.Advise{PageSizes: 4096, Target: 4096}) {
		return fmt.Errorf("advise %+v, %v", a, err)
	}
	if err := loadSetup(rd, dec); err != nil {
		return err
	}
	for i, blk := range d.s.Blocks() {
		b, err := nextCommand(rd, stream.CommandPostcopyDiscard)
		if err != nil {
			return err
		}
		name, ranges, err := postcopy.ParseDiscard(b)
		if err != nil || name != blk.Name || len(ranges) != 1 || ranges[0] != (postcopy.Range{Length: blk.Size}) {
			return fmt.Errorf("discard %d: %q %v, %v", i, name, ranges, err)
		}
	}
	if _, err := nextCommand(rd, stream.CommandPackaged); err != nil {
		return err
	}
	var pack []byte
	if err := rd.CopyPackage(func(b []byte) error { pack = append(pack, b...); return nil }); err != nil {
		return err
	}
	all, layout := d.s.Bytes(), d.s.Layout()
	want := append(postcopy.AppendListen(nil), all[layout.Tail:layout.EOF]...)
	want = postcopy.AppendRun(postcopy.AppendPing(want, 3))
	// Behind each device whose end is known a PING asks whether it was loaded.
	for d.pings = 0; ; d.pings++ {
		ping := postcopy.AppendPing(nil, uint32(0x1000+d.pings))
		if !bytes.Contains(pack, ping) {
			break
		}
		pack = bytes.Replace(pack, ping, nil, 1)
	}
	if !bytes.Equal(pack, want) {
		return fmt.Errorf("package of %d bytes is not LISTEN, devices, PING, RUN of %d bytes", len(pack), len(want))
	}
	return nil
}

// loadSetup reads RAM's START, passing over the frames before it.
func loadSetup(rd *stream.Reader, dec *ramparse.Decoder) error {
	for {
		f, err := rd.Next()
		if err != nil {
			return err
		}
		if f.Kind == stream.SectionStart {
			break
		}
	}
	var rec ramparse.Record
	for rec.Kind != ramparse.EOS {
		if err := dec.Next(rd.Cursor(), &rec); err != nil {
			return err
		}
		if rec.Kind != ramparse.MemSize && rec.Kind != ramparse.EOS {
			return fmt.Errorf("a %v record in START: no page may come before the package", rec.Kind)
		}
	}
	_, err := nextFrame(rd, stream.Footer)
	return err
}

// loadResume is QEMU's side of a recovery up to RESUME.
func (d *fakeQEMU) loadResume(rd *stream.Reader, dec *ramparse.Decoder) error {
	if err := loadSetup(rd, dec); err != nil {
		return err
	}
	for i, blk := range d.s.Blocks() {
		b, err := nextCommand(rd, stream.CommandRecvBitmap)
		if err != nil {
			return err
		}
		if name, err := postcopy.ParseRecvBitmap(b); err != nil || name != blk.Name {
			return fmt.Errorf("bitmap %d of %q, %v", i, name, err)
		}
		bits := make([]byte, (d.s.Pages(i)+7)/8)
		for p := range d.had[i] {
			bits[p/8] |= 1 << (p % 8)
			d.got[tiertest.PageID{Block: i, Page: p}] = true
		}
		if _, err := d.rp.Write(returnpath.AppendRecvBitmap(nil, blk.Name, bits)); err != nil {
			return err
		}
	}
	if _, err := nextCommand(rd, stream.CommandPostcopyResume); err != nil {
		return err
	}
	_, err := d.rp.Write(returnpath.AppendResumeAck(nil))
	return err
}

// loadPages reads PARTs up to END and EOF.
func (d *fakeQEMU) loadPages(rd *stream.Reader, dec *ramparse.Decoder) error {
	for {
		f, err := rd.Next()
		if err != nil {
			return err
		}
		if f.Kind != stream.SectionPart && f.Kind != stream.SectionEnd {
			return fmt.Errorf("%v between pages", f.Kind)
		}
		end := f.Kind == stream.SectionEnd
		if err := d.section(rd.Cursor(), dec, !end); err != nil {
			return err
		}
		if _, err := nextFrame(rd, stream.Footer); err != nil {
			return err
		}
		if end {
			_, err := nextFrame(rd, stream.EOF)
			return err
		}
		d.sections++
		if d.afterPart != nil {
			d.afterPart(d.sections)
		}
	}
}

// section reads the records of one section.
func (d *fakeQEMU) section(cur *stream.Cursor, dec *ramparse.Decoder, pages bool) error {
	var rec ramparse.Record
	for n := 0; ; n++ {
		if err := dec.Next(cur, &rec); err != nil {
			return err
		}
		if rec.Kind == ramparse.EOS {
			return nil
		}
		if !pages {
			return fmt.Errorf("a %v record in END", rec.Kind)
		}
		// QEMU's decoder of postcopy starts each section without a block.
		if n == 0 && !rec.Named {
			return errors.New("a section's first page does not name its block")
		}
		id := tiertest.PageID{Block: rec.Block, Page: rec.Page}
		if d.got[id] {
			return fmt.Errorf("page %v comes twice", id)
		}
		d.got[id] = true
		d.order = append(d.order, arrival{id, d.sections})
		want := d.s.page(id)
		d.mu.Lock()
		mayZero := d.mayZero[id]
		d.mu.Unlock()
		switch {
		case rec.Kind == ramparse.Page && want != nil && bytes.Equal(rec.Data, want):
		case rec.Kind == ramparse.Zero && want == nil && rec.Fill == 0 && mayZero:
		case rec.Kind == ramparse.Zero && want == nil && rec.Fill == 0:
			return fmt.Errorf("zero page %v, which nobody asked for", id)
		default:
			return fmt.Errorf("page %v comes as %v with wrong content", id, rec.Kind)
		}
	}
}

// complete checks that every page with content is there.
func (d *fakeQEMU) complete() error {
	for b := range d.s.Blocks() {
		for p := range d.s.Pages(b) {
			id := tiertest.PageID{Block: b, Page: p}
			if !d.got[id] && d.s.page(id) != nil {
				return fmt.Errorf("page %v is missing at the end", id)
			}
		}
	}
	return nil
}

// position is where in the order a page came, and in which section.
func (d *fakeQEMU) position(id tiertest.PageID) (n, section int) {
	for i, a := range d.order {
		if a.PageID == id {
			return i, a.section
		}
	}
	return -1, -1
}

// server is Serve or Recover.
type server func(context.Context, *checkpoint.Checkpoint, io.Reader, io.Writer, lazy.Options) (*lazy.Report, error)

// outcome is what both ends of a restore say.
type outcome struct {
	rep    *lazy.Report
	server error
	loaded error // of load
}

// run lets a server of the checkpoint talk to d over unbuffered pipes, so that
// the server is never further than the write that d has not read to its end. In a
// synctest bubble a hook's synctest.Wait gives the server the time to take in what
// was asked for.
func (d *fakeQEMU) run(t testing.TB, ctx context.Context, serve server, o lazy.Options) outcome {
	t.Helper()
	in, rp := io.Pipe()
	r, out := io.Pipe()
	d.rp = rp
	done := make(chan outcome)
	go func() {
		rep, err := serve(ctx, d.s.ck, in, out, o)
		out.Close() // as by the end of the process
		done <- outcome{rep: rep, server: err}
	}()
	loaded := d.load(r)
	r.CloseWithError(io.ErrClosedPipe)
	rp.Close()
	select {
	case res := <-done:
		res.loaded = loaded
		in.Close()
		return res
	case <-time.After(30 * time.Second):
		t.Fatal("the server does not end")
		panic("unreachable")
	}
}

// ok fails unless the restore went well on both sides.
func (o outcome) ok(t testing.TB) *lazy.Report {
	t.Helper()
	if o.server != nil || o.loaded != nil {
		t.Fatalf("server: %v; destination: %v", o.server, o.loaded)
	}
	return o.rep
}
