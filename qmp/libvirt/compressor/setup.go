package compressor

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"

	"github.com/flic-migrate/flic-migrate/tier/vfs"
)

// Where things go, below Setup.Root.
const (
	linkDir    = "usr/local/lib/flic-migrate/libvirt"
	qemuConf   = "etc/libvirt/qemu.conf"
	systemdRun = "run/systemd/system" // there if systemd is the init
	systemdEtc = "etc/systemd/system"
	dropIn     = "flic-migrate.conf"
)

// units are the services that run compressors; a host has one or the other.
var units = []string{"libvirtd.service", "virtqemud.service"}

// unitDirs are where the host's packages have unit files.
var unitDirs = []string{systemdEtc, "usr/lib/systemd/system", "lib/systemd/system"}

// defaultPath is what comes behind our directory in the PATH of the services:
// systemd's own (DEFAULT_PATH_NORMAL) and where root's programs are on hosts that
// keep them apart.
const defaultPath = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"

// keys of qemu.conf that say which compressor is used.
var keys = []string{"save_image_format", "snapshot_image_format"}

// Setup makes libvirt find this program in place of its compressors.
type Setup struct {
	Root    string // "/", or a directory that stands for it
	Program string // absolute path of the program
	// Replace allows lines of qemu.conf that say something else to be taken out
	// of use. Uninstall brings them back.
	Replace bool
}

// Step is a thing that Install does, or that Uninstall undoes.
type Step struct {
	Path string // what it is about
	What string // what is there when it is done
	Done bool
	// Conflict is why it can't be done, or undone; it wraps ErrConflict.
	Conflict error

	// optional: without our lines, what is in conflict with them is as it should be.
	optional bool
	do, undo func() error
}

// ErrConflict: something is there that somebody else has made.
var ErrConflict = errors.New("not ours to change")

// PathDir is the directory that has to come first in PATH of libvirt's daemon.
func (s Setup) PathDir() string { return s.path(linkDir) }

// Systemd tells whether systemd starts the services here.
func (s Setup) Systemd() bool {
	fi, err := os.Stat(s.path(systemdRun))
	return err == nil && fi.IsDir()
}

// DaemonName is the daemon that runs compressors here: libvirtd, or virtqemud where
// libvirt has a daemon for each of its drivers and no libvirtd.
func (s Setup) DaemonName() string {
	if _, err := os.Stat(s.path("usr/sbin/libvirtd")); err != nil {
		for _, dir := range []string{"usr/sbin", "usr/bin"} {
			if _, err := os.Stat(s.path(dir + "/virtqemud")); err == nil {
				return "virtqemud"
			}
		}
	}
	return "libvirtd"
}

func (s Setup) path(name string) string { return filepath.Join(s.Root, name) }

// Steps are all that belongs to an installation, in the order in which it is made,
// with what of it is there.
func (s Setup) Steps() ([]Step, error) {
	var steps []Step
	for _, name := range Names {
		steps = append(steps, s.link(name))
	}
	if s.Systemd() {
		for _, unit := range units {
			if !s.hasUnit(unit) {
				continue
			}
			step, err := s.drop(unit)
			if err != nil {
				return nil, err
			}
			steps = append(steps, step)
		}
	}
	rules, err := s.rules()
	if err != nil {
		return nil, err
	}
	step, err := s.conf()
	if err != nil {
		return nil, err
	}
	return append(append(steps, rules...), step), nil
}

func (s Setup) link(name string) Step {
	path := s.path(filepath.Join(linkDir, name))
	step := Step{Path: path, What: "link to " + s.Program}
	have, err := os.Readlink(path)
	switch {
	case err == nil:
		step.Done = have == s.Program
	case !errors.Is(err, fs.ErrNotExist):
		step.Conflict = fmt.Errorf("%s is there and no link: %w", path, ErrConflict)
	}
	step.do = func() error {
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			return err
		}
		// A link to an older place is replaced.
		if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
		return os.Symlink(s.Program, path)
	}
	step.undo = func() error {
		err := os.Remove(path)
		s.removeEmpty(filepath.Dir(linkDir), linkDir)
		return err
	}
	return step
}

