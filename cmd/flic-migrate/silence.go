package main

import (
	"fmt"
	"io"
	"sync"
	"time"
)

// silentLimit is how long the other end of a transfer may do nothing: a sender reads a whole
// disk before it sends a checkpoint, or what need not be sent again, and a receiver checks all
// that has come.
const silentLimit = 2 * time.Hour

// errSilent: the other end of a transfer does nothing, and may be gone.
var errSilent = fmt.Errorf("nothing has come or gone for %v", silentLimit)

// silence ends a transfer whose other end does nothing while something is waited for: what
// it says, or that it takes what is written. A connection can live on though nobody at its
// other end reads. It is safe for concurrent use.
type silence struct {
	limit time.Duration
	mu    sync.Mutex
	timer *time.Timer
	waits int // that have begun and not ended
}

// newSilence calls end when something was waited for as long as limit, in vain.
func newSilence(limit time.Duration, end func()) *silence {
	s := &silence{limit: limit, timer: time.AfterFunc(limit, end)}
	s.timer.Stop()
	return s
}

// begin says that something is waited for from now on.
func (s *silence) begin() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.waits++
	s.timer.Reset(s.limit)
}

// end says that it has come.
func (s *silence) end() {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.waits--; s.waits == 0 {
		s.timer.Stop()
	}
}

// stop says that nothing is waited for any more.
func (s *silence) stop() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.waits = 0
	s.timer.Stop()
}

// reader is r, whose other end is alive when anything comes.
func (s *silence) reader(r io.Reader) io.Reader { return heard{r, s} }

// writer is w, each of whose writes waits for its other end.
func (s *silence) writer(w io.Writer) io.Writer { return taken{w, s} }

type heard struct {
	io.Reader
	s *silence
}

func (h heard) Read(b []byte) (int, error) {
	n, err := h.Reader.Read(b)
	h.s.mu.Lock()
	defer h.s.mu.Unlock()
	if h.s.waits > 0 {
		h.s.timer.Reset(h.s.limit)
	}
	return n, err
}

type taken struct {
	io.Writer
	s *silence
}

func (t taken) Write(b []byte) (int, error) {
	t.s.begin()
	defer t.s.end()
	return t.Writer.Write(b)
}
