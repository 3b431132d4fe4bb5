package disk

import (
	"encoding/binary"
	"io"
	"slices"
)

// A region is a partition whose blocks do not begin at multiples of BlockSize of the
// disk: a partition from sector 63 on, as DOS had it, has its file system's blocks at
// sectors 63, 71, 79, …. All that is in no region counts from the disk's begin.
type region struct{ start, end int64 } // sectors; its blocks begin at start

// sectorsPerBlock is a block's length.
const sectorsPerBlock = BlockSize / SectorSize

// maxRegions bounds what a partition table may make us keep. GPT has 128 by custom.
const maxRegions = 256

// regions reads the partition table of a disk: GPT, or MBR with logical partitions.
// What it says is a hint and nobody's promise: a table that is none, or nonsense, costs
// matches. The regions are in order, and do not overlap.
func regions(disk io.ReaderAt, size int64) []region {
	sectors := size / SectorSize
	list, ok := gpt(disk, sectors)
	if !ok {
		list = mbr(disk, sectors)
	}
	list = slices.DeleteFunc(list, func(r region) bool {
		return r.start%sectorsPerBlock == 0 || r.start <= 0 || r.end > sectors || r.end-r.start < sectorsPerBlock
	})
	slices.SortFunc(list, func(a, b region) int { return int(min(max(a.start-b.start, -1), 1)) })
	var out []region
	for _, r := range list {
		if len(out) > 0 && r.start < out[len(out)-1].end || len(out) == maxRegions {
			continue
		}
		out = append(out, r)
	}
	return out
}

// gpt reads a GUID partition table (UEFI specification, chapter 5) with sectors of 512
// bytes. On disks with larger ones partitions begin at multiples of BlockSize.
func gpt(disk io.ReaderAt, sectors int64) (list []region, ok bool) {
	h := make([]byte, SectorSize)
	if _, err := disk.ReadAt(h, SectorSize); err != nil || string(h[:8]) != "EFI PART" {
		return nil, false
	}
	le := binary.LittleEndian
	at, n, length := le.Uint64(h[72:]), le.Uint32(h[80:]), le.Uint32(h[84:])
	if at >= uint64(sectors) || length < 128 || length > SectorSize {
		return nil, true
	}
	e := make([]byte, 48)
	for i := range min(int64(n), maxRegions) {
		if _, err := disk.ReadAt(e, int64(at)*SectorSize+i*int64(length)); err != nil {
			break
		}
		// An entry without a type is free.
		if le.Uint64(e) == 0 && le.Uint64(e[8:]) == 0 {
			continue
		}
		first, last := le.Uint64(e[32:]), le.Uint64(e[40:])
		if first <= last && last < uint64(sectors) {
			list = append(list, region{int64(first), int64(last) + 1})
		}
	}
	return list, true
}

// mbr reads a master boot record, and the chain of those in an extended partition.
func mbr(disk io.ReaderAt, sectors int64) (list []region) {
	var extended int64
	table := func(at int64) (next int64) {
		b := make([]byte, SectorSize)
		if _, err := disk.ReadAt(b, at*SectorSize); err != nil || b[510] != 0x55 || b[511] != 0xaa {
			return 0
		}
		for e := b[446:510]; len(e) > 0; e = e[16:] {
			kind := e[4]
			start, n := int64(binary.LittleEndian.Uint32(e[8:])), int64(binary.LittleEndian.Uint32(e[12:]))
			switch kind {
			case 0:
			case 0x05, 0x0f, 0x85: // extended: all links count from the first
				if next = extended + start; extended == 0 {
					extended = start
				}
			default:
				list = append(list, region{at + start, at + start + n})
			}
		}
		return next
	}
	// A chain that goes round ends here.
	next := table(0)
	for i := 0; i < maxRegions && next > 0 && next < sectors; i++ {
		next = table(next)
	}
	return list
}

// sectorOf is the sector at which block n begins: of the one block that begins in the
// eight sectors from 8n on. No two do, because regions do not overlap.
func sectorOf(list []region, n uint32) int64 {
	at := int64(n) * sectorsPerBlock
	// The first region that ends behind it, and perhaps the next.
	i, _ := slices.BinarySearchFunc(list, at, func(r region, at int64) int {
		if r.end <= at {
			return -1
		}
		return 1
	})
	for ; i < len(list) && list[i].start < at+sectorsPerBlock; i++ {
		s := at + list[i].start%sectorsPerBlock
		if s >= list[i].start && s+sectorsPerBlock <= list[i].end {
			return s
		}
	}
	return at
}

// pieces calls fn with each part of the range [from, to) of a disk, in bytes, in which
// blocks follow each other, cut to whole blocks.
func pieces(list []region, from, to int64, fn func(from, to int64) error) error {
	piece := func(start, end, phase int64) error {
		start = (max(start, from)-phase+BlockSize-1)/BlockSize*BlockSize + phase
		end = (min(end, to)-phase)/BlockSize*BlockSize + phase
		if start >= end {
			return nil
		}
		return fn(start, end)
	}
	at := int64(0)
	for _, r := range list {
		start, end := r.start*SectorSize, r.end*SectorSize
		if end <= from {
			at = end
			continue
		}
		if start >= to {
			break
		}
		if err := piece(at, start, 0); err != nil {
			return err
		}
		if err := piece(start, end, start%BlockSize); err != nil {
			return err
		}
		at = end
	}
	return piece(at, to, 0)
}
