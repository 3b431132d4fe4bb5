package store

import (
	"context"
	"encoding/binary"
	"errors"
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
// all little-endian. It is a cache. An entry counts only while the file has the Stamp
// that it had when it was read, so that it can be old, lost, damaged, torn or another
// store's at any time, and no lock is needed to write it: of two that are written at a
// time either is good. Images are never changed but for what is given back of unlisted
// ones, and IDENTITY stays; whoever changes one by hand changes its Stamp.
//
// list reads it; rm, gc and saves bring it up to date when too many of the VM's images
// are not in it, so that each does so seldom, and only that often is a thousand's worth
// of work done.

const (
	summaryMagic   = "flicsum\n"
	summaryVersion = 1
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
}

// summary is what is known of one VM's images, by the names of the objects in its folder.
type summary struct {
	stamps map[string]vfs.Stamp   // of the files, at the last look
	stored map[string]storedEntry // what the summary object says
	fresh  map[string]freshEntry  // what has been read since
}

type storedEntry struct {
	stamp    vfs.Stamp
	identity []byte
}

type freshEntry struct {
	stamp vfs.Stamp
	id    *checkpoint.Identity
}

func (s *Store) lookup() *lookup { return &lookup{s, make(map[string]*summary)} }

// eachVM is Store.eachVM, which looks at the files too.
func (l *lookup) eachVM(ctx context.Context, only string, fn func(vm string, o vmObjects) error) error {
	return l.s.eachVMBy(ctx, only, l.objects, fn)
}

// eachVMOnce is eachVM of all VMs, which looks at the files of those alone that were not
// looked at before. What has come since is not known, and has to be read.
func (l *lookup) eachVMOnce(ctx context.Context, fn func(vm string, o vmObjects) error) error {
	return l.s.eachVMBy(ctx, "", func(ctx context.Context, vm string) (vmObjects, error) {
		if l.vms[vm] == nil {
			return l.objects(ctx, vm)
		}
		return l.s.objects(ctx, vm)
	}, fn)
}

// objects is Store.objects, and from then on what is known counts as far as the files are
// what they are now.
func (l *lookup) objects(ctx context.Context, vm string) (vmObjects, error) {
	list, err := l.s.dir.Look(ctx, vmFolder(vm))
	if err != nil && !gone(err) {
		return vmObjects{}, err
	}
	sum := l.vms[vm]
	if sum == nil {
		sum = &summary{stored: l.s.readSummary(ctx, vm), fresh: make(map[string]freshEntry)}
		l.vms[vm] = sum
	}
	sum.stamps = make(map[string]vfs.Stamp, len(list))
	for _, e := range list {
		if !e.Folder && !e.Odd {
			sum.stamps[e.Name] = e.Stamp
		}
	}
	return objectsOf(vm, list), nil
}

// known is who an image said it is when its file was as at the last look, without a read;
// nil if that is not known.
func (l *lookup) known(vm, object string) *checkpoint.Identity {
	sum := l.vms[vm]
	if sum == nil {
		return nil
	}
	stamp, ok := sum.stamps[object]
	if !ok {
		return nil
	}
	if f, ok := sum.fresh[object]; ok && f.stamp == stamp {
		return f.id
	}
	e, ok := sum.stored[object]
	if !ok || e.stamp != stamp {
		return nil
	}
	id, err := checkpoint.ParseCompact(e.identity)
	if err != nil {
		return nil
	}
	return id
}

// size is that of an object at the last look.
func (l *lookup) size(vm, object string) (int64, bool) {
	if sum := l.vms[vm]; sum != nil {
		stamp, ok := sum.stamps[object]
		return stamp.Size, ok
	}
	return 0, false
}

// stamp is that of an image at the last look; zero if it has not been looked at.
func (l *lookup) stamp(name string) (stamp vfs.Stamp) {
	vm, object := split(name)
	if sum := l.vms[vm]; sum != nil {
		stamp = sum.stamps[object]
	}
	return stamp
}

// read keeps what an image has said, if its file was looked at before.
func (l *lookup) read(vm, object string, id *checkpoint.Identity) {
	if sum := l.vms[vm]; sum != nil && id != nil {
		if stamp, ok := sum.stamps[object]; ok {
			sum.fresh[object] = freshEntry{stamp, id}
		}
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
	vm, object := split(r.object(imageSuffix))
	id := l.known(vm, object)
	if id == nil || checkPlace("", r, id) != nil {
		return l.s.identity(ctx, r)
	}
	size, _ := l.size(vm, object)
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
		missing, dead := 0, 0
		for object := range sum.fresh {
			if sum.stamps[object] == sum.fresh[object].stamp {
				missing++
			}
		}
		for object, e := range sum.stored {
			if sum.stamps[object] != e.stamp {
				dead++
			}
		}
		if lag := summaryLag + len(sum.stamps)/summaryLag; missing >= lag || dead >= lag {
			l.s.writeSummary(ctx, vm, sum)
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
	s.writeSummary(ctx, vm, l.vms[vm])
}

// split is an object's name in two: the VM, and the name in its folder.
func split(name string) (vm, object string) {
	name = name[len(vmsFolder)+1:]
	vm, object, _ = strings.Cut(name, "/")
	return vm, object
}

// readSummary reads what a VM's summary says: nothing if there is none, or none that can
// be read.
func (s *Store) readSummary(ctx context.Context, vm string) map[string]storedEntry {
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

func parseSummary(b []byte) (map[string]storedEntry, error) {
	le := binary.LittleEndian
	n, _, err := parseSummaryHead(b)
	if err != nil {
		return nil, err
	}
	if b = b[summaryHead:]; len(b) < 4 || n > len(b)/summaryEntry || le.Uint32(b[len(b)-4:]) != integrity.Checksum(b[:len(b)-4]) {
		return nil, errSummary
	}
	b = b[:len(b)-4]
	entries := make(map[string]storedEntry, n)
	for range n {
		if len(b) < summaryEntry {
			return nil, errSummary
		}
		name, identity := int(le.Uint16(b)), int(le.Uint32(b[2:]))
		e := storedEntry{stamp: vfs.Stamp{Size: int64(le.Uint64(b[6:])), Mtime: int64(le.Uint64(b[14:])), Ctime: int64(le.Uint64(b[22:])), Inode: le.Uint64(b[30:])}}
		if b = b[summaryEntry:]; len(b) < name || len(b)-name < identity {
			return nil, errSummary
		}
		e.identity = b[name : name+identity]
		entries[string(b[:name])] = e
		b = b[name+identity:]
	}
	if len(b) > 0 {
		return nil, errSummary
	}
	return entries, nil
}

// writeSummary writes what is known of a VM's images.
func (s *Store) writeSummary(ctx context.Context, vm string, sum *summary) {
	le := binary.LittleEndian
	b := append(make([]byte, 0, 64<<10), summaryMagic...)
	b = le.AppendUint32(b, summaryVersion)
	b = le.AppendUint32(b, checkpoint.CompactVersion)
	b = append(b, make([]byte, summaryHead-len(b))...)
	entries, highest := 0, 0
	old := time.Now().Add(-youngFile).UnixNano()
	for object, stamp := range sum.stamps {
		if n, suffix, ok := parseNumber(object); ok && suffix == imageSuffix {
			highest = max(highest, n)
		}
		if stamp.Ctime > old {
			continue
		}
		at := len(b)
		b = append(b, make([]byte, summaryEntry)...)
		b = append(b, object...)
		start := len(b)
		if f, ok := sum.fresh[object]; ok && f.stamp == stamp {
			var err error
			if b, err = f.id.AppendCompact(b); err != nil {
				b = b[:at]
				continue
			}
		} else if e, ok := sum.stored[object]; ok && e.stamp == stamp {
			b = append(b, e.identity...)
		} else {
			b = b[:at]
			continue
		}
		le.PutUint16(b[at:], uint16(len(object)))
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