// removeEmpty removes directories, the last one first, as far as nothing is in
// them.
func (s Setup) removeEmpty(dirs ...string) {
	for _, d := range slices.Backward(dirs) {
		if os.Remove(s.path(d)) != nil {
			return
		}
	}
}

func (s Setup) hasUnit(unit string) bool {
	return slices.ContainsFunc(unitDirs, func(dir string) bool {
		_, err := os.Stat(s.path(filepath.Join(dir, unit)))
		return err == nil
	})
}

func (s Setup) drop(unit string) (Step, error) {
	dir := filepath.Join(systemdEtc, unit+".d")
	path := s.path(filepath.Join(dir, dropIn))
	text := "# Made by \"flic-migrate libvirt install\".\n[Service]\nEnvironment=PATH=/" + linkDir + ":" + defaultPath + "\n"
	step := Step{Path: path, What: "PATH of " + unit + " begins with /" + linkDir}
	have, err := os.ReadFile(path)
	switch {
	case errors.Is(err, fs.ErrNotExist):
	case err != nil:
		return step, err
	case string(have) == text:
		step.Done = true
	default:
		step.Conflict = fmt.Errorf("%s has been changed by somebody: %w", path, ErrConflict)
	}
	step.do = func() error {
		// Whole or not at all: what is cut off would be taken for somebody's change.
		return vfs.ReplaceFile(path, []byte(text), 0o644)
	}
	step.undo = func() error {
		err := os.Remove(path)
		s.removeEmpty(dir)
		return err
	}
	return step, nil
}

func (s Setup) conf() (Step, error) {
	path := s.path(qemuConf)
	step := Step{Path: path, What: strings.Join(keys, " and ") + " name a compressor"}
	have, err := os.ReadFile(path)
	missing := errors.Is(err, fs.ErrNotExist)
	if err != nil && !missing {
		return step, err
	}
	next, old, remove := have, have, false
	if step.Done = hasBlock(have); step.Done {
		old, remove, err = removeBlock(have)
	} else {
		next, err = addBlock(have, missing, s.Replace)
		step.Done = err == nil && !missing && bytes.Equal(next, have) // the user has set all of it
	}
	step.optional = !step.Done
	if errors.Is(err, ErrConflict) {
		step.Conflict = fmt.Errorf("%s: %w", path, err)
	} else if err != nil {
		return step, err
	}
	const private = 0o600 // libvirt's own choice for qemu.conf
	step.do = func() error { return vfs.ReplaceFile(path, next, private) }
	step.undo = func() error {
		switch {
		case remove:
			return os.Remove(path)
		case bytes.Equal(old, have):
			return nil
		}
		return vfs.ReplaceFile(path, old, private)
	}
	return step, nil
}

// Install does the steps that are not done. It changes nothing if one of them
// is in conflict with what is there.
func (s Setup) Install() error {
	steps, err := s.Steps()
	if err != nil {
		return err
	}
	for _, step := range steps {
		if step.Conflict != nil && !step.Done {
			return step.Conflict
		}
	}
	for _, step := range steps {
		if step.Done {
			continue
		}
		if err := step.do(); err != nil {
			return err
		}
	}
	return nil
}

// Uninstall undoes what Install has done, the last step first, so that libvirt
// is never told to use what is not there any more. What somebody has changed
// since stays, and is the error.
func (s Setup) Uninstall() error {
	steps, err := s.Steps()
	if err != nil {
		return err
	}
	var conflicts []error
	for _, step := range slices.Backward(steps) {
		if _, err := os.Lstat(step.Path); errors.Is(err, fs.ErrNotExist) {
			continue
		}
		// A qemu.conf without our lines is as it should be.
		if step.Conflict != nil && (step.Done || !step.optional) {
			conflicts = append(conflicts, step.Conflict)
			continue
		}
		if err := step.undo(); err != nil {
			return err
		}
	}
	return errors.Join(conflicts...)
}

