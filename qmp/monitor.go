// Package qmp speaks the QEMU Machine Protocol: monitor commands and events.
//
// The wire (docs/interop/qmp-spec.txt in QEMU) is a sequence of JSON objects:
//
//	QEMU → {"QMP": {"version": ..., "capabilities": ["oob"]}}     greeting
//	   us → {"execute": "qmp_capabilities", "id": 1}              negotiation
//	QEMU → {"return": {}, "id": 1}
//	   us → {"execute": "query-status", "id": 2}
//	QEMU → {"event": "STOP", "timestamp": {...}}                  at any time
//	QEMU → {"return": {...}, "id": 2}  or  {"error": {...}, "id": 2}
//
// A [Monitor] is one such connection. Whatever is built on it, here and in the
// packages below, takes any [Executor], so that it works over another transport as
// well:
//
//	migration            what is done with migrations: track, checkpoint, resume
//	libvirt/domain       the QEMUs that libvirt runs
//	libvirt/saveimage    its save files
//	libvirt/compressor   its way to call a compressor for them
package qmp

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	goqemu "github.com/digitalocean/go-qemu/qmp"
	"golang.org/x/sys/unix"

	"github.com/flic-migrate/flic-migrate/tier/rescue"
)

// The types of go-qemu, under the names this module's users see.
type (
	// Event is something QEMU reports by itself: STOP, MIGRATION, ...
	Event = goqemu.Event
	// Version is QEMU's version from the greeting.
	Version = goqemu.Version
)

// Executor runs commands on a QEMU. Besides [Monitor] it can be libvirt's way
// to a domain's monitor, which nobody else may hold.
type Executor interface {
	// Execute runs one command. args is marshalled to its arguments (nil for
	// none), and what QEMU returns is unmarshalled into result (nil to ignore
	// it). A refusal by QEMU is an *Error.
	Execute(ctx context.Context, command string, args, result any) error
	// Events delivers the events from now on, until ctx ends or the connection
	// is lost; then the channel is closed. A reader that is too slow loses the
	// oldest events, never the newest.
	Events(ctx context.Context) (<-chan Event, error)
}

// FilePasser is an Executor that can hand open files to QEMU.
type FilePasser interface {
	// PassFile gives QEMU a duplicate of f, which "fd:NAME" then means on this
	// connection (getfd in QEMU's qapi/misc.json). A connection that can't
	// carry files fails with ErrNoFiles, one whose other end takes none with
	// an *Error.
	PassFile(ctx context.Context, name string, f *os.File) error
}

const (
	// defaultGreeting is how long QEMU may take to greet. A QEMU that serves its
	// monitor does so in milliseconds.
	defaultGreeting = 5 * time.Second
	// defaultTimeout is how long a call may take whose context has no deadline.
	defaultTimeout = 30 * time.Second
	// defaultMaxMessage caps one message from QEMU. The largest seen are the
	// schema (200 KB) and human-monitor-command dumps of some tens of MB.
	defaultMaxMessage = 128 << 20
	// MaxSocketPath is how long the path of a Unix socket may be in bytes (unix(7)).
	MaxSocketPath = len(unix.RawSockaddrUnix{}.Path) - 1
	// eventBuffer is how many events wait for a slow reader. A live migration
	// of a busy guest sends a few a second.
	eventBuffer = 256
)

// Options change how a Monitor behaves; the zero value is good.
type Options struct {
	// Greeting is the time for QEMU's greeting and negotiation; 0 means 5 s.
	Greeting time.Duration
	// Timeout is for calls whose context has no deadline; 0 means 30 s.
	Timeout time.Duration
	// MaxMessage is the size in bytes above which a message from QEMU ends the
	// connection; 0 means 128 MiB.
	MaxMessage int
	// OOB asks for out-of-band execution, which ExecuteOOB needs. QEMU then
	// queues up to eight commands instead of one.
	OOB bool
	// IfOffered lets a monitor without OOB do.
	IfOffered bool
	// Relayed: who is at the other end hands on what QEMU says, and is no Peer.
	Relayed bool
}

