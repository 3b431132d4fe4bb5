// Command guestinit is the first process of the test guests: it fills memory
// with known content, keeps changing it, and answers on the serial console.
//
// The kernel command line says what to fill:
//
//	flic.fill=MiB      size of the buffer of known content (default 8)
//	flic.seed=N        what it is filled with (default 1)
//	flic.memory=MiB    wait before that until Linux has so much memory, of which
//	                   devices may plug some in late
//	flic.dirty=N       pages changed in every 100 ms from the start (default 0)
//	flic.bytes=N       bytes changed in such a page (default 64)
//	flic.read=PATH     mount /dev/vda and read everything below PATH, so that
//	                   it is in the page cache
//	flic.readmax=MiB   end that after so much (default: no limit)
//	flic.readseed=N    read the files in another order (default 0: by name)
//	flic.run=PROGRAM   run a program on the disk, as with run below
//
// Then it writes "flic ready" and, each 100 ms, "tick N" with N rising by one.
// A line written to the console is a command and is answered by one line:
//
//	sum         "sum SHA256" of the whole buffer
//	check       "check ok PAGES CHANGES" or "check bad PAGES FIRST": each page is
//	            compared with the checksum the guest keeps of it elsewhere, which
//	            finds a page that was restored damaged or in an older version
//	dirty N [B] change N pages of B bytes each 100 ms; "dirty N B"
//	tick?       "tick? N"
//	fill N      fill the buffer anew with seed N; "fill N"
//	read PATH   read a file or directory below the mounted disk; "read BYTES"
//	touch I N   write to N pages of the buffer from page I on each 10 ms, and to
//	            no other; "touch I N"
//	where I N   where N pages from page I on are in the machine's memory, as runs:
//	            "where FRAME+COUNT FRAME+COUNT …"
//	run COMMAND run a shell command on the disk, with /tmp in memory, until the
//	            next run, which kills it; "run ok"
//	block PATH I  the SHA-256 of the I-th block of 4096 bytes of a disk, such as
//	            /dev/vdb, past Linux's cache; "block SHA256"
//	tpm         what the TPM has in PCR 16, SHA-256; "tpm HEX"
//	tpm extend  the same after the PCR has been extended by a constant
//	off         power off
//
// sum, check and fill hold the changes and ticks until they are done.
package main

import (
	"bufio"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"io/fs"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"runtime/debug"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/flic-migrate/flic-migrate/qmp/qemutest/guestmem"
)

// guest is the buffer with what is known about it. The lock makes a check see
// pages and checksums that belong together, in spite of the ticker's changes.
type guest struct {
	mu      sync.Mutex
	buf     []byte   // mapped, not from Go's heap: nothing else is in its pages
	sums    []uint32 // CRC-32 by page
	random  *rand.Rand
	perTick int    // pages changed
	touched []byte // pages that are written to, over and over
	bytes   int    // changed in each
	changes uint64 // made since the fill
	tick    uint64
	program program
}

func main() {
	// The buffer is not on the heap, so a small heap costs nothing and leaves
	// the guest's other memory quiet.
	debug.SetMemoryLimit(8 << 20)
	if err := run(); err != nil {
		fmt.Println("flic failed:", err)
	}
	// Without a first process the kernel would panic and hide what was said.
	unix.Sync()
	unix.Reboot(unix.LINUX_REBOOT_CMD_POWER_OFF)
	select {}
}

func run() error {
	quietConsole()
	options, err := commandLine("/proc/cmdline")
	if err != nil {
		return err
	}
	if err := waitForMemory("/proc/meminfo", options.number("memory", 0)<<20, time.Minute); err != nil {
		return err
	}
	g, err := newGuest(int(options.number("fill", 8))<<20, options.number("seed", 1))
	if err != nil {
		return err
	}
	g.perTick, g.bytes = int(options.number("dirty", 0)), int(options.number("bytes", 64))
	if path := options["read"]; path != "" {
		if err := unix.Mount("/dev/vda", "/mnt", "ext4", unix.MS_RDONLY, ""); err != nil {
			return fmt.Errorf("mount /dev/vda: %w", err)
		}
		limit := int64(options.number("readmax", 1<<20)) << 20
		n, err := readTree(filepath.Join("/mnt", path), limit, options.number("readseed", 0))
		if err != nil {
			return err
		}
		fmt.Println("flic read", n)
	}
	if program := options["run"]; program != "" {
		if err := g.program.run(program); err != nil {
			return fmt.Errorf("run %s: %w", program, err)
		}
	}
	fmt.Println("flic ready")
	go g.ticker(100 * time.Millisecond)
	go g.toucher(10 * time.Millisecond)
	return g.serve(os.Stdin, os.Stdout)
}

