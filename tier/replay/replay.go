// Package replay proves on recorded migration streams that a save followed by
// a restore loses nothing.
//
//	recorded stream ─► Save ─► checkpoint ─► Verify
//	      │                        └───────► Restore ─┐
//	      └─────────── compare byte by byte ◄─────────┘
//	                   or, if pages came twice, load both
//	                   and compare the memory they make
//
// Neither the stream nor the guest's memory is ever held: the stream is read
// again as often as needed, and memory is a sparse file.
package replay

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/flic-migrate/flic-migrate/ramparse"
	"github.com/flic-migrate/flic-migrate/stream"
	"github.com/flic-migrate/flic-migrate/tier/checkpoint"
	"github.com/flic-migrate/flic-migrate/tier/rescue"
	"github.com/flic-migrate/flic-migrate/tier/restore"
	"github.com/flic-migrate/flic-migrate/tier/save"
	"github.com/flic-migrate/flic-migrate/tier/store"
	"github.com/flic-migrate/flic-migrate/tier/vfs"
	"github.com/flic-migrate/flic-migrate/tier/workingset"
)

// The results of a replay.
const (
	Identical = "identical" // the restored stream is the saved one, byte for byte
	Equal     = "equal"     // pages came more than once: the same memory, and the same otherwise
	Refused   = "refused"   // the save refused a stream that it has to refuse
	Different = "DIFFERENT" // anything else
)

// Result is what came of one stream.
type Result struct {
	Stream         string  `json:"stream"` // path
	Result         string  `json:"result"`
	Reason         string  `json:"reason,omitempty"` // what differs, or why it was refused
	Bytes          int64   `json:"bytes"`            // of the stream, decompressed
	Pages          int64   `json:"pages"`            // of all RAM blocks
	SaveSeconds    float64 `json:"save_seconds"`
	RestoreSeconds float64 `json:"restore_seconds"`
	FlashBytes     int64   `json:"flash_bytes"`
	NVRAMBytes     int64   `json:"nvram_bytes"`
	Ratio          float64 `json:"ratio"` // flash and NVRAM bytes by stream bytes
}

// MustRefuse tells by a recorded stream's name whether a save has to refuse it:
// it has ".refused." in it.
func MustRefuse(path string) bool { return strings.Contains(filepath.Base(path), ".refused.") }

// Replayer replays streams.
type Replayer struct {
	FS    vfs.FS
	Store *store.Store
	// Scratch is a directory for temporary files, of up to the size of the
	// guest's memory.
	Scratch string
	// HotEvery puts each HotEvery-th page into an NVRAM file in Scratch;
	// 0: none.
	HotEvery int
	// Options of the save. VM, ReturnPath, Progress and Log are the
	// Replayer's own, and with HotEvery what concerns NVRAM too.
	Options save.Options
}

// vm is the name that streams are saved under.
const vm = "replay"

// Stream replays the recorded stream at path. The checkpoint is removed again.
// The error is for a replay that could not be done; what is wrong with the
// stream or with its restore is in the Result.
func (p *Replayer) Stream(ctx context.Context, path string) (Result, error) {
	res := Result{Stream: path}
	if fi, err := os.Stat(path); err != nil {
		return res, err
	} else if !fi.Mode().IsRegular() {
		// It is read again for each comparison.
		return res, &fs.PathError{Op: "replay", Path: path, Err: vfs.ErrNotRegular}
	}
	in, err := Open(ctx, path)
	if err != nil {
		return res, err
	}
	defer in.Close()
	o := p.Options
	o.VM = vm
	o.ReturnPath = io.Discard // a recorded stream's source waits for nothing
	if p.HotEvery > 0 {
		o.NVRAM, o.VolatileNVRAM = filepath.Join(p.Scratch, "nvram"), true
		if o.WorkingSet, err = everyPage(ctx, path, p.HotEvery); err != nil {
			return res, err
		}
	}
	counted := &counter{r: in}
	start := time.Now()
	ref, meta, err := save.Run(ctx, p.FS, p.Store, counted, o)
	res.SaveSeconds = time.Since(start).Seconds()
	res.Bytes = counted.n
	if err != nil {
		return p.refused(ctx, res, err)
	}
	err = p.check(ctx, path, ref, meta, &res)
	rm, rerr := p.Store.Remove(context.WithoutCancel(ctx), ref)
	return res, errors.Join(err, rerr, rm.Left)
}

// everyPage is a working set with every n-th page of the guest whose stream is
// at path. A stream that is damaged before the guest's memory is known has
// none; the save will say what is wrong with it.
func everyPage(ctx context.Context, path string, n int) (ws *workingset.Set, err error) {
	in, err := Open(ctx, path)
	if err != nil {
		return nil, err
	}
	defer in.Close()
	enough := errors.New("enough")
	err = ramparse.Walk(in, 0, ramparse.Visitor{Record: func(d *ramparse.Decoder, _ *ramparse.Record) error {
		if d.PageSize() == 0 {
			return nil
		}
		var blocks []workingset.Block
		for _, b := range d.Setup().Blocks {
			blocks = append(blocks, workingset.Block{Name: b.Name, Pages: int64(b.Used) / int64(d.PageSize())})
		}
		var err error
		if ws, err = workingset.New(d.PageSize(), blocks); err != nil {
			return err
		}
		for i, b := range blocks {
			for page := int64(0); page < b.Pages; page += int64(n) {
				ws.SetHeat(i, page, 1)
			}
		}
		return enough
	}})
	if streamAtFault(err) || err == enough {
		err = nil
	}
	return ws, err
}

