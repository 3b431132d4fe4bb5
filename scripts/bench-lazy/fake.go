package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"runtime/debug"
	"slices"
	"strconv"
	"strings"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"

	"github.com/flic-migrate/flic-migrate/ramparse"
	"github.com/flic-migrate/flic-migrate/stream"
	"github.com/flic-migrate/flic-migrate/stream/returnpath"
	"github.com/flic-migrate/flic-migrate/tier/checkpoint"
	"github.com/flic-migrate/flic-migrate/tier/image"
	"github.com/flic-migrate/flic-migrate/tier/save"
	"github.com/flic-migrate/flic-migrate/tier/store"
	"github.com/flic-migrate/flic-migrate/tier/tiertest"
	"github.com/flic-migrate/flic-migrate/tier/vfs"
)

// computing is how long the guest goes on with a page before it needs another.
const computing = 100 * time.Microsecond

// placing is what the destination needs for a page besides reading it: about
// what UFFDIO_COPY and its wake-up take.
const placing = 2 * time.Microsecond

// waits measures, without QEMU and its guest on the same processors, how long a
// page that is asked for takes from the request to having been read, the pipes
// in both directions included.
func (b *bench) waits() error {
	s, err := b.synthetic(1<<30, tiertest.Mix{tiertest.Zero: 4, tiertest.Duplicate: 1, tiertest.Random: 1, tiertest.Text: 4})
	if err != nil {
		return err
	}
	defer os.RemoveAll(s.dir)
	cases := []struct {
		name   string
		hold   time.Duration
		socket bool
		pipe   int
	}{
		{"none | pipe", time.Hour, false, 0},
		{"none | socket", time.Hour, true, 0},
		{"running | pipe", 0, false, 0},
		{"running | socket", 0, true, 0},
		{"running | pipe, always 16 KiB", 0, false, 16 << 10},
		{"running | pipe, always 64 KiB", 0, false, 64 << 10},
		{"running | socket, always 16 KiB", 0, true, 16 << 10},
		{"running | socket, always 64 KiB", 0, true, 64 << 10},
	}
	// Nor has QEMU a garbage collector, or a thread that waits for another's CPU.
	defer debug.SetGCPercent(debug.SetGCPercent(-1))
	defer runtime.GOMAXPROCS(runtime.GOMAXPROCS(max(runtime.NumCPU(), 8)))
	n := make([]int, len(cases))
	disturbed := 0
	first, p50, p99 := make([][]time.Duration, len(cases)), make([][]time.Duration, len(cases)), make([][]time.Duration, len(cases))
	for range b.runs {
		for i, c := range cases {
			var list []time.Duration
			for range mostTries {
				if err := s.warm(); err != nil {
					return err
				}
				before := stolen()
				list, err = s.wait(b.ctx, c.hold, c.socket, c.pipe)
				if err != nil {
					return err
				}
				if stolen()-before <= stolenTicks {
					break
				}
				disturbed++
			}
			n[i] += len(list)
			begin := list[:min(beginning, len(list))]
			first[i] = append(first[i], mean(begin))
			slices.Sort(list)
			p50[i], p99[i] = append(p50[i], list[len(list)/2]), append(p99[i], list[len(list)*99/100])
		}
	}
	fmt.Printf("\n%d measurements were disturbed by other virtual machines and made again, %d times at the most each.\n", disturbed, mostTries-1)
	fmt.Printf("\n| background | through | requests | first %d, mean, µs | p50, µs | p99, µs | of them the least | p99 / p50 without background |\n|---|---|---|---|---|---|---|---|\n", beginning)
	for i, c := range cases {
		slices.Sort(first[i])
		slices.Sort(p50[i])
		slices.Sort(p99[i])
		without := p50[0]
		if c.socket {
			without = p50[1]
		}
		mid := b.runs / 2
		fmt.Printf("| %s | %d | %d | %d | %d | %d | %.1f |\n", c.name, n[i], first[i][mid].Microseconds(), p50[i][mid].Microseconds(), p99[i][mid].Microseconds(), p99[i][0].Microseconds(),
			float64(p99[i][mid])/float64(without[mid]))
	}
	return nil
}

const (
	// stolenTicks is how much of a measurement, in units of 10 ms of one CPU, the
	// host may have given to others. A wait is some wake-ups of idle processors;
	// on a host that is busy the 99th percentile of those is milliseconds.
	stolenTicks = 1
	mostTries   = 5
)

// beginning is how many requests a guest makes before it answers anything, and in
// which the server warms up.
const beginning = 50

func mean(list []time.Duration) time.Duration {
	var sum time.Duration
	for _, d := range list {
		sum += d
	}
	return sum / time.Duration(len(list))
}

