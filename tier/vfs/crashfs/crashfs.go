package crashfs

import (
	"errors"

	"github.com/flic-migrate/flic-migrate/tier/vfs"
)

// ErrKilled is what every operation of a killed process returns.
var ErrKilled = errors.New("process killed")

// Kind is a kind of operation.
type Kind int

const (
	Create Kind = iota
	Mkdir
	Rename // and Replace
	Remove
	SyncDir
	Write // and WriteAt
	Truncate
	Allocate
	Sync
	MapSync // Mapping.Sync
	Lock    // of a lock file or an open file
	Map
	Open
	Read
)

// Op is one operation that a process did, or was about to do when it was killed.
type Op struct {
	Kind Kind
	Name string
}

// FS is one process's view of a simulated disk. The vfs.FS interface is embedded
// here until the implementation replaces it.
type FS struct{ vfs.FS }

// New returns an empty disk of a capacity in bytes (0: no limit), as seen by
// its first process. The root directory is "/"; relative names start there.
func New(capacity int64) *FS { return &FS{} }

// Fork returns another process's view of the same disk: with its own open
// files, locks, operation count and faults. After a kill it is the process that
// comes next and finds everything that was written, synced or not.
func (f *FS) Fork() *FS { return f }

// CrashClone returns a new disk as a power cut would leave this one, which is
// not changed. What survives of the unsynced depends on seed only.
func (f *FS) CrashClone(seed uint64) *FS { return f }

// Kill ends the process now: its locks are released, its mappings detached, and
// every operation returns ErrKilled.
func (f *FS) Kill() {}

// KillAt kills the process at its n-th operation from now (0 is the next one).
// A write may have got half way.
func (f *FS) KillAt(n int) {}

// FailAt makes the n-th operation from now fail with err, once; FailFrom that
// and all later ones of the kinds that can fail so.
func (f *FS) FailAt(n int, err error)   {}
func (f *FS) FailFrom(n int, err error) {}

// ShortWriteAt makes the n-th operation from now, if it is a write, write half
// of its data and then fail with ENOSPC; other operations fail with ENOSPC.
func (f *FS) ShortWriteAt(n int) {}

// Ops is the log of this process's counted operations, reads left out.
func (f *FS) Ops() []Op { return nil }