func streamAtFault(err error) bool {
	return errors.Is(err, stream.ErrTruncated) || errors.Is(err, stream.ErrDamaged) || errors.Is(err, stream.ErrNotStream)
}

// refused judges a failed save.
func (p *Replayer) refused(ctx context.Context, res Result, err error) (Result, error) {
	if !streamAtFault(err) {
		return res, err
	}
	res.Result, res.Reason = Different, err.Error()
	refs, err := p.Store.List(ctx, vm)
	if err != nil {
		return res, err
	}
	switch {
	case len(refs) > 0:
		res.Reason = "a checkpoint is left of a save that failed: " + res.Reason
	case MustRefuse(res.Stream):
		res.Result = Refused
	}
	return res, nil
}

// check verifies and restores a checkpoint of the stream at path.
func (p *Replayer) check(ctx context.Context, path string, ref store.Ref, meta *checkpoint.Meta, res *Result) error {
	rep := &meta.Report
	res.Pages, res.FlashBytes, res.NVRAMBytes = rep.Pages, rep.FlashBytes, rep.NVRAMBytes
	if res.Bytes > 0 {
		res.Ratio = float64(rep.FlashBytes+rep.NVRAMBytes) / float64(res.Bytes)
	}
	res.Result = Different
	if MustRefuse(path) {
		res.Reason = "it was saved, and has to be refused"
		return nil
	}
	c, err := p.Store.OpenCheckpoint(ctx, ref, checkpoint.Options{})
	if err != nil {
		return err
	}
	defer c.Close()
	var damage error
	if err := c.Verify(ctx, func(err error) { damage = errors.Join(damage, err) }); err != nil {
		return err
	}
	if damage != nil {
		res.Reason = "verify: " + damage.Error()
		return nil
	}
	err = p.bytes(ctx, path, c.Checkpoint, res)
	if err == nil {
		res.Result = Identical
		return nil
	}
	if !errors.Is(err, errDiffers) {
		return err
	}
	res.Reason = err.Error()
	resent, err := p.memory(ctx, path, c.Checkpoint)
	switch {
	case errors.Is(err, errDiffers):
		res.Reason = err.Error()
	case err != nil:
		return err
	case resent > 0:
		// Only pages that come more than once excuse other bytes.
		res.Result, res.Reason = Equal, ""
	}
	return nil
}

// bytes restores c and compares with the recorded stream byte by byte.
func (p *Replayer) bytes(ctx context.Context, path string, c *checkpoint.Checkpoint, res *Result) error {
	in, err := Open(ctx, path)
	if err != nil {
		return err
	}
	defer in.Close()
	cmp := &comparer{r: in}
	rep, err := restore.Run(ctx, c, cmp, restore.Options{Workers: p.Options.Workers})
	res.RestoreSeconds = rep.Seconds
	if err != nil {
		return err
	}
	return cmp.end()
}

// memory loads the recorded stream and the restored one and compares them. It
// returns how many records of the recorded one repeat a page.
func (p *Replayer) memory(ctx context.Context, path string, c *checkpoint.Checkpoint) (resent int64, err error) {
	in, err := Open(ctx, path)
	if err != nil {
		return 0, err
	}
	defer in.Close()
	m, err := loadMemory(in, p.Scratch, c.Meta.PageSize)
	if err != nil {
		return 0, err
	}
	defer m.close()
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	r, w := io.Pipe()
	done := make(chan struct{})
	go func() {
		defer close(done)
		w.CloseWithError(rescue.Call(func() error {
			_, err := restore.Run(ctx, c, w, restore.Options{Workers: p.Options.Workers})
			return err
		}))
	}()
	err = m.compare(r)
	r.CloseWithError(context.Canceled)
	<-done // c must stay open until the restore has let go of it
	return m.resent, err
}

// counter counts what is read.
type counter struct {
	r io.Reader
	n int64
}

func (c *counter) Read(b []byte) (int, error) {
	n, err := c.r.Read(b)
	c.n += int64(n)
	return n, err
}

// comparer compares what is written to it with what r has. After the first
// difference it takes the rest without a look, so that the restore it is given
// to is timed and checked to its end.
type comparer struct {
	r      io.Reader
	off    int64
	buf    []byte
	differ error
}

func (c *comparer) Write(b []byte) (int, error) {
	if c.differ != nil {
		return len(b), nil
	}
	if len(c.buf) < len(b) {
		c.buf = make([]byte, len(b))
	}
	n, err := io.ReadFull(c.r, c.buf[:len(b)])
	if !bytes.Equal(b[:n], c.buf[:n]) {
		i := 0
		for b[i] == c.buf[i] {
			i++
		}
		c.differ = fmt.Errorf("%w at byte %d", errDiffers, c.off+int64(i))
		return len(b), nil
	}
	if err == io.EOF || err == io.ErrUnexpectedEOF {
		c.differ = fmt.Errorf("%w: it goes on after byte %d", errDiffers, c.off+int64(n))
		return len(b), nil
	}
	c.off += int64(n)
	return n, err
}

// end tells whether both have ended, and whether they were the same.
func (c *comparer) end() error {
	if c.differ != nil {
		return c.differ
	}
	if n, err := io.ReadFull(c.r, make([]byte, 1)); n == 1 {
		return fmt.Errorf("%w: it ends at byte %d", errDiffers, c.off)
	} else if err != io.EOF {
		return err
	}
	return nil
}
