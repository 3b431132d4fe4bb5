package main

import (
	"fmt"
	"slices"
	"testing"
)

// Damages that are alike but for numbers are one line and a count. Others, and those of
// other files, stand for themselves.
func TestGrouped(t *testing.T) {
	var hole []string
	for i := range 9 {
		hole = append(hole, fmt.Sprintf("s/vms/a/00000001.flic: offset %d: PAGES %d: checksum mismatch", 4096*i, i))
	}
	other := "s/vms/a/00000002.flic: offset 4096: PAGES 1: checksum mismatch"
	page := "page pc.ram:0x1000: s/vms/a/00000001.flic: offset 7: digest"
	more := "… and 8 more like that, up to offset 32768 (--json lists them)"
	for _, c := range []struct{ in, want []string }{
		{nil, nil},
		{hole[:3], hole[:3]},
		{hole, []string{hole[0], more}},
		{slices.Concat(hole[:1], []string{other}, hole[1:], []string{page}), []string{hole[0], more, other, page}},
		{[]string{"a", "a", "a", "b"}, []string{"a", "a", "a", "b"}},
	} {
		if got := grouped(c.in); !slices.Equal(got, c.want) {
			t.Errorf("%q\nis %q,\nwant %q", c.in, got, c.want)
		}
	}
}

func TestNearest(t *testing.T) {
	names := []string{"FLIC_CONFIG", "FLIC_CHECKPOINT_KEEP_LAST", "FLIC_PRUNE_KEEP_LAST", "FLIC_PRUNE_KEEP_TAG", "FLIC_NVRAM", "FLIC_NVRAM_SIZE", "FLIC_STORE", "FLIC_VM"}
	for name, want := range map[string]string{
		"FLIC_STOER":        "FLIC_STORE",
		"FLIC_NVRAMSIZE":    "FLIC_NVRAM_SIZE",
		"FLIC_NVRAM_SIZ":    "FLIC_NVRAM_SIZE",
		"FLIC_STORE_DIR":    "FLIC_STORE",
		"FLIC_NVRM":         "FLIC_NVRAM",
		"FLIC_VMS":          "FLIC_VM",
		"FLIC_KEEP_TAG":     "FLIC_PRUNE_KEEP_TAG",
		"FLIC_KEPE_TAG":     "FLIC_PRUNE_KEEP_TAG",
		"FLIC_GUESTS":       "",
		"FLIC_TEST_STREAMS": "",
		"FLIC_":             "",
	} {
		if got := nearest(name, names); got != want {
			t.Errorf("%s: %q, want %q", name, got, want)
		}
	}
}
