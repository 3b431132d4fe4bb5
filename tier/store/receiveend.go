package store

import (
	"io"

	"github.com/flic-migrate/flic-migrate/tier/checkpoint"
	"github.com/flic-migrate/flic-migrate/tier/image"
)

// An image in this store is what it was in the other one but for its end: IDENTITY says what it
// is called here, and if its hot pages go to an NVRAM file here its NVRAM frames name the
// extents. All readers before the commit see it so through an overlay:
//
//	.staged   │ header, segments, … │ NVRAM frames │ META │ INDEX, IDENTITY, footer │ pages
//	renamed   │ as staged           │ frames       │      │ end                     │
//
// settle writes frames and end into the file, when everything was verified.

// renamed is an image with another end, and perhaps other NVRAM frames.
type renamed struct {
	Object
	at     int64
	end    []byte
	frames []rewritten
}

// rewritten is a frame in the place of another.
type rewritten struct {
	at int64
	b  []byte
}

func (f *renamed) Size() (int64, error) { return f.at + int64(len(f.end)), nil }

// Close leaves the object to who has opened it.
func (f *renamed) Close() error { return nil }

func (f *renamed) ReadAt(b []byte, off int64) (n int, err error) {
	if off < f.at {
		n = int(min(int64(len(b)), f.at-off))
		if n, err = f.Object.ReadAt(b[:n], off); err != nil {
			return n, err
		}
		for _, w := range f.frames {
			if from := max(w.at, off); from < min(w.at+int64(len(w.b)), off+int64(n)) {
				copy(b[from-off:n], w.b[from-w.at:])
			}
		}
		if n == len(b) {
			return n, nil
		}
	}
	if off+int64(n) >= f.at+int64(len(f.end)) && len(b) > n {
		return n, io.EOF
	}
	m := copy(b[n:], f.end[off+int64(n)-f.at:])
	if n += m; n < len(b) {
		err = io.EOF
	}
	return n, err
}

// limited is the image at the beginning of what was staged: behind it are pages.
type limited struct {
	Object
	n int64
}

func (f limited) Size() (int64, error) { return f.n, nil }

func (f limited) ReadAt(b []byte, off int64) (int, error) {
	return io.NewSectionReader(f.Object, 0, f.n).ReadAt(b, off)
}

// keepNVRAM has the image own in NVRAM what it owns already as an image of this store, in
// the extents that this one names: another store's copy of it may be in others.
func (i *received) keepNVRAM(im *image.Image, part *checkpoint.NVRAMPart, old *image.Image, was *checkpoint.Identity) error {
	if i.id.NVRAM == nil || !was.InNVRAM() || was.NVRAM.Slots != i.id.NVRAM.Slots {
		return nil
	}
	here, err := checkpoint.ReadPart(old, was)
	if err != nil {
		return err
	}
	i.id.NVRAM = was.NVRAM
	return i.inExtents(im, part, here.Extents)
}

// inExtents has the image name other extents for the same slots.
func (i *received) inExtents(im *image.Image, part *checkpoint.NVRAMPart, extents []uint32) error {
	i.end.frames = nil
	now := checkpoint.NVRAMPart{Extents: extents, Slots: part.Slots}
	return im.Rewritten(image.NVRAM, now.Append(nil), func(off int64, frame []byte) error {
		i.end.frames = append(i.end.frames, rewritten{off, frame})
		return nil
	})
}

// rename gives the image its IDENTITY.
func (i *received) rename(t *image.Tail) error {
	doc, err := i.id.Document()
	if err == nil {
		i.end.at, i.end.end, err = t.Renamed(doc)
	}
	return err
}
