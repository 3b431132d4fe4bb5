package qemutest

import (
	"context"
	"encoding/binary"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"

	"github.com/flic-migrate/flic-migrate/qmp"
	"github.com/flic-migrate/flic-migrate/qmp/migration"
	"github.com/flic-migrate/flic-migrate/ramparse"
)

// Block is one of QEMU's RAM blocks.
type Block struct {
	ramparse.Block
	// Guest is the guest-physical address of its beginning. A block that the
	// guest cannot see has none, and cannot be read by this package.
	Guest  uint64
	Mapped bool
}

var (
	// "  0000000000000000-000000000009ffff (prio 0, ram): pc.ram KVM": a range of
	// a flat view. What begins inside a block has "@" and its offset at the end.
	flatLine = regexp.MustCompile(`(?m)^\s*([0-9a-f]{16})-[0-9a-f]{16} \(prio -?\d+, (?:ram|rom|nv-ram)\): (\S+)([^\r\n]*)`)
	// "Host virtual address for 0x0 (pc.ram) is 0x7f1234400000"
	hostLine = regexp.MustCompile(`Host virtual address for \S+ \(\S+\) is 0x([0-9a-f]+)`)
)

// Blocks returns the RAM blocks, in the order QEMU names them.
func (vm *VM) Blocks(ctx context.Context) ([]Block, error) {
	named, err := migration.RAMBlocks(ctx, vm.QMP)
	if err != nil {
		return nil, err
	}
	blocks := make([]Block, len(named))
	for i, b := range named {
		blocks[i].Block = b
	}
	flat, err := qmp.HumanMonitor(ctx, vm.QMP, "info mtree -f")
	if err != nil {
		return nil, err
	}
	// Each address space has a view. What the guest sees is the one called memory;
	// devices have others, in which a block may be at another address.
	for _, view := range strings.Split(flat, "FlatView #") {
		if strings.Contains(view, `AS "memory", root:`) {
			flat = view
		}
	}
	for _, m := range flatLine.FindAllStringSubmatch(flat, -1) {
		if strings.Contains(m[3], "@") {
			continue
		}
		for i := range blocks {
			b := &blocks[i]
			// A block of a memory backend is /objects/NAME in one list and NAME
			// in the other, one of a device has the device's path before it.
			if !b.Mapped && (b.Name == m[2] || strings.HasSuffix(b.Name, "/"+m[2])) {
				if b.Guest, err = strconv.ParseUint(m[1], 16, 64); err != nil {
					return nil, err
				}
				b.Mapped = true
			}
		}
	}
	return blocks, nil
}

// hostBlock is a block and where in QEMU's memory it is.
type hostBlock struct {
	Block
	host int64
}

// hosts returns the blocks that can be read.
func (vm *VM) hosts(ctx context.Context) (list []hostBlock, err error) {
	blocks, err := vm.Blocks(ctx)
	if err != nil {
		return nil, err
	}
	for _, b := range blocks {
		if !b.Mapped {
			continue
		}
		text, err := qmp.HumanMonitor(ctx, vm.QMP, fmt.Sprintf("gpa2hva %#x", b.Guest))
		if err != nil {
			return nil, err
		}
		m := hostLine.FindStringSubmatch(text)
		if m == nil {
			continue // a device's memory, or a ROM in flash mode
		}
		host, err := strconv.ParseInt(m[1], 16, 64)
		if err != nil {
			return nil, err
		}
		list = append(list, hostBlock{b, host})
	}
	if len(list) == 0 {
		return nil, fmt.Errorf("none of the %d blocks can be read", len(blocks))
	}
	return list, nil
}

// RAM returns the whole content of every block that can be read, by name. Unlike
// pmemsave it reads the blocks and not the address space, where video memory and
// ROM hide the part of pc.ram from 0xA0000 to 0xFFFFF. The guest must be
// stopped, or the pages are of different moments.
func (vm *VM) RAM(ctx context.Context) (map[string][]byte, error) {
	blocks, err := vm.hosts(ctx)
	if err != nil {
		return nil, err
	}
	mem, err := os.Open(fmt.Sprintf("/proc/%d/mem", vm.Pid()))
	if err != nil {
		return nil, err
	}
	defer mem.Close()
	content := make(map[string][]byte)
	for _, b := range blocks {
		buf := make([]byte, b.Used)
		if _, err := mem.ReadAt(buf, b.host); err != nil {
			return nil, fmt.Errorf("block %s at %#x: %w", b.Name, b.host, err)
		}
		content[b.Name] = buf
	}
	return content, nil
}

// Loaded calls page with every page of RAM that is there, when others may still
// have to come: a read of one of those would wait for it. The guest must be
// stopped, and QEMU must answer its monitor.
func (vm *VM) Loaded(ctx context.Context, page func(block string, offset uint64, content []byte)) error {
	const pageSize = 4096
	blocks, err := vm.hosts(ctx)
	if err != nil {
		return err
	}
	mem, err := os.Open(fmt.Sprintf("/proc/%d/mem", vm.Pid()))
	if err != nil {
		return err
	}
	defer mem.Close()
	pagemap, err := os.Open(fmt.Sprintf("/proc/%d/pagemap", vm.Pid()))
	if err != nil {
		return err
	}
	defer pagemap.Close()
	buf := make([]byte, pageSize)
	for _, b := range blocks {
		// Linux, Documentation/admin-guide/mm/pagemap.rst: 64 bits a page.
		const present, swapped = 1 << 63, 1 << 62
		entries := make([]byte, b.Used/pageSize*8)
		if _, err := pagemap.ReadAt(entries, b.host/pageSize*8); err != nil {
			return err
		}
		for i := range b.Used / pageSize {
			if binary.LittleEndian.Uint64(entries[8*i:])&(present|swapped) == 0 {
				continue
			}
			if _, err := mem.ReadAt(buf, b.host+int64(i)*pageSize); err != nil {
				return fmt.Errorf("block %s, page %d: %w", b.Name, i, err)
			}
			page(b.Name, i*pageSize, buf)
		}
	}
	return nil
}

// PhysicalMemory returns size bytes of guest-physical memory from addr, as the
// guest sees it, by pmemsave.
func (vm *VM) PhysicalMemory(ctx context.Context, addr, size uint64) ([]byte, error) {
	file := filepath.Join(vm.dir, "pmem")
	defer os.Remove(file)
	if err := qmp.PMemSave(ctx, vm.QMP, addr, size, file); err != nil {
		return nil, err
	}
	return os.ReadFile(file)
}

// DiffRAM names the first pages that differ between two results of RAM, and
// blocks that only one has; it is empty if they are equal.
func DiffRAM(a, b map[string][]byte) string {
	const pageSize, most = 4096, 8
	var diffs []string
	count := 0
	for name, x := range a {
		y, ok := b[name]
		if !ok || len(x) != len(y) {
			diffs = append(diffs, fmt.Sprintf("block %s: %d bytes, in the other %d", name, len(x), len(y)))
			continue
		}
		for at := 0; at < len(x); at += pageSize {
			end := min(at+pageSize, len(x))
			if string(x[at:end]) != string(y[at:end]) {
				if count++; count <= most {
					diffs = append(diffs, fmt.Sprintf("block %s: page at %#x", name, at))
				}
			}
		}
	}
	for name := range b {
		if _, ok := a[name]; !ok {
			diffs = append(diffs, fmt.Sprintf("block %s only in the second", name))
		}
	}
	if count > most {
		diffs = append(diffs, fmt.Sprintf("%d pages in all", count))
	}
	return strings.Join(diffs, "; ")
}
