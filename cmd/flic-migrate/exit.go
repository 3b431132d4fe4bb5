package main

import (
	"errors"
	"io/fs"
	"syscall"

	"github.com/flic-migrate/flic-migrate/qmp/libvirt/domain"
	"github.com/flic-migrate/flic-migrate/qmp/migration"
	"github.com/flic-migrate/flic-migrate/qmp/session"
	"github.com/flic-migrate/flic-migrate/stream"
	"github.com/flic-migrate/flic-migrate/tier/disk"
	"github.com/flic-migrate/flic-migrate/tier/integrity"
	"github.com/flic-migrate/flic-migrate/tier/store"
	"github.com/flic-migrate/flic-migrate/tier/transfer"
)

// The exit codes. Scripts rely on them: a number never changes its meaning.
const (
	exitOK       = 0
	exitFailed   = 1
	exitUsage    = 2
	exitNotFound = 3
	exitCorrupt  = 4
	exitStream   = 5
	exitNoSpace  = 6
)

// exitHelp stands at the end of every command's help.
const exitHelp = `Exit codes:
  0  done
  1  failed for another reason than those below
  2  usage: a flag, an environment variable, the configuration file or a name is wrong
  3  not found: the store, the VM, the checkpoint, the domain or a file that was named
  4  corrupt: stored data is damaged
  5  the migration stream on the input is damaged, truncated or none at all
  6  no space left in the store, in the NVRAM file, or on a quota`

// usageError is a mistake of the caller's, found before anything was done.
type usageError struct{ error }

func (e usageError) Unwrap() error { return e.error }

// exitCode is the one place that gives errors their codes. The order matters
// where an error has several causes: a read of a checkpoint that feeds a save
// fails as a stream and as stored data, and it is the latter that must be
// repaired.
func exitCode(err error) int {
	var usage usageError
	var server *session.ServerError
	var armed *session.ArmedError
	var remote *remoteError
	var migration *migration.Error
	switch {
	case err == nil:
		return exitOK
	case errors.As(err, &server):
		return foreignCode(server.Server.ExitCode)
	case errors.As(err, &armed):
		return foreignCode(armed.ExitCode)
	case errors.As(err, &remote):
		return foreignCode(remote.ExitCode)
	case errors.As(err, &usage), errors.Is(err, store.ErrName), errors.Is(err, store.ErrInside):
		return exitUsage
	case errors.Is(err, errDamaged), integrity.IsCorrupt(err):
		return exitCorrupt
	case errors.Is(err, syscall.ENOSPC), errors.Is(err, syscall.EDQUOT):
		return exitNoSpace
	case errors.Is(err, store.ErrNotFound), errors.Is(err, session.ErrNotArmed), errors.Is(err, domain.ErrNotFound), errors.Is(err, disk.ErrNoIndex), errors.Is(err, fs.ErrNotExist):
		return exitNotFound
	case errors.As(err, &migration):
		// QEMU has broken off the stream; it has the reason.
		return exitFailed
	case errors.Is(err, stream.ErrTruncated), errors.Is(err, stream.ErrDamaged), errors.Is(err, stream.ErrNotStream),
		errors.Is(err, transfer.ErrTruncated), errors.Is(err, transfer.ErrDamaged), errors.Is(err, transfer.ErrNotStream):
		return exitStream
	}
	return exitFailed
}

// foreignCode is the code of a failure in another process, which may be another version's or
// somebody else's: 0 or 256 of it would end this one as if all were done.
func foreignCode(code int) int {
	if code < exitFailed || code > exitNoSpace {
		return exitFailed
	}
	return code
}

// errDamaged is verify's result when it found damage; each piece of it has
// been printed by then.
var errDamaged = errors.New("stored data is damaged")
