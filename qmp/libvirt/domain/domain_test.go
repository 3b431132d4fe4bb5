package domain

import (
	"context"
	"encoding/binary"
	"encoding/json"
	"errors"
	"io"
	"net"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/digitalocean/go-libvirt"
	"go.uber.org/goleak"

	"github.com/flic-migrate/flic-migrate/qmp"
	"github.com/flic-migrate/flic-migrate/qmp/migration"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func TestParseURI(t *testing.T) {
	t.Setenv("XDG_RUNTIME_DIR", "/run/user/7")
	t.Setenv("LIBVIRT_DEFAULT_URI", "")
	for uri, want := range map[string]string{
		"":                                  "qemu:///system /run/libvirt/virtqemud-sock /run/libvirt/libvirt-sock",
		"qemu:///system":                    "qemu:///system /run/libvirt/virtqemud-sock /run/libvirt/libvirt-sock",
		"qemu:///session":                   "qemu:///session /run/user/7/libvirt/virtqemud-sock /run/user/7/libvirt/libvirt-sock",
		"qemu+unix:///system?socket=/tmp/s": "qemu:///system /tmp/s",
	} {
		driver, sockets, err := parseURI(uri)
		if got := strings.Join(append([]string{string(driver)}, sockets...), " "); err != nil || got != want {
			t.Errorf("%q: %s, %v", uri, got, err)
		}
	}
	for uri, want := range map[string]string{
		"qemu+ssh://host/system": "another machine",
		"qemu://host/system":     "another machine",
		"qemu+tcp:///system":     "another machine",
		"xen:///system":          "only QEMU",
		"/run/libvirt.sock":      "only QEMU",
		"qemu:///embed":          "must be",
		"qemu://%zz":             "URI",
	} {
		if _, _, err := parseURI(uri); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%q: %v, want %q", uri, err, want)
		}
	}
	t.Setenv("LIBVIRT_DEFAULT_URI", "qemu:///session")
	if driver, _, err := parseURI(""); err != nil || driver != libvirt.QEMUSession {
		t.Errorf("%s, %v", driver, err)
	}
}

// pair is a connected pair of Unix sockets.
func pair(t *testing.T) (a, b *net.UnixConn) {
	t.Helper()
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: filepath.Join(t.TempDir(), "s"), Net: "unix"})
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	c, err := net.Dial("unix", l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	b, err = l.AcceptUnix()
	if err != nil {
		t.Fatal(err)
	}
	a = c.(*net.UnixConn)
	t.Cleanup(func() { a.Close(); b.Close() })
	return a, b
}

// packet is a call as go-libvirt writes it.
func packet(program, procedure uint32, payload string) []byte {
	be := binary.BigEndian
	var b []byte
	for _, v := range []uint32{uint32(28 + len(payload)), program, 1, procedure, 0, 42, 0} {
		b = be.AppendUint32(b, v)
	}
	return append(b, payload...)
}

func TestFileConn(t *testing.T) {
	ours, theirs := pair(t)
	c := &fileConn{UnixConn: ours}
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	defer w.Close()
	c.give(w)
	// Other calls and other programs leave the file where it is.
	other, plain := packet(qemuProgram, 1, "abcd"), packet(0x20008086, 7, "abcd")
	call := packet(qemuProgram, 7, "abcd")
	for _, p := range [][]byte{other, plain, call, call} {
		if n, err := c.Write(p); n != len(p) || err != nil {
			t.Fatalf("%d, %v", n, err)
		}
	}
	with := packet(qemuProgram, 7, "\x00\x00\x00\x01abcd")
	with[19] = 4
	want := string(other) + string(plain) + string(with) + "\x00" + string(call)
	relay := &relay{ours: theirs}
	got := make([]byte, len(want))
	if _, err := io.ReadFull(fileReader{relay}, got); err != nil {
		t.Fatal(err)
	}
	if string(got) != want {
		t.Errorf("sent\n%q, want\n%q", got, want)
	}
	if len(relay.files) != 1 {
		t.Fatalf("%d files", len(relay.files))
	}
	defer relay.files[0].Close()
	if _, err := relay.files[0].WriteString("x"); err != nil {
		t.Error(err)
	}
	if b := make([]byte, 1); mustRead(t, r, b) != "x" {
		t.Errorf("the file is another one: %q", b)
	}
}

func mustRead(t *testing.T, r io.Reader, b []byte) string {
	t.Helper()
	if _, err := io.ReadFull(r, b); err != nil {
		t.Fatal(err)
	}
	return string(b)
}

func TestSpawns(t *testing.T) {
	for args, want := range map[string]bool{
		`{"uri":"exec:cat"}`:       true,
		`{"uri":"unix:/tmp/exec"}`: false,
		`{"uri":"fd:exec:"}`:       false,
		`{"uri":7}`:                true,
		``:                         true,
	} {
		if got := spawns(json.RawMessage(args)); got != want {
			t.Errorf("%s: %v", args, got)
		}
	}
}

