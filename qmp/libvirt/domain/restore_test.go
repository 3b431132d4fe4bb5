package domain

import (
	"context"
	"encoding/xml"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/digitalocean/go-libvirt"

	"github.com/flic-migrate/flic-migrate/qmp/migration"
	"github.com/flic-migrate/flic-migrate/tier/rescue"
)

const (
	exampleUUID = "8bb93969-6252-4c81-a23f-1b90280c6bc9"
	exampleCPU  = `<cpu mode='custom' match='exact'><model>qemu64</model><feature policy='require' name='lahf_lm'/></cpu>`
	exampleXML  = `<domain type='qemu' id='1'>
  <name>web1</name><uuid>` + exampleUUID + `</uuid>
  <metadata><cpu>not this one</cpu></metadata>
  ` + exampleCPU + `
  <seclabel type='dynamic' model='apparmor' relabel='yes'><label>libvirt-8bb</label></seclabel>
  <seclabel type='static' model='dac' relabel='no'><label>+64055:+107</label></seclabel>
</domain>
`
	exampleCapabilities = `<capabilities><host><secmodel><model>none</model><doi>0</doi></secmodel>
<secmodel><model>dac</model><doi>0</doi><baselabel type='kvm'>+64055:+107</baselabel><baselabel type='qemu'>+64055:+107</baselabel></secmodel></host></capabilities>`
)

// confinedBy adds a security driver to a host's capabilities.
func confinedBy(model, capabilities string) string {
	return strings.Replace(capabilities, "<host>", "<host><secmodel><model>"+model+"</model><doi>0</doi></secmodel>", 1)
}

func TestChild(t *testing.T) {
	for document, want := range map[string]string{
		exampleXML: exampleCPU,
		"<cookie>\n  " + exampleCPU + "\n</cookie>\n": exampleCPU,
		"<cookie><slirpHelper/></cookie>":             "",
		"<a><cpu/><cpu>2</cpu></a>":                   "<cpu/>",
		"<cpu/>":                                      "",
		"":                                            "",
	} {
		if got, err := child(document, "cpu"); err != nil || got != want {
			t.Errorf("%q: %q, %v", document, got, err)
		}
	}
	for _, bad := range []string{"<a><cpu>", "<a></b>", "<a><cpu></a></cpu>", "<a"} {
		if got, err := child(bad, "cpu"); err == nil {
			t.Errorf("%q: %q", bad, got)
		}
	}
}

func TestIdentity(t *testing.T) {
	id, err := Description{XML: exampleXML}.identity()
	if err != nil || id.Name != "web1" || id.UUID != exampleUUID {
		t.Errorf("%+v, %v", id, err)
	}
	if uid, gid, ok := id.owner(); uid != 64055 || gid != 107 || !ok {
		t.Errorf("owner %d:%d, %v", uid, gid, ok)
	}
	for _, bad := range []string{"", "<domain/>", "<domain><name>x</name></domain>", "<other><name>x</name><uuid>u</uuid></other>", "x"} {
		if name, err := (Description{XML: bad}).Name(); err == nil {
			t.Errorf("%q is %q", bad, name)
		}
	}
	for text, want := range map[string]hostSecurity{
		exampleCapabilities:                         {uid: 64055, gid: 107, dac: true},
		"<capabilities/>":                           {},
		confinedBy("apparmor", exampleCapabilities): {uid: 64055, gid: 107, dac: true, confined: true},
		confinedBy("selinux", exampleCapabilities):  {uid: 64055, gid: 107, dac: true, confined: true},
	} {
		if got, err := parseCapabilities(text); got != want || err != nil {
			t.Errorf("%s: %+v, %v", text, got, err)
		}
	}
	if _, err := parseCapabilities("<capabilities>"); err == nil {
		t.Error("cut capabilities are taken")
	}
	for _, bad := range []string{"", "+1", "1:1", "+1:1", "+-1:+1", "+1:+", "+99999999999:+1", "qemu:qemu"} {
		if uid, gid, ok := parseLabel(bad); ok {
			t.Errorf("%q is %d:%d", bad, uid, gid)
		}
	}
}

