package workingset

import (
	"errors"
	"io"
	"iter"
)

// ErrCorrupt is matched by every error of Read that says that the file is not a
// valid working set.
var ErrCorrupt = errors.New("damaged working set")

// CorruptError names the place of a damage. It matches ErrCorrupt.
type CorruptError struct {
	Offset int64
	Reason string
}

// Block is a RAM block's name (QEMU's idstr) and its size in pages.
type Block struct {
	Name  string
	Pages int64
}

// Run is pages [First, First+N) of a block.
type Run struct{ First, N int64 }

// Set is the heat of every page of some RAM blocks: 0 is cold, 255 the hottest.
// Blocks are numbered in the order of New. Reading is safe from several
// goroutines, SetHeat and Merge are not.
type Set struct{}

// New returns a set of cold pages. pageSize is a power of two, in bytes.
func New(pageSize int, blocks []Block) (*Set, error) { return nil, errors.ErrUnsupported }

// PageSize in bytes.
func (s *Set) PageSize() int { return 0 }

// Blocks returns names and sizes by number.
func (s *Set) Blocks() []Block { return nil }

// Bind returns the set as a VM with these blocks sees it: block numbers are
// those of the argument, what the set does not know is cold, what the VM does
// not have is left out. It fails if the page sizes differ. The new set may
// share memory with s, which must not be changed any more.
func (s *Set) Bind(pageSize int, blocks []Block) (*Set, error) { return nil, errors.ErrUnsupported }

// Heat of a page, by block number.
func (s *Set) Heat(block int, page int64) uint8 { return 0 }

// SetHeat sets the heat of a page.
func (s *Set) SetHeat(block int, page int64, heat uint8) {}

// Histogram counts the pages of each heat.
func (s *Set) Histogram() (count [256]int64) { return count }

// Threshold tells which pages are in if only budget fit, hottest first, ties by
// block number and address: all whose heat is above min, and of those whose
// heat is min the first atMin. Cold pages are never in.
func (s *Set) Threshold(budget int64) (min uint8, atMin int64) { return 0, 0 }

// Runs yields the maximal runs of pages with lo <= heat <= hi of a block, in
// rising order.
func (s *Set) Runs(block int, lo, hi uint8) iter.Seq[Run] { return func(func(Run) bool) {} }

// Merge raises each page's heat to that in o, matching blocks by name. Blocks
// that s does not have are added, shorter ones grow.
func (s *Set) Merge(o *Set) error { return errors.ErrUnsupported }

// WriteTo writes the set in the format of docs/format-workingset.md.
func (s *Set) WriteTo(w io.Writer) (int64, error) { return 0, errors.ErrUnsupported }

// Read reads a set up to the end of r. Damage is a CorruptError. Memory grows
// with the bytes really read, not with what a header claims.
func Read(r io.Reader) (*Set, error) { return nil, errors.ErrUnsupported }