// stolen is the time that the host has given to other virtual machines, in ticks
// (proc_stat(5), steal); 0 on a real machine.
func stolen() (ticks int) {
	b, _ := os.ReadFile("/proc/stat")
	if f := strings.Fields(string(b)); len(f) > 8 {
		ticks, _ = strconv.Atoi(f[8])
	}
	return ticks
}

// synthetic is the checkpoint of a made-up stream.
type synthetic struct {
	*tiertest.Stream
	dir string
	st  *store.Store
}

func (b *bench) synthetic(size uint64, mix tiertest.Mix) (*synthetic, error) {
	s := &synthetic{Stream: tiertest.New(tiertest.Options{Blocks: []tiertest.Block{{Name: "pc.ram", Size: size}}, Mix: mix, PageBits: true})}
	var err error
	if s.dir, err = os.MkdirTemp(b.dir, "synthetic"); err != nil {
		return nil, err
	}
	if s.st, err = store.Open(context.Background(), vfs.OS, filepath.Join(s.dir, "store"), true); err != nil {
		return nil, err
	}
	r := s.Reader()
	defer r.Close()
	_, _, err = save.Run(b.ctx, vfs.OS, s.st, r, save.Options{VM: "vm"})
	unix.Sync()
	return s, err
}

// warm reads the checkpoint, because the kernel forgets some of it now and then: what
// a request for a page on a disk takes is the disk's.
func (s *synthetic) warm() error {
	f, err := os.Open(filepath.Join(s.dir, "store", "vms", "vm", "00000001.flic"))
	if err != nil {
		return err
	}
	defer f.Close()
	_, err = io.Copy(io.Discard, f)
	return err
}

// session is a server and the reader of what it sends.
type session struct {
	cur *stream.Cursor
	rd  *stream.Reader
	dec *ramparse.Decoder
	rp  *os.File
	out *os.File
	// server writes out and reads rp.
	server *exec.Cmd
}

// serve starts a server as QEMU does, a process of its own.
func (s *synthetic) serve(ctx context.Context, hold time.Duration, socket bool, pipe int) (*session, error) {
	uri, err := child{Op: "lazy", Store: filepath.Join(s.dir, "store"), Hold: hold, Pipe: pipe, Report: filepath.Join(s.dir, "report")}.uri()
	if err != nil {
		return nil, err
	}
	in, rp, out, w, err := ends(socket)
	if err != nil {
		return nil, err
	}
	defer in.Close()
	defer w.Close()
	ses := &session{rp: rp, out: out, server: exec.CommandContext(ctx, "/bin/sh", "-c", strings.TrimPrefix(uri, "exec:"))}
	ses.server.Stdin, ses.server.Stdout = in, w
	ses.cur = stream.NewCursor(out, 0)
	// QEMU reads 32 KiB at a time.
	ses.cur.SetReadAhead(32 << 10)
	ses.rd = stream.NewReader(ses.cur)
	ses.dec = ramparse.NewDecoder(ramparse.Options{PageSize: s.PageSize()})
	return ses, ses.server.Start()
}

// ends are those of a server's stdin and stdout, and ours of them.
func ends(socket bool) (in, rp, out, w *os.File, err error) {
	if socket {
		fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
		if err != nil {
			return nil, nil, nil, nil, err
		}
		ours, theirs := os.NewFile(uintptr(fds[0]), "socket"), os.NewFile(uintptr(fds[1]), "socket")
		return theirs, ours, ours, theirs, nil
	}
	if in, rp, err = blockingPipe(); err == nil {
		out, w, err = blockingPipe()
	}
	return in, rp, out, w, err
}

// blockingPipe is os.Pipe with ends that block their thread, as the socket's do and
// as QEMU's threads are blocked. Otherwise whether Go's poller runs anyway decides
// how late a goroutine is woken up, by up to a millisecond.
func blockingPipe() (r, w *os.File, err error) {
	var fds [2]int
	if err := unix.Pipe2(fds[:], unix.O_CLOEXEC); err != nil {
		return nil, nil, err
	}
	return os.NewFile(uintptr(fds[0]), "pipe"), os.NewFile(uintptr(fds[1]), "pipe"), nil
}

// opening reads up to RUN.
func (ses *session) opening() error {
	var rec ramparse.Record
	for {
		f, err := ses.rd.Next()
		if err != nil {
			return err
		}
		switch {
		case f.Kind == stream.SectionStart:
			for rec.Kind != ramparse.EOS {
				if err := ses.dec.Next(ses.cur, &rec); err != nil {
					return err
				}
			}
		case f.Kind == stream.CommandFrame && f.Command.Number == stream.CommandPackaged:
			if err := ses.rd.CopyPackage(func([]byte) error { return nil }); err != nil {
				return err
			}
			_, err := ses.rp.Write(returnpath.AppendPong(nil, 3))
			return err
		}
	}
}