// quietConsole turns the echo off, so that the reader of the console sees
// answers only.
func quietConsole() {
	t, err := unix.IoctlGetTermios(0, unix.TCGETS)
	if err != nil {
		return // not a terminal: there is no echo
	}
	t.Lflag &^= unix.ECHO | unix.ECHOE | unix.ECHOK | unix.ECHONL
	_ = unix.IoctlSetTermios(0, unix.TCSETS, t)
}

type options map[string]string

// commandLine returns the "flic." words of the kernel's command line.
func commandLine(path string) (options, error) {
	line, err := os.ReadFile(path)
	if err != nil {
		return nil, err
	}
	o := options{}
	for word := range strings.FieldsSeq(string(line)) {
		if key, value, ok := strings.Cut(word, "="); ok && strings.HasPrefix(key, "flic.") {
			o[key[len("flic."):]] = value
		}
	}
	return o, nil
}

func (o options) number(key string, otherwise uint64) uint64 {
	n, err := strconv.ParseUint(o[key], 10, 63)
	if err != nil {
		return otherwise
	}
	return n
}

// waitForMemory waits until Linux has so many bytes, all told. path is that of
// proc_meminfo(5).
func waitForMemory(path string, bytes uint64, limit time.Duration) error {
	for end := time.Now().Add(limit); ; time.Sleep(50 * time.Millisecond) {
		text, err := os.ReadFile(path)
		if err != nil {
			return err
		}
		var kilobytes uint64
		if _, err := fmt.Sscanf(string(text), "MemTotal: %d kB", &kilobytes); err != nil {
			return fmt.Errorf("%s: %w", path, err)
		}
		if kilobytes<<10 >= bytes {
			return nil
		}
		if time.Now().After(end) {
			return fmt.Errorf("%d kB of memory, and not %d bytes", kilobytes, bytes)
		}
	}
}

func newGuest(size int, seed uint64) (*guest, error) {
	g := &guest{program: program{root: "/mnt"}}
	if size > 0 {
		var err error
		g.buf, err = unix.Mmap(-1, 0, size, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_ANON|unix.MAP_PRIVATE)
		if err != nil {
			return nil, fmt.Errorf("%d bytes for the buffer: %w", size, err)
		}
	}
	g.sums = make([]uint32, size/guestmem.PageSize)
	g.fill(seed)
	return g, nil
}

func (g *guest) page(i int) []byte { return g.buf[i*guestmem.PageSize : (i+1)*guestmem.PageSize] }

func (g *guest) fill(seed uint64) {
	g.random = rand.New(rand.NewPCG(seed, 1))
	g.changes = 0
	for i := range g.sums {
		guestmem.Page(g.page(i), seed, i)
		g.sums[i] = crc32.ChecksumIEEE(g.page(i))
	}
}

// check counts the pages that are not what they should be; first is the number
// of the first one.
func (g *guest) check() (bad, first int) {
	for i, sum := range g.sums {
		if crc32.ChecksumIEEE(g.page(i)) == sum {
			continue
		}
		if bad == 0 {
			first = i
		}
		bad++
	}
	return bad, first
}

// step makes the changes of one tick.
func (g *guest) step() {
	for range min(g.perTick, len(g.sums)) {
		i := g.random.IntN(len(g.sums))
		guestmem.Change(g.page(i), g.random, g.bytes)
		g.sums[i] = crc32.ChecksumIEEE(g.page(i))
		g.changes++
	}
}

