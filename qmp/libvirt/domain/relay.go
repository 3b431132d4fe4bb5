package domain

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"strings"
	"sync"
	"time"

	"github.com/digitalocean/go-libvirt"
	"golang.org/x/sys/unix"

	"github.com/flic-migrate/flic-migrate/qmp"
	"github.com/flic-migrate/flic-migrate/tier/rescue"
)

// commandTime is how long most calls may take. libvirt itself waits for 30 s if
// it is busy with the domain, and its error says with what.
const commandTime = 45 * time.Second

// relayTime is how long libvirt may take for one command before its daemon is taken
// to be lost: longer than anybody waits for it.
const relayTime = 2 * commandTime

// Dial returns a monitor of a running domain. Commands and events take the way
// through libvirt's daemon; if that ends, so does the monitor (with
// qmp.ErrLost), and the domain runs on. The context bounds dialling only.
//
// The domain is tainted by it (custom-monitor), which is a word in its log.
func Dial(ctx context.Context, uri, name string) (*qmp.Monitor, error) {
	c, err := open(ctx, uri)
	if err != nil {
		return nil, err
	}
	r := &relay{client: c}
	if r.dom, err = c.lookup(ctx, name); err == nil {
		err = r.start(ctx)
	}
	if err != nil {
		c.close()
		return nil, err
	}
	conn, err := r.conn()
	if err != nil {
		c.close()
		return nil, err
	}
	return qmp.New(ctx, conn, "libvirt domain "+name, qmp.Options{Timeout: commandTime, Greeting: commandTime, Relayed: true})
}

// relay is a QMP server in this process: what it is asked it asks libvirt. So a
// domain's monitor is a qmp.Monitor like any other.
//
//	qmp.Monitor ◄─ socket pair ─► relay ◄─ libvirt's RPC ─► libvirtd ◄─► QEMU
type relay struct {
	*client
	dom     libvirt.Domain
	version json.RawMessage
	events  <-chan libvirt.DomainEvent

	ours  *net.UnixConn
	files []*os.File // have come, and wait for their getfd; the reader's

	mu sync.Mutex // for writing
}

// start asks what the greeting needs, and for events.
func (r *relay) start(ctx context.Context) error {
	answer, err := ask(ctx, r.client, "query-version", func() (string, error) {
		return r.rpc.QEMUDomainMonitorCommand(r.dom, `{"execute":"query-version"}`, 0)
	})
	if err != nil {
		return err
	}
	var v struct {
		Return json.RawMessage `json:"return"`
	}
	if err := json.Unmarshal([]byte(answer), &v); err != nil {
		return fmt.Errorf("%w: %w", qmp.ErrProtocol, err)
	}
	r.version = v.Return
	// For as long as the connection lives: go-libvirt stands still if an event
	// comes while a subscription is being given up.
	r.events, err = ask(ctx, r.client, "subscribe to events", func() (<-chan libvirt.DomainEvent, error) {
		return r.rpc.SubscribeQEMUEvents(context.Background(), r.dom.Name)
	})
	return err
}

// conn starts the relay and returns the monitor's end.
func (r *relay) conn() (net.Conn, error) {
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, err
	}
	var ends [2]net.Conn
	for i, fd := range fds {
		f := os.NewFile(uintptr(fd), "monitor")
		ends[i], err = net.FileConn(f)
		f.Close()
		if err != nil {
			if i == 1 {
				ends[0].Close()
			} else {
				unix.Close(fds[1])
			}
			return nil, err
		}
	}
	r.ours = ends[0].(*net.UnixConn)
	go r.sendEvents()
	go r.serve()
	return ends[1], nil
}

// sendEvents ends with the connection to libvirt, and ends the monitor's.
func (r *relay) sendEvents() {
	defer r.ours.Close()
	for e := range r.events {
		line := map[string]any{
			"event":     e.Event,
			"timestamp": map[string]any{"seconds": e.Seconds, "microseconds": e.Microseconds},
		}
		if json.Valid(e.Details) {
			line["data"] = json.RawMessage(e.Details)
		}
		r.send(line)
	}
}

