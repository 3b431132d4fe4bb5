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
	asked, cancel := context.WithTimeout(ctx, time.Second)
	defer cancel()
	var objects []struct {
		Name string `json:"name"`
	}
	if err := x.Execute(asked, "qom-list", map[string]any{"path": "/objects"}, &objects); err != nil {
		return nil
	}
	for _, obj := range objects {
		if id, ok := strings.CutPrefix(obj.Name, markPrefix); ok && id != o.ID {
			return fmt.Errorf("%w, %s", ErrOther, id)
		}
	}
	return nil
}
