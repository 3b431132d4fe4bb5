package store

import (
	"context"
	"encoding/binary"
	"errors"
	"slices"
	"strings"
	"time"

	"github.com/google/uuid"

	"github.com/flic-migrate/flic-migrate/tier/checkpoint"
	"github.com/flic-migrate/flic-migrate/tier/integrity"
	"github.com/flic-migrate/flic-migrate/tier/vfs"
)

// A VM's summary is who its images say they are, all in one object, so that a look at a
// thousand checkpoints does not open a thousand files:
//
//	summaries/VM
//	    "flicsum\n"; u32 version, u32 CompactVersion; u32 entries; u32 the highest number
//	    of a listed image, in it or not; u32 CRC-32C of all before
//	    for each entry:
//	        u16 length of the object's name in the VM's folder; u32 length of the identity
//	        Stamp: i64 size, mtime, ctime; u64 inode
//	        the name; the identity, as Identity.AppendCompact has it
//	    u32 CRC-32C of all after the first
//
// all little-endian, the entries in the order of their names. It is a cache. An entry counts
// only while the file has the Stamp
// that it had when it was read, so that it can be old, lost, damaged, torn or another
// store's at any time, and no lock is needed to write it: of two that are written at a
// time either is good. Images are never changed but for what is given back of unlisted
// ones, and IDENTITY stays; whoever changes one by hand changes its Stamp.
//
// list reads it; rm, gc and saves bring it up to date when too many of the VM's images
// are not in it, so that each does so seldom, and only that often is a thousand's worth
// of work done.
//
// Each of list, rm and gc looks once at all files of a VM, which is most of what they take
// for each checkpoint there. rm and gc, under the store lock, list the folder once
// more, for what has come since; of listed images that were looked at before no other can
// have taken the name, as survey has it.

const (
	summaryMagic   = "flicsum\n"
	summaryVersion = 2
	summaryHead    = 28
	summaryEntry   = 38
	// maxSummary caps the object in bytes: an identity takes 1 KB as a rule.
	maxSummary = 256 << 20
	// summaryLag is how many images may be missing in a summary, or in it and not be
	// there any more, besides 1/summaryLag of all.
	summaryLag = 16
	// youngFile is how old the last change of a file must be for its Stamp to be kept:
	// within a tick of the clock, 10 ms at most, another change would leave the same.
	youngFile = 50 * time.Millisecond
)

func summaryObject(vm string) string { return summaryFolder + "/" + vm }

// lookup tells who images say they are, and reads of each image what it has to once at
// the most, and nothing of those that the summaries know. It is one goroutine's.
type lookup struct {
	s   *Store
	vms map[string]*summary // by VM, once it was looked at
	// held is set while the caller holds the store lock, under which names don't change, but
	// by the caller: the VMs whose folders were listed since.
	held map[string]bool
}

// summary is what is known of one VM's images.
type summary struct {
	objects vmObjects // what was in the folder at the last look
	files   []seen    // and the files, in the order of their names
	next    int       // the place behind the one found last: who asks does so in order, as a rule
	entries int       // of the summary object
	dead    int       // those of them that were no file's at the last look
}

// seen is a file in a VM's folder.
type seen struct {
	name   string
	stamp  vfs.Stamp // at the last look; zero: it has not been looked at
	stored checkpoint.Compact
	id     *checkpoint.Identity // nil: not read, nor taken from stored
}

func (f *seen) looked() bool { return f.stamp != vfs.Stamp{} }

func (s *Store) lookup() *lookup { return &lookup{s: s, vms: make(map[string]*summary)} }

// lock takes the store lock. Until unlock is called again lists each folder once at most.
func (l *lookup) lock(ctx context.Context) (unlock func(), err error) {
	free, err := l.s.lock(ctx)
	if err != nil {
		return nil, err
	}
	l.held = make(map[string]bool)
	return func() { l.held = nil; free() }, nil
}

// eachVM is Store.eachVM, which looks at the files too.
func (l *lookup) eachVM(ctx context.Context, only string, fn func(vm string, o vmObjects) error) error {
	return l.s.eachVMBy(ctx, only, l.objects, fn)
}

// eachVMAgain is eachVM of all VMs, which lists the folders and looks at few files: see again.
func (l *lookup) eachVMAgain(ctx context.Context, fn func(vm string, o vmObjects) error) error {
	return l.s.eachVMBy(ctx, "", l.again, fn)
}

