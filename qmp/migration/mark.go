package migration

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/flic-migrate/flic-migrate/qmp"
)

// ErrOther: this QEMU's restore is of another checkpoint.
var ErrOther = errors.New("this QEMU is being restored from another checkpoint")

// markPrefix begins the name of the object that says in QEMU what it is restored
// from. QEMU has no place for such a note, and the objects that users make are the
// only ones that can be made and found again through QMP. This one does nothing.
const markPrefix = "flic-restore-"

// mark notes in QEMU what it is restored from, for a Recover of another process.
// A QEMU that can't be marked can be restored.
func (o *ResumeOptions) mark(ctx context.Context, x qmp.Executor) {
	if o.ID != "" {
		_ = x.Execute(ctx, "object-add", map[string]any{"qom-type": "secret", "id": markPrefix + o.ID, "data": "-"}, nil)
	}
}

// originPrefix begins the name of the object that says in QEMU which checkpoint its guest
// goes on from: of all that there are, the one that has most of what its next one will
// have.
const originPrefix = "flic-origin-"

// Origin is the checkpoint, by its UUID, that was noted in a QEMU: the one that its guest
// was restored from, or has been saved as since. It is empty if none was, or if QEMU does
// not say.
func Origin(ctx context.Context, x qmp.Executor) string {
	for _, name := range noted(ctx, x) {
		if id, ok := strings.CutPrefix(name, originPrefix); ok {
			return id
		}
	}
	return ""
}

// NoteOrigin notes a checkpoint in QEMU, in place of what was noted before. It is a hint:
// a QEMU that can't be told does without.
func NoteOrigin(ctx context.Context, x qmp.Executor, id string) {
	NoteNext(ctx, x, Origin(ctx, x), id)
}

// NoteNext is NoteOrigin for who has asked for what was noted before.
func NoteNext(ctx context.Context, x qmp.Executor, was, id string) {
	if was == id {
		return
	}
	ctx, cancel := context.WithTimeout(ctx, noteTime)
	defer cancel()
	var calls []qmp.Call
	if was != "" {
		calls = append(calls, qmp.Call{Command: "object-del", Args: map[string]any{"id": originPrefix + was}})
	}
	qmp.Together(ctx, x, append(calls, qmp.Call{Command: "object-add", Args: map[string]any{"qom-type": "secret", "id": originPrefix + id, "data": "-"}})...)
}

// noteTime is how long a QEMU may take to say what is noted in it.
const noteTime = time.Second

// noted are the names of the objects that were made in a QEMU; none if it does not
// answer.
func noted(ctx context.Context, x qmp.Executor) (names []string) {
	ctx, cancel := context.WithTimeout(ctx, noteTime)
	defer cancel()
	var objects []struct {
		Name string `json:"name"`
	}
	if err := x.Execute(ctx, "qom-list", map[string]any{"path": "/objects"}, &objects); err != nil {
		return nil
	}
	for _, o := range objects {
		names = append(names, o.Name)
	}
	return names
}

// unmark takes the note back.
func (o *ResumeOptions) unmark(ctx context.Context, x qmp.Executor) {
	if o.ID != "" {
		_ = x.Execute(ctx, "object-del", map[string]any{"id": markPrefix + o.ID}, nil)
	}
}

// checkMark finds out whether QEMU is being restored from something else. It takes
// silence for consent: a QEMU whose main loop waits for memory can't be asked.
func (o *ResumeOptions) checkMark(ctx context.Context, x qmp.Executor) error {
	if o.ID == "" {
		return nil
	}
	for _, name := range noted(ctx, x) {
		if id, ok := strings.CutPrefix(name, markPrefix); ok && id != o.ID {
			return fmt.Errorf("%w, %s", ErrOther, id)
		}
	}
	return nil
}
