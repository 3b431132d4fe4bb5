package session

import (
	"errors"
	"testing"
	"testing/synctest"
	"time"
)

// TestArmedOwner: there is one at each time who puts QEMU right, whatever the order in which
// commands come and go.
func TestArmedOwner(t *testing.T) {
	refused := errors.New("not now")
	for name, c := range map[string]struct {
		steps func(t *testing.T, o *armedOwner)
		left  bool // what wait says
		after ownership
	}{
		"nobody comes":              {func(*testing.T, *armedOwner) {}, false, ownProcess},
		"one looks and goes":        {func(_ *testing.T, o *armedOwner) { o.gone("a") }, false, ownProcess},
		"one has it":                {func(_ *testing.T, o *armedOwner) { o.borrow("a") }, false, ownProcess},
		"one has had it":            {func(_ *testing.T, o *armedOwner) { o.borrow("a"); o.gone("a") }, false, ownProcess},
		"another one has it by now": {func(_ *testing.T, o *armedOwner) { o.borrow("a"); o.borrow("b"); o.gone("a") }, false, ownProcess},
		"another one looks":         {func(_ *testing.T, o *armedOwner) { o.borrow("a"); o.gone("b") }, false, ownProcess},
		"driven": {func(t *testing.T, o *armedOwner) {
			o.borrow("a")
			if !o.drive("a") {
				t.Error("it can't drive")
			}
			o.done("a")
		}, false, ownNobody},
		"put right by who had it": {func(_ *testing.T, o *armedOwner) { o.borrow("a"); o.done("a"); o.gone("a") }, false, ownNobody},
		"the driver is gone": {func(t *testing.T, o *armedOwner) {
			o.borrow("a")
			o.drive("a")
			if !o.gone("a") {
				t.Error("it has not driven")
			}
		}, true, ownProcess},
		"the driver takes too long": {func(_ *testing.T, o *armedOwner) { o.borrow("a"); o.drive("a") }, true, ownProcess},
		"nobody but the driver": {func(t *testing.T, o *armedOwner) {
			o.borrow("a")
			o.drive("a")
			o.borrow("b")
			o.done("b")
			if o.drive("b") || o.drive("a") || o.gone("b") {
				t.Error("there are two drivers")
			}
			ok(t, o.putRight(func() error { return refused }))
		}, true, ownProcess},
		"another one's to drive": {func(t *testing.T, o *armedOwner) {
			o.borrow("a")
			if o.drive("b") {
				t.Error("it drives what another one has")
			}
		}, false, ownProcess},
		"a second driver": {func(t *testing.T, o *armedOwner) {
			o.drive("a")
			o.gone("a")
			if o.borrow("b"); o.drive("b") {
				t.Error("it drives")
			}
		}, true, ownProcess},
		"put right": {func(t *testing.T, o *armedOwner) {
			if err := o.putRight(func() error { return refused }); err != refused || o.is != ownProcess {
				t.Error(err, o.is)
			}
			ok(t, o.putRight(func() error { return nil }))
			ok(t, o.putRight(func() error { return refused }))
			if o.borrow("a"); o.drive("a") {
				t.Error("it drives what has ended")
			}
		}, false, ownNobody},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				o := new(armedOwner)
				c.steps(t, o)
				if l := o.wait(time.Minute); l != c.left || o.is != c.after {
					t.Errorf("left: %v; it is %v's, want %v", l, o.is, c.after)
				}
				if o.drive("late") {
					t.Error("it drives when all is over")
				}
			})
		})
	}
}

// TestArmedOwnerWaits: the end waits for who has it, and what is put right is nobody's meanwhile.
func TestArmedOwnerWaits(t *testing.T) {
	for _, has := range []func(*armedOwner){func(o *armedOwner) { o.drive("a") }, func(o *armedOwner) { o.borrow("a") }} {
		synctest.Test(t, func(t *testing.T) {
			o := new(armedOwner)
			has(o)
			begun := time.Now()
			time.AfterFunc(time.Second, func() { o.done("a") })
			if o.wait(time.Minute) || time.Since(begun) != time.Second || o.is != ownNobody {
				t.Errorf("after %v it is %v's", time.Since(begun), o.is)
			}
		})
	}
	o := new(armedOwner)
	putting, let := make(chan struct{}), make(chan struct{})
	done := make(chan error)
	go func() { done <- o.putRight(func() error { close(putting); <-let; return nil }) }()
	<-putting
	borrowed := make(chan struct{})
	go func() { defer close(borrowed); o.borrow("a") }()
	select {
	case <-borrowed:
		t.Error("it was given away while it was put right")
	case <-time.After(20 * time.Millisecond):
	}
	close(let)
	ok(t, <-done)
	<-borrowed
	if o.is != ownNobody {
		t.Error(o.is)
	}
}
