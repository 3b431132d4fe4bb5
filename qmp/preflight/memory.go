package preflight

import (
	"context"
	"encoding/json"
	"fmt"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/flic-migrate/flic-migrate/qmp"
	"github.com/flic-migrate/flic-migrate/qmp/migration"
	"github.com/flic-migrate/flic-migrate/ramparse"
)

// lazyPage is the page size of memory that a lazy restore can serve.
const lazyPage = 4096

// memory compares the RAM blocks. QEMU refuses a block that it does not have and one
// of another length (migration/ram.c, parse_ramblock). What only QEMU has it leaves
// alone, but a lazy restore would empty it: ROM, for example.
func (c *check) memory() error {
	if c.saved.Blocks == nil {
		return nil
	}
	blocks, err := migration.RAMBlocks(c.ctx, c.x)
	if err != nil {
		return err
	}
	have := make(map[string]ramparse.Block)
	for _, b := range blocks {
		have[b.Name] = b
	}
	for _, want := range c.saved.Blocks {
		b, ok := have[want.Name]
		delete(have, want.Name)
		switch {
		case !ok:
			c.refuse("RAM block %s of %d bytes is missing%s", want.Name, want.Used, hint(want.Name))
		case b.Used != want.Used && !resizable(want.Name):
			c.refuse("RAM block %s has %d bytes, %d were saved%s", want.Name, b.Used, want.Used, use(want))
		default:
			c.pageSize(b)
		}
	}
	var more []string
	for _, b := range blocks {
		if _, ok := have[b.Name]; ok {
			more = append(more, b.Name)
		}
	}
	if more != nil {
		c.eager("this QEMU has RAM that was not saved and that a lazy restore would empty: %s", strings.Join(more, ", "))
	}
	return nil
}

// pageSize looks at a block's pages as QEMU maps them.
func (c *check) pageSize(b ramparse.Block) {
	if b.PageSize != 0 && b.PageSize != lazyPage {
		c.eager("RAM block %s has pages of %d KiB", b.Name, b.PageSize>>10)
	}
}

// NotLazy tells why the memory of a QEMU, saved and restored in one that is started
// likewise, can't be restored lazily; nil if nothing is known of that. pid is QEMU's
// process, 0 if it is not known.
func NotLazy(ctx context.Context, x qmp.Executor, pid int) (why []string, err error) {
	blocks, err := migration.RAMBlocks(ctx, x)
	if err != nil {
		return nil, err
	}
	c := &check{ctx: ctx, x: x, saved: Saved{Blocks: blocks}, o: Options{PID: pid}}
	for _, b := range blocks {
		c.pageSize(b)
	}
	err = c.backends()
	return c.notLazy, err
}

// use is what to do about a block of the wrong size. Main memory is called pc.ram,
// mach-virt.ram, microvm.ram …; other blocks are a device's.
func use(b ramparse.Block) string {
	size := fmt.Sprintf("%dK", b.Used>>10)
	if b.Used%(1<<20) == 0 {
		size = fmt.Sprintf("%dM", b.Used>>20)
	}
	if strings.HasSuffix(b.Name, ".ram") && !strings.Contains(b.Name, "/") {
		return fmt.Sprintf(" (use -m %s)", size)
	}
	return hint(b.Name)
}

// hint says where a block comes from, by QEMU's names for them.
func hint(name string) string {
	base := name[strings.LastIndexByte(name, '/')+1:]
	switch at, _, _ := strings.Cut(name, "/"); {
	case strings.HasPrefix(name, pciRoot):
		return fmt.Sprintf(" (it is of the device at PCI address %s)", address(at))
	case strings.HasPrefix(name, "/objects/"):
		return fmt.Sprintf(" (it was a memory backend, -object memory-backend-…,id=%s)", base)
	}
	return ""
}

// resizable tells whether a block takes the size that the stream gives it
// (qemu_ram_resize, used for firmware tables).
func resizable(name string) bool { return strings.HasPrefix(name, "/rom@") }

// backends looks for memory that userfaultfd does not serve: that of a file which is
// neither on tmpfs nor on hugetlbfs. QEMU 8.1 and later refuse postcopy-ram then;
// earlier ones do not look, and end when they begin to listen.
func (c *check) backends() error {
	var objects []struct {
		Name string `json:"name"`
		Type string `json:"type"`
	}
	if answered, err := c.ask("qom-list", map[string]any{"path": "/objects"}, &objects); !answered {
		return err
	}
	for _, o := range objects {
		if o.Type != "child<memory-backend-file>" || !c.migrates(o.Name) {
			continue
		}
		value, err := c.property("/objects/"+o.Name, "mem-path")
		if err != nil {
			return err
		}
		var path string
		if json.Unmarshal(value, &path) != nil || path == "" {
			continue
		}
		if name, ok := servable(c.file(path)); !ok {
			c.eager("the memory backend %s is the file %s on %s, and userfaultfd serves only tmpfs and hugetlbfs (put it below /dev/shm, or use memory-backend-memfd)", o.Name, path, name)
		}
	}
	return nil
}

// file is where a file is for this process that QEMU calls by a path.
func (c *check) file(path string) string {
	switch {
	case c.o.PID == 0:
		return path
	case filepath.IsAbs(path):
		return fmt.Sprintf("/proc/%d/root%s", c.o.PID, path)
	}
	return fmt.Sprintf("/proc/%d/cwd/%s", c.o.PID, path)
}

// migrates tells whether a memory backend is one of the RAM that was saved: QEMU calls
// its block by the backend's name, or its path among the objects.
func (c *check) migrates(backend string) bool {
	for _, b := range c.saved.Blocks {
		if b.Name == backend || strings.HasSuffix(b.Name, "/"+backend) {
			return true
		}
	}
	return false
}

// servable tells whether userfaultfd serves a mapping of the file or of one in the
// directory, and else of what kind its file system is. What can't be looked at is taken
// to be servable.
func servable(path string) (name string, ok bool) {
	var s unix.Statfs_t
	if unix.Statfs(path, &s) != nil {
		return "", true
	}
	switch uint32(s.Type) {
	case unix.TMPFS_MAGIC, unix.HUGETLBFS_MAGIC:
		return "", true
	case unix.EXT4_SUPER_MAGIC:
		return "ext4", false
	case unix.XFS_SUPER_MAGIC:
		return "XFS", false
	case unix.BTRFS_SUPER_MAGIC:
		return "Btrfs", false
	case unix.NFS_SUPER_MAGIC:
		return "NFS", false
	case unix.OVERLAYFS_SUPER_MAGIC:
		return "overlayfs", false
	}
	return fmt.Sprintf("a file system of type %#x", uint32(s.Type)), false
}
