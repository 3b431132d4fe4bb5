package session

import (
	"errors"
	"net"
	"testing"
	"testing/synctest"
	"time"
)

// A command waits for an armed process for as long as that gives a sign of life, and not much
// longer; for ever for one of an earlier version, which gives none.
func TestArmedHangs(t *testing.T) {
	for name, c := range map[string]struct {
		hello string
		beats int // after that many it hangs
		hangs bool
	}{
		"hangs":   {`{"hello":{"pid":0,"beats":true}}`, 30, true},
		"at once": {`{"hello":{"pid":0,"beats":true}}`, 0, true},
		"earlier": {`{"hello":{"pid":0}}`, 0, false},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				ours, theirs := net.Pipe()
				over := make(chan struct{})
				defer close(over)
				go func() {
					_, _ = theirs.Write([]byte(c.hello + "\n"))
					for range c.beats {
						time.Sleep(beatTime)
						_, _ = theirs.Write([]byte(`{"beat":true}` + "\n"))
					}
					select {
					case <-time.After(time.Hour):
					case <-over:
					}
					_, _ = theirs.Write([]byte(`{"report":{"checkpoint":"vm@1"}}` + "\n"))
					theirs.Close()
				}()
				p := &armedFor{conn: ours}
				ok(t, p.greet(t.Context()))
				silent, other := net.Pipe()
				found := &armedFor{conn: silent, hello: armedHello{Beats: true}}
				if err := found.greet(t.Context()); !errors.Is(err, errArmedHangs) {
					t.Errorf("one that says no hello: %v", err)
				}
				other.Close()
				start := time.Now()
				r, err := p.report(t.Context())
				took := time.Since(start)
				if c.hangs != errors.Is(err, errArmedHangs) || c.hangs == (r != nil) {
					t.Errorf("%+v, %v", r, err)
				}
				if want := time.Duration(c.beats)*beatTime + beatless; c.hangs && (took < beatless || took > want+time.Second) {
					t.Errorf("after %v, want %v", took, want)
				}
				p.close()
			})
		})
	}
}
