package main

import (
	"context"
	"errors"
	"path/filepath"
	"sort"
	"strings"

	"github.com/spf13/pflag"

	"github.com/flic-migrate/flic-migrate/tier/checkpoint"
	"github.com/flic-migrate/flic-migrate/tier/disk"
	"github.com/flic-migrate/flic-migrate/tier/progress"
	"github.com/flic-migrate/flic-migrate/tier/save"
	"github.com/flic-migrate/flic-migrate/tier/store"
)

// movedDisks is --disk of the commands that read checkpoints: where disk images are now,
// by where they were.
type movedDisks map[string]string

func (m *movedDisks) Type() string { return "OLD=NEW" }

func (m *movedDisks) String() string {
	var list []string
	for old, to := range *m {
		list = append(list, old+"="+to)
	}
	sort.Strings(list)
	return strings.Join(list, ",")
}

// Set takes one. OLD is absolute, and as a rule NEW is too, so that an equals sign in a
// name need not be in the way.
func (m *movedDisks) Set(v string) error {
	old, to, ok := strings.Cut(v, "=/")
	if to = "/" + to; !ok {
		old, to, ok = strings.Cut(v, "=")
	}
	if !ok || to == "" || !strings.HasPrefix(old, "/") {
		return errors.New("must be the path that the checkpoint says, which show prints, an equals sign, and the path now")
	}
	if *m == nil {
		*m = make(movedDisks)
	}
	(*m)[old] = to
	return nil
}

// diskFiles is --disk of the commands that save: paths, as in PATH.
type diskFiles []save.DiskFile

func (d *diskFiles) Type() string { return "FILE" }

func (d *diskFiles) String() string {
	var list []string
	for _, f := range *d {
		list = append(list, f.Path)
	}
	return strings.Join(list, string(filepath.ListSeparator))
}

// Set adds some.
func (d *diskFiles) Set(v string) error {
	for _, path := range filepath.SplitList(v) {
		if path == "" {
			return errors.New("a disk image's path is empty")
		}
		*d = append(*d, save.DiskFile{Path: path})
	}
	return nil
}

func (d *diskFiles) add(fs *pflag.FlagSet) {
	fs.Var(d, "disk", "disk images of the guest, colons between them or given several times: pages that equal blocks of read-only layers are not stored")
}

// open opens them for a save into a store, whose options it sets. close is to be called
// when the save has ended.
func (d *diskFiles) open(ctx context.Context, st *store.Store, o *save.Options) (close func(), err error) {
	if len(*d) == 0 {
		return func() {}, nil
	}
	catalog, err := st.Disks()
	if err != nil {
		return nil, err
	}
	opened := save.OpenDisks(ctx, catalog, *d)
	o.Disks, o.UnusedDisks = opened.Disks, opened.Unused
	for _, u := range opened.Unused {
		if u.Why == disk.ErrWriter.Error() {
			continue // as of every running guest
		}
		o.Log.Warn("no pages are looked for in a disk image", "path", u.Path, "cause", u.Why)
	}
	return opened.Close, nil
}

// disksFlags are those of the commands that read the pages of checkpoints.
type disksFlags struct {
	moved movedDisks
	check bool
}

func (d *disksFlags) addMoved(fs *pflag.FlagSet) {
	fs.Var(&d.moved, "disk", "a disk image that is no longer where the checkpoint says; may be given several times")
	setKey(fs, "disk", "moved-disk")
}

func (d *disksFlags) add(fs *pflag.FlagSet) {
	d.addMoved(fs)
	fs.BoolVar(&d.check, "check-disks", false, "compare all pages that are on disk images before anything else, also if these seem to be what they were")
}

// options are those of a restore.
func (d *disksFlags) options(show func(progress.State)) checkpoint.DiskOptions {
	o := checkpoint.DiskOptions{Moved: d.moved, Progress: show}
	if d.check {
		o.Check = checkpoint.CheckAll
	}
	return o
}

// reading are the options of who reads all pages in any case.
func (d *disksFlags) reading() checkpoint.DiskOptions {
	return checkpoint.DiskOptions{Moved: d.moved, Check: checkpoint.CheckRead}
}

// words are the flags as a server that resume starts needs them. --check-disks is not
// among them: resume has compared all.
func (d *disksFlags) words() (words []string) {
	var olds []string
	for old := range d.moved {
		olds = append(olds, old)
	}
	sort.Strings(olds)
	for _, old := range olds {
		words = append(words, "--disk", old+"="+d.moved[old])
	}
	return words
}