// Monitor is a connection to a QEMU's monitor socket. It may be used by many
// goroutines at the same time.
//
// Two goroutines own the connection, one for each direction: the reader takes
// every message off the socket as it comes, so that QEMU is never held up by
// events nobody reads or by an answer nobody waits for any more; the writer
// finishes a command once begun, so that a call given up in the middle cannot
// leave half a command on the wire.
type Monitor struct {
	conn    net.Conn
	addr    string
	options Options

	version      Version
	capabilities []string

	out  chan outgoing // to the writer; a call not yet taken is never sent
	done chan struct{} // closed when the connection is lost or closed

	lostEvents atomic.Uint64

	mu      sync.Mutex
	err     error // why done is closed
	nextID  uint64
	waiting map[uint64]chan reply // calls by id
	readers map[*eventReader]struct{}
}

// reply is what a call gets: one of the fields is set.
type reply struct {
	Return json.RawMessage `json:"return"`
	Error  *struct {
		Class string `json:"class"`
		Desc  string `json:"desc"`
	} `json:"error"`
}

// outgoing is commands on their way. The writer owns the file, which travels
// with the first byte, and closes it.
type outgoing struct {
	line []byte
	file *os.File // nil but for getfd
}

type eventReader struct{ ch chan Event }

var (
	_ Executor       = (*Monitor)(nil)
	_ FilePasser     = (*Monitor)(nil)
	_ goqemu.Monitor = (*Monitor)(nil)
)

// Dial connects to a monitor and negotiates. The address is the path of a Unix
// socket or HOST:PORT; "unix:" and "tcp:" before it say so explicitly. The
// context bounds dialling and negotiation only; the error is an *OpError, and
// [ErrBusy] is in it if another client holds the monitor.
func Dial(ctx context.Context, address string, options Options) (*Monitor, error) {
	network, addr := splitAddress(address)
	var dialer net.Dialer
	conn, err := dialer.DialContext(ctx, network, addr)
	switch {
	case errors.Is(err, syscall.EAGAIN):
		// QEMU does not accept while it has a client, and listens with a queue
		// of one: the second client waits there, the third is turned away.
		return nil, &OpError{Op: "connect", Addr: address, Err: ErrBusy}
	case errors.Is(err, syscall.EINVAL) && network == "unix" && len(addr) > MaxSocketPath:
		return nil, &OpError{Op: "connect", Addr: address, Err: fmt.Errorf("the path of a Unix socket can have at most %d bytes", MaxSocketPath)}
	case err != nil:
		return nil, &OpError{Op: "connect", Addr: address, Err: err}
	}
	return New(ctx, conn, address, options)
}

// New negotiates on a connection that is already there; it owns conn from then
// on, also when it fails. The address is for error messages only.
func New(ctx context.Context, conn net.Conn, address string, options Options) (*Monitor, error) {
	if options.Greeting <= 0 {
		options.Greeting = defaultGreeting
	}
	if options.Timeout <= 0 {
		options.Timeout = defaultTimeout
	}
	if options.MaxMessage <= 0 {
		options.MaxMessage = defaultMaxMessage
	}
	m := &Monitor{
		conn:    conn,
		addr:    address,
		options: options,
		out:     make(chan outgoing),
		done:    make(chan struct{}),
		waiting: make(map[uint64]chan reply),
		readers: make(map[*eventReader]struct{}),
	}
	in := newDecoder(conn, options.MaxMessage)
	if err := m.greet(ctx, in); err != nil {
		conn.Close()
		return nil, &OpError{Op: "connect", Addr: address, Err: err}
	}
	go m.read(in)
	go m.write()

	negotiation, cancel := context.WithTimeout(ctx, options.Greeting)
	defer cancel()
	var args any
	if m.options.OOB {
		args = map[string]any{"enable": []string{"oob"}}
	}
	if err := m.Execute(negotiation, "qmp_capabilities", args, nil); err != nil {
		m.Close()
		return nil, err
	}
	return m, nil
}