// eachVMSeen is eachVM of all VMs, of which those are as they were that have been looked at.
func (l *lookup) eachVMSeen(ctx context.Context, fn func(vm string, o vmObjects) error) error {
	return l.s.eachVMBy(ctx, "", func(ctx context.Context, vm string) (vmObjects, error) {
		if sum := l.vms[vm]; sum != nil {
			return sum.objects, nil
		}
		return l.objects(ctx, vm)
	}, fn)
}

// objects is Store.objects, and from then on what is known counts as far as the files are
// what they are now.
func (l *lookup) objects(ctx context.Context, vm string) (vmObjects, error) {
	return l.look(ctx, vm, nil)
}

// again is objects for a folder that was looked at not long ago. It asks for the Stamps of
// unlisted images, which can have been emptied or have taken another's name, and of what has
// come since. Listed images are what they were: see survey.
func (l *lookup) again(ctx context.Context, vm string) (vmObjects, error) {
	sum := l.vms[vm]
	if sum == nil {
		return l.objects(ctx, vm)
	}
	if l.held[vm] {
		return sum.objects, nil
	}
	return l.look(ctx, vm, func(name string) bool {
		if !strings.HasSuffix(name, imageSuffix) {
			return true
		}
		f := sum.find(name)
		return f == nil || !f.looked()
	})
}

// look looks at those files of a VM that are wanted, or at all.
func (l *lookup) look(ctx context.Context, vm string, want func(name string) bool) (vmObjects, error) {
	list, err := l.s.dir.Look(ctx, vmFolder(vm), want)
	if err != nil && !gone(err) {
		return vmObjects{}, err
	}
	sum := l.vms[vm]
	if sum == nil {
		sum = &summary{files: l.s.readSummary(ctx, vm)}
		sum.entries = len(sum.files)
		l.vms[vm] = sum
	}
	sum.dead = sum.entries
	files := make([]seen, 0, len(list))
	was := sum.files // both are in the order of names
	for _, e := range list {
		if e.Folder || e.Odd {
			continue
		}
		for len(was) > 0 && was[0].name < e.Name {
			was = was[1:]
		}
		f := seen{name: e.Name, stamp: e.Stamp}
		if len(was) > 0 && was[0].name == e.Name && (!f.looked() || was[0].stamp == f.stamp) {
			f = was[0]
		}
		if f.stored != nil {
			sum.dead--
		}
		files = append(files, f)
	}
	sum.objects, sum.files, sum.next = objectsOf(vm, list), files, 0
	if l.held != nil {
		l.held[vm] = true
	}
	return sum.objects, nil
}

// find finds a file; nil if it was not there at the last look.
func (sum *summary) find(name string) *seen {
	if sum == nil {
		return nil
	}
	if sum.next >= len(sum.files) || sum.files[sum.next].name != name {
		i, ok := slices.BinarySearchFunc(sum.files, name, func(f seen, name string) int { return strings.Compare(f.name, name) })
		if !ok {
			return nil
		}
		sum.next = i
	}
	sum.next++
	return &sum.files[sum.next-1]
}

// known is who an image said it is when its file was as at the last look, without a read;
// nil if that is not known.
func (l *lookup) known(vm, object string) *checkpoint.Identity {
	f := l.vms[vm].find(object)
	if f == nil || !f.looked() {
		return nil
	}
	if f.id == nil && f.stored != nil {
		if id, err := checkpoint.ParseCompact(f.stored); err == nil {
			f.id = id
		}
	}
	return f.id
}

// refers tells whether an image may refer to one of those that asked tells of: of one that is
// not known it may be so. stamp is the image's at the last look, zero if there was none.
func (l *lookup) refers(vm, object string, asked func(uuid.UUID) bool) (maybe bool, stamp vfs.Stamp) {
	f := l.vms[vm].find(object)
	switch {
	case f == nil || !f.looked():
		return true, stamp
	case f.id != nil:
		maybe = slices.ContainsFunc(f.id.References, asked)
	default:
		maybe = f.stored == nil || f.stored.Refers(asked)
	}
	return maybe, f.stamp
}

