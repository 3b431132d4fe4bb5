package compressor

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/flic-migrate/flic-migrate/tier/vfs"
)

// Debian, Ubuntu and openSUSE confine libvirt's daemons with AppArmor. Their
// profiles let a daemon execute what is directly in /bin, /sbin, /usr/bin and
// /usr/sbin and a few helpers, by the path that the links end in. Any other program
// gets EACCES, of which virsh shows no more than a broken pipe. A profile includes a
// file for the host's own rules, and there ours has its place:
//
//	/etc/apparmor.d/usr.sbin.libvirtd        the distribution's, untouched
//	/etc/apparmor.d/local/usr.sbin.libvirtd  "PROGRAM" PUx,
//
// PUx: the program runs under a profile of its own, if there is one, or unconfined,
// as the distribution's compressors do.

const (
	apparmorDir   = "etc/apparmor.d"
	apparmorLocal = apparmorDir + "/local"
	// The kernel's side, in securityfs: the profiles that are loaded, one a line
	// as "NAME (MODE)", and the file that answers questions.
	apparmorLoaded = "sys/kernel/security/apparmor/profiles"
	apparmorAccess = "sys/kernel/security/apparmor/.access"

	selinuxEnforce = "sys/fs/selinux/enforce"
)

// profiles are the files of the profiles that confine what runs compressors, and the
// name that each has in the kernel.
var profiles = []struct{ file, name string }{
	{"usr.sbin.libvirtd", "libvirtd"},
	{"usr.sbin.virtqemud", "virtqemud"},
}

// rules are the steps that let confined daemons execute the program.
func (s Setup) rules() (steps []Step, err error) {
	for _, p := range profiles {
		text, err := os.ReadFile(s.path(filepath.Join(apparmorDir, p.file)))
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err != nil {
			return nil, err
		}
		step, err := s.rule(p.file, p.name, text)
		if err != nil {
			return nil, err
		}
		steps = append(steps, step)
	}
	return steps, nil
}

func (s Setup) rule(file, name string, profile []byte) (Step, error) {
	path := s.path(filepath.Join(apparmorLocal, file))
	step := Step{Path: path, What: "AppArmor's profile " + name + " may execute " + s.Program}
	have, err := os.ReadFile(path)
	missing := errors.Is(err, fs.ErrNotExist)
	if err != nil && !missing {
		return step, err
	}
	quoted, err := quoteRule(s.Program)
	if err == nil && !bytes.Contains(profile, []byte("local/"+file)) {
		err = fmt.Errorf("%s does not include local/%s, where our rule would stand: %w", s.path(filepath.Join(apparmorDir, file)), file, ErrConflict)
	}
	old, remove := have, missing
	if err == nil {
		old, remove, err = removeBlock(have)
	}
	var next []byte
	if err == nil {
		// A rule for where the program was before is replaced.
		next, err = appendBlock(old, missing || remove, quoted+" PUx,\n")
		step.Done = bytes.Equal(next, have)
	}
	if errors.Is(err, ErrConflict) {
		step.Conflict = fmt.Errorf("%s: %w", path, err)
	} else if err != nil {
		return step, err
	}
	step.do = func() error {
		if err := vfs.ReplaceFile(path, next, 0o644); err != nil {
			return err
		}
		err := s.reload(file, name)
		if err == nil {
			return nil
		}
		// A profile that does not load would leave libvirt without one at the
		// next boot.
		if missing {
			return errors.Join(err, os.Remove(path))
		}
		return errors.Join(err, vfs.ReplaceFile(path, have, 0o644))
	}
	step.undo = func() (err error) {
		switch {
		case remove:
			err = os.Remove(path)
		case bytes.Equal(old, have):
			return nil
		default:
			err = vfs.ReplaceFile(path, old, 0o644)
		}
		if err != nil {
			return err
		}
		return s.reload(file, name)
	}
	return step, nil
}