// A file of somebody else's, qemu.conf or AppArmor's, keeps all that is in it: our
// lines come at its end, between two that say whose they are, and a line that is
// taken out of use is kept as a comment.
const (
	blockBegin = "# flic-migrate begin (\"flic-migrate libvirt uninstall\" takes these lines out"
	blockEnd   = "# flic-migrate end"
	replaced   = "#flic-migrate replaced# "

	// What uninstalling has to know to leave what was there before.
	noteNoNewline = "; the line before them had no end"
	noteNewFile   = "; the file is new"
)

var setting = regexp.MustCompile(`^[ \t]*([a-z_]+)[ \t]*=[ \t]*"([^"]*)"`)

func hasBlock(conf []byte) bool { return bytes.Contains(conf, []byte(blockBegin)) }

// addBlock returns qemu.conf with lines that set those keys which nobody has set.
// A key that names one of Names already is fine: all of them are ours.
func addBlock(conf []byte, missing, replace bool) ([]byte, error) {
	if bytes.Contains(conf, []byte(blockEnd)) || bytes.Contains(conf, []byte(replaced)) {
		return nil, fmt.Errorf("a part of our lines is left: take out what has flic-migrate in it: %w", ErrConflict)
	}
	set, changed := make(map[string]bool), false
	lines := bytes.SplitAfter(conf, []byte("\n"))
	var next []byte
	for i, line := range lines {
		m := setting.FindSubmatch(line)
		if m == nil || !slices.Contains(keys, string(m[1])) {
			next = append(next, line...)
			continue
		}
		key, value := string(m[1]), string(m[2])
		if !Known(value) {
			if !replace {
				return nil, fmt.Errorf("line %d says %s = %q, for which libvirt runs no program: take it out, or let it be replaced: %w", i+1, key, value, ErrConflict)
			}
			next = append(append(next, replaced...), line...)
			changed = true
			continue
		}
		set[key] = true
		next = append(next, line...)
	}
	body := ""
	for _, key := range keys {
		if !set[key] {
			body += key + " = \"" + Names[0] + "\"\n"
		}
	}
	if body == "" && !changed {
		return conf, nil
	}
	return appendBlock(next, missing, body)
}

// appendBlock puts lines of ours at the end of a file that has none. The error wraps
// ErrConflict.
func appendBlock(text []byte, missing bool, body string) ([]byte, error) {
	if bytes.Contains(text, []byte(blockEnd)) {
		return nil, fmt.Errorf("a part of our lines is left: take out what has flic-migrate in it: %w", ErrConflict)
	}
	text, note := bytes.Clone(text), ""
	switch {
	case missing:
		note = noteNewFile
	case len(text) > 0 && text[len(text)-1] != '\n':
		note = noteNoNewline
		text = append(text, '\n')
	}
	return append(text, blockBegin+note+")\n"+body+blockEnd+"\n"...), nil
}

// removeBlock undoes addBlock. What was written behind our lines stays.
func removeBlock(conf []byte) (old []byte, remove bool, err error) {
	begin := bytes.Index(conf, []byte(blockBegin))
	if begin < 0 {
		return conf, false, nil
	}
	n := bytes.Index(conf[begin:], []byte(blockEnd+"\n"))
	first := bytes.IndexByte(conf[begin:], '\n')
	if n < 0 || first > n || begin > 0 && conf[begin-1] != '\n' {
		return nil, false, fmt.Errorf("our lines have been changed: take out what has flic-migrate in it: %w", ErrConflict)
	}
	note := string(conf[begin+len(blockBegin) : begin+first])
	before, after := conf[:begin], conf[begin+n+len(blockEnd)+1:]
	if note == noteNoNewline+")" && len(after) == 0 {
		before = before[:len(before)-1]
	}
	old = append(bytes.Clone(before), after...)
	var kept []byte
	for _, line := range bytes.SplitAfter(old, []byte("\n")) {
		kept = append(kept, bytes.TrimPrefix(line, []byte(replaced))...)
	}
	return kept, note == noteNewFile+")" && len(kept) == 0, nil
}