// greet reads the greeting. It comes before anything else, so it is read here,
// without the reader goroutine, and what failed is plain.
func (m *Monitor) greet(ctx context.Context, in *decoder) error {
	// The deadline on the socket is the only way to end a read.
	if err := m.conn.SetReadDeadline(time.Now().Add(m.options.Greeting)); err != nil {
		return err
	}
	stop := context.AfterFunc(ctx, func() { _ = m.conn.SetReadDeadline(time.Unix(1, 0)) })
	defer stop()
	raw, err := in.next()
	var timeout net.Error
	switch {
	case ctx.Err() != nil:
		return ctx.Err()
	case errors.As(err, &timeout) && timeout.Timeout():
		return fmt.Errorf("%w: no greeting within %v", ErrBusy, m.options.Greeting)
	case errors.Is(err, io.EOF):
		return errors.New("closed before the greeting: not a QMP monitor, or QEMU has ended")
	case err != nil && in.human():
		return ErrHumanMonitor
	case err != nil:
		return readError(err)
	}
	var greeting struct {
		QMP *struct {
			Version      Version           `json:"version"`
			Capabilities []json.RawMessage `json:"capabilities"`
		} `json:"QMP"`
	}
	if err := json.Unmarshal(raw, &greeting); err != nil || greeting.QMP == nil {
		return fmt.Errorf("%w: %s instead of a greeting", ErrProtocol, shorten(raw))
	}
	m.version = greeting.QMP.Version
	for _, c := range greeting.QMP.Capabilities {
		var name string
		if json.Unmarshal(c, &name) == nil {
			m.capabilities = append(m.capabilities, name)
		}
	}
	if m.options.OOB && !m.offers("oob") {
		if !m.options.IfOffered {
			return errors.New("this monitor offers no out-of-band execution")
		}
		m.options.OOB = false
	}
	if !stop() {
		return ctx.Err()
	}
	return m.conn.SetReadDeadline(time.Time{})
}

func (m *Monitor) offers(capability string) bool {
	for _, c := range m.capabilities {
		if c == capability {
			return true
		}
	}
	return false
}

// Version returns QEMU's version.
func (m *Monitor) Version() Version { return m.version }

// Address is where the monitor is, as it was given to Dial.
func (m *Monitor) Address() string { return m.addr }

// OOB tells whether ExecuteOOB can be used on this connection.
func (m *Monitor) OOB() bool { return m.options.OOB }

// SocketPath is the path of the monitor's Unix socket, and empty for another kind
// of monitor.
func (m *Monitor) SocketPath() string {
	path, _ := SocketPath(m.addr)
	return path
}

// SocketPath is the path in an address of Dial's that is a Unix socket's.
func SocketPath(address string) (path string, ok bool) {
	if network, path := splitAddress(address); network == "unix" {
		return path, true
	}
	return "", false
}

// Peer is who listens at the other end of a Unix socket. It is not known of another
// kind of monitor, nor of one that is relayed.
func (m *Monitor) Peer() (peer unix.Ucred, known bool) {
	conn, ok := m.conn.(*net.UnixConn)
	if !ok || m.options.Relayed {
		return peer, false
	}
	return PeerOf(conn)
}

// PeerOf is who is at the other end of a Unix socket (SO_PEERCRED in unix(7)).
func PeerOf(conn *net.UnixConn) (peer unix.Ucred, known bool) {
	raw, err := conn.SyscallConn()
	if err != nil {
		return peer, false
	}
	_ = raw.Control(func(fd uintptr) {
		if c, err := unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED); err == nil {
			peer, known = *c, true
		}
	})
	return peer, known
}

// Execute runs one command and waits for its answer, until ctx ends or, if ctx
// has no deadline, for Options.Timeout. A call that is given up may still be
// carried out by QEMU; its answer is dropped.
func (m *Monitor) Execute(ctx context.Context, command string, args, result any) error {
	return m.execute(ctx, "execute", command, args, result, nil)
}

// PassFile implements [FilePasser]; the monitor must be a Unix socket.
func (m *Monitor) PassFile(ctx context.Context, name string, f *os.File) error {
	if _, ok := m.conn.(*net.UnixConn); !ok {
		return &OpError{Op: "getfd", Addr: m.addr, Err: ErrNoFiles}
	}
	// A duplicate, because a call that is given up may yet be sent, when the
	// caller has closed f and its number means another file.
	fd, err := unix.FcntlInt(f.Fd(), unix.F_DUPFD_CLOEXEC, 0)
	if err != nil {
		return &OpError{Op: "getfd", Addr: m.addr, Err: err}
	}
	return m.execute(ctx, "execute", "getfd", map[string]any{"fdname": name}, nil, os.NewFile(uintptr(fd), name))
}

