package disk

import (
	"bufio"
	"cmp"
	"context"
	"encoding/binary"
	"io"
	"runtime"
	"slices"
	"sync"
	"sync/atomic"

	"github.com/flic-migrate/flic-migrate/tier/digest"
	"github.com/flic-migrate/flic-migrate/tier/rescue"
	"github.com/flic-migrate/flic-migrate/tier/vfs"
)

// Records are sorted with as much memory as two runs of them take, whatever the disk's
// size: runs are sorted and written one after the other, and merged once.
//
//	records ─► run in memory ─► sorted ─► scratch file, run after run ─► merge ─► leaves
//	                               └───── the only one: no scratch file ────────────┘

// record is a digest, as two numbers that sort as its bytes do, and the block that has it.
type record struct {
	hi, lo uint64
	block  uint32
}

func newRecord(s *digest.Sum, block uint32) record {
	return record{binary.BigEndian.Uint64(s[:8]), binary.BigEndian.Uint64(s[8:]), block}
}

func (r *record) put(b []byte) {
	binary.BigEndian.PutUint64(b, r.hi)
	binary.BigEndian.PutUint64(b[8:], r.lo)
	binary.LittleEndian.PutUint32(b[16:], r.block)
}

func getRecord(b []byte) record {
	return record{binary.BigEndian.Uint64(b), binary.BigEndian.Uint64(b[8:]), binary.LittleEndian.Uint32(b[16:])}
}

func (a *record) compare(b *record) int {
	switch {
	case a.hi != b.hi:
		return cmp.Compare(a.hi, b.hi)
	case a.lo != b.lo:
		return cmp.Compare(a.lo, b.lo)
	}
	return cmp.Compare(a.block, b.block)
}

// sameDigest tells whether both have one content.
func (a *record) sameDigest(b *record) bool { return a.hi == b.hi && a.lo == b.lo }

// bucketBits: so many of a digest's first bits put a record near its place, and what is
// left to sort are some hundred records at a time, which stay in the processor's cache.
const bucketBits = 12

// sortRecords sorts list. Digests are spread evenly, so a first pass by their first bits
// does most of it, and the rest is done on all processors; spare is as long.
func sortRecords(list, spare []record) []record {
	var at [1<<bucketBits + 1]int
	for i := range list {
		at[list[i].hi>>(64-bucketBits)+1]++
	}
	for i := range 1 << bucketBits {
		at[i+1] += at[i]
	}
	ends := at
	for i := range list {
		b := list[i].hi >> (64 - bucketBits)
		spare[ends[b]] = list[i]
		ends[b]++
	}
	var next atomic.Int32
	var alive sync.WaitGroup
	for range runtime.GOMAXPROCS(0) {
		alive.Go(func() {
			for b := next.Add(1) - 1; b < 1<<bucketBits; b = next.Add(1) - 1 {
				slices.SortFunc(spare[at[b]:at[b+1]], func(x, y record) int { return x.compare(&y) })
			}
		})
	}
	alive.Wait()
	return spare[:len(list)]
}

// sorter collects records in any order and gives them back sorted.
type sorter struct {
	limit   int                      // records in a run
	scratch func() (vfs.File, error) // makes the scratch file, at the first run that needs it

	run, spare, other []record
	runs              []int64 // lengths, in records
	file              vfs.File
	writing           chan error // of the run that is being sorted and written; nil: none is
}

// add takes one more record. Its error is that of a run before.
func (s *sorter) add(r record) error {
	if len(s.run) == s.limit {
		if err := s.spill(); err != nil {
			return err
		}
	}
	if s.run == nil {
		s.run = make([]record, 0, s.limit)
	}
	s.run = append(s.run, r)
	return nil
}

// spill sorts and writes the run that is full, while the next one fills.
func (s *sorter) spill() error {
	if err := s.written(); err != nil {
		return err
	}
	if s.file == nil {
		var err error
		if s.file, err = s.scratch(); err != nil {
			return err
		}
	}
	if s.spare == nil {
		s.spare = make([]record, s.limit)
	}
	full := s.run
	s.run, s.other = s.other[:0], nil
	s.runs = append(s.runs, int64(len(full)))
	s.writing = make(chan error, 1)
	go func(done chan<- error) {
		err := rescue.Call(func() error { return writeRecords(s.file, sortRecords(full, s.spare)) })
		s.other = full // for who has received
		done <- err
	}(s.writing)
	return nil
}