// send ignores errors: a monitor that is closed is found by reading.
func (r *relay) send(message any) {
	b, err := json.Marshal(message)
	if err != nil {
		return
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	_, _ = r.ours.Write(append(b, '\n'))
}

// request is a command as qmp.Monitor sends it.
type request struct {
	Execute   string          `json:"execute"`
	Arguments json.RawMessage `json:"arguments,omitempty"`
	ID        json.RawMessage `json:"id,omitempty"`
}

// serve answers commands, one after the other, until either side ends.
func (r *relay) serve() {
	defer func() {
		r.close() // ends the events, too
		r.ours.Close()
		for _, f := range r.files {
			f.Close()
		}
	}()
	r.send(map[string]any{"QMP": map[string]any{"version": r.version, "capabilities": []string{}}})
	in := json.NewDecoder(fileReader{r})
	for {
		var q request
		if in.Decode(&q) != nil {
			return
		}
		// go-libvirt waits for an answer as long as there is a connection, and no other
		// command would get through meanwhile.
		limit := time.AfterFunc(relayTime, r.close)
		var answer answer
		err := rescue.Call(func() (err error) {
			answer, err = r.answer(q)
			return err
		})
		gone := err != nil && !r.active()
		limit.Stop()
		if gone {
			return // to the monitor QEMU is gone
		}
		if err != nil {
			answer = refusal("LibvirtError", err.Error())
		}
		answer["id"] = q.ID
		r.send(answer)
	}
}

type answer = map[string]any

func refusal(class, desc string) answer {
	return answer{"error": map[string]string{"class": class, "desc": desc}}
}

// active tells whether the domain still has a QEMU.
func (r *relay) active() bool {
	active, err := r.rpc.DomainIsActive(r.dom)
	return err == nil && active != 0
}

// answer has one command carried out. An error is libvirt's; QEMU's is an
// answer.
func (r *relay) answer(q request) (answer, error) {
	done := answer{"return": struct{}{}}
	switch q.Execute {
	case "qmp_capabilities":
		return done, nil // was done by libvirt
	case "migrate", "migrate-incoming", "migrate-recover":
		if spawns(q.Arguments) {
			return refusal("GenericError", ErrExec.Error()), nil
		}
	case "getfd":
		return r.passFile(q)
	// These libvirt does itself, which keeps its view of the domain right and
	// takes and gives back locks on disks. What it finds done already it does
	// not do, so QEMU is told as well.
	case "stop":
		if err := r.rpc.DomainSuspend(r.dom); err != nil {
			return nil, err
		}
	case "cont":
		if err := r.rpc.DomainResume(r.dom); err != nil {
			return nil, err
		}
	case "quit":
		// QEMU's own quit would look like a crash.
		return done, r.rpc.DomainDestroyFlags(r.dom, 0)
	}
	return r.command(q, func(line string) (string, error) {
		return r.rpc.QEMUDomainMonitorCommand(r.dom, line, 0)
	})
}

// command sends a command on; libvirt gives it an id of its own.
func (r *relay) command(q request, call func(line string) (string, error)) (answer, error) {
	q.ID = nil
	line, err := json.Marshal(q)
	if err != nil {
		return nil, err
	}
	text, err := call(string(line))
	if err != nil {
		return nil, err
	}
	var a answer
	if err := json.Unmarshal([]byte(text), &a); err != nil {
		return nil, fmt.Errorf("%w: %w", qmp.ErrProtocol, err)
	}
	if a == nil {
		return nil, fmt.Errorf("%w: the answer is null", qmp.ErrProtocol)
	}
	return a, nil
}

// passFile hands on the file that came with the command. libvirt can since 8.2.
func (r *relay) passFile(q request) (answer, error) {
	if len(r.files) == 0 {
		return refusal("GenericError", "no file has come with it"), nil
	}
	f := r.files[0]
	r.files = r.files[1:]
	defer f.Close()
	a, err := r.command(q, func(line string) (string, error) {
		r.client.conn.give(f)
		defer r.client.conn.take()
		return r.rpc.QEMUDomainMonitorCommandWithFiles(r.dom, line, 0)
	})
	if errors.Is(err, libvirt.ErrUnsupported) {
		return refusal("CommandNotFound", "this libvirt hands on no files"), nil
	}
	return a, err
}

// spawns tells whether a migration command would have QEMU start a process.
func spawns(arguments json.RawMessage) bool {
	// Newer QEMUs have another way to say it, "channels" with "transport":
	// "exec"; nothing of ours uses that.
	var a struct {
		URI string `json:"uri"`
	}
	return json.Unmarshal(arguments, &a) != nil || strings.HasPrefix(a.URI, "exec:")
}

// fileReader reads from the monitor's end and keeps the files that come along.
// They are in the order of their commands, of which each has one.
type fileReader struct{ r *relay }

func (f fileReader) Read(b []byte) (int, error) {
	oob := make([]byte, unix.CmsgSpace(4*4))
	n, nOOB, _, _, err := f.r.ours.ReadMsgUnix(b, oob)
	messages, e := unix.ParseSocketControlMessage(oob[:nOOB])
	if e == nil {
		for _, m := range messages {
			fds, e := unix.ParseUnixRights(&m)
			if e != nil {
				continue
			}
			for _, fd := range fds {
				unix.CloseOnExec(fd)
				f.r.files = append(f.r.files, os.NewFile(uintptr(fd), "passed"))
			}
		}
	}
	if n == 0 && err == nil && len(b) > 0 {
		err = io.EOF
	}
	return n, err
}