// fakeDaemon answers go-libvirt's calls as libvirtd does, as far as these tests
// need: result gives an answer by program and procedure, or libvirt's error.
func fakeDaemon(t *testing.T, result func(program, procedure uint32, args []byte) (string, *libvirt.Error)) (uri string) {
	t.Helper()
	name := filepath.Join(t.TempDir(), "s")
	l, err := net.Listen("unix", name)
	if err != nil {
		t.Fatal(err)
	}
	done := make(chan struct{})
	t.Cleanup(func() { l.Close(); <-done })
	go func() {
		defer close(done)
		for {
			conn, err := l.Accept()
			if err != nil {
				return
			}
			serveRPC(conn, result)
			conn.Close()
		}
	}()
	return "qemu:///system?socket=" + name
}

func serveRPC(conn net.Conn, result func(program, procedure uint32, args []byte) (string, *libvirt.Error)) {
	be := binary.BigEndian
	for {
		head := make([]byte, 28)
		if _, err := io.ReadFull(conn, head); err != nil {
			return
		}
		args := make([]byte, be.Uint32(head)-28)
		if _, err := io.ReadFull(conn, args); err != nil {
			return
		}
		if be.Uint32(head[typeAt:]) == callWithFilesType {
			// A byte comes with each file, and there is one.
			if _, err := io.ReadFull(conn, make([]byte, 1)); err != nil {
				return
			}
		}
		payload, refused := result(be.Uint32(head[4:]), be.Uint32(head[12:]), args)
		status := uint32(0)
		if refused != nil {
			// virNetMessageError: code, domain, message, level and more.
			status = 1
			payload = word(refused.Code) + word(0) + word(1) + text(refused.Message) + word(2) + word(0) + word(0) + word(0) + word(0) + word(0) + word(0) + word(0)
		}
		be.PutUint32(head[16:], 1) // a reply
		be.PutUint32(head[24:], status)
		be.PutUint32(head, uint32(28+len(payload)))
		if _, err := conn.Write(append(head, payload...)); err != nil {
			return
		}
	}
}

func word(v uint32) string { return string(binary.BigEndian.AppendUint32(nil, v)) }

// text is XDR's string.
func text(s string) string {
	return word(uint32(len(s))) + s + strings.Repeat("\x00", (4-len(s)%4)%4)
}

// The procedures that a dial needs (src/remote/remote_protocol.x).
const (
	authList, connectOpen, lookupByName, isActive, jobInfo = 66, 1, 23, 150, 163
	monitorCommand, registerEvents                         = 1, 4
)

// web1 is a daemon with one running domain, whose QEMU gives these answers.
func web1(job, active uint32, answers map[string]string) func(program, procedure uint32, args []byte) (string, *libvirt.Error) {
	return func(program, procedure uint32, args []byte) (string, *libvirt.Error) {
		if program == qemuProgram {
			switch procedure {
			case monitorCommand:
				for command, a := range answers {
					if strings.Contains(string(args), `"`+command+`"`) {
						return text(a), nil
					}
				}
				return "", &libvirt.Error{Code: uint32(libvirt.ErrOperationTimeout), Message: "cannot acquire state change lock"}
			case registerEvents:
				return word(7), nil
			}
		}
		switch procedure {
		case authList:
			return word(0), nil
		case connectOpen:
			return "", nil
		case lookupByName:
			if !strings.Contains(string(args), "web1") {
				return "", &libvirt.Error{Code: uint32(libvirt.ErrNoDomain), Message: "no domain"}
			}
			return text("web1") + strings.Repeat("u", 16) + word(1), nil
		case isActive:
			return word(active), nil
		case jobInfo:
			return word(job) + strings.Repeat("\x00", 11*8), nil
		}
		return "", &libvirt.Error{Code: 38, Message: "not here"}
	}
}

var version = map[string]string{
	"query-version": `{"return":{"qemu":{"major":7,"minor":2,"micro":22},"package":""},"id":"libvirt-1"}`,
	"query-status":  `{"return":{"running":true,"status":"running"},"id":"libvirt-2"}`,
	"migrate":       `{"id":"libvirt-3","error":{"class":"GenericError","desc":"no"}}`,
}

