package disks

import (
	"context"
	"encoding/json"
	"errors"
	"reflect"
	"testing"

	"github.com/flic-migrate/flic-migrate/qmp"
)

// fake answers commands with what the test says.
type fake struct {
	answers map[string]string
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
		return errors.New("refused")
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