// The cookie is XML whatever the name, and its host is never this one.
func TestCookie(t *testing.T) {
	a, b := cookie(identity{Name: `a<&>"`, UUID: exampleUUID}, exampleCPU), cookie(identity{Name: "b", UUID: exampleUUID}, "")
	var got struct {
		XMLName  xml.Name `xml:"qemu-migration"`
		Name     string   `xml:"name"`
		UUID     string   `xml:"uuid"`
		Host     string   `xml:"hostname"`
		HostUUID string   `xml:"hostuuid"`
		Model    string   `xml:"cpu>model"`
		Caps     *string  `xml:"capabilities"`
	}
	if a[len(a)-1] != 0 {
		t.Error("libvirt takes no cookie that does not end in a zero byte")
	}
	if err := xml.Unmarshal(a[:len(a)-1], &got); err != nil {
		t.Fatal(err)
	}
	if got.Name != `a<&>"` || got.UUID != exampleUUID || got.Model != "qemu64" || got.Caps == nil || got.Host == "" {
		t.Errorf("%+v", got)
	}
	if strings.Contains(string(b), got.HostUUID) {
		t.Error("the host is always the same")
	}
}

// TestSocketPath: the directory is QEMU's alone, and where something confines QEMU the
// socket's name is one that libvirt's AppArmor driver lets it make.
func TestSocketPath(t *testing.T) {
	run, tmp := t.TempDir(), t.TempDir()
	t.Setenv("TMPDIR", tmp)
	socketFolder = run
	defer func() { socketFolder = "/run/libvirt/qemu" }()
	own := fmt.Sprintf("+%d:+%d", os.Getuid(), os.Getgid())
	base := strings.ReplaceAll(exampleCapabilities, "+64055:+107", own)
	another := fmt.Sprintf("+%d:+%d", os.Getuid()+1, os.Getgid()+1)
	for name, c := range map[string]struct {
		capabilities, label, session, domain string
		want, fails                          string
	}{
		"free":          {capabilities: base, domain: "x", want: tmp + "/flic-*/s"},
		"no DAC":        {capabilities: "<capabilities/>", domain: "x", want: tmp + "/flic-*/s"},
		"AppArmor":      {capabilities: confinedBy("apparmor", base), domain: "web 1", want: run + "/flic-*/s.tunnelmigrate.dest.web 1"},
		"SELinux":       {capabilities: confinedBy("selinux", base), domain: "x", want: run + "/flic-*/s.tunnelmigrate.dest.x"},
		"session":       {capabilities: confinedBy("selinux", base), session: "session", domain: "x", want: tmp + "/flic-*/s"},
		"own label":     {capabilities: base, label: another, domain: "x", want: tmp + "/flic-*/s", fails: "by root"},
		"long name":     {capabilities: confinedBy("apparmor", base), domain: strings.Repeat("x", 107), fails: "too long"},
		"damaged words": {capabilities: "<", domain: "x", fails: "XML"},
	} {
		uri := fakeDaemon(t, func(program, procedure uint32, args []byte) (string, *libvirt.Error) {
			if procedure == capabilities {
				return text(c.capabilities), nil
			}
			return web1(0, 1, nil)(program, procedure, args)
		})
		if c.session != "" {
			uri = strings.Replace(uri, "/system", "/"+c.session, 1)
		}
		client, err := open(t.Context(), uri)
		if err != nil {
			t.Fatal(err)
		}
		id := identity{Name: c.domain}
		if c.label != "" {
			id.Labels = append(id.Labels, struct {
				Model string `xml:"model,attr"`
				Label string `xml:"label"`
			}{"dac", c.label})
		}
		path, err := client.socketPath(t.Context(), id)
		client.close()
		if c.fails != "" && (c.label == "" || os.Getuid() != 0) {
			if err == nil || !strings.Contains(err.Error(), c.fails) {
				t.Errorf("%s: %s, %v", name, path, err)
			}
			continue
		}
		if ok, _ := filepath.Match(c.want, path); err != nil || !ok {
			t.Errorf("%s: %s, %v; want %s", name, path, err, c.want)
			continue
		}
		fi, err := os.Stat(filepath.Dir(path))
		if err != nil {
			t.Fatal(err)
		}
		owner := own
		if c.label != "" {
			owner = c.label
		}
		if st := fi.Sys().(*syscall.Stat_t); fmt.Sprintf("+%d:+%d", st.Uid, st.Gid) != owner || fi.Mode().Perm() != 0o700 {
			t.Errorf("%s: %d:%d %v", name, st.Uid, st.Gid, fi.Mode())
		}
		os.RemoveAll(filepath.Dir(path))
	}
	for _, dir := range []string{run, tmp} {
		if left, _ := os.ReadDir(dir); len(left) > 0 {
			t.Errorf("left in %s: %v", dir, left)
		}
	}
}