func (g *guest) ticker(period time.Duration) {
	for range time.Tick(period) {
		g.mu.Lock()
		g.step()
		g.tick++
		fmt.Printf("tick %d\n", g.tick)
		g.mu.Unlock()
	}
}

// toucher writes to the pages of touch. What it writes is what is there, so that
// the checksums stay right.
func (g *guest) toucher(period time.Duration) {
	for range time.Tick(period) {
		g.mu.Lock()
		for i := 0; i < len(g.touched); i += guestmem.PageSize {
			p := (*uint32)(unsafe.Pointer(&g.touched[i]))
			atomic.StoreUint32(p, atomic.LoadUint32(p))
		}
		g.mu.Unlock()
	}
}

// where returns the page frames of a part of the buffer, as runs.
func where(part []byte) ([]string, error) {
	f, err := os.Open("/proc/self/pagemap")
	if err != nil {
		return nil, err
	}
	defer f.Close()
	var runs []string
	var first, count uint64
	flush := func() {
		if count > 0 {
			runs = append(runs, fmt.Sprintf("%d+%d", first, count))
		}
	}
	for i := 0; i < len(part); i += guestmem.PageSize {
		var b [8]byte
		at := uintptr(unsafe.Pointer(&part[i])) / guestmem.PageSize
		if _, err := f.ReadAt(b[:], int64(at)*8); err != nil {
			return nil, err
		}
		// Documentation/admin-guide/mm/pagemap.rst: bit 63 is present, bits
		// 0 to 54 are the frame.
		e := binary.LittleEndian.Uint64(b[:])
		if e>>63 == 0 {
			return nil, fmt.Errorf("page %d is not in memory", i/guestmem.PageSize)
		}
		if frame := e & (1<<55 - 1); count > 0 && frame == first+count {
			count++
		} else {
			flush()
			first, count = frame, 1
		}
	}
	flush()
	return runs, nil
}

// part is pages [i, i+n) of the buffer, as far as it goes.
func (g *guest) part(i, n int) []byte {
	i = min(i, len(g.sums))
	return g.buf[i*guestmem.PageSize : (i+min(n, len(g.sums)-i))*guestmem.PageSize]
}

// program is what run has started.
type program struct {
	root    string // where the disk is mounted; empty: here
	mounted bool
	cmd     *exec.Cmd
}

func (p *program) run(command string) error {
	if !p.mounted {
		for _, m := range []struct{ device, dir, kind string }{
			{"/dev/vda", "", "ext4"}, {"tmp", "tmp", "tmpfs"}, {"proc", "proc", "proc"}, {"dev", "dev", "devtmpfs"},
		} {
			flags := uintptr(0)
			if m.kind == "ext4" {
				flags = unix.MS_RDONLY
			}
			err := unix.Mount(m.device, filepath.Join(p.root, m.dir), m.kind, flags, "")
			if err != nil && !errors.Is(err, unix.EBUSY) {
				return fmt.Errorf("mount %s: %w", m.dir, err)
			}
		}
		p.mounted = true
	}
	if p.cmd != nil {
		// With all that it has started.
		_ = unix.Kill(-p.cmd.Process.Pid, unix.SIGKILL)
		_ = p.cmd.Wait()
		p.cmd = nil
	}
	if command == "" {
		return nil
	}
	p.cmd = exec.Command("/bin/sh", "-c", command)
	p.cmd.Dir = "/tmp"
	p.cmd.Env = []string{"PATH=/usr/sbin:/usr/bin:/sbin:/bin", "LC_ALL=C"}
	p.cmd.SysProcAttr = &syscall.SysProcAttr{Chroot: p.root, Setpgid: true}
	return p.cmd.Start()
}

// serve answers commands until the console ends or "off" is said.
func (g *guest) serve(r io.Reader, w io.Writer) error {
	lines := bufio.NewScanner(r)
	for lines.Scan() {
		words := strings.Fields(lines.Text())
		if len(words) == 0 {
			continue
		}
		if words[0] == "off" {
			return nil
		}
		g.mu.Lock()
		fmt.Fprintln(w, g.answer(words[0], words[1:]))
		g.mu.Unlock()
	}
	return errors.Join(lines.Err(), errors.New("the console has ended"))
}

