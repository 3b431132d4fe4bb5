package store

import (
	"context"
	"fmt"
	"slices"

	"github.com/google/uuid"

	"github.com/flic-migrate/flic-migrate/tier/checkpoint"
)

// vmObjects is what is in a VM's folder: the numbers that each kind of object has,
// in rising order.
type vmObjects struct {
	images, removed []int
	beside          map[string][]int // by suffix: what a checkpoint has beside its image
	odd             []int            // those of images where no file stands
	kept            []kept           // replaced images that others need
	moved           []movedName
	strays          []string // names of what else is there, with the folder's
}

// kept is an image that another has replaced under its number.
type kept struct {
	n  int
	id uuid.UUID
}

// last is the highest number that any of its checkpoints has had.
func (o vmObjects) last() (n int) {
	for _, list := range [][]int{o.images, o.removed} {
		if len(list) > 0 {
			n = max(n, list[len(list)-1])
		}
	}
	return n
}

// without is what is in the folder when a checkpoint is not listed any more, and its image kept
// as that of a removed one if keep is set. What is beside it may be gone.
func (o vmObjects) without(n int, keep bool) vmObjects {
	if i, ok := slices.BinarySearch(o.images, n); ok {
		o.images = slices.Delete(slices.Clone(o.images), i, i+1)
	}
	if i, ok := slices.BinarySearch(o.removed, n); keep && !ok {
		o.removed = slices.Insert(slices.Clone(o.removed), i, n)
	}
	return o
}

// objects lists a VM's folder; nothing if there is none.
func (s *Store) objects(ctx context.Context, vm string) (vmObjects, error) {
	list, err := s.dir.List(ctx, vmFolder(vm))
	if err != nil && !gone(err) {
		return vmObjects{}, err
	}
	return objectsOf(vm, list), nil
}

// objectsOf sorts what is in a VM's folder.
func objectsOf(vm string, list []Entry) (o vmObjects) {
	o.beside = make(map[string][]int)
	for _, e := range list {
		n, suffix, ok := parseNumber(e.Name)
		odd := e.Odd || e.Folder
		// Whatever has the name of an image is listed, as damaged if it is none, so
		// that it is seen and can be removed.
		stray := odd
		switch {
		case ok && suffix == imageSuffix:
			o.images = append(o.images, n)
			if stray = false; odd {
				o.odd = append(o.odd, n)
			}
		case ok && suffix == removedSuffix:
			o.removed = append(o.removed, n)
		case ok && (suffix == touchedSuffix || suffix == labelSuffix || suffix == lentSuffix) && !odd:
			o.beside[suffix] = append(o.beside[suffix], n)
		default:
			id, replaced := parseKept(suffix)
			m, moved := parseMoved(n, suffix)
			switch stray = !ok || !replaced && !moved || odd; {
			case stray:
			case replaced:
				o.kept = append(o.kept, kept{n, id})
			default:
				o.moved = append(o.moved, m)
			}
		}
		if stray {
			o.strays = append(o.strays, vmFolder(vm)+"/"+e.Name)
		}
	}
	for _, l := range [][]int{o.images, o.removed, o.odd, o.beside[touchedSuffix], o.beside[labelSuffix], o.beside[lentSuffix]} {
		slices.Sort(l)
	}
	return o
}

// pieces are those of an image, in their order.
func (o vmObjects) pieces(n int, id uuid.UUID) (list []movedName) {
	for _, m := range o.moved {
		if m.n == n && m.id == id {
			list = append(list, m)
		}
	}
	slices.SortFunc(list, func(a, b movedName) int { return a.k - b.k })
	return list
}

// folders names the VMs that have a folder, with or without checkpoints.
func (s *Store) folders(ctx context.Context) (vms []string, err error) {
	list, err := s.dir.List(ctx, vmsFolder)
	for _, e := range list {
		if e.Folder && CheckVM(e.Name) == nil {
			vms = append(vms, e.Name)
		}
	}
	return vms, err
}

