package compressor

import (
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
)

// A compressor is told nothing but what stands on its command line: not which
// domain it saves, and not to which file. Both are at the other ends of its
// pipes, and root, whom libvirt's system daemon runs it as, may look there.
// Whoever may not gets a shorter answer and never a wrong one.

// proc is where the kernel says what processes have open; tests have their own.
type proc string

// system is this machine's.
const system proc = "/proc"

// Domain is what a QEMU says about its libvirt domain. Both are empty if it
// is not known.
type Domain struct {
	Name, UUID string
}

// Source is the domain whose QEMU writes to the pipe that f reads.
func Source(f *os.File) Domain { return system.source(f) }

// Target is the absolute path of the file that what is written to f ends up in:
// f's own, or that of libvirt's helper at the end of the pipe. It is empty if
// it can't be known.
func Target(f *os.File) string { return system.target(f) }

// Input is the absolute path of the file that f reads, itself or through
// libvirt's helper; empty if it can't be known.
func Input(f *os.File) string { return system.input(f) }

func (p proc) source(f *os.File) (d Domain) {
	p.ends(f, func(pid int, fd string) bool {
		if !p.writes(pid, fd) {
			return false
		}
		d = parseQEMU(p.cmdline(pid))
		return d != Domain{}
	})
	return d
}

func (p proc) target(f *os.File) string { return p.far(f, "1") }
func (p proc) input(f *os.File) string  { return p.far(f, "0") }

// far is the regular file at f, or at the given descriptor of the
// libvirt_iohelper at the other end of f.
func (p proc) far(f *os.File, fd string) (path string) {
	if path = p.file(os.Getpid(), strconv.Itoa(int(f.Fd()))); path != "" {
		return path
	}
	p.ends(f, func(pid int, _ string) bool {
		if args := p.cmdline(pid); len(args) > 0 && filepath.Base(args[0]) == "libvirt_iohelper" {
			path = p.file(pid, fd)
		}
		return path != ""
	})
	return path
}

// file is the path of a regular file that a process has open and that is still
// there under this name.
func (p proc) file(pid int, fd string) string {
	link := filepath.Join(string(p), strconv.Itoa(pid), "fd", fd)
	name, err := os.Readlink(link)
	if err != nil || !filepath.IsAbs(name) {
		return ""
	}
	// Names that the kernel has marked as deleted, or that are in another mount
	// namespace, are not the file.
	open, err := os.Stat(link)
	if err != nil || !open.Mode().IsRegular() {
		return ""
	}
	if named, err := os.Stat(name); err != nil || !os.SameFile(open, named) {
		return ""
	}
	return name
}

// ends calls fn for each descriptor of another process that is an end of the
// same pipe as f, until it says that this is enough.
func (p proc) ends(f *os.File, fn func(pid int, fd string) (enough bool)) {
	fi, err := f.Stat()
	if err != nil || fi.Mode()&os.ModeNamedPipe == 0 {
		return
	}
	want := fmt.Sprintf("pipe:[%d]", fi.Sys().(*syscall.Stat_t).Ino)
	processes, err := os.ReadDir(string(p))
	if err != nil {
		return
	}
	for _, e := range processes {
		pid, err := strconv.Atoi(e.Name())
		if err != nil || pid == os.Getpid() {
			continue
		}
		dir := filepath.Join(string(p), e.Name(), "fd")
		fds, err := os.ReadDir(dir)
		if err != nil {
			continue // another user's, or it has ended
		}
		for _, fd := range fds {
			if name, err := os.Readlink(filepath.Join(dir, fd.Name())); err == nil && name == want && fn(pid, fd.Name()) {
				return
			}
		}
	}
}

// writes tells whether a process has a descriptor open for writing.
func (p proc) writes(pid int, fd string) bool {
	b, err := os.ReadFile(filepath.Join(string(p), strconv.Itoa(pid), "fdinfo", fd))
	if err != nil {
		return false
	}
	for _, line := range strings.Split(string(b), "\n") {
		if octal, ok := strings.CutPrefix(line, "flags:"); ok {
			flags, err := strconv.ParseInt(strings.TrimSpace(octal), 8, 64)
			return err == nil && flags&syscall.O_ACCMODE != syscall.O_RDONLY
		}
	}
	return false
}

// maxCmdline bounds what is read of a command line. QEMU's can have a few
// thousand options.
const maxCmdline = 1 << 20

func (p proc) cmdline(pid int) []string {
	f, err := os.Open(filepath.Join(string(p), strconv.Itoa(pid), "cmdline"))
	if err != nil {
		return nil
	}
	defer f.Close()
	b := make([]byte, maxCmdline)
	n := 0
	for n < len(b) {
		m, err := f.Read(b[n:])
		n += m
		if err != nil {
			break
		}
	}
	return strings.Split(strings.TrimSuffix(string(b[:n]), "\x00"), "\x00")
}

// parseQEMU finds the domain in the command line of a QEMU that libvirt has
// started: -name guest=NAME,... with commas doubled, and -uuid UUID.
func parseQEMU(args []string) (d Domain) {
	for i := 1; i+1 < len(args); i++ {
		switch args[i] {
		case "-name":
			if value, ok := strings.CutPrefix(args[i+1], "guest="); ok {
				d.Name = uncomma(value)
			}
		case "-uuid":
			d.UUID = args[i+1]
		}
	}
	return d
}

// uncomma is the value at the beginning of a list of QEMU's options.
func uncomma(s string) string {
	var b strings.Builder
	for i := 0; i < len(s); i++ {
		if s[i] == ',' {
			if i+1 == len(s) || s[i+1] != ',' {
				break
			}
			i++
		}
		b.WriteByte(s[i])
	}
	return b.String()
}
