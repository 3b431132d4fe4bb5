package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"syscall"
	"time"

	"github.com/flic-migrate/flic-migrate/qmp"
	"github.com/flic-migrate/flic-migrate/qmp/migration"
	"github.com/flic-migrate/flic-migrate/qmp/migration/rounds"
	"github.com/flic-migrate/flic-migrate/qmp/qemutest"
	"github.com/flic-migrate/flic-migrate/tier/checkpoint"
	"github.com/flic-migrate/flic-migrate/tier/save"
	"github.com/flic-migrate/flic-migrate/tier/store"
	"github.com/flic-migrate/flic-migrate/tier/vfs"
	"github.com/flic-migrate/flic-migrate/tier/workingset"
)

// mainRAM is the block that is looked at: all that the guest's programs have.
const mainRAM = "pc.ram"

const pageSize = 4096

// pages is a set of pages of main RAM.
type pages map[int64]bool

func (p pages) in(q ...pages) (n int) {
	for page := range p {
		for _, set := range q {
			if set[page] {
				n++
				break
			}
		}
	}
	return n
}

// result is a line of the table.
type result struct {
	work     string
	beta     float64
	rep      rounds.Report
	set      pages // what tracking found, before the stop
	tables   pages // the guest's page tables
	written  pages // in T after a resume
	touched  pages // in T/beta after another, zero pages left out
	touched2 pages // and after one more
}

func (r result) off() float64 {
	return (float64(len(r.set)) - float64(len(r.written))) / float64(len(r.written))
}
func (r result) hitWritten() float64 {
	return float64(r.written.in(r.set, r.tables)) / float64(len(r.written))
}

func (r result) String() string {
	hit := func(n, of int) float64 { return 100 * float64(n) / float64(max(of, 1)) }
	return fmt.Sprintf("| %s | %v | %.0f | %.1f | %d | %d | %d | %+.1f %% | %.2f %% | %d, %d | %.1f %% | %.1f %% |",
		r.work, r.beta, r.rep.Alpha, r.rep.Watched.Seconds(), r.rep.Rounds, len(r.set), len(r.written), 100*r.off(), 100*r.hitWritten(),
		len(r.touched), len(r.touched2), hit(r.touched.in(r.set, r.tables), len(r.touched)),
		hit(r.touched2.in(r.set, r.tables, r.touched), len(r.touched2)))
}

// evaluation is a workload in a guest.
type evaluation struct {
	ctx    context.Context
	dir    string
	work   workload
	rate   float64
	config qemutest.Config
	vm     *qemutest.VM
}

// boot starts the guest and its workload.
func (e *evaluation) boot() (err error) {
	if e.vm, err = qemutest.Launch(e.ctx, e.config); err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(e.ctx, 5*time.Minute)
	defer cancel()
	if _, err = e.vm.Expect(ctx, `flic ready`); err == nil {
		if _, err = e.vm.Expect(ctx, `tick \d`); err == nil {
			err = e.vm.Send(e.work.start)
		}
	}
	if err == nil {
		var answer []string
		if answer, err = e.vm.Expect(ctx, `\n((?:run|touch) [^\r\n]*|error[^\r\n]*)\r?\n`); err == nil && answer[1][:5] == "error" {
			err = errors.New(answer[1])
		}
	}
	if err == nil && e.work.waits {
		_, err = e.vm.Expect(ctx, `flic warm`)
	}
	if err != nil {
		e.vm.Kill()
		return err
	}
	time.Sleep(e.work.warm)
	return nil
}

// measure finds a working set and holds it against what guests resumed from that
// moment do.
func (e *evaluation) measure(beta float64) (r result, err error) {
	r = result{work: e.work.name, beta: beta}
	set, rep, err := rounds.Run(e.ctx, e.vm.QMP, rounds.Options{Beta: beta, FlashRate: e.rate, Longest: 2 * time.Minute})
	if err != nil {
		return r, err
	}
	r.rep, r.set = rep, hotPages(set)
	stream := filepath.Join(e.dir, "stream")
	before, err := e.save(stream)
	if err != nil {
		return r, err
	}
	defer os.Remove(stream)
	if r.written, err = e.written(stream, before, rep.Watched); err != nil {
		return r, fmt.Errorf("resumed: %w", err)
	}
	storeDir := filepath.Join(e.dir, "store")
	defer os.RemoveAll(storeDir)
	if r.tables, err = saveIn(e.ctx, storeDir, stream); err != nil {
		return r, err
	}
	window := time.Duration(float64(rep.Watched) / beta)
	for _, to := range []*pages{&r.touched, &r.touched2} {
		if *to, err = e.touched(storeDir, before, window); err != nil {
			return r, fmt.Errorf("resumed lazily: %w", err)
		}
	}
	return r, nil
}

func hotPages(s *workingset.Set) pages {
	p := pages{}
	for i, b := range s.Blocks() {
		if b.Name != mainRAM {
			continue
		}
		for run := range s.Runs(i, 1, 255) {
			for page := run.First; page < run.First+run.N; page++ {
				p[page] = true
			}
		}
	}
	return p
}