// eachVM calls fn for one VM, or for each that has a folder if only is empty, with what is
// in the folder.
func (s *Store) eachVM(ctx context.Context, only string, fn func(vm string, o vmObjects) error) error {
	return s.eachVMBy(ctx, only, s.objects, fn)
}

// eachVMBy is eachVM with another way to look into a folder.
func (s *Store) eachVMBy(ctx context.Context, only string, objects func(context.Context, string) (vmObjects, error), fn func(string, vmObjects) error) error {
	vms := []string{only}
	if only == "" {
		var err error
		if vms, err = s.folders(ctx); err != nil {
			return err
		}
	} else if err := CheckVM(only); err != nil {
		return err
	}
	for _, vm := range vms {
		if err := context.Cause(ctx); err != nil {
			return err
		}
		o, err := objects(ctx, vm)
		if err == nil {
			err = fn(vm, o)
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// Strays are the paths of what lies where checkpoints are and has no name, or is of
// no kind, of a store's: of one VM, or of all if vm is empty. Each may be a checkpoint
// that somebody has renamed, or a VM's folder.
func (s *Store) Strays(ctx context.Context, vm string) (paths []string, err error) {
	vms := []string{vm}
	if vm == "" {
		list, err := s.dir.List(ctx, vmsFolder)
		if err != nil {
			return nil, err
		}
		vms = nil
		for _, e := range list {
			if e.Folder && CheckVM(e.Name) == nil {
				vms = append(vms, e.Name)
			} else {
				paths = append(paths, s.dir.Path(vmFolder(e.Name)))
			}
		}
	}
	for _, v := range vms {
		o, err := s.objects(ctx, v)
		if err != nil {
			return nil, err
		}
		for _, name := range o.strays {
			paths = append(paths, s.dir.Path(name))
		}
	}
	return paths, nil
}

// VMs lists the names of the VMs that have checkpoints.
func (s *Store) VMs(ctx context.Context) ([]string, error) {
	refs, err := s.List(ctx, "")
	var vms []string
	for _, r := range refs {
		vms = append(vms, r.VM)
	}
	return slices.Compact(vms), err
}

// List names all checkpoints: of one VM, or of all if vm is empty.
func (s *Store) List(ctx context.Context, vm string) ([]Ref, error) {
	var refs []Ref
	err := s.eachVM(ctx, vm, func(vm string, o vmObjects) error {
		for _, n := range o.images {
			refs = append(refs, Ref{vm, n})
		}
		return nil
	})
	if err != nil {
		return nil, err
	}
	return refs, nil
}

// Resolve gives the number of the newest checkpoint to a Ref without one, and
// checks that the checkpoint exists.
func (s *Store) Resolve(ctx context.Context, r Ref) (Ref, error) {
	numbered := r.N != 0
	r, err := s.newest(ctx, r)
	if err != nil || !numbered {
		return r, err
	}
	// Its name is all that is asked about: no thousand others are listed for that.
	f, err := s.dir.Open(ctx, r.object(imageSuffix), Unlocked)
	if err == nil {
		f.Close()
	}
	if gone(err) {
		return r, s.notThere(r)
	}
	return r, nil
}

// newest gives the number of the newest checkpoint to a Ref without one.
func (s *Store) newest(ctx context.Context, r Ref) (Ref, error) {
	if err := CheckVM(r.VM); err != nil || r.N != 0 {
		return r, err
	}
	o, err := s.objects(ctx, r.VM)
	if err == nil && len(o.images) == 0 {
		err = s.notThere(r)
	}
	if err == nil {
		r.N = o.images[len(o.images)-1]
	}
	return r, err
}

func (s *Store) notThere(r Ref) error {
	return fmt.Errorf("checkpoint %v in store %s: %w", r, s.root, ErrNotFound)
}

// Listed is a checkpoint as a list shows it.
type Listed struct {
	Ref        Ref
	ImageBytes int64
	Identity   *checkpoint.Identity
	// MovedBytes is how much of its NVRAM part has been moved to flash, DiskBytes how much was
	// copied there from disk images.
	MovedBytes, DiskBytes int64
	Label                 Label
	LabelErr              error // why that can't be read, if so
	// Err is what is wrong with the checkpoint, if it can't say who it is, or is
	// another one than its place says; Identity is then nil.
	Err error
	// Lacks is damage of another kind: images that it refers to are not there, or disks that
	// are kept with it. Listing looks for both, MembersOf for images.
	Lacks error
}

// Identities describes the checkpoints of one VM, or of all if vm is empty. It
// reads some KB of each that the VM's summary does not know, and takes no lock. What goes
// away meanwhile is left out.
func (s *Store) Identities(ctx context.Context, vm string) ([]Listed, error) {
	return s.identities(ctx, s.lookup(), vm, func(string, vmObjects) {})
}

// Listing is Identities, and finds out whether the images are there that each refers to, and
// the disks that are kept with it. It
// reads no more, unless one seems to lack some or the others' are of another VM.
func (s *Store) Listing(ctx context.Context, vm string) ([]Listed, error) {
	p := s.presence()
	list, err := s.identities(ctx, p.look, vm, p.add)
	if err == nil {
		err = p.lacks(ctx, list)
	}
	if err == nil {
		err = p.lacksDisks(ctx, list)
	}
	return list, err
}

// identities is Identities, which also tells seen what is in each folder.
func (s *Store) identities(ctx context.Context, look *lookup, vm string, seen func(vm string, o vmObjects)) ([]Listed, error) {
	list := []Listed{}
	err := look.eachVM(ctx, vm, func(vm string, o vmObjects) error {
		seen(vm, o)
		for _, n := range o.images {
			if err := context.Cause(ctx); err != nil {
				return err
			}
			l, err := look.listed(ctx, Ref{vm, n}, o)
			if gone(err) {
				continue
			}
			if err != nil {
				return err
			}
			if _, has := slices.BinarySearch(o.beside[labelSuffix], n); has {
				l.Label, l.LabelErr = s.Label(ctx, l.Ref)
			}
			list = append(list, l)
		}
		return nil
	})
	if err != nil {
		return nil, err
	}
	return list, nil
}

// listed describes a checkpoint of a VM whose folder has these objects. One that has
// gone away is an error (fs.ErrNotExist).
func (k *lookup) listed(ctx context.Context, r Ref, o vmObjects) (l Listed, err error) {
	l.Ref = r
	l.Identity, l.ImageBytes, l.Err = k.identity(ctx, r)
	if gone(l.Err) {
		return l, l.Err
	}
	if id := l.Identity; id != nil && id.PieceSlots() > 0 && len(o.pieces(r.N, id.UUID)) > 0 {
		slots, err := k.s.movedSlots(ctx, r, id.UUID)
		if err != nil && !cannotTell(err) { // verify says what is damaged
			return l, err
		}
		l.MovedBytes, l.DiskBytes = id.PieceBytes(slots)
	}
	return l, nil
}

// identity reads who an image says it is, and refuses one that is not in its place.
func (s *Store) identity(ctx context.Context, r Ref) (id *checkpoint.Identity, size int64, err error) {
	f, err := s.dir.Open(ctx, r.object(imageSuffix), Unlocked)
	if err != nil {
		return nil, 0, err
	}
	defer f.Close()
	if size, err = f.Size(); err != nil {
		return nil, 0, err
	}
	if id, err = checkpoint.ReadIdentity(f); err == nil {
		err = checkPlace(f.Name(), r, id)
	}
	if err != nil {
		id = nil
	}
	return id, size, s.unlessGone(ctx, r.object(imageSuffix), err)
}