func TestDialRefuses(t *testing.T) {
	for name, test := range map[string]struct {
		domain string
		daemon func(program, procedure uint32, args []byte) (string, *libvirt.Error)
		want   error
	}{
		"unknown":     {"web2", web1(0, 1, version), ErrNotFound},
		"shut off":    {"web1", web1(0, 0, version), ErrInactive},
		"being saved": {"web1", web1(2, 1, version), ErrJob},
		"busy":        {"web1", web1(0, 1, nil), ErrJob},
	} {
		if _, err := Dial(t.Context(), fakeDaemon(t, test.daemon), test.domain); !errors.Is(err, test.want) {
			t.Errorf("%s: %v", name, err)
		}
	}
	if _, err := Dial(t.Context(), "qemu:///system?socket=/nonexistent", "web1"); err == nil {
		t.Error("dialled nothing")
	}
	// A daemon that accepts and says nothing.
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	l, err := net.Listen("unix", filepath.Join(t.TempDir(), "s"))
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	if _, err := Dial(ctx, "qemu:///system?socket="+l.Addr().String(), "web1"); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("silence: %v", err)
	}
}

func TestMonitor(t *testing.T) {
	m, err := Dial(t.Context(), fakeDaemon(t, web1(0, 1, version)), "web1")
	if err != nil {
		t.Fatal(err)
	}
	defer m.Close()
	if v := m.Version(); v.QEMU.Major != 7 {
		t.Errorf("version %v", v)
	}
	if s, err := qmp.QueryStatus(t.Context(), m); err != nil || !s.Running {
		t.Errorf("%+v, %v", s, err)
	}
	var refused *qmp.Error
	if err := migration.Start(t.Context(), m, "unix:/x"); !errors.As(err, &refused) || refused.Desc != "no" {
		t.Errorf("QEMU's refusal: %v", err)
	}
	// At the other end is this process.
	if peer, known := m.Peer(); known {
		t.Errorf("QEMU is %+v", peer)
	}
	// What would end the QEMU does not reach the daemon, and what libvirt
	// refuses is no lost monitor.
	for _, send := range []func() error{
		func() error { return migration.Start(t.Context(), m, "exec:cat") },
		func() error { return migration.Incoming(t.Context(), m, "exec:cat") },
	} {
		if err := send(); !errors.As(err, &refused) || !strings.Contains(refused.Desc, "spawn=deny") {
			t.Errorf("exec: %v", err)
		}
	}
	if err := migration.Cancel(t.Context(), m); !errors.As(err, &refused) || !strings.Contains(err.Error(), "state change lock") {
		t.Errorf("libvirt's refusal: %v", err)
	}
}

// filename is that of a pmemsave.
var filename = regexp.MustCompile(`"filename":"([^"]+)"`)

// A libvirt that hands on no files leaves the stream a socket.
func TestNoFiles(t *testing.T) {
	m, err := Dial(t.Context(), fakeDaemon(t, func(program, procedure uint32, args []byte) (string, *libvirt.Error) {
		if program == qemuProgram && procedure == monitorWithFiles {
			return "", &libvirt.Error{Code: 39, Message: "unknown procedure: 7"}
		}
		if m := filename.FindSubmatch(args); m != nil {
			if err := os.WriteFile(string(m[1]), nil, 0o600); err != nil {
				t.Error(err)
			}
			return text(`{"return":{}}`), nil
		}
		return web1(0, 1, version)(program, procedure, args)
	}), "web1")
	if err != nil {
		t.Fatal(err)
	}
	defer m.Close()
	c, err := migration.OpenChannel(t.Context(), m, migration.OneWay)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Discard(t.Context())
	if !strings.HasPrefix(c.URI, "unix:") {
		t.Errorf("the channel is %s", c.URI)
	}
}

// An answer that is no object is refused, and the monitor lives on.
func TestAnswerNull(t *testing.T) {
	m, err := Dial(t.Context(), fakeDaemon(t, func(program, procedure uint32, args []byte) (string, *libvirt.Error) {
		if strings.Contains(string(args), "query-migrate") {
			return text("null"), nil
		}
		return web1(0, 1, version)(program, procedure, args)
	}), "web1")
	if err != nil {
		t.Fatal(err)
	}
	defer m.Close()
	var refused *qmp.Error
	if _, err := migration.Query(t.Context(), m); !errors.As(err, &refused) {
		t.Errorf("null: %v", err)
	}
	if s, err := qmp.QueryStatus(t.Context(), m); err != nil || !s.Running {
		t.Errorf("afterwards: %+v, %v", s, err)
	}
}

// A daemon that ends, and a QEMU that ends, are lost monitors.
func TestMonitorLost(t *testing.T) {
	active := uint32(1)
	m, err := Dial(t.Context(), fakeDaemon(t, func(program, procedure uint32, args []byte) (string, *libvirt.Error) {
		if strings.Contains(string(args), "query-status") {
			active = 0
		}
		answers := map[string]string{"query-version": version["query-version"]}
		return web1(0, active, answers)(program, procedure, args)
	}), "web1")
	if err != nil {
		t.Fatal(err)
	}
	defer m.Close()
	if _, err := qmp.QueryStatus(t.Context(), m); !errors.Is(err, qmp.ErrLost) {
		t.Errorf("QEMU has ended: %v", err)
	}
	<-m.Done()
}
