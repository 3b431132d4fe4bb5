// Package compressor is what a program needs to stand in for one of libvirt's
// image compressors.
//
// libvirt runs a compressor that it finds by name in its daemon's PATH
// (qemu_saveimage.c, qemuSaveImageGetCompressionProgram):
//
//	save:    QEMU ─► pipe ─► lzop -c ─► pipe ─► libvirt_iohelper ─► save file
//	restore: save file, behind libvirt's header ─► lzop -dc --ignore-warn ─► pipe ─► QEMU
//
// A program of ours with that name that stands earlier in PATH gets the stream
// and gives it back. It must be no trouble to anybody else: what is not for it
// goes to the real program, untouched ([HandOver]).
//
// libvirt waits for the compressor's exit status. If it is not 0, virsh save
// fails with what the compressor has written to stderr, the save file is removed
// and the domain runs on; but only if QEMU was able to write its whole stream,
// because otherwise QEMU's broken pipe is the error that is shown.
package compressor

import (
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"syscall"
)

// Names are the compressors that libvirt knows (virQEMUSaveFormat; zstd only in
// newer versions), without raw. The first is the one to ask libvirt for: the
// only one that it calls with no other option than -c.
var Names = []string{"lzop", "gzip", "bzip2", "xz", "zstd"}

// Job is what a compressor is called for.
type Job int

const (
	Other      Job = iota // nothing that libvirt asks for
	Compress              // standard input to standard output
	Decompress            // likewise
)

// JobOf tells what the arguments ask for, of those that libvirt gives: -c to
// compress, for xz with -3; -dc to decompress, for lzop with --ignore-warn.
func JobOf(args []string) Job {
	job := Other
	for _, a := range args {
		switch {
		case a == "-c" && job == Other:
			job = Compress
		case a == "-dc" && job == Other:
			job = Decompress
		case a == "--ignore-warn", len(a) == 2 && a[0] == '-' && a[1] >= '1' && a[1] <= '9':
		default:
			return Other
		}
	}
	return job
}

// Peek reads up to n bytes of f's input and gives them back if f is seekable:
// then taken is false and the offset is where it was. Fewer bytes are no error.
func Peek(f *os.File, n int) (head []byte, taken bool, err error) {
	head = make([]byte, n)
	if at, serr := f.Seek(0, io.SeekCurrent); serr == nil {
		n, err = f.ReadAt(head, at)
	} else {
		taken = true
		n, err = io.ReadFull(f, head)
	}
	if errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) {
		err = nil
	}
	return head[:n], taken, err
}

// Real finds the program of that name in PATH which is not this one, however
// many links to this one stand before it.
func Real(name string) (string, error) {
	self, err := os.Stat("/proc/self/exe")
	if err != nil {
		return "", err
	}
	for _, dir := range filepath.SplitList(os.Getenv("PATH")) {
		path := filepath.Join(dir, name)
		fi, err := os.Stat(path)
		if !filepath.IsAbs(path) || err != nil || !fi.Mode().IsRegular() || fi.Mode()&0o111 == 0 || os.SameFile(fi, self) {
			continue
		}
		return path, nil
	}
	return "", fmt.Errorf("%s itself is not installed, and this is for it: %w", name, exec.ErrNotFound)
}

// HandOver makes the real program do the work, with the arguments and with this
// process's standard input, output and error. head has been taken from the input
// and comes first. It returns the program's exit status; without a head it does
// not return unless the program can't be started.
func HandOver(name string, args []string, head []byte) (status int, err error) {
	path, err := Real(name)
	if err != nil {
		return 0, err
	}
	if len(head) == 0 {
		return 0, syscall.Exec(path, append([]string{name}, args...), os.Environ())
	}
	cmd := exec.Command(path, args...)
	cmd.Args[0] = name
	cmd.Stdout, cmd.Stderr = os.Stdout, os.Stderr
	// Whoever ends this process must not leave the program behind with the
	// pipes that somebody waits for.
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	in, err := cmd.StdinPipe()
	if err != nil {
		return 0, err
	}
	if err := cmd.Start(); err != nil {
		return 0, err
	}
	if _, err = in.Write(head); err == nil {
		_, err = io.Copy(in, os.Stdin)
	}
	cerr := in.Close()
	werr := cmd.Wait()
	if exit := (*exec.ExitError)(nil); errors.As(werr, &exit) {
		// Killed by a signal it has none; the shell's rule is as good as any.
		if s, ok := exit.Sys().(syscall.WaitStatus); ok && s.Signaled() {
			return 128 + int(s.Signal()), nil
		}
		return exit.ExitCode(), nil
	}
	if errors.Is(err, syscall.EPIPE) {
		err = nil // the program has all it wanted and says how it went
	}
	return 0, errors.Join(err, cerr, werr)
}

// Known tells whether name is one of Names.
func Known(name string) bool { return slices.Contains(Names, name) }