// destination is a libvirt that starts domains: Prepare listens, Finish waits for
// the stream.
type destination struct {
	mu        sync.Mutex
	prepared  []string // the flags' bits
	finished  []string // cancelled or not
	postcopy  bool     // QEMU can
	received  []byte
	reads     bool          // Finish waits for the stream's end
	stuck     chan struct{} // Prepare does not answer before it is closed
	listener  net.Listener
	got       chan struct{}
	hasDomain bool
	paused    bool // the guest stays so
}

const (
	capabilities, prepare3, finish3, getState = 7, 303, 306, 212
)

func (d *destination) answer(program, procedure uint32, args []byte) (string, *libvirt.Error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	flagsAt := func(end int) uint32 {
		b := args[len(args)-end:]
		return uint32(b[0])<<24 | uint32(b[1])<<16 | uint32(b[2])<<8 | uint32(b[3])
	}
	switch procedure {
	case capabilities:
		return text(strings.ReplaceAll(exampleCapabilities, "+64055:+107", fmt.Sprintf("+%d:+%d", os.Getuid(), os.Getgid()))), nil
	case lookupByName:
		if !d.hasDomain {
			return "", &libvirt.Error{Code: uint32(libvirt.ErrNoDomain), Message: "no domain"}
		}
	case getState:
		if d.paused {
			return word(uint32(libvirt.DomainPaused)) + word(1), nil
		}
		return word(uint32(libvirt.DomainRunning)) + word(1), nil
	case prepare3:
		flags := flagsAt(4)
		d.prepared = append(d.prepared, fmt.Sprintf("%#x", flags))
		if d.stuck != nil {
			d.mu.Unlock()
			<-d.stuck
			d.mu.Lock()
			return "", &libvirt.Error{Code: 1, Message: "too late"}
		}
		if flags&uint32(libvirt.MigratePostcopy) != 0 && !d.postcopy {
			return "", &libvirt.Error{Code: 1, Message: "Postcopy is not supported"}
		}
		_, path, _ := strings.Cut(string(args), "unix://")
		path, _, _ = strings.Cut(path, "\x00")
		l, err := net.Listen("unix", path)
		if err != nil {
			return "", &libvirt.Error{Code: 1, Message: err.Error()}
		}
		d.listener, d.got = l, make(chan struct{})
		go func(got chan struct{}) {
			defer close(got)
			conn, err := l.Accept()
			l.Close()
			if err != nil {
				return
			}
			b, _ := io.ReadAll(conn)
			conn.Close()
			d.mu.Lock()
			d.received = b
			d.mu.Unlock()
		}(d.got)
		d.hasDomain = true
		return word(0) + word(0), nil // no cookie, no URI
	case finish3:
		cancelled := flagsAt(4)
		d.finished = append(d.finished, fmt.Sprint(cancelled))
		if d.reads {
			d.mu.Unlock()
			<-d.got
			d.mu.Lock()
		}
		if cancelled != 0 {
			d.hasDomain = false
			return "", &libvirt.Error{Code: 1, Message: "cancelled"}
		}
		return text("web1") + strings.Repeat("u", 16) + word(1) + word(0), nil
	}
	return web1(0, 1, nil)(program, procedure, args)
}

func (d *destination) said() (string, string) {
	d.mu.Lock()
	defer d.mu.Unlock()
	return strings.Join(d.prepared, " "), strings.Join(d.finished, " ")
}

// notUser is RestoreOptions.User for which no QEMU of this process's user can be lazy.
func notUser(why error) func(int) error {
	return func(uid int) error { return map[bool]error{true: why}[uid == os.Getuid()] }
}