func (g *guest) answer(command string, args []string) string {
	number := func(i, otherwise int) int {
		if i < len(args) {
			if n, err := strconv.Atoi(args[i]); err == nil && n >= 0 {
				return n
			}
		}
		return otherwise
	}
	switch command {
	case "sum":
		return fmt.Sprintf("sum %x", sha256.Sum256(g.buf))
	case "check":
		if bad, first := g.check(); bad > 0 {
			return fmt.Sprintf("check bad %d %d", bad, first)
		}
		return fmt.Sprintf("check ok %d %d", len(g.sums), g.changes)
	case "dirty":
		g.perTick, g.bytes = number(0, 0), number(1, g.bytes)
		return fmt.Sprintf("dirty %d %d", g.perTick, g.bytes)
	case "tick?":
		return fmt.Sprintf("tick? %d", g.tick)
	case "fill":
		seed := number(0, 1)
		g.fill(uint64(seed))
		return fmt.Sprintf("fill %d", seed)
	case "touch":
		g.touched = g.part(number(0, 0), number(1, 0))
		return fmt.Sprintf("touch %d %d", number(0, 0), len(g.touched)/guestmem.PageSize)
	case "where":
		runs, err := where(g.part(number(0, 0), number(1, 0)))
		if err != nil {
			return fmt.Sprintf("error: %v", err)
		}
		return strings.Join(append([]string{"where"}, runs...), " ")
	case "run":
		if err := g.program.run(strings.Join(args, " ")); err != nil {
			return fmt.Sprintf("error: %v", err)
		}
		return "run ok"
	case "block":
		if len(args) != 2 {
			return "error: block PATH I"
		}
		sum, err := block(args[0], number(1, 0))
		if err != nil {
			return fmt.Sprintf("error: %v", err)
		}
		return fmt.Sprintf("block %x", sum)
	case "tpm":
		value, err := pcr(args)
		if err != nil {
			return fmt.Sprintf("error: %v", err)
		}
		return fmt.Sprintf("tpm %x", value)
	case "read":
		if len(args) != 1 {
			return "error: read PATH"
		}
		n, err := readTree(filepath.Join("/mnt", args[0]), 1<<40, 0)
		if err != nil {
			return fmt.Sprintf("error: %v", err)
		}
		return fmt.Sprintf("read %d", n)
	}
	return fmt.Sprintf("error: unknown command %q", command)
}

// block returns the SHA-256 of a disk's block of a page's size, as the disk has it.
func block(path string, i int) ([sha256.Size]byte, error) {
	f, err := os.OpenFile(path, os.O_RDONLY|unix.O_DIRECT, 0)
	if err != nil {
		return [sha256.Size]byte{}, err
	}
	defer f.Close()
	// What is read past the cache goes to whole pages.
	page, err := unix.Mmap(-1, 0, guestmem.PageSize, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_ANON|unix.MAP_PRIVATE)
	if err != nil {
		return [sha256.Size]byte{}, err
	}
	defer unix.Munmap(page)
	if _, err := f.ReadAt(page, int64(i)*guestmem.PageSize); err != nil {
		return [sha256.Size]byte{}, err
	}
	return sha256.Sum256(page), nil
}

// readTree reads the regular files below root, at most limit bytes, and returns
// how many bytes it has read.
func readTree(root string, limit int64, seed uint64) (int64, error) {
	var files []string
	err := filepath.WalkDir(root, func(path string, d fs.DirEntry, err error) error {
		if err == nil && d.Type().IsRegular() {
			files = append(files, path)
		}
		return err
	})
	if err != nil {
		return 0, err
	}
	slices.Sort(files)
	if seed != 0 {
		r := rand.New(rand.NewPCG(seed, 2))
		r.Shuffle(len(files), func(i, j int) { files[i], files[j] = files[j], files[i] })
	}
	var total int64
	for _, path := range files {
		if total >= limit {
			break
		}
		f, err := os.Open(path)
		if err != nil {
			return total, err
		}
		n, err := io.Copy(io.Discard, io.LimitReader(f, limit-total))
		f.Close()
		if err != nil {
			return total, err
		}
		total += n
	}
	return total, nil
}