// written waits for the run that is being written.
func (s *sorter) written() error {
	if s.writing == nil {
		return nil
	}
	err := <-s.writing
	s.writing = nil
	return err
}

func writeRecords(w io.Writer, list []record) error {
	b := make([]byte, 0, 64<<10)
	for i := range list {
		if len(b)+recordSize > cap(b) {
			if _, err := w.Write(b); err != nil {
				return err
			}
			b = b[:0]
		}
		b = b[:len(b)+recordSize]
		list[i].put(b[len(b)-recordSize:])
	}
	_, err := w.Write(b)
	return err
}

// close gives the scratch file up.
func (s *sorter) close() {
	s.written()
	if s.file != nil {
		s.file.Close()
	}
}

const (
	// mergeMemory is what all runs' buffers take together, in bytes.
	mergeMemory = 16 << 20
	// mergeBuffer is the most that one has.
	mergeBuffer = 256 << 10
)

// each calls fn with all records, in order.
func (s *sorter) each(ctx context.Context, fn func(r *record) error) error {
	if err := s.written(); err != nil {
		return err
	}
	// The one in memory stays there, and is merged as a run of its own.
	if s.spare == nil {
		s.spare = make([]record, len(s.run))
	}
	s.other = nil
	last := sortRecords(s.run, s.spare)
	if len(s.runs) == 0 {
		for i := range last {
			if i%checkEvery == 0 && ctx.Err() != nil {
				return context.Cause(ctx)
			}
			if err := fn(&last[i]); err != nil {
				return err
			}
		}
		return nil
	}
	s.run = nil
	var heads []*runReader
	at := int64(0)
	size := int(min(mergeMemory/int64(len(s.runs)), mergeBuffer)) / recordSize * recordSize
	for _, n := range s.runs {
		r := &runReader{in: bufio.NewReaderSize(io.NewSectionReader(s.file, at*recordSize, n*recordSize), max(size, recordSize))}
		at += n
		heads = append(heads, r)
	}
	heads = append(heads, &runReader{memory: last})
	return merge(ctx, heads, fn)
}

// checkEvery is how many records go by between two looks at the context.
const checkEvery = 1 << 16

// runReader is a run that is being merged.
type runReader struct {
	now    record
	in     *bufio.Reader // nil: memory
	memory []record
}

// next goes to the next record; io.EOF at the end.
func (r *runReader) next() error {
	if r.in == nil {
		if len(r.memory) == 0 {
			return io.EOF
		}
		r.now, r.memory = r.memory[0], r.memory[1:]
		return nil
	}
	b, err := r.in.Peek(recordSize)
	if err != nil {
		if err == io.EOF && len(b) > 0 {
			err = io.ErrUnexpectedEOF
		}
		return err
	}
	r.now = getRecord(b)
	r.in.Discard(recordSize)
	return nil
}

// merge calls fn with the records of all runs, in order. heads is a heap: none is below
// heads[0].
func merge(ctx context.Context, heads []*runReader, fn func(r *record) error) error {
	live := heads[:0]
	for _, h := range heads {
		switch err := h.next(); err {
		case nil:
			live = append(live, h)
		case io.EOF:
		default:
			return err
		}
	}
	for i := len(live)/2 - 1; i >= 0; i-- {
		sift(live, i)
	}
	for n := 0; len(live) > 0; n++ {
		if n%checkEvery == 0 && ctx.Err() != nil {
			return context.Cause(ctx)
		}
		if err := fn(&live[0].now); err != nil {
			return err
		}
		switch err := live[0].next(); err {
		case nil:
		case io.EOF:
			live[0] = live[len(live)-1]
			live = live[:len(live)-1]
		default:
			return err
		}
		sift(live, 0)
	}
	return nil
}

// sift moves the head at i down to its place.
func sift(h []*runReader, i int) {
	for {
		c := 2*i + 1
		if c >= len(h) {
			return
		}
		if c+1 < len(h) && h[c+1].now.compare(&h[c].now) < 0 {
			c++
		}
		if h[i].now.compare(&h[c].now) <= 0 {
			return
		}
		h[i], h[c] = h[c], h[i]
		i = c
	}
}