// ExecuteOOB runs a command that QEMU carries out ahead of those that wait in
// its queue and even while its main loop is busy. Only few commands can be run
// so (migrate-recover, migrate-pause), and only with Options.OOB.
func (m *Monitor) ExecuteOOB(ctx context.Context, command string, args, result any) error {
	if !m.options.OOB {
		return &OpError{Op: command, Addr: m.addr, Err: errors.New("out-of-band execution was not asked for")}
	}
	return m.execute(ctx, "exec-oob", command, args, result, nil)
}

// execute owns the file, which goes with the command.
func (m *Monitor) execute(ctx context.Context, how, command string, args, result any, file *os.File) error {
	ctx, cancel := m.bounded(ctx)
	defer cancel()
	q, err := m.question(how, command, args)
	if err == nil {
		defer m.forget(q.id)
		err = m.post(ctx, outgoing{q.line, file})
	} else {
		file.Close() // of nil is an error that nobody wants to know
	}
	if err != nil {
		return &OpError{Op: command, Addr: m.addr, Err: err}
	}
	return m.hear(ctx, q, result)
}

// together is Together's.
func (m *Monitor) together(ctx context.Context, calls []Call) []error {
	ctx, cancel := m.bounded(ctx)
	defer cancel()
	errs := make([]error, len(calls))
	questions := make([]question, len(calls))
	var lines []byte
	for i, c := range calls {
		if questions[i], errs[i] = m.question("execute", c.Command, c.Args); errs[i] == nil {
			defer m.forget(questions[i].id)
			lines = append(lines, questions[i].line...)
		}
	}
	unsent := m.post(ctx, outgoing{line: lines})
	for i, c := range calls {
		if errs[i] == nil {
			errs[i] = unsent
		}
		if errs[i] != nil {
			errs[i] = &OpError{Op: c.Command, Addr: m.addr, Err: errs[i]}
			continue
		}
		errs[i] = m.hear(ctx, questions[i], c.Result)
	}
	return errs
}

// bounded is a context with a deadline.
func (m *Monitor) bounded(ctx context.Context) (context.Context, context.CancelFunc) {
	if _, ok := ctx.Deadline(); ok {
		return ctx, func() {}
	}
	return context.WithTimeout(ctx, m.options.Timeout)
}

// question is a command for which there is a place for the answer.
type question struct {
	command string
	id      uint64
	line    []byte
	answer  <-chan reply
}

// question makes one. Its id is to be forgotten.
func (m *Monitor) question(how, command string, args any) (q question, err error) {
	message := map[string]any{how: command}
	if args != nil {
		message["arguments"] = args
	}
	q.command = command
	if q.id, q.answer, err = m.expect(); err != nil {
		return q, err
	}
	message["id"] = q.id
	line, err := json.Marshal(message)
	if err != nil {
		m.forget(q.id)
		return q, err
	}
	q.line = append(line, '\n')
	return q, nil
}

// post hands commands to the writer, with the file, which is closed in any case.
func (m *Monitor) post(ctx context.Context, o outgoing) error {
	err := ctx.Err() // the select below would not always see it
	if err == nil {
		select {
		case m.out <- o:
			return nil
		case <-m.done:
			err = m.Err()
		case <-ctx.Done():
			err = unanswered(ctx, "not sent, the ones before it are not taken")
		}
	}
	o.file.Close() // of nil is an error that nobody wants to know
	return err
}

// hear waits for the answer to a question.
func (m *Monitor) hear(ctx context.Context, q question, result any) error {
	fail := func(err error) error { return &OpError{Op: q.command, Addr: m.addr, Err: err} }
	var r reply
	select {
	case r = <-q.answer:
	case <-m.done:
		// An answer that came just before the end still counts: quit's does.
		select {
		case r = <-q.answer:
		default:
			return fail(m.Err())
		}
	case <-ctx.Done():
		return fail(unanswered(ctx, "no answer; QEMU leaves its monitor unserved while an exec: child is slow to end"))
	}
	if r.Error != nil {
		return &Error{Command: q.command, Class: r.Error.Class, Desc: r.Error.Desc}
	}
	if result == nil {
		return nil
	}
	if err := json.Unmarshal(r.Return, result); err != nil {
		return fail(fmt.Errorf("%w: %w", ErrProtocol, err))
	}
	return nil
}

// expect makes a place for an answer. The channel has room for it, so that the
// reader never waits for a caller.
func (m *Monitor) expect() (uint64, <-chan reply, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.err != nil {
		return 0, nil, m.err
	}
	m.nextID++
	answer := make(chan reply, 1)
	m.waiting[m.nextID] = answer
	return m.nextID, answer, nil
}

