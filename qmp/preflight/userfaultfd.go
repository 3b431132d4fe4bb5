package preflight

import (
	"errors"
	"fmt"
	"os"
	"strings"

	"golang.org/x/sys/unix"
)

// ErrUserfaultfd: a QEMU of this user may not use userfaultfd.
var ErrUserfaultfd = errors.New("QEMU can't restore lazily: it may not use userfaultfd (set sysctl vm.unprivileged_userfaultfd=1, or, with QEMU 8.1 or later, give its user /dev/userfaultfd)")

// OwnUserfaultfd tells why a process of this user may not use userfaultfd, by trying; QEMU
// may be one.
func OwnUserfaultfd() error {
	fd, _, errno := unix.Syscall(unix.SYS_USERFAULTFD, unix.O_CLOEXEC|unix.O_NONBLOCK, 0, 0)
	if errno == 0 {
		return unix.Close(int(fd))
	}
	return fmt.Errorf("userfaultfd: %w: QEMU can't restore lazily (set sysctl vm.unprivileged_userfaultfd=1, or, with QEMU 8.1 or later, give it /dev/userfaultfd, or CAP_SYS_PTRACE)", errno)
}

const (
	userfaultfdSysctl = "/proc/sys/vm/unprivileged_userfaultfd"
	userfaultfdDevice = "/dev/userfaultfd"
)

// Userfaultfd tells, before a QEMU of the user uid is started, whether it surely may not
// use userfaultfd: then starting it for a lazy restore would be in vain. QEMUs of
// libvirt's have no capabilities, unless they are root's; of those nothing is said.
func Userfaultfd(uid int) error { return userfaultfd(uid, userfaultfdSysctl, userfaultfdDevice) }

func userfaultfd(uid int, sysctl, device string) error {
	b, err := os.ReadFile(sysctl)
	if err != nil || strings.TrimSpace(string(b)) != "0" || uid == 0 {
		return nil // it is allowed, or the kernel is older than 5.2 and allows it
	}
	var st unix.Stat_t
	if err := unix.Stat(device, &st); err == nil {
		// Group and others: who is in the group is not looked up, and what an ACL
		// allows shows in the group's bits (acl(5)).
		if int(st.Uid) == uid || st.Mode&0o066 != 0 {
			return nil
		}
	} else if !errors.Is(err, unix.ENOENT) {
		return nil
	}
	return fmt.Errorf("%w: it is user %d's", ErrUserfaultfd, uid)
}
