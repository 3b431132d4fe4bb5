package crashfs

import (
	"errors"
	"fmt"
	"slices"
	"syscall"
)

// Kind is a kind of operation.
type Kind int

// Open and Read (ReadAt, Size, Stat, ReadDir, StatFS) are counted apart from the
// others, for FailReadAt: killing a process at a read tells nothing that killing
// it at the next change does not.
const (
	Create Kind = iota
	Mkdir
	Rename // and Replace; the name is the new one
	Link   // likewise
	Remove
	SyncDir
	Write // and WriteAt
	Truncate
	Allocate
	Punch
	Sync
	MapSync // Mapping.Sync
	Lock    // of a lock file or an open file, each try
	Map
	Clone
	SetTime // of an open file
	Open
	Read
)

var kindNames = [...]string{"create", "mkdir", "rename", "link", "remove", "fsync of directory", "write", "truncate",
	"fallocate", "punch", "fsync", "msync", "lock", "mmap", "clone", "utimens", "open", "read"}

func (k Kind) String() string { return kindNames[k] }

// Op is one operation that a process did or tried.
type Op struct {
	Kind Kind
	Name string
}

func (o Op) String() string { return fmt.Sprintf("%s of %s", o.Kind, o.Name) }

// faults is what is going to go wrong for one process. Counts run down to 0.
type faults struct {
	killed bool
	log    []Op
	armed  []*armed
}

// armed is one fault to come: at operation `in` from now, once, or on if sticky.
type armed struct {
	in     int
	reads  bool
	sticky bool
	short  bool // a write gets half way
	err    error
}

// shortWrite is a fault that lets a part of a write through.
type shortWrite struct{ err error }

func (s shortWrite) Error() string { return s.err.Error() }

func (f *FS) arm(a armed) {
	f.d.mu.Lock()
	defer f.d.mu.Unlock()
	f.faults.armed = append(f.faults.armed, &a)
}

// KillAt kills the process at its n-th change from now; 0 is the next. A write
// then may have got half way, to the end of some page of the file; anything else
// has not been done.
func (f *FS) KillAt(n int) { f.arm(armed{in: n, short: true, err: ErrKilled}) }

// FailAt makes the n-th change from now fail with err, once.
func (f *FS) FailAt(n int, err error) { f.arm(armed{in: n, err: err}) }

// FailFrom makes the n-th change from now and all later ones fail with err. With
// ENOSPC it spares those that need no space: removals, locks, mappings, syncs
// of directories.
func (f *FS) FailFrom(n int, err error) { f.arm(armed{in: n, sticky: true, err: err}) }

// ShortWriteAt makes the n-th change from now fail with ENOSPC, once; if it is a
// write, half of its data is written.
func (f *FS) ShortWriteAt(n int) { f.arm(armed{in: n, short: true, err: syscall.ENOSPC}) }

// FailReadAt makes the n-th read or open from now fail with err, once.
func (f *FS) FailReadAt(n int, err error) { f.arm(armed{in: n, reads: true, err: err}) }

// Heal disarms all faults that have not struck yet, and those that strike again
// and again. It does not raise the dead.
func (f *FS) Heal() {
	f.d.mu.Lock()
	defer f.d.mu.Unlock()
	f.faults.armed = nil
}

// Ops is the log of the process's changes. Its length is the n of the next one.
func (f *FS) Ops() []Op {
	f.d.mu.Lock()
	defer f.d.mu.Unlock()
	return slices.Clone(f.faults.log)
}

// Killed tells if the process is dead.
func (f *FS) Killed() bool {
	f.d.mu.Lock()
	defer f.d.mu.Unlock()
	return f.faults.killed
}

// begin counts an operation and returns the error that it is to fail with. The
// disk is locked.
func (f *FS) begin(kind Kind, name string) error {
	ft := &f.faults
	if ft.killed {
		return ErrKilled
	}
	reads := kind == Open || kind == Read
	if !reads {
		ft.log = append(ft.log, Op{kind, name})
	}
	var hit *armed
	for _, a := range ft.armed {
		if a.reads != reads {
			continue
		}
		a.in--
		if a.in == -1 && !a.sticky || a.in < 0 && a.sticky && needs(kind, a.err) {
			hit = a
		}
	}
	ft.armed = slices.DeleteFunc(ft.armed, func(a *armed) bool { return a.in < 0 && !a.sticky })
	if hit == nil {
		return nil
	}
	if hit.err == ErrKilled {
		f.kill()
	}
	if hit.short && kind == Write {
		return shortWrite{hit.err}
	}
	return hit.err
}

// needs tells if an operation can fail with err for good.
func needs(kind Kind, err error) bool {
	if !errors.Is(err, syscall.ENOSPC) {
		return true
	}
	switch kind {
	case Remove, SyncDir, Lock, Map, SetTime:
		return false
	}
	return true
}