// quoteRule writes a path as AppArmor's parser reads it, which takes some
// characters for patterns (apparmor.d(5)). The error wraps ErrConflict.
func quoteRule(path string) (string, error) {
	var b strings.Builder
	for _, r := range path {
		switch {
		case r < ' ' || r == '"' || r == 0x7f:
			return "", fmt.Errorf("the program's path %q can't stand in a rule of AppArmor's: %w", path, ErrConflict)
		case strings.ContainsRune(`\*?[]{}^@,`, r):
			b.WriteByte('\\')
		}
		b.WriteRune(r)
	}
	return `"` + b.String() + `"`, nil
}

// reload gives the kernel a profile again, if it has it. One that is not loaded,
// because AppArmor is off or somebody has disabled it, stays so.
func (s Setup) reload(file, name string) error {
	if s.mode(name) == "" {
		return nil
	}
	parser, err := exec.LookPath("apparmor_parser")
	if err != nil {
		parser = "/usr/sbin/apparmor_parser" // often not in a user's PATH
	}
	// Neither from its cache, which knows a file's age to the second only.
	out, err := exec.Command(parser, "--replace", "--skip-read-cache", "--write-cache", s.path(filepath.Join(apparmorDir, file))).CombinedOutput()
	if err != nil {
		return fmt.Errorf("AppArmor's profile %s does not load: %w: %s", name, err, bytes.TrimSpace(out))
	}
	return nil
}

// mode is how the kernel applies the profile of that name: enforce, complain, …, or
// nothing if it does not have it.
func (s Setup) mode(name string) string {
	b, err := os.ReadFile(s.path(apparmorLoaded))
	if err != nil {
		return ""
	}
	for _, line := range strings.Split(string(b), "\n") {
		// Profiles of some years ago are named for the program they are for.
		label, mode, _ := strings.Cut(line, " ")
		if label == name || label == "/usr/sbin/"+name {
			return strings.Trim(mode, "()")
		}
	}
	return ""
}

// Confinement is what a security module says of a daemon that wants to execute the
// program.
type Confinement struct {
	Profile string // AppArmor's name for what confines the daemon
	Mode    string // enforce, complain, …
	Allowed bool
	// Known is not set if the kernel could not be asked.
	Known bool
}

// Confinements are those that AppArmor has loaded for libvirt's daemons.
func (s Setup) Confinements() (list []Confinement) {
	for _, p := range profiles {
		c := Confinement{Profile: p.name, Mode: s.mode(p.name)}
		if c.Mode == "" {
			continue
		}
		for _, label := range []string{p.name, "/usr/sbin/" + p.name} {
			if allowed, known := s.mayExecute(label); known {
				c.Allowed, c.Known = allowed || c.Mode == "complain", true
				break
			}
		}
		list = append(list, c)
	}
	return list
}

// mayExecute asks the kernel whether a process with this label may execute the
// program, as libapparmor's aa_query_file_path does (security/apparmor/apparmorfs.c,
// query_label): written is "label", NUL, the label, NUL, the class of files, and the
// path; read are lines of hexadecimal masks, of which "allow" comes first.
func (s Setup) mayExecute(label string) (allowed, known bool) {
	const classFile, execute = 2, 1
	f, err := os.OpenFile(s.path(apparmorAccess), os.O_RDWR, 0)
	if err != nil {
		return false, false
	}
	defer f.Close()
	question := append([]byte("label\x00"+label+"\x00"), classFile)
	if _, err := f.Write(append(question, s.Program...)); err != nil {
		return false, false
	}
	answer := make([]byte, 256)
	n, err := f.Read(answer)
	if err != nil {
		return false, false
	}
	var mask uint32
	if _, err := fmt.Sscanf(string(answer[:n]), "allow %v", &mask); err != nil {
		return false, false
	}
	return mask&execute != 0, true
}

// SELinux tells whether SELinux enforces its policy here, and the label of the
// program, by which the policy decides who may execute it.
func (s Setup) SELinux() (label string, enforces bool) {
	b, err := os.ReadFile(s.path(selinuxEnforce))
	if on, aerr := strconv.Atoi(strings.TrimSpace(string(b))); err != nil || aerr != nil || on == 0 {
		return "", false
	}
	value := make([]byte, 256)
	n, err := unix.Getxattr(s.Program, "security.selinux", value)
	if err != nil {
		return "", true
	}
	return strings.TrimRight(string(value[:n]), "\x00"), true
}
