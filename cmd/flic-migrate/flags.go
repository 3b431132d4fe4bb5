package main

import (
	"fmt"
	"sort"
	"strconv"
	"strings"

	"github.com/spf13/pflag"

	"github.com/flic-migrate/flic-migrate/tier/dedup"
	"github.com/flic-migrate/flic-migrate/tier/image"
	"github.com/flic-migrate/flic-migrate/tier/save"
	"github.com/flic-migrate/flic-migrate/tier/store"
)

// size is a flag in bytes with an optional suffix K, M, G or T, powers of 1024.
type size int64

func (s *size) Type() string { return "size" }

func (s *size) String() string {
	n := int64(*s)
	for i := len(suffixes) - 1; i >= 0; i-- {
		if shift := 10 * (i + 1); n != 0 && n%(1<<shift) == 0 {
			return strconv.FormatInt(n>>shift, 10) + suffixes[i:i+1]
		}
	}
	return strconv.FormatInt(n, 10)
}

const suffixes = "KMGT"

func (s *size) Set(v string) error {
	num, shift := v, 0
	if v != "" {
		if i := strings.IndexByte(suffixes, v[len(v)-1]&^0x20); i >= 0 {
			num, shift = v[:len(v)-1], 10*(i+1)
		}
	}
	n, err := strconv.ParseInt(num, 10, 64)
	if err != nil || n < 0 || n > (1<<62)>>shift {
		return fmt.Errorf("not a size: bytes, or a number with K, M, G or T")
	}
	*s = size(n << shift)
	return nil
}

// choice is a flag with a fixed set of values.
type choice struct {
	value   string
	choices []string
	former  map[string]string // names that are no longer offered, and what stands for them
}

func (c *choice) Type() string   { return strings.Join(c.choices, "|") }
func (c *choice) String() string { return c.value }

func (c *choice) Set(v string) error {
	if now, ok := c.former[v]; ok {
		v = now
	}
	for _, ok := range c.choices {
		if v == ok {
			c.value = v
			return nil
		}
	}
	return fmt.Errorf("must be one of %s", strings.Join(c.choices, ", "))
}

// parentFlag is --parent.
type parentFlag string

func (p *parentFlag) Type() string   { return "auto|none|NAME@N" }
func (p *parentFlag) String() string { return string(*p) }

func (p *parentFlag) Set(v string) error {
	if v != save.ParentAuto && v != save.ParentNone {
		if r, err := store.ParseRef(v); err != nil || r.N == 0 {
			return fmt.Errorf("must be %s, %s or a checkpoint's name, NAME@N", save.ParentAuto, save.ParentNone)
		}
	}
	*p = parentFlag(v)
	return nil
}

// domainFlag is --trust-domain.
type domainFlag string

func (d *domainFlag) Type() string   { return "NAME" }
func (d *domainFlag) String() string { return string(*d) }

func (d *domainFlag) Set(v string) error {
	if v != "" {
		if err := store.CheckDomain(v); err != nil {
			return err
		}
	}
	*d = domainFlag(v)
	return nil
}

// count is a flag that is a number of things, with bounds.
type count struct {
	n, min, max int
}

func (c *count) Type() string   { return "n" }
func (c *count) String() string { return strconv.Itoa(c.n) }

func (c *count) Set(v string) error {
	n, err := strconv.Atoi(v)
	if err != nil || n < c.min || n > c.max {
		return fmt.Errorf("must be a number from %d to %d", c.min, c.max)
	}
	c.n = n
	return nil
}

// encoding is the flags of all commands that write pages to flash.
type encoding struct {
	codec, energy                         choice
	sample, battery, segmentPages, worker count
}

func (e *encoding) add(fs *pflag.FlagSet) {
	var codecs []string
	for name := range image.Codecs {
		codecs = append(codecs, name)
	}
	sort.Strings(codecs)
	e.codec = choice{image.DefaultCodec.String(), codecs, map[string]string{"s2": image.MinLZ.String()}}
	e.energy = choice{value: string(dedup.EnergyAuto), choices: []string{string(dedup.EnergyAuto), string(dedup.EnergyFull), string(dedup.EnergyLow)}}
	e.sample = count{dedup.DefaultSampleSize, 8, 64 << 10}
	e.battery = count{dedup.DefaultBatteryThreshold, 0, 100}
	e.segmentPages = count{0, 0, image.MaxSegmentPages}
	e.worker = count{0, 0, 1024}
	fs.Var(&e.codec, "codec", "compression of cold pages")
	fs.Var(&e.energy, "energy", "low halves the hashing work and finds fewer duplicates; auto does so on a low battery")
	fs.Var(&e.battery, "battery-threshold", "charge in percent below which --energy auto saves energy")
	fs.Var(&e.sample, "sample-size", "bytes of a page that decide whether it is compared as a whole")
	fs.Var(&e.segmentPages, "segment-pages", "pages compressed together; 0: as many as make 128 KiB, with zstd 256 KiB")
	fs.Var(&e.worker, "workers", "compressing threads; 0: one for each CPU")
}

func (e *encoding) options() save.Options {
	return save.Options{
		Codec:        image.Codecs[e.codec.value],
		Energy:       dedup.Energy(e.energy.value),
		Battery:      e.battery.n,
		SampleSize:   e.sample.n,
		SegmentPages: e.segmentPages.n,
		Workers:      e.worker.n,
	}
}
