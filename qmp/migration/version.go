package migration

import "github.com/flic-migrate/flic-migrate/qmp"

// since tells whether a QEMU is of version major.minor or a later one. Between two
// releases QEMU counts in the third number, from 50 on. One that is not known (all
// zeros) is taken for older.
func since(v qmp.Version, major, minor int) bool {
	q := v.QEMU
	if q.Micro >= 50 {
		q.Minor++
	}
	return q.Major > major || q.Major == major && q.Minor >= minor
}

// NeedsAllPages tells whether a QEMU of this version has to be sent every page of a
// lazy restore before its end, those without content as well; so does one that is
// not known. From 10.2 on the end of a postcopy migration says completed first and
// takes userfaultfd away later, in the main loop and with QEMU's lock held: a page
// that never comes, touched in between by who holds that lock, is waited for for ever.
func NeedsAllPages(v qmp.Version) bool { return v.QEMU.Major == 0 || since(v, 10, 2) }
