package session

import (
	"sync"
	"time"
)

// armedOwner says who has the QEMU of an armed process, which is who puts it right:
//
//	            borrow            drive            done
//	the process ─────► a command ─────► the driver ────► nobody any more
//	   │  ▲ ▲  gone, late  │                │                  ▲
//	   │  │ └──────────────┘   gone, late   │                  │
//	   │  └─────────────────────────────────┘                  │
//	   └───────────────────── putRight ────────────────────────┘
//
// A command that has borrowed it has the monitor, and may be done without having driven. The
// driver is the one, of all, that has stopped the guest. Commands are told apart by any value
// that can be compared. The zero value is the process's.
type armedOwner struct {
	mu    sync.Mutex // held while QEMU is put right, too
	is    ownership
	by    any           // the command
	over  chan struct{} // closed when that one has it no more
	drove bool          // there has been a driver
	shut  bool          // nobody can drive any more
}

type ownership int

const (
	ownProcess ownership = iota
	ownCommand
	ownDriver
	ownNobody
)

// borrow gives it to a command, which has the monitor; from one that had it before, too, which
// must have let go of that. A driver keeps it.
func (o *armedOwner) borrow(by any) {
	o.mu.Lock()
	defer o.mu.Unlock()
	switch o.is {
	case ownProcess:
		o.is, o.by, o.over = ownCommand, by, make(chan struct{})
	case ownCommand:
		o.by = by
	}
}

// drive makes a command the driver, unless there has been one, or it is too late.
func (o *armedOwner) drive(by any) bool {
	o.mu.Lock()
	defer o.mu.Unlock()
	if o.shut || o.drove || o.is == ownNobody || o.is == ownCommand && o.by != by {
		return false
	}
	if o.is == ownProcess {
		o.over = make(chan struct{})
	}
	o.is, o.by, o.drove = ownDriver, by, true
	return true
}

// done is for a command that has it, and has put QEMU right.
func (o *armedOwner) done(by any) { o.ends(by, ownNobody) }

// gone is for a command that can't do anything any more. It tells whether it was the driver.
func (o *armedOwner) gone(by any) (drove bool) { return o.ends(by, ownProcess) }

func (o *armedOwner) ends(by any, next ownership) (drove bool) {
	o.mu.Lock()
	defer o.mu.Unlock()
	if o.by != by || o.is != ownCommand && o.is != ownDriver {
		return false
	}
	drove = o.is == ownDriver
	close(o.over)
	o.is, o.by = next, nil
	return drove
}

// has tells whether a command has it.
func (o *armedOwner) has(by any) bool {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.by == by
}

// lent tells whether any command has it.
func (o *armedOwner) lent() bool {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.by != nil
}

// wait waits until no command has it, for limit at most: then it is the process's again. It tells
// whether there was a driver that has not put QEMU right: the guest may stand still. There will be
// none afterwards.
func (o *armedOwner) wait(limit time.Duration) (left bool) {
	o.mu.Lock()
	o.shut = true
	over, lent := o.over, o.by != nil
	o.mu.Unlock()
	if lent {
		select {
		case <-over:
		case <-time.After(limit):
			o.mu.Lock()
			by := o.by
			o.mu.Unlock()
			o.gone(by)
		}
	}
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.drove && o.is == ownProcess
}

// putRight does it, if it is the process's to do.
func (o *armedOwner) putRight(do func() error) error {
	o.mu.Lock()
	defer o.mu.Unlock()
	if o.is != ownProcess {
		return nil
	}
	err := do()
	if err == nil {
		o.is = ownNobody
	}
	return err
}
