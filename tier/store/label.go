package store

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"slices"
	"strings"
	"unicode"
	"unicode/utf8"

	"github.com/flic-migrate/flic-migrate/tier/integrity"
)

// Label is what users say of a checkpoint. It lies beside the image, stays with NAME@N when
// that is flattened, and goes when that is removed.
type Label struct {
	Tags []string `json:"tags,omitempty"` // in order, each once
	Note string   `json:"note,omitempty"`
}

const (
	// MaxTags is how many tags a checkpoint can have.
	MaxTags = 64
	maxTag  = 64      // bytes
	maxNote = 4 << 10 // bytes
)

// CheckTag tells whether s can be a tag: 1 to 64 bytes of printable UTF-8 without spaces
// and commas, which stand between tags, and not beginning with '-'.
func CheckTag(s string) error {
	why := ""
	switch {
	case s == "":
		why = "it is empty"
	case len(s) > maxTag:
		why = fmt.Sprintf("it has %d bytes, and %d are the most", len(s), maxTag)
	case !utf8.ValidString(s):
		why = "it is not UTF-8"
	case s[0] == '-':
		why = "it begins with -"
	case strings.ContainsAny(s, ", "):
		why = "it has a comma or a space in it"
	case strings.ContainsFunc(s, func(r rune) bool { return !unicode.IsPrint(r) }):
		why = "it has a character in it that can't be printed"
	default:
		return nil
	}
	return fmt.Errorf("tag %q: %w: %s", s, ErrName, why)
}

// CheckNote tells whether s can be a note: at most 4 KiB of UTF-8, in lines that can be
// printed.
func CheckNote(s string) error {
	why := ""
	switch {
	case len(s) > maxNote:
		why = fmt.Sprintf("it has %d bytes, and %d are the most", len(s), maxNote)
	case !utf8.ValidString(s):
		why = "it is not UTF-8"
	case strings.ContainsFunc(s, func(r rune) bool { return !unicode.IsPrint(r) && r != '\n' && r != '\t' }):
		why = "it has a character in it that can't be printed"
	default:
		return nil
	}
	return fmt.Errorf("note: %w: %s", ErrName, why)
}

// check refuses what SetLabel does not store.
func (l *Label) check() error {
	if len(l.Tags) > MaxTags {
		return fmt.Errorf("tags: %w: there are %d, and %d are the most", ErrName, len(l.Tags), MaxTags)
	}
	for i, t := range l.Tags {
		if err := CheckTag(t); err != nil {
			return err
		}
		if i > 0 && l.Tags[i-1] >= t {
			return fmt.Errorf("tags: %w: they are not in order", ErrName)
		}
	}
	return CheckNote(l.Note)
}

// Label returns what users have said of a checkpoint; the zero Label if nobody has said
// anything. It takes no lock.
func (s *Store) Label(ctx context.Context, r Ref) (Label, error) {
	var l Label
	name := r.object(labelSuffix)
	err := s.readSealed(ctx, name, "tags and note", maxSealed, &l)
	if gone(err) {
		return Label{}, nil
	}
	if err == nil {
		if err = l.check(); err != nil {
			err = &integrity.CorruptError{File: s.dir.Path(name), What: "tags and note", Err: err}
		}
	}
	if err != nil {
		return Label{}, err
	}
	return l, nil
}

// ChangeLabel changes what users say of a checkpoint; r without a number is the VM's newest.
// It is durable when it returns. What was there and can't be read is replaced: lost tells
// why it is lost.
func (s *Store) ChangeLabel(ctx context.Context, r Ref, change func(*Label)) (at Ref, now Label, lost, err error) {
	unlock, err := s.lock(ctx)
	if err != nil {
		return r, now, nil, err
	}
	defer unlock()
	if r, err = s.Resolve(ctx, r); err != nil {
		return r, now, nil, err
	}
	if now, err = s.Label(ctx, r); integrity.IsCorrupt(err) {
		lost, err = err, nil
	}
	if err != nil {
		return r, now, nil, err
	}
	change(&now)
	slices.Sort(now.Tags)
	now.Tags = slices.Compact(now.Tags)
	if err := now.check(); err != nil {
		return r, now, nil, err
	}
	name := r.object(labelSuffix)
	if !now.empty() {
		return r, now, lost, s.writeSealed(ctx, name, now)
	}
	if err := s.dir.Remove(ctx, name); err != nil && !gone(err) {
		return r, now, lost, err
	}
	return r, now, lost, s.dir.Sync(ctx, vmFolder(r.VM))
}

func (l *Label) empty() bool { return len(l.Tags) == 0 && l.Note == "" }

// clearBeside removes what lies beside an image that is to come: of one under this number that
// somebody has removed by hand, or that a killed receiver had not brought in. If there is an
// image it is that one's (fs.ErrExist). The caller holds the store lock.
func (s *Store) clearBeside(ctx context.Context, r Ref) (err error) {
	name := r.object(imageSuffix)
	f, err := s.dir.Open(ctx, name, Unlocked)
	if err == nil {
		f.Close()
	}
	if err == nil || errors.Is(err, errNotObject) {
		return &fs.PathError{Op: "commit", Path: s.dir.Path(name), Err: fs.ErrExist}
	}
	if !gone(err) {
		return err
	}
	err = nil
	for _, suffix := range []string{labelSuffix, touchedSuffix, lentSuffix} {
		if rerr := s.dir.Remove(ctx, r.object(suffix)); !gone(rerr) {
			err = errors.Join(err, rerr)
		}
	}
	return err
}

// dropBeside removes what lies beside the image of a checkpoint that is gone: without the
// image it is nothing to anybody. What can't be removed gc will. The caller holds the store
// lock.
func (s *Store) dropBeside(ctx context.Context, r Ref, o vmObjects) (err error) {
	for suffix, numbers := range o.beside {
		if slices.Contains(numbers, r.N) {
			if rerr := s.dir.Remove(ctx, r.object(suffix)); !gone(rerr) {
				err = errors.Join(err, rerr)
			}
		}
	}
	return err
}
