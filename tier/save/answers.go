package save

import (
	"io"
	"time"

	"github.com/flic-migrate/flic-migrate/stream/returnpath"
)

// answers is the return path: what a source with that capability is told. Without
// the capability nobody reads there, and nothing may be written.
type answers struct {
	w      io.Writer // nil: there is none
	opened bool      // the source has opened it
}

// answerTime is how long the source may take to read an answer: QEMU has a thread
// for them, and what it does not read fits into the pipe.
const answerTime = 10 * time.Second

// open tells whether there is a return path to open.
func (a *answers) open() bool {
	a.opened = a.w != nil
	return a.opened
}

func (a *answers) pong(value uint32) error { return a.write(returnpath.AppendPong(nil, value)) }

// acknowledge says that the source may stop its guest whenever it likes: there are no
// devices here that have to be ready first.
func (a *answers) acknowledge() error { return a.write(returnpath.AppendSwitchoverAck(nil)) }

// failed says that there will be no checkpoint.
func (a *answers) failed() error { return a.write(returnpath.AppendShut(nil, 1)) }

// done says that the checkpoint is durable. Only a save whose commit has returned
// nil may call it.
func (a *answers) done() error {
	return a.write(returnpath.AppendShut(nil, 0)) // the tree's only "all is well"
}

func (a *answers) write(b []byte) error {
	if !a.opened {
		return nil
	}
	if w, ok := a.w.(interface{ SetWriteDeadline(time.Time) error }); ok {
		if err := w.SetWriteDeadline(time.Now().Add(answerTime)); err != nil {
			return err
		}
	}
	_, err := a.w.Write(b)
	return err
}
