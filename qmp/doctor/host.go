package doctor

import (
	"context"
	"errors"
	"os"
	"os/exec"
	"os/user"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/flic-migrate/flic-migrate/qmp/preflight"
)

// Host looks at what the kernel allows, and at the QEMUs in the directories of path, a
// list as in $PATH.
func Host(ctx context.Context, path string) []Finding {
	return append(faults(qemuConf), qemus(ctx, filepath.SplitList(path))...)
}

const qemuConf = "/etc/libvirt/qemu.conf"

// faults tells who may have a page fault handled: a lazy restore needs that of QEMU's
// user, and so does background-snapshot.
func faults(conf string) []Finding {
	r := report{topic: "userfaultfd"}
	const do = "for a lazy resume and --mode background: sysctl vm.unprivileged_userfaultfd=1, or, with QEMU 8.1 or later, give the user /dev/userfaultfd"
	if err := preflight.OwnUserfaultfd(); err != nil {
		r.warn(do, "a QEMU of this user (%d) may not use it: resume restores eagerly", os.Getuid())
	} else {
		r.ok("a QEMU of this user (%d) may use it: resume can be lazy", os.Getuid())
	}
	name, uid, known := libvirtUser(conf)
	if !known {
		return r.list
	}
	if err := preflight.Userfaultfd(uid); err != nil {
		r.warn(do, "libvirt's QEMUs, of the user %s, may not use it: resume --domain restores eagerly", name)
	} else {
		r.ok("libvirt's QEMUs, of the user %s, may use it", name)
	}
	return r.list
}

var userLine = regexp.MustCompile(`(?m)^[ \t]*user[ \t]*=[ \t]*["']\+?([^"'\n]+)["']`)

// libvirtUser is the user of the QEMUs of libvirt's system daemon: the one that its
// configuration names, or else the one that packages make for it. Without that
// configuration there is no libvirt here.
func libvirtUser(conf string) (name string, uid int, known bool) {
	if _, err := os.Stat(filepath.Dir(conf)); err != nil {
		return "", 0, false
	}
	names := []string{"libvirt-qemu", "qemu"}
	if b, err := os.ReadFile(conf); err == nil {
		if m := userLine.FindSubmatch(b); m != nil {
			names = []string{string(m[1])}
		}
	}
	for _, name := range names {
		u, err := user.Lookup(name)
		if err != nil {
			u, err = user.LookupId(name)
		}
		if err != nil {
			continue
		}
		if uid, err := strconv.Atoi(u.Uid); err == nil {
			return u.Username, uid, true
		}
	}
	return "", 0, false
}

const (
	maxQEMUs = 32
	// askTime is how long a QEMU may take to say its version.
	askTime = 5 * time.Second
)

var versionLine = regexp.MustCompile(`(?m)^QEMU emulator version (\d+)\.(\d+)(\.\d+)*`)

// The first and the last QEMU that docs/tested.md has.
var oldest, newest = [2]int{7, 2}, [2]int{11, 1}

// qemus finds the QEMUs in dirs and asks each for its version.
func qemus(ctx context.Context, dirs []string) []Finding {
	r := report{topic: "qemu"}
	var found []string
	seen := make(map[string]bool)                 // by where links lead
	patterns := []string{"/usr/libexec/qemu-kvm"} // Red Hat's, which libvirt starts
	for _, dir := range dirs {
		patterns = append(patterns, filepath.Join(dir, "qemu-system-*"), filepath.Join(dir, "qemu-kvm"))
	}
	for _, pattern := range patterns {
		list, _ := filepath.Glob(pattern)
		for _, path := range list {
			real, err := filepath.EvalSymlinks(path)
			if err == nil && !seen[real] && len(found) < maxQEMUs && executable(real) {
				seen[real] = true
				found = append(found, path)
			}
		}
	}
	if len(found) == 0 {
		r.warn("install one (Debian: qemu-system-x86), or see that the PATH of who runs flic-migrate has its directory", "no QEMU was found in PATH")
	}
	for _, path := range found {
		version, err := ask(ctx, path)
		switch {
		case err != nil:
			r.warn("", "%s does not say its version: %v", path, err)
		case slices.Compare(version[:], oldest[:]) < 0:
			r.warn("use 7.2 or later", "%s is QEMU %d.%d, older than what is tested", path, version[0], version[1])
		case slices.Compare(version[:], newest[:]) > 0:
			r.warn("", "%s is QEMU %d.%d, newer than what is tested: what is not known in its stream is kept as it is", path, version[0], version[1])
		default:
			r.ok("%s is QEMU %d.%d", path, version[0], version[1])
		}
	}
	return r.list
}

func executable(path string) bool {
	fi, err := os.Stat(path)
	return err == nil && fi.Mode().IsRegular() && fi.Mode()&0o111 != 0
}

func ask(ctx context.Context, path string) (version [2]int, err error) {
	ctx, cancel := context.WithTimeout(ctx, askTime)
	defer cancel()
	c := exec.CommandContext(ctx, path, "--version")
	c.WaitDelay = time.Second // for a program that leaves a child with its output
	out, err := c.Output()
	if err != nil {
		return version, err
	}
	m := versionLine.FindSubmatch(out)
	if m == nil {
		first, _, _ := strings.Cut(string(out[:min(len(out), 100)]), "\n")
		return version, errors.New("it says " + strconv.Quote(first))
	}
	for i := range version {
		if version[i], err = strconv.Atoi(string(m[1+i])); err != nil {
			return version, err
		}
	}
	return version, nil
}