func (m *Monitor) forget(id uint64) {
	m.mu.Lock()
	defer m.mu.Unlock()
	delete(m.waiting, id)
}

// Events implements [Executor] and go-qemu's Monitor. Each call gets its own
// channel, which holds 256 events.
func (m *Monitor) Events(ctx context.Context) (<-chan Event, error) {
	r := &eventReader{ch: make(chan Event, eventBuffer)}
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.err != nil {
		return nil, &OpError{Op: "events", Addr: m.addr, Err: m.err}
	}
	m.readers[r] = struct{}{}
	context.AfterFunc(ctx, func() {
		m.mu.Lock()
		defer m.mu.Unlock()
		m.removeReader(r)
	})
	return r.ch, nil
}

// removeReader is called with the lock held, by whoever comes first: the end of
// the reader's context or of the connection.
func (m *Monitor) removeReader(r *eventReader) {
	if _, ok := m.readers[r]; ok {
		delete(m.readers, r)
		close(r.ch)
	}
}

// Done is closed when the connection has ended; Err then says why.
func (m *Monitor) Done() <-chan struct{} { return m.done }

// Err returns why the connection has ended, nil while it has not.
func (m *Monitor) Err() error {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.err
}

// Close ends the connection. Calls that wait fail with ErrClosed.
func (m *Monitor) Close() error {
	m.end(ErrClosed)
	return nil
}

// end is called by whoever first finds that the connection is over.
func (m *Monitor) end(err error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.err != nil {
		return
	}
	m.err = err
	close(m.done)
	m.conn.Close() // ends the reader's and the writer's system calls
	for r := range m.readers {
		m.removeReader(r)
	}
}

// write ends with the connection, or ends it. A panic does, too: who waits for an answer puts
// the guest right over another one.
func (m *Monitor) write() {
	m.end(rescue.Call(func() error {
		for {
			select {
			case o := <-m.out:
				if err := m.send(o); err != nil {
					return fmt.Errorf("%w: %w", ErrLost, err)
				}
			case <-m.done:
				return ErrLost // it was ended before, and why is known
			}
		}
	}))
}

func (m *Monitor) send(o outgoing) error {
	if o.file != nil {
		defer o.file.Close()
		n, _, err := m.conn.(*net.UnixConn).WriteMsgUnix(o.line, unix.UnixRights(int(o.file.Fd())), nil)
		if err != nil {
			return err
		}
		if o.line = o.line[n:]; len(o.line) == 0 {
			return nil
		}
	}
	_, err := m.conn.Write(o.line)
	return err
}

// read is as write.
func (m *Monitor) read(in *decoder) {
	m.end(rescue.Call(func() error {
		for {
			raw, err := in.next()
			if err != nil {
				return readError(err)
			}
			if err := m.dispatch(raw); err != nil {
				return err
			}
		}
	}))
}