// save stops the guest, saves its stream and lets it run on; it returns what it
// had in memory.
func (e *evaluation) save(file string) (ram []byte, err error) {
	if err := migration.SetParameters(e.ctx, e.vm.QMP, map[string]any{"max-bandwidth": int64(100 << 30)}); err != nil {
		return nil, err
	}
	if err := qmp.Stop(e.ctx, e.vm.QMP); err != nil {
		return nil, err
	}
	content, err := e.vm.RAM(e.ctx)
	if err != nil {
		return nil, err
	}
	if _, err := e.vm.Save(e.ctx, "exec:exec cat > "+file); err != nil {
		return nil, err
	}
	return content[mainRAM], qmp.Cont(e.ctx, e.vm.QMP)
}

// resume loads a stream into a new QEMU, whose guest is not running yet.
func (e *evaluation) resume(uri string, postcopy bool) (*qemutest.VM, error) {
	c := e.config
	c.Incoming, c.Paused = "defer", true
	vm, err := qemutest.Launch(e.ctx, c)
	if err != nil {
		return nil, err
	}
	err = migration.SetCapabilities(e.ctx, vm.QMP, map[string]bool{"postcopy-ram": postcopy})
	if err == nil {
		err = migration.Incoming(e.ctx, vm.QMP, uri)
	}
	for err == nil {
		var s qmp.RunState
		if s, err = qmp.QueryStatus(e.ctx, vm.QMP); err == nil && s.Status != "inmigrate" {
			return vm, nil
		}
		time.Sleep(time.Millisecond)
	}
	output := vm.Output()
	vm.Kill()
	return nil, fmt.Errorf("%w\n%s", err, output)
}

// written runs a resumed guest for a time and returns the pages that it wrote:
// those in QEMU's dirty log, and those whose content has changed, which include
// the ones of the moment before the log begins.
func (e *evaluation) written(stream string, before []byte, d time.Duration) (pages, error) {
	vm, err := e.resume("exec:exec cat "+stream, false)
	if err != nil {
		return nil, err
	}
	defer vm.Kill()
	if err := qmp.Cont(e.ctx, vm.QMP); err != nil {
		return nil, err
	}
	set, _, err := rounds.Run(e.ctx, vm.QMP, rounds.Options{Interval: d})
	if err != nil {
		return nil, err
	}
	if err := qmp.Stop(e.ctx, vm.QMP); err != nil {
		return nil, err
	}
	content, err := vm.RAM(e.ctx)
	if err != nil {
		return nil, err
	}
	p := hotPages(set)
	after := content[mainRAM]
	for at := 0; at+pageSize <= len(before); at += pageSize {
		if string(before[at:at+pageSize]) != string(after[at:at+pageSize]) {
			p[int64(at/pageSize)] = true
		}
	}
	return p, nil
}

// saveIn saves a stream with one page in a segment, so that a lazy restore sends
// what it is asked for and nothing beside it, and returns the page tables.
func saveIn(ctx context.Context, dir, stream string) (pages, error) {
	st, err := store.Open(context.Background(), vfs.OS, dir, true)
	if err != nil {
		return nil, err
	}
	f, err := os.Open(stream)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	_, m, err := save.Run(ctx, vfs.OS, st, f, save.Options{VM: "vm", SegmentPages: 1})
	if err != nil {
		return nil, err
	}
	return listed(m, m.PageTables), nil
}

func listed(m *checkpoint.Meta, runs []workingset.PageRun) pages {
	p := pages{}
	for _, r := range runs {
		for i := range r.Count {
			if m.Blocks[r.Block].Name == mainRAM {
				p[int64(r.Page+i)] = true
			}
		}
	}
	return p
}

// touched resumes a guest lazily, holds everything back, and returns the pages
// with content that it asked for in a time. It runs more slowly than it would.
func (e *evaluation) touched(storeDir string, before []byte, d time.Duration) (pages, error) {
	c := child{Store: storeDir, Report: filepath.Join(e.dir, "touched")}
	os.Remove(c.Report)
	uri, err := c.uri()
	if err != nil {
		return nil, err
	}
	vm, err := e.resume(uri, true)
	if err != nil {
		return nil, err
	}
	defer vm.Kill()
	if err := qmp.Cont(e.ctx, vm.QMP); err != nil {
		return nil, err
	}
	time.Sleep(d)
	text, err := os.ReadFile(c.pidFile())
	if err != nil {
		return nil, err
	}
	var pid int
	if _, err := fmt.Sscan(string(text), &pid); err != nil {
		return nil, err
	}
	if err := syscall.Kill(pid, syscall.SIGTERM); err != nil {
		return nil, err
	}
	for end := time.Now().Add(20 * time.Second); ; time.Sleep(5 * time.Millisecond) {
		if text, err = os.ReadFile(c.Report); err == nil {
			break
		}
		if time.Now().After(end) {
			return nil, err
		}
	}
	var list []int64
	if err := json.Unmarshal(text, &list); err != nil {
		return nil, err
	}
	p, zero := pages{}, string(make([]byte, pageSize))
	for _, page := range list {
		if string(before[page*pageSize:(page+1)*pageSize]) != zero {
			p[page] = true
		}
	}
	return p, nil
}
