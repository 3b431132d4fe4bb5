package disks

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"reflect"
	"slices"
	"strings"
	"testing"

	"github.com/flic-migrate/flic-migrate/qmp"
)

// fake answers commands with what the test says.
type fake struct {
	answers map[string]string
	refusal error    // what comes of commands without an answer; nil: some error
	asked   []string // command and arguments
}

func (f *fake) Execute(_ context.Context, command string, args, result any) error {
	b, err := json.Marshal(args)
	if err != nil {
		return err
	}
	f.asked = append(f.asked, command+" "+string(b))
	answer, ok := f.answers[command]
	if !ok {
		return cmp.Or(f.refusal, errors.New("refused"))
	}
	if result == nil {
		return nil
	}
	return json.Unmarshal([]byte(answer), result)
}

func (f *fake) Events(context.Context) (<-chan qmp.Event, error) { return nil, nil }

// TestFind has what QEMU 7.2 says of a -drive, of a -blockdev, of firmware, of an empty
// drive, of what is no file, and of a file that it can name in JSON only.
func TestFind(t *testing.T) {
	f := &fake{answers: map[string]string{"query-block": `[
	{"device":"virtio0","qdev":"/machine/peripheral-anon/device[0]/virtio-backend","inserted":{"ro":false,"node-name":"#block170","image":
	 {"filename":"/srv/top.qcow2","format":"qcow2","backing-image":{"filename":"/srv/mid.qcow2","format":"qcow2","backing-image":{"filename":"/srv/base.raw","format":"raw"}}}}},
	{"device":"","qdev":"/machine/peripheral/vd1/virtio-backend","inserted":{"ro":true,"node-name":"r1","image":{"filename":"/srv/base.raw","format":"raw"}}},
	{"device":"pflash0","qdev":"/machine/system.flash0","inserted":{"ro":true,"node-name":"p","image":{"filename":"/usr/share/OVMF/OVMF_CODE.fd","format":"raw"}}},
	{"device":"ide1-cd0","qdev":"/machine/unattached/device[23]"},
	{"device":"net","qdev":"/machine/peripheral/net","inserted":{"ro":true,"node-name":"n","image":{"filename":"nbd://localhost/x","format":"raw"}}},
	{"device":"rel","qdev":"/machine/peripheral/rel","inserted":{"ro":true,"node-name":"s","image":{"filename":"here.raw","format":"raw"}}},
	{"device":"j","qdev":"/machine/peripheral/j","inserted":{"ro":false,"node-name":"jn","image":{"filename":"json:{\"driver\":\"qcow2\",\"lazy-refcounts\":\"on\",\"file\":{\"driver\":\"file\",\"filename\":\"/srv/j.qcow2\"}}","format":"qcow2",
	 "backing-image":{"filename":"json:{\"driver\":\"file\",\"filename\":\"/srv/jb.raw\"}","format":"raw"}}}},
	{"device":"v","qdev":"/machine/peripheral/v","inserted":{"ro":true,"node-name":"v","image":{"filename":"/srv/x.vmdk","format":"vmdk"}}}
	]`}}
	got, err := Find(t.Context(), f)
	if err != nil {
		t.Fatal(err)
	}
	want := []Disk{
		{"/machine/peripheral-anon/device[0]/virtio-backend", "virtio0", "#block170", false, []Layer{{"/srv/top.qcow2", "qcow2"}, {"/srv/mid.qcow2", "qcow2"}, {"/srv/base.raw", "raw"}}},
		{"/machine/peripheral/vd1/virtio-backend", "", "r1", true, []Layer{{"/srv/base.raw", "raw"}}},
		{"/machine/peripheral/net", "net", "n", true, []Layer{{"", "raw"}}},
		{"/machine/peripheral/rel", "rel", "s", true, []Layer{{"", "raw"}}},
		{"/machine/peripheral/j", "j", "jn", false, []Layer{{"/srv/j.qcow2", "qcow2"}, {"/srv/jb.raw", "raw"}}},
		{"/machine/peripheral/v", "v", "v", true, []Layer{{"/srv/x.vmdk", "vmdk"}}},
	}
	if !reflect.DeepEqual(got, want) {
		t.Errorf("%+v", got)
	}
	tops := []Layer{{"/srv/mid.qcow2", "qcow2"}, {"/srv/base.raw", "raw"}, {"/srv/jb.raw", "raw"}}
	if got := ReadOnly(got); !reflect.DeepEqual(got, tops) {
		t.Errorf("%+v", got)
	}
	if _, err := Find(t.Context(), &fake{}); err == nil {
		t.Error("a QEMU that does not answer has no disks")
	}
}

// TestFlash: what QEMU makes for firmware is no disk, and a disk is one whatever its user
// calls it: what is left out is neither recorded, nor compared, nor frozen.
func TestFlash(t *testing.T) {
	find := func(device, qdev string) []Disk {
		t.Helper()
		got, err := Find(t.Context(), &fake{answers: map[string]string{"query-block": fmt.Sprintf(
			`[{"device":%q,"qdev":%q,"inserted":{"node-name":"n","image":{"filename":"/srv/a.raw","format":"raw"}}}]`, device, qdev)}})
		if err != nil {
			t.Fatal(err)
		}
		return got
	}
	for _, c := range [][2]string{
		{"pflash0", "/machine/system.flash0"},
		{"", "/machine/virt.flash1"},
		{"code", "/machine/system.flash0"},
		{"pflash1", "/machine/unattached/device[7]"},
		{"pflash0", ""},
	} {
		if got := find(c[0], c[1]); len(got) != 0 {
			t.Errorf("firmware %q is the disk %+v", c, got)
		}
	}
	for _, c := range [][2]string{
		{"", "/machine/peripheral/flash1/virtio-backend"},
		{"", "/machine/peripheral/ua-flash-cache/virtio-backend"},
		{"", "/machine/peripheral/a.flash0"},
		{"pflash_data", "/machine/peripheral-anon/device[0]/virtio-backend"},
		{"pflash1", "/machine/peripheral-anon/device[0]"},
		{"", "flash-cache"}, // a device that is a disk itself is named by its id
		{"pflash0", "pflash0"},
		{"pflash_data", "/machine/unattached/device[3]"},
	} {
		want := c[1]
		if got := find(c[0], c[1]); len(got) != 1 || got[0].Name != want {
			t.Errorf("the disk %q: %+v", c, got)
		}
	}
}

// TestFindAll: more disks than a checkpoint can record are not some of them. What is no
// disk does not count.
func TestFindAll(t *testing.T) {
	query := func(disks int) *fake {
		list := slices.Repeat([]string{`{"device":"cd","qdev":"/machine/unattached/device[23]"}`}, maxDisks)
		for i := range disks {
			list = append(list, fmt.Sprintf(`{"device":"d%d","qdev":"","inserted":{"node-name":"n","image":{"filename":"/srv/a","format":"raw"}}}`, i))
		}
		return &fake{answers: map[string]string{"query-block": "[" + strings.Join(list, ",") + "]"}}
	}
	if got, err := Find(t.Context(), query(maxDisks)); err != nil || len(got) != maxDisks {
		t.Errorf("%d disks, %v", len(got), err)
	}
	if got, err := Find(t.Context(), query(maxDisks+1)); !errors.Is(err, ErrTooMany) || got != nil {
		t.Errorf("%d disks, %v", len(got), err)
	}
}