// uuid is that of an image that has been read, or is in the summary; Nil of another.
func (l *lookup) uuid(vm, object string) (id uuid.UUID) {
	switch f := l.vms[vm].find(object); {
	case f == nil || !f.looked():
	case f.id != nil:
		id = f.id.UUID
	case f.stored != nil:
		id = f.stored.UUID()
	}
	return id
}

// size is that of an object at the last look.
func (l *lookup) size(vm, object string) (int64, bool) {
	if f := l.vms[vm].find(object); f != nil && f.looked() {
		return f.stamp.Size, true
	}
	return 0, false
}

// read keeps what an image has said, if its file was looked at before.
func (l *lookup) read(vm, object string, id *checkpoint.Identity) {
	if f := l.vms[vm].find(object); f != nil && f.looked() {
		f.id = id
	}
}

// whoIs is Store.whoIs.
func (l *lookup) whoIs(ctx context.Context, name string) (*checkpoint.Identity, error) {
	vm, object := split(name)
	if id := l.known(vm, object); id != nil {
		return id, nil
	}
	if size, ok := l.size(vm, object); ok && size == 0 {
		return nil, nil
	}
	id, err := l.s.whoIs(ctx, name)
	if err == nil {
		l.read(vm, object, id)
	}
	return id, err
}

// identity is Store.identity.
func (l *lookup) identity(ctx context.Context, r Ref) (*checkpoint.Identity, int64, error) {
	object := numbered(r.N, imageSuffix)
	id := l.known(r.VM, object)
	if id == nil || checkPlace("", r, id) != nil {
		return l.s.identity(ctx, r)
	}
	size, _ := l.size(r.VM, object)
	return id, size, nil
}

// unlistedIs is Store.unlistedIs.
func (l *lookup) unlistedIs(ctx context.Context, st *stored) (empty bool, err error) {
	vm, object := split(st.name)
	if id := l.known(vm, object); id != nil {
		st.id, st.uuid = id, id.UUID
		return false, nil
	}
	if size, ok := l.size(vm, object); ok && size == 0 {
		return true, nil
	}
	if empty, err = l.s.unlistedIs(ctx, st); err == nil && !empty {
		l.read(vm, object, st.id)
	}
	return empty, err
}

// owner is Store.owner.
func (l *lookup) owner(ctx context.Context, name string) (uuid.UUID, error) {
	if id := l.known(split(name)); id != nil {
		return id.UUID, nil
	}
	return l.s.owner(ctx, name)
}

// keep brings the summaries of the VMs that were looked at up to date, if it is time to.
// That one can't be written does no harm.
func (l *lookup) keep(ctx context.Context) {
	for vm, sum := range l.vms {
		missing := 0
		for i := range sum.files {
			if f := &sum.files[i]; f.stored == nil && f.id != nil {
				missing++
			}
		}
		if lag := summaryLag + len(sum.files)/summaryLag; missing >= lag || sum.dead >= lag {
			l.s.writeSummary(ctx, vm, sum.files)
		}
	}
}

// Summarize brings the summary of a VM up to date after a save of a checkpoint, if it is
// time to: as a rule it reads some bytes, to find out that it is not. It takes no lock.
func (s *Store) Summarize(ctx context.Context, r Ref) {
	f, err := s.dir.Open(ctx, summaryObject(r.VM), Unlocked)
	entries, highest := 0, 0
	if err == nil {
		b := make([]byte, summaryHead)
		if _, err = f.ReadAt(b, 0); err == nil {
			entries, highest, _ = parseSummaryHead(b)
		}
		f.Close()
	}
	if r.N-highest >= summaryLag+entries/summaryLag {
		s.summarize(ctx, r.VM)
	}
}

// summarize writes a VM's summary.
func (s *Store) summarize(ctx context.Context, vm string) {
	l := s.lookup()
	o, err := l.objects(ctx, vm)
	if err != nil {
		return
	}
	for _, st := range o.all(vm) {
		if ctx.Err() != nil {
			return
		}
		l.whoIs(ctx, st.name) // what can't say who it is is not in it
	}
	s.writeSummary(ctx, vm, l.vms[vm].files)
}

// split is an object's name in two: the VM, and the name in its folder.
func split(name string) (vm, object string) {
	name = name[len(vmsFolder)+1:]
	vm, object, _ = strings.Cut(name, "/")
	return vm, object
}

