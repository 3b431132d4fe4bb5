package tier_test

import (
	"bytes"
	"errors"
	"io"
	"log/slog"
	"os"
	"strings"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"github.com/flic-migrate/flic-migrate/ramparse"
	"github.com/flic-migrate/flic-migrate/stream"
	"github.com/flic-migrate/flic-migrate/stream/pipe"
	"github.com/flic-migrate/flic-migrate/stream/returnpath"
	"github.com/flic-migrate/flic-migrate/tier/save"
	"github.com/flic-migrate/flic-migrate/tier/tiertest"
	"github.com/flic-migrate/flic-migrate/tier/vfs/crashfs"
)

// silentPipe gives what it has and then nothing, without an end, as QEMU 10's end
// does while a cancelled migration waits for us.
type silentPipe struct{ *bytes.Reader }

func (p silentPipe) Ready(d time.Duration) bool {
	if p.Len() == 0 {
		time.Sleep(d)
		return false
	}
	return true
}
func (silentPipe) Capacity() int         { return 64 << 10 }
func (silentPipe) SetCapacity(n int) int { return n }

// TestSilence ends a save whose source falls silent: soon amid the first pass of a
// source that waits for an answer, and in any case.
func TestSilence(t *testing.T) {
	for name, c := range map[string]struct {
		returnPath bool
		share      float64 // of the stream that comes
		want       time.Duration
	}{
		"amid RAM":                      {true, 0.5, 10 * time.Second},
		"before RAM":                    {true, 0.00001, time.Minute},
		"amid the devices":              {true, -1, time.Minute},
		"amid RAM, without return path": {false, 0.5, 10 * time.Minute},
	} {
		t.Run(name, func(t *testing.T) {
			s := tiertest.New(tiertest.Options{ReturnPath: c.returnPath, Blocks: []tiertest.Block{{Name: "m", Size: 4 << 20}}})
			b, layout := s.Bytes(), s.Layout()
			n := int(c.share * float64(len(b)))
			if n == 0 {
				n = int(layout.RAM)
			} else if n < 0 {
				n = int(layout.Tail+layout.EOF) / 2
			}
			l := newLab(t, crashfs.New(0), "/")
			synctest.Test(t, func(t *testing.T) {
				var answers bytes.Buffer
				start := time.Now()
				_, _, err := l.run(t.Context(), silentPipe{bytes.NewReader(b[:n])}, save.Options{VM: "vm", ReturnPath: &answers})
				if !errors.Is(err, save.ErrSilent) || errors.Is(err, stream.ErrTruncated) {
					t.Fatal(err)
				}
				if d := time.Since(start); d < c.want || d > c.want+time.Second {
					t.Errorf("it took %v, want %v", d, c.want)
				}
				if told := bytes.HasSuffix(answers.Bytes(), returnpath.AppendShut(nil, 1)); told != c.returnPath {
					t.Errorf("SHUT with value 1: %v", told)
				}
			})
			nothingLeft(t, l)
		})
	}
}

// TestDeafSource has PINGs without end from a source that reads no answer.
func TestDeafSource(t *testing.T) {
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	defer w.Close()
	out, err := pipe.NewWriter(w)
	if err != nil {
		t.Fatal(err)
	}
	defer out.Close()
	b := stream.AppendConfiguration(stream.AppendHeader(nil), "pc-q35-7.2")
	b = stream.AppendCommand(b, stream.CommandOpenReturnPath, nil)
	ping := stream.AppendCommand(nil, stream.CommandPing, []byte{0, 0, 0, 1})
	in := io.MultiReader(bytes.NewReader(b), &endless{ping, 0})
	l := newLab(t, crashfs.New(0), "/")
	if _, _, err := l.run(t.Context(), in, save.Options{VM: "vm", ReturnPath: deadlineSoon{out}}); !errors.Is(err, os.ErrDeadlineExceeded) {
		t.Fatal(err)
	}
	nothingLeft(t, l)
}

// endless repeats b.
type endless struct {
	b  []byte
	at int
}

func (e *endless) Read(p []byte) (int, error) {
	n := copy(p, e.b[e.at:])
	e.at = (e.at + n) % len(e.b)
	return n, nil
}

// deadlineSoon shortens the deadlines of a Writer, so that the test need not wait.
type deadlineSoon struct{ *pipe.Writer }

func (d deadlineSoon) SetWriteDeadline(t time.Time) error {
	return d.Writer.SetWriteDeadline(time.Now().Add(time.Until(t) / 50))
}

// TestDifferenceToNothing refuses a difference to a page that has not come: ROM is
// not zero in a destination, so it would change what nobody here knows.
func TestDifferenceToNothing(t *testing.T) {
	s := tiertest.New(tiertest.Options{Mix: tiertest.Mix{tiertest.Absent: 1, tiertest.Text: 1}})
	for page := uint64(0); ; page++ {
		absent := s.Kind(0, page) == tiertest.Absent
		at := int(s.Layout().Tail)
		b := stream.AppendPart(nil, 2)
		b = ramparse.AppendXBZRLE(b, "pc.ram", page*4096, []byte{8, 1, 'x'})
		b = ramparse.AppendEOS(b)
		b = stream.AppendFooter(b, 2)
		all := s.Bytes()
		all = append(all[:at:at], append(b, all[at:]...)...)
		l := newLab(t, crashfs.New(0), "/")
		_, _, err := l.run(t.Context(), bytes.NewReader(all), save.Options{VM: "vm"})
		if !absent {
			if err != nil {
				t.Fatalf("a difference to a page that has come: %v", err)
			}
			continue
		}
		if !errors.Is(err, stream.ErrDamaged) || !strings.Contains(err.Error(), "offset") {
			t.Fatalf("a difference to a page that has not come: %v", err)
		}
		nothingLeft(t, l)
		return
	}
}

// deaf is a return path that nobody listens to any more.
type deaf struct{ err error }

func (d deaf) Write([]byte) (int, error) { return 0, d.err }

// A save that is given up because its source has gone says so once: that the source can't
// be told is no news. Another failure to tell it is.
func TestGoneSource(t *testing.T) {
	for err, warns := range map[error]bool{syscall.EPIPE: false, syscall.ECONNRESET: false, os.ErrClosed: false, syscall.EIO: true} {
		s := tiertest.New(tiertest.Options{ReturnPath: true, Blocks: []tiertest.Block{{Name: "m", Size: 1 << 20}}})
		b := s.Bytes()
		l := newLab(t, crashfs.New(0), "/")
		var log bytes.Buffer
		_, _, serr := l.run(t.Context(), bytes.NewReader(b[:len(b)/2]), save.Options{VM: "vm",
			ReturnPath: deaf{&os.PathError{Op: "write", Path: "return path", Err: err}}, Log: slog.New(slog.NewTextHandler(&log, nil))})
		if serr == nil || strings.Contains(log.String(), "WARN") != warns {
			t.Errorf("%v: %v, logged %s", err, serr, log.String())
		}
	}
}