func TestRestore(t *testing.T) {
	broken := errors.New("not what was stored")
	middle := &destination{postcopy: true, reads: true}
	stream := func(ctx context.Context, connect func() (*net.UnixConn, error), lazy bool, opened func()) error {
		conn, err := connect()
		if err == nil {
			_, err = conn.Write([]byte("stream"))
		}
		return err
	}
	lazily := func(ctx context.Context, connect func() (*net.UnixConn, error), lazy bool, opened func()) error {
		if lazy {
			opened()
		}
		return stream(ctx, connect, lazy, opened)
	}
	fails := func(ctx context.Context, connect func() (*net.UnixConn, error), lazy bool, opened func()) error {
		if _, err := connect(); err != nil {
			return err
		}
		return broken
	}
	for name, test := range map[string]struct {
		d                  *destination
		o                  RestoreOptions
		transient          bool
		prepared, finished string
		lazy               bool
		reason             string
		want               string // in the error
	}{
		"eager":         {o: RestoreOptions{Lazy: migration.LazyNever, Feed: stream}, prepared: "0x9", finished: "0"},
		"transient":     {o: RestoreOptions{Lazy: migration.LazyNever, Feed: stream}, transient: true, prepared: "0x1", finished: "0"},
		"paused":        {d: &destination{paused: true}, o: RestoreOptions{Lazy: migration.LazyAuto, Paused: true, Feed: stream}, prepared: "0x29", finished: "0", reason: "stay paused"},
		"lazy":          {d: &destination{postcopy: true}, o: RestoreOptions{Lazy: migration.LazyAuto, Feed: lazily}, prepared: "0x8009", finished: "0", lazy: true},
		"not lazy":      {o: RestoreOptions{Lazy: migration.LazyAuto, Feed: lazily}, prepared: "0x8009 0x9", finished: "0", reason: "Postcopy is not supported"},
		"can't be lazy": {o: RestoreOptions{Lazy: migration.LazyAuto, NotPossible: broken, Feed: lazily}, prepared: "0x9", finished: "0", reason: broken.Error()},
		// A QEMU is started once.
		"not its user":        {o: RestoreOptions{Lazy: migration.LazyAuto, User: notUser(broken), Feed: lazily}, prepared: "0x9", finished: "0", reason: broken.Error()},
		"never its user":      {o: RestoreOptions{Lazy: migration.LazyAlways, User: notUser(broken), Feed: lazily}, want: broken.Error()},
		"its user, not asked": {o: RestoreOptions{Lazy: migration.LazyNever, User: notUser(broken), Feed: stream}, prepared: "0x9", finished: "0"},
		"another's": {d: &destination{postcopy: true}, o: RestoreOptions{Lazy: migration.LazyAuto, Feed: lazily,
			User: func(uid int) error { return map[bool]error{false: broken}[uid == os.Getuid()] }}, prepared: "0x8009", finished: "0", lazy: true},
		"always":      {o: RestoreOptions{Lazy: migration.LazyAlways, Feed: lazily}, prepared: "0x8009", want: "Postcopy is not supported"},
		"always, but": {o: RestoreOptions{Lazy: migration.LazyAlways, NotPossible: broken, Feed: lazily}, want: broken.Error()},
		"the feed":    {o: RestoreOptions{Lazy: migration.LazyNever, Feed: fails}, prepared: "0x9", finished: "1", want: broken.Error()},
		"the feed, panicking": {o: RestoreOptions{Lazy: migration.LazyNever, Feed: func(_ context.Context, connect func() (*net.UnixConn, error), _ bool, _ func()) error {
			if _, err := connect(); err != nil {
				return err
			}
			panic("a bug")
		}}, prepared: "0x9", finished: "1", want: "internal error: a bug"},
		"in the middle": {d: middle, o: RestoreOptions{Lazy: migration.LazyAlways, Feed: func(ctx context.Context, connect func() (*net.UnixConn, error), lazy bool, opened func()) error {
			if _, err := connect(); err != nil {
				return err
			}
			opened()
			for _, finished := middle.said(); finished == ""; _, finished = middle.said() {
				time.Sleep(time.Millisecond)
			}
			return broken
		}}, prepared: "0x8009", finished: "0", lazy: true, want: migration.ErrServerDied.Error()},
		"recovery": {d: &destination{postcopy: true, hasDomain: true}, o: RestoreOptions{Recover: true, Feed: lazily}, prepared: "0x88001", finished: "0", lazy: true},
	} {
		t.Run(name, func(t *testing.T) {
			d := test.d
			if d == nil {
				d = new(destination)
			}
			ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
			defer cancel()
			t.Setenv("TMPDIR", t.TempDir())
			state := map[bool]string{false: "running", true: "paused"}[d.paused]
			// Told once, whether it was seen running or not: others wait for it.
			told := make(chan string, 9)
			test.o.Running = func(rep migration.ResumeReport) { told <- rep.State }
			rep, err := Restore(ctx, fakeDaemon(t, d.answer), Description{XML: strings.ReplaceAll(exampleXML, "model='dac'", "model='none'"), Cookie: "<cookie>" + exampleCPU + "</cookie>", Persistent: !test.transient}, test.o)
			if test.want != "" && (err == nil || !strings.Contains(err.Error(), test.want)) || test.want == "" && err != nil {
				t.Errorf("error %v", err)
			}
			if prepared, finished := d.said(); prepared != test.prepared || finished != test.finished {
				t.Errorf("prepared %q, finished %q", prepared, finished)
			}
			if rep.Lazy != test.lazy || !strings.Contains(rep.Reason, test.reason) || (rep.Reason == "") != (test.reason == "") {
				t.Errorf("%+v", rep)
			}
			if test.want == "" {
				<-d.got
				if string(d.received) != "stream" || rep.State != state {
					t.Errorf("received %q, %+v", d.received, rep)
				}
				if is := <-told; is != state || len(told) > 0 {
					t.Errorf("told that it is %s, and %d times more", is, len(told))
				}
			}
			if left, _ := filepath.Glob(os.Getenv("TMPDIR") + "/*"); len(left) > 0 {
				t.Errorf("left: %v", left)
			}
		})
	}
}