// readSummary reads what a VM's summary says, in the order of names: nothing if there is
// none, or none that can be read.
func (s *Store) readSummary(ctx context.Context, vm string) []seen {
	b, err := s.dir.Read(ctx, summaryObject(vm), maxSummary)
	if err != nil {
		return nil
	}
	entries, err := parseSummary(b)
	if err != nil {
		return nil
	}
	return entries
}

var errSummary = errors.New("not a summary of this version")

func parseSummaryHead(b []byte) (entries, highest int, err error) {
	le := binary.LittleEndian
	if len(b) < summaryHead || string(b[:8]) != summaryMagic || le.Uint32(b[8:]) != summaryVersion ||
		le.Uint32(b[12:]) != checkpoint.CompactVersion || le.Uint32(b[24:]) != integrity.Checksum(b[:24]) {
		return 0, 0, errSummary
	}
	return int(le.Uint32(b[16:])), int(le.Uint32(b[20:])), nil
}

func parseSummary(b []byte) ([]seen, error) {
	le := binary.LittleEndian
	n, _, err := parseSummaryHead(b)
	if err != nil {
		return nil, err
	}
	if b = b[summaryHead:]; len(b) < 4 || n > len(b)/summaryEntry || le.Uint32(b[len(b)-4:]) != integrity.Checksum(b[:len(b)-4]) {
		return nil, errSummary
	}
	b = b[:len(b)-4]
	entries := make([]seen, n)
	for i := range entries {
		if len(b) < summaryEntry {
			return nil, errSummary
		}
		name, identity := int(le.Uint16(b)), int(le.Uint32(b[2:]))
		e := &entries[i]
		e.stamp = vfs.Stamp{Size: int64(le.Uint64(b[6:])), Mtime: int64(le.Uint64(b[14:])), Ctime: int64(le.Uint64(b[22:])), Inode: le.Uint64(b[30:])}
		if b = b[summaryEntry:]; len(b) < name || len(b)-name < identity {
			return nil, errSummary
		}
		e.name, e.stored = string(b[:name]), checkpoint.Compact(b[name:name+identity])
		if b = b[name+identity:]; !e.looked() || i > 0 && e.name <= entries[i-1].name {
			return nil, errSummary
		}
	}
	if len(b) > 0 {
		return nil, errSummary
	}
	return entries, nil
}

// writeSummary writes what is known of a VM's images.
func (s *Store) writeSummary(ctx context.Context, vm string, files []seen) {
	le := binary.LittleEndian
	b := append(make([]byte, 0, 64<<10), summaryMagic...)
	b = le.AppendUint32(b, summaryVersion)
	b = le.AppendUint32(b, checkpoint.CompactVersion)
	b = append(b, make([]byte, summaryHead-len(b))...)
	entries, highest := 0, 0
	old := time.Now().Add(-youngFile).UnixNano()
	for i := range files {
		f := &files[i]
		stamp := f.stamp
		if n, suffix, ok := parseNumber(f.name); ok && suffix == imageSuffix {
			highest = max(highest, n)
		}
		if !f.looked() || stamp.Ctime > old || f.id == nil && f.stored == nil {
			continue
		}
		at := len(b)
		b = append(b, make([]byte, summaryEntry)...)
		b = append(b, f.name...)
		start := len(b)
		if f.stored != nil {
			b = append(b, f.stored...)
		} else {
			var err error
			if b, err = f.id.AppendCompact(b); err != nil {
				b = b[:at]
				continue
			}
		}
		le.PutUint16(b[at:], uint16(len(f.name)))
		le.PutUint32(b[at+2:], uint32(len(b)-start))
		for i, n := range []uint64{uint64(stamp.Size), uint64(stamp.Mtime), uint64(stamp.Ctime), stamp.Inode} {
			le.PutUint64(b[at+6+8*i:], n)
		}
		entries++
	}
	le.PutUint32(b[16:], uint32(entries))
	le.PutUint32(b[20:], uint32(highest))
	le.PutUint32(b[24:], integrity.Checksum(b[:24]))
	b = le.AppendUint32(b, integrity.Checksum(b[summaryHead:]))
	if len(b) > maxSummary {
		return
	}
	err := s.dir.Cache(ctx, summaryObject(vm), spare(), b)
	if gone(err) && s.dir.Mkdir(ctx, summaryFolder) == nil {
		s.dir.Cache(ctx, summaryObject(vm), spare(), b)
	}
}
