package session

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"time"

	"github.com/flic-migrate/flic-migrate/qmp/migration"
	"github.com/flic-migrate/flic-migrate/tier/rescue"
	"github.com/flic-migrate/flic-migrate/tier/store"
)

// ResumeMember is one VM of a group that is resumed.
type ResumeMember struct {
	Member
	Checkpoint *store.Checkpoint // held open by the caller
	Options    ResumeOptions
}

// GroupResumeReport is what the resume of a group did.
type GroupResumeReport struct {
	// Running is how long it took until all guests could run, of those that are to run at
	// once; Resident until all memory of all of them was there.
	Running  time.Duration    `json:"running_ns"`
	Resident time.Duration    `json:"resident_ns"`
	Members  []GroupResumeRow `json:"members"`
}

// GroupResumeRow is a member's report.
type GroupResumeRow struct {
	VM         string `json:"vm"`
	Checkpoint string `json:"checkpoint"` // NAME@N
	Error      string `json:"error,omitempty"`
	ResumeReport
}

// ResumeGroup restores the members of a group beside one another. No guest runs before all
// can:
//
//	member 1  connect, check, load what it needs first ─┐      ┌─ cont, the rest of its memory
//	member 2  connect, check, load what it needs first ─┴ meet ┴─ cont, the rest of its memory
//
// If one can't be resumed, the others stay paused, with all of their memory in the end. A
// domain runs as soon as libvirt lets it, which waits for nobody.
func ResumeGroup(ctx context.Context, st *store.Store, members []ResumeMember) (rep GroupResumeReport, err error) {
	start := time.Now()
	rep.Members = make([]GroupResumeRow, len(members))
	ready := newMeeting(len(members))
	waiting, giveUp := context.WithCancelCause(ctx)
	defer giveUp(nil)
	var mu sync.Mutex
	errs := make([]error, len(members))
	var all sync.WaitGroup
	for i, m := range members {
		row := &rep.Members[i]
		row.VM, row.Checkpoint = m.VM, m.Checkpoint.Ref.String()
		o := m.Options
		running := o.Running
		// Once: a server that dies meanwhile is followed by another, and all is done again.
		come := sync.OnceFunc(ready.come)
		o.Running = func(r migration.ResumeReport) {
			mu.Lock()
			rep.Running = max(rep.Running, time.Since(start))
			mu.Unlock()
			if m.Target.Domain != "" {
				come()
			}
			if running != nil {
				running(r)
			}
		}
		o.ready = func(ctx context.Context) error {
			ctx, cancel := context.WithCancelCause(ctx)
			defer cancel(nil)
			stop := context.AfterFunc(waiting, func() { cancel(context.Cause(waiting)) })
			defer stop()
			come()
			return ready.wait(ctx)
		}
		all.Go(func() {
			errs[i] = rescue.Call(func() (err error) {
				row.ResumeReport, err = Resume(ctx, m.Target, st, m.Checkpoint, o)
				return err
			})
			if errs[i] != nil {
				giveUp(&MemberError{m.VM, errs[i]})
				return
			}
			come() // who has all of its memory keeps nobody waiting, whatever it has said
		})
	}
	all.Wait()
	rep.Resident = time.Since(start)
	for i, e := range errs {
		if e != nil {
			rep.Members[i].Error = e.Error()
			err = errors.Join(err, &MemberError{members[i].VM, e})
		}
	}
	if err != nil {
		err = fmt.Errorf("the group was not resumed as a whole: %w", err)
	}
	return rep, err
}