// dispatch hands one message to whom it concerns. It never waits.
func (m *Monitor) dispatch(raw json.RawMessage) error {
	var message struct {
		ID    *uint64 `json:"id"`
		Event string  `json:"event"`
		reply
	}
	if err := json.Unmarshal(raw, &message); err != nil {
		return fmt.Errorf("%w: %w in %s", ErrProtocol, err, shorten(raw))
	}
	if message.Event != "" {
		var e Event
		if err := json.Unmarshal(raw, &e); err != nil {
			return fmt.Errorf("%w: %w in %s", ErrProtocol, err, shorten(raw))
		}
		m.deliver(e)
		return nil
	}
	if message.Error == nil && message.Return == nil || message.ID == nil {
		// QEMU leaves out the id only when it could not parse a command; nobody
		// can tell whose answer that is.
		return fmt.Errorf("%w: %s", ErrProtocol, shorten(raw))
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	if answer, ok := m.waiting[*message.ID]; ok {
		delete(m.waiting, *message.ID) // a second answer finds nobody
		answer <- message.reply
	}
	return nil
}

func (m *Monitor) deliver(e Event) {
	m.mu.Lock()
	defer m.mu.Unlock()
	for r := range m.readers {
		select {
		case r.ch <- e:
			continue
		default:
		}
		// Full: the oldest goes. Only this goroutine sends, so there is room
		// then, whether the reader took one meanwhile or not.
		select {
		case <-r.ch:
			m.lostEvents.Add(1)
		default:
		}
		r.ch <- e
	}
}

// Connect implements go-qemu's Monitor. A Monitor is connected from the start;
// it does not connect again when the connection is lost.
func (m *Monitor) Connect() error { return m.Err() }

// Disconnect implements go-qemu's Monitor.
func (m *Monitor) Disconnect() error { return m.Close() }

// Run implements go-qemu's Monitor: command is a whole JSON command, and the
// result the whole JSON answer. An id in the command is replaced.
func (m *Monitor) Run(command []byte) ([]byte, error) {
	var c struct {
		Execute   string          `json:"execute"`
		OOB       string          `json:"exec-oob"`
		Arguments json.RawMessage `json:"arguments"`
	}
	if err := json.Unmarshal(command, &c); err != nil {
		return nil, &OpError{Op: "run", Addr: m.addr, Err: err}
	}
	var args any
	if c.Arguments != nil {
		args = c.Arguments
	}
	var result json.RawMessage
	var err error
	if c.OOB != "" {
		err = m.ExecuteOOB(context.Background(), c.OOB, args, &result)
	} else {
		err = m.Execute(context.Background(), c.Execute, args, &result)
	}
	if err != nil {
		return nil, err
	}
	return json.Marshal(map[string]json.RawMessage{"return": result})
}

// splitAddress tells a Unix socket's path from HOST:PORT.
func splitAddress(address string) (network, addr string) {
	if path, ok := strings.CutPrefix(address, "unix:"); ok {
		return "unix", path
	}
	if host, ok := strings.CutPrefix(address, "tcp:"); ok {
		return "tcp", host
	}
	if !strings.Contains(address, "/") {
		if _, port, err := net.SplitHostPort(address); err == nil {
			if _, err := strconv.ParseUint(port, 10, 16); err == nil {
				return "tcp", address
			}
		}
	}
	return "unix", address
}

// decoder takes whole JSON values off a stream. QEMU writes a value a line, or
// several lines with pretty=on; both are read.
type decoder struct {
	json  *json.Decoder
	limit *limitedReader
}

// limitedReader bounds what is read for one message, so that a peer that never
// ends its message cannot make the buffer grow for ever.
type limitedReader struct {
	r    io.Reader
	left int
	max  int
}

func newDecoder(r io.Reader, max int) *decoder {
	limit := &limitedReader{r: r, left: max, max: max}
	return &decoder{json: json.NewDecoder(limit), limit: limit}
}

func (l *limitedReader) Read(p []byte) (int, error) {
	if l.left <= 0 {
		return 0, fmt.Errorf("%w: a message of more than %d bytes", ErrProtocol, l.max)
	}
	n, err := l.r.Read(p[:min(len(p), l.left)])
	l.left -= n
	return n, err
}

// next returns the next value; it is a copy that nobody overwrites.
func (d *decoder) next() (json.RawMessage, error) {
	d.limit.left = d.limit.max
	var raw json.RawMessage
	if err := d.json.Decode(&raw); err != nil {
		return nil, err
	}
	return raw, nil
}

// human tells, when what came first is no JSON, whether it is what a human monitor
// begins with: "QEMU 7.2.0 monitor - type 'help' ...". More than that word may not have
// come yet.
func (d *decoder) human() bool {
	b := make([]byte, 5)
	n, _ := io.ReadFull(d.json.Buffered(), b)
	return string(b[:n]) == "QEMU "
}

func readError(err error) error {
	var syntax *json.SyntaxError
	switch {
	case errors.Is(err, ErrProtocol):
		return err
	case errors.As(err, &syntax):
		return fmt.Errorf("%w: %w", ErrProtocol, err)
	case errors.Is(err, io.EOF):
		return fmt.Errorf("%w: QEMU has closed it", ErrLost)
	default:
		return fmt.Errorf("%w: %w", ErrLost, err)
	}
}

// shorten keeps error messages readable whatever the peer sent.
func shorten(raw []byte) string {
	const most = 80
	raw = bytes.TrimSpace(raw)
	if len(raw) > most {
		return fmt.Sprintf("%q...", raw[:most])
	}
	return fmt.Sprintf("%q", raw)
}
