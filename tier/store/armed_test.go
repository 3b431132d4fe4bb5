package store

import (
	"context"
	"encoding/json"
	"errors"
	"testing"
	"time"

	"github.com/google/uuid"

	"github.com/flic-migrate/flic-migrate/tier/integrity"
	"github.com/flic-migrate/flic-migrate/tier/vfs"
)

// A note is there as long as its process is, which the lock of its image tells.
func TestArmed(t *testing.T) {
	ctx := context.Background()
	st, err := Open(ctx, vfs.OS, t.TempDir(), true)
	if err != nil {
		t.Fatal(err)
	}
	none := func(what string) {
		t.Helper()
		if a, lives, err := st.ArmedFor(ctx, "vm"); a != nil || lives || err != nil {
			t.Errorf("%s: %v, %v, %v", what, a, lives, err)
		}
	}
	none("at first")
	begin := func() (*Tx, Armed) {
		t.Helper()
		tx, err := st.Begin(ctx, "vm")
		if err != nil {
			t.Fatal(err)
		}
		return tx, Armed{VM: "vm", Part: tx.UUID(), Number: tx.Ref().N, Parent: "vm@1", PID: 1, Control: "/tmp/x/s",
			Target: "--qmp /x", Created: time.Now(), State: json.RawMessage(`{"a":1}`)}
	}
	tx, note := begin()
	if err := st.NoteArmed(ctx, note); err != nil {
		t.Fatal(err)
	}
	a, lives, err := st.ArmedFor(ctx, "vm")
	if err != nil || !lives || a.Part != note.Part || string(a.State) != `{"a":1}` {
		t.Errorf("%+v, %v, %v", a, lives, err)
	}
	other, second := begin()
	defer other.Abort()
	if err := st.NoteArmed(ctx, second); !errors.Is(err, ErrInUse) {
		t.Errorf("a second process: %v", err)
	}
	if err := st.ForgetArmed(ctx, second); err != nil {
		t.Error(err)
	}
	if _, err := st.GC(ctx); err != nil {
		t.Error(err)
	}
	if vms, err := st.Armed(ctx); err != nil || len(vms) != 1 || vms[0] != "vm" {
		t.Errorf("%q, %v", vms, err)
	}
	if _, lives, err = st.ArmedFor(ctx, "vm"); !lives || err != nil {
		t.Errorf("another's forgetting and gc have touched it: %v, %v", lives, err)
	}

	// The process ends without a word.
	if err := tx.Abort(); err != nil {
		t.Fatal(err)
	}
	if a, lives, err = st.ArmedFor(ctx, "vm"); a == nil || lives || err != nil {
		t.Errorf("dead: %v, %v, %v", a, lives, err)
	}
	if err := st.NoteArmed(ctx, second); err != nil {
		t.Errorf("in a dead one's place: %v", err)
	}
	if err := st.ForgetArmed(ctx, note); err != nil {
		t.Error(err)
	}
	if a, _, _ := st.ArmedFor(ctx, "vm"); a == nil || a.Part != second.Part {
		t.Errorf("the note is %+v", a)
	}
	if err := st.ForgetArmed(ctx, second); err != nil {
		t.Error(err)
	}
	none("taken back")

	// gc takes back what nobody else does, damaged or not.
	note.Part = uuid.New()
	if err := st.NoteArmed(ctx, note); err != nil {
		t.Fatal(err)
	}
	if _, err := st.GC(ctx); err != nil {
		t.Error(err)
	}
	none("after gc")
	if err := st.dir.Write(ctx, armedObject("vm"), spare(), []byte("00000000 {}\n")); err != nil {
		t.Fatal(err)
	}
	if _, _, err := st.ArmedFor(ctx, "vm"); !integrity.IsCorrupt(err) {
		t.Errorf("damaged: %v", err)
	}
	if _, err := st.GC(ctx); err != nil {
		t.Error(err)
	}
	none("after gc of a damaged one")
}