// TestWatch: the watching does not end while it is being told that the guest runs, and a
// panic of who is told is its error.
func TestWatch(t *testing.T) {
	for _, panics := range []bool{false, true} {
		c, err := open(t.Context(), fakeDaemon(t, (&destination{hasDomain: true}).answer))
		if err != nil {
			t.Fatal(err)
		}
		defer c.close()
		telling, told := make(chan struct{}), false
		r := &restore{client: c, name: "web1", o: RestoreOptions{Running: func(migration.ResumeReport) {
			close(telling)
			if panics {
				panic("a bug")
			}
			time.Sleep(100 * time.Millisecond)
			told = true
		}}}
		end := r.watch(t.Context(), time.Now(), migration.ResumeReport{})
		<-telling
		running, err := end()
		var bug *rescue.Error
		if running == 0 || told == panics || errors.As(err, &bug) != panics {
			t.Errorf("panics %v: told %v, running after %v, %v", panics, told, running, err)
		}
	}
}

// A QEMU whose main loop waits for memory never hears what libvirt tells it.
func TestRecoverStuck(t *testing.T) {
	defer func(d time.Duration) { recoverTime = d }(recoverTime)
	recoverTime = 50 * time.Millisecond
	d := &destination{postcopy: true, hasDomain: true, stuck: make(chan struct{})}
	defer close(d.stuck)
	t.Setenv("TMPDIR", t.TempDir())
	_, err := Restore(t.Context(), fakeDaemon(t, d.answer), Description{XML: strings.ReplaceAll(exampleXML, "model='dac'", "model='none'")}, RestoreOptions{Recover: true})
	if !errors.Is(err, errStuck) {
		t.Errorf("error %v", err)
	}
}

// FuzzDescription takes anything for a stored description: what is accepted makes
// a cookie that is XML.
func FuzzDescription(f *testing.F) {
	f.Add(exampleXML, "<cookie>"+exampleCPU+"</cookie>")
	f.Add("<domain><name>a</name><uuid>b</uuid></domain>", "")
	f.Fuzz(func(t *testing.T, text, saved string) {
		id, err := Description{XML: text}.identity()
		if err != nil {
			return
		}
		id.owner()
		_, _ = parseCapabilities(saved)
		cpu, err := child(saved, "cpu")
		if err != nil {
			return
		}
		c := cookie(id, cpu)
		in := xml.NewDecoder(strings.NewReader(string(c[:len(c)-1])))
		for {
			_, err := in.Token()
			if err == io.EOF {
				return
			}
			if err != nil {
				t.Fatalf("%v in %q", err, c)
			}
		}
	})
}