// pages reads to the end of the stream, or until got, which is called for each
// page, returns an error.
func (ses *session) pages(got func(page uint64) error) error {
	var rec ramparse.Record
	for {
		f, err := ses.rd.Next()
		if err != nil {
			return err
		}
		if f.Kind == stream.EOF {
			return nil
		}
		if f.Kind == stream.Footer {
			continue
		}
		for {
			if err := ses.dec.Next(ses.cur, &rec); err != nil {
				return err
			}
			if rec.Kind == ramparse.EOS {
				break
			}
			for end := time.Now().Add(placing); time.Now().Before(end); {
			}
			if err := got(rec.Page); err != nil {
				return err
			}
		}
	}
}

// ask asks for a page.
func (ses *session) ask(page uint64) error {
	_, err := ses.rp.Write(returnpath.AppendReqPages(nil, "pc.ram", page*4096, 4096))
	return err
}

func (ses *session) close() {
	ses.rp.Close()
	ses.out.Close()
	ses.server.Wait() // fails: it is cut off
}

// wait asks for random pages, one after the other as a virtual CPU does, and
// returns the times in that order.
func (s *synthetic) wait(ctx context.Context, hold time.Duration, socket bool, pipe int) ([]time.Duration, error) {
	ses, err := s.serve(ctx, hold, socket, pipe)
	if err != nil {
		return nil, err
	}
	defer ses.close()
	if err := ses.opening(); err != nil {
		return nil, err
	}
	const most = 3000
	var list []time.Duration
	var asked atomic.Int64 // when, in ns since start; 0 while nothing is
	start := time.Now()
	r := rand.New(rand.NewPCG(1, 7))
	has := make([]bool, s.Pages(0))
	wanted := uint64(0)
	// The requests come from a goroutine of their own, as from QEMU's fault
	// thread, after a pause in which the guest computes.
	next := make(chan uint64)
	defer close(next)
	go func() {
		runtime.LockOSThread()
		for page := range next {
			pause := unix.NsecToTimespec(computing.Nanoseconds())
			_ = unix.Nanosleep(&pause, nil)
			asked.Store(int64(time.Since(start)))
			if ses.ask(page) != nil {
				return
			}
		}
	}()
	choose := func() error {
		for range 1000 {
			if wanted = r.Uint64N(s.Pages(0)); !has[wanted] && s.Kind(0, wanted) != tiertest.Zero {
				next <- wanted
				return nil
			}
		}
		return errEnough
	}
	if err := choose(); err != nil {
		return nil, err
	}
	err = ses.pages(func(page uint64) error {
		has[page] = true
		if page != wanted {
			return nil
		}
		// What comes before it was asked for is no wait.
		if at := asked.Swap(0); at != 0 {
			list = append(list, time.Since(start)-time.Duration(at))
		}
		if len(list) == most {
			return errEnough
		}
		return choose()
	})
	if !errors.Is(err, errEnough) && err != nil {
		return nil, err
	}
	return list, nil
}

var errEnough = errors.New("enough")

// filter: what a large page map costs the server.
func (b *bench) filter() error {
	fmt.Print("\n| RAM | page map, MB | opening written, ms | first demanded page, ms |\n|---|---|---|---|\n")
	for _, gib := range []uint64{2, 16, 64} {
		s, err := b.synthetic(gib<<30, tiertest.Mix{tiertest.Zero: 700, tiertest.Duplicate: 290, tiertest.Text: 10})
		if err != nil {
			return err
		}
		var opening, first []time.Duration
		for range b.runs {
			start := time.Now()
			ses, err := s.serve(b.ctx, time.Hour, true, 0)
			if err != nil {
				return err
			}
			if err := ses.opening(); err != nil {
				return err
			}
			opening = append(opening, time.Since(start))
			page := s.Pages(0) * 3 / 4
			for s.Kind(0, page) != tiertest.Text {
				page++
			}
			start = time.Now()
			if err := ses.ask(page); err != nil {
				return err
			}
			err = ses.pages(func(p uint64) error {
				if p == page {
					return errEnough
				}
				return nil
			})
			if !errors.Is(err, errEnough) {
				return err
			}
			first = append(first, time.Since(start))
			ses.close()
		}
		ck, err := s.st.OpenCheckpoint(context.Background(), store.Ref{VM: "vm"}, checkpoint.Options{})
		if err != nil {
			return err
		}
		table := ck.Image.StoredBytes(image.PageMap) / 1e6
		ck.Close()
		os.RemoveAll(s.dir)
		slices.Sort(opening)
		slices.Sort(first)
		fmt.Printf("| %d GiB | %d | %s | %s |\n", gib, table, ms(opening[len(opening)/2]), ms(first[len(first)/2]))
	}
	return nil
}
